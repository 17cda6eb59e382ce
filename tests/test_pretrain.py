"""pretrain.py: the recipe is the paper's, the stream is reproducible, and a run that is restarted is the same run."""
import csv
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import (ROOT, TIMING, TINY, family, here, kill, logged_steps, pretraining, reached, run, same_run,
                      started, timeless)
from tqdm import tqdm

import losses
import phantom
import pretrain
import vit
from pretrain import DEMO, SMALL, Config, Slices
from run import parse

FILMS = ('--size', 84, '--local_size', 42, '--locals', 2, '--hidden', 64, '--bottleneck', 16, '--freeze_last_layer', 0,
         '--teacher_temp_steps', 0)


def breasts(n):
    """Volumes; 0, 3, ... have 8 slices."""
    return (phantom.breast(np.random.default_rng(i), slices=8 if i % 3 == 0 else 1).volume for i in range(n))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A prepared folder: four volumes of 8 slices and six mammograms."""
    where = tmp_path_factory.mktemp('data') / 'prepared'
    phantom.dataset(where, breasts(10))
    return where


@pytest.fixture(scope='module')
def one(folder):
    """Flags of a run of one rank over that folder."""
    return ('--data', folder, *FILMS, '--workers', 0, '--drop_path', 0.2, '--layerscale', 1)


@pytest.fixture(scope='module')
def two(one):
    """The same for two ranks, with data workers, accumulation and bf16."""
    return (*one, '--workers', 1, '--micro_batch', 2, '--amp')


@pytest.fixture(scope='module')
def whole(one, tmp_path_factory):
    """A run that nothing happened to: its folder, output and log."""
    out = tmp_path_factory.mktemp('whole') / 'run'
    return out, *run(out, *one)


@pytest.fixture(scope='module')
def pair(two, tmp_path_factory):
    """One of two ranks."""
    out = tmp_path_factory.mktemp('pair') / 'run'
    return out, *run(out, *two, ranks=2)


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    """Six steps of the demo under torchrun."""
    out = tmp_path_factory.mktemp('demo') / 'run'
    return out, *run(out, '--keep_every', 3, '--test_phantoms', 24, torchrun=())


def slices(folder, **changes):
    return Slices(Config(**DEMO | dict(volume_items=False) | changes), folder)


# ---- the recipe ---------------------------------------------------------------------------------------------------

def test_the_defaults_are_the_numbers_of_the_papers():
    cfg = Config()
    for name, value in dict(size=518, patch=14, width=768, depth=12, heads=12, steps=300_000, batch=128, wd=0.04,
                            wd_end=0.20, kernel=9, d_max=4,                                         # MammoDINO
                            local_size=196, global_scale=(0.5, 1.0), local_scale=(0.2, 0.5),        # DBT-DINO 6.1
                            locals=8, prototypes=65_536, hidden=2048, bottleneck=256, student_temp=0.1,
                            teacher_temp=0.07, teacher_temp_start=0.04, teacher_temp_steps=37_500, momentum=0.992,
                            center_momentum=0.9, lr=0.004, lr_end=1e-6, warmup=12_500, layer_decay=0.9, clip=3.0,
                            freeze_last_layer=1250, drop_path=0.3, layerscale=1e-5, mask_prob=0.5,
                            mask_ratio=(0.1, 0.5), mask_min=4, koleo_weight=0.1).items():           # DINOv2
        assert getattr(cfg, name) == value, name
    assert 8 * cfg.micro_batch == cfg.batch                                                         # 8 GPUs
    for f in fields(Config):
        assert f.metadata['source'].split()[0] in ('paper', 'dbt-dino', 'dinov2', 'ours'), f.name
        assert f.metadata['help'], f.name


def test_schedules_follow_dinov2():
    cfg = Config()
    assert pretrain.schedules(cfg, 0)['lr'] == 0
    for step in (12_499, 12_500):
        assert pretrain.schedules(cfg, step)['lr'] == pytest.approx(1.414e-3, rel=1e-3)
    for name, first, last in [('wd', 0.04, 0.20), ('momentum', 0.992, 1.0), ('teacher_temp', 0.04, 0.07)]:
        assert pretrain.schedules(cfg, 0)[name] == pytest.approx(first)
        assert pretrain.schedules(cfg, 299_999)[name] == pytest.approx(last, abs=1e-6)
    assert pretrain.schedules(cfg, 18_750)['teacher_temp'] == pytest.approx(0.055)


def test_without_data_it_is_the_demo_and_small_is_its_network_on_your_data():
    assert parse(Config, [], pretrain.defaults).out == 'runs/demo'
    flags = ['--data', 'x', '--local_scale', '0.1', '0.3', '--percentile', '40', '--no-resume']
    assert parse(Config, flags, pretrain.defaults) == Config(data='x', local_scale=(0.1, 0.3), percentile=40.0)
    small = parse(Config, ['--data', 'x', '--small', '--steps', '500', '--width', '64'], pretrain.defaults)
    assert (small.size, small.depth, small.width, small.global_scale) == (84, 4, 64, (0.5, 1.0))
    pretrain.check(small, 1)
    assert small.warmup == 50 and set(SMALL) | set(DEMO) <= {f.name for f in fields(Config)}


@pytest.mark.parametrize('flags, words', [
    (['--batch', '30', '--micro_batch', '16'], 'does not divide into 1 ranks x --micro_batch 16'),
    (['--size', '500'], 'must be multiples of --patch 14'),
    (['--steps', '1000'],
     '--steps 1000 must exceed --warmup 12500, --freeze_last_layer 1250, --teacher_temp_steps 37500')])
def test_what_cannot_work_is_refused_at_once(flags, words):
    with pytest.raises(ValueError, match=words):
        pretrain.check(parse(Config, ['--data', 'x', *flags], pretrain.defaults), 1)


# ---- the stream ---------------------------------------------------------------------------------------------------

def test_the_order_of_an_epoch_is_a_permutation():
    orders = [pretrain.epoch_order(*key, 1000).tolist() for key in [(0, 0), (0, 1), (1, 0)]]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_stream_depends_on_neither_ranks_nor_accumulation():
    cfg = Config(batch=24, steps=3)
    assert [i for part in pretrain.micro_batches(cfg, 0, 0, 1, 1) for i in part] == list(range(72))
    for ranks, accumulate in [(1, 3), (2, 2), (4, 3)]:
        parts = [list(pretrain.micro_batches(cfg, 1, rank, ranks, accumulate)) for rank in range(ranks)]
        stream = [i for step in range(2 * accumulate) for rank in range(ranks) for i in parts[rank][step]]
        assert stream == list(range(24, 72))


def test_a_sample_is_a_function_of_seed_epoch_and_index(folder):
    data, n = slices(folder), 4 * 8 + 6
    assert len(data) == n and len(slices(folder, volume_items=True)) == 10
    a, b, c = data[3], slices(folder)[3], data[3 + n]
    for name in ('globals', 'locals', 'masks', 'pair'):
        np.testing.assert_array_equal(a[name], b[name])
    assert not np.array_equal(a['globals'], c['globals'])
    assert sorted(data[i]['file'] for i in range(n)) == sorted([0, 3, 6, 9] * 8 + [1, 2, 4, 5, 7, 8])


def test_volumes_bring_a_pair_and_mammograms_none(folder):
    for data, weight in [(slices(folder), 1), (slices(folder, slice_weight=0.0), 0)]:
        for i in range(12):
            assert data[i]['pair'].shape == (weight * (data[i]['file'] % 3 == 0), 2, 84, 84)


def test_half_of_the_global_crops_have_a_mask_of_a_tenth_to_a_half(folder):
    masked = [m.sum() for i in range(60) for m in slices(folder, seed=i)[0]['masks']]
    share = np.mean([m > 0 for m in masked])                            # of 120 coins: sd .046, false alarm 1e-5
    assert 0.3 < share < 0.7 and {m for m in masked if m} <= set(range(4, 19))


def test_blind_crops_and_blind_masks_are_two_arms_and_pairs_stay_on_tissue(folder, monkeypatch):
    views, patch_mask, pair_views = (getattr(pretrain.sampler, f) for f in ('views', 'patch_mask', 'pair_views'))
    monkeypatch.setattr(pretrain.sampler, 'views', lambda *a, **k: seen.append(k['placement'].all()) or views(*a, **k))
    monkeypatch.setattr(pretrain.sampler, 'patch_mask',
                        lambda rng, grid, *a, **k: grids.append(grid) or patch_mask(rng, grid, *a, **k))
    monkeypatch.setattr(pretrain.sampler, 'pair_views', lambda *a, **k: pairs.append(a[3].all()) or pair_views(*a, **k))
    for crops, masks in [(False, False), (True, False), (False, True), (True, True)]:
        seen, grids, pairs = [], [], []
        data = slices(folder, blind_crops=crops, blind_masks=masks)
        for i in range(5):
            data.sample(np.random.default_rng(i), 0, 3)                 # a slice of a volume
        assert seen == [crops] * 5 and (np.array(grids) == 1).all() == masks and pairs == [False] * 5


def test_a_folder_that_was_not_prepared_is_refused_with_the_command_and_leaves_no_trace(folder, tmp_path):
    raw = tmp_path / 'raw'
    raw.mkdir()
    with pytest.raises(ValueError, match='raw has no index.csv; first python prepare.py RAW PREPARED'):
        here(tmp_path / 'run', '--data', raw, *FILMS)
    with pytest.raises(ValueError, match='10 of 10 images are smaller than --local_size 196; lower it'):
        here(tmp_path / 'run', '--data', folder, '--freeze_last_layer', 0, '--teacher_temp_steps', 0)
    assert not (tmp_path / 'run').exists()


def test_a_damaged_index_or_array_is_named(folder, tmp_path):
    prepared = pathlib.Path(shutil.copytree(folder, tmp_path / 'prepared'))
    data = Slices(Config(**DEMO), prepared)
    for damaged in (b'', b'text', next(prepared.rglob('*.npy')).read_bytes()[:200]):
        path = prepared / os.fsdecode(data.paths[0])
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f'{re.escape(str(path))}: .*; delete it and run prepare.py again'):
            data.load(0, 0)
    for text in ('', 'path,slices\na.npy,1\n', 'path,slices,height,width\na.npy,0,99,99\na.npy,one,99,99\n'):
        (prepared / 'index.csv').write_text(text)
        with pytest.raises(ValueError, match='index.csv lists no images as prepare.py does'):
            Slices(Config(**DEMO), prepared)


def test_a_data_worker_has_one_thread(folder):
    class Threads(Slices):
        def __getitem__(self, i):
            super().__getitem__(i)
            return torch.get_num_threads()

    data = Threads(Config(**DEMO), folder)
    assert set(torch.utils.data.DataLoader(data, batch_size=None, sampler=range(4), num_workers=2)) == {1}


# ---- student and teacher ------------------------------------------------------------------------------------------

def test_student_and_teacher_start_alike_and_only_the_student_learns():
    student, teacher = pretrain.networks(Config(**DEMO | dict(drop_path=0.2)), torch.device('cpu'))
    for a, b in zip(student.parameters(), teacher.parameters()):
        assert torch.equal(a, b) and a.requires_grad and not b.requires_grad
    assert teacher.backbone.blocks[0].drop_path == 0 and student.backbone.blocks[0].drop_path == 0.2
    assert student.training and not teacher.training


def test_init_takes_the_encoder_of_a_file_at_any_size_and_refuses_another_shape(tmp_path):
    torch.manual_seed(5)
    given = vit.ViT(size=84, width=128, depth=4, heads=2, channels=3, offset=0.1, antialias=False).eval()
    torch.save(given.state_dict(), tmp_path / 'official.pth')
    cfg = Config(**DEMO | dict(init=str(tmp_path / 'official.pth'), heads=2))
    for network in pretrain.networks(cfg, torch.device('cpu')):
        assert torch.equal(network.backbone.pos_embed, given.pos_embed) and network.backbone.offset == 0.1
    cfg.size, grey = 112, vit.load(cfg.init)
    larger = pretrain.networks(cfg, torch.device('cpu'))[1].backbone
    x = torch.rand(2, 1, 112, 112)
    torch.testing.assert_close(larger(x), grey(x))                      # positions interpolated once, or each time
    cfg.imagenet = False                                                # as DBT-DINO's file
    bias = pretrain.networks(cfg, torch.device('cpu'))[1].backbone.patch_embed['proj'].bias
    assert torch.equal(bias, given.patch_embed['proj'].bias)
    cfg.width = 64
    with pytest.raises(ValueError, match='another encoder; it takes --width 128'):
        pretrain.networks(cfg, torch.device('cpu'))


# ---- whole runs ---------------------------------------------------------------------------------------------------

def test_the_demo_runs_under_torchrun_and_leaves_what_it_promises(demo):
    out, text, lines = demo
    assert '9 files, 3 of them volumes, 30 slices' in text and 'steps 0 to 6 of 8 images = 1 ranks x 8 x 1' in text
    assert 'trained - random init' in text and f'python vit.py IMAGE {out}/last.pt' in text
    for name in ('last.pt', 'step_000003.pt', 'step_000006.pt', 'report.json', 'views.png', 'attention.png'):
        assert (out / name).exists(), name
    assert lines[0]['config']['prototypes'] == 32 and [line['step'] for line in lines[1:]] == list(range(6))
    for line in lines[1:]:
        assert {'lr', 'wd', 'momentum', 'teacher_temp', 'grad_norm', 'cls_spread', 'effective_rank', 'relaxed',
                'masks_relaxed', *TIMING} <= set(line)
        total = line['image'] + line['patch'] + 0.1 * line['slice'] + 0.1 * line['koleo']
        assert line['total'] == pytest.approx(total, rel=1e-5)
        assert line['kl'] >= 0 and 0 <= line['teacher_entropy'] <= math.log(32) + 1e-6
    assert lines[-1]['slice'] > 0
    state = torch.load(out / 'last.pt', weights_only=True)
    assert state['step'] == 6
    assert torch.equal(vit.load(out / 'last.pt').pos_embed, state['teacher']['backbone.pos_embed'])


def test_the_teacher_is_the_moving_average_of_the_student(demo):
    early, late = (torch.load(demo[0] / f'step_00000{k}.pt', weights_only=True) for k in (3, 6))
    cfg, name = Config(**demo[2][0]['config']), 'backbone.blocks.1.mlp.fc1.weight'
    kept = math.prod(pretrain.schedules(cfg, step)['momentum'] for step in (3, 4, 5))
    drift = late['teacher'][name] - kept * early['teacher'][name]
    towards = (1 - kept) * late['student'][name]
    assert drift.norm() > 0 and (drift - towards).norm() < 0.2 * towards.norm()


def test_two_ranks_give_the_losses_the_gradient_and_the_update_of_one(tmp_path):
    """Half the batch each, drop_path 0: every term, KoLeo and pairs included; Adam's first moment, which is the
    gradient; where the weights of both networks and the centres go."""
    runs = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        _, lines = run(out, '--steps', 3, '--warmup', 0, '--keep_every', 1, ranks=ranks)
        runs.append([torch.load(out / f'step_00000{k}.pt', weights_only=True) | {'line': lines[k]} for k in (1, 2, 3)])
    for a, b in zip(*runs):
        for name in ('image', 'patch', 'slice', 'koleo', 'total', 'grad_norm'):
            assert a['line'][name] == pytest.approx(b['line'][name], rel=2e-3, abs=1e-4), name
        moments = [{i: s['exp_avg'] for i, s in state['optimizer']['state'].items()} for state in (a, b)]
        for ours, theirs in (moments, *((a[part], b[part]) for part in ('student', 'teacher', 'center'))):
            for name in ours:
                assert (ours[name] - theirs[name]).norm() <= 5e-3 * ours[name].norm() + 1e-6, name
    assert not torch.equal(*(runs[0][k]['student']['backbone.pos_embed'] for k in (0, 2)))


def test_accumulation_moves_everything_once_per_step(tmp_path):
    """Four micro-batches of two: the same losses but for KoLeo, whose group is the micro-batch; the same centres."""
    ends = []
    for name, micro in (('a', 8), ('b', 2)):
        _, lines = run(tmp_path / name, '--koleo_weight', 0, '--micro_batch', micro, '--steps', 3)
        ends.append((lines[1:], torch.load(tmp_path / name / 'last.pt', weights_only=True)['center']))
    for ours, theirs in zip(ends[0][0], ends[1][0]):
        for name in ('image', 'patch', 'slice', 'grad_norm', 'momentum'):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-4), (ours['step'], name)
    for name, center in ends[0][1].items():
        torch.testing.assert_close(center, ends[1][1][name], rtol=2e-3, atol=1e-4)


def test_compiled_blocks_give_the_same_losses(tmp_path, monkeypatch):
    """Traced by torch.compile, but without a compiler, which not every machine has."""
    plain = here(tmp_path / 'plain', '--steps', 2)
    compiled, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **how: compiled.append(how) or real(
        self, backend='eager', **how))
    lines = here(tmp_path / 'compiled', '--steps', 2, '--compile')
    assert compiled == [dict(dynamic=True)] * 4
    assert lines[-1]['total'] == pytest.approx(plain[-1]['total'], rel=1e-4)
    assert set(vit.load(tmp_path / 'compiled' / 'last.pt').state_dict()) == set(vit.load(tmp_path / 'plain' / 'last.pt')
                                                                                .state_dict())


def test_a_finished_run_is_not_overwritten_and_mammograms_alone_have_no_pairs(folder, tmp_path):
    films = tmp_path / 'films'
    shutil.copytree(folder, films)
    with open(films / 'index.csv', newline='') as file:
        rows = [row for row in csv.reader(file) if row[1] != '8']
    with open(films / 'index.csv', 'w', newline='') as file:
        csv.writer(file).writerows(rows)
    flags = ['--data', films, '--workers', 2, *FILMS, '--steps', 2, '--warmup', 1, '--amp']
    text, lines = run(tmp_path / 'run', *flags)
    assert len(lines) == 3 and all(math.isfinite(line['total']) and line['slice'] == 0 for line in lines[1:])
    assert 'no volume among them: L_DINO-adj has nothing to learn from' in text
    for again in (flags, ()):                                           # the same run, and a demo by a forgotten --data
        text, lines = run(tmp_path / 'run', *again, ok=False)
        assert 'holds a run; add --resume' in text and len(lines) == 3


def test_two_nodes_are_two_ranks(tmp_path):
    """Two torchrun agents that find each other over loopback: the same log as one agent's two ranks."""
    _, lines = run(tmp_path / 'one', '--steps', 3, ranks=2)
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--nproc-per-node', '1', '--rdzv-id',
               'x', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{port}', str(ROOT / 'pretrain.py'), *TINY,
               '--steps', '3', '--out', str(tmp_path / 'two')]
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    texts = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    two = [json.loads(line) for line in (tmp_path / 'two' / 'log.jsonl').read_text().splitlines()]
    assert timeless(two) == timeless(lines)


# ---- what happens to runs: each must go on bit for bit -------------------------------------------------------------

@pytest.mark.parametrize('after', [2, 4])
def test_a_killed_run_goes_on_bit_for_bit(after, one, whole, tmp_path):
    out, flags = tmp_path / 'run', (*one, '--workers', 2, '--save_every', 3, '--resume')
    process = started(pretraining(out, *flags))
    if after == 2:                                          # before the first checkpoint
        assert kill(process, lambda: logged_steps(out) >= 2)
    else:                                                   # its data workers are still there when it goes on
        assert reached(process, lambda: logged_steps(out) >= 4)
        process.kill()
        process.wait()
    run(out, *flags)
    same_run(whole[0], out)


def test_a_finished_run_that_is_resumed_is_left_as_it_is(one, whole, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(whole[0], out)
    run(out, *one, '--resume')
    same_run(whole[0], out)


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_bit_for_bit(two, pair, tmp_path):
    """Two ranks with workers, accumulation and bf16; at the second checkpoint, so that there is a first."""
    out, flags = tmp_path / 'run', (*two, '--save_every', 2, '--keep_every', 4, '--resume')
    assert kill(started(pretraining(out, *flags, ranks=2)), lambda: (out / 'last.pt').exists()
                and ((out / 'last.pt.part').exists() or (out / 'step_000004.pt.part').exists()))
    run(out, *flags, ranks=2)
    same_run(pair[0], out)
    assert (out / 'step_000004.pt').exists() and not list(out.glob('*.part'))


@pytest.mark.parametrize('whom', ['rank', 'data worker'])
def test_a_process_that_dies_is_restarted_by_torchrun_and_the_result_is_the_same(whom, two, pair, tmp_path):
    out = tmp_path / 'run'
    flags = (*two, '--save_every', 2, '--resume')
    process = started(pretraining(out, *flags, ranks=2, torchrun=('--max-restarts', '1')))
    assert reached(process, lambda: logged_steps(out) >= 3)
    children = [pid for pid in family(process.pid) if pid != process.pid]
    ranks = [pid for pid in children if all(pid not in family(other) for other in children if other != pid)]
    os.kill(random.choice(ranks if whom == 'rank' else [pid for pid in children if pid not in ranks]), signal.SIGKILL)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    same_run(pair[0], out)


@pytest.mark.parametrize('whom', ['torchrun', 'everyone'])
def test_sigterm_saves_within_a_step_and_the_run_goes_on_bit_for_bit(whom, two, pair, tmp_path):
    """A scheduler sends it to torchrun, which passes it on, or to every process of the job, data workers too."""
    out = tmp_path / 'run'
    process = started(pretraining(out, *two, ranks=2))
    assert reached(process, lambda: logged_steps(out) >= 2)
    before = logged_steps(out)
    for pid in family(process.pid) if whom == 'everyone' else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    step = torch.load(out / 'last.pt', weights_only=True)['step']
    assert before <= step <= before + 2 and f'stopped after step {step - 1}, as asked' in text, text
    run(out, *two, '--resume', ranks=2)
    same_run(pair[0], out)


def test_ctrl_c_ends_a_single_process_with_status_0_and_the_run_goes_on_bit_for_bit(one, whole, tmp_path):
    out = tmp_path / 'run'
    process = started(pretraining(out, *one), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert reached(process, lambda: logged_steps(out) >= 2)
    process.send_signal(signal.SIGINT)
    assert 'as asked; the same command with --resume goes on' in process.communicate()[0] and process.returncode == 0
    run(out, *one, '--resume')
    same_run(whole[0], out)


def test_a_full_disk_ends_a_run_in_words_and_leaves_the_last_checkpoint(one, whole, tmp_path):
    out, flags = tmp_path / 'run', (*one, '--save_every', 2)
    assert kill(started(pretraining(out, *flags)), lambda: logged_steps(out) >= 4)
    good = (out / 'last.pt').read_bytes()
    text, _ = run(out, *flags, '--resume', ok=False,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert 'last.pt cannot be written' in text and 'is the disk full' in text and 'Traceback' not in text
    assert (out / 'last.pt').read_bytes() == good and not list(out.glob('*.part'))
    run(out, *flags, '--resume')
    same_run(whole[0], out)


def test_a_run_resumed_on_other_ranks_and_workers_has_the_losses_of_one(demo, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(demo[0], out)
    shutil.copy(out / 'step_000003.pt', out / 'last.pt')
    _, lines = run(out, '--keep_every', 3, '--micro_batch', 4, '--workers', 1, '--resume', ranks=2)
    for ours, theirs in zip(lines[4:], demo[2][4:], strict=True):
        for term in ('image', 'patch', 'slice', 'koleo', 'total', 'grad_norm'):
            assert ours[term] == pytest.approx(theirs[term], rel=2e-3, abs=1e-4), (ours['step'], term)


def test_another_recipe_other_files_and_a_damaged_checkpoint_are_refused_by_name(folder, one, whole, tmp_path):
    out, other = tmp_path / 'run', tmp_path / 'other'
    shutil.copytree(whole[0], out)
    before = (out / 'last.pt').read_bytes()
    with pytest.raises(ValueError, match='is another run: --lr 0.004 -> 0.1; choose another --out'):
        here(out, *one, '--resume', '--lr', 0.1)
    phantom.dataset(other, breasts(11))
    with pytest.raises(ValueError, match='is another run: other files'):
        here(out, *one, '--resume', '--data', other)
    assert (out / 'last.pt').read_bytes() == before
    (out / 'last.pt').write_bytes(before[:-5000])
    with pytest.raises(ValueError, match='last.pt: not a checkpoint, or a damaged one'):
        here(out, *one, '--resume')


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    code = 'import run, sys; held = run.lock(sys.argv[1]); print("mine", flush=True); sys.stdin.read()'
    other = subprocess.Popen([sys.executable, '-c', code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             cwd=ROOT, text=True)
    assert other.stdout.readline() == 'mine\n'
    with pytest.raises(ValueError, match='another process writes there'):
        here(tmp_path)
    other.communicate()
    assert len(here(tmp_path)) == 7


# ---- numbers that cannot be silently wrong ------------------------------------------------------------------------

def test_the_same_seed_gives_the_same_log_whatever_the_workers(one, whole, tmp_path):
    assert timeless(here(tmp_path / 'run', *one, '--workers', 2)) == timeless(whole[2])


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, 'adjacent_loss', lambda student, *_: student.sum() * math.nan)
    with pytest.raises(ValueError, match="not finite: {'step': 0, .*'slice': nan.*lower --lr"):
        here(tmp_path / 'run')
    assert not (tmp_path / 'run' / 'last.pt').exists()


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(tmp_path, monkeypatch):
    schedules = pretrain.schedules
    monkeypatch.setattr(pretrain, 'schedules', lambda cfg, step: schedules(cfg, step) | (
        {'momentum': math.nan} if step == 5 else {}))
    with pytest.raises(ValueError, match='step 6: weights that are not finite'):
        here(tmp_path / 'run', '--steps', 6, '--save_every', 3)
    assert torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)['step'] == 3


def test_collapse_is_warned_of_once_and_healthy_runs_are_not(whole, pair, tmp_path, capsys):
    """A network that does not see the image: every token and every target alike."""
    here(tmp_path / 'run', '--lr', 1e-9, '--layerscale', 1e-5, '--teacher_temp', 10, '--teacher_temp_start', 10,
         '--student_temp', 1000, '--min_coverage', 1)
    said = capsys.readouterr().err
    assert said.count('CLS tokens of all images are alike') == said.count('every image goes to all') == 1
    assert said.count('most crops did not reach rho') == 1 and said.count('warning:') == 3
    assert 'warning:' not in whole[1] + pair[1]
    cfg, line = pretrain.Config(), dict.fromkeys(('total', 'image', 'patch', 'slice', 'koleo', 'relaxed'), 0.0)
    for kl in (0.4, 0.2):                                   # what too large a rate leaves of a teacher
        line |= dict(step=cfg.steps, kl=kl, teacher_entropy=0.9 * math.log(cfg.prototypes), cls_spread=0.9)
        pretrain.write_log(cfg, open(tmp_path / 'log', 'a'), tqdm(disable=True), line)
        assert ('a lower --lr may read better' in capsys.readouterr().err) == (kl == 0.2)
