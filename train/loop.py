"""One training loop for all image codecs.

    codec train hyperprior:light --recipe train/recipes/hyperprior-light.toml --data photos/ --out runs/light

A recipe is a TOML file (see ``recipes/``). The learning rate follows the fraction of the run that is done, where a run
is bounded by steps, by minutes, or by both; a stopped run goes on from its last checkpoint (``--resume``).
The loss of a sample at level l is (bpp + lambda(l) * 255^2 * MSE) * lambda(l)^-0.5: the power makes every quality weigh about
the same, because the rate itself grows like lambda^0.56 (otherwise the high qualities would take all the gradient).
With ``distortion = "ms-ssim"`` lambda_ms * (1 - MS-SSIM) stands in the place of the squared error; start from a checkpoint that
was trained for the squared error (``--init``). What a step minimises is an ``Objective``: distillation brings its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..codecs import registry
from ..codecs.base import LEVELS, ImageCodec
from ..eval.metrics import MS_SSIM_WEIGHTS, WINDOW, ms_ssim_tensor
from ..nn.transforms import aligned
from .captured import Step
from .data import Crops, load_folder
from .files import read_recipe, save
from .klt import start_at_klt
from .optim import optimisers
from .plot import plot_run
from .revive import dead_share
from .start import start_of

STAGE_KEYS = {"until", "crop", "batch", "hard", "resize", "tone"}
"""Where it ends; side and number of crops; whether the encoder rests (``set_hard``); scales and tones (``Crops``)."""


@dataclass
class Recipe:
    """Everything that decides a run, besides the data. Stages are run in order; ``until`` is a fraction of the run."""

    optimiser: str = "adam"
    lr: float = 1e-3
    muon_lr: float = 2e-3
    latent_factor: float = 1.0  # on the rates of the entropy model, which bears and wants higher ones than the transform
    factors: dict[str, float] = field(default_factory=dict)  # on the rates of parameters whose names begin so
    warmup_steps: int = 200
    decay_from: float = 0.3  # fraction of the run at which the cosine to zero begins
    decay_to: float = 1.0  # where it ends; what follows (a hard stage) starts again at ``tail`` and falls linearly
    tail: float = 0.1
    clip: float = 1.0
    ema: float = 0.999
    steps: int = 10**9
    minutes: float = 1e9
    weight_power: float = 0.5
    start: str = "noise"  # or "klt": see klt.py
    klt_pictures: int = 192
    seed: int = 0
    distortion: str = "mse"  # or "ms-ssim"
    distil_until: list[float] = field(default_factory=lambda: [0.15, 0.5])  # fractions of the run that end stages 1 and 2
    channel_order: str = "match"  # or "rank": which teacher channel a student channel follows, see distill.py
    stages: list[dict[str, Any]] = field(default_factory=lambda: [{"until": 1.0, "crop": 128, "batch": 8}])

    @classmethod
    def read(cls, path: Path | None, **overrides: Any) -> Recipe:
        """Recipe from a TOML file; ValueError for an unknown key."""
        recipe = read_recipe(cls, path, overrides)
        unknown = {key for stage in recipe.stages for key in stage} - STAGE_KEYS
        if unknown:
            raise ValueError(f"{path}: a stage has no {min(unknown)!r}; it has {', '.join(sorted(STAGE_KEYS))}")
        if recipe.distortion not in ("mse", "ms-ssim"):
            raise ValueError(f"{path}: distortion is \"mse\" or \"ms-ssim\", not {recipe.distortion!r}")
        return recipe

    def stage(self, done: float) -> dict[str, Any]:
        return next((s for s in self.stages if done < s["until"]), self.stages[-1])

    def rate(self, step: int, done: float) -> float:
        """Factor on the peak learning rate."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        if done <= self.decay_from:
            return warm
        if done > self.decay_to:
            return self.tail * (1 - done) / (1 - self.decay_to)
        t = (done - self.decay_from) / (self.decay_to - self.decay_from)
        return warm * (0.5 + 0.5 * math.cos(math.pi * t)) + 1e-3


MS_SSIM_POWER = math.log(60.5 / 2.4) / math.log(0.0483 / 0.0018)  # lambdas of MLIC++ for MS-SSIM beside those for MSE
MS_SSIM_FACTOR = 2.4 / 0.0018**MS_SSIM_POWER


def dissimilarity(x: Tensor, y: Tensor) -> Tensor:
    """1 - MS-SSIM (B,) of two batches; below 161 pixels over as many scales as fit."""
    scales = sum((WINDOW - 1) * 2**n < min(x.shape[2:]) for n in range(len(MS_SSIM_WEIGHTS)))
    return 1 - ms_ssim_tensor(x, y, scales=scales)


def rd_loss(codec: ImageCodec, x: Tensor, level: Tensor, power: float, model=None,
            distortion: str = "mse") -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Weighted rate-distortion loss (scalar) of x (B, 3, h, w) and detached figures per sample."""
    out = (model or codec)(x, level)
    pixels = x.shape[2] * x.shape[3]
    bpp = sum(out.bits.values()) / pixels
    x_hat = out.x_hat.float()
    mse = (x_hat - x).square().flatten(1).mean(1)
    lam = codec.lambda_of(level)
    if distortion == "mse":
        cost = lam * 255**2 * mse
    else:
        cost = MS_SSIM_FACTOR * lam**MS_SSIM_POWER * dissimilarity(x_hat, x)
    loss = (bpp + cost) * lam**-power
    parts = {f"bpp_{name}": bits.detach() / pixels for name, bits in out.bits.items()}
    return loss.mean() + codec.auxiliary_loss(), {"bpp": bpp.detach(), "mse": mse.detach(), **parts}


class Objective(torch.nn.Module):
    """What a step minimises. Its parameters are trained beside the codec's, and kept in checkpoints only."""

    def forward(self, codec: ImageCodec, x: Tensor, level: Tensor, recipe: Recipe, done: float,
                model: Any = None) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Loss (scalar) and figures for the log, of which ``bpp`` is always there. ``done``: fraction of the run."""
        return rd_loss(codec, x, level, recipe.weight_power, model, recipe.distortion)


@torch.no_grad()
def validate(codec: ImageCodec, pictures: Tensor, levels: tuple[int, ...] = (100, 300, 500, 700, 900)) -> list[dict]:
    """Rate and PSNR with training noise on fixed pictures (n, 3, h, w) uint8, for the log. Shipping is decided on bytes."""
    codec.eval()
    rows = []
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    for level in levels:
        bpp, psnr = [], []
        for batch in pictures.split(8):
            x = batch.to(next(codec.parameters()).device).float() / 255
            lv = torch.full((len(x),), float(level), device=x.device)
            out = codec(x, lv)
            mse = (out.x_hat.float().clamp(0, 1) - x).square().flatten(1).mean(1)
            bpp.append(sum(out.bits.values()) / (x.shape[2] * x.shape[3]))
            psnr.append(-10 * torch.log10(mse))
        rows.append({"level": level, "bpp": float(torch.cat(bpp).mean()), "psnr": float(torch.cat(psnr).mean())})
    torch.set_rng_state(generator_state)
    codec.train()
    return rows


def transfer(codec: torch.nn.Module, state: dict[str, Tensor]) -> set[str]:
    """Copy every tensor whose name and shape agree; the names of those left as they were."""
    own, state = codec.state_dict(), aligned(codec, state)
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    codec.load_state_dict(fitting, strict=False)
    return own.keys() - fitting.keys()


@torch.no_grad()
def fit_blocks(codec: ImageCodec, x: Tensor, level: Tensor, names: set[str]) -> None:
    """Blocks that want to see pictures before they start (``NormedBlock``), of those that have a parameter among ``names``."""
    blocks = [m for n, m in codec.named_modules() if hasattr(m, "fit") and any(k.startswith(f"{n}.") for k in names)]
    if not blocks:
        return
    hooks = [m.register_forward_pre_hook(lambda block, args: block.fit(args[0])) for m in blocks]
    try:
        codec(x, level)
    finally:
        for hook in hooks:
            hook.remove()


def set_hard(codec: ImageCodec, hard: bool) -> None:
    """Hard stages ("soft then hard", Guo et al. 2021): the encoder rests, the rate is that of the rounded symbols.

    What is left to train then sees exactly the numbers that a file will hold.
    """
    codec.latent.rounded_rate = hard
    for module in (codec.g_a, *codec.latent.encoder_parts()):
        module.requires_grad_(not hard)


def train(codec: ImageCodec, stacks: list[Tensor], recipe: Recipe, out: Path, *, device: str = "cpu",
          resume: bool = False, init: Path | None = None, checkpoint_minutes: float = 4, compile_model: str = "",
          log_every: int = 100, objective: Objective | None = None, until: float = 1.0) -> None:  # fmt: skip
    """Train until this fraction of the recipe is done. Writes ``last.pt`` (everything), ``log.jsonl`` and ``progress.png``."""
    objective = (objective or Objective()).to(device)
    out.mkdir(parents=True, exist_ok=True)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device.startswith("cuda") else device
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # the entropy model: float32 with products of 10 bits
    torch.manual_seed(recipe.seed + rank)
    codec = codec.to(device=device, memory_format=torch.channels_last).train()
    fresh = codec.state_dict().keys()
    if init is not None:
        fresh = transfer(codec, start_of(init, device))
        print(f"taken over: all but {len(fresh)} of {len(codec.state_dict())} tensors", flush=True)
    elif recipe.start == "klt":
        start_at_klt(codec.cpu(), stacks[-1][: recipe.klt_pictures])
        codec.to(device)
    some = stacks[-1][:8, :, :256, :256].to(device).float() / 255
    fit_blocks(codec, some, torch.linspace(0, LEVELS, len(some), device=device), set(fresh))
    ema = deepcopy(codec).requires_grad_(False)
    opts = optimisers(codec, recipe.optimiser, recipe.lr, recipe.muon_lr, recipe.latent_factor, recipe.factors)
    captured = device.startswith("cuda") and world == 1 and not list(objective.parameters())
    whole: Step | None = None  # the captured step, of this stage
    moments: dict[str, Tensor] | None = None  # what it goes on from
    if list(objective.parameters()):
        opts += optimisers(objective, "adam", recipe.lr, recipe.muon_lr)
    step, spent = 0, 0.0
    if resume and (out / "last.pt").exists():
        state = torch.load(out / "last.pt", map_location=device, weights_only=True)
        codec.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        if objective.state_dict():
            objective.load_state_dict(state["objective"])
        moments = state.get("captured")
        for opt, saved in zip(opts, state["optimisers"]):
            opt.load_state_dict(saved)
        step, spent = state["step"], state["seconds"]
    model: Any = None
    half = torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext()
    held_out = stacks[-1][-16:]  # of the largest size; never seen by the crops below
    stacks = [*stacks[:-1], stacks[-1][:-16]]
    crops, stage = None, None
    log = (out / "log.jsonl").open("a") if rank == 0 else None
    started, window, last_saved, pixels_seen = time.monotonic() - spent, [], time.monotonic(), 0
    window_start = time.monotonic()

    def checkpoint() -> None:
        seconds = time.monotonic() - started
        save(out / "last.pt", {"model": codec.state_dict(), "ema": ema.state_dict(), "step": step, "seconds": seconds,
                               "objective": objective.state_dict(), "optimisers": [o.state_dict() for o in opts],
                               "captured": whole.state_dict() if whole else None, "recipe": vars(recipe)})  # fmt: skip
        x = held_out[:4].to(device).float() / 255
        dead = dead_share(ema, x, torch.linspace(0, LEVELS, len(x), device=device))
        row = {"step": step, "minutes": seconds / 60, "dead": round(dead, 4), "validation": validate(ema, held_out)}
        log.write(json.dumps(row) + "\n")
        log.flush()
        print(json.dumps(row), flush=True)
        plot_run(out)

    while True:
        done = max(step / recipe.steps, (time.monotonic() - started) / 60 / recipe.minutes)
        if world > 1:  # clocks differ, and all must enter a stage, and end, at the same step
            clock = torch.tensor([done], dtype=torch.float64, device=device)
            dist.broadcast(clock, 0)
            done = float(clock)
        if done >= until:
            break
        if recipe.stage(done) is not stage:
            stage = recipe.stage(done)
            set_hard(codec, stage.get("hard", False))
            model = codec
            if world > 1:  # anew for each stage: it asks once which parameters are trained
                model = torch.nn.parallel.DistributedDataParallel(codec, find_unused_parameters=True)
            if captured:
                moments = whole.state_dict() if whole else moments
                hard = stage.get("hard", False)
                whole = Step(codec, ema, opts, recipe, objective, "transforms" if hard and compile_model else compile_model)
                if moments is not None:
                    whole.load_state_dict(moments)
            elif compile_model:
                model = torch.compile(model)
            torch.manual_seed(recipe.seed * 1000 + rank + 7 * step)  # a run resumed here goes on like one that was not stopped
            crops = Crops(stacks, stage["batch"], stage["crop"], device, recipe.seed * 1000 + rank + 7 * step,
                          stage.get("resize", (1.0, 1.0)), stage.get("tone", 0.0))  # fmt: skip
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * recipe.rate(step, done)
        x = crops.next().contiguous(memory_format=torch.channels_last)
        # stratified levels: every batch sees the whole range
        level = (torch.arange(len(x)) + torch.rand(len(x))) / len(x) * LEVELS
        level = level[torch.randperm(len(x))].to(device)
        decay = min(recipe.ema, (1 + step) / (10 + step))
        if whole is not None:
            figures = whole(x, level, recipe.rate(step, done), decay)
            if step % 10 == 0:
                torch.cuda.synchronize()  # the clock is that of the device
        else:
            with half:
                loss, figures = objective(codec, x, level, recipe, done, model)
            for opt in opts:
                opt.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(codec.parameters(), recipe.clip)
            if not torch.isfinite(norm):
                print(f"step {step}: gradient is not finite, step skipped", flush=True)
            else:
                for opt in opts:
                    opt.step()
                torch._foreach_lerp_(list(ema.parameters()), list(codec.parameters()), 1 - decay)
            figures = {"loss": loss.detach(), **{k: v.mean() for k, v in figures.items()}, "grad_norm": norm}
        step += 1
        pixels_seen += x.shape[0] * x.shape[2] * x.shape[3]
        window.append(figures)
        if step % log_every == 0 and rank == 0:
            now = time.monotonic()
            means = {k: float(torch.stack([row[k] for row in window if k in row]).mean()) for k in window[-1]}
            row = {"step": step, "minutes": (now - started) / 60, **means, "lr_factor": recipe.rate(step, done),
                   "mpx_per_s": pixels_seen / 1e6 / (now - window_start)}  # fmt: skip
            log.write(json.dumps(row) + "\n")
            print(" ".join(f"{k}={v:.4g}" for k, v in row.items()), flush=True)
            window, pixels_seen, window_start = [], 0, now
        if rank == 0 and time.monotonic() - last_saved > checkpoint_minutes * 60:
            checkpoint()
            last_saved = window_start = time.monotonic()
            pixels_seen = 0
    if rank == 0:
        checkpoint()
        log.close()
    if world > 1:
        dist.destroy_process_group()


def main(argv: list[str] | argparse.Namespace | None = None) -> int:
    """``codec train``."""
    args = argv
    if not isinstance(argv, argparse.Namespace):
        parser = argparse.ArgumentParser(prog="codec train", description="Train a codec.")
        add_arguments(parser)
        args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    name, preset = registry.split(args.codec)
    if registry.codec_class(name).kind == "bytes":
        from .language import main as train_language_model

        return train_language_model(args)
    codec = registry.codec_class(name).from_preset(preset)
    recipe = Recipe.read(args.recipe, steps=args.steps, minutes=args.minutes, seed=args.seed, optimiser=args.optimiser,
                         lr=args.lr, muon_lr=args.muon_lr)  # fmt: skip
    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    objective, until = None, 1.0
    if args.teacher or args.stage:
        from .distill import set_up

        objective, until = set_up(codec, recipe, args.teacher, args.stage, resumed=args.resume)
    stacks = load_folder(args.data, args.cache)
    train(codec, stacks, recipe, args.out, device=device, resume=args.resume, init=args.init,
          checkpoint_minutes=args.checkpoint_minutes, compile_model=args.compile, objective=objective,
          until=until)  # fmt: skip
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec train``."""
    parser.add_argument("codec", help="codec and preset, for example hyperprior:light")
    parser.add_argument("--data", type=Path, required=True, help="folder of training pictures")
    parser.add_argument("--cache", type=Path, help=".npz file that keeps the decoded pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and log")
    parser.add_argument("--recipe", type=Path, help="TOML file of the run")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--optimiser", choices=("adam", "muon"))
    parser.add_argument("--lr", type=float)
    parser.add_argument("--muon-lr", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/last.pt")
    parser.add_argument("--init", type=Path, help="start from the averaged weights of this checkpoint, or from a "
                        "weights file (.safetensors), where shapes agree")  # fmt: skip
    parser.add_argument("--teacher", help="distil from CODEC:PRESET[=checkpoint or weights], frozen (see train/distill.py); "
                                          "without it the codec learns alone")  # fmt: skip
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), help="do this stage of the distillation and stop: feature "
                        "alignment, channels by their bits, fine-tuning. Later ones go on with --resume")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", nargs="?", choices=("transforms", "all"), const="transforms", default="",
                        help="torch.compile the transforms (without a value), or the entropy model too, which takes minutes "
                        "and pays in long runs on an accelerator")  # fmt: skip
    parser.add_argument("--checkpoint-minutes", type=float, default=4)


if __name__ == "__main__":
    raise SystemExit(main())
