"""The evidence: what each part of the method does, measured so that it can be repeated. Not a test.

    $ python tests/experiments.py windows --data PREPARED --boxes CBIS.csv  # the ablation, read on masses of films
    $ python tests/experiments.py rates --data PREPARED --mias MIAS --boxes CBIS.csv      # learning rates
    $ python tests/experiments.py longer --data PREPARED --mias MIAS --boxes CBIS.csv     # does it grow with training?
    $ python tests/experiments.py adjacent --victre pcl_1.raw.gz    # what the adjacent slice loss does to volumes
    $ python tests/experiments.py tissue NAME=LABELS.csv ...        # what tau keeps and admits, how often rho falls
    $ python tests/experiments.py hidden --mias MIAS --boxes CBIS.csv   # lesions that patch masks cover
    $ python tests/experiments.py fused                     # does SM alone profit from pairs with FFDM?
    $ python tests/experiments.py detectors --mias MIAS --boxes CBIS.csv --encoder RUN/last.pt       # three of them
    $ python tests/experiments.py tables                    # of tests/results/README.md; `pictures`: of README.md

Each function is the protocol of one experiment. Encoders are trained by the command line of pretrain.py, as many at
once as there are cores, one thread each, in `--out`; those that are there already are not trained again. Rows go to
tests/results/EXPERIMENT.csv. Intervals are 95 %, by bootstrap over patients; those of means over seeds and of
differences draw the seeds as well, of which there are few: read the seeds' own rows beside them.

PREPARED: films of CBIS-DDSM, mini-MIAS and DDSM after `prepare.py --side 512`. CBIS.csv: the masses of CBIS-DDSM, a
list as detect.py takes it. pcl_1.raw.gz: labelled voxels of the VICTRE breast phantom (FDA, CC0).
"""
import argparse
import copy
import csv
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy import ndimage, stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import datasets  # noqa: E402
import detect  # noqa: E402
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
RECIPE = {k: v for k, v in pretrain.DEMO.items() if k != 'out'} | dict(steps=400, warmup=40)


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
    if not (folder / 'index.csv').exists():                 # the last that is written
        phantom.dataset(folder, (p['pixels'] for p in phantoms(n, key, **given)))
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


# ---- read-outs of frozen features ----------------------------------------------------------------------------------

@torch.no_grad()
def features(encoder, films, chunk=64):
    """uint8 films (H, W), squashed to the encoder's square -> unit CLS (n, D); mean and deviation of the patch tokens
    (n, 2 D), the input of DBT-DINO's linear heads."""
    side, cls, moments = encoder.config['size'], [], []
    for i in range(0, len(films), chunk):
        grey = np.stack([squashed(film, side) for film in films[i:i + chunk]])
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


READOUTS = {'CLS linear': 0, 'patches linear': 1}           # which part of `features` each reads


def read_out(known, tasks, groups, references=('DINOv2', 'random init')):
    """{arm: features, one a seed}, {task: labels, -1 where there is none} -> rows: the value of each seed, their mean,
    and the difference of the mean from those of the references."""
    rows = []
    for task, labels in tasks.items():
        has = labels >= 0
        y, g = labels[has], groups[has]
        chance = np.bincount(y).max() / len(y) if y.max() > 1 else 0.5
        for readout, part in READOUTS.items():
            about = dict(task=task, readout=readout, n=len(y))
            rows.append(about | dict(arm='chance', seed='', value=chance))
            shares = {arm: [linear(f[part][has], y, g) for f in found] for arm, found in known.items()}
            for arm, p in shares.items():
                for seed, one in enumerate(p):
                    rows.append(about | dict(arm=arm, seed=seed) | interval(y, [one], g))
                rows.append(about | dict(arm=arm, seed='mean') | interval(y, p, g))
                rows += [about | dict(arm=arm, seed=f'mean - {other}') | interval(y, p, g, shares[other])
                         for other in references if other in known and other != arm]
    return rows


def interval(y, p, groups, other=None, draws=500):
    """Mean over seeds of `value_of`, p a list of (n, C) and `other`, whose mean is taken away, one of as many, seed by
    seed -> value, low, high. A draw takes seeds and groups with replacement, all images of a group together."""
    rng, group = np.random.default_rng(0), np.unique(groups, return_inverse=True)[1]
    rows = np.split(np.argsort(group, kind='stable'), np.cumsum(np.bincount(group))[:-1])               # of each group

    def mean(seeds, at):
        return np.mean([value_of(y[at], p[s][at]) - (value_of(y[at], other[s][at]) if other else 0) for s in seeds])
    drawn = [mean(rng.integers(len(p), size=len(p)),
                  np.concatenate([rows[g] for g in rng.integers(len(rows), size=len(rows))])) for _ in range(draws)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return dict(value=mean(range(len(p)), np.arange(len(y))), low=low, high=high)


def write(name, rows):
    """tests/results/NAME.csv"""
    path = RESULTS / f'{name}.csv'
    with open(path, 'w', newline='') as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows({k: f'{v:.4f}' if isinstance(v, (float, np.floating)) else v for k, v in row.items()}
                         for row in rows)
    print(f'-> {path.relative_to(ROOT)}, {len(rows)} rows')


def read(name):
    """The rows of tests/results/NAME.csv, as text; none where there is no such file."""
    path = RESULTS / f'{name}.csv'
    if not path.exists():
        return []
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def slug(arm):
    """The name of an arm as a folder."""
    return ''.join(c if c.isalnum() else '-' for c in arm.lower()).strip('-')


# ---- 1: real films ---------------------------------------------------------------------------------------------------

ARMS = {                                                    # rows of the paper's Table 6, DINO-M alone, and a control
    'DINOv2': dict(blind_crops=True, blind_masks=True),
    'DINOv2, smaller windows': dict(blind_crops=True, blind_masks=True, global_scale=(0.25, 0.5)),
    '+ DINO-M': dict(blind_masks=True),
    '+ DINO-M & iBOT-M': {}}
LARGER = dict(size=112, local_size=56, width=192, depth=6, heads=3, drop_path=0.1, prototypes=1024, hidden=512,
              bottleneck=128, momentum=0.98)


def windows(out, data, boxes, seeds=range(5)):
    """Mass against tissue, and malignant against benign, in windows of CBIS-DDSM: a mass fills two thirds of its
    window, but half a patch of a whole film. Four arms, trained on the films of `data`, which hold the windows, without
    labels; random weights; the deciles of a window's greys. Films have no slice pairs, so no arm has that loss."""
    recipe = pretrain.SMALL | dict(slice_weight=0.0, steps=400, warmup=40, data=data)
    names = {arm: [f'films-{slug(arm)}-{seed}' for seed in seeds] for arm in ARMS}
    trained = pretrained(out, {name: recipe | ARMS[arm] | dict(seed=seed)
                               for arm, of in names.items() for seed, name in zip(seeds, of)})
    pictures, tasks, patients = mass_windows(boxes, recipe['size'])
    found = {arm: [features(trained[name], pictures) for name in of] for arm, of in names.items()}
    found['random init'] = [features(untrained(recipe | dict(seed=seed)), pictures) for seed in seeds]
    deciles = np.percentile(np.stack(pictures), range(10, 100, 10), axis=(1, 2)).T                      # (n, 9)
    found['grey deciles'] = [(deciles, deciles)] * len(seeds)
    write('windows', read_out(found, tasks, patients, ('DINOv2', '+ DINO-M', 'random init')))


def rates(out, data, mias, boxes):
    """Which learning rate lets a small network learn from films: two networks, three rates; at the middle one also
    longer, without KoLeo, with a warmer teacher. Seed 0; beside the read-outs what the log says at the end."""
    grids = {'84 px, width 128, depth 4': ({}, (400, 1600), {
                 'no KoLeo': dict(steps=400, koleo_weight=0.0), 'tau_t 0.07': dict(steps=400, teacher_temp=0.07)}),
             '112 px, width 192, depth 6': (LARGER, (500,), {'2000 steps': dict(steps=2000)})}
    rows = []
    for network, (change, lengths, more) in grids.items():
        base = pretrain.SMALL | change | dict(data=data)
        recipes = {f'lr {lr}, {steps} steps': dict(lr=lr, steps=steps)
                   for steps in lengths for lr in (0.0113, 0.0028, 0.0007)}
        recipes |= {f'lr 0.0028, {name}': given | dict(lr=0.0028) for name, given in more.items()}
        name = {arm: f'rates-{base["size"]}-{slug(arm)}' for arm in recipes}
        trained = pretrained(out, {name[arm]: base | given | dict(warmup=given['steps'] // 10)
                                   for arm, given in recipes.items()})
        logged = {arm: json.loads(Path(out, name[arm], 'log.jsonl').read_text().splitlines()[-1]) for arm in recipes}
        arms = {'random init': [untrained(base)]} | {arm: [trained[name[arm]]] for arm in recipes}
        for row in read_films(arms, film_material(mias, boxes, base['size'])):
            last = logged.get(row['arm'], {})
            rows.append(dict(network=network) | row | {k: last.get(k, '') for k in ('teacher_entropy', 'kl')})
    write('rates', rows)


def longer(out, data, mias, boxes, steps=6000, seeds=(0, 1)):
    """Does the gain over random weights grow with training? Blind and tissue-aware crops and masks, read out at an
    eighth, a quarter, a half and the end of the same runs."""
    names = {arm: [f'longer-{slug(arm)}-{seed}' for seed in seeds] for arm in ('DINOv2', '+ DINO-M & iBOT-M')}
    recipe = pretrain.SMALL | dict(slice_weight=0.0, steps=steps, warmup=steps // 10, keep_every=steps // 8, data=data)
    pretrained(out, {name: recipe | ARMS[arm] | dict(seed=seed)
                     for arm, of in names.items() for seed, name in zip(seeds, of)})
    material, rows = film_material(mias, boxes, pretrain.SMALL['size']), []
    for step in (steps // 8, steps // 4, steps // 2, steps):
        arms = {arm: [vit.load(f'{out}/{name}/step_{step:06d}.pt') for name in of] for arm, of in names.items()}
        arms['random init'] = [untrained(pretrain.SMALL | dict(seed=seed)) for seed in seeds]
        for row in read_films(arms, material):
            at = 0 if row['arm'] in ('chance', 'random init') else step
            if at or step == steps // 8:                    # what was not trained is the same at each
                rows.append(dict(step=at) | row)
    write('longer', sorted(rows, key=lambda row: row['step']))


def read_films(arms, material):
    """{arm: encoders} -> the rows of `read_out` on each part of `film_material`."""
    rows = []
    for pictures, tasks, patients in material:
        found = {arm: [features(encoder, pictures) for encoder in encoders] for arm, encoders in arms.items()}
        rows += read_out(found, tasks, patients)
    return rows


def film_material(mias, boxes, side):
    """-> [(pictures, tasks, patients)]: the windows of `mass_windows`; whole films of CBIS-DDSM, CC (0) or MLO (1);
    those of mini-MIAS with their density."""
    films, _ = datasets.load('csv', boxes, boxes=True)
    dense, _ = datasets.load('mias', mias)
    view = [int(row.view == 'MLO') for row in films]
    density = ['FGD'.index(row.labels['density']) for row in dense]
    parts = [mass_windows(boxes, side)]
    for task, rows, labels in (('view', films, view), ('density', dense, density)):
        pictures = [squashed(images.read_equalised(row.path), side) for row in rows]
        parts.append((pictures, {task: np.array(labels)}, np.array([row.patient for row in rows])))
    return parts


def mass_windows(boxes, side):
    """-> pictures (n), tasks {mass, malignant: labels, -1 where there is none}, patients (n,). A window is a square of
    1.5 times the longer side of a mass (64 to 400 pixels), its centre moved by up to .15 of that; its counterpart has
    the same size and film, at least .7 tissue and no mass."""
    rng, found = np.random.default_rng(0), []
    for row in datasets.load('csv', boxes, boxes=True)[0]:
        image = images.read_equalised(row.path)
        breast, lesions = mask.tissue(image), np.array([box[1:5] for box in row.boxes])   # (G, 4), x0 y0 x1 y1
        for _, x0, y0, x1, y1, kind in row.boxes:
            length = int(np.clip(1.5 * max(x1 - x0, y1 - y0), 64, 400))
            centre = np.array([y0 + y1, x0 + x1]) / 2 + length * rng.uniform(-0.15, 0.15, 2)
            for corner, mass, malignant in ((square_at(image.shape, centre, length), 1, int(kind == 'cancer')),
                                            (free_square(rng, breast, lesions, length), 0, -1)):
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


# ---- 2: the adjacent slice loss --------------------------------------------------------------------------------------

SLICES, APART = 16, (1, 2, 3, 4, 8)


def adjacent(out, victre):
    """Without the loss (for as many steps, and for as much compute: by tokens, a pair adds a third) and with D_max = 1,
    2, 4, 8 at two weights, on 96 phantom volumes. Read are one window of each of 192 unseen volumes, the same in every
    slice, since the outline of a whole breast is that of its volume; 192 windows of the VICTRE phantom, slices of 1 mm;
    and density from the whole middle slice. The rows `pixels` compare the greys themselves."""
    arms = {'without': dict(slice_weight=0.0), 'without, as much compute': dict(slice_weight=0.0, steps=542)} \
        | {f'D_max {d}, weight {weight}': dict(d_max=d, slice_weight=weight)
           for weight in (0.1, 1.0) for d in (1, 2, 4, 8)}
    recipes = {}
    for seed in SEEDS:
        data = folder_of(out, f'volumes-{seed}', 96, (seed, 8), slices=SLICES)
        recipes |= {f'adjacent-{slug(arm)}-{seed}': RECIPE | change | dict(seed=seed, data=data)
                    for arm, change in arms.items()}
    trained = pretrained(out, recipes)
    trained |= {f'adjacent-random-init-{seed}': untrained(RECIPE | dict(seed=seed)) for seed in SEEDS}

    tests, rng = phantoms(192, (99, 9), slices=SLICES), np.random.default_rng(0)
    density, middle = np.array([p['density'] for p in tests]), [p['pixels'][SLICES // 2] for p in tests]
    real = victre_slices(victre)
    breast = mask.tissue(real.max(0))
    windows = dict(phantoms=[cut for p in tests for cut in same_window(rng, p['pixels'], p['tissue'], (0.25, 0.5))],
                   VICTRE=[cut for _ in tests for cut in same_window(rng, real, breast, (0.1, 0.2))])
    rows = [dict(place=place, arm='pixels', seed='') | coherence(np.float64(cuts).reshape(192, SLICES, -1), each=True)
            for place, cuts in windows.items()]
    for arm in (*arms, 'random init'):
        for seed in SEEDS:
            encoder = trained[f'adjacent-{slug(arm)}-{seed}']
            right = nearest(features(encoder, middle)[0], density, np.arange(192)).argmax(1) == density
            for place, cuts in windows.items():
                row = coherence(features(encoder, cuts)[0].reshape(192, SLICES, -1))
                rows.append(dict(place=place, arm=arm, seed=seed) | row
                            | (dict(density=right.mean()) if place == 'phantoms' else {}))
    write('adjacent', rows)


def victre_slices(path, shape=(258, 539, 331), size=0.2):
    """The VICTRE phantom -> uint8 (16, H, W): the slices in the middle of the compressed breast, 1 mm apart, with rough
    attenuations of ours, blurred by 3 mm in depth as tomosynthesis does."""
    labels = np.frombuffer(gzip.open(path).read(), np.uint8).reshape(shape)
    attenuation = np.full(256, 0.8, np.float32)             # glands, skin, muscle, vessels
    attenuation[[0, 50, 1, 88, 200, 250]] = 0, 0, 0.456, 0.7, 0.85, 1       # air, paddle, fat, ligament, mass, calcium
    volume = ndimage.gaussian_filter1d(attenuation[labels], 3 / 2.355 / size, axis=0)
    step = round(1 / size)
    first = (len(volume) - SLICES * step) // 2
    return np.stack([images.clahe(images.to_uint8(z)) for z in volume[first:first + SLICES * step:step]])


def same_window(rng, volume, tissue, scale):
    """A random window on tissue, as large as an encoder's square, cut from each slice: uint8 (K, 84, 84)"""
    box = sampler.crop_box(rng, tissue, scale, (3 / 4, 4 / 3), 0.7)[0]
    return [sampler.cut(z, box, (RECIPE['size'],) * 2) for z in volume]


def coherence(x, each=False):
    """x (v, K, D), vectors of the K slices of v volumes, whose mean is taken away first (that of each vector with
    `each`: cosines are correlations then) ->

        cosine_d     of slices d apart
        retrieval_8  share of slices for which the nearest of all others, but for those less than 8 slices away, is of
                     the same volume
        depth        Spearman correlation of distance and slice distance, mean over volumes
    """
    v, K, _ = x.shape
    x = x - x.mean(-1 if each else (0, 1), keepdims=True)
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    values = {f'cosine_{d}': np.mean((x[:, d:] * x[:, :-d]).sum(-1)) for d in APART}
    flat, volume, depth = x.reshape(v * K, -1), np.repeat(np.arange(v), K), np.tile(np.arange(K), v)
    too_close = (volume[:, None] == volume) & (abs(depth[:, None] - depth) < 8)
    best = np.where(too_close, -np.inf, flat @ flat.T).argmax(1)
    values['retrieval_8'] = np.mean(volume[best] == volume)
    upper = np.triu_indices(K, 1)
    distance = abs(np.subtract.outer(range(K), range(K)))[upper]
    values['depth'] = np.mean([stats.spearmanr(-(z @ z.T)[upper], distance).statistic for z in x])
    return values


# ---- 3: the tissue mask ----------------------------------------------------------------------------------------------

RULES = (25, 40, 50, 60, 80, None)                          # percentiles, and the self-tuning threshold


def tissue(out, sources, most=100):
    """Share of the breast that a rule keeps and of the background that it admits, after CLAHE, where the truth is
    known; the share of the image called tissue everywhere; and how often crops and masks relax rho.

    sources: NAME=FILE of CSV files with the columns file, a density class (tissue, density) or percent_density (0..1),
    and mask where there are hand-made ones (64 is background, all above is breast, the pectoral muscle too); of more
    than `most` images some are drawn. Phantoms come first."""
    rows, relaxed = [], []
    found = {'phantoms': [(p['pixels'][0], p['tissue'], str(p['density'])) for p in phantoms(120, (99, 10))]}
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
                    row |= dict(kept=kept[:, 0].mean(), admitted=kept[:, 1].mean(), median_iou=np.median(kept[:, 2]))
                rows.append(row)
        relaxed += relaxations(source, [m for m, *_ in made])               # the last rule is the self-tuning one
    write('tissue', rows)
    write('relaxed', relaxed)


def labelled(path, most):
    """-> (image after CLAHE, true mask or None, density) of the images of a CSV."""
    folder, found = Path(path).parent, []
    with open(path, newline='') as file:
        lines = list({line['file']: line for line in csv.DictReader(file)}.values())
    for i in sorted(np.random.default_rng(0).permutation(len(lines))[:most]):
        line = lines[i]
        truth = np.array(Image.open(folder / line['mask']).convert('L')) > 100 if 'mask' in line else None
        density = line.get('tissue') or line.get('density') or \
            ('0-25 %', '25-50 %', '50-75 %', '75-100 %')[min(int(float(line['percent_density']) * 4), 3)]
        found.append((images.read_equalised(folder / line['file']), truth, density))
    return found


def relaxations(source, masks, draws=10, grid=37):
    """How often rho is not met as it is: global crops, local crops, and masks of half of all patches drawn on the
    global ones, at the default scales."""
    cfg, rows = pretrain.Config(), []
    for rho in np.arange(1, 8) / 10:
        found = []
        for i, m in enumerate(masks):
            rng, info = np.random.default_rng([0, i]), {}
            for _ in range(draws):
                box, gave = sampler.crop_box(rng, m, cfg.global_scale, (3 / 4, 4 / 3), rho)
                sampler.patch_mask(rng, sampler.tissue_grid(m, box, grid, grid), grid * grid // 2, rho, info=info)
                local = sampler.crop_box(rng, m, cfg.local_scale, (3 / 4, 4 / 3), rho)[1]
                found.append((gave, local, info['relaxed']))
        shares = dict(zip(('global_crops', 'local_crops', 'masks'), np.mean(found, 0)))
        rows.append(dict(source=source, rho=rho, n=len(masks)) | shares)
    return rows


# ---- 4: do masks hide lesions? ---------------------------------------------------------------------------------------

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)


def hidden(out, mias, boxes):
    """Annotated images, the paper's 518 and 37x37 patches: how often a lesion that a global crop holds whole is wholly
    under the mask, by ratio; masks that seek tissue and blind ones. Mean over the crops of a lesion, then over
    lesions; the interval draws patients. Half of the crops of a training run have no mask at all."""
    rows = []
    for name, dataset, root in (('mini-MIAS', 'mias', mias), ('CBIS-DDSM masses', 'csv', boxes)):
        counts = {}
        for i, row in enumerate(row for row in datasets.load(dataset, root, boxes=True)[0] if row.boxes):
            for lesion, kind, ratio, masked in under_masks(row, np.random.default_rng([0, i])):
                crops = counts.setdefault((kind, ratio), {}).setdefault((row.patient, i, lesion), [])
                crops.append(masked.all())
        for (kind, ratio), found in counts.items():
            covered, patients = np.array([np.mean(c) for c in found.values()]), np.array([p for p, *_ in found])
            low, high = metrics.bootstrap(np.mean, [covered], patients, np.random.default_rng(0), n=500)
            rows.append(dict(data=name, masks=kind, ratio=ratio, lesions=len(found), value=covered.mean(), low=low,
                             high=high))
    write('hidden', rows)


def under_masks(row, rng, draws=20, n=37):
    """Global crops of an image at the default scales, masks of each kind and ratio -> for each lesion that lies whole
    in a crop: its number, kind, ratio, whether each patch that it touches is masked (rows, columns)."""
    cfg, image = pretrain.Config(), images.read_equalised(row.path)
    breast = mask.tissue(image, cfg.percentile, cfg.kernel)
    for _ in range(draws):
        box, _ = sampler.crop_box(rng, breast, cfg.global_scale, (3 / 4, 4 / 3), cfg.min_coverage)
        grid = sampler.tissue_grid(breast, box, n, n)
        masks = {(kind, ratio): sampler.patch_mask(rng, where, round(ratio * n * n), cfg.min_coverage)
                 for kind, where in (('tissue-aware', grid), ('blind', np.ones_like(grid))) for ratio in RATIOS}
        y0, x0, y1, x1 = box
        for lesion, (_, left, top, right, bottom, _) in enumerate(row.boxes):
            if x0 <= left and right <= x1 and y0 <= top and bottom <= y1:
                down = slice(int((top - y0) * n / (y1 - y0)), int(np.ceil((bottom - y0) * n / (y1 - y0))))
                along = slice(int((left - x0) * n / (x1 - x0)), int(np.ceil((right - x0) * n / (x1 - x0))))
                yield from ((lesion, *which, hidden[down, along]) for which, hidden in masks.items())


# ---- 5: fused representations of FFDM and SM -------------------------------------------------------------------------

SEEN = ('ffdm', 'sm', 'ffdm', 'both', 'ffdm', 'sm', 'neither', None)        # where a lesion shows; None: there is none


def pairs_of_phantoms(folder, trace=0.3, parts=(480, 80, 240)):
    """Mammograms ffdm/NNNN.npy and sm/NNNN.npy of the same breasts, with ffdm.csv and sm.csv as detect.py takes them,
    their labels saying where the lesion shows. A lesion that only the FFDM shows keeps the share `trace` of its
    contrast in the SM."""
    contrasts = dict(ffdm=(1, trace), sm=(0, 1), both=(1, 1), neither=(0, 0))
    rows = dict(ffdm=[], sm=[])
    for name in rows:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, split in enumerate(np.repeat(('train', 'val', 'test'), parts)):
        seen = SEEN[i % len(SEEN)]
        p = phantom.breast(np.random.default_rng([99, 15, i]), slices=8, lesion=seen is not None,
                           contrasts=contrasts.get(seen, (0, 0)))
        box = (0, *p.boxes[0][1:], seen) if seen else [''] * 6
        for name in rows:
            np.save(folder / name / f'{i:04d}.npy', images.clahe(images.to_uint8(getattr(p, name))))
            rows[name].append((f'{name}/{i:04d}.npy', i, i, 'LCC', split, *box))
    for name, lines in rows.items():
        score.write_csv(folder / f'{name}.csv', ('path', 'patient', 'exam', 'view', 'split',
                                                 'frame', 'x0', 'y0', 'x1', 'y1', 'label'), lines)


NETWORK = dict(size=168, channels=32, dropout=0.05, freeze=False)           # what B and the fused detector inherit
PAIRED = dict(batch=16, micro_batch=16, workers=0, min_distance=10.0, lr=2e-3, normals=0.3, draws=100)
FUSED = {                                                   # what stands beside A's levels in stage III
    'A alone': None,
    'A beside itself': 'A',
    'A beside another A': 'other',                          # trained alike from another seed: two detectors of SM
    'A beside C, which sees SM': 'unmimicked',              # no stage II: what B starts from
    'fused, B learnt from C': 'B',
    'A beside C, which sees FFDM': 'C'}                     # both images, the bound


def fused(out):
    """Mechanism test of the three stages: 480 pairs to train, 80 to choose the epoch, 240 to test (90 lesions in FFDM
    alone, 60 in SM alone, 30 each in both and neither), the same for all. All arms of stage III start from the same A,
    train equally long and have equal parameters."""
    place = Path(out) / 'pairs'
    if not (place / 'sm.csv').exists():               # the last that is written
        pairs_of_phantoms(place)
    for stage in zip(*(stages(place, phantom_encoder(out), seed) for seed in SEEDS)):
        trained_detectors({name: command for runs in stage for name, command in runs.items()})
    runs = {arm: [f'{place}/fused-{beside}-{seed}' if beside else f'{place}/A-{seed}' for seed in SEEDS]
            for arm, beside in FUSED.items()} | {'C alone, FFDM': [f'{place}/C-{seed}' for seed in SEEDS]}
    scored, weights, drawn = scores(runs, PAIRED['min_distance'])
    classes = score.read_truth(f'{place}/A-0/labels.csv', f'{place}/A-0/boxes.csv')[2]
    areas = {arm: np.array([[areas_by_class(s.flat, w, classes) for w in weights] for s in seeds])
             for arm, seeds in scored.items()}              # (seeds, 1 + draws, 1 + classes)
    rows = []
    for i, kind in enumerate(('all', *sorted(set(classes)))):
        rows += over_seeds({arm: found[..., i] for arm, found in areas.items()}, drawn, list(FUSED)[1:4], lesions=kind)
    write('fused', rows)


def phantom_encoder(out):
    """MammoDINO on 256 phantoms, every third a volume of 8 slices -> its checkpoint"""
    data = folder_of(out, 'phantoms-0', 256, (0, 6), slices=8, every=3)
    pretrained(out, {'mammodino-0': RECIPE | dict(seed=0, data=data)})
    return f'{out}/mammodino-0/last.pt'


def trained_detectors(runs):
    """{folder: (script and stage, flags)}: trains those that have no scores yet."""
    in_lanes({name: [sys.executable, str(ROOT / script), *stage, *flags(values | dict(out=name, resume=True))]
              for name, ((script, *stage), values) in runs.items() if not Path(name, 'scores.json').exists()})


def stages(place, encoder, seed):
    """The runs of stages I, II and III of a seed, as `trained_detectors` takes them."""
    at = {name: f'{place}/{name}-{seed}' for name in ('A', 'B', 'C')}
    at |= dict(unmimicked=at['C'], other=f'{place}/A-{(seed + 1) % len(SEEDS)}')
    on_sm, on_ffdm = PAIRED | dict(root=f'{place}/sm.csv', seed=seed), dict(root=f'{place}/ffdm.csv')
    first = NETWORK | on_sm | dict(encoder=encoder, epochs=8)
    third = {name: on_sm | dict(epochs=4, init_from=at['A'], other=at[name]) for name in FUSED.values() if name}
    third['C'] |= dict(paired=f'{place}/ffdm.csv')
    return ({at['A']: (['detect.py'], first), at['C']: (['detect.py'], first | on_ffdm)},
            {at['B']: (['fuse.py', 'mimic'], on_sm | dict(epochs=5, other=at['C'], paired=f'{place}/ffdm.csv'))},
            {f'{place}/fused-{name}-{seed}': (['fuse.py', 'fuse'], values) for name, values in third.items()})


def areas_by_class(m, weight, classes):
    """FAUC-1 of all lesions, then of each class alone, false positives counted as for all: (1 + classes,)"""
    thresholds, false_positives, _ = metrics.curve(m, weight, every=True)
    width = np.diff(np.append(np.minimum(false_positives, 1), 1))
    found = m.best >= thresholds[width > 0, None]                                       # (thresholds, G)
    count = weight[m.home] * np.array([classes == classes, *(classes == name for name in sorted(set(classes)))])
    with np.errstate(invalid='ignore'):
        return width[width > 0] @ (found @ count.T / count.sum(1))


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


# ---- 6: two detectors ------------------------------------------------------------------------------------------------

DETR = {k: detect.DETR_DEMO[k] for k in ('queries', 'layers', 'denoising', 'lr')} | dict(head='detr')
REAL_DETECTOR = dict(size=252, channels=64, batch=16, micro_batch=16, workers=0, dropout=0.05, lr=2e-3, draws=100)


def detectors(out, mias, boxes, encoder):
    """RetinaNet and DINO-DETR on the same frozen encoder with as many epochs, on real films, seed 0."""
    todo, runs = {}, {}
    for name, dataset, root, reach, epochs in (('CBIS-DDSM masses', 'csv', boxes, 20.0, 4),
                                               ('mini-MIAS', 'mias', mias, 25.0, 12)):
        base = REAL_DETECTOR | dict(dataset=dataset, root=root, min_distance=reach, epochs=epochs, encoder=encoder)
        todo |= {f'{out}/{slug(name)}-retinanet': (['detect.py'], base),
                 f'{out}/{slug(name)}-detr': (['detect.py'], base | DETR)}
        runs[name] = {'RetinaNet': [f'{out}/{slug(name)}-retinanet'], 'DINO-DETR': [f'{out}/{slug(name)}-detr']}, reach
    trained_detectors(todo)
    measured, rows = {'mean sensitivity at 1-4 FP': lambda s, w: s.with_lesions(w)[-1],
                      'FAUC-1': lambda s, w: s.fauc(w)[0], 'AP': lambda s, w: s.overlap(w)[0].mean()}, []
    for name, (found, reach) in runs.items():
        scored, weights, drawn = scores(found, reach)
        for metric, of in measured.items():
            values = {detector: np.array([[of(s, w) for w in weights] for s in seeds])
                      for detector, seeds in scored.items()}
            rows += over_seeds(values, drawn, ('RetinaNet',), data=name, metric=metric)
    write('detectors', rows)


# ---- tables and pictures ---------------------------------------------------------------------------------------------

def tables():
    """Every table of tests/results/README.md, as text, {experiment: Markdown}; a test compares them."""
    found = dict(windows=table_of_arms('windows', 'random init'), longer=table_of_arms('longer', 'random init', 'step'),
                 rates=table_of_arms('rates', 'random init', 'network'), adjacent=table_of_volumes(),
                 tissue=table_of_masks(), relaxed=table_of_relaxations(), hidden=table_of_hidden_lesions(),
                 fused=table_of_fused(), detectors=table_of_detectors())
    return {name: '\n'.join(f"| {' | '.join(line)} |" for line in (table[0], ['---'] * len(table[0]), *table[1:]))
            for name, table in found.items() if len(table) > 1}         # an experiment may have no rows yet


def number(v, signed=False):
    """.123, 1.230, -.045, +.006"""
    text = f'{round(float(v), 3) + 0.0:{"+" if signed else ""}.3f}'
    return re.sub(r'^([+-]?)0\.', r'\1.', text).replace('-', '\u2212')


def estimate(row, signed=False):
    """.234 [.123, .456]; nothing without a row"""
    return '{} [{}, {}]'.format(*(number(row[k], signed) for k in ('value', 'low', 'high'))) if row else ''


def spread(values):
    """mean (least to largest of the seeds); one value alone, nothing where the first is missing"""
    values = [float(v) for v in values if v]
    if len(values) < 2:
        return ''.join(map(number, values))
    return f'{number(np.mean(values))} ({number(min(values))}\u2013{number(max(values))})'


def table_of_arms(name, reference, part=None):
    """Mean and range of the seeds, the difference from the arm `reference`. `part`: a column that divides the table."""
    rows = read(name)
    columns = list(dict.fromkeys((row['task'], row['readout']) for row in rows))
    names = (f"{task}, {readout}, {'accuracy' if task == 'density' else 'AUC'}" for task, readout in columns)
    lines = [(f'we measured, {part}' if part else 'we measured', *names)]
    for value, arm in dict.fromkeys((row[part] if part else '', row['arm']) for row in rows):
        cells = []
        for column in columns:
            found = {row['seed']: row for row in rows if (row['task'], row['readout']) == column
                     and row['arm'] == arm and (not part or row[part] == value)}
            seeds = [row['value'] for seed, row in found.items() if not seed.startswith('mean')]
            gain = found.get(f'mean - {reference}')
            cells.append(spread(seeds) + (f'; {estimate(gain, signed=True)}' if gain else ''))
        lines.append([f'{value}: {arm}' if part else arm, *cells])
    return lines


def table_of_volumes():
    """Mean and range of the seeds."""
    shown = dict(cosine_1='d = 1', cosine_2='2', cosine_3='3', cosine_4='4', cosine_8='8', depth='depth',
                 retrieval_8='same volume found', density='density, CLS k-NN')
    rows = read('adjacent')
    lines = [('we measured', *shown.values())]
    for place, arm in dict.fromkeys((row['place'], row['arm']) for row in rows):
        here = [row for row in rows if (row['place'], row['arm']) == (place, arm)]
        lines.append([f'{place}: {arm}', *(spread(row[k] for row in here) for k in shown)])
    return lines


def table_of_masks():
    """Kept, admitted and median IoU, or the share of the image where there is no truth."""
    rows = read('tissue')
    rules = dict.fromkeys(row['rule'] for row in rows)
    lines = [('we measured', 'n', *(f'tau = {rule}' if rule.isdigit() else rule for rule in rules))]
    for source, density in dict.fromkeys((row['source'], row['density']) for row in rows):
        here = [row for row in rows if (row['source'], row['density']) == (source, density)]
        shown = ('kept', 'admitted', 'median_iou') if here[0]['kept'] else ('share',)
        lines.append([f'{source}, {density}', here[0]['n'], *(', '.join(number(r[k]) for k in shown) for r in here)])
    return lines


def table_of_relaxations():
    """Global crops, local crops, masks."""
    rows = read('relaxed')
    lines = [('we measured, rho', *dict.fromkeys(row['source'] for row in rows))]
    for rho in dict.fromkeys(row['rho'] for row in rows):
        cells = [', '.join(f'{float(row[kind]):.1%}' for kind in ('global_crops', 'local_crops', 'masks'))
                 for row in rows if row['rho'] == rho]
        lines.append([f'{float(rho):.1f}', *cells])
    return lines


def table_of_hidden_lesions():
    """Tissue-aware / blind."""
    rows = read('hidden')
    lines = [('we measured', 'lesions', *(f'ratio {ratio}' for ratio in RATIOS))]
    for data in dict.fromkeys(row['data'] for row in rows):
        here = {(r['masks'], float(r['ratio'])): r for r in rows if r['data'] == data}
        lines.append([data, here['blind', 0.1]['lesions'], *(
            f"{estimate(here['tissue-aware', ratio])} / {estimate(here['blind', ratio])}" for ratio in RATIOS)])
    return lines


def table_of_fused():
    """FAUC-1 of all lesions and by where they show; the difference from the arm of equal parameters."""
    rows, control = read('fused'), list(FUSED)[1]
    kinds = ('ffdm', 'sm', 'both', 'neither')
    lines = [('we measured, FAUC-1', 'all lesions', f'all, against {control}', 'those in FFDM alone',
              f'these, against {control}', 'in SM alone', 'in both', 'in neither')]
    here = {(row['arm'], row['lesions'], row['seed']): row for row in rows}
    for arm in dict.fromkeys(row['arm'] for row in rows):
        seeds = {kind: spread(row['value'] for (a, k, seed), row in here.items()
                              if (a, k) == (arm, kind) and seed.isdigit()) for kind in ('all', *kinds)}
        gain = {kind: estimate(here.get((arm, kind, f'mean - {control}')), signed=True) for kind in ('all', 'ffdm')}
        lines.append([arm, seeds['all'], gain['all'], seeds['ffdm'], gain['ffdm'],
                      *(seeds[kind] for kind in kinds[1:])])
    return lines


def table_of_detectors():
    """Means over seeds with intervals, the difference of mean sensitivity."""
    rows, metrics = read('detectors'), ('mean sensitivity at 1-4 FP', 'AP', 'FAUC-1')
    lines = [('we measured', metrics[0], 'against RetinaNet', *metrics[1:])]
    for data, arm in dict.fromkeys((row['data'], row['arm']) for row in rows):
        here = {(row['metric'], row['seed']): row for row in rows if (row['data'], row['arm']) == (data, arm)}
        mean = [estimate(here[metric, 'mean']) for metric in metrics]
        gain = estimate(here.get((metrics[0], 'mean - RetinaNet')), signed=True)
        lines.append([f'{data}: {arm}', mean[0], gain, *mean[1:]])
    return lines


def pictures(out, demo='runs/demo'):
    """pair.png and, of the log of the demo of pretrain.py, if it has run, curves.png."""
    Path(out).mkdir(parents=True, exist_ok=True)
    pair_picture().save(f'{out}/pair.png')
    log = Path(demo) / 'log.jsonl'
    if not log.exists():
        return print(f'{demo} holds no run of pretrain.py: no curves.png')
    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    names = dict(image='DINO-M', patch='iBOT-M', slice='DINO-adj', koleo='KoLeo', teacher_entropy='teacher entropy',
                 effective_rank='effective rank of CLS')
    panels = [np.array(curve(title, [(line['step'], line[name]) for line in lines])) for name, title in names.items()]
    sheet = np.vstack([np.hstack(panels[:3]), np.hstack(panels[3:])])
    score.halved(Image.fromarray(sheet)).save(f'{out}/curves.png')


def curve(title, points, width=560, height=400):
    """One line over the steps of a run, twice as large as it will be shown."""
    canvas = Image.new('RGB', (width, height), 'white')
    pen, (x, y) = ImageDraw.Draw(canvas), np.array(points, float).T
    low, high = y.min(), y.max()
    left, top, right, bottom = 90, 60, width - 30, height - 60
    at = list(zip(left + (right - left) * (x - x[0]) / np.ptp(x), bottom - (bottom - top) * (y - low) / (high - low)))
    pen.rectangle((left, top, right, bottom), outline='#BBBBBB', width=2)
    pen.line(at, score.COLOURS[0], 4, joint='curve')
    pen.text((left, 14), title, 'black', score.font(28))
    for value, place in ((low, bottom), (high, top)):
        pen.text((left - 10, place), f'{value:.2f}', 'black', score.font(22), anchor='rm')
    pen.text((right, bottom + 10), f'step {int(x[-1])}', 'black', score.font(22), anchor='ra')
    return canvas


def pair_picture(d=2, side=210):
    """A slice and its neighbour d away with the window that both share, the two views of the pair, their difference."""
    p = phantoms(1, (3, 14), slices=16, lesion=True)[0]
    k = int(np.clip(p['boxes'][0][0], d, 15 - d))
    rng = np.random.default_rng(5)
    box = sampler.crop_box(copy.deepcopy(rng), p['tissue'], (0.25, 0.5), (3 / 4, 4 / 3), 0.7)[0]
    slices = [p['pixels'][z] for z in (k, k + d)]
    student, teacher = sampler.pair_views(rng, *slices, p['tissue'], side, (0.25, 0.5), rho=0.7, flip=0)
    panels = [(sampler.draw_windows(image, [box], side), f'slice {z}') for image, z in zip(slices, (k, k + d))]
    views = {'view of the student': student, 'view of the teacher': teacher,
             'their difference': np.uint8(np.abs(student.astype(int) - teacher))}
    panels += [(np.repeat(view[..., None], 3, -1), name) for name, view in views.items()]
    return sampler.sheet([panels])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('windows', 'rates', 'longer', 'adjacent', 'tissue', 'hidden', 'fused',
                                         'detectors', 'tables', 'pictures'))
    parser.add_argument('sources', nargs='*', default=[], help='tissue: NAME=FILE of CSV files')
    parser.add_argument('--out', default='runs/experiments', help='folder of phantoms, encoders, pictures')
    parser.add_argument('--data', help='films of CBIS-DDSM and others after prepare.py --side 512')
    parser.add_argument('--mias', help='folder of mini-MIAS')
    parser.add_argument('--boxes', help='masses of CBIS-DDSM, a list as detect.py takes it')
    parser.add_argument('--victre', help='pcl_1.raw.gz of the VICTRE phantom')
    parser.add_argument('--encoder', help='detectors: a last.pt of pretrain.py, trained on real mammograms')
    args = parser.parse_args()
    if args.what == 'tables':
        print(*(f'## {name}\n{table}\n' for name, table in tables().items()), sep='\n')
    elif args.what == 'pictures':
        pictures(args.out)
    else:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        films = args.data, args.mias, args.boxes
        run, given = dict(
            windows=(windows, (args.data, args.boxes)), rates=(rates, films), longer=(longer, films),
            adjacent=(adjacent, (args.victre,)), tissue=(tissue, (args.sources,)),
            hidden=(hidden, (args.mias, args.boxes)), fused=(fused, ()),
            detectors=(detectors, (args.mias, args.boxes, args.encoder)))[args.what]
        run(args.out, *given)
