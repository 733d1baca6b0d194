"""Files of fields: what is exact comes back exactly, bounds hold in the file as plain xarray reads it, damage is named."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray
from damage import mutations
from grids import field, write
from neuralcodec.cli import main
from neuralcodec.codecs import bitinformation, grid_neural
from neuralcodec.codecs.grid_bounds import parse_bounds, resolve
from neuralcodec.codecs.grid_chunk import Coding, decode_chunk, encode_chunk
from neuralcodec.codecs.grid_file import GridFile, chunk_shape, decode_grid, encode_grid, fitting, verify
from neuralcodec.codecs.grid_neural import About
from neuralcodec.container.errors import CodecError, CorruptStream, ModelMismatch, UnsupportedInput, UsageError
from neuralcodec.container.format import loads
from neuralcodec.media.grid import atomic_netcdf, open_grid
from neuralcodec.media.units import factor

BOUNDS = "t=0.05K,u=0.1m/s"


def encoded(path: Path, bounds: str = "", **options) -> bytes:
    out = io.BytesIO()
    with open_grid(path) as source:
        limits = resolve(source.layout, parse_bounds(bounds)) if bounds else {}
        encode_grid(source, limits, out, str(path.parent), **options)
        verify(source, GridFile(io.BytesIO(out.getvalue())))
    return out.getvalue()


def decoded(data: bytes, target: Path) -> Path:
    with GridFile(io.BytesIO(data)) as grid, atomic_netcdf(target, grid.layout, overwrite=True) as out:
        assert decode_grid(grid, out) == []
    return target


def same_file(a: Path, b: Path) -> None:
    """Two netCDF files hold the same: dimensions, attributes with their types, storage, and every bit of every value."""
    with netCDF4.Dataset(a) as x, netCDF4.Dataset(b) as y:
        assert same_attributes(x, y)
        assert [(n, len(d), d.isunlimited()) for n, d in x.dimensions.items()] == [
            (n, len(d), d.isunlimited()) for n, d in y.dimensions.items()
        ]
        assert list(x.variables) == list(y.variables)
        for name in x.variables:
            p, q = x[name], y[name]
            for v in (p, q):
                v.set_auto_maskandscale(False)
                v.set_auto_chartostring(False)
            assert p.dtype == q.dtype and p.dimensions == q.dimensions, name
            assert same_attributes(p, q), name
            left, right = np.asarray(p[...]), np.asarray(q[...])
            assert left.tolist() == right.tolist() if p.dtype is str else left.tobytes() == right.tobytes(), name
            if p.dtype is not str and p.ndim:
                assert p.filters() == q.filters() and p.chunking() == q.chunking(), name


def same_attributes(a, b) -> bool:
    one, two = ({n: v.getncattr(n) for n in v.ncattrs()} for v in (a, b))
    return list(one) == list(two) and all(
        np.asarray(one[n]).dtype == np.asarray(two[n]).dtype and np.array_equal(one[n], two[n]) for n in one
    )


# --- what must come back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"calendar": "360_day"}, {"calendar": "noleap", "west": -180.0}, {"north_first": False}, {"rows": 2, "columns": 2},
    {"times": 1, "levels": 1}, {"times": 9, "rows": 5, "columns": 71},
])  # fmt: skip
def test_lossless_files_come_back_bit_for_bit(tmp_path, options):
    source = write(tmp_path / "x.nc", **options)
    same_file(source, decoded(encoded(source), tmp_path / "y.nc"))


@pytest.mark.parametrize("options", [
    {"calendar": "360_day", "west": -180.0}, {"north_first": False}, {"rows": 2, "columns": 2},
])  # fmt: skip
def test_bounds_hold_and_everything_else_is_exact(tmp_path, options):
    source = write(tmp_path / "x.nc", **options)
    target = decoded(encoded(source, BOUNDS), tmp_path / "y.nc")
    with xarray.open_dataset(source) as a, xarray.open_dataset(target) as b:
        for name, bound in (("t", 0.05), ("u", 0.1)):
            x, y = (d[name].values.astype(np.float64) for d in (a, b))
            assert np.array_equal(np.isnan(x), np.isnan(y)) and a[name].dtype == b[name].dtype
            x, y = (v[np.isfinite(v)] for v in (x, y))
            assert (np.abs(x - y) <= bound).all()
            assert not y.size or (y.min() >= x.min() and y.max() <= x.max())  # nothing beyond the extremes
            assert f"guaranteed: maximum absolute error {bound:g}" in b[name].attrs["lossy_compression"]
            assert b[name].attrs["lossy_compression_maximum_absolute_error"] == bound
            assert b[name].encoding["dtype"] == a[name].encoding["dtype"]
        assert b["u"].encoding["scale_factor"] == 0.01 and b["u"].encoding["add_offset"] == 1.5
        assert b["u"].encoding["_FillValue"] == -32767 and b.encoding["unlimited_dims"] == {"time"}
        for name in set(a.variables) - {"t", "u"}:
            assert a[name].variable.identical(b[name].variable), name
        assert b.attrs["history"].endswith("\nmade by a test") and "lossy: t, u" in b.attrs["history"]
        assert {k: v for k, v in b.attrs.items() if k != "history"} == {k: v for k, v in a.attrs.items() if k != "history"}


def test_second_round_is_recorded_beside_the_first(tmp_path):
    source = write(tmp_path / "x.nc")
    once = decoded(encoded(source, "t=0.01"), tmp_path / "y.nc")
    twice = decoded(encoded(once, "t=0.1"), tmp_path / "z.nc")
    with xarray.open_dataset(twice) as data:
        assert data.t.attrs["lossy_compression"].count("maximum absolute error") == 2
        assert data.attrs["history"].count("neuralcodec") == 2


def nc(path: Path, values: np.ndarray, dims: tuple[str, ...], coords: dict | None = None, attrs: dict | None = None,
       fill=None) -> Path:  # fmt: skip
    with netCDF4.Dataset(path, "w") as f:
        for d, n in zip(dims, values.shape):
            f.createDimension(d, n)
        for name, (cdims, cvalues, cattrs) in (coords or {}).items():
            v = f.createVariable(name, cvalues.dtype, cdims)
            v.setncatts(cattrs)
            v[...] = cvalues
        v = f.createVariable("f", values.dtype, dims, fill_value=fill)
        v.set_auto_maskandscale(False)
        v.setncatts(attrs or {"units": "K"})
        v[...] = values
    return path


def curvilinear() -> dict:
    y, x = np.mgrid[0:24, 0:40].astype(np.float64)
    return {"lat": (("y", "x"), 40 + y / 4 + x / 50, {"units": "degrees_north"}),
            "lon": (("y", "x"), 5 + x / 4 - y / 50, {"units": "degrees_east"})}  # fmt: skip


CASES = {
    "no coordinates": (field(3, 20, 40), ("a", "b", "c"), {}),
    "curvilinear": (field(3, 24, 40), ("time", "y", "x"), curvilinear()),
    "irregular": (field(5, 20, 40), ("time", "lat", "lon"), {
        "lat": (("lat",), np.sort(np.random.default_rng(0).uniform(-80, 80, 20)), {"units": "degrees_north"})}),
    "cells without rows": (field(1, 6, 900).reshape(6, 900), ("time", "cell"), {}),
    "columns first": (np.ascontiguousarray(field(4, 20, 40).transpose(2, 0, 1)), ("lon", "time", "lat"), {}),
    "a profile": (field(1, 1, 2000).ravel(), ("level",), {}),
    "no values": (np.zeros((0, 5, 5), "f4"), ("time", "y", "x"), {}),
    "doubles": (field(2, 20, 40).astype("f8") + 1e-9, ("time", "y", "x"), {}),
    "a huge offset": (field(2, 20, 40) + np.float32(1e6), ("time", "y", "x"), {}),
    "tiny": (field(1, 2, 2)[0], ("y", "x"), {}),
    "one value": (field(1, 1, 1)[0], ("y", "x"), {}),
    "constant": (np.full((2, 30, 30), 273.15, "f4"), ("time", "y", "x"), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bounds", ["", "f=0.05", "f=0.01%", "f=0.1%range"])
def test_any_grid(tmp_path, case, bounds):
    values, dims, coords = CASES[case]
    source = nc(tmp_path / "x.nc", values, dims, coords)
    target = decoded(encoded(source, bounds), tmp_path / "y.nc")
    if not bounds:
        return same_file(source, target)
    with netCDF4.Dataset(target) as back:
        y = np.asarray(back["f"][...])
        for name, (_, cvalues, _) in coords.items():
            assert np.asarray(back[name][...]).tobytes() == cvalues.tobytes()
    x = values.astype(np.float64)
    bound = {"f=0.05": 0.05, "f=0.01%": 1e-4 * np.abs(x), "f=0.1%range": 1e-3 * (np.ptp(x) if x.size else 0)}[bounds]
    assert y.dtype == values.dtype and (np.abs(x - y) <= bound).all()


def special(dtype: str) -> np.ndarray:
    """NaN of two kinds, infinities, zeros of both signs, denormal numbers, and a number that files use for 'missing'."""
    x = field(2, 30, 40).astype(dtype)
    x[0, 3:9, 5:20] = 1e20
    x[0, :2, :7], x[1, 12, :] = np.nan, np.inf
    x[1, 13, 3], x[1, 20, 5], x[1, 20, 6], x[1, 20, 7] = -np.inf, 0.0, -0.0, 1e-40
    unsigned = np.dtype(f"u{x.itemsize}").type
    x[1, 25, :4].view(unsigned)[:] |= np.array(np.nan, x.dtype).view(unsigned) | unsigned(5)
    return x


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("fill", [None, 1e20, np.nan])
@pytest.mark.parametrize("bounds", ["", "f=0.5", "f=1%"])
def test_special_values(tmp_path, dtype, fill, bounds):
    x = special(dtype)
    source = nc(tmp_path / "x.nc", x, ("time", "y", "x"), fill=fill)
    target = decoded(encoded(source, bounds), tmp_path / "y.nc")
    with netCDF4.Dataset(target) as back:
        back["f"].set_auto_maskandscale(False)
        y = back["f"][...]
    strange = ~np.isfinite(x) | (x == np.dtype(dtype).type(1e20)) if fill == 1e20 else ~np.isfinite(x)
    if not bounds:
        assert x.tobytes() == y.tobytes()
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    assert same[strange].all() and np.isfinite(y[~strange]).all()
    assert (np.abs(x[~strange].astype("f8") - y[~strange]) <= (0.5 if bounds == "f=0.5" else 0.01 * np.abs(x[~strange]))).all()
    if fill == 1e20:
        assert np.array_equal(x == x.dtype.type(fill), y == y.dtype.type(fill))


def test_all_missing(tmp_path):
    source = nc(tmp_path / "x.nc", np.full((3, 30, 30), np.nan, "f4"), ("time", "y", "x"))
    same_values = decoded(encoded(source, "f=0.5"), tmp_path / "y.nc")
    with netCDF4.Dataset(same_values) as back:
        assert np.isnan(np.asarray(back["f"][...])).all()


def test_a_bound_never_makes_values_missing(tmp_path):
    x = np.rint(field(2, 30, 40, mean=0.0) * 2).astype("f4") / 4  # many values a hair away from the fill value 0.0
    x[0, 0, 0] = 0.0
    source = nc(tmp_path / "x.nc", x, ("time", "y", "x"), fill=np.float32(0))
    with xarray.open_dataset(decoded(encoded(source, "f=0.6"), tmp_path / "y.nc")) as back:
        assert np.array_equal(np.isnan(back.f.values), x == 0)


@pytest.mark.parametrize("dtype", ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"])
def test_integers_of_every_size(tmp_path, dtype):
    rng = np.random.default_rng(3)
    info = np.iinfo(dtype)
    smooth = np.clip(field(2, 25, 40) - 250, info.min, info.max).astype(dtype)
    wild = rng.integers(info.min, info.max, (2, 25, 40), dtype=dtype, endpoint=True)
    for n, values in enumerate((smooth, wild)):
        source = nc(tmp_path / f"x{n}.nc", values, ("time", "y", "x"))
        same_file(source, decoded(encoded(source), tmp_path / "y.nc"))


@pytest.mark.parametrize("k", [0.4, 1.0, 7.0, 300.0])
def test_packed_integers_of_the_whole_range(k):
    """int16 with a fill value at its end: nothing wraps around, nothing becomes missing, the bound is a number of steps."""
    scale = 0.031
    x = np.linspace(-32767, 32767, 5000).astype("i2").reshape(1, 50, 100)
    x[0, 0, :9] = -32768
    coding = Coding("i2", "TYX", "absolute", k * scale, scale=scale, offset=12.0, fills=(np.int16(-32768).tobytes(),))
    payload, _ = encode_chunk(x, coding)
    y = decode_chunk(payload, x.shape, coding)
    assert np.array_equal(x == -32768, y == -32768)
    assert np.abs(x.astype(int) - y).max() <= int(k)


@pytest.mark.parametrize("values", [
    np.linspace(90, -90, 721).astype("f4"), np.arange(1440) * 0.25 - 180, np.arange(0, 8784, 6, dtype="i8"),
    np.arange(255, 0, -5, dtype="u1"), np.array([5, 4, 3, 2, 1, 0], "i4"),
])  # fmt: skip
def test_even_coordinates_take_no_room(values):
    for exact in (values, np.where(np.arange(len(values)) == 3, values[2], values)):
        payload, _ = encode_chunk(exact, Coding(exact.dtype.str[1:], "X"))
        assert decode_chunk(payload, exact.shape, Coding(exact.dtype.str[1:], "X")).tobytes() == exact.tobytes()
        assert len(payload) < 24 or exact is not values


def test_memory_is_bounded_by_chunks():
    assert chunk_shape((1000, 37, 721, 1440), "TLYX") == (1, 8, 721, 1440)
    assert chunk_shape((1000, 721, 1440), "TYX") == (4, 721, 1440)
    assert chunk_shape((20000, 40000), "YX") == (209, 40000)
    assert fitting(8, 37 * 721 * 1440) == 1 and fitting(8, 4 * 721 * 1440) == 8 and fitting(8, 1 << 23) == 4
    assert chunk_shape((2, 3), "YX") == (2, 3) and chunk_shape((0, 5, 5), "TYX") == (1, 5, 5)


# --- reading parts ----------------------------------------------------------------------------------------------------


class Counted(io.FileIO):
    """A file that counts what is read of it."""

    taken = 0

    def readinto(self, buffer) -> int:
        n = super().readinto(buffer)
        Counted.taken += n
        return n

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        Counted.taken += len(data)
        return data


def test_one_time_of_one_variable_touches_a_small_part(tmp_path):
    source = write(tmp_path / "x.nc", times=100, levels=1, rows=25, columns=48)
    (tmp_path / "x.nlc").write_bytes(encoded(source, "t=0.0005K"))
    Counted.taken = 0
    with GridFile(Counted(tmp_path / "x.nlc")) as grid:
        values = grid.read("t", (slice(50, 51), slice(None), slice(None), slice(None)))
    assert 0 < Counted.taken < 0.05 * os.path.getsize(tmp_path / "x.nlc")
    with open_grid(source) as a:
        assert np.abs(a.read("t")[50] - values[0]).max() <= 0.0005


def test_xarray_opens_it_lazily_and_selects_anything(tmp_path):
    source = write(tmp_path / "x.nc", times=11)
    (tmp_path / "x.nlc").write_bytes(encoded(source, BOUNDS))
    with xarray.open_dataset(tmp_path / "x.nlc") as whole:  # the engine is found by content
        reference = whole.load()
    rng = np.random.default_rng(5)
    with xarray.open_dataset(tmp_path / "x.nlc", engine="neuralcodec", chunks={}) as lazy:
        assert lazy.t.chunks[0] == (4, 4, 3) and lazy.identical(reference)
        means = (d.isel(time=slice(3, 9, 2)).t.mean("time").values for d in (lazy, reference))
        assert np.allclose(*means, rtol=1e-6)
    with xarray.open_dataset(tmp_path / "x.nlc", engine="neuralcodec") as lazy:
        for _ in range(20):
            pick = {}
            for d, n in lazy.sizes.items():
                choice = rng.integers(4)
                a, b = np.sort(rng.integers(0, n, 2)) + [0, 1]
                step = int(rng.integers(1, 4))
                pick[d] = (slice(a, b, step), slice(None, None, -step), int(a), rng.integers(0, n, 3))[choice]
            assert lazy.isel(pick).load().identical(reference.isel(pick))
    target = decoded((tmp_path / "x.nlc").read_bytes(), tmp_path / "y.nc")
    with xarray.open_dataset(target) as plain:
        assert plain.identical(reference)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> str:
    return "vaeformer:test"


def test_best_effort_is_labelled_and_says_its_error(tmp_path, network, capsys):
    source = write(tmp_path / "x.nc", times=2, levels=2)
    assert main(["encode", str(source), "--best-effort", "30", "-m", network, "--verify", "--max-error", "u=0.1m/s"]) == 0
    assert "best effort: t quality 30" in (err := capsys.readouterr().err) and "guaranteed: u 0.1 m s**-1" in err
    assert main(["info", str(tmp_path / "x.nlc")]) == 0
    assert "vaeformer:test" in (out := capsys.readouterr().out) and "best effort: quality 30" in out
    assert main(["decode", str(tmp_path / "x.nlc"), "-o", str(tmp_path / "y.nc")]) == 0
    with xarray.open_dataset(source) as x, xarray.open_dataset(tmp_path / "y.nc") as y:
        said = y.t.attrs["lossy_compression_maximum_absolute_error"]
        assert "best effort: quality 30 of vaeformer:test; largest error" in y.t.attrs["lossy_compression"]
        assert 0 < float(np.abs(x.t - y.t).max()) <= said
        assert float(np.abs(x.u - y.u).max()) <= 0.1 and np.array_equal(np.isnan(x.u), np.isnan(y.u))
        assert float(y.t.min()) >= float(x.t.min()) and float(y.t.max()) <= float(x.t.max())
    with xarray.open_dataset(tmp_path / "x.nlc") as lazy, xarray.open_dataset(tmp_path / "y.nc") as y:
        assert lazy.t.equals(y.t)


def test_a_network_under_a_bound(network):
    """The network is used where that is smaller, and always at a quality."""
    what = About("t", (500,), np.linspace(90, -90, 24))
    x = field(1, 24, 48)[None]
    _, base = grid_neural.encode_base(x, what, network, 500)
    coding = Coding("f4", "TLYX", "absolute", 0.5, model=network)
    for values, neural in ((x, False), (base.astype("f4") + np.float32(1e-3), None)):
        payload, stats = encode_chunk(values, coding, what=what)
        assert np.abs(decode_chunk(payload, values.shape, coding).astype("f8") - values).max() <= 0.5
        assert stats.neural is False if neural is False else payload[1] in (3, 5)
    best = Coding("i2", "TLYX", "quality", 50.0, scale=0.02, offset=250.0, fills=(np.int16(-1).tobytes(),), model=network)
    packed = np.rint((x - 250) / 0.02).astype("i2")
    packed[0, 0, :5, :5] = -1
    payload, stats = encode_chunk(packed, best, what=what)
    back = decode_chunk(payload, packed.shape, best)
    assert stats.neural and payload[1] == 5 and np.array_equal(back == -1, packed == -1)
    assert np.abs((back.astype(float) - packed) * 0.02).max() <= stats.worst + 0.01
    for n in (4, 8, len(payload) // 2):
        with pytest.raises(CorruptStream):
            decode_chunk(payload[:n], packed.shape, best)
    with pytest.raises(CorruptStream, match="needs a network"):
        decode_chunk(payload, packed.shape, Coding("i2", "TLYX", "absolute", 0.5))


def test_files_that_need_other_weights_say_so(tmp_path, network, monkeypatch):
    source = write(tmp_path / "x.nc", times=1, levels=1)
    assert main(["encode", str(source), "--best-effort", "-m", network]) == 0
    with GridFile(tmp_path / "x.nlc") as grid:
        grid.head = replace(grid.head, model_id=b"12345678")
        with pytest.raises(ModelMismatch, match="3132333435363738"):
            grid.read("t")
    assert main(["encode", str(source), "-f", "--best-effort", "-m", "hyperprior:light"]) == 2


def test_what_a_network_is_told(tmp_path):
    with open_grid(write(tmp_path / "x.nc", times=2, levels=3)) as source:
        box = (slice(0, 2), slice(1, 3), slice(4, 19), slice(0, 36))
        what = grid_neural.about(source, "t", "TLYX", box)
        assert what.name == "t" and what.pressures == (200, 100)
        assert np.allclose(what.latitude, np.linspace(90, -90, 19)[4:])


# --- what a user may ask for ------------------------------------------------------------------------------------------


def test_units_of_bounds():
    for given, stored, times in (("hPa", "Pa", 100), ("m/s", "m s**-1", 1), ("J/kg", "m**2 s**-2", 1), ("mm", "m", 1e-3),
                                 ("degC", "K", 1), ("g/kg", "kg kg-1", 1e-3), ("day-1", "s-1", 1 / 86400),
                                 ("ft", "ft", 1)):  # fmt: skip
        assert factor(given, stored) == pytest.approx(times)
    for given, stored in (("K", "Pa"), ("m", "m s-1"), ("ft", "m"), ("K", ""), ("m s-", "m s-1")):
        assert factor(given, stored) is None


def test_bounds(tmp_path):
    with open_grid(write(tmp_path / "x.nc")) as source:
        layout = source.layout
        found = resolve(layout, parse_bounds("t=0.02degC, u=10cm/s"))
        assert found == {"t": ("absolute", 0.02), "u": ("absolute", pytest.approx(0.1))}
        assert resolve(layout, parse_bounds("u=0,*=1%")) == {"t": ("relative", 0.01), "u": ("lossless", 0.0)}
        assert resolve(layout, parse_bounds("t=0.003rel"))["t"] == ("relative", 0.003)
        for text, message in (("q=1", "no variable q; fields here are t, u"), ("t=1Pa", "t is in K"),
                              ("time=1", "kept exactly"), ("mask=1", "kept exactly")):  # fmt: skip
            with pytest.raises(UsageError, match=message):
                resolve(layout, parse_bounds(text))
    for text, message in (("t=-1", "not negative"), ("t", "VARIABLE=NUMBER"), ("t=x", "VARIABLE=NUMBER"), ("t=inf", "finite"),
                          ("t=1,t=2", "twice"), ("t=100%", "keeps nothing"), ("", "no bounds")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            parse_bounds(text)


def test_per_cent_of_a_variable_in_per_cent_is_asked_back(tmp_path):
    source = nc(tmp_path / "x.nc", field(1, 20, 20), ("time", "y", "x"), attrs={"units": "%"})
    with open_grid(source) as a:
        with pytest.raises(UsageError, match="f=1%rel"):
            resolve(a.layout, parse_bounds("f=1%"))
        assert resolve(a.layout, parse_bounds("f=1%rel"))["f"] == ("relative", 0.01)


def test_real_information_finds_what_was_put_in():
    rng = np.random.default_rng(0)
    smooth = field(1, 1, 200, 300)[0, 0].astype(np.float64) + 1000
    for digits in (6, 10, 14):  # mantissa bits that are signal; below them is noise
        step = 512 * 2.0**-digits
        noisy = (np.rint(smooth / step) * step + rng.uniform(-step / 2, step / 2, smooth.shape)).astype(np.float32)
        kept = bitinformation.keep_bits(noisy[None, None], 0.9999)[0]
        assert digits - 3 <= kept <= digits + 2
    packed = (np.rint(smooth / 0.37) * 0.37).astype(np.float32)  # low bits repeat the packing and are no information
    assert bitinformation.keep_bits(packed[None, None], 0.99)[0] < 15
    noise = rng.normal(size=(1, 1, 100, 100)).astype(np.float32)
    assert bitinformation.keep_bits(noise, 0.99) == [23] == bitinformation.keep_bits(noise[:, :, :2, :2], 0.99)


def test_rounding_is_to_nearest_and_stays_finite():
    values = np.array([1.0, 1.49, 1.5, 1.75, -1.3, 0.0, np.inf, -np.inf, np.nan, np.finfo("f4").max], "f4").reshape(1, 1, 1, -1)
    back = bitinformation.rounded(values, [1]).ravel()
    assert back[:6].tolist() == [1.0, 1.5, 1.5, 2.0, -1.5, 0.0] and np.isposinf(back[6]) and np.isnan(back[8])
    assert np.isfinite(back[9])
    x = field(1, 3, 40, 40)
    for keep in (3, 11, 23):
        assert (np.abs(bitinformation.rounded(x, [keep] * 3) - x) <= 2.0 ** -(keep + 1) * np.abs(x)).all()


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_damaged_chunk_is_named_and_the_others_are_read(tmp_path):
    source = write(tmp_path / "x.nc", times=12)
    data = bytearray(encoded(source, BOUNDS))
    clean = decoded(bytes(data), tmp_path / "clean.nc")
    with GridFile(io.BytesIO(bytes(data))) as grid:
        hit = grid._entries["t"][1]
    data[hit.offset + hit.length // 2] ^= 8
    broken = tmp_path / "x.nlc"
    broken.write_bytes(data)
    with GridFile(broken) as grid:
        where = r"t, time 4\.\.7 \(2001-02-28 00:00:00 \.\. 2001-02-28 18:00:00\), level 0\.\.1: "
        with pytest.raises(CorruptStream, match=where):
            grid.read("t", (slice(5, 6), *[slice(None)] * 3))
        assert np.isfinite(grid.read("t", (slice(0, 4), *[slice(None)] * 3))).all()
    target = tmp_path / "y.nc"
    assert main(["decode", str(broken), "-o", str(target)]) == 3 and not target.exists()
    assert main(["test", str(broken)]) == 3
    assert main(["decode", str(broken), "-o", str(target), "--keep-going"]) == 3
    with xarray.open_dataset(target) as y, xarray.open_dataset(clean) as x:
        assert np.isnan(y.t[4:8]).all()
        assert y.drop_isel(time=[4, 5, 6, 7]).identical(x.drop_isel(time=[4, 5, 6, 7])) and y.u.identical(x.u)


def test_damage_is_an_error_or_harmless_never_other_data(tmp_path):
    source = write(tmp_path / "x.nc", times=2, rows=13, columns=24)
    data, other = encoded(source, BOUNDS), encoded(write(tmp_path / "z.nc", times=2, levels=1))
    with GridFile(io.BytesIO(data)) as grid:
        whole = {n: grid.read(n) for n in grid.plans}
    for what, copy in mutations(data, other, 250, seed=7):
        try:
            with GridFile(io.BytesIO(copy)) as grid:
                back = {n: grid.read(n) for n in grid.plans}
        except CodecError:
            continue
        assert back.keys() == whole.keys(), what
        for n, values in back.items():
            assert np.array_equal(values, whole[n], equal_nan=values.dtype.kind == "f"), what


def test_payloads_that_lie_are_refused(tmp_path):
    """Chunks with a right checksum but a wrong content: what a stranger may write."""
    coding = Coding("f4", "TYX", "absolute", 0.1)
    payload, _ = encode_chunk(field(2, 30, 40), coding)
    for shape, other in (((2, 30, 41), coding), ((2, 30, 40), Coding("f8", "TYX")), ((1200, 1, 2), coding)):
        with pytest.raises(CorruptStream):
            decode_chunk(payload, shape, other)
    for text in (b"", b"\x80", b"\x81\x03", b"\x83\x03\x80\x80", b"\x81\x01abc", b"\x82\x00\x41a", b"\x81\x18\x63"):
        with pytest.raises(CorruptStream):
            decode_chunk(text, (2, 30, 40), coding)
    integers, _ = encode_chunk(np.arange(4000, dtype="i4").reshape(1, 50, 80), Coding("i4", "TYX"))
    with pytest.raises(CorruptStream):
        decode_chunk(integers, (1, 50, 80), Coding("i1", "TYX"))


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.nc")
    assert main(["encode", "x.nc", "--max-error", BOUNDS, "--verify", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    size = os.path.getsize("x.nlc")
    values = row["variables"]["t"]["values"] + row["variables"]["u"]["values"]
    assert row["bytes"] == size and row["ratio_float32"] == pytest.approx(values * 4 / size)
    assert row["ratio_int16"] == pytest.approx(values * 2 / size)
    assert row["variables"]["t"]["tier"] == "guaranteed" and row["variables"]["t"]["bound"] == "0.05 K"
    assert 0.5 < row["variables"]["t"]["max_error_over_bound"] <= 1
    assert main(["test", "x.nlc"]) == 0 and main(["decode", "x.nlc", "-O", "back"]) == 0
    capsys.readouterr()
    assert main(["info", "x.nlc"]) == 0
    text = capsys.readouterr().out
    assert "t (time, level, latitude, longitude) f4, guaranteed: 0.05 K; 2 chunks" in text and "time 6, level 2" in text
    assert main(["info", "x.nlc", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dims"]["time"] == 6
    loads(Path("x.nlc").read_bytes())
    assert main(["encode", "x.nc", "-o", "same.nlc"]) == 0
    assert "no bound was given" in capsys.readouterr().err
    assert main(["encode", "x.nc", "--bits-of-real-information", "--verify", "-o", "bits.nlc"]) == 0
    assert main(["decode", "bits.nlc"]) == 0
    with xarray.open_dataset("bits.nc") as data, xarray.open_dataset("x.nc") as original:
        nsb = data.t.attrs["quantization_nsb"]
        assert data[data.t.attrs["quantization"]].attrs["algorithm"] == "bitround" and 5 < nsb < 20
        assert (np.abs(data.t - original.t) <= 2.0 ** -(int(nsb) + 1) * np.abs(original.t)).all()
        assert "quantization" not in data.u.attrs and np.array_equal(np.isnan(data.u), np.isnan(original.u))


def test_rmse(tmp_path, capsys):
    source = write(tmp_path / "x.nc", times=2, rows=37, columns=72)
    assert main(["encode", str(source), "--rmse", "t=0.1K,u=0.1", "--verify", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["variables"]
    assert main(["encode", str(source), "--max-error", "t=0.1732K,u=0.1732", "--json", "-o", str(tmp_path / "z.nlc")]) == 0
    bounded = json.loads(capsys.readouterr().out)["variables"]
    assert main(["decode", str(tmp_path / "x.nlc"), "-o", str(tmp_path / "y.nc")]) == 0
    with xarray.open_dataset(source) as x, xarray.open_dataset(tmp_path / "y.nc") as y:
        for name in "tu":
            error = (x[name] - y[name]).values.astype("f8")
            assert 0.09 <= np.sqrt(np.nanmean(error**2)) <= 0.1 and rows[name]["tier"] == "best effort"
            assert np.nanmax(np.abs(error)) <= y[name].attrs["lossy_compression_maximum_absolute_error"]
            assert "best effort: RMSE 0.1" in y[name].attrs["lossy_compression"]
            # no larger than what an even spread within a bound would give for the same error
            assert rows[name]["bytes"] <= bounded[name]["bytes"]
            assert np.array_equal(np.isnan(x[name]), np.isnan(y[name]))


@pytest.mark.parametrize("arguments, code, message", [
    (["--max-error", "t=-1"], 2, "not negative"), (["--max-error", "q=1"], 2, "no variable q"),
    (["--max-error", "t=1hPa"], 2, "t is in K"), (["--lossless", "--max-error", "t=1"], 2, "leave one of them out"),
    (["--bits-of-real-information", "1.5"], 2, "share between"), (["--append"], 2, "archives"), (["--bpp", "1"], 2, "pictures"),
    (["--chunk-times", "0"], 2, "positive"), (["--rmse", "t=1%"], 2, "--rmse t=1%"), (["--rmse", "t=-1"], 2, "--rmse t=-1"),
    (["--rmse", "t=1", "--max-error", "t=1"], 2, "both given for t"), (["--best-effort", "101"], 2, "quality 0..100"),
])  # fmt: skip
def test_wrong_calls(tmp_path, capsys, arguments, code, message):
    source = write(tmp_path / "x.nc", times=1)
    assert main(["encode", str(source), *arguments]) == code
    assert message in capsys.readouterr().err and not (tmp_path / "x.nlc").exists()


def test_what_is_refused_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "text.nc").write_text("no netCDF")
    assert main(["encode", str(tmp_path / "text.nc")]) == 1
    assert "cannot be read as a file of fields" in capsys.readouterr().err
    with netCDF4.Dataset(tmp_path / "groups.nc", "w") as f:
        f.createGroup("inner")
    with netCDF4.Dataset(tmp_path / "types.nc", "w") as f:
        f.createDimension("x", 2)
        f.createVariable("e", f.createEnumType("i1", "kind", {"a": 0, "b": 1}), ("x",))
    for name, message in (("groups.nc", "groups \\(inner\\)"), ("types.nc", "variable e has a user-defined type")):
        with pytest.raises(UnsupportedInput, match=message):
            open_grid(tmp_path / name)
    source = write(tmp_path / "x.nc", times=1)
    assert main(["encode", str(source)]) == 0
    assert main(["decode", str(tmp_path / "x.nlc"), "-o", str(tmp_path / "x.png")]) == 2
    assert "netCDF" in capsys.readouterr().err


def test_zarr_is_read(tmp_path):
    source = write(tmp_path / "x.nc")
    with xarray.open_dataset(source) as data:
        data.drop_vars("code").to_zarr(tmp_path / "x.zarr", zarr_format=2)
    target = decoded(encoded(tmp_path / "x.zarr", "t=0.05K"), tmp_path / "y.nc")
    with xarray.open_dataset(target) as y, xarray.open_dataset(source) as x:
        assert np.abs(y.t - x.t).max() <= 0.05 and y.u.equals(x.u) and y.time.equals(x.time)


def test_grib_is_read(tmp_path):
    eccodes = pytest.importorskip("eccodes")
    pytest.importorskip("cfgrib")
    values = field(3, 19, 36)
    with open(tmp_path / "x.grib", "wb") as file:
        for hour, message in enumerate(values):
            handle = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib2")
            for key, value in {
                "Ni": 36, "Nj": 19, "latitudeOfFirstGridPointInDegrees": 90, "latitudeOfLastGridPointInDegrees": -90,
                "longitudeOfFirstGridPointInDegrees": 0, "longitudeOfLastGridPointInDegrees": 350,
                "iDirectionIncrementInDegrees": 10, "jDirectionIncrementInDegrees": 10, "dataDate": 20010227,
                "dataTime": 600 * hour, "shortName": "2t", "bitsPerValue": 16,
            }.items():  # fmt: skip
                eccodes.codes_set(handle, key, value)
            eccodes.codes_set_values(handle, message.ravel().astype(float))
            eccodes.codes_write(handle, file)
            eccodes.codes_release(handle)
    with open_grid(tmp_path / "x.grib") as grib:
        original = grib.read("t2m")
        assert grib.layout.axes("t2m") == "TYX" and grib.layout.variables["t2m"].attrs["units"] == "K"
    assert np.abs(original - values).max() < 0.01
    target = decoded(encoded(tmp_path / "x.grib", "t2m=0.05K"), tmp_path / "z.nc")
    with xarray.open_dataset(target) as z:
        assert np.abs(z.t2m.values - original).max() <= 0.05 and z.t2m.attrs["GRIB_shortName"] == "2t"
        assert str(z.time.values[1]) == "2001-02-27T06:00:00.000000000"
    assert not list(tmp_path.glob("*.idx"))


LIGHT = """
import sys
from neuralcodec.cli import main
try: main(sys.argv[1:])
except SystemExit: pass
heavy = {"torch", "numba", "xarray", "zarr", "dask"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_help_and_info_stay_light(tmp_path):
    (tmp_path / "x.nlc").write_bytes(encoded(write(tmp_path / "x.nc", times=1)))
    for arguments in (["--help"], ["encode", "--help"], ["info", str(tmp_path / "x.nlc")]):
        result = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
