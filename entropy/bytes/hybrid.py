"""Any bytes through a token-level language model: text and binary apart, tokens that lose nothing, blocks that stand alone.

The text runs of a block, put together, go through ``published`` in the tokens of the model; its binary runs, put together,
through context mixing (the published program: LZMA). Whatever a tokenizer does (drop a control byte, take "<|endoftext|>" for
a command, normalise), its tokens are held against the bytes and replaced where they differ, by others or at last by escapes.

Code of a block: varint number of runs, their lengths (varints, the first one text, then in turn; it may be 0), varint number
of coded blocks of the binary (``blocks``), each with its varint length in front, and the rest is the coded text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...container.errors import CodecError, CorruptStream
from ...container.format import read_varint, varint
from . import blocks
from .published import Settings, code_symbol, finish, look_up, mixture, start

if TYPE_CHECKING:
    from .backends import Backend

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


Report = Callable[[int], None]
"""Hears how many more bytes of text are done."""
_REPORT_EVERY = 64


def encode_text(backend: Backend, alphabet: Alphabet, settings: Settings, data: bytes, report: Report | None = None) -> bytes:
    """Code bytes as tokens of the backend."""
    symbols = alphabet.split(backend, data)
    m = mixture(settings, alphabet.ids, len(data))
    state, buffer = np.zeros(4, np.int64), np.zeros(4 * len(symbols) + 64, np.uint8)
    start(state, buffer, False)
    session = backend.session(settings)
    pending: list[int] = []
    logits = np.zeros(1, np.int32)
    done = 0
    for n, symbol in enumerate(symbols):
        if report and n % _REPORT_EVERY == 0:
            report(done)
            done = 0
        asked = not look_up(m)
        if asked:
            logits, pending = session.logits(pending), []
        escaped = symbol < 0
        what, byte = (alphabet.escape, -1 - symbol) if escaped else (symbol, 0)
        code_symbol(m, state, buffer, logits, asked, what, byte, False)
        if not escaped:
            pending.append(int(alphabet.ids[symbol]))
        done += 1 if escaped else len(alphabet.pieces[symbol])
    if report:
        report(done)
    return buffer[: finish(state, buffer)].tobytes()


def decode_text(
    backend: Backend, alphabet: Alphabet, settings: Settings, payload: bytes, size: int, report: Report | None = None
) -> bytes:
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
    told = size
    while left > 0:
        if report and len(parts) % _REPORT_EVERY == 0:
            report(told - left)
            told = left
        asked = not look_up(m)
        if asked:
            logits, pending = session.logits(pending), []
        symbol, byte = code_symbol(m, state, buffer, logits, asked, 0, 0, True)
        if symbol == alphabet.escape:
            parts.append(bytes([byte]))
        else:
            parts.append(alphabet.pieces[symbol])
            pending.append(int(alphabet.ids[symbol]))
        left -= len(parts[-1])
        if state[3] > end:
            raise CorruptStream("coded text ends too early")
    if report:
        report(told)
    if left < 0:
        raise CorruptStream("coded text: a token reaches beyond the end")
    return b"".join(parts)


# --- blocks -----------------------------------------------------------------------------------------------------------


class TokenMixture:
    """Coder of blocks (``blocks.BlockCoder``) with a language model of tokens."""

    method = blocks.TOKENS

    def __init__(self, backend: Backend, settings: Settings, verify: bool | None = None):
        """``verify``: decode everything that was coded before it counts; by default where the backend is not portable."""
        self.backend, self.settings = backend, settings
        self.alphabet = Alphabet(backend.pieces)
        self.verify = not backend.portable if verify is None else verify
        self.report: Report | None = None
        """Hears of the bytes of text that are coded and, with ``verify``, of those that are decoded again."""
        self.failures = 0
        """Blocks that did not decode and were coded without the language model."""

    def encode(self, data: bytes, effort: int) -> bytes:
        """Code of a block: with the language model, or without it where that is shorter."""
        best = _code([0, len(data)], data, b"", effort)
        runs = segment(data, self.alphabet.missing)
        if sum(runs[::2]):
            text, binary = _apart(data, runs)
            known, plain = self.backend.prepare(text)
            coded = varint(len(known)) + known + (varint(len(plain)) if known else b"")
            coded += encode_text(self.backend, self.alphabet, self.settings, plain, self.report)
            code = _code(runs, binary, coded, effort)
            if len(code) < len(best):
                if not self.verify or self._comes_back(code, data):
                    return code
                self.failures += 1
        return best

    def _comes_back(self, code: bytes, data: bytes) -> bool:
        try:
            return self.decode(code, len(data)) == data
        except CodecError:
            return False

    def decode(self, code: bytes, length: int) -> bytes:
        """The ``length`` bytes of a block. CorruptStream where they cannot be."""
        count, at = read_varint(code, 0, "block")
        if count > length + 2:
            raise CorruptStream("block: more runs than bytes")
        runs = []
        for _ in range(count):
            n, at = read_varint(code, at, "block")
            runs.append(n)
        if sum(runs) != length:
            raise CorruptStream("block: its runs are not as long as it is")
        pieces, at = read_varint(code, at, "block")
        parts = []
        for _ in range(pieces):
            n, at = read_varint(code, at, "block")
            if n > len(code) - at:
                raise CorruptStream("block: ends in its binary part")
            parts.append(code[at : at + n])
            at += n
        sizes = [blocks.describe(part).length for part in parts]
        if sum(sizes) != sum(runs[1::2]):
            raise CorruptStream("block: its binary part has another length than its runs")
        binary = b"".join(map(blocks.decode, parts))
        text = self._decode_text(code[at:], sum(runs[::2]))
        whole, places = [], [0, 0]
        for i, n in enumerate(runs):
            kind = i % 2
            whole.append((text, binary)[kind][places[kind] : places[kind] + n])
            places[kind] += n
        return b"".join(whole)


    def _decode_text(self, code: bytes, size: int) -> bytes:
        if not size:
            return b""
        n, at = read_varint(code, 0, "text")
        known, at = code[at : at + n], at + n
        length = size
        if n:
            length, at = read_varint(code, at, "text")
            if length > 2 * size + 16:
                raise CorruptStream("text: longer in tokens than it may be")
        plain = decode_text(self.backend, self.alphabet, self.settings, code[at:], length, self.report)
        text = self.backend.restore(known, plain)
        if len(text) != size:
            raise CorruptStream("text: has another length than its runs")
        return text


def _code(runs: list[int], binary: bytes, text: bytes, effort: int) -> bytes:
    coded = blocks.encode(binary, effort) if binary else []
    parts = [varint(len(runs)), *map(varint, runs), varint(len(coded))]
    for block in coded:
        parts += [varint(len(block)), block]
    return b"".join([*parts, text])


def _apart(data: bytes, runs: list[int]) -> tuple[bytes, bytes]:
    """Text runs put together, and binary runs."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    at = 0
    for i, n in enumerate(runs):
        parts[i % 2].append(data[at : at + n])
        at += n
    return b"".join(parts[0]), b"".join(parts[1])


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
