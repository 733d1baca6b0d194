"""A trained net of the skeleton of ``nn.transforms`` made smaller: blocks taken out, hidden channels of the others thinned out.

    python -m neuralcodec.train.prune hyperprior:base runs/base/last.pt --drop g_a.at16.0 \\
        --hidden g_a.at4:32 g_a.at8:24 g_s.at8:58 --data photos/ --out small.pt

What a net of many blocks has learned on an accelerator is a better start for a small one than what a small one has
learned by itself. Hidden channels go one after another, always the one whose loss the others make up for best: what is left of
the second kernel of a block is fitted anew to what the block computed, by least squares on training pictures at levels over
the whole range (as in He, Zhang, Sun 2017, "Channel pruning for accelerating very deep neural networks", where a lasso picks).
The checkpoint that comes out is for ``codec train --init``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs import registry
from ..codecs.base import LEVELS
from ..nn.blocks import NormedBlock
from .data import load_folder
from .files import save
from .start import start_of

RIDGE = 1e-4  # of the mean square of a hidden channel
SAMPLES = 60_000  # positions of a block that a fit sees


@torch.no_grad()
def drop(codec: nn.Module, names: list[str]) -> None:
    """Take the residual blocks ``names`` out of ``codec``; what stands behind them moves up."""
    where = ((name, *name.rpartition(".")[::2]) for name in names)
    for name, stage, number in sorted(where, key=lambda n: int(n[2]), reverse=True):
        blocks = codec.get_submodule(stage)
        if not isinstance(blocks[int(number)], NormedBlock):
            raise ValueError(f"{name}: is no normed block")
        del blocks[int(number)]


def patches(hidden: Tensor, where: Tensor) -> Tensor:
    """(n, 9 C + 1): what a 3x3 kernel and its bias see at the flat positions ``where`` (n,) of hidden (B, C, h, w)."""
    columns = F.unfold(hidden, 3, padding=1).movedim(1, 2).flatten(0, 1)[where]
    return torch.cat([columns, columns.new_ones(len(columns), 1)], 1)


@torch.no_grad()
def thin(block: NormedBlock, seen: list[Tensor], hidden: int) -> float:
    """Leave ``block`` with ``hidden`` hidden channels. ``seen``: inputs of it. The share of the energy of its branch lost.

    Channels are picked backwards on the normal equations, in closed form: taking group g out of a least squares fit with the
    inverse Gram matrix P raises the error by b_g' (P_gg)^-1 b_g.
    """
    generator = torch.Generator().manual_seed(0)
    width = block.a.out_channels
    size = 9 * width + 1
    gram, cross = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, block.b.out_channels, dtype=torch.float64)
    energy = 0.0
    for x in seen:
        u = block.inner(x)
        cells = len(x) * x.shape[2] * x.shape[3]
        where = torch.randperm(cells, generator=generator)[: SAMPLES // len(seen)]
        columns = patches(u, where).double()
        branch = block.b(u).movedim(1, 3).flatten(0, 2)[where].double()
        branch = branch * block.scale.flatten()  # errors count as the map has them
        gram += columns.T @ columns
        cross += columns.T @ branch
        energy += float((branch - branch.mean(0)).square().sum())
    gram.diagonal()[:-1].add_(RIDGE * gram.diagonal()[:-1].mean())
    kept = list(range(width))

    def rows(channels: list[int]) -> Tensor:
        return torch.tensor([9 * c + k for c in channels for k in range(9)] + [size - 1])

    inverse = torch.linalg.inv(gram)
    weights = inverse @ cross
    lost = 0.0
    while len(kept) > hidden:
        n = len(kept)
        own = torch.arange(9 * n).reshape(n, 9)
        blocks = inverse[own[:, :, None], own[:, None, :]]  # (n, 9, 9)
        cost = torch.einsum("nio,nio->n", weights[own], torch.linalg.solve(blocks, weights[own]))
        worst = int(cost.argmin())
        lost += float(cost[worst])
        gone = own[worst]
        rest = torch.tensor([i for i in range(9 * n + 1) if i not in set(gone.tolist())])
        # block elimination of the inverse and of the fit
        factor = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, rest])
        weights = weights[rest] - factor.T @ weights[gone]
        inverse = inverse[rest][:, rest] - inverse[rest][:, gone] @ factor
        kept.pop(worst)
    exact = torch.linalg.solve(gram[rows(kept)][:, rows(kept)], cross[rows(kept)])  # free of the rounding of the way there
    scale = block.scale.flatten().double()
    exact = torch.where(scale.abs() > 1e-8, exact / scale, 0)
    small = NormedBlock(block.a.in_channels, hidden)
    small.a.weight.copy_(block.a.weight[kept])
    small.a.bias.copy_(block.a.bias[kept])
    small.b.weight.copy_(exact[:-1].reshape(hidden, 3, 3, -1).permute(3, 0, 1, 2))
    small.b.bias.copy_(exact[-1])
    block.a, block.b = small.a, small.b
    return lost / max(energy, 1e-12)


@torch.no_grad()
def narrow(codec: nn.Module, widths: dict[str, int], x: Tensor, level: Tensor, batch: int = 8) -> dict[str, float]:
    """Thin the blocks of the stages ``widths`` on pictures x (n, 3, h, w) in [0, 1] at ``level`` (n,), in the order in which
    they run: each fit sees what those before it have become. The share of energy lost, by block."""
    lost: dict[str, float] = {}
    for stage, hidden in widths.items():
        for number, block in enumerate(codec.get_submodule(stage)):
            if not isinstance(block, NormedBlock) or block.a.out_channels <= hidden:
                continue
            seen: list[Tensor] = []
            hook = block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
            try:
                for at in range(0, len(x), batch):
                    codec(x[at : at + batch], level[at : at + batch])
            finally:
                hook.remove()
            lost[f"{stage}.{number}"] = thin(block, seen, hidden)
    return lost


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neuralcodec.train.prune", description=__doc__.split("\n")[0])
    parser.add_argument("codec", help="codec and preset of the checkpoint")
    parser.add_argument("checkpoint", type=Path, help="last.pt of a run, or a weights file")
    parser.add_argument("--drop", nargs="*", default=[], metavar="BLOCK", help="blocks to take out: g_a.at8.1")
    parser.add_argument("--hidden", nargs="*", default=[], metavar="STAGE:N", help="hidden channels to leave: g_a.at8:32")
    parser.add_argument("--data", type=Path, required=True, help="folder of training pictures")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    name, preset = registry.split(args.codec)
    codec = registry.codec_class(name).from_preset(preset).eval()
    codec.load_state_dict(start_of(args.checkpoint))
    codec.latent.rounded_rate = True
    x = load_folder(args.data, args.cache)[-1][: args.pictures, :, :256, :256].float() / 255
    level = torch.linspace(0, LEVELS, len(x))[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    drop(codec, args.drop)
    widths = {stage: int(n) for stage, _, n in (part.partition(":") for part in args.hidden)}
    for block, share in narrow(codec, widths, x, level).items():
        print(f"{block}: {100 * share:.2f} % of the branch's energy lost")
    save(args.out, {"ema": codec.state_dict()})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
