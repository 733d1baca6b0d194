"""Exact arithmetic for everything that decides how a symbol is coded (DESIGN 4).

A grid tensor is a float64 tensor of INTEGERS; its value is ``q * 2**-frac``. Products and sums of integers are exact
in float64 while every partial sum stays below 2**53, in any order, on any device, with any number of threads. So the
layers below give the same bits on every machine, which floats do not.

One class per layer. With a Tensor it is the plain torch layer (training); after ``freeze`` its weights are integers,
and with a ``Grid`` it computes exactly, so that one forward serves both. Nothing depends on the data: every grid knows
the largest integer that it may hold (``limit``), every layer knows the largest sum that its weights can give, and
whatever could reach 2**53 is refused with a ValueError, at freeze time or at the first call.

Products are always matrix products in float64: a library's convolution may use Winograd or FFT, and float32 may
silently become TF32 or bfloat16; no setting of torch weakens float64. (Float32 would be exact below 2**24 only, which
16-bit weights exceed, and is 1.5 to 1.9 times as fast on a CPU. The one thing to leave alone is cuBLAS's emulation of
float64, which is off unless CUBLAS_EMULATE_DOUBLE_PRECISION is set.)

Weights have 16 bits, activations live on 2**-ACT_FRAC and are clamped to +-2**ACT_INT.
Functions other than ``+ - * floor`` (division, square root, tables) are in ``exact_tables``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACT_FRAC = 12
ACT_INT = 7
ACT_MAX = 1 << (ACT_INT + ACT_FRAC)  # largest |q| of an activation
WEIGHT_BITS = 15  # magnitude bits; int16 with the sign
WEIGHT_FRAC_MAX = 24
CONSTANT_FRAC = 16  # grid of constant factors
FLOAT64_EXACT = 1 << 53
COLUMN_ELEMENTS = 1 << 20  # of the patch matrix made at a time: 8 MB


def shift_round(q: Tensor, bits: int) -> Tensor:
    """floor(q * 2**-bits + 1/2): integers to a coarser grid, halves upwards. Exact for |q| < 2**52."""
    return q if bits == 0 else torch.floor(q * 2.0**-bits + 0.5)


def _checked(limit: int) -> int:
    if limit >= FLOAT64_EXACT:
        raise ValueError(f"integers can reach {limit:.3g}, beyond 2**53: clamp before")
    return limit


@dataclass(frozen=True)
class Grid:
    """Integers ``q`` (float64, any shape) on the grid 2**-frac, never larger than ``limit``.

    The operators below keep ``limit`` true; whoever makes a Grid of other tensors answers for it.
    """

    q: Tensor
    frac: int = ACT_FRAC
    limit: int = ACT_MAX

    def __post_init__(self) -> None:
        if self.q.dtype != torch.float64:
            raise TypeError(f"a grid holds float64, not {self.q.dtype}")

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    def value(self) -> Tensor:
        """The real values, float64."""
        return self.q * 2.0**-self.frac

    def at(self, frac: int) -> Grid:
        """The same values on another grid; rounded, halves upwards, if it is coarser."""
        up = frac - self.frac
        if up >= 0:
            return Grid(self.q * 2.0**up, frac, _checked(self.limit << up))
        return Grid(shift_round(self.q, -up), frac, (self.limit >> -up) + 1)

    def clamp(self, limit: int = ACT_MAX) -> Grid:
        """|q| <= limit."""
        return Grid(self.q.clamp(-limit, limit), self.frac, limit)

    def move(self, f: Callable[[Tensor], Tensor]) -> Grid:
        """``f`` of the integers, for any ``f`` that moves, repeats or drops values but makes no new ones."""
        return Grid(f(self.q), self.frac, self.limit)

    def masked(self, mask: Tensor) -> Grid:
        """Times a mask of 0 and 1 that broadcasts to this shape."""
        return self.move(lambda q: q * mask.to(q.dtype))

    def _common(self, other: Grid) -> int:
        if self.frac != other.frac:
            raise ValueError(f"grids 2**-{self.frac} and 2**-{other.frac} cannot be joined")
        return _checked(self.limit + other.limit)

    def __add__(self, other: Grid) -> Grid:
        limit = self._common(other)
        return Grid(self.q + other.q, self.frac, limit)

    def __sub__(self, other: Grid) -> Grid:
        limit = self._common(other)
        return Grid(self.q - other.q, self.frac, limit)

    def __mul__(self, other: Grid | float) -> Grid:
        """Product, rounded to the grid of ``self``. A plain number is taken at its nearest multiple of 2**-16."""
        if not isinstance(other, Grid):
            factor = math.floor(other * (1 << CONSTANT_FRAC) + 0.5)
            other = Grid(self.q.new_tensor(float(factor)), CONSTANT_FRAC, abs(factor))
        limit = _checked(2 * self.limit * other.limit) // 2  # twice: the rounding adds a half
        return Grid(shift_round(self.q * other.q, other.frac), self.frac, (limit >> other.frac) + 1)

    def __getitem__(self, key) -> Grid:
        return Grid(self.q[key], self.frac, self.limit)

    def reshape(self, *shape: int) -> Grid:
        return self.move(lambda q: q.reshape(*shape))

    def permute(self, *dims: int) -> Grid:
        return self.move(lambda q: q.permute(*dims))

    def transpose(self, a: int, b: int) -> Grid:
        return self.move(lambda q: q.transpose(a, b))

    def split(self, sizes: int | list[int], dim: int = 0) -> list[Grid]:
        return [Grid(q, self.frac, self.limit) for q in self.q.split(sizes, dim)]

    def chunk(self, chunks: int, dim: int = 0) -> list[Grid]:
        return [Grid(q, self.frac, self.limit) for q in self.q.chunk(chunks, dim)]


def quantise(x: Tensor, frac: int = ACT_FRAC) -> Grid:
    """Nearest grid values of a real tensor, clamped to ACT_MAX: for constants at freeze time and for exact data."""
    return Grid(torch.floor(x.to(torch.float64) * 2.0**frac + 0.5).clamp(-ACT_MAX, ACT_MAX), frac)


def cat(parts: list, dim: int = 1) -> Tensor | Grid:
    """Tensors, or grids of one step, joined along ``dim``."""
    if not isinstance(parts[0], Grid):
        return torch.cat(parts, dim)
    if len({g.frac for g in parts}) != 1:
        raise ValueError("grids of different steps cannot be joined")
    return Grid(torch.cat([g.q for g in parts], dim), parts[0].frac, max(g.limit for g in parts))


def matmul(a: Tensor | Grid, b: Tensor | Grid) -> Tensor | Grid:
    """(..., n, k) @ (..., k, m). Grids of any steps; the result is on the activation grid and clamped."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a @ b
    if not (isinstance(a, Grid) and isinstance(b, Grid)):
        raise TypeError("a grid and a tensor cannot be multiplied")
    bits = a.frac + b.frac - ACT_FRAC
    if bits < 0:
        raise ValueError(f"a product of grids 2**-{a.frac} and 2**-{b.frac} is coarser than the activations")
    _checked(a.shape[-1] * a.limit * b.limit + (1 << bits))
    return Grid(shift_round(a.q @ b.q, bits).clamp_(-ACT_MAX, ACT_MAX))


class Freezable(nn.Module):
    """A module with integers of its own. Subclasses say which (``_frozen_names``) and make them (``_freeze``)."""

    _frozen_names: tuple[str, ...] = ()
    frozen = False

    def _freeze(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def _float_names(self) -> tuple[str, ...]:
        """Parameters that frozen integers replace."""
        return ()

    def set_frozen(self, tensors: dict[str, Tensor]) -> None:
        """Take integers; the float parameters that they replace are dropped."""
        for name in self._frozen_names:
            self.register_buffer(name, tensors[name], persistent=False)
        for name in self._float_names():
            setattr(self, name, None)
        self.frozen = True

    def _thaw(self) -> dict[str, Tensor]:
        """Float tensors, by the names of ``_float_names``, that stand for the integers; see ``thaw``."""
        if self._float_names():
            raise NotImplementedError(f"{type(self).__name__} cannot be thawed")
        return {}

    def _need_frozen(self) -> None:
        if not self.frozen:
            raise RuntimeError("an exact layer computes on grids only after freeze()")


def _freezables(module: nn.Module) -> Iterator[tuple[str, Freezable]]:
    for name, child in module.named_modules():
        if isinstance(child, Freezable):
            yield name, child


@torch.no_grad()
def freeze(module: nn.Module) -> None:
    """Replace the weights of every exact layer below ``module`` by integers. ValueError for one that could overflow."""
    for name, child in _freezables(module):
        try:
            child.set_frozen(child._freeze())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def frozen(module: nn.Module) -> bool:
    """Whether all exact layers below ``module`` hold integers."""
    return all(child.frozen for _, child in _freezables(module))


@torch.no_grad()
def thaw(module: nn.Module) -> nn.Module:
    """Give every frozen layer below ``module`` float weights again, those that its integers stand for; ``module``.

    The float path then follows the exact one within its rounding, and gradients flow through it: for an encoder that
    searches. The weights are constants, and the integers stay in place. To be done to a copy: the weights would otherwise
    be stored with the codec.
    """
    for _, child in _freezables(module):
        for name, tensor in child._thaw().items():
            setattr(child, name, nn.Parameter(tensor.float(), requires_grad=False))
    return module


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The integers of all exact layers, by dotted name."""
    return {
        f"{name}.{key}": getattr(child, key).cpu() for name, child in _freezables(module) for key in child._frozen_names
    }


def load_frozen(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``frozen_tensors``. KeyError when one is missing, ValueError when one does not fit or is not known."""
    known: set[str] = set()
    for name, child in _freezables(module):
        own = {key: tensors[f"{name}.{key}"] for key in child._frozen_names}
        known.update(f"{name}.{key}" for key in own)
        try:
            child.set_frozen(own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if unknown := sorted(tensors.keys() - known):
        raise ValueError(f"no layer takes {unknown[0]}")


def set_fake_quantisation(module: nn.Module, on: bool = True) -> None:
    """Let the float training path of every exact layer round weights and results as the frozen one will."""
    for child in module.modules():
        if isinstance(child, ExactAffine):
            child.fake_quantisation = on


def integer_weights(weight: Tensor) -> tuple[Tensor, int]:
    """(int16 weights, frac): the finest power-of-two grid, up to 2**-24, on which the largest weight fits 16 bits."""
    largest = float(weight.detach().abs().max())
    if not largest < 1 << (WEIGHT_BITS - 1):
        raise ValueError(f"a weight of magnitude {largest:g} is too large for an exact layer")
    frac = min(WEIGHT_FRAC_MAX, WEIGHT_BITS - math.frexp(largest)[1])
    top = (1 << WEIGHT_BITS) - 1
    return torch.floor(weight.double() * 2.0**frac + 0.5).clamp(-top, top).to(torch.int16), frac


class ExactAffine(Freezable):
    """What the layers with a weight and a bias have in common.

    Frozen: ``weight_q`` int16 in the shape of ``weight``, ``bias_q`` int32 (out,) on the activation grid,
    ``weight_frac`` int32 (): weights are multiples of 2**-weight_frac, 1..24.
    """

    _frozen_names = ("weight_q", "bias_q", "weight_frac")
    weight: Any  # Tensor, None once frozen
    bias: Any
    weight_q: Tensor
    bias_q: Tensor
    fake_quantisation = False

    def _float_names(self) -> tuple[str, ...]:
        return ("weight", "bias")

    def _freeze(self) -> dict[str, Tensor]:
        weight, frac = integer_weights(self.weight)
        bias = torch.zeros(len(self._reach(weight))) if self.bias is None else self.bias
        if not bias.isfinite().all():
            raise ValueError("a bias is not finite")
        bias_q = torch.floor(bias.double() * 2.0**ACT_FRAC + 0.5).clamp(-(2**31) + 1, 2**31 - 1).to(torch.int32)
        return {"weight_q": weight, "bias_q": bias_q, "weight_frac": torch.tensor(frac, dtype=torch.int32)}

    def set_frozen(self, tensors: dict[str, Tensor]) -> None:
        weight, bias, frac = (tensors[name] for name in self._frozen_names)
        if self.weight is not None and weight.shape != self.weight.shape:
            raise ValueError(f"weights of shape {tuple(weight.shape)} instead of {tuple(self.weight.shape)}")
        if (weight.dtype, bias.dtype) != (torch.int16, torch.int32) or not 1 <= int(frac) <= WEIGHT_FRAC_MAX:
            raise ValueError("these are not the integers of an exact layer")
        super().set_frozen(tensors)
        self.shift = int(frac)
        if self.bound() >= FLOAT64_EXACT:
            raise ValueError(f"sums can reach {self.bound():.3g}, beyond 2**53: this layer cannot be exact")
        self._cache: dict[tuple, Tensor] = {}

    def _thaw(self) -> dict[str, Tensor]:
        weight = {"weight": self.weight_q * 2.0**-self.shift}
        return weight | {"bias": self.bias_q * 2.0**-ACT_FRAC} if "bias" in self._float_names() else weight

    def _reach(self, weight: Tensor) -> Tensor:
        """Sum of |weight| over all that one output can see, int64 (out,)."""
        return weight.long().abs().flatten(1).sum(1)

    def bound(self) -> int:
        """Largest |integer| on the way: sums, plus bias, plus the half that rounds, on the product grid."""
        bias = self.bias_q.long().abs() << self.shift
        return int((self._reach(self.weight_q) * ACT_MAX + bias).max()) + (1 << self.shift)

    def _cached(self, key: tuple, make: Callable[[], Tensor]) -> Tensor:
        """Float64 form of the weights on the device where they are."""
        key = (self.weight_q.device, *key)
        if key not in self._cache:
            self._cache[key] = make().double().contiguous()
        return self._cache[key]

    def _input(self, x: Grid) -> Tensor:
        self._need_frozen()
        if x.frac != ACT_FRAC or x.limit > ACT_MAX:
            raise ValueError(f"an exact layer takes 2**-{ACT_FRAC} up to {ACT_MAX}, not 2**-{x.frac} up to {x.limit}")
        return x.q

    def _finish(self, sums: Tensor, dim: int) -> Grid:
        """Add the bias along ``dim`` and come back to the activation grid; consumes ``sums``, on the product grid."""
        bias = self.bias_q.to(torch.float64).add_(0.5)
        bias = bias.reshape(-1, *(1,) * (-1 - dim))
        return Grid(sums.mul_(2.0**-self.shift).add_(bias).floor_().clamp_(-ACT_MAX, ACT_MAX))

    def _operands(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the float path."""
        if not self.fake_quantisation:
            return self.weight, self.bias
        weight, frac = integer_weights(self.weight)
        rounded = self.weight + (weight.to(self.weight) * 2.0**-frac - self.weight).detach()
        return rounded, None if self.bias is None else _round_ste(self.bias)

    def _result(self, y: Tensor) -> Tensor:
        """Result of the float path."""
        return _round_ste(y.clamp(-(1 << ACT_INT), 1 << ACT_INT)) if self.fake_quantisation else y


def _round_ste(x: Tensor) -> Tensor:
    """Nearest values on the activation grid, with the identity as gradient."""
    return x + (torch.floor(x * 2.0**ACT_FRAC + 0.5) * 2.0**-ACT_FRAC - x).detach()


@lru_cache(maxsize=16)
def patch_index(h: int, w: int, kernel: int, stride: int, wide: int, device: torch.device) -> Tensor:
    """(h*w, kernel*kernel): flat positions, in a map ``wide`` columns wide, of the window of each of h x w outputs."""
    side = torch.arange(kernel, device=device)
    rows, cols = torch.arange(h, device=device) * stride, torch.arange(w, device=device) * stride
    return (rows[:, None] * wide + cols).reshape(-1, 1) + (side[:, None] * wide + side).reshape(1, -1)


class ExactConv2d(ExactAffine, nn.Conv2d):
    """Convolution of square kernels with zero padding, by default kernel//2; 1x1 also takes grids (B, C, n)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, *, stride: int = 1,
                 padding: int | None = None, groups: int = 1, bias: bool = True):  # fmt: skip
        padding = kernel // 2 if padding is None else padding
        super().__init__(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=bias)
        self.kernel, self.step, self.margin = kernel, stride, padding

    def _matrix(self, channels: slice | None) -> Tensor:
        """Weights as (groups, out/groups, k*k*in/groups), float64, input channels cut to ``channels``."""
        key = () if channels is None else (channels.start, channels.stop)
        weight = self.weight_q if channels is None else self.weight_q[:, channels]
        shape = self.groups, self.out_channels // self.groups, -1
        return self._cached(key, lambda: weight.permute(0, 2, 3, 1).reshape(shape))

    def _each_channel(self, q: Tensor) -> Tensor:
        """Sums (B, C, h', w') of a layer whose channels do not mix: a map per tap, where a patch matrix has nothing to gain."""
        k, s, p = self.kernel, self.step, self.margin
        out_h, out_w = ((side + 2 * p - k) // s + 1 for side in q.shape[2:])
        taps = self._cached(("taps",), lambda: self.weight_q.permute(2, 3, 0, 1)[..., None])  # (k, k, C, 1, 1)
        padded = F.pad(q, (p, p, p, p))
        sums = q.new_zeros(*q.shape[:2], out_h, out_w)
        for r in range(k):
            for c in range(k):
                sums.addcmul_(padded[:, :, r : r + s * out_h : s, c : c + s * out_w : s], taps[r, c])
        return sums

    def gather(self, x: Grid, positions: Tensor | None = None, channels: slice | None = None) -> Grid:
        """The layer at flat ``positions`` (n,) of its output map only (all by default): x (B, C, h, w) -> (B, out, n).

        ``channels`` says that x holds only these of the input channels and that the others are zero.
        """
        q = self._input(x)
        b, c, h, w = q.shape
        k, s, p = self.kernel, self.step, self.margin
        weight = self._matrix(channels)
        if (k, s, p, self.groups) == (1, 1, 0, 1):
            columns = q.reshape(b, c, -1)
            columns = columns if positions is None else columns[:, :, positions]
            return self._finish(torch.matmul(weight, columns), -2)

        if channels is None and self.groups == self.in_channels == self.out_channels:
            sums = self._each_channel(q).flatten(2)
            return self._finish(sums if positions is None else sums[:, :, positions], -2)

        # channels last: a patch is then k*k runs of c numbers, which copy fast
        padded = q.new_zeros(b, h + 2 * p, w + 2 * p, c)
        padded[:, p : p + h, p : p + w] = q.permute(0, 2, 3, 1)
        out_h, out_w = ((side + 2 * p - k) // s + 1 for side in (h, w))
        index = patch_index(out_h, out_w, k, s, w + 2 * p, q.device)
        index = index if positions is None else index[positions]
        sums = q.new_empty(b, self.groups, weight.shape[1], len(index))
        size = max(1, COLUMN_ELEMENTS // (c * k * k))
        for rows, out in zip(padded.flatten(1, 2), sums):
            for n in range(0, len(index), size):
                columns = rows.index_select(0, index[n : n + size].reshape(-1))
                columns = columns.reshape(-1, k * k, self.groups, c // self.groups).permute(2, 1, 3, 0)
                out[:, :, n : n + size] = weight @ columns.reshape(self.groups, weight.shape[2], -1)
        return self._finish(sums.flatten(1, 2), -2)

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:  # type: ignore[override]
        if not isinstance(x, Grid):
            weight, bias = self._operands()
            return self._result(F.conv2d(x, weight, bias, self.stride, self.padding, groups=self.groups))
        if x.q.ndim == 3:  # (B, C, n), 1x1 only
            return self.gather(x[..., None])
        k, s, p = self.kernel, self.step, self.margin
        out_h, out_w = ((side + 2 * p - k) // s + 1 for side in x.shape[2:])
        return self.gather(x).reshape(-1, self.out_channels, out_h, out_w)


class ExactConvTranspose2d(ExactAffine, nn.ConvTranspose2d):
    """Transposed convolution of square kernels; weight (in, out, k, k)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0,
                 output_padding: int = 0, bias: bool = True):  # fmt: skip
        super().__init__(in_channels, out_channels, kernel, stride, padding, output_padding, bias=bias)
        self.kernel, self.step, self.margin, self.extra = kernel, stride, padding, output_padding

    def _reach(self, weight: Tensor) -> Tensor:
        return weight.long().abs().sum((0, 2, 3))

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:  # type: ignore[override]
        k, s, p, extra = self.kernel, self.step, self.margin, self.extra
        if not isinstance(x, Grid):
            return self._result(F.conv_transpose2d(x, *self._operands(), s, p, extra))
        q = self._input(x)
        weight = self._cached((), lambda: self.weight_q.flatten(1).t())  # (out*k*k, in)
        size = tuple((side - 1) * s - 2 * p + k + extra for side in q.shape[2:])
        sums = F.fold(torch.matmul(weight, q.flatten(2)), size, k, padding=p, stride=s)
        return self._finish(sums, -3)


class ExactLinear(ExactAffine, nn.Linear):
    """(..., in) -> (..., out)."""

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:  # type: ignore[override]
        if not isinstance(x, Grid):
            return self._result(F.linear(x, *self._operands()))
        return self._finish(self._input(x) @ self._cached((), lambda: self.weight_q.t()), -1)


class ExactReLU(nn.Module):
    """max(x, 0) of a tensor or a grid."""

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        return Grid(x.q.clamp_min(0), x.frac, x.limit) if isinstance(x, Grid) else F.relu(x)


class ExactLeakyReLU(nn.Module):
    """x, or ``slope`` * x below zero; 0 <= slope <= 1 is a multiple of 1/256."""

    def __init__(self, slope: float = 1 / 128):
        super().__init__()
        if not 0 <= slope <= 1 or slope * 256 != int(slope * 256):
            raise ValueError(f"slope {slope} is no multiple of 1/256 in 0..1")
        self.slope = slope

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        if not isinstance(x, Grid):
            return F.leaky_relu(x, self.slope)
        return Grid(torch.where(x.q < 0, shift_round(x.q * (self.slope * 256), 8), x.q), x.frac, x.limit)


def pixel_shuffle(x: Tensor | Grid, r: int) -> Tensor | Grid:
    """(B, C*r*r, h, w) -> (B, C, h*r, w*r)."""
    return x.move(lambda q: F.pixel_shuffle(q, r)) if isinstance(x, Grid) else F.pixel_shuffle(x, r)


def pixel_unshuffle(x: Tensor | Grid, r: int) -> Tensor | Grid:
    """(B, C, h*r, w*r) -> (B, C*r*r, h, w)."""
    return x.move(lambda q: F.pixel_unshuffle(q, r)) if isinstance(x, Grid) else F.pixel_unshuffle(x, r)


def bounded(x: Tensor | Grid) -> Tensor | Grid:
    """A sum made fit for the next layer: grids are clamped to the range of activations, tensors pass."""
    return x.clamp() if isinstance(x, Grid) else x


def hardtanh(x: Tensor | Grid) -> Tensor | Grid:
    """Clamp to -1..1."""
    return x.clamp(1 << x.frac) if isinstance(x, Grid) else F.hardtanh(x)
