"""Integer probability tables: made once from floats at freeze time, stored with the weights, used for ever.

A row is a list of widths, integers >= 1 that sum to 2**24. Width 24 is the precision of the coder, so that no conversion
stands between a table and the coder. The last symbol of each row is the escape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

PRECISION = 24
TOTAL = 1 << PRECISION
OFFSET_MAX = 1 << 20  # keeps all values of the coder within 32 bits
ESCAPE_BITS = 25  # sign and 24 bits of magnitude follow an escape


@dataclass(frozen=True, eq=False)
class Tables:
    """Rows of integer widths. Row r codes the values offsets[r] .. offsets[r] + lengths[r] - 2, and everything else by escape.

    widths: int32 (sum(lengths),), all rows one after another; lengths, offsets: int32 (n,).
    """

    widths: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray

    def __post_init__(self) -> None:
        ends = np.cumsum(self.lengths, dtype=np.int64)
        if len(self.lengths) != len(self.offsets) or len(ends) == 0 or ends[-1] != len(self.widths):
            raise ValueError("tables: lengths, offsets and widths do not fit each other")
        if self.lengths.min() < 2 or self.widths.min() < 1:
            raise ValueError("tables: a row needs two symbols, a symbol a width of at least 1")
        if self.offsets.min() < -OFFSET_MAX or self.offsets.max() > OFFSET_MAX:
            raise ValueError(f"tables: an offset lies outside of +-{OFFSET_MAX}")
        if (np.add.reduceat(self.widths.astype(np.int64), ends - self.lengths) != TOTAL).any():
            raise ValueError(f"tables: the widths of a row must sum to {TOTAL}")

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of each row in ``widths``, int64 (n,)."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def row(self, r: int) -> np.ndarray:
        """Widths of row r, int32 (lengths[r],)."""
        return self.widths[self.starts[r] : self.starts[r] + self.lengths[r]]

    def bits(self, values: np.ndarray, indexes: np.ndarray) -> np.ndarray:
        """Ideal cost in bits of integer ``values`` (n,) coded with rows ``indexes`` (n,), escapes included; float64 (n,)."""
        symbol = values.astype(np.int64) - self.offsets[indexes]
        escape = self.lengths[indexes] - 1
        outside = (symbol < 0) | (symbol >= escape)
        symbol = np.where(outside, escape, symbol)
        return PRECISION - np.log2(self.widths[self.starts[indexes] + symbol]) + ESCAPE_BITS * outside

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a weights file."""
        return {"widths": self.widths, "lengths": self.lengths, "offsets": self.offsets}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Tables:
        """Inverse of ``to_arrays``; ValueError when the arrays are not valid tables."""
        return cls(*(np.ascontiguousarray(arrays[k], dtype=np.int32) for k in ("widths", "lengths", "offsets")))


def quantise_pmf(pmf: np.ndarray) -> np.ndarray:
    """Integer widths >= 1 that sum to 2**24 and follow ``pmf`` (n,): largest remainders over one unit each."""
    pmf = np.maximum(np.asarray(pmf, np.float64), 0)
    share = pmf / pmf.sum() * (TOTAL - len(pmf))
    widths = np.floor(share)
    missing = int(TOTAL - len(pmf) - widths.sum())
    widths[np.argsort(widths - share, kind="stable")[:missing]] += 1
    return (widths + 1).astype(np.int32)


def pmf_to_tables(pmfs: Sequence[np.ndarray], offsets: Sequence[int]) -> Tables:
    """Tables from float probabilities: ``pmfs[r][k]`` is that of the value offsets[r] + k; the rest goes to the escape."""
    rows = [quantise_pmf(np.append(p, max(0.0, 1.0 - float(np.sum(p))))) for p in pmfs]
    return Tables(
        np.concatenate(rows), np.array([len(r) for r in rows], np.int32), np.asarray(offsets, dtype=np.int32)
    )
