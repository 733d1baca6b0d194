"""The control codec: a plain residual convolutional transform and the shared context hyperprior.

    x --g_a--> y --ContextHyperprior--> y^ --g_s--> x^

The transform works at H/4 to H/16 only, where dense 3x3 convolutions run at full speed on a CPU, and its main path is
linear (see ``nn.transforms``). It is the fast default and the yardstick for every later codec.
Sources: mean-scale hyperprior, Minnen et al. 2018; two-pass checkerboard, He et al. 2021; gains, Cui et al. 2021.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..entropy.hyperprior import ContextHyperprior, LatentConfig
from ..nn.transforms import PLAIN, PatchAnalysis, PatchSynthesis, blocks_of, patch_margins
from .base import ADDED, LatentCodec


@dataclass(frozen=True)
class Config:
    """Widths at H/4 and H/8, residual blocks at H/4, H/8, H/16 of either side, and the entropy model."""

    widths: tuple[int, int]
    encoder_blocks: tuple[int, int, int]
    decoder_blocks: tuple[int, int, int]
    latent: LatentConfig
    gates: bool = field(default=False, metadata=ADDED)
    """Energy gates at H/4 and H/8, see ``nn.transforms``."""
    kinds: tuple[str, str] = field(default=PLAIN, metadata=ADDED)
    """Kinds of the blocks of either side at H/4, H/8 and H/16, see ``nn.transforms.KINDS``."""
    hidden: tuple[tuple[int, int, int], tuple[int, int, int]] = field(default=((0, 0, 0), (0, 0, 0)), metadata=ADDED)
    """Hidden widths of the blocks of either side at H/4, H/8 and H/16; 0 for as many channels as the map has."""


_TEST = Config((16, 16), (1, 1, 0), (1, 1, 0),
               LatentConfig((8, 24), hyper=8, width=16, features=16, context=16, trunk=16, squeeze=16, residual=16))
_LIGHT = Config((64, 96), (2, 1, 0), (2, 2, 0),
                LatentConfig((32, 48, 80, 128), hyper=32, width=56, features=56, context=56, trunk=72, squeeze=40,
                             residual=40, lambda_low=0.0003, lambda_high=0.3))  # fmt: skip


class Hyperprior(LatentCodec):
    name = "hyperprior"
    presets = {
        "test": _TEST,
        "test-mixed": _TEST,  # with context mixing of y
        "test-mixed-both": _TEST,  # and of z
        # pruned from base (``train.prune``), which spends more on the encoder than it needs; the decoder has two blocks more
        "light": Config(_LIGHT.widths, (3, 4, 0), (4, 2, 0), replace(_LIGHT.latent, lambda_high=0.45), gates=True,
                        kinds=("nnn", "nnn"), hidden=((32, 24, 0), (64, 58, 0))),
        # plain blocks, trained for MS-SSIM
        "light-ms-ssim": replace(_LIGHT, latent=replace(_LIGHT.latent, lambda_low=0.0008, lambda_high=0.5)),
        "base": Config(_LIGHT.widths, (3, 4, 1), (2, 2, 0), replace(_LIGHT.latent, lambda_high=0.45), gates=True,
                       kinds=("nnn", "nnn"), hidden=((0, 0, 96), (0, 0, 0))),
        "paper": Config((192, 192), (3, 3, 3), (3, 3, 3),
                        LatentConfig((16, 16, 32, 64, 192), hyper=192, width=256, features=640, context=224, trunk=256,
                                     squeeze=320, residual=224, kernel=5)),
    }  # fmt: skip

    def __init__(self, config: Config, preset: str = "custom"):
        super().__init__(config, preset)
        reach, self.synthesis_margin = patch_margins(config.encoder_blocks, config.decoder_blocks, config.kinds)
        self.analysis_margin = -(-reach // self.tile_multiple) * self.tile_multiple
        first, second = (blocks_of(*side) for side in zip(config.kinds, config.hidden))
        self.g_a = PatchAnalysis(config.widths, config.encoder_blocks, config.latent, first, config.gates)
        self.g_s = PatchSynthesis(config.widths, config.decoder_blocks, config.latent, second, config.gates)
        self.latent = ContextHyperprior(config.latent)
