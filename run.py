"""What every script does around its method: flags from a dataclass, ranks, checkpoints.

Copy this file alone; it imports nothing of this repository.
"""
import argparse
import contextlib
import math
import os
import subprocess
import sys
from dataclasses import field, fields
from datetime import timedelta
from functools import partial
from inspect import cleandoc
from pathlib import Path

import torch
import torch.distributed as dist


def option(default, source, text, group=None):
    """A field that is a flag. `group` opens a section of --help."""
    return field(default=default, metadata=dict(source=source, help=text, group=group))


def parse(config, argv, demo=None, source='data'):
    """Flags -> config. `demo` replaces the defaults where the flag `source`, which names the data, is not given."""
    parser = group = argparse.ArgumentParser(
        usage=f'{Path(sys.argv[0]).name} [--{source} DIR] [options]; --help lists them',
        description=sys.modules[config.__module__].__doc__, epilog=cleandoc(config.__doc__),
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=118))
    for f in fields(config):
        if f.metadata['group']:
            group = parser.add_argument_group(f.metadata['group'])
        several = isinstance(f.default, tuple)
        shown = ' '.join(map(str, f.default)) if several else '' if f.default is None else str(f.default)
        text = f"{f.metadata['help']} [{f.metadata['source']}]{shown and f' (default: {shown})'}".replace('%', '%%')
        kind = next((t for t in (bool, int, float) if t.__name__ in str(f.type)), str)
        if kind is bool:
            group.add_argument(f'--{f.name}', action=argparse.BooleanOptionalAction, help=text)
        else:
            many = '+' if '...' in str(f.type) else len(f.default) if several else None
            group.add_argument(f'--{f.name}', type=kind, nargs=many, help=text,
                               metavar={int: 'N', float: 'X', str: 'S'}[kind])
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    return config(**({} if source in given else demo or {}) | given)


def setup():
    """-> rank, ranks, device. There is always a process group: NCCL or gloo under torchrun, one of one without."""
    cuda = torch.cuda.is_available()
    backend = 'nccl' if cuda else 'gloo'
    if 'RANK' in os.environ:
        device = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if cuda else torch.device('cpu')
        if cuda:
            torch.cuda.set_device(device)
        patience = timedelta(hours=6)                       # rank 0 reads a million headers
        store, rank, ranks = next(dist.rendezvous('env://', timeout=patience))
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT') if os.environ.get('GROUP_WORLD_SIZE') == '1' else None
        store = dist.PrefixStore(attempt or '0', store)     # torchrun's still holds the addresses of ranks that died
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
    else:
        device = torch.device('cuda' if cuda else 'cpu')
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size(), device


def save(path, state):
    """Written beside its place, to the disk, and moved there whole: a crash, a power cut or a full disk leaves the
    checkpoint before it."""
    part = Path(f'{path}.part')
    try:
        torch.save(state, part)
        with open(part, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as problem:
        part.unlink(missing_ok=True)
        if not isinstance(problem, (OSError, RuntimeError)):
            raise
        raise OSError(f'{path} cannot be written ({problem}); is the disk full, or not yours?') from problem


def cosine(step, steps, start, end, warmup=0):
    """Linear from 0 over `warmup` steps, then half a cosine from start to end (DINOv2, per step)."""
    if step < warmup:
        return start * step / max(warmup - 1, 1)
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def commit():
    """The commit of this file's repository; None outside one."""
    try:
        return subprocess.run(['git', '-C', Path(__file__).resolve().parent, 'rev-parse', 'HEAD'], capture_output=True,
                              text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def claim(folder):
    """An open file that keeps others out of the folder until it is closed or the process ends, however it ends.
    ValueError where another process holds it."""
    file = open(Path(folder) / '.lock', 'w')
    with contextlib.suppress(ImportError):                  # Windows has none
        from fcntl import LOCK_EX, LOCK_NB, lockf
        try:
            lockf(file, LOCK_EX | LOCK_NB)                  # of this process alone: data workers do not inherit it
        except (BlockingIOError, PermissionError):
            raise ValueError(f'{folder}: another process is writing there; wait for it, or choose another folder') \
                from None
        except OSError:                                     # a file system without locks
            pass
    return file
