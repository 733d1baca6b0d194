"""Quality of sequences (T, H, W, 3) uint8: that of the frames, and what only shows when they move."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..container.errors import UsageError
from . import metrics


def per_frame(metric: Callable[[np.ndarray, np.ndarray, int], float | None]) -> Callable:
    """A metric of pictures as the mean over frames; None where it is undefined on one."""

    def mean(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float | None:
        values = [metric(x, y, peak) for x, y in zip(a, b, strict=True)]
        return None if None in values else float(np.mean(values))

    return mean


def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Motion (2, H, W) in pixels, rows then columns: pixel p of ``second`` was at p + flow in ``first``.

    Iterative Lucas-Kanade over a pyramid (Le Besnerais and Champagnat 2005), from scikit-image. UsageError without it.
    """
    try:
        from skimage.registration import optical_flow_ilk
    except ImportError:
        raise UsageError("warping_error needs the package scikit-image: pip install scikit-image") from None
    weights = np.array([0.299, 0.587, 0.114])
    return np.stack(optical_flow_ilk(second @ weights / 255, first @ weights / 255, radius=7))


def warp(picture: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """``picture`` (H, W, C) sampled at p + motion, bilinearly, edges repeated: float64 (H, W, C)."""
    h, w, _ = picture.shape
    rows, columns = np.mgrid[0:h, 0:w] + motion
    rows, columns = rows.clip(0, h - 1), columns.clip(0, w - 1)
    r, c = np.floor(rows).astype(int), np.floor(columns).astype(int)
    r1, c1 = np.minimum(r + 1, h - 1), np.minimum(c + 1, w - 1)
    fr, fc = (rows - r)[..., None], (columns - c)[..., None]
    top, bottom = (picture[i, c] * (1 - fc) + picture[i, c1] * fc for i in (r, r1))
    return top * (1 - fr) + bottom * fr


def warping_error(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float | None:
    """How badly motion carries each decoded frame into the next: mean squared error in units of (peak/255)^2.

    Motion and visibility are those of the original ``a`` (as in Lai et al. 2018): pixels are left out where the
    motion there and back does not meet. The original itself does not score zero; compare with
    ``warping_error(a, a)``. None for a single frame.
    """
    errors = []
    for t in range(1, len(a)):
        motion, back = flow(a[t - 1], a[t]), flow(a[t], a[t - 1])
        returned = motion + np.moveaxis(warp(np.moveaxis(back, 0, 2), motion), 2, 0)
        length = np.square(motion).sum(0) + np.square(back).sum(0)
        visible = np.square(returned).sum(0) <= 0.01 * length + 0.5  # the bound of Sundaram et al. 2010
        if visible.any():
            difference = b[t].astype(np.float64) - warp(b[t - 1].astype(np.float64), motion)
            errors.append(np.square(difference)[visible].mean())
    return float(np.mean(errors)) * (255 / peak) ** 2 if errors else None


def flicker(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float | None:
    """Change from frame to frame that is not in the original: mean |difference of the temporal differences| in code
    values of 255. Zero for a decoder whose error does not move. None for a single frame."""
    if len(a) < 2:
        return None
    error = b.astype(np.float64) - a
    return float(np.abs(np.diff(error, axis=0)).mean() * 255 / peak)


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], float | None]] = {
    name: per_frame(metric) for name, metric in metrics.METRICS.items()
} | {"warping_error": warping_error, "flicker": flicker}
"""Metrics of a sequence: (original, decoded, peak) -> value, None where undefined."""
