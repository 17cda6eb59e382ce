"""vit.py: the official DINOv2 network to the digit, one grey channel without loss."""
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CASES, ROOT

import vit
from vit import ViT

OFFICIAL = {'reg0': dict(registers=0, offset=0.1, antialias=False),
            'reg4': dict(registers=4, offset=0.0, antialias=True)}


def network(seed=0, **how):
    """A small network as an official file can hold it: heads of 64, three channels."""
    torch.manual_seed(seed)
    how = dict(size=56, width=128, depth=3, heads=2, channels=3, layerscale=1.0) | how
    return ViT(**how).eval().requires_grad_(False)


def named(model, prefix, edit=lambda name: name):
    return {prefix + edit(name): weight for name, weight in model.state_dict().items()}


@pytest.mark.parametrize('name', OFFICIAL)
@torch.no_grad()
def test_forward_equals_the_official_code(name):
    """With and without masked patches, at an interpolated size and (reg0) at the trained one."""
    archive = np.load(CASES / 'vit.npz')
    answers = {}
    for key in archive.files:
        variant, size, entry = key.split('/', 2)
        if variant == name:
            answers.setdefault(size, {})[entry] = torch.from_numpy(archive[key])
    model = ViT(width=32, depth=3, heads=4, channels=3, **OFFICIAL[name]).eval()
    model.load_state_dict(answers.pop('state'))
    assert answers
    for size, a in answers.items():
        ours = *model(a['x']), *model(a['x'], a['mask'])
        for got, entry in zip(ours, ('cls', 'patches', 'cls_masked', 'patches_masked')):
            assert (got - a[entry]).abs().max() < 1e-4, (size, entry)


def test_the_base_network_has_the_official_tensors():
    for registers, tensors, values in [(0, 175, 86_580_480), (4, 176, 86_583_552)]:
        with torch.device('meta'):
            state = ViT(**vit.SIZES['base'], channels=3, registers=registers).state_dict()
        assert len(state) == tensors and sum(v.numel() for v in state.values()) == values
    assert {'cls_token', 'pos_embed', 'mask_token', 'register_tokens', 'patch_embed.proj.weight',
            'blocks.11.attn.qkv.weight', 'blocks.0.ls1.gamma', 'blocks.0.mlp.fc2.bias'} <= {*state}


def test_stochastic_depth_keeps_the_mean_and_is_off_in_eval():
    torch.manual_seed(0)
    x = torch.ones(10, 2, 3)
    mean = torch.stack([vit.residual(x, lambda y: y, 0.3) for _ in range(2000)]).mean(0)
    assert (mean - 2).abs().max() < 0.1                     # 6.8 standard errors: sd of one draw is .65
    rows = vit.residual(x, lambda y: y, 0.3)[:, 0, 0]
    assert (rows > 1).sum() == 7 and torch.allclose(rows[rows > 1], torch.tensor(1 + 10 / 7))
    model, y = network(drop_path=0.5), torch.rand(4, 3, 28, 28)
    assert torch.equal(model(y)[0], model(y)[0])


def test_attention_is_what_the_last_block_uses():
    model, x = network(size=42, registers=3), torch.rand(2, 3, 42, 28)
    attn, tokens = model.blocks[2].attn, model.blocks[1](model.blocks[0](model.embed(x)))
    tokens = model.blocks[2].norm1(tokens)
    q, k, v = attn.split(tokens)
    weights = (q @ k.mT / 8).softmax(-1)                    # d = 64
    torch.testing.assert_close(attn.proj((weights @ v).transpose(1, 2).flatten(2)), attn(tokens))
    torch.testing.assert_close(model.attention(x), weights[:, :, 0, 4:].view(2, 2, 3, 2))


def layouts(teacher):
    """The ways in which DINOv2's trainer and its users store one network."""
    beside = {'dino_head.last_layer.weight': torch.rand(3, 3), 'dino_loss.center': torch.rand(3)}
    student = named(network(1), 'backbone.')
    both = named(teacher, 'teacher.backbone.') | named(network(1), 'student.backbone.') | beside

    def chunks(name):                                       # block_chunks, two blocks in each
        return re.sub(r'^blocks\.(\d+)', lambda m: f'blocks.{int(m[1]) // 2}.{m[1]}', name)

    return {'published': named(teacher, ''),
            'teacher': {'teacher': named(teacher, 'backbone.') | beside},
            'and student': {'student': student, 'teacher': named(teacher, 'backbone.'), 'epoch': 3},
            'and model': {'model': named(network(1), ''), 'teacher': named(teacher, 'backbone.')},
            'model': {'model': both, 'iteration': 3},
            'chunks': {'teacher': named(teacher, 'backbone.', chunks)},
            'module': {'teacher': named(teacher, 'module.backbone.') | beside},
            'compiled': {'teacher': named(teacher, 'backbone._orig_mod.')}}


@pytest.mark.parametrize('name', OFFICIAL)
def test_load_reads_every_layout_of_dinov2(name, tmp_path):
    teacher, x = network(**OFFICIAL[name]), torch.rand(2, 3, 42, 70)
    for layout, file in layouts(teacher).items():
        torch.save(file, tmp_path / 'a.pth')
        model = vit.load(tmp_path / 'a.pth', channels=3)
        assert model.config == teacher.config and not model.training, layout
        assert all(map(torch.equal, model(x), teacher(x))), layout


def test_load_reads_the_teacher_of_our_checkpoints(tmp_path):
    teacher, x = network(channels=1, width=96, heads=3), torch.rand(1, 1, 42, 56)
    torch.save({'vit': teacher.config, 'teacher': named(teacher, 'backbone.') | {'head.a': x},
                'student': named(network(1, channels=1), 'backbone.')}, tmp_path / 'ours.pt')
    assert all(map(torch.equal, vit.load(tmp_path / 'ours.pt')(x), teacher(x)))


@pytest.mark.parametrize('imagenet', [True, False])
def test_the_grey_fold_is_exact(imagenet, tmp_path):
    """Of three equal channels, normalised by ImageNet's numbers or, as DBT-DINO, not at all."""
    colour, x = network(**OFFICIAL['reg0']), torch.rand(2, 1, 70, 98)
    torch.save(colour.state_dict(), tmp_path / 'a.pth')
    grey = vit.load(tmp_path / 'a.pth', imagenet=imagenet)
    assert grey.config == colour.config | {'channels': 1}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (vit.IMAGENET_MEAN, vit.IMAGENET_STD))
    for ours, theirs in zip(grey(x), colour((x - mean) / std if imagenet else x.tile(1, 3, 1, 1))):
        assert (ours - theirs).abs().max() < 1e-4


def test_files_of_another_kind_are_refused_by_one_sentence_that_says_which(tmp_path):
    state = network().state_dict()
    mask_token, kernel = state['mask_token'], state['patch_embed.proj.weight']
    for file, kind in [
            (state | {'rope_embed.periods': mask_token}, 'DINOv3'),
            ({name: w for name, w in state.items() if '.ls' not in name}, 'DINO, MAE or another'),
            ({name: w for name, w in state.items() if name != 'mask_token'}, 'a timm file'),
            ({'embeddings.patch_embeddings.projection.weight': kernel}, 'a Hugging Face file'),
            (network(width=96).state_dict(), 'width 96; expected a multiple of 64'),
            ({name.replace('fc1', 'w12'): w for name, w in state.items()}, 'Missing.*fc1'),
            ({'model': named(network(), 'student.backbone.')}, 'no patch_embed.proj'),
            (state | {'mask_token': mask_token * np.nan}, 'not finite, in mask_token')]:
        torch.save(file, tmp_path / 'a.pth')
        with pytest.raises(ValueError, match=rf'^[^\n]*a.pth: no ViT[^\n]*{kind}[^\n]*; give'):
            vit.load(tmp_path / 'a.pth')


def test_damaged_files_are_refused_and_a_checkpoint_cannot_run_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / 'run'), 'w')

    (tmp_path / 'a.txt').write_text('not weights')
    (tmp_path / 'a.safetensors').write_bytes((2).to_bytes(8, 'little') + b'{}')
    torch.save({'vit': {}, 'teacher': Bomb()}, tmp_path / 'bomb.pt')
    torch.save(network().state_dict(), tmp_path / 'bit.pth')
    data = (tmp_path / 'bit.pth').read_bytes()
    (tmp_path / 'bit.pth').write_bytes(data[:99_999] + b'bit' + data[100_002:])
    for name in ('a.txt', 'a.safetensors', 'bomb.pt', 'bit.pth'):
        with pytest.raises(ValueError, match=f'{name}: not a checkpoint, or a damaged one'):
            vit.load(tmp_path / name)
    assert not (tmp_path / 'run').exists()


def test_learning_rates_fall_with_depth_as_in_dinov2():
    with torch.device('meta'):
        model = ViT(**vit.SIZES['base'])
    names = {id(p): name for name, p in model.named_parameters()}
    groups = vit.param_groups(model, lr=2.0, wd=0.5, decay=0.9)
    scale = {names[id(p)]: g['lr_scale'] for g in groups for p in g['params']}
    decayed = {names[id(p)] for g in groups if g['weight_decay'] for p in g['params']}
    assert len(scale) == len(names) and all(g['lr'] == 2.0 * g['lr_scale'] for g in groups)
    for name, value in {'pos_embed': .2542, 'cls_token': .2542, 'patch_embed.proj.weight': .0508,
                        'norm.weight': 1, 'blocks.0.attn.qkv.weight': .2824,
                        'blocks.11.attn.qkv.weight': .9}.items():
        assert scale[name] == pytest.approx(value, abs=1e-4)
    assert {'pos_embed', 'cls_token', 'mask_token', 'blocks.3.mlp.fc1.weight'} <= decayed
    assert not any(name.endswith('bias') or 'norm' in name or 'gamma' in name for name in decayed)


def test_heatmaps_fill_0_to_1_and_the_command_line_draws_them(tmp_path):
    model, image = network(channels=1), np.zeros((80, 60), np.uint8)
    image[20:60, 20:50] = 200
    for size, grid in [(None, (4, 4)), ((84, 56), (6, 4))]:
        for heat in vit.heatmaps(model, image, size):
            assert heat.shape == grid and heat.min() == 0 and heat.max() == 1
    torch.save({'vit': model.config, 'teacher': named(model, 'backbone.')}, tmp_path / 'c.pt')
    np.save(tmp_path / 'a.npy', np.stack([image, image // 2, image]))
    done = subprocess.run([sys.executable, ROOT / 'vit.py', 'a.npy', 'c.pt'], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0 and (tmp_path / 'heatmap.png').exists(), done.stderr
