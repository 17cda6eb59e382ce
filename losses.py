"""The objective of MammoDINO (arXiv 2510.11883, 2.1 to 2.4), one function per equation.

    L_total = lambda_1 L_DINO-M + lambda_2 L_iBOT-M + lambda_3 L_DINO-adj + lambda_4 L_KoLeo

Student and teacher each have one `Head` h that turns CLS and patch tokens of the encoder f into logits
over K prototypes, tied for both kinds of token as by default in DINOv2. The teacher's logits, less a
centre c, become the targets; CLS and patch logits have different means, so each kind has its own `Center`.
The temperatures tau are the arguments `temp`:

    p_s = softmax(h_s(f_s(u)) / tau_s)            p_t = softmax((h_t(f_t(v)) - c) / tau_t)

No loss is computed in bf16, even under autocast, and no gradient reaches the teacher. Under
torch.distributed the centre and the neighbours of KoLeo span all ranks.

B images, U student views, V teacher views (the globals), D width, E bottleneck, K prototypes, M masked
patches, P slice pairs, () a scalar. Copy this file alone; it imports nothing of this repository.

    $ python losses.py              # the losses of an untrained network beside log K, and their gradients
"""
import math
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


# ---- tokens to probabilities ----------------------------------------------------------------------

class Head(nn.Module):
    """DINO's projection head (DINO 3.1, as in DINOv2): tokens (..., D) -> logits (..., K).

    Three linear layers, L2 normalisation, then K prototypes with weight normalisation. Their lengths are
    trainable, as in DINOv2, and start at 1: a logit starts as the cosine of an embedding and a prototype.
    """

    def __init__(self, width, prototypes, hidden=2048, bottleneck=256):
        super().__init__()
        if prototypes < 2:
            raise ValueError(f'{prototypes} prototypes: a softmax needs at least 2')
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(),
                                 nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        nn.init.ones_(self.last_layer.parametrizations.weight.original0)                # the lengths

    def forward(self, x):
        return self.logits(self.embed(x))

    def embed(self, x):
        """Tokens (..., D) -> unit vectors (..., E), the input of the last layer."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def logits(self, embedded):
        """Unit vectors (..., E) -> logits (..., K), never in bf16: at tau = 0.04, it would change p."""
        with torch.autocast(embedded.device.type, enabled=False):
            return self.last_layer(embedded)


class Center(nn.Module):
    """The teacher's centring vector c (DINO 3.1; MammoDINO 2.2), a moving average of its logits.

    `center(logits, temp)` -> probabilities of the same shape (..., K), without gradient.
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
        """c <- momentum c + (1 - momentum) mean(logits), over the rows (..., K) of all ranks.

        Row i may be the mean logits of count[i] tokens: the last layer is linear, so these are the logits of
        their mean embedding, and the (M, K) logits are never built. `momentum=0` sets c to the mean.
        """
        logits = logits.float().flatten(0, -2)                                          # (rows, K)
        count = logits.new_ones(len(logits)) if count is None else count.to(logits)
        total = torch.cat([(count[:, None] * logits).sum(0), count.sum().view(1)])      # (K + 1,)
        if world_size() > 1:
            dist.all_reduce(total)
        mean = total[:-1] / total[-1].clamp_min(1)
        momentum = self.momentum if momentum is None else momentum
        # A step may mask no patch at all: then c stays. `if total[-1] > 0` would make a GPU wait.
        self.center.lerp_(mean[None], (1 - momentum) * (total[-1] > 0).float())


# ---- the four losses ------------------------------------------------------------------------------

def image_loss(student, teacher, temp=0.1):
    """DINO-M (MammoDINO 2.2): student logits (U, B, K), teacher probabilities (V, B, K) -> ().

        L = - 1/n sum_{u != v} mean_b sum_k p_t(v)_k log p_s(u)_k             n such pairs of views u, v

    Both sides list their views in the same order, globals first. The paper prints the sum over all
    pairs; DINO and DINOv2 leave out pairs of the same view, and so do we. Raises ValueError if no pair
    of different views is left.
    """
    log_p = F.log_softmax(student.float() / temp, dim=-1)                               # (U, B, K)
    terms = []
    for u in range(len(student)):
        for v in range(len(teacher)):
            if u != v:
                terms.append(-(teacher[v].detach().float() * log_p[u]).sum(-1).mean())
    if not terms:
        raise ValueError('image_loss: no pair of different views; give the student at least two')
    return torch.stack(terms).mean()


def patch_loss(student, teacher, weight, images, temp=0.1):
    """iBOT-M (MammoDINO 2.3): student logits (M, K), teacher probabilities (M, K), weight (M,) -> ().

        L = - 1/images sum_j weight_j sum_k p_t(j)_k log p_s(j)_k         weight_j = 1 / |Omega| of j's crop

    `images` is the number of global crops, masked or not, as in DINOv2: with half of the crops masked, the
    loss is half of the mean over masked crops. Training uses `chunked_patch_loss`, which needs less memory.
    """
    log_p = F.log_softmax(student.float() / temp, dim=-1)                               # (M, K)
    return -(weight[:, None] * teacher.detach().float() * log_p).sum() / images


def chunked_patch_loss(student, prototypes, teacher, weight, images, temp=0.1, rows=256):
    """`patch_loss` and the last layer in one, a few rows at a time: same value, same gradients.

    student (M, E) embeddings, prototypes (K, E), weight (M,); `teacher(chunk)` -> the probabilities
    (rows, K) of the patches in a slice of M, computed when they are needed. With thousands of masked patches
    and K = 65,536, one (M, K) array would take more than a GiB, and autograd would keep several.
    """
    with torch.autocast(student.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(student, prototypes, teacher, weight, temp, rows) / images


class _ChunkedCrossEntropy(torch.autograd.Function):
    """sum_j weight_j CE_j for logits = student @ prototypes.T.

    `forward` also computes the gradients, while the logits of the rows are in memory, from
    d CE / d logits = (p_s - p_t) / temp. `backward` only scales them.
    """

    @staticmethod
    def forward(ctx, student, prototypes, teacher, weight, temp, rows):
        """Arguments as in `chunked_patch_loss` -> ()"""
        loss = torch.zeros((), device=student.device)
        grad_student, grad_prototypes = torch.zeros_like(student), torch.zeros_like(prototypes)
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            p_t, w = teacher(chunk).float(), weight[chunk].float()                      # (rows, K), (rows,)
            logits = F.linear(student[chunk], prototypes).float().div_(temp)            # (rows, K)
            log_p = F.log_softmax(logits, dim=-1)                                       # (rows, K)
            loss -= (p_t * log_p).sum(1) @ w
            grad_logits = log_p.exp_().sub_(p_t).mul_(w[:, None] / temp).to(student.dtype)
            grad_student[chunk] = grad_logits @ prototypes
            grad_prototypes.addmm_(grad_logits.T, student[chunk])
            del p_t, logits, log_p, grad_logits             # free them before the next rows need memory
        ctx.save_for_backward(grad_student, grad_prototypes)
        return loss

    @staticmethod
    def backward(ctx, grad):
        grad_student, grad_prototypes = ctx.saved_tensors
        return grad * grad_student, grad * grad_prototypes, None, None, None, None


def adjacent_loss(student, teacher, temp=0.1, pairs=None):
    """DINO-adj (MammoDINO 2.4): student logits of V_k, teacher probabilities of V_k', (P, K) each -> ().

        L = - 1/pairs sum_i sum_k p_t(C_t)_ik log p_s(C_s)_ik                 pairs i, prototypes k

    The paper prints p_s(C_s) = softmax(C_t / tau_s), where C_s is meant. `pairs` is the divisor, P by
    default. In training it is the mean number of pairs in a micro-batch of the step, so that averaging over
    ranks and micro-batches gives the mean over all pairs.
    """
    log_p = F.log_softmax(student.float() / temp, dim=-1)                               # (P, K)
    pairs = len(student) if pairs is None else pairs
    return -(teacher.detach().float() * log_p).sum() / (pairs or 1)                     # 0 without a pair


def koleo(x, volume=None):
    """KoLeo (Sablayrolles et al. 2019): CLS tokens (B, D) -> (), small when they spread out.

        L = - mean_i log min_{j != i} || x_i - x_j ||                         for L2-normalised rows

    As in DINOv2, but neighbours are sought over all ranks, and of rows with the same `volume` id (B,) only
    the first takes part: slices of a volume are nearly equal, and KoLeo would push apart what DINO-adj
    pulls together. A single row has no neighbour and gives 0.
    """
    with torch.autocast(x.device.type, enabled=False):                              # bf16 merges neighbours
        x = F.normalize(gather(x.float()), dim=-1, eps=1e-8)                            # (ranks * B, D)
        if volume is not None:
            x = x[first_of_each(gather(volume))]
        if len(x) < 2:
            return 0 * x.sum()                                                          # keeps the graph
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-2).argmax(dim=1)                        # -2: below any cosine
        distance = F.pairwise_distance(x, x[nearest], eps=1e-8)
        return -torch.log(distance + 1e-8).mean()


# ---- all ranks as one -----------------------------------------------------------------------------

def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """The rows of all ranks, in rank order. Of a loss that all ranks compute from them alike, backward sums
    the equal gradients of our rows over the ranks; DDP then divides by the number of ranks."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)                    # autograd may share it
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """x (B, ...) of this rank -> (ranks * B, ...) of all, with gradient. Every rank must have the same B."""
    return _Gather.apply(x) if world_size() > 1 else x


def first_of_each(ids):
    """ids (B,) -> bool (B,), True where an id appears for the first time."""
    return ~(ids[:, None] == ids[None]).tril(-1).any(dim=1)


if __name__ == '__main__':
    if '-h' in sys.argv or '--help' in sys.argv:
        print(__doc__)
        sys.exit()
    torch.manual_seed(0)
    B, D, K = 16, 128, 4096
    head, center = Head(D, K), Center(K)
    tokens = torch.randn(4, B, D, requires_grad=True)               # two global and two local views
    target = center(head(tokens[:2]).detach(), temp=0.04)
    terms = dict(
        image_loss=image_loss(head(tokens), target),
        patch_loss=patch_loss(head(tokens[0]), target[0], torch.full((B,), 1 / B), images=1),
        adjacent_loss=adjacent_loss(head(tokens[0]), target[1]),
        koleo=koleo(tokens[0]))
    print(f'untrained, K = {K}, log K = {math.log(K):.3f}')
    for name, loss in terms.items():
        gradient, = torch.autograd.grad(loss, tokens, retain_graph=True)
        print(f'{name:14s} {loss.item():7.3f}   gradient norm {gradient.norm():.2e}')
