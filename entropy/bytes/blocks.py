"""Blocks: a piece of a file, coded on its own by the method that suits it. Byte by byte: SPEC.md.

A coded block says how long the original is and what its checksum is; ``decode`` gives the original or an error.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ...container.errors import CorruptStream, ModelMissing
from ...container.format import crc32c, read_varint, varint
from . import binary, detect, filters
from .framing import LONGEST, METHODS, MIXED, STORED, TOKENS, describe, frame

_FAST = 3  # up to this effort no model is asked
_BOTH = 1 << 16  # up to this size both coders are tried where either may win


class BlockCoder(Protocol):
    """A coder of blocks that has a model: of text, or the published token mixture."""

    method: int

    def encode(self, data: bytes, effort: int) -> bytes:
        """Original -> code."""

    def decode(self, code: bytes, length: int) -> bytes:
        """Code -> original; CorruptStream where damage shows."""


def encode(data: bytes, effort: int, coder: BlockCoder | None = None) -> list[bytes]:
    """A piece of a file of at most ``LONGEST`` bytes -> its coded blocks (several where its content changes).

    ``coder`` is asked for text, or for everything if its method is TOKENS; ``effort`` is 1..9.
    """
    if coder is not None and coder.method == TOKENS:
        return [_smallest(data, [(TOKENS, coder.encode(data, effort))])]
    array = np.frombuffer(data, np.uint8)
    return [_encode_run(data[a:b], array[a:b], kind, effort, coder) for a, b, kind in detect.segments(array)]


def _encode_run(data: bytes, array: np.ndarray, kind: int, effort: int, coder: BlockCoder | None) -> bytes:
    if detect.is_noise(array):
        return _smallest(data, [])
    candidates = []
    if coder is not None and kind == detect.TEXT and effort > _FAST:
        candidates.append((coder.method, coder.encode(data, effort)))
    if not candidates or len(data) <= _BOTH:
        mixed = _mixed(array, effort)
        if mixed is not None:
            candidates.append((MIXED, mixed))
    return _smallest(data, candidates)


def _smallest(data: bytes, candidates: list[tuple[int, bytes]]) -> bytes:
    method, code = min([*candidates, (STORED, data)], key=lambda c: len(c[1]))
    return frame(method, data, code)


def prepare(array: np.ndarray, effort: int) -> tuple[np.ndarray, int, int, int, int]:
    """(filtered bytes, filter, kind, stride, row): how context mixing takes a block."""
    kind, stride, row = detect.kind_of(array, effort)
    which = filters.NONE
    if kind == binary.MACHINE:
        which = filters.NAMES.get(detect.machine_of(array[:4096].tobytes()) or "", filters.NONE)
        filtered = filters.forward(array, which)
        if np.array_equal(filters.inverse(filtered, which), array):
            return filtered, which, kind, stride, row
        which = filters.NONE
    return array, which, kind, stride, row


def _mixed(array: np.ndarray, effort: int) -> bytes | None:
    array, which, kind, stride, row = prepare(array, effort)
    head = bytes([effort | kind << 4])
    if kind == binary.MACHINE:
        head += bytes([which])
    if kind != binary.GENERAL:
        head += varint(stride) + varint(row)
    code = binary.encode(array, binary.plan_of(effort, kind), stride, row)
    return None if code is None else head + code


def _unmixed(code: bytes, length: int) -> bytes:
    if not code:
        raise CorruptStream("block: ends in its head")
    effort, kind = code[0] & 15, code[0] >> 4
    at, which, stride, row = 1, filters.NONE, 4, 16
    if not 1 <= effort <= 9 or kind > binary.MACHINE:
        raise CorruptStream("block: unknown kind of data; a newer version may read this file")
    if kind == binary.MACHINE:
        which, at = code[1] if len(code) > 1 else 255, 2
        if which > filters.X86_ANY:
            raise CorruptStream("block: unknown filter; a newer version may read this file")
    if kind != binary.GENERAL:
        stride, at = read_varint(code, at, "block")
        row, at = read_varint(code, at, "block")
        if not (1 <= stride <= LONGEST and 1 <= row <= LONGEST):
            raise CorruptStream("block: records of this size make no sense")
    return filters.inverse(binary.decode(code[at:], length, binary.plan_of(effort, kind), stride, row), which).tobytes()


def decode(block: bytes, coder: BlockCoder | None = None) -> bytes:
    """A coded block -> the original, checked. CorruptStream; ModelMissing where it needs a ``coder`` that is not given."""
    what = describe(block)
    code = block[what.start :]
    if what.method == STORED:
        data = code
    elif what.method == MIXED:
        data = _unmixed(code, what.length)
    elif coder is None or coder.method != what.method:
        raise ModelMissing(f"the block was made by a {METHODS[what.method]} that is not here")
    else:
        data = coder.decode(code, what.length)
    if len(data) != what.length or crc32c(data) != what.crc:
        raise CorruptStream("the checksum of the original is wrong")
    return data
