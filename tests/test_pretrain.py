"""pretrain.py: the recipe is the paper's, the stream is reproducible, and a run that is restarted is the same run."""
import itertools
import json
import math
import os
import resource
import shutil
import signal
import socket
from dataclasses import fields
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import (TIMING, family, here, kill, logged_steps, pretraining, reached, run, same_run, started,
                      timeless)

import losses
import phantom
import pretrain
import sampler
import vit
from pretrain import DEMO, Config, Slices
from run import parse

FILMS = ('--size', 84, '--local_size', 42, '--locals', 2, '--hidden', 64, '--bottleneck', 16, '--freeze_last_layer', 0,
         '--teacher_temp_steps', 0)
ONE = (*FILMS, '--workers', 0, '--drop_path', 0.2, '--layerscale', 1)
TWO = (*ONE, '--workers', 1, '--micro_batch', 2, '--amp')
THREE_STEPS = ('--steps', 3, '--warmup', 0, '--keep_every', 1)
TERMS = ('image', 'patch', 'slice', 'koleo', 'total', 'grad_norm')
CPU = torch.device('cpu')


def breasts(n):
    """n images, of which every third is a volume of 8 slices."""
    for i in range(n):
        yield phantom.breast(np.random.default_rng(i), slices=8 if i % 3 == 0 else 1).volume


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A prepared folder: four volumes of 8 slices and six mammograms."""
    where = tmp_path_factory.mktemp('data') / 'prepared'
    phantom.dataset(where, breasts(10))
    return where


def undisturbed(folder, out, *flags, ranks):
    """A run that nothing happened to -> its flags and folder."""
    flags = '--data', folder, *flags
    text, _ = run(out, *flags, ranks=ranks)
    assert 'warning:' not in text
    return flags, out


@pytest.fixture(scope='module')
def whole(folder, tmp_path_factory):
    """One of plain python."""
    return undisturbed(folder, tmp_path_factory.mktemp('whole') / 'run', *ONE, ranks=1)


@pytest.fixture(scope='module')
def pair(folder, tmp_path_factory):
    """One of two ranks, with data workers, accumulation and bf16."""
    return undisturbed(folder, tmp_path_factory.mktemp('pair') / 'run', *TWO, ranks=2)


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    """Six steps of the demo under torchrun: folder, output and log."""
    out = tmp_path_factory.mktemp('demo') / 'run'
    return out, *run(out, '--keep_every', 1, '--test_phantoms', 24, torchrun=())


def slices(folder, **changes):
    return Slices(Config(**DEMO | dict(volume_items=False) | changes), folder)


def kept(out, step):
    return torch.load(out / f'step_{step:06d}.pt', weights_only=True)


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
    for f in fields(Config):
        assert f.metadata['source'].split()[0] in ('paper', 'dbt-dino', 'dinov2', 'ours'), f.name


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
    pretrain.accumulation_steps(small, ranks=1)
    assert small.warmup == 50


def test_a_demo_replaces_a_demo_but_never_a_run_on_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = tmp_path / DEMO['out'] / 'log.jsonl'
    log.parent.mkdir(parents=True)
    demo = parse(Config, [], pretrain.defaults)
    log.write_text('{"config": {"data": null}}\n')
    assert pretrain.accumulation_steps(demo, 1) == 1
    log.write_text('{"config": {"data": "prepared"}}\n')
    with pytest.raises(ValueError, match='holds a run; add --resume'):
        pretrain.accumulation_steps(demo, 1)


# ---- the stream ---------------------------------------------------------------------------------------------------

def test_the_stream_depends_on_neither_ranks_nor_accumulation():
    cfg = Config(batch=24, steps=3)
    for ranks, accumulate in [(1, 1), (1, 3), (2, 2), (4, 3)]:
        parts = [list(pretrain.micro_batches(cfg, 1, rank, ranks, accumulate)) for rank in range(ranks)]
        stream = [i for step in range(2 * accumulate) for rank in range(ranks) for i in parts[rank][step]]
        assert stream == list(range(24, 72))


def test_a_sample_is_a_function_of_seed_epoch_and_index(folder):
    """An epoch has every slice once, in an order of its own, and its own views of it."""
    data, n = slices(folder), 4 * 8 + 6
    assert len(data) == n and len(slices(folder, volume_items=True)) == 10
    first, second, other = (pretrain.epoch_order(*key, n).tolist() for key in [(0, 0), (0, 1), (1, 0)])
    assert sorted(first) == sorted(second) == sorted(other) == list(range(n))
    assert first != second != other != first
    assert sorted(data[i]['file'] for i in range(n)) == sorted([0, 3, 6, 9] * 8 + [1, 2, 4, 5, 7, 8])
    a, again, later = data[3], slices(folder)[3], data[n + second.index(first[3])]
    for name in ('globals', 'locals', 'masks', 'pair'):
        np.testing.assert_array_equal(a[name], again[name])
    assert a['file'] == later['file'] and not np.array_equal(a['globals'], later['globals'])


def test_volumes_bring_a_pair_and_mammograms_none(folder):
    for data, weight in [(slices(folder), 1), (slices(folder, slice_weight=0.0), 0)]:
        for i in range(12):
            assert data[i]['pair'].shape == (weight * (data[i]['file'] % 3 == 0), 2, 84, 84)


def test_half_of_the_global_crops_have_a_mask_of_a_tenth_to_a_half(folder):
    masked = [m.sum() for i in range(60) for m in slices(folder, seed=i)[0]['masks']]
    share = np.mean([m > 0 for m in masked])                            # of 120 coins: sd .046, false alarm 1e-5
    assert 0.3 < share < 0.7 and {m for m in masked if m} <= set(range(4, 19))


def test_blind_crops_and_blind_masks_are_two_arms_and_pairs_stay_on_tissue(folder, monkeypatch):
    calls = {name: mock.Mock(wraps=getattr(sampler, name)) for name in ('views', 'patch_mask', 'pair_views')}
    for name, call in calls.items():
        monkeypatch.setattr(sampler, name, call)
    for crops, masks in itertools.product((False, True), repeat=2):
        data = slices(folder, blind_crops=crops, blind_masks=masks)
        for call in calls.values():
            call.reset_mock()
        for seed in range(5):
            data.sample(np.random.default_rng(seed), file=0, k=3)
        assert {call.kwargs['placement'].all() for call in calls['views'].call_args_list} == {crops}
        assert all((call.args[1] == 1).all() for call in calls['patch_mask'].call_args_list) == masks
        assert not any(call.args[3].all() for call in calls['pair_views'].call_args_list)


def test_a_folder_that_was_not_prepared_is_refused_with_the_command_and_leaves_no_trace(folder, tmp_path):
    (tmp_path / 'raw').mkdir()
    with pytest.raises(ValueError, match='raw has no index.csv; first python prepare.py RAW PREPARED'):
        here(tmp_path / 'run', '--data', tmp_path / 'raw', *FILMS)
    with pytest.raises(ValueError, match='10 of 10 images are smaller than --local_size 196; lower it'):
        here(tmp_path / 'run', '--data', folder, '--freeze_last_layer', 0, '--teacher_temp_steps', 0)
    assert not (tmp_path / 'run').exists()


# ---- student and teacher ------------------------------------------------------------------------------------------

def test_student_and_teacher_start_alike_and_only_the_student_learns():
    student, teacher = pretrain.networks(Config(**DEMO | dict(drop_path=0.2)), CPU)
    for a, b in zip(student.parameters(), teacher.parameters()):
        assert torch.equal(a, b) and a.requires_grad and not b.requires_grad
    assert teacher.backbone.blocks[0].drop_path == 0 and student.backbone.blocks[0].drop_path == 0.2
    assert student.training and not teacher.training


def test_init_takes_the_encoder_of_a_file_at_any_size(tmp_path):
    torch.manual_seed(5)
    given = vit.ViT(size=84, width=128, depth=4, heads=2, channels=3, offset=0.1, antialias=False).eval()
    torch.save(given.state_dict(), tmp_path / 'official.pth')
    cfg, x = Config(**DEMO | dict(init=str(tmp_path / 'official.pth'), heads=2)), torch.rand(2, 1, 112, 112)
    grey = vit.load(cfg.init)
    for cfg.size in (84, 112):                              # positions interpolated once, or each time
        torch.testing.assert_close(pretrain.networks(cfg, CPU)[1].backbone(x), grey(x))
    cfg.imagenet = False                                    # as DBT-DINO's file
    bias = pretrain.networks(cfg, CPU)[0].backbone.patch_embed['proj'].bias
    assert torch.equal(bias, given.patch_embed['proj'].bias)


# ---- whole runs ---------------------------------------------------------------------------------------------------

def test_the_demo_runs_under_torchrun_and_leaves_what_it_promises(demo):
    out, text, lines = demo
    assert '9 files, 3 of them volumes, 30 slices' in text and 'steps 0 to 6 of 8 images = 1 ranks x 8 x 1' in text
    assert 'trained - random init' in text and f'python vit.py IMAGE {out}/last.pt' in text
    for name in ('last.pt', 'report.json', 'views.png', 'attention.png'):
        assert (out / name).exists(), name
    assert lines[0]['config']['prototypes'] == 32 and [line['step'] for line in lines[1:]] == list(range(6))
    for line in lines[1:]:
        assert {'grad_norm', 'cls_spread', 'effective_rank', 'relaxed', 'masks_relaxed', *TIMING} <= set(line)
        total = line['image'] + line['patch'] + 0.1 * line['slice'] + 0.1 * line['koleo']
        assert line['total'] == pytest.approx(total, rel=1e-5)
        assert line['kl'] >= 0 and 0 <= line['teacher_entropy'] <= math.log(32) + 1e-6
    assert lines[-1]['slice'] > 0
    teacher = torch.load(out / 'last.pt', weights_only=True)['teacher']
    assert torch.equal(vit.load(out / 'last.pt').pos_embed, teacher['backbone.pos_embed'])


def test_the_teacher_is_the_moving_average_of_the_student(demo):
    out, _, lines = demo
    for step in range(1, 6):
        before, after, momentum = kept(out, step), kept(out, step + 1), lines[1 + step]['momentum']
        for name, weight in after['teacher'].items():
            average = momentum * before['teacher'][name] + (1 - momentum) * after['student'][name]
            torch.testing.assert_close(weight, average)


def assert_same_steps(runs, terms):
    """The terms of each step; Adam's first moment, which is the gradient; weights of both networks and centres."""
    (ours, lines), (theirs, other_lines) = runs
    for step in (1, 2, 3):
        for term in terms:
            assert lines[step][term] == pytest.approx(other_lines[step][term], rel=2e-3, abs=1e-4), term
        a, b = kept(ours, step), kept(theirs, step)
        for state in (a, b):
            state['gradient'] = {i: adam['exp_avg'] for i, adam in state['optimizer']['state'].items()}
        for part in ('gradient', 'student', 'teacher', 'center'):
            for name, x in a[part].items():
                assert (x - b[part][name]).norm() <= 5e-3 * x.norm() + 1e-6, (part, name)


def test_two_ranks_give_the_losses_the_gradient_and_the_update_of_one(tmp_path):
    """Half the batch each, drop_path 0: every term, KoLeo and pairs included."""
    one, two = (run(tmp_path / str(ranks), *THREE_STEPS, ranks=ranks)[1] for ranks in (1, 2))
    assert_same_steps([(tmp_path / '1', one), (tmp_path / '2', two)], TERMS)
    first, last = (kept(tmp_path / '1', step)['student']['backbone.pos_embed'] for step in (1, 3))
    assert not torch.equal(first, last)


def test_accumulation_moves_everything_once_per_step(tmp_path):
    """Four micro-batches of two: the same but for KoLeo, whose group is the micro-batch."""
    flags = (*THREE_STEPS, '--koleo_weight', 0, '--micro_batch')
    whole, parts = (run(tmp_path / str(micro), *flags, micro)[1] for micro in (8, 2))
    assert_same_steps([(tmp_path / '8', whole), (tmp_path / '2', parts)], ('image', 'patch', 'slice', 'grad_norm'))


def test_mammograms_alone_have_no_pairs_and_a_finished_run_is_not_overwritten(tmp_path):
    phantom.dataset(tmp_path / 'films', (volume[:1] for volume in breasts(8)))
    flags, out = ('--data', tmp_path / 'films', *ONE, '--steps', 2, '--warmup', 1, '--amp'), tmp_path / 'run'
    lines = here(out, *flags)
    assert len(lines) == 3 and all(math.isfinite(line['total']) and line['slice'] == 0 for line in lines[1:])
    for again in (flags, ()):                               # the same run, and a demo by a forgotten --data
        with pytest.raises(ValueError, match='holds a run; add --resume'):
            here(out, *again)
    assert here(out, *flags, '--resume') == lines


def test_two_nodes_are_two_ranks(tmp_path):
    """Two torchrun agents that find each other over loopback: the same log as one agent's two ranks."""
    _, lines = run(tmp_path / 'one', '--steps', 3, ranks=2)
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    command = pretraining(tmp_path / 'two', '--steps', 3, torchrun=(
        '--nnodes', '2', '--rdzv-id', 'x', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{port}'))
    command.remove('--standalone')
    nodes = [started(command) for _ in range(2)]
    texts = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    two = [json.loads(line) for line in (tmp_path / 'two' / 'log.jsonl').read_text().splitlines()]
    assert timeless(two) == timeless(lines)


# ---- what happens to runs: each must go on bit for bit -------------------------------------------------------------

@pytest.mark.parametrize('moment', ['before the first checkpoint', 'while it writes the second'])
def test_a_killed_run_goes_on_bit_for_bit(moment, pair, tmp_path):
    """With all that belongs to it."""
    (flags, undisturbed), out = pair, tmp_path / 'run'
    flags = (*flags, '--save_every', 2, '--keep_every', 4, '--resume')

    def when():
        if moment == 'before the first checkpoint':
            return logged_steps(out) >= 1
        return (out / 'last.pt').exists() and any(out.glob('*.part'))

    assert kill(started(pretraining(out, *flags, ranks=2)), when)
    run(out, *flags, ranks=2)
    same_run(undisturbed, out)
    assert (out / 'step_000004.pt').exists() and not list(out.glob('*.part'))


def test_a_killed_run_goes_on_while_its_data_workers_live_on(whole, tmp_path):
    """They change nothing: the undisturbed run has none."""
    (flags, undisturbed), out = whole, tmp_path / 'run'
    flags = (*flags, '--workers', 2, '--save_every', 3, '--resume')
    process = started(pretraining(out, *flags))
    assert reached(process, lambda: logged_steps(out) >= 4)
    process.kill()
    process.wait()
    run(out, *flags)
    same_run(undisturbed, out)


def ranks_and_workers(process):
    """The processes that torchrun started, and those that these started."""
    children = family(process.pid) - {process.pid}
    workers = {pid for parent in children for pid in family(parent) - {parent}}
    return sorted(children - workers), sorted(workers)


@pytest.mark.parametrize('whom', ['rank', 'data worker'])
def test_a_process_that_dies_is_restarted_by_torchrun_and_the_result_is_the_same(whom, pair, tmp_path):
    (flags, undisturbed), out = pair, tmp_path / 'run'
    flags = (*flags, '--save_every', 2, '--resume')
    process = started(pretraining(out, *flags, ranks=2, torchrun=('--max-restarts', '1')))
    assert reached(process, lambda: logged_steps(out) >= 3)
    ranks, workers = ranks_and_workers(process)
    os.kill(ranks[0] if whom == 'rank' else workers[0], signal.SIGKILL)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    same_run(undisturbed, out)


@pytest.mark.parametrize('whom', ['torchrun', 'everyone'])
def test_sigterm_saves_within_a_step_and_the_run_goes_on_bit_for_bit(whom, pair, tmp_path):
    """A scheduler sends it to torchrun, which passes it on, or to every process of the job, data workers too."""
    (flags, undisturbed), out = pair, tmp_path / 'run'
    process = started(pretraining(out, *flags, ranks=2))
    assert reached(process, lambda: logged_steps(out) >= 2)
    before = logged_steps(out)
    for pid in family(process.pid) if whom == 'everyone' else [process.pid]:
        os.kill(pid, signal.SIGTERM)
    text = process.communicate(timeout=120)[0]
    step = torch.load(out / 'last.pt', weights_only=True)['step']
    assert before <= step <= before + 2 and f'stopped after step {step - 1}, as asked' in text, text
    run(out, *flags, '--resume', ranks=2)
    same_run(undisturbed, out)


def test_two_runs_do_not_write_into_one_folder_and_ctrl_c_ends_one_with_status_0(tmp_path):
    process = started(pretraining(tmp_path, '--steps', 1000))
    assert reached(process, lambda: logged_steps(tmp_path) >= 1)
    with pytest.raises(ValueError, match='another process writes there'):
        here(tmp_path, '--steps', 1000, '--resume')
    process.send_signal(signal.SIGINT)
    assert 'as asked; the same command with --resume goes on' in process.communicate()[0] and process.returncode == 0
    assert torch.load(tmp_path / 'last.pt', weights_only=True)['step'] == logged_steps(tmp_path)


def test_a_full_disk_ends_a_run_in_words_and_leaves_the_last_checkpoint(whole, tmp_path):
    (flags, undisturbed), out = whole, tmp_path / 'run'
    flags = (*flags, '--save_every', 2, '--resume')
    assert kill(started(pretraining(out, *flags)), lambda: logged_steps(out) >= 4)
    good = (out / 'last.pt').read_bytes()
    text, _ = run(out, *flags, ok=False,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert 'last.pt cannot be written' in text and 'is the disk full' in text and 'Traceback' not in text
    assert (out / 'last.pt').read_bytes() == good and not list(out.glob('*.part'))
    run(out, *flags)
    same_run(undisturbed, out)


def test_a_run_resumed_on_other_ranks_and_workers_has_the_losses_of_one(demo, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(demo[0], out)
    shutil.copy(out / 'step_000003.pt', out / 'last.pt')
    _, lines = run(out, '--micro_batch', 4, '--workers', 1, '--resume', ranks=2)
    for step in (4, 5, 6):
        for term in TERMS:
            assert lines[step][term] == pytest.approx(demo[2][step][term], rel=2e-3, abs=1e-4), (step, term)


def test_another_recipe_other_files_and_a_damaged_checkpoint_are_refused_by_name(whole, tmp_path):
    (flags, undisturbed), out, other = whole, tmp_path / 'run', tmp_path / 'other'
    shutil.copytree(undisturbed, out)
    before = (out / 'last.pt').read_bytes()
    phantom.dataset(other, breasts(11))
    for change, words in [(('--lr', 0.1), '--lr 0.004 -> 0.1'), (('--data', other), 'other files')]:
        with pytest.raises(ValueError, match=f'is another run: {words}; choose another --out'):
            here(out, *flags, '--resume', *change)
    assert (out / 'last.pt').read_bytes() == before
    (out / 'last.pt').write_bytes(before[:-5000])
    with pytest.raises(ValueError, match='last.pt: not a checkpoint, or a damaged one'):
        here(out, *flags, '--resume')


# ---- numbers that cannot be silently wrong ------------------------------------------------------------------------

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


def test_collapse_is_warned_of_once(tmp_path, capsys):
    """A network that does not see the image: every token and every target alike."""
    here(tmp_path / 'run', '--lr', 1e-9, '--layerscale', 1e-5, '--teacher_temp', 10, '--teacher_temp_start', 10,
         '--student_temp', 1000, '--min_coverage', 1)
    said = capsys.readouterr().err
    assert said.count('CLS tokens of all images are alike') == said.count('every image goes to all') == 1
    assert said.count('most crops did not reach rho') == 1 and said.count('warning:') == 3
