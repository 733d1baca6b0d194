"""Entropy-path parts of the MLIC family (Jiang et al. 2023, MLIC++), which S2LIC and MLICv2 take over: exact once frozen.

    hyper_analysis      y (B, M, h, w) -> z (B, hyper, h/4, w/4), float
    hyper_synthesis     z^ -> (B, 2M, 4h, 4w): the first half belongs to the scales, the second to the means
    conv_stack          the nets of mean and scale (1x1) and of the latent residual (3x3)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...nn.blocks import LevelAffine
from ..exact import ExactConv2d, Grid, bounded, pixel_shuffle
from ..exact_tables import ExactGELU
from ..hyperprior import ContextHyperprior
from ..levels import LevelBias


class ExactShuffle(nn.Module):
    """Pixel shuffle by 2 of a tensor or a grid."""

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        return pixel_shuffle(x, 2)


def hyper_analysis(channels: int, width: int, hyper: int) -> nn.Sequential:
    """h_a: five 3x3 convolutions, two of them with stride 2, GELU between."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
        nn.Conv2d(width, hyper, 3, stride=2, padding=1),
    )  # fmt: skip


def hyper_synthesis(hyper: int, channels: int) -> nn.Sequential:
    """h_s: from z^ to 2 * ``channels`` maps at the resolution of y, two 3x3 sub-pixel convolutions on the way."""
    wide, gelu = channels * 3 // 2, ExactGELU()  # one function, whose table is stored once
    return nn.Sequential(
        ExactConv2d(hyper, channels, 3), gelu,
        ExactConv2d(channels, 4 * channels, 3), ExactShuffle(), gelu,
        ExactConv2d(channels, wide, 3), gelu,
        ExactConv2d(wide, 4 * wide, 3), ExactShuffle(), gelu,
        ExactConv2d(wide, 2 * channels, 3),
    )  # fmt: skip


def conv_stack(widths: tuple[int, ...], kernel: int, act: nn.Module) -> nn.Sequential:
    """Convolutions from widths[0] to widths[-1] channels, ``act`` between."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [ExactConv2d(inputs, outputs, kernel), act]
    return nn.Sequential(*layers[:-1])


class PublishedHyper(ContextHyperprior):
    """The shared coding loop with the hyper pair above where the config says ``published_hyper``."""

    def _build_hyper(self, cfg: Any) -> None:
        if not cfg.published_hyper:
            super()._build_hyper(cfg)
            return
        if cfg.features != 2 * cfg.channels:
            raise ValueError("the published hyper synthesis gives twice the channels of y")
        self.h_a_level = LevelAffine(cfg.channels, cfg.knots, cfg.levels)
        self.h_a = hyper_analysis(cfg.channels, cfg.width, cfg.hyper)
        self.z_gain = LevelAffine(cfg.hyper, cfg.knots, cfg.levels)
        self.h_s_bias = LevelBias(cfg.features, cfg.knots, cfg.levels)
        self.h_s = hyper_synthesis(cfg.hyper, cfg.channels)

    def hyper_synthesis(self, z_hat: Tensor | Grid, level: Tensor | int) -> Tensor | Grid:
        if not self.cfg.published_hyper:
            return super().hyper_synthesis(z_hat, level)
        return bounded(self.h_s(z_hat) + self.h_s_bias(level))
