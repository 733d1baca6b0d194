"""Vectors that depend on the quality level: learned at knots, linear between them, integers once frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.blocks import knot_weights
from .exact import ACT_FRAC, ACT_MAX, Freezable, Grid


def interpolate(table: Tensor, level: int, levels: int) -> Tensor:
    """Integers (C,) at ``level`` 0..levels from an integer table (knots, C), linear between knots, halves upwards."""
    position = level * (len(table) - 1)
    k = min(position // levels, len(table) - 2)
    r = position - k * levels
    blend = table[k].long() * (levels - r) + table[k + 1].long() * r
    return torch.div(blend + levels // 2, levels, rounding_mode="floor")


class LevelBias(Freezable):
    """A vector (channels,) that depends on the level, linear between ``knots`` learned ones over 0..levels."""

    _frozen_names = ("table_q",)

    def __init__(self, channels: int, knots: int, levels: int):
        super().__init__()
        self.levels = levels
        self.table = nn.Parameter(torch.zeros(knots, channels))

    def _float_names(self) -> tuple[str, ...]:
        return ("table",)

    def _freeze(self) -> dict[str, Tensor]:
        return {"table_q": torch.round(self.table * 2**ACT_FRAC).clamp(-ACT_MAX, ACT_MAX).to(torch.int32)}

    def _thaw(self) -> dict[str, Tensor]:
        return {"table": self.table_q * 2.0**-ACT_FRAC}

    def forward(self, level: Tensor | int) -> Tensor | Grid:
        """level (B,) -> (B, channels, 1, 1); an integer level, once frozen -> grid (1, channels, 1, 1)."""
        if isinstance(level, int):
            return Grid(interpolate(self.table_q, level, self.levels).double()[None, :, None, None])
        return (knot_weights(level, len(self.table), self.levels) @ self.table)[:, :, None, None]
