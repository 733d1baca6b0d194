"""Canonical CBOR (RFC 8949, section 4.2.1) of plain values, strict in both directions.

Values: None, bool, int (64 bit), float (always 64 bit), str, bytes, list, and dict with str keys. One value has exactly one
encoding, and the reader refuses every other: shortest lengths, sorted keys, no duplicates, nothing behind the value.
"""

from __future__ import annotations

import struct
from typing import Any

from .errors import CorruptStream

MAX_DEPTH = 8
_SIZES = {24: 1, 25: 2, 26: 4, 27: 8}
_SIMPLE = {False: 0xF4, True: 0xF5, None: 0xF6}


def _head(major: int, n: int) -> bytes:
    if n < 24:
        return bytes([major << 5 | n])
    for info, size in _SIZES.items():
        if n < 1 << 8 * size:
            return bytes([major << 5 | info]) + n.to_bytes(size, "big")
    raise ValueError(f"integer {n} needs more than 64 bits")


def encode(value: Any) -> bytes:
    """Bytes of a plain value. TypeError or ValueError for anything else."""
    if value is None or isinstance(value, bool):
        return bytes([_SIMPLE[value]])
    if isinstance(value, int):
        return _head(0, value) if value >= 0 else _head(1, -1 - value)
    if isinstance(value, float):
        return b"\xfb" + struct.pack(">d", value)
    if isinstance(value, bytes):
        return _head(2, len(value)) + value
    if isinstance(value, str):
        data = value.encode()
        return _head(3, len(data)) + data
    if isinstance(value, (list, tuple)):
        return _head(4, len(value)) + b"".join(map(encode, value))
    if isinstance(value, dict):
        if not all(isinstance(k, str) for k in value):
            raise TypeError("keys must be str")
        return _head(5, len(value)) + b"".join(k + encode(v) for k, v in sorted((encode(k), v) for k, v in value.items()))
    raise TypeError(f"{type(value).__name__} is not a plain value")


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise CorruptStream("header: ends too early")
        self.at += n
        return self.data[self.at - n : self.at]

    def value(self, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise CorruptStream("header: nested too deeply")
        first = self.take(1)[0]
        major, info = first >> 5, first & 31
        if major == 7:
            return self._simple(first)
        if info < 24:
            n = info
        elif info in _SIZES:
            n = int.from_bytes(self.take(_SIZES[info]), "big")
            if n < 24 or (info > 24 and n < 1 << 8 * _SIZES[info - 1]):
                raise CorruptStream("header: a length is not in its shortest form")
        else:
            raise CorruptStream("header: unknown kind of length")
        if major == 0:
            return n
        if major == 1:
            return -1 - n
        if n > len(self.data) - self.at:  # each item takes a byte at least: refuse before anything is allocated
            raise CorruptStream("header: a length goes beyond the end")
        if major == 2:
            return self.take(n)
        if major == 3:
            try:
                return self.take(n).decode()
            except UnicodeDecodeError as error:
                raise CorruptStream("header: text is not UTF-8") from error
        if major == 4:
            return [self.value(depth + 1) for _ in range(n)]
        if major == 5:
            return self._map(n, depth)
        raise CorruptStream("header: tags are not used here")

    def _map(self, n: int, depth: int) -> dict[str, Any]:
        result, last = {}, b""
        for _ in range(n):
            start = self.at
            key = self.value(depth + 1)
            raw = self.data[start : self.at]
            if not isinstance(key, str) or raw <= last:
                raise CorruptStream("header: keys must be texts in order, each once")
            last, result[key] = raw, self.value(depth + 1)
        return result

    def _simple(self, first: int) -> Any:
        if first == 0xFB:
            return struct.unpack(">d", self.take(8))[0]
        for value, code in _SIMPLE.items():
            if code == first:
                return value
        raise CorruptStream("header: unknown simple value")


def decode_prefix(data: bytes) -> tuple[Any, int]:
    """(value, bytes used) of the value at the start of ``data``. CorruptStream unless it is canonical."""
    reader = _Reader(data)
    return reader.value(), reader.at


def decode(data: bytes) -> Any:
    """The value that ``data`` holds, all of it."""
    value, used = decode_prefix(data)
    if used != len(data):
        raise CorruptStream("header: bytes left over")
    return value
