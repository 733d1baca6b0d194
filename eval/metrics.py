"""Quality of pictures, each metric under its full name."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..codecs.image import psnr_of as psnr_rgb

__all__ = ["ms_ssim", "ms_ssim_tensor", "psnr_pooled", "psnr_rgb", "psnr_y"]

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5
MS_SSIM_MIN_SIDE = (WINDOW - 1) * 2 ** (len(MS_SSIM_WEIGHTS) - 1) + 1  # 161


def psnr_y(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float:
    """PSNR in dB of BT.601 luma of two RGB pictures (H, W, 3)."""
    weights = np.array([0.299, 0.587, 0.114])
    return psnr_rgb((a @ weights)[..., None], (b @ weights)[..., None], peak)


def psnr_pooled(mses: list[float], peak: int = 255) -> float:
    """PSNR of the mean squared error over a set: lower than the mean of PSNRs."""
    return float(10 * np.log10(peak**2 / np.mean(mses)))


def _window(channels: int) -> Tensor:
    x = torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2
    g = torch.exp(-(x**2) / (2 * SIGMA**2))
    return (g / g.sum()).repeat(channels, 1, 1, 1)


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


def ms_ssim_tensor(x: Tensor, y: Tensor, peak: float = 1.0) -> Tensor:
    """Multi-scale SSIM (Wang et al. 2003; 5 scales, window 11, sigma 1.5, per channel) of (B, C, H, W) -> (B,).

    Differentiable. ValueError for sides below 161.
    """
    if min(x.shape[2:]) < MS_SSIM_MIN_SIDE:
        raise ValueError(f"MS-SSIM of five scales needs sides of at least {MS_SSIM_MIN_SIDE} pixels")
    window = _window(x.shape[1]).to(x)
    terms = []
    for scale in range(len(MS_SSIM_WEIGHTS)):
        ssim, cs = _ssim(x, y, window, peak)
        terms.append((ssim if scale == len(MS_SSIM_WEIGHTS) - 1 else cs).clamp_min(0))
        padding = [s % 2 for s in x.shape[2:]]
        x, y = (F.avg_pool2d(t, 2, padding=padding) for t in (x, y))
    weights = torch.tensor(MS_SSIM_WEIGHTS, device=x.device).view(-1, 1, 1)
    return torch.prod(torch.stack(terms) ** weights, 0).mean(1)


def ms_ssim(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float | None:
    """MS-SSIM of two pictures (H, W, C); None where they are smaller than 161 pixels a side."""
    if min(a.shape[:2]) < MS_SSIM_MIN_SIDE:
        return None
    x, y = (torch.tensor(t).permute(2, 0, 1)[None].float() for t in (a, b))
    return float(ms_ssim_tensor(x, y, peak))
