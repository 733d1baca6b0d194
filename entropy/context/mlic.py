"""The multi-reference contexts of MLIC++ and MLICv2, as a slice model.

    features f --+------------------------------------------------+
    slices < j --+--> channel (convolutions), inter (linear global attention)  --> parameters --> mu, s of the anchors
    anchors of j ---> local (window attention), intra (global, guided by slice j-1) --> parameters --> of the others
                                                       residual <-- what was just coded, slices < j, f

Sources: Jiang et al. 2023, "MLIC++: Linear complexity multi-reference entropy modeling", and 2025, "MLICv2". Of the latter:
``rope`` (rotary embedding in place of the bias table), ``guide`` (global correlation of the hyper features, for the first
slice), ``reweight`` (attention between the channels of a context), ``selective`` (coding of a part of the symbols). Every
published width is a number here, and small ones are the light presets; what small models do otherwise:
``centre`` (only the position to be coded asks its window, instead of all tokens asking each other), ``shared`` (one
parameter net for both passes, of which the first sees the inputs it has), a pointwise residual.

All attention is linear in the positions but for the window's, and exact: probabilities have 20 bits, averages are sums of
integers, the turns of the rotary embedding are integers made at freeze time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..exact import (
    ACT_FRAC,
    ACT_MAX,
    FLOAT64_EXACT,
    ExactConv2d,
    ExactLinear,
    ExactReLU,
    Freezable,
    Grid,
    bounded,
    cat,
    matmul,
    patch_index,
    quantise,
    shift_round,
)  # fmt: skip
from ..exact_tables import ExactGELU, ExactLayerNorm, ExactSigmoid, ExactSoftmax, div_round, isqrt
from ..gaussian import SCALE_MIN, SCALE_STEP
from ..hyperprior import LatentBase
from ..levels import LevelBias
from .attention import LearnedTable
from .checkerboard import anchor_mask, positions
from .slices import INIT_SCALE, SCALE_GAIN, Map, SliceModel, half_step, seen_symbols

TURNS = 64  # rows and columns that the rotary embedding tells apart; it starts again beyond
TURN_FRAC = 14  # grid of cosines and sines
THETA = 10000.0
MASKED = -100.0  # logit of a token that must not be seen
REWEIGHT_MAX = 16  # clamp of queries and keys whose products are summed over all positions
SELECT_SIGMA = 0.3  # steps: where the scale is below, a symbol is hardly ever but zero (MLICv2's threshold)
SELECT_ROW = math.log(SELECT_SIGMA / SCALE_MIN) / SCALE_STEP
SELECT_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class MlicConfig(LatentBase):
    """Widths of the contexts and nets; a context of width 0 is left out."""

    width: int  # hidden width of h_a (and of h_s where that is not the published one)
    features: int  # channels that h_s gives
    published_hyper: bool = False
    channel: tuple[tuple[int, int], ...]  # (width, kernel) of the layers of the channel context
    local: int
    inter: int
    intra: int
    attention: int = 0  # channels inside of an attention; 0: as many as come in
    head: int = 16  # channels of a head, of the inter context ``inter_head``
    inter_head: int = 32
    window: int = 5
    centre: bool = False
    project: int = 5  # kernel behind a global attention
    mlp: bool = True  # the small net behind a context
    entropy: tuple[int, ...] = (320, 256, 128)  # hidden widths of the parameter nets
    shared: bool = False
    residual: tuple[int, ...] = (224, 128)
    residual_kernel: int = 3  # 1: pointwise, of the hidden layer before the parameters and the symbols
    gelu: bool = True
    rope: bool = False
    guide: int = 0
    reweight: bool = False
    selective: bool = False


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must also serve training
def coordinates(h: int, w: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Row and column (h*w,) of every flat position."""
    at = torch.arange(h * w, device=device)
    return at // w, at % w


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def window_anchors(h: int, w: int, side: int, device: torch.device | str = "cpu") -> Tensor:
    """(h*w, side*side) bool: whether that token of the window around each position is an anchor of the picture."""
    mask = F.pad(anchor_mask(h, w, device), (side // 2,) * 4).reshape(-1)
    return mask[patch_index(h, w, side, 1, w + side - 1, mask.device)] > 0


def at(x: Map, where: Tensor | None) -> Map:
    """x (B, C, h, w) at flat positions (B, C, n); all of them as a map where ``where`` is None."""
    return x if where is None else x.reshape(*x.shape[:2], -1)[:, :, where]


def spread(x: Map, where: Tensor, h: int, w: int) -> Map:
    """Inverse of ``at``: (B, C, n) -> (B, C, h, w), zero elsewhere."""

    def move(q: Tensor) -> Tensor:
        return q.new_zeros(*q.shape[:2], h * w).index_copy(2, where, q).reshape(*q.shape[:2], h, w)

    return x.move(move) if isinstance(x, Grid) else move(x)


def masked(x: Map, mask: Tensor) -> Map:
    return x.masked(mask) if isinstance(x, Grid) else x * mask


def windows(x: Map, index: Tensor, margin: int) -> Map:
    """x (B, C, h, w) -> (B, C, n, k): values at ``index`` (n, k) of the map with a margin of zeros around it."""

    def move(q: Tensor) -> Tensor:
        flat = F.pad(q, (margin,) * 4).flatten(2)
        return flat.gather(2, index.reshape(1, 1, -1).expand(*flat.shape[:2], -1)).unflatten(2, index.shape)

    return x.move(move) if isinstance(x, Grid) else move(x)


def average(p: Map, v: Map, mass: int = 1) -> Map:
    """(..., n, k) @ (..., k, m), where |p| adds up to at most ``mass`` along k, but for its rounding.

    Exact for any k that fits a memory: the sums are bounded by what p adds up to, not by k.
    """
    if not isinstance(p, Grid):
        return p @ v
    if v.frac != ACT_FRAC or 2 * ((mass << p.frac) + 2 * p.shape[-1]) * v.limit >= FLOAT64_EXACT:
        raise ValueError("this average cannot be exact")
    return Grid(shift_round(p.q @ v.q, p.frac).clamp_(-ACT_MAX, ACT_MAX))


class Stack(nn.Module):
    """Convolutions (width, kernel) with an activation between them; the last can be had at flat positions only."""

    def __init__(self, channels: int, layers: list[tuple[int, int]], act: nn.Module):
        super().__init__()
        widths = [channels, *(width for width, _ in layers)]
        self.convs = nn.ModuleList(ExactConv2d(a, *layer) for a, layer in zip(widths, layers))
        self.last = self.convs[-1]
        self.act = act

    def forward(self, x: Map, where: Tensor | None = None) -> Map:
        for conv in self.convs[:-1]:
            x = self.act(conv(x))
        return self.last(x) if where is None else self.last.gather(x, where)


class Mix(nn.Module):
    """1x1, then 3x3 per channel: how the global attentions make queries, keys and values."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.point = ExactConv2d(channels, out, 1)
        self.depth = ExactConv2d(out, out, 3, groups=out)

    def forward(self, x: Map) -> Map:
        return self.depth(self.point(x))


class ExactGate(nn.Module):
    """x * sigmoid(conv1(act(dw3(act(conv1(x)))))): ``nn.mixing.Gate`` in exact words."""

    def __init__(self, channels: int, act: nn.Module):
        super().__init__()
        self.a = ExactConv2d(channels, channels, 1)
        self.depth = ExactConv2d(channels, channels, 3, groups=channels)
        self.b = ExactConv2d(channels, channels, 1)
        self.act, self.sigmoid = act, ExactSigmoid()

    def forward(self, x: Map) -> Map:
        return x * self.sigmoid(self.b(self.act(self.depth(self.act(self.a(x))))))


class Rotary(Freezable):
    """Turns pairs of channels by row * theta_y^(-2m/C) + column * theta_x^(-2m/C), both thetas learned.

    Frozen: ``turn_q`` int16 (2 axes, TURNS, C/2 pairs, cosine and sine) on 2**-TURN_FRAC.
    """

    _frozen_names = ("turn_q",)
    turn_q: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.pairs = channels // 2
        self.log_theta = nn.Parameter(torch.full((2,), math.log(THETA)))

    def _float_names(self) -> tuple[str, ...]:
        return ("log_theta",)

    def _turns(self, at: Tensor, log_theta: Tensor) -> Tensor:
        """(2, n, pairs, 2) cosines and sines of positions (n,) along either axis."""
        exponent = torch.arange(self.pairs, device=at.device, dtype=log_theta.dtype) / self.pairs
        angle = at[None, :, None] * torch.exp(-log_theta[:, None] * exponent)[:, None]
        return torch.stack([angle.cos(), angle.sin()], -1)

    def _freeze(self) -> dict[str, Tensor]:
        turns = self._turns(torch.arange(TURNS, device=self.log_theta.device), self.log_theta.double())
        return {"turn_q": torch.floor(turns * 2.0**TURN_FRAC + 0.5).to(torch.int16)}

    def _thaw(self) -> dict[str, Tensor]:
        """From the turns of pair 1 over all positions of either axis; ``forward`` goes on with the table."""
        cosine, sine = self.turn_q[:, :, 1].double().unbind(-1)
        turns = torch.atan2(sine, cosine).diff(dim=1)
        per_step = (torch.remainder(turns + math.pi, 2 * math.pi) - math.pi).mean(1)
        return {"log_theta": -per_step.log() * self.pairs}

    def set_frozen(self, tensors: dict[str, Tensor]) -> None:
        turn = tensors["turn_q"]
        if turn.dtype != torch.int16 or turn.shape != (2, TURNS, self.pairs, 2) or int(turn.abs().max()) > 1 << TURN_FRAC:
            raise ValueError("this is not the table of a rotary embedding")
        super().set_frozen(tensors)

    def forward(self, x: Map, rows: Tensor, cols: Tensor) -> Map:
        """x (..., C, n), whose n tokens lie at ``rows`` and ``cols`` (n,) -> the same shape; |a| + |b| at most doubles."""
        parts: list[Any] = []
        for axis, where in enumerate((rows, cols)):
            if self.frozen:  # also the float path of a thawed model
                turn = self.turn_q[axis, where % TURNS].permute(2, 1, 0)
                if isinstance(x, Grid):
                    parts += [Grid(t, TURN_FRAC, 1 << TURN_FRAC) for t in turn.double()]
                else:
                    parts += list(turn.to(x.dtype) * 2.0**-TURN_FRAC)
            else:
                parts += list(self._turns(where % TURNS, self.log_theta)[axis].permute(2, 1, 0))
        cos_y, sin_y, cos_x, sin_x = parts
        cos, sin = cos_y * cos_x - sin_y * sin_x, sin_y * cos_x + cos_y * sin_x
        a, b = x[..., : self.pairs, :], x[..., self.pairs :, :]
        turned = cat([a * cos - b * sin, a * sin + b * cos], -2)
        return turned.clamp(2 * x.limit) if isinstance(x, Grid) else turned


class Tools(nn.Module):
    """Activation and softmax of a slice: their tables are stored once."""

    def __init__(self, cfg: MlicConfig):
        super().__init__()
        self.act = ExactGELU() if cfg.gelu else ExactReLU()
        self.softmax = ExactSoftmax(-1)


class LinearAttention(nn.Module):
    """softmax_channels(q)^T (softmax_positions(k) v^T), head by head: (B, C, n), (B, C, m), (B, C, m) -> (B, C, n).

    The rotary embedding acts behind the two feature maps, as in RoFormer's linear attention.
    """

    def __init__(self, channels: int, head: int, rope: bool, tools: Tools):
        super().__init__()
        self.shape = max(1, channels // head), min(head, channels)
        self.softmax, self.mass = tools.softmax, 2 if rope else 1
        self.rotary = Rotary(self.shape[1]) if rope else None

    def forward(self, q: Map, k: Map, v: Map, at_q: tuple[Tensor, Tensor], at_k: tuple[Tensor, Tensor]) -> Map:
        """``at_q``, ``at_k``: rows and columns of the tokens."""
        q, k, v = (t.reshape(t.shape[0], *self.shape, -1) for t in (q, k, v))
        q = self.softmax(q.transpose(-1, -2)).transpose(-1, -2)
        k = self.softmax(k)
        if self.rotary is not None:
            q, k = self.rotary(q, *at_q), self.rotary(k, *at_k)
        summary = average(k, v.transpose(-1, -2), self.mass)  # (B, heads, of the keys, of the values)
        out = average(q.transpose(-1, -2), summary, self.mass).transpose(-1, -2)
        return out.reshape(out.shape[0], -1, out.shape[-1])


class Reweight(nn.Module):
    """Attention between channels: y = norm(conv1(softmax(q k^T / sqrt(h w)) v)); x + y + gate(y). (B, C, h, w) kept."""

    def __init__(self, channels: int, tools: Tools):
        super().__init__()
        self.norm = ExactLayerNorm(channels, 1)
        self.qkv = ExactConv2d(channels, 3 * channels, 1)
        self.out = ExactConv2d(channels, channels, 1)
        self.out_norm = ExactLayerNorm(channels, 1)
        self.gate = ExactGate(channels, tools.act)
        self.softmax = tools.softmax

    def _logits(self, q: Map, k: Map) -> Map:
        """q k^T / sqrt(positions) of (B, C, n), clamped to +-REWEIGHT_MAX before, over C x C."""
        if not isinstance(q, Grid):
            return q.clamp(-REWEIGHT_MAX, REWEIGHT_MAX) @ k.clamp(-REWEIGHT_MAX, REWEIGHT_MAX).mT / math.sqrt(q.shape[-1])
        limit, n = REWEIGHT_MAX << ACT_FRAC, q.shape[-1]
        if n * limit * limit >= 1 << 51:
            raise ValueError(f"{n} positions are too many for an exact reweighting")
        products = q.clamp(limit).q @ k.clamp(limit).q.mT
        root = isqrt(products.new_tensor(float(n << 2 * ACT_FRAC)))
        return Grid(div_round(products, root.expand_as(products)), ACT_FRAC, isqrt_bound(n) * REWEIGHT_MAX**2 << ACT_FRAC)

    def forward(self, x: Map) -> Map:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3 * c, h * w).split(c, 1)
        y = average(self.softmax(self._logits(q, k)), v).reshape(b, c, h, w)
        y = self.out_norm(self.out(y))
        return bounded(x + y + self.gate(y))


def isqrt_bound(n: int) -> int:
    """An integer of at least sqrt(n)."""
    return math.isqrt(n) + 1


class Project(nn.Module):
    """What follows a global attention: convolution, then skip + a small net. (B, d, h, w) -> (B, out, h, w)."""

    def __init__(self, channels: int, middle: int, out: int, cfg: MlicConfig, tools: Tools):
        super().__init__()
        self.mix = ExactConv2d(channels, middle, cfg.project)
        self.skip = ExactConv2d(middle, out, 1) if middle != out else None
        self.mlp = nn.ModuleList()
        if cfg.mlp:
            self.mlp.append(ExactConv2d(middle, 2 * out, 1))
            self.mlp.append(ExactConv2d(2 * out, 2 * out, 3, groups=2 * out))
            self.mlp.append(ExactConv2d(2 * out, out, 1))
        self.act = tools.act

    def forward(self, x: Map) -> Map:
        x = self.mix(x)
        y = x if self.skip is None else self.skip(x)
        if not len(self.mlp):
            return y
        a, depth, b = self.mlp
        return bounded(y + b(self.act(depth(self.act(a(x))))))


class InterContext(nn.Module):
    """Global, of all earlier slices: every position asks every position."""

    def __init__(self, known: int, cfg: MlicConfig, tools: Tools):
        super().__init__()
        d = cfg.attention or known
        self.query, self.key, self.value = (Mix(known, d) for _ in range(3))
        self.attend = LinearAttention(d, cfg.inter_head, cfg.rope, tools)
        self.project = Project(d, 3 * cfg.inter // 2 if cfg.mlp else cfg.inter, cfg.inter, cfg, tools)

    def forward(self, done: Map) -> Map:
        b, _, h, w = done.shape
        here = coordinates(h, w, device_of(done))
        q, k, v = (f(done).reshape(b, -1, h * w) for f in (self.query, self.key, self.value))
        return self.project(self.attend(q, k, v, here, here).reshape(b, -1, h, w))


class IntraContext(nn.Module):
    """Global, of this slice's anchors, by the likeness of positions in the slice before: (B, out, h, w)."""

    def __init__(self, previous: int, channels: int, cfg: MlicConfig, tools: Tools):
        super().__init__()
        d = cfg.attention or channels
        self.query, self.key, self.value = Mix(previous, d), Mix(previous, d), Mix(channels, d)
        self.attend = LinearAttention(d, cfg.head, cfg.rope, tools)
        self.project = Project(d, cfg.intra, cfg.intra, cfg, tools)

    def forward(self, previous: Map, current: Map) -> Map:
        h, w = current.shape[2:]
        device = device_of(current)
        anchors, others = positions(h, w, device)
        mask, (rows, cols) = anchor_mask(h, w, device), coordinates(h, w, device)
        q = at(self.query(masked(previous, 1 - mask)), others)
        k, v = at(self.key(masked(previous, mask)), anchors), at(self.value(current), anchors)
        out = self.attend(q, k, v, (rows[others], cols[others]), (rows[anchors], cols[anchors]))
        return self.project(spread(out, others, h, w))


class GuideContext(nn.Module):
    """Global, of the hyper features, for the first slice (HGCP): anchors ask the others and the other way round.

    In the second pass the values that the others ask for are the decoded anchors.
    """

    def __init__(self, channels: int, cfg: MlicConfig, tools: Tools):
        super().__init__()
        self.seen = min(cfg.channels, cfg.features)
        d = cfg.attention or self.seen
        self.query, self.key, self.value = (Mix(self.seen, d) for _ in range(3))
        self.decoded = ExactConv2d(channels, d, 1)
        self.attend = LinearAttention(d, d // 2, cfg.rope, tools)
        self.mix = ExactConv2d(d, cfg.guide, 3)
        self.gate = ExactGate(cfg.guide, tools.act)

    def begin(self, features: Map) -> tuple[Map, Map, Map]:
        """What both passes need."""
        seen = features[:, : self.seen]
        return self.query(seen), self.key(seen), self.value(seen)

    def forward(self, begun: tuple[Map, Map, Map], current: Map | None) -> Map:
        q, k, v = begun
        h, w = q.shape[2:]
        device = device_of(q)
        anchors, others = positions(h, w, device)
        rows, cols = coordinates(h, w, device)
        there = {0: (rows[anchors], cols[anchors]), 1: (rows[others], cols[others])}
        values = v if current is None else self.decoded(current)
        a = self.attend(at(q, anchors), at(k, others), at(v, others), there[0], there[1])
        n = self.attend(at(q, others), at(k, anchors), at(values, anchors), there[1], there[0])
        y = self.mix(bounded(spread(a, anchors, h, w) + spread(n, others, h, w)))
        return bounded(y + self.gate(y))


class Offsets(LearnedTable):
    """A learned logit per head and pair of places in a window: (heads, q, k)."""

    def __init__(self, heads: int, entries: int, index: Tensor):
        super().__init__(heads, entries)
        self.index = index  # (q, k): which of the entries

    def forward(self, exact: bool) -> Map:
        return super().forward(exact)[:, self.index]


class WindowContext(nn.Module):
    """Local: the anchors in a window ask each other, then a convolution over the window and a small net.

    (B, c, h, w), zero but at anchors -> (B, out, n) at the flat positions ``where``.
    """

    def __init__(self, channels: int, cfg: MlicConfig, tools: Tools):
        super().__init__()
        self.side, self.head, self.heads = cfg.window, cfg.head, channels // cfg.head
        self.norm = ExactLayerNorm(channels, 1)
        self.qkv = ExactConv2d(channels, 3 * channels, 1)
        side = torch.arange(self.side)
        apart = side[:, None] - side + self.side - 1
        wide = 2 * self.side - 1
        index = (apart[:, None, :, None] * wide + apart[None, :, None, :]).reshape(self.side**2, -1)
        self.rotary = Rotary(cfg.head) if cfg.rope else None
        self.offsets = None if cfg.rope else Offsets(self.heads, wide**2, index)
        self.softmax, self.act = tools.softmax, tools.act
        self.mix = ExactLinear(channels * self.side**2, cfg.local)
        self.out = ExactLinear(cfg.local, cfg.local)
        self.mlp_norm = ExactLayerNorm(cfg.local)
        self.mlp_in, self.mlp_out = ExactLinear(cfg.local, 2 * cfg.local), ExactLinear(2 * cfg.local, cfg.local)

    def forward(self, current: Map, features: Map, where: Tensor) -> Map:
        b, c, h, w = current.shape
        side, exact = self.side, isinstance(current, Grid)
        index = patch_index(h, w, side, 1, w + side - 1, where.device)[where]
        tokens = windows(self.qkv(self.norm(current)), index, side // 2)  # (B, 3c, n, side^2)
        tokens = tokens.reshape(b, 3, self.heads, self.head, len(where), side**2).permute(1, 0, 4, 2, 3, 5)
        q, k, v = tokens[0], tokens[1], tokens[2]  # (B, n, heads, head, side^2)
        q = q * self.head**-0.5
        if self.rotary is not None:
            rows, cols = coordinates(side, side, where.device)
            q, k = bounded(self.rotary(q, rows, cols)), bounded(self.rotary(k, rows, cols))
        logits = matmul(q.transpose(-1, -2), k)
        if self.offsets is not None:
            logits = logits + self.offsets(exact)
        seen = window_anchors(h, w, side, where.device)[where]
        hidden = MASKED * ~(seen[:, :, None] & seen[:, None, :])[:, None]
        logits = logits + (quantise(hidden) if exact else hidden)
        v = average(self.softmax(logits), v.transpose(-1, -2))  # (B, n, heads, side^2, head)
        x = self.out(self.mix(v.reshape(b, len(where), -1)))
        x = bounded(x + self.mlp_out(self.act(self.mlp_in(self.mlp_norm(x)))))
        return x.transpose(1, 2)


class CentreContext(nn.Module):
    """Local: a position asks the anchors in its window, by its hyper features, and weighs a convolution over them.

    (B, c, h, w), zero but at anchors -> (B, out, n) at the flat positions ``where``, none of them an anchor. What lies
    outside of the picture is a token of zeros. Of a window only the places that hold anchors are looked at.
    """

    def __init__(self, channels: int, cfg: MlicConfig, tools: Tools):
        super().__init__()
        self.side, self.head = cfg.window, cfg.head
        d = cfg.attention or channels
        self.heads = d // cfg.head
        self.query = ExactConv2d(cfg.features, d, 1)
        self.keys = ExactConv2d(channels, 2 * d, 1)
        centre = self.side // 2
        rows, cols = coordinates(self.side, self.side)
        tokens = ((rows + cols) % 2 != (2 * centre) % 2).nonzero()[:, 0]
        self.register_buffer("tokens", tokens, persistent=False)  # lies where the net does: nothing is copied in a pass
        self.rotary = Rotary(cfg.head) if cfg.rope else None
        self.offsets = None if cfg.rope else Offsets(self.heads, len(self.tokens), torch.arange(len(self.tokens))[None])
        self.softmax = tools.softmax
        self.mix = ExactLinear(d * len(self.tokens), cfg.local)

    def forward(self, current: Map, features: Map, where: Tensor) -> Map:
        b, _, h, w = current.shape
        side, heads, head, exact = self.side, self.heads, self.head, isinstance(current, Grid)
        picked = self.tokens
        index = patch_index(h, w, side, 1, w + side - 1, where.device)[where][:, picked]
        n, k_tokens = index.shape
        around = windows(self.keys(current), index, side // 2)
        around = around.reshape(b, 2, heads, head, n, k_tokens).permute(1, 0, 4, 2, 3, 5)
        k, v = around[0], around[1]  # (B, n, heads, head, tokens)
        q = at(self.query(features), where).reshape(b, heads, head, n, 1).permute(0, 3, 1, 2, 4) * head**-0.5
        if self.rotary is not None:
            rows, cols = coordinates(side, side, where.device)
            middle = picked.new_full((1,), side // 2)
            q, k = bounded(self.rotary(q, middle, middle)), bounded(self.rotary(k, rows[picked], cols[picked]))
        logits = matmul(q.transpose(-1, -2), k)  # (B, n, heads, 1, tokens)
        if self.offsets is not None:
            logits = logits + self.offsets(exact)
        weights = self.softmax(logits) * float(k_tokens)  # 1 where no token is preferred
        return self.mix(bounded(v * weights).reshape(b, n, -1)).transpose(1, 2)


class Selection(nn.Module):
    """Guided selective compression: a logit per symbol of a pass, not negative where the symbol is coded.

    It starts as the plain threshold SELECT_SIGMA on the predicted scale, and learns from a loss of its own; see
    ``MlicSlice.coded``.
    """

    def __init__(self, channels: int, cfg: MlicConfig, tools: Tools):
        super().__init__()
        self.side = ExactConv2d(cfg.features, SELECT_WIDTH, 1)
        self.net = Stack(SELECT_WIDTH + 3 * channels, [(2 * SELECT_WIDTH, 3), (SELECT_WIDTH, 3), (channels, 1)], tools.act)
        with torch.no_grad():
            self.net.last.weight.zero_()
            self.net.last.bias.zero_()

    def forward(self, features: Map, mu: Map, scale: Map, half: int, where: Tensor | None) -> Map:
        """mu and scale (rows of the scale table, gain included) of a pass -> logits in their shape."""
        h, w = features.shape[2:]
        if isinstance(scale, Grid):
            above = Grid(shift_round(scale.q - math.floor(SELECT_ROW * 2**ACT_FRAC), 3)).clamp()
            sure = Grid((above.q >= 0).double() * 2.0**ACT_FRAC)
            maps = [spread(t, where, h, w) for t in (mu, above, sure)]
        else:
            mask = anchor_mask(h, w, scale.device)
            mask = 1 - mask if half else mask
            above = (scale - SELECT_ROW) / SCALE_GAIN
            maps = [t * mask for t in (mu, above, (above >= 0).to(mu))]
        return bounded(self.net(cat([self.side(features), *maps]), where) + above)


def device_of(x: Map) -> torch.device:
    return x.q.device if isinstance(x, Grid) else x.device


class Parameters(nn.Module):
    """Pointwise net from contexts to (hidden layer, mu and scale); its first layer also takes a prefix of its channels."""

    def __init__(self, channels: int, out: int, hidden: tuple[int, ...], act: nn.Module):
        super().__init__()
        self.first = ExactConv2d(channels, hidden[0], 1)
        self.hidden = nn.ModuleList(ExactConv2d(a, b, 1) for a, b in zip(hidden[:-1], hidden[1:]))
        self.head = ExactConv2d(hidden[-1], 2 * out, 1)
        self.act = act
        with torch.no_grad():
            self.head.weight.mul_(0.3)
            self.head.bias.zero_()
            self.head.bias[out:] = INIT_SCALE

    def forward(self, x: Map, bias: Map) -> tuple[Map, Map]:
        """``bias`` (1 or B, hidden[0], 1[, 1]) is added to the first layer."""
        missing = self.first.in_channels - x.shape[1]
        if isinstance(x, Grid):
            t = self.first.gather(x[..., None], channels=slice(0, x.shape[1]) if missing else None) + bias
        else:
            t = self.first(F.pad(x, (0, 0, 0, 0, 0, missing))) + bias
        t = self.act(bounded(t))
        for conv in self.hidden:
            t = self.act(conv(t))
        return t, self.head(t)


class MlicSlice(SliceModel):
    """All contexts of a slice, and its nets. ``cfg`` is a MlicConfig."""

    def __init__(self, known: int, channels: int, cfg: MlicConfig):
        super().__init__(channels)
        self.tools = tools = Tools(cfg)
        self.spatial_residual = cfg.residual_kernel > 1
        if self.spatial_residual and cfg.features < cfg.channels:
            raise ValueError("the residual sees as many features as y has channels, which are more than there are")
        self.means = slice(cfg.features - cfg.channels, cfg.features)  # of the features, that the residual sees
        width = cfg.features
        if known:
            j = next(j for j in range(len(cfg.slices)) if sum(cfg.slices[:j]) == known)
            self.inter = InterContext(known, cfg, tools) if cfg.inter else None
            self.channel = Stack(known, list(cfg.channel), tools.act) if cfg.channel else None
            self.intra = IntraContext(cfg.slices[j - 1], channels, cfg, tools) if cfg.intra else None
            self.guide = None
            width += cfg.inter + (cfg.channel[-1][0] if cfg.channel else 0)
        else:
            self.inter = self.channel = self.intra = None
            self.guide = GuideContext(channels, cfg, tools) if cfg.guide else None
            width += cfg.guide
        local = CentreContext if cfg.centre else WindowContext
        self.local = local(channels, cfg, tools) if cfg.local else None
        late = cfg.local + (cfg.intra if known else 0)
        self.weigh = nn.ModuleDict()
        if cfg.reweight:
            for name in ("inter", "local", "intra"):
                if getattr(self, name) is not None:
                    self.weigh[name] = Reweight(getattr(cfg, name), tools)
        inputs = (width + late,) if cfg.shared else (width, width + late)
        self.nets = nn.ModuleList(Parameters(n, channels, cfg.entropy, tools.act) for n in inputs)
        self.bias = nn.ModuleList(LevelBias(cfg.entropy[0], cfg.knots, cfg.levels) for _ in range(2))
        before = (cfg.channels + known if self.spatial_residual else cfg.entropy[-1]) + channels
        layers = [(n, cfg.residual_kernel) for n in (*cfg.residual, channels)]
        count = 1 if cfg.shared else 2
        self.residuals = nn.ModuleList(Stack(before, layers, tools.act) for _ in range(count))
        self.selection_loss: dict[int, Tensor] = {}  # per pass, of the latest forward in training
        self.selection = nn.ModuleList(Selection(channels, cfg, tools) for _ in range(2 if cfg.selective else 0))
        with torch.no_grad():
            for net in self.residuals:
                net.last.weight.mul_(0.1)

    def start_scales(self, scales):
        for net in self.nets:
            net.head.bias[self.channels :] = scales

    def _weighed(self, name: str, x: Map) -> Map:
        return self.weigh[name](x) if name in self.weigh else x

    def prepare(self, features: Map, done: list[Map], level: Tensor | int) -> tuple:
        early = [features]
        if self.inter is not None:
            early.append(self._weighed("inter", self.inter(cat(done))))
        if self.channel is not None:
            early.append(self.channel(cat(done)))
        begun = self.guide.begin(features) if self.guide is not None else None
        return features, done, early, begun

    def parameters_at(self, state, current, half, level, where):
        features, done, early, begun = state
        h, w = features.shape[2:]
        contexts = list(early)
        if self.guide is not None:
            contexts.append(self.guide(begun, current))
        contexts = [at(c, where) for c in contexts]
        if half and self.local is not None:
            others = positions(h, w, device_of(features))[1]
            local = self.local(current, features, others)
            if where is None or "local" in self.weigh:
                local = at(self._weighed("local", spread(local, others, h, w)), where)
            contexts.append(local)
        if half and self.intra is not None:
            contexts.append(at(self._weighed("intra", self.intra(done[-1], current)), where))
        bias = self.bias[half](level)
        net = self.nets[min(half, len(self.nets) - 1)]
        t, out = net(cat(contexts), bias if where is None else bias.reshape(1, -1, 1))
        mu, s = out.split(self.channels, 1)
        return t, mu, Grid(s.q * SCALE_GAIN) if isinstance(s, Grid) else s * SCALE_GAIN

    def coded(self, state, mu, scale, v, half, where):
        if not len(self.selection):
            return None
        if v is None:
            return self.selection[half](state[0], mu, scale, half, where).q >= 0
        logits = self.selection[half](state[0].detach(), mu.detach(), scale.detach(), half, where)
        if self.training:
            mask = anchor_mask(*mu.shape[2:], mu.device).expand_as(mu)
            wanted = (v.detach().abs() > SELECT_SIGMA).to(logits)
            self.selection_loss[half] = F.binary_cross_entropy_with_logits(logits, wanted, weight=1 - mask if half else mask)
        return logits >= 0

    def residual(self, state, t, q, value, half, where):
        features, done, _, _ = state
        net = self.residuals[min(half, len(self.residuals) - 1)]
        if self.spatial_residual:
            return half_step(net(cat([features[:, self.means], *done, value]), where))
        return half_step(net(cat([t, seen_symbols(q, where is not None)])))
