"""Lesions in mammograms and tomosynthesis volumes (DBT): RetinaNet on the tokens of the ViT (DBT-DINO, arXiv
2512.13608, 2.4, 6.2.3; retinanet.py), or DINO-DETR (IHRRB-DINO; detr.py).

    $ python detect.py                                      # on phantoms, no data needed
    $ python detect.py --root lesions.csv --encoder runs/mammodino/last.pt --out RUN
    $ torchrun --nproc-per-node 8 detect.py --dataset bcs --root DIR --encoder FILE --out RUN
    $ python detect.py predict FILE --checkpoint RUN        # findings.json and pictures
    $ python score.py RUN_A RUN_B                           # sensitivities, intervals, tests, curves

A slice, resized to S x S pixels, becomes patch tokens of an encoder, frozen or finetuned, then four pyramid
levels, then boxes with scores. The boxes of all slices of a volume merge into findings in pixels of the file.
OUT receives last.pt, log.jsonl, and in the format of the DBTex challenge predictions.csv, labels.csv and
boxes.csv.

B images, S pixels of a side, D width, C channels of the pyramid, h w cells of a level, A anchors, G lesions,
n boxes, K slices, H W pixels of a file. Boxes are x0 y0 x1 y1. A row is a mammogram or a volume, see
datasets.py; an item (i, z) is slice z of row i, with z None one of its normal slices.
"""
import argparse
import copy
import functools
import itertools
import json
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import datasets
import detr
import images
import metrics
import phantom
import retinanet
import score
import vit
from run import (computes_in_bf16, cosine, gathered, lock, on_rank_0, option, parse, save, script,
                 setup)


# ---- configuration --------------------------------------------------------------------------------

@dataclass
class Config:
    """Every field is a flag. Sources: [6.2.3] and the like are sections of DBT-DINO; [paper 3.1] one of
    MammoDINO; [retinanet] Lin 2017; [dino] the DINO detector, Zhang 2022, and its published code; [dbtex] the
    challenge; [ours] a choice of this repository."""
    dataset: str = option('csv', 'ours', 'bcs, vindr, cbis (or ddsm), mias or csv', group='data')
    root: str | None = option(None, 'ours', 'the data set as published, or your CSV; or a demo')
    images: str | None = option(None, 'ours', 'where prepare.py put the images of --root')
    findings: tuple[str, ...] = option((), 'ours', 'kinds of lesions that count; by default all')
    voi: bool = option(False, 'dbt-dino', 'apply the VOI LUT or window of DICOM files')
    clahe: bool = option(True, 'paper 3.1', 'CLAHE of files that prepare.py has not seen')
    size: int = option(518, '6.2.3', 'pixels of the square image, a multiple of 14')
    augment: bool = option(True, '6.2.3', 'flips, zoom, coarse dropout, gamma, noise')
    normals: float = option(1.0, 'ours', 'normal slices for each annotated one; in the paper 0')

    encoder: str | None = option(None, 'ours', "last.pt, or DINOv2's", group='encoder, detector')
    imagenet: bool = option(True, 'ours', '--encoder was fed ImageNet-normalised images')
    random_encoder: bool = option(False, 'ours', 'random weights, shaped like --encoder')
    freeze: bool = option(True, '2.4', 'train the detector alone; --no-freeze: the encoder too')
    init_from: str | None = option(None, 'ours', 'a run whose weights the detector starts from')
    channels: int = option(256, '6.2.3', 'of pyramid and head, a multiple of 32')
    head: str = option('retinanet', '6.2.3', 'retinanet, or detr: DINO-DETR')
    top: int = option(50, 'ours', 'boxes kept in a slice, and findings in a volume')
    overlap: float = option(0.5, 'ours', 'share of the smaller box that makes two boxes one')
    gap: int = option(1, 'ours', 'slices from one box of a finding to the next, at most')

    dropout: float = option(0.1, '6.2.3', 'of channels in each layer of a tower', group='RetinaNet')
    alpha: float = option(0.25, 'retinanet', 'focal loss: weight of the positives')
    gamma: float = option(2.0, 'retinanet', 'focal loss: how fast easy anchors fade')
    nms: float = option(0.1, '6.2.3', 'IoU above which the weaker of two boxes of a slice goes')

    queries: int = option(300, 'dino', 'boxes that are refined; published 900', group='DINO-DETR')
    layers: tuple[int, int] = option((2, 6), 'dino', 'of encoder and decoder; published 6 6')
    denoising: int = option(100, 'dino', 'noisy copies of the lesions, positive and negative')
    lambdas: tuple[float, float] = option((1.0, 2.0), 'dino', 'their noise: positive, negative')

    out: str = option('runs/detect', 'ours', 'folder of this run', group='the run')
    resume: bool = option(False, 'ours', 'continue the run in --out, on a CPU bit for bit')
    seed: int = option(0, 'ours', 'split, weights, order, augmentation, bootstrap')
    workers: int = option(min(4, os.cpu_count() or 1), 'ours', 'data processes per rank')
    amp: bool | None = option(None, '6.2.3', 'bf16 autocast; by default on GPUs')

    epochs: int = option(50, '6.2.3', 'at most; 0: untrained', group='optimization')
    patience: int = option(10, '6.2.3', 'epochs without a better validation, then training ends')
    batch: int = option(64, '6.2.3', 'slices per step, over all ranks')
    micro_batch: int = option(8, 'ours', 'slices a rank holds at once')
    lr: float | None = option(None, 'ours', 'peak; by default 5e-4, DINO-DETR 1e-4 [dino]')
    wd: float = option(1e-4, 'ours', 'weight decay')
    layer_decay: float = option(0.75, 'ours', '--no-freeze: rate factor per block below the top')
    clip: float | None = option(None, 'ours', 'gradient norm; by default 1, DINO-DETR 0.1 [dino]')

    min_distance: float = option(100.0, 'dbtex', 'pixels of the file: a box whose centre is so '
                                 "close to a lesion's is a hit", group='scores')
    draws: int = option(1000, '2.5', 'bootstrap draws of patients')

    phantoms: int = option(300, 'ours', 'volumes: 65 % train, 10 % val, 25 % test', group='demo')

    def __post_init__(self):
        lr, clip = (1e-4, 0.1) if self.head == 'detr' else (5e-4, 1.0)
        self.lr = lr if self.lr is None else self.lr
        self.clip = clip if self.clip is None else self.clip


def check_flags(cfg, ranks):
    """ValueError for flags that cannot work, before hours of reading"""
    choices = dict(dataset=('bcs', 'vindr', 'cbis', 'mias', 'csv', 'ddsm'),
                   head=('retinanet', 'detr'))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise ValueError(f"--{name} {getattr(cfg, name)}: expected {', '.join(allowed)}")
    factors = dict(size=14, channels=32, batch=ranks, micro_batch=1)    # 14: patch, 32: GroupNorm
    for name, factor in factors.items():
        value = getattr(cfg, name)
        if value < 1 or value % factor:
            raise ValueError(f'--{name} {value}: expected a multiple of {factor} above 0')
    if not (cfg.encoder or cfg.random_encoder or cfg.init_from):
        raise ValueError('--encoder FILE is missing; give one, or --random_encoder')


# ---- the detector (2.4, 6.2.3) --------------------------------------------------------------------

class Features(nn.Module):
    """Encoder and pyramid: images uint8 (B, 1, S, S) -> P3 to P6, (B, C, h, w). The further channels that
    images have in fuse.py are not seen."""

    def __init__(self, encoder, channels, freeze=True):
        super().__init__()
        self.encoder, self.freeze = encoder.requires_grad_(not freeze), freeze
        self.pyramid = retinanet.Pyramid(encoder.config['width'], channels)
        encoder.mask_token.requires_grad_(False)            # nothing is masked here; DDP would wait for it

    def levels(self, images):
        with torch.no_grad() if self.freeze else nullcontext():
            _, tokens = self.encoder(images[:, :1].float() / 255)                       # (B, N, D)
        return self.pyramid(tokens)


class Detector(Features):
    """Encoder, pyramid and head: images -> the answers of the head, `Anchored` or `Queried`.
    dataset(cfg, rows) turns the items of an epoch, and those to search, into samples."""

    def __init__(self, cfg, encoder):
        super().__init__(encoder, cfg.channels, cfg.freeze)
        self.cfg, self.dataset = cfg, Frames
        self.head = Queried(cfg) if cfg.head == 'detr' else Anchored(cfg)

    def forward(self, images, boxes=None):
        """boxes: in training the truth, B times (G, 4)"""
        return self.head(self.levels(images), boxes)

    def items(self, rows):
        """The items that every epoch sees: the annotated slices"""
        return [(i, z) for i, row in enumerate(rows) for z in sorted({box[0] for box in row.boxes})]

    def validate(self, rows, device):
        """Mean sensitivity at 1 to 5 false positives per image over the annotated slices and --normals times
        as many normal ones (ours) -> it, and dict(threshold=the score at 1 false positive).

        A hit is within max(half the diagonal, 20 pixels of 518), about the challenge's 100 in 2457 rows."""
        cfg, items = self.cfg, self.items(rows)
        truth = [((i, z), x0, y0, x1 - x0, y1 - y0) for i, z in items
                 for x0, y0, x1, y1 in on_frames(rows[i], {z}, cfg.size)]
        order = np.random.default_rng([cfg.seed, 0, 0, 6]).permutation(normal_rows(rows))
        items += [(int(i), None) for i in sorted(order[:round(cfg.normals * len(items))])]
        predictions, my_items = [], items[dist.get_rank()::dist.get_world_size()]
        for i, z, boxes, scores in detect_slices(self, rows, my_items, device):
            predictions += [((i, z), x0, y0, x1 - x0, y1 - y0, value)
                            for (x0, y0, x1, y1), value in zip(boxes.tolist(), scores.tolist())]
        volumes = [(item, math.inf) for item in items]      # a slice has no depth
        m = metrics.matched(volumes, truth, gathered(predictions), 20 * cfg.size / 518)
        thresholds, false_positives, _ = metrics.curve(m, m.each(), every=True)
        threshold = thresholds[np.flatnonzero(false_positives <= 1)[-1]]
        value = metrics.sensitivity(m, [1, 2, 3, 4, 5], m.each()).mean()
        return float(value), dict(threshold=float(np.clip(threshold, 0, 1)))

    def finish(self, rows, best, notes, device, out):
        """The test: searches these rows, writes the findings and scores them."""
        cfg, findings = self.cfg, find_lesions(self, rows, device)
        if dist.get_rank() > 0:
            return
        write(out, rows, findings)
        truth = score.read_truth(out / 'labels.csv', out / 'boxes.csv')
        score.lesions({cfg.out: score.read_predictions(out)}, *truth, cfg.min_distance, cfg.draws,
                      cfg.seed, out, notes)
        print(f'-> {out}: predictions.csv, scores.json, froc.png, last.pt. Next:\n  python score.py'
              f' {out} OTHER\n  python {Path(sys.argv[0]).name} predict FILE --checkpoint {out}')


class Anchored(nn.Module):
    """RetinaNet: levels -> logits (B, A) and deltas (B, A, 4)"""

    TERMS = ('focal', 'box')

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.net = cfg, retinanet.RetinaNet(cfg.channels, cfg.dropout)
        self.register_buffer('anchors', retinanet.anchors(cfg.size), persistent=False)  # (A, 4)

    def forward(self, levels, boxes=None):
        return self.net(levels)

    def count(self, batch):
        """What the loss of a whole batch is divided by: its positive anchors"""
        return (batch['match'] >= 0).sum()

    def loss(self, answers, batch):
        """TERMS of a micro-batch, (2,), sums over its images"""
        cfg = self.cfg
        return torch.stack(retinanet.losses(*answers, batch, self.anchors, cfg.alpha, cfg.gamma))

    def boxes(self, answers):
        """For each slice boxes (n, 4) in its pixels and scores (n,), best first, on the CPU"""
        cfg = self.cfg
        return [retinanet.boxes_of(*answer, self.anchors, cfg.size, cfg.nms, cfg.top)
                for answer in zip(*answers)]


class Queried(nn.Module):
    """DINO-DETR: levels -> the outputs of `detr.DinoDetr`. Its cells lie where those of the anchors lie. A
    lesion that is marked on a neighbouring slice is background here."""

    TERMS = ('focal', 'box')

    def __init__(self, cfg):
        super().__init__()
        centres = [(first / cfg.size, stride / cfg.size)
                   for stride, first, _ in retinanet.LEVELS.values()]
        lambda1, lambda2 = cfg.lambdas
        self.cfg, self.atd = cfg, []                        # ATD(k) of the micro-batches of an epoch
        self.net = detr.DinoDetr(cfg.channels, 1, cfg.queries, *cfg.layers, hidden=8 * cfg.channels,
                                 denoising=cfg.denoising, centres=centres, lambda1=lambda1,
                                 lambda2=lambda2)
        self.net.label_enc.requires_grad_(cfg.denoising > 0)    # DDP would wait for its gradient

    def forward(self, levels, boxes=None):
        return self.net(levels, None if boxes is None else self.targets(boxes, levels[0].device))

    def targets(self, boxes, device):
        """Boxes in pixels, B times (G, 4) -> labels (G,), centres and sides in shares of the image (G, 4)"""
        targets = []
        for box in boxes:
            low, high = box.to(device).split(2, dim=1)                                  # (G, 2) each
            shares = torch.cat([low + high, 2 * (high - low)], dim=1) / (2 * self.cfg.size)
            labels = torch.zeros(len(shares), dtype=torch.long, device=device)
            targets.append(dict(labels=labels, boxes=shares))
        return targets

    def count(self, batch):
        """What the loss of a whole batch is divided by: its lesions"""
        return torch.tensor(sum(map(len, batch['boxes'])))

    def loss(self, answers, batch):
        """TERMS of a micro-batch, (2,), over all layers, proposals and denoising queries"""
        targets = self.targets(batch['boxes'], answers['layers'][0][0].device)
        if self.count(batch):
            self.atd.append(detr.atd(answers, targets))
        sums = sum(detr.losses(answers, targets).values())                              # (3,)
        focal, l1, giou = sums * sums.new_tensor(detr.WEIGHTS)
        return torch.stack([focal, l1 + giou])

    def boxes(self, answers):
        """The best `--top` of the last layer; a set of boxes needs no suppression."""
        logits, boxes = (part.float() for part in answers['layers'][-1])                # (B, Q, 1), (B, Q, 4)
        scores, best = logits[..., 0].sigmoid().topk(min(self.cfg.top, logits.shape[1]))
        boxes = boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))                   # (B, n, 4)
        boxes = (detr.corners(boxes) * self.cfg.size).clamp(0, self.cfg.size)
        return list(zip(boxes.cpu(), scores.cpu()))


def build(cfg, start=None):
    """A detector with the best weights of the checkpoint `start`, by default that of --init_from, as far as
    names and shapes agree; without one, on --encoder or random weights."""
    if cfg.init_from and not start:
        start = read_checkpoint(cfg.init_from)
    if start:
        encoder, channels = vit.ViT(**start['encoders'][0]), start['config']['channels']
        if channels != cfg.channels:
            raise ValueError(f'--channels {cfg.channels}: {cfg.init_from} has another number, '
                             f'{channels}')
    elif cfg.encoder:
        encoder = vit.load(cfg.encoder, imagenet=cfg.imagenet)
    else:
        encoder = vit.ViT(**vit.SIZES['demo'], size=84)
    if encoder.patch != 14:
        raise ValueError(f'{cfg.encoder}: patches of {encoder.patch} pixels; expected 14')
    torch.manual_seed(cfg.seed)
    if cfg.random_encoder and not start:
        encoder = vit.ViT(**encoder.config, layerscale=1.0)     # at DINOv2's 1e-5, blocks do nothing
    detector = Detector(cfg, encoder)
    if start:
        own = detector.state_dict()                         # another --head or --queries starts anew
        alike = {name: weight for name, weight in start['best_weights'].items()
                 if name in own and weight.shape == own[name].shape}
        detector.load_state_dict(own | alike)
    return detector


# ---- slices -> samples ----------------------------------------------------------------------------

def size_of(row):
    """(K, H, W) of the published file"""
    row.shape = row.shape or images.shape(row.file)
    return row.shape


def frames_of(row):
    """The slices that a row stands for: those of its file, or one"""
    return range(size_of(row)[0]) if row.frame is None else [row.frame]


def normal_frames(row):
    """Frames that may serve as normal. A lesion is marked on one slice and reaches beyond it, so those within
    K / 4 of a marked one, the challenge's own tolerance, do not."""
    reach = size_of(row)[0] / 4
    return [z for z in frames_of(row) if all(abs(z - box[0]) > reach for box in row.boxes)]


def normal_rows(rows):
    """Numbers of the rows that have a normal frame; the header of one without boxes is not read."""
    return [i for i, row in enumerate(rows) if row.normal and (not row.boxes or normal_frames(row))]


def on_frames(row, chosen, size):
    """The boxes marked on the chosen frames, in pixels of the S x S image, clipped to it: (G, 4)"""
    _, H, W = size_of(row)
    boxes = np.array([box[1:5] for box in row.boxes if box[0] in chosen], float).reshape(-1, 4)
    return (boxes * np.array([size / W, size / H] * 2)).clip(0, size)


@functools.cache                                            # the first frame is read once for all of a volume
def upside_down(path, side, voi):
    """BCS-DBT's rule for volumes that are stored upside down: the breast lies at the brighter of the outer
    columns. Where that is not `side` (L or R), every frame needs a turn by 180 degrees, not a mirror."""
    first = images.read(path, 0, voi)
    left, right = first[:, 0].sum(dtype=np.int64), first[:, -1].sum(dtype=np.int64)
    return side != ('R' if left < right else 'L')


class Frames(Dataset):
    """Items as samples, with an image uint8 (1, S, S):
    (i, z) -> dict(row=i, frame=z, image), to be searched, or None if the file cannot be read;
    (i, z, epoch, index) -> dict(image, boxes (G, 4), match (A,)), to train on."""

    channels = 1                                            # of an image; in fuse.py there are three

    def __init__(self, cfg, rows):
        self.cfg, self.rows, self.anchors = cfg, rows, retinanet.anchors(cfg.size)

    def __getitem__(self, item):
        predicting = len(item) == 2
        try:
            return self.prediction_sample(*item) if predicting else self.training_sample(*item)
        except (ValueError, OSError) as problem:
            tqdm.write(f'skipped: {problem}', file=sys.stderr)
        if not predicting:                                  # black, and every anchor is ignored
            return dict(image=np.zeros((self.channels, self.cfg.size, self.cfg.size), np.uint8),
                        boxes=torch.zeros(0, 4), match=torch.full((len(self.anchors),), -2))

    def image(self, row, z):
        """uint8 (1, S, S)"""
        return self.read(row, z)[None]

    def read(self, row, z):
        """A slice, with CLAHE where prepare.py has not applied it (MammoDINO 3.1), uint8 (S, S)"""
        image = images.read(row.path, z, self.cfg.voi)                                  # (H, W)
        # The turn comes before CLAHE, whose tiles are counted from the upper left corner.
        if row.upside and upside_down(row.path, row.laterality, self.cfg.voi):
            image = np.ascontiguousarray(image[::-1, ::-1])
        if self.cfg.clahe and not row.path.lower().endswith('.npy'):
            image = images.clahe(image)
        side = self.cfg.size, self.cfg.size
        return np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BICUBIC))

    def prediction_sample(self, i, z):
        """z None takes the middle one of the normal frames."""
        frames = normal_frames(self.rows[i]) if z is None else [z]
        return dict(row=i, frame=z, image=self.image(self.rows[i], frames[len(frames) // 2]))

    def training_sample(self, i, z, epoch, index):
        """z None draws one of the normal frames. `seed`, `epoch` and `index` decide all that is drawn."""
        cfg, row = self.cfg, self.rows[i]
        rng = np.random.default_rng([cfg.seed, epoch, index])
        if z is None:
            z = int(rng.choice(normal_frames(row)))
        image = self.image(row, z)                                                      # (1, S, S)
        nearby = {box[0] for box in row.boxes if 0 < abs(box[0] - z) <= size_of(row)[0] / 4}
        own, others = on_frames(row, {z}, cfg.size), on_frames(row, nearby, cfg.size)
        boxes = np.concatenate([own, others])
        if cfg.augment:
            image, boxes = augment(rng, image, boxes)
        own, others = torch.from_numpy(boxes).float().split([len(own), len(others)])
        match, match_others = (retinanet.match(part, self.anchors) for part in (own, others))
        match[(match == -1) & (match_others != -1)] = -2    # a lesion of another slice may be seen here
        return dict(image=image, boxes=own, match=match)


def augment(rng, image, boxes):
    """The augmentation of 6.2.3: image uint8 (1, S, S), boxes (G, 4) -> the same. Where an image has more
    channels (fuse.py), all move alike, and the first alone changes its greys."""
    S, unit = image.shape[-1], image.shape[-1] / 518
    x0, y0, x1, y1 = boxes.T
    if rng.random() < 0.5:
        image, x0, x1 = image[:, :, ::-1], S - x1, S - x0
    if rng.random() < 0.5:
        image, y0, y1 = image[:, ::-1], S - y1, S - y0
    boxes = np.stack([x0, y0, x1, y1], axis=1)
    if rng.random() < 0.5:
        image, boxes = zoom(rng, image, boxes)

    image = image.copy()
    if rng.random() < 0.3:                                  # black rectangles that touch no box
        for _ in range(rng.integers(15, 21)):
            w, h = (max(1, round(unit * side)) for side in rng.uniform(20, 40, 2))
            x, y = rng.integers(S - w + 1), rng.integers(S - h + 1)
            beside = (boxes[:, 0] >= x + w) | (boxes[:, 2] <= x)
            if (beside | (boxes[:, 1] >= y + h) | (boxes[:, 3] <= y)).all():
                image[0, y:y + h, x:x + w] = 0
    if rng.random() < 0.3:                                  # gamma
        table = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.8, 1.2)
        image[0] = table.round()[image[0]]
    if rng.random() < 0.3:                                  # noise
        noisy = image[0] + 255 * 0.05 * rng.standard_normal((S, S), np.float32)
        image[0] = noisy.clip(0, 255).round()
    return image, boxes


def zoom(rng, image, boxes, tries=10):
    """By 0.8 to 1.5, black around the image. Every box stays whole, and is then 15 to 206 pixels of 518 wide
    and 9 to 182 high; where no try gives that, nothing changes."""
    S = image.shape[-1]
    least, most = np.array([15, 9]) * (S / 518), np.array([206, 182]) * (S / 518)
    for _ in range(tries):
        side = S / rng.uniform(0.8, 1.5)                    # of the square that becomes the image
        sizes = (boxes[:, 2:] - boxes[:, :2]) * S / side                                # (G, 2)
        low = np.maximum(min(0, S - side), boxes[:, 2:].max(0, initial=-np.inf) - side)
        high = np.minimum(max(0, S - side), boxes[:, :2].min(0, initial=np.inf))
        if ((sizes >= least) & (sizes <= most)).all() and (low <= high).all():
            x, y = rng.uniform(low, high)                   # its corner
            affine = Image.Transform.AFFINE, (side / S, 0, x, 0, side / S, y)
            image = [Image.fromarray(channel).transform((S, S), *affine, Image.Resampling.BICUBIC)
                     for channel in image]
            return np.stack(image), (boxes - [x, y, x, y]) / (side / S)
    return image, boxes


def collate(samples):
    """A micro-batch: images (B, 1, S, S), boxes B times (G, 4), match (B, A)"""
    return dict(images=torch.from_numpy(np.stack([sample['image'] for sample in samples])),
                boxes=[sample['boxes'] for sample in samples],
                match=torch.stack([sample['match'] for sample in samples]))


def loader(cfg, frames, **options):
    """Half an hour without data from the workers ends the run."""
    timeout = 1800 if cfg.workers else 0
    return DataLoader(frames, num_workers=cfg.workers, timeout=timeout, **options)


# ---- training -------------------------------------------------------------------------------------

def plan(cfg, annotated, normal, epoch):
    """The batches of an epoch: lists of --batch items (i, z, epoch, index), however many ranks share them.
    They hold every item of `annotated` and, of the rows `normal`, --normals times as many normal ones,
    shuffled and filled up to whole batches."""
    rng = np.random.default_rng([cfg.seed, epoch])
    wanted = round(cfg.normals * len(annotated)) if normal else 0
    drawn = []
    while len(drawn) < wanted:
        drawn += rng.permutation(normal).tolist()
    items = annotated + [(i, None) for i in drawn[:wanted]]
    steps = math.ceil(len(items) / cfg.batch)
    order = np.resize(rng.permutation(len(items)), (steps, cfg.batch))
    return [[(*items[n], epoch, step * cfg.batch + i) for i, n in enumerate(numbers)]
            for step, numbers in enumerate(order)]


def train(detector, training, validation, device, out, state=None):
    """AdamW, epoch by epoch until the patience ends -> dict(score, epoch, threshold) of the best epoch by
    validation, whose weights the detector then has. `state`: the checkpoint to continue, or None.
    OUT/log.jsonl has a line for each epoch. The models of fuse.py are trained here too."""
    cfg, rank, ranks = detector.cfg, dist.get_rank(), dist.get_world_size()
    groups = vit.param_groups(detector, cfg.lr, cfg.wd, cfg.layer_decay)
    optimizer = torch.optim.AdamW(groups)                   # skips what is frozen and has no gradient
    best, log = dict(score=-1.0, epoch=-1, threshold=0.5), []
    best_weights = copy.deepcopy(detector.state_dict())
    if state:
        best, log, best_weights = state['best'], state['log'], state['best_weights']
        detector.load_state_dict(state['weights'])
        optimizer.load_state_dict(state['optimizer'])
    ddp = nn.parallel.DistributedDataParallel(
        detector, device_ids=[device] if device.type == 'cuda' else None)
    if rank == 0 and not state:
        save_checkpoint(out, detector, optimizer, best, best_weights, log)

    frames, annotated = detector.dataset(cfg, training), detector.items(training)
    normal = normal_rows(training)
    steps = len(plan(cfg, annotated, normal, 0))            # of an epoch
    total = steps * cfg.epochs
    accumulate = math.ceil(cfg.batch // ranks / cfg.micro_batch)
    bar = tqdm(total=total, initial=len(log) * steps, unit='step', disable=rank > 0 or None)
    for epoch in range(len(log), cfg.epochs):
        if epoch - best['epoch'] > cfg.patience:
            break
        # this rank's share of each batch, in micro-batches
        shares = [batch[rank::ranks] for batch in plan(cfg, annotated, normal, epoch)]
        micros = [share[start:start + cfg.micro_batch] for share in shares
                  for start in range(0, len(share), cfg.micro_batch)]
        batches = iter(loader(cfg, frames, batch_sampler=micros, collate_fn=collate))
        sums = torch.zeros(len(detector.head.TERMS), device=device)
        detector.train()
        for step in range(epoch * steps, (epoch + 1) * steps):
            micro = [next(batches) for _ in range(accumulate)]
            sums += train_step(ddp, optimizer, micro, step, total, device)
            bar.update()
        dist.all_reduce(sums)
        sums /= steps
        terms = dict(zip(detector.head.TERMS, sums.tolist()), loss=sums.sum().item())
        if isinstance(detector.head, Queried) and detector.head.atd:    # of this rank
            terms['atd'] = torch.stack(detector.head.atd).mean().item()
            detector.head.atd.clear()

        value, details = detector.validate(validation, device)
        if value > best['score']:
            best = dict(best, score=value, epoch=epoch, **details)
            best_weights = copy.deepcopy(detector.state_dict())
        log.append(dict(epoch=epoch, **terms, validation=value, best=best['score'],
                        best_epoch=best['epoch']))
        bar.set_postfix(loss=f'{terms["loss"]:.3f}', validation=f'{value:.3f}',
                        best=f'{best["score"]:.3f}')
        if rank == 0:
            save_checkpoint(out, detector, optimizer, best, best_weights, log)
    bar.close()
    detector.load_state_dict(best_weights)
    return best


def train_step(ddp, optimizer, batches, step, total, device):
    """Step number `step` of `total`, on the micro-batches of one batch -> this rank's part of the head's
    TERMS. The loss is their sum over micro-batches and ranks, divided by the head's count over all."""
    cfg, head, rank = ddp.module.cfg, ddp.module.head, dist.get_rank()
    # dropout must repeat after --resume
    seed = np.random.SeedSequence([cfg.seed, step, rank]).generate_state(1)[0]
    torch.manual_seed(int(seed))
    # linear warm-up, then half a cosine
    rate = cosine(step, total, cfg.lr, 1e-6, warmup=min(100, total // 10))
    for group in optimizer.param_groups:
        group['lr'] = group['lr_scale'] * rate

    count = sum(head.count(batch) for batch in batches).to(device, torch.float32)
    dist.all_reduce(count)
    sums, bf16 = torch.zeros(len(head.TERMS), device=device), computes_in_bf16(device, cfg.amp)
    for batch in batches:
        with nullcontext() if batch is batches[-1] else ddp.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                answers = ddp(batch['images'].to(device), batch['boxes'])
            terms = head.loss(answers, batch) / count.clamp_min(1)
            (dist.get_world_size() * terms.sum()).backward()    # DDP takes the mean over ranks
        sums += terms.detach()

    norm = nn.utils.clip_grad_norm_(ddp.parameters(), cfg.clip)
    if not norm.isfinite():
        raise ValueError(f'step {step}: the gradient is not finite; lower --lr')
    optimizer.step()
    optimizer.zero_grad()
    return sums


# ---- checkpoints ----------------------------------------------------------------------------------

def save_checkpoint(out, detector, optimizer, best, best_weights, log):
    """OUT/last.pt: the best weights to use, and the current ones with the optimizer to continue exactly;
    OUT/log.jsonl"""
    encoders = [part.config for part in detector.modules() if isinstance(part, vit.ViT)]    # fuse.py: two
    save(out / 'last.pt', dict(
        config=asdict(detector.cfg), encoders=encoders, best=best, best_weights=best_weights,
        weights=detector.state_dict(), optimizer=optimizer.state_dict(), log=log))
    (out / 'log.jsonl').write_text(''.join(f'{json.dumps(line)}\n' for line in log))


def read_checkpoint(folder):
    """OUT/last.pt of detect.py or fuse.py"""
    path = Path(folder, 'last.pt')
    state = vit.read(path) if path.exists() else {}
    if 'best_weights' not in state:
        raise ValueError(f'{path}: absent, or no detector; give a run of detect.py or fuse.py')
    return state


def checkpoint_to_resume(cfg):
    """The checkpoint in --out, None without one. ValueError names the flags that differ from its own."""
    if not (cfg.resume and os.path.exists(f'{cfg.out}/last.pt')):
        return None
    state = read_checkpoint(cfg.out)
    old = state['config']
    changed = [f'--{name} {old.get(name)} -> {value}' for name, value in vars(cfg).items()
               if name not in ('resume', 'workers', 'out') and old.get(name) != value]
    if changed:
        raise ValueError(f'{cfg.out} is another recipe: {", ".join(changed)}; choose another --out')
    return state


# ---- prediction -----------------------------------------------------------------------------------

@torch.no_grad()
def infer(detector, rows, items, device):
    """Items -> lists of --micro_batch samples that could be read, and the answers to them; in memory is one
    micro-batch at a time."""
    cfg = detector.eval().cfg
    bf16 = computes_in_bf16(device, cfg.amp)
    frames = detector.dataset(cfg, rows)
    for samples in loader(cfg, frames, sampler=items, batch_size=cfg.micro_batch, collate_fn=list):
        samples = [sample for sample in samples if sample]
        if samples:
            batch = torch.from_numpy(np.stack([sample['image'] for sample in samples]))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                answers = detector(batch.to(device))
            yield samples, answers


def detect_slices(detector, rows, items, device):
    """Items -> one by one i, z, boxes (n, 4) in S x S pixels and scores (n,)"""
    for samples, answers in infer(detector, rows, items, device):
        for sample, (boxes, scores) in zip(samples, detector.head.boxes(answers)):
            yield sample['row'], sample['frame'], boxes.numpy(), scores.numpy()


def find_lesions(detector, rows, device):
    """The findings of every row, all slices seen: (i, x, y, w, h, z, depth, score, slice of the best box), in
    pixels of the file; depth 0 in mammograms. Ranks share the rows. A row that cannot be read has no
    findings, so that its lesions count as missed."""
    cfg, items, findings = detector.cfg, [], []
    for i in range(dist.get_rank(), len(rows), dist.get_world_size()):
        try:
            if rows[i].shape or not rows[i].boxes:      # else datasets.py has found the file unusable
                items += [(i, z) for z in frames_of(rows[i])]
        except (ValueError, OSError) as problem:
            tqdm.write(f'skipped: {problem}', file=sys.stderr)
    slices = tqdm(detect_slices(detector, rows, items, device), 'predicting', len(items),
                  unit='slice', leave=False, delay=2, disable=dist.get_rank() > 0 or None)
    for i, volume in itertools.groupby(slices, key=lambda one: one[0]):
        _, z, boxes, scores = zip(*volume)
        K, H, W = size_of(rows[i])
        boxes = np.concatenate(boxes) * np.array([W / cfg.size, H / cfg.size] * 2)
        z = np.repeat(z, [len(part) for part in scores])
        merged = volume_findings(boxes, np.concatenate(scores), z, cfg.overlap, cfg.gap)[:cfg.top]
        if K == 1:
            merged[:, 5] = 0                            # depth
        findings += [(i, *line) for line in merged.tolist()]
    return sorted(gathered(findings), key=lambda line: line[0])


def volume_findings(boxes, scores, slices, overlap, gap):
    """The findings of the slices of a volume, boxes (n, 4), scores (n,), slices (n,) -> those of the volume,
    best first: rows x y w h z depth score slice (m, 8), where x y w h, score and slice are those of the best
    box, z is the first slice and depth the number of slices. The rule is ours; 2.4 gives none.

    The best box that is left starts a finding. A box is at its place if it shares at least `overlap` of the
    smaller area with it. Up and down from its slice, the finding goes on while boxes at its place with at
    least half its score follow each other at most `gap` slices apart. The boxes at its place, up to `gap`
    slices beyond, are left no more. All boxes are compared with the first, so that neither a chain of boxes
    nor faint boxes on every slice make a finding long."""
    boxes = torch.as_tensor(np.asarray(boxes, float)).view(-1, 4)
    scores, slices = np.asarray(scores, float), np.asarray(slices, int)
    left, rows = np.lexsort((slices, -scores)), []          # numbers of the boxes, the best first
    while len(left):
        best, others, z = left[0], boxes[left], slices[left]
        smaller = torch.minimum(retinanet.area(others), retinanet.area(others[:1]))
        at_place = (retinanet.intersection(others[:1], others)[0] >= overlap * smaller).numpy()
        at_place[0] = True                                  # the best box itself, whatever `overlap` is
        strong = np.unique(z[at_place & (scores[left] >= scores[best] / 2)])
        low = high = z[0]
        for up in strong[strong > high]:
            high = up if up - high <= gap else high
        for down in strong[strong < low][::-1]:
            low = down if low - down <= gap else low
        x0, y0, x1, y1 = others[0].tolist()
        rows.append((x0, y0, x1 - x0, y1 - y0, low, high - low + 1, scores[best], z[0]))
        left = left[~(at_place & (z >= low - gap) & (z <= high + gap))]
    return np.array(rows, float).reshape(-1, 8)


def merge_slices(boxes, scores, slices, overlap=0.5, gap=1):
    """`volume_findings` without the slice of the best box: rows x y w h z depth score (m, 7)"""
    return volume_findings(boxes, scores, slices, overlap, gap)[:, :7]


def write(out, rows, findings):
    """predictions.csv, labels.csv and boxes.csv, with the columns of the challenge in its order, x w y h in
    the predictions and x y w h in the boxes. VolumeSlices of mammograms is 1. What is neither normal nor
    benign nor cancer counts as actionable."""
    labels, boxes = [], []
    for row in rows:
        kinds = {box[-1] for box in row.boxes}
        benign, cancer, normal = 'benign' in kinds, 'cancer' in kinds, row.normal and not kinds
        flags = normal, not (normal or benign or cancer), benign, cancer
        labels.append((*row.key, *map(int, flags)))
        least = 1 + max([box[0] for box in row.boxes], default=0)       # of a file that is unreadable
        slices = row.shape[0] if row.shape else row.record.get('VolumeSlices') or least
        boxes += [(*row.key, '', z, x0, y0, x1 - x0, y1 - y0, kind, '', slices)
                  for z, x0, y0, x1, y1, kind in row.boxes]
    lines = [(*rows[i].key, *(f'{v:.6g}' for v in (x, w, y, h)), int(z), int(depth), repr(value))
             for i, x, y, w, h, z, depth, value, _ in findings]
    score.write_csv(out / 'labels.csv', score.LABEL, labels)
    score.write_csv(out / 'boxes.csv', score.BOX, boxes)
    score.write_csv(out / 'predictions.csv', score.PREDICTION, lines)


# ---- one run --------------------------------------------------------------------------------------

def load(cfg):
    """Rows and notes of a data set. A file that cannot be used takes no part in training and validation; in
    the test set it stays, and its lesions count as missed."""
    rows, notes = datasets.load(cfg.dataset, cfg.root, cfg.images, cfg.seed, boxes=True,
                                findings=cfg.findings)
    side = min((min(row.shape[1:]) for row in rows if row.shape), default=math.inf)
    if cfg.min_distance > side / 10:
        notes.append(f'--min_distance {cfg.min_distance:g} is over a tenth of the smallest image, '
                     f'{side} pixels: a hit may be far from its lesion')
    return rows, notes


def train_and_test(cfg, device, build=build, load=load):
    """A run, from the flags to the scores; fuse.py gives its own `build` and `load`."""
    out, rank = Path(cfg.out), dist.get_rank()
    if rank == 0:
        if (out / 'last.pt').exists() and not cfg.resume:
            raise ValueError(f'{out} holds a run; --resume continues it, or choose another --out')
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out)                                    # noqa: F841, until this function returns
    state = checkpoint_to_resume(cfg)
    detector = build(cfg, state).to(device)                 # refuses a wrong --encoder before the reading
    rows, notes = on_rank_0(load, cfg)
    parts = {name: [row for row in rows if row.split == name] for name in ('train', 'val', 'test')}
    for name, part in parts.items():
        if not detector.items(part):
            raise ValueError('; '.join([f'the {name} split has no lesion or no pair', *notes]))
    if rank == 0:
        introduce(detector, parts, notes, device)
    best = train(detector, parts['train'], parts['val'], device, out, state)
    detector.finish(parts['test'], best, notes, device, out)
    dist.barrier()


def introduce(detector, parts, notes, device):
    """What is about to be trained on what"""
    cfg, ranks = detector.cfg, dist.get_world_size()
    encoder = cfg.init_from or ('random weights' if cfg.random_encoder else cfg.encoder)
    trainable = sum(p.numel() for p in detector.parameters() if p.requires_grad) / 1e6
    accumulate = math.ceil(cfg.batch // ranks / cfg.micro_batch)
    precision = 'bf16' if computes_in_bf16(device, cfg.amp) else 'fp32'
    print(f'\n{cfg.dataset} {cfg.root}: {cfg.head} on {encoder}, '
          f'{trainable:.1f} M parameters to train\n  batches of {cfg.batch} = {ranks} ranks x '
          f'{accumulate} micro-batches, {cfg.size}x{cfg.size} pixels, {device.type} in {precision}')
    for name, rows in parts.items():
        print(f'  {name}: {len(rows)} images or volumes of {len({row.patient for row in rows})} '
              f'patients, {sum(len(row.boxes) for row in rows)} lesions')
    print(*(f'  {note}\n' for note in notes), sep='', end='', flush=True)


# ---- findings in one file -------------------------------------------------------------------------

def predict(argv, device, config=Config, build=build):
    """Findings in one file: findings.json, and a picture of each"""
    parser = argparse.ArgumentParser(prog=f'{Path(sys.argv[0]).name} predict')
    parser.add_argument('file', metavar='FILE', help='a mammogram or a DBT volume')
    parser.add_argument('--checkpoint', required=True, metavar='RUN', help='a finished run')
    parser.add_argument('--threshold', type=float, help='least score; by default that at one false '
                        'positive per validation slice')
    parser.add_argument('--out', default='runs/predict', help='folder to write')
    args = parser.parse_args(argv)
    state = read_checkpoint(args.checkpoint)
    if state['config'].keys() != vars(config()).keys():
        raise ValueError(f'{args.checkpoint} is no run of this script; detect.py and fuse.py load '
                         'their own')
    cfg = replace(config(**state['config']), workers=0)
    detector = build(cfg, state).to(device)
    detector.load_state_dict(state['best_weights'])
    images.read(args.file, 0, cfg.voi)                      # a picture that is refused says why here
    threshold = state['best']['threshold'] if args.threshold is None else args.threshold
    out, findings = Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob('finding_*.png'):
        old.unlink()
    rows = find_lesions(detector, [datasets.Row(args.file, '')], device)
    for _, x, y, w, h, z, depth, value, frame in rows:
        if value >= threshold:
            box, frame = (x, y, x + w, y + h), int(frame)
            picture = boxed(images.read(args.file, frame, cfg.voi), [(*box, value)])
            picture.save(out / f'finding_{len(findings):02d}.png')
            edges = {name: round(edge, 1) for name, edge in zip(('x0', 'y0', 'x1', 'y1'), box)}
            findings.append(dict(edges, frame=frame, first_frame=int(z),
                                 last_frame=int(z + max(depth, 1) - 1), score=round(value, 4)))
    score.write_json(out / 'findings.json',
                     dict(file=args.file, threshold=threshold, findings=findings))
    print(f'{len(findings)} findings of score {threshold:.3f} or more -> {out}/findings.json, '
          '*.png')


def boxed(image, findings=(), truth=(), side=900):
    """A slice (H, W) as RGB, its longer side `side` pixels: findings (x0, y0, x1, y1, score) in orange, truth
    (x0, y0, x1, y1) in blue"""
    scale = side / max(image.shape)
    size = [max(1, round(scale * length)) for length in image.shape[::-1]]
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).convert('RGB')
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for box in truth:                                       # a little larger, so that findings stay visible
        x0, y0, x1, y1 = (scale * edge for edge in box)
        pen.rectangle([x0 - 5, y0 - 5, x1 + 5, y1 + 5], outline='#56B4E9', width=2)
    for *box, value in findings:
        x0, y0, x1, y1 = (scale * edge for edge in box)
        pen.rectangle([x0, y0, x1, y1], outline='#E69F00', width=2)
        pen.text((x0, max(y0 - 20, 2)), f'{value:.2f}', '#E69F00', font)
    return picture


# ---- the demo, no part of the method --------------------------------------------------------------

DEMO = dict(out='runs/detect-demo', encoder='runs/demo/last.pt', size=252, channels=64, epochs=7,
            batch=16, micro_batch=16, lr=2e-3, workers=0, dropout=0.05,
            min_distance=10.0)                              # of 256 pixels, as 100 are of 2457
DETR_DEMO = DEMO | dict(out='runs/detr-demo', queries=50, layers=(1, 3), denoising=20, lr=1e-3)


def defaults(given):
    """The defaults where --root is not among the given flags"""
    if 'root' in given:
        return {}
    flags = DETR_DEMO if given.get('head') == 'detr' else DEMO
    if os.path.isfile(DEMO['encoder']):                     # pretrain.py's demo makes it
        return flags
    return flags | dict(encoder=None, random_encoder='encoder' not in given)


def demo(cfg, device):
    """An untrained and a trained detector find lesions in synthetic volumes that no training has seen."""
    out, names = Path(cfg.out), ('untrained', 'trained')
    cfg = replace(cfg, root=f'{out}/phantoms', resume=False)
    if dist.get_rank() == 0:
        if (out / 'last.pt').exists():
            raise ValueError(f'{out} holds a run; choose another --out, or give --root DIR')
        print('A demonstration on phantoms, without clinical meaning; --root DIR takes a data set. '
              f'`torchrun pretrain.py` makes its encoder, {DEMO["encoder"]}')
        make_phantoms(cfg)
        for name in names:                                  # the demo before is replaced
            (out / name / 'last.pt').unlink(missing_ok=True)
    for name, epochs in zip(names, (0, cfg.epochs)):
        train_and_test(replace(cfg, out=f'{out}/{name}', epochs=epochs), device)
    if dist.get_rank() == 0:
        runs = {name: score.read_predictions(out / name) for name in names}
        truth = score.read_truth(out / 'trained/labels.csv', out / 'trained/boxes.csv')
        score.lesions(runs, *truth, cfg.min_distance, cfg.draws, cfg.seed, out)
        picture_sheet(Path(cfg.root), runs, truth[1]).save(out / 'overlay.png')
        print(f'-> {out}: scores.json, froc.png and overlay.png of both: untrained above, trained '
              'below, lesions in blue')


def picture_sheet(folder, runs, truth, columns=5):
    """The slices of the first lesions with the best three findings that reach them, a line per run"""
    lines = []
    for rows in runs.values():
        pictures = []
        for key, x, y, w, h, slice_ in truth[:columns]:
            reach = [row for row in rows if row[0] == key and row[5] <= slice_ < row[5] + row[6]]
            best = [(left, top, left + width, top + height, value)
                    for _, left, top, width, height, _, _, value in reach[:3]]
            image = images.read(folder / f'{key[0]}.npy', int(slice_))
            pictures.append(np.asarray(boxed(image, best, [(x, y, x + w, y + h)], side=300)))
        lines.append(np.hstack(pictures))
    return Image.fromarray(np.vstack(lines))


def make_phantoms(cfg):
    """Volumes with and without a lesion, as prepare.py would leave them, and lesions.csv"""
    volumes, lines = [], []
    for i in range(cfg.phantoms):
        split = 'train' if i < 0.65 * cfg.phantoms else 'val' if i < 0.75 * cfg.phantoms else 'test'
        rng = np.random.default_rng([cfg.seed, i, 0, 5])    # the other demos draw 1 to 4
        example = phantom.breast(rng, slices=8, lesion=i % 3 > 0)
        volumes.append(np.stack([images.clahe(images.to_uint8(image)) for image in example.volume]))
        boxes = [(int(z), *box, 'cancer') for z, *box in example.boxes] or [[''] * 6]
        lines += [(f'{i:04d}.npy', f'{i:04d}', split, *box) for box in boxes]
    phantom.dataset(cfg.root, volumes)
    columns = 'path patient split frame x0 y0 x1 y1 label'
    score.write_csv(Path(cfg.root, 'lesions.csv'), columns.split(), lines)


def main(argv):
    """predict, a run, or without --root the demo"""
    _, ranks, device = setup()
    if argv[:1] == ['predict']:
        predict(argv[1:], device)
    else:
        cfg = parse(Config, argv, defaults, source='root')
        check_flags(cfg, ranks)
        if cfg.root is None and any(flag.startswith('--dataset') for flag in argv):
            raise ValueError('--dataset needs --root DIR; without them this is a demo')
        demo(cfg, device) if cfg.root is None else train_and_test(cfg, device)
    dist.destroy_process_group()


if __name__ == '__main__':
    script('detect.py', main)
