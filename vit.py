"""The encoder: the Vision Transformer of DINOv2, for grey images (MammoDINO 3.2: ViT-B/14 at 518x518).

Images (B, C, H, W) in [0, 1] become CLS tokens (B, D) and patch tokens (B, N, D); H and W are any
multiples of the patch. `load` reads the official DINOv2 files, whose parameter names are kept.

B images, C channels, H W pixels, p patch side, h w patch grid, N = h*w patches, D width,
T = 1 + registers + N tokens, n heads, d = D/n head size.

Copy this file alone; it imports nothing of this repository (to draw an IMAGE, copy images.py too).

    $ python vit.py                                # the table of shapes, 86 M parameters
    $ python vit.py IMAGE CHECKPOINT [OUT.png]     # feature and attention heatmaps, as in Fig. 3
"""
import math
import re
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

SIZES = {'base': dict(width=768, depth=12, heads=12),       # the paper's; then ViT-S and ViT-Ti
         'small': dict(width=384, depth=12, heads=6),
         'tiny': dict(width=192, depth=12, heads=3),
         'demo': dict(width=128, depth=4, heads=4)}         # of pretrain.py --small
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- the encoder ------------------------------------------------------------------------------

class ViT(nn.Module):
    """The network of DINOv2. `size`: side in pixels of the square that `pos_embed` is made for.
    `offset`, `antialias`: how positions are interpolated; a network keeps what it was trained with.
    DINOv2 used (0.1, False), and (0, True) with registers, as our own networks do.
    `drop_path`: probability of stochastic depth, the same in every block. `layerscale`: initial gamma."""

    def __init__(self, size=518, patch=14, width=768, depth=12, heads=12, channels=1, registers=0,
                 drop_path=0.0, offset=0.0, antialias=True, layerscale=1e-5):
        super().__init__()
        if size % patch or width % heads:
            raise ValueError(f'size {size}, width {width}: give multiples of {patch=}, {heads=}')
        # What checkpoints store; drop_path and layerscale matter in training only.
        self.config = dict(size=size, patch=patch, width=width, depth=depth, heads=heads,
                           channels=channels, registers=registers, offset=offset,
                           antialias=antialias)
        self.patch, self.grid, self.offset, self.antialias = patch, size // patch, offset, antialias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        # The dicts here and in Block keep the parameter names of DINOv2's files.
        self.patch_embed = nn.ModuleDict({'proj': nn.Conv2d(channels, width, patch, patch)})
        self.blocks = nn.ModuleList(Block(width, heads, drop_path, layerscale)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # DINOv2's initial values; the patch kernel keeps PyTorch's for a convolution
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if registers:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x, mask=None):
        """x (B, C, H, W), mask bool (B, N) -> CLS (B, D), patches (B, N, D), after the norm."""
        x = self.embed(x, mask)                                             # (B, T, D)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        # registers are scratch space of the blocks: nothing reads them afterwards
        return x[:, 0], x[:, 1 + self.config['registers']:]                 # (B, D), (B, N, D)

    def embed(self, x, mask=None):
        """Image -> tokens (B, T, D) in the order CLS, registers, patches."""
        B, C, H, W = x.shape
        p, h, w = self.patch, H // self.patch, W // self.patch
        if H % p or W % p:
            raise ValueError(f'image of {H}x{W} pixels: expected multiples of the patch, {p}')
        # Usually one calls proj(x). As stride and kernel are equal, it is one matrix product: faster.
        x = x.view(B, C, h, p, w, p).permute(0, 2, 4, 1, 3, 5)              # (B, h, w, C, p, p)
        proj = self.patch_embed['proj']
        x = F.linear(x.reshape(B, h * w, -1), proj.weight.flatten(1), proj.bias)    # (B, N, D)
        # Masked before positions are added, so the network sees where a hidden patch lies (iBOT).
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1) + self.positions(h, w)
        # registers have no position, so they are inserted last: (B, 1 + N, D) becomes (B, T, D)
        if self.register_tokens is not None:
            x = torch.cat([x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]], dim=1)
        return x

    def positions(self, h, w):
        """pos_embed for h x w patches, (1, 1 + N, D), bicubic and in fp32 where the grid differs."""
        if h == w == self.grid:
            return self.pos_embed
        cls, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:].float()
        grid = grid.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)    # (1, D, grid, grid)
        # DINOv2 without registers gave factors, (h + 0.1) / grid; PyTorch spaces its samples by them.
        factors = [(length + self.offset) / self.grid for length in (h, w)]
        target = dict(scale_factor=factors) if self.offset else dict(size=(h, w))
        grid = F.interpolate(grid, **target, mode='bicubic', antialias=self.antialias)
        return torch.cat([cls, grid.flatten(2).mT.to(cls.dtype)], dim=1)    # (1, 1 + N, D)

    @torch.no_grad()
    def attention(self, x):
        """Attention weights of CLS over the patches in the last block, (B, n, h, w)."""
        h, w = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        *blocks, last = self.blocks
        x = self.embed(x)                                                   # (B, T, D)
        for block in blocks:
            x = block(x)
        q, k, _ = last.attn.split(last.norm1(x))                            # (B, n, T, d) each
        weights = F.softmax(q[:, :, :1] @ k.mT / math.sqrt(q.shape[-1]), dim=-1)    # (B, n, 1, T)
        return weights[:, :, 0, 1 + self.config['registers']:].unflatten(-1, (h, w))


class Block(nn.Module):
    """x + gamma1 attn(norm1(x)), then x + gamma2 mlp(norm2(x)), (B, T, D) -> (B, T, D)."""

    def __init__(self, width, heads, drop_path, layerscale):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        # LayerScale, a factor per channel: it starts near 0, so that a block starts as the identity
        self.ls1 = nn.ParameterDict({'gamma': torch.full((width,), layerscale)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, 4 * width), gelu=nn.GELU(),
                                             fc2=nn.Linear(4 * width, width)))
        self.ls2 = nn.ParameterDict({'gamma': torch.full((width,), layerscale)})

    def forward(self, x):
        drop = self.drop_path if self.training else 0.0
        x = residual(x, lambda y: self.attn(self.norm1(y)) * self.ls1['gamma'], drop)
        return residual(x, lambda y: self.mlp(self.norm2(y)) * self.ls2['gamma'], drop)


def residual(x, branch, drop):
    """x + branch(x). Stochastic depth adds B/kept * branch(x) to `kept` random samples of B only.
    As in DINOv2, the others are not computed; timm's DropPath would multiply them by zero."""
    B = len(x)
    # A lone sample is never skipped; torch.compile (2.13) fails on it.
    if drop == 0 or B == 1:
        return x + branch(x)
    kept = max(1, int(B * (1 - drop)))
    # Drawn on the device of x, so that a GPU does not wait for the CPU.
    rows = torch.randperm(B, device=x.device)[:kept]                        # (kept,)
    return x.index_add(0, rows, branch(x[rows]).to(x.dtype), alpha=B / kept)


class Attention(nn.Module):
    """proj(softmax(q k^T / sqrt(d)) v) in n heads, (B, T, D) -> (B, T, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def split(self, x):
        """-> queries, keys and values, (B, n, T, d) each"""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))                # (B, T, 3, n, d)
        return qkv.permute(2, 0, 3, 1, 4)                                   # (3, B, n, T, d)

    def forward(self, x):
        q, k, v = self.split(x)
        x = F.scaled_dot_product_attention(q, k, v)                         # (B, n, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))                      # (B, T, D)


# ---- weights from files -----------------------------------------------------------------------

def load(path, channels=1, imagenet=True):
    """A ViT in eval mode from a file that DINOv2 publishes, a checkpoint of its trainer (DBT-DINO, arXiv
    2512.13608, publishes one) or of pretrain.py; of teacher and student, the teacher.

    channels=1 folds an RGB kernel into a grey one, channels=3 keeps it. `imagenet`: the network was fed
    images normalised by ImageNet's mean and deviation; False for [0, 1], as DBT-DINO was. Raises OSError
    where there is no such file, ValueError that says what kind of file it is instead."""
    file = read(path)
    try:
        state = encoder_state(file)
        config = file['vit'] if 'vit' in file else official_config(state)
        if channels == 1 and config['channels'] == 3:
            state = fold_rgb(state, imagenet)
        # on `meta` nothing is allocated or drawn; the tensors of the file become the parameters
        with torch.device('meta'):
            model = ViT(**config | {'channels': channels})
        model.load_state_dict(state, assign=True)
        for name, weight in model.float().named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f'weights that are not finite, in {name}')
    except Exception as error:
        reason = ' '.join(str(error).split())[:250]         # load_state_dict lists every key
        raise ValueError(f'{path}: no ViT in it that fits ({reason}); give a .pth of DINOv2, '
                         'a checkpoint of its trainer, or one of pretrain.py') from error
    return model.eval()


def read(path):
    """The dict in a file of torch.save: tensors, numbers and text. No code in it is ever run.
    OSError where the system cannot read the file, ValueError where it holds something else."""
    with open(path, 'rb') as file:
        start = file.read(9)
    try:
        if zipfile.ZipFile(path).testzip():                 # torch.load compares no checksums
            raise ValueError('bytes have changed')
        return dict(torch.load(path, map_location='cpu', weights_only=True))
    except Exception as error:
        kind = 'a safetensors file' if start[8:] == b'{' else type(error).__name__  # 8 bytes, JSON
        raise ValueError(f'{path}: not a checkpoint, or a damaged one ({kind}); give a file of '
                         'torch.save (1.6 or later) that holds a dict of tensors') from error


def encoder_state(file):
    """{DINOv2's name: tensor} of the encoder. ValueError says whose names they are otherwise."""
    state = file.get('teacher', file.get('model', file))
    # drop `module.` (DDP), `_orig_mod.` (torch.compile), `teacher.` (beside `student.`)
    state = {re.sub(r'\b(module|_orig_mod|teacher)\.', '', k): v for k, v in state.items()}
    if any(k.startswith('backbone.') for k in state):       # beside it lie heads and the student
        state = {k[len('backbone.'):]: v for k, v in state.items() if k.startswith('backbone.')}
    # with block_chunks, blocks.CHUNK.INDEX.…: INDEX counts on over the chunks
    state = {re.sub(r'^blocks\.\d+\.(\d+)', r'blocks.\1', k): v for k, v in state.items()}
    names = ' '.join(state)
    for matches, kind in (('rope_embed' in names, 'DINOv3, another network'),
                          ('patch_embeddings' in names, 'a Hugging Face file, with other names'),
                          ('patch_embed.proj.weight' not in state, 'no patch_embed.proj.weight'),
                          ('ls1.gamma' not in names, 'DINO, MAE or another ViT, not DINOv2'),
                          ('mask_token' not in names, 'a timm file, with other tokens')):
        if matches:
            raise ValueError(kind)
    return state


def official_config(state):
    """The arguments of ViT for an official network, from its shapes. All heads are 64 wide."""
    width, channels, patch, _ = state['patch_embed.proj.weight'].shape
    if width % 64:
        raise ValueError(f'width {width}; expected a multiple of 64')
    depth = 1 + max(int(k.split('.')[1]) for k in state if k.startswith('blocks.'))
    registers = state['register_tokens'].shape[1] if 'register_tokens' in state else 0
    size = math.isqrt(state['pos_embed'].shape[1] - 1) * patch
    return dict(size=size, patch=patch, width=width, depth=depth, heads=width // 64,
                channels=channels, registers=registers, offset=0.0 if registers else 0.1,
                antialias=bool(registers))


def fold_rgb(state, imagenet=True):
    """The RGB kernel as a grey one: sum_c W_c (x - mean_c) / std_c + b = W x + b' with
    W = sum_c W_c / std_c, b' = b - sum W_c mean_c / std_c. Without `imagenet`, mean 0 and std 1."""
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if imagenet else ((0, 0, 0), (1, 1, 1))
    mean, std = (torch.tensor(v, dtype=torch.double).view(1, 3, 1, 1) for v in (mean, std))
    W_c = state['patch_embed.proj.weight'].double()                         # (D, 3, p, p)
    b = state['patch_embed.proj.bias'].double() - (W_c * mean / std).sum((1, 2, 3))     # (D,)
    W = (W_c / std).sum(1, keepdim=True)                                    # (D, 1, p, p)
    return state | {'patch_embed.proj.weight': W.float(), 'patch_embed.proj.bias': b.float()}


# ---- learning rates, pictures -----------------------------------------------------------------

def param_groups(model, lr, wd, decay=1.0):
    """Optimizer groups as in DINOv2. The learning rate falls by `decay` per block from the top: head and last
    norm have 1, the top block `decay`, tokens and positions one step less than block 0, the patch kernel a
    fifth of theirs. Biases, norms and LayerScale have no weight decay. Each group has lr_scale, wd_scale and
    last_layer (the prototypes) for schedules."""
    blocks = [re.search(r'blocks\.(\d+)\.', name) for name, _ in model.named_parameters()]
    depth = 1 + max((int(block[1]) for block in blocks if block), default=-1)
    groups = {}
    for (name, parameter), block in zip(model.named_parameters(), blocks):
        bottom = re.search('pos_embed|patch_embed|cls_token|mask_token|register_tokens', name)
        below = depth - int(block[1]) if block else depth + 1 if bottom else 0
        lr_scale = decay ** below * (0.2 if 'patch_embed' in name else 1.0)
        wd_scale = 0.0 if name.endswith('bias') or 'norm' in name or 'gamma' in name else 1.0
        key = lr_scale, wd_scale, 'last_layer' in name
        group = dict(params=[], lr=lr * lr_scale, weight_decay=wd * wd_scale,
                     lr_scale=lr_scale, wd_scale=wd_scale, last_layer='last_layer' in name)
        groups.setdefault(key, group)['params'].append(parameter)
    return [*groups.values()]


@torch.no_grad()
def heatmaps(model, image, size=None):
    """image uint8 (H, W) -> feature, attention (Fig. 3): two float (h, w) maps in 0..1.
    feature: first principal component of the patch tokens, signed so that bright regions are high; attention:
    that of CLS in the last block, mean over heads. `size` (h, w): to resize to, by default the encoder's."""
    height, width = size or (model.grid * model.patch,) * 2
    grey = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    x = torch.from_numpy(grey).to(model.pos_embed.device).view(1, 1, height, width).float() / 255
    _, patches = model(x)                                                   # (1, N, D)
    centred = patches[0] - patches[0].mean(0)                               # (N, D)
    brightness = F.avg_pool2d(x, model.patch)[0, 0]                         # (h, w)
    feature = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]).view_as(brightness)
    feature = feature * torch.sign((feature * (brightness - brightness.mean())).sum())
    attention = model.attention(x)[0].mean(0)                               # (h, w)
    return [((m - m.min()) / (m.max() - m.min()).clamp_min(1e-12)).cpu().numpy()
            for m in (feature, attention)]


def overlay(image, heat):
    """image uint8 (H, W), heat (h, w) in 0..1 -> uint8 (H, W, 3): black-red-yellow over grey."""
    heat = Image.fromarray(np.uint8(255 * heat)).resize(image.shape[::-1], Image.Resampling.BICUBIC)
    heat = np.asarray(heat) / 255                                           # (H, W)
    colour = np.stack([2 * heat, 2 * heat - 1, 0 * heat], axis=-1).clip(0, 1)   # (H, W, 3)
    alpha = 0.65 * heat[..., None]
    return np.uint8((1 - alpha) * image[..., None] + alpha * 255 * colour)


if __name__ == '__main__':
    if len(sys.argv) == 1:
        model = ViT(**SIZES['base'])
        for side in (518, 196, 98):
            print(side, 'px ->', *[tuple(x.shape) for x in model(torch.rand(1, 1, side, side))])
        print(f'{sum(p.numel() for p in model.parameters()):,} parameters')
    elif len(sys.argv) > 4 or len(sys.argv) == 2:
        print(__doc__)
    else:
        try:
            import images
            path, checkpoint = sys.argv[1:3]
            out = sys.argv[3] if len(sys.argv) == 4 else 'heatmap.png'
            image = images.read_equalised(path, images.frames(path) // 2)       # middle slice of a volume
            maps = [np.zeros((1, 1)), *heatmaps(load(checkpoint), image)]
            Image.fromarray(np.hstack([overlay(image, heat) for heat in maps])).save(out)
            print(f'{out}: image, feature, attention')
        except (ImportError, OSError, ValueError) as problem:
            sys.exit(f'vit.py: {problem}')
