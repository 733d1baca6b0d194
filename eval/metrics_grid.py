"""How far a field on a grid is from another: weighted by area, because rows near the poles are short.

Fields are (N, H, W) with ``latitude`` (H,) in degrees; N levels or times. Everything is computed in float64. """

from __future__ import annotations

import numpy as np


def area_weights(latitude: np.ndarray) -> np.ndarray:
    """cos(latitude) of each row, mean 1: (H,). ValueError for what are no latitudes."""
    latitude = np.asarray(latitude, np.float64)
    if latitude.ndim != 1 or not (np.abs(latitude) <= 90.001).all():
        raise ValueError("latitudes are degrees between -90 and 90, one for each row")
    weights = np.cos(np.deg2rad(latitude)).clip(0)  # the poles themselves give -0
    return weights / weights.mean() if weights.any() else np.ones_like(weights)


def weighted_mean(values: np.ndarray, latitude: np.ndarray) -> float:
    """Mean over levels and the area of the grid."""
    return float((np.asarray(values, np.float64).mean((0, 2)) * area_weights(latitude)).mean())


def rmse_weighted(a: np.ndarray, b: np.ndarray, latitude: np.ndarray) -> float:
    """Root of the area-weighted mean squared difference over all levels, in the field's unit."""
    return float(np.sqrt(weighted_mean(np.square(a.astype(np.float64) - b), latitude)))


def rmse_relative(a: np.ndarray, b: np.ndarray, latitude: np.ndarray) -> float | None:
    """``rmse_weighted`` over the area-weighted standard deviation of ``a``; None for a constant field."""
    spread = np.sqrt(_variance(a, latitude))
    return float(rmse_weighted(a, b, latitude) / spread) if spread else None


def snr(a: np.ndarray, b: np.ndarray, latitude: np.ndarray) -> float | None:
    """-20 log10 of ``rmse_relative`` in dB; inf for equal fields."""
    relative = rmse_relative(a, b, latitude)
    return None if relative is None else float("inf") if relative == 0 else float(-20 * np.log10(relative))


def max_error(a: np.ndarray, b: np.ndarray, latitude: np.ndarray | None = None) -> float:
    """Largest absolute difference, in the field's unit."""
    return float(np.abs(a.astype(np.float64) - b).max())


def max_error_relative(a: np.ndarray, b: np.ndarray, latitude: np.ndarray | None = None) -> float | None:
    """``max_error`` over the range (largest minus smallest value) of ``a``; None for a constant field."""
    span = float(np.ptp(a.astype(np.float64)))
    return max_error(a, b) / span if span else None


def anomaly_correlation(a: np.ndarray, b: np.ndarray, latitude: np.ndarray,
                        climatology: np.ndarray | None = None) -> float | None:  # fmt: skip
    """Centred, area-weighted correlation of the anomalies of both fields, -1..1; None where there are none.

    Anomalies are from ``climatology`` (shape that broadcasts to the fields), or, without one, from the mean of each
    latitude of ``a``, which takes away what any climatology would know best. """
    base = a.astype(np.float64).mean(2, keepdims=True) if climatology is None else np.asarray(climatology, np.float64)
    x, y = a - base, b - base
    x, y = x - weighted_mean(x, latitude), y - weighted_mean(y, latitude)
    power = weighted_mean(x * x, latitude) * weighted_mean(y * y, latitude)
    return weighted_mean(x * y, latitude) / float(np.sqrt(power)) if power > 0 else None


def zonal_spectrum(values: np.ndarray, latitude: np.ndarray) -> np.ndarray:
    """Area-weighted mean variance at each zonal wavenumber 0..W//2: (W//2 + 1,); the sum is the mean square."""
    width = values.shape[2]
    power = np.square(np.abs(np.fft.rfft(values.astype(np.float64), axis=2))) / width**2
    power[..., 1 : (width + 1) // 2] *= 2  # each stands for the negative wavenumber too
    return (power.mean(0) * area_weights(latitude)[:, None]).mean(0)


def spectrum_ratio(a: np.ndarray, b: np.ndarray, latitude: np.ndarray) -> float | None:
    """Variance of ``b`` over that of ``a`` in the upper half of the zonal wavenumbers: below 1 where detail was lost,
    above 1 where noise was added. None where ``a`` has nothing there."""
    start = upper_half(a.shape[2])
    there, here = (float(zonal_spectrum(v, latitude)[start:].sum()) for v in (a, b))
    return here / there if there > 0 else None


def upper_half(width: int) -> int:
    """First wavenumber of the upper half of those that ``width`` values hold."""
    return max(1, (width // 2 + 1) // 2)


def bias(a: np.ndarray, b: np.ndarray, latitude: np.ndarray) -> float:
    """Area-weighted mean of ``b - a``, in the field's unit: what a budget would be wrong by."""
    return weighted_mean(b.astype(np.float64) - a, latitude)


def extremes_error(a: np.ndarray, b: np.ndarray, latitude: np.ndarray | None = None) -> float:
    """Largest change of the largest or the smallest value of any level, in the field's unit."""
    a, b = (v.astype(np.float64).reshape(v.shape[0], -1) for v in (a, b))
    return float(max(np.abs(a.max(1) - b.max(1)).max(), np.abs(a.min(1) - b.min(1)).max()))


def gradients(values: np.ndarray, latitude: np.ndarray) -> np.ndarray:
    """Differences to the next row and the next column (2, N, H-1, W-1) per degree on the sphere, the rows at the poles without
    those along them, where columns meet."""
    x = values.astype(np.float64)
    step = np.abs(np.diff(np.asarray(latitude, np.float64)))[:, None]
    cosine = np.cos(np.deg2rad(latitude))[:-1, None]
    width = 360 / values.shape[2] * np.where(cosine > 1e-3, cosine, np.inf)
    return np.stack([np.diff(x, axis=1)[..., :-1] / np.where(step > 0, step, np.inf), np.diff(x, axis=2)[:, :-1] / width])


def gradient_error(a: np.ndarray, b: np.ndarray, latitude: np.ndarray) -> float | None:
    """Area-weighted RMS error of the horizontal gradient over the RMS gradient of ``a``; None where ``a`` has none."""
    there, here = gradients(a, latitude), gradients(b, latitude)
    rows = np.asarray(latitude, np.float64)[:-1]
    power = weighted_mean(np.square(there).sum(0), rows)
    return float(np.sqrt(weighted_mean(np.square(here - there).sum(0), rows) / power)) if power > 0 else None


def resolved_wavenumber(a: np.ndarray, b: np.ndarray, latitude: np.ndarray) -> float:
    """First zonal wavenumber at which the error is as large as the field, over the largest one: 1 where there is none.

    Below 0.7 the finest waves that a user would look at are noise. """
    field, error = zonal_spectrum(a, latitude), zonal_spectrum(b.astype(np.float64) - a, latitude)
    rounding = np.finfo(a.dtype).eps ** 2 * field.sum()  # waves that only rounding made are neither kept nor lost
    lost = np.flatnonzero((error >= field) & (error > rounding))
    lost = lost[lost > 0]
    return float(lost[0] / (len(field) - 1)) if len(lost) else 1.0


def data_ssim(a: np.ndarray, b: np.ndarray, latitude: np.ndarray | None = None) -> float:
    """Smallest structural similarity of the levels as data, not as a picture (Baker et al. 2022, "DSSIM: a structural
    similarity index for floating-point data"): both scaled by their range, in 256 steps, windows of 11 x 11, sigma 1.5."""
    worst = 1.0
    for x, y in zip(a.astype(np.float64), b.astype(np.float64)):
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        if high > low:
            x, y = (np.rint((v - low) / (high - low) * 255) / 255 for v in (x, y))
            worst = min(worst, _ssim(x, y))
    return worst


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    taps /= taps.sum()

    def mean(v: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            padded = np.pad(v, [(5, 5) if i == axis else (0, 0) for i in (0, 1)], "edge")
            v = sum(t * np.take(padded, range(i, i + v.shape[axis]), axis) for i, t in enumerate(taps))
        return v

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c = 1e-8
    return float((((2 * mx * my + c) * (2 * both + c)) / ((mx * mx + my * my + c) * (vx + vy + c))).mean())


def _variance(a: np.ndarray, latitude: np.ndarray) -> float:
    a = a.astype(np.float64)
    return weighted_mean(np.square(a - weighted_mean(a, latitude)), latitude)


METRICS = {
    "snr": snr, "rmse_weighted": rmse_weighted, "rmse_relative": rmse_relative, "max_error": max_error,
    "max_error_relative": max_error_relative, "anomaly_correlation": anomaly_correlation,
    "spectrum_ratio": spectrum_ratio, "bias": bias, "extremes_error": extremes_error, "gradient_error": gradient_error,
    "resolved_wavenumber": resolved_wavenumber, "data_ssim": data_ssim,
}  # fmt: skip
"""Metrics by the name that results carry: (original, decoded, latitude) -> value, None where undefined."""
