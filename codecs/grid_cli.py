"""The ``codec`` command on fields: options, and what encode, decode, test and info do with them. Importing it is cheap."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..container.errors import CorruptStream, UnsupportedInput, UsageError
from ..container.format import Head

if TYPE_CHECKING:
    from ..media.grid import Layout
    from .grid_archive import Archive, Runner
    from .grid_file import Done, GridFile

SUFFIXES = {".nc", ".nc4", ".cdf", ".netcdf", ".grib", ".grib2", ".grb", ".grb2", ".grib1", ".grb1", ".zarr"}
NETCDF = (".nc", ".nc4", ".cdf", ".netcdf")
SHARE = 0.99
QUALITY = 50.0
MODEL = "vaeformer:light"
EXAMPLES = """fields (netCDF, GRIB, Zarr):
  codec encode x.nc                          lossless: every bit comes back
  codec encode x.nc --max-error t=0.05K,z=10,q=1%   no value is further off than that; the rest is lossless
  codec encode era5/*.nc -o era5.zarr --max-error t=0.5K   an archive that xarray opens; run it again to go on
"""


def add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec encode`` for fields."""
    title = "fields on a grid (netCDF, GRIB, Zarr); without any bound they are coded losslessly"
    add = parser.add_argument_group(title).add_argument
    add("--max-error", action="append", metavar="VAR=TOL,...",
        help="guaranteed largest error of each variable: a number in the variable's unit or with a unit (t=0.05K, msl=0.5hPa), "
             "a part of each value (q=1%%), or of the range of each chunk (r=0.1%%range); * stands for all others")  # fmt: skip
    add("--bits-of-real-information", nargs="?", type=float, const=SHARE, metavar="SHARE", dest="real_bits",
        help=f"round fields without a bound to the mantissa bits that hold this share of the information (default {SHARE})")
    add("--rmse", action="append", metavar="VAR=TOL,...",
        help="best effort: root mean square error of each variable; the largest error is recorded")
    add("--best-effort", nargs="?", type=float, const=QUALITY, metavar="Q",
        help=f"code fields without a bound by a network alone, quality 0..100 (default {QUALITY:g}): small, no promise; with a "
             "bound and -m vaeformer:PRESET the network is used where that is smaller")  # fmt: skip
    add("--lossless", action="store_true", help="every bit comes back (what happens without a bound, too)")
    add("--chunk-times", type=int, metavar="N", help="time steps that are coded together (default 4)")
    add("--grib-filter", action="append", metavar="KEY=VALUE", help="take only these messages, as in typeOfLevel=surface")
    add("--append", action="store_true", help="add later times to an archive that exists (-o STORE.zarr)")
    add("--scheduler", metavar="ADDRESS", help="make the archive on this Dask cluster (tcp://host:8786; default: threads)")


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec decode`` for fields."""
    add = parser.add_argument_group("fields on a grid").add_argument
    add("--keep-going", action="store_true", help="write what is whole; damaged chunks become fill values (exit code 3)")


def is_grid_name(name: str) -> bool:
    """Whether an input is a file of fields, by its suffix."""
    return Path(name.rstrip("/")).suffix.lower() in SUFFIXES


def is_grid(head: Head) -> bool:
    """Whether an ``.nlc`` file holds fields."""
    return head.header.get("kind") == "grid"


def wants_archive(args: argparse.Namespace) -> bool:
    """Whether ``codec encode`` is to make one Zarr store of all its inputs."""
    wanted = bool(args.output) and args.output.rstrip("/").lower().endswith(".zarr")
    if not wanted and (args.append or args.scheduler):
        raise UsageError("--append and --scheduler are for archives: name one with -o STORE.zarr")
    return wanted


# --- encode -----------------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """UsageError for options that contradict each other or have no meaning for fields."""
    if args.lossless and (args.max_error or args.rmse or args.real_bits is not None or args.best_effort is not None):
        raise UsageError("--lossless with a bound on the error: leave one of them out")
    if args.best_effort is not None and not 0 <= args.best_effort <= 100:
        raise UsageError(f"--best-effort {args.best_effort:g}: is a quality 0..100")
    if args.best_effort is not None and args.real_bits is not None:
        raise UsageError("--best-effort and --bits-of-real-information are both for fields without a bound; leave one out")
    if args.model and not args.model.startswith("vaeformer"):
        raise UsageError(f"-m {args.model}: does not code fields; vaeformer:light does")
    if args.real_bits is not None and not 0 < args.real_bits < 1:
        raise UsageError(f"--bits-of-real-information {args.real_bits:g}: is a share between 0 and 1, such as 0.99")
    if args.chunk_times is not None and args.chunk_times < 1:
        raise UsageError(f"--chunk-times {args.chunk_times}: is not a positive number")
    if args.bpp is not None or args.psnr is not None or args.size is not None:
        raise UsageError("--bpp, --psnr and --size are for pictures; the quality of fields is --max-error VAR=TOL")


def _bounds_of(args: argparse.Namespace) -> Callable[[Layout], dict[str, tuple[str, float]]]:
    """What gives the bounds of a file's variables. UsageError at once for what is wrong with any file."""
    from .grid_bounds import parse_bounds, resolve, resolve_rmse

    wanted = parse_bounds(",".join(args.max_error)) if args.max_error else {}
    squares = parse_bounds(",".join(args.rmse), "--rmse") if args.rmse else {}
    if both := wanted.keys() & squares.keys():
        raise UsageError(f"--max-error and --rmse are both given for {sorted(both)[0]}; leave one of them out")

    def bounds(layout: Layout) -> dict[str, tuple[str, float]]:
        found = resolve(layout, wanted)
        found |= {n: b for n, b in resolve_rmse(layout, squares).items() if n not in wanted}
        asked = wanted.keys() | squares.keys()
        free = [n for n in found if n not in asked and "*" not in asked]
        if args.real_bits is not None:
            found |= {n: ("bits", args.real_bits) for n in free}
        if args.best_effort is not None:
            found |= {n: ("quality", args.best_effort) for n in free}
        return found

    return bounds


def _grib_filter(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in args.grib_filter or []:
        key, sign, value = item.partition("=")
        if not sign:
            raise UsageError(f"--grib-filter {item}: is not KEY=VALUE")
        found[key] = int(value) if value.lstrip("-").isdigit() else value
    return found


def _command(args: argparse.Namespace) -> str:
    """The call for the history of the decoded file, without names of folders."""
    words = ["codec encode"]
    words += [f"--max-error {','.join(args.max_error)}"] if args.max_error else []
    words += [f"--rmse {','.join(args.rmse)}"] if args.rmse else []
    words += [f"--bits-of-real-information {args.real_bits:g}"] if args.real_bits is not None else []
    words += [f"--best-effort {args.best_effort:g}"] if args.best_effort is not None else []
    return " ".join(words)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    model = args.model or (MODEL if args.best_effort is not None else "")
    model = f"{model}:light" if model and ":" not in model else model
    return {"command": _command(args), "model": model} | ({"times": args.chunk_times} if args.chunk_times else {})


@contextlib.contextmanager
def meter(args: argparse.Namespace, title: str, lines: bool = False) -> Iterator[Callable[[Done], None] | None]:
    """A callback that shows speed, ratio so far and time left: a bar on a terminal, with ``lines`` one each half minute."""
    from ..cli import say

    start = time.monotonic()
    if args.quiet or not args.bars or not sys.stderr.isatty():
        last = [start]

        def line(done: Done) -> None:
            if time.monotonic() - last[0] > 30:
                last[0] = time.monotonic()
                say(f"codec: {title}: {done.chunks} of {done.of} chunks, {_pace(done, last[0] - start)}")

        yield line if lines and not args.quiet else None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} {task.fields[pace]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, pace="")
        yield lambda done: bar.update(task, completed=done.chunks, total=done.of, pace=_pace(done, time.monotonic() - start))


def _pace(done: Done, seconds: float) -> str:
    words = [f"{done.raw / 1e6 / max(seconds, 1e-3):.1f} MB/s"]
    if done.coded:
        words.append(f"{done.raw / done.coded:.1f} times smaller")
    if done.chunks:
        left = int(seconds * (done.of - done.chunks) / done.chunks)
        words.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    return ", ".join(words)


def _workers(args: argparse.Namespace) -> int:
    return args.threads or max(os.cpu_count() or 1, 1)


def encode_file(args: argparse.Namespace, name: str, target: str) -> None:
    """Code one file of fields as ``.nlc``."""
    from ..cli import opened, report, say
    from ..media.grid import open_grid
    from .grid_bounds import bound_text, tier
    from .grid_file import CHUNK_VALUES, GridFile, encode_grid, fitting, verify

    check(args)
    bounds = _bounds_of(args)
    start = time.perf_counter()
    folder = (os.path.dirname(target) or ".") if target != "-" else tempfile.gettempdir()
    with open_grid(name, _grib_filter(args)) as source:
        limits = bounds(source.layout)
        with contextlib.ExitStack() as stack:
            if args.verify:  # nothing is written under the target's name before it is checked
                out = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            else:
                out = stack.enter_context(opened(target, args.force))
            with meter(args, os.path.basename(name)) as progress:
                # a chunk is at most all of the largest variable
                largest = min(max((v.size for v in source.layout.variables.values()), default=1), CHUNK_VALUES)
                workers = args.threads or fitting(_workers(args), largest)
                stats = encode_grid(source, limits, out, folder, workers=workers, progress=progress, **_options(args))
            worst = {}
            if args.verify:
                out.flush()
                out.seek(0)
                worst = verify(source, GridFile(out))
                out.seek(0)
                with opened(target, args.force) as final:
                    shutil.copyfileobj(out, final, 1 << 20)
                out.seek(0, os.SEEK_END)
            size = out.tell() if target != "-" or args.verify else sum(s.coded for s in stats.values())
        layout = source.layout
    seconds = time.perf_counter() - start
    rows = {}
    for field in (n for n in layout.variables if layout.is_data(n)):
        kind, value = limits[field]
        v = layout.variables[field]
        rows[field] = {"bound": bound_text(kind, value, str(v.attrs.get("units", ""))), "tier": tier(kind), "values": v.size}
        if field in stats:
            rows[field] |= {"bytes": stats[field].coded, "ratio_float32": v.size * 4 / stats[field].coded,
                            "ratio_int16": v.size * 2 / stats[field].coded}  # fmt: skip
            rows[field] |= {"network": stats[field].neural}
            if limits[field][0] == "quality":
                _say_unknown(layout, field, name)
        if field in worst:
            rows[field]["max_error_over_bound"] = worst[field]
    values = sum(r["values"] for r in rows.values())
    row = {"input": name, "output": target, "bytes": size, "bits_per_value": size * 8 / max(values, 1),
           "ratio_float32": values * 4 / max(size, 1), "ratio_int16": values * 2 / max(size, 1), "variables": rows,
           "seconds": round(seconds, 3), "mb_per_second": round(values * 4 / 1e6 / max(seconds, 1e-6), 2)}  # fmt: skip
    text = f"{len(rows)} fields, {size:,} bytes, {row['ratio_float32']:.1f} times smaller than float32"
    text += f" ({row['ratio_int16']:.1f} than int16)"
    lossy = any(r["tier"] != "lossless" for r in rows.values())
    if not lossy and rows and not args.lossless and not args.quiet:
        say(f"codec: {name}: no bound was given, so every bit is kept; --max-error {next(iter(rows))}=TOL makes it smaller")
    for promise in sorted({r["tier"] for r in rows.values()} - {"lossless"}):
        text += f"; {promise}: " + ", ".join(f"{n} {r['bound']}" for n, r in rows.items() if r["tier"] == promise)
    text += "" if lossy else "; lossless"
    checked = ", verified" if args.verify else ""
    report(args, row, f"{name} -> {target}: {text}{checked}, {seconds:.2f} s, {row['mb_per_second']:.1f} MB/s")
    if args.rm:
        shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)


def _say_unknown(layout: Layout, field: str, name: str) -> None:
    """The network knows some variables by their statistics over decades; of others it takes those of the data."""
    from ..cli import say
    from .grid_neural import short_name

    if short_name(layout, field) == "other":
        say(f"codec: {name}: the network does not know {field}; its mean and spread are taken from the data")


def encode_archive(args: argparse.Namespace, names: list[str]) -> int:
    """Make one Zarr store of all inputs, or go on with it."""
    from ..cli import report, say
    from .grid_archive import cluster_runner, encode_archive, local_runner

    check(args)
    if args.rm:
        raise UsageError("--rm does not work with archives, which are made of many files over time")
    if strange := [n for n in names if not is_grid_name(n)]:
        raise UnsupportedInput(f"{strange[0]}: is not netCDF, GRIB or Zarr by its name; archives are made of those")
    runner: Runner = cluster_runner(args.scheduler) if args.scheduler else local_runner(args.threads)
    start = time.perf_counter()
    with meter(args, os.path.basename(args.output.rstrip("/")), lines=True) as progress:
        outcome = encode_archive([os.path.abspath(n) for n in names], args.output.rstrip("/"), bounds=_bounds_of(args),
                                 append=args.append, force=args.force, grib_filter=_grib_filter(args), runner=runner,
                                 progress=progress, **_options(args))  # fmt: skip
    seconds, done = time.perf_counter() - start, outcome.done
    for field in outcome.unpacked:
        say(f"codec: {args.output}: {field} is packed in a different way in each file; it is stored as float32")
    row = {"output": args.output, "inputs": len(names), "times": outcome.steps, "chunks": done.chunks, "raw_bytes": done.raw,
           "bytes": done.coded, "resumed_chunks": outcome.resumed, "skipped_inputs": outcome.skipped,
           "seconds": round(seconds, 3)}  # fmt: skip
    text = f"{outcome.steps} times; {done.chunks} chunks made"
    text += f", {outcome.resumed} were there already" if outcome.resumed else ""
    text += f", {outcome.skipped} files were in it already" if outcome.skipped else ""
    text += f", {_pace(done, seconds).rsplit(', ', 1)[0]}" if done.chunks else ""
    report(args, row, f"{args.output}: {text}, {seconds:.1f} s")
    return 0


# --- decode, test, info -----------------------------------------------------------------------------------------------


def opened_grid(name: str, limits: Any) -> GridFile | Archive:
    """An ``.nlc`` file or an archive. UnsupportedInput for other folders."""
    if os.path.isdir(name):
        from .grid_archive import Archive

        return Archive(name.rstrip("/"))
    from .grid_file import GridFile

    return GridFile(name, limits)


def decode_file(args: argparse.Namespace, name: str, target: str, limits: Any) -> None:
    """Decode a file of fields, or an archive, to netCDF."""
    from ..cli import opened, report, say
    from ..media.grid import atomic_netcdf
    from .grid_file import decode_grid

    if args.roi:
        raise UsageError("--roi is for pictures")
    named = args.output and target != "-"
    if args.format not in (None, "original") or (named and Path(target).suffix.lower() not in NETCDF):
        raise UsageError(f"{target}: fields are decoded to netCDF; give a name that ends in .nc")
    start = time.perf_counter()
    with opened_grid(name, limits) as grid, contextlib.ExitStack() as stack:
        path = target
        if target == "-":  # netCDF is written back and forth, which a pipe cannot
            path = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "out.nc")
        with atomic_netcdf(path, grid.layout, args.force) as out, meter(args, os.path.basename(name)) as progress:
            damaged = decode_grid(grid, out, keep_going=args.keep_going, workers=_workers(args), progress=progress)
        if target == "-":
            with open(path, "rb") as made, opened("-", True) as pipe:
                shutil.copyfileobj(made, pipe, 1 << 20)
        values = sum(p.variable.size for p in grid.plans.values() if p.chunks is not None)
        count = sum(p.count for p in grid.plans.values())
    seconds = time.perf_counter() - start
    for text in damaged:
        say(f"codec: {text}")
    row = {"input": name, "output": target, "values": values, "damaged": damaged, "seconds": round(seconds, 3)}
    speed = values * 4 / 1e6 / max(seconds, 1e-6)
    report(args, row, f"{name} -> {target}: {values:,} values, {seconds:.2f} s, {speed:.1f} MB/s")
    if damaged:
        raise CorruptStream(f"{name}: {len(damaged)} of {count} chunks are damaged and were replaced by fill values")
    if args.rm:
        shutil.rmtree(name) if os.path.isdir(name) else os.unlink(name)


def test_file(args: argparse.Namespace, name: str, limits: Any) -> None:
    """Decode every chunk without writing; all damaged ones are named."""
    from ..cli import report, say
    from .grid_file import decode_grid

    with opened_grid(name, limits) as grid:
        damaged = decode_grid(grid, None, keep_going=True, workers=_workers(args))
        count = sum(p.count for p in grid.plans.values())
        complete = grid.complete
    for text in damaged:
        say(f"codec: {text}")
    if damaged or not complete:
        text = f"{len(damaged)} of {count} chunks are damaged or missing"
        raise CorruptStream(f"{name}: {text}" + ("" if complete else "; it is not complete: encode again to finish it"))
    report(args, {"input": name, "ok": True, "chunks": count}, f"{name}: ok, {count} chunks")


def describe(head: Head) -> dict[str, Any]:
    """What the head of a file of fields says. It is not trusted: a stranger may have written it."""
    from ..container.format import DEFAULT_LIMITS
    from .grid_file import plans_of

    plans, entries = plans_of(head.header, head.entries, DEFAULT_LIMITS)
    units = {row["n"]: row.get("u", "") for row in head.header["vars"]}
    return {"dims": {d[0]: d[1] for d in head.header["dims"]}} | {
        "variables": [_row(p, str(units[p.variable.name]), sum(e.length + 4 for e in entries[p.variable.name])) for p in plans]
    }


def _row(plan: Any, unit: str, size: int) -> dict[str, Any]:
    from .grid_bounds import bound_text, tier

    v, c = plan.variable, plan.coding
    return {"name": v.name, "dims": list(v.dims), "shape": list(v.shape), "type": c.dtype, "tier": tier(c.kind),
            "bound": bound_text(c.kind, c.value, unit), "chunks": plan.count, "chunk_shape": list(plan.chunks or ()),
            "bytes": size}  # fmt: skip


def show(row: dict[str, Any]) -> list[str]:
    """Lines of ``codec info`` for people."""
    lines = ["  " + ", ".join(f"{d} {n}" for d, n in row["dims"].items())]
    for v in (v for v in row["variables"] if v["chunks"]):
        values = 1
        for n in v["shape"]:
            values *= n
        ratio = f", {values * 4 / v['bytes']:.1f} times smaller than float32" if v["bytes"] else ""
        bound = v["tier"] if v["tier"] == "lossless" else f"{v['tier']}: {v['bound']}"
        size = f"{v['chunks']} chunks, {v['bytes']:,} bytes{ratio}"
        lines.append(f"  {v['name']} ({', '.join(v['dims'])}) {v['type']}, {bound}; {size}")
    if small := [v["name"] for v in row["variables"] if not v["chunks"]]:
        lines.append(f"  lossless, in the index: {', '.join(small)}")
    return lines


def info_archive(args: argparse.Namespace, name: str) -> None:
    """``codec info`` of a Zarr store."""
    from ..cli import clean, write_line
    from .grid_archive import Archive, chunk_path

    with Archive(name.rstrip("/")) as archive:
        rows = []
        for plan in archive.plans.values():
            unit = str(plan.variable.attrs.get("units", ""))
            found = [chunk_path(archive.path, plan.variable.name, at) for at, _ in plan.boxes()] if plan.chunks else []
            rows.append(_row(plan, unit, sum(p.stat().st_size for p in found if p.exists())))
        row = {"input": name, "codec": "archive", "complete": archive.complete, "sources": len(archive.members),
               "dims": archive.layout.dims, "variables": rows}  # fmt: skip
    if args.json:
        write_line(json.dumps(row), sys.stdout)
        return
    state = "complete" if archive.complete else "not complete: run `codec encode` again"
    lines = [f"{name}: archive of {len(archive.members)} files, {state}", *show(row)]
    for line in lines:
        write_line(line[: len(line) - len(line.lstrip())] + clean(line), sys.stdout)
