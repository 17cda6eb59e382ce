"""The breast-tissue mask (MammoDINO, arXiv 2510.11883, 2.2).

    tissue(image)      ->  bool (H, W)       the mask M that crops and patch masks are drawn from

Copy this file alone; it imports nothing of this repository.

    $ python mask.py                                      # a phantom: the mask against the truth
    $ python mask.py FILE [OUT.png]                       # any image: the mask drawn over it, and its share
"""
import argparse
import sys

import numpy as np
from PIL import Image
from scipy import ndimage


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


def _histogram(image):
    return np.array(Image.fromarray(image).histogram())


def _main(arguments):
    from images import clahe, frames, read, to_uint8
    from phantom import breast
    parser = argparse.ArgumentParser(usage='mask.py [FILE] [OUT.png]')
    parser.add_argument('file', nargs='?', help='an image; without one, a phantom')
    parser.add_argument('out', nargs='?', default='tissue.png', help='the picture to write')
    args = parser.parse_args(arguments)
    if args.file:
        count = frames(args.file)
        image = read(args.file, count // 2)
        image = image if args.file.lower().endswith('.npy') else clahe(image)
        mask = tissue(image, percentile=None)
        print(f'{args.file}: {image.shape[1]}x{image.shape[0]}, {count} frame(s), tissue {mask.mean():.1%}')
    else:
        example = breast(np.random.default_rng(0), width=288)
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
