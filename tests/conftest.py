"""Tests run from the project's root, where the seven files lie; nothing is installed."""
import csv
import os
import pathlib
import subprocess
import sys

os.environ.setdefault('OMP_NUM_THREADS', '1')               # tiny networks: a second thread would wait more than work

import torch.distributed as dist

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = ROOT / 'tests' / 'cases'
sys.path.insert(0, str(ROOT))


def write(path, lines):
    """A CSV from lines whose cells are parted by |."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows(line.split('|') for line in lines)


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
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    return done.returncode, done.stdout + done.stderr
