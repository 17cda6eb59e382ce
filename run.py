"""What every script does around its method: flags, ranks, an output folder, checkpoints, errors.

    cfg = parse(Config, argv, DEMO)                 a dataclass of `option`s becomes a command line
    rank, ranks, device = setup()                   under torchrun, or plain python
    held = lock(out)                                one run per folder
    save(out / 'last.pt', state)                    whole or not at all
    script('pretrain.py', main)                     what a user can mend ends in one sentence

Copy this file alone; it imports nothing of this repository.
"""
import argparse
import math
import os
import sys
import traceback
from dataclasses import field, fields
from datetime import timedelta
from functools import partial
from inspect import cleandoc
from pathlib import Path

import torch
import torch.distributed as dist


def option(default, source, text, group=None):
    """A dataclass field that is a flag. `source`: whose value it is; `group`: opens a section of --help."""
    return field(default=default, metadata=dict(source=source, help=text, group=group))


def parse(config, argv, demo=None, source='data'):
    """Flags -> an object of the dataclass `config`. A flag that is given wins over every default.

    `demo` replaces defaults when the flag that names the data, `source`, is not given. It may also be a
    function of the given flags that returns the defaults to replace."""
    parser = group = argparse.ArgumentParser(
        usage=f'{Path(sys.argv[0]).name} [--{source} DIR] [options]; --help lists them',
        description=sys.modules[config.__module__].__doc__, epilog=cleandoc(config.__doc__),
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30))
    for f in fields(config):
        if f.metadata['group']:
            group = parser.add_argument_group(f.metadata['group'])
        several, kind = isinstance(f.default, tuple), str(f.type)
        value = ' '.join(map(str, f.default)) if several else f.default
        text = f"{f.metadata['help']} [{f.metadata['source']}]".replace('%', '%%')
        text += '' if value is None else f' (default: {value})'
        if 'bool' in kind:
            group.add_argument(f'--{f.name}', action=argparse.BooleanOptionalAction, help=text)
        else:
            number = next((t for t in (int, float) if t.__name__ in kind), str)
            count = '+' if '...' in kind else len(f.default) if several else None
            group.add_argument(f'--{f.name}', type=number, nargs=count, help=text,
                               metavar={int: 'N', float: 'X', str: 'S'}[number])
    given = vars(parser.parse_args(argv))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    defaults = demo(given) if callable(demo) else {} if source in given else demo or {}
    return config(**defaults | given)


def setup():
    """-> rank, ranks, device. There is always a process group; plain python makes one of one process."""
    cuda, env, timeout = torch.cuda.is_available(), os.environ, timedelta(minutes=45)
    local_rank, local_ranks = int(env.get('LOCAL_RANK', 0)), int(env.get('LOCAL_WORLD_SIZE', 1))
    if cuda and local_ranks > torch.cuda.device_count():
        raise ValueError(f'{local_ranks} ranks on {torch.cuda.device_count()} GPUs; lower '
                         '--nproc-per-node')
    device = torch.device('cuda', local_rank) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')          # TF32
    if 'RANK' in env:
        store, rank, ranks = next(dist.rendezvous('env://', timeout=timeout))
        # torchrun's store survives a restart and still holds the addresses of ranks that are gone, so every
        # attempt gets its own prefix; on a single node only, as every node counts its own restarts.
        attempt = env.get('TORCHELASTIC_RESTART_COUNT', '0')
        store = dist.PrefixStore(attempt if env.get('GROUP_WORLD_SIZE') == '1' else '0', store)
    else:
        store, rank, ranks = dist.HashStore(), 0, 1
    dist.init_process_group('nccl' if cuda else 'gloo', store=store, rank=rank, world_size=ranks,
                            timeout=timeout, device_id=device if cuda else None)
    return rank, ranks, device


def computes_in_bf16(device, amp):
    """`amp` as the user set it; where it is None, whether this is a GPU that has bf16."""
    if amp is None:
        return device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    return amp


def gathered(items):
    """The lists of all ranks joined, in the order of ranks, on every rank."""
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def on_rank_0(function, *args):
    """function(*args), called on rank 0, returned on every rank: what reads many files is read once."""
    result = [function(*args) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def cosine(step, steps, peak, end, warmup=0):
    """DINOv2's schedule: linear from 0 to `peak` over `warmup` steps, then half a cosine to `end`."""
    if step < warmup:
        return peak * step / max(warmup - 1, 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2


def lock(folder):
    """Keeps other processes out of a folder until the returned file is closed or this process ends.
    Raises ValueError where another process holds it."""
    file = open(Path(folder) / '.lock', 'w')
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f'{folder}: another process writes there; choose another folder') from None
    except (ImportError, OSError):                          # Windows and some network disks have no locks
        pass
    return file


def save(path, state):
    """Writes a checkpoint beside its place, to the disk, then moves it there: a crash, a power cut or a
    full disk leaves the one before. Raises OSError."""
    part = Path(f'{path}.part')
    try:
        torch.save(state, part)
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as problem:              # torch.save wraps the system's errors
        part.unlink(missing_ok=True)
        raise OSError(f'{path} cannot be written ({problem}); is the disk full?') from problem


ADVICE = {                  # words of an error -> what to do about it
    'shared memory': '/dev/shm is full; enlarge it (docker --shm-size), or lower --workers',
    'DataLoader timed out': 'no data came for a long time; is the storage there?',
    'DataLoader worker (pid': 'a data worker died, probably out of memory; lower --workers',
    'gloo': 'another rank has ended; its own message is above or below',
    'NCCL': 'another rank has ended; its own message is above or below'}


def script(name, main):
    """Runs main(argv) and ends the process. What a user can mend becomes one sentence and status 1; a
    programming error keeps its traceback."""
    message = None
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        message = 'stopped'
    except (ValueError, OSError, FloatingPointError) as problem:
        # A data worker puts a traceback before the reason, the system a number.
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        message = lines[-1].removeprefix('ValueError: ')
        if isinstance(problem, OSError) and problem.filename:
            message = f'{problem.filename}: {problem.strerror}'
    except (MemoryError, torch.OutOfMemoryError):
        message = 'out of memory; lower the batch that a rank holds at once'
    except Exception as problem:
        message = next((advice for words, advice in ADVICE.items() if words in str(problem)), None)
        if message is None:
            traceback.print_exc()
            message = 'stopped by the error above'
    if message:
        print(f'{name}: {message}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(bool(message))     # data workers ignore signals, gloo's threads may abort: wait for neither
