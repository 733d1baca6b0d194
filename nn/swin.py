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
from .windows import cut_windows, merge_windows, relative_index, window_mask

LOGIT_MAX = math.log(100.0)  # of the log of 1/temperature
BIAS_REACH = 16.0  # the position bias lies in 0..16


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must also serve training
def log_offsets(window: int, device: torch.device | str = "cpu") -> Tensor:
    """((2n-1)**2, 2): rows and columns between two tokens of a window, on a log scale, in the order of ``relative_index``."""
    steps = torch.arange(1 - window, window, dtype=torch.float32) * (8 / max(window - 1, 1))
    logs = steps.sign() * torch.log2(steps.abs() + 1) / 3
    return torch.cartesian_prod(logs, logs).to(device)


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
        device = self.proj.weight.device
        bias = BIAS_REACH * torch.sigmoid(self.cpb_mlp(log_offsets(self.window, device)))
        return bias.T[:, relative_index(self.window, device)]

    def forward(self, x: Tensor) -> Tensor:
        (b, c, h, w), n = x.shape, self.window
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        tokens = cut_windows(F.conv2d(x, self.qkv.weight, bias), n, self.shift)
        q, k, v = tokens.reshape(b, -1, 3, self.heads, c // self.heads, n * n).unbind(2)  # (B, windows, heads, C/heads, n*n)
        q = F.normalize(q, dim=-2) * self.logit_scale.clamp(max=LOGIT_MAX).exp()
        scores = q.transpose(-1, -2) @ F.normalize(k, dim=-2) + self.position_bias()
        if (mask := window_mask(h, w, n, self.shift, x.device)) is not None:
            scores = scores + mask
        seen = v @ scores.softmax(-1).transpose(-1, -2)
        return self.proj(merge_windows(seen.reshape(b, -1, c, n * n), h, w, n, self.shift))


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
