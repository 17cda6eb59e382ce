"""What an encoder is worth: cancer, lesion, lesion type, BI-RADS, density and five-year risk (MammoDINO 3.3;
DBT-DINO, arXiv 2512.13608, 2.4, 2.5, 6.2), beside the same head on random weights.

    $ python finetune.py                                        # on phantoms, no data needed
    $ python finetune.py --root exams.csv --task cancer --encoder runs/mammodino/last.pt
    $ torchrun --nproc-per-node 8 finetune.py --dataset rsna --root DIR --head mlp --encoder FILE
    $ python finetune.py test --checkpoint RUN --dataset vindr --root DIR --out OUT      # another data set
    $ python finetune.py predict RCC=a.dcm LCC=b.dcm RMLO=c.dcm LMLO=d.dcm --checkpoint RUN

An image or DBT volume becomes statistics of its tokens. An image, breast or exam is a unit, whose views lie
side by side. A head turns a unit into class probabilities. `--head mlp` trains the encoder too, as MammoDINO
does; the other heads read frozen features, as DBT-DINO does. OUT receives predictions.csv, run.json, last.pt,
and the tables and pictures that score.py makes of them.

B units, V views of a unit, R rows (files) with n images of S x S pixels, N patches, D width, F features,
C classes, T years. A slot is the place of a view in its unit; moments are the four statistics of `encode`.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
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
POOLS = dict(cls_mean=[0], cls_mean_std=[0, 2],             # which of the moments of `encode`
             patch_mean=[1], patch_mean_std=[1, 3])


@dataclass
class Config:
    """Every field is a flag; a None follows from data set, task and head. Sources: [paper] MammoDINO;
    [dbt-dino] arXiv 2512.13608; [ours] a choice of this repository."""
    dataset: str = option('csv', 'paper 3.3', 'rsna, vindr, cbis, cmmd, cesm, mias or csv',
                          group='data')
    root: str | None = option(None, 'ours', 'the data set as published, or a list; or a demo')
    images: str | None = option(None, 'ours', 'where prepare.py put the images of --root')
    task: str = option('cancer', 'paper 3.3', 'cancer, lesion, lesion_type, birads, density, risk')
    cancer_rule: str | None = option(None, 'ours', 'vindr: birads5 or birads45; cmmd: unlisted')
    classes: tuple[str, ...] = option((), 'ours', 'csv: the labels in order, the negative first')
    level: str | None = option(None, 'ours', 'image, breast, exam (DBT-DINO); by data set and task')
    voi: bool = option(False, 'dbt-dino', 'apply the VOI LUT or window of DICOM files')
    clahe: bool = option(True, 'paper 3.1', 'CLAHE of files that prepare.py has not seen')

    encoder: str | None = option(None, 'ours', 'last.pt, or the official DINOv2 file',
                                 group='encoder and head')
    imagenet: bool = option(True, 'ours', '--encoder was fed ImageNet-normalised images')
    random_encoder: bool = option(False, 'ours', 'no --encoder: random weights alone')
    dinov2: str | None = option(None, 'paper 3.3', 'the official DINOv2 file, for a row of its own')
    head: str = option('linear', 'ours', 'mlp (MammoDINO), linear, hazard (DBT-DINO) or knn')
    pool: str | None = option(None, 'dbt-dino 3.1', ', '.join(POOLS))
    freeze: bool | None = option(None, 'dbt-dino 6.2', 'train the head alone; all but mlp do')
    hidden: int = option(512, 'ours', 'width of the two hidden layers of the mlp')
    standardize: bool = option(True, 'ours', 'frozen features to mean 0 and deviation 1')
    balance: bool = option(True, 'ours', 'every class weighs the same in the loss')

    out: str = option('runs/finetune', 'ours', 'folder of this run', group='the run')
    cache: str = option('runs/features', 'dbt-dino 6.2.1', 'frozen features, by file and weights')
    seed: int = option(0, 'ours', 'split, head, order, bootstrap')
    workers: int = option(min(4, os.cpu_count() or 1), 'ours', 'data processes per rank')
    amp: bool | None = option(None, 'dbt-dino 6.2.1', 'bf16 of the encoder; by default on GPUs')

    size: int = option(0, 'paper 3.2', "pixels of the image; 0: the encoder's own", group='images')
    slices: int = option(0, 'dbt-dino 6.2', 'slices of a volume; 0: all, or 4 when finetuning')

    epochs: int | None = option(None, 'dbt-dino 6.2', '75, hazard 100, mlp 30',
                                group='optimization')
    batch: int = option(64, 'dbt-dino 6.2', 'units per step, over all ranks')
    micro_batch: int = option(8, 'ours', 'finetuning: units a rank holds at once')
    lr: float | None = option(None, 'ours', 'peak: 1e-3, hazard 3e-4, finetuning 1e-4')
    search: int = option(0, 'dbt-dino 6.2.1', 'learning rates to compare on validation; 24 there')
    wd: float = option(1e-4, 'dbt-dino 6.2', 'weight decay')
    layer_decay: float = option(0.75, 'ours', 'finetuning: rate factor per block below the top')
    fraction: tuple[float, ...] = option((1.0,), 'dbt-dino 3.2', 'shares of the training patients')

    subgroup: str | None = option(None, 'dbt-dino 3.3', 'a table by this column, such as age',
                                  group='scores')
    draws: int = option(1000, 'dbt-dino 2.5', 'bootstrap draws of patients')

    phantoms: int = option(700, 'ours', 'breasts: 45 % train, 15 % choose, 40 % test', group='demo')


DEMO = dict(out='runs/finetune-demo', encoder='runs/demo/last.pt', search=6, workers=0, epochs=60)
RECIPES = dict(
    mlp=dict(pool='cls_mean', freeze=False, epochs=30, lr=1e-3, rates=(1e-5, 1e-2)),
    linear=dict(pool='patch_mean_std', freeze=True, epochs=75, lr=1e-3, rates=(1e-5, 1e-2)),
    hazard=dict(pool='patch_mean_std', freeze=True, epochs=100, lr=3e-4, rates=(1e-5, 1e-3)),
    knn=dict(pool='cls_mean', freeze=True, epochs=0, lr=1e-3, rates=()))
FINETUNING_LR = 1e-4            # of encoder and head together; the rates above are those of a head alone
NEIGHBOURS = 10                 # k of the knn head
CHUNK = 75                      # images through the encoder at once (DBT-DINO 6.2.1)


def resolved(cfg, ranks=1):
    """The configuration with its Nones filled in. ValueError for flags that do not fit together."""
    choices = dict(dataset=datasets.DATASETS, task=datasets.TASKS, head=RECIPES,
                   pool=(None, *POOLS), level=(None, *SLOTS),
                   cancer_rule=(None, 'birads5', 'birads45', 'unlisted'))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            expected = ', '.join(choice for choice in allowed if choice)
            raise ValueError(f'--{name} {getattr(cfg, name)}: expected {expected}')
    if (cfg.head == 'hazard') != (cfg.task == 'risk'):
        raise ValueError(f'--head {cfg.head} --task {cfg.task}: risk takes the hazard head alone')
    recipe = RECIPES[cfg.head]
    freeze = recipe['freeze'] if cfg.freeze is None else cfg.freeze
    if not freeze and (cfg.search or cfg.head == 'knn' or cfg.batch % ranks):
        raise ValueError('finetuning takes neither --search nor --head knn, and a --batch that is '
                         f'a multiple of {ranks} ranks')
    if not (cfg.encoder or cfg.random_encoder):
        raise ValueError('--encoder FILE is missing; --random_encoder does without')
    levels = datasets.LEVELS
    level = levels.get((cfg.dataset, cfg.task)) or levels.get(cfg.dataset, 'image')
    return replace(cfg, freeze=freeze, level=cfg.level or level, pool=cfg.pool or recipe['pool'],
                   epochs=recipe['epochs'] if cfg.epochs is None else cfg.epochs,
                   lr=cfg.lr or (recipe['lr'] if freeze else FINETUNING_LR),
                   slices=cfg.slices or (0 if freeze else 4),
                   fraction=tuple(sorted(set(cfg.fraction))))


# ---- heads ----------------------------------------------------------------------------------------

def cumulative(x, W, b):
    """H_t = sum over k <= t of softplus(W_k x + b_k) (B, T), which never falls: x (B, F), W (T, F), b (T,).
    The running sum is DBT-DINO's product with an upper triangular matrix (6.2.2); softplus keeps each year's
    hazard above 0."""
    return F.softplus(F.linear(*map(torch.as_tensor, (x, W, b)))).cumsum(-1)


def hazard(x, W, b):
    """p_t = 1 - exp(-H_t): the risk of cancer within t years (B, T) (DBT-DINO 6.2.2; Yala 2021)."""
    return -torch.expm1(-cumulative(x, W, b))


def hazard_loss(H, y, mask, weight=None):
    """Cross-entropy of p = 1 - exp(-H), mean over the observed years of an exam, then over exams by `weight`:

        (1 - y) H - y log(1 - exp(-H))

    In log space log(1 - p) = -H exactly, so nothing saturates. H (B, T) cumulative hazards above 0; y (B, T)
    1 if there is cancer by then; mask (B, T) 1 where observed; weight (B,). Exams without an observed year do
    not count."""
    H, y, mask = (torch.as_tensor(a).double() for a in (H, y, mask))                    # (B, T) each
    each = (1 - y) * H - y * torch.log(-torch.expm1(-H.clamp_min(1e-30)))               # (B, T)
    seen = mask.sum(-1)
    weight = (seen > 0).double() * (1 if weight is None else weight)
    exam = (each * mask).sum(-1) / seen.clamp_min(1)                                    # (B,)
    return (exam * weight).sum() / weight.sum().clamp_min(1e-30)


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
        """Takes mean and deviation from training features (n, F). A feature that does not vary becomes 0."""
        deviation = x.std(0)
        self.shift.copy_(x.mean(0))
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0))

    def forward(self, x):
        """(B, F) -> (B, C or T)"""
        with torch.autocast(x.device.type, enabled=False):
            x = (x.float() - self.shift) * self.scale
            for layer in self.layers[:-1]:
                x = F.gelu(layer(x))
            last = self.layers[-1]
            return cumulative(x, last.weight, last.bias) if self.kind == 'hazard' else last(x)


class Neighbours(nn.Module):
    """Features (B, F) -> log of each class's share (B, C) in the vote of the nearest training units by cosine
    (DINO). x (n, F) and labels (n,) are those of the training units."""

    def __init__(self, x, labels, classes):
        super().__init__()
        self.register_buffer('bank', F.normalize(x.float(), dim=-1))
        self.register_buffer('labels', labels)
        self.classes = classes

    def forward(self, x):
        similarity = (F.normalize(x.float(), dim=-1) @ self.bank.T).cpu().numpy()       # (B, n)
        shares = metrics.knn(similarity, self.labels.cpu().numpy(), NEIGHBOURS)
        shares = np.pad(shares, ((0, 0), (0, self.classes - shares.shape[1])))          # (B, C)
        return torch.from_numpy(shares).clamp_min(1e-12).log()


def new_head(cfg, encoder, classes):
    width = len(SLOTS[cfg.level]) * len(POOLS[cfg.pool]) * encoder.config['width']
    return Head(cfg.head, width, len(classes), cfg.hidden)


def class_weights(cfg, targets):
    """Weights of the units (n,), 1 on average, with which every class counts the same over the set; in risk,
    exams with and without cancer. DBT-DINO balances its validation set alone (6.2.2)."""
    kind = targets.amax(1) if cfg.task == 'risk' else targets
    count = torch.bincount(kind)
    return (len(kind) / (count > 0).sum() / count)[kind] if cfg.balance else torch.ones(len(kind))


def criterion(cfg, outputs, targets, weight):
    """Mean over the units of weight * loss: outputs (B, C or T), targets (B,) or (B, T), weight (B,)."""
    if cfg.task == 'risk':
        loss = hazard_loss(outputs, targets > 0, targets >= 0, weight)      # a mean over the weights
        return loss * weight.sum() / len(weight)
    return (F.cross_entropy(outputs.float(), targets, reduction='none') * weight).mean()


# ---- rows -> units --------------------------------------------------------------------------------

@dataclass
class Unit:
    """What gets one prediction: an image, a breast or an exam."""
    name: str
    patient: str
    split: str
    label: int | np.ndarray     # class; risk: (T,), 1 cancer by then, 0 none, -1 not observed
    rows: list                  # (number of the row, slot)
    group: str                  # value of the column --subgroup


def load(cfg):
    """The data set -> rows whose label of --task is known, units, classes, notes on what was left out."""
    known = datasets.CLASSES[cfg.dataset]
    found, notes = [], []
    if cfg.task in known:
        found, notes = datasets.load(cfg.dataset, cfg.root, cfg.images, cfg.seed, cfg.cancer_rule)
    rows = [row for row in found if cfg.task in row.labels]
    if not rows:
        no_label = f'{cfg.dataset} has no {cfg.task} label; it takes one of {", ".join(known)}'
        raise ValueError(datasets.REFUSED.get((cfg.dataset, cfg.task), no_label))
    if len(rows) < len(found):
        unlabelled = len(found) - len(rows)
        notes.append(f'{unlabelled} of {len(found)} images have no {cfg.task} label')
    if cfg.task == 'density' and cfg.dataset == 'csv' and not cfg.classes:
        for row in rows:
            row.labels['density'] = row.labels['density'].lower()
    labels = {row.labels[cfg.task] for row in rows} if cfg.task != 'risk' else set()
    occurring = labels & set('0123456') if cfg.task == 'birads' else labels
    classes = list(cfg.classes or known[cfg.task] or sorted(occurring))
    if not labels <= set(classes):
        wrong = next(row for row in rows if row.labels[cfg.task] not in classes)
        raise ValueError(f'{wrong.path}: {cfg.task} {wrong.labels[cfg.task]!r} is none of '
                         f'{", ".join(classes)}; correct it, or name the labels with --classes')
    units = units_of(cfg, rows, classes, notes)
    return rows, units, classes, notes


def units_of(cfg, rows, classes, notes):
    """Rows -> units. A breast or exam has the highest label of its images; it takes no part where its images
    hold lesions of different types."""
    slots, members, elsewhere, units = SLOTS[cfg.level], defaultdict(list), Counter(), []
    for i, row in enumerate(rows):
        if cfg.level != 'image' and not (row.view and row.laterality):
            raise ValueError(f'{row.path}: --level {cfg.level} needs laterality and view')
        frame = '' if row.frame is None else f'#{row.frame}'
        exam = f'{row.patient}/{row.exam}'.rstrip('/')
        name, slot = dict(image=(row.name + frame, 'image'),
                          breast=(f'{exam}/{row.laterality}', row.view),
                          exam=(exam, row.laterality + row.view))[cfg.level]
        if slot in slots:
            members[name].append((i, slots.index(slot)))
        else:
            elsewhere[slot] += 1
    for name, of in members.items():
        labels = [rows[i].labels[cfg.task] for i, _ in of]
        if cfg.task != 'risk':
            labels = [classes.index(label) for label in labels]
        row, label = rows[of[0][0]], max(labels, key=np.max)
        if cfg.task != 'lesion_type' or len(set(labels)) == 1:
            units.append(Unit(name, row.patient, row.split, label, of, group_of(cfg, row)))
    if elsewhere:
        counted = ', '.join(f'{view} {n}' for view, n in elsewhere.most_common())
        notes.append(f'views other than {", ".join(slots)} take no part: {counted}')
    if len(units) < len(members):
        mixed = len(members) - len(units)
        notes.append(f'{mixed} {cfg.level}s hold lesions of several types and take no part')
    return units


def group_of(cfg, row):
    """The value of the column --subgroup; ages become decades, as in DBT-DINO's Table 5."""
    if not cfg.subgroup:
        return ''
    columns = {name.lower(): value for name, value in row.record.items()}
    if cfg.subgroup.lower() not in columns:
        raise ValueError(f'--subgroup {cfg.subgroup}: no such column in {", ".join(row.record)}')
    value = columns[cfg.subgroup.lower()]
    age = value.rstrip('Y')                                 # '57' or DICOM's '057Y'
    if cfg.subgroup.lower() == 'age' and age.isdigit():
        return ('<50', '50-60', '60-70', '70+')[np.searchsorted((50, 60, 70), int(age), 'right')]
    return value or 'blank'


def parted(units, notes):
    """-> {split: units}. ValueError where a split has fewer than two classes, with the notes."""
    parts = {}
    for split in ('train', 'val', 'test'):
        parts[split] = [unit for unit in units if unit.split == split]
        if len({int(np.max(unit.label)) for unit in parts[split]}) < 2:
            told = f'the {split} split holds fewer than two classes: give it patients of each class'
            raise ValueError('; '.join([told, *notes]))
    return parts


def targets(units):
    """(n,) classes, or (n, T)"""
    return torch.tensor(np.stack([unit.label for unit in units]))


# ---- files -> features ----------------------------------------------------------------------------

class Images(Dataset):
    """(row i, mirrored or not) -> i and its images uint8 (n, S, S), squashed to the encoder's square
    (DBT-DINO 6.2.1), or why the file cannot be read, a str."""

    def __init__(self, cfg, rows, size):
        self.cfg, self.rows, self.size = cfg, rows, size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        i, mirrored = item
        row = self.rows[i]
        try:
            K = images.frames(row.path)
            taken = min(self.cfg.slices or K, K)            # the middles of so many equal parts of the volume
            frames = [row.frame]
            if row.frame is None:
                frames = [int((k + 0.5) * K / taken) for k in range(taken)]
            squashed = np.stack([self.squashed(row.path, frame) for frame in frames])
        except (ValueError, OSError) as problem:
            return i, str(problem)
        return i, squashed[..., ::-1] if mirrored else squashed

    def squashed(self, path, frame):
        """Prepared .npy files have had their CLAHE; every other file gets it here (MammoDINO 3.1)."""
        image = images.read(path, frame, self.cfg.voi)
        if self.cfg.clahe and not path.lower().endswith('.npy'):
            image = images.clahe(image)
        return np.asarray(Image.fromarray(image).resize((self.size,) * 2, Image.Resampling.BICUBIC))


def readable(items):
    """Items of `Images` -> those that could be read; the reasons of the others go to the terminal."""
    for _, found in items:
        if isinstance(found, str):
            tqdm.write(f'skipped: {found}', file=sys.stderr)
    return [(i, found) for i, found in items if not isinstance(found, str)]


def stacked(arrays):
    """Images (n, S, S) of R rows -> all of them (sum of n, S, S), and the row of each (sum of n,)."""
    counts = torch.tensor([len(array) for array in arrays])
    owner = torch.arange(len(arrays)).repeat_interleave(counts)
    return torch.from_numpy(np.concatenate(arrays)), owner


def encode(encoder, pictures, owner, rows, of_patches=True):
    """uint8 images (n, S, S) of the rows `owner` (n,) -> moments (R, 4, D): mean of CLS, mean of patches,
    deviation of CLS, deviation of patches, over the slices of a view (DBT-DINO 6.2.1), unbiased (ours).

    Sums add up in fp64, CHUNK images at a time, so that the tokens of a volume are never held together.
    Without `of_patches` the two of the patches mean nothing."""
    sums = torch.zeros(rows, 4, encoder.config['width'], dtype=torch.float64, device=owner.device)
    for part, of in zip(pictures.split(CHUNK), owner.split(CHUNK)):
        part = part.to(owner.device).unsqueeze(1).float() / 255                         # (n, 1, S, S)
        cls, patches = encoder(part)                                                    # (n, D), (n, N, D)
        cls, patches = cls.double(), patches.double() if of_patches else patches[:, :1].double() * 0
        each = torch.stack([cls, patches.sum(1), cls.square(), patches.square().sum(1)], dim=1)
        sums = sums.index_add(0, of, each)
    count = torch.bincount(owner, minlength=rows).double()
    count = torch.stack([count, count * patches.shape[1]], dim=1).unsqueeze(-1)         # (R, 2, 1)
    mean = sums[:, :2] / count
    variance = (sums[:, 2:] - count * mean.square()) / (count - 1).clamp_min(1)
    return torch.cat([mean, variance.clamp_min(1e-12).sqrt()], dim=1).float()           # sqrt is steep at 0


def cached(cfg, encoder, rows, size, bf16):
    """Where the moments of each row are kept -> {i: path}: a folder for what they depend on besides the file
    (weights, size, slices, precision, contrast), in it a file named by path, size and time."""
    recipe = [encoder.config, size, cfg.slices, bf16, cfg.voi, cfg.clahe]
    digest = hashlib.sha256(json.dumps(recipe).encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    folder, places = Path(cfg.cache) / digest.hexdigest()[:16], {}
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in rows.items():
        file = os.stat(row.path)
        key = f'{os.path.abspath(row.path)} {file.st_size} {file.st_mtime_ns} {row.frame}'
        places[i] = folder / f'{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy'
    return places


@torch.no_grad()
def features(cfg, encoder, rows, units, device, cache=True):
    """Moments of the rows that the units hold -> float32 (R, 4, D), NaN for other rows and unreadable files.
    Each rank computes a share of them, and all ranks get all."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size, bf16 = cfg.size or encoder.config['size'], computes_in_bf16(device, cfg.amp)
    mine = sorted({i for unit in units for i, _ in unit.rows})[rank::ranks]
    places = cached(cfg, encoder, {i: rows[i] for i in mine}, size, bf16) if cache else {}
    found = {i: np.load(place) for i, place in places.items() if place.exists()}

    encoder.eval()
    of_patches = cache or 'patch' in cfg.pool               # the cache serves every pool
    todo = [(i, False) for i in mine if i not in found]
    batches = DataLoader(Images(cfg, rows, size), sampler=todo, batch_size=8, collate_fn=list,
                         num_workers=cfg.workers, timeout=1800 if cfg.workers else 0)
    hidden = rank > 0 or None                               # None: shown on a terminal alone
    for items in tqdm(batches, desc='encoding', unit='batch', disable=hidden, leave=False, delay=2):
        items = readable(items)
        if not items:
            continue
        pictures, owner = stacked([array for _, array in items])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            values = encode(encoder, pictures, owner.to(device), len(items), of_patches)
        for (i, _), value in zip(items, values.cpu().numpy()):
            found[i] = value
            if cache:                                       # beside its place, then moved there whole
                part = places[i].with_suffix(f'.{os.getpid()}.npy')
                np.save(part, value)
                os.replace(part, places[i])

    out = np.full((len(rows), 4, encoder.config['width']), np.nan, np.float32)
    for i, value in gathered(list(found.items())):
        out[i] = value
    return torch.from_numpy(out)


def assemble(cfg, values, place, units):
    """Moments of rows (R, 4, D) -> features of units (B, V F): the moments of --pool, the views side by side.
    place (R,) = unit * V + slot. Files of one view are averaged. A missing view is replaced by the mean of
    the unit's others."""
    views, values = len(SLOTS[cfg.level]), values[:, POOLS[cfg.pool]].flatten(1)        # (R, F)
    count = torch.bincount(place, minlength=units * views).unsqueeze(1)                 # (B V, 1)
    total = values.new_zeros(units * views, values.shape[1]).index_add(0, place, values)
    mean = total / count.clamp_min(1)                                                   # (B V, F)
    mean, there = mean.unflatten(0, (units, views)), (count > 0).unflatten(0, (units, views))
    others = (mean * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
    return torch.where(there, mean, others).flatten(1)                                  # (B, V F)


def unit_features(cfg, units, values):
    """Moments of rows (R, 4, D) -> (B, V F) of the units, NaN for those without a readable file."""
    views = len(SLOTS[cfg.level])
    places = [(i, u * views + slot) for u, unit in enumerate(units) for i, slot in unit.rows]
    rows, place = torch.tensor(places).T
    there = ~values[rows, 0, 0].isnan()
    x = assemble(cfg, values[rows[there]], place[there], len(units))
    x[torch.bincount(place[there] // views, minlength=len(units)) == 0] = math.nan
    return x


def examples(cfg, units, values):
    """Features (n, F) and targets (n,) or (n, T) of the units that have a readable file."""
    x, y = unit_features(cfg, units, values), targets(units)
    there = x.isfinite().all(1)
    return x[there], y[there]


# ---- training -------------------------------------------------------------------------------------

def fit(cfg, classes, train, val):
    """A head on frozen features, and {learning rate: least validation loss}: at --lr, or the best of --search
    random rates (DBT-DINO 6.2.1, 6.2.2: Optuna). train, val: features and targets."""
    if cfg.head == 'knn':
        return Neighbours(*train, len(classes)), {}
    rates = [cfg.lr]
    if cfg.search:
        rng, (low, high) = np.random.default_rng([cfg.seed, 24]), np.log(RECIPES[cfg.head]['rates'])
        rates = np.exp(rng.uniform(low, high, cfg.search)).tolist()
    trials = {lr: train_head(cfg, classes, *train, *val, lr) for lr in rates}
    head, least = min(trials.values(), key=lambda trial: trial[1])
    if not math.isfinite(least):
        raise ValueError('the validation loss was never finite; lower --lr')
    return head, {f'{lr:.3g}': loss for lr, (_, loss) in trials.items()}


def train_head(cfg, classes, x, y, x_val, y_val, lr):
    """AdamW and a cosine over --epochs: x (n, F), y (n,) or (n, T) -> the head of the epoch with the least
    validation loss, and that loss, infinite if none was finite."""
    torch.manual_seed(cfg.seed)
    head = Head(cfg.head, x.shape[1], len(classes), cfg.hidden)
    if cfg.standardize:
        head.standardize(x)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=cfg.wd)
    weight, weight_val = class_weights(cfg, y), class_weights(cfg, y_val)
    least, best, steps = math.inf, copy.deepcopy(head.state_dict()), math.ceil(len(x) / cfg.batch)
    for epoch in range(cfg.epochs):
        for i, rows in enumerate(torch.randperm(len(x)).split(cfg.batch)):
            optimizer.param_groups[0]['lr'] = cosine(epoch * steps + i, cfg.epochs * steps, lr, 0)
            loss = criterion(cfg, head(x[rows]), y[rows], weight[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            loss = criterion(cfg, head(x_val), y_val, weight_val).item()
        if loss < least:
            least, best = loss, copy.deepcopy(head.state_dict())
    head.load_state_dict(best)
    return head.eval(), least


class Network(nn.Module):
    """Encoder and head in one, for finetuning."""

    def __init__(self, cfg, encoder, head):
        super().__init__()
        self.cfg, self.encoder, self.head = cfg, encoder, head
        encoder.mask_token.requires_grad_(False)            # unused here, but DDP waits for every gradient

    def forward(self, pictures, owner, place, units):
        """Images uint8 (n, S, S), the row of each (n,), the place unit * V + slot of each row (R,), number of
        units -> outputs (B, C or T)"""
        values = encode(self.encoder, pictures, owner, len(place), 'patch' in self.cfg.pool)
        return self.head(assemble(self.cfg, values, place, units))


def plan(cfg, n, rank, ranks):
    """This rank's micro-batches of every step, lists of (unit, mirrored or not). An epoch is a permutation,
    filled up to whole batches from its start; batches are the same however many ranks share them."""
    steps = []
    for epoch in range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, epoch])
        order, mirrored = rng.permutation(n), rng.random(n) < 0.5
        for batch in np.resize(order, (math.ceil(n / cfg.batch), cfg.batch)):
            mine = [(int(u), bool(mirrored[u])) for u in batch[rank::ranks]]
            starts = range(0, len(mine), cfg.micro_batch)
            steps.append([mine[i:i + cfg.micro_batch] for i in starts])
    return steps


def collated(train, part, items, size, views):
    """A micro-batch [(unit, mirrored or not)] and the items of its rows -> images (n, S, S), the row of each
    (n,), the place unit * V + slot of each row (R,), and (B,) 1 for units that have an image, else 0."""
    places = [b * views + slot for b, (u, _) in enumerate(part) for _, slot in train[u].rows]
    seen = readable(list(zip(places, (array for _, array in items))))
    there = torch.zeros(len(part))
    there[[place // views for place, _ in seen]] = 1
    place, arrays = zip(*seen or [(0, np.zeros((1, size, size), np.uint8))])            # a blank of weight 0
    pictures, owner = stacked(arrays)
    return pictures, owner, torch.tensor(place), there


def finetune(cfg, encoder, rows, train, val, classes, device):
    """Encoder and head together (MammoDINO 3.3, which gives no recipe). Ours: AdamW, a learning rate that
    falls block by block towards the input, a warm-up over a tenth of the steps, then a cosine. -> the head,
    {learning rate: least validation loss}; encoder and head end at their best epoch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size, views = cfg.size or encoder.config['size'], len(SLOTS[cfg.level])
    torch.manual_seed(cfg.seed)
    network = Network(cfg, encoder, new_head(cfg, encoder, classes)).to(device)
    devices = [device] if device.type == 'cuda' else None
    ddp = nn.parallel.DistributedDataParallel(network, device_ids=devices)
    optimizer = torch.optim.AdamW(vit.param_groups(network, cfg.lr, cfg.wd, cfg.layer_decay))
    y, steps = targets(train), plan(cfg, len(train), rank, ranks)
    weight, bf16 = class_weights(cfg, y), computes_in_bf16(device, cfg.amp)
    files = [[(i, mirrored) for u, mirrored in part for i, _ in train[u].rows]
             for parts in steps for part in parts]
    batches = iter(DataLoader(Images(cfg, rows, size), batch_sampler=files, num_workers=cfg.workers,
                              collate_fn=list, timeout=1800 if cfg.workers else 0))
    least, best = math.inf, copy.deepcopy(network.state_dict())
    bar = tqdm(steps, unit='step', disable=rank > 0 or None, desc='finetuning')
    for step, parts in enumerate(bar):
        for group in optimizer.param_groups:
            rate = cosine(step, len(steps), cfg.lr, 0, warmup=len(steps) // 10)
            group['lr'] = group['lr_scale'] * rate
        encoder.train()                                     # validation leaves it in eval mode
        for part in parts:
            unit = [u for u, _ in part]
            pictures, owner, place, there = collated(train, part, next(batches), size, views)
            with nullcontext() if part is parts[-1] else ddp.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    outputs = ddp(pictures, owner.to(device), place.to(device), len(unit))
                unit_weight = (weight[unit] * there).to(device)
                loss = criterion(cfg, outputs, y[unit].to(device), unit_weight)
                # DDP takes the mean over ranks; the loss of a batch is the sum over ranks and micro-batches.
                (loss * len(unit) * ranks / cfg.batch).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (len(steps) // cfg.epochs) == 0:
            values = features(cfg, encoder, rows, val, device, cache=False)
            x_val, y_val = examples(cfg, val, values)
            with torch.no_grad():
                outputs = network.head(x_val.to(device)).cpu()
            loss = criterion(cfg, outputs, y_val, class_weights(cfg, y_val)).item()
            bar.set_postfix(val=f'{loss:.4f}', best=f'{min(loss, least):.4f}')
            if loss < least:
                least, best = loss, copy.deepcopy(network.state_dict())
    del ddp                                                 # before its group, see pretrain.py
    if not math.isfinite(least):
        raise ValueError('the validation loss was never finite; lower --lr')
    network.load_state_dict(best)
    return network.head.eval(), {f'{cfg.lr:.3g}': least}


# ---- one run --------------------------------------------------------------------------------------

@torch.no_grad()
def predicted(cfg, head, x):
    """Features (n, F) -> probabilities (n, C), or the risk within each year (n, T); NaN stays NaN."""
    outputs = head(x.to(next(head.buffers()).device)).cpu().double()
    return (-torch.expm1(-outputs) if cfg.task == 'risk' else outputs.softmax(-1)).numpy()


def new_encoder(cfg, file):
    """The encoder in a file, or random weights in the shape of --encoder. Their LayerScale is 1: at DINOv2's
    1e-5 every block of a random network would be the identity, and easy to beat."""
    if file:
        return vit.load(file, imagenet=cfg.imagenet or file != cfg.encoder)
    small = dict(size=84, width=128, depth=4, heads=4)      # the demo of pretrain.py
    shape = vit.load(cfg.encoder).config if cfg.encoder else small
    torch.manual_seed(cfg.seed)
    return vit.ViT(**shape, layerscale=1.0).eval()


def work(cfg, device):
    """One data set and task: a head on random weights first, since a good head alone scores well, then on
    every encoder, each on every fraction of the training patients."""
    rank, out = dist.get_rank(), Path(cfg.out)
    files = {'random init': None, 'DINOv2': cfg.dinov2, 'pretrained': cfg.encoder}
    files = {name: file for name, file in files.items() if file or name == 'random init'}
    for name, file in files.items():                        # an error comes before hours of reading
        patch = new_encoder(cfg, file).patch
        if cfg.size % patch:
            raise ValueError(f'--size {cfg.size} is no multiple of {patch}, the patch of {name}')
    rows, units, classes, notes = on_rank_0(load, cfg)
    parts = parted(units, notes)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock_file = lock(out)                               # noqa: F841, open until the process ends
        introduce(cfg, parts, classes, notes)
    strata = {}
    for unit in parts['train']:                             # a patient's highest label
        strata[unit.patient] = max(strata.get(unit.patient, 0), int(np.max(unit.label)))
    lines, tried = [], {}
    for name, file in files.items():
        encoder = new_encoder(cfg, file).to(device)
        if cfg.freeze:
            values = features(cfg, encoder, rows, units, device)
            seen = [unit for unit in units if not all(values[i].isnan().any() for i, _ in unit.rows)]
            parted(seen, ['unreadable files were left out; they are named above'])
        for share in cfg.fraction:
            kept = datasets.drawn(strata, share, cfg.seed, math.ceil)
            train = [unit for unit in parts['train'] if unit.patient in kept]
            if cfg.freeze:
                head, losses = fit(cfg, classes, examples(cfg, train, values),
                                   examples(cfg, parts['val'], values))
            else:
                encoder = new_encoder(cfg, file).to(device)
                decay = cfg.layer_decay if file else 1.0    # random weights hold nothing to preserve
                head, losses = finetune(replace(cfg, layer_decay=decay), encoder, rows, train,
                                        parts['val'], classes, device)
                values = features(cfg, encoder, rows, parts['val'] + parts['test'], device, False)
            x_val, y_val = examples(cfg, parts['val'], values)
            threshold = None
            if cfg.task in score.BINARY:
                threshold = metrics.youden(y_val, predicted(cfg, head, x_val)[:, 1])
            p = predicted(cfg, head, unit_features(cfg, parts['test'], values))
            lines += prediction_lines(cfg, name, share, parts['test'], classes, threshold, p)
            tried[f'{name}, {share:g}'] = losses
    if rank == 0:                                           # of the last encoder, on its largest share
        weights = {f'backbone.{k}': v.cpu() for k, v in encoder.state_dict().items()}
        save(out / 'last.pt', dict(config=asdict(cfg), classes=classes, threshold=threshold,
                                   head=head.cpu().state_dict(), vit=encoder.config,
                                   teacher=weights))
        notes += missing_views(cfg, parts['test'], values)
        write(cfg, classes, notes, lines, tried=tried)
        score.heads([cfg.out], out, cfg.draws, cfg.seed)
        print(f'-> {out}: predictions.csv, scores.json, last.pt, pictures. Next:\n   python score.py'
              f' {out} OTHER\n   python finetune.py predict FILE --checkpoint {out}')
    dist.barrier()


def introduce(cfg, parts, classes, notes):
    """What is about to be learnt from what, and what was left out."""
    state, encoder = 'frozen' if cfg.freeze else 'finetuned', cfg.encoder or 'random weights'
    print(f'\n{cfg.task} of {cfg.dataset}, {cfg.level} level: {cfg.head} head on {cfg.pool} of '
          f'{encoder}, {state}')
    for split, units in parts.items():
        asked = score.questions(dict(task=cfg.task, classes=classes), targets(units).numpy())
        counts = ', '.join(f'{name} {truth.sum()}' for name, (_, truth, _) in asked.items())
        patients = len({unit.patient for unit in units})
        print(f'  {split:5} {len(units)} {cfg.level}s of {patients} patients; {counts}')
    for note in notes:
        print(f'  {note}')


def missing_views(cfg, units, values):
    """A note on the units that lack a view, for which the mean of their others stands in."""
    lacking = []
    for unit in units:
        there = {slot for i, slot in unit.rows if not values[i, 0, 0].isnan()}
        absent = [view for slot, view in enumerate(SLOTS[cfg.level]) if slot not in there]
        if absent:
            lacking.append(f'{unit.name} ({" ".join(absent)})')
    if not lacking:
        return []
    shown = ', '.join(lacking[:5]) + ', ...' * (len(lacking) > 5)
    return [f'{len(lacking)} {cfg.level}s lack a view; the mean of their others stands in, a unit '
            f'without any takes no part: {shown}']


def prediction_lines(cfg, name, share, units, classes, threshold, p):
    """Lines of predictions.csv: the truth, the decision (the likeliest class, or positive at or
    above the threshold of validation) and every probability. Units without a readable file have none."""
    guess = p.argmax(1) if threshold is None else (p[:, 1] >= threshold).astype(int)
    lines = []
    for unit, g, row in zip(units, guess, p.tolist()):
        if cfg.task == 'risk':
            answer = ' '.join(map(str, unit.label)), ''
        else:
            answer = classes[unit.label], classes[g]
        if not np.isnan(row).any():
            lines.append((name, share, unit.name, unit.patient, unit.group, *answer, *row))
    return lines


def write(cfg, classes, notes, lines, **more):
    """predictions.csv and run.json, from which score.py makes everything else."""
    header = ('encoder', 'share', 'unit', 'patient', 'group', 'target', 'predicted',
              *(f'p_{name}' for name in classes))
    score.write_csv(Path(cfg.out) / 'predictions.csv', header, lines)
    about = asdict(cfg) | dict(classes=classes, notes=notes, torch=torch.__version__, **more)
    about['encoder'] = cfg.encoder or 'random weights'
    score.write_json(Path(cfg.out) / 'run.json', about)


# ---- trained heads on other images ----------------------------------------------------------------

def restored(folder):
    """A run's last.pt -> configuration, encoder, head, classes, threshold."""
    path = Path(folder) / 'last.pt' if os.path.isdir(folder) else Path(folder)
    encoder, state = vit.load(path), vit.read(path)
    if 'head' not in state:
        raise ValueError(f'{path} holds an encoder without a head; give a run of finetune.py')
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in state['config'].items()}
    cfg = replace(Config(**values), workers=0)
    if cfg.head == 'knn':
        head = Neighbours(state['head']['bank'], state['head']['labels'], len(state['classes']))
    else:
        head = new_head(cfg, encoder, state['classes'])
    head.load_state_dict(state['head'])
    return cfg, encoder, head.eval(), state['classes'], state['threshold']


def test(argv, device):
    """A trained head on the test set of another data set that has the same task, beside its own."""
    parser = argparse.ArgumentParser(prog='finetune.py test')
    parser.add_argument('--checkpoint', required=True, metavar='RUN')
    parser.add_argument('--dataset', default='csv')
    parser.add_argument('--root', required=True)
    parser.add_argument('--images')
    parser.add_argument('--cancer_rule')
    parser.add_argument('--out', required=True)
    args = vars(parser.parse_args(argv))
    folder = args.pop('checkpoint')
    own, encoder, head, classes, threshold = restored(folder)
    cfg = resolved(replace(own, **args, classes=(), subgroup=None, encoder=str(folder)))
    rows, units, theirs, notes = on_rank_0(load, cfg)
    if len(theirs) != len(classes):
        raise ValueError(f'the classes of {cfg.dataset} are {", ".join(theirs)}, those of the head '
                         f'{", ".join(classes)}')
    notes.append(f'classes {", ".join(theirs)} stand for {", ".join(classes)}')
    units = [unit for unit in units if unit.split == 'test']
    values = features(cfg, encoder.to(device), rows, units, device)
    p = predicted(cfg, head, unit_features(cfg, units, values))
    if dist.get_rank() == 0:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
        lines = prediction_lines(cfg, 'trained elsewhere', 1.0, units, classes, threshold, p)
        write(cfg, classes, notes, lines)
        print(*notes, sep='\n')
        score.heads([folder, cfg.out], Path(cfg.out), cfg.draws, cfg.seed)
        print(f'-> {cfg.out}/predictions.csv, scores.json')


def predict(argv, device):
    """Probabilities for images, or for one breast or exam given as VIEW=FILE."""
    parser = argparse.ArgumentParser(prog='finetune.py predict')
    parser.add_argument('files', nargs='+', metavar='FILE', help='or VIEW=FILE, such as RCC=a.dcm')
    parser.add_argument('--checkpoint', required=True, metavar='RUN')
    args = parser.parse_args(argv)
    cfg, encoder, head, classes, threshold = restored(args.checkpoint)
    slots = SLOTS[cfg.level]
    given = [('image', file) if cfg.level == 'image' else file.split('=', 1) for file in args.files]
    if cfg.level == 'breast':                               # RCC counts as CC
        given = [(pair[0].removeprefix('R').removeprefix('L'), *pair[1:]) for pair in given]
    if any(len(pair) != 2 or pair[0] not in slots for pair in given):
        raise ValueError(f'this model reads {cfg.level}s: give VIEW=FILE, of {", ".join(slots)}')
    for _, file in given:
        images.read(file)                                   # raises what is wrong with it
    rows = [datasets.Row(file, '', name=file) for _, file in given]
    members = [(i, slots.index(view)) for i, (view, _) in enumerate(given)]
    groups = [[member] for member in members] if cfg.level == 'image' else [members]
    names = args.files if cfg.level == 'image' else [cfg.level]
    units = [Unit(name, '', '', 0, group, '') for name, group in zip(names, groups)]
    values = features(cfg, encoder.to(device), rows, units, device, cache=False)
    for unit, p in zip(units, predicted(cfg, head, unit_features(cfg, units, values))):
        shown = ', '.join(f'{name} = {value:.3f}' for name, value in zip(classes, p))
        print(f'{unit.name}: {cfg.task} {"unreadable" if np.isnan(p).any() else shown}')
    print('\n'.join(missing_views(cfg, units, values)))
    if cfg.balance and cfg.head != 'knn':
        print('Classes weighed the same in training: these are scores, not shares of a population.')
    if threshold is not None:
        print(f'Threshold chosen on validation: {threshold:.3f}')


# ---- the demo, no part of the method --------------------------------------------------------------

def demo(cfg, device):
    """Density and cancer of synthetic breasts that no training has seen, prepared like any data set."""
    folder, ranks = Path(cfg.out) / 'phantoms', dist.get_world_size()
    if not os.path.isfile(cfg.encoder):
        if dist.get_rank() == 0:
            print(f'{cfg.encoder} is absent: random weights only; `torchrun pretrain.py` makes it')
        cfg = replace(cfg, encoder=None, random_encoder=True)
    if dist.get_rank() == 0:
        print('A demonstration on phantoms, without clinical meaning; --root DIR takes a data set.')
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(cfg.phantoms):
            place = i / cfg.phantoms
            split = 'train' if place < 0.45 else 'val' if place < 0.6 else 'test'
            example = phantom.breast(np.random.default_rng([cfg.seed, i, 0, 4]))        # pretrain.py: 1 to 3
            np.save(folder / f'{i:04d}.npy', images.clahe(images.to_uint8(example.volume[0])))
            density = 'abcd'[example.density]
            lines.append((f'{i:04d}.npy', f'{i:04d}', split, density, example.cancer))
        header = ('path', 'patient', 'split', 'density', 'cancer')
        score.write_csv(folder / 'manifest.csv', header, lines)
    dist.barrier()
    for task in ('density', 'cancer'):
        work(resolved(replace(cfg, root=str(folder), task=task, out=f'{cfg.out}/{task}',
                              search=0 if cfg.head == 'mlp' else cfg.search,
                              cache=f'{cfg.out}/features'), ranks), device)


def main(argv):
    """test, predict, a run, or without --root the demo."""
    _, ranks, device = setup()
    if argv[:1] == ['predict']:
        predict(argv[1:], device)
    elif argv[:1] == ['test']:
        test(argv[1:], device)
    else:
        cfg = parse(Config, argv, DEMO, source='root')
        if cfg.root is None and {'--dataset', '--task'} & set(argv):
            raise ValueError('--dataset and --task need --root DIR; without them this is a demo')
        if cfg.root is None:
            demo(cfg, device)
        elif (Path(cfg.out) / 'run.json').exists():
            raise ValueError(f'{cfg.out} holds a run; choose another --out')
        else:
            work(resolved(cfg, ranks), device)
    dist.destroy_process_group()


if __name__ == '__main__':
    script('finetune.py', main)
