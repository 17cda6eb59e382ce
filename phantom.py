"""A synthetic breast whose tissue, density and lesion are known, to run demonstrations and tests on.

    breast(rng)              ->  Phantom with a mammogram, uint8 (1, H, W)
    breast(rng, slices=8)    ->  Phantom with a DBT volume, uint8 (8, H, W)

It is half an ellipse with a skin line, filled with fat of power-law texture, glandular islands and
ligaments. It is no model of anatomy, and nothing measured on it has clinical meaning.
K slices, H W pixels, G lesion boxes. Copy this file alone; it imports nothing of this repository.

    $ python phantom.py [OUT.png]           # the four density classes; below them with a lesion
"""
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

GLANDULAR = ((0.03, 0.25), (0.25, 0.50), (0.50, 0.75), (0.75, 0.95))    # share of each BI-RADS density class


@dataclass
class Phantom:
    """What is known of a synthetic breast."""
    volume: np.ndarray          # uint8 (K, H, W)
    tissue: np.ndarray          # bool (H, W), the same for every slice
    boxes: np.ndarray           # float (G, 5): z x0 y0 x1 y1 in pixels, z the slice where it is brightest
    density: int                # 0..3 for BI-RADS a..d
    cancer: int                 # 1 with a lesion
    ffdm: np.ndarray = None     # uint8 (H, W), with `contrasts` only: as a full-field mammogram shows it
    sm: np.ndarray = None       # uint8 (H, W), with `contrasts` only: as a synthetic mammogram shows it


def breast(rng, slices=1, height=256, width=192, density=None, lesion=None, contrasts=None):
    """One synthetic breast; everything random in it comes from `rng`, a numpy Generator.

    slices=1 is a mammogram, the mean of eight slices; more are a DBT volume. Well inside the breast its greys
    correlate .88, .73, .42 and .12 between slices 1, 2, 4 and 8 apart. In the VICTRE phantom the correlations
    are .93, .75, .40 and .11, for slices of 1 mm that are blurred by 3 mm in depth. `density` (0..3) and
    `lesion` are drawn when None; half of the breasts get a lesion. Exposure, gamma, side and noise vary, so
    that the mean grey level says little.

    contrasts=(FFDM, SM) also projects a volume to two mammograms, `.ffdm` and `.sm`, where the lesion has
    these multiples of its contrast: (1, 0) is a lesion that only the full-field mammogram shows. The slices
    are nearly alike then, and the lesion lies on all of them. Raises ValueError for contrasts of a single
    slice."""
    if contrasts is not None and slices == 1:
        raise ValueError('contrasts project a volume; give slices=8')
    K, H, W = (8 if slices == 1 else slices), height, width
    density = int(rng.integers(4)) if density is None else density
    lesion = bool(rng.random() < 0.5) if lesion is None else lesion

    r = outline(rng, H, W)                                              # (H, W)
    inside = r < 1
    deep = slices > 1 and contrasts is None                             # else slices are nearly alike
    volume = anatomy(rng, inside, K, GLANDULAR[density], deep)          # (K, H, W)
    healthy, boxes = volume.mean(0), np.zeros((0, 5))
    if lesion:
        boxes = add_lesion(rng, volume, r < 0.75, on_all=not deep)
    projected = [] if contrasts is None else projections(healthy, volume, contrasts)

    volume = volume.mean(0, keepdims=True) if slices == 1 else volume
    volume, *projected = (expose(rng, image, r, inside) for image in (volume, *projected))
    if rng.random() < 0.5:                                              # the other breast
        volume, inside, *projected = (a[..., ::-1].copy() for a in (volume, inside, *projected))
        boxes[:, [1, 3]] = W - boxes[:, [3, 1]]
    return Phantom(volume, inside, boxes, density, int(lesion), *(image[0] for image in projected))


# ---- its parts ------------------------------------------------------------------------------------

def outline(rng, H, W):
    """Distance from the middle of the chest wall, 1 on the skin, float32 (H, W): a tilted half ellipse."""
    y, x = np.mgrid[:H, :W].astype(np.float32) / H
    angle = np.arctan2(y - 0.5, x + 1e-6)
    wobble = sum(rng.normal(0, 0.012) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in (2, 3, 4))
    y = (y - 0.5 - rng.uniform(-0.12, 0.12) * x) / rng.uniform(0.42, 0.49)
    x = x / rng.uniform(0.62, 0.73)
    return np.maximum(np.sqrt(x ** 2 + y ** 2) + wobble, 0)


def anatomy(rng, inside, K, glandular, deep):
    """Fat, glands that cover a share within `glandular` of the breast, and ligaments, float (K, H, W).

    A slice mixes random fields. Of a `deep` volume there is one for every third slice, and a slice mixes
    those near it; else there are two, and the mix turns slowly from one to the other."""
    H, W = inside.shape
    fields = (K + 8) // 3 if deep else 2
    fat = random_field(rng, H, W, slope=1.4)
    glands = [random_field(rng, H, W, slope=1.5, longest=0.12 * H) for _ in range(fields)]
    strands = [random_field(rng, H, W, slope=1.8, longest=0.25 * H, stretch=2.0)
               for _ in range(fields)]
    share = rng.uniform(*glandular)
    softness = rng.uniform(0.22, 0.28)
    if deep:
        away = np.arange(K)[:, None] - 3 * np.arange(-1, fields - 1)    # in slices
        mix = np.exp(-(away / 2.4) ** 2 / 2)                            # (K, fields)
        mix /= np.sqrt((mix ** 2).sum(1, keepdims=True))                # the deviation stays 1
    else:
        turn = rng.uniform(0.5, 1.2) * np.linspace(0, np.pi / 2, K)
        mix = np.stack([np.cos(turn), np.sin(turn)], axis=1)

    volume = np.empty((K, H, W), np.float32)
    for k in range(K):
        gland = sum(w * field for w, field in zip(mix[k], glands))
        strand = sum(w * field for w, field in zip(mix[k], strands))
        edge = np.quantile(gland[inside], 1 - share)
        volume[k] = 1 / (1 + np.exp(-np.clip((gland - edge) / softness, -30, 30)))     # soft islands
        volume[k] += 0.35 * np.exp(-(strand / 0.12) ** 2)                              # thin bright lines
    return 0.30 + 0.03 * fat + rng.uniform(0.26, 0.30) * volume


def add_lesion(rng, volume, where, on_all):
    """Adds a bright blob with spokes at a random place of `where` (H, W) -> its box (1, 5).

    It is brightest on one slice and faint two slices away, or the same on all."""
    K, H, W = volume.shape
    index = np.flatnonzero(where)
    cy, cx = divmod(int(index[rng.integers(len(index))]), W)
    z, radius = int(rng.integers(K)), H * rng.uniform(0.02, 0.05)
    y, x = np.mgrid[:H, :W]
    y, x = y - cy, x - cx
    spokes = 1 + 0.25 * np.cos(rng.integers(5, 9) * np.arctan2(y, x) + rng.uniform(0, 6.28))
    blob = np.exp(-((y ** 2 + x ** 2) / (radius * spokes) ** 2) ** 2).astype(np.float32)
    depth = np.exp(-(((np.arange(K) - z) / 1.2) ** 2)).astype(np.float32)               # (K,)
    depth = np.ones(K, np.float32) if on_all else depth
    volume += rng.uniform(0.20, 0.35) * depth[:, None, None] * blob
    box = np.clip([cx - radius, cy - radius, cx + radius, cy + radius], 0, [W, H, W, H])
    return np.array([[0 if on_all else z, *box]])


def projections(healthy, volume, contrasts):
    """FFDM and SM, (1, H, W) each, of a volume (K, H, W) whose mean without the lesion is `healthy` (H, W).

    FFDM is the mean along the beam. SM is half mean, half brightest slice, with its edges sharpened, so
    that glands look like findings."""
    lesion = volume.mean(0) - healthy
    volume += (contrasts[1] - 1) * lesion
    sm = (volume.mean(0) + volume.max(0)) / 2
    sm += sm - ndimage.gaussian_filter(sm, 2)
    return (healthy + contrasts[0] * lesion)[None], sm[None]


def expose(rng, images, r, inside):
    """The images (K, H, W) of one exposure as a detector gives them, uint8."""
    images = images * np.sqrt(np.clip(1 - r ** rng.uniform(6, 12), 0, 1))               # thinner at the skin
    images[:, (r > 0.975) & inside] += 0.12                                             # the skin line
    images = rng.uniform(0.6, 1.0) * np.clip(images, 0, None) ** rng.uniform(0.75, 1.3)
    images += rng.normal(0, rng.uniform(0.008, 0.012), images.shape).astype(np.float32) * inside
    images[:, ~inside] = 0
    return np.uint8(np.clip(images, 0, 1) * 255)


def random_field(rng, H, W, slope, longest=None, stretch=1.0):
    """A Gaussian random field (H, W) of mean 0 and deviation 1 with amplitude f^-slope.

    Wavelengths above `longest` pixels fade out; `stretch` draws the field out along the rows."""
    f = np.hypot(np.fft.fftfreq(H)[:, None], stretch * np.fft.rfftfreq(W)[None])
    f[0, 0] = np.inf
    gain = f ** -slope
    if longest is not None:
        gain *= 1 - np.exp(-(f * longest) ** 2)
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((H, W))) * gain, s=(H, W))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def dataset(folder, volumes):
    """Writes uint8 volumes (K, H, W) as prepare.py writes a data set: one .npy each, and index.csv."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob('*.npy'):
        old.unlink()
    with open(folder / 'index.csv', 'w', newline='') as file:
        index = csv.writer(file)
        index.writerow(('path', 'slices', 'height', 'width'))
        for i, volume in enumerate(volumes):
            np.save(folder / f'{i:04d}.npy', volume if len(volume) > 1 else volume[0])
            index.writerow((f'{i:04d}.npy', *volume.shape))


if __name__ == '__main__':
    if '-h' in sys.argv or '--help' in sys.argv:
        print(__doc__)
        sys.exit()
    out = sys.argv[1] if len(sys.argv) > 1 else 'phantom.png'
    rows = []
    for lesion in (False, True):
        four = [breast(np.random.default_rng(d), density=d, lesion=lesion) for d in range(4)]
        rows.append(np.hstack([example.volume[0] for example in four]))
    Image.fromarray(np.vstack(rows)).save(out)
    print(f'-> {out}: density classes a to d; below them with a lesion')
