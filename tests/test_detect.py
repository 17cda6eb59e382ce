"""detect.py: boxes come back to the pixels of the file, a killed run goes on bit for bit, two ranks are one."""
import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from conftest import run_here, run_ranks, write
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
FAST = ('--size', 84, '--channels', 32, '--batch', 8, '--micro_batch', 4, '--workers', 0, '--min_distance', 10,
        '--draws', 50, '--lr', 3e-3, '--dropout', 0.05)


def tiny(cfg):
    return detect.Detector(cfg, vit.ViT(**TINY, layerscale=1.0))


def volume(boxes=(), shape=(40, 84, 84), **fields):
    return Row('x', 'p', boxes=[(z, *box, 'm') for z, *box in boxes], shape=shape, **fields)


def noise(path, *shape):
    np.save(path, np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8))
    return str(path)


# ---- findings -----------------------------------------------------------------------------------------------------

def test_boxes_of_neighbouring_slices_become_one_finding_and_faint_boxes_do_not_stretch_it():
    lesion, other = [10, 10, 30, 30], [100, 100, 120, 120]
    boxes, values, slices = [lesion, [12, 11, 32, 31], lesion, other], [.5, .9, .6, .7], [4, 5, 6, 5]
    rows = detect.merge_slices(boxes, values, slices)
    assert rows.tolist() == [[12, 11, 20, 20, 4, 3, .9], [100, 100, 20, 20, 5, 1, .7]]
    shuffled = detect.merge_slices(*(np.array(a)[[2, 0, 3, 1]] for a in (boxes, values, slices)))
    assert (shuffled == rows).all() and detect.merge_slices([], [], []).shape == (0, 7)
    far = detect.merge_slices([lesion] * 4, [.9, .8, .7, .6], [2, 3, 20, 21])
    assert far[:, 4:].tolist() == [[2, 2, .9], [20, 2, .7]]
    assert [len(detect.merge_slices([lesion] * 2, [.9, .8], [2, 4], gap=gap)) for gap in (1, 2)] == [2, 1]
    faint = np.where(np.arange(40) == 30, .9, .02)
    assert detect.merge_slices([lesion] * 40, faint, range(40))[0, 4:].tolist() == [30, 1, .9]


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
    one, two = (detect.Frames(Config(size=56), rows)[i, 2]['image'] for i in (0, 1))
    x0, y0, x1, y1 = detect.on_frames(rows[1], {2}, 56)[0].round().astype(int)
    assert (one == two).all() and two[0, y0:y1, x0:x1].mean() > 210 and two.mean() < 100


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


def test_augmentation_moves_boxes_with_their_lesions_and_black_rectangles_spare_them():
    """A bright rectangle is found again where the moved box says, in 200 draws."""
    moved = zoomed = holes = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        image = np.full((1, 259, 259), 40, np.uint8)
        x, y = rng.integers(20, 200, 2)
        image[0, y:y + 25, x:x + 30] = 200
        (out,), boxes = detect.augment(rng, image, np.array([[x, y, x + 30, y + 25]], float))
        bright = out.astype(float) > 130
        rows, columns = np.flatnonzero(bright.mean(1) > 0.03), np.flatnonzero(bright.mean(0) > 0.03)
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(boxes[0] - found).max() <= 1.6 and out[rows[2]:rows[-2], columns[2]:columns[-2]].min() > 100, seed
        w, h = boxes[0, 2:] - boxes[0, :2]
        moved, zoomed = moved + (abs(boxes[0, 0] - x) > 1), zoomed + (abs(w - 30) > 0.01)
        holes += abs(w - 30) < 0.01 and (out == 0).sum() > 1000
        assert 7.5 <= w <= 103 and 4.5 <= h <= 91 and boxes.min() >= 0 and boxes.max() <= 259
    assert 100 < moved < 200 and 60 < zoomed < 140 and 10 < holes < 70


def test_a_lesion_marked_on_a_slice_nearby_is_no_background(tmp_path):
    row = volume([(10, 5, 5, 25, 25), (12, 50, 50, 70, 70), (30, 50, 10, 70, 30)])
    row.path = noise(tmp_path / 'a.npy', 40, 84, 84)
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


def test_an_epoch_holds_every_lesion_and_as_many_normals_in_whole_batches():
    cfg, marked = Config(batch=8, normals=1.0), [(i, 3) for i in range(6)]
    batches = detect.plan(cfg, marked, list(range(30)), 1)
    items = sum(batches, [])
    assert [len(batch) for batch in batches] == [8, 8] and [index for *_, index in items] == list(range(16))
    assert sorted(i for i, z, *_ in items[:12] if z == 3) == list(range(6))
    assert sum(z is None for _, z, *_ in items[:12]) == 6
    assert batches != detect.plan(cfg, marked, list(range(30)), 0)
    assert len(sum(detect.plan(cfg, marked, [], 0), [])) == 8


def test_an_unreadable_training_file_is_named_and_teaches_nothing(tmp_path, capsys):
    (tmp_path / 'bad.npy').write_bytes(b'no array')
    frames = detect.Frames(Config(**SMALL), [Row(str(tmp_path / 'bad.npy'), 'p', shape=(1, 9, 9))])
    assert frames[0, 0] is None and 'bad.npy' in capsys.readouterr().err
    batch, head = detect.collate([frames[0, 0, 0, 0]]), tiny(Config(**SMALL)).head
    answers = torch.randn(1, len(head.anchors)), torch.randn(1, len(head.anchors), 4)
    assert head.loss(answers, batch).tolist() == [0, 0] and head.count(batch) == 0


# ---- the detector -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('freeze', [True, False])
def test_a_frozen_encoder_gets_no_gradient(freeze):
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
    (found, values), = head.boxes(answers)
    torch.testing.assert_close(values, torch.tensor([2.0, 1, 0, -1]).sigmoid())
    torch.testing.assert_close(found[0], torch.tensor([21.0, 21, 63, 63]))
    assert (head.net.lambda1, head.net.lambda2) == (0.5, 3.0)


def test_dino_detr_looks_where_the_anchors_lie():
    head = tiny(Config(size=518, channels=32, head='detr', layers=(0, 1))).head
    levels = [torch.zeros(1, 1, cells, cells) for cells in retinanet.grids(518)]
    found, a = 518 * detr.Grid.of(levels, head.net.centres).centres, retinanet.anchors(518)
    torch.testing.assert_close(found, ((a[:, :2] + a[:, 2:]) / 2)[4::9], rtol=0, atol=1e-2)


@pytest.mark.parametrize('flags, words', [
    (('--size', 500), '--size 500: expected a multiple of 14'), (('--channels', 48), 'of 32'),
    (('--head', 'yolo'), 'expected retinanet, detr'), (('--dataset', 'rsna'), 'expected bcs, vindr, cbis, mias, csv'),
    (('--root', 'x'), '--encoder FILE is missing'),         # never the phantoms' encoder
    (('--dataset', 'csv'), '--dataset needs --root DIR')])
def test_flags_that_cannot_work_are_refused(flags, words):
    with pytest.raises(ValueError, match=words):
        cli(*flags)


def test_an_encoder_of_another_patch_is_refused(tmp_path):
    save_encoder(tmp_path / 'p.pt', vit.ViT(size=64, patch=16, width=32, depth=1, heads=2))
    with pytest.raises(ValueError, match='patches of 16 pixels; expected 14'):
        detect.build(Config(encoder=str(tmp_path / 'p.pt')))


def test_the_defaults_are_the_numbers_of_the_papers():
    cfg = Config()
    assert (cfg.size, cfg.channels, cfg.batch, cfg.epochs, cfg.patience, cfg.freeze) == (518, 256, 64, 50, 10, True)
    assert (cfg.alpha, cfg.gamma, cfg.nms, cfg.min_distance, cfg.lambdas) == (0.25, 2, 0.1, 100, (1, 2))
    assert cfg.lr == 5e-4 and Config(head='detr').lr == 1e-4 and Config(head='detr', lr=3e-3).lr == 3e-3


# ---- validation ---------------------------------------------------------------------------------------------------

def test_a_slice_s_score_takes_boxes_within_20_pixels_of_518(group, monkeypatch):
    detector, rows, found = tiny(Config(**SMALL, normals=0)), [volume([(1, 10, 10, 14, 14)], (4, 84, 84))], []
    monkeypatch.setattr(detect, 'detect_slices', lambda *given: iter(found))
    shift = 20 * 84 / 518                                   # of a lesion whose half diagonal is less
    for off, expected in ((0.9 * shift, 1.0), (1.1 * shift, 0.0)):
        found[:] = [(0, 1, np.array([[10, 10 + off, 14, 14 + off], [60, 60, 70, 70]]), np.array([.6, .8]))]
        value, about = detector.validate(rows, CPU)
        assert value == expected
    assert about == dict(threshold=0.8)                     # at the next lower, .6, a second false positive


def test_normals_of_the_validation_are_drawn_by_seed_and_not_the_first(group, monkeypatch):
    rows = [volume([(20, 10, 10, 30, 30)], normal=False)] * 3 + [volume() for _ in range(60)]
    drawn = []
    monkeypatch.setattr(detect, 'detect_slices', lambda detector, rows, items, device: drawn.append(items) or ())
    for seed in (0, 0, 1):
        tiny(Config(**SMALL, seed=seed)).validate(rows, CPU)
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


@pytest.fixture
def run(lesions, encoder, tmp_path):
    """run(folder, flags): a small run of detect.py on the lesions"""
    return lambda name, *flags: cli('--root', lesions, '--encoder', encoder, '--out', tmp_path / name, *FAST, *flags)


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
    return [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()]


def test_training_finds_lesions_that_an_untrained_detector_does_not(trained, run, tmp_path):
    run('untrained', '--epochs', 0)
    before, after = (list(scores(folder)['challenge'].values())[0]['mean_sensitivity_positive']
                     for folder in (tmp_path / 'untrained', trained))
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
    rows = [Row(noise(tmp_path / 'm.npy', 84, 84), 'p', boxes=[(0, 5, 5, 20, 20, 'cancer')], shape=(1, 84, 84))]
    detect.write(tmp_path, rows, detect.find_lesions(tiny(Config(**SMALL)), rows, CPU))
    assert {row[5:7] for row in score.read_predictions(tmp_path)} == {(0, 0)}
    with open(tmp_path / 'boxes.csv') as file:
        assert [line['VolumeSlices'] for line in csv.DictReader(file)] == ['1']


def test_a_volume_of_another_depth_than_its_label_is_not_searched(lesions, tmp_path, group):
    """datasets.py leaves it without a shape; the label file's depth goes into boxes.csv."""
    row = Row(str(lesions / '1.npy'), 'p', boxes=[(30, 5, 5, 20, 20, 'cancer')], record=dict(VolumeSlices=60))
    assert detect.find_lesions(tiny(Config(**SMALL)), [row], CPU) == [] and row.shape is None
    detect.write(tmp_path, [row], [])
    assert score.read_truth(tmp_path / 'labels.csv', tmp_path / 'boxes.csv')[0][0][1] == 60


def test_every_frame_is_read_and_one_at_a_time(lesions, monkeypatch, group):
    read, seen = images.read, []
    monkeypatch.setattr(images, 'read', lambda path, frame=0, voi=False: seen.append(frame) or read(path, frame, voi))
    detect.find_lesions(tiny(Config(**SMALL)), [Row(str(lesions / '1.npy'), 'q')], CPU)
    assert seen == [0, 1, 2, 3]


def interrupted_after(epochs):
    whole, calls = detect.Detector.validate, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > epochs:
            raise KeyboardInterrupt
        return whole(*arguments)
    return stop


@pytest.mark.parametrize('head', [(), DETR])
def test_a_killed_run_goes_on_bit_for_bit(head, run, tmp_path):
    run('whole', *head, '--epochs', 3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(detect.Detector, 'validate', interrupted_after(1))
        run('cut', *head, '--epochs', 3)
    assert len(weights(tmp_path / 'cut', 'log')) == 1
    run('cut', *head, '--epochs', 3, '--resume')
    for name in ('weights', 'best_weights'):
        one, two = weights(tmp_path / 'whole', name), weights(tmp_path / 'cut', name)
        assert all(torch.equal(one[k], two[k]) for k in one)
    assert log(tmp_path / 'whole') == log(tmp_path / 'cut')
    assert (tmp_path / 'whole/predictions.csv').read_text() == (tmp_path / 'cut/predictions.csv').read_text()
    assert all(line['loss'] > line['box'] > 0 and ('atd' in line) == bool(head) for line in log(tmp_path / 'cut'))


def test_another_recipe_is_not_continued_and_nothing_is_overwritten(trained, lesions, encoder):
    arguments = ('--encoder', encoder, '--out', trained, *FAST, '--epochs', 6)
    with pytest.raises(ValueError, match='another recipe: --seed 0 -> 1, --lr 0.003 -> 0.001'):
        cli('--root', lesions, *arguments, '--lr', 1e-3, '--seed', 1, '--resume')
    for root in (('--root', lesions), ()):                  # a run, and the demo
        with pytest.raises(ValueError, match='holds a run'):
            cli(*root, *arguments)


def test_two_ranks_give_the_predictions_of_one(run, lesions, encoder, tmp_path):
    flags = ('--epochs', 2, '--dropout', 0)
    run('one', *flags)
    rc, text = torchrun(2, '--root', lesions, '--encoder', encoder, '--out', tmp_path / 'two', *FAST, *flags,
                        '--micro_batch', 2)
    assert rc == 0, text
    for a, b in zip(*(log(tmp_path / name) for name in ('one', 'two')), strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)
    best = [{}, {}]
    for found, name in zip(best, ('one', 'two')):           # of faint findings the order may change
        for key, *row in score.read_predictions(tmp_path / name):
            found.setdefault(key, row)
    assert np.allclose(list(best[0].values()), list(best[1].values()), rtol=0.02, atol=0.5)


def test_the_loss_is_the_sums_over_the_positives_of_the_batch(lesions, encoder, tmp_path, group):
    cfg = Config(root=str(lesions), encoder=str(encoder), **SMALL, batch=13, micro_batch=5, epochs=1, normals=0,
                 augment=False, dropout=0, out=str(tmp_path))
    rows, _ = detect.load(cfg)
    ill, validation = ([row for row in rows if row.split == split and row.boxes] for split in ('train', 'val'))
    assert len(ill) == 13                                   # one step of one batch
    detect.train(detect.build(cfg), ill, validation, CPU, tmp_path)
    frames, detector = detect.Frames(cfg, ill), detect.build(cfg)
    batch = detect.collate([frames[i, row.boxes[0][0], 0, i] for i, row in enumerate(ill)])
    focal, box = retinanet.losses(*detector(batch['images']), batch, retinanet.anchors(84))
    positives = (batch['match'] >= 0).sum()
    line, = log(tmp_path)
    assert line['focal'] == pytest.approx((focal / positives).item(), rel=1e-4)
    assert line['box'] == pytest.approx((box / positives).item(), rel=1e-4)
    assert line['loss'] == pytest.approx(line['focal'] + line['box'], rel=1e-5)


def test_finetuning_moves_the_encoder_and_another_run_starts_from_it(trained, run, encoder, tmp_path):
    run('run', '--epochs', 1, '--no-freeze')
    before, after = vit.load(encoder).state_dict(), weights(tmp_path / 'run', 'best_weights')
    assert (before['blocks.0.attn.qkv.weight'] - after['encoder.blocks.0.attn.qkv.weight']).abs().max() > 1e-5
    begun = detect.build(Config(**SMALL, init_from=str(tmp_path / 'run'))).state_dict()
    assert all(torch.equal(begun[k], v) for k, v in after.items())
    with pytest.raises(ValueError, match='--channels 64: .* has another number'):
        detect.build(Config(size=84, channels=64, init_from=str(trained)))


def test_the_patience_ends_a_run_that_does_not_improve(run, tmp_path, monkeypatch):
    monkeypatch.setattr(detect.Detector, 'validate', lambda *_: (0.25, dict(threshold=0.5)))
    run('run', '--epochs', 9, '--patience', 2)
    lines = log(tmp_path / 'run')
    assert [line['epoch'] for line in lines] == [0, 1, 2] and lines[-1]['best_epoch'] == 0


def test_an_unusable_test_volume_counts_as_missed(lesions, encoder, tmp_path, monkeypatch):
    """One of the seven test lesions loses its file, one its pixels; the denominator stays seven."""
    monkeypatch.setattr(datasets, 'MAX_ABSENT', 0.5)
    for path in lesions.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / '28.npy').unlink()
    for i in (1, 27, 29):                                   # a lesion of the training set, a normal and one of the test
        (tmp_path / f'{i}.npy').write_bytes(b'no array')
    cli('--root', tmp_path, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 1)
    _, truth, _ = score.read_truth(tmp_path / 'run/labels.csv', tmp_path / 'run/boxes.csv')
    assert len(truth) == 7 and any('1.npy' in note for note in scores(tmp_path / 'run')['notes'])
    found = {row[0][1] for row in score.read_predictions(tmp_path / 'run')}
    assert found and not {'27.npy', '28.npy', '29.npy'} & found


def test_a_distance_that_small_images_make_a_gift_is_noted(lesions):
    assert 'over a tenth of the smallest image, 60 pixels' in detect.load(Config(root=str(lesions)))[1][-1]
    assert not detect.load(Config(root=str(lesions), min_distance=6))[1]


def test_nothing_waits_for_ever_for_data():
    assert detect.loader(Config(workers=1), [1]).timeout == 1800


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


def test_predict_says_what_is_wrong_with_a_picture_or_a_run(trained, encoder, lesions, tmp_path):
    (tmp_path / 'bad.npy').write_bytes(b'no array')
    for file, folder, words in ((tmp_path / 'bad.npy', trained, 'bad.npy: '),
                                (lesions / '0.npy', encoder.parent, 'absent, or no detector')):
        with pytest.raises(ValueError, match=words):
            cli('predict', file, '--checkpoint', folder)


def test_a_small_demo_needs_no_data_and_may_be_repeated(tmp_path, encoder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)                             # where pretrain.py has left no encoder
    demo = ('--phantoms', 40, '--epochs', 1, '--size', 84, '--channels', 32, '--draws', 20)
    cli(*demo)
    text = capsys.readouterr().out
    assert text.startswith('A demonstration on phantoms') and 'trained - untrained' in text
    assert 'on random weights' in text and (tmp_path / 'runs/detect-demo/froc.png').exists()
    cli(*demo, '--encoder', encoder)
