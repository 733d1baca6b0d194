"""A slow second implementation of the entropy payload, from ``entropy/SPEC.md`` alone: integers, no library."""

from __future__ import annotations

from collections.abc import Sequence

PRECISION = 24


class ReferenceDecoder:
    """ANS with 32-bit words and a 64-bit state, decoding from the end of the payload."""

    SENTINEL = 0xA5C
    UNIFORM = [1 << PRECISION - 12] * 4096

    def __init__(self, payload: bytes):
        payload += bytes(-len(payload) % 4)
        self.words = [int.from_bytes(payload[i : i + 4], "little") for i in range(0, len(payload), 4)]
        self.state = 0
        for _ in range(2):
            if self.words:
                self.state = self.state << 32 | self.words.pop()

    def symbol(self, widths: Sequence[int]) -> int:
        slot = self.state & (1 << PRECISION) - 1
        symbol, left = 0, 0
        while slot >= left + widths[symbol]:
            left += widths[symbol]
            symbol += 1
        self.state = (self.state >> PRECISION) * int(widths[symbol]) + slot - int(left)
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return symbol

    def at_end(self) -> bool:
        """Whether what is left is the sentinel and nothing else; consumes it."""
        return self.symbol(self.UNIFORM) == self.SENTINEL and self.state == 0 and not self.words

    def values(self, indexes: Sequence[int], rows: Sequence[Sequence[int]], offsets: Sequence[int]) -> list[int]:
        """One ``put``: groups of equal row in increasing order, then the escapes of all groups."""
        order = sorted(range(len(indexes)), key=lambda i: indexes[i])
        result = [0] * len(indexes)
        escaped = []
        for i in order:
            row = indexes[i]
            symbol = self.symbol(rows[row])
            result[i] = symbol + offsets[row]
            if symbol == len(rows[row]) - 1:
                escaped.append(i)
        signs = [self.symbol([1 << 23, 1 << 23]) for _ in escaped]
        high = [self.symbol(self.UNIFORM) for _ in escaped]
        low = [self.symbol(self.UNIFORM) for _ in escaped]
        for i, sign, h, lo in zip(escaped, signs, high, low):
            magnitude = h << 12 | lo
            first = offsets[indexes[i]]
            above = first + len(rows[indexes[i]]) - 1
            result[i] = first - 1 - magnitude if sign else above + magnitude
        return result
