"""Once per data set: every image below RAW -> read -> judge -> CLAHE -> shrink -> .npy (MammoDINO 3.1).

    $ python prepare.py RAW PREPARED                            # then: torchrun pretrain.py --data PREPARED
    $ python prepare.py RAW PREPARED --percentiles 0.5 99.9     # where hot pixels or labels take the greys
    $ python prepare.py RAW PREPARED --voi --no-clahe           # the inputs of DBT-DINO

PREPARED/<path below RAW>.npy is uint8 (H, W), or (K, H, W) for a volume; every frame is stretched for
itself. index.csv lists them; rejected.csv the files that cannot be read or are no mammograms, a volume
with one bad frame too, and why. A file whose .npy is there is skipped, so a stopped run goes on, and
--percentiles given later reach what was rejected alone. Several RAW in one PREPARED need different paths.
"""
import argparse
import csv
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import images
import mask
from run import lock, script

SMALLEST, GREYS = 196, 32           # least side in pixels, that of a local crop; least greys in tissue
GO_ON = 'the same command goes on from here'


def prepare(raw, prepared, side=1024, workers=None, voi=False, clahe=True, percentiles=None):
    """-> how many files were (written, skipped, rejected). `side`: pixels of the shorter side at most."""
    low, high = percentiles or (0, 100)
    if side < 14 or workers is not None and workers < 1 or not 0 <= low < high <= 100:
        raise ValueError('expected --side from 14, --workers from 1, 0 <= LOW < HIGH <= 100')
    raw, prepared = Path(raw), Path(prepared)
    here, there = raw.resolve(), prepared.resolve()
    if here.is_relative_to(there) or there.is_relative_to(here):
        raise ValueError(f'{prepared} and {raw}: one lies in the other; choose another folder')
    todo, rejected, owner = [], [], {}
    for path in images.listing(raw):
        name = os.path.relpath(path, raw)
        stem, suffix = os.path.splitext(name)
        target = prepared / f'{stem if suffix.lower() in images.SUFFIXES else name}.npy'
        if target in owner:
            rejected.append((name, f'becomes the same file as another: rename {owner[target]}'))
        elif not target.is_file():
            todo.append((path, target))
        owner.setdefault(target, name)
    skipped, clashes = len(owner) - len(todo), len(rejected)
    prepared.mkdir(parents=True, exist_ok=True)
    held = lock(prepared)                                   # until it is closed below, or the process ends

    work = partial(prepare_file, side=side, voi=voi, clahe=clahe, percentiles=percentiles)
    pool = ProcessPoolExecutor(workers, initializer=live_with_the_parent)
    try:
        reasons = pool.map(work, todo)                      # in the order of todo
        for path, _ in tqdm(todo, unit='file', disable=None):
            if reason := next(reasons):
                rejected.append((os.path.relpath(path, raw), reason))
    except BrokenProcessPool:
        advice = 'move it away' if workers == 1 else 'or just after; --workers 1 names the file'
        raise ValueError(f'a process died at {path}, {advice}; {GO_ON}') from None
    except OSError as problem:                              # from writing; reading errors become reasons
        reason = problem.strerror or problem
        raise OSError(f'{prepared}: {path} cannot be written, {reason}; {GO_ON}') from None
    except KeyboardInterrupt:
        raise ValueError(f'stopped; {GO_ON}') from None
    finally:
        pool.shutdown(cancel_futures=True)                  # waits for the files at work
        for part in filter(Path.is_file, prepared.rglob('*.part')):
            part.unlink()

    arrays = filter(Path.is_file, prepared.rglob('*.npy'))
    arrays = sorted(path.relative_to(prepared).as_posix() for path in arrays)
    index = [(path, *images.shape(prepared / path)) for path in arrays]
    tables = {'rejected.csv': [('file', 'reason'), *sorted(rejected)],
              'index.csv': [('path', 'slices', 'height', 'width'), *index]}     # last: all is there
    for name, rows in tables.items():
        with open(prepared / f'{name}.part', 'w', newline='', encoding='utf-8',
                  errors='surrogateescape') as file:
            csv.writer(file).writerows(rows)
        os.replace(prepared / f'{name}.part', prepared / name)
    held.close()
    written = len(todo) - (len(rejected) - clashes)
    print(f'{written} written, {skipped} were there, {len(rejected)} rejected and named in '
          f'{prepared}/rejected.csv')
    for kind, count in Counter(re.split(' ?[;:(]', why)[0] for _, why in rejected).most_common():
        print(f'{count:8,}  {kind}')
    return written, skipped, len(rejected)


def prepare_file(paths, side, voi, clahe, percentiles):
    """(file, target) -> None, or why not; its words up to ; : or ( name the kind of reason."""
    path, target = paths
    try:
        refusal, (K, H, W) = images.refusal(path), images.shape(path)
        if refusal or min(H, W) < SMALLEST:
            return refusal or f'too small: {W}x{H} pixels, expected {SMALLEST} a side'
        shrink = min(1, side / min(H, W))
        h, w = round(H * shrink), round(W * shrink)
        volume = np.empty((K, h, w), np.uint8)
        for k in range(K):
            pixels = images.read(path, k, voi, percentiles)
            tissue = mask.tissue(pixels, percentile=None)
            greys = len(np.unique(pixels))
            if greys <= 2:                                  # of two, an ROI mask
                return 'two grey values' if greys == 2 else 'a constant image'
            if not tissue.any():
                return f'no tissue: in frame {k}'
            if len(np.unique(pixels[tissue])) < GREYS:
                return f'fewer than {GREYS} greys in the tissue: try --percentiles LOW HIGH'
            image = Image.fromarray(images.clahe(pixels) if clahe else pixels)
            volume[k] = image.resize((w, h), Image.Resampling.BICUBIC)
    except (ValueError, OSError) as problem:
        return str(problem).removeprefix(f'{path}: ')
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f'{os.getpid()}.part')
    with open(part, 'wb') as file:
        np.save(file, volume if K > 1 else volume[0])
        file.flush()
        os.fsync(file.fileno())                             # a power cut leaves no empty .npy
    os.replace(part, target)


def live_with_the_parent():
    """A worker leaves Ctrl-C, which reaches all processes of a terminal, to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # by which a pool ends its processes
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def main(argv):
    """python prepare.py RAW PREPARED"""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument('raw')
    parser.add_argument('prepared')
    parser.add_argument('--side', type=int, default=1024, help='pixels of the shorter side at most')
    parser.add_argument('--workers', type=int, help='processes (default: all cores)')
    parser.add_argument('--voi', action='store_true', help="apply the files' VOI LUT or window")
    parser.add_argument('--no-clahe', dest='clahe', action='store_false')
    parser.add_argument('--percentiles', type=float, nargs=2, metavar=('LOW', 'HIGH'),
                        help='of the pixels become black and white, instead of minimum and maximum')
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C
    written, skipped, _ = prepare(**vars(options))
    if not written + skipped:
        raise ValueError(f'{options.raw}: not one file could be prepared')
    print(f'next: torchrun pretrain.py --data {options.prepared}')


if __name__ == '__main__':
    script('prepare.py', main)
