"""Channel-wise autoregressive slices (ChARM, Minnen and Singh 2020), with the nets of TCM (Liu et al. 2023).

The mean of a slice follows from the hyper means and all finished slices, its scale from the hyper scales and the same, each
by three 3x3 convolutions; the residual net sees the mean's support and the slice itself. Nothing of the slice enters its own
parameters, so both passes of the coding loop share one evaluation.
"""

from __future__ import annotations

import torch
from torch import nn

from ..exact import ExactConv2d, Grid, cat
from ..exact_tables import ExactGELU
from .slices import INIT_SCALE, SCALE_GAIN, Map, SliceModel, half_step


def conv_net(channels: int, hidden: tuple[int, int], out: int) -> nn.Sequential:
    """conv3, GELU, conv3, GELU, conv3: (B, channels, h, w) -> (B, out, h, w)."""
    a, b = hidden
    return nn.Sequential(ExactConv2d(channels, a, 3), ExactGELU(), ExactConv2d(a, b, 3), ExactGELU(), ExactConv2d(b, out, 3))


def at_positions(x: Map, where: torch.Tensor | None) -> Map:
    """A map (B, C, h, w), or its values (B, C, n) at flat positions."""
    return x if where is None else x.reshape(*x.shape[:2], -1)[:, :, where]


class CharmSlice(SliceModel):
    """``cfg``: channels, and ``context``, the two hidden widths. Features (B, 2M, h, w): hyper means, then hyper scales."""

    spatial_residual = True

    def __init__(self, known: int, channels: int, cfg):
        super().__init__(channels)
        self.hyper = cfg.channels
        self.mean = conv_net(self.hyper + known, cfg.context, channels)
        self.scale = conv_net(self.hyper + known, cfg.context, channels)
        self.lrp = conv_net(self.hyper + known + channels, cfg.context, channels)
        with torch.no_grad():
            self.scale[-1].weight.mul_(0.3)
            self.scale[-1].bias.fill_(INIT_SCALE)
            self.lrp[-1].weight.mul_(0.1)

    def prepare(self, features, done, level):
        means, scales = features.split(self.hyper, 1)
        support = cat([means, *done])
        return support, self.mean(support), self.scale(cat([scales, *done]))

    def parameters_at(self, state, current, half, level, where):
        mu, s = (at_positions(x, where) for x in state[1:])
        if isinstance(s, Grid):
            return None, mu, Grid(s.q * SCALE_GAIN, s.frac, s.limit * SCALE_GAIN)
        return None, mu, s * SCALE_GAIN

    def residual(self, state, t, q, value, half, where):
        return at_positions(half_step(self.lrp(cat([state[0], value]))), where)
