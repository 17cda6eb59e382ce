"""phantom.py: a synthetic breast is what it says."""
import csv

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
        z, x0, y0, x1, y1 = breast.boxes[0]
        assert breast.tissue[int((y0 + y1) / 2), int((x0 + x1) / 2)]
        centre = breast.volume[:, int((y0 + y1) / 2), int((x0 + x1) / 2)].astype(int)
        far = np.abs(np.arange(8) - z) > 3
        assert centre[int(z)] > centre[far].mean()
        assert (breast.volume[:, ~breast.tissue] == 0).all()
        shares.append(np.median(breast.volume[:, breast.tissue]))
    assert shares == sorted(shares)
    plain = phantom.breast(np.random.default_rng(5), lesion=False)
    assert plain.volume.shape == (1, 256, 192) and plain.boxes.shape == (0, 5) and plain.cancer == 0
    np.testing.assert_array_equal(plain.volume, phantom.breast(np.random.default_rng(5), lesion=False).volume)


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
    pair = phantom.breast(np.random.default_rng(3), slices=8, lesion=True, contrasts=(1, 0))
    twin = phantom.breast(np.random.default_rng(3), slices=8, lesion=True, contrasts=(0, 0))
    assert pair.ffdm.shape == pair.sm.shape == (256, 192)
    assert (pair.ffdm != twin.ffdm).any() and (pair.sm == twin.sm).all()
    with pytest.raises(ValueError, match='contrasts project a volume'):
        phantom.breast(np.random.default_rng(3), contrasts=(1, 0))


def test_a_data_set_of_phantoms_lies_as_prepare_leaves_it(tmp_path):
    np.save(tmp_path / 'old.npy', np.zeros(3))
    volumes = [np.full((k, 9, 7), k, np.uint8) for k in (1, 4)]
    phantom.dataset(tmp_path, volumes)
    with open(tmp_path / 'index.csv', newline='') as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == [('0000.npy', '1', '9', '7'),
                                                                         ('0001.npy', '4', '9', '7')]
    assert np.load(tmp_path / '0000.npy').shape == (9, 7) and np.load(tmp_path / '0001.npy').shape == (4, 9, 7)
    assert not (tmp_path / 'old.npy').exists()
