"""Tables, tests and pictures from predictions.csv alone (MammoDINO Tables 1-5 and Fig. 2; DBT-DINO 2.5, 3).

    $ python score.py RUN_A RUN_B                   # runs of finetune.py, or of detect.py and fuse.py
    $ python score.py submission.csv --labels LABELS.csv --boxes BOXES.csv    # the DBTex challenge's format

A run of finetune.py leaves predictions.csv, one line per encoder, share of the training set and unit, and
run.json. A run of detect.py leaves predictions.csv, labels.csv and boxes.csv in the challenge's format.
Intervals are 95 % bootstrap percentiles over patients, whose units or volumes stay together.

n units (images, breasts or exams), C classes, T years, V volumes, G lesions.
"""
import argparse
import csv
import itertools
import json
import math
import os
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import metrics
from datasets import number, table
from run import script

BINARY = ('cancer', 'lesion')                   # tasks with two classes, the negative first
ORDERED = ('birads', 'density')                 # tasks whose classes have an order


# ---- tables ---------------------------------------------------------------------------------------

def print_table(title, rows):
    """rows: {label: {column: (value, low, high)}}, all with the same columns."""
    columns = list(next(iter(rows.values())))
    print(f'\n{title}\n{"":38}' + ''.join(f'{name:>22}' for name in columns))
    for label, cells in rows.items():
        print(f'  {label:36.36}' + ''.join(f'{cell(cells[name]):>22}' for name in columns))


def cell(values, sign=''):
    """(.812, .774, .85) -> '.812 [.774, .850]'"""
    value, low, high = (f'{v:{sign}.3f}'.replace('0.', '.') if v == v else '-' for v in values)
    return f'{value} [{low}, {high}]'


def write_json(path, values):
    """JSON has no NaN, so that becomes null; arrays become lists, keys text."""
    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(v) for key, v in value.items()}
        if isinstance(value, (list, tuple, np.ndarray)):
            return [plain(v) for v in value]
        value = value.item() if isinstance(value, np.generic) else value
        return None if isinstance(value, float) and not math.isfinite(value) else value

    Path(path).write_text(json.dumps(plain(values), indent=1, allow_nan=False))


def write_csv(path, header, rows):
    with open(path, 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file).writerows([header, *rows])


# ---- heads: classes, density, risk (runs of finetune.py) ------------------------------------------

@dataclass
class Result:
    """What one encoder with its head predicts for the test units of one run."""
    run: dict                   # run.json: task, classes, dataset, level, encoder, ...
    encoder: str                # 'random init', 'DINOv2' or 'pretrained'
    share: float                # of the training patients
    units: list                 # n names
    patients: np.ndarray        # (n,)
    groups: np.ndarray          # (n,) value of the subgroup column
    y: np.ndarray               # (n,) class; risk: (n, T) 1 cancer by then, 0 none, -1 not observed
    p: np.ndarray               # (n, C) probabilities; risk: (n, T) risk within each year
    guess: np.ndarray           # (n,) class; risk: zeros

    def arrays(self, use=slice(None)):
        return self.y[use], self.p[use], self.guess[use]


def read_run(folder):
    """A run of finetune.py -> its Results, the main encoder on all training patients last."""
    run = json.loads((Path(folder) / 'run.json').read_text())
    classes, risk, lines = run['classes'], run['task'] == 'risk', defaultdict(list)
    for line in table(Path(folder) / 'predictions.csv', 'encoder', 'share', 'unit'):
        lines[line['encoder'], float(line['share'])].append(line)

    def target(line):
        return [int(v) for v in line['target'].split()] if risk else classes.index(line['target'])

    return [Result(run | dict(folder=str(folder)), encoder, share, [line['unit'] for line in of],
                   np.array([line['patient'] for line in of]),
                   np.array([line['group'] for line in of]),
                   np.array([target(line) for line in of]),
                   np.array([[float(line[f'p_{name}']) for name in classes] for line in of]),
                   np.array([0 if risk else classes.index(line['predicted']) for line in of]))
            for (encoder, share), of in lines.items()]


def questions(run, y):
    """What a task asks as yes or no -> {name: (use (n,), truth, column)}: has this unit cancer; in this year,
    of the exams that take part in it; or is it this class, against all others. Each has a ROC curve of
    p[use, column]."""
    task, classes = run['task'], run['classes']
    if task == 'risk':
        use = metrics.in_year(y, y >= 0)                                                # (n, T)
        return {name: (use[:, t], y[use[:, t], t] > 0, t) for t, name in enumerate(classes)}
    everyone = np.ones(len(y), bool)
    if task in BINARY:
        return {task: (everyone, y == 1, 1)}
    return {name: (everyone, y == c, c) for c, name in enumerate(classes)}


def measures(run):
    """{name: metric(y, p, guess)} of a task. The first is the one that encoders are compared by."""
    task, C = run['task'], len(run['classes'])

    def areas(y, p):                                        # one for each question
        return np.array([metrics.auc(truth, p[use, column])
                         for use, truth, column in questions(run, y).values()])

    def mean_area(y, p, weighted):                          # over the years in which it is defined
        found = areas(y, p)
        cancers = np.array([truth.sum() for _, truth, _ in questions(run, y).values()])
        weight, there = cancers if weighted else np.ones(C), ~np.isnan(found)
        return np.average(found[there], weights=weight[there]) if there.any() else math.nan

    def share(hits):
        return hits.mean() if len(hits) else math.nan

    if task == 'risk':                                      # plain, and by the cancers of each year (6.2.2)
        years = {name: lambda y, p, _, t=t: areas(y, p)[t] for t, name in enumerate(run['classes'])}
        return {'mean AUROC': lambda y, p, _: mean_area(y, p, False),
                'weighted AUROC': lambda y, p, _: mean_area(y, p, True), **years}
    if task in BINARY:
        return {'AUC': lambda y, p, guess: areas(y, p)[0],
                'sensitivity': lambda y, p, guess: share(guess[y == 1] == 1),
                'specificity': lambda y, p, guess: share(guess[y == 0] == 0)}
    found = {'accuracy': lambda y, p, guess: (guess == y).mean(),
             'macro F1': lambda y, p, guess: metrics.f1(y, guess, C),
             'macro AUC': lambda y, p, guess: areas(y, p).mean()}
    if task in ORDERED and '0' not in run['classes']:       # BI-RADS 0, incomplete, has no place in the order
        found['kappa'] = lambda y, p, guess: metrics.kappa(y, guess, C)
    if task == 'density' and C == 4:                        # DBT-DINO 3.2
        found['AB or CD'] = lambda y, p, guess: ((guess > 1) == (y > 1)).mean()
        found['off by > 1'] = lambda y, p, guess: (abs(guess - y) > 1).mean()
    return found


def estimate(metric, arrays, patients, draws, seed):
    """-> (value, low, high), and the values on those bootstrap draws on which the metric is defined."""
    values = metrics.resample(metric, arrays, patients, np.random.default_rng(seed), draws)
    values = values[~np.isnan(values)]
    low, high = np.percentile(values, [2.5, 97.5]) if len(values) else (math.nan, math.nan)
    return (float(metric(*arrays)), float(low), float(high)), values


def measured(result, use, draws, seed):
    """{metric: (value, low, high)} over the units `use`."""
    return {name: estimate(metric, result.arrays(use), result.patients[use], draws, seed)[0]
            for name, metric in measures(result.run).items()}


def versus(a, b, draws, seed):
    """b against a on the same units -> dict of `difference` of their first metric (value, low, high), `tests`
    {name: p}, and `naive` {name: p}.

    The test is DeLong's for what has a ROC curve, McNemar's for classes. Both assume independent units. Where
    patients have several, the test is a bootstrap over patients and theirs is reported as naive."""
    metric = next(iter(measures(a.run).values()))

    def difference(y, p_a, guess_a, p_b, guess_b):
        return metric(y, p_b, guess_b) - metric(y, p_a, guess_a)

    gap, values = estimate(difference, (*a.arrays(), *b.arrays()[1:]), a.patients, draws, seed)
    if a.run['task'] in (*BINARY, 'risk'):
        tests = {f'DeLong, {name}': metrics.delong(truth, a.p[use, column], b.p[use, column])[2]
                 for name, (use, truth, column) in questions(a.run, a.y).items()}
    else:
        tests = {'McNemar': metrics.mcnemar(a.guess == a.y, b.guess == b.y)}
    if len(set(a.patients)) == len(a.y):
        return dict(difference=gap, tests=tests, naive={})
    beyond = 1 + min((values <= 0).sum(), (values >= 0).sum())      # two-sided: twice the smaller tail
    p = min(1, 2 * beyond / (1 + len(values))) if len(values) else math.nan
    return dict(difference=gap, tests={'bootstrap by patient': float(p)}, naive=tests)


def heads(folders, out, draws=1000, seed=0):
    """Runs of finetune.py -> tables, scores.json, roc.png, confusion.png; fraction.png of a run with several
    shares of the training set; radar.png of three tasks or more."""
    runs = {str(folder): read_run(folder) for folder in folders}
    told = {folder: head_tables(results, draws, seed) for folder, results in runs.items()}
    pairs = {f'{folder}: {main.encoder} - {other.encoder}'
             + f', {other.share:.0%}' * (other.share < 1): (other, main)
             for folder, results in runs.items() for other, main in against_main(results)}
    for (a, of_a), (b, of_b) in itertools.combinations(runs.items(), 2):
        one, two = of_a[-1], of_b[-1]
        alike = all(one.run[key] == two.run[key] for key in ('task', 'dataset', 'classes'))
        if alike and one.units == two.units and np.array_equal(one.y, two.y):
            pairs[f'{b} - {a}'] = one, two
        elif alike:
            print(f'{a} and {b} were tested on different units: no test')
    found = {name: versus(*pair, draws, seed) for name, pair in pairs.items()}
    adjust(found)
    for name, v in found.items():
        print(f'{name}: {difference_text(v)}')
    write_json(out / 'scores.json', dict(runs=told, differences=found, draws=draws, seed=seed))
    head_pictures(runs, told, out)


def against_main(results):
    """Pairs (other, main encoder) of the same share of the training set."""
    main = {r.share: r for r in results if r.encoder == results[-1].encoder}
    return [(r, main[r.share]) for r in results if r.encoder != results[-1].encoder]


def adjust(comparisons):
    """Adds `adjusted` p values: Benjamini-Hochberg over all tests of all comparisons as one family."""
    family = [(v, test) for v in comparisons.values() for test, p in v['tests'].items() if p == p]
    fair = metrics.benjamini_hochberg([v['tests'][test] for v, test in family])
    for v in comparisons.values():
        v['adjusted'] = dict.fromkeys(v['tests'], math.nan)
    for (v, test), p in zip(family, fair):
        v['adjusted'][test] = float(p)


def difference_text(v):
    """'+.038 [-.002, +.077]; McNemar p = .06, adjusted .12'"""
    parts = [cell(v['difference'], '+')]
    parts += [f"{test} p = {p:.3g}, adjusted {v['adjusted'][test]:.3g}"
              for test, p in v['tests'].items()]
    parts += [f'{test} p = {p:.3g} if units were independent' for test, p in v['naive'].items()]
    return '; '.join(parts)


def head_tables(results, draws, seed):
    """Prints a run's table and that of its subgroups -> {row: {metric: (value, low, high)}}"""
    main = results[-1]
    run, n, patients = main.run, len(main.y), len(set(main.patients))
    cases = ', '.join(f'{name} {truth.sum()} of {len(truth)}'
                      for name, (_, truth, _) in questions(run, main.y).items())
    print(f"\n{run['folder']}: {run['task']} of {run['dataset']}, {run['head']} head, "
          f"encoder {run['encoder']}")
    rows = {r.encoder + f', {r.share:.0%}' * (r.share < 1): measured(r, slice(None), draws, seed)
            for r in results}
    print_table(f"test: {n} {run['level']}s of {patients} patients ({cases})", rows)
    if any(main.groups):
        members = {value: main.groups == value for value in sorted(set(main.groups))}
        groups = {f'{value}, n = {use.sum()}': measured(main, use, draws, seed)
                  for value, use in members.items()}
        print_table(f"by {run['subgroup']}, {main.encoder}", groups)
        rows |= groups
    return rows


# ---- boxes (runs of detect.py, submissions to the DBTex challenge) --------------------------------

KEY = ('PatientID', 'StudyUID', 'View')
PREDICTION = (*KEY, 'X', 'Width', 'Y', 'Height', 'Z', 'Depth', 'Score')
BOX = (*KEY, 'Subject', 'Slice', 'X', 'Y', 'Width', 'Height', 'Class', 'AD', 'VolumeSlices')
LABEL = (*KEY, 'Normal', 'Actionable', 'Benign', 'Cancer')
IOUS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)             # IHRRB-DINO's table prints all but the last
RATES = (1, 2, 3, 4)                                        # false positives per volume


def key_of(line):
    return tuple(line[name] for name in KEY)


def read_truth(labels, boxes):
    """The challenge's labels and boxes -> volumes [key, slices], truth [key, x, y, w, h, slice], classes.
    A volume of one slice is a mammogram, where depth plays no part: it counts as infinitely many."""
    slices, truth, classes = {}, [], []
    for line in table(labels, *KEY):
        if key_of(line) in slices:
            raise ValueError(f"{labels}: {'/'.join(key_of(line))} is listed twice; remove one line")
        slices[key_of(line)] = math.inf
    names = ('X', 'Y', 'Width', 'Height', 'Slice', 'VolumeSlices')
    for line in table(boxes, *KEY, *names, 'Class'):
        key, (x, y, w, h, z, count) = key_of(line), [number(line, name, boxes) for name in names]
        if key not in slices:
            raise ValueError(f"{boxes}: a box in {'/'.join(key)}, which {labels} does not list")
        if not 0 <= z < count or w <= 0 or h <= 0:
            raise ValueError(f"{boxes}: a box of {w:g}x{h:g} on slice {z:g} of {count:g} in "
                             f"{'/'.join(key)}; expected a size, and slices that count from 0")
        if slices[key] == math.inf:                         # the challenge takes the first row's
            slices[key] = count if count > 1 else math.inf
        truth.append((key, x, y, w, h, z))
        classes.append(line['Class'])
    return list(slices.items()), truth, np.array(classes)


def read_predictions(path):
    """The challenge's submission -> rows [key, x, y, w, h, z, depth, score]. An empty file has none."""
    path = Path(path) / 'predictions.csv' if os.path.isdir(path) else Path(path)
    if path.is_file() and not path.stat().st_size:
        return []
    names = ('X', 'Y', 'Width', 'Height', 'Z', 'Depth', 'Score')
    return [(key_of(line), *(number(line, name, path) for name in names))
            for line in table(path, *PREDICTION)]


class Scored:
    """One detector's predictions against the truth. Every number is a function of the weights of the volumes,
    (V + 1,), the last for volumes that are not listed, so that a bootstrap draw costs no matching."""

    def __init__(self, volumes, truth, predictions, min_distance):
        images, flat = [(key, math.inf) for key, _ in volumes], [row[:5] for row in truth]
        numbered = {key: i for i, (key, _) in enumerate(volumes)}
        self.m = metrics.matched(volumes, truth, predictions, min_distance)
        self.flat = metrics.matched(images, flat, predictions, min_distance)    # slices play no part
        self.boxes = [metrics.overlapping(flat, predictions, iou, numbered) for iou in IOUS]

    def with_lesions(self, weight):
        """Sensitivity at 1, 2, 3, 4 false positives per volume with a lesion, and their mean: (5,)"""
        at = metrics.sensitivity(self.m, RATES, self.m.ill(weight))
        return np.append(at, at.mean())

    def everywhere(self, weight):
        """The same over all volumes: (5,)"""
        at = metrics.sensitivity(self.m, RATES, weight)
        return np.append(at, at.mean())

    def caught(self, weight, rate=4):
        """(G,) lesions found at the last score with at most `rate` false positives per volume with one"""
        return metrics.caught(self.m, rate, self.m.ill(weight))

    def classes(self, weight, chosen):
        """The share of each class of lesions found there; chosen (classes, G) -> (classes,)"""
        count = weight[self.m.home] * chosen
        return (count * self.caught(weight)).sum(1) / count.sum(1)

    def fauc(self, weight):
        """FAUC-1 over all images, and FAUC-1+ over those with a lesion (Sharma 4): (2,)"""
        return np.array([metrics.step_area(self.flat, w) for w in (weight, self.flat.ill(weight))])

    def overlap(self, weight):
        """AP and top-1 localisation at each of IOUS (IHRRB-DINO 3): (2, 8)"""
        return np.array([[metrics.precision_area(of, weight) for of in self.boxes],
                         [metrics.localised(of, weight) for of in self.boxes]])


def lesions(runs, volumes, truth, classes, min_distance, draws, seed, out, notes=()):
    """Detectors {name: predictions} on the same volumes -> tables, scores.json, froc.png. volumes, truth and
    predictions are rows as `metrics.froc` takes them; classes (G,) of the lesions."""
    if not truth:
        raise ValueError('no lesion in the test set, so there is no sensitivity')
    scored = {name: Scored(volumes, truth, rows, min_distance) for name, rows in runs.items()}
    names, patient = np.unique([key[0] for key, _ in volumes], return_inverse=True)
    rng, ones = np.random.default_rng(seed), np.ones(len(volumes) + 1)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)     # with replacement
    weights = np.column_stack([times[:, patient], np.ones(draws)])                      # (draws, V + 1)

    def intervals(metric):
        """metric(weight) -> (n,); with its percentiles, (n, 3)"""
        with np.errstate(invalid='ignore'), warnings.catch_warnings():
            warnings.simplefilter('ignore', RuntimeWarning)                 # of a class that no draw holds
            drawn = np.array([metric(weight) for weight in weights])
            return np.column_stack([metric(ones), *np.nanpercentile(drawn, [2.5, 97.5], axis=0)])

    def lines(title, columns, metric):
        rows = {name: dict(zip(columns, intervals(partial(metric, s)).tolist()))
                for name, s in scored.items()}
        print_table(title, rows)
        return rows

    kinds = {name: classes == name for name in sorted(set(classes))}
    ill = len({row[0] for row in truth})
    counted = ', '.join(f'{name} {of.sum()}' for name, of in kinds.items())
    print(f'\n{len(volumes)} images or volumes of {len(names)} patients, {ill} with {len(truth)} lesions: '
          f'{counted}; a hit is within max(half the diagonal, {min_distance:g} pixels)')
    for name, s in scored.items():
        if (s.m.volume < 0).any():
            print(f'  {name}: {(s.m.volume < 0).sum()} predictions in volumes that are not listed')
    columns = [*(f'{rate} FP' for rate in RATES), 'mean of 1-4']
    told = dict(
        challenge={name: metrics.froc(volumes, truth, rows, min_distance)
                   for name, rows in runs.items()},
        with_lesions=lines('sensitivity, volumes with a lesion', columns, Scored.with_lesions),
        all=lines('sensitivity, all volumes', columns, Scored.everywhere),
        classes=lines('found within 4 FP, with a lesion', [*kinds],
                      lambda s, w: s.classes(w, np.array([*kinds.values()]))),
        fauc=lines('area up to 1 FP', ['FAUC-1', 'FAUC-1+'], Scored.fauc),
        overlap=overlap_table({name: s.overlap(ones) for name, s in scored.items()}),
        overlap_mean=lines('mean over IoU', ['AP', 'top-1'], lambda s, w: s.overlap(w).mean(1)),
        differences=detector_differences(scored, intervals), missed=missed(scored, truth, ones))
    about = dict(min_distance=min_distance, draws=draws, seed=seed, notes=list(notes))
    write_json(out / 'scores.json', told | about)
    means = {name: cell(values['mean of 1-4']) for name, values in told['with_lesions'].items()}
    chart({f'{name}, mean {means[name]}': metrics.curve(s.m, s.m.ill(ones))[1:]
           for name, s in scored.items()},
          'false positives per volume with a lesion', 'sensitivity', most=5).save(out / 'froc.png')


def overlap_table(found):
    """IHRRB-DINO's table. found {name: (2, 8)}: AP and top-1 localisation at IOUS, whatever the slice."""
    print(f'\n{"IoU":38}' + ''.join(f'{iou:7.1f}' for iou in IOUS) + '   mean')
    for i, title in enumerate(('AP', 'top-1')):
        for name, values in found.items():
            shown = ''.join(f'{v:7.3f}' for v in [*values[i], values[i].mean()])
            print(f"  {f'{title}, {name}':36.36}" + shown)
    return dict(iou=IOUS, at={name: dict(zip(('AP', 'top-1'), v)) for name, v in found.items()})


def detector_differences(scored, intervals):
    """Every pair of detectors: the difference of their mean sensitivities, and McNemar's test over the
    lesions found within 4 false positives per volume with a lesion, as if lesions were independent."""
    found = {}
    for (a, one), (b, two) in itertools.combinations(scored.items(), 2):
        gap = intervals(lambda w: (two.with_lesions(w) - one.with_lesions(w))[-1:])[0].tolist()
        first, second = one.caught(one.m.each()), two.caught(two.m.each())
        alone = {a: int((first & ~second).sum()), b: int((second & ~first).sum())}
        p = metrics.mcnemar(first, second)
        print(f'\n{b} - {a}: mean sensitivity {cell(gap, "+")}; found within 4 FP by {b} alone {alone[b]}, '
              f'by {a} alone {alone[a]}, McNemar p = {p:.2g}')
        found[f'{b} - {a}'] = dict(mean_sensitivity=gap, mcnemar=p, alone=alone)
    return found


def missed(scored, truth, ones):
    """The lesions that one detector alone finds, and that none finds, at one and at four false positives per
    volume with a lesion (Sharma 3, 6) -> {rate: {name: lesions}}"""
    if not 1 < len(scored) < 4:
        return {}
    found = {}
    for rate in (1, 4):
        hits = np.array([s.caught(ones, rate) for s in scored.values()])                # (detectors, G)
        groups = {f'{name} alone': hit & (hits.sum(0) == 1) for name, hit in zip(scored, hits)}
        groups['none'] = hits.sum(0) == 0
        counted = ', '.join(f'{name} {of.sum()}' for name, of in groups.items())
        print(f'found at {rate} FP by {counted} (listed in scores.json)')
        found[rate] = {name: [truth[g] for g in np.flatnonzero(of)] for name, of in groups.items()}
    return found


# ---- pictures -------------------------------------------------------------------------------------

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')    # Okabe and Ito
font = ImageFont.load_default


def halved(picture):
    """Drawn at twice the size, then shrunk: smooth lines."""
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def head_pictures(runs, told, out):
    """roc.png compares the encoders of the last run, or shows the classes or years of its main one."""
    results = list(runs.values())[-1]
    main = results[-1]
    curves = {name: (truth, main.p[use, column])
              for name, (use, truth, column) in questions(main.run, main.y).items()}
    if main.run['task'] in BINARY:
        curves = {r.encoder: (r.y, r.p[:, 1]) for r in results if r.share == main.share}
    areas = {name: metrics.auc(*pair) for name, pair in curves.items()}
    chart({f'{name}, AUC {area:.3f}': metrics.roc(*curves[name])[:2]
           for name, area in areas.items() if not math.isnan(area)},
          '1 - specificity', 'sensitivity').save(out / 'roc.png')
    if main.run['task'] != 'risk':
        counts = metrics.confusion(main.y, main.guess, len(main.run['classes']))
        matrix(counts, main.run['classes']).save(out / 'confusion.png')
    first, points = next(iter(measures(main.run))), defaultdict(list)
    for r, row in zip(results, told[main.run['folder']].values()):
        points[r.encoder].append((r.share, *row[first]))
    if len(points[main.encoder]) > 1:
        lines = {name: list(zip(*of)) for name, of in points.items()}
        chart(lines, 'share of training patients', first).save(out / 'fraction.png')
    axes = sorted({of[-1].run['task'] for of in runs.values()})
    if len(axes) > 2:
        radar(axes, radar_polygons(axes, runs, told)).save(out / 'radar.png')


def radar_polygons(axes, runs, told):
    """MammoDINO's Fig. 2: a task is an axis, with the mean AUC or macro F1 of an encoder over the runs that
    have this task -> {encoder: values}"""
    values = defaultdict(lambda: defaultdict(list))
    for folder, results in runs.items():
        main = results[-1]
        for r, row in zip(results, told[folder].values()):
            if r.share == main.share:
                name = r.run['encoder'] if r is main else r.encoder
                metric = next(m for m in ('AUC', 'macro F1', 'mean AUROC') if m in row)
                values[name][r.run['task']].append(row[metric][0])
    return {name: [np.mean(of.get(axis, math.nan)) for axis in axes] for name, of in values.items()}


def chart(curves, xlabel, ylabel, most=1):
    """{name: (x, y) or (x, y, low, high)} over 0 ... `most` and 0 ... 1 -> a picture with axes and legend."""
    side, left, top = 720, 110, 60
    picture = Image.new('RGB', (left + side + 60, top + side + 110 + 40 * len(curves)), 'white')
    pen = ImageDraw.Draw(picture)

    def at(x, y):
        return left + side * float(x) / most, top + side * (1 - float(y))

    for tick in np.linspace(0, 1, 6):
        pen.line([at(most * tick, 0), at(most * tick, 1)], '#E5E5E5', 2)
        pen.line([at(0, tick), at(most, tick)], '#E5E5E5', 2)
        pen.text(at(most * tick, -0.02), f'{most * tick:.2g}', 'black', font(24), anchor='ma')
        pen.text(at(-0.02 * most, tick), f'{tick:.1f}', 'black', font(24), anchor='rm')
    pen.rectangle([at(0, 1), at(most, 0)], outline='black', width=2)
    for i, (name, (x, y, *interval)) in enumerate(curves.items()):
        colour, row, x = COLOURS[i % 7], top + side + 100 + 40 * i, np.asarray(x, float)
        if interval:
            x = x + 0.008 * i                               # intervals side by side
            for a, b, low, high in zip(x, y, *interval):
                pen.line([at(a, low), at(a, high)], colour, 2)
                pen.circle(at(a, b), 7, colour)
        points = within(x, np.asarray(y, float), most)
        pen.line([at(*point) for point in points], colour, 4, joint='curve')
        pen.line([(left, row), (left + 50, row)], colour, 6)
        pen.text((left + 64, row), name, 'black', font(26), anchor='lm')
    pen.text((left + side / 2, top + side + 46), xlabel, 'black', font(28), anchor='ma')
    pen.text((10, 6), ylabel, 'black', font(26))
    return halved(picture)


def within(x, y, most):
    """Points of a line, cut where x exceeds `most`; a FROC curve that ends before keeps its last value."""
    if most == 1:
        return list(zip(x, y))
    inside = x < most
    return [*zip(x[inside], y[inside]), (most, np.interp(most, x, y))]


def matrix(counts, classes):
    """Confusion counts (C, C) -> a picture: truth by row, prediction by column, shaded by share of row."""
    box, margin = 120, 150
    side = box * len(classes)
    picture = Image.new('RGB', (margin + side + 30, margin + side + 30), 'white')
    pen = ImageDraw.Draw(picture)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for i, name in enumerate(classes):
        middle = margin + box * (i + 0.5)
        short = name if len(name) < 10 else f'{name[:4]}…{name[-4:]}'
        pen.text((middle, margin - 12), short, 'black', font(26), anchor='mb')
        pen.text((margin - 12, middle), short, 'black', font(26), anchor='rm')
        for j, share in enumerate(shares[i]):
            x, y = margin + box * j, margin + box * i
            shade = tuple(int(255 - share * (255 - c)) for c in (0, 114, 178))
            pen.rectangle([x, y, x + box, y + box], shade, 'white', 3)
            colour = 'white' if share > 0.6 else 'black'
            pen.text((x + box / 2, y + box / 2), str(counts[i, j]), colour, font(32), anchor='mm')
    pen.text((margin + side / 2, 20), 'predicted', 'black', font(28), anchor='ma')
    pen.text((20, margin / 2), 'truth', 'black', font(28))
    return picture


def radar(axes, polygons):
    """axes: names; polygons {name: values in 0 ... 1, one per axis, NaN where it has none}."""
    picture = Image.new('RGB', (1440, 1160 + 40 * len(polygons)), 'white')
    pen = ImageDraw.Draw(picture)

    def at(axis, value):
        angle = 2 * math.pi * axis / len(axes) - math.pi / 2
        return 720 + 400 * value * math.cos(angle), 560 + 400 * value * math.sin(angle)

    for ring in (0.2, 0.4, 0.6, 0.8, 1.0):
        pen.polygon([at(i, ring) for i in range(len(axes))], outline='#CCCCCC', width=2)
        pen.text(at(0, ring), f'{ring:.1f}  ', '#777777', font(22), anchor='rm')
    for i, name in enumerate(axes):
        x, y = at(i, 1.1)
        pen.line([at(i, 0), at(i, 1)], '#CCCCCC', 2)
        anchor = 'mm' if abs(x - 720) < 130 else 'lm' if x > 720 else 'rm'
        pen.text((x, y), name, 'black', font(26), anchor=anchor)
    for i, (name, values) in enumerate(polygons.items()):
        colour, row = COLOURS[i % 7], 1120 + 40 * i
        corners = [at(axis, v) if v == v else None for axis, v in enumerate(values)]
        for a, b in zip(corners, [*corners[1:], corners[0]]):
            if a and b:                                     # open where a run has no such axis
                pen.line([a, b], colour, 5)
        pen.line([(340, row), (390, row)], colour, 6)
        pen.text((404, row), name, 'black', font(26), anchor='lm')
    return halved(picture)


def main(argv):
    """Scores runs or submissions. The truth of a submission is given, that of a run lies in its folder."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, or a submission')
    parser.add_argument('--labels', help='BCS-DBT-labels-*.csv; by default that of the first run')
    parser.add_argument('--boxes', help='BCS-DBT-boxes-*.csv; by default that of the first run')
    parser.add_argument('--min_distance', type=float, help="pixels; by default the run's, or 100")
    parser.add_argument('--draws', type=int, default=1000, help='bootstrap draws of patients')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', default='runs/score', help='folder of scores.json and pictures')
    args = parser.parse_args(argv)
    out, first = Path(args.out), Path(args.runs[0])
    if any((out / name).exists() for name in ('predictions.csv', 'run.json')):
        raise ValueError(f'--out {out} holds a run, whose scores would be lost; choose another')
    out.mkdir(parents=True, exist_ok=True)
    if (first / 'run.json').exists():
        heads(args.runs, out, args.draws, args.seed)
    else:
        beside = first if first.is_dir() else first.parent
        truth = read_truth(args.labels or beside / 'labels.csv', args.boxes or beside / 'boxes.csv')
        for folder in map(Path, args.runs[1:]):
            own = folder / 'labels.csv', folder / 'boxes.csv'
            if not args.boxes and own[0].exists() and read_truth(*own)[:2] != truth[:2]:
                raise ValueError(f'{folder} and {first} were tested on different lesions')
        distance, stored = args.min_distance, beside / 'scores.json'
        if distance is None and stored.exists() and not args.boxes:
            distance = json.loads(stored.read_text())['min_distance']
        runs = {name: read_predictions(name) for name in args.runs}
        lesions(runs, *truth, 100 if distance is None else distance, args.draws, args.seed, out)
    print(f'-> {out}/scores.json and pictures')


if __name__ == '__main__':
    script('score.py', main)
