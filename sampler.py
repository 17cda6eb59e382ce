"""Breast-tissue-aware sampling: views for DINO-M, patch masks for iBOT-M, slice pairs for DINO-adj
(MammoDINO, arXiv 2510.11883, 2.2, 2.3, 2.4).

An 8-bit mammogram (H, W) and its tissue mask become two global and n local crops that lie on tissue, each with
photometric augmentation, and the share of tissue under every patch of the global crops, from which patch masks are
drawn. Two neighbouring slices of a volume become one pair of crops of the same window. With an all-true mask this is
DINOv2's own sampling, the baseline of the ablation.

Boxes are `(y0, x0, y1, x1)`, whole pixels, end exclusive. `rng` is a numpy Generator; the same state gives the same
sample. H W pixels, S s sides of global and local crops, h w patch grid, N = h * w patches, K slices.

Copy this file alone; it imports nothing of this repository.

    $ python sampler.py [FILE] [OUT.png]      # contact sheet: tissue-aware beside uniform, with the tissue shares
"""
import functools
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage

TRIES = 50                                  # at the full minimum coverage, then as many while it falls to 0


# ---- crops (2.2) --------------------------------------------------------------------------------------------------

def coverage(tissue, box):
    """r(C) = |C|^-1 sum of M over the window C: the share of its pixels that are tissue."""
    y0, x0, y1, x1 = box
    return np.count_nonzero(tissue[y0:y1, x0:x1]) / ((y1 - y0) * (x1 - x0))


def crop_box(rng, tissue, scale, ratio, rho):
    """A window placed around a random tissue pixel with r(C) > rho -> (box, relaxed).

    scale: range of the window's share of the image area; ratio: range of width / height, drawn log-uniformly.
    Each try draws area, ratio and pixel anew. After 50 tries rho falls linearly to 0 over 50 more, and whatever passes
    then counts as `relaxed`. Without any tissue the crop is uniform and counts as relaxed.

    The pixel keeps its relative place: at a third of the image's height it lies at a third of the window's. So the
    window holds the pixel and stays inside the image, and if all is tissue its place is uniform, as in DINOv2.
    The paper does not say what happens where no window passes; the falling rho is ours.
    """
    H, W = tissue.shape
    for attempt in range(2 * TRIES):
        h, w = _shape(rng, H, W, scale, ratio)
        pixel = _tissue_pixel(rng, tissue)
        barren = pixel is None
        y, x = (rng.integers(H), rng.integers(W)) if barren else pixel
        y0, x0 = int((y + rng.random()) * (H - h + 1) / H), int((x + rng.random()) * (W - w + 1) / W)
        box = y0, x0, y0 + h, x0 + w
        floor = rho * min(1.0, 2 - (attempt + 1) / TRIES)                               # rho, rho, ..., 0
        if barren or coverage(tissue, box) > floor:
            return box, barren or attempt >= TRIES
    raise AssertionError('a window around a tissue pixel holds tissue, so the last try passes')


def _shape(rng, H, W, scale, ratio):
    """Height and width of a window, drawn as torchvision's RandomResizedCrop does: ten tries, then the largest window
    whose ratio is allowed."""
    for _ in range(10):
        area = H * W * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= H and 0 < w <= W:
            return h, w
    return min(H, max(1, round(W / ratio[0]))), min(W, max(1, round(H * ratio[1])))


def _tissue_pixel(rng, tissue):
    """A uniform random pixel of the mask: by rejection, which costs nothing unless the breast is tiny. None without."""
    H, W = tissue.shape
    for _ in range(64):
        y, x = int(rng.random() * H), int(rng.random() * W)
        if tissue[y, x]:
            return y, x
    inside = np.flatnonzero(tissue)
    return divmod(int(inside[rng.integers(len(inside))]), W) if len(inside) else None


# ---- photometry: DINOv2's, as one table of 256 greys --------------------------------------------------------------

def jitter_table(rng, histogram, brightness, contrast):
    """Brightness and contrast by factors 1 +- b, 1 +- c in random order, as a table of 256 uint8 greys.

    On a grey image hue and saturation do nothing, so this is all of DINOv2's ColorJitter. Contrast turns about the
    mean of the view, which the histogram (256,) gives.
    """
    table = np.arange(256, dtype=np.float32)
    for operation in rng.permutation(2):
        if operation == 0:
            table = table * rng.uniform(1 - brightness, 1 + brightness)
        else:
            mean = int((histogram * table).sum() / max(histogram.sum(), 1) + 0.5)       # whole, as in Pillow
            table = mean + (table - mean) * rng.uniform(1 - contrast, 1 + contrast)
        table = np.floor(table.clip(0, 255))
    return table.astype(np.uint8)


def histogram(image):
    """How often each grey occurs in a uint8 image, (256,)."""
    return np.array(Image.fromarray(image).histogram())


def look_up(table, image):
    """table[image] of uint8 greys; numpy would make whole numbers of 64 bits of the image first."""
    return np.asarray(Image.fromarray(image).point(table.tolist()))


def solarize(table, threshold=128):
    """Invert the greys at or above the threshold."""
    return np.where(table >= threshold, 255 - table, table)


def blur(image, sigma):
    """Gaussian of 9 taps, mirrored at the border, as torchvision's and DINOv2's."""
    taps = np.exp(-0.5 * (np.arange(5) / sigma) ** 2).astype(np.float32)                # from the middle outwards
    taps /= 2 * taps.sum() - 1                              # the middle one counts once, the others twice
    x = np.pad(image, 4, mode='reflect').astype(np.float32)                             # (H + 8, W + 8)
    for n in image.shape:                                   # one axis, then the other, in two arrays each
        total = x[4:4 + n] * taps[0]
        pair = np.empty_like(total)
        for d in range(1, 5):
            np.add(x[4 - d:4 - d + n], x[4 + d:4 + d + n], out=pair)
            pair *= taps[d]
            total += pair
        x = total.T
    return np.rint(x, out=x).astype(np.uint8)


def cut(image, box, size):
    """Window of a uint8 image, resized to size (h, w) by antialiased bicubic interpolation: Pillow's result to one grey
    level (two if enlarged several times), several times as fast. Beside sharp white edges, where the kernel overshoots
    0..255 and is clipped between the axes, it may differ by ten, since Pillow takes the axes in another order."""
    y0, x0, y1, x1 = box
    window, (h, w) = image[y0:y1, x0:x1], size
    if h > y1 - y0 or w > x1 - x0:                          # enlarged, so it is small: Pillow's order costs nothing
        return _resize_columns(_resize_columns(window.T, w).T, h)
    return np.ascontiguousarray(_resize_columns(_resize_columns(window, h).T, w).T)


def _resize_columns(image, height):
    """uint8 (H, W) -> (height, W), along the columns alone. Four neighbouring columns are handed to torch as four
    channels of one pixel, for which it has a fast way."""
    H, W = image.shape
    four = np.empty((1, H, -(-W // 4), 4), np.uint8)
    four.reshape(H, -1)[:, :W] = image                                                  # the rest is cut off again
    four = torch.from_numpy(four).permute(0, 3, 1, 2)                                   # (1, 4, H, W / 4)
    four = F.interpolate(four, (height, four.shape[3]), mode='bicubic', antialias=True)
    return four.permute(0, 2, 3, 1).reshape(height, -1).numpy()[:, :W]


def tissue_grid(tissue, box, h, w):
    """Share of tissue under each patch of a window, float32 (h, w): the mask averaged over the patch's area. Where a
    patch covers 24 pixels of the image or more, every second row and column is read, from 36 on every third, and so
    on."""
    y0, x0, y1, x1 = box
    step = max(1, min((y1 - y0) // h, (x1 - x0) // w) // 12)
    mask = tissue[y0 + step // 2:y1:step, x0 + step // 2:x1:step].astype(np.uint8) * np.uint8(255)
    return np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.BOX), np.float32) / 255


# ---- the views of one image (2.2) ---------------------------------------------------------------------------------

def views(rng, image, tissue, size=518, local_size=196, locals=8, patch=14, scale=(0.5, 1.0), local_scale=(0.2, 0.5),
          ratio=(3 / 4, 4 / 3), rho=0.3, jitter=0.8, brightness=0.4, contrast=0.4, blurs=(1.0, 0.1, 0.5),
          sigma=(0.1, 2.0), solarizes=0.2, flip=0.5, placement=None):
    """Tissue-aware crops of one mammogram, T(x) of the paper, as a dict:

        globals (2, size, size) and locals (locals, local_size, local_size), uint8
        grids   (2, h, w) float32, tissue share of each patch of the globals
        boxes   (2 + locals, 4) int and relaxed (2 + locals,) bool, globals first

    jitter, blurs (first global, second global, locals), solarizes (second global only) and flip are probabilities.
    `placement` is the mask that places the windows, `tissue` by default; all true gives DINOv2's uniform windows.
    Raises ValueError for an image that is not uint8, and for masks of another shape.
    Blur comes last so that the photometry is one table; DINOv2 solarizes after it.
    """
    placement = tissue if placement is None else placement
    if image.dtype != np.uint8 or not image.shape == tissue.shape == placement.shape:
        raise ValueError(f'an image of shape {image.shape} and type {image.dtype}, tissue {tissue.shape}; '
                         'expected uint8 and masks of its shape')
    out = dict(globals=[], locals=[], grids=[], boxes=[], relaxed=[])
    for v in range(2 + locals):
        kind, side, area = ('globals', size, scale) if v < 2 else ('locals', local_size, local_scale)
        box, relaxed = crop_box(rng, placement, area, ratio, rho)
        view, flipped = cut(image, box, (side, side)), rng.random() < flip
        table = np.arange(256, dtype=np.uint8)
        if rng.random() < jitter:
            table = jitter_table(rng, histogram(view), brightness, contrast)
        if v == 1 and rng.random() < solarizes:
            table = solarize(table)
        view = look_up(table, view)
        if rng.random() < blurs[min(v, 2)]:
            view = blur(view, rng.uniform(*sigma))
        mirror = slice(None, None, -1 if flipped else 1)
        out[kind].append(view[:, mirror])
        if kind == 'globals':
            out['grids'].append(tissue_grid(tissue, box, side // patch, side // patch)[:, mirror])
        out['boxes'].append(box)
        out['relaxed'].append(relaxed)
    out['locals'] = out['locals'] or np.empty((0, local_size, local_size), np.uint8)
    return {name: np.array(value) for name, value in out.items()}


# ---- patch masks (2.3) --------------------------------------------------------------------------------------------

def patch_mask(rng, grid, m, rho, m_min=4, m_max=None, ratio=(0.3, 1 / 0.3), weight=1.0, eps=1e-3, info=None):
    """The iBOT-M mask Z: grid float (h, w), the tissue share of each patch -> bool (h, w) with exactly m patches.

    Pieces are added until m patches are masked. For each, a target area a_t in [m_min, m_max] and a shape are drawn;
    every corner where the piece fits is scored by its tissue coverage r, those with r < rho are discarded, and one of
    the rest is drawn with weight pi = weight * r + eps (`_corner` by rejection, which is fast, `_corner_of_all` where
    that finds none). With c patches masked it is accepted if it adds 0 < new <= min(m_max, m - c), where the paper
    has |C| - o for new. After every ten refusals in a row rho falls by a tenth of its first value.

    After two hundred refusals single patches fill the last few places. m_max defaults to half of the grid;
    ratio is the range of height / width, DINOv2's. `info`, a dict, receives `relaxed`: whether rho had to fall.
    Raises ValueError for an m that is not in 0..h*w, and for eps below 1e-12, with which air could never be masked.
    """
    h, w = grid.shape
    if eps < 1e-12:
        raise ValueError(f'eps {eps}: must be above 0, 1e-12 at least, or patches without tissue could never be masked')
    if not 0 <= m <= h * w:
        raise ValueError(f'{m} patches to mask, the grid has {h}x{w}')
    m_max = max(h * w // 2 if m_max is None else m_max, m_min)
    table = np.zeros((h + 1, w + 1))
    table[1:, 1:] = grid.cumsum(0).cumsum(1)                                            # sums of any block in 4 reads
    rows, uniform = table.tolist(), _uniforms(rng)
    masked, c, floor, failures = 0, 0, rho, 0               # bit y * w + x of `masked` is patch (y, x): one AND counts
    while c < m:
        bh, bw = _piece(uniform, h, w, min(m_min, m - c), min(m_max, m - c), ratio)
        corner = _corner(uniform, rows, h, w, bh, bw, floor, weight, eps)
        if corner is None:
            corner = _corner_of_all(uniform, table, bh, bw, floor, weight, eps)
        if corner is not None:
            y, x = corner
            block = _block(bh, bw, w) << (y * w + x)
            new = (block & ~masked).bit_count()
            if 0 < new <= min(m_max, m - c):
                masked, c, failures = masked | block, c + new, 0
                continue
        failures += 1
        if failures % 10 == 0:
            floor = max(0.0, floor - rho / 10)
        if failures > 200:                                  # nothing but scattered single patches is left
            break
    mask = np.unpackbits(np.frombuffer(masked.to_bytes(h * w // 8 + 1, 'little'), np.uint8), count=h * w,
                         bitorder='little').view(bool).reshape(h, w)
    if c < m:
        _fill(rng, mask, grid, m - c, weight, eps)
    if info is not None:
        info['relaxed'] = floor < rho
    return mask


def _uniforms(rng):
    """One number in [0, 1) after the other: to ask the generator for each would cost a third more time."""
    while True:
        yield from rng.random(256).tolist()


def _piece(uniform, h, w, low, high, ratio):
    """Height and width of a block of about a_t patches, a_t uniform in [low, high], that fits the grid."""
    area = low + (high - low) * next(uniform)
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** next(uniform)
    return min(h, max(1, round(math.sqrt(area * aspect)))), min(w, max(1, round(math.sqrt(area / aspect))))


@functools.cache
def _block(bh, bw, w):
    """The bits of a block of bh x bw patches in the corner of a grid of w columns."""
    return sum((1 << bw) - 1 << y * w for y in range(bh))


def _corner(uniform, rows, h, w, bh, bw, rho, weight, eps):
    """A top-left corner drawn with weight pi = weight * r + eps among those with r >= rho; None after 32 refusals.

    Rejection gives this distribution without scoring every corner: draw one uniformly, keep it with probability pi /
    max pi.
    """
    down, right, area = h - bh + 1, w - bw + 1, bh * bw
    for _ in range(32):
        y, x = int(next(uniform) * down), int(next(uniform) * right)
        upper, lower = rows[y], rows[y + bh]
        r = (lower[x + bw] - upper[x + bw] - lower[x] + upper[x]) / area
        if r >= rho and next(uniform) * (weight + eps) < weight * r + eps:
            return y, x


def _corner_of_all(uniform, table, bh, bw, rho, weight, eps):
    """The same draw by scoring every corner; None if there is none with r >= rho."""
    r = (table[bh:, bw:] - table[:-bh, bw:] - table[bh:, :-bw] + table[:-bh, :-bw]) / (bh * bw)     # (down, right)
    pi = np.where(r >= rho, weight * r.clip(0) + eps, 0).ravel().cumsum()
    if pi[-1] > 0:
        return divmod(int(np.searchsorted(pi, next(uniform) * pi[-1], side='right')), r.shape[1])


def _fill(rng, mask, grid, count, weight, eps):
    """Single patches for the last few places, with the same weights."""
    free = np.flatnonzero(~mask)
    pi = weight * grid.ravel()[free] + eps
    mask.ravel()[rng.choice(free, count, replace=False, p=pi / pi.sum())] = True


# ---- slice pairs (2.4) --------------------------------------------------------------------------------------------

def slice_pair(rng, k, K, d_max):
    """A neighbour k' = k +- d of slice k in a volume of K, d in 1..d_max, uniform over those inside the volume."""
    if K < 2 or not 0 <= k < K or d_max < 1:
        raise ValueError(f'slice {k} of {K} has no neighbour within {d_max}')
    near = [i for i in range(max(0, k - d_max), min(K, k + d_max + 1)) if i != k]
    return near[rng.integers(len(near))]


def pair_views(rng, slice_a, slice_b, tissue, size=518, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3), rho=0.3,
               brightness=0.1, contrast=0.1, flip=0.5):
    """The conservative transform of both slices: (2, size, size) uint8, one tissue-aware window and one flip for
    both, light brightness and contrast for each, no blur, no solarization. The paper says "conservative" and T(.);
    the rest is our reading. `tissue` is that of slice_a."""
    box, _ = crop_box(rng, tissue, scale, ratio, rho)
    mirror = slice(None, None, -1 if rng.random() < flip else 1)
    pair = []
    for image in (slice_a, slice_b):
        view = cut(image, box, (size, size))
        pair.append(look_up(jitter_table(rng, histogram(view), brightness, contrast), view)[:, mirror])
    return np.array(pair)


# ---- contact sheet (Fig. 1a, 1b) ----------------------------------------------------------------------------------

def contact_sheet(rng, image, tissue, size=224, local_size=112, patch=14, rho=0.3, ratio=0.4):
    """Tissue-aware sampling above uniform sampling, a PIL image: the windows on the image, two global crops with
    their patch masks, six local crops; under each the share of tissue in it."""
    rows = []
    for title, placement in (('tissue-aware', tissue), ('uniform', np.ones_like(tissue))):
        sample = views(rng, image, tissue, size, local_size, locals=6, rho=rho, blurs=(0, 0, 0), jitter=0,
                       solarizes=0, flip=0, patch=patch, placement=placement)
        boxes = [tuple(box) for box in sample['boxes']]
        panels = [(_windows(image, boxes, size), f'{title}: 2 global, 6 local windows')]
        for v in range(2):
            grid = sample['grids'][v]
            mask = patch_mask(rng, grid if placement is tissue else np.ones_like(grid), round(ratio * grid.size), rho)
            on = grid[mask].mean()
            panels.append((_masked(sample['globals'][v], mask, patch),
                           f'global, tissue {coverage(tissue, boxes[v]):.0%}; under masks {on:.0%}'))
        for v in range(0, 6, 2):
            two = np.vstack([sample['locals'][v], sample['locals'][v + 1]])
            shares = ' and '.join(f'{coverage(tissue, boxes[2 + v + i]):.0%}' for i in range(2))
            panels.append((np.repeat(two[..., None], 3, -1), f'local {shares}'))
        rows.append(panels)
    gap, caption = 8, 18
    width = sum(p.shape[1] + gap for p, _ in rows[0]) + gap
    sheet = Image.new('RGB', (width, len(rows) * (size + caption + gap) + gap), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, panels in enumerate(rows):
        x, y = gap, gap + i * (size + caption + gap)
        for panel, text in panels:
            sheet.paste(Image.fromarray(panel), (x, y))
            draw.text((x, y + size + 3), text, fill='black')
            x += panel.shape[1] + gap
    return sheet


def _windows(image, boxes, side):
    H, W = image.shape
    f = side / H
    picture = Image.fromarray(image).convert('RGB').resize((round(W * f), side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for v, (y0, x0, y1, x1) in enumerate(boxes):
        draw.rectangle((x0 * f, y0 * f, x1 * f - 1, y1 * f - 1), outline=(255, 200, 0) if v < 2 else (60, 190, 255))
    canvas = Image.new('RGB', (max(picture.width, 230), side))
    canvas.paste(picture)
    return np.array(canvas)


def _masked(view, mask, patch):
    colour = np.repeat(view[..., None], 3, -1)
    hidden = np.kron(mask, np.ones((patch, patch), bool))
    colour[hidden] = colour[hidden] // 4 + np.array((150, 40, 30), np.uint8)
    return colour


def _example():
    """A disc of smoothed noise on black: enough of a breast for a picture without an image at hand."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:512, :384]
    tissue = ((y - 256) / 220) ** 2 + (x / 300) ** 2 < 1
    texture = ndimage.gaussian_filter(rng.standard_normal((512, 384)), 4)
    return np.uint8(np.clip(130 + 900 * texture, 30, 255) * tissue), tissue


def _load(path):
    """Any picture Pillow opens, or a .npy, as 8-bit grey; of a volume the middle slice. For DICOM see mask.py."""
    picture = np.load(path, 'r', allow_pickle=False) if path.endswith('.npy') else np.array(Image.open(path))
    picture = picture[len(picture) // 2] if picture.ndim == 3 and path.endswith('.npy') else picture
    picture = picture.mean(-1) if picture.ndim == 3 else picture
    return np.uint8((picture - float(picture.min())) * 255 / max(float(np.ptp(picture)), 1e-6))


if __name__ == '__main__':
    if {'-h', '--help'} & {*sys.argv}:
        sys.exit(print(__doc__))
    picture, tissue = _example()
    if len(sys.argv) > 1:
        try:
            picture = _load(sys.argv[1])
        except Exception as error:
            sys.exit(f'sampler.py: {sys.argv[1]}: {error or type(error).__name__}; expected PNG, TIFF, '
                     'JPEG, PGM or .npy')
        tissue = ndimage.binary_opening(picture > picture.mean() / 3, iterations=4)
    out = sys.argv[2] if len(sys.argv) > 2 else 'views.png'
    contact_sheet(np.random.default_rng(1), picture, tissue).save(out)
    print(f'-> {out}')
