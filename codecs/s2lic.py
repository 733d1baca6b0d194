"""S2LIC: Swin V2 stages with skips, dense enhancement at both ends, and the ACGC context model.

    x --Enh, g_a--> y --AcgcHyperprior--> y^ --g_s, Enh--> x^

``paper`` is the published network, with one affine per side that serves the whole quality range. The smaller presets have
the same blocks as residual branches of the fast skeleton (see ``nn.transforms``): the enhancement at H/4, where it costs a
hundredth of the published one, the Swin V2 stage at H/8. Source: Wang et al. 2024, "S2LIC: learned image compression with
the SwinV2 block, adaptive channel-wise and global-inter attention context"; what its code leaves open is settled as
``entropy.context.acgc`` says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..entropy.context.acgc import AcgcConfig, AcgcSlice
from ..entropy.context.mlic_parts import PublishedHyper
from ..nn.blocks import LevelAffine, Upsample
from ..nn.enhance import Enhancement
from ..nn.swin import SwinStage, spoiled
from ..nn.transforms import PatchAnalysis, PatchSynthesis
from .base import LatentCodec

WINDOW = 8
TRUNK = ((1, 4), (2, 8), (3, 16))  # depth and heads of the published stages at H/2, H/4, H/8
ALIGN = 64  # pixels: a window at H/8, on which regions begin so that windows lie as in the whole picture


@dataclass(frozen=True)
class Config:
    """The transform, and the entropy model."""

    widths: tuple[int, int]  # channels at H/4 and H/8; ``published``: N at all stages
    enhancement: tuple[int, int, int]  # width, growth and layers of the dense blocks
    latent: AcgcConfig
    depth: int = 2  # Swin V2 blocks at H/8 of either side; ``published`` has those of TRUNK
    heads: int = 4
    ratio: int = 4  # hidden width of the MLP
    bias_width: int = 512  # of the net that makes position biases
    published: bool = False


class AcgcHyperprior(PublishedHyper):
    """The shared coding loop with ACGC slices, and with the hyper pair of MLIC++ where the config says so."""

    slice_model = AcgcSlice


class Analysis(nn.Module):
    """The published g_a: x (B, 3, H, W) -> y (B, M, H/16, W/16)."""

    def __init__(self, config: Config):
        super().__init__()
        n, latent = config.widths[0], config.latent
        self.enhance = Enhancement(3, *config.enhancement)
        self.down = nn.ModuleList((
            nn.Conv2d(3, n, 5, stride=2, padding=2), nn.Conv2d(n, n, 3, stride=2, padding=1),
            nn.Conv2d(n, n, 3, stride=2, padding=1), nn.Conv2d(n, latent.channels, 3, stride=2, padding=1),
        ))  # fmt: skip
        self.stages = nn.ModuleList(_stage(config, n, depth, heads) for depth, heads in TRUNK)
        self.level = LevelAffine(n, latent.knots, latent.levels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        x = self.enhance(x)
        for down, stage in zip(self.down, self.stages):
            x = stage(down(x))
        return self.down[-1](self.level(x, level))


class Synthesis(nn.Module):
    """The published g_s: y^ (B, M, H/16, W/16) -> x^ (B, 3, H, W)."""

    def __init__(self, config: Config):
        super().__init__()
        n, latent = config.widths[0], config.latent
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(inputs, n, 3, stride=2, padding=1, output_padding=1) for inputs in (latent.channels, n, n)
        )
        self.stages = nn.ModuleList(_stage(config, n, depth, heads) for depth, heads in reversed(TRUNK))
        self.level = LevelAffine(n, latent.knots, latent.levels)
        self.out = Upsample(n, 3, kernel=3)
        self.enhance = Enhancement(3, *config.enhancement)

    def forward(self, y_hat: Tensor, level: Tensor) -> Tensor:
        x = self.level(self.up[0](y_hat), level)
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else self.up[i](x))
        return self.enhance(self.out(x))


def _stage(config: Config, channels: int, depth: int, heads: int) -> SwinStage:
    return SwinStage(channels, depth, heads, WINDOW, config.ratio, config.bias_width, skip=config.published)


def margins(config: Config) -> tuple[int, int]:
    """(pixels, cells) beyond a tile for analysis and synthesis, whose region begins on the border of a window.

    What a cut spoils grows through the layers, counted in samples of the current resolution.
    """
    reach = 2 * config.enhancement[2] + 1
    if config.published:
        spoilt = -(-(reach + 2) // 2)
        for depth, _ in TRUNK:
            spoilt = -(-(spoiled(spoilt, depth, WINDOW) + 1) // 2)
        back = 0
        for depth, _ in reversed(TRUNK):
            back = spoiled(2 * back + 1, depth, WINDOW)
        back = 2 * (back + 1) + reach
    else:
        spoilt = -(-(1 + reach + 1) // 2)
        spoilt = -(-spoiled(spoilt, config.depth, WINDOW) // 2)
        back = 4 * (2 * spoiled(0, config.depth, WINDOW) + reach + 1)
    return -(-16 * spoilt // ALIGN) * ALIGN, -(-back // ALIGN) * (ALIGN // 16)


class S2LIC(LatentCodec):
    name = "s2lic"
    whole_tiles = True
    presets = {
        "test": Config((16, 16), (8, 8, 2), heads=2, ratio=2, bias_width=16, latent=AcgcConfig(
            (8, 24), hyper=8, width=16, features=16, squeeze=16, branch=16, channel=16, inter=8, head=8, local=8, kernel=3,
            parameters=(16,), residual=(16,))),
        "light": Config((64, 96), (32, 16, 3), heads=3, ratio=2, bias_width=64, latent=AcgcConfig(
            (32, 48, 80, 128), hyper=32, width=56, features=56, squeeze=32, branch=40, channel=32, inter=16, head=16,
            local=32, kernel=3, parameters=(72, 72), residual=(40,), samples=256, smooth=False, lambda_low=0.0003,
            lambda_high=0.3)),
        "base": Config((96, 192), (64, 32, 5), depth=4, heads=6, ratio=2, latent=AcgcConfig(
            (16, 32, 64, 208), hyper=96, width=128, features=192, squeeze=96, branch=96, channel=64, inter=32, head=32,
            local=48, kernel=5, parameters=(224, 192), residual=(128,))),
        "paper": Config((192, 192), (64, 32, 5), published=True, latent=AcgcConfig(
            (32,) * 10, hyper=192, width=192, features=640, squeeze=0, branch=128, channel=64, inter=32, head=32, local=64,
            kernel=5, parameters=(320, 256, 128), residual=(224, 128), spatial_residual=True, published_hyper=True)),
    }  # fmt: skip
    # to measure what the mended gap of the context model is worth
    presets["light-released"] = replace(presets["light"], latent=replace(presets["light"].latent, see_anchors=False))

    def __init__(self, config: Config, preset: str = "custom"):
        super().__init__(config, preset)
        self.analysis_margin, self.synthesis_margin = margins(config)
        if config.published:
            self.g_a: nn.Module = Analysis(config)
            self.g_s: nn.Module = Synthesis(config)
        else:
            blocks: Any = (
                # from zero, 0.2 would only make the optimiser's steps smaller
                lambda c: Enhancement(c, *config.enhancement, strength=1.0),
                lambda c: _stage(config, c, config.depth, config.heads),
                lambda c: _stage(config, c, config.depth, config.heads),
            )
            self.g_a = PatchAnalysis(config.widths, (1, 1, 0), config.latent, blocks)
            self.g_s = PatchSynthesis(config.widths, (1, 1, 0), config.latent, blocks)
        self.latent = AcgcHyperprior(config.latent)
