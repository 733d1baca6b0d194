"""``codec eval --report``: one HTML page that needs nothing else, with tables, plots and pictures side by side."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from ..container.errors import CodecError
from ..media.files import atomic_write
from .kinds import KINDS, Item
from .plot import channels_chart, colours, inline_svg, load_results, rate_map_chart, rd_chart, speed_chart
from .run import heading, make, remarks, samples_of, stem_of, table
from .subject import Ours, Subject

SCENES = 3
CROP = 320, 480  # rows, columns
AIM = 0.3  # bits per pixel over the set at which codecs are shown: low enough to see what each of them gives up
TRIES = 4

Crop = tuple[str, str, np.ndarray]  # name, caption, pixels


def _text(value: Any) -> str:
    return html.escape(str(value))


def picture_url(rgb: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as a data address, without loss."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "WEBP", lossless=True, quality=60, method=3)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def busiest(rgb: np.ndarray, size: tuple[int, int] = CROP) -> tuple[slice, slice]:
    """The window with the most detail: mean gradient of the luma, without letting a single strong edge decide."""
    h, w = (min(a, b) for a, b in zip(rgb.shape, size))
    luma = rgb.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    detail = np.zeros_like(luma)
    detail[1:, 1:] = np.minimum(np.abs(np.diff(luma, axis=0))[:, 1:] + np.abs(np.diff(luma, axis=1))[1:], 24)
    total = np.pad(detail.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    sums = total[h:, w:] - total[:-h, w:] - total[h:, :-w] + total[:-h, :-w]
    row, column = np.unravel_index(int(sums.argmax()), sums.shape)
    return slice(int(row), int(row) + h), slice(int(column), int(column) + w)


def at_rate(subject: Subject, rgb: np.ndarray, points: list[dict[str, Any]], size: int) -> tuple[bytes, np.ndarray]:
    """A file of about ``size`` bytes, and its picture. ``points`` of this picture say where to look.

    The settings between two measured ones are tried too: every picture codec here takes any number in its range.
    """
    ordered = sorted(points, key=lambda p: p["setting"])
    low = max((p for p in ordered if p["bytes"] <= size), key=lambda p: p["bytes"], default=ordered[0])
    high = min((p for p in ordered if p["bytes"] >= size), key=lambda p: p["bytes"], default=ordered[-1])
    ends = [(low["setting"], low["bytes"]), (high["setting"], high["bytes"])]
    near = min((low, high), key=lambda p: abs(p["bytes"] - size))
    best = subject.encode(rgb, near["setting"])
    for _ in range(TRIES):
        (a, small), (b, large) = ends
        if abs(len(best) - size) <= 0.01 * size or not small < size < large:
            break
        middle = a + (b - a) * float(np.clip(np.log(size / small) / np.log(large / small), 0.15, 0.85))
        data = subject.encode(rgb, middle)
        if abs(len(data) - size) < abs(len(best) - size):
            best = data
        ends[len(data) >= size] = middle, len(data)
    return best, subject.decode(best)


def scenes_of(results: list[dict[str, Any]], count: int = SCENES) -> list[tuple[str, int]]:
    """(picture, bytes to compare at): an easy, a middling and a hard picture, at a rate that every codec reaches."""
    lead = next((r for r in results if r["ours"]), results[0])
    aim = min(lead["curve"], key=lambda r: abs(np.log(r["bpp"] / AIM)))["setting"]
    sizes = {p["name"]: p["bytes"] for p in lead["points"] if p["setting"] == aim}
    everywhere = [n for n in sizes if all(any(p["name"] == n for p in r["points"]) for r in results)]
    ranked = sorted(everywhere, key=lambda n: sizes[n])
    count = min(count, len(ranked))
    chosen = dict.fromkeys(ranked[round((len(ranked) - 1) * (i + 0.5) / count)] for i in range(count))
    scenes = []
    for name in chosen:
        mine = [[p["bytes"] for p in r["points"] if p["name"] == name] for r in results]
        scenes.append((name, int(np.clip(sizes[name], max(map(min, mine)), min(map(max, mine))))))
    return scenes


def crops(results: list[dict[str, Any]], subjects: dict[str, Subject], name: str, item: Item, size: int) -> list[Crop]:
    """The original and what each codec makes of it at about ``size`` bytes, cut to the part with the most detail."""
    from .metrics import psnr_rgb

    rgb = KINDS["image"].read(item)
    window = busiest(rgb)
    pixels = rgb.shape[0] * rgb.shape[1]
    made: list[Crop] = [("original", f"{rgb.shape[1]} x {rgb.shape[0]}", rgb[window])]
    for result in results:
        if result["codec"] not in subjects:
            continue
        data, decoded = at_rate(subjects[result["codec"]], rgb, [p for p in result["points"] if p["name"] == name], size)
        caption = f"{len(data) * 8 / pixels:.3f} bpp, {psnr_rgb(rgb, decoded):.2f} dB"
        made.append((result["codec"], caption, decoded[window]))
    return made


def viewer(scenes: list[tuple[str, list[Crop]]]) -> str:
    """The section with the slider. Its pictures are in the page once; the large ones refer to the small ones."""
    names = [name for name, _, _ in scenes[0][1]]
    blank = picture_url(np.full((2, 3, 3), 128, np.uint8))

    def options(chosen: int) -> str:
        return "".join(f"<option{' selected' if i == chosen else ''}>{_text(n)}</option>" for i, n in enumerate(names))

    def shown(name: str, label: str, caption: str, rgb: np.ndarray) -> str:
        size = f'width="{rgb.shape[1]}" height="{rgb.shape[0]}"'
        image = f'<img alt="{_text(name)}: {_text(label)}" src="{picture_url(rgb)}" {size}>'
        return f"<figure>{image}<figcaption><b>{_text(label)}</b>{_text(caption)}</figcaption></figure>"

    tabs, strips = "", ""
    for i, (name, made) in enumerate(scenes):
        tabs += f'<button type="button" aria-pressed="{str(not i).lower()}">{_text(name)}</button>'
        figures = "".join(shown(name, *crop) for crop in made)
        strips += f'<div class="strip scene"{" hidden" if i else ""}>{figures}</div>'
    last = min(2, len(names) - 1)
    return (
        '<section class="viewer"><h2>Side by side, at equal rate</h2>'
        '<p class="soft">Every codec was asked for the same number of bytes. Drag the line, or use the arrow keys.</p>'
        f'<div class="controls"><div class="tabs">{tabs}</div><label>left <select>{options(min(1, last))}</select></label>'
        f"<label>right <select>{options(last)}</select></label></div>"
        f'<div class="stage"><img alt="right" src="{blank}"><img class="over" alt="left" src="{blank}">'
        '<input type="range" min="0" max="100" step="0.1" value="50" aria-label="where the left picture ends">'
        f'<div class="bar"></div><div class="tag l"></div><div class="tag r"></div></div>{strips}</section>'
    )


def html_table(titles: list[str], lines: list[list[str]], mark: Callable[[str], str], ours: set[str]) -> str:
    """A table whose first column names codecs."""
    head = "".join(f"<th>{_text(t)}</th>" for t in titles)
    body = "".join(
        f'<tr{" class=ours" if line[0] in ours else ""}><td>{mark(line[0])}{_text(line[0])}</td>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in line[1:]) + "</tr>"
        for line in lines
    )  # fmt: skip
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _details(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Every setting of every codec, all numbers that are means."""
    keys = [k for k, v in results[0]["curve"][0].items() if not isinstance(v, dict) and k not in ("setting", "samples")]
    lines = []
    for result in results:
        for row in result["curve"]:
            cells = ["-" if (v := row.get(k)) is None else f"{v:.4g}" for k in keys]
            lines.append([result["codec"], f"{row['setting']:g}", *cells])
    return ["codec", "setting", *(k.replace("_", " ") for k in keys)], lines


def _charts(results: list[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    """The plots that these results allow, each a section."""
    kind = KINDS[summary["kind"]]
    made = [("Rate and quality" if kind.quality else "Rate", lambda: rd_chart(results, title=" "))]
    if kind.quality == "psnr":
        made.append(("Rate and structural similarity", lambda: rd_chart(results, "ms_ssim", title=" ")))
    made.append(("Rate and time", lambda: speed_chart(results, title=" ")))
    parts = []
    for title, draw in made:
        try:
            parts.append(f"<section><h2>{title}</h2>{inline_svg(draw())}</section>")
        except CodecError:  # nothing to draw: no BD-rate, or no such metric
            continue
    return parts


def _where_bits_go(model: Ours, name: str, item: Item) -> tuple[str, str]:
    """Sections with the rate map and with the channels of one of our models."""
    from ..codecs.base import level_of
    from .ratemap import bits_per_pixel, latent_bits

    rgb = KINDS["image"].read(item)
    quality = model.settings[len(model.settings) // 2]
    y, z = latent_bits(model.codec, rgb, level_of(quality))
    about = f'<p class="soft">{_text(model.name)} at quality {quality:g}, {_text(name)}</p>'
    grid = rate_map_chart(rgb, bits_per_pixel(y, z, model.codec.stride), model.codec.stride, "bits over the picture")
    bars = channels_chart(y, rgb.shape[0] * rgb.shape[1], " ")
    titles = "Where the bits go", "Bits of each latent channel"
    return tuple(f"<section><h2>{t}</h2>{about}{inline_svg(c)}</section>" for t, c in zip(titles, (grid, bars)))


def render(summary: dict[str, Any], results: list[dict[str, Any]], samples: dict[str, Item]) -> str:
    """The page. ``results``: those of each codec, with their points; ``samples``: where to read the data again."""
    kind, palette = KINDS[summary["kind"]], colours(results)
    results = sorted(results, key=lambda r: not r["ours"])
    ours = {r["codec"] for r in results if r["ours"]}

    def mark(name: str) -> str:
        return f'<span class="dot" style="background:{palette[name]}"></span>' if name in palette else ""

    notes = remarks(summary)
    sections: list[str] = []
    subjects: dict[str, Subject] = {}
    scenes: list[tuple[str, list[Crop]]] = []
    if kind.name == "image":
        for result in results:
            try:
                subjects[result["codec"]] = make(result["codec"], [p["setting"] for p in result["curve"]])
            except CodecError as error:
                notes.append(f"{result['codec']} is not among the pictures: {error}")
        scenes = [(n, crops(results, subjects, n, samples[n], size)) for n, size in scenes_of(results) if n in samples]
        if scenes:
            sections.append(viewer(scenes))
    titles, lines = table(summary)
    lines.sort(key=lambda line: line[0] not in ours)
    every = f"<details><summary>every setting</summary>{html_table(*_details(results), mark, set())}</details>"
    sections.append(f"<section><h2>Results</h2>{html_table(titles, lines, mark, ours)}{every}</section>")
    charts, maps = _charts(results, summary), []
    for model in [s for s in subjects.values() if isinstance(s, Ours)] if scenes else []:
        try:
            grid, channels = _where_bits_go(model, scenes[0][0], samples[scenes[0][0]])
            maps.append(grid)
            charts.append(channels)
        except CodecError as error:
            notes.append(f"{model.name}: no map of its bits ({error})")
    sections += [f'<div class="pair">{"".join(charts)}</div>', *maps]
    if notes:
        items = "".join(f"<li>{_text(n)}</li>" for n in notes)
        sections.append(f'<section><h2>Remarks</h2><ul class="remarks">{items}</ul></section>')
    machine = summary["environment"]
    facts = {
        "data": f"{summary['dataset']}, sha256 {summary['dataset_sha256']}", "anchor": summary["anchor_source"] or "none",
        "machine": f"{machine['machine']}, {machine['cores']} cores; {machine['jobs']} at once, {machine['threads']} threads",
        "commit": machine["commit"] or "unknown",
        "packages": ", ".join(f"{k} {v}" for k, v in machine["packages"].items()),
    } | {r["codec"]: r["describe"] for r in results}  # fmt: skip
    footer = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    plain = json.dumps(summary).replace("<", "\\u003c")
    names = [r["codec"] for r in results]
    return Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        title=_text(f"{summary['dataset']}: {' · '.join(names)}"), subtitle=_text(heading(summary)),
        body="\n".join(sections), footer=f"<dl>{footer}</dl>", summary=plain,
    )  # fmt: skip


def write_report(target: Path, summary: dict[str, Any], out: Path, spec: str | Path) -> None:
    """Write the page about a run: ``summary`` of ``evaluate`` and the folder ``out`` of its results, about ``spec``.

    The pictures are coded once more, at equal rate. CodecError when the data are no longer there. """
    codecs = [n for n, e in summary["codecs"].items() if e["curve"]]
    if not codecs:
        raise CodecError(f"{target}: nothing was measured, so there is nothing to report")
    results = load_results(out / f"{stem_of(n)}.json" for n in codecs)
    _, _, samples, _ = samples_of(spec, summary["kind"])
    page = render(summary, results, {name: item for name, (_, item) in samples.items()})
    with atomic_write(target, overwrite=True) as file:
        file.write(page.encode())
