"""Metrics against their definitions and against the packages that papers use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import scene
from neuralcodec.eval import metrics


def damaged(picture: np.ndarray, sigma: float, seed: int = 1) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, picture.shape)
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(161, 161), (256, 200), (193, 322)])
@pytest.mark.parametrize("sigma", [2, 25])
def test_ms_ssim_equals_pytorch_msssim(size, sigma):
    reference = pytest.importorskip("pytorch_msssim").ms_ssim
    a = scene(*size)
    b = damaged(a, sigma)
    x, y = (torch.tensor(t).permute(2, 0, 1)[None].float() for t in (a, b))
    assert metrics.ms_ssim(a, b) == pytest.approx(float(reference(x, y, data_range=255)), abs=1e-5)


def test_ms_ssim_has_a_gradient_and_a_range():
    x = torch.rand(2, 3, 170, 180, requires_grad=True)
    value = metrics.ms_ssim_tensor(x, x.detach().flip(3))
    value.sum().backward()
    assert value.shape == (2,) and float(value.detach().max()) < 1 and x.grad.abs().sum() > 0


def test_small_pictures_have_no_ms_ssim_but_the_reduced_one():
    a = scene(160, 300)
    b = damaged(a, 10)
    assert metrics.ms_ssim(a, b) is None
    assert 0 < metrics.ms_ssim_reduced(a, b) < 1
    assert metrics.ms_ssim_reduced(a[:11, :11], a[:11, :11]) == pytest.approx(1)
    assert metrics.ms_ssim_reduced(a[:10], b[:10]) is None
    with pytest.raises(ValueError, match="161"):
        metrics.ms_ssim_tensor(torch.zeros(1, 3, 160, 300), torch.zeros(1, 3, 160, 300))


def test_reduced_ms_ssim_of_a_large_picture_is_ms_ssim():
    a = scene(176, 170)
    b = damaged(a, 10)
    assert metrics.ms_ssim_reduced(a, b) == metrics.ms_ssim(a, b)


def test_one_scale_is_plain_ssim():
    reference = pytest.importorskip("pytorch_msssim").ssim
    a = scene(15, 19)
    b = damaged(a, 10)
    x, y = (torch.tensor(t).permute(2, 0, 1)[None].float() for t in (a, b))
    assert metrics.ms_ssim_reduced(a, b) == pytest.approx(float(reference(x, y, data_range=255)), abs=1e-5)


def test_psnr_of_known_errors():
    a = np.zeros((8, 8, 3), np.uint8)
    b = a + 1
    assert metrics.mse_rgb(a, b) == 1
    assert metrics.psnr_rgb(a, b) == pytest.approx(48.1308, abs=1e-4)
    assert metrics.psnr_y(a, b) == pytest.approx(48.1308, abs=1e-4)
    green = a.copy()
    green[..., 1] = 10
    assert metrics.psnr_y(a, green) == pytest.approx(20 * np.log10(255 / 5.87), abs=1e-6)
    assert metrics.psnr_rgb(a, a) == float("inf")


def test_pooled_psnr_is_the_psnr_of_the_mean_error():
    assert metrics.psnr_pooled([1.0, 3.0]) == pytest.approx(10 * np.log10(255**2 / 2))
    assert metrics.psnr_pooled([1.0, 9.0]) < np.mean([metrics.psnr_pooled([m]) for m in (1.0, 9.0)])
    assert metrics.psnr_pooled([0.0]) == float("inf")


def test_decibel():
    assert metrics.decibel(0.99) == pytest.approx(20)
    assert metrics.decibel(1.0) == float("inf")


def test_every_metric_answers_for_16_bit_too():
    a = scene(176, 176).astype(np.uint16) * 257
    b = damaged(scene(176, 176), 10).astype(np.uint16) * 257
    for name in ("psnr", "psnr_y", "ms_ssim", "ms_ssim_reduced"):  # those that need no weights
        metric = metrics.METRICS[name]
        assert metric(a, b, 65535) == pytest.approx(metric(a // 257, b // 257, 255), rel=1e-4), name
