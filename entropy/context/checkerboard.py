"""The two-pass checkerboard: anchors ((row + column) even) first, the other half second (He et al. 2021)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must also serve training
def anchor_mask(h: int, w: int, device: torch.device | str = "cpu") -> Tensor:
    """(1, 1, h, w) float32 mask, 1 at anchors."""
    rows, cols = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)[None]
    return ((rows + cols + 1) % 2).to(torch.float32)[None, None]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must also serve training
def positions(h: int, w: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Flat indexes (row-major) of the anchors and of the others, each increasing: the coding order of a pass."""
    # arithmetic, since a compiler cannot follow ``nonzero``
    at = 2 * torch.arange((h * w + 1) // 2, device=device)
    if w % 2:
        return at, at[: h * w // 2] + 1
    odd = at // max(w, 1) % 2
    return at + odd, at + 1 - odd
