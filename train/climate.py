"""Training of the VAEformer presets that code field after field, and of the numbers that ``entropy.grid`` starts from.

    python -m neuralcodec.train.climate vaeformer:light --data climate/train --out runs/climate --minutes 35
    python -m neuralcodec.train.climate prior --data climate/train

Fields are netCDF files that xarray opens; each is normalised with ERA5's statistics of its variable and level. A sample is
one place of two neighbours, levels or times: the first is coded alone, the second with what the first was decoded to. Crops
of global fields begin at any longitude, and some come from fields made finer by splines, smooth as fine grids are. The start
is a principal component analysis of patches, which the blocks then refine; phase 1 is an autoencoder with a Gaussian pull on
y, phase 2 rate and distortion at all qualities at once, its last part with rounded latents and the encoder at rest. The
learning rate falls with the fraction of the time that is gone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..codecs import registry
from ..codecs.base import LEVELS
from ..codecs.vaeformer import GRAVITY, VARIABLES, Plane, VAEformer, facts_of, normalisation, of_plane, statistics
from ..entropy.exact import ACT_FRAC
from .freeze import freeze_codec
from .optim import optimisers
from .start import start_of

if TYPE_CHECKING:
    import xarray as xr

CROP = (64, 96)
COST_FLOOR = 0.004  # bits per value below which a sample has nothing to teach
FINER = (1, 1, 1, 2, 3, 4, 6)  # by what a crop's grid is made finer
KEPT = 0.9  # of a reference that a fresh codec takes off
EXTREME = 12.0  # standard deviations; a field that goes beyond does not fit its statistics
NAMES = {"gh": "z"}  # and in which unit: geopotential height becomes geopotential


@dataclass(frozen=True)
class Recipe:
    """What decides a run, besides the data. Fractions are of the run."""

    minutes: float = 35.0
    batch: int = 4
    lr: float = 1e-3
    muon_lr: float = 5e-4
    first_phase: float = 0.03
    hard_from: float = 0.9
    decay_from: float = 0.2
    divergence: float = 1e-4  # weight of the Gaussian pull
    ema: float = 0.999
    seed: int = 0


@dataclass
class Stack:
    """Normalised fields (T, L, H, W) of a variable, what each level is, latitude (H,) in degrees, and whether they go around
    the Earth. ``usable`` (T, L): fields that are complete and not constant."""

    values: Tensor
    planes: list[Plane]
    latitude: np.ndarray
    periodic: bool
    usable: np.ndarray


def load_fields(folder: Path) -> list[Stack]:
    """The variables of all files of a folder. The times that ``eval`` has of other variables are left out."""
    import xarray as xr

    out = []
    for path in sorted(folder.glob("*.nc")):
        with xr.open_dataset(path) as data:
            for name, variable in data.data_vars.items():
                if variable.ndim < 2 or variable.dtype.kind != "f":
                    continue
                if "number" in variable.dims:
                    times = [t for t, at in enumerate(variable.time.values) if str(at)[:13] != "2017-01-01T12"]
                    variable = variable.isel(time=times)
                for member in variable.number.values if "number" in variable.dims else [None]:
                    part = variable if member is None else variable.sel(number=member)
                    out += _stack(str(name), part, "model" not in path.stem)
    if not out:
        raise ValueError(f"{folder}: no fields here")
    return out


def _stack(name: str, variable: xr.DataArray, pressure_levels: bool) -> list[Stack]:
    lat = next(c for c in ("latitude", "lat") if c in variable.dims)
    width = variable.shape[-1]
    span = float(np.ptp(variable[variable.dims[-1]].values)) * width / max(width - 1, 1)
    levels = variable["level"].values if "level" in variable.dims else [0]
    values = variable.transpose("time", ..., *variable.dims[-2:]).values.astype(np.float32)
    values = values.reshape(len(values), len(levels), *values.shape[-2:]) * np.float32(GRAVITY if name == "gh" else 1)
    planes = [Plane(NAMES.get(name, name), int(p) if pressure_levels else 0) for p in levels]
    usable = np.isfinite(values).all((2, 3)) & (np.ptp(values, (2, 3)) > 0)
    for t, level in zip(*np.nonzero(usable)):
        mean, std = normalisation(planes[level], values[t, level])
        values[t, level] = (values[t, level] - mean) / std
        usable[t, level] = np.abs(values[t, level]).max() < EXTREME
    if not usable.any():
        return []
    return [Stack(torch.from_numpy(values), planes, variable[lat].values.astype(np.float64), abs(span - 360) < 1, usable)]


def _finer(x: Tensor, by: int, height: int, width: int) -> Tensor:
    """(K, h, w) -> (K, height, width): splines between the values, ``by`` new ones for each."""
    size = ((x.shape[1] - 1) * by + 1, (x.shape[2] - 1) * by + 1)
    return torch.nn.functional.interpolate(x[None], size, mode="bicubic", align_corners=True)[0, :, :height, :width]


def crop(stack: Stack, chosen: list[tuple[int, int]], rng: np.random.Generator, stride: int,
         finer: int = 1, size: tuple[int, int] = CROP) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(values (K, h, w), facts (K, F, tokens), weights (h, w)) of one random part of ``chosen`` fields (time, level), of which
    each refers to the one before; what lies beyond the field weighs nothing. ``finer``: times as many values to a degree."""
    h, w = size
    x = torch.stack([stack.values[t, level] for t, level in chosen])
    if rng.random() < 0.5 and not stack.periodic or rng.random() < 0.3:
        x = x.flip(2)
    if stack.periodic:
        x = x.roll(int(rng.integers(x.shape[2])), 2)
    high, wide = -(-(h - 1) // finer) + 1, -(-(w - 1) // finer) + 1
    r = int(rng.integers(max(x.shape[1] - high, 0) + 1))
    c = int(rng.integers(max(x.shape[2] - wide, 0) + 1))
    part = x[:, r : r + high, c : c + wide]
    rows = np.minimum(np.arange(r, r + high), x.shape[1] - 1)
    latitude = stack.latitude[rows]
    if finer > 1:
        part = _finer(part, finer, h, w)
        latitude = np.interp(np.arange(h) / finer, np.arange(len(latitude)), latitude)
    part, latitude = part[:, :h, :w], latitude[:h]
    weights = torch.zeros(h, w)
    weights[: part.shape[1], : part.shape[2]] = 1
    weights *= torch.from_numpy(np.cos(np.deg2rad(latitude)).clip(0.05)).float()[:, None]
    missing = (0, w - part.shape[2], 0, h - part.shape[1])
    part = torch.nn.functional.pad(part[None], missing, mode="replicate")[0]
    centres = np.rint(latitude[stride // 2 :: stride] * 100).astype(np.int64).tolist()
    facts = facts_of([stack.planes[level] for _, level in chosen], centres, w // stride, range(-1, len(chosen) - 1))
    return part, torch.from_numpy(facts).float() * 2.0**-ACT_FRAC, weights / weights.mean()


class Sampler:
    """Batches in which each variable of each grid is as likely as the root of how many values it has to show."""

    def __init__(self, stacks: list[Stack], seed: int, stride: int):
        groups: dict[tuple, list[Stack]] = {}
        for stack in stacks:
            groups.setdefault((stack.planes[0].name, stack.values.shape[2:]), []).append(stack)
        self.groups = list(groups.values())
        fields = [sum(int(s.usable.sum()) for s in g) for g in self.groups]
        sizes = [min(g[0].values[0, 0].numel(), CROP[0] * CROP[1]) for g in self.groups]
        weights = np.sqrt(np.multiply(fields, sizes))
        self.chances, self.rng, self.stride = weights / weights.sum(), np.random.default_rng(seed), stride

    def pair(self) -> tuple[Stack, list[tuple[int, int]]]:
        """A stack and two neighbours of it, or one field twice where it has none."""
        group = self.groups[self.rng.choice(len(self.groups), p=self.chances)]
        stack = group[int(self.rng.integers(len(group)))]
        places = np.argwhere(stack.usable)
        t, level = places[int(self.rng.integers(len(places)))].tolist()
        times, levels = stack.usable.shape
        near = [(a, b) for a, b in ((t, level - 1), (t, level + 1), (t - 1, level)) if 0 <= a < times and 0 <= b < levels]
        near = [place for place in near if stack.usable[place]]
        before = near[int(self.rng.integers(len(near)))] if near else (t, level)
        return stack, [before, (t, level)]

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """values (B, 2, h, w), facts (B, 2, F, tokens), weights (B, h, w), and whether the second is another field (B,)."""
        parts = []
        for _ in range(size):
            stack, chosen = self.pair()
            values, facts, weights = crop(stack, chosen, self.rng, self.stride, int(self.rng.choice(FINER)))
            parts.append((values, facts, weights, torch.tensor(float(chosen[0] != chosen[1]))))
        return tuple(torch.stack(p) for p in zip(*parts))  # type: ignore[return-value]


@torch.no_grad()
def start_at_components(codec: VAEformer, sampler: Sampler, batches: int = 40) -> None:
    """Make a fresh codec the best linear transform of patches that its latent has room for; blocks start as the identity."""
    config, latent = codec.config, codec.config.latent
    side = config.stride
    x = torch.cat([sampler.batch(8)[0][:, 1:] for _ in range(batches)])
    patches = torch.nn.functional.unfold(x, side, stride=side).transpose(1, 2).reshape(-1, side * side)
    _, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
    # of a token at most 64 values add up: half of that keeps y within the grid
    basis, rest = (vectors.flip(1).T.float() / 2).split([latent.channels, side * side - latent.channels])
    m = latent.channels
    codec.g_a.patches.weight[:m] = basis.reshape(m, 1, side, side)
    codec.g_a.patches.bias.zero_()
    for net in (codec.g_a, codec.g_s):
        for name, p in net.named_parameters():
            if "project" in name or "down" in name or "positions" in name:
                p.zero_()
    codec.g_a.quant.weight.mul_(0.05)
    codec.g_a.quant.weight[:m, :m] += torch.eye(m)[:, :, None, None]
    codec.g_a.quant.bias.zero_()
    codec.g_a.quant.bias[m:] = -6
    codec.g_s.post.weight.mul_(0.05)
    codec.g_s.post.weight[:m] += torch.eye(m)[:, :, None, None]
    codec.g_s.post.bias.zero_()
    codec.g_s.patches.weight.mul_(0.05)
    codec.g_s.patches.weight[:, :m] += 4 * basis.T[:, :, None, None]
    if config.reference:  # what is coded is the difference to the greater part of it; that part passes through the decoder
        codec.g_a.known.weight.zero_()
        codec.g_a.known.weight[:m] = -KEPT * basis.reshape(m, 1, side, side)
        codec.g_s.known.weight.mul_(0.05)
        through = torch.cat([basis, rest])[: config.width]
        codec.g_s.known.weight[: len(through)] += KEPT * through[:, :, None, None]
        codec.g_s.patches.weight[:, m : len(through)] += 4 * through[m:].T[:, :, None, None]
    codec.latent.log_gain += math.log(2)


def cost_of(codec: VAEformer, batch: tuple[Tensor, ...], level: Tensor, recipe: Recipe,
            first_phase: bool) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Loss (scalar) of a batch at levels (B,), and figures: bits per value and median error of either field of the pairs."""
    values, facts, weights, paired = batch
    lam, reference, losses, figures = codec.lambda_of(level), None, [], {}
    for i in range(2 if codec.config.reference else 1):
        x, told, extra = values[:, i : i + 1], facts[:, i], 0.0
        if first_phase:
            x_hat, divergence = codec.autoencode(x, level, told, reference)
            rate, extra = torch.zeros(len(x)), recipe.divergence * divergence
        else:
            result = codec(x, level, told, reference)
            x_hat, rate = result.x_hat, sum(result.bits.values()) / x[0].numel()
        mse = ((x_hat - x).square() * weights[:, None]).flatten(1).mean(1)
        # fields differ so much that a sum of costs would only teach the rough ones: in the logarithm each counts alike
        each, counted = (rate + lam * mse + COST_FLOOR).log(), paired if i else torch.ones(len(x))
        losses.append((each * counted).sum() / counted.sum().clamp_min(1) + extra)
        figures |= {f"bits{i}": rate.detach().mean(), f"mse{i}": mse.detach().median()}
        reference = x_hat.detach()
    return torch.stack(losses).mean(), figures


def train(codec: VAEformer, stacks: list[Stack], recipe: Recipe, out: Path, report: float = 30.0,
          init: Path | None = None) -> VAEformer:  # fmt: skip
    """Train for ``recipe.minutes``; the averaged codec. ``out``/log.jsonl gets a line every ``report`` seconds.

    ``init``: a checkpoint whose averaged weights are the start, or a weights file; there is no first phase then.
    """
    torch.manual_seed(recipe.seed)
    sampler = Sampler(stacks, recipe.seed, codec.config.stride)
    if init is None:
        start_at_components(codec, sampler)
    else:
        codec.load_state_dict(start_of(init))
    averaged = deepcopy(codec)
    opts = optimisers(codec, "muon", recipe.lr, recipe.muon_lr)
    peaks = [[g["lr"] for g in o.param_groups] for o in opts]
    start, step, shown, log = time.time(), 0, 0.0, []
    out.mkdir(parents=True, exist_ok=True)
    while (done := (time.time() - start) / (60 * recipe.minutes)) < 1:
        rate = min(1, (step + 1) / 100)
        if done > recipe.decay_from:
            rate *= 0.5 + 0.5 * math.cos(math.pi * (done - recipe.decay_from) / (1 - recipe.decay_from))
        for o, ps in zip(opts, peaks):
            for group, peak in zip(o.param_groups, ps):
                group["lr"] = peak * rate
        if done >= recipe.hard_from and not codec.latent.rounded_rate:
            codec.latent.rounded_rate = True
            for part in (codec.g_a, *codec.latent.encoder_parts()):
                part.requires_grad_(False)
        level = (torch.arange(recipe.batch) + torch.rand(recipe.batch)) / recipe.batch * LEVELS  # the whole range in each batch
        loss, figures = cost_of(codec, sampler.batch(recipe.batch), level, recipe, not init and done < recipe.first_phase)
        for o in opts:
            o.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in codec.parameters() if p.grad is not None], 1.0)
        for o in opts:
            o.step()
        step += 1
        keep = min(recipe.ema, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(codec.parameters()), 1 - keep)
        log.append({"loss": loss.item(), **{k: v.item() for k, v in figures.items()}})
        if time.time() - shown > report:
            means = {k: float(np.mean([row[k] for row in log])) for k in log[-1]}
            line = {"step": step, "done": round(done, 4), **means}
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            shown, log = time.time(), []
            torch.save({"step": step, "ema": averaged.state_dict()}, out / "last.pt")
    torch.save({"step": step, "ema": averaged.state_dict(), "recipe": asdict(recipe)}, out / "last.pt")
    averaged.latent.rounded_rate = False
    return averaged


def fit_mixing(codec: VAEformer, stacks: list[Stack], seed: int = 0, fields: int = 160) -> dict[str, object]:
    """Give a frozen codec its context mixing, from pairs of crops at all qualities. What the card should say of it."""
    from .mixing import Tile, fit, observe

    rng, sampler, latent = np.random.default_rng(seed), Sampler(stacks, seed, codec.config.stride), codec.latent
    tiles: list[Tile] = []
    for n in range(fields // 2):
        stack, chosen = sampler.pair()
        finer = int(rng.choice(FINER))
        values, facts, _ = crop(stack, chosen, rng, codec.config.stride, finer, (2 * CROP[0], 2 * CROP[1]))
        planes = [stack.planes[level] for _, level in chosen]
        known = [of_plane(statistics(), plane) or {"mean": 0.0, "std": 1.0} for plane in planes]
        x = np.stack([v * k["std"] + k["mean"] for v, k in zip(values.numpy(), known)])
        latitude = np.repeat(90 * facts[0, len(VARIABLES), :, 0].numpy(), codec.config.stride)
        at = int((n + rng.random()) * 2 * LEVELS / fields)
        codec.encode_fields(x, planes, latitude, at, trace=lambda y, z, at=at: tiles.append(observe(latent, y, z, at)))
    tiles = [tiles[i] for i in rng.permutation(len(tiles))]
    return {"fields": len(tiles), "y_bytes_over_tables": fit(latent, tiles)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neuralcodec.train.climate", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="vaeformer:PRESET, or prior")
    parser.add_argument("--data", type=Path, required=True, help="folder of netCDF files")
    parser.add_argument("--out", type=Path, default=Path("runs/climate"))
    parser.add_argument("--init", type=Path, help="start from the averaged weights of this checkpoint, or from a weights file")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--weights", type=Path, help="folder into which the frozen model goes")
    parser.add_argument("--note", default="", help="a sentence for the card: data, hardware")
    args = parser.parse_args(argv)
    if args.model == "prior":
        from .climate_prior import prior_of

        print(json.dumps(prior_of(args.data).tolist()))
        return 0
    torch.set_num_threads(1)
    name, preset = registry.split(args.model)
    codec = registry.codec_class(name).from_preset(preset)
    fields = load_fields(args.data)
    recipe = Recipe(minutes=args.minutes)
    trained = train(codec, fields, recipe, args.out, init=args.init)
    if args.weights:
        steps = torch.load(args.out / "last.pt", weights_only=True)["step"]
        seen = sum(int(stack.usable.sum()) for stack in fields)
        training = {"steps": steps, "hours": round(args.minutes / 60, 3), "fields": seen, "recipe": asdict(recipe)}
        training |= {"note": args.note} if args.note else {}
        freeze_codec(trained, args.weights, training, lambda codec: fit_mixing(codec, fields))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
