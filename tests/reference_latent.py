"""A slow second decoder of the control codec's latent, from ``entropy/SPEC.md`` and the weights file: NumPy integers only."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from reference_ans import ReferenceDecoder
from safetensors.numpy import load_file

ONE = 1 << 12
LIMIT = 1 << 19


def shift(q: np.ndarray, n: int) -> np.ndarray:
    """floor(q / 2^n + 1/2) of int64."""
    return (q + (1 << n - 1)) >> n if n else q


def clamp(q: np.ndarray, limit: int = LIMIT) -> np.ndarray:
    return np.clip(q, -limit, limit)


def relu(q: np.ndarray) -> np.ndarray:
    return np.maximum(q, 0)


def shuffle(x: np.ndarray) -> np.ndarray:
    """Pixel shuffle by 2 of (C*4, h, w)."""
    c, h, w = x.shape
    return x.reshape(c // 4, 2, 2, h, w).transpose(0, 3, 1, 4, 2).reshape(c // 4, 2 * h, 2 * w)


class ReferenceLatent:
    """Decodes payloads of tiles to y^ in units of 2^-12."""

    def __init__(self, weights: Path, slices: tuple[int, ...]):
        tensors = load_file(weights)
        self.exact = {k.removeprefix("exact.latent."): v for k, v in tensors.items() if k.startswith("exact.latent.")}
        self.tables = {}
        for which in "zy":
            widths, lengths, offsets = (tensors[f"tables.{which}.{k}"] for k in ("widths", "lengths", "offsets"))
            self.tables[which] = [r.tolist() for r in np.split(widths, np.cumsum(lengths)[:-1])], offsets.tolist()
        self.slices = slices

    def conv(self, name: str, x: np.ndarray) -> np.ndarray:
        """A convolution with zero padding of x (C, h, w), int64."""
        weight = self.exact[f"{name}.weight_q"].astype(np.int64)
        bias = self.exact[f"{name}.bias_q"].astype(np.int64)
        s, k = int(self.exact[f"{name}.weight_frac"]), weight.shape[2]
        (_, h, w), m = x.shape, k // 2
        padded = np.pad(x, ((0, 0), (m, m), (m, m)))
        total = np.zeros((len(weight), h, w), np.int64)
        for i in range(k):
            for j in range(k):
                total += np.einsum("oc,chw->ohw", weight[:, :, i, j], padded[:, i : i + h, j : j + w])
        return clamp(shift(total + (bias << s)[:, None, None], s))

    def at_level(self, name: str, level: int) -> np.ndarray:
        table = self.exact[name].astype(np.int64)
        p = level * (len(table) - 1)
        k = min(p // 1000, len(table) - 2)
        r = p - 1000 * k
        return ((table[k] * (1000 - r) + table[k + 1] * r + 500) // 1000)[:, None, None]

    def decode(self, payload: bytes, h: int, w: int, level: int) -> np.ndarray:
        """y^ (M, h, w) int64; AssertionError where the payload is damaged."""
        coder = ReferenceDecoder(payload)
        channels = len(self.tables["z"][0])
        count = h // 4 * (w // 4)
        z = coder.values([c for c in range(channels) for _ in range(count)], *self.tables["z"])
        x = np.array(z, np.int64).reshape(channels, h // 4, w // 4) * ONE
        x = relu(clamp(shuffle(self.conv("h_s1", x)) + self.at_level("h_s_bias.table_q", level)))
        features = relu(shuffle(self.conv("h_s3", relu(self.conv("h_s2", x)))))
        step, offset = (self.at_level(name, level)[:, 0, 0] for name in ("step_q", "offset_q"))
        y_hat = np.zeros((sum(self.slices), h, w), np.int64)
        anchors = np.indices((h, w)).sum(0) % 2 == 0
        first = 0
        for j, size in enumerate(self.slices):
            own, name = slice(first, first + size), f"models.{j}"
            hyper = self.conv(f"{name}.hyper", features)
            for half, mask in enumerate((anchors, ~anchors)):
                x = self.conv(f"{name}.squeeze", y_hat[: first + size])
                x = self.conv(f"{name}.context", x) + hyper + self.at_level(f"{name}.bias.{half}.table_q", level)
                t = relu(self.conv(f"{name}.trunk", relu(clamp(x))))
                mu, s = np.split(self.conv(f"{name}.head", t)[:, mask], [size])
                rows = np.clip(shift(8 * s + offset[own, None], 12), 0, 63)
                q = np.array(coder.values(rows.reshape(-1).tolist(), *self.tables["y"]), np.int64).reshape(mu.shape)
                seen = np.concatenate([t[:, mask], clamp(q, 8) * ONE])[:, None]
                r = clamp(self.conv(f"{name}.lrp_out", relu(self.conv(f"{name}.lrp_in", seen)))[:, 0], ONE)
                y_hat[own, mask] = clamp(mu + shift((q * 2 * ONE + r) * step[own, None], 21))
            first += size
        assert coder.at_end()
        return y_hat


def symbols_hash(y_hat: np.ndarray) -> str:
    """What golden/index.json holds of a tile."""
    return hashlib.sha256((y_hat / ONE).astype("<f4").tobytes()).hexdigest()
