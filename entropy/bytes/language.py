"""The portable language model: a small recurrent network over byte-pair tokens, computed in integers only.

Every sum is one of integers, so its order, and with it the instruction set and the number of threads, cannot change a
result; the few curves (sigmoid, 2^-x) are tables rounded from exact decimals. Fixed-point formats, "Qn" being units of 2^-n:

    residual stream x       int32 Q16          normalised n            int16 Q(norm_bits)
    gate pre-activations    int32 Q10          forget gate, sigmoid    int32 Q20 (0..2^20)
    recurrent state h       int32 Q16          gated output y          int16 Q(gated_bits of the block)
    relu(up n)^2            int16 Q(squared_bits of the block), at most 16383
    matrices                int8, one int32 multiplier a row and a common shift; head int32 Q24, used as int16 Q12
    log2 of probabilities   int32 Q16          counts                  2^24 for the best token, at least ``FLOOR``

A block (see ``train/language.py`` for the same in floats):

    n = norm(x);  f, c, o = gates [n, n before];  f = sigmoid(f + bias);  h = f h + (1 - f) c;  x += project(o sigmoid(o) h)
    n = norm(x);  x += down(relu(up n)^2)

The output layer goes on learning while it codes (dynamic evaluation of the head, Krause et al. 2018): after each token t,
row_i -= rate (p_i - [i = t]) n for all i for which that is not negligible. Encoder and decoder do the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from decimal import Decimal, localcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from ...container.errors import ModelMismatch, ModelMissing
from .tokens import Tokens

FLOOR = 16
X_BITS, GATE_BITS, SIGMOID_BITS, H_BITS, HEAD_BITS, LOG_BITS = 16, 10, 20, 16, 12, 16
MASTER_BITS = 24
SQUARED_LIMIT = 16383
LOG2_E = 94548  # Q16
ID_BYTES = 8


@cache
def curves() -> tuple[np.ndarray, np.ndarray]:
    """Sigmoid at k/64 - 16 (2049,) Q20 and 2^-(k/256) (257,) Q24, both int32, rounded from 30 decimal digits."""
    with localcontext() as context:
        context.prec = 30
        ratio, power = (Decimal(1) / 64).exp(), Decimal(-16).exp()
        sigmoid = []
        for _ in range(2049):
            sigmoid.append(int((power / (1 + power) * (1 << SIGMOID_BITS)).to_integral_value()))
            power *= ratio
        root = (Decimal(2).ln() / -256).exp()
        half = [int((root**k * (1 << 24)).to_integral_value()) for k in range(257)]
    return np.array(sigmoid, np.int32), np.array(half, np.int32)


# --- network ----------------------------------------------------------------------------------------------------------


@njit(cache=True)
def matvec(w, x, out):
    """out (R,) int32 = w (R, C) int8 or int16 times x (C,) int16, modulo 2^32."""
    rows, columns = w.shape
    for r in range(rows):
        total = np.int32(0)
        for c in range(columns):  # the casts keep the loop at 32 bits: numba would widen to 64
            total = np.int32(total + np.int32(np.int32(w[r, c]) * np.int32(x[c])))
        out[r] = total


@njit(cache=True)
def isqrt(v):
    """floor(sqrt(v)) of 0 <= v < 2^62, exactly."""
    r = np.int64(math.sqrt(np.float64(v)))
    while r * r > v:
        r -= 1
    while (r + 1) * (r + 1) <= v:
        r += 1
    return r


@njit(cache=True)
def normalise(x, out, norm_bits):
    """out int16 Q(norm_bits) = x / sqrt(mean x^2 + 1e-5) of x (D,) int32 Q16."""
    width = len(x)
    total = np.int64(width * 168)  # 1e-5 in Q24
    for j in range(width):
        v = np.int64(x[j]) >> 4
        total += v * v
    inverse = isqrt(np.int64(width) << 40) * (np.int64(1) << (norm_bits + 6)) // isqrt(total)  # Q20 sqrt, Q12 root, Q30 result
    for j in range(width):
        v = ((np.int64(x[j]) >> 4) * inverse + (1 << 25)) >> 26
        out[j] = min(max(v, -32768), 32767)


@njit(cache=True)
def sigmoid(a, curve):
    """Q20 of a Q10 argument."""
    a = min(max(a + 16384, 0), 32767)
    k, rest = a >> 4, a & 15
    return np.int64(curve[k]) + ((np.int64(curve[k + 1]) - np.int64(curve[k])) * rest + 8 >> 4)


@njit(cache=True)
def step(token, net, state, work, sigmoid_curve):
    """One token through the network; its normalised output is left in ``work[0]`` [:D]. See ``Model`` for the tuples."""
    embedding, gates, gates_m, forget_bias, project, project_m, up, up_m, down, down_m, shifts, bits = net
    before, h = state
    n, x, acc, y, squared = work
    blocks, hidden = up_m.shape
    width = len(x)
    norm_bits = bits[0, 2]
    for j in range(width):
        x[j] = np.int32(embedding[token, j]) << (X_BITS - 12)
    for b in range(blocks):
        normalise(x, n[:width], norm_bits)
        n[width:] = before[b]
        before[b] = n[:width]
        matvec(gates[b], n, acc)
        shift = shifts[b, 0]
        half = np.int64(1) << (shift - 1)
        y_shift = GATE_BITS + H_BITS - bits[b, 0]
        y_half = np.int64(1) << (y_shift - 1)
        for j in range(width):
            f = (np.int64(acc[j]) * gates_m[b, j] + half) >> shift
            c = ((np.int64(acc[width + j]) * gates_m[b, width + j] + half) >> shift) << (H_BITS - GATE_BITS)
            o = (np.int64(acc[2 * width + j]) * gates_m[b, 2 * width + j] + half) >> shift
            c = min(max(c, -(1 << 28)), 1 << 28)
            o = min(max(o, -(1 << 20)), 1 << 20)
            forget = sigmoid(f + forget_bias[b, j], sigmoid_curve)
            v = c + (((np.int64(h[b, j]) - c) * forget + (1 << (SIGMOID_BITS - 1))) >> SIGMOID_BITS)
            h[b, j] = v
            gate = (o * sigmoid(o, sigmoid_curve) + (1 << (SIGMOID_BITS - 1))) >> SIGMOID_BITS
            y[j] = min(max((gate * v + y_half) >> y_shift, -32768), 32767)
        matvec(project[b], y, acc)
        shift = shifts[b, 1]
        half = np.int64(1) << (shift - 1)
        for j in range(width):
            v = x[j] + ((np.int64(acc[j]) * project_m[b, j] + half) >> shift)
            x[j] = min(max(v, -(1 << 30)), 1 << 30)
        normalise(x, n[:width], norm_bits)
        matvec(up[b], n[:width], acc)
        shift = shifts[b, 2]
        half = np.int64(1) << (shift - 1)
        u_shift = 2 * GATE_BITS - bits[b, 1]
        u_half = np.int64(1) << (u_shift - 1)
        for j in range(hidden):
            u = (np.int64(acc[j]) * up_m[b, j] + half) >> shift
            u = min(max(u, 0), 1 << 20)
            squared[j] = min((u * u + u_half) >> u_shift, SQUARED_LIMIT)
        matvec(down[b], squared, acc)
        shift = shifts[b, 3]
        half = np.int64(1) << (shift - 1)
        for j in range(width):
            v = x[j] + ((np.int64(acc[j]) * down_m[b, j] + half) >> shift)
            x[j] = min(max(v, -(1 << 30)), 1 << 30)
    normalise(x, n[:width], norm_bits)


@njit(cache=True)
def predict(n, head, bias, norm_bits, logits, cumulative, half_curve):
    """Counts of all tokens, at least FLOOR, from the output n (D,): cumulative (V+1,) int64, cumulative[0] = 0."""
    matvec(head, n, logits)
    size = len(logits)
    best = np.int32(-(1 << 31) + 1)
    to_log = HEAD_BITS + norm_bits
    for i in range(size):
        v = ((np.int64(logits[i]) << (MASTER_BITS - to_log)) + bias[i]) * LOG2_E >> (MASTER_BITS + 16 - LOG_BITS)
        v = min(max(v, -(1 << 30)), 1 << 30)
        logits[i] = v
        best = max(best, logits[i])
    total = np.int64(0)
    for i in range(size):
        d = np.int64(best) - logits[i]
        k, rest = (d >> 8) & 255, d & 255
        value = np.int64(half_curve[k]) - ((np.int64(half_curve[k]) - np.int64(half_curve[k + 1])) * rest >> 8)
        total += (value >> min(d >> 16, 30)) + FLOOR
        cumulative[i + 1] = total


@njit(cache=True)
def adapt(token, n, cumulative, head, bias, master, rate, bias_rate, norm_bits):
    """The head after ``token``: rates in 1/65536. Rows of other tokens below 1/1000 stay as they are."""
    size, width = master.shape
    total = cumulative[size]
    least = total // 1000
    down = np.int32(norm_bits + 22 - MASTER_BITS)
    half = np.int32(1 << (down - 1))
    for i in range(size):
        count = cumulative[i + 1] - cumulative[i]
        if count > least or i == token:
            g = (count << 16) // total
            if i == token:
                g -= 65536
            bias[i] -= np.int32((g * bias_rate) >> (32 - MASTER_BITS))
            scaled = np.int32((g * rate) >> 10)  # Q22; with rates below 1/32 the product below stays within 32 bits
            row, used = master[i], head[i]
            for j in range(width):
                v = np.int32(row[j] - (np.int32(np.int32(scaled * np.int32(n[j])) + half) >> down))
                row[j] = v
                used[j] = min(max(np.int32(v + (1 << 11)) >> 12, -32767), 32767)


# --- model ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sizes and fixed-point formats of a model: with its tensors they are what the model id names."""

    vocabulary: int
    width: int
    blocks: int
    hidden: int
    norm_bits: int
    gated_bits: tuple[int, ...]
    squared_bits: tuple[int, ...]
    shifts: tuple[tuple[int, int, int, int], ...]
    """Of the row multipliers of gates, project, up, down in each block."""

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every tensor but the tokens'."""
        v, d, n, e = self.vocabulary, self.width, self.blocks, self.hidden
        return {
            "embedding": ("int16", (v, d)),  # Q12
            "gates": ("int8", (n, 3 * d, 2 * d)), "gates.multipliers": ("int32", (n, 3 * d)),
            "forget_bias": ("int32", (n, d)),  # Q10
            "project": ("int8", (n, d, d)), "project.multipliers": ("int32", (n, d)),
            "up": ("int8", (n, e, d)), "up.multipliers": ("int32", (n, e)),
            "down": ("int8", (n, d, e)), "down.multipliers": ("int32", (n, d)),
            "head": ("int16", (v, d)),  # Q12
            "bias": ("int32", (v,)),  # Q24, nats
        }  # fmt: skip


def identity(name: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    """sha256 of a codec's name, its config and its tensors, in the manner of ``codecs/weights.py``."""
    sha = hashlib.sha256(json.dumps([name, config], sort_keys=True, separators=(",", ":")).encode())
    for key in sorted(tensors):
        array = tensors[key]
        sha.update(f"\n{key} {array.dtype.str.lstrip('<>|=')} {list(array.shape)}\n".encode())
        sha.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha.digest()


class Model:
    """Tokens and frozen weights. ``start`` gives what one coder of one block needs; the model itself never changes."""

    def __init__(self, config: Config, tokens: Tokens, tensors: dict[str, np.ndarray], name: str = "nacrith"):
        """ValueError where tensors and config do not fit."""
        for key, (dtype, shape) in config.tensors().items():
            if key not in tensors or tensors[key].dtype != dtype or tensors[key].shape != shape:
                raise ValueError(f"{key} is not {dtype} {list(shape)}")
        if len(tokens) != config.vocabulary:
            raise ValueError("tokens and vocabulary differ")
        levels = (config.gated_bits, config.squared_bits, config.shifts)
        if any(len(part) != config.blocks for part in levels) or not 4 <= config.norm_bits <= 14:
            raise ValueError("formats of the blocks do not fit")
        self.config, self.tokens, self.tensors, self.name = config, tokens, tensors, name
        self.net = (
            *(tensors[k] for k in ("embedding", "gates", "gates.multipliers", "forget_bias", "project", "project.multipliers",
                                   "up", "up.multipliers", "down", "down.multipliers")),
            np.array(config.shifts, np.int64).reshape(-1, 4),
            np.array([[g, s, config.norm_bits] for g, s in zip(config.gated_bits, config.squared_bits)], np.int64),
        )  # fmt: skip
        self.model_id = identity(name, asdict(config), self.stored())[:ID_BYTES]

    def stored(self) -> dict[str, np.ndarray]:
        """All tensors of a weights file."""
        strings = self.tokens.strings
        return self.tensors | {
            "tokens.bytes": np.frombuffer(b"".join(strings), np.uint8),
            "tokens.lengths": np.array([len(s) for s in strings], np.uint8),
            "tokens.merges": self.tokens.to_array(),
        }

    def save(self, path: Path, preset: str) -> None:
        """Write the weights file."""
        from safetensors.numpy import save_file

        config = json.dumps(asdict(self.config))
        metadata = {"codec": self.name, "preset": preset, "model_id": self.model_id.hex(), "config": config}
        save_file({k: np.ascontiguousarray(v) for k, v in self.stored().items()}, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read a weights file. ModelMissing when it is not there, ModelMismatch when it is none of this kind or damaged."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ModelMissing(f"{path}: no such weights")
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            values = json.loads(metadata["config"])
            values |= {k: tuple(values[k]) for k in ("gated_bits", "squared_bits")}
            values["shifts"] = tuple(tuple(s) for s in values["shifts"])
            joined, strings, at = tensors.pop("tokens.bytes").tobytes(), [], 0
            for length in tensors.pop("tokens.lengths").tolist():
                strings.append(joined[at : at + length])
                at += length
            tokens = Tokens.from_array(strings, tensors.pop("tokens.merges"))
            model = cls(Config(**values), tokens, tensors, metadata["codec"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelMismatch(f"{path}: not the weights of a language model ({reason})") from error
        if metadata.get("model_id") != model.model_id.hex():
            raise ModelMismatch(f"{path}: the weights are damaged, they are not those of {metadata.get('model_id')}")
        return model

    def state(self) -> tuple[np.ndarray, np.ndarray]:
        """Recurrent state at the beginning of a text: normalised inputs before, and h."""
        c = self.config
        return np.zeros((c.blocks, c.width), np.int16), np.zeros((c.blocks, c.width), np.int32)

    def work(self) -> tuple[np.ndarray, ...]:
        """Scratch arrays of ``step``."""
        c = self.config
        return (
            np.zeros(2 * c.width, np.int16), np.zeros(c.width, np.int32), np.zeros(max(3 * c.width, c.hidden), np.int32),
            np.zeros(c.width, np.int16), np.zeros(c.hidden, np.int16),
        )  # fmt: skip

    def output_layer(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A fresh copy of the output layer that learns on: head int16 Q12, bias int32 Q24, master rows int32 Q24."""
        head = self.tensors["head"].copy()
        return head, self.tensors["bias"].copy(), head.astype(np.int32) << (MASTER_BITS - HEAD_BITS)


class Predictor:
    """Token by token, for those that code with counts of whole tokens (``codecs/nacrith.py``) and for tests.

    ``counts()`` (V,) int64 for the next token; ``update(token)`` goes on. Exactly what ``text`` uses inside.
    """

    def __init__(self, model: Model, rate: int = 66, bias_rate: int = 1300):
        """Rates of the output layer's learning in 1/65536, 0 for none."""
        self.model, self.rate, self.bias_rate = model, rate, bias_rate
        self._state, self._work = model.state(), model.work()
        self._head, self._bias, self._master = model.output_layer()
        size = model.config.vocabulary
        self._logits, self.cumulative = np.zeros(size, np.int32), np.zeros(size + 1, np.int64)
        self._started = False

    def counts(self) -> np.ndarray:
        """Integer weights of all tokens for the next place; before the first token, those of a text's beginning."""
        if not self._started:
            self.advance(self.model.tokens.ids[b"\n"])
        return np.diff(self.cumulative)

    def advance(self, token: int) -> None:
        """Run the network over ``token`` and predict, without learning."""
        sigmoid_curve, half_curve = curves()
        step(token, self.model.net, self._state, self._work, sigmoid_curve)
        n, norm_bits = self._work[0][: self.model.config.width], self.model.config.norm_bits
        predict(n, self._head, self._bias, norm_bits, self._logits, self.cumulative, half_curve)
        self._started = True

    def update(self, token: int) -> None:
        """Learn that ``token`` came, and predict what follows. ``counts`` must have been asked for once before."""
        if not self._started:
            self.counts()
        if self.rate:
            n, norm_bits = self._work[0][: self.model.config.width], self.model.config.norm_bits
            adapt(token, n, self.cumulative, self._head, self._bias, self._master, self.rate, self.bias_rate, norm_bits)
        self.advance(token)
