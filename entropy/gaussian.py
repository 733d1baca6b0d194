"""Zero-mean Gaussian on unit bins: 64 scale classes as integer tables, and the likelihood that training needs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .tables import Tables, pmf_to_tables

SCALE_MIN, SCALE_MAX, SCALE_CLASSES = 0.11, 256.0, 64
SCALE_STEP = math.log(SCALE_MAX / SCALE_MIN) / (SCALE_CLASSES - 1)
SCALES = tuple(SCALE_MIN * math.exp(SCALE_STEP * i) for i in range(SCALE_CLASSES))
REACH = 5.5  # standard deviations that a table covers; beyond lie 4e-8, less than one width of 2**-24
LIKELIHOOD_MIN = 1e-9


def gaussian_tables() -> Tables:
    """Row i: a normal of standard deviation SCALES[i] integrated over unit bins. Freeze time only."""
    pmfs, offsets = [], []
    for sigma in SCALES:
        half = math.ceil(REACH * sigma + 0.5)
        edges = [math.erfc((k - 0.5) / sigma / math.sqrt(2)) / 2 for k in range(half + 2)]  # P(v > k - 1/2)
        upper = [edges[k] - edges[k + 1] for k in range(half + 1)]
        pmfs.append(np.array(upper[:0:-1] + upper))
        offsets.append(-half)
    return pmf_to_tables(pmfs, offsets)


class LowerBound(torch.autograd.Function):
    """max(x, bound); the gradient is stopped only where it would push x further below the bound."""

    @staticmethod
    def forward(ctx, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.bound) | (grad < 0), grad, torch.zeros_like(grad)), None


def gaussian_likelihood(v: Tensor, log_scale: Tensor) -> Tensor:
    """Mass of the unit bin around v under a zero-mean normal of log standard deviation ``log_scale``; same shape, >= 1e-9."""
    log_scale = LowerBound.apply(log_scale.float(), math.log(SCALE_MIN)).clamp_max(math.log(SCALE_MAX))
    inverse = torch.exp(-log_scale) * math.sqrt(0.5)
    a = v.float().abs()  # the tail on the left of -|v| keeps its precision
    mass = 0.5 * (torch.erfc((a - 0.5) * inverse) - torch.erfc((a + 0.5) * inverse))
    return LowerBound.apply(mass, LIKELIHOOD_MIN)
