"""Context mixing of latents: what the networks predict, corrected by what the picture has shown so far.

The networks of a hyperprior see the anchors of a slice only when all of them are coded, and know nothing of this picture that
they did not expect. A sequential coder does: it takes from the networks the row of the scale table of every symbol, and mixes
the chances that this row gives with those that were counted in contexts (logistic mixing, as in PAQ; Mahoney 2005), in
integers. Contexts are how large the symbols around are beside what their rows promised, and a linear prediction of the symbol
from its neighbours in the channel; the second makes most of the gain, for signs of anchors above all. Counts, mixing weights
and taps of the prediction start at what the training pictures left (``train/mixing.py``), and adapt while a tile is coded.

The hyper-latent z goes the same way where there is a ``HyperStart``: no network predicts it, so its rows are those that fit a
channel at a level, and the contexts do what the fixed table of a channel cannot.

Byte-level description: ``SPEC.md`` beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numba import njit

from ..container.errors import CorruptStream
from ..container.format import read_varint, varint
from . import binary
from .binary import REACH, SQUASH, STRETCH, code_bit, code_tail, learned, raw_bits
from .levels import interpolate
from .tables import PRECISION, Tables

UNARY = 14  # decisions on the size of a symbol; whatever is larger goes on with an Exp-Golomb code
LARGEST = 15  # bits of |q|
KINDS = 4  # of decisions on sizes: the first three apart, all others together
ROWS = 64  # of the scale table
SKIPPED = 255  # the row of a symbol that is not coded
EXPECT = 1024  # expected sizes are in units of 1/1024
SIZE_MAX = 40  # up to which a size counts in sums
RATIOS = 12  # classes of a ratio of sizes, half an octave each
TILTS = 8  # classes of the size of a prediction, an octave each
TILT_UNIT = 82  # prediction from which on the second class begins, in 1/4096
UNSEEN = 40  # count at which a context starts that training has not seen
COUNT_MAX = 1023
KEPT_MAX = 40  # count that training may leave: what a picture shows counts for more
LEARN = 14  # the rate of mixing weights, a shift
INPUTS, SIGNS = 7, 4  # contexts of a decision on a size and on a sign
FIRST_SETS = ROWS // 4 * TILTS  # of mixing weights for first decisions
WEIGHT_SETS = FIRST_SETS + ROWS * (KINDS - 1)
SIGN_START = 1 << 21
SENTINEL = 0xA5

# Neighbours of an anchor among the anchors coded before it, and of the others among anchors and others; (row, column)
NEIGHBOURS = np.array([
    [[-1, -1], [-1, 1], [0, -2], [-2, 0], [-1, -3], [-1, 3], [-2, -2], [-2, 2]],
    [[-1, 0], [1, 0], [0, -1], [0, 1], [-1, -1], [-1, 1], [0, -2], [-2, 0]],
], np.int64)  # fmt: skip
TAPS = NEIGHBOURS.shape[1]
# 256 * 2**((b - 6.5) / 2), b = 1..11, rounded up: where the classes of ratios begin
RATIO_EDGES = (39, 54, 77, 108, 153, 216, 305, 431, 609, 862, 1218)
RATIO_CLASS = np.searchsorted(np.array(RATIO_EDGES), np.arange(2048), side="right").astype(np.int64)
RATE = np.array([65536 * 2 // (2 * n + 3) for n in range(COUNT_MAX + 1)], np.int64)


def sizes_of(channels: int) -> np.ndarray:
    """Places that each input has among the counts, for so many channels."""
    own = (RATIOS, RATIOS, 2 * TILTS)
    pairs = ROWS // 2 * RATIOS * RATIOS, ROWS * RATIOS, ROWS // 2 * 3 * RATIOS
    inputs = [*(ROWS * n for n in own), channels * ROWS // 4, *pairs]
    signs = [ROWS // 2 * 2 * TILTS * 2, channels * 2 * TILTS, channels * 50, 2 * TILTS * RATIOS]
    return np.array([n * KINDS for n in inputs] + signs, np.int64)


@njit(cache=True, nogil=True, error_model="numpy")
def _decide(bit, base, chance, count, slots, maps, weights, wset, x, coder, buf, decode):
    """Code one decision. base: the logit, in 1/256, of ``chance`` (22 bits), which the networks give. slots: of ``count``
    contexts in maps (uint32: 22 bits of probability, 10 of count, 0 for one never seen)."""
    total = base << 16
    for i in range(count):
        m = np.int64(maps[slots[i]])
        if m == 0:
            m = chance << 10 | UNSEEN
            maps[slots[i]] = np.uint32(m)
        x[i] = np.int64(STRETCH[m >> 18]) - base
        total += weights[wset, i] * x[i]
    p = min(max(np.int64(SQUASH[min(max(total >> 16, -REACH), REACH) + REACH]), 1), 65535)
    bit = code_bit(bit, p, coder, buf, decode)
    error = (bit << 16) - p
    for i in range(count):
        weights[wset, i] += (x[i] * error + (1 << (LEARN - 1))) >> LEARN
        maps[slots[i]] = np.uint32(learned(np.int64(maps[slots[i]]), bit, RATE))
    return bit


@njit(cache=True, nogil=True, error_model="numpy")
def _ratio(num, den, least):
    r = ((num + least) << 8) // (den + least)
    return RATIO_CLASS[r] if r < 2048 else RATIOS - 1


@njit(cache=True, nogil=True, error_model="numpy")
def _sign(v):
    return 1 if v > 0 else (-1 if v < 0 else 0)


@njit(cache=True, nogil=True, error_model="numpy")
def code_pass(q, rows, first, count, half, taps, starts, chances, logits, expected, low_bits, maps, weights, sign_weights, seen,
              due, coder, buf, decode):
    """Code, or decode into ``q``, the symbols of a pass: channels ``first`` up to first + count, cells of one parity.

    q (C, h, w) int32; rows (C, h, w) uint8, SKIPPED where nothing is coded. chances, logits (ROWS, UNARY); expected (256,);
    low_bits (ROWS,). seen, due (h, w) int64: sums over the channels so far of sizes and of expected ones, in 1/EXPECT.
    """
    _, h, w = q.shape
    x = np.zeros(INPUTS, np.int64)
    slots = np.zeros(INPUTS, np.int64)
    for c in range(first, first + count):
        own, own_rows = q[c], rows[c]
        channel_seen = np.int64(0)
        channel_due = np.int64(0)
        for r in range(h):
            for k in range((r + half) & 1, w, 2):
                row = np.int64(own_rows[r, k])
                if row == SKIPPED:
                    continue
                num = np.int64(0)
                den = np.int64(0)
                tilt = np.int64(0)
                for i in range(TAPS):
                    a, b = r + NEIGHBOURS[half, i, 0], k + NEIGHBOURS[half, i, 1]
                    if a >= 0 and a < h and b >= 0 and b < w:
                        v = np.int64(own[a, b])
                        tilt += taps[c, half, i] * v
                        if half == 1 or i < 4:
                            weight = 2 if half == 1 and i < 4 else 1
                            num += weight * min(abs(v), SIZE_MAX)
                            den += weight * expected[own_rows[a, b]]
                near = _ratio(num * EXPECT, den, 154)
                num, den = 2 * seen[r, k], 2 * due[r, k]
                here = _ratio(num, den, 307)
                if r > 0:
                    num += seen[r - 1, k]
                    den += due[r - 1, k]
                if r < h - 1:
                    num += seen[r + 1, k]
                    den += due[r + 1, k]
                if k > 0:
                    num += seen[r, k - 1]
                    den += due[r, k - 1]
                if k < w - 1:
                    num += seen[r, k + 1]
                    den += due[r, k + 1]
                around = _ratio(num, den, 512)
                channel = _ratio(channel_seen, channel_due, 512)
                size = abs(tilt)
                steep, edge = 0, TILT_UNIT
                while steep < TILTS - 1 and size >= edge:
                    steep += 1
                    edge *= 2
                before = min(abs(np.int64(q[c - 1, r, k])), 2) if c > 0 else 0
                m = np.int64(abs(own[r, k]))
                h_bits = low_bits[row]
                u = m >> h_bits
                negative = 1 if own[r, k] < 0 else 0
                n = np.int64(0)
                leaning = steep
                while n < UNARY:
                    if n == 1 and h_bits == 0:
                        negative = _code_sign(negative, own, r, k, c, row, half, tilt, steep, around, starts, maps,
                                              sign_weights, slots, x, coder, buf, decode)
                        agrees = (tilt < 0) == (negative == 1) and tilt != 0
                        leaning = TILTS + steep if agrees else (TILTS - steep)
                    kind = min(n, KINDS - 1)
                    slots[0] = starts[0] + (row * RATIOS + near) * KINDS + kind
                    slots[1] = starts[1] + (row * RATIOS + here) * KINDS + kind
                    slots[2] = starts[2] + (row * 2 * TILTS + leaning) * KINDS + kind
                    slots[3] = starts[3] + (c * (ROWS // 4) + row // 4) * KINDS + kind
                    slots[4] = starts[4] + ((row // 2 * RATIOS + near) * RATIOS + around) * KINDS + kind
                    slots[5] = starts[5] + (row * RATIOS + channel) * KINDS + kind
                    slots[6] = starts[6] + ((row // 2 * 3 + before) * RATIOS + around) * KINDS + kind
                    chosen = row // 4 * TILTS + steep if n == 0 else FIRST_SETS + row * (KINDS - 1) + kind - 1
                    bit = _decide(1 if u > n else 0, logits[row, n], chances[row, n], INPUTS, slots, maps, weights, chosen, x,
                                  coder, buf, decode)
                    if not bit:
                        break
                    n += 1
                if n == UNARY:
                    n = code_tail(u - UNARY + 1, LARGEST, coder, buf, decode) - 1 + UNARY
                if h_bits > 0:
                    n = n << h_bits | raw_bits(m, h_bits, coder, buf, decode)
                    if n:
                        negative = _code_sign(negative, own, r, k, c, row, half, tilt, steep, around, starts, maps,
                                              sign_weights, slots, x, coder, buf, decode)
                if decode:
                    own[r, k] = -n if negative else n
                n = min(n, SIZE_MAX) * EXPECT
                channel_seen += n
                channel_due += expected[row]
                seen[r, k] += n
                due[r, k] += expected[row]


@njit(cache=True, nogil=True, error_model="numpy")
def _code_sign(negative, own, r, k, c, row, half, tilt, steep, around, starts, maps, weights, slots, x, coder, buf, decode):
    h, w = own.shape
    across = down = 0
    if half == 1:
        if r > 0:
            down += _sign(own[r - 1, k])
        if r < h - 1:
            down += _sign(own[r + 1, k])
        if k > 0:
            across += _sign(own[r, k - 1])
        if k < w - 1:
            across += _sign(own[r, k + 1])
    else:
        if r > 0 and k > 0:
            down += _sign(own[r - 1, k - 1])
        if r > 0 and k < w - 1:
            down += _sign(own[r - 1, k + 1])
        if k > 1:
            across += _sign(own[r, k - 2])
        if r > 1:
            across += _sign(own[r - 2, k])
    lean = TILTS + steep if tilt > 0 else TILTS - steep
    slots[0] = starts[INPUTS] + (row // 2 * 2 * TILTS + lean) * 2 + half
    slots[1] = starts[INPUTS + 1] + c * 2 * TILTS + lean
    slots[2] = starts[INPUTS + 2] + ((c * 5 + down + 2) * 5 + across + 2) * 2 + half
    slots[3] = starts[INPUTS + 3] + lean * RATIOS + around
    return _decide(negative, 0, SIGN_START, SIGNS, slots, maps, weights, half * TILTS + steep, x, coder, buf, decode)


@dataclass(frozen=True, eq=False)
class Start:
    """Where mixing starts. ``taps`` int16 (C, 2, TAPS) in 1/4096; ``chances`` uint16 and ``counts`` uint8 (sum(sizes_of(C)),)
    of contexts, 0 counts for those never seen; ``weights`` int32 (WEIGHT_SETS, INPUTS) and ``sign_weights`` int32
    (2 * TILTS, SIGNS) in 1/65536."""

    taps: np.ndarray
    chances: np.ndarray
    counts: np.ndarray
    weights: np.ndarray
    sign_weights: np.ndarray

    def __post_init__(self) -> None:
        places = int(sizes_of(len(self.taps)).sum())
        shapes = {"taps": (len(self.taps), 2, TAPS), "chances": (places,), "counts": (places,),
                  "weights": (WEIGHT_SETS, INPUTS), "sign_weights": (2 * TILTS, SIGNS)}  # fmt: skip
        if any(getattr(self, name).shape != shape for name, shape in shapes.items()):
            raise ValueError("mixing: the arrays do not fit each other")
        if np.abs(self.weights.astype(np.int64)).max() > 1 << 24 or np.abs(self.sign_weights.astype(np.int64)).max() > 1 << 24:
            raise ValueError("mixing: a weight is out of range")

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a weights file."""
        return {name: getattr(self, name) for name in ("taps", "chances", "counts", "weights", "sign_weights")}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Start:
        """Inverse of ``to_arrays``; ValueError where they do not fit each other."""
        types = {"taps": np.int16, "chances": np.uint16, "counts": np.uint8, "weights": np.int32, "sign_weights": np.int32}
        return cls(**{name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in types.items()})

    @classmethod
    def plain(cls, taps: np.ndarray) -> Start:
        """With these taps, and nothing counted."""
        places = int(sizes_of(len(taps)).sum())
        return cls(taps, np.zeros(places, np.uint16), np.zeros(places, np.uint8),
                   np.full((WEIGHT_SETS, INPUTS), 65536 * 3 // 20, np.int32),
                   np.full((2 * TILTS, SIGNS), 65536 * 3 // 10, np.int32))  # fmt: skip

    @cached_property
    def maps(self) -> np.ndarray:
        """Counts as the kernel takes them."""
        return self.chances.astype(np.uint32) << 16 | self.counts


HYPER_UNIT = 256  # of the rows and offsets of z


@dataclass(frozen=True, eq=False)
class HyperStart:
    """Where mixing of z starts. ``rows`` and ``offsets``: int16 (knots, C) in 1/256, linear between knots of the quality range:
    the row of the scale table of a channel, and what is taken off its symbols first."""

    rows: np.ndarray
    offsets: np.ndarray
    start: Start

    def __post_init__(self) -> None:
        channels = len(self.start.taps)
        if self.rows.shape != self.offsets.shape or self.rows.shape[1:] != (channels,) or len(self.rows) < 2:
            raise ValueError("mixing of z: the arrays do not fit each other")
        if self.rows.min() < 0 or self.rows.max() > (ROWS - 1) * HYPER_UNIT:
            raise ValueError("mixing of z: a row is out of range")

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for a weights file."""
        return {"rows": self.rows, "offsets": self.offsets, **self.start.to_arrays()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> HyperStart:
        """Inverse of ``to_arrays``; ValueError where they do not fit each other."""
        own = (np.ascontiguousarray(arrays[name], np.int16) for name in ("rows", "offsets"))
        return cls(*own, Start.from_arrays(arrays))

    def at(self, level: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, offsets) int32 (C,) at ``level`` 0..levels."""
        mixed = (interpolate(torch.from_numpy(t), level, levels).numpy() for t in (self.rows, self.offsets))
        rows, offsets = (np.asarray((t + HYPER_UNIT // 2) // HYPER_UNIT, np.int32) for t in mixed)
        return rows, offsets


@lru_cache(maxsize=16)
def _chances(tables: Tables) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(chances, logits, expected, low_bits) of the decisions of each row of the scale table (Tables hashes by identity)."""
    if len(tables) != ROWS:
        raise ValueError(f"mixing needs a scale table of {ROWS} rows")
    chances = np.empty((ROWS, UNARY), np.int64)
    expected, low_bits = np.zeros(256, np.int64), np.empty(ROWS, np.int64)
    for row in range(ROWS):
        widths = tables.row(row).astype(np.int64)
        size = np.abs(int(tables.offsets[row]) + np.arange(len(widths) - 1))
        expected[row] = int((widths[:-1] * size).sum()) * EXPECT >> PRECISION
        low_bits[row] = max(int(expected[row] * 5 // (8 * EXPECT)).bit_length() - 1, 0)  # E|q| = 0.8 deviations; half of one
        left = 1 << PRECISION
        for n in range(UNARY):
            less = left - int(widths[:-1][size >> low_bits[row] == n].sum())
            chances[row, n] = min(max((less << 22) // max(left, 1), 1), (1 << 22) - 1)
            left = less
    return chances, STRETCH[chances >> 8].astype(np.int64), expected, low_bits


class _Mixer:
    """What adapts while a tile is coded."""

    def __init__(self, start: Start, tables: Tables, h: int, w: int):
        self.fixed = _chances(tables)
        channels = len(start.taps)
        self.places = np.concatenate([[0], np.cumsum(sizes_of(channels))]).astype(np.int64)
        self.taps = start.taps.astype(np.int64)
        self.maps = start.maps.copy()
        self.weights, self.sign_weights = start.weights.astype(np.int64), start.sign_weights.astype(np.int64)
        self.clear(h, w)

    def clear(self, h: int, w: int) -> None:
        """A new tile; what was learned stays."""
        channels = len(self.taps)
        self.q, self.rows = np.zeros((channels, h, w), np.int32), np.zeros((channels, h, w), np.uint8)
        self.seen, self.due = np.zeros((h, w), np.int64), np.zeros((h, w), np.int64)
        self.coder = binary.start()

    def take_rows(self, mine: slice, where: np.ndarray, rows: np.ndarray, coded: np.ndarray | None) -> None:
        flat = self.rows.reshape(len(self.rows), -1)
        flat[mine, where] = rows if coded is None else np.where(coded, rows, SKIPPED)

    def run(self, mine: slice, half: int, buf: np.ndarray, decode: bool) -> None:
        code_pass(self.q, self.rows, mine.start, mine.stop - mine.start, half, self.taps, self.places, *self.fixed, self.maps,
                  self.weights, self.sign_weights, self.seen, self.due, self.coder, buf, decode)


def joined(z: bytes, y: bytes) -> bytes:
    """A payload of both: the length of the first, then the bytes."""
    return varint(len(z)) + z + y


def parted(payload: bytes) -> tuple[bytes, bytes]:
    """Inverse of ``joined``. CorruptStream."""
    n, at = read_varint(payload, 0, "entropy payload")
    if n > len(payload) - at:
        raise CorruptStream("entropy payload: it ends early")
    return payload[at : at + n], payload[at + n :]


WORST = 40  # bytes that a symbol may take


class _Hyper:
    """z of a tile on its way through a coder that y will use after it."""

    def __init__(self, start: HyperStart, tables: Tables, h: int, w: int, level: int, levels: int, coder: np.ndarray):
        self.mixer = _Mixer(start.start, tables, h, w)
        self.mixer.coder = coder
        rows, self.offsets = start.at(level, levels)
        self.mixer.rows[:] = rows[:, None, None]

    def run(self, buf: np.ndarray, decode: bool) -> None:
        for half in (0, 1):
            self.mixer.run(slice(0, len(self.offsets)), half, buf, decode)


class MixedEncoder:
    """Codes a tile's z, if it is to be mixed, and passes, in the order in which a ``MixedDecoder`` will ask for them."""

    def __init__(self, start: Start, tables: Tables, h: int, w: int):
        self.mixer, self.buf, self.tables = _Mixer(start, tables, h, w), np.zeros(1 << 16, np.uint8), tables

    def _make_room(self, symbols: int) -> None:
        used = int(self.mixer.coder[3])
        if used + WORST * symbols + 64 > len(self.buf):
            self.buf = np.concatenate([self.buf[:used], np.zeros(2 * WORST * symbols + used + 64, np.uint8)])

    def put_hyper(self, start: HyperStart, z: np.ndarray, level: int, levels: int) -> None:
        """z (C, h, w) int32 at ``level`` 0..levels, before everything else."""
        self._make_room(z.size)
        hyper = _Hyper(start, self.tables, *z.shape[1:], level, levels, self.mixer.coder)
        hyper.mixer.q[:] = z - hyper.offsets[:, None, None]
        hyper.run(self.buf, False)

    def put(self, mine: slice, where: np.ndarray, q: np.ndarray, rows: np.ndarray, coded: np.ndarray | None = None) -> None:
        """Symbols q (c, n) int32 of the channels ``mine`` at flat positions ``where`` (n,), with their rows (c, n) uint8."""
        mixer = self.mixer
        mixer.take_rows(mine, where, rows, coded)
        mixer.q.reshape(len(mixer.q), -1)[mine, where] = q
        self._make_room(q.size)
        mixer.run(mine, int(where[0] != 0), self.buf, False)

    def finish(self) -> bytes:
        """The payload."""
        coder = self.mixer.coder
        raw_bits(SENTINEL, 8, coder, self.buf, False)
        return self.buf[: coder[3]].tobytes() + binary.ending(coder)


class MixedDecoder:
    """Gives back what a ``MixedEncoder`` took."""

    def __init__(self, payload: bytes, start: Start, tables: Tables, h: int, w: int):
        self.mixer, self.buf, self.tables = _Mixer(start, tables, h, w), np.frombuffer(payload, np.uint8).copy(), tables
        self.mixer.coder = binary.start(payload)

    def _check(self) -> None:
        if self.mixer.coder[3] > len(self.buf) + 4:
            raise CorruptStream("entropy payload: it ends early")

    def get_hyper(self, start: HyperStart, h: int, w: int, level: int, levels: int) -> np.ndarray:
        """z (C, h, w) int32. CorruptStream where the payload ended long before."""
        hyper = _Hyper(start, self.tables, h, w, level, levels, self.mixer.coder)
        hyper.run(self.buf, True)
        self._check()
        return hyper.mixer.q + hyper.offsets[:, None, None]

    def get(self, mine: slice, where: np.ndarray, rows: np.ndarray, coded: np.ndarray | None = None) -> np.ndarray:
        """Symbols (c, n) int32; zero where nothing is coded. CorruptStream where the payload ended long before."""
        mixer = self.mixer
        mixer.take_rows(mine, where, rows, coded)
        mixer.run(mine, int(where[0] != 0), self.buf, True)
        self._check()
        return mixer.q.reshape(len(mixer.q), -1)[mine, where]

    def finish(self) -> None:
        """CorruptStream unless exactly everything was read."""
        coder = self.mixer.coder
        sound = raw_bits(0, 8, coder, self.buf, True) == SENTINEL
        if not sound or self.buf[coder[3] - 4 :].tobytes() != binary.ending(coder):
            raise CorruptStream("entropy payload: data left over or missing at the end")


def learn(start: Start, tables: Tables, tiles: list[tuple[np.ndarray, np.ndarray]],
          slices: tuple[int, ...]) -> tuple[Start, int]:  # fmt: skip
    """What coding tiles (q (C, h, w) int32, rows (C, h, w) uint8) one after another leaves, and the bytes that they took."""
    mixer = _Mixer(start, tables, 1, 1)
    taken = 0
    for q, rows in tiles:
        mixer.clear(*q.shape[1:])
        mixer.q[:], mixer.rows[:] = q, rows
        buf = np.zeros(WORST * q.size + 64, np.uint8)
        first = 0
        for channels in slices:
            for half in (0, 1):
                mixer.run(slice(first, first + channels), half, buf, False)
            first += channels
        taken += int(mixer.coder[3])
    counts = np.minimum(mixer.maps & 1023, KEPT_MAX)
    chances = np.clip((mixer.maps >> 10) + 32 >> 6, 1, 65535)
    seen = mixer.maps > 0
    weights, signs = (np.clip(w, -(1 << 24), 1 << 24).astype(np.int32) for w in (mixer.weights, mixer.sign_weights))
    return Start(start.taps, (chances * seen).astype(np.uint16), (counts * seen).astype(np.uint8), weights, signs), taken
