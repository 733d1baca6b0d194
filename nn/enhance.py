"""The dense enhancement block at both ends of S2LIC: x + strength * E(x), published with a strength of 0.2.

E is a dense block, three convolutions and another dense block, as in InvCompress (Xie et al. 2021, "Enhanced invertible
encoding for learned image compression"), where it comes from.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky ReLU


class DenseBlock(nn.Module):
    """(B, C, H, W) -> (B, out, H, W): ``layers`` 3x3 convolutions, each on everything before it."""

    def __init__(self, channels: int, out: int, growth: int = 32, layers: int = 5):
        super().__init__()
        widths = [growth] * (layers - 1) + [out]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels + i * growth, width, 3, padding=1) for i, width in enumerate(widths)
        )
        self.act = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs[:-1]:
            x = torch.cat([x, self.act(conv(x))], 1)
        return self.convs[-1](x)


class Enhancement(nn.Module):
    """x + strength * E(x), shape (B, C, H, W) kept; E = dense(C -> width), conv1, conv3, conv1, dense(width -> C).

    The last convolution starts at zero: a fresh block is the identity.
    """

    def __init__(self, channels: int = 3, width: int = 64, growth: int = 32, layers: int = 5,
                 strength: float = 0.2):  # fmt: skip
        super().__init__()
        self.strength = strength
        self.body = nn.Sequential(
            DenseBlock(channels, width, growth, layers),
            nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1),
            DenseBlock(width, channels, growth, layers),
        )  # fmt: skip
        self.rest()

    def rest(self) -> None:
        """Become the identity; training leaves it again."""
        with torch.no_grad():
            self.body[-1].convs[-1].weight.zero_()
            self.body[-1].convs[-1].bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.strength * self.body(x)
