"""Once per data set: every image below RAW -> read -> judge -> CLAHE -> shrink -> .npy (MammoDINO 3.1).

    $ python prepare.py RAW PREPARED                            # then: torchrun pretrain.py --data PREPARED
    $ python prepare.py RAW PREPARED --percentiles 0.5 99.9     # where hot pixels or labels take the greys
    $ python prepare.py RAW PREPARED --voi --no-clahe           # the inputs of DBT-DINO

PREPARED/<path below RAW>.npy is uint8 (H, W), or (K, H, W) for a volume; every frame is stretched for
itself. index.csv lists them; rejected.csv the files that cannot be read or are no mammograms, a volume
with one bad frame too, and why. A file whose .npy is there is skipped, so a stopped run goes on, and a later
run with --percentiles reads only what was rejected before. Several RAW in one PREPARED need different paths.
"""
import argparse
import csv
import multiprocessing
import os
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
    if side < 14 or not 0 <= low < high <= 100:
        raise ValueError('expected --side from 14 and 0 <= LOW < HIGH <= 100')
    raw, prepared = Path(raw), Path(prepared)
    source, target = raw.resolve(), prepared.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise ValueError(f'{prepared} and {raw}: one lies in the other; choose another folder')
    origin, rejected = {}, []                               # name of a .npy -> of the file it is made of
    for path in images.listing(raw):
        name = os.path.relpath(path, raw)
        stem, suffix = os.path.splitext(name)
        array = f'{stem if suffix.lower() in images.SUFFIXES else name}.npy'
        if origin.setdefault(array, name) != name:
            rejected.append((name, f'becomes the same file as another: rename {origin[array]}'))
    todo = [(raw / name, prepared / array) for array, name in origin.items()
            if not (prepared / array).is_file()]
    skipped = len(origin) - len(todo)

    work = partial(prepare_file, side=side, voi=voi, clahe=clahe, percentiles=percentiles)
    prepared.mkdir(parents=True, exist_ok=True)
    with lock(prepared):
        refused = write_arrays(work, todo, prepared, workers)
        rejected += [(os.path.relpath(path, raw), reason) for path, reason in refused]
        write_tables(prepared, rejected)
    written = len(todo) - len(refused)
    print(f'{written} written, {skipped} were there, {len(rejected)} rejected and named in '
          f'{prepared}/rejected.csv')
    for kind, count in Counter(reason.split(':')[0] for _, reason in rejected).most_common():
        print(f'{count:8,}  {kind}')
    return written, skipped, len(rejected)


def write_arrays(work, todo, prepared, workers):
    """work((file, target)) for all of todo, in processes -> [(file, reason)] of what it rejects."""
    pool, refused = ProcessPoolExecutor(workers, initializer=end_with_parent), []
    try:
        reasons = pool.map(work, todo)                      # in the order of todo
        for path, _ in tqdm(todo, unit='file', disable=None):
            if reason := next(reasons):
                refused.append((path, reason))
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
    return refused


def prepare_file(paths, side, voi, clahe, percentiles):
    """(file, target) -> None, or why not: a kind of reason, then a colon before what is the file's own."""
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
            if len(np.unique(pixels)) == 2:                 # an ROI mask
                return 'two grey values'
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


def end_with_parent():
    """A worker leaves Ctrl-C, which reaches all processes of a terminal, to its parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # by which a pool ends its processes
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_tables(prepared, rejected):
    """rejected.csv, then index.csv, by which pretrain.py knows that all is there."""
    arrays = filter(Path.is_file, prepared.rglob('*.npy'))
    arrays = sorted(path.relative_to(prepared).as_posix() for path in arrays)
    index = [(path, *images.shape(prepared / path)) for path in arrays]
    for name, rows in {'rejected.csv': [('file', 'reason'), *sorted(rejected)],
                       'index.csv': [('path', 'slices', 'height', 'width'), *index]}.items():
        part = prepared / f'{name}.part'
        with open(part, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
            csv.writer(file).writerows(rows)
        os.replace(part, prepared / name)


def main(argv):
    """python prepare.py RAW PREPARED"""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('raw')
    add('prepared')
    add('--side', type=int, default=1024, help='pixels of the shorter side at most (default: 1024)')
    add('--workers', type=int, help='processes (default: all cores)')
    add('--voi', action='store_true', help="apply the files' VOI LUT or window")
    add('--no-clahe', dest='clahe', action='store_false', help='leave the contrast as it is')
    add('--percentiles', type=float, nargs=2, metavar=('LOW', 'HIGH'),
        help='of the pixels become black and white, instead of minimum and maximum')
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C
    written, skipped, _ = prepare(**vars(options))
    if not written + skipped:
        raise ValueError(f'{options.raw}: not one file could be prepared')
    print(f'next: torchrun pretrain.py --data {options.prepared} --small')


if __name__ == '__main__':
    script('prepare.py', main)
