"""Weights files as starts of trainings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import as_tensor, photo
from neuralcodec.codecs import registry
from neuralcodec.entropy.exact import freeze, frozen_tensors
from neuralcodec.entropy.tables import pmf_to_tables
from neuralcodec.train import loop
from neuralcodec.train.start import fitted, start_of
from PIL import Image

MODELS = ["feds:test", "hcfssnet:test", "hyperprior:test", "mlicv2:test", "s2lic:test", "vaeformer:test"]


def started(model):
    name, preset = registry.split(model)
    codec = registry.codec_class(name).from_preset(preset).eval()
    codec.load_state_dict(start_of(registry.weights_path(name, preset)))
    return codec


@pytest.mark.parametrize("model", MODELS)
def test_frozen_again_it_is_what_it_was(model):
    shipped = registry.load(*registry.split(model))
    codec = started(model)
    freeze(codec)
    for name, tensor in frozen_tensors(codec).items():
        want = frozen_tensors(shipped)[name].double()
        slack = 2 + 1e-4 * want.abs() if name.endswith(("turn_q", "step_q", "offset_q")) else 0  # made of rounded logarithms
        assert ((tensor.double() - want).abs() <= slack).all(), name
    values = np.tile(np.arange(-3, 4), len(codec.latent.z_tables))
    rows = np.repeat(np.arange(len(codec.latent.z_tables)), 7)
    mass = 2.0 ** -shipped.latent.z_tables.bits(values, rows)
    more = codec.latent.z_tables.bits(values, rows) - shipped.latent.z_tables.bits(values, rows)
    assert (mass * more).sum() < 0.02 * (mass * shipped.latent.z_tables.bits(values, rows)).sum()
    if codec.kind != "image":
        return
    y = shipped.analyse(as_tensor(photo())[:, :, :128, :128], 500)
    codec.latent.set_tables(codec.latent.z_tables, shipped.latent.y_tables)  # of the density that it was frozen with
    assert codec.estimate_bits(y, 500) == pytest.approx(shipped.estimate_bits(y, 500), rel=0.01)


def test_a_fitted_prior_follows_rows_far_from_zero():
    """Narrow and wide, skewed and shifted."""
    v = np.arange(-40, 41)
    pmfs = [np.exp(-((v - at) ** 2) / (2 * s * s)) + 1e-9 for at, s in ((0, 0.3), (5, 2), (-9, 6))]
    tables = pmf_to_tables([p / p.sum() for p in pmfs], [-40] * 3)
    prior = fitted(tables)
    for row, pmf in enumerate(pmfs):
        p = pmf / pmf.sum()
        mass = prior.likelihood(torch.from_numpy(v).float().expand(1, 3, 1, -1))[0, row, 0].double().numpy()
        assert -(p * np.log2(mass)).sum() < -(p * np.log2(p)).sum() + 0.03


def test_a_training_goes_on_from_a_weights_file(tmp_path, capsys):
    folder = tmp_path / "p"
    folder.mkdir()
    for n in range(20):
        Image.fromarray(np.roll(np.tile(photo(), (2, 2, 1))[:128, :128], n, 0)).save(folder / f"{n}.png")
    weights = str(registry.weights_path("hyperprior", "test"))
    loop.main(["hyperprior:test", "--data", str(folder), "--out", str(tmp_path / "run"), "--steps", "1", "--init", weights])
    assert "taken over: all but 0 of" in capsys.readouterr().out
