"""Block DCT and the adaptive frequency modulation of HCFSSNet (arXiv 2511.20151; widths and placement are ours)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 8  # of a block


def dct_matrix(n: int = SIDE) -> Tensor:
    """Orthonormal DCT-II (n, n), float64: row m holds the m-th cosine."""
    m, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    rows = math.sqrt(2 / n) * torch.cos(math.pi * (2 * j + 1) * m / (2 * n))
    rows[0] /= math.sqrt(2)
    return rows


def to_blocks(x: Tensor, n: int = SIDE) -> Tensor:
    """(B, C, h, w) -> (B, rows, columns, n*n, C): blocks of n x n; the last row and column pad at the right and the bottom."""
    h, w = x.shape[2:]
    if h % n or w % n:
        x = F.pad(x, (0, -w % n, 0, -h % n), mode="replicate")
    b, c, h, w = x.shape
    return x.movedim(1, -1).reshape(b, h // n, n, w // n, n, c).transpose(2, 3).reshape(b, h // n, w // n, n * n, c)


def from_blocks(blocks: Tensor, h: int, w: int, n: int = SIDE) -> Tensor:
    """Inverse of ``to_blocks`` for a map of h x w."""
    b, rows, columns, _, c = blocks.shape
    x = blocks.reshape(b, rows, columns, n, n, c).transpose(2, 3).reshape(b, rows * n, columns * n, c)
    return x.movedim(-1, 1)[:, :, :h, :w]


class FrequencyGate(nn.Module):
    """Content-adaptive weights of the 8x8 DCT coefficients of every channel; the identity at the start.

    w = 2 sigmoid(base + net(log(floor + mean of |Y| over the blocks))),  out = IDCT(w * Y);  base (C, 8, 8) is learned, the
    net is pointwise over frequencies (1x1 C -> C/8 -> C). Shape (B, C, h, w) is kept.
    """

    floor = 1e-4

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 8, 4)
        self.base = nn.Parameter(torch.zeros(channels, SIDE, SIDE))
        self.squeeze, self.excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)
        dct = dct_matrix()
        self.register_buffer("basis", torch.kron(dct, dct).float(), persistent=False)  # (64 frequencies, 64 samples)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        y = self.basis @ to_blocks(x)  # (B, rows, columns, 64, C)
        strength = y.abs().mean((1, 2)).unflatten(1, (SIDE, SIDE)).movedim(-1, 1)
        gate = self.excite(F.gelu(self.squeeze(torch.log(self.floor + strength))))
        gate = 2 * torch.sigmoid(self.base + gate)
        return from_blocks(self.basis.T @ (y * gate.flatten(2).transpose(1, 2)[:, None, None]), h, w)


class AFMM(nn.Module):
    """Adaptive frequency modulation: a ``FrequencyGate``, then a channel MLP with a depth-wise 3x3 in the middle."""

    def __init__(self, channels: int, ratio: int = 2):
        super().__init__()
        self.gate = FrequencyGate(channels)
        self.up = nn.Conv2d(channels, ratio * channels, 1)
        self.mix = nn.Conv2d(ratio * channels, ratio * channels, 3, padding=1, groups=ratio * channels)
        self.down = nn.Conv2d(ratio * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.mix(self.up(self.gate(x)))))
