"""Training pictures: decoded once, kept as uint8 in memory, cropped and flipped on the device."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
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
    """Endless batches of random crops, flips and transposes, (batch, 3, crop, crop) float32 in [0, 1]."""

    def __init__(self, stacks: list[Tensor], batch: int, crop: int, device: torch.device | str, seed: int):
        self.stacks = [s.to(device) for s in stacks if min(s.shape[2:]) >= crop]
        if not self.stacks:
            raise ValueError(f"no picture is at least {crop} pixels wide and high")
        # a picture counts by its area: large ones hold more to see
        weights = torch.tensor([len(s) * s.shape[2] * s.shape[3] for s in self.stacks], dtype=torch.float64)
        self.weights, self.batch, self.crop = weights / weights.sum(), batch, crop
        self.generator = torch.Generator().manual_seed(seed)

    def _int(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def next(self) -> Tensor:
        crops = []
        picks = torch.multinomial(self.weights, self.batch, replacement=True, generator=self.generator)
        for pick in picks.tolist():
            stack = self.stacks[pick]
            image = stack[self._int(len(stack))]
            top, left = self._int(image.shape[1] - self.crop + 1), self._int(image.shape[2] - self.crop + 1)
            crop = image[:, top : top + self.crop, left : left + self.crop]
            flips = self._int(8)
            if flips & 1:
                crop = crop.flip(2)
            if flips & 2:
                crop = crop.flip(1)
            if flips & 4:
                crop = crop.transpose(1, 2)
            crops.append(crop)
        return torch.stack(crops).to(torch.float32).div_(255)
