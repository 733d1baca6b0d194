"""Which context model is worth what: entropy models of several codecs, trained on one and the same trained transform.

    python -m neuralcodec.train.contexts hyperprior mlicv2 s2lic hcfssnet --transform runs/light/last.pt \\
        --data photos/ --test kodak/ --anchor kodak:vtm --steps 600 --out runs/contexts

Whole codecs differ in transforms and contexts at once. Here g_a and g_s are those of a trained ``hyperprior:light`` and rest;
every codec's own latent model (hyper nets, slices, residual prediction) starts fresh and learns for the same steps, crops
and levels. Then it is frozen and codes the test pictures: rates are bytes of real payloads. A model is saved as ``NAME.pt``,
a checkpoint of the whole graft.
"""

from __future__ import annotations

import argparse
import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs import registry
from ..codecs.base import LEVELS, count_parameters, macs
from ..entropy.exact import freeze
from ..eval.bdrate import bd_rate, load_anchor
from .data import Crops, load_folder
from .loop import Recipe, rd_loss, save
from .optim import optimisers

LEVELS_TESTED = (0, 150, 300, 500, 700, 850)


def graft(name: str, state: dict[str, Tensor]) -> Any:
    """``hyperprior:light`` with the transform and the step sizes of ``state`` and a fresh latent model of ``name``.

    ValueError when the two do not share the shape of y.
    """
    codec = registry.codec_class("hyperprior").from_preset("light")
    codec.load_state_dict(state)
    gains = codec.latent.log_gain.detach().clone()
    other, _, preset = name.partition(":")
    latent = registry.codec_class(other).from_preset(preset or "light").latent
    if latent.log_gain.shape != gains.shape:
        own = f"{latent.cfg.channels} channels of y and {latent.cfg.knots} knots"
        raise ValueError(f"{name}: {own} are not those of the transform")
    codec.latent = latent
    with torch.no_grad():
        codec.latent.log_gain.copy_(gains)
    codec.g_a.requires_grad_(False)
    codec.g_s.requires_grad_(False)
    return codec


def learn(codec: Any, stacks: list[Tensor], recipe: Recipe, every: int = 100) -> Any:
    """Train ``codec.latent`` for ``recipe.steps``; the averaged codec."""
    torch.manual_seed(recipe.seed)
    codec = codec.to(memory_format=torch.channels_last).train()
    average = deepcopy(codec).requires_grad_(False)
    opts = optimisers(codec.latent, recipe.optimiser, recipe.lr, recipe.muon_lr)
    stage, crops, losses = None, None, []
    for step in range(recipe.steps):
        done = step / recipe.steps
        if recipe.stage(done) is not stage:
            stage = recipe.stage(done)
            crops = Crops(stacks, stage["batch"], stage["crop"], "cpu", seed=recipe.seed + step)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * recipe.rate(step, done)
        x = crops.next().contiguous(memory_format=torch.channels_last)
        level = (torch.arange(len(x)) + torch.rand(len(x))) / len(x) * LEVELS
        loss, _ = rd_loss(codec, x, level[torch.randperm(len(x))], recipe.weight_power)
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(codec.latent.parameters(), recipe.clip)
        for opt in opts:
            opt.step()
        decay = min(recipe.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.latent.parameters()), list(codec.latent.parameters()), 1 - decay)
        losses.append(loss.detach())
        if (step + 1) % every == 0:
            print(f"step {step + 1} loss {torch.stack(losses[-every:]).mean():.4f}", flush=True)
    return average.eval()


@torch.no_grad()
def curve(codec: Any, pictures: list[Tensor], levels: tuple[int, ...] = LEVELS_TESTED) -> list[dict[str, float]]:
    """Bits per pixel of real payloads and PSNR in dB, means over ``pictures`` (1, 3, h, w) in [0, 1], sides multiples of 64."""
    frozen = deepcopy(codec).to(memory_format=torch.contiguous_format)
    freeze(frozen)
    rows = []
    for level in levels:
        bpp, psnr = [], []
        for x in pictures:
            payload, y_hat = frozen.encode_latent(frozen.analyse(x, level), level)
            x_hat = (frozen.synthesise(y_hat, level).clamp(0, 1) * 255).round() / 255
            bpp.append(8 * len(payload) / (x.shape[2] * x.shape[3]))
            psnr.append(float(-10 * torch.log10((x_hat - x).square().mean())))
        rows.append({"level": level, "bpp": sum(bpp) / len(bpp), "psnr": sum(psnr) / len(psnr)})
    return rows


def compare(names: list[str], state: dict[str, Tensor], stacks: list[Tensor], pictures: list[Tensor], recipe: Recipe,
            anchor: dict[str, Any], out: Path) -> list[dict[str, Any]]:  # fmt: skip
    """A row per codec: parameters and kMAC per pixel of its latent model, seconds of training, curve and BD-rates."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in names:
        codec = graft(name, state)
        started = time.monotonic()
        codec = learn(codec, stacks[:-1] + [stacks[-1][:-16]], recipe)
        seconds = time.monotonic() - started
        row: dict[str, Any] = {"model": name, "parameters": count_parameters(codec.latent), "train_seconds": seconds}
        y = torch.zeros(1, codec.latent.cfg.channels, 16, 16)
        row["kmac_per_pixel"] = macs(codec.latent, y, torch.tensor([500.0])) / 256**2 / 1000
        state_of = {"ema": codec.state_dict(), "step": recipe.steps, "seconds": row["train_seconds"], "recipe": vars(recipe)}
        save(out / f"{name.replace(':', '-')}.pt", state_of)
        row["curve"] = curve(codec, pictures)
        points = [p["bpp"] for p in row["curve"]], [p["psnr"] for p in row["curve"]]
        row["bd_rate"] = bd_rate((anchor["bpp"], anchor["psnr"]), points).value
        if rows:
            first = rows[0]["curve"]
            row["bd_rate_to_first"] = bd_rate(([p["bpp"] for p in first], [p["psnr"] for p in first]), points).value
        rows.append(row)
        print(json.dumps(row), flush=True)
        report = {"recipe": vars(recipe), "anchor": anchor["name"], "rows": rows}
        (out / "contexts.json").write_text(json.dumps(report, indent=1))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neuralcodec.train.contexts", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", help="codecs (light) or CODEC:PRESET; the first is the yardstick")
    parser.add_argument("--transform", type=Path, required=True, help="last.pt of a trained hyperprior:light")
    parser.add_argument("--data", type=Path, required=True, help="folder of training pictures")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--test", type=Path, required=True, help="folder of pictures to code")
    parser.add_argument("--anchor", default="kodak:vtm", help="DATASET:NAME of a published curve")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    state = torch.load(args.transform, map_location="cpu", weights_only=True)["ema"]
    pictures = [p[None] for stack in load_folder(args.test) for p in stack.float() / 255]
    anchor = load_anchor(*args.anchor.split(":"))
    recipe = Recipe.read(args.recipe, steps=args.steps)
    compare(args.models, state, load_folder(args.data, args.cache), pictures, recipe, anchor, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
