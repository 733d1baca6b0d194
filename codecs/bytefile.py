"""Files of any bytes through a lossless codec: cut into blocks that are coded in parallel and decode one by one.

    file -> blocks of 4 MiB -> codec.encode_block -> segments "data" -> .nlc

Nothing here imports torch. A block stands for itself: damage elsewhere does not touch it, and any range of the original
decodes from the blocks that hold it.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

from ..container.errors import CorruptStream, LimitExceeded
from ..container.format import (
    DEFAULT_LIMITS,
    END,
    Entry,
    Head,
    Limits,
    Segment,
    Spool,
    Stream,
    crc32c,
    read_head,
    read_segment,
)
from ..entropy.bytes import blocks, framing
from .ordered import ordered_map

_IN_MEMORY = 1 << 26
MOST_JOBS = 4
"""Blocks in work at a time at most: one needs up to 200 MB."""
Progress = Callable[[int, int], None]


class BytesCodec:
    """A codec of bytes. It codes blocks; what is around them is here. ``model_id`` is empty without weights."""

    name: ClassVar[str]
    kind: ClassVar[str] = "bytes"
    presets: ClassVar[dict[str, Any]]
    coder: blocks.BlockCoder | None = None

    def __init__(self, config: Any, preset: str = "custom"):
        self.config = config
        self.preset = preset
        self.model_id = b""

    @classmethod
    def from_preset(cls, preset: str) -> BytesCodec:
        """A codec ready to code. KeyError for an unknown preset, ModelMissing without its weights."""
        return cls(cls.presets[preset], preset)

    def watch(self, progress: Progress, total: int, decoding: bool = False) -> bool:
        """Tell ``progress`` (done, total) within the blocks of ``total`` bytes; False where blocks are too fast for that."""
        return False

    def header(self) -> dict[str, Any]:
        """What the decoder must know beyond the preset."""
        return {}

    def pieces(self, source: BinaryIO) -> Iterator[bytes]:
        """A file in the pieces that are coded one by one."""
        return iter(lambda: _read_fully(source, framing.BLOCK), b"")

    def encode_block(self, data: bytes, effort: int) -> list[bytes]:
        """A piece of a file -> coded blocks."""
        return blocks.encode(data, effort, self.coder)

    def decode_block(self, block: bytes) -> bytes:
        """A coded block -> the original, checked."""
        return blocks.decode(block, self.coder)


class Raw(BytesCodec):
    """Bytes as they are, for files that nothing makes smaller: 31 bytes more than the file."""

    name = "raw"
    presets: ClassVar[dict[str, Any]] = {"": None}

    def encode_block(self, data: bytes, effort: int) -> list[bytes]:
        return [data]

    def decode_block(self, block: bytes) -> bytes:
        return block


@dataclass
class Summary:
    """What became of a file: bytes before and after, and bytes of original by method."""

    length: int = 0
    size: int = 0
    methods: dict[int, int] = field(default_factory=dict)
    model: str = ""


def _read_fully(file: BinaryIO, size: int) -> bytes:
    """``size`` bytes or all that is left; a pipe gives what it has."""
    parts, left = [], size
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def encode_file(
    codec: BytesCodec, source: BinaryIO, out: BinaryIO, effort: int = 5, jobs: int = 1, progress: Progress | None = None,
    total: int = 0, verify: bool = False,
) -> Summary:  # fmt: skip
    """Code all of ``source`` into ``out``. Memory is bounded whatever the length; code waits in a temporary file.

    ``total``: length of the source for ``progress`` (done, total), if it is known. ``verify`` decodes every block again.
    """
    summary = Summary()
    pieces = codec.pieces(source)
    watched = progress is not None and total > 0 and codec.watch(progress, total)

    def work(piece: bytes) -> tuple[bytes, list[bytes]]:
        made = codec.encode_block(piece, effort)
        if verify and b"".join(map(codec.decode_block, made)) != piece:
            raise CorruptStream("verification failed: other bytes came back")
        return piece, made

    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as waiting:
        spool, sizes = Spool(waiting), []
        piece = b""
        for piece, made in ordered_map(work, pieces, min(jobs, MOST_JOBS), ahead=1):
            summary.length += len(piece)
            for block in made:
                spool.add(Segment("data", block))
                sizes.append(len(block))
                what = framing.describe(block)
                summary.methods[what.method] = summary.methods.get(what.method, 0) + what.length
            if progress and not watched:
                progress(summary.length, max(total, summary.length))
        used = set(summary.methods) - {framing.STORED}
        if used == {framing.MIXED} and "cm" in codec.presets:
            preset, model_id = "cm", b""  # no weights are needed to decode it
        else:
            preset, model_id = codec.preset, codec.model_id
        stream = Stream(codec.name, preset, model_id, codec.header())
        summary.model = f"{codec.name}:{preset}"
        if len(piece) == summary.length:  # in memory still: even a few bytes more are seen
            coded, plain = io.BytesIO(), io.BytesIO()
            summary.size, raw = spool.finish(stream, coded), _finish_raw([piece] if piece else [], plain)
            if raw <= summary.size:
                coded, summary.size, summary.model = plain, raw, Raw.name
                summary.methods = {framing.STORED: summary.length} if piece else {}
            out.write(coded.getbuffer())
        elif used:
            summary.size = spool.finish(stream, out)
        else:
            waiting.seek(0)
            stored = (waiting.read(size + 4)[:size] for size in sizes)
            summary.size = _finish_raw((block[framing.describe(block).start :] for block in stored), out)
            summary.model = Raw.name
    return summary


def _finish_raw(pieces: Iterable[bytes], out: BinaryIO) -> int:
    """Write a file of bytes as they are; its size."""
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as waiting:
        spool = Spool(waiting)
        for piece in pieces:
            spool.add(Segment("data", piece))
        return spool.finish(Stream(Raw.name, "", b"", {}), out)


def _payloads(file: BinaryIO, head: Head) -> Iterator[bytes]:
    """All segments in the order of the file, without seeking; then the end of it."""
    for number, entry in enumerate(head.entries):
        if entry.name != "data":
            raise CorruptStream(f"segment {number}: {entry.name!r} has no place in a file of bytes")
        if entry.length > framing.LONGEST + 64:
            raise LimitExceeded(f"segment {number}: {entry.length} bytes are beyond the limit of {framing.LONGEST}")
        data = _read_fully(file, entry.length + 4)
        if len(data) != entry.length + 4:
            raise CorruptStream("file is cut short")
        if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise CorruptStream(f"segment {number} is damaged (checksum)")
        yield data[:-4]
    end = _read_fully(file, 2)
    if end[:1] != END:
        raise CorruptStream("end marker is damaged" if end else "file is cut short")
    if len(end) > 1:
        raise CorruptStream("bytes behind the end")


def decode_file(
    codec: BytesCodec, head: Head, source: BinaryIO, out: BinaryIO | None, jobs: int = 1, most: int | None = None,
    progress: Progress | None = None, total: int = 0,
) -> int:  # fmt: skip
    """Decode what follows ``head`` in ``source`` into ``out`` (or nowhere); bytes of original.

    Every block is checked before it is written. LimitExceeded beyond ``most`` bytes, CorruptStream. ``progress`` hears of
    blocks, or of bytes where these take long and their ``total`` is known.
    """
    length = 0
    watched = progress is not None and total > 0 and codec.watch(progress, total, decoding=True)
    for number, data in enumerate(ordered_map(codec.decode_block, _payloads(source, head), min(jobs, MOST_JOBS), ahead=1)):
        length += len(data)
        if most is not None and length > most:
            raise LimitExceeded(f"more than {most} bytes (--max-bytes)")
        if out is not None:
            out.write(data)
        if progress and not watched:
            progress(number + 1, len(head.entries))
    return length


def encode_bytes(codec: BytesCodec, data: bytes, effort: int = 5, jobs: int = 1) -> bytes:
    """Bytes -> the bytes of a file."""
    out = io.BytesIO()
    encode_file(codec, io.BytesIO(data), out, effort, jobs)
    return out.getvalue()


def decode_bytes(data: bytes, limits: Limits = DEFAULT_LIMITS, jobs: int = 1) -> bytes:
    """The bytes of a file -> the original."""
    from . import registry

    source, out = io.BytesIO(data), io.BytesIO()
    head = read_head(source, limits)
    decode_file(registry.load_for(head), head, source, out, jobs, limits.max_decoded_bytes)
    return out.getvalue()


def lengths(head: Head, file: BinaryIO) -> list[int]:
    """Bytes of original in every segment of a file that can seek, without decoding."""
    if head.codec == Raw.name:
        return [entry.length for entry in head.entries]
    found = []
    for entry in head.entries:
        file.seek(entry.offset)
        found.append(framing.describe(file.read(min(entry.length, framing.HEAD))).length)
    return found


def read_range(codec: BytesCodec, head: Head, file: BinaryIO, start: int, size: int) -> bytes:
    """Bytes start..start+size of the original (fewer at its end), from a file that can seek: only their blocks decode."""
    parts, at = [], 0
    found: list[tuple[Entry, int]] = list(zip(head.entries, lengths(head, file)))
    for entry, length in found:
        if max(at, start) < min(at + length, start + size):
            data = codec.decode_block(read_segment(file, entry))
            parts.append(data[max(start - at, 0) : start + size - at])
        at += length
    return b"".join(parts)
