"""RetinaNet on the patch tokens of a plain ViT (Lin et al. 2017; DBT-DINO, arXiv 2512.13608, 6.2.3).

    levels = Pyramid(768, 256)(tokens)                  # (B, N, D) -> four maps (B, C, h, w), P3 to P6
    logits, deltas = RetinaNet(256)(levels)             # (B, A) and (B, A, 4), in the order of anchors(518)
    boxes, scores = boxes_of(logits[0], deltas[0], anchors(518), 518, iou=0.1, top=50)  # (n, 4), (n,)

Every cell of every level has nine anchors, boxes of fixed shapes. For each anchor the network predicts the
logit of a lesion there, and four deltas that move the anchor onto it. Images are S x S pixels.

B images, N = (S / 14)^2 patch tokens, D width, C channels, h w cells of a level, A anchors, P positive ones,
G lesions of an image, n boxes: x0 y0 x1 y1 in pixels of the S x S image. `priors` are boxes of `anchors`.
Copy this file alone; it imports nothing of this repository.

    $ python retinanet.py               # the levels, and how well the anchors cover lesions of each size
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

# Stride, centre of the first cell and base side of the anchors, in pixels, for patches of 14 pixels.
LEVELS = dict(P3=(7, 3.5, 16), P4=(14, 7, 32), P5=(28, 14, 64), P6=(56, 14, 128))
RATIOS = 0.5, 1.0, 2.0              # height / width of an anchor
SCALES = 1.0, 1.26, 1.587           # sqrt(height * width) / base side
SHAPES = len(RATIOS) * len(SCALES)


# ---- anchors (6.2.3) ------------------------------------------------------------------------------

def grids(size):
    """Cells per side of P3 to P6, (74, 37, 18, 9) at 518. Pooling floors an odd side, P6 rounds up."""
    patches = size // 14
    return 2 * patches, patches, patches // 2, (patches // 2 + 1) // 2


def anchors(size):
    """The anchors of a size x size image, fp32 (A, 4), A = 65,250 at 518: level by level from P3, then row by
    row, column by column, and shape by shape, the ratio in the outer loop.

    Each is centred on the pixels from which its cell is computed: max-pooling and strided convolution put
    cell j of P5 at 28 j + 14, of P6 at 56 j + 14. The paper's code takes (j + 0.5) size / cells, up to 27
    pixels away where a grid is odd.
    """
    levels = []
    for cells, (stride, first, base) in zip(grids(size), LEVELS.values()):
        place = first + stride * torch.arange(cells, dtype=torch.float64)
        centre = torch.cartesian_prod(place, place).flip(1)[:, None]                    # (h w, 1, 2), x y
        side = [(base * scale / math.sqrt(ratio), base * scale * math.sqrt(ratio))
                for ratio in RATIOS for scale in SCALES]
        half = torch.tensor(side, dtype=torch.float64) / 2                              # (9, 2)
        levels.append(torch.cat([centre - half, centre + half], dim=-1).view(-1, 4))    # (9 h w, 4)
    return torch.cat(levels).float()


def encode(boxes, priors):
    """Boxes (n, 4), and for each its anchor, `priors` (n, 4) -> deltas dx dy dw dh (n, 4): with centres x,
    dx = (x_box - x_prior) / w_prior and dw = log(w_box / w_prior); likewise for y and the height h."""
    side = boxes[:, 2:] - boxes[:, :2]                                                  # (n, 2)
    prior_side = priors[:, 2:] - priors[:, :2]
    shift = (boxes[:, 2:] + boxes[:, :2] - priors[:, 2:] - priors[:, :2]) / 2
    return torch.cat([shift / prior_side, torch.log(side / prior_side)], dim=1)


def decode(deltas, priors):
    """The inverse of `encode`, in fp32: deltas (n, 4), priors (n, 4) -> boxes (n, 4). No side is more than
    1000 / 16 times that of its anchor, as in torchvision, so that exp cannot overflow."""
    deltas, priors = deltas.float(), priors.float()
    prior_side = priors[:, 2:] - priors[:, :2]                                          # (n, 2)
    centre = (priors[:, 2:] + priors[:, :2]) / 2 + deltas[:, :2] * prior_side
    half = prior_side * deltas[:, 2:].clamp(max=math.log(1000 / 16)).exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


# ---- overlap, matching, suppression ---------------------------------------------------------------

def area(boxes):
    """Boxes (n, 4) -> (n,)"""
    return (boxes[:, 2:] - boxes[:, :2]).prod(-1)


def intersection(a, b):
    """The area that boxes a (n, 4) and b (m, 4) share -> (n, m)"""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])                                 # (n, m, 2)
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    return (high - low).clamp_min(0).prod(-1)


def pairwise_iou(a, b):
    """Intersection over union of boxes a (n, 4) and b (m, 4) -> (n, m), 0 where both are empty"""
    common = intersection(a, b)
    return common / (area(a)[:, None] + area(b)[None] - common).clamp_min(1e-12)


def match(boxes, priors, high=0.5, low=0.4):
    """The lesion that each anchor has to find: boxes (G, 4), priors (A, 4) -> int64 (A,).

    An anchor gets the number of the box with which its IoU is largest, if that is `high` or more. Below `low`
    it is background, -1, and in between it is ignored, -2 (Lin 2017, 4). The anchors that fit a box best are
    positive at any IoU, or small lesions would have none; DBT-DINO's code leaves this out."""
    if not len(boxes):
        return torch.full((len(priors),), -1, device=priors.device)
    iou = pairwise_iou(boxes, priors)                                                   # (G, A)
    best_iou, best_box = iou.max(dim=0)                     # of each anchor, (A,)
    matched = torch.where(best_iou >= high, best_box, torch.where(best_iou < low, -1, -2))
    most = iou.amax(dim=1, keepdim=True)                    # the best IoU of each box, (G, 1)
    # Without `most > 0`, a box outside the image would make every anchor positive: all tie at 0.
    fits_best = ((iou == most) & (most > 0)).any(dim=0)                                 # (A,)
    return torch.where(fits_best, best_box, matched)


def nms(boxes, scores, iou=0.5, top=None):
    """Non-maximum suppression: boxes (n, 4), scores (n,) -> indices of the boxes to keep, best first, at most
    `top`. Each box that is kept removes those of lower score that overlap it by more than `iou`."""
    order, kept = torch.sort(scores, descending=True, stable=True).indices, []
    while len(order) and len(kept) != top:
        first, others = order[:1], order[1:]
        kept.append(first)
        order = others[pairwise_iou(boxes[first], boxes[others])[0] <= iou]
    return torch.cat(kept) if kept else order


# ---- the network (6.2.3) --------------------------------------------------------------------------

class Pyramid(nn.Module):
    """The neck: patch tokens (B, N, D) of a square image -> P3, P4, P5, P6, each (B, C, h, w).

    The paper calls it a feature pyramid network and describes the simple pyramid of ViTDet (Li 2022): every
    level is made from the last tokens; the 3x3 convolutions of P3 to P5 are ViTDet's. All patch tokens of a
    plain ViT are equally deep, so there is no top-down path.
    """

    def __init__(self, width, channels):
        super().__init__()
        self.reduce = nn.Linear(width, channels)            # the paper's 1x1 convolution, on tokens
        self.p3, self.p4, self.p5 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.p6 = nn.Conv2d(channels, channels, 3, padding=1, stride=2)

    def forward(self, tokens):
        side = math.isqrt(tokens.shape[1])
        x = self.reduce(tokens).transpose(1, 2).unflatten(2, (side, side))              # (B, C, h, w)
        finer = F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)  # (B, C, 2 h, 2 w)
        p5 = self.p5(F.max_pool2d(x, 2))                                                # (B, C, h / 2, w / 2)
        return [self.p3(finer), self.p4(x), p5, self.p6(p5)]


class Tower(nn.Module):
    """Four times 3x3 convolution, GroupNorm, ReLU and dropout of whole channels, at half the rate in the
    first three, as in the paper's code; then a 3x3 convolution: (B, C, h, w) -> (B, outputs, h, w). This last
    one runs in fp32 even under autocast, as bf16 would make thousands of scores equal."""

    def __init__(self, channels, outputs, dropout):
        super().__init__()
        rates = dropout / 2, dropout / 2, dropout / 2, dropout
        self.conv = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False)
                                  for _ in rates)
        self.norm = nn.ModuleList(nn.GroupNorm(32, channels) for _ in rates)
        self.drop = nn.ModuleList(nn.Dropout2d(rate) for rate in rates)
        self.output = nn.Conv2d(channels, outputs, 3, padding=1)
        for layer in (*self.conv, self.output):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(self.output.bias)

    def forward(self, x):
        for conv, norm, drop in zip(self.conv, self.norm, self.drop):
            x = drop(F.relu(norm(conv(x))))                                             # (B, C, h, w)
        with torch.autocast(x.device.type, enabled=False):
            return self.output(x.float())


class RetinaNet(nn.Module):
    """The head alone, one for all levels (B, C, h, w) of `Pyramid` -> logits (B, A) and deltas (B, A, 4), in
    fp32 and in the order of `anchors`. `channels` is a multiple of 32, the groups of GroupNorm."""

    def __init__(self, channels=256, dropout=0.1):
        super().__init__()
        self.classify = Tower(channels, SHAPES, dropout)
        self.regress = Tower(channels, 4 * SHAPES, dropout)
        # Scores start at 0.01 (Lin 2017, 4.1), or the loss of the background would dominate at first.
        nn.init.constant_(self.classify.output.bias, -math.log((1 - 0.01) / 0.01))

    def forward(self, levels):
        logits, deltas = [], []
        for level in levels:
            logits.append(self.classify(level).permute(0, 2, 3, 1).flatten(1))          # (B, 9 h w)
            deltas.append(self.regress(level).permute(0, 2, 3, 1).flatten(1))           # (B, 36 h w)
        return torch.cat(logits, dim=1), torch.cat(deltas, dim=1).unflatten(1, (-1, 4))


# ---- losses, boxes --------------------------------------------------------------------------------

def focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """Focal loss (Lin 2017, Eq. 5), summed: logits and targets 0 or 1, of the same shape -> ().

        FL = - alpha_t (1 - p_t)^gamma log p_t           p_t: probability given to the right class

    alpha_t is alpha for positives and 1 - alpha for negatives; a negative alpha means alpha_t = 1 for both.
    """
    logits, targets = logits.float(), targets.float()
    p = torch.sigmoid(logits)
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets) if alpha >= 0 else 1.0
    # -log p_t from logits, whose gradient survives where p rounds to 0 or 1
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction='none')
    return (alpha_t * (1 - p_t) ** gamma * cross_entropy).sum()


def losses(logits, deltas, batch, priors, alpha=0.25, gamma=2.0):
    """Focal loss of all anchors but the ignored, smooth L1 of the positive ones (6.2.3) -> two sums, () each,
    to be divided by the positive anchors of the whole batch. No label smoothing, weights 1:1 (6.2.3 tunes
    both); it gives no beta, 0.1 is detectron2's.

    logits (B, A), deltas (B, A, 4), priors (A, 4), batch['match'] (B, A): `match` of each image,
    batch['boxes']: a list of B tensors (G, 4)."""
    matched = batch['match'].to(logits.device)                                          # (B, A)
    counted = matched != -2
    focal = focal_loss(logits[counted], matched[counted] >= 0, alpha, gamma)
    boxes = pad_sequence(batch['boxes'], batch_first=True).to(logits.device)            # (B, most G, 4)
    image, anchor = torch.where(matched >= 0)                                           # (P,), (P,)
    wanted = encode(boxes[image, matched[image, anchor]], priors[anchor])               # (P, 4)
    box = F.smooth_l1_loss(deltas[image, anchor].float(), wanted, beta=0.1, reduction='sum')
    return focal, box


def boxes_of(logits, deltas, priors, size, iou, top, per_level=500):
    """Boxes (n, 4) of one image, clipped to it, and scores (n,), best first, n <= top, on the CPU.

    logits (A,), deltas (A, 4), priors (A, 4), on one device: the best `per_level` of each level are decoded,
    then `nms` over all levels. There is no threshold, as FROC also counts boxes of low score."""
    scores = logits.float().sigmoid()                                                   # (A,)
    kept, start = [], 0
    for level in scores.split([SHAPES * cells ** 2 for cells in grids(size)]):
        kept.append(start + level.topk(min(per_level, len(level))).indices)
        start += len(level)
    kept = torch.cat(kept)                                                              # (n,)
    boxes = decode(deltas[kept], priors[kept]).clamp(0, size)                           # (n, 4)
    # One copy to the CPU, of these alone: the loop of `nms` would make a GPU wait at every box.
    rows = torch.cat([boxes, scores[kept, None]], dim=1).cpu()                          # (n, 5)
    rows = rows[(rows[:, 2:4] > rows[:, :2]).all(dim=1)]            # without boxes outside the image
    rows = rows[nms(rows[:, :4], rows[:, 4], iou, top)]
    return rows[:, :4], rows[:, 4]


if __name__ == '__main__':
    torch.manual_seed(0)
    priors = anchors(518)
    print(f'{len(priors):,} anchors of a 518 x 518 image')
    for (name, (stride, first, base)), cells in zip(LEVELS.items(), grids(518)):
        sides = ', '.join(f'{base * scale:.0f}' for scale in SCALES)
        print(f'  {name}: {cells}x{cells} cells, centres at {first:g} + {stride} j, sides {sides}')
    print('100 random squares: share with an IoU of 0.5 or more, positive anchors of each')
    for side in (8, 12, 16, 32, 64, 128, 256):
        corner = torch.rand(100, 2) * (518 - side)
        boxes = torch.cat([corner, corner + side], dim=1)                               # (100, 4)
        covered = (pairwise_iou(boxes, priors).amax(1) >= 0.5).float().mean()
        positive = sum((match(box[None], priors) >= 0).sum() for box in boxes) / 100
        print(f'  {side:3d} pixels: {covered:4.0%}, {positive:4.1f}')
