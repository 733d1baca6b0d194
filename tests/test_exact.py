"""The exact layers against plain integers, and against themselves on other instruction sets and thread counts."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from neuralcodec.entropy.exact import (
    ACT_FRAC,
    ACT_MAX,
    FLOAT64_EXACT,
    ExactConv2d,
    ExactConvTranspose2d,
    ExactLeakyReLU,
    ExactLinear,
    ExactReLU,
    Grid,
    bounded,
    cat,
    freeze,
    frozen_tensors,
    hardtanh,
    integer_weights,
    load_frozen,
    matmul,
    pixel_shuffle,
    pixel_unshuffle,
    quantise,
    set_fake_quantisation,
)
from neuralcodec.entropy.exact_tables import (
    ExactExp,
    ExactGELU,
    ExactLayerNorm,
    ExactRMSNorm,
    ExactSigmoid,
    ExactSiLU,
    ExactSoftmax,
    ExactSoftplus,
    ExactTanh,
    div_round,
    isqrt,
    lookup,
)
from torch import Tensor, nn


def integers(name: str, shape: tuple[int, ...], limit: int) -> np.ndarray:
    """Integers -limit..limit, int64, that depend on nothing but their name."""
    count = math.prod(shape)
    words = np.frombuffer(hashlib.shake_256(name.encode()).digest(8 * count), "<u8")
    return (words % (2 * limit + 1)).astype(np.int64).reshape(shape) - limit


def grid(name: str, *shape: int, limit: int = ACT_MAX) -> Grid:
    """Random integers, a fifth of them at the ends of the range."""
    q = integers(name, shape, limit)
    ends = integers(name + " ends", shape, 10)
    q[ends > 8] = limit
    q[ends < -8] = -limit
    return Grid(torch.from_numpy(q).double(), limit=limit)


def of(x: Grid) -> np.ndarray:
    q = x.q.numpy()
    assert (q == np.floor(q)).all() and np.abs(q).max(initial=0) <= x.limit
    return q.astype(np.int64)


def finish(sums: np.ndarray, layer: nn.Module, dim: int) -> np.ndarray:
    """Bias, shift with halves upwards, clamp: in int64."""
    bias = layer.bias_q.numpy().astype(np.int64).reshape(-1, *(1,) * (-1 - dim))
    sums = sums + (bias << layer.shift)
    return ((sums + (1 << (layer.shift - 1))) >> layer.shift).clip(-ACT_MAX, ACT_MAX)


def reference_conv(x: np.ndarray, layer: ExactConv2d) -> np.ndarray:
    k, s, p, groups = layer.kernel_size[0], layer.stride[0], layer.padding[0], layer.groups
    weight = layer.weight_q.numpy().astype(np.int64)
    padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    out_h, out_w = ((side - k) // s + 1 for side in padded.shape[2:])
    out = np.zeros((len(x), len(weight), out_h, out_w), np.int64)
    cin, cout = x.shape[1] // groups, len(weight) // groups
    for g in range(groups):
        for i in range(k):
            for j in range(k):
                window = padded[:, g * cin : (g + 1) * cin, i : i + s * out_h : s, j : j + s * out_w : s]
                taps = weight[g * cout : (g + 1) * cout, :, i, j]
                out[:, g * cout : (g + 1) * cout] += np.einsum("oc,bchw->bohw", taps, window[:, :, :out_h, :out_w])
    return finish(out, layer, -3)


def spread(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Weights and biases large enough that results reach the clamp now and then."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale)
    return layer


@pytest.mark.parametrize(
    "cin, cout, k, stride, padding, groups, h, w",
    [
        (5, 7, 1, 1, None, 1, 4, 6),
        (5, 7, 3, 1, None, 1, 5, 4),
        (4, 3, 5, 1, None, 1, 1, 1),
        (3, 6, 3, 2, None, 3, 7, 6),
        (6, 6, 3, 1, None, 6, 4, 5),
        (6, 6, 5, 2, 1, 6, 9, 8),
        (1, 1, 3, 1, 0, 1, 4, 6),
        (3, 4, 4, 4, 0, 1, 8, 12),
        (4, 2, 5, 2, 1, 2, 9, 8),
        (2, 3, 1, 2, 0, 1, 5, 5),
    ],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 3000.0])
def test_conv_equals_integers(cin, cout, k, stride, padding, groups, h, w, scale):
    layer = spread(ExactConv2d(cin, cout, k, stride=stride, padding=padding, groups=groups), scale)
    freeze(layer)
    x = grid("conv", 2, cin, h, w)
    assert np.array_equal(of(layer(x)), reference_conv(of(x), layer))


def test_conv_in_pieces_positions_and_channels(monkeypatch):
    layer = spread(ExactConv2d(6, 4, 3))
    freeze(layer)
    x = grid("pieces", 1, 6, 9, 8)
    whole = layer(x).q.flatten(2)
    monkeypatch.setattr("neuralcodec.entropy.exact.COLUMN_ELEMENTS", 6 * 9 * 5)  # five positions at a time
    assert torch.equal(layer.gather(x).q, whole)
    where = torch.tensor([0, 3, 17, 71])
    assert torch.equal(layer.gather(x, where).q, whole[:, :, where])
    masked = x.masked((torch.arange(6) < 4).reshape(1, 6, 1, 1))
    assert torch.equal(layer.gather(x[:, :4], channels=slice(0, 4)).q, layer.gather(masked).q)
    assert layer.gather(x, where[:0]).shape == (1, 4, 0)


def test_depthwise_conv_at_positions():
    layer = spread(ExactConv2d(6, 6, 5, groups=6))
    freeze(layer)
    x = grid("depthwise", 2, 6, 9, 8)
    where = torch.tensor([0, 3, 17, 71])
    assert torch.equal(layer.gather(x, where).q, layer(x).q.flatten(2)[:, :, where])


def test_conv_1x1_takes_sequences():
    layer = spread(ExactConv2d(5, 4))
    freeze(layer)
    x = grid("sequence", 1, 5, 12)
    assert torch.equal(layer(x).q, layer(x.reshape(1, 5, 3, 4)).q.flatten(2))


@pytest.mark.parametrize("k, stride, padding, extra", [(5, 2, 2, 1), (4, 2, 1, 0), (3, 1, 1, 0), (2, 2, 0, 0)])
def test_transposed_conv_equals_integers(k, stride, padding, extra):
    layer = spread(ExactConvTranspose2d(3, 4, k, stride=stride, padding=padding, output_padding=extra))
    expected_shape = layer(torch.zeros(2, 3, 5, 4)).shape
    freeze(layer)
    x = grid("transposed", 2, 3, 5, 4)
    weight = layer.weight_q.numpy().astype(np.int64)
    full = np.zeros((2, 4, 4 * stride + k + extra, 3 * stride + k + extra), np.int64)
    for i in range(k):
        for j in range(k):
            part = np.einsum("co,bchw->bohw", weight[:, :, i, j], of(x))
            full[:, :, i : i + 5 * stride : stride, j : j + 4 * stride : stride][:, :, :5, :4] += part
    end_h, end_w = padding + expected_shape[2], padding + expected_shape[3]
    y = layer(x)
    assert y.shape == expected_shape
    assert np.array_equal(of(y), finish(full[:, :, padding:end_h, padding:end_w], layer, -3))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_integers(bias):
    layer = spread(ExactLinear(9, 5, bias=bias))
    freeze(layer)
    x = grid("linear", 2, 3, 9)
    sums = of(x) @ layer.weight_q.numpy().astype(np.int64).T
    assert np.array_equal(of(layer(x)), finish(sums, layer, -1))


def test_sums_just_below_the_limit_are_exact_and_beyond_it_are_refused():
    fan_in = 524_000
    layer = ExactLinear(fan_in, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(32767 / 32768)
        layer.weight[1] *= -1
    freeze(layer)
    assert FLOAT64_EXACT * 0.998 < layer.bound() < FLOAT64_EXACT
    q = np.full(fan_in, ACT_MAX, np.int64)
    q[::3] -= 1  # odd numbers too, so that every bit of the sum counts
    sums = int(q.sum()) * 32767
    row = torch.from_numpy(q).double()[None]
    weights = layer._cached((), lambda: layer.weight_q.t())
    assert [int(v) for v in (row @ weights)[0]] == [sums, -sums]
    assert of(layer(Grid(row))).tolist() == [[ACT_MAX, -ACT_MAX]]

    wider = ExactLinear(fan_in + 800, 1, bias=False)
    wider.weight.data.fill_(32767 / 32768)
    with pytest.raises(ValueError, match="0: sums can reach"):
        freeze(nn.Sequential(wider))


@pytest.mark.parametrize("value", [math.nan, math.inf, 16384.0])
def test_weights_that_fit_no_grid_are_refused(value):
    layer = ExactLinear(3, 2)
    layer.weight.data[1, 1] = value
    with pytest.raises(ValueError, match="too large"):
        freeze(layer)
    layer = ExactLinear(3, 2)
    layer.bias.data[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        freeze(layer)


@pytest.mark.parametrize("largest", [1e-9, 0.01, 0.5, 1.0, 1.5, 16383.0])
def test_weights_use_their_16_bits(largest):
    weight = torch.tensor([largest, -largest / 3, 0.0])
    q, frac = integer_weights(weight)
    assert 1 <= frac <= 24 and q.dtype == torch.int16
    assert (q.double() * 2.0**-frac - weight).abs().max() <= 2.0 ** (-frac)
    assert int(q[0]) >= 16384 or frac == 24
    assert integer_weights(torch.zeros(2))[0].tolist() == [0, 0]


def test_ranges_are_checked_before_any_data():
    a = Grid(torch.zeros(1, 4, 2, 2).double())
    layer = ExactConv2d(4, 4)
    with pytest.raises(RuntimeError, match="freeze"):
        layer(a)
    freeze(layer)
    with pytest.raises(ValueError, match="takes 2"):
        layer(a + a)
    assert layer((a + a).clamp()).limit == ACT_MAX
    with pytest.raises(ValueError, match="takes 2"):
        layer(Grid(a.q, 10))
    with pytest.raises(ValueError, match="beyond"):
        matmul(Grid(a.q, 12, 1 << 26), Grid(a.q, 12, 1 << 26))
    with pytest.raises(ValueError, match="beyond"):
        Grid(a.q, 12, 1 << 26) * Grid(a.q, 12, 1 << 26)
    with pytest.raises(ValueError, match="beyond"):
        a.at(60)
    with pytest.raises(TypeError, match="float64"):
        Grid(a.q.float())
    with pytest.raises(ValueError, match="joined"):
        a + a.at(11)
    with pytest.raises(ValueError, match="joined"):
        cat([a, a.at(11)])


def test_grid_operators_equal_integers():
    a, b = grid("a", 2, 4, 4, 6), grid("b", 2, 4, 4, 6, limit=1 << 14)
    x, y = of(a), of(b)
    assert np.array_equal(of(a + b), x + y) and np.array_equal(of(a - b), x - y)
    assert np.array_equal(of(a * b), (x * y + 2048) >> 12)
    assert np.array_equal(of(a * 0.125), (x + 4) >> 3)
    assert np.array_equal(of(a * -3.0), -3 * x)
    assert np.array_equal(of(a.at(9)), (x + 4) >> 3) and np.array_equal(of(a.at(14)), x * 4)
    assert np.array_equal(of(hardtanh(a)), x.clip(-4096, 4096))
    assert np.array_equal(of(cat([a, b])), np.concatenate([x, y], 1))
    assert np.array_equal(of(a[:, 1:3]), x[:, 1:3])
    assert np.array_equal(of(a.chunk(2, 1)[1]), x[:, 2:]) and np.array_equal(of(a.split([1, 3], 1)[1]), x[:, 1:])
    assert np.array_equal(of(a.permute(0, 2, 3, 1).reshape(8, 24)), x.transpose(0, 2, 3, 1).reshape(8, 24))
    assert torch.equal(pixel_unshuffle(pixel_shuffle(a, 2), 2).q, a.q)
    assert np.array_equal(of(ExactReLU()(a)), x.clip(0))
    assert np.array_equal(of(ExactLeakyReLU(3 / 256)(a)), np.where(x < 0, (3 * x + 128) >> 8, x))
    product = (x @ y.transpose(0, 1, 3, 2) + 2048) >> 12
    assert np.array_equal(of(matmul(a, b.transpose(2, 3))), product.clip(-ACT_MAX, ACT_MAX))
    assert quantise(torch.tensor([0.5, -1e9, 2.0**-13])).q.tolist() == [2048, -ACT_MAX, 1]
    assert quantise(torch.tensor([0.7])).value().item() == 2867 / 4096


@given(st.integers(-(2**51) + 1, 2**51 - 1), st.integers(1, 2**50 - 1), st.integers(-2, 2))
@settings(max_examples=300, deadline=None)
def test_division_equals_integers(a, b, nudge):
    for top in (a, max(min((a // b) * b + nudge, 2**51 - 1), 1 - 2**51), max(min(b // 2 + nudge, 2**51 - 1), 0)):
        q = div_round(torch.tensor([float(top)], dtype=torch.float64), torch.tensor([float(b)], dtype=torch.float64))
        assert int(q) == (2 * top + b) // (2 * b)


@given(st.integers(0, 2**26 - 1), st.integers(-1, 1))
@settings(max_examples=300, deadline=None)
def test_square_root_equals_integers(root, nudge):
    v = max(root * root + nudge, 0)
    assert int(isqrt(torch.tensor([float(v)], dtype=torch.float64))) == math.isqrt(v)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_first_guess_off_by_one_is_corrected(off, monkeypatch):
    """As on hardware that divides by multiplying with the reciprocal."""
    a, b = torch.arange(-60.0, 60.0).double(), torch.full((120,), 8.0).double()
    squares = torch.arange(1.0, 120.0).double()
    quotients, roots = div_round(a, b), isqrt(squares)
    floor = torch.floor
    monkeypatch.setattr(torch, "floor", lambda x: floor(x) + off)
    assert torch.equal(div_round(a, b), quotients) and torch.equal(isqrt(squares), roots)


ACTIVATIONS = [ExactGELU, ExactSiLU, ExactSoftplus, ExactSigmoid, ExactTanh]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_is_close_to_its_function(kind):
    layer = kind()
    x = Grid(torch.arange(-20 << ACT_FRAC, 20 << ACT_FRAC, 7, dtype=torch.float64))
    true = layer(x.value())
    freeze(layer)
    assert (layer(x).q - true * 2.0**ACT_FRAC).abs().max() < 0.7
    ends = layer(Grid(torch.tensor([-ACT_MAX, ACT_MAX], dtype=torch.float64))).value()
    assert (ends - layer.function(torch.tensor([-128.0, 128.0], dtype=torch.float64))).abs().max() < 0.7 * 2**-ACT_FRAC


def test_exp_is_close_and_clamped():
    layer = ExactExp()
    freeze(layer)
    x = Grid(torch.arange(-9 << ACT_FRAC, round(4.85 * 2**ACT_FRAC), 5, dtype=torch.float64))
    true = torch.exp(x.value()) * 2.0**ACT_FRAC
    assert ((layer(x).q - true).abs() <= 0.7 + 1e-5 * true).all()
    assert layer(Grid(torch.tensor([float(ACT_MAX)]).double())).q.item() == ACT_MAX


def test_lookup_equals_integers():
    table = torch.from_numpy(integers("table", (40,), 2**27)).to(torch.int32)
    q = np.concatenate([np.arange(39 * 32 + 1), [39 * 32 + 1, ACT_MAX * 2]])
    t = [int(v) for v in table]
    expected = []
    for v in q.tolist():
        v = min(v, 39 * 32)
        node, rest = divmod(v, 32)
        expected.append(t[node] + (((t[min(node + 1, 39)] - t[node]) * rest + 16) >> 5))
    assert [int(v) for v in lookup(table, torch.from_numpy(q).double())] == expected


def test_softmax_equals_integers_and_is_close():
    layer = ExactSoftmax(1)
    x = grid("softmax", 3, 50, 2, limit=6 << ACT_FRAC)
    true = layer(x.value())
    freeze(layer)
    y = layer(x)
    assert (y.value() - true).abs().max() < 1e-5
    assert (y.value().sum(1) - 1).abs().max() < 50 * 2.0**-20
    table = [int(v) for v in layer.table_q]
    for row in of(x).transpose(0, 2, 1).reshape(-1, 50):
        e = []
        for v in row.tolist():
            node, rest = divmod(min(int(row.max()) - v, 15 << ACT_FRAC), 32)
            e.append(table[node] if rest == 0 else table[node] + (((table[node + 1] - table[node]) * rest + 16) >> 5))
        expected = [((v << 21) + sum(e)) // (2 * sum(e)) for v in e]
        got = layer(Grid(torch.from_numpy(row).double()[None, :])).q[0].long().tolist()
        assert got == expected
    alone = layer(Grid(torch.tensor([[float(ACT_MAX), -float(ACT_MAX)]]).double()))
    assert alone.q.tolist() == [[2**20, 0]]


@pytest.mark.parametrize("kind", [ExactLayerNorm, ExactRMSNorm])
@pytest.mark.parametrize("limit", [3, 4096, ACT_MAX])
def test_norm_equals_integers_and_is_close(kind, limit):
    c = 48
    layer = kind(c, dim=1)
    torch.manual_seed(2)
    for parameter in layer.parameters():
        parameter.data.add_(0.2 * torch.randn(c))
    x = grid("norm", 2, c, 3, limit=limit)
    true = layer.double()(x.value())
    freeze(layer)
    y = layer(Grid(x.q))
    assert (y.value() - true).abs().max() < 2e-3
    weight, bias = layer.weight_q.long().tolist(), layer.bias_q.tolist()
    for row, got in zip(of(x).transpose(0, 2, 1).reshape(-1, c), of(y).transpose(0, 2, 1).reshape(-1, c)):
        q = row.tolist()
        total = sum(q) if layer.centred else 0
        mean = (2 * total + c) // (2 * c)
        square = sum((v - mean) ** 2 for v in q)
        root = math.isqrt(((2 * square + c) // (2 * c)) * 4096 + max(1, round(layer.eps * 2**36)))
        for v, w, b, result in zip(q, weight, bias, got.tolist()):
            n = (2 * ((c * v - total) << 18) + c * root) // (2 * c * root)
            n = max(-ACT_MAX, min(ACT_MAX, n))
            sums = n * w + (b << layer.shift)
            assert result == max(-ACT_MAX, min(ACT_MAX, (sums + (1 << (layer.shift - 1))) >> layer.shift))


def test_norm_refuses_too_many_channels():
    with pytest.raises(ValueError, match="4096"):
        ExactRMSNorm(4097)


class Mixture(nn.Module):
    """One of everything: maps (B, 6, h, w), h and w even, through convolutions and attention over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(ExactConv2d(6, 12, 5, stride=2), ExactGELU(), ExactConv2d(12, 12, 3, groups=12))
        self.norm = ExactLayerNorm(12, dim=1)
        self.qkv = ExactLinear(12, 36)
        self.softmax = ExactSoftmax()
        self.rms = ExactRMSNorm(12)
        self.gate = nn.Sequential(ExactLinear(12, 12), ExactSigmoid())
        self.up = ExactConvTranspose2d(12, 8, 5, stride=2, padding=2, output_padding=1)
        self.out = nn.Sequential(ExactLeakyReLU(1 / 64), ExactConv2d(8, 16), ExactTanh())

    def forward(self, x: Tensor | Grid) -> Tensor | Grid:
        x = self.norm(self.down(x))
        b, c, h, w = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
        q, k, v = self.qkv(tokens).chunk(3, 2)
        attended = matmul(self.softmax(matmul(q, k.transpose(1, 2)) * 12**-0.5), v)
        tokens = self.rms(bounded(attended * self.gate(tokens) + tokens))
        y = self.up(tokens.reshape(b, h, w, c).permute(0, 3, 1, 2))
        return pixel_shuffle(self.out(y), 2)


def test_network_is_close_to_its_float_form():
    torch.manual_seed(3)
    net = Mixture()
    x = grid("closeness", 1, 6, 8, 10, limit=3 << ACT_FRAC)
    true = net(x.value().float())
    freeze(net)
    error = (net(x).value() - true).abs()
    assert error.mean() < 5e-4 and error.max() < 5e-3 and true.std() > 0.1


def test_frozen_integers_load_into_a_fresh_network():
    torch.manual_seed(4)
    net, fresh = Mixture(), Mixture()
    freeze(net)
    tensors = frozen_tensors(net)
    assert all(not t.is_floating_point() for t in tensors.values())
    load_frozen(fresh, {k: v.clone() for k, v in tensors.items()})
    assert not list(fresh.parameters())
    x = grid("load", 1, 6, 4, 4)
    assert torch.equal(net(x).q, fresh(x).q)
    again = frozen_tensors(fresh)
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[k], again[k]) for k in tensors)


def test_integers_that_do_not_fit_are_refused():
    net = Mixture()
    freeze(net)
    tensors = frozen_tensors(net)
    with pytest.raises(KeyError):
        load_frozen(Mixture(), {k: v for k, v in tensors.items() if k != "qkv.weight_q"})
    large = {"qkv.bias_q": torch.full((36,), 2**31 - 1, dtype=torch.int32), "qkv.weight_frac": torch.tensor(24).int()}
    with pytest.raises(ValueError, match="qkv: sums can reach"):
        load_frozen(Mixture(), tensors | large)
    for key, value, message in [
        ("surplus.weight_q", torch.zeros(1), "no layer takes surplus.weight_q"),
        ("qkv.weight_q", tensors["qkv.weight_q"][1:], "qkv: weights of shape"),
        ("qkv.weight_q", tensors["qkv.weight_q"].float(), "qkv: these are not the integers"),
        ("qkv.weight_frac", torch.tensor(25, dtype=torch.int32), "qkv: these are not the integers"),
        ("softmax.table_q", tensors["softmax.table_q"][1:], "softmax: this is not the table"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_frozen(Mixture(), tensors | {key: value})


def test_fake_quantisation_is_the_frozen_layer_with_gradients():
    layer = nn.Sequential(spread(ExactConv2d(3, 4, 3), 0.3), ExactReLU(), spread(ExactConv2d(4, 2), 0.3)).double()
    x = grid("fake", 1, 3, 5, 5, limit=1 << ACT_FRAC)
    plain = layer(x.value())
    set_fake_quantisation(layer)
    fake = layer(x.value())
    fake.sum().backward()
    gradient = layer[0].weight.grad.clone()
    layer.zero_grad()
    plain.sum().backward()
    assert torch.allclose(gradient, layer[0].weight.grad, rtol=0.02, atol=0.02)
    freeze(layer)
    assert torch.equal(layer(x).value(), fake) and not torch.equal(plain, fake)


def counted(net: nn.Module) -> nn.Module:
    """``net`` with integers from their names alone: the same for ever, whatever torch's generators or exp do."""
    freeze(net)
    tensors = {}
    for name, old in frozen_tensors(net).items():
        if name.endswith("weight_frac"):
            tensors[name] = torch.tensor(15, dtype=torch.int32)
        elif name == "softmax.table_q":  # positive and falling
            tensors[name] = (2**20 // (1 + torch.arange(len(old)))).to(torch.int32)
        else:
            limit = {"weight_q": 12000, "bias_q": 1 << 12, "table_q": 1 << 21}[name.rsplit(".", 1)[1]]
            tensors[name] = torch.from_numpy(integers(name, tuple(old.shape), limit)).to(old.dtype)
    load_frozen(net, tensors)
    return net


def digest() -> str:
    """sha256 of what the counted network makes of extreme inputs, at every thread count and oneDNN setting."""
    net = counted(Mixture())
    torch.set_float32_matmul_precision("medium")  # must not matter: nothing is float32
    digests = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for onednn in (True, False):
            with torch.no_grad(), torch.backends.mkldnn.flags(enabled=onednn):
                sha = hashlib.sha256()
                for h, w, limit in ((2, 4, ACT_MAX), (16, 12, ACT_MAX), (34, 26, ACT_MAX), (16, 16, 1 << 11)):
                    sha.update(of(net(grid("digest", 1, 6, h, w, limit=limit))).astype("<i4").tobytes())
                digests.add(sha.hexdigest())
    return " ".join(sorted(digests))


GOLDEN = "ce37b2820bbb19e05938a3d8d5875e82ab3b28886bbf9ddd69cb571885dbcced"


def test_every_instruction_set_and_thread_count_gives_the_golden_bits():
    """ATen's vector code and MKL's kernels are both held down to older instruction sets."""
    top = torch.backends.cpu.get_cpu_capability()
    levels = [{"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}]
    levels += [{"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"}] if top in ("AVX2", "AVX512") else []
    levels += [{"ATEN_CPU_CAPABILITY": "avx512"}] if top == "AVX512" else []
    path = os.pathsep.join(filter(None, sys.path))
    runs = [
        subprocess.Popen([sys.executable, __file__], env={**os.environ, "PYTHONPATH": path, **level},
                         stdout=subprocess.PIPE, text=True)
        for level in levels
    ]  # fmt: skip
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == [GOLDEN] * len(levels)


if __name__ == "__main__":
    print(digest())
