"""Training pictures: decoded once, kept as uint8 in memory, cropped and flipped on the device."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def load_folder(folder: Path, cache: Path | None = None) -> list[Tensor]:
    """All pictures below ``folder`` as uint8 stacks (n, 3, h, w), one stack per size, larger sizes last.

    ``cache`` names an .npz file that is read when it exists and written otherwise. ValueError if nothing is found.
    """
    if cache is not None and cache.exists():
        with np.load(cache) as stored:
            return [torch.from_numpy(stored[key]) for key in stored.files]
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: no pictures ({', '.join(sorted(SUFFIXES))}) found")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arrays = list(pool.map(lambda p: np.asarray(Image.open(p).convert("RGB")), paths))
    sizes = sorted({a.shape for a in arrays})
    stacks = [np.stack([a.transpose(2, 0, 1) for a in arrays if a.shape == size]) for size in sizes]
    if cache is not None:
        np.savez(cache, *stacks)
    return [torch.from_numpy(s) for s in stacks]


class Crops:
    """Endless batches of random crops, flips and transposes, (batch, 3, crop, crop) float32 in [0, 1].

    Some thousand pictures seen some hundred times are learned by heart. Two things make them more: ``resize``, a pair (least,
    most): three batches of five are crops of that many times the side, log-uniform, resized; larger ones come from pictures
    that are large enough. ``tone``: half of the crops get another tone, see ``retoned``.
    """

    def __init__(self, stacks: list[Tensor], batch: int, crop: int, device: torch.device | str, seed: int,
                 resize: tuple[float, float] = (1.0, 1.0), tone: float = 0.0):  # fmt: skip
        self.stacks = [s.to(device) for s in stacks if min(s.shape[2:]) >= crop]
        if not self.stacks:
            raise ValueError(f"no picture is at least {crop} pixels wide and high")
        self.batch, self.crop, self.resize, self.tone = batch, crop, resize, tone
        self.most = max(min(s.shape[2:]) for s in self.stacks)
        self.generator = torch.Generator().manual_seed(seed)

    def _int(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def _side(self) -> int:
        """Side of what the next batch is made of."""
        low, high = self.resize
        if low == high or float(torch.rand(1, generator=self.generator)) >= 0.6:
            return self.crop
        factor = low * (high / low) ** float(torch.rand(1, generator=self.generator))
        return min(round(self.crop * factor), self.most)

    def next(self) -> Tensor:
        side = self._side()
        stacks = [s for s in self.stacks if min(s.shape[2:]) >= side]
        # a picture counts by its area: large ones hold more to see
        weights = torch.tensor([len(s) * s.shape[2] * s.shape[3] for s in stacks], dtype=torch.float64)
        crops = []
        picks = torch.multinomial(weights / weights.sum(), self.batch, replacement=True, generator=self.generator)
        for pick in picks.tolist():
            stack = stacks[pick]
            image = stack[self._int(len(stack))]
            top, left = self._int(image.shape[1] - side + 1), self._int(image.shape[2] - side + 1)
            crop = image[:, top : top + side, left : left + side]
            flips = self._int(8)
            if flips & 1:
                crop = crop.flip(2)
            if flips & 2:
                crop = crop.flip(1)
            if flips & 4:
                crop = crop.transpose(1, 2)
            crops.append(crop)
        x = torch.stack(crops).to(torch.float32).div_(255)
        if side != self.crop:
            x = F.interpolate(x, (self.crop, self.crop), mode="bicubic", antialias=True).clamp_(0, 1)
        return retoned(x, self.tone, self.generator) if self.tone else x


def retoned(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """x (B, 3, h, w) in [0, 1], half of the pictures with a random gamma, white balance, saturation and contrast.

    ``strength`` bounds the logarithm of the gamma; the others go with it.
    """

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(len(x), channels, 1, 1, generator=generator).to(x.device)

    changed = uniform(0, 1) < 0.5
    gamma = torch.exp(uniform(-strength, strength) + uniform(-strength / 4, strength / 4, 3))
    saturation = 1 + uniform(-1.6 * strength, 0.8 * strength)
    contrast = 1 - uniform(0, strength) * (uniform(0, 1) < 0.5)
    floor = uniform(0, 1) * (1 - contrast)
    y = x.clamp_min(1e-4) ** gamma
    grey = y.mean(1, keepdim=True)
    y = (grey + saturation * (y - grey)).clamp(0, 1) * contrast + floor
    return torch.where(changed, y, x)
