"""Shared fixtures: pictures made on the spot, the bundled ``test`` weights, and a runner of the command line."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def scene(h: int, w: int, seed: int = 0) -> np.ndarray:
    """A picture (h, w, 3) uint8 with smooth parts, edges and texture, so that a codec has something to do."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w].astype(np.float64)
    base = np.stack([128 + 90 * np.sin(x / 31 + k) * np.cos(y / (23 + 5 * k)) for k in range(3)], 2)
    base[(x // 40 + y // 28) % 3 == 0] *= 0.5
    base[: h // 3, : w // 2] += rng.normal(0, 12, (h // 3, w // 2, 1))
    return np.clip(base + rng.normal(0, 2, (h, w, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def codec():
    """The control codec with the bundled ``test`` weights."""
    from neuralcodec.codecs import registry

    return registry.load("hyperprior", "test")


class Command:
    """Runs ``codec`` as a process."""

    def __call__(self, *args: object, stdin: bytes | None = None, env: dict | None = None, **kw) -> subprocess.CompletedProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        return subprocess.run([sys.executable, "-m", "neuralcodec", *map(str, args)], input=stdin, capture_output=True,
                              env=environment, check=False, timeout=120, **kw)  # fmt: skip


@pytest.fixture(scope="session")
def command() -> Command:
    return Command()
