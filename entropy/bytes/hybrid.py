"""Any bytes through a token-level language model: text and binary apart, tokens that lose nothing, blocks that stand alone.

A block is a piece of the file. Its text runs, put together, go through ``published`` in the tokens of the model; its binary
runs, put together, through LZMA. Whatever a tokenizer does (drop a control byte, take "<|endoftext|>" for a command,
normalise), its tokens are held against the bytes and replaced where they differ, by other tokens or at last by escaped bytes.

Block: crc32c of the bytes (4, little-endian), kind (1): 0 stored, 1 LZMA, 2 text and binary. Then of kind 2: varint number of
runs, their lengths (varints, the first one text, then in turn; the first may be 0), varint length of the coded binary, the
binary (first byte as kind 0 or 1), and the rest is the coded text.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...container.errors import CorruptStream
from ...container.format import crc32c, read_varint, varint
from .published import Settings, decode_symbol, encode_symbol, finish, look_up, mixture, start

if TYPE_CHECKING:
    from .backends import Backend

STORED, LZMA, HYBRID = range(3)
SHORTEST_TEXT, SHORTEST_BINARY, BRIDGE = 64, 64, 8
_TEXT_BYTES = np.zeros(256, bool)
_TEXT_BYTES[[9, 10, 13, *range(32, 127)]] = True
_BROKEN = re.compile("[\udc80-\udcff]+")
_SEARCH = 32
"""How far a token is looked for behind bytes that the tokenizer dropped."""


class Alphabet:
    """The tokens of a vocabulary that stand for bytes, each a symbol; the symbol behind them is the escape."""

    def __init__(self, pieces: Sequence[bytes | None]):
        """``pieces[id]`` are the bytes of a token, None of one that is never in a text. Of equal pieces the first counts."""
        self.symbol: dict[bytes, int] = {}
        ids = []
        for i, piece in enumerate(pieces):
            if piece and piece not in self.symbol:
                self.symbol[piece] = len(ids)
                ids.append(i)
        self.ids = np.array(ids, np.int32)
        self.pieces = list(self.symbol)
        self.of_id = {i: n for n, i in enumerate(ids)}
        self.escape = len(ids)
        self.missing = np.array([bytes([b]) not in self.symbol for b in range(256)])
        self._longest = min(max(map(len, self.pieces), default=0), _SEARCH)

    def spell(self, data: bytes) -> list[int]:
        """Symbols of any bytes, the longest fitting token each time; -1 - b for a byte b that no token has."""
        out, at = [], 0
        while at < len(data):
            for n in range(min(self._longest, len(data) - at), 0, -1):
                if (symbol := self.symbol.get(data[at : at + n])) is not None:
                    out.append(symbol)
                    at += n
                    break
            else:
                out.append(-1 - data[at])
                at += 1
        return out

    def align(self, ids: Sequence[int], data: bytes) -> list[int]:
        """Symbols of ``data`` that follow the tokenizer's ``ids`` wherever these are right."""
        out: list[int] = []
        at = 0
        for i in ids:
            symbol = self.of_id.get(i)
            if symbol is None:
                continue
            piece = self.pieces[symbol]
            if not data.startswith(piece, at):
                found = data.find(piece, at, at + _SEARCH + len(piece))
                if found < 0:
                    continue
                out += self.spell(data[at:found])
                at = found
            out.append(symbol)
            at += len(piece)
        return out + self.spell(data[at:])

    def split(self, backend: Backend, data: bytes) -> list[int]:
        """Symbols of any bytes: valid UTF-8 through the tokenizer, the rest spelled."""
        text = data.decode("utf-8", "surrogateescape")
        out, at = [], 0
        for broken in [*_BROKEN.finditer(text), None]:
            piece = text[at : broken.start() if broken else len(text)]
            if piece:
                out += self.align(backend.tokenize(piece), piece.encode())
            if broken:
                out += self.spell(broken[0].encode("utf-8", "surrogateescape"))
                at = broken.end()
        return out


# --- text and binary --------------------------------------------------------------------------------------------------


def _text_mask(data: bytes) -> np.ndarray:
    """Which bytes are printable ASCII, tab, line end, or part of a valid multi-byte character, (n,) bool."""
    points = np.frombuffer(data.decode("utf-8", "surrogateescape").encode("utf-32-le", "surrogatepass"), "<u4")
    escaped = (points >= 0xDC80) & (points <= 0xDCFF)
    sizes = 1 + ((points >= 0x80) & ~escaped) + ((points >= 0x800) & ~escaped) + (points >= 0x10000)
    good = np.where(points < 0x80, _TEXT_BYTES[points & 0x7F], ~escaped)
    return np.repeat(good, sizes)


def _runs(mask: np.ndarray) -> np.ndarray:
    """Borders of equal runs, from 0 to n."""
    return np.concatenate([[0], np.flatnonzero(np.diff(mask)) + 1, [len(mask)]])


def _flip_short(mask: np.ndarray, value: bool, shorter: int, keep: np.ndarray | None = None, inner: bool = False) -> None:
    """Turn runs of ``value`` below a length into the other kind, but those that touch ``keep``, or the ends if ``inner``."""
    borders = _runs(mask)
    for a, b in zip(borders[:-1], borders[1:]):
        if mask[a] == value and b - a < shorter and not (keep is not None and keep[a:b].any()):
            if not (inner and (a == 0 or b == len(mask))):
                mask[a:b] = not value


def segment(data: bytes, missing: np.ndarray) -> list[int]:
    """Lengths of text and binary runs in turn, the first one text (perhaps 0). ``missing``: (256,) bytes without a token.

    The published rules: text runs below 64 bytes are binary; gaps of up to 8 bytes in a text belong to it, and so do binary
    runs below 64 bytes without bytes that the model lacks. Data that is UTF-8 with hardly any control bytes is all text.
    """
    if not data:
        return []
    raw = np.frombuffer(data, np.uint8)
    mask = _text_mask(data)
    lacking = missing[raw] & (raw < 128)
    if np.count_nonzero(~mask) * 64 <= len(mask) and not lacking.any():
        return [len(data)]
    mask &= ~lacking
    short = mask.copy()
    borders = _runs(short)
    sizes = np.diff(borders)
    mask &= ~np.repeat(sizes < SHORTEST_TEXT, sizes)
    _flip_short(mask, False, BRIDGE + 1, inner=True)
    if mask.any():
        _flip_short(mask, False, SHORTEST_BINARY, keep=lacking)
    borders = _runs(mask)
    lengths = np.diff(borders).tolist()
    return lengths if mask[0] else [0, *lengths]


# --- text through the mixture -----------------------------------------------------------------------------------------


def encode_text(backend: Backend, alphabet: Alphabet, settings: Settings, data: bytes) -> bytes:
    """Code bytes as tokens of the backend."""
    symbols = alphabet.split(backend, data)
    m = mixture(settings, alphabet.ids, len(data))
    state, buffer = np.zeros(4, np.int64), np.zeros(4 * len(symbols) + 64, np.uint8)
    start(state, buffer, False)
    session = backend.session(settings)
    pending: list[int] = []
    logits = np.zeros(1, np.int32)
    for symbol in symbols:
        asked = not look_up(m)
        if asked:
            logits, pending = session.logits(pending), []
        escaped = symbol < 0
        encode_symbol(m, state, buffer, logits, asked, alphabet.escape if escaped else symbol, -1 - symbol if escaped else 0)
        if not escaped:
            pending.append(int(alphabet.ids[symbol]))
    return buffer[: finish(state, buffer)].tobytes()


def decode_text(backend: Backend, alphabet: Alphabet, settings: Settings, payload: bytes, size: int) -> bytes:
    """Inverse of ``encode_text`` for ``size`` bytes. CorruptStream where that cannot be."""
    m = mixture(settings, alphabet.ids, size)
    state, buffer = np.zeros(4, np.int64), np.frombuffer(bytearray(payload), np.uint8)  # one type of array for both sides
    start(state, buffer, True)
    session = backend.session(settings)
    pending: list[int] = []
    logits = np.zeros(1, np.int32)
    parts: list[bytes] = []
    left = size
    end = 8 * len(payload) + 64
    while left > 0:
        asked = not look_up(m)
        if asked:
            logits, pending = session.logits(pending), []
        symbol, byte = decode_symbol(m, state, buffer, logits, asked)
        if symbol == alphabet.escape:
            parts.append(bytes([byte]))
        else:
            parts.append(alphabet.pieces[symbol])
            pending.append(int(alphabet.ids[symbol]))
        left -= len(parts[-1])
        if state[3] > end:
            raise CorruptStream("coded text ends too early")
    if left < 0:
        raise CorruptStream("coded text: a token reaches beyond the end")
    return b"".join(parts)


# --- blocks -----------------------------------------------------------------------------------------------------------

_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 24}]


def _pack(data: bytes) -> bytes:
    """Bytes stored or under LZMA, whichever is shorter; the first byte tells."""
    small = lzma.compress(data, lzma.FORMAT_RAW, filters=_FILTERS)
    return bytes([LZMA]) + small if len(small) < len(data) else bytes([STORED]) + data


def _unpack(packed: bytes, size: int) -> bytes:
    kind, body = packed[:1], packed[1:]
    if kind == bytes([LZMA]):
        try:
            decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
            body, whole = decoder.decompress(body, max_length=size + 1), decoder
        except (lzma.LZMAError, EOFError) as error:
            raise CorruptStream("binary part of a block is damaged") from error
        if not whole.eof or whole.unused_data:
            raise CorruptStream("binary part of a block has a wrong length")
    elif kind != bytes([STORED]):
        raise CorruptStream("block of an unknown kind")
    if len(body) != size:
        raise CorruptStream("binary part of a block has a wrong length")
    return body


def encode_block(backend: Backend, alphabet: Alphabet, settings: Settings, data: bytes) -> bytes:
    """A block of any bytes."""
    best = _pack(data)
    runs = segment(data, alphabet.missing)
    if sum(runs[::2]):
        text, binary = _apart(data, runs)
        packed = _pack(binary) if binary else b""
        head = varint(len(runs)) + b"".join(map(varint, runs)) + varint(len(packed)) + packed
        hybrid = bytes([HYBRID]) + head + encode_text(backend, alphabet, settings, text)
        best = min(best, hybrid, key=len)
    return crc32c(data).to_bytes(4, "little") + best


def _apart(data: bytes, runs: list[int]) -> tuple[bytes, bytes]:
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    at = 0
    for i, n in enumerate(runs):
        parts[i % 2].append(data[at : at + n])
        at += n
    return b"".join(parts[0]), b"".join(parts[1])


def decode_block(backend: Backend, alphabet: Alphabet, settings: Settings, block: bytes, size: int) -> bytes:
    """The ``size`` bytes of a block. CorruptStream, also when what comes out is not what went in."""
    if len(block) < 5:
        raise CorruptStream("block is too short")
    data = _decode_body(backend, alphabet, settings, block[4:], size)
    if crc32c(data) != int.from_bytes(block[:4], "little"):
        raise CorruptStream("block decodes to other bytes than were coded (checksum)")
    return data


def _decode_body(backend: Backend, alphabet: Alphabet, settings: Settings, body: bytes, size: int) -> bytes:
    if body[0] != HYBRID:
        return _unpack(body, size)
    count, at = read_varint(body, 1, "block")
    if count > len(body):
        raise CorruptStream("block: more runs than bytes")
    runs = []
    for _ in range(count):
        n, at = read_varint(body, at, "block")
        runs.append(n)
    if sum(runs) != size:
        raise CorruptStream("block: its runs are not as long as it is")
    n, at = read_varint(body, at, "block")
    if n > len(body) - at:
        raise CorruptStream("block: ends in its binary part")
    binary = _unpack(body[at : at + n], sum(runs[1::2])) if n else b""
    if len(binary) != sum(runs[1::2]):
        raise CorruptStream("block: its binary part is missing")
    text = decode_text(backend, alphabet, settings, body[at + n :], sum(runs[::2]))
    parts, places = [], [0, 0]
    for i, length in enumerate(runs):
        kind = i % 2
        parts.append((text, binary)[kind][places[kind] : places[kind] + length])
        places[kind] += length
    return b"".join(parts)


def cut(data: bytes, size: int) -> int:
    """Where a block of at most ``size`` bytes ends best: behind a line end, else before a character, else at ``size``."""
    if len(data) <= size:
        return len(data)
    line = data.rfind(b"\n", size - size // 4, size)
    if line >= 0:
        return line + 1
    at = size
    while at > size - 4 and data[at] & 0xC0 == 0x80:
        at -= 1
    return at if at > 0 and data[at] & 0xC0 != 0x80 else size
