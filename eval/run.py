"""``codec eval``: rate and quality of codecs and peers over a folder of pictures, through real files.

Every finished point (picture, codec, model id, setting) is kept as one JSON line, so a second run goes on where the first
stopped. Rates are bytes of the file on disk; qualities are taken on the decoded 8-bit pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..container.errors import CodecError, UsageError
from .bdrate import METHODS, bd_rate, load_anchor
from .metrics import ms_ssim, psnr_rgb, psnr_y
from .peers import PEERS

QUALITIES = (0.0, 12.0, 25.0, 40.0, 55.0, 70.0, 85.0, 100.0)
PICTURES = {".png", ".webp", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff"}


def find_pictures(folder: Path) -> list[Path]:
    """Pictures of a folder in the order of their names. UsageError when there are none."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give one that holds the data set's pictures")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
    if not paths:
        raise UsageError(f"{folder}: no pictures in this folder")
    return paths


def pixel_hash(pixels: np.ndarray) -> str:
    """sha256 over shape and pixels: the same for every lossless file of a picture."""
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


class Ours:
    """A bundled codec behind the contract of a peer; settings are qualities 0..100."""

    def __init__(self, model: str, qualities: Iterable[float]):
        from ..codecs import registry

        self.codec = registry.load(*registry.split(model))
        self.name, self.settings = f"{self.codec.name}:{self.codec.preset}", tuple(qualities)
        self.describe, self.identity = f"model {self.codec.model_id.hex()}", self.codec.model_id.hex()

    def encode(self, rgb: np.ndarray, setting: float) -> bytes:
        from ..codecs.base import level_of
        from ..codecs.image import encode_picture
        from ..container.format import dumps
        from ..media.image import Picture

        return dumps(encode_picture(self.codec, Picture(rgb), level_of(setting)))

    def decode(self, data: bytes) -> np.ndarray:
        from ..codecs.image import decode_picture
        from ..container.format import loads

        return decode_picture(self.codec, loads(data)).pixels


def make(name: str, qualities: Iterable[float]) -> Any:
    """A peer by name, or one of our models."""
    if name in PEERS:
        peer = PEERS[name]()
        peer.identity = peer.describe
        return peer
    return Ours(name, qualities)


def measure(codec: Any, rgb: np.ndarray, setting: float, folder: Path) -> dict[str, Any]:
    """One point: write the file, read it back, compare."""
    path = folder / "point"
    start = time.perf_counter()
    data = codec.encode(rgb, setting)
    encoded = time.perf_counter()
    path.write_bytes(data)
    data, size = path.read_bytes(), path.stat().st_size
    begin = time.perf_counter()
    decoded = codec.decode(data)
    end = time.perf_counter()
    return {
        "bytes": size, "bpp": size * 8 / (rgb.shape[0] * rgb.shape[1]), "psnr": psnr_rgb(rgb, decoded),
        "psnr_y": psnr_y(rgb, decoded), "ms_ssim": ms_ssim(rgb, decoded),
        "encode_s": encoded - start, "decode_s": end - begin,
    }  # fmt: skip


def run_codec(codec: Any, pictures: dict[str, np.ndarray], store: Path, progress=None) -> tuple[list[dict], list[str]]:
    """All points of a codec, read from ``store`` (JSON lines) where they are done already; (points, failures)."""
    done = {}
    if store.exists():
        for line in store.read_text().splitlines():
            point = json.loads(line)
            done[point["picture"], point["identity"], point["setting"]] = point
    points, failures = [], []
    with tempfile.TemporaryDirectory() as folder, store.open("a") as log:
        for name, rgb in pictures.items():
            key = pixel_hash(rgb)[:16]
            for setting in codec.settings:
                point = done.get((key, codec.identity, setting))
                if point is None:
                    try:
                        point = measure(codec, rgb, setting, Path(folder))
                    except (CodecError, OSError, RuntimeError, ValueError) as error:
                        failures.append(f"{codec.name} at {setting:g} on {name}: {error}")
                        continue
                    point |= {"picture": key, "name": name, "identity": codec.identity, "setting": setting}
                    log.write(json.dumps(point) + "\n")
                    log.flush()
                points.append(point)
                if progress:
                    progress(1)
    return points, failures


def curve(points: list[dict]) -> list[dict[str, float]]:
    """Means over the pictures at each setting, in the order of the rate."""
    rows = []
    for setting in sorted({p["setting"] for p in points}):
        mine = [p for p in points if p["setting"] == setting]
        row = {"setting": setting, "pictures": len(mine)}
        for key in ("bpp", "psnr", "psnr_y", "ms_ssim", "encode_s", "decode_s"):
            values = [p[key] for p in mine if p[key] is not None]
            row[key] = float(np.mean(values)) if values else None
        rows.append(row)
    return sorted(rows, key=lambda r: r["bpp"])


def environment() -> dict[str, Any]:
    """What a number depends on besides the codec."""
    packages = {}
    for name in ("neuralcodec", "torch", "numpy", "pillow", "imagecodecs", "constriction", "bjontegaard"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "packages": packages, "python": platform.python_version(), "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "commit": git.stdout.strip() or None,
    }  # fmt: skip


def evaluate(folder: Path, models: list[str], peers: list[str], out: Path, *, qualities: Iterable[float] = QUALITIES,
             anchor: tuple[str, str] = ("kodak", "vtm"), progress=None) -> dict[str, Any]:  # fmt: skip
    """Measure everything; writes one JSON per codec and ``summary.json`` below ``out``, and returns the summary."""
    from ..media.image import read_picture

    out.mkdir(parents=True, exist_ok=True)
    paths = find_pictures(folder)
    pictures = {p.name: read_picture(p).pixels for p in paths}
    pictures = {n: np.repeat(p, 3, 2) if p.shape[2] == 1 else p for n, p in pictures.items()}
    set_hash = hashlib.sha256("".join(sorted(map(pixel_hash, pictures.values()))).encode()).hexdigest()
    reference = load_anchor(*anchor)
    summary: dict[str, Any] = {
        "dataset": folder.name, "pictures": len(pictures), "dataset_sha256": set_hash, "anchor": anchor[1],
        "anchor_source": reference["source"], "environment": environment(), "codecs": {}, "failures": [],
    }  # fmt: skip
    for name in [*models, *peers]:
        codec = make(name, qualities)
        stem = codec.name.replace(":", "-")
        points, failures = run_codec(codec, pictures, out / f"{stem}.points.jsonl", progress)
        rows = curve(points)
        entry: dict[str, Any] = {"describe": codec.describe, "curve": rows, "bd_rate": {}}
        for method in METHODS:
            try:
                delta = bd_rate(
                    (reference["bpp"], reference["psnr"]), ([r["bpp"] for r in rows], [r["psnr"] for r in rows]), method
                )
                entry["bd_rate"][method] = {"percent": delta.value, "overlap": delta.overlap}
            except (CodecError, ValueError) as error:
                entry["bd_rate"][method] = {"error": str(error)}
        summary["codecs"][codec.name] = entry
        summary["failures"] += failures
        single = {k: v for k, v in summary.items() if k not in ("codecs", "failures")} | {"codec": codec.name} | entry
        (out / f"{stem}.json").write_text(json.dumps(single, indent=1) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def show(summary: dict[str, Any]) -> None:
    """The table of a run."""
    print(f"{summary['dataset']}: {summary['pictures']} pictures; BD-rate (PSNR, RGB) against {summary['anchor']}, {summary['anchor_source']}")
    print(f"{'codec':22}{'BD akima':>10}{'BD pchip':>10}{'overlap':>9}{'bpp':>16}{'PSNR':>16}{'enc s':>8}{'dec s':>8}")
    for name, entry in summary["codecs"].items():
        rows, bd = entry["curve"], entry["bd_rate"]
        if not rows:
            print(f"{name:22}  no point was measured")
            continue
        cells = [f"{bd[m]['percent']:+.1f} %" if "percent" in bd[m] else "-" for m in METHODS]
        overlap = f"{bd['akima']['overlap']:.0%}" if "overlap" in bd["akima"] else "-"
        span = f"{rows[0]['bpp']:.3f}..{rows[-1]['bpp']:.3f}"
        psnr = f"{rows[0]['psnr']:.2f}..{rows[-1]['psnr']:.2f}"
        encode, decode = (np.mean([r[k] for r in rows]) for k in ("encode_s", "decode_s"))
        print(f"{name:22}{cells[0]:>10}{cells[1]:>10}{overlap:>9}{span:>16}{psnr:>16}{encode:>8.3f}{decode:>8.3f}")
    for failure in summary["failures"]:
        print(f"failed: {failure}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec eval``."""
    parser.add_argument("folder", type=Path, help="folder with the pictures of the data set")
    parser.add_argument("--codec", nargs="*", default=[], metavar="MODEL", help="our models, for example hyperprior:light")
    parser.add_argument("--peers", nargs="*", default=[], choices=sorted(PEERS), metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--qualities", nargs="*", type=float, default=list(QUALITIES), help="qualities 0..100 of our models")
    parser.add_argument("--anchor", default="kodak:vtm", help="dataset:curve of the published anchor (default kodak:vtm)")
    parser.add_argument("--out", type=Path, default=Path("eval-results"), help="folder of the results; a second run goes on there")
    parser.add_argument("--card", action="store_true", help="write the result into the cards of our models")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="the summary as JSON on stdout")


def main(args: argparse.Namespace) -> int:
    """``codec eval``; 1 when a point failed."""
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    bad = [q for q in args.qualities if not 0 <= q <= 100]
    if bad:
        raise UsageError(f"quality {bad[0]:g} is outside of 0..100")
    dataset, _, name = args.anchor.partition(":")
    try:
        load_anchor(dataset, name)
    except (KeyError, OSError) as error:
        raise UsageError(str(error).strip("\"'")) from None
    summary = evaluate(
        args.folder, args.codec, args.peers, args.out, qualities=args.qualities, anchor=(dataset, name)
    )
    if args.card:
        for model in args.codec:
            write_measured(model, dataset, summary)
    if args.json:
        print(json.dumps(summary))
    else:
        show(summary)
    return 1 if summary["failures"] else 0


def write_measured(model: str, dataset: str, summary: dict[str, Any]) -> None:
    """Put a measured curve into a model's card."""
    from ..codecs import registry
    from ..train.freeze import write_card

    codec, preset = registry.split(model)
    card = next(c for c in registry.describe() if (c["codec"], c["preset"]) == (codec, preset))
    path = Path(card.pop("file")).with_suffix(".json")
    entry = summary["codecs"][f"{codec}:{preset}"]
    card.setdefault("measured", {})[dataset] = {
        "command": f"codec eval {summary['dataset']}/ --codec {codec}:{preset}",
        "bd_rate_vtm": round(entry["bd_rate"]["akima"].get("percent", float("nan")), 2),
        "dataset_sha256": summary["dataset_sha256"],
        "curve": [{k: round(r[k], 5) for k in ("setting", "bpp", "psnr", "ms_ssim")} for r in entry["curve"]],
    }
    write_card(path, card)
