"""The arithmetic coder: ANS (constriction), grouped by table.

The symbols of one ``put`` are sorted by table row (stable) and coded group after group with one fixed model each, which is
an order of magnitude faster than one model per symbol. Values outside a table follow as escapes. Byte-level description:
``SPEC.md`` beside this file.
"""

from __future__ import annotations

from functools import lru_cache

import constriction
import numpy as np

from ..container.errors import CorruptStream
from .tables import TOTAL, Tables

VALUE_MAX = 1 << 24  # what can be coded at all, either sign
_HALF = 1 << 12  # an escape is followed by a sign and twice 12 bits: how far the value lies outside of its row
# Lies at the bottom of the stack and is decoded last. A damaged stream that runs out of words early ends in state 0, which
# looks like a proper end; without the sentinel one damaged payload in six was not noticed.
SENTINEL = 0xA5C

_Categorical = constriction.stream.model.Categorical

# glibc gives freed blocks back to the system until it has seen a large one freed; then every sort of a put faults in all its
# pages again, which takes four times as long as sorting. The block is never touched, so it costs nothing.
np.empty(24 << 20, np.uint8)


def _model(widths: np.ndarray) -> object:
    """Model whose 24-bit widths are exactly ``widths``.

    constriction gives every symbol 1 and shares the other 2**24 - n in proportion to the floats it is given:
    cumulative(i) = i + floor((p_0 + .. + p_(i-1)) * (2**24 - n) / sum(p)). With p = widths - 1 the quotient is exactly 1 and
    all sums are integers below 2**53, so nothing is rounded anywhere (checked against integers in the tests).
    """
    return _Categorical(widths.astype(np.float64) - 1, perfect=False)


@lru_cache(maxsize=64)
def _models(tables: Tables) -> list[object | None]:
    """Lazily filled models of a set of tables (Tables hashes by identity)."""
    return [None] * len(tables)


def _model_of(tables: Tables, r: int) -> object:
    models = _models(tables)
    if models[r] is None:
        models[r] = _model(tables.row(r))
    return models[r]


@lru_cache(maxsize=4)
def _uniform(n: int) -> object:
    return _model(np.full(n, TOTAL // n, np.int32))


def _groups(indexes: np.ndarray, tables: Tables) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """(order, [(row, start, end)]): a stable sort of the symbols by row, and where each row's run lies."""
    n = len(tables)
    if indexes.ndim != 1:
        raise ValueError("table indexes must be one-dimensional")
    if not len(indexes):
        return np.empty(0, np.int64), []
    if int(indexes.min()) < 0 or int(indexes.max()) >= n:
        raise ValueError(f"table index outside of 0..{n - 1}")
    key = np.uint8 if n <= 256 else np.uint16 if n <= 65536 else np.int64
    small = indexes.astype(key, copy=False)
    order = np.argsort(small, kind="stable")  # radix sort for the small types
    starts = np.searchsorted(small, np.arange(n, dtype=key), sorter=order).tolist()
    return order, [(r, s, e) for r, (s, e) in enumerate(zip(starts, [*starts[1:], len(order)])) if s < e]


class Encoder:
    """Collects symbols in the order in which a ``Decoder`` will ask for them."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, object]] = []

    def put(self, values: np.ndarray, indexes: np.ndarray, tables: Tables) -> None:
        """Code integer ``values`` (n,) with rows ``indexes`` (n,). ValueError for a value that no escape can reach."""
        values, indexes = np.asarray(values), np.asarray(indexes)
        if values.shape != indexes.shape:
            raise ValueError(f"{values.shape} values cannot go with {indexes.shape} table indexes")
        order, groups = _groups(indexes, tables)
        if not groups:
            return
        if values.dtype.kind not in "iu":
            raise ValueError(f"values must be integers, not {values.dtype}")
        if int(values.min()) < -VALUE_MAX or int(values.max()) > VALUE_MAX:
            raise ValueError(f"a value lies outside of +-{VALUE_MAX}, too far outside of its table")
        ordered = values.take(order, mode="wrap").astype(np.int32, copy=False)  # "wrap" is the mode that copies nothing else
        beyond: list[np.ndarray] = []
        for row, start, end in groups:
            symbols = ordered[start:end] - int(tables.offsets[row])
            escape = int(tables.lengths[row]) - 1
            unsigned = symbols.view(np.uint32)  # negative ones are large here
            if unsigned.max() >= escape:
                outside = unsigned >= escape
                far = symbols[outside]
                beyond.append(np.where(far < 0, far, far - escape))
                symbols[outside] = escape
            self._runs.append((symbols, _model_of(tables, row)))
        if beyond:
            far = np.concatenate(beyond)
            magnitude = np.where(far < 0, -far - 1, far)
            if magnitude.max() >= _HALF * _HALF:
                raise ValueError(f"a value lies {magnitude.max()} outside of its table, which is too far")
            self._runs.append(((far < 0).astype(np.int32), _uniform(2)))
            self._runs.append(((magnitude // _HALF).astype(np.int32), _uniform(_HALF)))
            self._runs.append(((magnitude % _HALF).astype(np.int32), _uniform(_HALF)))

    def finish(self) -> bytes:
        """The payload. The last run goes in first: ANS is a stack."""
        if not self._runs:
            return b""
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(SENTINEL, _uniform(_HALF))
        for symbols, model in reversed(self._runs):
            coder.encode_reverse(symbols, model)
        return coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")


class Decoder:
    """Gives back what an ``Encoder`` took, in the same order and with the same indexes and tables."""

    def __init__(self, payload: bytes):
        """CorruptStream when the payload cannot come from ``Encoder.finish``."""
        self._empty = not payload
        words = np.frombuffer(bytes(payload) + bytes(-len(payload) % 4), "<u4").astype(np.uint32)
        if len(words) and words[-1] == 0:
            raise CorruptStream("entropy payload: ends in a zero word")
        self._coder = constriction.stream.stack.AnsCoder(words)

    def get(self, indexes: np.ndarray, tables: Tables) -> np.ndarray:
        """Values int32 (n,), within +-2**24, for rows ``indexes`` (n,). CorruptStream where there cannot be such values."""
        indexes = np.asarray(indexes)
        order, groups = _groups(indexes, tables)
        if self._empty and groups:
            raise CorruptStream("entropy payload: empty, but symbols are due")
        ordered = np.empty(len(indexes), np.int32)
        escaped: list[np.ndarray] = []
        for row, start, end in groups:
            symbols = self._coder.decode(_model_of(tables, row), end - start)
            escape = int(tables.lengths[row]) - 1
            if symbols.max() == escape:
                escaped.append(np.flatnonzero(symbols == escape) + start)
            np.add(symbols, int(tables.offsets[row]), out=ordered[start:end])
        if escaped:
            where = np.concatenate(escaped)
            negative = self._coder.decode(_uniform(2), len(where)) > 0
            high = self._coder.decode(_uniform(_HALF), len(where))
            magnitude = high * _HALF + self._coder.decode(_uniform(_HALF), len(where))
            # an escape stands for the first value above the row: count on from there, or down from below the row
            below = ordered[where] - (tables.lengths[indexes[order[where]]] - 1) - 1 - magnitude
            ordered[where] = far = np.where(negative, below, ordered[where] + magnitude)
            if np.abs(far).max() > VALUE_MAX:
                raise CorruptStream(f"entropy payload: a value lies outside of +-{VALUE_MAX}")
        values = np.empty_like(ordered)
        values[order] = ordered
        return values

    def finish(self) -> None:
        """CorruptStream unless exactly everything was read: the sentinel comes out, and the state is back at its start."""
        if self._empty:
            return
        if self._coder.decode(_uniform(_HALF)) != SENTINEL or not self._coder.is_empty():
            raise CorruptStream("entropy payload: data left over or missing at the end")
