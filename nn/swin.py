"""Swin Transformer V2 blocks on maps of any size, and the residual stage that S2LIC builds from them.

The parts are those of Liu et al. 2022, "Swin Transformer V2: Scaling Up Capacity and Resolution": cosine attention, a
continuous position bias, norms after the branches. ``timm`` has them too, for one resolution fixed in advance and behind an
import of seconds; the tests hold these blocks against timm's. Pointwise layers are 1x1 convolutions on maps.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ChannelNorm

LOGIT_MAX = math.log(100.0)  # of the log of 1/temperature
BIAS_REACH = 16.0  # the position bias lies in 0..16
MASKED = -100.0


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must also serve training
def region_mask(h: int, w: int, window: int, shift: int, device: torch.device | str = "cpu") -> Tensor | None:
    """(windows, 1, n*n, n*n) float32 for maps padded to h x w: MASKED between tokens that only the cyclic shift made
    neighbours. None without a shift."""
    if not shift:
        return None
    region = torch.zeros(h, w)
    for rows in (slice(-window, -shift), slice(-shift, None)):
        region[rows] += 1
    for columns in (slice(-window, -shift), slice(-shift, None)):
        region[:, columns] += 3
    cut = region.reshape(h // window, window, w // window, window).transpose(1, 2).reshape(-1, window * window)
    return torch.where(cut[:, None] == cut[:, :, None], 0.0, MASKED)[:, None].to(device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def relative_offsets(window: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Log-spaced offsets ((2n-1)**2, 2), and their row for each pair of tokens of a window (n*n, n*n)."""
    steps = torch.arange(1 - window, window, dtype=torch.float32) * (8 / max(window - 1, 1))
    logs = steps.sign() * torch.log2(steps.abs() + 1) / 3
    table = torch.cartesian_prod(logs, logs)
    row, column = torch.cartesian_prod(torch.arange(window), torch.arange(window)).T
    apart_r, apart_c = row[:, None] - row + window - 1, column[:, None] - column + window - 1
    return table.to(device), (apart_r * (2 * window - 1) + apart_c).to(device)


class CosineWindowAttention(nn.Module):
    """Attention inside windows: softmax(cos(q, k) / temperature + bias) v. (B, C, h, w) -> the same shape."""

    def __init__(self, channels: int, heads: int, window: int = 8, shift: int = 0, bias_width: int = 512):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared by {heads} heads")
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(channels))
        self.v_bias = nn.Parameter(torch.zeros(channels))
        self.proj = nn.Conv2d(channels, channels, 1)
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, bias_width), nn.ReLU(), nn.Linear(bias_width, heads, bias=False)
        )  # fmt: skip

    def position_bias(self) -> Tensor:
        """(heads, n*n, n*n)."""
        table, index = relative_offsets(self.window, self.proj.weight.device)
        return (BIAS_REACH * torch.sigmoid(self.cpb_mlp(table))).T[:, index]

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), n, heads = x.shape, self.window, self.heads
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.conv2d(x, self.qkv.weight, bias).permute(0, 2, 3, 1)
        if h % n or w % n:
            qkv = F.pad(qkv, (0, 0, 0, -w % n, 0, -h % n))
        if self.shift:
            qkv = qkv.roll((-self.shift, -self.shift), (1, 2))
        high, wide = qkv.shape[1:3]
        rows, columns = high // n, wide // n
        tokens = qkv.reshape(b, rows, n, columns, n, 3, heads, c // heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = tokens.reshape(3, b, rows * columns, heads, n * n, c // heads)
        bias = self.position_bias()[None]
        if (mask := self.mask(h, w, high, wide, x.device)) is not None:
            bias = bias + mask
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=LOGIT_MAX).exp()
        scores = q @ F.normalize(k, dim=-1).transpose(-1, -2) + bias
        seen = scores.softmax(-1) @ v  # (B, windows, heads, n*n, C/heads)
        seen = seen.reshape(b, rows, columns, heads, n, n, c // heads).permute(0, 1, 4, 2, 5, 3, 6)
        seen = seen.reshape(b, high, wide, c)
        if self.shift:
            seen = seen.roll((self.shift, self.shift), (1, 2))
        return self.proj(seen[:, :h, :w].permute(0, 3, 1, 2))

    def mask(self, h: int, w: int, high: int, wide: int, device: torch.device) -> Tensor | None:
        """Mask of a map of h x w padded to high x wide; None where every token of a window sees every other."""
        mask = region_mask(high, wide, self.window, self.shift, device)
        if (h, w) == (high, wide):
            return mask
        padding = padding_mask(h, w, high, wide, self.window, self.shift, device)
        return padding if mask is None else mask + padding


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def padding_mask(h: int, w: int, high: int, wide: int, window: int, shift: int, device: torch.device | str) -> Tensor:
    """(windows, 1, 1, n*n): MASKED at the keys beyond h x w."""
    inside = torch.zeros(high, wide)
    inside[:h, :w] = 1
    inside = inside.roll((-shift, -shift), (0, 1))
    cut = inside.reshape(high // window, window, wide // window, window).transpose(1, 2)
    return torch.where(cut.reshape(-1, window * window) > 0, 0.0, MASKED)[:, None, None].to(device)


class SwinV2Block(nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)). The norms start at ``strength``: 0 is the identity."""

    def __init__(self, channels: int, heads: int, window: int = 8, shift: int = 0, ratio: int = 4, bias_width: int = 512,
                 strength: float = 0.1):  # fmt: skip
        super().__init__()
        self.attn = CosineWindowAttention(channels, heads, window, shift, bias_width)
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, ratio * channels, 1), nn.GELU(), nn.Conv2d(ratio * channels, channels, 1)
        )  # fmt: skip
        for norm in (self.norm1, self.norm2):
            nn.init.constant_(norm.weight, strength)

    def rest(self) -> None:
        """Become the identity; training leaves it again."""
        with torch.no_grad():
            for norm in (self.norm1, self.norm2):
                norm.weight.zero_()
                norm.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class SwinStage(nn.Sequential):
    """``depth`` blocks, every second one shifted by half a window; with ``skip`` the input of the stage is added again.

    With the skip this is S2LIC's RS2TB. Without it a stage at rest is the identity, which the skip would double.
    """

    def __init__(self, channels: int, depth: int, heads: int, window: int = 8, ratio: int = 4, bias_width: int = 512,
                 skip: bool = True):  # fmt: skip
        super().__init__(*(
            SwinV2Block(channels, heads, window, i % 2 * (window // 2), ratio, bias_width) for i in range(depth)
        ))  # fmt: skip
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x + y if self.skip else y


def spoiled(samples: int, depth: int, window: int = 8) -> int:
    """How far from a cut the output of a stage is not that of the uncut map, if its input is wrong up to ``samples``.

    The cut lies on the border of unshifted windows.
    """
    for block in range(depth):
        if block % 2:  # a shifted window lies across the cut
            half = window // 2
            samples = half + -(-max(samples - half, 0) // window) * window
        else:
            samples = -(-samples // window) * window
    return samples
