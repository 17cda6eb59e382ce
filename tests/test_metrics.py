"""metrics.py: numbers are what their names say."""
import numpy as np
import pytest

import metrics


def test_k_nearest_neighbours_find_clusters_and_never_the_image_itself():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    x = rng.normal(0, 0.2, (90, 3)) + 3 * np.eye(3)[labels]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    votes = metrics.knn(x @ x.T + np.diag(np.full(90, -np.inf)), labels)
    assert (votes.argmax(1) == labels).mean() > 0.95 and np.allclose(votes.sum(1), 1)


def test_the_bootstrap_of_a_mean_is_its_normal_interval():
    rng = np.random.default_rng(0)
    values = rng.normal(1, 1, 400)
    low, high = metrics.bootstrap(np.mean, [values], np.arange(400), rng)
    assert low == pytest.approx(values.mean() - 1.96 / 20, abs=0.03) and high > values.mean() > low


def test_effective_rank_counts_directions_from_either_gram_matrix():
    rng = np.random.default_rng(0)
    assert metrics.effective_rank(np.eye(7)) == pytest.approx(7, rel=1e-6)
    assert metrics.effective_rank(np.ones((7, 3))) == pytest.approx(1, rel=1e-3)
    for shape in ((20, 6), (6, 20)):
        x = rng.normal(size=shape)
        share = np.linalg.svd(x, compute_uv=False)
        share /= share.sum()
        assert metrics.effective_rank(x) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
