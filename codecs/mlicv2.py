"""MLIC++, MLICv2 and, at encode time, MLICv2+: multi-reference entropy models.

    x --g_a--> y --MlicHyperprior--> y^ --g_s--> x^

MLIC++ (Jiang et al. 2023): 10 slices of 32 channels, each in two checkerboard passes, that refer to earlier slices (channel,
inter), to the slice itself (local, intra) and to the hyper features; see ``entropy.context.mlic``. MLICv2 (Jiang et al.
2025) adds, each a switch of the Config: token-mixing transform blocks (``mixing``), a global guide for the first slice,
channel reweighting, a rotary embedding, and guided selective compression. MLICv2+ anneals the latent (``codecs.anneal``).

``paper`` and ``paper-v1`` are the published sizes, v1 that of MLIC++: 83,501,408 parameters but for what variable quality
and our prior of z add. The small presets keep the contexts in fewer, wider slices, and put the mixing blocks (``base``:
plain ones) into the skeleton of ``nn.transforms``. Our checkerboard starts with even positions, MLIC's with odd ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..entropy.context.mlic import MlicConfig, MlicSlice
from ..entropy.context.mlic_parts import PublishedHyper
from ..nn.blocks import LevelAffine, Upsample
from ..nn.mixing import TokenMixing
from ..nn.residual import GeluBlock, StridedBlock, UpsamplingBlock
from ..nn.transforms import PLAIN, PatchAnalysis, PatchSynthesis, blocks_of, patch_margins
from .base import ADDED, LatentCodec


class MlicHyperprior(PublishedHyper):
    """The coding loop with the slice models of MLIC, and with its hyper nets where the config says so."""

    slice_model = MlicSlice


class StridedAnalysis(nn.Module):
    """The published g_a: x (B, 3, H, W) -> y (B, M, H/16, W/16) through H/2, H/4 and H/8 of ``width`` channels."""

    def __init__(self, width: int, mixing: bool, latent: Any):
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (3, width, width):
            layers += [StridedBlock(channels, width), *_residual(width, mixing)]
        self.level = LevelAffine(width, latent.knots, latent.levels)
        self.body = nn.Sequential(*layers)
        self.out = nn.Conv2d(width, latent.channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.out(self.level(self.body(x - 0.5), level))


class StridedSynthesis(nn.Module):
    """The published g_s: y^ (B, M, H/16, W/16) -> x^ (B, 3, H, W)."""

    def __init__(self, width: int, mixing: bool, latent: Any):
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (latent.channels, width, width):
            layers += [*_residual(channels, mixing), UpsamplingBlock(channels, width)]
        self.level = LevelAffine(latent.channels, latent.knots, latent.levels)
        self.body = nn.Sequential(*layers, *_residual(width, mixing), Upsample(width, 3, kernel=3))

    def forward(self, y_hat: Tensor, level: Tensor) -> Tensor:
        return self.body(self.level(y_hat, level)) + 0.5


def _residual(channels: int, mixing: bool) -> list[nn.Module]:
    """The residual block of MLIC++, or the two blocks that MLICv2 has in its place."""
    return [TokenMixing(channels), TokenMixing(channels)] if mixing else [GeluBlock(channels)]


@dataclass(frozen=True)
class Config:
    """Widths at H/4 and H/8 (or one width, of the published transform), blocks at H/4, H/8, H/16 of either side."""

    widths: tuple[int, ...]
    latent: MlicConfig
    encoder_blocks: tuple[int, int, int] = (0, 0, 0)
    decoder_blocks: tuple[int, int, int] = (0, 0, 0)
    mixing: bool = True
    narrow: int | None = field(default=None, metadata=ADDED)
    """Hidden width of plain or normed blocks at H/16, which have as many channels as y otherwise."""
    gates: bool = field(default=False, metadata=ADDED)
    """Energy gates at H/4 and H/8, see ``nn.transforms``."""
    kinds: tuple[str, str] = field(default=PLAIN, metadata=ADDED)
    """Kinds of the blocks of either side at H/4, H/8 and H/16 without ``mixing``, see ``nn.transforms.KINDS``."""
    hidden: tuple[tuple[int, int, int], tuple[int, int, int]] = field(default=((0, 0, 0), (0, 0, 0)), metadata=ADDED)
    """Their hidden widths on either side at H/4, H/8 and H/16; 0 for as many channels as the map has, or ``narrow``."""


_SMALL = {"gelu": False, "centre": True, "shared": True, "mlp": False, "project": 1, "residual_kernel": 1,
          "rope": True, "inter_head": 16}  # fmt: skip
_PUBLISHED = MlicConfig((32,) * 10, hyper=192, width=192, features=640, published_hyper=True,
                        channel=((192, 3), (128, 3), (128, 3)), local=64, inter=64, intra=64)  # fmt: skip
_PAPER = replace(_PUBLISHED, rope=True, guide=64, reweight=True)

# Dense kernels in place of token mixing make more products in the same time: two threads took 0.65 s a megapixel for 67 kMAC/px
# of plain blocks, 0.82 s for 57 kMAC/px of mixing. What counts is the decoder, at H/4 above all, where a block has few
# parameters (a file of weights may have 16 MiB): blocks at H/16 and a third one at H/8 of the encoder had learned little.
_BASE = Config((96, 192), encoder_blocks=(4, 2, 0), decoder_blocks=(4, 3, 0), mixing=False, gates=True, kinds=("nnn", "nnn"),
               latent=MlicConfig((24, 56, 96, 144), hyper=64, width=96, features=112, channel=((96, 1), (112, 3)),
                                 local=48, inter=16, intra=0, attention=32, entropy=(128, 128), residual=(80,),
                                 guide=16, lambda_low=0.0005, lambda_high=0.45, **_SMALL))  # fmt: skip
# As large as the light presets of the other codecs, to compare what is in them (``train/recipes/compare.toml``).
_COMPARE = Config((64, 96), encoder_blocks=(2, 2, 0), decoder_blocks=(2, 2, 0),
                  latent=MlicConfig((32, 48, 80, 128), hyper=32, width=56, features=56, channel=((40, 1), (56, 3)), local=32,
                                    inter=16, intra=0, attention=32, entropy=(64, 72), residual=(40,), guide=16,
                                    **_SMALL))  # fmt: skip
# Pruned from base (``train.prune``).
_LIGHT = replace(_BASE, decoder_blocks=(3, 3, 0), hidden=((48, 64, 0), (64, 128, 0)))
# A net before it, of plain blocks. Three at H/8 of the encoder and one at H/16 of either side, which there were in training,
# had died (see ``train.revive``); their width ``narrow`` stays, because it counts in the id of the models.
_PLAIN = replace(_BASE, encoder_blocks=(3, 0, 0), decoder_blocks=(1, 3, 0), narrow=112, gates=False, kinds=PLAIN,
                 latent=replace(_BASE.latent, lambda_high=0.3))  # fmt: skip


class MLICv2(LatentCodec):
    name = "mlicv2"
    presets = {
        "test": Config((16, 16), encoder_blocks=(1, 0, 0), decoder_blocks=(1, 1, 0),
                       latent=MlicConfig((8, 8, 16), hyper=8, width=16, features=16, channel=((8, 1), (16, 3)), local=8,
                                         inter=8, intra=8, attention=16, head=8, window=3, entropy=(16, 16), residual=(8,),
                                         guide=8, reweight=True, **_SMALL | {"inter_head": 8})),
        "light": _LIGHT,
        "compare": _COMPARE,
        "light-selective": replace(_LIGHT, latent=replace(_LIGHT.latent, selective=True)),  # --init from light
        "base": _BASE,
        "base-ms-ssim": _PLAIN,
        "paper": Config((192,), _PAPER),
        "paper-v1": Config((192,), _PUBLISHED, mixing=False),
    }  # fmt: skip

    def __init__(self, config: Config, preset: str = "custom"):
        super().__init__(config, preset)
        latent = config.latent
        if len(config.widths) == 1:
            width = config.widths[0]
            self.g_a, self.g_s = (side(width, config.mixing, latent) for side in (StridedAnalysis, StridedSynthesis))
            reach, self.synthesis_margin = _published_margins(config.mixing)
        else:
            # at H/4 a mixing block takes 1.8 times as long to train as a plain one, for less than half of its products
            kinds = ("pmm", "pmm") if config.mixing else config.kinds
            hidden = ((at4, at8, at16 or config.narrow or 0) for at4, at8, at16 in config.hidden)
            first, second = (blocks_of(*side) for side in zip(kinds, hidden))
            self.g_a = PatchAnalysis(config.widths, config.encoder_blocks, latent, first, config.gates)
            self.g_s = PatchSynthesis(config.widths, config.decoder_blocks, latent, second, config.gates)
            reach, self.synthesis_margin = patch_margins(config.encoder_blocks, config.decoder_blocks, kinds)
        self.analysis_margin = -(-reach // self.tile_multiple) * self.tile_multiple
        self.latent = MlicHyperprior(latent)

    def auxiliary_loss(self) -> Tensor | float:
        """Mean cross-entropy in nats between the choice of symbols to code and |v| > 0.3 steps, where there is a choice."""
        losses = [loss for model in self.latent.models for loss in model.selection_loss.values()]
        return sum(losses) / len(self.latent.models) if losses else 0.0


def _published_margins(mixing: bool) -> tuple[int, int]:
    """(pixels, cells) that the published transforms see beyond a tile."""
    block = 2 * TokenMixing.reach if mixing else 2
    # a strided block sees 1 at its input and 1 at its output; an upsampling block the same
    pixels = 1 + 2 * (1 + block + 1) + 4 * (1 + block + 1) + 8 * (1 + block + 1)
    return pixels, -(-(16 * (block + 1) + 8 * (1 + block + 1) + 4 * (1 + block + 1) + 2 * (1 + block + 1)) // 16)
