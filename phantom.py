"""A synthetic breast with known tissue, density and lesions. H W pixels, K slices, G lesion boxes.

Copy this file alone; it imports nothing of this repository.
"""
from dataclasses import dataclass

import numpy as np
from scipy import ndimage


# ---- a synthetic breast -------------------------------------------------------------------------------------------

@dataclass
class Phantom:
    volume: np.ndarray          # uint8 (K, H, W)
    tissue: np.ndarray          # bool (H, W), the same for every slice
    boxes: np.ndarray           # float (G, 5): z x0 y0 x1 y1, pixels, x first; z the slice where it is brightest
    density: int                # 0..3, BI-RADS a..d: glandular share below 25, 50, 75, 100 %
    cancer: int                 # 1 with a lesion
    ffdm: np.ndarray = None     # uint8 (H, W), with `contrasts` only: the volume as a full-field mammogram shows it
    sm: np.ndarray = None       # uint8 (H, W), likewise: as a synthetic mammogram does


GLANDULAR = ((0.03, 0.25), (0.25, 0.50), (0.50, 0.75), (0.75, 0.95))


def breast(rng, slices=1, height=256, width=192, density=None, lesion=None, contrasts=None):
    """A breast to run and test on, not a model of anatomy: half an ellipse with a skin line, fat of power-law texture,
    glandular islands that fill the share of its density class, a lesion on a few neighbouring slices.

    slices=1 is a mammogram (the mean of eight slices); more are a DBT volume whose glands change slowly with depth.
    density 0..3 and lesion are drawn when None; half of the breasts get a lesion. Exposure, gamma, side and noise vary,
    so that the mean grey level tells little. Everything comes from `rng` (numpy Generator).

    contrasts (FFDM, SM) projects a volume to two mammograms of the same breast, `.ffdm` and `.sm`, where the lesion has
    these multiples of its ordinary contrast: (1, 0) is a lesion that only the full-field mammogram shows. The slices
    are those that SM is made of.
    """
    if contrasts is not None and slices == 1:
        raise ValueError('contrasts project a volume; give slices=8')
    K, H, W = (8 if slices == 1 else slices), height, width
    density = int(rng.integers(4)) if density is None else density
    lesion = bool(rng.random() < 0.5) if lesion is None else lesion
    r = _outline(rng, H, W)
    inside = r < 1
    volume = _anatomy(rng, inside, K, GLANDULAR[density])
    without, boxes = volume.mean(0), np.zeros((0, 5))
    if lesion:
        boxes = _add_lesion(rng, volume, r < 0.75, on_all=slices == 1 or contrasts is not None)
    pair = [] if contrasts is None else _projections(without, volume, contrasts)

    volume = volume.mean(0, keepdims=True) if slices == 1 else volume
    volume, *pair = (_exposed(rng, image, r, inside) for image in (volume, *pair))
    if rng.random() < 0.5:                                                              # the other breast
        volume, inside, *pair = (image[..., ::-1].copy() for image in (volume, inside, *pair))
        boxes[:, [1, 3]] = W - boxes[:, [3, 1]]
    return Phantom(volume, inside, boxes, density, int(lesion), *(image[0] for image in pair))


def _projections(without, volume, contrasts):
    """FFDM and SM of a volume (K, H, W), (1, H, W) each; `without`: its mean (H, W) without the lesion, which is on all
    slices alike. FFDM is the mean along the beam. SM is half mean, half brightest slice, with edges drawn sharper than
    they are, so that glands look like findings."""
    lesion = volume.mean(0) - without
    volume += (contrasts[1] - 1) * lesion
    sm = (volume.mean(0) + volume.max(0)) / 2
    sm += sm - ndimage.gaussian_filter(sm, 2)
    return (without + contrasts[0] * lesion)[None], sm[None]


def _exposed(rng, images, r, inside):
    """Images (K, H, W) of one exposure as the detector gives them, uint8"""
    images = images * np.sqrt(np.clip(1 - r ** rng.uniform(6, 12), 0, 1))               # thinner towards the skin
    images[:, (r > 0.975) & inside] += 0.12                                             # the skin line
    images = rng.uniform(0.6, 1.0) * np.clip(images, 0, None) ** rng.uniform(0.75, 1.3)
    images += rng.normal(0, rng.uniform(0.008, 0.012), images.shape).astype(np.float32) * inside
    images[:, ~inside] = 0
    return np.uint8(np.clip(images, 0, 1) * 255)


def _outline(rng, H, W):
    """Distance from the middle of the chest wall, 1 on the skin, float32 (H, W): half an ellipse, tilted, wobbling."""
    y, x = np.mgrid[:H, :W].astype(np.float32) / H
    angle = np.arctan2(y - 0.5, x + 1e-6)
    wobble = sum(rng.normal(0, 0.012) * np.cos(k * angle + rng.uniform(0, 6.28)) for k in (2, 3, 4))
    y = (y - 0.5 - rng.uniform(-0.12, 0.12) * x) / rng.uniform(0.42, 0.49)
    x = x / rng.uniform(0.62, 0.73)                                                     # a wide frame is mostly air
    return np.maximum(np.sqrt(x ** 2 + y ** 2) + wobble, 0)


def _anatomy(rng, inside, K, glandular):
    """Fat, glands that fill a share within `glandular` of the breast, and Cooper's ligaments, (K, H, W). Glands and
    ligaments of a slice are a mix of two fields that turns from the first towards the second with depth."""
    H, W = inside.shape
    fat = _field(rng, H, W, slope=1.4)
    glands = [_field(rng, H, W, slope=1.5, longest=0.12 * H) for _ in range(2)]
    strands = [_field(rng, H, W, slope=1.8, longest=0.25 * H, stretch=2.0) for _ in range(2)]
    share = rng.uniform(*glandular)
    softness = rng.uniform(0.22, 0.28)
    turn = rng.uniform(0.5, 1.2) * np.linspace(0, np.pi / 2, K)                         # neighbours stay alike
    volume = np.empty((K, H, W), np.float32)
    for k in range(K):
        gland, strand = (a * np.cos(turn[k]) + b * np.sin(turn[k]) for a, b in (glands, strands))
        edge = np.quantile(gland[inside], 1 - share)
        volume[k] = 1 / (1 + np.exp(-np.clip((gland - edge) / softness, -30, 30)))      # soft islands
        volume[k] += 0.35 * np.exp(-(strand / 0.12) ** 2)
    return 0.30 + 0.03 * fat + rng.uniform(0.26, 0.30) * volume


def _add_lesion(rng, volume, where, on_all):
    """A bright blob with spokes at a random place of `where`, brightest on one slice and faint two away, or `on_all`
    alike, as the mean of them needs it. -> its box (1, 5)"""
    K, H, W = volume.shape
    cy, cx = _pick(rng, where)
    z, radius = int(rng.integers(K)), H * rng.uniform(0.02, 0.05)
    y, x = np.mgrid[:H, :W]
    spokes = 1 + 0.25 * np.cos(rng.integers(5, 9) * np.arctan2(y - cy, x - cx) + rng.uniform(0, 6.28))
    blob = np.exp(-(((y - cy) ** 2 + (x - cx) ** 2) / (radius * spokes) ** 2) ** 2).astype(np.float32)
    depth = np.exp(-(((np.arange(K) - z) / 1.2) ** 2)).astype(np.float32)
    depth = np.ones(K, np.float32) if on_all else depth
    volume += rng.uniform(0.20, 0.35) * depth[:, None, None] * blob
    box = np.clip([cx - radius, cy - radius, cx + radius, cy + radius], 0, [W, H, W, H])
    return np.array([[0 if on_all else z, *box]])


def _field(rng, H, W, slope, longest=None, stretch=1.0):
    """A Gaussian random field (H, W) of mean 0 and deviation 1: amplitude f^-slope, faded out above the wavelength
    `longest` in pixels, drawn out along the rows by `stretch`."""
    f = np.hypot(np.fft.fftfreq(H)[:, None], stretch * np.fft.rfftfreq(W)[None])
    f[0, 0] = np.inf
    gain = f ** -slope
    if longest is not None:
        gain *= 1 - np.exp(-(f * longest) ** 2)
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((H, W))) * gain, s=(H, W))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _pick(rng, mask):
    index = np.flatnonzero(mask)
    return divmod(int(index[rng.integers(len(index))]), mask.shape[1])
