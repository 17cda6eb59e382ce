"""Runs that are killed at random, against runs that nothing happened to. Not a test; the suite kills seven times.

    $ python tests/faults.py                            # twenty kills, about eight minutes on two cores
    $ python tests/faults.py --kills 100 --seed 1

Each kill draws a variant of the run (precision, ranks, accumulation, data workers, how often it saves), a victim, and a
moment: some milliseconds after a line of the log, or while a checkpoint lies half written beside its place. Everything
that belongs to the run gets SIGKILL, as from a node that goes down; or one rank or one data worker alone, which
torchrun then restarts; or torchrun gets SIGTERM. Then `--resume` ends the run, and log, weights, optimizer and centres
must be those of the undisturbed run, bit for bit.
"""
import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from conftest import family, kill, logged_steps, pretraining, reached, run, same_run, started

VARIANTS = {'fp32': (1, ()),
            'bf16': (1, ('--amp',)),
            'accumulation': (1, ('--micro_batch', 2)),
            'workers': (1, ('--workers', 2, '--amp')),
            'two ranks': (2, ()),
            'two ranks, workers, accumulation, bf16': (2, ('--workers', 1, '--micro_batch', 2, '--amp'))}
LARGE = ('--steps', 12, '--phantoms', 60, '--drop_path', 0.2, '--keep_every', 4,
         '--hidden', 1024, '--prototypes', 4096)                                        # a checkpoint takes 0.1 s


def moment(rng, out):
    """-> its name, and a function that is true from then on."""
    if rng.random() < 0.4:
        since = logged_steps(out)
        return 'in a checkpoint', lambda: (out / 'last.pt.part').exists() and logged_steps(out) > since
    line, pause, seen = logged_steps(out) + int(rng.integers(1, 9)), rng.uniform(0, 0.1), []

    def arrived():
        if logged_steps(out) >= line:
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] > pause

    return f'{1e3 * pause:.0f} ms after step {line - 1}', arrived


def strike(rng, out, flags, ranks):
    """One run, and what happened to it; it may end of itself before."""
    name, when = moment(rng, out)
    victim = ('everything', 'a rank', 'a data worker', 'SIGTERM')[int(rng.integers(4))]
    if victim == 'a data worker' and '--workers' not in flags:
        victim = 'a rank'
    process = started(pretraining(out, *flags, ranks=ranks, torchrun=('--max-restarts', '2')))
    if victim == 'everything':
        return f'{victim} {name}' if kill(process, when) else None
    if not reached(process, when):
        return None
    children = [pid for pid in family(process.pid) if pid != process.pid]
    own = [pid for pid in children if all(pid not in family(other) for other in children if other != pid)]
    target = {'SIGTERM': [process.pid], 'a rank': own, 'a data worker': [pid for pid in children if pid not in own]}
    target = target[victim]
    if target:
        os.kill(target[int(rng.integers(len(target)))], signal.SIGTERM if victim == 'SIGTERM' else signal.SIGKILL)
    process.communicate(timeout=300)
    return f'{victim} {name}' if target else None


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    rng, whole, kills, wrong = np.random.default_rng(args.seed), {}, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while kills < args.kills:
            name = list(VARIANTS)[int(rng.integers(len(VARIANTS)))]
            ranks, flags = VARIANTS[name]
            flags = (*LARGE, *flags, '--resume')
            if name not in whole:
                whole[name] = Path(folder) / f'whole {name}'
                run(whole[name], *flags, ranks=ranks)
            save, out = int(rng.integers(1, 5)), Path(folder) / f'killed {kills}'
            strikes = [strike(rng, out, (*flags, '--save_every', save), ranks) for _ in range(int(rng.integers(1, 3)))]
            strikes = [what for what in strikes if what]
            kills += len(strikes)
            run(out, *flags, '--save_every', save, ranks=ranks)
            try:
                same_run(whole[name], out)
                names = [sorted(path.name for path in folder.iterdir()) for folder in (whole[name], out)]
                verdict = 'the same' if names[0] == names[1] else f'other files: {names}'
            except AssertionError as difference:
                verdict = f'DIFFERS: {str(difference).splitlines()[0]}'
            wrong += verdict != 'the same'
            print(f'{kills:3d}  {name}, saved every {save} steps, killed:', ', '.join(strikes) or 'too late', '->',
                  verdict, flush=True)
    print(f'{kills} kills, {wrong} runs that are not the same')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main(sys.argv[1:])
