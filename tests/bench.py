"""How fast and how lean: every claim of the README as one row, ours against the textbook. Not a test.

    $ python tests/bench.py                     # all rows, two minutes on two cores
    $ python tests/bench.py views masks         # some of them; --help lists the names
    $ python tests/bench.py step                # whole training steps, on a GPU

A row is the median of paired rounds in one process: ours, theirs, theirs, ours, ... ; the ratio is taken round by
round. Rows of the data path run on one thread and count the process's own time, the others all threads and the wall
clock. The textbook stands beside each row, written as its project or its paper does it. Times are worth +-30 %.
"""
import argparse
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == '__main__' and 'MALLOC_MMAP_MAX_' not in os.environ:     # else one measures page faults
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | dict(
        MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_='-1', OPENBLAS_NUM_THREADS='1'))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import losses  # noqa: E402
import mask  # noqa: E402
import phantom  # noqa: E402
import pretrain  # noqa: E402
import sampler  # noqa: E402
import vit  # noqa: E402

SIZES = ((1280, 1024), (3328, 2560))
ROUNDS, CORES = 11, os.cpu_count()


# ---- measuring ----------------------------------------------------------------------------------------------------

def paired(name, ours, theirs, goal, rounds=None, threads=1):
    """Prints one row: median times, the median of the ratios theirs / ours with their range, and the goal."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    times = {ours: [], theirs: []}
    for i in range(-1, rounds or ROUNDS):                   # round -1 warms up
        for run in ((ours, theirs) if i % 2 else (theirs, ours)):
            start = clock()
            run()
            if i >= 0:
                times[run].append(clock() - start)
    a, b = (np.array(times[run]) for run in (ours, theirs))
    low, high = (b / a).min(), (b / a).max()
    row(name, f'{milliseconds(a)} | {milliseconds(b)} | {np.median(b / a):.2f} [{low:.2f}-{high:.2f}]', goal)


def milliseconds(times):
    return f'{1e3 * np.median(times):.3g} ms'


def row(name, cells, goal=''):
    print(f'| {name} | {cells} | {goal} |', flush=True)


def mammogram(H, W):
    """A phantom at the size of a real file, with the noise of one."""
    small = phantom.breast(np.random.default_rng(3), height=H // 4, width=W // 4).volume[0]
    image = np.asarray(Image.fromarray(small).resize((W, H), Image.Resampling.BICUBIC)).astype(np.float32)
    image += np.random.default_rng(0).normal(0, 2, image.shape) * (image > 3)
    return np.uint8(image.clip(0, 255))


# ---- the data path ------------------------------------------------------------------------------------------------

class Dinov2:
    """DINOv2's augmentation as its torchvision transforms do it: Pillow, RGB, one operation after the other; then two
    of its blind block masks."""

    def __init__(self, side, scales):
        self.rng, self.side, self.scales = random.Random(0), side, scales

    def __call__(self, path):
        image, views = Image.open(path).convert('RGB'), []
        for v in range(10):
            view = self.jitter(self.crop(image, 518 if v < 2 else self.side, self.scales[v > 1]))
            if self.rng.random() < (1.0, 0.1, 0.5)[min(v, 2)]:
                view = self.blur(view)
            if v == 1 and self.rng.random() < 0.2:
                view = ImageOps.solarize(view, 128)
            views.append(normalised(view))
        return views, [blind_mask(self.rng, round(self.rng.uniform(0.1, 0.5) * 1369)) for _ in range(2)]

    def crop(self, image, side, scale):
        for _ in range(10):
            area = image.width * image.height * self.rng.uniform(*scale)
            aspect = math.exp(self.rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w <= image.width and h <= image.height:
                break
        x, y = self.rng.randint(0, image.width - w), self.rng.randint(0, image.height - h)
        view = image.crop((x, y, x + w, y + h)).resize((side, side), Image.Resampling.BICUBIC)
        return ImageOps.mirror(view) if self.rng.random() < 0.5 else view

    def jitter(self, view):
        if self.rng.random() < 0.8:
            view = colour_jitter(view, self.rng.sample(range(4), 4), self.rng.uniform(0.6, 1.4),
                                 self.rng.uniform(0.6, 1.4), self.rng.uniform(0.8, 1.2), self.rng.uniform(-0.1, 0.1))
        return view.convert('L').convert('RGB') if self.rng.random() < 0.2 else view

    def blur(self, view):
        taps = torch.exp(-0.5 * (torch.arange(-4, 5) / self.rng.uniform(0.1, 2.0)) ** 2)
        kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 9, 9).float()
        pixels = F.pad(torch.from_numpy(np.array(view)).permute(2, 0, 1).float(), (4,) * 4, mode='reflect')
        pixels = F.conv2d(pixels[None], kernel, groups=3)[0].round().byte()
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def colour_jitter(view, order, brightness, contrast, saturation, hue):
    for operation in order:
        if operation == 0:
            view = ImageEnhance.Brightness(view).enhance(brightness)
        elif operation == 1:
            view = ImageEnhance.Contrast(view).enhance(contrast)
        elif operation == 2:
            view = ImageEnhance.Color(view).enhance(saturation)
        else:
            h, s, v = view.convert('HSV').split()
            h = Image.fromarray(np.array(h) + np.uint8(int(hue * 255) % 256))
            view = Image.merge('HSV', (h, s, v)).convert('RGB')
    return view


def normalised(view):
    pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().float() / 255
    mean, std = torch.tensor(vit.IMAGENET_MEAN), torch.tensor(vit.IMAGENET_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def blind_mask(rng, target, h=37, w=37, least=4, ratio=0.3):
    """DINOv2's block masks: up to ten tries for a block that adds no more than is left, patch by patch."""
    masked, count = np.zeros((h, w), bool), 0
    while count < target:
        before = count
        for _ in range(10):
            area = rng.uniform(least, min(target - before, h * w / 2))
            aspect = math.exp(rng.uniform(math.log(ratio), -math.log(ratio)))
            bh, bw = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if bh < h and bw < w:
                y, x = rng.randint(0, h - bh), rng.randint(0, w - bw)
                if 0 < bh * bw - masked[y:y + bh, x:x + bw].sum() <= target - before:
                    for i in range(y, y + bh):
                        for j in range(x, x + bw):
                            if masked[i, j] == 0:
                                masked[i, j] = 1
                                count += 1
            if count > before:
                break
        if count == before:
            break
    return masked


def views():
    """From a prepared file to tissue, views and masks, against DINOv2's way from a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        for H, W in SIZES:
            image = mammogram(H, W)
            phantom.dataset(folder, [image[None]])
            Image.fromarray(image).save(f'{folder}/image.png')
            for side, scales in ((98, ((0.32, 1.0), (0.05, 0.32))), (196, ((0.5, 1.0), (0.2, 0.5)))):
                cfg = pretrain.Config(global_scale=scales[0], local_scale=scales[1], local_size=side, mask_prob=1.0)
                slices, textbook = pretrain.Slices(cfg, folder), Dinov2(side, scales)
                seeds = iter(range(10 ** 6))
                paired(f'{W}x{H}: tissue, 2 x 518 + 8 x {side}, masks, from .npy; DINOv2 by Pillow, from PNG',
                       lambda: slices.sample(np.random.default_rng(next(seeds)), 0, 0),
                       lambda: textbook(f'{folder}/image.png'), '5', 2 * ROUNDS)


def tricks():
    """What each fast version is worth: a whole sample of the paper's recipe with it, and with the obvious one."""
    def cut(image, box, size):
        y0, x0, y1, x1 = box
        window = torch.from_numpy(np.ascontiguousarray(image[y0:y1, x0:x1]))[None, None]
        return F.interpolate(window, size, mode='bicubic', antialias=True)[0, 0].numpy()

    def dilation(m, kernel):
        return ndimage.maximum_filter(m, kernel, mode='constant')

    def tissue_pixel(rng, tissue):
        index = np.flatnonzero(tissue)
        return divmod(int(index[rng.integers(len(index))]), tissue.shape[1])

    with tempfile.TemporaryDirectory() as folder:
        phantom.dataset(folder, [mammogram(*SIZES[0])[None]])
        slices = pretrain.Slices(pretrain.Config(), folder)

        def sample(place, plain):
            fast = getattr(place, plain.__name__)
            setattr(place, plain.__name__, plain)
            slices.sample(np.random.default_rng(0), 0, 0)
            setattr(place, plain.__name__, fast)

        for place, plain in ((sampler, cut), (mask, dilation), (sampler, tissue_pixel)):
            paired(f'a sample with {place.__name__}.{plain.__name__}; with the obvious one',
                   lambda: slices.sample(np.random.default_rng(0), 0, 0), lambda: sample(place, plain), '1.1', 2 * ROUNDS)


def masks():
    """The tissue-aware patch mask on 37 x 37, mean over ratios .1 to .5, against DINOv2's blind one."""
    y, x = np.mgrid[:37, :37]
    grid = np.clip(8 - 8 * np.hypot((y - 18) / 17, x / 21), 0, 1).astype(np.float32)
    ratios, rng, textbook = np.linspace(0.1, 0.5, 9), np.random.default_rng(0), random.Random(0)
    paired(f'patch masks, nine of 37x37, tissue {grid.mean():.2f}; DINOv2 blind',
           lambda: [sampler.patch_mask(rng, grid, round(q * 1369), 0.3) for q in ratios],
           lambda: [blind_mask(textbook, round(q * 1369)) for q in ratios], '1', 5 * ROUNDS)


# ---- losses, network, optimizer -----------------------------------------------------------------------------------

def ibot():
    """The iBOT loss through the last layer, 256 rows at a time, against autograd on all logits."""
    ours, theirs = ibot_sides()
    for a, b in zip(ours(), theirs()):
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-3, atol=1e-6)
    paired('iBOT loss and last layer, 2048 tokens, K = 65536; full logits', ours, theirs, '0.8', 5, CORES)


def ibot_sides(M=2048, K=65_536, E=256):
    """Value and gradients of the loss, both ways."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (F.normalize(torch.randn(M, E, generator=generator), dim=-1) for _ in range(2))
    prototypes = F.normalize(torch.randn(K, E, generator=generator), dim=-1)
    center, weight = losses.Center(K), torch.full((M,), 1 / 256)

    def gradients(loss):
        s, p = student.clone().requires_grad_(), prototypes.clone().requires_grad_()
        value = loss(s, p)
        value.backward()
        return value.item(), s.grad, p.grad

    def ours():
        def targets(rows):
            return center(teacher[rows] @ prototypes.T, 0.04)
        return gradients(lambda s, p: losses.chunked_patch_loss(s, p, targets, weight, images=8))

    def theirs():
        with torch.no_grad():
            targets = center(teacher @ prototypes.T, 0.04)
        return gradients(lambda s, p: losses.patch_loss(s @ p.T, targets, weight, images=8))

    return ours, theirs


def drop_path(B=16, side=98):
    """Stochastic depth .3 of ViT-B by a subset of the batch, against a mask of zeros per image."""
    model = vit.ViT(**vit.SIZES['base'], drop_path=0.3).train()
    images, subset = torch.rand(B, 1, side, side), vit.residual

    def zeros(x, branch, drop):
        kept = (torch.rand(len(x), 1, 1) >= drop) / (1 - drop)
        return x + branch(x) * kept

    def step(rule):
        vit.residual = rule
        model(images)[0].sum().backward()
        vit.residual = subset

    paired(f'stochastic depth .3, ViT-B, {B} x {side}; zeros per image', lambda: step(subset), lambda: step(zeros),
           '1.35', 5, CORES)


# ---- whole steps and scale ----------------------------------------------------------------------------------------

PEAK = {'H200': 790, 'H100': 790, 'L40S': 362, 'A100': 280}         # practical TFLOP/s, bf16, dense; L40S by its sheet


def flops(cfg, pair=True):
    """FLOPs of one image's part of a step, multiply and add apart: student forward and backward (three forwards) and
    teacher forward; the heads, with the mean number of masked patches, are 2 % of it."""
    def forward(side):
        N = (side // cfg.patch) ** 2
        T, D = N + 1, cfg.width
        return cfg.depth * (24 * T * D ** 2 + 4 * T ** 2 * D) + 2 * N * cfg.patch ** 2 * D
    head = 2 * (cfg.width * cfg.hidden + cfg.hidden ** 2 + cfg.bottleneck * (cfg.hidden + cfg.prototypes))
    masked = 2 * cfg.mask_prob * sum(cfg.mask_ratio) / 2 * (cfg.size // cfg.patch) ** 2
    teacher = (2 + pair) * (forward(cfg.size) + head) + masked * head
    return 3 * (cfg.locals * (forward(cfg.local_size) + head) + teacher) + teacher


def trained(folder, out, *flags):
    """One short run of pretrain.py -> images/s between the last two lines of its log, and GiB; or its last words."""
    done = subprocess.run([sys.executable, str(ROOT / 'pretrain.py'), '--data', folder, '--out', out, *map(str, flags)],
                          capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS=str(CORES)))
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ['?'])[-1]
    header, *lines = (json.loads(line) for line in (Path(out) / 'log.jsonl').read_text().splitlines())
    steps, seconds = (lines[-1][name] - lines[-2][name] for name in ('step', 'time'))
    return header['config']['batch'] * steps / seconds, lines[-1]['gpu_memory']


def step():
    """The paper's recipe, ViT-B/14 at 518 in bf16, a slice pair with every image, no stochastic depth so that all
    FLOPs of the count are done: micro-batches that fit, with and without --compile, and their share of the peak."""
    if not torch.cuda.is_available():
        row('whole step, ViT-B/14 at 518, bf16', 'not run: no GPU here | |', '45 % MFU')
        return
    name = torch.cuda.get_device_name()
    limit = next((peak for key, peak in PEAK.items() if key in name), None)
    per_image = flops(pretrain.Config())
    print(f'{name}, {limit} TFLOP/s, {per_image / 1e12:.2f} TFLOP per image with its pair')
    with tempfile.TemporaryDirectory() as folder:
        phantom.dataset(folder, (np.stack([mammogram(1280, 1024)] * 2) for _ in range(32)))
        for micro, flag in itertools.product((4, 16, 32), ('--no-compile', '--compile')):
            rate, memory = trained(folder, f'{folder}/run{micro}{flag}', '--batch', micro, '--micro_batch', micro,
                                   '--steps', 60, '--warmup', 10, '--freeze_last_layer', 0, '--teacher_temp_steps', 0,
                                   '--log_every', 20, '--drop_path', 0, '--workers', max(1, CORES - 2), flag)
            if rate is None:
                row(f'micro-batch {micro} {flag}', f'{memory[:80]} | |')
                continue
            mfu = f'{rate * per_image / limit / 1e12:.1%} of {limit} TFLOP/s' if limit else ''
            row(f'micro-batch {micro} {flag}', f'{rate:.1f} images/s, {memory:.1f} GiB | {mfu} | '
                                               f'{300_000 * 128 / rate / 3600:.0f} h for 300,000 steps', '45 % MFU')


def fits():
    """What autograd keeps per image of the paper's recipe in bf16 without stochastic depth, counted tensor by tensor,
    and the micro-batches that would fit by that arithmetic."""
    cfg, sizes = pretrain.Config(drop_path=0.0), []
    student, teacher = pretrain.networks(cfg, torch.device('cpu'))
    center = {kind: losses.Center(cfg.prototypes) for kind in ('cls', 'patch')}
    fixed = sum(p.nbytes for p in student.parameters()) * 5                             # gradients, AdamW, teacher
    for B in (1, 2):
        crops, masks = torch.zeros(2, B, 518, 518, dtype=torch.uint8), torch.zeros(2, B, 1369, dtype=torch.bool)
        masks[0, :, :411] = True
        batch = dict(globals=crops, masks=masks, file=torch.arange(B),
                     locals=torch.zeros(8, B, 196, 196, dtype=torch.uint8),
                     pair=torch.zeros(B, 2, 518, 518, dtype=torch.uint8))
        kept = {p.untyped_storage().data_ptr(): 0 for p in student.parameters()}

        def keep(tensor):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast('cpu', torch.bfloat16), hooks:
            terms, _ = pretrain.student_losses(cfg, nn.DataParallel(student), teacher, center, batch, 0.07, B)
        sizes.append(sum(kept.values()))
        del terms
    each, fixed = (sizes[1] - sizes[0]) / 2 ** 30, (fixed + 2 * sizes[0] - sizes[1]) / 2 ** 30
    cards = ', '.join(f'{int((card * 0.95 - fixed) / each)} in {card}' for card in (24, 48, 80, 141))
    row('kept per image, and the same for all', f'{each:.2f} GiB | {fixed:.2f} GiB | images at once: {cards} GiB', '')


ROWS = (views, tricks, masks, ibot, drop_path, fits, step)


def main():
    names = {run.__name__: run for run in ROWS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', nargs='*', help=f"of {', '.join(names)}; all by default")
    parser.add_argument('--rounds', type=int, default=ROUNDS, help='paired rounds of a quick row (%(default)s)')
    parser.add_argument('--headless', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if set(args.rows) - set(names):
        parser.error(f"no such row: {', '.join(set(args.rows) - set(names))}; there are {', '.join(names)}")
    if args.rounds < 1:
        parser.error('--rounds must be at least 1')
    if not args.headless:
        print(f'{CORES} cores, torch {torch.__version__}, numpy {np.__version__}, pillow {Image.__version__}')
        print('| what; against | ours | theirs | ratio [range] | goal |\n|---|---|---|---|---|', flush=True)
    if args.headless:
        globals()['ROUNDS'] = args.rounds
        names[args.rows[0]]()
    else:                                                   # a process for each, so that none inherits memory
        for name in args.rows or names:
            if subprocess.run([sys.executable, __file__, name, '--rounds', str(args.rounds), '--headless']).returncode:
                row(name, 'failed, see above | |')


if __name__ == '__main__':
    main()
