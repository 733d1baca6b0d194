"""What a codec did to a field: the field, the error on it, and the spectra of both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..container.errors import UsageError
from .kinds import KINDS, Field, Item, fields_of
from .metrics_grid import max_error, resolved_wavenumber, rmse_weighted, zonal_spectrum
from .plot import COLOURS, FAINT, INK, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def fields_chart(original: Path, decoded: Path, variable: str | None = None, index: int = 0,
                 title: str | None = None) -> Figure:  # fmt: skip
    """Panels of one level or time (``index``, of all in one row) of a variable of two files: field, error, spectra.

    UsageError when the files do not hold the same variable.
    """
    names = [n for n in fields_of(original) if n in fields_of(decoded)]
    if variable is None and len(names) != 1:
        raise UsageError(f"which variable? --variable {' or '.join(names) or '(the files have none in common)'}")
    if (name := variable or names[0]) not in names:
        raise UsageError(f"--variable {name}: both files have {', '.join(names) or 'no field'}")
    a, b = (KINDS["grid"].read(Item(path, name)) for path in (original, decoded))
    if a.values.shape != b.values.shape:
        raise UsageError(f"{decoded}: {name} has another shape than in {original}")
    if not 0 <= index < len(a.values):
        raise UsageError(f"--index {index}: {name} has {len(a.values)} levels and times, counted from 0")
    return _draw(a, b, index, title or f"{name}, {original.name}")


def _draw(a: Field, b: Field, index: int, title: str) -> Figure:
    from matplotlib import pyplot

    x, y = a.values[index : index + 1], b.values[index : index + 1]
    error = y.astype(np.float64) - x
    made, axes = figure(11, 3.6 + 7 * min(x.shape[1] / x.shape[2], 1))
    made.delaxes(axes)
    panels = made.subplot_mosaic([["field", "error"], ["spectrum", "spectrum"]], height_ratios=[1, 0.9])
    south_up = a.latitude[0] < a.latitude[-1]
    worst = max_error(x, y)
    unit = f" {a.unit}" if a.unit else ""
    images = (
        ("field", x[0], "viridis", {}, a.unit or a.name),
        ("error", error[0], "RdBu_r", {"vmin": -worst or -1, "vmax": worst or 1}, f"error{unit and ',' + unit}"),
    )
    for key, values, colours, limits, label in images:
        panel = panels[key]
        panel.set_axis_off()
        shown = panel.imshow(values, cmap=colours, aspect="auto", origin="lower" if south_up else "upper",
                             interpolation="nearest", **limits)  # fmt: skip
        with pyplot.rc_context({"xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT}):
            bar = made.colorbar(shown, ax=panel, orientation="horizontal", shrink=0.9, pad=0.03, aspect=40)
        bar.outline.set_visible(False)
        bar.set_label(label, color=INK)
        bar.ax.tick_params(colors=INK)
    panels["field"].set_title(title, loc="left", weight="bold", color=INK)
    text = f"largest error {worst:.3g}{unit}, weighted RMS {rmse_weighted(x, y, a.latitude):.3g}{unit}"
    panels["error"].set_title(text, loc="left", color=INK, fontsize=10)
    panel = panels["spectrum"]
    curves = ((x, "original", INK, 2.2), (y, "decoded", COLOURS[0], 1.3), (error, "error", COLOURS[1], 1.3))
    for values, label, colour, width in curves:
        power = zonal_spectrum(values, a.latitude)[1:]
        if power.any():
            panel.plot(np.arange(1, len(power) + 1), np.maximum(power, 1e-300), color=colour, lw=width, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(bottom=max(panel.get_ylim()[0], 1e-12 * zonal_spectrum(x, a.latitude)[1:].max() or 1e-12))
    panel.set_xlabel("zonal wavenumber; the error reaches the field at "
                     f"{resolved_wavenumber(x, y, a.latitude):.0%} of the largest")  # fmt: skip
    panel.set_ylabel(f"variance{', (' + a.unit + ')²' if a.unit else ''}")
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.grid(color=FAINT, lw=0.5, alpha=0.5)
    panel.legend(frameon=False, labelcolor=INK)
    return made
