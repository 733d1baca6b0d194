"""Fully factorised prior of the hyper-latent z: one learned density per channel, frozen to integer tables.

Source: Balle et al. 2018, "Variational image compression with a scale hyperprior", appendix 6.1: the cumulative is a
small monotone network per channel (softplus matrices, tanh gates).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tables import Tables, pmf_to_tables

WIDTHS = (1, 3, 3, 3, 1)
INIT_SCALE = 10.0
TAIL = 1e-9
MAX_HALF_WIDTH = 1024


class FactorizedPrior(nn.Module):
    """Density of ``channels`` independent real variables, evaluated on unit bins."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        scale = INIT_SCALE ** (1 / (len(WIDTHS) - 1))
        for k, (a, b) in enumerate(zip(WIDTHS[:-1], WIDTHS[1:])):
            init = math.log(math.expm1(1 / scale / b))
            self.register_parameter(f"matrix{k}", nn.Parameter(torch.full((channels, b, a), init)))
            self.register_parameter(f"bias{k}", nn.Parameter(torch.rand(channels, b, 1) - 0.5))
            if k < len(WIDTHS) - 2:
                self.register_parameter(f"gate{k}", nn.Parameter(torch.zeros(channels, b, 1)))

    def logits(self, v: Tensor) -> Tensor:
        """Logit of the cumulative at v (channels, 1, n) -> (channels, 1, n)."""
        for k in range(len(WIDTHS) - 1):
            dtype = v.dtype
            v = F.softplus(getattr(self, f"matrix{k}").to(dtype)) @ v + getattr(self, f"bias{k}").to(dtype)
            if k < len(WIDTHS) - 2:
                v = v + torch.tanh(getattr(self, f"gate{k}").to(dtype)) * torch.tanh(v)
        return v

    def likelihood(self, z: Tensor) -> Tensor:
        """Probability mass of the unit bin around z (B, C, H, W), same shape, at least 1e-9."""
        b, c, h, w = z.shape
        v = z.transpose(0, 1).reshape(c, 1, -1)
        lower, upper = self.logits(v - 0.5), self.logits(v + 0.5)
        sign = -torch.sign(lower + upper).detach()  # evaluate in the lower tail, where sigmoid keeps its precision
        mass = (torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs()
        return mass.clamp_min(1e-9).reshape(c, b, h, w).transpose(0, 1)

    @torch.no_grad()
    def tables(self) -> Tables:
        """Integer tables, row c for channel c, that cover all but 1e-9 of each tail. Called once, at freeze time."""
        v = torch.arange(-MAX_HALF_WIDTH, MAX_HALF_WIDTH + 2, dtype=torch.float64) - 0.5
        edges = v.expand(self.channels, 1, -1)
        cumulative = torch.sigmoid(self.logits(edges))[:, 0].cpu().numpy()
        pmfs, offsets = [], []
        for row in cumulative:
            first = max(int(np.searchsorted(row, TAIL)) - 1, 0)
            last = min(int(np.searchsorted(row, 1 - TAIL)) + 1, len(row) - 1)
            pmfs.append(np.diff(row[first : last + 1]))
            offsets.append(first - MAX_HALF_WIDTH)
        return pmf_to_tables(pmfs, offsets)
