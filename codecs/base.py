"""The contract that every codec keeps (DESIGN section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..entropy.tables import Tables

LEVELS = 1000
"""Quality 0..100 is coded as an integer level 0..1000."""


def level_of(quality: float) -> int:
    """Integer level of a quality 0..100. ValueError outside of it."""
    if not 0 <= quality <= 100:
        raise ValueError(f"quality {quality} is outside of 0..100")
    return round(quality * LEVELS / 100)


@dataclass
class Outputs:
    """What a training forward gives: reconstruction in the input's shape, and bits (B,) of each part of the stream."""

    x_hat: Tensor
    bits: dict[str, Tensor]


class Codec(nn.Module):
    """A codec of one kind of data. ``name`` is stable for ever: it stands in every file."""

    name: ClassVar[str]
    kind: ClassVar[str]
    presets: ClassVar[dict[str, Any]]

    def __init__(self, config: Any, preset: str = "custom"):
        super().__init__()
        self.config = config
        self.preset = preset
        self.model_id = b""  # first 8 bytes of the digest, set when frozen weights are loaded

    def tables(self) -> dict[str, Tables]:
        """Integer tables by name, once frozen."""
        raise NotImplementedError

    def set_tables(self, tables: dict[str, Tables]) -> None:
        """Take the tables of a weights file. KeyError or ValueError when they do not fit."""
        raise NotImplementedError

    @classmethod
    def from_preset(cls, preset: str) -> "Codec":
        """A fresh, untrained codec. KeyError for an unknown preset."""
        return cls(cls.presets[preset], preset)


class ImageCodec(Codec):
    """A codec of RGB pictures (1, 3, h, w) in [0, 1] through a latent y (1, M, h/stride, w/stride).

    ``analyse`` and ``synthesise`` are float and may differ by rounding between machines; ``encode_latent`` and
    ``decode_latent`` are exact: the same payload gives the same y^ everywhere.
    """

    kind = "image"
    stride: int = 16
    tile_multiple: int = 64
    analysis_margin: int = 64
    synthesis_margin: int = 4

    def forward(self, x: Tensor, level: Tensor) -> Outputs:
        """Training: x (B, 3, h, w) in [0, 1], level (B,) real in 0..1000."""
        raise NotImplementedError

    def kmac_per_pixel(self) -> dict[str, float]:
        """Thousand multiply-adds per pixel of each part, on a 256x256 picture."""
        raise NotImplementedError

    def lambda_of(self, level: Tensor | float) -> Any:
        """Weight of 255^2 * MSE against bits per pixel at a level (log-linear between the ends of the config)."""
        low, high = math.log(self.config.latent.lambda_low), math.log(self.config.latent.lambda_high)
        exponent = low + (high - low) * level / LEVELS
        return exponent.exp() if isinstance(exponent, Tensor) else math.exp(exponent)

    def analyse(self, x: Tensor, level: int) -> Tensor:
        """x (1, 3, h, w), sides multiples of ``tile_multiple`` -> y (1, M, h/stride, w/stride)."""
        raise NotImplementedError

    def encode_latent(self, y: Tensor, level: int) -> tuple[bytes, Tensor]:
        """y -> (payload, y^), exactly."""
        raise NotImplementedError

    def decode_latent(self, payload: bytes, hl: int, wl: int, level: int) -> Tensor:
        """payload -> y^ (1, M, hl, wl), bit for bit the encoder's. CorruptStream on damage."""
        raise NotImplementedError

    def synthesise(self, y_hat: Tensor, level: int) -> Tensor:
        """y^ -> picture (1, 3, stride*hl, stride*wl), not clamped."""
        raise NotImplementedError


def count_parameters(module: nn.Module) -> int:
    """Number of trained scalars."""
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, *args: Any) -> int:
    """Multiply-adds of the convolutions and linear layers in one call of ``module(*args)``."""
    total = 0

    def hook(layer: nn.Module, _: Any, out: Any) -> None:
        nonlocal total
        total += out.numel() * layer.weight[0].numel()

    layers = (nn.Conv2d, nn.Linear)
    handles = [m.register_forward_hook(hook) for m in module.modules() if isinstance(m, layers)]
    try:
        with torch.no_grad():
            module(*args)
    finally:
        for handle in handles:
            handle.remove()
    return total
