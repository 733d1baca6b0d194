"""``codec plot``: what ``codec eval`` measured, and where a model spends its bits, as pictures.

Measured curves are solid, published ones dashed: a published number was measured by somebody else, elsewhere. """

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..container.errors import UsageError
from .bdrate import anchor_names, load_anchor
from .kinds import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PUBLISHED = ("vtm", "hm", "bpg_444_x265_ycbcr", "mbt2018_mse")
INK, FAINT = "#1f2328", "#b3b9c2"
COLOURS = ("#2f6fde", "#d9622b", "#2e9e6b", "#9a5bd0", "#c9a012", "#d0417e", "#2aa1b3", "#7d6b5d", "#6b7f2a", "#a03a3a")
GREYS = ("#7a828e", "#a08c6c", "#8d7fa5", "#6f9a92")
AXIS = {"psnr": "PSNR (RGB), dB", "snr": "SNR, dB (area-weighted)", "ms_ssim": "MS-SSIM, dB"}


def load_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The results in JSON files of ``codec eval``, or in folders of them, in the order given. UsageError without any,
    and for results of different data sets."""
    found: list[dict[str, Any]] = []
    for path in paths:
        for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
            try:
                content = json.loads(file.read_text())
            except (OSError, ValueError) as error:
                raise UsageError(f"{file}: not a result of `codec eval` ({error})") from None
            if isinstance(content, dict) and {"codec", "curve", "kind"} <= content.keys():
                found += [content] if content["curve"] else []
            elif not path.is_dir():
                raise UsageError(f"{file}: not a result of `codec eval` for one codec")
    if not found:
        raise UsageError(f"no results of `codec eval` in {', '.join(map(str, paths))}")
    if len({r["dataset_sha256"] for r in found}) > 1:
        raise UsageError(f"results of different data: {', '.join(sorted({r['dataset'] for r in found}))}")
    return found


def figure(width: float = 6.2, height: float = 4.3) -> tuple[Figure, Axes]:
    """An empty chart in the style of all; transparent, without frame."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style = {
        "font.size": 10, "font.family": "sans-serif", "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
        "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": FAINT, "grid.linewidth": 0.5, "grid.alpha": 0.5, "svg.fonttype": "none", "legend.frameon": False,
        "xtick.major.size": 0, "ytick.major.size": 0, "axes.axisbelow": True,
    }  # fmt: skip
    with pyplot.rc_context(style):
        made, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    return made, axes


def write(made: Figure, target: Path) -> None:
    """Save a chart by its suffix. UsageError for a format that matplotlib does not write."""
    if target.suffix.lower()[1:] not in made.canvas.get_supported_filetypes():
        raise UsageError(f"{target}: pictures are written as svg, pdf or png")
    from matplotlib import pyplot

    from ..media.files import atomic_write

    with pyplot.rc_context({"svg.fonttype": "none"}), atomic_write(target, overwrite=True) as file:
        made.savefig(file, format=target.suffix.lower()[1:], dpi=160, facecolor="white")
    pyplot.close(made)


def inline_svg(made: Figure) -> str:
    """A chart as an <svg> element that takes text colour and font of the page around it."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    with pyplot.rc_context({"svg.fonttype": "none"}):
        made.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(made)
    text = buffer.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)
    text = re.sub(r"font: ([^;\"]*?)[\d.]+px [^;\"]*", lambda m: "font-size: " + _size(m[0]), text)
    return text.replace(INK, "currentColor")


def _size(font: str) -> str:
    found = re.search(r"[\d.]+px", font)
    return found[0] if found else "10px"


def colours(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A colour for each codec, ours first."""
    order = sorted(results, key=lambda r: not r["ours"])
    return {r["codec"]: COLOURS[i % len(COLOURS)] for i, r in enumerate(order)}


def _decibel(values: Sequence[float | None], quality: str) -> list[float]:
    from .metrics import decibel

    return [decibel(v) if quality == "ms_ssim" else v for v in values]


def rd_chart(results: list[dict[str, Any]], quality: str | None = None, published: Sequence[str] | None = None,
             title: str | None = None) -> Figure:  # fmt: skip
    """Quality against rate (logarithmic): measured curves solid, published ones of the same data set dashed.

    ``published``: names of curves, None for the usual ones. UsageError when no result has the quality. """
    first = results[0]
    kind = KINDS[first["kind"]]
    if kind.quality is None:
        return _bars(results, title)
    quality = quality or kind.quality
    made, axes = figure()
    palette, drawn = colours(results), 0
    names = [n for n in PUBLISHED if n in anchor_names(first["dataset"])] if published is None else list(published)
    for i, name in enumerate(names):
        curve = load_anchor(first["dataset"], name)
        if quality in curve:
            axes.plot(curve["bpp"], _decibel(curve[quality], quality), ls=(0, (4, 2 + i)), lw=1.1, color=GREYS[i % len(GREYS)],
                      marker=".", ms=3, label=f"{curve['name']} (published)")  # fmt: skip
    rates = [r[kind.rate] for result in results for r in result["curve"]]
    for result in sorted(results, key=lambda r: r["ours"]):
        rows = [r for r in result["curve"] if r.get(quality) is not None]
        if rows:
            drawn += 1
            axes.plot([r[kind.rate] for r in rows], _decibel([r[quality] for r in rows], quality), "-o", ms=3.5,
                      lw=2.2 if result["ours"] else 1.4, color=palette[result["codec"]], label=result["codec"])  # fmt: skip
    if not drawn:
        raise UsageError(f"none of the results has {quality}")
    axes.set_xscale("log")
    axes.set_xlim(min(rates) * 0.9, max(rates) * 1.1)
    visible = [y for line in axes.lines for x, y in zip(*line.get_data()) if min(rates) * 0.9 <= x <= max(rates) * 1.1]
    margin = 0.04 * (max(visible) - min(visible)) or 1.0
    axes.set_ylim(min(visible) - margin, max(visible) + margin)
    from matplotlib.ticker import FuncFormatter, LogLocator

    for locate in (axes.xaxis.set_major_locator, axes.xaxis.set_minor_locator):
        locate(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    axes.set_xlabel(kind.rate_title)
    axes.set_ylabel(AXIS.get(quality, quality))
    axes.set_title(title or f"{first['dataset']}: {first['samples']} {kind.noun}", loc="left", weight="bold")
    handles, labels = axes.get_legend_handles_labels()
    solid = sorted(range(len(labels)), key=lambda i: "(published)" in labels[i])
    sorted_legend = [handles[i] for i in solid], [labels[i] for i in solid]
    axes.legend(*sorted_legend, loc="upper left", fontsize=8.5, frameon=False, labelcolor=INK)
    return made


def _bars(results: list[dict[str, Any]], title: str | None) -> Figure:
    """Smallest rate of each codec, for data that must come back exactly."""
    made, axes = figure(7, 0.8 + 0.42 * len(results))
    kind, palette = KINDS[results[0]["kind"]], colours(results)
    order = sorted(results, key=lambda r: -r["curve"][0][kind.rate])
    values = [r["curve"][0][kind.rate] for r in order]
    bars = axes.barh([r["codec"] for r in order], values, color=[palette[r["codec"]] for r in order], height=0.62)
    axes.bar_label(bars, [f"{v:.3f}" for v in values], padding=4, color=INK)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    axes.set_xlabel(f"{kind.rate_title}, mean over {kind.noun}, at the strongest setting")
    axes.set_title(title or f"{results[0]['dataset']}: {results[0]['samples']} {kind.noun}", loc="left", weight="bold")
    return made


def speed_chart(results: list[dict[str, Any]], title: str | None = None) -> Figure:
    """BD-rate against decode time (logarithmic; mean of all settings). UsageError when nothing has a BD-rate."""
    made, axes = figure()
    palette = colours(results)
    points = []
    for result in results:
        cell = result.get("bd_rate", {}).get("akima") or result.get("difference", {})
        if "percent" in cell:
            points.append((float(np.mean([r["decode_s"] for r in result["curve"]])), cell["percent"], result))
    if not points:
        raise UsageError("none of the results has a BD-rate to draw against time")
    for i, (seconds, percent, result) in enumerate(sorted(points, key=lambda p: p[:2])):
        axes.scatter(seconds * 1e3, percent, s=90 if result["ours"] else 45, color=palette[result["codec"]], zorder=3)
        offset = (7, 7 if i % 2 else -13)
        axes.annotate(result["codec"], (seconds * 1e3, percent), offset, textcoords="offset points", color=INK)
    axes.axhline(0, color=FAINT, lw=1)
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.15)
    from matplotlib.ticker import FuncFormatter, LogLocator

    reach = max(p[0] for p in points) / min(p[0] for p in points)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if reach > 4 else (1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda v, _: ""))
    axes.set_xlabel("decode time, ms per sample")
    axes.set_ylabel(f"rate against {results[0]['anchor']}, %")
    axes.set_title(title or f"{results[0]['dataset']}: rate against time (down and left is better)", loc="left", weight="bold")
    return made


def channels_chart(bits: np.ndarray, pixels: int, title: str) -> Figure:
    """Bits per pixel of each channel of a latent (M, h, w), in coding order; the share of those that cost nothing."""
    made, axes = figure(6.2, 4.3)
    each = bits.sum((1, 2)) / pixels
    axes.bar(np.arange(len(each)), each, width=1.0, color=COLOURS[0])
    silent = float((each < 0.001 * each.sum()).mean()) if each.sum() else 1.0
    axes.set_xlabel(f"channel of the latent, in coding order; {silent:.0%} cost less than 0.1 % each")
    axes.set_ylabel("bits per pixel")
    axes.grid(axis="x", visible=False)
    axes.set_title(title, loc="left", weight="bold")
    return made


def rate_map_chart(rgb: np.ndarray, rates: np.ndarray, stride: int, title: str) -> Figure:
    """The picture, and bits per pixel of each cell (h, w) laid over a pale copy of it."""
    from matplotlib import pyplot

    h, w = rgb.shape[:2]
    made, axes = figure(11, 11 / 2 * h / w + 0.4)
    made.delaxes(axes)
    left, right = made.subplots(1, 2)
    for ax in (left, right):
        ax.set_axis_off()
    left.imshow(rgb)
    left.set_title("picture", loc="left", color=INK)
    grey = rgb.mean(2)
    right.imshow(grey, cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, rates.shape[1] * stride - 0.5, rates.shape[0] * stride - 0.5, -0.5)
    shown = right.imshow(rates, cmap="inferno", alpha=0.72, extent=extent, interpolation="nearest", vmin=0)
    right.set_xlim(-0.5, w - 0.5)
    right.set_ylim(h - 0.5, -0.5)
    right.set_title(title, loc="left", color=INK)
    with pyplot.rc_context({"xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT}):
        bar = made.colorbar(shown, ax=right, shrink=0.92, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("bits per pixel", color=INK)
    bar.ax.tick_params(colors=INK)
    return made


def _model_chart(args: argparse.Namespace) -> Figure:
    """``channels`` and ``rate-map``: of a picture, through a model."""
    from ..codecs import registry
    from ..codecs.base import level_of
    from .kinds import Item
    from .ratemap import bits_per_pixel, latent_bits

    if len(args.results) != 1:
        raise UsageError(f"--what {args.what} is of one picture")
    if not 0 <= args.quality <= 100:
        raise UsageError(f"quality {args.quality:g} is outside of 0..100")
    rgb = KINDS["image"].read(Item(args.results[0]))
    codec = registry.load(*registry.split(args.codec or registry.default("image")))
    y, z = latent_bits(codec, rgb, level_of(args.quality))
    title = args.title or f"{codec.name}:{codec.preset}, quality {args.quality:g}: {args.results[0].name}"
    if args.what == "channels":
        return channels_chart(y, rgb.shape[0] * rgb.shape[1], title)
    return rate_map_chart(rgb, bits_per_pixel(y, z, codec.stride), codec.stride, title)


def main(args: argparse.Namespace) -> int:
    """``codec plot``."""
    if args.out.suffix.lower() not in (".svg", ".pdf", ".png"):
        raise UsageError(f"{args.out}: pictures are written as svg, pdf or png")
    if args.what in ("channels", "rate-map"):
        made = _model_chart(args)
    elif args.what == "fields":
        from .plot_grid import fields_chart

        if len(args.results) != 2:
            raise UsageError("--what fields is of two files: the original and the decoded one")
        made = fields_chart(*args.results, args.variable, args.index, args.title)
    else:
        results = load_results(args.results)
        if args.what == "speed":
            made = speed_chart(results, args.title)
        else:
            made = rd_chart(results, "ms_ssim" if args.what == "rd-ms-ssim" else None, args.published, args.title)
    write(made, args.out)
    print(args.out)
    return 0
