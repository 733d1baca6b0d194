"""Residual blocks with a stride and generalised divisive normalisation: the published transforms from H/2 on.

Source: Cheng et al. 2020, "Learned image compression with discretized Gaussian mixture likelihoods and attention modules",
with GELU, as MLIC++ (Jiang et al. 2023) has them. GDN: Balle et al. 2016, "Density modeling of images using a generalized
normalization transformation".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Upsample

PEDESTAL = 2.0**-18  # keeps the gradient of the squared parameters alive at zero


class GDN(nn.Module):
    """x / sqrt(beta + gamma x^2) per position, or times the root where ``inverse``; beta >= 1e-6, gamma >= 0.

    Both are kept as roots, so that they stay positive while an optimiser moves them.
    """

    def __init__(self, channels: int, inverse: bool = False):
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter((torch.ones(channels) + PEDESTAL).sqrt())
        self.gamma = nn.Parameter((0.1 * torch.eye(channels) + PEDESTAL).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        beta = (self.beta.square() - PEDESTAL).clamp_min(1e-6)
        gamma = (self.gamma.square() - PEDESTAL).clamp_min(0)
        norm = F.conv2d(x.square(), gamma[:, :, None, None], beta)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


class GeluBlock(nn.Module):
    """x + gelu(conv3(gelu(conv3(x)))); shape (B, C, H, W) is kept."""

    def __init__(self, channels: int):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.b(F.gelu(self.a(x))))


class StridedBlock(nn.Module):
    """(B, C, H, W) -> (B, out, H/2, W/2): gdn(conv3(gelu(conv3 s2))) + conv1 s2."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.a = nn.Conv2d(channels, out, 3, stride=2, padding=1)
        self.b = nn.Conv2d(out, out, 3, padding=1)
        self.norm = GDN(out)
        self.skip = nn.Conv2d(channels, out, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(F.gelu(self.a(x)))) + self.skip(x)


class UpsamplingBlock(nn.Module):
    """(B, C, H, W) -> (B, out, 2H, 2W): igdn(conv3(gelu(subpel2))) + subpel2, sub-pixel convolutions of 3x3."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.a = Upsample(channels, out, kernel=3)
        self.b = nn.Conv2d(out, out, 3, padding=1)
        self.norm = GDN(out, inverse=True)
        self.skip = Upsample(channels, out, kernel=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(F.gelu(self.a(x)))) + self.skip(x)
