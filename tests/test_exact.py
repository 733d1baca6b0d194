import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from neuralcodec.entropy import exact
from neuralcodec.entropy.exact import (
    ACT_FRAC,
    ACT_MAX,
    ExactConv2d,
    ExactGELU,
    ExactLayerNorm,
    ExactLinear,
    ExactReLU,
    ExactSigmoid,
    ExactSoftmax,
    ExactTanh,
    Grid,
    freeze,
    frozen_tensors,
    load_frozen,
)
from torch import nn


def grid(*shape: int, top: int = ACT_MAX, seed: int = 0) -> Grid:
    q = torch.from_numpy(np.random.default_rng(seed).integers(-top, top, shape, endpoint=True))
    return Grid(q.double())


def reference_conv(layer: ExactConv2d, q: np.ndarray) -> np.ndarray:
    """The convolution in Python integers (object arrays), rounding halves upwards."""
    weight, bias = layer.weight_q.numpy().astype(object), layer.bias_q.numpy().astype(object)
    out, per_group, k, _ = weight.shape
    padded = np.pad(q.astype(object), ((0, 0), (k // 2,) * 2, (k // 2,) * 2), constant_values=0)
    result = np.zeros((out, *q.shape[1:]), object)
    for o in range(out):
        first = o // (out // layer.groups) * per_group
        for c in range(per_group):
            for i in range(k):
                for j in range(k):
                    result[o] += weight[o, c, i, j] * padded[first + c, i : i + q.shape[1], j : j + q.shape[2]]
        shift = layer.shift
        result[o] = ((result[o] << 1 << max(-shift, 0)) + (1 << shift)) >> shift + 1 if shift >= 0 else result[o] << -shift
        result[o] += bias[o]
    return np.clip(result.astype(np.int64), -ACT_MAX, ACT_MAX)


@pytest.mark.parametrize("kernel, groups", [(1, 1), (3, 1), (5, 1), (3, 6)])
@pytest.mark.parametrize("top", [3, ACT_MAX])
def test_conv_is_integer_arithmetic(kernel, groups, top):
    torch.manual_seed(0)
    layer = ExactConv2d(6, 12, kernel, groups=groups)
    freeze(layer)
    x = grid(1, 6, 7, 9, top=top)
    assert np.array_equal(layer(x).q[0].numpy(), reference_conv(layer, x.q[0].numpy().astype(np.int64)))


def test_float32_kernel_gives_the_same_bits():
    """Where the bound allows float32 it is chosen, and gives what float64 gives."""
    torch.manual_seed(0)
    layer = ExactConv2d(8, 8, 3)
    freeze(layer)
    assert layer.kernel_dtype() is torch.float64
    assert layer.kernel_dtype(1) is torch.float32
    x = grid(1, 8, 16, 16, top=1)
    assert torch.equal(layer.gather(x, input_max=1).q, layer.gather(x).q)


def test_gather_is_a_part_of_the_whole():
    layer = ExactConv2d(5, 4, 3)
    freeze(layer)
    x = grid(1, 3, 6, 8)
    where = torch.tensor([0, 7, 13, 47])
    full = torch.zeros(1, 5, 6, 8, dtype=torch.float64)
    full[:, :3] = x.q
    whole = layer(Grid(full)).q.flatten(2)
    assert torch.equal(layer.gather(x, where, slice(0, 3)).q, whole[:, :, where])


def test_overflow_is_refused():
    layer = ExactConv2d(4, 1)
    freeze(layer)
    tensors = frozen_tensors(layer)
    tensors[".bias_q"] = torch.tensor([2**31 - 1], dtype=torch.int32)
    tensors[".weight_frac"] = torch.tensor(24, dtype=torch.int32)
    with pytest.raises(ValueError, match="2\\*\\*53"):
        load_frozen(layer, tensors)
    with pytest.raises(ValueError, match="overflow"):
        exact.matmul(grid(64, 4096, top=1 << 24), grid(4096, 64, top=1 << 24))


def network() -> nn.Sequential:
    """Every exact layer once."""
    torch.manual_seed(1)
    net = nn.Sequential(
        ExactConv2d(6, 16, 3), ExactReLU(), ExactConv2d(16, 16, 5, groups=16), ExactGELU(), ExactLayerNorm(16),
        ExactConv2d(16, 16), ExactTanh(), ExactConv2d(16, 24), ExactSigmoid(), ExactConv2d(24, 8), ExactSoftmax(1),
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2)
    return net.eval()


def test_exact_stays_close_to_float():
    net = network()
    x = grid(1, 6, 12, 10, top=4 << ACT_FRAC)
    with torch.no_grad():
        real = net.double()(x.value())
    net.float()
    freeze(net)
    assert (net(x).value() - real).abs().max() < 2e-3


def test_functions():
    x = Grid(torch.arange(-20 << ACT_FRAC, 20 << ACT_FRAC, 37, dtype=torch.float64)[None])
    for layer, function in ((ExactTanh(), torch.tanh), (ExactSigmoid(), torch.sigmoid), (ExactGELU(), nn.functional.gelu)):
        freeze(layer)
        assert (layer(x).value() - function(x.value())).abs().max() < 3 * 2.0**-ACT_FRAC
    softmax = ExactSoftmax(1)
    freeze(softmax)
    p = softmax(grid(3, 50, top=5 << ACT_FRAC)).value()
    assert (p.sum(1) - 1).abs().max() < 50 * 2.0**-ACT_FRAC


def test_matmul_and_linear():
    a, b = grid(3, 7, 20, seed=1), grid(3, 20, 5, seed=2)
    wide = np.matmul(a.q.numpy().astype(object), b.q.numpy().astype(object))
    expected = np.clip(((wide * 2 + (1 << ACT_FRAC)) >> ACT_FRAC + 1).astype(np.int64), -ACT_MAX, ACT_MAX)
    assert np.array_equal(exact.matmul(a, b).q.numpy(), expected)
    layer = ExactLinear(5, 3)
    x = grid(2, 5, 11, top=1 << ACT_FRAC)
    real = layer(x.value().float())
    freeze(layer)
    assert layer(x).shape == (2, 3, 11) and (layer(x).value() - real).abs().max() < 1e-2


def test_freeze_and_load_agree():
    net, other = network(), network()
    freeze(net)
    load_frozen(other, frozen_tensors(net))
    x = grid(1, 6, 9, 9)
    assert torch.equal(net(x).q, other(x).q)
    assert not list(net.parameters())


def test_float_layers_train():
    layer = ExactConv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias, padding=1))
    layer.fake_quant = True
    layer(x).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    with pytest.raises(RuntimeError, match="freeze"):
        layer(grid(1, 3, 5, 5))


PROBE = """
import hashlib, json, sys, torch
sys.path.insert(0, sys.argv[1])
from test_exact import grid, network
from neuralcodec.entropy.exact import freeze
net = network(); freeze(net)
hashes = []
for threads in (1, 2):
    torch.set_num_threads(threads)
    for flag in (True, False):
        with torch.backends.mkldnn.flags(enabled=flag):
            torch.set_float32_matmul_precision("medium")
            out = b"".join(net(grid(1, 6, 33, 47, top=t, seed=t)).q.numpy().tobytes() for t in (9, 1 << 14, 1 << 19))
            hashes.append(hashlib.sha256(out).hexdigest())
print(json.dumps([torch.backends.cpu.get_cpu_capability(), hashes]))
"""


def test_same_bits_everywhere():
    """Instruction sets x threads x oneDNN, each capability in its own process."""
    seen, capabilities = set(), set()
    for capability in ("default", "avx2", "avx512"):
        env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        run = subprocess.run([sys.executable, "-c", PROBE, os.path.dirname(__file__)], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        name, hashes = json.loads(run.stdout.splitlines()[-1])
        capabilities.add(name)
        seen |= set(hashes)
    assert len(seen) == 1 and len(capabilities) > 1
    net = network()
    freeze(net)
    out = b"".join(net(grid(1, 6, 33, 47, top=t, seed=t)).q.numpy().tobytes() for t in (9, 1 << 14, 1 << 19))
    assert seen == {hashlib.sha256(out).hexdigest()}
