"""Exact functions beyond sums and products: division, square root, activations, softmax, normalisation.

The integer functions are defined mathematically (see their docstrings), not by what a floating-point unit does: the
float64 division or square root only gives a first guess, which exact products then correct. So they hold on hardware
whose division is off by a unit, and a second implementation can use plain integers.

``exp``, ``erf`` and ``tanh`` differ between libraries, so they become integer tables, made once at freeze time and
stored with the weights, with linear interpolation in integers between entries 2**-7 apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exact import ACT_FRAC, ACT_MAX, ExactAffine, Freezable, Grid, shift_round

NODE_FRAC = 7  # table entries are 2**-7 apart
TABLE_FRAC = 20  # grid of the entries
SOFTMAX_FRAC = 20  # grid of probabilities
SOFTMAX_REACH = 15  # exp(-15) is below half a step of 2**-20
NORM_MAX_CHANNELS = 4096


def div_round(a: Tensor, b: Tensor) -> Tensor:
    """floor(a / b + 1/2) of float64 integers, |a| < 2**51, 0 < b < 2**50."""
    q = torch.floor(torch.div(a, b).add_(0.5))
    twice = torch.addcmul(a, q, b, value=-1).mul_(2)  # of the remainder: -b..b, or beyond if q is off by one
    return q.add_(twice >= b).sub_((twice < -b).to(q.dtype))


def isqrt(v: Tensor) -> Tensor:
    """floor(sqrt(v)) of float64 integers 0 <= v < 2**52."""
    s = torch.floor(torch.sqrt(v))
    s = s - (s * s > v).to(s.dtype)
    return s + ((s + 1) * (s + 1) <= v).to(s.dtype)


def lookup(table: Tensor, q: Tensor) -> Tensor:
    """Integers q >= 0 on 2**-ACT_FRAC -> a table of entries 2**-NODE_FRAC apart, linear between them, halves upwards.

    Past the end the last entry holds.
    """
    step = 1 << (ACT_FRAC - NODE_FRAC)
    q = q.clamp(max=(len(table) - 1) * step)
    node = torch.floor(q * (1 / step)).clamp_(max=len(table) - 2)
    rest = q - node * step
    at = node.long()
    left = table[at].to(torch.float64)
    return left + shift_round((table[at + 1].to(torch.float64) - left) * rest, ACT_FRAC - NODE_FRAC)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _dense(table: bytes, device: torch.device) -> Tensor:
    """``lookup`` of every q that a table (the bytes of its int32) tells apart, float64: then one access does."""
    entries = torch.frombuffer(bytearray(table), dtype=torch.int32)
    q = torch.arange(((len(entries) - 1) << (ACT_FRAC - NODE_FRAC)) + 1, dtype=torch.float64)
    return lookup(entries, q).to(device)


def tabulate(f: Callable[[Tensor], Tensor], low: int, high: int) -> Tensor:
    """Integer table of f on low..high, int32 (entries,), on the grid 2**-TABLE_FRAC."""
    x = torch.arange(low << NODE_FRAC, (high << NODE_FRAC) + 1, dtype=torch.float64) * 2.0**-NODE_FRAC
    return torch.floor(f(x) * 2.0**TABLE_FRAC + 0.5).to(torch.int32)


class _Tabulated(Freezable):
    """Frozen: ``table_q`` int32 of a function on low..high."""

    _frozen_names = ("table_q",)
    low: int
    high: int
    table_q: Tensor

    def set_frozen(self, tensors: dict[str, Tensor]) -> None:
        table = tensors["table_q"]
        if table.dtype != torch.int32 or table.shape != (((self.high - self.low) << NODE_FRAC) + 1,):
            raise ValueError("this is not the table of the layer")
        super().set_frozen(tensors)
        self._bytes = table.cpu().numpy().tobytes()

    def _lookup(self, q: Tensor) -> Tensor:
        """``lookup`` in the table of this layer; consumes q."""
        dense = _dense(self._bytes, q.device)
        return dense.take(q.clamp_(0, len(dense) - 1).long())


class ExactActivation(_Tabulated):
    """A smooth activation: f(x) = base(x) + r(x), the remainder r from a table on low..high, constant outside.

    Takes and gives the activation grid; within 0.7 of its step of the true function.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], low: int, high: int, over_relu: bool = False):
        super().__init__()
        self.function, self.low, self.high, self.over_relu = function, low, high, over_relu

    def _freeze(self) -> dict[str, Tensor]:
        base = F.relu if self.over_relu else torch.zeros_like
        return {"table_q": tabulate(lambda x: self.function(x) - base(x), self.low, self.high)}

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        if not isinstance(x, Grid):
            return self.function(x)
        self._need_frozen()
        if x.frac != ACT_FRAC:
            raise ValueError(f"an activation takes the grid 2**-{ACT_FRAC}, not 2**-{x.frac}")
        remainder = self._lookup(x.q - (self.low << ACT_FRAC))
        y = shift_round(remainder, TABLE_FRAC - ACT_FRAC)
        y = y + x.q.clamp_min(0) if self.over_relu else y
        return Grid(y.clamp(-ACT_MAX, ACT_MAX))


class ExactGELU(ExactActivation):
    """x * Phi(x), the erf form."""

    def __init__(self) -> None:
        super().__init__(F.gelu, -6, 6, over_relu=True)


class ExactSiLU(ExactActivation):
    """x * sigmoid(x)."""

    def __init__(self) -> None:
        super().__init__(F.silu, -14, 14, over_relu=True)


class ExactSoftplus(ExactActivation):
    """log(1 + exp(x))."""

    def __init__(self) -> None:
        super().__init__(F.softplus, -10, 10, over_relu=True)


class ExactSigmoid(ExactActivation):
    """1 / (1 + exp(-x))."""

    def __init__(self) -> None:
        super().__init__(torch.sigmoid, -10, 10)


class ExactTanh(ExactActivation):
    """tanh(x)."""

    def __init__(self) -> None:
        super().__init__(torch.tanh, -6, 6)


class ExactExp(ExactActivation):
    """exp(x) for x up to log(128); larger results are clamped. Relative error at most 1e-5 plus half a step."""

    def __init__(self) -> None:
        super().__init__(torch.exp, -10, 5)


class ExactSoftmax(_Tabulated):
    """Softmax along ``dim``. Grids: any step on the way in; out come probabilities on 2**-20, at most 2**29 of them.

    p_i = floor(2**20 e_i / sum(e) + 1/2) with e_i = table(max - x_i), 0 from max - x_i = 15 on.
    """

    low, high = 0, SOFTMAX_REACH

    def __init__(self, dim: int = -1):
        super().__init__()
        self.dim = dim

    def _freeze(self) -> dict[str, Tensor]:
        table = tabulate(lambda x: torch.exp(-x), self.low, self.high)
        table[-1] = 0
        return {"table_q": table}

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        if not isinstance(x, Grid):
            return torch.softmax(x, self.dim)
        self._need_frozen()
        q = x.at(ACT_FRAC).q
        e = self._lookup(q.amax(self.dim, keepdim=True) - q)
        total = e.sum(self.dim, keepdim=True)
        return Grid(div_round(e.mul_(2.0**SOFTMAX_FRAC), total), SOFTMAX_FRAC, 1 << SOFTMAX_FRAC)


class _ExactNorm(ExactAffine):
    """(x - mean) / sqrt(var + eps) * weight + bias along ``dim``; without the mean where ``centred`` is False.

    On integers, C of them, with S their sum (0 if not centred):
        d_i = x_i - div_round(S, C)        v = div_round(sum d^2, C) * 2**12 + round(eps * 2**36)
        y_i = div_round((C x_i - S) * 2**18, C * isqrt(v))         clamped, then weight and bias as in any layer
    Frozen: as ``ExactAffine``, weights (C,).
    """

    centred: bool
    eps: Any

    def _setup(self, channels: int, dim: int) -> None:
        if channels > NORM_MAX_CHANNELS:
            raise ValueError(f"{channels} channels: an exact norm takes up to {NORM_MAX_CHANNELS}")
        self.channels, self.dim = channels, dim

    def _reach(self, weight: Tensor) -> Tensor:
        return weight.long().abs()

    def _float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        if not isinstance(x, Grid):
            y = self._float(x.movedim(self.dim, -1), *self._operands())
            return self._result(y.movedim(-1, self.dim))
        q, c = self._input(x).movedim(self.dim, -1), self.channels
        count = q.new_full((1,), c)
        total = q.sum(-1, keepdim=True) if self.centred else q.new_zeros(1)
        d = q - div_round(total, count)
        v = div_round((d * d).sum(-1, keepdim=True), count) * 2.0**12 + max(1, round(self.eps * 2**36))
        y = div_round((c * q - total) * 2.0**18, c * isqrt(v)).clamp_(-ACT_MAX, ACT_MAX)
        weight = self._cached((), lambda: self.weight_q)
        return self._finish(y * weight, -1).move(lambda t: t.movedim(-1, self.dim))


class ExactLayerNorm(_ExactNorm, nn.LayerNorm):  # type: ignore[misc]
    """Layer norm over the ``channels`` along ``dim`` (1 for maps, -1 for tokens)."""

    centred = True

    def __init__(self, channels: int, dim: int = -1, eps: float = 1e-5):
        super().__init__(channels, eps)
        self._setup(channels, dim)

    def _float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, (self.channels,), weight, bias, self.eps)


class ExactRMSNorm(_ExactNorm, nn.RMSNorm):  # type: ignore[misc]
    """Root-mean-square norm over the ``channels`` along ``dim``; no bias."""

    centred = False
    bias = None

    def __init__(self, channels: int, dim: int = -1, eps: float = 1e-5):
        super().__init__(channels, eps)
        self._setup(channels, dim)

    def _float_names(self) -> tuple[str, ...]:
        return ("weight",)

    def _float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.rms_norm(x, (self.channels,), weight, self.eps)
