"""Every number with its test: classification, resampling, lesions (DBT-DINO 2.5 and 6.2).

    auc(y, s)    f1(y, yhat, 4)    kappa(y, yhat, 4)        one number from n cases
    low, high = bootstrap(auc, [y, s], patients, rng)       its 95 % interval, over patients
    delong(y, s1, s2)    mcnemar(right1, right2)            two models on the same cases
    froc(volumes, truth, predictions)                       lesions, as the DBTex challenge scores them
    average_precision(truth, predictions, iou=0.5)          lesions, by overlap

Labels, scores and rows may be lists. A number that is not defined is NaN. n cases, C classes, T years;
V volumes or images, G lesions, P predictions. A box is x y w h in pixels, where x y is its upper left
corner. Copy this file alone; it imports nothing of this repository.
"""
import math
from collections import defaultdict

import numpy as np
from scipy import stats


# ---- classification -------------------------------------------------------------------------------

def auc(y, s):
    """Area under the ROC curve: y (n,) 0 or 1, s (n,) scores. NaN where one class is absent.

        AUC = P(s_i > s_j) + P(s_i = s_j) / 2           a random positive i, a random negative j
    """
    y = np.asarray(y) > 0
    positives, negatives = y.sum(), (~y).sum()
    if positives == 0 or negatives == 0:
        return math.nan
    ranks = stats.rankdata(s)                               # (n,) from 1; equal scores share their mean rank
    return float((ranks[y].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def roc(y, s):
    """False positive rate, true positive rate and threshold of each point from (0, 0) to (1, 1). There is one
    point for each distinct score; `s >= threshold` counts as positive."""
    order = np.argsort(-np.asarray(s), kind='stable')
    y, s = np.asarray(y)[order] > 0, np.asarray(s)[order]
    last = np.append(s[1:] != s[:-1], True)                 # of the cases with an equal score
    tp, fp, threshold = np.cumsum(y)[last], np.cumsum(~y)[last], s[last]
    fpr, tpr = fp / max(fp[-1], 1), tp / max(tp[-1], 1)
    return np.append(0, fpr), np.append(0, tpr), np.append(np.inf, threshold)


def youden(y, s):
    """The threshold with the largest sensitivity + specificity. Choose it on the validation set."""
    fpr, tpr, threshold = roc(y, s)
    return float(threshold[1 + np.argmax((tpr - fpr)[1:])])         # the first threshold is infinite


def confusion(y, yhat, classes):
    """Counts (C, C), truth by row, prediction by column. classes: C, or the C labels themselves."""
    labels = np.arange(classes) if np.ndim(classes) == 0 else np.asarray(classes)
    true, predicted = np.asarray(y)[:, None] == labels, np.asarray(yhat)[:, None] == labels     # (n, C)
    return (true.T.astype(float) @ predicted).astype(int)           # NumPy is slow at products of integers


def f1(y, yhat, classes, average='macro'):
    """F1 of a class = 2 TP / (2 TP + FP + FN), 0 where it neither occurs nor is predicted. average: 'macro',
    the plain mean over all classes, absent ones too (DBT-DINO 6.2.1; MammoDINO names no average);
    'weighted', by true frequency; 'micro', over all cases, which is accuracy."""
    counts = confusion(y, yhat, classes)
    tp, true, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    each, cases = 2 * tp / np.maximum(true + predicted, 1), max(true.sum(), 1)
    averages = dict(macro=each.mean(), weighted=(each * true).sum() / cases, micro=tp.sum() / cases)
    return float(averages[average])


def kappa(y, yhat, classes):
    """Cohen's kappa with quadratic weights, for ordered classes. NaN if all cases are of one class in both.

        kappa = 1 - sum_ij (i - j)^2 counts_ij / sum_ij (i - j)^2 row_i column_j / n        row, column: sums
    """
    counts = confusion(y, yhat, classes)
    i = np.arange(len(counts))
    weight = np.square(i[:, None] - i)                                                  # (C, C)
    chance = np.outer(counts.sum(1), counts.sum(0)) / max(counts.sum(), 1)
    observed, expected = (weight * counts).sum(), (weight * chance).sum()
    return float(1 - observed / expected) if expected else math.nan


def knn(similarity, labels, k=10, temp=0.07):
    """The k nearest neighbours vote with weights exp(similarity / temp), as in DINO: similarity (n, m) to m
    labelled cases, labels (m,) from 0 up -> share of the vote for each class (n, C). Put -inf on the diagonal
    of a square similarity to leave each case out of its own vote."""
    k = min(k, similarity.shape[1])
    near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]                           # (n, k)
    closeness = np.take_along_axis(similarity, near, 1) - similarity.max(1, keepdims=True)
    weight = np.exp(closeness / temp)                       # at most 1, so it cannot overflow
    votes = [(weight * (labels[near] == c)).sum(1) for c in range(labels.max() + 1)]
    votes = np.stack(votes, axis=1)                                                     # (n, C)
    return votes / votes.sum(1, keepdims=True)


def effective_rank(x):
    """RankMe: x (n, D) -> exp of the entropy of the singular values of x, scaled to sum 1."""
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x      # both have their squares as eigenvalues
    values = np.sqrt(np.linalg.eigvalsh(gram.astype(np.float64)).clip(0))
    share = values / max(values.sum(), 1e-12)
    return float(np.exp(-(share * np.log(share.clip(1e-12))).sum()))


def in_year(y, observed):
    """Which exams take part in the AUROC of each year, bool (n, T), as in DBT-DINO's code (6.2.2). Positives
    have cancer by that year, negatives have none in any of the T years, and both are observed in that year.
    y (n, T): 1 for cancer by then; observed (n, T): 0 or 1."""
    y = np.asarray(y) > 0
    return (np.asarray(observed) > 0) & (y | ~y.any(1, keepdims=True))


# ---- intervals and tests (DBT-DINO 2.5) -----------------------------------------------------------

def resample(metric, arrays, groups, rng, n=1000):
    """metric(*arrays) on n bootstrap draws -> (n,) or (n, m), NaN where undefined. groups: the patient of
    each row. Patients are drawn with replacement and keep all their rows, which are not independent."""
    arrays, values = [np.asarray(a) for a in arrays], []
    _, patient = np.unique(groups, return_inverse=True)     # numbers from 0
    rows = np.split(np.argsort(patient, kind='stable'), np.cumsum(np.bincount(patient))[:-1])
    for _ in range(n):
        drawn = np.concatenate([rows[j] for j in rng.integers(len(rows), size=len(rows))])
        values.append(metric(*(a[drawn] for a in arrays)))
    return np.array(values)


def bootstrap(metric, arrays, groups, rng, n=1000):
    """95 % interval (low, high) of metric(*arrays), over patients; arguments as in `resample`."""
    return interval(resample(metric, arrays, groups, rng, n))


def interval(values):
    """The percentiles 2.5 and 97.5 of the values on bootstrap draws; NaNs are left out."""
    values = np.asarray(values)
    values = values[~np.isnan(values)]
    return tuple(np.percentile(values, [2.5, 97.5])) if len(values) else (math.nan, math.nan)


def delong(y, s1, s2):
    """DeLong's test of two models on the same cases -> (auc1, auc2, p), two-sided (Sun and Xu 2014). Cases
    must be independent; where a patient has several, use the bootstrap over patients. p is NaN with fewer
    than two cases of a class, and 1 if both scores order the cases alike."""
    area1, area2 = auc(y, s1), auc(y, s2)
    y, scores = np.asarray(y) > 0, np.asarray((s1, s2), float)                          # (n,), (2, n)
    positives, negatives, ranks = y.sum(), (~y).sum(), stats.rankdata(scores, axis=1)
    if min(positives, negatives) < 2:                       # a single case has no variance
        return area1, area2, math.nan

    # Each AUC is the mean share of negatives that a positive beats, and of positives that beat a negative.
    beaten = (ranks[:, y] - stats.rankdata(scores[:, y], axis=1)) / negatives           # (2, positives)
    beating = 1 - (ranks[:, ~y] - stats.rankdata(scores[:, ~y], axis=1)) / positives    # (2, negatives)
    covariance = np.cov(beaten) / positives + np.cov(beating) / negatives
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]       # of area1 - area2
    if variance < 1e-18:
        return area1, area2, 1.0 if area1 == area2 else math.nan
    return area1, area2, float(2 * stats.norm.sf(abs(area1 - area2) / math.sqrt(variance)))


def mcnemar(a, b):
    """McNemar's test of two models on the same cases, a and b (n,) right or wrong -> p, two-sided. Only cases
    on which one is right and the other wrong count. The test is exact below 25 of them, else chi-squared
    with continuity correction."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    first, second = int((a & ~b).sum()), int((b & ~a).sum())
    if first + second < 25:
        return float(min(1.0, 2 * stats.binom.cdf(min(first, second), first + second, 0.5)))
    return float(stats.chi2.sf((abs(first - second) - 1) ** 2 / (first + second), 1))


def benjamini_hochberg(p):
    """p values (n,) -> adjusted (n,). Reject those <= alpha to keep the false discovery rate at alpha.

        adjusted_(i) = min over j >= i of p_(j) n / j               p_(1) <= ... <= p_(n)
    """
    p = np.asarray(p, float)
    order = np.argsort(p)[::-1]                             # the largest first
    adjusted = np.minimum.accumulate(p[order] * len(p) / np.arange(len(p), 0, -1))
    return adjusted[np.argsort(order)]


# ---- lesions by distance (DBTex) ------------------------------------------------------------------

class Matched:
    """Predictions matched to lesions, once for all curves and bootstrap draws. `weight` (V + 1,) says how
    often each volume counts: once, or as often as a draw holds it. Its last entry, index -1, is for
    predictions in volumes that are not listed. ValueError for a score that is not finite."""

    def __init__(self, names, truth, predictions, lesion):
        number, self.volumes = {name: v for v, name in enumerate(names)}, len(names)
        self.score = np.array([row[-1] for row in predictions], float)                  # (P,)
        self.lesion = np.array(lesion, int)                 # (P,) the lesion it hits, -1 for none
        self.volume = np.array([number.get(row[0], -1) for row in predictions], int)    # (P,)
        self.home = np.array([number[row[0]] for row in truth], int)        # (G,) volume of each lesion
        self.best = np.full(len(truth), -np.inf)            # (G,) highest score that hits it
        if not np.isfinite(self.score).all():
            raise ValueError('a score is NaN or infinite; give finite numbers')
        hits = self.lesion >= 0
        np.maximum.at(self.best, self.lesion[hits], self.score[hits])

    def each(self):
        """The weight 1 for every volume, and for unlisted ones: what lies there is a false positive."""
        return np.ones(self.volumes + 1)

    def ill(self, weight):
        """`weight` for volumes with a lesion, 0 for the others and for unlisted ones."""
        return weight * (np.bincount(self.home, minlength=self.volumes + 1) > 0)


def matched(volumes, truth, predictions, min_distance=100):
    """The rule of the DBTex challenge -> Matched. Rows: volumes [id, slices], truth [id, x, y, w, h, slice],
    predictions [id, x, y, w, h, z, depth, score]. Truth without `slice` is matched in the plane alone.

    A lesion is in reach if the centres lie at most max(half its diagonal, min_distance) pixels apart in the
    plane and a quarter of the volume's slices in depth (the challenge's page says "less than", its code "at
    most"). A prediction hits the nearest lesion in reach; for this distance a slice counts as a pixel.
    ValueError for a lesion in no listed volume."""
    slices = {row[0]: row[-1] for row in volumes}
    lesions, hit = defaultdict(list), []
    for g, row in enumerate(truth):
        if row[0] not in slices:
            raise ValueError(f'a lesion lies in {row[0]}, which is not among the volumes; list it')
        lesions[row[0]].append((g, *row[1:]))
    for name, x, y, w, h, *extent, _ in predictions:        # extent: z and depth
        nearest, least = -1, math.inf
        for g, gx, gy, gw, gh, *z in lesions[name]:
            dx, dy = x + w / 2 - gx - gw / 2, y + h / 2 - gy - gh / 2
            dz = extent[0] + extent[1] / 2 - z[0] if z else 0.0
            in_plane = math.hypot(dx, dy) <= max(math.hypot(gw, gh) / 2, min_distance)
            in_depth = not z or abs(dz) <= slices[name] / 4
            if in_plane and in_depth and math.hypot(dx, dy, dz) < least:
                nearest, least = g, math.hypot(dx, dy, dz)
        hit.append(nearest)
    return Matched([row[0] for row in volumes], truth, predictions, hit)


def curve(m, weight, every=False):
    """FROC -> thresholds from high to low, false positives per volume and sensitivity at each. Further hits
    on a lesion are neither true nor false positives. The challenge has thresholds at the scores of hits and
    one beyond each end; `every` puts one at the score of each false positive too, as the area under a step
    curve needs. NaN where the weight leaves no volume or no lesion."""
    seen = weight[m.volume] > 0
    score, false, count = m.score[seen], m.lesion[seen] < 0, weight[m.volume[seen]]
    ends = (score.min() - 1, score.max() + 1) if len(score) else (0.0,)
    thresholds = np.unique(np.append(score if every else score[~false], ends))[::-1]

    def above(values, weights):
        """The weight of the values at or above each threshold."""
        order = np.argsort(values)
        total = np.append(0, np.cumsum(weights[order]))
        return total[-1] - total[np.searchsorted(values[order], thresholds)]

    volumes, lesions = weight[:-1].sum() or math.nan, weight[m.home].sum() or math.nan
    false_positives, hits = above(score[false], count[false]), above(m.best, weight[m.home])
    return thresholds, false_positives / volumes, hits / lesions


def sensitivity(m, rates, weight):
    """Sensitivity at these rates of false positives per volume, linear between the points of the curve."""
    _, false_positives, sensitivities = curve(m, weight)
    return np.interp(rates, false_positives, sensitivities)         # constant beyond the last point


def froc(volumes, truth, predictions, min_distance=100):
    """The numbers of the DBTex challenge, named as by its evaluator: sensitivity at 1, 2, 3 and 4 false
    positives per volume with a lesion, their mean, which decides the ranking, and sensitivity at 2 over all
    volumes. Rows as in `matched`. Without predictions all are 0, without lesions NaN."""
    m = matched(volumes, truth, predictions, min_distance)
    positive = sensitivity(m, [1, 2, 3, 4], m.ill(m.each()))
    return {**{f'sensitivity_at_{k}_fps_positive': float(v) for k, v in enumerate(positive, 1)},
            'mean_sensitivity_positive': float(positive.mean()),
            'sensitivity_at_2_fps_all': float(sensitivity(m, 2, m.each()))}


def fauc(images, truth, predictions, min_distance=100, x=1.0):
    """FAUC-x (Sharma, arXiv 2408.08560, 4): `step_area` of images, matched in the plane. images: numbers
    or strings, or rows that start with one; truth [id, x, y, w, h], predictions [id, x, y, w, h, score]."""
    images = [(image if np.ndim(image) == 0 else image[0], math.inf) for image in images]
    m = matched(images, [row[:5] for row in truth], predictions, min_distance)
    return step_area(m, m.each(), x)


def step_area(m, weight, x=1.0):
    """Area under the FROC curve up to x false positives per volume, divided by x. The paper does not say how
    to interpolate: this is a step curve over all scores, which holds its last sensitivity up to x."""
    _, false_positives, sensitivities = curve(m, weight, every=True)
    widths = np.diff(np.append(np.minimum(false_positives, x), x))
    return float((widths * sensitivities).sum() / x)


def caught(m, rate, weight):
    """Lesions found at the lowest threshold with at most `rate` false positives per volume, bool (G,)."""
    thresholds, false_positives, _ = curve(m, weight, every=True)
    allowed = np.flatnonzero(false_positives <= rate)       # none where the weight leaves no volume
    return m.best >= thresholds[allowed[-1]] if len(allowed) else np.zeros(len(m.best), bool)


# ---- lesions by overlap (IHRRB-DINO 3) ------------------------------------------------------------

def overlapping(names, truth, predictions, threshold):
    """COCO's rule -> Matched, the predictions by falling score, at most 100 of an image. Each takes the free
    lesion that it overlaps most, if their IoU is at least `threshold`; then this lesion is no longer free.
    Rows as in `fauc`; names: the ids of the images."""
    free, count, kept, hit = defaultdict(dict), defaultdict(int), [], []
    for g, row in enumerate(truth):
        free[row[0]][g] = row[1:5]
    for row in sorted(predictions, key=lambda row: -row[-1]):
        lesions = free[row[0]]                              # {g: box}
        count[row[0]] += 1
        if count[row[0]] <= 100:
            iou = {g: box_iou(row[1:5], box) for g, box in lesions.items()}
            best = max(iou, key=iou.get, default=-1)
            hit.append(best if iou.get(best, -1) >= threshold else -1)
            lesions.pop(hit[-1], None)
            kept.append(row)
    return Matched(names, truth, kept, hit)


def box_iou(a, b):
    """Intersection over union of two boxes, 0 where both are empty."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    width = max(min(ax + aw, bx + bw) - max(ax, bx), 0)
    height = max(min(ay + ah, by + bh) - max(ay, by), 0)
    return width * height / max(aw * ah + bw * bh - width * height, 1e-12)


def precision_area(m, weight):
    """COCO's AP: the mean over recall 0, 0.01, ... 1 of the best precision at that recall or beyond."""
    count, lesions = weight[m.volume], weight[m.home].sum()
    if not lesions:
        return math.nan
    hits, shown = np.cumsum(count * (m.lesion >= 0)), np.maximum(np.cumsum(count), 1e-12)
    best = np.maximum.accumulate((hits / shown)[::-1])[::-1]
    best = np.append(best, 0)                               # for recall that is never reached
    return float(best[np.searchsorted(hits / lesions, np.linspace(0, 1, 101))].mean())


def average_precision(truth, predictions, iou):
    """AP at this IoU. truth [id, x, y, w, h], predictions [id, x, y, w, h, score]; NaN without a lesion."""
    names = {row[0] for row in (*truth, *predictions)}
    m = overlapping(names, truth, predictions, iou)
    return precision_area(m, m.each())


def localised(m, weight):
    """Top-1 localisation (our reading of IHRRB-DINO 3.3): the share of images with a lesion whose best box
    fits one."""
    images, best = np.unique(m.volume, return_index=True)   # the first of an image has its highest score
    with_lesion = np.unique(m.home)
    fits, count = np.isin(with_lesion, images[m.lesion[best] >= 0]), weight[with_lesion]
    return float((count * fits).sum() / count.sum()) if count.sum() else math.nan
