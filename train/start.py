"""Where a training starts: the averaged weights of a checkpoint, or of a weights file that ships.

A weights file holds integers in the place of an entropy model's floats, and nothing of an optimiser; what its integers stand
for is as good a start as the checkpoint that it was frozen from, which may be long gone.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..codecs import registry
from ..codecs.weights import load_weights
from ..entropy.exact import thaw
from ..entropy.factorized import FactorizedPrior
from ..entropy.tables import PRECISION, Tables

FIT_STEPS, FIT_RATE = 600, 0.03
FIT_REACH = 40  # symbols to either side of zero that a fitted prior has to follow


def start_of(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """State of a float codec: ``ema`` of a checkpoint, or a weights file (.safetensors) thawed."""
    if path.suffix == ".safetensors":
        return thawed(path)
    return torch.load(path, map_location=device, weights_only=True)["ema"]


def thawed(path: Path) -> dict[str, Tensor]:
    """What a codec in training would hold to be frozen to the weights file ``path``, up to rounding, and its prior of z fitted
    to the tables."""
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    if not {"codec", "preset"} <= about.keys():
        raise ValueError(f"{path}: a weights file names its codec and preset")
    codec, fresh = (registry.codec_class(about["codec"]).from_preset(about["preset"]) for _ in range(2))
    load_weights(codec, path)
    state = thaw(codec).state_dict()
    for name, tensor in fresh.state_dict().items():
        if name.endswith("log_gain") and name in state and state[name].shape != tensor.shape:  # frozen at more knots
            state[name] = state[name][:: (len(state[name]) - 1) // (len(tensor) - 1)]
    state |= {f"latent.prior.{k}": v for k, v in fitted(codec.latent.z_tables).state_dict().items()}
    return {name: state[name] for name in fresh.state_dict()}  # a frozen layer has a bias where the float one does without


def fitted(tables: Tables) -> FactorizedPrior:
    """The prior whose masses come nearest to those of ``tables``, a row per channel, in bits."""
    values = torch.arange(-FIT_REACH, FIT_REACH + 1)
    mass = np.zeros((len(tables), len(values)))
    for r, (offset, length) in enumerate(zip(tables.offsets, tables.lengths)):
        at = np.arange(length - 1) + offset + FIT_REACH
        inside = (at >= 0) & (at < len(values))
        mass[r, at[inside]] = tables.row(r)[:-1][inside] * 2.0**-PRECISION
    target = torch.from_numpy(mass / mass.sum(1, keepdims=True)).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = FactorizedPrior(len(tables))
    points = values.float().expand(1, len(tables), 1, -1)
    optimiser = torch.optim.Adam(prior.parameters(), lr=FIT_RATE)
    with torch.enable_grad():
        for step in range(FIT_STEPS):
            optimiser.param_groups[0]["lr"] = FIT_RATE * (0.5 + 0.5 * math.cos(math.pi * step / FIT_STEPS))
            loss = -(target * prior.likelihood(points)[0, :, 0].log2()).sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return prior.requires_grad_(False)
