import math
from dataclasses import replace

import pytest
import torch
from contract import ImageCodecContract
from neuralcodec.codecs import registry
from neuralcodec.codecs.base import count_parameters
from neuralcodec.codecs.mlicv2 import MlicHyperprior, MLICv2
from neuralcodec.entropy.context.checkerboard import anchor_mask, positions
from neuralcodec.entropy.context.mlic import (
    TURNS,
    CentreContext,
    MlicConfig,
    Reweight,
    Rotary,
    Tools,
    WindowContext,
    average,
)
from neuralcodec.entropy.exact import ACT_MAX, Grid, freeze, quantise
from neuralcodec.entropy.levels import LevelBias
from neuralcodec.nn.blocks import LevelAffine
from neuralcodec.nn.mixing import Pointwise, TokenMixing
from neuralcodec.nn.residual import GDN

Z_PARAMETERS = 61  # of one channel of MLIC++'s prior of z: 58 of its density and 3 quantiles


class TestMLICv2(ImageCodecContract):
    model = "mlicv2:test"


def on_meta(preset):
    with torch.device("meta"):
        return MLICv2.from_preset(preset)


def core(codec):
    """Parameters but for what variable quality adds, with MLIC++'s prior of z in the place of ours."""
    level = sum(count_parameters(m) for m in codec.modules() if isinstance(m, (LevelAffine, LevelBias)))
    extra = level + codec.latent.log_gain.numel() + count_parameters(codec.latent.prior)
    return count_parameters(codec) - extra + Z_PARAMETERS * codec.config.latent.hyper


def test_mlicpp_has_the_published_parameters():
    codec = on_meta("paper-v1")
    latent = codec.latent

    def of(name):
        return sum(count_parameters(getattr(m, name)) for m in latent.models if getattr(m, name) is not None)

    assert core(codec) == 83_501_408
    level = sum(count_parameters(m) for m in codec.modules() if isinstance(m, LevelAffine))
    # millions, as counted from the released code
    found = {
        "g_a + g_s": count_parameters(codec.g_a) + count_parameters(codec.g_s) - count_parameters(codec.g_a.level)
        - count_parameters(codec.g_s.level),
        "h_a": count_parameters(latent.h_a), "h_s": count_parameters(latent.h_s),
        "local": of("local"), "channel": of("channel"), "inter": of("inter"), "intra": of("intra"),
        "parameters": of("nets"), "residual": of("residuals"),
    }  # fmt: skip
    wanted = {"g_a + g_s": 19.10, "h_a": 1.88, "h_s": 16.69, "local": 0.76, "channel": 5.81, "inter": 4.63, "intra": 0.66,
              "parameters": 8.06, "residual": 25.90}  # fmt: skip
    assert {k: round(v / 1e6, 2) for k, v in found.items()} == pytest.approx(wanted, abs=0.011)
    assert level == 2 * 9 * (192 + 320 + 320 + 192)


def test_mlicv2_is_as_large_as_published():
    assert core(on_meta("paper")) == pytest.approx(84.3e6, rel=0.02)


@pytest.mark.parametrize("preset, most", [("test", 1e5), ("compare", 1.5e6), ("light", 5e6), ("base", 7e6)])
def test_presets_keep_their_limits(preset, most):
    assert count_parameters(on_meta(preset)) <= most


def test_the_default_decodes_with_no_more_products_than_the_one_that_took_a_second():
    """A megapixel in a second on two cores was measured at 54.2 kMAC/px of synthesis and entropy model (README)."""
    cost = next(c["kmac_per_pixel"] for c in registry.describe() if f"{c['codec']}:{c['preset']}" == registry.default("image"))
    assert cost["g_s"] + cost["entropy"] <= 54.2


@pytest.mark.parametrize("h, w", [(0, 4), (4, 0), (1, 1), (2, 4), (3, 5), (5, 3), (4, 6), (3, 4)])
def test_positions_are_those_of_the_mask(h, w):
    anchors, others = positions(h, w)
    mask = anchor_mask(h, w).reshape(-1) > 0
    assert torch.equal(anchors, mask.nonzero()[:, 0]) and torch.equal(others, (~mask).nonzero()[:, 0])


def test_the_entropy_model_can_be_compiled_whole():
    """No part of a training step looks at a result on the way, which a compiler could not follow."""
    torch.manual_seed(1)
    latent = MLICv2.from_preset("test").train().latent
    y, level = torch.randn(2, latent.cfg.channels, 4, 4), torch.tensor([100.0, 700.0])
    torch.manual_seed(2)
    plain = latent(y, level)
    whole = torch.compile(latent, backend="eager", fullgraph=True, dynamic=False)
    torch.manual_seed(2)
    for a, b in zip(plain, whole(y, level)):
        assert torch.equal(a, b)


SWITCHES = {
    "plain": {},
    "window": {"centre": False, "rope": False, "mlp": True, "project": 3, "gelu": True},
    "window, rope": {"centre": False, "mlp": True, "shared": False, "residual_kernel": 3, "residual": (8, 8), "features": 32},
    "no extras": {"guide": 0, "reweight": False, "rope": False, "intra": 0},
    "selective": {"selective": True},
    "published hyper": {"published_hyper": True, "features": 64},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_exact_and_float_agree(name):
    """Every context and switch: what the frozen model decodes is what the float model means, and what was encoded."""
    torch.manual_seed(3)
    latent = MlicHyperprior(replace(MLICv2.presets["test"].latent, **SWITCHES[name])).eval()
    with torch.no_grad():
        for p in latent.parameters():
            if p.ndim > 1:
                p.mul_(1.5)
    y = torch.randn(1, latent.cfg.channels, 8, 12)
    level = torch.tensor([500.0])
    latent.rounded_rate = True
    with torch.no_grad():
        z = torch.round(3 * torch.randn(1, latent.cfg.hyper, 2, 3))
        expected, bits, _ = latent(y, level, z)
    freeze(latent)
    payload, y_hat = latent.compress(y, z, 500)
    assert torch.equal(latent.decompress(payload, 8, 12, 500), y_hat)
    # a symbol on the edge of two may fall the other way, which moves its value by a hundredth of a step here
    assert float((y_hat - expected).abs().mean()) < 2e-3
    ideal = latent.ideal_bits(y, z, 500)
    z_bits = latent.z_tables.bits(z.int().flatten().numpy(), torch.arange(8).repeat_interleave(6).numpy()).sum()
    assert ideal - z_bits == pytest.approx(float(bits), rel=0.15)  # the tables are heavier-tailed than the normal


def test_selection_skips_what_is_surely_zero():
    """Untrained, the choice is the threshold on the scale; what is skipped costs nothing and is its mean."""
    torch.manual_seed(0)
    cfg = replace(MLICv2.presets["test"].latent, selective=True)
    latent = MlicHyperprior(cfg).eval()
    with torch.no_grad():
        for model in latent.models:  # every scale far below the threshold: nothing is left to code
            for net in model.nets:
                net.head.bias[model.channels :] = -20
    level, y = torch.tensor([0.0]), 0.01 * torch.randn(1, cfg.channels, 4, 8)
    _, bits, _ = latent(y, level, torch.zeros(1, cfg.hyper, 1, 2))
    assert not bits.any()
    freeze(latent)
    z = torch.zeros(1, cfg.hyper, 1, 2)
    payload, y_hat = latent.compress(y, z, 0)
    assert len(payload) < 16  # z only
    assert torch.equal(latent.decompress(payload, 4, 8, 0), y_hat)


def test_selection_learns_from_its_own_loss_only():
    torch.manual_seed(0)
    preset = MLICv2.presets["test"]
    codec = MLICv2(replace(preset, latent=replace(preset.latent, selective=True)))
    out = codec(torch.rand(1, 3, 64, 64), torch.tensor([500.0]))
    codec.auxiliary_loss().backward()
    reached = {name for name, p in codec.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached and all(".selection." in name for name in reached)
    assert "y" in out.bits


def test_average_is_exact_for_any_number_of_positions():
    p = Grid(torch.full((1, 1, 40_000), 26.0, dtype=torch.float64), 20, 1 << 20)  # sums to nearly one
    v = Grid(torch.full((1, 40_000, 1), float(ACT_MAX), dtype=torch.float64))
    assert average(p, v).q.item() == math.floor(40_000 * 26 * ACT_MAX / 2**20 + 0.5)


def test_rotary_turns_by_differences():
    """Products of turned queries and keys depend on how far they lie apart, not on where."""
    torch.manual_seed(1)
    rotary = Rotary(8)
    q, k = torch.randn(1, 8, 1), torch.randn(1, 8, 1)

    def product(a, b):
        at = torch.tensor(a).reshape(2, 1), torch.tensor(b).reshape(2, 1)
        return (rotary(q, *at[0]) * rotary(k, *at[1])).sum().item()

    assert product((2, 3), (5, 1)) == pytest.approx(product((12, 33), (15, 31)), abs=1e-4)
    assert product((2, 3), (5, 1)) != pytest.approx(product((2, 3), (6, 1)), abs=1e-3)
    assert product((2, 3), (5, 1)) == pytest.approx((product((2 + TURNS, 3), (5 + TURNS, 1))), abs=1e-5)
    freeze(rotary)
    rows, cols = torch.arange(5), torch.arange(5).flip(0)
    x = torch.randn(2, 8, 5)
    exact = rotary(quantise(x), rows, cols).value()
    assert float((exact - Rotary(8)(x, rows, cols)).abs().max()) < 1e-3


@pytest.mark.parametrize("kind", [WindowContext, CentreContext])
def test_local_contexts_see_their_window_only(kind):
    torch.manual_seed(2)
    cfg = replace(MLICv2.presets["test"].latent, window=5, rope=kind is CentreContext)
    context = kind(16, cfg, Tools(cfg))
    current = torch.randn(1, 16, 8, 8) * anchor_mask(8, 8)
    features = torch.randn(1, cfg.features, 8, 8)
    _, others = positions(8, 8)
    before = context(current, features, others)
    current[:, :, 0, 0] += torch.randn(16)
    after = context(current, features, others)
    moved = (before - after).abs().amax((0, 1)) > 1e-6
    near = (others // 8 <= 2) & (others % 8 <= 2)
    assert moved.any() and torch.equal(moved & ~near, torch.zeros_like(moved))


def test_reweighting_agrees_with_its_float():
    torch.manual_seed(4)
    cfg = MLICv2.presets["test"].latent
    module = Reweight(8, Tools(cfg))
    x = torch.randn(1, 8, 6, 10)
    with torch.no_grad():
        expected = module(x)
    freeze(module)
    assert float((module(quantise(x)).value() - expected).abs().max()) < 0.01


def test_mixing_block_rests_and_sees_what_it_says():
    torch.manual_seed(0)
    block = TokenMixing(8)
    x = torch.randn(1, 8, 32, 32)
    y = x.clone()
    y[:, :, 16, 16] += 10 * torch.randn(8)
    moved = ((block(x) - block(y)).abs().amax(1) > 0)[0].nonzero()
    assert int((moved - 16).abs().max()) == TokenMixing.reach
    block.rest()
    assert torch.equal(block(x), x)
    point = Pointwise(8, 4)
    assert torch.allclose(point(x), torch.nn.functional.conv2d(x, point.weight, point.bias), atol=1e-5)


def test_gdn_against_its_formula():
    gdn, inverse = GDN(3), GDN(3, inverse=True)
    x = torch.randn(1, 3, 2, 2)
    expected = x / (1 + 0.1 * x.square()).sqrt()
    assert torch.allclose(gdn(x), expected, atol=1e-4)
    assert torch.allclose(inverse(x), x * (1 + 0.1 * x.square()).sqrt(), atol=1e-4)


def test_published_hyper_net_needs_its_widths():
    with pytest.raises(ValueError, match="twice"):
        MlicHyperprior(replace(MLICv2.presets["test"].latent, published_hyper=True))
    with pytest.raises(ValueError, match="residual"):
        MlicHyperprior(replace(MLICv2.presets["test"].latent, residual_kernel=3))
    assert isinstance(MLICv2.presets["paper"].latent, MlicConfig)
