"""VAEformer: fields of the atmosphere through a variational transformer.

    x --patches, blocks--> (mean, log variance); y = mean --FieldHyperprior--> y^ --blocks, patches--> x^

``paper`` is the published network: 268 channels of one hour at once on 721 x 1440, patches of 11 x 10 ten apart, blocks with
windows of 24 x 24, 12 x 48, 48 x 12 tokens and every fourth one global, a second, small transformer as hyperprior. The other
presets have the same parts with other numbers, and code field after field, whatever its variable, level and grid: the tokens
are told the variable, the pressure and the latitude, positions within a window are relative, windows wrap around in longitude.
A field may refer to one decoded before it, the level above or the time before: both transforms and the entropy model see it
(conditional coding, as in Li et al. 2021 for video), so that a stack of levels costs little more than what is new in each.
What a decoder runs is exact (``entropy.exact``): the decoded field is the same integers everywhere, so that a residual
(``entropy.grid``) can stand on it. Source: Han et al. 2024, "CRA5: extreme compression of ERA5 for portable global climate and
weather research via an efficient variational transformer", arXiv 2405.03376.

Two-phase training (``train/climate.py``): first an autoencoder with a Gaussian pull on y, whose log variance is the second
head, then rate and distortion with the entropy model.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..container.errors import CorruptStream, LimitExceeded
from ..entropy.context.attention import LearnedTable
from ..entropy.context.slices import INIT_SCALE, SCALE_GAIN, ConvSlice, SliceModel
from ..entropy.exact import ACT_FRAC, ExactConv2d, Grid, bounded, matmul, pixel_shuffle, quantise
from ..entropy.exact_tables import ExactGELU, ExactLayerNorm, ExactSoftmax
from ..entropy.hyperprior import ContextHyperprior, LatentBase
from ..entropy.levels import LevelBias
from ..nn.blocks import ChannelNorm, LevelAffine
from ..nn.windows import MASKED
from .base import LEVELS, Outputs, WithLatent, macs

Map = Tensor | Grid
Window = tuple[int, int]  # rows, columns of tokens; (0, 0) is the whole map
VARIABLES = ("other", "z", "t", "u", "v", "q", "r", "w", "vo", "pv", "t2m", "d2m", "u10", "v10", "u100", "v100", "msl", "sp",
             "tcc", "tcw", "tp")  # fmt: skip
GRAVITY = 9.80665  # geopotential height (gh) is coded as geopotential
FACTS = 9  # numbers told about a token besides its variable
LAMBDA_UNIT = 255**2  # the shared entropy model counts errors in 8-bit steps; its gains start from that
LOWEST, HIGHEST = 1 / LAMBDA_UNIT, 5000 / LAMBDA_UNIT  # bits per value against one squared standard deviation
VALUES_MAX = 1 << 28  # that one payload may hold
_HEAD = struct.Struct("<HHHHB")
_PLANE = struct.Struct("<BHffi")


@dataclass(frozen=True, kw_only=True)
class FieldLatent(LatentBase):
    """The hyper transformer, and what turns its features into means and scales.

    ``context`` 0: directly, as published. Otherwise slices see those before them and their own anchors (see ConvSlice).
    """

    width: int
    heads: int
    blocks: int  # of either side
    features: int
    context: int = 0
    trunk: int = 0
    squeeze: int = 0
    residual: int = 0
    kernel: int = 3


@dataclass(frozen=True)
class Config:
    """``channels`` fields are coded together. ``tokens``: learned positions for a map of this size; none for any grid."""

    channels: int
    patch: tuple[int, int]
    stride: int
    width: int
    heads: int
    blocks: tuple[int, int]  # of encoder and decoder
    windows: tuple[Window, ...]  # of the blocks in turn
    latent: FieldLatent
    tokens: tuple[int, int] | None = None
    reach: Window = (0, 0)  # a global block sees no more than such a window, whatever the grid; (0, 0): everything
    reference: bool = False  # whether a field may refer to another, decoded before it (channels is 1)
    final_norm: bool = False  # as published; it takes the amplitude out of a token, which a linear start needs


def cut(x: Tensor, n: int, m: int) -> Tensor:
    """(B, C, h, w) -> (B, windows, C, n*m): rows padded with zeros at the bottom, columns wrapped around at the right."""
    b, c, h, w = x.shape
    down, right = -h % n, -w % m
    if right:
        x = torch.cat([x, x.repeat(1, 1, 1, -(-right // w))[..., :right]], 3)
    x = F.pad(x, (0, 0, 0, down)) if down else x
    rows, columns = x.shape[2] // n, x.shape[3] // m
    return x.reshape(b, c, rows, n, columns, m).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c, n * m)


def join(tokens: Tensor, h: int, w: int, n: int, m: int) -> Tensor:
    """Inverse of ``cut`` for a map of h x w."""
    b, c, rows, columns = tokens.shape[0], tokens.shape[2], -(-h // n), -(-w // m)
    x = tokens.reshape(b, rows, columns, c, n, m).permute(0, 3, 1, 4, 2, 5).reshape(b, c, rows * n, columns * m)
    return x[:, :, :h, :w]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def row_mask(h: int, w: int, n: int, m: int) -> Tensor | None:
    """(windows, 1, 1, n*m): MASKED where a key lies below the map; None where none does."""
    if h % n == 0:
        return None
    high = torch.arange(-(-h // n) * n) >= h
    rows = (high.float() * MASKED)[None, None, :, None].expand(1, 1, -1, -(-w // m) * m)
    return cut(rows, n, m)[0][:, :, None]


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def offsets(n: int, m: int) -> Tensor:
    """(n*m, n*m): row of a table of (2n-1)(2m-1) offsets for each pair of tokens of a window."""
    row, column = (t.reshape(-1) for t in torch.meshgrid(torch.arange(n), torch.arange(m), indexing="ij"))
    return (row[:, None] - row + n - 1) * (2 * m - 1) + column[:, None] - column + m - 1


class PlainTable(nn.Module):
    """A learned table of numbers that starts at zero; the encoder's LearnedTable."""

    def __init__(self, *shape: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(shape))

    def forward(self, exact: bool) -> Tensor:
        return self.table


def linear(inputs: int, outputs: int, exact: bool) -> nn.Module:
    """A linear layer of the channels of a map; exact where a decoder runs it."""
    return ExactConv2d(inputs, outputs, 1) if exact else nn.Conv2d(inputs, outputs, 1)


def norm(channels: int, exact: bool) -> nn.Module:
    """Layer norm over the channels of a map."""
    return ExactLayerNorm(channels, 1, 1e-6) if exact else ChannelNorm(channels, eps=1e-6)


class Attention(nn.Module):
    """Multi-head attention inside windows, (B, C, h, w) -> the same; ``bias``: with a learned one per offset."""

    def __init__(self, channels: int, heads: int, window: Window, bias: bool, exact: bool, reach: Window = (0, 0)):
        super().__init__()
        self.reach = window if window[0] else reach
        self.heads, self.window, self.scale = heads, window, (channels // heads) ** -0.5
        self.qkv = linear(channels, 3 * channels, exact)
        n, m = window
        table = LearnedTable if exact else PlainTable
        self.bias = table(heads, (2 * n - 1) * (2 * m - 1)) if bias and n else None
        self.softmax = ExactSoftmax(-1) if exact else nn.Softmax(-1)
        self.project = linear(channels, channels, exact)

    def forward(self, x: Map) -> Map:
        b, c, h, w = x.shape
        n, m = (min(self.reach[0], h), min(self.reach[1], w)) if self.reach[0] else (h, w)
        exact = isinstance(x, Grid)
        qkv = self.qkv(x)
        tokens = qkv.move(lambda t: cut(t, n, m)) if exact else cut(qkv, n, m)
        tokens = tokens.reshape(b, -1, 3 * self.heads, c // self.heads, n * m)
        q, k, v = tokens.chunk(3, 2)  # (B, windows, heads, C/heads, n*m) each
        if self.bias is None and not exact:
            mask = row_mask(h, w, n, m)
            q, k, v = (t.transpose(-1, -2) for t in (q, k, v))
            seen = F.scaled_dot_product_attention(q, k, v, mask)
        else:
            scores = matmul((q * self.scale).transpose(-1, -2), k)
            if self.bias is not None:
                table = self.bias(exact).reshape(self.heads, 2 * self.window[0] - 1, 2 * self.window[1] - 1)
                at_r, at_c = self.window[0] - n, self.window[1] - m
                table = table[:, at_r : at_r + 2 * n - 1, at_c : at_c + 2 * m - 1].reshape(self.heads, -1)
                scores = scores + table[:, offsets(n, m)]
            mask = row_mask(h, w, n, m)
            if mask is not None:
                scores = scores + (quantise(mask) if exact else mask)
            seen = matmul(self.softmax(scores), v.transpose(-1, -2))  # (B, windows, heads, n*m, C/heads)
        seen = seen.transpose(-1, -2).reshape(b, -1, c, n * m)
        return self.project(seen.move(lambda t: join(t, h, w, n, m)) if exact else join(seen, h, w, n, m))


class Block(nn.Module):
    """x + attention(norm(x)), then + MLP(norm(x)), on maps (B, C, h, w); ``exact`` also on grids, once frozen."""

    def __init__(self, channels: int, heads: int, window: Window, bias: bool, exact: bool, reach: Window = (0, 0)):
        super().__init__()
        self.norm1, self.norm2 = (norm(channels, exact) for _ in range(2))
        self.attention = Attention(channels, heads, window, bias, exact, reach)
        self.up, self.down = linear(channels, 4 * channels, exact), linear(4 * channels, channels, exact)
        self.gelu = ExactGELU() if exact else nn.GELU()
        with torch.no_grad():
            self.attention.project.weight.mul_(0.1)
            self.down.weight.mul_(0.1)

    def forward(self, x: Map) -> Map:
        x = bounded(x + self.attention(self.norm1(x)))
        return bounded(x + self.down(self.gelu(self.up(self.norm2(x)))))


class DirectSlice(SliceModel):
    """The published entropy model: the hyper features are scales and means, channel by channel; no context, no correction."""

    def __init__(self, known: int, channels: int, cfg: FieldLatent):
        super().__init__(channels)
        self.first, self.all = known, cfg.channels

    def prepare(self, features: Map, done: list[Map], level: Tensor | int) -> Map:
        return features

    def parameters_at(self, state, current, half, level, where):
        mine = slice(self.first, self.first + self.channels)
        s, mu = state[:, mine], state[:, self.all + mine.start : self.all + mine.stop]
        if where is not None:
            s, mu = (Grid(v.q.flatten(2)[:, :, where], v.frac, v.limit) for v in (s, mu))
        return None, mu, Grid(s.q * SCALE_GAIN) if isinstance(s, Grid) else s * SCALE_GAIN

    def residual(self, state, t, q, value, half, where):
        return Grid(torch.zeros_like(q), ACT_FRAC + 1) if where is not None else torch.zeros_like(q)

    def start_scales(self, scales: Tensor) -> None:
        raise NotImplementedError("the scales of this model come from the hyper net")


_TOLD: ContextVar[Map | None] = ContextVar("reference", default=None)  # of each thread its own: chunks are coded side by side


class FieldHyperprior(ContextHyperprior):
    """The shared coding loop with a transformer on either side of z; four by four latents share a hyper-latent.

    ``known`` values per token of a reference (0: there is none) add to the features of the hyper transformer.
    """

    def __init__(self, cfg: FieldLatent, known: int = 0):
        self._known = known
        super().__init__(cfg)

    @staticmethod
    @contextmanager
    def told(tokens: Map | None) -> Iterator[None]:
        """Code what is coded within with this reference (B, known, h, w), as ``Synthesis.tokens`` makes it."""
        before = _TOLD.set(tokens)
        try:
            yield
        finally:
            _TOLD.reset(before)

    def _build_hyper(self, cfg: FieldLatent) -> None:
        self.slice_model = ConvSlice if cfg.context else DirectSlice
        m, w, out = cfg.channels, cfg.width, cfg.features
        self.h_a_level = LevelAffine(m, cfg.knots, cfg.levels)
        self.h_a_in = nn.Conv2d(m, w, 4, stride=4)
        self.h_a = nn.Sequential(*(Block(w, cfg.heads, (0, 0), False, False) for _ in range(cfg.blocks)))
        self.h_a_out = nn.Sequential(nn.Conv2d(w, cfg.hyper, 1), nn.GELU(), nn.Conv2d(cfg.hyper, cfg.hyper, 1))
        self.z_gain = LevelAffine(cfg.hyper, cfg.knots, cfg.levels)
        self.h_s1, self.h_s2 = ExactConv2d(cfg.hyper, cfg.hyper, 1), ExactConv2d(cfg.hyper, w, 1)
        self.h_s_bias = LevelBias(w, cfg.knots, cfg.levels)
        self.gelu = ExactGELU()
        self.h_s = nn.Sequential(*(Block(w, cfg.heads, (0, 0), False, True) for _ in range(cfg.blocks)))
        self.h_s_norm = ExactLayerNorm(w, 1, 1e-6)
        self.h_s_out = ExactConv2d(w, 16 * out, 1)
        if self._known:
            self.known_in = ExactConv2d(self._known, out, 3, padding=1, bias=False)
            self.known_out = ExactConv2d(out, out, 1)
        with torch.no_grad():
            self.h_a_out[-1].weight.mul_(4)
            if not cfg.context:
                self.h_s_out.weight.mul_(0.1)
                self.h_s_out.bias.zero_()
                self.h_s_out.bias[: 16 * m] = INIT_SCALE

    def encoder_parts(self) -> list[nn.Module]:
        return [self.h_a_level, self.h_a_in, self.h_a, self.h_a_out, self.z_gain]

    def hyper_analysis(self, y: Tensor, level: Tensor) -> Tensor:
        return self.z_gain(self.h_a_out(self.h_a(self.h_a_in(self.h_a_level(y, level)))), level)

    def hyper_synthesis(self, z_hat: Map, level: Tensor | int) -> Map:
        f = bounded(self.h_s2(self.gelu(self.h_s1(z_hat))) + self.h_s_bias(level))
        features = pixel_shuffle(self.h_s_out(self.h_s_norm(self.h_s(f))), 4)
        if (told := _TOLD.get()) is not None:
            features = features + self.known_out(self.gelu(self.known_in(told)))
        return bounded(features)


class Positions(nn.Module):
    """What tokens are told of where and what they are, added to them; on both sides the same.

    For any grid: ``VARIABLES`` one-hot and FACTS numbers per token, through a linear layer. For a fixed one: a learned table.
    """

    def __init__(self, config: Config, exact: bool):
        super().__init__()
        table = LearnedTable if exact else PlainTable
        self.table = table(config.width, *config.tokens) if config.tokens else None
        self.facts = None if config.tokens else linear(len(VARIABLES) + FACTS, config.width, exact)

    def forward(self, facts: Map) -> Map:
        if self.facts is not None:
            return self.facts(facts)
        table = self.table(isinstance(facts, Grid))
        return table.reshape(1, *table.shape)


class Analysis(nn.Module):
    """x (B, channels, H, W) normalised, facts (B, F, h, w) -> mean and log variance of y, each (B, M, h, w).

    ``reference``: shaped like x.
    """

    def __init__(self, config: Config):
        super().__init__()
        bias = config.tokens is None
        self.config = config
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.stride)
        if config.reference:
            self.known = nn.Conv2d(1, config.width, config.patch, stride=config.stride, bias=False)
        self.positions = Positions(config, False)
        count = config.blocks[0]
        windows = [config.windows[i % len(config.windows)] for i in range(count)]
        self.trunk = nn.Sequential(*(Block(config.width, config.heads, w, bias, False, config.reach) for w in windows[:-1]))
        self.heads = nn.ModuleList(
            Block(config.width, config.heads, windows[-1], bias, False, config.reach) for _ in range(2)
        )
        self.quant = nn.Conv2d(2 * config.width, 2 * config.latent.channels, 1)

    def forward(self, x: Tensor, facts: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t = self.patches(x) + self.positions(facts)
        t = self.trunk(t if reference is None else t + self.known(reference))
        mean, log_variance = self.quant(torch.cat([head(t) for head in self.heads], 1)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)


class Synthesis(nn.Module):
    """y^ (B, M, h, w), facts, tokens of a reference -> x^ (B, channels, H, W) normalised; tensors, or grids once frozen."""

    def __init__(self, config: Config):
        super().__init__()
        bias = config.tokens is None
        self.config = config
        self.post = ExactConv2d(config.latent.channels, config.width, 1)
        self.level = LevelBias(config.width, config.latent.knots, config.latent.levels)
        self.positions = None if config.tokens else Positions(config, True)
        if config.reference:
            self.known = ExactConv2d(config.stride**2, config.width, 1, bias=False)
        first = config.blocks[0]
        windows = [config.windows[(first + i) % len(config.windows)] for i in range(config.blocks[1])]
        self.trunk = nn.Sequential(*(Block(config.width, config.heads, w, bias, True, config.reach) for w in windows))
        self.norm = norm(config.width, True) if config.final_norm else nn.Identity()
        self.patches = ExactConv2d(config.width, config.channels * config.patch[0] * config.patch[1], 1, bias=False)

    def tokens(self, reference: Map | None) -> Map | None:
        """A decoded field (B, 1, H, W) -> its values by token, (B, stride**2, h, w)."""
        if not isinstance(reference, Grid):
            return None if reference is None else F.pixel_unshuffle(reference, self.config.stride)
        return reference.move(lambda q: F.pixel_unshuffle(q, self.config.stride))

    def forward(self, y_hat: Map, facts: Map, level: Tensor | int, known: Map | None = None) -> Map:
        t = self.post(y_hat) + self.level(level)
        if self.positions is not None:
            t = t + self.positions(facts)
        if known is not None:
            t = t + self.known(known)
        out = self.patches(self.norm(self.trunk(bounded(t))))
        (h, w), (kh, kw), s = out.shape[2:], self.config.patch, self.config.stride
        size = ((h - 1) * s + kh, (w - 1) * s + kw)

        def fold(q: Tensor) -> Tensor:
            return F.fold(q.flatten(2), size, (kh, kw), stride=s)

        if not isinstance(out, Grid):
            return fold(out)
        overlaps = -(-kh // s) * -(-kw // s)
        return Grid(fold(out.q), out.frac, out.limit * overlaps)


@dataclass(frozen=True)
class Plane:
    """What a field is: its ECMWF short name, and its pressure in hPa (0 for the surface)."""

    name: str = "other"
    pressure: int = 0


@lru_cache(maxsize=1)
def statistics() -> dict[str, Any]:
    """Mean and standard deviation of ERA5 by variable (and level), as the CRA5 project publishes them."""
    return json.loads((Path(__file__).parent / "era5_statistics.json").read_text())


def of_plane(table: dict[str, Any], plane: Plane) -> Any:
    """What a table by variable, or by variable and level, says of a field; None where it says nothing."""
    known = table.get(plane.name)
    if isinstance(known, dict) and "mean" not in known:
        known = known.get(str(plane.pressure)) or known.get("all")
    return known


def normalisation(plane: Plane, x: np.ndarray) -> tuple[float, float]:
    """(mean, standard deviation) for a field: ERA5's where known, else of the data; float32 values, the second above 0."""
    known = of_plane(statistics(), plane) or {}
    finite = x[np.isfinite(x)].astype(np.float64)
    mean = known.get("mean", float(finite.mean()) if finite.size else 0.0)
    std = known.get("std", float(finite.std()) if finite.size else 1.0)
    mean, std = float(np.float32(mean)), float(np.float32(std))
    return (mean, std) if np.isfinite([mean, std]).all() and std > 0 else (0.0, 1.0)


def _checksum(data: bytes) -> bytes:
    """CRC32C, four bytes."""
    import google_crc32c  # training does without

    return struct.pack("<I", google_crc32c.value(data))


def references_of(planes: Sequence[Plane]) -> list[int]:
    """To which field before it each refers, -1 for none: the level before, else the same level one time before."""
    found, last = [], {}
    for i, plane in enumerate(planes):
        before = planes[i - 1] if i else None
        stacked = before is not None and before.name == plane.name and before != plane and plane != planes[0]
        found.append(i - 1 if stacked else last.get(plane, -1))
        last[plane] = i
    return found


def facts_of(planes: Sequence[Plane], rows: Sequence[int], columns: int,
             references: Sequence[int] | None = None) -> np.ndarray:  # fmt: skip
    """(N, len(VARIABLES) + FACTS, h, w) integers on 2**-ACT_FRAC. rows: latitude of each row of tokens in 1/100 degree.

    Numbers come from single divisions of integers, so that they are the same on every machine. ``references``: as
    ``references_of`` gives them; none without.
    """
    one = 1 << ACT_FRAC
    latitude = np.asarray(rows, np.int64)
    out = np.zeros((len(planes), len(VARIABLES) + FACTS, len(rows), columns), np.int64)
    for i, plane in enumerate(planes):
        out[i, VARIABLES.index(plane.name) if plane.name in VARIABLES else 0] = one
        pressure = min(max(plane.pressure, 0), 1100)
        place = out[i, len(VARIABLES) :]
        place[0] = (latitude * one // 9000)[:, None]
        place[1] = (np.abs(latitude) * one // 9000)[:, None]
        place[2] = (latitude**2 * one // 9000**2)[:, None]
        place[3] = (np.abs(latitude) ** 3 * one // 9000**3)[:, None]
        place[4] = pressure * one // 1000
        place[5] = pressure**2 * one // 1000**2
        place[6] = one if plane.pressure <= 0 else 0
        place[7] = min(abs(int(latitude[0] - latitude[-1])) // max(len(rows) - 1, 1), 9000) * one // 2000  # spacing of tokens
        place[8] = one if references is not None and references[i] >= 0 else 0
    return out


class VAEformer(WithLatent):
    name = "vaeformer"
    kind = "grid"
    presets = {
        "test": Config(1, (8, 8), 8, 32, 2, (2, 1), ((4, 6), (0, 0)),
                       FieldLatent(slices=(8, 16), hyper=8, width=32, heads=2, blocks=1, features=32, context=32, trunk=32,
                                   squeeze=16, residual=16, lambda_low=LOWEST, lambda_high=HIGHEST), reach=(8, 12),
                       reference=True),
        "light": Config(1, (8, 8), 8, 96, 4, (3, 3), ((4, 6), (0, 0), (8, 4)),
                        FieldLatent(slices=(8, 16, 24), hyper=16, width=64, heads=4, blocks=1, features=64, context=64,
                                    trunk=64, squeeze=32, residual=32, lambda_low=LOWEST, lambda_high=HIGHEST),
                        reach=(8, 12), reference=True),
        "paper": Config(268, (11, 10), 10, 1024, 16, (12, 12), ((24, 24), (12, 48), (48, 12), (0, 0)),
                        FieldLatent(slices=(256,), hyper=256, width=360, heads=5, blocks=4, features=512, lambda_low=LOWEST,
                                    lambda_high=HIGHEST), tokens=(72, 144), final_norm=True),
    }  # fmt: skip

    def __init__(self, config: Config, preset: str = "custom"):
        super().__init__(config, preset)
        self.g_a, self.g_s = Analysis(config), Synthesis(config)
        self.latent = FieldHyperprior(config.latent, config.stride**2 if config.reference else 0)

    # training

    def lambda_of(self, level: Tensor) -> Tensor:
        """Weight of the mean squared error of normalised values against bits per value (log-linear in the level)."""
        low, high = np.log(self.config.latent.lambda_low), np.log(self.config.latent.lambda_high)
        return LAMBDA_UNIT * (low + (high - low) * level / LEVELS).exp()

    def autoencode(self, x: Tensor, level: Tensor, facts: Tensor,
                   reference: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """First phase: x^ through a sample of the posterior, and the mean of its divergence from a unit normal."""
        mean, log_variance = self.g_a(x, facts, reference)
        y = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return self.g_s(y, facts, level, self.g_s.tokens(reference)), divergence

    def forward(self, x: Tensor, level: Tensor, facts: Tensor, reference: Tensor | None = None) -> Outputs:
        """x (B, channels, H, W) normalised, sides multiples of 4 strides; facts (B, F, h, w) as ``facts_of`` / 2**ACT_FRAC.

        ``reference``: a decoded field, shaped like x.
        """
        known = self.g_s.tokens(reference)
        with self.latent.told(known):
            y_hat, y_bits, z_bits = self.latent(self.g_a(x, facts, reference)[0], level)
        return Outputs(self.g_s(y_hat, facts, level, known), {"y": y_bits, "z": z_bits})

    def kmac_per_pixel(self) -> dict[str, float]:
        """Thousand multiply-adds per value, on the grid of the preset or on 128 x 256."""
        c = self.config
        h, w = c.tokens or (128 // c.stride, 256 // c.stride)
        height, width = (h - 1) * c.stride + c.patch[0], (w - 1) * c.stride + c.patch[1]
        level = torch.tensor([500.0])
        facts = torch.zeros(1, len(VARIABLES) + FACTS, h, w)
        x, y = torch.zeros(1, c.channels, height, width), torch.zeros(1, c.latent.channels, h, w)
        counts = {"g_a": macs(self.g_a, x, facts), "entropy": macs(self.latent, y, level),
                  "g_s": macs(self.g_s, y, facts, level)}  # fmt: skip
        return {part: round(n / x.numel() / 1000, 3) for part, n in counts.items()}

    # coding: field after field

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        """Tokens (h, w) that cover a grid: multiples of four."""
        s = self.config.stride
        return -(-height // (4 * s)) * 4, -(-width // (4 * s)) * 4

    @torch.no_grad()
    def encode_fields(self, x: np.ndarray, planes: Sequence[Plane], latitude: np.ndarray | None = None, level: int = 500,
                      references: Sequence[int] | None = None,
                      trace: Callable[[Tensor, Tensor], None] | None = None) -> tuple[bytes, np.ndarray]:  # fmt: skip
        """Fields x (N, H, W), what each is, latitude (H,) in degrees -> (payload, base float64 (N, H, W)).

        The base is what ``decode_fields`` makes of the payload, bit for bit. What is missing is filled with the mean.
        ``references``: to which field before it each refers, -1 for none; as ``references_of`` says if not given. ``trace``
        gets y and z of each field before they are coded.
        """
        n, height, width = x.shape
        if self.config.channels != 1 or len(planes) != n:
            raise ValueError("this preset codes field after field, each with its name and level")
        if max(n, height, width) > 65535:
            raise ValueError("at most 65535 fields, rows and columns")
        if references is None:
            references = references_of(planes) if self.config.reference else [-1] * n
        if len(references) != n or any(not -1 <= r < i for i, r in enumerate(references)):
            raise ValueError("a field refers to one before it, or to -1 for none")
        h, w = self._padded(height, width)
        lat = np.zeros(height) if latitude is None else np.asarray(latitude, np.float64)
        at = np.minimum(np.arange(h) * self.config.stride + self.config.stride // 2, height - 1)
        rows = np.rint(np.nan_to_num(lat[at]).clip(-90, 90) * 100).astype(np.int64)
        numbers = [normalisation(p, f) for p, f in zip(planes, x)]
        head = _HEAD.pack(n, height, width, level, 0) + rows.astype("<i2").tobytes()
        out = [head]
        for p, (mean, std), r in zip(planes, numbers, references):
            code = VARIABLES.index(p.name) if p.name in VARIABLES else 0
            out.append(_PLANE.pack(code, min(max(p.pressure, 0), 65535), mean, std, r))
        known = [Plane(p.name if p.name in VARIABLES else "other", p.pressure) for p in planes]
        pad = (0, w * self.config.stride - width, 0, h * self.config.stride - height)
        chain = _Chain(self, known, references, rows.tolist(), w, level)
        base = np.empty(x.shape)
        for i, (mean, std) in enumerate(numbers):
            field = np.nan_to_num((x[i].astype(np.float64) - mean) / std, nan=0.0, posinf=0.0, neginf=0.0).clip(-100, 100)
            tensor = F.pad(torch.from_numpy(field).float()[None, None], pad, mode="replicate")
            facts, reference = chain.facts(i), chain.reference(i)
            seen = None if reference is None else reference.value().float()
            y = self.g_a(tensor, facts.value().float(), seen)[0]
            with self.latent.told(self.g_s.tokens(reference)):
                z = self.latent.analyse_hyper(y, level)
                if trace is not None:
                    trace(y, z)
                payload, _ = self.latent.compress(y, z, level)
            out.append(struct.pack("<I", len(payload)) + payload)
            base[i] = chain.decode(i, payload)[:height, :width] * std + mean
        payload = b"".join(out)
        return payload + _checksum(payload), base

    @torch.no_grad()
    def decode_fields(self, payload: bytes, *, only: Sequence[int] | None = None) -> np.ndarray:
        """Inverse of ``encode_fields``: float64 (N, H, W), or only these fields. CorruptStream on damage."""
        if len(payload) < 4 or _checksum(bytes(payload[:-4])) != payload[-4:]:
            raise CorruptStream("neural payload: its checksum is wrong")
        view = memoryview(payload)[:-4]

        def take(size: int) -> memoryview:
            nonlocal view
            if size > len(view):
                raise CorruptStream("neural payload: it ends early")
            piece, view = view[:size], view[size:]
            return piece

        n, height, width, level, _ = _HEAD.unpack(take(_HEAD.size))
        if n * height * width > VALUES_MAX:
            raise LimitExceeded(f"the payload says that it holds {n * height * width} values")
        if not n or not height or not width or level > LEVELS:
            raise CorruptStream("neural payload: its header makes no sense")
        h, w = self._padded(height, width)
        rows = np.frombuffer(take(2 * h), "<i2").tolist()
        planes, numbers, references, streams = [], [], [], []
        for i in range(n):
            code, pressure, mean, std, reference = _PLANE.unpack(take(_PLANE.size))
            if code >= len(VARIABLES) or not np.isfinite([mean, std]).all() or max(map(abs, rows)) > 9000:
                raise CorruptStream("neural payload: its header makes no sense")
            if not -1 <= reference < (i if self.config.reference else 0):
                raise CorruptStream("neural payload: a field refers to one that is not there")
            planes.append(Plane(VARIABLES[code], pressure))
            numbers.append((mean, std))
            references.append(reference)
        for _ in range(n):
            streams.append(bytes(take(struct.unpack("<I", take(4))[0])))
        if len(view):
            raise CorruptStream("neural payload: something follows its end")
        chosen = list(range(n) if only is None else only)
        needed = set(chosen)
        for i in range(n - 1, -1, -1):  # whoever is referred to comes before
            if i in needed and references[i] >= 0:
                needed.add(references[i])
        chain = _Chain(self, planes, references, rows, w, level)
        out = np.empty((len(chosen), height, width))
        for i in sorted(needed):
            field = chain.decode(i, streams[i])[:height, :width]
            for k, wanted in enumerate(chosen):
                if wanted == i:
                    out[k] = field * numbers[i][1] + numbers[i][0]
        return out


class _Chain:
    """Decodes fields in order, and remembers those to which later ones refer."""

    def __init__(self, codec: VAEformer, planes: Sequence[Plane], references: Sequence[int], rows: Sequence[int], columns: int,
                 level: int):  # fmt: skip
        self.codec, self.references, self.level = codec, references, level
        self.about = [(plane, rows, columns) for plane in planes]
        self.last_use = {r: i for i, r in enumerate(references)}
        self.done: dict[int, Tensor] = {}  # float32 holds these integers

    def facts(self, i: int) -> Grid:
        plane, rows, columns = self.about[i]
        return Grid(torch.from_numpy(facts_of([plane], rows, columns, self.references[i : i + 1])).double())

    def reference(self, i: int) -> Grid | None:
        r = self.references[i]
        return Grid(self.done[r].double()) if r >= 0 else None

    def decode(self, i: int, payload: bytes) -> np.ndarray:
        """Normalised values, float64: integers on a power of two."""
        facts, known = self.facts(i), self.codec.g_s.tokens(self.reference(i))
        with self.codec.latent.told(known):
            y_hat = self.codec.latent.decompress(payload, *facts.shape[2:], self.level)
        out = self.codec.g_s(Grid(torch.round(y_hat.double() * 2.0**ACT_FRAC)), facts, self.level, known)
        if i in self.last_use:
            self.done[i] = out.at(ACT_FRAC).clamp().q.float()
        for r in [r for r in self.done if self.last_use[r] <= i]:
            del self.done[r]
        return out.q[0, 0].numpy() * 2.0**-out.frac
