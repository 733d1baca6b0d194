"""Archives of fields: joined, appended, resumed after a kill, damaged, read lazily, made by workers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import xarray
from grids import field, write
from neuralcodec.cli import main
from neuralcodec.codecs import grid_archive
from neuralcodec.codecs.grid_archive import Archive, chunk_path, encode_archive, is_archive, local_runner, run_task
from neuralcodec.codecs.grid_bounds import parse_bounds
from neuralcodec.codecs.grid_file import decode_grid
from neuralcodec.container.errors import CorruptStream, UnsupportedInput, UsageError
from neuralcodec.media.grid import atomic_netcdf, open_grid

BOUNDS = parse_bounds("t=0.05K,u=0.1m/s")
zarr = pytest.importorskip("zarr")
pytest.importorskip("dask")


def parts(folder: Path, count: int = 3, times: int = 4, **options) -> list[str]:
    """Files that follow each other in time; without the char array, which Zarr does not hold."""
    made = []
    for n in range(count):
        path = folder / f"part{n}.nc"
        if not path.exists():
            write(folder / "all.nc", times=times, first=n * times, **options)
            with xarray.open_dataset(folder / "all.nc", decode_cf=False) as data:
                data.drop_vars(["code", "station"]).to_netcdf(path, unlimited_dims=["time"])
        made.append(str(path))
    return made


def contents(store: Path) -> dict[str, bytes]:
    """All chunks of ours, by their place."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("c/*")) if p.is_file()} | {
        str(p.relative_to(store)): p.read_bytes() for v in ("t", "u") for p in sorted((store / v).rglob("*")) if p.is_file()
    }


def check(store: Path, files: list[str]) -> None:
    """The archive is its files within the bounds, and everything else exactly."""
    with xarray.open_mfdataset(files, combine="nested", concat_dim="time", data_vars="minimal", coords="minimal",
                               compat="override", chunks={}) as a, xarray.open_zarr(store) as b:  # fmt: skip
        for name, bound in (("t", 0.05), ("u", 0.1)):
            x, y = a[name].values.astype("f8"), b[name].values.astype("f8")
            assert np.array_equal(np.isnan(x), np.isnan(y)) and np.abs(np.nan_to_num(x) - np.nan_to_num(y)).max() <= bound
        for name in set(a.variables) - {"t", "u"}:
            assert np.array_equal(a[name].values, b[name].values), name
        assert b.t.attrs["units"] == "K" and "guaranteed" in b.t.attrs["lossy_compression"]


def test_files_become_one_store_that_xarray_opens(tmp_path):
    files = parts(tmp_path)
    outcome = encode_archive(files[::-1], str(tmp_path / "a.zarr"), BOUNDS)  # in whatever order they are named
    assert outcome.steps == 12 and outcome.done.chunks == 6  # t and u in three chunks of four times each
    check(tmp_path / "a.zarr", files)
    assert zarr.open_array(tmp_path / "a.zarr" / "t").metadata.to_dict()["codecs"][0]["name"] == "neuralcodec"
    again = encode_archive(files, str(tmp_path / "a.zarr"), BOUNDS)
    assert again.done.chunks == 0 and again.skipped == 3
    one = encode_archive(files, str(tmp_path / "b.zarr"), BOUNDS, runner=local_runner(1))
    assert one.done.coded == outcome.done.coded and contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")
    assert not [p for p in tmp_path.rglob("*partial*")]


def test_back_to_netcdf_with_types_and_storage(tmp_path):
    files = parts(tmp_path, 2)
    encode_archive(files, str(tmp_path / "a.zarr"), {})
    with Archive(str(tmp_path / "a.zarr")) as archive, atomic_netcdf(tmp_path / "y.nc", archive.layout) as out:
        assert decode_grid(archive, out) == []
    with netCDF4.Dataset(tmp_path / "y.nc") as y, netCDF4.Dataset(files[0]) as x:
        assert {n: x.getncattr(n) for n in x.ncattrs()} == {n: y.getncattr(n) for n in y.ncattrs()}
        assert y.getncattr("number").dtype == np.int16 and y.dimensions["time"].isunlimited() and len(y.dimensions["time"]) == 8
        for name, v in x.variables.items():
            assert list(v.ncattrs()) == list(y[name].ncattrs()) and v.dtype == y[name].dtype
            assert v.filters() == y[name].filters()
            v.set_auto_maskandscale(False)
            y[name].set_auto_maskandscale(False)
            first = y[name][:4] if v.dimensions[:1] == ("time",) else y[name][...]
            assert np.asarray(v[...]).tobytes() == np.asarray(first).tobytes(), name


def test_an_archive_can_be_coded_again(tmp_path):
    encode_archive(parts(tmp_path, 1), str(tmp_path / "a.zarr"), {})
    assert main(["encode", str(tmp_path / "a.zarr"), "-o", str(tmp_path / "x.nlc")]) == 0
    with xarray.open_zarr(tmp_path / "a.zarr") as a, xarray.open_dataset(tmp_path / "x.nlc") as x:
        assert x.t.equals(a.t) and x.u.equals(a.u) and "neuralcodec" not in x.attrs


@pytest.mark.parametrize("times", [1, 4, 5])
def test_append(tmp_path, times):
    """Also when the last chunk is not full: what was there keeps its values, so no error is added to an error."""
    files, store = parts(tmp_path, 3, times=3), str(tmp_path / "a.zarr")
    encode_archive(files[:1], store, BOUNDS, times=times)
    with Archive(store) as archive:
        before = archive.chunk("t", 0)
    with pytest.raises(UsageError, match="--append"):
        encode_archive(files, store, BOUNDS)
    for more in (files[1:2], files):
        encode_archive(more, store, BOUNDS, append=True)
        with xarray.open_zarr(store) as data:
            assert data.t.values[: len(before)].tobytes() == before.tobytes()
    check(tmp_path / "a.zarr", files)
    with pytest.raises(UsageError, match="do not come after"):
        os.utime(files[0])
        encode_archive(files[:1], store, BOUNDS, append=True)
    write(tmp_path / "later.nc", times=3, first=90)
    with xarray.open_dataset(tmp_path / "later.nc", decode_cf=False) as data:
        data.drop_vars(["code", "station"]).to_netcdf(tmp_path / "late.nc", unlimited_dims=["time"])
    with pytest.raises(UsageError, match="another bound"):
        encode_archive([str(tmp_path / "late.nc")], store, parse_bounds("t=0.5"), append=True)


def test_packing_that_changes_from_file_to_file(tmp_path, capsys):
    """As in ERA5 files of the Climate Data Store: each has a scale of its own."""
    files = []
    values = field(6, 1, 19, 36)[:, 0]
    for n in range(2):
        path = tmp_path / f"x{n}.nc"
        part = values[3 * n : 3 * n + 3].astype("f8")
        part[0, 0, 0] = np.nan
        scale = np.nanmax(part) / 30000
        hours = 6.0 * np.arange(3 * n, 3 * n + 3)
        data = xarray.Dataset({"t": (("time", "lat", "lon"), part, {"units": "K"})}, {"time": hours})
        data.time.attrs["units"] = "hours since 2001-01-01"
        packing = {"dtype": "i2", "scale_factor": scale, "add_offset": 1.0 + n, "_FillValue": -32767}
        data.to_netcdf(path, encoding={"t": packing})
        files.append(str(path))
    assert main(["encode", *files, "-o", str(tmp_path / "a.zarr"), "--max-error", "t=0.02K"]) == 0
    assert "packed in a different way" in capsys.readouterr().err
    with xarray.open_mfdataset(files, combine="nested", concat_dim="time") as a, xarray.open_zarr(tmp_path / "a.zarr") as b:
        x, y = a.t.values.astype("f8"), b.t.values.astype("f8")
        assert b.t.dtype == np.float32 and np.array_equal(np.isnan(x), np.isnan(y)) and np.isnan(x).sum() == 2
        assert np.nanmax(np.abs(x - y)) <= 0.02


def test_reading_is_lazy(tmp_path, monkeypatch):
    files = parts(tmp_path, 1, times=100, rows=37, columns=72)
    encode_archive(files, str(tmp_path / "a.zarr"), parse_bounds("t=0.0005K"))
    total = sum(p.stat().st_size for p in (tmp_path / "a.zarr").rglob("*") if p.is_file())
    from zarr.storage import LocalStore

    taken = [0]
    original = LocalStore.get

    async def counted(self, *args, **kw):
        found = await original(self, *args, **kw)
        taken[0] += len(found) if found is not None else 0
        return found

    monkeypatch.setattr(LocalStore, "get", counted)
    with xarray.open_zarr(tmp_path / "a.zarr") as data:
        values = data.t.isel(time=50).values
    assert 0 < taken[0] < 0.05 * total
    with open_grid(files[0]) as source:
        assert np.abs(source.read("t")[50] - values).max() <= 0.0005


def test_damage_is_named_and_the_rest_is_read(tmp_path, capsys):
    files, store = parts(tmp_path, 2), tmp_path / "a.zarr"
    encode_archive(files, str(store), BOUNDS)
    path = chunk_path(str(store), "t", (1, 0, 0, 0))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    chunk_path(str(store), "u", (0, 0, 0, 0)).unlink()
    with xarray.open_zarr(store) as lazy:
        assert np.isfinite(lazy.t.isel(time=2).values).all()
        with pytest.raises(CorruptStream, match="t: chunk is cut short or damaged"):
            lazy.t.isel(time=6).load()
    assert main(["test", str(store)]) == 3
    err = capsys.readouterr().err
    assert "t, time 4..7 (2001-02-28 00:00:00 .. 2001-02-28 18:00:00), level 0..1: chunk is cut short or damaged" in err
    assert "u, time 0..3" in err and "chunk is missing" in err and "2 of 4 chunks" in err
    assert main(["decode", str(store), "-o", str(tmp_path / "y.nc")]) == 3 and not (tmp_path / "y.nc").exists()
    assert main(["decode", str(store), "-o", str(tmp_path / "y.nc"), "--keep-going"]) == 3
    with xarray.open_dataset(tmp_path / "y.nc") as y:
        assert np.isnan(y.t[4:]).all() and np.isfinite(y.t[:4]).all() and np.isnan(y.u[:4]).all()


def test_interrupted_runs_are_finished(tmp_path):
    files, store = parts(tmp_path, 4), str(tmp_path / "a.zarr")
    encode_archive(files, str(tmp_path / "whole.zarr"), BOUNDS)

    def dies_after(count: int):
        def run(tasks):
            for n, task in enumerate(tasks):
                if n == count:
                    raise KeyboardInterrupt
                yield run_task(task)

        return run

    for count in (0, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            encode_archive(files[:3], store, BOUNDS, runner=dies_after(count))
        assert is_archive(store) and main(["test", store]) == 3
    half = chunk_path(store, "t", (0, 0, 0, 0))
    half.write_bytes(half.read_bytes()[:-10])  # as a crash of the machine leaves it
    (half.parent / ".0.xyz.partial").write_bytes(b"half")
    with pytest.raises(UsageError, match="name it again"):
        encode_archive(files[:1], store, BOUNDS)
    outcome = encode_archive(files[:3], store, BOUNDS)
    assert outcome.resumed == 4 and outcome.done.chunks == 2
    assert main(["test", store]) == 0 and not list(Path(store).rglob("*.partial"))
    with pytest.raises(KeyboardInterrupt):  # and while it grows
        encode_archive(files, store, BOUNDS, append=True, runner=dies_after(1))
    outcome = encode_archive(files, store, BOUNDS, append=True)
    assert outcome.resumed == 1 and outcome.steps == 16
    assert contents(Path(store)) == contents(tmp_path / "whole.zarr")
    check(Path(store), files)


def test_killed_process_goes_on(tmp_path):
    files, store = parts(tmp_path, 1, times=30, rows=37, columns=72), tmp_path / "a.zarr"
    call = [sys.executable, "-m", "neuralcodec", "encode", files[0], "-o", str(store), "--max-error", "t=0.05K,u=0.1m/s",
            "--chunk-times", "1", "--threads", "1"]  # fmt: skip
    process = subprocess.Popen(call)
    deadline = time.monotonic() + 60
    while len(list(store.glob("t/c/*/0/0/0"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = len(list(store.glob("[tu]/c/*/0/0/0")))
    assert 5 <= made < 60
    result = subprocess.run([*call, "--json"], capture_output=True, text=True, check=True)
    row = json.loads(result.stdout)
    assert row["resumed_chunks"] >= made - 1 and row["chunks"] + row["resumed_chunks"] == 60 and row["times"] == 30
    assert main(["test", str(store)]) == 0
    check(store, files)


@pytest.mark.parametrize("change, message", [
    (lambda d: d.assign_coords(latitude=d.latitude), None), (lambda d: d.rename(u="w"), "not the same variables"),
    (lambda d: d.isel(latitude=slice(0, 10)), "dimension latitude is 10"), (lambda d: d.assign(t=d.t.astype("f8")), "t is f8"),
    (lambda d: d.assign(t=d.t.assign_attrs(units="degC")), "t is in degC"),
    (lambda d: d.assign_coords(time=d.time.assign_attrs(calendar="noleap")), "counts time in"),
    (lambda d: d.assign_coords(time=d.time - 24.0), "do not come after"),
])  # fmt: skip
def test_files_that_do_not_belong_together(tmp_path, change, message):
    files = parts(tmp_path, 2)
    with xarray.open_dataset(files[1], decode_cf=False) as data:
        changed = change(data.load())
    if message and "after" in message:
        changed.time.attrs |= {"units": "hours since 2001-02-27 00:00", "calendar": "standard"}
    changed.to_netcdf(tmp_path / "other.nc", unlimited_dims=["time"])
    both = [files[0], str(tmp_path / "other.nc")]
    if message is None:
        assert encode_archive(both, str(tmp_path / "a.zarr"), BOUNDS).steps == 8
        return
    with pytest.raises(UnsupportedInput, match=message):
        encode_archive(both, str(tmp_path / "a.zarr"), BOUNDS)
    assert not (tmp_path / "a.zarr").exists()


def test_what_is_in_the_way_stays(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grid_archive, "CONNECT_S", 1)
    files = parts(tmp_path, 1)
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "precious").write_text("x")
    for extra in ([], ["-f"]):
        assert main(["encode", files[0], "-o", str(tmp_path / "a.zarr"), *extra]) in (1, 2)
    assert (tmp_path / "a.zarr" / "precious").read_text() == "x" and "no archive of this codec" in capsys.readouterr().err
    assert main(["encode", files[0], "-o", str(tmp_path / "b.zarr")]) == 0
    assert main(["info", str(tmp_path / "b.zarr")]) == 0
    assert "archive of 1 files, complete" in capsys.readouterr().out
    assert main(["encode", files[0], "-o", str(tmp_path / "b.zarr"), "-f", "--max-error", "t=1"]) == 0
    assert main(["encode", files[0], "-o", str(tmp_path / "c.zarr"), "--scheduler", "tcp://127.0.0.1:9"]) == 1


@pytest.mark.parametrize("kind, value", [("lossless", 0.0), ("absolute", 0.3), ("relative", 0.001)])
def test_zarr_codec_by_itself(tmp_path, kind, value):
    from neuralcodec.plugins.zarr_codec import NeuralcodecCodec

    x = field(5, 3, 20, 40)
    x[0, 0, :3, :5] = np.nan
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=x.shape, chunks=(2, 3, 20, 40), dtype="f4", compressors=None,
                              fill_value=np.nan, serializer=NeuralcodecCodec(kind=kind, value=value))  # fmt: skip
    array[:] = x
    array[1, 2, 4:9] = x[1, 2, 4:9] + 1
    x[1, 2, 4:9] += 1
    back = zarr.open_array(str(tmp_path / "a.zarr"))[:]
    bound = value * np.abs(x) if kind == "relative" else np.full(x.shape, 2 * value)  # chunks of a later write went twice
    assert np.array_equal(np.isnan(x), np.isnan(back))
    assert (np.nan_to_num(np.abs(x - back)) <= np.nan_to_num(2 * bound)).all()
    for n in (np.arange(400, dtype="i4").reshape(20, 20), np.arange(400, dtype="u1").reshape(20, 20)):
        array = zarr.create_array(str(tmp_path / f"{n.dtype}.zarr"), shape=n.shape, chunks=(15, 20), dtype=n.dtype,
                                  compressors=None, serializer=NeuralcodecCodec())  # fmt: skip
        array[:] = n
        assert np.array_equal(zarr.open_array(str(tmp_path / f"{n.dtype}.zarr"))[:], n)
    with pytest.raises(ValueError, match="no bound"):
        NeuralcodecCodec(kind="absolute", value=-1.0)


def cluster_run(folder: Path, files: list[str], times: int, patience: float = 280) -> tuple[Path, float]:
    """An archive made by a scheduler with two worker processes on loopback, one of which is killed on the way."""
    distributed = pytest.importorskip("distributed")
    store = folder / "cluster.zarr"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None,
                                  silence_logs=50) as cluster:  # fmt: skip
        call = [sys.executable, "-m", "neuralcodec", "encode", *files, "-o", str(store), "--max-error", "t=0.05K,u=0.1m/s",
                "--chunk-times", "1", "--quiet", "--scheduler", cluster.scheduler_address]  # fmt: skip
        start = time.monotonic()
        process = subprocess.Popen(call)
        while len(list(store.glob("t/c/*/0/0/0"))) < times // 5:
            assert process.poll() is None and time.monotonic() - start < patience
            time.sleep(0.02)
        os.kill(next(iter(cluster.workers.values())).process.pid, signal.SIGKILL)
        assert process.wait() == 0
        return store, time.monotonic() - start


def test_half_written_chunks_of_lost_workers_are_swept(tmp_path):
    files = parts(tmp_path, 1, times=4)
    store = tmp_path / "a.zarr"

    def runner(tasks):
        for number, stats in enumerate(local_runner(1)(tasks)):
            if number == 0:
                chunk = next(p for p in store.rglob("t/c/*/0/0/0") if p.is_file())
                (chunk.parent / ".0.killed.partial").write_bytes(chunk.read_bytes()[:9])
            yield stats

    encode_archive(files, str(store), BOUNDS, times=1, runner=runner)
    encode_archive(files, str(tmp_path / "b.zarr"), BOUNDS, times=1)
    assert not list(store.rglob("*.partial")) and contents(store) == contents(tmp_path / "b.zarr")


def test_cluster_that_loses_a_worker(tmp_path):
    files = parts(tmp_path, 1, times=24, rows=37, columns=72)
    store, _ = cluster_run(tmp_path, files, 24)
    encode_archive(files, str(tmp_path / "local.zarr"), BOUNDS, times=1)
    assert contents(store) == contents(tmp_path / "local.zarr") and len(contents(store)) > 48
    assert main(["test", str(store)]) == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_100_steps_at_a_quarter_degree_on_a_cluster_that_loses_a_worker(tmp_path):
    """The campaign: 100 steps of 721 x 1440, t and u; NLC_TEST_ROWS and NLC_TEST_STEPS make it smaller."""
    rows, steps = int(os.environ.get("NLC_TEST_ROWS", 721)), int(os.environ.get("NLC_TEST_STEPS", 100))
    files = parts(tmp_path, steps // 10, times=10, levels=1, rows=rows, columns=2 * (rows - 1))
    store, seconds = cluster_run(tmp_path, files, steps, patience=3000)
    with Archive(str(store)) as archive:
        assert archive.complete
    start = time.monotonic()
    encode_archive(files, str(tmp_path / "local.zarr"), BOUNDS, times=1)
    local = time.monotonic() - start
    print(f"{steps} x {rows} x {2 * (rows - 1)}, two variables: cluster {seconds:.1f} s, local {local:.1f} s")
    assert contents(store) == contents(tmp_path / "local.zarr")
    check(store, files)
