"""RetinaNet on the tokens of a plain ViT (Lin 2017; DBT-DINO, arXiv 2512.13608, 6.2.3).

Copy this file alone; it imports nothing of this repository.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

LEVELS = dict(P3=(7, 3.5, 16), P4=(14, 7, 32), P5=(28, 14, 64), P6=(56, 14, 128))       # stride, first centre, base

RATIOS, SCALES = (0.5, 1.0, 2.0), (1.0, 1.26, 1.587)        # height / width; times the base

def grids(size):
    """Cells per side of P3 … P6: 74, 37, 18, 9 at 518. Pooling drops the last token of an odd grid."""
    patches = size // 14
    return 2 * patches, patches, patches // 2, (patches // 2 + 1) // 2


def anchors(size):
    """All anchors of a size x size image, (A, 4) x0 y0 x1 y1 in its pixels, 65,250 at 518: by level from P3, row,
    column, then nine shapes, the ratio in the outer loop.

    They sit where the cells look: max-pooling and a strided convolution over an odd grid leave P5 at 28 (j + 0.5) and
    P6 at 56 j + 14. size / cells times j + 0.5, as in the paper's code, is up to 27 pixels off.
    """
    levels = []
    for cells, (stride, first, base) in zip(grids(size), LEVELS.values()):
        centre = first + stride * torch.arange(cells, dtype=torch.float64)
        y, x = torch.meshgrid(centre, centre, indexing='ij')
        half = torch.tensor([(base * scale / math.sqrt(ratio) / 2, base * scale * math.sqrt(ratio) / 2)
                             for ratio in RATIOS for scale in SCALES], dtype=torch.float64)             # (9, 2)
        middle = torch.stack([x, y], dim=-1).view(-1, 1, 2)                             # (cells^2, 1, 2)
        levels.append(torch.cat([middle - half, middle + half], dim=-1).view(-1, 4))
    return torch.cat(levels).float()


def encode(boxes, anchors):
    """Boxes (n, 4) as seen from their anchors (n, 4): dx, dy in anchor sizes, log dw, log dh. (n, 4)"""
    size, anchor = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    shift = (boxes[:, 2:] + boxes[:, :2] - anchors[:, 2:] - anchors[:, :2]) / 2
    return torch.cat([shift / anchor, torch.log(size / anchor)], dim=1)


def decode(deltas, anchors):
    """`encode` undone, in fp32: (n, 4), (n, 4) -> boxes (n, 4), no side more than 1000 / 16 times its anchor's."""
    deltas, anchors = deltas.float(), anchors.float()
    anchor = anchors[:, 2:] - anchors[:, :2]
    middle = (anchors[:, 2:] + anchors[:, :2]) / 2 + deltas[:, :2] * anchor
    half = anchor * deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp() / 2
    return torch.cat([middle - half, middle + half], dim=1)


def intersection(a, b):
    """Common area of boxes a (n, 4) and b (m, 4) -> (n, m)"""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clamp_min(0).prod(-1)


def area(boxes):
    return (boxes[:, 2:] - boxes[:, :2]).prod(-1)

def pairwise_iou(a, b):
    """Intersection over union of boxes a (n, 4) and b (m, 4) -> (n, m), 0 where both are empty."""
    common = intersection(a, b)
    return common / (area(a)[:, None] + area(b)[None] - common).clamp_min(1e-12)


def match(boxes, anchors, high=0.5, low=0.4):
    """Which lesion each anchor answers for: boxes (G, 4), anchors (A, 4) -> (A,), its number, -1 for background (best
    IoU below `low`), -2 for ignored (between).

    The anchors that fit a lesion best are positive even below `low`, or small lesions would have none; each answers for
    the lesion that fits it best. `most > 0`: a lesion that touches no anchor would tie with all of them at 0.
    """
    if not len(boxes):
        return torch.full((len(anchors),), -1, device=anchors.device)
    overlap = pairwise_iou(boxes, anchors)                                                       # (G, A)
    best, lesion = overlap.max(0)
    matched = torch.where(best >= high, lesion, torch.where(best < low, -1, -2))
    most = overlap.max(1, keepdim=True).values
    return torch.where(((overlap == most) & (most > 0)).any(0), lesion, matched)


def nms(boxes, scores, iou=0.5, top=None):
    """Non-maximum suppression: boxes (n, 4), scores (n,) -> the numbers of those kept, best first, at most `top`.
    Every box that overlaps a kept one by more than `iou` goes."""
    order, kept = torch.sort(scores, descending=True, stable=True).indices, []
    while len(order) and len(kept) != top:
        kept.append(order[0])
        order = order[1:][pairwise_iou(boxes[order[:1]], boxes[order[1:]])[0] <= iou]
    return torch.stack(kept) if kept else order


class Pyramid(nn.Module):
    """The paper's neck: patch tokens (B, g g, D) -> four levels (B, C, cells, cells).

    The paper calls it a feature pyramid network and describes the simple pyramid of ViTDet (Li 2022): every level is
    made from the last token grid. A top-down path would add coarse maps of much meaning to fine ones of little; a plain
    ViT has one map, which means the same at every level.
    """

    def __init__(self, width, channels):
        super().__init__()
        self.reduce = nn.Linear(width, channels)            # a 1x1 convolution, before the tokens become a grid
        self.p3, self.p4, self.p5 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.p6 = nn.Conv2d(channels, channels, 3, padding=1, stride=2)

    def forward(self, tokens):
        side = math.isqrt(tokens.shape[1])
        x = self.reduce(tokens).transpose(1, 2).unflatten(2, (side, side))              # (B, C, g, g)
        finer = F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)
        p5 = self.p5(F.max_pool2d(x, 2))
        return [self.p3(finer), self.p4(x), p5, self.p6(p5)]


class Tower(nn.Module):
    """Four times 3x3 convolution, GroupNorm, ReLU, dropout; then the 3x3 convolution that answers, shared by all
    levels: (B, C, h, w) -> (B, outputs, h, w). Whole channels are dropped, at half the rate in the first three, as in
    the paper's code. It answers in fp32, since half precision has too few numbers to tell thousands of small scores
    apart."""

    def __init__(self, channels, outputs, dropout):
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(4))
        self.norm = nn.ModuleList(nn.GroupNorm(32, channels) for _ in range(4))
        self.drop = nn.ModuleList(nn.Dropout2d(p) for p in (*[dropout / 2] * 3, dropout))
        self.answer = nn.Conv2d(channels, outputs, 3, padding=1)
        for layer in (*self.conv, self.answer):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.answer.bias)

    def forward(self, x):
        for conv, norm, drop in zip(self.conv, self.norm, self.drop):
            x = drop(F.relu(norm(conv(x))))
        with torch.autocast(x.device.type, enabled=False):
            return self.answer(x.float())


def focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """Sum over anchors of -alpha_t (1 - p_t)^gamma log p_t (Lin 2017), from logits and in fp32. Of any shape; p_t and
    alpha_t are linear in targets between 0 and 1. A negative alpha leaves the weights out."""
    logits, targets = logits.float(), targets.float()
    p = torch.sigmoid(logits)
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets) if alpha >= 0 else 1.0
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction='none')
    return (alpha_t * (1 - p_t) ** gamma * cross_entropy).sum()


def losses(cfg, logits, deltas, batch, anchors):
    """Sums over a micro-batch: focal loss over all anchors but the ignored, smooth L1 over the positives (6.2.3; its
    beta is not given, 0.1 is ours: most deltas are small). Smoothing moves the positives alone, or 65,000 negatives at
    half of it would drown them. logits (B, A), deltas (B, A, 4), batch['match'] (B, A) as `match` gives it,
    batch['boxes'] a list of (G, 4)."""
    match = batch['match'].to(logits.device)
    positive, counted = match >= 0, match != -2
    focal = focal_loss(logits[counted], (1 - cfg.smoothing) * positive[counted], cfg.alpha, cfg.gamma)
    wanted = [encode(boxes.to(logits.device)[m[p]], anchors[p]) for boxes, m, p in zip(batch['boxes'], match, positive)]
    box = F.smooth_l1_loss(deltas[positive].float(), torch.cat(wanted), beta=0.1, reduction='sum')
    return focal, box


def boxes_of(logits, deltas, anchors, size, iou=0.1, top=50, per_level=500):
    """One image's answers (A,), (A, 4) -> boxes (n, 4) inside the image and scores (n,), best first: the best
    `per_level` of each level, decoded, clipped, and thinned out by `nms` over all levels. No score is too low: FROC
    needs the tail."""
    scores, kept, start = logits.float().sigmoid(), [], 0
    for cells in grids(size):
        end = start + len(RATIOS) * len(SCALES) * cells ** 2
        kept.append(start + scores[start:end].topk(min(per_level, end - start)).indices)
        start = end
    kept = torch.cat(kept)
    boxes, scores = decode(deltas[kept], anchors[kept]).clamp(0, size), scores[kept]
    there = (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes, scores = boxes[there], scores[there]
    kept = nms(boxes, scores, iou, top)
    return boxes[kept], scores[kept]
