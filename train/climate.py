"""Training of the VAEformer presets that code fields one by one, and of the numbers that ``entropy.grid`` starts from.

    python -m neuralcodec.train.climate vaeformer:light --data climate/train --out runs/climate --minutes 35
    python -m neuralcodec.train.climate prior --data climate/train

Fields are netCDF files that xarray opens; each is normalised with ERA5's statistics of its variable and level. Crops of
global fields begin at any longitude. The start is a principal component analysis of patches, which the blocks then refine;
phase 1 is an autoencoder with a Gaussian pull on y, phase 2 rate and distortion at all qualities at once, its last part with
rounded latents and the encoder at rest. The learning rate falls with the fraction of the time that is gone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..codecs import registry
from ..codecs.base import LEVELS
from ..codecs.vaeformer import GRAVITY, Plane, VAEformer, facts_of, normalisation
from ..entropy.exact import ACT_FRAC
from .freeze import freeze_codec
from .optim import optimisers

CROP = (64, 96)
COST_FLOOR = 0.02  # bits per value below which a sample has nothing to teach
EXTREME = 12.0  # standard deviations; a field that goes beyond does not fit its statistics
NAMES = {"gh": "z"}  # and in which unit: geopotential height becomes geopotential


@dataclass(frozen=True)
class Recipe:
    """What decides a run, besides the data. Fractions are of the run."""

    minutes: float = 35.0
    batch: int = 4
    lr: float = 1e-3
    muon_lr: float = 3e-4
    first_phase: float = 0.05
    hard_from: float = 0.9
    decay_from: float = 0.2
    divergence: float = 1e-4  # weight of the Gaussian pull
    ema: float = 0.998
    seed: int = 0


@dataclass
class Field:
    """A normalised field (H, W), what it is, latitude (H,) in degrees, and whether it goes around the Earth."""

    values: Tensor
    plane: Plane
    latitude: np.ndarray
    periodic: bool


def load_fields(folder: Path) -> list[Field]:
    """Every complete 2-D field of all files of a folder. The times that ``eval`` has of other variables are left out."""
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
                lat = next(c for c in ("latitude", "lat") if c in variable.dims)
                width = variable.shape[-1]
                span = float(np.ptp(variable[variable.dims[-1]].values)) * width / max(width - 1, 1)
                levels = variable["level"].values if "level" in variable.dims else [0]
                pressures = [int(p) if variable.dims and "model" not in path.stem else 0 for p in levels]
                stack = variable.transpose(..., variable.dims[-2], variable.dims[-1]).values.astype(np.float32)
                stack = stack * np.float32(GRAVITY) if name == "gh" else stack
                flat = stack.reshape(-1, *stack.shape[-2:])
                for i, field in enumerate(flat):
                    if np.isfinite(field).all() and np.ptp(field) > 0:
                        plane = Plane(NAMES.get(str(name), str(name)), pressures[i % len(levels)])
                        mean, std = normalisation(plane, field)
                        values = torch.from_numpy((field - mean) / std)
                        if float(values.abs().max()) < EXTREME:
                            out.append(Field(values, plane, variable[lat].values.astype(np.float64), abs(span - 360) < 1))
    if not out:
        raise ValueError(f"{folder}: no fields here")
    return out


def crop(field: Field, rng: np.random.Generator, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values (1, h, w), facts (F, tokens), weights (1, h, w)) of a random part; what lies beyond the field weighs nothing."""
    h, w = CROP
    x = field.values
    if rng.random() < 0.5 and not field.periodic or rng.random() < 0.3:
        x = x.flip(1)
    if field.periodic:
        x = x.roll(int(rng.integers(x.shape[1])), 1)
    r = int(rng.integers(max(x.shape[0] - h, 0) + 1))
    c = int(rng.integers(max(x.shape[1] - w, 0) + 1))
    part = x[r : r + h, c : c + w]
    weights = torch.zeros(1, h, w)
    weights[:, : part.shape[0], : part.shape[1]] = 1
    rows = np.minimum(np.arange(r, r + h), x.shape[0] - 1)
    weights *= torch.from_numpy(np.cos(np.deg2rad(field.latitude[rows])).clip(0.05)).float()[:, None]
    missing = (0, w - part.shape[1], 0, h - part.shape[0])
    part = torch.nn.functional.pad(part[None, None], missing, mode="replicate")[0]
    centres = field.latitude[rows[stride // 2 :: stride]]
    facts = facts_of([field.plane], np.rint(centres * 100).astype(np.int64).tolist(), w // stride)
    return part, torch.from_numpy(facts[0]).float() * 2.0**-ACT_FRAC, weights / weights.mean()


class Sampler:
    """Batches in which each variable of each file is as likely as the root of how many fields it has."""

    def __init__(self, fields: list[Field], seed: int, stride: int):
        groups: dict[tuple, list[Field]] = {}
        for field in fields:
            groups.setdefault((field.plane.name, field.values.shape), []).append(field)
        self.groups = list(groups.values())
        weights = np.sqrt([len(g) * min(g[0].values.numel(), CROP[0] * CROP[1]) for g in self.groups])
        self.chances, self.rng, self.stride = weights / weights.sum(), np.random.default_rng(seed), stride

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        parts = []
        for g in self.rng.choice(len(self.groups), size, p=self.chances):
            group = self.groups[g]
            parts.append(crop(group[int(self.rng.integers(len(group)))], self.rng, self.stride))
        return tuple(torch.stack(p) for p in zip(*parts))  # type: ignore[return-value]


@torch.no_grad()
def start_at_components(codec: VAEformer, sampler: Sampler, batches: int = 40) -> None:
    """Make a fresh codec the best linear transform of patches that its latent has room for; blocks start as the identity."""
    config, latent = codec.config, codec.config.latent
    side = config.stride
    x = torch.cat([sampler.batch(8)[0] for _ in range(batches)])
    patches = torch.nn.functional.unfold(x, side, stride=side).transpose(1, 2).reshape(-1, side * side)
    _, vectors = torch.linalg.eigh((patches.T @ patches / len(patches)).double())
    basis = vectors.flip(1).T[: latent.channels].float() / 2  # of a token at most 64 values add up: keeps y within the grid
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
    codec.latent.log_gain += math.log(2)


def train(codec: VAEformer, fields: list[Field], recipe: Recipe, out: Path, report: float = 30.0) -> VAEformer:
    """Train for ``recipe.minutes``; the averaged codec. ``out``/log.jsonl gets a line every ``report`` seconds."""
    torch.manual_seed(recipe.seed)
    sampler = Sampler(fields, recipe.seed, codec.config.stride)
    start_at_components(codec, sampler)
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
        x, facts, weights = sampler.batch(recipe.batch)
        level = torch.randint(0, LEVELS + 1, (len(x),)).float()
        lam = codec.lambda_of(level)
        if done < recipe.first_phase:
            x_hat, divergence = codec.autoencode(x, level, facts)
            rate_cost, extra = torch.zeros(len(x)), recipe.divergence * divergence
        else:
            if done >= recipe.hard_from and not codec.latent.rounded_rate:
                codec.latent.rounded_rate = True
                codec.g_a.requires_grad_(False)
                for part in codec.latent.encoder_parts():
                    part.requires_grad_(False)
            result = codec(x, level, facts)
            x_hat, extra = result.x_hat, 0.0
            rate_cost = sum(result.bits.values()) / x[0].numel()
        mse = ((x_hat - x).square() * weights).flatten(1).mean(1)
        # fields differ so much that a sum of costs would only teach the rough ones: in the logarithm each counts alike
        loss = (rate_cost + lam * mse + COST_FLOOR).log().mean() + extra
        for o in opts:
            o.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in codec.parameters() if p.grad is not None], 1.0)
        for o in opts:
            o.step()
        step += 1
        keep = min(recipe.ema, step / (step + 10))
        with torch.no_grad():
            for a, b in zip(averaged.parameters(), codec.parameters()):
                a.lerp_(b, 1 - keep)
        log.append((loss.item(), rate_cost.mean().item(), mse.median().item()))
        if time.time() - shown > report:
            means = np.mean(log, 0)
            line = {"step": step, "done": round(done, 4), "loss": means[0], "bits": means[1], "mse": means[2]}
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            shown, log = time.time(), []
            torch.save({"step": step, "ema": averaged.state_dict()}, out / "last.pt")
    torch.save({"step": step, "ema": averaged.state_dict(), "recipe": asdict(recipe)}, out / "last.pt")
    averaged.latent.rounded_rate = False
    return averaged


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m neuralcodec.train.climate", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="vaeformer:PRESET, or prior")
    parser.add_argument("--data", type=Path, required=True, help="folder of netCDF files")
    parser.add_argument("--out", type=Path, default=Path("runs/climate"))
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
    trained = train(codec, fields, recipe, args.out)
    if args.weights:
        steps = torch.load(args.out / "last.pt", weights_only=True)["step"]
        training = {"steps": steps, "hours": round(args.minutes / 60, 3), "fields": len(fields), "recipe": asdict(recipe)}
        freeze_codec(trained, args.weights, training | ({"note": args.note} if args.note else {}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
