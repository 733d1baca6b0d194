"""BD-rate and BD-PSNR against named anchor curves, through the ``bjontegaard`` package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..container.errors import CodecError

ANCHORS = Path(__file__).resolve().parent / "anchors"
METHODS = ("akima", "pchip")
MIN_OVERLAP = 0.5


class CurveOverlapError(CodecError):
    """Two curves share too little of their quality range for a mean over it to say anything."""


@dataclass(frozen=True)
class Delta:
    """Result of a comparison; ``overlap`` is the shared share of the anchor-and-test quality range, 0..1."""

    percent: float
    method: str
    overlap: float


def load_anchor(dataset: str, name: str) -> dict:
    """A published curve: keys name, source, bpp, psnr (dB) and perhaps ms_ssim. KeyError with the known names."""
    curves = json.loads((ANCHORS / f"{dataset}.json").read_text())["curves"]
    if name not in curves:
        raise KeyError(f"no anchor {name!r} for {dataset}; known are {', '.join(curves)}")
    return curves[name]


def overlap_of(a: list[float], b: list[float]) -> float:
    """Shared part of two quality ranges over the smaller of them."""
    shared = min(max(a), max(b)) - max(min(a), min(b))
    return max(0.0, shared) / min(max(a) - min(a), max(b) - min(b))


def _sorted(rate: list[float], quality: list[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(rate) != len(quality) or len(rate) < 4:
        raise ValueError("a curve needs at least four points with a rate and a quality each")
    order = np.argsort(rate)
    return np.asarray(rate, float)[order], np.asarray(quality, float)[order]


def bd_rate(anchor: tuple[list[float], list[float]], test: tuple[list[float], list[float]], method: str = "akima") -> Delta:
    """Mean rate difference of ``test`` to ``anchor`` in percent at equal quality; each is (rates, qualities).

    Negative is better. CurveOverlapError below 50 % overlap of the quality ranges.
    """
    import bjontegaard

    (ra, qa), (rt, qt) = _sorted(*anchor), _sorted(*test)
    overlap = overlap_of(list(qa), list(qt))
    if overlap < MIN_OVERLAP:
        raise CurveOverlapError(f"the curves share {overlap:.0%} of their quality range; BD-rate needs {MIN_OVERLAP:.0%}")
    value = bjontegaard.bd_rate(ra, qa, rt, qt, method=method, require_matching_points=False, min_overlap=0)
    return Delta(float(value), method, overlap)


def bd_psnr(anchor: tuple[list[float], list[float]], test: tuple[list[float], list[float]], method: str = "akima") -> Delta:
    """Mean quality difference in dB at equal rate. CurveOverlapError below 50 % overlap of the (log) rate ranges."""
    import bjontegaard

    (ra, qa), (rt, qt) = _sorted(*anchor), _sorted(*test)
    overlap = overlap_of(list(np.log(ra)), list(np.log(rt)))
    if overlap < MIN_OVERLAP:
        raise CurveOverlapError(f"the curves share {overlap:.0%} of their rate range; BD-PSNR needs {MIN_OVERLAP:.0%}")
    value = bjontegaard.bd_psnr(ra, qa, rt, qt, method=method, require_matching_points=False, min_overlap=0)
    return Delta(float(value), method, overlap)
