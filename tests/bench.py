"""How fast and how lean: every claim of the README as one row, ours against the textbook. Not a test.

    $ python tests/bench.py                     # all rows, six minutes on two cores
    $ python tests/bench.py views masks         # some of them; --help lists the names
    $ python tests/bench.py step scale          # whole training steps: on the GPU if there is one

A row is the median of paired rounds in one process: ours, theirs, theirs, ours, ... ; the ratio is taken round by
round. Rows of the data path run on one thread and count the process's own time, the others all threads and the wall
clock. The textbook stands beside each row, written as its project or its paper does it; where that project can be
imported (OpenCV, scikit-image), it is used or compared with as well. Times are worth +-30 %, ratios much less.
"""
import argparse
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
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
import images  # noqa: E402
import mask  # noqa: E402
import phantom  # noqa: E402
from prepare import _prepare_one  # noqa: E402
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


def memory(ours, theirs, goal):
    """Prints a row of the MiB that two expressions need, each in a process of its own: what a process has freed and
    keeps would hide it."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')} | dict(PYTHONPATH=f'{ROOT}/tests')
    start = 'from bench import decoded, ibot_sides, mask, weigh; '
    a, b = (float(subprocess.run([sys.executable, '-c', f'{start}weigh({run})'], env=plain, check=True,
                                 capture_output=True, text=True).stdout) for run in (ours, theirs))
    row('the same, memory', f'{a:.0f} MiB | {b:.0f} MiB | {b / max(a, 1):.1f}', goal)


def weigh(run):
    """Prints by how many MiB `run()` raises the memory of this process while it runs (Linux)."""
    before, highest, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            highest[0] = max(highest[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = run()
    highest[0] = max(highest[0], resident())
    done.set()
    watcher.join()
    print(highest[0] - before)
    del result


def resident():
    return int((Path('/') / 'proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2 ** 20


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
        for (H, W), goal in zip(SIZES, ('6.5', '8, stretch 10')):
            np.save(f'{folder}/image.npy', mammogram(H, W))
            Image.fromarray(np.load(f'{folder}/image.npy')).save(f'{folder}/image.png')
            for side, scales in ((98, ((0.32, 1.0), (0.05, 0.32))), (196, ((0.5, 1.0), (0.2, 0.5)))):
                cfg = pretrain.Config(global_scale=scales[0], local_scale=scales[1], local_size=side, mask_prob=1.0)
                slices, textbook = pretrain.Slices(cfg, [f'{folder}/image.npy'], [1]), Dinov2(side, scales)
                seeds = iter(range(10 ** 6))
                paired(f'{W}x{H}: tissue, 2 x 518 + 8 x {side}, masks, from .npy; DINOv2 by Pillow, from PNG',
                       lambda: slices.sample(np.random.default_rng(next(seeds)), 0, 0),
                       lambda: textbook(f'{folder}/image.png'), goal, 2 * ROUNDS)
        worst, image, rng = 0, np.load(f'{folder}/image.npy'), np.random.default_rng(0)
        for side, scale in ((518, (0.32, 1.0)), (196, (0.2, 0.5)), (98, (0.05, 0.32))):
            for _ in range(10):
                box, _ = sampler.crop_box(rng, image > 0, scale, (3 / 4, 4 / 3), 0.3)
                y0, x0, y1, x1 = box
                exact = Image.fromarray(image[y0:y1, x0:x1]).resize((side, side), Image.Resampling.BICUBIC)
                worst = max(worst, np.abs(sampler.cut(image, box, (side, side)).astype(int) - np.asarray(exact)).max())
        row('cut, against exact bicubic interpolation, worst of 30 windows', f'{worst} grey levels | |', 'at most 4')


def table():
    """Brightness, contrast and solarization as one table and normalisation of one channel, against one operation after
    the other on three channels, hue and saturation included, which do nothing to greys."""
    grey = sampler.cut(mammogram(1280, 1024), (0, 0, 1000, 900), (518, 518)).copy()
    colour = Image.fromarray(grey).convert('RGB')

    def ours():
        rng = np.random.default_rng(5)
        table = sampler.solarize(sampler.jitter_table(rng, sampler.histogram(grey), 0.4, 0.4))
        return sampler.look_up(table, grey).copy()

    def theirs():
        rng, factors = np.random.default_rng(5), {}
        order = rng.permutation(2)
        for operation in order:
            factors[operation] = rng.uniform(0.6, 1.4)
        return ImageOps.solarize(colour_jitter(colour, [2, *order, 3], factors[0], factors[1], 1.1, 0.05), 128)

    differ = np.count_nonzero(ours()[..., None] != np.asarray(theirs()))
    paired(f'photometry of 518 x 518 as one table, {differ} pixels differ; one by one on RGB',
           lambda: torch.from_numpy(ours()).float() / 255, lambda: normalised(theirs()), '8, 0 pixels', 3 * ROUNDS)


def pixels():
    """Preprocessing of one full-size film."""
    image = mammogram(*SIZES[1])
    rough = image + np.random.default_rng(0).normal(0, 30, image.shape) > 60
    nine = np.ones((9, 9), bool)
    try:
        import cv2
        theirs = cv2.morphologyEx(np.uint8(rough), cv2.MORPH_CLOSE, np.uint8(nine))
        theirs = cv2.morphologyEx(theirs, cv2.MORPH_OPEN, np.uint8(nine)) > 0
        row('closing and opening, against OpenCV',
            f"{np.count_nonzero(mask.opening(mask.closing(rough, 9), 9) != theirs)} pixels differ | |", '0')
        levels = np.abs(images.clahe(image).astype(int) - cv2.createCLAHE(2.0, (8, 8)).apply(image)).max()
        row('CLAHE, against OpenCV', f'{levels} grey levels | |', 'at most 1')
    except ImportError:
        row('closing, opening and CLAHE, against OpenCV', 'not run: it is not installed | |', '0, at most 1')
    paired('9x9 closing and opening, 2560x3328; scipy.ndimage', lambda: mask.opening(mask.closing(rough, 9), 9),
           lambda: ndimage.binary_opening(ndimage.binary_closing(rough, nine), nine), '30', 3)
    equal = all(mask._percentile(mask._histogram(image), q) == np.percentile(image, q) for q in range(0, 101, 5))
    paired(f"percentile of 8 bits, {'equal' if equal else 'UNEQUAL'}; numpy.percentile",
           lambda: mask._percentile(mask._histogram(image), 40), lambda: np.percentile(image, 40), '4, equal')
    try:
        from skimage.exposure import equalize_adapthist
        paired('CLAHE 8x8, 2560x3328; scikit-image', lambda: images.clahe(image),
               lambda: equalize_adapthist(image, (416, 320), 0.01), '8', 5)
    except ImportError:
        row('CLAHE 8x8, 2560x3328; scikit-image', 'not run: it is not installed | |', '8')
    deep = np.uint16(image) * 16 + np.random.default_rng(0).integers(0, 16, image.shape).astype(np.uint16)
    paired('16 bits to 8, 2560x3328; float64 arithmetic', lambda: images.to_uint8(deep),
           lambda: np.uint8(np.rint((deep - float(deep.min())) * (255 / float(np.ptp(deep))))), '')


def masks():
    """The tissue-aware patch mask on 37 x 37, mean over ratios .1 to .5, against DINOv2's blind one."""
    y, x = np.mgrid[:37, :37]
    grid = np.clip(8 - 8 * np.hypot((y - 18) / 17, x / 21), 0, 1).astype(np.float32)
    ratios, rng, textbook = np.linspace(0.1, 0.5, 9), np.random.default_rng(0), random.Random(0)
    paired(f'patch masks, nine of 37x37, tissue {grid.mean():.2f}; DINOv2 blind',
           lambda: [sampler.patch_mask(rng, grid, round(q * 1369), 0.3) for q in ratios],
           lambda: [blind_mask(textbook, round(q * 1369)) for q in ratios], '4 (0.48 ms a mask)', 5 * ROUNDS)


def volume():
    """One frame of a tomosynthesis volume, 70 frames of lossless JPEG 2000, against decoding all."""
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/volume.dcm'
        jpeg2000(path, phantom.breast(np.random.default_rng(0), slices=70, height=640, width=512).volume)
        paired('one of 70 JPEG 2000 frames of 512x640; the volume', lambda: images.read(path, 35),
               lambda: decoded(path), 'one frame', 3)
        memory(f'lambda: images.read({path!r}, 35)', f'lambda: decoded({path!r})', 'one frame')


def decoded(path):
    from pydicom.pixels import pixel_array
    return pixel_array(path)


def jpeg2000(path, frames):
    """A DICOM file (K, H, W) in lossless JPEG 2000."""
    import io

    import pydicom
    from pydicom.encaps import encapsulate
    streams = []
    for frame in frames:
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, 'JPEG2000', no_jp2=True)
        streams.append(stream.getvalue())
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    ds.SOPClassUID, ds.SOPInstanceUID = pydicom.uid.BreastTomosynthesisImageStorage, pydicom.uid.generate_uid()
    ds.Rows, ds.Columns, ds.NumberOfFrames = *frames.shape[1:], len(frames)
    ds.BitsAllocated = ds.BitsStored = 8 * frames.itemsize
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel = ds.BitsStored - 1, 0, 1
    ds.PhotometricInterpretation = 'MONOCHROME2'
    ds.PixelData = encapsulate(streams)
    ds['PixelData'].is_undefined_length = True
    ds.save_as(path, enforce_file_format=True)


def prepare():
    """`prepare.py` of one 2560x3328 film in lossless JPEG 2000: how much of it is decoding."""
    with tempfile.TemporaryDirectory() as folder:
        image = np.uint16(mammogram(*SIZES[1])) * 16
        image += np.random.default_rng(0).integers(0, 16, image.shape).astype(np.uint16)
        jpeg2000(f'{folder}/film.dcm', image[None])

        def whole():
            assert _prepare_one(f'{folder}/film.dcm', Path(folder) / 'film.npy', 1024) is None

        paired('of a JPEG 2000 film of 2560x3328, decoding alone; all of `prepare`',
               lambda: decoded(f'{folder}/film.dcm'), whole, 'under 1.07', 5)


# ---- losses, network, optimizer -----------------------------------------------------------------------------------

def ibot():
    """The iBOT loss through the last layer, 256 rows at a time, against autograd on all logits."""
    ours, theirs = ibot_sides()
    for a, b in zip(ours(), theirs()):
        assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-3, atol=1e-6)
    paired('iBOT loss and last layer, 2048 tokens, K = 65536; full logits', ours, theirs, '0.8', 5, CORES)
    memory('ibot_sides()[0]', 'ibot_sides()[1]', '7')


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


def optimizer():
    """AdamW and the teacher's average, 86 M parameters, against for-each AdamW and multiply-add."""
    student, teacher = (vit.ViT(**vit.SIZES['base']) for _ in range(2))
    teacher.requires_grad_(False)
    for parameter in student.parameters():
        parameter.grad = torch.randn_like(parameter)
    adam = {kind: torch.optim.AdamW(vit.param_groups(student, 1e-5, 0.04), **{kind: True})
            for kind in ('fused', 'foreach')}

    @torch.no_grad()
    def ours():
        adam['fused'].step()
        for t, s in zip(teacher.parameters(), student.parameters()):
            t.lerp_(s, 0.004)

    @torch.no_grad()
    def theirs():
        adam['foreach'].step()
        for t, s in zip(teacher.parameters(), student.parameters()):
            t.mul_(0.996).add_(s, alpha=0.004)

    paired('AdamW and EMA, 86 M parameters; for-each AdamW, multiply-add', ours, theirs, '3', None, CORES)


class PlainViT(nn.Module):
    """The textbook: a convolution for patches, nn modules for the rest, the names of the official file."""

    def __init__(self, model):
        super().__init__()
        D, n = model.config['width'], model.config['heads']
        self.model, self.n, self.conv = model, n, nn.Conv2d(1, D, 14, 14)
        self.conv.load_state_dict(model.patch_embed.proj.state_dict())

    def forward(self, x):
        h, w = x.shape[-2] // 14, x.shape[-1] // 14
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.model.cls_token.expand(len(x), -1, -1), x], 1) + self.model.positions(h, w)
        for block in self.model.blocks:
            B, T, D = x.shape
            qkv = block.attn.qkv(block.norm1(x)).reshape(B, T, 3, self.n, D // self.n)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
            x = x + block.attn.proj(y) * block.ls1.gamma
            y = block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
            x = x + y * block.ls2.gamma
        x = self.model.norm(x)
        return x[:, 0], x[:, 1:]


def network():
    """ViT-B forward and backward against the plain module of the same weights."""
    model = vit.ViT(**vit.SIZES['base'], layerscale=1.0)
    plain = PlainViT(model)
    for side, B, amp, rounds in ((98, 16, False, 7), (518, 1, True, 3)):
        images = torch.rand(B, 1, side, side)

        def step(network):
            with torch.autocast('cpu', torch.bfloat16, enabled=amp):
                cls, patches = network(images)
            (cls.float().sum() + patches.float().sum()).backward()

        with torch.no_grad():
            gap = (model(images)[1] - plain(images)[1]).abs().max().item()
        paired(f"ViT-B {B} x {side}, {'bf16' if amp else 'fp32'}, outputs differ by {gap:.0e}; plain module",
               lambda: step(model), lambda: step(plain), '0.97', rounds, CORES)


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
    """One short run of pretrain.py -> images/s, GiB and the share of waiting for data at its last line."""
    done = subprocess.run([sys.executable, str(ROOT / 'pretrain.py'), '--data', folder, '--out', out, *map(str, flags)],
                          capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS=str(CORES)))
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ['?'])[-1], None
    last = [json.loads(line) for line in (Path(out) / 'log.jsonl').read_text().splitlines()][-1]
    return last['images_per_s'], last['peak_memory'], re.findall(r'data_wait=([\d.]+%)', done.stderr)[-1]


def breasts(folder, n, slices, height, width):
    for i in range(n):
        volume = phantom.breast(np.random.default_rng(i), slices=slices, height=height // 4, width=width // 4).volume
        np.save(f'{folder}/{i}.npy', np.stack([
            np.asarray(Image.fromarray(s).resize((width, height), Image.Resampling.BICUBIC)) for s in volume]))


def step():
    """The paper's recipe, ViT-B/14 at 518 in bf16, a slice pair with every image, no stochastic depth so that all
    FLOPs of the count are done: micro-batches that fit, and their share of the practical peak."""
    if not torch.cuda.is_available():
        row('whole step, ViT-B/14 at 518, bf16', 'not run: no GPU here | |', '45 % MFU, data wait under 2 %')
        return
    name = torch.cuda.get_device_name()
    limit = next((peak for key, peak in PEAK.items() if key in name), None)
    per_image = flops(pretrain.Config())
    print(f'{name}, {limit} TFLOP/s, {per_image / 1e12:.2f} TFLOP per image with its pair')
    with tempfile.TemporaryDirectory() as folder:
        breasts(folder, 64, 2, 1280, 1024)
        for micro in (1, 2, 4, 8, 16, 32, 64):
            rate, memory, wait = trained(folder, f'{folder}/run{micro}', '--batch', micro, '--micro_batch', micro,
                                         '--steps', 60, '--log_every', 20, '--drop_path', 0, '--workers',
                                         max(1, CORES - 2))
            if rate is None:
                row(f'micro-batch {micro}', f'{memory[:80]} | |')
                break
            mfu = f'{rate * per_image / limit / 1e12:.1%} of {limit} TFLOP/s' if limit else ''
            hours = 300_000 * 128 / rate / 3600
            row(f'micro-batch {micro}', f'{rate:.1f} images/s, {memory:.1f} GiB | {mfu}, data wait {wait} | '
                                        f'{hours:.0f} h for 300,000 steps', '45 % MFU, under 2 %')


def fits():
    """What autograd keeps per image of the paper's recipe in bf16 without stochastic depth, counted tensor by tensor,
    and the micro-batches that would fit by that arithmetic."""
    cfg, sizes = pretrain.Config(drop_path=0.0), []
    student, teacher = pretrain.networks(cfg, torch.device('cpu'))
    center = {kind: losses.Center(cfg.prototypes) for kind in ('cls', 'patch')}
    fixed = sum(p.nbytes for p in student.parameters()) * 5                             # gradients, AdamW, teacher
    for B in (1, 2):
        images, masks = torch.zeros(2, B, 518, 518, dtype=torch.uint8), torch.zeros(2, B, 1369, dtype=torch.bool)
        masks[0, :, :411] = True
        batch = dict(globals=images, masks=masks, file=torch.arange(B),
                     locals=torch.zeros(8, B, 196, 196, dtype=torch.uint8),
                     pair=torch.zeros(B, 2, 518, 518, dtype=torch.uint8))
        kept = {p.untyped_storage().data_ptr(): 0 for p in student.parameters()}

        def keep(tensor):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast('cpu', torch.bfloat16), hooks:
            terms, _ = pretrain.learn(cfg, nn.DataParallel(student), teacher, center, batch, 0.07, B, images.device)
        sizes.append(sum(kept.values()))
        del terms
    each, fixed = (sizes[1] - sizes[0]) / 2 ** 30, (fixed + 2 * sizes[0] - sizes[1]) / 2 ** 30
    cards = ', '.join(f'{int((card * 0.95 - fixed) / each)} in {card}' for card in (24, 48, 80, 141))
    row('kept per image, and the same for all', f'{each:.2f} GiB | {fixed:.2f} GiB | images at once: {cards} GiB', '')


def scale():
    """Time and memory of a step at 1, 2, 4 times the images and the tokens, a small network."""
    small = ('--width', 192, '--depth', 6, '--heads', 3, '--prototypes', 4096, '--hidden', 512, '--locals', 2,
             '--local_size', 56, '--steps', 6, '--log_every', 3, '--workers', 1)
    with tempfile.TemporaryDirectory() as folder:
        breasts(folder, 8, 2, 512, 448)
        for batch, size in ((8, 112), (16, 112), (32, 112), (8, 154), (8, 224)):
            rate, memory, _ = trained(folder, f'{folder}/{batch}-{size}', *small, '--batch', batch, '--micro_batch',
                                      batch, '--size', size)
            if rate is None:
                raise SystemExit(memory)
            row(f'step of {batch} images, {(size // 14) ** 2} patches', f'{batch / rate:.2f} s | {memory:.2f} GiB |',
                'linear in images')


def million():
    """Indexing a million files: a synthetic listing, then headers of real files."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(20_000):
            np.save(f'{folder}/{i:06d}.npy', np.zeros((8, 8), np.uint8))
        start = time.perf_counter()
        paths = images.listing(folder)
        listed = time.perf_counter() - start
        start = time.perf_counter()
        for path in paths:
            images.frames(path)
        row('a million files, from 20,000: listing and headers on one core',
            f'{50 * listed:.0f} s and {50 * (time.perf_counter() - start):.0f} s | |')

        images.listing = lambda root: [f'{root}/patient_{i // 8:06d}/view_{i % 8}.npy' for i in range(10 ** 6)]
        images.frames, pretrain.modified = lambda path: 1, lambda path: 0
        for times in ('first', 'second'):
            start = time.perf_counter()
            pretrain.headers(pretrain.Config(out=folder), '.')
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
            row(f'index of 1,000,000 synthetic entries, {times} start',
                f'{time.perf_counter() - start:.1f} s | {memory:.2f} GiB |', 'a minute, 1 GB')


def workers():
    """Samples of a data worker with the other cores busy: nothing in it may wait for a second thread."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(f'{folder}/image.npy', mammogram(*SIZES[0]))
        slices = pretrain.Slices(pretrain.Config(), [f'{folder}/image.npy'], [1])
        for busy in (0, CORES - 1):
            hogs = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(busy)]
            loader = torch.utils.data.DataLoader(slices, sampler=range(120), batch_size=None, num_workers=1)
            stream, start = iter(loader), None
            for i, _ in enumerate(stream):
                start = time.perf_counter() if i == 20 else start
            rate = 99 / (time.perf_counter() - start)
            for hog in hogs:
                hog.kill()
            row(f'one data worker, {busy} other cores busy', f'{rate:.0f} images/s | |', 'the same')


ROWS = (views, table, pixels, masks, volume, prepare, workers, million, ibot, drop_path, optimizer, network, fits,
        scale, step)


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
