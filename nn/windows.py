"""Maps cut into windows, and which tokens of a window see each other (Swin, Liu et al. 2021).

Maps (B, C, h, w) of any size are padded at the right and the bottom; shifted windows wrap around the map. A token attends to
the tokens of its window that really lie beside it: neither to the padding nor to what the shift brought over.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -100.0  # added to a score, it leaves nothing of a probability that counts


def cut_windows(x: Tensor, n: int, shift: int = 0) -> Tensor:
    """(B, C, h, w) -> tokens of n x n windows (B, windows, C, n*n), row by row; zeros pad at the right and the bottom."""
    b, c, h, w = x.shape
    x = F.pad(x, (0, -w % n, 0, -h % n)) if h % n or w % n else x
    x = x.roll((-shift, -shift), (2, 3)) if shift else x
    rows, columns = x.shape[2] // n, x.shape[3] // n
    return x.reshape(b, c, rows, n, columns, n).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c, n * n)


def merge_windows(tokens: Tensor, h: int, w: int, n: int, shift: int = 0) -> Tensor:
    """Inverse of ``cut_windows`` for a map of h x w; the padding is dropped."""
    b, c, rows, columns = tokens.shape[0], tokens.shape[2], -(-h // n), -(-w // n)
    x = tokens.reshape(b, rows, columns, c, n, n).permute(0, 3, 1, 4, 2, 5).reshape(b, c, rows * n, columns * n)
    x = x.roll((shift, shift), (2, 3)) if shift else x
    return x[:, :, :h, :w]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must also serve training
def window_mask(h: int, w: int, n: int, shift: int, device: torch.device | str = "cpu") -> Tensor | None:
    """(windows, 1, n*n, n*n) float32, query x key: 0 where the key lies in the map, as far from the query as it stands in
    the window; MASKED elsewhere. None where it would be 0 everywhere."""
    if not (shift or h % n or w % n):
        return None
    high, wide = -(-h // n) * n, -(-w // n) * n
    row, column = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    place = cut_windows(torch.stack([row, column])[None].float(), n, shift)[0]  # (windows, 2, n*n): where the tokens come from
    slot = cut_windows(torch.stack([row, column])[None].float(), n)[0]
    beside = ((place[:, :, :, None] - place[:, :, None]) == (slot[:, :, :, None] - slot[:, :, None])).all(1)
    inside = (place[:, 0] < h) & (place[:, 1] < w)
    allowed = beside & inside[:, None]
    return torch.where(allowed, 0.0, MASKED)[:, None].to(device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def relative_index(n: int, device: torch.device | str = "cpu") -> Tensor:
    """(n*n, n*n): row of a table of (2n-1)**2 offsets for each pair of tokens of a window."""
    row, column = (t.reshape(-1) for t in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    dr, dc = row[:, None] - row + n - 1, column[:, None] - column + n - 1
    return (dr * (2 * n - 1) + dc).to(device)
