"""Which context model is worth what: entropy models of several codecs, trained on one and the same trained transform.

    python -m neuralcodec.train.contexts hyperprior mlicv2 s2lic hcfssnet --transform runs/light/last.pt \\
        --data photos/ --test kodak/ --anchor kodak:vtm --steps 600 --out runs/contexts

Whole codecs differ in transforms and contexts at once. Here g_a and g_s are those of a trained ``hyperprior:light`` and rest;
every codec's own latent model (hyper nets, slices, residual prediction) starts fresh and learns for the same steps, crops
and levels, from latents that were computed once. Then it is frozen and codes the test pictures: rates are bytes of real
payloads. A model is saved as ``NAME.pt``, a checkpoint of the whole graft.
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
from ..nn.blocks import knot_weights
from .data import load_folder
from .files import save
from .loop import Recipe, transfer
from .optim import optimisers
from .start import start_of

LEVELS_TESTED = (0, 150, 300, 500, 700, 850)


def graft(name: str, state: dict[str, Tensor], hyper: bool = False) -> Any:
    """``hyperprior:light`` with the transform and the step sizes of ``state`` and a fresh latent model of ``name``.

    ``hyper``: its hyper nets and prior start at those of ``state`` where the shapes agree, for going on from there rather than
    for a comparison. ValueError when the two do not share the shape of y.
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
    if hyper:
        transfer(codec, {k: v for k, v in state.items() if not k.startswith("latent.models.")})
    with torch.no_grad():
        codec.latent.log_gain.copy_(gains)
    # the steps rest too: left free they grew, because errors that are no noise, but bias, add up in g_s (1.1 dB at no gain)
    for part in (codec.g_a, codec.g_s, codec.latent.log_gain):
        part.requires_grad_(False)
    return codec


class Latents:
    """Latents y of whole pictures, each at one random level, and crops of them for training.

    The transform costs seventeen times what the light latent models cost; kept latents make their training so much cheaper.
    """

    @torch.no_grad()
    def __init__(self, codec: Any, stacks: list[Tensor], seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.kept: list[tuple[Tensor, Tensor]] = []  # y (n, M, h, w) of a size, and levels (n,)
        for stack in stacks:
            h, w = (side // 64 * 64 for side in stack.shape[2:])
            y = torch.empty(len(stack), codec.config.latent.channels, h // 16, w // 16)
            level = torch.rand(len(stack), generator=self.generator) * LEVELS
            for at in range(0, len(stack), 4):
                x = self.turned(stack[at : at + 4, :, :h, :w].float() / 255).contiguous(memory_format=torch.channels_last)
                y[at : at + 4] = codec.g_a(x, level[at : at + 4])
            self.kept.append((y, level))
        area = torch.tensor([y.numel() for y, _ in self.kept], dtype=torch.float64)
        self.share = area / area.sum()

    def turned(self, x: Tensor) -> Tensor:
        """One of the four mirrored views."""
        dims = [d for d in (2, 3) if int(torch.randint(2, (1,), generator=self.generator))]
        return x.flip(dims)

    def next(self, batch: int, side: int) -> tuple[Tensor, Tensor]:
        """(batch, M, side, side) and levels (batch,); crops start at multiples of 4, where z has its grid."""
        y, level = self.kept[int(torch.multinomial(self.share, 1, generator=self.generator))]
        picks = torch.randint(len(y), (batch,), generator=self.generator)
        offsets = [int(torch.randint((n - side) // 4 + 1, (1,), generator=self.generator)) * 4 for n in y.shape[2:]]
        top, left = offsets
        return y[picks, :, top : top + side, left : left + side], level[picks]


def sensitivity(codec: Any, pictures: Tensor, level: float, repeats: int = 4) -> Tensor:
    """What an error of 1 in a channel of y^ adds to the sum of squared errors of the picture, (M,).

    The squared norms of the columns of the Jacobian of g_s, averaged over the positions of ``pictures`` (n, 3, h, w): the
    expectation of (J^T u)^2 for white u. Errors of different cells are taken as orthogonal, as they nearly are.
    """
    at = torch.full((len(pictures),), level)
    with torch.no_grad():
        y = codec.g_a(pictures, at)
    y.requires_grad_(True)
    total = torch.zeros(y.shape[1])
    for _ in range(repeats):
        x_hat = codec.g_s(y, at)
        (grad,) = torch.autograd.grad(x_hat, y, torch.randn_like(x_hat))
        total += grad.square().mean((0, 2, 3))
    return total / repeats


def sensitivities(codec: Any, pictures: Tensor) -> Tensor:
    """``sensitivity`` at every knot of the quality range, (knots, M)."""
    knots = codec.config.latent.knots
    return torch.stack([sensitivity(codec, pictures, LEVELS * k / (knots - 1)) for k in range(knots)])


def learn(codec: Any, latents: Latents, weights: Tensor, recipe: Recipe, every: int = 250) -> Any:
    """Train ``codec.latent`` for ``recipe.steps`` on kept latents; the averaged codec. A stage's ``crop`` is in pixels.

    ``weights`` (knots, M), of ``sensitivities``, stand for the synthesis in the distortion.
    """
    torch.manual_seed(recipe.seed)
    latents.generator.manual_seed(recipe.seed)
    codec = codec.to(memory_format=torch.channels_last).train()
    average = deepcopy(codec).requires_grad_(False)
    opts = optimisers(codec.latent, recipe.optimiser, recipe.lr, recipe.muon_lr)  # a tensor without gradient stays
    losses, started = [], time.monotonic()
    for step in range(recipe.steps):
        done = step / recipe.steps
        stage = recipe.stage(done)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * recipe.rate(step, done)
        y, level = latents.next(stage["batch"], stage["crop"] // 16)
        y = y.contiguous(memory_format=torch.channels_last)
        y_hat, y_bits, z_bits = codec.latent(y, level)
        pixels = 256 * y.shape[2] * y.shape[3]
        weight = knot_weights(level, len(weights), LEVELS) @ weights
        mse = ((y_hat - y).square() * weight[:, :, None, None]).flatten(1).sum(1) / (3 * pixels)
        lam = codec.lambda_of(level)
        loss = (((y_bits + z_bits) / pixels + lam * 255**2 * mse) * lam**-recipe.weight_power).mean() + codec.auxiliary_loss()
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
            mean = float(torch.stack(losses[-every:]).mean())
            print(f"step {step + 1} loss {mean:.4f} {(time.monotonic() - started) / (step + 1):.3f} s/step", flush=True)
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
            anchor: dict[str, Any], out: Path, hyper: bool = False) -> list[dict[str, Any]]:  # fmt: skip
    """A row per codec: parameters and kMAC per pixel of its latent model, seconds of training, curve and BD-rates."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    control = registry.codec_class("hyperprior").from_preset("light").eval()
    control.load_state_dict(state)
    control.to(memory_format=torch.channels_last)
    latents = Latents(control, stacks, recipe.seed)
    side = min(stacks[-1].shape[2:]) // 64 * 64
    weights = sensitivities(control, stacks[-1][:4, :, :side, :side].float() / 255)
    for name in names:
        codec = graft(name, state, hyper)
        started = time.monotonic()
        codec = learn(codec, latents, weights, recipe)
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
    parser.add_argument("--transform", type=Path, required=True, help="last.pt or weights file of a hyperprior:light")
    parser.add_argument("--data", type=Path, required=True, help="folder of training pictures")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--test", type=Path, required=True, help="folder of pictures to code")
    parser.add_argument("--anchor", default="kodak:vtm", help="DATASET:NAME of a published curve")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--hyper", action="store_true", help="start hyper nets and prior at those of the transform's codec")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    state = start_of(args.transform)
    pictures = [p[None] for stack in load_folder(args.test) for p in stack.float() / 255]
    anchor = load_anchor(*args.anchor.split(":"))
    recipe = Recipe.read(args.recipe, steps=args.steps)
    compare(args.models, state, load_folder(args.data, args.cache), pictures, recipe, anchor, args.out, args.hyper)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
