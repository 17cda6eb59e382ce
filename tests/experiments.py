"""The evidence: what each part of the method does, measured so that it can be repeated. Not a test.

    $ python tests/experiments.py windows --data PREPARED --boxes CBIS.csv      # masses of real films, four arms
    $ python tests/experiments.py rates --data PREPARED --mias MIAS --boxes CBIS.csv      # learning rates
    $ python tests/experiments.py longer --data PREPARED --mias MIAS --boxes CBIS.csv     # does it grow with training?
    $ python tests/experiments.py ablation                  # the arms of Table 6 on phantoms
    $ python tests/experiments.py adjacent                  # what the adjacent slice loss does to a volume; D_max
    $ python tests/experiments.py tissue NAME=LABELS.csv ...        # what tau keeps and admits, how often rho falls
    $ python tests/experiments.py hidden --mias MIAS --boxes CBIS.csv   # lesions that patch masks cover
    $ python tests/experiments.py attention                 # where encoders look
    $ python tests/experiments.py fused                     # does SM alone profit from pairs with FFDM?
    $ python tests/experiments.py detectors --mias MIAS --boxes CBIS.csv --encoder RUN/last.pt       # three of them
    $ python tests/experiments.py tables                    # the tables of tests/results/README.md
    $ python tests/experiments.py pictures                  # and its pictures

Each function below is the protocol of one experiment. Encoders are trained by the command line of pretrain.py, as many
at once as there are cores, one thread each, in `--out`; those that are there already are not trained again. Rows go to
tests/results/EXPERIMENT.csv. Intervals are 95 %, by bootstrap over phantoms or patients; those of means over seeds and
of differences draw the seeds as well, of which there are few: read the seeds' own rows beside them.

PREPARED: films of CBIS-DDSM, mini-MIAS and DDSM after `prepare.py --side 512`. CBIS.csv: the masses of CBIS-DDSM, a
list as detect.py takes it.
"""
import argparse
import copy
import csv
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import datasets  # noqa: E402
import detect  # noqa: E402
import fuse  # noqa: E402
import images  # noqa: E402
import mask  # noqa: E402
import metrics  # noqa: E402
import phantom  # noqa: E402
import pretrain  # noqa: E402
import sampler  # noqa: E402
import score  # noqa: E402
import vit  # noqa: E402

RESULTS = ROOT / 'tests' / 'results'
SEEDS = (0, 1, 2)
FRAME = dict(height=256, width=288)         # a breast takes .43 of it; random weights read less than the grey levels do
RECIPE = {k: v for k, v in pretrain.DEMO.items() if k != 'out'} | dict(steps=400, warmup=40, lr=0.0113)    # as the rows
BLIND = dict(blind_crops=True, blind_masks=True)            # blind windows for slice pairs, too
ARMS = {                                                    # Table 6, DINO-M alone, and a control: windows that reach
    'DINOv2': BLIND | dict(slice_weight=0.0),               # rho on a narrow breast are smaller than blind ones
    'DINOv2, windows as small': BLIND | dict(slice_weight=0.0, global_scale=(0.25, 0.5)),
    '+ DINO-M': dict(blind_masks=True, slice_weight=0.0),
    '+ DINO-M & iBOT-M': dict(slice_weight=0.0),
    '+ adjacent slice': BLIND,
    'MammoDINO': {}}


# ---- material: phantoms, encoders ----------------------------------------------------------------------------------

def phantoms(n, key, slices=1, every=1, **shape):
    """n phantoms of the experiments' frame, every `every`-th of `slices` slices, the others mammograms. `key` with the
    number of the phantom seeds it."""
    drawn = (phantom.breast(np.random.default_rng([*key, i]), slices=1 if i % every else slices, **FRAME | shape)
             for i in range(n))
    return [dict(pixels=pretrain.prepared(p), **vars(p)) for p in drawn]


def folder_of(out, name, n, key, **given):
    """Phantoms as a folder of .npy and index.csv, the way prepare.py leaves a data set."""
    folder = Path(out) / name
    if not (folder / 'whole').exists():
        phantom.dataset(folder, (p['pixels'] for p in phantoms(n, key, **given)))
        (folder / 'whole').touch()
    return str(folder)


def in_lanes(commands):
    """{name: argv}: each as a process of one thread, as many at once as there are cores; what they say goes to
    NAME.log."""
    def work(name, argv):
        with open(f'{name}.log', 'w') as log:
            print(shlex.join(argv), file=log, flush=True)
            done = subprocess.run(argv, stdout=log, stderr=log, env=os.environ | {'OMP_NUM_THREADS': '1'})
        if done.returncode:
            raise RuntimeError(f'{name}.log tells why it failed')
        print(f'-> {name}', flush=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as lanes:
        list(lanes.map(work, commands, commands.values()))


def flags(values):
    """A recipe as the command line that gives it."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        else:
            words += [f'--{name}', *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def detector_command(values):
    """A run of detect.py, or of the stages of fuse.py where something is to be mimicked or fused."""
    stage = next((name for name in ('mimic', 'fuse') if name in values), None)
    if stage is None:
        return [sys.executable, str(ROOT / 'detect.py'), *flags(values)]
    given = {name: value for name, value in values.items() if name not in ('encoder', *fuse.RECIPE, stage)}
    return [sys.executable, str(ROOT / 'fuse.py'), stage, *flags(given | dict(other=values[stage]))]


def pretrained(out, recipes):
    """{name: recipe}: trains those that are not there yet -> {name: teacher}"""
    todo = {}
    for name, recipe in recipes.items():
        last = Path(out, name, 'last.pt')
        state = vit.read(last) if last.exists() else dict(step=0, config=recipe)
        if changed := [k for k, v in recipe.items() if k != 'workers' and state['config'].get(k) != v]:
            raise ValueError(f"{last} was trained by another recipe ({', '.join(changed)}); remove it")
        if state['step'] < recipe['steps']:
            todo[f'{out}/{name}'] = [sys.executable, str(ROOT / 'pretrain.py'),
                                     *flags(recipe | dict(out=f'{out}/{name}', resume=True))]
    in_lanes(todo)
    return {name: vit.load(f'{out}/{name}/last.pt') for name in recipes}


def untrained(recipe):
    """The weights that a recipe starts from."""
    return pretrain.networks(pretrain.Config(**recipe), torch.device('cpu'))[1].backbone


def steps_of(recipe, pairs):
    """Steps with which this arm takes the encoder's compute of the whole method: an arm without slice pairs gets more.
    `pairs`: the share of images with a pair. Backward counts as two forwards, tokens stand for time."""
    whole, local = ((recipe[name] // 14) ** 2 + 1 for name in ('size', 'local_size'))
    views = 4 * 2 * whole + 3 * recipe['locals'] * local    # student 1 + 2, teacher 1
    pair = 4 * whole * pairs
    return round(recipe['steps'] * (views + pair) / (views + pair * (recipe.get('slice_weight', 1) > 0)))


# ---- read-outs of frozen features ----------------------------------------------------------------------------------

@torch.no_grad()
def features(encoder, images, chunk=64):
    """uint8 images (H, W), squashed to the encoder's square -> unit CLS (n, D); mean and deviation of the patch tokens
    (n, 2 D), the input of DBT-DINO's linear heads."""
    side, cls, moments = encoder.config['size'], [], []
    for i in range(0, len(images), chunk):
        grey = np.stack([squashed(image, side) for image in images[i:i + chunk]])
        token, patches = encoder(torch.from_numpy(grey)[:, None].float() / 255)
        cls.append(torch.nn.functional.normalize(token, dim=-1))
        moments.append(torch.cat([patches.mean(1), patches.std(1)], 1))
    return torch.cat(cls).numpy(), torch.cat(moments).numpy()


def nearest(x, y, groups):
    """k-NN (k = 10, cosine), no neighbour of the same group -> each class's share of the vote (n, C)."""
    return metrics.knn(np.where(groups[:, None] == groups[None], -np.inf, x @ x.T), y)


def linear(x, y, groups, folds=5, decay=1e-2):
    """Logistic regression on standardised features, every image predicted by the fold that left its group out; the
    decay is not searched -> probabilities (n, C)."""
    place = np.unique(groups, return_inverse=True)[1]
    fold = np.random.default_rng(0).permutation(place.max() + 1)[place] % folds
    out = np.zeros((len(y), y.max() + 1))
    for k in range(folds):
        train = fold != k
        z = torch.from_numpy((x - x[train].mean(0)) / (x[train].std(0) + 1e-6)).float()
        W, b = (torch.zeros(*size, requires_grad=True) for size in ((z.shape[1], out.shape[1]), (out.shape[1],)))
        solver = torch.optim.LBFGS([W, b], max_iter=100, line_search_fn='strong_wolfe')

        def closure():
            solver.zero_grad()
            loss = torch.nn.functional.cross_entropy(z[train] @ W + b, torch.from_numpy(y[train]))
            loss = loss + decay * W.square().sum()
            loss.backward()
            return loss
        solver.step(closure)
        out[~train] = torch.softmax(z[~train] @ W + b, 1).detach().numpy()
    return out


def value_of(y, p):
    """AUC of a yes-or-no question, else accuracy."""
    return metrics.auc(y, p[:, 1]) if p.shape[1] == 2 else np.mean(p.argmax(1) == y)


READOUTS = {'CLS k-NN': (nearest, 0), 'CLS linear': (linear, 0), 'patches linear': (linear, 1)}


def read_out(known, tasks, groups, readouts=READOUTS):
    """{arm: features, one a seed}, {task: labels, -1 where there is none} -> rows: the value of each seed, their mean,
    and the difference of the mean from the first arm's and from random init's."""
    rows, first = [], next(iter(known))
    for task, labels in tasks.items():
        has = labels >= 0
        y, g = labels[has], groups[has]
        chance = np.bincount(y).max() / len(y) if y.max() > 1 else 0.5
        for readout, (predict, part) in readouts.items():
            about = dict(task=task, readout=readout, n=len(y))
            rows.append(about | dict(arm='chance', seed='', value=chance))
            shares = {arm: [predict(f[part][has], y, g) for f in found] for arm, found in known.items()}
            for arm, p in shares.items():
                for seed, one in enumerate(p):
                    rows.append(about | dict(arm=arm, seed=seed) | interval(y, [one], g))
                rows.append(about | dict(arm=arm, seed='mean') | interval(y, p, g))
                rows += [about | dict(arm=arm, seed=f'mean - {other}') | interval(y, p, g, shares[other])
                         for other in dict.fromkeys((first, 'random init')) if other != arm]
    return rows


def interval(y, p, groups, other=None, draws=500):
    """Mean over seeds of `value_of`, p a list of (n, C) and `other`, whose mean is taken away, one of as many, seed by
    seed -> value, low, high. A draw takes seeds and groups with replacement, all images of a group together."""
    rng, rows = np.random.default_rng(0), rows_of(groups)

    def mean(seeds, at):
        return np.mean([value_of(y[at], p[s][at]) - (value_of(y[at], other[s][at]) if other else 0) for s in seeds])
    drawn = [mean(rng.integers(len(p), size=len(p)),
                  np.concatenate([rows[g] for g in rng.integers(len(rows), size=len(rows))])) for _ in range(draws)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return dict(value=mean(range(len(p)), np.arange(len(y))), low=low, high=high)


def rows_of(groups):
    """The rows of each group, a list of arrays."""
    group = np.unique(groups, return_inverse=True)[1]
    return np.split(np.argsort(group, kind='stable'), np.cumsum(np.bincount(group))[:-1])


def write(name, rows, **more):
    """tests/results/NAME.csv; rows of the same `more` (such as the data set) are replaced, others kept."""
    path = RESULTS / f'{name}.csv'
    rows = [more | row for row in rows]
    kept = [row for row in read(name) if any(row.get(k) != str(v) for k, v in more.items())] if more else []
    RESULTS.mkdir(exist_ok=True)
    with open(path, 'w', newline='') as file:
        names = list(dict.fromkeys(name for row in kept + rows for name in row))
        writer = csv.DictWriter(file, names, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows(kept)
        writer.writerows({k: f'{v:.4f}' if isinstance(v, (float, np.floating)) else v for k, v in row.items()}
                         for row in rows)
    print(f'-> {path.relative_to(ROOT)}, {len(kept) + len(rows)} rows')


def read(name):
    """The rows of tests/results/NAME.csv, as text; none where there is no such file."""
    path = RESULTS / f'{name}.csv'
    if not path.exists():
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


# ---- 1: the ablation (MammoDINO Table 6, and DINO-M alone) -----------------------------------------------------------

def ablation(out):
    """Six arms of equal compute, three seeds, 256 training phantoms a seed (every third a volume), 640 others to test
    on, the same for all. A warm-up of 40 steps for each."""
    recipes = {}
    for arm, change in ARMS.items():
        for seed in SEEDS:
            recipe = RECIPE | change | dict(seed=seed, data=mixed(out, seed))
            recipes[f'{slug(arm)}-{seed}'] = recipe | dict(steps=steps_of(recipe, 1 / 3))
    trained = pretrained(out, recipes)
    tests = phantoms(640, (99, 7))
    arms = {arm: [trained[f'{slug(arm)}-{seed}'] for seed in SEEDS] for arm in ARMS}
    arms['random init'] = [untrained(RECIPE | dict(seed=seed)) for seed in SEEDS]
    pictures = [p['pixels'][0] for p in tests]
    found = {arm: [features(encoder, pictures) for encoder in encoders] for arm, encoders in arms.items()}
    write('ablation', read_out(found, labels_of(tests), np.arange(640)))
    write('areas', [dict(arm=arm, area=np.mean([*window_areas(tests, RECIPE | change)]))
                      for arm, change in ARMS.items()])


def window_areas(tests, recipe, most=100):
    """Shares of the image that global crops take: those that must reach rho on a narrow breast are smaller."""
    rng = np.random.default_rng(0)
    for p in tests[:most]:
        where = np.ones_like(p['tissue']) if recipe.get('blind_crops') else p['tissue']
        y0, x0, y1, x1 = sampler.crop_box(rng, where, recipe['global_scale'], (3 / 4, 4 / 3), recipe['min_coverage'])[0]
        yield (y1 - y0) * (x1 - x0) / where.size


def mixed(out, seed):
    """The training phantoms of a seed of the ablation."""
    return folder_of(out, f'phantoms-{seed}', 256, (seed, 6), slices=8, every=3)


def labels_of(found):
    """Density 0..3 and lesion 0 or 1 of phantoms."""
    return dict(density=np.array([p['density'] for p in found]), lesion=np.array([p['cancer'] for p in found]))


def slug(arm):
    """The name of an arm as a folder."""
    return ''.join(c if c.isalnum() else '-' for c in arm.lower()).strip('-')


# ---- 2: real films ---------------------------------------------------------------------------------------------------

LINEAR = {'CLS linear': (linear, 0), 'patches linear': (linear, 1)}
FIVE = range(5)
LARGER = dict(size=112, local_size=56, width=192, depth=6, heads=3, drop_path=0.1, prototypes=1024, hidden=512,
              bottleneck=128, momentum=0.98)


def windows(out, data, boxes):
    """Mass against tissue, and malignant against benign, in windows of CBIS-DDSM: a mass fills two thirds of its
    window, and half a patch of a whole film at 84 pixels. Four arms, five seeds each, trained for 400 steps on the
    films of `data`, those of the windows among them, without their labels; random weights; the deciles of a window's
    greys. No real volume is at hand, so no arm has slice pairs."""
    arms = {arm: {seed: pretrain.SMALL | change | dict(steps=400, warmup=40, seed=seed, data=data) for seed in FIVE}
            for arm, change in ARMS.items() if change.get('slice_weight') == 0}
    trained = pretrained(out, {f'films-{slug(arm)}-{seed}': recipe
                               for arm, seeds in arms.items() for seed, recipe in seeds.items()})
    pictures, tasks, patients = mass_windows(boxes, pretrain.SMALL['size'])
    found = {arm: [features(trained[f'films-{slug(arm)}-{seed}'], pictures) for seed in FIVE] for arm in arms}
    found['random init'] = [features(untrained(pretrain.SMALL | dict(seed=seed)), pictures) for seed in FIVE]
    deciles = np.percentile(np.stack(pictures).reshape(len(pictures), -1), range(10, 100, 10), axis=1).T
    found['grey deciles'] = [(deciles, deciles)] * len(FIVE)
    write('windows', read_out(found, tasks, patients, LINEAR))


def rates(out, data, mias, boxes):
    """Which learning rate lets a small network learn from films: two networks, three rates, seed 0; beside the
    read-outs what the last line of the log says."""
    rows = []
    for network, change, lengths in (('84 px, width 128, depth 4', {}, (400, 1600)),
                                     ('112 px, width 192, depth 6', LARGER, (500,))):
        recipe = pretrain.SMALL | change | dict(data=data)
        grid = {f'lr {lr}, {steps} steps': recipe | dict(lr=lr, steps=steps, warmup=steps // 10)
                for steps in lengths for lr in (0.0113, 0.0028, 0.0007)}
        place = {arm: f'rates-{recipe["size"]}-{slug(arm)}' for arm in grid}
        trained = pretrained(out, {place[arm]: values for arm, values in grid.items()})
        arms = {'random init': [untrained(recipe)]} | {arm: [trained[place[arm]]] for arm in grid}
        logged = {arm: json.loads(Path(out, place[arm], 'log.jsonl').read_text().splitlines()[-1]) for arm in grid}
        for row in read_films(arms, film_material(mias, boxes, recipe['size'])):
            last = logged.get(row['arm'], {})
            rows.append(dict(network=network) | row | {k: last.get(k, '') for k in (
                'teacher_entropy', 'kl', 'cls_spread', 'effective_rank')})
    write('rates', rows)


def longer(out, data, mias, boxes, steps=6000, seeds=(0, 1)):
    """Does the gain over random weights grow with training? Blind and tissue-aware crops and masks, read out at an
    eighth, a quarter, a half and the end of the same runs."""
    names = {arm: [f'longer-{slug(arm)}-{seed}' for seed in seeds] for arm in ('DINOv2', '+ DINO-M & iBOT-M')}
    recipe = pretrain.SMALL | dict(steps=steps, warmup=steps // 10, keep_every=steps // 8, data=data)
    pretrained(out, {name: recipe | ARMS[arm] | dict(seed=seed)
                     for arm, of in names.items() for seed, name in zip(seeds, of)})
    material, rows = film_material(mias, boxes, pretrain.SMALL['size']), []
    for step in (steps // 8, steps // 4, steps // 2, steps):
        arms = {arm: [vit.load(f'{out}/{name}/step_{step:06d}.pt') for name in of] for arm, of in names.items()}
        arms['random init'] = [untrained(pretrain.SMALL | dict(seed=seed)) for seed in seeds]
        for row in read_films(arms, material):
            untrained_arm = row['arm'] in ('chance', 'random init')
            if not untrained_arm or step == steps // 8:     # these are the same at each
                rows.append(dict(step=0 if untrained_arm else step) | row)
    write('longer', sorted(rows, key=lambda row: row['step']))


def read_films(arms, material):
    """{arm: encoders} -> the rows of `read_out` on each part of `film_material`."""
    rows = []
    for pictures, tasks, patients in material:
        found = {arm: [features(encoder, pictures) for encoder in encoders] for arm, encoders in arms.items()}
        rows += read_out(found, tasks, patients, LINEAR)
    return rows


def film_material(mias, boxes, side):
    """-> [(pictures, tasks, patients)]: the windows of `mass_windows`; whole films of CBIS-DDSM, CC (0) or MLO (1),
    without (0) or with (1) a malignant mass; those of mini-MIAS with their density."""
    films, _ = datasets.load('csv', boxes, boxes=True)
    dense, _ = datasets.load('mias', mias)
    tasks = dict(view=[int(row.view == 'MLO') for row in films],
                 film=[int(any(box[-1] == 'cancer' for box in row.boxes)) for row in films])
    density = dict(density=['FGD'.index(row.labels['density']) for row in dense])
    parts = [mass_windows(boxes, side)]
    for rows, labels in ((films, tasks), (dense, density)):
        pictures = [squashed(images.clahe(images.read(row.path)), side) for row in rows]
        parts.append((pictures, {task: np.array(of) for task, of in labels.items()},
                      np.array([row.patient for row in rows])))
    return parts


def mass_windows(boxes, side):
    """-> pictures (n), tasks {mass, malignant: labels, -1 where there is none}, patients (n,). A window is a square of
    1.5 times the longer side of a mass (64 to 400 pixels), its centre moved by up to .15 of that; its counterpart has
    the same size and film, at least .7 tissue and no mass."""
    rng, found = np.random.default_rng(0), []
    for row in datasets.load('csv', boxes, boxes=True)[0]:
        image = images.clahe(images.read(row.path))
        breast, lesions = mask.tissue(image), np.array([box[1:5] for box in row.boxes])   # (G, 4), x0 y0 x1 y1
        for _, x0, y0, x1, y1, kind in row.boxes:
            length = int(np.clip(1.5 * max(x1 - x0, y1 - y0), 64, 400))
            centre = np.array([y0 + y1, x0 + x1]) / 2 + length * rng.uniform(-0.15, 0.15, 2)
            corners = [(square_at(image.shape, centre, length), 1, int(kind == 'cancer')),
                       (free_square(rng, breast, lesions, length), 0, -1)]
            for corner, mass, malignant in corners:
                if corner:
                    top, left = corner
                    window = image[top:top + length, left:left + length]
                    found.append((squashed(window, side), mass, malignant, row.patient))
    pictures, mass, malignant, patients = zip(*found)
    return list(pictures), dict(mass=np.array(mass), malignant=np.array(malignant)), np.array(patients)


def square_at(shape, centre, length):
    """Corner (top, left) of a square around `centre` (y, x), moved into an image of this shape."""
    return tuple(int(np.clip(c - length / 2, 0, side - length)) for c, side in zip(centre, shape))


def free_square(rng, breast, lesions, length, tries=60):
    """Corner of a random square on at least .7 tissue that touches no lesion; None if no try finds one."""
    inside = np.argwhere(breast)
    for centre in inside[rng.integers(len(inside), size=tries)]:
        top, left = square_at(breast.shape, centre, length)
        apart = (lesions[:, 0] >= left + length) | (lesions[:, 2] <= left) \
            | (lesions[:, 1] >= top + length) | (lesions[:, 3] <= top)
        if apart.all() and breast[top:top + length, left:left + length].mean() >= 0.7:
            return top, left


def squashed(image, side):
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


# ---- 3: the adjacent slice loss --------------------------------------------------------------------------------------

DISTANCES = range(1, 9)


def adjacent(out, slices=16):
    """Without the loss (with as much compute, and with as many images) and with D_max = 1, 2, 4, 8, on 96 volumes;
    then 192 unseen volumes, every slice embedded: whole, and as one window of its own, since the outline of a whole
    breast tells the volume to anyone.

    The row `pixels` is the correlation of the greys inside the tissue: phantoms turn slowly, slices 8 apart are the
    same anatomy still, so which D_max is best cannot be seen on them."""
    arms = {'without': dict(slice_weight=0.0), 'without, as many images': dict(slice_weight=0.0)} \
        | {f'D_max {d}': dict(d_max=d) for d in (1, 2, 4, 8)}
    recipes = {}
    for arm, change in arms.items():
        for seed in SEEDS:
            data = folder_of(out, f'volumes-{seed}', 96, (seed, 8), slices=slices)
            recipe = RECIPE | change | dict(seed=seed, data=data)
            recipes[f'adjacent-{slug(arm)}-{seed}'] = recipe | dict(
                steps=recipe['steps'] if arm.endswith('images') else steps_of(recipe, 1))
    trained = pretrained(out, recipes)
    tests = phantoms(192, (99, 9), slices=slices)
    density, rng = np.array([p['density'] for p in tests]), np.random.default_rng(0)
    rows = [dict(arm='pixels', seed='') | {f'cosine_{d}': np.mean([
        np.corrcoef(a[p['tissue']], b[p['tissue']])[0, 1] for p in tests[:48]
        for a, b in zip(p['pixels'][d:], p['pixels'])]) for d in DISTANCES}]
    cuts = [sampler.cut(image, sampler.crop_box(rng, p['tissue'], RECIPE['global_scale'], (3 / 4, 4 / 3), 0.7)[0],
                        (RECIPE['size'],) * 2) for p in tests for image in p['pixels']]
    for arm in (*arms, 'random init'):
        for seed in SEEDS:
            encoder = untrained(RECIPE | dict(seed=seed)) if arm == 'random init' else \
                trained[f'adjacent-{slug(arm)}-{seed}']
            x, windows = (features(encoder, images)[0].reshape(len(tests), slices, -1)
                          for images in ([image for p in tests for image in p['pixels']], cuts))
            right = nearest(x[:, slices // 2], density, np.arange(len(tests))).argmax(1) == density
            rows.append(dict(arm=arm, seed=seed, density_k_nn=right.mean()) | coherence(x)
                        | {f'{name}_windows': value for name, value in coherence(windows).items() if 'retr' in name})
    write('adjacent', rows)


def coherence(x):
    """x (v, K, D), unit CLS tokens of v volumes ->

        cosine_d   of slices d apart, d = 1 .. 8; of different volumes; both also with the mean token removed
        retrieval  share of slices whose nearest other slice is of their volume; at least 8 apart
        depth      Spearman correlation of embedding distance and slice distance, mean over volumes
    """
    v, K, _ = x.shape
    values = {}
    centred = x - x.mean((0, 1))
    for suffix, z in (('', x), ('_centred', centred / np.linalg.norm(centred, axis=-1, keepdims=True))):
        values |= {f'cosine_{d}{suffix}': np.mean((z[:, d:] * z[:, :-d]).sum(-1)) for d in DISTANCES}
        sums = z.sum((0, 1)) @ z.sum((0, 1)) - np.square(z.sum(1)).sum()
        values[f'between{suffix}'] = sums / (v * (v - 1) * K * K)
    flat, volume, depth = x.reshape(v * K, -1), np.repeat(np.arange(v), K), np.tile(np.arange(K), v)
    near = flat @ flat.T
    apart, same = abs(depth[:, None] - depth[None]), volume[:, None] == volume[None]
    for name, least in (('retrieval', 1), ('retrieval_8', 8)):
        best = np.where(same & (apart < least), -np.inf, near).argmax(1)
        values[name] = np.mean(volume[best] == volume)
    upper = np.triu_indices(K, 1)
    distance = abs(np.subtract.outer(range(K), range(K)))[upper]
    values['depth'] = np.mean([spearmanr(-(z @ z.T)[upper], distance).statistic for z in x])
    return values


# ---- 4: the tissue mask ----------------------------------------------------------------------------------------------

RULES = (10, 25, 40, 50, 60, 70, 80, None)                  # percentiles, and the self-tuning threshold


def tissue(out, sources, draws=10, most=100):
    """Share of the breast that a rule keeps and of the background that it admits, after CLAHE, where the truth is
    known; the share of the image called tissue everywhere; and how often crops and masks relax rho.

    sources: NAME=FILE of CSV files with the columns file, a density class (tissue, density) or percent_density (0..1),
    and mask where there are hand-made ones (64 is background, all above is breast, the pectoral muscle too); of more
    than `most` images some are drawn. Phantoms come first.
    """
    rows, relaxed = [], []
    found = {'phantoms': phantom_images()}
    for source in sources:
        name, path = source.split('=', 1)
        found[name] = labelled(path, most)
    for source, examples in found.items():
        for rule in RULES:
            made = [(mask.tissue(image, rule), truth, density) for image, truth, density in examples]
            for density in ('all', *sorted({d for *_, d in made})):
                masks = [(m, truth) for m, truth, d in made if density in ('all', d)]
                row = dict(source=source, density=density, rule='self-tuning' if rule is None else rule, n=len(masks),
                           share=np.mean([m.mean() for m, _ in masks]))
                if masks[0][1] is not None:
                    kept = np.array([((m & t).sum() / t.sum(), (m & ~t).sum() / (~t).sum(),
                                      (m & t).sum() / (m | t).sum()) for m, t in masks])
                    row |= dict(kept=kept[:, 0].mean(), admitted=kept[:, 1].mean(), median_iou=np.median(kept[:, 2]),
                                least_iou=kept[:, 2].min())
                rows.append(row)
            if rule in (40, None):
                relaxed += relaxations(source, rule, [(m, d) for m, _, d in made], draws)
    write('tissue', rows)
    write('relaxed', relaxed)


def phantom_images():
    """`labelled` of 120 phantoms."""
    return [(p['pixels'][0], p['tissue'], str(p['density'])) for p in phantoms(120, (99, 10))]


def labelled(path, most):
    """-> (image after CLAHE, true mask or None, density) of the images of a CSV."""
    folder = Path(path).parent
    with open(path, newline='') as file:
        lines = list({line['file']: line for line in csv.DictReader(file)}.values())
    lines = [lines[i] for i in sorted(np.random.default_rng(0).permutation(len(lines))[:most])]
    images = []
    for line in lines:
        truth = np.array(Image.open(folder / line['mask']).convert('L')) > 100 if 'mask' in line else None
        density = line.get('tissue') or line.get('density') or \
            ('0-25 %', '25-50 %', '50-75 %', '75-100 %')[min(int(float(line['percent_density']) * 4), 3)]
        images.append((images.clahe(images.read(folder / line['file'])), truth, density))
    return images


def relaxations(source, rule, masks, draws, grid=37):
    """How often rho is not met as it is: global crops, local crops, and masks of half of all patches drawn on the
    global ones, at the default scales."""
    cfg, rows = pretrain.Config(), []
    for rho in np.arange(1, 8) / 10:
        counts = {}
        for i, (m, density) in enumerate(masks):
            rng, info = np.random.default_rng([0, i]), {}
            for _ in range(draws):
                box, gave = sampler.crop_box(rng, m, cfg.global_scale, (3 / 4, 4 / 3), rho)
                sampler.patch_mask(rng, sampler.tissue_grid(m, box, grid, grid), grid * grid // 2, rho, info=info)
                local = sampler.crop_box(rng, m, cfg.local_scale, (3 / 4, 4 / 3), rho)[1]
                for name in ('all', density):
                    counts.setdefault(name, []).append((gave, local, info['relaxed']))
        rows += [dict(source=source, density=density, rule='self-tuning' if rule is None else rule, rho=rho,
                      n=len(found) // draws) | dict(zip(('global_crops', 'local_crops', 'masks'), np.mean(found, 0)))
                 for density, found in counts.items()]
    return rows


# ---- 5: do masks hide lesions? ---------------------------------------------------------------------------------------

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def hidden(out, mias, boxes):
    """Annotated images, the paper's 518 and 37x37 patches: how often a lesion that a global crop holds whole is wholly
    under the mask, by size and ratio; masks that seek tissue and blind ones. Mean over the crops of a lesion, then over
    lesions; the interval draws patients. Half of the crops of a training run have no mask at all."""
    rows = []
    for name, dataset, root in (('mini-MIAS', 'mias', mias), ('CBIS-DDSM masses', 'csv', boxes)):
        volumes = [row for row in datasets.load(dataset, root, boxes=True)[0] if row.boxes]
        counts = {}
        for i, volume in enumerate(volumes):
            for number, side, kind, ratio, masked in under_masks(volume, np.random.default_rng([0, i])):
                for size in ('all', size_of(dataset, side)):
                    of_lesion = counts.setdefault((size, kind, ratio), {}).setdefault((volume.patient, i, number), [])
                    of_lesion.append(masked.all())
        annotated = sum(len(row.boxes) for row in volumes)
        for (size, kind, ratio), found in counts.items():
            covered, patients = np.array([np.mean(c) for c in found.values()]), np.array([p for p, *_ in found])
            low, high = metrics.bootstrap(np.mean, [covered], patients, np.random.default_rng(0), n=500)
            rows.append(dict(data=name, size=size, masks=kind, ratio=ratio, annotated=annotated, lesions=len(found),
                             value=covered.mean(), low=low, high=high))
    write('hidden', rows)


def under_masks(volume, rng, draws=20, n=37):
    """Global crops of an image at the default scales, masks of each kind and ratio -> for each lesion that lies whole
    in a crop: its number, its side in sides of the image, kind, ratio, whether each patch that it touches is masked."""
    cfg, image = pretrain.Config(), images.clahe(images.read(volume.path))
    breast = mask.tissue(image, cfg.percentile, cfg.kernel)
    for _ in range(draws):
        box, _ = sampler.crop_box(rng, breast, cfg.global_scale, (3 / 4, 4 / 3), cfg.min_coverage)
        grid = sampler.tissue_grid(breast, box, n, n)
        masks = {(kind, ratio): sampler.patch_mask(rng, where, round(ratio * n * n), cfg.min_coverage)
                 for kind, where in (('tissue-aware', grid), ('blind', np.ones_like(grid))) for ratio in RATIOS}
        y0, x0, y1, x1 = box
        for number, (_, left, top, right, bottom, _) in enumerate(volume.boxes):
            if x0 <= left and right <= x1 and y0 <= top and bottom <= y1:
                rows = slice(int((top - y0) * n / (y1 - y0)), int(np.ceil((bottom - y0) * n / (y1 - y0))))
                columns = slice(int((left - x0) * n / (x1 - x0)), int(np.ceil((right - x0) * n / (x1 - x0))))
                side = np.sqrt((right - left) * (bottom - top) / image.size)
                yield from ((number, side, *which, z[rows, columns]) for which, z in masks.items())


def size_of(dataset, side):
    """mini-MIAS: a film is 1024 pixels of 0.2 mm wide. Elsewhere the scale is lost, the image's side is the measure."""
    if dataset == 'mias':
        mm = side * 1024 * 0.2
        return '5 mm or less' if mm <= 5 else '5-10 mm' if mm <= 10 else '10-20 mm' if mm <= 20 else 'over 20 mm'
    return '4 % of the side or less' if side <= 0.04 else '4-8 %' if side <= 0.08 else 'over 8 %'


def scores(arms, min_distance, draws=500):
    """{arm: runs of detect.py, one a seed, all on the same test set} -> {arm: their score.Scored}, weights of the
    volumes (1 + draws, V + 1), all once, then draws of patients with replacement, and seeds drawn likewise (1 + draws,
    seeds)."""
    first = next(iter(arms.values()))[0]
    volumes, truth, _ = score.read_truth(f'{first}/labels.csv', f'{first}/boxes.csv')
    names, patient = np.unique([key[0] for key, _ in volumes], return_inverse=True)
    rng, seeds = np.random.default_rng(0), len(next(iter(arms.values())))
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    weights = np.vstack([np.ones(len(volumes)), times[:, patient]])
    weights = np.column_stack([weights, np.ones(len(weights))])     # the last: predictions in volumes not listed
    drawn = np.vstack([np.arange(seeds), rng.integers(seeds, size=(draws, seeds))])
    return {arm: [score.Scored(volumes, truth, score.read_predictions(run), min_distance) for run in runs]
            for arm, runs in arms.items()}, weights, drawn


def over_seeds(values, drawn, references, **more):
    """values {arm: (seeds, 1 + draws)} of all test volumes and of each draw -> rows: each seed, the mean, and its
    difference from each reference, with intervals; means are over the seeds of `drawn`."""
    rows = []
    for arm, found in values.items():
        mean = np.take_along_axis(found, drawn.T, 0).mean(0)
        shown = dict(enumerate(found)) | {'mean': mean} | {
            f'mean - {other}': mean - np.take_along_axis(values[other], drawn.T, 0).mean(0)
            for other in references if other != arm}
        for seed, v in shown.items():
            low, high = np.nanpercentile(v[1:], [2.5, 97.5])
            rows.append(dict(arm=arm, seed=seed) | more | dict(value=v[0], low=low, high=high))
    return rows


# ---- 6: where does it look? (MammoDINO Fig. 3) -----------------------------------------------------------------------

def attention(out, side=168):
    """Where the last block's CLS token looks (mean over heads), and what the first principal component of the patch
    tokens tells, on 200 test phantoms with a lesion squashed to 168 x 168, where a patch holds about as much of the
    breast as in training; encoders of the ablation.

    tissue, lesion: share of the attention there, and `lesion_to_tissue`, (lesion's box / other tissue) of the attention
    over the same of the area. component_tissue, component_lesion: how well the component alone tells tissue from air
    and lesion from other tissue, AUC turned to be above .5 for each phantom. `brightness` takes the grey of the patch
    for both, `even` a constant."""
    tests, n = phantoms(200, (99, 13), lesion=True), side // 14
    where = np.array([[sampler.tissue_grid(m, (0, 0, *m.shape), n, n).ravel()
                       for m in (p['tissue'], box_mask(p['tissue'].shape, p['boxes'][0][1:]))]
                      for p in tests]).swapaxes(0, 1)                                   # (2, phantoms, N)
    grey = squares(tests, side)
    brightness = torch.nn.functional.avg_pool2d(grey, 14).flatten(1).numpy()
    rows = [dict(arm='brightness', seed='') | looks(brightness, brightness, *where),
            dict(arm='even', seed='') | looks(np.ones_like(brightness), np.ones_like(brightness), *where)]
    for arm in (*ARMS, 'random init'):
        for seed in SEEDS:
            encoder = untrained(RECIPE | dict(seed=seed)) if arm == 'random init' else \
                vit.load(f'{out}/{slug(arm)}-{seed}/last.pt')
            with torch.no_grad():
                heat = encoder.attention(grey).mean(1).flatten(1).numpy()               # (phantoms, N)
                patches = encoder(grey)[1].numpy()
            centred = patches - patches.mean(1, keepdims=True)
            component = np.stack([x @ np.linalg.svd(x, full_matrices=False)[2][0] for x in centred])
            rows.append(dict(arm=arm, seed=seed) | looks(heat, component, *where))
    write('attention', rows)


def squares(found, side):
    """The mammograms of phantoms, squashed, as an encoder takes them: (n, 1, side, side) in [0, 1]."""
    images = [Image.fromarray(p['pixels'][0]).resize((side, side), Image.Resampling.BICUBIC) for p in found]
    return torch.from_numpy(np.stack(images))[:, None].float() / 255


def box_mask(shape, box):
    """The pixels that a box (x0, y0, x1, y1) touches, bool (H, W)."""
    inside, (x0, y0, x1, y1) = np.zeros(shape, bool), box
    inside[int(y0):int(np.ceil(y1)), int(x0):int(np.ceil(x1))] = True
    return inside


def looks(heat, component, tissue, lesion):
    """All (phantoms, N), tissue and lesion the share of each patch -> the numbers of `attention`, means over phantoms,
    those of the attention with an interval over phantoms."""
    heat, values = heat / heat.sum(1, keepdims=True), {}
    mass, area = ([(h * m).sum(1) for m in (tissue, lesion)] for h in (heat, np.full_like(heat, 1 / heat.shape[1])))
    found = dict(tissue=(lambda t, *_: t.mean(), mass), lesion=(lambda _, m: m.mean(), mass),
                 lesion_to_tissue=(lambda t, m, at, am: m.sum() / (t - m).sum() * (at - am).sum() / am.sum(),
                                   [*mass, *area]))
    for name, (metric, arrays) in found.items():
        low, high = metrics.bootstrap(metric, arrays, np.arange(len(heat)), np.random.default_rng(0), n=500)
        values |= {name: metric(*arrays), f'{name}_low': low, f'{name}_high': high}
    for name, yes, of in (('component_tissue', tissue > 0.5, (tissue > 0.5) | (tissue == 0)),
                          ('component_lesion', lesion > 0.25, tissue > 0.5)):
        told = [metrics.auc(y[use], c[use]) for y, c, use in zip(yes, component, of)]
        values[name] = np.nanmean([max(v, 1 - v) for v in told])
    return values


# ---- 7: fused representations of FFDM and SM -------------------------------------------------------------------------

SEEN = ('ffdm', 'sm', 'ffdm', 'both', 'ffdm', 'sm', 'neither', None)        # where a lesion shows; None: there is none


def pairs_of_phantoms(folder, trace, parts=(480, 80, 240)):
    """Mammograms ffdm/NNNN.npy and sm/NNNN.npy of the same breasts, with sm.csv and ffdm.csv as detect.py takes them,
    their labels saying where the lesion shows; and shuffled.csv, which pairs each SM with the FFDM of another breast of
    its split and side. A lesion that only the FFDM shows keeps the share `trace` of its contrast in the SM. ->
    the folder"""
    if (folder / 'shuffled.csv').exists():
        return folder
    contrasts = dict(ffdm=(1, trace), sm=(0, 1), both=(1, 1), neither=(0, 0))
    splits, alike, rows = np.repeat(('train', 'val', 'test'), parts), {}, dict(sm=[], ffdm=[], shuffled=[])
    for name in ('sm', 'ffdm'):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, split in enumerate(splits):
        seen = SEEN[i % len(SEEN)]
        p = phantom.breast(np.random.default_rng([99, 15, i]), slices=8, lesion=seen is not None,
                         contrasts=contrasts.get(seen, (0, 0)))
        box = (0, *p.boxes[0][1:], seen) if seen else [''] * 6
        for name in ('sm', 'ffdm'):
            np.save(folder / name / f'{i:04d}.npy', images.clahe(images.to_uint8(getattr(p, name))))
            rows[name].append((f'{name}/{i:04d}.npy', i, i, 'LCC', split, *box))
        alike.setdefault((split, fuse.heavier_half(p.sm)), []).append(i)
    for numbers in alike.values():                          # breasts of one split and side, each with the next one's
        for i, other in zip(numbers, np.roll(numbers, -1)):
            rows['shuffled'].append((rows['ffdm'][other][0], *rows['ffdm'][i][1:]))
    for name, lines in rows.items():
        score.write_csv(folder / f'{name}.csv', ('path', 'patient', 'exam', 'view', 'split',
                                                  'frame', 'x0', 'y0', 'x1', 'y1', 'label'), lines)
    return folder


PAIRED = dict(size=168, channels=32, batch=16, micro_batch=16, workers=0, min_distance=10.0, dropout=0.05, lr=2e-3,
              freeze=False, normals=0.3, draws=100)
TRACES = (0.3, 0.0)
FUSED = {                                                   # what stands beside A's levels in stage III
    'A alone': None,
    'A beside itself': 'A',
    'A beside another A': 'other',                          # trained alike from another seed: two detectors of SM
    'A beside C, which sees SM': 'unmimicked',              # no stage II: what B starts from
    'fused, B learnt from C': 'B',
    'fused, B learnt from shuffled pairs': 'shuffled',
    'fused, B random': 'random',
    'A beside C, which sees FFDM': 'C'}                     # both images, the bound


def fused(out):
    """Mechanism test of the three stages: 480 pairs to train, 80 to choose the epoch, 240 to test (90 lesions in FFDM
    alone, 60 in SM alone, 30 each in both and neither), the same for all. All arms of stage III start from the same A,
    train equally long and have equal parameters. With a trace of 0 the SM knows nothing of what only the FFDM shows, so
    B has nothing to tell."""
    rows = []
    for trace in TRACES:
        place = Path(out) / f'pairs-{trace}'
        root = pairs_of_phantoms(place, trace)
        arms = {arm: beside for arm, beside in FUSED.items() if trace or beside in (None, 'A', 'unmimicked', 'B')}
        for stage in zip(*(stages(out, place, root, seed, arms.values()) for seed in SEEDS)):
            in_lanes({name: detector_command(values | dict(out=name, resume=True))
                      for runs in stage for name, values in runs.items() if not Path(name, 'scores.json').exists()})
        runs = {arm: [f'{place}/fused-{beside}-{seed}' if beside else f'{place}/A-{seed}' for seed in SEEDS]
                for arm, beside in arms.items()}
        runs['C alone, FFDM'] = [f'{out}/pairs-{TRACES[0]}/C-{seed}' for seed in SEEDS]
        scored, weights, drawn = scores(runs, PAIRED['min_distance'])
        classes = score.read_truth(f'{place}/A-0/labels.csv', f'{place}/A-0/boxes.csv')[2]
        areas = {arm: np.array([[areas_by_class(s.flat, w, classes) for w in weights] for s in seeds])
                 for arm, seeds in scored.items()}          # (seeds, 1 + draws, 1 + classes)
        controls = [arm for arm in list(FUSED)[1:4] if arm in arms]
        for i, kind in enumerate(('all', *sorted(set(classes)))):
            rows += over_seeds({arm: found[..., i] for arm, found in areas.items()}, drawn, controls, trace=trace,
                               lesions=kind)
    write('fused', rows)


def stages(out, place, root, seed, beside):
    """The runs {folder: flags} of stages I, II and III of a seed. `beside`: what stage III puts beside A. C is the same
    for every trace, since the FFDM has none to lose."""
    at = {name: f'{place}/{name}-{seed}' for name in ('A', 'B', 'shuffled', 'random')}
    at['C'] = at['unmimicked'] = f'{out}/pairs-{TRACES[0]}/C-{seed}'
    at['other'] = f'{place}/A-{(seed + 1) % len(SEEDS)}'
    base = PAIRED | dict(encoder=f'{out}/mammodino-0/last.pt', root=f'{root}/sm.csv', seed=seed)
    second = dict(B=base | dict(epochs=5, mimic=at['C'], paired=f'{root}/ffdm.csv'),
                  shuffled=base | dict(epochs=5, mimic=at['C'], paired=f'{root}/shuffled.csv'),
                  random=base | dict(epochs=0, random_encoder=True))
    third, both = base | dict(epochs=4, init_from=at['A']), dict(C=dict(paired=f'{root}/ffdm.csv'))
    return ({at['A']: base | dict(epochs=8), at['C']: base | dict(epochs=8, root=f'{root}/ffdm.csv')},
            {at[name]: values for name, values in second.items() if name in beside},
            {f'{place}/fused-{name}-{seed}': third | dict(fuse=at[name]) | both.get(name, {})
             for name in beside if name})


def areas_by_class(m, weight, classes):
    """FAUC-1 of all lesions, then of each class alone, false positives counted as for all: (1 + classes,)"""
    thresholds, false_positives, _ = metrics.curve(m, weight, every=True)
    width = np.diff(np.append(np.minimum(false_positives, 1), 1))
    found = m.best >= thresholds[width > 0, None]                                       # (thresholds, G)
    count = weight[m.home] * np.array([classes == classes, *(classes == name for name in sorted(set(classes)))])
    with np.errstate(invalid='ignore'):
        return width[width > 0] @ (found @ count.T / count.sum(1))


# ---- 8: three detectors ----------------------------------------------------------------------------------------------

DETR = {k: detect.DETR_DEMO[k] for k in ('queries', 'layers', 'denoising', 'lr')} | dict(head='detr')
REAL_DETECTOR = dict(size=252, channels=64, batch=16, micro_batch=16, workers=0, dropout=0.05, lr=2e-3, draws=100)


def detectors(out, mias, boxes, encoder):
    """RetinaNet and DINO-DETR on the same encoder with as many epochs, and on the SM of the paired phantoms the fused
    detector of `fused`, which has had A, B and C trained before; beside it RetinaNet trained as long as its last two
    stages. On real films seed 0 and the frozen `encoder`."""
    place, rows = f'{out}/pairs-{TRACES[0]}', []
    root = pairs_of_phantoms(Path(place), TRACES[0])
    base = PAIRED | dict(encoder=f'{out}/mammodino-0/last.pt', root=f'{root}/sm.csv', epochs=8)
    todo = {f'{place}/detr-{seed}': base | DETR | dict(seed=seed) for seed in SEEDS}
    runs = {'SM of phantoms': ({'RetinaNet': [f'{place}/A-{seed}' for seed in SEEDS],
                                'RetinaNet, 4 epochs more': [f'{place}/fused-A-{seed}' for seed in SEEDS],
                                'DINO-DETR': [f'{place}/detr-{seed}' for seed in SEEDS],
                                'fused': [f'{place}/fused-B-{seed}' for seed in SEEDS]}, PAIRED['min_distance'])}
    for name, dataset, root, reach, epochs in (('CBIS-DDSM masses', 'csv', boxes, 20.0, 4),
                                               ('mini-MIAS', 'mias', mias, 25.0, 12)):
        real = REAL_DETECTOR | dict(dataset=dataset, root=root, min_distance=reach, epochs=epochs, encoder=encoder)
        todo |= {f'{out}/{slug(name)}-retinanet': real, f'{out}/{slug(name)}-detr': real | DETR}
        runs[name] = {'RetinaNet': [f'{out}/{slug(name)}-retinanet'], 'DINO-DETR': [f'{out}/{slug(name)}-detr']}, reach
    in_lanes({name: detector_command(values | dict(out=name, resume=True))
              for name, values in todo.items() if not Path(name, 'scores.json').exists()})
    metrics = {'mean sensitivity at 1-4 FP': lambda s, w: s.with_lesions(w)[-1], 'FAUC-1': lambda s, w: s.fauc(w)[0],
               'AP': lambda s, w: s.overlap(w)[0].mean()}
    for name, (detectors, reach) in runs.items():
        scored, weights, drawn = scores(detectors, reach)
        for metric, of in metrics.items():
            values = {detector: np.array([[of(s, w) for w in weights] for s in seeds])
                      for detector, seeds in scored.items()}
            rows += over_seeds(values, drawn, ('RetinaNet',), data=name, metric=metric)
        rows += [dict(data=name, metric='ms per image', arm=detector, seed=0, value=milliseconds(folders[0]))
                 for detector, folders in detectors.items()]
    write('detectors', rows)


def milliseconds(run, rounds=25):
    """Median time of a detector for one image in memory, one thread, from pixels to boxes."""
    fused = 'other' in detect.checkpoint(run)['config']
    cfg, detector, _ = (fuse if fused else detect).restored(run)
    image = torch.rand(1, 1, cfg.size, cfg.size)
    torch.set_num_threads(1)
    times = []
    with torch.no_grad():
        for _ in range(rounds + 2):
            began = time.perf_counter()
            detector.head.boxes(detector(image))
            times.append(1000 * (time.perf_counter() - began))
    return float(np.median(times[2:]))


# ---- tables and pictures ---------------------------------------------------------------------------------------------

def tables():
    """Every table of tests/results/README.md, as text, {experiment: Markdown}; a test compares them."""
    found = dict(windows=table_of_arms('windows', 'random init'), longer=table_of_arms('longer', 'random init', 'step'),
                 rates=table_of_arms('rates', 'random init', 'network'), ablation=table_of_arms('ablation', 'DINOv2'),
                 adjacent=table_of_distances(), tissue=table_of_masks(), relaxed=table_of_relaxations(),
                 hidden=table_of_hidden_lesions(), attention=table_of_attention(), fused=table_of_fused(),
                 detectors=table_of_detectors())
    return {name: '\n'.join(f"| {' | '.join(map(str, line))} |" for line in table)
            for name, table in found.items() if len(table) > 2}         # an experiment may have no rows yet


def number(v, signed=False):
    """.123, 1.230, -.045, +.006"""
    text = f'{round(float(v), 3) + 0.0:{"+" if signed else ""}.3f}'
    return re.sub(r'^([+-]?)0\.', r'\1.', text).replace('-', '\u2212')


def between(low, high, signed=False):
    """[.123, .456]"""
    return f'[{number(low, signed)}, {number(high, signed)}]'


def heads(*names):
    """The first two lines of a table."""
    return [names, ['---'] * len(names)]


def spread(values):
    """mean (least to largest of the seeds)"""
    values = [float(v) for v in values]
    return f'{number(np.mean(values))} ({number(min(values))}\u2013{number(max(values))})'


def table_of_arms(name, reference, part=None):
    """Mean over seeds, the seeds' range, the difference from the arm `reference` with its interval. `part`: a column
    whose values make parts of the table."""
    rows = read(name)
    columns = list(dict.fromkeys((row['task'], row['readout']) for row in rows))
    names = (f"{task}, {readout}, {'accuracy' if task == 'density' else 'AUC'}" for task, readout in columns)
    lines = heads(f'we measured, {part}' if part else 'we measured', *names)
    for value, arm in dict.fromkeys((row[part] if part else '', row['arm']) for row in rows):
        cells = []
        for column in columns:
            found = {row['seed']: row for row in rows if (row['task'], row['readout']) == column
                     and row['arm'] == arm and (not part or row[part] == value)}
            seeds = [row['value'] for seed, row in found.items() if not seed.startswith('mean')]
            gain = found.get(f'mean - {reference}')
            cells.append((spread(seeds) if len(seeds) > 1 else number(seeds[0])) + (
                f"; {number(gain['value'], True)} {between(gain['low'], gain['high'], True)}" if gain else ''))
        lines.append([f'{value}: {arm}' if part else arm, *cells])
    return lines


def table_of_distances():
    """Mean and range of the seeds."""
    shown = dict(cosine_1='d = 1', cosine_2='2', cosine_4='4', cosine_8='8', between='other volumes',
                 cosine_1_centred='mean removed: d = 1', cosine_8_centred='8', retrieval='same volume nearest',
                 retrieval_8_windows='8 apart, windows', depth='depth', density_k_nn='density, middle slice, CLS k-NN')
    rows = read('adjacent')
    lines = heads('we measured', *shown.values())
    for arm in dict.fromkeys(row['arm'] for row in rows):
        here = [row for row in rows if row['arm'] == arm]
        lines.append([arm, *('' if not here[0][k] else number(here[0][k]) if len(here) == 1
                             else spread(row[k] for row in here) for k in shown)])
    return lines


def table_of_masks():
    """Kept, admitted and median IoU, or the share of the image where there is no truth."""
    rows = [row for row in read('tissue') if row['rule'] in ('25', '40', '50', '60', '80', 'self-tuning')]
    lines = heads('we measured', 'n', *(f'tau = {rule}' if rule.isdigit() else rule
                                        for rule in dict.fromkeys(row['rule'] for row in rows)))
    for source, density in dict.fromkeys((row['source'], row['density']) for row in rows):
        here = [row for row in rows if (row['source'], row['density']) == (source, density)]
        if here[0]['kept']:
            lines.append([f'{source}, {density}', here[0]['n'], *(
                f"{number(r['kept'])}, {number(r['admitted'])}, {number(r['median_iou'])}" for r in here)])
        else:
            lines.append([f'{source}, {density}', here[0]['n'], *(number(r['share']) for r in here)])
    return lines


def table_of_relaxations():
    """Global crops, local crops, masks."""
    rows = [row for row in read('relaxed') if row['density'] == 'all' and row['rule'] == 'self-tuning']
    sources = list(dict.fromkeys(row['source'] for row in rows))
    lines = heads('we measured, rho', *sources)
    for rho in dict.fromkeys(row['rho'] for row in rows):
        lines.append([f'{float(rho):.1f}', *(', '.join(f'{float(row[k]):.1%}' for k in ('global_crops', 'local_crops',
                                                                                      'masks'))
                                            for row in rows if row['rho'] == rho)])
    return lines


def table_of_hidden_lesions():
    """Tissue-aware / blind."""
    rows = read('hidden')
    lines = heads('we measured', 'lesions', *(f'ratio {ratio}' for ratio in RATIOS))
    for data, size in dict.fromkeys((row['data'], row['size']) for row in rows):
        here = {(r['masks'], float(r['ratio'])): r for r in rows if (r['data'], r['size']) == (data, size)}
        cells = [[f"{number(r['value'])} {between(r['low'], r['high'])}"
                  for r in (here[kind, ratio] for kind in ('tissue-aware', 'blind'))] for ratio in RATIOS]
        lines.append([f'{data}, {size}', here['blind', 0.1]['lesions'], *(' / '.join(pair) for pair in cells)])
    return lines


def table_of_attention():
    """Mean and range of the seeds."""
    rows = read('attention')
    columns = dict(tissue='attention on tissue', lesion='on the lesion',
                   lesion_to_tissue='lesion against other tissue, 1 is even',
                   component_tissue='component: tissue or air', component_lesion='lesion or other tissue')
    lines = heads('we measured', *columns.values())
    for arm in dict.fromkeys(row['arm'] for row in rows):
        here = [row for row in rows if row['arm'] == arm]
        lines.append([arm, *(number(here[0][k]) if len(here) == 1 else spread(row[k] for row in here)
                             for k in columns)])
    return lines


def table_of_fused():
    """Of each arm FAUC-1 of all lesions with its range, the difference from the arm of equal parameters with its
    interval, and where the lesions show."""
    rows, control = read('fused'), list(FUSED)[1]
    kinds = ('ffdm', 'sm', 'both', 'neither')
    lines = heads('we measured, FAUC-1', 'all lesions', f'all, against {control}', 'those in FFDM alone',
                  f'these, against {control}', 'in SM alone', 'in both', 'in neither')
    for trace in TRACES:
        here = {(row['arm'], row['lesions'], row['seed']): row for row in rows if float(row['trace']) == trace}
        for arm in dict.fromkeys(arm for arm, *_ in here):
            seeds = {kind: spread(row['value'] for (a, k, seed), row in here.items()
                                  if (a, k) == (arm, kind) and seed.isdigit()) for kind in ('all', *kinds)}
            gain = {kind: here.get((arm, kind, f'mean - {control}')) for kind in ('all', 'ffdm')}
            told = {kind: f"{number(row['value'], True)} {between(row['low'], row['high'], True)}" if row else ''
                    for kind, row in gain.items()}
            lines.append([f'trace {trace:g}: {arm}', seeds['all'], told['all'], seeds['ffdm'], told['ffdm'],
                          *(seeds[kind] for kind in kinds[1:])])
    return lines


def table_of_detectors():
    """Means over seeds with intervals, the difference of mean sensitivity, time."""
    rows, metrics = read('detectors'), ('mean sensitivity at 1-4 FP', 'AP', 'FAUC-1')
    lines = heads('we measured', metrics[0], 'against RetinaNet', *metrics[1:], 'ms per image')
    for data, arm in dict.fromkeys((row['data'], row['arm']) for row in rows):
        here = {(row['metric'], row['seed']): row for row in rows if (row['data'], row['arm']) == (data, arm)}
        mean = [f"{number(row['value'])} {between(row['low'], row['high'])}"
                for row in (here[metric, 'mean'] for metric in metrics)]
        gain = here.get((metrics[0], 'mean - RetinaNet'))
        told = f"{number(gain['value'], True)} {between(gain['low'], gain['high'], True)}" if gain else ''
        lines.append([f'{data}: {arm}', mean[0], told, *mean[1:], f"{float(here['ms per image', '0']['value']):.0f}"])
    return lines


def pictures(demo, folder):
    """curves.png of the log of a run of pretrain.py, if there is one, pair.png and projections.png in `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pair_picture().save(folder / 'pair.png')
    projections_picture().save(folder / 'projections.png')
    log = Path(demo) / 'log.jsonl'
    if not log.exists():
        return print(f'{demo} holds no run of pretrain.py: no curves.png')
    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    names = dict(image='DINO-M', patch='iBOT-M', slice='DINO-adj', koleo='KoLeo', teacher_entropy='teacher entropy',
                 effective_rank='effective rank of CLS')
    panels = [np.array(curve(title, [(line['step'], line[name]) for line in lines])) for name, title in names.items()]
    sheet = np.vstack([np.hstack(panels[:3]), np.hstack(panels[3:])])
    score.halved(Image.fromarray(sheet)).save(folder / 'curves.png')


def curve(title, points, width=560, height=400):
    """One line over the steps of a run, twice as large as it will be shown."""
    canvas = Image.new('RGB', (width, height), 'white')
    pen, (x, y) = ImageDraw.Draw(canvas), np.array(points, float).T
    low, high = (y.min(), y.max()) if np.ptp(y) else (y[0] - 1, y[0] + 1)
    left, top, right, bottom = 90, 60, width - 30, height - 60
    at = list(zip(left + (right - left) * (x - x[0]) / np.ptp(x), bottom - (bottom - top) * (y - low) / (high - low)))
    pen.rectangle((left, top, right, bottom), outline='#BBBBBB', width=2)
    pen.line(at, score.COLOURS[0], 4, joint='curve')
    pen.text((left, 14), title, 'black', score.font(28))
    for value, place in ((low, bottom), (high, top)):
        pen.text((left - 10, place), f'{value:.2f}', 'black', score.font(22), anchor='rm')
    pen.text((right, bottom + 10), f'step {int(x[-1])}', 'black', score.font(22), anchor='ra')
    return canvas


def pair_picture(d=2, side=300):
    """A slice and its neighbour d away with the window that both share, the two views of the pair, their difference."""
    p = phantoms(1, (3, 14), slices=16, lesion=True)[0]
    k = int(np.clip(p['boxes'][0][0], d, 15 - d))
    rng = np.random.default_rng(5)
    box = sampler.crop_box(copy.deepcopy(rng), p['tissue'], (0.25, 0.5), (3 / 4, 4 / 3), 0.7)[0]
    a, b = (p['pixels'][z] for z in (k, k + d))
    views = sampler.pair_views(rng, a, b, p['tissue'], side, (0.25, 0.5), rho=0.7, flip=0)
    panels = [(framed(image, box, side), name) for image, name in ((a, f'slice {k}'), (b, f'slice {k + d}'))]
    panels += [(view, name) for view, name in zip(views, ('view of the student', 'view of the teacher'))]
    apart = np.abs(views[0].astype(int) - views[1])
    panels.append((np.uint8(apart), 'their difference'))
    panels = [(np.repeat(image[..., None], 3, -1) if image.ndim == 2 else image, name) for image, name in panels]
    sheet = Image.new('RGB', (sum(image.shape[1] + 8 for image, _ in panels) + 8, side + 44), 'white')
    x = 8
    for image, name in panels:
        sheet.paste(Image.fromarray(image), (x, 8))
        ImageDraw.Draw(sheet).text((x, side + 14), name, 'black', score.font(18))
        x += image.shape[1] + 8
    return sheet


def projections_picture(trace=0.3, side=256):
    """FFDM and SM of four paired phantoms, whose lesions show in FFDM alone, in SM alone, in both and in neither."""
    contrasts, columns = dict(FFDM=(1, trace), SM=(0, 1), both=(1, 1), neither=(0, 0)), []
    for i, pair in enumerate(contrasts.values()):
        p = phantom.breast(np.random.default_rng([3, 16, i]), slices=8, lesion=True, contrasts=pair)
        shown = [detect.boxed(images.clahe(images.to_uint8(image)), truth=p.boxes[:, 1:], side=side)
                 for image in (p.ffdm, p.sm)]
        columns.append(np.pad(np.vstack(shown), ((0, 0), (0, 6), (0, 0)), constant_values=255))
    return sampler.sheet([[(column, f'seen in {name}') for column, name in zip(columns, contrasts)]])


def framed(image, box, side):
    """The image, `side` high, with a window drawn on it, uint8 (side, W, 3)."""
    f = side / image.shape[0]
    picture = Image.fromarray(image).convert('RGB').resize((round(image.shape[1] * f), side), Image.Resampling.BICUBIC)
    y0, x0, y1, x1 = (f * edge for edge in box)
    ImageDraw.Draw(picture).rectangle((x0, y0, x1 - 1, y1 - 1), outline=(255, 200, 0), width=3)
    return np.array(picture)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('windows', 'rates', 'longer', 'ablation', 'adjacent', 'tissue', 'hidden',
                                         'attention', 'fused', 'detectors', 'tables', 'pictures'))
    parser.add_argument('sources', nargs='*', default=[], help='tissue: NAME=FILE of CSV files')
    parser.add_argument('--out', default='runs/experiments', help='folder of phantoms and encoders')
    parser.add_argument('--data', help='films of CBIS-DDSM and others after prepare.py --side 512')
    parser.add_argument('--mias', help='folder of mini-MIAS')
    parser.add_argument('--boxes', help='masses of CBIS-DDSM, a list as detect.py takes it')
    parser.add_argument('--encoder', help='detectors: a last.pt of pretrain.py, trained on real mammograms')
    parser.add_argument('--demo', default='runs/demo', help='pictures: the run whose curves are drawn')
    parser.add_argument('--figures', default='runs/figures', help='pictures: the folder to write')
    args = parser.parse_args()
    if args.what == 'tables':
        print(*(f'## {name}\n{table}\n' for name, table in tables().items()), sep='\n')
    elif args.what == 'pictures':
        pictures(args.demo, args.figures)
    else:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        films = args.data, args.mias, args.boxes
        given = dict(windows=(args.data, args.boxes), rates=films, longer=films, tissue=(args.sources,),
                     hidden=(args.mias, args.boxes), detectors=(args.mias, args.boxes, args.encoder))
        run = dict(windows=windows, rates=rates, longer=longer, ablation=ablation, adjacent=adjacent, tissue=tissue,
                   hidden=hidden, attention=attention, fused=fused, detectors=detectors)[args.what]
        run(args.out, *given.get(args.what, ()))
