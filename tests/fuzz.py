"""Damaged files against the readers of images and checkpoints. Not a test; the suite runs a few hundred inputs of it.

    $ python tests/fuzz.py                              # 20,000 inputs of all kinds
    $ python tests/fuzz.py dicom --only 1234            # one input again; --help lists the kinds

A valid file is damaged: blindly, and in DICOM by its elements. Input i of a kind depends on (--seed, kind, i)
alone. Readers owe it a valid result, or ValueError or OSError in one sentence that names the file. Anything else is a fault: another exception, words on the terminal, SECONDS of the processor or ten
times that on the clock, the end of the process, and memory that grows by MEMORY, twice the float64 pixels of a frame
of images.MAX_PIXELS and a little. gdcm is left out: it ends its process over some damaged streams, after which
`prepare.py --workers 1` names the file.
"""
import argparse
import contextlib
import io
import multiprocessing
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import torch
from PIL import Image
from pydicom import uid
from pydicom.pixels import decoders

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import images  # noqa: E402
import mask  # noqa: E402
import phantom  # noqa: E402
import vit  # noqa: E402
from test_images import CASES, dicom, j2k  # noqa: E402

SECONDS, MEMORY = 2, 1536 * 2 ** 20


# ---- valid files: {name: bytes} -----------------------------------------------------------------------------------

VOLUME = phantom.breast(np.random.default_rng(0), slices=3, height=96, width=72).volume          # (3, 96, 72)
DEEP, EIGHT, (H, W) = np.uint16(VOLUME) * 16, VOLUME[0], VOLUME[0].shape


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


def dicoms():
    lut = pydicom.Dataset()
    lut.add_new('LUTDescriptor', 'US', [4096, 0, 16])
    lut.add_new('LUTData', 'OW', np.arange(4096, dtype='<u2').tobytes())
    groups = [item(PixelValueTransformationSequence=[item(RescaleSlope=2, RescaleIntercept=-5)],
                   FrameVOILUTSequence=[item(WindowCenter=900, WindowWidth=800)])] * 3
    deep, jpeg = DEEP[0], [picture(EIGHT, 'JPEG')]
    files = {name: dicom(io.BytesIO(), pixels, *how, **elements).getvalue() for name, pixels, how, elements in [
        ('explicit', deep, (), dict(WindowCenter=[900, 800], WindowWidth=[700, 600], VOILUTFunction='SIGMOID')),
        ('implicit', deep, (uid.ImplicitVRLittleEndian,), dict(RescaleSlope=-1, RescaleIntercept=7)),
        ('big', deep.astype('>u2'), (uid.ExplicitVRBigEndian,), {}), ('rle', deep, (uid.RLELossless,), {}),
        ('deflated', deep, (uid.DeflatedExplicitVRLittleEndian,), {}), ('volume', DEEP, (), {}), ('eight', EIGHT, (), {}),
        ('jpeg', EIGHT, (uid.JPEGBaseline8Bit, jpeg), {}), ('hidden', EIGHT, (uid.ExplicitVRLittleEndian, jpeg), {}),
        ('j2k', DEEP, (uid.JPEG2000Lossless, j2k(*DEEP)), {}), ('voi', deep, (), dict(VOILUTSequence=[lut])),
        ('signed', deep.astype('<i2') - 99, (), dict(PixelPaddingValue=-99)),
        ('modality', deep, (), dict(ModalityLUTSequence=[lut])), ('enhanced', DEEP, (), dict(
            SharedFunctionalGroupsSequence=groups[:1], PerFrameFunctionalGroupsSequence=groups))]}
    files |= {path.stem: path.read_bytes() for path in sorted(CASES.glob('*.dcm'))}
    return {f'{name}.dcm': data for name, data in (files | dict(bare=files['explicit'][132:])).items()}


def pictures():
    first, *others = (Image.fromarray(frame) for frame in DEEP)
    bits, rgb = Image.fromarray(EIGHT).convert('1'), np.stack([EIGHT] * 3, axis=-1)
    text = b'P2\n# a film\n%d %d\n255\n' % (W, H) + b' '.join(b'%d' % grey for grey in EIGHT.flat)
    files = {name: picture(image, kind, **options) for name, image, kind, options in [
        ('eight.png', EIGHT, 'PNG', {}), ('deep.png', first, 'PNG', {}), ('bits.png', bits, 'PNG', {}),
        ('rgb.png', rgb, 'PNG', {}), ('palette.png', Image.fromarray(EIGHT).convert('P'), 'PNG', {}),
        ('alpha.png', Image.fromarray(EIGHT).convert('LA'), 'PNG', {}), ('eight.tif', EIGHT, 'TIFF', {}),
        ('real.tif', DEEP[0].astype(np.float32), 'TIFF', {}), ('lzw.tif', first, 'TIFF', dict(compression='tiff_lzw')),
        ('white.tif', EIGHT, 'TIFF', dict(tiffinfo={262: 0})), ('fax.tif', bits, 'TIFF', dict(compression='group4')),
        ('deflate.tif', first, 'TIFF', dict(compression='tiff_adobe_deflate')),
        ('jpeg.tif', EIGHT, 'TIFF', dict(compression='jpeg')),
        ('pages.tif', first, 'TIFF', dict(save_all=True, append_images=others)), ('eight.pgm', EIGHT, 'PPM', {}),
        ('grey.jpg', EIGHT, 'JPEG', {}), ('progressive.jpg', EIGHT, 'JPEG', dict(progressive=True)),
        ('rgb.jpg', rgb, 'JPEG', {})]}
    deep = b'P5 %d %d 65535\n' % (W, H) + DEEP[0].astype('>u2').tobytes()
    return files | {'text.pgm': text, 'deep.pgm': deep}


def npys():
    arrays = dict(eight=EIGHT, volume=VOLUME, deep=DEEP[0], real=DEEP[0].astype(np.float32), truth=EIGHT > 9,
                  fortran=np.asfortranarray(DEEP))
    return {f'{name}.npy': saved(np.save, array) for name, array in arrays.items()}


def checkpoints():
    """An encoder as pretrain.py writes it, and the official file with and without registers."""
    torch.manual_seed(0)
    tiny = dict(size=28, patch=14, width=64, depth=1, heads=1)
    encoder = vit.ViT(**tiny)
    states = {'ours.pt': dict(vit=encoder.config, teacher={f'backbone.{k}': v for k, v in encoder.state_dict().items()}),
              'official.pth': vit.ViT(**tiny, channels=3).state_dict(),
              'registers.pth': vit.ViT(**tiny, channels=3, registers=2).state_dict()}
    return {name: saved(lambda file: torch.save(state, file)) for name, state in states.items()}


# ---- wounds: (rng, bytes, bytes of another file) -> bytes ---------------------------------------------------------

NUMBERS = [struct.pack(order + form, value) for order in '<>' for form, values in (
    ('B', (0, 1, 2, 4, 6, 16, 0x7F, 0x80, 0xFF)), ('H', (3, 0x7FFF, 0x8000, 0xFFFF)),
    ('I', (1, 0xFFFF, 20_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))) for value in values]
WORDS = [b'0', b'1', b'-1', b'7', b'16', b'0.5', b'nan', b'-inf', b'1e308', b'1e999', b'2147483648', b'9000', b'9' * 20,
         b'9' * 5000, b'', b' ', b'"', b'\0', b'\n', b',', b'\\', b'(', b'\xff\xfe', '\u0663\u00e4'.encode(), b'x' * 140_000,
         b'None', b'True', b'O', b'f2', b'f8', b'c16', b'U9', b'm8', b'b1', b'MONOCHROME1', b'RGB', b'YBR_FULL',
         b'PALETTE COLOR', b'SIGMOID', b'ISO 2022 IR 87', *(syntax.encode() for syntax in uid.AllTransferSyntaxes)]
KEYWORDS = """Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel PlanarConfiguration
    NumberOfFrames PhotometricInterpretation RescaleSlope RescaleIntercept WindowCenter WindowWidth VOILUTFunction
    PixelPaddingValue PixelPaddingRangeLimit TransferSyntaxUID SpecificCharacterSet LUTDescriptor PixelData
    ModalityLUTSequence VOILUTSequence SharedFunctionalGroupsSequence""".split()


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
    tag, value = struct.pack('<HH', number >> 16, number & 0xFFFF), pick(rng, WORDS)[:60_000]
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


KINDS = dict(dicom=(dicoms, element), picture=(pictures, blind), npy=(npys, blind), checkpoint=(checkpoints, blind))


def damaged(valid, kind, seed, i):
    """-> the name of input i, and its bytes."""
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode()), i])
    name, other = pick(rng, list(valid)), pick(rng, list(valid.values()))
    data, knowing = valid[name], KINDS[kind][1]
    for wound in pick(rng, [[knowing], [knowing] * 2, [knowing] * 3, [knowing, blind], [blind], [blind] * 4]):
        try:
            data = wound(rng, data, other)
        except Exception:                                   # the wound before has left no structure to know
            data = blind(rng, data, other)
    return name, data


# ---- readers and their judge --------------------------------------------------------------------------------------

def read_image(path):
    K, H, W = images.shape(path)
    assert type(K) is int and K >= 1, f'{K} frames'
    images.refusal(path)
    for frame, voi in {(0, False), (K - 1, path.endswith('.dcm'))}:
        image = images.read(path, frame, voi)
        assert image.dtype == np.uint8 and image.shape == (H, W), f'{image.dtype} {image.shape}, not {(H, W)}'
        if image.size <= 10_000_000:                        # larger ones would take the whole time
            results = images.clahe(image), mask.tissue(image, percentile=None)
            assert {result.shape for result in results} == {image.shape}, 'results of another shape'


def read_encoder(path):
    model = vit.load(path)
    with torch.no_grad():
        cls, patches = model(torch.zeros(1, 1, 3 * model.patch, 3 * model.patch))
    assert cls.shape[1:] == patches.shape[2:], 'tokens of another width'


class TooLong(BaseException):
    """No `except Exception` may swallow it."""


def judged(read, path):
    """-> accepted, what is wrong with that or '', seconds"""
    def stop(*_):
        raise TooLong

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    with contextlib.suppress(OSError):                      # forget the peak (Linux)
        (Path('/') / 'proc/self/clear_refs').write_text('5')
    problem, before, start = None, peak(), time.process_time()
    signal.signal(signal.SIGPROF, stop)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        warnings.simplefilter('always')
        warnings.simplefilter('ignore', ResourceWarning)    # Pillow leaves open what it cannot read
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            read(path)
        except BaseException as caught:
            problem = caught
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, fault = time.process_time() - start, said.getvalue()
    if problem and not isinstance(problem, (ValueError, OSError)):
        fault = ''.join(traceback.format_exception(problem))
    elif problem and (len(str(problem).splitlines()) != 1 or path not in str(problem)):
        fault = f'not one sentence that names the file: {problem}'
    elif peak() - before > MEMORY:
        fault = f'{(peak() - before) / 2 ** 20:.0f} MiB'
    return not problem, fault, seconds


def serve(pipe, folder, valid, kind, seed, numbers):
    """The process that reads. Decoders in C may print what they like."""
    with open(os.devnull, 'w') as null:
        os.dup2(null.fileno(), 1)
        os.dup2(null.fileno(), 2)
    size = int((Path('/') / 'proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY,) * 2)
    torch.set_num_threads(1)
    for decoder in vars(decoders).values():
        if 'gdcm' in getattr(decoder, 'available_plugins', ()):
            decoder.remove_plugin('gdcm')
    for i in numbers:
        name, data = damaged(valid, kind, seed, i)
        (folder / name).write_bytes(data)
        pipe.send(judged(read_encoder if kind == 'checkpoint' else read_image, str(folder / name)))


def hunt(kind, numbers, seed):
    """(number, accepted, fault, seconds) of each. A process that ends or does not answer is a fault; another goes on."""
    valid, numbers = KINDS[kind][0](), list(numbers)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        while numbers:
            here, there = multiprocessing.Pipe(duplex=False)
            worker = multiprocessing.Process(target=serve, daemon=True, args=(
                there, Path(folder), valid, kind, seed, list(numbers)))
            worker.start()
            there.close()
            try:
                while numbers and here.poll(10 * SECONDS):
                    outcome = here.recv()
                    yield numbers.pop(0), *outcome
            except EOFError:
                worker.join()
            if numbers:
                worker.kill()
                yield numbers.pop(0), False, f'no answer, exit code {worker.exitcode}', 10 * SECONDS
            worker.join()


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument('kinds', nargs='*', metavar='KIND', help=f"{', '.join(KINDS)} (default: all)")
    parser.add_argument('--inputs', type=int, default=20_000, help='of all kinds together (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, metavar='I', help='this input alone')
    args = parser.parse_args(argv)
    if set(args.kinds) - set(KINDS):
        parser.error(f"expected {', '.join(KINDS)}")
    faults, kinds = [], args.kinds or list(KINDS)
    print('| kind | inputs | accepted | refused | faults | slowest, ms | seconds |\n|' + '---|' * 7)
    for kind in kinds:
        numbers = range(-(-args.inputs // len(kinds))) if args.only is None else [args.only]
        start, outcomes = time.monotonic(), list(hunt(kind, numbers, args.seed))
        bad = [(i, fault) for i, _, fault, _ in outcomes if fault]
        faults += [(kind, *each) for each in bad]
        accepted = sum(ok for _, ok, fault, _ in outcomes if not fault)
        print(f'| {kind} | {len(outcomes)} | {accepted} | {len(outcomes) - accepted - len(bad)} | {len(bad)} | '
              f'{1e3 * max(seconds for *_, seconds in outcomes):.0f} | {time.monotonic() - start:.0f} |', flush=True)
    for kind, i, fault in faults:
        print(f'python tests/fuzz.py {kind} --seed {args.seed} --only {i}: {fault}')
    sys.exit(bool(faults))


if __name__ == '__main__':
    main(sys.argv[1:])
