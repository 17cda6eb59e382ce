"""images.py: every kind of file becomes the same 8-bit mammogram, or is refused in one sentence; CLAHE is
OpenCV's. The ways in which a DICOM file may be written are a table of their own, test_dicom.py."""
import io
import os
import struct
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from conftest import CASES
from PIL import Image
from pydicom import uid

import images


# ---- files ---------------------------------------------------------------------------------------

def ramp(shape=(40, 30), low=100, high=4000):
    return np.linspace(low, high, shape[0] * shape[1]).reshape(shape).astype(np.uint16)


def stretched(pixels):
    """The definition: min-max to 0..255, rounded."""
    x = pixels.astype(np.float64)
    return np.uint8(np.rint((x - x.min()) * (255 / (x.max() - x.min()))))


def item(**elements):
    """A data set, or an item of a sequence."""
    ds = pydicom.Dataset()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def dicom(path, pixels, syntax=uid.ExplicitVRLittleEndian, streams=None, vr=None, edit=None, bend=None,
          **elements):
    """Pixels (H, W) or (K, H, W), or their compressed `streams`, in a DICOM file. `elements` override the
    header, None removes one; `edit` changes the data set, `bend` the bytes of the file."""
    bits, order = 8 * pixels.itemsize, '<' if syntax.is_little_endian else '>'
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    ds = item(SOPClassUID='1.2.840.10008.5.1.4.1.1.1.2', SOPInstanceUID='1.2.3', Modality='MG',
              PatientName='Secret^Name', PatientID='Secret', Rows=pixels.shape[-2], Columns=pixels.shape[-1],
              SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2', BitsAllocated=bits, BitsStored=bits,
              HighBit=bits - 1, PixelRepresentation=int(pixels.dtype.kind == 'i'))
    if pixels.ndim == 3:
        ds.NumberOfFrames = len(pixels)
    value = pydicom.encaps.encapsulate(streams) if streams else data + bytes(len(data) % 2)
    ds.add_new('PixelData', vr or ('OB' if bits == 8 else 'OW'), value)
    ds['PixelData'].is_undefined_length = bool(streams)
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == uid.RLELossless and not streams:
        ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        ds.compress(uid.RLELossless, generate_instance_uid=False)
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
    kinds = {
        'deep.png': pixels, 'eight.png': eight, 'rgb.png': np.stack([eight] * 3, axis=-1), 'deep.tiff': pixels,
        'eight.pgm': eight, 'deep.pgm': b'P5 30 40 65535\n' + pixels.astype('>u2').tobytes(),
        'integer.npy': pixels, 'float.npy': pixels / np.float32(8), 'explicit.dcm': {},
        'implicit': dict(syntax=uid.ImplicitVRLittleEndian), 'big.dicom': dict(syntax=uid.ExplicitVRBigEndian),
        '1.2.840.9': dict(syntax=uid.RLELossless),
        'j2k.ima': dict(syntax=uid.JPEG2000Lossless, streams=j2k(pixels))}
    for name, content in kinds.items():
        create(tmp_path / name, content)
    for name, wrong in [('explicit.dcm', 'dicom.png'), ('deep.png', 'png.dcm'), ('integer.npy', 'npy.jpg')]:
        (tmp_path / wrong).write_bytes((tmp_path / name).read_bytes())
    files = images.listing(tmp_path)
    assert len(files) == 16
    for path in files:
        assert images.shape(path) == (1, 40, 30)
        np.testing.assert_array_equal(images.read(path), eight, err_msg=path)
    (tmp_path / 'jpeg.png').write_bytes(encoded(eight, 'JPEG', quality=95))
    assert np.abs(images.read(tmp_path / 'jpeg.png').astype(int) - eight).max() <= 3
    np.save(tmp_path / 'prepared.npy', eight // 2)          # 8 bits are not stretched again
    np.testing.assert_array_equal(images.read(tmp_path / 'prepared.npy'), eight // 2)


def test_volumes_are_read_in_file_order(tmp_path):
    volume = np.random.default_rng(0).integers(0, 4001, (5, 40, 30)).astype(np.uint16)
    fragments = [half for stream in j2k(*volume) for half in (stream[:200], stream[200:])]
    for name, changes in {
            'plain': {}, 'rle': dict(syntax=uid.RLELossless),
            'j2k': dict(syntax=uid.JPEG2000Lossless, streams=j2k(*volume)),
            'two fragments a frame': dict(syntax=uid.JPEG2000Lossless, streams=fragments)}.items():
        dicom(tmp_path / f'{name}.dcm', volume, **changes)
    np.save(tmp_path / 'a.npy', volume)
    (tmp_path / 'a.tif').write_bytes(tiff(*volume))
    for path in images.listing(tmp_path):
        assert images.frames(path) == 5
        for k in (0, 3, 4):
            np.testing.assert_array_equal(images.read(path, k), stretched(volume[k]), err_msg=f'{path} {k}')
        with pytest.raises(ValueError, match='frame 5 is asked for, the file has 5'):
            images.read(path, 5)


@pytest.mark.parametrize('kind', [np.uint16, np.float32])
def test_film_digitisers_tiff_with_white_as_zero_is_inverted(kind, tmp_path):
    Image.fromarray(ramp().astype(kind)).save(tmp_path / 'a.tif', tiffinfo={262: 0})
    np.testing.assert_array_equal(images.read(tmp_path / 'a.tif'), 255 - stretched(ramp()))


@pytest.mark.parametrize('high, position, cut', [
    (4095, 12, True), (4095, None, False), (4095, 0, False), (3000, None, True)])
def test_an_overlay_above_the_stored_bits_is_cut_off_and_greys_above_them_stay(high, position, cut, tmp_path):
    """An overlay is known by its group 60xx, or by greys that stay away from the limit that it lies above."""
    pixels = ramp(low=0, high=high)
    above = pixels | np.uint16(np.indices(pixels.shape).sum(0) % 7 == 0) << 12
    dicom(tmp_path / 'a.dcm', above, uid.JPEG2000Lossless, j2k(above), BitsStored=12, HighBit=11,
          edit=lambda ds: position is None or ds.add_new(0x60020102, 'US', position))
    np.testing.assert_array_equal(images.read(tmp_path / 'a.dcm'), stretched(pixels if cut else above))


# ---- what a file declares, and what it holds -----------------------------------------------------

@pytest.mark.parametrize('declared, held', [(None, 3), (2, 3), (10 ** 9, 1), (-2, 1)])
@pytest.mark.parametrize('syntax', [uid.ExplicitVRLittleEndian, uid.JPEG2000Lossless, uid.RLELossless])
def test_frames_that_the_header_does_not_count_are_never_dropped(syntax, declared, held, tmp_path):
    volume = np.stack([ramp(), ramp()[::-1], ramp()[:, ::-1]])[:held]
    streams = j2k(*volume) if syntax == uid.JPEG2000Lossless else None
    path = dicom(tmp_path / 'a.dcm', volume, syntax, streams, NumberOfFrames=declared)
    for function in (images.read, images.frames):
        with pytest.raises(ValueError, match=f'declares {declared or 1} frames?, holds {held}'):
            function(path)


@pytest.mark.parametrize('syntax', [
    uid.ExplicitVRLittleEndian, uid.JPEGLosslessSV1, uid.RLELossless, uid.JPEGBaseline8Bit])
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
GREY = encoded(ramp(), 'PNG')
IHDR = GREY[12:25] + b'\4' + GREY[26:29]            # kind 4 is grey with alpha, 16 bits each
WITH_ALPHA = GREY[:12] + IHDR + zlib.crc32(IHDR).to_bytes(4, 'big') + GREY[33:]

BAD = {
    'empty, or not a DICOM, PNG': {
        'empty.png': b'', 'text.dcm': b'not a DICOM file ' * 20, 'script.png': b'%!PS-Adobe-3.0\n(x) run\n'},
    'cut short': {
        'a.png': GREY[:99], 'a.npy': b'\x93NUMPY\x01\x00v\x00',
        'objects.npy': np.array([[{}]], dtype=object), 'short.dcm': dict(PixelData=bytes(1000)),
        'length.dcm': dict(bend=lambda data: data[:138] + b'\xff' + data[139:]),
        'torn.dcm': dict(syntax=uid.JPEG2000Lossless, streams=[j2k(ramp())[0][:300]])},
    'a constant image, or NaN or infinite': {
        'constant.png': np.full((40, 30), 9, np.uint8), 'nan.npy': np.where(np.eye(9), np.nan, 1.0),
        'infinite.npy': np.where(np.eye(9), np.inf, 1.0)},
    'expected numbers .H, W.': {
        'line.npy': np.zeros(9), 'zero.npy': np.zeros((0, 9), np.uint8), 'rgb.npy': np.zeros((9, 9, 3))},
    'a colour image': {
        'a.png': COLOUR,
        'a.dcm': dict(pixels=COLOUR[..., 0], streams=[encoded(COLOUR, 'JPEG')], SamplesPerPixel=3,
                      PlanarConfiguration=0, PhotometricInterpretation='YBR_FULL_422')},
    '16-bit colour': {'a.png': WITH_ALPHA},
    'declares 60000x60000 pixels; .MAX_PIXELS allows 80,000,000': {'a.pgm': b'P5 60000 60000 255\n'},
    'every pixel is padding': {'a.dcm': dict(pixels=np.full((9, 9), 5, np.uint16), PixelPaddingValue=5)},
    'no pixel data': {'a.dcm': dict(PixelData=None)},
    'not greys': {'palette.dcm': dict(PhotometricInterpretation='PALETTE COLOR'),
                  'other.dcm': dict(PhotometricInterpretation='SECRET')},
    'holds 0': {'samples.dcm': dict(SamplesPerPixel=7777), 'private.dcm': dict(bend=PRIVATE)},
    'are not JPEG': {'a.dcm': dict(streams=[b'nothing known' * 9])},
    'stream of 60x80 pixels, 1 channel': {'a.dcm': dict(streams=j2k(ramp(shape=(80, 60))))},
    'no Python decoder reads its 12 bits': {'a.dcm': dict(syntax=uid.JPEGBaseline8Bit, streams=[TWELVE_BITS])},
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


def test_without_a_decoder_the_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(images, 'get_decoder', lambda syntax: SimpleNamespace(is_available=False))
    htj2k = dicom(tmp_path / 'htj2k.dcm', ramp(), uid.HTJ2KLossless, j2k(ramp()))
    with pytest.raises(ValueError, match='needs a decoder: pip install pylibjpeg pylibjpeg-openjpeg'):
        images.read(htj2k)
    for name in ('lossless', 'mislabelled', 'jpegls'):
        with pytest.raises(ValueError, match='needs a decoder: pip install python-gdcm'):
            images.read(CASES / f'{name}.dcm')


def test_decompression_bombs_are_refused_before_they_unpack(tmp_path, monkeypatch):
    """Small files that declare, or unpack to, far more than an image; a million pixels are the limit here."""
    monkeypatch.setattr(images, 'MAX_PIXELS', 1_000_000)
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, dict(descr='|u1', fortran_order=False, shape=(60_000, 60_000)))
    small, flat = np.zeros((200, 200), np.uint8), np.zeros((9000, 9000), np.uint8)
    for words, content in [
            ('cut short', npy.getvalue() + bytes(100)),
            ('allows 1,000,000', dict(streams=j2k(small), Rows=60_000, Columns=60_000)),
            ('holds', dict(syntax=uid.DeflatedExplicitVRLittleEndian, PixelData=bytes(300_000_000))),
            ('a stream of 9000x9000', dict(pixels=small, streams=j2k(flat))),
            ('a stream of 9000x9000', dict(pixels=small, streams=[encoded(flat, 'JPEG', quality=1)]))]:
        create(tmp_path / 'bomb', content)
        tracemalloc.start()
        with pytest.raises(ValueError, match=words):
            images.read(tmp_path / 'bomb')
        assert tracemalloc.get_traced_memory()[1] < 20e6, words         # bytes, at the peak
        tracemalloc.stop()


def test_links_are_followed_once_and_hidden_files_are_not_images(tmp_path):
    data, far = tmp_path / 'data', tmp_path / 'far'
    data.mkdir()
    far.mkdir()
    for path in (far / 'b.npy', data / 'a.npy', data / '._a.npy'):
        np.save(path, ramp())
    (data / 'notes').write_text('x')
    dicom(data / 'DICOMDIR', ramp())
    os.symlink(far, data / 'far')
    os.symlink(data, data / 'loop')
    assert [os.path.basename(path) for path in images.listing(data)] == ['a.npy', 'b.npy']


# ---- grey values and contrast --------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['u1', 'i1', '<u2', '>u2', '<i2', '>i2', '<i4', '<f4'])
def test_8_bits_are_the_rounded_share_of_the_range_for_every_type(kind):
    pixels = np.random.default_rng(0).integers(-100, 101, (30, 40)).astype(kind)
    np.testing.assert_array_equal(images.to_uint8(pixels.T), stretched(pixels).T)


def test_percentiles_replace_minimum_and_maximum():
    pixels = ramp()
    pixels[0, :3] = 65535                               # a burned-in label
    low, high = np.percentile(pixels, (1, 99))
    expected = np.rint((pixels.clip(low, high) - low) * (255 / (high - low)))
    np.testing.assert_array_equal(images.to_uint8(pixels, percentiles=(1, 99)), expected)


def test_clahe_equals_opencv():
    archive = np.load(CASES / 'clahe.npz')
    for key in archive.files:
        if not key.endswith('image'):
            i, clip, tiles = key.split('/')
            ours = images.clahe(archive[f'{i}/image'], float(clip), int(tiles))
            np.testing.assert_array_equal(ours, archive[key], err_msg=key)
