"""Lesions in mammograms and tomosynthesis volumes (DBT): RetinaNet on the tokens of the ViT (DBT-DINO, arXiv
2512.13608, 2.4, 6.2.3; retinanet.py), or DINO-DETR (IHRRB-DINO; detr.py).

    $ python detect.py                                      # on phantoms, no data needed
    $ python detect.py --root lesions.csv --encoder runs/mammodino/last.pt --out RUN
    $ torchrun --nproc-per-node 8 detect.py --dataset bcs --root DIR --encoder FILE --out RUN
    $ python detect.py predict FILE --checkpoint RUN        # findings.json and pictures
    $ python score.py RUN_A RUN_B                           # sensitivities, intervals, tests, curves

A slice, resized to S x S pixels, becomes patch tokens of an encoder, frozen or finetuned, then four pyramid
levels, then boxes with scores. The boxes of all slices of a volume merge into findings in pixels of the file.
OUT receives last.pt, log.jsonl, lesions.csv (the data set as it was read, for --root), and in the format of
the DBTex challenge predictions.csv, labels.csv and boxes.csv.

B images, c channels (1, see fuse.py), S pixels of a side, D width, C channels of the pyramid, h w cells of a
level, A anchors, G lesions, n boxes, K slices, H W pixels of a file. Boxes are x0 y0 x1 y1. A row is a
mammogram or a volume (datasets.py); an item (i, z) is slice z of row i, with z None one of its normal slices.
"""
import argparse
import copy
import hashlib
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
    """Every field is a flag. Sources: [6.2.3] and the like are sections of DBT-DINO; [retinanet] Lin 2017;
    [dino] the DINO detector, Zhang 2022; [dbtex] the challenge; [ours] a choice of this repository."""
    dataset: str = option('csv', 'ours', 'bcs, vindr, cbis, mias or csv', group='data')
    root: str | None = option(None, 'ours', 'the data set as published, or a list; or a demo')
    images: str | None = option(None, 'ours', 'where prepare.py put the images of --root')
    findings: tuple[str, ...] = option((), 'ours', 'kinds of lesions that count; by default all')
    voi: bool = option(False, 'dbt-dino', 'apply the VOI LUT or window of DICOM files')
    clahe: bool = option(True, 'ours', 'CLAHE of files that prepare.py has not seen')
    size: int = option(518, '6.2.3', 'pixels of the square image, a multiple of 14')
    augment: bool = option(True, '6.2.3', 'flips, zoom, coarse dropout, gamma, noise')
    normals: float = option(1.0, 'ours', 'normal slices for each annotated one; in the paper 0')

    encoder: str | None = option(None, 'ours', 'last.pt, or the official DINOv2 file',
                                 group='encoder and detector')
    imagenet: bool = option(True, 'ours', '--encoder was fed ImageNet-normalised images')
    random_encoder: bool = option(False, 'ours', 'random weights, shaped like --encoder')
    freeze: bool = option(True, '2.4', 'train the detector alone; --no-freeze: the encoder too')
    init_from: str | None = option(None, 'ours', 'a run whose weights the detector starts from')
    channels: int = option(256, '6.2.3', 'of pyramid and head, a multiple of 32')
    head: str = option('retinanet', '6.2.3', 'retinanet, or detr: DINO-DETR')
    top: int = option(50, 'ours', 'boxes kept in a slice, and findings in a volume')
    overlap: float = option(0.5, 'ours', 'share of the smaller box that makes two boxes one')
    gap: int = option(1, 'ours', 'slices from one box of a finding to the next, at most')

    dropout: float = option(0.1, '6.2.3', 'of channels, in each layer of a tower', group='RetinaNet')
    alpha: float = option(0.25, 'retinanet', 'focal loss: weight of the positives')
    gamma: float = option(2.0, 'retinanet', 'focal loss: how fast easy anchors fade')
    nms: float = option(0.1, '6.2.3', 'IoU above which the weaker of two boxes of a slice goes')

    queries: int = option(300, 'dino', 'boxes that the decoder refines; there 900',
                         group='DINO-DETR')
    layers: tuple[int, int] = option((2, 6), 'dino', 'of encoder and decoder; 6 6 there')
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

    min_distance: float = option(100.0, 'dbtex', 'pixels of the file between centres: a hit at '
                                 'any size', group='scores')
    draws: int = option(1000, '2.5', 'bootstrap draws of patients')

    phantoms: int = option(300, 'ours', 'volumes: 65 % train, 10 % val, 25 % test', group='demo')

    def __post_init__(self):
        lr, clip = (1e-4, 0.1) if self.head == 'detr' else (5e-4, 1.0)
        self.lr = lr if self.lr is None else self.lr
        self.clip = clip if self.clip is None else self.clip


SMALL = dict(size=84, width=128, depth=4, heads=4)          # the encoder of pretrain.py's demo
FREE = {'root', 'out', 'resume', 'workers', 'overlap', 'gap', 'min_distance', 'draws'}  # with --resume


def check(cfg, ranks):
    """ValueError for flags that cannot work, before hours of reading"""
    choices = dict(dataset=('bcs', 'vindr', 'cbis', 'mias', 'csv'), head=('retinanet', 'detr'))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise ValueError(f"--{name} {getattr(cfg, name)}: expected {', '.join(allowed)}")
    for name, factor in dict(size=14, channels=32, batch=ranks).items():    # patch, GroupNorm, ranks
        if getattr(cfg, name) % factor:
            raise ValueError(f'--{name} {getattr(cfg, name)}: expected a multiple of {factor}')
    if not (cfg.encoder or cfg.random_encoder or cfg.init_from):
        raise ValueError('--encoder FILE is missing; --random_encoder does without')


# ---- the detector (2.4, 6.2.3) --------------------------------------------------------------------

class Features(nn.Module):
    """Encoder and pyramid: images uint8 (B, c, S, S) -> P3 to P6 of the first channel, (B, C, h, w)"""

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
    """Encoder, pyramid and head: images (B, c, S, S) -> the answers of the head, `Anchored` or `Queried`"""

    splits = ('train', 'val', 'test')                       # that need marked slices

    def __init__(self, cfg, encoder):
        super().__init__(encoder, cfg.channels, cfg.freeze)
        self.cfg, self.head, self.other = cfg, self.new_head(cfg), None     # other: see fuse.py

    def new_head(self, cfg):
        return Queried(cfg) if cfg.head == 'detr' else Anchored(cfg)

    def forward(self, images, boxes=None):
        """boxes: in training the truth, B times (G, 4)"""
        return self.head(self.levels(images), boxes)

    def frames(self, rows):
        return Frames(self.cfg, rows)

    def marked(self, rows):
        """Items that are in every epoch: the annotated slices"""
        return [(i, z) for i, row in enumerate(rows) for z in sorted({box[0] for box in row.boxes})]

    def validate(self, rows, device):
        return validated(self, rows, device)

    def finish(self, rows, best, notes, device, out):
        tested(self, rows, best, notes, device, out)


class Anchored(nn.Module):
    """RetinaNet: levels -> logits (B, A) and deltas (B, A, 4)"""

    TERMS = ('focal', 'box')
    atd = ()

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

    def findings(self, answers):
        """For each image boxes (n, 4) in its pixels and scores (n,), best first, on the CPU"""
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
        self.cfg, (lambda1, lambda2) = cfg, cfg.lambdas
        self.net = detr.DinoDetr(cfg.channels, 1, cfg.queries, *cfg.layers, hidden=8 * cfg.channels,
                                 denoising=cfg.denoising, centres=centres, lambda1=lambda1,
                                 lambda2=lambda2)
        self.net.label_enc.requires_grad_(cfg.denoising > 0)    # DDP would wait for its gradient
        self.atd = []                                       # ATD(k) of the micro-batches of an epoch

    def forward(self, levels, boxes=None):
        return self.net(levels, None if boxes is None else self.targets(boxes, levels[0].device))

    def targets(self, boxes, device):
        """Boxes in pixels, B times (G, 4) -> labels (G,), centres and sides in shares of the image (G, 4)"""
        found = []
        for low, high in ((box[:, :2].to(device), box[:, 2:].to(device)) for box in boxes):
            shares = torch.cat([low + high, 2 * (high - low)], dim=1) / (2 * self.cfg.size)
            labels = torch.zeros(len(shares), dtype=torch.long, device=device)
            found.append(dict(labels=labels, boxes=shares))
        return found

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

    def findings(self, answers):
        """The best `--top` of the last layer; a set of boxes needs no suppression."""
        logits, boxes = (part.float() for part in answers['layers'][-1])                # (B, Q, 1), (B, Q, 4)
        scores, best = logits[..., 0].sigmoid().topk(min(self.cfg.top, logits.shape[1]))
        boxes = boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))                   # (B, n, 4)
        boxes = (detr.corners(boxes) * self.cfg.size).clamp(0, self.cfg.size)
        return list(zip(boxes.cpu(), scores.cpu()))


def build(cfg, state=None, start=None):
    """A detector to be filled from the checkpoint `state`, or one that starts from --init_from (its
    checkpoint: `start`), from --encoder or from random weights."""
    start = state or start or (checkpoint(cfg.init_from) if cfg.init_from else None)
    if start:
        encoder = vit.ViT(**start['vit'])
    else:
        encoder = vit.load(cfg.encoder, imagenet=cfg.imagenet) if cfg.encoder else vit.ViT(**SMALL)
    if encoder.patch != 14:
        raise ValueError(f'{cfg.encoder}: patches of {encoder.patch} pixels; expected 14')
    torch.manual_seed(cfg.seed)
    if not start and (cfg.random_encoder or not cfg.encoder):
        encoder = vit.ViT(**encoder.config, layerscale=1.0)     # at DINOv2's 1e-5, blocks do nothing
    detector = Detector(cfg, encoder)
    if start and not state:
        own = detector.state_dict()                         # another --head or --queries starts anew
        alike = {k: v for k, v in start['best_weights'].items()
                 if k in own and v.shape == own[k].shape}
        if any(k.startswith(('encoder.', 'pyramid.')) and k not in alike for k in own):
            raise ValueError(f'--channels {cfg.channels}: {cfg.init_from} has another number')
        detector.load_state_dict(own | alike)
    return detector


# ---- slices -> samples ----------------------------------------------------------------------------

def normal_frames(row):
    """Frames that may serve as normal. A lesion is marked on one slice and reaches beyond it, so those within
    K / 4 of a marked one, the challenge's own tolerance, do not."""
    reach = size_of(row)[0] / 4
    return [z for z in frames_of(row) if all(abs(z - box[0]) > reach for box in row.boxes)]


def normal_rows(rows):
    """Numbers of the rows that have a normal frame; the header of one without boxes is not read."""
    return [i for i, row in enumerate(rows) if row.normal and (not row.boxes or normal_frames(row))]


def size_of(row):
    """(K, H, W) of the published file"""
    row.shape = row.shape or images.shape(row.file)
    return row.shape


def frames_of(row):
    return range(size_of(row)[0]) if row.frame is None else [row.frame]


def on_frames(row, chosen, size):
    """The boxes marked on the chosen frames, in pixels of the S x S image, clipped to it: (G, 4)"""
    _, H, W = size_of(row)
    boxes = np.array([box[1:5] for box in row.boxes if box[0] in chosen], float).reshape(-1, 4)
    return (boxes * np.array([size / W, size / H] * 2)).clip(0, size)


def upright(image, side):
    """BCS-DBT's rule for volumes that are stored upside down: the breast lies at the brighter of the outer
    columns. Where that is not `side` (L or R), the image needs a turn by 180 degrees, not a mirror."""
    left, right = image[:, 0].sum(dtype=np.int64), image[:, -1].sum(dtype=np.int64)
    return image if side == ('R' if left < right else 'L') else image[::-1, ::-1]


class Frames(Dataset):
    """(i, z) -> a sample for prediction, None for a file that cannot be read; (i, z, epoch, index) -> one for
    training: a dict with the image, uint8 (c, S, S), in training with boxes (G, 4) and match (A,)."""

    channels = 1

    def __init__(self, cfg, rows):
        self.cfg, self.rows, self.anchors = cfg, rows, retinanet.anchors(cfg.size)
        self.turned = {}                                    # i -> whether the volume is upside down

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        try:
            return self.plain(*item) if len(item) == 2 else self.augmented(*item)
        except (ValueError, OSError) as problem:
            tqdm.write(f'skipped: {problem}', file=sys.stderr)
        if len(item) == 4:                                  # black, and every anchor is ignored
            return dict(image=np.zeros((self.channels, self.cfg.size, self.cfg.size), np.uint8),
                        boxes=torch.zeros(0, 4), match=torch.full((len(self.anchors),), -2))

    def read(self, i, z):
        """The c channels of a sample, uint8 (S, S) each"""
        row = self.rows[i]
        if row.upside and i not in self.turned:             # the first frame decides
            first = images.read(row.path, 0, self.cfg.voi)
            self.turned[i] = upright(first, row.laterality) is not first
        return [self.square(row, z, self.turned.get(i))]

    def square(self, row, z, turned=False):
        """A frame, with CLAHE where prepare.py has not applied it (MammoDINO 3.1), uint8 (S, S)"""
        image = images.read(row.path, z, self.cfg.voi)                                  # (H, W)
        image = image[::-1, ::-1] if turned else image
        if self.cfg.clahe and not row.path.lower().endswith('.npy'):
            image = images.clahe(np.ascontiguousarray(image))
        side = self.cfg.size, self.cfg.size
        return np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BICUBIC))

    def plain(self, i, z):
        frames = normal_frames(self.rows[i]) if z is None else [z]
        return dict(row=i, frame=z, image=np.stack(self.read(i, frames[len(frames) // 2])))

    def augmented(self, i, z, epoch, index):
        cfg, row, rng = self.cfg, self.rows[i], np.random.default_rng([self.cfg.seed, epoch, index])
        if z is None:
            frames = normal_frames(row)
            z = frames[rng.integers(len(frames))]
        nearby = {box[0] for box in row.boxes if 0 < abs(box[0] - z) <= size_of(row)[0] / 4}
        here, near = on_frames(row, {z}, cfg.size), on_frames(row, nearby, cfg.size)
        boxes, (image, *others) = np.concatenate([here, near]), self.read(i, z)
        if cfg.augment:     # other channels move alike and keep their grey levels: fuse.py learns from them
            others = [moved(copy.deepcopy(rng), other, boxes)[0] for other in others]
            image, boxes = augment(rng, image, boxes)
        here, near = torch.from_numpy(boxes).float().split([len(here), len(near)])
        match, beside = (retinanet.match(part, self.anchors) for part in (here, near))
        match[(match == -1) & (beside != -1)] = -2          # a lesion of another slice may be seen here
        return dict(image=np.stack([image, *others]), boxes=here, match=match)


def augment(rng, image, boxes):
    """6.2.3, image uint8 (S, S), boxes (G, 4): `moved`, then with probability 0.3 each 15 to 20 black
    rectangles with sides of 20 to 40 pixels of 518 that touch no box; gamma 0.8 to 1.2; noise of 0.05."""
    image, boxes = moved(rng, image, boxes)
    S, unit = len(image), len(image) / 518
    if rng.random() < 0.3:
        image = image.copy()
        for _ in range(rng.integers(15, 21)):
            w, h = (max(1, round(unit * side)) for side in rng.uniform(20, 40, 2))
            x, y = int(rng.integers(S - w + 1)), int(rng.integers(S - h + 1))
            beside = (boxes[:, 0] >= x + w) | (boxes[:, 2] <= x)
            if (beside | (boxes[:, 1] >= y + h) | (boxes[:, 3] <= y)).all():
                image[y:y + h, x:x + w] = 0
    if rng.random() < 0.3:
        table = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.8, 1.2)
        image = np.uint8(table.round())[image]
    if rng.random() < 0.3:
        noisy = image + 255 * 0.05 * rng.standard_normal(image.shape, np.float32)
        image = np.uint8(noisy.clip(0, 255).round())
    return np.ascontiguousarray(image), boxes


def moved(rng, image, boxes):
    """Each flip with probability 0.5, and with 0.5 a zoom by 0.8 to 1.5 that keeps every box whole, 15 to 206
    pixels of 518 wide and 9 to 182 high, or none. What it draws depends on the boxes, not on the image."""
    S = len(image)
    if rng.random() < 0.5:
        x0, y0, x1, y1 = boxes.T
        image, boxes = image[:, ::-1], np.stack([S - x1, y0, S - x0, y1], axis=1)
    if rng.random() < 0.5:
        x0, y0, x1, y1 = boxes.T
        image, boxes = image[::-1], np.stack([x0, S - y1, x1, S - y0], axis=1)
    window = zoom_window(rng, S, boxes) if rng.random() < 0.5 else None
    if window:
        x, y, scale = window
        image = Image.fromarray(image).transform(
            (S, S), Image.Transform.AFFINE, (scale, 0, x, 0, scale, y), Image.Resampling.BICUBIC)
        boxes = (boxes - [x, y, x, y]) / scale
    return np.ascontiguousarray(image), boxes


def zoom_window(rng, S, boxes, tries=10):
    """Corner x, y and side / S of the square that becomes the image, black outside of it; None where no try
    keeps every box whole and within its limits"""
    for _ in range(tries):
        side = S / rng.uniform(0.8, 1.5)
        sizes = (boxes[:, 2:] - boxes[:, :2]) * S / side                                # (G, 2)
        low, high = np.full(2, min(0, S - side)), np.full(2, max(0, S - side))
        if len(boxes):
            low = np.maximum(low, boxes[:, 2:].max(0) - side)
            high = np.minimum(high, boxes[:, :2].min(0))
        least, most = np.array([15, 9]) * (S / 518), np.array([206, 182]) * (S / 518)
        if ((sizes >= least) & (sizes <= most)).all() and (low <= high).all():
            return *rng.uniform(low, high), side / S


def collate(samples):
    """A micro-batch: images (B, c, S, S), boxes B times (G, 4), match (B, A)"""
    return dict(images=torch.from_numpy(np.stack([sample['image'] for sample in samples])),
                boxes=[sample['boxes'] for sample in samples],
                match=torch.stack([sample['match'] for sample in samples]))


def loader(cfg, frames, **how):
    return DataLoader(frames, num_workers=cfg.workers, timeout=1800 if cfg.workers else 0, **how)


# ---- training -------------------------------------------------------------------------------------

def plan(cfg, marked, well, start, rank, ranks):
    """Steps of an epoch, and this rank's micro-batches of all epochs from `start` on, lists of (i, z, epoch,
    index). An epoch is every marked item and, of the rows `well`, --normals times as many normal ones,
    shuffled and filled up to whole batches, the same however many ranks share them."""
    wanted = round(cfg.normals * len(marked)) if well else 0
    steps = math.ceil((len(marked) + wanted) / cfg.batch)

    def generate():
        for epoch in range(start, cfg.epochs):
            rng = np.random.default_rng([cfg.seed, epoch])
            rounds = math.ceil(wanted / max(len(well), 1))
            drawn = [int(i) for _ in range(rounds) for i in rng.permutation(well)][:wanted]
            items = marked + [(i, None) for i in drawn]
            order = np.resize(rng.permutation(len(items)), (steps, cfg.batch))
            for step, batch in enumerate(order):
                mine = [(*items[n], epoch, step * cfg.batch + j) for j, n in enumerate(batch)]
                mine = mine[rank::ranks]
                for k in range(0, len(mine), cfg.micro_batch):
                    yield mine[k:k + cfg.micro_batch]

    return steps, generate()


def learn(ddp, micro, device):
    """Adds up the gradients of one step: the head's TERMS, summed over micro-batches and ranks and divided by
    its count over all of them -> this rank's part of the TERMS"""
    cfg, head = ddp.module.cfg, ddp.module.head
    count = sum(head.count(batch) for batch in micro).to(device, torch.float32)
    dist.all_reduce(count)
    sums, bf16 = torch.zeros(len(head.TERMS), device=device), computes_in_bf16(device, cfg.amp)
    for batch in micro:
        with nullcontext() if batch is micro[-1] else ddp.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                answers = ddp(batch['images'].to(device), batch['boxes'])
            terms = head.loss(answers, batch) / count.clamp_min(1)
            (dist.get_world_size() * terms.sum()).backward()    # DDP takes the mean over ranks
        sums += terms.detach()
    return sums


def train(detector, rows, device, out, state=None):
    """Epochs until the patience ends -> dict(score, epoch, threshold) of the best by validation, whose
    weights the detector then has. `state`: the checkpoint to continue. OUT/log.jsonl has a line per epoch."""
    cfg, rank, ranks = detector.cfg, dist.get_rank(), dist.get_world_size()
    training, validation = ([row for row in rows if row.split == part] for part in ('train', 'val'))
    groups = vit.param_groups(detector, cfg.lr, cfg.wd, cfg.layer_decay)
    groups = [g | dict(params=[p for p in g['params'] if p.requires_grad]) for g in groups]
    optimizer = torch.optim.AdamW([g for g in groups if g['params']])
    start, best, weights = 0, dict(score=-1.0, epoch=-1, threshold=0.5), copied(detector)
    if state:
        start, best, weights = state['epoch'], state['best'], state['best_weights']
        detector.load_state_dict(state['weights'])
        optimizer.load_state_dict(state['optimizer'])

    marked, well = detector.marked(training), normal_rows(training)
    steps, items = plan(cfg, marked, well, start, rank, ranks)
    batches = iter(loader(cfg, detector.frames(training), batch_sampler=items, collate_fn=collate))
    accumulate = math.ceil(cfg.batch // ranks / cfg.micro_batch)
    ddp = nn.parallel.DistributedDataParallel(
        detector, device_ids=[device] if device.type == 'cuda' else None)
    total = cfg.epochs * steps
    hidden = rank > 0 or not total or None                  # None: shown on a terminal alone
    bar = tqdm(total=total, initial=start * steps, unit='step', disable=hidden)
    for epoch in range(start, cfg.epochs):
        if epoch - best['epoch'] > cfg.patience:
            break
        sums = torch.zeros(len(detector.head.TERMS), device=device)
        detector.train()
        for step in range(epoch * steps, (epoch + 1) * steps):
            seed = np.random.SeedSequence([cfg.seed, step, rank]).generate_state(1)[0]
            torch.manual_seed(int(seed))                    # dropout must repeat after --resume
            rate = cosine(step, total, cfg.lr, 1e-6, warmup=min(100, total // 10))
            for group in optimizer.param_groups:
                group['lr'] = group['lr_scale'] * rate
            sums += learn(ddp, [next(batches) for _ in range(accumulate)], device)
            norm = nn.utils.clip_grad_norm_(detector.parameters(), cfg.clip)
            if not norm.isfinite():
                raise ValueError(f'step {step}: the gradient is not finite; lower --lr')
            optimizer.step()
            optimizer.zero_grad()
            bar.update()

        dist.all_reduce(sums)
        value, about = detector.validate(validation, device)
        if value > best['score']:
            best, weights = dict(best, score=value, epoch=epoch, **about), copied(detector)
        sums /= steps
        terms = dict(zip(detector.head.TERMS, sums.tolist()), loss=sums.sum().item())
        if detector.head.atd:                               # of this rank
            terms['atd'] = torch.stack(detector.head.atd).mean().item()
            detector.head.atd.clear()
        line = dict(epoch=epoch, **terms, validation=value,
                    best=best['score'], best_epoch=best['epoch'])
        bar.set_postfix({name: f'{line[name]:.3f}' for name in ('loss', 'validation', 'best')})
        if rank == 0:
            keep(detector, rows, optimizer, epoch + 1, best, weights, out)
            with open(out / 'log.jsonl', 'a') as file:
                file.write(json.dumps(line) + '\n')
    bar.close()
    detector.load_state_dict(weights)
    if rank == 0 and not cfg.epochs:
        keep(detector, rows, optimizer, 0, best, weights, out)
    dist.barrier()
    return best


def copied(detector):
    return {name: value.detach().cpu().clone() for name, value in detector.state_dict().items()}


def keep(detector, rows, optimizer, epoch, best, weights, out):
    """OUT/last.pt: the best weights to use, the current ones and the optimizer to continue exactly, and the
    best encoder under the names that vit.load reads. What is frozen is stored once."""
    frozen = {name for name, p in detector.named_parameters() if not p.requires_grad}
    teacher = {k.replace('encoder', 'backbone', 1): v for k, v in weights.items()
               if k.startswith('encoder.')}
    save(out / 'last.pt', dict(
        config=asdict(detector.cfg), rows=digest(rows), epoch=epoch, vit=detector.encoder.config,
        other=detector.other and detector.other.encoder.config, best=best, best_weights=weights,
        weights=copied(detector) | {name: weights[name] for name in frozen},
        optimizer=optimizer.state_dict(), teacher=teacher))


def digest(rows):
    """Changes with the images, boxes and splits that training sees"""
    seen = [(row.name, row.key, row.frame, row.split, row.boxes, row.normal,
             row.partner and row.partner.name) for row in rows if row.split != 'test']
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def checkpoint(folder):
    """OUT/last.pt of detect.py or fuse.py"""
    path = Path(folder, 'last.pt')
    state = vit.read(path) if path.exists() else {}
    if 'best_weights' not in state:
        raise ValueError(f'{path}: absent, or no detector; give a run of detect.py or fuse.py')
    return state


def resumed(cfg):
    """The checkpoint to continue, None without one. ValueError names the flags that differ from its own."""
    if not (cfg.resume and os.path.exists(f'{cfg.out}/last.pt')):
        return None
    state = checkpoint(cfg.out)
    old = state['config']
    changed = [f'--{name} {old.get(name)} -> {value}' for name, value in vars(cfg).items()
               if name not in FREE and old.get(name) != value]
    if changed:
        raise ValueError(f'{cfg.out} is another recipe: {", ".join(changed)}; choose another --out')
    return state


def restored(folder, config=Config, build=build):
    """A run -> its configuration, the detector with the best weights, and `best` as `train` returns it"""
    state = checkpoint(folder)
    if state['config'].keys() != vars(config()).keys():
        raise ValueError(f'{folder} is no run of this script; detect.py and fuse.py load their own')
    cfg = replace(config(**state['config']), workers=0, images=None, resume=False)
    detector = build(cfg, state)
    detector.load_state_dict(state['best_weights'])
    return cfg, detector.eval(), state['best']


def validated(detector, rows, device):
    """Mean sensitivity at 1 to 5 false positives per image over the annotated slices and --normals times as
    many normal ones (ours) -> it, and dict(threshold=the score at 1 false positive)

    A hit is within max(half the diagonal, 20 pixels of 518), about the challenge's 100 in 2457 rows."""
    cfg, items = detector.cfg, detector.marked(rows)
    truth = [((i, z), x0, y0, x1 - x0, y1 - y0) for i, z in items
             for x0, y0, x1, y1 in on_frames(rows[i], {z}, cfg.size)]
    order = np.random.default_rng([cfg.seed, 0, 0, 6]).permutation(normal_rows(rows))
    items += [(int(i), None) for i in sorted(order[:round(cfg.normals * len(items))])]
    found, mine = [], items[dist.get_rank()::dist.get_world_size()]
    for i, z, boxes, scores in detected(detector, rows, mine, device):
        found += [((i, z), x0, y0, x1 - x0, y1 - y0, value)
                  for (x0, y0, x1, y1), value in zip(boxes.tolist(), scores.tolist())]
    volumes = [(item, math.inf) for item in items]          # a slice has no depth
    m = metrics.matched(volumes, truth, gathered(found), min_distance=20 * cfg.size / 518)
    thresholds, false_positives, _ = metrics.curve(m, m.each(), every=True)
    threshold = thresholds[np.flatnonzero(false_positives <= 1)[-1]]
    value = metrics.sensitivity(m, [1, 2, 3, 4, 5], m.each()).mean()
    return float(value), dict(threshold=float(np.clip(threshold, 0, 1)))


# ---- prediction -----------------------------------------------------------------------------------

@torch.no_grad()
def answered(detector, rows, items, device):
    """Items -> lists of --micro_batch samples that could be read, and the answers to them. They stream: a few
    images are all that is ever held."""
    cfg = detector.eval().cfg
    bf16 = computes_in_bf16(device, cfg.amp)
    for samples in loader(cfg, detector.frames(rows), sampler=items, batch_size=cfg.micro_batch,
                          collate_fn=list):
        samples = [sample for sample in samples if sample]
        if samples:
            batch = torch.from_numpy(np.stack([sample['image'] for sample in samples]))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                answers = detector(batch.to(device))
            yield samples, answers


def detected(detector, rows, items, device):
    """Items -> one by one i, z, boxes (n, 4) in S x S pixels and scores (n,)"""
    for samples, answers in answered(detector, rows, items, device):
        for sample, (boxes, scores) in zip(samples, detector.head.findings(answers)):
            yield sample['row'], sample['frame'], boxes.numpy(), scores.numpy()


def predicted(detector, rows, device):
    """Findings of every row, all slices seen: (i, x, y, w, h, z, depth, score, slice of the best box), in
    pixels of the file; depth 0 in mammograms. Ranks share the rows. A row that cannot be read has no
    findings, so that its lesions count as missed."""
    cfg, items, found = detector.cfg, [], []
    for i in range(dist.get_rank(), len(rows), dist.get_world_size()):
        try:
            if rows[i].shape or not rows[i].boxes:          # else unusable: its lesions are missed
                items += [(i, z) for z in frames_of(rows[i])]
        except (ValueError, OSError) as problem:
            tqdm.write(f'skipped: {problem}', file=sys.stderr)
    slices = tqdm(detected(detector, rows, items, device), 'predicting', len(items), unit='slice',
                  leave=False, delay=2, disable=dist.get_rank() > 0 or None)
    for i, volume in itertools.groupby(slices, key=lambda one: one[0]):
        _, z, boxes, scores = zip(*volume)
        K, H, W = size_of(rows[i])
        boxes = np.concatenate(boxes) * np.array([W / cfg.size, H / cfg.size] * 2)
        z = np.repeat(z, [len(part) for part in scores])
        merged = findings_of(boxes, np.concatenate(scores), z, cfg.overlap, cfg.gap)[:cfg.top]
        merged[:, 5] *= K > 1
        found += [(i, *line) for line in merged.tolist()]
    return sorted(gathered(found), key=lambda line: line[0])


def findings_of(boxes, scores, slices, overlap, gap):
    """The boxes of all slices of a volume -> its findings, best first: boxes (n, 4), scores (n,), slices (n,)
    -> rows x y w h z depth score slice (m, 8): place, score and slice of the best box, first slice, number of
    slices. 2.4 says only that slices are aggregated to volumes; the rule is ours.

    The best box that is left starts a finding. Boxes that share at least `overlap` of the smaller area with
    it are at its place. Up and down from its slice, boxes there with half of its score or more carry it on,
    at most `gap` slices apart. Every box there, up to `gap` slices beyond, belongs to it. All boxes are
    compared with the first, so that a chain of boxes cannot wander away, and faint boxes on every slice do
    not make a long lesion."""
    boxes = torch.as_tensor(np.asarray(boxes, float)).view(-1, 4)
    scores, slices = np.asarray(scores, float), np.asarray(slices, int)
    left, found = np.lexsort((slices, -scores)), []
    while len(left):
        first, here, others = left[0], slices[left], boxes[left]
        smaller = torch.minimum(retinanet.area(others), retinanet.area(others[:1]))
        near = (retinanet.intersection(others[:1], others)[0] >= overlap * smaller).numpy()
        strong = np.unique(here[near & (scores[left] >= scores[first] / 2)])
        low = high = here[0]
        for z in strong[strong > high]:
            high = z if z - high <= gap else high
        for z in strong[strong < low][::-1]:
            low = z if low - z <= gap else low
        x0, y0, x1, y1 = boxes[first].tolist()
        depth = high - low + 1
        found.append((x0, y0, x1 - x0, y1 - y0, low, depth, scores[first], slices[first]))
        member = near & (here >= low - gap) & (here <= high + gap)
        member[0] = True
        left = left[~member]
    return np.array(found, float).reshape(-1, 8)


def merge_slices(boxes, scores, slices, overlap=0.5, gap=1):
    """`findings_of` without the slice of the best box: rows x y w h z depth score (m, 7)"""
    return findings_of(boxes, scores, slices, overlap, gap)[:, :7]



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


def work(cfg, device, again=False, build=build, load=load):
    """Trains and tests a detector. `again` may overwrite an earlier run."""
    out, rank = Path(cfg.out), dist.get_rank()
    log = out / 'log.jsonl'
    if rank == 0:
        held = log.exists() or (out / 'lesions.csv').exists()
        if held and not (again or cfg.resume and log.exists()):
            raise ValueError(f'{out} holds a run or a list; --resume continues it, or choose '
                             'another --out')
        out.mkdir(parents=True, exist_ok=True)
        lock_file = lock(out)
    state = resumed(cfg)
    detector = build(cfg, state).to(device)                 # refuses a wrong --encoder before the reading
    rows, notes = on_rank_0(load, cfg)
    if state and state['rows'] != digest(rows):
        raise ValueError(f'{out} has seen other images, boxes or splits; choose another --out')
    parts = {name: [row for row in rows if row.split == name] for name in ('train', 'val', 'test')}
    for name in detector.splits:
        if not detector.marked(parts[name]):
            raise ValueError('; '.join([f'the {name} split has no lesion or no pair', *notes]))
    if rank == 0:
        introduce(detector, parts, notes, device)
        if not state:
            log.write_text(json.dumps(dict(config=asdict(cfg), torch=torch.__version__)) + '\n')
            write_list(out / 'lesions.csv', rows)
    best = train(detector, rows, device, out, state)
    detector.finish(parts['test'], best, notes, device, out)
    dist.barrier()
    if rank == 0:
        lock_file.close()


def introduce(detector, parts, notes, device):
    """What is about to be trained on what"""
    cfg, ranks = detector.cfg, dist.get_world_size()
    encoder = cfg.init_from or ('random weights' if cfg.random_encoder else cfg.encoder)
    count = sum(p.numel() for p in detector.parameters() if p.requires_grad) / 1e6
    times = f'{ranks} ranks x {math.ceil(cfg.batch // ranks / cfg.micro_batch)} micro-batches'
    kind = 'bf16' if computes_in_bf16(device, cfg.amp) else 'fp32'
    print(f'\n{cfg.dataset} {cfg.root}: {cfg.head} on {encoder}, '
          f'{"frozen" if cfg.freeze else "finetuned"}, {count:.1f} M parameters to train\n'
          f'  at most {cfg.epochs} epochs of batches of {cfg.batch} = {times} of '
          f'{cfg.size}x{cfg.size} pixels, {device.type} in {kind}')
    for name, rows in parts.items():
        lesions = [len(row.boxes) for row in rows if row.boxes]
        print(f'  {name:5} {len(rows)} images or volumes of {len({row.patient for row in rows})} '
              f'patients, {len(lesions)} with {sum(lesions)} lesions')
    print(''.join(f'  {note}\n' for note in notes), end='', flush=True)


def tested(detector, rows, best, notes, device, out):
    """Predicts the test rows, writes and scores the findings."""
    cfg, found = detector.cfg, predicted(detector, rows, device)
    if dist.get_rank() == 0:
        if best['epoch'] >= 0:
            print(f'best epoch {best["epoch"]}, mean sensitivity on validation {best["score"]:.3f}')
        write(out, rows, found)
        truth = score.read_truth(out / 'labels.csv', out / 'boxes.csv')
        score.lesions({cfg.out: score.read_predictions(out)}, *truth, cfg.min_distance, cfg.draws,
                      cfg.seed, out, notes)
        print(f'-> {out}: predictions.csv, scores.json, froc.png, last.pt. Next:\n  python score.py'
              f' {out} OTHER\n  python {Path(sys.argv[0]).name} predict FILE --checkpoint {out}')


def write(out, rows, found):
    """predictions.csv, labels.csv and boxes.csv as the challenge has them. VolumeSlices of mammograms is 1.
    What is neither normal nor benign nor cancer counts as actionable."""
    labels, boxes = [], []
    for row in rows:
        kinds = {box[-1] for box in row.boxes}
        normal, known = row.normal and not kinds, kinds & {'benign', 'cancer'}
        flags = normal, not normal and not known, 'benign' in kinds, 'cancer' in kinds
        labels.append((*row.key, *map(int, flags)))
        least = 1 + max([box[0] for box in row.boxes], default=0)       # of a file that is unreadable
        slices = row.shape[0] if row.shape else row.record.get('VolumeSlices') or least
        boxes += [(*row.key, '', z, x0, y0, x1 - x0, y1 - y0, kind, '', slices)
                  for z, x0, y0, x1, y1, kind in row.boxes]
    findings = [(*rows[i].key, *(f'{v:.6g}' for v in (x, w, y, h)), int(z), int(depth), repr(value))
                for i, x, y, w, h, z, depth, value, _ in found]
    score.write_csv(out / 'labels.csv', score.LABEL, labels)
    score.write_csv(out / 'boxes.csv', score.BOX, boxes)
    score.write_csv(out / 'predictions.csv', score.PREDICTION, findings)


def write_list(path, rows):
    """The data set as it was read, as a list for --root: no ROI mask needs to be read again."""
    lines = []
    for row in rows:
        about = (os.path.abspath(row.file), row.name, row.patient, row.exam, row.laterality,
                 row.view, row.split, int(row.normal), int(row.upside))
        lines += [(*about, *box) for box in row.boxes] or [(*about, row.frame, *[''] * 5)]
    columns = 'path volume patient exam laterality view split normal upside frame x0 y0 x1 y1 label'
    score.write_csv(path, columns.split(), lines)


# ---- findings in one file -------------------------------------------------------------------------

def predict(argv, device, restored=restored):
    """Findings in one file: findings.json, and a picture of each"""
    parser = argparse.ArgumentParser(prog='predict')
    parser.add_argument('file', metavar='FILE', help='a mammogram or a DBT volume')
    parser.add_argument('--checkpoint', required=True, metavar='RUN', help='a finished run')
    parser.add_argument('--threshold', type=float, help='least score; by default that at one false '
                        'positive per validation slice')
    parser.add_argument('--laterality', default='', choices=('', 'L', 'R'),
                        help='side of a BCS-DBT volume, which may be stored upside down')
    parser.add_argument('--out', default='runs/predict', help='folder to write')
    args = parser.parse_args(argv)
    cfg, detector, best = restored(args.checkpoint)
    first = images.read(args.file, 0, cfg.voi)              # a picture that is refused says why here
    row = datasets.Row(args.file, '', laterality=args.laterality, upside=bool(args.laterality),
                       shape=images.shape(args.file))
    turned, (H, W) = row.upside and upright(first, row.laterality) is not first, first.shape
    threshold = best['threshold'] if args.threshold is None else args.threshold
    out, found = Path(args.out), []
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob('finding_*.png'):
        old.unlink()
    for _, x, y, w, h, z, depth, value, at in predicted(detector.to(device), [row], device):
        if value >= threshold:
            x, y = (W - x - w, H - y - h) if turned else (x, y)                         # as the file has it
            picture = boxed(images.read(args.file, int(at), cfg.voi), [(x, y, x + w, y + h, value)])
            picture.save(out / f'finding_{len(found):02d}.png')
            edges = {k: round(v, 1) for k, v in dict(x0=x, y0=y, x1=x + w, y1=y + h).items()}
            found.append(dict(edges, frame=int(at), first_frame=int(z),
                              last_frame=int(z + max(depth, 1) - 1), score=round(value, 4)))
            print(found[-1])
    about = dict(file=args.file, threshold=threshold, findings=found)
    score.write_json(out / 'findings.json', about)
    print(f'{len(found)} findings of score {threshold:.3f} or more -> {out}/findings.json, *.png')


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


def demo(cfg, device):
    """An untrained and a trained detector find lesions in synthetic volumes that no training has seen."""
    out, again = Path(cfg.out), cfg.resume or cfg.out in (DEMO['out'], DETR_DEMO['out'])
    encoder, there = cfg.encoder, os.path.isfile(cfg.encoder or '')
    cfg = replace(cfg, root=f'{out}/phantoms', random_encoder=cfg.random_encoder or not there,
                  encoder=cfg.encoder if there else None)
    if dist.get_rank() == 0:
        if not again and out.exists() and any(out.iterdir()):
            raise ValueError(f'{out} is not empty; choose another --out, or give --root DIR')
        print('A demonstration on phantoms, without clinical meaning; --root DIR takes a data set.')
        if not there:
            print(f'{encoder} is absent: random weights; `torchrun pretrain.py` makes it')
        make_phantoms(cfg)
    dist.barrier()
    for name, epochs in (('untrained', 0), ('trained', cfg.epochs)):
        work(replace(cfg, out=f'{out}/{name}', epochs=epochs), device, again)
    if dist.get_rank() == 0:
        runs = {name: score.read_predictions(out / name) for name in ('untrained', 'trained')}
        truth = score.read_truth(out / 'trained/labels.csv', out / 'trained/boxes.csv')
        score.lesions(runs, *truth, cfg.min_distance, cfg.draws, cfg.seed, out)
        overlay(Path(cfg.root), runs, truth[1]).save(out / 'overlay.png')
        print(f'-> {out}/overlay.png: above untrained, below trained; lesions in blue')
    dist.barrier()


def make_phantoms(cfg):
    """Volumes with and without a lesion, prepared like any data set, and lesions.csv"""
    volumes, lines = [], []
    for i in range(cfg.phantoms):
        split = 'train' if i < 0.65 * cfg.phantoms else 'val' if i < 0.75 * cfg.phantoms else 'test'
        rng = np.random.default_rng([cfg.seed, i, 0, 5])    # the other demos draw 1 to 4
        example = phantom.breast(rng, slices=8, lesion=i % 3 > 0)
        volumes.append(np.stack([images.clahe(images.to_uint8(image)) for image in example.volume]))
        about = (f'{i:04d}.npy', f'{i:04d}', split)
        boxes = [(int(z), *box, 'cancer') for z, *box in example.boxes]
        lines += [(*about, *box) for box in boxes or [[''] * 6]]
    phantom.dataset(cfg.root, volumes)
    columns = 'path patient split frame x0 y0 x1 y1 label'
    score.write_csv(f'{cfg.root}/lesions.csv', columns.split(), lines)


def overlay(folder, runs, truth, columns=5):
    """Slices with a lesion and the best three findings that reach the slice, a line of pictures per run"""
    lines = []
    for rows in runs.values():
        pictures = []
        for key, x, y, w, h, z in truth[:columns]:
            reach = [row for row in rows if row[0] == key and row[5] <= z < row[5] + row[6]]
            best = [(a, b, a + c, b + d, value) for _, a, b, c, d, _, _, value in reach[:3]]
            image = images.read(folder / f'{key[0]}.npy', int(z))
            pictures.append(np.asarray(boxed(image, best, [(x, y, x + w, y + h)], side=300)))
        lines.append(np.hstack(pictures))
    return Image.fromarray(np.vstack(lines))


def main(argv):
    """predict, a run, or without --root the demo"""
    _, ranks, device = setup()
    if argv[:1] == ['predict']:
        predict(argv[1:], device)
    else:
        cfg = parse(Config, argv, source='root', demo=lambda given: {} if 'root' in given else
                    DETR_DEMO if given.get('head') == 'detr' else DEMO)
        check(cfg, ranks)
        if cfg.root is None and '--dataset' in argv:
            raise ValueError('--dataset needs --root DIR; without them this is a demo')
        demo(cfg, device) if cfg.root is None else work(cfg, device)
    dist.destroy_process_group()


if __name__ == '__main__':
    script('detect.py', main)
