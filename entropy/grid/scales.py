"""From values to numbers of a lattice and back. Only single IEEE operations and integer tables: the same on every machine."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from ...container.errors import CorruptStream

SEGMENTS = 64  # of an octave, within which the logarithm of ``LogScale`` is linear
LOG_STEEPEST = 0.992  # its least slope over that of the logarithm


class Scale(Protocol):
    """``forward`` gives what the kernel subtracts ``offset`` from and multiplies by ``inverse``; ``backward`` undoes it all."""

    offset: float
    inverse: float

    def forward(self, x: np.ndarray) -> np.ndarray: ...

    def backward(self, n: np.ndarray) -> np.ndarray: ...

    def to_bytes(self) -> bytes: ...


def _finite(*values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise CorruptStream("field payload: its scale is not finite")


@dataclass
class PlainScale:
    """x = n * delta + offset, kept within low..high."""

    delta: float = 1.0
    offset: float = 0.0
    low: float = 0.0
    high: float = 0.0

    @property
    def inverse(self) -> float:
        return 1.0 / self.delta

    def forward(self, x: np.ndarray) -> np.ndarray:
        return x

    def backward(self, n: np.ndarray) -> np.ndarray:
        y = n.astype(np.float64)
        y *= self.delta
        y += self.offset
        return np.clip(y, self.low, self.high, out=y)

    def to_bytes(self) -> bytes:
        return struct.pack("<dddd", self.delta, self.offset, self.low, self.high)

    @classmethod
    def read(cls, reader: Any) -> PlainScale:
        values = struct.unpack("<dddd", reader.take(32))
        _finite(*values)
        return cls(*values)


@lru_cache(maxsize=1)
def _log_table() -> np.ndarray:
    """log2(1 + j / SEGMENTS), rounded to 2**-40, float64 (SEGMENTS + 1,): decimals, so that no library matters."""
    with localcontext() as context:
        context.prec = 40
        two = Decimal(2).ln()
        logs = [(1 + Decimal(j) / SEGMENTS).ln() / two for j in range(SEGMENTS + 1)]
        return np.array([int((v * 2**40).to_integral_value()) for v in logs], np.float64) * 2.0**-40


@dataclass
class LogScale(PlainScale):
    """The logarithm to base 2 of |x|, made of straight pieces, on a plain scale."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        return piecewise_log2(x)

    def backward(self, n: np.ndarray) -> np.ndarray:
        y = super().backward(n)
        table = _log_table()
        octave = np.floor(y)
        y -= octave
        j = np.searchsorted(table, y, side="right").clip(1, SEGMENTS) - 1
        left = table[j]
        fraction = (y - left) / (table[j + 1] - left)
        return np.ldexp(1.0 + (j + fraction) * (1.0 / SEGMENTS), octave.clip(-1100, 1100).astype(np.int32))


def piecewise_log2(x: np.ndarray) -> np.ndarray:
    """log2 of |x| > 0 with straight pieces, SEGMENTS to an octave; 0 where x is 0 or not finite."""
    table = _log_table()
    x = np.abs(np.asarray(x, np.float64))
    x = np.where(np.isfinite(x) & (x > 0), x, 1.0)
    mantissa, exponent = np.frexp(x)
    place = (mantissa * 2.0 - 1.0) * SEGMENTS
    j = np.floor(place).astype(np.int64)
    left = table[j]
    return (exponent - 1) + (left + (table[j + 1] - left) * (place - j))


@dataclass
class RegionScale(PlainScale):
    """x over the bound of its cell, on a plain scale. bounds: what regions there are; regions (H, W): which is where."""

    bounds: np.ndarray = field(default_factory=lambda: np.ones(1))
    regions: np.ndarray = field(default_factory=lambda: np.zeros((1, 1), np.uint8))

    def map(self) -> np.ndarray:
        """Bound of each cell (H, W); 1 where it is 0 and cells are stored as they are."""
        return np.where(self.bounds > 0, self.bounds, 1.0)[self.regions]

    def forward(self, x: np.ndarray) -> np.ndarray:
        return x / self.map()

    def backward(self, n: np.ndarray) -> np.ndarray:
        return super().backward(n) * self.map()

    def to_bytes(self) -> bytes:
        head = super().to_bytes() + struct.pack("<BII", len(self.bounds), *self.regions.shape)
        packed = zlib.compress(self.regions.tobytes(), 9)
        return head + self.bounds.astype("<f8").tobytes() + struct.pack("<I", len(packed)) + packed

    @classmethod
    def read(cls, reader: Any) -> RegionScale:
        plain = PlainScale.read(reader)
        count, height, width = struct.unpack("<BII", reader.take(9))
        bounds = np.frombuffer(reader.take(8 * count), "<f8").astype(np.float64)
        (size,) = struct.unpack("<I", reader.take(4))
        packed = reader.take(size)
        if height * width > 1032 * (size + 1):  # zlib packs no better
            raise CorruptStream("field payload: its regions do not fit")
        try:
            raw = zlib.decompressobj().decompress(packed, height * width + 1)
        except zlib.error as error:
            raise CorruptStream(f"field payload: {error}") from error
        regions = np.frombuffer(raw, np.uint8)
        if len(regions) != height * width or not len(regions) or regions.max() >= count or not np.isfinite(bounds).all():
            raise CorruptStream("field payload: its regions do not fit")
        return cls(plain.delta, plain.offset, plain.low, plain.high, bounds, regions.reshape(height, width))


def bits_of(x: np.ndarray) -> np.ndarray:
    """The bits of floats as integers of the same width."""
    return np.ascontiguousarray(x).view(np.int32 if x.dtype.itemsize == 4 else np.int64)


def to_ordered(x: np.ndarray) -> np.ndarray:
    """Floats -> integers of the same width in the same order; all bits are kept."""
    bits = bits_of(x)
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def from_ordered(n: np.ndarray) -> np.ndarray:
    """Inverse of ``to_ordered``."""
    bits = np.where(n < 0, n ^ np.iinfo(n.dtype).max, n)
    return bits.view(np.float32 if n.dtype.itemsize == 4 else np.float64)
