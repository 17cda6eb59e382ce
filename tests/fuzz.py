"""Damaged files against the readers of images and checkpoints, on Linux. test_trust.py runs 600 inputs of it.

    $ python tests/fuzz.py                          # 20,000 inputs of all kinds, seven minutes
    $ python tests/fuzz.py dicom --only 1234        # one input again

An input is a valid file with some damage; input i of a kind depends on (--seed, kind, i) alone. A process of
its own reads it and owes a valid result, or ValueError or OSError in one sentence that names the file.
Everything else is a fault: another exception, words on the terminal, more than SECONDS or MEMORY, a crash.
"""
import argparse
import io
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.modules['gdcm'] = None              # left out: it ends its process over some damaged streams
import numpy as np
import torch
from PIL import Image
from pydicom import Dataset, datadict, uid

import images
import mask
import phantom
import vit
from test_images import dicom, encoded, j2k

FORK = multiprocessing.get_context('fork')
SECONDS = 2                 # of the processor; ten times that on the clock
MEMORY = 1536 * 2 ** 20     # bytes: the float64 pixels of a frame of images.MAX_PIXELS twice, and a little
torch.set_num_threads(1)    # with more, the forked processes that read could hang


# ---- valid files: one for each way through the readers -------------------------------------------------

VOLUME = phantom.breast(np.random.default_rng(0), slices=3, height=96, width=72).volume     # (3, 96, 72)
DEEP, EIGHT = np.uint16(VOLUME) * 16, VOLUME[0]


def dicoms(folder):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], np.arange(4096, dtype='<u2').tobytes()
    dicom(folder / 'explicit.dcm', DEEP[0], WindowCenter=[900, 800], WindowWidth=[700, 600])
    dicom(folder / 'implicit.dcm', DEEP[0].astype('<i2'), uid.ImplicitVRLittleEndian, PixelPaddingValue=0)
    dicom(folder / 'deflated.dcm', DEEP[0], uid.DeflatedExplicitVRLittleEndian)
    dicom(folder / 'tables.dcm', DEEP[0], ModalityLUTSequence=[table], VOILUTSequence=[table])
    dicom(folder / 'volume.dcm', DEEP)
    dicom(folder / 'rle.dcm', DEEP[0], uid.RLELossless)
    dicom(folder / 'jpeg.dcm', EIGHT, uid.JPEGBaseline8Bit, [encoded(EIGHT, 'JPEG')])
    dicom(folder / 'j2k.dcm', DEEP, uid.JPEG2000Lossless, j2k(*DEEP))


def pictures(folder):
    eight, (deep, *others) = Image.fromarray(EIGHT), map(Image.fromarray, DEEP)
    eight.save(folder / 'eight.png')
    eight.save(folder / 'binary.pgm')
    eight.save(folder / 'jpeg.tif', compression='jpeg')
    eight.convert('RGB').save(folder / 'rgb.jpg')
    deep.save(folder / 'deep.png')
    deep.save(folder / 'lzw.tif', compression='tiff_lzw')
    deep.save(folder / 'raw.tif', save_all=True, append_images=others)
    np.savetxt(folder / 'text.pgm', EIGHT, '%d', header='P2\n# a film\n72 96\n255', comments='')


def npys(folder):
    np.save(folder / 'eight.npy', EIGHT)
    np.save(folder / 'real.npy', DEEP[0].astype(np.float32))
    np.save(folder / 'volume.npy', DEEP)


def checkpoints(folder):
    torch.manual_seed(0)                                    # the files must be the same in every run
    tiny = dict(size=28, patch=14, width=64, depth=1, heads=1, channels=3)
    torch.save(vit.ViT(**tiny).state_dict(), folder / 'official.pth')
    torch.save(vit.ViT(**tiny, registers=2).state_dict(), folder / 'registers.pth')
    encoder = vit.load(folder / 'official.pth')
    teacher = {f'backbone.{name}': weight for name, weight in encoder.state_dict().items()}
    torch.save(dict(vit=encoder.config, teacher=teacher), folder / 'ours.pt')       # as pretrain.py writes it


# ---- damage: (rng, bytes, bytes of another file) -> bytes ----------------------------------------------

NUMBERS = [number.to_bytes(size, order) for size in (1, 2, 4) for order in ('little', 'big')
           for number in (0, 1, 16, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)]
SYNTAXES = [syntax.encode() for syntax in uid.AllTransferSyntaxes]
WORDS = [b'', b'0', b'-1', b'0.5', b'nan', b'-inf', b'1e308', b'2147483648', b'9' * 5000, b'x' * 60_000,
         b'\\', b'\0', b'\xff\xfe', b'MONOCHROME1', b'RGB', b'PALETTE COLOR', b'SIGMOID', b'ISO 2022 IR 87']
KEYWORDS = """Rows Columns BitsAllocated BitsStored PixelRepresentation SamplesPerPixel NumberOfFrames
    PhotometricInterpretation RescaleSlope RescaleIntercept WindowCenter WindowWidth VOILUTFunction PixelData
    PixelPaddingValue PixelPaddingRangeLimit TransferSyntaxUID SpecificCharacterSet LUTDescriptor""".split()


def blind(rng, data, other):
    """Other bytes anywhere; every second time among the first 300, where headers are."""
    at = rng.randint(0, rng.choice([len(data), min(len(data), 300)]))
    end = at + rng.randint(1, rng.choice([64, 64, 1 + len(data)]))
    before, piece, number = data[:at], data[at:end], rng.choice(NUMBERS)
    return rng.choice([                                     # other bytes, a number, cut, out, twice, spliced
        before + rng.randbytes(len(piece)) + data[end:], before + number + data[at + len(number):],
        before, before + data[end:], before + piece + data[at:], before + other[at:]])


def element(rng, data, other):
    """Another value for a DICOM element, or another length of PixelData. What the file lacks, it gets."""
    number = datadict.tag_for_keyword(rng.choice(KEYWORDS))
    tag = (number >> 16).to_bytes(2, 'little') + (number & 0xFFFF).to_bytes(2, 'little')
    kind = datadict.dictionary_VR(number)[:2].encode()      # of 'US or SS' the first
    value = rng.choice({b'US': NUMBERS, b'UI': SYNTAXES}.get(kind, WORDS))
    at, rows = data.find(tag), max(data.find(b'\x28\0\x10\0'), 0)
    explicit = kind == b'UI' or data[rows + 4:rows + 6] == b'US'
    size = 2 if explicit else 4                             # bytes of the length
    end = at + 8 + int.from_bytes(data[at + 8 - size:at + 8], 'little')
    at, end = (rows, rows) if at < 0 else (at, end)
    return data[:at] + tag + kind * explicit + len(value).to_bytes(size, 'little') + value + data[end:]


def damaged(kind, valid, seed, i):
    """Writes input i -> its path."""
    rng = random.Random(f'{seed} {kind} {i}')
    path, other = rng.choice(list(valid)), rng.choice(list(valid.values()))
    data, wounds = valid[path], [blind, element] if kind == 'dicom' else [blind]
    for _ in range(rng.choice([1, 1, 2, 4])):
        data = rng.choice(wounds)(rng, data, other)
    Path(path).write_bytes(data)
    return path


# ---- readers and their judge ---------------------------------------------------------------------------

def read_image(path):
    K, H, W = images.shape(path)
    images.refusal(path)
    for frame, voi in ((0, False), (K - 1, True)):
        image = images.read(path, frame, voi)
        assert image.dtype == np.uint8 and image.shape == (H, W), f'{image.dtype} {image.shape}'
        if image.size <= 10_000_000:                        # larger ones would take all of the time
            assert images.clahe(image).shape == mask.tissue(image, percentile=None).shape == (H, W)


def read_encoder(path):
    model = vit.load(path)
    cls, patches = model(torch.zeros(1, 1, 3 * model.patch, 3 * model.patch))
    assert cls.shape[1:] == patches.shape[2:], 'tokens of another width'


def judge(answers, read, path):
    """Reads one file; answers 'accepted', 'refused' or what the fault is, and the seconds that it took."""
    signal.signal(signal.SIGPROF, signal.default_int_handler)       # raises KeyboardInterrupt
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(10 * SECONDS)                              # ends the process, with exit code -14
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)            # decoders in C may print what they like
    printed = sys.stdout = sys.stderr = io.StringIO()
    before, verdict = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 'accepted'
    try:
        read(path)
    except (ValueError, OSError) as problem:
        named = path in str(problem) and len(str(problem).splitlines()) == 1
        verdict = 'refused' if named else f'not one sentence that names the file: {problem}'
    except BaseException:
        verdict = traceback.format_exc()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before     # KiB
    if grown > MEMORY / 1024:
        verdict = f'{grown / 1024:.0f} MiB'
    if printed.getvalue():
        verdict += f', but printed {printed.getvalue()}'
    answers.put((verdict[:9999], time.process_time()))


def hunt(kind, write, numbers, seed):
    """Yields the verdict on each input, and seconds. A process that ends without an answer is a fault."""
    read = read_encoder if kind == 'checkpoint' else read_image
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        valid = {str(path): path.read_bytes() for path in sorted(Path(folder).iterdir())}
        for i in numbers:
            answers = FORK.SimpleQueue()
            process = FORK.Process(target=judge, args=(answers, read, damaged(kind, valid, seed, i)))
            process.start()
            process.join()
            yield (f'exit code {process.exitcode}', 0) if answers.empty() else answers.get()


if __name__ == '__main__':
    writers = dict(dicom=dicoms, picture=pictures, npy=npys, checkpoint=checkpoints)
    parser = argparse.ArgumentParser()
    parser.add_argument('kind', nargs='?', choices=writers, help='default: all')
    parser.add_argument('--inputs', type=int, default=20_000, help='of all kinds together')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, metavar='I', help='this input alone')
    args = parser.parse_args()
    kinds, faults = [args.kind] if args.kind else list(writers), []
    numbers = [args.only] if args.only is not None else range(-(-args.inputs // len(kinds)))
    print('| kind | inputs | accepted | refused | faults | slowest, ms | seconds |\n|' + '---|' * 7)
    for kind in kinds:
        start = time.monotonic()
        verdicts, seconds = zip(*hunt(kind, writers[kind], numbers, args.seed))
        bad = [f'python tests/fuzz.py {kind} --seed {args.seed} --only {i}: {verdict}'
               for i, verdict in zip(numbers, verdicts) if verdict not in ('accepted', 'refused')]
        print(f"| {kind} | {len(verdicts)} | {verdicts.count('accepted')} | {verdicts.count('refused')} | "
              f'{len(bad)} | {1e3 * max(seconds):.0f} | {time.monotonic() - start:.0f} |', flush=True)
        faults += bad
    sys.exit('\n'.join(faults) or 0)
