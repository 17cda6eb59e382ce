"""metrics.py: every number equals a trusted one, or the slow and obvious definition beside it."""
import json
import math
from itertools import product

import numpy as np
import pytest
from conftest import CASES

import metrics

STATS = json.loads((CASES / 'stats.json').read_text())      # roc_comparison, scikit-learn, statsmodels
FROC = json.loads((CASES / 'froc.json').read_text())        # the official BCS-DBT evaluator, and DBT-DINO's


# ---- classification -----------------------------------------------------------------------------------------------

def test_auc_is_the_chance_that_a_positive_scores_higher_and_roc_has_a_point_for_each_score():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y, s = np.append(rng.integers(0, 2, 30), (0, 1)), rng.integers(0, 9, 32)        # many ties
        pairs = [(a > b) + 0.5 * (a == b) for a, b in product(s[y == 1], s[y == 0])]
        assert metrics.auc(y, s) == pytest.approx(np.mean(pairs), abs=1e-12)
        fpr, tpr, thresholds = metrics.roc(y, s)
        assert thresholds.tolist() == [math.inf, *sorted(set(s), reverse=True)]
        assert fpr == pytest.approx([(s[y == 0] >= t).mean() for t in thresholds])
        assert tpr == pytest.approx([(s[y == 1] >= t).mean() for t in thresholds])
        gain = {t: (s[y == 1] >= t).mean() + (s[y == 0] < t).mean() for t in s}
        assert gain[metrics.youden(y, s)] == pytest.approx(max(gain.values()))
    assert math.isfinite(metrics.youden([0, 1], [.9, .1]))  # a classifier that is always wrong has one, too
    assert math.isnan(metrics.auc(np.ones(3), [1, 2, 3])) and math.isnan(metrics.auc(np.zeros(3), [1, 2, 3]))


def test_f1_kappa_and_the_auc_of_each_class_equal_scikit_learn():
    for c in STATS['cls']:
        y, guess, C, p = c['y'], c['yhat'], c['C'], np.array(c['prob'])
        assert metrics.f1(y, guess, C) == pytest.approx(c['f1_macro_all_labels'], abs=1e-9)
        assert metrics.f1(y, guess, C, 'weighted') == pytest.approx(c['f1_weighted'], abs=1e-9)
        assert metrics.f1(y, guess, C, 'micro') == pytest.approx(c['f1_micro'], abs=1e-9)
        assert metrics.kappa(y, guess, C) == pytest.approx(c['qwk'], abs=1e-9)
        if c['auc_macro_ovr'] is not None:
            areas = [metrics.auc(np.equal(y, k), p[:, k]) for k in range(C)]
            assert np.mean(areas) == pytest.approx(c['auc_macro_ovr'], abs=1e-9)


def test_confusion_has_truth_by_row_and_an_absent_class_counts_in_f1():
    assert metrics.confusion([0, 0, 1, 2], [1, 1, 1, 0], 3).tolist() == [[0, 2, 0], [0, 1, 0], [1, 0, 0]]
    assert metrics.confusion(list('aab'), list('bab'), ['b', 'a']).tolist() == [[1, 0], [1, 1]]
    assert metrics.f1([0, 1], [0, 1], 3) == pytest.approx(2 / 3)
    assert math.isnan(metrics.kappa([1, 1], [1, 1], 4))     # there is no agreement by chance to compare with


def test_neighbours_vote_by_their_similarity():
    rng = np.random.default_rng(0)
    similarity, labels = rng.uniform(-1, 1, (5, 30)), rng.integers(0, 3, 30)
    votes = metrics.knn(similarity, labels, k=7, temp=0.1)
    for row, found in zip(similarity, votes):
        slow = np.zeros(3)
        for j in np.argsort(-row)[:7]:
            slow[labels[j]] += math.exp(row[j] / 0.1)
        assert found == pytest.approx(slow / slow.sum(), abs=1e-12)


@pytest.mark.parametrize('shape', [(20, 6), (6, 20)])
def test_effective_rank_is_the_exponential_of_the_entropy_of_the_singular_values(shape):
    x = np.random.default_rng(0).normal(size=shape)
    share = np.linalg.svd(x, compute_uv=False)
    share /= share.sum()
    assert metrics.effective_rank(x) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_the_negatives_of_a_year_stay_healthy_and_are_observed_in_that_year():
    #             cancer in year 1   year 2            healthy, 5 years  healthy, 1 year seen
    y = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    seen = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    assert metrics.in_year(y, seen)[:, :2].T.tolist() == [[True, False, True, True], [False, True, True, False]]


# ---- intervals and tests ------------------------------------------------------------------------------------------

def test_the_bootstrap_of_a_mean_is_its_normal_interval_and_copies_of_a_patient_are_one_patient():
    values = np.random.default_rng(0).normal(1, 1, 400)
    alone = metrics.bootstrap(np.mean, [values], np.arange(400), np.random.default_rng(1))
    half = 1.96 * values.std() / 20
    # An end of the interval over 1,000 draws has a deviation of .0042: five seeds in a million are off by .02.
    assert alone == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    copied = metrics.bootstrap(np.mean, [np.tile(values, 4)], np.tile(np.arange(400), 4), np.random.default_rng(1))
    assert copied == pytest.approx(alone)


def test_draws_that_do_not_define_the_metric_are_left_out():
    y, s = np.r_[1, np.zeros(9)], np.random.default_rng(0).normal(size=10)
    values = metrics.resample(metrics.auc, [y, s], np.arange(10), np.random.default_rng(0), 500)
    # (1 - 1/10)^10 = .35 of the draws hold no positive; .15 are seven standard deviations.
    assert 0.2 < np.isnan(values).mean() < 0.5
    assert metrics.interval(values) == tuple(np.percentile(values[~np.isnan(values)], [2.5, 97.5]))
    assert all(map(math.isnan, metrics.interval([math.nan] * 20)))


def test_delong_equals_roc_comparison_and_has_no_p_where_it_has_no_variance():
    for c in STATS['delong']:
        assert metrics.delong(c['y'], c['s1'], c['s2']) == pytest.approx((c['auc1'], c['auc2'], c['p']), abs=1e-9)
    y, s = np.array([0, 0, 1, 1, 1]), np.array([.1, .4, .3, .8, .9])
    assert metrics.delong(y, s, s ** 3)[2] == 1             # the same order
    assert math.isnan(metrics.delong(y, y, -y)[2])          # a difference of 1 without variance
    assert math.isnan(metrics.delong([0, 0, 1], [1, 2, 3], [3, 2, 1])[2])               # a single positive


def test_mcnemar_counts_discordant_cases_only_and_is_exact_below_25():
    for c in STATS['mcnemar']:                              # all below 25
        assert metrics.mcnemar(c['a'], c['b']) == pytest.approx(c['exact'][1], abs=1e-9)
    exact = 2 * sum(math.comb(24, k) for k in range(8)) / 2 ** 24                       # 7 against 17
    corrected = math.erfc((18 - 7 - 1) / math.sqrt(2 * 25))                             # 7 against 18
    for n, p in ((24, exact), (25, corrected)):
        wins = np.arange(n) < 7
        assert metrics.mcnemar(wins, ~wins) == pytest.approx(p)
    assert metrics.mcnemar(wins, wins) == 1


def test_benjamini_hochberg_equals_statsmodels():
    for c in STATS['bh']:
        assert metrics.benjamini_hochberg(c['p']) == pytest.approx(np.array(c['p_adj']), abs=1e-9)


# ---- lesions by distance ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('c', FROC, ids=lambda c: c.get('name', f"{len(c['pred'])} predictions"))
def test_froc_and_fauc_equal_the_evaluators_of_the_challenge_and_of_dbt_dino(c):
    found = metrics.froc(c['volumes'], c['gt'], c['pred'], c['min_dist'])
    assert found == pytest.approx(c['expected'], abs=1e-9)
    if 'fauc1_step' in c:
        names, ill = [row[0] for row in c['volumes']], sorted({row[0] for row in c['gt']})
        truth, predictions = [row[:5] for row in c['gt']], [[*row[:5], row[-1]] for row in c['pred']]
        found = metrics.fauc(names, truth, predictions, c['min_dist'])
        assert found == pytest.approx(c['fauc1_step'], abs=1e-9)
        found = metrics.fauc(ill, truth, [row for row in predictions if row[0] in ill], c['min_dist'])
        assert found == pytest.approx(c['fauc1_step_positive_images'], abs=1e-9)


def test_without_predictions_all_is_zero_and_what_is_not_defined_is_nan_or_refused():
    volumes, lesion = [[0, 40], [1, 40]], [0, 10, 10, 50, 50, 20]
    assert set(metrics.froc(volumes, [lesion], []).values()) == {0.0}
    assert metrics.fauc([0, 1], [lesion[:5]], []) == metrics.average_precision([lesion[:5]], [], 0.5) == 0
    assert all(math.isnan(v) for v in metrics.froc(volumes, [], []).values())
    assert math.isnan(metrics.fauc([0, 1], [], [])) and math.isnan(metrics.average_precision([], [], 0.5))
    with pytest.raises(ValueError, match='a lesion lies in 7'):
        metrics.froc(volumes, [[7, *lesion[1:]]], [])
    with pytest.raises(ValueError, match='a score is NaN or infinite'):
        metrics.froc(volumes, [lesion], [[*lesion, 1, math.nan]])


def test_an_unusable_test_volume_without_predictions_counts_as_missed():
    """DBT-DINO's code drops volumes without a prediction from the denominator, which would give 3 / 4."""
    volumes, truth = [[i, 40] for i in range(5)], [[i, 10, 10, 50, 50, 20] for i in range(5)]
    predictions = [[i, 10, 10, 50, 50, 20, 1, .9] for i in range(3)] + [[3, 900, 900, 50, 50, 20, 1, .8]]
    flat = [row[:5] for row in truth]
    assert metrics.froc(volumes, truth, predictions)['mean_sensitivity_positive'] == 3 / 5
    assert metrics.fauc(volumes, flat, predictions) == 3 / 5
    assert metrics.average_precision(flat, predictions, 0.5) == pytest.approx(61 / 101)     # recall 0 ... .6


def test_bootstrap_weights_count_volumes_as_copies_would():
    c = next(c for c in FROC if len(c['gt']) > 15 and c['min_dist'] == 100)
    rng, flat = np.random.default_rng(0), [row[:5] for row in c['gt']]
    names, slices = [v[0] for v in c['volumes']], dict(map(tuple, c['volumes']))        # names 0, 1, ...
    m = metrics.matched(c['volumes'], c['gt'], c['pred'], 100)
    plane = metrics.matched([[name, math.inf] for name in names], flat, c['pred'], 100)
    by_overlap = metrics.overlapping(names, flat, c['pred'], 0.3)
    for _ in range(5):
        drawn = rng.integers(len(names), size=len(names))
        copies = list(enumerate(drawn))
        volumes = [[f'copy {k}', slices[name]] for k, name in copies]
        truth = [[f'copy {k}', *row[1:]] for k, name in copies for row in c['gt'] if row[0] == name]
        predictions = [[f'copy {k}', *row[1:]] for k, name in copies for row in c['pred'] if row[0] == name]
        weight = np.append(np.bincount(drawn, minlength=len(names)), 1.0)

        expected = metrics.froc(volumes, truth, predictions, 100)
        at = metrics.sensitivity(m, [1, 2, 3, 4], m.ill(weight))
        assert at.mean() == pytest.approx(expected['mean_sensitivity_positive'], abs=1e-12)
        assert metrics.sensitivity(m, 2, weight) == pytest.approx(expected['sensitivity_at_2_fps_all'], abs=1e-12)
        truth = [row[:5] for row in truth]
        area = metrics.fauc([v[0] for v in volumes], truth, predictions, 100)
        assert metrics.step_area(plane, weight) == pytest.approx(area, abs=1e-12)
        area = metrics.average_precision(truth, predictions, 0.3)
        assert metrics.precision_area(by_overlap, weight) == pytest.approx(area, abs=1e-12)


def test_lesions_caught_are_found_at_a_rate_of_false_positives_and_fauc_holds_the_last_sensitivity():
    volumes, truth = [[i, math.inf] for i in range(2)], [[0, 0, 0, 10, 10], [1, 0, 0, 10, 10]]
    predictions = [[0, 0, 0, 10, 10, .9], [0, 500, 500, 10, 10, .8], [0, 700, 500, 10, 10, .7], [1, 0, 0, 10, 10, .6]]
    m = metrics.matched(volumes, truth, predictions)
    assert metrics.caught(m, 0.5, m.each()).tolist() == [True, False]
    assert metrics.caught(m, 1.0, m.each()).tolist() == [True, True]
    assert metrics.caught(m, 1.0, 0 * m.each()).tolist() == [False, False]              # a draw without volumes
    assert metrics.step_area(m, m.each(), x=2) == 0.75      # half of them up to one false positive, then all


# ---- lesions by overlap -------------------------------------------------------------------------------------------

def test_iou_is_the_share_of_common_pixels():
    rng = np.random.default_rng(0)
    for a, b in rng.integers(0, 12, (50, 2, 4)):
        masks = np.zeros((2, 24, 24), bool)
        for mask, (x, y, w, h) in zip(masks, (a, b)):
            mask[y:y + h, x:x + w] = True
        assert metrics.box_iou(a, b) == (masks[0] & masks[1]).sum() / max((masks[0] | masks[1]).sum(), 1)


def test_average_precision_by_hand():
    truth = [['a', 0, 0, 10, 10], ['a', 50, 50, 10, 10], ['b', 0, 0, 10, 10]]
    right, far, low = ['a', 0, 0, 10, 10, .9], ['a', 200, 0, 10, 10, .8], ['b', 0, 0, 10, 9, .7]
    again = ['a', 0, 1, 10, 10, .85]                        # the lesion is taken: a false positive
    # Precision is 1 for recall 0 ... .33, then 2 of 4 up to .66.
    assert metrics.average_precision(truth, [low, right, again, far], 0.5) == pytest.approx((34 + 33 * 0.5) / 101)
    assert metrics.average_precision(truth, [low], 0.9) == pytest.approx(34 / 101)      # an IoU of exactly .9 fits


def test_a_prediction_takes_the_free_lesion_that_it_overlaps_most_and_a_hundred_of_an_image_count():
    truth = [['a', 0, 0, 10, 10], ['a', 4, 0, 10, 10]]
    first, second = ['a', 3, 0, 10, 10, .9], ['a', 4, 0, 10, 10, .8]        # both overlap the second lesion most
    assert metrics.overlapping(['a'], truth, [second, first], 0.3).lesion.tolist() == [1, 0]
    assert metrics.overlapping(['a'], truth, [second, first], 0.5).lesion.tolist() == [1, -1]
    hit, far = ['a', 0, 0, 10, 10, .1], ['a', 90, 0, 10, 10, .9]
    assert metrics.average_precision(truth[:1], [hit, *[far] * 99], 0.5) == pytest.approx(0.01)
    assert metrics.average_precision(truth[:1], [hit, *[far] * 100], 0.5) == 0


def test_top_1_localisation_looks_at_the_best_prediction_of_each_image_with_a_lesion():
    truth = [['a', 0, 0, 10, 10], ['b', 0, 0, 10, 10], ['b', 50, 0, 10, 10]]
    predictions = [['a', 200, 0, 10, 10, .8], ['a', 0, 0, 10, 10, .7], ['b', 50, 0, 10, 9, .5], ['c', 0, 0, 9, 9, .9]]
    m = metrics.overlapping('abc', truth, predictions, 0.5)
    assert metrics.localised(m, np.ones(4)) == 0.5          # the best of a fits no lesion, that of b does
    assert metrics.localised(m, np.array([1, 3, 5, 1])) == 0.75
    assert math.isnan(metrics.localised(m, np.array([0, 0, 1, 1])))
