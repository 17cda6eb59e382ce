"""images.py: every kind of file becomes the same 8-bit mammogram, or is refused in one sentence; CLAHE is
OpenCV's. The ways in which a DICOM file may be written are a table of their own, test_dicom.py."""
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
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian,
                         HTJ2KLossless, ImplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit,
                         JPEGLosslessSV1, RLELossless)

import images


# ---- files ---------------------------------------------------------------------------------------

def ramp(shape=(40, 30), low=100, high=4000):
    return np.linspace(low, high, shape[0] * shape[1]).reshape(shape).astype(np.uint16)


def stretched(pixels):
    """The definition: min-max to 0..255, rounded."""
    x = pixels.astype(np.float64)
    return np.uint8(np.rint((x - x.min()) * (255 / (x.max() - x.min()))))


def dicom(path, pixels, syntax=ExplicitVRLittleEndian, streams=None, vr=None, edit=None, bend=None,
          **elements):
    """Pixels (H, W), (K, H, W) or (H, W, 3), or their compressed `streams`, in a DICOM file. `elements`
    override the header, None removes one; `edit` changes the data set, `bend` the bytes of the file."""
    bits, colour = 8 * pixels.itemsize, pixels.shape[2:] == (3,)
    order = '<' if syntax.is_little_endian else '>'
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    data += bytes(len(data) % 2)
    if order == '>' and bits == 8 and vr == 'OW':
        data = np.frombuffer(data, '<u2').astype('>u2').tobytes()   # words of two pixels, turned round

    ds = Dataset()
    ds.preamble, ds.file_meta = bytes(128), FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.1.2'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    ds.Modality, ds.PatientName, ds.PatientID = 'MG', 'Secret^Name', 'Secret'
    ds.Rows, ds.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (3, 'RGB') if colour else (1, 'MONOCHROME2')
    if colour:
        ds.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = bits, bits, bits - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == 'i')
    ds.add_new('PixelData', vr or ('OB' if bits == 8 else 'OW'), encapsulate(streams) if streams else data)
    ds['PixelData'].is_undefined_length = bool(streams)
    if syntax == RLELossless and not streams:
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(RLELossless, generate_instance_uid=False)
    for name, value in elements.items():
        setattr(ds, name, value)
        if value is None:
            del ds[name]
    if edit:
        edit(ds)
    pydicom.dcmwrite(path, ds, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian,
                     enforce_file_format=True)
    if bend:
        path.write_bytes(bend(path.read_bytes()))
    return path


def bent(*pairs):
    """Bytes for other bytes; each must be there exactly once."""
    def bend(data):
        for old, new in pairs:
            assert data.count(old) == 1, old
            data = data.replace(old, new)
        return data
    return bend


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def j2k(*frames):
    return [encoded(frame, 'JPEG2000', no_jp2=True) for frame in frames]


def tiff(first, *others):
    return encoded(first, 'TIFF', save_all=True, append_images=[Image.fromarray(page) for page in others])


def png(W, H, bits=8, kind=0):
    """What a PNG of that size and kind begins with, and 60 kB of zeros."""
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', W, H, bits, kind, 0, 0, 0)),
              (b'IDAT', zlib.compress(bytes(60_000))), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
        for name, data in chunks)


def create(path, content):
    """A file of bytes; of an array; or of a ramp in DICOM, with what `content` changes in it."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        dicom(path, **dict(pixels=ramp()) | content)
    elif path.suffix == '.npy':
        np.save(path, content, allow_pickle=True)
    else:
        Image.fromarray(content).save(path)


# ---- reading -------------------------------------------------------------------------------------

def test_every_file_kind_gives_the_same_mammogram_whatever_its_suffix(tmp_path):
    pixels = ramp()
    eight = stretched(pixels)
    for name, content in {
            'deep.png': pixels, 'eight.png': eight, 'rgb.png': np.stack([eight] * 3, axis=-1),
            'deep.tiff': pixels, 'integer.npy': pixels, 'float.npy': pixels / np.float32(8),
            'eight.pgm': eight, 'deep.pgm': b'P5 30 40 65535\n' + pixels.astype('>u2').tobytes(),
            'explicit.dcm': {}, 'implicit': dict(syntax=ImplicitVRLittleEndian),
            'big.dicom': dict(syntax=ExplicitVRBigEndian), '1.2.840.9': dict(syntax=RLELossless),
            'j2k.ima': dict(syntax=JPEG2000Lossless, streams=j2k(pixels))}.items():
        create(tmp_path / name, content)
    for name, wrong in [('explicit.dcm', 'dicom.png'), ('deep.png', 'png.dcm'), ('integer.npy', 'npy.jpg')]:
        (tmp_path / wrong).write_bytes((tmp_path / name).read_bytes())
    files = images.listing(tmp_path)
    assert len(files) == 16
    for path in files:
        assert images.shape(path) == (1, 40, 30)
        np.testing.assert_array_equal(images.read(path), eight, err_msg=path)
    for name in ('z.jpg', 'jpeg.png'):
        (tmp_path / name).write_bytes(encoded(eight, 'JPEG', quality=95))
        assert np.abs(images.read(tmp_path / name).astype(int) - eight).max() <= 3


def test_volumes_are_read_in_file_order_and_one_frame_at_a_time(tmp_path, monkeypatch):
    volume = np.random.default_rng(0).integers(0, 4001, (5, 40, 30)).astype(np.uint16)
    for name, content in {
            'a.dcm': dict(pixels=volume), 'b.dcm': dict(pixels=volume, syntax=RLELossless), 'c.npy': volume,
            'd.dcm': dict(pixels=volume, syntax=JPEG2000Lossless, streams=j2k(*volume)),
            'e.tif': tiff(*volume)}.items():
        create(tmp_path / name, content)
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


@pytest.mark.parametrize('kind', [np.uint16, np.float32])
def test_film_digitisers_tiff_with_white_as_zero_is_inverted(kind, tmp_path):
    Image.fromarray(ramp().astype(kind)).save(tmp_path / 'a.tif', tiffinfo={262: 0})
    np.testing.assert_array_equal(images.read(tmp_path / 'a.tif'), 255 - stretched(ramp()))


@pytest.mark.parametrize('high, position, cut', [
    (4095, 12, True), (4095, None, False), (4095, 0, False), (3000, None, True)])
def test_an_overlay_above_the_stored_bits_is_cut_off_and_greys_above_them_stay(high, position, cut, tmp_path):
    """An overlay is known by its group 60xx, or by greys that stay away from the limit that it lies above."""
    def overlay(ds):
        if position is not None:
            ds.add_new(0x60020102, 'US', position)

    pixels = ramp(low=0, high=high)
    above = pixels | np.uint16(np.indices(pixels.shape).sum(0) % 7 == 0) << 12
    dicom(tmp_path / 'a.dcm', above, JPEG2000Lossless, j2k(above), edit=overlay, BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(images.read(tmp_path / 'a.dcm'), stretched(pixels if cut else above))


def test_percentiles_replace_minimum_and_maximum(tmp_path):
    pixels = ramp()
    pixels[0, :3] = 65535
    dicom(tmp_path / 'a.dcm', pixels)
    low, high = np.percentile(pixels, (1, 99))
    expected = np.rint((pixels.clip(low, high) - low) * (255 / (high - low)))
    np.testing.assert_array_equal(images.read(tmp_path / 'a.dcm', percentiles=(1, 99)), expected)
    assert len(np.unique(images.read(tmp_path / 'a.dcm'))) < 32


# ---- what a file declares, and what it holds -----------------------------------------------------

@pytest.mark.parametrize('declared, held', [(None, 3), (2, 3), (5000, 1), (10 ** 9, 1), (-2, 1)])
@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless])
def test_frames_that_the_header_does_not_count_are_never_dropped(syntax, declared, held, tmp_path):
    volume = np.stack([ramp(), ramp()[::-1], ramp()[:, ::-1]])[:held]
    streams = j2k(*volume) if syntax == JPEG2000Lossless else None
    path = dicom(tmp_path / 'a.dcm', volume, syntax, streams, NumberOfFrames=declared)
    for function in (images.read, images.frames):
        with pytest.raises(ValueError, match=f'declares {declared or 1} frames?, holds {held}'):
            function(path)


def test_a_frame_may_lie_in_several_fragments(tmp_path):
    volume = np.stack([ramp(), ramp()[::-1]])
    halves = [half for stream in j2k(*volume) for half in (stream[:200], stream[200:])]
    path = dicom(tmp_path / 'a.dcm', volume, JPEG2000Lossless, halves)
    np.testing.assert_array_equal(images.read(path, 1), stretched(volume[1]))


@pytest.mark.parametrize('syntax', [ExplicitVRLittleEndian, JPEGLosslessSV1, RLELossless, JPEGBaseline8Bit])
def test_a_stream_is_read_as_what_it_is_whatever_is_declared(syntax, tmp_path):
    """Some Hologic archives declare encapsulated pixels as uncompressed."""
    image = stretched(ramp(shape=(64, 48)))
    for stream in (encoded(image, 'JPEG', quality=95), *j2k(image)):
        path = dicom(tmp_path / 'a.dcm', image, syntax, [stream])
        assert np.abs(images.read(path).astype(int) - image).max() <= 4


@pytest.mark.parametrize('name', ['lossless', 'mislabelled', 'jpegls'])
def test_jpeg_lossless_is_read_as_soon_as_gdcm_is_installed(name):
    """A phantom in JPEG Lossless (GE, Hologic), the same stream declared uncompressed, and JPEG-LS."""
    pytest.importorskip('gdcm')
    np.testing.assert_array_equal(images.read(CASES / f'{name}.dcm'), np.load(CASES / 'lossless.npy'))


# ---- what is refused -----------------------------------------------------------------------------

COLOUR = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
TWELVE_BITS = b'\xff\xd8\xff\xc1' + struct.pack('>HBHHB', 11, 12, 40, 30, 1) + b'\1\x11\0'
PRIVATE = bent((b'1.2.840.10008.1.2.1\0', b'1.2.840.7777.1.2.1\0\0'))

BAD = {
    'empty, or not a DICOM, PNG': {
        'empty.png': b'', 'text.png': b'not an image', 'text.dcm': b'not a DICOM file ' * 20,
        'text.npy': b'no array', 'script.png': b'%!PS-Adobe-3.0\n(x) run\n', 'gif.png': b'GIF89a'},
    'cut short': {
        'a.png': encoded(stretched(ramp()), 'PNG')[:99], 'a.npy': b'\x93NUMPY\x01\x00v\x00',
        'objects.npy': np.array([[{}]], dtype=object), 'short.dcm': dict(PixelData=bytes(1000)),
        'length.dcm': dict(bend=lambda data: data[:138] + b'\xff' + data[139:]),
        'torn.dcm': dict(syntax=JPEG2000Lossless, streams=[j2k(ramp())[0][:300]])},
    'a constant image, or NaN or infinite': {
        'constant.png': np.full((40, 30), 9, np.uint8), 'nan.npy': np.where(np.eye(9), np.nan, 1.0),
        'infinite.npy': np.where(np.eye(9), np.inf, 1.0)},
    'expected numbers .H, W.': {
        'line.npy': np.zeros(9), 'zero.npy': np.zeros((0, 9), np.uint8), 'rgb.npy': np.zeros((9, 9, 3))},
    'a colour image': {'a.png': COLOUR, 'a.dcm': dict(pixels=COLOUR)},
    '16-bit colour': {'a.png': png(30, 40, bits=16, kind=4)},
    'declares 60000x60000 pixels; .MAX_PIXELS allows 80,000,000': {'a.pgm': b'P5 60000 60000 255\n'},
    'every pixel is padding': {'a.dcm': dict(pixels=np.full((9, 9), 5, np.uint16), PixelPaddingValue=5)},
    'no pixel data': {'a.dcm': dict(PixelData=None)},
    'not greys': {'palette.dcm': dict(PhotometricInterpretation='PALETTE COLOR'),
                  'other.dcm': dict(PhotometricInterpretation='SECRET')},
    'holds 0': {'samples.dcm': dict(SamplesPerPixel=7777), 'private.dcm': dict(bend=PRIVATE)},
    'are not JPEG': {'a.dcm': dict(streams=[b'nothing known' * 9])},
    'stream of 60x80 pixels, 1 channel': {'a.dcm': dict(streams=j2k(ramp(shape=(80, 60))))},
    'no Python decoder reads its 12 bits': {'a.dcm': dict(syntax=JPEGBaseline8Bit, streams=[TWELVE_BITS])},
}


@pytest.mark.parametrize('words', BAD)
def test_bad_files_give_one_sentence_that_quotes_no_header(words, tmp_path):
    for name, content in BAD[words].items():
        create(tmp_path / name, content)
        with pytest.raises(ValueError, match=words) as caught:
            images.read(tmp_path / name)
        text = str(caught.value)
        assert text.startswith(f'{tmp_path / name}: ') and '\n' not in text
        assert 'SECRET' not in text.upper() and '7777' not in text


def test_absent_files_and_pages_of_other_sizes_are_refused(tmp_path):
    with pytest.raises(OSError, match='absent.png: No such file'):
        images.read(tmp_path / 'absent.png')
    (tmp_path / 'a.tif').write_bytes(tiff(ramp(), ramp()[:9]))
    with pytest.raises(ValueError, match='a.tif: frames of different sizes'):
        images.read(tmp_path / 'a.tif', 1)


READ_EACH = """
import sys, time
from pathlib import Path
sys.modules.update(dict.fromkeys(sys.argv[1].split()))      # to import what is None fails
import images

def peak():                         # kB on Linux; ru_maxrss begins with that of the parent
    status = Path('/proc', 'self', 'status').read_text()
    return int(status.split('VmHWM:')[1].split()[0])

before = peak()
for path in sys.argv[2:]:
    start = time.process_time()
    try:
        images.read(path)
    except ValueError as error:
        print(error)
    assert time.process_time() - start < 2, path
assert peak() - before < 100 * 1024, peak() - before
"""


def refusals(files, hidden='', **environment):
    """What reading the files raises in a process of its own, in two seconds for each and 100 MiB for all."""
    done = subprocess.run([sys.executable, '-c', READ_EACH, hidden, *files], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout.splitlines()


def test_without_a_decoder_the_package_is_named(tmp_path):
    htj2k = dicom(tmp_path / 'htj2k.dcm', ramp(), HTJ2KLossless, j2k(ramp()))
    cases = [CASES / f'{name}.dcm' for name in ('lossless', 'mislabelled', 'jpegls')]
    first, *others = refusals([htj2k, *cases], hidden='gdcm openjpeg pylibjpeg libjpeg jpeg_ls')
    assert first.endswith('needs a decoder: pip install pylibjpeg pylibjpeg-openjpeg')
    assert len(others) == 3 and all(line.endswith('decoder: pip install python-gdcm') for line in others)


def test_decompression_bombs_are_refused_before_they_unpack(tmp_path):
    """Small files that declare, or unpack to, far more than an image; a million pixels are the limit here."""
    tags = {256: 60_000, 257: 60_000, 258: 8, 259: 8, 262: 1, 273: 8, 277: 1, 278: 60_000, 279: 8}
    tif = b'II*\0' + struct.pack('<IH', 8, len(tags)) + b''.join(
        struct.pack('<HHII', tag, 4, 1, value) for tag, value in tags.items()) + bytes(4)
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, dict(descr='|u1', fortran_order=False, shape=(60_000, 60_000)))
    small, flat = np.zeros((200, 200), np.uint8), np.zeros((9000, 9000), np.uint8)
    runs = struct.pack('<16L', 1, 64, *[0] * 14) + b'\x81\x07' * 400_000       # 128 bytes out of two
    jpeg = [encoded(flat, 'JPEG', quality=1)]
    bombs = {
        'a.png': (png(60_000, 60_000), '60000x60000 pixels; $MAX_PIXELS allows 1,000,000'),
        'a.tif': (tif, 'allows 1,000,000'),
        'a.npy': (npy.getvalue() + bytes(100), 'cut short'),
        'rows.dcm': (dict(Rows=60_000, Columns=60_000), 'holds 0'),
        'stream.dcm': (dict(streams=j2k(small), Rows=60_000, Columns=60_000), 'allows 1,000,000'),
        'deflated.dcm': (dict(syntax=DeflatedExplicitVRLittleEndian, PixelData=bytes(300_000_000)), 'holds'),
        'rle.dcm': (dict(pixels=small, syntax=RLELossless, streams=[runs]), 'constant'),
        'j2k.dcm': (dict(pixels=small, syntax=JPEG2000Lossless, streams=j2k(flat)), 'a stream of 9000x9000'),
        'jpeg.dcm': (dict(pixels=small, syntax=JPEGBaseline8Bit, streams=jpeg), 'a stream of 9000x9000')}
    for name, (content, _) in bombs.items():
        create(tmp_path / name, content)
        assert os.path.getsize(tmp_path / name) < 2_000_000
    said = refusals([tmp_path / name for name in bombs], MAX_PIXELS='1000000')
    for (name, (_, words)), line in zip(bombs.items(), said, strict=True):
        assert f'{name}: ' in line and words in line


def test_links_are_followed_once_and_hidden_files_are_not_images(tmp_path):
    data, far = tmp_path / 'data', tmp_path / 'far'
    (data / 'inner').mkdir(parents=True)
    far.mkdir()
    for path in (far / 'b.npy', data / 'a.npy', data / '._a.npy'):
        np.save(path, ramp())
    (data / 'notes').write_text('x')
    dicom(data / 'DICOMDIR', ramp())
    os.symlink(far, data / 'inner' / 'far')
    os.symlink(data, data / 'inner' / 'loop')
    assert [os.path.basename(path) for path in images.listing(data)] == ['a.npy', 'b.npy']
    for path, words in {data / 'notes': 'notes: Not a directory', data / 'no': 'no: No such file'}.items():
        with pytest.raises(OSError, match=words):
            images.listing(path)
    os.remove(far / 'b.npy')
    with pytest.raises(ValueError, match='far: no DICOM'):
        images.listing(far)


# ---- grey values and contrast --------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['u1', 'i1', '<u2', '>u2', '<i2', '>i2', '<i4', '<f4'])
def test_8_bits_are_the_rounded_share_of_the_range_for_every_type(kind):
    pixels = np.random.default_rng(0).integers(-100, 101, (30, 40)).astype(kind)
    np.testing.assert_array_equal(images.to_uint8(pixels), stretched(pixels))
    np.testing.assert_array_equal(images.to_uint8(pixels.T), stretched(pixels).T)


def test_clahe_equals_opencv():
    archive = np.load(CASES / 'clahe.npz')
    for key in archive.files:
        if not key.endswith('image'):
            i, clip, tiles = key.split('/')
            ours = images.clahe(archive[f'{i}/image'], float(clip), int(tiles))
            np.testing.assert_array_equal(ours, archive[key], err_msg=key)
    with pytest.raises(ValueError, match='expected .H, W. uint8'):
        images.clahe(ramp())
