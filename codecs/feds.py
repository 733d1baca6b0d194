"""FEDS: a small codec that learns from a large one (arXiv 2503.06399).

    teacher   x --g_a, residual blocks and SwinV2 attention--> y, many channels --> x^        frozen while the student learns
                       |  features at H/8, H/4   |  channels ranked by their bits   |
    student   x --g_a, fewer blocks, no attention--> y, fewer channels ----------> x^         what a file is coded with

Teacher and student are presets of one codec; how the one teaches the other is ``train.distill``, which works for any pair of
codecs of the suite. What the paper leaves open (widths, what exactly the student drops) follows the reading of our
specification: the student has no attention, fewer residual blocks and fewer channels, and 63 % fewer parameters.
The published transform runs from H/2 with strided residual blocks and ChARM slices; the other presets are the same idea in
the fast skeleton of ``nn.transforms`` with the slices of the control.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..entropy.context.charm import CharmSlice
from ..entropy.exact import ExactConv2d, ExactLeakyReLU, Grid, bounded, cat, pixel_shuffle
from ..entropy.hyperprior import ContextHyperprior, LatentBase, LatentConfig
from ..entropy.levels import LevelBias
from ..nn.blocks import LevelAffine, ResidualBlock, Upsample
from ..nn.residual import StridedBlock, UpsamplingBlock
from ..nn.swin import SwinStage
from ..nn.transforms import PLAIN, PatchAnalysis, PatchSynthesis, blocks_of, patch_margins
from .base import ADDED, LatentCodec

HEADS, WINDOW = 8, 8
SEEN = WINDOW + WINDOW // 2  # samples that a plain and a shifted attention block see to every side


@dataclass(frozen=True)
class Config:
    """Widths at H/4 and H/8, residual blocks at H/4, H/8, H/16 of either side, and the entropy model.

    ``attention``: every residual block at H/8 is followed by two SwinV2 blocks, plain and shifted.
    """

    widths: tuple[int, int]
    encoder_blocks: tuple[int, int, int]
    decoder_blocks: tuple[int, int, int]
    latent: LatentConfig
    attention: bool = False
    gates: bool = field(default=False, metadata=ADDED)
    """Energy gates at H/4 and H/8, see ``nn.transforms``."""
    kinds: tuple[str, str] = field(default=PLAIN, metadata=ADDED)
    """Kinds of the blocks of either side at H/4, H/8 and H/16 without ``attention``, see ``nn.transforms.KINDS``."""
    hidden: tuple[tuple[int, int, int], tuple[int, int, int]] = field(default=((0, 0, 0), (0, 0, 0)), metadata=ADDED)
    """Their hidden widths on either side at H/4, H/8 and H/16; 0 for as many channels as the map has."""


@dataclass(frozen=True, kw_only=True)
class CharmConfig(LatentBase):
    """``width`` of the hyper nets, hidden widths of the ChARM nets."""

    width: int
    context: tuple[int, int] = (224, 128)


@dataclass(frozen=True)
class PaperConfig:
    """The transform as published: ``width`` channels and ``blocks`` residual blocks at H/2, H/4 and H/8.

    ``attention``: two SwinV2 blocks at H/4 and at H/16 of either side.
    """

    width: int
    blocks: int
    latent: CharmConfig
    attention: bool = False


# As large as the light presets of the other codecs, to compare what is in them (``train/recipes/compare.toml``).
_COMPARE = Config((48, 72), (1, 0, 0), (1, 0, 0),
                  LatentConfig((32, 48, 64, 96), hyper=32, width=48, features=48, context=48, trunk=64, squeeze=32,
                               residual=32), gates=True)  # fmt: skip
_BASE = Config((80, 144), (3, 3, 0), (1, 1, 0),
               LatentConfig((24, 56, 88, 120), hyper=48, width=80, features=96, context=96, trunk=120, squeeze=64,
                            residual=64, lambda_low=0.0005, lambda_high=0.45), gates=True, kinds=("nnn", "nnn"))  # fmt: skip


class FEDS(LatentCodec):
    name = "feds"
    presets = {
        "test": Config((16, 16), (1, 1, 0), (1, 1, 0),
                       LatentConfig((8, 16), hyper=8, width=16, features=16, context=16, trunk=16, squeeze=16,
                                    residual=16)),
        "compare": _COMPARE,
        "light": replace(_BASE, encoder_blocks=(3, 2, 0), hidden=((16, 16, 0), (48, 48, 0))),  # pruned (``train.prune``)
        "base": _BASE,
        "teacher": Config((64, 96), (2, 2, 0), (2, 2, 0),
                          LatentConfig((32, 48, 80, 128), hyper=32, width=64, features=64, context=64, trunk=80,
                                       squeeze=48, residual=48), attention=True),
        "paper": PaperConfig(144, 1, CharmConfig((64,) * 5, 192, width=144)),
        "paper-teacher": PaperConfig(256, 2, CharmConfig((64,) * 7, 192, width=256), attention=True),
    }  # fmt: skip

    def __init__(self, config: Config | PaperConfig, preset: str = "custom"):
        super().__init__(config, preset)
        self.whole_tiles = config.attention
        if isinstance(config, PaperConfig):
            self.analysis_margin, self.synthesis_margin = 128, 8
            self.g_a = StridedAnalysis(config)
            self.g_s = StridedSynthesis(config)
            self.latent = CharmHyperprior(config.latent)
            return
        reach, self.synthesis_margin = patch_margins(config.encoder_blocks, config.decoder_blocks, config.kinds)
        if config.attention:
            reach += 8 * SEEN * config.encoder_blocks[1]
            self.synthesis_margin += SEEN // 2 * config.decoder_blocks[1]
        self.analysis_margin = -(-reach // self.tile_multiple) * self.tile_multiple
        first, second = (blocks_of(*side) for side in zip(config.kinds, config.hidden))
        if config.attention:
            first = second = (ResidualBlock, attentive_block, ResidualBlock)
        self.g_a = PatchAnalysis(config.widths, config.encoder_blocks, config.latent, first, config.gates)
        self.g_s = PatchSynthesis(config.widths, config.decoder_blocks, config.latent, second, config.gates)
        self.latent = ContextHyperprior(config.latent)


def attention_pair(channels: int, bias_width: int = 512) -> nn.Module:
    """Two SwinV2 blocks, plain and shifted."""
    return SwinStage(channels, 2, HEADS, WINDOW, bias_width=bias_width, skip=False)


def attentive_block(channels: int) -> nn.Module:
    """The light teacher's block at H/8."""
    return nn.Sequential(ResidualBlock(channels), attention_pair(channels, bias_width=64))


def _stage(config: PaperConfig, width: int, attention: bool) -> list[nn.Module]:
    blocks: list[nn.Module] = [ResidualBlock(width) for _ in range(config.blocks)]
    return [*blocks, attention_pair(width)] if attention and config.attention else blocks


class StridedAnalysis(nn.Module):
    """x (B, 3, H, W) -> y (B, M, H/16, W/16). Stage ``atK`` works at H/K and ends with the step to the next grid."""

    def __init__(self, config: PaperConfig):
        super().__init__()
        n, latent = config.width, config.latent
        self.patch = StridedBlock(3, n)
        self.at2 = nn.Sequential(*_stage(config, n, False), StridedBlock(n, n))
        self.at4 = nn.Sequential(*_stage(config, n, True), StridedBlock(n, n))
        self.level = LevelAffine(n, latent.knots, latent.levels)
        self.at8 = nn.Sequential(*_stage(config, n, False), nn.Conv2d(n, latent.channels, 3, stride=2, padding=1))
        self.at16 = attention_pair(latent.channels) if config.attention else nn.Identity()

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.at16(self.at8(self.level(self.at4(self.at2(self.patch(x - 0.5))), level)))


class StridedSynthesis(nn.Module):
    """y^ (B, M, H/16, W/16) -> x^ (B, 3, H, W), the mirror of ``StridedAnalysis``."""

    def __init__(self, config: PaperConfig):
        super().__init__()
        n, latent = config.width, config.latent
        attention = [attention_pair(latent.channels)] if config.attention else []
        self.at16 = nn.Sequential(*attention, UpsamplingBlock(latent.channels, n))
        self.level = LevelAffine(n, latent.knots, latent.levels)
        self.at8 = nn.Sequential(*_stage(config, n, False), UpsamplingBlock(n, n))
        self.at4 = nn.Sequential(*_stage(config, n, True), UpsamplingBlock(n, n))
        self.at2 = nn.Sequential(*_stage(config, n, False), Upsample(n, 3, kernel=3))

    def forward(self, y_hat: Tensor, level: Tensor) -> Tensor:
        return self.at2(self.at4(self.at8(self.level(self.at16(y_hat), level)))) + 0.5


class ExactSubpelBlock(nn.Module):
    """The hyper synthesis' step up, (B, C, h, w) -> (B, out, 2h, 2w): UpsamplingBlock without GDN, on exact layers."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.skip = ExactConv2d(channels, 4 * out, 3)
        self.a = ExactConv2d(channels, 4 * out, 3)
        self.b = ExactConv2d(out, out, 3)
        self.act = ExactLeakyReLU()

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        branch = self.act(self.b(self.act(pixel_shuffle(self.a(x), 2))))
        return bounded(pixel_shuffle(self.skip(x), 2) + branch)


class CharmHyperprior(ContextHyperprior):
    """Two hyper syntheses, of means and of scales, and ChARM slices."""

    slice_model = CharmSlice

    def _build_hyper(self, cfg: CharmConfig) -> None:
        m, n = cfg.channels, cfg.width
        self.h_a_level = LevelAffine(m, cfg.knots, cfg.levels)
        self.h_a = nn.Sequential(StridedBlock(m, n), nn.Conv2d(n, cfg.hyper, 3, stride=2, padding=1))
        self.z_gain = LevelAffine(cfg.hyper, cfg.knots, cfg.levels)
        self.h_s_bias = nn.ModuleList(LevelBias(n, cfg.knots, cfg.levels) for _ in range(2))
        self.h_s_in = nn.ModuleList(ExactSubpelBlock(cfg.hyper, n) for _ in range(2))
        self.h_s_out = nn.ModuleList(ExactConv2d(n, 4 * m, 3) for _ in range(2))

    def hyper_synthesis(self, z_hat: Tensor | Grid, level: Tensor | int) -> Tensor | Grid:
        """z^ (B, hyper, h, w) -> (B, 2M, 4h, 4w): what the means see, then what the scales see."""
        parts = zip(self.h_s_in, self.h_s_bias, self.h_s_out)
        return cat([pixel_shuffle(out(bounded(up(z_hat) + bias(level))), 2) for up, bias, out in parts])
