"""MammoDINO pretraining (arXiv 2510.11883): a student learns from its own moving average to see mammograms.

    $ torchrun pretrain.py                                    # two minutes on phantoms, no data needed
    $ torchrun --nproc-per-node 8 pretrain.py --data DIR      # the paper's recipe on a folder of mammograms
    $ torchrun pretrain.py --data DIR --init dinov2_vitb14_pretrain.pth --resume

DIR holds DICOM, PNG, TIFF, PGM, JPEG or prepared .npy files, at any depth; a file of several frames is a DBT volume.
The run's folder `--out` receives log.jsonl (the first line is the configuration), last.pt (weights, optimizer,
centres) and, of a large data set, index.npz (its files); `--resume` goes on from there as if it had never stopped.
Plain `python pretrain.py` works as well.

One step, over all ranks and micro-batches:
    views, masks, slice pairs of 128 images  ->  student and teacher tokens  ->  four losses  ->  AdamW  ->  teacher EMA
B images of a micro-batch, S s pixels, N patches, D width, E bottleneck, K prototypes, P slice pairs, M masked patches.
"""
import atexit
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import signal
import sys
import time
import traceback
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

import images
import losses
import mask
import sampler
import vit
from metrics import bootstrap, knn
from run import claim, commit, cosine, option, parse, save, setup
from phantom import breast


# ---- configuration ------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Every field is a flag. Source: [paper] MammoDINO, [dbt-dino] arXiv 2512.13608, [dinov2] its released
    ssl_default_config.yaml, which centres as the paper does (others of its recipes take Sinkhorn-Knopp), [ours] a
    choice of this repository."""
    data: str | None = option(None, 'ours', 'folder of mammograms; without it, a short demo on phantoms',
                              group='the run')
    out: str = option('runs/pretrain', 'ours', 'folder of this run')
    init: str | None = option(None, 'dbt-dino 2.3', 'start from the official DINOv2 file or a checkpoint of ours; '
                                                    'with --lr 0.0002')
    resume: bool = option(False, 'ours', 'go on from OUT/last.pt, or start where there is none')
    override: bool = option(False, 'ours', 'with --resume: go on although the recipe or the files have changed')
    seed: int = option(0, 'ours', 'a sample is a function of (seed, epoch, index)')
    workers: int = option(8, 'ours', 'data processes per rank')
    save_every: int = option(1000, 'ours', 'steps between checkpoints')
    keep_every: int = option(0, 'dbt-dino 6.1', 'steps between checkpoints kept for good; 0 keeps the last')
    log_every: int = option(10, 'ours', 'steps between lines of the log')
    max_bad: float = option(0.05, 'ours', 'stop above this share of files with an unusable frame, from 100 files on')
    amp: bool | None = option(None, 'ours', 'bf16 autocast; by default on GPUs only')
    deterministic: bool = option(False, 'ours', 'on GPUs: only kernels that add in a fixed order; slower')

    steps: int = option(300_000, 'paper 3.2', 'optimizer steps', group='optimization')
    batch: int = option(128, 'paper 3.2', 'images per step, over all ranks')
    micro_batch: int = option(16, 'ours', 'images a rank holds at once, the rest is accumulated')
    lr: float = option(0.004, 'dinov2', 'peak for a batch of 1024, times sqrt(batch / 1024): 0.0014; lower it first')
    lr_end: float = option(1e-6, 'dinov2', 'the cosine ends here')
    warmup: int = option(12_500, 'dinov2', 'steps of linear warm-up')
    layer_decay: float = option(0.9, 'dinov2', 'learning rate factor per block below the top')
    wd: float = option(0.04, 'paper 3.2', 'weight decay at the start')
    wd_end: float = option(0.20, 'paper 3.2', 'weight decay at the end, by cosine')
    clip: float = option(3.0, 'dinov2', 'gradient norm at most, backbone and head apart')
    freeze_last_layer: int = option(1250, 'dinov2', 'steps for which the prototypes do not move')

    size: int = option(518, 'paper 3.2', 'pixels of a global crop, and of the position grid', group='encoder and head')
    patch: int = option(14, 'paper 3.2', 'pixels of a patch')
    width: int = option(768, 'paper 3.2', 'channels; ViT-B has 768, 12, 12')
    depth: int = option(12, 'paper 3.2', 'blocks')
    heads: int = option(12, 'paper 3.2', 'heads of attention')
    registers: int = option(0, 'dinov2', 'register tokens; 4 in the files with registers')
    drop_path: float = option(0.3, 'dinov2', 'stochastic depth of the student; 0 for a small network')
    layerscale: float = option(1e-5, 'dinov2', 'initial LayerScale; 1 for a small network or a short run')
    prototypes: int = option(65_536, 'dinov2', 'K; thousands do for ten thousand images')
    hidden: int = option(2048, 'dinov2', 'width of the head')
    bottleneck: int = option(256, 'dinov2', 'width before the prototypes')

    percentile: float | None = option(None, 'ours', 'tau of the tissue mask as in paper 2.2; without it the mask '
                                                    'tunes itself', group='tissue-aware views')
    kernel: int = option(9, 'paper 2.2', 'pixels of closing and opening; the self-tuning mask divides them by '
                                         'its reduction')
    min_coverage: float = option(0.3, 'ours', 'rho, least share of tissue in a crop or mask piece')
    locals: int = option(8, 'dinov2', 'local crops of an image')
    local_size: int = option(196, 'dbt-dino 6.1', 'pixels of a local crop')
    global_scale: tuple[float, float] = option((0.5, 1.0), 'dbt-dino 6.1', 'share of the area in a global crop')
    local_scale: tuple[float, float] = option((0.2, 0.5), 'dbt-dino 6.1', 'the same of a local crop')
    jitter: float = option(0.8, 'dinov2', 'probability of brightness and contrast')
    brightness: float = option(0.4, 'dinov2', 'factor 1 +- this')
    contrast: float = option(0.4, 'dinov2', 'factor 1 +- this, about the mean of the view')
    blurs: tuple[float, float, float] = option((1.0, 0.1, 0.5), 'dinov2', 'probability of blur: global 1, 2, locals')
    solarizes: float = option(0.2, 'dinov2', 'probability of solarization, second global crop')
    mask_prob: float = option(0.5, 'dinov2', 'probability that a global crop is masked')
    mask_ratio: tuple[float, float] = option((0.1, 0.5), 'dinov2', 'least and largest share of patches masked')
    mask_min: int = option(4, 'dinov2', 'm_min, patches of the smallest piece')
    mask_max: float = option(0.5, 'dinov2', 'm_max, share of the grid of the largest piece')
    tissue_weight: float = option(1.0, 'ours', 'w_t in pi = w_t r + eps')
    mask_eps: float = option(1e-3, 'ours', 'eps in pi = w_t r + eps')
    d_max: int = option(4, 'paper Fig. 1', 'D_max, largest distance of the slices of a pair; 4 is drawn there')
    volume_items: bool = option(False, 'ours', 'an epoch takes one random slice per volume instead of all')
    blind_crops: bool = option(False, 'paper 3.4', 'crops as in DINOv2, for the ablation')
    blind_masks: bool = option(False, 'paper 3.4', 'masks blind to tissue, for the ablation')

    image_weight: float = option(1.0, 'dinov2', 'lambda_1 of DINO-M', group='losses')
    patch_weight: float = option(1.0, 'dinov2', 'lambda_2 of iBOT-M')
    slice_weight: float = option(0.1, 'ours', 'lambda_3 of DINO-adj; 0 is the ablation without it')
    koleo_weight: float = option(0.1, 'dinov2', 'lambda_4 of KoLeo')
    student_temp: float = option(0.1, 'dinov2', 'tau_s')
    teacher_temp: float = option(0.07, 'dinov2', 'tau_t; DINO found training unstable above 0.07')
    teacher_temp_start: float = option(0.04, 'dinov2', 'tau_t at the start')
    teacher_temp_steps: int = option(37_500, 'dinov2', 'steps of linear rise to tau_t')
    momentum: float = option(0.992, 'dinov2', 'of the teacher, rising to 1 by cosine')
    center_momentum: float = option(0.9, 'dinov2', 'of the centres')

    phantoms: int = option(256, 'ours', 'breasts to train on, every third a DBT volume', group='demo')
    test_phantoms: int = option(320, 'ours', 'unseen breasts to test on; 0 skips the test')


DEMO = dict(out='runs/demo', workers=0, save_every=10_000, steps=330, batch=16, micro_batch=16, lr=0.0113, warmup=33,
            layer_decay=1.0, wd_end=0.04, freeze_last_layer=0, volume_items=True,
            size=84, width=128, depth=4, heads=4, drop_path=0.0, layerscale=1.0, prototypes=256, hidden=256,
            bottleneck=64, locals=4, local_size=42, global_scale=(0.25, 0.8), local_scale=(0.06, 0.25),
            min_coverage=0.7, brightness=0.2, contrast=0.2, blurs=(0.2, 0.2, 0.2), solarizes=0.0,
            teacher_temp=0.04, teacher_temp_steps=0, momentum=0.96)


def check(cfg, ranks):
    """What cannot work is refused before anything is read. -> micro-batches per step."""
    wrong = [f'--{name} {getattr(cfg, name)} must be above 0' for name in (
        'steps', 'batch', 'micro_batch', 'save_every', 'log_every', 'size', 'local_size', 'patch', 'width', 'depth',
        'heads', 'hidden', 'bottleneck', 'kernel', 'mask_min', 'mask_eps', 'd_max', 'student_temp', 'teacher_temp',
        'teacher_temp_start') if getattr(cfg, name) <= 0]
    wrong += [f'--{name} {getattr(cfg, name)} must not be negative' for name in (
        'seed', 'workers', 'keep_every', 'warmup', 'registers', 'locals', 'teacher_temp_steps', 'image_weight',
        'patch_weight', 'slice_weight', 'koleo_weight') if getattr(cfg, name) < 0]
    for name in ('max_bad', 'min_coverage', 'mask_prob', 'mask_max', 'jitter', 'solarizes', 'drop_path', 'momentum',
                 'center_momentum', 'blurs', 'mask_ratio', 'global_scale', 'local_scale'):
        value = getattr(cfg, name)
        if not all(0 <= v <= 1 for v in (value if isinstance(value, tuple) else (value,))):
            wrong.append(f'--{name} {value} must lie in 0..1')
    for name in ('mask_ratio', 'global_scale', 'local_scale'):
        low, high = getattr(cfg, name)
        if low > high or high == 0:
            wrong.append(f'--{name} {low} {high} must rise')
    if cfg.prototypes < 2:
        wrong.append(f'--prototypes {cfg.prototypes}: a softmax needs at least 2')
    if cfg.kernel % 2 == 0 or cfg.percentile is not None and not 0 <= cfg.percentile <= 100:
        wrong.append(f'--kernel {cfg.kernel} must be odd and --percentile {cfg.percentile} in 0..100')
    if 0 < cfg.test_phantoms < 12:
        wrong.append(f'--test_phantoms {cfg.test_phantoms}: ten neighbours need at least 12, or 0 for no test')
    if wrong:
        raise ValueError('; '.join(wrong))
    if cfg.size % cfg.patch or cfg.local_size % cfg.patch or cfg.width % cfg.heads:
        raise ValueError(f'--size {cfg.size} and --local_size {cfg.local_size} must be multiples of --patch '
                         f'{cfg.patch}, --width {cfg.width} of --heads {cfg.heads}')
    micro = min(cfg.micro_batch, cfg.batch // ranks)
    if micro < 1 or cfg.batch % (micro * ranks):
        raise ValueError(f'--batch {cfg.batch} does not divide into {ranks} rank(s) times --micro_batch '
                         f'{cfg.micro_batch}; choose a multiple of {ranks * cfg.micro_batch}')
    return cfg.batch // (micro * ranks)


# ---- data: item i of the run -> views, masks and a slice pair ------------------------------------------------------

MANY = 1000                                 # files; to fewer neither processes nor a cache are worth their while
TRIES = 3                                   # at a file that the system cannot read, or over which data workers die
PAUSE = 0.5                                 # seconds before the second try, twice as many before the third
STALL, STALLS = 60, 30                      # seconds without data until that is said; how often until the run gives up


class Slices(Dataset):
    """Every (file, slice) of a folder, in an endless stream: item i belongs to epoch i // n, and the order inside
    an epoch is a permutation keyed by (seed, epoch). The sample depends on nothing else, neither rank nor worker.

    Item i -> dict: globals (2, S, S), locals (n, s, s), pair (1, 2, S, S) or (0, 2, S, S) uint8; masks (2, N) bool;
    file; relaxed, masks_relaxed, how many had to lower rho; enlarged, 1 where the image is smaller than a crop; bad,
    [(file, reason)] of the unreadable files it stands in for; retried, what the system said before it read a file after
    all.
    """

    def __init__(self, cfg, files, counts):
        self.cfg, self.files, self.counts = cfg, files, np.asarray(counts)
        self.ends = np.cumsum(np.ones_like(self.counts) if cfg.volume_items else self.counts)
        self.retried, self.deadly, self.at_work = [], set(), None                       # the last two: see Stream

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        epoch, place = divmod(i, len(self))
        index, bad = shuffled(place, len(self), (self.cfg.seed, epoch)), []
        self.retried = []
        while len(bad) < len(self) and len({file for file, _ in bad}) < 100:            # not slices: volumes are long
            file = int(np.searchsorted(self.ends, index, side='right'))
            rng = np.random.default_rng([self.cfg.seed, epoch, index])
            frame = int(rng.integers(self.counts[file])) if self.cfg.volume_items \
                else index - int(self.ends[file] - self.counts[file])
            self.tell(file)
            try:
                return self.sample(rng, file, frame) | dict(file=file, bad=bad, retried=self.retried)
            except (ValueError, OSError) as error:
                bad.append((file, str(error)))
                index, self.retried = (index + 1) % len(self), []
            finally:
                self.tell(-1)
        raise ValueError(f'{len({file for file, _ in bad})} files in a row cannot be used, the first: {bad[0][1]}')

    def tell(self, file):
        """The main process sees which file a data worker has at work, should it die."""
        if self.at_work is not None and get_worker_info():
            self.at_work[get_worker_info().id] = torch.tensor([os.getpid(), file])

    def load(self, file, frame):
        """Prepared .npy have their CLAHE behind them; every other file gets it here (paper 3.1)."""
        path = self.files[file]
        if file in self.deadly:
            raise ValueError(f'{path}: {TRIES} data workers died over it')
        image = patiently(images.read, path, frame, said=self.retried)
        return image if path.lower().endswith('.npy') else images.clahe(image)

    def sample(self, rng, file, frame):
        """Views, masks and the pair of one slice. ValueError or OSError if the image cannot be used."""
        cfg, path = self.cfg, self.files[file]
        image = self.load(file, frame)
        if min(image.shape) < cfg.local_size:
            raise ValueError(f'{path}: {image.shape[1]}x{image.shape[0]} is smaller than the {cfg.local_size} local '
                             'crop; lower --local_size')
        tissue = mask.tissue(image, cfg.percentile, cfg.kernel)
        if not tissue.any():
            raise ValueError(f'{path}: no breast tissue found in frame {frame}')
        placement = np.ones_like(tissue) if cfg.blind_crops else tissue
        out = sampler.views(rng, image, tissue, cfg.size, cfg.local_size, cfg.locals, cfg.patch, cfg.global_scale,
                            cfg.local_scale, rho=cfg.min_coverage, placement=placement, jitter=cfg.jitter,
                            brightness=cfg.brightness, contrast=cfg.contrast, blurs=cfg.blurs, solarizes=cfg.solarizes)

        masks, info, masks_relaxed = [], {}, 0
        for grid in np.ones_like(out['grids']) if cfg.blind_masks else out['grids']:
            m = round(rng.uniform(*cfg.mask_ratio) * grid.size) if rng.random() < cfg.mask_prob else 0
            masks.append(sampler.patch_mask(rng, grid, m, cfg.min_coverage, cfg.mask_min, int(cfg.mask_max * grid.size),
                                            weight=cfg.tissue_weight, eps=cfg.mask_eps, info=info))
            masks_relaxed += info['relaxed']

        pair = np.empty((0, 2, cfg.size, cfg.size), np.uint8)
        if self.counts[file] > 1 and cfg.slice_weight:
            neighbour = self.load(file, sampler.slice_pair(rng, frame, int(self.counts[file]), cfg.d_max))
            if neighbour.shape != image.shape:
                raise ValueError(f'{path}: its frames differ in size, {image.shape} and {neighbour.shape}')
            pair = sampler.pair_views(rng, image, neighbour, placement, cfg.size, cfg.global_scale,
                                      rho=cfg.min_coverage)[None]
        return dict(globals=out['globals'], locals=out['locals'], masks=np.stack(masks).reshape(2, -1), pair=pair,
                    relaxed=int(out['relaxed'].sum()), masks_relaxed=masks_relaxed,
                    enlarged=int(min(image.shape) < cfg.size))


def patiently(read, *given, said=None):
    """read(*given). An OSError, such as a network share that is away for a moment, is waited out, TRIES times in all,
    and noted in the list `said`; a ValueError is the file's own fault."""
    for pause in (PAUSE * 2 ** k for k in range(TRIES - 1)):
        try:
            return read(*given)
        except OSError as problem:
            if said is not None:
                said.append(str(problem))
            time.sleep(pause)
    return read(*given)


def shuffled(place, n, key):
    """Where a permutation of range(n) keyed by (seed, epoch) sends `place`. No list is held, however many slices there
    are.

    A Feistel network permutes the numbers of an even number of bits: each round swaps the halves and XORs one with a
    hash of the other, of which the constants are odd and mix well. What lands at n or above goes through again."""
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for turn in range(4):
            mixed = (right * 0x9E3779B97F4A7C15 + key[0] * 0xBF58476D1CE4E5B9 + key[1] * 0x94D049BB133111EB + turn) \
                & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 29) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & low)
        place = left << half | right
        if place < n:
            return place


def collate(samples):
    """Samples -> one micro-batch of tensors, views first: globals (2, B, S, S), masks (2, B, N), pair (P, 2, S, S)."""
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples], axis=1))
             for name in ('globals', 'locals', 'masks')}
    batch['pair'] = torch.from_numpy(np.concatenate([s['pair'] for s in samples]))
    batch['file'] = torch.tensor([s['file'] for s in samples])
    batch['counts'] = torch.tensor([[s['relaxed'], s['masks_relaxed'], s['enlarged']] for s in samples]).sum(0)
    batch['bad'] = [b for s in samples for b in s['bad']]
    batch['retried'] = [r for s in samples for r in s['retried']]
    if get_worker_info():                                   # here, where a full /dev/shm raises and is reported
        for name in ('globals', 'locals', 'masks', 'pair', 'file', 'counts'):
            batch[name].share_memory_()
    return batch


def micro_batches(cfg, start, rank, ranks, accumulate):
    """Item numbers of this rank's micro-batches from step `start` on. The micro-batches of all ranks together are a
    contiguous run of the stream, whatever the number of ranks."""
    micro = cfg.batch // (accumulate * ranks)
    for step in range(start, cfg.steps):
        for part in range(accumulate):
            first = step * cfg.batch + (part * ranks + rank) * micro
            yield range(first, first + micro)


class Stream:
    """The micro-batches of this rank from step `start` on, made by the data workers, in their order whatever happens.

    A worker that dies is reported with the file it had at work, and all are started anew; a file over which TRIES of
    them died is bad. Where no data come, the files at work are named every STALL seconds; after STALLS times OSError
    ends the run, so that a scheduler can try elsewhere."""

    def __init__(self, cfg, files, counts, device, start, rank, ranks, accumulate, notice=None):
        self.data, self.pin, self.notice = Slices(cfg, files, counts), device.type == 'cuda', notice
        self.plan, self.given = (cfg, start, rank, ranks, accumulate), 0
        self.retries, self.deaths = 0, Counter()
        self.open()
        atexit.register(self.close)                         # workers ignore the signal that would end them

    def open(self):
        """Starts the workers at the first micro-batch that was not given yet."""
        workers = self.data.cfg.workers
        self.data.at_work = torch.full((workers, 2), -1).share_memory_()                # pid and file of each
        todo = itertools.islice(micro_batches(*self.plan), self.given, None)
        self.batches = iter(DataLoader(self.data, num_workers=workers, collate_fn=collate, batch_sampler=todo,
                                       pin_memory=self.pin, timeout=min(5, STALL) if workers else 0,
                                       worker_init_fn=deaf,
                                       generator=torch.Generator()))    # else it draws from the step's numbers
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch would raise a worker's death in mid-step

    def close(self):
        """The workers end."""
        self.batches = None

    def __next__(self):
        since, said = time.time(), 0
        while True:
            try:
                batch = next(self.batches)
                break
            except RuntimeError as problem:
                if 'exited unexpectedly' in str(problem):
                    self.bury({int(pid) for pid in re.findall(r'\d+', str(problem))})
                elif 'DataLoader timed out' not in str(problem):
                    raise
                elif self.notice and self.notice.when < math.inf:
                    raise OSError('stopped while data were waited for; --resume goes on from the last checkpoint')
            except (EOFError, ConnectionError):             # it died while it handed its batch over
                pass
            if time.time() - since > STALL * (said + 1):
                said += 1
                files = ', '.join(self.data.files[file] for _, file in self.data.at_work.tolist() if file >= 0)
                tqdm.write(f'no data for {STALL * said} s ({said} of {STALLS}); at work: {files}', file=sys.stderr)
                if said == STALLS:
                    raise OSError(f'no data for {STALL * said} s; is the storage there? --resume goes on')
        self.given += 1
        self.deaths.pop(-1, None)                           # deaths without a file at work count until a batch arrives
        for reason in batch['retried']:
            self.retries += 1
            tqdm.write(f'read at a later try ({self.retries} so far): {reason}', file=sys.stderr)
        return batch

    def bury(self, pids):
        """Counts the dead workers by their files, and starts all anew."""
        for file in {file for pid, file in self.data.at_work.tolist() if pid in pids} or {-1}:
            self.deaths[file] += 1
            name = self.data.files[file] if file >= 0 else 'nothing'
            tqdm.write(f'a data worker died over {name} ({self.deaths[file]} of {TRIES})', file=sys.stderr)
            if self.deaths[file] >= TRIES:
                if file < 0:
                    raise OSError('data workers die before they read a file, probably out of memory; lower --workers, '
                                  'then --resume')
                self.data.deadly.add(file)
        self.close()
        self.open()


def deaf(worker):
    """SIGTERM and Ctrl-C reach every process of a job; the data workers stay, so that the step can be finished."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def index(cfg, folder, rank):
    """Files of the folder and their numbers of slices, listed by rank 0 for all. Files whose header cannot be read
    are left out: named, counted, and too many of them stop the run, on every rank with the same words."""
    found = [None]
    if rank == 0:
        try:
            found = [headers(cfg, folder)]
        except (ValueError, OSError) as problem:
            found = [str(problem)]
    dist.broadcast_object_list(found)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    return found[0]


def headers(cfg, folder):
    """-> the readable files below the folder, how many slices each has, and the number of files left out.

    Of more than MANY files the headers are read by all cores and what they say is kept in OUT/index.npz; the next
    start reads those of files that are new or written since."""
    files, cache = images.listing(folder), Path(cfg.out) / 'index.npz'
    many = len(files) > MANY
    written = np.array([modified(path) if many else 0 for path in files])
    old = remembered(cache) if many else {}
    known = {path: old[path][0] for path, when in zip(files, written.tolist()) if path in old and old[path][1] == when}
    found = read_headers([path for path in files if path not in known])
    bad = [reason for reason in found.values() if isinstance(reason, str)]
    for reason in bad:
        tqdm.write(f'skipped: {reason}', file=sys.stderr)
    if len(bad) == len(files) or len(files) >= 100 and len(bad) > cfg.max_bad * len(files):
        raise ValueError(f'{folder}: {len(bad)} of {len(files)} files cannot be read, --max_bad is {cfg.max_bad}; '
                         f'the first: {bad[0]}')
    known |= {path: count for path, count in found.items() if not isinstance(count, str)}
    readable = [path in known for path in files]
    paths = Paths(path for path in files if path in known)
    counts = np.array([known[path] for path in files if path in known])
    if many and len(found) > len(bad):
        remember(cache, paths, counts, written[readable])
    return paths, counts, len(bad)


def read_headers(files):
    """{path: its number of slices, or why it cannot be known}; of more than MANY by all cores."""
    try:
        pools = ProcessPoolExecutor() if len(files) > MANY else contextlib.nullcontext()
        with pools as pool:
            found = pool.map(slices_of, files, chunksize=256) if pool else map(slices_of, files)
            return dict(zip(files, tqdm(found, total=len(files), desc='reading headers', unit='file', delay=2)))
    except BrokenProcessPool:
        raise ValueError('a process that read headers died, probably out of memory; start again') from None


def slices_of(path):
    try:
        return patiently(images.frames, path) if os.access(path, os.R_OK) else images.frames(path)
    except (ValueError, OSError) as problem:
        return str(problem)


def fingerprint(folder, files, counts):
    """Which slices these are, wherever the folder lies: a hash of the files' names below it and of their slices."""
    told = hashlib.sha256(np.asarray(counts, np.int64).tobytes())
    for path in files:
        told.update(os.fsencode(path.removeprefix(str(folder)).lstrip(os.sep)) + b'\0')
    return told.hexdigest()


class Paths:
    """A million paths as one array of bytes, 0 after each. A list of strings would be copied by every data worker,
    string by string, as it looks at them."""

    def __init__(self, paths):
        self.text = np.frombuffer(b''.join(os.fsencode(path) + b'\0' for path in paths), np.uint8)
        self.ends = np.flatnonzero(self.text == 0)

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, i):
        start = self.ends[i - 1] + 1 if i else 0
        return os.fsdecode(self.text[start:self.ends[i]].tobytes())


def modified(path):
    """When the file was written, ns; -1 if it cannot be asked."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1


def remember(path, paths, counts, written):
    """The index of this start for the next one."""
    part = path.with_name(f'{path.name}.part')
    try:
        with open(part, 'wb') as file:
            np.savez(file, paths=paths.text, counts=counts, written=written)
        os.replace(part, path)
    except OSError as problem:                              # it only saves time
        part.unlink(missing_ok=True)
        tqdm.write(f'{path} cannot be written ({problem}); the headers are read again next time', file=sys.stderr)


def remembered(path):
    """{path: (slices, when it was written)} of an earlier start; nothing if there was none."""
    try:
        with zipfile.ZipFile(path) as members:
            if sum(member.file_size for member in members.infolist()) > os.path.getsize(path):
                return {}                                   # np.savez compresses nothing
        with warnings.catch_warnings(action='ignore'), np.load(path, allow_pickle=False) as old:
            paths = os.fsdecode(old['paths'].tobytes()).split('\0')[:-1]
            counts, written = old['counts'].astype(np.int64), old['written'].astype(np.int64)
            fits = len(paths) == len(counts) == len(written) and counts.min() > 0
            return dict(zip(paths, zip(counts.tolist(), written.tolist()))) if fits else {}
    except Exception:                                       # cut short, or something else by that name
        return {}


# ---- student and teacher -------------------------------------------------------------------------------------------

class Network(nn.Module):
    """f and h of one side."""

    def __init__(self, cfg, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = losses.Head(backbone.config['width'], cfg.prototypes, cfg.hidden, cfg.bottleneck)

    def forward(self, images, masks, locals=None, hide=False):
        """images (I, 1, S, S), masks bool (I, N), locals (L, 1, s, s) ->
        CLS tokens (I + L, D), their logits (I + L, K), embeddings of the patches under the masks (M, E).
        `hide` puts the mask token there first: the student guesses what the teacher sees."""
        cls, patches = self.backbone(images, masks if hide else None)
        if locals is not None and len(locals):
            cls = torch.cat([cls, self.backbone(locals)[0]])
        return cls, self.head(cls), self.head.embed(patches[masks])


def networks(cfg, device):
    """-> student, teacher: the same weights; only the student has stochastic depth, only the student learns."""
    torch.manual_seed(cfg.seed)
    shape = dict(size=cfg.size, patch=cfg.patch, width=cfg.width, depth=cfg.depth, heads=cfg.heads,
                 registers=cfg.registers)
    given = vit.load(cfg.init) if cfg.init else None
    if given is not None:
        differs = [f'{k} {given.config[k]} (--{k} {v})' for k, v in shape.items() if given.config[k] != v]
        if differs:
            raise ValueError(f"{cfg.init} is another encoder: {', '.join(differs)}")
        shape = given.config
    student = Network(cfg, vit.ViT(**shape, drop_path=cfg.drop_path, layerscale=cfg.layerscale))
    if given is not None:
        student.backbone.load_state_dict(given.state_dict())
    teacher = Network(cfg, vit.ViT(**shape))
    teacher.load_state_dict(student.state_dict())
    return student.to(device), teacher.to(device).requires_grad_(False).eval()


def pixels(images, device):
    """uint8 (..., S, S) -> float (n, 1, S, S) in [0, 1] on the device; bytes travel."""
    return images.to(device, non_blocking=True).flatten(0, -3).unsqueeze(1).float() / 255


def globals_and_slices(batch, side, device):
    """What both networks see at full size: images (2 B + P, 1, S, S), globals then one side of each slice pair, and
    masks (2 B + P, N), which leave the slices alone."""
    masks = batch['masks'].flatten(0, 1).to(device)                                     # (2 B, N)
    images = torch.cat([pixels(batch['globals'], device), pixels(batch['pair'][:, side], device)])
    return images, torch.cat([masks, masks.new_zeros(len(batch['pair']), masks.shape[1])])


def teach(teacher, batch, device):
    """The teacher's side of a micro-batch: CLS tokens (2 B, D), their logits (2 B, K), the logits of slices k' (P, K),
    the embeddings of the patches under the masks (M, E)."""
    rows = 2 * batch['globals'].shape[1]
    cls, logits, embedded = teacher(*globals_and_slices(batch, 1, device))
    return dict(cls=cls[:rows], logits=logits[:rows], pair=logits[rows:], embedded=embedded)


def learn(cfg, student, teacher, center, batch, tau_t, pairs, device):
    """The losses of one micro-batch -> terms {name: ()}, and what the centres and the log need of the teacher.

    One pass serves all losses, as in DINOv2: the student's globals have their masks on, for DINO-M and KoLeo too; the
    teacher sees them whole. Rows of the student's logits: 2 B globals, P slices k, n B locals. `student` is wrapped in
    DDP. `pairs` is the mean number of slice pairs in a micro-batch of this step, the divisor of `adjacent_loss`."""
    B, P = batch['globals'].shape[1], len(batch['pair'])
    with torch.no_grad():
        taught = teach(teacher, batch, device)
        taught['targets'] = center['cls'](taught['logits'], tau_t).unflatten(0, (2, B))         # (2, B, K)
        prototypes_t = teacher.head.last_layer.weight                                           # (K, E)

    def patch_targets(rows):
        return center['patch'](nn.functional.linear(taught['embedded'][rows], prototypes_t), tau_t)

    images, masks = globals_and_slices(batch, 0, device)
    cls, logits, embedded = student(images, masks, pixels(batch['locals'], device), hide=True)
    views = torch.cat([logits[:2 * B], logits[2 * B + P:]]).unflatten(0, (-1, B))       # (2 + n, B, K)
    weight = (1 / masks.sum(1, keepdim=True).clamp_min(1)).expand_as(masks)[masks]      # (M,)
    files = batch['file'].to(device)
    terms = dict(
        image=losses.image_loss(views, taught['targets'], cfg.student_temp),
        patch=losses.chunked_patch_loss(embedded, student.module.head.last_layer.weight, patch_targets, weight,
                                        images=2 * B, temp=cfg.student_temp),
        slice=losses.adjacent_loss(logits[2 * B:2 * B + P], center['cls'](taught['pair'], tau_t), cfg.student_temp,
                                   pairs),
        koleo=sum(losses.koleo(view, files) for view in cls[:2 * B].unflatten(0, (2, B))))
    return terms, taught


def total_loss(cfg, terms):
    """L_total = lambda_1 L_DINO-M + lambda_2 L_iBOT-M + lambda_3 L_DINO-adj + lambda_4 L_KoLeo (MammoDINO 2.1)"""
    return cfg.image_weight * terms['image'] + cfg.patch_weight * terms['patch'] \
        + cfg.slice_weight * terms['slice'] + cfg.koleo_weight * terms['koleo']


@torch.no_grad()
def move_teacher(teacher, student, momentum):
    """theta_t <- momentum theta_t + (1 - momentum) theta_s (DINO 3.1)"""
    for theta_t, theta_s in zip(teacher.parameters(), student.parameters()):
        theta_t.lerp_(theta_s, 1 - momentum)


def update_centers(center, teacher, taught, momentum=None):
    """Both centres move once per step, by the teacher's mean logits over all micro-batches and ranks. Slice pairs
    have no part in it. The mean patch logits are the logits of the mean embedding."""
    center['cls'].update(torch.cat([t['logits'] for t in taught]), momentum=momentum)
    parts = [t['embedded'] for t in taught]
    counts = torch.tensor([len(part) for part in parts], device=parts[0].device)
    means = torch.stack([part.sum(0) / max(len(part), 1) for part in parts])            # (micro-batches, E)
    center['patch'].update(teacher.head.logits(means), counts, momentum)


def schedules(cfg, step):
    rise = min(step / cfg.teacher_temp_steps, 1) if cfg.teacher_temp_steps else 1
    return dict(lr=cosine(step, cfg.steps, cfg.lr * math.sqrt(cfg.batch / 1024), cfg.lr_end, cfg.warmup),
                wd=cosine(step, cfg.steps, cfg.wd, cfg.wd_end),
                momentum=cosine(step, cfg.steps, cfg.momentum, 1.0),
                teacher_temp=cfg.teacher_temp_start + rise * (cfg.teacher_temp - cfg.teacher_temp_start))


def set_rates(optimizer, now, frozen):
    """Learning rate and weight decay of this step, each group by its own factor; `frozen` holds the prototypes."""
    for group in optimizer.param_groups:
        group['lr'] = 0.0 if frozen and group['last_layer'] else now['lr'] * group['lr_scale']
        group['weight_decay'] = now['wd'] * group['wd_scale']


# ---- checkpoints and the log ---------------------------------------------------------------------------------------

def checkpoint(cfg, step, parts, watch, rank, now=False):
    """OUT/last.pt every `save_every` steps, at the end and `now`; OUT/step_N.pt every `keep_every` steps, for good."""
    names = [f'step_{step:06d}.pt'] if cfg.keep_every and step % cfg.keep_every == 0 else []
    names += ['last.pt'] if now or step % cfg.save_every == 0 or step == cfg.steps else []
    if not names:
        return
    inspect(parts['student'], parts['teacher'])
    watch.judge()                                           # gathers what the other ranks have seen
    if rank == 0:
        state = dict(step=step, config=asdict(cfg), vit=parts['teacher'].backbone.config, seen=watch.seen,
                     data=watch.data) | {name: part.state_dict() for name, part in parts.items()}
        for name in names:                                  # last.pt last: a run that goes on from it has the other
            save(Path(cfg.out) / name, state)


def earlier(cfg, rank):
    """The checkpoint that --resume goes on from; None where there is none yet. A folder that holds a run is refused
    without --resume, and with it the run of another recipe, both before anything is written."""
    out, last = Path(cfg.out), Path(cfg.out) / 'last.pt'
    again = cfg.data is None and cfg.out == DEMO['out']     # the demo may be run twice, but never over another run
    if any((out / name).exists() for name in ('last.pt', 'log.jsonl')) and not cfg.resume and not again:
        raise ValueError(f'{out} holds a run; add --resume to go on with it, or choose another --out')
    if not cfg.resume or not last.exists():
        return None
    free = {'resume', 'override', 'data', 'out', 'workers', 'micro_batch', 'save_every', 'keep_every', 'log_every',
            'max_bad', 'test_phantoms'}
    try:
        state = vit.read(last)
        then = asdict(Config()) | state['config']           # of an older version: fields that are new had no effect
        if type(state['step']) is not int or state['step'] < 0 \
                or any(isinstance(value, torch.Tensor) for value in then.values()):
            raise TypeError('values of other types')
        changed = [f'{k} {then[k]!r} -> {v!r}' for k, v in asdict(cfg).items() if k not in free and then[k] != v]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f'{last}: not a checkpoint of this script, or a damaged one; remove it to start afresh, or '
                         'copy a step_N.pt over it if --keep_every left one') from problem
    if changed and not cfg.override:
        raise ValueError(f"{last} is the run of another recipe: {', '.join(changed)}; choose another --out, or "
                         '--override to go on with the new one')
    if changed and rank == 0:
        print(f"going on with another recipe: {', '.join(changed)}", flush=True)
    return state


def restore(state, cfg, parts, watch):
    """Puts a checkpoint back in place. -> the step to go on with. Other files than it was trained on are refused."""
    if state.get('data') != watch.data and not cfg.override:
        raise ValueError(f'{cfg.out}/last.pt was trained on other files than these {len(watch.seen)}: some are gone, '
                         'new or of another name or depth, the stream would not be the same; --override goes on')
    try:
        if len(state['seen']) == len(watch.seen):
            watch.seen.copy_(state['seen'])
        with warnings.catch_warnings(action='ignore'):      # what is odd is refused, not remarked upon
            for name, part in parts.items():
                part.load_state_dict(state[name])
        moments = parts['optimizer'].state.items()
        if any(m[name].shape != p.shape for p, m in moments for name in ('exp_avg', 'exp_avg_sq')):
            raise ValueError('moments of other weights')
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise ValueError(f'{cfg.out}/last.pt: its weights do not fit this recipe ({type(problem).__name__}); choose '
                         'another --out') from problem
    return state['step']


def effective_rank(x):
    """exp of the entropy of the singular values of the rows (n, D), normalised to sum 1 (RankMe)."""
    values = torch.linalg.svdvals(x.float())
    share = values / values.sum().clamp_min(1e-12)
    return torch.exp(-(share * torch.log(share.clamp_min(1e-12))).sum()).item()


def diagnose(cfg, micro, terms, taught, center, device):
    """What shows collapse first, from the last micro-batch of all ranks, and what the sampler had to give up.

    teacher_entropy: 0 is one prototype for all, log K no preference. kl: cross-entropy less that, KL(teacher ||
    student). cls_spread: norm of the deviation of unit CLS tokens, 0 if all are alike, at most 1. relaxed: share of
    crops that had to lower rho; enlarged: share of images smaller than a global crop."""
    p = taught['targets']
    entropy = -(p * torch.log(p.clamp_min(1e-12))).sum(-1).mean()
    both = torch.stack([entropy, terms['image'] - entropy])
    entropy, kl = (sum_over_ranks(both, device) / dist.get_world_size()).tolist()
    cls = nn.functional.normalize(losses.gather(taught['cls'].float()), dim=-1)
    relaxed, masks_relaxed, enlarged = sum_over_ranks(sum(batch['counts'] for batch in micro), device).tolist()
    return dict(teacher_entropy=entropy, kl=kl, center_norm=center['cls'].center.norm().item(),
                patch_center_norm=center['patch'].center.norm().item(), cls_spread=cls.std(0).norm().item(),
                effective_rank=effective_rank(cls), relaxed=relaxed / (cfg.batch * (2 + cfg.locals)),
                masks_relaxed=masks_relaxed / (2 * cfg.batch), enlarged=enlarged / cfg.batch)


def inspect(student, teacher):
    """ValueError where the teacher is not what it must be, a moving average that nothing else moves, or where weights
    are not finite. At every line of the log, and before every checkpoint, so that a good one is never replaced."""
    pairs = list(zip(teacher.named_parameters(), student.parameters()))
    for (name, ours), theirs in pairs:
        if ours.requires_grad or ours.grad is not None or ours.data_ptr() == theirs.data_ptr():
            raise ValueError(f"the teacher's {name} learns by itself; only the moving average may move it")
    finite = torch.stack([ours.isfinite().all() & theirs.isfinite().all() for (_, ours), theirs in pairs]).tolist()
    if not all(finite):                                     # one answer from the GPU
        name = pairs[finite.index(False)][0][0]
        raise ValueError(f'weights that are not finite in {name}; the last checkpoint is good: lower --lr')
    if teacher.training:
        raise ValueError('the teacher is in training mode')


def not_finite(step, names, values, means, micro, files):
    """Which losses of this rank are not finite, and over which files. values: (terms,) of each micro-batch."""
    said = []
    for row, batch in zip(values, micro):
        broken = [name for name, value in zip(names, row.tolist()) if not math.isfinite(value)]
        if broken:
            said.append(f"{', '.join(broken)} of {', '.join(files[file] for file in batch['file'].tolist())}")
    if not said and math.isfinite(means['total']):
        said = [f"the gradient, over {', '.join(files[file] for batch in micro for file in batch['file'].tolist())}"]
    said = said or ['a loss of another rank, which names it']
    return f"step {step}: not finite: {'; '.join(said)}. All terms: {means}; the last checkpoint, if any, is good"


def advice(cfg, line):
    """What a line of the log says about a run that goes wrong -> [(its name, what to do)]."""
    entropy, log_k = line['teacher_entropy'], math.log(cfg.prototypes)
    signs = []
    if line['step'] >= cfg.warmup:                          # before that, nothing has been learnt that could collapse
        if entropy < 0.01 * log_k:
            signs.append(('peaked', f"the teacher's entropy is {entropy:.3f} of log K = {log_k:.3f}: every image goes "
                          'to one prototype (collapse). Raise --teacher_temp_start or lower --lr'))
        if entropy > 0.999 * log_k and line['kl'] < 1e-3:
            signs.append(('flat', f"the teacher's entropy is log K = {log_k:.3f}: every image goes to all prototypes "
                          '(collapse). Lower --teacher_temp or --lr, or warm up longer'))
        if line['cls_spread'] < 0.01:
            signs.append(('alike', f"the CLS tokens of different images are alike (spread {line['cls_spread']:.4f}): "
                          'collapse. Lower --lr, warm up longer, raise --koleo_weight'))
    if line['relaxed'] > 0.5:
        signs.append(('relaxed', f"{line['relaxed']:.0%} of the crops did not reach rho: tissue hardly guides them. "
                      'Look at the mask with `python mask.py FILE`, or lower --min_coverage'))
    return signs


def peak_memory(device):
    """GiB: of the GPU, or of this process."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == 'darwin' else 20)


def sum_over_ranks(value, device):
    value = torch.as_tensor(value).detach().to(device, torch.float64, copy=True)
    dist.all_reduce(value)
    return value


class Log:
    """log.jsonl, written by rank 0: a header, then one line per `log_every` steps. A resumed run drops the lines
    that were written after its checkpoint."""

    def __init__(self, cfg, rank, start):
        self.path, self.cfg, self.rank = Path(cfg.out) / 'log.jsonl', cfg, rank
        self.images, self.waited, self.clock, self.warned = 0, 0.0, time.time(), set()
        if rank:
            return
        old = logged(self.path) if start else []
        header = dict(config=asdict(cfg), torch=torch.__version__, numpy=np.__version__, commit=commit())
        header = next((line for line in old if 'config' in line and not cfg.override), header)
        lines = [header, *(line for line in old if line.get('step', start) < start)]
        with self.on_disk() as part:                        # whole or not at all
            part.write_text(''.join(json.dumps(line) + '\n' for line in lines))
            os.replace(part, self.path)

    @contextlib.contextmanager
    def on_disk(self):
        part = Path(f'{self.path}.part')
        try:
            yield part
        except OSError as problem:
            part.unlink(missing_ok=True)
            raise OSError(f'{self.path} cannot be written ({problem.strerror}); is the disk full, or not yours?') \
                from problem

    @contextlib.contextmanager
    def waiting(self):
        """Around what fetches data: its time is the bar's `data_wait`."""
        start = time.time()
        yield
        self.waited += time.time() - start

    def write(self, bar, values):
        """One line of the log, with the images per second since the last one; the losses go to the progress bar, with
        the share of the time that rank 0 waited for data."""
        now = time.time()
        values |= dict(images_per_s=self.images / (now - self.clock), time=now)
        wait, self.images, self.waited, self.clock = self.waited / (now - self.clock), 0, 0.0, now
        if self.rank == 0:
            with self.on_disk(), open(self.path, 'a') as file:
                file.write(json.dumps(values) + '\n')
                file.flush()
                os.fsync(file.fileno())                     # no checkpoint outlives the lines before it
            for name, text in advice(self.cfg, values):
                if name not in self.warned:
                    tqdm.write(f"warning: step {values['step']}: {text}", file=sys.stderr)
                self.warned.add(name)
            bar.set_postfix({k: f'{values[k]:.3f}' for k in ('total', 'image', 'patch', 'slice', 'koleo')}
                            | dict(data_wait=f'{wait:.1%}'))


def logged(path):
    """The lines of a log as dicts, but for one that a crash has cut."""
    lines = []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict) and type(line.get('step', 0)) is int]


class Watch:
    """Which files were opened and which were bad, over all ranks; too many bad ones stop the run.
    `left_out` is the number of files whose header could not be read, `data` the fingerprint of the others."""

    def __init__(self, cfg, files, device, left_out=0, data=None):
        self.cfg, self.left_out, self.data = cfg, left_out, data
        self.seen = torch.zeros(len(files), dtype=torch.uint8, device=device)           # 1 opened, 2 bad

    def note(self, batch):
        self.seen[batch['file']] = self.seen[batch['file']].clamp_min(1)
        for file, reason in batch['bad']:
            if self.seen[file] < 2:
                tqdm.write(f'skipped: {reason}', file=sys.stderr)
            self.seen[file] = 2

    def judge(self):
        """Gathers what all ranks have seen. -> the number of bad files; ValueError above --max_bad."""
        dist.all_reduce(self.seen, dist.ReduceOp.MAX)
        opened, bad = (int((self.seen >= least).sum()) + self.left_out for least in (1, 2))
        if opened >= 100 and bad > self.cfg.max_bad * opened:
            raise ValueError(f'{bad} of {opened} files opened so far are unusable, --max_bad is {self.cfg.max_bad}; '
                             'their names are above')
        return bad


class Notice:
    """SIGTERM, a scheduler's notice, or Ctrl-C: the step is finished, a checkpoint written, and the run ends well. A
    second Ctrl-C, more than a second later, ends it at once."""

    def __init__(self):
        self.when, self.parent = math.inf, os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.take)

    def take(self, number, frame):
        if number == signal.SIGINT and time.time() - self.when > 1:     # torchrun passes the first one on
            raise KeyboardInterrupt
        self.when = min(self.when, time.time())

    def given(self, device):
        """On any rank, so that all leave after the same step. A launcher that is gone is a notice, too."""
        orphan = 'RANK' in os.environ and os.getppid() != self.parent
        return bool(sum_over_ranks(self.when < math.inf or orphan, device))


def same_command():
    """What goes on with this run."""
    words = [word for word in sys.argv if word not in ('--resume', '--override')] + ['--resume']
    launcher = 'python'
    if 'RANK' in os.environ:
        launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', 1)}"
    if os.environ.get('GROUP_WORLD_SIZE', '1') != '1':
        launcher += ' (and --nnodes and --rdzv as before)'
    return f'{launcher} {shlex.join(words)}'


# ---- the algorithm -------------------------------------------------------------------------------------------------

def main(cfg):
    """One run, from the folder of images to the last checkpoint. The loop is the algorithm of the paper."""
    if cfg.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')     # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    rank, ranks, device = setup()
    accumulate, demo, out = check(cfg, ranks), cfg.data is None, Path(cfg.out)
    state = earlier(cfg, rank)
    out.mkdir(parents=True, exist_ok=True)
    lock = claim(out) if rank == 0 else None           # held until the end
    folder = make_phantoms(cfg, rank) if demo else cfg.data
    files, counts, left_out = index(cfg, folder, rank)
    watch = Watch(cfg, files, device, left_out, fingerprint(folder, files, counts))

    student, teacher = networks(cfg, device)
    center = nn.ModuleDict({kind: losses.Center(cfg.prototypes, cfg.center_momentum) for kind in ('cls', 'patch')})
    center.to(device)
    optimizer = torch.optim.AdamW(vit.param_groups(student, cfg.lr, cfg.wd, cfg.layer_decay), fused=True)
    parts = dict(student=student, teacher=teacher, center=center, optimizer=optimizer)
    start = restore(state, cfg, parts, watch) if state else 0
    state = None                                            # frees its memory
    starts = [None] * ranks
    dist.all_gather_object(starts, start)
    if len(set(starts)) > 1:
        raise ValueError(f'--out {out} is not the same folder for all ranks: they would go on from steps {starts}')

    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda' if cfg.amp is None else cfg.amp)
    ddp = nn.parallel.DistributedDataParallel(student, device_ids=[device] if device.type == 'cuda' else None,
                                              gradient_as_bucket_view=True)     # one copy of the gradients less
    notice, log, leave = Notice(), Log(cfg, rank, start), False
    stream = Stream(cfg, files, counts, device, start, rank, ranks, accumulate, notice)

    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, disable=rank > 0, unit='step')
    for step in bar:
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step, rank]).generate_state(1)[0]))
        now = schedules(cfg, step)
        set_rates(optimizer, now, frozen=step < cfg.freeze_last_layer)

        with log.waiting():
            micro = [next(stream) for _ in range(accumulate)]
        pairs = sum_over_ranks(sum(len(batch['pair']) for batch in micro), device).item() / (ranks * accumulate)
        if step == 0:                                       # the centres start at the mean of the first batch
            with torch.no_grad():
                with amp:
                    taught = [teach(teacher, batch, device) for batch in micro]
                update_centers(center, teacher, taught, momentum=0)

        values, taught = [], []
        for i, batch in enumerate(micro):
            watch.note(batch)
            with contextlib.nullcontext() if i == accumulate - 1 else ddp.no_sync():    # summed over ranks once
                with amp:
                    terms, targets = learn(cfg, ddp, teacher, center, batch, now['teacher_temp'], pairs, device)
                loss = total_loss(cfg, terms)
                (loss / accumulate).backward()
            values.append(torch.stack([loss, *terms.values()]).detach())
            taught.append(targets)

        names = ['total', *terms]
        means = dict(zip(names, (sum_over_ranks(torch.stack(values).mean(0), device) / ranks).tolist()))
        norms = [nn.utils.clip_grad_norm_(part.parameters(), cfg.clip) for part in (student.backbone, student.head)]
        means['grad_norm'] = math.hypot(*(norm.item() for norm in norms))
        if not all(map(math.isfinite, means.values())):
            raise ValueError(not_finite(step, names, values, means, micro, files))
        optimizer.step()
        optimizer.zero_grad()
        update_centers(center, teacher, taught)
        move_teacher(teacher, student, now['momentum'])

        log.images += cfg.batch
        if step % cfg.log_every == 0 or step == cfg.steps - 1:
            inspect(student, teacher)
            health = diagnose(cfg, micro, terms, taught[-1], center, device)
            log.write(bar, dict(step=step) | means | now | health | dict(bad_files=watch.judge(),
                                                                         peak_memory=peak_memory(device)))
        leave = notice.given(device)
        checkpoint(cfg, step + 1, parts, watch, rank, now=leave)
        if leave:
            break

    bar.close()
    stream.close()
    if leave and rank == 0 and step + 1 < cfg.steps:
        print(f'stopped after step {step}, as asked; this goes on: {same_command()}', flush=True)
    elif demo and rank == 0 and cfg.test_phantoms:
        report(cfg, teacher, device)
    dist.destroy_process_group()


# ---- the demo, no part of the method -------------------------------------------------------------------------------

def make_phantoms(cfg, rank):
    """Breasts for the demo, prepared like any data set: min-max, CLAHE, one .npy each. -> their folder."""
    folder = Path(cfg.out) / 'phantoms'
    if rank == 0:
        print('SMOKE RUN ON PHANTOMS: every part of the method on synthetic breasts, no clinical meaning. '
              'Pretrain on mammograms with --data DIR.', flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob('*.npy'):
            old.unlink()
        for i in range(cfg.phantoms):
            volume = prepared(breast(np.random.default_rng([cfg.seed, i, 0, 1]), slices=8 if i % 3 == 0 else 1))
            np.save(folder / f'{i:04d}.npy', volume if len(volume) > 1 else volume[0])
    dist.barrier()
    return folder


def prepared(example):
    """The paper's preprocessing (3.1) of a phantom: uint8 (K, H, W)."""
    return np.stack([images.clahe(images.to_uint8(image)) for image in example.volume])


@torch.no_grad()
def cls_tokens(network, images, device):
    """uint8 images (n, H, W), each squashed to the encoder's square -> unit CLS tokens (n, D)."""
    side = (network.backbone.config['size'],) * 2
    squashed = np.stack([np.asarray(Image.fromarray(i).resize(side, Image.Resampling.BICUBIC)) for i in images])
    cls, _ = network.backbone(pixels(torch.from_numpy(squashed), device))
    return nn.functional.normalize(cls.float(), dim=-1).cpu()


def report(cfg, teacher, device):
    """What the demo learnt, on breasts it never saw: leave-one-out k-NN density from the CLS token of the whole
    breast, beside what needs no training. Prints the table, writes OUT/report.json and two pictures."""
    n, out = cfg.test_phantoms, Path(cfg.out)
    unseen = [breast(np.random.default_rng([cfg.seed, i, 0, 2])) for i in range(n)]
    images, density = np.concatenate([prepared(p) for p in unseen]), np.array([p.density for p in unseen])
    volumes = [prepared(breast(np.random.default_rng([cfg.seed, i, 0, 3]), slices=8)) for i in range(32)]
    sides = {'random init': networks(cfg, device)[1], 'trained teacher': teacher}

    def hits(similarity):
        return (knn(similarity + np.diag(np.full(n, -np.inf)), density).argmax(1) == density).astype(float)

    greys = [image[p.tissue] for image, p in zip(images, unseen)]
    features = {'mean grey': [[g.mean()] for g in greys],
                'tissue-grey deciles': [np.percentile(g, range(10, 100, 10)) for g in greys]}
    correct, rows = {}, {'chance': dict(knn=np.bincount(density).max() / n)}
    for name, f in features.items():
        f = (np.array(f) - np.mean(f, 0)) / np.std(f, 0)
        correct[name] = hits(-np.square(f[:, None] - f[None]).mean(-1))
    for name, network in sides.items():
        x = cls_tokens(network, images, device)
        correct[name] = hits((x @ x.T).numpy())
        y = cls_tokens(network, np.concatenate(volumes), device).unflatten(0, (len(volumes), -1))       # (v, 8, D)
        rows[name] = dict(effective_rank=effective_rank(x))
        for suffix, z in (('', y), ('_centred', nn.functional.normalize(y - y.mean((0, 1)), dim=-1))):
            across = torch.einsum('vkd,wkd->vw', z, z) / z.shape[1]
            strangers = (across.sum() - across.trace()) / (len(z) * (len(z) - 1))
            rows[name] |= {f'adjacent{suffix}': (z[:, 1:] * z[:, :-1]).sum(-1).mean().item(),
                           f'stranger{suffix}': strangers.item()}
    for name, right in correct.items():
        rows.setdefault(name, {})['knn'] = right.mean()
    gain = correct['trained teacher'] - correct['random init']
    low, high = bootstrap(np.mean, [gain], np.arange(n), np.random.default_rng(0))
    log = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()[1:]]
    relaxed = np.mean([line['relaxed'] for line in log])

    columns = ('knn', 'adjacent', 'stranger', 'adjacent_centred', 'stranger_centred', 'effective_rank')
    print(f'\n{n} unseen phantoms      density   cosine of slices    mean removed          effective')
    print('                           k-NN     adjacent stranger   adjacent stranger         rank')
    for name in ('chance', *correct):
        cells = [f'{rows[name][c]:9.3f}' if c in rows[name] else ' ' * 9 for c in columns]
        print(f'{name:22s}{cells[0]} {cells[1]}{cells[2]}  {cells[3]}{cells[4]}    {cells[5]}'.rstrip())
    print(f'trained - random init: {gain.mean():+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}] over phantoms; '
          f'crops that relaxed rho: {relaxed:.1%}')
    print('Grey levels alone tell it as well, their deciles better: the demo shows that a property is found without '
          'labels,\nnot that learning is needed for it.')
    (out / 'report.json').write_text(json.dumps(dict(rows=rows, gain=gain.mean(), interval=[low, high],
                                                     relaxed=relaxed), indent=1))
    pictures(cfg, sides, out)


def pictures(cfg, sides, out):
    """views.png, what the sampler does; attention.png, features and attention before and after training."""
    wide = breast(np.random.default_rng(8), width=288, lesion=True)
    image = prepared(wide)[0]
    sheet = sampler.contact_sheet(np.random.default_rng(1), image, mask.tissue(image, None), rho=cfg.min_coverage)
    sheet.save(out / 'views.png')
    rows = []
    for seed in (4, 6):
        image = prepared(breast(np.random.default_rng(seed), lesion=True))[0]
        size = [length // cfg.patch * cfg.patch for length in image.shape]
        maps = [vit.overlay(image, m) for network in sides.values()
                for m in vit.heatmaps(network.backbone.cpu(), image, size)]
        rows.append(np.hstack([mask.overlay(image, mask.tissue(image, None)), *maps]))
    names = ['image, tissue mask', *(f'{name}: {kind}' for name in sides for kind in ('feature', 'attention'))]
    captioned(np.vstack(rows), names).save(out / 'attention.png')
    print(f'-> {out}/log.jsonl, last.pt, report.json, views.png, attention.png')


def captioned(picture, names):
    """A row of names under the columns of an RGB picture, as a PIL image."""
    canvas = Image.new('RGB', (picture.shape[1], picture.shape[0] + 18), 'white')
    canvas.paste(Image.fromarray(picture))
    for i, name in enumerate(names):
        ImageDraw.Draw(canvas).text((i * picture.shape[1] // len(names) + 4, picture.shape[0] + 3), name, fill='black')
    return canvas


if __name__ == '__main__':
    wrong = None
    try:
        main(parse(Config, sys.argv[1:], DEMO))
    except (ValueError, OSError) as problem:                # a data worker sends its traceback along, the reason last
        wrong = str(problem).strip().splitlines()[-1].removeprefix('ValueError: ')
    except KeyboardInterrupt:
        wrong = 'stopped; --resume goes on from the last checkpoint'
    except SystemExit:                                      # --help, or a flag that does not exist
        raise
    except BaseException as problem:                        # to leave by os._exit: data workers ignore other ways
        text = str(problem)
        if 'gloo' in text or isinstance(problem, dist.DistError):
            wrong = 'another rank has ended; its own message is above or below'
        elif 'shared memory' in text:
            wrong = '/dev/shm is full; give the container more (docker --shm-size), or lower --workers'
        else:
            traceback.print_exc()
            wrong = 'out of memory; lower --micro_batch, then --resume' if isinstance(
                problem, (MemoryError, torch.OutOfMemoryError)) else 'stopped by the error above; --resume goes on'
    if wrong:
        print(f'pretrain.py: {wrong}', file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(wrong))                                   # an interpreter that winds down gloo's threads may abort
