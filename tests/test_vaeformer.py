"""VAEformer: the published network by its numbers, the exact decoder, any grid, and the residual on top."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import cuts
from neuralcodec.codecs import registry
from neuralcodec.codecs.base import count_parameters
from neuralcodec.codecs.vaeformer import (
    FACTS,
    VARIABLES,
    Plane,
    VAEformer,
    cut,
    facts_of,
    join,
    normalisation,
    references_of,
    row_mask,
)
from neuralcodec.container.errors import CodecError, LimitExceeded
from neuralcodec.entropy.grid import decode_field, describe_field, encode_field
from test_grid_coding import assert_kept, weather

HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def codec() -> VAEformer:
    return registry.load("vaeformer", "test")


def fields(seed: int = 0) -> tuple[np.ndarray, list[Plane], np.ndarray]:
    """Three fields in the units of their variables, on an unusual grid."""
    x = weather(3, 45, 90, seed=seed)
    x[1] = (x[1] - 250) / 2
    return x.astype(np.float32), [Plane("t", 500), Plane("u10"), Plane("unheard of", 7)], np.linspace(90, -90, 45)


def test_published_size():
    """404.7 million parameters, by part, as the published network has them (counted without memory)."""
    with torch.device("meta"):
        paper = VAEformer.from_preset("paper")
    assert count_parameters(paper) == pytest.approx(404.7e6, rel=0.01)
    assert count_parameters(paper.g_a) - count_parameters(paper.g_a.quant) == pytest.approx(204.6e6, rel=0.01)
    assert count_parameters(paper.g_s) == pytest.approx(181.3e6, rel=0.01)
    h_a = sum(count_parameters(getattr(paper.latent, part)) for part in ("h_a_in", "h_a", "h_a_out"))
    assert h_a == pytest.approx(8.1e6, rel=0.04)  # the published one adds learned positions
    windows = [b.attention.window for b in (*paper.g_a.trunk, paper.g_a.heads[0], *paper.g_s.trunk)]
    assert windows == [(24, 24), (12, 48), (48, 12), (0, 0)] * 6
    x, facts = torch.zeros(1, 268, 721, 1440, device="meta"), torch.zeros(1, 1, 72, 144, device="meta")
    assert paper.g_a.patches(x).shape == (1, 1024, 72, 144)
    assert paper.g_a.positions(facts).shape == (1, 1024, 72, 144)
    assert (71 * 10 + 11, 143 * 10 + 10) == (721, 1440)


def test_windows_wrap_in_longitude():
    x = torch.arange(2 * 3 * 5 * 10.0).reshape(2, 3, 5, 10)
    for n, m in ((2, 4), (5, 10), (4, 6), (3, 10)):
        tokens = cut(x, n, m)
        assert torch.equal(join(tokens, 5, 10, n, m), x)
    last = cut(x, 5, 4)[:, -1].reshape(2, 3, 5, 4)
    assert torch.equal(last[..., 2:], x[..., :2])  # 8, 9, then 0, 1
    assert row_mask(6, 8, 3, 4) is None
    mask = row_mask(5, 8, 3, 4)
    assert mask.shape == (4, 1, 1, 12) and int((mask < 0).sum()) == 8  # a row of four in each of the two lower windows


def test_analysis_turns_with_the_earth(codec):
    """Fields turned by whole windows have latents turned by whole windows."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(weather(1, 64, 192, rough=0.5)).float()[None]
    x = (x - 250) / 20 + 0 * float(rng.random())
    facts = torch.from_numpy(facts_of([Plane("t", 850)], list(range(8000, -8000, -2000)), 24)).float() / 4096
    with torch.no_grad():
        y = codec.g_a(x, facts)[0]
        turned = codec.g_a(x.roll(96, 3), facts)[0]
    assert torch.allclose(turned, y.roll(12, 3), atol=1e-4)


def test_facts_are_integers_of_their_place():
    facts = facts_of([Plane("t", 500), Plane("who knows")], [9000, 0, -4500], 2)
    assert facts.shape == (2, len(VARIABLES) + FACTS, 3, 2) and facts.dtype == np.int64
    assert facts[0, VARIABLES.index("t")].all() and facts[1, 0].all() and not facts[0, 0].any()
    latitude = facts[0, len(VARIABLES), :, 0]
    assert latitude.tolist() == [4096, 0, -2048]
    assert facts[0, len(VARIABLES) + 4, 0, 0] == 2048 and facts[1, len(VARIABLES) + 6, 0, 0] == 4096


def test_references():
    """The level before; the time before of the first level, and of what has no levels; nothing of another variable."""
    levels = [Plane("t", 1000), Plane("t", 500), Plane("t", 10)]
    assert references_of(levels * 2) == [-1, 0, 1, 0, 3, 4]
    assert references_of([Plane("msl")] * 3) == [-1, 0, 1]
    assert references_of([Plane("t", 500), Plane("u", 500), Plane("u10")]) == [-1, -1, -1]
    facts = facts_of(levels[:2], [0], 1, [-1, 0])
    assert facts[0, -1].max() == 0 and facts[1, -1].min() == 4096


def test_a_reference_is_used(codec):
    """A field that was seen before costs less, and its payload needs what it refers to."""
    x = weather(2, 64, 96, rough=0.5).astype(np.float32)
    x[1] = x[0]
    planes = [Plane("t", 500)] * 2
    told, base = codec.encode_fields(x, planes, None, 600)
    alone, _ = codec.encode_fields(x, planes, None, 600, references=[-1, -1])
    assert len(told) < 0.9 * len(alone)
    assert np.array_equal(codec.decode_fields(told, only=[1]), base[1:])
    with pytest.raises(ValueError, match="before it"):
        codec.encode_fields(x, planes, None, 600, references=[-1, 1])


def test_normalisation():
    x = np.full((4, 5), 3.0)
    mean, std = normalisation(Plane("z", 500), x)
    assert mean == pytest.approx(54117, rel=1e-4) and std == pytest.approx(3360, rel=1e-3)
    assert normalisation(Plane("t", 17), x) != (3.0, 0.0)  # a level without statistics of its own
    assert normalisation(Plane("other"), x) == (0.0, 1.0)
    rng = np.random.default_rng(0)
    mean, std = normalisation(Plane("chlorophyll"), 5 + 2 * rng.standard_normal((50, 50)))
    assert mean == pytest.approx(5, abs=0.2) and std == pytest.approx(2, abs=0.2)


def test_round_trip_is_exact(codec):
    x, planes, latitude = fields()
    sizes, errors = [], []
    for level in (0, 400, 1000):
        payload, base = codec.encode_fields(x, planes, latitude, level)
        assert base.shape == x.shape and base.dtype == np.float64
        assert np.array_equal(codec.decode_fields(payload), base)
        assert np.array_equal(codec.decode_fields(payload, only=[2, 0]), base[[2, 0]])
        sizes.append(len(payload))
        errors.append(float(np.abs(base[0] - x[0]).mean()))
    assert sizes[0] < sizes[1] < sizes[2] and errors[2] < errors[0] < 20


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 1, 37), (2, 33, 3), (1, 64, 97)])
def test_any_grid(codec, shape):
    x = weather(*shape).astype(np.float32)
    x[0, 0, 0] = np.nan
    x[0, -1, -1] = np.inf
    payload, base = codec.encode_fields(x, [Plane("t", 850)] * shape[0], None, 300)
    assert np.isfinite(base).all() and np.array_equal(codec.decode_fields(payload), base)


def test_residual_keeps_the_bound(codec):
    """Base + residual: the bound at every cell, missing ones in their place, whatever the base is worth."""
    x, planes, latitude = fields()
    x[0, 10:20, 30:50] = np.nan
    payload, base = codec.encode_fields(x, planes, latitude, 600)
    residual = encode_field(x, 0.5, periodic=True, base=base)
    assert describe_field(residual)["needs_base"]
    assert_kept(x, decode_field(residual, base=codec.decode_fields(payload)), 0.5)


def test_bad_input(codec):
    x, planes, latitude = fields()
    with pytest.raises(ValueError):
        codec.encode_fields(x, planes[:2], latitude)
    with torch.device("meta"):
        paper = VAEformer.from_preset("paper")
    with pytest.raises(ValueError):
        paper.encode_fields(x, planes, latitude)


def test_damage(codec, monkeypatch):
    from neuralcodec.codecs import vaeformer

    payload, _ = codec.encode_fields(weather(1, 9, 12).astype(np.float32), [Plane("t", 500)], None, 100)
    for how, bad in cuts(payload):
        with pytest.raises(CodecError):
            codec.decode_fields(bad)
            pytest.fail(how)
    for at in range(len(payload)):
        with pytest.raises(CodecError):
            codec.decode_fields(payload[:at] + bytes([payload[at] ^ 4]) + payload[at + 1 :])
    monkeypatch.setattr(vaeformer, "VALUES_MAX", 10)
    with pytest.raises(LimitExceeded):
        codec.decode_fields(payload)


def test_training_learns():
    """Both phases reach every parameter, and rate-distortion falls."""
    torch.manual_seed(0)
    fresh = VAEformer.from_preset("test")
    optimiser = torch.optim.Adam(fresh.parameters(), 2e-3)
    x = torch.from_numpy((weather(2, 64, 64, seed=3)[:, None] - 250) / 20).float()
    before = x.roll(2, 3) + 0.1
    facts = torch.from_numpy(facts_of([Plane("t", 500)] * 2, list(range(3200, -3200, -800)), 8, [0, 0])).float() / 4096
    level = torch.tensor([300.0, 700.0])
    x_hat, divergence = fresh.autoencode(x, level, facts, before)
    (x_hat - x).square().mean().add(divergence).backward()
    reached = {n for n, p in fresh.named_parameters() if p.grad is not None}
    losses = []
    for _ in range(40):
        out = fresh(x, level, facts, before)
        cost = sum(out.bits.values()) / x[0].numel() + fresh.lambda_of(level) * (out.x_hat - x).square().flatten(1).mean(1)
        loss = cost.log().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    reached |= {n for n, p in fresh.named_parameters() if p.grad is not None}
    assert reached == {n for n, _ in fresh.named_parameters()}
    assert losses[-1] < losses[0] - 0.3


def probe(folder: str) -> None:
    """Run in processes of their own: hashes of what a fixed payload decodes to."""
    model = registry.load("vaeformer", "test")
    payload = (Path(folder) / "payload").read_bytes()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for flag in (True, False):
            with torch.backends.mkldnn.flags(enabled=flag):
                results.append(hashlib.sha256(model.decode_fields(payload).tobytes()).hexdigest())
    print(json.dumps([torch.backends.cpu.get_cpu_capability(), results]))


def test_same_everywhere(codec, tmp_path):
    """The decoded base under instruction sets x threads x oneDNN."""
    x, planes, latitude = fields()
    payload, base = codec.encode_fields(x, planes, latitude, 500)
    (tmp_path / "payload").write_bytes(payload)
    code = f"import sys; sys.path.insert(0, {HERE!r}); import test_vaeformer as t; t.probe({str(tmp_path)!r})"
    hashes, capabilities = {hashlib.sha256(base.tobytes()).hexdigest()}, set()
    for capability in ("default", "avx2"):
        env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        used, found = json.loads(run.stdout.splitlines()[-1])
        capabilities.add(used)
        hashes |= set(found)
    assert len(hashes) == 1
    assert len(capabilities) > 1, "this machine knows one instruction set only: nothing was compared"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two small files in the manner of the climate data."""
    import xarray as xr

    path = tmp_path_factory.mktemp("climate")
    lat, lon = np.linspace(90, -90, 37), np.arange(72) * 5.0
    x = weather(2, 3, 37, 72).astype(np.float32)
    x[0, 1] = np.nan  # a level without data
    grid = {"latitude": lat, "longitude": lon}
    levels = grid | {"level": [850, 500, 200]}
    xr.Dataset({"t": (("time", "level", "latitude", "longitude"), x)}, levels).to_netcdf(path / "a.nc")
    gh = (5500 + 3 * weather(1, 37, 72)).astype(np.float32)
    xr.Dataset({"gh": (("time", "latitude", "longitude"), gh)}, grid).to_netcdf(path / "b.nc")
    return path


def test_training_fields(folder):
    from neuralcodec.train.climate import CROP, Sampler, crop, load_fields

    found = load_fields(folder)
    t, z = found
    assert t.periodic and z.periodic and t.usable.tolist() == [[True, False, True], [True] * 3]
    assert t.planes == [Plane("t", p) for p in (850, 500, 200)] and z.planes == [Plane("z", 0)]
    assert float(z.values.abs().max()) < 12  # geopotential, not its height
    sampler = Sampler(found, 0, 8)
    x, facts, weights, paired = sampler.batch(12)
    assert x.shape == (12, 2, *CROP) and weights.shape == (12, *CROP)
    assert facts.shape == (12, 2, len(VARIABLES) + FACTS, CROP[0] // 8, CROP[1] // 8)
    assert torch.allclose(weights.mean((1, 2)), torch.ones(12))
    assert set(paired.tolist()) == {0.0, 1.0}  # z stands alone
    for values, about, one in zip(x, facts, paired):
        assert bool((values[0] == values[1]).all()) == (not one)
        assert not about[0, -1].any() and bool((about[1, -1] == 1).all())
    rng = np.random.default_rng(0)
    values, _, weights = crop(t, [(1, 0)], rng, 8)
    assert not weights[37:].any() and not weights[:, 72:].any() and weights[:37, :72].all()
    finer, about, weights = crop(t, [(1, 0)], rng, 8, 4)
    assert weights.all()
    steps = [float((v[:, :36, 1:72] - v[:, :36, :71]).abs().mean()) for v in (values, finer)]
    assert steps[1] < steps[0] / 2  # smoother
    spacing = about[0, len(VARIABLES) + 7, 0, 0]
    assert spacing == pytest.approx(8 * 5.0 / 4 / 20, rel=0.01)  # tokens of eight values, now 5/4 degrees each


def test_training_from_files_to_weights(folder, tmp_path, monkeypatch):
    from neuralcodec.train.climate import main

    weights = tmp_path / "weights"
    assert main(["vaeformer:test", "--data", str(folder), "--out", str(tmp_path), "--minutes", "0.05", "--weights",
                 str(weights)]) == 0  # fmt: skip
    card = json.loads((weights / "vaeformer-test.json").read_text())
    assert card["training"]["steps"] > 0 and card["training"]["fields"] == 6
    from neuralcodec.codecs.weights import load_weights

    fresh = VAEformer.from_preset("test")
    load_weights(fresh, weights / "vaeformer-test.safetensors")
    x = weather(1, 20, 30).astype(np.float32)
    payload, base = fresh.encode_fields(x, [Plane("t", 500)], None, 800)
    assert np.array_equal(fresh.decode_fields(payload), base)


def test_where_prediction_starts(folder):
    """The table that the fields' coder starts from comes out of this recipe, and its shape is the kernel's."""
    from neuralcodec.entropy.grid.prior import PRIOR
    from neuralcodec.train.climate_prior import prior_of

    table = prior_of(folder)
    assert table.shape == PRIOR.shape
    assert (np.abs(table[0, 1:3] + 16) < 16).all()  # across, finest: near the cubic -1/16
    assert np.abs(PRIOR[0, 1:3] + 1 / 16).max() < 0.02


def test_threads_do_not_hear_each_other(codec):
    """One model codes chunks side by side, each with references of its own."""
    jobs = [weather(3, 40, 64, seed=s, rough=0.3).astype(np.float32) for s in range(4)]
    planes = [Plane("t", p) for p in (1000, 500, 10)]
    alone = [codec.encode_fields(x, planes, None, 500)[0] for x in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: codec.encode_fields(x, planes, None, 500)[0], jobs))
        assert together == alone
        back = list(pool.map(codec.decode_fields, together))
    assert all(np.array_equal(a, codec.decode_fields(b)) for a, b in zip(back, alone))


@pytest.mark.parametrize("dtype", ["f4", "i2"])
def test_best_effort_is_the_networks_field(codec, dtype):
    """Nothing comes between the network and the reader: the field of a chunk is what the network decodes, masks kept."""
    from neuralcodec.codecs.grid_chunk import Coding, decode_chunk, encode_chunk
    from neuralcodec.codecs.grid_neural import About

    rng = np.random.default_rng(0)
    x = weather(2, 40, 64, rough=0.5) + 5 * rng.standard_normal((2, 40, 64))  # rough: a predictor would smooth it
    coding = Coding(dtype, "TYX", "quality", 60.0, model="vaeformer:test", scale=0.01 if dtype == "i2" else 1.0,
                    offset=250.0 if dtype == "i2" else 0.0)  # fmt: skip
    raw = x.astype(np.float32) if dtype == "f4" else np.rint((x - 250) / 0.01).astype(np.int16)
    if dtype == "f4":
        raw[0, 3:6, 4:9], raw[1, 0, 0] = np.nan, -np.inf
    latitude = np.linspace(80, -80, 40)
    payload, stats = encode_chunk(raw, coding, what=About("t", (500,), latitude))
    back = decode_chunk(payload, raw.shape, coding)
    real = raw.astype(np.float64) * coding.scale + coding.offset
    _, base = codec.encode_fields(real, [Plane("t", 500)] * 2, latitude, coding.level)
    expected = (base - coding.offset) / coding.scale
    finite = np.isfinite(real)
    low, high = raw[finite].min(), raw[finite].max()
    expected = expected.astype(np.float32) if dtype == "f4" else np.rint(expected)
    assert np.array_equal(back[finite], np.clip(expected, low, high)[finite].astype(raw.dtype))
    assert np.array_equal(back[~finite], raw[~finite], equal_nan=True)
    worst = np.abs(expected.astype(np.float64) - raw)[finite].max() * coding.scale  # before limits take some of it off
    assert stats.neural and stats.worst == pytest.approx(worst)
