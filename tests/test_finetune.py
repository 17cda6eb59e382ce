"""finetune.py: heads and losses equal their equations, runs repeat, ranks agree, errors are one sentence."""
import json
import shutil
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

cli = partial(run_here, finetune)
CPU = torch.device('cpu')
TINY = dict(size=28, width=16, depth=1, heads=2, layerscale=1.0)


# ---- risk ---------------------------------------------------------------------------------------------------------

def test_hazard_and_its_loss_equal_the_reference():
    z = np.load(CASES / 'hazard.npz')
    x, W, b, y, seen = (torch.from_numpy(z[name]) for name in ('x', 'W', 'b', 'y', 'mask'))
    p = finetune.hazard(x, W, b)
    assert p.numpy() == pytest.approx(z['dbt'], abs=2e-7) and (p.diff(dim=1) > 0).all()
    assert finetune.hazard_loss(finetune.cumulative(x, W, b), y, seen).item() == pytest.approx(z['loss_dbt'], abs=1e-6)


@pytest.mark.parametrize('hazard', [0.0, 1e-12, 1.0, 30.0, 500.0])
def test_hazard_loss_stays_finite_where_probabilities_saturate(hazard):
    H = torch.tensor([[hazard, hazard]], requires_grad=True)
    loss = finetune.hazard_loss(H, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite() and H.grad.isfinite().all()


# ---- units and features -------------------------------------------------------------------------------------------

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
    rows = [Row(view, 'p', laterality='L', view=view, labels=dict(lesion_type=kind, birads=kind))
            for kind, view in zip('12', ('CC', 'MLO'))]
    assert finetune.units_of(Config(level='breast', task='birads'), rows, ['1', '2'])[0].label == 1
    assert finetune.units_of(Config(level='breast', task='lesion_type'), rows, ['1', '2']) == []


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
    kept, x = finetune.features(cfg, encoder, units, CPU)
    assert [unit.name for unit in kept] == ['0000.npy', '0002.npy', '0003.npy', '0004.npy']
    assert '0001.npy' in capsys.readouterr().err
    stacks = [finetune.Views(cfg, 28)[unit, False][0][1] for unit in kept]
    with torch.no_grad():
        moments = finetune.encode(encoder, stacks)
        cls, patches = encoder(torch.from_numpy(stacks[3]).unsqueeze(1) / 255)
    tokens = patches.flatten(0, 1)                                                      # (7 * 4, D)
    plain = torch.stack([cls.mean(0), cls.std(0), tokens.mean(0), tokens.std(0)])
    assert moments[3].numpy() == pytest.approx(plain.numpy(), abs=1e-5)
    assert (moments[0, 1] < 1e-5).all()                     # the deviation of a single CLS token
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
    encoded = partial(finetune.features, units=[units[0], units[2]], device=CPU)
    encoder = vit.ViT(**TINY)
    first = encoded(cfg, encoder)[1]
    with monkeypatch.context() as patch:
        patch.setattr(images, 'read', None)                 # a second reading would fail
        assert torch.equal(encoded(cfg, encoder)[1], first)
        assert encoded(replace(cfg, pool='patch_mean_std'), encoder)[1].shape == (2, 32)
    with torch.no_grad():
        encoder.norm.bias += 1
    assert (encoded(cfg, encoder)[1] != first).all()


# ---- heads --------------------------------------------------------------------------------------------------------

def test_rare_classes_weigh_as_much_as_common_ones():
    weight = finetune.class_weights(Config(), torch.tensor([0] * 9 + [1]))
    assert weight[:9].sum() == pytest.approx(weight[9:].sum()) and weight.mean() == pytest.approx(1)
    risk = torch.tensor([[0, 1, -1, -1, -1], [0] * 5, [0] * 5, [0, 0, -1, -1, -1]])
    weight = finetune.class_weights(Config(task='risk'), risk)
    assert weight[0] == pytest.approx(weight[1:].sum())


def test_the_search_keeps_the_rate_with_the_least_validation_loss(group, monkeypatch):
    tried = {}

    def train_head(*given):
        tried[given[-1]] = abs(np.log(given[-1] / 3e-4))
        return given[-1], tried[given[-1]]                  # the rate stands for its head

    monkeypatch.setattr(finetune, 'train_head', train_head)
    rate, loss = finetune.fit(Config(search=24), (), None, None, None, None)
    assert loss == tried[rate] == min(tried.values())
    assert len(tried) == 24 and 1e-5 < min(tried) < 1e-4 and 1e-3 < max(tried) < 1e-2


def test_defaults_follow_the_papers():
    linear, mlp, risk = (resolved(Config(head=head, task=task, random_encoder=True)) for head, task in (
        ('linear', 'density'), ('mlp', 'cancer'), ('hazard', 'risk')))
    assert (linear.freeze, linear.epochs, linear.pool) == (True, 75, 'patch_mean_std')
    assert (linear.wd, linear.batch, linear.draws) == (1e-4, 64, 1000)
    assert (mlp.freeze, mlp.pool, len(finetune.Head('mlp', 8, 3).layers)) == (False, 'cls_mean', 3)
    assert (risk.epochs, risk.level, risk.freeze) == (100, 'exam', True)
    assert finetune.SLOTS['exam'] == ('RCC', 'LCC', 'RMLO', 'LMLO')


# ---- whole runs ---------------------------------------------------------------------------------------------------

FAST = ('--workers', 0, '--draws', 60, '--epochs', 4)
FLAGS = dict(risk=('--task', 'risk', '--head', 'hazard', *FAST),
             tuned=('--task', 'cancer', '--head', 'mlp', '--level', 'breast', *FAST, '--batch', 16, '--micro_batch', 4,
                    '--lr', 1e-3))


@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """A checkpoint as pretrain.py writes it, of a tiny encoder with a LayerScale that is not 1."""
    path = tmp_path_factory.mktemp('encoder') / 'last.pt'
    torch.manual_seed(3)
    model = vit.ViT(**TINY | dict(layerscale=0.9))
    torch.save(dict(vit=model.config, teacher={f'backbone.{k}': v for k, v in model.state_dict().items()}), path)
    return path


@pytest.fixture(scope='module')
def exams(tmp_path_factory):
    """Forty exams of four views, two of them incomplete, as a list with density, cancer, risk and age; a few views are
    volumes. Brightness tells cancer, so that something can be learnt."""
    where = tmp_path_factory.mktemp('exams')
    lines = ['path|patient|exam|laterality|view|split|density|cancer|years_to_cancer|years_followup|age']
    for i in range(40):
        rng, split = np.random.default_rng(i), ('train', 'val', 'test')[i % 7 % 3]
        sick = i % 2
        for side, view in product('LR', ('CC', 'MLO')):
            if (i, side) == (3, 'L') or (i, side, view) == (8, 'R', 'MLO'):
                continue
            volume = phantom.breast(rng, 3 if i % 10 == 0 else 1, 40, 30, density=i % 4).volume // (1 if sick else 3)
            np.save(where / f'{i}{side}{view}.npy', volume if len(volume) > 1 else volume[0])
            years = f"{i % 5 if sick else ''}|{1 + i % 7}"
            lines.append(f"{i}{side}{view}.npy|p{i}|e{i}|{side}|{view}|{split}|{'abcd'[i % 4]}|{sick}|{years}|{40 + i}")
    write(where / 'manifest.csv', lines)
    return where


@pytest.fixture(scope='module')
def run(exams, encoder, tmp_path_factory):
    """run(flags): the folder of a run on these exams"""
    def one(*flags):
        out = tmp_path_factory.mktemp('run') / 'run'
        cli('--root', exams, '--encoder', encoder, '--out', out, '--cache', out / 'cache', *flags)
        return out
    return one


@pytest.fixture(scope='module')
def runs(run):
    return {name: run(*flags) for name, flags in FLAGS.items()}


def main_result(out):
    return score.read_run(out)[-1]


def test_random_weights_have_layerscale_1_whatever_pretraining_starts_from(encoder):
    random, pretrained = finetune.encoders(Config(encoder=str(encoder))).values()
    assert (random.blocks[0].ls1.gamma == 1).all() and (pretrained.blocks[0].ls1.gamma != 1).all()


def test_the_demo_runs_both_tasks_and_says_what_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli('--phantoms', 80, '--search', 2, *FAST)
    text = capsys.readouterr().out
    assert 'A demonstration on phantoms' in text and 'runs/demo/last.pt is absent: random weights only' in text
    for task, metric in (('density', 'accuracy'), ('cancer', 'AUC')):
        out = tmp_path / 'runs' / 'finetune-demo' / task
        scores = json.loads((out / 'scores.json').read_text())
        assert metric in scores['runs'][str(out.relative_to(tmp_path))]['random init']
        assert len((out / 'predictions.csv').read_text().splitlines()) == 33
    cli('--phantoms', 80, *FAST)                            # the demo may be run again


@pytest.mark.parametrize('name', FLAGS)
def test_two_ranks_give_the_result_of_one(name, runs, exams, encoder, tmp_path):
    rc, text = run_ranks('finetune.py', 2, '--root', exams, '--encoder', encoder, '--out', tmp_path / 'run',
                         '--cache', tmp_path / 'cache', *FLAGS[name])
    assert rc == 0, text
    assert main_result(tmp_path / 'run').p == pytest.approx(main_result(runs[name]).p, abs=1e-4)
    one, two = (vit.load(out / 'last.pt').state_dict() for out in (runs[name], tmp_path / 'run'))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-3


def test_finetuning_moves_the_encoder_and_learns(runs, encoder):
    before, after = vit.load(encoder).state_dict(), vit.load(runs['tuned'] / 'last.pt').state_dict()
    assert (after['blocks.0.attn.qkv.weight'] - before['blocks.0.attn.qkv.weight']).abs().max() > 1e-5
    result = main_result(runs['tuned'])
    assert score.measure(result.run, *result.arrays())['AUC'] > 0.9


def test_every_share_of_the_training_set_and_dinov2_have_a_row_each(run, encoder):
    out = run('--task', 'cancer', '--head', 'knn', '--dinov2', encoder, *FAST, '--fraction', 0.5, 1.0,
              '--subgroup', 'age')
    results = score.read_run(out)
    assert [(r.encoder, r.share) for r in results] == list(product(('random init', 'DINOv2', 'pretrained'), (0.5, 1)))
    assert set(results[-1].groups) <= {'<50', '50-60', '60-70', '70+'} and (out / 'fraction.png').exists()


def test_a_trained_head_is_tested_on_another_data_set(runs, exams, tmp_path):
    """On the same list: the predictions repeat."""
    cli('test', '--checkpoint', runs['tuned'], '--root', exams, '--out', tmp_path / 'again')
    again, result = main_result(tmp_path / 'again'), main_result(runs['tuned'])
    assert list(again.units) == list(result.units) and again.p == pytest.approx(result.p, abs=1e-5)


def test_predict_repeats_the_predictions_of_the_run(runs, run, exams, capsys):
    views = [f'{side}{view}={exams}/5{side}{view}.npy' for side, view in product('RL', ('CC', 'MLO'))]
    image = [exams / '5LCC.npy']                            # all of the test set
    heads = [run('--task', 'density', '--head', head, *FAST) for head in ('linear', 'knn')]
    for out, files, units in ((runs['risk'], views, ['p5/e5']), (runs['tuned'], views, ['p5/e5/R', 'p5/e5/L']),
                              (heads[0], image, ['5LCC.npy']), (heads[1], image, ['5LCC.npy'])):
        capsys.readouterr()
        cli('predict', *files, '--checkpoint', out)
        lines, result = capsys.readouterr().out.splitlines(), main_result(out)
        for unit, line in zip(units, lines):
            shown = [float(part.split()[-1]) for part in line.split(', ')]
            assert shown == pytest.approx(result.p[list(result.units).index(unit)], abs=1e-3)


def test_a_label_that_is_no_class_is_refused(run):
    with pytest.raises(ValueError, match="1LCC.npy: density 'b' is none of a, c, d"):
        run('--task', 'density', '--classes', 'a', 'c', 'd')


def test_no_run_of_any_script_is_overwritten(runs, run, exams, encoder):
    """A run of pretrain.py has a last.pt alone."""
    for out in (runs['tuned'], encoder.parent):
        before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
        for command in (partial(run, '--task', 'density'),
                        partial(cli, 'test', '--checkpoint', runs['tuned'], '--root', exams)):
            with pytest.raises(ValueError, match='holds a run; choose another --out'):
                command('--out', out)
        assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_unreadable_files_are_left_out_until_a_split_lacks_a_class(run, exams, tmp_path, capsys):
    """Two images of the training set, each alone in its micro-batch while the encoder is trained; then the positives
    of validation."""
    root = shutil.copytree(exams, tmp_path / 'exams')
    for path in root.glob('0L*.npy'):
        path.write_bytes(b'broken')
    out = run('--root', root, *FLAGS['tuned'], '--level', 'image', '--epochs', 1, '--micro_batch', 1)
    assert 'skipped: ' in capsys.readouterr().err and main_result(out).p.shape[1] == 2
    for path in [path for i in (1, 11, 15, 25, 29, 39) for path in root.glob(f'{i}[LR]*.npy')]:
        path.write_bytes(b'broken')
    with pytest.raises(ValueError, match='the val split holds fewer than two classes.*unreadable files'):
        run('--root', root, '--task', 'cancer', *FAST)


@pytest.mark.parametrize('head', ['linear', 'mlp'])
def test_training_that_diverges_is_no_result(head, run):
    with pytest.raises(ValueError, match='the validation loss was never finite; lower --lr'):
        run('--task', 'cancer', '--head', head, '--lr', 1e30, *FAST)
