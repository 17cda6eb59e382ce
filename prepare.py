"""Once per data set: read -> CLAHE -> shrink -> .npy (MammoDINO, arXiv 2510.11883, 3.1).

    $ python prepare.py SRC DST [--side 1024] [--workers N]
"""
import argparse
import contextlib
import csv
import errno
import itertools
import os
import signal
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from images import SUFFIXES, clahe, frames, listing, read
from run import claim


def prepare(src, dst, side=1024, workers=None):
    """Once per data set: read -> CLAHE -> shrink -> DST/<same relative path>.npy, volumes stay volumes (K, h, w).

    The shorter side becomes at most `side` pixels. Finished files are skipped, whatever their side, so a stopped run
    goes on; each file is written beside its place and moved there whole. Unreadable files are listed in
    DST/rejected.csv with the reason.
    Returns (written, skipped, rejected).
    """
    src, dst = Path(src), Path(dst)
    if dst.resolve().is_relative_to(src.resolve()):
        raise ValueError(f'{dst} lies in {src}, it would be prepared again next time; choose a folder outside')
    if side < 1 or workers is not None and workers < 1:
        raise ValueError(f'--side {side} and --workers {workers}: expected at least 1')
    files, todo, taken, skipped, written, rejected = listing(src), [], {}, 0, 0, []
    dst.mkdir(parents=True, exist_ok=True)
    lock = claim(dst)                                       # held until the end
    for path in files:
        relative = os.path.relpath(path, src)
        stem, suffix = os.path.splitext(relative)
        target = os.path.join(dst, (stem if suffix.lower() in SUFFIXES else relative) + '.npy')
        if target in taken:
            rejected.append((relative, f'would become the same file as {taken[target]}; rename one'))
        elif os.path.exists(target):
            skipped += 1
        else:
            todo.append((path, target))
        taken.setdefault(target, relative)

    results = _results(todo, side, workers)
    try:
        for path, reason in tqdm(results, total=len(todo), unit='file'):
            written += not reason
            if reason:
                rejected.append((os.path.relpath(path, src), reason))
    except BaseException as error:
        results.close()
        with contextlib.suppress(OSError):
            _list_rejected(dst, rejected)
        if isinstance(error, OSError) and error.errno in FULL:
            raise OSError(f'{dst} cannot be written ({error.strerror}); free some space and start again, it goes on '
                          'from here') from error
        raise
    _list_rejected(dst, rejected)
    return written, skipped, len(rejected)


def _list_rejected(dst, rejected):
    with _whole(dst / 'rejected.csv') as part, \
            open(part, 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file).writerows([('file', 'reason'), *sorted(rejected)])


def follow_parent():
    """For the processes of a pool: Ctrl-C is their parent's affair, and they end soon after it, however it ends."""
    def watch(parent):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)           # a pool ends its processes by it
    threading.Thread(target=watch, args=(os.getppid(),), daemon=True).start()


def _pool(workers):
    return ProcessPoolExecutor(workers, initializer=follow_parent)


def _results(todo, side, workers, ahead=64):
    """(path, why not) of each file as it is done; only `ahead` are handed out, so a million cost no memory.

    Where a process dies, of a decoder that crashes or for want of memory, the files at work are done again, each alone
    in a process of its own; the file that kills its process again is at fault."""
    todo, pool, at_work = iter(todo), _pool(workers), {}
    try:
        while True:
            fresh = list(itertools.islice(todo, ahead - len(at_work)))[::-1]
            try:
                while fresh:
                    at_work[pool.submit(_prepare_one, *fresh[-1], side)] = fresh[-1]
                    fresh.pop()
                if not at_work:
                    return
                for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                    reason = future.result()
                    yield at_work.pop(future)[0], reason
            except BrokenProcessPool:
                pool.shutdown()                             # the others have ended; nobody writes these files now
                for path, target in (*at_work.values(), *fresh):
                    yield path, _alone(path, target, side)
                pool, at_work = _pool(workers), {}
    except KeyboardInterrupt:
        print('\nstopping after the files at work', file=sys.stderr)
        patience = signal.signal(signal.SIGINT, signal.SIG_IGN)     # a second Ctrl-C would leave workers behind
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGINT, patience)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(path, target, side):
    with _pool(1) as pool:
        try:
            return pool.submit(_prepare_one, path, target, side).result()
        except BrokenProcessPool:
            Path(f'{target}.part').unlink(missing_ok=True)
            return 'the process died over it: its decoder crashed, or memory ran out'


@contextlib.contextmanager
def _whole(target):
    """A path beside `target` to write to; moved there when all is well, removed otherwise."""
    part = Path(f'{target}.part')
    try:
        yield part
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)      # what ends the run, not the file


def _prepare_one(path, target, side):
    """None, or why this file cannot be prepared. OSError where nothing can be written any more."""
    try:
        count = frames(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with _whole(target) as part, open(part, 'wb') as file:
            for k in range(count):
                image = Image.fromarray(clahe(read(path, k)))
                shrink = min(1.0, side / min(image.size))
                size = tuple(max(1, round(length * shrink)) for length in image.size)   # (w, h)
                image = np.asarray(image.resize(size, Image.Resampling.BICUBIC) if shrink < 1 else image)
                if k == 0:
                    shape = image.shape if count == 1 else (count, *image.shape)
                    np.lib.format.write_array_header_1_0(file, dict(descr='|u1', fortran_order=False, shape=shape))
                if image.shape != shape[-2:]:
                    raise ValueError(f'frame {k} is of another size than frame 0')
                file.write(image.tobytes())
    except Exception as error:                              # one file never ends the run
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        return str(error).removeprefix(f'{path}: ') or type(error).__name__


def _main(arguments):
    parser = argparse.ArgumentParser(usage='prepare.py SRC DST [--side 1024] [--workers N]')
    parser.add_argument('src', help='folder of images')
    parser.add_argument('dst', help='folder of .npy to write')
    parser.add_argument('--side', type=int, default=1024,
                        help='pixels of the shorter side at most; files that are there already keep theirs')
    parser.add_argument('--workers', type=int, help='processes (default: all cores)')
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C
    start = time.time()
    written, skipped, rejected = prepare(**vars(parser.parse_args(arguments)))
    print(f'{written} written, {written / (time.time() - start):.1f} files/s, {skipped} were there, {rejected} '
          'rejected (named in DST/rejected.csv)')
    if not written + skipped:
        raise ValueError('not one file could be prepared')


if __name__ == '__main__':
    try:
        _main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f'prepare.py: {error}')
    except KeyboardInterrupt:
        sys.exit('prepare.py: stopped; the same command goes on from here')
