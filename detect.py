"""Lesions in mammograms and tomosynthesis (DBT) volumes: FPN-RetinaNet on the ViT (DBT-DINO, arXiv 2512.13608, 2.4,
3.5, 6.2.3), or DINO-DETR (IHRRB-DINO; detr.py), scored by FROC as the DBTex challenge counts it.

    $ python detect.py                                                            # phantoms, no data needed
    $ torchrun --nproc-per-node 8 detect.py --dataset bcs --root DIR --encoder runs/mammodino/last.pt --out RUN
    $ python detect.py predict FILE --checkpoint RUN                              # findings.json and pictures
    $ python detect.py score RUN_A RUN_B                                          # FROC with intervals, McNemar, AP
    $ python detect.py score submission.csv --labels LABELS.csv --boxes BOXES.csv     # in the challenge's own format

Fused representations of synthetic (SM) and full-field mammograms (FFDM), which find in SM alone (arXiv 2408.08560):

    $ python detect.py --no-freeze --root SM.csv --out A                              # stage I, C likewise on FFDM.csv
    $ python detect.py --no-freeze --root SM.csv --paired FFDM.csv --mimic C --out B                # II: C from SM
    $ python detect.py --no-freeze --root SM.csv --init_from A --fuse B --out FUSED                 # III

A slice, squashed to S x S pixels, becomes patch tokens of a frozen or finetuned encoder, four pyramid levels, and for
each of A anchors a logit and four deltas. The boxes of all slices of a volume merge into findings, which go back to
the pixels of the file and into predictions.csv.

B images, S pixels of a side, g g token grid, D width, C channels, A anchors, G lesions, P predictions, V volumes, K H W
size of a file; boxes are x0 y0 x1 y1, rows of predictions and truth x y w h.
"""
import argparse
import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import detr
import images
import mask
import vit
from metrics import caught, challenge, curve, matched, mcnemar, sensitivity, step_area
from retinanet import (LEVELS, RATIOS, SCALES, Pyramid, Tower, anchors, area, boxes_of, grids, intersection, losses,
                       match, pairwise_iou)
from run import cosine, lock, option, parse, save, setup
from phantom import breast


# ---- configuration --------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Every field is a flag. Source: [6.2.3] and the like are sections of DBT-DINO (arXiv 2512.13608), [retinanet] is
    Lin 2017, [dino] the DINO detector, Zhang 2022, [fused] Sharma, arXiv 2408.08560, [dbtex] the challenge, [ours]."""
    dataset: str = option('csv', 'ours', 'bcs, vindr, cbis, mias or csv, a list of your own', group='data and run')
    root: str | None = option(None, 'ours', 'the data set as published, or a list; without it, a demo on phantoms')
    images: str | None = option(None, 'ours', 'where `prepare.py` put the images of --root')
    findings: tuple[str, ...] = option((), 'ours', 'the labels that count as lesions, such as Mass; all by default')
    out: str = option('runs/detect', 'ours', 'folder of this run')
    resume: bool = option(False, 'ours', 'go on with the run in --out, on CPU bit for bit')
    encoder: str = option('runs/demo/last.pt', 'ours', 'a checkpoint of ours or the official DINOv2 file')
    random_encoder: bool = option(False, 'ours', 'fresh weights in the shape of --encoder, the row to beat')
    freeze: bool = option(True, '2.4', 'the encoder stays as it is; --no-freeze trains it with the detector')
    seed: int = option(0, 'ours', 'splits that are not given, weights, order, augmentation, bootstrap')

    size: int = option(518, '6.2.3', 'pixels of the squashed image, a multiple of 14', group='images')
    augment: bool = option(True, '6.2.3', 'flips, zoom, coarse dropout, gamma, noise')
    normals: float = option(1.0, 'ours', 'normal slices drawn in an epoch for each annotated one')
    workers: int = option(min(4, os.cpu_count() or 1), 'ours', 'data processes per rank')
    max_bad: float = option(0.05, 'ours', 'stop above this share of unusable files')

    channels: int = option(256, '6.2.3', 'width of the pyramid and of the head, a multiple of 32', group='detector')
    head: str = option('retinanet', '6.2.3', 'retinanet, or detr: DINO-DETR (detr.py)')
    top: int = option(50, 'ours', 'boxes kept in a slice, and findings in a volume')
    overlap: float = option(0.5, 'ours', 'boxes of neighbouring slices that share this much of the smaller one are one')
    gap: int = option(1, 'ours', 'slices from one box of a finding to the next, at most')

    dropout: float = option(0.1, '6.2.3', 'channels dropped before the last layer, half as many before the others',
                            group='RetinaNet')
    high: float = option(0.5, 'retinanet', 'an anchor of this IoU or more with a lesion is positive')
    low: float = option(0.4, 'retinanet', 'below this it is background, between the two it is ignored')
    alpha: float = option(0.25, 'retinanet', 'focal loss: weight of the positives')
    gamma: float = option(2.0, 'retinanet', 'focal loss: how fast easy anchors fade')
    smoothing: float = option(0.0, '6.2.3', 'positives aim at 1 - smoothing')
    ratio: float = option(1.0, '6.2.3', 'weight of the focal loss against the box loss')
    nms: float = option(0.1, '6.2.3', 'of two boxes in a slice that overlap by more (IoU), one stays')

    queries: int = option(300, 'dino', 'boxes that the decoder refines; 900 there', group='DINO-DETR')
    layers: tuple[int, int] = option((2, 6), 'dino', 'of encoder and decoder; 6 6 there, but a ViT has looked around')
    denoising: int = option(100, 'dino', 'noisy copies of the lesions, divided by the most in an image, and as many to '
                            'reject')

    paired: str | None = option(None, 'fused', 'a list like that of --root: the other images of the same exams and '
                                'views, such as FFDM for SM', group='fused representations')
    mimic: str | None = option(None, 'fused', 'stage II: learn the pyramid of this run on --paired from the images of '
                               '--root alone')
    fuse: str | None = option(None, 'fused', 'stage III: the levels of this run, frozen, beside the trained ones')
    init_from: str | None = option(None, 'ours', 'encoder, pyramid and head begin as in this run; with --mimic by '
                                   'default as in that one')

    epochs: int = option(50, '6.2.3', 'at most; 0 scores an untrained detector', group='optimization')
    patience: int = option(10, '6.2.3', 'epochs without a better validation before training stops')
    batch: int = option(64, '6.2.3', 'slices per step, over all ranks')
    micro_batch: int = option(8, 'ours', 'slices per rank at once, the rest is accumulated')
    lr: float | None = option(None, 'ours', 'peak learning rate; by default 5e-4, of DINO-DETR 1e-4 [dino]')
    wd: float = option(1e-4, 'ours', 'weight decay')
    layer_decay: float = option(0.75, 'ours', 'with --no-freeze: learning rate factor per block below the top')
    clip: float | None = option(None, 'ours', 'gradient norm at most; by default 1, of DINO-DETR 0.1 [dino]')
    search: int = option(0, '6.2.3', 'random trials over the ranges of the paper, the best on validation; 200 there')
    amp: bool | None = option(None, '6.2.3', 'bf16 autocast; by default on GPUs only')

    min_distance: float = option(100.0, 'dbtex', 'pixels of the file between centres that are a hit at any lesion size',
                                 group='scores')
    draws: int = option(1000, '2.5', 'bootstrap draws of patients')

    phantoms: int = option(300, 'ours', 'volumes, of which 65 % train, 10 % choose and 25 % test', group='demo')

    def __post_init__(self):
        by_head = dict(detr=(1e-4, 0.1)).get(self.head, (5e-4, 1.0))
        self.lr, self.clip = (own if value is None else value for value, own in zip((self.lr, self.clip), by_head))


def check(cfg, ranks):
    """ValueError for what cannot work, in words, before hours of work."""
    if cfg.dataset not in DATASETS:
        raise ValueError(f"--dataset {cfg.dataset}: expected {', '.join(DATASETS)}")
    wrong = [f'--{name} {getattr(cfg, name)} must be above 0 and finite' for name in (
        'patience', 'batch', 'micro_batch', 'lr', 'layer_decay', 'clip', 'channels', 'top', 'gap', 'draws', 'ratio',
        'queries', 'denoising', 'min_distance') if not 0 < getattr(cfg, name) < math.inf]
    wrong += [f'--{name} {getattr(cfg, name)} must be 0 or more and finite' for name in (
        'seed', 'workers', 'epochs', 'search', 'wd', 'normals', 'gamma') if not 0 <= getattr(cfg, name) < math.inf]
    wrong += [f'--{name} {getattr(cfg, name)} must lie in 0 … 1' for name in (
        'max_bad', 'dropout', 'high', 'low', 'alpha', 'smoothing', 'nms', 'overlap')
        if not 0 <= getattr(cfg, name) <= 1]
    if cfg.size % 14 or cfg.size < 84:
        wrong.append(f'--size {cfg.size} must be a multiple of the patch, 14, and at least 84')
    if cfg.channels % 32:
        wrong.append(f'--channels {cfg.channels} must be a multiple of 32, the groups of GroupNorm')
    if cfg.low > cfg.high:
        wrong.append(f'--low {cfg.low} is above --high {cfg.high}')
    if cfg.batch % ranks:
        wrong.append(f'--batch {cfg.batch} does not divide among {ranks} ranks')
    if cfg.phantoms < 40:
        wrong.append(f'--phantoms {cfg.phantoms} are too few for the demo; 40 at least')
    if cfg.root is None and cfg.dataset != Config.dataset:
        wrong.append(f'--dataset {cfg.dataset} needs --root DIR')
    if cfg.root == '':
        wrong.append('--root is empty; give a data set, or leave it out for the demo')
    if cfg.head not in ('retinanet', 'detr'):
        wrong.append(f'--head {cfg.head}: expected retinanet or detr')
    if min(cfg.layers) < 1:
        wrong.append(f'--layers {cfg.layers[0]} {cfg.layers[1]}: expected 1 or more of both')
    if cfg.search and (cfg.head != Config.head or cfg.mimic):
        wrong.append('--search draws the settings of RetinaNet; it goes with neither --head detr nor --mimic')
    if cfg.mimic and (cfg.fuse or not cfg.paired or not cfg.epochs or cfg.head != Config.head):
        wrong.append('--mimic needs --paired LIST and --epochs, and goes with neither --head nor --fuse')
    if cfg.paired and not (cfg.mimic or cfg.fuse):
        wrong.append('--paired goes with --mimic, or with --fuse of a run on those images')
    if cfg.random_encoder and (cfg.mimic or cfg.init_from):
        wrong.append('--random_encoder with --mimic or --init_from, which bring an encoder')
    if '' in (cfg.paired, cfg.mimic, cfg.fuse, cfg.init_from):
        wrong.append('--paired, --mimic, --fuse or --init_from is empty')
    if (cfg.paired or cfg.mimic or cfg.fuse) and cfg.root is None:
        wrong.append('--paired, --mimic and --fuse need --root DIR')
    if cfg.search and not cfg.epochs:
        wrong.append('--search with --epochs 0 has nothing to compare')
    if wrong:
        raise ValueError('; '.join(wrong))


# ---- anchors and boxes (RetinaNet, Lin 2017) ------------------------------------------------------------------------

@lru_cache(maxsize=2)
def places(size, device):
    """`anchors` on a device, made once"""
    return anchors(size).to(device)


# ---- the detector (DBT-DINO 6.2.3) ----------------------------------------------------------------------------------

class Features(nn.Module):
    """Encoder and pyramid: images (B, 1, S, S) in [0, 1] -> four levels (B, C, cells, cells)."""

    def __init__(self, encoder, channels=256, freeze=True):
        super().__init__()
        self.encoder, self.freeze, self.fusion, self.other = encoder, freeze, None, None
        self.pyramid = Pyramid(encoder.config['width'], channels)
        encoder.requires_grad_(not freeze)
        encoder.mask_token.requires_grad_(False)            # nothing is masked here; DDP waits for every gradient

    def train(self, mode=True):
        """What is frozen stays in eval mode, whoever calls train()."""
        super().train(mode)
        self.encoder.train(mode and not self.freeze)
        if self.frozen_part():
            self.frozen_part().eval()
        return self

    def frozen_part(self):
        """The features of another run in here, None without"""
        return self.fusion.other if self.fusion else self.other

    def levels(self, images):
        """Of the first channel of (B, 1 or 2, S, S); fused ones where there is a `fusion`."""
        with contextlib.nullcontext() if not self.freeze else torch.no_grad():
            tokens = self.encoder(images[:, :1])[1]                                     # (B, g g, D)
        levels = self.pyramid(tokens)
        return levels if self.fusion is None else self.fusion(levels, images)

    def learnt(self):
        """state_dict without what is frozen"""
        frozen = ('encoder.',) * self.freeze + ('fusion.other.', 'other.')
        return {k: v for k, v in self.state_dict().items() if not k.startswith(frozen)}

    def load_learnt(self, state):
        """What `learnt` gave; ValueError for anything else."""
        if state.keys() != self.learnt().keys():
            raise ValueError('these are weights of another detector')
        self.load_state_dict(self.state_dict() | state)     # a frozen encoder stays as it is


class Detector(Features):
    """RetinaNet: images (B, 1, S, S) in [0, 1] -> logits (B, A) and deltas (B, A, 4), in the order of `anchors`."""

    TERMS = ('focal', 'box')

    def __init__(self, encoder, channels=256, dropout=0.1, freeze=True):
        super().__init__(encoder, channels, freeze)
        shapes = len(RATIOS) * len(SCALES)
        self.classify = Tower(channels, shapes, dropout)
        self.regress = Tower(channels, 4 * shapes, dropout)
        nn.init.constant_(self.classify.answer.bias, -math.log((1 - 0.01) / 0.01))      # scores start at 0.01

    def forward(self, images, batch=None):
        """(B, 1, S, S) -> (B, A), (B, A, 4), both fp32; the truth in `batch` plays no part"""
        logits, deltas = [], []
        for level in self.levels(images):                                               # (B, C, h, w)
            logits.append(self.classify(level).permute(0, 2, 3, 1).flatten(1))          # (B, h w 9)
            deltas.append(self.regress(level).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)))     # (B, h w 9, 4)
        return torch.cat(logits, 1), torch.cat(deltas, 1)

    def count(self, batch):
        """What the sums of a batch are divided by: positive anchors"""
        return (batch['match'] >= 0).sum()

    def objective(self, cfg, answers, batch):
        """The sum to minimise, and TERMS"""
        focal, box = losses(cfg, *answers, batch, places(cfg.size, answers[0].device))
        return cfg.ratio * focal + box, focal, box

    def findings(self, cfg, answers):
        """-> for each image boxes (n, 4) in squashed pixels and scores (n,), best first, at most --top"""
        return [boxes_of(*image, places(cfg.size, 'cpu'), cfg.size, cfg.nms, cfg.top)
                for image in zip(*(part.float().cpu() for part in answers))]


class SetDetector(Features):
    """DINO-DETR on the same pyramid (detr.py): images -> a dict of logits and boxes. Its cells are told where they
    look, as the anchors are; a lesion that is marked on another slice is background here."""

    TERMS = ('focal', 'box')

    def __init__(self, encoder, channels, freeze, size, queries, layers, denoising=100):
        super().__init__(encoder, channels, freeze)
        self.size, centres = size, [(first / size, stride / size) for stride, first, _ in LEVELS.values()]
        self.head = detr.DinoDetr(channels, 1, queries, *layers, hidden=8 * channels, denoising=denoising,
                                  centres=centres)

    def forward(self, images, batch=None):
        """See `DinoDetr.forward`; in training with denoising queries made from batch['boxes']"""
        return self.head(self.levels(images), None if batch is None else self.targets(batch, images.device))

    def targets(self, batch, device):
        """Corners in pixels -> middles and sides in shares of the image"""
        middles = [torch.cat([boxes[:, :2] + boxes[:, 2:], 2 * (boxes[:, 2:] - boxes[:, :2])], 1) / (2 * self.size)
                   for boxes in batch['boxes']]
        return [dict(labels=torch.zeros(len(boxes), dtype=torch.long, device=device), boxes=boxes.to(device))
                for boxes in middles]

    def count(self, batch):
        """Lesions"""
        return torch.tensor(sum(map(len, batch['boxes'])))

    def objective(self, cfg, answers, batch):
        """All layers, proposals and denoising queries; focal and box are those of the last layer."""
        sums = detr.losses(answers, self.targets(batch, answers['layers'][0][0].device))
        last = sums[f"layer {len(answers['layers']) - 1}"]
        return detr.total(sums), last[0], detr.WEIGHTS[1] * last[1] + detr.WEIGHTS[2] * last[2]

    def findings(self, cfg, answers):
        """As a set of boxes needs no suppression, the best --top of the last layer."""
        logits, boxes = (part.float().cpu() for part in answers['layers'][-1])
        scores, best = logits[..., 0].sigmoid().topk(min(cfg.top, logits.shape[1]))
        return [((detr.corners(box[one]) * self.size).clamp(0, self.size), score)
                for box, one, score in zip(boxes, best, scores)]


# ---- the loss -------------------------------------------------------------------------------------------------------

# ---- fused representations (FFDM and SM) -----------------------------------------------------------------------------

class Fusion(nn.Module):
    """Stage III: the levels of `other`, which is frozen, beside one's own, and a 1x1 convolution back to C channels. It
    starts by passing one's own through, so with --init_from A the fused detector begins as A; the paper hands both
    widths to its predictor and does not say how that begins."""

    def __init__(self, other, channels):
        super().__init__()
        self.other = other.requires_grad_(False)
        width = channels + other.pyramid.p4.out_channels
        self.mix = nn.ModuleList(nn.Conv2d(width, channels, 1) for _ in LEVELS)
        for mix in self.mix:
            nn.init.dirac_(mix.weight)                      # 1 from each own channel, 0 elsewhere
            nn.init.zeros_(mix.bias)

    def forward(self, levels, images):
        """Own levels (B, C, cells, cells), images (B, 1 or 2, S, S) -> fused levels (B, C, cells, cells). Where there
        are two images, `other` sees the second: the upper bound, a model of both inputs."""
        with torch.no_grad():
            others = self.other.levels(images[:, -1:])
        return [mix(torch.cat(both, 1)) for mix, both in zip(self.mix, zip(levels, others))]


class Mimic(Features):
    """Stage II, module B: from the first image alone, what `other` (C), frozen, makes of the second. A 3x3 convolution
    per level leads from the one to the other and plays no part afterwards."""

    TERMS = tuple(LEVELS)

    def __init__(self, encoder, channels, freeze, other, size):
        super().__init__(encoder, channels, freeze)
        self.other, self.cells = other.requires_grad_(False), cell_centres(size)
        width = other.pyramid.p4.out_channels
        self.project = nn.ModuleList(nn.Conv2d(channels, width, 3, padding=1) for _ in LEVELS)

    def forward(self, images, batch=None):
        """(B, 2, S, S) -> guesses and what they aim at, of each level both (B, C, cells, cells) of length 1"""
        with torch.no_grad():
            aims = self.other.levels(images[:, 1:])
        guesses = [project(level) for project, level in zip(self.project, self.levels(images))]
        return [tuple(F.normalize(x.float(), dim=1) for x in both) for both in zip(guesses, aims)]

    def count(self, batch):
        """Images with tissue"""
        return batch['tissue'].flatten(1).any(1).sum()

    def inside(self, tissue):
        """tissue (B, S, S) bool -> for each level (B, cells, cells): tissue at the centre of the cell"""
        return [tissue[:, at[:, None], at] for at in self.cells]

    def objective(self, cfg, answers, batch):
        """Eq. 2 at every location of tissue, the mean over them and over levels, in the sum over images; then of each
        level alone. Without the mask, air would win it."""
        terms = []
        for (guess, aim), here in zip(answers, self.inside(batch['tissue'].to(answers[0][0].device))):
            cosine = (guess * aim).sum(1)                                               # (B, cells, cells)
            terms.append(-((cosine * here).sum((1, 2)) / here.sum((1, 2)).clamp_min(1)).sum())
        return torch.stack(terms).mean(), *terms


def cell_centres(size):
    """The pixel in the middle of each cell along a side, for each level"""
    return [(first + stride * torch.arange(cells)).long()
            for cells, (stride, first, _) in zip(grids(size), LEVELS.values())]


@torch.no_grad()
def likeness(cfg, model, volumes, device):
    """Validation of stage II -> mean cosine over levels, and of each level `cosine`; `constant`, what the mean of C's
    vectors alone would reach; `spread`, the deviation of the guesses over all locations against that of C. A collapsed
    B says the same everywhere: spread 0, cosine not above constant."""
    model.eval()
    sums = torch.zeros(len(LEVELS), 2, device=device)                                   # cosine, locations
    means = torch.zeros(len(LEVELS), 2, model.project[0].out_channels, device=device)   # of guess and aim
    mine = [(v, 0) for v in range(len(volumes))][dist.get_rank()::dist.get_world_size()]
    for samples in readable(cfg, volumes, mine):
        images, tissue = (torch.from_numpy(np.stack([s[name] for s in samples])) for name in ('image', 'tissue'))
        with autocast(cfg, device):
            answers = model(pixels(images, device))
        for i, (both, here) in enumerate(zip(answers, model.inside(tissue.to(device)))):
            guess, aim = (x.permute(0, 2, 3, 1)[here] for x in both)                    # (locations, C)
            sums[i] += torch.stack([(guess * aim).sum(), here.sum()])
            means[i] += torch.stack([guess.sum(0), aim.sum(0)])
    dist.all_reduce(sums)
    dist.all_reduce(means)
    locations = sums[:, 1].clamp_min(1)
    cosine, (guess, aim) = sums[:, 0] / locations, (means / locations[:, None, None]).norm(dim=2).T
    spread = ((1 - guess ** 2) / (1 - aim ** 2).clamp_min(1e-9)).sqrt()                 # lengths are 1
    return cosine.mean().item(), dict(cosine=cosine.tolist(), constant=aim.tolist(), spread=spread.tolist())


def explain(best):
    """What B has learnt, by level, and a warning where it has collapsed."""
    for name, title in dict(cosine='cosine with C inside tissue', constant="C's mean alone", spread='spread, of C 1'
                            ).items():
        print(f'  {title:36s}' + ''.join(f'  {level} {v:.3f}' for level, v in zip(LEVELS, best[name])))
    for name, spread, cosine, constant in zip(LEVELS, best['spread'], best['cosine'], best['constant']):
        if constant and spread < 0.1:                       # constant 0: no cell of this level lies in tissue
            print(f'  {name} has collapsed: B says nearly the same everywhere')
        elif constant and cosine <= constant:
            print(f'  {name}: B is no better than the mean of C, so it has learnt nothing of this level')


def paired(cfg, volumes, notes):
    """Each image with its `partner`, the file of the same patient, study and view (laterality included) in --paired.
    Without one, or with one of another shape, it takes no part, by name: their pixels would not correspond."""
    there, there_too = listed(replace(cfg, root=cfg.paired))
    others, pairs, wrong = {other.key: other for other in there}, [], []
    if len(others) < len(there):
        twice, _ = Counter(other.key for other in there).most_common(1)[0]
        raise ValueError(f"{cfg.paired}: {'/'.join(twice)} is listed twice; patient, study and view tell images apart")
    for volume in volumes:
        partner = others.pop(volume.key, None)
        why = misfit(volume, partner) if partner else f'not in {cfg.paired}'
        if why:
            wrong.append(f"{'/'.join(volume.key)}: {why}")
        else:
            pairs.append(replace(volume, partner=partner))
    notes += [f'{cfg.paired}: {note}' for note in there_too]
    if wrong:
        notes.append(f'{len(wrong)} of {len(volumes)} images have no fitting pair and take no part: {first_of(wrong)}')
    if others:
        notes.append(f'{len(others)} images of {cfg.paired} have no pair: {first_of(map("/".join, others))}')
    if not pairs:
        raise ValueError(f'no image of {cfg.root} has a pair in {cfg.paired}; patient, study and view must agree, with '
                         f'the side in the view, such as LCC. {first_of(wrong, 1)}')
    return pairs


def misfit(volume, partner):
    """Why two images are no pair; '' if they are one. What cannot be read in --root is for `usable` to say."""
    try:
        slices, H, W = images.shape(volume.path)
    except (ValueError, OSError):
        return ''
    try:
        others, h, w = images.shape(partner.path)
    except (ValueError, OSError) as problem:
        return str(problem)
    alike = slices == others == 1 and abs(H * w / (W * h) - 1) < 0.02
    return '' if alike else f'{slices} images of {W}x{H} and {others} of {w}x{h}'


def first_of(names, most=50):
    """The first of many names, and how many more there are"""
    names = list(names)
    return '; '.join(names[:most]) + (f'; and {len(names) - most} more' if len(names) > most else '')


def features_of(run, size):
    """Encoder and pyramid of a finished run on images of this size, in eval mode."""
    cfg, model, _ = restored(run)
    if model.fusion:
        raise ValueError(f'{run} is fused itself; give a run of stage I or II')
    if cfg.size != size:
        raise ValueError(f'{run} has learnt --size {cfg.size}, not {size}; both look at the same images')
    features = Features(model.encoder, cfg.channels)
    features.pyramid = model.pyramid
    return features.eval()


def packed(features):
    """The frozen part as it stands in a checkpoint, None for none"""
    return features and dict(vit=features.encoder.config, channels=features.pyramid.p4.out_channels,
                             weights={k: v.cpu() for k, v in features.state_dict().items()})


def unpacked(state):
    """`packed` undone"""
    if not state:
        return None
    features = Features(vit.ViT(**state['vit']), state['channels'])
    features.load_state_dict(state['weights'])
    return features.eval()


# ---- from answers to findings ---------------------------------------------------------------------------------------

def grouped(boxes, scores, slices, overlap=0.5, gap=1):
    """Which boxes of a volume are one finding: (numbers of its boxes, the best first; first slice; last slice) of each,
    the best finding first. The rule is ours; 2.4 says only that slices are aggregated to the volume.

    The best box that is left starts a finding; boxes that share at least `overlap` of the smaller area with it are at
    its place. From its slice up and down, the finding reaches as far as boxes at its place with half its score or
    more follow each other within `gap` slices, and takes every box at its place on those slices and `gap` beyond: a
    lesion is seen at one place on neighbouring slices, most clearly in the middle. All is measured against the first
    box, so no chain of boxes wanders away, and a place of faint boxes on every slice is not a long lesion.
    """
    boxes = torch.as_tensor(np.asarray(boxes, float)).view(-1, 4)
    scores, slices = np.asarray(scores, float), np.asarray(slices, int)
    left, groups = np.lexsort((slices, -scores)), []
    while len(left):
        first, here = left[0], slices[left]
        smaller = torch.minimum(area(boxes[left]), area(boxes[left[:1]])).numpy()
        near = intersection(boxes[left[:1]], boxes[left])[0].numpy() >= overlap * smaller
        strong = np.unique(here[near & (scores[left] >= scores[first] / 2)])
        low = high = here[0]
        for z in strong[strong > high]:
            high = z if z - high <= gap else high
        for z in strong[strong < low][::-1]:
            low = z if low - z <= gap else low
        member = near & (here >= low - gap) & (here <= high + gap)
        member[0] = True
        groups.append((left[member], low, high))
        left = left[~member]
    return groups


def merge_slices(boxes, scores, slices, overlap=0.5, gap=1):
    """The boxes of all slices of a volume, boxes (n, 4), scores (n,), slices (n,) -> its findings (`grouped`) as rows
    x y w h z depth score (m, 7), best first: place and score of the best box, z the first and z + depth - 1 the last
    slice."""
    return merged(boxes, scores, slices, overlap, gap)[:, :7]


def merged(boxes, scores, slices, overlap, gap):
    """(m, 8), the slice of the best box last"""
    boxes, rows = np.asarray(boxes, float).reshape(-1, 4), []
    for group, first, last in grouped(boxes, scores, slices, overlap, gap):
        x0, y0, x1, y1 = boxes[group[0]]
        rows.append((x0, y0, x1 - x0, y1 - y0, first, last - first + 1, scores[group[0]], slices[group[0]]))
    return np.array(rows, float).reshape(-1, 8)


# ---- the score: FROC (DBTex), FAUC (FFDM and SM, fused), AP and top-1 (IHRRB-DINO) -----------------------------------

@dataclass
class Overlapping:
    """Predictions against lesions by IoU, best prediction first."""
    right: np.ndarray           # (P,) bool: took a lesion that no better prediction had taken
    volume: np.ndarray          # (P,)
    home: np.ndarray            # (G,) volume of each lesion
    first: dict                 # volume -> whether its best prediction fits any of its lesions


def overlapping(truth, predictions, threshold, number):
    """COCO's rule: by falling score, at most 100 in an image, each prediction takes of the free lesions the one it
    overlaps most, if their IoU is at least `threshold`. Rows as in `fauc`; number: id -> number of the image."""
    lesions, free, used, first = defaultdict(list), {}, defaultdict(int), {}
    for row in truth:
        lesions[row[0]].append((row[1], row[2], row[1] + row[3], row[2] + row[4]))
    lesions = {name: torch.tensor(boxes, dtype=torch.float64) for name, boxes in lesions.items()}
    right, volume = [], []
    for name, x, y, w, h, *_ in sorted(predictions, key=lambda row: -row[-1]):
        used[name] += 1
        if used[name] > 100:
            continue
        fit = np.zeros(0)
        if name in lesions:
            fit = pairwise_iou(torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64), lesions[name])[0].numpy()
            first.setdefault(number[name], bool((fit >= threshold).any()))
            fit = np.where(free.setdefault(name, np.ones(len(fit), bool)), fit, -1)
        taken = len(fit) > 0 and fit.max() >= threshold
        if taken:
            free[name][fit.argmax()] = False
        right.append(taken)
        volume.append(number.get(name, -1))
    home = np.array([number[row[0]] for row in truth], int)
    return Overlapping(np.array(right, bool), np.array(volume, int), home, first)


def precision_area(o, weight):
    """AP with 101 points: mean over recall 0, 0.01, … 1 of the best precision at that recall or beyond."""
    count, lesions = weight[o.volume], weight[o.home].sum()
    if not lesions:
        return math.nan
    hits, shown = np.cumsum(count * o.right), np.maximum(np.cumsum(count), 1e-12)
    best = np.append(np.maximum.accumulate((hits / shown)[::-1])[::-1], 0)
    return float(best[np.searchsorted(hits / lesions, np.linspace(0, 1, 101))].mean())


def average_precision(truth, predictions, iou):
    """AP at this IoU. truth [id, x, y, w, h], predictions [id, x, y, w, h, score]; NaN without a lesion."""
    number = {name: i for i, name in enumerate(dict.fromkeys(row[0] for row in (*truth, *predictions)))}
    return precision_area(overlapping(truth, predictions, iou, number), np.ones(len(number) + 1))


def localised(o, weight):
    """Top-1 localisation: the share of images with a lesion whose best box fits one (IHRRB-DINO's baselines)."""
    held = np.unique(o.home)
    return float((weight[held] * [o.first.get(v, False) for v in held]).sum() / weight[held].sum()) \
        if weight[held].sum() else math.nan


# ---- statistics (DBT-DINO 2.5) --------------------------------------------------------------------------------------

# ---- data sets: published layout -> volumes with lesions ------------------------------------------------------------

@dataclass
class Volume:
    """A mammogram or a DBT volume. `key` is the challenge's: patient, study, view."""
    key: tuple
    path: str
    split: str = ''                                         # train, val or test; '' lets `assign` choose
    lesions: list = field(default_factory=list)             # (z, x0, y0, x1, y1, label), pixels of the file
    laterality: str = ''                                    # L or R where the file may lie upside down (BCS-DBT)
    normal: bool = True                                     # without lesions it may serve as a normal in training
    slices: int = 0                                         # as the label file has it; 0: not told
    shape: tuple | None = None                              # (K, H, W) of the file
    partner: 'Volume | None' = None                         # the other image of the exam and view (--paired)

    @property
    def patient(self):
        return self.key[0]


def lines_of(path, *columns):
    """A CSV -> list of dicts, names and values stripped; ValueError where a column is missing, with what was found, or
    where cells and columns do not fit."""
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            lines = list(csv.reader(file, strict=True))
    except FileNotFoundError:
        raise ValueError(f'{path}: no such file') from None
    except (UnicodeDecodeError, csv.Error, IsADirectoryError) as problem:
        raise ValueError(f'{path}: not a readable CSV in UTF-8 ({type(problem).__name__})') from None
    lines = [[re.sub(r'[^\S \n]+', ' ', cell).strip() for cell in line] for line in lines]
    header, *lines = [line for line in lines if any(line)] or [[]]
    header = [name.replace('\n', ' ') for name in header]
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; found {', '.join(header) or 'nothing'}")
    if any(header.count(name) > 1 for name in header if name):
        raise ValueError(f"{path}: a column stands twice in {', '.join(header)}")
    for line in lines:
        if len(line) > len(header) or any('\n' in cell for cell in line):
            raise ValueError(f'{path}: a row has {len(line)} cells for {len(header)} columns, or a line break in one; '
                             f"is a quote or comma wrong? It starts with {', '.join(line[:3])[:80]!r}")
    return [dict(itertools.zip_longest(header, line, fillvalue='')) for line in lines]


def value_of(line, name, path):
    """A cell as a number; ValueError names file, column and what stands there."""
    try:
        value = float(line[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f'{path}: {name} is {line[name]!r} in {dict(itertools.islice(line.items(), 3))}; expected a '
                         'number')
    return value


def whole(line, name, path):
    """A cell as a whole number"""
    value = value_of(line, name, path)
    if value != int(value):
        raise ValueError(f'{path}: {name} is {line[name]} in {dict(itertools.islice(line.items(), 3))}; expected a '
                         'whole number')
    return int(value)


BCS_VOLUMES = dict(train=19148, validation=1163, test=1721)
BCS_COUNTS = dict(                                          # of the full set, by split
    Normal=(18232, 928, 1356), Actionable=(716, 160, 244), Benign=(124, 38, 61), Cancer=(76, 37, 60),
    boxes=(224, 75, 136), volumes_with_boxes=(200, 75, 121))


def bcs(cfg):
    """BCS-DBT (Duke, DBTex): BCS-DBT-{labels,boxes,file-paths}-{train,validation,test}*.csv beside the DICOM tree.
    Slices count from 0. Actionable volumes, recalled but without a box, are no normals."""
    volumes, found = {}, {}
    for i, (part, total) in enumerate(BCS_VOLUMES.items()):
        names = [sorted(Path(cfg.root).glob(f'BCS-DBT-{kind}-{part}*.csv'), key=lambda path: (len(path.stem), path))
                 for kind in ('labels', 'boxes', 'file-paths')]
        if not any(names):
            continue
        if not all(names):
            raise ValueError(f'{cfg.root}: BCS-DBT-labels, -boxes and -file-paths-{part}*.csv belong together; not all '
                             'are there')
        labels, boxes, paths = (of[-1] for of in names)     # the longest name, such as -v2, is the latest edition
        files = {bcs_key(line): line for line in lines_of(paths, *KEY, 'descriptive_path', 'classic_path')}
        count = dict.fromkeys(BCS_COUNTS, 0)
        split = 'val' if part == 'validation' else part
        for line in lines_of(labels, *KEY, 'Normal', 'Actionable', 'Benign', 'Cancer'):
            key = bcs_key(line)
            if key not in files:
                raise ValueError(f"{paths}: no row for {'/'.join(key)}, which {labels.name} lists")
            if key in volumes:
                raise ValueError(f"{labels}: {'/'.join(key)} is listed twice, or in two splits")
            flags = {name: value_of(line, name, labels) == 1 for name in ('Normal', 'Actionable', 'Benign', 'Cancer')}
            for name, flag in flags.items():
                count[name] += flag
            if key[2][:1].upper() not in ('L', 'R'):
                raise ValueError(f"{labels}: the view of {'/'.join(key)} starts with neither l nor r")
            volumes[key] = Volume(key, bcs_file(cfg, files[key]), split, laterality=key[2][:1].upper(),
                                  normal=flags['Normal'])
        for line in lines_of(boxes, *KEY, 'Slice', 'X', 'Y', 'Width', 'Height', 'Class', 'VolumeSlices'):
            if bcs_key(line) not in volumes:
                raise ValueError(f"{boxes}: a box in {'/'.join(bcs_key(line))}, which {labels.name} does not list")
            x, y, w, h = (value_of(line, name, boxes) for name in ('X', 'Y', 'Width', 'Height'))
            z, slices = (whole(line, name, boxes) for name in ('Slice', 'VolumeSlices'))
            volumes[bcs_key(line)].lesions.append((z, x, y, x + w, y + h, line['Class']))
            volumes[bcs_key(line)].slices = slices
        mine = [volume for volume in volumes.values() if volume.split == split]
        count |= dict(boxes=sum(len(v.lesions) for v in mine), volumes_with_boxes=sum(bool(v.lesions) for v in mine))
        wrong = [f'{name} {count[name]}, not {of[i]}' for name, of in BCS_COUNTS.items() if count[name] != of[i]]
        if len(mine) == total and wrong:
            raise ValueError(f"{cfg.root}: the full {part} set, but {', '.join(wrong)}; download the CSVs again")
        found[part] = f'{part} {len(mine):,} of {total:,}'
    if not found:
        raise ValueError(f'{cfg.root}: no BCS-DBT-labels-*.csv; expected those of the BCS-DBT archive')
    return list(volumes.values()), [f"volumes of the official set: {', '.join(found.values())}"]


KEY = ('PatientID', 'StudyUID', 'View')


def bcs_key(line):
    return tuple(line[name] for name in KEY)


def bcs_file(cfg, line):
    """The DICOM file of a row of file-paths: a file, or the only one in the folder of its series."""
    for place in (line['classic_path'], line['descriptive_path']):
        path = Path(cfg.root, place)
        if place and path.is_dir():
            found = sorted(path.glob('*.dcm'))
            if len(found) > 1:
                raise ValueError(f'{path} holds {len(found)} DICOM files; expected the one of its series')
            return str(found[0] if found else path)
        if place and path.is_file():
            return str(path)
    return str(Path(cfg.root, line['classic_path']))


def vindr(cfg):
    """VinDr-Mammo: finding_annotations.csv, images/<study>/<image>.dicom, official split. The label of a box is the
    first of its categories, or the first that --findings names."""
    path, images = Path(cfg.root) / 'finding_annotations.csv', {}
    for line in lines_of(path, 'study_id', 'image_id', 'laterality', 'view_position', 'finding_categories', 'xmin',
                         'ymin', 'xmax', 'ymax', 'split'):
        key = (line['study_id'], line['image_id'], line['laterality'] + line['view_position'])
        file = f"{cfg.root}/images/{line['study_id']}/{line['image_id']}.dicom"
        split = dict(training='train', validation='val').get(line['split'], line['split'])
        volume = images.setdefault(key, Volume(key, file, split))
        if any(line[edge] for edge in ('xmin', 'ymin', 'xmax', 'ymax')):
            labels = re.findall("'([^']+)'", line['finding_categories']) or ['lesion']
            label = next((label for label in labels if label in cfg.findings), labels[0])
            box = (value_of(line, name, path) for name in ('xmin', 'ymin', 'xmax', 'ymax'))
            volume.lesions.append((0, *box, label))
    return list(images.values()), []


def cbis(cfg):
    """CBIS-DDSM: {mass,calc}_case_description_{train,test}_set.csv, one row per abnormality, official split; its box is
    that of its ROI mask. Mask and crop are swapped in part of the rows, so the mask is told by its pixels: of the
    files of both columns the largest that holds two values. A mask of another size is scaled, one of another shape
    leaves the film out, with a note. A patient in training and test keeps the test films."""
    films, places, notes, left_out = defaultdict(list), defaultdict(list), [], {}
    for path in sorted(Path(cfg.root).glob('????_case_description_*_set.csv')):
        for line in lines_of(path, 'patient_id', 'left or right breast', 'image view', 'abnormality id', 'pathology',
                             'image file path', 'cropped image file path', 'ROI mask file path'):
            split = path.stem.split('_')[3]
            films[split, line['patient_id'], line['left or right breast'][:1].upper(), line['image view']].append(line)
    if not films:
        raise ValueError(f'{cfg.root}: none of the four CSVs of CBIS-DDSM, such as mass_case_description_train_set.csv')
    for file in images.listing(cfg.root):
        for part in Path(file).parts[:-1]:
            places[part].append(file)                       # by folder and by series UID; the others changed

    def files(cell):
        folder, _, series, *_ = (part.strip('"') for part in (cell + '///').split('/'))
        return places.get(folder) or places.get(series) or []

    volumes = []
    for (split, patient, side, view), found in tqdm(films.items(), desc='reading ROI masks', unit='film', delay=2):
        film = next(iter(files(found[0]['image file path'])), f"{cfg.root}/{found[0]['image file path'].split('/')[0]}")
        key = (patient, Path(found[0]['image file path'].split('/')[0]).name, side + view)
        volume = Volume(key, film, split)
        try:
            volume.shape = images.shape(film)
            for line in found:
                rois = {*files(line['ROI mask file path']), *files(line['cropped image file path'])}
                label = 'cancer' if line['pathology'] == 'MALIGNANT' else 'benign'
                volume.lesions.append((0, *roi_box(sorted(rois), volume.shape[1:]), label))
        except (ValueError, OSError) as problem:
            left_out[key[1]] = f'{key[1]} ({len(found)} lesions): {problem}'
            continue
        volumes.append(volume)
    if left_out:
        told, (first, *_) = f'{len(left_out)} of {len(films)} films have no box', left_out.values()
        if len(left_out) > cfg.max_bad * len(films):
            raise ValueError(f'{told}, --max_bad is {cfg.max_bad}; the first: {first}')
        notes.append(f"{told} and take no part: {'; '.join(left_out.values())}")
    test = {volume.patient for volume in volumes if volume.split == 'test'}
    both = sorted({volume.patient for volume in volumes if volume.split == 'train'} & test)
    if both:
        notes.append(f"{len(both)} patients are in training and test; their training films take no part: "
                     f"{', '.join(both)}")
    return [v for v in volumes if v.split == 'test' or v.patient not in both], notes


def roi_box(files, shape):
    """The box of the largest piece of the mask among these files, in the pixels of a film of shape (H, W)."""
    rois = []
    for file in files:
        with contextlib.suppress(ValueError, OSError):      # a constant or damaged crop is no mask
            rois.append(images.read(file))
    for roi in sorted(rois, key=lambda roi: -roi.size):
        if np.isin(roi, (0, 255)).all() and roi.any():
            piece, pieces = ndimage.label(roi)
            y, x = ndimage.find_objects(piece)[np.bincount(piece.ravel())[1:].argmax()]
            down, across = np.array(shape) / roi.shape
            if abs(down / across - 1) > 0.02:
                raise ValueError(f'its ROI mask is {roi.shape[1]}x{roi.shape[0]}, the film {shape[1]}x{shape[0]}, '
                                 'another aspect')
            return x.start * across, y.start * down, x.stop * across, y.stop * down
    raise ValueError(f'none of {len(files)} ROI files is a mask of two values')


def mias(cfg):
    """mini-MIAS: Info.txt and mdb001 … mdb322; circles become squares, y counts from the bottom. mdb001 and mdb002
    are one patient. Abnormal films without a circle are neither normal nor located: they take no part, with a note."""
    info, films, unplaced = Path(cfg.root) / 'Info.txt', {}, set()
    if not info.exists():
        raise ValueError(f'{info}: no such file; --root is the folder that holds it')
    files = {Path(path).stem: path for path in images.listing(cfg.root)}
    for line in info.read_text(errors='replace').splitlines():
        found = re.match(r'(mdb\d{3}) +[FGD] +(\w+)(?: +([BM])\b)?(?: +(\d{1,4}) +(\d{1,4}) +(\d{1,4})\b)?', line)
        if not found:
            continue
        film, kind, severity, *circle = found.groups()
        pair = f'{(int(film[3:]) + 1) // 2:03d}'
        volume = films.setdefault(film, Volume((pair, film, 'MLO'), files.get(film, f'{cfg.root}/{film}.pgm')))
        if circle[0]:
            if os.path.isfile(volume.path) and images.shape(volume.path)[1:] != (1024, 1024):
                raise ValueError(f'{volume.path}: not 1024x1024, so the circles of Info.txt do not fit it')
            x, y, radius = map(int, circle)
            volume.lesions.append((0, x - radius, 1024 - y - radius, x + radius, 1024 - y + radius,
                                   'cancer' if severity == 'M' else 'benign'))
        elif kind != 'NORM':
            unplaced.add(film)
    notes = [f"abnormal films without a place of it take no part: {', '.join(sorted(unplaced))}"] if unplaced else []
    return [volume for film, volume in films.items() if film not in unplaced], notes


def listed(cfg):
    """A CSV of your own, at --root or as lesions.csv in it, one row per lesion: path (from the CSV's folder), frame
    (from 0, blank: 0), x0, y0, x1, y1 (pixels of the file; all blank: nothing here), label, volume (its name, by
    default the path), patient (by default the volume), study, view, split (train, val, test or blank throughout),
    laterality (L or R: may lie upside down), normal (0: no normal to train on)."""
    path = Path(cfg.root) / 'lesions.csv' if os.path.isdir(cfg.root) else Path(cfg.root)
    volumes, edges, lines = {}, ('x0', 'y0', 'x1', 'y1'), lines_of(path, 'path', 'x0', 'y0', 'x1', 'y1')
    others = sorted({*lines[0]} - {'path', *edges, 'frame', 'label', 'volume', 'patient', 'split', 'study', 'view',
                                   'laterality', 'normal'}) if lines else []
    for line in lines:
        if not line['path']:
            raise ValueError(f'{path}: a row without a path')
        name = line.get('volume') or line['path']
        key = (line.get('patient') or name, line.get('study') or name, line.get('view', ''))
        file = os.path.join(path.parent, line['path'])
        side, normal = line.get('laterality', ''), line.get('normal', '')
        if side not in ('', 'L', 'R') or normal not in ('', '0', '1'):
            raise ValueError(f'{path}: laterality {side!r} and normal {normal!r} of {name}; expected L, R or blank, '
                             'and 0, 1 or blank')
        given = Volume(key, file, line.get('split', ''), laterality=side, normal=normal != '0')
        volume = volumes.setdefault(name, given)
        if replace(volume, lesions=[]) != given:
            raise ValueError(f'{path}: volume {name} has rows with different paths, patients, splits or sides')
        if any(line[edge] for edge in edges):
            box = (value_of(line, edge, path) for edge in edges)
            z = whole(line, 'frame', path) if line.get('frame') else 0
            volume.lesions.append((z, *box, line.get('label') or 'lesion'))
    return list(volumes.values()), [f"columns that play no part: {', '.join(others)}"] if others else []


DATASETS = dict(bcs=bcs, vindr=vindr, cbis=cbis, mias=mias, csv=listed)


def load(cfg):
    """-> volumes with splits and checked boxes, notes: what was left out and why, one sentence each."""
    volumes, notes = DATASETS[cfg.dataset](cfg)
    for what, seen in (('the name', ['/'.join(v.key) for v in volumes]),
                       ('the file', [os.path.realpath(v.path) for v in volumes]),
                       ('the prepared file', [prepared(cfg, v.path) for v in volumes])):
        twice = next((name for name, count in Counter(seen).items() if count > 1), None)
        if twice:
            raise ValueError(f'{what} {twice} belongs to two images or volumes; list each once, and let patient, study '
                             'and view tell them apart')
    unknown = set(cfg.findings) - {lesion[-1] for v in volumes for lesion in v.lesions}
    if unknown:
        raise ValueError(f"--findings {', '.join(sorted(unknown))}: no such label; found "
                         f"{', '.join(sorted({lesion[-1] for v in volumes for lesion in v.lesions}))}")
    if cfg.findings:
        kept = [[lesion for lesion in v.lesions if lesion[-1] in cfg.findings] for v in volumes]
        dropped = sum(len(v.lesions) for v in volumes) - sum(map(len, kept))
        notes.append(f"lesions other than {', '.join(cfg.findings)} do not count, and their images are no normals: "
                     f'{dropped}')
        volumes = [replace(v, lesions=k, normal=v.normal and len(k) == len(v.lesions)) for v, k in zip(volumes, kept)]
    volumes = assign(cfg, volumes)                          # before pairing: a missing pair moves no patient
    volumes = usable(cfg, paired(cfg, volumes, notes) if cfg.paired else volumes, notes)
    for split in ('train', 'val') if cfg.mimic else ('train', 'val', 'test'):
        if not any(v.lesions or cfg.mimic for v in volumes if v.split == split):
            if cfg.mimic:
                raise ValueError('; '.join([f'the {split} split holds no pair', *notes]))
            ill = len({v.patient for v in volumes if v.lesions})
            raise ValueError('; '.join([f'the {split} split holds no lesion; {ill} patients have one in all, of which, '
                                        'without a column split, a fifth are drawn', *notes]))
    return volumes, notes


def usable(cfg, volumes, notes):
    """The volumes whose file is there and, where it holds lesions, has a header that fits them. In training and
    validation the others are left out; in the test set they stay, so that their lesions count as missed. More than
    --max_bad of a split are an error, and so is a box that cannot be."""
    kept, bad, out = [], defaultdict(list), 0
    for v in volumes:
        for z, x0, y0, x1, y1, _ in v.lesions:
            if x1 <= x0 or y1 <= y0 or z < 0:
                raise ValueError(f'{v.path}: the box {x0:g} {y0:g} {x1:g} {y1:g} on frame {z} has no area, or no '
                                 'frame; expected x0 < x1, y0 < y1 and frames from 0')
    for v in tqdm(volumes, desc='looking for files', unit='file', delay=2):
        try:
            path = prepared(cfg, v.path)
            if not os.path.isfile(path):
                raise OSError(f'{path}: no such file')
            if v.lesions:
                shape = v.shape or images.shape(v.path)
                if v.slices not in (0, shape[0]):
                    raise ValueError(f'{v.path} has {shape[0]} slices, the label file says {v.slices}')
                v.shape = shape
        except (ValueError, OSError) as problem:
            bad[v.split].append((v, problem))
            continue
        kept.append(v)
        out += sum(check_box(v, *lesion) for lesion in v.lesions)
    for split, found in bad.items():
        count, lesions = sum(v.split == split for v in volumes), sum(len(v.lesions) for v, _ in found)
        told = f'{len(found)} of {count} {split} files cannot be used, with {lesions} lesions; the first: {found[0][1]}'
        if len(found) > cfg.max_bad * count:
            raise ValueError(f'{told}; --max_bad is {cfg.max_bad}. Are --root and --images the right folders?')
        notes.append(f"{told}; {'their lesions count as missed' if split == 'test' else 'they take no part'}")
    if out:
        notes.append(f'{out} boxes stick out of their image; they count as they are, training sees what is inside')
    return kept + [v for v, _ in bad['test']]


def check_box(volume, z, x0, y0, x1, y1, _):
    """Whether the box sticks out of its image. ValueError where its frame does not exist or it misses the image."""
    (K, H, W), box = volume.shape, f'{volume.path}: the box {x0:g} {y0:g} {x1:g} {y1:g} on frame {z}'
    if z >= K:
        raise ValueError(f'{box}: the file has frames 0 to {K - 1}')
    if x1 <= 0 or y1 <= 0 or x0 >= W or y0 >= H:
        raise ValueError(f'{box} lies outside the image, {W}x{H}')
    return x0 < 0 or y0 < 0 or x1 > W or y1 > H


def assign(cfg, volumes):
    """Splits that are given stay. Without any a fifth of the patients becomes the test set, and without a validation
    set a fifth of the rest that, those with lesions and those without alike, by seed and name."""
    splits = defaultdict(set)
    for v in volumes:
        splits[v.patient].add(v.split)
    names = set().union(*splits.values())
    if names - {'train', 'val', 'test'} and names != {''}:
        raise ValueError(f"splits {', '.join(sorted(map(repr, names)))}; expected train, val and test, or none at all")
    leaks = sorted(patient for patient, of in splits.items() if len(of) > 1)
    if leaks:
        raise ValueError(f"{len(leaks)} patients are in two splits, the first: {leaks[0]} in "
                         f"{' and '.join(sorted(splits[leaks[0]]))}")
    for split, free in (('test', ''), ('val', 'train')):
        if not any(v.split == split for v in volumes):
            pool, ill, taken = [v for v in volumes if v.split == free], defaultdict(bool), set()
            for v in pool:
                ill[v.patient] |= bool(v.lesions)
            order = sorted(ill, key=lambda name: hashlib.sha256(f'{cfg.seed} {name}'.encode()).digest())
            for group in ([n for n in order if ill[n]], [n for n in order if not ill[n]]):
                taken |= set(group[:round(0.2 * len(group))])
            for v in pool:
                v.split = split if v.patient in taken else 'train'
    return volumes


# ---- files -> samples -----------------------------------------------------------------------------------------------

def prepared(cfg, path):
    """Where a file of --root is read from: below --images under the name `prepare.py` gave it, or where it is."""
    if not cfg.images:
        return path
    root = cfg.root if os.path.isdir(cfg.root) else os.path.dirname(cfg.root) or '.'
    name = os.path.relpath(path, root)
    if name.startswith('..'):
        raise ValueError(f'{path} lies outside {root}, so --images cannot mirror it; give the folder of the data set '
                         'as --root')
    mirror = Path(cfg.images, name)
    return str(next((p for p in (mirror, mirror.with_suffix('.npy'), Path(f'{mirror}.npy')) if p.exists()), mirror))


def upright(image, laterality):
    """BCS-DBT's rule for volumes stored upside down: the breast lies at the brighter of the left and right columns; on
    the other side than `laterality` (L or R) says, it wants a turn by 180 degrees, not a mirror."""
    return image if laterality in ('', brighter_side(image)) else image[::-1, ::-1]


def heavier_half(image):
    """L or R: where most of the breast lies, whatever the border looks like"""
    columns = image.sum(0, dtype=np.int64)
    return 'R' if columns[:len(columns) // 2].sum() < columns[len(columns) // 2:].sum() else 'L'


def brighter_side(image):
    """L or R: which of the outermost columns the breast lies at"""
    return 'R' if image[:, 0].sum(dtype=np.int64) < image[:, -1].sum(dtype=np.int64) else 'L'


class Frames(Dataset):
    """An item is (volume, frame) for prediction, (volume, frame, epoch, index) for training; frame None is a normal
    one, far from any lesion. -> a dict with the image uint8 (S, S), or of a pair (2, S, S), upright and squashed; for
    prediction with the size of the file's frame, for training augmented, with boxes and matches. A file that cannot be
    read gives its reason, a str."""

    def __init__(self, cfg, volumes):
        self.cfg, self.volumes, self.anchors, self.turned = cfg, volumes, anchors(cfg.size), {}

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, item):
        try:
            return self.plain(*item) if len(item) == 2 else self.augmented(*item)
        except (ValueError, OSError) as problem:
            return str(problem)

    def squashed(self, image):
        """(H, W) -> (S, S)"""
        return np.asarray(Image.fromarray(image).resize((self.cfg.size,) * 2, Image.Resampling.BICUBIC))

    def read(self, v, z):
        """One frame in the orientation of its boxes, after CLAHE; of prepared .npy that is done (MammoDINO 3.1). Upside
        down is decided on frame 0, once for a volume."""
        side, path = self.volumes[v].laterality, prepared(self.cfg, self.volumes[v].path)
        if side and v not in self.turned:
            first = images.read(path, 0)
            self.turned[v] = upright(first, side) is not first
        image = images.read(path, z)
        image = image[::-1, ::-1] if self.turned.get(v) else image
        image = image if path.lower().endswith('.npy') else images.clahe(np.ascontiguousarray(image))
        return self.squashed(image), image.shape

    def plain(self, v, z):
        """For prediction; z None is the middle one of the normal frames."""
        volume, frame = self.volumes[v], z
        if z is None:
            away = far_from_lesions(volume, images.shape(volume.path)[0])
            frame = away[len(away) // 2]
        image, shape = self.read(v, frame)
        if self.cfg.images:                                 # perhaps smaller than the file, whose pixels count
            shape = (volume.shape or images.shape(volume.path))[1:]
        return dict(volume=v, frame=z, shape=shape, **self.sample(image, self.beside(v, image)))

    def augmented(self, v, z, epoch, index):
        """For training; z None is any of the normal frames."""
        rng, volume = np.random.default_rng([self.cfg.seed, epoch, index]), self.volumes[v]
        K, H, W = volume.shape or images.shape(volume.path)
        if z is None:
            away = far_from_lesions(volume, K)
            z = away[rng.integers(len(away))]
        image, _ = self.read(v, z)
        here = on_frame(volume, [z], (H, W), self.cfg.size)
        near = on_frame(volume, within_reach(volume, z, K), (H, W), self.cfg.size)
        boxes, beside = np.concatenate([here, near]), self.beside(v, image)
        if self.cfg.augment:
            beside = {name: moved(deepcopy(rng), other, boxes)[0] for name, other in beside.items()}
            image, boxes = augment(rng, image, boxes)
        here, near = torch.from_numpy(boxes).float().split([len(here), len(near)])
        own, other = (match(part, self.anchors, self.cfg.high, self.cfg.low) for part in (here, near))
        own[(own == -1) & (other != -1)] = -2               # a lesion marked on another slice is no background here
        return dict(boxes=here, match=own, **self.sample(image, beside))

    def beside(self, v, image):
        """What goes with an image, uint8 (S, S) each: its partner, if it has one, and in stage II where it has tissue.
        In training they are only moved, as the image is: what C makes of them is the truth. ValueError where the
        breasts lie at different sides."""
        found, partner = {}, self.volumes[v].partner
        if partner:
            other = upright(images.read(partner.path), partner.laterality)
            other = other if partner.path.lower().endswith('.npy') else images.clahe(np.ascontiguousarray(other))
            found['partner'] = self.squashed(other)
            if heavier_half(image) != heavier_half(found['partner']):
                raise ValueError(f'{partner.path} is the mirror image of its pair {self.volumes[v].path}')
        if self.cfg.mimic:
            found['tissue'] = np.uint8(255 * mask.tissue(image, percentile=None))
        return found

    def sample(self, image, beside):
        """image (S, S), or with its partner (2, S, S); tissue bool (S, S)"""
        found = dict(image=np.stack([image, beside['partner']]) if 'partner' in beside else image)
        return found | (dict(tissue=beside['tissue'] > 127) if 'tissue' in beside else {})


def marked(volume):
    """Its annotated frames"""
    return sorted({lesion[0] for lesion in volume.lesions})


def within_reach(volume, z, K):
    """Other annotated frames whose lesions may be seen on frame z"""
    return [other for other in marked(volume) if 0 < abs(other - z) <= K / 4]


def far_from_lesions(volume, K):
    """Frames that count as normal: a lesion is marked on one slice and reaches beyond it, so nothing within K / 4, the
    challenge's own reach."""
    return [z for z in range(K) if all(abs(z - lesion[0]) > K / 4 for lesion in volume.lesions)]


def on_frame(volume, frames, shape, size):
    """The boxes marked on these frames in the pixels of the squashed image, cut at its borders: (G, 4)."""
    H, W = shape
    boxes = np.array([lesion[1:5] for lesion in volume.lesions if lesion[0] in frames], float).reshape(-1, 4)
    return (boxes * np.array([size / W, size / H] * 2)).clip(0, size)


def augment(rng, image, boxes):
    """Training augmentation of 6.2.3 on a uint8 image (S, S) and its boxes (G, 4): `moved`, then with p = .3 each 15 to
    20 black rectangles with sides of 20 to 40 pixels of 518, off the boxes; gamma 0.8 to 1.2; noise of sigma 0.05."""
    image, boxes = moved(rng, image, boxes)
    S, unit = len(image), len(image) / 518
    if rng.random() < 0.3:
        image = image.copy()
        for _ in range(rng.integers(15, 21)):
            w, h = (max(1, round(unit * side)) for side in rng.uniform(20, 40, 2))
            x, y = int(rng.integers(S - w + 1)), int(rng.integers(S - h + 1))
            clear = (boxes[:, 0] >= x + w) | (boxes[:, 2] <= x) | (boxes[:, 1] >= y + h) | (boxes[:, 3] <= y)
            if clear.all():
                image[y:y + h, x:x + w] = 0
    if rng.random() < 0.3:
        table = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.8, 1.2)
        image = np.uint8(table.round())[image]
    if rng.random() < 0.3:
        noisy = image + 255 * 0.05 * rng.standard_normal(image.shape, np.float32)
        image = np.uint8(noisy.clip(0, 255).round())
    return np.ascontiguousarray(image), boxes


def moved(rng, image, boxes):
    """Each flip with p = .5; zoom by 0.8 to 1.5 (p = .5), with all boxes whole and 15 to 206 pixels of 518 wide, 9 to
    182 high, or not at all. What it draws depends on the boxes, not on the image."""
    S, unit = len(image), len(image) / 518
    if rng.random() < 0.5:
        image, boxes = image[:, ::-1], np.stack([S - boxes[:, 2], boxes[:, 1], S - boxes[:, 0], boxes[:, 3]], axis=1)
    if rng.random() < 0.5:
        image, boxes = image[::-1], np.stack([boxes[:, 0], S - boxes[:, 3], boxes[:, 2], S - boxes[:, 1]], axis=1)
    window = zoom_window(rng, S, boxes, unit) if rng.random() < 0.5 else None
    if window is not None:
        x, y, side = window
        scale = side / S
        image = np.asarray(Image.fromarray(image).transform((S, S), Image.Transform.AFFINE, (scale, 0, x, 0, scale, y),
                                                            Image.Resampling.BICUBIC))
        boxes = (boxes - [x, y, x, y]) / scale
    return np.ascontiguousarray(image), boxes


def zoom_window(rng, S, boxes, unit, tries=10):
    """The square x, y, side of the image that is to fill it; beyond the image it shows black. None where no try keeps
    every box whole and within its limits."""
    for _ in range(tries):
        side = S / rng.uniform(0.8, 1.5)
        sizes = (boxes[:, 2:] - boxes[:, :2]) * S / side
        low, high = np.full(2, min(0, S - side)), np.full(2, max(0, S - side))
        if len(boxes):
            low, high = np.maximum(low, boxes[:, 2:].max(0) - side), np.minimum(high, boxes[:, :2].min(0))
        fits = (sizes >= np.array([15, 9]) * unit) & (sizes <= np.array([206, 182]) * unit)
        if fits.all() and (low <= high).all():
            return *rng.uniform(low, high), side


def collate(size, samples, images=1):
    """Samples of a micro-batch -> images (B, S, S), of pairs (B, 2, S, S), boxes, matches (B, A), in stage II tissue
    (B, S, S), and how many could not be read: those are named, and where nothing is left a black image stands in that
    every anchor ignores."""
    good = [sample for sample in samples if isinstance(sample, dict)]
    for reason in samples:
        if isinstance(reason, str):
            tqdm.write(f'skipped: {reason}', file=sys.stderr)
    ignored = torch.full((len(anchors(size)) if not good else 0,), -2)
    black = np.zeros((2,) * (images - 1) + (size, size), np.uint8)
    kept = good or [dict(image=black, boxes=torch.zeros(0, 4), match=ignored, tissue=np.zeros((size, size), bool))]
    tissue = [sample['tissue'] for sample in kept if 'tissue' in sample]
    tissue = dict(tissue=torch.from_numpy(np.stack(tissue))) if tissue else {}
    return dict(tissue, images=torch.from_numpy(np.stack([sample['image'] for sample in kept])),
                boxes=[sample['boxes'] for sample in kept], match=torch.stack([sample['match'] for sample in kept]),
                count=len(samples), bad=len(samples) - len(good))


# ---- training -------------------------------------------------------------------------------------------------------

def normals(volumes):
    """Numbers of the volumes that have a frame to serve as normal."""
    return [v for v, volume in enumerate(volumes) if volume.normal and (
        not volume.lesions or far_from_lesions(volume, volume.shape[0]))]


def plan(cfg, volumes, start, rank, ranks):
    """-> steps per epoch, and this rank's micro-batches of all epochs from `start` on, lists of items of `Frames`. An
    epoch is every annotated slice and --normals as many normal ones, shuffled and filled up to whole batches, the
    same however many ranks share them."""
    if cfg.mimic:                                           # every pair, once
        ill, well = [(v, 0) for v in range(len(volumes))], []
    else:
        ill, well = [(v, z) for v, volume in enumerate(volumes) for z in marked(volume)], normals(volumes)
    wanted = round(cfg.normals * len(ill)) if well else 0
    steps = math.ceil((len(ill) + wanted) / cfg.batch)

    def generate():
        """Lists of (volume, frame or None, epoch, index)"""
        for epoch in range(start, cfg.epochs):
            rng = np.random.default_rng([cfg.seed, epoch])
            healthy = [v for _ in range(math.ceil(wanted / max(len(well), 1))) for v in rng.permutation(well)]
            items = ill + [(int(v), None) for v in healthy[:wanted]]
            order = np.resize(rng.permutation(len(items)), (steps, cfg.batch))
            for step, batch in enumerate(order):
                mine = [(*items[i], epoch, step * cfg.batch + j) for j, i in enumerate(batch)][rank::ranks]
                yield from (mine[i:i + cfg.micro_batch] for i in range(0, len(mine), cfg.micro_batch))

    return steps, generate()


def pixels(images, device):
    """uint8 (B, S, S) or (B, 2, S, S) -> float (B, 1 or 2, S, S) in [0, 1]; bytes travel."""
    return images.to(device, non_blocking=True).view(len(images), -1, *images.shape[-2:]).float() / 255


def autocast(cfg, device):
    """bf16 where --amp asks for it, on GPUs by default."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda' if cfg.amp is None else cfg.amp)


def learn(cfg, ddp, micro, device):
    """The gradients of one step: sums of the model's objective over its count, such as max(1, positives in the batch)
    over micro-batches and ranks. -> this rank's part of the loss and of the model's TERMS"""
    model = ddp.module
    count = sum(model.count(batch) for batch in micro).to(device, torch.float32)
    dist.all_reduce(count)
    sums = torch.zeros(1 + len(model.TERMS), device=device)
    for batch in micro:
        with contextlib.nullcontext() if batch is micro[-1] else ddp.no_sync():
            with autocast(cfg, device):
                answers = ddp(pixels(batch['images'], device), batch)
            terms = torch.stack(model.objective(cfg, answers, batch)) / count.clamp_min(1)
            (dist.get_world_size() * terms[0]).backward()   # DDP takes the mean over ranks, the loss is their sum
        sums += terms.detach()
    return sums


def train(cfg, volumes, device, out):
    """Epochs until the patience ends; the best by validation counts. -> the detector with its weights, and
    dict(score, epoch, threshold, weights, pretrained). OUT/last.pt holds what an exact continuation needs,
    OUT/log.jsonl a line an epoch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = {split: [v for v in volumes if v.split == split] for split in ('train', 'val')}
    detector = build(cfg, out).to(device)
    groups = vit.param_groups(detector, cfg.lr, cfg.wd, cfg.layer_decay)
    groups = [group | dict(params=[p for p in group['params'] if p.requires_grad]) for group in groups]
    optimizer = torch.optim.AdamW([group for group in groups if group['params']])
    start, data = 0, fingerprint([v for v in volumes if v.split != 'test'])
    if cfg.resume and (out / 'last.pt').exists():
        start, best = restore(cfg, out, detector, optimizer, data)
    else:
        best = dict(score=-1.0, epoch=-1, threshold=0.5, weights=copied(detector), pretrained=pretrained(cfg))
    if rank == 0:                                           # the lines of epochs that are done stay
        header = json.dumps(dict(config=asdict(cfg), torch=torch.__version__)) + '\n'
        log = out / 'log.jsonl'
        lines = log.read_text().splitlines(keepends=True) if start and log.exists() else [header]
        part = Path(f'{log}.part')                          # whole or not at all
        part.write_text(''.join(lines[:1 + start]))
        os.replace(part, log)

    per_epoch, items = plan(cfg, parts['train'], start, rank, ranks)
    steps, accumulate = cfg.epochs * per_epoch, math.ceil(cfg.batch // ranks / cfg.micro_batch)
    batches = iter(DataLoader(Frames(cfg, parts['train']), batch_sampler=items, num_workers=cfg.workers,
                              collate_fn=partial(collate, cfg.size, images=1 + bool(cfg.paired))))
    ddp = nn.parallel.DistributedDataParallel(detector, device_ids=[device] if device.type == 'cuda' else None)
    seen, bad = 0, 0
    bar = tqdm(total=steps, initial=start * per_epoch, unit='step', disable=rank > 0 or not steps)
    for epoch in range(start, cfg.epochs):
        if epoch - best['epoch'] > cfg.patience:
            break
        began, sums, norms = time.time(), torch.zeros(1 + len(detector.TERMS), device=device), []
        detector.train()
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step, rank]).generate_state(1)[0]))    # dropout
            for group in optimizer.param_groups:
                group['lr'] = group['lr_scale'] * cosine(step, steps, cfg.lr, 1e-6, warmup=min(100, steps // 10))
            micro = [next(batches) for _ in range(accumulate)]
            seen, bad = seen + sum(batch['count'] for batch in micro), bad + sum(batch['bad'] for batch in micro)
            if seen >= 100 and bad > cfg.max_bad * seen:
                raise ValueError(f'{bad} of {seen} training images are unusable, --max_bad is {cfg.max_bad}; names are '
                                 'above')
            sums += learn(cfg, ddp, micro, device)
            norms.append(nn.utils.clip_grad_norm_(detector.parameters(), cfg.clip).item())
            if not math.isfinite(norms[-1]):
                raise FloatingPointError(f'step {step}: the gradient is not finite; choose another --out, a lower --lr')
            optimizer.step()
            optimizer.zero_grad()
            bar.update()

        dist.all_reduce(sums)
        score, beside = judged(cfg, detector, parts['val'], device)
        if score > best['score']:
            best |= dict(score=score, epoch=epoch, weights=copied(detector), **beside)
        line = dict(epoch=epoch, **dict(zip(('loss', *detector.TERMS), (sums / per_epoch).tolist())),
                    grad_norm=sum(norms) / per_epoch, validation=score, best=best['score'], best_epoch=best['epoch'],
                    images_per_s=cfg.batch * per_epoch / (time.time() - began))
        bar.set_postfix({k: f'{line[k]:.3f}' for k in ('loss', 'validation', 'best')})
        if rank == 0:
            with open(log, 'a') as file:
                file.write(json.dumps(line) + '\n')
            keep(cfg, out, detector, optimizer, data, epoch + 1, best)
    bar.close()
    detector.load_learnt(best['weights'])
    if rank == 0 and not (out / 'last.pt').exists():        # --epochs 0
        keep(cfg, out, detector, optimizer, data, 0, best)
    dist.barrier()
    return detector, best


def judged(cfg, detector, volumes, device):
    """-> the validation score, and what else of it is kept with the best weights"""
    if cfg.mimic:
        return likeness(cfg, detector, volumes, device)
    score, threshold = validated(cfg, detector, volumes, device)
    return score, dict(threshold=threshold)


def copied(detector):
    return {k: v.detach().cpu().clone() for k, v in detector.learnt().items()}


def build(cfg, out=None):
    """The model at its start: --encoder, or random weights of its shape, whose LayerScale is 1 (at DINOv2's 1e-5 every
    block would be the identity); or whatever --init_from has of the same name and shape, at least encoder and pyramid.
    In a run `out` that goes on it is what the checkpoint holds, whatever became of the runs it began from."""
    begun = cfg.init_from or cfg.mimic
    if out and cfg.resume and (begun or cfg.fuse) and (out / 'last.pt').exists():
        return restored(out)[1]
    if begun:
        started = restored(begun)[1]
        if started.fusion and not cfg.fuse:
            raise ValueError(f'{begun} is fused; go on with it by --fuse')
        if cfg.channels != started.pyramid.p4.out_channels:
            raise ValueError(f'{begun} has {started.pyramid.p4.out_channels} channels, --channels is {cfg.channels}')
        encoder = started.encoder
    elif os.path.isfile(cfg.encoder):
        encoder = vit.load(cfg.encoder)
    elif cfg.encoder == Config.encoder:
        encoder = vit.ViT(**SMALL)
    else:
        raise ValueError(f'{cfg.encoder}: no such file; --encoder takes a last.pt of pretrain.py or the official '
                         'DINOv2 file')
    if encoder.patch != 14:
        raise ValueError(f'{cfg.encoder}: its patches are {encoder.patch} pixels wide; pyramid and anchors are laid '
                         'out for 14')
    torch.manual_seed(cfg.seed)
    if not begun and not pretrained(cfg):
        encoder = vit.ViT(**encoder.config, layerscale=1.0)
    other = cfg.mimic or cfg.fuse
    model = assembled(cfg, encoder.eval(), features_of(other, cfg.size) if other else None)
    if begun:
        own = model.state_dict()
        alike = {k: v for k, v in started.learnt().items() if k in own and v.shape == own[k].shape}
        model.load_state_dict(own | alike)
    return model


def assembled(cfg, encoder, other):
    """A detector, or stage II, with this encoder and the frozen features of another run"""
    if cfg.mimic:
        return Mimic(encoder, cfg.channels, cfg.freeze, other, cfg.size)
    model = (SetDetector(encoder, cfg.channels, cfg.freeze, cfg.size, cfg.queries, cfg.layers, cfg.denoising)
             if cfg.head == 'detr' else Detector(encoder, cfg.channels, cfg.dropout, cfg.freeze))
    model.fusion = Fusion(other, cfg.channels) if cfg.fuse else None
    return model


SMALL = dict(size=84, width=128, depth=4, heads=4)          # the demo of pretrain.py


def keep(cfg, out, detector, optimizer, data, epoch, best):
    """OUT/last.pt: the best weights for use, and the current ones and the optimizer for an exact continuation."""
    encoder = detector.encoder.state_dict() if cfg.freeze else {
        k.removeprefix('encoder.'): v for k, v in best['weights'].items() if k.startswith('encoder.')}
    save(out / 'last.pt', dict(config=asdict(cfg), vit=detector.encoder.config, data=data, epoch=epoch, best=best,
                               teacher={f'backbone.{k}': v.cpu() for k, v in encoder.items()},
                               other=packed(detector.frozen_part()), detector=copied(detector),
                               optimizer=optimizer.state_dict()))


def restore(cfg, out, detector, optimizer, data):
    """-> the epoch to go on with, and the best so far. A changed recipe is refused, and so is other data."""
    path = out / 'last.pt'
    free = {'resume', 'root', 'paired', 'images', 'out', 'encoder', 'workers', 'max_bad', 'draws', 'min_distance',
            'overlap', 'gap', 'search'}
    try:
        state = vit.read(path)
        changed = [f"{k} {state['config'].get(k)} -> {v}" for k, v in asdict(cfg).items() if state['config'].get(k) != v
                   and (k not in free or k == 'images' and not (v and state['config'][k]))]
        fits = state['vit'] == detector.encoder.config
        if fits and not changed:
            if cfg.freeze:
                detector.encoder.load_state_dict({k.removeprefix('backbone.'): v for k, v in state['teacher'].items()})
            detector.load_learnt(state['detector'])
            with warnings.catch_warnings(action='ignore'):  # what is odd is refused, not remarked upon
                optimizer.load_state_dict(state['optimizer'])
        epoch, best, seen = state['epoch'], state['best'], state['data']
        if type(epoch) is not int or epoch < 0 or not isinstance(best, dict):
            raise ValueError('something else')
    except Exception as problem:
        raise ValueError(f'{path}: not a checkpoint of this script ({type(problem).__name__}); remove it to start '
                         'afresh') from problem
    if changed:
        raise ValueError(f"{path} is the run of another recipe: {', '.join(changed)}; choose another --out")
    if not fits:
        raise ValueError(f'{path} was trained on an encoder of another shape; give the --encoder of that run again')
    if seen != data:
        raise ValueError(f'{path} was trained on other images, boxes or splits; the stream would not be the same')
    return epoch, best


def fingerprint(volumes):
    """Which images, boxes and splits these are."""
    told = [(v.key, v.split, v.lesions, v.normal, *([Path(v.partner.path).name] if v.partner else []))
            for v in volumes]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def validated(cfg, detector, volumes, device):
    """Mean sensitivity at 1 to 5 false positives per image over the annotated validation slices and --normals times
    as many normal ones; hits within max(half the diagonal, 20 pixels of 518), which are about the challenge's 100 of a
    file 2457 high (6.2.3). -> it, and the score at 1 false positive."""
    items, truth, found = [(v, z) for v, volume in enumerate(volumes) for z in marked(volume)], [], []
    for v, z in items:
        for x0, y0, x1, y1 in on_frame(volumes[v], [z], volumes[v].shape[1:], cfg.size):
            truth.append(((v, z), x0, y0, x1 - x0, y1 - y0))
    items += [(v, None) for v in normals(volumes)[:round(cfg.normals * len(items))]]    # None: its middle normal frame
    mine = items[dist.get_rank()::dist.get_world_size()]
    for v, z, boxes, scores, _ in detected(cfg, detector, volumes, mine, device):
        rows = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2], scores])
        found += [((v, z), *row) for row in rows.tolist()]
    m = matched([(item, math.inf) for item in items], truth, gathered(found), min_distance=20 * cfg.size / 518)
    thresholds, false_positives, _ = curve(m, m.each(), every=True)
    threshold = thresholds[np.flatnonzero(false_positives <= 1)[-1]]
    return float(sensitivity(m, [1, 2, 3, 4, 5], m.each()).mean()), float(np.clip(threshold, 0, 1))


def gathered(mine):
    """Lists of all ranks as one, the same on every rank."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [item for part in everyone for item in part]


# ---- prediction -----------------------------------------------------------------------------------------------------

def readable(cfg, volumes, items):
    """Items of `Frames` in lists of --micro_batch; those that cannot be read are named and left out."""
    for samples in DataLoader(Frames(cfg, volumes), sampler=items, batch_size=cfg.micro_batch, collate_fn=list,
                              num_workers=cfg.workers):
        for reason in samples:
            if isinstance(reason, str):
                tqdm.write(f'skipped: {reason}', file=sys.stderr)
        samples = [sample for sample in samples if isinstance(sample, dict)]
        if samples:
            yield samples


@torch.no_grad()
def detected(cfg, detector, volumes, items, device):
    """(volume, frame) one by one -> volume, frame, boxes (n, 4) in squashed pixels, scores (n,), (H, W) of the file.
    Frames stream through: a few squashed ones are all that is ever held. Unreadable ones are named and left out."""
    detector.eval()
    for samples in readable(cfg, volumes, items):
        with autocast(cfg, device):
            answers = detector(pixels(torch.from_numpy(np.stack([s['image'] for s in samples])), device))
        for sample, (boxes, scores) in zip(samples, detector.findings(cfg, answers)):
            yield sample['volume'], sample['frame'], boxes.numpy(), scores.numpy(), sample['shape']


def predicted(cfg, detector, volumes, device):
    """Findings of volumes, every slice seen -> rows (number of the volume, x, y, w, h, z, depth, score, slice of the
    best box) in pixels of the file, and notes. Ranks share the volumes; without a readable slice a volume has no
    findings, its lesions count as missed."""
    mine, items, rows, notes = range(dist.get_rank(), len(volumes), dist.get_world_size()), [], [], []
    for v in mine:
        if volumes[v].lesions and not volumes[v].shape:     # told by `usable`: missed
            continue
        try:
            volumes[v].shape = volumes[v].shape or images.shape(volumes[v].path)
            items += [(v, z) for z in range(volumes[v].shape[0])]
        except (ValueError, OSError) as problem:
            notes.append(f'no findings in an unreadable file: {problem}')
    bar = tqdm(total=len(items), desc='predicting', unit='slice', disable=dist.get_rank() > 0, delay=2, leave=False)
    seen = 0
    for v, slices in itertools.groupby(detected(cfg, detector, volumes, items, device), key=lambda found: found[0]):
        boxes, scores, frames = [], [], []
        for _, z, squashed, score, (H, W) in slices:
            boxes.append(squashed * np.array([W / cfg.size, H / cfg.size] * 2))
            scores.append(score)
            frames.append(np.full(len(score), z))
            seen += 1
            bar.update()
        found = merged(*map(np.concatenate, (boxes, scores, frames)), cfg.overlap, cfg.gap)
        rows += [(v, *row) for row in found[:cfg.top].tolist()]
    bar.close()
    if seen < len(items):
        notes.append(f'{len(items) - seen} of {len(items)} slices are unreadable and have no boxes')
    return gathered(rows), gathered(notes)


# ---- results --------------------------------------------------------------------------------------------------------

PREDICTION = (*KEY, 'X', 'Width', 'Y', 'Height', 'Z', 'Depth', 'Score')
BOX = (*KEY, 'Subject', 'Slice', 'X', 'Y', 'Width', 'Height', 'Class', 'AD', 'VolumeSlices')
LABEL = (*KEY, 'Normal', 'Actionable', 'Benign', 'Cancer')


def write_csv(path, header, rows):
    with open(path, 'w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([header, *rows])


def write_truth(out, volumes):
    """labels.csv and boxes.csv of these volumes in the challenge's format; of mammograms VolumeSlices is 1.
    What is neither normal nor benign nor cancer counts as actionable."""
    labels, boxes = [], []
    for v in volumes:
        kinds = {lesion[-1] for lesion in v.lesions}
        known, normal = kinds & {'benign', 'cancer'}, v.normal and not kinds
        labels.append((*v.key, *map(int, (normal, not normal and not known, 'benign' in kinds, 'cancer' in kinds))))
        for z, x0, y0, x1, y1, label in v.lesions:
            slices = v.shape[0] if v.shape else max(v.slices, 1 + z)                    # of a file that cannot be used
            boxes.append((*v.key, '', z, x0, y0, x1 - x0, y1 - y0, label, '', slices))
    write_csv(out / 'labels.csv', LABEL, labels)
    write_csv(out / 'boxes.csv', BOX, boxes)


def write_list(path, volumes):
    """The data set as it was read, in the format of `listed`: given as --root, no ROI mask is read again."""
    lines = []
    for v in volumes:
        about = (os.path.abspath(v.path), *v.key, v.split, v.laterality, int(v.normal))
        lines += [(*about, *lesion) for lesion in v.lesions] or [(*about, *[''] * 6)]
    write_csv(path, ('path', 'patient', 'study', 'view', 'split', 'laterality', 'normal',
                     'frame', 'x0', 'y0', 'x1', 'y1', 'label'), lines)


def read_truth(labels, boxes):
    """The challenge's labels and boxes -> volumes [key, slices], truth [key, x, y, w, h, slice], the class of each
    lesion. A volume of one slice is a mammogram, where depth plays no part: it counts as infinitely many."""
    slices, truth, classes = {}, [], []
    for line in lines_of(labels, *KEY):
        if bcs_key(line) in slices:
            raise ValueError(f"{labels}: {'/'.join(bcs_key(line))} is listed twice")
        slices[bcs_key(line)] = math.inf
    for line in lines_of(boxes, *BOX[:3], 'Slice', 'X', 'Y', 'Width', 'Height', 'Class', 'VolumeSlices'):
        key = bcs_key(line)
        if key not in slices:
            raise ValueError(f"{boxes}: a box in {'/'.join(key)}, which {labels} does not list")
        x, y, w, h, z, count = (value_of(line, name, boxes) for name in ('X', 'Y', 'Width', 'Height', 'Slice',
                                                                         'VolumeSlices'))
        if not 0 <= z < count:
            raise ValueError(f"{boxes}: slice {z:g} of {count:g} in {'/'.join(key)} does not exist; they count from 0")
        if w <= 0 or h <= 0:
            raise ValueError(f"{boxes}: a box of {w:g}x{h:g} in {'/'.join(key)} has no area")
        if slices[key] == math.inf:                         # the challenge takes the first row's
            slices[key] = count if count > 1 else math.inf
        truth.append((key, x, y, w, h, z))
        classes.append(line['Class'])
    if not truth:
        raise ValueError(f'{boxes}: no lesion, so there is no sensitivity')
    return list(slices.items()), truth, np.array(classes)


def read_predictions(path):
    """The challenge's submission format -> rows [key, x, y, w, h, z, depth, score]. An empty file has none."""
    path = Path(path) / 'predictions.csv' if os.path.isdir(path) else Path(path)
    if path.is_file() and not path.stat().st_size:
        return []
    rows = []
    for line in lines_of(path, *PREDICTION):
        x, w, y, h, z, depth, score = (value_of(line, name, path) for name in PREDICTION[3:])
        if w < 0 or h < 0:
            raise ValueError(f"{path}: a box of {w:g}x{h:g} in {'/'.join(bcs_key(line))}")
        rows.append((bcs_key(line), x, y, w, h, z, depth, score))
    return rows


THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)       # of IHRRB-DINO's table; it prints all but the last
RATES = (1, 2, 3, 4)


class Scored:
    """One detector's predictions against the truth. The numbers of the report are functions of the weights of the
    volumes, (V + 1,), so that a bootstrap draw costs no matching."""

    def __init__(self, volumes, truth, predictions, min_distance):
        number, flat = {v[0]: i for i, v in enumerate(volumes)}, [(key, math.inf) for key, _ in volumes]
        self.m = matched(volumes, truth, predictions, min_distance)
        self.flat = matched(flat, [row[:5] for row in truth], predictions, min_distance)
        self.boxes = [overlapping([row[:5] for row in truth], predictions, t, number) for t in THRESHOLDS]

    def with_lesions(self, weight):
        """Sensitivity at 1, 2, 3, 4 false positives per volume with a lesion, and their mean: (5,)"""
        at = sensitivity(self.m, RATES, self.m.ill(weight))
        return np.append(at, at.mean())

    def everywhere(self, weight):
        at = sensitivity(self.m, RATES, weight)
        return np.append(at, at.mean())

    def caught(self, weight):
        """Lesions found at the last score with at most 4 false positives per volume with a lesion, bool (G,)"""
        return caught(self.m, RATES[-1], self.m.ill(weight))

    def classes(self, weight, chosen):
        """Of each class of lesions, bool (G,), the share found there: (classes,)"""
        count = weight[self.m.home] * np.array(chosen)                                  # (classes, G)
        return (count * self.caught(weight)).sum(1) / count.sum(1)

    def fauc(self, weight):
        """FAUC-1, and FAUC-1+ over the images with a lesion (there: with a malignant one): (2,)"""
        return np.array([step_area(self.flat, weight), step_area(self.flat, self.flat.ill(weight))])

    def overlap(self, weight):
        """AP and top-1 localisation at each of THRESHOLDS: (2, 8)"""
        return np.array([[of(o, weight) for o in self.boxes] for of in (precision_area, localised)])


def report(runs, volumes, truth, classes, min_distance, draws, seed, out, notes=()):
    """Tables, scores.json and froc.png of one or more detectors on the same volumes.

    runs {name: rows}, volumes and truth as `froc` takes them, classes (G,) of the lesions. Intervals are bootstrap
    percentiles over patients, whose volumes stay together."""
    scored = {name: Scored(volumes, truth, rows, min_distance) for name, rows in runs.items()}
    names, patient = np.unique([key[0] for key, _ in volumes], return_inverse=True)
    rng, ones = np.random.default_rng(seed), np.ones(len(volumes) + 1)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)     # a draw with replacement
    weights = np.column_stack([times[:, patient], np.ones(draws)])                      # (draws, V + 1)
    chosen, ill = {name: classes == name for name in sorted(set(classes))}, len({row[0] for row in truth})

    def intervals(metric):
        """metric(weight) -> (n,); its values with 2.5 and 97.5 percentiles, (n, 3)"""
        with np.errstate(invalid='ignore'), warnings.catch_warnings():
            warnings.simplefilter('ignore', RuntimeWarning)                             # a class that no draw holds
            drawn = np.array([metric(weight) for weight in weights])
            return np.column_stack([metric(ones), *np.nanpercentile(drawn, [2.5, 97.5], axis=0)])

    def table(title, heads, metric):
        """One line a detector, of metric(scored, weight) -> (heads,)"""
        found = {name: dict(zip(heads, intervals(partial(metric, s)).tolist())) for name, s in scored.items()}
        print(f"\n{title:38s}{''.join(f'{head:>21s}' for head in heads)}")
        for name, values in found.items():
            print(f'  {name:36.36s}' + ''.join(f'{cell(v):>21s}' for v in values.values()))
        return found

    lesions = {name: int(pick.sum()) for name, pick in chosen.items()}
    print(f"{len(volumes)} images or volumes of {len(names)} patients, {ill} with {len(truth)} lesions "
          f"({', '.join(f'{name} {count}' for name, count in lesions.items())}); a hit is within max(half the "
          f'diagonal, {min_distance:g} pixels)\n95 % intervals over patients, {draws} draws')
    unlisted = {name: int((s.m.volume < 0).sum()) for name, s in scored.items() if (s.m.volume < 0).any()}
    for name, count in unlisted.items():
        print(f'  {name}: {count} predictions in volumes that are not listed, false positives over all volumes')
    heads = [*(f'{rate} FP' for rate in RATES), 'mean of 1-4']
    tables = dict(
        challenge={name: challenge(s.m) for name, s in scored.items()},
        with_lesions=table('sensitivity, volumes with a lesion', heads, Scored.with_lesions),
        all=table('sensitivity, all volumes', heads, Scored.everywhere) if ill < len(volumes) else None,
        classes=table('found within 4 FP, with a lesion', [*chosen],
                      lambda s, w: s.classes(w, [*chosen.values()])),
        fauc=table('area up to 1 FP', ['FAUC-1', 'FAUC-1+'], Scored.fauc),
        overlap=overlap_table({name: s.overlap(ones) for name, s in scored.items()}),
        overlap_mean=table('mean over IoU', ['AP', 'top-1'], lambda s, w: s.overlap(w).mean(1)),
        against=against(scored, intervals))
    chart({name: curve(s.m, s.m.ill())[1:] for name, s in scored.items()}, tables['with_lesions'],
          'false positives per image or volume with a lesion').save(out / 'froc.png')
    (out / 'scores.json').write_text(json.dumps(plain(dict(
        min_distance=min_distance, draws=draws, seed=seed, volumes=len(volumes), patients=len(names), lesions=lesions,
        unlisted=unlisted, notes=list(notes), **tables)), indent=1, allow_nan=False))
    print(f'-> {out}/scores.json, froc.png')


def overlap_table(found):
    """IHRRB-DINO's table: {name: (2, 8)} AP and top-1 localisation at IoU .2 to .9, slices playing no part."""
    print(f"\n{'IoU':38s}" + ''.join(f'{threshold:7.1f}' for threshold in THRESHOLDS) + '   mean')
    for i, title in enumerate(('AP', 'top-1')):
        for name, values in found.items():
            print(f"  {f'{title}, {name}':36.36s}" + ''.join(f'{v:7.3f}' for v in [*values[i], values[i].mean()]))
    return dict(thresholds=THRESHOLDS, at={name: dict(zip(('AP', 'top-1'), v.tolist())) for name, v in found.items()})


def against(scored, intervals):
    """Every pair of detectors: the difference of mean sensitivities, and McNemar over the lesions found within 4 false
    positives per volume with a lesion, as if lesions were independent."""
    found = {}
    for (a, one), (b, two) in itertools.combinations(scored.items(), 2):
        gap = intervals(lambda w: two.with_lesions(w)[-1:] - one.with_lesions(w)[-1:])[0].tolist()
        first, second = (s.caught(s.m.each()) for s in (one, two))
        one_alone, two_alone, p = int((first & ~second).sum()), int((second & ~first).sum()), mcnemar(first, second)
        print(f'\n{b} - {a}: mean sensitivity {gap[0]:+.3f} [{gap[1]:+.3f}, {gap[2]:+.3f}]; lesions found within 4 FP '
              f'per volume with a lesion by {b} alone {two_alone}, by {a} alone {one_alone}, McNemar p = {p:.2g}')
        found[f'{b} - {a}'] = dict(mean_sensitivity=gap, mcnemar=p, alone={a: one_alone, b: two_alone})
    return found


def cell(v):
    return f'{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]'.replace('0.', '.')


def plain(value):
    """For JSON, which knows no NaN: null; names as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def score(argv):
    """Submissions or runs, against the challenge's labels and boxes or those of the first run."""
    parser = argparse.ArgumentParser(prog='detect.py score')
    parser.add_argument('predictions', nargs='+', metavar='CSV_OR_RUN', help='a submission, or a run of detect.py')
    parser.add_argument('--labels', help='BCS-DBT-labels-*.csv (default: labels.csv of the first run)')
    parser.add_argument('--boxes', help='BCS-DBT-boxes-*.csv (default: boxes.csv of the first run)')
    parser.add_argument('--min_distance', type=float, help='pixels; by default that of the run, 100 for a submission')
    parser.add_argument('--draws', type=int, default=1000, help='bootstrap draws of patients (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', default='runs/score', help='folder of scores.json and froc.png (default: %(default)s)')
    args = parser.parse_args(argv)
    beside = Path(args.predictions[0]) if os.path.isdir(args.predictions[0]) else Path(args.predictions[0]).parent
    labels, boxes = args.labels or beside / 'labels.csv', args.boxes or beside / 'boxes.csv'
    volumes, truth, classes = read_truth(labels, boxes)
    for folder in args.predictions[1:]:
        if not args.boxes and os.path.isdir(folder) and read_truth(Path(folder, 'labels.csv'), Path(folder, 'boxes.csv')
                                                                   )[:2] != (volumes, truth):
            raise ValueError(f'{folder} and {args.predictions[0]} were tested on different volumes or lesions')
    distance = args.min_distance
    if distance is None and (beside / 'scores.json').exists() and not args.boxes:
        try:
            distance = float(json.loads((beside / 'scores.json').read_text())['min_distance'])
        except (ValueError, LookupError, TypeError):
            raise ValueError(f'{beside}/scores.json is damaged; give --min_distance') from None
    if args.draws < 1 or distance is not None and not 0 <= distance < math.inf:
        raise ValueError(f'--draws {args.draws} and --min_distance {distance}: expected at least 1, and 0 or more')
    out = make_folder(args.out)
    if any((out / name).exists() for name in ('predictions.csv', 'trained')):
        raise ValueError(f'--out {out} holds a run, whose scores.json would be lost; choose another')
    report({str(name): read_predictions(name) for name in args.predictions}, volumes, truth, classes,
           100.0 if distance is None else distance, args.draws, args.seed, out)


# ---- pictures -------------------------------------------------------------------------------------------------------

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')          # Okabe and Ito


def chart(curves, table, xlabel, most=5):
    """FROC curves {name: (false positives per image, sensitivity)} up to `most`; the key has the mean sensitivity."""
    width, height, left, top = 900, 640, 90, 40
    picture = Image.new('RGB', (left + width + 40, top + height + 90 + 36 * len(curves)), 'white')
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(24)

    def at(x, y):
        return left + width * x / most, top + height * (1 - y)

    for tick in range(most + 1):
        pen.line([at(tick, 0), at(tick, 1)], '#E5E5E5', 2)
        pen.text(at(tick, -0.015), str(tick), 'black', font, anchor='ma')
        pen.line([at(0, tick / 5), at(most, tick / 5)], '#E5E5E5', 2)
        pen.text(at(-0.05, tick / 5), f'{tick / 5:.1f}', 'black', font, anchor='rm')
    pen.rectangle([at(0, 1), at(most, 0)], outline='black', width=2)
    pen.text((10, 4), 'sensitivity', 'black', font)
    pen.text((left + width / 2, top + height + 46), xlabel, 'black', font, anchor='ma')
    for i, (name, (x, y)) in enumerate(curves.items()):
        grid = np.unique(np.append(np.minimum(x, most), [0, most]))
        pen.line([at(a, b) for a, b in zip(grid, np.interp(grid, x, y))], COLOURS[i % 7], 5, joint='curve')
        row = top + height + 100 + 36 * i
        pen.line([(left, row), (left + 50, row)], COLOURS[i % 7], 7)
        mean = cell(table[name]['mean of 1-4'])
        pen.text((left + 64, row), f'{name}, mean at 1-4: {mean}', 'black', font, anchor='lm')
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def boxed(image, findings=(), truth=(), side=900):
    """A slice, uint8 (H, W), as RGB with a longer side of `side` pixels: findings (x0, y0, x1, y1, score) in orange
    with the score, truth (x0, y0, x1, y1) in blue corners."""
    scale = side / max(image.shape)
    size = [max(1, round(scale * length)) for length in image.shape[::-1]]
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).convert('RGB')
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for box in truth:
        x0, y0, x1, y1 = (scale * edge for edge in box)
        for x, y, right, down in ((x0, y0, 1, 1), (x1, y0, -1, 1), (x0, y1, 1, -1), (x1, y1, -1, -1)):
            x, y = x - 5 * right, y - 5 * down              # a little outside, so that findings stay visible
            pen.line([(x, y + 9 * down), (x, y), (x + 9 * right, y)], '#56B4E9', 3)
    for *box, value in findings:
        x0, y0, x1, y1 = (scale * edge for edge in box)
        pen.rectangle([x0, y0, x1, y1], outline='#E69F00', width=2)
        above = y0 > 22
        pen.text((min(max(x0, 0), picture.width - 36), y0 - 3 if above else y1 + 3), f'{value:.2f}', '#E69F00', font,
                 anchor='lb' if above else 'la', stroke_width=1, stroke_fill='black')
    return picture


# ---- one run, and predictions for a file ----------------------------------------------------------------------------

def run(cfg, device, again=False):
    """Train, predict the test volumes, write them, score them. `again` may overwrite an earlier run."""
    out, rank = Path(cfg.out), dist.get_rank()
    begun = (out / ('trial_000' if cfg.search else 'log.jsonl')).exists()
    held = any((out / name).exists() for name in (
        'log.jsonl', 'trial_000', 'last.pt', 'lesions.csv', 'labels.csv', 'boxes.csv', 'predictions.csv',
        'scores.json'))
    if held and not again and not (begun and cfg.resume):
        why = 'a run; add --resume to go on with it, or' if begun else 'files that would be lost;'
        raise ValueError(f'{out} holds {why} choose another --out')
    build(cfg, out)                                         # says what is wrong with --encoder before hours of reading
    volumes, notes = load(cfg)
    test = [v for v in volumes if v.split == 'test']
    if len(set(gathered([fingerprint(volumes)]))) > 1:      # also: every rank has looked before anything is written
        raise ValueError('the ranks see different files; --root must be the same folder for all of them')
    if rank == 0:
        make_folder(out)
        writing = lock(out)                                 # held until the end
        if not cfg.resume:
            (out / 'last.pt').unlink(missing_ok=True)
        introduce(cfg, volumes, notes)
        if not (begun and cfg.resume):                      # which may be refused yet
            write_list(out / 'lesions.csv', volumes)
    dist.barrier()
    chosen, detector, best = searched(cfg, volumes, device, out) if cfg.search else (
        cfg, *train(cfg, volumes, device, out))
    if cfg.mimic:                                           # predicts nothing by itself
        if rank == 0:
            explain(best)
            found = {name: best[name] for name in ('epoch', 'cosine', 'constant', 'spread')}
            (out / 'scores.json').write_text(json.dumps(found, indent=1))
            print(f'-> {out}/last.pt for --fuse, scores.json')
        return dist.barrier()
    rows, unread = predicted(chosen, detector, test, device)
    if rank == 0:
        for note in unread:
            print(f'  {note}')
        if best['epoch'] >= 0:
            print(f"best epoch {best['epoch']}, validation mean sensitivity at 1-5 FP per image {best['score']:.3f}")
        write_truth(out, test)
        write_csv(out / 'predictions.csv', PREDICTION, [
            (*test[v].key, *(f'{value:.6g}' for value in (x, w, y, h)), int(z), int(depth), repr(value))
            for v, x, y, w, h, z, depth, value, _ in rows])
        found = {label(cfg, best['pretrained']): read_predictions(out)}
        report(found, *read_truth(out / 'labels.csv', out / 'boxes.csv'), cfg.min_distance, cfg.draws, cfg.seed, out,
               notes + unread)
        print(f'-> {out}/last.pt, predictions.csv, labels.csv, boxes.csv, lesions.csv')
    dist.barrier()


def make_folder(out):
    """--out, made if it is not there; OSError in one sentence if it cannot be."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OSError(f'--out {out} cannot be made ({problem.strerror}); choose another') from None
    return Path(out)


def pretrained(cfg):
    """Whether the encoder starts from a file, or from a run whose did"""
    begun = cfg.init_from or cfg.mimic
    if begun:
        return bool(restored(begun)[2].get('pretrained'))
    return not cfg.random_encoder and os.path.isfile(cfg.encoder)


def label(cfg, learnt):
    """Name of a detector in the tables; `learnt`: its encoder was pretrained."""
    encoder = 'pretrained' if learnt else 'random'
    head = 'fused ' * bool(cfg.fuse) + 'DINO-DETR ' * (cfg.head == 'detr')
    if head:                                                # 36 columns are all there is
        return f"{'' if cfg.epochs else 'untrained '}{head}on {encoder}"
    return f"{'trained' if cfg.epochs else 'untrained'} on {encoder} encoder"


def introduce(cfg, volumes, notes):
    """What is about to be learnt from what, and what was left out."""
    begun = cfg.init_from or cfg.mimic
    if not begun and not os.path.isfile(cfg.encoder):
        print(f'{cfg.encoder} is absent: random encoder. `torchrun pretrain.py` makes one, --encoder names another.')
    encoder = begun or (cfg.encoder if pretrained(cfg) else 'random weights')
    encoder += ', frozen' if cfg.freeze else ', finetuned'
    encoder += f'; mimics {cfg.mimic}' if cfg.mimic else f'; beside it {cfg.fuse}' if cfg.fuse else ''
    print(f'\n{cfg.dataset}; encoder {encoder}; {cfg.size}x{cfg.size}, {cfg.channels} channels, {cfg.epochs} epochs')
    for split in ('train', 'val', 'test'):
        part = [v for v in volumes if v.split == split]
        print(f'  {split:5s} {len(part)} images or volumes of {len({v.patient for v in part})} patients, '
              f'{sum(bool(v.lesions) for v in part)} with {sum(len(v.lesions) for v in part)} lesions')
    if not normals([v for v in volumes if v.split == 'train']):
        print('  no normal slice or image to train on: everything outside the boxes is the background')
    for note in notes:
        print(f'  {note}')


def searched(cfg, volumes, device, out):
    """--search N: random trials over the ranges of 6.2.3, each trained like any run in OUT/trial_NNN; the best on
    validation is taken, one that diverged never. The paper's ratio of sampled negatives has no counterpart: all anchors
    count here."""
    trials, winner = [], None
    for i in range(cfg.search):
        trial, place = drawn(cfg, i), out / f'trial_{i:03d}'
        place.mkdir(exist_ok=True)
        try:
            detector, best = train(trial, volumes, device, place)
        except FloatingPointError:                          # the same on every rank
            detector, best = None, dict(score=-1.0, epoch=-1)
        tried = {name: getattr(trial, name) for name in RANGES}
        trials.append(tried | dict(validation=best['score'], epoch=best['epoch']))
        if best['score'] > (winner[2]['score'] if winner else -1):
            winner = trial, detector, best
            if dist.get_rank() == 0:
                save(out / 'last.pt', vit.read(place / 'last.pt'))
        if dist.get_rank() == 0:
            write_csv(out / 'trials.csv', trials[0], [tried.values() for tried in trials])
    if not winner:
        raise ValueError(f'none of {cfg.search} trials could be trained')
    if dist.get_rank() == 0:
        best = {k: f'{v:.3g}' for k, v in max(trials, key=lambda trial: trial['validation']).items()}
        print(f"best of {cfg.search} trials: {', '.join(f'{k} {v}' for k, v in best.items())}")
    return winner


RANGES = dict(lr=(1e-5, 1e-2, True), wd=(1e-6, 1e-3, True), ratio=(0.1, 10, True), smoothing=(0.0, 0.1, False),
              alpha=(0.25, 0.95, False), gamma=(0.5, 2.0, False), high=(0.4, 0.6, False), low=(0.2, 0.5, False),
              nms=(0.03, 0.3, False))                       # from, to (6.2.3), whether even on a log scale (ours)
DROPOUTS = (0.0, 0.05, 0.1, 0.15)


def drawn(cfg, trial):
    """The configuration of one trial, a function of seed and number; `low` is at most `high`."""
    rng, values = np.random.default_rng([cfg.seed, trial]), {}
    for name, (low, high, log) in RANGES.items():
        at = rng.uniform(math.log(low), math.log(high)) if log else rng.uniform(low, high)
        values[name] = float(math.exp(at) if log else at)
    values |= dict(dropout=float(rng.choice(DROPOUTS)), low=min(values['low'], values['high']))
    return replace(cfg, **values)


def predict(argv, device):
    """Findings in one file: findings.json, and a picture of each."""
    parser = argparse.ArgumentParser(prog='detect.py predict')
    parser.add_argument('file', metavar='FILE', help='a mammogram or a DBT volume')
    parser.add_argument('--checkpoint', required=True, metavar='RUN', help='folder that detect.py wrote')
    parser.add_argument('--threshold', type=float, help='least score; by default that of one false positive per image '
                                                        'on the validation slices')
    parser.add_argument('--laterality', default='', choices=('', 'L', 'R'), help='BCS-DBT: the side, since volumes may '
                                                                                 'be stored upside down')
    parser.add_argument('--out', default='runs/predict', help='folder to write (default: %(default)s)')
    args = parser.parse_args(argv)
    cfg, detector, best = restored(args.checkpoint)
    if cfg.paired:
        why = 'finds nothing, it mimics' if cfg.mimic else 'needs both images of a pair'
        raise ValueError(f'{args.checkpoint} {why}; give the run of a detector of one image')
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f'--threshold {args.threshold} must lie in 0 … 1')
    if not os.path.isfile(args.file):
        raise ValueError(f'{args.file}: no such file')
    threshold = best['threshold'] if args.threshold is None else args.threshold
    volume = Volume((Path(args.file).name,) * 3, args.file, laterality=args.laterality, shape=images.shape(args.file))
    rows, notes = predicted(cfg, detector.to(device), [volume], device)
    if notes and not rows:
        raise ValueError(notes[0])
    for note in notes:
        print(note)
    out, found = make_folder(args.out), []
    for old in out.glob('finding_[0-9][0-9].png'):          # of another file
        old.unlink()
    first = images.read(args.file, 0)
    turned, (H, W) = upright(first, args.laterality) is not first, first.shape
    for i, (_, x, y, w, h, z, depth, value, at) in enumerate(row for row in rows if row[-2] >= threshold):
        x, y = (W - x - w, H - y - h) if turned else (x, y)                             # as the file has it
        found.append(dict(x0=round(x, 1), y0=round(y, 1), x1=round(x + w, 1), y1=round(y + h, 1), frame=int(at),
                          first_frame=int(z), last_frame=int(z + depth - 1), score=round(value, 4)))
        boxed(images.read(args.file, int(at)), [(x, y, x + w, y + h, value)]).save(out / f'finding_{i:02d}.png')
        print(f'{args.file}: x {x:.0f}-{x + w:.0f}, y {y:.0f}-{y + h:.0f}, frames {z:.0f}-{z + depth - 1:.0f}, '
              f'score {value:.3f}')
    told = dict(file=args.file, threshold=threshold, findings=found, notes=notes)
    (out / 'findings.json').write_text(json.dumps(told, indent=1))
    print(f"{len(found)} findings of score {threshold:.3f} or more -> {out}/findings.json"
          + (', finding_*.png' if found else ''))


def config_of(values):
    """The configuration in a file; lists become tuples again, names of no field are left out. TypeError where a value
    is of another type than its field's annotation, which lists what may stand there."""
    kinds = {f.name: str(f.type).replace('float', 'float int') for f in fields(Config)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in kinds}
    wrong = [k for k, v in values.items() if v is not None and type(v).__name__ not in kinds[k]]
    if wrong:
        raise TypeError(f"values of another type: {', '.join(wrong)}")
    return Config(**values)


def restored(run):
    """-> configuration, detector with its best weights, and `best` of a run, as `train` gives it."""
    path = Path(run) / 'last.pt' if os.path.isdir(run) else Path(run)
    if not path.exists():
        raise ValueError(f'{path}: no such file; --checkpoint takes a folder that detect.py wrote')
    encoder = vit.load(path)
    state = vit.read(path)
    try:
        cfg = config_of(state['config'])
        check(cfg, 1)
        detector = assembled(cfg, encoder, unpacked(state.get('other')))
        if not isinstance(state['best'], dict):
            raise TypeError('something else')
        detector.load_learnt(state['best']['weights'])
        best = dict(state['best'], threshold=float(state['best']['threshold']))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        raise ValueError(f'{path} holds no detector ({type(problem).__name__}); give a run of detect.py') from problem
    return replace(cfg, workers=0, images=None, resume=False), detector.eval(), best


# ---- the demo, no part of the method --------------------------------------------------------------------------------

DEMO = dict(out='runs/detect-demo', size=252, channels=64, epochs=7, batch=16, micro_batch=16, lr=2e-3, workers=0,
            min_distance=10.0, dropout=0.05)                # 100 pixels of 2457 are 10 of a phantom's 256
DETR_DEMO = DEMO | dict(out='runs/detr-demo', queries=50, layers=(1, 3), denoising=20, lr=1e-3)         # --head detr


def demo(cfg, device):
    """Lesions in synthetic volumes that no training has seen: an untrained detector and a trained one."""
    folder, again = Path(cfg.out) / 'phantoms', cfg.out in (DEMO['out'], DETR_DEMO['out'])
    untrained = replace(cfg, root=str(folder), out=f'{cfg.out}/untrained', epochs=0, search=0, resume=False)
    trained = replace(cfg, root=str(folder), out=f'{cfg.out}/trained')
    if not again and not (cfg.resume and folder.exists()) and os.path.isdir(cfg.out) and os.listdir(cfg.out):
        raise ValueError(f'{cfg.out} is not empty; choose another --out, or give a data set with --root DIR')
    dist.barrier()                                          # every rank has looked before anything is written
    if dist.get_rank() == 0:
        print('SMOKE RUN ON PHANTOMS: every part of the method on synthetic breasts, no clinical meaning. '
              'Give a data set with --root DIR.', flush=True)
        make_phantoms(cfg, folder)
    dist.barrier()
    for each in (untrained, trained):
        run(each, device, again or cfg.resume)
    if dist.get_rank() == 0:
        out, found = Path(cfg.out), {name: read_predictions(f'{cfg.out}/{name}') for name in ('untrained', 'trained')}
        volumes, truth, classes = read_truth(out / 'trained/labels.csv', out / 'trained/boxes.csv')
        print('\n---- side by side')
        report(found, volumes, truth, classes, cfg.min_distance, cfg.draws, cfg.seed, out)
        overlay(folder, found, truth).save(out / 'overlay.png')
        print(f'-> {out}/overlay.png')
    dist.barrier()


def make_phantoms(cfg, folder, slices=8):
    """Volumes with and without a lesion, prepared like any data set, and lesions.csv."""
    make_folder(folder)
    rows = []
    for i in range(cfg.phantoms):
        split = 'train' if i < 0.65 * cfg.phantoms else 'val' if i < 0.75 * cfg.phantoms else 'test'
        rng = np.random.default_rng([cfg.seed, i, 0, 5])    # pretrain.py and finetune.py draw 1 to 4
        example = breast(rng, slices, lesion=i % 3 > 0)
        np.save(folder / f'{i:04d}.npy', np.stack([images.clahe(images.to_uint8(image)) for image in example.volume]))
        rows += [(f'{i:04d}.npy', f'{i:04d}', split, int(z), *box, 'cancer') for z, *box in example.boxes] \
            or [(f'{i:04d}.npy', f'{i:04d}', split, '', '', '', '', '', '')]
    write_csv(folder / 'lesions.csv', ('path', 'patient', 'split', 'frame', 'x0', 'y0', 'x1', 'y1', 'label'), rows)


def overlay(folder, runs, truth, columns=5):
    """Slices with a lesion, the truth in blue corners, and in orange the best three findings that reach the slice; a
    row of pictures for each run."""
    shown = []
    for rows in runs.values():
        line = []
        for (key, *_, z) in truth[:columns]:
            slice_truth = [(x, y, x + w, y + h) for k, x, y, w, h, s in truth if k == key and s == z]
            reach = [row for row in rows if row[0] == key and row[5] <= z < row[5] + row[6]]
            here = sorted(reach, key=lambda row: -row[-1])
            best = [(x, y, x + w, y + h, score) for _, x, y, w, h, _, _, score in here[:3]]
            picture = boxed(images.read(folder / key[1], int(z)), best, slice_truth, side=300)
            line += [np.asarray(picture), np.full((300, 4, 3), 255, np.uint8)]
        shown.append(np.hstack(line[:-1]))
    canvas = Image.new('RGB', (shown[0].shape[1], len(shown) * 324), 'white')
    for i, (name, picture) in enumerate(zip(runs, shown)):
        ImageDraw.Draw(canvas).text((6, 324 * i + 3), f'{name}: its best three findings in orange, the lesion in blue '
                                    'corners', 'black', ImageFont.load_default(15))
        canvas.paste(Image.fromarray(picture), (0, 324 * i + 24))
    return canvas


def main(argv):
    """score, predict, a run, or without --root the demo."""
    if argv[:1] == ['score']:
        return score(argv[1:])
    _, ranks, device = setup()
    if argv[:1] == ['predict']:
        predict(argv[1:], device)
    else:
        cfg = parse(Config, argv, DEMO, source='root')
        if cfg.head == 'detr':
            cfg = parse(Config, argv, DETR_DEMO, source='root')
        check(cfg, ranks)
        run(cfg, device) if cfg.root is not None else demo(cfg, device)
    dist.destroy_process_group()


if __name__ == '__main__':
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # at once, without waiting for data workers
    wrong = None
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as problem:            # of a data worker the last line
        wrong = str(problem).strip().splitlines()[-1].removeprefix('ValueError: ')
    except RuntimeError as problem:
        if 'DataLoader worker' not in str(problem):
            raise
        wrong = 'a data worker died, probably out of memory; lower --workers, then --resume'
    if wrong:
        print(f'detect.py: {wrong}', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(wrong))                                   # an interpreter that winds down gloo's threads may abort
