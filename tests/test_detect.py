"""detect.py: boxes come back to the pixels of the file, a killed run goes on bit for bit, two ranks are one."""
import csv
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, run_here, run_ranks, write
from PIL import Image

import datasets
import detect
import detr
import images
import metrics
import prepare
import retinanet
import score
import vit
from datasets import Row
from detect import Config

cli, torchrun = partial(run_here, detect), partial(run_ranks, 'detect.py')
CPU = torch.device('cpu')
TINY = dict(size=84, width=32, depth=1, heads=2)
SMALL = dict(size=84, channels=32, workers=0)
DETR = ('--head', 'detr', '--queries', 12, '--layers', 1, 2, '--denoising', 8)


def tiny(cfg, **how):
    return detect.Detector(cfg, vit.ViT(**TINY, layerscale=1.0, **how))


def volume(boxes=(), shape=(40, 84, 84), **fields):
    return Row('x', 'p', boxes=[(z, *box, 'm') for z, *box in boxes], shape=shape, **fields)


# ---- findings -----------------------------------------------------------------------------------------------------

def test_boxes_of_neighbouring_slices_become_one_finding():
    lesion, other = [10, 10, 30, 30], [100, 100, 120, 120]
    boxes, values, slices = [lesion, [12, 11, 32, 31], lesion, other], [.5, .9, .6, .7], [4, 5, 6, 5]
    rows = detect.merge_slices(boxes, values, slices)
    assert rows.tolist() == [[12, 11, 20, 20, 4, 3, .9], [100, 100, 20, 20, 5, 1, .7]]
    shuffled = detect.merge_slices(*(np.array(a)[[2, 0, 3, 1]] for a in (boxes, values, slices)))
    assert (shuffled == rows).all()
    assert detect.merge_slices([], [], []).shape == (0, 7)


def test_lesions_far_apart_in_depth_stay_two_and_faint_boxes_do_not_stretch_one():
    box, faint = [10, 10, 30, 30], [.02] * 40
    rows = detect.merge_slices([box] * 4, [.9, .8, .7, .6], [2, 3, 20, 21])
    assert rows[:, 4:].tolist() == [[2, 2, .9], [20, 2, .7]]
    assert [len(detect.merge_slices([box] * 2, [.9, .8], [2, 4], gap=gap)) for gap in (1, 2)] == [2, 1]
    faint[30] = .9
    assert detect.merge_slices([box] * 40, faint, range(40))[0, 4:].tolist() == [30, 1, .9]


# ---- samples ------------------------------------------------------------------------------------------------------

def test_a_volume_stored_upside_down_is_turned_and_its_boxes_are_not(tmp_path):
    """A left breast of 60x40; its second copy is stored turned by 180 degrees."""
    pixels = np.zeros((4, 60, 40), np.uint8)
    pixels[:, 5:55, :25] = 100
    pixels[2, 20:32, 8:18] = 230
    for name, stored in (('upright', pixels), ('turned', pixels[:, ::-1, ::-1])):
        np.save(tmp_path / f'{name}.npy', stored)
    rows = [Row(str(tmp_path / f'{name}.npy'), 'p', laterality='L', upside=True, boxes=[(2, 8, 20, 18, 32, 'm')])
            for name in ('upright', 'turned')]
    frames = detect.Frames(Config(size=56), rows)
    one, two = (frames[i, 2]['image'] for i in (0, 1))
    assert (one == two).all() and frames.turned == {0: False, 1: True}
    x0, y0, x1, y1 = detect.on_frames(rows[1], {2}, 56)[0].round().astype(int)
    assert two[0, y0:y1, x0:x1].mean() > 210 and two.mean() < 100


def test_prepared_images_are_read_and_boxes_stay_in_pixels_of_the_original(tmp_path):
    root, small = tmp_path / 'root', tmp_path / 'small'
    root.mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (360, 240)).astype(np.uint8)
    picture[:, 150:], picture[0, 0] = 0, 255
    Image.fromarray(picture).save(root / 'v.png')
    assert prepare.prepare(root, small, side=40) == (1, 0, 0)
    row = Row(str(small / 'v.npy'), 'p', file=str(root / 'v.png'), boxes=[(0, 30, 60, 120, 180, 'm')])
    sample = detect.Frames(Config(size=56, augment=False), [row])[0, 0, 0, 0]
    shrunk = Image.fromarray(np.load(small / 'v.npy')).resize((56, 56), Image.Resampling.BICUBIC)
    assert (sample['image'] == np.asarray(shrunk)).all()
    assert sample['boxes'][0].tolist() == pytest.approx([7, 28 / 3, 28, 28])
    for clahe in (True, False):                             # of a file that prepare.py has not seen
        found = detect.Frames(Config(size=56, clahe=clahe), [Row(str(root / 'v.png'), 'p')])[0, 0]['image'][0]
        wanted = images.clahe(picture) if clahe else picture
        assert (found == np.asarray(Image.fromarray(wanted).resize((56, 56), Image.Resampling.BICUBIC))).all()


def test_augmentation_moves_boxes_with_their_lesions():
    """A bright rectangle is found again where the moved box says, in 200 draws."""
    moved = zoomed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        image = np.full((259, 259), 40, np.uint8)
        x, y = rng.integers(20, 200, 2)
        image[y:y + 25, x:x + 30] = 200
        out, boxes = detect.augment(rng, image, np.array([[x, y, x + 30, y + 25]], float))
        bright = out.astype(float) > 130
        rows, columns = np.flatnonzero(bright.mean(1) > 0.03), np.flatnonzero(bright.mean(0) > 0.03)
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(boxes[0] - found).max() <= 1.6, seed
        w, h = boxes[0, 2:] - boxes[0, :2]
        moved, zoomed = moved + (abs(boxes[0, 0] - x) > 1), zoomed + (abs(w - 30) > 0.01)
        assert 7.5 <= w <= 103 and 4.5 <= h <= 91 and boxes.min() >= 0 and boxes.max() <= 259
    assert 100 < moved < 200 and 60 < zoomed < 140


def test_coarse_dropout_spares_the_lesions():
    holes = 0
    for seed in range(100):
        out, ((x0, y0, x1, y1),) = detect.augment(np.random.default_rng(seed), np.full((259, 259), 200, np.uint8),
                                                  np.array([[100., 80, 160, 140]]))
        assert (out[math.ceil(y0) + 1:int(y1) - 1, math.ceil(x0) + 1:int(x1) - 1] > 60).all()
        holes += max((out[:130] == 0).sum(), (out[130:] == 0).sum()) > 100
    assert 15 < holes < 90


def test_a_lesion_marked_on_a_slice_nearby_is_no_background(tmp_path):
    np.save(tmp_path / 'a.npy', np.random.default_rng(0).integers(0, 255, (40, 84, 84)).astype(np.uint8))
    row = volume([(10, 5, 5, 25, 25), (12, 50, 50, 70, 70), (30, 50, 10, 70, 30)])
    row.path = str(tmp_path / 'a.npy')
    sample = detect.Frames(Config(size=84, augment=False), [row])[0, 10, 0, 0]
    near, far = (retinanet.match(torch.tensor([box]), retinanet.anchors(84)) >= 0
                 for box in ([50., 50, 70, 70], [50., 10, 70, 30]))
    assert len(sample['boxes']) == 1 and (sample['match'][near] == -2).all() and (sample['match'][far] == -1).all()


def test_normal_slices_keep_away_from_lesions():
    row = volume([(10, 0, 0, 1, 1)])
    assert detect.normal_frames(row) == list(range(21, 40))
    assert detect.normal_frames(volume(frame=7)) == [7]
    assert detect.normal_rows([row, Row('y', 'q'), Row('z', 'r', normal=False),
                               volume([(0, 0, 0, 1, 1)], shape=(1, 5, 5))]) == [0, 1]


def test_an_epoch_holds_every_lesion_and_as_many_normals_whatever_the_ranks():
    cfg = Config(epochs=3, batch=8, micro_batch=3, normals=1.0)
    arguments = cfg, [(i, 3) for i in range(6)], list(range(30))
    steps, one = detect.plan(*arguments, 0, 0, 1)
    one = list(one)
    assert steps == 2 and [len(micro) for micro in one[:3]] == [3, 3, 2]
    first = [item for micro in one[:6] for item in micro][:12]
    assert sorted(i for i, z, *_ in first if z == 3) == list(range(6))
    assert sum(z is None for _, z, *_ in first) == 6
    two = [item for rank in (0, 1) for micro in detect.plan(*arguments, 0, rank, 2)[1] for item in micro]
    assert sorted(two, key=str) == sorted((item for micro in one for item in micro), key=str)
    later = list(detect.plan(*arguments, 2, 0, 1)[1])
    assert later == one[-len(later):]


def test_an_unreadable_training_file_is_named_and_teaches_nothing(tmp_path, capsys, group):
    (tmp_path / 'bad.npy').write_bytes(b'no array')
    cfg = Config(**SMALL, amp=False)
    frames = detect.Frames(cfg, [Row(str(tmp_path / 'bad.npy'), 'p', shape=(1, 9, 9))])
    assert frames[0, 0] is None and 'skipped' in capsys.readouterr().err and 'bad.npy' in frames.rows[0].path
    ddp = torch.nn.parallel.DistributedDataParallel(tiny(cfg))
    assert detect.learn(ddp, [detect.collate([frames[0, 0, 0, 0]])], CPU).tolist() == [0, 0]
    assert all(p.grad is None or not p.grad.any() for p in ddp.parameters())


# ---- the detector -------------------------------------------------------------------------------------------------

def test_a_frozen_encoder_gets_no_gradient():
    for freeze in (True, False):
        detector = tiny(Config(**SMALL, freeze=freeze)).train()
        detector(torch.randint(255, (1, 1, 84, 84), dtype=torch.uint8))[0].sum().backward()
        assert any(p.grad is not None for p in detector.encoder.parameters()) == (not freeze)
        assert all(p.grad is not None for p in detector.head.net.classify.parameters())


def test_dino_detr_gets_the_lesions_in_shares_of_the_image_and_answers_in_pixels():
    cfg = Config(size=84, channels=32, head='detr', queries=5, layers=(1, 1), top=4, lambdas=(0.5, 3.0))
    head = tiny(cfg).head
    boxes = [torch.tensor([[21.0, 42, 63, 84]]), torch.zeros(0, 4)]
    one, none = head.targets(boxes, 'cpu')
    torch.testing.assert_close(one['boxes'], torch.tensor([[0.5, 0.75, 0.5, 0.5]]))
    assert none['boxes'].shape == (0, 4) and head.count(dict(boxes=boxes)) == 1
    answers = dict(layers=[(torch.tensor([[[-1.0], [2], [0], [1], [-3]]]), torch.full((1, 5, 4), 0.5))])
    (found, values), = head.findings(answers)
    torch.testing.assert_close(values, torch.tensor([2.0, 1, 0, -1]).sigmoid())
    torch.testing.assert_close(found[0], torch.tensor([21.0, 21, 63, 63]))
    assert (head.net.lambda1, head.net.lambda2) == (0.5, 3.0)
    assert Config(head='detr').lr == 1e-4 and Config().lr == 5e-4 and Config(head='detr', lr=3e-3).lr == 3e-3


def test_dino_detr_looks_where_the_anchors_lie():
    head = tiny(Config(size=518, channels=32, head='detr', layers=(0, 1))).head
    levels = [torch.zeros(1, 1, cells, cells) for cells in retinanet.grids(518)]
    found, a = 518 * detr.Grid.of(levels, head.net.centres).centres, retinanet.anchors(518)
    torch.testing.assert_close(found, ((a[:, :2] + a[:, 2:]) / 2)[4::9], rtol=0, atol=1e-2)


def test_flags_that_cannot_work_are_refused():
    for wrong, words in ((dict(size=500), '--size 500: expected a multiple of 14'), (dict(channels=48), 'of 32'),
                         (dict(batch=9), '--batch 9: expected a multiple of 2'), (dict(head='yolo'), 'detr'),
                         (dict(dataset='rsna'), 'expected bcs, vindr, cbis, mias, csv'),
                         (dict(root='x'), '--encoder FILE is missing')):        # never the phantoms' encoder
        with pytest.raises(ValueError, match=words):
            detect.check(Config(**dict(encoder=None if 'root' in wrong else 'x') | wrong), 2)
    detect.check(Config(root='x', random_encoder=True), 1)
    with pytest.raises(ValueError, match='--dataset needs --root DIR'):
        cli('--dataset', 'csv')


def test_an_encoder_of_another_patch_is_refused(tmp_path):
    save_encoder(tmp_path / 'p.pt', vit.ViT(size=64, patch=16, width=32, depth=1, heads=2))
    with pytest.raises(ValueError, match='patches of 16 pixels; expected 14'):
        detect.build(Config(encoder=str(tmp_path / 'p.pt')))


def test_the_defaults_are_the_numbers_of_the_papers():
    cfg = Config()
    assert (cfg.size, cfg.channels, cfg.batch, cfg.epochs, cfg.patience, cfg.freeze) == (518, 256, 64, 50, 10, True)
    assert (cfg.alpha, cfg.gamma, cfg.nms, cfg.min_distance, cfg.lambdas) == (0.25, 2, 0.1, 100, (1, 2))


# ---- validation ---------------------------------------------------------------------------------------------------

def test_a_slice_s_score_takes_boxes_within_20_pixels_of_518(group, monkeypatch):
    detector, rows, found = tiny(Config(**SMALL, normals=0)), [volume([(1, 10, 10, 14, 14)], (4, 84, 84))], []
    monkeypatch.setattr(detect, 'detected', lambda *given: iter(found))
    shift = 20 * 84 / 518                                   # of a lesion whose half diagonal is less
    for off, expected in ((0.9 * shift, 1.0), (1.1 * shift, 0.0)):
        found[:] = [(0, 1, np.array([[10, 10 + off, 14, 14 + off], [60, 60, 70, 70]]), np.array([.6, .8]))]
        value, about = detect.validated(detector, rows, CPU)
        assert value == expected
    assert about == dict(threshold=0.8)                     # at the next lower, .6, a second false positive


def test_normals_of_the_validation_are_drawn_by_seed_and_not_the_first(group, monkeypatch):
    rows = [volume([(20, 10, 10, 30, 30)], normal=False)] * 3 + [volume() for _ in range(60)]
    drawn = []
    monkeypatch.setattr(detect, 'detected', lambda detector, rows, items, device: drawn.append(items) or ())
    for seed in (0, 0, 1):
        detect.validated(tiny(Config(**SMALL, seed=seed)), rows, CPU)
    one, again, other = ([i for i, z in items if z is None] for items in drawn)
    assert len(one) == 3 and one == again != other and max(one) > 5


# ---- runs ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def encoder(tmp_path_factory):
    """A checkpoint as pretrain.py writes it, of a tiny encoder."""
    path = tmp_path_factory.mktemp('encoder') / 'last.pt'
    torch.manual_seed(3)
    save_encoder(path, vit.ViT(**TINY, layerscale=1.0))
    return path


def save_encoder(path, model):
    torch.save(dict(vit=model.config, teacher={f'backbone.{k}': v for k, v in model.state_dict().items()}), path)


@pytest.fixture(scope='module')
def lesions(tmp_path_factory):
    """Volumes of four slices of 80x60, two thirds with a bright square on slices 1 and 2."""
    root = tmp_path_factory.mktemp('lesions')
    lines = ['path|frame|x0|y0|x1|y1|label|patient|split']
    for i in range(36):
        rng = np.random.default_rng(i)
        pixels = rng.integers(40, 90, (4, 80, 60)).astype(np.uint8)
        split, box = 'train' if i < 20 else 'val' if i < 26 else 'test', '|||||'
        if i % 3:
            x, y, side = *rng.integers(4, 40, 2), int(rng.integers(10, 16))
            pixels[1:3, y:y + side, x:x + side] = 240
            box = f'{1 + i % 2}|{x}|{y}|{x + side}|{y + side}|{"cancer" if i % 2 else "benign"}'
        lines.append(f'{i}.npy|{box}|p{i}|{split}')
        np.save(root / f'{i}.npy', pixels)
    write(root / 'lesions.csv', lines)
    return root


FAST = ('--size', 84, '--channels', 32, '--batch', 8, '--micro_batch', 4, '--workers', 0, '--min_distance', 10,
        '--draws', 50, '--lr', 3e-3, '--dropout', 0.05)


@pytest.fixture(scope='module')
def trained(lesions, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp('trained') / 'run'
    cli('--root', lesions, '--encoder', encoder, '--out', out, *FAST, '--epochs', 6)
    return out


def scores(run):
    return json.loads((run / 'scores.json').read_text())


def weights(run, name='weights'):
    return torch.load(run / 'last.pt', weights_only=True)[name]


def log(run):
    return [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()[1:]]


def test_training_finds_lesions_that_an_untrained_detector_does_not(trained, lesions, encoder, tmp_path):
    cli('--root', lesions, '--encoder', encoder, '--out', tmp_path / 'untrained', *FAST, '--epochs', 0)
    before, after = (list(scores(run)['challenge'].values())[0]['mean_sensitivity_positive']
                     for run in (tmp_path / 'untrained', trained))
    assert after > before + 0.3


def test_a_run_leaves_a_submission_that_scores_as_itself(trained):
    volumes, truth, classes = score.read_truth(trained / 'labels.csv', trained / 'boxes.csv')
    rows = score.read_predictions(trained)
    assert len(volumes) == 10 and sorted(set(classes)) == ['benign', 'cancer']
    assert all(slices == 4 for key, slices in volumes if key in {row[0] for row in truth})
    expected, = scores(trained)['challenge'].values()
    assert metrics.froc(volumes, truth, rows, 10) == pytest.approx(expected)
    x0, y0, x1, y1 = np.array([(x, y, x + w, y + h) for _, x, y, w, h, *_ in rows]).T   # pixels of the file, 60x80
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() < 60.001 and 62 < y1.max() < 80.001
    assert all(0 <= z and 1 <= depth and z + depth <= 4 for *_, z, depth, _ in rows)


def test_findings_of_mammograms_have_no_depth(tmp_path, group):
    """With depth 0 and one slice, the challenge's own evaluator gives our numbers."""
    np.save(tmp_path / 'm.npy', np.random.default_rng(0).integers(0, 255, (84, 84)).astype(np.uint8))
    rows = [Row(str(tmp_path / 'm.npy'), 'p', boxes=[(0, 5, 5, 20, 20, 'cancer')], shape=(1, 84, 84))]
    found = detect.predicted(tiny(Config(**SMALL)), rows, CPU)
    detect.write(tmp_path, rows, found)
    assert found and {row[5:7] for row in score.read_predictions(tmp_path)} == {(0, 0)}
    with open(tmp_path / 'boxes.csv') as file:
        assert [line['VolumeSlices'] for line in csv.DictReader(file)] == ['1']


def test_a_volume_of_another_depth_than_its_label_is_not_searched(lesions, tmp_path, group):
    """datasets.py leaves it without a shape; the label file's depth goes into boxes.csv."""
    row = Row(str(lesions / '1.npy'), 'p', boxes=[(30, 5, 5, 20, 20, 'cancer')], record=dict(VolumeSlices=60))
    assert detect.predicted(tiny(Config(**SMALL)), [row], CPU) == [] and row.shape is None
    detect.write(tmp_path, [row], [])
    assert score.read_truth(tmp_path / 'labels.csv', tmp_path / 'boxes.csv')[0][0][1] == 60


def test_the_list_that_a_run_writes_is_the_data_set_again(trained, lesions):
    one, again = (datasets.load('csv', str(root), boxes=True)[0] for root in (lesions, trained / 'lesions.csv'))
    for a, b in zip(one, again, strict=True):
        assert (a.key, a.name, a.split, a.boxes, a.normal) == (b.key, b.name, b.split, b.boxes, b.normal)


def interrupted_after(epochs):
    whole, calls = detect.validated, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > epochs:
            raise KeyboardInterrupt
        return whole(*arguments)
    return stop


@pytest.mark.parametrize('head', [(), DETR])
def test_a_killed_run_goes_on_bit_for_bit(head, lesions, encoder, tmp_path):
    arguments = ('--root', lesions, '--encoder', encoder, *FAST, *head, '--epochs', 3, '--out')
    cli(*arguments, tmp_path / 'whole')
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(detect, 'validated', interrupted_after(1))
        cli(*arguments, tmp_path / 'cut')
    assert weights(tmp_path / 'cut', 'epoch') == 1
    with pytest.raises(ValueError, match='holds a run or a list; --resume continues'):
        cli(*arguments, tmp_path / 'cut')
    cli(*arguments, tmp_path / 'cut', '--resume')
    for name in ('weights', 'best_weights'):
        one, two = weights(tmp_path / 'whole', name), weights(tmp_path / 'cut', name)
        assert all(torch.equal(one[k], two[k]) for k in one)
    for name in ('log.jsonl', 'predictions.csv'):
        one, two = ((tmp_path / run / name).read_text().splitlines()[1:] for run in ('whole', 'cut'))
        assert one == two
    assert all(line['loss'] > line['box'] > 0 and ('atd' in line) == bool(head) for line in log(tmp_path / 'cut'))


def test_another_recipe_or_other_data_are_not_continued(trained, lesions, encoder, tmp_path):
    arguments = ('--encoder', encoder, '--out', trained, *FAST, '--epochs', 6, '--resume')
    with pytest.raises(ValueError, match='another recipe: --seed 0 -> 1, --lr 0.003 -> 0.001'):
        cli('--root', lesions, *arguments, '--lr', 1e-3, '--seed', 1)
    other = (lesions / 'lesions.csv').read_text().replace('cancer', 'benign')
    (lesions / 'other.csv').write_text(other)
    with pytest.raises(ValueError, match='has seen other images, boxes or splits'):
        cli('--root', lesions / 'other.csv', *arguments)
    assert detect.digest(detect.load(Config(root=str(lesions)))[0]) == weights(trained, 'rows')


def test_nothing_is_overwritten(trained, lesions, encoder, tmp_path):
    """Neither the list that is read, nor a run by a demo."""
    write(tmp_path / 'lesions.csv', ['path|x0|y0|x1|y1'])
    for more in ((), ('--resume',)):
        with pytest.raises(ValueError, match='holds a run or a list'):
            cli('--root', lesions, '--encoder', encoder, '--out', tmp_path, *FAST, *more)
    with pytest.raises(ValueError, match='is not empty; choose another'):
        cli('--encoder', encoder, '--out', trained, *FAST)


def test_two_ranks_give_the_predictions_of_one(lesions, encoder, tmp_path):
    arguments = ('--root', lesions, '--encoder', encoder, *FAST, '--epochs', 2, '--dropout', 0, '--out')
    cli(*arguments, tmp_path / 'one')
    rc, text = torchrun(2, *arguments, tmp_path / 'two', '--micro_batch', 2)
    assert rc == 0, text
    for a, b in zip(*(log(tmp_path / name) for name in ('one', 'two')), strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)
    best = [{}, {}]
    for run, name in zip(best, ('one', 'two')):             # of faint findings the order may change
        for key, *row in score.read_predictions(tmp_path / name):
            run.setdefault(key, row)
    assert np.allclose(list(best[0].values()), list(best[1].values()), rtol=0.02, atol=0.5)


def test_the_loss_is_the_sums_over_the_positives_of_the_batch(lesions, encoder, tmp_path, group):
    cfg = Config(root=str(lesions), encoder=str(encoder), **SMALL, batch=13, micro_batch=5, epochs=1, normals=0,
                 augment=False, dropout=0, out=str(tmp_path))
    rows, _ = detect.load(cfg)
    detect.train(detect.build(cfg), rows, CPU, tmp_path)
    ill = [row for row in rows if row.split == 'train' and row.boxes]
    assert len(ill) == 13                                   # one step of one batch
    frames, detector = detect.Frames(cfg, ill), detect.build(cfg)
    batch = detect.collate([frames[i, row.boxes[0][0], 0, i] for i, row in enumerate(ill)])
    focal, box = retinanet.losses(*detector(batch['images']), batch, retinanet.anchors(84))
    positives = (batch['match'] >= 0).sum()
    line = json.loads((tmp_path / 'log.jsonl').read_text())
    assert line['focal'] == pytest.approx((focal / positives).item(), rel=1e-4)
    assert line['box'] == pytest.approx((box / positives).item(), rel=1e-4)
    assert line['loss'] == pytest.approx(line['focal'] + line['box'], rel=1e-5)


def test_finetuning_moves_the_encoder_and_another_run_starts_from_it(trained, lesions, encoder, tmp_path):
    cli('--root', lesions, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 1, '--no-freeze')
    before, after = vit.load(encoder).state_dict(), vit.load(tmp_path / 'run/last.pt').state_dict()
    assert (before['blocks.0.attn.qkv.weight'] - after['blocks.0.attn.qkv.weight']).abs().max() > 1e-5
    begun = detect.build(Config(**SMALL, init_from=str(tmp_path / 'run'))).state_dict()
    best = weights(tmp_path / 'run', 'best_weights')
    assert all(torch.equal(begun[k], v) for k, v in best.items())
    with pytest.raises(ValueError, match='--channels 64: .* has another number'):
        detect.build(Config(size=84, channels=64, init_from=str(trained)))


def test_the_patience_ends_a_run_that_does_not_improve(lesions, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(detect, 'validated', lambda *_: (0.25, dict(threshold=0.5)))
    cli('--root', lesions, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 9, '--patience', 2)
    lines = log(tmp_path / 'run')
    assert [line['epoch'] for line in lines] == [0, 1, 2] and lines[-1]['best_epoch'] == 0


def test_an_unusable_test_volume_counts_as_missed(trained, lesions, encoder, tmp_path, monkeypatch):
    """One of the seven test lesions loses its file, one its pixels; the denominator stays seven."""
    monkeypatch.setattr(datasets, 'MAX_ABSENT', 0.5)
    for path in lesions.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / '28.npy').unlink()
    (tmp_path / '29.npy').write_bytes(b'no array')
    (tmp_path / '27.npy').write_bytes(b'a normal of the test set')
    (tmp_path / '1.npy').write_bytes(b'a lesion of the training set')
    cli('--root', tmp_path, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 1)
    _, truth, _ = score.read_truth(tmp_path / 'run/labels.csv', tmp_path / 'run/boxes.csv')
    assert len(truth) == 7 and any('1.npy' in note for note in scores(tmp_path / 'run')['notes'])
    found = {row[0][1] for row in score.read_predictions(tmp_path / 'run')}
    assert found and not {'27.npy', '28.npy', '29.npy'} & found


def test_a_distance_that_small_images_make_a_gift_is_noted(lesions):
    assert 'over a tenth of the smallest image, 60 pixels' in detect.load(Config(root=str(lesions)))[1][-1]
    assert not detect.load(Config(root=str(lesions), min_distance=6))[1]


def test_one_frame_is_read_at_a_time_and_every_one(trained, lesions, monkeypatch, group):
    read, seen = images.read, []
    monkeypatch.setattr(images, 'read', lambda path, frame=0, voi=False: seen.append(frame) or read(path, frame, voi))
    _, detector, _ = detect.restored(trained)
    detect.predicted(detector, [Row(str(lesions / '1.npy'), 'q')], CPU)
    assert seen == [0, 1, 2, 3]


def test_nothing_waits_for_ever_for_data():
    assert detect.loader(Config(workers=1), [1]).timeout == 1800 and detect.loader(Config(workers=0), [1]).timeout == 0


# ---- findings in one file, the demo -------------------------------------------------------------------------------

def test_predict_writes_findings_in_pixels_of_the_file(trained, lesions, tmp_path, capsys):
    row = detect.load(Config(root=str(lesions)))[0][28]
    (z, x0, y0, x1, y1, _), = row.boxes
    cli('predict', row.path, '--checkpoint', trained, '--out', tmp_path, '--threshold', 0)
    found = json.loads((tmp_path / 'findings.json').read_text())['findings']
    assert abs(found[0]['x0'] - x0) < 6 and abs(found[0]['y1'] - y1) < 6
    assert found[0]['first_frame'] <= found[0]['frame'] <= found[0]['last_frame']
    assert len(list(tmp_path.glob('finding_*.png'))) == len(found) <= 50
    cli('predict', row.path, '--checkpoint', trained, '--out', tmp_path, '--threshold', 1)
    assert not list(tmp_path.glob('finding_*.png')) and '0 findings of score 1.000' in capsys.readouterr().out


def test_findings_of_a_file_stored_upside_down_are_in_its_own_pixels(trained, lesions, tmp_path, monkeypatch):
    pixels = np.load(lesions / '28.npy').copy()             # 80 rows, 60 columns
    pixels[..., 0] = 255                                    # the chest wall is on the left: a left breast
    np.save(tmp_path / 'v.npy', pixels)
    monkeypatch.setattr(detect, 'predicted', lambda *given: [(0, 5, 10, 20, 30, 1, 2, 0.9, 2)])
    for side, corners in dict(L=(5, 10, 25, 40), R=(35, 40, 55, 70)).items():
        cli('predict', tmp_path / 'v.npy', '--checkpoint', trained, '--out', tmp_path / side, '--laterality', side)
        found, = json.loads((tmp_path / side / 'findings.json').read_text())['findings']
        assert tuple(found[edge] for edge in ('x0', 'y0', 'x1', 'y1')) == corners
        assert (found['frame'], found['first_frame'], found['last_frame']) == (2, 1, 2)


def test_predict_says_what_is_wrong_with_a_picture_or_a_run(trained, encoder, lesions, tmp_path):
    (tmp_path / 'bad.npy').write_bytes(b'no array')
    for file, run, words in ((tmp_path / 'none.dcm', trained, 'none.dcm'), (tmp_path / 'bad.npy', trained, 'bad.npy: '),
                             (lesions / '0.npy', tmp_path, 'absent, or no detector'),
                             (lesions / '0.npy', encoder.parent, 'absent, or no detector')):
        with pytest.raises((ValueError, OSError), match=words):
            cli('predict', file, '--checkpoint', run)


def test_errors_end_the_script_with_one_sentence(tmp_path, encoder):
    done = subprocess.run([sys.executable, str(ROOT / 'detect.py'), '--root', 'none.csv', '--encoder', str(encoder)],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith('detect.py: ') and 'none.csv' in done.stderr


def test_a_small_demo_runs_and_draws_also_without_an_encoder(tmp_path, encoder, capsys):
    demo = ('--phantoms', 40, '--epochs', 1, '--size', 84, '--channels', 32, '--draws', 20, '--out', tmp_path / 'demo')
    cli(*demo, '--encoder', tmp_path / 'absent.pt')
    text = capsys.readouterr().out
    assert text.startswith('A demonstration on phantoms') and 'trained - untrained' in text
    assert 'absent.pt is absent: random weights' in text
    for name in ('overlay.png', 'froc.png'):
        assert np.asarray(Image.open(tmp_path / 'demo' / name)).std() > 5
