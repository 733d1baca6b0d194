"""Selective scans in plain torch, and the orders in which HCFSSNet scans a map.

The recurrence of a selective state space model (Mamba, Gu and Dao 2023), per channel d and state n:

    h_t = exp(delta_t a) h_{t-1} + delta_t u_t b_t          y_t = c_t . h_t + skip u_t          delta >= 0, a < 0

Both evaluations cut the sequence into chunks and take ``exp`` of numbers <= 0 only, so that nothing overflows in float32
(the trick of two cumulative sums does). Neither needs more than torch.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ChannelNorm, Upsample

ORDERS = ("rows", "columns", "diagonals", "antidiagonals")


def selective_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int | None = None) -> Tensor:
    """Mamba's first form, N states for each of D channels: y (..., D, L), without the skip.

    u, delta (..., D, L); a (..., D, N), negative; b, c (..., N, L); leading dimensions broadcast. All chunks go through their
    ``chunk`` steps side by side (sqrt(L) by default), then the states at their ends are carried on one after the other.
    """
    length = u.shape[-1]
    chunk = chunk or max(1, math.isqrt(length))
    pad = -length % chunk  # steps of delta 0 change nothing
    fold = (-1, chunk)
    log_decay = F.pad(delta, (0, pad))[..., None, :] * a[..., None]  # (..., D, N, L)
    drive = F.pad((delta * u)[..., None, :] * b[..., None, :, :], (0, pad))
    log_decay, drive = (t.unflatten(-1, fold).movedim(-1, 0) for t in (log_decay, drive))  # (chunk, ..., D, N, chunks)
    state, local = torch.zeros_like(drive[0]), []
    for decay, step in zip(log_decay.exp().unbind(0), drive.unbind(0)):
        state = decay * state + step
        local.append(state)
    reach = log_decay.cumsum(0).exp()  # what is left of the state before the chunk
    carry = [torch.zeros_like(state[..., 0])]
    for decay, end in zip(reach[-1].unbind(-1)[:-1], state.unbind(-1)[:-1]):
        carry.append(decay * carry[-1] + end)
    h = torch.stack(local) + reach * torch.stack(carry, -1)
    y = h.movedim(0, -1).flatten(-2) * F.pad(c, (0, pad))[..., None, :, :]
    return y.sum(-2)[..., :length]


def _kept(s: Tensor) -> Tensor:
    """exp(s_t - s_r) for r <= t, else 0: (..., T) -> (..., T, T). ``s`` falls along T, so that no exponent is positive."""
    past = torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool, device=s.device).tril()
    return (s[..., :, None] - s[..., None, :]).masked_fill(~past, -torch.inf).exp()


def _before(log_decay: Tensor, x: Tensor, chunk: int = 32) -> Tensor:
    """h_{k-1} of h_k = exp(log_decay_k) h_{k-1} + x_k: log_decay (..., K), x (..., K, F) -> (..., K, F)."""
    count = x.shape[-2]
    if count > chunk:
        pad = -count % chunk
        log_decay = F.pad(log_decay, (0, pad)).unflatten(-1, (-1, chunk))
        x = F.pad(x, (0, 0, 0, pad)).unflatten(-2, (-1, chunk))
    s = log_decay.cumsum(-1)
    h = _kept(s) @ x
    state = F.pad(h[..., :-1, :], (0, 0, 1, 0))
    if count > chunk:
        earlier = _before(s[..., -1], h[..., -1, :], chunk)  # at the start of each chunk
        reach = F.pad(s[..., :-1], (1, 0)).exp()
        state = (state + reach[..., None] * earlier[..., None, :]).flatten(-3, -2)[..., :count, :]
    return state


def headed_scan(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int = 16) -> Tensor:
    """Mamba-2's form (SSD, Dao and Gu 2024): one decay for all P channels of a head, so that a chunk is matrix products.

    x (..., L, H, P); delta (..., L, H); a (..., H), negative; b, c (..., L, N), shared by the heads -> y like x, without
    the skip. With s = cumulative sum of delta a in a chunk:
        y_t = sum_{r <= t} (c_t . b_r) exp(s_t - s_r) delta_r x_r + exp(s_t) c_t . S,     S the state before the chunk.
    """
    length, heads, width = x.shape[-3:]
    chunk = min(chunk, length)
    pad = -length % chunk  # steps of delta 0 change nothing
    fold = (-1, chunk)
    s = F.pad(delta * a[..., None, :], (0, 0, 0, pad)).unflatten(-2, fold).cumsum(-2).transpose(-1, -2)  # (..., K, H, T)
    v = F.pad(delta[..., None] * x, (0, 0, 0, 0, 0, pad)).unflatten(-3, fold).transpose(-2, -3)  # (..., K, H, T, P)
    b, c = (F.pad(t, (0, 0, 0, pad)).unflatten(-2, fold) for t in (b, c))  # (..., K, T, N)
    y = ((c @ b.transpose(-1, -2))[..., None, :, :] * _kept(s)) @ v
    if s.shape[-3] > 1:
        to_end = (s[..., -1:] - s).exp()
        ends = (b[..., None, :, :] * to_end[..., None]).transpose(-1, -2) @ v  # (..., K, H, N, P)
        ends = ends.flatten(-2).transpose(-2, -3)  # (..., H, K, N*P)
        state = _before(s[..., -1].transpose(-1, -2), ends).transpose(-2, -3).unflatten(-1, (-1, width))
        y = y + (c[..., None, :, :] * s.exp()[..., None]) @ state
    return y.transpose(-2, -3).flatten(-4, -3)[..., :length, :, :]


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # what is kept must also serve training
def scan_order(h: int, w: int, order: str, reverse: bool, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(flat positions in the order of the scan, its inverse), each (h*w,).

    Every second line runs backwards (boustrophedon), so that consecutive tokens touch, at a side or a corner.
    """
    row, column = (t.reshape(-1) for t in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    line, along = {
        "rows": (row, column),
        "columns": (column, row),
        "diagonals": (row + column, column),
        "antidiagonals": (row - column + w - 1, column),
    }[order]
    along = torch.where(line % 2 == 1, -along, along)
    index = (line * (2 * (h + w)) + along).argsort()
    index = index.flip(0) if reverse else index
    return index.to(device), index.argsort().to(device)


def directions(count: int, phase: int) -> tuple[tuple[str, bool], ...]:
    """Which (order, reverse) a block scans: 8 are all; 4 are the four orders, backwards in every second block (``phase``); 2
    are rows forwards and columns backwards, or the diagonals so."""
    if count == 8:
        return tuple((order, reverse) for reverse in (False, True) for order in ORDERS)
    if count == 4:
        return tuple((order, phase % 2 == 1) for order in ORDERS)
    if count == 2:
        first, second = ORDERS[phase % 2 * 2 : phase % 2 * 2 + 2]
        return (first, False), (second, True)
    raise ValueError(f"a block scans in 2, 4 or 8 directions, not {count}")


class VONSS(nn.Module):
    """The neighbour-preserving omnidirectional scan of HCFSSNet (arXiv 2511.20151): (B, C, h, w) -> the same shape.

    (v, g) = 1x1(x); v = SiLU(depth-wise 3x3(v)) runs through a selective scan of its own in each direction; their sum is
    normalised, gated by SiLU(g) and projected back. ``heads`` 0 takes Mamba's first form, with a decay per channel and state
    and steps of rank C/16; otherwise the decays are shared inside ``heads`` heads (the cheaper matrix form). ``fold`` scans
    patches of fold x fold samples, where a map is too large to be scanned sample by sample; it divides h and w.
    """

    def __init__(self, channels: int, inner: int, states: int, count: int, phase: int, heads: int, fold: int = 1):
        super().__init__()
        self.inner, self.states, self.heads = inner, states, heads
        self.directions = directions(count, phase)
        self.enter = nn.Conv2d(channels, 2 * inner, fold, stride=fold)
        self.mix = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        rank = -(-channels // 16)
        self.sizes = (heads or rank, states, states)  # of (delta, b, c) of a direction
        self.parameters_of = nn.Conv2d(inner, count * sum(self.sizes), 1, bias=False)
        steps = heads or inner
        delta = torch.exp(torch.rand(count, steps) * math.log(100) + math.log(1e-3)).clamp_min(1e-4)  # 1e-3..1e-1
        self.step_bias = nn.Parameter(delta.expm1().log())  # softplus gives delta
        if heads:
            self.log_a = nn.Parameter(torch.rand(count, heads) * math.log(16))
        else:
            self.log_a = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(count, inner, 1))
            self.step_weight = nn.Parameter((torch.rand(count, inner, rank) * 2 - 1) * rank**-0.5)
        self.skip = nn.Parameter(torch.ones(count, inner))
        self.norm = ChannelNorm(inner)
        self.leave = Upsample(inner, channels, fold)

    def forward(self, x: Tensor) -> Tensor:
        v, g = self.enter(x).split(self.inner, 1)
        h, w = v.shape[2:]
        v = F.silu(self.mix(v))
        tokens = v.flatten(2).transpose(1, 2)  # (B, L, inner)
        p = self.parameters_of(v).flatten(2).transpose(1, 2)  # pointwise: before or after the order makes no difference
        total = tokens * self.skip.sum(0)
        ways = [scan_order(h, w, order, reverse, x.device) for order, reverse in self.directions]
        per = p.split(sum(self.sizes), 2)
        # index_select, because the gradient of plain indexing is slow
        u = torch.stack([tokens.index_select(1, go) for go, _ in ways], 1)  # (B, K, L, inner)
        delta, b, c = torch.stack([q.index_select(1, go) for q, (go, _) in zip(per, ways)], 1).split(self.sizes, 3)
        a = -self.log_a.exp()
        if self.heads:
            delta = F.softplus(delta + self.step_bias[:, None])
            y = headed_scan(u.unflatten(3, (self.heads, -1)), delta, a, b, c).flatten(3)
        else:
            delta = F.softplus(delta @ self.step_weight.transpose(1, 2) + self.step_bias[:, None])
            y = selective_scan(*(t.transpose(2, 3) for t in (u, delta)), a, *(t.transpose(2, 3) for t in (b, c)))
            y = y.transpose(2, 3)
        for k, (_, back) in enumerate(ways):
            total = total + y[:, k].index_select(1, back)
        y = self.norm(total.transpose(1, 2).unflatten(2, (h, w)))
        return self.leave(y * F.silu(g))
