"""Dead hidden channels of plain residual blocks get a fresh start.

    python -m neuralcodec.train.revive hyperprior:light runs/light/last.pt --data photos/ --out revived.pt

A ReLU whose input is never positive passes no gradient, and never comes back. The inputs of the blocks of ``nn.transforms`` are
small (deviations of 0.1), so an optimiser with steps of a fixed size soon carries the biases of ``a`` past them: in nets
of this suite that had trained for hours whole stages were found dead, the block at H/8 adding a constant. Such a channel gets a
random kernel whose outputs have mean 0 and deviation ``SPREAD`` on real pictures, and no weight in ``b``: the net
computes what it did, and can learn again. It must then be kept alive: with crops by the handful channels died a second time,
because the noise of a step in ``b`` times the mean of a ReLU shifts pictures, and shutting the channel cures that soonest.
Low rates for ``a`` (``factors`` of a recipe) are for that; ``nn.blocks.NormedBlock`` is what to train in their place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs import registry
from ..codecs.base import LEVELS
from ..nn.blocks import ResidualBlock
from .data import load_folder
from .files import save

SPREAD = 0.1
DEAD = 1e-3  # share of positive values below which a channel counts as dead
SAMPLES = 8192  # patches on which kernels are scaled


@torch.no_grad()
def activity(codec: nn.Module, x: Tensor, level: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By name of block: the share of positive values of each hidden channel (hidden,), and the block's input."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str):
        def hook(block: ResidualBlock, args: tuple[Tensor]) -> None:
            found[name] = ((block.a(args[0]) > 0).float().mean((0, 2, 3)), args[0])

        return hook

    blocks = [(name, m) for name, m in codec.named_modules() if isinstance(m, ResidualBlock)]
    hooks = [m.register_forward_pre_hook(note(name)) for name, m in blocks]
    try:
        codec(x, level)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def dead_share(codec: nn.Module, x: Tensor, level: Tensor) -> float:
    """Which part of the hidden channels of its residual blocks is dead on x (B, 3, h, w) in [0, 1] at ``level`` (B,)."""
    found = [active for active, _ in activity(codec, x, level).values()]
    return float((torch.cat(found) < DEAD).float().mean()) if found else 0.0


@torch.no_grad()
def revive(codec: nn.Module, x: Tensor, level: Tensor, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Revive what is dead on the pictures x (B, 3, h, w) at ``level`` (B,): (dead, all) hidden channels by name of block."""
    generator = torch.Generator().manual_seed(seed)
    counts = {}
    for name, (active, seen) in activity(codec, x, level).items():
        block = codec.get_submodule(name)
        dead = active < DEAD
        counts[name] = int(dead.sum()), len(dead)
        if not dead.any():
            continue
        # strong channels would drown the others: kernels meet them half way
        kernel = torch.randn(counts[name][0], *block.a.weight.shape[1:], generator=generator)
        kernel = kernel / seen.std((0, 2, 3)).clamp_min(1e-4).sqrt()[:, None, None]
        patches = F.unfold(seen, 3, padding=1).transpose(1, 2).flatten(0, 1)
        patches = patches[torch.randperm(len(patches), generator=generator)[:SAMPLES]]
        values = patches @ kernel.flatten(1).T
        scale = SPREAD / values.std(0)
        block.a.weight[dead] = kernel * scale[:, None, None, None]
        block.a.bias[dead] = -values.mean(0) * scale
        block.b.weight[:, dead] = 0
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neuralcodec.train.revive", description=__doc__.split("\n")[0])
    parser.add_argument("codec", help="codec and preset")
    parser.add_argument("checkpoint", type=Path, help="its last.pt")
    parser.add_argument("--data", type=Path, required=True, help="folder of training pictures")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint for codec train --init")
    args = parser.parse_args(argv)
    name, preset = registry.split(args.codec)
    codec = registry.codec_class(name).from_preset(preset).eval()
    state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    codec.load_state_dict(state["ema"])
    pictures = load_folder(args.data, args.cache)[-1][:16, :, :256, :256].float() / 255
    for block, (dead, of) in revive(codec, pictures, torch.linspace(0, LEVELS, len(pictures))).items():
        print(f"{block}: {dead} of {of} hidden channels revived")
    said = {key: state[key] for key in ("step", "seconds", "recipe")}  # nothing that --resume could take up
    save(args.out, said | {"ema": codec.state_dict()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
