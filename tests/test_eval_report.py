"""Plots and the HTML report: opened in a real browser, where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import scene
from neuralcodec.cli import main
from neuralcodec.container.errors import CodecError, UsageError
from neuralcodec.eval import bench_curves, plot, report
from neuralcodec.eval.ratemap import bits_per_pixel, latent_bits
from neuralcodec.eval.subject import Ours
from PIL import Image

pytest.importorskip("bjontegaard")
BROWSER = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const stage = document.querySelector(".stage"), slider = stage.querySelector("input");
  const [below, above] = stage.querySelectorAll("img"), bar = stage.querySelector(".bar");
  const state = () => ({clip: getComputedStyle(above).clipPath, bar: bar.getBoundingClientRect().x});
  const at = [state()];
  for (const value of [10, 90]) {
    slider.value = value;
    slider.dispatchEvent(new Event("input", {bubbles: true}));
    at.push(state());
  }
  const tags = () => [...stage.querySelectorAll(".tag b")].map(t => t.textContent);
  const before = [above.src, tags()[0]];
  const select = document.querySelector("select");
  select.selectedIndex = 0;
  select.dispatchEvent(new Event("change"));
  const after = [above.src, tags()[0]];
  document.querySelectorAll(".tabs button")[1].click();
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({
    images: [...document.images].map(i => [i.alt, i.naturalWidth, i.naturalHeight]),
    charts: [...document.querySelectorAll("svg")]
      .map(s => [s.getBoundingClientRect().width, s.querySelectorAll("path,image,text").length]),
    tables: [...document.querySelectorAll("table")].map(t => [t.rows.length, t.innerText.length]),
    at, before, after, second: above.src !== after[0],
    shown: [...document.querySelectorAll(".scene")].map(s => s.offsetHeight > 0),
    external: [...document.querySelectorAll("[src],[href]")].map(e => e.src || e.href.baseVal || e.href)
      .filter(u => !u.startsWith("data:") && !u.startsWith("#")),
    wide: document.documentElement.scrollWidth > innerWidth});
  document.body.append(out);
}, 100));
</script>"""


def browse(*arguments: str, page: Path) -> str:
    """Output of a headless Chromium about a page. Skips where there is no browser that starts."""
    if not BROWSER:
        pytest.skip("no Chromium here: apt-get install chromium")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
               "--virtual-time-budget=5000", f"--user-data-dir={page.parent / 'profile'}"]  # fmt: skip
    done = subprocess.run([*command, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"{BROWSER} does not start here: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A folder with pictures, results of two codecs and the report about them."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "pictures").mkdir()
    for i in range(2):
        Image.fromarray(scene(176, 208, i)).save(folder / "pictures" / f"{i} <b>.png")
    code = main(["eval", str(folder / "pictures"), "--codec", "hyperprior:test", "--peers", "jpeg", "--qualities", "0", "25",
                 "50", "75", "100", "--out", str(folder / "out"), "--report", str(folder / "page.html"), "--quiet",
                 "--threads", "1"])  # fmt: skip
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def probe(measured) -> dict:
    page = measured / "probed.html"
    page.write_text((measured / "page.html").read_text().replace("</body>", PROBE + "</body>"))
    dom = browse("--dump-dom", "--window-size=1200,1000", page=page)
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)
    assert found, "the page's script did not run to its end"
    return json.loads(html.unescape(found[1]))


def test_every_picture_and_table_renders(probe):
    assert len(probe["images"]) == 2 + 2 * 3  # the stage, and two scenes of three
    assert all(w > 0 and h > 0 for _, w, h in probe["images"]), probe["images"]
    assert len(probe["charts"]) >= 4 and all(width > 200 and marks > 10 for width, marks in probe["charts"])
    assert len(probe["tables"]) == 2 and probe["tables"][0][0] == 3 and all(text > 50 for _, text in probe["tables"][:1])
    assert not probe["wide"]


def test_the_slider_moves_and_the_choices_work(probe):
    clips, bars = [s["clip"] for s in probe["at"]], [s["bar"] for s in probe["at"]]
    assert clips == ["inset(0px 50% 0px 0px)", "inset(0px 90% 0px 0px)", "inset(0px 10% 0px 0px)"] and len(set(bars)) == 3
    assert bars[1] < bars[0] < bars[2]
    assert probe["before"][0] != probe["after"][0]
    assert (probe["before"][1], probe["after"][1]) == ("hyperprior:test", "original")
    assert probe["shown"] == [False, True] and probe["second"]


def test_nothing_is_loaded_from_elsewhere(probe, measured):
    assert probe["external"] == []
    page = (measured / "page.html").read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//|url\((?!["']?[#d])|@import""", page)
    assert "<b>.png</" not in page and "0 &lt;b&gt;.png" in page  # names of files are text


def test_the_screen_shows_both_halves(measured):
    """The left half of the stage is another picture than with the slider at the other end: pixels, not promises."""
    shots = []
    for split in ("0%", "100%"):
        page = measured / f"split{split[:-1]}.html"
        page.write_text((measured / "page.html").read_text().replace("--split: 50%", f"--split: {split}"))
        target = page.with_suffix(".png")
        browse(f"--screenshot={target}", "--window-size=1000,900", page=page)
        shots.append(np.asarray(Image.open(target).convert("RGB")).astype(int))
    assert shots[0].std() > 20
    changed = np.abs(shots[0] - shots[1]).max(2) > 8
    assert 0.05 < changed.mean() < 0.9


def test_codecs_are_shown_at_equal_rate(measured):
    page = (measured / "page.html").read_text()
    for part in page.split('class="strip scene"')[1:]:
        rates = [float(r) for r in re.findall(r"</b>([\d.]+) bpp, [\d.]+ dB", part.split("</section>")[0])]
        assert len(rates) == 2 and max(rates) / min(rates) < 1.12  # small files come in steps


def test_the_busiest_window():
    picture = np.full((100, 200, 3), 90, np.uint8)
    picture[60:90, 120:180] = scene(30, 60)
    rows, columns = report.busiest(picture, (30, 60))
    assert abs(rows.start - 60) <= 2 and abs(columns.start - 120) <= 2
    assert report.busiest(picture, (300, 60))[0] == slice(0, 100)


def test_a_report_needs_results(tmp_path):
    with pytest.raises(CodecError, match="nothing was measured"):
        report.write_report(tmp_path / "x.html", {"codecs": {}}, tmp_path, tmp_path)


@pytest.mark.parametrize("what", ["rd", "rd-ms-ssim", "speed"])
def test_plots_of_results(what, measured, tmp_path):
    target = tmp_path / "plot.svg"
    assert main(["plot", str(measured / "out"), "--what", what, "-o", str(target)]) == 0
    text = target.read_text()
    assert "hyperprior:test" in text and ">jpeg<" in text


def test_measured_is_solid_and_published_dashed(measured):
    results = [r | {"dataset": "kodak"} for r in plot.load_results([measured / "out"])]
    lines = {line.get_label(): line for line in plot.rd_chart(results, published=["vtm"]).axes[0].lines}
    assert lines["VTM (published)"].is_dashed() and not lines["jpeg"].is_dashed()
    assert list(lines["jpeg"].get_ydata()) == [r["psnr"] for r in next(r for r in results if r["codec"] == "jpeg")["curve"]]


def test_plots_of_a_model(tmp_path, measured):
    picture = str(measured / "pictures" / "1 <b>.png")
    for what in ("channels", "rate-map"):
        target = tmp_path / f"{what}.png"
        assert main(["plot", picture, "--what", what, "--codec", "hyperprior:test", "-q", "70", "-o", str(target)]) == 0
        assert np.asarray(Image.open(target).convert("L")).std() > 5


@pytest.mark.parametrize(("arguments", "message"), [
    (["NOTHING", "-o", "x.svg"], "no results of `codec eval`"),
    (["OUT", "-o", "x.gif"], "svg, pdf or png"),
    (["OUT", "-o", "x.svg", "--published", "vtm"], "no published anchor 'vtm' for pictures"),
    (["OUT/missing.json", "-o", "x.svg"], "not a result"),
    (["PICTURE", "--what", "rate-map", "--codec", "hyperprior:test", "-q", "101"], "outside of 0..100"),
])  # fmt: skip
def test_wrong_plots_are_one_line(arguments, message, measured, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    names = {"NOTHING": tmp_path / "nothing", "OUT": measured / "out", "OUT/missing.json": measured / "out" / "missing.json",
             "PICTURE": measured / "pictures" / "1 <b>.png"}  # fmt: skip
    assert main(["plot", *(str(names.get(a, a)) for a in arguments)]) in (1, 2)
    assert message in capsys.readouterr().err


def test_bits_of_the_latent_add_up_and_lie_where_the_detail_is(codec):
    flat = np.full((128, 384, 3), 120, np.uint8)
    picture = flat.copy()
    picture[:, :128] = scene(128, 128)
    y, z = latent_bits(codec, picture, 600)
    assert y.shape == (codec.config.latent.channels, 8, 24) and z.shape == (codec.config.latent.hyper, 2, 6)
    total = Ours("hyperprior:test", [60]).ideal_bits(picture, 60)
    assert y.sum() + z.sum() == pytest.approx(total)
    rates = bits_per_pixel(y, z)
    assert rates.sum() * 256 == pytest.approx(total)
    changed = np.abs(y - latent_bits(codec, flat, 600)[0]).sum((0, 1))  # by column: the detail is in the first eight
    assert changed[:8].min() > 10 * changed[18:].max()


@pytest.mark.slow
def test_cost_curves_in_processes_of_their_own():
    result = bench_curves.bench_curves("hyperprior:test", scene(100, 150), sizes=[0.02], threads=[1], at=0.01, repeats=1)
    assert [p["megapixels"] for p in result["sizes"] + result["threads"]] == pytest.approx([0.02, 0.01], rel=0.03)
    assert bench_curves.bench_curves("hyperprior:nothing", scene(9, 9), sizes=[0.01], threads=[1])["sizes"][0]["error"]


def test_cost_curves(tmp_path):
    point, other = (bench_curves.measure("hyperprior:test", scene(100, 150), size, 1, 50.0, 1) for size in (0.02, 0.01))
    for p in (point, other):
        for side in ("encode", "decode"):
            assert sum(p[side]["stages"].values()) == pytest.approx(p[side]["seconds"], rel=0.01)
            assert p[side]["peak_mib"] >= p["base_mib"] > 50
    assert point["bytes"] > other["bytes"] and point["megapixels"] == pytest.approx(0.02, rel=0.01)
    result = {"model": "hyperprior:test", "quality": 50.0, "sizes": [other, point], "threads": [other]}
    plot.write(bench_curves.chart(result), tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width > 1000
    failed = result | {"sizes": [{"megapixels": 1, "threads": 1, "error": "out of memory"}]}
    with pytest.raises(UsageError, match="out of memory"):
        bench_curves.chart(failed)


def test_pictures_of_any_size():
    rgb = scene(33, 47)
    for megapixels in (0.001, 0.05, 1.3):
        made = bench_curves.picture_of(rgb, megapixels)
        assert made.shape[0] * made.shape[1] == pytest.approx(megapixels * 1e6, rel=0.05)
    assert np.array_equal(made[:33, :47], rgb)
