"""``codec bench grid --cra5``: bits per value where CRA5 publishes its own, on the fields at hand.

Two tables. Fields normalised by ERA5's statistics, as CRA5 takes them: bits per value at a mean squared error, the mean over
channels (a variable at a level), beside the published curves. And every variable coded with the very error that CRA5 publishes
for it, level by level. Published figures are means over 268 channels of ERA5 at 0.25 degree, other fields than those at hand.
With ``-m vaeformer:PRESET`` a third: what that network takes, with references and field by field, beside us without a network
and JPEG 2000 at the error that it makes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..codecs.vaeformer import Plane, of_plane, statistics
from ..container.errors import UsageError
from .bench_grid import PEERS
from .kinds import KINDS, Field, Item, fields_of
from .peers import peer

TARGETS = (0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)
"""Mean squared errors of normalised fields."""
RIVALS = ("jpeg2000", *PEERS[:2])
_FINER = (0.5, 1 / 8, 1 / 32, 1 / 128, 1 / 512)  # settings of the peers: bounds over the range
NETWORK_QUALITIES = (10, 40, 70)
_DECIBEL = (20, 27, 34, 41, 48, 55, 62, 70)


@cache
def published() -> dict[str, Any]:
    """``bits_per_value`` of the archive, ``rmse`` by variable and level, ``curves`` by method."""
    return json.loads((Path(__file__).parent / "cra5.json").read_text())


def _of_levels(table: dict[str, Any], field: Field, key: str | None) -> np.ndarray:
    """A figure of each plane of a field, (N,); NaN where it is not known."""
    found = [of_plane(table, Plane(field.name, p)) for p in field.pressures or (0,) * len(field.values)]
    return np.array([float((here[key] if here and key else here) or "nan") for here in found])


def _curve(planes: np.ndarray, name: str) -> list[tuple[float, float]]:
    """(bits per value, mean squared error) of a codec at its settings on planes (N, H, W)."""
    codec = peer(name, "grid")
    points = []
    for setting in _DECIBEL if name == "jpeg2000" else _FINER:
        data = codec.encode(planes, setting)
        mse = float(np.square(codec.decode(data).astype(np.float64) - planes).mean())
        points.append((len(data) * 8 / planes.size, mse))
    return points


def _at(points: Sequence[tuple[float, float]], mse: float) -> float | None:
    """Bits per value at an error, between the two points around it on logarithmic axes; None beyond them."""
    points = sorted(((np.log(e), np.log(b)) for b, e in points if e > 0 and b > 0))
    errors, bits = zip(*points) if points else ((), ())
    if not points or not errors[0] <= np.log(mse) <= errors[-1]:
        return None
    return float(np.exp(np.interp(np.log(mse), errors, bits)))


def _scaled(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(values - mean) / std of those planes for which both are known, float32."""
    known = np.isfinite(mean + std)
    return ((values[known].astype(np.float64) - mean[known, None, None]) / std[known, None, None]).astype(np.float32)


def ours_at(planes: np.ndarray, mse: float) -> float:
    """Bits per value of our coder of fields at a mean squared error: the whole payload, decoded and measured."""
    from ..codecs.grid_chunk import Coding, decode_chunk, encode_chunk

    coding = Coding("f4", "LYX", "rmse", float(mse**0.5))
    payload, _ = encode_chunk(planes, coding)
    reached = float(np.square(decode_chunk(payload, planes.shape, coding).astype(np.float64) - planes).mean())
    if reached > mse * 1.0001:
        raise AssertionError(f"an error of {reached:g} where {mse:g} was asked for")
    return len(payload) * 8 / planes.size


def _with_network(field: Field, model: str, mean: np.ndarray, std: np.ndarray,
                  jpeg2000: list[tuple[float, float]]) -> list[dict[str, Any]]:  # fmt: skip
    """Rows (quality, mse, bits per value) of a field whose planes have these statistics, those that have any."""
    from ..codecs.grid_neural import load

    codec, known = load(model), np.isfinite(mean + std)
    values, planes = field.values[known], _scaled(field.values, mean, std)
    what = [Plane(field.name, p) for p, k in zip(field.pressures or (0,) * len(known), known) if k]
    rows = []
    for quality in NETWORK_QUALITIES:
        payload, base = codec.encode_fields(values, what, field.latitude, 10 * quality)
        alone = codec.encode_fields(values, what, field.latitude, 10 * quality, [-1] * len(what))[0]
        mse = float(np.square(_scaled(base, mean[known], std[known]).astype(np.float64) - planes).mean())
        bits = {model: len(payload) * 8 / values.size, "field by field": len(alone) * 8 / values.size,
                "ours": ours_at(planes, mse), "jpeg2000": _at(jpeg2000, mse)}  # fmt: skip
        rows.append({"planes": len(planes), "quality": quality, "mse": mse, "bits_per_value": bits})
    return rows


def measure(paths: Sequence[Path], targets: Sequence[float] = TARGETS, network: str = "") -> dict[str, Any]:
    """``at_mse``: rows (file, variable, planes, mse, bits per value of each codec); ``at_cra5``: rows at CRA5's own errors;
    ``at_network``: rows at the errors of a ``network``."""
    at_mse, at_cra5, at_network = [], [], []
    for path in paths:
        for name in fields_of(path):
            field = KINDS["grid"].read(Item(path, name))
            about = {"file": path.name, "variable": name}
            mean, std = (_of_levels(statistics(), field, key) for key in ("mean", "std"))
            if len(planes := _scaled(field.values, mean, std)):
                curves = {rival: _curve(planes, rival) for rival in RIVALS}
                for mse in targets:
                    bits = {"ours": ours_at(planes, mse)} | {rival: _at(points, mse) for rival, points in curves.items()}
                    at_mse.append(about | {"planes": len(planes), "mse": mse, "bits_per_value": bits})
                if network:
                    at_network += [about | row for row in _with_network(field, network, mean, std, curves["jpeg2000"])]
            errors = _of_levels(published()["rmse"], field, None)
            if len(planes := _scaled(field.values, 0 * errors, errors)):
                at_cra5.append(about | {"planes": len(planes), "bits_per_value": ours_at(planes, 1.0)})
    if not at_mse and not at_cra5:
        raise UsageError("none of the files has a variable, at levels with pressures, that CRA5 has too")
    return {"at_mse": at_mse, "at_cra5": at_cra5, "at_network": at_network, "published": published()["curves"]}


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bits per value at each error over all channels; a codec that misses one of them has None."""
    found = []
    for mse in dict.fromkeys(r["mse"] for r in rows):
        here = [r for r in rows if r["mse"] == mse]
        row = {}
        for codec in here[0]["bits_per_value"]:
            parts = [(r["bits_per_value"][codec], r["planes"]) for r in here]
            known = all(bits is not None for bits, _ in parts)
            row[codec] = sum(b * n for b, n in parts) / sum(n for _, n in parts) if known else None
        found.append({"mse": mse, "channels": sum(r["planes"] for r in here), "bits_per_value": row})
    return found


def chart(result: dict[str, Any], target: Path) -> None:
    """Curves measured here, solid, and published ones, dashed."""
    from .plot import COLOURS, GREYS, figure, write

    made, axes = figure(7, 4.6)
    rows = means(result["at_mse"])
    for colour, codec in zip(COLOURS, rows[0]["bits_per_value"] if rows else ()):
        points = [(r["bits_per_value"][codec], r["mse"]) for r in rows if r["bits_per_value"][codec] is not None]
        if points:
            axes.plot(*zip(*points), "o-", color=colour, label=codec, markersize=4)
    for i, name in enumerate(result["published"]):
        style, colour = ("--", ":")[i // len(GREYS) % 2], GREYS[i % len(GREYS)]
        axes.plot(*zip(*result["published"][name]), style, color=colour, label=f"{name} (published)", linewidth=1.2)
    axes.set(xscale="log", yscale="log", xlabel="bits per value", ylabel="mean squared error of normalised fields")
    axes.legend(fontsize=8, ncols=2, frameon=False)
    write(made, target)


def main(args: argparse.Namespace) -> int:
    """The tables, or all figures as JSON; ``--plot`` draws them."""
    result = measure([Path(file) for file in args.files], network=args.model or "")
    if args.plot:
        chart(result, Path(args.plot))
    if args.json:
        print(json.dumps(result))
        return 0
    rows = means(result["at_mse"])
    if rows:
        codecs = list(rows[0]["bits_per_value"])
        print(f"bits per value of normalised fields, mean over {rows[0]['channels']} channels")
        print(f"{'mean squared error':<20}" + "".join(f"{c:>12}" for c in codecs))
        for r in rows:
            cells = [r["bits_per_value"][c] for c in codecs]
            print(f"{r['mse']:<20g}" + "".join(f"{'-' if b is None else format(b, '.4f'):>12}" for b in cells))
        print("\npublished, over 268 channels of ERA5 (other fields): bits per value, mean squared error")
        for name, points in result["published"].items():
            print(f"{name:<20}" + "  ".join(f"{b:.3f} {e:.4f}" for b, e in points))
    if result["at_cra5"]:
        archive = published()["bits_per_value"]
        print("\nat the error that CRA5 publishes for the same variable and level (its archive takes "
              f"{archive} bits per value over all channels)")  # fmt: skip
        for r in result["at_cra5"]:
            label = f"{r['file'][:44]}, {r['variable']}"
            print(f"{label:<52}{r['planes']:>4} planes{r['bits_per_value']:>10.4f} bits per value")
    if result["at_network"]:
        codecs = list(result["at_network"][0]["bits_per_value"])
        print(f"\nbits per value at the mean squared error that {args.model} makes")
        print(f"{'file, variable, planes, quality':<62}{'error':>9}" + "".join(f"{c:>17}" for c in codecs))
        for r in result["at_network"]:
            cells = [r["bits_per_value"][c] for c in codecs]
            label = f"{r['file'][:40]}, {r['variable']}, {r['planes']}, {r['quality']}"
            print(f"{label:<62}{r['mse']:>9.2g}" + "".join(f"{'-' if b is None else format(b, '.4f'):>17}" for b in cells))
    return 0
