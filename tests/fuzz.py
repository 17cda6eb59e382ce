"""Damaged files against every reader of the repository. Not a test; the suite runs a few hundred inputs of it.

    $ python tests/fuzz.py                              # 20,000 inputs of all kinds, two minutes on two cores
    $ python tests/fuzz.py dicom xlsx --inputs 3000     # some kinds; --help lists them
    $ python tests/fuzz.py dicom --only 1234            # one input again, with the traceback of what it raised

A valid file is wounded: blindly, and knowing its format where a checksum would stop a blind wound at once. Input i of
a kind depends on (--seed, kind, i) alone. Readers owe it a valid result, or ValueError or OSError in one line that
names the file or its folder. Anything else is a fault: another exception, a warning, a word on the terminal, SECONDS
of the processor or ten times that on the clock, the death of the process, and resident memory that grows by MEMORY.
MEMORY is twice the float64 pixels of a frame of images.MAX_PIXELS, which the stretch to 8 bits holds, and a little.
gdcm, the optional decoder, is left out: it ends the process over some damaged streams, which `prepare.prepare` and
`pretrain.Stream` survive.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, namedtuple
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pydicom
import torch
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate
from pydicom.pixels import decoders

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import detect  # noqa: E402
import finetune  # noqa: E402
import images  # noqa: E402
import mask  # noqa: E402
import phantom  # noqa: E402
import pretrain  # noqa: E402
import vit  # noqa: E402

SECONDS, MEMORY, PROCESSES = 2, 1536 * 2 ** 20, 2
LARGE = 10_000_000                          # pixels; above, an accepted image is not tried on CLAHE and the tissue mask


# ---- valid files: {place: bytes} ----------------------------------------------------------------------------------

VOLUME = phantom.breast(np.random.default_rng(0), slices=3, height=96, width=72).volume          # (3, 96, 72)
DEEP, EIGHT, (H, W) = np.uint16(VOLUME) * 16, VOLUME[0], VOLUME[0].shape
RGB, BITS = np.stack([EIGHT] * 3, axis=-1), Image.fromarray(EIGHT).convert('1')


def saved(save, *args, **options):
    """What `save` writes into a file."""
    buffer = io.BytesIO()
    save(buffer, *args, **options)
    return buffer.getvalue()


def picture(image, kind, **options):
    return saved((image if isinstance(image, Image.Image) else Image.fromarray(image)).save, format=kind, **options)


def item(**elements):
    ds = pydicom.Dataset()
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def dicom(pixels, syntax=uid.ExplicitVRLittleEndian, streams=None, **elements):
    bits = pixels.dtype.itemsize * 8
    ds = item(PatientName='Doe^Jane', Rows=H, Columns=W, SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2',
              BitsAllocated=bits, BitsStored=bits, HighBit=bits - 1, PixelRepresentation=int(pixels.dtype.kind == 'i'),
              NumberOfFrames=pixels.size // (H * W), **elements)
    ds.preamble, ds.file_meta = bytes(128), pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian if syntax == uid.RLELossless else syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.file_meta.MediaStorageSOPInstanceUID = '1.2.3'
    ds.PixelData = encapsulate(streams) if streams else pixels.tobytes()
    ds['PixelData'].VR, ds['PixelData'].is_undefined_length = 'OB' if bits == 8 else 'OW', bool(streams)
    if syntax == uid.RLELossless:
        ds.compress(syntax, generate_instance_uid=False)
    form = dict(implicit_vr=False, little_endian=False, force_encoding=True) if syntax == uid.ExplicitVRBigEndian \
        else dict(enforce_file_format=True)
    return saved(lambda file: pydicom.dcmwrite(file, ds, **form))


def dicoms():
    j2k, jpeg = [picture(frame, 'JPEG2000', no_jp2=True) for frame in DEEP], [picture(EIGHT, 'JPEG')]
    lut = pydicom.Dataset()
    lut.add_new('LUTDescriptor', 'US', [4096, 0, 16])
    lut.add_new('LUTData', 'OW', np.arange(4096, dtype='<u2').tobytes())
    groups = [item(PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-5)],
                   FrameVOILUTSequence=[item(WindowCenter=900, WindowWidth=800)])] * 3
    valid = dict(
        explicit=dicom(DEEP[0], WindowCenter=[900, 800], WindowWidth=[700, 600], VOILUTFunction='SIGMOID'),
        implicit=dicom(DEEP[0], uid.ImplicitVRLittleEndian, RescaleSlope=-1, RescaleIntercept=7),
        big=dicom(DEEP[0].astype('>u2'), uid.ExplicitVRBigEndian), rle=dicom(DEEP[0], uid.RLELossless),
        deflated=dicom(DEEP[0], uid.DeflatedExplicitVRLittleEndian), volume=dicom(DEEP), eight=dicom(EIGHT),
        jpeg=dicom(EIGHT, uid.JPEGBaseline8Bit, jpeg), hidden=dicom(EIGHT, streams=jpeg),
        j2k=dicom(DEEP, uid.JPEG2000Lossless, j2k), signed=dicom(DEEP[0].astype('<i2') - 99, PixelPaddingValue=-99),
        enhanced=dicom(DEEP, SharedFunctionalGroupsSequence=groups[:1], PerFrameFunctionalGroupsSequence=groups),
        modality=dicom(DEEP[0], ModalityLUTSequence=[lut]), voi=dicom(DEEP[0], VOILUTSequence=[lut]))
    valid |= {path.stem: path.read_bytes() for path in sorted((ROOT / 'tests' / 'cases').glob('*.dcm'))}
    return {f'{name}.dcm': data for name, data in (valid | dict(bare=valid['explicit'][132:])).items()}


def pngs():
    images = dict(eight=EIGHT, deep=DEEP[0], bits=BITS, rgb=RGB, palette=Image.fromarray(EIGHT).convert('P'),
                  alpha=Image.fromarray(EIGHT).convert('LA'))
    return {f'{name}.png': picture(image, 'PNG') for name, image in images.items()}


def tiffs():
    first, *others = (Image.fromarray(frame) for frame in DEEP)
    big = Image.frombytes('I;16B', (W, H), DEEP[0].astype('>u2').tobytes())
    files = dict(eight=(EIGHT, {}), deep=(first, {}), big=(big, {}), real=(DEEP[0].astype(np.float32), {}),
                 white=(EIGHT, dict(tiffinfo={262: 0})), lzw=(first, dict(compression='tiff_lzw')),
                 deflate=(first, dict(compression='tiff_adobe_deflate')), jpeg=(EIGHT, dict(compression='jpeg')),
                 fax=(BITS, dict(compression='group4')), pages=(first, dict(save_all=True, append_images=others)))
    return {f'{name}.tif': picture(image, 'TIFF', **options) for name, (image, options) in files.items()}


def pgms():
    text = '\n'.join(' '.join(map(str, row)) for row in EIGHT).encode()
    return {'eight.pgm': picture(EIGHT, 'PPM'), 'text.pgm': b'P2\n# a film\n%d %d\n255\n' % (W, H) + text,
            'deep.pgm': b'P5 %d %d 65535\n' % (W, H) + DEEP[0].astype('>u2').tobytes()}


def jpegs():
    return {'grey.jpg': picture(EIGHT, 'JPEG'), 'progressive.jpg': picture(EIGHT, 'JPEG', progressive=True),
            'rgb.jpg': picture(RGB, 'JPEG')}


def npys():
    arrays = dict(eight=EIGHT, volume=VOLUME, deep=DEEP[0], real=DEEP[0].astype(np.float32), truth=EIGHT > 9,
                  fortran=np.asfortranarray(DEEP), moments=np.ones((4, 64), np.float32))
    return {f'{name}.npy': saved(np.save, array) for name, array in arrays.items()}


def zipped(members, method=zipfile.ZIP_DEFLATED):
    """An archive without the time of day."""
    def write(file):
        with zipfile.ZipFile(file, 'w') as book:
            for name, data in members.items():
                book.writestr(zipfile.ZipInfo(name), data, method)
    return saved(write)


def npzs():
    arrays = dict(paths=pretrain.Paths(['a.dcm', 'b.npy']).text, counts=np.array([1, 60]), written=np.array([7, 8]))
    return {'index.npz': zipped({f'{name}.npy': saved(np.save, array) for name, array in arrays.items()})}


def csvs():
    """Label files in the folder of their data set, with | for a comma."""
    key, case = 'PatientID|StudyUID|View', 'Mass-Training_P_1_LEFT_CC/1.2/1.3/000000.dcm'
    image = 'study_id|image_id|laterality|view_position'
    texts = {
        'rsna/train.csv': 'patient_id|image_id|laterality|view|cancer|BIRADS|density\n1|2|L|CC|0|1.0|B\n1|3|R|CC|1|0|',
        'vindr/breast-level_annotations.csv': f'{image}|breast_birads|breast_density|split\n'
            's|i|L|CC|BI-RADS 5|DENSITY C|training\nt|j|R|MLO|BI-RADS 1|DENSITY B|test',
        'vindr/finding_annotations.csv': f'{image}|finding_categories|xmin|ymin|xmax|ymax|split\n'
            "s|i|L|CC|['Mass']|1.5|2|30|40|training\nt|j|R|MLO|['No Finding']|||||test",
        'ddsm/mass_case_description_train_set.csv': 'patient_id|breast_density|left or right breast|image view|'
            'abnormality id|abnormality type|assessment|pathology|image file path|cropped image file path|'
            f'ROI mask file path\nP_1|3|LEFT|CC|1|mass|4|MALIGNANT|{case}|{case}|{case}',
        'mias/Info.txt': 'mdb001 G CIRC B 535 425 197\nmdb002 F NORM\nmdb003 D MISC M',
        'list/manifest.csv': 'path|patient|label|frame|exam|laterality|view|split|years_to_cancer|years_followup\n'
            'a.npy|p|0|0|1|L|CC|train||5\na.npy|p|1|1|1|R|MLO|train|2.5|4\nb.npy|q|1||1|R|CC|test|1|',
        'list/lesions.csv': 'path|patient|frame|x0|y0|x1|y1|label|split|laterality|normal\n'
            'a.npy|p|0|1|2|30|40|Mass|train|L|1\nb.npy|q||1|2|3|4||val||0\nc.npy|r|0|1|2|30|40|Mass|test|R|1',
        'score/labels.csv': f'{key}|Normal|Actionable|Benign|Cancer\np|s|lcc|0|0|1|0\nq|t|rmlo|1|0|0|0',
        'score/boxes.csv': f'{key}|Slice|X|Y|Width|Height|Class|VolumeSlices\np|s|lcc|3|10|20|30|40|benign|60',
        'score/predictions.csv': f'{key}|X|Width|Y|Height|Z|Depth|Score\np|s|lcc|11|30|21|40|2|4|0.9',
        'bcs/BCS-DBT-labels-train.csv': f'{key}|Normal|Actionable|Benign|Cancer\np|s|lcc|0|0|1|0',
        'bcs/BCS-DBT-boxes-train.csv': f'{key}|Slice|X|Y|Width|Height|Class|VolumeSlices\np|s|lcc|1|1|2|3|4|benign|3',
        'bcs/BCS-DBT-file-paths-train.csv': f'{key}|descriptive_path|classic_path\np|s|lcc|d/1.dcm|a.npy',
        'run/predictions.csv': 'encoder|unit|patient|target|p_0|p_1\nmain|u|p|1|0.2|0.8\nmain|v|q|0|0.6|0.4'}
    metrics = json.dumps(dict(config=asdict(finetune.Config(task='cancer')), n=2, encoder='main', classes=['0', '1'],
                              results=[dict(encoder='main', metrics=dict(AUC=dict(value=0.5)))]))
    texts = {place: text.replace('|', ',') for place, text in texts.items()} | {'run/metrics.json': metrics}
    return {place: text.encode() for place, text in texts.items()}


def xlsx(*lines):
    """A sheet of shared strings, the first column as inline strings."""
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    relation = 'http://schemas.openxmlformats.org/officeDocument/2006/relationships'
    strings, rows = [], ''
    for r, (first, *others) in enumerate((line.split('|') for line in lines), 1):
        rows += f'<row r="{r}"><c r="A{r}" t="inlineStr"><is><t>{first}</t></is></c>'
        for column, value in zip('BCDEFGH', others):
            rows += f'<c r="{column}{r}" t="s"><v>{len(strings)}</v></c>'
            strings.append(f'<si><t>{value}</t></si>')
        rows += '</row>'
    return zipped({
        'xl/workbook.xml': f'<workbook {space} xmlns:r="{relation}"><sheets><sheet name="all" r:id="i"/></sheets>'
                           '</workbook>',
        'xl/_rels/workbook.xml.rels': '<Links><Link Id="i" Target="worksheets/sheet1.xml"/></Links>',
        'xl/sharedStrings.xml': f'<sst {space}>{"".join(strings)}</sst>',
        'xl/worksheets/sheet1.xml': f'<worksheet {space}><sheetData>{rows}</sheetData></worksheet>'})


def xlsxs():
    return {'cmmd/CMMD_clinicaldata_revision.xlsx': xlsx(
                'ID1|LeftRight|abnormality|classification', 'D1-0001|L|mass|Benign', 'D1-0002|R|both|Malignant'),
            'cesm/Radiology manual annotations.xlsx': xlsx(
                'Image_name|Patient_ID|Side|Type|View|BIRADS|Breast density (ACR)|Pathology Classification/ Follow up',
                'P1_L_DM_MLO|1|L|DM|MLO|4$5|C|Malignant', 'P2_R_DM_CC|2|R|DM|CC|1|B|Normal')}


TINY = dict(size=28, patch=14, width=64, depth=1, heads=1)
RECIPE = pretrain.Config(**TINY, data='.', prototypes=8, hidden=8, bottleneck=4)
FINDER, HEAD = detect.Config(channels=32), finetune.resolved(finetune.Config(task='density'))


def training():
    """What pretraining keeps in a checkpoint."""
    student, teacher = pretrain.networks(RECIPE, 'cpu')
    center = torch.nn.ModuleDict({kind: pretrain.losses.Center(8, 0.9) for kind in ('cls', 'patch')})
    return dict(student=student, teacher=teacher, center=center, optimizer=torch.optim.AdamW(student.parameters()))


def finder():
    detector = detect.Detector(vit.ViT(**TINY), FINDER.channels)
    return detector, torch.optim.AdamW(detector.parameters())


def checkpoints():
    """One of every script, and the official file with and without registers."""
    torch.manual_seed(0)
    parts = {name: part.state_dict() for name, part in training().items()}
    encoder = {k: v for k, v in parts['teacher'].items() if k.startswith('backbone.')}
    ours, classes = dict(vit=vit.ViT(**TINY).config, teacher=encoder), finetune.CLASSES['csv']['density']
    head = finetune.head_for(HEAD, vit.ViT(**TINY), classes).state_dict()
    states = {'encoder/ours.pt': ours, 'encoder/official.pth': vit.ViT(**TINY, channels=3).state_dict(),
              'encoder/registers.pth': vit.ViT(**TINY, channels=3, registers=2).state_dict(),
              'pretrain/last.pt': ours | parts | dict(step=3, config=asdict(RECIPE), seen=torch.zeros(2), data='files'),
              'finetune/last.pt': ours | dict(config=asdict(HEAD), classes=list(classes), threshold=0.5, head=head)}
    detector, optimizer = finder()
    with tempfile.TemporaryDirectory() as folder:
        detect.keep(FINDER, Path(folder), detector, optimizer, 'files', 2, dict(weights=detect.copied(detector),
                                                                                threshold=0.5, score=0.1, epoch=1))
        found = (Path(folder) / 'last.pt').read_bytes()
    return {place: saved(lambda file: torch.save(state, file)) for place, state in states.items()} | {
        'detect/last.pt': found}


# ---- wounds: (rng, bytes, bytes of another file) -> bytes ---------------------------------------------------------

NUMBERS = [struct.pack(order + form, value) for order in '<>' for form, values in (
    ('B', (0, 1, 2, 4, 6, 16, 0x7F, 0x80, 0xFF)), ('H', (3, 0x7FFF, 0x8000, 0xFFFF)),
    ('I', (1, 0xFFFF, 20_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))) for value in values]
WORDS = [b'0', b'1', b'-1', b'-0', b'7', b'16', b'0.5', b'nan', b'-inf', b'1e308', b'1e999', b'2147483648', b'9000',
         b'9' * 20, b'9' * 5000, b'1_0', b'', b' ', b'"', b"'", b'\0', b'\n', b'\r', b'\f', b',', b'\\', b'&x;', b'<',
         b'(', b')', b'#', b'\xff\xfe', b'\xef\xbb\xbf', '\u0663\u00e4\U0001d518'.encode(), '\u2028'.encode(), b'..',
         b'/', b'x' * 140_000, b'None', b'True', b'O', b'f2', b'f8', b'c16', b'U9', b'm8', b'b1']
CODES = [b'MONOCHROME1', b'RGB', b'YBR_FULL', b'PALETTE COLOR', b'SIGMOID', b'LINEAR_EXACT', b'ISO 2022 IR 87',
         *(syntax.encode() for syntax in uid.AllTransferSyntaxes)]
KEYWORDS = """Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel PlanarConfiguration
    NumberOfFrames PhotometricInterpretation RescaleSlope RescaleIntercept WindowCenter WindowWidth VOILUTFunction
    PixelPaddingValue PixelPaddingRangeLimit TransferSyntaxUID SpecificCharacterSet LUTDescriptor PixelData
    ModalityLUTSequence VOILUTSequence SharedFunctionalGroupsSequence""".split()
ODD = [None, True, 0, 1, -1, 3, 10 ** 4, 10 ** 9, 2 ** 62, 0.5, float('nan'), float('inf'), '', 'x', 'mlp', [], {},
       ['x'], torch.zeros(()), torch.zeros(0), torch.zeros(3, 3), torch.full((64,), torch.nan), torch.arange(9),
       torch.zeros(1).expand(1, 10 ** 8, 64), torch.zeros(1, dtype=torch.complex64)]


def pick(rng, choices):
    return choices[int(rng.integers(len(choices)))]


def blind(rng, data, other):
    """Every second one is in the first 300 bytes, where headers are."""
    at = int(rng.integers(1 + (len(data) if rng.random() < 0.5 else min(len(data), 300))))
    to = min(len(data), at + int(rng.integers(1, 65 if rng.random() < 0.7 else 2 + len(data))))
    before, piece, after, word = data[:at], data[at:to], data[to:], pick(rng, NUMBERS)
    there = int(rng.integers(len(before + after) + 1))
    flipped = bytes(byte ^ 1 << int(bit) for byte, bit in zip(piece[:8], rng.integers(8, size=8)))
    return pick(rng, [
        before + flipped + piece[8:] + after, before + rng.bytes(len(piece)) + after,           # bits, bytes
        before + word + data[at + len(word):], before + word + data[at:],                       # a number, put in
        before, data + piece, before + after, before + piece + data[at:],                      # cut, longer, out, twice
        (before + after)[:there] + piece + (before + after)[there:], before + other[at:]])      # moved, spliced


def retold(rng, text, other):
    """A word replaced, taken out or doubled, or a line."""
    found = list(re.finditer(rb'[^\s,<>="\'():{}]+' if rng.random() < 0.9 else rb'(?m)^.+$\n?', text))
    at, to = pick(rng, found).span()
    return text[:at] + (pick(rng, WORDS) if rng.random() < 0.8 else text[at:to] * int(rng.integers(3))) + text[to:]


def first_words(rng, data, other):
    return retold(rng, data[:20], other) + data[20:]


def element(rng, data, other):
    """A DICOM element with another value or length, or one that was not there; also inside of what is deflated."""
    start = 144 + int.from_bytes(data[140:144], 'little')
    if uid.DeflatedExplicitVRLittleEndian.encode() + b'\0' in data[:start]:
        press = zlib.compressobj(wbits=-15)
        inner = element(rng, b'\0' * 144 + zlib.decompressobj(-15).decompress(data[start:]), other)[144:]
        return data[:start] + press.compress(inner) + press.flush()
    keyword = pick(rng, KEYWORDS)
    number = pydicom.datadict.tag_for_keyword(keyword)
    kind = pydicom.datadict.dictionary_VR(number)[:2].encode()          # of "US or SS" the first
    tag, value = struct.pack('<HH', number >> 16, number & 0xFFFF), pick(rng, WORDS + CODES)[:60_000]
    value = pick(rng, NUMBERS) if kind == b'US' else value + b' ' * (len(value) % 2)
    at = data.find(tag)
    if at < 0:                                              # put before the rows
        at, old = max(start, data.find(b'\x28\0\x10\0')), -8
    elif kind in (b'SQ', b'OW', b'OB'):                     # whose length has four bytes, or is open
        return data[:at + 8] + pick(rng, NUMBERS[-6:]) + data[at + 12:]
    elif data[at + 4:at + 6] != kind:                       # implicit
        old = int.from_bytes(data[at + 4:at + 8], 'little')
        return data[:at + 4] + struct.pack('<I', len(value)) + value + data[at + 8 + old:]
    else:
        old = int.from_bytes(data[at + 6:at + 8], 'little')
    return data[:at] + tag + kind + struct.pack('<H', len(value)) + value + data[at + 8 + old:]


def chunk(rng, data, other):
    """A PNG chunk changed, dropped, doubled or put in, with a checksum that is right; pixels inflated meanwhile."""
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at:at + 4])
        chunks.append((data[at + 4:at + 8], data[at + 8:at + 8 + length]))
        at += 12 + length
    k = pick(rng, [0, *range(len(chunks))])
    name, body = chunks[k]
    how = int(rng.integers(8))
    if how == 0:
        added = pick(rng, [b'PLTE', b'tRNS', b'gAMA', b'iCCP', b'zTXt', b'iTXt', b'eXIf', b'acTL', b'fcTL', b'fdAT'])
        chunks.insert(k + 1, (added, pick(rng, [rng.bytes(8), b'a\0\0' + zlib.compress(bytes(10 ** 7))])))
    elif how == 1:
        chunks[k:k + 1] = chunks[k:k + 1] * pick(rng, (0, 2))
    elif name == b'IHDR':
        at, form = pick(rng, [(0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1), (12, 1)])
        chunks[k] = name, body[:at] + pick(rng, [n for n in NUMBERS if len(n) == form]) + body[at + form:]
    else:
        chunks[k] = name, zlib.compress(blind(rng, zlib.decompress(body), other)) if name == b'IDAT' else \
            blind(rng, body, other)
    return data[:8] + b''.join(struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))
                               for name, body in chunks)


def entry(rng, data, other):
    """A field of the first directory of a TIFF: a tag, type, count or value, or where the next directory lies."""
    order = '<' if data[:2] == b'II' else '>'
    start, = struct.unpack(f'{order}I', data[4:8])
    count, = struct.unpack(f'{order}H', data[start:start + 2])
    at, large = start + 2 + 12 * int(rng.integers(count)), (2 ** 16, 20_000, 2 ** 31, 2 ** 32 - 1)
    at, form, value = pick(rng, [
        (at, 'H', pick(rng, [256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 324, 338, 339, 347])),
        (at + 2, 'H', int(rng.integers(14))), (at + 4, 'I', pick(rng, [0, 1, 2, *large])),
        (at + 8, 'I' if b'\4' in data[at + 2:at + 4] else 'H', pick(rng, [*range(9), 16, 32, 64, 9000])),
        (at + 8, 'I', pick(rng, large)), (start + 2 + 12 * count, 'I', pick(rng, [start, 8, len(data) - 9]))])
    return data[:at] + struct.pack(order + form, value) + data[at + struct.calcsize(form):]


def header(rng, data, other):
    """A word in the header of a .npy, whose length is put right."""
    end = 10 + int.from_bytes(data[8:10], 'little')
    told = retold(rng, data[10:end], other)
    return data[:8] + struct.pack('<H', len(told) % 65_536) + told + data[end:]


def member(rng, data, other):
    """A member of an archive, with a checksum that is right, or the archive's directory."""
    with zipfile.ZipFile(io.BytesIO(data)) as book:
        members, method = {name: book.read(name) for name in book.namelist()}, book.infolist()[0].compress_type
    name = pick(rng, list(members) + [name for name in members if name.endswith('data.pkl')] * 9)
    if rng.random() < 0.15:
        directory = data.rfind(b'PK\1\2')
        return data[:directory] + blind(rng, data[directory:], other)
    wound = header if name.endswith('.npy') else retold if name.endswith(('.xml', '.rels')) else blind
    return zipped(members | {name: (wound if rng.random() < 0.8 else blind)(rng, members[name], other)}, method)


def cell(rng, data, other):
    """Text between the tags of a sheet, else like `member`."""
    with zipfile.ZipFile(io.BytesIO(data)) as book:
        members = {name: book.read(name) for name in book.namelist()}
    name = pick(rng, ['xl/sharedStrings.xml', 'xl/worksheets/sheet1.xml'])
    if rng.random() < 0.5:
        return member(rng, data, other)
    at, to = pick(rng, list(re.finditer(rb'(?<=>)[^<]+', members[name]))).span()
    return zipped(members | {name: members[name][:at] + pick(rng, WORDS) + members[name][to:]})


def leaf(rng, data, other):
    """A value of a checkpoint replaced, renamed or taken out; or its archive wounded."""
    if rng.random() < 0.3:
        return member(rng, data, other)
    place = state = torch.load(io.BytesIO(data), weights_only=True)
    while True:
        key = pick(rng, list(place) if isinstance(place, dict) else range(len(place)))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.1:
            break
        place = inner
    place[key] = pick(rng, ODD)
    if rng.random() < 0.2 and isinstance(inner, torch.Tensor) and inner.ndim:
        place[key] = pick(rng, [inner[:1], inner.half(), inner[None], inner.to_sparse(), inner * torch.nan])
    elif rng.random() < 0.2 and isinstance(place, dict):
        del place[key]
        place |= pick(rng, [{}, {f'{key}x': inner}, {7: inner}, {'blocks.900000.norm1.bias': inner}])
    return saved(lambda file: torch.save(state, file))


KINDS = dict(dicom=(dicoms, element), png=(pngs, chunk), tiff=(tiffs, entry), pgm=(pgms, first_words),
             jpeg=(jpegs, blind), npy=(npys, header), npz=(npzs, member), csv=(csvs, retold), xlsx=(xlsxs, cell),
             checkpoint=(checkpoints, leaf))


def wounded(valid, kind, seed, i):
    """-> the place of input i, and its bytes."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), i])
    place, other = pick(rng, list(valid)), pick(rng, list(valid.values()))
    data, knowing = valid[place], KINDS[kind][1]
    wounds = [[knowing]] * 2, [[knowing] * 2, [knowing] * 3], [[knowing, blind]], [[blind], [blind] * 4]
    for wound in pick(rng, sum(wounds, [])):
        try:
            data = wound(rng, data, other)
        except Exception:                                   # the wound before has left no structure to know
            data = blind(rng, data, other)
    return place, data


# ---- readers ------------------------------------------------------------------------------------------------------

def read_image(path):
    count = images.frames(path)
    assert type(count) is int and count >= 1, f'{count} frames'
    for frame, voi in {(0, False), (count - 1, path.endswith('.dcm'))}:
        image = images.read(path, frame, voi)
        assert image.dtype == np.uint8 and image.ndim == 2 and image.size, f'{image.dtype} {image.shape}'
        if image.size <= LARGE:
            results = images.clahe(image), mask.tissue(image), mask.tissue(image, None)
            assert {result.shape for result in results} == {image.shape}, 'results of another shape'


def read_grey(path):
    assert vit._load_grey(path).ndim == 2, 'not (H, W)'


def read_moments(path):
    value = finetune.stored_moments(path, 64)
    assert value is None or value.shape == (4, 64), 'moments of another shape'


def read_index(path):
    for name, (count, written) in pretrain.remembered(Path(path)).items():
        assert type(count) is type(written) is int and count >= 1, f'{count} slices, written {written}'


def read_table(path):
    for line in [*finetune.table(path), *detect.lines_of(path)]:
        assert all(isinstance(text, str) for text in (*line, *line.values())), 'cells that are no text'


def data_set(script, dataset='csv', **options):
    """The reader of a label file as part of its data set. Of the splits of the whole set, no file need be named."""
    def read_set(path):
        cfg = script.Config(dataset=dataset, root=str(Path(path).parent), max_bad=1.0, **options)
        script.DATASETS[dataset](cfg)
        try:
            rows = script.load(cfg)[0]
            if script is finetune:
                finetune.units_of(finetune.resolved(cfg), rows, [])
        except (ValueError, OSError) as refusal:
            raise ValueError(f'{path}: {refusal}') from refusal
    return read_set


def read_scores(path):
    volumes, truth, _ = detect.read_truth(*(Path(path).parent / f'{name}.csv' for name in ('labels', 'boxes')))
    detect.froc(volumes, truth, detect.read_predictions(Path(path).parent))


def read_run(path):
    finetune.stored(Path(path).parent)


def read_encoder(path):
    model = vit.load(path)
    for side in (model.patch, 3 * model.patch):
        with torch.no_grad():
            cls, patches = model(torch.zeros(1, 1, side, side))
        assert cls.shape[1:] == patches.shape[2:], 'tokens of another width'


def read_training(path):
    cfg = replace(RECIPE, out=str(Path(path).parent), resume=True)
    step = pretrain.restore(pretrain.earlier(cfg, 0), cfg, training(), pretrain.Watch(cfg, 'ab', 'cpu', data='files'))
    assert type(step) is int and step >= 0, f'step {step}'


def read_head(path):
    finetune.predict([str(Path(path).parent / 'a.npy'), '--checkpoint', path], torch.device('cpu'))


def read_detector(path):
    detect.restored(path)
    epoch, best = detect.restore(FINDER, Path(path).parent, *finder(), 'files')
    assert type(epoch) is int and epoch >= 0 and isinstance(best, dict), f'epoch {epoch}'


READERS = dict(                             # by folder, or by suffix
    dcm=[read_image], npy=[read_image, read_grey, read_moments], npz=[read_index],
    **dict.fromkeys(('png', 'tif', 'pgm', 'jpg'), [read_image, read_grey]),
    rsna=[read_table, *(data_set(finetune, 'rsna', task=task) for task in ('cancer', 'birads', 'density'))],
    vindr=[read_table, data_set(finetune, 'vindr', task='cancer', cancer_rule='birads5'),
           data_set(finetune, 'vindr', task='lesion_type'), data_set(detect, 'vindr')],
    ddsm=[read_table, data_set(finetune, 'ddsm'), data_set(detect, 'cbis')],
    mias=[data_set(finetune, 'mias', task='density'), data_set(detect, 'mias')],
    list=[read_table, data_set(finetune), data_set(finetune, task='risk', head='hazard'), data_set(detect)],
    score=[read_table, read_scores], bcs=[read_table, data_set(detect, 'bcs')], run=[read_run],
    cmmd=[finetune.table, data_set(finetune, 'cmmd')], cesm=[finetune.table, data_set(finetune, 'cesm', task='birads')],
    encoder=[read_encoder], pretrain=[read_encoder, read_training], finetune=[read_encoder, read_head],
    detect=[read_encoder, read_detector])


# ---- the judge ----------------------------------------------------------------------------------------------------

Outcome = namedtuple('Outcome', 'accepted fault where words seconds memory')


class TooLong(BaseException):
    """No `except Exception` may swallow it."""


def stop(*_):
    raise TooLong


def peak():
    """Resident memory at most, since it was last forgotten."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def judged(read, path):
    """-> the Outcome of a reader on a file; `where` is the innermost line of our own code."""
    with contextlib.suppress(OSError):                      # forget the peak (Linux)
        (Path('/') / 'proc/self/clear_refs').write_text('5')
    problem, fault, text, before, start = None, '', '', peak(), time.process_time()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()) as told:
        warnings.simplefilter('always')                     # they are told as well
        warnings.simplefilter('ignore', ResourceWarning)    # Pillow leaves open what it cannot read
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            read(path)
        except BaseException as caught:
            problem, text = caught, str(caught)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, memory = time.process_time() - start, peak() - before
    noise = [line for line in told.getvalue().splitlines() if not line.startswith('skipped: ')]
    if problem and not isinstance(problem, (ValueError, OSError)):
        fault = type(problem).__name__
    elif problem and len(text.splitlines()) != 1:
        fault = 'not one line'
    elif problem and not any(name in text for name in (path, str(Path(path).parent), Path(path).name)):
        fault = 'the file is not named'
    elif noise:
        fault, text = 'words on the terminal', noise[0]
    if seconds > SECONDS:
        fault = 'too long'
    if memory > MEMORY:
        fault, text = 'memory', f'{memory / 2 ** 20:.0f} MiB'
    lines = [f'{Path(frame.f_code.co_filename).name}:{line}' for frame, line in
             traceback.walk_tb(problem and problem.__traceback__) if Path(frame.f_code.co_filename).parent == ROOT]
    words = text if not fault else f'{text}\n{"".join(traceback.format_exception(problem))}' if problem else text
    return Outcome(not problem, fault, (lines or [read.__name__])[-1], words, seconds, memory)


def serve(pipe, folder, valid, kind, seed, numbers):
    """The process that reads. Decoders in C may print what they like; the machine must live on."""
    with open(os.devnull, 'w') as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    signal.signal(signal.SIGPROF, stop)
    size = int((Path('/') / 'proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY,) * 2)
    torch.set_num_threads(1)
    for decoder in vars(decoders).values():
        if 'gdcm' in getattr(decoder, 'available_plugins', ()):
            decoder.remove_plugin('gdcm')
    if kind == 'checkpoint':
        finetune.setup()
    for place, data in valid.items():                       # a label file needs the others of its set, and images
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(data)
        for name in ('a.npy', 'b.npy', 'c.npy'):
            np.save((folder / place).parent / name, EIGHT)
    for i in numbers:
        place, data = wounded(valid, kind, seed, i)
        path = folder / place
        path.write_bytes(data)
        readers = READERS[path.suffix[1:] if path.parent == folder else path.parent.name]
        pipe.send((place, [judged(read, str(path)) for read in readers]))
        path.write_bytes(valid[place])


def hunt(kind, numbers, seed):
    """{number: (place, Outcomes)}. A process that dies or does not answer is a fault, and another one goes on."""
    valid, busy, found = KINDS[kind][0](), {}, {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        def hire(numbers):
            if numbers:
                here, there = multiprocessing.Pipe(duplex=False)
                worker = multiprocessing.Process(target=serve, args=(
                    there, Path(tempfile.mkdtemp(dir=folder)), valid, kind, seed, numbers), daemon=True)
                worker.start()
                there.close()
                busy[here] = worker, numbers, time.monotonic()

        for share in range(PROCESSES):
            hire(numbers[share::PROCESSES])
        while busy:
            ready = wait(list(busy), timeout=1)
            for pipe, (worker, (i, *others), since) in list(busy.items()):
                late = time.monotonic() - since > 10 * SECONDS
                try:
                    if pipe not in ready and not late:
                        continue
                    found[i] = pipe.recv() if pipe in ready else None
                    busy[pipe] = worker, others, time.monotonic()
                except EOFError:
                    found[i] = None
                if found[i] is None:
                    worker.kill()
                    worker.join()
                    fault = 'no answer' if late else f'exit code {worker.exitcode}'
                    found[i] = wounded(valid, kind, seed, i)[0], [Outcome(False, fault, 'the process', fault, 0, 0)]
                    del busy[pipe]
                    hire(others)
                elif not others:
                    worker.join()
                    del busy[pipe]
    return valid, found


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument('kinds', nargs='*', metavar='KIND', help=f"{', '.join(KINDS)} (default: all)")
    parser.add_argument('--inputs', type=int, default=20_000, help='of all kinds together (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, metavar='I', help='this input alone, with what was raised')
    parser.add_argument('--keep', type=Path, metavar='DIR', help='a file of every distinct fault goes there')
    args = parser.parse_args(argv)
    if set(args.kinds) - set(KINDS):
        parser.error(f"expected {', '.join(KINDS)}")
    faults, kinds = defaultdict(list), args.kinds or list(KINDS)
    print('| kind | inputs | accepted | refused | faults | slowest, ms | most, MiB | seconds |\n|' + '---|' * 8)
    for k, kind in enumerate(kinds):
        start, count, share = time.monotonic(), Counter(), len(range(k, args.inputs, len(kinds)))
        valid, found = hunt(kind, range(share) if args.only is None else [args.only], args.seed)
        for i, (place, outcomes) in sorted(found.items()):
            bad = [outcome for outcome in outcomes if outcome.fault]
            count['faults' if bad else 'accepted' if outcomes[0].accepted else 'refused'] += 1
            for outcome in bad:
                faults[kind, outcome.fault, outcome.where].append((i, place, outcome))
            if args.only is not None:
                print(place, *(f'{o.fault or "right"} at {o.where}: {o.words}' for o in outcomes), sep='\n')
        slowest, most = (max(each) for each in zip(*((o.seconds, o.memory) for _, of in found.values() for o in of)))
        print(f"| {kind} | {len(found)} | {count['accepted']} | {count['refused']} | {count['faults']} | "
              f'{1e3 * slowest:.0f} | {most / 2 ** 20:.0f} | {time.monotonic() - start:.0f} |', flush=True)
        for (of, *_), ((i, place, _), *_) in faults.items():
            if args.keep and of == kind:
                args.keep.mkdir(parents=True, exist_ok=True)
                (args.keep / f'{kind}-{i}-{Path(place).name}').write_bytes(wounded(valid, kind, args.seed, i)[1])
    for (kind, fault, where), cases in faults.items():
        i, place, outcome = cases[0]
        print(f'{len(cases)} x {fault} at {where}: {outcome.words.splitlines()[0][:200] if outcome.words else ""}\n'
              f'    python tests/fuzz.py {kind} --seed {args.seed} --only {i}    # {place}')
    sys.exit(bool(faults))


if __name__ == '__main__':
    main(sys.argv[1:])
