"""The breast-tissue mask M (MammoDINO, arXiv 2510.11883, 2.2): which pixels of a mammogram are breast.

H W are pixels. Copy this file alone; it imports nothing of this repository (only its demonstration does).

    $ python mask.py                        # a phantom: the mask against the truth
    $ python mask.py FILE [OUT.png]         # any image: the mask drawn over it, and its share of the image
"""
import sys

import numpy as np
from PIL import Image
from scipy import ndimage

# ---- the mask (2.2) -------------------------------------------------------------------------------

def tissue(image, percentile=40, kernel=9):
    """The breast-tissue mask M of a uint8 image, bool (H, W).

        theta = percentile(x, tau),   M0 = 1[x > theta],   M = opening(closing(M0))

    Closing and opening use a square of kernel x kernel pixels. The paper normalizes x to [0, 1] first;
    that keeps the order of the pixels, so theta can be taken on the grey levels.

    The paper does not give tau; 40 is ours. A percentile makes each breast the same share of its image,
    but real shares differ threefold. pretrain.py therefore uses `percentile=None`, the `self_tuning` mask.
    Raises ValueError for an image that is not 8-bit grey, an even kernel, a percentile outside 0..100.
    """
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f'{image.dtype} of shape {image.shape}; expected a uint8 image (H, W)')
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f'kernel {kernel}: expected an odd number of pixels')
    if percentile is None:
        return self_tuning(image, kernel)
    theta = np.percentile(image, percentile)
    return opening(closing(image > theta, kernel), kernel)


def self_tuning(image, kernel=9):
    """What pretrain.py uses, not the paper's M: Otsu's threshold, the largest piece, holes filled."""
    # 1. Average f x f pixels, to a shorter side of 192 or more: outlines need no more detail.
    H, W = image.shape
    f = max(1, min(H, W) // 192)
    small = np.asarray(Image.fromarray(image).reduce(f))

    # 2. Threshold a quarter of the way from the air (10th percentile of Otsu's dark class) to Otsu's
    #    threshold. The air is not always 0: film has a grey base, and CLAHE amplifies its noise.
    t = otsu(small)
    air = np.percentile(small[small <= t], 10)
    mask = small > int(air + (t - air) / 4)

    # 3. Close and open as the paper does. The kernel shrinks with the image, but not below 3.
    kernel = max(min(3, kernel), (kernel // f) | 1)                 # | 1 makes it odd
    mask = opening(closing(mask, kernel), kernel)

    # 4. Open with a kernel of 1/16 of the shorter side: labels and film edges come off the breast.
    wide = max(kernel, (min(small.shape) // 16) | 1)
    core = largest_piece(opening(mask, wide))

    # 5. That rounded the outline. Grow the core back within the mask of step 3; fill holes, dark fat.
    mask = ndimage.binary_fill_holes(largest_piece(mask & dilation(core, wide)))
    return mask.repeat(f, axis=0).repeat(f, axis=1)[:H, :W]


def otsu(image):
    """The grey level t that best separates dark (x <= t) from bright pixels (Otsu 1979): it maximises the
    variance between them, (mu omega - m)^2 / (omega (1 - omega)), where omega is the share of dark
    pixels, m their first moment and mu the mean of the image."""
    share = np.bincount(image.ravel(), minlength=256) / image.size
    omega, m = share.cumsum(), (share * np.arange(256)).cumsum()    # (256,) each, one entry for every t
    mu, variance = m[-1], np.zeros(256)
    both = (omega > 0) & (omega < 1)                                # neither class is empty
    variance[both] = (mu * omega[both] - m[both]) ** 2 / (omega[both] * (1 - omega[both]))
    return int(variance.argmax()) if both.any() else int(image.flat[0])     # a constant image


def overlay(image, mask):
    """The outline of the mask in yellow over the image, uint8 (H, W, 3)."""
    picture = np.repeat(image[..., None], 3, axis=-1)
    pen = max(3, (min(image.shape) // 200) | 1)
    picture[dilation(mask, pen) & ~erosion(mask, pen)] = (255, 200, 0)
    return picture


# ---- morphology -----------------------------------------------------------------------------------

def closing(mask, kernel):
    """Fills gaps in which no kernel x kernel window fits."""
    return erosion(dilation(mask, kernel), kernel)


def opening(mask, kernel):
    """Removes pieces in which no kernel x kernel window fits."""
    return dilation(erosion(mask, kernel), kernel)


def dilation(mask, kernel):
    """True where any pixel of the window around it is. Equals ndimage.binary_dilation with a square of
    ones, in a fraction of its time: an OR with a copy shifted by `step` rows adds as many."""
    for _ in range(2):                                              # rows, then columns
        seen = np.pad(mask, ((kernel // 2, kernel // 2), (0, 0)))
        span = 1                                                    # rows that one of its rows covers
        while span < kernel:
            step = min(span, kernel - span)
            seen, span = seen[:-step] | seen[step:], span + step
        mask = seen.T
    return mask


def erosion(mask, kernel):
    """True where the whole window is. Pixels outside the image count as True: the border erodes nothing."""
    return ~dilation(~mask, kernel)


def largest_piece(mask):
    labels, count = ndimage.label(mask)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else mask    # 0 is background


if __name__ == '__main__':
    if {'-h', '--help'} & {*sys.argv}:
        sys.exit(print(__doc__))
    path, out = [*(sys.argv[1:] or [None]), 'tissue.png'][:2]
    try:
        import images
        import phantom
        if path:
            image = images.read(path, images.frames(path) // 2)     # of a volume the middle slice
            image = image if path.endswith('.npy') else images.clahe(image)
        else:
            example = phantom.breast(np.random.default_rng(0), width=288)
            image, truth = images.clahe(images.to_uint8(example.volume[0])), example.tissue
            for name, m in (('self-tuning', tissue(image, None)), ('percentile 40', tissue(image))):
                print(f'{name:13}  IoU with the truth {(m & truth).sum() / (m | truth).sum():.3f}')
        found = tissue(image, None)
        Image.fromarray(overlay(image, found)).save(out)
        print(f'tissue is {found.mean():.1%} of the image -> {out}')
    except (ImportError, ValueError, OSError) as problem:
        sys.exit(f'mask.py: {problem}')
