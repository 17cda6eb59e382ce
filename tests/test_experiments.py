"""The experiments: what their figures rest on. The experiments themselves take hours and are no tests."""
import numpy as np
import pytest

import experiments
import pretrain
from experiments import ARMS, RECIPE


def test_a_recipe_becomes_the_command_line_that_gives_it():
    recipe = RECIPE | ARMS['DINOv2'] | dict(data='x', percentile=25.0, volume_items=False)
    assert pretrain.parse(pretrain.Config, experiments.flags(recipe)) == pretrain.Config(**recipe)


def test_linear_and_k_nn_read_what_can_be_read_and_never_from_the_same_patient():
    rng = np.random.default_rng(0)
    y, groups = np.repeat([0, 1, 2], 60), np.arange(180)
    x = np.eye(8)[y] + rng.normal(0, 0.1, (180, 8))
    for predict in (experiments.linear, experiments.nearest):
        assert experiments.value_of(y, predict(x, y, groups)) > 0.95
    twins = rng.normal(size=(90, 8)).repeat(2, 0)                                       # a patient's two images are one
    y, patients = rng.integers(2, size=90).repeat(2), np.arange(90).repeat(2)
    assert experiments.value_of(y, experiments.nearest(twins, y, np.arange(180))) > 0.9
    for predict in (experiments.linear, experiments.nearest):
        assert abs(experiments.value_of(y, predict(twins, y, patients)) - 0.5) < 0.2    # 3.3 standard errors


def test_coherence_of_volumes_on_a_circle_is_known():
    """Slice k of volume v stands at v * 90 + k * 2 degrees."""
    angle = np.deg2rad(np.arange(4)[:, None] * 90 + np.arange(16) * 2)
    found = experiments.coherence(np.stack([np.cos(angle), np.sin(angle)], -1))
    for d in experiments.APART:
        assert found[f'cosine_{d}'] == pytest.approx(np.cos(np.deg2rad(2 * d)))
    assert found['retrieval_8'] == 1 and found['depth'] > 0.99


def test_a_lesion_is_under_a_mask_where_all_patches_that_it_touches_are(monkeypatch):
    """A lesion of the whole image is covered by a mask of everything alone; one of a pixel as often as its patch."""
    monkeypatch.setattr(experiments, 'RATIOS', (0.3, 1.0))
    monkeypatch.setattr(experiments.images, 'read_equalised', lambda path: np.full((222, 222), 100, np.uint8))
    monkeypatch.setattr(experiments.mask, 'tissue', lambda image, *_: np.ones(image.shape, bool))
    monkeypatch.setattr(experiments.sampler, 'crop_box', lambda *_: ((0, 0, 222, 222), False))
    volume = experiments.datasets.Row('a', 'p', boxes=[(0, 0, 0, 222, 222, ''), (0, 100, 30, 101, 31, '')])
    for lesion, kind, ratio, masked in experiments.under_masks(volume, np.random.default_rng(0), draws=3):
        assert masked.shape == ((37, 37) if lesion == 0 else (1, 1))
        assert masked.all() == (ratio == 1) or lesion == 1
        if lesion == 0:
            assert masked.sum() == round(ratio * 37 * 37)


def test_the_page_of_results_holds_the_tables_of_the_rows():
    page = (experiments.RESULTS / 'README.md').read_text()
    for name, table in experiments.tables().items():
        assert table in page, f'`python tests/experiments.py tables` prints another table of {name}'
