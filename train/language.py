"""Training of the byte codec's language model: data, tokens, network, loop, quantised weights.

    codec train nacrith:light --recipe train/recipes/nacrith-light.toml --data text/train --out runs/language
    codec freeze runs/language/last.pt --codec nacrith:light -o weights/

``--data`` is a folder of ``*.txt`` or ``*.txt.xz``. The text is brought into the form that the coder gives the model (see
``entropy/bytes/transform.py``), a vocabulary is learnt from it, and each file becomes one array of tokens; all is kept in OUT.
A row of the batch reads on for some batches with its recurrent state (truncated back-propagation through time).
The recurrence runs in numba, forward and backward; everything else is plain torch, bfloat16 inside of the matrix products.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import random
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor, nn

from ..entropy.bytes.language import GATE_BITS, HEAD_BITS, MASTER_BITS, SQUARED_LIMIT, X_BITS, Config, Model
from ..entropy.bytes.tokens import PRE_TOKEN, Tokens, learn_merges
from ..entropy.bytes.transform import flag_capitals
from .files import read_recipe, save
from .freeze import write_card
from .optim import Muon

# --- data -------------------------------------------------------------------------------------------------------------

_QUOTES = {
    "plain": {"“": '"', "”": '"', "‘": "'", "’": "'"},
    "typewriter": {"“": "``", "”": "''", "‘": "`", "’": "'"},
    "single": {"“": "`", "”": "'", "‘": '"', "’": "'"},
}
_DASHES = {"—": "--", "‐": "-", "‑": "-", "–": "-", "\xad": ""}
PIECE = 100_000
VERSE = 0.08


def typewrite(text: str, rng: random.Random) -> str:
    """A piece of a novel as old plain text files have it: ASCII quotes in a style of their own, two hyphens for a dash.

    Paragraphs, one a line in the source, get an empty line between them.
    """
    if rng.random() < VERSE:
        return versify(text, rng)
    style = rng.choices(["plain", "typewriter", "single", "as is"], [5, 1, 3, 1])[0]
    if style != "as is":
        straight = text.count('"') > text.count("“")
        if straight and style == "single":
            text = re.sub(r'(^|[\s—-])"', r"\1“", text, flags=re.M).replace('"', "”")
        text = text.translate(str.maketrans(_QUOTES[style] | _DASHES))
    if rng.random() < 0.15:
        text = re.sub(r"([.!?]['\"]?) ", r"\1  ", text)
    return text.replace("\n", "\n\n") if rng.random() < 0.9 else text


def versify(text: str, rng: random.Random) -> str:
    """A piece of a novel broken into lines as verse and plays are, so that a line end does not always end a thought."""
    width, prefix = rng.randint(28, 56), rng.choice(["", "", "", "\t", "  ", "    "])
    capitals, apart = rng.random() < 0.7, rng.random() < 0.5
    paragraphs = []
    for paragraph in text.translate(str.maketrans(_QUOTES["plain"] | _DASHES)).split("\n"):
        lines, line = [], ""
        for word in paragraph.split():
            if line and len(line) + len(word) + 1 > width + rng.randint(-8, 8):
                lines.append(line)
                line = word[:1].upper() + word[1:] if capitals else word
            else:
                line = f"{line} {word}" if line else word
        paragraphs.append(("\n" + prefix).join([*lines, line]))
    return ("\n\n" if apart else "\n").join(paragraphs)


def read_texts(folder: Path, most: int = 0) -> dict[str, bytes]:
    """name -> content (its first ``most`` bytes) of all ``*.txt`` and ``*.txt.xz`` of a folder. FileNotFoundError: none."""
    texts = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith((".txt", ".txt.xz")):
            with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
                texts[path.name.partition(".txt")[0]] = file.read(most or -1)
    if not texts:
        raise FileNotFoundError(f"{folder}: no *.txt and no *.txt.xz")
    return texts


def as_the_model_sees_it(name: str, data: bytes, seed: int = 0) -> bytes:
    """Training text after augmentation (files whose name says novels) and the transforms of the coder."""
    if "novel" in name:
        rng = random.Random(seed)
        text = data.decode("utf-8", "surrogateescape")
        pieces, start = [], 0
        while start < len(text):
            end = text.find("\n", start + PIECE) + 1 or len(text)
            pieces.append(typewrite(text[start:end], rng))
            start = end
        data = "".join(pieces).encode("utf-8", "surrogateescape")
    return flag_capitals(data)


def prepare(folder: Path, out: Path, recipe: Recipe) -> tuple[Tokens, dict[str, np.ndarray]]:
    """Vocabulary and token arrays of a data folder; made once, then kept in ``out``."""
    cache = out / "tokens.npz"
    if not cache.exists():
        texts = read_texts(folder, recipe.bytes_per_file)
        texts = {name: as_the_model_sees_it(name, data, recipe.seed) for name, data in texts.items()}
        counts: Counter[bytes] = Counter()
        for name, data in texts.items():
            weight = recipe.mix.get(name, 0.0)
            sample = [data[i : i + 20_000] for i in range(0, len(data), max(20_000, len(data) * 20_000 // recipe.token_sample))]
            own = Counter(piece for part in sample for piece in PRE_TOKEN.findall(part))
            total = sum(map(len, sample))
            for piece, n in own.items():
                counts[piece] += round(n * weight * 1e7 / total)
        counts = Counter({piece: n for piece, n in counts.items() if n > 2})
        tokens = Tokens(learn_merges(counts, recipe.vocabulary))
        arrays = {name: tokens.encode(data) for name, data in texts.items()}
        out.mkdir(parents=True, exist_ok=True)
        strings = np.array([s.hex() for s in tokens.strings])
        np.savez(cache, strings=strings, merges=tokens.to_array(), **{f"text.{k}": v for k, v in arrays.items()})
        for name, ids in arrays.items():
            print(f"{name}: {len(ids)} tokens, {len(texts[name]) / len(ids):.3f} bytes each", flush=True)
    with np.load(cache) as kept:
        tokens = Tokens.from_array([bytes.fromhex(s) for s in kept["strings"].tolist()], kept["merges"])
        return tokens, {k.removeprefix("text."): kept[k] for k in kept.files if k.startswith("text.")}


def held_out(arrays: dict[str, np.ndarray], recipe: Recipe) -> dict[str, np.ndarray]:
    """The end of each file, on which decisions are made."""
    return {name: ids[max(len(ids) - recipe.held_out, len(ids) * 9 // 10) :] for name, ids in arrays.items()}


class Reader:
    """Batches (B, T+1) of tokens from files mixed by weight.

    A row reads on where it stopped for ``stay`` batches, then it goes to a random place. Rows that stayed with their novel
    would have the network learn that novel, not the language: its loss there falls, and elsewhere it does not.
    """

    def __init__(self, arrays: dict[str, np.ndarray], mix: dict[str, float], batch: int, stay: int, seed: int):
        self.rng = np.random.default_rng(seed)
        names = [n for n in arrays if mix.get(n, 0) > 0]
        share = np.array([mix[n] for n in names], float)
        ends = np.round(np.cumsum(share / share.sum()) * batch).astype(int)
        self.files = [arrays[names[int(np.searchsorted(ends, b, side="right"))]] for b in range(batch)]
        self.places = [0] * batch
        self.stay, self.count = stay, 0

    def next(self, length: int) -> tuple[Tensor, Tensor]:
        """Tokens, and which rows (B, 1) go on (1) or begin anew (0)."""
        batch = np.empty((len(self.files), length + 1), np.int64)
        goes_on = np.ones((len(self.files), 1), np.float32)
        for b, data in enumerate(self.files):
            if self.count == 0 or (self.count + b) % self.stay == 0:
                self.places[b] = int(self.rng.integers(len(data)))
                goes_on[b] = 0
            start = self.places[b]
            batch[b] = data[np.arange(start, start + length + 1) % len(data)]
            self.places[b] = start + length
        self.count += 1
        return torch.from_numpy(batch), torch.from_numpy(goes_on)


# --- network ----------------------------------------------------------------------------------------------------------


@njit(cache=True, fastmath=True)
def _scan(f, c, h0, h):
    batch, steps, width = f.shape
    for b in range(batch):
        for t in range(steps):
            for j in range(width):
                before = h0[b, j] if t == 0 else h[b, t - 1, j]
                h[b, t, j] = c[b, t, j] + f[b, t, j] * (before - c[b, t, j])


@njit(cache=True, fastmath=True)
def _scan_backward(f, c, h0, h, gh, gf, gc):
    batch, steps, width = f.shape
    carry = np.empty(width, np.float32)
    for b in range(batch):
        carry[:] = 0
        for t in range(steps - 1, -1, -1):
            for j in range(width):
                g = gh[b, t, j] + carry[j]
                before = h0[b, j] if t == 0 else h[b, t - 1, j]
                gf[b, t, j] = g * (before - c[b, t, j])
                gc[b, t, j] = g * (1 - f[b, t, j])
                carry[j] = g * f[b, t, j]


class Scan(torch.autograd.Function):
    """h_t = f_t h_(t-1) + (1 - f_t) c_t for f, c (B, T, D) and h_0 (B, D): h (B, T, D). No gradient reaches h_0."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, c: Tensor, h0: Tensor) -> Tensor:
        f, c, h0 = f.contiguous(), c.contiguous(), h0.contiguous()
        h = torch.empty_like(f)
        _scan(f.numpy(), c.numpy(), h0.numpy(), h.numpy())
        ctx.save_for_backward(f, c, h0, h)
        return h

    @staticmethod
    def backward(ctx: Any, gh: Tensor) -> tuple[Tensor, Tensor, None]:
        f, c, h0, h = ctx.saved_tensors
        gf, gc = torch.empty_like(f), torch.empty_like(c)
        _scan_backward(f.numpy(), c.numpy(), h0.numpy(), h.numpy(), gh.contiguous().numpy(), gf.numpy(), gc.numpy())
        return gf, gc, None


class Linear(nn.Linear):
    """Without bias; ``levels`` > 0 rounds each row to so many steps per sign as the shipped weights will be."""

    levels = 0

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.levels:
            step = weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-8) / self.levels
            weight = weight + ((weight / step).round() * step - weight).detach()
        return F.linear(x, weight)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean x^2); no gain, it would merge with the matrix that follows."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


class Block(nn.Module):
    """Token shift, gated recurrence, projection; then a squared-ReLU channel mix. Both are added to x (B, T, D)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gates = Linear(2 * width, 3 * width)
        self.forget_bias = nn.Parameter(torch.linspace(-1, 5, width))
        self.project = Linear(width, width)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        n = rms_norm(x)
        shifted = torch.cat([state[0][:, None], n[:, :-1]], 1)
        f, c, o = self.gates(torch.cat([n, shifted], -1)).chunk(3, -1)
        h = Scan.apply(torch.sigmoid(f.float() + self.forget_bias), c.float(), state[1])
        x = x + self.project(F.silu(o) * h.to(o.dtype))
        x = x + self.down(F.relu(self.up(rms_norm(x))).square())
        return x, (n[:, -1].detach(), h[:, -1].detach())


@dataclass(frozen=True)
class Shape:
    """Widths of the network."""

    vocabulary: int
    width: int
    blocks: int
    hidden: int


class LanguageModel(nn.Module):
    """The float model: tokens (B, T) -> logits (B, T, V)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        nn.init.normal_(self.embedding.weight, std=1.0)
        self.blocks = nn.ModuleList(Block(shape.width, shape.hidden) for _ in range(shape.blocks))
        self.head = Linear(shape.width, shape.vocabulary)
        self.bias = nn.Parameter(torch.zeros(shape.vocabulary))
        nn.init.zeros_(self.head.weight)

    def start(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        zeros = torch.zeros(batch, self.shape.width)
        return [(zeros, zeros) for _ in self.blocks]

    def forward(self, ids: Tensor, state: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x = self.embedding(ids)
        after = []
        for block, s in zip(self.blocks, state):
            x, s = block(x, s)
            after.append(s)
        return self.head(rms_norm(x)) + self.bias, after


# --- loop -------------------------------------------------------------------------------------------------------------


@dataclass
class Recipe:
    """Everything that decides a run, besides the data. The learning rate falls with the fraction of the run that is done."""

    vocabulary: int = 2048
    width: int = 256
    blocks: int = 2
    hidden: int = 768
    batch: int = 32
    length: int = 256
    stay: int = 4
    lr: float = 4e-3
    embedding_lr: float = 2e-2
    muon_lr: float = 8e-3
    optimiser: str = "muon"
    warmup_steps: int = 60
    decay_from: float = 0.2
    clip: float = 1.0
    quantised_from: float = 0.92
    levels: int = 127
    steps: int = 10**9
    minutes: float = 1e9
    seed: int = 0
    token_sample: int = 8_000_000
    bytes_per_file: int = 0  # take only so many from the beginning of each, 0: all
    held_out: int = 312_500  # tokens at the end of each file that are never trained on, at most a tenth of it
    mix: dict[str, float] = field(default_factory=lambda: {"novels_en": 0.62, "wikipedia_en": 0.3, "code_and_markup": 0.08})

    @classmethod
    def read(cls, path: Path | None, **overrides: Any) -> Recipe:
        """Recipe from a TOML file; ValueError for an unknown key."""
        return read_recipe(cls, path, overrides)

    def shape(self, vocabulary: int) -> Shape:
        return Shape(vocabulary, self.width, self.blocks, self.hidden)

    def rate(self, step: int, done: float) -> float:
        warm = min(1.0, (step + 1) / self.warmup_steps)
        t = max(0.0, (done - self.decay_from) / (1 - self.decay_from))
        return warm * (0.5 + 0.5 * math.cos(math.pi * min(1.0, t))) + 2e-3


def optimisers(model: LanguageModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside of the blocks; Adam for embedding, head and biases (or for everything)."""
    inner = [p for p in model.blocks.parameters() if p.ndim == 2] if recipe.optimiser == "muon" else []
    apart = set(map(id, [*inner, model.embedding.weight]))
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups = [{"params": rest}, {"params": [model.embedding.weight], "lr": recipe.embedding_lr}]
    result: list[torch.optim.Optimizer] = [torch.optim.Adam(groups, lr=recipe.lr, betas=(0.9, 0.98), eps=1e-9)]
    if inner:
        result.append(Muon(inner, lr=recipe.muon_lr))
    for optimiser in result:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return result


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


@torch.no_grad()
def validate(model: LanguageModel, held: dict[str, np.ndarray], tokens: Tokens, count: int = 16_384) -> dict[str, float]:
    """Bits per transformed byte of the first ``count`` held-out tokens of each file, read as 16 streams."""
    model.eval()
    lengths = torch.tensor([len(s) for s in tokens.strings])
    figures = {}
    for name, ids in held.items():
        rows = torch.from_numpy(ids[: min(count, len(ids)) // 16 * 16].astype(np.int64).reshape(16, -1))
        state, nats, size = model.start(16), 0.0, 0
        for t in range(0, rows.shape[1] - 1, 256):
            part = rows[:, t : t + 257]
            with autocast():
                logits, state = model(part[:, :-1], state)
            nats += float(F.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
            size += int(lengths[part[:, 1:]].sum())
        figures[name] = nats / math.log(2) / size
    model.train()
    return figures


def train(data: Path, recipe: Recipe, out: Path, *, resume: bool = False, checkpoint_minutes: float = 4,
          log_every: int = 50) -> None:  # fmt: skip
    """Run a recipe. Writes ``last.pt`` (everything) and ``log.jsonl``."""
    tokens, arrays = prepare(data, out, recipe)
    torch.manual_seed(recipe.seed)
    model = LanguageModel(recipe.shape(len(tokens)))
    opts = optimisers(model, recipe)
    step, spent, seen = 0, 0.0, 0
    if resume and (out / "last.pt").exists():
        kept = torch.load(out / "last.pt", weights_only=True)
        model.load_state_dict(kept["model"])
        for opt, saved in zip(opts, kept["optimisers"]):
            peaks = [group["peak"] for group in opt.param_groups]
            opt.load_state_dict(saved)
            for group, peak in zip(opt.param_groups, peaks):  # a recipe may have changed since
                group["peak"] = peak
        step, spent, seen = kept["step"], kept["seconds"], kept["seen"]
    held = held_out(arrays, recipe)
    learnt = {name: ids[: len(ids) - len(held[name])] for name, ids in arrays.items()}
    reader = Reader(learnt, recipe.mix, recipe.batch, recipe.stay, recipe.seed + step)
    state = model.start(recipe.batch)
    started, window, last_saved = time.monotonic() - spent, [], time.monotonic()
    window_start, log = time.monotonic(), (out / "log.jsonl").open("a")

    def write(row: dict[str, Any]) -> None:
        log.write(json.dumps(row) + "\n")
        log.flush()
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    def checkpoint() -> None:
        seconds = time.monotonic() - started
        save(out / "last.pt", {"model": model.state_dict(), "optimisers": [o.state_dict() for o in opts], "step": step,
                               "seen": seen, "seconds": seconds, "recipe": asdict(recipe),
                               "shape": asdict(model.shape)})  # fmt: skip
        figures = {f"held_{k}": v for k, v in validate(model, held, tokens).items()}
        write({"step": step, "minutes": seconds / 60, "tokens": seen, **figures})

    while (done := max(step / recipe.steps, (time.monotonic() - started) / 60 / recipe.minutes)) < 1:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * recipe.rate(step, done)
        for module in model.modules():
            if isinstance(module, Linear):
                module.levels = recipe.levels if done >= recipe.quantised_from else 0
        ids, goes_on = reader.next(recipe.length)
        state = [(n * goes_on, h * goes_on) for n, h in state]
        with autocast():
            logits, state = model(ids[:, :-1], state)
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        if torch.isfinite(norm):
            with autocast():
                for opt in opts:
                    opt.step()
        else:
            print(f"step {step}: gradient is not finite, step skipped", flush=True)
        step += 1
        seen += recipe.batch * recipe.length
        window.append(float(loss.detach()))
        if step % log_every == 0:
            now = time.monotonic()
            speed = len(window) * recipe.batch * recipe.length / (now - window_start)
            write({"step": step, "minutes": (now - started) / 60, "loss": sum(window) / len(window), "norm": float(norm),
                   "rate": recipe.rate(step, done), "tokens_per_s": speed})  # fmt: skip
            window, window_start = [], now
        if time.monotonic() - last_saved > checkpoint_minutes * 60:
            checkpoint()
            last_saved = window_start = time.monotonic()
            window = []
    checkpoint()
    log.close()


# --- quantised weights ------------------------------------------------------------------------------------------------


def _rows(weight: Tensor, exponent: int, levels: int) -> tuple[np.ndarray, np.ndarray, int]:
    """int8 rows, int32 multipliers m and a shift: weight * 2^exponent = int8 * m * 2^-shift, nearly."""
    step = weight.abs().amax(-1).clamp_min(1e-8).double() / levels
    rows = (weight.double() / step[..., None]).round().to(torch.int8).numpy()
    scale = step * 2.0**exponent
    shift = 30 - math.ceil(math.log2(float(scale.max())))
    return rows, (scale * 2.0**shift).round().to(torch.int32).numpy(), shift


@torch.no_grad()
def quantise(model: LanguageModel, tokens: Tokens, sample: np.ndarray, levels: int = 127) -> Model:
    """Integer model of a float one. ``sample``: tokens (n,) whose activations decide on the formats, n >= 16.

    ValueError where a sum might leave 32 bits.
    """
    shape = model.shape
    norm_bits = 15 - math.ceil(math.log2(shape.width**0.5))
    peaks = _peaks(model, sample)
    parts: dict[str, list[np.ndarray]] = {}
    gated_bits, squared_bits, shifts = [], [], []
    for block, (gated, squared) in zip(model.blocks, peaks):
        gated_bits.append(min(14, math.floor(math.log2(32767 / (2 * gated)))))
        squared_bits.append(min(14, math.floor(math.log2(SQUARED_LIMIT / (2 * squared)))))
        matrices = {
            "gates": (block.gates, GATE_BITS - norm_bits, 32768 * 2**0.5),
            "project": (block.project, X_BITS - gated_bits[-1], None),
            "up": (block.up, GATE_BITS - norm_bits, 32768),
            "down": (block.down, X_BITS - squared_bits[-1], None),
        }  # fmt: skip
        row_shifts = []
        for name, (layer, exponent, length) in matrices.items():
            rows, multipliers, shift = _rows(layer.weight, exponent, levels)
            wide = rows.astype(np.int64)
            if length is not None:  # inputs of a known Euclidean length
                most = float(np.sqrt((wide**2).sum(1).max()) * length)
            else:
                most = float(np.abs(wide).sum(1).max()) * (32767 if name == "project" else SQUARED_LIMIT)
            if most >= 2**31 or not 1 <= shift <= 60:
                raise ValueError(f"{name}: sums may leave 32 bits")
            parts.setdefault(name, []).append(rows)
            parts.setdefault(f"{name}.multipliers", []).append(multipliers)
            row_shifts.append(shift)
        shifts.append(tuple(row_shifts))
        parts.setdefault("forget_bias", []).append((block.forget_bias * 2**GATE_BITS).round().to(torch.int32).numpy())
    tensors = {name: np.stack(arrays) for name, arrays in parts.items()}
    fixed = model.embedding.weight * 2**12, model.head.weight * 2**HEAD_BITS
    tensors["embedding"], tensors["head"] = (t.round().clamp(-32767, 32767).to(torch.int16).numpy() for t in fixed)
    tensors["bias"] = (model.bias.double() * 2**MASTER_BITS).round().to(torch.int32).numpy()
    config = Config(**asdict(shape), norm_bits=norm_bits, gated_bits=tuple(gated_bits), squared_bits=tuple(squared_bits),
                    shifts=tuple(shifts))  # fmt: skip
    return Model(config, tokens, tensors)


def _peaks(model: LanguageModel, sample: np.ndarray) -> list[tuple[float, float]]:
    """Largest but for one in 10^5 of |gated output| and squared ReLU in each block."""
    found: list[list[Tensor]] = [[] for _ in range(2 * len(model.blocks))]
    hooks = []
    for b, block in enumerate(model.blocks):
        for k, layer in enumerate((block.project, block.down)):
            hooks.append(layer.register_forward_pre_hook(lambda _, x, at=2 * b + k: found[at].append(x[0].abs().flatten())))
    rows = torch.from_numpy(sample[: len(sample) // 16 * 16].astype(np.int64).reshape(16, -1))
    model(rows, model.start(16))
    for hook in hooks:
        hook.remove()
    values = [float(torch.cat(v).kthvalue(math.ceil(sum(map(len, v)) * (1 - 1e-5))).values) for v in found]
    return list(zip(values[::2], values[1::2]))


def freeze(checkpoint: Path, preset: str, folder: Path, note: str = "") -> dict[str, Any]:
    """Quantise ``last.pt`` of a run (its ``tokens.npz`` beside it) into a weights file and its card; the card."""
    kept = torch.load(checkpoint, map_location="cpu", weights_only=True)
    with np.load(checkpoint.with_name("tokens.npz")) as arrays:
        tokens = Tokens.from_array([bytes.fromhex(s) for s in arrays["strings"].tolist()], arrays["merges"])
        texts = {k.removeprefix("text."): arrays[k] for k in arrays.files if k.startswith("text.")}
    shape, recipe = Shape(**kept["shape"]), Recipe(**kept["recipe"])
    model = LanguageModel(shape)
    model.load_state_dict(kept["model"])
    held = held_out(texts, recipe)
    model.eval()
    frozen = quantise(model, tokens, np.concatenate([ids[:8192] for ids in held.values()]), recipe.levels)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"nacrith-{preset}.safetensors"
    partial = path.with_suffix(".partial")
    frozen.save(partial, preset)
    os.chmod(partial, 0o644)  # safetensors writes private files
    os.replace(partial, path)
    d, e = shape.width, shape.hidden
    training = {"steps": kept["step"], "tokens": kept["seen"], "hours": round(kept["seconds"] / 3600, 3),
                "tokens_per_second": round(kept["seen"] / max(kept["seconds"], 1e-9)), "recipe": kept["recipe"]}  # fmt: skip
    if note:
        training["note"] = note
    card = {
        "codec": "nacrith", "preset": preset, "kind": "bytes", "model_id": frozen.model_id.hex(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "kmac_per_token": round((shape.blocks * (7 * d * d + 2 * d * e) + shape.vocabulary * d) / 1000, 1),
        "bytes": path.stat().st_size, "training": training,
        "measured": {"held_out_bits_per_byte": {k: round(v, 4) for k, v in validate(model, held, tokens, 65_536).items()}},
    }  # fmt: skip
    write_card(path.with_suffix(".json"), card)
    return card


def main(args: argparse.Namespace) -> int:
    """``codec train nacrith:...``; the options are those of ``train/loop.py``."""
    torch.set_num_threads(args.threads or 1)
    recipe = Recipe.read(args.recipe, steps=args.steps, minutes=args.minutes, seed=args.seed, optimiser=args.optimiser,
                         lr=args.lr, muon_lr=args.muon_lr)  # fmt: skip
    train(args.data, recipe, args.out, resume=args.resume, checkpoint_minutes=args.checkpoint_minutes)
    return 0
