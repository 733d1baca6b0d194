"""A slow second decoder of the control codec's latent, from ``entropy/SPEC.md`` and the weights file: NumPy integers only."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from decimal import Decimal, localcontext
from functools import cache
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


@cache
def squashes() -> list[int]:
    """squash(-3071..3071)."""
    with localcontext() as context:
        context.prec = 40
        upper = [min(65535, round(65536 / (1 + (Decimal(-x) / 256).exp()))) for x in range(3072)]
    return [65536 - p for p in upper[:0:-1]] + upper


def stretch(i: int) -> int:
    return max(bisect_right(squashes(), 4 * i + 2) - 1, 0) - 3071


class ReferenceMixed:
    """Context mixing, from ``entropy/SPEC.md`` alone."""

    NEIGHBOURS = (((-1, -1), (-1, 1), (0, -2), (-2, 0), (-1, -3), (-1, 3), (-2, -2), (-2, 2)),
                  ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (0, -2), (-2, 0)))  # fmt: skip
    EDGES = (39, 54, 77, 108, 153, 216, 305, 431, 609, 862, 1218)

    def __init__(self, data: bytes, arrays: dict[str, np.ndarray], widths: list[list[int]], offsets: list[int], h: int, w: int):
        self.data, self.at, self.h, self.w = data, 4, h, w
        self.low, self.high, self.code = 0, 2**32 - 1, int.from_bytes(data[:4].ljust(4, b"\0"), "big")
        self.taps, self.channels = arrays["taps"].astype(int).tolist(), len(arrays["taps"])
        self.counts = [[int(c) << 6, int(n)] for c, n in zip(arrays["chances"], arrays["counts"])]
        self.weights, self.sign_weights = (arrays[k].astype(int).tolist() for k in ("weights", "sign_weights"))
        c = self.channels
        places = [4 * n for n in (64 * 12, 64 * 12, 64 * 16, c * 16, 32 * 144, 64 * 12, 96 * 12)]
        places += [32 * 16 * 2, c * 16, c * 50, 16 * 12]
        self.lists = [sum(places[:i]) for i in range(len(places))]
        assert sum(places) == len(self.counts)
        self.expected, self.low_bits, self.chances = [], [], []
        for row, first in zip(widths, offsets):
            sizes = [abs(first + i) for i in range(len(row) - 1)]
            self.expected.append(sum(a * b for a, b in zip(row, sizes)) * 1024 // 2**24)
            self.low_bits.append(max((5 * self.expected[-1] // 8192).bit_length() - 1, 0))
            g = [2**24 - sum(a for a, b in zip(row, sizes) if b >> self.low_bits[-1] < n) for n in range(15)]
            self.chances.append([min(max(b * 2**22 // max(a, 1), 1), 2**22 - 1) for a, b in zip(g, g[1:])])
        self.q = [[[0] * w for _ in range(h)] for _ in range(c)]
        self.e = [[[0] * w for _ in range(h)] for _ in range(c)]  # E of the row of each cell
        self.seen, self.due = ([[0] * w for _ in range(h)] for _ in range(2))

    def follow(self, other: ReferenceMixed) -> None:
        """Go on in the payload where another one is."""
        for name in ("at", "low", "high", "code"):
            setattr(self, name, getattr(other, name))

    def bit(self, p: int = 32768) -> int:
        span = self.high - self.low
        middle = self.low + span // 65536 * p + span % 65536 * p // 65536
        one = self.code <= middle
        if one:
            self.high = middle
        else:
            self.low = middle + 1
        while self.low >> 24 == self.high >> 24:
            byte = self.data[self.at] if self.at < len(self.data) else 0
            self.at += 1
            self.low, self.high, self.code = ((v & 0xFFFFFF) << 8 | b for v, b in
                                              ((self.low, 0), (self.high, 255), (self.code, byte)))  # fmt: skip
        return int(one)

    def raw(self, n: int) -> int:
        value = 0
        for _ in range(n):
            value = 2 * value + self.bit()
        return value

    def mixed(self, chance: int, places: list[int], weights: list[int]) -> int:
        base = stretch(chance // 256)
        cells = [self.counts[p] for p in places]
        for cell in cells:
            if not cell[1]:
                cell[:] = chance, 40
        x = [stretch(cell[0] // 256) - base for cell in cells]
        dot = (65536 * base + sum(a * b for a, b in zip(weights, x))) // 65536
        p = min(max(squashes()[min(max(dot, -3071), 3071) + 3071], 1), 65535)
        bit = self.bit(p)
        error = 65536 * bit - p
        for i, cell in enumerate(cells):
            weights[i] += (x[i] * error + 8192) // 16384
            cell[0] += (2**22 * bit - cell[0]) * (131072 // (2 * cell[1] + 3)) // 65536
            cell[:] = min(cell[0], 2**22 - 1), min(cell[1] + 1, 1023)
        return bit

    def ratio(self, num: int, den: int, least: int) -> int:
        return sum(edge <= 256 * (num + least) // (den + least) for edge in self.EDGES)

    def passes(self, own: range, half: int, rows: np.ndarray) -> np.ndarray:
        """Symbols of the cells of one parity; rows (channels of the pass, h, w) with -1 where nothing is coded."""
        for c in own:
            sums = [0, 0]
            for i in range(self.h):
                for j in range((i + half) % 2, self.w, 2):
                    row = int(rows[c - own.start, i, j])
                    if row >= 0:
                        self.e[c][i][j] = self.expected[row]
                        self.symbol(c, i, j, row, half, sums)
        return np.array(self.q, np.int64)[own.start : own.stop]

    def symbol(self, c: int, i: int, j: int, row: int, half: int, sums: list[int]) -> None:
        def inside(a: int, b: int) -> bool:
            return 0 <= i + a < self.h and 0 <= j + b < self.w

        def sign(a: int, b: int) -> int:
            v = self.q[c][i + a][j + b] if inside(a, b) else 0
            return (v > 0) - (v < 0)

        v = [self.q[c][i + a][j + b] if inside(a, b) else 0 for a, b in self.NEIGHBOURS[half]]
        e = [self.e[c][i + a][j + b] if inside(a, b) else 0 for a, b in self.NEIGHBOURS[half]]
        tilt = sum(a * b for a, b in zip(self.taps[c][half], v))
        g = (2, 2, 2, 2, 1, 1, 1, 1) if half else (1, 1, 1, 1, 0, 0, 0, 0)
        near = self.ratio(1024 * sum(a * min(abs(b), 40) for a, b in zip(g, v)), sum(a * b for a, b in zip(g, e)), 154)
        beside = [(a, b) for a, b in ((-1, 0), (1, 0), (0, -1), (0, 1)) if inside(a, b)]
        num, den = 2 * self.seen[i][j], 2 * self.due[i][j]
        here = self.ratio(num, den, 307)
        num += sum(self.seen[i + a][j + b] for a, b in beside)
        around = self.ratio(num, den + sum(self.due[i + a][j + b] for a, b in beside), 512)
        channel = self.ratio(*sums, 512)
        steep = sum(82 * 2**k <= abs(tilt) for k in range(7))
        lean = 8 + steep if tilt > 0 else 8 - steep
        before = min(abs(self.q[c - 1][i][j]), 2) if c else 0
        first = [12 * row + near, 12 * row + here, 0, 16 * c + row // 4, 12 * (12 * (row // 2) + near) + around,
                 12 * row + channel, 12 * (3 * (row // 2) + before) + around]  # fmt: skip
        low, leaning, u, negative = self.low_bits[row], steep, 0, None

        def negative_now() -> int:
            if half:
                down, across = sign(-1, 0) + sign(1, 0), sign(0, -1) + sign(0, 1)
            else:
                down, across = sign(-1, -1) + sign(-1, 1), sign(0, -2) + sign(-2, 0)
            places = [2 * (16 * (row // 2) + lean) + half, 16 * c + lean, 2 * (5 * (5 * c + down + 2) + across + 2) + half,
                      12 * lean + around]  # fmt: skip
            return self.mixed(2**21, [a + b for a, b in zip(self.lists[7:], places)], self.sign_weights[8 * half + steep])

        while u < 14:
            if u == 1 and not low:
                negative = negative_now()
                leaning = 8 + steep if tilt and (tilt < 0) == negative else 8 - steep
            k = min(u, 3)
            first[2] = 16 * row + leaning
            places = [a + 4 * b + k for a, b in zip(self.lists, first)]
            weights = self.weights[8 * (row // 4) + steep if u == 0 else 127 + 3 * row + k]
            if not self.mixed(self.chances[row][u], places, weights):
                break
            u += 1
        if u == 14:
            o = 0
            while o < 15 and self.bit():
                o += 1
            u = 13 + 2**o + self.raw(o)
        size = u << low | self.raw(low)
        if low and size:
            negative = negative_now()
        self.q[c][i][j] = -size if negative else size
        for total, more in ((0, 1024 * min(size, 40)), (1, self.expected[row])):
            sums[total] += more
        self.seen[i][j] += 1024 * min(size, 40)
        self.due[i][j] += self.expected[row]

    def at_end(self) -> bool:
        sound, end = self.raw(8) == 0xA5, self.data[self.at - 4 :]
        tops = [self.high.to_bytes(4, "big")[:n] for n in range(1, 5)]
        return sound and end == next(t for t in tops if int.from_bytes(t.ljust(4, b"\0"), "big") >= self.low)


class ReferenceLatent:
    """Decodes payloads of tiles to y^ in units of 2^-12."""

    def __init__(self, weights: Path, slices: tuple[int, ...]):
        tensors = load_file(weights)
        self.exact = {k.removeprefix("exact.latent."): v for k, v in tensors.items() if k.startswith("exact.latent.")}
        self.tables = {}
        for which in "zy":
            widths, lengths, offsets = (tensors[f"tables.{which}.{k}"] for k in ("widths", "lengths", "offsets"))
            self.tables[which] = [r.tolist() for r in np.split(widths, np.cumsum(lengths)[:-1])], offsets.tolist()
        self.mixing, self.hyper_mixing = ({k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
                                          for part in ("arrays.mixing.", "arrays.hyper_mixing."))  # fmt: skip
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

    def at_level(self, table: str | np.ndarray, level: int) -> np.ndarray:
        table = (self.exact[table] if isinstance(table, str) else table).astype(np.int64)
        p = level * (len(table) - 1)
        k = min(p // 1000, len(table) - 2)
        r = p - 1000 * k
        return ((table[k] * (1000 - r) + table[k + 1] * r + 500) // 1000)[:, None, None]

    def decode(self, payload: bytes, h: int, w: int, level: int) -> np.ndarray:
        """y^ (M, h, w) int64; AssertionError where the payload is damaged."""
        mixed = coder = None
        channels = len(self.tables["z"][0])
        if self.mixing and not self.hyper_mixing:
            n, at = payload[0] & 127, 1
            while payload[at - 1] > 127:
                n, at = n + ((payload[at] & 127) << 7 * at), at + 1
            payload, rest = payload[at : at + n], payload[at + n :]
            mixed = ReferenceMixed(rest, self.mixing, *self.tables["y"], h, w)
        if self.hyper_mixing:
            rows, offsets = (shift(self.at_level(self.hyper_mixing[k], level), 8) for k in ("rows", "offsets"))
            hyper = ReferenceMixed(payload, self.hyper_mixing, *self.tables["y"], h // 4, w // 4)
            whole = np.broadcast_to(rows, (channels, h // 4, w // 4))
            for half in (0, 1):
                z = hyper.passes(range(channels), half, whole)
            z = z + offsets
            mixed = ReferenceMixed(payload, self.mixing, *self.tables["y"], h, w)
            mixed.follow(hyper)
        else:
            coder = ReferenceDecoder(payload)
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
                if mixed is None:
                    q = np.array(coder.values(rows.reshape(-1).tolist(), *self.tables["y"]), np.int64).reshape(mu.shape)
                else:
                    whole = np.full((size, h, w), -1)
                    whole[:, mask] = rows
                    q = mixed.passes(range(first, first + size), half, whole)[:, mask]
                seen = np.concatenate([t[:, mask], clamp(q, 8) * ONE])[:, None]
                r = clamp(self.conv(f"{name}.lrp_out", relu(self.conv(f"{name}.lrp_in", seen)))[:, 0], ONE)
                y_hat[own, mask] = clamp(mu + shift((q * 2 * ONE + r) * step[own, None], 21))
            first += size
        assert all(c is None or c.at_end() for c in (coder, mixed))
        return y_hat


def symbols_hash(y_hat: np.ndarray) -> str:
    """What golden/index.json holds of a tile."""
    return hashlib.sha256((y_hat / ONE).astype("<f4").tobytes()).hexdigest()
