"""The head of a coded block, readable without the coders (and without numba)."""

from __future__ import annotations

from dataclasses import dataclass

from ...container.errors import CorruptStream, LimitExceeded
from ...container.format import crc32c, read_varint, varint

BLOCK = 1 << 22
"""Bytes of original in a block at most, where files are cut."""
LONGEST = 1 << 24
"""Bytes that a reader accepts in a block."""
STORED, MIXED, TEXT, TOKENS = range(4)
METHODS = ("stored", "context mixing", "text model", "token mixture")
HEAD = 16
"""So many bytes of a block hold its head."""


@dataclass(frozen=True)
class Block:
    """What a coded block says of itself: method, length and CRC-32C of the original, where its code begins."""

    method: int
    length: int
    crc: int
    start: int


def frame(method: int, data: bytes, code: bytes) -> bytes:
    """The block of an original and its code."""
    return bytes([method]) + varint(len(data)) + crc32c(data).to_bytes(4, "little") + code


def describe(block: bytes) -> Block:
    """Read the head of a coded block. CorruptStream, LimitExceeded."""
    if not block or block[0] >= len(METHODS):
        raise CorruptStream("block: unknown method; a newer version may read this file" if block else "block: empty")
    length, at = read_varint(block, 1, "block")
    if length > LONGEST:
        raise LimitExceeded(f"a block of {length} bytes is beyond the limit of {LONGEST}")
    if len(block) < at + 4:
        raise CorruptStream("block: ends in its head")
    return Block(block[0], length, int.from_bytes(block[at : at + 4], "little"), at + 4)
