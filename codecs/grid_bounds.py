"""What a user allows to be lost: ``--max-error t=0.05K,z=10,q=1%`` against the variables of a file, and how it is recorded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import __version__
from ..container.errors import UsageError
from ..media.grid import Layout
from ..media.units import factor

EVERYTHING = "*"
SHARE = 0.99
_ITEM = re.compile(r"(?P<name>[^=]+)=\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:inf|nan))(?P<unit>.*)")
_RELATIVE = {"%": 0.01, "%rel": 0.01, "rel": 1.0}
_RANGE = {"%range": 0.01, "range": 1.0}


@dataclass(frozen=True)
class Wanted:
    """One bound as it was asked for. ``kind`` 'absolute' with an optional unit, 'relative', 'range' or 'bits'."""

    value: float
    kind: str = "absolute"
    unit: str = ""
    text: str = ""


def parse_bounds(text: str, option: str = "--max-error") -> dict[str, Wanted]:
    """'t=0.05K,z=10,q=1%,*=0.1%range' -> bounds by variable. UsageError, naming the ``option``, for what is no bound."""
    found: dict[str, Wanted] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = _ITEM.fullmatch(item)
        if not match:
            raise UsageError(f"{option} {item}: is not VARIABLE=NUMBER[UNIT], such as t=0.05K, z=10 or q=1%")
        name, value, unit = match["name"].strip(), float(match["number"]), match["unit"].strip()
        if not math.isfinite(value):
            raise UsageError(f"{option} {item}: a bound is a finite number")
        if value < 0:
            raise UsageError(f"{option} {item}: a bound is not negative; 0 means lossless")
        if name in found:
            raise UsageError(f"{option}: {name} is there twice")
        compact = unit.replace(" ", "")
        if compact in _RELATIVE:
            found[name] = Wanted(value * _RELATIVE[compact], "relative", compact, item)
        elif compact in _RANGE:
            found[name] = Wanted(value * _RANGE[compact], "range", compact, item)
        else:
            found[name] = Wanted(value, "absolute", unit, item)
    if not found:
        raise UsageError(f"{option}: no bounds")
    for name, wanted in found.items():
        if wanted.kind != "absolute" and wanted.value >= 1:
            raise UsageError(f"{option} {wanted.text}: a bound of {name}'s whole size keeps nothing of it")
    return found


def resolve(layout: Layout, wanted: dict[str, Wanted]) -> dict[str, tuple[str, float]]:
    """(kind, value) of the bound of every data variable, in its stored units; ('lossless', 0) where none was asked for.

    UsageError for unknown variables, for coordinates and other variables that are always exact, and for units that measure
    something else than the variable's.
    """
    data = [name for name in layout.variables if layout.is_data(name)]
    for name, want in wanted.items():
        if name != EVERYTHING and name not in layout.variables:
            known = ", ".join(data) or "none"
            raise UsageError(f"--max-error {want.text or name}: there is no variable {name}; fields here are {known}")
        if name != EVERYTHING and name not in data:
            raise UsageError(f"--max-error {want.text or name}: {name} is no field of real numbers; it is kept exactly")
    found = {}
    for name in data:
        want = wanted.get(name) or wanted.get(EVERYTHING)
        if want is None or want.value == 0:
            found[name] = ("lossless", 0.0)
        else:
            found[name] = (want.kind, _in_units(layout, name, want, name in wanted))
    return found


def resolve_rmse(layout: Layout, wanted: dict[str, Wanted]) -> dict[str, tuple[str, float]]:
    """As ``resolve``, of ``--rmse VAR=TOL``: the root mean square error of each chunk. UsageError for parts and ranges."""
    if bad := [w for w in wanted.values() if w.kind != "absolute"]:
        raise UsageError(f"--rmse {bad[0].text}: is not a number with or without a unit")
    return {n: ("rmse", value) for n, (kind, value) in resolve(layout, wanted).items() if kind != "lossless"}


def _in_units(layout: Layout, name: str, want: Wanted, named: bool) -> float:
    stored = str(layout.variables[name].attrs.get("units", ""))
    if want.unit == "%" and named and stored.strip() in ("%", "percent"):
        number = f"{want.value * 100:g}"
        text = f"{name} is in %: write {name}={number} for per cent points, {name}={number}%rel for a part of each value"
        raise UsageError(f"--max-error {want.text}: {text}")
    if want.kind != "absolute" or not want.unit:
        return want.value
    if (times := factor(want.unit, stored)) is None:
        has = f"is in {stored}" if stored else "has no units in the file"
        raise UsageError(f"--max-error {want.text}: {name} {has}, which {want.unit} does not measure")
    return want.value * times


def bound_text(kind: str, value: float, unit: str = "") -> str:
    """A bound for people."""
    if kind == "lossless":
        return "lossless"
    if kind in ("absolute", "rmse"):
        return ("RMSE " if kind == "rmse" else "") + f"{value:g} {unit}".strip()
    if kind == "bits":
        return f"{value:.0%} of the real information"
    if kind == "quality":
        return f"quality {value:g}"
    return f"{value:.6g} of {'each value' if kind == 'relative' else 'the range of each chunk'}"


def tier(kind: str) -> str:
    """The name of the promise."""
    return {"lossless": "lossless", "quality": "best effort", "rmse": "best effort"}.get(kind, "guaranteed")


def lossy_attributes(attrs: dict[str, Any], kind: str, value: float, packed: bool, keep: int | None, container: str,
                     model: str = "", worst: float | None = None) -> dict[str, Any]:  # fmt: skip
    """Attributes of a variable with the record of what was lost; what an earlier round wrote stays in front.

    Rounded floats follow CF 1.12, section 8.4 (lossy compression via quantization). CF has no names for bounds of other
    compressors, so these are ours.
    """
    unit = str(attrs.get("units", ""))
    text = f"neuralcodec {__version__}, {tier(kind)}: {_promise(kind, value, unit)}"
    if kind == "quality":
        text += f" of {model}"
    if worst is not None:
        text += f"; largest error {worst:.3g} {unit}".rstrip()
    found = dict(attrs)
    found["lossy_compression"] = f"{attrs['lossy_compression']}; then {text}" if "lossy_compression" in attrs else text
    if kind == "rmse":
        found["lossy_compression_root_mean_square_error"] = np.float64(value)
    if kind == "absolute" or worst is not None:
        found["lossy_compression_maximum_absolute_error"] = np.float64(value if worst is None else worst)
    elif kind == "relative":
        found["lossy_compression_maximum_relative_error"] = np.float64(value)
    elif kind == "bits" and keep is not None:
        if not packed:
            found["quantization"], found["quantization_nsb"] = container, np.int32(keep)
        found["lossy_compression_maximum_relative_error"] = np.float64(2.0 ** -(keep + 1))
    return found


def _promise(kind: str, value: float, unit: str) -> str:
    if kind in ("quality", "rmse"):
        return bound_text(kind, value, unit)
    if kind == "bits":
        return f"rounded to {value:.0%} of the real information of each level"
    return f"maximum {'absolute' if kind == 'absolute' else kind} error {bound_text(kind, value, unit)}"


def with_history(attrs: dict[str, Any], command: str, lossy: Iterable[str], when: str) -> dict[str, Any]:
    """Global attributes with a line of history in front, the newest first, as other tools write it."""
    line = f"{when}: {command} (neuralcodec {__version__}; lossy: {', '.join(lossy)})"
    before = attrs.get("history")
    return attrs | {"history": f"{line}\n{before}" if isinstance(before, str) and before else line}
