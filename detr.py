"""DINO-DETR (Zhang 2022, "DINO: DETR with improved denoising anchor boxes"; IHRRB-DINO 2.2): the levels of
a pyramid become a set of boxes. The self-supervision of the same name has nothing to do with it.

    head = DinoDetr(width=256, classes=1)
    outputs = head(levels, targets)             # levels: (B, C, h, w), fine to coarse; targets in training
    loss = total(losses(outputs, targets)) / max(lesions, 1)            # lesions of the whole batch
    logits, boxes = outputs['layers'][-1]       # (B, Q, O), (B, Q, 4)
    $ python detr.py                            # losses of an untrained head, layer by layer

1. Encoder: every cell reads from a few places of all levels (deformable attention, Zhu 2020).
2. Every cell proposes a box; the decoder starts from the best Q, with one learned vector for each.
3. Decoder: every layer moves the boxes a little. Boxes and lesions are matched one to one.
4. In training there are noisy copies of the lesions, to be restored, and noisier ones, to be rejected.

B images, L levels, N cells of all levels, C width, M heads of d channels, P points, Q queries, T denoising
queries, O classes, G lesions of an image, S the largest G of the batch. Places are x y, boxes cx cy w h, as
shares of the image. targets: for each image a dict of labels, int64 (G,), and boxes, fp32 (G, 4). All is
computed in fp32, also under autocast. Copy this file alone; it imports nothing of this repository.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn


# ---- the model ------------------------------------------------------------------------------------

class DinoDetr(nn.Module):
    """The defaults are the published code's but for `queries` (900 there, for crowded scenes) and `classes`.
    encoder, decoder: how many layers. centres: see `Grid.of`. denoising: how many noisy copies, 0 for none;
    lambda1, lambda2: see `denoising_queries`."""

    def __init__(self, width=256, classes=1, queries=300, encoder=6, decoder=6, heads=8, points=4,
                 hidden=2048, levels=4, denoising=100, centres=None, lambda1=1.0, lambda2=2.0):
        super().__init__()
        self.classes, self.queries, self.centres = classes, queries, centres
        self.denoising, self.lambda1, self.lambda2 = denoising, lambda1, lambda2
        sizes = levels, heads, points, hidden
        self.input_proj = nn.ModuleList(nn.Sequential(
            nn.Conv2d(width, width, 1), nn.GroupNorm(32, width)) for _ in range(levels))
        self.level_embed = nn.Parameter(torch.randn(levels, width))
        self.encoder = nn.ModuleList(EncoderLayer(width, *sizes) for _ in range(encoder))
        self.enc_output, self.enc_output_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.proposal_class = nn.Linear(width, classes)
        self.proposal_box = MLP(width, width, width, 4)
        self.content = nn.Embedding(queries, width)
        self.label_enc = nn.Embedding(classes + 1, width)   # the published shape, one more than is read
        self.ref_point_head = MLP(2 * width, width, width)
        self.decoder = nn.ModuleList(DecoderLayer(width, *sizes) for _ in range(decoder))
        self.norm = nn.LayerNorm(width)
        self.class_head, self.box_head = nn.Linear(width, classes), MLP(width, width, width, 4)
        for head in (self.class_head, self.proposal_class):
            nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))      # scores start at 0.01
        for head in (self.box_head, self.proposal_box):
            nn.init.zeros_(head.layers[-1].weight)                          # boxes start unmoved
            nn.init.zeros_(head.layers[-1].bias)

    def forward(self, levels, targets=None, draws=None):
        """levels: L times (B, C, h, w), fine to coarse -> dict: layers, a list of logits (B, Q, O) and boxes
        (B, Q, 4); proposals, one such pair; in training with targets also denoising, a list of (B, T, O) and
        (B, T, 4), and groups."""
        denoise = self.training and targets is not None and self.denoising > 0
        with torch.autocast(levels[0].device.type, enabled=False):
            grid = Grid.of(levels, self.centres)
            memory = self.encode([level.float() for level in levels], grid)             # (B, N, C)
            proposals, references = self.propose(memory, grid)                          # (B, Q, 4)
            x = self.content.weight.expand(len(memory), -1, -1)                         # (B, Q, C)
            T, mask = 0, None
            if denoise:
                noisy = denoising_queries(targets, self.queries, self.classes, self.denoising,
                                          lambda1=self.lambda1, lambda2=self.lambda2, draws=draws)
                T, mask = noisy.labels.shape[1], noisy.mask
                known = self.label_enc(noisy.labels.clamp_min(0)) * (noisy.labels >= 0)[..., None]
                x = torch.cat([known, x], dim=1)                                        # (B, T + Q, C)
                references = torch.cat([noisy.boxes, references], dim=1)                # (B, T + Q, 4)
            layers = self.decode(x, references.sigmoid(), memory, grid, mask)
        outputs = dict(proposals=proposals, layers=[(a[:, T:], b[:, T:]) for a, b in layers])
        if denoise:
            outputs.update(denoising=[(a[:, :T], b[:, :T]) for a, b in layers], groups=noisy.groups)
        return outputs

    def encode(self, levels, grid):
        """Levels -> all cells after the encoder (B, N, C), by level, row, column"""
        x = [f(level).flatten(2) for f, level in zip(self.input_proj, levels, strict=True)]
        x = torch.cat(x, dim=2).transpose(1, 2)                                         # (B, N, C)
        # The published code takes the far edge of a cell, (j + 1) / n, as its position, not its centre.
        positions = sine(grid.centres + grid.step[grid.level] / 2, x.shape[-1] // 2, temperature=20)
        positions = positions + self.level_embed.index_select(0, grid.level)            # (N, C)
        for layer in self.encoder:
            x = layer(x, positions, grid.centres[None, :, None], grid)
        return x

    def propose(self, memory, grid):
        """Mixed query selection (DINO 3.4): cells (B, N, C) -> logits and boxes of the best Q proposals, and
        these boxes before the sigmoid, detached, (B, Q, 4): there the decoder starts. A proposal starts as a
        square around its cell, of 0.05 of the image and twice that on each coarser level. Cells within 0.01
        of the edge and squares above 0.99 propose nothing; the published code puts them at infinity."""
        side = 0.05 * 2.0 ** grid.level[:, None]                                        # (N, 1)
        square = torch.cat([grid.centres, side, side], dim=1)                           # (N, 4)
        valid = ((square > 0.01) & (square < 0.99)).all(1)
        if valid.sum() < self.queries:
            raise ValueError(f'only {int(valid.sum())} cells, {self.queries} queries; take fewer')
        x = self.enc_output_norm(self.enc_output(memory))                               # (B, N, C)
        score = self.proposal_class(x).amax(-1).masked_fill(~valid, -math.inf)          # (B, N)
        best = score.topk(self.queries, dim=1).indices                                  # (B, Q)
        x = x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1]))                 # (B, Q, C)
        references = self.proposal_box(x) + torch.log(square / (1 - square))[best]      # (B, Q, 4)
        return (self.proposal_class(x), references.sigmoid()), references.detach()

    def decode(self, x, references, memory, grid, mask):
        """x (B, T + Q, C), references (B, T + Q, 4) -> logits and boxes of each layer. Look forward twice
        (DINO 3.5; IHRRB-DINO Eq. 3 and 4): layer i starts from boxes b_{i-1}, which are detached, but its
        prediction adds to b'_{i-1}, which are not, so that its loss also trains layer i - 1. As in the
        published code, predictions come from norm(x) and the next boxes from x, not from one delta."""
        layers, undetached = [], references
        for layer in self.decoder:
            positions = sine(references, x.shape[-1] // 2, temperature=10000)           # (B, T + Q, 2 C)
            x = layer(x, self.ref_point_head(positions), references, memory, grid, mask)
            normed = self.norm(x)
            boxes = (self.box_head(normed) + inverse_sigmoid(undetached)).sigmoid()
            layers.append((self.class_head(normed), boxes))
            undetached = (self.box_head(x) + inverse_sigmoid(references)).sigmoid()     # b'_i
            references = undetached.detach()                                            # b_i
        return layers


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
    """Deformable self-attention of all cells (B, N, C), then an MLP, each followed by LayerNorm"""

    def __init__(self, width, levels, heads, points, hidden):
        super().__init__()
        self.self_attn = DeformableAttention(width, levels, heads, points)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = MLP(width, hidden, width)

    def forward(self, x, positions, references, grid):
        x = self.norm1(x + self.self_attn(x + positions, references, x, grid))
        return self.norm2(x + self.mlp(x))


class DecoderLayer(nn.Module):
    """Self-attention of the queries, deformable attention to the cells, an MLP, each followed by LayerNorm"""

    def __init__(self, width, levels, heads, points, hidden):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attn = DeformableAttention(width, levels, heads, points)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = MLP(width, hidden, width)

    def forward(self, x, positions, references, memory, grid, mask=None):
        """x, positions (B, T + Q, C), references (B, T + Q, 4), memory (B, N, C), mask: see `Denoising`"""
        q = x + positions
        x = self.norm2(x + self.self_attn(q, q, x, attn_mask=mask, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn(x + positions, references[:, :, None], memory, grid))
        return self.norm3(x + self.mlp(x))


class DeformableAttention(nn.Module):
    """Each query and head reads P places of each level (Zhu 2020), at offsets and with weights linear in the
    query. At the start all weights are equal, and head m reads along ray m of M, at 1 to P units from the
    reference. A unit is a cell of the level if that is a place, and 1 / (2 P) of the side of a box."""

    def __init__(self, width, levels=4, heads=8, points=4):
        super().__init__()
        self.split = heads, levels, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj, self.output_proj = nn.Linear(width, width), nn.Linear(width, width)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        angle = torch.arange(heads) * 2 * math.pi / heads
        ray = torch.stack([angle.cos(), angle.sin()], dim=-1)
        ray = ray / ray.abs().amax(-1, keepdim=True)                                    # (M, 2), on a square
        rays = ray[:, None, None] * torch.arange(1, points + 1)[:, None]                # (M, 1, P, 2)
        self.sampling_offsets.bias.data.copy_(rays.expand(-1, levels, -1, -1).flatten())

    def forward(self, query, references, value, grid):
        """query (B, Q, C), value (B, N, C), references (B, Q, L or 1, 2 or 4) -> (B, Q, C). It reads at
        place + offset * cell, or at centre + offset * side / (2 P) of a box."""
        M, L, P = self.split
        offsets = self.sampling_offsets(query).unflatten(-1, (M, L, P, 2))
        weights = self.attention_weights(query).unflatten(-1, (M, L * P)).softmax(-1)   # (B, Q, M, L P)
        references = references[:, :, None, :, None]                    # (B, Q, 1, L or 1, 1, 2 or 4)
        scale = grid.step[:, None] if references.shape[-1] == 2 else references[..., 2:] / (2 * P)
        locations = grid.within(references[..., :2] + offsets * scale)                  # (B, Q, M, L, P, 2)
        value = self.value_proj(value).unflatten(-1, (M, -1))                           # (B, N, M, d)
        return self.output_proj(deformable_attention(value, grid.shapes, locations, weights))


def deformable_attention(value, shapes, locations, weights):
    """Weighted sum of bilinear reads, 0 outside the image, for which the published code has a CUDA kernel:
    value (B, N, M, d), cells by level, row, column; shapes: L times (h, w); locations (B, Q, M, L, P, 2), x y
    in shares of the level; weights (B, Q, M, L P) -> (B, Q, M d)"""
    B, Q, M = locations.shape[:3]
    read = []
    for i, level in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        image = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shapes[i])        # (B M, d, h, w)
        places = locations[:, :, :, i].transpose(1, 2).flatten(0, 1)                    # (B M, Q, P, 2)
        read.append(F.grid_sample(image, 2 * places - 1, align_corners=False))          # (B M, d, Q, P)
    weights = weights.flatten(3).transpose(1, 2).flatten(0, 1).unsqueeze(1)             # (B M, 1, Q, L P)
    mixed = (torch.cat(read, -1) * weights).sum(-1)                                     # (B M, d, Q)
    return mixed.reshape(B, -1, Q).transpose(1, 2)


# ---- contrastive denoising (DINO 3.3; IHRRB-DINO 2.2) ---------------------------------------------

class Denoising(NamedTuple):
    """Lesion g of an image stands in group i at column 2 i S + g as a positive copy, with little noise, and
    at (2 i + 1) S + g as a negative one, with more. The other columns are padding."""
    labels: torch.Tensor    # (B, T), -1 for padding
    boxes: torch.Tensor     # (B, T, 4), before the sigmoid; 0 for padding
    mask: torch.Tensor      # bool (T + Q, T + Q), True where a query (row) must not see another (column)
    groups: int


def denoising_queries(targets, queries, classes, number=100, label_noise=0.5, box_noise=0.4,
                      lambda1=1.0, lambda2=2.0, draws=None):
    """Noisy copies of the lesions, n in all, in number // S groups, at least one -> Denoising. Each edge
    moves in or out by u * box_noise half sides; u is uniform in 0 … lambda1 for positive copies, in lambda1 …
    lambda2 for negative ones. With probability label_noise / 2 a label is drawn anew. No group sees another,
    and the Q matching queries see none, or they could copy the solution. The papers print no lambdas; the
    published code has 1 and 2, and 2 * number groups below 50. draws: the random numbers, for tests."""
    counts = [len(target['labels']) for target in targets]
    S, device = max(counts), targets[0]['boxes'].device
    groups = max(1, number // S) if S else 1
    labels = torch.cat([target['labels'] for target in targets]).repeat(2 * groups)     # (n,)
    boxes = torch.cat([target['boxes'] for target in targets]).repeat(2 * groups, 1)    # (n, 4)
    part = torch.arange(2 * groups, device=device).repeat_interleave(sum(counts))       # even: positive
    anew = (draws[0] if draws else torch.rand(len(labels), device=device)) < label_noise / 2
    labels[anew] = draws[1] if draws else torch.randint(classes, (int(anew.sum()),), device=device)
    sign = 2 * (draws[2] if draws else torch.randint(2, boxes.shape, device=device).float()) - 1
    u = draws[3] if draws else torch.rand(boxes.shape, device=device)                   # (n, 4)
    u = torch.where(part[:, None] % 2 == 0, lambda1 * u, lambda1 + (lambda2 - lambda1) * u)
    moved = corners(boxes) + u * sign * (boxes[:, 2:] / 2).repeat(1, 2) * box_noise
    low, high = moved.clamp(0, 1).split(2, dim=1)                                       # (n, 2) each
    noisy = torch.cat([(low + high) / 2, high - low], dim=1)                            # (n, 4)

    B, T = len(targets), 2 * groups * S
    image = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(counts)])
    lesion = torch.cat([torch.arange(n, device=device) for n in counts])
    place = image.repeat(2 * groups), lesion.repeat(2 * groups) + S * part              # row, column
    query_labels = torch.full((B, T), -1, device=device).index_put(place, labels)
    query_boxes = torch.zeros(B, T, 4, device=device).index_put(place, inverse_sigmoid(noisy))
    column = torch.arange(T + queries, device=device)
    group = column // max(2 * S, 1)                         # the matching queries are in none of `groups`
    mask = (group[:, None] != group) & (column < T)
    return Denoising(query_labels, query_boxes, mask, groups)


# ---- matching and losses --------------------------------------------------------------------------

COSTS, WEIGHTS = (2.0, 5.0, 2.0), (1.0, 5.0, 2.0)           # focal, L1, GIoU: in matching, in the loss


def focal(logits, wanted, alpha=0.25, gamma=2.0):
    """-alpha_t (1 - p_t)^gamma log p_t (Lin 2017, Eq. 5) of each logit; wanted 0 or 1, of any shape"""
    sign = 2 * wanted - 1
    alpha_t = alpha * wanted + (1 - alpha) * (1 - wanted)
    return -alpha_t * torch.sigmoid(-sign * logits) ** gamma * F.logsigmoid(sign * logits)


@torch.no_grad()
def match(logits, boxes, targets):
    """The one-to-one assignment of least cost in each image: logits (B, Q, O), boxes (B, Q, 4) -> B times
    (queries, lesions), int64 (min(Q, G),) each, sorted by query. Raises FloatingPointError for NaN. The cost
    of a pair is 2 (rise of the focal loss if the query names the class) + 5 L1 - 2 GIoU."""
    labels, true = (nn.utils.rnn.pad_sequence([t[name] for t in targets], batch_first=True)
                    for name in ('labels', 'boxes'))                                    # (B, S), (B, S, 4)
    rise = (focal(logits, 1) - focal(logits, 0)).take_along_dim(labels[:, None], dim=2)     # (B, Q, S)
    distance = torch.cdist(boxes, true, p=1)
    overlap = generalized_iou(corners(boxes)[:, :, None], corners(true)[:, None])
    # One copy to the CPU, for the Hungarian method, and one back
    cost = (COSTS[0] * rise + COSTS[1] * distance - COSTS[2] * overlap).cpu()
    if not cost.isfinite().all():
        raise FloatingPointError('boxes or logits are not finite; is the learning rate too high?')
    counts = [len(target['labels']) for target in targets]
    pairs = [np.stack(linear_sum_assignment(c[:, :n])) for c, n in zip(cost, counts)]
    joined = torch.from_numpy(np.concatenate(pairs, axis=1)).to(boxes.device)
    return joined.split([pair.shape[1] for pair in pairs], dim=1)


def set_loss(logits, boxes, targets, pairs):
    """Sums over the batch of focal loss, L1 and 1 - GIoU, (3,): logits (B, Q, O), boxes (B, Q, 4). Queries in
    no pair (queries, lesions) of their image are background."""
    wanted = torch.zeros_like(logits)
    for i, (query, lesion) in enumerate(pairs):
        wanted[i, query, targets[i]['labels'][lesion]] = 1
    matched = torch.cat([boxes[i, query] for i, (query, _) in enumerate(pairs)])        # (pairs, 4)
    true = torch.cat([target['boxes'][lesion] for target, (_, lesion) in zip(targets, pairs)])
    return torch.stack([focal(logits, wanted).sum(), (matched - true).abs().sum(),
                        (1 - generalized_iou(corners(matched), corners(true))).sum()])


def losses(outputs, targets):
    """Outputs of `DinoDetr` -> {name: sums of focal loss, L1 and 1 - GIoU, (3,)} of the proposals, each layer
    and its denoising queries (means over groups). Divide by the lesions of the batch, at least 1."""
    predictions = dict(proposals=outputs['proposals'])
    predictions |= {f'layer {i}': layer for i, layer in enumerate(outputs['layers'])}
    # Usually each layer is matched by itself. All layers as one batch make a GPU wait once.
    logits, boxes = (torch.cat(parts) for parts in zip(*predictions.values()))          # (layers B, Q, O)
    pairs = iter(match(logits, boxes, targets * len(predictions)))
    sums = {name: set_loss(*prediction, targets, [next(pairs) for _ in targets])
            for name, prediction in predictions.items()}
    for i, (logits, boxes) in enumerate(outputs.get('denoising', ())):
        groups, device = outputs['groups'], logits.device
        starts = logits.shape[1] // groups * torch.arange(groups, device=device)[:, None]
        numbers = [torch.arange(len(target['labels']), device=device) for target in targets]
        # Only positive copies have a lesion; negative ones and padding are background.
        pairs = [((starts + lesion).flatten(), lesion.repeat(groups)) for lesion in numbers]
        sums[f'denoising {i}'] = set_loss(logits, boxes, targets, pairs) / groups
    return sums


def total(sums):
    """The loss: focal + 5 L1 + 2 (1 - GIoU), over everything that `losses` gives -> ()"""
    whole = sum(sums.values())                                                          # (3,)
    return (whole * whole.new_tensor(WEIGHTS)).sum()


@torch.no_grad()
def atd(outputs, targets, k=10):
    """Average top-k distance (DINO 3.3; IHRRB-DINO 2.2): the mean of the k largest || b_i - a_i ||_1 -> ().
    b_i: a lesion; a_i: the first box of the query whose last box is matched to it. NaN without a lesion."""
    pairs, first = match(*outputs['layers'][-1], targets), outputs['proposals'][1]
    distance = torch.cat([(boxes[query] - target['boxes'][lesion]).abs().sum(1)
                          for boxes, target, (query, lesion) in zip(first, targets, pairs)])
    return distance.topk(min(k, len(distance))).values.mean()


# ---- geometry -------------------------------------------------------------------------------------

class Grid(NamedTuple):
    """Where the cells lie in the image. A level need not cover it evenly: pooling an odd grid drops a row."""
    shapes: list            # L times (h, w)
    sides: torch.Tensor     # (L, 2), w h
    first: torch.Tensor     # (L, 2), x y of the centre of the first cell
    step: torch.Tensor      # (L, 2), from one centre to the next
    level: torch.Tensor     # (N,), of every cell by level, row, column
    centres: torch.Tensor   # (N, 2), x y of every cell

    @staticmethod
    def of(levels, centres=None):
        """centres: for square levels, (first, step) of each; by default cells share the image evenly,
        (0.5 / n, 1 / n), which is wrong where a level comes from an odd grid."""
        device, shapes = levels[0].device, [tuple(level.shape[-2:]) for level in levels]
        sides = torch.tensor([(w, h) for h, w in shapes], device=device)
        first, step = 0.5 / sides, 1 / sides
        if centres is not None:
            first, step = torch.tensor(centres, device=device).T.unsqueeze(-1).expand(-1, -1, 2)
        cells = [torch.cartesian_prod(*(torch.arange(n, device=device) for n in s)) for s in shapes]
        level = torch.cat([torch.full_like(cell[:, 0], i) for i, cell in enumerate(cells)])
        centres = torch.cat([a + b * cell.flip(1) for a, b, cell in zip(first, step, cells)])
        return Grid(shapes, sides, first, step, level, centres)

    def within(self, places):
        """Places (..., L, P, 2) of the image -> of each level, where cell j of n is at (j + 0.5) / n"""
        scale = 1 / (self.step * self.sides)                                            # (L, 2), 1 if even
        return places * scale[:, None] + (0.5 / self.sides - self.first * scale)[:, None]


def sine(x, width, temperature):
    """Places or boxes (..., 2 or 4) -> `width` numbers for each of y, x, w and h, one after the other: sines
    and cosines in turn, of wavelengths from one side of the image to nearly `temperature` sides"""
    x = torch.cat([x[..., :2].flip(-1), x[..., 2:]], dim=-1)                            # y before x
    wavelength = temperature ** (2 * torch.arange(width // 2, device=x.device) / width)
    angle = 2 * math.pi * x[..., None] / wavelength                     # (..., 2 or 4, width / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)


def inverse_sigmoid(x, eps=1e-3):
    """log(x / (1 - x)) with x and 1 - x at least eps"""
    return torch.log(x.clamp(eps, 1) / (1 - x).clamp(eps, 1))


def corners(boxes):
    """cx cy w h -> x0 y0 x1 y1, (..., 4)"""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def generalized_iou(a, b):
    """IoU minus the share of the enclosing box that neither covers (Rezatofighi 2019): x0 y0 x1 y1, (..., 4)
    each, broadcast -> (...). The 1e-6 are the published code's and keep boxes without area finite."""
    (a0, a1), (b0, b1) = a.split(2, dim=-1), b.split(2, dim=-1)                         # (..., 2) each
    common = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp_min(0).prod(-1)
    around = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod(-1)
    union = (a1 - a0).prod(-1) + (b1 - b0).prod(-1) - common
    return common / (union + 1e-6) - (around - union) / (around + 1e-6)


if __name__ == '__main__':
    torch.manual_seed(0)
    head, levels = DinoDetr(), [torch.randn(1, 256, n, n) for n in (74, 37, 18, 9)]
    targets = [dict(labels=torch.tensor([0]), boxes=torch.tensor([[0.4, 0.6, 0.1, 0.1]]))]
    outputs = head(levels, targets)
    print(f'Untrained, random levels, one lesion: ATD(1) {atd(outputs, targets, 1):.3f}, losses')
    for name, (focal_loss, l1, giou) in losses(outputs, targets).items():
        print(f'  {name:12s} focal {focal_loss:.2f}   L1 {l1:.2f}   1 - GIoU {giou:.2f}')
