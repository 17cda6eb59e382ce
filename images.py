"""Any file -> 8-bit grey (MammoDINO, arXiv 2510.11883, 3.1).

    read(path, frame)  ->  uint8 (H, W)     a frame of DICOM, PNG, TIFF, PGM, JPEG or .npy; bright is dense
    shape(path)        ->  (K, H, W)        from the header, nothing is decoded
    clahe(image)       ->  uint8 (H, W)     the paper's contrast step

A file of K > 1 frames is a volume: multi-frame DICOM, multi-page TIFF, .npy (K, H, W). Frames count from 0
in the order in which the file stores them. H W are pixels of a frame, h w of a tile.
What cannot be read raises ValueError, or OSError where the system refuses it, in one sentence with the path.

Copy this file alone; it imports nothing of this repository.
"""
import contextlib
import io
import logging
import math
import os
import re
import struct
import warnings
import zlib
from functools import partial

import numpy as np
import pydicom
from PIL import Image
from pydicom.pixels import apply_windowing, get_decoder, pixel_array
from pydicom.uid import UID

SUFFIXES = {'.png', '.tif', '.tiff', '.pgm', '.jpg', '.jpeg', '.dcm', '.dicom', '.ima', '.npy'}
PICTURES = b'\x89PNG', b'II*\0', b'MM\0*', b'\xff\xd8\xff', b'P2', b'P5', b'P6'
MAX_PIXELS = int(float(os.environ.get('MAX_PIXELS') or 8e7))    # of a frame; large films have 35 million
Image.MAX_IMAGE_PIXELS = None                                   # MAX_PIXELS holds for pictures too
logging.getLogger('PIL').addHandler(logging.NullHandler())      # what it logs of broken files, it also raises


class Unreadable(ValueError):
    """Our own words for what is wrong: a decoder's could quote the header, with the patient's name."""


# ---- reading -------------------------------------------------------------------------------------

def read(path, frame=0, voi=False, percentiles=None):
    """One frame as uint8 (H, W), its own minimum and maximum stretched to 0..255 (MammoDINO 3.1,
    whose step to 8 bit is part of the stretch here).

    Bright is dense: MONOCHROME1 and exposures with bright air are inverted. `voi` applies the VOI LUT or
    window first. DICOM padding is left out of the stretch and becomes 0. `percentiles` (low, high) replace
    minimum and maximum. A .npy of uint8 is returned as it is. One frame is decoded, never the volume."""
    with _opened(path) as ((K, _, _), _, decode):
        if not 0 <= frame < K:
            raise Unreadable(f'frame {frame} is asked for, the file has {K}')
        return decode(frame, voi, percentiles)


def read_equalised(path, frame=0, voi=False, equalise=True):
    """`read`, then CLAHE; a .npy is taken as it is, since prepare.py has equalised it."""
    image = read(path, frame, voi)
    return clahe(image) if equalise and not str(path).lower().endswith('.npy') else image


def frames(path):
    """Number of frames: 1 for a 2D mammogram, K for a volume."""
    return shape(path)[0]


def shape(path):
    """(K, H, W) of the file, from its header."""
    with _opened(path) as (size, _, _):
        return size


def refusal(path):
    """Why the header of a DICOM file says that it holds no mammogram; None where nothing says so."""
    with _opened(path) as (_, ds, _):
        if ds is None:
            return None
        kind = ds.get('SOPClassUID', UID('')).name          # its name in DICOM's dictionary
        if 'Segmentation' in kind:
            return 'a segmentation object'
        # Digitised films, all of CBIS-DDSM too, are secondary captures, but with a modality of radiographs.
        if 'Secondary Capture' in kind and ds.get('Modality') not in ('MG', 'RG', 'CR', 'DX'):
            return 'a secondary capture that is no radiograph'
        crop = str(ds.get('SeriesDescription')).strip().lower() == 'cropped images'     # CBIS-DDSM's
        return 'a crop of a lesion' if crop else None


def listing(root):
    """Every image file below `root`, sorted, through linked folders too. A file without a suffix, or with a
    number for one, counts if DICM stands at byte 128; hidden files and DICOMDIR do not."""
    def fail(error):                                        # os.walk would skip the folder in silence
        raise OSError(f'{error.filename}: {error.strerror}; expected a folder that can be read')

    paths, visited = [], set()
    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=True):
        if os.path.realpath(folder) in visited:             # a link back to where the walk was
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        for name in names:
            path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            if not suffix.strip('.0123456789') and os.path.isfile(path):    # a UID for a name
                mark = np.fromfile(path, np.uint8, 4, offset=128).tobytes()
                suffix = '.dcm' if mark == b'DICM' else ''
            if suffix in SUFFIXES and name[0] != '.' and name != 'DICOMDIR':
                paths.append(path)
    if not paths:
        raise ValueError(f'{root}: no DICOM, PNG, TIFF, PGM, JPEG or .npy file in it')
    return sorted(paths)


@contextlib.contextmanager
def _opened(path):
    """-> (K, H, W); the header of DICOM, else None; decode(frame, voi, percentiles) -> uint8 (H, W).
    Whatever a broken file makes a decoder raise, here or in the block that uses it, becomes one sentence."""
    try:
        with warnings.catch_warnings(action='ignore'), open(path, 'rb') as file:    # warnings quote headers
            head, ds = file.read(132), None
            file.seek(0)
            # The first bytes say what the file is, for suffixes can be wrong.
            if head[128:] == b'DICM' or head[:2] in (b'\2\0', b'\x08\0', b'\0\x08'):     # no preamble
                file, ds = _header(file)
                stored = _stored_frames(file, ds)
                K, H, W = len(stored), ds.Rows, ds.Columns
                decode = partial(_read_dicom, file, ds, stored)
            elif head.startswith(b'\x93NUMPY'):
                volume = _open_npy(path)
                K, H, W = volume.shape
                decode = partial(_read_npy, volume)
            elif head.startswith(PICTURES):
                # without `formats`, Pillow can start Ghostscript
                image = Image.open(file, formats=('PNG', 'TIFF', 'PPM', 'JPEG'))
                K = image.n_frames if image.format == 'TIFF' else 1     # an animated PNG is one
                H, W, decode = image.height, image.width, partial(_read_picture, image)
            else:
                raise Unreadable('empty, or not a DICOM, PNG, TIFF, PGM, JPEG or .npy file')
            if H * W > MAX_PIXELS:                          # before they are allocated
                raise Unreadable(f'declares {W}x{H} pixels; $MAX_PIXELS allows {MAX_PIXELS:,}')
            yield (K, H, W), ds, decode
    except Unreadable as error:
        raise ValueError(f'{path}: {error}') from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:      # the system's, not a decoder's
            raise type(error)(f'{path}: {error.strerror}') from None
        raise ValueError(f'{path}: damaged or cut short ({type(error).__name__})') from None


def _open_npy(path):
    volume = np.lib.format.open_memmap(path, mode='r')      # nothing is ever unpickled
    numbers = volume.dtype.kind in 'uifb' and volume.size
    if not numbers or volume.ndim not in (2, 3) or volume.shape[-1] <= 4:           # colour
        raise Unreadable(f'{volume.dtype} {volume.shape}; expected numbers (H, W) or (K, H, W)')
    return volume if volume.ndim == 3 else volume[None]                             # (K, H, W)


def _read_npy(volume, frame, voi, percentiles):
    pixels = np.array(volume[frame])
    return pixels if pixels.dtype == np.uint8 else to_uint8(pixels, percentiles=percentiles)


def _read_picture(image, frame, voi, percentiles):
    size = image.size
    image.seek(frame)
    if image.size != size:
        raise Unreadable('frames of different sizes')
    deep = image.mode.startswith(('I', 'F'))                # 16 or 32 bit grey
    if not deep and ';16' in str(image.tile):
        raise Unreadable('16-bit colour, of which only 8 bits would be read; save it as grey')
    # Photometric interpretation 0, white is zero: Pillow inverts only what has 8 bits.
    inverted = deep and image.format == 'TIFF' and image.tag_v2.get(262) == 0
    if not deep:                                            # 1 bit, alpha, palette and CMYK too
        image = image.convert('L' if image.mode in ('1', 'L', 'LA', 'La') else 'RGB')
    return to_uint8(_grey(np.array(image)), invert=inverted, percentiles=percentiles)


# ---- grey values and contrast --------------------------------------------------------------------

def to_uint8(pixels, padding=None, invert=False, percentiles=None):
    """round(255 (x - low) / (high - low)) as uint8 (H, W), low and high the minimum and maximum of x.

    `padding`, bool (H, W), has no part in them and becomes 0. `percentiles` of the rest can replace them,
    so that a burned-in label takes no greys from the breast."""
    valid = pixels if padding is None else pixels[~padding]
    if valid.size == 0:
        raise Unreadable('every pixel is padding')
    low, high = np.percentile(valid, percentiles) if percentiles else (valid.min(), valid.max())
    low, span = float(low), float(high) - float(low)        # a difference of bytes would wrap round
    if not 0 < span < np.inf:
        raise Unreadable('a constant image, or NaN or infinite pixels')
    x = (pixels.astype(np.float64) - low) * (255 / span)
    np.clip(x, 0, 255, out=x)                               # in place: a frame of floats is large
    out = np.rint(x, out=x).astype(np.uint8)
    out = 255 - out if invert else out
    if padding is not None:
        out[padding] = 0
    return out


def _grey(pixels):
    """(H, W) as it is; (H, W, 3) only where the three channels are equal."""
    if pixels.shape[2:] == (3,) and (pixels[..., :1] == pixels).all():
        pixels = pixels[..., 0]
    if pixels.ndim != 2:
        raise Unreadable('a colour image; expected grey, or three equal channels')
    return pixels


def clahe(image, clip=2.0, tiles=8):
    """Contrast limited adaptive histogram equalization (Zuiderveld 1994; MammoDINO 3.1), uint8 (H, W);
    the paper does not give `clip` and `tiles`.

    The image is cut into tiles x tiles. The histogram of each, cut at `clip` times its mean, gives a table:

        table(v) = 255 / (h w) * (number of pixels <= v)

    A pixel takes the tables of the four tiles around it, mixed by the distance to their centres. Padding,
    rounding and the order of operations are OpenCV's, whose results this equals bit for bit."""
    (H, W), padded = image.shape, image
    if H % tiles or W % tiles:
        # OpenCV pads both sides as soon as one needs it, so a side that divides grows by `tiles`.
        padded = np.pad(image, ((0, tiles - H % tiles), (0, tiles - W % tiles)), mode='reflect')
    h, w = padded.shape[0] // tiles, padded.shape[1] // tiles
    limit = max(int(clip * h * w / 256), 1)
    tables = np.empty((tiles, tiles, 256), np.float32)
    for i, j in np.ndindex(tiles, tiles):
        counts = np.bincount(padded[i * h:(i + 1) * h, j * w:(j + 1) * w].ravel(), minlength=256)
        # What exceeds the limit is spread over all greys, the remainder over evenly spaced ones.
        each, rest = divmod(int(np.maximum(counts - limit, 0).sum()), 256)
        counts = np.minimum(counts, limit) + each
        counts[::max(256 // max(rest, 1), 1)][:rest] += 1
        below = counts.cumsum().astype(np.float32)
        tables[i, j] = np.rint(below * np.float32(255 / (h * w))).clip(0, 255)

    # y, x: in tiles, from the centre of the first. All pixels between four centres share four tables.
    y, x = (np.arange(n, dtype=np.float32) * np.float32(1 / tile) - np.float32(0.5)
            for n, tile in ((H, h), (W, w)))
    out = np.empty_like(image)
    for i, j in np.ndindex(tiles + 1, tiles + 1):
        rows = slice(*np.searchsorted(y, [i - 1, i]))
        columns = slice(*np.searchsorted(x, [j - 1, j]))
        a, b = y[rows, None] - (i - 1), x[columns] - (j - 1)
        grey = image[rows, columns].astype(np.intp)
        # at the border, two of the four are the same
        (top, bottom), (left, right) = np.clip([(i - 1, i), (j - 1, j)], 0, tiles - 1)
        upper = tables[top, left].take(grey) * (1 - b) + tables[top, right].take(grey) * b
        lower = tables[bottom, left].take(grey) * (1 - b) + tables[bottom, right].take(grey) * b
        out[rows, columns] = np.rint(upper * (1 - a) + lower * a)
    return out


# ---- DICOM ---------------------------------------------------------------------------------------

IMPLICIT, EXPLICIT, BIG, RLE = (UID(f'1.2.840.10008.1.2{end}') for end in ('', '.1', '.2', '.5'))
UNCOMPRESSED = {(True, True): IMPLICIT, (False, True): EXPLICIT, (False, False): BIG}
DEFLATED, INFLATED = b'1.2.840.10008.1.2.1.99', b'1.2.840.10008.1.2.1\0\0\0'
# Marker before a stream's size -> 1.2.840.10008.1.2.4.x: three kinds of JPEG, JPEG-LS, JPEG 2000
STREAMS = {0xC0: 50, 0xC1: 51, 0xC3: 70, 0xF7: 80, 0x51: 90}


def _read_dicom(file, ds, stored, frame, voi, percentiles):
    photometric = ds.get('PhotometricInterpretation')
    if ds.get('SamplesPerPixel', 1) == 1 and photometric not in ('MONOCHROME1', 'MONOCHROME2'):
        raise Unreadable('neither MONOCHROME1 nor MONOCHROME2, so its values are not greys')
    pixels = _grey(_decode(file, ds, stored, frame))
    # JPEG 2000 may hold bits above BitsStored. They are an overlay, to be cut off, if a group 60xx declares
    # one or no grey lies just below the limit. Else too few bits are declared (BCS-DBT), and all are grey.
    limit = 1 << ds.BitsStored
    if pixels.max() >= limit:
        near = (pixels >= limit - limit // 16) & (pixels < limit)
        places = [ds.get((group, 0x0102)) for group in range(0x6000, 0x6020, 2)]    # OverlayBitPosition
        if not near.any() or any(place and place.value >= ds.BitsStored for place in places):
            spare = 8 * pixels.itemsize - ds.BitsStored
            pixels = pixels << spare >> spare               # carries the sign on
    # Enhanced files keep rescale and window in groups, shared or per frame, instead of the root.
    for group in [*ds.get('SharedFunctionalGroupsSequence', [])[:1],
                  *ds.get('PerFrameFunctionalGroupsSequence', [])[frame:frame + 1]]:
        for name in ('PixelValueTransformationSequence', 'FrameVOILUTSequence'):
            for item in group.get(name, [])[:1]:
                ds.update(item)
    # MONOCHROME1 shows low values bright. Of files FOR PROCESSING, some are MONOCHROME2 although sign +1 says
    # that air, which stops no X-rays, has the high values. FOR PRESENTATION the sign describes the detector.
    intent = ds.get('PresentationIntentType') or ds.get('SOPClassUID', UID('')).name
    exposure = intent.upper().endswith('FOR PROCESSING')
    bright_air = exposure and ds.get('PixelIntensityRelationshipSign') == 1
    padding, low, high = None, ds.get('PixelPaddingValue'), ds.get('PixelPaddingRangeLimit')
    if low is not None:
        kind = 'i2' if ds.PixelRepresentation else 'u2'     # some write -2000 as 63536
        ends = np.array([low, low if high is None else high]).astype(kind)
        padding = (ends.min() <= pixels) & (pixels <= ends.max())
    inverted = photometric == 'MONOCHROME1' or bright_air
    return to_uint8(_values(ds, pixels, voi), padding, inverted, percentiles)


def _values(ds, pixels, voi):
    """Stored values -> modality LUT, or slope and intercept -> with `voi`, the first VOI LUT or window."""
    slope, intercept = float(ds.get('RescaleSlope') or 1), float(ds.get('RescaleIntercept') or 0)
    if ds.get('ModalityLUTSequence'):
        pixels = _look_up(ds.ModalityLUTSequence[0], pixels)
    elif (slope, intercept) != (1, 0):
        pixels = pixels * slope + intercept
    if voi and ds.get('VOILUTSequence') and 'LUTData' in ds.VOILUTSequence[0]:
        return _look_up(ds.VOILUTSequence[0], pixels)
    if voi and ds.get('WindowCenter') is not None and ds.get('WindowWidth') is not None:
        ds.VOILUTFunction = ds.get('VOILUTFunction') or 'LINEAR'
        for name in ('ModalityLUTSequence', 'RescaleSlope'):    # else pydicom's window falls with the slope
            ds.pop(name, None)
        return apply_windowing(pixels, ds)
    return pixels


def _look_up(item, values):
    """A modality or VOI LUT (PS3.3 C.11.1.1); values outside of the table take its first or last entry.
    pydicom's own counts in the type of the pixels, and wraps round where the table is longer."""
    (count, first, _), table = item.LUTDescriptor, item.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, '<u2' if item.original_encoding[1] else '>u2')
    count, table = count or 65536, np.atleast_1d(table)
    if len(table) == (count + 1) // 2 < count:              # bytes, two to a word, the low one first
        table = table.astype('<u2').view(np.uint8)
    return table[:count][(values.astype(np.int64) - first).clip(0, min(count, len(table)) - 1)]


def _header(file):
    """-> the file, where its pixels begin, and the header, with the transfer syntax put right"""
    head = file.read(4096)
    meta = 132 if head[128:132] == b'DICM' else 0           # the file meta begins with its length
    body = meta + 12 + int.from_bytes(head[meta + 8:meta + 12], 'little')
    file.seek(0)
    if DEFLATED in head[:body]:                             # two bytes a pixel are enough for a mammogram
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read()[body:], 2 * MAX_PIXELS)
        file = io.BytesIO(head[:body].replace(DEFLATED, INFLATED) + data)
    ds = pydicom.dcmread(file, stop_before_pixels=True, force=True)
    # Uncompressed: how the first element is written counts, not the syntax that is declared.
    syntax, first = ds.file_meta.get('TransferSyntaxUID'), next(ds.elements(), None)
    if syntax in (None, *UNCOMPRESSED.values()) and hasattr(first, 'is_implicit_VR'):
        syntax = UNCOMPRESSED[first.is_implicit_VR, first.is_little_endian]
    if not syntax or not ds.get('Rows') or not ds.get('Columns'):
        raise Unreadable('a DICOM file without an image')
    ds.file_meta.TransferSyntaxUID = syntax
    return file, ds


def _stored_frames(file, ds):
    """Where the frames lie: range(K) of uncompressed ones, else the fragments of each, [(start, length)].
    NumberOfFrames can be missing over a volume, or promise one over an image: it must agree."""
    syntax, fragments, stored = ds.file_meta.TransferSyntaxUID, [], []
    head = file.read(8 if syntax == IMPLICIT else 12)       # tag, kind of value where explicit, length
    if head[:4] not in (b'\xe0\x7f\x10\0', b'\x7f\xe0\0\x10'):
        raise Unreadable('a DICOM file without an image: no pixel data')
    start, size = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(start)
    while (item := file.read(8))[:4] == b'\xfe\xff\0\xe0' and len(item) == 8:          # PS3.5 A.4
        at, length = file.tell(), int.from_bytes(item[4:], 'little')
        fragments.append((at, min(length, size - at), file.read(3)))
        file.seek(at + length)
    # The first item is a table of offsets, often empty or wrong. But frames begin alike: with the marker of a
    # JPEG stream, or the number of RLE segments.
    for at, length, begin in fragments[1:]:
        if begin == fragments[1][2]:
            stored.append([])
        stored[-1].append((at, length))
    if not fragments and syntax in UNCOMPRESSED.values():
        length = int.from_bytes(head[-4:], 'little' if head[0] == 0xE0 else 'big')
        layout = ds.Rows, ds.Columns, ds.get('SamplesPerPixel', 1), ds.BitsAllocated
        bits = math.prod(map(int, layout))                  # a damaged header may hold lists instead
        stored = range(8 * min(length, size - start) // bits)
    count = int(ds.get('NumberOfFrames') or 1)
    if count != len(stored):
        promised = '1 frame' if count == 1 else f'{count} frames'
        raise Unreadable(f'declares {promised}, holds {len(stored)}; '
                         'cut short, or its header is wrong')
    return stored


def _decode(file, ds, stored, frame):
    """Stored values (H, W) or (H, W, 3) of one frame. What is compressed is decoded as what its stream is:
    some archives declare another compression, or none (Hologic)."""
    syntax = ds.file_meta.TransferSyntaxUID
    if isinstance(stored, range):
        file.seek(0)
        return pixel_array(file, index=frame, transfer_syntax_uid=syntax)
    data = b''
    for start, length in stored[frame]:
        file.seek(start)
        data += file.read(length)
    if syntax != RLE or data[:1] == b'\xff':
        ds.file_meta.TransferSyntaxUID = _stream_syntax(data, ds)
    ds.PixelData = pydicom.encaps.encapsulate([data])
    ds['PixelData'].is_undefined_length = True
    ds['PixelData'].VR, ds.NumberOfFrames = 'OB' if ds.BitsAllocated <= 8 else 'OW', 1
    ds.pop('ExtendedOffsetTable', None)                     # of the frames in the file
    return pixel_array(ds)


def _stream_syntax(data, ds):
    """The transfer syntax of a JPEG or JPEG 2000 stream. Its size must be the header's, for a decoder
    allocates what the stream declares."""
    begin = re.search(rb'\xff\xd8\xff|\xff\x4f\xff\x51', data[:4096])
    at = begin.start() + 2 if begin else len(data)
    while data[at:at + 1] == b'\xff' and data[at + 1] not in STREAMS:
        at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2:at + 4], 'big')
    if data[at:at + 1] != b'\xff':
        raise Unreadable('its pixels are compressed, but are not JPEG, JPEG-LS, JPEG 2000 or RLE')
    marker, bits = data[at + 1], None
    if marker == 0x51:
        W, H, left, top, samples = struct.unpack_from('>4L16xH', data, at + 6)
        H, W = H - top, W - left
    else:
        bits, H, W, samples = struct.unpack_from('>BHHB', data, at + 4)
    declared, syntax = ds.file_meta.TransferSyntaxUID, UID(f'1.2.840.10008.1.2.4.{STREAMS[marker]}')
    package = 'python-gdcm'
    if marker == 0x51 and '.4.20' in declared:              # HTJ2K begins like other JPEG 2000
        syntax, package = declared, 'pylibjpeg pylibjpeg-openjpeg'
    if not get_decoder(syntax).is_available:
        raise Unreadable(f'{syntax.name} needs a decoder: pip install {package}')
    if bits == 12 and marker in (0xC0, 0xC1):
        raise Unreadable(f'{syntax.name}: no Python decoder reads its 12 bits; '
                         'convert the file first, with dcmdjpeg of DCMTK for example')
    if (H, W, samples) != (ds.Rows, ds.Columns, ds.get('SamplesPerPixel', 1)):
        raise Unreadable(f'a stream of {W}x{H} pixels, {samples} channel(s), unlike its header')
    return syntax
