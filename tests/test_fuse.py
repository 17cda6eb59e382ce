"""fuse.py: pairs are pairs, stage II is minus the cosine inside tissue, stage III starts as A and needs SM alone."""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import run_here, write
from PIL import Image
from test_detect import CPU, FAST, TINY, encoder, weights      # noqa: F401, a fixture among them

import detect
import fuse
import retinanet
import vit

cli = partial(run_here, fuse)
FIXED = dict(size=84, channels=32, workers=0, freeze=False, normals=0.0)


@pytest.fixture(scope='module')
def exams(tmp_path_factory):
    """Two lists of the same 24 breasts with a lesion each, SM of 80x60 and FFDM of 96x72."""
    root = tmp_path_factory.mktemp('exams')
    for kind, scale in (('sm', 1.0), ('ffdm', 1.2)):
        lines = ['path|patient|exam|laterality|view|split|x0|y0|x1|y1']
        (root / kind).mkdir()
        for i in range(24):
            rng, split = np.random.default_rng([5, i]), 'train' if i < 12 else 'val' if i < 18 else 'test'
            image = np.zeros((80, 60), np.uint8)
            image[8:72, :40] = rng.integers(60, 90, (64, 40))
            x, y = rng.integers(5, 25), rng.integers(15, 50)
            image[y:y + 12, x:x + 12] += 120
            image = Image.fromarray(image).resize((round(60 * scale), round(80 * scale)))
            np.save(root / kind / f'{i}.npy', np.asarray(image))
            box = '|'.join(str(scale * edge) for edge in (x, y, x + 12, y + 12))
            lines.append(f'{kind}/{i}.npy|p{i}|e{i}|L|CC|{split}|{box}')
        write(root / f'{kind}.csv', lines)
    return root


def config(exams, **changes):
    return fuse.Config(**dict(root=str(exams / 'sm.csv'), paired=str(exams / 'ffdm.csv'), **FIXED) | changes)


def new(kind, cfg=fuse.Config(**FIXED)):
    torch.manual_seed(0)
    other = detect.Features(vit.ViT(**TINY, layerscale=1.0), cfg.channels)
    return kind(cfg, vit.ViT(**TINY, layerscale=1.0), other)


def test_pairs_are_matched_by_patient_exam_side_and_view_and_an_image_without_its_pair_is_named(exams):
    rows, _ = fuse.load(config(exams))
    assert len(rows) == 24 and all(row.partner.path.endswith(f'ffdm/{row.patient[1:]}.npy') for row in rows)
    np.save(exams / 'wide.npy', np.full((80, 80), 7, np.uint8))
    text = (exams / 'ffdm.csv').read_text().replace(',e3,L', ',e3,R').replace('ffdm/4.npy', 'wide.npy')
    (exams / 'other.csv').write_text(text)
    rows, notes = fuse.load(config(exams, paired=str(exams / 'other.csv')))
    assert len(rows) == 22 and 'p3/e3/LCC: not there; p4/e4/LCC: 1 images of 60x80 and 1 of 80x80' in notes[-1]


def test_both_images_of_a_pair_move_alike_and_only_the_first_changes_its_greys(exams):
    rows, _ = fuse.load(config(exams))
    frames = fuse.Pairs(config(exams), [replace(row, partner=row) for row in rows])
    plain, equal, moved = frames[3, 0]['image'], 0, 0
    assert plain.shape == (3, 84, 84) and np.array_equal(plain[0], plain[1])
    for i in range(40):
        first, second, tissue = frames[3, 0, 0, i]['image']
        equal += np.array_equal(first, second)
        moved += not np.array_equal(second, plain[1])
        assert abs(first.astype(float) - second).mean() < 30                            # at one place
        assert (second[tissue > 127] > 40).mean() > 0.9 and (tissue > 127).sum() > 0.3 * (second > 40).sum()
    # Greys stay with probability .7^3, places with .5^3: the first bound fails for two in 100,000 sets of 40 seeds.
    assert 2 < equal < 30 and moved > 20


def test_stage_two_is_minus_the_cosine_inside_tissue_and_moves_b_alone():
    net, images = new(fuse.Mimic).train(), torch.randint(255, (2, 3, 84, 84), dtype=torch.uint8)
    images[:, 2] = 0
    images[0, 2, 20:60, 10:70] = 255                        # the second image holds no tissue
    answers, expected = net(images), []
    for (guess, aim), cells, (stride, first, _) in zip(answers, retinanet.grids(84), retinanet.LEVELS.values()):
        middle = (first + stride * torch.arange(cells)).long()
        here = images[0, 2][middle[:, None], middle] > 0                                # (h, w)
        cosine = torch.cosine_similarity(guess[0], aim[0], dim=0)
        expected.append(-cosine[here].mean() if here.any() else torch.tensor(0.0))
    loss, = net.head.loss(answers, dict(images=images))
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert net.head.count(dict(images=images)) == 1
    torch.testing.assert_close(answers[0][1], torch.nn.functional.normalize(net.other.levels(images[:, 1:2])[0], dim=1))
    loss.backward()
    assert all(p.grad is None for p in net.other.parameters())
    assert net.pyramid.p3.weight.grad.any() and net.encoder.patch_embed.proj.weight.grad.any()


def test_a_b_that_is_c_reaches_a_cosine_of_one_and_the_mean_of_c_alone_does_not(exams, group):
    rows, twin = fuse.load(config(exams))[0][:6], new(fuse.Mimic)
    twin.load_state_dict(twin.state_dict() | twin.other.state_dict())
    for project in twin.head.project:                       # the identity
        torch.nn.init.dirac_(project.weight)
        torch.nn.init.zeros_(project.bias)
    value, found = twin.validate([replace(row, partner=row) for row in rows], CPU)
    assert value == pytest.approx(1, abs=1e-4) and max(found['constant']) < 0.999


@pytest.mark.parametrize('paired', [None, 'FFDM.csv'])      # B sees SM; in the upper bound C sees FFDM
def test_fused_levels_mix_those_of_both_models_and_the_other_stays_frozen(paired):
    detector = new(fuse.Fused, fuse.Config(**FIXED, paired=paired)).train()
    images = torch.randint(255, (1, 3, 84, 84), dtype=torch.uint8)
    own, other = detect.Features.levels(detector, images), detector.other.levels(images[:, 1:] if paired else images)
    for level, mine in zip(detector.levels(images), own):   # it begins as the detector that it was
        assert torch.equal(level, mine)
    for mix in detector.mix:
        torch.nn.init.normal_(mix.weight)
    for level, mix, *pair in zip(detector.levels(images), detector.mix, own, other):
        torch.testing.assert_close(level, mix(torch.cat(pair, 1)), rtol=1e-4, atol=1e-5)
    detector(images)[0].sum().backward()
    assert all(p.grad is None for p in detector.other.parameters()) and detector.mix[0].weight.grad.any()
    assert detector.pyramid.p3.weight.grad.any() and detector.encoder.norm.weight.grad.any()


def test_the_three_stages_end_in_a_detector_that_needs_sm_alone(exams, encoder, tmp_path):              # noqa: F811
    run = {name: tmp_path / name for name in ('A', 'C', 'B', 'fused', 'bound')}
    fast, first = (*FAST[4:], '--epochs', 1), ('--encoder', encoder, '--no-freeze', *FAST[:4])
    for name, kind in (('A', 'sm'), ('C', 'ffdm')):
        run_here(detect, '--root', exams / f'{kind}.csv', '--out', run[name], *first, *fast)
    alone, pairs = ('--root', exams / 'sm.csv'), ('--root', exams / 'sm.csv', '--paired', exams / 'ffdm.csv')
    cli('mimic', *pairs, '--other', run['C'], '--out', run['B'], *fast)
    cli('fuse', *alone, '--init_from', run['A'], '--other', run['B'], '--out', run['fused'], *fast)
    cli('fuse', *pairs, '--init_from', run['A'], '--other', run['C'], '--out', run['bound'], *fast)
    b, fused = (weights(run[name], 'best_weights') for name in ('B', 'fused'))
    assert torch.equal(b['pyramid.p3.weight'], fused['other.pyramid.p3.weight'])
    for name in ('A', 'B', 'C'):
        run[name].rename(tmp_path / f'gone{name}')
    cli('predict', exams / 'sm/20.npy', '--checkpoint', run['fused'], '--out', tmp_path / 'found')      # without them
    for name in (tmp_path / 'goneB', run['bound']):
        with pytest.raises(ValueError, match='needs both images'):
            cli('predict', exams / 'sm/20.npy', '--checkpoint', name)
