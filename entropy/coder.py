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

MAX_BEYOND = 1 << 24  # an escaped value lies at most this far outside of its table
_HALF = 1 << 12
# Lies at the bottom of the stack and is decoded last. A damaged stream that runs out of words early ends in state 0, which
# looks like a proper end; without the sentinel one damaged payload in six was not noticed.
SENTINEL = 0xA5C

_Categorical = constriction.stream.model.Categorical


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


def _groups(indexes: np.ndarray, n_tables: int) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """(order, [(row, start, end)]): a stable sort of the symbols by row, and where each row's run lies."""
    small = indexes.astype(np.uint8 if n_tables <= 256 else np.uint16, copy=False)
    order = np.argsort(small, kind="stable")  # radix sort for these types
    ends = np.cumsum(np.bincount(small, minlength=n_tables))
    rows = np.flatnonzero(np.diff(ends, prepend=0))
    return order, [(int(r), int(ends[r - 1]) if r else 0, int(ends[r])) for r in rows]


def _check(indexes: np.ndarray, tables: Tables) -> None:
    if indexes.size and (int(indexes.min()) < 0 or int(indexes.max()) >= len(tables)):
        raise ValueError(f"table index outside of 0..{len(tables) - 1}")


class Encoder:
    """Collects symbols in the order in which a ``Decoder`` will ask for them."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, object]] = []

    def put(self, values: np.ndarray, indexes: np.ndarray, tables: Tables) -> None:
        """Code integer ``values`` (n,) with rows ``indexes`` (n,). ValueError for a value more than 2**24 outside its row."""
        values, indexes = np.asarray(values), np.asarray(indexes)
        _check(indexes, tables)
        order, groups = _groups(indexes, len(tables))
        ordered = values[order].astype(np.int32)
        beyond: list[np.ndarray] = []
        for row, start, end in groups:
            symbols = ordered[start:end] - tables.offsets[row]
            escape = int(tables.lengths[row]) - 1
            if symbols.min() < 0 or symbols.max() >= escape:
                outside = (symbols < 0) | (symbols >= escape)
                far = symbols[outside].astype(np.int64)
                beyond.append(np.where(far < 0, far, far - escape))
                symbols = np.where(outside, escape, symbols).astype(np.int32)
            self._runs.append((symbols, _model_of(tables, row)))
        if beyond:
            far = np.concatenate(beyond)
            magnitude = np.where(far < 0, -far - 1, far)
            if magnitude.max() >= MAX_BEYOND:
                raise ValueError("a value is too far outside of its table")
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
        return coder.get_compressed().astype("<u4").tobytes()


class Decoder:
    """Gives back what an ``Encoder`` took, in the same order and with the same indexes and tables."""

    def __init__(self, payload: bytes):
        """CorruptStream when the payload cannot come from ``Encoder.finish``."""
        if len(payload) % 4:
            raise CorruptStream("entropy payload: length is not a multiple of 4 bytes")
        self._empty = not payload
        try:
            self._coder = constriction.stream.stack.AnsCoder(np.frombuffer(payload, "<u4").astype(np.uint32))
        except ValueError as error:
            raise CorruptStream("entropy payload: ends in a zero word") from error

    def get(self, indexes: np.ndarray, tables: Tables) -> np.ndarray:
        """Values int32 (n,) for rows ``indexes`` (n,)."""
        indexes = np.asarray(indexes)
        _check(indexes, tables)
        order, groups = _groups(indexes, len(tables))
        ordered = np.empty(len(indexes), np.int32)
        escaped: list[np.ndarray] = []
        for row, start, end in groups:
            symbols = self._coder.decode(_model_of(tables, row), end - start)
            escape = int(tables.lengths[row]) - 1
            hits = np.flatnonzero(symbols == escape)
            if hits.size:
                escaped.append(hits + start)
            ordered[start:end] = symbols + tables.offsets[row]
        if escaped:
            where = np.concatenate(escaped)
            negative = self._coder.decode(_uniform(2), len(where)) > 0
            high = self._coder.decode(_uniform(_HALF), len(where))
            magnitude = high * _HALF + self._coder.decode(_uniform(_HALF), len(where))
            # an escape stands for the first value above the row: count on from there, or down from below the row
            below = ordered[where] - (tables.lengths[indexes[order[where]]] - 1) - 1 - magnitude
            ordered[where] = np.where(negative, below, ordered[where] + magnitude)
        values = np.empty_like(ordered)
        values[order] = ordered
        return values

    def finish(self) -> None:
        """CorruptStream unless exactly everything was read: the sentinel comes out, and the state is back at its start."""
        if self._empty:
            return
        if self._coder.decode(_uniform(_HALF)) != SENTINEL or not self._coder.is_empty():
            raise CorruptStream("entropy payload: data left over or missing at the end")
