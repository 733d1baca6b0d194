"""Start a residual transform at a Karhunen-Loeve transform instead of noise.

The main path of ``codecs.hyperprior`` is linear: 4x4 blocks, then twice 2x2 neighbours. Each of these three steps can hold
the principal components of what it sees, the decoder their transpose, and the residual branches zero. The fresh codec then
is a block transform codec with a well-fitted transform and step sizes, and training starts from there: measured after 2,000
steps from noise, the transform alone (no quantisation) still lost more than a whole JPEG does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..entropy.context.slices import SCALE_GAIN
from ..entropy.gaussian import SCALE_MIN, SCALE_STEP

HIGH_RATE_GAIN = 50.0  # steps per unit at lambda 1: quantisation noise of 2.16 / lambda, see the rate-distortion slope
BALANCE = 0.5  # y is divided by this power of its standard deviation, so that the nets see even channels


def components(columns: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Leading principal directions (keep, d) of samples (n, d), and their standard deviations (keep,). Mean is not removed."""
    covariance = (columns.T @ columns).double() / len(columns)
    values, vectors = torch.linalg.eigh(covariance)
    order = values.argsort(descending=True)[:keep]
    return vectors[:, order].T.float(), values[order].clamp_min(1e-12).sqrt().float()


def merge2(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 4*C, h/2, w/2), channel order (C, row, column) as in a convolution kernel."""
    return F.pixel_unshuffle(x, 2)


def as_samples(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def start_at_klt(codec, pictures: Tensor) -> None:
    """Fit the transform, the gains and the first scales of ``codec`` to ``pictures`` (n, 3, 16h, 16w) uint8."""
    g_a, g_s, latent = codec.g_a, codec.g_s, codec.latent
    for module in codec.modules():
        if hasattr(module, "rest"):  # residual blocks of any kind
            module.rest()
    x = F.pixel_unshuffle(pictures.float() / 255 - 0.5, 4)

    patch = g_a.patch[1]
    first, _ = components(as_samples(x), min(x.shape[1], len(patch.weight)))
    patch.weight[: len(first)] = 0
    patch.weight[: len(first), :, 1, 1] = first
    patch.bias.zero_()
    out = g_s.at4[-1][0]
    out.weight.zero_()
    out.weight[:, : len(first), 1, 1] = first.T
    out.bias.zero_()
    x = F.conv2d(x, first[:, :, None, None])

    down = g_a.at4[-1]
    width = down.weight.shape[0]
    second, _ = components(as_samples(merge2(x)), width)
    down.weight.mul_(0.1)  # taps and channels beyond the block transform start small
    down.weight[:, : len(first)] = 0
    down.weight[:, : len(first), 1:, 1:] = second.reshape(width, len(first), 2, 2)
    down.bias.zero_()
    up = g_s.at8[-1][0]  # (4 * channels at H/4, channels at H/8, 1, 1), rows in the order (channel, row, column)
    up.weight.zero_()
    up.weight[: 4 * len(first), :, 0, 0] = second.T
    up.bias.zero_()
    x = F.conv2d(merge2(x), second[:, :, None, None])

    down = g_a.at8[-1]
    third, deviation = components(as_samples(merge2(x)), down.weight.shape[0])
    scale = deviation**BALANCE
    down.weight.copy_((third / scale[:, None]).reshape(down.weight.shape))
    down.bias.zero_()
    up = g_s.at16[-1][0]
    up.weight[:, :, 0, 0] = third.T * scale
    up.bias.zero_()

    cfg = latent.cfg
    lam = torch.linspace(math.log(cfg.lambda_low), math.log(cfg.lambda_high), cfg.knots)
    latent.log_gain.copy_(math.log(HIGH_RATE_GAIN) + 0.5 * lam[:, None] + scale.log())
    at = 0
    for model in latent.models:
        sigma = (deviation / scale)[at : at + model.channels].clamp_min(1e-4)
        model.start_scales((sigma / SCALE_MIN).log() / SCALE_STEP / SCALE_GAIN)
        at += model.channels
