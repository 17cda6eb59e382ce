"""detr.py: its parts equal the published detector on recorded cases and loops on definitions. detr_small.pt holds what
a whole small model gave when the full-sized one equalled the published one in outputs, losses and gradients."""
import inspect
import itertools
import math

import pytest
import torch
from conftest import CASES

import detr

CASE, WHOLE = (torch.load(CASES / f'{name}.pt', weights_only=True) for name in ('dino_detr', 'detr_small'))
SMALL = dict(width=32, queries=6, encoder=1, decoder=3, heads=4, points=2, hidden=32, denoising=4)


def levels(*sides, width=32, images=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, width, side, side, generator=generator) for side in sides]


def lesions(*counts, classes=1):
    generator = torch.Generator().manual_seed(1)
    return [dict(labels=torch.randint(classes, (n,), generator=generator),
                 boxes=0.1 + 0.3 * torch.rand(n, 4, generator=generator)) for n in counts]


def model(**changes):
    torch.manual_seed(0)
    return detr.DinoDetr(**SMALL | changes).train()


# ---- geometry and deformable attention ------------------------------------------------------------------------------

@pytest.mark.parametrize('references, expected', [('r2', 'o2'), ('r4', 'o4')])
def test_deformable_attention_equals_the_reference(references, expected):
    case = CASE['msda']
    attend = detr.DeformableAttention(64, levels=3, heads=case['n_heads'], points=case['n_points'])
    attend.load_state_dict(case['w'])
    grid = detr.Grid.of([torch.zeros(1, 1, h, w) for h, w in case['shapes'].tolist()])
    found = attend(case['q'], case[references], case['v'], grid)
    assert (found - case[expected]).abs().max() < 1e-5


def test_deformable_attention_is_a_weighted_sum_of_bilinear_reads():
    """Against loops: every head of every query reads each place from its four neighbours, black outside."""
    generator = torch.Generator().manual_seed(2)
    shapes, B, Q, M, P, d = [(3, 4), (2, 2)], 2, 3, 2, 2, 5
    value = torch.randn(B, 16, M, d, generator=generator)
    places = torch.rand(B, Q, M, 2, P, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(B, Q, M, 2, P, generator=generator)
    expected, start = torch.zeros(B, Q, M, d), 0
    for level, (h, w) in enumerate(shapes):
        for b, q, m, p in itertools.product(range(B), range(Q), range(M), range(P)):
            x, y = (places[b, q, m, level, p] * torch.tensor([w, h]) - 0.5).tolist()
            top, left = math.floor(y), math.floor(x)
            for row, column in itertools.product((top, top + 1), (left, left + 1)):
                if 0 <= row < h and 0 <= column < w:
                    near = (1 - abs(y - row)) * (1 - abs(x - column))
                    expected[b, q, m] += weights[b, q, m, level, p] * near * value[b, start + row * w + column, m]
        start += h * w
    found = detr.deformable_attention(value, shapes, places, weights)
    torch.testing.assert_close(found, expected.flatten(2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match='16 cells for levels of'):
        detr.deformable_attention(value, [(3, 4), (2, 1)], places, weights)


CENTRES = [(3.5 / 518, 7 / 518), (7 / 518, 14 / 518), (14 / 518, 28 / 518), (14 / 518, 56 / 518)]


def test_on_an_odd_grid_every_cell_reads_itself_at_its_true_centre():
    """P5 and P6 of a 37 x 37 grid do not cover the image; evenly shared cells would look up to 27 pixels beside."""
    pyramid = levels(74, 37, 18, 9, width=1, images=1)
    grid = detr.Grid.of(pyramid, CENTRES)
    centres = grid.centres
    ends = torch.tensor([74 * 74, 74 * 74 + 37 * 37, 74 * 74 + 37 * 37 + 18 * 18, len(centres)]) - 1
    last = 518 * centres[ends]
    torch.testing.assert_close(last, torch.tensor([[514.5] * 2, [511.0] * 2, [490.0] * 2, [462.0] * 2]))
    torch.testing.assert_close(518 * centres[ends[0] + 2], torch.tensor([21.0, 7.0]))   # x runs first
    value = torch.cat([level.flatten(2) for level in pyramid], 2).transpose(1, 2).unsqueeze(2)          # (1, N, 1, 1)
    places = grid.within(centres[None, :, None, None, None].expand(1, -1, 1, 4, 1, 2))
    for level, (start, end) in enumerate(zip([0, *ends[:-1] + 1], ends + 1)):
        only = torch.zeros(1, len(centres), 1, 4, 1)
        only[:, :, :, level] = 1
        found = detr.deformable_attention(value, grid.shapes, places, only)[0, start:end]
        torch.testing.assert_close(found, value[0, start:end, 0], rtol=1e-3, atol=1e-3)
    even = detr.Grid.of(pyramid).centres
    assert 518 * (even - centres).abs().max() == pytest.approx(27.2, abs=0.1)


def test_generalized_iou_by_hand():
    a = torch.tensor([[0.0, 0, 2, 2]])
    b = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [3, 0, 4, 2], [1, 1, 1, 1]])
    expected = torch.tensor([1, 1 / 7 - 2 / 9, 0 - 2 / 8, 0])
    torch.testing.assert_close(detr.generalized_iou(a, b), expected, rtol=1e-5, atol=1e-5)


# ---- denoising queries ----------------------------------------------------------------------------------------------

def test_denoising_queries_and_mask_equal_the_reference_exactly():
    case = CASE['cdn']
    args = case['args']
    found = detr.denoising_queries(case['targets'], args['num_queries'], args['num_classes'], args['dn_number'],
                                   args['label_noise_ratio'], args['box_noise_scale'], draws=case['draws'])
    content = case['label_weight'][found.labels.clamp_min(0)] * (found.labels >= 0).unsqueeze(-1)
    assert torch.equal(content, case['q_label']) and torch.equal(found.boxes, case['q_box'])
    assert torch.equal(found.mask, case['attn_mask']) and found.groups == case['groups']


def test_little_noise_stays_below_lambda1_and_more_noise_between_lambda1_and_lambda2():
    torch.manual_seed(0)
    truth = torch.tensor([[0.5, 0.4, 0.2, 0.3], [0.4, 0.6, 0.1, 0.2]])
    targets = [dict(labels=torch.zeros(2, dtype=torch.long), boxes=truth), *lesions(1)]
    found = detr.denoising_queries(targets, 3, 1, number=100, box_noise=0.4, lambda1=0.5, lambda2=1.5)
    assert found.groups == 50 and found.boxes.shape == (2, 200, 4)
    moved = detr.corners(found.boxes[0].sigmoid()).view(50, 2, 2, 4) - detr.corners(truth)
    shift = (moved.abs() / (truth[:, 2:] / 2).repeat(1, 2)).flatten(2) / 0.4            # (50, little and more, 8)
    assert shift[:, 0].max() < 0.5001 and 0.4 < shift[:, 0].max()
    assert 0.4999 < shift[:, 1].min() and 1.4 < shift[:, 1].max() < 1.5001
    padding = found.labels[1].view(100, 2)
    assert (padding[:, 0] == 0).all() and (padding[:, 1] == -1).all()
    assert (found.boxes[1].view(100, 2, 4)[:, 1] == 0).all()


def test_half_of_the_label_noise_draws_a_label_anew():
    torch.manual_seed(0)
    found = detr.denoising_queries(lesions(50, classes=4), 1, 4, number=5000, label_noise=0.5)
    labels = found.labels.view(-1, 50)
    assert (labels != lesions(50, classes=4)[0]['labels']).float().mean() == pytest.approx(0.25 * 3 / 4, abs=0.02)


def test_nothing_sees_the_answers_but_their_own_group():
    found = detr.denoising_queries(lesions(2, 1, 0), 3, 1, number=6)
    assert found.groups == 3 and found.mask.shape == (15, 15)
    for row, column in itertools.product(range(15), repeat=2):
        hidden = column < 12 and (row >= 12 or row // 4 != column // 4)
        assert found.mask[row, column] == hidden, (row, column)


def test_without_a_lesion_there_is_nothing_to_denoise():
    found = detr.denoising_queries(lesions(0, 0), 3, 1)
    assert found.boxes.shape == (2, 0, 4) and found.mask.shape == (3, 3) and not found.mask.any()


# ---- matching and losses --------------------------------------------------------------------------------------------

def test_matching_equals_the_reference():
    case = CASE['match']
    found = detr.match(case['logits'], case['boxes'], case['targets'])
    for pair, expected in zip(found, case['idx']):
        assert all(torch.equal(a, b) for a, b in zip(pair, expected))


def test_matching_costs_least_of_all_assignments():
    """Costs written out, against every assignment of 3 lesions to 5 queries."""
    targets, generator = lesions(3, classes=2), torch.Generator().manual_seed(3)
    logits, boxes = torch.randn(1, 5, 2, generator=generator), torch.rand(1, 5, 4, generator=generator)
    cost = torch.zeros(5, 3, dtype=torch.float64)
    for q, g in itertools.product(range(5), range(3)):
        p, box = torch.sigmoid(logits[0, q, targets[0]['labels'][g]]).item(), targets[0]['boxes'][g]
        focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p ** 2 * math.log(1 - p)
        overlap = detr.generalized_iou(detr.corners(boxes[0, q]), detr.corners(box)).item()
        cost[q, g] = 2 * focal + 5 * (boxes[0, q] - box).abs().sum() - 2 * overlap
    best = min(itertools.permutations(range(5), 3), key=lambda queries: sum(cost[q, g] for g, q in enumerate(queries)))
    query, lesion = detr.match(logits, boxes, targets)[0]
    assert {(int(q), int(g)) for q, g in zip(query, lesion)} == {(q, g) for g, q in enumerate(best)}
    with pytest.raises(FloatingPointError, match='not finite'):
        detr.match(logits * math.nan, boxes, targets)


def test_the_loss_of_a_set_by_hand():
    logits = torch.tensor([[[0.3], [-1.2]], [[0.1], [0.2]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.1]]] * 2)
    targets = [dict(labels=torch.tensor([0]), boxes=torch.tensor([[0.5, 0.5, 0.4, 0.2]])), *lesions(0)]
    pairs = [(torch.tensor([0]), torch.tensor([0])), (torch.tensor([], dtype=torch.long),) * 2]
    p = [1 / (1 + math.exp(-x)) for x in (0.3, -1.2, 0.1, 0.2)]
    focal = -0.25 * (1 - p[0]) ** 2 * math.log(p[0]) - sum(0.75 * q ** 2 * math.log(1 - q) for q in p[1:])
    found = detr.set_loss(logits, boxes, targets, pairs)
    torch.testing.assert_close(found, torch.tensor([focal, 0.2, 0.5]), rtol=1e-4, atol=1e-5)
    sums = dict(one=torch.tensor([1.0, 2, 3]), two=torch.tensor([4.0, 0, 1]))
    assert detr.total(sums) == (1 + 4) + 5 * 2 + 2 * 4


def test_the_loss_holds_every_layer_the_proposals_and_the_mean_of_the_denoising_groups():
    net, targets = model(), lesions(2, 0)
    outputs = net(levels(8, 4, 2, 1), targets)
    sums = detr.losses(outputs, targets)
    assert list(sums) == ['proposals', *(f'layer {i}' for i in range(3)), *(f'denoising {i}' for i in range(3))]
    logits, boxes = outputs['denoising'][1]
    assert outputs['groups'] == 2 and logits.shape == (2, 8, 1)
    by_hand = torch.zeros(3)
    for group in range(2):                                  # two positives, two negatives
        part = slice(4 * group, 4 * group + 4)
        pairs = [(torch.arange(2), torch.arange(2)), (torch.arange(0), torch.arange(0))]
        by_hand += detr.set_loss(logits[:, part], boxes[:, part], targets, pairs) / 2
    torch.testing.assert_close(sums['denoising 1'], by_hand)


# ---- the model ------------------------------------------------------------------------------------------------------

def test_a_whole_small_model_gives_the_recorded_boxes_losses_and_gradients():
    """Levels that are not square, three classes, two images, perturbed weights, recorded draws."""
    net = detr.DinoDetr(**WHOLE['config']).train()
    net.load_state_dict(WHOLE['weights'])
    outputs = net(WHOLE['levels'], WHOLE['targets'], draws=WHOLE['draws'])
    for found, expected in ((outputs['layers'], WHOLE['layers']), ([outputs['proposals']], [WHOLE['proposals']]),
                            (outputs['denoising'], WHOLE['noisy'])):
        for one, other in zip(found, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    sums = detr.losses(outputs, WHOLE['targets'])
    assert sums.keys() == WHOLE['losses'].keys()
    for name, value in sums.items():
        torch.testing.assert_close(value, WHOLE['losses'][name], rtol=1e-3, atol=1e-3)
    detr.total(sums).backward()
    for name, p in net.named_parameters():
        assert p.grad.norm() == pytest.approx(WHOLE['gradients'][name].item(), rel=2e-3, abs=1e-4), name


def test_it_starts_with_squares_around_the_cells_scores_of_a_hundredth_and_rays():
    net = model().eval()
    for head in (net.proposal_class, net.class_head):
        assert head.bias.sigmoid().item() == pytest.approx(0.01)
    _, boxes = net(levels(8, 4, 2, 1))['proposals']
    sides = boxes[..., 2:].unique()
    assert all(min(abs(side - square) for square in (0.05, 0.1, 0.2, 0.4)) < 1e-5 for side in sides.tolist())
    offsets = net.encoder[0].self_attn.sampling_offsets
    rays = offsets.bias.view(4, 4, 2, 2)                                                # heads, levels, points, x y
    assert torch.equal(rays[0, :, :, 0], torch.tensor([[1.0, 2]] * 4)) and rays[0, ..., 1].abs().max() == 0
    assert not offsets.weight.any() and not net.encoder[0].self_attn.attention_weights.weight.any()
    defaults = {k: v.default for k, v in inspect.signature(detr.DinoDetr).parameters.items()}
    assert defaults | dict(queries=0, classes=0) == dict(
        width=256, classes=0, queries=0, encoder=6, decoder=6, heads=8, points=4, hidden=2048, levels=4, denoising=100,
        centres=None)


def test_autocast_changes_nothing():
    net, pyramid = model().eval(), levels(8, 4, 2, 1)
    plain = net(pyramid)['layers'][-1]
    with torch.autocast('cpu', torch.bfloat16):
        cast = net(pyramid)['layers'][-1]
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(cast, plain))


def test_true_centres_move_the_first_boxes():
    net = model(centres=[(0.1, 0.1), (0.1, 0.2), (0.1, 0.4), (0.1, 0.8)]).eval()
    _, boxes = net(levels(8, 4, 2, 1))['proposals']
    places = {round(x, 3) for x in boxes[..., :2].flatten().tolist()}
    assert places <= {round(0.1 * i, 3) for i in range(1, 9)}
    for wrong in (levels(8, 4, 2), [level[..., :1] for level in levels(8, 4, 2, 1)]):
        with pytest.raises(ValueError, match='levels'):
            net(wrong)


def test_what_is_no_target_is_refused_and_denoising_can_be_left_out():
    with pytest.raises(ValueError, match='expected cx cy w h in shares'):
        model()(levels(8, 4, 2, 1), [dict(labels=torch.tensor([0]), boxes=torch.tensor([[30.0, 40, 10, 10]]))] * 2)
    assert 'denoising' not in model(denoising=0)(levels(8, 4, 2, 1), lesions(1, 1))


def test_the_best_proposals_start_the_decoder_and_its_content_is_learned():
    net, pyramid, seen = model().eval(), levels(8, 4, 2, 1), []
    net.decoder[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    outputs = net(pyramid)
    logits, boxes = outputs['proposals']
    assert (logits[:, :, 0].diff(dim=1) <= 0).all()
    x, _, references = seen[0][:3]
    torch.testing.assert_close(references, boxes)
    assert not references.requires_grad and boxes.requires_grad
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], net.content.weight)
    with pytest.raises(ValueError, match='only 85 cells propose'):
        model(queries=86)(pyramid)


def test_cells_at_the_very_edge_do_not_propose():
    """(j + 0.5) / 74 is below 0.01 for the first of 74 cells."""
    net = model(queries=200).eval()
    outputs = net(levels(74, 2, 2, 1))
    centres = outputs['proposals'][1][:, :, :2]              # boxes start where they are
    assert centres.min() > 0.0101 and centres.max() < 0.9899


def test_look_forward_twice_a_layer_learns_from_the_box_of_the_next_alone():
    """With the content of layer 1 cut off, its box depends on layer 0 only through the undetached reference."""
    class Cut(torch.nn.Module):
        def forward(self, x, *_):
            return torch.zeros_like(x)

    net = model(encoder=0)
    torch.nn.init.normal_(net.box_head.layers[-1].weight)
    net.decoder[1] = Cut()
    _, boxes = net(levels(8, 4, 2, 1))['layers'][1]
    boxes.sum().backward()
    assert net.decoder[0].mlp.layers[0].weight.grad.abs().max() > 0
    assert net.decoder[2].mlp.layers[0].weight.grad is None       # nor the layer after it
    assert net.proposal_box.layers[0].weight.grad is None   # where the decoder starts is cut off from the gradient


def test_images_without_lesions_give_every_parameter_a_gradient():
    """DDP waits for each, 0 or not."""
    for counts in ((0, 0), (1, 0)):
        net = model()
        targets = lesions(*counts)
        loss = detr.total(detr.losses(net(levels(8, 4, 2, 1), targets), targets)) / max(sum(counts), 1)
        loss.backward()
        assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_targets_change_nothing_but_the_denoising():
    """The matching queries see no answer, so their boxes are the same with and without."""
    net, pyramid = model(), levels(8, 4, 2, 1)
    plain, told = net(pyramid), net(pyramid, lesions(2, 1))
    for a, b in zip([plain['proposals'], *plain['layers']], [told['proposals'], *told['layers']]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert 'denoising' not in plain and 'denoising' not in net.eval()(pyramid, lesions(2, 1))


def test_it_learns_to_box_a_bright_square():
    """A pyramid whose first channel shows squares: after 60 steps the best box of new ones overlaps them."""
    def example(rng):
        corner, side = torch.randint(0, 5, (2,), generator=rng), int(torch.randint(2, 4, (), generator=rng))
        fine = torch.zeros(32, 8, 8)
        fine[0, corner[0]:corner[0] + side, corner[1]:corner[1] + side] = 3
        box = torch.tensor([corner[1] + side / 2, corner[0] + side / 2, side, side]) / 8
        return fine, dict(labels=torch.zeros(1, dtype=torch.long), boxes=box[None])

    rng, net = torch.Generator().manual_seed(4), model(levels=2)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(61):
        fine, targets = zip(*(example(rng) for _ in range(8)))
        pyramid = [torch.stack(fine), torch.nn.functional.avg_pool2d(torch.stack(fine), 2)]
        outputs = net(pyramid, targets)
        if step < 60:
            optimizer.zero_grad()
            (detr.total(detr.losses(outputs, targets)) / 8).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    logits, boxes = outputs['layers'][-1]
    best = boxes[torch.arange(8), logits[:, :, 0].argmax(1)]
    overlap = detr.generalized_iou(detr.corners(best), detr.corners(torch.cat([t['boxes'] for t in targets])))
    assert overlap.mean() > 0.6, overlap
