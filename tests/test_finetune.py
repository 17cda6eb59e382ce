"""finetune.py: heads and losses equal their equations, runs repeat, ranks agree, errors are one sentence."""
import json
import os
import subprocess
import sys
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from conftest import CASES, ROOT, run_here, run_ranks, write
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

def test_views_stand_in_the_order_of_dbt_dino_and_a_missing_one_is_the_mean_of_the_others():
    rows = [Row(f'{side}{view}', 'p', exam, side, view, 'train', dict(cancer='1'))
            for exam in ('e1', 'e2') for side in 'LR' for view in ('MLO', 'CC')
            if (exam, side, view) != ('e2', 'L', 'CC')]
    rows.append(Row('x', 'p', 'e1', 'L', 'AT', 'train', dict(cancer='1')))
    cfg, notes = Config(level='exam', pool='cls_mean'), []
    units = finetune.units_of(cfg, rows, ['0', '1'], notes)
    assert [unit.name for unit in units] == ['p/e1', 'p/e2'] and 'take no part: LAT 1' in notes[0]
    assert [rows[i].path for i, _ in sorted(units[0].rows, key=lambda r: r[1])] == ['RCC', 'LCC', 'RMLO', 'LMLO']
    values = torch.arange(len(rows) * 4.0).view(len(rows), 4, 1)
    x = finetune.unit_features(cfg, units, values)
    four = dict(zip([(r.exam, r.path) for r in rows], values[:, 0, 0].tolist()))
    assert x[0].tolist() == [four['e1', v] for v in ('RCC', 'LCC', 'RMLO', 'LMLO')]
    assert x[1, 1] == pytest.approx(np.mean([four['e2', v] for v in ('RCC', 'RMLO', 'LMLO')]))
    assert 'p/e2 (LCC)' in finetune.missing_views(cfg, units, values)[0]


def test_a_breast_takes_its_highest_label_and_no_part_with_lesions_of_two_types():
    with pytest.raises(ValueError, match='--level breast needs laterality and view'):
        finetune.units_of(Config(level='breast'), [Row('a', 'p')], ['0', '1'], [])
    rows = [Row(view, 'p', laterality='L', view=view, labels=dict(lesion_type=kind, birads=kind))
            for kind, view in zip('12', ('CC', 'MLO'))]
    notes = []
    assert finetune.units_of(Config(level='breast', task='lesion_type'), rows, ['1', '2'], notes) == []
    assert '1 breasts hold lesions of several types' in notes[0]
    assert finetune.units_of(Config(level='breast', task='birads'), rows, ['1', '2'], [])[0].label == 1


TINY = dict(size=28, width=16, depth=1, heads=2, layerscale=1.0)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Twelve images and a volume of seven slices, one of the images broken."""
    where = tmp_path_factory.mktemp('files')
    for i in range(12):
        np.save(where / f'{i:02d}.npy', phantom.breast(np.random.default_rng(i), height=40, width=30).volume[0])
    np.save(where / 'volume.npy', phantom.breast(np.random.default_rng(99), 7, 40, 30).volume)
    (where / '05.npy').write_bytes(b'broken')
    return [str(path) for path in sorted(where.glob('*.npy'))]


def units_and_rows(files):
    rows = [Row(path, '', labels=dict(cancer='0'), name=path) for path in files]
    return finetune.units_of(Config(level='image'), rows, ['0', '1'], []), rows


def test_streamed_statistics_are_those_of_all_tokens_at_once(files, group, capsys, monkeypatch):
    monkeypatch.setattr(finetune, 'CHUNK', 3)
    torch.manual_seed(0)
    encoder, cfg = vit.ViT(**TINY), Config(level='image', workers=0, pool='patch_mean_std')
    units, rows = units_and_rows(files)
    got = finetune.features(cfg, encoder, rows, units, torch.device('cpu'), cache=False)
    assert '05.npy' in capsys.readouterr().err and got[5].isnan().all() and not got[6].isnan().any()
    whole, single = (torch.from_numpy(finetune.Images(cfg, rows, 28)[i, False][1]) for i in (12, 0))
    with torch.no_grad():
        cls, patches = encoder(whole.unsqueeze(1) / 255)
        single = encoder(single.unsqueeze(1) / 255)[0]
    tokens = patches.flatten(0, 1)                                                      # (7 * 4, D)
    for mine, plain in zip(got[12], (cls.mean(0), tokens.mean(0), cls.std(0), tokens.std(0))):
        assert mine == pytest.approx(plain.numpy(), abs=1e-5)
    assert got[0][0] == pytest.approx(single[0].numpy(), abs=1e-5) and (got[0][2] < 1e-5).all()
    cls_alone = finetune.features(Config(level='image', workers=0, pool='cls_mean'), encoder, rows, units,
                                  torch.device('cpu'), cache=False)
    assert (cls_alone[12, [0, 2]] == got[12, [0, 2]]).all() and (cls_alone[12, 1] == 0).all()


def test_slices_are_evenly_spaced_and_a_frame_is_itself(files):
    volume = np.load(files[12])
    for slices, taken in ((3, [1, 3, 5]), (0, range(7)), (9, range(7))):
        _, squashed = finetune.Images(Config(slices=slices), [Row(files[12], '')], 28)[0, False]
        assert len(squashed) == len(taken)
        for image, k in zip(squashed, taken):
            assert (image == np.asarray(Image.fromarray(volume[k]).resize((28, 28), Image.Resampling.BICUBIC))).all()
    assert len(finetune.Images(Config(), [Row(files[12], '', frame=4)], 28)[0, False][1]) == 1


def test_features_are_cached_by_file_and_weights(files, group, tmp_path, monkeypatch):
    cfg, cpu = Config(level='image', cache=str(tmp_path), workers=0, pool='cls_mean'), torch.device('cpu')
    (units, rows), encoder = units_and_rows(files[:4]), vit.ViT(**TINY)
    first = finetune.features(cfg, encoder, rows, units, cpu)
    monkeypatch.setattr(images, 'read', None)                 # a second reading would fail
    assert (finetune.features(cfg, encoder, rows, units, cpu) == first).all()
    monkeypatch.undo()
    with torch.no_grad():
        encoder.norm.bias += 1
    assert (finetune.features(cfg, encoder, rows, units, cpu)[:, :2] != first[:, :2]).all()
    assert len(list(tmp_path.glob('*/*.npy'))) == 8 and not list(tmp_path.glob('*/*.*.npy'))


# ---- heads --------------------------------------------------------------------------------------------------------

def test_the_mlp_has_three_layers_and_the_linear_head_one_in_fp32_under_autocast():
    assert len(finetune.Head('mlp', 8, 3).layers) == 3 and len(finetune.Head('linear', 8, 3).layers) == 1
    H = finetune.Head('hazard', 8, 5)(torch.randn(4, 8))
    assert H.shape == (4, 5) and (H.diff(dim=1) > 0).all()
    with torch.autocast('cpu', torch.bfloat16):
        assert finetune.Head('linear', 8, 3)(torch.randn(4, 8)).dtype == torch.float32


def test_standardizing_leaves_out_what_does_not_vary():
    head = finetune.Head('linear', 3, 2)
    x = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 4.0], [5.0, 5.0, 8.0]])
    head.standardize(x)
    z = (x - head.shift) * head.scale
    assert z.mean(0) == pytest.approx(np.zeros(3), abs=1e-6) and z.std(0).tolist() == pytest.approx([1, 0, 1])


def test_rare_classes_weigh_as_much_as_common_ones():
    weight = finetune.class_weights(Config(), torch.tensor([0] * 9 + [1]))
    assert weight[:9].sum() == pytest.approx(weight[9:].sum()) and weight.mean() == pytest.approx(1)
    assert finetune.class_weights(Config(balance=False), torch.tensor([0, 0, 1])).tolist() == [1, 1, 1]
    risk = torch.tensor([[0, 1, -1, -1, -1], [0] * 5, [0] * 5, [0, 0, -1, -1, -1]])
    weight = finetune.class_weights(Config(task='risk'), risk)
    assert weight[0] == pytest.approx(weight[1:].sum())


@pytest.mark.parametrize('task', ['cancer', 'risk'])
def test_the_mean_of_the_batch_losses_is_the_loss_of_the_epoch(task):
    """Whatever class a batch holds."""
    cfg = Config(task=task)
    y = torch.tensor([0] * 12 + [1] * 4)
    outputs = torch.randn(16, 2)
    if task == 'risk':
        y, outputs = torch.tensor([[0] * 5] * 12 + [[0, 1, -1, -1, -1]] * 4), torch.rand(16, 5).cumsum(1)
    weight = finetune.class_weights(cfg, y)
    parts = [finetune.criterion(cfg, outputs[i:i + 4], y[i:i + 4], weight[i:i + 4]) for i in range(0, 16, 4)]
    assert torch.stack(parts).mean().item() == pytest.approx(finetune.criterion(cfg, outputs, y, weight).item())


def test_a_batch_without_a_readable_file_weighs_nothing(capsys):
    units, part = [finetune.Unit('', '', '', 0, [(i, i)], '') for i in (0, 1)], [(0, False), (1, False)]
    pictures, _, _, there = finetune.collated(units, part, [(0, 'broken'), (1, 'broken')], 28, 2)
    assert there.tolist() == [0, 0] and pictures.shape == (1, 28, 28)
    volume = np.ones((2, 28, 28), np.uint8)
    pictures, owner, place, there = finetune.collated(units, part, [(0, 'broken'), (1, volume)], 28, 2)
    assert there.tolist() == [0, 1] and owner.tolist() == [0, 0] and place.tolist() == [3]
    assert capsys.readouterr().err.count('skipped: broken') == 3


def test_random_weights_have_layerscale_1_whatever_pretraining_starts_from(group, tmp_path):
    model = vit.ViT(**TINY | dict(layerscale=1e-5))
    torch.save(dict(vit=model.config, teacher={f'backbone.{k}': v for k, v in model.state_dict().items()}),
               tmp_path / 'last.pt')
    random = finetune.new_encoder(Config(encoder=str(tmp_path / 'last.pt')), None)
    assert (random.blocks[0].ls1.gamma == 1).all() and random.config == model.config


def test_the_search_keeps_the_rate_with_the_least_validation_loss():
    x = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    cfg = resolved(Config(task='cancer', search=4, epochs=8, random_encoder=True))
    head, tried = finetune.fit(cfg, ('0', '1'), (x[:80], y[:80]), (x[80:], y[80:]))
    loss = finetune.criterion(cfg, head(x[80:]), y[80:], finetune.class_weights(cfg, y[80:])).item()
    assert len(tried) == 4 and loss == pytest.approx(min(tried.values()), abs=1e-6)
    assert all(1e-5 <= float(lr) <= 1e-2 for lr in tried)


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
TUNED = ['--task', 'cancer', '--head', 'mlp', *FAST, '--batch', 16, '--micro_batch', 4, '--hidden', 16, '--slices', 2,
         '--level', 'breast', '--lr', 1e-3]


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


def test_an_exam_run_names_missing_views_and_gives_a_risk_that_never_falls(risk):
    result = main_result(risk)
    assert result.p.shape[1] == 5 and (np.diff(result.p, axis=1) >= 0).all() and result.run['level'] == 'exam'
    lacking = [name for name, views in (('p3/e3', '(LCC LMLO)'), ('p8/e8', '(RMLO)')) if name in result.units]
    assert all(name in result.run['notes'][-1] for name in lacking)


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
        tmp_path / 'run', *FAST, '--cache', tmp_path / 'cache', '--fraction', '0.5', '1.0', '--subgroup', 'Age')
    text, results = capsys.readouterr().out, score.read_run(tmp_path / 'run')
    assert [(r.encoder, r.share) for r in results] == list(product(('random init', 'DINOv2', 'pretrained'), (0.5, 1)))
    assert (tmp_path / 'run' / 'fraction.png').exists()
    assert set(results[-1].groups) <= {'<50', '50-60', '60-70', '70+'}
    for words in ('pretrained, 50%', 'pretrained - DINOv2: ', 'pretrained - random init, 50%'):
        assert words in text
    with pytest.raises(ValueError, match='--subgroup race: no such column in path, patient'):
        cli('--root', exams, '--task', 'cancer', '--head', 'knn', '--encoder', encoder, '--out', tmp_path / 'two',
            *FAST, '--cache', tmp_path / 'cache', '--subgroup', 'race')


def test_a_trained_head_is_tested_on_another_data_set(tuned, exams, tmp_path, capsys):
    """On the same list: the predictions repeat."""
    cli('test', '--checkpoint', tuned, '--root', exams, '--out', tmp_path / 'again')
    assert 'trained elsewhere' in capsys.readouterr().out
    again, result = main_result(tmp_path / 'again'), main_result(tuned)
    assert again.units == result.units and again.p == pytest.approx(result.p, abs=1e-5)


def test_predict_reads_an_image_an_exam_or_a_breast(risk, tuned, exams, encoder, capsys):
    files = [f'{side}{view}={exams}/5{side}{view}.npy' for side, view in product('RL', ('CC', 'MLO'))]
    cli('predict', *files, '--checkpoint', risk)
    line = capsys.readouterr().out.splitlines()[0]
    values = [float(part.split()[-1]) for part in line.split(', ')]
    assert len(values) == 5 and values == sorted(values)
    cli('predict', *files[:2], '--checkpoint', risk)
    assert 'exam (LCC LMLO)' in capsys.readouterr().out
    cli('predict', *files[:2], '--checkpoint', tuned)
    assert 'breast: cancer 0 = ' in capsys.readouterr().out
    with pytest.raises(ValueError, match='this model reads exams: give VIEW=FILE, of RCC, LCC, RMLO, LMLO'):
        cli('predict', f'{exams}/5LCC.npy', '--checkpoint', risk)
    with pytest.raises(ValueError, match='holds an encoder without a head'):
        cli('predict', f'{exams}/5LCC.npy', '--checkpoint', encoder)


@pytest.mark.parametrize('head', ['linear', 'knn'])
def test_predict_repeats_the_predictions_of_the_run(head, exams, encoder, tmp_path, capsys):
    cli('--root', exams, '--task', 'density', '--head', head, '--encoder', encoder, '--out', tmp_path / 'run', *FAST,
        '--cache', tmp_path / 'cache')
    result = main_result(tmp_path / 'run')
    capsys.readouterr()
    cli('predict', exams / result.units[0], '--checkpoint', tmp_path / 'run')
    line = capsys.readouterr().out.splitlines()[0]
    assert [float(part.split()[-1]) for part in line.split(', ')] == pytest.approx(result.p[0], abs=1e-3)
    (tmp_path / 'broken.npy').write_bytes(b'broken')
    with pytest.raises(ValueError, match='broken.npy: '):
        cli('predict', tmp_path / 'broken.npy', '--checkpoint', tmp_path / 'run')


@pytest.mark.parametrize('spoil, words', [
    (lambda lines: [line.replace('|a|', '|x|') for line in lines], "density 'x' is none of a, b, c, d"),
    (lambda lines: [lines[0], *('gone/' + line for line in lines[1:])], 'gone')])
def test_bad_lists_are_refused_in_one_sentence(spoil, words, exams, encoder, tmp_path):
    lines = [line.replace(',', '|') for line in (exams / 'manifest.csv').read_text().splitlines()]
    write(tmp_path / 'manifest.csv', spoil(lines))
    for path in exams.glob('*.npy'):
        os.symlink(path, tmp_path / path.name)
    with pytest.raises(ValueError, match=words) as problem:
        cli('--root', tmp_path, '--task', 'density', '--encoder', encoder, '--out', tmp_path / 'run', *FAST)
    assert '\n' not in str(problem.value)


def test_a_run_is_not_overwritten_and_a_wrong_encoder_is_named(risk, exams, encoder, tmp_path):
    with pytest.raises(ValueError, match='holds a run; choose another --out'):
        cli('--root', exams, '--task', 'density', '--encoder', encoder, '--out', risk, *FAST)
    for wrong, words in (('nowhere.pt', 'nowhere.pt'), (tmp_path / 'other.pt', 'other.pt')):
        torch.save(dict(x=torch.zeros(1)), tmp_path / 'other.pt')
        with pytest.raises((ValueError, OSError), match=words):
            cli('--root', exams, '--task', 'density', '--encoder', wrong, '--out', tmp_path / 'run', *FAST)
    with pytest.raises(ValueError, match='--dataset and --task need --root DIR'):
        cli('--dataset', 'rsna')


def test_a_split_of_unreadable_files_ends_the_run_in_words(exams, encoder, tmp_path):
    lines = (exams / 'manifest.csv').read_text().splitlines()
    splits = ['split', *('train val test'.split()[int(line.split(',')[1][1:]) % 7 % 3] for line in lines[1:])]
    (tmp_path / 'manifest.csv').write_text('\n'.join(f'{a},{b}' for a, b in zip(lines, splits)) + '\n')
    for line, split in zip(lines[1:], splits[1:]):
        path = tmp_path / line.split(',')[0]
        path.write_bytes(b'broken' if split == 'val' else (exams / path.name).read_bytes())
    with pytest.raises(ValueError, match='the val split holds fewer than two classes.*unreadable files were left out'):
        cli('--root', tmp_path, '--task', 'cancer', '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--cache',
            tmp_path / 'cache')


@pytest.mark.parametrize('head', ['linear', 'mlp'])
def test_training_that_diverges_is_no_result(head, exams, encoder, tmp_path):
    with pytest.raises(ValueError, match='the validation loss was never finite; lower --lr'):
        cli('--root', exams, '--task', 'cancer', '--head', head, '--lr', 1e30, '--encoder', encoder, '--out',
            tmp_path / 'run', *FAST, '--cache', tmp_path / 'cache')


def test_an_error_is_one_sentence_on_the_terminal(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / 'finetune.py'), '--root', str(tmp_path), '--dataset', 'rsna',
                           '--random_encoder'], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('finetune.py: ') and 'train.csv' in done.stderr
    assert 'Traceback' not in done.stderr and len(done.stderr.splitlines()) == 1
