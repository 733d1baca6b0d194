"""S2LIC: the contract, and its own parts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from contract import ImageCodecContract
from neuralcodec.codecs.base import count_parameters
from neuralcodec.codecs.s2lic import S2LIC, AcgcConfig, AcgcHyperprior, Config, margins
from neuralcodec.entropy.context.acgc import (
    AcgcSlice,
    ChannelContext,
    Functions,
    GlobalAttention,
    InterContext,
    mean_over_map,
    sample,
    sample_places,
)
from neuralcodec.entropy.context.checkerboard import anchor_mask, positions
from neuralcodec.entropy.exact import ACT_FRAC, Grid, freeze, quantise
from neuralcodec.nn.enhance import DenseBlock, Enhancement
from neuralcodec.nn.swin import CosineWindowAttention, SwinStage, SwinV2Block, spoiled

STEP = 2.0**-ACT_FRAC
SMALL = AcgcConfig((8, 8), hyper=4, width=16, features=32, squeeze=0, branch=8, channel=8, inter=8, head=4, local=8, kernel=5,
                   parameters=(12, 12), residual=(12, 12), spatial_residual=True, published_hyper=True)  # fmt: skip


class TestS2LIC(ImageCodecContract):
    model = "s2lic:test"


def stir(module, seed=0, size=0.3):
    """Random weights in place of those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * size * (0.05 if p.ndim == 4 else 1))
    return module.eval()


def grid_values(*shape, seed=0):
    """Random values on the activation grid."""
    return torch.round(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / STEP) * STEP


def frozen(module):
    exact = copy.deepcopy(module)
    freeze(exact)
    return exact


# transform


@pytest.mark.parametrize(("shift", "h", "w"), [(0, 16, 24), (4, 16, 24), (4, 8, 8)])
def test_block_is_timms(shift, h, w):
    timm = pytest.importorskip("timm.models.swin_transformer_v2")
    theirs = timm.SwinTransformerV2Block(24, (h, w), 3, window_size=8, shift_size=shift, always_partition=True)
    stir(theirs)
    ours = SwinV2Block(24, 3, 8, shift).eval()
    state = {k.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2"): v for k, v in theirs.state_dict().items()}
    own = ours.state_dict()
    assert own.keys() == state.keys()
    ours.load_state_dict({k: v.reshape(own[k].shape) for k, v in state.items()})
    x = torch.randn(2, 24, h, w)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), atol=1e-5)


@pytest.mark.parametrize(("shift", "h", "w", "tail"), [(0, 12, 20, 4), (4, 16, 24, 4), (4, 14, 22, 2)])
def test_padding_is_not_seen(shift, h, w, tail):
    """In a map whose sides are no multiples of the window, the last windows hold fewer tokens and nothing else."""
    attention = stir(CosineWindowAttention(8, 2, 8, shift))
    x = torch.randn(1, 8, h, w)
    with torch.no_grad():
        alone = attention_alone(attention, x[:, :, -tail:, -tail:])
        assert torch.allclose(attention(x)[:, :, -tail:, -tail:], alone, atol=1e-5)


def attention_alone(attention, x):
    """All tokens of a small map seeing each other, without windows."""
    (_, c, h, w), n, heads = x.shape, attention.window, attention.heads
    bias = torch.cat([attention.q_bias, torch.zeros(c), attention.v_bias])
    q, k, v = F.conv2d(x, attention.qkv.weight, bias).reshape(3, heads, c // heads, h * w).transpose(-1, -2)
    at = (torch.arange(h)[:, None] * n + torch.arange(w)).reshape(-1)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2) * attention.logit_scale.exp()
    seen = (scores + attention.position_bias()[:, at][:, :, at]).softmax(-1) @ v
    return attention.proj(seen.transpose(-1, -2).reshape(1, c, h, w))


def test_rest_is_the_identity():
    x = torch.randn(1, 8, 16, 16)
    stage, enhance = stir(SwinStage(8, 2, 2, skip=False)), stir(Enhancement(8, 8, 4, 3))
    assert not torch.allclose(stage(x), x) and not torch.allclose(enhance(x), x)
    for module in [*stage, enhance]:
        module.rest()
    assert torch.equal(stage(x), x) and torch.equal(enhance(x), x)
    assert torch.equal(SwinStage(8, 0, 2, skip=True)(x), 2 * x)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("wrong", [0, 3, 9])
def test_what_a_cut_spoils(depth, wrong):
    """Right outside of ``spoiled`` samples, wrong just inside of them."""
    stage = stir(SwinStage(8, depth, 2))
    x = torch.randn(1, 8, 40, 8)
    part = x[:, :, 8:].clone()
    part[:, :, :wrong] += 1
    with torch.no_grad():
        apart = (stage(x)[:, :, 8:] - stage(part)).abs().amax((0, 1, 3))
    n = spoiled(wrong, depth)
    assert apart[n:].max() < 2e-6 and (n == 0 or apart[n - 1] > 2e-6)


TRANSFORMS = {
    "skeleton": Config((16, 16), (8, 8, 3), heads=2, ratio=2, bias_width=16, latent=SMALL),
    "deep": Config((16, 16), (8, 8, 5), depth=4, heads=2, ratio=2, bias_width=16, latent=SMALL),
    "published": Config((16, 16), (8, 8, 5), published=True, ratio=2, bias_width=16, latent=SMALL),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_margins_hide_a_cut(kind):
    codec = stir(S2LIC(TRANSFORMS[kind]), size=0.1)
    pixels, cells = margins(codec.config)
    assert pixels % 64 == cells % 4 == 0
    x = torch.rand(1, 3, 64, pixels + 128)
    y = torch.randn(1, 16, 4, cells + 8)
    with torch.no_grad():
        whole, part = codec.analyse(x, 400), codec.analyse(x[..., 64:], 400)
        assert torch.allclose(whole[..., pixels // 16 + 4 :], part[..., pixels // 16 :], atol=1e-3)
        whole, part = codec.synthesise(y, 400), codec.synthesise(y[..., 4:], 400)
        assert torch.allclose(whole[..., 16 * (cells + 4) :], part[..., 16 * cells :], atol=1e-3)


def test_dense_block_sees_everything_before():
    block = DenseBlock(3, 5, growth=4, layers=3)
    assert [c.in_channels for c in block.convs] == [3, 7, 11] and block.convs[-1].out_channels == 5
    with torch.no_grad():
        block.convs[-1].weight[:, :3].zero_()
        before = block(x := torch.randn(1, 3, 6, 6))
        block.convs[0].weight.mul_(2)
        assert not torch.allclose(block(x), before)


# sizes


def test_paper_counts():
    """The parts of the published network, in millions: spec 2.3, from the widths in the released model file."""
    with torch.device("meta"):
        codec = S2LIC.from_preset("paper")
    slices = codec.latent.models
    parts = {
        "residual": (count_parameters(torch.nn.ModuleList(s.lrp for s in slices)), 25.9),
        "h_s": (count_parameters(codec.latent.h_s), 16.7),
        "h_a": (count_parameters(codec.latent.h_a), 1.88),
        "parameters": (count_parameters(torch.nn.ModuleList(s.nets for s in slices)), 7.1 + 0.2),  # 0.2: they see anchors
        "anchors": (count_parameters(torch.nn.ModuleList(s.local for s in slices)), 0.51),  # 10 x conv5 32 -> 64
        "contexts": (sum(count_parameters(s.channel_context) + count_parameters(s.inter_context) for s in slices[1:]), 4.6),
        "stages": (count_parameters(codec.g_a.stages) + count_parameters(codec.g_s.stages), 2 * 2.7),
        "enhance": (count_parameters(codec.g_a.enhance) + count_parameters(codec.g_s.enhance), 0.63),
        "resampling": (sum(count_parameters(m) for m in (codec.g_a.down, codec.g_s.up, codec.g_s.out)), 2.47),
    }
    for name, (count, millions) in parts.items():
        assert abs(count / 1e6 - millions) < 0.02 * millions + 0.01, name
    total = sum(millions for _, millions in parts.values())
    assert abs(count_parameters(codec) / 1e6 - total) < 0.02 * total


@pytest.mark.parametrize(("preset", "limit"), [("test", 100_000), ("light", 1_500_000), ("base", 8_000_000)])
def test_small_presets(preset, limit):
    with torch.device("meta"):
        assert count_parameters(S2LIC.from_preset(preset)) <= limit


# context


@pytest.mark.parametrize(("h", "w"), [(4, 4), (8, 4), (64, 64), (64, 60), (4, 2048), (1, 1), (37, 53)])
@pytest.mark.parametrize("most", [1, 16, 256, 1024])
def test_sample_places(h, w, most):
    step, rows, columns = sample_places(h, w, most)
    assert 1 <= len(rows) == len(columns) <= most
    assert rows.min() >= 0 and rows.max() < h and columns.min() >= 0 and columns.max() < w
    assert step == 1 or -(-h // (step - 1)) * -(-w // (step - 1)) > most
    assert len(set(zip(rows.tolist(), columns.tolist()))) == len(rows)


def test_sampling_is_bilinear_and_exact():
    x = grid_values(2, 3, 6, 9)
    rows, columns = (torch.randint(0, 16 * (side - 1) + 1, (2, 40)).float() for side in (6, 9))
    rows[:, 0], columns[:, 0] = 16 * 5, 16 * 8  # the last cell
    at = torch.stack([columns / 16 / 8, rows / 16 / 5], -1)[:, None] * 2 - 1
    theirs = F.grid_sample(x, at, align_corners=True)[:, :, 0]
    assert torch.allclose(sample(x, rows, columns), theirs, atol=1e-5)
    exact = sample(quantise(x), rows.double(), columns.double())
    assert (exact.q - theirs / STEP).abs().max() <= 0.51  # one rounding, beside the float's own
    assert torch.equal(exact.q, torch.floor(sample(x.double() / STEP, rows.double(), columns.double()) + 0.5))


def test_sampling_gradients():
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    at = (torch.rand(2, 1, 6, dtype=torch.float64) * 60 + 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, r, c: sample(x, r, c), (x, at[0], at[1]))


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_attention_is_exact(spread):
    attention = GlobalAttention()
    q, k, v = grid_values(1, 2, 16, 50, seed=1) * spread, grid_values(1, 2, 16, 30, seed=2), grid_values(1, 2, 16, 30, seed=3)
    q = torch.round(q / STEP) * STEP
    # the exact one rounds differences of scores to 2**-8, and q / sqrt(d) to the grid
    exact = frozen(attention)(*(quantise(t) for t in (q, k, v)))
    assert (exact.value() - attention(q, k, v)).abs().max() < 2.0**-7
    one = frozen(attention)(quantise(q), quantise(k[..., :1]), quantise(v[..., :1]))
    assert torch.equal(one.value(), v[..., :1].expand(-1, -1, -1, 50).double())


def test_attention_refuses_what_could_overflow():
    big = Grid(torch.zeros(1, 1, 16, 4096, dtype=torch.float64))
    with pytest.raises(ValueError, match="exact"):
        frozen(GlobalAttention())(big, big, big)


@pytest.mark.parametrize(("kind", "widths"), [(ChannelContext, (12, 10, 8)), (InterContext, (12, 4, 8, 5, 20))])
def test_contexts_exact_as_float(kind, widths):
    torch.manual_seed(1)
    context = stir(kind(*widths, Functions()), size=0.05)
    x = grid_values(1, 12, 8, 12)
    with torch.no_grad():
        exact, real = frozen(context)(quantise(x)), context(x)
    assert exact.q.equal(torch.round(exact.q))
    # a sixteenth of a cell apart where an offset lies on a border between two: few places
    assert ((exact.value() - real).abs() < 12 * STEP).double().mean() > 0.98


def test_mean_over_map():
    x = grid_values(1, 4, 5, 7)
    assert (mean_over_map(quantise(x)).value() - mean_over_map(x)).abs().max() <= 0.51 * STEP


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("squeeze", [0, 8])
def test_slice_exact_as_float(spatial, squeeze):
    cfg = AcgcConfig((8, 8), hyper=4, width=16, features=16, squeeze=squeeze, branch=8, channel=8, inter=8, head=4, local=8,
                     kernel=5, parameters=(12, 12), residual=(12,), spatial_residual=spatial)  # fmt: skip
    torch.manual_seed(0)
    real = AcgcSlice(8, 8, cfg).eval()
    exact = frozen(real)
    f, before, current = grid_values(1, 16, 8, 8, seed=1), grid_values(1, 8, 8, 8, seed=2), grid_values(1, 8, 8, 8, seed=3)
    level = torch.tensor([300.0])
    with torch.no_grad():
        state, other = real.prepare(f, [before], level), exact.prepare(quantise(f), [quantise(before)], 300)
        for half, where in enumerate(positions(8, 8)):
            known = current * anchor_mask(8, 8) if half else None
            mine = real.parameters_at(state, known, half, level, None)
            theirs = exact.parameters_at(other, quantise(known) if half else None, half, 300, where)
            for a, b in zip(mine, theirs):
                assert (a.flatten(2)[:, :, where] - b.value()).abs().max() < 16 * STEP
            q = torch.round(grid_values(1, 8, 8, 8, seed=5) * 3)
            value = current * anchor_mask(8, 8) if half == 0 else current
            a = real.residual(state, mine[0], q, value, half, None)
            b = exact.residual(other, theirs[0], q.flatten(2)[:, :, where].double(), quantise(value), half, where)
            assert (a.flatten(2)[:, :, where] - b.value()).abs().max() < 16 * STEP


@pytest.mark.parametrize("see", [True, False])
def test_second_pass_sees_the_anchors(see):
    """The gap of the released code, and its mending."""
    cfg = AcgcConfig((8,), hyper=4, width=16, features=16, squeeze=8, branch=8, channel=8, inter=8, head=4, local=8, kernel=5,
                     parameters=(12, 12), residual=(12,), see_anchors=see)  # fmt: skip
    model = AcgcSlice(0, 8, cfg)
    f, current = torch.randn(1, 16, 8, 8), torch.randn(1, 8, 8, 8) * anchor_mask(8, 8)
    state = model.prepare(f, [], torch.tensor([500.0]))
    _, mu, _ = model.parameters_at(state, current, 1, torch.tensor([500.0]), None)
    _, other, _ = model.parameters_at(state, 2 * current, 1, torch.tensor([500.0]), None)
    assert torch.equal(mu, other) != see


def test_published_entropy_model_codes():
    """Hyper pair, 3x3 residual nets and unsqueezed contexts of ``paper``, small: what is coded is decoded."""
    torch.manual_seed(0)
    latent = AcgcHyperprior(SMALL).eval()
    freeze(latent)
    for h, w in ((4, 4), (8, 12)):
        y = 3 * torch.randn(1, 16, h, w)
        z = latent.analyse_hyper(y, 600)
        payload, y_hat = latent.compress(y, z, 600)
        assert torch.equal(latent.decompress(payload, h, w, 600), y_hat)
        assert (y_hat - y).abs().max() < 1.5


def test_published_network_trains():
    torch.manual_seed(0)
    codec = S2LIC(TRANSFORMS["published"])
    out = codec(torch.rand(1, 3, 64, 128), torch.tensor([500.0]))
    assert out.x_hat.shape == (1, 3, 64, 128)
    (out.x_hat.square().mean() + sum(b.sum() for b in out.bits.values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in codec.parameters())
