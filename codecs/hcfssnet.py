"""HCFSSNet: hybrid convolutions and frequency state spaces (arXiv 2511.20151).

    x --g_a--> y --HcfssEntropy--> y^ --g_s--> x^          g_a, g_s: HybridBlocks; entropy: FSTAM, two-pass checkerboard

    HybridBlock   x + 1x1([conv half, VFSS half])         halves of 1x1(x)
    VFSS          u = x + VONSS(norm(x)),  u + AFMM(norm(u))

The paper has released no code; what it does not state follows TCM (Liu et al. 2023), the skeleton that its description fits.
Convolutions see the near and the fine; VONSS scans the whole tile in several directions, AFMM weighs the DCT coefficients of
8x8 blocks by what the tile holds. So the synthesis needs whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..entropy.context.attention import Map
from ..entropy.context.fstam import FSTAM, FstamSlice
from ..entropy.exact import ExactConv2d, ExactReLU, bounded, cat, pixel_shuffle
from ..entropy.hyperprior import ContextHyperprior, LatentBase
from ..entropy.levels import LevelBias
from ..nn.blocks import ChannelNorm, LevelAffine, Upsample
from ..nn.frequency import AFMM
from ..nn.residual import StridedBlock, UpsamplingBlock
from ..nn.scan import VONSS
from ..nn.transforms import Block, PatchAnalysis, PatchSynthesis
from .base import LatentCodec

BlockKinds = tuple[Block, Block, Block]


@dataclass(frozen=True)
class Scan:
    """How VFSS scans."""

    directions: int  # 2, 4 or 8
    states: int
    heads: int  # that share a decay; 0: one for each channel and state


@dataclass(frozen=True, kw_only=True)
class EntropyConfig(LatentBase):
    """Widths of the entropy model."""

    width: int  # of the hyper nets
    features: int  # channels that the hyper synthesis hands to a branch of the slices
    branches: int  # 2: nets for mean and scale of their own; 1: common ones
    attention: int  # width inside FSTAM
    heads: int  # of its attention
    units: int  # residual units on either side of its gate
    squeeze: int  # channels behind the FSTAM of a slice; 0: as many as before it
    context: int  # width of a slice's context layer, per branch
    trunk: int  # and of its second layer
    residual: int  # hidden width of the latent residual prediction
    kernel: int = 3  # side of the convolution of the anchors
    hyper_kernel: int = 1  # side of the re-sampling convolutions of the hyper synthesis
    hyper_blocks: int = 0  # hybrid blocks and FSTAMs at H/32, where TCM has its two blocks
    spatial: bool = False  # the residual prediction sees neighbours: three 3x3 layers on the support and the slice


@dataclass(frozen=True)
class Config:
    """``widths`` at H/4 and H/8 of the fast skeleton (see ``nn.transforms``) with the blocks of either side at H/4, H/8 and
    H/16; or a single width for the published transform from H/2 on, with so many blocks at H/2, H/4 and H/8."""

    widths: tuple[int, int] | tuple[int]
    encoder_blocks: tuple[int, int, int]
    decoder_blocks: tuple[int, int, int]
    scan: Scan
    latent: EntropyConfig


class VFSS(nn.Module):
    """x + VONSS(norm(x)), then + AFMM(norm(x)), each by a small factor per channel to start with."""

    def __init__(self, channels: int, scan: Scan, phase: int, fold: int):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.scan = VONSS(channels, channels, scan.states, scan.directions, phase, scan.heads, fold)
        self.frequency = AFMM(channels)
        self.factors = nn.Parameter(torch.full((2, channels, 1, 1), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addcmul(x, self.factors[0], self.scan(self.norm1(x)))
        return torch.addcmul(x, self.factors[1], self.frequency(self.norm2(x)))


class HybridBlock(nn.Module):
    """x + 1x1([r + conv3(gelu(conv3(r))), VFSS(v)]) with [r, v] = 1x1(x), halves; shape (B, C, H, W) is kept."""

    def __init__(self, channels: int, scan: Scan, phase: int, fold: int = 1):
        super().__init__()
        half = channels // 2
        self.near, self.far = nn.Conv2d(channels, half, 1), nn.Conv2d(channels, half, 1)
        self.a, self.b = nn.Conv2d(half, half, 3, padding=1), nn.Conv2d(half, half, 3, padding=1)
        self.vfss = VFSS(half, scan, phase, fold)
        self.leave = nn.Conv2d(channels, channels, 1)

    def rest(self) -> None:
        """Become the identity; training leaves it again."""
        with torch.no_grad():
            self.leave.weight.zero_()
            self.leave.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        r = self.near(x)
        r = r + self.b(F.gelu(self.a(r)))
        return x + self.leave(torch.cat([r, self.vfss(self.far(x))], 1))


class HybridAnalysis(nn.Module):
    """The published transform, x (B, 3, H, W) -> y (B, M, H/16, W/16): strided and hybrid blocks at H/2, H/4 and H/8.

    The level comes in as an affine of the channels at H/8, as in ``nn.transforms``.
    """

    def __init__(self, width: int, counts: tuple[int, int, int], latent: EntropyConfig, blocks: BlockKinds):
        super().__init__()
        stages: list[nn.Module] = []
        for channels, n, kind in zip((3, width, width), counts, blocks):
            stages += [StridedBlock(channels, width), *(kind(width) for _ in range(n))]
        self.stages = nn.Sequential(*stages)
        self.level = LevelAffine(width, latent.knots, latent.levels)
        self.leave = nn.Conv2d(width, latent.channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.leave(self.level(self.stages(x - 0.5), level))


class HybridSynthesis(nn.Module):
    """The published transform, y^ (B, M, H/16, W/16) -> x^ (B, 3, H, W); ``counts`` at H/2, H/4, H/8."""

    def __init__(self, width: int, counts: tuple[int, int, int], latent: EntropyConfig, blocks: BlockKinds):
        super().__init__()
        self.enter = UpsamplingBlock(latent.channels, width)
        self.level = LevelAffine(width, latent.knots, latent.levels)
        stages: list[nn.Module] = []
        for n, kind in zip(counts[::-1], blocks[::-1]):
            stages += [*(kind(width) for _ in range(n)), UpsamplingBlock(width, width)]
        stages[-1] = Upsample(width, 3, kernel=3)
        self.stages = nn.Sequential(*stages)

    def forward(self, y_hat: Tensor, level: Tensor) -> Tensor:
        return self.stages(self.level(self.enter(y_hat), level)) + 0.5


class HcfssEntropy(ContextHyperprior):
    """The shared hyperprior loop with FSTAM behind the hyper synthesis and in every slice.

    z^ --conv, shuffle--> (+ level) --3x3--> conv, shuffle --> FSTAM: one such net, or two, for mean and scale.
    """

    slice_model = FstamSlice

    def _build_hyper(self, cfg: EntropyConfig) -> None:
        m, w = cfg.channels, cfg.width
        self.h_a_level = LevelAffine(m, cfg.knots, cfg.levels)
        down: list[nn.Module] = [nn.Conv2d(m, w, 1), nn.ReLU(), nn.Conv2d(w, w, 3, stride=2, padding=1), nn.ReLU()]
        if cfg.hyper_blocks:
            scan = Scan(4, 1, 4)
            down = [StridedBlock(m, w), *(HybridBlock(w, scan, k) for k in range(cfg.hyper_blocks))]
        self.h_a = nn.Sequential(*down, nn.Conv2d(w, cfg.hyper, 3, stride=2, padding=1))
        self.z_gain = LevelAffine(cfg.hyper, cfg.knots, cfg.levels)
        self.h_s = nn.ModuleList(HyperSynthesis(cfg) for _ in range(cfg.branches))
        with torch.no_grad():
            self.h_a[-1].weight.mul_(4)

    def hyper_synthesis(self, z_hat: Map, level: Tensor | int) -> Map:
        """z^ (B, hyper, h, w) -> features (B, branches * features, 4h, 4w)."""
        return cat([net(z_hat, level) for net in self.h_s])


class HyperSynthesis(nn.Module):
    """z^ (B, hyper, h, w) -> features (B, features, 4h, 4w)."""

    def __init__(self, cfg: EntropyConfig):
        super().__init__()
        w = cfg.width
        self.enter = ExactConv2d(cfg.hyper, 4 * w, cfg.hyper_kernel)
        self.bias = LevelBias(w, cfg.knots, cfg.levels)
        self.mix = ExactConv2d(w, w, 3)
        blocks = (FSTAM(w, w, cfg.attention, cfg.heads, cfg.units, window=4) for _ in range(cfg.hyper_blocks))
        self.blocks = nn.Sequential(*blocks)
        self.leave = ExactConv2d(w, 4 * cfg.features, cfg.hyper_kernel)
        self.fstam = FSTAM(cfg.features, cfg.features, cfg.attention, cfg.heads, cfg.units)
        self.relu = ExactReLU()

    def forward(self, z_hat: Map, level: Tensor | int) -> Map:
        f = bounded(pixel_shuffle(self.enter(z_hat), 2) + self.bias(level))
        f = self.blocks(self.relu(self.mix(self.relu(f))))
        return self.fstam(self.relu(pixel_shuffle(self.leave(f), 2)))


class HCFSSNet(LatentCodec):
    name = "hcfssnet"
    whole_tiles = True
    presets = {
        "test": Config((16, 16), (1, 1, 0), (1, 1, 0), Scan(4, 1, 2),
                       EntropyConfig((8, 24), hyper=8, width=16, features=16, branches=1, attention=16, heads=2, units=1,
                                     squeeze=16, context=16, trunk=16, residual=16)),
        "light": Config((64, 96), (2, 1, 0), (2, 2, 0), Scan(2, 2, 2),
                        EntropyConfig((32, 48, 80, 128), hyper=32, width=56, features=56, branches=1, attention=32,
                                      heads=2, units=1, squeeze=48, context=56, trunk=72, residual=40, lambda_low=0.0003,
                                      lambda_high=0.3)),
        "base": Config((96, 192), (2, 3, 0), (2, 3, 0), Scan(4, 2, 4),
                       EntropyConfig((16, 32, 64, 208), hyper=96, width=128, features=160, branches=1, attention=96,
                                     heads=4, units=1, squeeze=128, context=160, trunk=224, residual=128)),
        "paper": Config((256,), (2, 2, 2), (2, 2, 2), Scan(8, 4, 0),
                        EntropyConfig((64,) * 5, hyper=192, width=256, features=320, branches=2, attention=128, heads=4,
                                      units=3, squeeze=0, context=224, trunk=128, residual=224, kernel=5,
                                      hyper_kernel=3, hyper_blocks=2, spatial=True)),
    }  # fmt: skip

    def __init__(self, config: Config, preset: str = "custom"):
        super().__init__(config, preset)
        number = count()  # of the block: what it scans alternates

        def kind(fold: int) -> Block:
            return lambda channels: HybridBlock(channels, config.scan, next(number), fold)

        kinds = kind(2), kind(1), kind(1)  # the first scan is the longest: it takes patches of 2x2
        if len(config.widths) == 1:
            self.g_a = HybridAnalysis(config.widths[0], config.encoder_blocks, config.latent, kinds)
            self.g_s = HybridSynthesis(config.widths[0], config.decoder_blocks, config.latent, kinds)
        else:
            self.g_a = PatchAnalysis(config.widths, config.encoder_blocks, config.latent, kinds)
            self.g_s = PatchSynthesis(config.widths, config.decoder_blocks, config.latent, kinds)
        self.latent = HcfssEntropy(config.latent)
