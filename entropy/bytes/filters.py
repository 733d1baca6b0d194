"""Reversible filters of machine code: relative targets of calls become absolute ones, which repeat."""

from __future__ import annotations

import numpy as np
from numba import njit

NONE, X86, SPARC, ARM64, X86_ANY = range(5)
NAMES = {"x86": X86_ANY, "sparc": SPARC, "arm64": ARM64}
"""What new files use. ``X86`` is that of older ones: it cannot be undone where a byte E8 precedes a call by less than 5."""


@njit(cache=True, nogil=True)
def _x86_call(data, n, sign):
    """E8/E9 rel32 at ``n`` whose target is within +-16 MiB: moves its operand of 25 bits with a sign. Whether it is one."""
    high = data[n + 4]
    if data[n] & 0xFE != 0xE8 or (high != 0 and high != 255):
        return False
    value = np.int64(data[n + 1]) | np.int64(data[n + 2]) << 8 | np.int64(data[n + 3]) << 16
    value |= (np.int64(high) & 1) << 24
    value = (value + sign * (n + 5)) & 0x1FFFFFF
    data[n + 1] = value & 255
    data[n + 2] = value >> 8 & 255
    data[n + 3] = value >> 16 & 255
    data[n + 4] = 255 if value >> 24 else 0
    return True


@njit(cache=True, nogil=True)
def _x86(data, sign):
    """Calls one behind the other."""
    n = 0
    while n + 5 <= len(data):
        n += 5 if _x86_call(data, n, sign) else 1


@njit(cache=True, nogil=True)
def _x86_any(data, sign):
    """Calls at every place, within others as well: moved from the end, moved back from the beginning.

    A move keeps what made it: E8 or E9 before, 00 or FF at the end. So at every place both ways see the same bytes.
    """
    last = len(data) - 5
    for step in range(last + 1):
        _x86_call(data, last - step if sign > 0 else step, sign)


@njit(cache=True, nogil=True)
def _sparc(data, sign):
    """``call`` (big-endian, top bits 01) whose displacement of words fits 23 bits with a sign."""
    for n in range(0, len(data) - 3, 4):
        word = np.int64(data[n]) << 24 | np.int64(data[n + 1]) << 16 | np.int64(data[n + 2]) << 8 | np.int64(data[n + 3])
        top = word >> 22
        if top == 0x100 or top == 0x1FF:
            value = ((word & 0x7FFFFF) + sign * (n >> 2)) & 0x7FFFFF
            word = 1 << 30 | (0x3F800000 if value >> 22 else 0) | value
            data[n] = word >> 24
            data[n + 1] = word >> 16 & 255
            data[n + 2] = word >> 8 & 255
            data[n + 3] = word & 255


@njit(cache=True, nogil=True)
def _arm64(data, sign):
    """``bl`` (little-endian, top bits 100101), 26 bits of words."""
    for n in range(0, len(data) - 3, 4):
        if data[n + 3] >> 2 == 0x25:
            value = np.int64(data[n]) | np.int64(data[n + 1]) << 8 | np.int64(data[n + 2]) << 16
            value |= (np.int64(data[n + 3]) & 3) << 24
            value = (value + sign * (n >> 2)) & 0x3FFFFFF
            data[n] = value & 255
            data[n + 1] = value >> 8 & 255
            data[n + 2] = value >> 16 & 255
            data[n + 3] = 0x94 | value >> 24


_RUN = {X86: _x86, SPARC: _sparc, ARM64: _arm64, X86_ANY: _x86_any}


def forward(data: np.ndarray, which: int) -> np.ndarray:
    """A filtered copy of bytes (uint8)."""
    out = data.copy()
    if which != NONE:
        _RUN[which](out, 1)
    return out


def inverse(data: np.ndarray, which: int) -> np.ndarray:
    """Undo ``forward``."""
    out = data.copy()
    if which != NONE:
        _RUN[which](out, -1)
    return out
