"""Zero-mean densities on unit bins: 64 scale classes as integer tables, and the likelihood that training needs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .tables import Tables, pmf_to_tables

SCALE_MIN, SCALE_MAX, SCALE_CLASSES = 0.11, 256.0, 64
SCALE_STEP = math.log(SCALE_MAX / SCALE_MIN) / (SCALE_CLASSES - 1)
SCALES = tuple(SCALE_MIN * math.exp(SCALE_STEP * i) for i in range(SCALE_CLASSES))
GAUSSIAN_REACH = 5.5  # standard deviations that a table covers; beyond lie 4e-8, less than one width of 2**-24
LIKELIHOOD_MIN = 1e-9
# Real latents have heavier tails than the Gaussian they are trained with (kurtosis 4 to 5 within a class). Coding them with
# this Student density instead took 1.05 % off the bits of y, the same on training pictures (by which it was chosen from
# 20 pairs of freedom and width) and on Kodak. Reach and least half width: escapes fall to 5 in a million symbols.
STUDENT_FREEDOM, STUDENT_WIDTH, STUDENT_REACH, STUDENT_HALF_MIN = 12, 0.92, 6.0, 24


def _tables(upper_tail: Callable[[float], float], width: float, reach: float, half_min: int) -> Tables:
    """Row i: the density with P(v > x * width * SCALES[i]) = upper_tail(x), integrated over unit bins."""
    pmfs, offsets = [], []
    for sigma in SCALES:
        half = max(half_min, math.ceil(reach * sigma + 0.5))
        edges = [upper_tail((k - 0.5) / (sigma * width)) for k in range(half + 2)]  # P(v > k - 1/2)
        upper = [edges[k] - edges[k + 1] for k in range(half + 1)]
        pmfs.append(np.array(upper[:0:-1] + upper))
        offsets.append(-half)
    return pmf_to_tables(pmfs, offsets)


def gaussian_tables() -> Tables:
    """Row i: a normal of standard deviation SCALES[i] integrated over unit bins. Freeze time only."""
    return _tables(lambda x: math.erfc(x / math.sqrt(2)) / 2, 1.0, GAUSSIAN_REACH, 0)


def student_upper_tail(x: float, freedom: int) -> float:
    """P(t > x) of Student's t with an even number of degrees of freedom.

    The finite sum of Abramowitz and Stegun 26.7.4: only additions, products, quotients and a square root, so it is the same
    on every machine. Absolute error about 1e-16, which is far below the width 2**-24 of a table.
    """
    c2 = freedom / (freedom + x * x)
    term = total = 1.0
    for j in range(1, freedom // 2):
        term *= c2 * (2 * j - 1) / (2 * j)
        total += term
    return (1 - x / math.sqrt(freedom + x * x) * total) / 2


def student_tables() -> Tables:
    """Row i: for latents trained with a normal of standard deviation SCALES[i], what they look like. Freeze time only."""
    return _tables(
        lambda x: student_upper_tail(x, STUDENT_FREEDOM), STUDENT_WIDTH, STUDENT_REACH, STUDENT_HALF_MIN
    )


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
