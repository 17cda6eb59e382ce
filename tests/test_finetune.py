"""finetune.py: heads and losses equal their equations, runs repeat, ranks agree, errors are one sentence."""
import json
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from conftest import CASES, run_here, run_ranks, write
from PIL import Image

import finetune
import images
import phantom
import score
import vit
from datasets import Row
from finetune import Config, resolved

cli, torchrun = partial(run_here, finetune), partial(run_ranks, 'finetune.py')


# ---- risk ---------------------------------------------------------------------------------------------------------

def test_hazard_equals_the_reference_and_never_falls():
    z = np.load(CASES / 'hazard.npz')
    x, W, b = (torch.from_numpy(z[name]) for name in ('x', 'W', 'b'))
    p = finetune.hazard(x, W, b)
    assert p.numpy() == pytest.approx(z['dbt'], abs=2e-7) and (p.diff(dim=1) > 0).all()
    y, seen = torch.from_numpy(z['y']), torch.from_numpy(z['mask'])
    assert finetune.hazard_loss(finetune.cumulative(x, W, b), y, seen).item() == pytest.approx(z['loss_dbt'], abs=1e-6)


def test_hazard_loss_stays_finite_where_probabilities_saturate():
    y, seen = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2)
    for hazard in (1e-12, 1e-3, 1.0, 30.0, 500.0):
        H = torch.tensor([[hazard, hazard]], requires_grad=True)
        loss = finetune.hazard_loss(H, y, seen)
        loss.backward()
        assert loss.isfinite() and H.grad.isfinite().all()
    H = torch.rand(6, 5, dtype=torch.float64).cumsum(1) + 0.1
    y, seen = torch.randint(0, 2, (6, 5)).double(), torch.ones(6, 5, dtype=torch.float64)
    plain = torch.nn.functional.binary_cross_entropy(1 - torch.exp(-H), y)
    assert finetune.hazard_loss(H, y, seen).item() == pytest.approx(plain.item(), abs=1e-12)


# ---- units and features -------------------------------------------------------------------------------------------

TINY = dict(size=28, width=16, depth=1, heads=2, layerscale=1.0)


def test_views_stand_in_the_order_of_dbt_dino_and_a_missing_one_is_the_mean_of_the_others(monkeypatch):
    rows = [Row(f'{side}{view}', 'p', exam, side, view, 'train', dict(cancer=label))
            for exam, label in (('e1', '0'), ('e2', '1')) for side in 'LR' for view in ('MLO', 'CC', 'AT')
            if (exam, side, view) != ('e2', 'L', 'CC')]
    cfg = Config(level='exam', pool='cls_mean', freeze=True)
    one, two = finetune.units_of(cfg, rows, ['0', '1'])
    assert (one.name, one.label, two.name, two.label) == ('p/e1', 0, 'p/e2', 1)
    assert [row.path for _, row in sorted(one.views, key=lambda view: view[0])] == ['RCC', 'LCC', 'RMLO', 'LMLO']
    monkeypatch.setattr(finetune, 'encode', lambda encoder, values, of_patches: torch.tensor(values).view(-1, 1, 1))
    batch = [[(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)], [(0, 1.0), (0, 3.0), (2, 4.0), (3, 9.0)]]
    x = finetune.pooled(cfg, finetune.side_by_side(cfg, None, batch))
    assert x.tolist() == [[1, 2, 3, 4], [2, 5, 4, 9]]       # two files of RCC: their mean; no LCC


def test_a_breast_takes_its_highest_label_and_no_part_with_lesions_of_two_types():
    with pytest.raises(ValueError, match='--level breast needs laterality and view'):
        finetune.units_of(Config(level='breast'), [Row('a', 'p')], ['0', '1'])
    rows = [Row(view, 'p', laterality='L', view=view, labels=dict(lesion_type=kind, birads=kind))
            for kind, view in zip('12', ('CC', 'MLO'))]
    assert finetune.units_of(Config(level='breast', task='lesion_type'), rows, ['1', '2']) == []
    assert finetune.units_of(Config(level='breast', task='birads'), rows, ['1', '2'])[0].label == 1
    with pytest.raises(ValueError, match='--subgroup race: no such column in age'):
        finetune.units_of(Config(subgroup='race', level='image'), [Row('a', 'p', labels=dict(cancer='1'),
                                                                       record=dict(age='50'))], ['0', '1'])


@pytest.fixture(scope='module')
def units(tmp_path_factory):
    """Four images, one of them broken, and a volume of seven slices."""
    where = tmp_path_factory.mktemp('files')
    volumes = [phantom.breast(np.random.default_rng(i), 7 if i == 4 else 1, 40, 30).volume for i in range(5)]
    phantom.dataset(where, volumes)
    (where / '0001.npy').write_bytes(b'broken')
    rows = [Row(str(path), '', labels=dict(cancer='0'), name=path.name) for path in sorted(where.glob('*.npy'))]
    return finetune.units_of(Config(level='image'), rows, ['0'])


def test_streamed_statistics_are_those_of_all_tokens_at_once(units, group, capsys, monkeypatch):
    monkeypatch.setattr(finetune, 'CHUNK', 3)
    torch.manual_seed(0)
    encoder, cfg = vit.ViT(**TINY), Config(level='image', workers=0, pool='patch_mean_std', freeze=True, cache='')
    kept, x = finetune.features(cfg, encoder, units, torch.device('cpu'))
    assert [unit.name for unit in kept] == ['0000.npy', '0002.npy', '0003.npy', '0004.npy'] and x.isfinite().all()
    assert '0001.npy' in capsys.readouterr().err
    stacks = [finetune.Views(cfg, 28)[unit, False][0][1] for unit in kept]
    with torch.no_grad():
        moments = finetune.encode(encoder, stacks)
        cls, patches = encoder(torch.from_numpy(stacks[3]).unsqueeze(1) / 255)
        alone = finetune.encode(encoder, stacks, of_patches=False)
    tokens = patches.flatten(0, 1)                                                      # (7 * 4, D)
    plain = torch.stack([cls.mean(0), cls.std(0), tokens.mean(0), tokens.std(0)])
    assert moments[3].numpy() == pytest.approx(plain.numpy(), abs=1e-5)
    assert (moments[0, 1] < 1e-5).all() and torch.equal(alone, moments[:, :2])
    assert x.numpy() == pytest.approx(moments[:, 2:].flatten(1).numpy(), abs=1e-6)


@pytest.mark.parametrize('freeze, frame, taken', [(True, None, range(7)), (False, None, (0, 2, 4, 6)), (True, 4, [4])])
def test_slices_are_evenly_spaced_and_a_frame_is_itself(units, freeze, frame, taken):
    slot, row = units[4].views[0]
    unit = replace(units[4], views=[(slot, replace(row, frame=frame))])
    (_, stack), = finetune.Views(Config(freeze=freeze), 28)[unit, False]
    resize = partial(Image.Image.resize, size=(28, 28), resample=Image.Resampling.BICUBIC)
    volume = np.load(row.path)
    assert np.array_equal(stack, [np.asarray(resize(Image.fromarray(volume[k]))) for k in taken])
    (_, mirrored), = finetune.Views(Config(freeze=freeze), 28)[unit, True]
    assert np.array_equal(mirrored, stack[..., ::-1])


def test_features_are_cached_by_file_and_weights(units, group, tmp_path, monkeypatch):
    cfg = Config(level='image', cache=str(tmp_path), workers=0, pool='cls_mean', freeze=True)
    encoded = partial(finetune.features, units=[units[0], units[2]], device=torch.device('cpu'))
    encoder = vit.ViT(**TINY)
    first = encoded(cfg, encoder)[1]
    monkeypatch.setattr(images, 'read', None)               # a second reading would fail
    assert torch.equal(encoded(cfg, encoder)[1], first)
    assert encoded(replace(cfg, pool='patch_mean_std'), encoder)[1].shape == (2, 32)
    monkeypatch.undo()
    with torch.no_grad():
        encoder.norm.bias += 1
    assert (encoded(cfg, encoder)[1] != first).all()
    assert len(list(tmp_path.glob('*/*.npy'))) == 4 and not list(tmp_path.glob('*/*.*.npy'))


# ---- heads --------------------------------------------------------------------------------------------------------

def test_the_mlp_has_three_layers_and_heads_compute_in_fp32_under_autocast():
    assert [len(finetune.Head(kind, 8, 3).layers) for kind in ('mlp', 'linear')] == [3, 1]
    with torch.autocast('cpu', torch.bfloat16):
        H = finetune.Head('hazard', 8, 5)(torch.randn(4, 8))
    assert H.shape == (4, 5) and (H.diff(dim=1) > 0).all() and H.dtype == torch.float32


def test_standardizing_leaves_out_what_does_not_vary():
    head = finetune.Head('linear', 3, 2)
    x = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 4.0], [5.0, 5.0, 8.0]])
    head.standardize(x)
    z = (x - head.shift) * head.scale
    assert z.mean(0) == pytest.approx(np.zeros(3), abs=1e-6) and z.std(0).tolist() == pytest.approx([1, 0, 1])


def test_rare_classes_weigh_as_much_as_common_ones():
    weight = finetune.class_weights(Config(), torch.tensor([0] * 9 + [1]))
    assert weight[:9].sum() == pytest.approx(weight[9:].sum()) and weight.mean() == pytest.approx(1)
    risk = torch.tensor([[0, 1, -1, -1, -1], [0] * 5, [0] * 5, [0, 0, -1, -1, -1]])
    weight = finetune.class_weights(Config(task='risk'), risk)
    assert weight[0] == pytest.approx(weight[1:].sum())


def test_random_weights_have_layerscale_1_whatever_pretraining_starts_from(tmp_path):
    model = vit.ViT(**TINY | dict(layerscale=1e-5))
    torch.save(dict(vit=model.config, teacher={f'backbone.{k}': v for k, v in model.state_dict().items()}),
               tmp_path / 'last.pt')
    random = finetune.encoders(Config(encoder=str(tmp_path / 'last.pt')))['random init']
    assert (random.blocks[0].ls1.gamma == 1).all() and random.config == model.config


def test_the_search_keeps_the_rate_with_the_least_validation_loss(group):
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    cfg = resolved(Config(task='cancer', search=4, epochs=8, random_encoder=True))
    data = x[:80], y[:80], x[80:], y[80:]
    head, least = finetune.fit(cfg, ('0', '1'), *data)
    rates = np.exp(np.random.default_rng([0, 24]).uniform(*np.log((1e-5, 1e-2)), 4))
    losses = [finetune.train_head(cfg, ('0', '1'), *data, lr)[1] for lr in rates]
    assert least == min(losses) < max(losses)
    assert finetune.validation_loss(cfg, head, *data[2:]) == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize('flags, words', [
    (dict(task='risk'), 'risk takes the hazard head alone'),
    (dict(dataset='inbreast'), '--dataset inbreast: expected rsna, vindr'),
    (dict(head='knn', freeze=False), 'neither --search nor --head knn'),
    (dict(head='mlp', search=3), 'neither --search nor --head knn'),
    (dict(random_encoder=False), '--encoder FILE is missing')])
def test_what_cannot_work_is_refused_at_once(flags, words):
    with pytest.raises(ValueError, match=words):
        resolved(Config(**dict(random_encoder=True) | flags))


def test_defaults_follow_the_papers():
    linear, mlp, risk = (resolved(Config(head=head, task=task, random_encoder=True)) for head, task in (
        ('linear', 'density'), ('mlp', 'cancer'), ('hazard', 'risk')))
    assert (linear.freeze, linear.epochs, linear.pool) == (True, 75, 'patch_mean_std')
    assert (linear.wd, linear.batch, linear.draws) == (1e-4, 64, 1000)
    assert (mlp.freeze, mlp.pool) == (False, 'cls_mean')
    assert (risk.epochs, risk.level, risk.freeze) == (100, 'exam', True)
    assert finetune.SLOTS['exam'] == ('RCC', 'LCC', 'RMLO', 'LMLO')


# ---- whole runs ---------------------------------------------------------------------------------------------------

FAST = ['--workers', '0', '--draws', '60', '--epochs', '4']
TUNED = ['--task', 'cancer', '--head', 'mlp', *FAST, '--batch', 16, '--micro_batch', 4, '--level',
         'breast', '--lr', 1e-3]


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """A checkpoint as pretrain.py writes it, of a tiny encoder."""
    path = tmp_path_factory.mktemp('encoder') / 'last.pt'
    torch.manual_seed(3)
    model = vit.ViT(**TINY)
    torch.save(dict(vit=model.config, config=dict(layerscale=1.0),
                    teacher={f'backbone.{k}': v for k, v in model.state_dict().items()}), path)
    return path


@pytest.fixture(scope='module')
def exams(tmp_path_factory):
    """Forty exams of four views, two of them incomplete, as a list with density, cancer, risk and age; a few views are
    volumes. Brightness tells cancer, so that something can be learnt."""
    where = tmp_path_factory.mktemp('exams')
    lines = ['path|patient|exam|laterality|view|density|cancer|years_to_cancer|years_followup|age']
    for i in range(40):
        rng = np.random.default_rng(i)
        sick = i % 2
        for side, view in product('LR', ('CC', 'MLO')):
            if (i, side) == (3, 'L') or (i, side, view) == (8, 'R', 'MLO'):
                continue
            volume = phantom.breast(rng, 3 if i % 10 == 0 else 1, 40, 30, density=i % 4).volume // (1 if sick else 3)
            np.save(where / f'{i}{side}{view}.npy', volume if len(volume) > 1 else volume[0])
            lines.append(f"{i}{side}{view}.npy|p{i}|e{i}|{side}|{view}|{'abcd'[i % 4]}|{sick}|"
                         f"{i % 5 if sick else ''}|{1 + i % 7}|{40 + i}")
    write(where / 'manifest.csv', lines)
    return where


@pytest.fixture(scope='module')
def risk(exams, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp('risk') / 'run'
    cli('--root', exams, '--task', 'risk', '--head', 'hazard', '--encoder', encoder, '--out', out, *FAST,
        '--cache', out / 'cache')
    return out


@pytest.fixture(scope='module')
def tuned(exams, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp('tuned') / 'run'
    cli('--root', exams, '--encoder', encoder, '--out', out, *TUNED)
    return out


def main_result(out):
    return score.read_run(out)[-1]


def probabilities(capsys):
    """Those of the first line that predict has printed."""
    return [float(part.split()[-1]) for part in capsys.readouterr().out.splitlines()[0].split(', ')]


def test_the_demo_runs_both_tasks_and_says_what_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli('--phantoms', 80, '--search', 2, *FAST)
    text = capsys.readouterr().out
    assert 'A demonstration on phantoms' in text and 'runs/demo/last.pt is absent: random weights only' in text
    for task, metric in (('density', 'accuracy'), ('cancer', 'AUC')):
        out = tmp_path / 'runs' / 'finetune-demo' / task
        scores = json.loads((out / 'scores.json').read_text())
        assert metric in scores['runs'][str(out.relative_to(tmp_path))]['random init']
        for name in ('roc.png', 'confusion.png'):
            assert np.array(Image.open(out / name)).std() > 10
        assert len((out / 'predictions.csv').read_text().splitlines()) == 33
    cli('--phantoms', 80, *FAST)                            # the demo may be run again


def test_an_exam_run_counts_missing_views_and_gives_a_risk_that_never_falls(risk):
    result = main_result(risk)
    assert result.p.shape[1] == 5 and (np.diff(result.p, axis=1) >= 0).all() and result.run['level'] == 'exam'
    assert '2 exams lack a view' in result.run['notes'][-1]


def test_two_ranks_give_the_result_of_one(risk, exams, encoder, tmp_path):
    rc, text = torchrun(2, '--root', exams, '--task', 'risk', '--head', 'hazard', '--encoder', encoder, '--out',
                        tmp_path / 'run', *FAST, '--cache', tmp_path / 'cache')
    assert rc == 0, text
    assert main_result(tmp_path / 'run').p == pytest.approx(main_result(risk).p, abs=1e-5)


def test_finetuning_moves_the_encoder_and_learns(tuned, encoder):
    before, after = vit.load(encoder).state_dict(), vit.load(tuned / 'last.pt').state_dict()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert moved['blocks.0.attn.qkv.weight'] > 1e-5 and moved['mask_token'] == 0
    result = main_result(tuned)
    assert score.measures(result.run)['AUC'](*result.arrays()) > 0.9 and result.run['level'] == 'breast'


def test_finetuning_on_two_ranks_is_finetuning_on_one(tuned, exams, encoder, tmp_path):
    rc, text = torchrun(2, '--root', exams, '--encoder', encoder, '--out', tmp_path / 'run', *TUNED)
    assert rc == 0, text
    one, two = (vit.load(out / 'last.pt').state_dict() for out in (tuned, tmp_path / 'run'))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-3


def test_every_share_of_the_training_set_and_dinov2_have_a_row_each(exams, encoder, tmp_path, capsys):
    cli('--root', exams, '--task', 'cancer', '--head', 'knn', '--encoder', encoder, '--dinov2', encoder, '--out',
        tmp_path / 'run', *FAST, '--cache', tmp_path / 'cache', '--fraction', '0.5', '1.0', '--subgroup', 'age')
    text, results = capsys.readouterr().out, score.read_run(tmp_path / 'run')
    assert [(r.encoder, r.share) for r in results] == list(product(('random init', 'DINOv2', 'pretrained'), (0.5, 1)))
    assert (tmp_path / 'run' / 'fraction.png').exists()
    assert set(results[-1].groups) <= {'<50', '50-60', '60-70', '70+'}
    for words in ('pretrained, 50%', 'pretrained - DINOv2: ', 'pretrained - random init, 50%'):
        assert words in text


def test_a_trained_head_is_tested_on_another_data_set(tuned, exams, tmp_path, capsys):
    """On the same list: the predictions repeat."""
    cli('test', '--checkpoint', tuned, '--root', exams, '--out', tmp_path / 'again')
    assert 'trained elsewhere' in capsys.readouterr().out
    again, result = main_result(tmp_path / 'again'), main_result(tuned)
    assert list(again.units) == list(result.units) and again.p == pytest.approx(result.p, abs=1e-5)


def test_predict_reads_an_exam_or_breasts(risk, tuned, exams, encoder, capsys):
    files = [f'{side}{view}={exams}/5{side}{view}.npy' for side, view in product('RL', ('CC', 'MLO'))]
    cli('predict', *files, '--checkpoint', risk)
    values = probabilities(capsys)
    assert len(values) == 5 and values == sorted(values)
    cli('predict', *files, '--checkpoint', tuned)
    text = capsys.readouterr().out
    assert 'breast/R: cancer 0 = ' in text and 'breast/L: cancer 0 = ' in text
    with pytest.raises(ValueError, match='this model reads exams: give VIEW=FILE, of RCC, LCC, RMLO, LMLO'):
        cli('predict', f'{exams}/5LCC.npy', '--checkpoint', risk)
    with pytest.raises(ValueError, match='holds an encoder without a head'):
        cli('predict', f'{exams}/5LCC.npy', '--checkpoint', encoder.parent)


@pytest.mark.parametrize('head', ['linear', 'knn'])
def test_predict_repeats_the_predictions_of_the_run(head, exams, encoder, tmp_path, capsys):
    cli('--root', exams, '--task', 'density', '--head', head, '--encoder', encoder, '--out', tmp_path / 'run', *FAST,
        '--cache', tmp_path / 'cache')
    result = main_result(tmp_path / 'run')
    capsys.readouterr()
    cli('predict', exams / result.units[0], '--checkpoint', tmp_path / 'run')
    assert probabilities(capsys) == pytest.approx(result.p[0], abs=1e-3)
    (tmp_path / 'broken.npy').write_bytes(b'broken')
    with pytest.raises(ValueError, match='broken.npy: '):
        cli('predict', tmp_path / 'broken.npy', '--checkpoint', tmp_path / 'run')


def test_a_label_that_is_no_class_is_refused_with_its_file(exams, encoder, tmp_path):
    with pytest.raises(ValueError, match="1LCC.npy: density 'b' is none of a, c, d; correct it, or name the labels"):
        cli('--root', exams, '--task', 'density', '--classes', 'a', 'c', 'd', '--encoder', encoder, '--out', tmp_path)


def test_a_run_is_not_overwritten_and_a_wrong_encoder_is_named(risk, exams, encoder, tmp_path):
    torch.save(dict(x=torch.zeros(1)), tmp_path / 'other.pt')
    run = partial(cli, '--root', exams, '--task', 'density', *FAST)
    with pytest.raises(ValueError, match='holds a run; choose another --out'):
        run('--encoder', encoder, '--out', risk)
    with pytest.raises(OSError, match='nowhere.pt'):
        run('--encoder', 'nowhere.pt', '--out', tmp_path / 'run')
    with pytest.raises(ValueError, match='other.pt'):
        run('--encoder', encoder, '--dinov2', tmp_path / 'other.pt', '--out', tmp_path / 'run')
    with pytest.raises(ValueError, match='--dataset and --task need --root DIR'):
        cli('--dataset', 'rsna')


@pytest.mark.parametrize('broken', ['val', 'train'])
def test_unreadable_files_are_left_out_until_a_split_lacks_a_class(broken, exams, encoder, tmp_path, capsys):
    """The positives of validation; two training images, each alone in its micro-batch while the encoder is trained."""
    lines = (exams / 'manifest.csv').read_text().splitlines()
    splits = ['split', *('train val test'.split()[int(line.split(',')[1][1:]) % 7 % 3] for line in lines[1:])]
    (tmp_path / 'manifest.csv').write_text('\n'.join(f'{a},{b}' for a, b in zip(lines, splits)) + '\n')
    for i, (line, split) in enumerate(zip(lines[1:], splits[1:])):
        path, cancer = tmp_path / line.split(',')[0], line.split(',')[6]
        spoilt = broken == split and (i < 2 if broken == 'train' else cancer == '1')
        path.write_bytes(b'broken' if spoilt else (exams / path.name).read_bytes())
    run = partial(cli, '--root', tmp_path, '--task', 'cancer', '--encoder', encoder, '--out', tmp_path / 'run', *FAST)
    if broken == 'val':
        with pytest.raises(ValueError, match='the val split holds fewer than two classes.*unreadable files'):
            run('--cache', tmp_path / 'cache')
    else:
        run('--head', 'mlp', '--epochs', 1, '--batch', 16, '--micro_batch', 1)
        assert 'skipped: ' in capsys.readouterr().err and main_result(tmp_path / 'run').p.shape[1] == 2


@pytest.mark.parametrize('head', ['linear', 'mlp'])
def test_training_that_diverges_is_no_result(head, exams, encoder, tmp_path):
    with pytest.raises(ValueError, match='the validation loss was never finite; lower --lr'):
        cli('--root', exams, '--task', 'cancer', '--head', head, '--lr', 1e30, '--encoder', encoder, '--out',
            tmp_path / 'run', *FAST, '--cache', tmp_path / 'cache')
