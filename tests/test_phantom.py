"""phantom.py: a synthetic breast is what it says."""

import numpy as np
import pytest
from scipy import ndimage

import phantom


def test_phantoms_are_what_they_say():
    shares = []
    for density in range(4):
        breast = phantom.breast(np.random.default_rng(5), slices=8, density=density, lesion=True)
        assert breast.volume.shape == (8, 256, 192) and breast.volume.dtype == np.uint8
        assert breast.density == density and breast.cancer == 1
        z, x0, y0, x1, y1 = breast.boxes[0].astype(int)
        y, x = (y0 + y1) // 2, (x0 + x1) // 2
        far = np.abs(np.arange(8) - z) > 3
        assert breast.tissue[y, x] and breast.volume[z, y, x] > breast.volume[far, y, x].mean()
        assert (breast.volume[:, ~breast.tissue] == 0).all()
        shares.append(np.median(breast.volume[:, breast.tissue]))
    assert shares == sorted(shares)
    plain = phantom.breast(np.random.default_rng(5), lesion=False)
    assert plain.volume.shape == (1, 256, 192) and plain.boxes.shape == (0, 5) and plain.cancer == 0


def test_slices_of_a_volume_lose_their_likeness_with_depth_as_the_docstring_says():
    """Six volumes; the docstring has the mean of 24."""
    found = [phantom.breast(np.random.default_rng([99, 9, i]), slices=16) for i in range(6)]
    for apart, expected in ((1, 0.88), (2, 0.73), (4, 0.42), (8, 0.12)):
        alike = []
        for breast in found:
            inside = ndimage.binary_erosion(breast.tissue, iterations=43)           # a sixth of the height
            pairs = zip(breast.volume[apart:], breast.volume)
            alike += [np.corrcoef(a[inside], b[inside])[0, 1] for a, b in pairs]
        assert np.mean(alike) == pytest.approx(expected, abs=0.06)


def test_a_lesion_can_show_in_one_projection_alone():
    pair, twin = (phantom.breast(np.random.default_rng(3), slices=8, lesion=True, contrasts=(contrast, 0))
                  for contrast in (1, 0))
    assert pair.ffdm.shape == pair.sm.shape == (256, 192)
    assert (pair.ffdm != twin.ffdm).any() and (pair.sm == twin.sm).all()
