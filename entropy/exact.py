"""Exact arithmetic for everything that decides how a symbol is coded (DESIGN 4).

A grid tensor is a float64 tensor of INTEGERS; its value is ``q * 2**-frac``. Products and sums of integers are exact in
float64 while every partial sum stays below 2**53, in any order, on any device, with any number of threads; floor, and a
division or square root followed by floor, are correctly rounded everywhere. So the layers below give the same bits on
every machine, which floats do not.

One class per layer. With a Tensor it is the plain torch layer (training); after ``freeze`` its weights are integers, and
with a ``Grid`` it computes exactly. ``freeze`` also bounds the worst case of each layer, refuses one that could overflow, and
picks float32 (24 bits) where that is exact and float64 otherwise. Products are always matrix products, never a library's
convolution, which may use Winograd or FFT.

Weights have 16 bits, activations live on 2**-ACT_FRAC and are clamped to +-2**ACT_INT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACT_FRAC = 12
ACT_INT = 7
ACT_MAX = 1 << (ACT_INT + ACT_FRAC)  # largest |q| of an activation
WEIGHT_BITS = 15  # magnitude bits; int16 with the sign
FLOAT64_EXACT, FLOAT32_EXACT = 1 << 53, 1 << 24


def shift_round(q: Tensor, bits: int) -> Tensor:
    """floor(q * 2**-bits + 1/2): integers to a coarser grid, halves upwards. Exact: powers of two only scale."""
    return q if bits == 0 else torch.floor(q * 2.0**-bits + 0.5)


@dataclass(frozen=True)
class Grid:
    """Integers ``q`` (float64, any shape) on the grid 2**-frac."""

    q: Tensor
    frac: int = ACT_FRAC

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    def value(self) -> Tensor:
        """The real values, float64."""
        return self.q * 2.0**-self.frac

    def at(self, frac: int) -> Grid:
        """The same values on another grid; rounded if it is coarser."""
        if frac >= self.frac:
            return Grid(self.q * 2.0 ** (frac - self.frac), frac)
        return Grid(shift_round(self.q, self.frac - frac), frac)

    def clamp(self, limit: int = ACT_MAX) -> Grid:
        return Grid(self.q.clamp(-limit, limit), self.frac)

    def __add__(self, other: Grid) -> Grid:
        if self.frac != other.frac:
            raise ValueError(f"grids 2**-{self.frac} and 2**-{other.frac} cannot be added")
        return Grid(self.q + other.q, self.frac)

    def __mul__(self, other: Grid) -> Grid:
        """Product, rounded to the grid of ``self``. The caller keeps |product of integers| below 2**53."""
        return Grid(shift_round(self.q * other.q, other.frac), self.frac)

    def __getitem__(self, key) -> Grid:
        return Grid(self.q[key], self.frac)


def quantise(x: Tensor, frac: int = ACT_FRAC) -> Grid:
    """Nearest grid values of a real tensor: for constants at freeze time and for data that is exact already."""
    return Grid(torch.floor(x.to(torch.float64) * 2.0**frac + 0.5), frac)


def cat(grids: list[Grid], dim: int = 1) -> Grid:
    if len({g.frac for g in grids}) != 1:
        raise ValueError("grids of different steps cannot be joined")
    return Grid(torch.cat([g.q for g in grids], dim), grids[0].frac)


@contextmanager
def exact_math() -> Iterator[None]:
    """No TF32, no reduced-precision sums, no bf16 stand-ins inside: float32 products keep their 24 bits."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), matmul.allow_tf32
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])


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


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The integers of all exact layers, by dotted name."""
    return {
        f"{name}.{key}": getattr(child, key).cpu() for name, child in _freezables(module) for key in child._frozen_names
    }


def load_frozen(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``frozen_tensors``; KeyError when one is missing."""
    for name, child in _freezables(module):
        child.set_frozen({key: tensors[f"{name}.{key}"] for key in child._frozen_names})


def integer_weights(weight: Tensor) -> tuple[Tensor, int]:
    """(int16 weights, frac): the finest power-of-two grid on which the largest weight still fits 16 bits."""
    largest = float(weight.abs().max())
    frac = 24 if largest == 0 else min(24, WEIGHT_BITS - 1 - math.floor(math.log2(largest)))
    q = torch.floor(weight.double() * 2.0**frac + 0.5).clamp(-(2**WEIGHT_BITS) + 1, 2**WEIGHT_BITS - 1)
    return q.to(torch.int16), frac


@lru_cache(maxsize=64)
def patch_index(h: int, w: int, kernel: int, device: torch.device | str) -> Tensor:
    """(kernel*kernel, h*w): flat positions, in a map padded by kernel//2, of the window around each position."""
    side = torch.arange(kernel, device=device)
    rows = torch.arange(h, device=device)
    cols = torch.arange(w, device=device)
    wide = w + 2 * (kernel // 2)
    window = (side[:, None] * wide + side).reshape(-1, 1)
    return window + (rows[:, None] * wide + cols).reshape(1, -1)


class ExactConv2d(Freezable, nn.Conv2d):
    """Convolution of stride 1 with zero padding kernel//2; 1x1 also takes grids (B, C, n).

    Frozen: ``weight_q`` int16 (out, in/groups, k, k), ``bias_q`` int32 (out,) on the activation grid, ``weight_frac`` int32.
    """

    _frozen_names = ("weight_q", "bias_q", "weight_frac")

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, *, padding: int | None = None, groups: int = 1):
        padding = kernel // 2 if padding is None else padding
        if kernel % 2 == 0 or padding != kernel // 2:
            raise ValueError("an exact convolution keeps the size of its input: odd kernel, padding kernel//2")
        super().__init__(in_channels, out_channels, kernel, padding=padding, groups=groups)
        self._matrix: dict[tuple, Tensor] = {}

    def _float_names(self) -> tuple[str, ...]:
        return ("weight", "bias")

    def _freeze(self) -> dict[str, Tensor]:
        weight, frac = integer_weights(self.weight)
        bias = torch.floor(self.bias.double() * 2.0**ACT_FRAC + 0.5).clamp(-(2**31) + 1, 2**31 - 1)
        return {"weight_q": weight, "bias_q": bias.to(torch.int32), "weight_frac": torch.tensor(frac, dtype=torch.int32)}

    def set_frozen(self, tensors: dict[str, Tensor]) -> None:
        super().set_frozen(tensors)
        self.shift = int(self.weight_frac)
        if self.bound() >= FLOAT64_EXACT:
            raise ValueError(f"sums can reach {self.bound():.3g}, beyond 2**53: this layer cannot be exact")
        self._matrix.clear()

    def bound(self, input_max: int = ACT_MAX) -> int:
        """Largest |sum| that inputs up to ``input_max`` can give, before the result is rounded."""
        per_output = self.weight_q.long().abs().flatten(1).sum(1)
        bias = self.bias_q.long().abs() * 2.0 ** max(self.shift, 0)
        return int((per_output * input_max + bias + 2.0**self.shift).max())

    def kernel_dtype(self, input_max: int = ACT_MAX) -> torch.dtype:
        """The cheapest type whose products are exact for this input range."""
        return torch.float32 if self.bound(input_max) < FLOAT32_EXACT else torch.float64

    def matrix(self, device: torch.device, dtype: torch.dtype, channels: slice | None = None) -> Tensor:
        """Weights as (groups, out/groups, in/groups * k * k) of ``dtype``, input channels cut to ``channels``; cached."""
        key = (device, dtype, None if channels is None else (channels.start, channels.stop))
        if key not in self._matrix:
            weight = self.weight_q if channels is None else self.weight_q[:, channels]
            flat = weight.flatten(1).to(device=device, dtype=dtype)
            self._matrix[key] = flat.reshape(self.groups, -1, flat.shape[1]).contiguous()
        return self._matrix[key]

    def _finish(self, sums: Tensor) -> Grid:
        """Add the bias and come back to the activation grid. sums (B, out, n), integers on 2**-(ACT_FRAC + shift)."""
        bias = self.bias_q.to(device=sums.device, dtype=torch.float64)
        q = torch.floor(sums.double().mul_(2.0**-self.shift).add_(bias[:, None] + 0.5)).clamp_(-ACT_MAX, ACT_MAX)
        return Grid(q)

    def gather(self, x: Grid, positions: Tensor | None = None, channels: slice | None = None,
               input_max: int = ACT_MAX) -> Grid:  # fmt: skip
        """The layer at flat ``positions`` (n,) of the map only (all by default): x (B, C, h, w) -> (B, out, n).

        ``channels`` says that x holds only these of the input channels and that the others are zero.
        ``input_max`` may state a smaller range of |x.q|, which can make float32 exact.
        """
        if x.frac != ACT_FRAC:
            raise ValueError(f"an exact layer takes the grid 2**-{ACT_FRAC}, not 2**-{x.frac}")
        dtype = self.kernel_dtype(input_max)
        b, c, h, w = x.shape
        k = self.kernel_size[0]
        if k == 1:
            columns = x.q.reshape(b, c, -1)
            columns = columns if positions is None else columns[:, :, positions]
        else:
            index = patch_index(h, w, k, x.q.device)
            index = index if positions is None else index[:, positions]
            padded = F.pad(x.q, (k // 2,) * 4).reshape(b, c, -1)
            columns = padded[:, :, index.reshape(-1)].reshape(b, c * k * k, -1)
        with exact_math():
            weight = self.matrix(x.q.device, dtype, channels)
            columns = columns.to(dtype).reshape(b, self.groups, -1, columns.shape[-1])
            sums = (weight @ columns).reshape(b, self.out_channels, -1)
        return self._finish(sums)

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        if not isinstance(x, Grid):
            return super().forward(x)
        if not self.frozen:
            raise RuntimeError("an exact layer computes on grids only after freeze()")
        if x.q.ndim == 3:  # (B, C, n), 1x1 only
            return Grid(self.gather(x[..., None]).q)
        return Grid(self.gather(x).q.reshape(len(x.q), -1, *x.shape[2:]))


class ExactReLU(nn.Module):
    """max(x, 0) of a tensor or a grid."""

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        return Grid(x.q.clamp_min(0), x.frac) if isinstance(x, Grid) else F.relu(x)


def pixel_shuffle(x: Tensor | Grid, r: int) -> Tensor | Grid:
    """(B, C*r*r, h, w) -> (B, C, h*r, w*r)."""
    return Grid(F.pixel_shuffle(x.q, r), x.frac) if isinstance(x, Grid) else F.pixel_shuffle(x, r)


def hardtanh(x: Tensor | Grid) -> Tensor | Grid:
    """Clamp to -1..1."""
    return x.clamp(1 << x.frac) if isinstance(x, Grid) else F.hardtanh(x)
