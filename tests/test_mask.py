"""mask.py: the tissue mask equals its definition."""
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy import ndimage

import mask
import phantom


def dilated(m, kernel):
    return ndimage.binary_dilation(m, np.ones((kernel, kernel)))


def eroded(m, kernel):
    return ndimage.binary_erosion(m, np.ones((kernel, kernel)), border_value=1)


def test_tissue_is_the_written_rule():
    rng = np.random.default_rng(0)
    for shape, kernel in [((70, 50), 9), ((33, 64), 5), ((20, 20), 1)]:
        smooth = ndimage.gaussian_filter(rng.random(shape), 3)
        image = np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))
        for tau in (10, 40, 77.7):
            x = image / 255
            closed = eroded(dilated(x > np.percentile(x, tau), kernel), kernel)
            opened = dilated(eroded(closed, kernel), kernel)
            np.testing.assert_array_equal(mask.tissue(image, tau, kernel), opened)


def test_dilation_and_erosion_are_the_textbook_ones_for_every_kernel():
    """Kernels wider than the image, too."""
    rng = np.random.default_rng(0)
    for shape in ((70, 1), (3, 63), (40, 65), (9, 200)):
        for kernel in (1, 3, 9, 33, 65, 131):
            m = rng.random(shape) < rng.choice([0.02, 0.98])
            np.testing.assert_array_equal(mask.dilation(m, kernel), dilated(m, kernel))
            np.testing.assert_array_equal(mask.erosion(m, kernel), eroded(m, kernel))


def test_otsu_minimises_the_variance_within_both_classes():
    image = np.random.default_rng(0).normal(90, 40, (31, 47)).clip(0, 255).astype(np.uint8)

    def within(t):
        parts = image[image <= t], image[image > t]
        return sum(part.size * part.var() for part in parts if part.size)

    assert within(mask.otsu(image)) == pytest.approx(min(within(t) for t in range(255)))


@pytest.mark.parametrize('air', [0, 12])
def test_the_self_tuning_mask_keeps_the_breast_and_drops_labels_and_frames(air):
    rng = np.random.default_rng(0)
    for seed in range(12):
        breast = phantom.breast(np.random.default_rng(seed))
        image = np.maximum(breast.volume[0], np.uint8(rng.integers(0, air + 1, breast.tissue.shape)))
        label = np.zeros_like(breast.tissue)
        columns = slice(4, 30) if not breast.tissue[:, :34].any(0)[4:30].all() else slice(-30, -4)
        label[3:15, columns] = True
        label &= ~ndimage.binary_dilation(breast.tissue, iterations=5)
        image[label] = 255
        image[:3] = image[-3:] = 230                                    # a film's edges
        m = mask.tissue(image, percentile=None)
        assert (m & breast.tissue).sum() / (m | breast.tissue).sum() > 0.95
        assert not (m & label).any()


def test_the_self_tuning_mask_of_a_large_image_keeps_its_outline():
    """It is found on a reduced image: here an eighth, with odd sides and the noise of single pixels."""
    breast = phantom.breast(np.random.default_rng(1))
    size = (8 * 192 - 3, 8 * 256 - 5)
    image = np.asarray(Image.fromarray(breast.volume[0]).resize(size, Image.Resampling.BICUBIC)).astype(int)
    image = np.uint8((image + np.random.default_rng(0).integers(0, 12, image.shape)).clip(0, 255))
    truth = np.asarray(Image.fromarray(breast.tissue).resize(size))
    m = mask.tissue(image, percentile=None)
    assert m.shape == image.shape and (m & truth).sum() / (m | truth).sum() > 0.97


@pytest.mark.parametrize('percentile', [None, 40])
def test_an_image_without_contrast_has_no_tissue(percentile):
    for value in (0, 255):
        assert not mask.tissue(np.full((40, 40), value, np.uint8), percentile).any()


def test_the_command_line_shows_the_mask(tmp_path):
    np.save(tmp_path / 'a.npy', phantom.breast(np.random.default_rng(0)).volume[0])
    for arguments, status, words in [((), 0, 'IoU with the truth'), (('a.npy', 'o.png'), 0, 'tissue is '),
                                     (('absent.png',), 1, 'mask.py: absent.png: No such file')]:
        done = subprocess.run([sys.executable, ROOT / 'mask.py', *arguments], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == status and words in done.stdout + done.stderr
    assert Image.open(tmp_path / 'o.png').size == (192, 256)
