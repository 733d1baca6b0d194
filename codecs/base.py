"""The contract that every codec keeps (DESIGN section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..entropy.tables import Tables

LEVELS = 1000
"""Quality 0..100 is coded as an integer level 0..1000."""


ADDED = {"added": True}
"""Metadata of a config's field that came later: at its default it does not count in the model id, which stays as it was."""


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

    def arrays(self) -> dict[str, np.ndarray]:
        """Other integer arrays of a weights file, by name; none for most codecs."""
        return {}

    def set_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Take those of a weights file. KeyError or ValueError when they do not fit."""
        if arrays:
            raise ValueError("arrays that this codec does not have")

    @classmethod
    def from_preset(cls, preset: str) -> Codec:
        """A fresh, untrained codec. KeyError for an unknown preset."""
        return cls(cls.presets[preset], preset)


class WithLatent(Codec):
    """A codec whose ``latent`` is a ContextHyperprior: what a weights file holds for that, its context mixing included."""

    latent: Any

    def tables(self) -> dict[str, Tables]:
        return {"z": self.latent.z_tables, "y": self.latent.y_tables}

    def set_tables(self, tables: dict[str, Tables]) -> None:
        self.latent.set_tables(tables["z"], tables["y"])

    def arrays(self) -> dict[str, np.ndarray]:
        parts = {"mixing": self.latent.mixing, "hyper_mixing": self.latent.hyper_mixing}
        return {f"{part}.{name}": array for part, start in parts.items() if start for name, array in start.to_arrays().items()}

    def set_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        latent = self.latent
        latent.mixing = latent.hyper_mixing = None
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key, array in arrays.items():
            part, name = key.split(".")
            parts.setdefault(part, {})[name] = array
        if parts:
            from ..entropy.latent_mixing import HyperStart, Start  # brings a compiler

            latent.mixing = Start.from_arrays(parts.pop("mixing"))
            if len(latent.mixing.taps) != latent.cfg.channels:
                raise ValueError("mixing: made for another number of channels")
            if "hyper_mixing" in parts:
                latent.hyper_mixing = HyperStart.from_arrays(parts.pop("hyper_mixing"))
                if len(latent.hyper_mixing.start.taps) != latent.cfg.hyper:
                    raise ValueError("mixing of z: made for another number of channels")
            if parts:
                raise ValueError("arrays that this codec does not have")


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
    whole_tiles: bool = False
    """Whether the synthesis sees more than its margin (windows, scans): then a region is cut out of whole tiles."""

    def forward(self, x: Tensor, level: Tensor) -> Outputs:
        """Training: x (B, 3, h, w) in [0, 1], level (B,) real in 0..1000."""
        raise NotImplementedError

    def auxiliary_loss(self) -> Any:
        """What else the last forward wants to be minimised, of parts that rate and distortion do not teach."""
        return 0.0

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

    def estimate_bits(self, y: Tensor, level: int) -> float:
        """Bits that the integer tables charge for y, to be held against the bytes of ``encode_latent``.

        For codecs whose ``latent`` has the shared entropy model's methods; others override it.
        """
        latent: Any = self.latent
        return latent.ideal_bits(y, latent.analyse_hyper(y, level), level)

    def decode_latent(self, payload: bytes, hl: int, wl: int, level: int) -> Tensor:
        """payload -> y^ (1, M, hl, wl), bit for bit the encoder's. CorruptStream on damage."""
        raise NotImplementedError

    def synthesise(self, y_hat: Tensor, level: int) -> Tensor:
        """y^ -> picture (1, 3, stride*hl, stride*wl), not clamped."""
        raise NotImplementedError


class LatentCodec(WithLatent, ImageCodec):
    """An image codec of three parts: ``g_a(x, level)``, ``g_s(y^, level)``, and ``latent``, a ContextHyperprior.

    Subclasses make these in ``__init__`` and set the margins.
    """

    g_a: nn.Module
    g_s: nn.Module

    def forward(self, x: Tensor, level: Tensor) -> Outputs:
        y = self.g_a(x, level)
        with torch.autocast(y.device.type, enabled=False):  # bfloat16 is too coarse for scales and their likelihoods
            y_hat, y_bits, z_bits = self.latent(y.float(), level)
        return Outputs(self.g_s(y_hat, level), {"y": y_bits, "z": z_bits})

    def analyse(self, x: Tensor, level: int) -> Tensor:
        return self.g_a(x, torch.tensor([float(level)], device=x.device))

    def synthesise(self, y_hat: Tensor, level: int) -> Tensor:
        return self.g_s(y_hat, torch.tensor([float(level)], device=y_hat.device))

    def encode_latent(self, y: Tensor, level: int) -> tuple[bytes, Tensor]:
        return self.latent.compress(y, self.latent.analyse_hyper(y, level), level)

    def decode_latent(self, payload: bytes, hl: int, wl: int, level: int) -> Tensor:
        return self.latent.decompress(payload, hl, wl, level)

    def kmac_per_pixel(self) -> dict[str, float]:
        side, level = 256, torch.tensor([500.0])
        y = torch.zeros(1, self.config.latent.channels, side // self.stride, side // self.stride)
        counts = {
            "g_a": macs(self.g_a, torch.zeros(1, 3, side, side), level),
            "entropy": macs(self.latent, y, level),
            "g_s": macs(self.g_s, y, level),
        }
        return {part: round(count / side**2 / 1000, 2) for part, count in counts.items()}


def count_parameters(module: nn.Module) -> int:
    """Number of trained scalars."""
    return sum(p.numel() for p in module.parameters())


def macs(module: nn.Module, *args: Any) -> int:
    """Multiply-adds of the convolutions and matrix products (attention included) in one call of ``module(*args)``.

    Elementwise work, a selective scan for example, is not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*args)
    return counter.get_total_flops() // 2
