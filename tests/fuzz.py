"""Damaged files against the readers of images and checkpoints, on Linux. test_trust.py runs 600 inputs of it.

    $ python tests/fuzz.py                          # 20,000 inputs, seven minutes
    $ python tests/fuzz.py --only 1234              # one input again

An input is a valid file with some damage; valid files take turns, and input i depends on (--seed, i) alone. A
process of its own reads it and owes a valid result, or ValueError or OSError in one sentence that names the file.
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
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.modules['gdcm'] = None              # left out: it ends its process over some damaged streams
import numpy as np
import torch
from PIL import Image
from pydicom import datadict, uid

import images
import mask
import phantom
import vit
from test_images import dicom, encoded, item, j2k, tiff

SECONDS = 2                 # of the processor; ten times that on the clock
MEMORY = 1536 * 2 ** 10     # KiB: the float64 pixels of a frame of images.MAX_PIXELS twice, and a little
torch.set_num_threads(1)    # with more, the forked processes that read could hang


def valid_files(folder):
    """One for each way through the readers."""
    volume = phantom.breast(np.random.default_rng(0), slices=3, height=96, width=72).volume     # (3, 96, 72)
    deep, eight = np.uint16(volume) * 16, volume[0]
    table = item(LUTDescriptor=[4096, 0, 16], LUTData=np.arange(4096, dtype='<u2').tobytes())
    dicom(folder / 'explicit.dcm', deep[0], WindowCenter=[900, 800], WindowWidth=[700, 600])
    dicom(folder / 'implicit.dcm', deep[0].astype('<i2'), uid.ImplicitVRLittleEndian, PixelPaddingValue=0)
    dicom(folder / 'deflated.dcm', deep[0], uid.DeflatedExplicitVRLittleEndian)
    dicom(folder / 'tables.dcm', deep[0], ModalityLUTSequence=[table], VOILUTSequence=[table])
    dicom(folder / 'volume.dcm', deep)
    dicom(folder / 'rle.dcm', deep[0], uid.RLELossless)
    dicom(folder / 'jpeg.dcm', eight, uid.JPEGBaseline8Bit, [encoded(eight, 'JPEG')])
    dicom(folder / 'j2k.dcm', deep, uid.JPEG2000Lossless, j2k(*deep))

    for name in ('eight.png', 'binary.pgm', 'grey.jpg'):
        Image.fromarray(eight).save(folder / name)
    Image.fromarray(deep[0]).save(folder / 'deep.png')
    Image.fromarray(eight).save(folder / 'jpeg.tif', compression='jpeg')
    (folder / 'raw.tif').write_bytes(tiff(*deep))
    for name, array in dict(eight=eight, real=deep[0].astype(np.float32), volume=deep).items():
        np.save(folder / f'{name}.npy', array)

    torch.manual_seed(0)                                    # the files must be the same in every run
    network = vit.ViT(size=28, patch=14, width=64, depth=1, heads=1, channels=3)
    torch.save(network.state_dict(), folder / 'official.pth')
    encoder = vit.load(folder / 'official.pth')
    teacher = {f'backbone.{name}': weight for name, weight in encoder.state_dict().items()}
    torch.save(dict(vit=encoder.config, teacher=teacher), folder / 'ours.pth')      # as pretrain.py writes it


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


def damaged(valid, seed, i):
    """Writes input i -> its path."""
    rng, path = random.Random(f'{seed} {i}'), list(valid)[i % len(valid)]
    other = rng.choice([data for name, data in valid.items() if name.suffix == path.suffix])
    data = valid[path]
    for _ in range(rng.choice([1, 1, 2, 4])):
        wound = rng.choice([blind, element]) if path.suffix == '.dcm' else blind
        data = wound(rng, data, other)
    path.write_bytes(data)
    return path


# ---- readers and their judge ---------------------------------------------------------------------------

def read(path):
    if path.endswith('.pth'):
        model = vit.load(path)
        cls, patches = model(torch.zeros(1, 1, 3 * model.patch, 3 * model.patch))
        assert cls.shape[1:] == patches.shape[2:], 'tokens of another width'
        return
    K, H, W = images.shape(path)
    images.refusal(path)
    for frame, voi in ((0, False), (K - 1, True)):
        image = images.read(path, frame, voi)
        assert image.dtype == np.uint8 and image.shape == (H, W), f'{image.dtype} {image.shape}'
        if image.size <= 10_000_000:                        # larger ones would take all of the time
            assert images.clahe(image).shape == mask.tissue(image, percentile=None).shape == (H, W)


def judge(answers, path):
    """Reads one file; answers 'accepted', 'refused' or what the fault is. Out of time, a signal ends it."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(10 * SECONDS)
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
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if grown > MEMORY or printed.getvalue():
        verdict += f', in {grown} KiB, printing {printed.getvalue()!r}'
    answers.put(verdict[:9999])


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--inputs', type=int, default=20_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int, metavar='I', help='this input alone')
    args = parser.parse_args()
    fork, verdicts = multiprocessing.get_context('fork'), Counter()
    with tempfile.TemporaryDirectory() as folder:
        valid_files(Path(folder))
        valid = {path: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        for i in range(args.inputs) if args.only is None else [args.only]:
            answers, path = fork.SimpleQueue(), damaged(valid, args.seed, i)
            process = fork.Process(target=judge, args=(answers, str(path)))
            process.start()
            process.join()
            verdict = f'exit code {process.exitcode}' if answers.empty() else answers.get()
            if verdict not in ('accepted', 'refused'):
                print(f'python tests/fuzz.py --seed {args.seed} --only {i}: {path.name}, {verdict}', flush=True)
                verdict = 'faults'
            verdicts[verdict] += 1
    print(f"{verdicts['accepted']} accepted, {verdicts['refused']} refused, {verdicts['faults']} faults")
    sys.exit(verdicts['faults'] > 0)
