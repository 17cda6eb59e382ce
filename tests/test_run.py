"""run.py: a checkpoint is whole or the one before, an error is one sentence."""
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import run


def test_the_cosine_is_dinov2s_array():
    """The values of DINOv2's CosineScheduler written out."""
    steps, warmup, peak, end = 1000, 100, 2.0, 0.5
    i = np.arange(steps - warmup)
    theirs = np.concatenate([np.linspace(0, peak, warmup),
                             end + 0.5 * (peak - end) * (1 + np.cos(np.pi * i / len(i)))])
    ours = [run.cosine(step, steps, peak, end, warmup) for step in range(steps)]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """Otherwise a power cut may leave an empty file under its name."""
    done = []
    for name in ('fsync', 'replace'):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (done.append(name), real(*given)))
    run.save(tmp_path / 'last.pt', {'a': 1})
    assert done == ['fsync', 'replace'] and torch.load(tmp_path / 'last.pt') == {'a': 1}


@pytest.mark.parametrize('error, words', [
    ("ValueError('no such thing')", 'no such thing'),
    ("ValueError()", 'ValueError'),
    ("KeyboardInterrupt()", 'stopped'),
    ("torch.OutOfMemoryError('CUDA')", 'out of memory; lower'),
    ("RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.')", 'a data worker died'),
    ("RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. out of shared memory')",
     '/dev/shm is full'),
    ("RuntimeError('[gloo/transport/tcp/pair.cc] Connection closed by peer')", 'another rank has ended'),
    ("KeyError('a bug')", "KeyError: 'a bug'")])
def test_what_a_user_can_mend_is_one_sentence_and_a_bug_keeps_its_traceback(error, words):
    code = f'import run, torch\ndef fail(argv): raise {error}\nrun.script("x.py", fail)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and words in done.stderr
    assert ('Traceback' in done.stderr) == ('bug' in error) and done.stderr.splitlines()[-1].startswith('x.py: ')
