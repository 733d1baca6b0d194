"""How many mantissa bits of a field carry information: the bitwise real information (Kloewer et al. 2021, "Compressing
atmospheric data into its real information content", Nature Computational Science 1, equations 3-6).

The real information of a bit position is the mutual information between that bit of a value and the same bit of its
neighbour. Rounding keeps the bits that hold a given share of it; the relative error is then at most 2^-(kept + 1).
"""

from __future__ import annotations

import numpy as np
from numba import njit

MANTISSA = {4: 23, 8: 52}
FEWEST = 256
"""Pairs of neighbours below which nothing is said about them."""
SIGNIFICANT = 2.575829303548901
"""Quantile of the normal distribution: information that chance alone would show once in a hundred times is none."""


def information(field: np.ndarray) -> np.ndarray:
    """Real information of each bit, most significant (sign) first, of a field (H, W) float32 or float64: (32,) or (64,).

    Neighbours are those along the rows, or along the columns where rows have one value; pairs with a value that is not
    finite are left out. Zeros where there are too few values for any to be significant.
    """
    field = np.atleast_2d(field)
    if field.shape[1] < 2:
        field = field.T
    size = field.dtype.itemsize
    a, b = field[:, :-1], field[:, 1:]
    both = np.isfinite(a) & np.isfinite(b)
    a, b = _signed_exponent(a[both]), _signed_exponent(b[both])
    result = np.zeros(size * 8)
    n = a.size
    if n < FEWEST:
        return result
    for place, (ones_a, ones_b, joint) in enumerate(_counts(a.astype(np.uint64), b.astype(np.uint64), size * 8)):
        counts = np.array([[n - ones_a - ones_b + joint, ones_b - joint], [ones_a - joint, joint]], np.float64) / n
        rows, columns = counts.sum(1, keepdims=True), counts.sum(0, keepdims=True)
        there = counts > 0
        result[place] = float((counts[there] * np.log2((counts / (rows * columns + 1e-300))[there])).sum())
    result[result < _chance(n)] = 0
    return result


@njit(cache=True)
def _counts(a: np.ndarray, b: np.ndarray, width: int) -> np.ndarray:
    """How often each bit, most significant first, is 1 in a, in b, and in both: (width, 3)."""
    found = np.zeros((width, 3), np.int64)
    one = np.uint64(1)
    for i in range(a.size):
        x, y = a[i], b[i]
        for place in range(width - 1, -1, -1):
            p, q = np.int64(x & one), np.int64(y & one)
            found[place, 0] += p
            found[place, 1] += q
            found[place, 2] += p & q
            x >>= one
            y >>= one
    return found


def _signed_exponent(values: np.ndarray) -> np.ndarray:
    """Bits of floats with the exponent as sign and magnitude: the biased one flips all its bits where a value crosses 1."""
    size = values.dtype.itemsize
    bits = np.ascontiguousarray(values).view(f"u{size}")
    mantissa = MANTISSA[size]
    width = size * 8 - 1 - mantissa
    unsigned = bits.dtype.type
    mask = unsigned((1 << width) - 1)
    exponent = ((bits >> unsigned(mantissa)) & mask).astype(np.int64) - ((1 << (width - 1)) - 1)
    coded = np.abs(exponent) | (exponent < 0).astype(np.int64) << (width - 1)
    return (bits & ~unsigned(int(mask) << mantissa)) | coded.astype(bits.dtype) << unsigned(mantissa)


def _chance(n: int) -> float:
    """Information that ``n`` pairs of independent bits show by chance, 99 % of the time less (free entropy of a fair bit)."""
    p = min(0.5 + SIGNIFICANT / (2 * np.sqrt(n)), 1 - 1e-12)
    return float(1 + p * np.log2(p) + (1 - p) * np.log2(1 - p))


def kept_mantissa_bits(info: np.ndarray, share: float, mantissa: int) -> int:
    """Mantissa bits that, with sign and exponent, hold ``share`` of the information.

    What was packed or rounded before shows information in low bits again, which is the trace of the packing and no signal:
    once the information has fallen below half of its peak, bits from the next rise on (by half) are not counted. Where nothing
    shows information (noise, constants, a handful of values) there is nothing to decide by, and all bits are kept.
    """
    info = info.copy()
    first = len(info) - mantissa
    peak = first + int(np.argmax(info[first:]))
    for place in range(peak, len(info) - 1):
        if info[place] < 0.5 * info[peak] and info[place + 1] > 1.5 * info[place]:
            info[place + 1 :] = 0
            break
    total = info.sum()
    if total <= 0:
        return mantissa
    needed = int(np.searchsorted(np.cumsum(info), share * total * (1 - 1e-12)))
    return int(np.clip(needed - first + 1, 0, mantissa))


def keep_bits(field: np.ndarray, share: float) -> list[int]:
    """Kept mantissa bits for each level of a field (T, L, H, W), over all its times."""
    mantissa = MANTISSA[field.dtype.itemsize]
    kept = []
    for level in range(field.shape[1]):
        info = sum(information(field[t, level]) for t in range(field.shape[0]))
        kept.append(kept_mantissa_bits(np.asarray(info), share, mantissa))
    return kept


def rounded(field: np.ndarray, keeps: list[int]) -> np.ndarray:
    """A field (T, L, H, W) with every level rounded to its number of mantissa bits, to nearest, ties to even.

    What is not finite stays; a value that would round to infinity is cut off instead.
    """
    size = field.dtype.itemsize
    mantissa, kind = MANTISSA[size], np.dtype(f"u{size}")
    bits = np.ascontiguousarray(field).view(kind).copy()
    for level, keep in enumerate(keeps):
        drop = mantissa - keep
        if drop <= 0:
            continue
        part = bits[:, level]
        half, odd = kind.type((1 << (drop - 1)) - 1), (part >> kind.type(drop)) & kind.type(1)
        mask = kind.type(~((1 << drop) - 1) & ((1 << size * 8) - 1))
        up = ((part + half + odd) & mask).view(field.dtype)
        cut = (part & mask).view(field.dtype)
        original = field[:, level]
        whole = np.where(np.isfinite(up), up, cut)
        bits[:, level] = np.where(np.isfinite(original), whole, original).view(kind)
    return bits.view(field.dtype)
