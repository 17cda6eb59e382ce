"""images.py: however a DICOM file is written, the mammogram in it is the same.

One table. A row says what it changes in a plain file of known stored values. pydicom writes the file, in all
four syntaxes unless the row names some, as MONOCHROME2 and as MONOCHROME1; what a writer should not write
is bent into its bytes. The image that is read must equal the definition: stored value, rescale, window (DICOM
PS3.3 C.11), stretch over all that is no padding, inversion.
"""
import numpy as np
import pytest
from pydicom import DataElement, uid
from test_images import bent, dicom, item

import images

ROWS, COLUMNS = 37, 29                              # 8 bits of an odd number of pixels end on an odd byte
SPAN = {8: 251, 10: 1021, 12: 4093, 14: 16381, 16: 65521, 32: 4294967291}       # primes: no grey lies halfway
SYNTAXES = dict(explicit=uid.ExplicitVRLittleEndian, implicit=uid.ImplicitVRLittleEndian,
                big=uid.ExplicitVRBigEndian, deflated=uid.DeflatedExplicitVRLittleEndian)


# ---- what is written, and what should be read ----------------------------------------------------

def stored_values(bits, signed, frames, padding):
    """int64 (K, H, W) of SPAN[bits], around zero where signed; the last four columns are padding, if any."""
    share = np.random.default_rng(0).random((frames, ROWS, COLUMNS))
    share[:, 0, :2] = 0, 1
    stored = np.rint(share * SPAN[bits]).astype(np.int64) - (SPAN[bits] // 2 if signed else 0)
    if padding:
        stored[:, :, -4::2], stored[:, :, -3::2] = padding
    return stored


def definition(stored, values, padding, inverted):
    valid = ~((padding[0] <= stored) & (stored <= padding[1])) if padding else np.full(stored.shape, True)
    low, high = values[valid].min(), values[valid].max()
    grey = np.rint((values.clip(low, high) - low) * (255 / (high - low)))
    return np.where(valid, 255 - grey if inverted else grey, 0).astype(np.uint8)


def write(path, syntax, interpretation, bits=12, allocated=16, signed=False, frames=1, above=None,
          padding=None, rescale=None, voi=None, bright_air=False, **changes):
    """`above` fills the bits above the stored ones, else their sign. -> frames, and frames under the `voi`"""
    stored = stored_values(bits, signed, frames, padding)
    words = stored if above is None else stored & (1 << bits) - 1 | above << bits
    pixels = words.astype(f"{'i' if signed else 'u'}{allocated // 8}")
    dicom(path, pixels if frames > 1 else pixels[0], syntax, **dict(
        PhotometricInterpretation=interpretation, BitsStored=bits, HighBit=bits - 1,
        PatientName='Muller^Eva') | changes)

    values = rescale(stored) if rescale else stored
    inverted = bright_air or interpretation == 'MONOCHROME1'
    return [[definition(*frame, padding, inverted) for frame in zip(stored, shown)]
            for shown in (values, voi(values) if voi else values)]


# ---- what a row may do ---------------------------------------------------------------------------

def linear(center, width):
    """PS3.3 C.11.2.1.2.1, to 0..1; at a whole center and a width of a prime and one, no grey lies halfway."""
    return lambda x: ((x - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def looked_up(first, table):
    return lambda x: np.array(table)[(x.astype(int) - first).clip(0, len(table) - 1)].astype(float)


def window(center, width, voi=None, **changes):
    return dict(WindowCenter=[center, 9], WindowWidth=[width, 9], voi=voi or linear(center, width), **changes)


def lut(first, bits, table, kind='US', data=None):
    ds = item()
    ds.add_new('LUTDescriptor', 'SS' if first < 0 else 'US', [len(table), first, bits])
    ds.add_new('LUTData', kind, table if data is None else data)
    return ds


def modality_lut(first, bits, table, /, **changes):
    return dict(ModalityLUTSequence=[lut(first, bits, table)], rescale=looked_up(first, table), **changes)


def voi_luts(first, bits, table, kind='US', data=None, /, **changes):
    several = [lut(first, bits, table, kind, data), lut(0, 16, CURVE)]
    return dict(VOILUTSequence=several, voi=looked_up(first, table), **changes)


def pad(value, limit=None, **changes):
    padding = sorted([value, value if limit is None else limit])
    return dict(PixelPaddingValue=value, PixelPaddingRangeLimit=limit, padding=padding) | changes


def element(tag, vr, value, **flags):
    return lambda ds: ds.add(DataElement(tag, vr, value, **flags))


def nest(depth):
    """Sequences and items of undefined length in each other, and inmost another image."""
    inner = item(Rows=2, Columns=2, BitsAllocated=8, PixelData=b'icon')
    if depth:
        inner = item(ReferencedImageSequence=nest(depth - 1))
        inner['ReferencedImageSequence'].is_undefined_length = True
    inner.is_undefined_length_sequence_item = True
    return [inner]


def bare(data):
    return data[144 + int.from_bytes(data[140:144], 'little'):]     # what follows the file meta


# ---- the table -----------------------------------------------------------------------------------

EXPLICIT, IMPLICIT, BIG = (dict(syntaxes=[name]) for name in ('explicit', 'implicit', 'big'))
LITTLE = dict(syntaxes=['explicit', 'implicit', 'deflated'])
BYTES, SIGNED, VOLUME = dict(bits=8, allocated=8), dict(signed=True), dict(frames=3)
UNDEFINED = dict(is_undefined_length=True)
RUBBISH = dict(above=np.random.default_rng(1).integers(0, 1 << 16, (ROWS, COLUMNS)))
FALLING = dict(RescaleSlope='-1', RescaleIntercept='-1024', rescale=lambda x: -x - 1024)
CURVE, PART = [i * i >> 8 for i in range(4096)], [i * i >> 12 for i in range(2000)]
SHORT = [i * i >> 8 for i in range(251)]
PAIRS = np.uint8([*SHORT, 0]).view('<u2')           # two bytes a word, the low one first
CENTERS = 1000, 1500, 2500
GROUPS = [item(FrameVOILUTSequence=[item(WindowCenter=center, WindowWidth=2000)]) for center in CENTERS]
BRIGHT_AIR = dict(PixelIntensityRelationshipSign=1)

TABLE = {
    # character sets
    'Japanese': dict(SpecificCharacterSet=['', 'ISO 2022 IR 87'], PatientName='Yamada^Hanako=山田^花子'),
    'an unknown set': dict(SpecificCharacterSet='ISO_IR 100', PatientName='Müller^Eva',
                           bend=bent((b'ISO_IR 100', b'ISO_IR 999')), **EXPLICIT),
    'a missing set': dict(bend=bent((b'Muller', b'M\xfcller')), **EXPLICIT),

    # private elements, sequences, what stands before and behind the pixels
    'a private sequence of unknown kind': dict(**LITTLE, edit=element(
        0x00191002, 'UN', b'\xfe\xff\x00\xe0\x0c\0\0\0\x08\x00\x60\x00\x04\0\0\0DICM', **UNDEFINED)),
    'nested sequences': dict(edit=element(0x00081140, 'SQ', nest(4), **UNDEFINED)),
    'an overlay': dict(edit=element(0x60003000, 'OW', b'\xff' * 136)),
    'group lengths': dict(**EXPLICIT, bend=bent(*((tag, tag[:2] + b'\0\0UL\4\0\x77\0\0\0' + tag) for tag in (
        b'\x08\0\x16\0', b'\x28\0\x02\0', b'\xe0\x7f\x10\0')))),
    'trailing padding': dict(edit=element(0xFFFCFFFC, 'OB', bytes(9))),

    # beginnings, transfer syntaxes and lengths
    'no preamble': dict(bend=lambda data: data[132:]),
    'a bare data set': dict(bend=bare, syntaxes=['explicit', 'implicit', 'big']),     # it cannot say deflated
    'no transfer syntax': dict(bend=bent((b'\x02\0\x10\0UI', b'\x02\0\x18\0UI')), **EXPLICIT),
    'declared implicit': dict(bend=bent((b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.1.2\0\0\0')), **EXPLICIT),
    'declared explicit': dict(
        bend=bent((b'\x12\x001.2.840.10008.1.2\0', b'\x14\x001.2.840.10008.1.2.1\0')), **IMPLICIT),
    'pixels of unknown kind': dict(vr='UN'),
    'a volume': VOLUME,
    'bytes in a volume': BYTES | VOLUME,
    'bytes in words': dict(vr='OW', **BYTES, **VOLUME, **LITTLE),
    'an odd length': dict(bend=lambda data: data[:-1], **BYTES, **IMPLICIT),
    'bytes behind the end': dict(bend=lambda data: data + bytes(7)),

    # bits
    **{f'{bits} of {allocated} bits{", signed" * signed}': dict(bits=bits, allocated=allocated, signed=signed)
       for bits, allocated in [(8, 8), (10, 16), (14, 16), (16, 16), (12, 32), (32, 32)]
       for signed in (False, True)},
    'rubbish above 12 bits': RUBBISH,
    'rubbish above 12 bits, signed': pad(-2000, **RUBBISH, **SIGNED),
    '12 of 16 bits, the sign at bit 11 only': dict(above=np.int64(0), **SIGNED),

    # rescale, and windows and tables of which the first counts
    'a falling slope': FALLING,
    'a falling slope, an empty intercept': dict(RescaleSlope='-1', RescaleIntercept='', rescale=lambda x: -x),
    'a modality LUT': modality_lut(0, 16, CURVE),
    'a modality LUT, signed': modality_lut(-1000, 16, PART, **SIGNED),
    'windows, an empty function': window(1500, 2000, VOILUTFunction=''),
    'windows, exact': window(1499.5, 1999, linear(1500, 2000), VOILUTFunction='LINEAR_EXACT'),
    'windows after a falling slope': window(-3000, 2000, **FALLING),
    'windows and padding': pad(4095, **window(1500, 2000)),
    'a window for all frames': dict(
        SharedFunctionalGroupsSequence=[GROUPS[1]], voi=linear(CENTERS[1], 2000), **VOLUME),
    'a window for each frame': dict(
        PerFrameFunctionalGroupsSequence=GROUPS, **VOLUME,
        voi=lambda x: np.stack([linear(center, 2000)(frame) for center, frame in zip(CENTERS, x)])),
    'a slope for all frames': dict(rescale=lambda x: -x, **VOLUME, SharedFunctionalGroupsSequence=[
        item(PixelValueTransformationSequence=[item(RescaleSlope='-1')])]),
    'VOI LUTs': voi_luts(1000, 10, PART),
    'VOI LUTs, signed': voi_luts(-1000, 10, PART, **SIGNED),
    'VOI LUTs of bytes, packed': voi_luts(0, 8, SHORT, 'US', PAIRS.tolist(), **BYTES),
    'VOI LUTs of bytes, packed in words': voi_luts(0, 8, SHORT, 'OW', PAIRS.tobytes(), **BYTES, **LITTLE),
    'VOI LUTs of bytes, packed in big words': voi_luts(
        0, 8, SHORT, 'OW', PAIRS.byteswap().tobytes(), **BYTES, **BIG),

    # exposures in which air is bright, and images made for the eye
    'bright air': dict(PresentationIntentType='FOR PROCESSING', bright_air=True, **BRIGHT_AIR),
    'bright air, by class': dict(SOPClassUID='1.2.840.10008.5.1.4.1.1.1.2.1', bright_air=True, **BRIGHT_AIR),
    'dark air': dict(PresentationIntentType='FOR PROCESSING', PixelIntensityRelationshipSign=-1),
    'air without a sign': dict(PresentationIntentType='FOR PROCESSING'),
    'for the eye': dict(PresentationIntentType='FOR PRESENTATION', **BRIGHT_AIR),
    'for the eye, by class': BRIGHT_AIR,

    # padding
    'padding of 0': pad(0),
    'padding up to a limit': pad(4090, 4095),
    'padding down to a limit': pad(4095, 4090),
    'padding and an empty limit': pad(4095, PixelPaddingRangeLimit=''),
    'padding in bytes': pad(255, **BYTES),
    'padding, signed, down past 0': pad(5, -5, **SIGNED),
    'padding of -2000 as 63536': pad(-2000, **SIGNED, edit=element(0x00280120, 'US', 63536)),
    'padding of 65535 as -1': pad(65535, bits=16, edit=element(0x00280120, 'SS', -1)),
    'padding of no pixel': dict(PixelPaddingValue=4095),
    'padding of no byte': dict(PixelPaddingValue=63536, **BYTES),
    'padding and rubbish': pad(4095, **RUBBISH),
    'padding and a falling slope': pad(-2000, **SIGNED, **FALLING),
}


@pytest.mark.parametrize('interpretation', ['MONOCHROME2', 'MONOCHROME1'])
@pytest.mark.parametrize('name, syntax', [
    (name, syntax) for name, row in TABLE.items() for syntax in row.get('syntaxes', SYNTAXES)])
def test_however_it_is_written_the_mammogram_is_the_same(name, syntax, interpretation, tmp_path):
    path, row = tmp_path / 'a.dcm', dict(TABLE[name])
    row.pop('syntaxes', None)
    plain, shown = write(path, SYNTAXES[syntax], interpretation, **row)
    assert images.frames(path) == len(plain)
    for k in range(len(plain)):
        np.testing.assert_array_equal(images.read(path, k), plain[k])       # no window unless asked
        np.testing.assert_array_equal(images.read(path, k, voi=True), shown[k])
