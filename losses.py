"""The objective of MammoDINO (arXiv 2510.11883, 2.1-2.4), one function per equation; pretrain.py sums them up.

    L_total = lambda_1 L_DINO-M + lambda_2 L_iBOT-M + lambda_3 L_DINO-adj + lambda_4 L_KoLeo

Tokens come in, scalars come out. Student and teacher each carry a `Head` that turns a token (..., D) into logits
over K prototypes; the teacher's logits pass through a `Center` and become the targets:

    p_s = softmax(h_s(f_s(u)) / tau_s)            p_t = softmax((h_t(f_t(v)) - c) / tau_t)

Everything is computed in fp32, no gradient reaches the teacher, and under torch.distributed the centre and the
KoLeo neighbours span all ranks. Without a process group the same code runs on one process.

B images, U student views, V teacher views (the global ones), D width, E bottleneck, K prototypes, M masked patches,
P slice pairs.

Copy this file alone; it imports nothing of this repository.

    $ python losses.py       # the loss of an untrained network beside log K, and each term's gradient
"""
import math
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


# ---- tokens to logits: h_s and h_t --------------------------------------------------------------------------------

class Head(nn.Module):
    """DINO's projection head (DINO 3.1, as in DINOv2): three linear layers, L2 norm, K weight-normed prototypes.

    (..., width) -> logits (..., prototypes). The rows of the last layer keep a trainable length that starts at 1,
    so that a logit starts as the cosine between a token and a prototype.
    """

    def __init__(self, width, prototypes, hidden=2048, bottleneck=256):
        super().__init__()
        if prototypes < 2:
            raise ValueError(f'{prototypes} prototypes: a softmax needs at least 2')
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        nn.init.ones_(self.last_layer.parametrizations.weight.original0)

    def embed(self, x):
        """Tokens (..., width) -> unit vectors (..., E), what the last layer compares with its prototypes."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def forward(self, x):
        return self.logits(self.embed(x))

    def logits(self, embedded):
        """Unit vectors (..., E) -> (..., K). At tau = 0.04 the rounding of 16-bit logits would be seen in p: fp32."""
        with torch.autocast(embedded.device.type, enabled=False):
            return self.last_layer(embedded)


class Center(nn.Module):
    """The teacher's centering c (DINO 3.1; MammoDINO 2.2): an average of its logits, taken away before the softmax.

    `center(logits (..., K), temp)` -> probabilities (..., K), without gradient.
    `center.update(logits)` moves c once, over all rows of all ranks: c <- momentum c + (1 - momentum) mean(logits).
    """

    def __init__(self, prototypes, momentum=0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer('center', torch.zeros(1, prototypes))

    @torch.no_grad()
    def forward(self, logits, temp):
        return F.softmax((logits.float() - self.center).div_(temp), dim=-1)

    @torch.no_grad()
    def update(self, logits, count=None, momentum=None):
        """One step of the moving average from logits (..., K).

        The last layer is linear, so the mean of many logits is the logits of one mean embedding: such a row may
        stand for `count` (rows,) tokens, and (M, K) is never held. `momentum=0` starts c at this very mean.
        """
        logits = logits.float().flatten(0, -2)                                          # (rows, K)
        count = logits.new_ones(len(logits)) if count is None else count.to(logits)
        total = torch.cat([(count[:, None] * logits).sum(0), count.sum().view(1)])      # (K + 1,)
        if _world() > 1:
            dist.all_reduce(total)
        if total[-1] > 0:                                                               # a step may mask no patch
            mean = total[:-1] / total[-1]
            self.center.lerp_(mean[None], 1 - (self.momentum if momentum is None else momentum))


# ---- the four losses ----------------------------------------------------------------------------------------------

def image_loss(student, teacher, temp=0.1):
    """DINO-M (MammoDINO 2.2): student (U, B, K) logits, teacher (V, B, K) probabilities -> ().

        L = - 1/|pairs| sum_u sum_v mean_b sum_k p_t(v)_k log p_s(u)_k        for views u != v

    Views stand in the same order on both sides, globals first. The paper prints the sum over all pairs; DINO and
    DINOv2 leave out the pairs in which both sides see the same view, and so do we.
    """
    log_p = F.log_softmax(student.float() / temp, dim=-1)                               # (U, B, K)
    terms = []
    for u in range(len(student)):
        for v in range(len(teacher)):
            if u != v:
                terms.append(-(teacher[v].detach().float() * log_p[u]).sum(-1).mean())
    if not terms:
        raise ValueError('image_loss: one view gives no pair of different views; give the student at least two')
    return torch.stack(terms).mean()


def patch_loss(student, teacher, weight, images, temp=0.1):
    """iBOT-M (MammoDINO 2.3): student (M, K) logits, teacher (M, K) probabilities, weight (M,) -> ().

        L = - 1/images sum_j weight_j sum_k p_t(j)_k log p_s(j)_k             weight_j = 1 / |Omega| of j's image

    `images` counts every global crop, masked or not (DINOv2): with half of the crops masked the loss is half of the
    mean over masked crops.
    """
    log_p = F.log_softmax(student.float() / temp, dim=-1)                               # (M, K)
    return -(weight[:, None] * teacher.detach().float() * log_p).sum() / images


def chunked_patch_loss(student, prototypes, teacher, weight, images, temp=0.1, rows=256):
    """`patch_loss` through the last layer, never holding (M, K): the same value and gradients, a few rows at a time.

    student (M, E) embeddings and prototypes (K, E) have gradients; `teacher(slice) -> (rows, K) probabilities` makes
    the targets of some rows when they are needed. 16 images of 518 pixels mask about 6,600 patches: one (M, K) array of
    fp32 takes 1.6 GiB, and autograd would keep several.
    """
    with torch.autocast(student.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(student, prototypes, teacher, weight, temp, rows) / images


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum_j weight_j CE_j with logits = student @ prototypes.T. The gradients are made in `forward`, while the rows are
    at hand, from d CE / d logits = (p_s - p_t) / temp; `backward` only scales them."""

    @staticmethod
    def forward(ctx, student, prototypes, teacher, weight, temp, rows):
        loss = torch.zeros((), device=student.device)
        grad_student, grad_prototypes = torch.zeros_like(student), torch.zeros_like(prototypes)
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            p_t, w = teacher(chunk).float(), weight[chunk].float()                                  # (rows, K), (rows,)
            log_p = F.log_softmax(F.linear(student[chunk], prototypes).float().div_(temp), dim=-1)  # (rows, K)
            loss -= (p_t * log_p).sum(1) @ w
            grad_logits = log_p.exp_().sub_(p_t).mul_(w[:, None] / temp).to(student.dtype)          # (rows, K)
            grad_student[chunk] = grad_logits @ prototypes
            grad_prototypes.addmm_(grad_logits.T, student[chunk])
            del p_t, log_p, grad_logits                     # before the next ones are made
        ctx.save_for_backward(grad_student, grad_prototypes)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_student, grad_prototypes = ctx.saved_tensors
        return grad * grad_student, grad * grad_prototypes, None, None, None, None


def adjacent_loss(student, teacher, temp=0.1, pairs=None):
    """DINO-adj (MammoDINO 2.4): student (P, K) logits of slices k, teacher (P, K) probabilities of slices k +- d.

        L = - 1/pairs sum_i sum_j p_t(C_t)_j log p_s(C_s)_j                   pairs i, prototypes j; k counts slices

    The paper prints p_s(C_s) = softmax(C_t / tau_s); C_s is meant. `pairs` is the divisor, P by default. In training
    the losses of R ranks and A micro-batches are averaged, some without a pair: with the pairs of the step / (R A) that
    average is the mean over all pairs of the step. A batch without pairs gives 0.
    """
    log_p = F.log_softmax(student.float() / temp, dim=-1)                               # (P, K)
    pairs = len(student) if pairs is None else pairs
    return -(teacher.detach().float() * log_p).sum() / (pairs or 1)


def koleo(x, volume=None):
    """KoLeo (Sablayrolles et al. 2019, as in DINOv2): x (B, D) CLS tokens -> (), small when they spread out.

        L = - mean_i log min_{j != i} || x_i - x_j ||                         on L2-normalised rows

    Under several ranks the rows of all ranks are neighbours. `volume` (B,) ids keep one row of each id in the group:
    slices of one DBT volume are near-duplicates, and KoLeo would push apart what DINO-adj pulls together. Rows of
    2D mammograms have ids of their own. A group of one row has no neighbour and gives 0.
    """
    with torch.autocast(x.device.type, enabled=False):                                  # bf16 would merge neighbours
        x = F.normalize(gather(x.float()), dim=-1, eps=1e-8)
        if volume is not None:
            x = x[first_of_each(gather(volume))]
        if len(x) < 2:
            return 0 * x.sum()                              # still part of the graph
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-2).argmax(dim=1)                        # -2 is below any cosine
        distance = F.pairwise_distance(x, x[nearest], eps=1e-8)
        return -torch.log(distance + 1e-8).mean()


# ---- all ranks as one ---------------------------------------------------------------------------------------------

def _world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in rank order; the backward pass sums every rank's gradient for our rows. A loss that all
    ranks compute alike from gathered rows then comes out right once the ranks' gradients are averaged, as DDP does."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)                        # the buffer may be shared
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """x (B, ...) of this rank -> (ranks * B, ...) of all, with gradient. Every rank must bring the same B."""
    return _Gather.apply(x) if _world() > 1 else x


def first_of_each(ids):
    """ids (B,) -> bool (B,): True where an id appears for the first time."""
    return ~(ids[:, None] == ids[None]).tril(-1).any(dim=1)


if __name__ == '__main__':
    if {'-h', '--help'} & {*sys.argv}:
        sys.exit(print(__doc__))
    torch.manual_seed(0)
    B, D, K = 16, 128, 4096
    head, center = Head(D, K), Center(K)
    tokens = torch.randn(4, B, D, requires_grad=True)                                   # 2 global + 2 local views
    target = center(head(tokens[:2]).detach(), temp=0.04)
    terms = {
        'image_loss': image_loss(head(tokens), target),
        'patch_loss': patch_loss(head(tokens[0]), target[0], torch.full((B,), 1 / B), images=1),
        'adjacent_loss': adjacent_loss(head(tokens[0]), target[1]),
        'koleo': koleo(tokens[0]),
    }
    print(f'untrained, K = {K}, log K = {math.log(K):.3f}')
    for name, loss in terms.items():
        gradient, = torch.autograd.grad(loss, tokens, retain_graph=True)
        print(f'{name:14s} {loss.item():7.3f}   gradient norm {gradient.norm():.2e}')
