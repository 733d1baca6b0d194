"""``codec eval``: rate and quality of codecs and peers over a set of pictures, through real files.

Every finished point (picture, codec, model id, setting) is kept as one JSON line, so a second run goes on where the
first stopped. Rates are bytes of the file on disk; qualities are taken on the decoded 8-bit pixels; times are of a
second call in a process that has coded a picture of the same size before. """

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..container.errors import CodecError, UsageError
from ..datasets.registry import Dataset, DatasetError, check_pixels, find, get, identify, pixel_hash, set_hash
from .bdrate import METHODS, anchor_names, bd_psnr, bd_rate, load_anchor
from .metrics import METRICS, decibel, mse_rgb, psnr_pooled
from .peers import PEERS, peer
from .subject import Ours, Subject

QUALITIES = (0.0, 12.0, 25.0, 40.0, 55.0, 70.0, 85.0, 100.0)
DEFAULT_METRICS = ("psnr", "psnr_y", "ms_ssim")
DEFAULT_ANCHORS = ("vtm", "mlicpp")  # published curves taken when nobody asks for another, the first that there is
MEANS = ("bpp", "encode_s", "decode_s", "encode_mib", "decode_mib")

Point = dict[str, Any]
Progress = Callable[[int, int], None]


def make(name: str, qualities: Iterable[float] = QUALITIES) -> Subject:
    """A peer by name, or one of our models. UsageError, ModelMissing, UnknownCodec."""
    known = name in PEERS or ("." in name.partition(":")[0])
    return peer(name) if known else Ours(name, qualities)


# --- one point -------------------------------------------------------------------------------------------------------


def _reset_peak() -> None:
    """Start the kernel's high-water mark of this process anew, where it can be (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib() -> float:
    """High-water mark of this process' memory since ``_reset_peak``, or since its start where that does nothing."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(subject: Subject, rgb: np.ndarray, setting: float, folder: Path,
            metrics: Iterable[str] = DEFAULT_METRICS) -> Point:  # fmt: skip
    """One point: write the file, read it back, compare. ValueError when the decoded picture has another size."""
    path = folder / "point"
    _reset_peak()
    start = time.perf_counter()
    data = subject.encode(rgb, setting)
    encode_s, encode_mib, encode_stages = time.perf_counter() - start, _peak_mib(), subject.stages
    path.write_bytes(data)
    size, data = path.stat().st_size, path.read_bytes()
    _reset_peak()
    start = time.perf_counter()
    decoded = subject.decode(data)
    decode_s, decode_mib, decode_stages = time.perf_counter() - start, _peak_mib(), subject.stages
    if decoded.shape != rgb.shape:
        raise ValueError(f"a picture of shape {rgb.shape} came back as {decoded.shape}")
    point = {
        "bytes": size, "bpp": size * 8 / (rgb.shape[0] * rgb.shape[1]), "mse": mse_rgb(rgb, decoded),
        "encode_s": encode_s, "decode_s": decode_s, "encode_mib": encode_mib, "decode_mib": decode_mib,
    }  # fmt: skip
    for side, stages in (("encode", encode_stages), ("decode", decode_stages)):
        if stages:
            point[f"{side}_stages"] = stages
    for name in metrics:
        value = METRICS[name](rgb, decoded, 255)
        point[name] = value if value is None or math.isfinite(value) else None
    if (ideal := subject.ideal_bits(rgb, setting)) is not None:
        point["ideal_bits"] = ideal
    return point


# What a process keeps between points: the subject, the pictures it used last, and what it is warm for.
_subjects: dict[tuple[str, tuple[float, ...]], Subject] = {}
_warm: set[tuple[str, tuple[int, ...]]] = set()


@lru_cache(maxsize=2)
def read_rgb(path: Path) -> np.ndarray:
    """Pixels of a picture (H, W, 3) uint8; grey ones are repeated, an alpha channel is left out."""
    from ..media.image import read_picture

    pixels = read_picture(path).pixels
    if pixels.dtype != np.uint8:
        raise UsageError(f"{path}: has {pixels.dtype.itemsize * 8} bits per channel; only 8 are measured")
    return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels


def _point(name: str, qualities: tuple[float, ...], path: Path, setting: float, metrics: tuple[str, ...]) -> Point:
    """One point in whatever process this is; a failure is a point with ``error``."""
    try:
        if (name, qualities) not in _subjects:
            _subjects[name, qualities] = make(name, qualities)
        subject, rgb = _subjects[name, qualities], read_rgb(path)
        if (name, rgb.shape) not in _warm:
            subject.decode(subject.encode(rgb, setting))
            _warm.add((name, rgb.shape))
        with tempfile.TemporaryDirectory() as folder:
            return measure(subject, rgb, setting, Path(folder), metrics)
    except Exception as error:  # whatever it is: the other pictures shall be measured, and this one be listed
        return {"error": f"{type(error).__name__}: {error}"}


def _start(threads: int) -> None:
    """Settings of a worker process."""
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    torch.set_num_threads(threads)


Task = tuple[str, Path, float]  # picture key, file, setting


def _run(name: str, qualities: tuple[float, ...], tasks: list[Task], metrics: tuple[str, ...], jobs: int,
         threads: int) -> Iterator[tuple[Task, Point]]:  # fmt: skip
    """Points of tasks as they are done. A task that kills its process fails alone."""
    if jobs < 2:
        for task in tasks:
            yield task, _point(name, qualities, task[1], task[2], metrics)
        return
    context = multiprocessing.get_context("spawn")
    suspects: list[Task] = []
    for some, workers in ((tasks, jobs), (suspects, 1)):
        waiting = list(some)
        while waiting:
            with ProcessPoolExecutor(workers, context, _start, (threads,)) as pool:
                running: dict[Future, Task] = {}
                try:
                    while waiting or running:
                        while waiting and len(running) < workers:
                            task = waiting.pop(0)
                            running[pool.submit(_point, name, qualities, task[1], task[2], metrics)] = task
                        for future in wait(running, return_when=FIRST_COMPLETED).done:
                            point = future.result()
                            yield running.pop(future), point
                except BrokenProcessPool:  # nobody knows which of those that ran it was: each gets a process of its own
                    if workers > 1:
                        suspects += running.values()
                    else:
                        yield next(iter(running.values())), {"error": "its process died"}
                except GeneratorExit:
                    pool.shutdown(cancel_futures=True)
                    raise


# --- a codec over a set -----------------------------------------------------------------------------------------------


def _load(store: Path, identity: str, metrics: Iterable[str]) -> dict[tuple[str, float], Point]:
    """Finished points of a store that have everything that is asked for."""
    done = {}
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            point = json.loads(line)
        except ValueError:
            continue  # the line at which an earlier run was stopped
        if point.get("identity") == identity and all(m in point for m in ("mse", "encode_mib", *metrics)):
            done[point["picture"], point["setting"]] = point
    return done


def run_codec(name: str, subject: Subject, pictures: dict[str, tuple[str, Path]], store: Path, *,
              metrics: tuple[str, ...] = DEFAULT_METRICS, jobs: int = 1, threads: int = 1,
              progress: Progress | None = None) -> tuple[list[Point], list[str]]:  # fmt: skip
    """All points of a codec, read from ``store`` (JSON lines) where they are done already; (points, failures).

    ``pictures``: name -> (pixel hash, file).
    """
    done = _load(store, subject.identity, metrics)
    keys = {picture: pixels[:16] for picture, (pixels, _) in pictures.items()}
    names = {key: picture for picture, key in keys.items()}
    wanted = [(keys[p], path, s) for p, (_, path) in pictures.items() for s in subject.settings]
    tasks = [t for t in wanted if (t[0], t[2]) not in done]
    failures, count = [], len(wanted) - len(tasks)
    if progress:
        progress(count, len(wanted))
    with store.open("a") as log:
        for (key, _, setting), point in _run(name, subject.settings, tasks, metrics, jobs, threads):
            count += 1
            if progress:
                progress(count, len(wanted))
            if "error" in point:
                failures.append(f"{subject.name} at {setting:g} on {names[key]}: {point['error']}")
                continue
            point |= {"picture": key, "name": names[key], "identity": subject.identity, "setting": setting}
            point["jobs"] = jobs
            done[key, setting] = point
            log.write(json.dumps(point) + "\n")
            log.flush()
    # pictures of a set under another name are the same pictures
    points = [done[k, s] | {"name": names[k]} for k, _, s in wanted if (k, s) in done]
    return points, failures


def complete(points: list[Point], settings: Iterable[float]) -> list[Point]:
    """Points of the pictures that have one at every setting: means over different pictures could not be compared."""
    counts = Counter(p["picture"] for p in points)
    return [p for p in points if counts[p["picture"]] == len(set(settings))]


def curve(points: list[Point], metrics: Iterable[str] = DEFAULT_METRICS) -> list[dict[str, Any]]:
    """Means over the pictures at each setting, in the order of the rate.

    A metric that is not defined on some picture has no mean (None). ``psnr_pooled`` is the PSNR of the mean error;
    ``ideal_bpp`` what the entropy model charges.
    """
    rows = []
    for setting in sorted({p["setting"] for p in points}):
        mine = [p for p in points if p["setting"] == setting]
        row: dict[str, Any] = {"setting": setting, "pictures": len(mine)}
        for key in (*MEANS, *metrics):
            values = [p[key] for p in mine]
            row[key] = None if None in values else float(np.mean(values))
        pooled = psnr_pooled([p["mse"] for p in mine])
        row["psnr_pooled"] = pooled if math.isfinite(pooled) else None
        for side in ("encode_stages", "decode_stages"):
            if all(side in p for p in mine):
                row[side] = {k: float(np.mean([p[side].get(k, 0.0) for p in mine])) for k in mine[0][side]}
        if all("ideal_bits" in p for p in mine):
            row["ideal_bpp"] = float(np.mean([p["ideal_bits"] * p["bpp"] / (8 * p["bytes"]) for p in mine]))
        rows.append(row)
    return sorted(rows, key=lambda r: r["bpp"])


def environment() -> dict[str, Any]:
    """What a number depends on besides the codec."""
    packages = {}
    for name in ("neuralcodec", "torch", "numpy", "pillow", "imagecodecs", "constriction", "bjontegaard"):
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    here = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError):
        git = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "packages": packages, "python": platform.python_version(), "system": platform.platform(),
        "machine": _processor(), "cores": os.cpu_count(), "commit": git or None,
    }  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- anchors ---------------------------------------------------------------------------------------------------------


def published_anchor(dataset: Dataset | None, spec: str) -> dict[str, Any] | None:
    """The published curve that a spec ('auto', 'vtm', 'kodak:vtm') names for a set, with ``title``; None if none does.

    UsageError for a curve that does not exist, and for one that was published for other pictures.
    """
    if spec == "auto":
        known = anchor_names(dataset.name) if dataset else []
        name = next((n for n in DEFAULT_ANCHORS if n in known), None)
        return load_anchor(dataset.name, name) | {"title": f"{dataset.name}:{name} (published)"} if name else None
    of, _, name = spec.rpartition(":")
    of = get(of).name if of else dataset.name if dataset else ""
    if not of:
        raise UsageError(f"--anchor {spec}: these pictures are no known data set, so no published curve is of them")
    found = load_anchor(of, name)
    if not dataset or dataset.name != of:
        here = dataset.name if dataset else "no known data set"
        raise UsageError(f"--anchor {spec}: was published for the pictures of {of}, but these are {here}")
    return found | {"title": f"{of}:{name} (published)"}


def measured_anchor(path: Path, set_sha256: str) -> dict[str, Any]:
    """The curve of a JSON file that ``codec eval`` wrote. UsageError when it is no such file or of other pictures."""
    try:
        result = json.loads(path.read_text())
        found = as_anchor(result, result["codec"], result["environment"]["commit"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--anchor {path}: not a result of `codec eval` ({error})") from None
    if result["dataset_sha256"] != set_sha256:
        raise UsageError(f"--anchor {path}: was measured on other pictures ({result['dataset']})")
    return found


def as_anchor(entry: dict[str, Any], name: str, commit: str | None) -> dict[str, Any]:
    """A measured curve in the shape of a published one."""
    rows = entry["curve"]
    keys = {"bpp": "bpp", "psnr": "psnr", "ms_ssim": "ms_ssim"}
    curves = {k: [r.get(v) for r in rows] for k, v in keys.items()}
    return {"name": name, "title": f"{name} (measured)", "source": f"measured, commit {commit}"} | curves


def compare(anchor: dict[str, Any] | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """BD-rates (PSNR and MS-SSIM in dB, each method) and BD-PSNR of a curve; an ``error`` where one is refused."""
    if anchor is None:
        return {"bd_rate": {m: {"error": "no anchor"} for m in METHODS}}
    rate = [r["bpp"] for r in rows]

    def tried(kind: Callable, quality: str, convert: Callable, key: str) -> dict[str, Any]:
        cells: dict[str, Any] = {}
        for method in METHODS:
            there, here = anchor.get(quality), [r.get(quality) for r in rows]
            if not there or None in there or None in here:
                cells[method] = {"error": f"no {quality} on both sides"}
                continue
            try:
                curves = (anchor["bpp"], list(map(convert, there))), (rate, list(map(convert, here)))
                delta = kind(*curves, method)
                cells[method] = {key: delta.value, "overlap": delta.overlap}
            except CodecError as error:
                cells[method] = {"error": str(error)}
        return cells

    return {
        "bd_rate": tried(bd_rate, "psnr", float, "percent"),
        "bd_psnr": tried(bd_psnr, "psnr", float, "db"),
        "bd_rate_ms_ssim": tried(bd_rate, "ms_ssim", decibel, "percent"),
    }


# --- the whole run ----------------------------------------------------------------------------------------------------


def stem_of(name: str) -> str:
    """File name of a codec's results."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def evaluate(spec: str | Path, models: list[str], peers: list[str], out: Path, *,
             qualities: Iterable[float] = QUALITIES, metrics: Iterable[str] = DEFAULT_METRICS, anchor: str = "auto",
             jobs: int = 1, threads: int | None = None,
             bar: Callable[[str], contextlib.AbstractContextManager] | None = None) -> dict[str, Any]:  # fmt: skip
    """Measure everything; writes one JSON per codec and ``summary.json`` below ``out``, and returns the summary.

    ``spec`` is a data set ('kodak', 'clic:test') or a folder, ``anchor`` 'auto', a published curve ('vtm'), a codec
    of this run, or the JSON file of an earlier one. What cannot be measured stands in ``failures``. """
    metrics = tuple(dict.fromkeys(("psnr", *metrics)))
    threads = threads or max(1, (os.cpu_count() or 1) // max(jobs, 1))
    if jobs < 2:
        import torch

        torch.set_num_threads(threads)
    found = find(spec)
    failures: list[str] = []
    pictures: dict[str, tuple[str, Path]] = {}
    for path in found.paths:
        name = path.relative_to(found.folder).as_posix()
        try:
            pictures[name] = pixel_hash(read_rgb(path)), path
        except CodecError as error:
            failures.append(f"{name}: {error}")
    if not pictures:
        raise DatasetError(f"{spec}: none of the files can be read: {failures[0]}")
    if found.dataset:
        check_pixels(found.dataset, {name: key for name, (key, _) in pictures.items()})
    hashes = [key for key, _ in pictures.values()]
    dataset, sha256 = found.dataset or identify(hashes), set_hash(hashes)
    measured = next((n for n in [*models, *peers] if n == anchor), None)
    if measured:
        reference = None  # known once it is measured
    elif Path(anchor).suffix == ".json":
        reference = measured_anchor(Path(anchor), sha256)
    else:
        reference = published_anchor(dataset, anchor)
        if anchor == "auto" and reference is None:
            measured = next(iter(peers), None)
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        "dataset": dataset.name if dataset else found.label, "pictures": len(pictures), "dataset_sha256": sha256,
        "anchor": None, "anchor_source": None, "environment": environment() | {"jobs": jobs, "threads": threads},
        "codecs": {}, "failures": failures,
    }  # fmt: skip
    everything: dict[str, tuple[str, list[Point]]] = {}
    for name in [measured, *models, *peers] if measured else [*models, *peers]:
        if name in everything:
            continue
        try:
            subject = make(name, qualities)
        except CodecError as error:
            failures.append(f"{name}: {error}")
            continue
        store = out / f"{stem_of(subject.name)}.points.jsonl"
        with (bar or _no_bar)(subject.name) as progress:
            points, wrong = run_codec(
                name, subject, pictures, store, metrics=metrics, jobs=jobs, threads=threads, progress=progress
            )
        failures += wrong
        everything[name] = subject.name, points
        whole = complete(points, subject.settings)
        entry: dict[str, Any] = {
            "ours": subject.ours, "describe": subject.describe, "identity": subject.identity,
            "curve": curve(whole, metrics), "left_out": sorted(set(pictures) - {p["name"] for p in whole}),
        } | subject.complexity()  # fmt: skip
        if name == measured:
            reference = as_anchor(entry, subject.name, summary["environment"]["commit"])
        summary["codecs"][subject.name] = entry
    if reference:
        summary |= {"anchor": reference["title"], "anchor_source": reference["source"]}
        summary["anchor_curve"] = {k: reference[k] for k in ("name", "bpp", "psnr", "ms_ssim") if k in reference}
    shared = {k: v for k, v in summary.items() if k not in ("codecs", "failures", "anchor_curve")}
    for name, points in everything.values():
        entry = summary["codecs"][name]
        entry |= compare(reference, entry["curve"])
        single = shared | {"codec": name} | entry | {"points": points}
        (out / f"{stem_of(name)}.json").write_text(json.dumps(single, indent=1) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


@contextlib.contextmanager
def _no_bar(_: str) -> Iterator[None]:
    yield None


def percent(cell: dict[str, Any]) -> str:
    """'+12.3 %', or '-' where a BD-rate was refused."""
    return f"{cell['percent']:+.1f} %" if "percent" in cell else "-"


def overhead(rows: list[dict[str, Any]]) -> float | None:
    """How much larger the files are than the entropy model says, over all settings: a fraction; None where unknown."""
    if not rows or any("ideal_bpp" not in r for r in rows):
        return None
    return sum(r["bpp"] for r in rows) / sum(r["ideal_bpp"] for r in rows) - 1


def show(summary: dict[str, Any]) -> None:
    """The table of a run."""
    against = "no anchor"
    if summary["anchor"]:
        against = f"BD-rate (RGB PSNR) against {summary['anchor']}: {summary['anchor_source']}"
    print(f"{summary['dataset']}, {summary['pictures']} pictures; {against}")
    width = max([len(n) for n in summary["codecs"]] + [12]) + 2
    print(f"{'codec':{width}}{'BD akima':>10}{'BD pchip':>10}{'overlap':>9}{'bpp':>16}{'PSNR':>14}{'enc s':>8}"
          f"{'dec s':>8}{'MiB':>7}{'kMAC/px':>9}{'file/ideal':>11}")  # fmt: skip
    for name, entry in summary["codecs"].items():
        rows, bd = entry["curve"], entry["bd_rate"]
        if not rows:
            print(f"{name:{width}}  no picture was measured at all settings")
            continue
        overlap = f"{bd['akima']['overlap']:.0%}" if "overlap" in bd["akima"] else "-"
        span = f"{rows[0]['bpp']:.3f}..{rows[-1]['bpp']:.3f}"
        psnr = f"{rows[0]['psnr']:.2f}..{rows[-1]['psnr']:.2f}" if rows[-1]["psnr"] else "-"
        encode, decode = (float(np.mean([r[k] for r in rows])) for k in ("encode_s", "decode_s"))
        memory = max(max(r["encode_mib"], r["decode_mib"]) for r in rows)
        macs = f"{sum(entry['kmac_per_pixel'].values()):.1f}" if "kmac_per_pixel" in entry else "-"
        extra = f"{over:+.2%}" if (over := overhead(rows)) is not None else "-"
        print(f"{name:{width}}{percent(bd['akima']):>10}{percent(bd['pchip']):>10}{overlap:>9}{span:>16}{psnr:>14}"
              f"{encode:>8.3f}{decode:>8.3f}{memory:>7.0f}{macs:>9}{extra:>11}")  # fmt: skip
    for name, entry in summary["codecs"].items():
        if entry["left_out"]:
            print(f"{name}: the means are without {', '.join(entry['left_out'])}")
        if "error" in entry["bd_rate"]["akima"] and entry["curve"] and summary["anchor"]:
            print(f"{name}: no BD-rate: {entry['bd_rate']['akima']['error']}")
    jobs = summary["environment"]["jobs"]
    if jobs > 1:
        print(f"times are of {jobs} pictures at once; use -j 1 for times to quote")
    for failure in summary["failures"]:
        print(f"failed: {failure}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec eval``."""
    from .cli import eval_arguments

    eval_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """``codec eval``; 1 when a point failed."""
    from ..cli import progress_bar

    bad = [q for q in args.qualities if not 0 <= q <= 100]
    if bad:
        raise UsageError(f"quality {bad[0]:g} is outside of 0..100")
    if args.dataset and args.folder:
        raise UsageError("name the data set once")
    spec = args.dataset or args.folder
    if not spec:
        raise UsageError("which pictures? --dataset kodak, or a folder")
    if not (args.codec or args.peers):
        raise UsageError("nothing to measure: name models with --codec or peers with --peers")
    for name in args.metrics:
        if name.replace("-", "_") not in METRICS:
            raise UsageError(f"there is no metric {name!r}; known are {', '.join(METRICS)}")
    jobs = args.jobs or os.cpu_count() or 1
    summary = evaluate(
        spec, args.codec, args.peers, args.out, qualities=args.qualities, anchor=args.anchor, jobs=jobs,
        metrics=[m.replace("-", "_") for m in args.metrics], threads=args.threads,
        bar=lambda title: progress_bar(args, title),
    )  # fmt: skip
    if args.card:
        for model in args.codec:
            write_measured(model, summary)
    if args.report:
        from .report import write_report

        write_report(args.report, args.out, spec)
    if args.json:
        print(json.dumps(summary))
    else:
        show(summary)
    return 1 if summary["failures"] else 0


def write_measured(model: str, summary: dict[str, Any]) -> None:
    """Put a measured curve into a model's card."""
    from ..codecs import registry
    from ..train.freeze import write_card

    codec, preset = registry.split(model)
    card = next(c for c in registry.describe() if (c["codec"], c["preset"]) == (codec, preset))
    path = Path(card.pop("file")).with_suffix(".json")
    entry, dataset = summary["codecs"][f"{codec}:{preset}"], summary["dataset"]
    measured: dict[str, Any] = {
        "command": f"codec eval --dataset {dataset} --codec {codec}:{preset}",
        "dataset_sha256": summary["dataset_sha256"],
        "curve": [{k: round(r[k], 5) for k in ("setting", "bpp", "psnr", "ms_ssim")} for r in entry["curve"]],
    }
    if "percent" in entry["bd_rate"]["akima"]:
        name = summary["anchor"].partition(" ")[0].rpartition(":")[2]
        measured[f"bd_rate_{name}"] = round(entry["bd_rate"]["akima"]["percent"], 2)
    card.setdefault("measured", {})[dataset] = measured
    write_card(path, card)
