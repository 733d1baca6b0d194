"""``codec bench curves``: time and memory of a model against the size of the picture and the number of threads.

Every point is measured in a process of its own, so that its peak memory is its own and nothing is left from before. """

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..container.errors import CodecError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (0.1, 0.3, 1.0, 3.0, 10.0)
THREADS_AT = 1.0  # megapixels of the picture for the curve over threads
ENOUGH = 5.0  # seconds after which a call is not repeated


def picture_of(rgb: np.ndarray, megapixels: float) -> np.ndarray:
    """A 3:2 picture (H, W, 3) of about so many million pixels, from mirrored copies of ``rgb`` or a part of it."""
    h = max(16, round((megapixels * 1e6 / 1.5) ** 0.5))
    w = round(megapixels * 1e6 / h)
    wide = np.concatenate([rgb, rgb[:, ::-1]], 1)
    both = np.concatenate([wide, wide[::-1]], 0)
    return np.ascontiguousarray(both[np.arange(h) % both.shape[0]][:, np.arange(w) % both.shape[1]])


def _timed(call: Any, subject: Any, repeats: int) -> dict[str, Any]:
    """Median seconds of ``call``, and the mean seconds of its stages; what no stage accounts for is ``other``."""
    from .run import _peak_mib, _reset_peak

    _reset_peak()
    seconds, stages = [], []
    while len(seconds) < repeats and sum(seconds) < ENOUGH:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
        stages.append(subject.stages)
    parts = {k: statistics.fmean(s.get(k, 0.0) for s in stages) for k in stages[0]}
    parts["other"] = max(0.0, statistics.fmean(seconds) - sum(parts.values()))
    return {"seconds": statistics.median(seconds), "runs": len(seconds), "peak_mib": _peak_mib(), "stages": parts}


def measure(model: str, rgb: np.ndarray, megapixels: float, threads: int, quality: float, repeats: int) -> dict[str, Any]:
    """One point, in the process that calls it: encode and decode, each with seconds, stages and peak memory in MiB.

    ``base_mib`` is what the process holds with the model and the picture before it codes anything. """
    import torch

    from .run import _peak_mib, _reset_peak
    from .subject import Ours

    torch.set_num_threads(threads)
    subject, large = Ours(model, [quality]), picture_of(rgb, megapixels)
    subject.decode(subject.encode(picture_of(rgb, 0.02), quality))  # tables and kernels are made by the first call
    _reset_peak()
    base, made = _peak_mib(), [b""]

    def encode() -> None:
        made[0] = subject.encode(large, quality)

    point = {
        "megapixels": large.shape[0] * large.shape[1] / 1e6, "width": large.shape[1], "height": large.shape[0],
        "threads": threads, "base_mib": base, "encode": _timed(encode, subject, repeats),
    }  # fmt: skip
    return point | {"bytes": len(made[0]), "decode": _timed(lambda: subject.decode(made[0]), subject, repeats)}


def bench_curves(model: str, rgb: np.ndarray, *, sizes: Sequence[float] = SIZES, threads: Sequence[int] = (),
                 at: float = THREADS_AT, quality: float = 50.0, repeats: int = 5) -> dict[str, Any]:  # fmt: skip
    """Both curves: ``sizes`` in megapixels at the largest of ``threads``; ``threads`` at a picture of ``at`` megapixels.

    A point that fails, for instance for want of memory, has ``error`` in place of numbers. """
    from .run import environment

    threads = sorted(set(threads)) or sorted({1, os.cpu_count() or 1})
    context = multiprocessing.get_context("spawn")

    def point(megapixels: float, count: int) -> dict[str, Any]:
        try:
            with ProcessPoolExecutor(1, context) as pool:
                return pool.submit(measure, model, rgb, megapixels, count, quality, repeats).result()
        except (BrokenProcessPool, CodecError, MemoryError, RuntimeError) as error:
            reason = "its process died, probably for want of memory" if isinstance(error, BrokenProcessPool) else str(error)
            return {"megapixels": megapixels, "threads": count, "error": reason}

    return {
        "model": model, "quality": quality, "repeats": repeats, "environment": environment(),
        "sizes": [point(size, threads[-1]) for size in sorted(set(sizes))],
        "threads": [point(at, count) for count in threads],
    }  # fmt: skip


def chart(result: dict[str, Any]) -> Figure:
    """Time against size (stages dashed), peak memory against size, time against threads. UsageError without a point."""
    from .plot import COLOURS, INK, figure

    sizes = [p for p in result["sizes"] if "error" not in p]
    counts = [p for p in result["threads"] if "error" not in p]
    if not sizes:
        raise UsageError(f"no size could be measured: {result['sizes'][0]['error']}")
    made, axes = figure(13, 4.2)
    made.delaxes(axes)
    of_size, memory, of_threads = made.subplots(1, 3)
    x = [p["megapixels"] for p in sizes]
    stages = sorted({s for p in sizes for side in ("encode", "decode") for s in p[side]["stages"]})
    for side, colour, dash in (("encode", COLOURS[0], "--"), ("decode", COLOURS[1], ":")):
        of_size.plot(x, [p[side]["seconds"] for p in sizes], "-o", ms=4, lw=2, color=colour, label=side)
        for stage, faint in zip(stages, COLOURS[2:]):
            y = [p[side]["stages"].get(stage, 0.0) for p in sizes]
            if max(y) < 0.005 * max(p[side]["seconds"] for p in sizes):
                continue  # it would only stretch the axis
            of_size.plot(x, y, dash, lw=1.1, color=faint, label=f"{side}: {stage}")
        memory.plot(x, [p[side]["peak_mib"] for p in sizes], "-o", ms=4, lw=2, color=colour, label=side)
        if counts:
            y = [p[side]["seconds"] for p in counts]
            of_threads.plot([p["threads"] for p in counts], y, "-o", ms=4, lw=2, color=colour, label=side)
    memory.plot(x, [p["base_mib"] for p in sizes], "--", lw=1, color=INK, label="before coding")
    of_size.set_yscale("log")
    for ax in (of_size, memory):
        ax.set_xscale("log")
        ax.set_xlabel("megapixels")
    memory.set_ylim(0)
    of_threads.set_ylim(0)
    of_threads.set_xlabel("threads")
    of_threads.set_xticks([p["threads"] for p in counts])
    at = f", {counts[0]['megapixels']:.2g} megapixels" if counts else ""
    titles = f"seconds, {sizes[0]['threads']} threads", "peak memory of the process, MiB", f"seconds{at}"
    for ax, title in zip((of_size, memory, of_threads), titles):
        ax.set_title(title, loc="left", fontsize=10.5, color=INK)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, alpha=0.3)
        ax.legend(fontsize=7.5, frameon=False)
    made.suptitle(f"{result['model']}, quality {result['quality']:g}", x=0.01, ha="left", weight="bold", color=INK)
    return made


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    print(f"{result['model']}, quality {result['quality']:g}; {result['environment']['machine']}")
    print(f"{'megapixels':>10}{'threads':>9}{'encode s':>10}{'decode s':>10}{'enc MiB':>9}{'dec MiB':>9}  stages")
    for point in [*result["sizes"], *result["threads"]]:
        head = f"{point['megapixels']:>10.3g}{point['threads']:>9}"
        if "error" in point:
            print(f"{head}  failed: {point['error']}")
            continue
        e, d = point["encode"], point["decode"]
        parts = "; ".join(
            f"{side}: " + ", ".join(f"{k} {v:.3f}" for k, v in part["stages"].items())
            for side, part in (("encode", e), ("decode", d))
        )  # fmt: skip
        print(f"{head}{e['seconds']:>10.3f}{d['seconds']:>10.3f}{e['peak_mib']:>9.0f}{d['peak_mib']:>9.0f}  {parts}")


def main(args: argparse.Namespace) -> int:
    """``codec bench curves``; 1 when a point failed."""
    import matplotlib.cbook

    from ..codecs import registry
    from .kinds import KINDS, Item
    from .plot import write

    if len(args.files) > 1:
        raise UsageError("the curves are over one picture, which is repeated to every size")
    bad = [s for s in args.megapixels if not 0.001 <= s <= 1000]
    if bad:
        raise UsageError(f"--megapixels {bad[0]:g} is outside of 0.001..1000")
    if args.files:
        rgb = KINDS["image"].read(Item(Path(args.files[0])))
    else:
        from ..media.image import read_picture

        with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
            rgb = read_picture(file.read()).pixels
    model = ":".join(registry.split(args.model or registry.default("image")))
    registry.weights_path(*registry.split(model))  # a missing model is one error and not one for each point
    result = bench_curves(
        model, rgb, sizes=args.megapixels, threads=[args.threads] if args.threads else args.thread_counts,
        repeats=args.repeats,
    )  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        write(chart(result), args.plot)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return 1 if any("error" in p for p in result["sizes"] + result["threads"]) else 0
