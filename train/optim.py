"""Muon for convolution kernels: momentum, orthogonalised by a Newton-Schulz iteration.

Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; the scale that lets it share Adam's learning rate is
that of Liu et al. 2025 ("Muon is scalable for LLM training"). torch.optim.Muon takes matrices only; kernels
(out, in, k, k) are seen here as matrices (out, in*k*k).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of g (..., m, n), roughly: singular values end in about 0.7..1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; parameters of two or more dimensions only."""

    def __init__(self, params, lr: float, momentum: float = 0.95, rms: float = 0.2):
        super().__init__(params, {"lr": lr, "momentum": momentum, "rms": rms})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(buffer, alpha=group["momentum"]).flatten(1)
                scale = group["rms"] * max(update.shape) ** 0.5
                p.add_(orthogonalise(update).view_as(p), alpha=-group["lr"] * scale)


def optimisers(model: torch.nn.Module, kind: str, lr: float, muon_lr: float, latent: float = 1.0,
               factors: dict[str, float] | None = None) -> list[torch.optim.Optimizer]:  # fmt: skip
    """``adam`` for everything, or ``muon`` for kernels with at least 8 rows and columns and Adam for the rest.

    Rates of the entropy model, ``model.latent``, are ``latent`` times the others'. ``factors``: of the parameters whose names
    begin so, the longest beginning that fits, on top of that.
    """
    factors = {"": 1.0, **(factors or {})}
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, p in model.named_parameters():
        big = kind == "muon" and p.ndim == 4 and min(p.shape[0], p[0].numel()) >= 8
        factor = factors[max((start for start in factors if name.startswith(start)), key=len)]
        groups.setdefault((big, factor * (latent if name.startswith("latent.") else 1.0)), []).append(p)
    result: list[torch.optim.Optimizer] = []
    for big, rate in ((False, lr), (True, muon_lr)):
        parts = [{"params": params, "lr": rate * factor} for (kernels, factor), params in groups.items() if kernels == big]
        if parts:
            result.append(Muon(parts, lr=rate) if big else torch.optim.Adam(parts, lr=rate, betas=(0.9, 0.98), eps=1e-9))
    for optimiser in result:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return result
