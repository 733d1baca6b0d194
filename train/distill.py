"""Distillation: a frozen teacher's features and channels guide a smaller codec (FEDS, arXiv 2503.06399).

    T="--teacher hyperprior:light=runs/light/last.pt"
    F="codec train feds:light --recipe train/recipes/feds-light.toml --steps 8000 --data photos/"
    $F --out runs/alone                       the control: the same recipe, steps, crops and noise, no teacher
    $F --out runs/student $T                  all three stages
    $F --out runs/student $T --stage 1        or one after the other, with the same result,
    $F --out runs/student $T --stage 2 --resume
    $F --out runs/student --stage 3 --resume  which needs no teacher
    python -m neuralcodec.train.distill runs/light runs/alone runs/student    did it pay?

Stage 1 (feature alignment): L_RD + alpha * L_feat, where alpha falls from 1 to 0.1.
Stage 2 (channels): L_RD + beta * L_ent + 0.1 * L_feat.
Stage 3 (fine-tuning): L_RD alone.

    L_feat = sum over taps of the mean of (P(F_student) - F_teacher)^2, F_teacher with mean 0 and variance 1 per channel
    L_ent  = sum over student channels j of w_j * mean (y_j - s_j * y_teacher,pi(j))^2 / (2 sigma^2_pi(j)),  w = H_pi / sum H_pi

H is the mean number of bits that the teacher spends on a channel, sigma its mean scale: L_ent is the weighted divergence of
Gaussians of equal variance. pi takes the teacher's channels of most bits (``channel_order`` of the recipe says in which
order), and s is a sign. Taps are what enters the last layer of every
stage ``g_a.atK`` and ``g_s.atK`` that both codecs have (the skeleton of ``nn.transforms`` and the published transforms name
them so), y, and the hyper features; P is a 1x1 convolution that starts at the least-squares answer and is dropped in the end.
Where the paper is silent (weights, schedule, taps) this follows our specification, section 5.
All losses are weighted like L_RD itself (see ``loop``). ``distil_until`` of the recipe says where stages 1 and 2 end; stages
run one by one draw the same crops as the whole only if its ``stages`` change there too, as in feds-light.toml.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import registry
from ..codecs.base import LatentCodec
from ..codecs.weights import load_weights
from ..container.errors import UsageError
from ..entropy.exact import thaw
from ..eval.bdrate import bd_rate
from ..nn.blocks import knot_weights
from .loop import Objective, Recipe, rd_loss
from .plot import read_log

ALPHA = (1.0, 0.1)  # weight of L_feat at the begin and the end of stage 1, and the latter in stage 2
BETA = 0.1  # weight of L_ent
RANK_CROPS = 1000  # the bits and scales of channels rest on so many crops
MATCH_MEMORY = 0.98  # of the correlations, per step: the student moves
GATE = 3.0  # percent of rate that a teacher must be better than the student alone
RIDGE = 1e-4  # of the least squares at the start, relative to the mean square of the features


def tap_points(codec: LatentCodec) -> dict[str, nn.Module]:
    """The layers whose input is tapped, by ``side.stage``: the last ones of the stages at H/2, H/4 and H/8."""
    return {
        f"{side}.{name}": stage[-1]
        for side in ("g_a", "g_s")
        for name, stage in getattr(codec, side).named_children()
        if re.fullmatch("at[248]", name) and isinstance(stage, nn.Sequential)
    }


@contextmanager
def tapped(codec: LatentCodec) -> Iterator[dict[str, Any]]:
    """While open, every forward leaves its features here: the tap points, ``y``, ``hyper``, and what ``latent.likelihood`` got
    and gave (``log_scale``, ``bits``, each (B, M, h, w))."""
    found: dict[str, Any] = {}
    latent = codec.latent
    synthesis, likelihood = latent.hyper_synthesis, latent.likelihood

    def hyper_synthesis(*args):
        found["hyper"] = synthesis(*args)
        return found["hyper"]

    def symbol_likelihood(symbols, log_scale):
        result = likelihood(symbols, log_scale)
        found["log_scale"], found["bits"] = log_scale.detach(), -torch.log2(result.detach())
        return result

    def note(name):
        return lambda module, args: found.__setitem__(name, args[0])

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in tap_points(codec).items()]
    hooks.append(codec.g_a.register_forward_hook(lambda module, args, y: found.__setitem__("y", y)))
    latent.hyper_synthesis, latent.likelihood = hyper_synthesis, symbol_likelihood  # on the instance, hide the class's
    try:
        yield found
    finally:
        del latent.hyper_synthesis, latent.likelihood
        for hook in hooks:
            hook.remove()


def look(codec: LatentCodec, x: Tensor, level: Tensor) -> dict[str, Any]:
    """What ``tapped`` finds in one pass without gradients. The random numbers that it takes are given back."""
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []), tapped(codec) as found:
        y = codec.g_a(x, level)
        z_hat = codec.latent.hyper_analysis(y, level).round()  # what codes z may be gone: a weights file holds tables of it
        codec.g_s(codec.latent(y, level, z_hat)[0], level)
    return found


class Projection(nn.Module):
    """Student features (B, C, h, w) -> the teacher's, standardised (B, T, h, w): a 1x1 convolution."""

    def __init__(self, channels: int, target: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, target, 1)
        self.norm = nn.BatchNorm2d(target, affine=False, momentum=None)  # mean and variance over all crops so far
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def _fit(self, f: Tensor, target: Tensor) -> None:
        """Least squares on what is here."""
        a, b = (t.permute(0, 2, 3, 1).flatten(0, 2).double() for t in (f, target))
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        gram = a.T @ a
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        solution = torch.linalg.solve(gram, a.T @ b).T.float()
        self.conv.weight.copy_(solution[:, :-1, None, None])
        self.conv.bias.copy_(solution[:, -1])
        self.fitted.fill_(True)

    def forward(self, f: Tensor, target: Tensor) -> Tensor:
        """Mean squared distance (B,)."""
        self.norm.train()(target)
        target = self.norm.eval()(target)
        if not self.fitted:
            self._fit(f, target)
        return (self.conv(f) - target).square().flatten(1).mean(1)


class Distillation(Objective):
    """The three losses. ``teacher`` may be of any kind that trains through ``LatentCodec.forward``, in eval mode."""

    def __init__(self, student: LatentCodec, teacher: LatentCodec):
        super().__init__()
        self.held = [teacher.eval().requires_grad_(False)]  # in a list: no part of this module's state
        shapes = []
        for codec in (student, teacher):
            found = look(codec, torch.zeros(1, 3, 64, 64), torch.tensor([500.0]))
            shapes.append({k: v.shape[1:] for k, v in found.items() if k not in ("log_scale", "bits")})
        mine, theirs = shapes
        self.taps = [k for k in mine if k in theirs]
        for tap in self.taps:
            if mine[tap][1:] != theirs[tap][1:]:
                raise ValueError(f"the student's {tap} lives on another grid than the teacher's")
        self.kept, channels = mine["y"][0], theirs["y"][0]
        if self.kept > channels:
            raise ValueError(f"a teacher of {channels} latent channels cannot lead a student of {self.kept}")
        self.project = nn.ModuleList(Projection(mine[tap][0], theirs[tap][0]) for tap in self.taps)
        # means over the crops seen so far, per teacher channel
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("information", torch.zeros(channels))  # H, bits per position
        self.register_buffer("variance", torch.zeros(channels))  # sigma^2 in the domain of y
        # running sums of y_j * y_teacher,k and of y_j^2, and what pi and s were settled to (pi < 0: not yet)
        self.register_buffer("products", torch.zeros(self.kept, channels))
        self.register_buffer("powers", torch.zeros(self.kept))
        self.register_buffer("order", torch.full((self.kept,), -1))
        self.register_buffer("sign", torch.ones(self.kept))

    @property
    def teacher(self) -> LatentCodec:
        return self.held[0]

    def settle(self, how: str) -> None:
        """Fix pi and the signs. Both ways keep the teacher's channels of most bits.

        ``rank``: in the order of falling bits, as published. ``match``: in the same order each takes the student channel that
        is free and most correlated with it, of either sign; student and teacher that start at a KLT have much in common
        already, which an order from outside would break up.
        """
        best = self.information.argsort(descending=True, stable=True)[: self.kept]
        self.order.copy_(best)
        if how == "rank":
            return
        correlation = (self.products / self.powers.clamp_min(1e-12).sqrt()[:, None])[:, best]
        free = torch.ones_like(self.powers)
        for place, teacher_channel in enumerate(best):
            j = ((correlation[:, place].abs() + 1e-9) * free).argmax()
            free[j] = 0
            self.order[j] = teacher_channel
            self.sign[j] = -1.0 if correlation[j, place] < 0 else 1.0

    def _learn_match(self, y: Tensor, y_teacher: Tensor) -> None:
        flat, teacher = (t.detach().transpose(0, 1).flatten(1) for t in (y, y_teacher))
        self.products.mul_(MATCH_MEMORY).add_(flat @ teacher.T)
        self.powers.mul_(MATCH_MEMORY).add_(flat.square().sum(1))

    def _learn_ranking(self, theirs: dict[str, Any], level: Tensor) -> None:
        if self.seen >= RANK_CROPS:
            return
        latent = self.teacher.latent
        log_gain = (knot_weights(level, len(latent.log_gain), latent.cfg.levels) @ latent.log_gain)[:, :, None, None]
        variance = (2 * (theirs["log_scale"] - log_gain)).exp()
        self.seen += len(level)
        share = len(level) / self.seen
        self.information.lerp_(theirs["bits"].mean((0, 2, 3)), share)
        self.variance.lerp_(variance.mean((0, 2, 3)), share)

    def features(self, mine: dict[str, Any], theirs: dict[str, Any]) -> Tensor:
        """L_feat (B,)."""
        return sum(project(mine[tap], theirs[tap]) for tap, project in zip(self.taps, self.project))

    def channels(self, y: Tensor, y_teacher: Tensor) -> Tensor:
        """L_ent (B,) of the two latents."""
        information = self.information[self.order]
        weight = information / information.sum() / (2 * self.variance[self.order])
        return ((y - self.sign[:, None, None] * y_teacher[:, self.order]).square().mean((2, 3)) * weight).sum(1)

    def forward(self, codec, x, level, recipe, done, model=None):
        phase = stage_at(recipe, done)
        if phase == 3:
            return rd_loss(codec, x, level, recipe.weight_power, model, recipe.distortion)
        theirs = look(self.teacher, x, level)
        with tapped(codec) as mine:
            loss, figures = rd_loss(codec, x, level, recipe.weight_power, model, recipe.distortion)
        self._learn_ranking(theirs, level)
        if self.order[0] < 0:
            self._learn_match(mine["y"], theirs["y"])
        features = self.features(mine, theirs)
        high, low = ALPHA
        fallen = min(done / recipe.distil_until[0], 1) if phase == 1 else 1
        alpha = low + (high - low) * (0.5 + 0.5 * math.cos(math.pi * fallen))
        extra = alpha * features
        figures["feature_loss"] = features.detach()
        if phase == 2:
            if self.order[0] < 0:
                self.settle(recipe.channel_order)
            channels = self.channels(mine["y"], theirs["y"])
            extra = extra + BETA * channels
            figures["channel_loss"] = channels.detach()
        return loss + (extra * codec.lambda_of(level) ** -recipe.weight_power).mean(), figures


def stage_at(recipe: Recipe, done: float) -> int:
    """Stage of the distillation, 1 to 3, at a fraction of the run."""
    return 1 + sum(done >= end for end in recipe.distil_until)


def load_teacher(spec: str) -> LatentCodec:
    """The codec of ``CODEC:PRESET[=FILE]``; FILE is a checkpoint (.pt) or a weights file, by default the one at hand."""
    model, _, file = spec.partition("=")
    name, preset = registry.split(model)
    teacher = registry.codec_class(name).from_preset(preset)
    if file.endswith(".pt"):
        teacher.load_state_dict(torch.load(Path(file), map_location="cpu", weights_only=True)["ema"])
        return teacher
    load_weights(teacher, Path(file) if file else registry.weights_path(name, preset))
    return thaw(teacher)


def set_up(student: LatentCodec, recipe: Recipe, teacher: str | None, stage: int | None,
           resumed: bool) -> tuple[Objective | None, float]:  # fmt: skip
    """What ``codec train --teacher --stage`` needs: the objective, and the fraction of the run at which to stop.

    UsageError for a stage without its teacher or without the one before it, or in several processes.
    """
    if teacher and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("distillation runs in one process: its projections and statistics are not shared between several")
    if stage and stage > 1 and not resumed:
        raise UsageError(f"stage {stage} goes on where stage {stage - 1} ended: give --resume")
    if teacher is None:
        if stage != 3:
            raise UsageError(f"stage {stage} needs a --teacher")
        return None, 1.0
    until = [*recipe.distil_until, 1.0][(stage or 3) - 1]
    with torch.random.fork_rng(devices=[]):
        return Distillation(student, load_teacher(teacher)), until


def verdict(teacher: Path, alone: Path, student: Path | None = None) -> str:
    """BD-rates between the last validations of runs on the same pictures, and whether the teacher was worth it."""

    def curve(folder: Path) -> tuple[list[float], list[float]]:
        _, validations = read_log(folder)
        if not validations:
            raise UsageError(f"{folder}: no validation in its log")
        rows = validations[-1]["validation"]
        return [r["bpp"] for r in rows], [r["psnr"] for r in rows]

    gain = -bd_rate(curve(alone), curve(teacher)).value
    lines = [f"the teacher spends {gain:.2f} % less than the student alone: "
             + ("fit to teach" if gain >= GATE else f"less than {GATE:g} %, distillation cannot pay")]  # fmt: skip
    if student is not None:
        lines.append(f"the distilled student: {bd_rate(curve(alone), curve(student)).value:+.2f} % of rate")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        raise SystemExit("python -m neuralcodec.train.distill TEACHER_RUN CONTROL_RUN [STUDENT_RUN]")
    print(verdict(*map(Path, sys.argv[1:])))
