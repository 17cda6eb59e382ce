"""The encoder: a Vision Transformer exactly as in DINOv2 (MammoDINO 3.2: ViT-B/14 at 518x518).

An image (B, C, H, W) in [0, 1] becomes a CLS token (B, D) and patch tokens (B, N, D). Parameters carry the names of
the official DINOv2 files, so that `load` reads those and ours alike; any H and W that are multiples of the patch
work, positions are interpolated. Mammograms are grey: one channel, into which the official RGB patch kernel and the
ImageNet mean and standard deviation fold without loss.

B images, C channels, H W pixels, h w patch grid, N = h * w patches, T = 1 + registers + N tokens, D width, n heads,
d = D / n.

Copy this file alone; it imports nothing of this repository.

    $ python vit.py                                   # the table of shapes, 86 M parameters
    $ python vit.py IMAGE CHECKPOINT [OUT.png]        # feature and attention heatmaps, as Fig. 3 of the paper
"""
import math
import os
import re
import sys
import warnings
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

SIZES = {'tiny': dict(width=192, depth=12, heads=3),
         'small': dict(width=384, depth=12, heads=6),
         'base': dict(width=768, depth=12, heads=12)}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- the blocks ---------------------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D). A convolution whose stride is its kernel is one matrix product over patches."""

    def __init__(self, channels, patch, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        """(B, C, H, W) -> (B, N, D). ValueError unless H and W are multiples of the patch."""
        B, C, H, W = x.shape
        p = self.proj.kernel_size[0]
        if H % p or W % p:
            raise ValueError(f'image of {H}x{W} pixels: both sides must be multiples of the patch, {p}')
        x = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)                # (B, h, w, C, p, p)
        return F.linear(x.reshape(B, -1, C * p * p), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x):
        B, T, D = x.shape
        return self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)    # (3, B, n, T, d)

    def forward(self, x):
        q, k, v = self.split(x)
        x = F.scaled_dot_product_attention(q, k, v)                                     # (B, n, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))                                  # (B, T, D)

    def weights(self, x):
        """softmax(q k / sqrt(d)), (B, n, T, T): what `forward` averages the values with."""
        q, k, _ = self.split(x)
        return F.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)


class Mlp(nn.Module):
    """Two layers with GELU between, each token for itself, (B, T, D) -> (B, T, D)."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learnt factor per channel on a branch; DINOv2 starts it near 0, so that a block starts as the identity."""

    def __init__(self, width, init):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth, (B, T, D) -> (B, T, D)."""

    def __init__(self, width, heads, drop_path, layerscale):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = LayerScale(width, layerscale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width, layerscale)

    def forward(self, x):
        drop = self.drop_path if self.training else 0.0
        x = residual(x, lambda x: self.ls1(self.attn(self.norm1(x))), drop)
        return residual(x, lambda x: self.ls2(self.mlp(self.norm2(x))), drop)


def residual(x, branch, drop):
    """x + branch(x). Under stochastic depth, DINOv2's way: only a random subset of the batch goes through the branch,
    whose output is scaled by batch / subset to keep the mean. The others cost no time; under a mask of zeros they
    would."""
    if drop == 0:
        return x + branch(x)
    kept = max(1, int(len(x) * (1 - drop)))
    rows = torch.randperm(len(x), device=x.device)[:kept]
    return x.index_add(0, rows, branch(x[rows]).to(x.dtype), alpha=len(x) / kept)


# ---- the encoder --------------------------------------------------------------------------------------------------

class ViT(nn.Module):
    """`forward(x, mask=None)`: x (B, C, H, W), mask bool (B, N) -> cls (B, D), patches (B, N, D), both after the
    final norm. Masked patches are replaced by the mask token before positions are added (iBOT; MammoDINO 2.3).

    size: side in pixels of the grid that `pos_embed` is learned on; other sizes interpolate it.
    offset, antialias: how it is interpolated. (0, True) is DINOv2 with registers; its files without were trained with
    (0.1, False), factors (h + 0.1) / grid instead of sizes, so that rounding never loses a row.
    drop_path: stochastic depth, the same at every block. layerscale: initial gamma, DINOv2's 1e-5.
    """

    def __init__(self, size=518, patch=14, width=768, depth=12, heads=12, channels=1, registers=0, drop_path=0.0,
                 offset=0.0, antialias=True, layerscale=1e-5):
        super().__init__()
        if size % patch or width % heads:
            raise ValueError(f'size {size} must be a multiple of patch {patch}, width {width} of heads {heads}')
        self.config = dict(size=size, patch=patch, width=width, depth=depth, heads=heads, channels=channels,
                           registers=registers, offset=offset, antialias=antialias)
        self.patch, self.grid, self.offset, self.antialias = patch, size // patch, offset, antialias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = PatchEmbed(channels, patch, width)
        self.blocks = nn.ModuleList(Block(width, heads, drop_path, layerscale) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._init()

    def _init(self):
        """DINOv2's: truncated normals of deviation 0.02, CLS and registers almost zero, the mask token zero, the patch
        kernel as PyTorch makes that of a convolution."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def positions(self, h, w):
        """pos_embed for a grid of h x w patches, (1, 1 + h * w, D): bicubic, in fp32; CLS keeps its own."""
        if h == w == self.grid:
            return self.pos_embed
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if torch.are_deterministic_algorithms_enabled():    # on GPUs the gradient of interpolate adds in any order
            # interpolation is linear: resized unit images are its matrix
            impulses = torch.eye(self.grid ** 2, device=grid.device).view(1, -1, self.grid, self.grid)
            with torch.autocast(grid.device.type, enabled=False):
                grid = self.resized(impulses, h, w).flatten(2).mT @ grid.float()        # (1, h w, D)
        else:
            grid = grid.float().reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)    # (1, D, grid, grid)
            grid = self.resized(grid, h, w).flatten(2).transpose(1, 2)
        return torch.cat([cls, grid.to(cls.dtype)], dim=1)

    def resized(self, grid, h, w):
        """(1, C, grid, grid) -> (1, C, h, w)"""
        if self.offset:                                     # the factor itself becomes the step between samples
            scale = ((h + self.offset) / self.grid, (w + self.offset) / self.grid)
            grid = F.interpolate(grid, scale_factor=scale, mode='bicubic', antialias=self.antialias)
        else:
            grid = F.interpolate(grid, size=(h, w), mode='bicubic', antialias=self.antialias)
        assert grid.shape[-2:] == (h, w), f'interpolated to {tuple(grid.shape[-2:])}, wanted {(h, w)}'
        return grid

    def embed(self, x, mask=None):
        """Image -> tokens (B, T, D) in the order CLS, registers, patches. Registers have no position."""
        h, w = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        x = self.patch_embed(x)                                                         # (B, N, D)
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions(h, w)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x

    def forward(self, x, mask=None):
        x = self.embed(x, mask)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1 + self.config['registers']:]

    @torch.no_grad()
    def attention(self, x):
        """What CLS looks at in the last block: (B, n, h, w), each head's weights over the patches."""
        h, w = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        x = self.embed(x)
        for block in self.blocks[:-1]:
            x = block(x)
        weights = self.blocks[-1].attn.weights(self.blocks[-1].norm1(x))                # (B, n, T, T)
        return weights[:, :, 0, 1 + self.config['registers']:].unflatten(-1, (h, w))


# ---- weights from files, learning rates by depth ------------------------------------------------------------------

def read(path):
    """The dict in a file of torch.save: tensors, numbers and text; nothing in it is run.

    torch.save compresses nothing, so a file whose members declare more bytes than it has is refused before they are
    read. Raises OSError where there is no file to read, ValueError where it holds something else.
    """
    try:
        with zipfile.ZipFile(path) as members:
            if sum(member.file_size for member in members.infolist()) > os.path.getsize(path):
                raise ValueError('members that unpack to more than the file')
            if members.testzip():                           # torch.load checks no sums
                raise ValueError('bytes that have changed')
        with warnings.catch_warnings(action='ignore'):      # what is odd is refused, not remarked upon
            found = torch.load(path, map_location='cpu', weights_only=True)
        if not isinstance(found, dict) or _bytes(found) > os.path.getsize(path):
            raise ValueError('not a dict of as many bytes as the file has')
    except Exception as error:
        if isinstance(error, OSError) and error.errno:      # the system's, not the archive's
            raise OSError(f'{path}: {error.strerror}') from None
        raise ValueError(f'{path}: not a checkpoint, or a damaged one ({type(error).__name__}); expected a file of '
                         'torch.save, 1.6 or later, that holds a dict of tensors') from error
    return found


def _bytes(found):
    """Of all tensors in nested dicts and lists. ValueError for a tensor expanded from fewer numbers than it has,
    TypeError where there is something else than tensors, numbers and text."""
    total, pending, seen = 0, [found], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if value.nbytes > storage.nbytes():
                raise ValueError('one number that stands for many')
            total += storage.nbytes() if storage.data_ptr() not in seen else 0
            seen.add(storage.data_ptr())
        elif isinstance(value, dict):
            pending += [*value, *value.values()]
        elif isinstance(value, (list, tuple)):
            pending += value
        elif not isinstance(value, (str, int, float, type(None))):
            raise TypeError(type(value).__name__)
    return total


def load(path, channels=1):
    """A ViT in eval mode from the official DINOv2 file (with or without registers) or from one of our checkpoints,
    of which the teacher is taken.

    channels=1 folds an RGB kernel: the grey network fed x in [0, 1] equals the colour network fed three equal
    channels (x - mean) / std of ImageNet. channels=3 keeps the official network as it is.
    Raises OSError and ValueError as `read`, and ValueError where no such network is in the file or its weights are
    not finite.
    """
    file = read(path)
    try:
        ours = 'vit' in file
        state = {k.removeprefix('backbone.'): v for k, v in file['teacher'].items() if k.startswith('backbone.')} \
            if ours else file
        config = dict(file['vit']) if ours else _official_config(state)
        if channels == 1 and config['channels'] == 3:
            state, config['channels'] = fold_rgb(state), 1
        _check_config(config, state)
        if not all(weight.is_floating_point() for weight in state.values()):
            raise TypeError('weights that are not real numbers')
        with torch.device('meta'):                          # shapes cost no memory, whatever the file says they are
            model = ViT(**config)
        model.load_state_dict(state, assign=True)
        model.float()
    except Exception as error:
        raise ValueError(f'{path}: no ViT in it ({type(error).__name__}); expected the official DINOv2 ViT file or a '
                         'checkpoint of pretrain.py') from error
    if config['channels'] != channels:
        raise ValueError(f"{path}: its encoder takes {config['channels']} channels, not {channels}")
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise ValueError(f'{path}: weights that are not finite, in {broken[0]} and {len(broken) - 1} more; the run '
                         'that wrote them had diverged')
    return model.eval()


def _check_config(config, state):
    """Of the types and in the ranges that a network can be built and run with."""
    counts = [config[name] for name in ('size', 'patch', 'width', 'depth', 'heads', 'channels')]
    if not all(type(n) is int and n > 0 for n in counts) or config['depth'] > len(state) \
            or type(config['registers']) is not int or config['registers'] < 0 \
            or type(config['antialias']) is not bool or not 0 <= float(config['offset']) < 1:
        raise ValueError('no configuration of a ViT')


def _official_config(state):
    """The shape of an official network, read off its tensors. DINOv2's heads are 64 wide."""
    width, channels, patch, _ = state['patch_embed.proj.weight'].shape
    depth = 1 + max(int(k.split('.')[1]) for k in state if k.startswith('blocks.'))
    registers = state['register_tokens'].shape[1] if 'register_tokens' in state else 0
    size = math.isqrt(state['pos_embed'].shape[1] - 1) * patch
    return dict(size=size, patch=patch, width=width, depth=depth, heads=width // 64, channels=channels,
                registers=registers, offset=0.0 if registers else 0.1, antialias=bool(registers))


def fold_rgb(state):
    """sum_c W_c (x - mean_c) / std_c + b, written as one grey kernel: W = sum_c W_c / std_c, b absorbs the means."""
    kernel = state['patch_embed.proj.weight'].double()                                  # (D, 3, p, p)
    std = torch.tensor(IMAGENET_STD, dtype=torch.double).view(1, 3, 1, 1)
    mean = torch.tensor(IMAGENET_MEAN, dtype=torch.double).view(1, 3, 1, 1)
    bias = state['patch_embed.proj.bias'].double() - (kernel * mean / std).sum((1, 2, 3))
    return state | {'patch_embed.proj.weight': (kernel / std).sum(1, keepdim=True).float(),
                    'patch_embed.proj.bias': bias.float()}


def param_groups(model, lr, wd, decay=1.0):
    """Optimizer groups as DINOv2 makes them. Each has `lr`, `weight_decay`, and the factors that schedules multiply
    with: `lr_scale`, `wd_scale`; `last_layer` marks the prototypes, which DINOv2 freezes at first.

    The learning rate falls by `decay` for each block below the top, and to a fifth of that for the patch kernel.
    Biases, norms and LayerScale are not decayed; tokens and positions are. Parameters of no encoder (a head) get the
    full rate.
    """
    top = max([int(i) for name, _ in model.named_parameters() for i in re.findall(r'blocks\.(\d+)\.', name)] or [-1])
    groups = {}
    for name, parameter in model.named_parameters():
        block = re.search(r'blocks\.(\d+)\.', name)
        bottom = re.search(r'(pos_embed|patch_embed|cls_token|mask_token|register_tokens)', name)
        below = top + 1 - int(block[1]) if block else top + 2 if bottom else 0
        lr_scale = decay ** below * (0.2 if 'patch_embed' in name else 1.0)
        wd_scale = 0.0 if name.endswith('bias') or 'norm' in name or 'gamma' in name else 1.0
        key = lr_scale, wd_scale, 'last_layer' in name
        groups.setdefault(key, []).append(parameter)
    return [dict(params=parameters, lr=lr * lr_scale, weight_decay=wd * wd_scale, lr_scale=lr_scale,
                 wd_scale=wd_scale, last_layer=last) for (lr_scale, wd_scale, last), parameters in groups.items()]


# ---- pictures (MammoDINO Fig. 3) ----------------------------------------------------------------------------------

@torch.no_grad()
def heatmaps(model, image, size=None):
    """image uint8 (H, W) -> feature, attention: two float (h, w) maps in 0..1.

    feature: first principal component of the patch tokens, signed so that bright image regions are bright.
    attention: CLS weights of the last block, mean over heads.
    size: pixels (height, width) to resize to, the square the model was trained on by default.
    """
    height, width = size or (model.grid * model.patch,) * 2
    grey = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    x = torch.from_numpy(grey).view(1, 1, height, width).float() / 255
    _, patches = model(x)                                                               # (1, N, D)
    centred = patches[0] - patches[0].mean(0)
    component = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]          # (N,)
    brightness = F.avg_pool2d(x, model.patch)[0, 0]                                     # (h, w)
    component = component.view_as(brightness)
    component = component * torch.sign((component * (brightness - brightness.mean())).sum())
    return [((m - m.min()) / (m.max() - m.min()).clamp_min(1e-12)).numpy()
            for m in (component, model.attention(x)[0].mean(0))]


def overlay(image, heat):
    """image uint8 (H, W), heat float (h, w) in 0..1 -> uint8 (H, W, 3): black-red-yellow heat over the grey image."""
    heat = np.asarray(Image.fromarray(np.uint8(255 * heat)).resize(image.shape[::-1], Image.Resampling.BICUBIC)) / 255
    colour = np.stack([np.clip(2 * heat, 0, 1), np.clip(2 * heat - 1, 0, 1), np.zeros_like(heat)], axis=-1)
    alpha = 0.65 * heat[..., None]
    return np.uint8((1 - alpha) * image[..., None] + alpha * 255 * colour)


def _load_grey(path):
    """A prepared image, 8 bit, any format Pillow opens or .npy; of a volume the middle slice. For DICOM see mask.py."""
    try:
        with warnings.catch_warnings(action='ignore'):
            if path.endswith('.npy'):
                grey = np.load(path, mmap_mode='r', allow_pickle=False)
                grey = np.array(grey[len(grey) // 2] if grey.ndim == 3 else grey)
            else:
                picture = Image.open(path)
                grey = np.array(picture.convert('L') if picture.mode in ('RGB', 'RGBA', 'LA', 'P') else picture)
    except Exception as error:
        reason = getattr(error, 'strerror', None) or f'not an image ({type(error).__name__})'
        raise ValueError(f'{path}: {reason}') from error
    if grey.ndim != 2 or grey.dtype != np.uint8:
        raise ValueError(f'{path}: {grey.dtype} of shape {grey.shape}; expected 8-bit grey, as '
                         '`python mask.py prepare` writes it')
    return grey


def _main(arguments):
    if len(arguments) in (2, 3):
        picture, checkpoint, out = (arguments + ['heatmap.png'])[:3]
        grey = _load_grey(picture)
        panels = [np.repeat(grey[..., None], 3, -1)] + [overlay(grey, m) for m in heatmaps(load(checkpoint), grey)]
        Image.fromarray(np.concatenate(panels, axis=1)).save(out)
        print(f'-> {out}: image, feature, attention')
    elif not arguments:
        base = ViT(**SIZES['base'])
        for side in (518, 196, 98):
            cls, patches = base(torch.rand(1, 1, side, side))
            print(f'{side:4d} x {side:<4d} -> cls {tuple(cls.shape)}  patches {tuple(patches.shape)}')
        print(f'{sum(p.numel() for p in base.parameters()):,} parameters')
    else:
        raise ValueError('expected no argument, or IMAGE CHECKPOINT [OUT.png]')


if __name__ == '__main__':
    if {'-h', '--help'} & {*sys.argv}:
        sys.exit(print(__doc__))
    try:
        _main(sys.argv[1:])
    except (ValueError, OSError) as problem:
        sys.exit(f'vit.py: {problem}')
