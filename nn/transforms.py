"""The fast skeleton of analysis and synthesis transforms: patches of 4x4 pixels, then H/4, H/8 and H/16.

Nothing runs above H/4, where dense convolutions are slow on a CPU and learn little. The main path, from the pixels to y
and back, is linear: re-sampling convolutions without activation, so that ``train.klt`` can start it at a Karhunen-Loeve
transform, and every non-linearity sits in a residual block of the codec's own kind, or in a gain: with ``gates`` there is a
``blocks.EnergyGate`` on the main path at H/4 and at H/8 of either side. Both sides see the quality level as an affine of the
channels at H/8 (see ``blocks.LevelAffine``). ``blocks.NormedBlock`` is the kind to train; plain ones die here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from .blocks import EnergyGate, LevelAffine, NormedBlock, ResidualBlock, Upsample
from .mixing import TokenMixing

Block = Callable[[int], nn.Module]
"""Makes a residual block, (B, C, h, w) -> the same shape, for a number of channels C."""
Blocks = Block | tuple[Block, Block, Block]
"""One kind of block for all stages, or one each for H/4, H/8 and H/16."""


KINDS = {"p": ResidualBlock, "n": NormedBlock, "m": TokenMixing}
"""Kinds of residual blocks: plain, normed, token mixing."""
PLAIN = ("ppp", "ppp")


def blocks_of(kinds: str, hidden: tuple[int, int, int] = (0, 0, 0)) -> Blocks:
    """Blocks by the letters of KINDS, one each for H/4, H/8 and H/16. ``hidden``: channels inside; 0 for those of the map."""
    at4, at8, at16 = (partial(KINDS[k], hidden=n) if n else KINDS[k] for k, n in zip(kinds, hidden))
    return at4, at8, at16


def _stages(block: Blocks, counts: tuple[int, int, int], channels: tuple[int, int, int]) -> list[list[nn.Module]]:
    kinds = block if isinstance(block, tuple) else (block,) * 3
    return [[kind(c) for _ in range(n)] for kind, n, c in zip(kinds, counts, channels)]


class PatchAnalysis(nn.Module):
    """x (B, 3, H, W) -> y (B, M, H/16, W/16).

    ``widths``: channels at H/4 and H/8; ``counts``: blocks at H/4, H/8 and H/16; ``latent`` a LatentBase.
    """

    def __init__(self, widths: tuple[int, int], counts: tuple[int, int, int], latent: Any, block: Blocks = ResidualBlock,
                 gates: bool = False):  # fmt: skip
        super().__init__()
        (a, b), m = widths, latent.channels
        at4, at8, at16 = _stages(block, counts, (a, b, m))
        self.patch = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, a, 3, padding=1))
        self.at4 = nn.Sequential(*at4, nn.Conv2d(a, b, 3, stride=2, padding=1))
        self.level = LevelAffine(b, latent.knots, latent.levels)
        self.gate4, self.gate8 = (EnergyGate(c) if gates else nn.Identity() for c in (a, b))
        self.at8 = nn.Sequential(*at8, nn.Conv2d(b, m, 2, stride=2))
        self.at16 = nn.Sequential(*at16)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.at16(self.at8(self.gate8(self.level(self.at4(self.gate4(self.patch(x - 0.5))), level))))


class PatchSynthesis(nn.Module):
    """y^ (B, M, H/16, W/16) -> x^ (B, 3, H, W). ``counts``: blocks at H/4, H/8 and H/16."""

    def __init__(self, widths: tuple[int, int], counts: tuple[int, int, int], latent: Any, block: Blocks = ResidualBlock,
                 gates: bool = False):  # fmt: skip
        super().__init__()
        (a, b), m = widths, latent.channels
        at4, at8, at16 = _stages(block, counts, (a, b, m))
        self.at16 = nn.Sequential(*at16, Upsample(m, b))
        self.level = LevelAffine(b, latent.knots, latent.levels)
        self.gate4, self.gate8 = (EnergyGate(c) if gates else nn.Identity() for c in (a, b))
        self.at8 = nn.Sequential(*at8, Upsample(b, a))
        self.at4 = nn.Sequential(*at4, Upsample(a, 3, 4, kernel=3))

    def forward(self, y_hat: Tensor, level: Tensor) -> Tensor:
        # float32 again where training has bfloat16 inside: half of it lies 0.002 wide near white
        return self.at4(self.gate4(self.at8(self.gate8(self.level(self.at16(y_hat), level))))).float() + 0.5


def _shapes(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in state.items()}


def aligned(codec: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` of a codec of these transforms by the names of ``codec``, which may have other numbers and kinds of blocks.

    Blocks of ``codec`` that ``state`` lacks, or has of another kind or width, rest, where they can. Those that ``codec`` lacks
    are taken out, the last ones of a stage first, and the constant that a plain block adds goes into the next layer: all that
    there is of it when it is dead (see ``train.revive``). As it is for other codecs.
    """
    result = dict(state)
    for name, kind in (("g_a", PatchAnalysis), ("g_s", PatchSynthesis)):
        side = getattr(codec, name, None)
        if not isinstance(side, kind):
            return state
        left = 0.0  # of the blocks behind the last layer of the analysis
        for stage in ("at16", "at8", "at4"):
            prefix, own = f"{name}.{stage}.", getattr(side, stage)
            parts: dict[int, dict[str, Tensor]] = {}
            for key in [k for k in result if k.startswith(prefix)]:
                number, _, rest = key.removeprefix(prefix).partition(".")
                parts.setdefault(int(number), {})[rest] = result.pop(key)
            last = parts.pop(max(parts)) if parts and (name, stage) != ("g_a", "at16") else {}
            blocks = len(own) - (1 if (name, stage) != ("g_a", "at16") else 0)
            constant = sum(part["b.bias"] for i, part in parts.items() if i >= blocks and "b.bias" in part)
            if (name, stage) == ("g_a", "at16"):
                left = constant
            elif last:
                weight, bias = (next(k for k in last if k.endswith(end)) for end in ("weight", "bias"))
                if isinstance(constant, Tensor):
                    last[bias] = last[bias] + last[weight].sum((2, 3)) @ constant
                if (name, stage) == ("g_a", "at8"):
                    last[bias] = last[bias] + left
            kept = {i: part for i, part in parts.items() if i < blocks and _shapes(part) == _shapes(own[i].state_dict())}
            for i in set(range(blocks)) - set(kept):
                if hasattr(own[i], "rest"):
                    own[i].rest()
            kept |= {blocks: last} if last else {}
            result |= {f"{prefix}{i}.{k}": v for i, part in kept.items() for k, v in part.items()}
    return result


def patch_margins(encoder: tuple[int, int, int], decoder: tuple[int, int, int],
                  kinds: tuple[str, str] = PLAIN) -> tuple[int, int]:  # fmt: skip
    """(pixels, cells) that the two transforms, of blocks of these KINDS, see beyond a tile."""
    (e4, e8, e16), (d4, d8, d16) = encoder, decoder
    reach = max(KINDS[k].reach for k in "".join(kinds))
    pixels = 4 * (1 + reach * e4 + 1) + 8 * reach * e8 + 16 * reach * e16
    return pixels, -(-(4 * (reach * d4 + 1) + 8 * reach * d8 + 16 * reach * d16) // 16)

