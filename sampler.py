"""Breast-tissue-aware sampling: crops, patch masks, slice pairs (MammoDINO, arXiv 2510.11883, 2.2 to 2.4).

    views(rng, image, tissue)            two global and n local crops that lie on tissue, augmented
    patch_mask(rng, grid, m, rho)        m patches of a crop for iBOT-M, mostly on tissue
    pair_views(rng, a, b, tissue)        the same window of two neighbouring slices of a DBT volume

An image is uint8 (H, W), its tissue mask bool (H, W). With an all-true mask, crops and masks are DINOv2's,
the baseline of the paper's ablation, but a mask has exactly m patches, where DINOv2's may have fewer.
Boxes are windows (y0, x0, y1, x1) in whole pixels, rows first, end exclusive. `rng` is a numpy Generator;
the same state gives the same sample.

H W pixels of the image, S s sides of global and local crops, K slices; h w: the patch grid of a crop,
or the pixels of a window. Copy this file alone; it imports nothing of this repository (only its
demonstration does).

    $ python sampler.py [FILE] [OUT.png]        # a row of tissue-aware crops, one of uniform ones
"""
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from scipy import ndimage

TRIES = 50          # at the least coverage rho, and as many while it falls to 0


# ---- crops on tissue (2.2) ------------------------------------------------------------------------

def coverage(tissue, box):
    """r(C) = |C|^-1 sum of M over the window C: the share of its pixels that are tissue."""
    y0, x0, y1, x1 = box
    return np.count_nonzero(tissue[y0:y1, x0:x1]) / ((y1 - y0) * (x1 - x0))


def crop_box(rng, tissue, scale, ratio, rho):
    """A window around a random tissue pixel with r(C) > rho -> (box, relaxed).

    `scale` is the range of the window's share of the image area, `ratio` that of width / height. Every
    try draws area, ratio and pixel again. The paper does not say what happens where no window passes: here,
    after 50 tries, rho falls linearly to 0 over the next 50, and the window counts as `relaxed`. So does the
    uniform window of an image without tissue.
    """
    H, W = tissue.shape
    for attempt in range(2 * TRIES):
        h, w = window_size(rng, H, W, scale, ratio)
        pixel = tissue_pixel(rng, tissue)
        y, x = pixel or (rng.integers(H), rng.integers(W))

        # The pixel keeps its relative place: if it lies a third down the image, it lies a third down the
        # window (ours; the paper may centre it). So the window stays inside; on tissue alone it is uniform.
        y0 = int((y + rng.random()) * (H - h + 1) / H)
        x0 = int((x + rng.random()) * (W - w + 1) / W)
        box = y0, x0, y0 + h, x0 + w

        floor = rho * min(1.0, 2 - (attempt + 1) / TRIES)           # rho, rho, ..., then down to 0
        if pixel is None or coverage(tissue, box) > floor:
            return box, pixel is None or attempt >= TRIES
    raise AssertionError('a window around a tissue pixel has tissue, so the last try passes')


def window_size(rng, H, W, scale, ratio):
    """Height and width of a window, as torchvision's RandomResizedCrop draws them: ten tries, then the
    largest window of an allowed ratio."""
    for _ in range(10):
        h, w = rectangle(rng, H * W * rng.uniform(*scale), ratio)
        if 0 < h <= H and 0 < w <= W:
            return h, w
    return min(H, max(1, round(W / ratio[0]))), min(W, max(1, round(H * ratio[1])))


def rectangle(rng, area, ratio):
    """Height and width of about this area, width / height log-uniform in the range `ratio`."""
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    return round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))


def tissue_pixel(rng, tissue):
    """A uniform random pixel of the mask as (y, x), or None if there is none."""
    H, W = tissue.shape
    for _ in range(64):                 # listing all tissue pixels first would take longer than the crop
        y, x = int(rng.random() * H), int(rng.random() * W)
        if tissue[y, x]:
            return y, x
    index = np.flatnonzero(tissue)
    return divmod(int(index[rng.integers(len(index))]), W) if len(index) else None


def cut(image, box, size):
    """A window of a uint8 image, resized to `size` (h, w) by antialiased bicubic interpolation.

    Shrinks the height first, which leaves less to transpose; enlarges the width first, as Pillow always does.
    The results are equal to Pillow's to one grey level, two if enlarged several times; beside sharp white
    edges, where values are clipped between the two passes, to twenty.
    """
    y0, x0, y1, x1 = box
    window = image[y0:y1, x0:x1]
    h, w = size
    if h > y1 - y0 or w > x1 - x0:
        return resize_height(resize_height(window.T, w).T, h)
    return np.ascontiguousarray(resize_height(resize_height(window, h).T, w).T)


def resize_height(image, height):
    """uint8 (H, W) -> (height, W). Four neighbouring columns become the channels of one pixel: for four
    interleaved channels F.interpolate has a fast path (`python tests/bench.py tricks`)."""
    H, W = image.shape
    four = np.empty((1, H, -(-W // 4), 4), np.uint8)
    four.reshape(H, -1)[:, :W] = image                              # the columns beyond W are cut off below
    four = torch.from_numpy(four).permute(0, 3, 1, 2)               # (1, 4, H, W / 4)
    four = F.interpolate(four, (height, four.shape[3]), mode='bicubic', antialias=True)
    return four.permute(0, 2, 3, 1).reshape(height, -1).numpy()[:, :W]


def tissue_grid(tissue, box, h, w):
    """The share of tissue under each patch of a window, float32 (h, w)."""
    y0, x0, y1, x1 = box
    window = Image.fromarray(tissue[y0:y1, x0:x1].view(np.uint8) * np.uint8(255))
    return np.asarray(window.resize((w, h), Image.Resampling.BOX), np.float32) / 255


# ---- photometry: DINOv2's, for grey images --------------------------------------------------------

def jitter_table(rng, histogram, brightness, contrast):
    """Brightness and contrast by factors 1 +- brightness and 1 +- contrast, in random order, as a table.

    On a grey image hue and saturation change nothing, so this is all of DINOv2's ColorJitter, and a table
    is exact. Contrast turns about the mean of the view, which its histogram (256,) gives.
    """
    table = np.arange(256, dtype=np.float32)
    for operation in rng.permutation(2):
        if operation == 0:
            table = table * rng.uniform(1 - brightness, 1 + brightness)
        else:
            mean = int((histogram * table).sum() / histogram.sum() + 0.5)               # rounded: Pillow
            table = mean + (table - mean) * rng.uniform(1 - contrast, 1 + contrast)
        table = np.floor(table.clip(0, 255))
    return table.astype(np.uint8)


def solarize(table, threshold=128):
    """Inverts the greys at or above the threshold."""
    return np.where(table >= threshold, 255 - table, table)


def blur(image, sigma):
    """A Gaussian of 9 taps, mirrored at the border, as torchvision's and DINOv2's."""
    blurred = ndimage.gaussian_filter(image.astype(np.float32), sigma, radius=4, mode='mirror')
    return np.rint(blurred).astype(np.uint8)


# ---- the views of one image: T(x) -----------------------------------------------------------------

def views(rng, image, tissue, size=518, local_size=196, locals=8, patch=14, scale=(0.5, 1.0),
          local_scale=(0.2, 0.5), ratio=(3 / 4, 4 / 3), rho=0.3, jitter=0.8, brightness=0.4,
          contrast=0.4, blurs=(1.0, 0.1, 0.5), sigma=(0.1, 2.0), solarizes=0.2, flip=0.5,
          placement=None):
    """The view sampler T (2.2): all crops of one mammogram, of which the teacher sees the globals. A dict of

        globals (2, S, S) and locals (locals, s, s), uint8
        grids   (2, h, w) float32, the share of tissue under each patch of the globals
        boxes   (2 + locals, 4) int and relaxed (2 + locals,) bool, globals first

    jitter, blurs (first global, second global, locals), solarizes (second global only) and flip are
    probabilities. `placement` is the mask that places the windows, `tissue` by default (all true: DINOv2's
    crops). The blur comes last, so that all other photometry is one table; DINOv2 solarizes after it.
    Raises ValueError for an image that is not uint8 and for masks of another shape.
    """
    placement = tissue if placement is None else placement
    if image.dtype != np.uint8 or not image.shape == tissue.shape == placement.shape:
        raise ValueError(f'an image of shape {image.shape} and type {image.dtype}, tissue of shape '
                         f'{tissue.shape}; expected uint8 and masks of its shape')
    out = dict(globals=[], locals=[], grids=[], boxes=[], relaxed=[])
    for v in range(2 + locals):
        kind, side = ('globals', size) if v < 2 else ('locals', local_size)
        box, relaxed = crop_box(rng, placement, scale if v < 2 else local_scale, ratio, rho)
        view = cut(image, box, (side, side))
        mirror = slice(None, None, -1 if rng.random() < flip else 1)
        table = np.arange(256, dtype=np.uint8)
        if rng.random() < jitter:
            greys = np.bincount(view.ravel(), minlength=256)
            table = jitter_table(rng, greys, brightness, contrast)
        if v == 1 and rng.random() < solarizes:
            table = solarize(table)
        view = table[view]
        if rng.random() < blurs[min(v, 2)]:
            view = blur(view, rng.uniform(*sigma))

        out[kind].append(view[:, mirror])
        if kind == 'globals':
            out['grids'].append(tissue_grid(tissue, box, side // patch, side // patch)[:, mirror])
        out['boxes'].append(box)
        out['relaxed'].append(relaxed)
    out['locals'] = out['locals'] or np.empty((0, local_size, local_size), np.uint8)
    return {name: np.array(value) for name, value in out.items()}


# ---- patch masks (2.3) ----------------------------------------------------------------------------

def patch_mask(rng, grid, m, rho, m_min=4, m_max=None, ratio=(0.3, 1 / 0.3), weight=1.0, eps=1e-3,
               info=None):
    """The iBOT-M mask Z: the tissue share of each patch, float (h, w) -> bool (h, w) with exactly m patches.

    Pieces (blocks of patches) are added until m patches are masked. For each piece:

        draw a target area a_t in [m_min, m_max], at most what is missing, and a shape, width / height in
            the range `ratio`
        score every top-left corner where it fits by its tissue coverage r, discard those with r < rho
        draw one of the rest with weight pi = w_t r + eps
        accept it if it masks 0 < new <= min(m_max, missing) further patches; in the paper, new is the area
            less the overlap o, and missing is m - c

    After every ten refusals in a row, for want of a corner or for overlap, rho falls by a tenth of its first
    value for the rest of this mask; after 200, single patches fill it. The paper relaxes rho "linearly" and
    says no more.
    m_max is half of the grid by default. `info`, a dict, receives `relaxed`, whether rho had to fall.
    Raises ValueError for m outside 0..h*w, and for eps below 1e-12, which never masks air.
    """
    h, w = grid.shape
    if not 0 <= m <= h * w or eps < 1e-12:
        raise ValueError(f'{m} patches to mask, eps {eps}; expected 0 to {h * w}, all of the grid, '
                         'and eps from 1e-12')
    m_max = max(h * w // 2 if m_max is None else m_max, m_min)
    # A summed-area table gives the sum of any block from four entries; in float64, or eps would be lost.
    sums = np.pad(grid.cumsum(0, dtype=float).cumsum(1), ((1, 0), (1, 0)))              # (h + 1, w + 1)
    mask, floor, refusals, missing = np.zeros((h, w), bool), rho, 0, m

    while missing and refusals < 200:
        a_t = rng.uniform(min(m_min, missing), min(m_max, missing))
        bh, bw = rectangle(rng, a_t, ratio)
        bh, bw = min(h, max(1, bh)), min(w, max(1, bw))
        r = sums[bh:, bw:] - sums[:-bh, bw:] - sums[bh:, :-bw] + sums[:-bh, :-bw]
        r = r.clip(0) / (bh * bw)                                   # (h - bh + 1, w - bw + 1) corners
        pi = np.where(r >= floor, weight * r + eps, 0)
        total = pi.ravel().cumsum()
        if total[-1] > 0:
            corner = int(np.searchsorted(total, rng.random() * total[-1], side='right'))
            y, x = divmod(corner, pi.shape[1])
            piece = mask[y:y + bh, x:x + bw]                        # a view into the mask
            new = np.count_nonzero(~piece)
            if 0 < new <= min(m_max, missing):
                piece[:] = True
                missing, refusals = missing - new, 0
                continue
        refusals += 1
        if refusals % 10 == 0:
            floor = max(0.0, floor - rho / 10)

    if missing:
        free = np.flatnonzero(~mask)
        pi = weight * grid.ravel()[free] + eps
        mask.ravel()[rng.choice(free, missing, replace=False, p=pi / pi.sum())] = True
    if info is not None:
        info['relaxed'] = floor < rho
    return mask


# ---- slice pairs (2.4) ----------------------------------------------------------------------------

def slice_pair(rng, k, K, d_max):
    """A neighbour k' = k +- d of slice k in a volume of K, uniform over those with d in 1..d_max; the paper
    does not say how it draws d, and Fig. 1 shows 4."""
    if K < 2 or not 0 <= k < K or d_max < 1:
        raise ValueError(f'slice {k} of {K} has no neighbour within {d_max}')
    near = [i for i in range(max(0, k - d_max), min(K, k + d_max + 1)) if i != k]
    return near[rng.integers(len(near))]


def pair_views(rng, slice_a, slice_b, tissue, size=518, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3),
               rho=0.3, brightness=0.1, contrast=0.1, flip=0.5):
    """One tissue-aware window of two slices, uint8 (2, S, S); `tissue` is that of slice_a.

    The paper: the sampler T of 2.2, "conservative", "to preserve correspondence". We read: the same window
    and flip for both slices, slight brightness and contrast for each, no blur, no solarization.
    """
    box, _ = crop_box(rng, tissue, scale, ratio, rho)
    mirror = slice(None, None, -1 if rng.random() < flip else 1)
    pair = []
    for image in (slice_a, slice_b):
        view = cut(image, box, (size, size))
        greys = np.bincount(view.ravel(), minlength=256)
        pair.append(jitter_table(rng, greys, brightness, contrast)[view][:, mirror])
    return np.array(pair)


# ---- contact sheet (Fig. 1a, 1b) ------------------------------------------------------------------

def contact_sheet(rng, image, tissue, size=224, local_size=112, patch=14, rho=0.3, share=0.4):
    """Tissue-aware above uniform sampling as a PIL image: the windows on the image, two global crops with a
    mask over `share` of their patches, six local crops, and the share of tissue in each."""
    rows = []
    for title, placement in (('tissue-aware', tissue), ('uniform', np.ones_like(tissue))):
        sample = views(rng, image, tissue, size, local_size, locals=6, patch=patch, rho=rho,
                       jitter=0, blurs=(0, 0, 0), solarizes=0, flip=0, placement=placement)
        r = [coverage(tissue, box) for box in sample['boxes']]
        row = [(draw_windows(image, sample['boxes'], size), f'{title}: yellow global, blue local')]
        for v, (view, grid) in enumerate(zip(sample['globals'], sample['grids'])):
            seen = grid if placement is tissue else np.ones_like(grid)
            mask = patch_mask(rng, seen, round(share * grid.size), rho)
            hidden = np.kron(mask, np.ones((patch, patch), bool))           # (S, S)
            picture = np.repeat(view[..., None], 3, axis=-1)
            picture[hidden] = picture[hidden] // 4 + np.array((150, 40, 30), np.uint8)
            row.append((picture, f'global: tissue {r[v]:.0%}, in the mask {grid[mask].mean():.0%}'))
        for v in range(0, 6, 2):
            two = np.vstack(sample['locals'][v:v + 2])[..., None].repeat(3, axis=-1)
            row.append((two, f'local: {r[2 + v]:.0%}, {r[3 + v]:.0%}'))
        rows.append(row)
    return sheet(rows)


def sheet(rows):
    """Rows of (picture uint8 (h, w, 3), caption) -> one PIL image."""
    gap, caption = 8, 18
    widths = [sum(picture.shape[1] + gap for picture, _ in row) + gap for row in rows]
    heights = [max(picture.shape[0] for picture, _ in row) + caption + gap for row in rows]
    canvas, y = Image.new('RGB', (max(widths), sum(heights) + gap), 'white'), gap
    for row, height in zip(rows, heights):
        x = gap
        for picture, text in row:
            canvas.paste(Image.fromarray(picture), (x, y))
            ImageDraw.Draw(canvas).text((x, y + height - caption - gap + 3), text, fill='black')
            x += picture.shape[1] + gap
        y += height
    return canvas


def draw_windows(image, boxes, height):
    """The windows on the image, scaled to `height`: two yellow, the others blue. uint8 (h, w, 3)"""
    zoom = height / image.shape[0]
    picture = Image.fromarray(image).convert('RGB').resize((round(image.shape[1] * zoom), height))
    for v, (y0, x0, y1, x1) in enumerate(boxes):
        corners = x0 * zoom, y0 * zoom, x1 * zoom - 1, y1 * zoom - 1
        colour = (255, 200, 0) if v < 2 else (60, 190, 255)
        ImageDraw.Draw(picture).rectangle(corners, outline=colour)
    canvas = Image.new('RGB', (max(picture.width, 230), height))            # as wide as its caption
    canvas.paste(picture)
    return np.array(canvas)


if __name__ == '__main__':
    if '-h' in sys.argv or '--help' in sys.argv:
        print(__doc__)
        sys.exit()
    path = sys.argv[1] if len(sys.argv) > 1 else None
    out = sys.argv[2] if len(sys.argv) > 2 else 'views.png'
    try:
        import images
        import mask
        import phantom
        if path:
            image = images.read_equalised(path, images.frames(path) // 2)       # middle slice of a volume
        else:
            breast = phantom.breast(np.random.default_rng(8), width=288)
            image = images.clahe(images.to_uint8(breast.volume[0]))
        tissue = mask.tissue(image, percentile=None)
        contact_sheet(np.random.default_rng(1), image, tissue).save(out)
        print(f'-> {out}')
    except (ImportError, ValueError, OSError) as problem:
        sys.exit(f'sampler.py: {problem}')
