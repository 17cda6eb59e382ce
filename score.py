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
import re
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
    for label, row in rows.items():
        cells = ''.join(f'{interval_text(row[name]):>22}' for name in columns)
        print(f'  {label:36.36}{cells}')


def interval_text(values, sign=''):
    """(.812, .774, .85) -> '.812 [.774, .850]'; with the sign '+', '+.038 [.000, +.077]': a zero has none."""
    value, low, high = ('-' if math.isnan(v) else f'{v:{sign}.3f}' for v in values)
    text = re.sub(r'\b0\.', '.', f'{value} [{low}, {high}]')
    return re.sub(r'[+-](?=\.000)', '', text)


def write_json(path, values):
    """Arrays become lists; NaN, which JSON does not have, becomes null."""
    text = json.dumps(values, default=lambda array: array.tolist())
    values = json.loads(text, parse_constant=lambda nan: None)
    Path(path).write_text(json.dumps(values, indent=1))


def write_csv(path, header, rows):
    """`datasets.table` reads it back."""
    with open(path, 'w', newline='', encoding='utf-8', errors='backslashreplace') as file:
        csv.writer(file).writerows([header, *rows])


# ---- heads: classes, density, risk (runs of finetune.py) ------------------------------------------

@dataclass
class Result:
    """What one encoder with its head predicts for the test units of one run."""
    run: dict                   # run.json: task, classes, dataset, level, encoder, ...
    encoder: str                # 'random init', 'DINOv2' or 'pretrained'
    share: float                # of the training patients
    units: np.ndarray           # (n,) names
    patients: np.ndarray        # (n,)
    groups: np.ndarray          # (n,) value of the subgroup column
    y: np.ndarray               # (n,) class; risk: (n, T) 1 cancer by then, 0 none, -1 not observed
    p: np.ndarray               # (n, C) probabilities; risk: (n, T) risk within each year
    guess: np.ndarray           # (n,) class; risk: zeros

    @property
    def name(self):
        return self.encoder if self.share == 1 else f'{self.encoder}, {self.share:.0%}'

    def arrays(self, use=slice(None)):
        return self.y[use], self.p[use], self.guess[use]


def read_run(folder):
    """A run of finetune.py -> its Results, the main encoder on all training patients last."""
    run = json.loads((Path(folder) / 'run.json').read_text()) | dict(folder=str(folder))
    classes, lines, results = run['classes'], defaultdict(list), []
    for line in table(Path(folder) / 'predictions.csv', 'encoder', 'share', 'unit'):
        lines[line['encoder'], float(line['share'])].append(line)
    for (encoder, share), own in lines.items():
        column = {name: np.array([line[name] for line in own]) for name in own[0]}
        p = np.stack([column[f'p_{name}'] for name in classes], axis=1).astype(float)
        if run['task'] == 'risk':
            y, guess = np.array([text.split() for text in column['target']], int), np.zeros(len(p))
        else:
            y, guess = (np.array([classes.index(text) for text in column[name]])
                        for name in ('target', 'predicted'))
        results.append(Result(run, encoder, share, column['unit'], column['patient'],
                              column['group'], y, p, guess))
    return results


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


def measure(run, y, p, guess):
    """The metrics of a task: {name: value}. The first is the one that encoders are compared by."""
    task, classes, C = run['task'], run['classes'], len(run['classes'])
    asked = questions(run, y).values()
    areas = np.array([metrics.auc(truth, p[use, column]) for use, truth, column in asked])

    def mean(values, weights=None):
        return np.average(values, weights=weights) if len(values) else math.nan

    if task == 'risk':                                      # plain, and by the cancers of each year (6.2.2)
        cancers, defined = np.array([truth.sum() for _, truth, _ in asked]), ~np.isnan(areas)
        return {'mean AUROC': mean(areas[defined]),
                'weighted AUROC': mean(areas[defined], cancers[defined]),
                **dict(zip(classes, areas))}
    if task in BINARY:
        return {'AUC': areas[0], 'sensitivity': mean(guess[y == 1] == 1),
                'specificity': mean(guess[y == 0] == 0)}
    values = {'accuracy': mean(guess == y), 'macro F1': metrics.f1(y, guess, C),
              'macro AUC': areas.mean()}
    if task in ORDERED and '0' not in classes:              # BI-RADS 0, incomplete, has no place in the order
        values['kappa'] = metrics.kappa(y, guess, C)
    if task == 'density' and C == 4:                        # DBT-DINO 4 and 3.3
        values['AB or CD'] = mean((guess > 1) == (y > 1))
        values['off by > 1'] = mean(abs(guess - y) > 1)
    return values


def heads(folders, out, draws=1000, seed=0):
    """Runs of finetune.py -> tables, scores.json, roc.png, confusion.png; fraction.png of a run with several
    shares of the training set; radar.png of three tasks or more."""
    runs = {str(folder): read_run(folder) for folder in folders}
    tables = {folder: head_tables(results, draws, seed) for folder, results in runs.items()}
    differences = {name: versus(a, b, draws, seed) for name, (a, b) in comparisons(runs).items()}
    adjust(differences)
    for name, v in differences.items():
        parts = [f"{name}: {interval_text(v['difference'], '+')}"]
        parts += [f"{test} p = {p:.3g}, adjusted {v['adjusted'][test]:.3g}"
                  for test, p in v['tests'].items()]
        parts += [f'{test} p = {p:.3g} if units were independent' for test, p in v['naive'].items()]
        print('; '.join(parts))
    scores = dict(runs=tables, differences=differences, draws=draws, seed=seed)
    write_json(out / 'scores.json', scores)
    head_pictures(runs, tables, out)


def head_tables(results, draws, seed):
    """Prints a run's table and that of its subgroups -> {row: {metric: (value, low, high)}}"""
    main, run = results[-1], results[-1].run

    def measured(result, use=slice(None)):
        arrays, patients = result.arrays(use), result.patients[use]
        return estimate(partial(measure, run), arrays, patients, draws, seed)[0]

    cases = ', '.join(f'{name} {truth.sum()} of {len(truth)}'
                      for name, (_, truth, _) in questions(run, main.y).items())
    print(f"\n{run['folder']}: {run['task']} of {run['dataset']}, {run['head']} head, "
          f"encoder {run['encoder']}")
    rows = {result.name: measured(result) for result in results}
    patients = len(set(main.patients))
    print_table(f"test: {len(main.y)} {run['level']}s of {patients} patients ({cases})", rows)
    if any(main.groups):
        members = {value: main.groups == value for value in sorted(set(main.groups))}
        subgroups = {f'{value}, n = {use.sum()}': measured(main, use)
                     for value, use in members.items()}
        print_table(f"by {run['subgroup']}, {main.encoder}", subgroups)
        rows |= subgroups
    return rows


def estimate(metric, arrays, patients, draws, seed):
    """metric(*arrays) {name: value} -> {name: (value, low, high)}, and the values on the bootstrap draws
    (draws, names), NaN where they are not defined"""
    values = metric(*arrays)
    drawn = metrics.resample(lambda *a: list(metric(*a).values()), arrays, patients,
                             np.random.default_rng(seed), draws)
    return {name: (float(value), *metrics.interval(column))
            for (name, value), column in zip(values.items(), drawn.T)}, drawn


def comparisons(runs):
    """{name: (a, b)}: the main encoder of each run, b, against every other on the same share of the training
    set; then the main encoders of any two runs that were tested on the same units."""
    pairs = {}
    for folder, results in runs.items():
        main = results[-1].encoder
        for a, b in itertools.product(results, results):
            if a.share == b.share and a.encoder != main and b.encoder == main:
                pairs[f'{folder}: {main} - {a.name}'] = a, b
    for first, second in itertools.combinations(runs, 2):
        a, b = runs[first][-1], runs[second][-1]
        if all(a.run[key] == b.run[key] for key in ('task', 'dataset', 'classes')):
            if np.array_equal(a.units, b.units) and np.array_equal(a.y, b.y):
                pairs[f'{second} - {first}'] = a, b
            else:
                print(f'{first} and {second} were tested on different units: no test')
    return pairs


def versus(a, b, draws, seed):
    """b against a on the same units -> dict of `difference` of their first metric (value, low, high), `tests`
    {name: p}, and `naive` {name: p}.

    The test is DeLong's for what has a ROC curve, McNemar's for classes. Both assume independent units. Where
    patients have several, the test is a bootstrap over patients; the p of the other is `naive`."""
    def differences(y, p_a, guess_a, p_b, guess_b):
        of_a, of_b = measure(a.run, y, p_a, guess_a), measure(a.run, y, p_b, guess_b)
        return {name: of_b[name] - of_a[name] for name in of_a}

    gaps, drawn = estimate(differences, (*a.arrays(), *b.arrays()[1:]), a.patients, draws, seed)
    gap, values = next(iter(gaps.values())), drawn[:, 0]    # of the first metric
    if a.run['task'] in (*BINARY, 'risk'):
        tests = {f'DeLong, {name}': metrics.delong(truth, a.p[use, column], b.p[use, column])[2]
                 for name, (use, truth, column) in questions(a.run, a.y).items()}
    else:
        tests = {'McNemar': metrics.mcnemar(a.guess == a.y, b.guess == b.y)}
    if len(set(a.patients)) == len(a.y):
        return dict(difference=gap, tests=tests, naive={})
    values = values[~np.isnan(values)]
    beyond = 1 + min((values <= 0).sum(), (values >= 0).sum())      # two-sided: twice the smaller tail
    p = min(1, 2 * beyond / (1 + len(values))) if len(values) else math.nan
    return dict(difference=gap, tests={'bootstrap by patient': float(p)}, naive=tests)


def adjust(differences):
    """Adds `adjusted` p values: Benjamini-Hochberg over all tests of all differences as one family."""
    family = {(name, test): p for name, v in differences.items() for test, p in v['tests'].items()
              if not math.isnan(p)}
    adjusted = dict(zip(family, metrics.benjamini_hochberg(list(family.values()))))
    for name, v in differences.items():
        v['adjusted'] = {test: adjusted.get((name, test), math.nan) for test in v['tests']}


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
    listed = dict.fromkeys(key_of(line) for line in table(labels, *KEY))
    slices, truth, classes = {}, [], []
    names = ('X', 'Y', 'Width', 'Height', 'Slice', 'VolumeSlices')
    for line in table(boxes, *KEY, *names, 'Class'):
        x, y, w, h, z, count = (number(line, name, boxes) for name in names)
        if min(w, h) <= 0 or not 0 <= z < count:
            raise ValueError(f'{boxes}, line {line.number}: a box of {w:g}x{h:g} on slice {z:g} of '
                             f'{count:g}; expected a size, and slices from 0')
        truth.append((key_of(line), x, y, w, h, z))
        classes.append(line['Class'])
        if key_of(line) not in slices:                      # the challenge takes the first row's
            slices[key_of(line)] = count if count > 1 else math.inf
    return [(key, slices.get(key, math.inf)) for key in listed], truth, np.array(classes)


def read_predictions(path):
    """The challenge's submission, or a run's -> rows [key, x, y, w, h, z, depth, score]."""
    path = Path(path) / 'predictions.csv' if Path(path).is_dir() else Path(path)
    names = ('X', 'Y', 'Width', 'Height', 'Z', 'Depth', 'Score')
    return [(key_of(line), *(number(line, name, path) for name in names))
            for line in table(path, *PREDICTION)]


class Scored:
    """One detector's predictions, matched to the truth once for all bootstrap draws. `weight` (V + 1,) says
    how often each volume counts; its last entry is for predictions in volumes that are not listed."""

    def __init__(self, volumes, truth, predictions, min_distance):
        names, flat = [key for key, _ in volumes], [row[:5] for row in truth]   # slices play no part
        self.matched = metrics.matched(volumes, truth, predictions, min_distance)
        self.flat = metrics.matched(volumes, flat, predictions, min_distance)
        self.boxes = [metrics.overlapping(names, flat, predictions, iou) for iou in IOUS]

    def sensitivities(self, weight):
        """Sensitivity at 1, 2, 3, 4 false positives per volume, and their mean: (5,)"""
        at_rates = metrics.sensitivity(self.matched, RATES, weight)
        return np.append(at_rates, at_rates.mean())

    def with_lesions(self, weight):
        """The same over the volumes with a lesion: (5,)"""
        return self.sensitivities(self.matched.ill(weight))

    def caught(self, weight, rate=4):
        """(G,) lesions found at the last score with at most `rate` false positives per volume with one"""
        return metrics.caught(self.matched, rate, self.matched.ill(weight))

    def by_class(self, weight, classes):
        """The share of the lesions of each class that are found there"""
        count = weight[self.matched.home] * (classes == np.unique(classes)[:, None])    # (classes, G)
        with np.errstate(invalid='ignore'):                 # a draw may hold no lesion of a class
            return (count * self.caught(weight)).sum(1) / count.sum(1)

    def fauc(self, weight):
        """FAUC-1 over all images, and FAUC-1+ over those with a lesion (Sharma 4): (2,)"""
        return np.array([metrics.step_area(self.flat, w) for w in (weight, self.flat.ill(weight))])

    def overlap(self, weight):
        """AP and top-1 localisation, our reading of IHRRB-DINO 3.3, at each of IOUS: (2, 8)"""
        return np.array([[metrics.precision_area(m, weight) for m in self.boxes],
                         [metrics.localised(m, weight) for m in self.boxes]])


def lesions(runs, volumes, truth, classes, min_distance, draws, seed, out, notes=()):
    """Detectors {name: predictions} on the same volumes -> tables, scores.json, froc.png. volumes, truth and
    predictions are rows as `metrics.froc` takes them; classes (G,) of the lesions."""
    if not truth:
        raise ValueError('no lesion in the test set, so there is no sensitivity')
    scored = {name: Scored(volumes, truth, rows, min_distance) for name, rows in runs.items()}
    patients, patient = np.unique([key[0] for key, _ in volumes], return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(            # (draws, patients), with replacement
        len(patients), np.full(len(patients), 1 / len(patients)), draws)
    weights = np.ones((1 + draws, len(volumes) + 1))            # all volumes once, then as often as drawn
    weights[1:, :-1] = drawn[:, patient]

    def tabulate(title, columns, metric):
        rows = {name: dict(zip(columns, intervals(partial(metric, s), weights)))
                for name, s in scored.items()}
        print_table(title, rows)
        return rows

    kinds, counts = np.unique(classes, return_counts=True)
    print(f'\n{len(volumes)} images or volumes of {len(patients)} patients, '
          f'{len({row[0] for row in truth})} with {len(truth)} lesions: '
          + ', '.join(f'{kind} {count}' for kind, count in zip(kinds, counts))
          + f'; a hit is within max(half the diagonal, {min_distance:g} pixels)')
    for name, s in scored.items():
        unlisted = (s.matched.volume < 0).sum()
        if unlisted:
            print(f'  {name}: {unlisted} predictions in volumes that are not listed')
    columns = [*(f'{rate} FP' for rate in RATES), 'mean of 1-4']
    scores = dict(
        challenge={name: metrics.froc(volumes, truth, rows, min_distance)
                   for name, rows in runs.items()},
        with_lesions=tabulate('sensitivity, volumes with a lesion', columns, Scored.with_lesions),
        all=tabulate('sensitivity, all volumes', columns, Scored.sensitivities),
        classes=tabulate('found within 4 FP, with a lesion', kinds,
                         lambda s, weight: s.by_class(weight, classes)),
        fauc=tabulate('area up to 1 FP', ('FAUC-1', 'FAUC-1+'), Scored.fauc),
        overlap=overlap_table({name: s.overlap(weights[0]) for name, s in scored.items()}),
        overlap_mean=tabulate('mean over IoU', ('AP', 'top-1'),
                              lambda s, weight: s.overlap(weight).mean(1)),
        differences=detector_differences(scored, weights),
        missed=missed(scored, truth, weights[0]),
        min_distance=min_distance, draws=draws, seed=seed, notes=list(notes))
    write_json(out / 'scores.json', scores)
    rates, curves = np.linspace(0, 5, 501), {}
    for name, s in scored.items():
        mean = interval_text(scores['with_lesions'][name]['mean of 1-4'])
        heights = metrics.sensitivity(s.matched, rates, s.matched.ill(weights[0]))
        curves[f'{name}, mean {mean}'] = list(zip(rates, heights))
    label = 'false positives per volume with a lesion'
    chart(curves, label, 'sensitivity', most=5).save(out / 'froc.png')


def intervals(metric, weights):
    """metric(weight) -> (n,). Its values for all volumes, the first weight, with intervals over the others:
    n times (value, low, high)"""
    values, *drawn = [metric(weight) for weight in weights]
    return [(v, *metrics.interval(draws)) for v, draws in zip(values, np.transpose(drawn))]


def overlap_table(overlaps):
    """IHRRB-DINO's table. overlaps {name: (2, 8)}: AP and top-1 localisation at IOUS, whatever the slice."""
    print(f'\n{"IoU":38}' + ''.join(f'{iou:7.1f}' for iou in IOUS) + '   mean')
    for i, title in enumerate(('AP', 'top-1')):
        for name, values in overlaps.items():
            shown = ''.join(f'{v:7.3f}' for v in (*values[i], values[i].mean()))
            print(f"  {f'{title}, {name}':36.36}" + shown)
    return dict(iou=IOUS, at={name: dict(zip(('AP', 'top-1'), v)) for name, v in overlaps.items()})


def detector_differences(scored, weights):
    """Every pair of detectors: the difference of their mean sensitivities, and McNemar's test over the
    lesions found within 4 false positives per volume with a lesion, as if lesions were independent."""
    differences = {}
    for (a, scored_a), (b, scored_b) in itertools.combinations(scored.items(), 2):
        gap = intervals(lambda w: scored_b.with_lesions(w) - scored_a.with_lesions(w), weights)[-1]
        found_a, found_b = scored_a.caught(weights[0]), scored_b.caught(weights[0])
        alone = {a: int((found_a & ~found_b).sum()), b: int((found_b & ~found_a).sum())}
        p = metrics.mcnemar(found_a, found_b)
        print(f'\n{b} - {a}: mean sensitivity {interval_text(gap, "+")}; found within 4 FP by {b} '
              f'alone {alone[b]}, by {a} alone {alone[a]}, McNemar p = {p:.2g}')
        differences[f'{b} - {a}'] = dict(mean_sensitivity=gap, mcnemar=p, alone=alone)
    return differences


def missed(scored, truth, weight):
    """Of two or three detectors, the lesions that one alone finds and that none finds, at one and at four
    false positives per volume with a lesion (Sharma 3, 6) -> {rate: {name: lesions}}"""
    if len(scored) not in (2, 3):
        return {}
    lesions_at = {}
    for rate in (1, 4):
        hits = np.array([s.caught(weight, rate) for s in scored.values()])              # (detectors, G)
        groups = {f'{name} alone': hit & (hits.sum(0) == 1) for name, hit in zip(scored, hits)}
        groups['none'] = hits.sum(0) == 0
        counts = ', '.join(f'{name} {members.sum()}' for name, members in groups.items())
        print(f'found at {rate} FP by {counts} (listed in scores.json)')
        lesions_at[rate] = {name: [truth[g] for g in np.flatnonzero(members)]
                            for name, members in groups.items()}
    return lesions_at


# ---- pictures -------------------------------------------------------------------------------------

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')    # Okabe and Ito
GREY = '#CCCCCC'
font = ImageFont.load_default


def canvas(width, height, names=()):
    """A white picture of this size, with a legend of `names` added below -> picture, pen"""
    picture = Image.new('RGB', (width, height + 40 * len(names)), 'white')
    pen = ImageDraw.Draw(picture)
    pen.font = font(26)
    for colour, y, name in zip(itertools.cycle(COLOURS), itertools.count(height, 40), names):
        pen.line([(110, y), (160, y)], colour, 6)
        pen.text((174, y), name, 'black', anchor='lm')
    return picture, pen


def halved(picture):
    """Drawn at twice the size, then shrunk: smooth lines."""
    return picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.LANCZOS)


def chart(curves, xlabel, ylabel, most=1):
    """{name: [(x, y), ...]} over 0 ... `most` and 0 ... 1 -> a picture with axes and legend."""
    picture, pen = canvas(890, 880, curves)

    def at(x, y):
        return 110 + 720 * x / most, 60 + 720 * (1 - y)

    for tick in np.linspace(0, 1, 6):
        pen.line([at(most * tick, 0), at(most * tick, 1)], GREY, 2)
        pen.line([at(0, tick), at(most, tick)], GREY, 2)
        pen.text(at(most * tick, -0.02), f'{most * tick:g}', 'black', anchor='ma')
        pen.text(at(-0.02 * most, tick), f'{tick:.1f}', 'black', anchor='rm')
    pen.text(at(most / 2, -0.065), xlabel, 'black', anchor='ma')
    pen.text((10, 6), ylabel, 'black')
    for colour, points in zip(itertools.cycle(COLOURS), curves.values()):
        pen.line([at(x, y) for x, y in points], colour, 4)
    return halved(picture)


def matrix(counts, classes):
    """Confusion counts (C, C) -> a picture: truth by row, prediction by column, shaded by share of row."""
    box, margin = 120, 150
    picture, pen = canvas(margin + box * len(classes) + 30, margin + box * len(classes) + 30)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    for i, name in enumerate(classes):
        middle = margin + box * (i + 0.5)
        pen.text((middle, margin - 12), name[:9], 'black', anchor='mb')
        pen.text((margin - 12, middle), name[:9], 'black', anchor='rm')
        for j, share in enumerate(shares[i]):
            x, y = margin + box * j, margin + box * i
            shade = tuple(int(255 - share * (255 - c)) for c in (0, 114, 178))
            pen.rectangle([x, y, x + box, y + box], shade, 'white', 3)
            colour = 'white' if share > 0.6 else 'black'
            pen.text((x + box / 2, y + box / 2), str(counts[i, j]), colour, anchor='mm')
    pen.text((margin + box * len(classes) / 2, 20), 'predicted', 'black', anchor='ma')
    pen.text((20, margin / 2), 'truth', 'black')
    return picture


def radar(axes, polygons):
    """axes: names; polygons {name: values in 0 ... 1, one per axis, NaN where it has none}."""
    picture, pen = canvas(1440, 1120, polygons)

    def at(axis, value):
        angle = 2 * math.pi * axis / len(axes) - math.pi / 2
        return 720 + 400 * value * math.cos(angle), 560 + 400 * value * math.sin(angle)

    for ring in (0.2, 0.4, 0.6, 0.8, 1.0):
        pen.polygon([at(i, ring) for i in range(len(axes))], outline=GREY, width=2)
        pen.text(at(0, ring), f'{ring:.1f}  ', 'grey', anchor='rm')
    for i, name in enumerate(axes):
        pen.line([at(i, 0), at(i, 1)], GREY, 2)
        pen.text(at(i, 1.15), name, 'black', anchor='mm')
    for colour, values in zip(itertools.cycle(COLOURS), polygons.values()):
        for i, (a, b) in enumerate(itertools.pairwise([*values, values[0]])):
            if not math.isnan(a + b):                       # open where it has no such axis
                pen.line([at(i, a), at(i + 1, b)], colour, 5)
    return halved(picture)


def head_pictures(runs, tables, out):
    """roc.png compares the encoders of the last run, or shows the classes or years of its main one."""
    folder, results = list(runs.items())[-1]
    main, rows, classes = results[-1], tables[folder], results[-1].run['classes']
    asked = {name: (truth, main.p[use, column])
             for name, (use, truth, column) in questions(main.run, main.y).items()}
    if main.run['task'] in BINARY:
        asked = {r.encoder: (r.y, r.p[:, 1]) for r in results if r.share == main.share}
    curves = {f'{name}, AUC {metrics.auc(truth, p):.3f}': list(zip(*metrics.roc(truth, p)[:2]))
              for name, (truth, p) in asked.items() if 0 < truth.sum() < len(truth)}
    chart(curves, '1 - specificity', 'sensitivity').save(out / 'roc.png')
    if main.run['task'] != 'risk':
        counts = metrics.confusion(main.y, main.guess, len(classes))
        matrix(counts, classes).save(out / 'confusion.png')
    if len({r.share for r in results}) > 1:
        metric, lines = next(iter(rows[main.name])), {r.encoder: [] for r in results}
        for r in results:
            value, low, high = rows[r.name][metric]
            x = r.share + 0.008 * list(lines).index(r.encoder)      # intervals side by side
            lines[r.encoder] += [(x, value), (x, low), (x, high), (x, value)]
        chart(lines, 'share of training patients', metric).save(out / 'fraction.png')
    if len({results[-1].run['task'] for results in runs.values()}) > 2:
        radar(*radar_polygons(runs, tables)).save(out / 'radar.png')


def radar_polygons(runs, tables):
    """MammoDINO's Fig. 2: a task is an axis, with the mean AUC or macro F1 of an encoder over the runs that
    have this task -> tasks, {encoder: values}"""
    values = defaultdict(list)                              # (encoder, task) -> one for each run
    for folder, results in runs.items():
        main = results[-1]
        for r in results:
            if r.share == main.share:
                name = main.run['encoder'] if r is main else r.encoder
                row = tables[folder][r.name]
                metric = next(m for m in ('AUC', 'macro F1', 'mean AUROC') if m in row)
                values[name, main.run['task']].append(row[metric][0])
    names, axes = dict.fromkeys(name for name, _ in values), sorted({task for _, task in values})
    return axes, {name: [np.mean(values.get((name, axis), math.nan)) for axis in axes]
                  for name in names}


def main(argv):
    """Scores runs or submissions. The truth of a submission is given, that of a run lies in its folder."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='RUN', help='folder of a run, or a submission')
    parser.add_argument('--labels', help='BCS-DBT-labels-*.csv; by default that of the first run')
    parser.add_argument('--boxes', help='BCS-DBT-boxes-*.csv; by default that of the first run')
    parser.add_argument('--min_distance', type=float, help="pixels; by default the run's, or 100")
    parser.add_argument('--draws', type=int, default=1000, help='bootstrap draws of patients')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', default='runs/score', help='folder of scores.json and pictures')
    args = parser.parse_args(argv)
    out, first = Path(args.out), Path(args.runs[0])
    if any((out / name).exists() for name in ('predictions.csv', 'last.pt')):
        raise ValueError(f'--out {out} holds a run, whose scores would be lost; choose another')
    out.mkdir(parents=True, exist_ok=True)
    if (first / 'run.json').exists():
        heads(args.runs, out, args.draws, args.seed)
    else:
        folder = first if first.is_dir() else first.parent
        truth = read_truth(args.labels or folder / 'labels.csv', args.boxes or folder / 'boxes.csv')
        for run in map(Path, args.runs[1:]):
            if run.is_dir() and not args.boxes:
                if read_truth(run / 'labels.csv', run / 'boxes.csv')[:2] != truth[:2]:
                    raise ValueError(f'{run} and {first} were tested on different lesions')
        distance, stored = args.min_distance, folder / 'scores.json'
        if distance is None and stored.exists() and not args.boxes:
            distance = json.loads(stored.read_text()).get('min_distance')
        runs = {name: read_predictions(name) for name in args.runs}
        lesions(runs, *truth, 100 if distance is None else distance, args.draws, args.seed, out)
    print(f'-> {out}/scores.json and pictures')


if __name__ == '__main__':
    script('score.py', main)
