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

B units, V views of a unit, R rows (files) with n images of S x S pixels, N patches, D width, F features, C classes,
T years. A slot is the place of a view in its unit; moments are the four statistics of `encode`. In statistics n counts
units.
"""
import argparse
import contextlib
import copy
import csv
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import warnings
import zipfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pydicom
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import images
import vit
from metrics import (auc, benjamini_hochberg, confusion, delong, delong_interval, f1, in_year, kappa, knn, mcnemar,
                     resample, roc, yearly_auc, youden)
from run import cosine, lock, option, parse, save, setup
from phantom import breast


# ---- configuration --------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Every field is a flag; those without a default follow from data set, task and head. Source: [paper] MammoDINO,
    [dbt-dino] arXiv 2512.13608, [ours]."""
    dataset: str = option('csv', 'paper 3.3', 'rsna, vindr, ddsm, cmmd, cesm, mias or csv, a manifest of your own',
                          group='data')
    root: str | None = option(None, 'ours', 'the data set as published, or a manifest; without it, a demo on phantoms')
    images: str | None = option(None, 'ours', 'where `prepare.py` put the images of --root')
    task: str = option('cancer', 'paper 3.3', 'cancer, lesion, lesion_type, birads, density or risk')
    cancer_rule: str | None = option(None, 'ours', 'vindr: birads5 or birads45 is cancer; cmmd: unlisted is none')
    classes: tuple[str, ...] = option((), 'ours', 'csv: the names of the labels in order, the negative first')
    level: str | None = option(None, 'ours', 'image, breast or exam; by data set and task')

    encoder: str = option('runs/demo/last.pt', 'ours', 'a checkpoint of ours or the official DINOv2 file',
                          group='encoder and head')
    dinov2: str | None = option(None, 'paper 3.3', 'the official DINOv2 file, for a row of its own')
    head: str = option('linear', 'ours', 'mlp (MammoDINO), linear, hazard (DBT-DINO) or knn')
    pool: str | None = option(None, 'dbt-dino 3.1', 'cls_mean, cls_mean_std, patch_mean, patch_mean_std; by head')
    freeze: bool | None = option(None, 'dbt-dino 6.2', 'train the head alone, on cached features; all but mlp do')
    hidden: int = option(512, 'ours', 'width of the two hidden layers of the mlp')
    standardize: bool = option(True, 'ours', 'frozen features to mean 0 and deviation 1 over the training units')
    balance: bool = option(True, 'dbt-dino 6.2.2', 'every class weighs the same in the loss')
    neighbours: int = option(10, 'ours', 'k of knn')

    out: str = option('runs/finetune', 'ours', 'folder of this run; one that holds a run is refused', group='the run')
    cache: str = option('runs/features', 'dbt-dino 6.2.1', 'frozen features, keyed by file and weights')
    seed: int = option(0, 'ours', 'split, head, order, bootstrap')
    workers: int = option(min(4, os.cpu_count() or 1), 'ours', 'data processes per rank')
    max_bad: float = option(0.05, 'ours', 'stop above this share of unusable files, from 100 files on')
    amp: bool | None = option(None, 'dbt-dino 6.2.1', 'bf16 autocast of the encoder; by default on GPUs only')

    size: int = option(0, 'paper 3.2', 'pixels of the squashed image; 0 is the side the encoder was trained on, 518',
                       group='images')
    slices: int = option(0, 'dbt-dino 6.2', 'slices read of a volume, evenly spaced; 0: all, or 4 when finetuning')
    chunk: int = option(75, 'dbt-dino 6.2.1', 'images through the encoder at once')

    epochs: int | None = option(None, 'dbt-dino 6.2', '75, hazard 100, mlp 30', group='optimization')
    batch: int = option(64, 'dbt-dino 6.2', 'units per step, over all ranks')
    micro_batch: int = option(8, 'ours', 'finetuning: units per rank at once, the rest is accumulated')
    lr: float | None = option(None, 'ours', 'peak: 1e-3, hazard 3e-4, finetuning 1e-4')
    search: int = option(0, 'dbt-dino 6.2.1', 'learning rates to draw and compare on validation; 24 there')
    wd: float = option(1e-4, 'dbt-dino 6.2', 'weight decay')
    layer_decay: float = option(0.75, 'ours', 'finetuning: learning rate factor per block below the top')
    clip: float = option(1.0, 'ours', 'gradient norm at most')
    fraction: tuple[float, ...] = option((1.0,), 'dbt-dino 3.2', 'shares of the training patients, a result for each')

    subgroup: str | None = option(None, 'dbt-dino 3.3', 'a table by this column of the label file, such as age',
                                  group='scores')
    draws: int = option(1000, 'dbt-dino 2.5', 'bootstrap draws of patients')

    phantoms: int = option(700, 'ours', 'breasts, of which 45 % train, 15 % choose and 40 % test', group='demo')


TASKS = ('cancer', 'lesion', 'lesion_type', 'birads', 'density', 'risk')
BINARY, ORDERED = ('cancer', 'lesion'), ('birads', 'density')
SLOTS = dict(image=('image',), breast=('CC', 'MLO'), exam=('RCC', 'LCC', 'RMLO', 'LMLO'))       # DBT-DINO's order
POOLS = dict(cls_mean=[0], cls_mean_std=[0, 2], patch_mean=[1], patch_mean_std=[1, 3])          # moments of `encode`
# lr and rates are those of heads on frozen features; finetuning starts from FINETUNING_LR, knn trains nothing
RECIPES = dict(mlp=dict(pool='cls_mean', freeze=False, epochs=30, lr=1e-3, rates=(1e-5, 1e-2)),
               linear=dict(pool='patch_mean_std', freeze=True, epochs=75, lr=1e-3, rates=(1e-5, 1e-2)),
               hazard=dict(pool='patch_mean_std', freeze=True, epochs=100, lr=3e-4, rates=(1e-5, 1e-3)),
               knn=dict(pool='cls_mean', freeze=True, epochs=0, lr=1e-3, rates=()))
FINETUNING_LR = 1e-4


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
                  lr=cfg.lr if cfg.lr is not None else recipe['lr'] if freeze else FINETUNING_LR,
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

# ---- cumulative hazard (DBT-DINO 6.2.2; Yala 2021) ------------------------------------------------------------------

YEARS = ('year 1', 'year 2', 'year 3', 'year 4', 'year 5')


def follow_up(years_to_cancer, years_followup, years=len(YEARS)):
    """One exam -> y (T,), mask (T,); None where no year was observed, or cancer came before the exam.

    Cancer in year c (from 0): y is 1 from c on, the mask 1 up to c, since follow-up ends with the diagnosis and one
    cancer must not count in every later year. No cancer: y is 0, the mask 1 over the whole years of `years_followup`.
    """
    cancer, year = years_to_cancer < years, np.arange(years)
    first = math.floor(years_to_cancer) if cancer else years
    last = first + 1 if cancer else math.floor(min(years_followup, years))
    return ((year >= first).astype(int), (year < last).astype(int)) if last > 0 and first >= 0 else None


def cumulative(x, W, b):
    """H_t = sum_{k<=t} softplus(W_k x + b_k): x (B, F), W (T, F), b (T,) -> (B, T), which never falls. The running
    sum is the product with the upper triangular matrix of 6.2.2; softplus keeps each year's hazard above 0."""
    return F.softplus(F.linear(*map(torch.as_tensor, (x, W, b)))).cumsum(-1)


def hazard(x, W, b):
    """p_t = 1 - exp(-H_t): the risk of cancer within t years, (B, T)."""
    return -torch.expm1(-cumulative(x, W, b))


def hazard_loss(H, y, mask, weight=None):
    """Cross-entropy of p = 1 - exp(-H) in log space, where log(1 - p) = -H exactly and nothing saturates:
    (1 - y) H - y log(1 - exp(-H)), mean over the observed years of an exam, then over exams by `weight` (B,).

    H (B, T) cumulative hazards above 0, y (B, T) 0 or 1, mask (B, T) 1 where observed. Exams never observed count not.
    """
    H, y, mask = (torch.as_tensor(a).double() for a in (H, y, mask))                    # (B, T) each
    each = (1 - y) * H - y * torch.log(-torch.expm1(-H.clamp_min(1e-30)))               # (B, T)
    seen = mask.sum(-1)
    weight = (seen > 0).double() * (1 if weight is None else weight)
    return ((each * mask).sum(-1) / seen.clamp_min(1) * weight).sum() / weight.sum().clamp_min(1e-30)


# ---- data sets: published layout -> rows ----------------------------------------------------------------------------

@dataclass
class Row:
    """One file, or one frame of it, with its label. An official `split` is kept; '' lets `assign` choose."""
    path: str
    label: str | np.ndarray | None                          # a class; risk: (T,) of 0, 1 and -1, not observed
    patient: str
    laterality: str = ''                                    # L or R
    view: str = ''                                          # CC, MLO, ...
    split: str = ''                                         # train, val or test
    exam: str = ''                                          # where a patient has several
    frame: int | None = None                                # None: every slice of the file
    record: dict = field(default_factory=dict)              # its line of the label file, for --subgroup
    name: str = ''                                          # the path from the data set's folder on
    readable: bool = True                                   # until its file turns out not to be


TYPES = ('calcification', 'mass', 'both')
CLASSES = dict(                         # data set -> the tasks it defines -> classes in order; '': those that occur
    rsna=dict(cancer='01', birads='120', density='ABCD'),
    vindr=dict(cancer='01', lesion='01', lesion_type='', birads='12345', density='ABCD'),
    ddsm=dict(cancer='01', lesion_type=TYPES, birads='', density='1234'),
    cmmd=dict(cancer='01', lesion='01', lesion_type=TYPES),
    cesm=dict(cancer='01', lesion='01', birads='', density='ABCD'),
    mias=dict(cancer='01', lesion='01', lesion_type=('ARCH', 'ASYM', 'CALC', 'CIRC', 'MISC', 'SPIC'), density='FGD'),
    csv=dict(cancer='01', lesion='01', lesion_type='', birads='', density='abcd', risk=YEARS))
REFUSED = {
    ('rsna', 'lesion'): 'RSNA has no lesion labels; BI-RADS 0 (recalled) comes nearest: --task birads',
    ('rsna', 'lesion_type'): 'RSNA has no lesion labels',
    ('ddsm', 'lesion'): 'CBIS-DDSM has no normal breasts; add those of DDSM or MINI-DDSM and use --dataset csv',
    ('cmmd', 'birads'): 'CMMD has no BI-RADS; TOMPEI-CMMD adds it for MLO views: join its sheet and use --dataset csv',
    ('cmmd', 'density'): 'CMMD has no density; TOMPEI-CMMD adds it for MLO views: join its sheet and use --dataset csv',
    ('cesm', 'lesion_type'): 'CDD-CESM lists findings as free text; choose a rule for them and use --dataset csv',
    ('mias', 'birads'): 'mini-MIAS has no BI-RADS; --task density has its own three classes, F G D'}
LEVELS = {'rsna': 'breast', 'vindr': 'breast', 'cmmd': 'breast', ('vindr', 'lesion'): 'image',
          ('vindr', 'lesion_type'): 'image', ('csv', 'risk'): 'exam'}                   # as their labels are given


MAX_SHEET = 8_000_000               # bytes that an .xlsx may unpack to


def table(path, *columns, sheet=None):
    """A CSV, or a sheet of an .xlsx, the first by default -> list of dicts, names and values stripped. ValueError
    where a column is missing, with what was found."""
    if not os.path.exists(path):
        raise ValueError(f'{path}: no such file; --root is the folder that holds it')
    try:
        if str(path).endswith('.xlsx'):
            lines = _xlsx(path, sheet)
        else:
            with open(path, newline='', encoding='utf-8-sig') as file:
                lines = list(csv.reader(file))
        lines = [[re.sub(r'[^\S ]+', ' ', cell).strip() for cell in line] for line in lines]  # no line breaks in cells
        lines = [line for line in lines if any(line)]
    except Exception as problem:                            # a zip and its XML can be broken in many ways
        raise ValueError(f"{path}: not a readable CSV in UTF-8 or .xlsx ({' '.join(str(problem).split())}); save it "
                         'again') from None
    header = lines[0] if lines else []
    missing = [name for name in columns if name not in header]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; found {', '.join(header) or 'nothing'}")
    if len(lines) < 2:
        raise ValueError(f'{path}: a header and no rows')
    return [dict(zip(header, (_blank(value) for value in line + [''] * len(header)))) for line in lines[1:]]


def _blank(text):
    """What stands for no value in label files."""
    return '' if text.lower() in ('nan', 'na', 'n/a', 'null', 'none') else text


def _xlsx(path, sheet):
    """The cells of a sheet, the first by default, as lists of strings. An .xlsx is a zip of XML files: sheets hold
    numbers, or indices into one list of strings."""
    with zipfile.ZipFile(path) as book:
        if sum(part.file_size for part in book.infolist()) > MAX_SHEET:
            raise ValueError(f'it unpacks to more than the {MAX_SHEET:,} bytes of finetune.MAX_SHEET')

        def xml(name):
            return ElementTree.fromstring(book.read(name))

        strings, lines = [], []
        if 'xl/sharedStrings.xml' in book.namelist():
            strings = [''.join(item.itertext()) for item in xml('xl/sharedStrings.xml')]
        link = '{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id'
        sheets = {s.get('name').strip(): s.get(link) for s in xml('xl/workbook.xml').findall('.//{*}sheet')}
        if sheet not in (None, *sheets):
            raise ValueError(f"no sheet {sheet!r}, found {', '.join(sheets)}")
        files = {r.get('Id'): r.get('Target').removeprefix('/').removeprefix('xl/')
                 for r in xml('xl/_rels/workbook.xml.rels')}
        for row in xml(f'xl/{files[sheets[sheet or list(sheets)[0]]]}').findall('.//{*}row'):
            cells = {}                                      # blank ones are left out
            for cell in row.findall('{*}c'):
                value = ''.join(cell.itertext()) if cell.get('t') == 'inlineStr' else cell.findtext('{*}v') or ''
                column = cell.get('r').rstrip('0123456789')
                cells[len(column), column] = strings[int(value)] if cell.get('t') == 's' else value
            if cells:
                lines.append(cells)
    return [[line.get(column, '') for column in sorted(lines[0])] for line in lines]      # A … Z, AA …


def yes(truth):
    """A label of the tasks with two classes."""
    return '1' if truth else '0'


def highest(values, **labels):
    """The highest of the labels that values stand for; a value that stands for none stays, and is refused by `load`."""
    return max(labels.get(value, value) for value in values)


def rsna(cfg):
    """RSNA 2022 (Kaggle): train.csv, train_images/<patient>/<image>.dcm. One label per breast, copied to each image.
    BI-RADS is 1, 2 or 0 (recalled, which gives cancer away) on half of the images, density blank for site 2; what has
    blanks may be written as 2.0."""
    column = dict(cancer='cancer', birads='BIRADS', density='density')[cfg.task]
    records = table(Path(cfg.root) / 'train.csv', 'patient_id', 'image_id', 'laterality', 'view', column)
    return [Row(f"{cfg.root}/train_images/{r['patient_id']}/{r['image_id']}.dcm", r[column].removesuffix('.0') or None,
                r['patient_id'], r['laterality'], r['view'], record=r) for r in records]


def vindr(cfg):
    """VinDr-Mammo: breast-level_annotations.csv, finding_annotations.csv, images/<study>/<image>.dicom, official split.
    lesion: the image has a box. lesion_type: the first category of its largest box; images without one take no part."""
    suspicious = dict(birads5=('5',), birads45=('4', '5')).get(cfg.cancer_rule, ())
    if cfg.task == 'cancer' and not suspicious:
        raise ValueError('VinDr has no cancer label; choose a rule: --cancer_rule birads5 (226 images) or '
                         'birads45 (988)')
    records = table(Path(cfg.root) / 'breast-level_annotations.csv', 'study_id', 'image_id', 'laterality',
                    'view_position', 'breast_birads', 'breast_density', 'split')
    boxes = defaultdict(list)                               # image -> (area, category) of each box
    if cfg.task in ('lesion', 'lesion_type'):
        for f in table(Path(cfg.root) / 'finding_annotations.csv', 'image_id', 'finding_categories', 'xmin', 'ymin',
                       'xmax', 'ymax'):
            categories = [c for c in re.findall("'([^']+)'", f['finding_categories']) if c != 'No Finding']
            try:
                if categories and f['xmin']:
                    area = (float(f['xmax']) - float(f['xmin'])) * (float(f['ymax']) - float(f['ymin']))
                    boxes[f['image_id']].append((area, categories[0]))
            except ValueError as problem:
                raise ValueError(f"finding_annotations.csv, image {f['image_id']}: {problem}") from None

    def label(r):
        grade, found = r['breast_birads'].removeprefix('BI-RADS '), boxes[r['image_id']]
        return dict(cancer=grade and yes(grade in suspicious), lesion=yes(found), lesion_type=found and max(found)[1],
                    birads=grade, density=r['breast_density'].removeprefix('DENSITY '))[cfg.task] or None

    return [Row(f"{cfg.root}/images/{r['study_id']}/{r['image_id']}.dicom", label(r), r['study_id'], r['laterality'],
                r['view_position'], r['split'].removesuffix('ing'), record=r) for r in records]


def ddsm(cfg):
    """CBIS-DDSM: {mass,calc}_case_description_{train,test}_set.csv, one row per abnormality, official split. A film is
    one row: malignant, BI-RADS and density are the highest of its abnormalities; a film with a mass and a
    calcification is `both`. Found by its folder, Mass-Training_P_00001_LEFT_CC, or by its series UID: the other UIDs
    changed when the archive was packed again, and the ROI columns, which may be swapped, are not needed."""
    films, places, rows = defaultdict(list), {}, []
    for path in sorted(Path(cfg.root).glob('????_case_description_*_set.csv'), reverse=True):
        kind, _, _, split, _ = path.stem.split('_')
        density = 'breast_density' if kind == 'mass' else 'breast density'
        for r in table(path, 'patient_id', density, 'left or right breast', 'image view', 'abnormality type',
                       'assessment', 'pathology', 'image file path'):
            r['density'] = '' if r[density] == '0' else r[density]
            films[split, r['patient_id'], r['left or right breast'][:1].upper(), r['image view']].append(r)
    if not films:
        raise ValueError(f'{cfg.root}: none of the four CSVs of CBIS-DDSM, such as mass_case_description_train_set.csv')
    for path in images.listing(cfg.images or cfg.root):
        for part in Path(path).parts[:-1]:
            places.setdefault(part, path)                   # folder or series UID -> its first file

    def label(found):
        kinds = {'calcification' if r['abnormality type'].startswith('calc') else 'mass' for r in found}
        return dict(cancer=highest((r['pathology'] for r in found), MALIGNANT='1', BENIGN='0',
                                   BENIGN_WITHOUT_CALLBACK='0'),
                    lesion_type='both' if len(kinds) == 2 else kinds.pop(), density=max(r['density'] for r in found),
                    birads=max(r['assessment'] for r in found))[cfg.task] or None

    for (split, patient, side, view), found in films.items():
        folder, _, series, *_ = (part.strip('" \n') for part in (found[0]['image file path'] + '//').split('/'))
        path = places.get(folder) or places.get(series) or f'{cfg.root}/{folder}'
        rows.append(Row(path, label(found), patient, side, view, split, record=found[0]))
    return rows


CMMD_TWINS = ('D1-0202', 'D2-0284', 'D1-0808', 'D1-1292')   # the same pixels under two names: none of them is used


def cmmd(cfg):
    """CMMD: CMMD_clinicaldata_revision.xlsx, one row per breast, and DICOM below <ID1>/; side and view come from the
    headers. cancer: Malignant against Benign; the 1,458 images of breasts without a row take part only under
    --cancer_rule unlisted, as negatives. lesion: the breast has a row. lesion_type: mass, calcification or both."""
    listed = {(r['ID1'], r['LeftRight']): r for r in table(Path(cfg.root) / 'CMMD_clinicaldata_revision.xlsx', 'ID1',
                                                           'LeftRight', 'abnormality', 'classification')}
    unlisted = dict(classification='Benign' if cfg.cancer_rule == 'unlisted' else '', abnormality='')
    rows = []
    for path in tqdm(images.listing(cfg.root), desc='reading headers', unit='file', delay=2):
        patient = next((part for part in Path(path).parts if re.fullmatch(r'D[12]-\d{4}', part)), None)
        if patient is None or path.lower().endswith('.npy'):
            continue
        if patient in CMMD_TWINS:
            rows.append(Row(path, None, patient))           # counted among the images without a label
            continue
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True,
                                     specific_tags=['ImageLaterality', 'ViewCodeSequence'])
            side, meaning = header.ImageLaterality, header.ViewCodeSequence[0].CodeMeaning
        except Exception as problem:
            tqdm.write(f'skipped: {path}: no laterality and view ({type(problem).__name__})', file=sys.stderr)
            continue
        r = listed.get((patient, side), unlisted)
        label = dict(cancer=highest([r['classification']], Malignant='1', Benign='0'), lesion=yes(r is not unlisted),
                     lesion_type=r['abnormality'])[cfg.task] or None
        rows.append(Row(path, label, patient, side, 'CC' if meaning.startswith('cranio') else 'MLO', record=r))
    return rows


def cesm(cfg):
    """CDD-CESM: 'Radiology manual annotations.xlsx', sheet 'all', and the low-energy JPEGs; one row per lesion, of
    which the worst counts, as in a BI-RADS of "4$5". BI-RADS 6 (known cancer) takes no part. The split that the
    authors' script writes ({training,testing}_set_pathology.csv) is used where it lies beside; it mixes patients."""
    root, name, verdict = Path(cfg.root), 'Image_name', 'Pathology Classification/ Follow up'
    files = {Path(path).stem.strip(): path for path in images.listing(cfg.images or cfg.root)}
    split = {r[name]: part for part in ('train', 'test') if (root / f'{part}ing_set_pathology.csv').exists()
             for r in table(root / f'{part}ing_set_pathology.csv', name)}
    sheet = next(root.glob('Radiology?manual?annotations.xlsx'), root / 'Radiology manual annotations.xlsx')
    by_image, rows = defaultdict(list), []
    for r in table(sheet, name, 'Patient_ID', 'Side', 'Type', 'View', 'BIRADS', 'Breast density (ACR)', verdict,
                   sheet='all'):
        if r['Type'] == 'DM':
            by_image[r[name]].append(r)

    def label(found):
        verdicts = [r[verdict] for r in found]
        grades = [grade.removesuffix('.0') for r in found for grade in r['BIRADS'].split('$')]
        return dict(cancer=highest(verdicts, Normal='0', Benign='0', Malignant='1'),
                    lesion=highest(verdicts, Normal='0', Benign='1', Malignant='1'),
                    birads='' if '6' in grades else max(grades),
                    density=found[0]['Breast density (ACR)'].upper().strip('_'))[cfg.task] or None

    for image, found in by_image.items():
        path = files.get(image, f'{root}/Low energy images of CDD-CESM/{image}.jpg')
        rows.append(Row(path, label(found), found[0]['Patient_ID'].removesuffix('.0'), found[0]['Side'][:1].upper(),
                        found[0]['View'], split.get(image, ''), record=found[0]))
    return rows


def mias(cfg):
    """mini-MIAS: Info.txt and mdb001 … mdb322 (MLO film; mdb001 and mdb002 are one patient). density F, G, D; lesion:
    anything but NORM; cancer: malignant; lesion_type: the class of the first finding. Odd is R as Info.txt has it."""
    info, films, rows = Path(cfg.root) / 'Info.txt', defaultdict(list), []
    if not info.exists():
        raise ValueError(f'{info}: no such file; --root is the folder that holds it')
    files = {Path(path).stem: path for path in images.listing(cfg.images or cfg.root)}
    for line in info.read_text(errors='replace').splitlines():
        found = re.match(r'(mdb\d{3}) +([FGD]) +(\w+)(?: +([BM])\b)?', line)
        if found:
            films[found[1]].append(found)
    for film, found in films.items():
        number, kinds = int(film[3:]), [f[3] for f in found if f[3] != 'NORM']
        label = dict(cancer=yes(any(f[4] == 'M' for f in found)), lesion=yes(kinds), lesion_type=kinds and kinds[0],
                     density=found[0][2])[cfg.task] or None
        path, patient = files.get(film, f'{cfg.root}/{film}.pgm'), f'{(number + 1) // 2:03d}'
        rows.append(Row(path, label, patient, 'R' if number % 2 else 'L', 'MLO',
                        record=dict(density=found[0][2], severity=found[0][4] or 'N')))
    return rows


def manifest(cfg):
    """A CSV of your own, at --root or as manifest.csv in it: path (from the CSV's folder) and patient; `label`, or a
    column named as the task; risk: years_to_cancer (blank: none seen) and years_followup. Optional: frame, exam,
    laterality, view, split, and whatever --subgroup asks for. A patient in two splits is an error."""
    path = Path(cfg.root) / 'manifest.csv' if os.path.isdir(cfg.root) else Path(cfg.root)
    records = table(path, 'path', 'patient', *(('years_to_cancer', 'years_followup') if cfg.task == 'risk' else ()))
    column = cfg.task if cfg.task in records[0] else 'label'
    if cfg.task != 'risk' and column not in records[0]:
        raise ValueError(f"{path}: no column label or {cfg.task}; found {', '.join(records[0])}")

    def label(r):
        if cfg.task == 'risk':
            cancer = float(r['years_to_cancer'] or math.inf)
            known = cancer if r['years_to_cancer'] else 0   # until then there was none
            seen = follow_up(cancer, float(r['years_followup'] or known))
            return seen and np.where(seen[1], seen[0], -1)
        label = r[column] if cfg.classes else r[column].removesuffix('.0')
        return (label.lower() if cfg.task == 'density' and not cfg.classes else label) or None

    rows, lines, splits = [], {}, dict(training='train', validation='val')
    for number, r in enumerate(records, 2):
        if not r['patient'] or not r['path']:
            raise ValueError(f'{path}, line {number}: path and patient must not be blank')
        split = r.get('split', '').lower()
        try:
            rows.append(Row(str(path.parent / r['path']), label(r), r['patient'], r.get('laterality', '')[:1].upper(),
                            r.get('view', '').upper(), splits.get(split, split), r.get('exam', ''),
                            int(r['frame']) if r.get('frame') else None, r))
        except (ValueError, OverflowError) as problem:
            raise ValueError(f'{path}, line {number}: {problem}; frame and years must be numbers') from None
        first = lines.setdefault((os.path.normpath(rows[-1].path), rows[-1].frame), number)
        if first != number:
            raise ValueError(f"{path}, line {number}: {r['path']} stands in line {first} already")
    return rows


DATASETS = dict(rsna=rsna, vindr=vindr, ddsm=ddsm, cmmd=cmmd, cesm=cesm, mias=mias, csv=manifest)


# ---- rows -> splits -> units ----------------------------------------------------------------------------------------

def load(cfg):
    """Rows of the data set with labels as numbers, files that exist and a split each. -> rows, classes, notes: what
    was left out and why, one sentence each."""
    if cfg.task not in CLASSES[cfg.dataset]:
        raise ValueError(REFUSED.get((cfg.dataset, cfg.task), f'{cfg.dataset} has no follow-up; --task risk takes '
                                     '--dataset csv with years_to_cancer and years_followup'))
    found, notes = DATASETS[cfg.dataset](cfg), []
    rows = [row for row in found if row.label is not None]
    if len(rows) < len(found):
        notes.append(f'{len(found) - len(rows)} of {len(found)} images have no {cfg.task} label and take no part')
    classes = tuple(cfg.classes or CLASSES[cfg.dataset][cfg.task])
    if not classes:                                         # those that occur
        labels = {row.label for row in rows}
        classes = tuple(sorted(labels & set('0123456') if cfg.task == 'birads' else labels))
    for row in rows:
        if cfg.task != 'risk':
            if row.label not in classes:
                hint = '; --classes names others' if cfg.dataset == 'csv' else ''
                raise ValueError(f"{row.path}: {cfg.task} {row.label!r} is none of {', '.join(classes)}{hint}")
            row.label = classes.index(row.label)
        row.name = os.path.relpath(row.path, _folder(cfg))
        row.path = _prepared(cfg, row)
    absent = {row.path for row in rows if not os.path.isfile(row.path)}
    if absent:
        notes.append(f"{len(absent)} files of the label file are not there and take no part, the first: {min(absent)}")
        if len(absent) > cfg.max_bad * len(rows):
            raise ValueError(f'{len(absent)} of {len(rows)} files that the labels name are missing, the first: '
                             f'{min(absent)}; --max_bad is {cfg.max_bad}. Is --root, or --images, the right folder?')
    rows = [row for row in rows if row.path not in absent]
    return assign(cfg, rows, notes), classes, notes


def _folder(cfg):
    return cfg.root if os.path.isdir(cfg.root) else os.path.dirname(cfg.root) or '.'


def _prepared(cfg, row):
    """Where a file of --root lies: below --images under the name `prepare.py` gave it, or itself."""
    if cfg.images is None or Path(row.path).is_relative_to(cfg.images):
        return row.path
    if row.name.startswith('..'):
        raise ValueError(f'{row.path} lies outside {_folder(cfg)}, so --images cannot mirror it; drop --images or move '
                         'the list')
    mirror = Path(cfg.images, row.name)
    return str(next((p for p in (mirror, mirror.with_suffix('.npy'), Path(f'{mirror}.npy')) if p.exists()), mirror))


def drawn(items, share, seed, rounded=round):
    """A share of the patients of rows or units, of each label alike, where a patient's highest counts. Seed and names
    alone set the order in which they are drawn, so that smaller shares lie in larger ones."""
    worst, groups = defaultdict(int), defaultdict(list)
    for item in items:
        worst[item.patient] = max(worst[item.patient], int(np.max(item.label)))
    for patient in sorted(worst, key=lambda name: hashlib.sha256(f'{seed} {name}'.encode()).digest()):
        groups[worst[patient]].append(patient)
    return {patient for group in groups.values() for patient in group[:rounded(share * len(group))]}


def assign(cfg, rows, notes):
    """Every row's split. Official training and test sets stay; a patient in both keeps only the test rows. Without a
    test set a fifth of the patients of each label becomes one, without a validation set a fifth of the others."""
    splits = defaultdict(set)                               # patient -> splits of the rows
    for row in rows:
        splits[row.patient].add(row.split)
    names = set().union(*splits.values())
    if names - {'train', 'val', 'test'} and names != {''}:
        raise ValueError(f"splits {', '.join(sorted(map(repr, names)))}: expected train, val and test, or none at all")
    leaks = sorted(patient for patient, of in splits.items() if len(of) > 1)
    if leaks and cfg.dataset == 'csv':
        raise ValueError(f"{len(leaks)} patients are in two splits, the first: {leaks[0]} in "
                         f"{' and '.join(sorted(splits[leaks[0]]))}")
    if leaks:
        kept = [row for row in rows if row.split == 'test' or len(splits[row.patient]) == 1]
        notes.append(f'{len(leaks)} patients are in training and test of the official split; their '
                     f"{len(rows) - len(kept)} training images are dropped: {', '.join(leaks)}")
        rows = kept
    for split, free in (('test', ''), ('val', 'train')):
        if not any(row.split == split for row in rows):
            pool = [row for row in rows if row.split == free]
            taken = drawn(pool, 0.2, cfg.seed)
            for row in pool:
                row.split = split if row.patient in taken else 'train'
    return rows


@dataclass
class Unit:
    """What gets one prediction: an image, a breast or an exam."""
    name: str
    patient: str
    split: str
    label: int | np.ndarray                                 # class; risk: (T,), 1 cancer by then, 0 none, -1 unobserved
    rows: list                                              # (number of the row, slot)
    record: dict


def units_of(cfg, rows, notes):
    """Rows -> units. A breast or exam takes its highest label, and no part where the types of its lesions differ."""
    slots, groups, others, units = SLOTS[cfg.level], defaultdict(list), Counter(), []
    for i, row in enumerate(rows):
        if cfg.level != 'image' and not (row.view and row.laterality):
            raise ValueError(f'{row.path}: laterality or view is blank; --level {cfg.level} needs both')
        frame = '' if row.frame is None else f'#{row.frame}'
        exam = f'{row.patient}/{row.exam}'.rstrip('/')      # exams are 1, 2, … in some label files
        name, slot = dict(image=(row.name + frame, 'image'), breast=(f'{exam}/{row.laterality}', row.view),
                          exam=(exam, row.laterality + row.view))[cfg.level]
        if slot in slots:
            groups[name].append((i, slots.index(slot)))
        else:
            others[slot] += 1
    for name, members in groups.items():
        labels, row = [rows[i].label for i, _ in members], rows[members[0][0]]
        if cfg.task != 'lesion_type' or len(set(labels)) == 1:
            units.append(Unit(name, row.patient, row.split, max(labels, key=np.max), members, row.record))
    if others:
        counted = ', '.join(f'{view} {n}' for view, n in others.most_common())
        notes.append(f"images of views other than {', '.join(slots)} take no part at {cfg.level} level: {counted}")
    if len(units) < len(groups):
        notes.append(f'{len(groups) - len(units)} {cfg.level}s hold lesions of several types and take no part')
    return units


def parted(units, notes=()):
    """-> {split: units}; ValueError where a split holds nothing to learn from or to tell apart, with the notes on
    what was left out."""
    parts = {split: [unit for unit in units if unit.split == split] for split in ('train', 'val', 'test')}
    for split, part in parts.items():
        found = {int(np.max(unit.label)) for unit in part}
        if len(found) < 2:
            what = 'holds one class only, so there is nothing to tell apart' if found else 'is empty'
            raise ValueError('; '.join([f'the {split} split {what}: give it patients of each class', *notes]))
    return parts


def targets(units):
    """(n,) classes, or (n, T)"""
    return torch.tensor(np.stack([unit.label for unit in units]))


def missing_views(cfg, rows, units):
    """{unit: [views of which it has no readable file]}"""
    lacks = {}
    for unit in units:
        there = {slot for i, slot in unit.rows if rows[i].readable}
        lacks[unit.name] = [view for slot, view in enumerate(SLOTS[cfg.level]) if slot not in there and there]
    return {name: views for name, views in lacks.items() if views}


# ---- files -> features ----------------------------------------------------------------------------------------------

class Images(Dataset):
    """(row i, mirrored or not) -> i and its images uint8 (n, S, S), squashed to the encoder's square (DBT-DINO 6.2.1);
    None where the file cannot be read, with the reason on the terminal."""

    def __init__(self, cfg, rows, size):
        self.cfg, self.rows, self.size = cfg, rows, size

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        i, mirrored = item
        row = self.rows[i]
        try:
            count = images.frames(row.path)
            taken = min(self.cfg.slices or count, count)    # the middles of so many equal parts of the volume
            frames = [int((k + 0.5) * count / taken) for k in range(taken)] if row.frame is None else [row.frame]
            squashed = np.stack([self.squashed(row.path, frame) for frame in frames])
        except (ValueError, OSError) as problem:
            tqdm.write(f'skipped: {problem}', file=sys.stderr)
            return i, None
        return i, squashed[..., ::-1] if mirrored else squashed

    def squashed(self, path, frame):
        """Prepared .npy have their CLAHE behind them; every other file gets it here (MammoDINO 3.1)."""
        image = images.read(path, frame)
        image = image if path.lower().endswith('.npy') else images.clahe(image)
        return np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC))


def stacked(arrays):
    """Images (n, S, S) of R rows -> all of them (sum of n, S, S) and the row of each (sum of n,)."""
    counts = torch.tensor([len(images) for images in arrays])
    return torch.from_numpy(np.concatenate(arrays)), torch.arange(len(arrays)).repeat_interleave(counts)


def encode(encoder, images, owner, rows, chunk):
    """uint8 images (n, S, S) of the rows `owner` (n,) -> moments (R, 4, D): mean of CLS, mean of patches, deviation of
    CLS, deviation of patches, over slices and patches jointly and unbiased (DBT-DINO 2.4). Sums add up in fp64, `chunk`
    images at a time, so that no volume of tokens is ever held. Of a single image the deviation of CLS is the floor,
    1e-6."""
    sums = torch.zeros(rows, 4, encoder.config['width'], dtype=torch.float64, device=owner.device)
    for part, of in zip(images.split(chunk), owner.split(chunk)):
        part = part.to(owner.device).unsqueeze(1).float() / 255                         # (n, 1, S, S), bytes travel
        cls, patches = (tokens.double() for tokens in encoder(part))                    # (n, D), (n, N, D)
        each = torch.stack([cls, patches.sum(1), cls.square(), patches.square().sum(1)], dim=1)
        sums = sums.index_add(0, of, each)
    count = torch.bincount(owner, minlength=rows).double()
    count = torch.stack([count, count * patches.shape[1]], dim=1).unsqueeze(-1)         # (R, 2, 1) images, patches
    mean = sums[:, :2] / count
    variance = (sums[:, 2:] - count * mean.square()) / (count - 1).clamp_min(1)
    return torch.cat([mean, variance.clamp_min(1e-12).sqrt()], dim=1).float()          # sqrt is infinitely steep at 0


def half(cfg, device):
    """Whether the encoder runs in bf16."""
    return device.type == 'cuda' if cfg.amp is None else cfg.amp


def cached(cfg, encoder, rows, size, amp):
    """Where the features of each row are kept: a folder named by what they depend on besides the file (weights, shape,
    size of the image, slices, precision), in it a name made of the file's path, size and time."""
    digest = hashlib.sha256(json.dumps([encoder.config, size, cfg.slices, amp]).encode())
    for name, value in encoder.state_dict().items():
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    folder, places = Path(cfg.cache) / digest.hexdigest()[:16], {}
    folder.mkdir(parents=True, exist_ok=True)
    for i, row in rows.items():
        file = os.stat(row.path)
        key = f'{os.path.abspath(row.path)} {file.st_size} {file.st_mtime_ns} {row.frame}'
        places[i] = folder / f'{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy'
    return places


def stored_moments(place, width):
    """Moments (4, D) from the cache; None where they are not there, or damaged."""
    try:
        with warnings.catch_warnings(action='ignore'):
            value = np.load(place, mmap_mode='r', allow_pickle=False)
        return np.array(value) if value.shape == (4, width) and np.isfinite(value).all() else None
    except Exception:                                       # the header is text that a parser of Python reads
        return None


@torch.no_grad()
def features(cfg, encoder, rows, units, device, cache=True):
    """Moments of the rows that the units hold -> float32 (R, 4, D); NaN for the others, and where a file is unreadable.
    Each rank computes a share of them and all ranks get all."""
    rank, ranks, amp = dist.get_rank(), dist.get_world_size(), half(cfg, device)
    size = cfg.size or encoder.config['size']
    wanted = sorted({i for unit in units for i, _ in unit.rows})
    mine = wanted[rank::ranks]
    places = cached(cfg, encoder, {i: rows[i] for i in mine}, size, amp) if cache else {}
    found = {i: stored_moments(place, encoder.config['width']) for i, place in places.items()}
    found = {i: value for i, value in found.items() if value is not None}

    encoder.eval()
    batches = DataLoader(Images(cfg, rows, size), sampler=[(i, False) for i in mine if i not in found], batch_size=8,
                         num_workers=cfg.workers, collate_fn=list)
    for items in tqdm(batches, desc='encoding', unit='batch', disable=rank > 0, leave=False, delay=2):
        readable = {i: images for i, images in items if images is not None}
        if not readable:
            continue
        images, owner = stacked(list(readable.values()))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            values = encode(encoder, images, owner.to(device), len(readable), cfg.chunk).cpu().numpy()
        for i, value in zip(readable, values):
            found[i] = value
            if cache:                                       # written beside its place and moved there whole
                part = places[i].with_suffix(f'.{os.uname().nodename}-{os.getpid()}.npy')
                try:
                    np.save(part, value)
                    os.replace(part, places[i])
                except OSError as problem:
                    part.unlink(missing_ok=True)
                    raise OSError(f'{part} cannot be written ({problem}); is the disk full, or not yours?') from problem

    everyone = [None] * ranks
    dist.all_gather_object(everyone, found)
    found = {i: value for part in everyone for i, value in part.items()}
    bad = len(wanted) - len(found)
    if bad == len(wanted) or len(wanted) >= 100 and bad > cfg.max_bad * len(wanted):
        raise ValueError(f'{bad} of {len(wanted)} files are unusable, --max_bad is {cfg.max_bad}; names are above')
    out = np.full((len(rows), 4, encoder.config['width']), np.nan, np.float32)
    for i in wanted:
        rows[i].readable = i in found
        out[i] = found.get(i, np.nan)
    return torch.from_numpy(out)


def assemble(cfg, values, place, units):
    """Moments of rows (R, 4, D) -> features of units (B, V F): of the moments those of --pool, the views side by side.
    place (R,) = unit * V + view. Several files of one view are averaged; a missing view is the mean of the unit's
    others, so that it adds nothing new."""
    views, values = len(SLOTS[cfg.level]), values[:, POOLS[cfg.pool]].flatten(1)        # (R, F)
    count = torch.bincount(place, minlength=units * views).unsqueeze(1)                 # (B V, 1)
    mean = values.new_zeros(units * views, values.shape[1]).index_add(0, place, values) / count.clamp_min(1)
    mean, there = mean.unflatten(0, (units, views)), (count > 0).unflatten(0, (units, views))     # (B, V, F), (B, V, 1)
    others = (mean * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)
    return torch.where(there, mean, others).flatten(1)


def unit_features(cfg, units, values):
    """Moments of rows (R, 4, D) -> (B, V F) of the units, NaN for those without a readable file."""
    views = len(SLOTS[cfg.level])
    rows, place = torch.tensor([(i, u * views + slot) for u, unit in enumerate(units) for i, slot in unit.rows]).T
    there = ~values[rows, 0, 0].isnan()
    x = assemble(cfg, values[rows[there]], place[there], len(units))
    x[torch.bincount(place[there] // views, minlength=len(units)) == 0] = math.nan
    return x


def labelled(cfg, units, values):
    """Features (n, F) and targets (n,) or (n, T) of the units that have a readable file."""
    x, y = unit_features(cfg, units, values), targets(units)
    there = x.isfinite().all(1)
    return x[there], y[there]


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


def class_weights(cfg, targets):
    """Weights of the units (n,), 1 on average, so that every class, or exams with and without cancer, counts the same
    over the set: instead of DBT-DINO's balanced sampler and balanced validation set (6.2.2)."""
    kind = targets.amax(1) if cfg.task == 'risk' else targets
    count = torch.bincount(kind)
    return (len(kind) / (count > 0).sum() / count)[kind] if cfg.balance else torch.ones(len(kind))


def criterion(cfg, outputs, targets, weight):
    """Mean over the units of weight * hazard loss or cross-entropy: outputs (B, C or T), targets (B,) or (B, T)."""
    if cfg.task == 'risk':
        loss = hazard_loss(outputs, targets > 0, targets >= 0, weight)                  # a mean over the weights
        return loss * weight.sum() / len(weight)            # over units, so that micro-batches add up to their batch
    return (F.cross_entropy(outputs.float(), targets, reduction='none') * weight).mean()


def train_head(cfg, classes, x, y, x_val, y_val, lr):
    """AdamW and a cosine over `epochs` on frozen features -> the head of the epoch with the least validation loss,
    and that loss. x (n, F), y (n,) or (n, T)."""
    torch.manual_seed(cfg.seed)
    head = Head(cfg.head, x.shape[1], len(classes), cfg.hidden)
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


def fit(cfg, classes, x, y, x_val, y_val):
    """A head on frozen features, and {learning rate: validation loss}: one rate, or --search of them drawn from the
    head's range (DBT-DINO 6.2.1 and 6.2.2), of which the least loss wins."""
    if cfg.head == 'knn':
        return Neighbours(x, y, len(classes), cfg.neighbours), {}
    low, high = RECIPES[cfg.head]['rates']
    rng = np.random.default_rng([cfg.seed, 24])             # a stream of its own
    rates = np.exp(rng.uniform(math.log(low), math.log(high), cfg.search)).tolist() if cfg.search else [cfg.lr]
    tried = {lr: train_head(cfg, classes, x, y, x_val, y_val, lr) for lr in rates}
    head, least = min(tried.values(), key=lambda trial: trial[1])
    if not math.isfinite(least):
        raise ValueError('the validation loss was never finite; lower --lr')
    return head, {f'{lr:.3g}': loss for lr, (_, loss) in tried.items()}


class Network(nn.Module):
    """Encoder and head in one, for finetuning: images uint8 (n, S, S) of R rows of B units -> outputs (B, C or T)."""

    def __init__(self, cfg, encoder, head):
        super().__init__()
        self.cfg, self.encoder, self.head = cfg, encoder, head
        encoder.mask_token.requires_grad_(False)            # nothing is masked here; DDP waits for every gradient

    def forward(self, images, owner, place, units):
        """owner (n,): the row of an image. place (R,): unit * V + view of a row."""
        values = encode(self.encoder, images, owner, len(place), self.cfg.chunk)
        return self.head(assemble(self.cfg, values, place, units))


def plan(cfg, n, rank, ranks):
    """This rank's micro-batches of every step, lists of (unit, mirrored or not). Epochs come in turn, each a
    permutation wrapped round to whole batches, which are the same however many ranks share them."""
    steps = []
    for epoch in range(cfg.epochs):
        rng = np.random.default_rng([cfg.seed, epoch])
        order, mirrored = rng.permutation(n), rng.random(n) < 0.5
        for batch in np.resize(order, (math.ceil(n / cfg.batch), cfg.batch)):
            mine = [(int(u), bool(mirrored[u])) for u in batch[rank::ranks]]
            steps.append([mine[i:i + cfg.micro_batch] for i in range(0, len(mine), cfg.micro_batch)])
    return steps


def collated(train, part, items, size, views):
    """A micro-batch [(unit, mirrored or not)] and the items of its rows -> images (n, S, S), the row of each (n,), the
    place unit * V + view of each row (R,), and 1 for the units (B,) that have an image, 0 for the others."""
    places = [b * views + slot for b, (u, _) in enumerate(part) for _, slot in train[u].rows]
    seen = [(place, images) for place, (_, images) in zip(places, items) if images is not None]
    there = torch.zeros(len(part))
    there[[place // views for place, _ in seen]] = 1
    place, arrays = zip(*seen or [(0, np.zeros((1, size, size), np.uint8))])            # a blank that weighs nothing
    images, owner = stacked(arrays)
    return images, owner, torch.tensor(place), there


def finetune(cfg, encoder, rows, train, val, classes, device):
    """Encoder and head together, as MammoDINO 3.3 does. It gives no recipe; ours is AdamW, a learning rate that falls
    block by block towards the input, a warm-up over the first tenth of the steps, then a cosine. -> the head, {learning
    rate: least validation loss}; encoder and head hold the weights of that epoch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    size, views = cfg.size or encoder.config['size'], len(SLOTS[cfg.level])
    torch.manual_seed(cfg.seed)
    network = Network(cfg, encoder, head_for(cfg, encoder, classes)).to(device)
    ddp = nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == 'cuda' else None)
    optimizer = torch.optim.AdamW(vit.param_groups(network, cfg.lr, cfg.wd, cfg.layer_decay))
    y, steps = targets(train), plan(cfg, len(train), rank, ranks)
    weight = class_weights(cfg, y)
    files = [[(i, mirrored) for u, mirrored in part for i, _ in train[u].rows] for parts in steps for part in parts]
    batches = iter(DataLoader(Images(cfg, rows, size), batch_sampler=files, num_workers=cfg.workers, collate_fn=list))
    least, best = math.inf, copy.deepcopy(network.state_dict())
    bar = tqdm(steps, unit='step', disable=rank > 0, desc='finetuning')
    for step, parts in enumerate(bar):
        for group in optimizer.param_groups:
            group['lr'] = group['lr_scale'] * cosine(step, len(steps), cfg.lr, 0, warmup=len(steps) // 10)
        encoder.train()                                     # validation leaves it in eval mode
        for part in parts:
            unit = [u for u, _ in part]
            images, owner, place, there = collated(train, part, next(batches), size, views)
            with contextlib.nullcontext() if part is parts[-1] else ddp.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=half(cfg, device)):
                    outputs = ddp(images, owner.to(device), place.to(device), len(unit))
                loss = criterion(cfg, outputs, y[unit].to(device), (weight[unit] * there).to(device))
                (loss * len(unit) * ranks / cfg.batch).backward()       # DDP takes the mean over ranks, this is a sum
        nn.utils.clip_grad_norm_(network.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (len(steps) // cfg.epochs) == 0:
            x_val, y_val = labelled(cfg, val, features(cfg, encoder, rows, val, device, cache=False))
            with torch.no_grad():
                outputs = network.head(x_val.to(device)).cpu()
            loss = criterion(cfg, outputs, y_val, class_weights(cfg, y_val)).item()
            bar.set_postfix(val=f'{loss:.4f}', best=f'{min(loss, least):.4f}')
            if loss < least:
                least, best = loss, copy.deepcopy(network.state_dict())
    if not math.isfinite(least):
        raise ValueError('the validation loss was never finite; lower --lr')
    network.load_state_dict(best)
    return network.head.eval(), {f'{cfg.lr:.3g}': least}


def head_for(cfg, encoder, classes):
    width = len(SLOTS[cfg.level]) * len(POOLS[cfg.pool]) * encoder.config['width']
    return Head(cfg.head, width, len(classes), cfg.hidden)


@torch.no_grad()
def predicted(cfg, head, x):
    """Features (n, F) -> probabilities (n, C), or the risk within each year (n, T), as float64; NaN stays NaN."""
    outputs = head(x.to(next(head.buffers()).device)).cpu().double()
    return (-torch.expm1(-outputs) if cfg.task == 'risk' else outputs.softmax(-1)).numpy()


# ---- results --------------------------------------------------------------------------------------------------------

def questions(cfg, classes, y):
    """What a task asks as yes or no -> {name: (use (n,), truth, column)}, with an ROC curve of p[use, column] each:
    cancer or not; the years, of the exams that take part in them; each class against the others."""
    if cfg.task == 'risk':
        return {name: (use, y[use, t] > 0, t) for t, (name, use) in enumerate(zip(classes, in_year(y, y >= 0).T))}
    everyone = np.ones(len(y), bool)
    if cfg.task in BINARY:
        return {cfg.task: (everyone, y == 1, 1)}
    return {name: (everyone, y == c, c) for c, name in enumerate(classes)}


def positives(cfg, classes, units):
    """{question: how many; risk: of how many that take part in the year}"""
    asked = questions(cfg, classes, targets(units).numpy())
    return {name: f'{truth.sum()} of {len(truth)}' if cfg.task == 'risk' else int(truth.sum())
            for name, (_, truth, _) in asked.items()}


def decided(cfg, result):
    """Classes (n,): the likeliest, or positive from the validation's threshold on."""
    return (result['p'][:, 1] >= result['threshold']).astype(int) if cfg.task in BINARY else result['p'].argmax(1)


def metrics(cfg, classes, threshold=None):
    """{name: metric(y, p)}; the first is the one that runs are compared by. y (n,), p (n, C); risk: (n, T) both, and
    the mean is over the years in which it is defined."""
    def area(y, p, name):
        use, truth, column = questions(cfg, classes, y)[name]
        return auc(truth, p[use, column])

    def hits(y, p, kind):
        return ((p[y == kind, 1] >= threshold) == kind).mean() if (y == kind).any() else math.nan

    if cfg.task == 'risk':
        years = {name: lambda y, p, name=name: area(y, p, name) for name in classes}
        return {'mean AUROC': lambda y, p: np.mean([a for a in yearly_auc(y, y >= 0, p) if a == a] or math.nan)} | years
    if cfg.task in BINARY:
        return {'AUC': lambda y, p: area(y, p, cfg.task), 'sensitivity': lambda y, p: hits(y, p, 1),
                'specificity': lambda y, p: hits(y, p, 0)}
    out = {'accuracy': lambda y, p: (p.argmax(1) == y).mean(),
           'macro F1': lambda y, p: f1(y, p.argmax(1), len(classes)),
           'macro AUC': lambda y, p: np.mean([area(y, p, name) for name in classes])}
    if cfg.task in ORDERED and '0' not in classes:          # BI-RADS 0, incomplete, has no place in the order
        out['kappa'] = lambda y, p: kappa(y, p.argmax(1), len(classes))
    return out


def estimate(cfg, metric, arrays, patients):
    """-> metric(*arrays) with its 95 % interval by patient and the number of draws on which it is not defined, and its
    values on the others."""
    values = resample(metric, arrays, patients, np.random.default_rng(cfg.seed), cfg.draws)
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (math.nan, math.nan)
    return dict(value=float(metric(*arrays)), low=float(low), high=float(high),
                undefined=cfg.draws - len(values)), values


def measured(cfg, classes, y, p, threshold, patients):
    """{metric: estimate}"""
    return {name: estimate(cfg, metric, (y, p), patients)[0]
            for name, metric in metrics(cfg, classes, threshold).items()}


def versus(cfg, classes, y, p1, p2, patients):
    """Two results on the same units -> the difference of their first metric with its paired interval by patient, and
    {test: p}: DeLong (binary; risk: every year) or McNemar. Both take units as independent, so where patients have
    several, `tests` holds the p of the bootstrap by patient and `naive` theirs."""
    metric = next(iter(metrics(cfg, classes).values()))
    out, draws = estimate(cfg, lambda y, p1, p2: metric(y, p2) - metric(y, p1), (y, p1, p2), patients)
    if cfg.task in (*BINARY, 'risk'):
        tests = {'DeLong' + f', {name}' * (cfg.task == 'risk'): delong(truth, p1[use, column], p2[use, column])[2]
                 for name, (use, truth, column) in questions(cfg, classes, y).items()}
    else:
        tests = {'McNemar': mcnemar(p1.argmax(1) == y, p2.argmax(1) == y)}
    naive = {}
    if len(set(patients)) < len(y):
        beyond = 1 + min((draws <= 0).sum(), (draws >= 0).sum())    # two-sided: twice the smaller share of draws past 0
        p = float(min(1, 2 * beyond / (1 + len(draws)))) if len(draws) else math.nan
        tests, naive = {'bootstrap by patient': p}, tests
    return out | dict(tests=tests, naive=naive)


def adjust(found):
    """Benjamini-Hochberg over all tests of these comparisons as one family: adds `adjusted` {test: p} to each."""
    family = [(v, test) for v in found for test, p in v['tests'].items() if not math.isnan(p)]
    for v in found:
        v['adjusted'] = dict.fromkeys(v['tests'], math.nan)
    for (v, test), p in zip(family, benjamini_hochberg([v['tests'][test] for v, test in family])):
        v['adjusted'][test] = float(p)
    return len(family)


def gap(v):
    """+.038 [-.002, +.077]; McNemar p = .06, adjusted .12"""
    parts = [f"{v['value']:+.3f} [{v['low']:+.3f}, {v['high']:+.3f}]"]
    parts += [f'{test} p = {p:.3g}, adjusted {v["adjusted"][test]:.3g}' for test, p in v['tests'].items()]
    parts += [f'{test} p = {p:.3g} if units were independent' for test, p in v['naive'].items()]
    return '; '.join(parts)


def cell(m):
    """.812 [.774, .850]"""
    value, low, high = ('-' if m[k] is None else f'{m[k]:.3f}'.replace('0.', '.') for k in ('value', 'low', 'high'))
    return f'{value} [{low}, {high}]'


def plain(value):
    """For JSON, which knows no NaN: null; names as text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title, lines):
    """lines: {label: {metric: estimate}}, all of the same metrics."""
    print(f'\n{title}\n{"":30s}' + ''.join(f'{name:22s}' for name in next(iter(lines.values()))).rstrip())
    for label, estimates in lines.items():
        print(f'{label:30s}' + ''.join(f'{cell(m):22s}' for m in estimates.values()).rstrip())


def subgroups(cfg, units, classes, y, result, patients):
    """The metrics by a column of the label file, ages by decade as in DBT-DINO's Table 5; prints the table."""
    values = [next((v for k, v in unit.record.items() if k.lower() == cfg.subgroup.lower()), '') for unit in units]
    values = np.array([decade(v) if cfg.subgroup.lower() == 'age' else v or 'blank' for v in values], dtype=object)
    out = {}
    for value in sorted(set(values)):
        here = values == value
        out[value] = dict(n=int(here.sum()), patients=len(set(patients[here])), metrics=measured(
            cfg, classes, y[here], result['p'][here], result['threshold'], patients[here]))
    print_table(f"by {cfg.subgroup}, {result['label']}", {
        f"{value}: {group['n']} of {group['patients']} patients": group['metrics'] for value, group in out.items()})
    return out


def decade(age):
    """'57' or '057Y' -> '50-60'; below 50 and from 70 on are one group each."""
    digits = re.match(r'\d+', age)
    if not digits:
        return 'blank'
    return ('<50', '50-60', '60-70', '70+')[np.searchsorted((50, 60, 70), int(digits[0]), side='right')]


def write_predictions(cfg, path, units, classes, y, results):
    """One line per encoder and unit: the truth, the decision and every probability."""
    with open(path, 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        writer = csv.writer(file)
        writer.writerow(['encoder', 'unit', 'patient', 'target', 'predicted', *(f'p_{name}' for name in classes)])
        for r in results:
            guesses = [''] * len(y) if cfg.task == 'risk' else [classes[guess] for guess in decided(cfg, r)]
            for unit, truth, guess, p in zip(units, y, guesses, r['p']):
                target = ' '.join(map(str, truth)) if cfg.task == 'risk' else classes[truth]
                writer.writerow([r['encoder'], unit.name, unit.patient, target, guess, *map(float, p)])


# ---- one run --------------------------------------------------------------------------------------------------------

SMALL = dict(size=84, width=128, depth=4, heads=4)          # the demo of pretrain.py


def encoders(cfg):
    """-> {name: file}, None for random weights in the shape of --encoder. They come first, as the baseline: a good head
    alone scores well, and only what exceeds it is the encoder's. ValueError, before hours of work, for no encoder."""
    path = Path(cfg.encoder)
    if not path.is_file() and cfg.encoder != Config.encoder:
        raise ValueError(f'{path}: no such file; --encoder takes a last.pt of pretrain.py or the official DINOv2 file')
    if not path.is_file() and dist.get_rank() == 0:
        print(f'{path} is absent: random init only. `torchrun pretrain.py` makes one, --encoder names another.')
    files = {'DINOv2': cfg.dinov2, 'pretrained': cfg.encoder if path.is_file() else None}
    files = {'random init': None} | {name: file for name, file in files.items() if file}
    for file in files.values():
        patch = encoder_from(cfg, file).patch
        if cfg.size % patch:
            raise ValueError(f'--size {cfg.size} is no multiple of the patch, {patch}')
    return files


def encoder_from(cfg, file):
    """The encoder in a file, or random weights. Their LayerScale is 1, whatever pretraining starts from: at DINOv2's
    1e-5 every block of a random network is the identity, and beating that is no feat."""
    if file:
        return vit.load(file)
    shape = vit.load(cfg.encoder).config if os.path.isfile(cfg.encoder) else SMALL
    torch.manual_seed(cfg.seed)
    return vit.ViT(**shape, layerscale=1.0).eval()


def run(cfg, device, again=False):
    """One data set and task: every encoder on every fraction of the training patients -> table, files, pictures.
    `again` may overwrite an earlier run."""
    out, files = Path(cfg.out), encoders(cfg)
    if (out / 'metrics.json').exists() and not again:
        raise ValueError(f'{out} holds a run; choose another --out')
    rows, classes, notes = load(cfg)
    units = units_of(cfg, rows, notes)
    columns = {name.lower(): name for unit in units for name in unit.record}
    if cfg.subgroup and cfg.subgroup.lower() not in columns:
        raise ValueError(f"--subgroup {cfg.subgroup}: no such column; found {', '.join(columns.values())}")
    parts = parted(units, notes)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OSError(f'--out {out} cannot be made ({problem.strerror}); choose another') from None
    if dist.get_rank() == 0:
        writing = lock(out)                                 # held until the end
        introduce(cfg, parts, classes, notes)
    results = []
    for name, file in files.items():
        encoder = encoder_from(cfg, file).to(device)
        if cfg.freeze:
            values = features(cfg, encoder, rows, units, device)
            # for its errors: does each part still hold every class?
            parted([unit for unit in units if any(rows[i].readable for i, _ in unit.rows)],
                   ['after the unreadable files were left out'])
        for share in cfg.fraction:
            kept = drawn(parts['train'], share, cfg.seed, math.ceil)
            train = [unit for unit in parts['train'] if unit.patient in kept]
            if cfg.freeze:
                head, tried = fit(cfg, classes, *labelled(cfg, train, values), *labelled(cfg, parts['val'], values))
            else:
                encoder = encoder_from(cfg, file).to(device)
                decay = cfg.layer_decay if file else 1.0    # random weights know nothing worth keeping
                head, tried = finetune(replace(cfg, layer_decay=decay), encoder, rows, train, parts['val'], classes,
                                       device)
                values = features(cfg, encoder, rows, parts['val'] + parts['test'], device, cache=False)
            x_val, y_val = labelled(cfg, parts['val'], values)
            threshold = youden(y_val, predicted(cfg, head, x_val)[:, 1]) if cfg.task in BINARY else None
            p = predicted(cfg, head, unit_features(cfg, parts['test'], values))
            results.append(dict(encoder=name, share=share, n_train=len(train), patients_train=len(kept), tried=tried,
                                lr=min(tried, key=tried.get, default=None), threshold=threshold, p=p,
                                size=cfg.size or encoder.config['size']))
    if dist.get_rank() == 0:                                # the last result is that of the main encoder
        save(out / 'last.pt', dict(config=asdict(cfg), classes=list(classes), vit=encoder.config, threshold=threshold,
                                   head=head.cpu().state_dict(),
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
        print(f'  {split:5s} {len(units)} {cfg.level}s of {len({unit.patient for unit in units})} patients; '
              + ', '.join(f'{name}: {count}' for name, count in positives(cfg, classes, units).items()))
    for note in notes:
        print(f'  {note}')


def report(cfg, rows, parts, classes, notes, results):
    """The table on the test set, predictions.csv, metrics.json and the pictures.

    results [dict(encoder, share, threshold, p (n, C or T), …)] as `run` makes them, random init first, the main encoder
    last; only units that every encoder could read count."""
    out, main, told = Path(cfg.out), results[-1]['encoder'], len(notes)
    seen = ~np.any([np.isnan(r['p']).any(1) for r in results], axis=0)
    units = [unit for unit, there in zip(parts['test'], seen) if there]
    y, patients = targets(units).numpy(), np.array([unit.patient for unit in units])
    for r in results:
        r['p'] = r['p'][seen]
    best = [r for r in results if r['share'] == cfg.fraction[-1]]
    write_predictions(cfg, out / 'predictions.csv', units, classes, y, best)

    lacking = missing_views(cfg, rows, sum(parts.values(), []))
    if lacking:
        notes.append(f'{cfg.level}s that lack a view, for which the mean of their others stands in, {len(lacking)}: '
                     + ', '.join(f'{name} ({" ".join(views)})' for name, views in list(lacking.items())[:5])
                     + (', … all in metrics.json' if len(lacking) > 5 else ''))
    if not seen.all():
        notes.append(f'{(~seen).sum()} test {cfg.level}s have no readable file and take no part')
    for note in notes[told:]:
        print(f'  {note}')
    for r in results:
        r['metrics'] = measured(cfg, classes, y, r['p'], r['threshold'], patients)
        r['delong_interval'] = delong_interval(y, r['p'][:, 1]) if cfg.task in BINARY else None
        r['label'] = r['encoder'] if cfg.fraction == (1.0,) else f"{r['encoder']}, {100 * r['share']:g}%"
    for r in results[:len(cfg.fraction)] if cfg.fraction != (1.0,) else ():
        print(f"  {100 * r['share']:g}% of training: {r['n_train']} {cfg.level}s of {r['patients_train']} patients")
    counted = positives(cfg, classes, units)
    cases = ', '.join(f'{name}: {count}' for name, count in counted.items())
    print_table(f'test, n = {len(y)} ({cases}); 95 % intervals over {len(set(patients))} patients, {cfg.draws} draws',
                {r['label']: r['metrics'] for r in results})
    undefined = max(m['undefined'] for r in results for m in r['metrics'].values())
    if undefined:
        print(f'up to {undefined} of {cfg.draws} draws held no case of some class; its metrics leave them out')
    headline = next(iter(results[-1]['metrics']))
    mains = {r['share']: r['p'] for r in results if r['encoder'] == main}
    against = {f"{main} - {r['label']}": versus(cfg, classes, y, r['p'], mains[r['share']], patients)
               for r in results if r['encoder'] != main}
    adjust(against.values())
    for name, v in against.items():
        print(f'{name}: {headline} {gap(v)}')
    groups = subgroups(cfg, units, classes, y, results[-1], patients) if cfg.subgroup else {}

    (out / 'metrics.json').write_text(json.dumps(plain(dict(
        config=asdict(cfg), torch=torch.__version__, numpy=np.__version__, classes=classes, encoder=main, n=len(y),
        counts=counted, patients=len(set(patients)), notes=notes, against=against, subgroups=groups,
        results=[{k: v for k, v in r.items() if k != 'p'} for r in results], missing_views=lacking)),
        indent=1, allow_nan=False))
    pictures(cfg, out, classes, y, best)
    if len(cfg.fraction) > 1:
        points = defaultdict(list)                          # encoder -> (share, value, low, high)
        for r in results:
            points[r['encoder']].append((r['share'], *(r['metrics'][headline][k] for k in ('value', 'low', 'high'))))
        chart({name: zip(*of) for name, of in points.items()}, 'share of training patients', headline
              ).save(out / 'fraction.png')


# ---- pictures -------------------------------------------------------------------------------------------------------

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')          # Okabe and Ito
font = ImageFont.load_default


def halved(picture):
    """Drawn at twice the size, then shrunk: smooth lines."""
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def pictures(cfg, out, classes, y, results):
    """confusion.png, and roc.png: the encoders against each other, or years or classes of the main one, the last."""
    asked, main = questions(cfg, classes, y), results[-1]
    pairs = {name: (truth, main['p'][use, column]) for name, (use, truth, column) in asked.items()}
    if cfg.task in BINARY:
        pairs = {r['encoder']: (y, r['p'][:, 1]) for r in results}
    areas = {name: auc(*pair) for name, pair in pairs.items()}
    curves = {f'{name}, AUC {area:.3f}': roc(*pairs[name])[:2] for name, area in areas.items() if not math.isnan(area)}
    title = '' if cfg.task in BINARY else main['label']
    chart(curves, '1 - specificity', 'sensitivity', title, diagonal=True).save(out / 'roc.png')
    if cfg.task != 'risk':
        matrix(confusion(y, decided(cfg, main), len(classes)), classes).save(out / 'confusion.png')


def chart(curves, xlabel, ylabel, title='', diagonal=False):
    """{name: (x, y) or (x, y, low, high)} in the unit square -> a picture with axes and legend."""
    side, left, top = 720, 110, 60
    picture = Image.new('RGB', (left + side + 40, top + side + 110), 'white')
    pen = ImageDraw.Draw(picture)

    def at(x, y):
        return left + side * float(x), top + side * (1 - float(y))

    for tick in np.linspace(0, 1, 6):
        pen.line([at(tick, 0), at(tick, 1)], '#E5E5E5', 2)
        pen.line([at(0, tick), at(1, tick)], '#E5E5E5', 2)
        pen.text(at(tick, -0.02), f'{tick:.1f}', 'black', font(24), anchor='ma')
        pen.text(at(-0.02, tick), f'{tick:.1f}', 'black', font(24), anchor='rm')
    pen.rectangle([at(0, 1), at(1, 0)], outline='black', width=2)
    if diagonal:
        pen.line([at(0, 0), at(1, 1)], '#999999', 2)
    for i, (name, (x, y, *interval)) in enumerate(curves.items()):
        colour, height = COLOURS[i % len(COLOURS)], 0.05 * (len(curves) - i)
        x = np.add(x, 0.008 * i * bool(interval))           # intervals side by side
        pen.line([at(*point) for point in zip(x, y) if not math.isnan(point[1])], colour, 4, joint='curve')
        for a, b, low, high in zip(x, y, *interval) if interval else ():
            if not math.isnan(b + low):
                pen.line([at(a, low), at(a, high)], colour, 2)
                pen.circle(at(a, b), 7, colour)
        pen.line([at(0.5, height), at(0.57, height)], colour, 6)
        pen.text(at(0.59, height), name, 'black', font(26), anchor='lm')
    pen.text(at(0.5, -0.08), xlabel, 'black', font(28), anchor='ma')
    pen.text((10, 6), ylabel, 'black', font(26))
    pen.text((left + side, 6), title, 'black', font(26), anchor='ra')
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
            pen.text((x + box / 2, y + box / 2), str(counts[i, j]), 'white' if share > 0.6 else 'black', font(32),
                     anchor='mm')
    pen.text((margin + side / 2, 20), 'predicted', 'black', font(28), anchor='ma')
    pen.text((20, margin / 2), 'truth', 'black', font(28))
    return picture


def radar(axes, polygons):
    """axes: names; polygons {name: values in 0..1, one per axis, NaN where it has none} -> MammoDINO's Fig. 2."""
    picture = Image.new('RGB', (1440, 1160 + 40 * len(polygons)), 'white')
    pen = ImageDraw.Draw(picture)

    def at(axis, value):
        angle = 2 * math.pi * axis / len(axes) - math.pi / 2
        return 720 + 400 * value * math.cos(angle), 560 + 400 * value * math.sin(angle)

    for ring in (0.2, 0.4, 0.6, 0.8, 1.0):
        pen.polygon([at(i, ring) for i in range(len(axes))], outline='#CCCCCC', width=2)
        pen.text(at(0, ring), f'{ring:.1f}  ', '#777777', font(22), anchor='rm')
    for i, name in enumerate(axes):
        x, y = at(i, 1.1)
        pen.line([at(i, 0), at(i, 1)], '#CCCCCC', 2)
        pen.text((x, y), name, 'black', font(26), anchor='mm' if abs(x - 720) < 130 else 'lm' if x > 720 else 'rm')
    for i, (name, values) in enumerate(polygons.items()):
        colour, height = COLOURS[i % len(COLOURS)], 1120 + 40 * i
        corners = [None if math.isnan(value) else at(axis, max(value, 0)) for axis, value in enumerate(values)]
        for a, b in zip(corners, [*corners[1:], corners[0]]):
            if a:
                pen.circle(a, 7, colour)
            if a and b:                                     # open where a run has no such axis
                pen.line([a, b], colour, 5)
        pen.line([(340, height), (390, height)], colour, 6)
        pen.text((404, height), name, 'black', font(26), anchor='lm')
    return halved(picture)


# ---- compare and predict --------------------------------------------------------------------------------------------

def stored(folder):
    """A run as its folder has it: metrics.json, and of the main encoder the metrics, y, p and patients by unit."""
    try:
        r = json.loads((Path(folder) / 'metrics.json').read_text())
        r['cfg'] = config_of(r['config'])
        r['metrics'] = {result['encoder']: result['metrics'] for result in r['results']}
        lines = [line for line in table(Path(folder) / 'predictions.csv', 'unit') if line['encoder'] == r['encoder']]
        r['units'] = [line['unit'] for line in lines]
        r['patients'] = np.array([line['patient'] for line in lines])
        r['p'] = np.array([[float(line[f'p_{name}']) for name in r['classes']] for line in lines])
        r['y'] = np.array([[int(v) for v in line['target'].split()] if r['cfg'].task == 'risk'
                           else r['classes'].index(line['target']) for line in lines])
        if len(lines) != r['n'] or r['encoder'] not in r['metrics']:
            raise ValueError(f"predictions.csv holds {len(lines)} units, metrics.json says {r['n']}")
    except (OSError, LookupError, ValueError, TypeError, AttributeError) as problem:
        raise ValueError(f'{folder}: not a run of finetune.py ({type(problem).__name__}: {problem})') from problem
    return r


def config_of(values):
    """The configuration in a file; lists become tuples again, names of no field are left out. TypeError where a value
    is of another type than its field's annotation, which lists what may stand there."""
    kinds = {f.name: str(f.type).replace('float', 'float int') for f in fields(Config)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in kinds}
    wrong = [k for k, v in values.items() if v is not None and type(v).__name__ not in kinds[k]]
    if wrong:
        raise TypeError(f"values of another type: {', '.join(wrong)}")
    return Config(**values)


def compare(argv):
    """Runs side by side: the metrics, every pair of runs on the same task and test units tested against each other,
    Benjamini-Hochberg over all of these tests as one family, and the radar picture of MammoDINO's Fig. 2."""
    parser = argparse.ArgumentParser(prog='finetune.py compare')
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folders that finetune.py wrote, two or more')
    parser.add_argument('--out', default='runs/radar.png', help='the radar picture (default: %(default)s)')
    args = parser.parse_args(argv)
    runs = {folder: stored(folder) for folder in args.runs}
    if len(runs) < 2:
        raise ValueError('compare takes two different runs or more')
    for folder, r in runs.items():
        cfg = r['cfg']
        print(f"{folder}: {cfg.task} on {cfg.dataset} {Path(cfg.root).name}, {cfg.head} on {cfg.pool}, "
              f"{100 * cfg.fraction[-1]:g}% of training, seed {cfg.seed}, n = {r['n']}, encoder {cfg.encoder}")
        print('    ' + ', '.join(f'{name} {cell(m)}' for name, m in r['metrics'][r['encoder']].items()))
    found = {}
    for (a, one), (b, two) in itertools.combinations(runs.items(), 2):
        if (one['cfg'].task, one['cfg'].dataset) != (two['cfg'].task, two['cfg'].dataset):
            continue
        if one['units'] != two['units'] or (one['y'] != two['y']).any():
            print(f'{a} and {b} were tested on different units or labels: no test')
            continue
        headline = next(iter(one['metrics'][one['encoder']]))
        found[f'{b} - {a}: {headline}'] = versus(one['cfg'], one['classes'], one['y'], one['p'], two['p'],
                                                 one['patients'])
    tests = adjust(found.values())
    print(f'tests: {tests}, one family, adjusted by Benjamini-Hochberg' if found else
          'no test: no two runs share task and test set')
    for name, v in found.items():
        print(f'    {name} {gap(v)}')
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    radar(*web(runs)).save(args.out)
    print(f'-> {args.out}')


def web(runs):
    """-> axes and polygons of the radar: a task an axis, the mean of its AUC or macro F1 over data sets, an encoder a
    polygon, as in the paper; with fewer than three tasks every metric is an axis and every run a polygon."""
    few = len({r['cfg'].task for r in runs.values()}) < 3
    values = defaultdict(lambda: defaultdict(list))         # polygon -> axis -> values
    for folder, r in runs.items():
        for name, found in r['metrics'].items():
            polygon = f'{name}, mean of the runs' if name != r['encoder'] else folder if few else r['cfg'].encoder
            for metric, m in found.items():
                if few and metric != 'kappa':               # which may be below 0
                    values[polygon][f"{r['cfg'].task} {metric}"].append(math.nan if m['value'] is None else m['value'])
                elif not few and metric in ('AUC', 'macro F1', 'mean AUROC') and m['value'] is not None:
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
    encoder, state = vit.load(path), vit.read(path)
    if 'head' not in state:
        raise ValueError(f'{path} holds an encoder without a head; give a run of finetune.py')
    cfg, classes, head, threshold = restored(path, encoder, state)
    slots = SLOTS[cfg.level]
    given = [('image', file) if cfg.level == 'image' else file.split('=', 1) for file in args.files]
    if any(len(pair) != 2 or pair[0] not in slots for pair in given):
        raise ValueError(f"this model reads {cfg.level}s: give VIEW=FILE with VIEW of {', '.join(slots)}")
    absent = [file for _, file in given if not os.path.isfile(file)]
    if absent:
        raise ValueError(f'{absent[0]}: no such file; this model reads {cfg.level}s')
    rows = [Row(file, None, '', name=file) for _, file in given]
    members = [(i, slots.index(view)) for i, (view, _) in enumerate(given)]
    groups = {file: [member] for file, member in zip(args.files, members)} if cfg.level == 'image' else \
        {cfg.level: members}
    units = [Unit(name, '', '', 0, group, {}) for name, group in groups.items()]
    x = unit_features(cfg, units, features(cfg, encoder.to(device), rows, units, device, cache=False))
    for unit, p in zip(units, predicted(cfg, head, x)):
        found = ', '.join(f'{name} = {value:.3f}' for name, value in zip(classes, p))
        print(f"{unit.name}: {cfg.task} {'unreadable' if np.isnan(p).any() else found}")
    for views in missing_views(cfg, rows, units).values():
        print(f"missing {', '.join(views)}: the mean of the other views stands in")
    if cfg.balance and cfg.head != 'knn':
        print('Trained with classes of equal weight: these are scores, not the share of such cases in a population.')
    if threshold is not None:
        print(f'Threshold chosen on validation: {threshold:.3f}')


def restored(path, encoder, state):
    """-> configuration, classes, trained head and threshold of a run's checkpoint."""
    try:
        cfg, classes = resolved(replace(config_of(state['config']), workers=0, max_bad=1.0)), state['classes']
        if not classes or not all(isinstance(name, str) for name in classes) or cfg.size % encoder.patch:
            raise ValueError('classes without names, or images that are not whole patches')
        if cfg.head == 'knn':
            head = Neighbours(state['head']['bank'], state['head']['labels'], len(classes), cfg.neighbours)
        else:
            head = head_for(cfg, encoder, classes)
        head.load_state_dict(state['head'])
        threshold = None if state['threshold'] is None else float(state['threshold'])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as problem:
        raise ValueError(f'{path}: not a checkpoint of finetune.py, or its head and encoder do not fit together '
                         f'({type(problem).__name__})') from problem
    return cfg, classes, head, threshold


# ---- the demo, no part of the method --------------------------------------------------------------------------------

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
            phantom = breast(np.random.default_rng([cfg.seed, i, 0, 4]))          # pretrain.py draws 1, 2, 3
            np.save(folder / f'{i:04d}.npy', images.clahe(images.to_uint8(phantom.volume[0])))
            lines.append(f"{i:04d}.npy,{i:04d},{split},{'abcd'[phantom.density]},{phantom.cancer}")
        (folder / 'manifest.csv').write_text('\n'.join(lines) + '\n')
    dist.barrier()
    for each in runs:
        run(each, device, again)


def main(argv):
    """compare, predict, a run, or without --root the demo."""
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
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # at once, without waiting for data workers
    wrong = None
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as problem:                # a data worker sends its traceback along, the reason last
        wrong = str(problem).strip().splitlines()[-1].removeprefix('ValueError: ')
    if wrong:
        print(f'finetune.py: {wrong}', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(wrong))                                   # an interpreter that winds down gloo's threads may abort
