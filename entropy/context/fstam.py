"""FSTAM, the frequency and Swin attention of HCFSSNet's entropy model (arXiv 2511.20151), exact once frozen.

    x --1x1--> s --W-MSA block--> AFMM --SW-MSA block--> t
    out = x + 1x1(s + units(s) * sigmoid(units(t)))              1x1(x) where the width changes

The gate is that of TCM's attention (Liu et al. 2023), whose Swin blocks FSTAM replaces. Windows and DCT blocks start at the
corner of the map, so that nothing depends on more than the tile.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...nn.frequency import SIDE
from ..exact import ACT_MAX, ExactConv2d, ExactReLU, Grid, bounded, cat, matmul
from ..exact_tables import ExactActivation, ExactGELU, ExactLayerNorm, ExactSigmoid, div_round
from ..levels import LevelBias
from .attention import LearnedTable, Map, WindowBlock, merge, windows
from .slices import INIT_SCALE, SliceModel, half_step, seen_symbols, trunk_and_head

COSINES = (4096, 4017, 3784, 3406, 2896, 2276, 1567, 799)  # round(2**13 * cos(k pi / 16) / 2)
DCT_FRAC = 26  # grid of the two-dimensional transform, twice that of COSINES
LOG_FLOOR = 1 / 16
LOG_REACH = 32  # of the table: stronger coefficients count as this


@lru_cache(maxsize=2)
@torch.inference_mode(False)  # what is kept must also serve training
def exact_dct(device: torch.device | str = "cpu") -> Grid:
    """The 8x8 DCT-II (64 frequencies, 64 samples) from integers, no cosine needed: within 2**-13 of the true one."""

    def cosine(k: int) -> int:  # of k pi / 16
        k %= 32
        k = min(k, 32 - k)
        return COSINES[k] if k < 8 else 0 if k == 8 else -COSINES[16 - k]

    rows = [[2896 if m == 0 else cosine((2 * j + 1) * m) for j in range(SIDE)] for m in range(SIDE)]
    dct = torch.tensor(rows, dtype=torch.float64, device=device)
    return Grid(torch.kron(dct, dct), DCT_FRAC, 1 << (DCT_FRAC - 2))


class ExactAFMM(nn.Module):
    """``nn.frequency.AFMM`` for entropy models: the same steps on tensors and grids, shape (B, C, h, w) is kept.

    The logarithm has the floor LOG_FLOOR here, which a table can hold; frames of zeros pad the blocks at the borders.
    """

    def __init__(self, channels: int, ratio: int = 2):
        super().__init__()
        hidden = max(channels // 8, 4)
        self.base = LearnedTable(channels, SIDE * SIDE)
        self.log = ExactActivation(lambda e: torch.log(LOG_FLOOR + e), 0, LOG_REACH)
        self.squeeze, self.excite = ExactConv2d(channels, hidden, 1), ExactConv2d(hidden, channels, 1)
        self.sigmoid, self.gelu = ExactSigmoid(), ExactGELU()
        self.up = ExactConv2d(channels, ratio * channels, 1)
        self.mix = ExactConv2d(ratio * channels, ratio * channels, 3, groups=ratio * channels)
        self.down = ExactConv2d(ratio * channels, channels, 1)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)
        self.register_buffer("basis", exact_dct().value().float(), persistent=False)

    def forward(self, x: Map) -> Map:
        h, w = x.shape[2:]
        basis = exact_dct(x.q.device) if isinstance(x, Grid) else self.basis
        y = matmul(windows(x, SIDE), basis.transpose(0, 1))  # (B, blocks, C, 64)
        gate = self.excite(self.gelu(self.squeeze(self.log(_mean_strength(y)))))  # (B, C, 64, 1)
        gate = self.sigmoid(bounded(gate.reshape(*gate.shape[:3]) + self.base(isinstance(x, Grid))))
        y = bounded(y * _doubled(gate)[:, None])
        x = merge(matmul(y, basis), h, w, SIDE)
        return self.down(self.gelu(self.mix(self.up(x))))


def _mean_strength(y: Map) -> Map:
    """(B, blocks, C, 64) -> mean of |y| over the blocks, (B, C, 64, 1)."""
    if not isinstance(y, Grid):
        return y.abs().mean(1)[..., None]
    count = y.q.new_full((1,), y.shape[1])
    total = y.q.abs().sum(1)  # below 2**20 for each of fewer than 2**31 blocks
    return Grid(div_round(total, count.expand_as(total)).clamp(max=ACT_MAX)[..., None])


def _doubled(gate: Map) -> Map:
    return Grid(2 * gate.q, gate.frac, 2 * gate.limit) if isinstance(gate, Grid) else 2 * gate


class ResidualUnit(nn.Module):
    """gelu(x + 1x1(gelu(3x3(gelu(1x1(x)))))) on half the channels inside (TCM)."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.enter, self.leave = ExactConv2d(channels, half, 1), ExactConv2d(half, channels, 1)
        self.mix = ExactConv2d(half, half, 3)
        self.gelu = ExactGELU()

    def forward(self, x: Map) -> Map:
        branch = self.leave(self.gelu(self.mix(self.gelu(self.enter(x)))))
        return self.gelu(bounded(x + branch))


class FSTAM(nn.Module):
    """See the head of this file. (B, C, h, w) -> (B, out, h, w); ``width`` inside, ``units`` residual units a branch."""

    def __init__(self, channels: int, out: int, width: int, heads: int, units: int, window: int = SIDE):
        super().__init__()
        self.direct = nn.Identity() if out == channels else ExactConv2d(channels, out, 1)
        self.squeeze = ExactConv2d(channels, width, 1)
        self.first, self.second = WindowBlock(width, heads, window), WindowBlock(width, heads, window, window // 2)
        self.norm, self.frequency = ExactLayerNorm(width, 1), ExactAFMM(width)
        self.value = nn.Sequential(*(ResidualUnit(width) for _ in range(units)))
        self.gate = nn.Sequential(*(ResidualUnit(width) for _ in range(units)), ExactConv2d(width, width, 1), ExactSigmoid())
        self.leave = ExactConv2d(width, out, 1)
        with torch.no_grad():
            self.leave.weight.mul_(0.1)

    def forward(self, x: Map) -> Map:
        s = self.squeeze(x)
        t = self.first(s)
        t = self.second(bounded(t + self.frequency(self.norm(t))))
        s = bounded(s + self.value(s) * self.gate(t))
        return bounded(self.direct(x) + self.leave(s))


class FstamSlice(SliceModel):
    """Hyper features and finished slices through FSTAM, then two checkerboard passes.

    support = FSTAM([hyper, slices < j]) --3x3--> (+ kxk of the anchors + level) --> trunk --> mu, s. With two ``branches``
    mean and scale have nets and features of their own, as in TCM; with one they share all. The first pass needs no more than
    the pointwise trunk. The residual prediction is pointwise, or ``spatial`` as in TCM.
    ``cfg`` is a codecs.hcfssnet.EntropyConfig.
    """

    def __init__(self, known: int, channels: int, cfg: Any):
        super().__init__(channels)
        n = self.branches = cfg.branches
        if n not in (1, 2):
            raise ValueError(f"1 or 2 branches predict mean and scale, not {n}")
        wide = cfg.features + known
        kept = cfg.squeeze or wide
        self.fstam = nn.ModuleList(FSTAM(wide, kept, cfg.attention, cfg.heads, cfg.units) for _ in range(n))
        self.support = nn.ModuleList(ExactConv2d(kept, cfg.context, 3) for _ in range(n))
        self.anchors = ExactConv2d(channels, n * cfg.context, cfg.kernel)
        self.bias = nn.ModuleList(LevelBias(n * cfg.context, cfg.knots, cfg.levels) for _ in range(2))
        self.trunk = ExactConv2d(n * cfg.context, n * cfg.trunk, 1, groups=n)
        self.head = ExactConv2d(n * cfg.trunk, 2 * channels, 1, groups=n)
        self.relu = ExactReLU()
        self.spatial_residual = cfg.spatial
        if cfg.spatial:
            self.lrp_in = ExactConv2d(kept + channels, cfg.residual, 3)
            self.lrp_middle = ExactConv2d(cfg.residual, cfg.trunk, 3)
            self.lrp_out = ExactConv2d(cfg.trunk, channels, 3)
        else:
            self.lrp_in = ExactConv2d(n * cfg.trunk + channels, cfg.residual, 1)
            self.lrp_out = ExactConv2d(cfg.residual, channels, 1)
        with torch.no_grad():
            self.head.weight.mul_(0.3)
            self.head.bias.zero_()
            self.head.bias[channels:] = INIT_SCALE
            self.lrp_out.weight.mul_(0.1)

    def prepare(self, features: Map, done: list[Map], level: Tensor | int) -> tuple[Map, Map]:
        """(context layer without anchors and level, support of the mean)."""
        parts = features.chunk(self.branches, 1)
        support = [net(cat([part, *done])) for net, part in zip(self.fstam, parts)]
        return cat([conv(x) for conv, x in zip(self.support, support)]), support[0]

    def parameters_at(self, state, current, half, level, where):
        known, bias = state[0], self.bias[half](level)
        if where is None:
            return trunk_and_head(self, known + bias if current is None else known + self.anchors(current) + bias)
        t = known.reshape(1, known.shape[1], -1)[:, :, where] + bias.reshape(1, -1, 1)
        if current is not None:
            t = t + self.anchors.gather(current, where)
        return trunk_and_head(self, t)

    def start_scales(self, scales):
        self.head.bias[self.channels :] = scales

    def residual(self, state, t, q, value, half, where):
        if self.spatial_residual:
            r = self.relu(self.lrp_middle(self.relu(self.lrp_in(cat([state[1], value])))))
            return half_step(self.lrp_out(r) if where is None else self.lrp_out.gather(r, where))
        return half_step(self.lrp_out(self.relu(self.lrp_in(cat([t, seen_symbols(q, where is not None)])))))
