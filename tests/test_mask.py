"""mask.py: every kind of file becomes the same 8-bit mammogram; CLAHE and the tissue mask equal their definitions."""
import csv
import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pydicom
import pytest
from conftest import CASES, ROOT
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (ExplicitVRBigEndian, ExplicitVRLittleEndian, HTJ2KLossless, ImplicitVRLittleEndian,
                         JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, RLELossless)
from scipy import ndimage

import images
import mask
import phantom
import prepare

GDCM = importlib.util.find_spec('gdcm') is not None


def ramp(dtype=np.uint16, shape=(40, 30), low=100, high=4000):
    return np.linspace(low, high, shape[0] * shape[1]).reshape(shape).astype(dtype)


def stretched(pixels):
    """The definition: min-max to 0..255, rounded."""
    x = pixels.astype(np.float64)
    return np.uint8(np.rint((x - x.min()) * (255 / (x.max() - x.min()))))


def dicom(path, pixels, syntax=ExplicitVRLittleEndian, data=None, **elements):
    """Write pixels (H, W), (K, H, W) or (H, W, 3) as a DICOM file; `elements` override the header, None removes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = '1.2.840.10008.5.1.4.1.1.1.2', '1.2.3'
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b'\0' * 128)
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = meta.MediaStorageSOPClassUID, '1.2.3', 'MG'
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel = 3 if colour else 1
    ds.PhotometricInterpretation = 'RGB' if colour else 'MONOCHROME2'
    if colour:
        ds.PlanarConfiguration = 0
    if pixels.ndim == 3 and not colour:
        ds.NumberOfFrames = len(pixels)
    ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == 'i')
    ds.PixelData = pixels.tobytes() if data is None else data
    for name, value in elements.items():
        if value is None:
            del ds[name]
        else:
            setattr(ds, name, value)
    ds['PixelData'].VR = 'OB' if pixels.dtype.itemsize == 1 else 'OW'
    if syntax == RLELossless:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless)
    elif syntax.is_compressed:
        ds['PixelData'].is_undefined_length = True
    if syntax == ExplicitVRBigEndian:
        pydicom.dcmwrite(path, ds, implicit_vr=False, little_endian=False, force_encoding=True)
    else:
        ds.save_as(path, enforce_file_format=True)
    return path


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


# ---- reading ------------------------------------------------------------------------------------------------------

def test_every_file_kind_gives_the_same_mammogram(tmp_path):
    pixels = ramp()
    eight = stretched(pixels)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    Image.fromarray(eight).save(tmp_path / 'b.png')
    Image.fromarray(pixels).save(tmp_path / 'c.tiff')
    Image.fromarray(eight).save(tmp_path / 'd.pgm')
    (tmp_path / 'e.pgm').write_bytes(b'P5 30 40 65535\n' + pixels.astype('>u2').tobytes())
    Image.fromarray(np.repeat(eight[..., None], 3, -1)).save(tmp_path / 'f.png')
    np.save(tmp_path / 'g.npy', pixels)
    np.save(tmp_path / 'h.npy', pixels.astype(np.float32) / 8)
    dicom(tmp_path / 'i.dcm', pixels)
    dicom(tmp_path / 'j', pixels, ImplicitVRLittleEndian)
    dicom(tmp_path / 'k.dicom', pixels.astype('>u2'), ExplicitVRBigEndian)
    dicom(tmp_path / '1.2.840.9', pixels, RLELossless)
    dicom(tmp_path / 'l.dcm', pixels, JPEG2000Lossless,
          encapsulate([encoded(pixels, 'JPEG2000', no_jp2=True)]))
    files = images.listing(tmp_path)
    assert len(files) == 13
    for path in files:
        assert images.frames(path) == 1
        np.testing.assert_array_equal(images.read(path), eight, err_msg=path)
    Image.fromarray(eight).save(tmp_path / 'z.jpg', quality=95)
    assert np.abs(images.read(tmp_path / 'z.jpg').astype(int) - eight).max() <= 3


def test_volumes_are_read_one_frame_at_a_time(tmp_path, monkeypatch):
    volume = np.stack([ramp(low=k, high=2000 + 500 * k) ** (1 + k % 2) % 4001 for k in range(5)]).astype(np.uint16)
    dicom(tmp_path / 'a.dcm', volume)
    dicom(tmp_path / 'b.dcm', volume, JPEG2000Lossless,
          encapsulate([encoded(frame, 'JPEG2000', no_jp2=True) for frame in volume]))
    np.save(tmp_path / 'c.npy', volume)
    pages = [Image.fromarray(frame) for frame in volume]
    pages[0].save(tmp_path / 'd.tif', save_all=True, append_images=pages[1:])
    decoded = []
    original = Image.Image.load
    monkeypatch.setattr(Image.Image, 'load', lambda self: decoded.append(1) or original(self))
    for path in images.listing(tmp_path):
        assert images.frames(path) == 5
        for k in (0, 3, 4):
            decoded.clear()
            np.testing.assert_array_equal(images.read(path, k), stretched(volume[k]), err_msg=f'{path} {k}')
            assert len(decoded) <= 3, 'more than one frame was decoded'
        with pytest.raises(ValueError, match='frame 5 is asked for, the file has 5'):
            images.read(path, 5)


def test_a_prepared_npy_is_returned_as_it_is(tmp_path):
    image = np.full((30, 20), 7, np.uint8)
    np.save(tmp_path / 'a.npy', image)
    np.testing.assert_array_equal(images.read(tmp_path / 'a.npy'), image)


def test_rescale_then_window_then_monochrome1_then_padding(tmp_path):
    pixels = ramp()
    path = tmp_path / 'a.dcm'
    np.testing.assert_array_equal(images.read(dicom(path, pixels, PhotometricInterpretation='MONOCHROME1')),
                                  255 - stretched(pixels))
    falling = images.read(dicom(path, pixels, RescaleSlope=-2, RescaleIntercept=9)).astype(int)
    assert np.abs(falling - stretched(-2. * pixels + 9)).max() <= 1                     # ties round either way
    signed = pixels.astype(np.int16) - 2000
    np.testing.assert_array_equal(images.read(dicom(path, signed)), stretched(signed))

    window = dict(WindowCenter=[1500, 9], WindowWidth=[1000, 9], RescaleSlope=2, RescaleIntercept=-500)
    values = 2. * pixels - 500
    linear = np.clip((values - 1499.5) / 999 + 0.5, 0, 1)
    dicom(path, pixels, PhotometricInterpretation='MONOCHROME1', **window)
    assert np.abs(images.read(path, voi=True).astype(int) - (255 - stretched(linear))).max() <= 1
    assert np.abs(images.read(path).astype(int) - (255 - stretched(values))).max() <= 1   # no window unless asked
    dicom(path, pixels, VOILUTFunction='SIGMOID', WindowCenter=1500, WindowWidth=1000)
    sigmoid = 1 / (1 + np.exp(-4 * (pixels - 1500.) / 1000))
    assert np.abs(images.read(path, voi=True).astype(int) - stretched(sigmoid)).max() <= 1


def test_padding_is_left_out_of_the_stretch_and_becomes_background(tmp_path):
    pixels = ramp()
    pixels[:, :5], pixels[:, 5:8] = 9000, 9003
    for interpretation in ('MONOCHROME2', 'MONOCHROME1'):
        dicom(tmp_path / 'a.dcm', pixels, PixelPaddingValue=9000, PixelPaddingRangeLimit=9003,
              PhotometricInterpretation=interpretation)
        image = images.read(tmp_path / 'a.dcm')
        expected = stretched(pixels[:, 8:])
        np.testing.assert_array_equal(image[:, 8:], expected if interpretation == 'MONOCHROME2' else 255 - expected)
        assert (image[:, :8] == 0).all()


def test_padding_and_rescale_as_writers_get_them_wrong(tmp_path):
    pixels = ramp().astype(np.int16)
    pixels[:, :5] = -2000
    path = dicom(tmp_path / 'a.dcm', pixels, PixelPaddingValue=-2000)
    expected = images.read(path)
    np.testing.assert_array_equal(expected[:, 5:], stretched(pixels[:, 5:]))
    ds = pydicom.dcmread(path)
    ds['PixelPaddingValue'] = pydicom.DataElement(0x00280120, 'US', 63536)              # -2000, as unsigned
    ds['PixelPaddingRangeLimit'] = pydicom.DataElement(0x00280121, 'US', None)
    ds.RescaleSlope, ds.RescaleIntercept = 1, None
    ds.save_as(path)
    np.testing.assert_array_equal(images.read(path), expected)
    ds.RescaleSlope = -1
    ds.save_as(path)
    np.testing.assert_array_equal(images.read(path)[:, 5:], stretched(-pixels[:, 5:].astype(int)))


def test_film_digitisers_tiff_with_white_as_zero_is_inverted(tmp_path):
    pixels = ramp()
    for image in (pixels, pixels.astype(np.float32)):
        Image.fromarray(image).save(tmp_path / 'a.tif', tiffinfo={262: 0})
        np.testing.assert_array_equal(images.read(tmp_path / 'a.tif'), 255 - stretched(pixels))


def test_enhanced_multiframe_files_keep_their_window_in_groups(tmp_path):
    volume = np.stack([ramp(), ramp()[::-1]])

    def group(center):
        item, voi = Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = center, 800
        item.FrameVOILUTSequence = [voi]
        return item

    dicom(tmp_path / 'shared.dcm', volume, SharedFunctionalGroupsSequence=[group(1000)])
    dicom(tmp_path / 'each.dcm', volume, PerFrameFunctionalGroupsSequence=[group(1000), group(3000)])
    for name, frame, center in [('shared', 1, 1000), ('each', 0, 1000), ('each', 1, 3000)]:
        expected = stretched(np.clip((volume[frame] - (center - .5)) / 799 + .5, 0, 1))
        assert np.abs(images.read(tmp_path / f'{name}.dcm', frame, voi=True).astype(int) - expected).max() <= 1


def test_a_file_that_hides_jpeg_behind_an_uncompressed_syntax_is_read(tmp_path):
    image = stretched(ramp(shape=(64, 48)))
    for kind, data in [('jpeg', encoded(image, 'JPEG', quality=95)),
                       ('j2k', encoded(image, 'JPEG2000', no_jp2=True))]:
        dicom(tmp_path / f'{kind}.dcm', image, data=encapsulate([data]))
        assert np.abs(images.read(tmp_path / f'{kind}.dcm').astype(int) - image).max() <= 4
    dicom(tmp_path / 'none.dcm', image, data=encapsulate([b'nothing known' * 9]))
    with pytest.raises(ValueError, match='encapsulated while the header declares them uncompressed'):
        images.read(tmp_path / 'none.dcm')


@pytest.mark.parametrize('name', ['lossless', 'mislabelled', 'jpegls'])
def test_jpeg_lossless_is_read_as_soon_as_gdcm_is_installed(name):
    """A phantom written as JPEG Lossless (GE, Hologic), the same stream declared uncompressed, and JPEG-LS."""
    path = CASES / f'{name}.dcm'
    assert images.frames(path) == 1
    if GDCM:
        np.testing.assert_array_equal(images.read(path), np.load(CASES / 'lossless.npy'))
    else:
        with pytest.raises(ValueError, match='JPEG.*needs a decoder: pip install python-gdcm'):
            images.read(path)


def test_htj2k_names_its_decoder(tmp_path):
    dicom(tmp_path / 'a.dcm', ramp(), HTJ2KLossless, encapsulate([b'\xff\x4f\xff\x51' + b'\0' * 60]))
    if importlib.util.find_spec('openjpeg') is None:
        with pytest.raises(ValueError, match='High-Throughput.*pip install pylibjpeg pylibjpeg-openjpeg'):
            images.read(tmp_path / 'a.dcm')


def bad_files(folder):
    """(name, words of the error) of files that cannot be mammograms."""
    good = encoded(stretched(ramp(shape=(64, 48))), 'PNG')
    (folder / 'truncated.png').write_bytes(good[:len(good) // 2])
    (folder / 'empty.png').write_bytes(b'')
    (folder / 'text.png').write_text('not an image')
    (folder / 'text.dcm').write_text('not a DICOM file ' * 20)
    _without_pixels(folder / 'nopixels.dcm')
    dicom(folder / 'short.dcm', ramp(), data=ramp().tobytes()[:999] + b'\0')
    dicom(folder / 'huge.dcm', ramp(), Rows=60000, Columns=60000)
    (folder / 'huge.pgm').write_bytes(b'P5 60000 60000 255\n')
    Image.fromarray(np.full((40, 30), 9, np.uint8)).save(folder / 'constant.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / 'colour.png')
    dicom(folder / 'colour.dcm', np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    np.save(folder / 'nan.npy', np.where(np.eye(9), np.nan, 1.0))
    np.save(folder / 'infinite.npy', np.where(np.eye(9), np.inf, 1.0))
    np.save(folder / 'zero.npy', np.zeros((0, 9), np.uint8))
    np.save(folder / 'objects.npy', np.array([[{}]], dtype=object), allow_pickle=True)
    np.save(folder / 'line.npy', np.zeros(9))
    (folder / 'text.npy').write_text('no array')
    (folder / 'cut.npy').write_bytes(b'\x93NUMPY\x01\x00v\x00')
    np.save(folder / 'rgb.npy', np.zeros((40, 30, 3), np.uint8))
    for name, frames in (('negative', -2), ('endless', 10 ** 9)):
        dicom(folder / f'{name}.dcm', ramp(), NumberOfFrames=frames)
    dicom(folder / 'palette.dcm', ramp(), PhotometricInterpretation='PALETTE COLOR')
    Image.fromarray(ramp()).save(folder / 'deep.png')
    data = (folder / 'deep.png').read_bytes()                       # 16-bit grey, relabelled as grey with alpha
    header = data[12:25] + b'\x04' + data[26:29]
    (folder / 'deep.png').write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, 'big') + data[33:])
    dicom(folder / 'padding.dcm', np.full((9, 9), 5, np.uint16), PixelPaddingValue=5)
    return {'truncated.png': 'truncated', 'empty.png': 'empty', 'text.png': 'not an image', 'text.dcm': 'not a DICOM',
            'nopixels.dcm': 'no pixel data', 'short.dcm': 'cut short', 'huge.dcm': 'declares 60000x60000',
            'huge.pgm': 'more pixels than', 'constant.png': 'constant', 'colour.png': 'colour', 'colour.dcm': 'colour',
            'nan.npy': 'NaN', 'infinite.npy': 'infinite', 'zero.npy': 'shape', 'rgb.npy': 'shape', 'line.npy': 'shape',
            'objects.npy': 'type object', 'text.npy': 'not a .npy', 'cut.npy': 'cut',
            'padding.dcm': 'padding', 'negative.dcm': 'declares -2 frames', 'palette.dcm': 'not greys',
            'endless.dcm': 'declares 1000000000 frames', 'deep.png': '16-bit colour', 'absent.png': 'No such file'}


def _without_pixels(path):
    ds = pydicom.dcmread(dicom(path, ramp()))
    del ds.PixelData
    ds.save_as(path)


def test_bad_files_give_one_clear_line(tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises((ValueError, OSError)) as caught:
            images.read(tmp_path / name)
        text = str(caught.value)
        assert text.startswith(str(tmp_path / name)) and '\n' not in text, (name, text)
        assert words in text, (name, text)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / 'notes.txt').write_text('x')
    for folder, words in [(tmp_path, 'no DICOM'), (tmp_path / 'absent', 'not a folder')]:
        with pytest.raises(ValueError, match=words):
            images.listing(folder)


def test_links_are_followed_once_and_hidden_files_are_not_images(tmp_path):
    (tmp_path / 'data' / 'inner').mkdir(parents=True)
    (tmp_path / 'far').mkdir()
    np.save(tmp_path / 'far' / 'b.npy', ramp())
    np.save(tmp_path / 'data' / 'a.npy', ramp())
    np.save(tmp_path / 'data' / '._a.npy', ramp())
    os.symlink(tmp_path / 'far', tmp_path / 'data' / 'inner' / 'far')
    os.symlink(tmp_path / 'data', tmp_path / 'data' / 'inner' / 'loop')
    assert [os.path.basename(path) for path in images.listing(tmp_path / 'data')] == ['a.npy', 'b.npy']


def test_no_header_value_is_in_an_error(tmp_path):
    for extra in (dict(data=b'\0' * 99 + b'\0'), dict(PhotometricInterpretation='MONOCHROME9'), dict(Rows=0)):
        dicom(tmp_path / 'a.dcm', ramp(), PatientName='Secret^Name', PatientID='Secret', **extra)
        with pytest.raises(ValueError) as caught:
            images.read(tmp_path / 'a.dcm')
        assert 'Secret' not in str(caught.value)
    data = bytearray(dicom(tmp_path / 'a.dcm', ramp(), PatientName='Secret^Name').read_bytes())
    data[138] = 255                                                 # the length of the very first element
    (tmp_path / 'a.dcm').write_bytes(data)
    for function in (images.frames, images.read):
        with pytest.raises(ValueError, match='header is damaged') as caught:
            function(tmp_path / 'a.dcm')
        assert 'Secret' not in str(caught.value)


# ---- contrast and tissue ------------------------------------------------------------------------------------------

def test_clahe_equals_opencv():
    archive = np.load(CASES / 'clahe.npz')
    for key in archive.files:
        if not key.endswith('image'):
            i, clip, tiles = key.split('/')
            ours = images.clahe(archive[f'{i}/image'], float(clip), int(tiles))
            np.testing.assert_array_equal(ours, archive[key], err_msg=key)


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


def test_words_of_64_pixels_dilate_and_erode_as_filters_do():
    """Every way in which a window can lie over the words of a row, narrow images and kernels wider than a word."""
    rng = np.random.default_rng(0)
    for shape in ((70, 1), (3, 63), (40, 64), (40, 65), (9, 200)):
        for kernel in (1, 3, 9, 33, 63, 65, 127, 129, 131):
            m = rng.random(shape) < rng.choice([0.02, 0.98])
            for ours, function, outside in ((mask.dilation, ndimage.maximum_filter, 0),
                                            (mask.erosion, ndimage.minimum_filter, 1)):
                assert (ours(m.T, kernel) == ours(m, kernel).T).all()                   # another order in memory
                assert (ours(m, kernel) == square(m, kernel, function, outside)).all(), (shape, kernel)


def test_percentile_and_otsu_are_the_textbook_ones():
    rng = np.random.default_rng(0)
    image = rng.normal(90, 40, (31, 47)).clip(0, 255).astype(np.uint8)
    for q in (0, 12.5, 40, 99, 100):
        assert mask._percentile(mask._histogram(image), q) == pytest.approx(np.percentile(image, q))

    def within(t):
        parts = image[image <= t], image[image > t]
        return sum(p.size * p.var() for p in parts if p.size)

    assert within(mask.otsu(image)) == pytest.approx(min(within(t) for t in range(255)))


def test_holes_are_filled_as_scipy_fills_them():
    rng = np.random.default_rng(0)
    for share in (0.4, 0.6, 0.8):
        m = rng.random((40, 50)) < share
        np.testing.assert_array_equal(mask._fill_holes(m), ndimage.binary_fill_holes(m))


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


@pytest.mark.parametrize('kind', ['u1', 'i1', '<u2', '>u2', '<i2', '>i2', '<i4', '<f4'])
def test_8_bits_are_the_rounded_share_of_the_range_for_every_type(kind):
    pixels = np.random.default_rng(0).integers(-100, 101, (30, 40)).astype(kind)
    low, high = float(pixels.min()), float(pixels.max())
    expected = np.rint((pixels.astype(float) - low) * (255 / (high - low)))
    np.testing.assert_array_equal(images.to_uint8(pixels), expected)
    np.testing.assert_array_equal(images.to_uint8(pixels.T), expected.T)


def test_tissue_and_clahe_refuse_what_is_not_an_8_bit_image():
    for function in (mask.tissue, images.clahe):
        with pytest.raises(ValueError, match='expected .H, W. uint8'):
            function(ramp())
    with pytest.raises(ValueError, match='percentile 150'):
        mask.tissue(stretched(ramp()), percentile=150)


def test_an_image_without_contrast_has_no_tissue():
    for value in (0, 255):
        assert not mask.tissue(np.full((40, 40), value, np.uint8), percentile=None).any()
        assert not mask.tissue(np.full((40, 40), value, np.uint8)).any()


# ---- phantoms, prepare, command line -------------------------------------------------------------------------------

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


def test_neighbouring_slices_of_a_phantom_are_more_alike_than_distant_ones():
    volume = phantom.breast(np.random.default_rng(1), slices=8, lesion=False).volume.astype(float)
    near, far = (np.mean([np.corrcoef(volume[k].ravel(), volume[k + d].ravel())[0, 1] for k in range(8 - d)])
                 for d in (1, 6))
    assert near > 0.95 and near > far + 0.02


def test_prepare_keeps_the_tree_goes_on_where_it_stopped_and_lists_what_it_cannot_read(tmp_path):
    src, dst = tmp_path / 'src', tmp_path / 'dst'
    (src / 'a' / 'b').mkdir(parents=True)
    breast = phantom.breast(np.random.default_rng(0), slices=3)
    dicom(src / 'a' / 'volume.dcm', breast.volume)
    Image.fromarray(breast.volume[1]).save(src / 'a' / 'b' / 'image.png')
    (src / 'broken.dcm').write_text('no')
    assert prepare.prepare(src, dst, side=96, workers=2) == (2, 0, 1)
    volume = np.load(dst / 'a' / 'volume.npy')
    assert volume.shape == (3, 128, 96) and volume.dtype == np.uint8
    expected = Image.fromarray(images.clahe(images.read(src / 'a' / 'volume.dcm', 2))).resize((96, 128), Image.BICUBIC)
    np.testing.assert_array_equal(volume[2], np.asarray(expected))
    assert np.load(dst / 'a' / 'b' / 'image.npy').shape == (128, 96)
    with open(dst / 'rejected.csv') as file:
        rows = list(csv.DictReader(file))
    assert [r['file'] for r in rows] == ['broken.dcm'] and 'not a DICOM file' in rows[0]['reason']
    os.remove(dst / 'a' / 'volume.npy')
    kept = os.stat(dst / 'a' / 'b' / 'image.npy').st_mtime_ns
    assert prepare.prepare(src, dst, side=96, workers=1) == (1, 1, 1)
    assert os.stat(dst / 'a' / 'b' / 'image.npy').st_mtime_ns == kept
    assert not [p for p in dst.rglob('*') if p.suffix == '.part']
    for wrong, words in [(dict(dst=src / 'prepared'), 'choose a folder outside'), (dict(dst=dst, side=0), '--side 0'),
                         (dict(dst=dst, workers=0), '--workers 0')]:
        with pytest.raises(ValueError, match=words):
            prepare.prepare(src, **wrong)


def test_an_interrupted_prepare_leaves_whole_files_and_goes_on(tmp_path):
    """Two seconds of work for one process, so that there is time to stop it; one large film under many names."""
    np.save(tmp_path / '0.npy', ramp(shape=(3000, 2400)))
    for i in range(1, 16):
        os.link(tmp_path / '0.npy', tmp_path / f'{i}.npy')
    command = [sys.executable, ROOT / 'prepare.py', tmp_path, f'{tmp_path}-out', '--workers', '1']
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))     # else deaf in a job
    out = tmp_path.with_name(tmp_path.name + '-out')
    while not list(out.glob('*.npy')):
        time.sleep(0.01)
        assert started.poll() is None
    os.killpg(started.pid, signal.SIGINT)                                   # what Ctrl-C sends, to the workers too
    words = started.communicate(timeout=60)[1]
    assert started.returncode == 1 and words.endswith('the same command goes on from here\n'), words
    assert 'Traceback' not in words
    whole = len(list(out.glob('*.npy')))
    assert 0 < whole < 16 and not list(out.glob('*.part'))
    again = subprocess.run(command, capture_output=True, text=True)
    assert f'{16 - whole} written' in again.stdout and f'{whole} were there' in again.stdout, again
    assert len({path.read_bytes() for path in out.glob('*.npy')}) == 1


def test_the_command_line_shows_the_mask(tmp_path):
    np.save(tmp_path / 'a.npy', phantom.breast(np.random.default_rng(0)).volume[0])
    for arguments, words in [((), 'overlap with the true mask'), ((tmp_path / 'a.npy', tmp_path / 'o.png'), 'tissue ')]:
        done = subprocess.run([sys.executable, ROOT / 'mask.py', *arguments], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == 0 and words in done.stdout, done.stderr
    assert Image.open(tmp_path / 'o.png').size == (192, 256)
    done = subprocess.run([sys.executable, ROOT / 'mask.py', tmp_path / 'absent.png'], capture_output=True, text=True)
    assert done.returncode == 1 and 'No such file' in done.stderr and 'Traceback' not in done.stderr
