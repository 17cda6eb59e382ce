"""DINO-DETR: a feature pyramid becomes a set of boxes, without anchors and without non-maximum suppression (Zhang 2022,
"DETR with improved denoising anchor boxes"; IHRRB-DINO applies it to mammograms). "DINO" here is the detector, not the
self-supervision of the other files.

    head = DinoDetr(width=256, classes=1)
    outputs = head(levels, targets)             # levels: (B, C, h, w), fine to coarse; targets only while training
    loss = total(losses(outputs, targets)) / max(lesions_in_the_batch, 1)           # over all ranks; DDP takes means
    logits, boxes = outputs['layers'][-1]       # (B, Q, K), (B, Q, 4)

1. Encoder: every cell of every level looks at a few places of all levels (deformable attention, Zhu 2020).
2. Two stages: every cell proposes a box; the best Q become the decoder's first boxes, its content is learned.
3. Decoder: each layer moves the boxes a little; queries are matched to lesions one to one (Hungarian method).
4. Contrastive denoising: beside the Q queries, noisy copies of the true boxes. Small noise has to be undone, larger
   noise to be rejected.

B images, L levels, N cells of all levels, C width, M heads of d channels, P points, Q queries, T denoising queries, K
classes, G lesions. Places are x y, boxes cx cy w h, both in shares of the image. targets: one dict per image, labels
(G,) int64 from 0, boxes (G, 4) fp32, without lesions (0,) and (0, 4). All is computed in fp32, without autocast.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn


# ---- geometry -------------------------------------------------------------------------------------------------------

class Grid(NamedTuple):
    """Where the cells of a pyramid lie in the image. A level of n cells need not cover it evenly: pooling an odd grid
    drops its last row."""
    shapes: list            # L times (h, w)
    size: torch.Tensor      # (L, 2) w h
    first: torch.Tensor     # (L, 2) x y of the centre of the first cell
    step: torch.Tensor      # (L, 2) from one centre to the next
    centres: torch.Tensor   # (N, 2) x y of every cell, by level, row, column

    @staticmethod
    def of(levels, centres=None):
        """centres: (first, step) of each level, of square levels only; by default the cells share the image evenly,
        (0.5 / n, 1 / n)."""
        device, shapes = levels[0].device, [tuple(level.shape[-2:]) for level in levels]
        size = torch.tensor([(w, h) for h, w in shapes], device=device)
        first, step = 0.5 / size, 1 / size
        if centres is not None:
            if len(centres) != len(levels) or any(h != w for h, w in shapes):
                raise ValueError(f'{len(centres)} centres for levels of {shapes}; expected one for each, all square')
            first, step = torch.tensor(centres, device=device).T.unsqueeze(-1).expand(-1, -1, 2)
        cells = [torch.cartesian_prod(torch.arange(h, device=device), torch.arange(w, device=device)).flip(1)
                 for h, w in shapes]
        return Grid(shapes, size, first, step, torch.cat([a + b * cell for a, b, cell in zip(first, step, cells)]))

    def within(self, places):
        """Places (..., L, P, 2) of the image as shares of the extent of each level, as `deformable_attention` takes
        them: the centre of cell j of n is at (j + 0.5) / n."""
        scale = 1 / (self.step * self.size)                                             # (L, 2), 1 if evenly shared
        return places * scale[:, None] + (0.5 / self.size - self.first * scale)[:, None]


def inverse_sigmoid(x, eps=1e-3):
    """log(x / (1 - x)), x and 1 - x at least eps."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp_min(eps) / (1 - x).clamp_min(eps))


def corners(boxes):
    """cx cy w h -> x0 y0 x1 y1, (..., 4)"""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], dim=-1)


def generalized_iou(a, b):
    """Intersection over union less the empty share of the smallest box around both (Rezatofighi 2019): x0 y0 x1 y1,
    (..., 4) and (..., 4), broadcast -> (...). The 1e-6 are the reference's; they keep boxes without an area finite and
    pull those of a few pixels towards 0."""
    common = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp_min(0).prod(-1)
    around = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - common
    return common / (union + 1e-6) - (around - union) / (around + 1e-6)


def sine(x, width, temperature):
    """Places or lengths (...) in 0 … 1 -> (..., width): sines and cosines in turn, of wavelengths from one image side
    towards `temperature` of them."""
    wavelength = temperature ** (2 * torch.arange(width // 2, device=x.device) / width)
    angle = 2 * math.pi * x[..., None] / wavelength
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


# ---- deformable attention (Zhu 2020) --------------------------------------------------------------------------------

def deformable_attention(value, shapes, locations, weights):
    """Each query and head reads P places of each of L levels, bilinearly, black outside, and adds them up by weight.

    value (B, N, M, d): the cells of all levels by level, row, column. shapes: L times (h, w), N in all.
    locations (B, Q, M, L, P, 2): x y in shares of the level. weights (B, Q, M, L, P). -> (B, Q, M d)
    """
    if value.shape[1] != sum(h * w for h, w in shapes):
        raise ValueError(f'{value.shape[1]} cells for levels of {shapes}')
    B, Q, M = locations.shape[:3]
    read = []
    for i, level in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        image = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shapes[i])        # (B M, d, h, w)
        places = locations[:, :, :, i].transpose(1, 2).flatten(0, 1)                    # (B M, Q, P, 2)
        read.append(F.grid_sample(image, 2 * places - 1, align_corners=False))          # (B M, d, Q, P)
    weights = weights.flatten(3).transpose(1, 2).flatten(0, 1).unsqueeze(1)             # (B M, 1, Q, L P)
    mixed = (torch.cat(read, -1) * weights).sum(-1)                                     # (B M, d, Q)
    return mixed.reshape(B, -1, Q).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Places and weights are linear in the query. At the start weights are even, head m looks along ray m of M, its
    points from near to far by one unit each: cells of a level around a place, P-ths of half sides around a box."""

    def __init__(self, width, levels=4, heads=8, points=4):
        super().__init__()
        self.split = (heads, levels, points)
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle = torch.arange(heads) * 2 * math.pi / heads
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ray = ray / ray.abs().amax(-1, keepdim=True)                                    # (M, 2), on a square
        rays = ray[:, None, None] * torch.arange(1, points + 1)[:, None]                # (M, 1, P, 2)
        self.sampling_offsets.bias.data.copy_(rays.expand(-1, levels, -1, -1).flatten())

    def forward(self, query, references, value, grid):
        """query (B, Q, C), value (B, N, C) -> (B, Q, C). references (B, Q, L or 1, 2 or 4): it reads at place + offset
        * cell, or at middle + offset * side / (2 P) of a box."""
        M, L, P = self.split
        offsets = self.sampling_offsets(query).unflatten(-1, (M, L, P, 2))
        weights = self.attention_weights(query).unflatten(-1, (M, L * P)).softmax(-1)   # (B, Q, M, L P)
        references = references[:, :, None, :, None]                                    # (B, Q, 1, L or 1, 1, 2 or 4)
        scale = grid.step[:, None] if references.shape[-1] == 2 else references[..., 2:] / (2 * P)
        locations = grid.within(references[..., :2] + offsets * scale)                  # (B, Q, M, L, P, 2)
        value = self.value_proj(value).unflatten(-1, (M, -1))                           # (B, N, M, d)
        return self.output_proj(deformable_attention(value, grid.shapes, locations,
                                                     weights.unflatten(-1, (L, P))))


class MLP(nn.Module):
    """Linear layers with ReLU between them"""

    def __init__(self, *widths):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class EncoderLayer(nn.Module):
    """Deformable self-attention of all cells and an MLP, each followed by LayerNorm."""

    def __init__(self, width, levels, heads, points, hidden):
        super().__init__()
        self.self_attn = DeformableAttention(width, levels, heads, points)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = MLP(width, hidden, width)

    def forward(self, x, positions, references, grid):
        """x and positions (B, N, C), references (1, N, 1, 2) -> (B, N, C)"""
        x = self.norm1(x + self.self_attn(x + positions, references, x, grid))
        return self.norm2(x + self.mlp(x))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the cells around their boxes, an MLP, each followed by
    LayerNorm."""

    def __init__(self, width, levels, heads, points, hidden):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attn = DeformableAttention(width, levels, heads, points)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = MLP(width, hidden, width)

    def forward(self, x, positions, references, memory, grid, mask=None):
        """x and positions (B, T + Q, C), references (B, T + Q, 4), memory (B, N, C), mask (T + Q, T + Q), True where a
        query must not see another -> (B, T + Q, C)"""
        q = x + positions
        x = self.norm2(x + self.self_attn(q, q, x, attn_mask=mask, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn(x + positions, references[:, :, None], memory, grid))
        return self.norm3(x + self.mlp(x))


# ---- contrastive denoising (DINO 3.3; IHRRB-DINO 2.2) ---------------------------------------------------------------

class Denoising(NamedTuple):
    """Noisy copies of the true boxes as queries. Lesion g of an image stands in group i at column 2 i S + g with little
    noise, at (2 i + 1) S + g with more, S = lesions of the richest image; the rest is padding."""
    labels: torch.Tensor    # (B, T), -1 for padding
    boxes: torch.Tensor     # (B, T, 4) before the sigmoid, 0 for padding
    mask: torch.Tensor      # (T + Q, T + Q) bool, True where a query (row) must not see another (column)
    groups: int


def denoising_queries(targets, queries, classes, number=100, label_noise=0.5, box_noise=0.4, lambda1=1.0, lambda2=2.0,
                      draws=None):
    """-> Denoising, of number // S groups, at least one. (The reference takes a number below 50 for half the groups.)

    Each edge moves by u * box_noise half sides to either side, u uniform in 0 … lambda1 for the copies to restore, in
    lambda1 … lambda2 for those to reject. With probability label_noise / 2 a label is drawn anew. The Q matching
    queries see no denoising query, which would tell them the answer, and no group sees another.

    draws, for tests: the random numbers of n = 2 groups * all lesions: (n,) in 0 … 1, below label_noise / 2 for a new
    label; the new labels; (n, 4) 0 or 1, the sign; (n, 4) in 0 … 1, from which u is made.
    """
    counts = [len(target['labels']) for target in targets]
    most, lesions, device = max(counts), sum(counts), targets[0]['boxes'].device
    groups = max(1, number // most) if most else 1
    labels = torch.cat([target['labels'] for target in targets]).repeat(2 * groups)     # (n,)
    boxes = torch.cat([target['boxes'] for target in targets]).repeat(2 * groups, 1)    # (n, 4)
    if lesions and not (boxes.min() >= 0 and boxes.max() <= 1):
        raise ValueError(f'boxes from {boxes.min():.3g} to {boxes.max():.3g}; expected cx cy w h in shares, 0 … 1')
    half = torch.arange(2 * groups, device=device).repeat_interleave(lesions)           # (n,) of a group; even: restore

    chance = draws[0] if draws else torch.rand(len(labels), device=device)
    anew = chance < label_noise / 2
    labels[anew] = draws[1] if draws else torch.randint(classes, (int(anew.sum()),), device=device)

    sign = 2 * (draws[2] if draws else torch.randint(2, boxes.shape, device=device).float()) - 1        # (n, 4)
    u = draws[3] if draws else torch.rand(boxes.shape, device=device)
    u = torch.where(half[:, None] % 2 == 0, lambda1 * u, lambda1 + (lambda2 - lambda1) * u)
    half_sides = (boxes[:, 2:] / 2).repeat(1, 2)
    moved = (corners(boxes) + u * sign * half_sides * box_noise).clamp(0, 1)
    noisy = torch.cat([(moved[:, :2] + moved[:, 2:]) / 2, moved[:, 2:] - moved[:, :2]], dim=1)

    T = 2 * groups * most
    image = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(counts)]).repeat(2 * groups)   # (n,)
    column = torch.cat([torch.arange(n, device=device) for n in counts]).repeat(2 * groups) + most * half
    query_labels = torch.full((len(targets), T), -1, device=device)
    query_boxes = torch.zeros(len(targets), T, 4, device=device)
    query_labels[image, column] = labels
    query_boxes[image, column] = inverse_sigmoid(noisy)

    group = torch.arange(T, device=device) // max(2 * most, 1)
    mask = torch.zeros(T + queries, T + queries, dtype=torch.bool, device=device)
    mask[T:, :T] = True
    mask[:T, :T] = group[:, None] != group
    return Denoising(query_labels, query_boxes, mask, groups)


# ---- matching and losses --------------------------------------------------------------------------------------------

COSTS, WEIGHTS = (2.0, 5.0, 2.0), (1.0, 5.0, 2.0)           # class, L1, GIoU


def focal(logits, wanted, alpha=0.25, gamma=2.0):
    """-alpha_t (1 - p_t)^gamma log p_t (Lin 2017) of each logit; wanted 0 or 1, of any shape"""
    sign = 2 * wanted - 1
    alpha_t = alpha * wanted + (1 - alpha) * (1 - wanted)
    return -alpha_t * torch.sigmoid(-sign * logits) ** gamma * F.logsigmoid(sign * logits)


@torch.no_grad()
def match(logits, boxes, targets):
    """The one-to-one assignment of least cost, image by image: logits (B, Q, K), boxes (B, Q, 4) -> B times (queries,
    lesions), by query, min(Q, G) of them. A class costs what the focal loss would rise."""
    pairs = []
    for logit, box, target in zip(logits.float(), boxes.float(), targets):
        cost = COSTS[0] * (focal(logit, 1) - focal(logit, 0))[:, target['labels']] \
            + COSTS[1] * torch.cdist(box, target['boxes'], p=1) \
            - COSTS[2] * generalized_iou(corners(box)[:, None], corners(target['boxes'])[None])         # (Q, G)
        if not cost.isfinite().all():
            raise FloatingPointError('boxes or logits are not finite; is the learning rate too high?')
        pairs.append(tuple(torch.as_tensor(part, device=box.device) for part in linear_sum_assignment(cost.cpu())))
    return pairs


def set_loss(logits, boxes, targets, pairs):
    """Sums over the batch of focal loss, L1 and 1 - GIoU, (3,): queries that no pair (queries, lesions) names are
    background. logits (B, Q, K), boxes (B, Q, 4)."""
    wanted = torch.zeros_like(logits)
    for i, (query, lesion) in enumerate(pairs):
        wanted[i, query, targets[i]['labels'][lesion]] = 1
    found = torch.cat([boxes[i, query] for i, (query, _) in enumerate(pairs)])                          # (pairs, 4)
    true = torch.cat([target['boxes'][lesion] for target, (_, lesion) in zip(targets, pairs)])
    return torch.stack([focal(logits, wanted).sum(), (found - true).abs().sum(),
                        (1 - generalized_iou(corners(found), corners(true))).sum()])


def losses(outputs, targets):
    """{name: sums of focal loss, L1 and 1 - GIoU, (3,)} for the encoder's proposals, each decoder layer and its
    denoising queries; to be divided by the lesions of the batch, at least 1. Denoising sums are means over groups."""
    answers = dict(proposals=outputs['proposals']) | {f'layer {i}': a for i, a in enumerate(outputs['layers'])}
    sums = {name: set_loss(*answer, targets, match(*answer, targets)) for name, answer in answers.items()}
    for i, (logits, boxes) in enumerate(outputs.get('denoising', ())):
        groups = outputs['groups']
        starts = logits.shape[1] // groups * torch.arange(groups, device=logits.device)[:, None]        # (groups, 1)
        numbers = [torch.arange(len(target['labels']), device=logits.device) for target in targets]
        pairs = [((starts + lesion).flatten(), lesion.repeat(groups)) for lesion in numbers]            # to restore
        sums[f'denoising {i}'] = set_loss(logits, boxes, targets, pairs) / groups
    return sums


def total(sums):
    """What is minimised: focal + 5 L1 + 2 (1 - GIoU), over everything that `losses` gives. ()"""
    whole = sum(sums.values())
    return (whole * whole.new_tensor(WEIGHTS)).sum()


# ---- the model ------------------------------------------------------------------------------------------------------

class DinoDetr(nn.Module):
    """A pyramid (B, C, h, w) x L, fine to coarse -> boxes. Defaults are the reference's, but for `queries` (900 there,
    for the crowds of COCO) and `classes`. centres: see `Grid.of`; a pyramid over an odd grid needs them. denoising: the
    `number` of `denoising_queries`, 0 for none."""

    def __init__(self, width=256, classes=1, queries=300, encoder=6, decoder=6, heads=8, points=4, hidden=2048,
                 levels=4, denoising=100, centres=None):
        super().__init__()
        self.classes, self.queries, self.denoising, self.centres = classes, queries, denoising, centres
        sizes = levels, heads, points, hidden
        self.input_proj = nn.ModuleList(nn.Sequential(nn.Conv2d(width, width, 1), nn.GroupNorm(32, width))
                                        for _ in range(levels))
        self.level_embed = nn.Parameter(torch.randn(levels, width))
        self.encoder = nn.ModuleList(EncoderLayer(width, *sizes) for _ in range(encoder))
        self.enc_output, self.enc_output_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.proposal_class, self.proposal_box = nn.Linear(width, classes), MLP(width, width, width, 4)
        self.content = nn.Embedding(queries, width)         # of the queries, learned
        self.label_enc = nn.Embedding(classes + 1, width)   # content of denoising queries; the last is never read
        self.ref_point_head = MLP(2 * width, width, width)
        self.decoder = nn.ModuleList(DecoderLayer(width, *sizes) for _ in range(decoder))
        self.norm = nn.LayerNorm(width)
        self.class_head, self.box_head = nn.Linear(width, classes), MLP(width, width, width, 4)         # of all layers
        for head in (self.class_head, self.proposal_class):
            nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))                  # scores start at 0.01
        for head in (self.box_head, self.proposal_box):                                 # boxes start where they are
            nn.init.zeros_(head.layers[-1].weight)
            nn.init.zeros_(head.layers[-1].bias)

    def forward(self, levels, targets=None, draws=None):
        """levels: L times (B, C, h, w) -> dict: layers [(logits (B, Q, K), boxes (B, Q, 4))], proposals, one such pair;
        in training mode and with targets also denoising [(logits (B, T, K), boxes (B, T, 4))] and groups. Under DDP
        always give targets in training: without them the denoising embedding has no gradient to wait for."""
        if len(levels) != len(self.level_embed):
            raise ValueError(f'{len(levels)} levels; expected {len(self.level_embed)}')
        told, T, mask = self.training and targets is not None and self.denoising > 0, 0, None
        with torch.autocast(levels[0].device.type, enabled=False):
            grid = Grid.of(levels, self.centres)
            memory = self.encode([level.float() for level in levels], grid)
            proposals, references = self.propose(memory, grid)
            x = self.content.weight.expand(len(memory), -1, -1)                         # (B, Q, C)
            if told:
                noisy = denoising_queries(targets, self.queries, self.classes, self.denoising, draws=draws)
                T, mask = noisy.labels.shape[1], noisy.mask
                known = self.label_enc(noisy.labels.clamp_min(0)) * (noisy.labels >= 0).unsqueeze(-1)   # (B, T, C)
                x, references = torch.cat([known, x], dim=1), torch.cat([noisy.boxes, references], dim=1)
            answers = self.decode(x, references.sigmoid(), memory, grid, mask)
        outputs = dict(proposals=proposals, layers=[(a[:, T:], b[:, T:]) for a, b in answers])
        if told:
            outputs |= dict(denoising=[(a[:, :T], b[:, :T]) for a, b in answers], groups=noisy.groups)
        return outputs

    def encode(self, levels, grid):
        """All cells after the encoder, by level, row, column: (B, N, C)"""
        x = torch.cat([project(level).flatten(2) for project, level in zip(self.input_proj, levels)], 2).transpose(1, 2)
        cells = grid.size.prod(1)
        edges = grid.centres + grid.step.repeat_interleave(cells, dim=0) / 2            # the reference's (j + 1) / n
        positions = torch.cat([sine(edges[:, axis], x.shape[-1] // 2, temperature=20) for axis in (1, 0)], dim=-1)
        positions = positions + self.level_embed.repeat_interleave(cells, dim=0)        # (N, C), y before x
        for layer in self.encoder:
            x = layer(x, positions, grid.centres[None, :, None], grid)
        return x

    def propose(self, memory, grid):
        """Two-stage mixed query selection (DINO 3.4): every cell starts from a square of 0.05 of the image around its
        centre, twice as large on each coarser level. -> logits and boxes of the best Q cells, and these boxes before
        the sigmoid, (B, Q, 4), detached: they are where the decoder starts. Cells within 0.01 of the edge of the image
        do not propose, nor squares beyond 0.99 of it; the reference may choose them, as boxes at infinity."""
        side = 0.05 * 2.0 ** torch.arange(len(grid.shapes), device=memory.device).repeat_interleave(grid.size.prod(1))
        square = torch.cat([grid.centres, side[:, None].expand(-1, 2)], dim=1)          # (N, 4)
        valid = ((square > 0.01) & (square < 0.99)).all(1)
        if valid.sum() < self.queries:
            raise ValueError(f'{self.queries} queries, but only {int(valid.sum())} cells propose boxes; take fewer '
                             'queries or larger images')
        x = self.enc_output_norm(self.enc_output(memory))                               # (B, N, C)
        score = self.proposal_class(x).amax(-1).masked_fill(~valid, -math.inf)          # (B, N)
        best = score.topk(self.queries, dim=1).indices                                  # (B, Q)
        x = x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1]))                 # (B, Q, C)
        references = self.proposal_box(x) + torch.log(square / (1 - square))[best]      # (B, Q, 4)
        return (self.proposal_class(x), references.sigmoid()), references.detach()

    def decode(self, x, references, memory, grid, mask):
        """x (B, T + Q, C), references (B, T + Q, 4) -> logits and boxes of each layer.

        Look forward twice (DINO 3.5, IHRRB-DINO Eq. 3-4): a layer starts from boxes b that are cut off from the
        gradient, but its answer is counted from b' that are not, so that its loss also teaches the layer before. Its
        answer comes from norm(x), the next boxes from x, as in the reference; the equations have one delta."""
        answers, undetached = [], references
        for layer in self.decoder:
            width = x.shape[-1] // 2
            positions = self.ref_point_head(torch.cat([sine(references[..., i], width, temperature=10000)
                                                       for i in (1, 0, 2, 3)], dim=-1))  # y x w h: (B, T + Q, C)
            x = layer(x, positions, references, memory, grid, mask)
            answer = self.norm(x)
            answers.append((self.class_head(answer),
                            (self.box_head(answer) + inverse_sigmoid(undetached)).sigmoid()))
            undetached = (self.box_head(x) + inverse_sigmoid(references)).sigmoid()     # b'_i
            references = undetached.detach()                                            # b_i
        return answers
