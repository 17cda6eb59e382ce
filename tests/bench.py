"""How fast and how lean: every claim of tests/results/README.md as one row. Not a test.

    $ python tests/bench.py                     # all rows, two minutes on two cores
    $ python tests/bench.py step                # one of them: whole training steps, on a GPU

A row is the median of rounds; where it says what it is set against, ours and the textbook take turns, and the
ratio is taken round by round. Rows of the data path run on one thread and count the process's own time, the
others use all threads and the wall clock. Times are worth +-30 %.
"""
import argparse
import ctypes
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import losses  # noqa: E402
import mask  # noqa: E402
import phantom  # noqa: E402
import pretrain  # noqa: E402
import sampler  # noqa: E402


def paired(name, ours, theirs, rounds, threads=1):
    """Prints one row: median times, and the median of the ratios theirs / ours with their range."""
    a, b = times((ours, theirs), rounds, threads)
    row(name, f'{np.median(a):.3g} ms | {np.median(b):.3g} ms | '
              f'{np.median(b / a):.2f} [{(b / a).min():.2f}-{(b / a).max():.2f}]')


def timed(name, ours, rounds):
    """Prints one row of ours alone: median time and range."""
    a, = times((ours,), rounds, threads=1)
    row(name, f'{np.median(a):.3g} ms [{a.min():.3g}-{a.max():.3g}] | |')


def times(runs, rounds, threads):
    """Milliseconds (runs, rounds); in every other round the runs take turns the other way round."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    found = np.zeros((len(runs), rounds))
    for i in range(-1, rounds):                             # round -1 warms up, the last replaces its times
        for side, run in list(enumerate(runs))[::1 if i % 2 else -1]:
            start = clock()
            run()
            found[side, i] = 1e3 * (clock() - start)
    return found


def row(name, cells):
    print(f'| {name} | {cells} |', flush=True)


def mammogram(H, W):
    """A phantom at the size of a real file, with the noise of one."""
    small = phantom.breast(np.random.default_rng(3), height=H // 4, width=W // 4).volume[0]
    image = np.asarray(Image.fromarray(small).resize((W, H), Image.Resampling.BICUBIC)).astype(np.float32)
    image += np.random.default_rng(0).normal(0, 2, image.shape) * (image > 3)
    return np.uint8(image.clip(0, 255))


# ---- the rows ------------------------------------------------------------------------------------------

def views(rounds):
    """From a prepared file to tissue, views and masks."""
    crops = (98, (0.32, 1.0), (0.05, 0.32)), (196, (0.5, 1.0), (0.2, 0.5))
    with tempfile.TemporaryDirectory() as folder:
        for (H, W), (side, large, small) in itertools.product(((1280, 1024), (3328, 2560)), crops):
            phantom.dataset(folder, [mammogram(H, W)[None]])
            cfg = pretrain.Config(local_size=side, global_scale=large, local_scale=small, mask_prob=1.0)
            slices, seeds = pretrain.Slices(cfg, folder), itertools.count()
            timed(f'{W}x{H}: tissue, 2 x 518 + 8 x {side}, masks, from .npy',
                  lambda: slices.sample(np.random.default_rng(next(seeds)), 0, 0), 2 * rounds)


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
                   mock.patch.object(module, obvious.__name__, obvious)(sample), 2 * rounds)


def masks(rounds):
    y, x = np.mgrid[:37, :37]
    grid = np.clip(8 - 8 * np.hypot((y - 18) / 17, x / 21), 0, 1).astype(np.float32)
    ratios, rng = np.linspace(0.1, 0.5, 9), np.random.default_rng(0)
    timed(f'patch masks, nine of 37x37, tissue {grid.mean():.2f}',
          lambda: [sampler.patch_mask(rng, grid, round(q * 1369), 0.3) for q in ratios], 5 * rounds)


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
           min(rounds, 5), os.cpu_count())


def step(_):
    """The paper's recipe with a slice pair for every image. No block is dropped, as in the count of FLOPs."""
    each = flops(pretrain.Config())
    row('an image with its pair', f'{each / 1e12:.2f} TFLOP | |')
    if not torch.cuda.is_available():
        return row('whole step, ViT-B/14 at 518, bf16', 'not run: no GPU here | |')
    with tempfile.TemporaryDirectory() as folder:
        phantom.dataset(folder, (np.stack([mammogram(1280, 1024)] * 2) for _ in range(32)))
        for micro, flag in itertools.product((4, 16, 32), ('--no-compile', '--compile')):
            flags = (f'{flag} --batch {micro} --micro_batch {micro} --steps 60 --warmup 10 --freeze_last_layer 0 '
                     f'--teacher_temp_steps 0 --log_every 20 --drop_path 0 --workers {max(1, os.cpu_count() - 2)}')
            out = f'{folder}/run{micro}{flag}'
            done = subprocess.run([sys.executable, ROOT / 'pretrain.py', '--data', folder, '--out', out,
                                   *flags.split()], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            cells = f'{done.stderr.strip()[-80:]} | |'      # why it ended
            if done.returncode == 0:
                *_, before, last = map(json.loads, Path(out, 'log.jsonl').read_text().splitlines())
                rate = micro * (last['step'] - before['step']) / (last['time'] - before['time'])
                cells = f'{rate:.1f} images/s, {last["gpu_memory"]:.1f} GiB | {rate * each / 1e12:.0f} TFLOP/s | ' \
                        f'{300_000 * 128 / rate / 3600:.0f} h for 300,000 steps'
            row(f'{torch.cuda.get_device_name()}, micro-batch {micro} {flag}', cells)


def flops(cfg):
    """FLOPs of an image and its slice pair in a step: three forwards for the student, one for the teacher."""
    def forward(side):
        N, D = (side // cfg.patch) ** 2, cfg.width
        return cfg.depth * (24 * (N + 1) * D ** 2 + 4 * (N + 1) ** 2 * D) + 2 * N * cfg.patch ** 2 * D

    head = 2 * (cfg.width * cfg.hidden + cfg.hidden ** 2 + cfg.bottleneck * (cfg.hidden + cfg.prototypes))
    masked = cfg.mask_prob * sum(cfg.mask_ratio) * (cfg.size // cfg.patch) ** 2     # of two global crops
    teacher = 3 * (forward(cfg.size) + head) + masked * head
    return 3 * (cfg.locals * (forward(cfg.local_size) + head) + teacher) + teacher


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
    rows = {run.__name__: run for run in (views, tricks, masks, ibot, fits, step)}
    parser = argparse.ArgumentParser()
    parser.add_argument('row', nargs='?', choices=rows, help='default: all')
    parser.add_argument('--rounds', type=int, default=11, help='paired rounds of a quick row (%(default)s)')
    args = parser.parse_args()
    for parameter, value in ((-4, 0), (-1, -1)):            # M_MMAP_MAX, M_TRIM_THRESHOLD of glibc: memory that is
        ctypes.CDLL(None).mallopt(parameter, value)         # freed is kept, so that page faults are not measured
    print(f'{os.cpu_count()} cores, torch {torch.__version__}, numpy {np.__version__}, pillow {Image.__version__}')
    print('| what; against | ours | theirs | ratio [range] |\n|---|---|---|---|', flush=True)
    for name in [args.row] if args.row else rows:
        rows[name](args.rounds)
