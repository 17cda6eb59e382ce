"""sampler.py: crops and masks lie on tissue, and without tissue they follow DINOv2's laws."""
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageEnhance
from scipy import stats

import phantom
import sampler

RATIO = (3 / 4, 4 / 3)


@pytest.fixture(scope='module')
def breast():
    """A small breast in a large frame, where uniform crops often miss: image uint8, tissue bool (400, 300)."""
    p = phantom.breast(np.random.default_rng(0), height=256, width=160)
    image, tissue = np.zeros((400, 300), np.uint8), np.zeros((400, 300), bool)
    image[70:326, :160], tissue[70:326, :160] = p.volume[0], p.tissue
    return image, tissue


# ---- crops --------------------------------------------------------------------------------------------------------

def test_every_crop_holds_more_than_rho_tissue(breast):
    _, tissue = breast
    rng, relaxed = np.random.default_rng(0), 0
    for i in range(4000):
        rho = (0.2, 0.4, 0.6)[i % 3]
        (y0, x0, y1, x1), was_relaxed = sampler.crop_box(rng, tissue, (0.06, 0.25), RATIO, rho)
        assert 0 <= y0 < y1 <= 400 and 0 <= x0 < x1 <= 300
        assert tissue[y0:y1, x0:x1].mean() > (0 if was_relaxed else rho)
        relaxed += was_relaxed
    assert relaxed < 0.02 * 4000


def test_rho_is_relaxed_and_counted_where_no_window_reaches_it(breast):
    for tissue in (breast[1], np.zeros((400, 300), bool)):
        rng = np.random.default_rng(0)
        for _ in range(20):
            (y0, x0, y1, x1), relaxed = sampler.crop_box(rng, tissue, (0.9, 1.0), RATIO, 0.9)
            assert relaxed and 0 <= y0 < y1 <= 400 and 0 <= x0 < x1 <= 300
            assert tissue[y0:y1, x0:x1].any() == tissue.any()


def random_resized_crop(rng, H, W, scale, ratio):
    """torchvision's, written out: ten tries, then the largest window of an allowed ratio; its place uniform here."""
    for _ in range(10):
        area, log_ratio = H * W * rng.uniform(*scale), rng.uniform(math.log(ratio[0]), math.log(ratio[1]))
        w, h = round(math.sqrt(area * math.exp(log_ratio))), round(math.sqrt(area / math.exp(log_ratio)))
        if 0 < w <= W and 0 < h <= H:
            break
    else:
        w, h = min(W, round(H * ratio[1])), min(H, round(W / ratio[0]))
    y, x = rng.integers(H - h + 1), rng.integers(W - w + 1)
    return y, x, y + h, x + w


@pytest.mark.parametrize('H, W', [(120, 90), (96, 48), (60, 200)])
def test_blind_crops_follow_the_law_of_dinov2(H, W):
    """Kolmogorov-Smirnov on six marginals of 4,000 draws each at p > 1e-3: a false alarm once in 170 seeds for each
    shape. No window of a narrow image counts as relaxed."""
    scale, everything = (0.2, 0.9), np.ones((H, W), bool)
    rngs, ours, theirs = [np.random.default_rng(seed) for seed in (1, 2, 3)], [], []
    for _ in range(4000):
        theirs.append(random_resized_crop(rngs[0], H, W, scale, RATIO))
        box, relaxed = sampler.crop_box(rngs[1], everything, scale, RATIO, 0.0)
        assert not relaxed
        ours.append(box)

    def marginals(boxes):
        y0, x0, y1, x1 = np.array(boxes, float).T
        h, w = y1 - y0, x1 - x0
        exact = np.stack([h * w, w / h, y0 / (H - h + 1), x0 / (W - w + 1), y0, x1])
        return exact + 1e-6 * rngs[2].random(exact.shape)                       # no ties

    for a, b in zip(marginals(ours), marginals(theirs)):
        assert stats.ks_2samp(a, b).pvalue > 1e-3


# ---- views --------------------------------------------------------------------------------------------------------

def test_grids_are_the_tissue_under_each_patch_of_the_view_flipped_with_it(breast):
    _, tissue = breast
    picture = np.where(tissue, 200, 0).astype(np.uint8)             # a view of this picture shows its own tissue
    for seed in range(8):
        out = sampler.views(np.random.default_rng(seed), picture, tissue, 112, 56, 2, jitter=0, blurs=(0, 0, 0),
                            solarizes=0, rho=0.3)
        for view, grid in zip(out['globals'], out['grids']):
            seen = view.reshape(8, 14, 8, 14).mean((1, 3)) / 200
            assert np.abs(seen - grid).max() < 0.08


def test_blind_windows_miss_the_breast_but_keep_the_true_grid(breast):
    image, tissue = breast
    out = sampler.views(np.random.default_rng(0), image, tissue, 112, 56, 40, local_scale=(0.05, 0.1), rho=0.5,
                        placement=np.ones_like(tissue), flip=0)
    shares = [tissue[y0:y1, x0:x1].mean() for y0, x0, y1, x1 in out['boxes']]
    assert min(shares[2:]) < 0.2 and not out['relaxed'].any()
    np.testing.assert_allclose(out['grids'].mean((1, 2)), shares[:2], atol=0.01)


@pytest.mark.parametrize('side', [14, 98, 518])
def test_cutting_is_bicubic_interpolation_as_pillows(breast, side):
    """One grey level at most on a breast, two on noise, for odd windows anywhere, enlarged and shrunk. Beside white
    letters of a film, what overshoots 0..255 is clipped in another order: twenty."""
    noise = np.random.default_rng(side).integers(64, 192, (301, 402), np.uint8)
    letters = np.zeros((301, 402), np.uint8)
    letters[:, 200:] = 90
    letters[100:160, 20:150:9] = letters[100:160:9, 20:150] = 255
    for image, levels in ((breast[0][:301], 1), (noise, 2), (letters, 20)):
        for y0, x0, y1, x1 in ((0, 0, 301, 300), (7, 3, 290, 298), (7, 3, 290, 98), (9, 11, 40, 40), (5, 6, 6, 7)):
            pillow = Image.fromarray(image[y0:y1, x0:x1]).resize((side, side + 7), Image.Resampling.BICUBIC)
            ours = sampler.cut(image, (y0, x0, y1, x1), (side + 7, side))
            assert ours.dtype == np.uint8 and np.abs(ours.astype(int) - np.asarray(pillow)).max() <= levels


def test_the_photometric_table_is_the_operations_one_by_one():
    """Pixel for pixel what DINOv2's transforms do to a grey RGB image: Pillow's brightness and contrast in the order
    drawn, with saturation and hue between them, which do nothing."""
    image = np.random.default_rng(0).integers(0, 256, (40, 40)).astype(np.uint8)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        table = sampler.jitter_table(rng, np.bincount(image.ravel(), minlength=256), 0.4, 0.4)
        rng, x = np.random.default_rng(seed), Image.fromarray(image).convert('RGB')
        for operation in rng.permutation(2):
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast)[operation]
            x = ImageEnhance.Color(kind(x).enhance(rng.uniform(0.6, 1.4))).enhance(1.2)
            hue, saturation, value = x.convert('HSV').split()
            x = Image.merge('HSV', (hue.point(lambda h: h + 20), saturation, value)).convert('RGB')
        assert (table[image][..., None] == np.asarray(x)).all()
    solarized = sampler.solarize(np.arange(256, dtype=np.uint8))
    assert solarized[127] == 127 and solarized[128] == 127 and solarized[255] == 0


def test_blur_is_the_gaussian_of_nine_taps():
    image = np.random.default_rng(0).integers(0, 256, (30, 20)).astype(np.uint8)
    taps = np.exp(-0.5 * (np.arange(-4, 5) / 1.3) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(image.astype(float), 4, mode='reflect')
    slow = np.array([[(padded[y:y + 9, x:x + 9] * kernel).sum() for x in range(20)] for y in range(30)])
    assert np.abs(sampler.blur(image, 1.3) - slow).max() <= 0.501


# ---- patch masks --------------------------------------------------------------------------------------------------

def literal_patch_mask(rng, grid, m, rho, m_min=4, ratio=(0.3, 1 / 0.3), weight=1.0, eps=1e-3):
    """The rule of 2.3 with every corner scored, as slow as it reads."""
    h, w = grid.shape
    mask, floor, failures = np.zeros((h, w), bool), rho, 0
    while mask.sum() < m:
        missing = int(m - mask.sum())
        m_max = min(h * w // 2, missing)
        area = rng.uniform(min(m_min, missing), m_max)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        bh, bw = (min(side, max(1, round(math.sqrt(area * f)))) for side, f in ((h, aspect), (w, 1 / aspect)))
        corners, pi = [], []
        for y in range(h - bh + 1):
            for x in range(w - bw + 1):
                r = grid[y:y + bh, x:x + bw].mean()
                if r >= floor:
                    corners.append((y, x))
                    pi.append(weight * r + eps)
        if corners:
            y, x = corners[rng.choice(len(corners), p=np.array(pi) / sum(pi))]
            new = int((~mask[y:y + bh, x:x + bw]).sum())
            if 0 < new <= m_max:
                mask[y:y + bh, x:x + bw], failures = True, 0
                continue
        failures += 1
        floor = max(0.0, floor - rho / 10) if failures % 10 == 0 else floor
    return mask


def half_breast(side):
    y, x = np.mgrid[:side, :side] / side
    return np.clip(1.4 - np.hypot((y - 0.5) / 0.5, x / 0.8), 0, 1)


def test_masks_have_exactly_m_patches_and_say_whether_rho_was_relaxed():
    rng, info = np.random.default_rng(0), {}
    for m in range(145):
        for grid in (half_breast(12), np.ones((12, 12)), np.zeros((12, 12))):
            mask = sampler.patch_mask(rng, grid, m, 0.5)
            assert mask.dtype == bool and mask.shape == (12, 12) and mask.sum() == m
    for m, relaxed in ((20, False), (1300, True)):
        sampler.patch_mask(rng, half_breast(37), m, 0.5, info=info)
        assert info == {'relaxed': relaxed}


def test_masks_follow_the_distribution_of_the_written_rule():
    """Per-cell frequencies of 1,500 masks of each sampler: the largest of 144 differences of two binomials stays
    under 4.2 standard deviations except once in 250 seeds."""
    grid, n = half_breast(12), 1500
    ours, theirs = (np.mean([f(np.random.default_rng([k, i]), grid, 40, 0.4) for i in range(n)], axis=0)
                    for k, f in enumerate((sampler.patch_mask, literal_patch_mask)))
    p = (ours + theirs) / 2
    assert (np.abs(ours - theirs) / np.sqrt(2 * p * (1 - p) / n + 1e-6)).max() < 4.2


# ---- slice pairs --------------------------------------------------------------------------------------------------

def test_slice_pairs_stay_inside_the_volume_and_within_d_max():
    """200 draws of at most eight neighbours miss one with probability 1e-11."""
    rng = np.random.default_rng(0)
    for K in (2, 3, 9):
        for k in range(K):
            drawn = {sampler.slice_pair(rng, k, K, 4) for _ in range(200)}
            assert drawn == {i for i in range(K) if 0 < abs(i - k) <= 4}


def test_a_pair_shares_window_and_flip(breast):
    """One slice is the negative of the other. Ten coins fall alike once in 500."""
    image, tissue = breast
    flips = set()
    for seed in range(10):
        a, b = sampler.pair_views(np.random.default_rng(seed), image, 255 - image, tissue, 112, brightness=0,
                                  contrast=0)
        assert a.shape == b.shape == (112, 112) and np.abs(a.astype(int) + b - 255).max() <= 1
        straight, _ = sampler.pair_views(np.random.default_rng(seed), image, image, tissue, 112, brightness=0,
                                         contrast=0, flip=0)
        flips.add((a == straight).all())
    assert flips == {True, False}
    a, b = sampler.pair_views(np.random.default_rng(0), image, image, tissue, 112)
    assert (a != b).any() and np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98


def test_the_contact_sheet_shows_both_laws(tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'sampler.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and Image.open(tmp_path / 'views.png').width > 900, done.stderr
