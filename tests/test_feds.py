"""FEDS: the contract, the published sizes, ChARM slices on grids, and distillation."""

from __future__ import annotations

import json

import pytest
import torch
from contract import ImageCodecContract, as_tensor, photo
from neuralcodec.codecs import registry
from neuralcodec.codecs.base import count_parameters
from neuralcodec.codecs.feds import FEDS, CharmConfig, PaperConfig
from neuralcodec.container import UsageError
from neuralcodec.entropy.exact import freeze
from neuralcodec.train import distill
from neuralcodec.train.loop import Recipe, rd_loss, train


class TestFEDS(ImageCodecContract):
    model = "feds:test"


TINY = PaperConfig(8, 1, CharmConfig((8, 16), 8, width=8, context=(8, 8)), attention=True)


@pytest.mark.parametrize("preset, millions, within", [
    ("paper", 38.5, 0.02), ("paper-teacher", 104.9, 0.02),
    ("compare", 1.5, None), ("light", 2.0, None), ("base", 8.0, None), ("teacher", 3.0, None),
])  # fmt: skip
def test_sizes(preset, millions, within):
    """Within 2 % of the specification's counts, or below the limits of the smaller presets."""
    with torch.device("meta"):
        found = count_parameters(FEDS.from_preset(preset)) / 1e6
    assert found <= millions if within is None else abs(found / millions - 1) < within


def test_student_is_63_percent_smaller():
    with torch.device("meta"):
        student, teacher = (count_parameters(FEDS.from_preset(p)) for p in ("paper", "paper-teacher"))
    assert abs(student / teacher - 0.37) < 0.01


class TestPublishedTransform:
    @pytest.fixture(scope="class")
    def codec(self):
        torch.manual_seed(0)
        return FEDS(TINY)

    def test_shapes_and_gradients(self, codec):
        x = as_tensor(photo()[:64, :128])
        out = codec(x, torch.tensor([400.0]))
        assert out.x_hat.shape == x.shape
        loss, _ = rd_loss(codec, x, torch.tensor([400.0]), 0.5)
        loss.backward()
        assert not [n for n, p in codec.named_parameters() if p.grad is None or not p.grad.isfinite().all()]

    def test_frozen_round_trip(self, codec):
        """Encoder and decoder agree on grids, and the exact model charges what the float one does for the same symbols."""
        x = as_tensor(photo()[:128, :128])
        codec.latent.rounded_rate = True
        with torch.no_grad():
            y = codec.analyse(x, 600)
            float_bits = float(codec.latent(y, torch.tensor([600.0]))[1])
        frozen = FEDS(TINY)
        frozen.load_state_dict(codec.state_dict())
        freeze(frozen)
        z = frozen.latent.analyse_hyper(y, 600)
        payload, y_hat = frozen.encode_latent(y, 600)
        assert torch.equal(frozen.decode_latent(payload, *y.shape[2:], 600), y_hat)
        from neuralcodec.entropy.hyperprior import _Counter, _flat

        counter = _Counter()
        counter.put(*_flat(z), frozen.latent.z_tables)
        exact_bits = frozen.latent.ideal_bits(y, z, 600) - counter.bits
        assert abs(exact_bits / float_bits - 1) < 0.02


def tiny_run(tmp_path, name, teacher=None, stage=None, steps=12, resume=False):
    """A run of feds:test on noise-free stripes; the weights that it ends with."""
    stages = [{"until": until, "crop": 64, "batch": 2} for until in (0.25, 0.5, 1.0)]
    recipe = Recipe(steps=steps, stages=stages, distil_until=[0.25, 0.5], warmup_steps=2)
    torch.manual_seed(5)
    student = FEDS.from_preset("test")
    objective, until = distill.set_up(student, recipe, teacher, stage, resume) if teacher or stage else (None, 1.0)
    pixels = torch.from_numpy(photo()[:256, :256].copy()).permute(2, 0, 1)
    stacks = [pixels.unfold(1, 128, 16).unfold(2, 128, 16).permute(1, 2, 0, 3, 4).flatten(0, 1)]
    train(student, stacks, recipe, tmp_path / name, objective=objective, until=until, resume=resume)
    return torch.load(tmp_path / name / "last.pt", weights_only=True)


TEACHER = "hyperprior:test"  # its weights are in the package


class TestDistillation:
    def test_stages_one_by_one_are_the_whole(self, tmp_path):
        whole = tiny_run(tmp_path, "whole", TEACHER)["model"]
        tiny_run(tmp_path, "parts", TEACHER, 1)
        assert tiny_run(tmp_path, "parts", TEACHER, 2, resume=True)["step"] == 6
        parts = tiny_run(tmp_path, "parts", None, 3, resume=True)
        assert parts["step"] == 12
        assert all(torch.equal(parts["model"][k], v) for k, v in whole.items())

    def test_the_control_sees_the_same(self, tmp_path, monkeypatch):
        """Without weight, the teacher changes nothing: crops, levels and noise are the control's."""
        alone = tiny_run(tmp_path, "alone")["model"]
        taught = tiny_run(tmp_path, "taught", TEACHER)["model"]
        assert not all(torch.equal(taught[k], v) for k, v in alone.items())
        monkeypatch.setattr(distill, "ALPHA", (0.0, 0.0))
        monkeypatch.setattr(distill, "BETA", 0.0)
        ignored = tiny_run(tmp_path, "ignored", TEACHER)["model"]
        assert all(torch.equal(ignored[k], v) for k, v in alone.items())

    def test_misuse(self):
        student = FEDS.from_preset("test")
        with pytest.raises(UsageError, match="needs a --teacher"):
            distill.set_up(student, Recipe(), None, 1, False)
        with pytest.raises(UsageError, match="--resume"):
            distill.set_up(student, Recipe(), TEACHER, 2, False)
        with pytest.raises(ValueError, match="cannot lead"):
            distill.Distillation(FEDS.from_preset("light"), student)

    def test_taps(self):
        """Features of both sides by name, nothing left behind, and the same for a codec of another transform."""
        x, level = as_tensor(photo()[:64, :64]), torch.tensor([500.0])
        for codec in (FEDS.from_preset("test"), FEDS(TINY), registry.codec_class("hyperprior").from_preset("test")):
            found = distill.look(codec, x, level)
            assert {"g_a.at4", "g_a.at8", "g_s.at8", "g_s.at4", "y", "hyper", "bits", "log_scale"} <= set(found)
            assert found["g_a.at4"].shape[2:] == found["g_s.at4"].shape[2:] == (16, 16)
            assert torch.equal(found["y"], codec.g_a(x, level))
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in codec.modules())
            assert "hyper_synthesis" not in vars(codec.latent) and "likelihood" not in vars(codec.latent)

    def test_a_projection_starts_at_least_squares(self):
        """A teacher that is a linear map of the student is met at once."""
        generator = torch.Generator().manual_seed(0)
        f = torch.randn(4, 6, 16, 16, generator=generator)
        target = torch.einsum("tc,bchw->bthw", torch.randn(9, 6, generator=generator), f) + 3
        assert float(distill.Projection(6, 9)(f, target).max()) < 1e-3

    def test_channel_loss(self):
        """Zero for a student that is the teacher with channels moved and signs turned, positive for any other."""
        student, teacher = FEDS.from_preset("test"), registry.codec_class("hyperprior").from_preset("test")
        objective = distill.Distillation(student, teacher)
        y_teacher = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(1))
        objective.information.copy_(torch.linspace(1, 2, 32))
        objective.variance.fill_(0.5)
        moved = torch.randperm(24, generator=torch.Generator().manual_seed(2)) + 8  # the 24 of most bits
        turned = torch.where(torch.arange(24) % 3 == 0, -1.0, 1.0)
        y = turned[:, None, None] * y_teacher[:, moved]
        objective._learn_match(y, y_teacher)
        objective.settle("match")
        assert torch.equal(objective.order, moved) and torch.equal(objective.sign, turned)
        assert float(objective.channels(y, y_teacher).max()) < 1e-10
        # every channel off by one: the weighted mean of 1 / (2 * 0.5)
        assert torch.allclose(objective.channels(y + 1, y_teacher), torch.ones(2), atol=1e-5)
        objective.settle("rank")
        assert objective.order.tolist() == list(range(31, 7, -1))

    def test_verdict(self, tmp_path):
        """A teacher that needs 10 % less passes the gate, one that needs 1 % less does not."""
        for name, factor in (("alone", 1.0), ("good", 0.9), ("poor", 0.99)):
            rows = [{"level": n, "bpp": factor * 0.2 * 1.5**n, "psnr": 28.0 + 2 * n} for n in range(5)]
            (tmp_path / name).mkdir()
            (tmp_path / name / "log.jsonl").write_text(json.dumps({"step": 1, "minutes": 1, "validation": rows}) + "\n")
        assert "spends 10.00 % less than the student alone: fit" in distill.verdict(tmp_path / "good", tmp_path / "alone")
        said = distill.verdict(tmp_path / "poor", tmp_path / "alone", tmp_path / "good")
        assert "cannot pay" in said and "-10.00 %" in said
