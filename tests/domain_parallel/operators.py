"""The operators a model may use, by name: small modules of (batch, channel, height, width).

Heights are those of the global field. A case that torch itself refuses at some height is left out there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from credit.models.attention import AxialAttention, GlobalAttention, WindowAttention
from credit.models.sphere import pad_on_sphere

C, W = 4, 6


class Call(nn.Module):
    """A function of a field, after and before something that has weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, C).view(1, C, 1, 1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(torch.tanh(x * self.scale) + 0.1 * x)


class Tokens(nn.Module):
    """A module of (batch, tokens, channel), given all points of the field as tokens."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        b, _c, h, w = x.shape
        y = self.module(x.flatten(2).transpose(1, 2))
        y = y[0] if isinstance(y, tuple) else y
        return y.transpose(1, 2).reshape(b, -1, h, w)


class Sdpa(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(b, n, c)


def dropped_in_place(x: Tensor) -> Tensor:
    F.dropout(x, 0.3, inplace=True)
    return x


def squeeze_excite(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


def positions(x: Tensor) -> Tensor:
    _b, _c, h, _w = x.shape
    rows = torch.arange(h, dtype=x.dtype, device=x.device) / h
    return x + rows.view(1, 1, h, 1).cos()


def spectral_mix(x: Tensor) -> Tensor:
    """The lowest modes kept, as a Fourier neural operator does."""
    modes = torch.fft.rfft2(x)
    out = torch.zeros_like(modes)
    out[..., :2] = modes[..., :2] * 1.5
    return torch.fft.irfft2(out, s=x.shape[-2:])


def checkpointed(module: nn.Module) -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.module, x, use_reentrant=False)

    return Checkpointed()


def conv(*args: object, **options: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(C, C, *args, **options)


def call(function: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Call(function)


OPERATORS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"conv k{k} s{s} p{p} d{d}": conv(k, s, p, d)
        for k, s, p, d in [
            (1, 1, 0, 1),
            (2, 1, 0, 1),
            (2, 2, 0, 1),
            (3, 1, 1, 1),
            (3, 2, 1, 1),
            (3, 1, 0, 1),
            (3, 3, 1, 1),
            (4, 2, 1, 1),
            (4, 4, 0, 1),
            (5, 1, 2, 1),
            (7, 4, 3, 1),
            (3, 1, 2, 2),
            (3, 2, 3, 3),
            (1, 2, 0, 1),
            (1, 3, 1, 1),
            (5, 1, 4, 1),
        ]
    },
    **{f"conv same {k}": conv(k, padding="same") for k in (2, 3, 4)},
    "conv valid": conv(3, padding="valid"),
    **{f"conv {mode}": conv(3, padding=1, padding_mode=mode) for mode in ("reflect", "replicate", "circular")},
    "conv k4 reflect stride": conv(4, 2, 2, padding_mode="reflect"),
    "conv groups": conv(3, padding=1, groups=2),
    "conv depthwise": conv(7, padding=3, groups=C),
    "conv asymmetric pad": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(C, C, 3, 2)),
    "conv k4 s16": lambda: nn.Conv2d(C, C, (3, 3), (5, 1), padding=1),
    "spectral_norm old": lambda: nn.utils.spectral_norm(nn.Conv2d(C, C, 3, padding=1)),
    "weight_norm old": lambda: nn.utils.weight_norm(nn.Conv2d(C, C, 3, padding=1)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(C, C, 3, padding=1)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(C, C, 3, 2, 1)),
    "checkpointed conv": lambda: checkpointed(
        nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.GELU(), nn.GroupNorm(2, C))
    ),
    "checkpointed pool": lambda: checkpointed(
        nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.BatchNorm2d(C), nn.Upsample(scale_factor=2))
    ),
    **{
        f"conv transpose k{k} s{s} p{p} o{o} d{d}": (
            lambda k=k, s=s, p=p, o=o, d=d: nn.ConvTranspose2d(C, C, k, s, p, o, dilation=d)
        )
        for k, s, p, o, d in [
            (2, 2, 0, 0, 1),
            (3, 2, 1, 1, 1),
            (4, 2, 1, 0, 1),
            (3, 1, 1, 0, 1),
            (1, 2, 0, 1, 1),
            (4, 4, 0, 0, 1),
            (3, 1, 2, 0, 2),
        ]
    },
    "conv1d rows": call(lambda x: F.conv1d(x[..., 0], torch.ones(C, C, 3, dtype=x.dtype), padding=1).unsqueeze(-1)),
    "conv transpose1d rows": call(
        lambda x: F.conv_transpose1d(x.mean(-1), torch.ones(C, C, 3, dtype=x.dtype), stride=2).unsqueeze(-1)
    ),
    "conv3d": call(lambda x: F.conv3d(x[:, None], torch.ones(1, 1, 3, 3, 3, dtype=x.dtype), padding=1)[:, 0]),
    **{
        f"max pool k{k} s{s} p{p} ceil{c}": (
            lambda k=k, s=s, p=p, c=c: nn.Sequential(nn.MaxPool2d(k, s, p, ceil_mode=c))
        )
        for k, s, p, c in [
            (2, 2, 0, False),
            (3, 2, 1, False),
            (2, 2, 0, True),
            (3, 2, 1, True),
            (3, 1, 1, False),
            (3, 3, 0, True),
        ]
    },
    "max pool dilated": lambda: nn.MaxPool2d(2, 1, 1, dilation=2),
    **{
        f"avg pool k{k} s{s} p{p} ceil{c} count{i}": (
            lambda k=k, s=s, p=p, c=c, i=i: nn.AvgPool2d(k, s, p, ceil_mode=c, count_include_pad=i)
        )
        for k, s, p, c in [(2, 2, 0, False), (3, 2, 1, False), (3, 2, 1, True), (2, 2, 0, True), (3, 2, 0, True)]
        for i in (True, False)
    },
    "avg pool divisor": lambda: nn.AvgPool2d(3, 2, 1, divisor_override=5),
    "max pool1d": call(lambda x: F.max_pool1d(x[..., 0], 3, 2, 1).unsqueeze(-1)),
    "avg pool1d": call(lambda x: F.avg_pool1d(x[..., 0], 3, 2, 1).unsqueeze(-1)),
    "avg pool3d": call(lambda x: F.avg_pool3d(x, 3, 2, 1)),
    **{
        f"adaptive {kind} {size}": (lambda kind=kind, size=size: getattr(nn, f"Adaptive{kind}Pool2d")(size))
        for kind in ("Avg", "Max")
        for size in (1, 5, (7, 3), (None, 2), (9, None))
    },
    **{
        f"upsample {mode} {to}": (
            lambda mode=mode, to=to: (
                nn.Upsample(scale_factor=to, mode=mode) if isinstance(to, float) else nn.Upsample(to, mode=mode)
            )
        )
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
        for to in (2.0, 1.5, 0.7, (23, 9), (9, 4))
    },
    **{
        f"upsample corners {mode} {to}": (lambda mode=mode, to=to: nn.Upsample(to, mode=mode, align_corners=True))
        for mode in ("bilinear", "bicubic")
        for to in ((23, 9), (9, 4))
    },
    "interpolate by shape": call(lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="bilinear")),
    "interpolate antialias": call(lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)),
    "interpolate recompute": call(
        lambda x: F.interpolate(x, scale_factor=1.7, mode="bilinear", recompute_scale_factor=True)
    ),
    **{
        f"pad {mode} {pad}": (lambda mode=mode, pad=pad: Call(lambda x: F.pad(x, pad, mode=mode)))
        for mode in ("constant", "reflect", "replicate", "circular")
        for pad in ((1, 2, 3, 1), (1, 1, 0, 0), (0, 0, 2, 0))
    },
    "pad value": call(lambda x: F.pad(x, (0, 0, 1, 2), value=3.0)),
    "pad crop": call(lambda x: F.pad(x, (0, 0, -1, -2))),
    "zero pad": lambda: nn.ZeroPad2d((1, 0, 2, 1)),
    "reflection pad": lambda: nn.ReflectionPad2d(2),
    "replication pad": lambda: nn.ReplicationPad2d((1, 1, 0, 3)),
    "circular pad": lambda: nn.CircularPad2d(2),
    "constant pad": lambda: nn.ConstantPad2d(1, 2.5),
    "across poles": call(lambda x: pad_on_sphere(x, 1, 0)),
    "across poles conv": lambda: nn.Sequential(Call(lambda x: pad_on_sphere(x, 2, 2)), nn.Conv2d(C, C, 5)),
    "group norm": lambda: nn.GroupNorm(2, C),
    "group norm plain": lambda: nn.GroupNorm(C, C, affine=False),
    "batch norm": lambda: nn.Sequential(nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1)),
    "batch norm no stats": lambda: nn.BatchNorm2d(C, track_running_stats=False, affine=False),
    "batch norm eval": lambda: nn.BatchNorm2d(C).eval(),
    "instance norm": lambda: nn.InstanceNorm2d(C, affine=True),
    "instance norm stats": lambda: nn.InstanceNorm2d(C, track_running_stats=True),
    "layer norm width": lambda: nn.LayerNorm(W),
    "layer norm space": call(lambda x: F.layer_norm(x, x.shape[-2:])),
    "layer norm all": call(lambda x: F.layer_norm(x, x.shape[1:])),
    "rms norm space": call(lambda x: F.rms_norm(x, x.shape[-2:], eps=1e-5)),
    "layer norm channels": call(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (C,)).permute(0, 3, 1, 2)),
    "local response norm": lambda: nn.LocalResponseNorm(3),
    "pixel shuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(1, 2, 3, padding=1)),
    "pixel shuffle skip": call(lambda x: F.pixel_shuffle(x, 2) + F.interpolate(x[:, :1], scale_factor=2)),
    "pixel unshuffle": lambda: nn.PixelUnshuffle(2),
    "channel shuffle": lambda: nn.ChannelShuffle(2),
    "roll rows": call(lambda x: torch.roll(x, 3, -2)),
    "roll both": call(lambda x: torch.roll(x, (-2, 1), (2, 3))),
    "flip": call(lambda x: x.flip(-2)),
    "flip both": call(lambda x: torch.flip(x, (2, 3))),
    "mean rows": call(lambda x: x - x.mean(-2, keepdim=True)),
    "mean all": call(lambda x: x * x.mean()),
    "sum rows": call(lambda x: x + x.sum(2, keepdim=True).cos()),
    "max rows": call(lambda x: x - x.amax((2, 3), keepdim=True)),
    "max values": call(lambda x: x - x.max(2, keepdim=True).values),
    "max all": call(lambda x: x / x.abs().max()),
    "min dim": call(lambda x: x + x.min(dim=3, keepdim=True)[0] + x.min(dim=2)[0].unsqueeze(2)),
    "var": call(lambda x: x / (x.var((2, 3), keepdim=True) + 1).sqrt()),
    "std": call(lambda x: (x - x.mean(2, True)) / (x.std(2, keepdim=True) + 0.3)),
    "norm": call(lambda x: x / x.norm(dim=(2, 3), keepdim=True)),
    "vector norm": call(lambda x: x / torch.linalg.vector_norm(x, dim=2, keepdim=True)),
    "normalize rows": call(lambda x: F.normalize(x, dim=2)),
    "normalize channels": call(lambda x: F.normalize(x, dim=1)),
    "squeeze excite": call(squeeze_excite),
    "softmax rows": call(lambda x: torch.softmax(x, 2)),
    "log softmax": call(lambda x: F.log_softmax(x, -2)),
    "cumsum rows": call(lambda x: x.cumsum(2)),
    "sort rows": call(lambda x: x.sort(2).values),
    "logsumexp": call(lambda x: x - x.logsumexp(2, keepdim=True)),
    "glu": call(lambda x: F.glu(x, 1)),
    "prelu": lambda: nn.PReLU(C),
    "gelu in place": call(lambda x: F.relu(x * 2, inplace=True) + (x * 1).mul_(0.5).add_(1)),
    "positions": call(positions),
    "where": call(lambda x: torch.where(x > 0, x, 0.1 * x)),
    "mask by row": call(lambda x: x.masked_fill(torch.arange(x.shape[2]).view(-1, 1) % 3 == 0, 0.0)),
    "slice rows": call(lambda x: x[:, :, 1:-2]),
    "stride rows": call(lambda x: x[:, :, ::2] + 1),
    "one row": call(lambda x: x + x[:, :, :1]),
    "one row dropped": call(lambda x: x + x[:, :, 2].unsqueeze(2)),
    "index rows": call(lambda x: x[:, :, torch.arange(x.shape[2]).flip(0)]),
    "index columns": call(lambda x: x[..., torch.tensor([0, 2, 2])]),
    "index select": call(lambda x: x.index_select(2, torch.arange(x.shape[2]) // 2)),
    "cat channels": call(lambda x: torch.cat([x, x.cos()], 1)),
    "cat rows": call(lambda x: torch.cat([x.flip(2), torch.ones_like(x[:, :, :1]), x[:, :, 2:]], 2)),
    "cat class token": call(lambda x: torch.cat([torch.ones(x.shape[0], C, 1, W, dtype=x.dtype), x], 2)),
    "stack": call(lambda x: torch.stack([x, x * 2], 2).sum(2)),
    "split": call(lambda x: torch.cat([part.cumsum(1) for part in x.split(2, 1)], 1)),
    "chunk rows": call(lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(3, 2))], 2)),
    "set columns": call(lambda x: _set_columns(x)),
    "set rows": call(lambda x: _set_rows(x)),
    "repeat": call(lambda x: x.repeat(1, 1, 2, 1)),
    "repeat interleave": call(lambda x: x.repeat_interleave(2, 2) + F.interpolate(x, scale_factor=(2, 1))),
    "flatten": call(lambda x: x.flatten(2).cumsum(1).unflatten(2, x.shape[2:])),
    "flatten batch": call(
        lambda x: x.permute(0, 2, 3, 1).flatten(0, 2).tanh().view(x.shape[0], *x.shape[2:], C).permute(0, 3, 1, 2)
    ),
    "token mixer": call(lambda x: x.flatten(2).softmax(-1).view(x.shape)),
    "unfold": call(lambda x: F.unfold(x, 3, padding=1).view(x.shape[0], C, 9, *x.shape[2:]).amax(2)),
    "tensor unfold": call(lambda x: x.unfold(2, 3, 1).sum(-1)),
    "grid sample": call(lambda x: _warp(x)),
    "linear channels": lambda: nn.Sequential(_Last(), nn.Linear(C, 3), nn.GELU(), nn.Linear(3, C), _First()),
    "linear width": lambda: nn.Linear(W, 5),
    "matmul rows": call(lambda x: torch.matmul(_square(x.shape[2], x), x)),
    "matmul gram": call(lambda x: x + (x.transpose(2, 3) @ x).mean((2, 3), keepdim=True)),
    "einsum channels": call(lambda x: torch.einsum("bchw,dc->bdhw", x, torch.ones(3, C, dtype=x.dtype).cumsum(1))),
    "tensordot": call(lambda x: torch.tensordot(x, _square(x.shape[2], x), ([2], [0])).movedim(-1, 2)),
    "tensordot all": call(lambda x: x + torch.tensordot(x, x.cos(), ([0, 2, 3], [0, 2, 3])).sum()),
    "einsum rows": call(lambda x: torch.einsum("bchw,hk->bckw", x, _square(x.shape[2], x))),
    "einsum outer": call(lambda x: torch.einsum("bchw,bckw->bchk", x, x)),
    "fft width": call(lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1) * 1j, n=x.shape[-1], dim=-1)),
    "fft rows": call(lambda x: torch.fft.fft(x, dim=2).real),
    "spectral": call(spectral_mix),
    "cosine similarity": call(lambda x: x * F.cosine_similarity(x, x.cos(), dim=1).unsqueeze(1)),
    "loss inside": call(lambda x: x * F.mse_loss(x, x.cos())),
    "windows": lambda: WindowAttention(C, 2, 2),
    "windows 3": lambda: WindowAttention(C, 2, 3),
    "windows shifted": lambda: WindowAttention(C, 1, 4, shift=2),
    "windows dilated": lambda: WindowAttention(C, 2, 2, dilated=True),
    "windows dilated 3": lambda: WindowAttention(C, 2, 3, shift=1, dilated=True),
    "axial rows": lambda: AxialAttention(C, 2, -2),
    "axial columns": lambda: AxialAttention(C, 2, -1),
    "global attention": lambda: GlobalAttention(C, 2),
    "causal attention": lambda: Tokens(Sdpa(causal=True)),
    "encoder layer": lambda: Tokens(nn.TransformerEncoderLayer(C, 2, 8, dropout=0.0, batch_first=True)),
    "mha weights": lambda: Tokens(_SelfAttention()),
    "dropout": lambda: nn.Dropout(0.3),
    "dropout2d": lambda: nn.Dropout2d(0.3),
    "dropout in place": lambda: Call(dropped_in_place),
    "noise": call(lambda x: x + torch.randn_like(x)),
    "drop path": call(lambda x: x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)),
    "fresh noise": call(lambda x: x + torch.randn(x.shape, dtype=x.dtype)),
}


LINES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv1d(C, C, 5, 2, 2, padding_mode="circular"),
    "conv transpose": lambda: nn.ConvTranspose1d(C, C, 4, 2, 1),
    "max pool": lambda: nn.MaxPool1d(3, 2, 1),
    "avg pool": lambda: nn.AvgPool1d(3, 2, 1),
    "adaptive": lambda: nn.AdaptiveAvgPool1d(5),
    "batch norm": lambda: nn.BatchNorm1d(C),
    "instance norm": lambda: nn.InstanceNorm1d(C),
    "group norm": lambda: nn.GroupNorm(2, C),
    "upsample": lambda: nn.Upsample(scale_factor=1.7, mode="linear"),
    "reflection pad": lambda: nn.ReflectionPad1d(2),
    "replication pad": lambda: nn.ReplicationPad1d((1, 3)),
    "circular pad": lambda: nn.CircularPad1d(2),
}
"""Of (batch, channel, longitude), with longitude cut."""

VOLUMES: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv3d(C, C, 3, padding=1, padding_mode="replicate"),
    "conv stride": lambda: nn.Conv3d(C, C, (2, 4, 4), (2, 3, 2), dilation=(1, 2, 1)),
    "patches": lambda: nn.Conv3d(C, C, (2, 4, 4), (2, 4, 4)),
    "conv transpose": lambda: nn.ConvTranspose3d(C, C, 3, 2, 1, output_padding=1),
    "max pool": lambda: nn.MaxPool3d(2, ceil_mode=True),
    "avg pool": lambda: nn.AvgPool3d(3, 2, 1, count_include_pad=False),
    "adaptive": lambda: nn.AdaptiveAvgPool3d((2, 5, 3)),
    "adaptive max": lambda: nn.AdaptiveMaxPool3d((2, 5, 3)),
    "batch norm": lambda: nn.BatchNorm3d(C),
    "instance norm": lambda: nn.InstanceNorm3d(C, affine=True),
    "group norm": lambda: nn.GroupNorm(2, C),
    "upsample": lambda: nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True),
    "reflection pad": lambda: nn.ReflectionPad3d((1, 1, 2, 1, 1, 0)),
    "dropout": lambda: nn.Dropout3d(0.4),
}
"""Of (batch, channel, level, latitude, longitude)."""


class _SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class _Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class _First(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def _set_columns(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., :3] = x[..., 3:] * 2
    y[:, 1:, :, 4] = x[:, :-1, :, 0]
    return y


def _set_rows(x: Tensor) -> Tensor:
    y = x * 1
    y[:, :, 0] = 0
    y[:, :, -1] = x[:, :, 0] * 2
    y[:, :, 1:-2] = x[:, :, 2:-1] + y[:, :, 1:-2]
    y[:, :, 3] += 2
    row = y[:, :, 2]
    y[:, :, -2] = row
    del row
    y.mul_(1.5)
    y[:, 0, ::2, 1:] = torch.ones(W - 1, dtype=x.dtype)
    return y


def _square(n: int, like: Tensor) -> Tensor:
    return torch.linspace(-1, 1, n * n, dtype=like.dtype).view(n, n)


def _warp(x: Tensor) -> Tensor:
    ys = torch.linspace(-0.9, 0.8, x.shape[2], dtype=x.dtype).view(1, -1, 1)
    xs = torch.linspace(-0.7, 0.9, x.shape[3], dtype=x.dtype).view(1, 1, -1)
    shift = 0.1 * x.mean(1)
    grid = torch.stack([xs + shift, ys + shift], -1)
    return F.grid_sample(x, grid, align_corners=False)
