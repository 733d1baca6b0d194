"""ACGC, the context model of S2LIC: adaptive channel-wise and global-inter context of the finished slices.

    P = finished slices (squeezed, in small presets)
    ac = ACCTX(P): a convolutional and a depth-wise branch, each gated by the other
    ag = AGCTX(P): deformable attention over samples of the whole map, and a depth-wise branch, gated likewise
    anchors:     [ac, ag, hyper]        --> mean, scale
    the others:  [ac, ag, hyper, local] --> mean, scale        local: a convolution over the anchors of this slice

The released code of S2LIC has no ``local``: its second pass sees the anchors only through the residual prediction, though
its figure runs the context again after them. ``see_anchors`` mends that; False is the code as released.

Exactness: offsets are rounded to sixteenths of a cell, so bilinear weights are whole numbers of 256ths; softmax, gates and
norms are those of ``exact_tables``. Batch norm, which an entropy model cannot have, is a layer norm over channels.
Sources: Wang et al. 2024, "S2LIC"; gates, Chen et al. 2023, "Dual aggregation transformer"; deformable attention, Xia et al.
2022, "Vision transformer with deformable attention".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..exact import ACT_FRAC, ACT_MAX, ExactConv2d, ExactReLU, Freezable, Grid, bounded, cat, shift_round
from ..exact_tables import (
    SOFTMAX_FRAC,
    SOFTMAX_REACH,
    ExactGELU,
    ExactLayerNorm,
    ExactSigmoid,
    ExactTanh,
    div_round,
)  # fmt: skip
from ..hyperprior import LatentBase, round_ste
from ..levels import LevelBias
from .mlic_parts import conv_stack
from .slices import INIT_SCALE, SCALE_GAIN, Map, SliceModel, half_step, seen_symbols

REACH = 2  # sampling steps by which an offset can move a sample
SUB = 16  # positions per cell
SCORES = 1 << 18  # held at a time, while they stay in a cache
SCORE_FRAC = 8  # grid of differences between scores
GATE_WIDTH = 4  # inside of a gate per position, and at least inside of one per channel
OFFSET_KERNEL = 5


@dataclass(frozen=True, kw_only=True)
class AcgcConfig(LatentBase):
    """Widths of the entropy model of S2LIC."""

    width: int  # hidden width of h_a (and, unless ``published_hyper``, of h_s)
    features: int  # channels that h_s hands to the slices
    squeeze: int  # channels to which the finished slices are reduced before their contexts; 0: as they are
    branch: int  # hidden width of the convolutional branch of the channel-wise context
    channel: int  # channels of the channel-wise context
    inter: int  # channels of the global-inter context
    head: int  # channels of an attention head
    samples: int = 1024  # keys of the global attention, at most
    local: int  # channels of the context of anchors
    kernel: int  # side of the convolutions over the attention's result and over the anchors
    parameters: tuple[int, ...]  # hidden widths of the nets for mean and scale
    residual: tuple[int, ...]  # hidden widths of the latent residual prediction
    spatial_residual: bool = False  # published: 3x3 on hyper means and slices; else pointwise on the parameter nets
    smooth: bool = True  # GELU; else ReLU, which is faster
    published_hyper: bool = False  # the published h_a and h_s; else those of the control
    see_anchors: bool = True


def mean_over_map(x: Map) -> Map:
    """(B, C, h, w) -> (B, C, 1, 1), grids rounded."""
    if not isinstance(x, Grid):
        return x.mean((2, 3), keepdim=True)
    count = x.q.new_full((1,), x.shape[2] * x.shape[3])
    return Grid(div_round(x.q.sum((2, 3), keepdim=True), count), x.frac, x.limit)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must also serve training
def sample_places(h: int, w: int, most: int, device: torch.device | str = "cpu") -> tuple[int, Tensor, Tensor]:
    """(step, rows (n,), columns (n,)): every ``step``-th cell both ways, with the least step for which n <= ``most``."""
    step = 1
    while -(-h // step) * -(-w // step) > most:
        step += 1
    rows, columns = (torch.arange(min(step // 2, (side - 1) % step), side, step) for side in (h, w))
    places = torch.cartesian_prod(rows, columns).to(device)
    return step, places[:, 0], places[:, 1]


def sample(x: Map, rows: Tensor, columns: Tensor) -> Map:
    """Bilinear samples (B, C, n) of x (B, C, h, w) at whole numbers ``rows``, ``columns`` (B, n) of 1/SUB cells."""
    q = x.q if isinstance(x, Grid) else x
    b, c, h, w = q.shape
    top, left = torch.floor(rows.detach() / SUB), torch.floor(columns.detach() / SUB)
    down, right = (rows - SUB * top)[:, None], (columns - SUB * left)[:, None]
    top, left = top.long(), left.long()
    bottom, far = (top + 1).clamp(max=h - 1), (left + 1).clamp(max=w - 1)
    flat = q.flatten(2)

    def pick(r: Tensor, s: Tensor) -> Tensor:
        return flat.gather(2, (r * w + s)[:, None].expand(-1, c, -1))

    upper = pick(top, left) * (SUB - right) + pick(top, far) * right
    lower = pick(bottom, left) * (SUB - right) + pick(bottom, far) * right
    total = upper * (SUB - down) + lower * down
    if isinstance(x, Grid):
        return Grid(shift_round(total, 8), x.frac, x.limit)
    return total / SUB**2


class GlobalAttention(Freezable):
    """softmax(q k / sqrt(d)) v: q (B, heads, d, N), k and v (B, heads, d, n) -> (B, heads, d, N).

    On integers, with s = q k - the largest of its row, on the product grid: e_i = table(round(-s_i to 2**-8)), and the result
    is div_round(sum e_i v_i, sum e_i). No probability is made, which would take a division per pair.
    Frozen: ``table_q`` int32, exp(-x) on 2**-20 for x = 0, 2**-8 .. 15, the last entry 0.
    """

    _frozen_names = ("table_q",)

    def _freeze(self) -> dict[str, Tensor]:
        x = torch.arange((SOFTMAX_REACH << SCORE_FRAC) + 1, dtype=torch.float64) * 2.0**-SCORE_FRAC
        table = torch.floor(torch.exp(-x) * 2.0**SOFTMAX_FRAC + 0.5).to(torch.int32)
        table[-1] = 0
        return {"table_q": table}

    def set_frozen(self, tensors: dict[str, Tensor]) -> None:
        if tensors["table_q"].shape != ((SOFTMAX_REACH << SCORE_FRAC) + 1,):
            raise ValueError("this is not the table of an attention")
        super().set_frozen(tensors)

    def forward(self, q: Map, k: Map, v: Map) -> Map:
        q, v = (q * q.shape[2] ** -0.5).transpose(-1, -2), v.transpose(-1, -2)
        if not isinstance(q, Grid):
            return (torch.softmax(q @ k, -1) @ v).transpose(-1, -2)
        self._need_frozen()
        pairs = k.shape[1] * k.shape[3]
        if max(k.shape[2] * q.limit * k.limit, k.shape[3] * v.limit << SOFTMAX_FRAC) >= 1 << 50:
            raise ValueError("attention over so many samples cannot be exact")
        table, shift = self.table_q.double(), q.frac + k.frac - SCORE_FRAC
        parts = []
        for part in q.q.split(max(1, SCORES // pairs), 2):
            scores = part @ k.q
            below = (scores.amax(-1, keepdim=True) - scores).mul_(2.0**-shift).add_(0.5)
            e = table[below.clamp_(max=len(table) - 1).long()]  # long cuts off: a floor of what is not negative
            total = e.sum(-1, keepdim=True)
            parts.append(div_round(e @ v.q, total.expand(*total.shape[:-1], v.shape[3])))
        return Grid(torch.cat(parts, 2).transpose(-1, -2), v.frac, v.limit)


class Functions:
    """The functions that the nets of a slice share, so that their tables are stored once. ``act`` is GELU, or ReLU."""

    def __init__(self, smooth: bool = True):
        self.gelu, self.sigmoid, self.tanh = ExactGELU(), ExactSigmoid(), ExactTanh()
        self.act: nn.Module = self.gelu if smooth else ExactReLU()


class Gate(nn.Sequential):
    """Two pointwise layers and a sigmoid: (B, inputs, h, w) -> (B, outputs, h, w) in 0..1."""

    def __init__(self, inputs: int, hidden: int, outputs: int, functions: Functions):
        super().__init__(
            ExactConv2d(inputs, hidden, 1), ExactLayerNorm(hidden, 1), functions.gelu,
            ExactConv2d(hidden, outputs, 1), functions.sigmoid,
        )  # fmt: skip


class Crossed(nn.Module):
    """Two branches (B, C, h, w), the first weighted per position or per channel by the second, and the other way round."""

    def __init__(self, channels: int, functions: Functions):
        super().__init__()
        self.spatial = Gate(channels, GATE_WIDTH, 1, functions)
        self.channel = Gate(channels, max(GATE_WIDTH, channels // 8), channels, functions)

    def forward(self, by_position: Map, by_channel: Map) -> Map:
        """by_position * S(by_channel) + by_channel * C(by_position)."""
        gated = by_position * self.spatial(by_channel) + by_channel * self.channel(mean_over_map(by_position))
        return bounded(gated)


def depthwise_branch(inputs: int, channels: int, functions: Functions) -> nn.Sequential:
    """A pointwise layer, then 3x3 in each channel."""
    return nn.Sequential(
        ExactConv2d(inputs, channels, 1),
        ExactConv2d(channels, channels, 3, groups=channels), ExactLayerNorm(channels, 1), functions.gelu,
    )  # fmt: skip


class ChannelContext(nn.Module):
    """ACCTX: (B, inputs, h, w) -> (B, channels, h, w)."""

    def __init__(self, inputs: int, hidden: int, channels: int, functions: Functions):
        super().__init__()
        self.attend = nn.Sequential(conv_stack((inputs, hidden, channels), 3, functions.act), functions.act)
        self.depthwise = depthwise_branch(inputs, channels, functions)
        self.crossed = Crossed(channels, functions)

    def forward(self, p: Map) -> Map:
        return self.crossed(self.attend(p), self.depthwise(p))


class InterContext(nn.Module):
    """AGCTX: (B, inputs, h, w) -> (B, channels, h, w), every position attending to samples of the whole map."""

    def __init__(self, inputs: int, head: int, channels: int, kernel: int, samples: int, functions: Functions):
        super().__init__()
        self.heads, self.samples = inputs // head, samples
        width = self.heads * head
        self.query = ExactConv2d(inputs, width, 1)
        self.key_value = ExactConv2d(inputs, 2 * width, 1)
        self.near = ExactConv2d(width, width, OFFSET_KERNEL, groups=width)
        self.gelu, self.tanh = functions.gelu, functions.tanh
        self.offset = ExactConv2d(width, 2, 1)
        self.attention = GlobalAttention()
        self.out = ExactConv2d(width, channels, kernel)
        self.depthwise = depthwise_branch(inputs, channels, functions)
        self.crossed = Crossed(channels, functions)
        with torch.no_grad():  # samples start near their cells
            self.offset.weight.mul_(0.1)
            self.offset.bias.zero_()

    def places(self, q: Map) -> tuple[Tensor, Tensor]:
        """Rows and columns (B, n) of the samples in 1/SUB cells, from the queries (B, C, h, w)."""
        h, w = q.shape[2:]
        exact = isinstance(q, Grid)
        step, rows, columns = sample_places(h, w, self.samples, q.q.device if exact else q.device)
        cells = rows * w + columns
        near = self.near.gather(q, cells) if exact else self.near(q).flatten(2)[:, :, cells]
        moved = self.tanh(self.offset(self.gelu(near)[..., None]))
        reach = REACH * step * SUB
        by = shift_round(moved.q * reach, moved.frac) if exact else round_ste(moved * reach)
        by = by[..., 0]
        return (SUB * rows + by[:, 0]).clamp(0, SUB * (h - 1)), (SUB * columns + by[:, 1]).clamp(0, SUB * (w - 1))

    def forward(self, p: Map) -> Map:
        b, _, h, w = p.shape
        q = self.query(p)
        key, value = self.key_value(sample(p, *self.places(q))[..., None]).chunk(2, 1)
        q, key, value = (t.reshape(b, self.heads, q.shape[1] // self.heads, -1) for t in (q, key, value))
        seen = self.attention(q, key, value).reshape(b, -1, h, w)
        return self.crossed(self.depthwise(p), self.out(seen))


class AcgcSlice(SliceModel):
    """Mean, scale and residual of a slice from the hyper features, the finished slices and the anchors (head of this file).

    ``cfg`` is an AcgcConfig. Nets for mean and scale, and for the residual, are separate for the two passes.
    """

    def __init__(self, known: int, channels: int, cfg: Any):
        super().__init__(channels)
        self.spatial_residual = cfg.spatial_residual
        inputs, local_inputs = cfg.features, channels
        functions = Functions(cfg.smooth)
        act = functions.act
        if known:
            p = cfg.squeeze or known
            self.reduce = ExactConv2d(known, p, 1) if cfg.squeeze else nn.Identity()
            self.channel_context = ChannelContext(p, cfg.branch, cfg.channel, functions)
            self.inter_context = InterContext(p, cfg.head, cfg.inter, cfg.kernel, cfg.samples, functions)
            inputs += cfg.channel + cfg.inter
        self.local = None
        if cfg.see_anchors:
            layers: list[nn.Module] = []
            if cfg.squeeze:
                layers, local_inputs = [ExactConv2d(channels, cfg.squeeze, 1, bias=False)], cfg.squeeze
            # on maps that are zero at the others: there it is a checkerboard-masked convolution
            self.local = nn.Sequential(*layers, ExactConv2d(local_inputs, cfg.local, cfg.kernel))
        per_pass = (inputs, inputs + cfg.local * cfg.see_anchors)
        self.nets = nn.ModuleList(conv_stack((n, *cfg.parameters, 2 * channels), 1, act) for n in per_pass)
        self.bias = nn.ModuleList(LevelBias(cfg.parameters[0], cfg.knots, cfg.levels) for _ in range(2))
        seen = cfg.features // 2 + known if cfg.spatial_residual else cfg.parameters[-1]
        widths, kernel = (seen + channels, *cfg.residual, channels), 3 if cfg.spatial_residual else 1
        self.lrp = nn.ModuleList(conv_stack(widths, kernel, act) for _ in range(2))
        with torch.no_grad():
            for net in self.nets:
                net[-1].weight.mul_(0.3)
                net[-1].bias.zero_()
            for net in self.lrp:
                net[-1].weight.mul_(0.1)
            self.start_scales(INIT_SCALE)

    def start_scales(self, scales):
        for net in self.nets:
            net[-1].bias[self.channels :] = scales

    def prepare(self, features: Map, done: list[Map], level: Tensor | int) -> tuple[list[Map], Map, list[Map]]:
        contexts = []
        if done:
            p = self.reduce(cat(done))
            contexts = [self.channel_context(p), self.inter_context(p)]
        means = features[:, features.shape[1] // 2 :]
        return [features, *contexts], means, done

    def parameters_at(self, state, current, half, level, where):
        seen = state[0]
        bias = self.bias[half](level)
        if where is not None:
            seen = [x.reshape(1, x.shape[1], -1)[:, :, where] for x in seen]
            bias = bias.reshape(1, -1, 1)
        if half and self.local is not None:
            *squeeze, local = self.local
            for layer in squeeze:
                current = layer(current)
            seen = [*seen, local(current) if where is None else local.gather(current, where)]
        first, *middle, head = self.nets[half]
        t = bounded(first(cat(seen)) + bias)
        for layer in middle:
            t = layer(t)
        out = head(t)
        mu, s = out[:, : self.channels], out[:, self.channels :]
        # a scale beyond the range of activations means the end of the table, as its largest value does
        return t, mu, Grid(s.q * SCALE_GAIN, ACT_FRAC, ACT_MAX * SCALE_GAIN) if isinstance(s, Grid) else s * SCALE_GAIN

    def residual(self, state, t, q, value, half, where):
        *layers, last = self.lrp[half]
        if not self.spatial_residual:
            x = cat([t, seen_symbols(q, where is not None)])
            for layer in layers:
                x = layer(x)
            return half_step(last(x))
        _, means, done = state
        x = cat([means, *done, value])
        for layer in layers:
            x = layer(x)
        return half_step(last(x) if where is None else last.gather(x, where))
