"""Numbers and their tests: scores in, numbers out.

Copy this file alone; it imports nothing of this repository.
"""
import math
from collections import defaultdict
from dataclasses import dataclass

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


# ---- statistics (DBT-DINO 2.5) ----

def auc(y, s):
    """Area under the ROC curve = P(score of a positive > score of a negative), ties counting half (Mann-Whitney).
    y (n,) 0 or 1, s (n,) scores. NaN where one class is absent."""
    y = np.asarray(y) > 0
    m, n = y.sum(), (~y).sum()                              # positives, negatives
    if m == 0 or n == 0:
        return math.nan
    return float((stats.rankdata(s)[y].sum() - m * (m + 1) / 2) / (m * n))


def _delong(y, scores):
    """AUCs (k,) of k models, scores (k, m + n), and their covariance (k, k), from midranks (Sun & Xu 2014): of the
    share of negatives that each positive beats, and the share of positives that beat each negative."""
    y, scores = np.asarray(y) > 0, np.asarray(scores, float)
    m, n, ranks = y.sum(), (~y).sum(), stats.rankdata(scores, axis=1)                   # positives, negatives
    beaten = (ranks[:, y] - stats.rankdata(scores[:, y], axis=1)) / n                   # (k, m)
    beating = 1 - (ranks[:, ~y] - stats.rankdata(scores[:, ~y], axis=1)) / m            # (k, n)
    if min(m, n) < 2:                                       # a single case has no variance
        return beaten.mean(1), np.full((len(scores),) * 2, math.nan)
    return beaten.mean(1), np.atleast_2d(np.cov(beaten) / m + np.cov(beating) / n)


def delong(y, s1, s2):
    """DeLong's test of two models on the same cases -> (auc1, auc2, p), two-sided. It takes cases as independent;
    where a patient has several, trust the bootstrap by patient. Equal scores give p = 1; NaN with fewer than two
    cases of a class."""
    a1, a2 = auc(y, s1), auc(y, s2)
    if math.isnan(a1):
        return a1, a2, math.nan
    if np.array_equal(stats.rankdata(s1), stats.rankdata(s2)):
        return a1, a2, 1.0
    _, covariance = _delong(y, (s1, s2))
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    if variance < 1e-18:                                    # no variance to test against
        return a1, a2, 1.0 if a1 == a2 else math.nan
    return a1, a2, float(2 * stats.norm.sf(abs(a1 - a2) / math.sqrt(variance)))


def delong_interval(y, s, level=0.95):
    """Normal interval (low, high) of one AUC with DeLong's variance, clipped to 0..1. It collapses at AUC 1."""
    area, variance = _delong(y, (s,))
    half = stats.norm.ppf(0.5 + level / 2) * math.sqrt(variance[0, 0])
    return float(max(area[0] - half, 0)), float(min(area[0] + half, 1))


def confusion(y, yhat, classes):
    """Counts (C, C), truth by row, prediction by column. `classes`: their number, or the labels themselves."""
    labels = np.arange(classes) if np.ndim(classes) == 0 else np.asarray(classes)
    return ((np.asarray(y)[:, None] == labels).T.astype(float) @ (np.asarray(yhat)[:, None] == labels)).astype(int)


def f1(y, yhat, classes, average='macro'):
    """2 TP / (2 TP + FP + FN), 0 where a class neither occurs nor is predicted.

    average: 'macro', the plain mean over all classes, absent ones too (DBT-DINO 6.2.1; MammoDINO does not say);
    'weighted', by true frequency; 'micro', over all cases, which is accuracy.
    """
    counts = confusion(y, yhat, classes)
    hits, true, guessed = np.diag(counts), counts.sum(1), counts.sum(0)
    each = 2 * hits / np.maximum(true + guessed, 1)
    averages = dict(macro=each.mean(), weighted=(each * true).sum() / max(true.sum(), 1),
                    micro=hits.sum() / max(true.sum(), 1))
    if average not in averages:
        raise ValueError(f"average {average!r}: expected {', '.join(averages)}")
    return float(averages[average])


def kappa(y, yhat, classes):
    """Cohen's kappa with quadratic weights (i - j)^2 over all classes, for ordered ones. NaN where truth and
    prediction are one and the same single class."""
    counts = confusion(y, yhat, classes)
    i = np.arange(len(counts))
    weight = np.square(i[:, None] - i)
    chance = np.outer(counts.sum(1), counts.sum(0)) / max(counts.sum(), 1)
    return float(1 - (weight * counts).sum() / (weight * chance).sum()) if (weight * chance).any() else math.nan


def benjamini_hochberg(p):
    """Adjusted p values (n,): reject those <= alpha to hold the false discovery rate. p_(i) n / i, made monotone."""
    p = np.asarray(p, float)
    order = np.argsort(p)[::-1]
    adjusted = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)[np.argsort(order)]


def roc(y, s):
    """-> false and true positive rates and thresholds, from (0, 0) to (1, 1); one point for each distinct score."""
    order = np.argsort(-np.asarray(s), kind='stable')
    y, s = np.asarray(y)[order] > 0, np.asarray(s)[order]
    last = np.append(s[1:] != s[:-1], True)
    tp, fp = np.cumsum(y)[last], np.cumsum(~y)[last]
    return np.append(0, fp / max(fp[-1], 1)), np.append(0, tp / max(tp[-1], 1)), np.append(np.inf, s[last])


def youden(y, s):
    """The threshold with the largest sensitivity + specificity, for `s >= threshold`; chosen on validation."""
    fpr, tpr, thresholds = roc(y, s)
    return float(thresholds[1 + np.argmax((tpr - fpr)[1:])])                            # not the one above all scores


def in_year(y, mask):
    """Who takes part in the AUROC of each year, bool (n, T), as in DBT-DINO's code. Positives of year t are the cancers
    found in that year; negatives the exams without cancer in all T years that were still followed in year t."""
    y = np.asarray(y) > 0
    return (np.asarray(mask) > 0) & (y | ~y.any(1, keepdims=True))


def yearly_auc(y, mask, p):
    """AUROC of each year (T,) under censoring: y 0 or 1 (cancer by then), mask 1 where observed, p, all (n, T)."""
    y, p, use = np.asarray(y) > 0, np.asarray(p), in_year(y, mask)                      # (n, T) each
    return np.array([auc(y[use[:, t], t], p[use[:, t], t]) for t in range(y.shape[1])])


# ---- lesions ----

@dataclass
class Matched:
    """Predictions against lesions, P and G of them, in V images or volumes. What counts how often, as in a bootstrap
    draw, is said by weights (V + 1,): one for each volume, the last for predictions in volumes that are not listed."""
    score: np.ndarray           # (P,)
    lesion: np.ndarray          # (P,) the lesion that was hit, -1 for none
    volume: np.ndarray          # (P,) number of the volume, -1 for one that is not listed
    home: np.ndarray            # (G,) number of the volume of each lesion
    best: np.ndarray            # (G,) the highest score that hit it, -inf for none
    volumes: int                # V

    def each(self):
        """Every volume once; predictions in no listed volume are false positives all the same."""
        return np.ones(self.volumes + 1)

    def ill(self, weight=None):
        """`weight`, or 1, for the volumes that hold a lesion; 0 for the others and the unlisted."""
        held = np.bincount(self.home, minlength=self.volumes + 1) > 0
        return held * (self.each() if weight is None else weight)


def matched(volumes, truth, predictions, min_distance=100):
    """The challenge's rule. volumes [id, slices], truth [id, x, y, w, h, slice], predictions [id, x, y, w, h, z, depth,
    score], in pixels of the volume. -> Matched

    A prediction hits the nearest lesion whose centre is at most max(half its diagonal, min_distance) away in the plane
    and at most slices / 4 along z, where the prediction's centre is z + depth / 2. Nearest is the distance with pixels
    and slices added alike. (The challenge's page says "less than", its code "at most".) Truth without a slice has no
    rule along z, nor has a volume of infinitely many slices.
    """
    number, slices = {v[0]: i for i, v in enumerate(volumes)}, {v[0]: v[-1] for v in volumes}
    lesions, hit = defaultdict(list), []
    for g, row in enumerate(truth):
        if row[0] not in number:
            raise ValueError(f'a lesion lies in {row[0]}, which is not among the volumes')
        lesions[row[0]].append(g)
    for name, x, y, w, h, *extent, _ in predictions:        # extent: z and depth
        nearest, least = -1, math.inf
        for g in lesions.get(name, ()):
            _, gx, gy, gw, gh, *z = truth[g]
            dx, dy = x + w / 2 - gx - gw / 2, y + h / 2 - gy - gh / 2
            dz = extent[0] + extent[1] / 2 - z[0] if z else 0.0
            reached = math.hypot(dx, dy) <= max(math.hypot(gw, gh) / 2, min_distance)
            if reached and (not z or abs(dz) <= slices[name] / 4) and math.hypot(dx, dy, dz) < least:
                nearest, least = g, math.hypot(dx, dy, dz)
        hit.append(nearest)
    score, hit = np.array([row[-1] for row in predictions], float), np.array(hit, int)
    if not np.isfinite(score).all():
        raise ValueError('a score that is no finite number')
    best = np.full(len(truth), -np.inf)
    np.maximum.at(best, hit[hit >= 0], score[hit >= 0])
    return Matched(score, hit, np.array([number.get(row[0], -1) for row in predictions], int),
                   np.array([number[row[0]] for row in truth], int), best, len(volumes))


def curve(m, weight, every=False):
    """FROC: thresholds from high to low, false positives per volume and sensitivity at each, (n,) three times.

    The challenge puts its thresholds at the scores of hits and one beyond each end; `every` puts one at each score, for
    areas under a step curve. A volume counts as often as its `weight` says. Further hits on a lesion are neither true
    nor false positives. NaN where no volume or no lesion counts.
    """
    seen = weight[m.volume] > 0
    score, false, count = m.score[seen], m.lesion[seen] < 0, weight[m.volume[seen]]
    edges = (score.min() - 1, score.max() + 1) if len(score) else (0.0,)
    thresholds = np.unique(np.append(score if every else score[~false], edges))[::-1]

    def above(values, weights):
        """The weight of the values at or above each threshold."""
        order = np.argsort(values)
        total = np.append(0, np.cumsum(weights[order]))
        return total[-1] - total[np.searchsorted(values[order], thresholds)]

    volumes, lesions = weight[:-1].sum(), weight[m.home].sum()
    if not volumes or not lesions:
        return thresholds, np.full(len(thresholds), np.nan), np.full(len(thresholds), np.nan)
    return thresholds, above(score[false], count[false]) / volumes, above(m.best, weight[m.home]) / lesions


def sensitivity(m, rates, weight):
    """Sensitivity at these false positives per volume: linear between the points of the curve, held after the last."""
    _, false_positives, found = curve(m, weight)
    return np.interp(rates, false_positives, found)


def froc(volumes, truth, predictions, min_distance=100):
    """The challenge's numbers, keys as its evaluator has them: sensitivity at 1, 2, 3, 4 false positives per volume
    over the volumes with a lesion, their mean, which ranks, and at 2 over all volumes. Rows as in `matched`. Without a
    prediction all are 0; without a lesion they are not defined and NaN."""
    return challenge(matched(volumes, truth, predictions, min_distance))


def challenge(m):
    """`froc` of what is matched."""
    at = sensitivity(m, [1, 2, 3, 4], m.ill())
    return dict(sensitivity_at_2_fps_all=float(sensitivity(m, 2, m.each())),
                **{f'sensitivity_at_{k}_fps_positive': float(v) for k, v in zip((1, 2, 3, 4), at)},
                mean_sensitivity_positive=float(at.mean()))


def fauc(images, truth, predictions, min_distance=100, x=1.0):
    """FAUC-x (the paper on fused FFDM and SM): area under the FROC curve up to x false positives per image, divided by
    x. It does not say how it interpolates: here a step curve over all scores, the last sensitivity held to x.

    images: ids, numbers or strings, or rows that start with one; truth [id, x, y, w, h], predictions [id, x, y, w, h,
    score]; slices, where given, play no part."""
    images = [(image if np.ndim(image) == 0 else image[0], math.inf) for image in images]
    m = matched(images, [row[:5] for row in truth], predictions, min_distance)
    return step_area(m, m.each(), x)


def step_area(m, weight, x=1.0):
    """Area under the step curve up to x false positives per volume, divided by x."""
    _, false_positives, found = curve(m, weight, every=True)
    return float((np.diff(np.append(np.minimum(false_positives, x), x)) * found).sum() / x)


def caught(m, rate, weight):
    """Which lesions are found at the lowest threshold with at most `rate` false positives per volume, bool (G,)."""
    thresholds, false_positives, _ = curve(m, weight, every=True)
    allowed = np.flatnonzero(false_positives <= rate)       # none where no volume counts
    return m.best >= thresholds[allowed[-1]] if len(allowed) else np.zeros(len(m.best), bool)
