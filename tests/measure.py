"""The measurements in the README: the tissue threshold tau, the minimum coverage rho, a read-out. Not a test.

    $ python tests/measure.py tau LABELS.csv            # columns file, mask: overlap of each rule with hand-made masks
    $ python tests/measure.py tau DIR                   # no masks: share of the image that each rule calls tissue
    $ python tests/measure.py rho DIR [--images 60]     # share of crops that relax rho, global and local
    $ python tests/measure.py knn LABELS.csv --checkpoint RUN/last.pt --label density --group patient

The last one: leave-one-group-out k-NN of a label from the CLS token of whole images (columns file, label, group),
for the trained teacher and for the random weights it started from.
"""
import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch  # noqa: E402

import mask  # noqa: E402
import pretrain  # noqa: E402
import sampler  # noqa: E402
from pretrain import Config  # noqa: E402

RULES = (10, 25, 40, 50, 60, 70, 80, None)


def overlap(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


def row(name, values):
    low, middle = np.percentile(values, [10, 50])
    print(f'| {name} | {middle:.3f} | {low:.3f} | {min(values):.3f} | {max(values):.3f} |')


def tau(source, images):
    """Each rule against hand-made masks (64 = background in them), or by its tissue share, before and after CLAHE."""
    source = Path(source)
    truth = None
    if source.suffix == '.csv':
        with open(source) as file:
            rows = list(csv.DictReader(file))
        paths = [source.parent / r['file'] for r in rows]
        truth = [np.array(Image.open(source.parent / r['mask']).convert('L')) > 100 for r in rows]
    else:
        paths = pick(source, images)
    pictures = [mask.read(path) for path in paths]
    print(f"{len(paths)} images; {'overlap with the masks' if truth else 'share called tissue'}")
    print('| rule | median | 10th percentile | least | most |')
    for name, prepared in (('', pictures), (', after CLAHE', [mask.clahe(p) for p in pictures])):
        for rule in RULES:
            masks = [mask.tissue(p, rule) for p in prepared]
            row(f"{'self-tuning' if rule is None else f'percentile {rule}'}{name}",
                [overlap(m, t) for m, t in zip(masks, truth)] if truth else [m.mean() for m in masks])


def pick(folder, images):
    paths = mask.listing(folder)
    return [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:images]]


def rho(folder, images, draws=40):
    """Crops of the default scales on the images as training sees them, CLAHE and self-tuning mask."""
    cfg, tissues = Config(), []
    for path in pick(folder, images):
        image = mask.read(path)
        tissues.append(mask.tissue(image if path.endswith('.npy') else mask.clahe(image), cfg.percentile, cfg.kernel))
    print(f'{len(tissues)} images, {draws} crops each; tissue share {np.mean([t.mean() for t in tissues]):.2f}')
    print('| rho | global crops relaxed | local crops relaxed | of all, 2 global and 8 local |')
    for minimum in np.arange(1, 8) / 10:
        shares = []
        for scale in (cfg.global_scale, cfg.local_scale):
            rng = np.random.default_rng(0)
            shares.append(np.mean([sampler.crop_box(rng, t, scale, (3 / 4, 4 / 3), minimum)[1]
                                   for t in tissues for _ in range(draws)]))
        whole = (2 * shares[0] + cfg.locals * shares[1]) / (2 + cfg.locals)
        print(f'| {minimum:.1f} | {shares[0]:.1%} | {shares[1]:.1%} | {whole:.1%} |')


def knn(labels, checkpoint, label, group):
    source, device = Path(labels), torch.device('cpu')
    with open(source) as file:
        rows = list({r['file']: r for r in reversed(list(csv.DictReader(file)))}.values())
    y = np.unique([r[label] for r in rows], return_inverse=True)[1]
    groups = np.array([r[group] for r in rows])
    images = [mask.clahe(mask.read(source.parent / r['file'])) for r in rows]
    state = torch.load(checkpoint, map_location='cpu', weights_only=True)
    random, trained = (pretrain.networks(Config(**state['config']), device)[1] for _ in range(2))
    trained.load_state_dict(state['teacher'])
    print(f'{len(y)} images, {len(set(groups))} groups, largest class {np.bincount(y).max() / len(y):.3f}')
    hits = {}
    for name, network in (('random init', random), ('trained teacher', trained)):
        x = pretrain.cls_tokens(network, images, device).numpy()
        similarity = np.where(groups[:, None] == groups[None], -np.inf, x @ x.T)
        hits[name] = (pretrain.knn(similarity, y).argmax(1) == y).astype(float)
        print(f'{name:16s} {label} {hits[name].mean():.3f}')
    gain = hits['trained teacher'] - hits['random init']
    low, high = pretrain.bootstrap(np.mean, [gain], groups, np.random.default_rng(0))
    print(f'difference {gain.mean():+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}] over groups')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('tau', 'rho', 'knn'))
    parser.add_argument('source')
    parser.add_argument('--images', type=int, default=60, help='drawn from the folder, seed 0')
    parser.add_argument('--checkpoint')
    parser.add_argument('--label', default='density')
    parser.add_argument('--group', default='patient')
    args = parser.parse_args()
    if args.what == 'knn':
        knn(args.source, args.checkpoint, args.label, args.group)
    else:
        (tau if args.what == 'tau' else rho)(args.source, args.images)
