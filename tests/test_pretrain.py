"""pretrain.py: the recipe is the paper's, the stream is reproducible, and the run survives what runs meet."""
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import ROOT, TIMING, TINY, run, same_run, timeless
from PIL import Image

import images
import metrics
import phantom
import pretrain
import vit
from pretrain import DEMO, Config, Slices, shuffled
from run import cosine


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    """One whole run of six steps: folder, output, log."""
    out = tmp_path_factory.mktemp('demo') / 'run'
    return out, *run(out, '--keep_every', 3, '--test_phantoms', 24, torchrun=())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A small data set: two mammograms, one volume, as .npy."""
    where = tmp_path_factory.mktemp('data')
    for i, slices in enumerate((1, 5, 1)):
        volume = phantom.breast(np.random.default_rng(i), slices=slices).volume
        np.save(where / f'{i}.npy', volume if slices > 1 else volume[0])
    return where


def slices(folder, **changes):
    cfg = Config(**DEMO | dict(volume_items=False) | changes)
    files = images.listing(folder)
    return Slices(cfg, files, [images.frames(f) for f in files])


# ---- the recipe ---------------------------------------------------------------------------------------------------

def test_the_defaults_are_the_numbers_of_the_paper():
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


def test_every_field_has_its_source_and_a_help():
    for f in fields(Config):
        assert f.metadata['source'].split()[0] in ('paper', 'dbt-dino', 'dinov2', 'ours'), f.name
        assert f.metadata['help'], f.name
    assert set(DEMO) <= {f.name for f in fields(Config)}


def test_schedules_follow_dinov2():
    """The values of DINOv2's CosineScheduler written out as arrays, and the peak it reaches at a batch of 128."""
    steps, warmup, start, end = 1000, 100, 2.0, 0.5
    i = np.arange(steps - warmup)
    theirs = np.concatenate([np.linspace(0, start, warmup),
                             end + 0.5 * (start - end) * (1 + np.cos(np.pi * i / len(i)))])
    ours = [cosine(step, steps, start, end, warmup) for step in range(steps)]
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    cfg = Config()
    assert pretrain.schedules(cfg, 0)['lr'] == 0
    for step in (12_499, 12_500):
        assert pretrain.schedules(cfg, step)['lr'] == pytest.approx(1.414e-3, rel=1e-3)
    for name, first, last in [('wd', 0.04, 0.20), ('momentum', 0.992, 1.0), ('teacher_temp', 0.04, 0.07)]:
        assert pretrain.schedules(cfg, 0)[name] == pytest.approx(first)
        assert pretrain.schedules(cfg, 299_999)[name] == pytest.approx(last, abs=1e-6)
    assert pretrain.schedules(cfg, 18_750)['teacher_temp'] == pytest.approx(0.055)


@pytest.mark.parametrize('flags, words', [
    (['--prototypes', '1'], 'at least 2'), (['--batch', '30', '--micro_batch', '16'], 'does not divide'),
    (['--size', '500'], 'must be multiples of --patch 14'), (['--steps', '0', '--patch', '0'], '--steps 0 .*--patch 0'),
    (['--global_scale', '1', '0.5'], 'must rise'), (['--kernel', '8'], 'must be odd'), (['--locals', '-1'], 'negative'),
    (['--min_coverage', '2'], 'must lie in 0..1')])
def test_what_cannot_work_is_refused_at_once(flags, words):
    with pytest.raises(ValueError, match=words):
        pretrain.check(pretrain.parse(Config, flags, DEMO), 1)


def test_flags_and_demo(capsys):
    assert pretrain.parse(Config, [], DEMO).out == 'runs/demo'
    flags = ['--data', 'x', '--local_scale', '0.1', '0.3', '--percentile', '40', '--no-resume']
    cfg = pretrain.parse(Config, flags, DEMO)
    assert cfg == Config(data='x', local_scale=(0.1, 0.3), percentile=40.0)
    with pytest.raises(SystemExit):
        pretrain.parse(Config, ['--bacth', '3'], DEMO)
    assert 'unrecognized arguments: --bacth' in capsys.readouterr().err


# ---- the stream ---------------------------------------------------------------------------------------------------

def test_the_order_of_an_epoch_is_a_permutation():
    for n in (1, 2, 3, 17, 1000):
        orders = [tuple(shuffled(i, n, (seed, epoch)) for i in range(n)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
        assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(set(orders)) == 3 and orders[0] != tuple(range(1000))
    places = np.array(orders[0])                                        # neighbours land anywhere: mean gap n / 3
    assert abs(np.abs(np.diff(places)).mean() - 333) < 40


def test_the_stream_depends_on_neither_ranks_nor_accumulation():
    cfg = Config(batch=24, steps=3)
    one = [i for part in pretrain.micro_batches(cfg, 0, 0, 1, 1) for i in part]
    assert one == list(range(72))
    for ranks, accumulate in [(1, 3), (2, 2), (4, 3)]:
        parts = [list(pretrain.micro_batches(cfg, 1, rank, ranks, accumulate)) for rank in range(ranks)]
        stream = [i for step in range(2 * accumulate) for rank in range(ranks) for i in parts[rank][step]]
        assert stream == list(range(24, 72))


def test_a_sample_is_a_function_of_seed_epoch_and_index(folder):
    data = slices(folder)
    assert len(data) == 7
    a, b, c = data[3], slices(folder)[3], data[3 + 7]
    for name in ('globals', 'locals', 'masks', 'pair'):
        np.testing.assert_array_equal(a[name], b[name])
    assert not np.array_equal(a['globals'], c['globals'])
    assert sorted(data[i]['file'] for i in range(7)) == [0, 1, 1, 1, 1, 1, 2]
    assert sorted(slices(folder, volume_items=True)[i]['file'] for i in range(3)) == [0, 1, 2]


def test_volumes_bring_a_pair_and_mammograms_none(folder):
    for data, pairs in [(slices(folder), {0: 0, 1: 1, 2: 0}), (slices(folder, slice_weight=0.0), {0: 0, 1: 0, 2: 0})]:
        for i in range(7):
            sample = data[i]
            assert sample['pair'].shape == (pairs[sample['file']], 2, 84, 84)


def test_masks_lie_on_the_crops_as_the_recipe_says(folder):
    masked = [m.sum() for i in range(60) for m in slices(folder, seed=i)[0]['masks']]
    share = np.mean([m > 0 for m in masked])                            # half of 120 coins: sd .046
    assert 0.3 < share < 0.7 and {m for m in masked if m} <= set(range(4, 19))


def test_clahe_is_for_every_file_but_prepared_ones(folder, tmp_path):
    image = phantom.breast(np.random.default_rng(0)).volume[0]
    Image.fromarray(image).save(tmp_path / 'a.png')
    np.save(tmp_path / 'b.npy', image)
    data = slices(tmp_path)
    np.testing.assert_array_equal(data.load(0, 0), images.clahe(images.read(tmp_path / 'a.png')))
    np.testing.assert_array_equal(data.load(1, 0), image)


def test_blind_crops_and_blind_masks_are_two_arms(folder, monkeypatch):
    seen = {}
    views, patch_mask = pretrain.sampler.views, pretrain.sampler.patch_mask
    monkeypatch.setattr(pretrain.sampler, 'views',
                        lambda *a, **k: seen.update(placement=k['placement']) or views(*a, **k))
    monkeypatch.setattr(pretrain.sampler, 'patch_mask',
                        lambda rng, grid, *a, **k: seen.update(grid=grid) or patch_mask(rng, grid, *a, **k))
    for crops, masks in [(False, False), (True, False), (False, True), (True, True)]:
        slices(folder, blind_crops=crops, blind_masks=masks)[0]
        assert seen['placement'].all() == crops and (seen['grid'] == 1).all() == masks


def test_unusable_images_are_replaced_named_and_counted(tmp_path, group, capsys):
    breast = phantom.breast(np.random.default_rng(0)).volume[0]
    for i in range(6):
        np.save(tmp_path / f'{i}.npy', breast)
    np.save(tmp_path / '2.npy', np.zeros((256, 192), np.uint8))
    np.save(tmp_path / '4.npy', breast[:30, :30])
    data = slices(tmp_path)
    samples = [data[i] for i in range(6)]
    assert all(s['file'] not in (2, 4) for s in samples)
    reasons = {file: reason for s in samples for file, reason in s['bad']}
    assert set(reasons) == {2, 4}
    assert 'no breast tissue' in reasons[2] and '30x30 is smaller than the 42 local crop; lower' in reasons[4]

    watch = pretrain.Watch(data.cfg, data.files, torch.device('cpu'))
    for _ in range(2):
        watch.note(pretrain.collate(samples))
    assert watch.judge() == 2 and capsys.readouterr().err.count('skipped') == 2
    many = pretrain.Watch(data.cfg, ['x'] * 120, torch.device('cpu'), left_out=2)
    many.seen[:108], many.seen[:4] = 1, 2
    with pytest.raises(ValueError, match='6 of 110 files.*--max_bad is 0.05'):
        many.judge()


def test_a_long_volume_without_a_usable_slice_does_not_end_the_run(tmp_path):
    np.save(tmp_path / '0.npy', np.zeros((130, 60, 60), np.uint8))
    np.save(tmp_path / '1.npy', phantom.breast(np.random.default_rng(0)).volume[0])
    data = slices(tmp_path)
    samples = [data[i] for i in range(0, len(data), 40)]
    assert {s['file'] for s in samples} == {1} and {file for s in samples for file, _ in s['bad']} == {0}


def test_a_folder_of_nothing_usable_is_refused(tmp_path, group):
    (tmp_path / 'a.dcm').write_text('no')
    with pytest.raises(ValueError, match='1 of 1 files cannot be read.*not a DICOM file'):
        pretrain.index(Config(), tmp_path, 0)
    (tmp_path / 'a.dcm').unlink()
    np.save(tmp_path / 'b.npy', np.zeros((99, 99), np.uint8))
    with pytest.raises(ValueError, match='1 files in a row cannot be used, the first: .*no breast tissue'):
        slices(tmp_path)[0]


def test_a_large_folder_is_indexed_once_and_afterwards_only_what_is_new(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, 'MANY', 5)                                # all cores from 6 files on
    data, cfg = tmp_path / 'data', Config(out=str(tmp_path), max_bad=0.5)
    data.mkdir()
    for i in range(12):
        np.save(data / f'{i:02d} ä.npy', np.zeros((1 + i % 3, 9, 9), np.uint8))
    (data / 'broken.npy').write_bytes(b'no')
    paths, counts, bad = pretrain.headers(cfg, data)
    assert [paths[i] for i in range(len(paths))] == [p for p in images.listing(data) if 'broken' not in p]
    assert counts.tolist() == [1 + i % 3 for i in range(12)] and bad == 1
    assert 'broken.npy: not a .npy file' in capsys.readouterr().err

    read = []
    monkeypatch.setattr(images, 'frames', lambda path: read.append(os.path.basename(path)) or 7)
    np.save(data / 'new.npy', np.zeros((9, 9), np.uint8))
    (data / 'broken.npy').unlink()
    paths, counts, bad = pretrain.headers(cfg, data)
    assert read == ['new.npy'] and counts[-1] == 7 and counts.sum() == 24 + 7 and not bad
    os.utime(data / 'new.npy', ns=(0, 0))                                   # written since
    assert pretrain.headers(cfg, data)[1].sum() == 31 and read == ['new.npy'] * 2
    index = (tmp_path / 'index.npz').read_bytes()
    for broken in (index[:99], b'', (data / 'new.npy').read_bytes()):
        (tmp_path / 'index.npz').write_bytes(broken)
        assert pretrain.headers(cfg, data)[1].tolist() == [7] * 13


def test_a_data_worker_has_one_thread(folder):
    class Threads(Slices):
        def __getitem__(self, i):
            super().__getitem__(i)
            return torch.get_num_threads()

    data = slices(folder)
    data = Threads(data.cfg, data.files, data.counts)
    assert set(torch.utils.data.DataLoader(data, batch_size=None, sampler=range(4), num_workers=2)) == {1}


# ---- student and teacher ------------------------------------------------------------------------------------------

def test_student_and_teacher_start_alike_and_only_the_student_learns():
    cfg = Config(**DEMO | dict(drop_path=0.2))
    student, teacher = pretrain.networks(cfg, torch.device('cpu'))
    for a, b in zip(student.parameters(), teacher.parameters()):
        assert torch.equal(a, b) and a.requires_grad and not b.requires_grad
    assert teacher.backbone.blocks[0].drop_path == 0 and student.backbone.blocks[0].drop_path == 0.2
    assert student.training and not teacher.training


def test_init_takes_the_encoder_of_a_file_and_refuses_another_shape(tmp_path):
    cfg = Config(**DEMO)
    torch.manual_seed(5)
    given = vit.ViT(size=84, width=128, depth=4, heads=2, channels=3, offset=0.1, antialias=False)
    torch.save(given.state_dict(), tmp_path / 'official.pth')
    cfg.init, cfg.heads = str(tmp_path / 'official.pth'), 2
    student, teacher = pretrain.networks(cfg, torch.device('cpu'))
    for network in (student, teacher):
        assert torch.equal(network.backbone.pos_embed, given.pos_embed) and network.backbone.offset == 0.1
    cfg.width = 64
    with pytest.raises(ValueError, match=r'another encoder: width 128 \(--width 64\)'):
        pretrain.networks(cfg, torch.device('cpu'))


def test_effective_rank_counts_directions():
    assert pretrain.effective_rank(torch.eye(7)) == pytest.approx(7, rel=1e-4)
    assert pretrain.effective_rank(torch.ones(7, 3)) == pytest.approx(1, rel=1e-3)


def test_knn_and_bootstrap_are_what_they_say():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    x = rng.normal(0, 0.2, (90, 3)) + 3 * np.eye(3)[labels]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert (metrics.knn(x @ x.T + np.diag(np.full(90, -np.inf)), labels).argmax(1) == labels).mean() > 0.95
    values = rng.normal(1, 1, 400)
    low, high = metrics.bootstrap(np.mean, [values], np.arange(400), rng)
    assert low == pytest.approx(values.mean() - 1.96 / 20, abs=0.03) and high > values.mean() > low


# ---- whole runs ---------------------------------------------------------------------------------------------------

def test_the_demo_runs_under_torchrun_and_leaves_what_it_promises(demo):
    out, text, lines = demo
    assert 'SMOKE RUN ON PHANTOMS' in text and 'trained - random init' in text
    for name in ('log.jsonl', 'last.pt', 'step_000003.pt', 'step_000006.pt', 'report.json', 'views.png',
                 'attention.png'):
        assert (out / name).exists(), name
    assert lines[0]['config']['prototypes'] == 32 and [line['step'] for line in lines[1:]] == list(range(6))
    for line in lines[1:]:
        assert {'image', 'patch', 'slice', 'koleo', 'total', 'lr', 'wd', 'momentum', 'teacher_temp', 'grad_norm',
                'teacher_entropy', 'kl', 'center_norm', 'cls_spread', 'effective_rank', 'relaxed', 'masks_relaxed',
                'bad_files', *TIMING} <= set(line)
        total = line['image'] + line['patch'] + 0.1 * line['slice'] + 0.1 * line['koleo']
        assert line['total'] == pytest.approx(total, rel=1e-5)
        assert line['kl'] >= 0 and 0 <= line['teacher_entropy'] <= math.log(32) + 1e-6
    assert lines[-1]['slice'] > 0


def test_a_checkpoint_is_a_plain_dict_whose_teacher_loads(demo):
    state = torch.load(demo[0] / 'last.pt', weights_only=True)
    assert state['step'] == 6 and state['config']['width'] == 32
    model = vit.load(demo[0] / 'last.pt')
    assert torch.equal(model.pos_embed, state['teacher']['backbone.pos_embed'])


def test_the_teacher_is_the_moving_average_of_the_student(demo):
    early, late = (torch.load(demo[0] / f'step_00000{k}.pt', weights_only=True) for k in (3, 6))
    cfg = Config(**demo[2][0]['config'])
    name = 'backbone.blocks.1.mlp.fc1.weight'
    assert not torch.equal(early['teacher'][name], late['teacher'][name])
    kept = math.prod(pretrain.schedules(cfg, step)['momentum'] for step in (3, 4, 5))
    drift = late['teacher'][name] - kept * early['teacher'][name]
    towards = (1 - kept) * late['student'][name]
    assert (drift - towards).norm() < 0.2 * towards.norm()


def test_a_resumed_run_is_the_same_run(demo, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(demo[0], out)
    shutil.copy(out / 'step_000003.pt', out / 'last.pt')
    run(out, '--keep_every', 3, '--resume')
    same_run(demo[0], out)


def test_another_recipe_or_a_broken_checkpoint_is_not_resumed(demo, tmp_path):
    cfg = pretrain.parse(Config, TINY, DEMO)
    cfg.out, cfg.resume, cfg.lr, cfg.clip = str(demo[0]), True, 0.5, 1.0
    with pytest.raises(ValueError, match='another recipe: lr .* -> 0.5, clip 3.0 -> 1.0; .* --override'):
        pretrain.earlier(cfg, 0)
    cfg.out = str(tmp_path)
    for spoil in (lambda path: torch.save({'a': 1}, path), lambda path: path.write_bytes(b'half a file')):
        spoil(tmp_path / 'last.pt')
        with pytest.raises(ValueError, match='not a checkpoint.*copy a step_N.pt over it'):
            pretrain.earlier(cfg, 0)


def test_a_full_disk_leaves_the_last_checkpoint_and_no_litter(tmp_path):
    pretrain.save(tmp_path / 'last.pt', {'a': 1})
    os.symlink('/dev/full', tmp_path / 'last.pt.part')
    with pytest.raises(OSError, match='last.pt cannot be written.*is the disk full'):
        pretrain.save(tmp_path / 'last.pt', {'a': torch.zeros(10_000)})
    assert torch.load(tmp_path / 'last.pt') == {'a': 1} and os.listdir(tmp_path) == ['last.pt']


def test_two_nodes_are_two_ranks(tmp_path):
    """Two torchrun agents that find each other over loopback: the same log as one agent's two ranks."""
    _, lines = run(tmp_path / 'one', '--steps', 3, ranks=2)
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--nproc-per-node', '1', '--rdzv-id',
               'x', '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{port}', str(ROOT / 'pretrain.py'), *TINY,
               '--steps', '3', '--out', str(tmp_path / 'two')]
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env=os.environ | {'OMP_NUM_THREADS': '1'}) for _ in range(2)]
    texts = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    two = [json.loads(line) for line in (tmp_path / 'two' / 'log.jsonl').read_text().splitlines()]
    assert timeless(two) == timeless(lines) and (tmp_path / 'two' / 'last.pt').exists()


def test_accumulation_moves_everything_once_per_step(demo, tmp_path):
    """Four micro-batches of two: the same losses but for KoLeo, whose group is the micro-batch; same centres."""
    _, lines = run(tmp_path / 'run', '--koleo_weight', 0, '--micro_batch', 2, '--steps', 3)
    _, whole = run(tmp_path / 'whole', '--koleo_weight', 0, '--steps', 3)
    for ours, theirs in zip(lines[1:], whole[1:]):
        for name in ('image', 'patch', 'slice', 'grad_norm', 'center_norm', 'patch_center_norm', 'momentum'):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-4), (ours['step'], name)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    text, lines = run(tmp_path / 'run', '--lr', 1e30, '--save_every', 1, '--warmup', 0, ok=False)
    assert 'not finite' in text and "'image'" in text
    step = torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)['step']
    assert f'step {step}: not finite' in text


def test_a_folder_of_real_files_trains_and_a_finished_run_is_not_overwritten(folder, tmp_path):
    flags = ['--data', folder, '--workers', '2', '--size', '84', '--local_size', '42', '--locals', '2',
             '--hidden', '64', '--bottleneck', '16', '--steps', '2', '--amp']
    text, lines = run(tmp_path / 'run', *flags)
    assert 'PHANTOMS' not in text and len(lines) == 3 and all(math.isfinite(line['total']) for line in lines[1:])
    for again in (flags, ()):                                           # the same run, and a demo by a forgotten --data
        text, lines = run(tmp_path / 'run', *again, ok=False)
        assert 'holds a run; add --resume' in text and len(lines) == 3
