"""Quality of pictures, each metric under its full name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.image import psnr_of as psnr_rgb

__all__ = [
    "METRICS", "decibel", "ms_ssim", "ms_ssim_reduced", "ms_ssim_tensor", "mse_rgb", "psnr_pooled", "psnr_rgb",
    "psnr_y",
]  # fmt: skip

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5
MS_SSIM_MIN_SIDE = (WINDOW - 1) * 2 ** (len(MS_SSIM_WEIGHTS) - 1) + 1  # 161


def psnr_y(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float:
    """PSNR in dB of BT.601 luma of two RGB pictures (H, W, 3)."""
    weights = np.array([0.299, 0.587, 0.114])
    return psnr_rgb((a @ weights)[..., None], (b @ weights)[..., None], peak)


def mse_rgb(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared error over all channels of two pictures (H, W, C), in squared code values."""
    return float(np.mean(np.square(a.astype(np.float64) - b)))


def psnr_pooled(mses: list[float], peak: int = 255) -> float:
    """PSNR of the mean squared error over a set: lower than the mean of PSNRs; inf when all are zero."""
    mean = float(np.mean(mses))
    return float(10 * np.log10(peak**2 / mean)) if mean else float("inf")


def decibel(similarity: float) -> float:
    """-10 log10(1 - similarity): spreads SSIM values close to 1 so that curves can be compared; inf at 1."""
    return float(-10 * np.log10(1 - similarity)) if similarity < 1 else float("inf")


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must also serve training, and a captured step cannot copy to a device
def _window(channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2
    g = torch.exp(-(x**2) / (2 * SIGMA**2))
    return (g / g.sum()).repeat(channels, 1, 1, 1).to(device, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _weights(scales: int, device: torch.device) -> Tensor:
    # the published five sum to 1.0001 and are taken as they are, as everywhere
    total = 1.0 if scales == len(MS_SSIM_WEIGHTS) else sum(MS_SSIM_WEIGHTS[:scales])
    return torch.tensor(MS_SSIM_WEIGHTS[:scales], device=device).view(-1, 1, 1) / total


def _blur(x: Tensor, window: Tensor) -> Tensor:
    c = x.shape[1]
    return F.conv2d(F.conv2d(x, window, groups=c), window.transpose(2, 3), groups=c)


def _ssim(x: Tensor, y: Tensor, window: Tensor, peak: float) -> tuple[Tensor, Tensor]:
    """(SSIM, contrast-structure term), each (B, C)."""
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mx, my = _blur(x, window), _blur(y, window)
    vx, vy = _blur(x * x, window) - mx * mx, _blur(y * y, window) - my * my
    cs = (2 * (_blur(x * y, window) - mx * my) + c2) / (vx + vy + c2)
    ssim = (2 * mx * my + c1) / (mx * mx + my * my + c1) * cs
    return ssim.flatten(2).mean(2), cs.flatten(2).mean(2)


def ms_ssim_tensor(x: Tensor, y: Tensor, peak: float = 1.0, scales: int = len(MS_SSIM_WEIGHTS)) -> Tensor:
    """Multi-scale SSIM (Wang et al. 2003; 5 scales, window 11, sigma 1.5, per channel) of (B, C, H, W) -> (B,).

    Differentiable. With fewer ``scales`` the weights of the first ones are made to sum to 1: a different metric.
    ValueError for sides too small for that many scales (161 pixels for five).
    """
    smallest = (WINDOW - 1) * 2 ** (scales - 1) + 1
    if min(x.shape[2:]) < smallest:
        raise ValueError(f"MS-SSIM of {scales} scales needs sides of at least {smallest} pixels")
    window = _window(x.shape[1], x.device, x.dtype)
    terms = []
    for scale in range(scales):
        ssim, cs = _ssim(x, y, window, peak)
        terms.append((ssim if scale == scales - 1 else cs).clamp_min(0))
        padding = [s % 2 for s in x.shape[2:]]
        x, y = (F.avg_pool2d(t, 2, padding=padding) for t in (x, y))
    return torch.prod(torch.stack(terms) ** _weights(scales, x.device), 0).mean(1)


def _tensors(a: np.ndarray, b: np.ndarray) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(t).permute(2, 0, 1)[None].float() for t in (a, b))


def ms_ssim(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float | None:
    """MS-SSIM of two pictures (H, W, C); None below 161 pixels a side (see ``ms_ssim_reduced``)."""
    if min(a.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    return float(ms_ssim_tensor(*_tensors(a, b), peak))


def ms_ssim_reduced(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float | None:
    """MS-SSIM over as many of the five scales as fit (one needs 11 pixels): ``ms_ssim`` from 161 pixels a side on.

    For small pictures only; the values of different numbers of scales are not comparable. None below 11 pixels.
    """
    fitting = [n for n in range(1, len(MS_SSIM_WEIGHTS) + 1) if (WINDOW - 1) * 2 ** (n - 1) < min(a.shape[:2])]
    return float(ms_ssim_tensor(*_tensors(a, b), peak, fitting[-1])) if fitting else None


def _late(name: str) -> Callable[[np.ndarray, np.ndarray, int], float | None]:
    """A metric of ``perceptual``, whose libraries are loaded by the first call."""

    def metric(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float | None:
        from . import perceptual

        return getattr(perceptual, name)(a, b, peak)

    return metric


NETWORKS = ("lpips", "dists", "feature_distance")
METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], float | None]] = {
    "psnr": psnr_rgb, "psnr_y": psnr_y, "ms_ssim": ms_ssim, "ms_ssim_reduced": ms_ssim_reduced,
} | {name: _late(name) for name in NETWORKS}  # fmt: skip
"""Metrics of a picture by the name that results carry: (original, decoded, peak) -> value, None where undefined."""
