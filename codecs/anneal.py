"""Annealing the latent of a picture while it is encoded: what the + of MLICv2+ stands for, for every LatentCodec.

The analysis transform guesses a latent in one pass; a search finds a better one for the picture at hand, and the decoder does
not notice. Stochastic Gumbel annealing (Yang, Bamler, Mandt 2020, "Improving inference for neural image compression"): y is a
free variable; every rounding becomes a draw between floor and ceiling, relaxed at a temperature that falls; gradients of
rate + lambda * distortion flow through synthesis and entropy model. The float nets are those that the integers of the
shipped weights stand for (``entropy.exact.thaw``). Iterates are judged by what counts: the bits that the exact coder charges,
and the error of the picture that the decoder will see. The start is one of them, so the result is never worse.

Other than in the paper, the hyper-latent stays as it is but for one last try, the variable is y in steps, so that one learning
rate fits all channels and qualities, and the rate is larger and falls, for a few dozen iterations in place of thousands.
And the paper's one temperature is two numbers here: how likely the farther integer is, and how much a draw is relaxed. Draws
that are sharp but well relaxed have less noise in their gradients; 40 iterations then do what took more than 80.

The synthesis is most of the work, and close to a linear, orthogonal transform. Its error is therefore taken anew in one of
``REFRESH`` iterations only; for those between, a parabola stands in: the gradient at the latest draw, and a curvature per
channel that two runs of the synthesis tell at the start (Hutchinson's estimate with random signs). The parabola knows nothing
of what draws of neighbours do together, which is noise to the gradient of a cell. In the time of 40 iterations with an error
each, 80 such ones gain an eighth more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..container.errors import UsageError
from ..entropy.exact import ACT_FRAC, thaw
from ..entropy.gaussian import SCALE_STEP
from ..entropy.hyperprior import ContextHyperprior
from ..entropy.levels import interpolate
from .base import ImageCodec, LatentCodec

RATE = 0.02  # Adam's, in quantisation steps
CHANCE = 0.35  # the temperature of the choice between floor and ceiling, until HOT of the iterations are done
RELAXED = 0.7  # that of its relaxation, in a run of 80 iterations; as 1 / sqrt(iterations) in others, up to RELAXED_MAX
RELAXED_MAX = 1.1
COOLING = 2.5  # the first falls by exp(-COOLING) to the end, the second by the fourth root of that
HOT = 0.35
REFRESH = 4  # iterations from one run of the synthesis to the next
CURVATURE = 0.8  # of what is measured, in the steps between
JUDGED_FROM, JUDGED_EVERY = 0.5, 0.125  # fractions of the run at which iterates are coded in earnest
REVISION = 3  # of the search, for whoever keeps what it made


def temperatures(done: int, iterations: int) -> tuple[float, float]:
    """(of the choice, of its relaxation) when so many of the iterations are done."""
    cooled = COOLING * max(0.0, done / iterations - HOT) / (1 - HOT)
    return CHANCE * math.exp(-cooled), min(RELAXED * math.sqrt(80 / iterations), RELAXED_MAX) * math.exp(-cooled / 4)


def gumbel_round(v: Tensor, chance: float, relaxed: float, generator: torch.Generator | None = None) -> Tensor:
    """A relaxed draw between floor and ceiling of v: the nearer the likelier, and the lower the temperature ``chance`` the more
    so; the lower ``relaxed``, the nearer to an integer."""
    low = torch.floor(v.detach())
    above = (v - low).clamp(1e-5, 1 - 1e-5)
    lean = (torch.atanh(above) - torch.atanh(1 - above)) / chance  # logit of the ceiling
    u = torch.rand(v.shape, generator=generator, device=v.device).clamp_(1e-6, 1 - 1e-6)
    return low + torch.sigmoid((lean + torch.logit(u)) / relaxed)


def short_floats(device: torch.device) -> bool:
    """Whether the synthesis that gradients flow through may run in bfloat16: half the time, 0.4 % of error in the gradient."""
    return device.type == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def thawed(latent: ContextHyperprior) -> ContextHyperprior:
    """A float copy of a frozen entropy model, whose rates are those of the symbols that ``rounding`` gives."""
    soft = thaw(deepcopy(latent)).requires_grad_(False)
    soft.rounded_rate = True
    return soft


@dataclass
class Annealer:
    """A tile encoder for ``codecs.image.encode_picture``. ``progress`` is told (iterations done, all) tile by tile."""

    iterations: int
    rate: float = RATE
    seed: int = 0
    progress: Callable[[int, int], None] | None = None

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self, codec: ImageCodec, x: Tensor, y: Tensor, part: tuple[slice, slice], size: tuple[int, int],
                 level: int) -> tuple[bytes, Tensor]:  # fmt: skip
        """Payload and y^ of the cells ``part`` of y (1, M, h, w), whose first ``size`` (rows, columns) pixels count.

        x (1, 3, 16h, 16w): the pixels that y was made of, a margin around the tile included.
        """
        if not isinstance(codec, LatentCodec) or not isinstance(codec.latent, ContextHyperprior):
            raise UsageError(f"{codec.name}: this codec cannot be annealed; use a lower effort")
        x, y = x.clone(), y.clone()  # tensors that autograd may keep
        latent, soft = codec.latent, thawed(codec.latent)
        at = torch.tensor([float(level)], device=y.device)
        weight = codec.lambda_of(level) * 255**2
        s, m = codec.stride, codec.synthesis_margin
        rows, cols = part
        # the cells that the tile's pixels depend on; around the tile they are those of the analysis
        r0, c0 = max(rows.start - m, 0), max(cols.start - m, 0)
        around = y[:, :, r0 : rows.stop + m, c0 : cols.stop + m]
        inner = slice(rows.start - r0, rows.stop - r0), slice(cols.start - c0, cols.stop - c0)
        target = x[:, :, s * rows.start :, s * cols.start :][:, :, : size[0], : size[1]]

        def error(y_hat: Tensor, clamped: bool = False) -> Tensor:
            """Squared error per colour, summed over the pixels that count."""
            cells = around.clone()
            cells[:, :, inner[0], inner[1]] = y_hat
            x_hat = codec.g_s(cells.contiguous(memory_format=torch.channels_last), at)
            x_hat = x_hat.float()[:, :, s * inner[0].start :, s * inner[1].start :][:, :, : size[0], : size[1]]
            x_hat = x_hat.clamp(0, 1) if clamped else x_hat
            return (x_hat - target).square().sum() / x.shape[1]

        @torch.no_grad()
        def judge(y: Tensor, z: Tensor) -> tuple[float, tuple[bytes, Tensor]]:
            payload, y_hat = latent.compress(y, z, level)
            return 8 * len(payload) + weight * float(error(y_hat, clamped=True)), (payload, y_hat)

        start = y[:, :, rows, cols].contiguous()
        z = latent.analyse_hyper(start, level)
        best, result = judge(start, z)
        offset = interpolate(latent.offset_q, level, latent.cfg.levels).to(y)
        step = torch.exp(-offset * (SCALE_STEP * 2.0**-ACT_FRAC))[None, :, None, None]
        steps = torch.nn.Parameter((start / step).nan_to_num(0))
        optimiser = torch.optim.Adam([steps], lr=self.rate)
        with torch.no_grad():
            features = type(soft).hyper_synthesis(soft, z, at)
            soft.hyper_synthesis = lambda z_hat, level: features  # they do not change
            soft.rounding = torch.round
            rounded = soft(start, at, z)[0]

        def slope(y_hat: Tensor) -> Tensor:
            """Gradient of the weighted error."""
            y_hat = y_hat.detach().requires_grad_()
            with torch.autocast(y.device.type, torch.bfloat16, enabled=short_floats(y.device)):
                distortion = weight * error(y_hat)
            return torch.autograd.grad(distortion, y_hat)[0]

        generator = torch.Generator(y.device).manual_seed(self.seed)
        signs = 1 - 2 * torch.randint(2, rounded.shape, generator=generator, device=y.device)
        probe = 0.5 * step * signs
        curvature = ((slope(rounded + probe) - slope(rounded - probe)) / (2 * probe)).mean((2, 3), keepdim=True)
        curvature = CURVATURE * curvature.nan_to_num(0).clamp_min(0)
        judged = {round(self.iterations * min(1.0, JUDGED_FROM + JUDGED_EVERY * k)) for k in range(9)}
        for done in range(1, self.iterations + 1):
            heat = temperatures(done, self.iterations)
            optimiser.param_groups[0]["lr"] = self.rate * (1.05 - done / self.iterations)
            soft.rounding = lambda v, heat=heat: gumbel_round(v, *heat, generator)
            y_hat, bits, _ = soft(steps * step, at, z)
            if (done - 1) % REFRESH == 0:
                seen, gradient = y_hat.detach(), slope(y_hat)
            moved = y_hat - seen
            loss = bits.sum() + (gradient * moved + 0.5 * curvature * moved.square()).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if done in judged:
                now = (steps * step).detach()
                tries = [z, latent.analyse_hyper(now, level)] if done == self.iterations else [z]
                for candidate in tries:
                    cost, coded = judge(now, candidate)
                    if cost < best:
                        best, result = cost, coded
            if self.progress:
                self.progress(done, self.iterations)
        return result
