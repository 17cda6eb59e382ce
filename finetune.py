"""What an encoder is worth: cancer, lesion, lesion type, BI-RADS, density and five-year risk (MammoDINO 3.3; DBT-DINO,
arXiv 2512.13608, 2.4, 2.5, 6.2), with intervals, beside the same head on random weights.

    $ python finetune.py                                                          # phantoms, no data needed
    $ python finetune.py --dataset vindr --root DIR --task density --head linear --encoder runs/mammodino/last.pt
    $ torchrun --nproc-per-node 8 finetune.py --dataset rsna --root DIR --task cancer --head mlp
    $ python finetune.py compare RUN_A RUN_B                                      # DeLong or McNemar, radar picture
    $ python finetune.py predict RCC=a.dcm LCC=b.dcm RMLO=c.dcm LMLO=d.dcm --checkpoint RUN

An image or DBT volume becomes statistics of its tokens; an image, breast or exam is a unit, its views side by side;
a head turns a unit into class probabilities. `--head mlp` finetunes the encoder as MammoDINO does, the other heads
read frozen features as DBT-DINO does. OUT receives metrics.json, predictions.csv, last.pt and pictures.

B units, V views of a unit, R rows (files) with n images of S x S pixels, N patches, D width, F features, C classes.
"""
import argparse
import contextlib
import copy
import csv
import hashlib
import json
import math
import os
import re
import sys
import zipfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pydicom
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import mask
import vit


# ---- configuration --------------------------------------------------------------------------------------------------

def option(default, source, text):
    return field(default=default, metadata=dict(source=source, help=text))


@dataclass
class Config:
    """Every field is a flag. None is filled in by `resolved`. Source: [paper] MammoDINO, [dbt-dino], [ours]."""
    dataset: str = option('csv', 'paper 3.3', 'rsna, vindr, ddsm, cmmd, cesm, mias or csv, a manifest of your own')
    root: str | None = option(None, 'ours', 'the data set as published, or a manifest; without it, a demo on phantoms')
    images: str | None = option(None, 'ours', 'where `mask.py prepare` put the images of --root')
    task: str = option('cancer', 'paper 3.3', 'cancer, lesion, lesion_type, birads, density or risk')
    out: str = option('runs/finetune', 'ours', 'folder of this run')
    encoder: str = option('runs/demo/last.pt', 'ours', 'a checkpoint of ours or the official DINOv2 file')
    dinov2: str | None = option(None, 'paper 3.3', 'the official DINOv2 file, for a row of its own')
    head: str = option('linear', 'ours', 'mlp (MammoDINO), linear, hazard (DBT-DINO) or knn')
    pool: str | None = option(None, 'dbt-dino 3.1', 'cls_mean, cls_mean_std, patch_mean or patch_mean_std, over '
                                                    'slices; by head')
    level: str | None = option(None, 'ours', 'image, breast or exam; by data set and task')
    freeze: bool | None = option(None, 'dbt-dino 6.2', 'train the head alone, on cached features; not for mlp')
    cancer_rule: str | None = option(None, 'ours', 'vindr: birads5 or birads45 counts as cancer; cmmd: unlisted, '
                                                   'breasts without a row are negatives')
    classes: tuple[str, ...] = option((), 'ours', 'csv: the labels in their order')
    subgroup: str | None = option(None, 'dbt-dino 3.3', 'a table by this column of the label file, such as age')
    fraction: tuple[float, ...] = option((1.0,), 'dbt-dino 3.2', 'shares of the training patients, a result for each')
    seed: int = option(0, 'ours', 'split, head, order, bootstrap')
    draws: int = option(1000, 'dbt-dino 2.5', 'bootstrap draws, by patient')
    # images
    size: int = option(0, 'paper 3.2', 'pixels of the squashed image; 0 is the side the encoder was trained on, 518')
    slices: int = option(0, 'dbt-dino 6.2', 'slices read of a volume, evenly spaced; 0: all, or 4 when finetuning')
    chunk: int = option(75, 'dbt-dino 6.2.1', 'images through the encoder at once')
    workers: int = option(4, 'ours', 'data processes per rank')
    max_bad: float = option(0.05, 'ours', 'stop above this share of unusable files, from 100 files on')
    cache: str = option('runs/features', 'dbt-dino 6.2.1', 'frozen features, keyed by file and weights')
    amp: bool | None = option(None, 'dbt-dino 6.2.1', 'bf16 autocast of the encoder; by default on GPUs only')
    # optimization
    epochs: int | None = option(None, 'dbt-dino 6.2', '75, hazard 100, mlp 30')
    batch: int = option(64, 'dbt-dino 6.2', 'units per step, over all ranks')
    micro_batch: int = option(8, 'ours', 'finetuning: units per rank at once, the rest is accumulated')
    lr: float | None = option(None, 'ours', 'peak: 1e-3, hazard 3e-4, finetuning 1e-4')
    search: int = option(0, 'dbt-dino 6.2.1', 'learning rates to draw and compare on validation; 24 there')
    wd: float = option(1e-4, 'dbt-dino 6.2', 'weight decay')
    layer_decay: float = option(0.75, 'ours', 'finetuning: learning rate factor per block below the top')
    clip: float = option(1.0, 'ours', 'gradient norm at most')
    hidden: int = option(512, 'ours', 'width of the two hidden layers of the mlp')
    standardize: bool = option(True, 'ours', 'frozen features to mean 0 and deviation 1 over the training units')
    balance: bool = option(True, 'dbt-dino 4.4', 'every class weighs the same in the loss')
    neighbours: int = option(10, 'ours', 'k of knn')
    phantoms: int = option(700, 'ours', 'demo: breasts, of which 45 % train, 15 % choose and 40 % test')


TASKS = ('cancer', 'lesion', 'lesion_type', 'birads', 'density', 'risk')
BINARY, ORDERED = ('cancer', 'lesion'), ('birads', 'density')
SLOTS = dict(image=('image',), breast=('CC', 'MLO'), exam=('RCC', 'LCC', 'RMLO', 'LMLO'))       # DBT-DINO's order
POOLS = dict(cls_mean=(0,), cls_mean_std=(0, 2), patch_mean=(1,), patch_mean_std=(1, 3))        # of `statistics`
RECIPES = dict(mlp=dict(pool='cls_mean', freeze=False, epochs=30),
               linear=dict(pool='patch_mean_std', freeze=True, epochs=75, lr=1e-3, rates=(1e-5, 1e-2)),
               hazard=dict(pool='patch_mean_std', freeze=True, epochs=100, lr=3e-4, rates=(1e-5, 1e-3)),
               knn=dict(pool='cls_mean', freeze=True, epochs=0))


def parse(config, argv, demo=None, source='data'):
    """Flags -> config. `demo` replaces the defaults where the flag `source`, which names the data, is not given."""
    parser = argparse.ArgumentParser(usage=f'{Path(sys.argv[0]).name} [--{source} DIR] [options]; --help lists them',
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for f in fields(config):
        text = f"{f.metadata['help']} [{f.metadata['source']}] (default: {f.default})".replace('%', '%%')
        kind = next((t for t in (bool, int, float) if t.__name__ in str(f.type)), str)
        if kind is bool:
            parser.add_argument(f'--{f.name}', action=argparse.BooleanOptionalAction, help=text)
        else:
            many = '+' if '...' in str(f.type) else len(f.default) if isinstance(f.default, tuple) else None
            parser.add_argument(f'--{f.name}', type=kind, nargs=many, help=text)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    return config(**({} if source in given else demo or {}) | given)


def setup():
    """-> rank, ranks, device. There is always a process group: NCCL or gloo under torchrun, one of one without."""
    cuda = torch.cuda.is_available()
    backend = 'nccl' if cuda else 'gloo'
    if 'RANK' in os.environ:
        device = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if cuda else torch.device('cpu')
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=timedelta(hours=6))                    # rank 0 reads a million headers
    else:
        device = torch.device('cuda' if cuda else 'cpu')
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def resolved(cfg, ranks=1):
    """The configuration with its Nones filled in by head, data set and task; ValueError for what cannot work."""
    choices = dict(dataset=DATASETS, task=TASKS, head=RECIPES, pool=(None, *POOLS), level=(None, *SLOTS),
                   cancer_rule=(None, 'birads5', 'birads45', 'unlisted'))
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise ValueError(f"--{name} {getattr(cfg, name)}: expected {', '.join(a for a in allowed if a)}")
    if (cfg.head == 'hazard') != (cfg.task == 'risk'):
        raise ValueError(f'--head {cfg.head} with --task {cfg.task}: risk and the hazard head belong together')
    recipe = RECIPES[cfg.head]
    freeze = recipe['freeze'] if cfg.freeze is None else cfg.freeze
    if cfg.head == 'knn' and not freeze:
        raise ValueError('--head knn trains nothing, so there is nothing to finetune; drop --no-freeze')
    level = cfg.level or LEVELS.get((cfg.dataset, cfg.task)) or LEVELS.get(cfg.dataset, 'image')
    if cfg.dataset == 'mias' and level != 'image':
        raise ValueError(f'--level {level}: mini-MIAS has MLO views only; use --level image')
    cfg = replace(cfg, freeze=freeze, level=level, pool=cfg.pool or recipe['pool'],
                  epochs=recipe['epochs'] if cfg.epochs is None else cfg.epochs,
                  lr=(recipe.get('lr', 1e-3) if freeze else 1e-4) if cfg.lr is None else cfg.lr,
                  slices=cfg.slices or (0 if freeze else 4), fraction=tuple(sorted(set(cfg.fraction))))
    wrong = [f'--{name} {getattr(cfg, name)} must be above 0 and finite' for name in (
        'draws', 'chunk', 'batch', 'micro_batch', 'lr', 'layer_decay', 'clip', 'hidden', 'neighbours')
        if not 0 < getattr(cfg, name) < math.inf]
    wrong += [f'--{name} {getattr(cfg, name)} must not be negative' for name in (
        'seed', 'size', 'slices', 'workers', 'max_bad', 'epochs', 'search', 'wd', 'phantoms') if getattr(cfg, name) < 0]
    wrong += [f'--fraction {share} must lie above 0 and at most at 1' for share in cfg.fraction if not 0 < share <= 1]
    if cfg.classes and cfg.task in BINARY and len(cfg.classes) != 2:
        wrong.append(f'--classes {" ".join(cfg.classes)}: --task {cfg.task} takes two, the negative first')
    if cfg.epochs == 0 and cfg.head != 'knn':
        wrong.append('--epochs 0 trains nothing')
    if not freeze and cfg.batch % ranks:
        wrong.append(f'--batch {cfg.batch} does not divide among {ranks} ranks')
    if not freeze and cfg.search:
        wrong.append('--search tries heads on frozen features; when finetuning, run each --lr by itself')
    if wrong:
        raise ValueError('; '.join(wrong))
    return cfg


# ---- statistics (DBT-DINO 2.5) --------------------------------------------------------------------------------------

def auc(y, s):
    """Area under the ROC curve = P(score of a positive > score of a negative), ties counting half (Mann-Whitney).
    y (n,) 0 or 1, s (n,) scores. NaN where one class is absent."""
    y = np.asarray(y) > 0
    m, n = y.sum(), (~y).sum()
    if m == 0 or n == 0:
        return math.nan
    return float((stats.rankdata(s)[y].sum() - m * (m + 1) / 2) / (m * n))


def _placements(y, s):
    """DeLong's components from midranks (Sun & Xu 2014): for each positive the share of negatives it beats (m,), for
    each negative the share of positives that beat it (n,)."""
    y, s = np.asarray(y) > 0, np.asarray(s, float)
    ranks, m, n = stats.rankdata(s), y.sum(), (~y).sum()
    return (ranks[y] - stats.rankdata(s[y])) / n, 1 - (ranks[~y] - stats.rankdata(s[~y])) / m


def _delong(y, scores):
    """AUCs (k,) of k models and their covariance (k, k)."""
    positives, negatives = (np.stack(part) for part in zip(*(_placements(y, s) for s in scores)))
    if min(positives.shape[1], negatives.shape[1]) < 2:     # a single case has no variance
        return positives.mean(1), np.full((len(scores),) * 2, math.nan)
    covariance = np.cov(positives) / positives.shape[1] + np.cov(negatives) / negatives.shape[1]
    return positives.mean(1), np.atleast_2d(covariance)


def delong(y, s1, s2):
    """DeLong's test of two models on the same cases -> (auc1, auc2, p), two-sided. It takes cases as independent;
    where a patient has several, trust the bootstrap by patient. Equal scores give p = 1; NaN with fewer than two
    cases of a class."""
    a1, a2 = auc(y, s1), auc(y, s2)
    if math.isnan(a1):
        return a1, a2, math.nan
    if np.array_equal(stats.rankdata(s1), stats.rankdata(s2)):
        return a1, a2, 1.0
    covariance = _delong(y, (s1, s2))[1]
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if variance < 1e-18:                                    # no variance to test against
        return a1, a2, 1.0 if a1 == a2 else math.nan
    return a1, a2, float(2 * stats.norm.sf(abs(a1 - a2) / math.sqrt(variance)))


def delong_interval(y, s, level=0.95):
    """Normal interval (low, high) of one AUC with DeLong's variance, clipped to 0..1. It collapses at AUC 1."""
    area, variance = _delong(y, (s,))
    half = stats.norm.ppf(0.5 + level / 2) * math.sqrt(variance[0, 0])
    return float(max(area[0] - half, 0)), float(min(area[0] + half, 1))


def confusion(y, yhat, classes):
    """Counts (C, C), truth by row, prediction by column. `classes`: their number, or the labels themselves."""
    labels = np.arange(classes) if np.ndim(classes) == 0 else np.asarray(classes)
    return ((np.asarray(y)[:, None] == labels).T.astype(float) @ (np.asarray(yhat)[:, None] == labels)).astype(int)


def f1(y, yhat, classes, average='macro'):
    """2 TP / (2 TP + FP + FN), 0 where a class neither occurs nor is predicted.

    average: 'macro', the plain mean over all classes, absent ones too (DBT-DINO 6.2.1; MammoDINO does not say);
    'weighted', by true frequency; 'micro', over all cases, which is accuracy.
    """
    table = confusion(y, yhat, classes)
    hits, true, predicted = np.diag(table), table.sum(1), table.sum(0)
    if average == 'micro':
        return float(2 * hits.sum() / max(true.sum() + predicted.sum(), 1))
    each = 2 * hits / np.maximum(true + predicted, 1)
    if average not in ('macro', 'weighted'):
        raise ValueError(f"average {average!r}: expected 'macro', 'weighted' or 'micro'")
    return float(each.mean() if average == 'macro' else (each * true).sum() / max(true.sum(), 1))


def kappa(y, yhat, classes):
    """Cohen's kappa with quadratic weights (i - j)^2 over all classes, for ordered ones. NaN where truth and
    prediction are one and the same single class."""
    table = confusion(y, yhat, classes)
    i = np.arange(len(table))
    weight = np.square(i[:, None] - i)
    chance = np.outer(table.sum(1), table.sum(0)) / max(table.sum(), 1)
    return float(1 - (weight * table).sum() / (weight * chance).sum()) if (weight * chance).any() else math.nan


def mcnemar(a, b):
    """McNemar's test of two models, a and b (n,) correct or not on the same cases -> p, two-sided. Exact below 25
    discordant cases, chi-squared with continuity correction from there on; 1 for equal models."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    first, second = int((a & ~b).sum()), int((b & ~a).sum())
    if first + second < 25:
        return float(min(1.0, 2 * stats.binom.cdf(min(first, second), first + second, 0.5)))
    return float(stats.chi2.sf((abs(first - second) - 1) ** 2 / (first + second), 1))


def benjamini_hochberg(p):
    """Adjusted p values (n,): reject those <= alpha to hold the false discovery rate. p_(i) n / i, made monotone."""
    p = np.asarray(p, float)
    order = np.argsort(p)[::-1]
    adjusted = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)[np.argsort(order)]


def in_year(y, mask):
    """Who takes part in the AUROC of each year, bool (n, T), as in DBT-DINO's code: the cancers observed at t, which
    are those of year t since follow-up ends with them, and of those without cancer in all T years the observed."""
    y = np.asarray(y) > 0
    return (np.asarray(mask) > 0) & (y | ~y.any(1, keepdims=True))


def yearly_auc(y, mask, p):
    """AUROC of each year (T,) under censoring: y 0 or 1 (cancer by then), mask 1 where observed, p, all (n, T)."""
    y, p, use = np.asarray(y) > 0, np.asarray(p), in_year(y, mask)                      # (n, T) each
    return np.array([auc(y[use[:, t], t], p[use[:, t], t]) for t in range(y.shape[1])])


def resample(metric, arrays, groups, rng, n=1000):
    """metric(*arrays) on n bootstrap draws (n,): groups (patients, phantoms) are drawn with replacement, their rows
    stay together. NaN where the metric is not defined on a draw."""
    _, group = np.unique(groups, return_inverse=True)
    rows = np.split(np.argsort(group, kind='stable'), np.cumsum(np.bincount(group))[:-1])
    values = np.empty(n)
    for i in range(n):
        drawn = np.concatenate([rows[g] for g in rng.integers(len(rows), size=len(rows))])
        values[i] = metric(*(a[drawn] for a in arrays))
    return values


def bootstrap(metric, arrays, groups, rng, n=1000):
    """95 % percentile interval (low, high) of metric(*arrays) over patients; draws where it is NaN are left out."""
    values = resample(metric, arrays, groups, rng, n)
    return tuple(np.percentile(values[~np.isnan(values)], [2.5, 97.5])) if not np.isnan(values).all() else (np.nan,) * 2


def knn(similarity, labels, k=10, temp=0.07):
    """Weighted k-nearest-neighbour vote (DINO): similarity (n, m), labels (m,) from 0 up -> each class's share of the
    vote (n, C). A square similarity with -inf on the diagonal leaves one out."""
    near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]                           # (n, k)
    weight = np.exp((np.take_along_axis(similarity, near, 1) - similarity.max(1, keepdims=True)) / temp)
    votes = np.stack([(weight * (labels[near] == c)).sum(1) for c in range(labels.max() + 1)], axis=1)
    return votes / votes.sum(1, keepdims=True)


# ---- cumulative hazard (DBT-DINO 6.2.2; Yala 2021) ------------------------------------------------------------------

YEARS = 5


def follow_up(years_to_cancer, years_followup, years=YEARS):
    """One exam -> y (T,), mask (T,), or None where nothing was observed or cancer came before. Years after the exam:
    cancer in year c < T, from 0, gives y = 1 from c on and is observed up to c; no cancer, `years_followup` years."""
    cancer, year = years_to_cancer < years, np.arange(years)
    first = math.floor(years_to_cancer) if cancer else years
    last = first + 1 if cancer else math.floor(min(years_followup, years))
    return ((year >= first).astype(int), (year < last).astype(int)) if last > 0 and first >= 0 else None


def cumulative(x, W, b):
    """H_t = sum_{k<=t} softplus(W_k x + b_k): x (B, F), W (T, F), b (T,) -> (B, T), which never falls."""
    return F.softplus(F.linear(x, W, b)).cumsum(-1)


def hazard(x, W, b):
    """p_t = 1 - exp(-H_t): the risk of cancer within t years, (B, T)."""
    return -torch.expm1(-cumulative(x, W, b))


def hazard_loss(H, y, mask, weight=None):
    """Cross-entropy of p = 1 - exp(-H) in log space, where log(1 - p) = -H exactly and nothing saturates:
    (1 - y) H - y log(1 - exp(-H)), mean over the observed years of an exam, then over exams by `weight` (B,).

    H (B, T) cumulative hazards above 0, y (B, T) 0 or 1, mask (B, T) 1 where observed. Exams never observed count not.
    """
    H, y, mask = H.double(), y.double(), mask.double()
    each = (1 - y) * H - y * torch.log(-torch.expm1(-H.clamp_min(1e-30)))               # (B, T)
    seen = mask.sum(-1)
    weight = (seen > 0).double() * (1 if weight is None else weight)
    return ((each * mask).sum(-1) / seen.clamp_min(1) * weight).sum() / weight.sum().clamp_min(1e-30)


# ---- data sets: published layout -> rows ----------------------------------------------------------------------------

@dataclass
class Row:
    """One file, or one frame of it, with its label. An official `split` is kept; '' lets `assign` choose."""
    path: str
    label: str | np.ndarray | None                          # a class; risk: (T,), 1 cancer by then, 0 none, -1 unseen
    patient: str
    exam: str
    laterality: str = ''                                    # L or R
    view: str = ''                                          # CC, MLO, ...
    split: str = ''                                         # train, val or test
    frame: int | None = None                                # None: every slice of the file
    record: dict = field(default_factory=dict)              # its line of the label file, for --subgroup
    readable: bool = True                                   # until its file turns out not to be


REFUSED = {
    ('rsna', 'lesion'): 'RSNA has no lesion labels; BI-RADS 0 (recalled) comes nearest: --task birads',
    ('rsna', 'lesion_type'): 'RSNA has no lesion labels',
    ('ddsm', 'lesion'): 'CBIS-DDSM has no normal breasts, every image has a lesion; add normals of DDSM or MINI-DDSM '
                        'and use --dataset csv',
    ('cmmd', 'birads'): 'CMMD has no BI-RADS; TOMPEI-CMMD adds it for MLO views: join its sheet and use --dataset csv',
    ('cmmd', 'density'): 'CMMD has no density; TOMPEI-CMMD adds it for MLO views: join its sheet and use --dataset csv',
    ('cesm', 'lesion_type'): 'CDD-CESM lists findings as free text, several for an image; choose a rule, write a '
                             'manifest and use --dataset csv',
    ('mias', 'birads'): 'mini-MIAS has no BI-RADS; --task density has its own three classes, F G D'}
LEVELS = {'rsna': 'breast', 'vindr': 'breast', 'cmmd': 'breast', ('vindr', 'lesion'): 'image',
          ('vindr', 'lesion_type'): 'image', ('csv', 'risk'): 'exam'}                   # as their labels are given


def table(path, *columns):
    """A CSV or the sheet of an .xlsx (`FILE.xlsx:SHEET`) -> list of dicts, names and values stripped. ValueError
    where a column is missing, with what was found."""
    path = str(path)
    if re.search(r'\.xlsx(:|$)', path):
        lines = _xlsx(*path.split('.xlsx:')) if '.xlsx:' in path else _xlsx(path.removesuffix('.xlsx'))
    else:
        try:
            with open(path, newline='', encoding='utf-8-sig') as file:
                lines = [line for line in csv.reader(file) if any(map(str.strip, line))]
        except FileNotFoundError:
            raise ValueError(f'{path}: no such file; --root is the folder that holds it') from None
        except (UnicodeDecodeError, csv.Error) as problem:
            raise ValueError(f'{path}: not a CSV in UTF-8 ({problem})') from None
    header = [name.strip() for name in lines[0]] if lines else []
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; found {', '.join(header) or 'nothing'}")
    if len(lines) < 2:
        raise ValueError(f'{path}: a header and no rows')
    return [dict(zip(header, (_blank(value.strip()) for value in line + [''] * len(header)))) for line in lines[1:]]


def _blank(text):
    """What stands for no value in label files."""
    return '' if text.lower() in ('nan', 'na', 'n/a', 'null', 'none') else text


def _xlsx(stem, sheet=None):
    """The cells of one sheet, the first by default, as lists of strings. An .xlsx is a zip of XML files: sheets hold
    numbers, or indices into one list of strings."""
    path = f'{stem}.xlsx'
    try:
        with zipfile.ZipFile(path) as book:
            if sum(part.file_size for part in book.infolist()) > 200_000_000:
                raise ValueError('it unpacks to more than 200 MB')

            def xml(name):
                return ElementTree.fromstring(book.read(name))

            def text(element):
                return ''.join(t.text or '' for t in element.findall('.//{*}t'))

            shared = 'xl/sharedStrings.xml'
            strings = [text(item) for item in xml(shared)] if shared in book.namelist() else []
            links = {s.get('name').strip(): next(v for k, v in s.items() if k.endswith('}id'))
                     for s in xml('xl/workbook.xml').findall('.//{*}sheet')}
            if sheet is not None and sheet not in links:
                raise ValueError(f"no sheet {sheet!r}; found {', '.join(links)}")
            targets = {r.get('Id'): r.get('Target') for r in xml('xl/_rels/workbook.xml.rels')}
            target = targets[links[sheet] if sheet is not None else list(links.values())[0]]
            lines = []
            for line in xml(target.lstrip('/') if target.startswith('/') else f'xl/{target}').findall('.//{*}row'):
                cells = {}
                for cell in line.findall('{*}c'):
                    value = text(cell) if cell.get('t') == 'inlineStr' else cell.findtext('{*}v') or ''
                    column = re.match('[A-Z]+', cell.get('r'))[0]
                    cells[len(column), column] = strings[int(value)] if cell.get('t') == 's' else value
                lines.append(cells)
    except FileNotFoundError:
        raise ValueError(f'{path}: no such file; --root is the folder that holds it') from None
    except (ValueError, LookupError, TypeError, StopIteration, zipfile.BadZipFile, ElementTree.ParseError) as problem:
        raise ValueError(f'{path}: not a readable .xlsx ({problem}); open it and save it again as .xlsx') from None
    columns = sorted(lines[0]) if lines else []                                         # A … Z, AA …
    return [[line.get(column, '') for column in columns] for line in lines if line]


def _images(cfg):
    """Every image file of the data set, prepared ones where --images is given."""
    return mask.listing(cfg.images or cfg.root)


def _prepared(cfg, path):
    """Where a file of --root lies: below --images under the name `mask.py prepare` gave it, or itself."""
    if cfg.images is None or Path(path).is_relative_to(cfg.images):
        return path
    root = Path(cfg.root) if os.path.isdir(cfg.root) else Path(cfg.root).parent
    if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)):
        raise ValueError(f'{path} lies outside {root}, so --images cannot mirror it; drop --images or move the list')
    mirror = Path(cfg.images) / os.path.relpath(path, root)
    named = mirror.suffix.lower() in mask.SUFFIXES
    prepared = mirror.with_suffix('.npy') if named else Path(f'{mirror}.npy')
    return str(mirror if mirror.exists() else prepared)


def _found(rows):
    """The labels that occur, in order, as classes."""
    return tuple(sorted({row.label for row in rows if isinstance(row.label, str)}))


def _number(text):
    """'2.0' -> '2': pandas writes a column with blanks as floats."""
    return text.removesuffix('.0')


def rsna(cfg):
    """RSNA 2022 (Kaggle): train.csv, train_images/<patient>/<image>.dcm. One label per breast, copied to each image.
    BI-RADS is 1, 2 or 0 (recalled, which gives cancer away) on half of the images; density is blank for site 2."""
    column = dict(cancer='cancer', birads='BIRADS', density='density')[cfg.task]
    classes = dict(cancer=('0', '1'), birads=('1', '2', '0'), density=tuple('ABCD'))[cfg.task]
    records = table(Path(cfg.root) / 'train.csv', 'patient_id', 'image_id', 'laterality', 'view', column)
    return classes, [Row(f"{cfg.root}/train_images/{r['patient_id']}/{r['image_id']}.dcm", _number(r[column]) or None,
                         r['patient_id'], r['patient_id'], r['laterality'], r['view'], record=r) for r in records]


def vindr(cfg):
    """VinDr-Mammo: breast-level_annotations.csv, finding_annotations.csv, images/<study>/<image>.dicom, official split.
    lesion: the image has a box. lesion_type: the first category of its largest box; images without one take no part."""
    records = table(Path(cfg.root) / 'breast-level_annotations.csv', 'study_id', 'image_id', 'laterality',
                    'view_position', 'breast_birads', 'breast_density', 'split')
    if cfg.task == 'cancer' and cfg.cancer_rule not in ('birads5', 'birads45'):
        raise ValueError('VinDr has no cancer label; choose a rule: --cancer_rule birads5 (226 images) or '
                         'birads45 (988)')
    largest = defaultdict(lambda: (0.0, None))              # image -> area and category of its largest box
    if cfg.task in ('lesion', 'lesion_type'):
        for f in table(Path(cfg.root) / 'finding_annotations.csv', 'image_id', 'finding_categories', 'xmin', 'ymin',
                       'xmax', 'ymax'):
            categories = [c for c in re.findall("'([^']+)'", f['finding_categories']) if c != 'No Finding']
            if categories and f['xmin']:
                try:
                    x0, y0, x1, y1 = (float(f[name]) for name in ('xmin', 'ymin', 'xmax', 'ymax'))
                except ValueError:
                    raise ValueError(f"{cfg.root}/finding_annotations.csv: {f['image_id']} has a box that is no "
                                     'numbers') from None
                area = (x1 - x0) * (y1 - y0)
                largest[f['image_id']] = max(largest[f['image_id']], (area, categories[0]), key=lambda x: x[0])
    suspicious = {'birads5': '5', 'birads45': '45'}.get(cfg.cancer_rule, '')

    def label(r):
        grade = r['breast_birads'].removeprefix('BI-RADS ')
        finding = largest[r['image_id']][1]
        return dict(birads=grade, density=r['breast_density'].removeprefix('DENSITY '), lesion_type=finding,
                    cancer=grade and str(int(grade in suspicious)),
                    lesion=str(int(finding is not None)))[cfg.task] or None

    rows = [Row(f"{cfg.root}/images/{r['study_id']}/{r['image_id']}.dicom", label(r), r['study_id'], r['study_id'],
                r['laterality'], r['view_position'], r['split'].removesuffix('ing'), record=r) for r in records]
    return dict(birads=tuple('12345'), density=tuple('ABCD'), lesion_type=_found(rows)).get(cfg.task, ('0', '1')), rows


def ddsm(cfg):
    """CBIS-DDSM: {mass,calc}_case_description_{train,test}_set.csv, one row per abnormality, official split. A film is
    one row: malignant, BI-RADS and density are the highest of its abnormalities; a film with a mass and a
    calcification is `both`. Found by its folder, Mass-Training_P_00001_LEFT_CC, or by its series UID: the other UIDs
    changed when the archive was packed again, and the ROI columns, which may be swapped, are not needed."""
    sides, films, missing = dict(LEFT='L', RIGHT='R'), defaultdict(list), []
    verdicts = dict(MALIGNANT='1', BENIGN='0', BENIGN_WITHOUT_CALLBACK='0')
    for kind in ('mass', 'calc'):
        for split in ('train', 'test'):
            path = Path(cfg.root) / f'{kind}_case_description_{split}_set.csv'
            if not path.exists():
                missing.append(path.name)
                continue
            density = 'breast_density' if kind == 'mass' else 'breast density'
            for r in table(path, 'patient_id', density, 'left or right breast', 'image view', 'abnormality type',
                           'assessment', 'pathology', 'image file path'):
                r['density'] = '' if r[density] == '0' else r[density]
                side = r['left or right breast']
                films[split, r['patient_id'], sides.get(side.upper(), side), r['image view']].append(r)
    if len(missing) == 4:
        raise ValueError(f'{cfg.root}: none of the four case_description CSVs of CBIS-DDSM, such as {missing[0]}')

    def label(found):
        kinds = {'calcification' if r['abnormality type'].startswith('calc') else 'mass' for r in found}
        return dict(cancer=max(verdicts.get(r['pathology'], r['pathology']) for r in found),
                    birads=max(r['assessment'] for r in found), density=max(r['density'] for r in found),
                    lesion_type='both' if len(kinds) == 2 else kinds.pop())[cfg.task] or None

    places = {}
    for path in _images(cfg):
        for part in Path(path).parts[:-1]:
            places.setdefault(part, path)
    rows = []
    for (split, patient, side, view), found in films.items():
        folder, *rest = (part.strip('" \n') for part in found[0]['image file path'].split('/'))
        series = rest[-2] if len(rest) > 1 else None
        path = places.get(folder) or places.get(series) or f'{cfg.root}/{folder}'
        rows.append(Row(path, label(found), patient, patient, side, view, split, record=found[0]))
    return dict(birads=_found(rows), density=tuple('1234'), lesion_type=('calcification', 'mass', 'both')
                ).get(cfg.task, ('0', '1')), rows


CMMD_TWINS = ('D1-0202', 'D2-0284'), ('D1-0808', 'D1-1292')     # the same pixels under two names: neither is used


def cmmd(cfg):
    """CMMD: CMMD_clinicaldata_revision.xlsx, one row per breast, and DICOM below <ID1>/; side and view come from the
    headers. cancer: Malignant against Benign; the 1,458 images of breasts without a row take part only under
    --cancer_rule unlisted, as negatives. lesion: the breast has a row. lesion_type: mass, calcification or both."""
    listed = {(r['ID1'], r['LeftRight']): r for r in table(Path(cfg.root) / 'CMMD_clinicaldata_revision.xlsx', 'ID1',
                                                           'LeftRight', 'abnormality', 'classification')}
    rows = []
    for path in tqdm(mask.listing(cfg.root), desc='reading headers', unit='file', delay=2):
        patient = next((part for part in Path(path).parts if re.fullmatch(r'D[12]-\d{4}', part)), None)
        if patient is None or Path(path).suffix.lower() == '.npy':
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True,
                                     specific_tags=['ImageLaterality', 'ViewCodeSequence'])
            side, meaning = header.ImageLaterality, header.ViewCodeSequence[0].CodeMeaning
        except Exception as problem:
            tqdm.write(f'skipped: {path}: no laterality and view ({type(problem).__name__})', file=sys.stderr)
            continue
        r = listed.get((patient, side))
        label = dict(cancer=r and dict(Malignant='1', Benign='0').get(r['classification'], r['classification']),
                     lesion=str(int(r is not None)), lesion_type=r and r['abnormality'])[cfg.task] or None
        if r is None and cfg.task == 'cancer' and cfg.cancer_rule == 'unlisted':
            label = '0'
        if any(patient in pair for pair in CMMD_TWINS):
            label = None
        rows.append(Row(path, label, patient, patient, side, 'CC' if meaning.startswith('cranio') else 'MLO',
                        record=r or {}))
    return ('calcification', 'mass', 'both') if cfg.task == 'lesion_type' else ('0', '1'), rows


def cesm(cfg):
    """CDD-CESM: 'Radiology manual annotations.xlsx', sheet 'all', and the low-energy JPEGs; one row per lesion, of
    which the worst counts, as in a BI-RADS of "4$5". BI-RADS 6 (known cancer) takes no part. The split that the
    authors' script writes ({training,testing}_set_pathology.csv) is used where it lies beside; it mixes patients."""
    root, name, verdict = Path(cfg.root), 'Image_name', 'Pathology Classification/ Follow up'
    files = {Path(path).stem.strip(): path for path in _images(cfg)}
    split = {r[name]: part for part in ('train', 'test') if (root / f'{part}ing_set_pathology.csv').exists()
             for r in table(root / f'{part}ing_set_pathology.csv', name)}
    images = defaultdict(list)
    sheet = next(root.glob('Radiology?manual?annotations.xlsx'), root / 'Radiology manual annotations.xlsx')
    for r in table(f'{sheet}:all', name, 'Patient_ID', 'Side', 'Type', 'View', 'BIRADS',
                   'Breast density (ACR)', verdict):
        if r['Type'] == 'DM':
            images[r[name]].append(r)

    def label(found):
        grades = [_number(g) for r in found for g in r['BIRADS'].split('$') if g.strip()]
        worst = max((r[verdict] for r in found), key=lambda v: ('Normal', 'Benign', 'Malignant', v).index(v))
        return dict(cancer=dict(Normal='0', Benign='0', Malignant='1').get(worst, worst),
                    lesion=dict(Normal='0', Benign='1', Malignant='1').get(worst, worst),
                    density=found[0]['Breast density (ACR)'].upper().strip('_'),
                    birads='' if '6' in grades else max(grades, default=''))[cfg.task] or None

    rows = [Row(files.get(image, f"{root}/Low energy images of CDD-CESM/{image}.jpg"), label(found),
                _number(found[0]['Patient_ID']), _number(found[0]['Patient_ID']), found[0]['Side'][:1].upper(),
                found[0]['View'], split.get(image, ''), record=found[0]) for image, found in images.items()]
    return dict(birads=_found(rows), density=tuple('ABCD')).get(cfg.task, ('0', '1')), rows


def mias(cfg):
    """mini-MIAS: Info.txt and mdb001 … mdb322 (MLO film; mdb001 and mdb002 are one patient). density F, G, D; lesion:
    anything but NORM; cancer: malignant; lesion_type: the class of the first finding. Odd is R as Info.txt has it."""
    info = Path(cfg.root) / 'Info.txt'
    if not info.exists():
        raise ValueError(f'{info}: no such file; --root is the folder that holds it')
    films, files = defaultdict(list), {Path(path).stem: path for path in _images(cfg)}
    for line in info.read_text(errors='replace').splitlines():
        found = re.match(r'(mdb\d{3}) +([FGD]) +(\w+)(?: +([BM])\b)?', line)
        if found:
            films[found[1]].append(found)
    rows = []
    for film, found in films.items():
        number, kinds = int(film[3:]), [f[3] for f in found if f[3] != 'NORM']
        label = dict(density=found[0][2], lesion=str(int(bool(kinds))), lesion_type=kinds[0] if kinds else None,
                     cancer=str(int(any(f[4] == 'M' for f in found))))[cfg.task]
        patient = f'{(number + 1) // 2:03d}'
        rows.append(Row(files.get(film, f'{cfg.root}/{film}.pgm'), label, patient, patient, 'R' if number % 2 else 'L',
                        'MLO', record=dict(density=found[0][2], severity=found[0][4] or 'N')))
    return dict(density=tuple('FGD'), lesion_type=('ARCH', 'ASYM', 'CALC', 'CIRC', 'MISC', 'SPIC')
                ).get(cfg.task, ('0', '1')), rows


def manifest(cfg):
    """A CSV of your own, at --root or as manifest.csv in it: path (from the CSV's folder) and patient; `label`, or a
    column named as the task; risk: years_to_cancer (blank: none seen) and years_followup. Optional: frame, exam,
    laterality, view, split, and whatever --subgroup asks for. A patient in two splits is an error."""
    path = Path(cfg.root) / 'manifest.csv' if os.path.isdir(cfg.root) else Path(cfg.root)
    records = table(path, 'path', 'patient', *(('years_to_cancer', 'years_followup') if cfg.task == 'risk' else ()))
    column = cfg.task if cfg.task in records[0] else 'label'
    if cfg.task != 'risk' and column not in records[0]:
        raise ValueError(f"{path}: no column label or {cfg.task}; found {', '.join(records[0])}")

    def label(number, r):
        if cfg.task != 'risk':
            value = r[column] if cfg.classes else _number(r[column])
            return (value.lower() if cfg.task == 'density' and not cfg.classes else value) or None
        try:
            cancer, followed = (float(r[name] or math.inf) for name in ('years_to_cancer', 'years_followup'))
            if -math.inf in (cancer, followed):
                raise ValueError
            followed = followed if r['years_followup'] else cancer if r['years_to_cancer'] else 0    # free until then
            seen = follow_up(cancer, followed)
            return seen and np.where(seen[1], seen[0], -1)
        except ValueError:
            raise ValueError(f"{path}, line {number}: years_to_cancer {r['years_to_cancer']!r}, years_followup "
                             f"{r['years_followup']!r}: expected numbers") from None

    rows, names, seen = [], dict(training='train', validation='val'), {}
    for number, r in enumerate(records, 2):
        if not r['patient'] or not r['path']:
            raise ValueError(f'{path}, line {number}: path and patient must not be blank')
        if r.get('frame') and not r['frame'].isdecimal():
            raise ValueError(f"{path}, line {number}: frame {r['frame']!r} is no number of a slice")
        split = r.get('split', '').lower()
        rows.append(Row(str(path.parent / r['path']), label(number, r), r['patient'], r.get('exam') or r['patient'],
                        r.get('laterality', '')[:1].upper(), r.get('view', '').upper(), names.get(split, split),
                        int(r['frame']) if r.get('frame') else None, r))
        key = os.path.normpath(rows[-1].path), rows[-1].frame
        if seen.setdefault(key, number) != number:
            raise ValueError(f"{path}, line {number}: {r['path']} stands in line {seen[key]} already")
    found = dict(density=tuple('abcd'), birads=_found(rows), lesion_type=_found(rows), risk=())
    return cfg.classes or found.get(cfg.task, ('0', '1')), rows


DATASETS = dict(rsna=rsna, vindr=vindr, ddsm=ddsm, cmmd=cmmd, cesm=cesm, mias=mias, csv=manifest)


# ---- rows -> splits -> units ----------------------------------------------------------------------------------------

def load(cfg):
    """Rows of the data set with labels as numbers, files that exist and a split each. -> rows, classes, notes: what
    was left out and why, one sentence each."""
    if cfg.task == 'risk' and cfg.dataset != 'csv':
        raise ValueError(f'{cfg.dataset} has no follow-up; --task risk takes --dataset csv with years_to_cancer and '
                         'years_followup')
    if (cfg.dataset, cfg.task) in REFUSED:
        raise ValueError(REFUSED[cfg.dataset, cfg.task])
    classes, rows = DATASETS[cfg.dataset](cfg)
    notes, total = [], len(rows)
    rows = [row for row in rows if row.label is not None]
    if total > len(rows):
        notes.append(f'{total - len(rows)} of {total} images have no {cfg.task} label and take no part')
    for row in rows:
        if cfg.task != 'risk':
            if row.label not in classes or cfg.task == 'birads' and row.label not in tuple('0123456'):
                hint = '; --classes names others' if cfg.dataset == 'csv' else ''
                raise ValueError(f"{row.path}: {cfg.task} {row.label!r} is none of {', '.join(classes)}{hint}")
            row.label = classes.index(row.label)
        row.path = _prepared(cfg, row.path)
    absent = {row.path for row in rows if not os.path.isfile(row.path)}
    if absent:
        notes.append(f"{len(absent)} files of the label file are not there and take no part, the first: {min(absent)}")
        if len(absent) > cfg.max_bad * len(rows):
            raise ValueError(f'{notes[-1]}; --max_bad is {cfg.max_bad}. Is --root, or --images, the right folder?')
    rows = [row for row in rows if row.path not in absent]
    return assign(cfg, rows, notes), classes, notes


def _by_label(rows, seed):
    """Patients -> lists of them, one list for each highest label, in an order that only the seed changes."""
    worst = defaultdict(int)
    for row in rows:
        worst[row.patient] = max(worst[row.patient], int(np.max(row.label)))
    groups = defaultdict(list)
    for patient in sorted(worst, key=lambda name: hashlib.sha256(f'{seed} {name}'.encode()).digest()):
        groups[worst[patient]].append(patient)
    return groups.values()


def assign(cfg, rows, notes):
    """Every row's split. Official training and test sets stay; a patient in both keeps only the test rows. Without a
    test set a fifth of the patients of each label becomes one, without a validation set a fifth of the others."""
    names = {row.split for row in rows}
    if names - {'train', 'val', 'test'} and names != {''}:
        raise ValueError(f"splits {', '.join(sorted(map(repr, names)))}: expected train, val and test, or none at all")
    of = defaultdict(set)
    for row in rows:
        of[row.patient].add(row.split)
    leaks = sorted(patient for patient, splits in of.items() if len(splits) > 1)
    if leaks and cfg.dataset == 'csv':
        raise ValueError(f"{len(leaks)} patients are in two splits, the first: {leaks[0]} in "
                         f"{' and '.join(sorted(of[leaks[0]]))}")
    if leaks:
        kept = [row for row in rows if row.split == 'test' or row.patient not in leaks]
        notes.append(f'{len(leaks)} patients are in training and test of the official split; their '
                     f"{len(rows) - len(kept)} training images are dropped: {', '.join(leaks)}")
        rows = kept
    for split, free in (('test', ''), ('val', 'train')):
        if not any(row.split == split for row in rows):
            pool = [row for row in rows if row.split == free]
            taken = {p for group in _by_label(pool, cfg.seed) for p in group[:round(0.2 * len(group))]}
            for row in pool:
                row.split = split if row.patient in taken else 'train'
    return rows


@dataclass
class Unit:
    """What gets one prediction: an image, a breast or an exam."""
    name: str
    patient: str
    split: str
    target: int | np.ndarray                                # class; risk: (T,), 1 cancer by then, 0 none, -1 unobserved
    rows: list                                              # (number of the row, slot)
    record: dict


def units_of(cfg, rows, notes):
    """Rows -> units. A breast or exam takes its highest label, and no part where the types of its lesions differ."""
    slots, groups, others = SLOTS[cfg.level], defaultdict(list), Counter()              # groups: name -> rows
    for i, row in enumerate(rows):
        slot = dict(image='image', breast=row.view, exam=row.laterality + row.view)[cfg.level]
        if cfg.level != 'image' and not (row.view and row.laterality):
            raise ValueError(f'{row.path}: laterality or view is blank; --level {cfg.level} needs both')
        if slot not in slots:
            others[slot] += 1
            continue
        frame = '' if row.frame is None else f'#{row.frame}'
        exam = row.exam if row.exam == row.patient else f'{row.patient} {row.exam}'     # 1, 2, … in some label files
        name = dict(image=row.path + frame, breast=f'{exam} {row.laterality}', exam=exam)[cfg.level]
        groups[name].append((i, slots.index(slot)))
    if others:
        counted = ', '.join(f'{view} {n}' for view, n in others.most_common())
        notes.append(f"images of views other than {', '.join(slots)} take no part at {cfg.level} level: {counted}")
    units, mixed = [], 0
    for name, members in groups.items():
        labels, row = [rows[i].label for i, _ in members], rows[members[0][0]]
        if cfg.task == 'lesion_type' and len(set(labels)) > 1:
            mixed += 1
        else:
            units.append(Unit(name, row.patient, row.split, max(labels, key=np.max), members, row.record))
    if mixed:
        notes.append(f'{mixed} {cfg.level}s hold lesions of several types and take no part')
    return units


def parted(units, notes=()):
    """-> {split: units}; ValueError where a split holds nothing to learn from or to tell apart, with the notes on
    what was left out."""
    parts = {split: [unit for unit in units if unit.split == split] for split in ('train', 'val', 'test')}
    for split, part in parts.items():
        found = {int(np.max(unit.target)) for unit in part}
        if len(found) < 2:
            what = 'holds one class only, so there is nothing to tell apart' if found else 'is empty'
            raise ValueError('; '.join([f'the {split} split {what}: give it patients of each class', *notes]))
    return parts


def missing_views(cfg, rows, units):
    """{unit: [views of which it has no readable file]}"""
    slots = SLOTS[cfg.level]
    lacks = {unit.name: [view for slot, view in enumerate(slots) if slot not in {
        s for i, s in unit.rows if rows[i].readable}] for unit in units}
    return {name: views for name, views in lacks.items() if 0 < len(views) < len(slots)}


def share_of(units, share, seed):
    """A share of the training units, by patient and label; smaller shares lie in larger ones."""
    if share == 1:
        return units
    rows = [Row('', unit.target, unit.patient, '') for unit in units]
    kept = {p for group in _by_label(rows, seed) for p in group[:math.ceil(share * len(group))]}
    return [unit for unit in units if unit.patient in kept]


# ---- files -> features ----------------------------------------------------------------------------------------------

class Images:
    """Row i -> i, its images uint8 (n, S, S), squashed to the encoder's square (DBT-DINO 6.2.1), and None; or no image
    and the reason why the file cannot be read."""

    def __init__(self, cfg, rows, size):
        self.cfg, self.rows, self.size = cfg, rows, size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        try:
            frames = [row.frame] if row.frame is not None else self.spaced(mask.frames(row.path))
            return i, np.stack([self.squashed(row.path, frame) for frame in frames]), None
        except (ValueError, OSError) as problem:
            return i, np.zeros((0, self.size, self.size), np.uint8), str(problem)

    def spaced(self, count):
        """All slices, or the middles of `slices` equal parts of the volume."""
        wanted = min(self.cfg.slices or count, count)
        return [int((k + 0.5) * count / wanted) for k in range(wanted)]

    def squashed(self, path, frame):
        """Prepared .npy have their CLAHE behind them; every other file gets it here (MammoDINO 3.1)."""
        image = mask.read(path, frame)
        image = image if path.lower().endswith('.npy') else mask.clahe(image)
        return np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC))


def as_is(items):
    """Items of a batch, uncollated: they differ in their number of images."""
    return items


def pixels(images, device):
    """uint8 (n, S, S) -> float (n, 1, S, S) in [0, 1] on the device; bytes travel."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).unsqueeze(1).float() / 255


def token_sums(cls, patches):
    """Per image, in fp64: cls (n, D), patches (n, N, D) -> (n, 4, D) sum of CLS, of patches, and of their squares.
    Sums over slices add up, so that no volume of tokens is ever held."""
    cls, patches = cls.double(), patches.double()
    return torch.stack([cls, patches.sum(1), cls.square(), patches.square().sum(1)], dim=1)


def statistics(sums, images, patches):
    """sums (R, 4, D) of `images` (R,) images with `patches` patches each -> (R, 4, D) fp32: mean of CLS, mean of
    patches, deviation of CLS, deviation of patches, over slices and patches jointly and unbiased (DBT-DINO 2.4).
    Of a single image the deviation of CLS is 0."""
    count = torch.stack([images, images * patches], dim=-1).double().unsqueeze(-1)      # (R, 2, 1)
    mean = sums[:, :2] / count
    variance = (sums[:, 2:] - count * mean.square()) / (count - 1).clamp_min(1)
    return torch.cat([mean, variance.clamp_min(1e-12).sqrt()], dim=1).float()


def fingerprint(cfg, encoder, size, amp):
    """Names what the features depend on besides the file: weights, shape, size of the image, precision."""
    digest = hashlib.sha256(json.dumps([encoder.config, size, cfg.slices, amp]).encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def half(cfg, device):
    """Whether the encoder runs in bf16."""
    return device.type == 'cuda' if cfg.amp is None else cfg.amp


@torch.no_grad()
def encode(cfg, encoder, stacks, device):
    """The images of R rows, each uint8 (n, S, S), `chunk` at a time through the encoder -> statistics (R, 4, D)."""
    counts = torch.tensor([len(images) for images in stacks], device=device)
    owner = torch.arange(len(stacks), device=device).repeat_interleave(counts)          # (sum of n,)
    sums = torch.zeros(len(stacks), 4, encoder.config['width'], dtype=torch.float64, device=device)
    images = np.concatenate(stacks)                                                     # (sum of n, S, S)
    for start in range(0, len(images), cfg.chunk):
        part = slice(start, start + cfg.chunk)
        with torch.autocast(device.type, torch.bfloat16, enabled=half(cfg, device)):
            cls, patches = encoder(pixels(images[part], device))
        sums.index_add_(0, owner[part], token_sums(cls, patches))
    return statistics(sums, counts, patches.shape[1]).cpu().numpy()


def features(cfg, encoder, rows, device, wanted, cache=True):
    """Token statistics of the rows numbered in `wanted` -> float32 (R, 4, D); NaN for the others, and where a file is
    unreadable, which is named. Each rank computes a share of them and all ranks get all."""
    rank, ranks, size = dist.get_rank(), dist.get_world_size(), cfg.size or encoder.config['size']
    mine, places, found = sorted(wanted)[rank::ranks], {}, {}
    if cache:
        folder = Path(cfg.cache) / fingerprint(cfg, encoder, size, half(cfg, device))
        folder.mkdir(parents=True, exist_ok=True)
        for i in mine:
            file, row = os.stat(rows[i].path), rows[i]
            key = f'{os.path.abspath(row.path)} {file.st_size} {file.st_mtime_ns} {row.frame}'
            places[i] = folder / f'{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy'
            found |= {i: value for value in [cached(places[i], encoder.config['width'])] if value is not None}

    encoder.eval()
    batches = DataLoader(Images(cfg, rows, size), batch_size=8, sampler=[i for i in mine if i not in found],
                         num_workers=cfg.workers, collate_fn=as_is)
    for items in tqdm(batches, desc='encoding', unit='batch', disable=rank > 0, leave=False, delay=2):
        named(items)
        readable = [(i, images) for i, images, reason in items if not reason]
        if readable:
            numbers, stacks = zip(*readable)
            for i, value in zip(numbers, encode(cfg, encoder, stacks, device)):
                found[i] = value
                if cache:
                    part = places[i].with_suffix(f'.{os.uname().nodename}-{os.getpid()}.part')
                    with open(part, 'wb') as file:
                        np.save(file, value)
                    os.replace(part, places[i])

    everyone = [None] * ranks
    dist.all_gather_object(everyone, found)
    out = np.full((len(rows), 4, encoder.config['width']), np.nan, np.float32)
    for part in everyone:
        for i, value in part.items():
            out[i] = value
    bad = set(wanted).difference(*everyone)
    for i in bad:
        rows[i].readable = False
    if len(bad) == len(wanted) or len(wanted) >= 100 and len(bad) > cfg.max_bad * len(wanted):
        raise ValueError(f'{len(bad)} of {len(wanted)} files are unusable, --max_bad is {cfg.max_bad}; names are above')
    return torch.from_numpy(out)


def cached(path, width):
    """Statistics (4, D) from the cache; None where they are not there, or damaged."""
    try:
        value = np.load(path)
        return value if value.shape == (4, width) and np.isfinite(value).all() else None
    except (OSError, ValueError, EOFError):
        return None


def named(items):
    """Names the files that could not be read."""
    for *_, reason in items:
        if reason:
            tqdm.write(f'skipped: {reason}', file=sys.stderr)


def assemble(values, place, units, views):
    """Features of rows (R, F) -> of units (B, V F), the views side by side. place (R,) = unit * V + view. Several
    files of one view are averaged; a missing view is the mean of the unit's others, so that it adds nothing new."""
    ones = torch.ones(len(values), 1, dtype=values.dtype, device=values.device)
    count = values.new_zeros(units * views, 1).index_add(0, place, ones)
    mean = values.new_zeros(units * views, values.shape[1]).index_add(0, place, values) / count.clamp_min(1)
    mean, there = mean.unflatten(0, (units, views)), (count > 0).unflatten(0, (units, views))     # (B, V, F), (B, V, 1)
    others = (mean * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
    return torch.where(there, mean, others).flatten(1)


def unit_features(cfg, units, stats):
    """Token statistics of rows (R, 4, D) -> (B, F) of the units, and which units (B,) have a readable file at all."""
    views = len(SLOTS[cfg.level])
    rows, place = (torch.tensor(column) for column in zip(*(
        (i, u * views + slot) for u, unit in enumerate(units) for i, slot in unit.rows)))
    readable = ~stats[rows, 0, 0].isnan()                   # also where an encoder that diverged gives no number
    rows, place = rows[readable], place[readable]
    there = torch.zeros(len(units), dtype=torch.bool)
    there[place // views] = True
    return assemble(stats[rows][:, list(POOLS[cfg.pool])].flatten(1), place, len(units), views), there


# ---- heads and their training ---------------------------------------------------------------------------------------

class Head(nn.Module):
    """x (B, F) -> logits (B, C), or cumulative hazards (B, T). linear: one layer (DBT-DINO 6.2.1); mlp: three
    (MammoDINO 3.3 gives no widths); hazard: one layer of yearly hazards, summed up."""

    def __init__(self, kind, width, outputs, hidden=512):
        super().__init__()
        self.kind = kind
        self.register_buffer('shift', torch.zeros(width))
        self.register_buffer('scale', torch.ones(width))
        widths = (width, hidden, hidden, outputs) if kind == 'mlp' else (width, outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))

    def standardize(self, x):
        """Takes mean and deviation from the training features (n, F); what does not vary is left out."""
        deviation = x.std(0)
        self.shift.copy_(x.mean(0))
        self.scale.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 0))

    def forward(self, x):
        x = (x.float() - self.shift) * self.scale
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        last = self.layers[-1]
        return cumulative(x, last.weight, last.bias) if self.kind == 'hazard' else last(x)


class Neighbours(nn.Module):
    """x (B, F) -> log of each class's share (B, C) in the vote of the k nearest training units, by cosine."""

    def __init__(self, x, labels, classes, k):
        super().__init__()
        self.register_buffer('bank', F.normalize(x.float(), dim=-1))                    # (n, F)
        self.register_buffer('labels', labels)                                          # (n,)
        self.classes, self.k = classes, k

    def forward(self, x):
        similarity = (F.normalize(x.float(), dim=-1) @ self.bank.T).cpu().numpy()
        shares = knn(similarity, self.labels.cpu().numpy(), min(self.k, len(self.bank)))
        shares = np.pad(shares, ((0, 0), (0, self.classes - shares.shape[1])))
        return torch.from_numpy(shares).clamp_min(1e-12).log()


def probabilities(cfg, outputs):
    """Outputs of a head -> (B, C), or the risk within each year (B, T)."""
    return -torch.expm1(-outputs) if cfg.task == 'risk' else outputs.softmax(-1)


def class_weights(cfg, targets):
    """Weights of the units (n,), 1 on average, so that every class, or exams with and without cancer, counts the same
    over the set: instead of DBT-DINO's balanced sampler and balanced validation set (6.2.2)."""
    kind = targets.amax(1) if cfg.task == 'risk' else targets
    count = torch.bincount(kind)
    return (len(kind) / (count > 0).sum() / count)[kind] if cfg.balance else torch.ones(len(kind))


def criterion(cfg, outputs, targets, weight):
    """Mean over the units of weight * hazard loss or cross-entropy: outputs (B, C or T), targets (B,) or (B, T)."""
    if cfg.task == 'risk':
        return hazard_loss(outputs, targets > 0, targets >= 0, weight) * weight.sum() / len(weight)
    return (F.cross_entropy(outputs.float(), targets, reduction='none') * weight).mean()


def cosine(step, steps, start, end, warmup=0):
    """Linear from 0 over `warmup` steps, then half a cosine from start to end (DINOv2, per step)."""
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def train_head(cfg, make, x, y, x_val, y_val, lr):
    """AdamW and a cosine over `epochs` on frozen features -> the head of the epoch with the least validation loss,
    and that loss. x (n, F), y (n,) or (n, T)."""
    torch.manual_seed(cfg.seed)
    head = make()
    if cfg.standardize:
        head.standardize(x)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=cfg.wd)
    weight, weight_val = class_weights(cfg, y), class_weights(cfg, y_val)
    least, best, steps = math.inf, copy.deepcopy(head.state_dict()), math.ceil(len(x) / cfg.batch)
    for epoch in range(cfg.epochs):
        order = torch.randperm(len(x))
        for i, rows in enumerate(order.split(cfg.batch)):
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
    return head.eval(), least                               # inf where no epoch had a finite loss


def fit(cfg, make, x, y, x_val, y_val):
    """One learning rate, or --search of them drawn from the head's range (DBT-DINO 6.2.1 and 6.2.2) -> the head with
    the least validation loss, and what was tried."""
    low, high = RECIPES[cfg.head].get('rates', (1e-5, 1e-2))
    rng = np.random.default_rng([cfg.seed, 24])
    rates = np.exp(rng.uniform(math.log(low), math.log(high), cfg.search)).tolist() if cfg.search else [cfg.lr]
    tried = [(train_head(cfg, make, x, y, x_val, y_val, lr), lr) for lr in rates]
    (head, least), _ = min(tried, key=lambda trial: trial[0][1])
    if not math.isfinite(least):
        raise ValueError('the validation loss was never finite; lower --lr')
    return head, {f'{lr:.3g}': loss for (_, loss), lr in tried}


class Network(nn.Module):
    """Encoder and head in one, for finetuning: images (n, 1, S, S) of R rows of B units -> outputs (B, C or T)."""

    def __init__(self, cfg, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head
        self.pool, self.views = list(POOLS[cfg.pool]), len(SLOTS[cfg.level])
        encoder.mask_token.requires_grad_(False)            # nothing is masked here; DDP waits for every gradient

    def forward(self, images, owner, place, units):
        """owner (n,): the row of an image. place (R,): unit * V + view of a row."""
        cls, patches = self.encoder(images)
        sums = torch.zeros(len(place), 4, cls.shape[-1], dtype=torch.float64, device=cls.device)
        sums = sums.index_add(0, owner, token_sums(cls, patches))
        stats = statistics(sums, torch.bincount(owner, minlength=len(place)), patches.shape[1])
        return self.head(assemble(stats[:, self.pool].flatten(1), place, units, self.views))


class UnitImages(Images):
    """(epoch, number of a unit) -> that number and [(slot, images uint8 (n, S, S)), …] of its readable rows; half of
    the units mirrored."""

    def __init__(self, cfg, rows, size, units):
        super().__init__(cfg, rows, size)
        self.units = units

    def __getitem__(self, item):
        epoch, u = item
        views = [(slot, *super(UnitImages, self).__getitem__(i)[1:]) for i, slot in self.units[u].rows]
        mirror = np.random.default_rng([self.cfg.seed, epoch, u]).random() < 0.5
        return u, [(slot, images[..., ::-1] if mirror else images, reason) for slot, images, reason in views]


def orders(cfg, n):
    """Every step's units as (epoch, unit): epochs in turn, each a permutation, wrapped round to whole batches."""
    for epoch in range(cfg.epochs):
        order = np.random.default_rng([cfg.seed, epoch]).permutation(n)
        for batch in np.resize(order, (math.ceil(n / cfg.batch), cfg.batch)):
            yield [(epoch, int(u)) for u in batch]


def collated(items, views):
    """Units from UnitImages -> their numbers, which of them (B,) have an image, images (n, S, S), the row of each
    image (n,), the place unit * V + view of each row (R,)."""
    place, stack = [], []
    for b, (_, seen) in enumerate(items):
        named(seen)
        for slot, images, reason in seen:
            if not reason:
                place.append(b * views + slot)
                stack.append(images)
    there = torch.zeros(len(items)).index_fill(0, torch.tensor(place, dtype=torch.long) // views, 1)
    if not stack:                                           # nothing readable: a blank that weighs nothing
        place, stack = [0], [np.zeros((1, *items[0][1][0][1].shape[1:]), np.uint8)]
    owner = torch.arange(len(stack)).repeat_interleave(torch.tensor([len(images) for images in stack]))
    place = torch.tensor(place)
    return [u for u, _ in items], there, np.concatenate(stack), owner, place


def finetune(cfg, encoder, head, rows, train, val, device, decay):
    """Encoder and head together (MammoDINO 3.3): AdamW, learning rates that fall by `decay` per block, a tenth of
    warm-up, cosine. Leaves in both the weights of the epoch with the least validation loss. -> that loss."""
    rank, ranks, amp = dist.get_rank(), dist.get_world_size(), half(cfg, device)
    views, share = len(SLOTS[cfg.level]), cfg.batch // dist.get_world_size()
    network = Network(cfg, encoder, head).to(device)
    ddp = nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == 'cuda' else None)
    optimizer = torch.optim.AdamW(vit.param_groups(network, cfg.lr, cfg.wd, decay))
    y, y_val = targets(train), targets(val)
    weight = class_weights(cfg, y)
    steps = list(orders(cfg, len(train)))
    parts = [step[rank::ranks][i:i + cfg.micro_batch] for step in steps for i in range(0, share, cfg.micro_batch)]
    batches = iter(DataLoader(UnitImages(cfg, rows, cfg.size or encoder.config['size'], train), batch_sampler=parts,
                              num_workers=cfg.workers, collate_fn=as_is))
    wanted = {i for unit in val for i, _ in unit.rows}
    least, best = math.inf, copy.deepcopy(network.state_dict())
    bar = tqdm(range(len(steps)), unit='step', disable=rank > 0, desc='finetuning')
    for step in bar:
        for group in optimizer.param_groups:
            group['lr'] = group['lr_scale'] * cosine(step, len(steps), cfg.lr, 0, warmup=len(steps) // 10)
        encoder.train()
        for start in range(0, share, cfg.micro_batch):
            unit, there, images, owner, place = collated(next(batches), views)
            w = weight[unit] * there
            with contextlib.nullcontext() if start + cfg.micro_batch >= share else ddp.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    outputs = ddp(pixels(images, device), owner.to(device), place.to(device), len(unit))
                loss = criterion(cfg, outputs, y[unit].to(device), w.to(device)) * len(unit) / share
                loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (len(steps) // cfg.epochs) == 0:
            x_val, seen = unit_features(cfg, val, features(cfg, encoder, rows, device, wanted, cache=False))
            with torch.no_grad():
                outputs = head(x_val[seen].to(device)).cpu()
            loss = criterion(cfg, outputs, y_val[seen], class_weights(cfg, y_val[seen])).item()
            bar.set_postfix(val=f'{loss:.4f}', best=f'{min(loss, least):.4f}')
            if loss < least:
                least, best = loss, copy.deepcopy(network.state_dict())
    if not math.isfinite(least):
        raise ValueError('the validation loss was never finite; lower --lr')
    network.load_state_dict(best)
    network.eval()
    return least


def save(path, state):
    """Written beside its place and moved there whole: a crash or a full disk leaves the checkpoint before it."""
    part = Path(f'{path}.part')
    try:
        torch.save(state, part)
    except (OSError, RuntimeError) as problem:
        part.unlink(missing_ok=True)
        raise OSError(f'{path} cannot be written ({problem}); free some disk space and start again') from problem
    os.replace(part, path)


# ---- one run --------------------------------------------------------------------------------------------------------

SMALL = dict(size=84, width=128, depth=4, heads=4)          # the demo of pretrain.py


def encoders(cfg):
    """-> {name: a function that makes the encoder}. Random weights of the same shape come first: with a strong head
    they go far. Their LayerScale is 1, whatever pretraining starts from: at DINOv2's 1e-5 every block of a random
    network is the identity, and beating that is no feat."""
    path, shape = Path(cfg.encoder), SMALL
    if path.is_dir():
        raise ValueError(f'{path} is a folder; --encoder takes the file, such as {path}/last.pt')
    if path.exists():
        shape = vit.load(path).config
    elif cfg.encoder != Config.encoder:
        raise ValueError(f'{path}: no such file; --encoder takes a last.pt of pretrain.py or the official DINOv2 file')
    elif dist.get_rank() == 0:
        print(f'{path} is absent: random init only. `torchrun pretrain.py` makes one, --encoder names another.')

    def random():
        torch.manual_seed(cfg.seed)
        return vit.ViT(**shape, layerscale=1.0).eval()

    makers = {'random init': random}
    if cfg.dinov2:
        makers['DINOv2'] = lambda: vit.load(cfg.dinov2)
    if path.exists():
        makers['pretrained'] = lambda: vit.load(path)
    for make in makers.values():                            # before hours of work
        patch = make().config['patch']
        if cfg.size % patch:
            raise ValueError(f'--size {cfg.size} is no multiple of the patch, {patch}')
    return makers


def trained(cfg, encoder, rows, stats, classes, train, val, device, decay):
    """One head on one encoder -> (head, what the search tried). `stats` are the frozen features, None when the encoder
    is finetuned as well, with layer-wise `decay`."""
    outputs = YEARS if cfg.task == 'risk' else len(classes)
    width = len(SLOTS[cfg.level]) * len(POOLS[cfg.pool]) * encoder.config['width']

    def make():
        return Head(cfg.head, width, outputs, cfg.hidden)

    if not cfg.freeze:
        torch.manual_seed(cfg.seed)
        head = make().to(device)
        return head, {f'{cfg.lr:.3g}': finetune(cfg, encoder, head, rows, train, val, device, decay)}
    (x, y), (x_val, y_val) = (frozen(cfg, part, stats) for part in (train, val))
    if cfg.head == 'knn':
        return Neighbours(x, y, outputs, cfg.neighbours), {}
    return fit(cfg, make, x, y, x_val, y_val)


def frozen(cfg, units, stats):
    """Features (n, F) and targets (n,) or (n, T) of the units that have a readable file."""
    x, there = unit_features(cfg, units, stats)
    return x[there], targets(units)[there]


def targets(units):
    """(n,) classes, or (n, T)"""
    return torch.tensor(np.stack([unit.target for unit in units]))


@torch.no_grad()
def predicted(cfg, encoder, head, rows, stats, units, device):
    """Probabilities (n, C) or risks (n, T) of the units, as float64; NaN where no file is readable."""
    if stats is None:
        stats = features(cfg, encoder, rows, device, {i for unit in units for i, _ in unit.rows}, cache=False)
    x, there = unit_features(cfg, units, stats)
    p = probabilities(cfg, head(x.to(next(head.buffers()).device)).cpu().double())
    p[~there] = math.nan
    return p.numpy()


def decided(cfg, result):
    """Classes (n,): the likeliest, or positive from the validation's threshold on."""
    return (result['p'][:, 1] >= result['threshold']).astype(int) if cfg.task in BINARY else result['p'].argmax(1)


def youden(y, s):
    """The threshold with the largest sensitivity + specificity, for `s >= threshold`; chosen on validation."""
    fpr, tpr, thresholds = roc(y, s)
    return float(thresholds[1 + np.argmax((tpr - fpr)[1:])])                            # not the one above all scores


def roc(y, s):
    """-> false and true positive rates and thresholds, from (0, 0) to (1, 1); one point for each distinct score."""
    order = np.argsort(-np.asarray(s), kind='stable')
    y, s = np.asarray(y)[order] > 0, np.asarray(s)[order]
    last = np.append(s[1:] != s[:-1], True)
    tp, fp = np.cumsum(y)[last], np.cumsum(~y)[last]
    return np.append(0, fp / max(fp[-1], 1)), np.append(0, tp / max(tp[-1], 1)), np.append(np.inf, s[last])


def metrics(cfg, classes, threshold):
    """{name: metric(y, p)}; the first is the one that runs are compared by. y (n,), p (n, C); risk: (n, T) both, and
    the mean is over the years in which it is defined."""
    C = len(classes)

    def at(y, p, kind):
        return ((p[y == kind, 1] >= threshold) == kind).mean() if (y == kind).any() else math.nan

    if cfg.task == 'risk':
        def year(y, p, t):
            use = in_year(y, y >= 0)[:, t]
            return auc(y[use, t], p[use, t])

        years = {f'year {t + 1}': lambda y, p, t=t: year(y, p, t) for t in range(YEARS)}
        return {'mean AUROC': lambda y, p: np.mean([a for a in yearly_auc(y, y >= 0, p) if a == a] or math.nan)} | years
    if cfg.task in BINARY:
        return {'AUC': lambda y, p: auc(y, p[:, 1]), 'sensitivity': lambda y, p: at(y, p, 1),
                'specificity': lambda y, p: at(y, p, 0)}
    out = {'accuracy': lambda y, p: (p.argmax(1) == y).mean(), 'macro F1': lambda y, p: f1(y, p.argmax(1), C),
           'macro AUC': lambda y, p: np.mean([auc(y == c, p[:, c]) for c in range(C)])}
    if cfg.task in ORDERED and '0' not in classes:          # BI-RADS 0, incomplete, has no place in the order
        out['kappa'] = lambda y, p: kappa(y, p.argmax(1), C)
    return out


def measured(cfg, table, y, p, patients):
    """{metric: value, 95 % interval by patient, number of draws on which it was not defined}"""
    out, n = {}, cfg.draws
    for name, metric in table.items():
        values = resample(metric, (y, p), patients, np.random.default_rng(cfg.seed), n)
        whole = values[~np.isnan(values)]
        low, high = np.percentile(whole, [2.5, 97.5]) if len(whole) else (math.nan, math.nan)
        out[name] = dict(value=float(metric(y, p)), low=float(low), high=float(high), undefined=n - len(whole))
    return out


def run(cfg, device, again=False):
    """One data set and task: every encoder on every fraction of the training patients -> table, files, pictures.
    `again` may overwrite an earlier run."""
    out, makers = Path(cfg.out), encoders(cfg)
    if (out / 'metrics.json').exists() and not again:
        raise ValueError(f'{out} holds a run; choose another --out')
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OSError(f'--out {out} cannot be made ({problem.strerror}); choose another') from None
    rows, classes, notes = load(cfg)
    units = units_of(cfg, rows, notes)
    columns = {name.lower(): name for unit in units for name in unit.record}
    if cfg.subgroup and cfg.subgroup.lower() not in columns:
        raise ValueError(f"--subgroup {cfg.subgroup}: no such column; found {', '.join(columns.values())}")
    parts = parted(units, notes)
    if dist.get_rank() == 0:
        introduce(cfg, parts, classes, notes)
    results = {}
    for name, make in makers.items():
        encoder, stats = make().to(device), None
        if cfg.freeze:
            stats = features(cfg, encoder, rows, device, {i for unit in units for i, _ in unit.rows})
            units = [unit for unit in units if any(rows[i].readable for i, _ in unit.rows)]
            parts = parted(units, ['after the unreadable files were left out'])
        for share in cfg.fraction:
            encoder = encoder if cfg.freeze else make().to(device)
            head, tried = trained(cfg, encoder, rows, stats, classes, share_of(parts['train'], share, cfg.seed),
                                  parts['val'], device, 1.0 if name == 'random init' else cfg.layer_decay)
            p_val, p = (predicted(cfg, encoder, head, rows, stats, parts[part], device) for part in ('val', 'test'))
            results.setdefault(name, {})[share] = dict(p=p, tried=tried, threshold=None)
            if cfg.task in BINARY:
                seen, y_val = ~np.isnan(p_val).any(1), targets(parts['val']).numpy()
                results[name][share]['threshold'] = youden(y_val[seen], p_val[seen, 1])
    if dist.get_rank() == 0:
        save(out / 'last.pt', dict(config=asdict(cfg), classes=list(classes), vit=encoder.config,
                                   threshold=results[name][share]['threshold'], head=head.cpu().state_dict(),
                                   teacher={f'backbone.{k}': v.cpu() for k, v in encoder.state_dict().items()}))
        report(cfg, rows, parts, classes, notes, results)
        print(f'-> {out}/metrics.json, predictions.csv, last.pt and pictures')
    dist.barrier()


def introduce(cfg, parts, classes, notes):
    """What is about to be learnt from what, and what was left out."""
    loss = 'plain vote' if cfg.head == 'knn' else 'classes weigh the same' if cfg.balance else 'plain loss'
    print(f"\n{cfg.task}, {cfg.dataset}, {cfg.level} level; {cfg.head} head on {cfg.pool}, encoder "
          f"{'frozen' if cfg.freeze else 'finetuned'}; {loss}")
    for split, units in parts.items():
        y = targets(units)
        counts = f'{int((y == 1).any(1).sum())} with cancer' if cfg.task == 'risk' else ', '.join(
            f'{name}: {int((y == c).sum())}' for c, name in enumerate(classes))
        print(f'  {split:5s} {len(units)} {cfg.level}s of {len({unit.patient for unit in units})} patients, {counts}')
    for note in notes:
        print(f'  {note}')


def report(cfg, rows, parts, classes, notes, results):
    """The table on the test set, predictions.csv, metrics.json and the pictures.

    results {encoder: {share: dict(p (n, C or T), threshold, tried)}}, random init first, the main encoder last; only
    units that every encoder could read count."""
    out, full, main = Path(cfg.out), cfg.fraction[-1], list(results)[-1]
    flat = [(name, share, r) for name, shares in results.items() for share, r in shares.items()]
    readable = ~np.any([np.isnan(r['p']).any(1) for *_, r in flat], axis=0)
    units = [unit for unit, there in zip(parts['test'], readable) if there]
    y, patients = targets(units).numpy(), np.array([unit.patient for unit in units])
    for *_, r in flat:
        r['p'] = r['p'][readable]
    best = {name: shares[full] for name, shares in results.items()}
    write_predictions(cfg, out / 'predictions.csv', units, classes, y, best)

    lacking = missing_views(cfg, rows, sum(parts.values(), []))
    if lacking:
        notes.append(f'{len(lacking)} {cfg.level}s lack a view, for which the mean of their others stands in: '
                     + ', '.join(f'{name} ({" ".join(views)})' for name, views in list(lacking.items())[:5])
                     + (', … all in metrics.json' if len(lacking) > 5 else ''))
        print(f'  {notes[-1]}')
    if len(units) < len(readable):
        notes.append(f'{len(readable) - len(units)} test {cfg.level}s have no readable file and take no part')
        print(f'  {notes[-1]}')
    for *_, r in flat:
        r['metrics'] = measured(cfg, metrics(cfg, classes, r['threshold']), y, r['p'], patients)
    counts = {'positive': int((y == 1).sum())} if cfg.task in BINARY else \
        {f'year {t + 1}': f'{(y[use, t] > 0).sum()} of {use.sum()}' for t, use in enumerate(in_year(y, y >= 0).T)} \
        if cfg.task == 'risk' else {name: int((y == c).sum()) for c, name in enumerate(classes)}
    print(f"\ntest, n = {len(y)} ({', '.join(f'{name}: {count}' for name, count in counts.items())}); 95 % intervals over "
          f'{len(set(patients))} patients, {cfg.draws} draws')
    print(' ' * 24 + ''.join(f'{column:22s}' for column in best[main]['metrics']).rstrip())
    for name, share, r in flat:
        label = name if len(cfg.fraction) == 1 else f'{name}, {100 * share:g}%'
        print(f'{label:24s}' + ''.join(f'{cell(m):22s}' for m in r['metrics'].values()).rstrip())
    undefined = sum(m['undefined'] for *_, r in flat for m in r['metrics'].values())
    if undefined:
        print(f'{undefined} values of the bootstrap were not defined, for want of a class in the draw, and are left out')
    headline = next(iter(best[main]['metrics']))
    against = {f'{main} - {name}, {100 * share:g}%': versus(cfg, y, r['p'], results[main][share]['p'], patients)
               for name, share, r in flat if name != main}
    adjust(against.values())
    for name, v in against.items():
        print(f"{name.removesuffix(', 100%')}: {headline} {gap(v)}")
    groups = subgroups(cfg, units, classes, y, best[main], patients) if cfg.subgroup else {}

    for r in best.values() if cfg.task in BINARY else ():
        r['delong_interval'] = delong_interval(y, r['p'][:, 1])
    kept = {name: {f'{share:g}': {k: v for k, v in r.items() if k != 'p'} for share, r in shares.items()}
            for name, shares in results.items()}
    (out / 'metrics.json').write_text(json.dumps(plain(dict(
        config=asdict(cfg), torch=torch.__version__, numpy=np.__version__, classes=classes, encoder=main, n=len(y),
        counts=counts, patients=len(set(patients)), notes=notes, results=kept, against=against, subgroups=groups,
        missing_views=lacking)), indent=1, allow_nan=False))
    pictures(cfg, out, classes, y, best)
    if len(cfg.fraction) > 1:
        lines = {name: [[r['metrics'][headline][k] for r in shares.values()] for k in ('value', 'low', 'high')]
                 for name, shares in results.items()}
        chart({name: (cfg.fraction, value, list(zip(low, high))) for name, (value, low, high) in lines.items()},
              'share of training patients', headline).save(out / 'fraction.png')


def plain(value):
    """For JSON, which knows no NaN: None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell(m):
    """.812 [.774, .850]"""
    value, low, high = ('-' if m[k] is None or math.isnan(m[k]) else f'{m[k]:.3f}'.replace('0.', '.', 1)
                        if abs(m[k]) < 1 else f'{m[k]:.3f}' for k in ('value', 'low', 'high'))
    return f'{value} [{low}, {high}]'


def versus(cfg, y, p1, p2, patients):
    """Two results on the same units -> the difference of their first metric with its paired interval by patient, and
    {test: p}: DeLong (binary; risk: every year) or McNemar. Both take units as independent, so where patients have
    several, `tests` holds the p of the bootstrap by patient and `naive` theirs."""
    metric = next(iter(metrics(cfg, (), None).values()))
    values = resample(lambda y, a, b: metric(y, b) - metric(y, a), (y, p1, p2), patients,
                      np.random.default_rng(cfg.seed), cfg.draws)
    whole = values[~np.isnan(values)]
    low, high = np.percentile(whole, [2.5, 97.5]) if len(whole) else (math.nan, math.nan)
    if cfg.task in BINARY:
        tests = {'DeLong': delong(y, p1[:, 1], p2[:, 1])[2]}
    elif cfg.task == 'risk':
        tests = {f'DeLong, year {t + 1}': delong(*(a[use, t] for a in (y, p1, p2)))[2]
                 for t, use in enumerate(in_year(y, y >= 0).T)}
    else:
        tests = {'McNemar': mcnemar(p1.argmax(1) == y, p2.argmax(1) == y)}
    naive = {}
    if len(set(patients)) < len(y):
        beyond = 1 + min((whole <= 0).sum(), (whole >= 0).sum())
        p = float(min(1, 2 * beyond / (1 + len(whole)))) if len(whole) else math.nan
        tests, naive = {'bootstrap by patient': p}, tests
    return dict(difference=float(metric(y, p2) - metric(y, p1)), low=float(low), high=float(high),
                undefined=len(values) - len(whole), tests=tests, naive=naive)


def adjust(found):
    """Benjamini-Hochberg over all tests of these comparisons as one family: adds `adjusted` to each."""
    family = [(v, test) for v in found for test, p in v['tests'].items() if not math.isnan(p)]
    for (v, test), p in zip(family, benjamini_hochberg([v['tests'][test] for v, test in family])):
        v.setdefault('adjusted', {})[test] = float(p)
    return len(family)


def gap(v):
    """+.038 [-.002, +.077], McNemar p = .06, adjusted .12"""
    parts = [f"{v['difference']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}]"]
    parts += [f'{test} p = {p:.3g}, adjusted {v["adjusted"].get(test, math.nan):.3g}' for test, p in v['tests'].items()]
    parts += [f'{test} p = {p:.3g} if units were independent' for test, p in v['naive'].items()]
    return '; '.join(parts)


def subgroups(cfg, units, classes, y, result, patients):
    """The metrics by a column of the label file, ages by decade as in DBT-DINO's Table 5; prints the table."""
    values = [next((v for k, v in unit.record.items() if k.lower() == cfg.subgroup.lower()), '') for unit in units]
    values = np.array([decade(v) if cfg.subgroup.lower() == 'age' else v or 'blank' for v in values], dtype=object)
    table, out = metrics(cfg, classes, result['threshold']), {}
    print(f'\n{cfg.subgroup:16s}{"n":>6s} patients  ' + ''.join(f'{name:22s}' for name in table).rstrip())
    for value in sorted(set(values)):
        of = values == value
        out[value] = dict(n=int(of.sum()), patients=len(set(patients[of])),
                          metrics=measured(cfg, table, y[of], result['p'][of], patients[of]))
        print(f'{value:16s}{of.sum():6d} {out[value]["patients"]:8d}  '
              + ''.join(f'{cell(m):22s}' for m in out[value]['metrics'].values()).rstrip())
    return out


def decade(age):
    """'57' or '057Y' -> '50-60'; below 50 and from 70 on are one group each."""
    digits = re.match(r'\d+', age)
    if not digits:
        return 'blank'
    return ('<50', '50-60', '60-70', '70+')[np.searchsorted((50, 60, 70), int(digits[0]), side='right')]


def write_predictions(cfg, path, units, classes, y, results):
    """One line per encoder and unit: the truth, the decision and every probability."""
    names = [f'year{t + 1}' for t in range(YEARS)] if cfg.task == 'risk' else classes
    with open(path, 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        writer = csv.writer(file)
        writer.writerow(['encoder', 'unit', 'patient', 'target', 'predicted', *(f'p_{name}' for name in names)])
        for name, result in results.items():
            guesses = [''] * len(y) if cfg.task == 'risk' else [classes[guess] for guess in decided(cfg, result)]
            for unit, truth, guess, p in zip(units, y, guesses, result['p']):
                target = ' '.join(map(str, truth)) if cfg.task == 'risk' else classes[truth]
                writer.writerow([name, unit.name, unit.patient, target, guess, *map(float, p)])


# ---- pictures -------------------------------------------------------------------------------------------------------

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')          # Okabe and Ito
font = ImageFont.load_default


def halved(picture):
    """Drawn at twice the size, then shrunk: smooth lines."""
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def pictures(cfg, out, classes, y, results):
    """confusion.png, and roc.png: the encoders against each other, or years or classes of the main one, the last."""
    *_, main = results.values()
    if cfg.task in BINARY:
        pairs = {name: (y, r['p'][:, 1]) for name, r in results.items()}
    elif cfg.task == 'risk':
        pairs = {f'year {t + 1}': (y[use, t], main['p'][use, t]) for t, use in enumerate(in_year(y, y >= 0).T)}
    else:
        pairs = {name: (y == c, main['p'][:, c]) for c, name in enumerate(classes)}
    curves = {f'{name}, {auc(*pair):.3f}': roc(*pair)[:2] for name, pair in pairs.items() if not math.isnan(auc(*pair))}
    chart(curves, '1 - specificity', 'sensitivity', diagonal=True).save(out / 'roc.png')
    if cfg.task != 'risk':
        matrix(confusion(y, decided(cfg, main), len(classes)), classes).save(out / 'confusion.png')


def chart(curves, xlabel, ylabel, diagonal=False):
    """{name: (x, y) or (x, y, intervals)} in the unit square -> a picture with axes and legend."""
    side, left, top = 720, 110, 60
    picture = Image.new('RGB', (left + side + 40, top + side + 110), 'white')
    pen = ImageDraw.Draw(picture)

    def at(x, y):
        return left + side * float(x), top + side * (1 - float(y))

    for tick in np.linspace(0, 1, 6):
        pen.line([at(tick, 0), at(tick, 1)], '#E5E5E5', 2)
        pen.line([at(0, tick), at(1, tick)], '#E5E5E5', 2)
        pen.text((at(tick, 0)[0], top + side + 12), f'{tick:.1f}', 'black', font(24), anchor='ma')
        pen.text((left - 14, at(0, tick)[1]), f'{tick:.1f}', 'black', font(24), anchor='rm')
    pen.rectangle([at(0, 1), at(1, 0)], outline='black', width=2)
    if diagonal:
        pen.line([at(0, 0), at(1, 1)], '#999999', 2)
    for i, (name, (x, y, *intervals)) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        pen.line([at(*point) for point in zip(x, y) if not np.isnan(point).any()], colour, 4, joint='curve')
        for a, b, (low, high) in (z for z in zip(x, y, *intervals) if intervals and not np.isnan([*z[:2], *z[2]]).any()):
            pen.line([at(a, low), at(a, high)], colour, 2)
            pen.circle(at(a, b), 7, colour)
        height = top + side - 40 * (len(curves) - i)
        pen.line([(left + side * 0.5, height + 14), (left + side * 0.5 + 50, height + 14)], colour, 6)
        pen.text((left + side * 0.5 + 64, height), name, 'black', font(26))
    pen.text((left + side / 2, top + side + 56), xlabel, 'black', font(28), anchor='ma')
    pen.text((10, 6), ylabel, 'black', font(26))
    return halved(picture)


def matrix(counts, classes):
    """Confusion counts (C, C) -> a picture: truth by row, prediction by column, shaded by the share of the row."""
    box, margin = 120, 150
    side = box * len(classes)
    picture = Image.new('RGB', (margin + side + 30, margin + side + 30), 'white')
    pen = ImageDraw.Draw(picture)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for i, name in enumerate(classes):
        middle = margin + box * (i + 0.5)
        short = name if len(name) < 10 else f'{name[:4]}…{name[-4:]}'
        pen.text((middle, margin - 12), short, 'black', font(26), anchor='mb')
        pen.text((margin - 12, middle), short, 'black', font(26), anchor='rm')
        for j, share in enumerate(shares[i]):
            x, y = margin + box * j, margin + box * i
            shade = tuple(int(255 - share * (255 - c)) for c in (0, 114, 178))
            pen.rectangle([x, y, x + box, y + box], shade, 'white', 3)
            pen.text((x + box / 2, y + box / 2), str(counts[i, j]), 'white' if share > 0.5 else 'black', font(32),
                     anchor='mm')
    pen.text((margin + side / 2, 20), 'predicted', 'black', font(28), anchor='ma')
    pen.text((20, margin / 2), 'truth', 'black', font(28))
    return halved(picture)


def radar(axes, polygons):
    """axes: names; polygons {name: values in 0..1, one per axis, NaN where it has none} -> MammoDINO's Fig. 2."""
    centre, radius = np.array([720, 560]), 400
    picture = Image.new('RGB', (1440, 1160 + 40 * len(polygons)), 'white')
    pen = ImageDraw.Draw(picture)
    angles = 2 * np.pi * np.arange(len(axes)) / len(axes) - np.pi / 2
    spokes = np.stack([np.cos(angles), np.sin(angles)], axis=1)                         # (axes, 2)
    for ring in (0.2, 0.4, 0.6, 0.8, 1.0):
        pen.polygon([tuple(centre + radius * ring * spoke) for spoke in spokes], outline='#CCCCCC', width=2)
        pen.text(tuple(centre + (8, -radius * ring)), f'{ring:.1f}', '#777777', font(22))
    for name, spoke in zip(axes, spokes):
        pen.line([tuple(centre), tuple(centre + radius * spoke)], '#CCCCCC', 2)
        pen.text(tuple(centre + (radius + 40) * spoke), name, 'black', font(26),
                 anchor='mm' if abs(spoke[0]) < 0.3 else 'lm' if spoke[0] > 0 else 'rm')
    for i, (name, values) in enumerate(polygons.items()):
        colour = COLOURS[i % len(COLOURS)]
        corners = [tuple(centre + radius * max(v, 0) * spoke) for v, spoke in zip(values, spokes) if not math.isnan(v)]
        pen.line([*corners, *corners[:1]], colour, 5, joint='curve')
        pen.line([(340, 1120 + 40 * i), (390, 1120 + 40 * i)], colour, 6)
        pen.text((404, 1120 + 40 * i), name, 'black', font(26), anchor='lm')
    return halved(picture)


# ---- compare and predict --------------------------------------------------------------------------------------------

def stored(folder):
    """A run as its folder has it: metrics.json, and of the main encoder the metrics, y, p and patients by unit."""
    try:
        r = json.loads((Path(folder) / 'metrics.json').read_text())
        r['cfg'] = config_of(r['config'])
        r['metrics'] = {name: list(shares.values())[-1]['metrics'] for name, shares in r['results'].items()}
        lines = [line for line in table(Path(folder) / 'predictions.csv', 'unit') if line['encoder'] == r['encoder']]
        r['units'] = [line['unit'] for line in lines]
        r['patients'] = np.array([line['patient'] for line in lines])
        r['p'] = np.array([[float(v) for name, v in line.items() if name.startswith('p_')] for line in lines])
        r['y'] = np.array([[int(v) for v in line['target'].split()] if r['cfg'].task == 'risk'
                           else r['classes'].index(line['target']) for line in lines])
        if len(lines) != r['n'] or r['encoder'] not in r['metrics']:
            raise ValueError(f"predictions.csv holds {len(lines)} units, metrics.json says {r['n']}")
    except (OSError, LookupError, ValueError, TypeError, AttributeError) as problem:
        raise ValueError(f'{folder}: not a run of finetune.py ({type(problem).__name__}: {problem})') from problem
    return r


def config_of(values):
    """The configuration in a file; lists become tuples again."""
    known = {f.name for f in fields(Config)}
    return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known})


def compare(argv):
    """Runs side by side: the metrics, every pair of runs on the same task and test units tested against each other,
    Benjamini-Hochberg over all of these tests as one family, and the radar picture of MammoDINO's Fig. 2."""
    parser = argparse.ArgumentParser(prog='finetune.py compare')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folders that finetune.py wrote, two or more')
    parser.add_argument('--out', default='radar.png', help='the picture')
    args = parser.parse_args(argv)
    runs = {folder: stored(folder) for folder in args.runs}
    if len(runs) < 2:
        raise ValueError('compare takes two different runs or more')
    for folder, r in runs.items():
        print(f"{folder}: {r['cfg'].task} on {r['cfg'].dataset}, n = {r['n']}, encoder {r['cfg'].encoder}")
        print('    ' + ', '.join(f'{name} {cell(m)}' for name, m in r['metrics'][r['encoder']].items()))
    found = {}
    for i, a in enumerate(runs):
        for b in list(runs)[i + 1:]:
            one, two = runs[a], runs[b]
            if (one['cfg'].task, one['cfg'].dataset) != (two['cfg'].task, two['cfg'].dataset):
                continue
            if one['units'] != two['units'] or (one['y'] != two['y']).any():
                print(f'{a} and {b} were tested on different units or labels: no test')
                continue
            headline = next(iter(one['metrics'][one['encoder']]))
            found[f'{b} - {a}: {headline}'] = versus(one['cfg'], one['y'], one['p'], two['p'], one['patients'])
    print(f'{adjust(found.values())} tests, one family, adjusted by Benjamini-Hochberg')
    for name, v in found.items():
        print(f'    {name} {gap(v)}')
    radar(*web(runs)).save(args.out)
    print(f'-> {args.out}')


def web(runs):
    """-> axes and polygons of the radar: a task an axis, the mean of its AUC or macro F1 over data sets, an encoder a
    polygon, as in the paper; with fewer than three tasks every metric is an axis and every run a polygon."""
    few = len({r['cfg'].task for r in runs.values()}) < 3
    values = defaultdict(lambda: defaultdict(list))         # polygon -> axis -> values
    for folder, r in runs.items():
        for name, found in r['metrics'].items():
            polygon = name if name != r['encoder'] else folder if few else r['cfg'].encoder
            for metric, m in found.items():
                if few:
                    values[polygon][f"{r['cfg'].task} {metric}"].append(math.nan if m['value'] is None else m['value'])
                elif metric in ('AUC', 'macro F1', 'mean AUROC') and m['value'] is not None:
                    values[polygon][r['cfg'].task].append(m['value'])
    axes = sorted({axis for polygon in values.values() for axis in polygon})
    return axes, {name: [np.mean(polygon.get(axis, math.nan)) for axis in axes] for name, polygon in values.items()}


def predict(argv, device):
    """Probabilities for images, or for one breast or exam given as VIEW=FILE, from a run's last.pt."""
    parser = argparse.ArgumentParser(prog='finetune.py predict')
    parser.add_argument('files', nargs='+', metavar='FILE', help='image level: files; breast or exam: VIEW=FILE, such '
                                                                 'as RCC=a.dcm LCC=b.dcm RMLO=c.dcm LMLO=d.dcm')
    parser.add_argument('--checkpoint', required=True, metavar='RUN', help='folder that finetune.py wrote')
    args = parser.parse_args(argv)
    path = Path(args.checkpoint) / 'last.pt' if os.path.isdir(args.checkpoint) else Path(args.checkpoint)
    if not path.exists():
        raise ValueError(f'{path}: no such file; --checkpoint takes a folder that finetune.py wrote')
    encoder = vit.load(path)
    state = torch.load(path, map_location='cpu', weights_only=True)
    if 'head' not in state:
        raise ValueError(f'{path} holds an encoder without a head; give a run of finetune.py')
    cfg, classes = replace(config_of(state['config']), workers=0, max_bad=1.0), state['classes']
    slots = SLOTS[cfg.level]
    given = [file.split('=', 1) if cfg.level != 'image' else ('image', file) for file in args.files]
    if any(len(pair) != 2 or pair[0] not in slots for pair in given):
        raise ValueError(f"this model reads {cfg.level}s: give VIEW=FILE with VIEW of {', '.join(slots)}")
    absent = [file for _, file in given if not os.path.isfile(file)]
    if absent:
        raise ValueError(f'{absent[0]}: no such file; this model reads {cfg.level}s')
    rows = [Row(file, None, '', '') for _, file in given]
    units = [Unit(args.files[i], '', '', 0, [(i, 0)], {}) for i in range(len(rows))] if cfg.level == 'image' else \
        [Unit(cfg.level, '', '', 0, [(i, slots.index(view)) for i, (view, _) in enumerate(given)], {})]
    if cfg.head == 'knn':
        head = Neighbours(state['head']['bank'], state['head']['labels'], len(classes), cfg.neighbours)
    else:
        width = len(slots) * len(POOLS[cfg.pool]) * encoder.config['width']
        head = Head(cfg.head, width, YEARS if cfg.task == 'risk' else len(classes), cfg.hidden)
    try:
        head.load_state_dict(state['head'])
    except RuntimeError as problem:
        raise ValueError(f'{path}: its head and its encoder do not fit together') from problem
    stats = features(cfg, encoder.to(device), rows, device, range(len(rows)), cache=False)
    names = [f'within {t + 1} y' for t in range(YEARS)] if cfg.task == 'risk' else classes
    for unit, p in zip(units, predicted(cfg, encoder, head, rows, stats, units, device)):
        found = ', '.join(f'{name} {value:.3f}' for name, value in zip(names, p))
        print(f"{unit.name}: {'unreadable' if np.isnan(p).any() else found}")
    for views in missing_views(cfg, rows, units).values():
        print(f"missing {', '.join(views)}: the mean of the other views stands in")
    if cfg.balance and cfg.head != 'knn':
        print('Trained with classes of equal weight: these are scores, not the share of such cases in a population.')
    if state['threshold'] is not None:
        print(f"Threshold chosen on validation: {state['threshold']:.3f}")


# ---- the demo -------------------------------------------------------------------------------------------------------

DEMO = dict(out='runs/finetune-demo', search=6, workers=0, epochs=60)


def demo(cfg, device):
    """Density and cancer on synthetic breasts that no training has seen, prepared like any data set."""
    folder, again = Path(cfg.out) / 'phantoms', cfg.out == DEMO['out']
    if (cfg.dataset, cfg.task) != (Config.dataset, Config.task):
        raise ValueError(f'--dataset {cfg.dataset} --task {cfg.task} needs --root DIR; the demo has tasks of its own')
    cfg = replace(cfg, root=str(folder), cache=f'{cfg.out}/features', search=0 if cfg.head == 'mlp' else cfg.search)
    runs = [resolved(replace(cfg, task=task, out=f'{cfg.out}/{task}'), dist.get_world_size())
            for task in ('density', 'cancer')]
    if not again and any((Path(each.out) / 'metrics.json').exists() for each in runs):
        raise ValueError(f'{cfg.out} holds runs; choose another --out, or give a data set with --root DIR')
    if dist.get_rank() == 0:
        print('SMOKE RUN ON PHANTOMS: every part of the method on synthetic breasts, no clinical meaning. '
              'Give a data set with --root DIR.', flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        for old in Path(cfg.cache).glob('*/*.npy'):         # of phantoms that are drawn anew
            old.unlink()
        lines = ['path,patient,split,density,cancer']
        for i in range(cfg.phantoms):
            split = 'train' if i < 0.45 * cfg.phantoms else 'val' if i < 0.6 * cfg.phantoms else 'test'
            phantom = mask.phantom(np.random.default_rng([cfg.seed, i, 0, 4]))          # pretrain.py draws 1, 2, 3
            np.save(folder / f'{i:04d}.npy', mask.clahe(mask.to_uint8(phantom.volume[0])))
            lines.append(f"{i:04d}.npy,{i:04d},{split},{'abcd'[phantom.density]},{phantom.cancer}")
        (folder / 'manifest.csv').write_text('\n'.join(lines) + '\n')
    dist.barrier()
    for each in runs:
        run(each, device, again)


def main(argv):
    if argv[:1] == ['compare']:
        return compare(argv[1:])
    _, ranks, device = setup()
    if argv[:1] == ['predict']:
        predict(argv[1:], device)
    else:
        cfg = parse(Config, argv, DEMO, source='root')
        if not cfg.root:
            demo(cfg, device)
        else:
            run(resolved(cfg, ranks), device)
    dist.destroy_process_group()


if __name__ == '__main__':
    wrong = None
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:                # a data worker sends its traceback along, the reason last
        wrong = str(problem).strip().splitlines()[-1].removeprefix('ValueError: ')
    except KeyboardInterrupt:
        wrong = 'stopped'
    if wrong:
        print(f'finetune.py: {wrong}', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(wrong))                                   # an interpreter that winds down gloo's threads may abort
