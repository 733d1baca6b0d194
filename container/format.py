"""The ``.nlc`` file: one head under one checksum, then segments, each under its own. Byte by byte: SPEC.md."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, BinaryIO

from . import cbor
from .errors import CorruptStream, LimitExceeded


def crc32c(data: bytes) -> int:
    """CRC-32C of ``data``."""
    from google_crc32c import value  # not at the head: training runs where this package is missing

    return value(data)


MAGIC = b"\x89NLC\r\n\x1a\n"
VERSION = 1
END = b"\xed"
ID_BYTES = 8
# Names that take one byte in the segment table. The order is part of the format: append only.
NAMES = ("data", "tile", "alpha", "icc", "exif", "xmp", "y", "z", "residual", "index", "comment")
_ANCILLARY, _RUN, _NAME = 0x80, 0x40, 0x3F
_EXPLICIT = 0x3F


@dataclass(frozen=True)
class Limits:
    """What a reader accepts before it allocates. Raise them for large files that you trust."""

    max_side: int = 65_535
    max_pixels: int = 1 << 28
    max_frames: int = 1_000_000
    max_decoded_bytes: int = 1 << 31
    max_header_bytes: int = 1 << 22
    max_segments: int = 1 << 20
    max_metadata_bytes: int = 1 << 26

    def check_picture(self, width: int, height: int, where: str = "picture") -> None:
        """LimitExceeded for a picture that is too large, CorruptStream for sides below 1."""
        if width < 1 or height < 1:
            raise CorruptStream(f"{where}: a size of {width}x{height} makes no sense")
        if max(width, height) > self.max_side:
            raise LimitExceeded(f"{where}: {width}x{height} is beyond the limit of {self.max_side} per side (--max-side)")
        if width * height > self.max_pixels:
            raise LimitExceeded(
                f"{where}: {width}x{height} is beyond the limit of {self.max_pixels} pixels (--max-pixels)"
            )


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Segment:
    """A named piece of payload. A damaged ancillary one (metadata) is dropped, a damaged critical one is an error."""

    name: str
    data: bytes
    critical: bool = True


@dataclass
class Stream:
    """What a codec makes and takes. ``warnings`` is filled by ``loads``."""

    codec: str
    preset: str
    model_id: bytes
    header: dict[str, Any]
    segments: list[Segment] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list, compare=False)

    def get(self, name: str) -> bytes | None:
        """Data of the first segment of that name."""
        return next((s.data for s in self.segments if s.name == name), None)


@dataclass(frozen=True)
class Entry:
    """A row of the segment table: where the payload lies in the file."""

    name: str
    critical: bool
    offset: int
    length: int


@dataclass(frozen=True)
class Head:
    """Everything in a file but the payload."""

    codec: str
    preset: str
    model_id: bytes
    header: dict[str, Any]
    entries: list[Entry]
    file_size: int


def varint(n: int) -> bytes:
    """LEB128 of n >= 0, shortest form."""
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def read_varint(data: bytes, at: int, what: str) -> tuple[int, int]:
    """(number, place behind it) of a ``varint`` at a place. CorruptStream, which names ``what`` it was read for."""
    n = 0
    for shift in range(0, 63, 7):
        if at >= len(data):
            raise CorruptStream(f"{what}: ends too early")
        byte = data[at]
        at += 1
        n |= (byte & 127) << shift
        if byte < 128:
            if byte == 0 and shift:
                raise CorruptStream(f"{what}: a number is not in its shortest form")
            return n, at
    raise CorruptStream(f"{what}: a number is too long")


def _table(rows: Iterable[tuple[str, bool, int]]) -> bytes:
    out = bytearray()
    for (name, critical), group in groupby(rows, lambda row: row[:2]):
        lengths = [length for *_, length in group]
        known = NAMES.index(name) if name in NAMES else _EXPLICIT
        out.append(known | (0 if critical else _ANCILLARY) | (_RUN if len(lengths) > 1 else 0))
        if known == _EXPLICIT:
            raw = name.encode("ascii")
            if not 0 < len(raw) < 128:
                raise ValueError("a segment name has 1..127 ASCII characters")
            out += varint(len(raw)) + raw
        if len(lengths) > 1:
            out += varint(len(lengths))
        for length in lengths:
            out += varint(length)
    return bytes(out)


def _read_table(data: bytes, limits: Limits) -> Iterator[tuple[str, bool, int]]:
    at, count, last = 0, 0, None
    while at < len(data):
        code = data[at]
        at += 1
        known = code & _NAME
        if known == _EXPLICIT:
            size, at = read_varint(data, at, "segment table")
            raw = data[at : at + size]
            at += size
            if not 0 < size < 128 or len(raw) != size or not raw.isascii() or raw.decode("ascii") in NAMES:
                raise CorruptStream("segment table: bad name")
            name = raw.decode("ascii")
        elif known < len(NAMES):
            name = NAMES[known]
        else:
            raise CorruptStream(f"segment table: unknown code {known}; a newer version may read this file")
        run = 1
        if code & _RUN:
            run, at = read_varint(data, at, "segment table")
            if run < 2 or run > len(data) - at:
                raise CorruptStream("segment table: bad count")
        critical = not code & _ANCILLARY
        if (name, critical) == last:
            raise CorruptStream("segment table: a run is split")
        last = (name, critical)
        count += run
        if count > limits.max_segments:
            raise LimitExceeded(f"more than {limits.max_segments} segments")
        for _ in range(run):
            length, at = read_varint(data, at, "segment table")
            yield name, critical, length


def _start(stream: Stream, rows: Iterable[tuple[str, bool, int]]) -> bytes:
    """Everything before the first payload."""
    if len(stream.model_id) not in (0, ID_BYTES):
        raise ValueError(f"a model id has {ID_BYTES} bytes, or none")
    head = cbor.encode([stream.codec, stream.preset, stream.model_id, stream.header]) + _table(rows)
    start = bytes([VERSION]) + varint(len(head)) + head
    return MAGIC + start + crc32c(start).to_bytes(4, "little")


def dumps(stream: Stream) -> bytes:
    """The bytes of a file. ValueError or TypeError for what the format cannot hold."""
    parts = [_start(stream, ((s.name, s.critical, len(s.data)) for s in stream.segments))]
    for segment in stream.segments:
        parts += [segment.data, crc32c(bytes(segment.data)).to_bytes(4, "little")]
    return b"".join([*parts, END])


class Spool:
    """The way into a file that is larger than memory: payloads wait in ``file`` until their table can be written."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._rows: list[tuple[str, bool, int]] = []

    def add(self, segment: Segment) -> None:
        """Append a segment."""
        self._file.write(segment.data)
        self._file.write(crc32c(bytes(segment.data)).to_bytes(4, "little"))
        self._rows.append((segment.name, segment.critical, len(segment.data)))

    def finish(self, stream: Stream, out: BinaryIO) -> int:
        """Write the file whose head is that of ``stream`` and whose segments are those added; its size in bytes."""
        start = _start(stream, self._rows)
        out.write(start)
        self._file.seek(0)
        shutil.copyfileobj(self._file, out, 1 << 20)
        out.write(END)
        return len(start) + sum(length + 4 for *_, length in self._rows) + len(END)


def sniff(prefix: bytes) -> bool:
    """Whether a file that begins with ``prefix`` is ours."""
    return prefix[: len(MAGIC)] == MAGIC


def read_head(file: BinaryIO, limits: Limits = DEFAULT_LIMITS) -> Head:
    """Read a file up to the end of its head, and no further. CorruptStream, LimitExceeded."""
    magic = file.read(len(MAGIC))
    if magic != MAGIC:
        if magic[:4] == MAGIC[:4]:
            raise CorruptStream("line ends were changed in transfer: fetch the file again in binary mode")
        raise CorruptStream("empty file" if not magic else "not an .nlc file")
    start = bytearray(file.read(1))
    if not start:
        raise CorruptStream("file ends in its head")
    if start[0] != VERSION:
        raise CorruptStream(f"format version {start[0]} (or damage); this program reads version {VERSION}")
    while len(start) < 6 and (byte := file.read(1)):
        start += byte
        if byte[0] < 128:
            break
    size, at = read_varint(bytes(start), 1, "head")
    if size > limits.max_header_bytes:
        raise LimitExceeded(f"a head of {size} bytes is beyond the limit of {limits.max_header_bytes}")
    rest = file.read(size + 4)
    if len(rest) != size + 4:
        raise CorruptStream("file ends in its head")
    start += rest[:size]
    if crc32c(bytes(start)) != int.from_bytes(rest[size:], "little"):
        raise CorruptStream("head is damaged (checksum)")
    fields, used = cbor.decode_prefix(rest[:size])
    if not (
        isinstance(fields, list)
        and [type(f) for f in fields] == [str, str, bytes, dict]
        and len(fields[2]) in (0, ID_BYTES)
    ):
        raise CorruptStream("head: not codec, preset, model id and header")
    offset = len(MAGIC) + at + size + 4
    entries = []
    for name, critical, length in _read_table(rest[used:size], limits):
        entries.append(Entry(name, critical, offset, length))
        offset += length + 4
    return Head(*fields, entries, offset + len(END))


def read_segment(file: BinaryIO, entry: Entry) -> bytes:
    """The payload of one row of the table, from a file that can seek. CorruptStream when it is cut or changed."""
    file.seek(entry.offset)
    data = file.read(entry.length + 4)
    if len(data) != entry.length + 4:
        raise CorruptStream(f"segment {entry.name} is cut short")
    if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise CorruptStream(f"segment {entry.name} is damaged (checksum)")
    return data[:-4]


def loads(data: bytes | memoryview, limits: Limits = DEFAULT_LIMITS) -> Stream:
    """A file's content, every byte checked. Damaged ancillary segments are dropped and named in ``warnings``."""
    data = bytes(data)
    head = read_head(io.BytesIO(data), limits)
    if len(data) < head.file_size:
        raise CorruptStream(f"file is cut short: {len(data)} of {head.file_size} bytes")
    if len(data) > head.file_size:
        raise CorruptStream(f"{len(data) - head.file_size} bytes behind the end")
    if data[-1:] != END:
        raise CorruptStream("end marker is damaged")
    stream = Stream(head.codec, head.preset, head.model_id, head.header)
    for number, entry in enumerate(head.entries):
        end = entry.offset + entry.length
        payload = data[entry.offset : end]
        if crc32c(payload) == int.from_bytes(data[end : end + 4], "little"):
            stream.segments.append(Segment(entry.name, payload, entry.critical))
        elif entry.critical:
            raise CorruptStream(f"segment {number} ({entry.name}) is damaged (checksum)")
        else:
            stream.warnings.append(f"segment {number} ({entry.name}) is damaged and was left out")
    return stream
