"""From a file to an 8-bit mammogram and its breast-tissue mask (MammoDINO, arXiv 2510.11883, 2.2 and 3.1).

    tissue(image)      ->  bool (H, W)       the mask M that crops and patch masks are drawn from
    clahe(image)       ->  uint8 (H, W)      the paper's third preprocessing step
    phantom(rng)       ->  Phantom           a synthetic breast with known tissue, density and lesions
    read(path, frame)  ->  uint8 (H, W)      any DICOM, PNG, TIFF, PGM, JPEG or .npy; one slice of a volume at a time

In this order below; who reads for the method may stop where the reading of files begins.
A file with more than one frame is a volume: multi-frame DICOM, multi-page TIFF, .npy of shape (K, H, W).
H W pixels, K slices, G lesion boxes.

Copy this file alone; it imports nothing of this repository.

    $ python mask.py                                      # a phantom: the mask against the truth
    $ python mask.py FILE [OUT.png]                       # any image: the mask drawn over it, and its share
    $ python mask.py prepare SRC DST [--side 1024] [--workers N]
"""
import argparse
import contextlib
import csv
import errno
import io
import itertools
import logging
import math
import os
import signal
import struct
import sys
import threading
import time
import warnings
import zlib
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import get_frame
from pydicom.pixels import pixel_array
from scipy import ndimage
from tqdm import tqdm

PICTURES = {'.png', '.tif', '.tiff', '.pgm', '.jpg', '.jpeg'}
DICOMS = {'.dcm', '.dicom', '.ima'}
SUFFIXES = PICTURES | DICOMS | {'.npy'}
MAX_PIXELS = int(float(os.environ.get('MAX_PIXELS') or 8e7))     # per frame; the largest film scans have 35 million
MAX_PAGES = 4096                    # of a TIFF, whose pages are only found one after the other
Image.MAX_IMAGE_PIXELS = MAX_PIXELS                             # Pillow refuses twice as many
logging.getLogger('PIL').addHandler(logging.NullHandler())      # what it says about broken files, it raises as well


# ---- breast tissue ------------------------------------------------------------------------------------------------

COARSE = 192                        # pixels that the shorter side keeps, if it has them, for the self-tuning mask


def tissue(image, percentile=40, kernel=9):
    """The breast-tissue mask M, uint8 (H, W) -> bool (H, W) (MammoDINO 2.2).

        theta = percentile(x, tau),   M0 = 1[x > theta],   M = opening(closing(M0)), kernel x kernel

    Min-max normalization keeps the order of pixels, so theta is taken on the grey levels themselves. The paper does
    not give tau. 40 fits best among real films, but any percentile gives every breast the same area, so pretrain.py
    asks for percentile=None, a mask that tunes itself:

        1. means of f x f pixels that leave the shorter side at 192 or more: outlines need no more, and 8 megapixels
           would take longer than all other sampling
        2. theta a quarter of the way from the air to Otsu's threshold (`_above_air`)
        3. closing and opening with kernel / f, three at least
        4. opening with a sixteenth of the shorter side, which cuts film edges and frames off the breast
        5. the largest piece, widened by half of that within step 3, which gives its outline back
        6. holes filled
    """
    _check_uint8(image)
    if percentile is not None and not 0 <= percentile <= 100:
        raise ValueError(f'percentile {percentile}: expected 0..100, or None')
    _check_kernel(kernel)
    if percentile is not None:
        theta = _percentile(_histogram(image), percentile)
        return opening(closing(image > int(theta), kernel), kernel)                     # greys are whole numbers
    (H, W), f = image.shape, max(1, min(image.shape) // COARSE)
    image, kernel = np.asarray(Image.fromarray(image).reduce(f)), max(min(3, kernel), kernel // f | 1)     # odd
    mask = opening(closing(image > int(_above_air(image)), kernel), kernel)
    wide = max(kernel, min(image.shape) // 16 | 1)
    core = _largest(opening(mask, wide))
    mask = _fill_holes(_largest(mask & dilation(core, wide)))
    return mask.repeat(f, axis=1).repeat(f, axis=0)[:H, :W]


def _check_uint8(image):
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f'an image of shape {image.shape} and type {image.dtype}; '
                         'expected (H, W) uint8, as `read` gives')


def _check_kernel(kernel):
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f'kernel {kernel}: expected an odd number of pixels')


def otsu(image):
    """The grey level that best splits a uint8 image into two classes (Otsu 1979): dark is <= it. It maximises the
    variance between them, (mu omega - m)^2 / (omega (1 - omega)), omega and m share and first moment of the dark, mu
    the mean."""
    share = _histogram(image) / image.size
    weight, mean = share.cumsum(), (share * np.arange(256)).cumsum()
    with np.errstate(divide='ignore', invalid='ignore'):
        between = (mean[-1] * weight - mean) ** 2 / (weight * (1 - weight))
    return int(np.nanargmax(np.where(weight < 1, between, np.nan))) if np.ptp(image) else int(image.flat[0])


def _above_air(image):
    """A quarter of the way from the air, the tenth percentile of what Otsu calls dark, to Otsu's threshold. Air is
    not always 0: the base of a film is grey, and CLAHE lifts its noise."""
    split, histogram = otsu(image), _histogram(image)
    air = _percentile(histogram[:split + 1], 10)
    return air + (split - air) / 4


def _percentile(histogram, q):
    """np.percentile of uint8 pixels, from their histogram."""
    cumulative = histogram.cumsum()
    rank = q / 100 * (cumulative[-1] - 1)
    low, high = np.searchsorted(cumulative, [np.floor(rank), np.ceil(rank)], side='right')
    return low + (high - low) * (rank % 1)


def closing(mask, kernel):
    """Gaps narrower than kernel x kernel are closed. bool (H, W) -> bool (H, W), as OpenCV's morphologyEx."""
    return erosion(dilation(mask, kernel), kernel)


def opening(mask, kernel):
    """Pieces narrower than kernel x kernel are dropped. bool (H, W) -> bool (H, W), as OpenCV's morphologyEx."""
    return dilation(erosion(mask, kernel), kernel)


def erosion(mask, kernel):
    """True where the whole window is. The border of the image eats no tissue: what lies outside counts as True."""
    return ~dilation(~mask, kernel)


def dilation(mask, kernel):
    """True where anything in the kernel x kernel window around the pixel is; outside the image nothing is.

    ndimage.binary_dilation(mask, np.ones((kernel, kernel))), some ninety times as fast, since 64 pixels of a row are
    one machine word: pixel x is bit x % 64 of word x // 64. OR with itself, moved by `step`, widens the window that
    starts at each pixel from `span` to span + step; at the end it is moved back by half a kernel to be centred.
    """
    _check_kernel(kernel)
    if mask.dtype != bool:
        raise ValueError(f'a mask of type {mask.dtype}; expected bool')
    W, half = mask.shape[1], kernel // 2
    words, bits = divmod(half, 64)
    packed = np.packbits(mask, axis=1, bitorder='little')                               # (H, ceil(W / 8)) bytes
    packed = np.pad(packed, ((half, half), (8 * words + 8, 16 - packed.shape[1] % 8)))  # air all around
    window, span = np.ascontiguousarray(packed).view(np.uint64), 1
    while span < kernel:
        step = min(span, kernel - span, 63)                 # below 64: from this word and the next
        window = window[:-step] | window[step:]
        window[:, :-1] |= window[:, :-1] >> step | window[:, 1:] << 64 - step
        span += step
    centred = window[:, 1:-1] << bits | window[:, :-2] >> 64 - bits
    return np.unpackbits(centred.view(np.uint8), axis=1, count=W, bitorder='little').view(bool)


def _largest(mask):
    labels, count = ndimage.label(mask)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else mask


def _fill_holes(mask):
    """Adds every piece of background that does not reach the border."""
    labels, count = ndimage.label(~mask)
    hole = np.ones(count + 1, bool)
    hole[[0, *labels[0], *labels[-1], *labels[:, 0], *labels[:, -1]]] = False
    return mask | hole[labels]


def overlay(image, tissue):
    """The outline of the mask in yellow over the image: uint8 (H, W, 3)."""
    picture = np.repeat(image[..., None], 3, axis=-1)
    edge = max(3, min(image.shape) // 200 | 1)
    picture[dilation(tissue, edge) & ~erosion(tissue, edge)] = (255, 200, 0)
    return picture


# ---- contrast -----------------------------------------------------------------------------------------------------

def clahe(image, clip=2.0, tiles=8):
    """Contrast limited adaptive histogram equalization (Zuiderveld 1994, Reza 2004; MammoDINO 3.1), uint8 (H, W).

    The image is cut into tiles x tiles; each tile's histogram is clipped at `clip` times its mean, what was clipped
    is spread evenly, and its cumulative sum is a grey table. A pixel takes the four nearest tables, bilinearly.
    Padding, rounding and order are OpenCV's, whose results it equals for any clip above 0.
    """
    _check_uint8(image)
    H, W = image.shape
    padded = image
    if H % tiles or W % tiles:
        # OpenCV pads both sides as soon as one needs it, one that divides by `tiles` whole pixels
        padded = np.pad(image, ((0, tiles - H % tiles), (0, tiles - W % tiles)), mode='reflect')
    th, tw = padded.shape[0] // tiles, padded.shape[1] // tiles                         # pixels of a tile
    tables = np.empty((tiles, tiles, 256), np.float32)
    limit = max(int(clip * th * tw / 256), 1)
    for i in range(tiles):
        for j in range(tiles):
            histogram = _histogram(padded[i * th:(i + 1) * th, j * tw:(j + 1) * tw])
            tables[i, j] = np.rint(_clip(histogram, limit).cumsum().astype(np.float32) * np.float32(255 / (th * tw)))
    tables = tables.clip(0, 255)

    y, wy = _between(H, th)
    x, wx = _between(W, tw)
    out = np.empty_like(image)
    for rows in _runs(y):                                   # one cell of rows x columns, one set of four tables
        for columns in _runs(x):
            (t, b), (l, r) = [np.clip((at, at + 1), 0, tiles - 1) for at in (y[rows][0], x[columns][0])]
            grey, fy, fx = image[rows, columns].astype(np.intp), wy[rows, None], wx[columns]
            upper = _blend(tables[t, l].take(grey), tables[t, r].take(grey), fx)
            lower = _blend(tables[b, l].take(grey), tables[b, r].take(grey), fx)
            out[rows, columns] = np.rint(_blend(upper, lower, fy))
    return out


def _blend(a, b, f):
    """a (1 - f) + b f, in the memory of a and b."""
    a *= 1 - f
    b *= f
    a += b
    return a


def _histogram(image):
    return np.array(Image.fromarray(image).histogram())


def _clip(histogram, limit):
    """What exceeds `limit` is spread over all 256 greys, the remainder over evenly spaced ones, as in OpenCV."""
    excess = int(np.maximum(histogram - limit, 0).sum())
    histogram = np.minimum(histogram, limit) + excess // 256
    rest = excess % 256
    if rest:
        histogram[::max(256 // rest, 1)][:rest] += 1
    return histogram


def _between(length, tile):
    """For each pixel of a side: the tile whose centre lies before it (-1: none), and the weight of the next one."""
    position = np.arange(length, dtype=np.float32) * np.float32(1 / tile) - np.float32(0.5)
    before = np.floor(position).astype(int)
    return before, position - before.astype(np.float32)


def _runs(index):
    """Slices over which a sorted index is constant."""
    cuts = np.flatnonzero(np.diff(index)) + 1
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(index)])]


# ---- a synthetic breast -------------------------------------------------------------------------------------------

@dataclass
class Phantom:
    volume: np.ndarray          # uint8 (K, H, W)
    tissue: np.ndarray          # bool (H, W), the same for every slice
    boxes: np.ndarray           # float (G, 5): z x0 y0 x1 y1, pixels, x first; z the slice where it is brightest
    density: int                # 0..3, BI-RADS a..d: glandular share below 25, 50, 75, 100 %
    cancer: int                 # 1 with a lesion
    ffdm: np.ndarray = None     # uint8 (H, W), with `contrasts` only: the volume as a full-field mammogram shows it
    sm: np.ndarray = None       # uint8 (H, W), likewise: as a synthetic mammogram does


GLANDULAR = ((0.03, 0.25), (0.25, 0.50), (0.50, 0.75), (0.75, 0.95))


def phantom(rng, slices=1, height=256, width=192, density=None, lesion=None, contrasts=None):
    """A breast to run and test on, not a model of anatomy: half an ellipse with a skin line, fat of power-law texture,
    glandular islands that fill the share of its density class, a lesion on a few neighbouring slices.

    slices=1 is a mammogram (the mean of eight slices); more are a DBT volume whose glands change slowly with depth.
    density 0..3 and lesion are drawn when None; half of the breasts get a lesion. Exposure, gamma, side and noise vary,
    so that the mean grey level tells little. Everything comes from `rng` (numpy Generator).

    contrasts (FFDM, SM) projects a volume to two mammograms of the same breast, `.ffdm` and `.sm`, where the lesion has
    these multiples of its ordinary contrast: (1, 0) is a lesion that only the full-field mammogram shows. The slices
    are those that SM is made of.
    """
    if contrasts is not None and slices == 1:
        raise ValueError('contrasts project a volume; give slices=8')
    K, H, W = (8 if slices == 1 else slices), height, width
    density = int(rng.integers(4)) if density is None else density
    lesion = bool(rng.random() < 0.5) if lesion is None else lesion
    r = _outline(rng, H, W)
    inside = r < 1
    volume = _anatomy(rng, inside, K, GLANDULAR[density])
    without, boxes = volume.mean(0), np.zeros((0, 5))
    if lesion:
        boxes = _add_lesion(rng, volume, r < 0.75, on_all=slices == 1 or contrasts is not None)
    pair = [] if contrasts is None else _projections(without, volume, contrasts)

    volume = volume.mean(0, keepdims=True) if slices == 1 else volume
    volume, *pair = (_exposed(rng, image, r, inside) for image in (volume, *pair))
    if rng.random() < 0.5:                                                              # the other breast
        volume, inside, *pair = (image[..., ::-1].copy() for image in (volume, inside, *pair))
        boxes[:, [1, 3]] = W - boxes[:, [3, 1]]
    return Phantom(volume, inside, boxes, density, int(lesion), *(image[0] for image in pair))


def _projections(without, volume, contrasts):
    """FFDM and SM of a volume (K, H, W), (1, H, W) each; `without`: its mean (H, W) without the lesion, which is on all
    slices alike. FFDM is the mean along the beam. SM is half mean, half brightest slice, with edges drawn sharper than
    they are, so that glands look like findings."""
    lesion = volume.mean(0) - without
    volume += (contrasts[1] - 1) * lesion
    sm = (volume.mean(0) + volume.max(0)) / 2
    sm += sm - ndimage.gaussian_filter(sm, 2)
    return (without + contrasts[0] * lesion)[None], sm[None]


def _exposed(rng, images, r, inside):
    """Images (K, H, W) of one exposure as the detector gives them, uint8"""
    images = images * np.sqrt(np.clip(1 - r ** rng.uniform(6, 12), 0, 1))               # thinner towards the skin
    images[:, (r > 0.975) & inside] += 0.12                                             # the skin line
    images = rng.uniform(0.6, 1.0) * np.clip(images, 0, None) ** rng.uniform(0.75, 1.3)
    images += rng.normal(0, rng.uniform(0.008, 0.012), images.shape).astype(np.float32) * inside
    images[:, ~inside] = 0
    return np.uint8(np.clip(images, 0, 1) * 255)


def _outline(rng, H, W):
    """Distance from the middle of the chest wall, 1 on the skin, float32 (H, W): half an ellipse, tilted, wobbling."""
    y, x = np.mgrid[:H, :W].astype(np.float32) / H
    angle = np.arctan2(y - 0.5, x + 1e-6)
    wobble = sum(rng.normal(0, 0.012) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in (2, 3, 4))
    y = (y - 0.5 - rng.uniform(-0.12, 0.12) * x) / rng.uniform(0.42, 0.49)
    x = x / rng.uniform(0.62, 0.73)                                                     # a wide frame is mostly air
    return np.maximum(np.sqrt(x ** 2 + y ** 2) + wobble, 0)


def _anatomy(rng, inside, K, glandular):
    """Fat, glands that fill a share within `glandular` of the breast, and Cooper's ligaments, (K, H, W). Glands and
    ligaments of a slice are a mix of two fields that turns from the first towards the second with depth."""
    H, W = inside.shape
    fat = _field(rng, H, W, slope=1.4)
    glands = [_field(rng, H, W, slope=1.5, longest=0.12 * H) for _ in range(2)]
    strands = [_field(rng, H, W, slope=1.8, longest=0.25 * H, stretch=2.0) for _ in range(2)]
    share = rng.uniform(*glandular)
    softness = rng.uniform(0.22, 0.28)
    turn = rng.uniform(0.5, 1.2) * np.linspace(0, np.pi / 2, K)                         # neighbours stay alike
    volume = np.empty((K, H, W), np.float32)
    for k in range(K):
        gland, strand = (a * np.cos(turn[k]) + b * np.sin(turn[k]) for a, b in (glands, strands))
        edge = np.quantile(gland[inside], 1 - share)
        volume[k] = 1 / (1 + np.exp(-np.clip((gland - edge) / softness, -30, 30)))      # soft islands
        volume[k] += 0.35 * np.exp(-(strand / 0.12) ** 2)
    return 0.30 + 0.03 * fat + rng.uniform(0.26, 0.30) * volume


def _add_lesion(rng, volume, where, on_all):
    """A bright blob with spokes at a random place of `where`, brightest on one slice and faint two away, or `on_all`
    alike, as the mean of them needs it. -> its box (1, 5)"""
    K, H, W = volume.shape
    cy, cx = _pick(rng, where)
    z, radius = int(rng.integers(K)), H * rng.uniform(0.02, 0.05)
    y, x = np.mgrid[:H, :W]
    spokes = 1 + 0.25 * np.cos(rng.integers(5, 9) * np.arctan2(y - cy, x - cx) + rng.uniform(0, 6.28))
    blob = np.exp(-(((y - cy) ** 2 + (x - cx) ** 2) / (radius * spokes) ** 2) ** 2).astype(np.float32)
    depth = np.exp(-(((np.arange(K) - z) / 1.2) ** 2)).astype(np.float32)
    depth = np.ones(K, np.float32) if on_all else depth
    volume += rng.uniform(0.20, 0.35) * depth[:, None, None] * blob
    box = np.clip([cx - radius, cy - radius, cx + radius, cy + radius], 0, [W, H, W, H])
    return np.array([[0 if on_all else z, *box]])


def _field(rng, H, W, slope, longest=None, stretch=1.0):
    """A Gaussian random field (H, W) of mean 0 and deviation 1: amplitude f^-slope, faded out above the wavelength
    `longest` in pixels, drawn out along the rows by `stretch`."""
    f = np.hypot(np.fft.fftfreq(H)[:, None], stretch * np.fft.rfftfreq(W)[None])
    f[0, 0] = np.inf
    gain = f ** -slope
    if longest is not None:
        gain *= 1 - np.exp(-(f * longest) ** 2)
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((H, W))) * gain, s=(H, W))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _pick(rng, mask):
    index = np.flatnonzero(mask)
    return divmod(int(index[rng.integers(len(index))]), mask.shape[1])


# ---- reading ------------------------------------------------------------------------------------------------------

def frames(path):
    """Number of slices in the file: 1 for a 2D mammogram, K for a volume. Reads the header only.

    Raises ValueError or OSError with one line that says what came and what was expected.
    """
    return shape(path)[0]


def shape(path):
    """(K, H, W) of the file: slices, rows, columns. Reads the header only; raises like `frames`."""
    with _one_line_errors(path):
        if _kind(path) == 'dicom':
            ds = _header(path)[0]
            return _dicom_frames(path, ds), int(ds.Rows), int(ds.Columns)
        if _kind(path) == 'picture':
            with _open_picture(path) as image:
                return _pages(image), image.height, image.width
        with open(path, 'rb') as file:
            return _npy_header(file)


def read(path, frame=0, voi=False):
    """One frame as uint8 (H, W), stretched from its own minimum and maximum to 0..255 (MammoDINO 3.1).

    Bright is dense: MONOCHROME1 is inverted, after the rescale slope and, with `voi`, the file's VOI LUT or window.
    DICOM pixel padding takes no part in the stretch and becomes 0. A uint8 .npy is returned as it is.
    Colour is refused unless the three channels are equal. One frame is decoded, never the volume.
    Raises ValueError or OSError with one line that says what came and what was expected.
    """
    with _one_line_errors(path):
        if _kind(path) == 'dicom':
            return _read_dicom(path, frame, voi)
        if _kind(path) == 'picture':
            return _read_picture(path, frame)
        volume = _open_npy(path)
        _check_frame(frame, len(volume))
        pixels = np.array(volume[frame])
        return pixels if pixels.dtype == np.uint8 else to_uint8(pixels)


def listing(root):
    """Every image file below `root`, sorted, through linked folders too. Files named without a suffix, or with a
    number for one, count if they start like DICOM; hidden files and DICOMDIR do not."""
    if not os.path.isdir(root):
        raise ValueError(f'{root}: not a folder; expected a folder of DICOM, PNG, TIFF, PGM, JPEG or .npy files')

    def refuse(error):
        raise OSError(f'{error.filename}: the folder cannot be read ({error.strerror}); mend its permissions')

    found, seen = [], set()
    for folder, inner, names in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in seen:                # a link back to where we were
            inner.clear()
            continue
        seen.add(os.path.realpath(folder))
        for name in names:
            suffix, path = Path(name).suffix.lower(), os.path.join(folder, name)
            if name.startswith('.') or name == 'DICOMDIR' or not os.path.isfile(path) and os.path.exists(path):
                continue
            if suffix in SUFFIXES or (not suffix or suffix[1:].isdigit()) and _starts_like_dicom(path):
                found.append(path)
    if not found:
        raise ValueError(f'{root}: no DICOM, PNG, TIFF, PGM, JPEG or .npy file in it')
    return sorted(found)


def _kind(path):
    suffix = os.path.splitext(path)[1].lower()
    return 'npy' if suffix == '.npy' else 'picture' if suffix in PICTURES else 'dicom'


@contextlib.contextmanager
def _one_line_errors(path):
    """Whatever a broken file makes a decoder raise becomes one clear line."""
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise ValueError(f'{path}: the file is empty')
    try:
        with warnings.catch_warnings(action='ignore'):      # decoders warn with header values in the text
            yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:      # the system's, not the decoder's: trying again may help
            raise type(error)(f'{path}: {error.strerror}') from None
        raise ValueError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_frame(frame, count):
    if not 0 <= frame < count:
        raise ValueError(f'frame {frame} is asked for, the file has {count}')


def _check_size(height, width):
    if height < 1 or width < 1:
        raise ValueError(f'declares {width}x{height} pixels')
    if height * width > MAX_PIXELS:
        raise ValueError(f'declares {width}x{height} pixels, more than {_limit()}')


def _limit():
    return f'{MAX_PIXELS:,}; the environment variable MAX_PIXELS sets another limit'


def to_uint8(pixels, padding=None, invert=False):
    """Min-max to 8 bits (H, W), rounded. `padding` bool (H, W) is left out of min and max and becomes 0."""
    valid = pixels if padding is None else pixels[~padding]
    if valid.size == 0:
        raise ValueError('every pixel is padding')
    low, high = valid.min(), valid.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError('NaN or infinite pixels')
    if low == high:
        raise ValueError(f'a constant image, every pixel is {low:g}')
    low, span = float(low), float(high) - float(low)
    if not np.isfinite(span):
        raise ValueError(f'pixels from {low:g} to {float(high):g}, too far apart for numbers')
    values = pixels
    if pixels.dtype.kind in 'ui' and pixels.dtype.itemsize <= 2:                        # each grey value once
        code = np.dtype(f'u{pixels.dtype.itemsize}')
        values = np.arange(256 ** code.itemsize, dtype=code).view(pixels.dtype.newbyteorder('='))
    scaled = values.astype(np.float64)                      # large: worked on in place
    scaled -= low
    scaled *= 255 / span
    out = np.rint(scaled.clip(0, 255, out=scaled), out=scaled).astype(np.uint8)
    if values is not pixels:
        out = out[pixels.astype(values.dtype, copy=False).view(code)]
    if invert:
        out = 255 - out
    if padding is not None:
        out[padding] = 0
    return out


def _grey(pixels):
    """(H, W) as it is; (H, W, 3) only where the three channels are equal."""
    if pixels.ndim == 3 and pixels.shape[-1] == 3:
        if not (pixels[..., :1] == pixels).all():
            raise ValueError('a colour image; expected grey, or three equal channels')
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        raise ValueError(f'pixels of shape {pixels.shape}; expected (H, W)')
    return pixels


def _open_npy(path):
    """(H, W) or (K, H, W) -> a memory map (K, H, W). Nothing is ever unpickled."""
    with open(path, 'rb') as file:
        shape = _npy_header(file)
    return np.lib.format.open_memmap(path, mode='r').reshape(shape)


def _npy_header(file):
    """(K, H, W) of an open .npy file, K = 1 for (H, W). Maps nothing, for a data set may have a million files."""
    try:
        version = np.lib.format.read_magic(file)[0]
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read_header(file)
        shape = tuple(map(int, shape))                      # True is a number, too
    except Exception as error:                              # the header is text that a parser of Python reads
        raise ValueError('not a .npy file of numbers; expected an array saved by numpy.save') from error
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype.kind not in 'uifb' or shape[-1] <= 4:
        raise ValueError(f'an array of shape {shape} and type {dtype}; expected numbers (H, W) or (K, H, W)')
    _check_size(*shape[-2:])
    if os.fstat(file.fileno()).st_size < file.tell() + math.prod(shape) * dtype.itemsize:
        raise ValueError(f'cut short: {os.fstat(file.fileno()).st_size} bytes for an array of shape {shape}')
    return shape if len(shape) == 3 else (1, *shape)


def _open_picture(path):
    try:
        image = Image.open(path)
    except Image.UnidentifiedImageError as error:
        raise ValueError('not an image; expected PNG, TIFF, PGM or JPEG') from error
    except Image.DecompressionBombError as error:
        raise ValueError(f'declares more pixels than {_limit()}') from error
    _check_size(image.height, image.width)
    return image


def _pages(image):
    if image.format != 'TIFF':
        return 1
    for count in range(1, MAX_PAGES + 1):
        try:
            image.seek(count)
        except EOFError:
            image.seek(0)
            return count
    raise ValueError(f'has more than {MAX_PAGES} pages, the limit of mask.MAX_PAGES')


def _read_picture(path, frame):
    with _open_picture(path) as image:
        _check_frame(frame, _pages(image))
        image.seek(frame)
        _check_size(image.height, image.width)
        deep = image.mode.startswith(('I', 'F'))                                        # 16 or 32 bit grey
        if not deep and ';16' in str(image.tile):
            raise ValueError('16-bit colour, of which only 8 bits would be read; save it as 16-bit grey')
        white_is_zero = deep and image.format == 'TIFF' and image.tag_v2.get(262) == 0  # Pillow mends 8 bit itself
        if image.mode in ('1', 'LA', 'La'):
            image = image.convert('L')
        elif not deep and image.mode != 'L':                                            # RGB, palette, CMYK, alpha
            image = image.convert('RGB')
        return to_uint8(_grey(np.array(image)), invert=white_is_zero)


# ---- DICOM --------------------------------------------------------------------------------------------------------

GDCM = 'python-gdcm'
OPTIONAL_DECODERS = {'1.2.840.10008.1.2.4.57': GDCM, '1.2.840.10008.1.2.4.70': GDCM,        # JPEG Lossless
                     '1.2.840.10008.1.2.4.80': GDCM, '1.2.840.10008.1.2.4.81': GDCM,        # JPEG-LS
                     **{f'1.2.840.10008.1.2.4.20{i}': 'pylibjpeg pylibjpeg-openjpeg' for i in (1, 2, 3)}}
FRAME_HEADERS = {0xC0: '1.2.840.10008.1.2.4.50', 0xC1: '1.2.840.10008.1.2.4.51',         # JPEG baseline, extended
                 0xC3: '1.2.840.10008.1.2.4.70', 0xF7: '1.2.840.10008.1.2.4.80'}         # lossless, JPEG-LS
UNCOMPRESSED = {(True, True): '1.2.840.10008.1.2', (False, True): '1.2.840.10008.1.2.1',       # implicit, little-endian
                (False, False): '1.2.840.10008.1.2.2'}
GROUPS = (b'\x02\x00', b'\x08\x00', b'\x00\x08')          # what a file without preamble begins with
ITEM = b'\xfe\xff\x00\xe0'                                 # what encapsulated pixels begin with
DEFLATED, EXPLICIT = b'1.2.840.10008.1.2.1.99', b'1.2.840.10008.1.2.1\0\0\0'
RLE = '1.2.840.10008.1.2.5'


def _starts_like_dicom(path):
    try:
        with open(path, 'rb') as file:
            return os.path.isfile(path) and file.read(132)[128:] == b'DICM'
    except OSError:
        return False


@contextlib.contextmanager
def _quiet_header():
    """The texts of header errors quote the header, a patient's name with it; only their kind is passed on."""
    try:
        yield
    except pydicom.errors.InvalidDicomError:
        raise ValueError('not a DICOM file (no DICM mark after 128 bytes)') from None
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f'the DICOM header is damaged ({type(error).__name__})') from None


def _opened(path):
    """The file; or, of a deflated one, what it unpacks to: a plain file in memory, of two bytes a pixel at most."""
    file = open(path, 'rb')
    head = file.read(4096)
    mark = 132 if head[128:132] == b'DICM' else 0           # the file meta begins with its own length, in four bytes
    start = mark + 12 + int.from_bytes(head[mark + 8:mark + 12], 'little')
    if DEFLATED not in head[:start]:
        file.seek(0)
        return file
    with file:
        file.seek(start)
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        data = unpack.decompress(file.read(), 2 * MAX_PIXELS)
    if unpack.unconsumed_tail:
        raise ValueError(f'unpacks to more than two bytes for each of {_limit()}')
    return io.BytesIO(head[:start].replace(DEFLATED, EXPLICIT) + data)


def _header(path):
    """Everything before the pixels, where their element begins, and its first bytes."""
    with _opened(path) as file, _quiet_header():
        bare = file.read(2) in GROUPS
        file.seek(0)
        ds = pydicom.dcmread(file, stop_before_pixels=True, force=bare)
        at, first = file.tell(), file.read(24)
        ds.file_meta.TransferSyntaxUID = _syntax_of_elements(ds)
        rows, columns, syntax = ds.get('Rows'), ds.get('Columns'), ds.file_meta.TransferSyntaxUID
    if not rows or not columns or not syntax:
        raise ValueError('a DICOM file without an image (no rows, columns or transfer syntax)')
    _check_size(rows, columns)
    return ds, at, first


def _syntax_of_elements(ds):
    """The transfer syntax as declared; of what is not compressed, or declares none, as the first element is written."""
    declared, first = ds.file_meta.get('TransferSyntaxUID'), next(ds.elements(), None)
    if declared and declared not in UNCOMPRESSED.values() or not isinstance(first, pydicom.dataelem.RawDataElement):
        return declared
    return pydicom.uid.UID(UNCOMPRESSED[first.is_implicit_VR, first.is_little_endian])


def _dicom_frames(path, ds):
    with _quiet_header():
        count = int(ds.get('NumberOfFrames') or 1)
    if not 1 <= count <= os.path.getsize(path):
        raise ValueError(f'declares {count} frames in a file of {os.path.getsize(path)} bytes')
    return count


def _read_dicom(path, frame, voi):
    ds, at, first = _header(path)
    _check_frame(frame, _dicom_frames(path, ds))
    pixels = _grey(_decode(path, ds, at, first, frame))
    with _quiet_header():
        _flatten_groups(ds, frame)
        padding, inverted = _padding(ds, pixels), ds.PhotometricInterpretation == 'MONOCHROME1'
        pixels = _rescale(ds, pixels)
        if voi:
            pixels = _window(ds, pixels)
    return to_uint8(pixels, padding, inverted)


def _decode(path, ds, at, first, frame):
    """The stored values of one frame. Encapsulated pixels behind an uncompressed transfer syntax, as some Hologic
    archives hold them, are decoded by what the stream itself says it is."""
    syntax = ds.file_meta.TransferSyntaxUID
    if ds.get('SamplesPerPixel', 1) == 1 and ds.get('PhotometricInterpretation') not in ('MONOCHROME1', 'MONOCHROME2'):
        raise ValueError('neither MONOCHROME1 nor MONOCHROME2, so its values are not greys')
    try:
        if syntax.is_encapsulated or ITEM not in (first[8:12], first[12:16]):           # after tag, VR and length
            with _opened(path) as file:
                if syntax == RLE:
                    _check_runs(file, at, ds, frame)
                return pixel_array(file, index=frame, transfer_syntax_uid=syntax)
        ds = pydicom.dcmread(path, force=True)
        ds.file_meta.TransferSyntaxUID = syntax = _syntax_of_stream(ds.PixelData)
        ds['PixelData'].is_undefined_length = True
        return pixel_array(ds, index=frame)
    except Exception as error:
        reason = ' '.join(str(error).split())
        if syntax in OPTIONAL_DECODERS and 'missing dependencies' in reason:
            reason = f'needs a decoder: pip install {OPTIONAL_DECODERS[syntax]}'
        elif 'cannot reshape' in reason or 'could not broadcast' in reason:
            reason = f'they are not {ds.Columns}x{ds.Rows}; the file is cut short or its header is wrong'
        elif '12-bit precision' in reason:
            reason = 'no Python decoder reads its 12 bits; convert the file first, with dcmdjpeg of DCMTK for example'
        raise ValueError(f'{syntax.name} pixels cannot be decoded: {reason}') from error


def _check_runs(file, at, ds, frame):
    """RLE grows up to 64-fold: its runs are counted before they are unpacked. One segment is one byte of each pixel."""
    file.seek(at + 12)                                      # after tag, VR and length
    data = get_frame(file, frame, number_of_frames=int(ds.get('NumberOfFrames') or 1))
    file.seek(0)
    count, *starts = struct.unpack('<16L', data[:64])
    most = 2 * ds.Rows * ds.Columns                         # twice what is declared, for what pads the end
    for start, end in itertools.pairwise([*starts[:count], len(data)]):
        i, total, segment = 0, 0, data[start:end]
        while i < len(segment) and total <= most:
            n = segment[i]                                  # n + 1 bytes follow, or one that stands for 257 - n
            total += n + 1 if n < 128 else 257 - n if n > 128 else 0
            i += n + 2 if n < 128 else 2 if n > 128 else 1
        if total > most:
            raise ValueError('they unpack to more than the header declares')


def _syntax_of_stream(data):
    """The transfer syntax of encapsulated pixels, by the frame header of their first JPEG stream."""
    at = data.find(b'\xff\xd8\xff', 0, 4096) + 2
    if at == 1 and data.find(b'\xff\x4f\xff\x51', 0, 4096) >= 0:
        return pydicom.uid.JPEG2000
    while 1 < at < len(data) - 3 and data[at] == 0xFF and data[at + 1] != 0xDA:         # up to the start of scan
        if data[at + 1] in FRAME_HEADERS:
            return pydicom.uid.UID(FRAME_HEADERS[data[at + 1]])
        at += 2 + int.from_bytes(data[at + 2:at + 4], 'big')
    raise ValueError('they are encapsulated while the header declares them uncompressed, and are of no known kind')


def _padding(ds, pixels):
    """bool (H, W), True where the stored value is PixelPaddingValue or in its range; None where nothing is."""
    low, high = ds.get('PixelPaddingValue'), ds.get('PixelPaddingRangeLimit')
    if low is None:
        return None
    kind = 'i2' if ds.PixelRepresentation else 'u2'                                     # some write -2000 as 63536
    low, high = sorted(np.array([low, low if high is None else high]).astype(kind).tolist())
    padding = (pixels >= low) & (pixels <= high)
    return padding if padding.any() else None


def _rescale(ds, pixels):
    """The modality LUT, or slope and intercept. The stretch undoes both, but for the sign and for a window."""
    if ds.get('ModalityLUTSequence'):
        return _look_up(ds.ModalityLUTSequence[0], pixels)
    slope, intercept = float(ds.get('RescaleSlope') or 1), float(ds.get('RescaleIntercept') or 0)
    return pixels if (slope, intercept) == (1, 0) else pixels * slope + intercept


def _look_up(item, values):
    """A modality or VOI LUT, PS3.3 C.11.1.1: values before its first entry take that, values behind its last take that.

    pydicom's own counts in the type of the pixels or of the entries, and wraps round where the table is the longer.
    """
    (count, first, _), table = item.LUTDescriptor, item.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, '<u2' if item.original_encoding[1] else '>u2')
    table = np.asarray(table)[:count or 65536]
    return table[(values.astype(np.int64) - first).clip(0, len(table) - 1)]


def _window(ds, x):
    """The first VOI LUT, else the first window to 0..1 (PS3.3 C.11.2.1), else the values as they are.

    pydicom's own window falls where the slope of the rescale does.
    """
    if ds.get('VOILUTSequence') and 'LUTData' in ds.VOILUTSequence[0]:
        return _look_up(ds.VOILUTSequence[0], x)
    if ds.get('WindowCenter') is None or ds.get('WindowWidth') is None:
        return x
    center, width = (float(np.ravel(ds[name].value)[0]) for name in ('WindowCenter', 'WindowWidth'))
    function = (ds.get('VOILUTFunction') or 'LINEAR').upper()
    if function == 'LINEAR':
        center, width = center - 0.5, width - 1
    if function not in ('LINEAR', 'LINEAR_EXACT', 'SIGMOID') or width < 0:
        raise ValueError('no window')
    width = max(width, 1e-9)                                # a threshold
    if function == 'SIGMOID':
        return 1 / (1 + np.exp(-4 * (x - center) / width))
    return ((x - center) / width + 0.5).clip(0, 1)


def _flatten_groups(ds, frame):
    """Enhanced multi-frame files keep rescale and window in groups, shared or per frame; put them into the root."""
    groups = list(ds.get('SharedFunctionalGroupsSequence', []))[:1] \
        + list(ds.get('PerFrameFunctionalGroupsSequence', []))[frame:frame + 1]
    for group in groups:
        for name in ('PixelValueTransformationSequence', 'FrameVOILUTSequence'):
            for item in list(group.get(name, []))[:1]:
                ds.update(item)


# ---- python mask.py prepare ---------------------------------------------------------------------------------------

def prepare(src, dst, side=1024, workers=None):
    """Once per data set: read -> CLAHE -> shrink -> DST/<same relative path>.npy, volumes stay volumes (K, h, w).

    The shorter side becomes at most `side` pixels. Finished files are skipped, whatever their side, so a stopped run
    goes on; each file is written beside its place and moved there whole. Unreadable files are listed in
    DST/rejected.csv with the reason.
    Returns (written, skipped, rejected).
    """
    src, dst = Path(src), Path(dst)
    if dst.resolve().is_relative_to(src.resolve()):
        raise ValueError(f'{dst} lies in {src}, it would be prepared again next time; choose a folder outside')
    if side < 1 or workers is not None and workers < 1:
        raise ValueError(f'--side {side} and --workers {workers}: expected at least 1')
    files, todo, taken, skipped, written, rejected = listing(src), [], {}, 0, 0, []
    dst.mkdir(parents=True, exist_ok=True)
    lock = claim(dst)                                       # held until the end
    for path in files:
        relative = os.path.relpath(path, src)
        stem, suffix = os.path.splitext(relative)
        target = os.path.join(dst, (stem if suffix.lower() in SUFFIXES else relative) + '.npy')
        if target in taken:
            rejected.append((relative, f'would become the same file as {taken[target]}; rename one'))
        elif os.path.exists(target):
            skipped += 1
        else:
            todo.append((path, target))
        taken.setdefault(target, relative)

    results = _results(todo, side, workers)
    try:
        for path, reason in tqdm(results, total=len(todo), unit='file'):
            written += not reason
            if reason:
                rejected.append((os.path.relpath(path, src), reason))
    except BaseException as error:
        results.close()
        with contextlib.suppress(OSError):
            _list_rejected(dst, rejected)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(f'{dst} cannot be written ({error.strerror}); free some space and start again, it goes on '
                          'from here') from error
        raise
    _list_rejected(dst, rejected)
    return written, skipped, len(rejected)


def _list_rejected(dst, rejected):
    with _whole(dst / 'rejected.csv') as part, \
            open(part, 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file).writerows([('file', 'reason'), *sorted(rejected)])


def claim(folder):
    """An open file that keeps others out of the folder until it is closed or the process ends, however it ends.
    ValueError where another process holds it."""
    file = open(Path(folder) / '.lock', 'w')
    with contextlib.suppress(ImportError):                  # Windows has none
        from fcntl import LOCK_EX, LOCK_NB, lockf
        try:
            lockf(file, LOCK_EX | LOCK_NB)                  # of this process alone: data workers do not inherit it
        except (BlockingIOError, PermissionError):
            raise ValueError(f'{folder}: another process is writing there; wait for it, or choose another folder') \
                from None
        except OSError:                                     # a file system without locks
            pass
    return file


def follow_parent():
    """For the processes of a pool: Ctrl-C is their parent's affair, and they end soon after it, however it ends."""
    def watch(parent):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # a pool ends its processes by it
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def _pool(workers):
    return ProcessPoolExecutor(workers, initializer=follow_parent)


def _results(todo, side, workers, ahead=64):
    """(path, why not) of each file as it is done; only `ahead` are handed out, so a million cost no memory.

    Where a process dies, of a decoder that crashes or for want of memory, the files at work are done again, each alone
    in a process of its own; the file that kills its process again is at fault."""
    todo, pool, at_work = iter(todo), _pool(workers), {}
    try:
        while True:
            fresh = list(itertools.islice(todo, ahead - len(at_work)))[::-1]
            try:
                while fresh:
                    at_work[pool.submit(_prepare_one, *fresh[-1], side)] = fresh[-1]
                    fresh.pop()
                if not at_work:
                    return
                for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                    reason = future.result()
                    yield at_work.pop(future)[0], reason
            except BrokenProcessPool:
                pool.shutdown()                             # the others have ended; nobody writes these files now
                for path, target in (*at_work.values(), *fresh):
                    yield path, _alone(path, target, side)
                pool, at_work = _pool(workers), {}
    except KeyboardInterrupt:
        print('\nstopping after the files at work', file=sys.stderr)
        patience = signal.signal(signal.SIGINT, signal.SIG_IGN)     # a second Ctrl-C would leave workers behind
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, patience)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(path, target, side):
    with _pool(1) as pool:
        try:
            return pool.submit(_prepare_one, path, target, side).result()
        except BrokenProcessPool:
            Path(f'{target}.part').unlink(missing_ok=True)
            return 'the process died over it: its decoder crashed, or memory ran out'


@contextlib.contextmanager
def _whole(target):
    """A path beside `target` to write to; moved there when all is well, removed otherwise."""
    part = Path(f'{target}.part')
    try:
        yield part
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)      # what ends the run, not the file


def _prepare_one(path, target, side):
    """None, or why this file cannot be prepared. OSError where nothing can be written any more."""
    try:
        count = frames(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with _whole(target) as part, open(part, 'wb') as file:
            for k in range(count):
                image = Image.fromarray(clahe(read(path, k)))
                shrink = min(1.0, side / min(image.size))
                size = tuple(max(1, round(length * shrink)) for length in image.size)   # (w, h)
                image = np.asarray(image.resize(size, Image.Resampling.BICUBIC) if shrink < 1 else image)
                if k == 0:
                    shape = image.shape if count == 1 else (count, *image.shape)
                    np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False, shape=shape))
                if image.shape != shape[-2:]:
                    raise ValueError(f'frame {k} is of another size than frame 0')
                file.write(image.tobytes())
    except Exception as error:                              # one file never ends the run
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        return str(error).removeprefix(f'{path}: ') or type(error).__name__


def _main(arguments):
    usage = 'mask.py [FILE] [OUT.png]  |  mask.py prepare SRC DST [--side 1024] [--workers N]'
    if arguments[:1] == ['prepare']:
        parser = argparse.ArgumentParser(usage=usage)
        parser.add_argument('src', help='folder of images')
        parser.add_argument('dst', help='folder of .npy to write')
        parser.add_argument('--side', type=int, default=1024,
                            help='pixels of the shorter side at most; files that are there already keep theirs')
        parser.add_argument('--workers', type=int, help='processes (default: all cores)')
        signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C
        start = time.time()
        written, skipped, rejected = prepare(**vars(parser.parse_args(arguments[1:])))
        print(f'{written} written, {written / (time.time() - start):.1f} files/s, {skipped} were there, {rejected} '
              'rejected (named in DST/rejected.csv)')
        if not written + skipped:
            raise ValueError('not one file could be prepared')
        return
    parser = argparse.ArgumentParser(usage=usage)
    parser.add_argument('file', nargs='?', help='an image; without one, a phantom')
    parser.add_argument('out', nargs='?', default='tissue.png', help='the picture to write')
    args = parser.parse_args(arguments)
    if args.file:
        count = frames(args.file)
        image = read(args.file, count // 2)
        image = image if _kind(args.file) == 'npy' else clahe(image)
        mask = tissue(image, percentile=None)
        print(f'{args.file}: {image.shape[1]}x{image.shape[0]}, {count} frame(s), tissue {mask.mean():.1%}')
    else:
        example = phantom(np.random.default_rng(0), width=288)
        image, truth = clahe(to_uint8(example.volume[0])), example.tissue
        mask = tissue(image, percentile=None)
        for name, m in [('self-tuning', mask), ('percentile 40', tissue(image))]:
            print(f'{name:14s} overlap with the true mask {(m & truth).sum() / (m | truth).sum():.3f}')
    Image.fromarray(overlay(image, mask)).save(args.out)
    print(f'-> {args.out}')


if __name__ == '__main__':
    try:
        _main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f'mask.py: {error}')
    except KeyboardInterrupt:
        sys.exit('mask.py: stopped; the same command goes on from here')
