"""Fused representations of full-field (FFDM) and synthetic mammograms (SM): trained on pairs, a detector
finds lesions in SM alone (Sharma 2024, arXiv 2408.08560, 4).

    $ python detect.py --no-freeze --root SM.csv --encoder FILE --out A             # I: a detector on SM,
    $ python detect.py --no-freeze --root FFDM.csv --encoder FILE --out C           # and one on FFDM
    $ python fuse.py mimic --root SM.csv --paired FFDM.csv --other C --out B        # II: C's levels from SM
    $ python fuse.py fuse --root SM.csv --init_from A --other B --out FUSED         # III: A beside B
    $ python fuse.py predict SM.dcm --checkpoint FUSED

The upper bound, a detector of both images: fuse --paired FFDM.csv --init_from A --other C. SM.csv and
FFDM.csv are lists as datasets.py takes them; patient, exam, laterality and view name the pairs. The flags are
those of detect.py; what shapes the detector is by default as in A, or in C.

B images, S pixels of a side, C channels, h w cells of a level.
"""
import functools
import json
import os
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import detect
import mask
import retinanet
import vit
from run import option, parse, script, setup

LEVELS = retinanet.LEVELS
RECIPE = ('size', 'voi', 'clahe', 'channels', 'freeze', 'head', 'dropout', 'queries', 'layers',
          'denoising', 'lambdas')                           # by default as in the run that is the start


@dataclass
class Config(detect.Config):
    """The flags of detect.py and two more. [sharma] is arXiv 2408.08560."""
    paired: str | None = option(None, 'sharma', 'list of the other images of the same views: FFDM',
                                group='fusion')
    other: str | None = option(None, 'sharma', 'mimic: C, to be imitated; fuse: B, beside A')


# ---- stage II: B imitates C -----------------------------------------------------------------------

class Mimic(detect.Detector):
    """B: from SM what `other`, C, which is frozen, makes of FFDM. Images (B, 3, S, S): SM, FFDM, tissue."""

    splits = ('train', 'val')

    def __init__(self, cfg, encoder, other):
        super().__init__(cfg, encoder)
        self.other = other.requires_grad_(False)

    def new_head(self, cfg):
        return Imitation(cfg)

    def forward(self, images, boxes=None):
        with torch.no_grad():
            aims = self.other.levels(images[:, 1:2])
        return self.head(self.levels(images), aims)

    def frames(self, rows):
        return Pairs(self.cfg, rows, channels=3)

    def marked(self, rows):
        return [(i, 0) for i in range(len(rows))]

    def validate(self, rows, device):
        return likeness(self, rows, device)

    def finish(self, rows, best, notes, device, out):
        if dist.get_rank() == 0:
            explain(best)
            (out / 'scores.json').write_text(json.dumps(best, indent=1))
            print(f'-> {out}: last.pt, scores.json. Next:\n  python fuse.py fuse --root '
                  f'{self.cfg.root} --init_from A --other {out} --out FUSED')


class Imitation(nn.Module):
    """A 3x3 convolution per level from the levels of B to those of C; stage III does not use it."""

    TERMS = ('negative_cosine',)
    atd = ()

    def __init__(self, cfg):
        super().__init__()
        convolution = partial(nn.Conv2d, cfg.channels, cfg.channels, 3, padding=1)
        self.project = nn.ModuleList(convolution() for _ in LEVELS)
        grids = zip(retinanet.grids(cfg.size), LEVELS.values())
        self.pixels = [(first + stride * torch.arange(cells)).long()        # in the middle of each cell
                       for cells, (stride, first, _) in grids]

    def forward(self, levels, aims):
        """For each level guess and aim, (B, C, h, w), their vectors of length 1"""
        guesses = [project(level) for project, level in zip(self.project, levels)]
        return [[F.normalize(x.float(), dim=1) for x in pair] for pair in zip(guesses, aims)]

    def tissue(self, images):
        """images uint8 (B, 3, S, S) -> for each level bool (B, h, w): tissue in the middle of the cell"""
        return [(images[:, 2] > 127)[:, at[:, None], at] for at in self.pixels]

    def count(self, batch):
        """Images with tissue"""
        return (batch['images'][:, 2] > 127).flatten(1).any(1).sum()

    def loss(self, answers, batch):
        """Eq. 2: minus the cosine, its mean over the tissue, then over levels; summed over images, (1,).
        Without the mask the air, which is most of an image, would decide."""
        terms = []
        for (guess, aim), here in zip(answers, self.tissue(batch['images'])):
            here = here.to(guess.device)
            cosine = (guess * aim).sum(1)                                               # (B, h, w)
            mean = (cosine * here).sum((1, 2)) / here.sum((1, 2)).clamp_min(1)          # (B,)
            terms.append(-mean.sum())
        return torch.stack(terms).mean(0, keepdim=True)


def likeness(model, rows, device):
    """Validation of stage II, over all locations of tissue -> mean cosine over levels, and for each level

        cosine      of guess and aim
        constant    what the mean of C's vectors alone would reach
        spread      deviation of the guesses from their mean, as a share of that of C

    A collapsed B says the same everywhere: spread 0, and a cosine not above `constant`."""
    sums = torch.zeros(len(LEVELS), 2, device=device)                           # cosines, locations
    means = torch.zeros(len(LEVELS), 2, model.cfg.channels, device=device)      # of guesses and aims
    mine = model.marked(rows)[dist.get_rank()::dist.get_world_size()]
    for samples, answers in detect.answered(model, rows, mine, device):
        images = torch.from_numpy(np.stack([sample['image'] for sample in samples]))
        for i, (pair, here) in enumerate(zip(answers, model.head.tissue(images))):
            guess, aim = (x.permute(0, 2, 3, 1)[here.to(device)] for x in pair)         # (locations, C)
            sums[i] += torch.stack([(guess * aim).sum(), here.sum().to(device)])
            means[i] += torch.stack([guess.sum(0), aim.sum(0)])
    dist.all_reduce(sums)
    dist.all_reduce(means)
    locations = sums[:, 1].clamp_min(1)
    cosine = sums[:, 0] / locations
    guess, aim = (means / locations[:, None, None]).norm(dim=2).T                       # (levels,) each
    spread = ((1 - guess ** 2) / (1 - aim ** 2).clamp_min(1e-9)).sqrt()         # all vectors have length 1
    about = dict(cosine=cosine, constant=aim, spread=spread)
    return cosine.mean().item(), {name: values.tolist() for name, values in about.items()}


def explain(best):
    """Prints how well B imitates each level, and whether it has collapsed."""
    values = zip(LEVELS, best['cosine'], best['constant'], best['spread'])
    for name, cosine, constant, spread in values:
        verdict = ''
        if constant and spread < 0.1:                       # constant 0: no cell of this level is tissue
            verdict = '; it has collapsed: B says nearly the same everywhere'
        elif constant and cosine <= constant:
            verdict = '; B is no better than the mean of C, so it has learnt nothing of this level'
        print(f"  {name}: cosine with C {cosine:.3f}, of C's mean alone {constant:.3f}; spread "
              f"{spread:.3f} of C's{verdict}")


# ---- stage III: A beside B ------------------------------------------------------------------------

class Fused(detect.Detector):
    """The levels of `other`, which is frozen, beside those of A, and a 1x1 convolution back to C channels.
    Other sees the last channel: SM as well, or FFDM with --paired.

    The convolution starts by passing the levels of A through, so the detector begins as A. The paper gives
    both to its predictor and does not say how that begins."""

    def __init__(self, cfg, encoder, other):
        super().__init__(cfg, encoder)
        self.other = other.requires_grad_(False)
        self.mix = nn.ModuleList(nn.Conv2d(2 * cfg.channels, cfg.channels, 1) for _ in LEVELS)
        for mix in self.mix:
            nn.init.dirac_(mix.weight)                      # 1 from each channel of A, 0 elsewhere
            nn.init.zeros_(mix.bias)

    def levels(self, images):
        with torch.no_grad():
            others = self.other.levels(images[:, -1:])
        pairs = zip(super().levels(images), others)
        return [mix(torch.cat(pair, dim=1)) for mix, pair in zip(self.mix, pairs)]      # (B, C, h, w)

    def frames(self, rows):
        return Pairs(self.cfg, rows, channels=2) if self.cfg.paired else super().frames(rows)


def build(kind, read, cfg, state=None):
    """Mimic or Fused: with weights that follow, from its checkpoint `state`; or at its start, with encoder,
    pyramid and head of --init_from beside encoder and pyramid of --other. read: folder -> checkpoint."""
    if state:
        if (kind is Mimic) != ('cosine' in state['best']):
            raise ValueError('mimic and fuse cannot use the run of each other here; give another')
        other = detect.Features(vit.ViT(**state['other']), cfg.channels)
        return kind(cfg, vit.ViT(**state['vit']), other)
    theirs = read(cfg.other)
    for name in ('size', 'channels'):
        if theirs['config'][name] != getattr(cfg, name):
            raise ValueError(f'{cfg.other} has --{name} {theirs["config"][name]}; give the same')
    encoder = vit.ViT(**theirs['vit'])
    start = detect.build(cfg, start=read(cfg.init_from))    # seeds the random numbers of what follows
    other = detect.Features(encoder, cfg.channels)
    other.load_state_dict({k: theirs['best_weights'][k] for k in other.state_dict()})
    model = kind(cfg, start.encoder, other)
    own = model.state_dict()
    model.load_state_dict(own | {k: v for k, v in start.state_dict().items() if k in own})
    return model


# ---- pairs ----------------------------------------------------------------------------------------

class Pairs(detect.Frames):
    """Samples of two channels, an image and its partner, or of three, with the tissue of the first as 255"""

    def __init__(self, cfg, rows, channels):
        super().__init__(cfg, rows)
        self.channels = channels

    def read(self, i, z):
        (image,), partner = super().read(i, z), self.square(self.rows[i].partner, 0)
        if heavier_half(image) != heavier_half(partner):
            raise ValueError(f'{self.rows[i].path} is the mirror image of its pair')
        tissue = [np.uint8(255 * mask.tissue(image, percentile=None))] if self.channels == 3 else []
        return [image, partner, *tissue]


def heavier_half(image):
    """L or R: where most of the breast lies"""
    left, right = np.array_split(image.sum(0, dtype=np.int64), [image.shape[1] // 2])
    return 'R' if left.sum() < right.sum() else 'L'


def load(cfg):
    """Rows of --root with their `partner` in --paired, and notes. An image without a partner, or with one of
    another shape, whose pixels do not correspond, takes no part."""
    rows, notes = detect.load(cfg)
    there, more = detect.load(replace(cfg, root=cfg.paired, dataset='csv', findings=(),
                                      min_distance=0.0))
    others, wrong, found = {row.key: row for row in there}, [], []
    for row in rows:
        row.partner = others.pop(row.key, None)
        why = misfit(row) if row.partner else f'not in {cfg.paired}'
        found += [] if why else [row]
        wrong += [f'{"/".join(row.key)}: {why}'] if why else []
    if wrong:
        notes.append(f'{len(wrong)} of {len(rows)} images have no fitting pair and take no part: '
                     f'{"; ".join(wrong[:20])}')
    if others:
        names = ['/'.join(key) for key in others]
        notes.append(f'{len(others)} images of {cfg.paired} have no pair: {"; ".join(names[:20])}')
    return found, notes + [f'{cfg.paired}: {note}' for note in more]


def misfit(row):
    """Why a row and its partner are no pair, '' if they are"""
    if row.boxes and not row.shape:                         # unusable, of the test set: counts as missed
        return ''
    try:
        (K, H, W), (k, h, w) = detect.size_of(row), detect.size_of(row.partner)
    except (ValueError, OSError) as problem:
        return str(problem)
    alike = K == k == 1 and abs(H * w / (W * h) - 1) < 0.02
    return '' if alike else f'{K} images of {W}x{H} and {k} of {w}x{h}'


# ---- command line ---------------------------------------------------------------------------------

def restored(folder):
    """`detect.restored` for predict"""
    cfg, detector, best = detect.restored(folder, Config, partial(build, Fused, None))
    if cfg.paired:
        raise ValueError(f'{folder} needs both images of a pair; give a run without --paired')
    return cfg, detector, best


def main(argv):
    """mimic, fuse or predict"""
    _, ranks, device = setup()
    command, *flags = argv = argv or ['--help']
    if command == 'predict':
        detect.predict(flags, device, restored)
    else:
        read = functools.cache(detect.checkpoint)           # each run is read once

        def recipe(given):
            start = given.get('init_from') or given.get('other')
            if given.get('resume') and os.path.exists(f'{given.get("out")}/last.pt'):
                start = given['out']                        # the others may be gone
            return {name: read(start)['config'][name] for name in RECIPE} if start else {}

        cfg = parse(Config, argv if command.startswith('-') else flags, recipe, source='root')
        needed = dict(mimic=('root', 'other', 'paired', 'epochs'),
                      fuse=('root', 'other', 'init_from'))
        if command not in needed:
            raise ValueError(f'{command}: expected mimic, fuse or predict')
        missing = [f'--{name}' for name in needed[command] if not getattr(cfg, name)]
        if missing:
            raise ValueError(f'{command} needs {" and ".join(missing)}')
        if command == 'mimic':                              # B starts as C; there are no normals to draw
            cfg = replace(cfg, init_from=cfg.init_from or cfg.other, normals=0.0)
        detect.check(cfg, ranks)
        detect.work(cfg, device, load=load if cfg.paired else detect.load,
                    build=partial(build, Mimic if command == 'mimic' else Fused, read))
    dist.destroy_process_group()


if __name__ == '__main__':
    script('fuse.py', main)
