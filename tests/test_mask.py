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


def square(mask, kernel, function, outside):
    return function(np.pad(mask, kernel, constant_values=outside), size=kernel)[kernel:-kernel, kernel:-kernel]


def test_tissue_is_the_written_rule():
    rng = np.random.default_rng(0)
    for shape, kernel in [((70, 50), 9), ((33, 64), 5), ((20, 20), 1)]:
        image = np.uint8(255 * (lambda f: (f - f.min()) / np.ptp(f))(ndimage.gaussian_filter(rng.random(shape), 3)))
        for tau in (10, 40, 77.7):
            x = (image - image.min()) / np.ptp(image)
            m = x > np.percentile(x, tau)
            for function, outside in [(ndimage.maximum_filter, 0), (ndimage.minimum_filter, 1),
                                      (ndimage.minimum_filter, 1), (ndimage.maximum_filter, 0)]:
                m = square(m, kernel, function, outside)
            np.testing.assert_array_equal(mask.tissue(image, tau, kernel), m)


def test_dilation_and_erosion_are_the_textbook_ones_for_every_kernel():
    """Beside the slow, obvious ones; kernels wider than the image, too."""
    rng = np.random.default_rng(0)
    for shape in ((70, 1), (3, 63), (40, 65), (9, 200)):
        for kernel in (1, 3, 9, 33, 65, 131):
            m = rng.random(shape) < rng.choice([0.02, 0.98])
            ones = np.ones((kernel, kernel))
            np.testing.assert_array_equal(mask.dilation(m, kernel), ndimage.binary_dilation(m, ones))
            np.testing.assert_array_equal(mask.erosion(m, kernel), ndimage.binary_erosion(m, ones, border_value=1))


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


def test_the_self_tuning_mask_of_a_large_image_is_that_of_its_reduction_to_a_few_pixels():
    """What is enlarged eight times, with odd sides and the noise of single pixels, keeps its outline."""
    breast = phantom.breast(np.random.default_rng(1))
    size = (8 * 192 - 3, 8 * 256 - 5)
    image = np.asarray(Image.fromarray(breast.volume[0]).resize(size, Image.Resampling.BICUBIC)).astype(int)
    image = np.uint8((image + np.random.default_rng(0).integers(0, 12, image.shape)).clip(0, 255))
    truth = np.asarray(Image.fromarray(breast.tissue).resize(size))
    m = mask.tissue(image, percentile=None)
    assert m.shape == image.shape and (m & truth).sum() / (m | truth).sum() > 0.97
    assert m[:8, :8].all() or not m[:8, :8].any()                           # one mean of 8 x 8 pixels


def test_what_is_not_an_8_bit_image_is_refused():
    for wrong, words in [(dict(image=np.zeros((9, 9), np.uint16)), 'expected a uint8 image'),
                         (dict(image=np.zeros((2, 9, 9), np.uint8)), 'expected a uint8 image'),
                         (dict(image=np.zeros((9, 9), np.uint8), kernel=4), 'expected an odd number')]:
        with pytest.raises(ValueError, match=words):
            mask.tissue(**wrong)


def test_an_image_without_contrast_has_no_tissue():
    for value in (0, 255):
        assert not mask.tissue(np.full((40, 40), value, np.uint8), percentile=None).any()
        assert not mask.tissue(np.full((40, 40), value, np.uint8)).any()


def test_the_command_line_shows_the_mask(tmp_path):
    np.save(tmp_path / 'a.npy', phantom.breast(np.random.default_rng(0)).volume[0])
    for arguments, words in [((), 'IoU with the truth'), ((tmp_path / 'a.npy', tmp_path / 'o.png'), 'tissue is ')]:
        done = subprocess.run([sys.executable, ROOT / 'mask.py', *arguments], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == 0 and words in done.stdout, done.stderr
    assert Image.open(tmp_path / 'o.png').size == (192, 256)
    done = subprocess.run([sys.executable, ROOT / 'mask.py', tmp_path / 'absent.png'], capture_output=True, text=True)
    assert done.returncode == 1 and 'No such file' in done.stderr and 'Traceback' not in done.stderr
