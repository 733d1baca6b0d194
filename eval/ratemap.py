"""Where the bits of a picture go: what the tables charge for every symbol of its latent."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..container.errors import UsageError


class _Recorder:
    """Stands in for an entropy encoder and keeps the cost of every symbol, call after call."""

    def __init__(self) -> None:
        self.costs: list[np.ndarray] = []

    def put(self, values: np.ndarray, indexes: np.ndarray, tables: Any) -> None:
        self.costs.append(np.asarray(tables.bits(values, indexes), np.float64))

    def finish(self) -> bytes:
        return b""


def latent_bits(codec: Any, rgb: np.ndarray, level: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of each symbol of y (M, h, w) and of z (C, h/4, w/4) of a picture (H, W, 3) uint8, coded as a single tile.

    The picture is padded to the codec's multiple. UsageError for a codec whose entropy model is not the shared one.
    """
    import torch

    from ..entropy.context.checkerboard import positions

    if not hasattr(getattr(codec, "latent", None), "_encode"):
        raise UsageError(f"{codec.name} does not tell what its symbols cost")
    m, latent = codec.tile_multiple, codec.latent
    pixels = np.pad(rgb, ((0, -rgb.shape[0] % m), (0, -rgb.shape[1] % m), (0, 0)), "edge")
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    recorder = _Recorder()
    with torch.inference_mode():
        y = codec.analyse(x.contiguous(memory_format=torch.channels_last), level)
        z = latent.analyse_hyper(y, level)
        latent._encode(y, z, level, recorder)
    z_costs, *passes = recorder.costs
    channels, h, w = y.shape[1:]
    costs, first = np.zeros((channels, h * w)), 0
    for size in codec.config.latent.slices:  # the coding order: slice after slice, each in the passes of the checkerboard
        for where in positions(h, w, "cpu"):
            if len(where):
                costs[first : first + size, where.numpy()] = passes.pop(0).reshape(size, -1)
        first += size
    if passes:
        raise UsageError(f"{codec.name} codes its latent in an order that is not known here")
    return costs.reshape(channels, h, w), z_costs.reshape(z.shape[1:])


def bits_per_pixel(y_bits: np.ndarray, z_bits: np.ndarray, stride: int = 16) -> np.ndarray:
    """The map: bits per pixel of each cell (h, w), the hyper-latent's spread evenly over its 4x4 cells."""
    spread = np.kron(z_bits.sum(0), np.ones((4, 4))) / 16
    return (y_bits.sum(0) + spread[: y_bits.shape[1], : y_bits.shape[2]]) / stride**2
