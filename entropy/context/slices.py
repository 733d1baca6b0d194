"""What predicts a slice of the latent: the contract of slice models, and the plain convolutional one.

The coding loop (``entropy.hyperprior``) goes through the slices of y in order and codes each in two passes, first the
anchors, then the others. A slice model answers three questions, with tensors (training) or with grids (coding), in the
same words:

    state     = prepare(features, done, level)                       once per slice, before anything of it is known
    t, mu, s  = parameters(state, current, half, level, where)       once per pass
    c         = coded(state, mu, scale, v, half, where)              which symbols are coded; None for all of them
    r         = residual(state, t, q, value, half, where)            once its symbols q are known

    features  hyper features f of h_s (B, F, h, w)
    done      the finished slices before this one, a list of (B, c_j, h, w)
    current   what is known of this slice, (B, c, h, w): None in the first pass, in the second zero at the others
    half      0 for anchors, 1 for the others
    where     None: maps come back. Flat positions (n,): grids (1, C, n) at these come back
    t         whatever ``residual`` wants to see again; the loop hands it on unseen
    mu, s     mean in the domain of y, and scale in rows of the scale table (without the gain), c channels each
    scale     s with the gain: how many rows of the table the symbols really take
    v         in training what would be coded, in steps; None on the exact side, which does not know it
    c         mask, shaped like mu: a symbol that is not coded is zero, without a correction, and costs nothing
    q         symbols, shaped like mu: a tensor of integers
    value     (B, c, h, w): current with mu + q/gain where it was just coded; None unless ``spatial_residual``
    r         correction in steps, -0.5..0.5, shaped like mu; a grid on half the usual step
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..exact import ACT_FRAC, ExactConv2d, ExactReLU, Grid, bounded, cat, hardtanh
from ..gaussian import SCALE_MIN, SCALE_STEP
from ..levels import LevelBias

SCALE_GAIN = 8  # one unit of the networks' scale output is eight rows of the scale table
INIT_SIGMA = 0.3
INIT_SCALE = math.log(INIT_SIGMA / SCALE_MIN) / SCALE_STEP / SCALE_GAIN  # the bias of a scale output that gives INIT_SIGMA
SYMBOL_SEEN = 8  # a residual net sees symbols clamped to this

Map = Tensor | Grid


def seen_symbols(q: Tensor, exact: bool) -> Map:
    """Symbols as a residual net sees them, a tensor or a grid."""
    clipped = q.clamp(-SYMBOL_SEEN, SYMBOL_SEEN)
    return Grid(clipped * 2.0**ACT_FRAC) if exact else clipped


def half_step(r: Map) -> Map:
    """hardtanh(r) / 2: the answer of ``residual``."""
    if isinstance(r, Grid):
        return Grid(hardtanh(r).q, ACT_FRAC + 1)
    return 0.5 * hardtanh(r)


class SliceModel(nn.Module):
    """Mean, scale and residual prediction of one slice; see the head of this file."""

    spatial_residual = False  # whether ``residual`` looks at ``value``

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def prepare(self, features: Map, done: list[Map], level: Tensor | int) -> Any:
        raise NotImplementedError

    def parameters_at(self, state: Any, current: Map | None, half: int, level: Tensor | int,
                      where: Tensor | None) -> tuple[Any, Map, Map]:  # fmt: skip
        raise NotImplementedError

    def coded(self, state: Any, mu: Map, scale: Map, v: Tensor | None, half: int, where: Tensor | None) -> Tensor | None:
        return None

    def residual(self, state: Any, t: Any, q: Tensor, value: Map | None, half: int, where: Tensor | None) -> Map:
        raise NotImplementedError

    def start_scales(self, scales: Tensor) -> None:
        """Take scales (c,), in units of the networks' scale output, as those of a fresh model (see ``train.klt``)."""
        raise NotImplementedError


def trunk_and_head(model: Any, t: Map) -> tuple[Map, Map, Map]:
    """(t, mu, s) from the sum t that a slice model's trunk sees, by its pointwise ``trunk`` and ``head``; tensors or grids."""
    t = model.relu(model.trunk(model.relu(bounded(t))))
    out = model.head(t)
    mu, s = out[:, : model.channels], out[:, model.channels :]
    return t, mu, Grid(s.q * SCALE_GAIN) if isinstance(s, Grid) else s * SCALE_GAIN


class ConvSlice(SliceModel):
    """Everything known, squeezed to a few channels, through one convolution and a pointwise trunk.

    known = [slices < j, anchors of slice j] --1x1, kxk--> (+ hyper + level) --> trunk --> mu, s; the residual is pointwise.
    ``cfg`` is a LatentConfig. The first slice's first pass knows nothing: its context is that of zeros.
    """

    def __init__(self, known: int, channels: int, cfg: Any):
        super().__init__(channels)
        self.known = known
        self.squeeze = ExactConv2d(known + channels, cfg.squeeze, 1)
        self.context = ExactConv2d(cfg.squeeze, cfg.context, cfg.kernel)
        self.hyper = ExactConv2d(cfg.features, cfg.context, 1)
        self.bias = nn.ModuleList(LevelBias(cfg.context, cfg.knots, cfg.levels) for _ in range(2))
        self.trunk = ExactConv2d(cfg.context, cfg.trunk, 1)
        self.head = ExactConv2d(cfg.trunk, 2 * channels, 1)
        self.lrp_in = ExactConv2d(cfg.trunk + channels, cfg.residual, 1)
        self.lrp_out = ExactConv2d(cfg.residual, channels, 1)
        self.relu = ExactReLU()
        with torch.no_grad():
            self.head.weight.mul_(0.3)
            self.head.bias.zero_()
            self.head.bias[channels:] = INIT_SCALE
            self.lrp_out.weight.mul_(0.1)

    def prepare(self, features: Map, done: list[Map], level: Tensor | int) -> tuple[Map, list[Map]]:
        return self.hyper(features), done

    def parameters_at(self, state, current, half, level, where):
        hyper, done = state
        if where is None:
            if current is None:
                shape = hyper.shape
                current = hyper.new_zeros(shape[0], self.channels, *shape[2:])
            t = self.context(self.squeeze(torch.cat([*done, current], 1))) + hyper + self.bias[half](level)
            return trunk_and_head(self, t)
        h, w = hyper.shape[2:]
        known = [*done, *([] if current is None else [current])]
        if not known:  # one zero channel stands for nothing
            known = [Grid(hyper.q.new_zeros(1, 1, h, w))]
        stacked = cat(known)
        squeezed = self.squeeze.gather(stacked, channels=slice(0, stacked.shape[1])).reshape(1, -1, h, w)
        bias = self.bias[half](level).reshape(1, -1, 1)
        return trunk_and_head(self, self.context.gather(squeezed, where) + hyper.reshape(1, -1, h * w)[:, :, where] + bias)

    def start_scales(self, scales):
        self.head.bias[self.channels :] = scales

    def residual(self, state, t, q, value, half, where):
        return half_step(self.lrp_out(self.relu(self.lrp_in(cat([t, seen_symbols(q, where is not None)])))))
