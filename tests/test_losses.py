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
def test_image_loss_equals_the_official_code(i):
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
def test_patch_loss_equals_the_official_code(i):
    c = case('patch', i)
    student = c['student'].requires_grad_()
    assert_value_and_gradient(patch_loss(student, c['teacher'], c['weight'], images=len(c['mask'])), student, c)


@pytest.mark.parametrize('i', range(3))
def test_koleo_equals_the_official_code(i):
    c = case('koleo', i)
    x = c['x'].requires_grad_()
    assert_value_and_gradient(koleo(x), x, c)


def test_image_loss_is_the_written_double_sum_over_different_views():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 3, 7), torch.randn(2, 3, 7).softmax(-1)
    total, pairs = 0.0, 0
    for u in range(2):
        for v in range(4):
            if u != v:
                pairs += 1
                for b in range(3):
                    p_s = (student[v, b] / 0.1).softmax(0)
                    total -= sum(teacher[u, b, k] * torch.log(p_s[k]) for k in range(7)) / 3
    assert image_loss(student, teacher).item() == pytest.approx(total.item() / pairs, rel=1e-5)


def test_loss_of_uniform_predictions_is_log_K():
    uniform = torch.full((2, 3, 50), 1 / 50)
    assert image_loss(torch.zeros(5, 3, 50), uniform).item() == pytest.approx(math.log(50), rel=1e-6)
    assert adjacent_loss(torch.zeros(3, 50), uniform[0]).item() == pytest.approx(math.log(50), rel=1e-6)
    weight = torch.full((3,), 1 / 3)                                # one masked crop of two, three patches masked
    assert patch_loss(torch.zeros(3, 50), uniform[0], weight, images=2).item() == pytest.approx(math.log(50) / 2)


def test_one_view_has_no_pair():
    with pytest.raises(ValueError, match='at least two'):
        image_loss(torch.zeros(1, 3, 5), torch.full((1, 3, 5), 0.2))


def test_the_chunked_patch_loss_equals_the_plain_one_in_value_and_gradient():
    torch.manual_seed(0)
    x, W = torch.randn(37, 8, dtype=torch.double, requires_grad=True), \
        torch.randn(21, 8, dtype=torch.double, requires_grad=True)
    p_t, weight = torch.randn(37, 21).softmax(-1), torch.rand(37)
    plain = patch_loss(x @ W.T, p_t, weight, images=6)
    for rows in (5, 37, 256):
        chunked = chunked_patch_loss(x, W, lambda rows: p_t[rows], weight, images=6, rows=rows)
        torch.testing.assert_close(chunked.double(), plain.double(), rtol=1e-5, atol=1e-6)
        expected = torch.autograd.grad(3 * plain, (x, W), retain_graph=True)
        for ours, theirs in zip(torch.autograd.grad(3 * chunked, (x, W)), expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_no_masked_patch_is_no_loss_and_no_nan():
    x, W = torch.zeros(0, 8, requires_grad=True), torch.randn(21, 8, requires_grad=True)
    loss = chunked_patch_loss(x, W, lambda rows: torch.zeros(0, 21), torch.zeros(0), images=4)
    loss.backward()
    assert loss == 0 and (W.grad == 0).all()
    center = Center(21)
    center.update(torch.zeros(0, 21))
    assert (center.center == 0).all()


def test_adjacent_loss_counts_the_pairs_of_the_whole_step_and_is_0_for_none():
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9).softmax(-1)
    parts = adjacent_loss(student[:2], teacher[:2], pairs=6) + adjacent_loss(student[2:], teacher[2:], pairs=6)
    torch.testing.assert_close(parts, adjacent_loss(student, teacher))
    none = adjacent_loss(student[:0], teacher[:0])
    none.backward()
    assert none == 0 and (student.grad == 0).all()


def test_no_gradient_reaches_the_teacher():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 9, requires_grad=True)
    teacher = Center(9)(logits, 0.04)
    assert not teacher.requires_grad
    probabilities = torch.randn(2, 3, 9, requires_grad=True)
    student = torch.randn(4, 3, 9, requires_grad=True)
    p_t = probabilities.softmax(-1)
    total = image_loss(student, p_t) + adjacent_loss(student[0], p_t[0]) \
        + patch_loss(student[0], p_t[0], torch.ones(3), images=1)
    total.backward()
    assert probabilities.grad is None and student.grad.abs().sum() > 0


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


def test_logits_start_as_cosines():
    head = Head(16, 30, hidden=24, bottleneck=8)
    assert head(torch.randn(100, 16)).abs().max() <= 1 + 1e-5
    with pytest.raises(ValueError, match='at least 2'):
        Head(16, 1)


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


def _two_ranks(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    inputs = torch.load(f'{folder}/inputs.pt')
    x = inputs['x'].chunk(2)[rank].requires_grad_()
    loss = koleo(x, inputs['volume'].chunk(2)[rank])
    loss.backward()
    center = Center(9)
    center.update(inputs['logits'][:5] if rank == 0 else inputs['logits'][5:])       # unequal shares
    mean_of_ddp = x.grad / 2
    torch.save({'loss': loss.detach(), 'grad': mean_of_ddp, 'center': center.center}, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_ranks_give_the_loss_the_gradient_and_the_center_of_one(tmp_path):
    torch.manual_seed(0)
    inputs = dict(x=torch.randn(8, 6), volume=torch.tensor([0, 1, 1, 2, 3, 0, 4, 5]), logits=torch.randn(8, 9))
    torch.save(inputs, tmp_path / 'inputs.pt')
    mp.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
    x = inputs['x'].requires_grad_()
    loss = koleo(x, inputs['volume'])
    loss.backward()
    center = Center(9)
    center.update(inputs['logits'])
    parts = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part['loss'], loss.detach())
        torch.testing.assert_close(part['center'], center.center)
    torch.testing.assert_close(torch.cat([p['grad'] for p in parts]), x.grad)
