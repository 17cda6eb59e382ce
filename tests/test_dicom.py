"""images.py: however a DICOM file is written, the mammogram in it is the same.

One table. A row says what it changes in a plain file of known stored values. pydicom writes the file, as MONOCHROME2
and as MONOCHROME1; what a writer should not write is bent into its bytes. The image that is read must equal the
definition: stored value, rescale, window (DICOM PS3.3 C.11), stretch over all that is no padding, inversion.
"""
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ExplicitVRLittleEndian,
                         ImplicitVRLittleEndian)

import images

ROWS, COLUMNS = 37, 29                              # 8 bits of an odd number of pixels end on an odd byte
SPAN = {8: 251, 10: 1021, 12: 4093, 14: 16381, 16: 65521, 32: 4294967291}       # primes: no grey lies halfway


# ---- what is written, and what should be read ----------------------------------------------------------------------

def stored_values(bits, signed, frames, padding):
    """int64 (K, H, W) of SPAN[bits], around zero where signed; the last four columns are padding, if there is any."""
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


def write(path, interpretation, stored, bits, signed, allocated=16, above=None, syntax=ExplicitVRLittleEndian,
          vr=None, edit=None, bend=None, **elements):
    """`above` fills the bits above the stored ones, else their sign; `edit` changes the data set, `bend` the bytes."""
    words = stored if above is None else stored & (1 << bits) - 1 | above << bits
    order = '>' if syntax == ExplicitVRBigEndian else '<'
    data = words.astype(f'{order}i8').astype(f'{order}i{allocated // 8}').tobytes()
    data += b'\0' * (len(data) % 2)
    if allocated == 8 and order == '>' and vr == 'OW':
        data = np.frombuffer(data, '<u2').astype('>u2').tobytes()       # words of two pixels, each turned round
    ds = Dataset()
    ds.preamble, ds.file_meta = b'\0' * 128, FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.1.2'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    ds.Manufacturer, ds.PatientName = 'Odd maker', 'Muller^Eva'
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, interpretation
    if len(stored) > 1:
        ds.NumberOfFrames = len(stored)
    ds.Rows, ds.Columns = ROWS, COLUMNS
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = allocated, bits, bits - 1, int(signed)
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.add_new('PixelData', vr or ('OB' if allocated == 8 else 'OW'), data)
    if edit:
        edit(ds)
    pydicom.dcmwrite(path, ds, implicit_vr=syntax.is_implicit_VR, little_endian=order == '<',
                     enforce_file_format=True)
    if bend:
        path.write_bytes(bend(path.read_bytes()))


# ---- what a row may do ---------------------------------------------------------------------------------------------

def linear(center, width):
    """PS3.3 C.11.2.1.2.1, to 0..1; with a whole center and a width of a prime and one, no grey lies halfway."""
    return lambda x: ((x - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def sigmoid(center, width):
    return lambda x: 1 / (1 + np.exp(-4 * (x - center) / width))


def looked_up(first, table):
    return lambda x: np.array(table)[(x.astype(int) - first).clip(0, len(table) - 1)].astype(float)


def lut(first, bits, table, vr='US'):
    item = Dataset()
    item.add_new('LUTDescriptor', 'SS' if first < 0 else 'US', [len(table), first, bits])
    item.add_new('LUTData', vr, table if vr == 'US' else np.array(table, '<u2').tobytes())
    return item


def element(tag, vr, value, **flags):
    return lambda ds: ds.add(pydicom.DataElement(tag, vr, value, **flags))


def private(vr, value, **flags):
    """An element of a vendor's own, beside a text that is DICOM's mark."""
    def edit(ds):
        block = ds.private_block(0x0019, 'DICM MAKER', create=True)
        block.add_new(0x01, 'LO', 'DICM')
        ds.add(pydicom.DataElement(block.get_tag(0x02), vr, value, **flags))
    return edit


def nest(depth):
    """Sequences and items of undefined length in each other, and inmost an image that is not the mammogram."""
    item = Dataset()
    item.is_undefined_length_sequence_item = True
    if depth:
        item.ReferencedImageSequence = nest(depth - 1)
        item['ReferencedImageSequence'].is_undefined_length = True
    else:
        item.Rows, item.Columns, item.BitsAllocated, item.PhotometricInterpretation = 2, 2, 8, 'MONOCHROME2'
        item.add_new('PixelData', 'OB', b'icon')
    return Sequence([item])


def overlay(ds):
    for number, vr, value in [(0x10, 'US', ROWS), (0x11, 'US', COLUMNS), (0x40, 'CS', 'G'), (0x50, 'SS', [1, 1]),
                              (0x100, 'US', 1), (0x102, 'US', 0), (0x3000, 'OW', b'\xff' * 136)]:
        ds.add_new(0x60000000 + number, vr, value)


def bent(*pairs):
    """Bytes for other bytes; each must be there exactly once."""
    def bend(data):
        for old, new in pairs:
            assert data.count(old) == 1, old
            data = data.replace(old, new)
        return data
    return bend


def headless(data):
    return data[132:]                                       # all but the preamble and the mark


def bare(data):
    return data[144 + int.from_bytes(data[140:144], 'little'):]     # all but the file meta too, which tells its length


def unpadded(data):
    """8 bits, an odd number of pixels, and no byte to make it even."""
    length = ROWS * COLUMNS
    return bent((b'OB\0\0' + (length + 1).to_bytes(4, 'little'), b'OB\0\0' + length.to_bytes(4, 'little')))(data[:-1])


# ---- the table -----------------------------------------------------------------------------------------------------

IMPLICIT, BIG, DEFLATED = (dict(syntax=syntax) for syntax in (ImplicitVRLittleEndian, ExplicitVRBigEndian,
                                                              DeflatedExplicitVRLittleEndian))
BYTES, SIGNED, VOLUME = dict(bits=8, allocated=8), dict(signed=True), dict(frames=3)
RUBBISH = dict(above=np.random.default_rng(1).integers(0, 1 << 16, (ROWS, COLUMNS)))
ZEROS = dict(above=np.int64(0), signed=True)                # a negative value without its sign carried on
UNDEFINED = dict(is_undefined_length=True)
WINDOW = dict(WindowCenter=[1500, 9], WindowWidth=[2000, 9], voi=linear(1500, 2000))
TWICE, FALLING = ({'RescaleSlope': slope, 'RescaleIntercept': '-1024'} for slope in ('2', '-1'))
CURVE, COARSE = [i * i >> 8 for i in range(4096)], [i >> 4 for i in range(4096)]
PART, SHORT = [i * i >> 12 for i in range(2000)], [i * i >> 8 for i in range(250)]
PAD = dict(padding=(4095, 4095), PixelPaddingValue=4095)
SIGNED_PAD = dict(padding=(-2000, -2000), PixelPaddingValue=-2000, signed=True)

TABLE = {
    # character sets
    'Latin': dict(SpecificCharacterSet='ISO_IR 100', PatientName='Müller^Eva'),
    'UTF-8': dict(SpecificCharacterSet='ISO_IR 192', PatientName='Müller^Eva=山田^花子'),
    'Japanese': dict(SpecificCharacterSet=['', 'ISO 2022 IR 87'], PatientName='Yamada^Hanako=山田^花子'),
    'several sets': dict(SpecificCharacterSet=['ISO 2022 IR 6', 'ISO 2022 IR 100', 'ISO 2022 IR 144'],
                         PatientName='Müller^Eva=Люкceмбypг'),
    'an unknown set': dict(SpecificCharacterSet='ISO_IR 100', PatientName='Müller^Eva',
                           bend=bent((b'ISO_IR 100', b'ISO_IR 999'))),
    'a missing set': dict(bend=bent((b'Muller', b'M\xfcller'))),
    'an empty set': dict(SpecificCharacterSet='', bend=bent((b'Muller', b'\x1b$B;3E'))),

    # private elements, sequences, what stands before and behind the pixels
    'a private text': dict(edit=private('LO', 'DICM')),
    'a private sequence of undefined length': dict(edit=private('SQ', nest(1), **UNDEFINED)),
    'a private sequence of undefined length, implicit': dict(edit=private('SQ', nest(1), **UNDEFINED), **IMPLICIT),
    'a private element of unknown kind': dict(edit=private('UN', b'DICM')),
    'a private sequence of unknown kind': dict(edit=private(
        'UN', b'\xfe\xff\x00\xe0\x0c\0\0\0\x08\x00\x60\x00\x04\0\0\0DICM', **UNDEFINED)),
    'a private element in fragments': dict(edit=private('OB', encapsulate([b'DICM']), **UNDEFINED)),
    'nested sequences': dict(edit=element(0x00081140, 'SQ', nest(4), **UNDEFINED)),
    'nested sequences, implicit': dict(edit=element(0x00081140, 'SQ', nest(4), **UNDEFINED), **IMPLICIT),
    'an icon': dict(edit=element(0x00880200, 'SQ', nest(0))),
    'an overlay': dict(edit=overlay),
    'group lengths': dict(bend=bent(*((tag, tag[:2] + b'\0\0UL\4\0\x77\0\0\0' + tag) for tag in (
        b'\x08\0\x16\0', b'\x28\0\x02\0', b'\xe0\x7f\x10\0')))),
    'trailing padding': dict(edit=element(0xFFFCFFFC, 'OB', bytes(9))),

    # beginnings and transfer syntaxes
    'no preamble': dict(bend=headless),
    'no preamble, big-endian': dict(bend=headless, **BIG),
    'no preamble, deflated': dict(bend=headless, **DEFLATED),
    'a bare data set': dict(bend=bare),
    'a bare data set, implicit': dict(bend=bare, **IMPLICIT),
    'a bare data set, big-endian': dict(bend=bare, **BIG),
    'no transfer syntax': dict(bend=bent((b'\x02\0\x10\0UI', b'\x02\0\x18\0UI'))),
    'implicit': IMPLICIT,
    'implicit, 8 bits': IMPLICIT | BYTES,
    'big-endian': BIG,
    'big-endian, signed': BIG | SIGNED_PAD,
    'big-endian, 8 bits in words': dict(vr='OW') | BIG | BYTES,
    'big-endian, 8 bits in words, a volume': dict(vr='OW') | BIG | BYTES | VOLUME,
    'big-endian, 8 bits in bytes': BIG | BYTES,
    'deflated': DEFLATED,
    'explicit, declared implicit': dict(bend=bent((b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.1.2\0\0\0'))),
    'implicit, declared explicit': dict(bend=bent((b'\x12\x001.2.840.10008.1.2\0', b'\x14\x001.2.840.10008.1.2.1\0')),
                                        **IMPLICIT),
    'pixels of unknown kind': dict(vr='UN'),
    '8 bits in words': dict(vr='OW', **BYTES),

    # lengths
    'an odd length': BYTES,
    'an odd length, not made even': dict(bend=unpadded, **BYTES),
    'an odd length, not made even, implicit': dict(bend=lambda data: data[:-1], **BYTES, **IMPLICIT),
    'odd lengths in a volume': BYTES | VOLUME,
    'odd text': dict(bend=bent((b'LO\x0a\0Odd maker ', b'LO\x09\0Odd maker'))),
    'text made even by a zero': dict(bend=bent((b'Odd maker ', b'Odd maker\0'))),
    'bytes behind the end': dict(bend=lambda data: data + bytes(7)),
    'a volume': VOLUME,

    # bits
    '10 of 16 bits': dict(bits=10),
    '12 of 16 bits': dict(bits=12),
    '14 of 16 bits': dict(bits=14),
    '16 of 16 bits': dict(bits=16),
    '12 of 32 bits': dict(bits=12, allocated=32),
    '32 of 32 bits': dict(bits=32, allocated=32),
    '8 of 8 bits, signed': BYTES | SIGNED,
    '12 of 16 bits, signed': SIGNED,
    '16 of 16 bits, signed': dict(bits=16, **SIGNED),
    '32 of 32 bits, signed': dict(bits=32, allocated=32, **SIGNED),
    '12 of 16 bits, the sign at bit 11 only': ZEROS,
    'rubbish above 10 bits': dict(bits=10, **RUBBISH),
    'rubbish above 12 bits': RUBBISH,
    'rubbish above 12 bits, signed': RUBBISH | SIGNED_PAD,
    'rubbish above 14 bits, implicit': dict(bits=14, **RUBBISH, **IMPLICIT),

    # rescale, and windows of which the first counts
    'slope and intercept': TWICE,
    'a falling slope': FALLING,
    'a falling slope, signed': FALLING | dict(bits=16, **SIGNED),
    'a modality LUT': dict(ModalityLUTSequence=[lut(0, 16, CURVE)], rescale=looked_up(0, CURVE)),
    'a modality LUT, signed': dict(ModalityLUTSequence=[lut(-1000, 16, PART)], rescale=looked_up(-1000, PART),
                                   **SIGNED),
    'a modality LUT, signed bytes': dict(ModalityLUTSequence=[lut(-125, 8, SHORT)], rescale=looked_up(-125, SHORT),
                                         **BYTES, **SIGNED),
    'several windows': WINDOW,
    'several windows, signed': WINDOW | SIGNED,
    'several windows, an empty function': dict(VOILUTFunction='', **WINDOW),
    'several windows, exact': WINDOW | dict(VOILUTFunction='LINEAR_EXACT', WindowCenter=[1499.5, 9],
                                            WindowWidth=[1999, 9]),
    'several windows, sigmoid': WINDOW | dict(VOILUTFunction='SIGMOID', voi=sigmoid(1500, 2000)),
    'several windows after a rescale': WINDOW | TWICE,
    'several windows after a falling slope': dict(WindowCenter=[-3000, 9], WindowWidth=[2000, 9],
                                                  voi=linear(-3000, 2000), **FALLING),
    'several windows and padding': WINDOW | PAD,
    'several VOI LUTs': dict(VOILUTSequence=[lut(1000, 10, PART), lut(0, 16, CURVE)], voi=looked_up(1000, PART)),
    'several VOI LUTs, implicit': dict(VOILUTSequence=[lut(1000, 10, PART, 'OW'), lut(0, 16, CURVE, 'OW')],
                                       voi=looked_up(1000, PART), **IMPLICIT),
    'a VOI LUT of bytes': dict(VOILUTSequence=[lut(0, 8, COARSE)], voi=looked_up(0, COARSE)),
    'a VOI LUT, signed': dict(VOILUTSequence=[lut(-1000, 10, PART)], voi=looked_up(-1000, PART), **SIGNED),

    # padding
    'padding': PAD,
    'padding of 0': dict(padding=(0, 0), PixelPaddingValue=0),
    'padding up to a limit': dict(padding=(4090, 4095), PixelPaddingValue=4090, PixelPaddingRangeLimit=4095),
    'padding down to a limit': dict(padding=(4090, 4095), PixelPaddingValue=4095, PixelPaddingRangeLimit=4090),
    'padding in bytes': dict(padding=(255, 255), PixelPaddingValue=255, **BYTES),
    'padding in a volume': PAD | VOLUME,
    'padding, signed': SIGNED_PAD,
    'padding, signed, implicit': SIGNED_PAD | IMPLICIT,
    'padding, signed, of unknown kind': SIGNED_PAD | dict(
        bend=bent((b'\x28\0\x20\x01SS\2\0', b'\x28\0\x20\x01UN\0\0\2\0\0\0'))),
    'padding, signed, up to a limit': dict(padding=(-2048, -2000), PixelPaddingValue=-2048,
                                           PixelPaddingRangeLimit=-2000, **SIGNED),
    'padding, signed, down past 0': dict(padding=(-5, 5), PixelPaddingValue=5, PixelPaddingRangeLimit=-5, **SIGNED),
    'padding of -2000 as 63536': dict(padding=(-2000, -2000), edit=element(0x00280120, 'US', 63536), **SIGNED),
    'padding of -2000 as 63536, 32 bits': dict(padding=(-2000, -2000), bits=32, allocated=32, **SIGNED,
                                               edit=element(0x00280120, 'US', 63536)),
    'padding of 65535 as -1': dict(padding=(65535, 65535), bits=16, edit=element(0x00280120, 'SS', -1)),
    'padding of no pixel': dict(PixelPaddingValue=4095),
    'padding of no byte': dict(PixelPaddingValue=63536, **BYTES),
    'padding and rubbish': PAD | RUBBISH,
    'padding and a falling slope': SIGNED_PAD | FALLING,
}


@pytest.mark.parametrize('interpretation', ['MONOCHROME2', 'MONOCHROME1'])
@pytest.mark.parametrize('name', TABLE)
def test_however_it_is_written_the_mammogram_is_the_same(name, interpretation, tmp_path):
    row = dict(bits=12, signed=False, frames=1, padding=None, rescale=None, voi=None) | TABLE[name]
    frames, padding, rescale, voi = (row.pop(key) for key in ('frames', 'padding', 'rescale', 'voi'))
    slope, intercept = float(row.get('RescaleSlope', 1)), float(row.get('RescaleIntercept', 0))
    stored = stored_values(row['bits'], row['signed'], frames, padding)
    values = rescale(stored) if rescale else stored * slope + intercept
    write(tmp_path / 'a.dcm', interpretation, stored, **row)
    assert images.frames(tmp_path / 'a.dcm') == frames
    for k in range(frames):
        for window in {None, voi}:                          # none unless asked
            image = images.read(tmp_path / 'a.dcm', k, voi=window is not None)
            expected = definition(stored[k], window(values[k]) if window else values[k], padding,
                                  interpretation == 'MONOCHROME1')
            np.testing.assert_array_equal(image, expected)
