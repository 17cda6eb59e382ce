"""MammoDINO pretraining (arXiv 2510.11883): prepared images in, a ViT encoder out.

    $ torchrun pretrain.py                                       # on phantoms, no data needed, two minutes
    $ python prepare.py RAW PREPARED                             # once per data set
    $ torchrun pretrain.py --data PREPARED --small               # a first run on your own images
    $ torchrun --nproc-per-node 8 pretrain.py --data PREPARED --resume      # the full recipe

The output folder receives log.jsonl (its first line is the configuration) and last.pt (weights, optimizer,
centres). The same command with --resume goes on from last.pt as if it had never stopped. Plain
`python pretrain.py` works as well. One step, over all ranks and micro-batches:

    views, masks, slice pairs -> tokens -> four losses -> AdamW moves the student -> centres, teacher EMA

B images of a micro-batch, S s sides of global and local crops, L local crops, N patches, D width,
E bottleneck, K prototypes, P slice pairs, M masked patches.
"""
import csv
import functools
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import images
import losses
import mask
import metrics
import phantom
import sampler
import vit
from run import computes_in_bf16, cosine, lock, option, parse, save, script, setup


# ---- configuration --------------------------------------------------------------------------------

@dataclass
class Config:
    """Every field is a flag. Sources: [paper] MammoDINO; [dbt-dino] arXiv 2512.13608; [dinov2] its released
    ssl_default_config.yaml, which uses a centre as the paper does (other recipes of DINOv2 use
    Sinkhorn-Knopp); [ours] a choice of this repository."""
    data: str | None = option(None, 'ours', 'prepared folder; without it, a demo', group='the run')
    out: str = option('runs/pretrain', 'ours', 'folder of this run')
    small: bool = option(False, 'ours', 'first run: 84 pixels, width 128, depth 4, 2,000 steps')
    init: str | None = option(None, 'dbt-dino 2.3', 'DINOv2 file or last.pt to begin with')
    imagenet: bool = option(True, 'ours', '--init was fed ImageNet-normalised images; DBT-DINO: no')
    resume: bool = option(False, 'ours', 'go on from OUT/last.pt, or start where there is none')
    seed: int = option(0, 'ours', 'a sample is a function of (seed, epoch, index)')
    workers: int = option(8, 'ours', 'data processes per rank')
    save_every: int = option(1000, 'ours', 'steps between checkpoints')
    keep_every: int = option(0, 'dbt-dino 6.1', 'steps between checkpoints kept for good')
    log_every: int = option(10, 'ours', 'steps between lines of the log')
    amp: bool | None = option(None, 'ours', 'bf16 autocast; by default on GPUs that have it')
    compile: bool = option(False, 'ours', 'torch.compile of the blocks; a slow first step')

    steps: int = option(300_000, 'paper 3.2', 'optimizer steps', group='optimization')
    batch: int = option(128, 'paper 3.2', 'images per step, over all ranks')
    micro_batch: int = option(16, 'ours', 'images a rank holds at once, the rest is accumulated')
    lr: float = option(0.004, 'dinov2', 'peak for a batch of 1024; scaled by sqrt(batch / 1024)')
    lr_end: float = option(1e-6, 'dinov2', 'where the cosine ends')
    warmup: int = option(12_500, 'dinov2', 'steps of linear warm-up')
    layer_decay: float = option(0.9, 'dinov2', 'learning rate factor per block below the top')
    wd: float = option(0.04, 'paper 3.2', 'weight decay at the start')
    wd_end: float = option(0.20, 'paper 3.2', 'weight decay at the end, by cosine')
    clip: float = option(3.0, 'dinov2', 'largest gradient norm, backbone and head apart')
    freeze_last_layer: int = option(1250, 'dinov2', 'steps in which the prototypes do not move')

    size: int = option(518, 'paper 3.2', 'pixels of a global crop', group='encoder and head')
    patch: int = option(14, 'paper 3.2', 'pixels of a patch')
    width: int = option(768, 'paper 3.2', 'width D of a token; ViT-B has 768')
    depth: int = option(12, 'paper 3.2', 'blocks')
    heads: int = option(12, 'paper 3.2', 'attention heads')
    registers: int = option(0, 'dinov2', 'register tokens; 4 in the files with registers')
    drop_path: float = option(0.3, 'dinov2', 'stochastic depth of the student; 0 if small')
    layerscale: float = option(1e-5, 'dinov2', 'initial LayerScale; 1 for a small or short run')
    prototypes: int = option(65_536, 'dinov2', 'K; thousands are enough for ten thousand images')
    hidden: int = option(2048, 'dinov2', 'width of the head')
    bottleneck: int = option(256, 'dinov2', 'width before the prototypes')

    percentile: float | None = option(None, 'ours', 'tau of the mask (2.2); without it self-tuning',
                                      group='tissue-aware views')
    kernel: int = option(9, 'paper 2.2', 'pixels of closing and opening')
    min_coverage: float = option(0.3, 'ours', 'rho, least share of tissue in a crop or mask piece')
    locals: int = option(8, 'dinov2', 'local crops per image')
    local_size: int = option(196, 'dbt-dino 6.1', 'pixels of a local crop')
    global_scale: tuple[float, float] = option((0.5, 1.0), 'dbt-dino 6.1', 'area of a global crop')
    local_scale: tuple[float, float] = option((0.2, 0.5), 'dbt-dino 6.1', 'area of a local crop')
    jitter: float = option(0.8, 'dinov2', 'probability of brightness and contrast')
    brightness: float = option(0.4, 'dinov2', 'factor 1 +- this')
    contrast: float = option(0.4, 'dinov2', 'factor 1 +- this, about the mean of the view')
    blurs: tuple[float, float, float] = option((1.0, 0.1, 0.5), 'dinov2', 'probabilities of blur')
    solarizes: float = option(0.2, 'dinov2', 'probability for the second global crop')
    mask_prob: float = option(0.5, 'dinov2', 'probability that a global crop is masked')
    mask_ratio: tuple[float, float] = option((0.1, 0.5), 'dinov2', 'share of patches masked')
    mask_min: int = option(4, 'dinov2', 'm_min, patches of the smallest piece')
    mask_max: float = option(0.5, 'dinov2', 'm_max, share of the grid of the largest piece')
    tissue_weight: float = option(1.0, 'ours', 'w_t in pi = w_t r + eps')
    mask_eps: float = option(1e-3, 'ours', 'eps in pi = w_t r + eps')
    d_max: int = option(4, 'ours', 'D_max, largest distance of a slice pair; Fig. 1 has 4')
    volume_items: bool = option(False, 'ours', 'an epoch has one random slice per volume, not all')
    blind_crops: bool = option(False, 'paper 3.4', 'crops as in DINOv2, for the ablation')
    blind_masks: bool = option(False, 'paper 3.4', 'patch masks as in DINOv2, for the ablation')

    image_weight: float = option(1.0, 'dinov2', 'lambda_1 of DINO-M', group='losses')
    patch_weight: float = option(1.0, 'dinov2', 'lambda_2 of iBOT-M')
    slice_weight: float = option(0.1, 'ours', 'lambda_3 of DINO-adj; 0 is the ablation without it')
    koleo_weight: float = option(0.1, 'dinov2', 'lambda_4 of KoLeo')
    student_temp: float = option(0.1, 'dinov2', 'tau_s')
    teacher_temp: float = option(0.07, 'dinov2', 'tau_t; DINO was unstable above 0.07')
    teacher_temp_start: float = option(0.04, 'dinov2', 'tau_t at the start')
    teacher_temp_steps: int = option(37_500, 'dinov2', 'steps of linear rise to tau_t')
    momentum: float = option(0.992, 'dinov2', 'EMA of the teacher, rising to 1 by cosine')
    center_momentum: float = option(0.9, 'dinov2', 'EMA of the centres')

    phantoms: int = option(256, 'ours', 'breasts to train on, every third a volume', group='demo')
    test_phantoms: int = option(320, 'ours', 'unseen breasts to test on; 0 skips the test')

    def __post_init__(self):
        if self.small or self.data is None:                 # a short run warms up for a tenth of it
            self.warmup = min(self.warmup, self.steps // 10)


# lr [ours]: with four times as much, short runs read films in part worse than random weights do, while
# their losses fall (tests/experiments.py, `rates`). What the rule of --lr does to a ViT-B was not tried.
SMALL = dict(**vit.SIZES['demo'], size=84, steps=2000, warmup=200, workers=2, lr=0.0028, batch=16,
             layer_decay=1.0, wd_end=0.04, freeze_last_layer=0, drop_path=0.0, layerscale=1.0,
             prototypes=256, hidden=256, bottleneck=64, locals=4, local_size=42,
             teacher_temp=0.04, teacher_temp_steps=0, momentum=0.96)
DEMO = SMALL | dict(out='runs/demo', steps=330, warmup=33, workers=0, save_every=10_000,
                    volume_items=True, global_scale=(0.25, 0.8), local_scale=(0.06, 0.25),
                    min_coverage=0.7, brightness=0.2, contrast=0.2, blurs=(0.2, 0.2, 0.2),
                    solarizes=0.0)


def defaults(given):
    """What replaces the defaults of Config: the demo without --data, a small network with --small."""
    return DEMO if 'data' not in given else SMALL if given.get('small') else {}


# ---- the loop -------------------------------------------------------------------------------------

def train(cfg, data, parts, start, accumulate, log):
    """DINOv2's loop, with the paper's views and slice pairs -> how many steps are done, less than --steps if
    it was asked to stop. `parts`: student, teacher, center, optimizer; `accumulate`: micro-batches a step."""
    student, teacher, center, optimizer = parts.values()
    rank, ranks, device = dist.get_rank(), dist.get_world_size(), center['cls'].center.device
    amp = torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(device, cfg.amp))
    cuda = device.type == 'cuda'
    # Lives no longer than this function: if it outlives its process group, gloo can wait for ever.
    ddp = nn.parallel.DistributedDataParallel(student, device_ids=[device] if cuda else None,
                                              gradient_as_bucket_view=True)
    stream = iter(DataLoader(data, batch_sampler=micro_batches(cfg, start, rank, ranks, accumulate),
                             collate_fn=collate, pin_memory=cuda, num_workers=cfg.workers,
                             timeout=1800 if cfg.workers else 0, worker_init_fn=ignore_signals))
    signals = []                                            # of a scheduler, or Ctrl-C
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: signals.append(received))

    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, unit='step',
               disable=rank > 0 or None)                    # None: shown only on a terminal
    for step in bar:
        # Stochastic depth draws random numbers; they must be the same after --resume.
        torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step, rank]).generate_state(1)[0]))

        # Learning rate and weight decay of this step; at first the prototypes do not move.
        rates = schedules(cfg, step)
        for group in optimizer.param_groups:
            frozen = group['last_layer'] and step < cfg.freeze_last_layer
            group['lr'] = 0.0 if frozen else rates['lr'] * group['lr_scale']
            group['weight_decay'] = rates['wd'] * group['wd_scale']

        # The micro-batches, sent to the device as bytes; `pairs`: slice pairs in one of them, on average.
        batches = [{name: x.to(device, non_blocking=True) for name, x in next(stream).items()}
                   for _ in range(accumulate)]
        pairs = sum_over_ranks(sum(len(batch['pair']) for batch in batches), device).item()
        pairs /= ranks * accumulate

        # The centres start at the mean of the first batch [ours]; DINO's start at 0.
        if step == 0:
            with torch.no_grad(), amp:
                teacher_outs = [teacher(batch, is_student=False) for batch in batches]
            update_centers(center, teacher, teacher_outs, momentum=0)

        # Forward and backward. DDP averages the gradients over ranks once, with the last micro-batch;
        # setting its flag is what `with ddp.no_sync()` does.
        values, teacher_outs = [], []
        for i, batch in enumerate(batches):
            ddp.require_backward_grad_sync = i == accumulate - 1
            with amp:
                terms, teacher_out = student_losses(cfg, ddp, teacher, center, batch,
                                                    rates['teacher_temp'], pairs)
            loss = total_loss(cfg, terms)
            (loss / accumulate).backward()
            values.append(torch.stack([loss, *terms.values()]).detach())
            teacher_outs.append(teacher_out)

        # Average the losses over ranks, clip the gradients; what is not finite ends the run on all ranks.
        means = (sum_over_ranks(torch.stack(values).mean(0), device) / ranks).tolist()
        line = dict(zip(('step', 'total', *terms), (step, *means)))
        line['grad_norm'] = clip_gradients(student, cfg.clip)
        if not all(map(math.isfinite, line.values())):
            raise ValueError(f'not finite: {line}; lower --lr, in another --out')

        # AdamW moves the student; the centres follow, by the teacher's old weights, then the teacher.
        optimizer.step()
        optimizer.zero_grad()
        update_centers(center, teacher, teacher_outs)
        move_teacher(teacher, student, rates['momentum'])

        # Write the log, and a checkpoint if one is due or any rank was asked to stop.
        if step % cfg.log_every == 0 or step == cfg.steps - 1:
            write_log(cfg, log, bar, line | rates | diagnose(cfg, batches, terms, teacher_out))
        stopping = bool(sum_over_ranks(len(signals), device))
        checkpoint(cfg, step + 1, parts, data, log, stopping)
        if stopping:
            bar.close()
            return step + 1
    return cfg.steps


# ---- one step -------------------------------------------------------------------------------------

def student_losses(cfg, student, teacher, center, batch, tau_t, pairs):
    """The four losses of a micro-batch -> terms {name: ()}, and the outputs of the teacher.

    As in DINOv2, all losses share what a network computes once, so DINO-M and KoLeo too see the student's
    global crops with patches masked. `student` is wrapped in DDP. `pairs` is the mean number of slice pairs
    in a micro-batch of this step, the divisor of DINO-adj. KoLeo sees this micro-batch, of all ranks.
    """
    with torch.no_grad():
        teacher_out = teacher(batch, is_student=False)
        targets = center['cls'](teacher_out['logits'], tau_t)                           # (2, B, K)
        pair_targets = center['cls'](teacher_out['pair_logits'], tau_t)                 # (P, K)
        prototypes_t = teacher.head.last_layer.weight                                   # (K, E)

    def patch_targets(chunk):       # computed when the loss needs them, a few rows at a time
        logits = nn.functional.linear(teacher_out['patches'][chunk], prototypes_t)      # (rows, K)
        return center['patch'](logits, tau_t)

    tau_s = cfg.student_temp
    student_out = student(batch, is_student=True)
    views = torch.cat([student_out['logits'], student_out['local_logits']])             # (2 + L, B, K)
    masks = batch['masks'].flatten(0, 1)                                                # (2 B, N)
    weight = (1 / masks.sum(1, keepdim=True).clamp_min(1)).expand_as(masks)[masks]      # (M,)
    prototypes_s = student.module.head.last_layer.weight                                # (K, E)
    terms = dict(
        image=losses.image_loss(views, targets, tau_s),
        patch=losses.chunked_patch_loss(student_out['patches'], prototypes_s, patch_targets,
                                        weight, images=len(masks), temp=tau_s),
        slice=losses.adjacent_loss(student_out['pair_logits'], pair_targets, tau_s, pairs),
        # Each view apart: the two crops of an image would be neighbours, and be pushed apart.
        koleo=sum(losses.koleo(view, batch['file']) for view in student_out['cls']))
    return terms, teacher_out | dict(targets=targets)


def total_loss(cfg, terms):
    """L_total = lambda_1 L_DINO-M + lambda_2 L_iBOT-M + lambda_3 L_DINO-adj + lambda_4 L_KoLeo (2.1)"""
    return cfg.image_weight * terms['image'] + cfg.patch_weight * terms['patch'] \
        + cfg.slice_weight * terms['slice'] + cfg.koleo_weight * terms['koleo']


@torch.no_grad()
def move_teacher(teacher, student, momentum):
    """theta_t <- momentum theta_t + (1 - momentum) theta_s (DINO 3.1)"""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


@torch.no_grad()
def update_centers(center, teacher, teacher_outs, momentum=None):
    """The centres of CLS and patch logits move once per step, towards the mean of the teacher's logits over
    all micro-batches and ranks. Slice pairs use the centre of CLS but do not move it: their volumes have
    moved it already by their global crops, and would count twice. The mean logits of patches are the logits
    of their mean embedding."""
    logits = torch.cat([out['logits'].flatten(0, 1) for out in teacher_outs])           # (rows, K)
    center['cls'].update(logits, momentum=momentum)
    patches = [out['patches'] for out in teacher_outs]
    counts = torch.tensor([len(part) for part in patches])
    means = torch.stack([part.sum(0) / max(len(part), 1) for part in patches])          # (micro-batches, E)
    center['patch'].update(teacher.head.logits(means), counts, momentum)


def schedules(cfg, step):
    """Learning rate, weight decay, teacher momentum and tau_t of a step."""
    peak = cfg.lr * math.sqrt(cfg.batch / 1024)
    rise = min(step / cfg.teacher_temp_steps, 1) if cfg.teacher_temp_steps else 1
    tau_t = cfg.teacher_temp_start + rise * (cfg.teacher_temp - cfg.teacher_temp_start)
    return dict(lr=cosine(step, cfg.steps, peak, cfg.lr_end, cfg.warmup),
                wd=cosine(step, cfg.steps, cfg.wd, cfg.wd_end),
                momentum=cosine(step, cfg.steps, cfg.momentum, 1.0), teacher_temp=tau_t)


def clip_gradients(student, max_norm):
    """Clips the gradients of backbone and head apart, as DINOv2 does -> their joint norm before that."""
    norms = [nn.utils.clip_grad_norm_(part.parameters(), max_norm)
             for part in (student.backbone, student.head)]
    return math.hypot(*torch.stack(norms).tolist())


# ---- student and teacher --------------------------------------------------------------------------

class Network(nn.Module):
    """Encoder f and head h of one side."""

    def __init__(self, cfg, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = losses.Head(cfg.width, cfg.prototypes, cfg.hidden, cfg.bottleneck)

    def forward(self, batch, is_student):
        """A micro-batch -> dict of cls (2, B, D) and logits (2, B, K) of the global crops, pair_logits
        (P, K), local_logits (L, B, K), and patches (M, E), embeddings of the patches under the masks.

        The student sees slice k of each pair, the local crops, and the mask token in place of the patches
        under the masks. The teacher sees slice k', no local crops, and everything that the masks hide.
        """
        B, P = batch['globals'].shape[1], len(batch['pair'])
        pair = batch['pair'][:, 0 if is_student else 1]                                 # (P, S, S)
        crops = torch.cat([pixels(batch['globals']), pixels(pair)])                     # (2 B + P, 1, S, S)
        masks = batch['masks'].flatten(0, 1)                                            # (2 B, N)
        masks = torch.cat([masks, masks.new_zeros(P, masks.shape[1])])                  # none on slices
        cls, patches = self.backbone(crops, masks if is_student else None)
        if is_student and len(batch['locals']):
            cls = torch.cat([cls, self.backbone(pixels(batch['locals']))[0]])           # + L B rows
        logits = self.head(cls)
        return dict(cls=cls[:2 * B].unflatten(0, (2, B)),
                    logits=logits[:2 * B].unflatten(0, (2, B)),
                    pair_logits=logits[2 * B:2 * B + P],
                    local_logits=logits[2 * B + P:].unflatten(0, (-1, B)),
                    patches=self.head.embed(patches[masks]))


def pixels(crops):
    """uint8 (..., S, S) -> float (rows, 1, S, S) in [0, 1]"""
    return crops.flatten(0, -3).unsqueeze(1).float() / 255


def networks(cfg, device):
    """-> student, teacher, with equal weights. Only the student has stochastic depth and is trained."""
    torch.manual_seed(cfg.seed)
    shape = {name: getattr(cfg, name) for name in ('patch', 'width', 'depth', 'heads', 'registers')}
    loaded = vit.load(cfg.init, imagenet=cfg.imagenet) if cfg.init else None
    if loaded:
        flags = [f'--{k} {loaded.config[k]}' for k, v in shape.items() if v != loaded.config[k]]
        if flags:
            raise ValueError(f"{cfg.init} is another encoder; it takes {' '.join(flags)}")
        shape = loaded.config
    shape = shape | dict(size=cfg.size)
    backbone = vit.ViT(**shape, drop_path=cfg.drop_path, layerscale=cfg.layerscale)
    if loaded:                                              # its positions, interpolated to --size
        grid = cfg.size // cfg.patch
        backbone.load_state_dict(loaded.state_dict() | dict(pos_embed=loaded.positions(grid, grid)))
    student, teacher = Network(cfg, backbone), Network(cfg, vit.ViT(**shape))
    teacher.load_state_dict(student.state_dict())
    return student.to(device), teacher.to(device).requires_grad_(False).eval()


# ---- the stream of samples ------------------------------------------------------------------------

class Slices(Dataset):
    """Every slice of a prepared folder (a mammogram has one), as an endless stream of samples. Item i belongs
    to epoch i // len(self); it depends on seed, epoch and slice, neither on the rank nor on the data worker.

    Item i -> dict: globals (2, S, S), locals (L, s, s) and pair (1, 2, S, S), or (0, 2, S, S) without a
    neighbour, uint8; masks (2, N) bool; file; relaxed (2,), how many crops and masks had to lower rho.
    """

    def __init__(self, cfg, folder):
        index = Path(folder) / 'index.csv'
        if not index.is_file():
            raise ValueError(f'{folder} has no index.csv; first python prepare.py RAW PREPARED, '
                             'then --data PREPARED')
        try:
            with open(index, newline='', encoding='utf-8-sig', errors='surrogateescape') as file:
                rows = list(csv.DictReader(file))
            small = sum(min(int(row['height']), int(row['width'])) < cfg.local_size for row in rows)
            self.paths = np.array([os.fsencode(row['path']) for row in rows])   # arrays: workers share them
            self.counts = np.array([int(row['slices']) for row in rows])        # slices of each file
        except (KeyError, TypeError, ValueError, csv.Error):
            rows = []
        if not rows or self.counts.min() < 1:
            raise ValueError(f'{index} lists no images as prepare.py does; run that again')
        if small:
            raise ValueError(f'{index}: {small} of {len(rows)} images are smaller than '
                             f'--local_size {cfg.local_size}; lower it, or raise prepare.py --side')
        self.cfg, self.folder = cfg, str(folder)
        self.digest = hashlib.sha256(index.read_bytes()).hexdigest()
        self.ends = np.cumsum(np.ones_like(self.counts) if cfg.volume_items else self.counts)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        seed, (epoch, place) = self.cfg.seed, divmod(i, len(self))
        index = int(epoch_order(seed, epoch, len(self))[place])
        file = int(np.searchsorted(self.ends, index, side='right'))
        rng = np.random.default_rng([seed, epoch, index])
        k = int(rng.integers(self.counts[file])) if self.cfg.volume_items \
            else index - int(self.ends[file] - self.counts[file])
        return self.sample(rng, file, k) | dict(file=file)

    def load(self, file, k):
        """Slice k of a file, uint8 (H, W); the rest of a volume stays on disk."""
        path = os.path.join(self.folder, os.fsdecode(self.paths[file]))
        try:
            volume = np.load(path, mmap_mode='r')
            return np.array(volume[k] if volume.ndim == 3 else volume)
        except (ValueError, OSError, EOFError, IndexError) as problem:
            raise ValueError(f'{path}: {problem}; delete it and run prepare.py again') from None

    def sample(self, rng, file, k):
        """The views, patch masks and slice pair of one slice."""
        cfg, slices, image = self.cfg, int(self.counts[file]), self.load(file, k)
        tissue = mask.tissue(image, cfg.percentile, cfg.kernel)
        out = sampler.views(
            rng, image, tissue, cfg.size, cfg.local_size, cfg.locals, cfg.patch, cfg.global_scale,
            cfg.local_scale, rho=cfg.min_coverage, jitter=cfg.jitter, brightness=cfg.brightness,
            contrast=cfg.contrast, blurs=cfg.blurs, solarizes=cfg.solarizes,
            placement=np.ones_like(tissue) if cfg.blind_crops else tissue)

        masks, info, masks_relaxed = [], {}, 0
        for grid in np.ones_like(out['grids']) if cfg.blind_masks else out['grids']:
            masked = rng.random() < cfg.mask_prob
            m = round(rng.uniform(*cfg.mask_ratio) * grid.size) if masked else 0
            masks.append(sampler.patch_mask(
                rng, grid, m, cfg.min_coverage, cfg.mask_min, int(cfg.mask_max * grid.size),
                weight=cfg.tissue_weight, eps=cfg.mask_eps, info=info).ravel())
            masks_relaxed += info['relaxed']

        pair = np.empty((0, 2, cfg.size, cfg.size), np.uint8)
        if slices > 1 and cfg.slice_weight:                 # on tissue also under --blind_crops (2.4)
            neighbour = self.load(file, sampler.slice_pair(rng, k, slices, cfg.d_max))
            pair = sampler.pair_views(rng, image, neighbour, tissue, cfg.size, cfg.global_scale,
                                      rho=cfg.min_coverage)[None]
        return dict(globals=out['globals'], locals=out['locals'], masks=np.stack(masks), pair=pair,
                    relaxed=np.array([out['relaxed'].sum(), masks_relaxed]))


@functools.lru_cache(2)                                     # a batch can straddle two epochs
def epoch_order(seed, epoch, length):
    return np.random.default_rng([seed, epoch]).permutation(length)


def collate(samples):
    """-> globals (2, B, S, S), locals (L, B, s, s), masks (2, B, N), pair (P, 2, S, S), file (B,), relaxed"""
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples], axis=1))
             for name in ('globals', 'locals', 'masks')}
    batch['pair'] = torch.from_numpy(np.concatenate([s['pair'] for s in samples]))
    batch['file'] = torch.tensor([s['file'] for s in samples])
    batch['relaxed'] = torch.from_numpy(np.sum([s['relaxed'] for s in samples], axis=0))
    return batch


def micro_batches(cfg, start, rank, ranks, accumulate):
    """Item numbers of this rank's micro-batches from step `start` on. Those of all ranks together are a
    contiguous run of the stream, however many ranks there are."""
    micro = cfg.batch // (accumulate * ranks)
    for step in range(start, cfg.steps):
        for part in range(accumulate):
            first = step * cfg.batch + (part * ranks + rank) * micro
            yield range(first, first + micro)


def ignore_signals(_):
    """SIGTERM and Ctrl-C reach every process of a job; data workers go on until the step is finished."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---- the run: set-up, checkpoints, log ------------------------------------------------------------

def main(cfg):
    """One run, from a prepared folder to the last checkpoint."""
    rank, ranks, device = setup()
    accumulate = accumulation_steps(cfg, ranks)
    out = Path(cfg.out)
    # The data and --init are read before OUT is created, so that an error leaves no folder.
    data = None if cfg.data is None else Slices(cfg, cfg.data)
    student, teacher = networks(cfg, device)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        lock_file = lock(out)                               # noqa: F841, open until the process ends
        if data is None:
            phantom.dataset(out / 'phantoms', demo_volumes(cfg))
    dist.barrier()
    if data is None:
        data = Slices(cfg, out / 'phantoms')

    center = {kind: losses.Center(cfg.prototypes, cfg.center_momentum) for kind in ('cls', 'patch')}
    center = nn.ModuleDict(center).to(device)
    groups = vit.param_groups(student, cfg.lr, cfg.wd, cfg.layer_decay)     # rates are set in every step
    optimizer = torch.optim.AdamW(groups, fused=True)
    parts = dict(student=student, teacher=teacher, center=center, optimizer=optimizer)
    start, log = resume(cfg, parts, data)
    if cfg.compile:                                         # in place: the state dict keeps its names
        for block in (*student.backbone.blocks, *teacher.backbone.blocks):
            block.compile(dynamic=True)
    if rank == 0:
        introduce(cfg, data, student, start, ranks, accumulate, device)

    done = train(cfg, data, parts, start, accumulate, log)
    if rank == 0 and done < cfg.steps:
        print(f'stopped after step {done - 1}, as asked; the same command with --resume goes on')
    elif rank == 0:
        if cfg.data is None and cfg.test_phantoms:
            untrained = networks(cfg, device)[1]
            report(cfg, {'random init': untrained, 'trained teacher': teacher}, device)
        last = out / 'last.pt'
        flags = '' if cfg.data is None else f' --root exams.csv --task cancer --encoder {last}'
        print(f'-> {last}. Next:\n   python vit.py IMAGE {last}\n   python finetune.py{flags}')
    dist.destroy_process_group()


def accumulation_steps(cfg, ranks):
    """-> micro-batches per rank and step. ValueError for flags that do not fit, or if --out holds a run."""
    for name in ('steps', 'batch', 'micro_batch', 'patch', 'heads', 'save_every', 'log_every'):
        if getattr(cfg, name) < 1:
            raise ValueError(f'--{name} {getattr(cfg, name)}; it starts at 1')
    names = ('warmup', 'freeze_last_layer', 'teacher_temp_steps')
    late = [f'--{name} {getattr(cfg, name)}' for name in names if getattr(cfg, name) >= cfg.steps]
    if late:
        raise ValueError(f"--steps {cfg.steps} must exceed {', '.join(late)}; --small does that")
    if cfg.size % cfg.patch or cfg.local_size % cfg.patch:
        raise ValueError(f'--size {cfg.size} and --local_size {cfg.local_size} must be multiples '
                         f'of --patch {cfg.patch}')
    micro = min(cfg.micro_batch, cfg.batch // ranks)
    if micro < 1 or cfg.batch % (micro * ranks):
        raise ValueError(f'--batch {cfg.batch} does not divide into {ranks} ranks x --micro_batch '
                         f'{cfg.micro_batch}; choose a multiple of both, or lower --micro_batch')
    log, last = Path(cfg.out, 'log.jsonl'), Path(cfg.out, 'last.pt')
    if not cfg.resume and (log.exists() or last.exists()):
        # Only in its own folder does a demo replace a demo. The first line of the log is the configuration.
        first = log.read_text().partition('\n')[0] if log.exists() else ''
        if cfg.data is not None or cfg.out != DEMO['out'] or '"data": null' not in first:
            raise ValueError(f'{cfg.out} holds a run; add --resume, or choose another --out')
    return cfg.batch // (micro * ranks)


def introduce(cfg, data, student, start, ranks, accumulate, device):
    """Prints what is about to start."""
    files, volumes, slices = len(data.paths), int((data.counts > 1).sum()), int(data.counts.sum())
    parameters = sum(p.numel() for p in student.parameters())
    micro = cfg.batch // ranks // accumulate
    precision = 'bf16' if computes_in_bf16(device, cfg.amp) else 'fp32'
    print(f'{files:,} files, {volumes:,} of them volumes, {slices:,} slices in {data.folder}')
    print(f'width {cfg.width}, depth {cfg.depth}, {cfg.size} pixels, {parameters:,} parameters')
    print(f'steps {start:,} to {cfg.steps:,} of {cfg.batch} images = {ranks} ranks x {micro} x '
          f'{accumulate} micro-batches on {device.type} in {precision}', flush=True)
    if not volumes:
        print('no volume among them: L_DINO-adj has nothing to learn from')


def resume(cfg, parts, data):
    """-> the step to start with, and log.jsonl open to append (None but on rank 0). With --resume and a
    last.pt, the run goes on from there; another recipe or other files are refused."""
    last, start = Path(cfg.out, 'last.pt'), 0
    if cfg.resume and last.exists():
        state = vit.read(last)
        if not parts.keys() <= state.keys():
            raise ValueError(f'{last} is no run of pretrain.py; choose another --out')
        may_change = {'data', 'out', 'resume', 'small', 'workers', 'micro_batch', 'compile',
                      'save_every', 'keep_every', 'log_every', 'test_phantoms'}
        old = state['config']
        changed = [f'--{name} {old.get(name)} -> {value}' for name, value in asdict(cfg).items()
                   if name not in may_change and old.get(name) != value]
        changed += ['other files'] if state['data'] != data.digest else []
        if changed:
            raise ValueError(f"{last} is another run: {', '.join(changed)}; choose another --out")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        start = state['step']
    if dist.get_rank() > 0:
        return start, None
    log = open(last.with_name('log.jsonl'), 'a' if start else 'w')
    if start:                                               # cut off lines written after the checkpoint
        log.truncate(min(log.seek(0, os.SEEK_END), state['log_bytes']))
        return start, log
    if last.exists():                                       # only the demo writes over a run
        print(f'replaces the demo in {cfg.out}')
        last.unlink()
    print(json.dumps(dict(config=asdict(cfg), torch=torch.__version__)), file=log, flush=True)
    return start, log


def checkpoint(cfg, step, parts, data, log, stopping):
    """OUT/last.pt every `save_every` steps, at the end and when stopping; OUT/step_N.pt for good."""
    names = [f'step_{step:06d}.pt'] if cfg.keep_every and step % cfg.keep_every == 0 else []
    names += ['last.pt'] if stopping or step % cfg.save_every == 0 or step == cfg.steps else []
    if not names:
        return
    weights = [*parts['student'].parameters(), *parts['teacher'].parameters()]
    if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
        raise ValueError(f'step {step}: weights that are not finite; lower --lr, in another --out')
    if log:
        os.fsync(log.fileno())                              # the lines up to here lie on disk before it
        state = dict(step=step, config=asdict(cfg), vit=parts['teacher'].backbone.config,
                     data=data.digest, log_bytes=log.tell())
        state |= {name: part.state_dict() for name, part in parts.items()}
        for name in names:
            save(Path(cfg.out) / name, state)


def write_log(cfg, log, bar, line):
    """One line of log.jsonl, the losses into the progress bar, and advice where a run goes wrong."""
    if log is None:
        return
    print(json.dumps(line | dict(time=time.monotonic())), file=log, flush=True)
    shown = ('total', 'image', 'patch', 'slice', 'koleo')
    bar.set_postfix({name: f'{line[name]:.3f}' for name in shown})
    log_k, warm = math.log(cfg.prototypes), line['step'] >= cfg.warmup
    collapsed = warm and line['kl'] < 1e-3
    if collapsed and line['teacher_entropy'] < 0.01 * log_k:
        warn('every image goes to one prototype (collapse): lower --lr, raise --teacher_temp')
    elif collapsed and line['teacher_entropy'] > 0.999 * log_k:
        warn('every image goes to all prototypes (collapse): lower --teacher_temp or --lr')
    elif warm and line['teacher_temp'] < 0.05 and line['kl'] < 0.3 and \
            line['teacher_entropy'] > 0.85 * log_k:          # at 0.07 it may be as uniform and learn
        warn('the teacher hardly prefers a prototype: a lower --lr may read better than this')
    if warm and line['cls_spread'] < 0.01:
        warn('the CLS tokens of all images are alike (collapse): lower --lr')
    if line['relaxed'] > 0.5:
        warn('most crops did not reach rho: look at `python mask.py FILE`, or lower --min_coverage')


@functools.cache                                            # each sentence once
def warn(sentence):
    tqdm.write(f'warning: {sentence}', file=sys.stderr)


def diagnose(cfg, batches, terms, teacher_out):
    """What shows a collapse first, from the last micro-batch of all ranks.

    teacher_entropy: of an image's target, from 0, one prototype, to log K, no preference. kl: the
    cross-entropy less that, KL(teacher || student); near 0 the student guesses every target, as when all
    images share one. With too large a learning rate the teacher is nearly uniform and kl small, while losses
    and rank look healthy. cls_spread and effective_rank of the unit CLS tokens: 0 to 1 and 1 to D, the least
    if all are alike. Besides, relaxed and masks_relaxed: the share of the step's crops, and of its global
    crops with or without a mask, where rho had to fall; gpu_memory: GiB at most.
    """
    p = teacher_out['targets']                                                          # (2, B, K)
    entropy = -(p * torch.log(p.clamp_min(1e-12))).sum(-1).mean()
    both = sum_over_ranks(torch.stack([entropy, terms['image'] - entropy]), p.device)
    entropy, kl = (both / dist.get_world_size()).tolist()
    cls = losses.gather(teacher_out['cls'].flatten(0, 1).float())                       # (ranks * 2 B, D)
    cls = nn.functional.normalize(cls, dim=-1)
    crops, masks = sum_over_ranks(sum(batch['relaxed'] for batch in batches), p.device).tolist()
    return dict(teacher_entropy=entropy, kl=kl, cls_spread=cls.std(0).norm().item(),
                effective_rank=metrics.effective_rank(cls.cpu().numpy()),
                relaxed=crops / (cfg.batch * (2 + cfg.locals)),
                masks_relaxed=masks / (2 * cfg.batch),
                gpu_memory=torch.cuda.max_memory_allocated() / 2 ** 30)


def sum_over_ranks(value, device):
    value = torch.as_tensor(value).detach().to(device, torch.float64, copy=True)
    dist.all_reduce(value)
    return value


# ---- the demo, no part of the method --------------------------------------------------------------

def demo_volumes(cfg):
    """Breasts to train on, every third a volume of eight slices; uint8 (K, H, W) each."""
    for i in range(cfg.phantoms):
        rng = np.random.default_rng([cfg.seed, i, 0, 1])
        yield prepared(phantom.breast(rng, slices=8 if i % 3 == 0 else 1))


def prepared(example):
    """The paper's preprocessing (3.1) of a phantom, min-max and CLAHE: uint8 (K, H, W)."""
    return np.stack([images.clahe(images.to_uint8(image)) for image in example.volume])


def report(cfg, encoders, device):
    """The density of breasts that the demo never saw, by leave-one-out k-NN on their CLS tokens, beside grey
    levels. Prints a table, writes report.json, views.png and attention.png."""
    n, out = cfg.test_phantoms, Path(cfg.out)
    unseen = [phantom.breast(np.random.default_rng([cfg.seed, i, 0, 2])) for i in range(n)]
    pictures = [prepared(x)[0] for x in unseen]
    density = np.array([x.density for x in unseen])
    deciles = [np.percentile(x[p.tissue], range(10, 100, 10)) for x, p in zip(pictures, unseen)]
    deciles = (deciles - np.mean(deciles, 0)) / np.std(deciles, 0)                      # (n, 9)
    similarity = {'tissue-grey deciles': -np.square(deciles[:, None] - deciles[None]).mean(-1)}
    for name, network in encoders.items():
        x = cls_tokens(network, pictures, device)                                       # (n, D)
        similarity[name] = x @ x.T
    right, rows = {}, {'chance': np.bincount(density).max() / n}
    for name, s in similarity.items():
        np.fill_diagonal(s, -np.inf)                                                    # leave one out
        right[name] = (metrics.knn(s, density).argmax(1) == density).astype(float)
        rows[name] = right[name].mean()
    gain = right['trained teacher'] - right['random init']
    low, high = metrics.bootstrap(np.mean, [gain], np.arange(n), np.random.default_rng(0))
    print(f'\ndensity of {n} unseen phantoms by k-NN, share right')
    print('\n'.join(f'  {name:20} {value:.3f}' for name, value in rows.items()))
    print(f'trained - random init: {gain.mean():+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]\n'
          'The deciles need no learning: the table shows that training works, not what it is for.')
    result = dict(rows=rows, gain=gain.mean(), interval=[low, high])
    (out / 'report.json').write_text(json.dumps(result, indent=1))

    image = prepared(phantom.breast(np.random.default_rng(8), width=288, lesion=True))[0]
    tissue, rng = mask.tissue(image, percentile=None), np.random.default_rng(1)
    sampler.contact_sheet(rng, image, tissue, rho=cfg.min_coverage).save(out / 'views.png')
    sheet = []
    for seed in (4, 6):
        image = prepared(phantom.breast(np.random.default_rng(seed), lesion=True))[0]
        size = [length // cfg.patch * cfg.patch for length in image.shape]
        sheet.append([(mask.overlay(image, mask.tissue(image, None)), 'image, tissue mask')])
        for name, network in encoders.items():
            heats = zip(('feature', 'attention'), vit.heatmaps(network.backbone, image, size))
            sheet[-1] += [(vit.overlay(image, heat), f'{name}: {kind}') for kind, heat in heats]
    sampler.sheet(sheet).save(out / 'attention.png')


@torch.no_grad()
def cls_tokens(network, pictures, device):
    """Pictures uint8 (H, W), each squashed to the encoder's square -> unit CLS tokens (n, D)."""
    side = (network.backbone.config['size'],) * 2
    squashed = [Image.fromarray(x).resize(side, Image.Resampling.BICUBIC) for x in pictures]
    cls, _ = network.backbone(pixels(torch.from_numpy(np.stack(squashed)).to(device)))
    return nn.functional.normalize(cls.float(), dim=-1).cpu().numpy()


if __name__ == '__main__':
    script('pretrain.py', lambda argv: main(parse(Config, argv, defaults)))
