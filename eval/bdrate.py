"""BD-rate and BD-PSNR against named anchor curves, through the ``bjontegaard`` package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..container.errors import CodecError, UsageError

ANCHORS = Path(__file__).resolve().parent / "anchors"
METHODS = ("akima", "pchip")
MIN_OVERLAP = 0.5


class CurveOverlapError(CodecError):
    """Two curves share too little of their range for a mean over it to say anything."""


class CurveError(CodecError):
    """Points that are no rate-distortion curve: too few, not finite, or a quality that does not grow with the rate."""


@dataclass(frozen=True)
class Delta:
    """Result of a comparison: percent of rate or dB; ``overlap``: shared part of both ranges over the smaller, 0..1."""

    value: float
    method: str
    overlap: float


def anchor_names(dataset: str) -> list[str]:
    """Published curves at hand for a data set; empty for an unknown one."""
    path = ANCHORS / f"{dataset}.json"
    return list(json.loads(path.read_text())["curves"]) if path.is_file() else []


def load_anchor(dataset: str, name: str) -> dict:
    """A published curve: keys name, source, bpp, psnr (dB) and perhaps ms_ssim. UsageError with the known names."""
    known = anchor_names(dataset)
    if name not in known:
        sets = ", ".join(sorted(p.stem for p in ANCHORS.glob("*.json")))
        here = f"known for {dataset} are {', '.join(known)}" if known else f"there are anchors for {sets}"
        raise UsageError(f"no published anchor {name!r} for {dataset}; {here}")
    return json.loads((ANCHORS / f"{dataset}.json").read_text())["curves"][name]


def overlap_of(a: np.ndarray, b: np.ndarray) -> float:
    """Shared part of two ranges over the smaller of them: an anchor may reach further than a test, and should."""
    shared = min(max(a), max(b)) - max(min(a), min(b))
    return max(0.0, float(shared)) / float(min(max(a) - min(a), max(b) - min(b)))


Curve = tuple[Sequence[float], Sequence[float]]


def _sorted(curve: Curve, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rates and qualities in the order of the rate. CurveError where no interpolation could be trusted."""
    rate, quality = (np.asarray(part, float) for part in curve)
    if rate.shape != quality.shape or rate.ndim != 1 or len(rate) < 4:
        raise CurveError(f"the {name} curve needs at least four points with a rate and a quality each")
    if not (np.isfinite(rate).all() and np.isfinite(quality).all() and (rate > 0).all()):
        raise CurveError(f"the {name} curve has a point without a finite quality or without a positive rate")
    order = np.argsort(rate, kind="stable")
    rate, quality = rate[order], quality[order]
    wrong = np.flatnonzero((np.diff(quality) <= 0) | (np.diff(rate) <= 0))
    if len(wrong):
        at = wrong[0]
        raise CurveError(
            f"the {name} curve does not rise from {rate[at]:.4g} bpp, {quality[at]:.4g} to {rate[at + 1]:.4g} bpp, "
            f"{quality[at + 1]:.4g}: leave such a setting out"
        )
    return rate, quality


def bd_rate(anchor: Curve, test: Curve, method: str = "akima") -> Delta:
    """Mean rate difference of ``test`` to ``anchor`` in percent at equal quality; each is (rates, qualities).

    Negative is better. CurveOverlapError below 50 % overlap of the quality ranges, CurveError for what is no curve.
    """
    import bjontegaard

    (ra, qa), (rt, qt) = _sorted(anchor, "anchor"), _sorted(test, "test")
    overlap = overlap_of(qa, qt)
    if overlap < MIN_OVERLAP:
        text = f"the curves share {overlap:.0%} of their quality range; BD-rate needs {MIN_OVERLAP:.0%}"
        raise CurveOverlapError(text)
    value = bjontegaard.bd_rate(ra, qa, rt, qt, method=method, require_matching_points=False, min_overlap=0)
    return Delta(float(value), method, overlap)


def bd_psnr(anchor: Curve, test: Curve, method: str = "akima") -> Delta:
    """Mean quality difference in dB at equal rate. CurveOverlapError below 50 % overlap of the (log) rate ranges."""
    import bjontegaard

    (ra, qa), (rt, qt) = _sorted(anchor, "anchor"), _sorted(test, "test")
    overlap = overlap_of(np.log(ra), np.log(rt))
    if overlap < MIN_OVERLAP:
        text = f"the curves share {overlap:.0%} of their rate range; BD-PSNR needs {MIN_OVERLAP:.0%}"
        raise CurveOverlapError(text)
    value = bjontegaard.bd_psnr(ra, qa, rt, qt, method=method, require_matching_points=False, min_overlap=0)
    return Delta(float(value), method, overlap)
