"""score.py: tables, tests and pictures come from predictions.csv alone."""
import json
import math

import numpy as np
import pytest
from PIL import Image

import metrics
import score


def head_run(folder, task='cancer', classes=('0', '1'), n=60, seed=0, per_patient=1, group=''):
    """A folder as finetune.py leaves it: random weights that guess, and an encoder with some skill."""
    folder.mkdir(parents=True)
    rng, C, lines = np.random.default_rng(seed), len(classes), []
    truth = np.random.default_rng(1).integers(0, C, n)
    for name, skill in (('random init', 0), ('pretrained', 1)):
        logits = rng.normal(size=(n, C)) + skill * np.eye(C)[truth]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        for i, (y, row) in enumerate(zip(truth, p)):
            lines.append((name, 1.0, f'u{i}', f'p{i // per_patient}', group and 'ab'[i % 2], classes[y],
                          classes[row.argmax()], *row))
    score.write_csv(folder / 'predictions.csv', ('encoder', 'share', 'unit', 'patient', 'group', 'target', 'predicted',
                                                 *(f'p_{c}' for c in classes)), lines)
    score.write_json(folder / 'run.json', dict(task=task, classes=classes, dataset='csv', head='linear', level='image',
                                               encoder='last.pt', subgroup=group))
    return folder


def drawn(picture):
    return np.array(Image.open(picture)).std() > 10


def test_a_table_holds_the_metrics_of_the_predictions_with_their_intervals(tmp_path, capsys):
    run, out = head_run(tmp_path / 'run', group='scanner'), tmp_path / 'out'
    score.main([str(run), '--out', str(out), '--draws', '50'])
    rows = json.loads((out / 'scores.json').read_text())['runs'][str(run)]
    value, low, high = rows['pretrained']['AUC']
    main = score.read_run(run)[-1]
    assert value == pytest.approx(metrics.auc(main.y, main.p[:, 1])) and low < value < high and 'a, n = 30' in rows
    text = capsys.readouterr().out
    assert f'{value:.3f}'.replace('0.', '.') in text and 'by scanner, pretrained' in text and 'DeLong' in text
    assert drawn(out / 'roc.png') and drawn(out / 'confusion.png')


def test_density_has_the_dense_half_and_the_share_off_by_more_than_one(tmp_path):
    result = score.read_run(head_run(tmp_path / 'run', 'density', tuple('abcd')))[-1]
    found = score.measure(result.run, *result.arrays())
    guess, y = result.guess, result.y
    assert found['AB or CD'] == np.mean([(g in (2, 3)) == (t in (2, 3)) for g, t in zip(guess, y)])
    assert found['off by > 1'] == np.mean([abs(int(g) - int(t)) > 1 for g, t in zip(guess, y)])


def test_the_weighted_mean_auroc_counts_each_cancer_of_a_year():
    run = dict(task='risk', classes=[f'year {t}' for t in range(1, 6)])
    y = np.array([[1, -1, -1, -1, -1]] * 3 + [[0, 1, -1, -1, -1]] + [[0] * 5] * 4)
    p = np.random.default_rng(0).random((8, 5)).cumsum(1)
    first = metrics.auc([1, 1, 1, 0, 0, 0, 0], p[[0, 1, 2, 4, 5, 6, 7], 0])     # a cancer of year 2 is no negative
    second = metrics.auc([1, 0, 0, 0, 0], p[3:, 1])
    found = score.measure(run, y, p, None)
    assert found['mean AUROC'] == pytest.approx((first + second) / 2) and math.isnan(found['year 3'])
    assert found['weighted AUROC'] == pytest.approx((3 * first + second) / 4)


def test_where_patients_have_several_units_the_test_is_a_bootstrap_over_patients(tmp_path):
    for per_patient, test in ((1, 'DeLong, cancer'), (2, 'bootstrap by patient')):
        one, two = score.read_run(head_run(tmp_path / test, per_patient=per_patient))
        v = score.versus(one, two, draws=40, seed=0)
        assert list(v['tests']) == [test] and len(v['naive']) == per_patient - 1
        assert v['difference'][0] == pytest.approx(metrics.auc(two.y, two.p[:, 1]) - metrics.auc(one.y, one.p[:, 1]))


def test_all_tests_of_a_comparison_are_one_family():
    found = dict(a=dict(tests=dict(x=0.01, y=math.nan)), b=dict(tests=dict(x=0.04)), c=dict(tests=dict(x=0.03)))
    score.adjust(found)
    assert [found[k]['adjusted']['x'] for k in 'abc'] == pytest.approx([0.03, 0.04, 0.04])
    assert math.isnan(found['a']['adjusted']['y'])


def test_runs_are_tested_against_each_other_on_the_same_units_alone(tmp_path, capsys):
    runs = [head_run(tmp_path / name, seed=seed, n=n) for name, seed, n in (('a', 1, 60), ('b', 2, 60), ('c', 3, 40))]
    runs += [head_run(tmp_path / task, task, tuple('abcd')) for task in ('density', 'birads')]
    score.main([*map(str, runs), '--out', str(tmp_path / 'out'), '--draws', '20'])
    text = capsys.readouterr().out
    assert f'{runs[1]} - {runs[0]}: ' in text and f'{runs[0]} and {runs[2]} were tested on different units' in text
    assert drawn(tmp_path / 'out' / 'radar.png')
    with pytest.raises(ValueError, match='holds a run, whose scores would be lost'):
        score.main([str(runs[0]), '--out', str(runs[1])])


def detector_run(folder, shift=0.0, slices=8):
    """Three volumes with a lesion each, in the challenge's format. The lesion of P1 is found unless the prediction is
    shifted, that of P2 always, that of P3 never."""
    folder.mkdir(parents=True)
    keys = [(patient, 'S', 'lcc') for patient in ('P1', 'P2', 'P3')]
    score.write_csv(folder / 'labels.csv', score.LABEL, [(*key, 0, 0, 0, 1) for key in keys])
    score.write_csv(folder / 'boxes.csv', score.BOX, [
        (*key, '', min(4, slices - 1), 300, 300, 50, 50, kind, '', slices)
        for key, kind in zip(keys, ('cancer', 'benign', 'benign'))])
    score.write_csv(folder / 'predictions.csv', score.PREDICTION, [
        (*keys[0], 300 + shift, 50, 300, 50, 3, 2, 0.9), (*keys[1], 300, 50, 300, 50, 3, 2, 0.8)])
    return folder


def test_runs_of_a_detector_get_the_challenges_numbers_and_the_lesions_they_miss(tmp_path):
    near, far = (str(detector_run(tmp_path / name, shift)) for name, shift in (('near', 0), ('far', 400)))
    score.main([near, far, '--out', str(tmp_path / 'out'), '--draws', '20'])
    scores = json.loads((tmp_path / 'out' / 'scores.json').read_text())
    assert scores['challenge'][near]['mean_sensitivity_positive'] == pytest.approx(2 / 3)
    assert scores['with_lesions'][far]['mean of 1-4'][0] == pytest.approx(1 / 3) and scores['min_distance'] == 100
    missed = scores['missed']['1']
    assert [[row[0][0] for row in missed[name]] for name in (f'{near} alone', 'none')] == [['P1'], ['P3']]
    assert drawn(tmp_path / 'out' / 'froc.png')
    with pytest.raises(ValueError, match='tested on different lesions'):
        score.main([near, str(detector_run(tmp_path / 'thick', slices=20)), '--out', str(tmp_path / 'out')])


def test_depth_plays_no_part_in_a_mammogram_and_slices_count_from_0(tmp_path):
    run = detector_run(tmp_path / 'run', slices=1)
    volumes, _, classes = score.read_truth(run / 'labels.csv', run / 'boxes.csv')
    assert dict(volumes)['P1', 'S', 'lcc'] == math.inf and list(classes) == ['cancer', 'benign', 'benign']
    (run / 'boxes.csv').write_text((run / 'boxes.csv').read_text().replace(',0,300', ',1,300', 1))
    with pytest.raises(ValueError, match='line 2: a box of 50x50 on slice 1 of 1'):
        score.read_truth(run / 'labels.csv', run / 'boxes.csv')
