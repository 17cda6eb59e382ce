"""detr.py: its parts equal the published detector on recorded cases, or loops that follow the definition. detr_small.pt
holds the results of a small model, recorded when the full-sized one equalled the published one."""
import math

import pytest
import torch
from conftest import CASES

import detr

CASE, WHOLE = (torch.load(CASES / f'{name}.pt', weights_only=True) for name in ('dino_detr', 'detr_small'))
SMALL = dict(width=32, queries=6, encoder=1, decoder=3, heads=4, points=2, hidden=32, denoising=4)
CENTRES = [(3.5 / 518, 7 / 518), (7 / 518, 14 / 518), (14 / 518, 28 / 518), (14 / 518, 56 / 518)]


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

@pytest.mark.parametrize('references, expected', [('r2', 'o2'), ('r4', 'o4')])          # places, boxes
def test_deformable_attention_equals_the_reference(references, expected):
    case = CASE['msda']
    attend = detr.DeformableAttention(64, levels=3, heads=case['n_heads'], points=case['n_points'])
    attend.load_state_dict(case['w'])
    grid = detr.Grid.of([torch.zeros(1, 1, h, w) for h, w in case['shapes'].tolist()])
    found = attend(case['q'], case[references], case['v'], grid)
    torch.testing.assert_close(found, case[expected], rtol=0, atol=1e-5)


def test_on_an_odd_grid_every_cell_reads_itself_at_its_true_centre():
    """P5 and P6 of a 37 x 37 grid do not cover the image; evenly shared cells would look up to 27 pixels beside."""
    pyramid = levels(74, 37, 18, 9, width=1, images=1)
    grid = detr.Grid.of(pyramid, CENTRES)
    value = torch.cat([level.flatten(2) for level in pyramid], 2).transpose(1, 2).unsqueeze(2)          # (1, N, 1, 1)
    places = grid.within(grid.centres[None, :, None, None, None].expand(1, -1, 1, 4, 1, 2))
    own = torch.nn.functional.one_hot(grid.level, 4)[None, :, None, :, None].float()    # weight 1 on the cell's level
    found = detr.deformable_attention(value, grid.shapes, places, own)
    torch.testing.assert_close(found, value.squeeze(-1), rtol=1e-3, atol=1e-3)
    assert 518 * (detr.Grid.of(pyramid).centres - grid.centres).abs().max() == pytest.approx(27.2, abs=0.1)


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
    truth = torch.tensor([[0.5, 0.4, 0.2, 0.3], [0.4, 0.6, 0.1, 0.2]])
    targets = [dict(labels=torch.zeros(2, dtype=torch.long), boxes=truth), *lesions(1)]
    torch.manual_seed(0)
    found = detr.denoising_queries(targets, queries=6, classes=1, number=100, lambda1=0.5, lambda2=1.5)
    assert found.groups == 50 and found.boxes.shape == (2, 200, 4)
    moved = detr.corners(found.boxes[0].sigmoid()).view(50, 2, 2, 4) - detr.corners(truth)
    shift = (moved.abs() / (truth[:, 2:] / 2).repeat(1, 2)).flatten(2) / 0.4            # (50, little and more, 8)
    # That none of 400 uniform draws lies in the last tenth of its range has a chance of .9^400 = 5e-19.
    assert 0.4 < shift[:, 0].max() < 0.5001
    assert 0.4999 < shift[:, 1].min() and 1.4 < shift[:, 1].max() < 1.5001


# ---- matching and losses --------------------------------------------------------------------------------------------

def test_matching_equals_the_reference_and_refuses_nan():
    case = CASE['match']
    found = detr.match(case['logits'], case['boxes'], case['targets'])
    for pair, expected in zip(found, case['idx'], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, expected))
    with pytest.raises(FloatingPointError, match='not finite'):
        detr.match(case['logits'] * math.nan, case['boxes'], case['targets'])


def test_atd_is_the_mean_of_the_k_largest_distances_from_lesions_to_the_first_boxes_of_their_queries():
    first, targets = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(5)), lesions(2, 1)
    last = torch.full((2, 4, 4), 0.9)                       # query 3 - g ends at lesion g
    for image, target in enumerate(targets):
        last[image, 3 - torch.arange(len(target['boxes']))] = target['boxes']
    outputs = dict(proposals=(None, first), layers=[None, (torch.zeros(2, 4, 1), last)])
    distances = sorted(((first[b, 3 - g] - box).abs().sum().item() for b, target in enumerate(targets)
                        for g, box in enumerate(target['boxes'])), reverse=True)
    for k in (1, 2, 3, 9):
        expected = sum(distances[:k]) / len(distances[:k])
        assert detr.atd(outputs, targets, k).item() == pytest.approx(expected, rel=1e-5)


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
    assert net.proposal_class.bias.sigmoid().item() == net.class_head.bias.sigmoid().item() == pytest.approx(0.01)
    sides = net(levels(8, 4, 2, 1))['proposals'][1][..., 2:]
    assert (sides.unsqueeze(-1) - torch.tensor([0.05, 0.1, 0.2, 0.4])).abs().amin(-1).max() < 1e-5
    offsets = net.encoder[0].self_attn.sampling_offsets
    rays = offsets.bias.view(4, 4, 2, 2)                                                # heads, levels, points, x y
    assert torch.equal(rays[0, :, :, 0], torch.tensor([[1.0, 2]] * 4)) and rays[0, ..., 1].abs().max() == 0
    assert not offsets.weight.any() and not net.encoder[0].self_attn.attention_weights.weight.any()


def test_autocast_changes_nothing():
    net, pyramid = model().eval(), levels(8, 4, 2, 1)
    plain = net(pyramid)['layers'][-1]
    with torch.autocast('cpu', torch.bfloat16):
        cast = net(pyramid)['layers'][-1]
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(cast, plain))


def test_cells_at_the_very_edge_do_not_propose():
    """(j + 0.5) / 74 is below 0.01 for the first of 74 cells."""
    centres = model(queries=200).eval()(levels(74, 2, 2, 1))['proposals'][1][:, :, :2]  # boxes start where they are
    assert centres.min() > 0.0101 and centres.max() < 0.9899


@pytest.mark.parametrize('counts', [(0, 0), (1, 0)])
def test_images_without_lesions_give_every_parameter_a_gradient(counts):
    """DDP waits for each, 0 or not."""
    net, targets = model(), lesions(*counts)
    loss = detr.total(detr.losses(net(levels(8, 4, 2, 1), targets), targets)) / max(sum(counts), 1)
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_targets_change_nothing_but_the_denoising():
    """The matching queries see no answer, so their boxes are the same with and without."""
    net, pyramid = model(), levels(8, 4, 2, 1)
    plain, noisy = net(pyramid), net(pyramid, lesions(2, 1))
    for a, b in zip([plain['proposals'], *plain['layers']], [noisy['proposals'], *noisy['layers']]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert 'denoising' not in plain and 'denoising' not in net.eval()(pyramid, lesions(2, 1))
