"""The measurements behind two defaults: the tissue threshold tau and the minimum coverage rho. Not a test.

    $ python tests/measure.py tau LABELS.csv            # columns file, mask: overlap of each rule with hand-made masks
    $ python tests/measure.py tau DIR                   # no masks: share of the image that each rule calls tissue
    $ python tests/measure.py rho DIR [--images 60]     # share of crops that relax rho, global and local
"""
import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mask  # noqa: E402
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


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('tau', 'rho'))
    parser.add_argument('source')
    parser.add_argument('--images', type=int, default=60, help='drawn from the folder, seed 0')
    args = parser.parse_args()
    (tau if args.what == 'tau' else rho)(args.source, args.images)
