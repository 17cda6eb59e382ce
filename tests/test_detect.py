"""detect.py: anchors, matching and loss equal trusted ones, FROC equals the challenge's to the digit, boxes are read as
published and come back to the pixels of the file, training resumes exactly, two ranks are one."""
import csv
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pydicom
import pytest
import torch
from conftest import CASES, ROOT, run_here, run_ranks, write
from PIL import Image
from pydicom.dataset import FileMetaDataset

import detect
import retinanet
import metrics
import images
import phantom
import prepare
import vit
from detect import Config, Volume

cli, torchrun = partial(run_here, detect), partial(run_ranks, 'detect.py')
RETINANET, FROC = np.load(CASES / 'retinanet.npz'), json.loads((CASES / 'froc.json').read_text())
TINY = dict(size=84, width=32, depth=1, heads=2)


def case(name):
    return torch.from_numpy(RETINANET[name])


def dicom(path, pixels):
    """uint16 (H, W) or (K, H, W) as an uncompressed DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = '1.2.840.10008.5.1.4.1.1.1.2', '1.2.3'
    ds = pydicom.Dataset()
    ds.file_meta, ds.Rows, ds.Columns = meta, *pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, 'MONOCHROME2', 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    if pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.PixelData = np.ascontiguousarray(pixels, np.uint16).tobytes()
    ds.save_as(path, enforce_file_format=True)


# ---- anchors, matching, loss --------------------------------------------------------------------------------------

def test_the_paper_s_anchors_are_65250_and_sit_where_the_cells_look():
    a = retinanet.anchors(518)
    assert a.shape == (65250, 4) and retinanet.grids(518) == (74, 37, 18, 9)
    middle, start = (a[:, :2] + a[:, 2:]) / 2, 0
    for cells, centre in zip((74, 37, 18, 9), (lambda j: 7 * (j + .5), lambda j: 14 * (j + .5), lambda j: 28 * (j + .5),
                                               lambda j: 56 * j + 14)):
        level = middle[start:start + 9 * cells ** 2].view(cells, cells, 9, 2)
        j = torch.arange(cells)
        assert (level[..., 0] - centre(j)[None, :, None]).abs().max() < 1e-3            # columns run inside rows
        assert (level[..., 1] - centre(j)[:, None, None]).abs().max() < 1e-3
        start += 9 * cells ** 2
    first = (a[:9, 2:] - a[:9, :2]).double()
    assert torch.allclose(first.prod(1).sqrt(), 16 * torch.tensor([1, 1.26, 1.587] * 3, dtype=torch.double))
    assert torch.allclose(first[:, 1] / first[:, 0], torch.tensor([.5] * 3 + [1.] * 3 + [2.] * 3, dtype=torch.double))


@pytest.mark.parametrize('size', [126, 140])                # 9 and 10 patches: an odd and an even grid
def test_anchors_sit_at_the_centroid_of_what_moves_their_cell(size):
    torch.manual_seed(0)
    side, start = size // 14, 0
    pyramid = retinanet.Pyramid(4, 32)
    pyramid.reduce.weight.data.fill_(1.0)
    for convolution in (pyramid.p3, pyramid.p4, pyramid.p5, pyramid.p6):                # the middle of each kernel
        convolution.weight.data.zero_()[:, :, 1, 1] = 1.0
    for level, cells in enumerate(retinanet.grids(size)):
        middle = retinanet.anchors(size)[start:start + 9 * cells ** 2].view(cells, cells, 9, 2, 2).mean(3)
        start, j, tokens = start + 9 * cells ** 2, cells - 1, torch.rand(64, side * side, 4, requires_grad=True)
        pyramid(tokens)[level][:, :, j, j - 1].sum().backward()                         # last row, last column but one
        pulls = tokens.grad.abs().sum((0, 2)).view(side, side).sum(0)
        x = (pulls * 14 * (torch.arange(side) + 0.5)).sum() / pulls.sum()
        # max-pooling takes one of two columns, 7 pixels to either side: over 64 draws off by 3.5 once in 16,000 times
        assert abs(x - middle[j, j - 1, 0, 0]) < (0.01 if level < 2 else 3.5), level


def test_decode_undoes_encode_and_both_equal_the_references():
    anchors, boxes = case('coder_anchors'), case('coder_gt')
    assert torch.allclose(retinanet.encode(boxes, anchors), case('coder_encode'), atol=1e-5)
    assert torch.allclose(retinanet.decode(retinanet.encode(boxes, anchors), anchors), boxes, atol=1e-2)
    assert torch.allclose(retinanet.decode(case('coder_deltas'), anchors), case('coder_decode'), rtol=1e-5, atol=1e-4)
    wild = retinanet.decode(torch.tensor([[0, 0, 50., 50.]]).half(), torch.tensor([[0, 0, 16., 16.]]))
    assert wild.dtype == torch.float32 and torch.allclose(wild[0, 2:] - wild[0, :2], torch.full((2,), 1000.0))


def test_matching_equals_the_reference_with_low_quality_matches():
    anchors, tried = case('match_anchors'), 0
    for name in RETINANET:
        if name.endswith('_gt') and name.startswith('match'):
            expected = case(name.replace('_gt', '_out')).long()
            assert (retinanet.match(case(name), anchors, 0.5, 0.4) == expected).all()
            tried += 1
    assert tried == 6


def test_a_box_that_overlaps_nothing_matches_nothing():
    anchors = retinanet.anchors(56)
    away = torch.tensor([[-900., -900, -890, -890]])
    assert (retinanet.match(away, anchors) == -1).all()
    assert (retinanet.match(torch.zeros(0, 4), anchors) == -1).all()
    both = retinanet.match(torch.cat([away, torch.tensor([[20., 20, 30, 30]])]), anchors)
    assert (both == 1).any() and not (both == 0).any()


def test_focal_loss_equals_the_reference():
    for i in range(3):
        alpha, gamma, total = RETINANET[f'focal{i}']
        found = retinanet.focal_loss(case('focal_logits'), case('focal_targets'), alpha, gamma)
        assert found.item() == pytest.approx(total, rel=1e-5)
    logits = torch.tensor([60., -60.], dtype=torch.bfloat16, requires_grad=True)        # confident and wrong
    retinanet.focal_loss(logits, torch.tensor([0., 1.])).backward()
    assert logits.grad.float().abs().min() > 0.1 and logits.grad.isfinite().all()


def test_ignored_anchors_are_in_no_loss_and_images_without_lesions_have_one():
    anchors, cfg = retinanet.anchors(56), Config()
    boxes = [torch.tensor([[10., 10, 34, 36]]), torch.zeros(0, 4)]
    batch = dict(boxes=boxes, match=torch.stack([retinanet.match(b, anchors, 0.5, 0.4) for b in boxes]))
    torch.manual_seed(0)
    logits, deltas = torch.randn(2, len(anchors)), torch.randn(2, len(anchors), 4)
    by_hand = [0.0, 0.0]
    for b in range(2):
        for a, m in enumerate(batch['match'][b].tolist()):
            if m != -2:
                by_hand[0] += retinanet.focal_loss(logits[b, a], torch.tensor(float(m >= 0))).item()
            if m >= 0:
                off = (deltas[b, a] - retinanet.encode(boxes[b][m:m + 1], anchors[a:a + 1])[0]).abs()
                by_hand[1] += torch.where(off < 0.1, 5 * off ** 2, off - 0.05).sum().item()
    focal, box = retinanet.losses(cfg, logits, deltas, batch, anchors)
    assert (batch['match'] == -2).any() and (batch['match'] >= 0).any()
    assert (focal.item(), box.item()) == pytest.approx(by_hand, rel=1e-4)
    smooth, _ = retinanet.losses(replace(cfg, smoothing=0.1), logits, deltas, batch, anchors)
    positive = batch['match'] >= 0
    change = retinanet.focal_loss(logits[positive], torch.full((int(positive.sum()),), 0.9)) \
        - retinanet.focal_loss(logits[positive], torch.ones(int(positive.sum())))
    assert (smooth - focal).item() == pytest.approx(change.item(), rel=0.01)            # backgrounds keep their 0


def test_nms_equals_its_definition_and_a_reference_post_processing():
    torch.manual_seed(0)
    corner = torch.rand(200, 2) * 80
    boxes, scores = torch.cat([corner, corner + 5 + torch.rand(200, 2) * 30], 1), torch.rand(200).round(decimals=1)
    kept = []
    for i in sorted(range(200), key=lambda i: -scores[i].item()):                       # stable: ties keep their order
        if all(retinanet.pairwise_iou(boxes[i:i + 1], boxes[j:j + 1]) <= 0.3 for j in kept):
            kept.append(i)
    assert retinanet.nms(boxes, scores, 0.3).tolist() == kept
    assert retinanet.nms(boxes, scores, 0.3, top=5).tolist() == kept[:5]
    assert retinanet.nms(torch.zeros(0, 4), torch.zeros(0)).tolist() == []

    size, _, threshold, overlap, top, most = RETINANET['pp_args'].tolist()
    found = []                                              # (score, class, box): top-k per level, NMS per class
    levels = []
    for level in range(3):
        score = case(f'pp_cls{level}').sigmoid().flatten()
        order = [i for i in score.argsort(descending=True, stable=True).tolist() if score[i] > threshold][:int(top)]
        box = retinanet.decode(case(f'pp_reg{level}'), case(f'pp_anc{level}')).clamp(0, size)
        levels += [(score[i], i % 2, box[i // 2]) for i in order]
    for kind in (0, 1):
        mine = [row for row in levels if row[1] == kind]
        rows = retinanet.nms(torch.stack([row[2] for row in mine]), torch.stack([row[0] for row in mine]), overlap)
        found += [mine[i] for i in rows]
    found = sorted(found, key=lambda row: -row[0].item())[:int(most)]
    assert torch.allclose(torch.stack([row[2] for row in found]), case('pp_boxes'), atol=1e-3)
    assert [row[1] for row in found] == case('pp_labels').tolist()


# ---- the model ----------------------------------------------------------------------------------------------------

def test_the_detector_has_the_paper_s_shapes_and_starts_at_one_percent():
    encoder = vit.ViT(size=126, width=32, depth=1, heads=2, layerscale=1.0)
    detector = detect.Detector(encoder, channels=64).eval()
    logits, deltas = detector(torch.rand(2, 1, 126, 126))
    assert logits.shape == (2, len(retinanet.anchors(126))) and deltas.shape == (*logits.shape, 4)
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.002)
    for tower in (detector.classify, detector.regress):
        assert [conv.weight.shape for conv in tower.conv] == [(64, 64, 3, 3)] * 4
        assert [norm.num_groups for norm in tower.norm] == [32] * 4
        assert [drop.p for drop in tower.drop] == [0.05, 0.05, 0.05, 0.1]
    grids = [level.shape[-1] for level in retinanet.Pyramid(8, 32)(torch.rand(1, 37 * 37, 8))]
    assert grids == [74, 37, 18, 9]


def test_answers_are_ordered_like_the_anchors():
    """What stands in one cell of one level, in the channel of one shape, comes out at that anchor's number."""
    detector = detect.Detector(vit.ViT(**TINY), channels=32)
    levels = [torch.zeros(1, 36, n, n) for n in retinanet.grids(84)]
    detector.pyramid.forward, detector.regress.forward = lambda tokens: levels, lambda level: level
    detector.classify.forward = lambda level: level[:, :9]
    levels[1][0, 5, 3, 2] = 7.0                             # P4, fourth row, third column, sixth shape
    levels[2][0, 4 * 8 + 3, 1, 0] = 7.0                     # P5, second row, first column, last delta of the last shape
    logits, deltas = detector(torch.rand(1, 1, 84, 84))
    assert torch.nonzero(logits).tolist() == [[0, 9 * 144 + 9 * (3 * 6 + 2) + 5]]
    x, y = retinanet.anchors(84)[9 * 144 + 9 * (3 * 6 + 2) + 5].view(2, 2).mean(0).tolist()
    assert (x, y) == pytest.approx((14 * 2.5, 14 * 3.5))
    assert [0, 9 * 180 + 9 * 3 + 8, 3] in torch.nonzero(deltas).tolist()


def test_answers_are_fp32_under_autocast_so_that_scores_stay_apart():
    torch.manual_seed(0)
    detector = detect.Detector(vit.ViT(**TINY), channels=32).eval()
    with torch.autocast('cpu', torch.bfloat16):
        logits, deltas = detector(torch.rand(1, 1, 84, 84))
    assert logits.dtype == deltas.dtype == torch.float32
    assert len(logits.unique()) > 0.9 * logits.numel()


def test_a_frozen_encoder_stays_in_eval_mode_and_gets_no_gradient():
    detector = detect.Detector(vit.ViT(**TINY, drop_path=0.5), channels=32).train()
    assert detector.training and not detector.encoder.training and detector.classify.training
    detector(torch.rand(1, 1, 84, 84))[0].sum().backward()
    assert all(p.grad is None for p in detector.encoder.parameters())
    assert all(p.grad is not None for p in detector.classify.parameters())
    assert not any(name.startswith('encoder') for name in detector.learnt())
    tuned = detect.Detector(vit.ViT(**TINY, drop_path=0.5), channels=32, freeze=False).train()
    assert tuned.encoder.training and any(name.startswith('encoder') for name in tuned.learnt())


# ---- findings -----------------------------------------------------------------------------------------------------

def test_boxes_of_neighbouring_slices_become_one_finding():
    lesion, other = [10, 10, 30, 30], [100, 100, 120, 120]
    rows = detect.merge_slices([lesion, [12, 11, 32, 31], lesion, other], [.5, .9, .6, .7], [4, 5, 6, 5])
    assert rows.tolist() == [[12, 11, 20, 20, 4, 3, .9], [100, 100, 20, 20, 5, 1, .7]]
    order = [2, 0, 3, 1]
    shuffled = detect.merge_slices(*(np.array(a)[order] for a in (
        [lesion, [12, 11, 32, 31], lesion, other], [.5, .9, .6, .7], [4, 5, 6, 5])))
    assert (shuffled == rows).all()
    assert detect.merge_slices([], [], []).shape == (0, 7)


def test_lesions_at_one_place_far_apart_in_depth_stay_two():
    box = [10, 10, 30, 30]
    rows = detect.merge_slices([box] * 4, [.9, .8, .7, .6], [2, 3, 20, 21])
    assert rows[:, 4:].tolist() == [[2, 2, .9], [20, 2, .7]]
    assert len(detect.merge_slices([box] * 2, [.9, .8], [2, 4], gap=1)) == 2
    assert len(detect.merge_slices([box] * 2, [.9, .8], [2, 4], gap=2)) == 1


def test_faint_boxes_on_every_slice_do_not_stretch_a_finding():
    box = [10, 10, 30, 30]
    scores = [.02] * 40
    scores[30] = .9
    rows = detect.merge_slices([box] * 40, scores, range(40))
    assert rows[0, 4:].tolist() == [30, 1, .9]
    assert len(detect.merge_slices([box] * 3, [.01, .9, .01], [29, 30, 31])) == 1       # but next to it they are it


def test_boxes_of_an_image_lie_inside_it_best_first():
    torch.manual_seed(0)
    anchors = retinanet.anchors(56)
    boxes, scores = retinanet.boxes_of(torch.randn(len(anchors)), 3 * torch.randn(len(anchors), 4), anchors, 56, top=30)
    assert 0 < len(boxes) <= 30 and (scores.diff() <= 0).all() and boxes.min() >= 0 and boxes.max() <= 56
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (retinanet.pairwise_iou(boxes, boxes) - torch.eye(len(boxes))).max() <= 0.1


# ---- the score ----------------------------------------------------------------------------------------------------

def literal_froc(volumes, truth, predictions, min_distance):
    """The challenge's rule, step by step as its evaluator takes them, for one set of volumes: [(fps, sensitivity)]"""
    slices, rows = dict(map(tuple, volumes)), []
    for p in predictions:
        reach = []
        for g, (name, x, y, w, h, z) in enumerate(truth):
            if name == p[0]:
                dx, dy, dz = p[1] + p[3] / 2 - x - w / 2, p[2] + p[4] / 2 - y - h / 2, p[5] + p[6] / 2 - z
                if math.hypot(dx, dy) <= max(math.hypot(w, h) / 2, min_distance) and abs(dz) <= slices[name] / 4:
                    reach.append((math.sqrt(dx ** 2 + dy ** 2 + dz ** 2), g))
        rows.append((p[-1], min(reach)[1] if reach else None))
    points = []
    scores = [s for s, _ in rows] or [0]
    for t in [max(scores) + 1, *sorted({s for s, g in rows if g is not None}, reverse=True), min(scores) - 1]:
        on = [g for s, g in rows if s >= t]
        points.append((on.count(None) / len(volumes), len(set(on) - {None}) / len(truth)))
    return points


def test_froc_equals_the_challenge_s_evaluator():
    for c in FROC:
        found = metrics.froc(c['volumes'], c['gt'], c['pred'], c['min_dist'])
        assert found == pytest.approx(c['expected'], abs=1e-9), c.get('name')
        points = literal_froc(c['volumes'], c['gt'], c['pred'], c['min_dist'])
        literal = np.interp(2, *zip(*points))
        assert found['sensitivity_at_2_fps_all'] == pytest.approx(literal, abs=1e-12)


def test_fauc_equals_the_reference_step_rule():
    for c in FROC:
        if 'fauc1_step' in c:
            ill = {row[0] for row in c['gt']}
            predictions = [[*row[:5], row[-1]] for row in c['pred']]
            truth = [row[:5] for row in c['gt']]
            found = metrics.fauc([row[0] for row in c['volumes']], truth, predictions, c['min_dist'])
            assert found == pytest.approx(c['fauc1_step'], abs=1e-9)
            found = metrics.fauc(sorted(ill), truth, [row for row in predictions if row[0] in ill], c['min_dist'])
            assert found == pytest.approx(c['fauc1_step_positive_images'], abs=1e-9)


def test_an_empty_prediction_file_scores_zero_and_no_lesion_is_not_defined():
    volumes, truth = [[0, 40], [1, 40]], [[0, 10, 10, 50, 50, 20]]
    assert set(metrics.froc(volumes, truth, []).values()) == {0.0}
    assert metrics.fauc([0, 1], [row[:5] for row in truth], []) == 0
    assert detect.average_precision([row[:5] for row in truth], [], 0.5) == 0
    assert all(math.isnan(v) for v in metrics.froc(volumes, [], []).values())
    with pytest.raises(ValueError, match='a lesion lies in 7, which is not among the volumes'):
        metrics.froc(volumes, [[7, 10, 10, 50, 50, 20]], [])


def test_a_missed_volume_stays_in_the_denominator():
    volumes, truth = [[i, 40] for i in range(4)], [[i, 10, 10, 50, 50, 20] for i in range(4)]
    predictions = [[0, 10, 10, 50, 50, 20, 1, .9]]
    assert metrics.froc(volumes, truth, predictions)['mean_sensitivity_positive'] == 0.25


def test_bootstrap_weights_count_volumes_as_copies_would():
    c = next(c for c in FROC if len(c['gt']) > 15 and c['min_dist'] == 100)
    rng = np.random.default_rng(0)
    names = [v[0] for v in c['volumes']]                    # 0, 1, …
    for _ in range(5):
        drawn = rng.integers(len(names), size=len(names))
        copies, slices = list(enumerate(drawn)), dict(map(tuple, c['volumes']))
        volumes = [[f'copy {k}', slices[name]] for k, name in copies]
        truth = [[f'copy {k}', *row[1:]] for k, name in copies for row in c['gt'] if row[0] == name]
        predictions = [[f'copy {k}', *row[1:]] for k, name in copies for row in c['pred'] if row[0] == name]
        m = metrics.matched(c['volumes'], c['gt'], c['pred'], 100)
        weight = np.append(np.bincount(drawn, minlength=len(names)), 1.0)
        expected = metrics.froc(volumes, truth, predictions, 100)
        at = metrics.sensitivity(m, [1, 2, 3, 4], m.ill(weight))
        assert at.mean() == pytest.approx(expected['mean_sensitivity_positive'], abs=1e-12)
        flat = metrics.matched([[n, math.inf] for n in names], [row[:5] for row in c['gt']], c['pred'], 100)
        assert metrics.step_area(flat, weight) == pytest.approx(metrics.fauc(
            [v[0] for v in volumes], [row[:5] for row in truth], predictions, 100), abs=1e-12)
        number = {name: i for i, name in enumerate(names)}
        o = detect.overlapping([row[:5] for row in c['gt']], c['pred'], 0.3, number)
        assert detect.precision_area(o, weight) == pytest.approx(detect.average_precision(
            [row[:5] for row in truth], predictions, 0.3), abs=1e-12)


def test_average_precision_by_hand():
    truth = [['a', 0, 0, 10, 10], ['a', 50, 50, 10, 10], ['b', 0, 0, 10, 10]]
    right, far = ['a', 0, 0, 10, 10, .9], ['a', 200, 0, 10, 10, .8]
    assert detect.average_precision(truth, [right], 0.5) == pytest.approx(34 / 101)     # recall 0 … .33
    again = ['a', 0, 1, 10, 10, .85]                        # the lesion is taken: a false positive
    both = detect.average_precision(truth, [right, again, far, ['b', 0, 0, 10, 9, .7]], 0.5)
    assert both == pytest.approx((34 + 33 * 0.5) / 101)     # precision 1, then 2 of 4
    assert detect.average_precision(truth, [['b', 0, 0, 10, 9, .7]], 0.95) == 0
    o = detect.overlapping(truth, [far, right, ['b', 90, 0, 9, 9, .5]], 0.5, dict(a=0, b=1))
    assert detect.localised(o, np.ones(3)) == 0.5           # best of a fits, best of b does not


def test_lesions_caught_at_an_operating_point():
    volumes = [[i, math.inf] for i in range(2)]
    truth = [[0, 0, 0, 10, 10], [1, 0, 0, 10, 10]]
    predictions = [[0, 0, 0, 10, 10, .9], [0, 500, 500, 10, 10, .8], [0, 700, 500, 10, 10, .7], [1, 0, 0, 10, 10, .6]]
    m = metrics.matched(volumes, truth, predictions)
    assert metrics.caught(m, 0.5, m.each()).tolist() == [True, False]
    assert metrics.caught(m, 1, m.each()).tolist() == [True, True]
    assert metrics.caught(m, 1, np.zeros(3)).tolist() == [False, False]


# ---- data sets ----------------------------------------------------------------------------------------------------

def breast(side, turned=False, shape=(4, 60, 40), lesion=None):
    """A uint16 volume with the breast at its left or right edge."""
    volume = np.zeros(shape, np.uint16)
    y, x = np.mgrid[:shape[1], :shape[2]]
    inside = np.hypot((y - shape[1] / 2) / (shape[1] / 2), x / (0.7 * shape[2])) < 1
    volume[:, inside] = 400
    volume[:, y + x < 8] = 0
    if lesion:
        z, x0, y0, x1, y1 = lesion
        volume[z, y0:y1, x0:x1] = 900
    volume = volume if side == 'L' else volume[..., ::-1]
    return volume[:, ::-1, ::-1] if turned else volume


@pytest.fixture
def bcs(tmp_path):
    """Three official splits in miniature; one volume lies upside down."""
    root = tmp_path / 'bcs'
    for part, patient in (('train', 'DBT-P00001'), ('validation', 'DBT-P00002'), ('test', 'DBT-P00003')):
        study = patient.replace('P', 'S')
        labels = ['PatientID|StudyUID|View|Normal|Actionable|Benign|Cancer', f'{patient}|{study}|lcc|0|0|0|1',
                  f'{patient}|{study}|rmlo|1|0|0|0', f'{patient}|{study}|lmlo|0|1|0|0']
        write(root / f'BCS-DBT-labels-{part}-v2.csv', labels)
        write(root / f'BCS-DBT-boxes-{part}-v2.csv', [
            'PatientID|StudyUID|View|Subject|Slice|X|Y|Width|Height|Class|AD|VolumeSlices',
            f'{patient}|{study}|lcc|x|2|8|20|10|12|cancer|0|4'])
        lines = ['PatientID|StudyUID|View|descriptive_path|classic_path']
        for view in ('lcc', 'rmlo', 'lmlo'):
            place = f'Breast-Cancer-Screening-DBT/{patient}/{study}/{view}'
            lines.append(f'{patient}|{study}|{view}|elsewhere/1-1.dcm|{place}/')
            lesion = (2, 8, 20, 18, 32) if view == 'lcc' else None
            dicom(root / place / '1-1.dcm', breast(view[0].upper(), part == 'test' and view == 'lcc', lesion=lesion))
        write(root / f'BCS-DBT-file-paths-{part}.csv', lines)
    return root


def test_bcs_dbt_is_read_as_published(bcs):
    cfg = Config(dataset='bcs', root=str(bcs), size=56)
    volumes, notes = detect.load(cfg)
    assert [(v.key[2], v.split, v.laterality, v.normal) for v in volumes[:3]] == [
        ('lcc', 'train', 'L', False), ('rmlo', 'train', 'R', True), ('lmlo', 'train', 'L', False)]
    assert {v.split for v in volumes} == {'train', 'val', 'test'} and volumes[0].shape == (4, 60, 40)
    assert volumes[0].lesions == [(2, 8.0, 20.0, 18.0, 32.0, 'cancer')] and volumes[0].path.endswith('lcc/1-1.dcm')
    assert notes == ['volumes of the official set: train 3 of 19,148, validation 3 of 1,163, test 3 of 1,721']


def test_a_volume_stored_upside_down_is_turned_and_its_boxes_are_not(bcs):
    cfg = Config(dataset='bcs', root=str(bcs), size=56)
    volumes, _ = detect.load(cfg)
    frames = detect.Frames(cfg, volumes)
    for v in [i for i, volume in enumerate(volumes) if volume.key[2] == 'lcc']:
        image = frames.plain(v, 2)['image'].astype(float)
        box = detect.on_frame(volumes[v], [2], (60, 40), 56)[0].round().astype(int)
        inside = image[box[1]:box[3], box[0]:box[2]].mean()
        assert inside > 200 and inside > 1.3 * image[image > 20].mean(), volumes[v].split
    assert frames.turned[6] and not frames.turned[0]
    stored = images.read(volumes[6].path, 2)
    assert (detect.upright(stored, 'L') == stored[::-1, ::-1]).all() and (detect.upright(stored, 'R') == stored).all()


def test_the_latest_edition_of_a_csv_counts(bcs):
    (bcs / 'BCS-DBT-boxes-train.csv').write_text((bcs / 'BCS-DBT-boxes-train-v2.csv').read_text().replace('|8|', '|9|'))
    (bcs / 'BCS-DBT-labels-test-v2-PHASE-2-Jan-2024.csv').write_text(
        (bcs / 'BCS-DBT-labels-test-v2.csv').read_text().replace('lmlo,0,1', 'lmlo,1,0'))
    volumes = detect.bcs(Config(root=str(bcs)))[0]
    assert volumes[0].lesions[0][1] == 8
    assert [v.normal for v in volumes] == [False, True, False] * 2 + [False, True, True]


def test_the_counts_of_a_full_bcs_dbt_are_asserted(bcs, monkeypatch):
    monkeypatch.setattr(detect, 'BCS_VOLUMES', dict(train=3, validation=3, test=3))
    with pytest.raises(ValueError, match='the full train set, but Normal 1, not 18232'):
        detect.bcs(Config(root=str(bcs)))
    monkeypatch.setattr(detect, 'BCS_COUNTS', dict(Normal=(1,) * 3, Actionable=(1,) * 3, Benign=(0,) * 3,
                                                   Cancer=(1,) * 3, boxes=(1,) * 3, volumes_with_boxes=(1,) * 3))
    assert len(detect.bcs(Config(root=str(bcs)))[0]) == 9


def test_the_official_counts_add_up():
    for i, total in enumerate(detect.BCS_VOLUMES.values()):
        assert sum(detect.BCS_COUNTS[name][i] for name in ('Normal', 'Actionable', 'Benign', 'Cancer')) == total
    assert sum(detect.BCS_VOLUMES.values()) == 22032


def test_a_test_volume_of_another_depth_counts_as_missed(bcs, group, monkeypatch):
    boxes = bcs / 'BCS-DBT-boxes-test-v2.csv'
    boxes.write_text(boxes.read_text().replace(',2,8,20', ',30,8,20').replace(',0,4', ',0,60'))
    volumes, notes = detect.load(Config(dataset='bcs', root=str(bcs), size=84, max_bad=0.5))
    assert 'has 4 slices, the label file says 60; their lesions count as missed' in notes[-1]
    test, asked = [v for v in volumes if v.split == 'test'], []
    monkeypatch.setattr(detect, 'detected', lambda cfg, detector, volumes, items, device: asked.extend(items) or ())
    detect.predicted(Config(size=84), None, test, torch.device('cpu'))
    assert len(test) == 3 and {test[v].key[2] for v, _ in asked} == {'rmlo', 'lmlo'}
    detect.write_truth(bcs, test)
    _, truth, _ = detect.read_truth(bcs / 'labels.csv', bcs / 'boxes.csv')
    assert [row[-1] for row in truth] == [30]


def test_bcs_files_that_do_not_fit_together_are_named(bcs):
    boxes = bcs / 'BCS-DBT-boxes-test-v2.csv'
    boxes.write_text(boxes.read_text().replace('lcc', 'lcc2'))
    with pytest.raises(ValueError, match='a box in DBT-P00003/DBT-S00003/lcc2, which BCS-DBT-labels-test-v2.csv'):
        detect.bcs(Config(root=str(bcs)))
    boxes.unlink()
    with pytest.raises(ValueError, match='belong together; not all are there'):
        detect.bcs(Config(root=str(bcs)))
    twice = bcs / 'BCS-DBT-labels-test-v2.csv'
    for part in ('boxes', 'labels'):
        path = bcs / f'BCS-DBT-{part}-test-v2.csv'
        path.write_text((bcs / f'BCS-DBT-{part}-train-v2.csv').read_text())
    paths = bcs / 'BCS-DBT-file-paths-test.csv'
    paths.write_text((bcs / 'BCS-DBT-file-paths-train.csv').read_text())
    with pytest.raises(ValueError, match=f'{twice.name}: DBT-P00001/DBT-S00001/lcc is listed twice'):
        detect.bcs(Config(root=str(bcs)))
    with pytest.raises(ValueError, match='no BCS-DBT-labels'):
        detect.bcs(Config(root=str(bcs.parent)))


def test_vindr_boxes_are_read_as_published(tmp_path):
    write(tmp_path / 'finding_annotations.csv', [
        'study_id|series_id|image_id|laterality|view_position|height|width|breast_birads|breast_density|'
        'finding_categories|finding_birads|xmin|ymin|xmax|ymax|split',
        "s1|e|i1|L|CC|50|40|BI-RADS 4|DENSITY C|['Mass', 'Skin Retraction']|BI-RADS 4|4.5|5|20.25|18|training",
        "s1|e|i1|L|CC|50|40|BI-RADS 4|DENSITY C|['Suspicious Calcification']|BI-RADS 3|1|2|9|9|training",
        "s2|e|i2|R|MLO|50|40|BI-RADS 1|DENSITY C|['No Finding']||||||test"])
    volumes, _ = detect.vindr(Config(root=str(tmp_path)))
    assert [(v.key, v.split) for v in volumes] == [(('s1', 'i1', 'LCC'), 'train'), (('s2', 'i2', 'RMLO'), 'test')]
    assert volumes[0].lesions == [(0, 4.5, 5.0, 20.25, 18.0, 'Mass'),
                                  (0, 1.0, 2.0, 9.0, 9.0, 'Suspicious Calcification')]
    assert volumes[1].lesions == [] and volumes[0].path == f'{tmp_path}/images/s1/i1.dicom'


CBIS = ('patient_id|left or right breast|image view|abnormality id|pathology|image file path|cropped image file path|'
        'ROI mask file path')


def test_a_vindr_box_counts_under_any_of_its_categories(tmp_path):
    write(tmp_path / 'finding_annotations.csv', [
        'study_id|image_id|laterality|view_position|finding_categories|xmin|ymin|xmax|ymax|split',
        "s1|i1|L|CC|['Skin Thickening', 'Mass']|4|5|20|18|training"])
    volumes, _ = detect.vindr(Config(root=str(tmp_path), findings=('Mass',)))
    assert volumes[0].lesions[0][-1] == 'Mass'


def cbis_case(root, name, film, roi, swapped, scale=1, kind='MALIGNANT', split='train', patient='P_00001'):
    """A film, and its mask and crop in the folder of the abnormality, under the wrong columns if swapped."""
    dicom(root / 'CBIS-DDSM' / name / 'd' / 'f' / '1-1.dcm', film)
    drawn = np.zeros(np.array(film.shape) // scale, np.uint16)
    x0, y0, x1, y1 = (edge // scale for edge in roi)
    drawn[y0:y1, x0:x1] = 65535
    dicom(root / 'CBIS-DDSM' / f'{name}_1' / 'd' / 'm' / '1-1.dcm', drawn)
    dicom(root / 'CBIS-DDSM' / f'{name}_1' / 'd' / 'c' / '1-2.dcm', film[:6, :6])
    columns = [f'{name}_1/x/y/000000.dcm', f'{name}_1/x/z/000001.dcm\n'][::-1 if swapped else 1]
    return f'{patient}|LEFT|CC|1|{kind}|{name}/x/y/000000.dcm|' + '|'.join(columns)


def test_cbis_boxes_are_those_of_the_masks_also_where_the_columns_are_swapped(tmp_path):
    film = np.random.default_rng(0).integers(0, 4000, (60, 48)).astype(np.uint16)
    write(tmp_path / 'mass_case_description_train_set.csv', [
        CBIS, cbis_case(tmp_path, 'Mass-Training_P_00001_LEFT_CC', film, (10, 12, 30, 40), False),
        cbis_case(tmp_path, 'Mass-Training_P_00002_LEFT_CC', film, (4, 8, 20, 24), True, scale=2, kind='BENIGN',
                  patient='P_00002'),
        cbis_case(tmp_path, 'Mass-Training_P_00003_LEFT_CC', film, (4, 8, 20, 24), True, patient='P_00003')])
    write(tmp_path / 'mass_case_description_test_set.csv', [
        CBIS, cbis_case(tmp_path, 'Mass-Test_P_00003_LEFT_CC', film, (4, 8, 20, 24), True, patient='P_00003'),
        cbis_case(tmp_path, 'Mass-Test_P_00004_LEFT_CC', film, (4, 8, 20, 24), True, patient='P_00004')])
    dicom(tmp_path / 'CBIS-DDSM' / 'Mass-Test_P_00004_LEFT_CC_1' / 'd' / 'm' / '1-1.dcm',        # another aspect
          np.kron([[0, 1], [0, 0]], np.full((40, 20), 65535)))
    dicom(tmp_path / 'CBIS-DDSM' / 'Mass-Training_P_00001_LEFT_CC_1' / 'd' / 'c' / '1-3.dcm', film * 0 + 7)     # blank
    with pytest.raises(ValueError, match='1 of 5 films have no box, --max_bad is 0.05; the first: Mass-Test_P_00004'):
        detect.cbis(Config(root=str(tmp_path)))
    volumes, notes = detect.cbis(Config(root=str(tmp_path), max_bad=0.5))
    boxes = {v.key[0]: v.lesions for v in volumes}
    assert boxes == dict(P_00001=[(0, 10, 12, 30, 40, 'cancer')], P_00002=[(0, 4, 8, 20, 24, 'benign')],
                         P_00003=[(0, 4, 8, 20, 24, 'cancer')])
    assert any('P_00004' in note and 'another aspect' in note for note in notes)
    assert any('1 patients are in training and test' in note and 'P_00003' in note for note in notes)


def test_mias_circles_become_boxes_from_the_top(tmp_path):
    (tmp_path / 'Info.txt').write_text('mdb001 G CIRC B 535 425 197\nmdb002 G CIRC M 522 280 69\nmdb003 D NORM \n'
                                       'mdb059 F CIRC B\n')
    for i in (1, 2, 3, 59):
        Image.fromarray(np.zeros((1024, 1024), np.uint8)).save(tmp_path / f'mdb{i:03d}.png')
    volumes, notes = detect.mias(Config(root=str(tmp_path)))
    assert volumes[0].lesions == [(0, 338, 402, 732, 796, 'benign')] and volumes[1].lesions[0][-1] == 'cancer'
    assert [v.patient for v in volumes] == ['001', '001', '002'] and 'mdb059' in notes[0]


HEADER = 'path|frame|x0|y0|x1|y1|label|volume|patient|split'


def small_list(folder, *lines):
    np.save(folder / 'a.npy', np.zeros((4, 20, 30), np.uint8))
    np.save(folder / 'b.npy', np.zeros((20, 30), np.uint8))
    write(folder / 'lesions.csv', [HEADER, *lines])
    return Config(root=str(folder), size=56)


@pytest.mark.parametrize('line, words', [
    ('a.npy|0|25|5|35|40|m|a|p|test', None),                # sticks out: counted, not refused
    ('a.npy|0|40|5|50|10|m|a|p|test', 'frame 0 lies outside the image, 30x20'),
    ('a.npy|0|10|5|10|9|m|a|p|test', 'has no area, or no frame; expected x0 < x1'),
    ('a.npy|0|10|9|5|5|m|a|p|test', 'has no area, or no frame; expected x0 < x1'),
    ('a.npy|4|5|5|10|9|m|a|p|test', 'frame 4: the file has frames 0 to 3'),
    ('a.npy|1.5|5|5|10|9|m|a|p|test', 'frame is 1.5 in '),
    ('a.npy|0|5|5|ten|9|m|a|p|test', "x1 is 'ten'"),
    ('a.npy|0|5|5||9|m|a|p|test', "x1 is ''"),
    ('a.npy|0|5|5|nan|9|m|a|p|test', "x1 is 'nan'"),
    ('b.npy|0|5|5|10|9|m|a|p|test', None),
    ('b.npy|0|5|5|10|9|m|a|other|train', None)])
def test_boxes_that_cannot_be_are_refused_in_one_sentence(tmp_path, line, words):
    rest = [f'c{i}.npy|0|1|1|9|9|m||q{i}|{split}' for i, split in enumerate(('train', 'val', 'test'))]
    for i in range(3):
        np.save(tmp_path / f'c{i}.npy', np.zeros((20, 30), np.uint8))
    cfg = small_list(tmp_path, line, *rest)
    if words is None:
        volumes, notes = detect.load(cfg)
        assert len(volumes) == 4 and ('1 boxes stick out' in ' '.join(notes)) == (' 35' in line.replace('|', ' '))
    else:
        with pytest.raises(ValueError) as problem:
            detect.load(cfg)
        assert words in str(problem.value) and '\n' not in str(problem.value)


def test_lists_that_contradict_themselves_are_refused(tmp_path):
    for lines, words in (
            (['a.npy|0|1|1|5|5|m|v|p|train', 'b.npy|0|1|1|5|5|m|v|p|train'], 'volume v has rows with different paths'),
            (['a.npy|0|1|1|5|5|m||p|train', 'b.npy|0|1|1|5|5|m||p|test'], '1 patients are in two splits, the first: p'),
            (['a.npy|0|1|1|5|5|m||p|dev'], "splits 'dev'; expected train, val and test"),
            (['a.npy||||||||p|train', 'b.npy||||||||q|test'], 'the train split holds no lesion'),
            (['a.npy|0|1|1|5|5|m||p|train', 'gone.npy|0|1|1|5|5|m||q|test'], '1 of 1 test files cannot be used')):
        with pytest.raises(ValueError, match=words):
            detect.load(small_list(tmp_path, *lines))
    write(tmp_path / 'lesions.csv', ['path|x0|y0|x1', 'a.npy|1|1|5'])
    with pytest.raises(ValueError, match='no column y1; found path, x0, y0, x1'):
        detect.load(Config(root=str(tmp_path)))


@pytest.mark.parametrize('text, words', [
    ('path,patient,study,x0,y0,x1,y1,split\na.npy,p,s,1,1,5,5,\nb.npy,p,s,1,1,5,5,\n', 'the name p/s/ belongs to two'),
    ('path,x0,y0,x1,y1,volume,patient\na.npy,1,1,5,5,v,p\n./a.npy,1,1,5,5,w,q\n', 'a.npy belongs to two images'),
    ('path,x0,y0,x1,y1,label\na.npy,1,1,5,5,"cancer\nb.npy,1,1,5,5,cancer\n', 'not a readable CSV'),
    ('path,x0,y0,x1,y1,label\na.npy,1,1,5,5,"can\ncer"\n', 'or a line break in one'),
    ('path,x0,y0,x1,y1\na.npy,1,1,5,5,0\n', 'a row has 6 cells for 5 columns'),
    ('path,x0,y0,x1,x1,y1\na.npy,1,1,5,5,5\n', 'a column stands twice'),
    ('path,x0,y0,x1,y1,laterality\na.npy,1,1,5,5,LEFT\n', "laterality 'LEFT' and normal ''"),
    ('path,x0,y0,x1,y1,normal\na.npy,1,1,5,5,no\n', "laterality '' and normal 'no'"),
    (',x0,y0,x1,y1,path\n,1,1,5,5,\n', 'a row without a path')])
def test_lists_in_which_rows_would_vanish_are_refused(tmp_path, text, words):
    small_list(tmp_path)
    (tmp_path / 'lesions.csv').write_text(text)
    with pytest.raises(ValueError) as problem:
        detect.load(Config(root=str(tmp_path)))
    assert words in str(problem.value) and '\n' not in str(problem.value)


def test_columns_that_play_no_part_are_told(tmp_path):
    for i in range(3):
        np.save(tmp_path / f'{i}.npy', np.zeros((20, 30), np.uint8))
    write(tmp_path / 'lesions.csv', ['path|x0|y0|x1|y1|split|patient_id', '0.npy|1|1|5|5|train|p',
                                     '1.npy|1|1|5|5|val|p', '2.npy|1|1|5|5|test|p'])
    assert detect.load(Config(root=str(tmp_path)))[1] == ['columns that play no part: patient_id']


def test_a_label_that_no_box_has_is_refused(tmp_path):
    with pytest.raises(ValueError, match='--findings Mas: no such label; found Mass'):
        detect.load(replace(small_list(tmp_path, 'a.npy|0|1|1|5|5|Mass||p|train'), findings=('Mas',)))


def test_labels_that_do_not_count_leave_their_images_out_of_the_normals(tmp_path):
    rest = []
    for i, split in enumerate(('train', 'val', 'test')):
        np.save(tmp_path / f'c{i}.npy', np.zeros((20, 30), np.uint8))
        rest.append(f'c{i}.npy|0|1|1|9|9|Mass||q{i}|{split}')
    cfg = small_list(tmp_path, 'a.npy|0|1|1|5|5|Nipple||p|train', 'b.npy||||||||r|train', *rest)
    volumes, notes = detect.load(replace(cfg, findings=('Mass',)))
    assert [(len(v.lesions), v.normal) for v in volumes[:3]] == [(0, False), (0, True), (1, True)]
    assert 'lesions other than Mass do not count' in notes[0] and notes[0].endswith('1')


def test_splits_keep_patients_together_and_share_out_the_lesions():
    lesion = [(0, 0, 0, 1, 1, '')]
    volumes = [Volume((f'p{i // 2}', f's{i}', ''), f'{i}', lesions=lesion * (i % 4 == 0)) for i in range(80)]
    volumes = detect.assign(Config(), volumes)
    parts = {split: {v.patient for v in volumes if v.split == split} for split in ('train', 'val', 'test')}
    assert sum(map(len, parts.values())) == 40 and not parts['train'] & parts['test'] | parts['val'] & parts['test']
    assert [sum(len(v.lesions) for v in volumes if v.split == s) for s in ('train', 'val', 'test')] == [13, 3, 4]


# ---- samples ------------------------------------------------------------------------------------------------------

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
        rng = np.random.default_rng(seed)
        out, boxes = detect.augment(rng, np.full((259, 259), 200, np.uint8), np.array([[100., 80, 160, 140]]))
        x0, y0, x1, y1 = boxes[0]
        inside = out[math.ceil(y0) + 1:int(y1) - 1, math.ceil(x0) + 1:int(x1) - 1]
        assert (inside > 60).all()
        holes += (out[out.shape[0] // 2:] == 0).sum() > 100 or (out[:out.shape[0] // 2] == 0).sum() > 100
    assert 15 < holes < 90


def test_zoom_keeps_to_the_box_sizes_of_the_paper():
    rng = np.random.default_rng(0)
    large = np.array([[100., 100, 300, 250]])               # 200 wide: at most 206 after the zoom
    factors = []
    for _ in range(100):
        window = detect.zoom_window(rng, 518, large, 1.0)
        if window:
            x, y, side = window
            factors.append(518 / side)
            assert x <= 100 and y <= 100 and x + side >= 300 and y + side >= 250
    assert factors and max(factors) <= 1.03 and min(factors) >= 0.8
    assert detect.zoom_window(rng, 518, np.array([[0., 0, 400, 400]]), 1.0) is None
    assert detect.zoom_window(rng, 518, np.zeros((0, 4)), 1.0) is not None


def test_a_lesion_marked_on_a_slice_nearby_is_no_background(tmp_path):
    np.save(tmp_path / 'a.npy', np.random.default_rng(0).integers(0, 255, (40, 84, 84)).astype(np.uint8))
    volume = Volume(('p', 's', ''), str(tmp_path / 'a.npy'), shape=(40, 84, 84), lesions=[
        (10, 5, 5, 25, 25, 'm'), (12, 50, 50, 70, 70, 'm'), (30, 50, 10, 70, 30, 'm')])
    sample = detect.Frames(Config(size=84, augment=False), [volume])[0, 10, 0, 0]
    anchors = retinanet.anchors(84)
    near, far = (retinanet.match(torch.tensor([box]), anchors) >= 0 for box in ([50., 50, 70, 70], [50., 10, 70, 30]))
    assert len(sample['boxes']) == 1 and (sample['match'][near] == -2).all() and (sample['match'][far] == -1).all()


def test_a_slice_s_score_takes_boxes_within_20_pixels_of_518(group, monkeypatch):
    volume = Volume(('p', 's', ''), '', shape=(4, 84, 84), lesions=[(1, 10, 10, 14, 14, 'm')])
    cfg, found = Config(size=84, normals=0), []
    monkeypatch.setattr(detect, 'detected', lambda *given: iter(found))
    shift = 20 * 84 / 518                                   # of a lesion whose half diagonal is less
    for off, expected in ((0.9 * shift, 1.0), (1.1 * shift, 0.0)):
        found[:] = [(0, 1, np.array([[10, 10 + off, 14, 14 + off], [60, 60, 70, 70]]), np.array([.6, .8]), (84, 84))]
        score, threshold = detect.validated(cfg, None, [volume], torch.device('cpu'))
        assert score == expected
    assert threshold == 0.8                                 # the next lower, .6, would be a second false positive


def test_normal_slices_keep_away_from_lesions():
    volume = Volume(('p', 's', ''), 'x', lesions=[(10, 0, 0, 1, 1, '')], shape=(40, 5, 5))
    assert detect.far_from_lesions(volume, 40) == list(range(21, 40))
    assert detect.normals([volume, Volume(('q', '', ''), 'y'), Volume(('r', '', ''), 'z', normal=False),
                           Volume(('t', '', ''), 'w', lesions=[(0, 0, 0, 1, 1, '')], shape=(1, 5, 5))]) == [0, 1]


def test_an_epoch_holds_every_lesion_and_as_many_normals_whatever_the_ranks():
    lesion = [(3, 0, 0, 1, 1, '')]
    volumes = [Volume((f'p{i}', '', ''), 'x', lesions=lesion * (i < 6), shape=(40, 5, 5)) for i in range(30)]
    cfg = Config(epochs=3, batch=8, micro_batch=3, normals=1.0)
    steps, one = detect.plan(cfg, volumes, 0, 0, 1)
    one = list(one)
    assert steps == 2 and [len(micro) for micro in one[:3]] == [3, 3, 2]
    first = [item for micro in one[:6] for item in micro][:12]
    assert sorted(v for v, z, *_ in first if z == 3) == list(range(6))
    assert sum(z is None for _, z, *_ in first) == 6
    two = [item for rank in (0, 1) for micro in detect.plan(cfg, volumes, 0, rank, 2)[1] for item in micro]
    assert sorted(two, key=str) == sorted((item for micro in one for item in micro), key=str)
    later = list(detect.plan(cfg, volumes, 2, 0, 1)[1])
    assert later == one[-len(later):]


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
    lines = [HEADER]
    for i in range(36):
        rng = np.random.default_rng(i)
        volume = rng.integers(40, 90, (4, 80, 60)).astype(np.uint8)
        split = 'train' if i < 20 else 'val' if i < 26 else 'test'
        if i % 3:
            x, y, side = *rng.integers(4, 40, 2), int(rng.integers(10, 16))
            volume[1:3, y:y + side, x:x + side] = 240
            label = 'cancer' if i % 2 else 'benign'
            lines.append(f'{i}.npy|{1 + i % 2}|{x}|{y}|{x + side}|{y + side}|{label}||p{i}|{split}')
        else:
            lines.append(f'{i}.npy||||||||p{i}|{split}')
        np.save(root / f'{i}.npy', volume)
    write(root / 'lesions.csv', lines)
    return root


FAST = ('--size', 84, '--channels', 32, '--batch', 8, '--micro_batch', 4, '--workers', 0, '--min_distance', 10,
        '--draws', 100, '--lr', 3e-3, '--dropout', 0.05)


@pytest.fixture(scope='module')
def trained(lesions, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp('trained') / 'run'
    cli('--root', lesions, '--encoder', encoder, '--out', out, *FAST, '--epochs', 6)
    return out


def scores(run):
    return json.loads((run / 'scores.json').read_text())


def test_training_finds_lesions_that_an_untrained_detector_does_not(trained, lesions, encoder, tmp_path, capsys):
    cli('--root', lesions, '--encoder', encoder, '--out', tmp_path / 'untrained', *FAST, '--epochs', 0)
    name, = scores(tmp_path / 'untrained')['challenge']
    before = scores(tmp_path / 'untrained')['challenge'][name]['mean_sensitivity_positive']
    after, = (v['mean_sensitivity_positive'] for v in scores(trained)['challenge'].values())
    assert name == 'untrained on pretrained encoder' and after > before + 0.3
    cli('score', tmp_path / 'untrained', trained, '--out', tmp_path / 'both', '--draws', 50)
    text = capsys.readouterr().out
    for words in ('McNemar p = ', 'FAUC-1+', 'benign', 'mean of 1-4', 'AP, ', 'top-1, ', 'sensitivity, all volumes'):
        assert words in text
    both = scores(tmp_path / 'both')
    assert both['min_distance'] == 10 and len(both['against']) == 1 and (tmp_path / 'both/froc.png').exists()
    found = both['with_lesions'][str(trained)]['mean of 1-4']
    assert found[0] == pytest.approx(after) and found[1] <= found[0] <= found[2]


def test_a_run_leaves_a_submission_that_scores_as_itself(trained):
    volumes, truth, classes = detect.read_truth(trained / 'labels.csv', trained / 'boxes.csv')
    rows = detect.read_predictions(trained)
    assert len(volumes) == 10 and sorted(set(classes)) == ['benign', 'cancer']
    assert all(slices == 4 for key, slices in volumes if key in {row[0] for row in truth})
    expected, = scores(trained)['challenge'].values()
    assert metrics.froc(volumes, truth, rows, 10) == pytest.approx(expected)
    x0, y0, x1, y1 = np.array([(x, y, x + w, y + h) for _, x, y, w, h, *_ in rows]).T
    # pixels of the file, 60x80
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() < 60.001 and 62 < y1.max() < 80.001
    best = max((row for row in rows if row[0] == truth[0][0]), key=lambda row: row[-1])
    with open(trained / 'predictions.csv') as file:
        assert file.readline().strip() == 'PatientID,StudyUID,View,X,Width,Y,Height,Z,Depth,Score'
    assert 0 <= best[5] and best[5] + best[6] <= 4


def test_the_list_that_a_run_writes_is_the_data_set_again(trained, lesions):
    volumes, _ = detect.load(Config(root=str(lesions)))
    again, _ = detect.load(Config(root=str(trained / 'lesions.csv')))
    strip = [(v.patient, v.split, v.lesions, v.normal, v.laterality) for v in volumes]
    assert [(v.patient, v.split, v.lesions, v.normal, v.laterality) for v in again] == strip


def weights(run, name='detector'):
    state = torch.load(run / 'last.pt', weights_only=True)
    return state['best']['weights'] if name == 'best' else state[name]


def test_a_stopped_run_goes_on_as_if_it_had_not(trained, lesions, encoder, tmp_path, monkeypatch):
    arguments = ('--root', lesions, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 6)
    whole, calls = detect.validated, []

    def stops(*given):
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(detect, 'validated', stops)
    with pytest.raises(KeyboardInterrupt):
        cli(*arguments)
    monkeypatch.setattr(detect, 'validated', whole)
    assert torch.load(tmp_path / 'run/last.pt', weights_only=True)['epoch'] == 3
    with pytest.raises(ValueError, match='holds a run; add --resume'):
        cli(*arguments)
    before = (tmp_path / 'run/lesions.csv').read_text()
    with pytest.raises(ValueError, match='is the run of another recipe: seed 0 -> 1, lr 0.003 -> 0.001'):
        cli(*arguments, '--resume', '--lr', 1e-3, '--seed', 1)
    assert (tmp_path / 'run/lesions.csv').read_text() == before
    cli(*arguments, '--resume')
    for name in ('detector', 'best'):
        one, two = weights(trained, name), weights(tmp_path / 'run', name)
        assert all(torch.equal(one[k], two[k]) for k in one)
    lines = [[{k: v for k, v in line.items() if k != 'images_per_s'} for line in log(run)]
             for run in (trained, tmp_path / 'run')]
    assert lines[0] == lines[1] and len(lines[0]) == 6
    assert (tmp_path / 'run/predictions.csv').read_text() == (trained / 'predictions.csv').read_text()


def test_nothing_is_overwritten(trained, lesions, encoder, tmp_path):
    """Neither the list that is read, nor a run by a score, nor anything by a demo."""
    for path in lesions.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for resume in ((), ('--resume',)):
        with pytest.raises(ValueError, match='holds files that would be lost; choose another'):
            cli('--root', tmp_path, '--encoder', encoder, '--out', tmp_path, *FAST, '--epochs', 1, *resume)
    with pytest.raises(ValueError, match='is not empty; choose another'):
        cli('--encoder', encoder, '--out', trained, *FAST, '--epochs', 1)
    with pytest.raises(ValueError, match='holds a run, whose scores.json would be lost'):
        cli('score', trained, '--out', trained)
    with pytest.raises(ValueError, match='--dataset bcs needs --root DIR'):
        cli('--dataset', 'bcs', '--out', tmp_path / 'new')
    with pytest.raises(ValueError, match='--root is empty'):
        cli('--root', '', '--out', tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_a_resumed_run_asks_for_its_encoder(trained, lesions, tmp_path):
    save_encoder(tmp_path / 'other.pt', vit.ViT(size=84, width=64, depth=1, heads=2))
    with pytest.raises(ValueError, match='an encoder of another shape; give the --encoder of that run again'):
        cli('--root', lesions, '--encoder', tmp_path / 'other.pt', '--out', trained, *FAST, '--epochs', 6, '--resume')


def test_two_ranks_give_the_detector_of_one(trained, lesions, encoder, tmp_path):
    arguments = ('--root', lesions, '--encoder', encoder, *FAST, '--epochs', 2, '--dropout', 0)
    cli(*arguments, '--out', tmp_path / 'one')
    rc, text = torchrun(2, *arguments, '--out', tmp_path / 'two', '--micro_batch', 2)
    assert rc == 0, text
    one, two = weights(tmp_path / 'one'), weights(tmp_path / 'two')
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 2e-3
    for a, b in zip(*(log(tmp_path / name) for name in ('one', 'two'))):                # before clipping
        assert a['grad_norm'] == pytest.approx(b['grad_norm'], rel=1e-3)
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)
    a, b = (detect.read_predictions(tmp_path / name)[:5] for name in ('one', 'two'))
    assert np.allclose([row[1:] for row in a], [row[1:] for row in b], rtol=0.02, atol=0.5)


def log(run):
    return [json.loads(line) for line in (run / 'log.jsonl').read_text().splitlines()[1:]]


def test_the_loss_is_the_sums_over_the_positives_of_the_batch(lesions, encoder, tmp_path, group):
    cfg = Config(root=str(lesions), encoder=str(encoder), size=84, channels=32, batch=13, micro_batch=5, epochs=1,
                 normals=0, augment=False, dropout=0, ratio=3, workers=0)
    volumes, _ = detect.load(cfg)
    tmp_path.joinpath('run').mkdir()
    detect.train(cfg, volumes, torch.device('cpu'), tmp_path / 'run')
    train = [v for v in volumes if v.split == 'train' and v.lesions]
    assert len(train) == 13                                 # one step of one batch
    samples = detect.collate(84, [detect.Frames(cfg, train)[i, v.lesions[0][0], 0, i] for i, v in enumerate(train)])
    detector = detect.build(cfg).train()
    focal, box = retinanet.losses(cfg, *detector(detect.pixels(samples['images'], torch.device('cpu'))), samples,
                               retinanet.anchors(84))
    positives = (samples['match'] >= 0).sum()
    line, = log(tmp_path / 'run')
    assert line['focal'] == pytest.approx((focal / positives).item(), rel=1e-4)
    assert line['box'] == pytest.approx((box / positives).item(), rel=1e-4)
    assert line['loss'] == pytest.approx(3 * line['focal'] + line['box'], rel=1e-5)


def test_finetuning_moves_the_encoder_and_keeps_it_in_the_checkpoint(lesions, encoder, tmp_path):
    cli('--root', lesions, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 1, '--no-freeze')
    before, after = vit.load(encoder).state_dict(), vit.load(tmp_path / 'run/last.pt').state_dict()
    assert (before['blocks.0.attn.qkv.weight'] - after['blocks.0.attn.qkv.weight']).abs().max() > 1e-5
    _, detector, _ = detect.restored(tmp_path / 'run')
    assert torch.equal(detector.encoder.norm.weight, after['norm.weight'])


def test_the_patience_ends_a_run_that_does_not_improve(lesions, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(detect, 'validated', lambda *_: (0.25, 0.5))
    cli('--root', lesions, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 9, '--patience', 2)
    lines = log(tmp_path / 'run')
    assert [line['epoch'] for line in lines] == [0, 1, 2] and lines[-1]['best_epoch'] == 0


def test_the_search_draws_from_the_paper_s_ranges_and_keeps_the_best(lesions, encoder, tmp_path):
    for trial in range(300):
        cfg = detect.drawn(Config(), trial)
        assert 1e-5 <= cfg.lr <= 1e-2 and 1e-6 <= cfg.wd <= 1e-3
        assert 0 <= cfg.smoothing <= 0.1 and 0.1 <= cfg.ratio <= 10
        assert 0.25 <= cfg.alpha <= 0.95 and 0.5 <= cfg.gamma <= 2 and 0.4 <= cfg.high <= 0.6 and 0.2 <= cfg.low <= 0.5
        assert 0.03 <= cfg.nms <= 0.3 and cfg.dropout in (0.0, 0.05, 0.1, 0.15) and cfg.low <= cfg.high
    cli('--root', lesions, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 1, '--search', 2)
    with open(tmp_path / 'run/trials.csv') as file:
        trials = list(csv.DictReader(file))
    best = max(range(2), key=lambda i: float(trials[i]['validation']))
    kept = torch.load(tmp_path / 'run/last.pt', weights_only=True)
    assert kept['config']['lr'] == float(trials[best]['lr'])
    assert kept['best']['score'] == float(trials[best]['validation'])


def test_a_trial_that_diverges_does_not_end_the_search(lesions, encoder, tmp_path, monkeypatch):
    real = detect.train

    def sometimes(cfg, volumes, device, out):
        if out.name == 'trial_000':
            raise FloatingPointError('the gradient is not finite')
        return real(cfg, volumes, device, out)

    monkeypatch.setattr(detect, 'train', sometimes)
    cli('--root', lesions, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 1, '--search', 2)
    with open(tmp_path / 'run/trials.csv') as file:
        assert [float(trial['validation']) for trial in csv.DictReader(file)][0] == -1


def test_predict_writes_findings_in_pixels_of_the_file(trained, lesions, tmp_path, capsys):
    truth = detect.load(Config(root=str(lesions)))[0][28]
    (z, x0, y0, x1, y1, _), = truth.lesions
    cli('predict', truth.path, '--checkpoint', trained, '--out', tmp_path / 'found', '--threshold', 0)
    found = json.loads((tmp_path / 'found/findings.json').read_text())
    best = found['findings'][0]
    assert abs(best['x0'] - x0) < 6 and abs(best['y1'] - y1) < 6
    assert best['first_frame'] <= best['frame'] <= best['last_frame']
    assert len(list((tmp_path / 'found').glob('finding_*.png'))) == len(found['findings']) <= 50
    cli('predict', truth.path, '--checkpoint', trained, '--out', tmp_path / 'found', '--threshold', 1)
    assert json.loads((tmp_path / 'found/findings.json').read_text())['findings'] == []
    assert not list((tmp_path / 'found').glob('finding_*.png'))
    assert '0 findings of score 1.000 or more' in capsys.readouterr().out


def test_findings_of_a_file_stored_upside_down_are_in_its_own_pixels(trained, lesions, tmp_path, monkeypatch):
    volume = np.load(lesions / '28.npy').copy()             # 80 rows, 60 columns
    volume[..., 0] = 255                                    # the chest wall is on the left: a left breast
    np.save(tmp_path / 'v.npy', volume)
    monkeypatch.setattr(detect, 'predicted', lambda *given: ([(0, 5, 10, 20, 30, 1, 2, 0.9, 2)], []))
    for side, corners in dict(L=(5, 10, 25, 40), R=(35, 40, 55, 70)).items():
        cli('predict', tmp_path / 'v.npy', '--checkpoint', trained, '--out', tmp_path / side, '--laterality', side)
        found, = json.loads((tmp_path / side / 'findings.json').read_text())['findings']
        assert tuple(found[edge] for edge in ('x0', 'y0', 'x1', 'y1')) == corners
        assert (found['frame'], found['first_frame'], found['last_frame']) == (2, 1, 2)


def test_predict_says_what_is_wrong(trained, encoder, lesions, tmp_path):
    for arguments, words in (
            ((tmp_path / 'none.dcm', '--checkpoint', trained), 'none.dcm: no such file'),
            ((lesions / '0.npy', '--checkpoint', tmp_path), 'takes a folder that detect.py wrote'),
            ((lesions / '0.npy', '--checkpoint', encoder), 'holds no detector'),
            ((lesions / '0.npy', '--checkpoint', trained, '--threshold', 2), 'must lie in 0')):
        with pytest.raises(ValueError, match=words):
            cli('predict', *arguments)


def test_an_unusable_test_volume_counts_as_missed(trained, lesions, encoder, tmp_path):
    """One of the seven test lesions loses its file, one its pixels; the denominator stays seven."""
    for path in lesions.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / '28.npy').unlink()
    (tmp_path / '29.npy').write_bytes(b'no array')
    (tmp_path / '24.npy').write_bytes(b'a normal of the validation set')
    with pytest.raises(ValueError, match='2 of 10 test files cannot be used, with 2 lesions; the first: .*28.npy'):
        cli('--root', tmp_path, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 1)
    cli('--root', tmp_path, '--encoder', encoder, '--out', tmp_path / 'run', *FAST, '--epochs', 1, '--max_bad', 0.5)
    found = scores(tmp_path / 'run')
    assert sum(found['lesions'].values()) == sum(scores(trained)['lesions'].values()) == 7
    assert any('28.npy' in note and 'count as missed' in note for note in found['notes'])
    rows = detect.read_predictions(tmp_path / 'run')
    assert not {'28.npy', '29.npy'} & {row[0][1] for row in rows}


def test_one_frame_is_read_at_a_time_and_every_one(trained, lesions, monkeypatch, group):
    read, seen = images.read, []

    def counted(path, frame=0, voi=False):
        seen.append(frame)
        image = read(path, frame, voi)
        assert image.ndim == 2
        return image

    monkeypatch.setattr(images, 'read', counted)
    cfg, detector, _ = detect.restored(trained)
    detect.predicted(cfg, detector, [Volume(('q', 'good', ''), str(lesions / '1.npy'))], torch.device('cpu'))
    assert seen == [0, 1, 2, 3]


def test_prepared_images_are_read_and_boxes_stay_in_pixels_of_the_original(tmp_path):
    root, small = tmp_path / 'root', tmp_path / 'small'
    volume = phantom.breast(np.random.default_rng(0), slices=3, height=360, width=240).volume
    dicom(root / 'a' / 'v.dcm', volume)
    assert prepare.prepare(root, small, side=40) == (1, 0, 0)
    cfg = Config(root=str(root), images=str(small), size=56)
    frames = detect.Frames(cfg, [Volume(('p', 'v', ''), str(root / 'a/v.dcm'), lesions=[(1, 30, 60, 120, 180, 'm')],
                                        shape=(3, 360, 240))])
    assert frames.plain(0, 1)['shape'] == (360, 240)
    squashed = Image.fromarray(np.load(small / 'a/v.npy')[1]).resize((56, 56), Image.Resampling.BICUBIC)
    assert (frames.plain(0, 1)['image'] == np.asarray(squashed)).all()
    flat = detect.Frames(replace(cfg, augment=False), frames.volumes).augmented(0, 1, 0, 0)
    assert flat['boxes'][0].tolist() == pytest.approx([7, 28 / 3, 28, 28])


def test_flags_that_cannot_work_are_refused_together():
    with pytest.raises(ValueError) as problem:
        detect.check(Config(size=500, channels=48, low=0.6, high=0.5, batch=9, lr=0, dropout=2), 2)
    for words in ('--size 500', '--channels 48', '--low 0.6', '--batch 9 does not divide', '--lr 0', '--dropout 2'):
        assert words in str(problem.value)
    with pytest.raises(ValueError, match='--dataset rsna: expected bcs, vindr, cbis, mias, csv'):
        detect.check(Config(dataset='rsna'), 1)


def test_an_encoder_of_another_patch_is_refused(tmp_path):
    model = vit.ViT(size=64, patch=16, width=32, depth=1, heads=2)
    save_encoder(tmp_path / 'p.pt', model)
    with pytest.raises(ValueError, match='its patches are 16 pixels wide'):
        detect.build(Config(encoder=str(tmp_path / 'p.pt')))
    with pytest.raises(ValueError, match='no such file; --encoder takes'):
        detect.build(Config(encoder=str(tmp_path / 'gone.pt')))


def test_the_defaults_are_the_numbers_of_the_paper():
    cfg = Config()
    assert (cfg.size, cfg.channels, cfg.batch, cfg.epochs, cfg.patience) == (518, 256, 64, 50, 10)
    assert cfg.min_distance == 100                          # the challenge's
    assert (cfg.alpha, cfg.gamma, cfg.high, cfg.low, cfg.freeze) == (0.25, 2, 0.5, 0.4, True)


def submission(tmp_path, predictions, boxes=('p|s|lcc||20|10|10|50|50|cancer|0|40',)):
    write(tmp_path / 'labels.csv', ['PatientID|StudyUID|View|Normal|Actionable|Benign|Cancer', 'p|s|lcc|0|0|0|1',
                                    'p|s|rcc|1|0|0|0'])
    write(tmp_path / 'boxes.csv', ['PatientID|StudyUID|View|Subject|Slice|X|Y|Width|Height|Class|AD|VolumeSlices',
                                   *boxes])
    write(tmp_path / 'sub.csv', ['PatientID|StudyUID|View|X|Width|Y|Height|Z|Depth|Score', *predictions])
    return ('score', tmp_path / 'sub.csv', '--labels', tmp_path / 'labels.csv', '--boxes', tmp_path / 'boxes.csv',
            '--out', tmp_path / 'out', '--draws', 20)


def test_a_submission_file_is_scored_as_the_challenge_does(tmp_path):
    cli(*submission(tmp_path, ['p|s|lcc|12|48|11|52|19|2|0.9', 'p|s|rcc|12|48|11|52|19|2|0.95',
                               'p|s|lcc|700|48|800|52|19|2|0.95']))
    found, = scores(tmp_path / 'out')['challenge'].values()
    assert found['sensitivity_at_1_fps_positive'] == 1 and found['sensitivity_at_2_fps_all'] == 1
    assert scores(tmp_path / 'out')['min_distance'] == 100
    for text in ('', ','.join(detect.PREDICTION) + '\n'):   # an empty file, a header alone: zeros
        arguments = submission(tmp_path, [])
        (tmp_path / 'sub.csv').write_text(text)
        cli(*arguments)
        found = scores(tmp_path / 'out')
        assert set(next(iter(found['challenge'].values())).values()) == {0.0}
        assert next(iter(found['with_lesions'].values()))['mean of 1-4'] == [0, 0, 0] and 'NaN' not in json.dumps(found)


@pytest.mark.parametrize('predictions, boxes, words', [
    (['p|s|lcc|12|48|11|52|19|2|high'], None, "Score is 'high'"),
    (['p|s|lcc|12|-48|11|52|19|2|0.5'], None, 'a box of -48x52 in p/s/lcc'),
    ([], [], 'no lesion, so there is no sensitivity'),
    ([], ['p|s|lcc||20|10|10|0|50|cancer|0|40'], 'has no area'),
    ([], ['p|s|lcc||40|10|10|9|50|cancer|0|40'], 'slice 40 of 40 in p/s/lcc does not exist'),
    (['p|s|lcc|12|48|11|52|19|2|0|5'], None, 'a row has 11 cells for 10 columns'),
    ([], ['p|t|lcc||20|10|10|9|50|cancer|0|40'], 'a box in p/t/lcc, which')])
def test_a_bad_submission_or_truth_is_refused_in_one_sentence(tmp_path, predictions, boxes, words):
    arguments = submission(tmp_path, predictions) if boxes is None else submission(tmp_path, predictions, boxes)
    with pytest.raises(ValueError) as problem:
        cli(*arguments)
    assert words in str(problem.value) and '\n' not in str(problem.value)


def test_a_prediction_in_an_unlisted_volume_is_a_false_positive_and_told(tmp_path, capsys):
    cli(*submission(tmp_path, ['p|s|lcc|12|48|11|52|19|2|0.5', 'x|y|lcc|12|48|11|52|19|2|0.9']))
    assert '1 predictions in volumes that are not listed' in capsys.readouterr().out
    found = scores(tmp_path / 'out')
    assert list(found['unlisted'].values()) == [1]


def test_errors_end_the_script_with_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / 'detect.py'), '--root', str(tmp_path / 'none.csv')],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.strip().splitlines() == [
        f'detect.py: {tmp_path}/none.csv: no such file']


def test_a_small_demo_runs_and_draws(tmp_path, encoder, capsys):
    cli('--out', tmp_path / 'demo', '--phantoms', 40, '--epochs', 1, '--size', 84, '--channels', 32, '--encoder',
        encoder, '--draws', 20)
    text = capsys.readouterr().out
    assert text.startswith('SMOKE RUN ON PHANTOMS') and 'trained - untrained' in text
    for name in ('overlay.png', 'froc.png'):
        assert np.asarray(Image.open(tmp_path / 'demo' / name)).std() > 5
    with pytest.raises(ValueError, match='is not empty; choose another --out'):
        cli('--out', tmp_path / 'demo', '--phantoms', 40)


# ---- DINO-DETR in place of RetinaNet --------------------------------------------------------------------------------

DETR = ('--head', 'detr', '--queries', 12, '--layers', 1, 2, '--denoising', 8)


def test_dino_detr_trains_resumes_exactly_and_predicts(lesions, encoder, tmp_path):
    arguments = ('--root', lesions, '--encoder', encoder, *FAST, *DETR, '--epochs', 2)
    cli(*arguments, '--out', tmp_path / 'whole')
    state = torch.load(tmp_path / 'whole/last.pt', weights_only=True)
    assert state['config']['clip'] == 0.1 and all(line['loss'] > line['box'] > 0 for line in log(tmp_path / 'whole'))
    assert len(detect.read_predictions(tmp_path / 'whole')) > 30
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(detect, 'validated', interrupted_after(1))
        cli(*arguments, '--out', tmp_path / 'cut')
    cli(*arguments, '--out', tmp_path / 'cut', '--resume')
    one, two = weights(tmp_path / 'whole'), weights(tmp_path / 'cut')
    assert all(torch.equal(one[name], two[name]) for name in one)
    cli('predict', lesions / '30.npy', '--checkpoint', tmp_path / 'whole', '--out', tmp_path / 'found',
        '--threshold', 0)
    assert json.loads((tmp_path / 'found/findings.json').read_text())['findings']


def interrupted_after(epochs):
    whole, calls = detect.validated, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > epochs:
            raise KeyboardInterrupt
        return whole(*arguments)
    return stop


def test_dino_detr_is_told_the_lesions_in_shares_of_the_image_and_answers_in_pixels():
    cfg = Config(size=84, channels=32, head='detr', queries=5, layers=(1, 1), top=4)
    detector = detect.assembled(cfg, vit.ViT(**TINY), None).eval()
    batch = dict(boxes=[torch.tensor([[21.0, 42, 63, 84]]), torch.zeros(0, 4)])
    one, none = detector.targets(batch, 'cpu')
    torch.testing.assert_close(one['boxes'], torch.tensor([[0.5, 0.75, 0.5, 0.5]]))
    assert none['boxes'].shape == (0, 4) and detector.count(batch) == 1
    answers = dict(layers=[(torch.tensor([[[-1.0], [2], [0], [1], [-3]]]), torch.full((1, 5, 4), 0.5))])
    (boxes, scores), = detector.findings(cfg, answers)
    torch.testing.assert_close(scores, torch.tensor([2.0, 1, 0, -1]).sigmoid())
    torch.testing.assert_close(boxes[0], torch.tensor([21.0, 21, 63, 63]))
    assert Config(head='detr').lr == 1e-4 and Config().lr == 5e-4 and Config(head='detr', lr=3e-3).lr == 3e-3


def test_dino_detr_looks_where_the_anchors_sit():
    detector = detect.assembled(Config(size=518, channels=32, head='detr', layers=(0, 1)), vit.ViT(**TINY), None)
    levels = [torch.zeros(1, 1, cells, cells) for cells in retinanet.grids(518)]
    found = 518 * detect.detr.Grid.of(levels, detector.head.centres).centres
    a = retinanet.anchors(518)
    torch.testing.assert_close(found, ((a[:, :2] + a[:, 2:]) / 2)[4::9], rtol=0, atol=1e-2)


# ---- fused representations ------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def exams(tmp_path_factory):
    """FFDM of 96x72 and SM of 80x60 of the same breasts, the lesion in the FFDM bright, in the SM faint; as lists."""
    root, lines = tmp_path_factory.mktemp('exams'), dict(sm=[], ffdm=[])
    for i in range(24):
        rng, split = np.random.default_rng([5, i]), 'train' if i < 12 else 'val' if i < 18 else 'test'
        breast = np.zeros((80, 60), np.uint8)
        breast[8:72, :40] = rng.integers(60, 90, (64, 40))
        x, y = rng.integers(5, 25), rng.integers(15, 50)
        for kind, value, size in (('sm', 20, (60, 80)), ('ffdm', 120, (72, 96))):
            image = breast.copy()
            image[y:y + 12, x:x + 12] += np.uint8(value)
            folder = root / kind
            folder.mkdir(exist_ok=True)
            np.save(folder / f'{i}.npy', np.asarray(Image.fromarray(image).resize(size)))
            f = size[0] / 60
            lines[kind].append(f'{kind}/{i}.npy|p{i}|e{i}|LCC|{split}|{x * f}|{y * f}|{(x + 12) * f}|{(y + 12) * f}')
    for kind, rows in lines.items():
        write(root / f'{kind}.csv', ['path|patient|study|view|split|x0|y0|x1|y1', *rows])
    return root


def paired_config(exams, **changes):
    return Config(**dict(root=str(exams / 'sm.csv'), paired=str(exams / 'ffdm.csv'), mimic='C', size=84) | changes)


def test_pairs_are_matched_by_exam_side_and_view_and_every_other_image_is_named(exams, tmp_path):
    volumes, notes = detect.load(paired_config(exams))
    assert len(volumes) == 24 and not notes
    assert all(v.partner.path.endswith(f'ffdm/{v.patient[1:]}.npy') for v in volumes)
    text = (exams / 'ffdm.csv').read_text().replace(',e3,LCC', ',e3,RCC').replace('ffdm/', f'{exams}/ffdm/')
    lines = text.splitlines()
    lines[5] = lines[5].replace('ffdm/4.npy', 'sm/4.npy').replace('sm/4', 'wide')
    np.save(exams / 'wide.npy', np.full((80, 80), 7, np.uint8))
    (tmp_path / 'other.csv').write_text('\n'.join(lines[:-1]))
    volumes, notes = detect.load(paired_config(exams, paired=str(tmp_path / 'other.csv')))
    assert len(volumes) == 21 and 'p3/e3/LCC: not in' in notes[0] and 'p23/e23/LCC: not in' in notes[0]
    assert 'p4/e4/LCC: 1 images of 60x80 and 1 of 80x80' in notes[0] and 'have no pair: p3/e3/RCC' in notes[1]
    np.save(exams / 'gone.npy', np.zeros((80, 60), np.uint8))
    (tmp_path / 'twice.csv').write_text('\n'.join([*lines, lines[1].replace('ffdm/0', 'gone')]))
    with pytest.raises(ValueError, match='p0/e0/LCC is listed twice'):
        detect.load(paired_config(exams, paired=str(tmp_path / 'twice.csv')))
    (tmp_path / 'none.csv').write_text('path,x0,y0,x1,y1\na.npy,,,,')
    with pytest.raises(ValueError, match='has a pair in .* patient, study and view must agree'):
        detect.load(paired_config(exams, paired=str(tmp_path / 'none.csv')))


def test_both_images_of_a_pair_get_the_same_flips_and_windows_and_only_the_first_is_spoilt(exams):
    volumes, _ = detect.load(paired_config(exams))
    twins = [replace(v, partner=v) for v in volumes]
    frames, flat = (detect.Frames(paired_config(exams, augment=augment), twins) for augment in (True, False))
    plain, equal, moved = flat[3, 0, 0, 0], 0, 0
    assert np.array_equal(*plain['image']) and plain['tissue'].dtype == bool
    for i in range(40):
        sample = frames[3, 0, 0, i]
        first, second = sample['image']
        assert sample['image'].shape == (2, 84, 84) and sorted(sample) == ['boxes', 'image', 'match', 'tissue']
        equal, moved = equal + np.array_equal(first, second), moved + (not np.array_equal(second, plain['image'][1]))
        assert abs(first.astype(float) - second).mean() < 30                            # at one place
        assert (second[sample['tissue']] > 40).mean() > 0.9 and sample['tissue'].sum() > 0.3 * (second > 40).sum()
    assert 8 < equal < 30 and moved > 20
    left = np.load(volumes[0].partner.path)
    for name, image, accepted in (('framed', np.pad(left, 2), True), ('mirrored', left[:, ::-1], False)):
        np.save(exams / f'{name}.npy', image)
        other = replace(volumes[0], path=str(exams / f'{name}.npy'))
        found = detect.Frames(paired_config(exams), [replace(volumes[0], partner=other)])[0, 0]
        assert isinstance(found, dict) if accepted else 'is the mirror image of its pair' in found


def mimic(channels=32, width=64):
    torch.manual_seed(0)
    other = detect.Features(vit.ViT(**TINY, layerscale=1.0), width)
    return detect.Mimic(vit.ViT(**TINY, layerscale=1.0), channels, False, other, 84)


def test_stage_two_is_minus_the_cosine_inside_tissue_and_moves_b_alone():
    net, cfg = mimic().train(), Config(size=84)
    before = {k: v.clone() for k, v in net.other.state_dict().items()}
    images, tissue = torch.rand(2, 2, 84, 84), torch.zeros(2, 84, 84, dtype=torch.bool)
    tissue[0, 20:60, 10:70] = True                          # the second image holds none
    answers = net(images)
    loss, *levels = net.objective(cfg, answers, dict(tissue=tissue))
    expected, places = [], retinanet.anchors(84)
    start = 0
    for (guess, aim), cells in zip(answers, retinanet.grids(84)):
        middle = ((places[:, :2] + places[:, 2:]) / 2)[start:start + 9 * cells ** 2:9].long()           # x y
        start += 9 * cells ** 2
        here = tissue[0][middle[:, 1], middle[:, 0]]
        cosine = torch.cosine_similarity(guess[0].flatten(1), aim[0].flatten(1), dim=0)
        expected.append(-cosine[here].mean() if here.any() else torch.tensor(0.0))
    torch.testing.assert_close(torch.stack(levels), torch.stack(expected))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert net.count(dict(tissue=tissue)) == 1
    loss.backward()
    assert all(p.grad is None for p in net.other.parameters()) and not net.other.training
    assert net.pyramid.p3.weight.grad.abs().max() > 0 and net.encoder.patch_embed.proj.weight.grad.abs().max() > 0
    assert all(torch.equal(before[k], v) for k, v in net.other.state_dict().items())


def test_levels_that_learn_nothing_and_levels_without_tissue_are_told_from_collapse(capsys):
    detect.explain(dict(cosine=[0.3, 0.9, 0.0, 0.95], constant=[0.5, 0.8, 0.0, 0.9], spread=[1.2, 0.9, 1.0, 0.05]))
    told = capsys.readouterr().out
    assert 'P3: B is no better than the mean of C' in told and 'P6 has collapsed' in told
    assert 'P4 has' not in told and 'P5 has' not in told and 'P5:' not in told


def test_a_collapsed_b_is_detected(exams, group, capsys):
    """A guess that is the same everywhere has no spread; a B that is C has all of it."""
    volumes = [v for v in detect.load(paired_config(exams))[0] if v.split == 'val']
    cfg = paired_config(exams, workers=0)
    dead = mimic()
    for project in dead.project:
        torch.nn.init.zeros_(project.weight)
    score, found = detect.likeness(cfg, dead, volumes, torch.device('cpu'))
    assert max(found['spread']) < 1e-2 and all(c <= best for c, best in zip(found['cosine'], found['constant']))
    detect.explain(found)
    assert capsys.readouterr().out.count('has collapsed') == 4
    twin = mimic(channels=64)
    twin.encoder.load_state_dict(twin.other.encoder.state_dict())
    twin.pyramid.load_state_dict(twin.other.pyramid.state_dict())
    for project in twin.project:                            # the identity
        torch.nn.init.dirac_(project.weight)
        torch.nn.init.zeros_(project.bias)
    same = [replace(v, partner=v) for v in volumes]
    score, found = detect.likeness(cfg, twin, same, torch.device('cpu'))
    assert score == pytest.approx(1, abs=1e-4) and found['spread'] == pytest.approx([1] * 4, abs=1e-3)
    detect.explain(found)
    assert 'has collapsed' not in capsys.readouterr().out


def test_fused_levels_are_both_models_levels_mixed_and_b_stays_frozen():
    torch.manual_seed(0)
    b, detector = (make(vit.ViT(**TINY, layerscale=1.0), 32, freeze=False)
                   for make in (detect.Features, detect.Detector))
    detector.fusion = detect.Fusion(b, 32)
    detector.train()
    assert not detector.fusion.other.training and detector.encoder.training
    images = torch.rand(1, 1, 84, 84)
    own, other = detector.pyramid(detector.encoder(images)[1]), b.levels(images)
    for level, mine in zip(detector.levels(images), own):   # it begins as the detector that it was
        assert torch.equal(level, mine)
    for mix in detector.fusion.mix:
        torch.nn.init.normal_(mix.weight)
    for level, mix, mine, theirs in zip(detector.levels(images), detector.fusion.mix, own, other):
        torch.testing.assert_close(level, mix(torch.cat([mine, theirs], 1)), rtol=1e-4, atol=1e-5)
    logits, _ = detector(images)
    logits.sum().backward()
    assert all(p.grad is None for p in b.parameters())
    assert all(p.grad.abs().max() > 0 for p in (detector.pyramid.p3.weight, detector.classify.answer.weight,
                                                detector.encoder.norm.weight, detector.fusion.mix[0].weight))
    assert not any('other' in name for name in detector.learnt())
    both = torch.cat([images, torch.rand(1, 1, 84, 84)], 1)                             # the bound: B sees the second
    assert not torch.equal(detector.levels(both)[0], detector.levels(images)[0])
    torch.testing.assert_close(detector.levels(images.repeat(1, 2, 1, 1))[0], detector.levels(images)[0])


def test_the_three_stages_end_in_a_detector_that_needs_sm_alone(exams, encoder, tmp_path, capsys):
    fast = ('--encoder', encoder, *FAST, '--epochs', 1)
    run = {name: tmp_path / name for name in ('A', 'C', 'B', 'fused', 'bound')}
    cli('--root', exams / 'sm.csv', '--out', run['A'], *fast)
    cli('--root', exams / 'ffdm.csv', '--out', run['C'], *fast)
    pairs = ('--root', exams / 'sm.csv', '--paired', exams / 'ffdm.csv')
    cli(*pairs, '--mimic', run['C'], '--out', run['B'], *fast, '--seed', 1)
    assert "C's mean alone" in capsys.readouterr().out and len(scores(run['B'])['spread']) == 4
    third = ('--root', exams / 'sm.csv', '--init_from', run['A'], '--fuse', run['B'], *fast[:-1], 2)
    cli(*third, '--out', run['fused'])
    assert 'fused on pretrained' in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(detect, 'validated', interrupted_after(1))
        cli(*third, '--out', tmp_path / 'cut')
    b, fused = (torch.load(run[name] / 'last.pt', weights_only=True) for name in ('B', 'fused'))
    assert torch.equal(b['best']['weights']['pyramid.p3.weight'], fused['other']['weights']['pyramid.p3.weight'])
    begun = detect.build(Config(init_from=str(run['A']), fuse=str(run['B']), channels=32, size=84)).state_dict()
    assert all(torch.equal(v, begun[k]) for k, v in detect.restored(run['A'])[1].state_dict().items())
    cli('score', run['A'], run['fused'], '--draws', 10, '--out', tmp_path / 'score')
    run['B'].rename(tmp_path / 'gone')                      # the checkpoint is whole without it
    cli('predict', exams / 'sm/20.npy', '--checkpoint', run['fused'], '--out', tmp_path / 'found')
    cli(*third, '--out', tmp_path / 'cut', '--resume')
    one, two = weights(run['fused']), weights(tmp_path / 'cut')
    assert all(torch.equal(one[name], two[name]) for name in one)
    cli(*pairs, '--init_from', run['A'], '--fuse', run['C'], '--out', run['bound'], *fast)
    for name, why in ((tmp_path / 'gone', 'finds nothing, it mimics'), (run['bound'], 'needs both images')):
        with pytest.raises(ValueError, match=why):
            cli('predict', exams / 'sm/20.npy', '--checkpoint', name)
    with pytest.raises(ValueError, match='is fused itself'):
        detect.features_of(run['fused'], 84)
    with pytest.raises(ValueError, match='has learnt --size 84, not 112'):
        detect.features_of(run['A'], 112)
    for given, why in ((dict(init_from=str(run['A']), channels=64), 'has 32 channels, --channels is 64'),
                       (dict(init_from=str(run['fused'])), 'is fused; go on with it by --fuse')):
        with pytest.raises(ValueError, match=why):
            detect.build(Config(**dict(channels=32) | given))
    for wrong, why in ((dict(mimic='C'), 'needs --paired'), (dict(paired='x'), 'goes with --mimic'),
                       (dict(head='yolo'), 'expected retinanet or detr'), (dict(head='detr', search=2), '--search'),
                       (dict(fuse=''), 'is empty'), (dict(init_from='A', random_encoder=True), 'bring an encoder'),
                       (dict(layers=(0, 3)), 'expected 1 or more of both')):
        with pytest.raises(ValueError, match=why):
            detect.check(Config(root='x', **wrong), 1)


def test_the_phantoms_of_a_pair_show_their_lesion_where_they_should():
    def visible(contrasts):
        """Brightness of the lesion against the same breast without it"""
        with_, without = (phantom.breast(np.random.default_rng(4), slices=8, lesion=True, contrasts=c)
                          for c in (contrasts, (0, 0)))
        _, x0, y0, x1, y1 = with_.boxes[0].astype(int)
        return [(getattr(with_, name)[y0:y1, x0:x1].astype(float) - getattr(without, name)[y0:y1, x0:x1]).mean()
                for name in ('ffdm', 'sm')]

    for contrasts in ((1, 0), (0, 1), (1, 1), (0, 0), (0.3, 0)):
        for wanted, found in zip(contrasts, visible(contrasts)):
            assert abs(found) < 0.5 if not wanted else found > 15 * wanted, (contrasts, found)
    p = phantom.breast(np.random.default_rng(4), slices=8, lesion=False, contrasts=(1, 1))
    assert p.ffdm.shape == p.sm.shape == p.tissue.shape and not p.ffdm[~p.tissue].any() and p.volume.shape[0] == 8
    with pytest.raises(ValueError, match='contrasts project a volume'):
        phantom.breast(np.random.default_rng(4), contrasts=(1, 1))
