"""Trains a head on labels, with or without the encoder below it, and tests it beside the same head on random
weights: cancer, lesion, BI-RADS, density, risk (MammoDINO 3.3; DBT-DINO, arXiv 2512.13608, 2.4, 2.5, 6.2).

    $ python finetune.py                                        # on phantoms, no data needed
    $ python finetune.py --root exams.csv --task cancer --encoder runs/mammodino/last.pt
    $ torchrun --nproc-per-node 8 finetune.py --dataset rsna --root DIR --head mlp --encoder FILE
    $ python finetune.py test --checkpoint RUN --dataset vindr --root DIR --out OUT      # another data set
    $ python finetune.py predict RCC=a.dcm LCC=b.dcm RMLO=c.dcm LMLO=d.dcm --checkpoint RUN

A unit gets one prediction: an image, a breast (CC, MLO) or an exam (four views). A view is a projection here,
not a crop: an image or a DBT volume, encoded slice by slice. Means and deviations of its tokens are its
features; those of all views of a unit, side by side, enter the head. `--head mlp` trains the encoder too, as
MammoDINO does; the other heads read frozen features, as DBT-DINO does. OUT receives predictions.csv,
run.json, last.pt, and the tables and pictures that score.py makes of them.

B units, V views each, K slices of a view, S x S pixels, N patches, D width, F features, C classes, T years.
A slot is the place of a view in its unit.
"""
import argparse
import hashlib
import math
import os
import sys
from collections import defaultdict
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import datasets
import images
import metrics
import phantom
import score
import vit
from run import (computes_in_bf16, cosine, gathered, lock, on_rank_0, option, parse, save, script,
                 setup)


# ---- configuration --------------------------------------------------------------------------------

SLOTS = dict(image=('image',), breast=('CC', 'MLO'),
             exam=('RCC', 'LCC', 'RMLO', 'LMLO'))           # in DBT-DINO's order
POOLS = dict(cls_mean=[0], cls_mean_std=[0, 1],             # which of the moments of `encode`
             patch_mean=[2], patch_mean_std=[2, 3])


@dataclass
class Config:
    """Every field is a flag; a None follows from data set, task and head. Sources: [paper] MammoDINO;
    [dbt-dino] arXiv 2512.13608; [ours] a choice of this repository."""
    dataset: str = option('csv', 'paper 3.3',
                          'rsna, vindr, cbis (or ddsm), cmmd, cesm, mias or csv', group='data')
    root: str | None = option(None, 'ours', 'data set as published, or your CSV; none: a demo')
    images: str | None = option(None, 'ours', 'where prepare.py put the images of --root')
    task: str = option('cancer', 'paper 3.3', 'cancer, lesion, lesion_type, birads, density, risk')
    cancer_rule: str | None = option(None, 'ours', 'vindr: birads5 or birads45; cmmd: unlisted')
    classes: tuple[str, ...] = option((), 'ours', 'csv: the labels in order, the negative first')
    level: str | None = option(None, 'ours', 'image, breast, exam; as the data set labels the task')
    voi: bool = option(False, 'ours', 'apply the VOI LUT or window of DICOM files; DBT-DINO: yes')
    clahe: bool = option(True, 'paper 3.1', 'CLAHE of files other than .npy; DBT-DINO: no')

    encoder: str | None = option(None, 'ours', 'last.pt or the official DINOv2 file', group='model')
    imagenet: bool = option(True, 'ours', 'input of --encoder is normalised; DBT-DINO: no')
    random_encoder: bool = option(False, 'ours', 'no --encoder: random weights alone')
    dinov2: str | None = option(None, 'paper 3.3', 'the official DINOv2 file, for a row of its own')
    head: str = option('linear', 'ours', 'mlp (MammoDINO), linear, hazard (DBT-DINO) or knn')
    pool: str | None = option(None, 'dbt-dino 3.1', ', '.join(POOLS))
    freeze: bool | None = option(None, 'dbt-dino 6.2', 'train the head alone; mlp: no')

    out: str = option('runs/finetune', 'ours', 'folder of this run', group='the run')
    cache: str = option('runs/features', 'dbt-dino 6.2.1', 'frozen features, by unit and weights')
    seed: int = option(0, 'ours', 'split, head, order, bootstrap')
    workers: int = option(min(4, os.cpu_count() or 1), 'ours', 'data processes per rank')
    amp: bool | None = option(None, 'dbt-dino 6.2.1', 'bf16 of the encoder; by default on GPUs')

    epochs: int | None = option(None, 'dbt-dino 6.2', '75, hazard 100, mlp 30', group='training')
    batch: int = option(64, 'dbt-dino 6.2', 'units per step, over all ranks')
    micro_batch: int = option(8, 'ours', 'finetuning: units a rank holds at once')
    lr: float | None = option(None, 'ours', 'peak: 1e-3, hazard 3e-4, finetuning 1e-4')
    search: int = option(0, 'dbt-dino 6.2.1', 'learning rates to try on validation; DBT-DINO: 24')
    wd: float = option(1e-4, 'dbt-dino 6.2', 'weight decay')
    layer_decay: float = option(0.75, 'ours', 'finetuning: rate factor per block below the top')
    fraction: tuple[float, ...] = option((1.0,), 'dbt-dino 3.2', 'shares of the training patients')

    subgroup: str | None = option(None, 'dbt-dino 3.3', 'a table by this column, such as age',
                                  group='scores')
    draws: int = option(1000, 'dbt-dino 2.5', 'bootstrap draws of patients')

    phantoms: int = option(700, 'ours', 'breasts: 45 % train, 15 % choose, 40 % test', group='demo')


RECIPES = dict(                 # by head; `search`: the range that --search draws from
    mlp=dict(pool='cls_mean', freeze=False, epochs=30, lr=1e-3, search=(1e-5, 1e-2)),
    linear=dict(pool='patch_mean_std', freeze=True, epochs=75, lr=1e-3, search=(1e-5, 1e-2)),
    hazard=dict(pool='patch_mean_std', freeze=True, epochs=100, lr=3e-4, search=(1e-5, 1e-3)),
    knn=dict(pool='cls_mean', freeze=True, epochs=0, lr=0.0))
FINETUNING_LR = 1e-4            # of encoder and head together; the rates above are those of a head alone
FINETUNING_SLICES = 4           # at most so many of a volume; frozen encoders read all (DBT-DINO 6.2)
NEIGHBOURS = 10                 # k of the knn head
CHUNK = 75                      # images through the encoder at once (DBT-DINO 6.2.1)
SMALL = dict(**vit.SIZES['demo'], size=84)              # the encoder of pretrain.py's demo


def resolved(cfg, ranks=1):
    """The configuration with its Nones filled in. ValueError for flags that do not fit together."""
    choices = dict(dataset=datasets.DATASETS, task=datasets.TASKS, head=RECIPES,
                   pool=(None, *POOLS), level=(None, *SLOTS))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            expected = ', '.join(filter(None, allowed))
            raise ValueError(f'--{name} {getattr(cfg, name)}: expected {expected}')
    if (cfg.head == 'hazard') != (cfg.task == 'risk'):
        raise ValueError(f'--head {cfg.head} --task {cfg.task}: risk takes the hazard head alone')
    if not (cfg.encoder or cfg.random_encoder):
        raise ValueError('--encoder FILE is missing; give one, or --random_encoder')
    counts = cfg.batch, cfg.micro_batch, 1 if cfg.epochs is None else cfg.epochs
    if min(*counts, *cfg.fraction) <= 0 or max(cfg.fraction) > 1:
        raise ValueError('--batch, --micro_batch and --epochs start at 1; a --fraction is above 0 '
                         'and at most 1')
    recipe = RECIPES[cfg.head]
    freeze = recipe['freeze'] if cfg.freeze is None else cfg.freeze
    if not freeze and (cfg.search or cfg.head == 'knn' or cfg.batch % ranks):
        raise ValueError('finetuning takes neither --search nor --head knn, and a --batch that is '
                         f'a multiple of {ranks} ranks')
    # Where labels are given by breast or exam, LEVELS says so. DBT-DINO took its own density by exam.
    level = datasets.LEVELS.get((cfg.dataset, cfg.task), datasets.LEVELS.get(cfg.dataset, 'image'))
    lr = recipe['lr'] if freeze else FINETUNING_LR
    return replace(cfg, freeze=freeze, level=cfg.level or level, pool=cfg.pool or recipe['pool'],
                   epochs=recipe['epochs'] if cfg.epochs is None else cfg.epochs,
                   lr=lr if cfg.lr is None else cfg.lr, fraction=tuple(sorted(set(cfg.fraction))))


# ---- heads ----------------------------------------------------------------------------------------

def cumulative(x, W, b):
    """H_t = sum over k <= t of softplus(W_k x + b_k) (B, T), which never falls: x (B, F), W (T, F), b (T,).
    The running sum is DBT-DINO's product with an upper triangular matrix (6.2.2); softplus keeps each year's
    hazard above 0."""
    x, W, b = map(torch.as_tensor, (x, W, b))
    return nn.functional.softplus(nn.functional.linear(x, W, b)).cumsum(-1)


def risk(H):
    """p_t = 1 - exp(-H_t): the risk of cancer within t years (B, T) (DBT-DINO 6.2.2; Yala 2021)."""
    return -torch.expm1(-H)


def hazard(x, W, b):
    """The risk (B, T) of features x, from the weights of a head."""
    return risk(cumulative(x, W, b))


def exam_losses(H, y, mask):
    """Cross-entropy of p = 1 - exp(-H), mean over the observed years of each exam (B,):

        (1 - y) H - y log(1 - exp(-H))

    In log space log(1 - p) = -H exactly, so nothing saturates. H (B, T) cumulative hazards above 0; y (B, T)
    1 if there is cancer by then; mask (B, T) 1 where observed. 0 for an exam without an observed year."""
    H, y, mask = (torch.as_tensor(a).double() for a in (H, y, mask))
    each = (1 - y) * H - y * torch.log(risk(H.clamp_min(1e-30)))                        # (B, T)
    return (each * mask).sum(-1) / mask.sum(-1).clamp_min(1)


def hazard_loss(H, y, mask, weight=None):
    """The mean of `exam_losses` by `weight` (B,), by default 1, over the exams with an observed year."""
    observed = torch.as_tensor(mask).sum(-1) > 0
    weight = observed.double() * (1 if weight is None else torch.as_tensor(weight))
    return (exam_losses(H, y, mask) * weight).sum() / weight.sum().clamp_min(1e-30)


class Head(nn.Module):
    """Features (B, F) -> logits (B, C), or cumulative hazards (B, T), in fp32.

    linear: one layer (DBT-DINO 6.2.1); mlp: three layers (MammoDINO 3.3, which gives no widths); hazard: one
    layer of yearly hazards, summed up."""

    def __init__(self, kind, width, outputs, hidden=512):
        super().__init__()
        self.kind = kind
        self.register_buffer('shift', torch.zeros(width))
        self.register_buffer('scale', torch.ones(width))
        widths = (width, hidden, hidden, outputs) if kind == 'mlp' else (width, outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def standardize(self, x):
        """Takes mean and deviation from training features (B, F). A feature that does not vary becomes 0."""
        deviation = x.std(0)
        self.shift.copy_(x.mean(0))
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0))

    def forward(self, x):
        """(B, F) -> (B, C or T)"""
        with torch.autocast(x.device.type, enabled=False):
            x = (x.float() - self.shift) * self.scale
            for layer in self.layers[:-1]:
                x = nn.functional.gelu(layer(x))
            last = self.layers[-1]
            return cumulative(x, last.weight, last.bias) if self.kind == 'hazard' else last(x)


class Neighbours(nn.Module):
    """Features (B, F) -> log of each class's share (B, C) in the vote of the nearest training units by cosine
    (DINO). Built from features (M, F) and classes (M,) of M training units."""

    def __init__(self, x, y, classes):
        super().__init__()
        self.register_buffer('bank', nn.functional.normalize(x.float(), dim=-1))
        self.register_buffer('labels', y)
        self.classes = classes

    def forward(self, x):
        similarity = nn.functional.normalize(x.float(), dim=-1) @ self.bank.T           # (B, M)
        votes = metrics.knn(similarity.cpu().numpy(), self.labels.cpu().numpy(), NEIGHBOURS)
        absent = self.classes - votes.shape[1]              # the last classes may have no training unit
        votes = np.pad(votes, ((0, 0), (0, absent)))                                    # (B, C)
        return torch.from_numpy(votes).clamp_min(1e-12).log()


def class_weights(cfg, y):
    """Weights of the units (B,), 1 on average, with which every class counts the same over the set; in risk,
    exams with and without cancer. DBT-DINO balances by a sampler, and its validation set (6.2.2)."""
    kind = y.amax(1) if cfg.task == 'risk' else y
    count = torch.bincount(kind)
    return (len(kind) / (count > 0).sum() / count)[kind]


def unit_losses(cfg, outputs, y):
    """The loss of each unit (B,): outputs (B, C or T), y (B,) or (B, T)."""
    if cfg.task == 'risk':
        return exam_losses(outputs, y > 0, y >= 0)
    return nn.functional.cross_entropy(outputs.float(), y, reduction='none')


# ---- rows -> units --------------------------------------------------------------------------------

@dataclass
class Unit:
    """What gets one prediction: an image, a breast or an exam."""
    name: str
    patient: str
    split: str
    label: int | np.ndarray     # class; risk: (T,), 1 cancer by then, 0 none, -1 not observed
    group: str                  # value of the column --subgroup, or blank
    views: list                 # (slot, Row); a slot may have several


def load_units(cfg):
    """The data set -> units, classes, notes on what was left out."""
    tasks = datasets.CLASSES[cfg.dataset]
    listed, notes = [], []
    if cfg.task in tasks:
        listed, notes = datasets.load(cfg.dataset, cfg.root, cfg.images, cfg.seed, cfg.cancer_rule)
    rows = [row for row in listed if cfg.task in row.labels]
    if not rows:
        reason = f'{cfg.dataset} has no {cfg.task} label; it takes one of {", ".join(tasks)}'
        if cfg.dataset == 'csv':
            reason = f'{cfg.root} has no column {cfg.task}, nor one named label'
        raise ValueError(datasets.REFUSED.get((cfg.dataset, cfg.task), reason))
    if cfg.dataset == 'csv' and cfg.task == 'density' and set(cfg.classes) <= set('abcd'):
        for row in rows:
            row.labels['density'] = row.labels['density'].lower()
    classes = list(cfg.classes or tasks[cfg.task] or sorted({row.labels[cfg.task] for row in rows}))
    for row in rows:
        label = row.labels[cfg.task]
        if cfg.task != 'risk' and label not in classes:
            raise ValueError(f'{row.path}: {cfg.task} {label!r} is none of {", ".join(classes)}; '
                             'correct it, or name the labels with --classes')
    units = units_of(cfg, rows, classes)
    unused = len(listed) - sum(len(unit.views) for unit in units)
    incomplete = sum(len(dict(unit.views)) < len(SLOTS[cfg.level]) for unit in units)
    if unused:
        notes.append(f'{unused} of {len(listed)} images take no part: no {cfg.task} label, no view '
                     f'of {", ".join(SLOTS[cfg.level])}, or lesions of several types')
    if incomplete:
        notes.append(f'{incomplete} {cfg.level}s lack a view; the mean of their others stands in')
    return units, classes, notes


def units_of(cfg, rows, classes):
    """Rows -> units. A breast or exam has the highest label of its images; it takes no part where its images
    hold lesions of different types."""
    slots, views_of, units = SLOTS[cfg.level], defaultdict(list), []
    for row in rows:
        if cfg.level != 'image' and not (row.view and row.laterality):
            raise ValueError(f'{row.path}: --level {cfg.level} needs laterality and view')
        frame = '' if row.frame is None else f'#{row.frame}'
        exam = f'{row.patient}/{row.exam}'.rstrip('/')
        name, view = dict(image=(row.name + frame, 'image'),
                          breast=(f'{exam}/{row.laterality}', row.view),
                          exam=(exam, row.laterality + row.view))[cfg.level]
        if view in slots:
            views_of[name].append((slots.index(view), row))
    for name, views in views_of.items():
        labels = [row.labels[cfg.task] for _, row in views]
        if cfg.task != 'risk':
            labels = [classes.index(label) for label in labels]
        if cfg.task != 'lesion_type' or len(set(labels)) == 1:
            first = views[0][1]
            units.append(Unit(name, first.patient, first.split, max(labels, key=np.max),
                              subgroup_of(cfg, first), views))
    return units


def subgroup_of(cfg, row):
    """The value of the column --subgroup; ages become the four groups of DBT-DINO's Table 5."""
    if not cfg.subgroup:
        return ''
    if cfg.subgroup not in row.record:
        raise ValueError(f'--subgroup {cfg.subgroup}: no such column in {", ".join(row.record)}')
    value = row.record[cfg.subgroup]
    age = value.rstrip('Y')                                 # '57' or DICOM's '057Y'
    if cfg.subgroup.lower() == 'age' and age.isdigit():
        return ('<50', '50-60', '60-70', '70+')[np.searchsorted((50, 60, 70), int(age), 'right')]
    return value or 'blank'


def labels_of(units):
    """Classes (B,); risk: years (B, T)"""
    return torch.tensor(np.stack([unit.label for unit in units]))


def require_classes(parts, notes):
    """ValueError for a split without two classes; `notes` may say why."""
    for split, units in parts.items():
        if len({int(np.max(unit.label)) for unit in units}) < 2:
            raise ValueError('; '.join([f'the {split} split holds fewer than two classes: give it '
                                        'patients of each class', *notes]))


# ---- units -> features ----------------------------------------------------------------------------

class Views(Dataset):
    """(unit, mirrored or not) -> its views that can be read, [(slot, uint8 (K, S, S))]"""

    def __init__(self, cfg, size):
        self.cfg, self.size = cfg, size

    def __getitem__(self, item):
        unit, mirrored = item
        views = []
        for slot, row in unit.views:
            try:
                stack = np.stack([self.squashed(row.path, k) for k in self.slices(row)])
                views.append((slot, stack[..., ::-1] if mirrored else stack))
            except (ValueError, OSError) as problem:
                tqdm.write(f'skipped: {problem}', file=sys.stderr)
        return views

    def slices(self, row):
        """Those of a volume: all, or the middles of FINETUNING_SLICES equal parts."""
        if row.frame is not None:
            return [row.frame]
        K = images.frames(row.path)
        taken = K if self.cfg.freeze else min(K, FINETUNING_SLICES)
        return [int((k + 0.5) * K / taken) for k in range(taken)]

    def squashed(self, path, frame):
        """One slice as the encoder's square (DBT-DINO 6.2.1)."""
        image = images.read_equalised(path, frame, self.cfg.voi, self.cfg.clahe)
        return np.asarray(Image.fromarray(image).resize((self.size,) * 2, Image.Resampling.BICUBIC))


def loader(cfg, encoder, batches):
    return DataLoader(Views(cfg, encoder.config['size']), batch_sampler=batches, collate_fn=list,
                      num_workers=cfg.workers, timeout=1800 if cfg.workers else 0)


def encode(encoder, stacks, of_patches=True):
    """Views, uint8 (K, S, S) each -> moments (views, 4, D): mean and deviation of CLS, then of the patches,
    over all slices (DBT-DINO 6.2.1), unbiased (ours). Without `of_patches` those of CLS alone, (views, 2, D).

    Sums add up in fp64, CHUNK slices at a time, so that the tokens of a volume are never held together."""
    device, kinds = encoder.pos_embed.device, 2 if of_patches else 1
    K = torch.tensor([len(stack) for stack in stacks], device=device)                   # (views,)
    view_of = torch.arange(len(stacks), device=device).repeat_interleave(K)             # (slices,)
    pictures = torch.from_numpy(np.concatenate(stacks))                                 # (slices, S, S)
    shape = len(stacks), 2 * kinds, encoder.config['width']
    sums = torch.zeros(shape, dtype=torch.float64, device=device)                       # (views, 4, D)
    for chunk, views in zip(pictures.split(CHUNK), view_of.split(CHUNK)):
        cls, patches = encoder(chunk.to(device).unsqueeze(1).float() / 255)
        powers = []
        for tokens in (cls.unsqueeze(1), patches)[:kinds]:                              # (chunk, 1 or N, D)
            tokens = tokens.double()
            powers += [tokens.sum(1), tokens.square().sum(1)]
        sums = sums.index_add(0, views, torch.stack(powers, dim=1))
    per_slice = torch.tensor([1, patches.shape[1]][:kinds], device=device)
    count = (K[:, None] * per_slice).double().unsqueeze(-1)                             # (views, 2, 1)
    mean = sums[:, 0::2] / count
    variance = (sums[:, 1::2] - count * mean.square()) / (count - 1).clamp_min(1)
    deviation = variance.clamp_min(1e-12).sqrt()            # the slope of sqrt has no bound near 0
    return torch.stack([mean, deviation], dim=2).flatten(1, 2).float()                  # (views, 4, D)


def side_by_side(cfg, encoder, batch):
    """B units as lists of (slot, uint8 (K, S, S)) -> moments (B, V, 4, D). Files of one slot are averaged; an
    empty slot has the mean of the others."""
    B, V = len(batch), len(SLOTS[cfg.level])
    stacks = [stack for views in batch for _, stack in views]
    moments = encode(encoder, stacks, of_patches=cfg.freeze or 'patch' in cfg.pool)
    cell = [b * V + slot for b, views in enumerate(batch) for slot, _ in views]
    cell = torch.tensor(cell, device=moments.device)                                    # (views,)
    files = torch.bincount(cell, minlength=B * V).view(B * V, 1, 1)
    mean = moments.new_zeros(B * V, *moments.shape[1:]).index_add(0, cell, moments)
    mean = (mean / files.clamp_min(1)).unflatten(0, (B, V))                             # (B, V, 4, D)
    filled = (files > 0).unflatten(0, (B, V))                                           # (B, V, 1, 1)
    others = mean.sum(1, keepdim=True) / filled.sum(1, keepdim=True).clamp_min(1)
    return torch.where(filled, mean, others)


def pooled(cfg, moments):
    """(B, V, 4, D) -> features (B, F), those moments that --pool asks for"""
    return moments[:, :, POOLS[cfg.pool]].flatten(1)


def cache_paths(cfg, encoder, units, bf16):
    """Where the moments of each unit are kept: in a folder named by weights and input of the encoder, under a
    name from paths and times of the files."""
    digest = hashlib.sha256(repr((encoder.config, cfg.level, cfg.voi, cfg.clahe, bf16)).encode())
    for weight in encoder.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    folder, paths = Path(cfg.cache, digest.hexdigest()[:16]), []
    folder.mkdir(parents=True, exist_ok=True)
    for unit in units:
        files = [(slot, os.path.abspath(row.path), os.stat(row.path).st_mtime_ns, row.frame)
                 for slot, row in unit.views]
        paths.append(folder / f'{hashlib.sha256(repr(files).encode()).hexdigest()[:24]}.npy')
    return paths


@torch.no_grad()
def features(cfg, encoder, units, device):
    """Units -> those with a file that can be read, their features (B, F). Each rank computes a share, and all
    ranks get all. The moments of a frozen encoder are kept in --cache, for every --pool."""
    rank, ranks, bf16 = dist.get_rank(), dist.get_world_size(), computes_in_bf16(device, cfg.amp)
    paths = cache_paths(cfg, encoder, units, bf16) if cfg.freeze and cfg.cache else None
    mine = range(rank, len(units), ranks)
    moments = {u: np.load(paths[u]) for u in mine if paths and paths[u].exists()}
    todo = [u for u in mine if u not in moments]
    count = 8 // len(SLOTS[cfg.level])                      # units at once: eight files
    batches = [todo[k:k + count] for k in range(0, len(todo), count)]
    stream = loader(cfg, encoder, [[(units[u], False) for u in numbers] for numbers in batches])
    bar = tqdm(stream, desc='encoding', unit='batch', leave=False, delay=2,
               disable=rank > 0 or None)                    # None: shown only on a terminal
    for numbers, batch in zip(batches, bar):
        if not any(batch):
            continue
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            computed = side_by_side(cfg, encoder, batch).cpu().numpy()
        for u, views, values in zip(numbers, batch, computed):
            if views:
                moments[u] = values
            if paths and len(views) == len(units[u].views):
                part = paths[u].with_suffix(f'.{os.getpid()}.npy')      # a file is there whole or not at all
                np.save(part, values)
                os.replace(part, paths[u])
    moments = dict(sorted(gathered(list(moments.items()))))
    if not moments:
        raise ValueError('no file can be read; the reasons stand above')
    x = pooled(cfg, torch.from_numpy(np.stack(list(moments.values()))))                 # (B, F)
    return [units[u] for u in moments], x


# ---- training -------------------------------------------------------------------------------------

@torch.no_grad()
def validation_loss(cfg, head, x, y):
    """The mean over validation with every class weighing the same, as in training."""
    outputs = head(x.to(next(head.buffers()).device)).cpu()
    return (unit_losses(cfg, outputs, y) * class_weights(cfg, y)).mean().item()


def fit(cfg, classes, x, y, x_val, y_val):
    """A head on frozen features, and its validation loss: at --lr, or the best of --search random rates
    (DBT-DINO 6.2.1, 6.2.2: Optuna). Arguments as in `train_head`."""
    if cfg.head == 'knn':
        return Neighbours(x, y, len(classes)), 0.0
    rates = [cfg.lr]
    if cfg.search:
        rng = np.random.default_rng([cfg.seed, 24])
        low, high = np.log(RECIPES[cfg.head]['search'])
        rates = np.exp(rng.uniform(low, high, cfg.search)).tolist()
    trials = {lr: train_head(cfg, classes, x, y, x_val, y_val, lr) for lr in rates}
    best = min(trials, key=lambda lr: trials[lr][1])
    if cfg.search and dist.get_rank() == 0:
        print(f'  learning rate {best:.2g}, the best of {cfg.search} by validation loss')
    return trials[best]


def train_head(cfg, classes, x, y, x_val, y_val, lr):
    """AdamW and a cosine over --epochs: x (B, F), y (B,) or (B, T) -> the head of the epoch with the least
    validation loss, and that loss, infinite if none was finite."""
    torch.manual_seed(cfg.seed)
    head = Head(cfg.head, x.shape[1], len(classes))
    head.standardize(x)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=cfg.wd)
    weight, steps = class_weights(cfg, y), cfg.epochs * math.ceil(len(x) / cfg.batch)
    least, best, step = math.inf, head, 0
    for epoch in range(cfg.epochs):
        for chosen in torch.randperm(len(x)).split(cfg.batch):
            optimizer.param_groups[0]['lr'] = cosine(step, steps, lr, 0)
            losses = unit_losses(cfg, head(x[chosen]), y[chosen])
            loss = (losses * weight[chosen]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        loss = validation_loss(cfg, head, x_val, y_val)
        if loss < least:
            least, best = loss, deepcopy(head)
    return best, least


class EncoderWithHead(nn.Module):
    """What is finetuned: B units as lists of (slot, images) -> outputs (B, C or T)."""

    def __init__(self, cfg, encoder, head):
        super().__init__()
        self.cfg, self.encoder, self.head = cfg, encoder, head
        encoder.mask_token.requires_grad_(False)            # unused here, but DDP waits for every gradient

    def forward(self, batch):
        return self.head(pooled(self.cfg, side_by_side(self.cfg, self.encoder, batch)))


def plan(cfg, B, rank, ranks):
    """For every step the micro-batches of this rank, lists of (number of a unit, mirrored). An epoch is
    a permutation of B units, filled up to whole batches from its start. Batches are the same however many
    ranks share them."""
    steps = []
    for epoch in range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, epoch])
        order, mirrored = rng.permutation(B), rng.random(B) < 0.5
        for batch in np.resize(order, (math.ceil(B / cfg.batch), cfg.batch)):
            mine = [(int(u), bool(mirrored[u])) for u in batch[rank::ranks]]
            starts = range(0, len(mine), cfg.micro_batch)
            steps.append([mine[k:k + cfg.micro_batch] for k in starts])
    return steps


def finetune(cfg, encoder, train, val, classes, device):
    """Encoder and head together (MammoDINO 3.3, which gives no recipe). Ours: AdamW, a learning rate that
    falls block by block towards the input, a warm-up over a tenth of the steps, then a cosine. -> encoder and
    head of the epoch with the least validation loss, and that loss, infinite if none was finite."""
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), encoder.config['size']
    width = len(SLOTS[cfg.level]) * len(POOLS[cfg.pool]) * encoder.config['width']
    torch.manual_seed(cfg.seed)
    network = EncoderWithHead(cfg, encoder, Head(cfg.head, width, len(classes))).to(device)
    devices = [device] if device.type == 'cuda' else None
    ddp = nn.parallel.DistributedDataParallel(network, device_ids=devices)
    amp = torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(device, cfg.amp))
    optimizer = torch.optim.AdamW(vit.param_groups(network, cfg.lr, cfg.wd, cfg.layer_decay))
    y = labels_of(train).to(device)
    weight, steps = class_weights(cfg, y), plan(cfg, len(train), rank, ranks)
    items = [[(train[u], mirrored) for u, mirrored in micro_batch]
             for micro_batches in steps for micro_batch in micro_batches]
    stream = iter(loader(cfg, encoder, items))
    least, best = math.inf, network
    bar = tqdm(steps, unit='step', disable=rank > 0 or None, desc='finetuning')
    for step, micro_batches in enumerate(bar):
        rate = cosine(step, len(steps), cfg.lr, 0, warmup=len(steps) // 10)
        for group in optimizer.param_groups:
            group['lr'] = group['lr_scale'] * rate
        for micro_batch in micro_batches:
            chosen, batch = [u for u, _ in micro_batch], next(stream)
            readable = torch.tensor([bool(views) for views in batch], device=device)
            if not any(batch):                              # a blank image, which weighs nothing
                batch[0] = [(0, np.zeros((1, size, size), np.uint8))]
            with nullcontext() if micro_batch is micro_batches[-1] else ddp.no_sync():
                with amp:
                    outputs = ddp(batch)
                losses = unit_losses(cfg, outputs, y[chosen]) * weight[chosen] * readable
                # The mean over a batch is a sum over its micro-batches and ranks; DDP divides by ranks.
                (losses.sum() * ranks / cfg.batch).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (len(steps) // cfg.epochs) == 0:    # an epoch has ended
            val_readable, x = features(cfg, encoder, val, device)
            loss = validation_loss(cfg, network.head, x, labels_of(val_readable))
            if loss < least:
                least, best = loss, deepcopy(network)
            bar.set_postfix(val=f'{loss:.4f}', best=f'{least:.4f}')
    del ddp                                                 # before its group, see pretrain.py
    return best.encoder, best.head, least


# ---- one run --------------------------------------------------------------------------------------

def encoders(cfg):
    """{name: encoder}, the main one last. Random weights come first, since a good head alone scores well.
    They have the shape of --encoder, but LayerScale 1: at DINOv2's 1e-5 every block of a random network would
    be the identity, and easy to beat."""
    given = {}
    if cfg.dinov2:
        given['DINOv2'] = vit.load(cfg.dinov2)
    if cfg.encoder:
        given['pretrained'] = vit.load(cfg.encoder, imagenet=cfg.imagenet)
    shape = given['pretrained'].config if cfg.encoder else SMALL
    torch.manual_seed(cfg.seed)
    return {'random init': vit.ViT(**shape, layerscale=1.0).eval(), **given}


@torch.no_grad()
def probabilities(cfg, head, x):
    """Features (B, F) -> probabilities (B, C), or the risk within each year (B, T)."""
    outputs = head(x.to(next(head.buffers()).device)).cpu().double()
    return (risk(outputs) if cfg.task == 'risk' else outputs.softmax(-1)).numpy()


def evaluate(cfg, device):
    """One data set and task: for every encoder and every share of the training patients, a head is trained
    and tried on the test set."""
    rank, out = dist.get_rank(), Path(cfg.out)
    compared = encoders(cfg)                                # a wrong file is named before hours of reading
    units, classes, notes = on_rank_0(load_units, cfg)
    parts = {split: [unit for unit in units if unit.split == split]
             for split in ('train', 'val', 'test')}
    require_classes(parts, notes)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock_file = lock(out)
        introduce(cfg, parts, classes, notes)
    results = []
    for name, encoder in compared.items():
        trained, train = encoder.to(device), parts['train']
        if cfg.freeze:
            data = {split: features(cfg, trained, part, device) for split, part in parts.items()}
            require_classes({split: readable for split, (readable, _) in data.items()},
                            ['unreadable files were left out; they are named above'])
            (train, x), (val, x_val) = data['train'], data['val']
        for share in cfg.fraction:
            chosen = drawn(train, share, cfg.seed)
            if cfg.freeze:
                head, loss = fit(cfg, classes, x[chosen], labels_of(train)[chosen], x_val,
                                 labels_of(val))
            else:                                           # random weights hold nothing to preserve
                decay = 1.0 if name == 'random init' else cfg.layer_decay
                trained, head, loss = finetune(replace(cfg, layer_decay=decay), deepcopy(encoder),
                                               [train[u] for u in chosen], parts['val'], classes,
                                               device)
                data = {split: features(cfg, trained, parts[split], device)
                        for split in ('val', 'test')}
            if not math.isfinite(loss):
                raise ValueError('the validation loss was never finite; lower --lr')
            threshold = None
            if cfg.task in score.BINARY:
                val, x_val = data['val']
                threshold = metrics.youden(labels_of(val), probabilities(cfg, head, x_val)[:, 1])
            test, x_test = data['test']
            results.append((name, share, test, probabilities(cfg, head, x_test), threshold))
    if rank == 0:
        # The loops ended with the main encoder on its largest share; its head is the one to keep.
        weights = {f'backbone.{k}': v.cpu() for k, v in trained.state_dict().items()}
        save(out / 'last.pt', dict(config=asdict(cfg), classes=classes, threshold=threshold,
                                   head=head.cpu().state_dict(), vit=trained.config,
                                   teacher=weights))
        write(cfg, classes, notes, results)
        score.heads([cfg.out], out, cfg.draws, cfg.seed)
        print(f'-> {out}: predictions.csv, scores.json, last.pt, pictures. Next:\n'
              f'   python score.py {out} OTHER\n'
              f'   python finetune.py predict FILE --checkpoint {out}')
        lock_file.close()
    dist.barrier()


def refuse_existing(out):
    """ValueError for a folder that holds a run of this or another script, which would be overwritten."""
    if any((Path(out) / name).exists() for name in ('run.json', 'last.pt')):
        raise ValueError(f'{out} holds a run; choose another --out')


def drawn(units, share, seed):
    """Numbers of the units of a share of the patients, the same share of those with each highest label."""
    strata = {}
    for unit in units:
        strata[unit.patient] = max(strata.get(unit.patient, 0), int(np.max(unit.label)))
    patients = datasets.drawn(strata, share, seed, math.ceil)
    return [u for u, unit in enumerate(units) if unit.patient in patients]


def introduce(cfg, parts, classes, notes):
    """What is about to be learnt from what, and what was left out."""
    state = 'frozen' if cfg.freeze else 'finetuned'
    print(f'\n{cfg.task} of {cfg.dataset}, {cfg.level} level: {cfg.head} head on {cfg.pool} of '
          f'{cfg.encoder or "random weights"}, {state}')
    for split, units in parts.items():
        asked = score.questions(dict(task=cfg.task, classes=classes), labels_of(units).numpy())
        counts = ', '.join(f'{name} {truth.sum()}' for name, (_, truth, _) in asked.items())
        patients = len({unit.patient for unit in units})
        print(f'  {split:5} {len(units)} {cfg.level}s of {patients} patients; {counts}')
    print(''.join(f'  {note}\n' for note in notes), end='')


def write(cfg, classes, notes, results):
    """predictions.csv and run.json, from which score.py makes everything else. A result is the name of the
    encoder, the share of the training patients, units, their probabilities, and the threshold of validation
    from which a case counts as positive; without it the likeliest class is predicted."""
    lines = []
    for name, share, units, p, threshold in results:
        likeliest = p.argmax(1) if threshold is None else (p[:, 1] >= threshold).astype(int)
        for unit, c, row in zip(units, likeliest, p.tolist()):
            if cfg.task == 'risk':
                labels = ' '.join(map(str, unit.label)), ''
            else:
                labels = classes[unit.label], classes[c]
            lines.append((name, share, unit.name, unit.patient, unit.group, *labels, *row))
    header = ('encoder', 'share', 'unit', 'patient', 'group', 'target', 'predicted',
              *(f'p_{name}' for name in classes))
    score.write_csv(Path(cfg.out) / 'predictions.csv', header, lines)
    run = asdict(cfg) | dict(encoder=cfg.encoder or 'random weights', classes=classes, notes=notes)
    score.write_json(Path(cfg.out) / 'run.json', run)


# ---- trained heads on other images ----------------------------------------------------------------

def restored(folder):
    """A run's last.pt -> configuration, encoder, head, classes, threshold."""
    path = Path(folder) / 'last.pt'
    encoder, state = vit.load(path), vit.read(path)
    if 'head' not in state:
        raise ValueError(f'{path} holds an encoder without a head; give a run of finetune.py')
    weights, classes = state['head'], state['classes']
    cfg = Config(**state['config'] | dict(workers=0, cache='', encoder=str(folder)))
    if cfg.head == 'knn':
        head = Neighbours(weights['bank'], weights['labels'], len(classes))
    else:
        head = Head(cfg.head, len(weights['shift']), len(classes))
    head.load_state_dict(weights)
    return cfg, encoder, head.eval(), classes, state['threshold']


def test(argv, device):
    """A trained head on the test set of another data set that has the same task, beside its own."""
    parser = argparse.ArgumentParser(prog='finetune.py test')
    for flag in ('checkpoint', 'root', 'out'):
        parser.add_argument(f'--{flag}', required=True)
    parser.add_argument('--dataset', default='csv', choices=datasets.DATASETS)
    parser.add_argument('--images')
    parser.add_argument('--cancer_rule')
    args = vars(parser.parse_args(argv))
    folder, out = args.pop('checkpoint'), Path(args['out'])
    refuse_existing(out)
    own, encoder, head, classes, threshold = restored(folder)
    own_labels = tuple(classes) if args['dataset'] == 'csv' else ()     # a list uses those of the head
    cfg = replace(own, **args, classes=own_labels, subgroup=None)
    units, theirs, notes = on_rank_0(load_units, cfg)
    if len(theirs) != len(classes):
        raise ValueError(f'the classes of {cfg.dataset} are {", ".join(theirs)}, those of the head '
                         f'{", ".join(classes)}')
    notes.append(f'classes {", ".join(theirs)} stand for {", ".join(classes)}')
    units = [unit for unit in units if unit.split == 'test']
    if not units:
        raise ValueError(f'{cfg.root} has no test split')
    units, x = features(cfg, encoder.to(device), units, device)
    if dist.get_rank() == 0:
        p = probabilities(cfg, head, x)
        out.mkdir(parents=True, exist_ok=True)
        with lock(out):
            write(cfg, classes, notes, [('trained elsewhere', 1.0, units, p, threshold)])
            print(*notes, sep='\n')
            score.heads([folder, cfg.out], out, cfg.draws, cfg.seed)
        print(f'-> {out}/predictions.csv, scores.json')


def predict(argv, device):
    """Probabilities of images, or of breasts or an exam given as VIEW=FILE."""
    parser = argparse.ArgumentParser(prog='finetune.py predict')
    parser.add_argument('files', nargs='+', metavar='FILE', help='or VIEW=FILE, such as RCC=a.dcm')
    parser.add_argument('--checkpoint', required=True, metavar='RUN')
    args = parser.parse_args(argv)
    cfg, encoder, head, classes, threshold = restored(args.checkpoint)
    labels = {cfg.task: [0] if cfg.task == 'risk' else classes[0]}      # any: it is not used
    rows = []
    for file in args.files:
        view, _, path = ('', '', file) if cfg.level == 'image' else file.partition('=')
        if cfg.level != 'image' and view not in SLOTS['exam']:
            raise ValueError(f'this model reads {cfg.level}s: give VIEW=FILE, of '
                             f'{", ".join(SLOTS["exam"])}')
        images.read(path)                                   # raises what is wrong with it
        rows.append(datasets.Row(path, cfg.level, '', view[:1], view[1:], name=path, labels=labels))
    units = units_of(replace(cfg, subgroup=None), rows, classes)
    units, x = features(cfg, encoder.to(device), units, device)
    for unit, p in zip(units, probabilities(cfg, head, x)):
        values = ', '.join(f'{name} = {value:.3f}' for name, value in zip(classes, p))
        print(f'{unit.name}: {cfg.task} {values}')
    if cfg.head != 'knn':
        print('Classes weighed the same in training: these are scores, not shares of a population.')
    if threshold is not None:
        print(f'Threshold chosen on validation: {threshold:.3f}')


# ---- the demo, no part of the method --------------------------------------------------------------

DEMO = dict(out='runs/finetune-demo', encoder='runs/demo/last.pt', search=6, workers=0, epochs=60)


def demo(cfg, device):
    """Density and cancer of synthetic breasts that no training has seen, prepared like any data set."""
    folder, absent = Path(cfg.out) / 'phantoms', not os.path.isfile(cfg.encoder)
    if dist.get_rank() == 0:
        print('A demonstration on phantoms, without clinical meaning; --root DIR takes a data set.')
        if absent:
            print(f'{cfg.encoder} is absent: random weights only; `torchrun pretrain.py` makes it')
        volumes, lines = [], []
        for i in range(cfg.phantoms):
            done = i / cfg.phantoms
            split = 'train' if done < 0.45 else 'val' if done < 0.6 else 'test'
            example = phantom.breast(np.random.default_rng([cfg.seed, i, 0, 4]))        # pretrain.py: 1 to 3
            volumes.append(images.clahe(images.to_uint8(example.volume[0]))[None])
            name, density = f'{i:04d}', 'abcd'[example.density]
            lines.append((f'{name}.npy', name, split, density, example.cancer))
        phantom.dataset(folder, volumes)
        columns = 'path', 'patient', 'split', 'density', 'cancer'
        score.write_csv(folder / 'manifest.csv', columns, lines)
    dist.barrier()
    cfg = replace(cfg, root=str(folder), cache=f'{cfg.out}/features', random_encoder=absent,
                  encoder=None if absent else cfg.encoder,
                  search=0 if cfg.head == 'mlp' else cfg.search)
    for task in ('density', 'cancer'):
        settings = replace(cfg, task=task, out=f'{cfg.out}/{task}')
        evaluate(resolved(settings, dist.get_world_size()), device)


def main(argv):
    """test, predict, a run, or without --root the demo."""
    _, ranks, device = setup()
    if argv[:1] == ['predict']:
        predict(argv[1:], device)
    elif argv[:1] == ['test']:
        test(argv[1:], device)
    else:
        cfg = parse(Config, argv, DEMO, source='root')
        if cfg.root is None and (cfg.dataset, cfg.task) != (Config.dataset, Config.task):
            raise ValueError('--dataset and --task need --root DIR; without them this is a demo')
        if cfg.root is None:
            demo(cfg, device)
        else:
            refuse_existing(cfg.out)
            evaluate(resolved(cfg, ranks), device)
    dist.destroy_process_group()


if __name__ == '__main__':
    script('finetune.py', main)
