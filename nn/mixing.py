"""The token-mixing block of MLICv2 ("MLICv2: Enhanced Multi-Reference Entropy Modeling", Jiang et al. 2025), without attention.

The paper gives the order of the layers, not every width; with a doubled width inside both branches the whole model has
the published 84.3 M parameters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ChannelNorm

EXPANSION = 2


class Pointwise(nn.Conv2d):
    """1x1 convolution as a matrix product over the channels: twice as fast on a CPU where channels lie last in memory."""

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Gate(nn.Module):
    """x * sigmoid(conv1(gelu(dw3(gelu(conv1(x)))))), ``expansion`` times as wide inside."""

    def __init__(self, channels: int, expansion: int = EXPANSION):
        super().__init__()
        inner = expansion * channels
        self.a = Pointwise(channels, inner)
        self.depth = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.b = Pointwise(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.b(F.gelu(self.depth(F.gelu(self.a(x))))))


class TokenMixing(nn.Module):
    """x + mix(norm(x)), then x + gate(norm(x)); shape (B, C, H, W) is kept.

    mix: a depth residual block (conv1 C->2C, dw3, conv1 2C->C, GELU between, around it the identity), dw5, conv1. Both
    branches carry a factor per channel, which starts small: the block is then near the identity (see ``nn.transforms``).
    """

    reach = 4  # samples that it sees to every side: 1 + 2 in the first branch, 1 in the second

    def __init__(self, channels: int, expansion: int = EXPANSION):
        super().__init__()
        inner = expansion * channels
        self.norm = ChannelNorm(channels)
        self.a = Pointwise(channels, inner)
        self.depth = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.b = Pointwise(inner, channels)
        self.spread = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.out = Pointwise(channels, channels)
        self.gate_norm = ChannelNorm(channels)
        self.gate = Gate(channels, expansion)
        self.scale = nn.Parameter(torch.full((2, channels, 1, 1), 0.1))

    def rest(self) -> None:
        """Become the identity; training leaves it again."""
        with torch.no_grad():
            self.scale.zero_()

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        u = u + self.b(F.gelu(self.depth(F.gelu(self.a(u)))))
        x = x + self.scale[0] * self.out(self.spread(u))
        return x + self.scale[1] * self.gate(self.gate_norm(x))
