"""Tests run from the project's root, where the modules lie; nothing is installed."""
import contextlib
import csv
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import traceback

os.environ['OMP_NUM_THREADS'] = '1'                         # tiny networks: a second thread would wait more than work
os.environ['CUDA_VISIBLE_DEVICES'] = ''                     # the same numbers with and without a GPU

import pytest
import torch
import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = ROOT / 'tests' / 'cases'
sys.path.insert(0, str(ROOT))


def write(path, lines):
    """A CSV from lines whose cells are parted by |."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows(line.split('|') for line in lines)


@pytest.fixture
def group():
    """A process group of one, for what is called without its script."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_here(script, *argv):
    """A script's own entry, in this process."""
    try:
        script.main(list(map(str, argv)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(script, ranks, *argv):
    """-> exit status, everything it printed"""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks),
               str(ROOT / script), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


# ---- whole pretraining runs, in processes of their own ------------------------------------------------------------

TINY = ['--steps', '6', '--batch', '8', '--micro_batch', '8', '--phantoms', '9', '--test_phantoms', '0', '--log_every',
        '1', '--width', '32', '--heads', '2', '--depth', '2', '--warmup', '2', '--prototypes', '32']
TIMING = ('gpu_memory', 'time')


def pretraining(out, *flags, ranks=1, torchrun=None):
    """The command line of a tiny run: plain python, or torchrun for several ranks or where its options are given."""
    launcher = [] if ranks == 1 and torchrun is None else [
        '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks), *(torchrun or ())]
    return [sys.executable, *launcher, str(ROOT / 'pretrain.py'), '--out', str(out), *TINY, *map(str, flags)]


def started(command, **how):
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def run(out, *flags, ranks=1, torchrun=None, ok=True, **how):
    """A whole run -> its output and the lines of its log."""
    process = started(pretraining(out, *flags, ranks=ranks, torchrun=torchrun), **how)
    text = process.communicate()[0]
    assert (process.returncode == 0) == ok, text
    log = out / 'log.jsonl'
    return text, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def here(out, *flags):
    """A tiny run in this process, into which a fault can be planted -> the lines of its log."""
    import pretrain
    import run as plumbing
    pretrain.warn.cache_clear()
    try:
        argv = [*TINY, '--out', str(out), *map(str, flags)]
        pretrain.main(plumbing.parse(pretrain.Config, argv, pretrain.defaults))
    except Exception as problem:
        traceback.clear_frames(problem.__traceback__)       # DDP goes before its group, as in main
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def timeless(lines):
    """A log without its header and its clocks: what is promised to be the same."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines[1:]]


def same_run(a, b):
    """Two folders hold the same run, bit for bit: log, weights of both networks, centres, optimizer."""
    logs = [[json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()] for out in (a, b)]
    assert timeless(logs[0]) == timeless(logs[1])
    ours, theirs = (torch.load(out / 'last.pt', weights_only=True) for out in (a, b))
    for name in ('step', 'student', 'teacher', 'center', 'optimizer', 'data'):
        same = plain(ours[name]) == plain(theirs[name])
        assert same, name


def plain(state):
    """Nested dicts and lists with the bytes of their tensors."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [plain(value) for value in state]
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else state


def logged_steps(out):
    log = out / 'log.jsonl'
    return log.read_bytes().count(b'"step"') if log.exists() else 0


def reached(process, when):
    """True as soon as `when()` is; False if the process has ended before."""
    while not when():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def kill(process, when):
    """SIGKILL to the process and all its descendants as soon as `when()`. -> False if it had ended before."""
    if not reached(process, when):
        return False
    for pid in family(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    return True


def family(pid):
    """The process and its descendants, launchers, ranks and data workers."""
    parents = {}
    for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(')', 1)[1].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found
