"""The ``.nlc`` file of a data set of fields: one head, a segment for each chunk, and an index with everything else.

Header: ``{"kind": "grid", "dims": [[name, size, unlimited]], "vars": [{"n", "d", "c", "k", "u"}]}``: name, numbers of the
dimensions, shape of a chunk, ``Coding.plain()``, and the unit of an absolute bound. Variables without ``c`` are small and lie
in the index. The segments ``data`` are the chunks, variable after variable, each in C order of its chunk grid; then comes one
segment ``index``: LZMA2 of a CBOR map of attributes, storage settings and small variables. So one chunk is read with the head,
the index, and one seek.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from ..container import cbor
from ..container.errors import CodecError, CorruptStream, LimitExceeded, UnsupportedInput
from ..container.format import DEFAULT_LIMITS, Entry, Limits, Segment, Spool, Stream, read_head, read_segment
from ..media.grid import KINDS, STRING, Layout, Source, Target, Variable
from .grid_bounds import lossy_attributes, with_history
from .grid_chunk import BEST_EFFORT, Coding, Stats, _packed, _unpacked, coding_of, decode_chunk, encode_chunk
from .ordered import ordered_map

CODEC, PRESET, NO_MODEL = "grid", "exact", b""
TIMES = 4
"""Time steps of a chunk: few, so that one time of one variable is a small part of a long file."""
CHUNK_VALUES = 1 << 23
"""Values of a chunk at most: what bounds the memory."""
MEMORY = 1 << 30
"""Bytes that all chunks under way may need together, unless the caller names a number of threads."""
VALUE_MEMORY = 32
"""Bytes that coding a value needs, by measurement."""
INLINE = 1 << 14
"""Bytes up to which a variable lies in the index."""
CACHE = 1 << 27
Box = tuple[slice, ...]
Progress = Callable[["Done"], None]


@dataclass
class Done:
    """How far the work is: chunks, bytes of float values read, bytes written."""

    chunks: int = 0
    of: int = 0
    raw: int = 0
    coded: int = 0
    raw_total: int = 0


@dataclass(frozen=True)
class Plan:
    """A variable with its coding and the shape of its chunks, or no chunks where it lies in the index."""

    variable: Variable
    coding: Coding
    chunks: tuple[int, ...] | None

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each dimension."""
        return tuple(-(-n // c) for n, c in zip(self.variable.shape, self.chunks or self.variable.shape))

    @property
    def count(self) -> int:
        return math.prod(self.grid) if self.chunks is not None else 0

    def box(self, at: tuple[int, ...]) -> Box:
        """The part of the variable that a chunk covers."""
        sizes = zip(at, self.chunks or (), self.variable.shape)
        return tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in sizes)

    def boxes(self) -> Iterator[tuple[tuple[int, ...], Box]]:
        """All chunks in C order: (position in the chunk grid, part)."""
        for at in np.ndindex(*self.grid):
            yield at, self.box(at)


def chunk_shape(shape: tuple[int, ...], axes: str, times: int = TIMES, most: int = CHUNK_VALUES) -> tuple[int, ...]:
    """Chunks of ``times`` steps with all levels and the whole grid, split along times, levels, rows where that is too much."""
    chunks = [max(min(n, times) if a == "T" else n, 1) for n, a in zip(shape, axes)]
    for letter in "TLYX":
        for i, axis in enumerate(axes):
            if axis == letter and math.prod(chunks) > most:
                rest = math.prod(chunks) // chunks[i]
                parts = -(-chunks[i] // max(most // rest, 1))
                chunks[i] = -(-chunks[i] // parts)
    return tuple(chunks)


def is_periodic(source: Source, name: str, axes: str) -> bool:
    """Whether the columns go once around the earth: longitudes at even steps that close the circle."""
    layout = source.layout
    if "X" not in axes:
        return False
    dim = layout.variables[name].dims[axes.index("X")]
    variable = layout.variables.get(dim)
    if variable is None or variable.dims != (dim,) or not 4 <= variable.size <= 1 << 20 or variable.dtype[0] != "f":
        return False
    values = source.read(dim).astype(np.float64)
    steps = np.diff(values)
    if not np.isfinite(values).all() or "degree" not in str(variable.attrs.get("units", "degree")):
        return False
    step = abs(steps.mean())
    return bool(np.abs(np.abs(steps) - step).max() < 0.02 * step and abs(step * len(values) - 360) < 0.02 * step)


def make_plans(source: Source, bounds: dict[str, tuple[str, float]], times: int = TIMES, values: int = CHUNK_VALUES,
               model: str = "") -> list[Plan]:  # fmt: skip
    """How each variable of a file is coded. ``bounds``: (kind, value) by name, see ``grid_bounds.resolve``."""
    layout, plans = source.layout, []
    for name, variable in layout.variables.items():
        kind, value = bounds.get(name, ("lossless", 0.0))
        coding = coding_of(layout, name, kind, value, model)
        chunks = None
        if variable.nbytes > INLINE or coding.lossy:
            chunks = chunk_shape(variable.shape, coding.axes, times, values)
            coding = replace(coding, periodic=is_periodic(source, name, coding.axes))
        plans.append(Plan(variable, coding, chunks))
    return plans


# --- attributes -------------------------------------------------------------------------------------------------------


def plain_attributes(attrs: dict[str, Any]) -> list[list[Any]]:
    """Attributes as plain values, in their order: texts, lists of texts, and [type, raw bytes, is a vector]."""
    rows = []
    for name, value in attrs.items():
        if not isinstance(value, (str, list)):
            typed = np.asarray(value)
            raw = typed.astype(typed.dtype.newbyteorder("<"))
            value = {"t": typed.dtype.newbyteorder("=").str.lstrip("=<>|"), "b": raw.tobytes(), "v": typed.ndim > 0}
        rows.append([name, value])
    return rows


def attributes_of(rows: Any) -> dict[str, Any]:
    """Inverse of ``plain_attributes``. CorruptStream."""
    found: dict[str, Any] = {}
    if not isinstance(rows, list):
        raise CorruptStream("index: attributes are no list")
    for row in rows:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str)):
            raise CorruptStream("index: bad attribute")
        name, value = row
        if isinstance(value, dict):
            code, raw = value.get("t"), value.get("b")
            if code not in KINDS or not isinstance(raw, bytes) or len(raw) % np.dtype(code).itemsize:
                raise CorruptStream("index: bad attribute")
            typed = np.frombuffer(raw, np.dtype(code).newbyteorder("<")).astype(code)
            if not value.get("v") and len(typed) != 1:
                raise CorruptStream("index: bad attribute")
            value = typed if value.get("v") else typed[0]
        elif not (isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))):
            raise CorruptStream("index: bad attribute")
        found[name] = value
    return found


# --- encode -----------------------------------------------------------------------------------------------------------


def fitting(workers: int, values: int) -> int:
    """Threads of ``workers`` for which chunks of ``values`` fit into ``MEMORY``."""
    return min(workers, max(1, MEMORY // (VALUE_MEMORY * max(values, 1))))


def lossy_layout(layout: Layout, plans: list[Plan], keeps: dict[str, int], command: str, when: str,
                 worst: dict[str, float] | None = None) -> Layout:  # fmt: skip
    """The layout of the decoded file: the original's with the record of what was lost.

    ``keeps``: mantissa bits kept, where bits decide; ``worst``: bounds that best effort happens to keep.
    """
    lossy = [p for p in plans if p.coding.lossy]
    if not lossy:
        return layout
    variables = dict(layout.variables)
    worst = worst or {}
    container = "quantization_info"
    while container in variables and variables[container].attrs.get("algorithm") != "bitround":
        container += "_neuralcodec"
    for plan in lossy:
        v, c = variables[plan.variable.name], plan.coding
        attrs = lossy_attributes(v.attrs, c.kind, c.value, v.packed, keeps.get(v.name), container, c.model, worst.get(v.name))
        variables[v.name] = replace(v, attrs=attrs)
    if any("quantization_nsb" in variables[p.variable.name].attrs for p in lossy) and container not in variables:
        from .. import __version__

        attrs = {"algorithm": "bitround", "implementation": f"neuralcodec version {__version__}"}
        variables[container] = Variable(container, (), (), "i4", attrs)
    attrs = with_history(layout.attrs, command, [p.variable.name for p in lossy], when)
    return replace(layout, attrs=attrs, variables=variables)


def now() -> str:
    """Time for the history, from SOURCE_DATE_EPOCH where a build shall be reproducible."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def encode_grid(source: Source, bounds: dict[str, tuple[str, float]], out: BinaryIO, folder: str, *,
                command: str = "codec encode", times: int = TIMES, values: int = CHUNK_VALUES, workers: int = 1,
                model: str = "", progress: Progress | None = None) -> dict[str, Stats]:  # fmt: skip
    """Write ``source`` as an ``.nlc`` file to ``out``; what each chunked variable cost. ``folder`` takes a temporary file.

    ``model``: a network for what is lossy, see ``grid_neural``.
    """
    layout, plans = source.layout, make_plans(source, bounds, times, values, model)
    identity = identity_of(plans)
    tasks = ((p, box) for p in plans if p.chunks is not None for _, box in p.boxes())
    done = Done(of=sum(p.count for p in plans), raw_total=sum(p.variable.nbytes for p in plans if p.chunks is not None))
    stats: dict[str, Stats] = {}
    threads = max(1, workers // max(done.of, 1))  # of one chunk, where there are fewer chunks than threads

    def work(task: tuple[Plan, Box]) -> tuple[Plan, bytes, Stats]:
        plan, box = task
        what = None
        if plan.coding.model:
            from .grid_neural import about

            what = about(source, plan.variable.name, plan.coding.axes, box)
        return plan, *encode_chunk(source.read(plan.variable.name, box), plan.coding, threads, what)

    with tempfile.TemporaryFile(dir=folder, prefix=".nlc-", suffix=".partial") as file:
        spool = Spool(file)
        for plan, payload, cost in ordered_map(work, tasks, workers):
            spool.add(Segment("data", payload))
            total = stats.setdefault(plan.variable.name, Stats(0, 0, 0))
            total.values, total.raw, total.coded = total.values + cost.values, total.raw + cost.raw, total.coded + cost.coded
            if cost.keep is not None:
                total.keep = cost.keep if total.keep is None else min(total.keep, cost.keep)
            if cost.worst is not None:
                total.worst = max(total.worst or 0.0, cost.worst)
            total.neural |= cost.neural
            done.chunks, done.raw, done.coded = done.chunks + 1, done.raw + cost.raw, done.coded + cost.coded
            if progress:
                progress(done)
        keeps = {name: s.keep for name, s in stats.items() if s.keep is not None}
        worst = {name: s.worst for name, s in stats.items() if s.worst is not None}
        final = lossy_layout(layout, plans, keeps, command, now(), worst)
        inline = {p.variable.name: source.read(p.variable.name) for p in plans if p.chunks is None}
        for name in final.variables.keys() - layout.variables.keys():
            inline[name] = np.zeros((), "i4")
            plans.append(Plan(final.variables[name], Coding("i4", ""), None))
        spool.add(Segment("index", _index(final, plans, inline)))
        numbers = {d: i for i, d in enumerate(layout.dims)}
        header = {
            "kind": "grid",
            "dims": [[d, n, d in layout.unlimited] for d, n in layout.dims.items()],
            "vars": [{"n": p.variable.name, "d": [numbers[d] for d in p.variable.dims], "k": p.coding.plain()}
                     | ({} if p.chunks is None else {"c": list(p.chunks)}) | _unit(p) for p in plans],
        }  # fmt: skip
        try:
            spool.finish(Stream(*identity, header), out)
        except (TypeError, ValueError) as error:
            raise UnsupportedInput(f"{source.path}: {error}") from None
    return stats


def identity_of(plans: list[Plan]) -> tuple[str, str, bytes]:
    """Codec, preset and model id of a file: those of its network where one is used."""
    if not (models := {p.coding.model for p in plans if p.coding.model}):
        return CODEC, PRESET, NO_MODEL
    from .grid_neural import load

    codec = load(models.pop())
    return codec.name, codec.preset, codec.model_id


def _unit(plan: Plan) -> dict[str, str]:
    """The unit of a bound, so that the head alone can say what it is."""
    unit = plan.variable.attrs.get("units")
    return {"u": unit} if plan.coding.kind == "absolute" and isinstance(unit, str) else {}


def _index(layout: Layout, plans: list[Plan], inline: dict[str, np.ndarray]) -> bytes:
    rows = []
    for plan in plans:
        v = layout.variables[plan.variable.name]
        row: dict[str, Any] = {"a": plain_attributes(v.attrs), "e": v.encoding}
        if v.name in inline:
            row["v"] = encode_chunk(inline[v.name], replace(plan.coding, kind="lossless", value=0.0))[0]
        rows.append(row)
    return _packed(cbor.encode({"attrs": plain_attributes(layout.attrs), "vars": rows}))


# --- decode -----------------------------------------------------------------------------------------------------------


class GridFile:
    """An ``.nlc`` file of fields, read lazily: opening takes the head and the index, ``read`` the chunks that it needs."""

    complete = True  # an archive may be not

    def __init__(self, file: BinaryIO | str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS):
        self.path = str(file) if isinstance(file, (str, os.PathLike)) else getattr(file, "name", "stream")
        self._file: BinaryIO = open(file, "rb") if isinstance(file, (str, os.PathLike)) else file  # noqa: SIM115
        self._limits = limits
        self.threads = 1  # of one chunk
        self._cache: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._cached = 0
        self._lock = threading.Lock()
        try:
            self.head = read_head(self._file, limits)
            self.size = self._file.seek(0, os.SEEK_END)
            self._plans, self._entries = plans_of(self.head.header, self.head.entries, limits)
            index = read_segment(self._file, next(e for e in self.head.entries if e.name == "index"))
            self.layout, self.small = _read_index(index, self._plans, self.head.header, limits)
        except BaseException:
            self._file.close()
            raise
        self.plans = {p.variable.name: p for p in self._plans}

    def chunk(self, name: str, number: int) -> np.ndarray:
        """Chunk ``number`` (C order) of a variable. CorruptStream names the variable and the time."""
        key = (name, number)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        plan = self.plans[name]
        box = plan.box(tuple(int(i) for i in np.unravel_index(number, plan.grid)))
        if plan.coding.model:
            self._check_model(plan.coding.model)
        try:
            with self._lock:
                payload = read_segment(self._file, self._entries[name][number])
            values = decode_chunk(payload, tuple(s.stop - s.start for s in box), plan.coding, self.threads)
        except CorruptStream as error:
            raise CorruptStream(f"{self.path}: {describe_box(plan, self.layout, self.small, box)}: {error}") from None
        with self._lock:
            self._cache[key] = values
            self._cached += values.nbytes
            while self._cached > CACHE and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        return values

    def _check_model(self, model: str) -> None:
        """ModelMissing, ModelMismatch, and CorruptStream for a variable that names another network than the file."""
        from .grid_neural import load

        if model != f"{self.head.codec}:{self.head.preset}":
            raise CorruptStream(f"{self.path}: names two networks")
        load(model, self.head.model_id)

    def read(self, name: str, box: Box | None = None) -> np.ndarray:
        """Raw values of a box (slices with positive steps or none) of a variable; only its chunks are read."""
        plan = self.plans[name]
        shape = plan.variable.shape
        box = tuple(slice(*s.indices(n)) for s, n in zip(box or (slice(None),) * len(shape), shape))
        if plan.chunks is None:
            return self.small[name][box or ...]
        ranges = [range(s.start, s.stop, s.step) for s in box]
        out = np.empty([len(r) for r in ranges], object if plan.variable.dtype == STRING else plan.variable.dtype)
        if not out.size:
            return out
        spans = [range(r[0] // c, r[-1] // c + 1) for r, c in zip(ranges, plan.chunks)]
        for at in itertools.product(*spans):
            values = self.chunk(name, int(np.ravel_multi_index(at, plan.grid)) if at else 0)
            inner, outer = [], []
            for i, c, r in zip(at, plan.chunks, ranges):
                first = max(0, -(-(i * c - r.start) // r.step))
                last = min(len(r), -(-((i + 1) * c - r.start) // r.step))
                outer.append(slice(first, last))
                inner.append(slice(r.start + first * r.step - i * c, r.start + (last - 1) * r.step - i * c + 1, r.step))
            if all(o.start < o.stop for o in outer):
                out[tuple(outer)] = values[tuple(inner)]
        return out

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> GridFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def describe_box(plan: Plan, layout: Layout, small: dict[str, np.ndarray], box: Box) -> str:
    """A chunk for people: variable, and along the times and levels the positions, with the dates where they are known."""
    parts = []
    for dim, part, axis in zip(plan.variable.dims, box, plan.coding.axes):
        if axis in "TL" or (part.start, part.stop) != (0, layout.dims[dim]):
            last = part.stop - 1
            text = f"{dim} {part.start}" if part.start == last else f"{dim} {part.start}..{last}"
            if axis == "T" and (dates := _dates(layout, small, dim)) is not None:
                text += f" ({dates[part.start]})" if part.start == last else f" ({dates[part.start]} .. {dates[last]})"
            parts.append(text)
    return ", ".join([plan.variable.name, *parts])


def _dates(layout: Layout, small: dict[str, np.ndarray], dim: str) -> list[str] | None:
    """The times of a dimension as texts, None where they are not known."""
    if dim not in small or " since " not in str(layout.variables[dim].attrs.get("units", "")):
        return None
    import cftime

    attrs = layout.variables[dim].attrs
    try:
        return [str(d) for d in cftime.num2date(small[dim], attrs["units"], str(attrs.get("calendar", "standard")))]
    except (ValueError, TypeError, OverflowError):
        return None


def is_grid_header(header: dict[str, Any]) -> bool:
    """Whether the header of an ``.nlc`` file is that of a data set of fields."""
    return header.get("kind") == "grid"


def plans_of(header: dict[str, Any], entries: list[Entry], limits: Limits) -> tuple[list[Plan], dict[str, list[Entry]]]:
    """Variables of a header, without their attributes, and where their chunks lie. CorruptStream, LimitExceeded."""
    dims, rows = header.get("dims"), header.get("vars")
    if header.get("kind") != "grid" or not isinstance(dims, list) or not isinstance(rows, list):
        raise CorruptStream("header: not that of fields on a grid")
    for dim in dims:
        if not (isinstance(dim, list) and [type(v) for v in dim] == [str, int, bool] and 0 <= dim[1] < 1 << 48):
            raise CorruptStream("header: bad dimension")
    names = [d[0] for d in dims]
    data = [e for e in entries if e.name == "data"]
    if sum(e.name == "index" for e in entries) != 1 or len(set(names)) != len(names):
        raise CorruptStream("header: no index, or a dimension twice")
    plans, found, at = [], {}, 0
    for row in rows:
        name, numbers, chunks = (row.get(k) for k in "ndc") if isinstance(row, dict) else (None, None, None)
        known = isinstance(numbers, list) and all(type(i) is int and 0 <= i < len(dims) for i in numbers)
        if not isinstance(name, str) or name in found or not known:
            raise CorruptStream("header: bad variable")
        coding = Coding.of(row.get("k"))
        shape = tuple(dims[i][1] for i in numbers)
        if len(coding.axes) != len(shape):
            raise CorruptStream("header: bad variable")
        whole = isinstance(chunks, list) and all(type(c) is int and c > 0 for c in chunks)
        if chunks is not None and not (whole and len(chunks) == len(shape)):
            raise CorruptStream("header: bad chunks")
        variable = Variable(name, tuple(names[i] for i in numbers), shape, coding.dtype)
        plan = Plan(variable, coding, None if chunks is None else tuple(chunks))
        size = math.prod(plan.chunks) if plan.chunks is not None else variable.size
        if plan.chunks is not None and size * 8 > limits.max_decoded_bytes:
            most = limits.max_decoded_bytes
            raise LimitExceeded(f"{name}: a chunk of {size} values is beyond the limit of {most} bytes (--max-bytes)")
        if plan.chunks is None and variable.size > 1 << 24:
            raise CorruptStream("header: a variable without chunks is too large")
        if plan.count > len(data) - at:
            raise CorruptStream("header: more chunks than the file has")
        found[name] = data[at : at + plan.count]
        at += plan.count
        plans.append(plan)
    if at != len(data):
        raise CorruptStream("header: fewer chunks than the file has")
    return plans, found


def _read_index(raw: bytes, plans: list[Plan], header: dict[str, Any], limits: Limits) -> tuple[Layout, dict[str, np.ndarray]]:
    """The layout, with attributes, and the small variables. Completes ``plans``."""
    index = cbor.decode(_unpacked(raw, None, limits.max_metadata_bytes))
    rows = index.get("vars") if isinstance(index, dict) else None
    if not isinstance(rows, list) or len(rows) != len(plans):
        raise CorruptStream("index: not that of this file")
    inline, variables = {}, {}
    for i, (plan, row) in enumerate(zip(plans, rows)):
        if not isinstance(row, dict) or not isinstance(row.get("e"), dict):
            raise CorruptStream("index: bad variable")
        variable = replace(plan.variable, attrs=attributes_of(row.get("a")), encoding=_encoding(row["e"]))
        plans[i] = replace(plan, variable=variable)
        variables[variable.name] = variable
        if plan.chunks is None:
            if not isinstance(row.get("v"), bytes):
                raise CorruptStream("index: a small variable is missing")
            inline[variable.name] = decode_chunk(row["v"], variable.shape, replace(plan.coding, kind="lossless", value=0.0))
    dims = {name: size for name, size, _ in header["dims"]}
    unlimited = tuple(name for name, _, free in header["dims"] if free)
    return Layout(dims, unlimited, attributes_of(index.get("attrs")), variables), inline


def _encoding(plain: dict[str, Any]) -> dict[str, Any]:
    types = {"zlib": bool, "shuffle": bool, "fletcher32": bool, "contiguous": bool, "complevel": int, "chunksizes": list}
    if any(type(v) is not types.get(k) for k, v in plain.items()) or not 0 <= plain.get("complevel", 4) <= 9 or not all(
        type(n) is int and n > 0 for n in plain.get("chunksizes", [])):  # fmt: skip
        raise CorruptStream("index: bad storage settings")
    return plain


def fill_of(variable: Variable) -> Any:
    """What stands for values that are lost: the fill value, NaN for floats without one, or the default of netCDF."""
    if variable.dtype not in (STRING, "S1") and (fills := variable.fills):
        return fills[0]
    if variable.dtype[0] == "f":
        return np.nan
    if variable.dtype == STRING:
        return ""
    import netCDF4

    return netCDF4.default_fillvals[variable.dtype]


def decode_grid(grid: GridFile, target: Target | None, *, keep_going: bool = False, workers: int = 1,
                progress: Progress | None = None) -> list[str]:  # fmt: skip
    """Decode everything into ``target``, or only check where it is None.

    With ``keep_going`` damaged chunks become fill values; the texts of their errors are returned.
    """
    tasks = ((p, n, box) for p in grid.plans.values() if p.chunks is not None for n, (_, box) in enumerate(p.boxes()))
    chunked = [p for p in grid.plans.values() if p.chunks is not None]
    done = Done(of=sum(p.count for p in chunked), raw_total=sum(p.variable.nbytes for p in chunked))
    damaged: list[str] = []
    grid.threads = max(1, workers // max(done.of, 1))

    def work(task: tuple[Plan, int, Box]) -> tuple[Plan, Box, np.ndarray | CodecError]:
        plan, number, box = task
        try:
            return plan, box, grid.chunk(plan.variable.name, number)
        except CorruptStream as error:
            if not keep_going:
                raise
            return plan, box, error

    for plan, box, values in ordered_map(work, tasks, workers):
        name = plan.variable.name
        if isinstance(values, CodecError):
            damaged.append(str(values))
            values = np.full([s.stop - s.start for s in box], fill_of(plan.variable),
                             object if plan.variable.dtype == STRING else plan.variable.dtype)  # fmt: skip
        if target is not None:
            target.write(name, box, values)
        done.chunks, done.raw = done.chunks + 1, done.raw + values.nbytes
        if progress:
            progress(done)
    if target is not None:
        for name, values in grid.small.items():
            if values.ndim == 0 or values.size:
                target.write(name, tuple(slice(0, n) for n in values.shape), values)
    return damaged


# --- verify -----------------------------------------------------------------------------------------------------------


def verify(source: Source, grid: GridFile) -> dict[str, float]:
    """Compare a file with what it was made of, value by value, in real numbers as a reader of netCDF sees them.

    The largest error over the bound of each lossy variable; CorruptStream where a promise is broken: a bound, a missing value
    that is not missing or the other way round, any bit of what is lossless.
    """
    worst: dict[str, float] = {}
    for name, plan in grid.plans.items():
        if name not in source.layout.variables:
            continue
        whole = tuple(slice(0, n) for n in plan.variable.shape)
        for box in [box for _, box in plan.boxes()] if plan.chunks is not None else [whole]:
            a, b = source.read(name, box or None), grid.read(name, box or None)
            if plan.coding.lossy:
                worst[name] = max(worst.get(name, 0.0), _over_bound(a, b, plan, grid.layout.variables[name]))
            elif (a.tobytes() if a.dtype != object else a.tolist()) != (b.tobytes() if b.dtype != object else b.tolist()):
                raise CorruptStream(f"{describe_box(plan, grid.layout, grid.small, box)}: did not come back as it was")
    return worst


def _over_bound(a: np.ndarray, b: np.ndarray, plan: Plan, variable: Variable) -> float:
    """Largest error of a chunk over its bound."""
    name = variable.name
    missing = np.zeros(a.shape, bool)
    for fill in variable.fills:
        if ((a == fill) != (b == fill)).any():
            raise CorruptStream(f"{name}: missing values did not come back as they were")
        missing |= a == fill
    scale, offset = plan.coding.scale, plan.coding.offset
    x, y = (v.astype(np.float64) * scale + offset if variable.packed else v.astype(np.float64) for v in (a, b))
    valid = ~missing & np.isfinite(x)
    if not (np.array_equal(x[~valid], y[~valid], equal_nan=True) and np.isfinite(y[valid]).all()):
        raise CorruptStream(f"{name}: NaN or infinities did not come back as they were")
    x, y = x[valid], y[valid]
    if not x.size:
        return 0.0
    error, bound = np.abs(x - y), plan.coding.value
    if plan.coding.kind == "range":
        bound *= float(np.ptp(x))
    elif plan.coding.kind == "relative":
        bound = bound * np.abs(x)
    elif plan.coding.kind in BEST_EFFORT:
        bound = float(variable.attrs.get("lossy_compression_maximum_absolute_error", 0.0)) * (1 + 2.0**-20)
    elif plan.coding.kind == "bits":
        bound = float(variable.attrs["lossy_compression_maximum_relative_error"]) * np.abs(x)
    with np.errstate(divide="ignore", invalid="ignore"):
        over = float(np.where(error == 0, 0.0, error / bound).max())
    if over > 1:
        raise CorruptStream(f"{name}: an error is {over:.9g} times the bound")
    return over
