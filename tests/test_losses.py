"""losses.py: the official DINOv2 losses in value and gradient, and the paper's claims about them."""
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import CASES

from losses import Center, Head, adjacent_loss, chunked_patch_loss, first_of_each, image_loss, koleo, patch_loss

ARCHIVE = np.load(CASES / 'losses.npz')


def case(kind, i):
    return {k.split('/', 2)[2]: torch.from_numpy(ARCHIVE[k]) for k in ARCHIVE.files if k.startswith(f'{kind}/{i}/')}


def assert_value_and_gradient(loss, x, c):
    gradient, = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss, c['loss'], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, c['grad'], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('i', range(3))
def test_image_loss_and_center_equal_the_official_code(i):
    c = case('image', i)
    center = Center(c['center'].shape[1])
    center.center.copy_(c['center'])
    teacher = center(c['teacher_logits'], c['teacher_temp'].item())
    torch.testing.assert_close(teacher, c['teacher'], rtol=1e-5, atol=1e-6)
    student = c['student'].requires_grad_()
    assert_value_and_gradient(image_loss(student, teacher), student, c)
    center.update(c['teacher_logits'])
    torch.testing.assert_close(center.center, c['center_after'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('i', range(3))
def test_patch_loss_and_koleo_equal_the_official_code(i):
    c = case('patch', i)
    student = c['student'].requires_grad_()
    assert_value_and_gradient(patch_loss(student, c['teacher'], c['weight'], images=len(c['mask'])), student, c)
    c = case('koleo', i)
    x = c['x'].requires_grad_()
    assert_value_and_gradient(koleo(x), x, c)


def test_loss_of_uniform_predictions_is_log_K():
    uniform = torch.full((2, 3, 50), 1 / 50)
    assert image_loss(torch.zeros(5, 3, 50), uniform).item() == pytest.approx(math.log(50), rel=1e-6)
    assert adjacent_loss(torch.zeros(3, 50), uniform[0]).item() == pytest.approx(math.log(50), rel=1e-6)
    weight = torch.full((3,), 1 / 3)                                # one masked crop of two, three patches masked
    assert patch_loss(torch.zeros(3, 50), uniform[0], weight, images=2).item() == pytest.approx(math.log(50) / 2)


def test_the_chunked_patch_loss_equals_the_plain_one_in_value_and_gradient():
    torch.manual_seed(0)
    x, W = (torch.randn(n, 8, dtype=torch.double, requires_grad=True) for n in (37, 21))
    p_t, weight = torch.randn(37, 21).softmax(-1), torch.rand(37)
    plain = patch_loss(x @ W.T, p_t, weight, images=6)
    expected = torch.autograd.grad(3 * plain, (x, W))
    for rows in (5, 37, 256):
        chunked = chunked_patch_loss(x, W, lambda chunk: p_t[chunk], weight, images=6, rows=rows)
        torch.testing.assert_close(chunked.double(), plain.double(), rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad(3 * chunked, (x, W)), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_no_masked_patch_and_no_pair_are_no_loss_and_no_nan():
    x, W, nothing = torch.zeros(0, 8), torch.randn(21, 8, requires_grad=True), torch.zeros(0, 21)
    loss = chunked_patch_loss(x, W, lambda chunk: nothing, torch.zeros(0), images=4) + adjacent_loss(x @ W.T, nothing)
    loss.backward()
    assert loss == 0 and (W.grad == 0).all()
    center = Center(21)
    center.update(nothing)
    assert (center.center == 0).all()


def test_adjacent_loss_counts_the_pairs_of_the_whole_step():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9), torch.randn(6, 9).softmax(-1)
    parts = adjacent_loss(student[:2], teacher[:2], pairs=6) + adjacent_loss(student[2:], teacher[2:], pairs=6)
    torch.testing.assert_close(parts, adjacent_loss(student, teacher))


def test_no_gradient_reaches_the_teacher():
    torch.manual_seed(0)
    logits, student = torch.randn(2, 3, 9, requires_grad=True), torch.randn(4, 3, 9, requires_grad=True)
    assert not Center(9)(logits, 0.04).requires_grad
    p_t = logits.softmax(-1)
    total = image_loss(student, p_t) + adjacent_loss(student[0], p_t[0]) \
        + patch_loss(student[0], p_t[0], torch.ones(3), images=1)
    total.backward()
    assert logits.grad is None and student.grad.abs().sum() > 0


def test_the_center_is_a_moving_average_over_rows_and_one_row_can_stand_for_many():
    torch.manual_seed(0)
    head, tokens = Head(16, 30, hidden=24, bottleneck=8), torch.randn(50, 16)
    slow, fast, fresh = Center(30), Center(30), Center(30)
    slow.update(head(tokens))
    torch.testing.assert_close(slow.center, 0.1 * head(tokens).mean(0, keepdim=True))
    embedded = head.embed(tokens)
    parts = torch.stack([embedded[:20].mean(0), embedded[20:].mean(0)])
    fast.update(head.last_layer(parts), count=torch.tensor([20, 30]))
    torch.testing.assert_close(fast.center, slow.center, rtol=1e-4, atol=1e-6)
    fresh.update(head(tokens), momentum=0)
    torch.testing.assert_close(fresh.center, 10 * slow.center)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(50))                   # so logits start as cosines


def test_koleo_is_finite_on_identical_rows_in_bf16_and_on_one_row():
    for x in (torch.ones(4, 8), torch.ones(4, 8).bfloat16(), torch.zeros(4, 8)):
        x = x.requires_grad_()
        loss = koleo(x)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
    assert koleo(torch.ones(1, 8)) == 0
    assert koleo(torch.tensor([[1., 0.], [-1., 0.]])).item() == pytest.approx(-math.log(2))


def test_koleo_does_not_push_slices_of_one_volume_apart():
    torch.manual_seed(0)
    x = torch.randn(5, 8)
    x[3] = x[1] + 1e-3                                              # two slices of volume 7
    x.requires_grad_()
    volume = torch.tensor([4, 7, 5, 7, 6])
    assert first_of_each(volume).tolist() == [True, True, True, False, True]
    loss = koleo(x, volume)
    loss.backward()
    assert loss < koleo(x) - 0.5 and (x.grad[3] == 0).all()


def results(inputs, rows=slice(None), tokens=slice(None)):
    """The loss, its gradient and the centre of one rank, or of one process with everything."""
    x, center = inputs['x'][rows].requires_grad_(), Center(9)
    loss = koleo(x, inputs['volume'][rows])
    loss.backward()
    center.update(inputs['logits'][tokens])
    return dict(loss=loss.detach(), grad=x.grad, center=center.center)


def one_of_two_ranks(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    rows, tokens = [(slice(0, 4), slice(0, 5)), (slice(4, 8), slice(5, 8))][rank]       # unequal shares of tokens
    torch.save(results(torch.load(f'{folder}/inputs.pt'), rows, tokens), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_ranks_give_the_loss_the_gradient_and_the_center_of_one(tmp_path):
    torch.manual_seed(0)
    inputs = dict(x=torch.randn(8, 6), volume=torch.tensor([0, 1, 1, 2, 3, 0, 4, 5]), logits=torch.randn(8, 9))
    torch.save(inputs, tmp_path / 'inputs.pt')
    mp.spawn(one_of_two_ranks, args=(str(tmp_path),), nprocs=2)
    whole, parts = results(inputs), [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part['loss'], whole['loss'])
        torch.testing.assert_close(part['center'], whole['center'])
    torch.testing.assert_close(torch.cat([part['grad'] / 2 for part in parts]), whole['grad'])     # DDP's mean
