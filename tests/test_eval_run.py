"""``codec eval`` over pictures: points, resuming, failures, anchors, and what its users may do wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import scene
from neuralcodec.cli import main
from neuralcodec.codecs import registry
from neuralcodec.container.errors import UsageError
from neuralcodec.eval import run
from neuralcodec.eval.kinds import KINDS, Item
from neuralcodec.eval.peers import Jpeg, is_peer, known, peer
from neuralcodec.eval.run import write_measured
from neuralcodec.eval.subject import Ours
from PIL import Image

pytest.importorskip("bjontegaard")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(2):
        Image.fromarray(scene(176, 208, i)).save(folder / f"{i}.png")
    return folder


class Fragile(Jpeg):
    """A peer that fails on one picture."""

    name = "fragile"
    settings = (10, 30, 60, 90)

    def encode(self, sample: np.ndarray, setting: float) -> bytes:
        if np.array_equal(sample, scene(176, 208, 1)):
            raise RuntimeError("cannot do this one")
        return super().encode(sample, setting)


class Steady(Jpeg):
    name = "steady"
    settings = (10, 30, 60, 90)


@pytest.fixture
def peers(monkeypatch):
    """``module:Class`` names that resolve to the classes above, however pytest imported this file."""
    import sys
    import types

    module = types.ModuleType("someone.codecs")
    module.Fragile, module.Steady = Fragile, Steady
    monkeypatch.setitem(sys.modules, "someone", types.ModuleType("someone"))
    monkeypatch.setitem(sys.modules, "someone.codecs", module)
    monkeypatch.setattr(run, "_subjects", {})
    return "someone.codecs:Fragile", "someone.codecs:Steady"


def test_ours_beside_a_peer_and_again(pictures, tmp_path, peers):
    steady = peers[1]
    out = tmp_path / "results"
    summary = run.evaluate(pictures, ["hyperprior:test"], [steady], out, qualities=[0, 30, 60, 90], threads=1)
    assert summary["failures"] == [] and summary["kind"] == "image" and summary["samples"] == 2
    ours = json.loads((out / "hyperprior-test.json").read_text())
    assert len(ours["points"]) == 8 and ours["identity"] == ours["describe"].split()[-1]
    for point in ours["points"]:
        assert point["bpp"] == point["bytes"] * 8 / (176 * 208)
        assert {"transform", "entropy", "container"} <= point["encode_stages"].keys()
        assert sum(point["encode_stages"].values()) <= point["encode_s"]
    row = ours["curve"][1]
    mine = [p for p in ours["points"] if p["setting"] == row["setting"]]
    assert row["psnr"] == pytest.approx(np.mean([p["psnr"] for p in mine]))
    assert row["psnr_pooled"] == pytest.approx(10 * np.log10(255**2 / np.mean([p["mse"] for p in mine])))
    # a second run measures nothing: the store does not grow and the times are those of the first
    before = (out / "hyperprior-test.points.jsonl").read_bytes()
    again = run.evaluate(pictures, ["hyperprior:test"], [steady], out, qualities=[0, 30, 60, 90], threads=1)
    assert (out / "hyperprior-test.points.jsonl").read_bytes() == before
    assert again["codecs"]["hyperprior:test"]["curve"] == ours["curve"]
    # a point that was cut off while it was written is measured again
    (out / "hyperprior-test.points.jsonl").write_bytes(before[:-20])
    run.evaluate(pictures, ["hyperprior:test"], [steady], out, qualities=[0, 30, 60, 90], threads=1)
    assert len((out / "hyperprior-test.points.jsonl").read_text().splitlines()) == 9


def test_estimated_bits_are_the_bytes_of_the_file():
    """The entropy model's account and the files differ by at most 1 % over the qualities, container included."""
    real = ideal = 0.0
    for quality in (0, 50, 100):
        subject, picture = Ours("hyperprior:test", [quality]), scene(512, 768)
        bits, estimate = 8 * len(subject.encode(picture, quality)), subject.ideal_bits(picture, quality)
        assert 0 < bits - estimate <= 8 * 80  # what the container costs
        real, ideal = real + bits, ideal + estimate
    assert real / ideal - 1 <= 0.01
    tiled = scene(64, 1100)  # more than a tile: the estimate must follow the cut of the file
    bits, estimate = 8 * len(subject.encode(tiled, quality)), subject.ideal_bits(tiled, quality)
    assert 0 < bits - estimate <= 8 * 96


def test_a_search_is_measured_beside_the_plain_encoder(pictures, tmp_path):
    """MODEL+N: smaller cost at the same quality, told apart in results and store, without an estimate that nobody made."""
    from neuralcodec.codecs import registry
    from neuralcodec.codecs.base import level_of

    models = ["hyperprior:test", "hyperprior:test+24"]
    summary = run.evaluate(pictures, models, [], tmp_path, qualities=[20, 40, 60, 80], threads=1)
    assert summary["failures"] == []
    plain, searched = (summary["codecs"][m] for m in models)
    assert plain["identity"] != searched["identity"] and "24 iterations" in searched["describe"]
    lambda_of = registry.load("hyperprior", "test").lambda_of
    for before, after in zip(plain["curve"], searched["curve"]):
        weight = lambda_of(level_of(before["setting"]))
        costs = [row["bpp"] + weight * 255**2 * 10 ** (-row["psnr_pooled"] / 10) for row in (before, after)]
        assert costs[1] < costs[0]
        assert "ideal_bpp" in before and "ideal_bpp" not in after and after["encode_stages"]["search"] > 0
    assert (tmp_path / "hyperprior-test-24.points.jsonl").exists()
    with pytest.raises(UsageError, match="number of iterations"):
        Ours("hyperprior:test+many", [50])


def test_warming_up_does_not_search(pictures, monkeypatch):
    """Nor does a warm-up that fails leave a subject without its search."""
    subject, sample = Ours("hyperprior:test+24", [50]), np.asarray(Image.open(next(iter(sorted(pictures.iterdir())))))
    search = subject._search
    monkeypatch.setattr(type(search), "__call__", lambda *_: pytest.fail("searched"))
    subject.warm_up(sample, 50)
    with pytest.raises(Exception, match="shape|dim|unpack|index"):
        subject.warm_up(sample[0, 0], 50)
    assert subject._search is search


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(pictures, tmp_path, capsys):
    code = main(["eval", str(pictures), "--codec", "hyperprior:test", "--device", "cuda", "--out", str(tmp_path), "--quiet"])
    assert code == 2 and "--device cpu" in capsys.readouterr().err


def test_the_table_prints_the_overhead(pictures, tmp_path, capsys):
    code = main(["eval", str(pictures), "--codec", "hyperprior:test", "--qualities", "20", "40", "60", "80", "--out",
                 str(tmp_path), "--quiet", "--threads", "1", "--metrics", "psnr"])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and "file/ideal" in out and "no anchor" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    over = run.overhead(summary["codecs"]["hyperprior:test"]["curve"])
    assert 0 < over < 0.1 and f"{over:+.2%}" in out


def test_a_failure_is_listed_and_the_others_count(pictures, tmp_path, peers, capsys):
    code = main(["eval", str(pictures), "--peers", *peers, "--anchor", peers[1], "--out", str(tmp_path), "--quiet",
                 "--threads", "1", "--metrics", "psnr"])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 1
    assert out.count("failed: fragile at") == 4 and "on 1.png: RuntimeError: cannot do this one" in out
    assert "fragile: the means are without 1.png" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [r["samples"] for r in summary["codecs"]["fragile"]["curve"]] == [1] * 4
    assert [r["samples"] for r in summary["codecs"]["steady"]["curve"]] == [2] * 4


def test_workers_that_die_fail_alone(tmp_path, monkeypatch):
    (tmp_path / "deadly").mkdir()
    (tmp_path / "deadly" / "__init__.py").touch()
    (tmp_path / "deadly" / "peers.py").write_text(
        "import os\n"
        "from neuralcodec.eval.peers_bytes import Zlib\n"
        "class Deadly(Zlib):\n"
        "    name, settings = 'deadly', (1,)\n"
        "    def encode(self, sample, setting):\n"
        "        if sample == b'poison':\n"
        "            os._exit(9)\n"
        "        return super().encode(sample, setting)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    data = tmp_path / "data"
    data.mkdir()
    for name, content in (("a", b"a" * 99), ("b", b"poison"), ("c", b"c" * 99)):
        (data / name).write_bytes(content)
    summary = run.evaluate(data, [], ["deadly.peers:Deadly"], tmp_path / "out", kind="bytes", jobs=2)
    assert summary["failures"] == ["deadly at 1 on b: its process died"]
    assert summary["codecs"]["deadly"]["left_out"] == ["b"]


def test_a_measured_anchor(pictures, tmp_path, peers):
    run.evaluate(pictures, [], [peers[1]], tmp_path / "a", metrics=["psnr"], threads=1)
    file = str(tmp_path / "a" / "steady.json")
    summary = run.evaluate(pictures, [], ["jpeg-444"], tmp_path / "b", metrics=["psnr"], threads=1, anchor=file)
    assert summary["anchor"] == "steady (measured)"
    assert summary["codecs"]["jpeg-444"]["bd_rate"]["akima"]["percent"] > 0  # 4:4:4 costs more PSNR-wise here
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(scene(176, 176)).save(other / "x.png")
    with pytest.raises(UsageError, match="measured on other pictures"):
        run.evaluate(other, [], ["jpeg"], tmp_path / "c", anchor=file, threads=1)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match="not a result"):
        run.evaluate(pictures, [], ["jpeg"], tmp_path / "c", anchor=str(tmp_path / "bad.json"))


def test_curves_without_overlap_say_so(capsys):
    rows = [{"setting": i, "bpp": 0.1 * 2**i, "psnr": 20.0 + i, "ms_ssim": None} for i in range(4)]
    far = {"name": "far", "bpp": [0.1, 0.2, 0.4, 0.8], "psnr": [40.0, 41.0, 42.0, 43.0]}
    cell = run.compare(far, rows)["bd_rate"]["akima"]
    assert cell == {"error": "the curves share 0% of their quality range; BD-rate needs 50%"}
    assert run.percent(cell) == "-"


@pytest.mark.parametrize(("arguments", "message"), [
    (["nowhere", "--peers", "jpeg"], "nowhere: no such folder or data set"),
    (["kodak", "--peers", "jpeg"], "kodak is not here: `codec fetch kodak`"),
    (["PICTURES", "--codec", "hyperprior:test", "--qualities", "50", "101"], "quality 101 is outside of 0..100"),
    (["PICTURES", "--codec", "hyperprior:test", "--qualities", "-1"], "quality -1 is outside of 0..100"),
    (["PICTURES", "--peers", "gif"], "codec 'gif' is unknown"),
    (["PICTURES", "--peers", "zlib"], "there is no peer 'zlib' for image"),
    (["PICTURES", "--peers", "jpeg", "--metrics", "vmaf"], "no metric 'vmaf' for pictures; known are psnr"),
    (["PICTURES", "--peers", "jpeg", "--anchor", "vtm"], "these pictures are no known data set"),
    (["PICTURES", "--peers", "jpeg", "--anchor", "kodak:vtm"], "was published for the pictures of kodak"),
    (["PICTURES", "--peers", "jpeg", "--kind", "grid"], "no fields in this folder"),
    (["PICTURES"], "nothing to measure"),
    (["--peers", "jpeg"], "which data?"),
])  # fmt: skip
def test_wrong_calls_are_one_line(arguments, message, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NEURALCODEC_DATA", str(tmp_path / "data"))
    arguments = [str(pictures) if a == "PICTURES" else a for a in arguments]
    code = main(["eval", *arguments, "--out", str(tmp_path / "out"), "--quiet", "--threads", "1"])
    seen = capsys.readouterr()
    assert code in (1, 2) and message in seen.out + seen.err
    assert "Traceback" not in seen.err


def test_a_file_that_is_no_picture_is_listed(pictures, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.fromarray(scene(176, 176)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(folder / "deep.png")
    code = main(["eval", str(folder), "--peers", "jpeg", "--metrics", "psnr", "--out", str(tmp_path / "o"), "--quiet",
                 "--threads", "1"])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 1 and "1 pictures" in out and "bad.png" in out and "only 8 are measured" in out


def test_wrong_pictures_of_a_known_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NEURALCODEC_DATA", str(tmp_path))
    (tmp_path / "kodak").mkdir()
    for i in range(1, 25):
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "kodak" / f"kodim{i:02}.png")
    code = main(["eval", "kodak", "--peers", "jpeg", "--out", str(tmp_path / "o")])
    assert code == 1 and "kodim01.png has other pixels than the set's picture" in capsys.readouterr().err


def test_peers_by_name():
    assert {"jpeg", "webp", "avif", "jxl", "jpeg2000", "compressai-mbt2018"} <= known("image").keys()
    assert is_peer("zlib") and is_peer("x265") and is_peer("some.module:Class") and not is_peer("hyperprior:light")
    with pytest.raises(UsageError, match="there is no peer 'nothing' for bytes"):
        peer("nothing", "bytes")


def test_every_picture_peer_keeps_the_contract():
    rgb = scene(65, 98)
    for name, cls in known("image").items():
        if name.startswith("compressai-"):
            continue
        try:
            subject = cls()
        except UsageError as error:  # a Pillow or imagecodecs without that library
            assert f"peer {name}" in str(error)
            continue
        low, high = (subject.encode(rgb, s) for s in (subject.settings[0], subject.settings[-1]))
        assert len(low) < len(high), name
        decoded = subject.decode(high)
        assert decoded.shape == rgb.shape and decoded.dtype == np.uint8, name
        errors = [KINDS["image"].compare(rgb, subject.decode(d), ["psnr"])["psnr"] for d in (low, high)]
        assert errors[0] < errors[1], name


def test_compressai_needs_its_checkpoints(tmp_path, monkeypatch):
    zoo = pytest.importorskip("compressai.zoo")
    import torch

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UsageError, match=r"no checkpoints here; put bmshj2018-factorized-prior-1-446d5c7f.pth.tar"):
        peer("compressai-bmshj2018-factorized")
    (tmp_path / "checkpoints").mkdir()
    model = zoo.bmshj2018_factorized(1, pretrained=False)  # what it codes is of no interest, that it comes back is
    model.update(force=True)
    torch.save(model.state_dict(), tmp_path / "checkpoints" / "bmshj2018-factorized-prior-1-446d5c7f.pth.tar")
    subject = peer("compressai-bmshj2018-factorized")
    assert subject.settings == (1,)
    rgb = scene(70, 130)
    data = subject.encode(rgb, 1)
    assert subject.decode(data).shape == rgb.shape and subject.decode(data).std() >= 0
    assert np.array_equal(subject.decode(data), subject.decode(subject.encode(rgb, 1)))


def test_a_missing_library_is_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(UsageError, match="peer jxl: needs the package imagecodecs: pip install imagecodecs"):
        peer("jxl")


def test_grey_pictures_are_repeated(tmp_path):
    Image.fromarray(scene(20, 20)[..., 0]).save(tmp_path / "g.png")
    rgb = KINDS["image"].read(Item(tmp_path / "g.png"))
    assert rgb.shape == (20, 20, 3) and np.array_equal(rgb[..., 0], rgb[..., 2])


def test_a_card_takes_what_was_measured(tmp_path, monkeypatch):
    for end in ("json", "safetensors"):
        shutil.copy(registry.WEIGHTS / f"hyperprior-test.{end}", tmp_path)
    monkeypatch.setenv("NEURALCODEC_WEIGHTS", str(tmp_path))
    curve = [{"setting": q, "bpp": 0.1 + q / 50, "psnr": 30.0 + q, "ms_ssim": 0.9} for q in (0.0, 42.5)]
    rates = {"bd_rate": {"akima": {"percent": 12.346}}, "bd_rate_ms_ssim": {"akima": {"error": "no overlap"}}}
    summary = {"dataset": "few", "dataset_sha256": "ab", "anchor": "kodak:vtm (published)",
               "codecs": {"hyperprior:test": {"curve": curve, **rates}}}  # fmt: skip
    write_measured("hyperprior:test", summary)
    measured = json.loads((tmp_path / "hyperprior-test.json").read_text())["measured"]["few"]
    assert measured["command"] == "codec eval --dataset few --codec hyperprior:test --qualities 0 42.5 --metrics psnr ms_ssim"
    assert measured["bd_rate_vtm"] == 12.35 and "bd_rate_vtm_ms_ssim" not in measured and measured["curve"] == curve
    write_measured("hyperprior:test+80", summary | {"codecs": {"hyperprior:test+80": {"curve": curve, **rates}}})
    both = json.loads((tmp_path / "hyperprior-test.json").read_text())["measured"]
    assert both["few"] == measured and "hyperprior:test+80" in both["few+80"]["command"]
    rates["bd_rate_ms_ssim"]["akima"] = {"percent": -1.0}
    write_measured("hyperprior:test", summary | {"codecs": {"hyperprior:test": {"curve": curve, **rates}}})
    assert json.loads((tmp_path / "hyperprior-test.json").read_text())["measured"]["few"]["bd_rate_vtm_ms_ssim"] == -1.0
