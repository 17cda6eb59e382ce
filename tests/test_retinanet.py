"""retinanet.py: anchors, matching, losses and suppression equal trusted code or their definitions, and the network has
the shapes of DBT-DINO 6.2.3."""
import numpy as np
import pytest
import torch
from conftest import CASES

import retinanet

ARCHIVE = np.load(CASES / 'retinanet.npz')
SIZE = 84                           # grids of 12, 6, 3 and 2 cells


def case(name):
    return torch.from_numpy(ARCHIVE[name])


# ---- anchors ------------------------------------------------------------------------------------------------------

def test_the_paper_s_65250_anchors_have_its_sides_and_ratios():
    anchors = retinanet.anchors(518)
    assert anchors.shape == (65250, 4) and retinanet.grids(518) == (74, 37, 18, 9)
    sides = (anchors[:9, 2:] - anchors[:9, :2]).double()
    scales, ratios = torch.tensor([1, 1.26, 1.587] * 3), torch.tensor([0.5] * 3 + [1.0] * 3 + [2.0] * 3)
    torch.testing.assert_close(sides.prod(1).sqrt().float(), 16 * scales)
    torch.testing.assert_close((sides[:, 1] / sides[:, 0]).float(), ratios)


@pytest.mark.parametrize('size', [126, 140])                # 9 and 10 patches: an odd and an even grid
def test_anchors_lie_at_the_centroid_of_the_tokens_that_reach_their_cell(size):
    torch.manual_seed(0)
    side, start, pyramid = size // 14, 0, retinanet.Pyramid(4, 32)
    pyramid.reduce.weight.data.fill_(1.0)
    for convolution in (pyramid.p3, pyramid.p4, pyramid.p5, pyramid.p6):                # the middle of each kernel
        convolution.weight.data.zero_()[:, :, 1, 1] = 1.0
    for level, cells in enumerate(retinanet.grids(size)):
        row, column = cells - 1, cells - 2
        x0, _, x1, _ = retinanet.anchors(size)[start + 9 * (cells * row + column)].tolist()
        start += 9 * cells ** 2
        tokens = torch.rand(64, side * side, 4, requires_grad=True)
        maps = pyramid(tokens)[level]
        assert maps.shape[2:] == (cells, cells)
        maps[:, :, row, column].sum().backward()
        weight = tokens.grad.abs().sum((0, 2)).view(side, side).sum(0)
        x = (weight * 14 * (torch.arange(side) + 0.5)).sum() / weight.sum()
        # max-pooling takes one of two columns, 7 pixels to either side: over 64 draws off by 3.5 once in 16,000 times
        assert abs(x - (x0 + x1) / 2) < (0.01 if level < 2 else 3.5), level


def test_encode_and_decode_equal_the_reference():
    anchors = case('coder_anchors')
    found = retinanet.encode(case('coder_gt'), anchors)
    torch.testing.assert_close(found, case('coder_encode'), rtol=1e-5, atol=1e-5)
    found = retinanet.decode(case('coder_deltas'), anchors)
    torch.testing.assert_close(found, case('coder_decode'), rtol=1e-5, atol=1e-4)
    assert retinanet.decode(100 * case('coder_deltas').half(), anchors).isfinite().all()


# ---- matching and suppression -------------------------------------------------------------------------------------

def test_matching_equals_the_reference_and_a_box_that_overlaps_no_anchor_matches_none():
    for i in (1, 3, 5, 7, 9, 11):
        found = retinanet.match(case(f'match{i}_gt'), case('match_anchors'), high=0.5, low=0.4)
        assert torch.equal(found, case(f'match{i}_out'))
    boxes = torch.tensor([[-900.0, -900, -890, -890], [20, 20, 30, 30]])
    assert retinanet.match(boxes, retinanet.anchors(56)).unique().tolist() == [-1, 1]


def test_nms_equals_its_definition():
    torch.manual_seed(0)
    corner, scores, kept = 80 * torch.rand(200, 2), torch.rand(200).round(decimals=1), []
    boxes = torch.cat([corner, corner + 5 + 30 * torch.rand(200, 2)], 1)
    for i in sorted(range(200), key=lambda i: -scores[i].item()):                       # stable: ties keep their order
        if all(retinanet.pairwise_iou(boxes[i:i + 1], boxes[j:j + 1]) <= 0.3 for j in kept):
            kept.append(i)
    assert retinanet.nms(boxes, scores, 0.3).tolist() == kept
    assert retinanet.nms(boxes, scores, 0.3, top=5).tolist() == kept[:5]


def test_boxes_of_an_image_are_the_best_of_each_level_inside_it_after_nms():
    torch.manual_seed(0)
    anchors = retinanet.anchors(56)
    logits, deltas, best = torch.randn(len(anchors)), 3 * torch.randn(len(anchors), 4), []
    for level in torch.arange(len(anchors)).split([9 * cells ** 2 for cells in retinanet.grids(56)]):
        best += sorted(level.tolist(), key=lambda i: -logits[i].item())[:7]
    whole = retinanet.decode(deltas[best], anchors[best]).clamp(0, 56)
    inside = (whole[:, 2:] > whole[:, :2]).all(1)           # the others lie beside the image
    kept = retinanet.nms(whole[inside], logits[best][inside], 0.1, 9)
    boxes, scores = retinanet.boxes_of(logits, deltas, anchors, 56, iou=0.1, top=9, per_level=7)
    assert torch.equal(boxes, whole[inside][kept]) and not inside.all()
    assert torch.equal(scores, logits[best][inside][kept].sigmoid())


# ---- the network --------------------------------------------------------------------------------------------------

def test_levels_and_towers_have_the_paper_s_shapes_and_scores_start_at_one_percent():
    levels = retinanet.Pyramid(8, 32)(torch.rand(1, 37 * 37, 8))
    assert [level.shape for level in levels] == [(1, 32, cells, cells) for cells in (74, 37, 18, 9)]
    torch.manual_seed(0)
    head = retinanet.RetinaNet(channels=64).eval()
    logits, _ = head([torch.randn(2, 64, cells, cells) for cells in retinanet.grids(SIZE)])
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, abs=0.002)
    for tower in (head.classify, head.regress):
        assert [conv.weight.shape for conv in tower.conv] == [(64, 64, 3, 3)] * 4
        assert [norm.num_groups for norm in tower.norm] == [32] * 4
        assert [drop.p for drop in tower.drop] == [0.05, 0.05, 0.05, 0.1]


def test_logits_and_deltas_are_ordered_like_the_anchors():
    """A value in one cell of one level, in the channel of one shape, comes out at the index of that anchor."""
    head = retinanet.RetinaNet(channels=32)
    levels = [torch.zeros(1, 36, cells, cells) for cells in retinanet.grids(SIZE)]
    head.classify.forward, head.regress.forward = lambda level: level[:, :9], lambda level: level
    levels[1][0, 5, 3, 2] = 7.0                             # P4, fourth row, third column, sixth shape
    levels[2][0, 4 * 8 + 3, 1, 0] = 7.0                     # P5, second row, first column, last delta of the last shape
    logits, deltas = head(levels)
    assert torch.nonzero(logits).tolist() == [[0, 9 * 12 ** 2 + 9 * (3 * 6 + 2) + 5]]
    assert [0, 9 * (12 ** 2 + 6 ** 2) + 9 * 3 + 8, 3] in torch.nonzero(deltas).tolist()


def test_outputs_are_fp32_under_autocast_so_that_scores_stay_apart():
    pyramid, head = retinanet.Pyramid(8, 32), retinanet.RetinaNet(channels=32).eval()
    with torch.autocast('cpu', torch.bfloat16):
        logits, deltas = head(pyramid(torch.rand(1, 36, 8)))
    assert logits.dtype == deltas.dtype == torch.float32
    assert len(logits.unique()) > 0.9 * logits.numel()


# ---- losses -------------------------------------------------------------------------------------------------------

def test_focal_loss_equals_the_reference_and_a_confident_error_keeps_its_gradient_in_half_precision():
    for i in range(3):
        alpha, gamma, total = ARCHIVE[f'focal{i}']
        found = retinanet.focal_loss(case('focal_logits'), case('focal_targets'), alpha, gamma)
        assert found.item() == pytest.approx(total, rel=1e-5)
    logits = torch.tensor([60.0, -60.0], dtype=torch.bfloat16, requires_grad=True)
    retinanet.focal_loss(logits, torch.tensor([0.0, 1.0])).backward()
    assert logits.grad.float().abs().min() > 0.1 and logits.grad.isfinite().all()


def test_losses_equal_loops_that_leave_out_ignored_anchors_and_count_images_without_lesions():
    anchors = retinanet.anchors(56)
    boxes = [torch.tensor([[10.0, 10, 34, 36]]), torch.zeros(0, 4), torch.tensor([[5.0, 5, 20, 22], [30, 8, 50, 40]])]
    batch = dict(boxes=boxes, match=torch.stack([retinanet.match(b, anchors) for b in boxes]))
    assert set(batch['match'].unique().tolist()) == {-2, -1, 0, 1}
    torch.manual_seed(0)
    logits, deltas, expected = torch.randn(3, len(anchors)), torch.randn(3, len(anchors), 4), [0.0, 0.0]
    for image, matched in enumerate(batch['match'].tolist()):
        for a, lesion in enumerate(matched):
            if lesion != -2:
                target = torch.tensor(float(lesion >= 0))
                expected[0] += retinanet.focal_loss(logits[image, a], target, 0.4, 1.5).item()
            if lesion >= 0:
                wanted = retinanet.encode(boxes[image][lesion:lesion + 1], anchors[a:a + 1])[0]
                off = (deltas[image, a] - wanted).abs()
                expected[1] += torch.where(off < 0.1, 5 * off ** 2, off - 0.05).sum().item()
    found = retinanet.losses(logits, deltas, batch, anchors, alpha=0.4, gamma=1.5)
    assert [loss.item() for loss in found] == pytest.approx(expected, rel=1e-4)
