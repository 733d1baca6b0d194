"""Data sets of fields for the tests: smooth waves on many kinds of grids, as netCDF files with all that these can hold."""

from __future__ import annotations

from pathlib import Path

import netCDF4
import numpy as np


def field(*shape: int, seed: int = 0, mean: float = 280.0) -> np.ndarray:
    """Waves with a little noise, float32, the last two axes rows and columns."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : shape[-2], 0 : shape[-1]]
    base = mean + 15 * np.cos(y / max(shape[-2] / 3, 1)) + 4 * np.sin(2 * np.pi * 3 * x / shape[-1] + y / 5)
    lead = np.arange(int(np.prod(shape[:-2], dtype=int))).reshape(*shape[:-2], 1, 1)
    return (base + 0.7 * np.sin(lead + x / 9) + rng.normal(0, 0.05, shape)).astype(np.float32)


def write(path: Path, times: int = 6, levels: int = 2, rows: int = 19, columns: int = 36, first: int = 0,
          calendar: str = "standard", west: float = 0.0, north_first: bool = True) -> Path:  # fmt: skip
    """A file with t (time, level, latitude, longitude) in K and u in m s**-1 packed as int16, and coordinates of every kind."""
    with netCDF4.Dataset(path, "w") as f:
        f.setncatts({"Conventions": "CF-1.8", "title": "waves", "history": "made by a test", "number": np.int16(3)})
        f.createDimension("time", None)
        for name, n in (("level", levels), ("latitude", rows), ("longitude", columns), ("nv", 2), ("name_length", 4)):
            f.createDimension(name, n)

        def make(name, dtype, dims, values, attrs=None, **options):
            v = f.createVariable(name, dtype, dims, **options)
            v.set_auto_maskandscale(False)
            v.setncatts(attrs or {})
            v[...] = values

        time = {"units": "hours since 2001-02-27 00:00", "calendar": calendar, "standard_name": "time", "bounds": "time_bnds"}
        hours = 6.0 * np.arange(first, first + times)
        make("time", "f8", ("time",), hours, time)
        make("time_bnds", "f8", ("time", "nv"), np.stack([hours, hours + 6], 1))
        make("level", "i4", ("level",), 100 * np.arange(levels, 0, -1), {"units": "hPa", "positive": "down", "axis": "Z"})
        latitude = np.linspace(90, -90, rows) if north_first else np.linspace(-90, 90, rows)
        make("latitude", "f4", ("latitude",), latitude, {"units": "degrees_north", "standard_name": "latitude"})
        longitude = west + np.arange(columns) * 360 / columns
        make("longitude", "f4", ("longitude",), longitude, {"units": "degrees_east", "standard_name": "longitude"})
        attrs = {"units": "K", "long_name": "Temperature", "valid_range": np.array([0, 400], "f4"),
                 "cell_methods": "time: mean", "coordinates": "station"}  # fmt: skip
        t = field(times, levels, rows, columns, seed=2 * first)
        dims = ("time", "level", "latitude", "longitude")
        make("t", "f4", dims, t, attrs, zlib=True, shuffle=True, complevel=4, chunksizes=(1, 1, rows, columns))
        packing = {"units": "m s**-1", "scale_factor": 0.01, "add_offset": 1.5, "missing_value": np.int16(-32767)}
        u = np.rint((field(times, levels, rows, columns, seed=2 * first + 1, mean=0.0) - 1.5) / 0.01).astype(np.int16)
        u[:, :, :2, :3] = -32767
        make("u", "i2", dims, u, packing, fill_value=np.int16(-32767))
        make("mask", "i1", ("latitude", "longitude"), (t[0, 0] > 280).astype("i1"), {"flag_meanings": "sea land"})
        make("code", "S1", ("level", "name_length"), np.array(list("abcdefgh" * levels)[: 4 * levels], "S1").reshape(levels, 4))
        make("station", str, ("level",), np.array([f"Tromsø {i}" for i in range(levels)], object))
        make("crs", "i4", (), 0, {"grid_mapping_name": "latitude_longitude", "semi_major_axis": 6371229.0})
    return path
