"""Archives: many files of fields, one after the other in time, as one Zarr v3 store whose chunks our codec makes.

Fields are cut into chunks of a few times with all levels; each is a task that reads its part of the source files, codes it
and renames a finished file into place. So memory is that of the chunks under way, tasks may run anywhere that sees the
files, a killed run goes on where it stopped (finished chunks are known by their checksum), and the bytes of a chunk do not
depend on who made it. Everything else (coordinates, small variables) is plain Zarr that any reader opens.

What Zarr's JSON cannot hold (types of attributes, storage settings of netCDF, unlimited dimensions) lies beside it in the
attribute ``neuralcodec`` of the group, with the list of source files.
"""

from __future__ import annotations

import base64
import itertools
import math
import os
import shutil
import tempfile
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..container import cbor
from ..container.errors import CodecError, CorruptStream, UnsupportedInput, UsageError
from ..container.format import DEFAULT_LIMITS
from ..media.grid import GRIB, STRING, Layout, Source, Variable, open_grid
from ..media.grid import RECORD as KEY
from .grid_bounds import Wanted, resolve
from .grid_chunk import Coding, Stats, _packed, _unpacked, coding_of
from .grid_file import (
    CHUNK_VALUES,
    INLINE,
    TIMES,
    Done,
    Plan,
    Progress,
    _encoding,
    attributes_of,
    chunk_shape,
    describe_box,
    fitting,
    is_periodic,
    lossy_layout,
    now,
    plain_attributes,
)

VERSION = 1
TIME_CHUNK = 8192
"""Steps in a chunk of a time coordinate or another small variable along time."""
CONNECT_S = 15
"""Seconds to wait for a scheduler."""
WINDOW = 4
"""Tasks under way for each thread or worker: enough to keep it busy, few enough to stop quickly."""
_PARTIAL = ".partial"


# --- what there is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A source file: its times are ``first`` .. ``first + steps`` of the archive."""

    path: str
    size: int
    modified: int
    first: int
    steps: int

    @property
    def identity(self) -> tuple[str, int, int]:
        return os.path.basename(self.path), self.size, self.modified


@dataclass
class Survey:
    """What the source files are together. ``unpack`` are packed variables whose packing changes from file to file."""

    layout: Layout
    time: str | None
    members: list[Member]
    times: np.ndarray
    unpack: set[str]
    periodic: dict[str, bool]


def _identity(path: str) -> tuple[int, int]:
    """Size and time of change, in ns, of a file, or of what lies in a folder."""
    files = [path] if os.path.isfile(path) else [str(p) for p in Path(path).rglob("*") if p.is_file()]
    stats = [os.stat(f) for f in files]
    return sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)


def survey(paths: list[str], grib_filter: dict[str, Any] | None = None, chosen: list[str] | None = None) -> Survey:
    """Look into all files and put them in the order of their times. UnsupportedInput when they do not belong together."""
    found: list[tuple[str, Layout, np.ndarray]] = []
    first: Layout | None = None
    time_dim, unpack, periodic = None, set(), {}
    for path in paths:
        with open_grid(path, grib_filter) as source:
            layout = source.layout
            dim = time_dimension(layout)
            if first is None:
                first, time_dim = layout, dim
                periodic = {n: is_periodic(source, n, layout.axes(n)) for n in layout.variables if layout.is_data(n)}
            _check_alike(first, layout, time_dim, dim, paths[0], path, unpack)
            times = source.read(dim).astype(np.float64) if dim and dim in layout.variables else np.zeros(1)
            if dim and dim not in layout.variables and len(paths) > 1:
                raise UnsupportedInput(f"{path}: has no times, so its place beside the other files is not known")
            found.append((path, layout, times))
    assert first is not None
    if time_dim is None and len(paths) > 1:
        raise UnsupportedInput(f"{paths[1]}: the files have no dimension of time along which they could be joined")
    found.sort(key=lambda row: row[2][0] if len(row[2]) else -math.inf)
    times = np.concatenate([row[2] for row in found])
    if time_dim and time_dim in first.variables and (np.diff(times) <= 0).any():
        at = int(np.argmax(np.diff(times) <= 0)) + 1
        starts = np.cumsum([0] + [len(row[2]) for row in found])
        name = found[bisect_right(starts.tolist(), at) - 1][0]
        raise UnsupportedInput(f"{name}: its times do not come after those before it")
    members, at = [], 0
    for path, layout, _ in found:
        steps = layout.dims[time_dim] if time_dim else 1
        members.append(Member(os.path.abspath(path), *_identity(path), at, steps))
        at += steps
    layout = _joined(found[0][1], time_dim, at, unpack)
    return Survey(layout, time_dim, members, times, unpack, periodic)


def time_dimension(layout: Layout) -> str | None:
    """The dimension along which files are joined: the one that most fields call time."""
    names = [d for n, v in layout.variables.items() if layout.is_data(n) for d, a in zip(v.dims, layout.axes(n)) if a == "T"]
    return max(set(names), key=names.count) if names else None


def _check_alike(first: Layout, layout: Layout, time_a: str | None, time_b: str | None, path_a: str, path: str,
                 unpack: set[str]) -> None:  # fmt: skip
    """UnsupportedInput for files that cannot be joined; variables packed in different ways go into ``unpack``."""
    if time_a != time_b:
        raise UnsupportedInput(f"{path}: its time is {time_b}, that of {path_a} is {time_a}")
    for dim, size in first.dims.items():
        if dim != time_a and layout.dims.get(dim) != size:
            raise UnsupportedInput(f"{path}: dimension {dim} is {layout.dims.get(dim)}, in {path_a} it is {size}")
    if layout.variables.keys() != first.variables.keys():
        other = ", ".join(sorted(layout.variables.keys() ^ first.variables.keys()))
        raise UnsupportedInput(f"{path}: has not the same variables as {path_a} ({other})")
    for name, a in first.variables.items():
        b = layout.variables[name]
        if a.dims != b.dims or a.dtype != b.dtype:
            raise UnsupportedInput(f"{path}: {name} is {b.dtype} {b.dims}, in {path_a} it is {a.dtype} {a.dims}")
        if name == time_a and any(a.attrs.get(k) != b.attrs.get(k) for k in ("units", "calendar")):
            raise UnsupportedInput(f"{path}: counts time in {b.attrs.get('units')} ({b.attrs.get('calendar', 'standard')}), "
                                   f"{path_a} in {a.attrs.get('units')} ({a.attrs.get('calendar', 'standard')})")  # fmt: skip
        if a.attrs.get("units") != b.attrs.get("units"):
            raise UnsupportedInput(f"{path}: {name} is in {b.attrs.get('units')}, in {path_a} it is in {a.attrs.get('units')}")
        if a.packed != b.packed or (a.packed and (a.scale != b.scale or a.fills != b.fills)):
            if time_a not in a.dims:
                raise UnsupportedInput(f"{path}: {name} has no time and is packed in another way than in {path_a}")
            unpack.add(name)


def _joined(first: Layout, time_dim: str | None, steps: int, unpack: set[str]) -> Layout:
    """The layout of all files as one."""
    dims = {d: steps if d == time_dim else n for d, n in first.dims.items()}
    variables = {}
    for name, v in first.variables.items():
        attrs, dtype, encoding = v.attrs, v.dtype, dict(v.encoding)
        if name in unpack:
            drop = ("scale_factor", "add_offset", "_FillValue", "missing_value")
            attrs, dtype = {k: a for k, a in attrs.items() if k not in drop} | {"_FillValue": np.float32(np.nan)}, "f4"
        if time_dim in v.dims and "contiguous" in encoding:
            encoding.pop("contiguous")
        variables[name] = Variable(name, v.dims, tuple(dims[d] for d in v.dims), dtype, attrs, encoding)
    unlimited = tuple(dict.fromkeys((*first.unlimited, *([time_dim] if time_dim else []))))
    return replace(first, dims=dims, variables=variables, unlimited=unlimited)


def make_plans(found: Survey, bounds: dict[str, tuple[str, float]], times: int, values: int, model: str = "") -> list[Plan]:
    """Large variables with their chunks; small ones without. A chunk has all levels of a variable unless it would be huge."""
    plans = []
    for name, v in found.layout.variables.items():
        kind, value = bounds.get(name, ("lossless", 0.0))
        if name in found.unpack and kind == "absolute":
            value -= _unpacked_rounding(found, name)
            if value <= 0:
                raise UsageError(f"--max-error: {name} is packed in a different way in each file and is joined as float32, "
                                 "which is coarser than this bound")  # fmt: skip
        coding = coding_of(found.layout, name, kind, value, model)
        per_step = v.nbytes // max(found.layout.dims.get(found.time, 1) if found.time in v.dims else 1, 1)
        if v.dtype in (STRING, "S1") or not (coding.lossy or found.layout.is_data(name) or per_step > INLINE):
            plans.append(Plan(v, coding, None))
            continue
        one_time = math.prod(n for n, a in zip(v.shape, coding.axes) if a != "T")
        chunks = chunk_shape(v.shape, coding.axes, times, max(values, min(one_time, 8 * values)))
        plans.append(Plan(v, replace(coding, periodic=found.periodic.get(name, False)), chunks))
    return plans


def _unpacked_rounding(found: Survey, name: str) -> float:
    """Largest rounding of a value of a packed variable to float32, over all files."""
    worst = 0.0
    for member in found.members:
        with open_grid(member.path) as source:
            v = source.layout.variables[name]
            scale, offset = v.scale
            worst = max(worst, abs(offset) + abs(scale) * 2.0 ** (8 * np.dtype(v.dtype).itemsize - 1))
    return worst * 2.0**-23


# --- the store --------------------------------------------------------------------------------------------------------


def put(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def _store(path: str) -> Any:
    """A local Zarr store whose writes are atomic."""
    import asyncio

    from zarr.storage import LocalStore

    class Atomic(LocalStore):
        async def set(self, key: str, value: Any) -> None:
            await asyncio.to_thread(put, self.root / key, value.to_bytes())

    return Atomic(path)


def _zarr_attributes(attrs: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Attributes as JSON, the way that xarray reads them back."""
    found = {}
    for name, value in attrs.items():
        if name == "_FillValue":
            from xarray.backends.zarr import FillValueCoder

            found[name] = FillValueCoder.encode(np.asarray(value)[()], np.dtype(dtype))
        elif isinstance(value, (str, list)):
            found[name] = value
        else:
            plain = np.asarray(value).tolist()
            whole = [v if isinstance(v, (str, int)) or math.isfinite(v) else str(v) for v in np.ravel(plain).tolist()]
            found[name] = whole if isinstance(plain, list) else whole[0]
    return found


def _create(group: Any, plan: Plan, name: str, attrs: dict[str, Any], time_dim: str | None) -> None:
    v = plan.variable
    options: dict[str, Any] = {"dimension_names": v.dims or None, "attributes": _zarr_attributes(attrs, v.dtype)}
    if v.dtype == STRING:
        options |= {"dtype": str, "fill_value": ""}
    else:
        fills = v.fills if v.dtype != "S1" else []
        options |= {"dtype": np.dtype(v.dtype), "fill_value": fills[0] if fills else np.nan if v.dtype[0] == "f" else 0}
    if plan.chunks is None:
        chunks = tuple(TIME_CHUNK if d == time_dim else max(n, 1) for d, n in zip(v.dims, v.shape))
    else:
        from ..plugins.zarr_codec import NeuralcodecCodec

        chunks = plan.chunks
        options |= {"serializer": NeuralcodecCodec.of(plan.coding, name), "compressors": None}
    group.create_array(name, shape=v.shape, chunks=chunks, **options)


def _record(plans: list[Plan], layout: Layout, members: list[Member], complete: bool, time_dim: str | None) -> dict[str, Any]:
    """What stands in the group's attribute. ``layout`` is the final one, with the record of what was lost."""
    coded = {p.variable.name: p for p in plans}
    rows = [
        {"n": v.name, "d": list(v.dims), "a": plain_attributes(v.attrs), "e": v.encoding, "t": v.dtype}
        | ({"k": coded[v.name].coding.plain(), "c": list(coded[v.name].chunks)} if _chunked(coded, v.name) else {})
        for v in layout.variables.values()
    ]  # fmt: skip
    exact = {"attrs": plain_attributes(layout.attrs), "vars": rows, "unlimited": list(layout.unlimited), "time": time_dim}
    return {
        "version": VERSION,
        "complete": complete,
        "sources": [[os.path.basename(m.path), m.size, m.modified, m.first, m.steps] for m in members],
        "exact": base64.b64encode(_packed(cbor.encode(exact))).decode(),
    }


def _chunked(plans: dict[str, Plan], name: str) -> bool:
    return name in plans and plans[name].chunks is not None


def chunk_path(store: str, name: str, at: tuple[int, ...]) -> Path:
    """Where a chunk of an array lies."""
    return Path(store, name, "/".join(["c", *map(str, at)]))


# --- reading an archive -----------------------------------------------------------------------------------------------


class Archive:
    """An existing store, as ``GridFile``: ``layout``, ``plans``, ``chunk``, ``read`` and small variables."""

    def __init__(self, path: str):
        import zarr

        self.path, self.threads = path, 1
        try:
            self.group = zarr.open_group(_store(path), mode="r", use_consolidated=False)
            record = dict(self.group.attrs)[KEY]
            self.members = [Member(*row) for row in record["sources"]]
            self.complete = bool(record["complete"])
            exact = cbor.decode(_unpacked(base64.b64decode(record["exact"]), None, DEFAULT_LIMITS.max_metadata_bytes))
            if record["version"] != VERSION:
                raise UnsupportedInput(f"{path}: archive version {record['version']}; this program knows {VERSION}")
            self.time = exact["time"]
            self.plans = {row["n"]: self._plan(row) for row in exact["vars"]}
            dims = {d: n for p in self.plans.values() for d, n in zip(p.variable.dims, p.variable.shape)}
            variables = {n: p.variable for n, p in self.plans.items()}
            self.layout = Layout(dims, tuple(exact["unlimited"]), attributes_of(exact["attrs"]), variables)
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            if isinstance(error, FileNotFoundError) or (isinstance(error, KeyError) and error.args == (KEY,)):
                raise UnsupportedInput(f"{path}: is no archive of this codec") from None
            raise CorruptStream(f"{path}: its description is damaged ({type(error).__name__}: {error})") from None
        self.small = {n: self._small(n) for n, p in self.plans.items() if p.chunks is None}

    def _plan(self, row: dict[str, Any]) -> Plan:
        array = self.group[row["n"]]
        shape = tuple(array.shape)
        variable = Variable(row["n"], tuple(row["d"]), shape, row["t"], attributes_of(row["a"]), _encoding(row["e"]))
        if "k" not in row:
            return Plan(variable, Coding(row["t"], "L" * len(shape)), None)
        return Plan(variable, Coding.of(row["k"]), tuple(row["c"]))

    def _small(self, name: str) -> np.ndarray:
        try:
            values = np.asarray(self.group[name][...])
        except Exception as error:  # whatever zarr's codecs raise
            raise CorruptStream(f"{self.path}: {name}: cannot be read ({error})") from None
        return values.astype(object) if self.plans[name].variable.dtype == STRING else values

    def payload(self, name: str, at: tuple[int, ...]) -> bytes | None:
        """Bytes of a chunk, None where none was written."""
        with suppress(FileNotFoundError):
            return chunk_path(self.path, name, at).read_bytes()
        return None

    def chunk(self, name: str, number: int) -> np.ndarray:
        """Chunk ``number`` (C order), without the padding of the last ones. CorruptStream names variable and time."""
        from ..plugins.zarr_codec import unframe

        plan = self.plans[name]
        at = tuple(int(i) for i in np.unravel_index(number, plan.grid))
        box = plan.box(at)
        data = self.payload(name, at)
        if plan.coding.model:
            from .grid_neural import load

            load(plan.coding.model, bytes.fromhex(self.group[name].metadata.codecs[0].model_id))
        try:
            if data is None:
                raise CorruptStream("chunk is missing")
            whole = unframe(data, plan.chunks, plan.coding, self.threads)
        except CorruptStream as error:
            raise CorruptStream(f"{self.path}: {describe_box(plan, self.layout, self.small, box)}: {error}") from None
        return whole[tuple(slice(0, s.stop - s.start) for s in box)]

    def close(self) -> None:
        self.group.store.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def is_archive(path: str) -> bool:
    """Whether a folder is a store that ``codec encode`` made."""
    try:
        return f'"{KEY}"' in Path(path, "zarr.json").read_text()
    except (OSError, UnicodeDecodeError):
        return False


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One chunk to be made. Plain, so that it can go to another machine."""

    store: str
    name: str
    at: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    chunks: tuple[int, ...]
    coding: Coding
    parts: tuple[tuple[str, int, int], ...]  # (file, first, last step in it), in order; one without steps for no time
    time_axis: int | None
    unpack: bool
    grib_filter: tuple[tuple[str, Any], ...]
    old: int = 0  # steps at the front that are taken from the chunk that is there already


@lru_cache(maxsize=4)
def _grib(path: str, identity: tuple[int, int], grib_filter: tuple[tuple[str, Any], ...]) -> Source:
    return open_grid(path, dict(grib_filter))


@contextmanager
def _opened(path: str, grib_filter: tuple[tuple[str, Any], ...]) -> Iterator[Source]:
    """A source file for one task. GRIB, which must be searched for its messages, stays open; netCDF must be closed by whom
    it was opened, because a file that is collected later is closed at any time in any thread."""
    if Path(path).suffix.lower() in GRIB:
        yield _grib(path, _identity(path), grib_filter)
    else:
        with open_grid(path) as source:
            yield source


def run_task(task: Task) -> Stats:
    """Make a chunk. This is what a Dask worker runs."""
    from ..plugins.zarr_codec import frame, unframe

    pieces, what = [], None
    path = chunk_path(task.store, task.name, task.at)
    if task.old:
        whole = unframe(path.read_bytes(), task.chunks, task.coding)
        pieces.append(np.take(whole, range(task.old), task.time_axis))
    for file, first, last in task.parts:
        box = [slice(*b) for b in task.box]
        if task.time_axis is not None:
            box[task.time_axis] = slice(first, last)
        with _opened(file, task.grib_filter) as source:
            values = source.read(task.name, tuple(box))
            pieces.append(_real(values, source.layout.variables[task.name]) if task.unpack else values)
            if task.coding.model:
                from .grid_neural import about

                what = about(source, task.name, task.coding.axes, tuple(box))
    values = np.concatenate(pieces, task.time_axis) if len(pieces) > 1 else pieces[0]
    # Zarr stores whole chunks: what lies behind the end is never looked at, and costs least when it is like the edge
    values = np.pad(values, [(0, c - n) for c, n in zip(task.chunks, values.shape)], "edge")
    fits = all(c == s.stop - s.start or i == task.time_axis for i, (c, s) in enumerate(zip(task.chunks, box)))
    data, stats = frame(values, task.coding, what if fits else None)
    if task.old:  # a second round must not add its error to the first
        again = np.take(unframe(data, task.chunks, task.coding), range(task.old), task.time_axis)
        if again.tobytes() != pieces[0].tobytes():
            data, stats = frame(values, replace(task.coding, kind="lossless"))
    put(path, data)
    return stats


def _real(values: np.ndarray, variable: Variable) -> np.ndarray:
    """Packed integers as float32, NaN where missing."""
    scale, offset = variable.scale
    real = (values.astype(np.float64) * scale + offset).astype(np.float32)
    for fill in variable.fills:
        real[values == fill] = np.nan
    return real


def _tasks(store: str, plans: list[Plan], found: Survey, first: int, grib_filter: dict[str, Any],
           kept: set[tuple[str, tuple[int, ...]]]) -> Iterator[Task]:  # fmt: skip
    """Chunks that hold times from ``first`` on (all those without time only when it is 0), all variables of a time together."""
    starts = [m.first for m in found.members]
    offset = starts[0] if starts else 0
    chunked = [p for p in plans if p.chunks is not None]

    def task(plan: Plan, at: tuple[int, ...]) -> Task:
        box = [(s.start, s.stop) for s in plan.box(at)]
        axis = plan.variable.dims.index(found.time) if found.time in plan.variable.dims else None
        parts, old = [], 0
        if axis is None:
            parts.append((found.members[0].path, 0, 0))
        else:
            begin, end = box[axis]
            old = max(0, first - begin)
            for member in found.members[max(bisect_right(starts, max(begin, first)) - 1, 0) :]:
                low, high = max(begin, first, member.first), min(end, member.first + member.steps)
                if low >= end:
                    break
                if low < high:
                    parts.append((member.path, low - member.first, high - member.first))
        name = plan.variable.name
        return Task(store, name, at, tuple(box), plan.chunks, plan.coding, tuple(parts), axis,  # type: ignore[arg-type]
                    name in found.unpack, tuple(sorted(grib_filter.items())), old)  # fmt: skip

    def steps_of(plan: Plan) -> int | None:
        return plan.variable.dims.index(found.time) if found.time in plan.variable.dims else None

    for plan in chunked:
        if steps_of(plan) is None and first == 0 and offset == 0:
            for at, _ in plan.boxes():
                if (plan.variable.name, at) not in kept:
                    yield task(plan, at)
    along = [(p, steps_of(p)) for p in chunked if steps_of(p) is not None]
    blocks = max((p.grid[axis] for p, axis in along), default=0)
    for block in range(blocks):
        for plan, axis in along:
            if block >= plan.grid[axis] or min((block + 1) * plan.chunks[axis], plan.variable.shape[axis]) <= first:
                continue
            rest = [range(n) if i != axis else range(block, block + 1) for i, n in enumerate(plan.grid)]
            for at in itertools.product(*rest):
                if (plan.variable.name, at) not in kept:
                    yield task(plan, at)


# --- running them -----------------------------------------------------------------------------------------------------

Runner = Callable[[Iterator[Task]], Iterator[Stats]]


def local_runner(threads: int | None = None) -> Runner:
    """Dask's threads in this process: as many as asked for, or one per core where their chunks fit into ``MEMORY``."""

    def run(tasks: Iterator[Task]) -> Iterator[Stats]:
        import dask

        most = threads or max(os.cpu_count() or 1, 1)
        while batch := list(itertools.islice(tasks, WINDOW * most)):
            workers = threads or fitting(most, max(math.prod(t.chunks) for t in batch))
            yield from dask.compute(*(dask.delayed(run_task, pure=False)(t) for t in batch), scheduler="threads",
                                    num_workers=workers)  # fmt: skip

    return run


def cluster_runner(address: str) -> Runner:
    """An existing Dask cluster. Its workers need this package and must see the files under the same names."""

    def run(tasks: Iterator[Task]) -> Iterator[Stats]:
        try:
            from distributed import Client, as_completed
        except ImportError:
            raise UsageError("--scheduler needs the package distributed: pip install 'neuralcodec[climate]'") from None
        try:
            client = Client(address, timeout=CONNECT_S)
        except (OSError, TimeoutError) as error:
            raise CodecError(f"--scheduler {address}: no scheduler answers there ({error})") from None
        with client:
            cores = max(sum(w["nthreads"] for w in client.scheduler_info(n_workers=-1)["workers"].values()), 1)
            waiting = as_completed(raise_errors=True)
            for task in itertools.islice(tasks, WINDOW * cores):
                waiting.add(client.submit(run_task, task, pure=False, retries=2))
            for future in waiting:
                yield future.result()
                future.release()
                for task in itertools.islice(tasks, 1):
                    waiting.add(client.submit(run_task, task, pure=False, retries=2))

    return run


def _finished(store: str, plans: list[Plan], first: int, time_dim: str | None) -> set[tuple[str, tuple[int, ...]]]:
    """Chunks that lie whole in the store already, of those that an interrupted run was to make."""
    from ..plugins.zarr_codec import check

    kept = set()
    for plan in plans:
        if plan.chunks is None:
            continue
        axis = plan.variable.dims.index(time_dim) if time_dim in plan.variable.dims else None
        for at, box in plan.boxes():
            # a chunk with old times in front is always made anew: it lay there before, without the new ones
            if axis is not None and box[axis].start < first:
                continue
            with suppress(FileNotFoundError, CorruptStream):
                check(chunk_path(store, plan.variable.name, at).read_bytes())
                kept.add((plan.variable.name, at))
    return kept


def _clean(store: str) -> None:
    """Remove what a killed run left half written."""
    for partial in Path(store).rglob(f".*{_PARTIAL}"):
        with suppress(FileNotFoundError):
            partial.unlink()


@dataclass
class Outcome:
    """What a run did."""

    done: Done
    steps: int
    resumed: int
    skipped: int
    unpacked: list[str]


def encode_archive(paths: list[str], store: str, wanted: dict[str, Wanted] | None = None, *,
                   bounds: Callable[[Layout], dict[str, tuple[str, float]]] | None = None, times: int = TIMES,
                   values: int = CHUNK_VALUES, append: bool = False, force: bool = False, command: str = "codec encode",
                   model: str = "", grib_filter: dict[str, Any] | None = None, runner: Runner | None = None,
                   progress: Progress | None = None) -> Outcome:  # fmt: skip
    """Join files of fields into a Zarr store, make it anew, finish an interrupted one, or append to it.

    ``wanted``: bounds, as ``grid_bounds.parse_bounds``; or ``bounds`` makes them from the layout. Files that the archive has
    already are skipped; later ones need ``append``. ``model``: a network for what is lossy. UsageError when it was made with
    other bounds.
    """
    runner = runner or local_runner()
    grib_filter = grib_filter or {}
    if force and os.path.lexists(store):
        if not is_archive(store):
            raise UsageError(f"{store}: is no archive of this codec; -f does not remove it")
        shutil.rmtree(store)
    exists = os.path.lexists(store)
    if exists and not is_archive(store) and os.listdir(store):
        raise FileExistsError(f"{store}: exists already and is no archive of this codec")
    before: Archive | None = Archive(store) if exists and is_archive(store) else None
    known = {m.identity: m for m in before.members} if before else {}
    fresh = [p for p in paths if (os.path.basename(p), *_identity(p)) not in known]
    skipped = len(paths) - len(fresh)
    if before and before.complete and not fresh:
        before.close()
        return Outcome(Done(), before.layout.dims.get(before.time, 1) if before.time else 1, 0, skipped, [])
    if before and not before.complete:
        return _resume(before, paths, fresh, store, wanted, bounds, values, append, command, model, grib_filter, runner,
                       progress)  # fmt: skip
    found = survey(fresh, grib_filter)
    first = 0
    if before:
        if not append:
            raise UsageError(f"{store}: exists already and has not {os.path.basename(fresh[0])}; --append adds later times")
        first = _continue(before, found)
        times = next((p.chunks[p.variable.dims.index(before.time)] for p in before.plans.values()
                      if p.chunks is not None and before.time in p.variable.dims), times)  # fmt: skip
    limits = bounds(found.layout) if bounds else resolve(found.layout, wanted) if wanted else {}
    plans = make_plans(found, limits, times, values, model)
    members = found.members
    if before:
        members = [replace(m, first=m.first + first) for m in members]
        found = replace(found, members=members)
        plans = _matched(before, plans, found, first)
        members = before.members + members
        layout = _longer(before.layout, found.time, first + sum(m.steps for m in found.members))
        before.close()
    else:
        layout = lossy_layout(found.layout, plans, {}, command, now())
    return _run(store, plans, found, layout, members, first, set(), before is None, grib_filter, runner, progress, skipped)


def _longer(layout: Layout, time_dim: str | None, steps: int) -> Layout:
    dims = {d: steps if d == time_dim else n for d, n in layout.dims.items()}
    variables = {n: replace(v, shape=tuple(dims[d] for d in v.dims)) for n, v in layout.variables.items()}
    return replace(layout, dims=dims, variables=variables)


def _continue(before: Archive, found: Survey) -> int:
    """Steps in the archive, once it is sure that the new ones come after them."""
    if before.time is None or found.time != before.time:
        raise UsageError(f"{before.path}: has no time along which files can be appended")
    for dim, size in before.layout.dims.items():
        if dim != before.time and found.layout.dims.get(dim) != size:
            raise UnsupportedInput(f"{found.members[0].path}: dimension {dim} is {found.layout.dims.get(dim)}, "
                                   f"in the archive it is {size}")  # fmt: skip
    old = before.small.get(before.time)
    if old is not None:
        a, b = before.layout.variables[before.time].attrs, found.layout.variables[before.time].attrs
        if any(a.get(k) != b.get(k) for k in ("units", "calendar")):
            raise UnsupportedInput(f"{found.members[0].path}: counts time in {b.get('units')}, the archive in {a.get('units')}")
        if len(old) and len(found.times) and found.times[0] <= float(old[-1]):
            raise UsageError(f"{found.members[0].path}: its times do not come after those in the archive")
    return before.layout.dims[before.time]


def _matched(before: Archive, plans: list[Plan], found: Survey, first: int) -> list[Plan]:
    """Plans of the longer archive. UsageError when what is appended is to be coded in another way than what is there."""
    made = []
    names = {p.variable.name for p in plans}
    for name, old in before.plans.items():
        if name not in names:
            if old.variable.dims or not old.variable.attrs.get("algorithm"):
                raise UnsupportedInput(f"{found.members[0].path}: has no variable {name}")
            made.append(old)
            continue
        new = next(p for p in plans if p.variable.name == name)
        if (new.chunks is None) != (old.chunks is None) or (
            new.chunks is not None and _bound(new) != _bound(old)):  # fmt: skip
            raise UsageError(f"{before.path}: {name} was made with another bound ({old.coding.kind} {old.coding.value:g}); "
                             "append with the same --max-error")  # fmt: skip
        if old.chunks is not None and old.coding.dtype[0] == "f" and new.coding.dtype[0] in "iu":
            found.unpack.add(name)
        elif old.coding.dtype != new.coding.dtype or (old.variable.packed and old.variable.scale != new.variable.scale):
            raise UnsupportedInput(f"{found.members[0].path}: {name} is stored or packed in another way than in the archive")
        steps = first + sum(m.steps for m in found.members)
        shape = tuple(steps if d == before.time else n for d, n in zip(old.variable.dims, old.variable.shape))
        made.append(replace(old, variable=replace(old.variable, shape=shape)))
    if extra := names - before.plans.keys():
        raise UnsupportedInput(f"{found.members[0].path}: has variables that the archive has not ({', '.join(sorted(extra))})")
    return made


def _bound(plan: Plan) -> tuple[str, float, str]:
    return plan.coding.kind, plan.coding.value, plan.coding.model


def _resume(before: Archive, paths: list[str], fresh: list[str], store: str, wanted: Any, bounds: Any, values: int,
            append: bool, command: str, model: str, grib_filter: dict[str, Any], runner: Runner,
            progress: Progress | None) -> Outcome:  # fmt: skip
    """Finish what was interrupted; files that it did not know yet come after that."""
    here = {(os.path.basename(p), *_identity(p)): os.path.abspath(p) for p in paths}
    pending = dict(before.group.attrs)[KEY].get("pending", 0)
    old, new = before.members[: len(before.members) - pending], before.members[len(before.members) - pending :]
    if missing := [m for m in new if m.identity not in here]:
        name = os.path.basename(missing[0].path)
        raise UsageError(f"{store}: was interrupted while it took in {name}; name it again, or make the archive anew with -f")
    members = [replace(m, path=here[m.identity]) for m in new]
    first = sum(m.steps for m in old)
    found = survey([m.path for m in members], grib_filter)
    found = replace(found, members=members)
    limits = bounds(found.layout) if bounds else resolve(found.layout, wanted) if wanted else {}
    times = next((p.chunks[p.variable.dims.index(before.time)] for p in before.plans.values()
                  if p.chunks is not None and before.time in p.variable.dims), TIMES)  # fmt: skip
    plans = _matched(before, make_plans(found, limits, times, values, model), found, first)
    layout = before.layout
    everything = before.members
    before.close()
    _clean(store)
    kept = _finished(store, plans, first, found.time)
    outcome = _run(store, plans, found, layout, everything, first, kept, False, grib_filter, runner, progress,
                   len(paths) - len(fresh) - len(members), resume=True)  # fmt: skip
    if fresh:
        more = encode_archive(fresh, store, wanted, bounds=bounds, times=times, values=values, append=append, command=command,
                              model=model, grib_filter=grib_filter, runner=runner, progress=progress)  # fmt: skip
        outcome.steps, outcome.done.coded = more.steps, outcome.done.coded + more.done.coded
        outcome.done.raw += more.done.raw
    return outcome


def _run(store: str, plans: list[Plan], found: Survey, layout: Layout, members: list[Member], first: int,
         kept: set[tuple[str, tuple[int, ...]]], create: bool, grib_filter: dict[str, Any], runner: Runner,
         progress: Progress | None, skipped: int, resume: bool = False) -> Outcome:  # fmt: skip
    """Write the store's description, then the chunks, then that it is complete."""
    import zarr

    record = _record(plans, layout, members, False, found.time) | {"pending": len(found.members)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr says that texts have no final specification
        if create:
            _make_store(store, plans, found, layout, record, grib_filter)
            group = zarr.open_group(_store(store), mode="r+", use_consolidated=False)
        else:
            group = zarr.open_group(_store(store), mode="r+", use_consolidated=False)
            if not resume:  # first that it is incomplete, then longer: a kill between the two leaves what can be finished
                group.attrs[KEY] = record
            for plan in plans:
                if found.time in plan.variable.dims:
                    group[plan.variable.name].resize(plan.variable.shape)
            _write_small(group, plans, found, first, grib_filter)
    tasks = list(_tasks(os.path.abspath(store), plans, found, first, grib_filter, kept))
    done = Done(of=len(tasks), raw_total=sum(math.prod(t.chunks) * np.dtype(t.coding.dtype).itemsize for t in tasks))
    for stats in runner(iter(tasks)):
        done.chunks, done.raw, done.coded = done.chunks + 1, done.raw + stats.raw, done.coded + stats.coded
        if progress:
            progress(done)
    _clean(store)  # a worker that was killed while it wrote a chunk left it half written, and another made the chunk
    group.attrs[KEY] = _record(plans, layout, members, True, found.time)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr says that this is no part of the specification yet; xarray wants it
        zarr.consolidate_metadata(group.store)
    steps = layout.dims.get(found.time, 1) if found.time else 1
    return Outcome(done, steps, len(kept), skipped, sorted(found.unpack))


def _make_store(store: str, plans: list[Plan], found: Survey, layout: Layout, record: dict[str, Any],
                grib_filter: dict[str, Any]) -> None:  # fmt: skip
    """An archive without chunks, which appears at once."""
    import zarr

    store = os.path.abspath(store)
    partial = tempfile.mkdtemp(prefix=f"{os.path.basename(store)}.", suffix=_PARTIAL, dir=os.path.dirname(store))
    try:
        group = zarr.create_group(_store(partial), zarr_format=3, attributes=_zarr_attributes(layout.attrs, "f4"))
        for plan in plans:
            _create(group, plan, plan.variable.name, layout.variables[plan.variable.name].attrs, found.time)
        for name in layout.variables.keys() - {p.variable.name for p in plans}:
            v = layout.variables[name]
            _create(group, Plan(v, Coding(v.dtype, ""), None), name, v.attrs, found.time)
            group[name][...] = 0
        _write_small(group, plans, found, 0, grib_filter)
        group.attrs[KEY] = record
        os.chmod(partial, 0o755)
        if os.path.isdir(store):  # an empty folder
            os.rmdir(store)
        os.rename(partial, store)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_small(group: Any, plans: list[Plan], found: Survey, first: int, grib_filter: dict[str, Any]) -> None:
    """Variables without chunks of ours: those along time of every file, the others once."""
    small = [p for p in plans if p.chunks is None]
    for number, member in enumerate(found.members):
        with open_grid(member.path, grib_filter) as source:
            for plan in small:
                name, variable = plan.variable.name, source.layout.variables.get(plan.variable.name)
                along = found.time in plan.variable.dims
                if variable is None or not (along or (number == 0 and first == 0)):
                    continue
                values = source.read(name)
                if name in found.unpack:
                    values = _real(values, variable)
                box = tuple(slice(member.first, member.first + member.steps) if d == found.time else slice(None)
                            for d in plan.variable.dims)  # fmt: skip
                group[name][box or ...] = values
