"""Hyperprior with channel slices, a two-pass checkerboard and latent residual prediction.

    y --h_a--> z --round--> z^ --h_s--> features f --------------------------+
                 |                                                           |
           factorised prior                                                  v
    for every slice j of channels, for anchors then the others:
        known = [slices < j, anchors of slice j] --1x1, 3x3--> (+) --> trunk --> mean mu, scale index s
        q = round((y - mu) * gain(level))    coded with row round(s + log gain) of the Gaussian tables
        y^ = mu + (q + 0.5 * hardtanh(lrp(trunk, q))) / gain(level)

All nets live in the domain of y, where the range does not depend on the quality; the gain vector of the level turns it
into steps (Cui et al. 2021), and enters the scale as an offset in steps of the scale table. Sources: mean-scale
hyperprior and latent residual prediction, Minnen et al. 2018 and 2020; checkerboard, He et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..container.errors import CorruptStream
from ..nn.blocks import LevelAffine, knot_weights
from .context.checkerboard import anchor_mask, positions
from .context.slices import ConvSlice, SliceModel
from .exact import ACT_FRAC, ACT_MAX, ExactConv2d, ExactReLU, Freezable, Grid, bounded, pixel_shuffle, shift_round
from .factorized import FactorizedPrior
from .gaussian import SCALE_CLASSES, SCALE_MIN, SCALE_STEP, gaussian_likelihood, student_tables
from .levels import LevelBias, interpolate
from .tables import Tables

if TYPE_CHECKING:  # its library is for coding: training does without
    from .latent_mixing import HyperStart, Start

    Put = Callable[[slice, Tensor, Tensor, Tensor, Tensor | None], None]

GAIN_KNOTS = 33  # knots of the frozen gain tables, linear in the step size between them
STEP_FRAC = 20  # grid of the frozen step sizes 1/gain
STEP_MAX = 1 << 24
SYMBOL_MAX = (1 << 15) - 1  # |q|; keeps q * 2**13 * STEP_MAX below 2**53
HYPER_MAX = 127  # |z|; what the activation grid holds


@dataclass(frozen=True)
class LatentBase:
    """What every entropy model of y (B, sum(slices), H/16, W/16) has."""

    slices: tuple[int, ...]  # channels of each slice of y
    hyper: int  # channels of z
    knots: int = 9  # learned vectors over the quality range
    levels: int = 1000
    lambda_low: float = 0.0008
    lambda_high: float = 0.5

    @property
    def channels(self) -> int:
        return sum(self.slices)


@dataclass(frozen=True, kw_only=True)
class LatentConfig(LatentBase):
    """Widths of the entropy model of the control codec."""

    width: int  # hidden width of h_a and h_s
    features: int  # channels that h_s hands to the slices
    context: int  # width of the context layer of a slice
    trunk: int  # width of its second layer
    squeeze: int  # channels to which everything known is reduced before the context convolution
    residual: int  # hidden width of the latent residual prediction
    kernel: int = 3  # side of the context convolution


def round_ste(v: Tensor) -> Tensor:
    """round(v) with the identity as gradient."""
    return v + (torch.round(v) - v).detach()


class ContextHyperprior(Freezable):
    """Entropy model of a latent y: ``forward`` for training; ``compress``/``decompress`` after ``freeze``.

    A codec with other nets in these places subclasses it: ``_build_hyper``, ``hyper_analysis`` and ``hyper_synthesis`` for
    the way y -> z -> features, ``slice_model`` for what predicts a slice. Gains, noise, rounding, the order of coding and the
    arithmetic of the reconstruction are the same for all.
    """

    _frozen_names = ("step_q", "offset_q")
    slice_model: type[SliceModel] = ConvSlice  # made as slice_model(channels known before, channels, cfg)

    def __init__(self, cfg: Any):
        super().__init__()
        self.cfg = cfg
        self._build_hyper(cfg)
        self.prior = FactorizedPrior(cfg.hyper)
        self.rounding = round_ste  # of v = (y - mu) * gain to symbols; an encoder that searches puts its own here
        self.mixing: Start | None = None  # codes y by context mixing; without it, by the tables alone
        self.hyper_mixing: HyperStart | None = None  # the same for z, where there is one for y
        self.rounded_rate = False  # training only: take rates at rounded symbols instead of noisy ones
        self.models = nn.ModuleList()
        known = 0
        for channels in cfg.slices:
            self.models.append(self.slice_model(known, channels, cfg))
            known += channels
        # log gain: quantisation in a good transform follows sqrt(lambda); 8 steps per unit at lambda 0.01 to start
        lam = torch.linspace(math.log(cfg.lambda_low), math.log(cfg.lambda_high), cfg.knots)
        start = math.log(8) + 0.5 * (lam - math.log(0.01))
        self.log_gain = nn.Parameter(start[:, None].repeat(1, cfg.channels))

    def _build_hyper(self, cfg: Any) -> None:
        m, w = cfg.channels, cfg.width
        self.h_a_level = LevelAffine(m, cfg.knots, cfg.levels)
        self.h_a = nn.Sequential(
            nn.Conv2d(m, w, 1), nn.ReLU(),
            nn.Conv2d(w, w, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(w, cfg.hyper, 3, stride=2, padding=1),
        )  # fmt: skip
        self.z_gain = LevelAffine(cfg.hyper, cfg.knots, cfg.levels)
        self.h_s1 = ExactConv2d(cfg.hyper, 4 * w, 1)
        self.h_s_bias = LevelBias(w, cfg.knots, cfg.levels)
        self.h_s2 = ExactConv2d(w, w, 3, padding=1)
        self.h_s3 = ExactConv2d(w, 4 * cfg.features, 1)
        self.relu = ExactReLU()
        with torch.no_grad():
            self.h_a[-1].weight.mul_(4)

    @staticmethod
    def likelihood(symbols: Tensor, log_scale: Tensor) -> Tensor:
        """Of real symbols (q, or v with noise) given the log of their scale in steps, all (B, M, h, w)."""
        return gaussian_likelihood(symbols, log_scale)

    def encoder_parts(self) -> list[nn.Module]:
        """Modules that only the encoder runs: they rest in hard stages of the training."""
        return [self.h_a, self.h_a_level, self.z_gain]

    def hyper_analysis(self, y: Tensor, level: Tensor) -> Tensor:
        """y (B, M, h, w) -> z (B, hyper, h/4, w/4), not rounded."""
        return self.z_gain(self.h_a(self.h_a_level(y, level)), level)

    def hyper_synthesis(self, z_hat: Tensor | Grid, level: Tensor | int) -> Tensor | Grid:
        """z^ (B, hyper, h, w) -> features (B, features, 4h, 4w)."""
        f = bounded(pixel_shuffle(self.h_s1(z_hat), 2) + self.h_s_bias(level))
        f = self.relu(self.h_s2(self.relu(f)))
        return self.relu(pixel_shuffle(self.h_s3(f), 2))

    def forward(self, y: Tensor, level: Tensor, z_hat: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y (B, M, h, w) with h, w multiples of 4, level (B,) -> (y^, bits of y (B,), bits of z (B,)).

        Rates are taken with additive uniform noise (see ``rounded_rate``), values pass on with straight-through rounding.
        With ``z_hat`` (B, hyper, h/4, w/4) given, z is not computed, and its bits are said to be 0.
        """
        cfg, batch = self.cfg, len(y)
        log_gain = (knot_weights(level, len(self.log_gain), cfg.levels) @ self.log_gain)[:, :, None, None]
        z_bits = y.new_zeros(batch)
        if z_hat is None:
            z = self.hyper_analysis(y, level)
            z_hat = round_ste(z)
            z_rated = z_hat if self.rounded_rate else z + torch.rand_like(z) - 0.5
            z_bits = -torch.log2(self.prior.likelihood(z_rated)).reshape(batch, -1).sum(1)
        f = self.hyper_synthesis(z_hat, level)
        anchors = anchor_mask(*y.shape[2:], y.device)
        done: list[Tensor] = []
        rated, scales, counted = [], [], []
        for model, target, slice_log_gain in zip(self.models, y.split(cfg.slices, 1), log_gain.split(cfg.slices, 1)):
            gain = slice_log_gain.exp()
            state = model.prepare(f, done, level)
            current = None
            for half, mask in enumerate((anchors, 1 - anchors)):
                t, mu, s = model.parameters_at(state, current, half, level, None)
                v = (target - mu) * gain
                q = self.rounding(v)
                c = model.coded(state, mu, s + slice_log_gain / SCALE_STEP, v, half, None)
                c = None if c is None else c * mask
                q = q if c is None else q * c
                base = current if half else torch.zeros_like(target)
                value = base + (mu + q / gain) * mask if model.spatial_residual else None
                r = model.residual(state, t, q, value, half, None)
                r = r if c is None else r * c
                current = base + (mu + (q + r) / gain) * mask
                symbol = q if self.rounded_rate else v + torch.rand_like(v) - 0.5
                counted.append(c)
                if half == 0:
                    first, first_s = symbol * mask, s * mask
            rated.append(first + symbol * mask)
            kept_s = first_s + s * mask
            scales.append(math.log(SCALE_MIN) + SCALE_STEP * kept_s + slice_log_gain)
            done.append(current)
        likelihood = self.likelihood(torch.cat(rated, 1), torch.cat(scales, 1))
        bits = -torch.log2(likelihood)
        if counted[0] is not None:
            bits = bits * torch.cat([a + b for a, b in zip(counted[::2], counted[1::2])], 1)
        return torch.cat(done, 1), bits.reshape(batch, -1).sum(1), z_bits

    # The frozen side. Everything from here on is integers, except y itself on its way into the encoder.

    def _float_names(self) -> tuple[str, ...]:
        return ("log_gain",)

    def _freeze(self) -> dict[str, Tensor]:
        cfg = self.cfg
        fine = torch.linspace(0, cfg.levels, GAIN_KNOTS)
        log_gain = (knot_weights(fine, cfg.knots, cfg.levels).double() @ self.log_gain.double().cpu())
        step = torch.round(torch.exp(-log_gain) * 2.0**STEP_FRAC).clamp(1, STEP_MAX)
        offset = torch.round(log_gain / SCALE_STEP * 2.0**ACT_FRAC)
        self.set_tables(self.prior.tables(), student_tables())
        return {"step_q": step.to(torch.int32), "offset_q": offset.to(torch.int32)}

    def _thaw(self) -> dict[str, Tensor]:
        return {"log_gain": self.offset_q * (SCALE_STEP * 2.0**-ACT_FRAC)}

    def set_tables(self, z: Tables, y: Tables) -> None:
        """Integer tables of z (a row per channel) and y (a row per scale class); the float prior is dropped."""
        if len(z) != self.cfg.hyper or len(y) != SCALE_CLASSES:
            raise ValueError("the tables do not fit the entropy model")
        self.z_tables, self.y_tables, self.prior = z, y, None

    def _code(self, z: Tensor, level: int, symbols) -> Tensor:
        """The coding order, shared by both sides: y^ (1, M, 4h, 4w) float64 on the grid 2**-ACT_FRAC.

        ``symbols(channels, positions, mu, step, index, coded)`` gives the integers q (1, channels, n) of a pass: the encoder
        makes and codes them, the decoder reads them. ``coded`` says which; the others are zero.
        """
        cfg, device = self.cfg, z.device
        h, w = 4 * z.shape[2], 4 * z.shape[3]
        features = self.hyper_synthesis(Grid(z.double() * 2.0**ACT_FRAC), level)
        step = interpolate(self.step_q, level, cfg.levels).double()[None, :, None]
        offset = interpolate(self.offset_q, level, cfg.levels).double()[None, :, None]
        y_hat = torch.zeros(1, cfg.channels, h * w, dtype=torch.float64, device=device)
        done: list[Grid] = []
        first = 0
        for model, channels in zip(self.models, cfg.slices):
            mine = slice(first, first + channels)
            state, current = model.prepare(features, done, level), Grid(y_hat[:, mine].reshape(1, -1, h, w))  # a view
            for half, where in enumerate(positions(h, w, device)):
                if not len(where):
                    continue
                t, mu, s = model.parameters_at(state, current if half else None, half, level, where)
                index = shift_round(s.q + offset[:, mine], ACT_FRAC).clamp(0, SCALE_CLASSES - 1)
                coded = model.coded(state, mu, Grid(s.q + offset[:, mine]), None, half, where)
                q = symbols(mine, where, mu, step[:, mine], index, coded)
                value = None
                if model.spatial_residual:
                    plain = y_hat[:, mine].clone()
                    plain[:, :, where] = self._value(mu, Grid(q * 2.0**ACT_FRAC), step[:, mine])
                    value = Grid(plain.reshape(1, -1, h, w))
                r = model.residual(state, t, q, value, half, where)
                r = r if coded is None else r.masked(coded)
                y_hat[:, mine, where] = self._value(mu, Grid(q * 2.0**r.frac + r.q, r.frac), step[:, mine])
            done.append(current)
            first += channels
        return y_hat.reshape(1, -1, h, w)

    @staticmethod
    def _value(mu: Grid, steps: Grid, step: Tensor) -> Tensor:
        """mu + steps/gain as integers on the activation grid, clamped to its range."""
        return (mu.q + shift_round(steps.q * step, steps.frac + STEP_FRAC - ACT_FRAC)).clamp(-ACT_MAX, ACT_MAX)

    @torch.no_grad()
    def analyse_hyper(self, y: Tensor, level: int) -> Tensor:
        """y (1, M, h, w) -> the integers z (1, hyper, h/4, w/4): the last float step of the encoder."""
        at = torch.tensor([float(level)], device=y.device)
        return torch.round(self.hyper_analysis(y, at)).nan_to_num(0).clamp(-HYPER_MAX, HYPER_MAX)

    def compress(self, y: Tensor, z: Tensor, level: int) -> tuple[bytes, Tensor]:
        """y (1, M, h, w) float, h and w multiples of 4, and its z -> (payload, y^ of the same shape, float32).

        The same y and z give the same payload on every machine: y - mu and its quotient by the step are single, correctly
        rounded float64 operations.
        """
        from .coder import Encoder

        encoder = Encoder()
        if self.mixing is None:
            encoder.put(*_flat(z), self.z_tables)
            y_hat = self.passes(y, z, level, self._plainly(encoder))
            return encoder.finish(), y_hat
        from .latent_mixing import MixedEncoder, joined

        mixed = MixedEncoder(self.mixing, self.y_tables, *y.shape[2:])
        if self.hyper_mixing is None:
            encoder.put(*_flat(z), self.z_tables)
        else:
            mixed.put_hyper(self.hyper_mixing, _host(z).reshape(z.shape[1:]), level, self.cfg.levels)

        def put(mine: slice, where: Tensor, q: Tensor, index: Tensor, coded: Tensor | None) -> None:
            which = None if coded is None else coded[0].cpu().numpy()
            mixed.put(mine, *(t.cpu().numpy() for t in (where, q[0], index[0])), which)

        y_hat = self.passes(y, z, level, put)
        return mixed.finish() if self.hyper_mixing else joined(encoder.finish(), mixed.finish()), y_hat

    def ideal_bits(self, y: Tensor, z: Tensor, level: int) -> float:
        """What the integer tables charge for the symbols of ``compress``: the estimate beside the real bytes.

        Context mixing stays below it.
        """
        counter = _Counter()
        counter.put(*_flat(z), self.z_tables)
        self.passes(y, z, level, self._plainly(counter))
        return counter.bits

    def _plainly(self, encoder: Any) -> Put:
        """Coding of y by its tables, with whatever has the ``put`` of an Encoder."""

        def put(mine: slice, where: Tensor, q: Tensor, index: Tensor, coded: Tensor | None) -> None:
            if coded is not None:
                q, index = q[coded], index[coded]
            encoder.put(_host(q), _host(index).astype(np.uint8), self.y_tables)

        return put

    @torch.no_grad()
    def passes(self, y: Tensor, z: Tensor, level: int, put: Put) -> Tensor:
        """y^ (1, M, h, w) float32 of y; every pass goes through ``put(channels, positions (n,), q, rows, coded)``.

        These three are (1, c, n); ``coded`` says which symbols are not left out, None for all of them.
        """
        latent = y.double().reshape(1, y.shape[1], -1)

        def make(mine: slice, where: Tensor, mu: Grid, step: Tensor, index: Tensor, coded: Tensor | None) -> Tensor:
            v = (latent[:, mine, where] - mu.value()) / (step * 2.0**-STEP_FRAC)
            q = torch.round(v).nan_to_num(0).clamp(-SYMBOL_MAX, SYMBOL_MAX)
            q = q if coded is None else q * coded
            put(mine, where, q, index, coded)
            return q

        return (self._code(z, level, make) * 2.0**-ACT_FRAC).float()

    @torch.no_grad()
    def decompress(self, payload: bytes, h: int, w: int, level: int) -> Tensor:
        """Inverse of ``compress``: y^ (1, M, h, w) float32. CorruptStream on damage."""
        from .coder import Decoder

        device = self.step_q.device
        shape = (1, self.cfg.hyper, h // 4, w // 4)
        mixed = decoder = None
        if self.mixing is not None:
            from .latent_mixing import MixedDecoder, parted

            payload, rest = (b"", payload) if self.hyper_mixing else parted(payload)
            mixed = MixedDecoder(rest, self.mixing, self.y_tables, h, w)
        if self.hyper_mixing is not None:
            z = mixed.get_hyper(self.hyper_mixing, *shape[2:], level, self.cfg.levels)
        else:
            decoder = Decoder(payload)
            z = decoder.get(np.repeat(np.arange(shape[1]), shape[2] * shape[3]), self.z_tables)
        if np.abs(z).max() > HYPER_MAX:
            raise CorruptStream("entropy payload: a hyper-latent is out of range")
        z = torch.from_numpy(z).reshape(shape).to(device)

        def read(mine: slice, where: Tensor, mu: Grid, step: Tensor, index: Tensor, coded: Tensor | None) -> Tensor:
            rows = index if mixed is not None or coded is None else index[coded]
            rows = _host(rows).astype(np.uint8)
            if mixed is not None:
                at, which = where.cpu().numpy(), None if coded is None else coded[0].cpu().numpy()
                q = mixed.get(mine, at, rows.reshape(mu.shape[1:]), which)
            else:
                q = decoder.get(rows, self.y_tables)
            if np.abs(q).max(initial=0) > SYMBOL_MAX:
                raise CorruptStream("entropy payload: a symbol is out of range")
            read = torch.from_numpy(q).to(device, torch.float64)
            if coded is None or mixed is not None:
                return read.reshape(mu.shape)
            return torch.zeros_like(mu.q).masked_scatter_(coded, read)

        y_hat = self._code(z, level, read)
        for read_out in (decoder, mixed):
            if read_out is not None:
                read_out.finish()
        return (y_hat * 2.0**-ACT_FRAC).float()


class _Counter:
    """Stands in for an ``Encoder`` and adds up ideal costs."""

    def __init__(self) -> None:
        self.bits = 0.0

    def put(self, values: np.ndarray, indexes: np.ndarray, tables: Tables) -> None:
        self.bits += float(tables.bits(values, indexes).sum())

    def finish(self) -> bytes:
        return b""


def _host(q: Tensor) -> np.ndarray:
    """Integers of a grid tensor, flat, int32."""
    return q.reshape(-1).to("cpu", torch.int32).numpy()


def _flat(z: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(values, channel of each) of z (1, C, h, w), channel after channel."""
    return _host(z), np.repeat(np.arange(z.shape[1]), z.shape[2] * z.shape[3])
