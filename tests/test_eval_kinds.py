"""``codec eval`` over bytes, fields and video: every peer comes back, keeps its promise, and says when it is missing."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from conftest import scene
from neuralcodec.cli import main
from neuralcodec.container.errors import CodecError, UnsupportedInput, UsageError
from neuralcodec.datasets.registry import DatasetError, find
from neuralcodec.eval import kinds, metrics_grid, metrics_video, plot_grid, run
from neuralcodec.eval.kinds import KINDS, Item
from neuralcodec.eval.peers import known, peer
from PIL import Image

LATITUDE = np.linspace(90, -90, 37)


def field(levels: int = 2, seed: int = 0) -> np.ndarray:
    """Smooth waves with a little noise, (levels, 37, 72) float32, around 280."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:37, 0:72]
    base = 280 + 20 * np.cos(y / 9) + 4 * np.sin(2 * np.pi * 3 * x / 72)
    return (base + np.arange(levels)[:, None, None] + rng.normal(0, 0.2, (levels, 37, 72))).astype(np.float32)


def made(name: str, kind: str):
    try:
        return peer(name, kind)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", known("bytes"))
def test_bytes_peers_give_back_everything(name):
    subject = made(name, "bytes")
    rng = np.random.default_rng(1)
    for sample in (b"x", b"abc " * 5000, rng.integers(0, 256, 4000, np.uint8).tobytes()):
        for setting in subject.settings:
            assert subject.decode(subject.encode(sample, setting)) == sample
    assert len(subject.encode(b"abc " * 5000, subject.settings[-1])) < 300


@pytest.mark.parametrize("name", ["sz3", "sz3-2d", "zfp", "sperr", "bitround-zstd", "netcdf-deflate"])
@pytest.mark.parametrize("levels", [1, 2, 9])
def test_grid_peers_hold_their_bound(name, levels):
    subject, values = made(name, "grid"), field(levels)
    lossless = name == "netcdf-deflate"
    for setting in (subject.settings[0], subject.settings[-2]):
        decoded = subject.decode(subject.encode(values, setting))
        assert decoded.shape == values.shape and decoded.dtype == np.float32
        # a bound is kept in the compressor's arithmetic; float32 rounding of the result comes on top
        allowed = 0 if lossless else setting * np.ptp(values) + 300 * np.finfo(np.float32).eps
        assert metrics_grid.max_error(values, decoded) <= allowed
    with pytest.raises(UnsupportedInput, match="missing"):
        subject.encode(np.full((1, 8, 8), np.nan, np.float32), subject.settings[0])


def test_our_coder_of_fields_is_measured_like_a_peer(tmp_path):
    subject, values = run.make("grid:exact", kind="grid"), field(3)
    sizes = []
    for setting in (subject.settings[0], subject.settings[-1]):
        sample = kinds.Field(values, LATITUDE, "t", "K")
        point = run.measure(subject, KINDS["grid"], sample, setting, tmp_path, KINDS["grid"].default_metrics)
        assert 0 < point["max_error_over_bound"] <= 1 and point["max_error"] <= setting * np.ptp(values.astype(float))
        assert point["ratio_float32"] == pytest.approx(values.size * 4 / point["bytes"]) == 2 * point["ratio_int16"]
        sizes.append(point["bytes"])
    assert sizes[0] < sizes[1]
    rmse = run.make("grid:rmse", kind="grid")
    aimed = run.measure(rmse, KINDS["grid"], sample, 1e-3, tmp_path, ["snr", "rmse_relative"])
    error = np.sqrt(np.mean((rmse.decode(rmse.encode(values, 1e-3)).astype(float) - values) ** 2))
    assert 0.8e-3 < error / np.ptp(values.astype(float)) <= 1e-3 and "max_error_over_bound" not in aimed
    pooled = KINDS["grid"].pool([point, point | {"max_error_over_bound": 2.0}])
    assert pooled["max_error_over_bound"] == 2.0 and pooled["ratio_float32"] == pytest.approx(point["ratio_float32"])


def test_our_networks_are_measured_on_fields(tmp_path):
    subject = run.make("vaeformer:test", [20.0, 80.0], "grid")
    sample = kinds.Field(field(2), LATITUDE, "t", "K", (500, 850))
    points = [run.measure(subject, KINDS["grid"], sample, q, tmp_path, ["snr"]) for q in subject.settings]
    assert points[0]["bytes"] < points[1]["bytes"] and points[0]["snr"] < points[1]["snr"]
    assert subject.complexity()["parameters"] > 1000


def test_what_an_error_does_to_a_field():
    a = field()
    assert metrics_grid.bias(a, a + 0.25, LATITUDE) == pytest.approx(0.25, rel=1e-4)
    assert metrics_grid.bias(a, a[:, ::-1], LATITUDE) != 0 and metrics_grid.extremes_error(a, a[:, ::-1]) == 0
    assert metrics_grid.extremes_error(a, np.clip(a, a.min() + 1, a.max() - 2)) == pytest.approx(2, rel=1e-3)
    assert metrics_grid.gradient_error(a, a + 5, LATITUDE) == pytest.approx(0, abs=1e-3)
    assert metrics_grid.gradient_error(a, 2 * a, LATITUDE) == pytest.approx(1, rel=1e-3)
    assert metrics_grid.gradient_error(np.ones_like(a), a, LATITUDE) is None
    east = np.broadcast_to(np.sin(np.deg2rad(np.arange(72) * 5.0)), a.shape)  # 1 per radian of longitude where it is steepest
    steepest = np.abs(metrics_grid.gradients(east, LATITUDE)[1])
    assert steepest[0, 18].max() == pytest.approx(np.pi / 180, rel=2e-3)  # at the equator a degree is a degree
    assert steepest[0, 30].max() == pytest.approx(np.pi / 180 / np.cos(np.deg2rad(LATITUDE[30])), rel=2e-3)
    wave = 280 + 10 * np.sin(2 * np.pi * 3 * np.arange(72) / 72) + np.zeros(a.shape)
    fine = 0.01 * np.sin(2 * np.pi * 20 * np.arange(72) / 72)
    assert metrics_grid.resolved_wavenumber(wave + 0.9 * fine, wave - 0.1 * fine, LATITUDE) == pytest.approx(20 / 36)
    assert metrics_grid.resolved_wavenumber(a, a, LATITUDE) == 1
    noisy = a + np.random.default_rng(0).normal(0, 1, a.shape)
    like = [metrics_grid.data_ssim(a, b) for b in (a, a + 0.3 * (noisy - a), noisy)]
    assert like[0] == 1 > like[1] > like[2]


def test_fields_chart(tmp_path):
    import xarray

    dims = ("level", "latitude", "longitude")
    for name, values in (("a", field()), ("b", field() + 0.1), ("c", field()[:, :, :70])):
        data = xarray.Dataset({"t": (dims, values, {"units": "K"}), "u": (dims, values)}, {"latitude": LATITUDE})
        data.to_netcdf(tmp_path / f"{name}.nc")
    a, b, c = (str(tmp_path / f"{n}.nc") for n in "abc")
    target = str(tmp_path / "x.png")
    assert main(["plot", a, b, "--what", "fields", "--variable", "t", "--index", "1", "-o", target]) == 0
    with Image.open(target) as picture:
        assert picture.width > 800 and np.asarray(picture.convert("RGB")).std() > 10
    chart = plot_grid.fields_chart(tmp_path / "a.nc", tmp_path / "b.nc", "t")
    assert "largest error 0.1 K" in chart.axes[1].get_title(loc="left")
    assert [line.get_label() for line in chart.axes[2].lines] == ["original", "decoded", "error"]
    for arguments in ([a, b], [a, b, "--variable", "q"], [a, c, "--variable", "t"], [a, "--variable", "t"],
                      [a, b, "--variable", "t", "--index", "2"]):  # fmt: skip
        assert main(["plot", *arguments, "--what", "fields", "-o", target]) == 2


def test_jpeg2000_of_fields_gets_better_and_takes_constants():
    subject, values = made("jpeg2000", "grid"), field()
    errors = [metrics_grid.max_error(values, subject.decode(subject.encode(values, s))) for s in (40, 60, 80)]
    assert errors == sorted(errors, reverse=True) and errors[0] < 3
    flat = np.full((1, 16, 16), 3.5, np.float32)
    assert np.array_equal(subject.decode(subject.encode(flat, 60)), flat)


def test_grid_metrics():
    a = field()
    assert metrics_grid.rmse_weighted(a, a + 0.5, LATITUDE) == pytest.approx(0.5, rel=1e-5)
    pole = a.copy()
    pole[:, 0] += 100  # a row without area
    assert metrics_grid.rmse_weighted(a, pole, LATITUDE) < 1e-3 and metrics_grid.max_error(a, pole) == pytest.approx(100)
    equator = a.copy()
    equator[:, 18] += 1
    share = 1 / np.cos(np.deg2rad(LATITUDE)).sum()
    assert metrics_grid.rmse_weighted(a, equator, LATITUDE) == pytest.approx(np.sqrt(share), rel=1e-3)
    assert metrics_grid.snr(a, a, LATITUDE) == float("inf")
    relative = metrics_grid.rmse_relative(a, a + 1, LATITUDE)
    assert metrics_grid.snr(a, a + 1, LATITUDE) == pytest.approx(-20 * np.log10(relative))
    assert metrics_grid.max_error_relative(a, a + 1) == pytest.approx(1 / np.ptp(a), rel=1e-3)
    assert metrics_grid.rmse_relative(np.ones((1, 37, 72)), np.ones((1, 37, 72)), LATITUDE) is None
    with pytest.raises(ValueError, match="latitudes"):
        metrics_grid.area_weights(np.array([0.0, 300.0]))


def test_anomaly_correlation():
    a = field()
    climate = a.mean(2, keepdims=True)
    assert metrics_grid.anomaly_correlation(a, a, LATITUDE) == pytest.approx(1)
    assert metrics_grid.anomaly_correlation(a, 2 * climate - a, LATITUDE) == pytest.approx(-1, abs=1e-4)
    noise = np.random.default_rng(3).normal(0, 3, a.shape)
    assert 0.3 < metrics_grid.anomaly_correlation(a, a + noise, LATITUDE) < 0.9
    assert metrics_grid.anomaly_correlation(a, a, LATITUDE, climatology=a) is None


@pytest.mark.parametrize("width", [72, 71])
def test_the_spectrum_holds_the_whole_power(width):
    a = field()[..., :width] - 280
    spectrum = metrics_grid.zonal_spectrum(a, LATITUDE)
    assert spectrum.shape == (width // 2 + 1,)
    assert spectrum.sum() == pytest.approx(metrics_grid.weighted_mean(a.astype(float) ** 2, LATITUDE), rel=1e-9)
    assert width == 71 or spectrum[1:].argmax() + 1 == 3  # the wave that is in it
    smooth = (a + np.roll(a, 1, 2) + np.roll(a, -1, 2)) / 3
    assert metrics_grid.spectrum_ratio(a, smooth, LATITUDE) < 0.3
    assert metrics_grid.spectrum_ratio(a, a, LATITUDE) == pytest.approx(1)


@pytest.fixture(scope="module")
def sequence() -> np.ndarray:
    """Six frames (6, 48, 66, 3) of a scene that moves two pixels to the left each time."""
    wide = scene(48, 90)
    return np.stack([wide[:, 2 * t : 2 * t + 66] for t in range(6)])


@pytest.mark.parametrize("name", known("video"))
def test_video_peers_code_every_frame(name, sequence):
    subject = made(name, "video")
    odd = sequence[:3, :47, :65] if name != "svt-av1" else np.tile(sequence[:3], (1, 2, 2, 1))[:, :79, :81]
    sizes, quality = [], []
    for setting in (subject.settings[0], subject.settings[-1]):
        data = subject.encode(odd, setting)
        decoded = subject.decode(data)
        assert decoded.shape == odd.shape and decoded.dtype == np.uint8
        sizes.append(len(data))
        quality.append(KINDS["video"].compare(odd, decoded, ["psnr"])["psnr"])
    assert sizes[0] < sizes[1] and quality[0] < quality[1]


def test_flicker_and_warping_error(sequence):
    pytest.importorskip("skimage")
    still = np.clip(sequence.astype(int) + 7, 0, 255).astype(np.uint8)
    blinking = np.clip(sequence.astype(int) + np.array([0, 9] * 3)[:, None, None, None], 0, 255).astype(np.uint8)
    assert metrics_video.flicker(sequence, still) < 0.2 < 6 < metrics_video.flicker(sequence, blinking) <= 9
    assert metrics_video.flicker(sequence[:1], sequence[:1]) is None
    own = metrics_video.warping_error(sequence[:3], sequence[:3])
    plain = float(np.mean((sequence[1:3].astype(float) - sequence[:2]) ** 2))
    assert own < plain / 3  # motion explains most of the change
    assert metrics_video.warping_error(sequence[:3], blinking[:3]) > own + 40
    assert metrics_video.warping_error(sequence[:1], sequence[:1]) is None


def test_warp_moves_by_whole_and_half_pixels():
    picture = np.arange(20.0).reshape(4, 5)[..., None]
    motion = np.zeros((2, 4, 5))
    motion[1] = 1
    assert np.array_equal(metrics_video.warp(picture, motion)[:, :4], picture[:, 1:])
    motion[1] = 0.5
    assert metrics_video.warp(picture, motion)[0, 0, 0] == 0.5


def test_without_their_libraries(monkeypatch):
    for package, kind, name in (("av", "video", "x264"), ("pyppmd", "bytes", "ppmd"), ("imagecodecs", "grid", "sz3")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=f"peer {name}: needs the package {package}: pip install {package}"):
            peer(name, kind)


def test_eval_of_bytes(tmp_path, capsys):
    data = tmp_path / "files"
    data.mkdir()
    (data / "a.txt").write_bytes(b"to be or not to be " * 400)
    (data / "b.bin").write_bytes(bytes(range(256)) * 4)
    (data / "empty").touch()
    assert main(["eval", str(data), "--kind", "bytes", "--peers", "zlib", "bz2", "--out", str(tmp_path / "o"), "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "empty: is empty" in out and "files, 2 files; rate against zlib (measured)" in out
    result = json.loads((tmp_path / "o" / "zlib.json").read_text())
    row, points = result["curve"][0], [p for p in result["points"] if p["setting"] == result["curve"][0]["setting"]]
    assert row["bits_per_byte"] == pytest.approx(np.mean([8 * p["bytes"] / p["count"] for p in points]))
    assert row["bits_per_byte_total"] == pytest.approx(8 * sum(p["bytes"] for p in points) / (7600 + 1024))
    assert result["difference"]["percent"] == pytest.approx(0)
    with pytest.raises(DatasetError, match="--kind bytes"):
        find(data)


def test_bytes_that_come_back_wrong_are_a_failure():
    with pytest.raises(CodecError, match="other bytes"):
        KINDS["bytes"].compare(b"ab", b"ac", ())


def test_eval_of_fields(tmp_path, capsys):
    import xarray

    made("sz3", "grid")
    dims = ("level", "latitude", "longitude")
    data = xarray.Dataset({"t": (dims, field(), {"units": "K"}), "flat": ("latitude", LATITUDE)}, {"latitude": LATITUDE})
    data["gap"] = (dims, np.where(field() > 300, np.nan, field()))
    (tmp_path / "fields").mkdir()
    data.to_netcdf(tmp_path / "fields" / "x.nc")
    code = main(["eval", str(tmp_path / "fields"), "--peers", "sz3", "zfp", "--out", str(tmp_path / "o"), "--quiet"])
    out = capsys.readouterr().out
    assert code == 1 and "gap has missing values" in out and "1 fields; BD-rate (SNR) against sz3 (measured)" in out
    result = json.loads((tmp_path / "o" / "sz3.json").read_text())
    point = result["points"][0]
    assert point["name"] == "x.nc:t" and point["bits_per_value"] == point["bytes"] * 8 / field().size
    assert point["max_error"] <= point["setting"] * np.ptp(field()) * 1.001
    with pytest.raises(UsageError, match="measured on pictures and bytes, grid:exact and vaeformer on fields"):
        run.make("hyperprior:test", kind="grid")


def test_eval_of_video(tmp_path, sequence, capsys):
    made("x264", "video")
    folder = tmp_path / "clips" / "moving"
    folder.mkdir(parents=True)
    for t, frame in enumerate(sequence[:3]):
        Image.fromarray(frame).save(folder / f"{t:03}.png")
    code = main(["eval", str(tmp_path / "clips"), "--peers", "x264", "--metrics", "psnr", "flicker", "--out",
                 str(tmp_path / "o"), "--quiet", "--threads", "1"])  # fmt: skip
    assert code == 0 and "clips, 1 sequences; BD-rate (RGB PSNR) against x264 (measured)" in capsys.readouterr().out
    point = json.loads((tmp_path / "o" / "x264.json").read_text())["points"][0]
    assert point["bpp"] == point["bytes"] * 8 / (3 * 48 * 66) and point["flicker"] > 0
    Image.fromarray(scene(20, 20)).save(folder / "999.png")
    with pytest.raises(UnsupportedInput, match="different sizes"):
        KINDS["video"].read(Item(folder))


def test_raw_video_needs_its_size(tmp_path):
    pytest.importorskip("av")
    luma = np.full((2, 16 * 16 * 3 // 2), 128, np.uint8)
    (tmp_path / "a_16x16_8bit.yuv").write_bytes(luma.tobytes())
    frames = KINDS["video"].read(Item(tmp_path / "a_16x16_8bit.yuv"))
    assert frames.shape == (2, 16, 16, 3) and abs(int(frames[0, 0, 0, 0]) - 130) < 3
    (tmp_path / "b.yuv").write_bytes(luma.tobytes())
    with pytest.raises(UnsupportedInput, match="size of the frames"):
        KINDS["video"].read(Item(tmp_path / "b.yuv"))


def test_beside_cra5(tmp_path, capsys):
    """Fields are taken as CRA5 takes them: by variable and level, those that it has."""
    netCDF4 = pytest.importorskip("netCDF4")
    made("jpeg2000", "grid")
    path = tmp_path / "x.nc"
    with netCDF4.Dataset(path, "w") as f:
        for name, values, attrs in (
            ("level", np.array([850, 500, 175]), {"units": "hPa"}), ("latitude", LATITUDE, {"units": "degrees_north"}),
            ("longitude", np.arange(72) * 5.0, {"units": "degrees_east"}),
        ):  # fmt: skip
            f.createDimension(name, len(values))
            f.createVariable(name, "f8", (name,))[:] = values
            f[name].setncatts(attrs)
        f.createVariable("t", "f4", ("level", "latitude", "longitude"))[:] = field(3)
        f.createVariable("vo", "f4", ("latitude", "longitude"))[:] = field(1)[0]
    chart = tmp_path / "chart.png"
    assert main(["bench", "grid", str(path), "--cra5", "--json", "--plot", str(chart)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert chart.stat().st_size > 5000
    assert {r["variable"] for r in result["at_mse"]} == {"t"} and {r["planes"] for r in result["at_mse"]} == {3}
    bits = [r["bits_per_value"]["ours"] for r in result["at_mse"]]
    assert bits == sorted(bits) and bits[0] < bits[-1]
    (row,) = result["at_cra5"]
    assert row["planes"] == 2  # of 175 hPa no error is published
    assert result["published"]["VAEformer"][0] == [0.062, 0.0164]
    assert result["at_network"] == []
    assert main(["bench", "grid", str(path), "--cra5", "-m", "vaeformer:test", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["at_network"]
    assert [r["quality"] for r in rows] == [10, 40, 70] and all(r["planes"] == 3 for r in rows)
    assert rows[0]["mse"] > rows[1]["mse"] > rows[2]["mse"]
    for bits in (r["bits_per_value"] for r in rows):
        assert set(bits) == {"vaeformer:test", "field by field", "ours", "jpeg2000"}
        assert bits["ours"] > 0 and bits["vaeformer:test"] != bits["field by field"]
    assert main(["bench", "grid", str(path), "--cra5"]) == 0
    assert "VAEformer" in capsys.readouterr().out
    bare = tmp_path / "bare.nc"
    with netCDF4.Dataset(path) as a, netCDF4.Dataset(bare, "w") as b:
        for name in ("latitude", "longitude"):
            b.createDimension(name, len(a[name]))
            b.createVariable(name, "f8", (name,))[:] = a[name][:]
        b.createVariable("vo", "f4", ("latitude", "longitude"))[:] = a["vo"][:]
    assert main(["bench", "grid", str(bare), "--cra5"]) == 2
