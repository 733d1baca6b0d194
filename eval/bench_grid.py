"""``codec bench grid``: our files of fields beside SZ3, SPERR, ZFP and bit rounding at the same largest error.

What is ours is the file that ``codec encode`` writes, decoded to netCDF and read back by plain xarray; peers code the float32
values that xarray makes of the original. Ratios are against float32 and against int16, both named.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from ..codecs.grid_bounds import parse_bounds, resolve
from ..codecs.grid_file import GridFile, decode_grid, encode_grid
from ..container.errors import CodecError, UsageError
from ..media.grid import atomic_netcdf, open_grid
from .peers import peer

PEERS = ("sz3-2d", "sz3", "sperr", "zfp", "bitround-zstd")


def measure(path: Path, bounds: str, peers: tuple[str, ...] = PEERS, repeats: int = 1,
            workers: int = 1) -> list[dict[str, Any]]:  # fmt: skip
    """Rows (file, variable, bound, codec, bytes, ratios, worst error over bound, MB/s) of the variables with a bound.

    ``workers``: threads of ours; peers have one.
    """
    import xarray

    rows = []
    with open_grid(path) as source, tempfile.TemporaryDirectory() as folder:
        limits = resolve(source.layout, parse_bounds(bounds))
        wanted = {n: value for n, (kind, value) in limits.items() if kind == "absolute"}
        coded, plain = os.path.join(folder, "x.nlc"), os.path.join(folder, "x.nc")
        times = []
        for _ in range(repeats + 1):  # the first call compiles
            start = time.perf_counter()
            with open(coded, "wb") as out:
                stats = encode_grid(source, {n: limits[n] for n in wanted}, out, folder, workers=workers)
            middle = time.perf_counter()
            with GridFile(coded) as grid:
                decode_grid(grid, None, workers=workers)
            times.append((middle - start, time.perf_counter() - middle))
        with GridFile(coded) as grid, atomic_netcdf(plain, grid.layout) as target:
            decode_grid(grid, target)
        encode_s, decode_s = np.min(times[1:], axis=0)
        raw = 4 * sum(s.values for s in stats.values())
        with xarray.open_dataset(path) as a, xarray.open_dataset(plain) as b:
            for name, bound in wanted.items():
                x = a[name].values
                shared = {"file": path.name, "variable": name, "bound": bound, "values": x.size}
                speed = {"encode_mb_s": raw / 1e6 / encode_s, "decode_mb_s": raw / 1e6 / decode_s}
                rows.append(shared | _row("grid:exact", stats[name].coded, x, b[name].values, bound) | speed)
                values = np.ascontiguousarray(x, np.float32).reshape(-1, *x.shape[-2:])
                for other in peers:
                    rows.append(shared | _peer(other, values, bound))
    return rows


def _row(codec: str, size: int, x: np.ndarray, y: np.ndarray, bound: float) -> dict[str, Any]:
    error = np.abs(x.astype(np.float64) - y.astype(np.float64))
    worst = float(np.nanmax(error)) if np.isfinite(error).any() else 0.0
    return {"codec": codec, "bytes": size, "ratio_float32": x.size * 4 / size, "ratio_int16": x.size * 2 / size,
            "max_error_over_bound": worst / bound}  # fmt: skip


def _peer(name: str, values: np.ndarray, bound: float) -> dict[str, Any]:
    try:
        codec = peer(name, "grid")
        fraction = bound / float(np.ptp(values.astype(np.float64)))
        codec.decode(codec.encode(values, fraction))
        start = time.perf_counter()
        data = codec.encode(values, fraction)
        middle = time.perf_counter()
        back = codec.decode(data)
        end = time.perf_counter()
    except (CodecError, ZeroDivisionError) as error:
        return {"codec": name, "error": str(error)}
    mb = values.size * 4 / 1e6
    speed = {"encode_mb_s": mb / (middle - start), "decode_mb_s": mb / (end - middle)}
    return _row(name, len(data), values, back, bound) | speed


def main(args: argparse.Namespace) -> int:
    """``codec bench grid``."""
    if args.cra5 and args.files:
        from .bench_cra5 import main as beside_cra5

        return beside_cra5(args)
    if not args.files or not args.max_error:
        raise UsageError("codec bench grid FILE... --max-error VAR=TOL,...: names files of fields and the bounds")
    rows, workers = [], args.threads or os.cpu_count() or 1
    for file in args.files:
        with open_grid(file) as source:
            known = [n for n in source.layout.variables if source.layout.is_data(n)]
        mine = ",".join(item for item in args.max_error.split(",") if item.partition("=")[0].strip() in known)
        if mine:
            rows += measure(Path(file), mine, repeats=min(args.repeats, 3), workers=workers)
    if args.json:
        print(json.dumps(rows))
        return 0
    print(f"{'file, variable, bound':<58}{'codec':<15}{'float32:1':>10}{'int16:1':>9}{'max/bound':>11}"
          f"{'enc MB/s':>10}{'dec MB/s':>10}")  # fmt: skip
    for r in rows:
        label = f"{r['file'][:40]}, {r['variable']} {r['bound']:g}"
        if "error" in r:
            print(f"{label:<58}{r['codec']:<15}{r['error']}")
            continue
        print(f"{label:<58}{r['codec']:<15}{r['ratio_float32']:>10.2f}{r['ratio_int16']:>9.2f}{r['max_error_over_bound']:>11.6f}"
              f"{r['encode_mb_s']:>10.1f}{r['decode_mb_s']:>10.1f}")  # fmt: skip
    print(f"MB/s with start-up of the process left out; ours with {workers} threads, peers with one")
    for name in PEERS:
        mine = {(r["file"], r["variable"], r["bound"]): r["bytes"] for r in rows if r["codec"] == "grid:exact"}
        gains = [r["bytes"] / mine[r["file"], r["variable"], r["bound"]] for r in rows if r["codec"] == name and "bytes" in r]
        if gains:
            print(f"{name}'s bytes over ours: geometric mean {np.exp(np.mean(np.log(gains))):.3f}, smallest {min(gains):.3f}")
    return 0
