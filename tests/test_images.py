"""images.py: every kind of file becomes the same 8-bit mammogram, or is refused in one sentence; CLAHE is OpenCV's.
The ways in which a DICOM file may be written are a table of their own, test_dicom.py."""
import importlib.util
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pydicom
import pytest
from conftest import CASES, ROOT
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian, HTJ2KLossless,
                         ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, RLELossless)

import images

GDCM = importlib.util.find_spec('gdcm') is not None


def ramp(dtype=np.uint16, shape=(40, 30), low=100, high=4000):
    return np.linspace(low, high, shape[0] * shape[1]).reshape(shape).astype(dtype)


def stretched(pixels):
    """The definition: min-max to 0..255, rounded."""
    x = pixels.astype(np.float64)
    return np.uint8(np.rint((x - x.min()) * (255 / (x.max() - x.min()))))


def dicom(path, pixels, syntax=ExplicitVRLittleEndian, streams=None, **elements):
    """Pixels (H, W), (K, H, W) or (H, W, 3), or their compressed `streams`, in a DICOM file. `elements` override the
    header, None removes one."""
    ds, colour = Dataset(), pixels.ndim == 3 and pixels.shape[-1] == 3
    ds.preamble, ds.file_meta = bytes(128), pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.1.2'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    ds.Modality, ds.PatientName, ds.PatientID = 'MG', 'Secret^Name', 'Secret'
    ds.Rows, ds.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, 'RGB') if colour else (1, 'MONOCHROME2')
    ds.PlanarConfiguration = 0
    if pixels.ndim == 3 and not colour:
        ds.NumberOfFrames = len(pixels)
    ds.BitsAllocated = ds.BitsStored = pixels.dtype.itemsize * 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == 'i')
    ds.PixelData = encapsulate(streams) if streams else pixels.tobytes()
    ds['PixelData'].VR = 'OB' if pixels.dtype.itemsize == 1 else 'OW'
    ds['PixelData'].is_undefined_length = bool(streams)
    for name, value in elements.items():
        setattr(ds, name, value)
        if value is None:
            del ds[name]
    if syntax == RLELossless:
        ds.compress(RLELossless)
    big = syntax == ExplicitVRBigEndian
    pydicom.dcmwrite(path, ds, enforce_file_format=not big, **dict(
        implicit_vr=False, little_endian=False, force_encoding=True) if big else {})
    return path


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def j2k(*frames):
    return [encoded(frame, 'JPEG2000', no_jp2=True) for frame in frames]


# ---- reading ------------------------------------------------------------------------------------------------------

def test_every_file_kind_gives_the_same_mammogram_whatever_its_suffix(tmp_path):
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
    dicom(tmp_path / 'l.dcm', pixels, JPEG2000Lossless, j2k(pixels))
    dicom(tmp_path / 'dicom.png', pixels)
    (tmp_path / 'png.dcm').write_bytes((tmp_path / 'a.png').read_bytes())
    (tmp_path / 'npy.jpg').write_bytes((tmp_path / 'g.npy').read_bytes())
    files = images.listing(tmp_path)
    assert len(files) == 16
    for path in files:
        assert images.shape(path) == (1, 40, 30)
        np.testing.assert_array_equal(images.read(path), eight, err_msg=path)
    for name in ('z.jpg', 'jpeg.png'):
        (tmp_path / name).write_bytes(encoded(eight, 'JPEG', quality=95))
        assert np.abs(images.read(tmp_path / name).astype(int) - eight).max() <= 3


def test_volumes_are_read_in_file_order_and_one_frame_at_a_time(tmp_path, monkeypatch):
    volume = np.stack([ramp(low=k, high=2000 + 500 * k) ** (1 + k % 2) % 4001 for k in range(5)]).astype(np.uint16)
    dicom(tmp_path / 'a.dcm', volume)
    dicom(tmp_path / 'b.dcm', volume, JPEG2000Lossless, j2k(*volume))
    dicom(tmp_path / 'c.dcm', volume, RLELossless)
    np.save(tmp_path / 'd.npy', volume)
    pages = [Image.fromarray(frame) for frame in volume]
    pages[0].save(tmp_path / 'e.tif', save_all=True, append_images=pages[1:])
    decoded, original = [], Image.Image.load
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


def test_bright_is_dense_in_every_photometric_interpretation(tmp_path):
    """MONOCHROME1 is inverted, and so is an exposure in which air is bright, but not an image made for the eye."""
    pixels, path = ramp(), tmp_path / 'a.dcm'
    processing, presentation = (f'1.2.840.10008.5.1.4.1.1.1.2{end}' for end in ('.1', ''))
    for one, intent, sop, sign, inverted in [
            (True, 'FOR PRESENTATION', presentation, -1, True), (True, 'FOR PROCESSING', processing, 1, True),
            (False, 'FOR PROCESSING', processing, 1, True), (False, None, processing, 1, True),
            (False, 'FOR PROCESSING', processing, -1, False), (False, 'FOR PROCESSING', processing, None, False),
            (False, 'FOR PRESENTATION', presentation, 1, False), (False, None, presentation, 1, False)]:
        dicom(path, pixels, PhotometricInterpretation=f'MONOCHROME{2 - one}', PresentationIntentType=intent,
              SOPClassUID=sop, PixelIntensityRelationshipSign=sign)
        expected = 255 - stretched(pixels) if inverted else stretched(pixels)
        np.testing.assert_array_equal(images.read(path), expected)


def test_film_digitisers_tiff_with_white_as_zero_is_inverted(tmp_path):
    for image in (ramp(), ramp().astype(np.float32)):
        Image.fromarray(image).save(tmp_path / 'a.tif', tiffinfo={262: 0})
        np.testing.assert_array_equal(images.read(tmp_path / 'a.tif'), 255 - stretched(ramp()))


def test_empty_rescale_and_padding_elements_count_as_absent(tmp_path):
    pixels = ramp().astype(np.int16)
    pixels[:, :5] = -2000
    path = dicom(tmp_path / 'a.dcm', pixels, PixelPaddingValue=-2000, RescaleSlope=-1)
    ds = pydicom.dcmread(path)
    ds['PixelPaddingRangeLimit'] = pydicom.DataElement(0x00280121, 'US', None)
    ds['RescaleIntercept'] = pydicom.DataElement(0x00281052, 'DS', None)
    ds.save_as(path)
    np.testing.assert_array_equal(images.read(path)[:, 5:], stretched(-pixels[:, 5:].astype(int)))


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


def test_a_lookup_table_of_bytes_packed_two_to_a_word_is_unpacked(tmp_path):
    """PS3.3 C.11.1.1: as words, and as bytes of a file of either order; the first entry is the low byte."""
    pixels, table = ramp(np.uint8, low=0, high=254), np.arange(255, dtype=np.uint8)[::-1] // 2 + 9
    words = np.append(table, 0).astype(np.uint8).view('<u2')
    for kind, syntax in [('US', ExplicitVRLittleEndian), ('OW', ExplicitVRLittleEndian), ('OW', ExplicitVRBigEndian)]:
        item = Dataset()
        item.add_new('LUTDescriptor', 'US', [255, 0, 8])
        order = '>u2' if syntax == ExplicitVRBigEndian else '<u2'
        item.add_new('LUTData', kind, words.tolist() if kind == 'US' else words.astype(order).tobytes())
        dicom(tmp_path / 'a.dcm', pixels, syntax, VOILUTSequence=[item])
        np.testing.assert_array_equal(images.read(tmp_path / 'a.dcm', voi=True), stretched(table[pixels]))


def test_an_overlay_above_the_stored_bits_is_cut_off_and_greys_above_them_stay(tmp_path):
    """An overlay is told by its group 60xx, or by greys that stay away from the limit that it lies above."""
    plane = (np.indices((40, 30)).sum(0) % 7 == 0).astype(np.uint16) << 12
    for high, position, cut in [(4095, 12, True), (4095, None, False), (4095, 0, False), (3000, None, True)]:
        pixels = ramp(high=high, low=0)
        above, bits = pixels | plane, 12
        expected = pixels if cut else above
        path = dicom(tmp_path / 'a.dcm', pixels, JPEG2000Lossless, j2k(above), BitsStored=bits, HighBit=bits - 1)
        if position is not None:
            ds = pydicom.dcmread(path)
            ds.add_new(0x60020102, 'US', position)
            ds.save_as(path)
        np.testing.assert_array_equal(images.read(path), stretched(expected))


def test_percentiles_replace_minimum_and_maximum(tmp_path):
    pixels = ramp()
    pixels[0, :3] = 65535
    dicom(tmp_path / 'a.dcm', pixels)
    low, high = np.percentile(pixels, (1, 99))
    expected = np.rint((pixels.clip(low, high) - low) * (255 / (high - low)))
    np.testing.assert_array_equal(images.read(tmp_path / 'a.dcm', percentiles=(1, 99)), expected)
    assert len(np.unique(images.read(tmp_path / 'a.dcm'))) < 32


# ---- what a file declares, and what it holds -----------------------------------------------------------------------

def test_frames_that_the_header_does_not_count_are_never_dropped(tmp_path):
    volume = np.stack([ramp(), ramp()[::-1], ramp()[:, ::-1]])
    one = volume[:1]
    for declared, pixels, held in [(None, volume, 3), (2, volume, 3), (5000, one, 1), (10 ** 9, one, 1), (-2, one, 1)]:
        for syntax, streams in [(ExplicitVRLittleEndian, None), (JPEG2000Lossless, j2k(*pixels)), (RLELossless, None)]:
            path = dicom(tmp_path / 'a.dcm', pixels, syntax, streams)
            ds = pydicom.dcmread(path)
            ds.NumberOfFrames = declared
            ds.save_as(path)
            for function in (images.read, images.frames):
                with pytest.raises(ValueError, match=f'declares {declared or 1} frames?, holds {held}'):
                    function(path)
    halves = [half for stream in j2k(*volume) for half in (stream[:200], stream[200:])]
    path = dicom(tmp_path / 'a.dcm', volume, JPEG2000Lossless, halves)                  # two fragments a frame
    np.testing.assert_array_equal(images.read(path, 2), stretched(volume[2]))


@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless, JPEGBaseline8Bit])
def test_a_stream_is_read_as_what_it_is_whatever_is_declared(syntax, tmp_path):
    """Some Hologic archives declare encapsulated pixels as uncompressed."""
    image = stretched(ramp(shape=(64, 48)))
    for stream in (encoded(image, 'JPEG', quality=95), *j2k(image)):
        path = dicom(tmp_path / 'a.dcm', image, streams=[stream])
        file = pydicom.dcmread(path)
        file.file_meta.TransferSyntaxUID = syntax
        file['PixelData'].VR = 'OB'
        file.save_as(path)
        assert np.abs(images.read(path).astype(int) - image).max() <= 4


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


def jpeg_header(marker, bits, H, W):
    return b'\xff\xd8\xff' + bytes([marker]) + struct.pack('>HBHHB', 11, bits, H, W, 1) + b'\1\x11\0'


def bad_files(folder):
    """{name: words of the refusal} of files that cannot be mammograms."""
    good, noise = encoded(stretched(ramp(shape=(64, 48))), 'PNG'), np.random.default_rng(0)
    for name, data in {
            'truncated.png': good[:len(good) // 2], 'empty.png': b'', 'text.png': b'not an image',
            'text.dcm': b'not a DICOM file ' * 20, 'script.png': b'%!PS-Adobe-3.0\n(x) run\n', 'gif.png': b'GIF89a',
            'huge.pgm': b'P5 60000 60000 255\n', 'text.npy': b'no array', 'cut.npy': b'\x93NUMPY\x01\x00v\x00'}.items():
        (folder / name).write_bytes(data)
    for name, array in dict(
            nan=np.where(np.eye(9), np.nan, 1.0), infinite=np.where(np.eye(9), np.inf, 1.0), line=np.zeros(9),
            zero=np.zeros((0, 9), np.uint8), objects=np.array([[{}]], dtype=object),
            rgb=np.zeros((40, 30, 3), np.uint8)).items():
        np.save(folder / f'{name}.npy', array, allow_pickle=True)
    Image.fromarray(np.full((40, 30), 9, np.uint8)).save(folder / 'constant.png')
    Image.fromarray(noise.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / 'colour.png')
    Image.fromarray(ramp()).save(folder / 'deep.png')
    data = (folder / 'deep.png').read_bytes()                       # 16-bit grey, relabelled as grey with alpha
    header = data[12:25] + b'\x04' + data[26:29]
    (folder / 'deep.png').write_bytes(data[:12] + header + zlib.crc32(header).to_bytes(4, 'big') + data[33:])
    Image.fromarray(ramp()).save(folder / 'pages.tif', save_all=True, append_images=[Image.fromarray(ramp()[:9])])
    dicom(folder / 'colour.dcm', noise.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    dicom(folder / 'nopixels.dcm', ramp(), PixelData=None)
    dicom(folder / 'short.dcm', ramp(), PixelData=ramp().tobytes()[:999] + b'\0')
    dicom(folder / 'huge.dcm', ramp(), Rows=60000, Columns=60000, NumberOfFrames=0)
    dicom(folder / 'palette.dcm', ramp(), PhotometricInterpretation='PALETTE COLOR')
    dicom(folder / 'photometric.dcm', ramp(), PhotometricInterpretation='SECRET')
    dicom(folder / 'samples.dcm', ramp(), SamplesPerPixel=7777)
    dicom(folder / 'none.dcm', ramp(), streams=[b'nothing known' * 9])
    path = dicom(folder / 'private.dcm', ramp())
    path.write_bytes(path.read_bytes().replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.7777.1.2.1\0\0'))
    dicom(folder / 'padding.dcm', np.full((9, 9), 5, np.uint16), PixelPaddingValue=5)
    dicom(folder / 'size.dcm', ramp(), JPEG2000Lossless, j2k(ramp(shape=(2000, 2000))))
    dicom(folder / 'twelve.dcm', ramp(), JPEGBaseline8Bit, [jpeg_header(0xC1, 12, 40, 30)])
    dicom(folder / 'torn.dcm', ramp(), JPEG2000Lossless, [j2k(ramp())[0][:300]])
    expected = {
        'empty.png': 'empty', 'truncated.png': 'cut short', 'huge.pgm': 'declares 60000x60000', 'deep.png': '16-bit colour',
        'constant.png': 'constant', 'colour.png': 'colour', 'colour.dcm': 'colour', 'nan.npy': 'NaN',
        'infinite.npy': 'infinite', 'objects.npy': 'cut short', 'cut.npy': 'cut short', 'nopixels.dcm': 'no pixel data',
        'short.dcm': 'cut short', 'huge.dcm': 'declares', 'palette.dcm': 'not greys',
        'photometric.dcm': 'not greys', 'samples.dcm': 'holds 0', 'none.dcm': 'are not JPEG', 'private.dcm': 'holds 0',
        'padding.dcm': 'padding', 'size.dcm': 'stream of 2000x2000 pixels, 1 channel', 'torn.dcm': 'cut short',
        'twelve.dcm': 'no Python decoder reads its 12 bits', 'absent.png': 'No such file'}
    expected |= dict.fromkeys(('text.png', 'text.dcm', 'text.npy', 'script.png', 'gif.png'), 'not a DICOM, PNG')
    return expected | dict.fromkeys(('zero.npy', 'rgb.npy', 'line.npy'), 'expected numbers .H, W.')


def test_bad_files_give_one_sentence_that_quotes_no_header(tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises((ValueError, OSError), match=words) as caught:
            images.read(tmp_path / name)
        text = str(caught.value)
        assert text.startswith(f'{tmp_path / name}: ') and '\n' not in text, text
        assert not any(secret in text.upper() for secret in ('SECRET', '7777')), text


def test_a_damaged_header_is_refused_without_its_values(tmp_path):
    data = bytearray(dicom(tmp_path / 'a.dcm', ramp()).read_bytes())
    data[138] = 255                                                 # the length of the very first element
    (tmp_path / 'a.dcm').write_bytes(data)
    for function in (images.frames, images.read):
        with pytest.raises(ValueError, match='a.dcm: ') as caught:
            function(tmp_path / 'a.dcm')
        assert 'Secret' not in str(caught.value)


def test_without_a_decoder_the_package_is_named(tmp_path):
    """gdcm and pylibjpeg made unfindable, in a process of its own."""
    dicom(tmp_path / 'htj2k.dcm', ramp(), HTJ2KLossless, [j2k(ramp())[0]])
    code = ('import sys\nfor name in ("gdcm", "openjpeg", "pylibjpeg", "libjpeg", "jpeg_ls"): sys.modules[name] = None\n'
            'import images\nfor path in sys.argv[1:]:\n    try: images.read(path)\n'
            '    except ValueError as error: print(error)')
    files = [tmp_path / 'htj2k.dcm', *(CASES / f'{name}.dcm' for name in ('lossless', 'mislabelled', 'jpegls'))]
    done = subprocess.run([sys.executable, '-c', code, *files], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0].endswith('needs a decoder: pip install pylibjpeg pylibjpeg-openjpeg'), done
    assert len(lines) == 4 and all(line.endswith('pip install python-gdcm') for line in lines[1:]), done


def bombs(folder):
    """Small files that declare, or unpack to, far more than an image. -> {name: words of the refusal}"""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    tags = [(256, 4, 60_000), (257, 4, 60_000), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8), (277, 3, 1),
            (278, 4, 60_000), (279, 4, 8)]
    png = chunk(b'IHDR', struct.pack('>IIBBBBB', 60_000, 60_000, 8, 0, 0, 0, 0))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr='|u1', fortran_order=False, shape=(60_000, 60_000)))
    for name, data in {
            'bomb.png': b'\x89PNG\r\n\x1a\n' + png + chunk(b'IDAT', zlib.compress(bytes(60_000))) + chunk(b'IEND', b''),
            'bomb.tif': struct.pack('<2sHIH', b'II', 42, 8, 9) + b''.join(
                struct.pack('<HHII', tag, kind, 1, value) for tag, kind, value in tags) + bytes(4),
            'bomb.pgm': b'P5 60000 60000 255\n' + bytes(100), 'bomb.npy': header.getvalue() + bytes(100)}.items():
        (folder / name).write_bytes(data)
    small, flat = np.zeros((200, 200), np.uint8), np.zeros((9000, 9000), np.uint8)
    dicom(folder / 'deflated.dcm', small, DeflatedExplicitVRLittleEndian, PixelData=bytes(300_000_000))
    runs = struct.pack('<16L', 1, 64, *[0] * 14) + b'\x81\x07' * 400_000                # 128 bytes out of two
    path = dicom(folder / 'rle.dcm', small, streams=[runs])
    path.write_bytes(path.read_bytes().replace(b'\x14\x001.2.840.10008.1.2.1\0', b'\x14\x001.2.840.10008.1.2.5\0'))
    dicom(folder / 'rows.dcm', small, Rows=60_000, Columns=60_000)
    dicom(folder / 'frames.dcm', small, NumberOfFrames=5000)
    dicom(folder / 'j2k.dcm', small, JPEG2000Lossless, j2k(flat))
    dicom(folder / 'jpeg.dcm', small, JPEGBaseline8Bit, [encoded(flat, 'JPEG', quality=1)])
    return {'bomb.png': '60000x60000 pixels; $MAX_PIXELS allows 1,000,000', 'bomb.tif': 'allows 1,000,000', 'bomb.npy': 'cut',
            'bomb.pgm': 'allows 1,000,000', 'rows.dcm': 'holds 0', 'deflated.dcm': 'declares 1 frame, holds',
            'rle.dcm': 'constant', 'frames.dcm': 'declares 5000 frames, holds 1', 'j2k.dcm': 'a stream of 9000x9000',
            'jpeg.dcm': 'a stream of 9000x9000'}


def test_decompression_bombs_are_refused_before_they_unpack(tmp_path):
    """Each in two seconds, all within 50 MiB; the limit, lowered to a million pixels here, can be set."""
    expected = bombs(tmp_path)
    assert all(os.path.getsize(tmp_path / name) < 2_000_000 for name in expected)
    code = ('import images, resource, sys, time\n'
            'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'for path in sys.argv[1:]:\n'
            '    start = time.process_time()\n'
            '    try: images.read(path)\n'
            '    except ValueError as error: print(error)\n'
            '    assert time.process_time() - start < 2, path\n'
            'assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024')
    done = subprocess.run([sys.executable, '-c', code, *(tmp_path / name for name in expected)], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {'MAX_PIXELS': '1000000'})
    assert done.returncode == 0, done.stderr + done.stdout
    for (name, words), line in zip(expected.items(), done.stdout.splitlines(), strict=True):
        assert f'{name}: ' in line and words in line, line


def test_links_are_followed_once_and_hidden_files_are_not_images(tmp_path):
    (tmp_path / 'data' / 'inner').mkdir(parents=True)
    (tmp_path / 'far').mkdir()
    for name in ('far/b.npy', 'data/a.npy', 'data/._a.npy'):
        np.save(tmp_path / name, ramp())
    (tmp_path / 'data' / 'notes').write_text('x')
    os.symlink(tmp_path / 'far', tmp_path / 'data' / 'inner' / 'far')
    os.symlink(tmp_path / 'data', tmp_path / 'data' / 'inner' / 'loop')
    assert [os.path.basename(path) for path in images.listing(tmp_path / 'data')] == ['a.npy', 'b.npy']
    for name, words in {'data/notes': 'Not a directory', 'absent': 'No such file'}.items():
        with pytest.raises(OSError, match=f'{name}: {words}'):
            images.listing(tmp_path / name)
    os.remove(tmp_path / 'far' / 'b.npy')
    with pytest.raises(ValueError, match='far: no DICOM'):
        images.listing(tmp_path / 'far')


# ---- grey values and contrast --------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['u1', 'i1', '<u2', '>u2', '<i2', '>i2', '<i4', '<f4'])
def test_8_bits_are_the_rounded_share_of_the_range_for_every_type(kind):
    pixels = np.random.default_rng(0).integers(-100, 101, (30, 40)).astype(kind)
    low, high = float(pixels.min()), float(pixels.max())
    expected = np.rint((pixels.astype(float) - low) * (255 / (high - low)))
    np.testing.assert_array_equal(images.to_uint8(pixels), expected)
    np.testing.assert_array_equal(images.to_uint8(pixels.T), expected.T)


def test_clahe_equals_opencv():
    archive = np.load(CASES / 'clahe.npz')
    for key in archive.files:
        if not key.endswith('image'):
            i, clip, tiles = key.split('/')
            ours = images.clahe(archive[f'{i}/image'], float(clip), int(tiles))
            np.testing.assert_array_equal(ours, archive[key], err_msg=key)
    with pytest.raises(ValueError, match='expected .H, W. uint8'):
        images.clahe(ramp())
