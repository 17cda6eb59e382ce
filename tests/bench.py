"""How fast and how lean: every claim of the README as one row, ours against the textbook. Not a test.

    $ python tests/bench.py                     # all rows, two minutes on two cores
    $ python tests/bench.py step                # one of them: whole training steps, on a GPU

A row is the median of paired rounds: ours, theirs, theirs, ours, ... ; the ratio is taken round by round.
Rows of the data path run on one thread and count the process's own time, the others use all threads and the
wall clock. The textbook is written as its project or paper does it. Times are worth +-30 %.
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
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

CORES = os.cpu_count()
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import losses  # noqa: E402
import mask  # noqa: E402
import phantom  # noqa: E402
import pretrain  # noqa: E402
import sampler  # noqa: E402
import vit  # noqa: E402


def paired(name, ours, theirs, goal, rounds, threads=1):
    """Prints one row: median times, the median of the ratios theirs / ours with their range, and the goal."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    times = np.zeros((2, rounds))
    for i in range(-1, rounds):                             # round -1 warms up, the last replaces its times
        for side, run in ((0, ours), (1, theirs))[::1 if i % 2 else -1]:
            start = clock()
            run()
            times[side, i] = clock() - start
    a, b = 1e3 * times
    row(name, f'{np.median(a):.3g} ms | {np.median(b):.3g} ms | '
              f'{np.median(b / a):.2f} [{(b / a).min():.2f}-{(b / a).max():.2f}]', goal)


def row(name, cells, goal=''):
    print(f'| {name} | {cells} | {goal} |', flush=True)


def mammogram(H, W):
    """A phantom at the size of a real file, with the noise of one."""
    small = phantom.breast(np.random.default_rng(3), height=H // 4, width=W // 4).volume[0]
    image = np.asarray(Image.fromarray(small).resize((W, H), Image.Resampling.BICUBIC)).astype(np.float32)
    image += np.random.default_rng(0).normal(0, 2, image.shape) * (image > 3)
    return np.uint8(image.clip(0, 255))


# ---- DINOv2's data path --------------------------------------------------------------------------------

def dinov2_sample(rng, path, side, large, small):
    """DINOv2's way from a file to two global and eight local views and two block masks."""
    image, sizes = Image.open(path).convert('RGB'), [(518, large)] * 2 + [(side, small)] * 8
    views = [dinov2_view(rng, image, v, *size) for v, size in enumerate(sizes)]
    return views, [blind_mask(rng, round(rng.uniform(0.1, 0.5) * 1369)) for _ in range(2)]


def dinov2_view(rng, image, v, side, scale):
    """View v by Pillow, in RGB, as its torchvision transforms do it, one after the other."""
    h, w = sampler.window_size(rng, image.height, image.width, scale, (3 / 4, 4 / 3))
    x, y = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
    view = image.crop((x, y, x + w, y + h)).resize((side, side), Image.Resampling.BICUBIC)
    view = ImageOps.mirror(view) if rng.random() < 0.5 else view
    if rng.random() < 0.8:
        operations = [lambda view: ImageEnhance.Brightness(view).enhance(rng.uniform(0.6, 1.4)),
                      lambda view: ImageEnhance.Contrast(view).enhance(rng.uniform(0.6, 1.4)),
                      lambda view: ImageEnhance.Color(view).enhance(rng.uniform(0.8, 1.2)),
                      lambda view: shift_hue(view, rng.uniform(-0.1, 0.1))]
        for operation in rng.sample(operations, 4):
            view = operation(view)
    view = view.convert('L').convert('RGB') if rng.random() < 0.2 else view
    view = blur(view, rng.uniform(0.1, 2.0)) if rng.random() < (1.0, 0.1, 0.5)[min(v, 2)] else view
    view = ImageOps.solarize(view, 128) if v == 1 and rng.random() < 0.2 else view
    pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().float() / 255       # (3, S, S)
    mean, std = torch.tensor(vit.IMAGENET_MEAN), torch.tensor(vit.IMAGENET_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def shift_hue(view, share):
    h, s, v = view.convert('HSV').split()
    h = Image.fromarray(np.array(h) + np.uint8(int(share * 255) % 256))
    return Image.merge('HSV', (h, s, v)).convert('RGB')


def blur(view, sigma):
    taps = torch.exp(-0.5 * (torch.arange(-4, 5) / sigma) ** 2)
    kernel = (taps[:, None] * taps / taps.sum() ** 2).expand(3, 1, 9, 9)
    pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).float()                          # (3, S, S)
    pixels = F.conv2d(F.pad(pixels, (4,) * 4, mode='reflect')[None], kernel, groups=3)[0]
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).contiguous().numpy())


def blind_mask(rng, target, h=37, w=37, least=4, ratio=0.3):
    """Its block masks: up to ten tries for a block that masks no more than is missing, patch by patch."""
    masked, missing = np.zeros((h, w), bool), target
    while missing > 0:
        most = min(missing, h * w / 2)
        for _ in range(10):
            area = rng.uniform(least, most)
            aspect = math.exp(rng.uniform(math.log(ratio), -math.log(ratio)))
            bh, bw = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if bh < h and bw < w:
                y, x = rng.randint(0, h - bh), rng.randint(0, w - bw)
                new = bh * bw - masked[y:y + bh, x:x + bw].sum()
                if 0 < new <= most:
                    break
        else:
            return masked
        for i, j in itertools.product(range(y, y + bh), range(x, x + bw)):
            if masked[i, j] == 0:
                masked[i, j] = 1
        missing -= new
    return masked


# ---- the rows ------------------------------------------------------------------------------------------

def views(rounds):
    """From a prepared file to tissue, views and masks, against DINOv2's way from a PNG."""
    crops = (98, (0.32, 1.0), (0.05, 0.32)), (196, (0.5, 1.0), (0.2, 0.5))
    rng, seeds = random.Random(0), itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        for (H, W), (side, large, small) in itertools.product(((1280, 1024), (3328, 2560)), crops):
            image, png = mammogram(H, W), f'{folder}/image.png'
            phantom.dataset(folder, [image[None]])
            Image.fromarray(image).save(png)
            cfg = pretrain.Config(local_size=side, global_scale=large, local_scale=small, mask_prob=1.0)
            slices = pretrain.Slices(cfg, folder)
            paired(f'{W}x{H}: tissue, 2 x 518 + 8 x {side}, masks, from .npy; DINOv2 by Pillow, from PNG',
                   lambda: slices.sample(np.random.default_rng(next(seeds)), 0, 0),
                   lambda: dinov2_sample(rng, png, side, large, small), '5', 2 * rounds)


def tricks(rounds):
    """What each fast version is worth: a sample of the paper's recipe with it, and with the obvious one."""
    def cut(image, box, size):
        y0, x0, y1, x1 = box
        window = torch.from_numpy(np.ascontiguousarray(image[y0:y1, x0:x1]))[None, None]
        return F.interpolate(window, size, mode='bicubic', antialias=True)[0, 0].numpy()

    def dilation(m, kernel):
        return ndimage.maximum_filter(m, kernel, mode='constant')

    def tissue_pixel(rng, tissue):
        return divmod(int(rng.choice(np.flatnonzero(tissue))), tissue.shape[1])

    def sample():
        slices.sample(np.random.default_rng(0), 0, 0)

    with tempfile.TemporaryDirectory() as folder:
        phantom.dataset(folder, [mammogram(1280, 1024)[None]])
        slices = pretrain.Slices(pretrain.Config(), folder)
        for module, obvious in ((sampler, cut), (mask, dilation), (sampler, tissue_pixel)):
            paired(f'a sample with {module.__name__}.{obvious.__name__}; with the obvious one', sample,
                   mock.patch.object(module, obvious.__name__, obvious)(sample), '1.1', 2 * rounds)


def masks(rounds):
    y, x = np.mgrid[:37, :37]
    grid = np.clip(8 - 8 * np.hypot((y - 18) / 17, x / 21), 0, 1).astype(np.float32)
    ratios, rng, blind_rng = np.linspace(0.1, 0.5, 9), np.random.default_rng(0), random.Random(0)
    paired(f'patch masks, nine of 37x37, tissue {grid.mean():.2f}; DINOv2 blind',
           lambda: [sampler.patch_mask(rng, grid, round(q * 1369), 0.3) for q in ratios],
           lambda: [blind_mask(blind_rng, round(q * 1369)) for q in ratios], '1', 5 * rounds)


def ibot(rounds, M=2048, K=65_536):
    torch.manual_seed(0)
    student, teacher, prototypes = (F.normalize(torch.randn(n, 256)).requires_grad_() for n in (M, M, K))
    center, weight = losses.Center(K), torch.full((M,), 1 / 256)

    @torch.no_grad()
    def targets(rows=slice(None)):
        return center(teacher[rows] @ prototypes.T, 0.04)

    paired(f'iBOT loss and last layer, {M} tokens, K = {K}; full logits',
           lambda: losses.chunked_patch_loss(student, prototypes, targets, weight, images=8).backward(),
           lambda: losses.patch_loss(student @ prototypes.T, targets(), weight, images=8).backward(),
           '0.8', min(rounds, 5), CORES)


def drop_path(rounds, B=16, side=98):
    model = vit.ViT(**vit.SIZES['base'], drop_path=0.3).train()

    def zeros(x, branch, drop):
        kept = (torch.rand(len(x), 1, 1) >= drop) / (1 - drop)
        return x + branch(x) * kept

    def subset():
        model(torch.rand(B, 1, side, side))[0].sum().backward()

    paired(f'stochastic depth .3, ViT-B, {B} x {side}; zeros per image', subset,
           mock.patch.object(vit, 'residual', zeros)(subset), '1.35', min(rounds, 5), CORES)


def flops(cfg):
    """FLOPs of an image and its slice pair in a step: three forwards for the student, one for the teacher."""
    def forward(side):
        N, D = (side // cfg.patch) ** 2, cfg.width
        return cfg.depth * (24 * (N + 1) * D ** 2 + 4 * (N + 1) ** 2 * D) + 2 * N * cfg.patch ** 2 * D

    head = 2 * (cfg.width * cfg.hidden + cfg.hidden ** 2 + cfg.bottleneck * (cfg.hidden + cfg.prototypes))
    masked = cfg.mask_prob * sum(cfg.mask_ratio) * (cfg.size // cfg.patch) ** 2     # of two global crops
    teacher = 3 * (forward(cfg.size) + head) + masked * head
    return 3 * (cfg.locals * (forward(cfg.local_size) + head) + teacher) + teacher


def step(_):
    """The paper's recipe with a slice pair for every image. No block is dropped, as in the count of FLOPs."""
    if not torch.cuda.is_available():
        return row('whole step, ViT-B/14 at 518, bf16', 'not run: no GPU here | |', '45 % MFU')
    name, per_image = torch.cuda.get_device_name(), flops(pretrain.Config())
    peaks = {'H200': 790, 'H100': 790, 'L40S': 362, 'A100': 280}    # TFLOP/s in practice; L40S by its sheet
    limit = next((peak for key, peak in peaks.items() if key in name), None)
    print(f'{name}, {limit} TFLOP/s, {per_image / 1e12:.2f} TFLOP per image with its pair')
    with tempfile.TemporaryDirectory() as folder:
        phantom.dataset(folder, (np.stack([mammogram(1280, 1024)] * 2) for _ in range(32)))
        for micro, flag in itertools.product((4, 16, 32), ('--no-compile', '--compile')):
            rate, memory = trained(folder, f'{folder}/run{micro}{flag}', micro, flag)
            cells = f'{memory} | |'
            if rate:
                mfu = f'{rate * per_image / limit / 1e12:.1%} of {limit} TFLOP/s' if limit else ''
                hours = 300_000 * 128 / rate / 3600
                cells = f'{rate:.1f} images/s, {memory:.1f} GiB | {mfu} | {hours:.0f} h for 300,000 steps'
            row(f'micro-batch {micro} {flag}', cells, '45 % MFU')


def trained(folder, out, micro, flag):
    """A short run of pretrain.py -> images/s of its last steps, and GiB; or None, and its last words."""
    flags = (f'{flag} --batch {micro} --micro_batch {micro} --steps 60 --warmup 10 --freeze_last_layer 0 '
             f'--teacher_temp_steps 0 --log_every 20 --drop_path 0 --workers {max(1, CORES - 2)}')
    command = [sys.executable, ROOT / 'pretrain.py', '--data', folder, '--out', out, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ['?'])[-1][:80]
    *_, before, last = (json.loads(line) for line in Path(out, 'log.jsonl').read_text().splitlines())
    return micro * (last['step'] - before['step']) / (last['time'] - before['time']), last['gpu_memory']


def fits(_):
    """What autograd keeps per image in bf16, without stochastic depth, and the micro-batches that fit."""
    cfg, sizes = pretrain.Config(drop_path=0.0), []
    student, teacher = pretrain.networks(cfg, torch.device('cpu'))
    wrapped = torch.nn.DataParallel(student)                # it has a .module, as DDP has
    center = {kind: losses.Center(cfg.prototypes) for kind in ('cls', 'patch')}
    for B in (1, 2):
        masks = torch.zeros(2, B, 1369, dtype=torch.bool)
        masks[0, :, :411] = True                            # 30 % of one global crop
        batch = dict(globals=torch.zeros(2, B, 518, 518), locals=torch.zeros(8, B, 196, 196), masks=masks,
                     pair=torch.zeros(B, 2, 518, 518), file=torch.arange(B))
        kept = {p.untyped_storage().data_ptr(): 0 for p in student.parameters()}

        def keep(tensor):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast('cpu', torch.bfloat16), hooks:
            terms = pretrain.student_losses(cfg, wrapped, teacher, center, batch, 0.07, B)
        sizes.append(sum(kept.values()) / 2 ** 30)
        del terms                                           # and with them what was kept
    each, parameters = sizes[1] - sizes[0], sum(p.nbytes for p in student.parameters()) / 2 ** 30
    fixed = sizes[0] - each + 5 * parameters                # gradients, AdamW's two and the teacher too
    cards = ', '.join(f'{int((card * 0.95 - fixed) / each)} in {card} GiB' for card in (24, 48, 80, 141))
    row('kept per image, and the same for all', f'{each:.2f} GiB | {fixed:.2f} GiB | images at once: {cards}')


if __name__ == '__main__':
    rows = [run.__name__ for run in (views, tricks, masks, ibot, drop_path, fits, step)]
    parser = argparse.ArgumentParser()
    parser.add_argument('row', nargs='?', choices=rows, help='default: all')
    parser.add_argument('--rounds', type=int, default=11, help='paired rounds of a quick row (%(default)s)')
    args = parser.parse_args()
    print(f'{CORES} cores, torch {torch.__version__}, numpy {np.__version__}, pillow {Image.__version__}')
    print('| what; against | ours | theirs | ratio [range] | goal |\n|---|---|---|---|---|', flush=True)
    # A process for each row, so that none inherits memory; with these settings, page faults are not measured.
    env = os.environ | dict(MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_='-1', OPENBLAS_NUM_THREADS='1',
                            OMP_NUM_THREADS=str(CORES))
    for name in [args.row] if args.row else rows:
        command = [sys.executable, '-c', f'import bench; bench.{name}({args.rounds})']
        if subprocess.run(command, cwd=ROOT / 'tests', env=env).returncode:
            row(name, 'failed, see above | |')
