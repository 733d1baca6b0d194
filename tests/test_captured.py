"""The step that is captured on accelerators does what the loop's own optimisers do."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from neuralcodec.codecs.hyperprior import Hyperprior
from neuralcodec.codecs.mlicv2 import MLICv2
from neuralcodec.train.captured import Step
from neuralcodec.train.loop import Objective, Recipe, rd_loss, set_hard
from neuralcodec.train.optim import optimisers


@pytest.mark.parametrize("kind", [Hyperprior, MLICv2])
@pytest.mark.parametrize("hard", [False, True])
def test_a_flat_step_is_the_optimisers_step(kind, hard):
    torch.manual_seed(1)
    codec = kind.from_preset("test").to(memory_format=torch.channels_last).train()
    set_hard(codec, hard)
    other, average = deepcopy(codec), deepcopy(codec).requires_grad_(False)
    before = {k: v.clone() for k, v in codec.state_dict().items()}
    recipe = Recipe()
    opts = optimisers(other, "muon", 1e-3, 2e-3, 2.0)
    step = Step(codec, average, optimisers(codec, "muon", 1e-3, 2e-3, 2.0), recipe, Objective())
    for k, v in before.items():
        assert torch.equal(codec.state_dict()[k], v)
    for n in range(3):
        x, level = torch.rand(2, 3, 64, 64), torch.tensor([100.0, 800.0])
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = group["peak"] * 0.5
            opt.zero_grad(set_to_none=True)
        torch.manual_seed(n)
        loss, _ = rd_loss(other, x, level, recipe.weight_power)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), recipe.clip)
        for opt in opts:
            opt.step()
        torch.manual_seed(n)
        figures = step(x, level, 0.5, 0.5)
        assert torch.allclose(figures["loss"], loss, rtol=1e-4)
        assert torch.allclose(figures["grad_norm"], norm, rtol=1e-3)
    moved = set()
    for (name, a), b, c in zip(codec.named_parameters(), other.parameters(), average.parameters()):
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-5), name
        if not torch.equal(a, before[name]):
            moved.add(name)
            assert not torch.equal(a, c)
    assert any(name.startswith("g_s.") for name in moved) and any(name.startswith("latent.") for name in moved)
    assert any(name.startswith("g_a.") for name in moved) != hard


def test_a_compiled_step_is_the_plain_one(monkeypatch):
    """With the entropy model compiled as well, and with it taken out again by the next Step."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: real(module, backend="eager"))
    torch.manual_seed(1)
    codec = MLICv2.from_preset("test").to(memory_format=torch.channels_last).train()
    other = deepcopy(codec)
    x, level = torch.rand(2, 3, 64, 64), torch.tensor([100.0, 800.0])
    start = {k: v.clone() for k, v in codec.state_dict().items()}
    losses = []
    for one, compiled in ((other, ""), (codec, "all"), (codec, "transforms")):
        one.load_state_dict(start)
        kinds = optimisers(one, "muon", 1e-3, 2e-3)
        step = Step(one, deepcopy(one).requires_grad_(False), kinds, Recipe(), Objective(), compiled)
        assert (one.latent._compiled_call_impl is not None) == (compiled == "all")
        assert (one.g_s._compiled_call_impl is not None) == bool(compiled)
        torch.manual_seed(2)
        losses.append(float(step(x, level, 0.5, 0.5)["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) == pytest.approx(losses[2], rel=1e-4)
    assert not torch.equal(codec.latent.log_gain, start["latent.log_gain"])


def test_a_step_without_finite_gradient_changes_nothing_for_good():
    torch.manual_seed(1)
    codec = Hyperprior.from_preset("test").train()
    kinds = optimisers(codec, "muon", 1e-3, 2e-3)
    step = Step(codec, deepcopy(codec).requires_grad_(False), kinds, Recipe(), Objective())
    step(torch.full((1, 3, 64, 64), float("nan")), torch.tensor([500.0]), 1.0, 0.5)
    assert all(p.isfinite().all() for p in codec.parameters())
    assert all(t.isfinite().all() for t in step.state_dict().values())
