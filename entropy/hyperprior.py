"""Hyperprior with channel slices, a two-pass checkerboard and latent residual prediction.

    y --h_a--> z --round--> z^ --h_s--> features f --------------------------+
                 |                                                           |
           factorised prior                                                  v
    for every slice j of channels, for anchors then the others:
        known = [slices < j, anchors of slice j] --3x3--> (+) --> trunk --> mean mu, scale index s
        q = round((y - mu) * gain(level))    coded with row round(s + log gain) of the Gaussian tables
        y^ = mu + (q + 0.5 * hardtanh(lrp(trunk, q))) / gain(level)

All nets live in the domain of y, where the range does not depend on the quality; the gain vector of the level turns it
into steps (Cui et al. 2021), and enters the scale as an offset in steps of the scale table. Sources: mean-scale
hyperprior and latent residual prediction, Minnen et al. 2018 and 2020; checkerboard, He et al. 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.blocks import LevelAffine, knot_weights
from .context.checkerboard import anchor_mask
from .exact import ExactConv2d, ExactReLU
from .factorized import FactorizedPrior
from .gaussian import SCALE_MIN, SCALE_STEP, gaussian_likelihood

SCALE_GAIN = 8.0  # one unit of the trunk's scale output is eight rows of the scale table
INIT_SIGMA = 0.3


@dataclass(frozen=True)
class LatentConfig:
    """Widths of the entropy model of y (B, sum(slices), H/16, W/16)."""

    slices: tuple[int, ...]  # channels of each slice of y
    hyper: int  # channels of z
    width: int  # hidden width of h_a and h_s
    features: int  # channels that h_s hands to the slices
    context: int  # width of the context layer of a slice
    trunk: int  # width of its second layer
    residual: int  # hidden width of the latent residual prediction
    kernel: int = 3  # side of the context convolution
    knots: int = 9  # learned vectors over the quality range
    levels: int = 1000
    lambda_low: float = 0.0008
    lambda_high: float = 0.5

    @property
    def channels(self) -> int:
        return sum(self.slices)


def round_ste(v: Tensor) -> Tensor:
    """round(v) with the identity as gradient."""
    return v + (torch.round(v) - v).detach()


class LevelBias(nn.Module):
    """A vector (channels,) that depends on the level, linear between learned knots."""

    def __init__(self, channels: int, cfg: LatentConfig):
        super().__init__()
        self.levels = cfg.levels
        self.table = nn.Parameter(torch.zeros(cfg.knots, channels))

    def forward(self, level: Tensor) -> Tensor:
        """level (B,) -> (B, channels, 1, 1)."""
        return (knot_weights(level, len(self.table), self.levels) @ self.table)[:, :, None, None]


class SliceModel(nn.Module):
    """Mean, scale and residual prediction of one slice, given hyper features and what is known of y."""

    def __init__(self, known: int, channels: int, cfg: LatentConfig):
        super().__init__()
        self.channels = channels
        self.context = ExactConv2d(known + channels, cfg.context, cfg.kernel, padding=cfg.kernel // 2)
        self.hyper = ExactConv2d(cfg.features, cfg.context, 1)
        self.bias = nn.ModuleList(LevelBias(cfg.context, cfg) for _ in range(2))
        self.trunk = ExactConv2d(cfg.context, cfg.trunk, 1)
        self.head = ExactConv2d(cfg.trunk, 2 * channels, 1)
        self.lrp_in = ExactConv2d(cfg.trunk + channels, cfg.residual, 1)
        self.lrp_out = ExactConv2d(cfg.residual, channels, 1)
        self.relu = ExactReLU()
        with torch.no_grad():
            self.head.weight.mul_(0.3)
            self.head.bias.zero_()
            self.head.bias[channels:] = math.log(INIT_SIGMA / SCALE_MIN) / SCALE_STEP / SCALE_GAIN
            self.lrp_out.weight.mul_(0.1)

    def parameters_at(self, known: Tensor, hyper: Tensor, half: int, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(trunk, mu, s) for all positions of the grid; ``half`` 0 for anchors, 1 for the others."""
        t = self.relu(self.context(known) + hyper + self.bias[half](level))
        t = self.relu(self.trunk(t))
        mu, s = self.head(t).split(self.channels, 1)
        return t, mu, s * SCALE_GAIN

    def residual(self, trunk: Tensor, q: Tensor) -> Tensor:
        """Correction in steps, -0.5..0.5, of the values that were coded as q."""
        t = self.relu(self.lrp_in(torch.cat([trunk, q.clamp(-8, 8)], 1)))
        return 0.5 * F.hardtanh(self.lrp_out(t))


class ContextHyperprior(nn.Module):
    """Entropy model of a latent y, for training (``forward``)."""

    def __init__(self, cfg: LatentConfig):
        super().__init__()
        self.cfg = cfg
        m, w = cfg.channels, cfg.width
        self.h_a_level = LevelAffine(m, cfg.knots, cfg.levels)
        self.h_a = nn.Sequential(
            nn.Conv2d(m, w, 1), nn.ReLU(),
            nn.Conv2d(w, w, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(w, cfg.hyper, 3, stride=2, padding=1),
        )  # fmt: skip
        self.z_gain = LevelAffine(cfg.hyper, cfg.knots, cfg.levels)
        self.prior = FactorizedPrior(cfg.hyper)
        self.h_s1 = ExactConv2d(cfg.hyper, 4 * w, 1)
        self.h_s_bias = LevelBias(w, cfg)
        self.h_s2 = ExactConv2d(w, w, 3, padding=1)
        self.h_s3 = ExactConv2d(w, 4 * cfg.features, 1)
        self.relu = ExactReLU()
        self.models = nn.ModuleList()
        known = 0
        for channels in cfg.slices:
            self.models.append(SliceModel(known, channels, cfg))
            known += channels
        # log gain: quantisation in a good transform follows sqrt(lambda); 8 steps per unit at lambda 0.01 to start
        lam = torch.linspace(math.log(cfg.lambda_low), math.log(cfg.lambda_high), cfg.knots)
        start = math.log(8) + 0.5 * (lam - math.log(0.01))
        self.log_gain = nn.Parameter(start[:, None].repeat(1, m))
        with torch.no_grad():
            self.h_a[-1].weight.mul_(4)

    def synthesise_hyper(self, z_hat: Tensor, level: Tensor) -> Tensor:
        """z^ (B, hyper, h, w) -> features (B, features, 4h, 4w)."""
        f = F.pixel_shuffle(self.h_s1(z_hat), 2) + self.h_s_bias(level)
        f = self.relu(self.h_s2(self.relu(f)))
        return self.relu(F.pixel_shuffle(self.h_s3(f), 2))

    def forward(self, y: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y (B, M, h, w) with h, w multiples of 4, level (B,) -> (y^, bits of y (B,), bits of z (B,)).

        Rates are taken with additive uniform noise, values pass on with straight-through rounding.
        """
        cfg, batch = self.cfg, len(y)
        log_gain = (knot_weights(level, cfg.knots, cfg.levels) @ self.log_gain)[:, :, None, None]
        z = self.z_gain(self.h_a(self.h_a_level(y, level)), level)
        z_bits = -torch.log2(self.prior.likelihood(z + torch.rand_like(z) - 0.5)).reshape(batch, -1).sum(1)
        f = self.synthesise_hyper(round_ste(z), level)
        anchors = anchor_mask(*y.shape[2:], y.device)
        done: list[Tensor] = []
        noisy, scales = [], []
        for model, target, slice_log_gain in zip(self.models, y.split(cfg.slices, 1), log_gain.split(cfg.slices, 1)):
            gain, hyper = slice_log_gain.exp(), model.hyper(f)
            current = torch.zeros_like(target)
            for half, mask in enumerate((anchors, 1 - anchors)):
                t, mu, s = model.parameters_at(torch.cat([*done, current], 1), hyper, half, level)
                v = (target - mu) * gain
                q = round_ste(v)
                value = mu + (q + model.residual(t, q)) / gain
                current = current + value * mask
                if half == 0:
                    kept_v, kept_s = v * mask, s * mask
                else:
                    kept_v, kept_s = kept_v + v * mask, kept_s + s * mask
            noisy.append(kept_v + torch.rand_like(v) - 0.5)
            scales.append(math.log(SCALE_MIN) + SCALE_STEP * kept_s + slice_log_gain)
            done.append(current)
        likelihood = gaussian_likelihood(torch.cat(noisy, 1), torch.cat(scales, 1))
        y_bits = -torch.log2(likelihood).reshape(batch, -1).sum(1)
        return torch.cat(done, 1), y_bits, z_bits
