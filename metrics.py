"""Numbers and their tests: scores in, numbers out.

Copy this file alone; it imports nothing of this repository.
"""
import numpy as np
from scipy import stats


def knn(similarity, labels, k=10, temp=0.07):
    """Weighted k-nearest-neighbour vote (DINO): similarity (n, m), labels (m,) from 0 up -> each class's share of the
    vote (n, C). A square similarity with -inf on the diagonal leaves one out."""
    k = min(k, similarity.shape[1])
    near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]                           # (n, k)
    weight = np.exp((np.take_along_axis(similarity, near, 1) - similarity.max(1, keepdims=True)) / temp)
    votes = np.stack([(weight * (labels[near] == c)).sum(1) for c in range(labels.max() + 1)], axis=1)
    return votes / votes.sum(1, keepdims=True)


def resample(metric, arrays, groups, rng, n=1000):
    """metric(*arrays) on n bootstrap draws (n,): groups (patients, phantoms) are drawn with replacement, their rows
    stay together. NaN where the metric is not defined on a draw."""
    arrays, (_, group) = [np.asarray(a) for a in arrays], np.unique(groups, return_inverse=True)
    rows = np.split(np.argsort(group, kind='stable'), np.cumsum(np.bincount(group))[:-1])
    values = np.empty(n)
    for i in range(n):
        drawn = np.concatenate([rows[g] for g in rng.integers(len(rows), size=len(rows))])
        values[i] = metric(*(a[drawn] for a in arrays))
    return values


def bootstrap(metric, arrays, groups, rng, n=1000):
    """95 % percentile interval (low, high) of metric(*arrays) over patients; draws where it is NaN are left out."""
    values = resample(metric, arrays, groups, rng, n)
    return tuple(np.percentile(values[~np.isnan(values)], [2.5, 97.5])) if not np.isnan(values).all() else (np.nan,) * 2


def mcnemar(a, b):
    """McNemar's test of two models, a and b (n,) correct or not on the same cases -> p, two-sided. Exact below 25
    discordant cases, chi-squared with continuity correction from there on; 1 for equal models."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    first, second = int((a & ~b).sum()), int((b & ~a).sum())
    if first + second < 25:
        return float(min(1.0, 2 * stats.binom.cdf(min(first, second), first + second, 0.5)))
    return float(stats.chi2.sf((abs(first - second) - 1) ** 2 / (first + second), 1))


def effective_rank(x):
    """RankMe: exp of the entropy of the singular values of the rows (n, D), normalised to sum 1. They are the
    roots of the eigenvalues of the smaller Gram matrix."""
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    values = np.sqrt(np.linalg.eigvalsh(gram.astype(np.float64)).clip(0))
    share = values / max(values.sum(), 1e-12)
    return float(np.exp(-(share * np.log(share.clip(1e-12))).sum()))
