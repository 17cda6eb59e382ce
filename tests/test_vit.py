"""vit.py: the official DINOv2 network to the digit, one grey channel without loss."""
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import CASES, ROOT
from PIL import Image
from torch import nn

import vit
from vit import ViT

OFFICIAL = {'reg0': dict(registers=0, offset=0.1, antialias=False),
            'reg4': dict(registers=4, offset=0.0, antialias=True)}


def case(name):
    """The official network's weights (width 32, depth 3, heads 4) in ours, and its answers by image size."""
    archive = np.load(CASES / 'vit.npz')
    state = {k.split('/', 2)[2]: torch.from_numpy(archive[k]) for k in archive.files if k.startswith(f'{name}/state/')}
    model = ViT(width=32, depth=3, heads=4, channels=3, **OFFICIAL[name])
    model.load_state_dict(state)
    answers = {}
    for key in archive.files:
        variant, size, entry = key.split('/', 2)
        if variant == name and size != 'state':
            answers.setdefault(size, {})[entry] = torch.from_numpy(archive[key])
    return model.eval(), answers


@pytest.mark.parametrize('name', OFFICIAL)
@torch.no_grad()
def test_forward_equals_the_official_code(name):
    model, answers = case(name)
    for size, a in answers.items():
        cls, patches = model(a['x'])
        cls_masked, patches_masked = model(a['x'], a['mask'])
        for ours, theirs in [(cls, 'cls'), (patches, 'patches'), (cls_masked, 'cls_masked'),
                             (patches_masked, 'patches_masked')]:
            assert (ours - a[theirs]).abs().max() < 1e-4, (size, theirs)


def test_the_base_network_has_the_official_tensors():
    for registers, tensors, values in [(0, 175, 86_580_480), (4, 176, 86_583_552)]:
        with torch.device('meta'):
            state = ViT(**vit.SIZES['base'], channels=3, registers=registers).state_dict()
        assert len(state) == tensors and sum(v.numel() for v in state.values()) == values
    assert {'cls_token', 'pos_embed', 'mask_token', 'register_tokens', 'patch_embed.proj.weight', 'norm.bias',
            'blocks.11.attn.qkv.weight', 'blocks.0.ls1.gamma', 'blocks.0.mlp.fc2.bias'} <= set(state)


@torch.no_grad()
def test_the_grey_fold_is_exact():
    model, answers = case('reg4')
    grey = ViT(width=32, depth=3, heads=4, **OFFICIAL['reg4'])
    grey.load_state_dict(vit.fold_rgb(model.state_dict()))
    x = torch.rand(2, 1, 70, 98)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    for ours, theirs in zip(grey.eval()(x), model((x.expand(-1, 3, -1, -1) - mean) / std)):
        assert (ours - theirs).abs().max() < 1e-4


@torch.no_grad()
def test_load_reads_official_files_and_our_own_teacher(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(1, 1, 42, 56)
    official = ViT(size=56, width=128, depth=2, heads=2, channels=3, offset=0.1, antialias=False).eval()
    torch.save(official.state_dict(), tmp_path / 'official.pth')
    grey = vit.load(tmp_path / 'official.pth')
    assert grey.config == official.config | {'channels': 1}
    assert not grey.training and vit.load(tmp_path / 'official.pth', channels=3).config == official.config

    teacher = ViT(size=56, width=96, depth=1, heads=3).eval()
    checkpoint = {'vit': teacher.config, 'teacher': {f'backbone.{k}': v for k, v in teacher.state_dict().items()}}
    torch.save(checkpoint, tmp_path / 'ours.pt')
    assert torch.equal(vit.load(tmp_path / 'ours.pt')(x)[0], teacher(x)[0])


def test_load_says_what_is_wrong(tmp_path):
    (tmp_path / 'text.pth').write_text('not weights')
    torch.save({'a': 1}, tmp_path / 'other.pth')
    torch.save(nn.Linear(2, 2), tmp_path / 'pickled.pth')
    for name in ('text.pth', 'other.pth', 'pickled.pth'):
        with pytest.raises(ValueError, match=name):
            vit.load(tmp_path / name)
    with pytest.raises(OSError):
        vit.load(tmp_path / 'absent.pth')


class Bomb:
    """What a checkpoint could do to whoever unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({'vit': {}, 'teacher': Bomb(tmp_path / 'run')}, tmp_path / 'bomb.pt')
    with pytest.raises(ValueError, match='bomb.pt: not a checkpoint.*UnpicklingError'):
        vit.load(tmp_path / 'bomb.pt')
    assert not (tmp_path / 'run').exists()


def test_a_checkpoint_takes_no_more_memory_than_its_file_has_bytes(tmp_path):
    """Members that inflate, one number that stands for a billion, and shapes that are only claimed."""
    model = vit.ViT(size=28, width=16, depth=1, heads=2)
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    plain, packed = tmp_path / 'plain.pt', tmp_path / 'packed.pt'
    torch.save({'vit': model.config, 'teacher': state, 'zeros': torch.zeros(100_000)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match='packed.pt: not a checkpoint'):
        vit.read(packed)
    vit.load(plain)
    wide = torch.zeros(1).expand(1, 5, 10 ** 9)
    for lie in ({'teacher': state | {'backbone.pos_embed': wide}}, {'vit': model.config | {'width': 2 * 10 ** 9}},
                {'vit': model.config | {'depth': 10 ** 9}}):
        torch.save({'vit': model.config, 'teacher': state} | lie, plain)
        with pytest.raises(ValueError, match='plain.pt: no'):
            vit.load(plain)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = vit.ViT(size=28, width=16, depth=1, heads=2)
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    state['backbone.norm.bias'][3] = float('nan')
    torch.save({'vit': model.config, 'teacher': state}, tmp_path / 'nan.pt')
    with pytest.raises(ValueError, match='nan.pt: weights that are not finite, in norm.bias'):
        vit.load(tmp_path / 'nan.pt')


def test_learning_rates_fall_with_depth_as_in_dinov2():
    with torch.device('meta'):
        model = ViT(**vit.SIZES['base'])
    names = {id(p): name for name, p in model.named_parameters()}
    groups = vit.param_groups(model, lr=2.0, wd=0.5, decay=0.9)
    scale = {names[id(p)]: g['lr_scale'] for g in groups for p in g['params']}
    decayed = {names[id(p)] for g in groups if g['weight_decay'] for p in g['params']}
    assert len(scale) == len(names)
    for name, value in {'pos_embed': .2542, 'cls_token': .2542, 'patch_embed.proj.weight': .0508, 'norm.weight': 1,
                        'blocks.0.attn.qkv.weight': .2824, 'blocks.11.attn.qkv.weight': .9}.items():
        assert scale[name] == pytest.approx(value, abs=1e-4)
    assert {'pos_embed', 'cls_token', 'mask_token', 'blocks.3.mlp.fc1.weight'} <= decayed
    assert not any(n.endswith('bias') or 'norm' in n or 'gamma' in n for n in decayed)
    assert all(g['lr'] == 2.0 * g['lr_scale'] for g in groups)


def test_stochastic_depth_keeps_the_mean_and_is_off_in_eval():
    torch.manual_seed(0)
    x = torch.ones(10, 2, 3)
    mean = torch.stack([vit.residual(x, lambda y: y, 0.3) for _ in range(2000)]).mean(0)
    assert (mean - 2).abs().max() < 0.1         # 6.8 standard errors: sd of one draw is .65
    rows = vit.residual(x, lambda y: y, 0.3)[:, 0, 0]
    assert (rows > 1).sum() == 7 and torch.allclose(rows[rows > 1], torch.tensor(1 + 10 / 7))
    model = ViT(size=28, width=32, depth=2, heads=2, drop_path=0.5).eval()
    y = torch.rand(4, 1, 28, 28)
    assert torch.equal(model(y)[0], model(y)[0])


@torch.no_grad()
def test_attention_is_what_the_last_block_uses():
    model = ViT(size=42, width=32, depth=2, heads=2, registers=3).eval()
    x = torch.rand(2, 1, 42, 28)
    weights = model.attention(x)
    assert weights.shape == (2, 2, 3, 2) and (weights > 0).all() and (weights.sum((-2, -1)) < 1).all()
    tokens = model.blocks[1].norm1(model.blocks[0](model.embed(x)))
    attention = model.blocks[1].attn
    _, _, v = attention.split(tokens)
    assert torch.allclose(attention.proj((attention.weights(tokens) @ v).transpose(1, 2).flatten(2)),
                          attention(tokens), atol=1e-6)


@pytest.mark.parametrize('how', OFFICIAL.values())
def test_deterministic_positions_are_the_same_positions(how):
    """As a product with what interpolation does to single impulses: the same values and the same gradient."""
    model = ViT(size=84, width=32, depth=1, heads=2, **how)
    plain = model.positions(3, 8)
    plain.square().sum().backward()
    gradient, model.pos_embed.grad = model.pos_embed.grad, None
    torch.use_deterministic_algorithms(True)
    try:
        again = model.positions(3, 8)
        again.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.pos_embed.grad, gradient, atol=1e-6, rtol=1e-5)


def test_sides_must_be_multiples_of_the_patch():
    with pytest.raises(ValueError, match='multiples of the patch'):
        ViT(size=28, width=32, depth=1, heads=2)(torch.rand(1, 1, 30, 28))


def test_heatmaps_and_the_command_line(tmp_path):
    model = ViT(size=56, width=32, depth=2, heads=2).eval()
    image = np.zeros((80, 60), np.uint8)
    image[20:60, 20:50] = 200
    for size, grid in [(None, (4, 4)), ((84, 56), (6, 4))]:
        for heat in vit.heatmaps(model, image, size):
            assert heat.shape == grid and heat.min() == 0 and heat.max() == 1
    assert vit.overlay(image, heat).shape == (80, 60, 3)
    torch.save({'vit': model.config, 'teacher': {f'backbone.{k}': v for k, v in model.state_dict().items()}},
               tmp_path / 'c.pt')
    np.save(tmp_path / 'a.npy', image)
    done = subprocess.run([sys.executable, ROOT / 'vit.py', 'a.npy', 'c.pt'], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and (tmp_path / 'heatmap.png').exists(), done.stderr


def test_a_colour_picture_is_read_as_grey_and_of_a_volume_the_middle_slice(tmp_path):
    grey = np.random.default_rng(0).integers(0, 255, (20, 30), np.uint8)
    Image.fromarray(np.repeat(grey[..., None], 3, axis=2)).save(tmp_path / 'rgb.png')
    np.save(tmp_path / 'volume.npy', np.stack([grey // 2, grey, grey // 3]))
    for name in ('rgb.png', 'volume.npy'):
        assert (vit._load_grey(str(tmp_path / name)) == grey).all(), name
