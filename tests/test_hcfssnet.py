from dataclasses import replace

import pytest
import torch
from contract import ImageCodecContract
from neuralcodec.codecs.base import count_parameters
from neuralcodec.codecs.hcfssnet import HCFSSNet, HybridBlock, Scan
from neuralcodec.entropy.context.fstam import COSINES, FSTAM, ExactAFMM, exact_dct
from neuralcodec.entropy.exact import freeze, quantise
from neuralcodec.nn.frequency import AFMM, FrequencyGate, dct_matrix, from_blocks, to_blocks
from neuralcodec.nn.scan import ORDERS, VONSS, directions, headed_scan, scan_order, selective_scan


class TestHCFSSNet(ImageCodecContract):
    model = "hcfssnet:test"


def loop(u, delta, a, b, c):
    """The recurrence, one step after the other: u, delta (..., D, L), a (..., D, N), b, c (..., N, L) -> (..., D, L)."""
    state, out = torch.zeros(*u.shape[:-1], a.shape[-1], dtype=u.dtype), []
    for t in range(u.shape[-1]):
        state = torch.exp(delta[..., t, None] * a) * state + (delta[..., t] * u[..., t])[..., None] * b[..., None, :, t]
        out.append((state * c[..., None, :, t]).sum(-1))
    return torch.stack(out, -1)


def headed_as_loop(x, delta, a, b, c):
    """``headed_scan``'s arguments to the loop: every channel of a head gets its decay and step."""
    width, states = x.shape[-1], b.shape[-1]
    u = x.flatten(-2).transpose(-1, -2)
    steps = delta.repeat_interleave(width, -1).transpose(-1, -2)
    decay = a.repeat_interleave(width, -1)[..., None].expand(*a.shape[:-1], -1, states)
    y = loop(u, steps, decay, b.transpose(-1, -2), c.transpose(-1, -2))
    return y.transpose(-1, -2).unflatten(-1, x.shape[-2:])


def scan_inputs(form, length, size, seed=0):
    """Random arguments of a scan: 2 pictures, 3 directions, 4 channels (2 heads of 2), 3 states; steps up to ``size``."""
    torch.manual_seed(seed)
    if form is selective_scan:
        u, steps, a, b = (2, 3, 4, length), (2, 3, 4, length), (3, 4, 3), (2, 3, 3, length)
    else:
        u, steps, a, b = (2, 3, length, 2, 2), (2, 3, length, 2), (3, 2), (2, 3, length, 3)
    u, b, c = (torch.randn(shape, dtype=torch.float64) for shape in (u, b, b))
    return u, size * torch.rand(steps, dtype=torch.float64), -3 * torch.rand(a, dtype=torch.float64), b, c


FORMS = [(selective_scan, loop), (headed_scan, headed_as_loop)]


@pytest.mark.parametrize(("form", "reference"), FORMS)
@pytest.mark.parametrize(("length", "chunk"), [(1, 4), (5, 8), (64, 8), (61, 8), (300, 4)])
@pytest.mark.parametrize("size", [1e-7, 1.0, 200.0])
def test_scan_equals_the_loop(form, reference, length, chunk, size):
    args = scan_inputs(form, length, size)
    want = reference(*args)
    assert torch.allclose(form(*args, chunk=chunk), want, rtol=1e-11, atol=1e-13 * float(want.abs().max()))
    assert torch.isfinite(form(*(t.float() for t in args), chunk=chunk)).all()


@pytest.mark.parametrize(("form", "reference"), FORMS)
def test_scan_gradients(form, reference):
    """Against the loop's for every argument; 61 tokens in chunks of 8, and 64 with a numerical check."""
    args = [t.requires_grad_() for t in scan_inputs(form, 61, 1.0)]
    weight = torch.randn_like(args[0])
    got = torch.autograd.grad((form(*args, chunk=8) * weight).sum(), args)
    want = torch.autograd.grad((reference(*args) * weight).sum(), args)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    args = [t.requires_grad_() for t in scan_inputs(form, 64, 1.0)]
    assert torch.autograd.gradcheck(lambda *a: form(*a, chunk=8), args, fast_mode=True)


def test_scan_without_steps_is_silent_and_far_steps_forget():
    args = list(scan_inputs(headed_scan, 40, 1.0))
    args[1] = torch.zeros_like(args[1])
    assert (headed_scan(*args) == 0).all()
    u, delta, a, b, c = scan_inputs(selective_scan, 40, 1.0)
    delta, a = torch.full_like(delta, 1e4), a - 1
    want = delta * u * (b * c).sum(-2, keepdim=True)  # nothing of the earlier state is left
    assert torch.allclose(selective_scan(u, delta, a, b, c), want)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 6), (5, 1), (4, 4), (5, 7), (8, 3)])
def test_orders_visit_all_and_keep_neighbours(order, h, w):
    for reverse in (False, True):
        go, back = scan_order(h, w, order, reverse)
        assert torch.equal(go[back], torch.arange(h * w)) and torch.equal(go.sort()[0], torch.arange(h * w))
        steps = torch.maximum((go // w).diff().abs(), (go % w).diff().abs())
        assert (steps == 1).all()
    assert torch.equal(scan_order(h, w, order, True)[0], scan_order(h, w, order, False)[0].flip(0))


def test_directions():
    assert len(set(directions(8, 0))) == 8
    assert set(directions(4, 0)) | set(directions(4, 1)) == set(directions(8, 0))
    assert {o for k in (0, 1) for o, _ in directions(2, k)} == set(ORDERS)
    with pytest.raises(ValueError, match="3"):
        directions(3, 0)


@pytest.mark.parametrize("heads", [0, 2])
def test_vonss_is_the_sum_of_its_directions(heads):
    """Against a plain loop along each order."""
    torch.manual_seed(1)
    net = VONSS(8, 8, 2, 4, 1, heads).double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    v, g = net.enter(x).split(8, 1)
    v = torch.nn.functional.silu(net.mix(v))
    p = net.parameters_of(v).flatten(2).split(sum(net.sizes), 1)
    flat, total = v.flatten(2), 0
    for k, (order, reverse) in enumerate(net.directions):
        go, back = scan_order(5, 6, order, reverse)
        steps, b, c = p[k][:, :, go].split(net.sizes, 1)
        a = -net.log_a[k].exp()
        if heads:
            steps = steps.repeat_interleave(4, 1) + net.step_bias[k].repeat_interleave(4)[:, None]
            a = a.repeat_interleave(4)[:, None].expand(8, 2)
        else:
            steps = net.step_weight[k] @ steps + net.step_bias[k][:, None]
        y = loop(flat[:, :, go], torch.nn.functional.softplus(steps), a, b, c)
        total = total + y[:, :, back] + net.skip[k][:, None] * flat
    want = net.leave(net.norm(total.unflatten(2, (5, 6))) * torch.nn.functional.silu(g))
    assert torch.allclose(net(x), want, rtol=1e-10, atol=1e-12)


def test_dct_and_blocks():
    dct = dct_matrix()
    assert torch.allclose(dct @ dct.T, torch.eye(8, dtype=torch.float64), atol=1e-14)
    angle = torch.arange(8, dtype=torch.float64) * torch.pi / 16
    assert torch.equal(torch.round(2**13 * angle.cos() / 2), torch.tensor(COSINES, dtype=torch.float64))
    assert (exact_dct().value() - torch.kron(dct, dct)).abs().max() < 2**-13
    x = torch.randn(2, 3, 16, 24)
    assert torch.equal(from_blocks(to_blocks(x), 16, 24), x)
    assert torch.equal(to_blocks(x)[1, 1, 2, :, 0], x[1, 0, 8:16, 16:24].reshape(-1))
    assert from_blocks(to_blocks(x[:, :, :13, :9]), 13, 9).shape == (2, 3, 13, 9)


def test_frequency_gate_starts_as_the_identity_and_weighs_frequencies():
    gate, x = FrequencyGate(8), torch.randn(2, 8, 20, 11)
    assert torch.allclose(gate(x), x, atol=1e-5)
    with torch.no_grad():
        gate.base[:, 1:] = gate.base[:, :, 1:] = -100  # of every block its mean is left
        y = gate(x[:, :, :16, :8])
    assert torch.allclose(y[0, 0, 8:], x[0, 0, 8:16, :8].mean().expand(8, 8), atol=1e-5)
    assert AFMM(8)(x).shape == x.shape


BLOCKS = [lambda: ExactAFMM(16), lambda: FSTAM(16, 16, 12, 2, 1), lambda: FSTAM(16, 24, 12, 3, 2, window=4)]


@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize(("h", "w"), [(8, 8), (4, 4), (20, 12), (16, 24)])
def test_frozen_blocks_follow_their_float_selves(make, h, w):
    """Within three steps of the activation grid, also where windows and blocks are padded."""
    torch.manual_seed(2)
    net = make()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.add_(0.1 * torch.randn_like(p))
        x = quantise(torch.randn(1, 16, h, w))
        want = net(x.value().float())
        freeze(net)
        got = net(x)
    assert got.limit <= 1 << 19
    assert (got.value() - want).abs().max() * 4096 < 4


def test_hybrid_block_rests_as_the_identity():
    block = HybridBlock(16, Scan(2, 1, 2), 0, fold=2)
    x = torch.randn(1, 16, 8, 12)
    assert not torch.equal(block(x), x)
    block.rest()
    assert torch.equal(block(x), x)


def small(**changes):
    """A codec with every part of the paper preset, at a width that a test can afford."""
    paper = HCFSSNet.presets["paper"]
    latent = replace(paper.latent, slices=(8, 8), hyper=8, width=16, features=16, attention=16, heads=2, units=1, context=16,
                     trunk=16, residual=16, **changes)  # fmt: skip
    return HCFSSNet(replace(paper, widths=(16,), latent=latent))


def test_published_transform_and_branches_code_exactly():
    torch.manual_seed(3)
    codec = small()
    x = torch.rand(2, 3, 64, 128)
    out = codec(x, torch.tensor([100.0, 800.0]))
    assert out.x_hat.shape == x.shape
    (sum(out.bits.values()).sum() / 1000 + out.x_hat.square().mean()).backward()
    assert not [n for n, p in codec.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    freeze(codec.eval())
    with torch.inference_mode():
        y = codec.analyse(x[:1], 500)
        payload, y_hat = codec.encode_latent(y, 500)
        assert torch.equal(codec.decode_latent(payload, 4, 8, 500), y_hat)
        assert codec.synthesise(y_hat, 500).shape == (1, 3, 64, 128)
    with pytest.raises(ValueError, match="3"):
        small(branches=3)


def test_sizes_of_the_presets():
    """paper: the specification expects 75 to 85 M from exchanging TCM-L's Swin blocks (76.6 M) for VFSS."""
    with torch.device("meta"):
        sizes = {preset: count_parameters(HCFSSNet.from_preset(preset)) for preset in HCFSSNet.presets}
    assert sizes["paper"] == 75_132_364
    assert sizes["light"] <= 1_500_000 and sizes["base"] <= 8_000_000 and sizes["test"] <= 100_000
