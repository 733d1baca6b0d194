"""A picture of a run: the loss, the learning rate, and the rate-distortion curves of its validations so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_log(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows of the training, validations) of ``folder``/log.jsonl, in order of steps; a resumed run replaces what it redoes."""
    rows: dict[int, dict] = {}
    validations: dict[int, dict] = {}
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut by a kill
        kept = validations if "validation" in row else rows
        for step in [s for s in kept if s >= row["step"]]:
            del kept[step]
        kept[row["step"]] = row
    return list(rows.values()), list(validations.values())


def plot_run(folder: Path) -> Path | None:
    """Draw ``folder``/progress.png from its log; None where there is nothing to draw yet or matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows, validations = read_log(folder)
    if not rows and not validations:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    if rows:
        steps = [r["step"] for r in rows]
        left.plot(steps, [r["loss"] for r in rows], color="tab:blue")
        left.set(xlabel="step", ylabel="weighted loss", title=f"{rows[-1]['minutes']:.0f} minutes", yscale="log")
        rate = left.twinx()
        rate.plot(steps, [r["lr_factor"] for r in rows], color="0.7", linewidth=1)
        rate.set(ylabel="learning rate, share of its peak", ylim=(0, 1.05))
    shown = validations[:: max(1, len(validations) // 5)]
    for row in [*shown, *(validations[-1:] if validations[-1:] != shown[-1:] else [])]:
        last = row is validations[-1]
        bpp, psnr = ([v[k] for v in row["validation"]] for k in ("bpp", "psnr"))
        right.plot(bpp, psnr, marker="o", markersize=3, color="tab:blue" if last else "0.75", label=f"step {row['step']:,}",
                   zorder=3 if last else 2)  # fmt: skip
    if validations:
        right.legend(fontsize=8)
    right.set(xlabel="bits per pixel, with training noise", ylabel="PSNR (dB)", title="held-out pictures")
    right.grid(alpha=0.3)
    path = Path(folder) / "progress.png"
    figure.savefig(path, dpi=110)
    return path
