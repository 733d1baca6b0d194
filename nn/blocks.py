"""Residual and sub-pixel blocks of the convolutional transforms.

The main path of a transform built from these blocks is linear: the down- and up-sampling convolutions carry no
activation, and every non-linearity sits in a residual branch. A fresh network is therefore close to a linear block
transform, which trains much faster than a plain stack (the observation behind AuxT, Li et al. 2025).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + conv3(relu(conv3(x))); shape (B, C, H, W) is kept. The branch starts at a tenth of its usual size."""

    reach = 2  # samples that it sees to every side

    def __init__(self, channels: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or channels
        self.a = nn.Conv2d(channels, hidden, 3, padding=1)
        self.b = nn.Conv2d(hidden, channels, 3, padding=1)
        with torch.no_grad():
            self.b.weight.mul_(0.1)

    def rest(self) -> None:
        """Become the identity; training leaves it again."""
        with torch.no_grad():
            self.b.weight.zero_()
            self.b.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(x)))


class NormedBlock(nn.Module):
    """x + s * conv3(leaky(conv3(n(x)))), n(x) = u / sqrt(1 + mean over channels of u^2), u = g x; shape (B, C, H, W) is kept.

    A plain block for the features of a transform that starts at a KLT: those of one channel are a hundred times those of
    another, and all are small beside the steps of an optimiser, which shuts plain blocks there within a few hundred steps (see
    ``train.revive``). The gains g, by default from what a fresh block sees (``fit``), make the channels even; the root keeps
    strong edges from drowning the rest, and weak textures as they are; the factors s start small, so that a step in the last
    kernel is a small one.
    """

    reach = 2

    def __init__(self, channels: int, hidden: int | None = None):
        super().__init__()
        hidden = hidden or channels
        self.log_gain = nn.Parameter(torch.full((channels, 1, 1), math.log(4.0)))
        self.a = nn.Conv2d(channels, hidden, 3, padding=1)
        self.b = nn.Conv2d(hidden, channels, 3, padding=1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def rest(self) -> None:
        """Become the identity; training leaves it again."""
        with torch.no_grad():
            self.scale.zero_()

    def fit(self, x: Tensor) -> None:
        """Gains with which every channel of x (B, C, H, W) has a variance of 1."""
        with torch.no_grad():
            self.log_gain.copy_(-x.std((0, 2, 3)).clamp_min(1e-3).log()[:, None, None])

    def inner(self, x: Tensor) -> Tensor:
        """What the last kernel sees, (B, hidden, h, w)."""
        u = x * self.log_gain.exp()
        u = u * torch.rsqrt(1 + u.square().mean(1, keepdim=True))
        return F.leaky_relu(self.a(u), 0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        # a factor on the kernel is one on the map that costs nothing
        return x + F.conv2d(self.inner(x), self.b.weight * self.scale[:, None], self.b.bias * self.scale.flatten(), padding=1)


class EnergyGate(nn.Module):
    """x * 2 sigmoid(W log(1 + (s x)^2) + b), W a matrix over the channels; shape (B, C, H, W) is kept. Starts as the identity.

    A local control of gain like divisive normalisation (GDN; Balle et al. 2016), which is to a linear transform what a ReLU
    is not: a nonlinearity that pays from the first steps on. Free weights in the place of GDN's positive ones, and a bounded
    gain, need no care in training.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 4.0))  # features of the skeleton are small
        self.mix = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x: Tensor) -> Tensor:
        energy = torch.log(1 + (x * self.scale).square())  # log1p takes ten times as long on a CPU
        return x * (2 * torch.sigmoid(self.mix(energy)))


class Upsample(nn.Sequential):
    """Sub-pixel upsampling: (B, C, H, W) -> (B, out, H*r, W*r) by a k x k convolution and a pixel shuffle."""

    def __init__(self, channels: int, out: int, r: int = 2, kernel: int = 1):
        super().__init__(nn.Conv2d(channels, out * r * r, kernel, padding=kernel // 2), nn.PixelShuffle(r))


def knot_weights(level: Tensor, knots: int, levels: int) -> Tensor:
    """Weights (B, knots) of the linear interpolation at integer or real ``level`` (B,) in 0..levels."""
    position = level.to(torch.float32) * ((knots - 1) / levels)
    grid = torch.arange(knots, dtype=torch.float32, device=level.device)
    return (1 - (position[:, None] - grid).abs()).clamp_min(0)


class LevelAffine(nn.Module):
    """Scale and shift per channel that depend on the quality level: x * (1 + s(level)) + b(level).

    ``s`` and ``b`` are linear between ``knots`` learned vectors, so one model serves every quality
    (the gain units of Cui et al. 2021, with a shift added).
    """

    def __init__(self, channels: int, knots: int, levels: int):
        super().__init__()
        self.knots, self.levels = knots, levels
        self.scale = nn.Parameter(torch.zeros(knots, channels))
        self.shift = nn.Parameter(torch.zeros(knots, channels))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        w = knot_weights(level, self.knots, self.levels)
        scale, shift = (w @ self.scale)[:, :, None, None], (w @ self.shift)[:, :, None, None]
        return torch.addcmul(x + shift, x, scale)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)
