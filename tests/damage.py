"""Damaged copies of a file, reproducibly: what a reader must survive."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from neuralcodec.container.errors import CodecError


def cuts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """The file cut at every byte."""
    for n in range(len(data)):
        yield f"cut at {n}", data[:n]


def mutations(data: bytes, other: bytes, n: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """``n`` damaged copies of ``data``: flips, cuts, splices with ``other``, noise, zeros, inflated bytes, insertions."""
    rng = random.Random(seed)
    kinds = ("flip", "flips", "cut", "splice", "noise", "zeros", "inflate", "insert", "remove", "swap")
    made = 0
    while made < n:
        kind = rng.choice(kinds)
        copy = bytearray(data)
        at = rng.randrange(len(data))
        if kind == "flip":
            copy[at] ^= 1 << rng.randrange(8)
        elif kind == "flips":
            for _ in range(rng.randrange(2, 20)):
                copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del copy[at:]
        elif kind == "splice":
            copy[at:] = other[rng.randrange(len(other)) :]
        elif kind == "noise":
            copy[at : at + 16] = rng.randbytes(min(16, len(copy) - at))
        elif kind == "zeros":
            copy[at : at + 8] = bytes(min(8, len(copy) - at))
        elif kind == "inflate":
            copy[at] = 0xFF
        elif kind == "insert":
            copy[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == "remove":
            del copy[at : at + rng.randrange(1, 9)]
        else:
            to = rng.randrange(len(copy))
            copy[at], copy[to] = copy[to], copy[at]
        if bytes(copy) != data:
            made += 1
            yield f"{kind} at {at} (number {made})", bytes(copy)


def assert_refused(decode: Callable[[bytes], Any], data: bytes, other: bytes, n: int = 300) -> None:
    """Every cut and ``n`` mutations of ``data`` end in a typed error."""
    for how, bad in (*cuts(data), *mutations(data, other, n)):
        with pytest.raises(CodecError):
            decode(bad)
            pytest.fail(how)


def forged(body: bytes, seal: Callable[[bytes], bytes], n: int, seed: int = 0) -> Iterator[bytes]:
    """``n`` copies of a body with one to three bytes changed, under the checksum that ``seal`` gives."""
    rng = random.Random(seed)
    for _ in range(n):
        copy = bytearray(body)
        for _ in range(rng.randrange(1, 4)):
            copy[rng.randrange(len(copy))] = rng.randrange(256)
        yield bytes(copy) + seal(bytes(copy))
