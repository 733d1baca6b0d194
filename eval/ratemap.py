"""Where the bits of a picture go: what the tables charge for every symbol of its latent.

Context mixing, where a codec has it, makes them a little cheaper, and is not seen here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..container.errors import UsageError


def latent_bits(codec: Any, rgb: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of each symbol of y (M, h, w) and of z (C, h/4, w/4) of a picture (H, W, 3) uint8, coded as a single tile.

    The picture is padded to the codec's multiple. UsageError for a codec whose entropy model is not the shared one.
    """
    import torch

    if not hasattr(getattr(codec, "latent", None), "passes"):
        raise UsageError(f"{codec.name} does not tell what its symbols cost")
    m, latent = codec.tile_multiple, codec.latent
    pixels = np.pad(rgb, ((0, -rgb.shape[0] % m), (0, -rgb.shape[1] % m), (0, 0)), "edge")
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        y = codec.analyse(x.contiguous(memory_format=torch.channels_last), level)
        z = latent.analyse_hyper(y, level)
        costs = np.zeros((y.shape[1], y.shape[2] * y.shape[3]))

        def put(mine: slice, where: torch.Tensor, q: torch.Tensor, index: torch.Tensor, coded: torch.Tensor | None) -> None:
            q, rows = q[0].numpy().astype(np.int64), index[0].numpy().astype(np.int64)
            bits = latent.y_tables.bits(q.ravel(), rows.ravel()).reshape(q.shape)
            costs[mine, where.numpy()] = bits if coded is None else bits * coded[0].numpy()

        latent.passes(y, z, level, put)
        channels = np.arange(z.shape[1]).repeat(z.shape[2] * z.shape[3])
        z_costs = latent.z_tables.bits(z.numpy().astype(np.int64).ravel(), channels)
    return costs.reshape(y.shape[1:]), z_costs.reshape(z.shape[1:])


def bits_per_pixel(y_bits: np.ndarray, z_bits: np.ndarray, stride: int = 16) -> np.ndarray:
    """The map: bits per pixel of each cell (h, w), the hyper-latent's spread evenly over its 4x4 cells."""
    spread = np.kron(z_bits.sum(0), np.ones((4, 4))) / 16
    return (y_bits.sum(0) + spread[: y_bits.shape[1], : y_bits.shape[2]]) / stride**2
