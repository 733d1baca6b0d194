"""Window attention for entropy models, with tensors in training and exact grids in coding.

Maps (B, C, h, w) of any size are cut into n x n windows, padded at the right and the bottom; shifted windows wrap around the
map (Swin, Liu et al. 2021). A token attends to the tokens of its window that really lie beside it: neither to the padding
nor to what the shift brought over from the other side. All pointwise layers are 1x1 convolutions on maps.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from ...nn.windows import cut_windows, merge_windows, relative_index, window_mask
from ..exact import ACT_FRAC, ExactConv2d, Freezable, Grid, bounded, matmul, quantise
from ..exact_tables import ExactGELU, ExactLayerNorm, ExactSoftmax

Map = Tensor | Grid


def windows(x: Map, n: int, shift: int = 0) -> Map:
    """(B, C, h, w) -> tokens of n x n windows (B, windows, C, n*n)."""
    return x.move(lambda q: cut_windows(q, n, shift)) if isinstance(x, Grid) else cut_windows(x, n, shift)


def merge(tokens: Map, h: int, w: int, n: int, shift: int = 0) -> Map:
    """Inverse of ``windows`` for a map of h x w; the padding is dropped."""
    if isinstance(tokens, Grid):
        return tokens.move(lambda q: merge_windows(q, h, w, n, shift))
    return merge_windows(tokens, h, w, n, shift)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must also serve training
def _exact_mask(h: int, w: int, n: int, shift: int, device: torch.device | str = "cpu") -> Grid | None:
    """``window_mask`` as a grid."""
    mask = window_mask(h, w, n, shift, device)
    return None if mask is None else quantise(mask)


class LearnedTable(Freezable):
    """A learned table of numbers, of any shape, that starts at zero."""

    _frozen_names = ("table_q",)

    def __init__(self, *shape: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(shape))

    def _float_names(self) -> tuple[str, ...]:
        return ("table",)

    def _freeze(self) -> dict[str, Tensor]:
        return {"table_q": quantise(self.table).q.to(torch.int32)}

    def _thaw(self) -> dict[str, Tensor]:
        return {"table": self.table_q * 2.0**-ACT_FRAC}

    def forward(self, exact: bool) -> Map:
        """The table, as a grid or as a tensor."""
        return Grid(self.table_q.double()) if exact else self.table


class RelativeBias(LearnedTable):
    """A learned bias per head and offset inside a window, for the scores."""

    def __init__(self, heads: int, n: int):
        super().__init__(heads, (2 * n - 1) ** 2)
        self.n = n

    def forward(self, exact: bool) -> Map:
        """(heads, n*n, n*n)."""
        table = super().forward(exact)
        device = table.q.device if isinstance(table, Grid) else table.device
        return table[:, relative_index(self.n, device)]


class WindowAttention(nn.Module):
    """Multi-head attention inside n x n windows, (B, C, h, w) -> the same shape; neither norm nor residual."""

    def __init__(self, channels: int, heads: int, n: int = 8, shift: int = 0):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared by {heads} heads")
        self.heads, self.n, self.shift, self.scale = heads, n, shift, (channels // heads) ** -0.5
        self.qkv = ExactConv2d(channels, 3 * channels, 1)
        self.bias = RelativeBias(heads, n)
        self.softmax = ExactSoftmax(-1)
        self.project = ExactConv2d(channels, channels, 1)

    def forward(self, x: Map) -> Map:
        (b, c, h, w), n, shift = x.shape, self.n, self.shift
        tokens = windows(self.qkv(x), n, shift).reshape(b, -1, 3 * self.heads, c // self.heads, n * n)
        q, k, v = tokens.chunk(3, 2)  # (B, windows, heads, C/heads, n*n) each
        scores = matmul((q * self.scale).transpose(-1, -2), k) + self.bias(isinstance(x, Grid))
        if isinstance(scores, Grid):
            mask = _exact_mask(h, w, n, shift, scores.q.device)
        else:
            mask = window_mask(h, w, n, shift, scores.device)
        scores = scores if mask is None else scores + mask
        seen = matmul(self.softmax(scores), v.transpose(-1, -2))  # (B, windows, heads, n*n, C/heads)
        return self.project(merge(seen.transpose(-1, -2).reshape(b, -1, c, n * n), h, w, n, shift))


class WindowBlock(nn.Module):
    """x + attention(norm(x)), then + MLP(norm(x)): a Swin block on maps; near the identity at the start."""

    def __init__(self, channels: int, heads: int, n: int = 8, shift: int = 0, ratio: int = 2):
        super().__init__()
        self.norm1, self.norm2 = ExactLayerNorm(channels, 1), ExactLayerNorm(channels, 1)
        self.attention = WindowAttention(channels, heads, n, shift)
        self.up, self.down = ExactConv2d(channels, ratio * channels, 1), ExactConv2d(ratio * channels, channels, 1)
        self.gelu = ExactGELU()
        with torch.no_grad():
            self.attention.project.weight.mul_(0.1)
            self.down.weight.mul_(0.1)

    def forward(self, x: Map) -> Map:
        x = bounded(x + self.attention(self.norm1(x)))
        return bounded(x + self.down(self.gelu(self.up(self.norm2(x)))))
