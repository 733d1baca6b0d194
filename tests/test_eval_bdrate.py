"""BD-rate against published figures, and curves that must be refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from neuralcodec.container.errors import CodecError, UsageError
from neuralcodec.eval.bdrate import (
    ANCHORS,
    METHODS,
    CurveError,
    CurveOverlapError,
    bd_psnr,
    bd_rate,
    load_anchor,
    overlap_of,
)

pytest.importorskip("bjontegaard")

RATE, QUALITY = np.geomspace(0.1, 2, 6), np.linspace(28, 40, 6)


def kodak(name: str) -> tuple[list[float], list[float]]:
    curve = load_anchor("kodak", name)
    return curve["bpp"], curve["psnr"]


@pytest.mark.parametrize(("name", "expected"), [
    ("hm", 23.3), ("bpg_444_x265_ycbcr", 22.0), ("av1", 16.2), ("mbt2018_mse", 11.0), ("cheng2020-anchor_mse", 3.6),
    ("paper-elic2022_mse", -7.1),
])  # fmt: skip
def test_published_curves_give_the_published_differences(name, expected):
    for method in METHODS:
        assert bd_rate(kodak("vtm"), kodak(name), method).value == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_known_shift(method):
    assert bd_rate((RATE, QUALITY), (RATE * 0.8, QUALITY), method).value == pytest.approx(-20, abs=1e-6)
    assert bd_psnr((RATE, QUALITY), (RATE, QUALITY + 0.5), method).value == pytest.approx(0.5, abs=1e-6)


def test_the_order_of_points_does_not_matter():
    mixed = np.array([3, 0, 5, 1, 4, 2])
    there = bd_rate((RATE, QUALITY), (RATE[mixed] * 1.1, QUALITY[mixed])).value
    assert there == pytest.approx(10, abs=1e-6)


def test_overlap_is_of_the_smaller_range():
    assert overlap_of(np.array([20, 50]), np.array([30, 40])) == 1
    assert overlap_of(np.array([20, 40]), np.array([35, 45])) == 0.5
    assert overlap_of(np.array([20, 30]), np.array([35, 45])) == 0


def test_too_little_overlap_is_refused():
    with pytest.raises(CurveOverlapError, match="42% of their quality range"):
        bd_rate((RATE, QUALITY), (RATE, QUALITY + 7))
    with pytest.raises(CurveOverlapError, match="0% of their rate range"):
        bd_psnr((RATE, QUALITY), (RATE * 100, QUALITY))
    assert issubclass(CurveOverlapError, CodecError)


@pytest.mark.parametrize(("rate", "quality", "message"), [
    (RATE[:3], QUALITY[:3], "four points"),
    (RATE, [*QUALITY[:5], np.inf], "finite"),
    ([0, *RATE[1:]], QUALITY, "positive rate"),
    (RATE, [28, 30, 29.5, 35, 38, 40], "does not rise from 0.1821 bpp"),
    ([0.1, 0.1, 0.5, 1], [28, 29, 30, 31], "does not rise"),
])  # fmt: skip
def test_what_is_no_curve_is_refused(rate, quality, message):
    with pytest.raises(CurveError, match=message):
        bd_rate((RATE, QUALITY), (rate, quality))


def test_unknown_anchors_name_the_known_ones():
    with pytest.raises(UsageError, match="cheng2020-anchor_mse"):
        load_anchor("kodak", "nothing")
    with pytest.raises(UsageError, match="anchors for clic2020-professional, kodak"):
        load_anchor("nowhere", "vtm")


def test_every_anchor_names_its_source_and_is_a_curve():
    for path in ANCHORS.glob("*.json"):
        anchors = json.loads(path.read_text())
        assert anchors["dataset"] == path.stem and "not measured" in anchors["note"].lower()
        for name, curve in anchors["curves"].items():
            assert curve["name"] and curve["source"], name
            bd_rate((curve["bpp"], curve["psnr"]), (curve["bpp"], curve["psnr"]))
            assert len(curve.get("ms_ssim", curve["bpp"])) == len(curve["bpp"]), name
