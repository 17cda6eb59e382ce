"""sampler.py: crops and masks lie on tissue, and without tissue they follow DINOv2's laws."""
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image, ImageEnhance
from scipy import stats

import sampler
import phantom


@pytest.fixture(scope='module')
def breast():
    """A small breast in a large frame, where uniform crops often miss: image uint8, tissue bool (400, 300)."""
    p = phantom.breast(np.random.default_rng(0), height=256, width=160)
    image, tissue = np.zeros((400, 300), np.uint8), np.zeros((400, 300), bool)
    image[70:326, :160], tissue[70:326, :160] = p.volume[0], p.tissue
    return image, tissue


# ---- crops --------------------------------------------------------------------------------------------------------

def test_coverage_is_the_mean_of_the_mask():
    tissue = np.random.default_rng(0).random((20, 30)) < 0.3
    assert sampler.coverage(tissue, (3, 4, 17, 29)) == pytest.approx(tissue[3:17, 4:29].mean())


def test_every_crop_holds_more_than_rho_tissue(breast):
    _, tissue = breast
    rng, relaxed = np.random.default_rng(0), 0
    for i in range(4000):
        rho = (0.2, 0.4, 0.6)[i % 3]
        box, was_relaxed = sampler.crop_box(rng, tissue, (0.06, 0.25), (3 / 4, 4 / 3), rho)
        y0, x0, y1, x1 = box
        assert 0 <= y0 < y1 <= 400 and 0 <= x0 < x1 <= 300 and all(isinstance(v, int) for v in box)
        assert tissue[y0:y1, x0:x1].any()
        relaxed += was_relaxed
        assert was_relaxed or tissue[y0:y1, x0:x1].mean() > rho
    assert relaxed < 0.02 * 4000


def test_rho_is_relaxed_and_counted_where_no_window_reaches_it(breast):
    _, tissue = breast
    rng = np.random.default_rng(0)
    for _ in range(50):
        box, relaxed = sampler.crop_box(rng, tissue, (0.9, 1.0), (3 / 4, 4 / 3), 0.9)
        assert relaxed and sampler.coverage(tissue, box) > 0


def test_without_tissue_the_crop_is_uniform_and_counts_as_relaxed():
    rng = np.random.default_rng(0)
    box, relaxed = sampler.crop_box(rng, np.zeros((50, 40), bool), (0.2, 0.5), (3 / 4, 4 / 3), 0.5)
    assert relaxed and 0 <= box[0] < box[2] <= 50 and 0 <= box[1] < box[3] <= 40


def random_resized_crop(rng, H, W, scale, ratio):
    """torchvision's, written out: ten tries, then the largest window of an allowed ratio; its place uniform here."""
    for _ in range(10):
        area, log_ratio = H * W * rng.uniform(*scale), rng.uniform(math.log(ratio[0]), math.log(ratio[1]))
        w, h = round(math.sqrt(area * math.exp(log_ratio))), round(math.sqrt(area / math.exp(log_ratio)))
        if 0 < w <= W and 0 < h <= H:
            break
    else:
        if W / H < ratio[0]:
            w, h = W, round(W / ratio[0])
        elif W / H > ratio[1]:
            w, h = round(H * ratio[1]), H
        else:
            w, h = W, H
    y, x = rng.integers(H - h + 1), rng.integers(W - w + 1)
    return y, x, y + h, x + w


@pytest.mark.parametrize('H, W', [(120, 90), (96, 48)])
def test_blind_crops_follow_the_law_of_dinov2(H, W):
    """Kolmogorov-Smirnov on six marginals of 4,000 draws each at p > 1e-3: a false alarm once in 170 seeds."""
    scale, ratio = (0.2, 0.9), (3 / 4, 4 / 3)
    rng = np.random.default_rng(1)
    theirs = [random_resized_crop(rng, H, W, scale, ratio) for _ in range(4000)]
    rng = np.random.default_rng(2)
    ours = [sampler.crop_box(rng, np.ones((H, W), bool), scale, ratio, 0.0) for _ in range(4000)]
    assert not any(relaxed for _, relaxed in ours)

    def marginals(boxes):
        y0, x0, y1, x1 = np.array(boxes, float).T
        h, w = y1 - y0, x1 - x0
        return dict(area=h * w, ratio=w / h, top=y0 / (H - h + 1), left=x0 / (W - w + 1), y0=y0, x1=x1)

    a, b = marginals([box for box, _ in ours]), marginals(theirs)
    noise = np.random.default_rng(3)
    for name in a:
        p = stats.ks_2samp(a[name] + 1e-6 * noise.random(4000), b[name] + 1e-6 * noise.random(4000)).pvalue
        assert p > 1e-3, (name, p)


def test_a_narrow_image_is_not_relaxed_for_its_shape():
    for H, W in [(960, 300), (60, 400), (1, 1), (1, 50)]:
        rng = np.random.default_rng(0)
        for _ in range(100):
            (y0, x0, y1, x1), relaxed = sampler.crop_box(rng, np.ones((H, W), bool), (0.5, 1.0), (3 / 4, 4 / 3), 0.5)
            assert not relaxed and 0 <= y0 < y1 <= H and 0 <= x0 < x1 <= W


# ---- views --------------------------------------------------------------------------------------------------------

def test_views_have_the_shapes_of_the_paper(breast):
    image, tissue = breast
    out = sampler.views(np.random.default_rng(0), image, tissue)
    assert {k: (v.shape, v.dtype.kind) for k, v in out.items()} == dict(
        globals=((2, 518, 518), 'u'), locals=((8, 196, 196), 'u'), grids=((2, 37, 37), 'f'), boxes=((10, 4), 'i'),
        relaxed=((10,), 'b'))
    again = sampler.views(np.random.default_rng(0), image, tissue)
    assert all((out[k] == again[k]).all() for k in out)
    assert sampler.views(np.random.default_rng(0), image, tissue, locals=0)['locals'].shape == (0, 196, 196)


def test_grids_are_the_tissue_under_each_patch_of_the_view_flipped_with_it(breast):
    image, tissue = breast
    picture = np.where(tissue, 200, 0).astype(np.uint8)             # a view of this picture shows its own tissue
    for seed in range(8):
        out = sampler.views(np.random.default_rng(seed), picture, tissue, 112, 56, 2, jitter=0, blurs=(0, 0, 0),
                            solarizes=0, rho=0.3)
        for view, grid in zip(out['globals'], out['grids']):
            seen = view.reshape(8, 14, 8, 14).mean((1, 3)) / 200
            assert np.abs(seen - grid).max() < 0.08


def test_ablations_place_windows_by_another_law_but_keep_the_true_grid(breast):
    image, tissue = breast
    out = sampler.views(np.random.default_rng(0), image, tissue, 112, 56, 40, local_scale=(0.05, 0.1), rho=0.5,
                        placement=np.ones_like(tissue), flip=0)
    assert not out['relaxed'].any()
    shares = [sampler.coverage(tissue, box) for box in out['boxes'][2:]]
    assert min(shares) < 0.2
    assert out['grids'][0].mean() == pytest.approx(sampler.coverage(tissue, out['boxes'][0]), abs=0.01)


@pytest.mark.parametrize('side', [14, 98, 518])
def test_cutting_is_bicubic_interpolation_as_pillows(breast, side):
    """One grey level at most on a breast, two on noise, for odd windows anywhere, enlarged and shrunk. What overshoots
    0..255 is clipped in another order, so the noise keeps away from both."""
    noise = np.random.default_rng(side).integers(64, 192, (301, 402), np.uint8)
    for image, levels in ((breast[0][:301], 1), (noise, 2)):
        for y0, x0, y1, x1 in ((0, 0, 301, 300), (7, 3, 290, 298), (7, 3, 290, 98), (9, 11, 40, 40), (5, 6, 6, 7)):
            pillow = Image.fromarray(image[y0:y1, x0:x1]).resize((side, side + 7), Image.Resampling.BICUBIC)
            ours = sampler.cut(image, (y0, x0, y1, x1), (side + 7, side))
            assert ours.dtype == np.uint8 and np.abs(ours.astype(int) - np.asarray(pillow)).max() <= levels


def test_white_letters_on_black_come_out_as_near_to_the_formula_as_pillows():
    """Bicubic interpolation in floating point, clipped once at the end, is the formula."""
    image = np.zeros((900, 700), np.uint8)
    image[:, 200:] = 90
    image[100:160, 20:150:9] = image[100:160:9, 20:150] = 255
    worst = {}
    for name in ('ours', 'pillow'):
        worst[name] = 0
        for box in ((0, 0, 860, 699), (33, 2, 400, 420), (80, 0, 480, 380)):
            y0, x0, y1, x1 = box
            window = image[y0:y1, x0:x1]
            exact = torch.from_numpy(window.astype(np.float64))[None, None]
            exact = F.interpolate(exact, (196, 196), mode='bicubic', antialias=True)[0, 0].clamp(0, 255).numpy()
            view = sampler.cut(image, box, (196, 196)) if name == 'ours' else np.asarray(
                Image.fromarray(window).resize((196, 196), Image.Resampling.BICUBIC))
            worst[name] = max(worst[name], np.abs(view - exact).max())
    assert worst['ours'] < max(worst['pillow'] + 2, 4), worst


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

def literal_patch_mask(rng, grid, m, rho, m_min=4, m_max=None, ratio=(0.3, 1 / 0.3), weight=1.0, eps=1e-3):
    """The rule of 2.3 with every corner scored, as slow as it reads."""
    h, w = grid.shape
    m_max = max(h * w // 2 if m_max is None else m_max, m_min)
    mask, floor, failures = np.zeros((h, w), bool), rho, 0
    while mask.sum() < m:
        c = int(mask.sum())
        area = rng.uniform(min(m_min, m - c), min(m_max, m - c))
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
            if 0 < new <= min(m_max, m - c):
                mask[y:y + bh, x:x + bw], failures = True, 0
                continue
        failures += 1
        floor = max(0.0, floor - rho / 10) if failures % 10 == 0 else floor
    return mask


def half_breast(h=12, w=12):
    y, x = np.mgrid[:h, :w]
    return np.clip(1.4 - np.hypot((y - h / 2) / (0.5 * h), x / (0.8 * w)), 0, 1)


def test_masks_have_exactly_m_patches_for_every_m():
    rng, grid = np.random.default_rng(0), half_breast()
    for m in range(145):
        for g in (grid, np.ones((12, 12)), np.zeros((12, 12))):
            mask = sampler.patch_mask(rng, g, m, 0.5)
            assert mask.dtype == bool and mask.shape == (12, 12) and mask.sum() == m
    for bad in (-1, 145):
        with pytest.raises(ValueError, match='patches to mask'):
            sampler.patch_mask(rng, grid, bad, 0.5)
    with pytest.raises(ValueError, match='eps'):
        sampler.patch_mask(rng, grid, 9, 0.5, eps=0)


def test_masked_patches_lie_on_tissue():
    rng, grid = np.random.default_rng(0), half_breast(37, 37)
    aware = np.mean([grid[sampler.patch_mask(rng, grid, 300, 0.5)].mean() for _ in range(100)])
    blind = np.mean([grid[sampler.patch_mask(rng, np.ones_like(grid), 300, 0.5)].mean() for _ in range(100)])
    assert aware > blind + 0.08
    info = {}
    sampler.patch_mask(rng, grid, 20, 0.5, info=info)
    assert info == {'relaxed': False}
    sampler.patch_mask(rng, grid, 1300, 0.5, info=info)
    assert info == {'relaxed': True}


def test_masks_follow_the_distribution_of_the_written_rule():
    """Per-cell frequencies of 1,500 masks of each sampler: the largest of 144 differences of two binomials stays
    under 4.2 standard deviations except once in 250 seeds."""
    grid, n = half_breast(), 1500
    ours, theirs = (np.mean([f(np.random.default_rng([k, i]), grid, 40, 0.4) for i in range(n)], axis=0)
                    for k, f in enumerate((sampler.patch_mask, literal_patch_mask)))
    p = (ours + theirs) / 2
    assert (np.abs(ours - theirs) / np.sqrt(2 * p * (1 - p) / n + 1e-6)).max() < 4.2


def test_masks_are_random_not_greedy():
    grid = half_breast()
    masks = {sampler.patch_mask(np.random.default_rng(seed), grid, 30, 0.5).tobytes() for seed in range(20)}
    assert len(masks) == 20


# ---- slice pairs --------------------------------------------------------------------------------------------------

def test_slice_pairs_stay_inside_the_volume_and_within_d_max():
    rng = np.random.default_rng(0)
    for K in (2, 3, 9):
        for k in range(K):
            drawn = {sampler.slice_pair(rng, k, K, 4) for _ in range(200)}
            assert drawn == {i for i in range(K) if 0 < abs(i - k) <= 4}
    with pytest.raises(ValueError, match='no neighbour'):
        sampler.slice_pair(rng, 0, 1, 4)


def test_a_pair_shares_window_and_flip(breast):
    image, tissue = breast
    flips = set()
    for seed in range(10):
        a, b = sampler.pair_views(np.random.default_rng(seed), image, 255 - image, tissue, 112, brightness=0,
                                  contrast=0)
        assert a.shape == b.shape == (112, 112) and a.dtype == np.uint8
        assert np.abs(a.astype(int) + b - 255).max() <= 1
        straight, _ = sampler.pair_views(np.random.default_rng(seed), image, image, tissue, 112, brightness=0,
                                         contrast=0, flip=0)
        flips.add((a == straight).all() or not (a == straight[:, ::-1]).all())
    assert flips == {True, False}
    a, b = sampler.pair_views(np.random.default_rng(0), image, image, tissue, 112)
    assert (a != b).any() and np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.98


def test_the_contact_sheet_shows_both_laws(tmp_path):
    done = subprocess.run([sys.executable, ROOT / 'sampler.py'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / 'views.png').width > 900


def test_views_refuse_what_does_not_fit():
    image, tissue = np.zeros((64, 48), np.uint8), np.ones((64, 48), bool)
    for wrong in ((image.astype(np.float32), tissue), (image, tissue[:32])):
        with pytest.raises(ValueError, match='expected uint8 and masks of its shape'):
            sampler.views(np.random.default_rng(0), *wrong)
