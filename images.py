"""Any file -> 8-bit grey (MammoDINO, arXiv 2510.11883, 3.1).

    clahe(image)       ->  uint8 (H, W)      the paper's third preprocessing step
    read(path, frame)  ->  uint8 (H, W)      any DICOM, PNG, TIFF, PGM, JPEG or .npy; one slice of a volume at a time

A file with more than one frame is a volume: multi-frame DICOM, multi-page TIFF, .npy of shape (K, H, W).
H W pixels, K slices.

Copy this file alone; it imports nothing of this repository.
"""
import contextlib
import io
import itertools
import logging
import math
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import get_frame
from pydicom.pixels import pixel_array

PICTURES = {'.png', '.tif', '.tiff', '.pgm', '.jpg', '.jpeg'}
DICOMS = {'.dcm', '.dicom', '.ima'}
SUFFIXES = PICTURES | DICOMS | {'.npy'}
MAX_PIXELS = int(float(os.environ.get('MAX_PIXELS') or 8e7))     # per frame; the largest film scans have 35 million
MAX_PAGES = 4096                    # of a TIFF, whose pages are only found one after the other
Image.MAX_IMAGE_PIXELS = MAX_PIXELS                             # Pillow refuses twice as many
logging.getLogger('PIL').addHandler(logging.NullHandler())      # what it says about broken files, it raises as well


# ---- contrast -----------------------------------------------------------------------------------------------------

def clahe(image, clip=2.0, tiles=8):
    """Contrast limited adaptive histogram equalization (Zuiderveld 1994, Reza 2004; MammoDINO 3.1), uint8 (H, W).

    The image is cut into tiles x tiles; each tile's histogram is clipped at `clip` times its mean, what was clipped
    is spread evenly, and its cumulative sum is a grey table. A pixel takes the four nearest tables, bilinearly.
    Padding, rounding and order are OpenCV's, whose results it equals for any clip above 0.
    """
    _check_uint8(image)
    H, W = image.shape
    padded = image
    if H % tiles or W % tiles:
        # OpenCV pads both sides as soon as one needs it, one that divides by `tiles` whole pixels
        padded = np.pad(image, ((0, tiles - H % tiles), (0, tiles - W % tiles)), mode='reflect')
    th, tw = padded.shape[0] // tiles, padded.shape[1] // tiles                         # pixels of a tile
    tables = np.empty((tiles, tiles, 256), np.float32)
    limit = max(int(clip * th * tw / 256), 1)
    for i in range(tiles):
        for j in range(tiles):
            histogram = _histogram(padded[i * th:(i + 1) * th, j * tw:(j + 1) * tw])
            tables[i, j] = np.rint(_clip(histogram, limit).cumsum().astype(np.float32) * np.float32(255 / (th * tw)))
    tables = tables.clip(0, 255)

    y, wy = _between(H, th)
    x, wx = _between(W, tw)
    out = np.empty_like(image)
    for rows in _runs(y):                                   # one cell of rows x columns, one set of four tables
        for columns in _runs(x):
            (t, b), (l, r) = [np.clip((at, at + 1), 0, tiles - 1) for at in (y[rows][0], x[columns][0])]
            grey, fy, fx = image[rows, columns].astype(np.intp), wy[rows, None], wx[columns]
            upper = _blend(tables[t, l].take(grey), tables[t, r].take(grey), fx)
            lower = _blend(tables[b, l].take(grey), tables[b, r].take(grey), fx)
            out[rows, columns] = np.rint(_blend(upper, lower, fy))
    return out


def _blend(a, b, f):
    """a (1 - f) + b f, in the memory of a and b."""
    a *= 1 - f
    b *= f
    a += b
    return a


def _histogram(image):
    return np.array(Image.fromarray(image).histogram())


def _clip(histogram, limit):
    """What exceeds `limit` is spread over all 256 greys, the remainder over evenly spaced ones, as in OpenCV."""
    excess = int(np.maximum(histogram - limit, 0).sum())
    histogram = np.minimum(histogram, limit) + excess // 256
    rest = excess % 256
    if rest:
        histogram[::max(256 // rest, 1)][:rest] += 1
    return histogram


def _between(length, tile):
    """For each pixel of a side: the tile whose centre lies before it (-1: none), and the weight of the next one."""
    position = np.arange(length, dtype=np.float32) * np.float32(1 / tile) - np.float32(0.5)
    before = np.floor(position).astype(int)
    return before, position - before.astype(np.float32)


def _runs(index):
    """Slices over which a sorted index is constant."""
    cuts = np.flatnonzero(np.diff(index)) + 1
    return [slice(a, b) for a, b in zip([0, *cuts], [*cuts, len(index)])]


# ---- reading ------------------------------------------------------------------------------------------------------

def frames(path):
    """Number of slices in the file: 1 for a 2D mammogram, K for a volume. Reads the header only.

    Raises ValueError or OSError with one line that says what came and what was expected.
    """
    return shape(path)[0]


def shape(path):
    """(K, H, W) of the file: slices, rows, columns. Reads the header only; raises like `frames`."""
    with _one_line_errors(path):
        if _kind(path) == 'dicom':
            ds = _header(path)[0]
            return _dicom_frames(path, ds), int(ds.Rows), int(ds.Columns)
        if _kind(path) == 'picture':
            with _open_picture(path) as image:
                return _pages(image), image.height, image.width
        with open(path, 'rb') as file:
            return _npy_header(file)


def read(path, frame=0, voi=False):
    """One frame as uint8 (H, W), stretched from its own minimum and maximum to 0..255 (MammoDINO 3.1).

    Bright is dense: MONOCHROME1 is inverted, after the rescale slope and, with `voi`, the file's VOI LUT or window.
    DICOM pixel padding takes no part in the stretch and becomes 0. A uint8 .npy is returned as it is.
    Colour is refused unless the three channels are equal. One frame is decoded, never the volume.
    Raises ValueError or OSError with one line that says what came and what was expected.
    """
    with _one_line_errors(path):
        if _kind(path) == 'dicom':
            return _read_dicom(path, frame, voi)
        if _kind(path) == 'picture':
            return _read_picture(path, frame)
        volume = _open_npy(path)
        _check_frame(frame, len(volume))
        pixels = np.array(volume[frame])
        return pixels if pixels.dtype == np.uint8 else to_uint8(pixels)


def listing(root):
    """Every image file below `root`, sorted, through linked folders too. Files named without a suffix, or with a
    number for one, count if they start like DICOM; hidden files and DICOMDIR do not."""
    if not os.path.isdir(root):
        raise ValueError(f'{root}: not a folder; expected a folder of DICOM, PNG, TIFF, PGM, JPEG or .npy files')

    def refuse(error):
        raise OSError(f'{error.filename}: the folder cannot be read ({error.strerror}); mend its permissions')

    found, seen = [], set()
    for folder, inner, names in os.walk(root, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in seen:                # a link back to where we were
            inner.clear()
            continue
        seen.add(os.path.realpath(folder))
        for name in names:
            suffix, path = Path(name).suffix.lower(), os.path.join(folder, name)
            if name.startswith('.') or name == 'DICOMDIR' or not os.path.isfile(path) and os.path.exists(path):
                continue
            if suffix in SUFFIXES or (not suffix or suffix[1:].isdigit()) and _starts_like_dicom(path):
                found.append(path)
    if not found:
        raise ValueError(f'{root}: no DICOM, PNG, TIFF, PGM, JPEG or .npy file in it')
    return sorted(found)


def _kind(path):
    suffix = os.path.splitext(path)[1].lower()
    return 'npy' if suffix == '.npy' else 'picture' if suffix in PICTURES else 'dicom'


@contextlib.contextmanager
def _one_line_errors(path):
    """Whatever a broken file makes a decoder raise becomes one clear line."""
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise ValueError(f'{path}: the file is empty')
    try:
        with warnings.catch_warnings(action='ignore'):      # decoders warn with header values in the text
            yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:      # the system's, not the decoder's: trying again may help
            raise type(error)(f'{path}: {error.strerror}') from None
        raise ValueError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_frame(frame, count):
    if not 0 <= frame < count:
        raise ValueError(f'frame {frame} is asked for, the file has {count}')


def _check_size(height, width):
    if height < 1 or width < 1:
        raise ValueError(f'declares {width}x{height} pixels')
    if height * width > MAX_PIXELS:
        raise ValueError(f'declares {width}x{height} pixels, more than {_limit()}')


def _limit():
    return f'{MAX_PIXELS:,}; the environment variable MAX_PIXELS sets another limit'


def to_uint8(pixels, padding=None, invert=False):
    """Min-max to 8 bits (H, W), rounded. `padding` bool (H, W) is left out of min and max and becomes 0."""
    valid = pixels if padding is None else pixels[~padding]
    if valid.size == 0:
        raise ValueError('every pixel is padding')
    low, high = valid.min(), valid.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError('NaN or infinite pixels')
    if low == high:
        raise ValueError(f'a constant image, every pixel is {low:g}')
    low, span = float(low), float(high) - float(low)
    if not np.isfinite(span):
        raise ValueError(f'pixels from {low:g} to {float(high):g}, too far apart for numbers')
    values = pixels
    if pixels.dtype.kind in 'ui' and pixels.dtype.itemsize <= 2:                        # each grey value once
        code = np.dtype(f'u{pixels.dtype.itemsize}')
        values = np.arange(256 ** code.itemsize, dtype=code).view(pixels.dtype.newbyteorder('='))
    scaled = values.astype(np.float64)                      # large: worked on in place
    scaled -= low
    scaled *= 255 / span
    out = np.rint(scaled.clip(0, 255, out=scaled), out=scaled).astype(np.uint8)
    if values is not pixels:
        out = out[pixels.astype(values.dtype, copy=False).view(code)]
    if invert:
        out = 255 - out
    if padding is not None:
        out[padding] = 0
    return out


def _grey(pixels):
    """(H, W) as it is; (H, W, 3) only where the three channels are equal."""
    if pixels.ndim == 3 and pixels.shape[-1] == 3:
        if not (pixels[..., :1] == pixels).all():
            raise ValueError('a colour image; expected grey, or three equal channels')
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        raise ValueError(f'pixels of shape {pixels.shape}; expected (H, W)')
    return pixels


def _open_npy(path):
    """(H, W) or (K, H, W) -> a memory map (K, H, W). Nothing is ever unpickled."""
    with open(path, 'rb') as file:
        shape = _npy_header(file)
    return np.lib.format.open_memmap(path, mode='r').reshape(shape)


def _npy_header(file):
    """(K, H, W) of an open .npy file, K = 1 for (H, W). Maps nothing, for a data set may have a million files."""
    try:
        version = np.lib.format.read_magic(file)[0]
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[version]
        shape, _, dtype = read_header(file)
        shape = tuple(map(int, shape))                      # True is a number, too
    except Exception as error:                              # the header is text that a parser of Python reads
        raise ValueError('not a .npy file of numbers; expected an array saved by numpy.save') from error
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype.kind not in 'uifb' or shape[-1] <= 4:
        raise ValueError(f'an array of shape {shape} and type {dtype}; expected numbers (H, W) or (K, H, W)')
    _check_size(*shape[-2:])
    if os.fstat(file.fileno()).st_size < file.tell() + math.prod(shape) * dtype.itemsize:
        raise ValueError(f'cut short: {os.fstat(file.fileno()).st_size} bytes for an array of shape {shape}')
    return shape if len(shape) == 3 else (1, *shape)


def _open_picture(path):
    try:
        image = Image.open(path)
    except Image.UnidentifiedImageError as error:
        raise ValueError('not an image; expected PNG, TIFF, PGM or JPEG') from error
    except Image.DecompressionBombError as error:
        raise ValueError(f'declares more pixels than {_limit()}') from error
    _check_size(image.height, image.width)
    return image


def _pages(image):
    if image.format != 'TIFF':
        return 1
    for count in range(1, MAX_PAGES + 1):
        try:
            image.seek(count)
        except EOFError:
            image.seek(0)
            return count
    raise ValueError(f'has more than {MAX_PAGES} pages, the limit of mask.MAX_PAGES')


def _read_picture(path, frame):
    with _open_picture(path) as image:
        _check_frame(frame, _pages(image))
        image.seek(frame)
        _check_size(image.height, image.width)
        deep = image.mode.startswith(('I', 'F'))                                        # 16 or 32 bit grey
        if not deep and ';16' in str(image.tile):
            raise ValueError('16-bit colour, of which only 8 bits would be read; save it as 16-bit grey')
        white_is_zero = deep and image.format == 'TIFF' and image.tag_v2.get(262) == 0  # Pillow mends 8 bit itself
        if image.mode in ('1', 'LA', 'La'):
            image = image.convert('L')
        elif not deep and image.mode != 'L':                                            # RGB, palette, CMYK, alpha
            image = image.convert('RGB')
        return to_uint8(_grey(np.array(image)), invert=white_is_zero)


# ---- DICOM --------------------------------------------------------------------------------------------------------

GDCM = 'python-gdcm'
OPTIONAL_DECODERS = {'1.2.840.10008.1.2.4.57': GDCM, '1.2.840.10008.1.2.4.70': GDCM,        # JPEG Lossless
                     '1.2.840.10008.1.2.4.80': GDCM, '1.2.840.10008.1.2.4.81': GDCM,        # JPEG-LS
                     **{f'1.2.840.10008.1.2.4.20{i}': 'pylibjpeg pylibjpeg-openjpeg' for i in (1, 2, 3)}}
FRAME_HEADERS = {0xC0: '1.2.840.10008.1.2.4.50', 0xC1: '1.2.840.10008.1.2.4.51',         # JPEG baseline, extended
                 0xC3: '1.2.840.10008.1.2.4.70', 0xF7: '1.2.840.10008.1.2.4.80'}         # lossless, JPEG-LS
UNCOMPRESSED = {(True, True): '1.2.840.10008.1.2', (False, True): '1.2.840.10008.1.2.1',       # implicit, little-endian
                (False, False): '1.2.840.10008.1.2.2'}
GROUPS = (b'\x02\x00', b'\x08\x00', b'\x00\x08')          # what a file without preamble begins with
ITEM = b'\xfe\xff\x00\xe0'                                 # what encapsulated pixels begin with
DEFLATED, EXPLICIT = b'1.2.840.10008.1.2.1.99', b'1.2.840.10008.1.2.1\0\0\0'
RLE = '1.2.840.10008.1.2.5'


def _starts_like_dicom(path):
    try:
        with open(path, 'rb') as file:
            return os.path.isfile(path) and file.read(132)[128:] == b'DICM'
    except OSError:
        return False


@contextlib.contextmanager
def _quiet_header():
    """The texts of header errors quote the header, a patient's name with it; only their kind is passed on."""
    try:
        yield
    except pydicom.errors.InvalidDicomError:
        raise ValueError('not a DICOM file (no DICM mark after 128 bytes)') from None
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f'the DICOM header is damaged ({type(error).__name__})') from None


def _opened(path):
    """The file; or, of a deflated one, what it unpacks to: a plain file in memory, of two bytes a pixel at most."""
    file = open(path, 'rb')
    head = file.read(4096)
    mark = 132 if head[128:132] == b'DICM' else 0           # the file meta begins with its own length, in four bytes
    start = mark + 12 + int.from_bytes(head[mark + 8:mark + 12], 'little')
    if DEFLATED not in head[:start]:
        file.seek(0)
        return file
    with file:
        file.seek(start)
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        data = unpack.decompress(file.read(), 2 * MAX_PIXELS)
    if unpack.unconsumed_tail:
        raise ValueError(f'unpacks to more than two bytes for each of {_limit()}')
    return io.BytesIO(head[:start].replace(DEFLATED, EXPLICIT) + data)


def _header(path):
    """Everything before the pixels, where their element begins, and its first bytes."""
    with _opened(path) as file, _quiet_header():
        bare = file.read(2) in GROUPS
        file.seek(0)
        ds = pydicom.dcmread(file, stop_before_pixels=True, force=bare)
        at, first = file.tell(), file.read(24)
        ds.file_meta.TransferSyntaxUID = _syntax_of_elements(ds)
        rows, columns, syntax = ds.get('Rows'), ds.get('Columns'), ds.file_meta.TransferSyntaxUID
    if not rows or not columns or not syntax:
        raise ValueError('a DICOM file without an image (no rows, columns or transfer syntax)')
    _check_size(rows, columns)
    return ds, at, first


def _syntax_of_elements(ds):
    """The transfer syntax as declared; of what is not compressed, or declares none, as the first element is written."""
    declared, first = ds.file_meta.get('TransferSyntaxUID'), next(ds.elements(), None)
    if declared and declared not in UNCOMPRESSED.values() or not isinstance(first, pydicom.dataelem.RawDataElement):
        return declared
    return pydicom.uid.UID(UNCOMPRESSED[first.is_implicit_VR, first.is_little_endian])


def _dicom_frames(path, ds):
    with _quiet_header():
        count = int(ds.get('NumberOfFrames') or 1)
    if not 1 <= count <= os.path.getsize(path):
        raise ValueError(f'declares {count} frames in a file of {os.path.getsize(path)} bytes')
    return count


def _read_dicom(path, frame, voi):
    ds, at, first = _header(path)
    _check_frame(frame, _dicom_frames(path, ds))
    pixels = _grey(_decode(path, ds, at, first, frame))
    with _quiet_header():
        _flatten_groups(ds, frame)
        padding, inverted = _padding(ds, pixels), ds.PhotometricInterpretation == 'MONOCHROME1'
        pixels = _rescale(ds, pixels)
        if voi:
            pixels = _window(ds, pixels)
    return to_uint8(pixels, padding, inverted)


def _decode(path, ds, at, first, frame):
    """The stored values of one frame. Encapsulated pixels behind an uncompressed transfer syntax, as some Hologic
    archives hold them, are decoded by what the stream itself says it is."""
    syntax = ds.file_meta.TransferSyntaxUID
    if ds.get('SamplesPerPixel', 1) == 1 and ds.get('PhotometricInterpretation') not in ('MONOCHROME1', 'MONOCHROME2'):
        raise ValueError('neither MONOCHROME1 nor MONOCHROME2, so its values are not greys')
    try:
        if syntax.is_encapsulated or ITEM not in (first[8:12], first[12:16]):           # after tag, VR and length
            with _opened(path) as file:
                if syntax == RLE:
                    _check_runs(file, at, ds, frame)
                return pixel_array(file, index=frame, transfer_syntax_uid=syntax)
        ds = pydicom.dcmread(path, force=True)
        ds.file_meta.TransferSyntaxUID = syntax = _syntax_of_stream(ds.PixelData)
        ds['PixelData'].is_undefined_length = True
        return pixel_array(ds, index=frame)
    except Exception as error:
        reason = ' '.join(str(error).split())
        if syntax in OPTIONAL_DECODERS and 'missing dependencies' in reason:
            reason = f'needs a decoder: pip install {OPTIONAL_DECODERS[syntax]}'
        elif 'cannot reshape' in reason or 'could not broadcast' in reason:
            reason = f'they are not {ds.Columns}x{ds.Rows}; the file is cut short or its header is wrong'
        elif '12-bit precision' in reason:
            reason = 'no Python decoder reads its 12 bits; convert the file first, with dcmdjpeg of DCMTK for example'
        raise ValueError(f'{syntax.name} pixels cannot be decoded: {reason}') from error


def _check_runs(file, at, ds, frame):
    """RLE grows up to 64-fold: its runs are counted before they are unpacked. One segment is one byte of each pixel."""
    file.seek(at + 12)                                      # after tag, VR and length
    data = get_frame(file, frame, number_of_frames=int(ds.get('NumberOfFrames') or 1))
    file.seek(0)
    count, *starts = struct.unpack('<16L', data[:64])
    most = 2 * ds.Rows * ds.Columns                         # twice what is declared, for what pads the end
    for start, end in itertools.pairwise([*starts[:count], len(data)]):
        i, total, segment = 0, 0, data[start:end]
        while i < len(segment) and total <= most:
            n = segment[i]                                  # n + 1 bytes follow, or one that stands for 257 - n
            total += n + 1 if n < 128 else 257 - n if n > 128 else 0
            i += n + 2 if n < 128 else 2 if n > 128 else 1
        if total > most:
            raise ValueError('they unpack to more than the header declares')


def _syntax_of_stream(data):
    """The transfer syntax of encapsulated pixels, by the frame header of their first JPEG stream."""
    at = data.find(b'\xff\xd8\xff', 0, 4096) + 2
    if at == 1 and data.find(b'\xff\x4f\xff\x51', 0, 4096) >= 0:
        return pydicom.uid.JPEG2000
    while 1 < at < len(data) - 3 and data[at] == 0xFF and data[at + 1] != 0xDA:         # up to the start of scan
        if data[at + 1] in FRAME_HEADERS:
            return pydicom.uid.UID(FRAME_HEADERS[data[at + 1]])
        at += 2 + int.from_bytes(data[at + 2:at + 4], 'big')
    raise ValueError('they are encapsulated while the header declares them uncompressed, and are of no known kind')


def _padding(ds, pixels):
    """bool (H, W), True where the stored value is PixelPaddingValue or in its range; None where nothing is."""
    low, high = ds.get('PixelPaddingValue'), ds.get('PixelPaddingRangeLimit')
    if low is None:
        return None
    kind = 'i2' if ds.PixelRepresentation else 'u2'                                     # some write -2000 as 63536
    low, high = sorted(np.array([low, low if high is None else high]).astype(kind).tolist())
    padding = (pixels >= low) & (pixels <= high)
    return padding if padding.any() else None


def _rescale(ds, pixels):
    """The modality LUT, or slope and intercept. The stretch undoes both, but for the sign and for a window."""
    if ds.get('ModalityLUTSequence'):
        return _look_up(ds.ModalityLUTSequence[0], pixels)
    slope, intercept = float(ds.get('RescaleSlope') or 1), float(ds.get('RescaleIntercept') or 0)
    return pixels if (slope, intercept) == (1, 0) else pixels * slope + intercept


def _look_up(item, values):
    """A modality or VOI LUT, PS3.3 C.11.1.1: values before its first entry take that, values behind its last take that.

    pydicom's own counts in the type of the pixels or of the entries, and wraps round where the table is the longer.
    """
    (count, first, _), table = item.LUTDescriptor, item.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, '<u2' if item.original_encoding[1] else '>u2')
    table = np.asarray(table)[:count or 65536]
    return table[(values.astype(np.int64) - first).clip(0, len(table) - 1)]


def _window(ds, x):
    """The first VOI LUT, else the first window to 0..1 (PS3.3 C.11.2.1), else the values as they are.

    pydicom's own window falls where the slope of the rescale does.
    """
    if ds.get('VOILUTSequence') and 'LUTData' in ds.VOILUTSequence[0]:
        return _look_up(ds.VOILUTSequence[0], x)
    if ds.get('WindowCenter') is None or ds.get('WindowWidth') is None:
        return x
    center, width = (float(np.ravel(ds[name].value)[0]) for name in ('WindowCenter', 'WindowWidth'))
    function = (ds.get('VOILUTFunction') or 'LINEAR').upper()
    if function == 'LINEAR':
        center, width = center - 0.5, width - 1
    if function not in ('LINEAR', 'LINEAR_EXACT', 'SIGMOID') or width < 0:
        raise ValueError('no window')
    width = max(width, 1e-9)                                # a threshold
    if function == 'SIGMOID':
        return 1 / (1 + np.exp(-4 * (x - center) / width))
    return ((x - center) / width + 0.5).clip(0, 1)


def _flatten_groups(ds, frame):
    """Enhanced multi-frame files keep rescale and window in groups, shared or per frame; put them into the root."""
    groups = list(ds.get('SharedFunctionalGroupsSequence', []))[:1] \
        + list(ds.get('PerFrameFunctionalGroupsSequence', []))[frame:frame + 1]
    for group in groups:
        for name in ('PixelValueTransformationSequence', 'FrameVOILUTSequence'):
            for item in list(group.get(name, []))[:1]:
                ds.update(item)


def _check_uint8(image):
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f'an image of shape {image.shape} and type {image.dtype}; '
                         'expected (H, W) uint8, as `read` gives')
