"""What is promised to whoever leaves a run alone: nothing is lost, nothing is silently wrong, nobody is let in."""
import io
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pydicom
import pytest
import torch
import torch.distributed as dist
from conftest import (ROOT, TINY, family, kill, logged_steps, pretraining, reached, run, run_here, same_run, started,
                      timeless)
from PIL import Image
from pydicom import uid
from pydicom.encaps import encapsulate
from torch.utils.data import get_worker_info

import detect
import finetune
import losses
import images
import phantom
import prepare
import pretrain
import vit
from pretrain import DEMO, Config


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """Flags of a run over 27 mammograms, 4 volumes and a file without tissue; six steps do not see them all."""
    folder = tmp_path_factory.mktemp('films')
    for i in range(31):
        volume = phantom.breast(np.random.default_rng(i), slices=5 if i % 8 == 0 else 1).volume
        np.save(folder / f'{i:02d}.npy', volume if len(volume) > 1 else volume[0])
    np.save(folder / '31.npy', np.zeros((256, 192), np.uint8))
    return ('--data', folder, *SMALL, '--workers', 0, '--drop_path', 0.2, '--layerscale', 1)


SMALL = ('--size', 84, '--local_size', 42, '--locals', 2, '--hidden', 64, '--bottleneck', 16)


@pytest.fixture(scope='module')
def two(one):
    """The same for two ranks, with data workers, accumulation and bf16."""
    return (*one, '--workers', 1, '--micro_batch', 2, '--amp')


@pytest.fixture(scope='module')
def whole(one, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp('whole') / 'run'
    return out, *run(out, *one)


@pytest.fixture(scope='module')
def pair(two, tmp_path_factory):
    """One of two ranks."""
    out = tmp_path_factory.mktemp('pair') / 'run'
    return out, *run(out, *two, ranks=2)


@pytest.fixture
def folder(tmp_path):
    """Twelve mammograms and four volumes, as .npy."""
    where = tmp_path / 'data'
    where.mkdir()
    for i in range(16):
        volume = phantom.breast(np.random.default_rng(i), slices=5 if i % 4 == 0 else 1).volume
        np.save(where / f'{i:02d}.npy', volume if len(volume) > 1 else volume[0])
    return where


# ---- faults -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('after', [2, 4])
def test_a_killed_run_goes_on_bit_for_bit(after, one, whole, tmp_path):
    out = tmp_path / 'run'
    flags = (*one, '--workers', 2, '--save_every', 3, '--resume')
    process = started(pretraining(out, *flags))
    if after == 2:
        assert kill(process, lambda: logged_steps(out) >= 2)
    else:                                                   # its data workers are still there when it goes on
        assert reached(process, lambda: logged_steps(out) >= 4)
        process.kill()
        process.wait()
    run(out, *flags)
    same_run(whole[0], out)


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_bit_for_bit(two, pair, tmp_path):
    """Two ranks with workers, accumulation and bf16; at the second checkpoint, so that there is a first."""
    out = tmp_path / 'run'
    flags = (*two, '--save_every', 2, '--keep_every', 4, '--resume')
    assert kill(started(pretraining(out, *flags, ranks=2)), lambda: (out / 'last.pt').exists()
                and ((out / 'last.pt.part').exists() or (out / 'step_000004.pt.part').exists()))
    run(out, *flags, ranks=2)
    same_run(pair[0], out)
    assert (out / 'step_000004.pt').exists() and not list(out.glob('*.part'))


def test_a_rank_that_dies_is_restarted_and_the_result_is_the_same(two, pair, tmp_path):
    out = tmp_path / 'run'
    process = started(pretraining(out, *two, '--save_every', 2, '--resume', ranks=2, torchrun=('--max-restarts', '1')))
    assert reached(process, lambda: logged_steps(out) >= 3)
    os.kill(random.choice(ranks_of(process)), signal.SIGKILL)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    same_run(pair[0], out)


def ranks_of(process):
    """The processes that torchrun started, without their data workers."""
    children = [pid for pid in family(process.pid) if pid != process.pid]
    return [pid for pid in children if all(pid not in family(other) for other in children if other != pid)]


@pytest.mark.parametrize('whom', ['torchrun', 'everyone'])
def test_sigterm_saves_within_a_step_and_tells_how_to_go_on(whom, two, pair, tmp_path):
    """A scheduler tells torchrun, which passes it on, or every process of the job, data workers too."""
    out = tmp_path / 'run'
    process = started(pretraining(out, *two, ranks=2))
    assert reached(process, lambda: logged_steps(out) >= 2)
    before = logged_steps(out)
    for pid in family(process.pid) if whom == 'everyone' else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    assert (out / 'last.pt').exists() and 'a data worker died' not in text, text
    step = torch.load(out / 'last.pt', weights_only=True)['step']
    assert before <= step <= before + 2 and f'stopped after step {step - 1}, as asked' in text
    assert f'torchrun --nproc-per-node 2 {ROOT}/pretrain.py --out {out}' in text and '--resume' in text
    if whom == 'everyone':
        run(out, *two, '--resume', ranks=2)
        same_run(pair[0], out)


def test_sigterm_ends_a_single_process_with_status_0(one, whole, tmp_path):
    out = tmp_path / 'run'
    process = started(pretraining(out, *one))
    assert reached(process, lambda: logged_steps(out) >= 2)
    process.send_signal(signal.SIGTERM)
    assert 'as asked; this goes on: python' in process.communicate()[0] and process.returncode == 0
    run(out, *one, '--resume')
    same_run(whole[0], out)


def at_most(size):
    """For a new process: no file of it grows beyond this, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_ends_a_run_in_words_and_leaves_the_last_checkpoint(one, whole, tmp_path):
    out = tmp_path / 'run'
    flags = (*one, '--save_every', 2)
    assert kill(started(pretraining(out, *flags)), lambda: logged_steps(out) >= 4)
    good = (out / 'last.pt').read_bytes()
    text, _ = run(out, *flags, '--resume', ok=False, preexec_fn=at_most(100_000))
    assert 'pretrain.py: ' in text and 'last.pt cannot be written' in text and 'is the disk full' in text
    assert (out / 'last.pt').read_bytes() == good and not list(out.glob('*.part'))
    run(out, *flags, '--resume')
    same_run(whole[0], out)


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """Else a power cut may leave an empty file under its name."""
    done = []
    for name in ('fsync', 'replace'):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: (done.append(name), real(*given)))
    pretrain.save(tmp_path / 'last.pt', {'a': 1})
    assert done == ['fsync', 'replace'] and torch.load(tmp_path / 'last.pt') == {'a': 1}


class Deadly(pretrain.Slices):
    """A reader that lets file 3 pass once and then kills its process at it, as often as OUT/tally tells."""

    def load(self, file, frame):
        tally = pathlib.Path(self.cfg.out) / 'tally'
        if file == 3 and file not in self.deadly and get_worker_info() and tally.stat().st_size:
            turn, rest = tally.read_text()[0], tally.read_text()[1:]
            tally.write_text(rest)
            if turn == 'x':
                os.kill(os.getpid(), signal.SIGKILL)
        return super().load(file, frame)


def stream(folder, deaths, tmp_path):
    """Three epochs of four batches, by two workers, which draw nothing from torch's own numbers."""
    (tmp_path / 'tally').write_text('.' + 'x' * deaths)
    cfg = Config(**DEMO | dict(workers=2, batch=4, steps=12, out=str(tmp_path), volume_items=True))
    files, drawn = images.listing(folder), torch.get_rng_state()
    flow = pretrain.Stream(cfg, files, [images.frames(f) for f in files], torch.device('cpu'), 0, 0, 1, 1)
    batches = [next(flow) for _ in range(12)]
    assert torch.equal(drawn, torch.get_rng_state())
    return flow, batches


def equal(a, b):
    return all(torch.equal(x[name], y[name]) for x, y in zip(a, b) for name in ('globals', 'locals', 'masks', 'pair'))


def test_a_data_worker_that_dies_is_named_and_the_stream_stays_the_same(folder, tmp_path, monkeypatch, capsys):
    _, whole = stream(folder, 0, tmp_path)
    monkeypatch.setattr(pretrain, 'Slices', Deadly)
    monkeypatch.setattr(pretrain, 'STALL', 1)              # dead workers are looked for as often
    flow, batches = stream(folder, 2, tmp_path)
    assert equal(batches, whole) and not any(batch['bad'] for batch in batches)
    assert '03.npy (2 of 3)' in capsys.readouterr().err and flow.deaths == {3: 2}


def test_a_file_over_which_workers_always_die_is_skipped_named_and_counted(folder, tmp_path, monkeypatch, group):
    monkeypatch.setattr(pretrain, 'Slices', Deadly)
    monkeypatch.setattr(pretrain, 'STALL', 1)              # dead workers are looked for as often
    flow, batches = stream(folder, 99, tmp_path)
    bad = [b for batch in batches for b in batch['bad']]
    assert {file for file, _ in bad} == {3} and '03.npy: 3 data workers died over it' in bad[0][1]
    watch = pretrain.Watch(flow.data.cfg, flow.data.files, torch.device('cpu'))
    for batch in batches:
        watch.note(batch)
    assert watch.judge() == 1


def test_a_share_that_is_away_for_a_moment_is_waited_out_and_a_file_that_is_gone_is_replaced(folder, monkeypatch):
    monkeypatch.setattr(pretrain, 'PAUSE', 0)
    files, read = images.listing(folder), images.read
    data = pretrain.Slices(Config(**DEMO), files, [images.frames(f) for f in files])
    whole, failures = data[0], iter([True, True])

    def away(path, frame):
        if next(failures, False):
            raise OSError(f'{path}: Stale file handle')
        return read(path, frame)

    monkeypatch.setattr(images, 'read', away)
    sample = data[0]
    assert equal([{k: torch.from_numpy(v) for k, v in sample.items() if isinstance(v, np.ndarray)}],
                 [{k: torch.from_numpy(v) for k, v in whole.items() if isinstance(v, np.ndarray)}])
    assert [reason[-17:] for reason in sample['retried']] == ['Stale file handle'] * 2 and not sample['bad']
    os.remove(files[sample['file']])
    sample = data[0]
    assert sample['bad'][0][1].endswith('No such file or directory') and sample['file'] != sample['bad'][0][0]
    assert not sample['retried']


def test_a_share_that_stays_away_is_said_with_the_files_and_given_up(folder, tmp_path, monkeypatch, capsys):
    assert pretrain.STALL * pretrain.STALLS == 30 * 60
    monkeypatch.setattr(pretrain, 'STALL', 0.2)
    monkeypatch.setattr(pretrain, 'STALLS', 3)
    files = images.listing(folder)
    counts = [images.frames(f) for f in files]
    for file in files:
        os.remove(file)
        os.mkfifo(file)                                     # whoever opens it waits for ever
    cfg = Config(**DEMO | dict(workers=1, batch=4, steps=3, out=str(tmp_path), volume_items=True))
    flow = pretrain.Stream(cfg, files, counts, torch.device('cpu'), 0, 0, 1, 1)
    with pytest.raises(OSError, match='no data for 0.6.* s; is the storage there'):
        next(flow)
    assert re.search(r'no data for 0.2 s \(1 of 3\); at work: .*\d\d.npy', capsys.readouterr().err)
    for pid, _ in flow.data.at_work.tolist():
        os.kill(pid, signal.SIGKILL)


def test_a_run_resumed_on_other_ranks_workers_and_micro_batches_has_the_losses_of_one(tmp_path):
    """drop_path 0 and the same ranks x micro-batch; accumulation too, but for KoLeo, whose group is the micro-batch."""
    flags = ('--koleo_weight', 0, '--keep_every', 3)
    _, whole = run(tmp_path / 'whole', *flags)
    for name, changes in {'ranks': ('--micro_batch', 4, '--workers', 1), 'micro': ('--micro_batch', 2)}.items():
        out = tmp_path / name
        shutil.copytree(tmp_path / 'whole', out)
        shutil.copy(out / 'step_000003.pt', out / 'last.pt')
        _, lines = run(out, *flags, *changes, '--resume', ranks=2 if name == 'ranks' else 1)
        for ours, theirs in zip(lines[4:], whole[4:], strict=True):
            for term in ('image', 'patch', 'slice', 'total', 'grad_norm', 'center_norm', 'patch_center_norm'):
                assert ours[term] == pytest.approx(theirs[term], rel=2e-3, abs=1e-4), (name, ours['step'], term)
            assert ours['relaxed'] == theirs['relaxed'] and ours['masks_relaxed'] == theirs['masks_relaxed']


def test_two_ranks_give_the_losses_the_gradient_and_the_update_of_one(tmp_path):
    """Half the batch each, drop_path 0: every term, KoLeo and pairs included; Adam's first moment, which is the
    gradient; where the weights of both networks and the centres go."""
    runs = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        _, lines = run(out, '--steps', 3, '--warmup', 0, '--keep_every', 1, ranks=ranks)
        runs.append([torch.load(out / f'step_00000{k}.pt', weights_only=True) | {'line': lines[k]} for k in (1, 2, 3)])
    for one, two in zip(*runs):
        for name in ('image', 'patch', 'slice', 'koleo', 'total', 'grad_norm', 'center_norm', 'patch_center_norm'):
            assert one['line'][name] == pytest.approx(two['line'][name], rel=2e-3, abs=1e-4), name
        assert one['line']['relaxed'] == two['line']['relaxed'] and two['line']['bad_files'] == 0
        moments = [{i: s['exp_avg'] for i, s in state['optimizer']['state'].items()} for state in (one, two)]
        for ours, theirs in (moments, *((one[part], two[part]) for part in ('student', 'teacher', 'center'))):
            for name in ours:
                assert (ours[name] - theirs[name]).norm() <= 5e-3 * ours[name].norm() + 1e-6, name
    assert not torch.equal(*(runs[0][k]['student']['backbone.pos_embed'] for k in (0, 2)))


def test_another_recipe_and_other_files_need_override(folder, tmp_path):
    flags = ['--data', folder, *SMALL, '--workers', 0, '--resume']
    out = tmp_path / 'run'
    here(out, *flags, '--steps', 2)
    before = (out / 'last.pt').read_bytes()
    with pytest.raises(ValueError, match='another recipe: steps 2 -> 3, lr 0.004 -> 0.1; .* --override'):
        here(out, *flags, '--steps', 3, '--lr', 0.1)
    os.rename(folder / '05.npy', folder / '99.npy')
    with pytest.raises(ValueError, match='trained on other files than these 16: some are gone, new.* --override'):
        here(out, *flags, '--steps', 2)
    assert (out / 'last.pt').read_bytes() == before
    here(out, *flags, '--steps', 3, '--lr', 0.1, '--override')
    lines = [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]
    assert lines[0]['config']['lr'] == 0.1 and [line['step'] for line in lines[1:]] == [0, 1, 2]
    with pytest.raises(ValueError, match='its weights do not fit this recipe'):
        here(out, *flags, '--steps', 3, '--lr', 0.1, '--width', 64, '--override')


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    code = 'import run, sys; lock = run.claim(sys.argv[1]); print("mine", flush=True); sys.stdin.read()'
    other = subprocess.Popen([sys.executable, '-c', code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             cwd=ROOT, text=True)
    assert other.stdout.readline() == 'mine\n'
    with pytest.raises(ValueError, match='another process is writing there'):
        here(tmp_path)
    other.communicate()
    assert len(here(tmp_path)) == 7


def test_an_error_that_nobody_expects_ends_the_run_and_its_workers(one, tmp_path):
    """Status 1, for torchrun to see, and no process that stays."""
    code = ('import runpy, sys, torch, losses\n'
            'def no_memory(*_, **__): raise torch.OutOfMemoryError("CUDA out of memory")\n'
            'losses.image_loss = no_memory\n'
            'sys.argv = sys.argv[1:]\n'
            'runpy.run_path(sys.argv[0], run_name="__main__")')
    command = [sys.executable, '-c', code, *pretraining(tmp_path / 'run', *one, '--workers', 2)[1:]]
    process = started(command, cwd=ROOT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and 'pretrain.py: out of memory; lower --micro_batch' in text


# ---- numbers that cannot be silently wrong ------------------------------------------------------------------------

def here(out, *flags):
    """A tiny run in this process, into which a fault can be planted."""
    old = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        pretrain.main(pretrain.parse(Config, [*TINY, '--out', str(out), *map(str, flags)], DEMO))
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), old):
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def test_the_same_seed_gives_the_same_log(one, whole, tmp_path):
    lines = here(tmp_path / 'run', *one, '--workers', 2)
    assert timeless(lines) == timeless(whole[2])


def test_a_loss_that_is_not_finite_names_the_term_and_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, 'adjacent_loss', lambda student, *_: student.sum() * math.nan)
    with pytest.raises(ValueError, match=r'step 0: not finite: total, slice of .*phantoms/\d{4}.npy'):
        here(tmp_path / 'run')
    assert not (tmp_path / 'run' / 'last.pt').exists()


class Infinite(torch.autograd.Function):
    """Forward 0, backward infinity."""

    @staticmethod
    def forward(ctx, x):
        return x.sum() * 0

    @staticmethod
    def backward(ctx, g):
        return torch.full((8, 32), math.inf)


def test_a_gradient_that_is_not_finite_names_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, 'koleo', lambda x, groups: Infinite.apply(x))
    with pytest.raises(ValueError, match=r"not finite: the gradient, over .*\d{4}.npy.*'grad_norm': nan"):
        here(tmp_path / 'run')


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(tmp_path, monkeypatch):
    schedules = pretrain.schedules
    monkeypatch.setattr(pretrain, 'schedules', lambda cfg, step: schedules(cfg, step) | (
        {'momentum': math.nan} if step == 5 else {}))       # a checkpoint comes before a line of the log
    with pytest.raises(ValueError, match='not finite in backbone.cls_token; the last checkpoint is good'):
        here(tmp_path / 'run', '--steps', 8, '--save_every', 3, '--log_every', 4)
    assert torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)['step'] == 3
    pretrain.inspect(vit.load(tmp_path / 'run' / 'last.pt').train(), vit.load(tmp_path / 'run' / 'last.pt')
                     .requires_grad_(False))


@pytest.mark.parametrize('plant, words', [
    (lambda student, teacher: teacher.requires_grad_(True), 'learns by itself'),
    (lambda student, teacher: setattr(teacher.backbone, 'cls_token', student.backbone.cls_token), 'learns by itself'),
    (lambda student, teacher: teacher.train(), 'in training mode')])
def test_a_teacher_that_trains_is_noticed(plant, words, tmp_path, monkeypatch):
    networks = pretrain.networks

    def planted(cfg, device):
        both = networks(cfg, device)
        plant(*both)
        return both

    monkeypatch.setattr(pretrain, 'networks', planted)
    with pytest.raises(ValueError, match=words):
        here(tmp_path / 'run')


def test_collapse_is_told_once_with_advice(tmp_path, capsys):
    """A network that does not see the image: every token and every target alike."""
    here(tmp_path / 'run', '--warmup', 0, '--lr', 1e-9, '--layerscale', 1e-5, '--teacher_temp', 10,
         '--teacher_temp_start', 10, '--student_temp', 1000)
    told = capsys.readouterr().err
    assert told.count('CLS tokens of different images are alike') == 1 and told.count('every image goes to all') == 1
    assert told.count('warning:') == 2


def test_a_teacher_that_knows_one_prototype_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(losses.Center, 'forward', lambda self, logits, temp: torch.softmax(
        logits.float() + 1e4 * (torch.arange(logits.shape[-1]) == 0), dim=-1))
    here(tmp_path / 'run', '--warmup', 0)
    assert capsys.readouterr().err.count('every image goes to one prototype') == 1


def test_crops_that_all_gave_up_their_tissue_are_told(tmp_path, capsys):
    lines = here(tmp_path / 'run', '--min_coverage', 1)
    assert lines[-1]['relaxed'] == 1 and capsys.readouterr().err.count('100% of the crops did not reach rho') == 1


def test_healthy_runs_are_told_nothing(whole, pair):
    assert 'warning:' not in whole[1] + pair[1]


# ---- hostile and broken input -------------------------------------------------------------------------------------

def test_prepare_names_the_file_whose_decoder_crashes_and_prepares_the_rest(tmp_path, monkeypatch):
    for i in range(6):
        Image.fromarray(phantom.breast(np.random.default_rng(i)).volume[0]).save(tmp_path / f'{i}.png')
    read = images.read

    def crash(path, frame=0):
        if path.endswith('3.png'):
            os.kill(os.getpid(), signal.SIGKILL)
        if path.endswith('0.png'):                          # still at work when the other dies
            time.sleep(0.5)
        return read(path, frame)

    monkeypatch.setattr(prepare, 'read', crash)                # handed on to the processes as they are forked
    out = tmp_path.parent / f'{tmp_path.name}-out'
    assert prepare.prepare(tmp_path, out, workers=3) == (5, 0, 1)
    assert '3.png,"the process died over it' in (out / 'rejected.csv').read_text()
    assert sorted(os.listdir(out)) == ['.lock', *(f'{i}.npy' for i in (0, 1, 2, 4, 5)), 'rejected.csv']


def test_prepare_on_a_full_disk_says_so_leaves_no_litter_and_goes_on_later(tmp_path):
    for i, size in enumerate((64, 64, 512)):
        Image.fromarray(phantom.breast(np.random.default_rng(i), height=size, width=size).volume[0]).save(
            tmp_path / f'{i}.png')
    out = tmp_path.parent / f'{tmp_path.name}-out'
    command = [sys.executable, ROOT / 'prepare.py', tmp_path, out, '--workers', '1']
    full = subprocess.run(command, capture_output=True, text=True, preexec_fn=at_most(100_000))
    assert full.returncode == 1 and 'cannot be written' in full.stderr and 'goes on from here' in full.stderr
    assert 'Traceback' not in full.stderr
    assert set(os.listdir(out)) <= {'.lock', '0.npy', '1.npy', 'rejected.csv'} and not list(out.glob('*.part'))
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and np.load(out / '2.npy').shape == (512, 512), again.stderr


def bombs(folder):
    """Small files that declare, or unpack to, far more than an image. -> {name: words of the refusal}"""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    def page(side, following):
        tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8), (277, 3, 1),
                (278, 4, side), (279, 4, 8)]
        return struct.pack('<H', 9) + b''.join(struct.pack('<HHII', tag, kind, 1, value) for tag, kind, value in tags) \
            + struct.pack('<I', following)

    (folder / 'bomb.png').write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 60_000, 60_000, 8, 0, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(bytes(60_000))) + chunk(b'IEND', b''))
    (folder / 'bomb.tif').write_bytes(struct.pack('<2sHI', b'II', 42, 8) + page(60_000, 0))
    (folder / 'pages.tif').write_bytes(struct.pack('<2sHI', b'II', 42, 8) + b''.join(
        page(1, 8 + len(page(1, 0)) * k) for k in range(1, images.MAX_PAGES + 2)))
    (folder / 'bomb.pgm').write_bytes(b'P5 60000 60000 255\n' + bytes(100))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr='|u1', fortran_order=False, shape=(60_000, 60_000)))
    (folder / 'bomb.npy').write_bytes(header.getvalue() + bytes(100))
    plain = dict(Rows=200, Columns=200, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0,
                 SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2')
    dicom(folder / 'deflated.dcm', uid.DeflatedExplicitVRLittleEndian, plain | dict(PixelData=bytes(3_000_000)))
    runs = struct.pack('<16L', 1, 64, *[0] * 14) + b'\x81\x07' * 20_000                 # 128 bytes out of two
    dicom(folder / 'rle.dcm', uid.RLELossless, plain | dict(PixelData=encapsulate([runs])))
    dicom(folder / 'rows.dcm', uid.ExplicitVRLittleEndian, plain | dict(Rows=60_000, Columns=60_000,
                                                                      PixelData=bytes(100)))
    pixels = '60000x60000 pixels, more than 1,000,000; the environment variable MAX_PIXELS'
    return {'bomb.png': 'more pixels than 1,000,000', 'bomb.tif': 'more pixels than 1,000,000', 'bomb.npy': pixels,
            'bomb.pgm': 'more pixels than 1,000,000', 'pages.tif': 'more than 4096 pages', 'rows.dcm': pixels,
            'deflated.dcm': 'unpacks to more than two bytes for each of 1,000,000',
            'rle.dcm': 'they unpack to more than the header declares'}


def dicom(path, syntax, elements):
    ds = pydicom.Dataset()
    ds.preamble, ds.file_meta = bytes(128), pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = '1.2.840.10008.5.1.4.1.1.1.2'
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = '1.2.3'
    for name, value in elements.items():
        setattr(ds, name, value)
    ds['PixelData'].VR = 'OB' if ds.BitsAllocated == 8 else 'OW'
    ds['PixelData'].is_undefined_length = syntax.is_encapsulated
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def test_decompression_bombs_are_refused_before_they_unpack(tmp_path):
    """Each in two seconds, all within 50 MiB; the limit, lowered to a million pixels here, can be set."""
    expected = bombs(tmp_path)
    assert all(os.path.getsize(tmp_path / name) < 1_000_000 for name in expected)
    code = ('import images, resource, sys, time\n'
            'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
            'for path in sys.argv[1:]:\n'
            '    start = time.process_time()\n'
            '    try: images.read(path)\n'
            '    except ValueError as error: print(error)\n'
            '    assert time.process_time() - start < 2, path\n'
            'assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024')
    done = subprocess.run([sys.executable, '-c', code, *(tmp_path / name for name in expected)], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {'MAX_PIXELS': '1000000'})
    assert done.returncode == 0, done.stderr
    for (name, words), line in zip(expected.items(), done.stdout.splitlines(), strict=True):
        assert f'{name}: ' in line and words in line, line


def test_archives_that_unpack_to_too_much_are_refused(tmp_path):
    """An .xlsx of labels, a checkpoint (see also test_vit.py), the index of a run."""
    with zipfile.ZipFile(tmp_path / 'bomb.xlsx', 'w', zipfile.ZIP_DEFLATED) as book:
        book.writestr('xl/workbook.xml', b' ' * 50_000_000)
    with pytest.raises(ValueError, match='bomb.xlsx: .*unpacks to more than the 8,000,000 bytes of finetune.MAX_SHEET'):
        finetune.table(tmp_path / 'bomb.xlsx')
    np.savez_compressed(tmp_path / 'index.npz', paths=np.zeros(50_000_000, np.uint8), counts=[1], written=[1])
    tracemalloc.start()
    assert pretrain.remembered(tmp_path / 'index.npz') == {}
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


SECRETS = dict(PatientName='Zaphod^Beeblebrox', PatientID='QX4711ZZ', PatientBirthDate='19520311',
               InstitutionName='Vogon General', AccessionNumber='ACC998877', ReferringPhysicianName='Marvin^Android',
               StudyDescription='Towelscreening', PatientAddress='Magrathea 42', StudyInstanceUID='1.9.8.7.6.54321',
               WindowCenterWidthExplanation='Heartofgold')


def test_no_header_value_is_written_anywhere(tmp_path, monkeypatch, capfd):
    """prepare, pretrain, finetune and detect over DICOM files with a patient in them, one of them damaged; then every
    byte of what they wrote, in archives and pictures too, and every word they said."""
    raw, out = tmp_path / 'raw', tmp_path / 'out'
    raw.mkdir()
    lines = ['path,patient,label,x0,y0,x1,y1,frame,split']
    for i in range(20):
        example = phantom.breast(np.random.default_rng(i), lesion=True, slices=2 if i == 0 else 1)
        dicom(raw / f'{i}.dcm', uid.ExplicitVRLittleEndian, SECRETS | dict(
            Rows=256, Columns=192, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, SamplesPerPixel=1,
            PhotometricInterpretation='MONOCHROME2', WindowCenter=128, WindowWidth=200, PatientAge='070Y',
            RescaleSlope='12345678', RescaleIntercept=0,
            NumberOfFrames=len(example.volume), PixelData=example.volume.tobytes()))
        z, *box = example.boxes[0]
        box = ','.join(f'{v:.1f}' for v in box)
        lines.append(f"{i}.dcm,p{i},{i % 2},{box},{int(z)},{('train', 'train', 'val', 'test')[i // 2 % 4]}")
    (raw / '19.dcm').write_bytes((raw / '19.dcm').read_bytes()[:-30_000])               # cut short
    (raw / '18.dcm').write_bytes((raw / '18.dcm').read_bytes().replace(b'12345678', b'QX4711ZZ'))   # no slope
    (raw / 'manifest.csv').write_text('\n'.join(lines) + '\n')
    (raw / 'lesions.csv').write_text('\n'.join(lines).replace('label', 'kind', 1) + '\n')

    prepare.prepare(raw, out / 'prepared', workers=1)
    here(out / 'run', '--data', raw, *SMALL, '--workers', 1, '--steps', 3)
    shared = ['--root', raw, '--encoder', out / 'run' / 'last.pt', '--workers', 0]
    run_here(finetune, '--dataset', 'csv', '--task', 'cancer', '--head', 'linear', '--epochs', 2, '--draws', 20,
             '--cache', out / 'cache', '--out', out / 'heads', *shared)
    run_here(detect, '--dataset', 'csv', '--epochs', 1, '--size', 84, '--channels', 32, '--batch', 4, '--draws', 20,
             '--min_distance', 10, '--max_bad', 1, '--out', out / 'boxes', *shared)
    monkeypatch.chdir(out)
    run_here(detect, 'predict', raw / '1.dcm', '--checkpoint', out / 'boxes', '--threshold', 0.001)
    run_here(finetune, 'predict', raw / '1.dcm', '--checkpoint', out / 'heads')

    told = capfd.readouterr()
    written = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    assert len(written) > 40
    for path in list(written):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as members:
                written |= {f'{path}/{name}': members.read(name) for name in members.namelist()}
        elif path.suffix == '.png':
            written[f'{path}/info'] = repr(Image.open(path).info).encode()
    written |= {'terminal': (told.out + told.err).encode(), 'names': '\n'.join(map(str, written)).encode()}
    for secret in {part for value in SECRETS.values() for part in value.split('^')}:
        found = [str(path) for path, data in written.items() if secret.encode() in data
                 or secret.encode('utf-16-le') in data]
        assert not found, (secret, found)


def test_nothing_is_written_outside_the_output_folder(tmp_path):
    """Names of files are those below the folder that was listed; links that go round end; a manifest may read outside
    its folder and call its patients what it likes."""
    src, root, out = tmp_path / 'src', tmp_path / 'a' / 'root', tmp_path / 'b' / 'out'
    (src / 'deep').mkdir(parents=True)
    root.mkdir(parents=True)
    for i in range(12):
        Image.fromarray(phantom.breast(np.random.default_rng(i)).volume[0]).save(src / 'deep' / f'{i}..png')
    os.symlink(src, src / 'deep' / 'round')
    os.symlink(tmp_path / 'a', src / 'up')
    (root / 'manifest.csv').write_text('path,patient,label\n' + ''.join(
        f'../../src/deep/{i}..png,../../../evil{i},{i % 2}\n' for i in range(12)))
    before = set(tmp_path.rglob('*'))
    assert prepare.prepare(src, out / 'prepared', workers=1) == (12, 0, 0)
    run_here(finetune, '--dataset', 'csv', '--root', root, '--task', 'cancer', '--head', 'knn', '--neighbours', 2,
             '--draws', 20, '--workers', 0, '--cache', out / 'cache', '--out', out / 'heads')
    new = {path for path in tmp_path.rglob('*') if path not in before and path not in out.parents}
    assert len(new) > 20 and all(path.is_relative_to(out) for path in new), new
    assert not list(tmp_path.parent.glob('*evil*'))


def test_a_few_hundred_damaged_files_of_every_kind_are_read_or_refused_in_one_line():
    done = subprocess.run([sys.executable, ROOT / 'tests' / 'fuzz.py', '--inputs', '600'], capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stdout.count('\n|') == 11, done.stdout + done.stderr
