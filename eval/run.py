"""``codec eval``: rate and quality of codecs and peers over a set of samples, through real files.

What is measured and how samples compare is the business of ``kinds``: pictures, video, fields, bytes. Every finished
point (sample, codec, model id, setting) is kept as one JSON line, so a second run goes on where the first stopped.
Rates are bytes of the file on disk; qualities are taken on what was decoded; times are of a second call in a process
that has coded a sample of the same shape before. """

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..container.errors import CodecError, UsageError
from ..datasets.registry import Dataset, DatasetError, check_bytes, check_pixels, find, get, identify, set_hash
from .bdrate import METHODS, anchor_names, bd_psnr, bd_rate, load_anchor
from .kinds import KINDS, SET_METRICS, Item, Kind
from .peers import is_peer, peer
from .subject import DEVICE, Ours, OursBytes, Subject, parted

QUALITIES = (0.0, 12.0, 25.0, 40.0, 55.0, 70.0, 85.0, 100.0)
DEFAULT_ANCHORS = ("vtm", "mlicpp")  # published curves taken when nobody asks for another, the first that there is
MEANS = ("encode_s", "decode_s", "encode_mib", "decode_mib")

Point = dict[str, Any]
Progress = Callable[[int, int], None]


def make(name: str, qualities: Sequence[float] = QUALITIES, kind: str = "image") -> Subject:
    """A peer by name, or one of our models. UsageError, ModelMissing, UnknownCodec."""
    if is_peer(name):
        return peer(name, kind)
    if kind == "grid":
        from .peers_grid import NeuralGrid, OursGrid, OursRmse

        if name in (OursGrid.name, OursRmse.name):
            return OursGrid() if name == OursGrid.name else OursRmse()
        if name.partition(":")[0] == "vaeformer":
            return NeuralGrid(name, qualities)
    if kind == OursBytes.kind:
        return OursBytes(name)
    if kind != Ours.kind:
        here = "our own models are measured on pictures and bytes, grid:exact and vaeformer on fields"
        raise UsageError(f"{name} is no peer for {kind}; {here}")
    return Ours(name, qualities)


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


def measure(subject: Subject, kind: Kind, sample: Any, setting: float, folder: Path,
            metrics: Iterable[str] = ()) -> Point:  # fmt: skip
    """One point: write the file, read it back, compare. ValueError when what was decoded has another shape."""
    path, values = folder / "point", kind.data(sample)
    source = sample if subject.whole else values
    _reset_peak()
    start = time.perf_counter()
    data = subject.encode(source, setting)
    encode_s, encode_mib, encode_stages = time.perf_counter() - start, _peak_mib(), subject.stages
    path.write_bytes(data)
    size, data = path.stat().st_size, path.read_bytes()
    _reset_peak()
    start = time.perf_counter()
    decoded = subject.decode(data)
    decode_s, decode_mib, decode_stages = time.perf_counter() - start, _peak_mib(), subject.stages
    if kind.shape(decoded) != kind.shape(sample):
        raise ValueError(f"a sample of shape {kind.shape(sample)} came back as {kind.shape(decoded)}")
    point = {
        "bytes": size, kind.rate: size * 8 / kind.count(sample),
        "encode_s": encode_s, "decode_s": decode_s, "encode_mib": encode_mib, "decode_mib": decode_mib,
    }  # fmt: skip
    for side, stages in (("encode", encode_stages), ("decode", decode_stages)):
        if stages:
            point[f"{side}_stages"] = stages
    point |= kind.compare(sample, decoded, metrics) | kind.ratios(size, sample)
    if (bound := subject.bound(source, setting)) is not None:
        point["max_error_over_bound"] = float(np.abs(decoded.astype(np.float64) - values).max() / bound)
    if (ideal := subject.ideal_bits(source, setting)) is not None:
        point["ideal_bits"] = ideal
    return point


# What a process keeps between points: the subject, the samples it used last, and what it is warm for.
_subjects: dict[tuple[str, str, tuple[float, ...]], Subject] = {}
_warm: set[tuple[str, str, tuple[int, ...]]] = set()


@lru_cache(maxsize=2)
def read(kind: str, item: Item) -> Any:
    """A sample, kept for the next settings."""
    return KINDS[kind].read(item)


def _point(name: str, kind: str, qualities: tuple[float, ...], item: Item, setting: float,
           metrics: tuple[str, ...]) -> Point:  # fmt: skip
    """One point in whatever process this is; a failure is a point with ``error``."""
    try:
        subject, sample = _subject(name, kind, qualities), read(kind, item)
        warm = name, kind, KINDS[kind].shape(sample)
        if warm not in _warm:
            subject.warm_up(sample if subject.whole else KINDS[kind].data(sample), setting)
            _warm.add(warm)
        with tempfile.TemporaryDirectory() as folder:
            return measure(subject, KINDS[kind], sample, setting, Path(folder), metrics)
    except Exception as error:  # whatever it is: the other samples shall be measured, and this one be listed
        return {"error": str(error) if isinstance(error, CodecError) else f"{type(error).__name__}: {error}"}


def _subject(name: str, kind: str, qualities: tuple[float, ...]) -> Subject:
    """The subject of this process."""
    key = name, kind, qualities
    if key not in _subjects:
        _subjects[key] = make(name, qualities, kind)
    return _subjects[key]


def _start(threads: int, kind: str) -> None:
    """Settings of a worker process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    _set_threads(threads, kind)


def _set_threads(threads: int, kind: str) -> None:
    if kind in ("image", "video"):  # elsewhere nothing needs torch, whose loading would show in time and memory
        import torch

        torch.set_num_threads(threads)


Task = tuple[str, Item, float]  # key of the sample, where it is, setting


def _run(name: str, kind: str, qualities: tuple[float, ...], tasks: list[Task], metrics: tuple[str, ...], jobs: int,
         threads: int) -> Iterator[tuple[Task, Point]]:  # fmt: skip
    """Points of tasks as they are done. A task that kills its process fails alone."""
    if jobs < 2:
        for task in tasks:
            yield task, _point(name, kind, qualities, task[1], task[2], metrics)
        return
    context = multiprocessing.get_context("spawn")
    suspects: list[Task] = []
    for some, workers in ((tasks, jobs), (suspects, 1)):
        waiting = list(some)
        while waiting:
            with ProcessPoolExecutor(workers, context, _start, (threads, kind)) as pool:
                running: dict[Future, Task] = {}
                try:
                    while waiting or running:
                        while waiting and len(running) < workers:
                            task = waiting[0]  # it waits on if the pool has just broken and takes nothing
                            running[pool.submit(_point, name, kind, qualities, task[1], task[2], metrics)] = task
                            del waiting[0]
                        for future in wait(running, return_when=FIRST_COMPLETED).done:
                            point = future.result()
                            yield running.pop(future), point
                except BrokenProcessPool:  # nobody knows which of those that ran it was: each gets a process of its own
                    if workers > 1:
                        suspects += running.values()
                    else:
                        for task in running.values():
                            yield task, {"error": "its process died"}
                except GeneratorExit:
                    pool.shutdown(cancel_futures=True)
                    raise


# --- a codec over a set -----------------------------------------------------------------------------------------------


def _load(store: Path, identity: str, needed: Iterable[str]) -> dict[tuple[str, float], Point]:
    """Finished points of a store that have everything that is asked for."""
    done = {}
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            point = json.loads(line)
        except ValueError:
            continue  # the line at which an earlier run was stopped
        if point.get("identity") == identity and all(m in point for m in needed):
            done[point["picture"], point["setting"]] = point
    return done


def run_codec(name: str, subject: Subject, samples: dict[str, tuple[str, Item]], store: Path, *,
              metrics: tuple[str, ...] = (), jobs: int = 1, threads: int = 1,
              progress: Progress | None = None) -> tuple[list[Point], list[str]]:  # fmt: skip
    """All points of a codec, read from ``store`` (JSON lines) where they are done already; (points, failures).

    ``samples``: name -> (fingerprint, where it is).
    """
    kind = KINDS[subject.kind]
    done = _load(store, subject.identity, (kind.rate, "encode_mib", *metrics, *["ideal_bits"] * subject.estimates))
    keys = {sample: sha[:16] for sample, (sha, _) in samples.items()}
    names = {key: sample for sample, key in keys.items()}
    wanted = [(keys[n], item, s) for n, (_, item) in samples.items() for s in subject.settings]
    tasks = [t for t in wanted if (t[0], t[2]) not in done]
    failures, count = [], len(wanted) - len(tasks)
    if progress:
        progress(count, len(wanted))
    with store.open("a") as log:
        if store.stat().st_size and not store.read_bytes().endswith(b"\n"):
            log.write("\n")  # an earlier run was stopped within a line, which must not swallow the next point
        for (key, _, setting), point in _run(name, subject.kind, subject.settings, tasks, metrics, jobs, threads):
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
    # samples of a set under another name are the same samples
    points = [done[k, s] | {"name": names[k]} for k, _, s in wanted if (k, s) in done]
    return points, failures


def complete(points: list[Point], settings: Iterable[float]) -> list[Point]:
    """Points of the samples that have one at every setting: means over different samples could not be compared."""
    counts = Counter(p["picture"] for p in points)
    return [p for p in points if counts[p["picture"]] == len(set(settings))]


def curve(points: list[Point], kind: Kind, metrics: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Means over the samples at each setting, in the order of the rate, and what the kind pools over a whole set.

    A metric that is not defined on some sample has no mean (None). ``ideal_<rate>`` is what the entropy model charges.
    """
    rows = []
    for setting in sorted({p["setting"] for p in points}):
        mine = [p for p in points if p["setting"] == setting]
        row: dict[str, Any] = {"setting": setting, "samples": len(mine)}
        for key in (kind.rate, *MEANS, *metrics):
            values = [p[key] for p in mine]
            row[key] = None if None in values else float(np.mean(values))
        row |= kind.pool(mine)
        for side in ("encode_stages", "decode_stages"):
            if all(side in p for p in mine):
                row[side] = {k: float(np.mean([p[side].get(k, 0.0) for p in mine])) for k in mine[0][side]}
        if all("ideal_bits" in p for p in mine):
            row[f"ideal_{kind.rate}"] = float(np.mean([p["ideal_bits"] * p[kind.rate] / (8 * p["bytes"]) for p in mine]))
        rows.append(row)
    return sorted(rows, key=lambda r: r[kind.rate])


def set_metrics(subject: Subject, samples: dict[str, tuple[str, Item]], sha256: str, store: Path,
                which: tuple[str, ...]) -> dict[float, dict[str, float]]:  # fmt: skip
    """Metrics over all samples of a set at once (fid, kid), for each setting; codes everything again.

    Kept in ``store`` as points are. UsageError without the networks' weights. """
    from .perceptual import patch_distances

    done = {}
    for line in store.read_text().splitlines() if store.exists() else ():
        row = json.loads(line)
        if (row["identity"], row["set"]) == (subject.identity, sha256) and all(m in row for m in which):
            done[row["setting"]] = {m: row[m] for m in which}
    for setting in (s for s in subject.settings if s not in done):
        originals = (read(subject.kind, item) for _, item in samples.values())
        pairs = ((rgb, subject.decode(subject.encode(rgb, setting))) for rgb in originals)
        done[setting] = patch_distances(pairs, which)
        with store.open("a") as log:
            log.write(json.dumps({"identity": subject.identity, "set": sha256, "setting": setting} | done[setting]) + "\n")
    return done


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
    keys = [k for k in ("bpp", "bits_per_value", "bits_per_byte", "psnr", "snr", "ms_ssim") if any(k in r for r in rows)]
    curves = {k: [r.get(k) for r in rows] for k in keys}
    return {"name": name, "title": f"{name} (measured)", "source": f"measured, commit {commit}"} | curves


def compare(anchor: dict[str, Any] | None, rows: list[dict[str, Any]], kind: Kind = KINDS["image"]) -> dict[str, Any]:
    """BD-rates (over the kind's quality and MS-SSIM in dB, each method) and BD-PSNR of a curve.

    An ``error`` where one is refused. Without a quality, as for bytes: the difference of the smallest rates.
    """
    from .metrics import decibel

    if kind.quality is None:
        if not (anchor and rows):
            return {"difference": {"error": "no anchor"}}
        return {"difference": {"percent": 100 * (rows[0][kind.rate] / min(anchor[kind.rate]) - 1)}}
    if anchor is None:
        return {"bd_rate": {m: {"error": "no anchor"} for m in METHODS}}
    rate = [r[kind.rate] for r in rows]

    def tried(call: Callable, quality: str, convert: Callable, key: str) -> dict[str, Any]:
        there, here = anchor.get(quality), [r.get(quality) for r in rows]
        if not there or None in there or not here or None in here:
            return {m: {"error": f"no {quality}"} for m in METHODS}
        cells: dict[str, Any] = {}
        for method in METHODS:
            try:
                known = anchor[kind.rate], [convert(v) for v in there]
                delta = call(known, (rate, [convert(v) for v in here]), method)
                cells[method] = {key: delta.value, "overlap": delta.overlap}
            except CodecError as error:
                cells[method] = {"error": str(error)}
        return cells

    return {
        "bd_rate": tried(bd_rate, kind.quality, float, "percent"),
        f"bd_{kind.quality}": tried(bd_psnr, kind.quality, float, "db"),
        "bd_rate_ms_ssim": tried(bd_rate, "ms_ssim", decibel, "percent"),
    }


# --- the whole run ----------------------------------------------------------------------------------------------------


def stem_of(name: str) -> str:
    """File name of a codec's results."""
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name)


def samples_of(spec: str | Path, kind: str | None = None) -> tuple[Any, Kind, dict[str, tuple[str, Item]], list[str]]:
    """(what was found, its kind, name -> (fingerprint, where), failures) of a data set or folder.

    DatasetError when it is missing, not what it should be, or wholly unreadable.
    """
    found = find(spec, kind)
    this = KINDS[found.kind]
    if found.dataset:
        check_bytes(found.dataset)
    samples, failures = {}, []
    for name, item in this.items(found).items():
        try:
            samples[name] = this.fingerprint(read(this.name, item)), item
        except CodecError as error:
            failures.append(str(error) if str(item.path) in str(error) else f"{name}: {error}")
    if not samples:
        raise DatasetError(f"{spec}: none of the files can be read: {failures[0] if failures else 'no variables on a grid'}")
    if found.dataset and this.name == "image":
        check_pixels(found.dataset, {name: sha for name, (sha, _) in samples.items()})
    return found, this, samples, failures


def usable(kind: Kind, metrics: Iterable[str], failures: list[str]) -> tuple[str, ...]:
    """The metrics whose networks can be loaded; why others cannot goes to ``failures``, once and not at every point."""
    kept = []
    for name in metrics:
        try:
            if name in ("lpips", "dists", "feature_distance"):
                grey = np.full((64, 64, 3), 128, np.uint8)
                KINDS["image"].metrics[name](grey, grey, 255)
            elif name == "warping_error":
                from .metrics_video import flow

                flow(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3), np.uint8))
            kept.append(name)
        except UsageError as error:
            failures.append(str(error))
    return tuple(kept)


def evaluate(spec: str | Path, models: list[str], peers: list[str], out: Path, *,
             qualities: Sequence[float] = QUALITIES, metrics: Iterable[str] | None = None, anchor: str = "auto",
             kind: str | None = None, jobs: int = 1, threads: int | None = None,
             bar: Callable[[str], contextlib.AbstractContextManager] | None = None) -> dict[str, Any]:  # fmt: skip
    """Measure everything; writes one JSON per codec and ``summary.json`` below ``out``, and returns the summary.

    ``spec`` is a data set ('kodak', 'clic:test') or a folder, ``anchor`` 'auto', a published curve ('vtm'), a codec
    of this run, or the JSON file of an earlier one. What cannot be measured stands in ``failures``. """
    threads = threads or max(1, (os.cpu_count() or 1) // max(jobs, 1))
    found, this, samples, failures = samples_of(spec, kind)
    wanted = this.default_metrics if metrics is None else metrics
    wanted = this.check_metrics([*([this.quality] if this.quality else []), *wanted])
    whole_set = tuple(m for m in wanted if m in SET_METRICS.get(this.name, ()))
    chosen = usable(this, [m for m in wanted if m not in whole_set], failures)
    if jobs < 2:
        _set_threads(threads, this.name)
    hashes = [sha for sha, _ in samples.values()]
    dataset = found.dataset or (identify(hashes) if this.name == "image" else None)
    sha256 = set_hash(hashes)
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
        "dataset": dataset.name if dataset else found.label, "kind": this.name, "samples": len(samples),
        "dataset_sha256": sha256, "anchor": None, "anchor_source": None,
        "environment": environment() | {"jobs": jobs, "threads": threads, "device": os.environ.get(DEVICE, "cpu")},
        "codecs": {}, "failures": failures,
    }  # fmt: skip
    everything: dict[str, tuple[str, list[Point]]] = {}
    for name in [measured, *models, *peers] if measured else [*models, *peers]:
        if name in everything:
            continue
        try:
            subject = make(name, qualities, this.name)
        except CodecError as error:
            failures.append(f"{name}: {error}")
            continue
        store = out / f"{stem_of(subject.name)}.points.jsonl"
        with (bar or _no_bar)(subject.name) as progress:
            points, wrong = run_codec(
                name, subject, samples, store, metrics=chosen, jobs=jobs, threads=threads, progress=progress
            )
        failures += wrong
        everything[name] = subject.name, points
        whole = complete(points, subject.settings)
        rows = curve(whole, this, chosen)
        if whole_set and rows:
            try:
                over = set_metrics(subject, samples, sha256, store.with_suffix("").with_suffix(".sets.jsonl"), whole_set)
                rows = [row | over[row["setting"]] for row in rows]
            except UsageError as error:
                failures.append(str(error))
                whole_set = ()
        entry: dict[str, Any] = {
            "ours": subject.ours, "describe": subject.describe, "identity": subject.identity, "curve": rows,
            "left_out": sorted(set(samples) - {p["name"] for p in whole}),
        } | subject.complexity()  # fmt: skip
        if name == measured and rows:
            reference = as_anchor(entry, subject.name, summary["environment"]["commit"])
        summary["codecs"][subject.name] = entry
    if reference:
        summary |= {"anchor": reference["title"], "anchor_source": reference["source"]}
        kept = ("name", this.rate, this.quality, "ms_ssim")
        summary["anchor_curve"] = {k: reference[k] for k in kept if k in reference}
    shared = {k: v for k, v in summary.items() if k not in ("codecs", "failures", "anchor_curve")}
    for name, points in everything.values():
        entry = summary["codecs"][name]
        entry |= compare(reference, entry["curve"], this)
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


def overhead(rows: list[dict[str, Any]], rate: str = "bpp") -> float | None:
    """How much larger the files are than the entropy model says, over all settings: a fraction; None where unknown."""
    if not rows or any(f"ideal_{rate}" not in r for r in rows):
        return None
    return sum(r[rate] for r in rows) / sum(r[f"ideal_{rate}"] for r in rows) - 1


SHORT = {
    "max_error_relative": ("max/range", ".1e"), "anomaly_correlation": ("ACC", ".4f"), "psnr": ("PSNR", ".2f"),
    "ratio_float32": ("float32:1", ".1f"), "ratio_int16": ("int16:1", ".1f"), "max_error_over_bound": ("max/bound", ".5f"),
    "snr": ("SNR dB", ".1f"), "bpp": ("bpp", ".3f"), "bits_per_value": ("bits/value", ".3f"),
}  # fmt: skip


def span(rows: list[dict[str, Any]], key: str) -> str:
    """'first..last' of a column; '-' where it is unknown or the same metric is infinite everywhere."""
    ends = [rows[0].get(key), rows[-1].get(key)]
    texts = ["inf" if v is None else format(v, SHORT[key][1]) for v in ends]
    return "-" if ends == [None, None] else texts[0] if len(rows) == 1 else "..".join(texts)


def table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column titles and rows of a run, as text: for the terminal and the report. Codecs without a curve are left out."""
    kind = KINDS[summary["kind"]]
    codecs = {n: e for n, e in summary["codecs"].items() if e["curve"]}
    if kind.quality is None:
        titles = ["codec", "setting", "bits/byte", "of all", "smallest vs", "enc MB/s", "dec MB/s", "MiB"]
        return titles, [
            [name, f"{r['setting']:g}", f"{r['bits_per_byte']:.3f}", f"{r['bits_per_byte_total']:.3f}",
             percent(e["difference"]) if r is e["curve"][0] else "", f"{r['encode_mb_s']:.2f}", f"{r['decode_mb_s']:.2f}",
             f"{max(r['encode_mib'], r['decode_mib']):.0f}"]
            for name, e in codecs.items() for r in sorted(e["curve"], key=lambda r: r["setting"])
        ]  # fmt: skip
    columns = [kind.rate, kind.quality, *kind.shown]
    titles = ["codec", "BD akima", "BD pchip", "overlap", *(SHORT[c][0] for c in columns), "enc s", "dec s", "MiB"]
    ours = any(e["ours"] for e in codecs.values())
    lines = []
    for name, entry in codecs.items():
        rows, bd = entry["curve"], entry["bd_rate"]
        line = [name, percent(bd["akima"]), percent(bd["pchip"])]
        line.append(f"{bd['akima']['overlap']:.0%}" if "overlap" in bd["akima"] else "-")
        line += [span(rows, c) for c in columns]
        line += [f"{float(np.mean([r[k] for r in rows])):.3f}" for k in ("encode_s", "decode_s")]
        line.append(f"{max(max(r['encode_mib'], r['decode_mib']) for r in rows):.0f}")
        if ours:
            line.append(f"{sum(entry['kmac_per_pixel'].values()):.1f}" if "kmac_per_pixel" in entry else "-")
            line.append(f"{over:+.2%}" if (over := overhead(rows, kind.rate)) is not None else "-")
        lines.append(line)
    return titles + (["kMAC/px", "file/ideal"] if ours else []), lines


def heading(summary: dict[str, Any]) -> str:
    """One line: what was measured, and against what."""
    kind = KINDS[summary["kind"]]
    against = "no anchor"
    if summary["anchor"]:
        what = "rate" if kind.quality is None else f"BD-rate ({'RGB PSNR' if kind.quality == 'psnr' else 'SNR'})"
        against = f"{what} against {summary['anchor']}: {summary['anchor_source']}"
    return f"{summary['dataset']}, {summary['samples']} {kind.noun}; {against}"


def remarks(summary: dict[str, Any]) -> list[str]:
    """What a reader of the table must know besides."""
    lines = []
    for name, entry in summary["codecs"].items():
        if not entry["curve"]:
            lines.append(f"{name}: nothing was measured at all of its settings")
        elif entry["left_out"]:
            lines.append(f"{name}: the means are without {', '.join(entry['left_out'])}")
        cell = entry.get("bd_rate", {}).get("akima", {})
        if "error" in cell and entry["curve"] and summary["anchor"]:
            lines.append(f"{name}: no BD-rate: {cell['error']}")
    if (jobs := summary["environment"]["jobs"]) > 1:
        lines.append(f"times are of {jobs} samples at once; use -j 1 for times to quote")
    return lines + [f"failed: {failure}" for failure in summary["failures"]]


def show(summary: dict[str, Any]) -> None:
    """The table of a run."""
    print(heading(summary))
    titles, lines = table(summary)
    widths = [max(len(row[i]) for row in [titles, *lines]) for i in range(len(titles))]
    for row in [titles, *lines]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))))
    for line in remarks(summary):
        print(line)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec eval``."""
    from .cli import eval_arguments

    eval_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """``codec eval``; 1 when a point failed."""
    from ..cli import device_of, progress_bar

    if args.dataset and args.folder:
        raise UsageError("name the data set once")
    spec = args.dataset or args.folder
    if not spec:
        raise UsageError("which data? --dataset kodak, or a folder")
    if not (args.codec or args.peers):
        raise UsageError("nothing to measure: name models with --codec or peers with --peers")
    if args.squeezenet:
        from .perceptual import SQUEEZENET

        os.environ[SQUEEZENET] = str(args.squeezenet)
    os.environ[DEVICE] = "cpu" if args.device == "cpu" else device_of(args)
    jobs = args.jobs or os.cpu_count() or 1
    summary = evaluate(
        spec, args.codec, args.peers, args.out, qualities=args.qualities, anchor=args.anchor, kind=args.kind, jobs=jobs,
        metrics=args.metrics, threads=args.threads, bar=lambda title: progress_bar(args, title),
    )  # fmt: skip
    if args.card:
        for model in args.codec:
            write_measured(model, summary)
    if args.report:
        from .report import write_report

        write_report(args.report, summary, args.out, spec)
    if args.json:
        print(json.dumps(summary))
    else:
        show(summary)
    return 1 if summary["failures"] else 0


def write_measured(model: str, summary: dict[str, Any]) -> None:
    """Put a measured curve into a model's card."""
    from ..codecs import registry
    from ..train.freeze import write_card

    plain, search = parted(model)
    codec, preset = registry.split(plain)
    card = next(c for c in registry.describe() if (c["codec"], c["preset"]) == (codec, preset))
    path = Path(card.pop("file")).with_suffix(".json")
    name = f"{codec}:{preset}{search}"
    entry, dataset = summary["codecs"][name], summary["dataset"]
    settings = " ".join(f"{r['setting']:g}" for r in entry["curve"])
    measured: dict[str, Any] = {
        "command": f"codec eval --dataset {dataset} --codec {name} --qualities {settings} --metrics psnr ms_ssim",
        "dataset_sha256": summary["dataset_sha256"],
        "curve": [{k: round(r[k], 5) for k in ("setting", "bpp", "psnr", "ms_ssim")} for r in entry["curve"]],
    }
    anchor = summary["anchor"].partition(" ")[0].rpartition(":")[2]
    for kind, suffix in (("bd_rate", ""), ("bd_rate_ms_ssim", "_ms_ssim")):
        if "percent" in (found := entry.get(kind, {}).get("akima", {})):
            measured[f"bd_rate_{anchor}{suffix}"] = round(found["percent"], 2)
    card.setdefault("measured", {})[dataset + search] = measured
    write_card(path, card)
