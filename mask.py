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

    Closing and opening use a square of kernel x kernel pixels. The paper first normalises x to [0, 1];
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
    # 1. Average squares of pixels, to a shorter side of 192 or more: outlines need no more detail.
    H, W = image.shape
    shrink = max(1, min(H, W) // 192)
    small = np.asarray(Image.fromarray(image).reduce(shrink))

    # 2. Threshold a quarter of the way from the air (10th percentile of Otsu's dark class) to Otsu's
    #    threshold. The air is not always 0: film has a grey base, and CLAHE amplifies its noise.
    t = otsu(small)
    air = np.percentile(small[small <= t], 10)
    mask = small > int(air + (t - air) / 4)

    # 3. Close and open as the paper does. The kernel shrinks with the image, but not below 3.
    kernel = max(min(3, kernel), (kernel // shrink) | 1)                # | 1 makes it odd
    mask = opening(closing(mask, kernel), kernel)

    # 4. Open with a kernel of 1/16 of the shorter side: labels and film edges come off the breast.
    wide = max(kernel, (min(small.shape) // 16) | 1)
    core = largest_piece(opening(mask, wide))

    # 5. That rounded the outline. Grow the core back within the mask of step 3; fill holes, dark fat.
    mask = ndimage.binary_fill_holes(largest_piece(mask & dilation(core, wide)))
    return mask.repeat(shrink, axis=0).repeat(shrink, axis=1)[:H, :W]


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
    """True where any pixel of the window around it is. Equal to ndimage.binary_dilation and faster, since an
    OR with a copy shifted by `rows` doubles the rows that a row covers (`python tests/bench.py tricks`)."""
    for _ in range(2):                                              # rows, then columns
        covered = np.pad(mask, ((kernel // 2, kernel // 2), (0, 0)))
        rows = 1                                                    # that each of its rows covers
        while rows < kernel:
            shift = min(rows, kernel - rows)
            covered = covered[:-shift] | covered[shift:]
            rows += shift
        mask = covered.T
    return mask


def erosion(mask, kernel):
    """True where the whole window is. Pixels outside the image count as True: the border erodes nothing."""
    return ~dilation(~mask, kernel)


def largest_piece(mask):
    labels, count = ndimage.label(mask)
    return labels == 1 + np.bincount(labels.ravel())[1:].argmax() if count else mask    # 0 is background


if __name__ == '__main__':
    if '-h' in sys.argv or '--help' in sys.argv:
        print(__doc__)
        sys.exit()
    path = sys.argv[1] if len(sys.argv) > 1 else None
    out = sys.argv[2] if len(sys.argv) > 2 else 'tissue.png'
    try:
        import images
        import phantom
        if path:
            image = images.read_equalised(path, images.frames(path) // 2)       # middle slice of a volume
            m = tissue(image, percentile=None)
        else:
            breast = phantom.breast(np.random.default_rng(0), width=288)
            image = images.clahe(images.to_uint8(breast.volume[0]))
            m, truth = tissue(image, percentile=None), breast.tissue
            print(f'IoU with the truth {(m & truth).sum() / (m | truth).sum():.3f}')
        Image.fromarray(overlay(image, m)).save(out)
        print(f'tissue is {m.mean():.1%} of the image -> {out}')
    except (ImportError, ValueError, OSError) as problem:
        sys.exit(f'mask.py: {problem}')
