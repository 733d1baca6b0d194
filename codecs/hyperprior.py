"""The control codec: a plain residual convolutional transform and the shared context hyperprior.

    x --g_a--> y --ContextHyperprior--> y^ --g_s--> x^

The transform works at H/4 to H/16 only, where dense 3x3 convolutions run at full speed on a CPU, and its main path is
linear (see ``nn.blocks``). It is the fast default and the yardstick for every later codec.
Sources: mean-scale hyperprior, Minnen et al. 2018; two-pass checkerboard, He et al. 2021; gains, Cui et al. 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..entropy.hyperprior import ContextHyperprior, LatentConfig
from ..entropy.tables import Tables
from ..nn.blocks import LevelAffine, ResidualBlock, Upsample
from .base import ImageCodec, Outputs, macs


@dataclass(frozen=True)
class Config:
    """Widths at H/4 and H/8, residual blocks at H/4, H/8, H/16 of either side, and the entropy model."""

    widths: tuple[int, int]
    encoder_blocks: tuple[int, int, int]
    decoder_blocks: tuple[int, int, int]
    latent: LatentConfig


class Analysis(nn.Module):
    """x (B, 3, H, W) -> y (B, M, H/16, W/16)."""

    def __init__(self, cfg: Config):
        super().__init__()
        (a, b), m, latent = cfg.widths, cfg.latent.channels, cfg.latent
        n4, n8, n16 = cfg.encoder_blocks
        self.patch = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, a, 3, padding=1))
        self.at4 = nn.Sequential(*(ResidualBlock(a) for _ in range(n4)), nn.Conv2d(a, b, 3, stride=2, padding=1))
        self.level = LevelAffine(b, latent.knots, latent.levels)
        self.at8 = nn.Sequential(*(ResidualBlock(b) for _ in range(n8)), nn.Conv2d(b, m, 2, stride=2))
        self.at16 = nn.Sequential(*(ResidualBlock(m) for _ in range(n16)))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.at16(self.at8(self.level(self.at4(self.patch(x - 0.5)), level)))


class Synthesis(nn.Module):
    """y^ (B, M, H/16, W/16) -> x^ (B, 3, H, W)."""

    def __init__(self, cfg: Config):
        super().__init__()
        (a, b), m, latent = cfg.widths, cfg.latent.channels, cfg.latent
        n4, n8, n16 = cfg.decoder_blocks
        self.at16 = nn.Sequential(*(ResidualBlock(m) for _ in range(n16)), Upsample(m, b))
        self.level = LevelAffine(b, latent.knots, latent.levels)
        self.at8 = nn.Sequential(*(ResidualBlock(b) for _ in range(n8)), Upsample(b, a))
        self.at4 = nn.Sequential(*(ResidualBlock(a) for _ in range(n4)), Upsample(a, 3, 4, kernel=3))

    def forward(self, y_hat: Tensor, level: Tensor) -> Tensor:
        return self.at4(self.at8(self.level(self.at16(y_hat), level))) + 0.5


class Hyperprior(ImageCodec):
    name = "hyperprior"
    presets = {
        "test": Config((16, 16), (1, 1, 0), (1, 1, 0),
                       LatentConfig((8, 24), hyper=8, width=16, features=16, context=16, trunk=16, squeeze=16,
                                    residual=16)),
        "light": Config((64, 96), (2, 1, 0), (2, 2, 0),
                        LatentConfig((32, 48, 80, 128), hyper=32, width=56, features=56, context=56, trunk=72,
                                     squeeze=40, residual=40)),
        "base": Config((96, 192), (3, 3, 0), (3, 3, 0),
                       LatentConfig((16, 32, 64, 208), hyper=96, width=128, features=192, context=160, trunk=224,
                                    squeeze=128, residual=128)),
        "paper": Config((192, 192), (3, 3, 3), (3, 3, 3),
                        LatentConfig((16, 16, 32, 64, 192), hyper=192, width=256, features=640, context=224, trunk=256,
                                     squeeze=320, residual=224, kernel=5)),
    }  # fmt: skip

    def __init__(self, config: Config, preset: str = "custom"):
        super().__init__(config, preset)
        # receptive fields: convolutions of each resolution reach one cell of it to every side
        (e4, e8, e16), (d4, d8, d16) = config.encoder_blocks, config.decoder_blocks
        reach = 4 * (1 + 2 * e4 + 1) + 8 * 2 * e8 + 16 * 2 * e16
        self.analysis_margin = -(-reach // self.tile_multiple) * self.tile_multiple
        self.synthesis_margin = -(-(4 * (2 * d4 + 1) + 8 * 2 * d8 + 16 * 2 * d16) // self.stride)
        self.g_a = Analysis(config)
        self.g_s = Synthesis(config)
        self.latent = ContextHyperprior(config.latent)

    def forward(self, x: Tensor, level: Tensor) -> Outputs:
        y_hat, y_bits, z_bits = self.latent(self.g_a(x, level), level)
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
        y = torch.zeros(1, self.config.latent.channels, side // 16, side // 16)
        counts = {
            "g_a": macs(self.g_a, torch.zeros(1, 3, side, side), level),
            "entropy": macs(self.latent, y, level),
            "g_s": macs(self.g_s, y, level),
        }
        return {part: round(count / side**2 / 1000, 2) for part, count in counts.items()}

    def tables(self) -> dict[str, Tables]:
        return {"z": self.latent.z_tables, "y": self.latent.y_tables}

    def set_tables(self, tables: dict[str, Tables]) -> None:
        self.latent.set_tables(tables["z"], tables["y"])
