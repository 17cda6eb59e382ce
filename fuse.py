"""Fused representations of full-field (FFDM) and synthetic mammograms (SM): trained on pairs, a detector
finds lesions in SM alone (Sharma 2024, arXiv 2408.08560, 4).

    $ python detect.py --no-freeze --root SM.csv --encoder FILE --out A             # I: a detector on SM,
    $ python detect.py --no-freeze --root FFDM.csv --encoder FILE --out C           # and one on FFDM
    $ python fuse.py mimic --root SM.csv --paired FFDM.csv --other C --out B        # II: C's levels from SM
    $ python fuse.py fuse --root SM.csv --init_from A --other B --out FUSED         # III: A beside B
    $ python fuse.py predict SM.dcm --checkpoint FUSED

The upper bound, a detector of both images: fuse --paired FFDM.csv --init_from A --other C. SM.csv and
FFDM.csv are lists as datasets.py takes them; patient, exam, laterality and view name the pairs. The flags are
those of detect.py; the defaults of those that shape the detector are the values of A, or in stage II of C.

B images, S pixels of a side, C channels, h w cells of a level.
"""
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import datasets
import detect
import mask
import retinanet
import score
import vit
from run import option, parse, script, setup

LEVELS = retinanet.LEVELS
RECIPE = ('size', 'voi', 'clahe', 'channels', 'freeze', 'head', 'dropout', 'queries', 'layers',
          'denoising', 'lambdas')                           # what shapes the detector


@dataclass
class Config(detect.Config):
    """The flags of detect.py and two more. [sharma] is arXiv 2408.08560."""
    root: str | None = option(None, 'ours', 'list of the synthetic mammograms: SM.csv')
    out: str = option('runs/fuse', 'ours', 'folder of this run', group='the run')
    paired: str | None = option(None, 'sharma', 'list of the other images of the same views: FFDM',
                                group='fusion')
    other: str | None = option(None, 'sharma', 'mimic: C, to be imitated; fuse: B, beside A')


# ---- stage II: B imitates C -----------------------------------------------------------------------

class Mimic(detect.Features):
    """B learns to make from SM the levels that `other`, which is C and frozen, makes from FFDM. Its images
    are those of `Pairs`, (B, 3, S, S). detect.py trains it like a Detector."""

    def __init__(self, cfg, encoder, other):
        super().__init__(encoder, cfg.channels, cfg.freeze)
        self.cfg, self.dataset, self.head = cfg, Pairs, Imitation(cfg)
        self.other = other.requires_grad_(False)

    def forward(self, images, boxes=None):
        with torch.no_grad():
            aims = self.other.levels(images[:, 1:])
        return self.head(self.levels(images), aims)

    def items(self, rows):
        """What every epoch sees: every pair"""
        return [(i, 0) for i in range(len(rows))]

    def validate(self, rows, device):
        """Over all locations of tissue -> the mean over levels of the cosine of guess and aim, and for each
        level this cosine and `constant`, what the mean of C's vectors alone would reach"""
        cosines, locations = torch.zeros(2, len(LEVELS), device=device)         # sums of each level
        aims = torch.zeros(len(LEVELS), self.cfg.channels, device=device)
        my_items = self.items(rows)[dist.get_rank()::dist.get_world_size()]
        for samples, answers in detect.infer(self, rows, my_items, device):
            images = torch.from_numpy(np.stack([sample['image'] for sample in samples]))
            for i, (pair, tissue) in enumerate(zip(answers, self.head.tissue(images))):
                guess, aim = (x.permute(0, 2, 3, 1)[tissue.to(device)] for x in pair)   # (locations, C)
                cosines[i] += (guess * aim).sum()
                locations[i] += len(guess)
                aims[i] += aim.sum(0)
        for sums in (cosines, locations, aims):
            dist.all_reduce(sums)
        cosine = cosines / locations.clamp_min(1)
        constant = (aims / locations.clamp_min(1)[:, None]).norm(dim=1)         # all aims have length 1
        return cosine.mean().item(), dict(cosine=cosine.tolist(), constant=constant.tolist())

    def finish(self, rows, best, notes, device, out):
        """Prints how well B imitates each level. If B has collapsed, it is no better than C's mean."""
        if dist.get_rank() == 0:
            for level, cosine, constant in zip(LEVELS, best['cosine'], best['constant']):
                verdict = '' if cosine > constant else ': B is no better'
                print(f"  {level}: cosine with C {cosine:.3f}, of C's mean alone {constant:.3f}"
                      f'{verdict}')
            score.write_json(out / 'scores.json', best)
            print(f'-> {out}: last.pt, scores.json. Next:\n  python fuse.py fuse --root '
                  f'{self.cfg.root} --init_from A --other {out} --out FUSED')


class Imitation(nn.Module):
    """The head of stage II, a 3x3 convolution per level from B's levels to C's; stage III leaves it out."""

    TERMS = ('negative_cosine',)

    def __init__(self, cfg):
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(cfg.channels, cfg.channels, 3, padding=1)
                                     for _ in LEVELS)
        grids = zip(retinanet.grids(cfg.size), LEVELS.values())
        self.middles = [(first + stride * torch.arange(cells)).long()       # pixels, one for each cell
                        for cells, (stride, first, _) in grids]

    def forward(self, levels, aims):
        """For each level guess and aim, (B, C, h, w), their vectors of length 1"""
        guesses = [project(level) for project, level in zip(self.project, levels)]
        return [[F.normalize(x.float(), dim=1) for x in pair] for pair in zip(guesses, aims)]

    def tissue(self, images):
        """Images of `Pairs` -> for each level bool (B, h, w): whether the cell's middle is tissue"""
        return [(images[:, 2] > 127)[:, at[:, None], at] for at in self.middles]

    def count(self, batch):
        """What the loss of a whole batch is divided by: its images with tissue"""
        return (batch['images'][:, 2] > 127).flatten(1).any(1).sum()

    def loss(self, answers, batch):
        """Eq. 2: minus the cosine, its mean over the tissue, then over levels; summed over images, (1,).
        Without the mask the air, which is most of an image, would decide."""
        terms = []
        for (guess, aim), tissue in zip(answers, self.tissue(batch['images'])):
            tissue = tissue.to(guess.device)
            cosine = (guess * aim).sum(1)                                               # (B, h, w)
            mean = (cosine * tissue).sum((1, 2)) / tissue.sum((1, 2)).clamp_min(1)      # (B,)
            terms.append(-mean.sum())
        return torch.stack(terms).mean(0, keepdim=True)


# ---- stage III: A beside B ------------------------------------------------------------------------

class Fused(detect.Detector):
    """The levels of `other`, which is frozen, beside those of A, and a 1x1 convolution back to C channels.
    Other is B and sees SM as well; with --paired it sees FFDM.

    The convolution starts by passing the levels of A through, so the detector begins as A. The paper gives
    both to its predictor and does not say how that begins."""

    def __init__(self, cfg, encoder, other):
        super().__init__(cfg, encoder)
        self.dataset = Pairs if cfg.paired else detect.Frames
        self.other = other.requires_grad_(False)
        self.mix = nn.ModuleList(nn.Conv2d(2 * cfg.channels, cfg.channels, 1) for _ in LEVELS)
        for mix in self.mix:
            nn.init.dirac_(mix.weight)                      # 1 from each channel of A, 0 elsewhere
            nn.init.zeros_(mix.bias)

    def levels(self, images):
        with torch.no_grad():
            others = self.other.levels(images[:, 1:] if self.cfg.paired else images)
        pairs = zip(super().levels(images), others)
        return [mix(torch.cat(pair, dim=1)) for mix, pair in zip(self.mix, pairs)]      # (B, C, h, w)


def build(kind, cfg, state=None):
    """Mimic or Fused, to be filled from its checkpoint `state`; or at its start, with encoder, pyramid and
    head of --init_from beside encoder and pyramid of --other."""
    if state:
        encoder, other = (vit.ViT(**config) for config in state['encoders'])
        return kind(cfg, encoder, detect.Features(other, cfg.channels))
    theirs = detect.read_checkpoint(cfg.other)
    for name in ('size', 'channels'):
        if theirs['config'][name] != getattr(cfg, name):
            raise ValueError(f'{cfg.other} has --{name} {theirs["config"][name]}; give the same')
    encoder = vit.ViT(**theirs['encoders'][0])
    start = detect.build(cfg)                               # seeds the random numbers of what follows
    other = detect.Features(encoder, cfg.channels)
    other.load_state_dict({k: theirs['best_weights'][k] for k in other.state_dict()})
    model = kind(cfg, start.encoder, other)
    own = model.state_dict()
    model.load_state_dict(own | {k: v for k, v in start.state_dict().items() if k in own})
    return model


def build_trained(cfg, state):
    """The detector of a finished run, for predict"""
    if cfg.paired:                                          # B, or the upper bound
        raise ValueError(f'{cfg.out} needs both images of a pair; give a run without --paired')
    return build(Fused, cfg, state)


# ---- pairs ----------------------------------------------------------------------------------------

class Pairs(detect.Frames):
    """Samples of three channels: an image, its partner, and the tissue of the first as 255"""

    channels = 3

    def image(self, row, z):
        image, partner = self.read(row, z), self.read(row.partner, 0)                   # (S, S) each
        if heavier_half(image) != heavier_half(partner):
            raise ValueError(f'{row.path} is the mirror image of its pair')
        return np.stack([image, partner, np.uint8(255 * mask.tissue(image, percentile=None))])


def heavier_half(image):
    """L or R: where most of the breast lies"""
    left, right = np.array_split(image.sum(0, dtype=np.int64), [image.shape[1] // 2])
    return 'R' if left.sum() < right.sum() else 'L'


def load(cfg):
    """Rows of --root, with --paired each with its `partner`, and notes. A row without a partner, or with one
    of another shape, takes no part."""
    rows, notes = detect.load(cfg)
    if not cfg.paired:
        return rows, notes
    others, more = datasets.load('csv', cfg.paired, cfg.images, cfg.seed, boxes=True)
    partners, kept, wrong = {row.key: row for row in others}, [], []
    for row in rows:
        row.partner = partners.get(row.key)
        try:
            check_pair(row)
            kept.append(row)
        except (ValueError, OSError) as problem:
            wrong.append(f'{"/".join(row.key)}: {problem}')
    if wrong:
        notes.append(f'{len(wrong)} of {len(rows)} images have no partner and take no part: '
                     f'{"; ".join(wrong[:20])}')
    return kept, notes + [f'{cfg.paired}: {note}' for note in more]


def check_pair(row):
    """ValueError or OSError if the pixels of a row and of its partner do not correspond"""
    if not row.partner:
        raise ValueError('not there')
    if row.shape or not row.boxes:      # else it is an unusable file of the test set, which counts as missed
        (K, H, W), (k, h, w) = detect.size_of(row), detect.size_of(row.partner)
        if not K == k == 1 or abs(H * w / (W * h) - 1) >= 0.02:
            raise ValueError(f'{K} images of {W}x{H} and {k} of {w}x{h}')


# ---- command line ---------------------------------------------------------------------------------

def defaults(given):
    """Flags that are given -> defaults of others, as in the run that this one starts from"""
    start = given.get('init_from') or given.get('other')
    if not start:
        return {}
    config = detect.read_checkpoint(start)['config']
    return {name: config[name] for name in RECIPE}


def main(argv):
    """mimic, fuse or predict"""
    _, ranks, device = setup()
    argv = argv or ['--help']
    command, *flags = argv
    if command == 'predict':
        detect.predict(flags, device, Config, build_trained)
    else:
        cfg = parse(Config, argv if command.startswith('-') else flags, defaults, source='root')
        needed = dict(mimic=('root', 'other', 'paired', 'epochs'),
                      fuse=('root', 'other', 'init_from'))
        if command not in needed:
            raise ValueError(f'{command}: expected mimic, fuse or predict')
        missing = [f'--{name}' for name in needed[command] if not getattr(cfg, name)]
        if missing:
            raise ValueError(f'{command} needs {" and ".join(missing)}')
        if command == 'mimic':                              # B starts as C; there are no normals to draw
            cfg = replace(cfg, init_from=cfg.init_from or cfg.other, normals=0.0)
        detect.check_flags(cfg, ranks)
        kind = Mimic if command == 'mimic' else Fused
        detect.train_and_test(cfg, device, partial(build, kind), load)
    dist.destroy_process_group()


if __name__ == '__main__':
    script('fuse.py', main)
