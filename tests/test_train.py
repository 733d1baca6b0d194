"""The training loop: recipes, data, optimiser, start, resumption, many processes, freezing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import scene
from neuralcodec.codecs import registry
from neuralcodec.codecs.hyperprior import Config, Hyperprior
from neuralcodec.codecs.weights import load_weights
from neuralcodec.eval.metrics import ms_ssim_tensor
from neuralcodec.train import loop
from neuralcodec.train.data import Crops, load_folder, retoned
from neuralcodec.train.freeze import freeze_checkpoint
from neuralcodec.train.klt import start_at_klt
from neuralcodec.train.loop import Recipe, fit_blocks, rd_loss, train, transfer
from neuralcodec.train.optim import Muon, orthogonalise
from neuralcodec.train.plot import plot_run, read_log
from PIL import Image

RECIPES = sorted((Path(__file__).parent.parent / "train" / "recipes").glob("*.toml"))
RECIPES = [path for path in RECIPES if not path.stem.startswith("nacrith")]  # those are in test_bytes_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """24 pictures of 128x128 and 4 of 64x64."""
    place = tmp_path_factory.mktemp("pictures")
    for i in range(24):
        Image.fromarray(scene(128, 128, i)).save(place / f"a{i:02}.png")
    for i in range(4):
        Image.fromarray(scene(64, 64, 100 + i)).save(place / f"b{i}.png")
    return place


def fresh():
    torch.manual_seed(0)
    return registry.codec_class("hyperprior").from_preset("test")


def recipe(**changes) -> Recipe:
    values = {"steps": 8, "warmup_steps": 2, "stages": [{"until": 1.0, "crop": 64, "batch": 2}], "klt_pictures": 8}
    return Recipe(**(values | changes))


# --- recipes and data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_bundled_recipes_are_complete(path):
    read = Recipe.read(path)
    assert read.stages[-1]["until"] == 1.0
    assert [s["until"] for s in read.stages] == sorted(s["until"] for s in read.stages)
    rates = [read.rate(10_000, done / 100) for done in range(100)]
    assert max(rates) <= 1.01 and rates[-1] < 0.2 and min(rates) > 0


def test_recipes_refuse_what_they_do_not_know(tmp_path):
    (tmp_path / "r.toml").write_text("learning_rate = 1\n")
    with pytest.raises(ValueError, match="learning_rate"):
        Recipe.read(tmp_path / "r.toml")


def test_pictures_are_grouped_by_size_and_kept(folder, tmp_path):
    stacks = load_folder(folder, tmp_path / "cache.npz")
    assert [tuple(s.shape) for s in stacks] == [(4, 3, 64, 64), (24, 3, 128, 128)]
    again = load_folder(tmp_path / "no such folder", tmp_path / "cache.npz")
    assert all(torch.equal(a, b) for a, b in zip(stacks, again))
    assert np.array_equal(stacks[1][3].permute(1, 2, 0).numpy(), scene(128, 128, 3))
    with pytest.raises(ValueError, match="no pictures"):
        load_folder(tmp_path)


def test_crops_are_parts_of_pictures_and_repeatable():
    """Every crop lies in the only picture, in one of its eight orientations; equal seeds give equal crops."""
    picture = torch.arange(3 * 40 * 48, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(1, 3, 40, 48)
    known = set()
    for top in range(40 - 31):
        for left in range(48 - 31):
            part = picture[0, :, top : top + 32, left : left + 32].numpy()
            for turned in (part, part.transpose(0, 2, 1)):
                known |= {turned[:, ::a, ::b].tobytes() for a in (1, -1) for b in (1, -1)}
    a, b = (Crops([picture], 4, 32, "cpu", seed=3) for _ in range(2))
    seen = set()
    for _ in range(20):
        x = a.next()
        assert torch.equal(x, b.next()) and x.shape == (4, 3, 32, 32)
        whole = (x * 255).round().to(torch.uint8)
        parts = {c.numpy().tobytes() for c in whole}
        assert parts <= known
        seen |= parts
    assert len(seen) > 40
    with pytest.raises(ValueError, match="at least 64"):
        Crops([picture], 4, 64, "cpu", seed=0)


def test_crops_of_other_scale_and_tone():
    """Resized crops are of the size asked for and in range, from pictures large enough for their side; a grey picture keeps
    its place between black and white; half of the crops keep their tone."""
    stacks = [torch.full((2, 3, 64, 64), 51, dtype=torch.uint8), torch.full((1, 3, 96, 96), 204, dtype=torch.uint8)]
    crops = Crops(stacks, 8, 64, "cpu", seed=1, resize=(1.0, 1.5))
    sides = {crops._side() for _ in range(200)}
    assert min(sides) == 64 and 90 <= max(sides) <= 96 and len(sides) > 20
    seen = set()
    for _ in range(40):
        x = crops.next()
        assert x.shape == (8, 3, 64, 64) and x.min() >= 0 and x.max() <= 1
        assert float((x - x.mean((1, 2, 3), keepdim=True)).abs().max()) < 1e-5  # each of one grey
        seen |= {round(255 * v) for v in x.mean((1, 2, 3)).tolist()}
    assert seen == {51, 204}
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 3, 4, 4, generator=generator)
    y = retoned(x, 0.25, generator)
    kept = (x == y).flatten(1).all(1)
    assert 150 < kept.sum() < 250 and y.min() >= 0 and y.max() <= 1 and y.isfinite().all()
    assert float((x - y)[~kept].abs().mean()) > 0.02
    black, white = torch.zeros(50, 3, 4, 4), torch.ones(50, 3, 4, 4)
    darkest, brightest = (retoned(v, 0.25, torch.Generator().manual_seed(2)).mean((1, 2, 3)) for v in (black, white))
    assert (darkest < brightest).all() and darkest.max() < 0.3 and brightest.min() > 0.7


# --- optimiser and start --------------------------------------------------------------------------------------------


def test_orthogonalise_gives_even_singular_values():
    torch.manual_seed(1)
    for shape in ((16, 40), (40, 16)):
        s = torch.linalg.svdvals(orthogonalise(torch.randn(shape) @ torch.diag(torch.logspace(-1, 1, shape[1]))))
        assert 0.3 < s.min() and s.max() < 1.4


def test_muon_finds_a_minimum():
    torch.manual_seed(1)
    weight, target = torch.nn.Parameter(torch.zeros(8, 2, 3, 3)), torch.randn(8, 2, 3, 3)
    optimiser = Muon([weight], lr=0.2)
    for step in range(200):
        optimiser.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        loss = (weight - target).square().sum()
        weight.grad = None
        loss.backward()
        optimiser.step()
    assert loss < 0.02 * target.square().sum()


def test_the_klt_start_is_a_working_transform_codec(folder):
    """Before any training: loss far below that of a noisy start, and a transform that loses little."""
    stacks = load_folder(folder)
    x = stacks[1][:8].float() / 255
    level = torch.full((8,), 600.0)
    codec = fresh()
    noisy = float(rd_loss(codec, x, level, 0.5)[0].detach())
    start_at_klt(codec, stacks[1])
    started = float(rd_loss(codec, x, level, 0.5)[0].detach())
    assert started < 0.3 * noisy


# --- the loop -------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_freezes(folder, tmp_path):
    stacks = load_folder(folder)
    run = recipe(steps=60, optimiser="muon", muon_lr=5e-4, start="klt", warmup_steps=5,
                 stages=[{"until": 0.7, "crop": 64, "batch": 4}, {"until": 1.0, "crop": 64, "batch": 4, "hard": True}],
                 decay_to=0.7)  # fmt: skip
    train(fresh(), stacks, run, tmp_path, log_every=10)
    rows, validations = read_log(tmp_path)
    assert [r["step"] for r in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1]["loss"] < rows[0]["loss"] and validations[-1]["step"] == 60
    curve = validations[-1]["validation"]
    assert [r["bpp"] for r in curve] == sorted(r["bpp"] for r in curve)
    picture = plot_run(tmp_path)
    assert picture is not None and Image.open(picture).size[0] > 800

    card = freeze_checkpoint(tmp_path / "last.pt", "hyperprior:test", tmp_path / "weights", "for a test", folder)
    assert card["training"]["steps"] == 60 and card["training"]["note"] == "for a test"
    assert abs(card["measured"]["freezing"]["gaussian"]) < 0.003
    assert json.loads((tmp_path / "weights" / "hyperprior-test.json").read_text()) == card
    loaded = fresh()
    load_weights(loaded, tmp_path / "weights" / "hyperprior-test.safetensors")
    assert loaded.model_id.hex() == card["model_id"]
    y = loaded.analyse(stacks[1][:1].float()[:, :, :64, :64] / 255, 500)
    payload, y_hat = loaded.encode_latent(y, 500)
    assert torch.equal(loaded.decode_latent(payload, 4, 4, 500), y_hat)


def test_new_blocks_rest_at_first():
    """A codec with more blocks at H/16 goes on from one without: at first it does the same."""
    small = registry.codec_class("hyperprior").from_preset("test")
    config = small.config
    large = Hyperprior(Config(config.widths, (1, 1, 1), (1, 1, 2), config.latent, hidden=((0, 0, 24),) * 2))
    left = transfer(large, small.state_dict())
    assert left == {f"{name}.{part}.{kind}" for name in ("g_a.at16.0", "g_s.at16.0", "g_s.at16.1")
                    for part in "ab" for kind in ("weight", "bias")}  # fmt: skip
    x, level = torch.rand(1, 3, 64, 64), torch.tensor([400.0])
    y = small.g_a(x, level)
    assert torch.allclose(large.g_a(x, level), y, atol=1e-6)
    assert torch.allclose(large.g_s(y, level), small.g_s(y, level), atol=1e-6)
    assert large.g_s.at16[0].a.out_channels == 24
    large.g_a(x, level).square().sum().backward()
    assert large.g_a.at16[0].b.weight.grad.abs().max() > 0  # and then it learns


def test_dead_blocks_are_taken_out():
    """A codec with fewer blocks does the same as one whose other blocks only add constants, but for the border."""
    large = Hyperprior(Config((16, 24), (1, 2, 1), (2, 1, 1), registry.codec_class("hyperprior").presets["test"].latent))
    with torch.no_grad():
        for block in (*large.g_a.at8[:2], *large.g_a.at16, large.g_s.at16[0], large.g_s.at8[0], large.g_s.at4[1]):
            block.a.bias.fill_(-100)
            block.b.bias.normal_()
    small = Hyperprior(Config((16, 24), (1, 0, 0), (1, 0, 0), large.config.latent))
    assert transfer(small, large.state_dict()) == set()
    x, level = torch.rand(1, 3, 192, 192), torch.tensor([400.0])
    y = large.g_a(x, level)
    assert torch.allclose(small.g_a(x, level), y, atol=1e-4)
    assert torch.allclose(small.g_s(y, level)[..., 8:-8, 8:-8], large.g_s(y, level)[..., 8:-8, 8:-8], atol=1e-4)


def test_gates_start_as_the_identity_and_learn():
    """A codec with energy gates goes on from one without; their gain is bounded, whatever comes in."""
    small = registry.codec_class("hyperprior").from_preset("test")
    config = small.config
    large = Hyperprior(replace(config, gates=True))
    transfer(large, small.state_dict())
    x, level = torch.rand(1, 3, 64, 64), torch.tensor([400.0])
    y = small.g_a(x, level)
    assert torch.equal(large.g_a(x, level), y) and torch.equal(large.g_s(y, level), small.g_s(y, level))
    (large.g_a(x, level).square().sum() + large.g_s(y, level).square().sum()).backward()
    for side in (large.g_a, large.g_s):
        for gate in (side.gate4, side.gate8):
            assert gate.mix.weight.grad.abs().amax((1, 2, 3)).min() > 0
    gate = large.g_a.gate8
    torch.nn.init.normal_(gate.mix.weight, std=30)
    wild = torch.randn(1, config.widths[1], 8, 8) * torch.logspace(-6, 6, 8)
    out = gate(wild)
    assert torch.isfinite(out).all() and (out.abs() <= 2 * wild.abs()).all() and (out * wild >= 0).all()


def test_normed_blocks_take_the_place_of_plain_ones():
    """They rest at first, whatever the plain ones had been; their gains then make all channels even; and they learn."""
    small = registry.codec_class("hyperprior").from_preset("test")
    large = Hyperprior(replace(small.config, kinds=("nnn", "nnn")))
    fresh = transfer(large, small.state_dict())
    for side in (small.g_a, small.g_s):  # without its blocks, which the other has not
        for stage in (side.at4, side.at8):
            with torch.no_grad():
                stage[0].b.weight.zero_(), stage[0].b.bias.zero_()
    x, level = torch.rand(2, 3, 64, 64) * torch.rand(2, 3, 1, 1), torch.tensor([400.0, 700.0])
    y = small.g_a(x, level)
    assert torch.allclose(large.g_a(x, level), y, atol=1e-6)
    fit_blocks(large, x, level, fresh)
    assert torch.allclose(large.g_a(x, level), y, atol=1e-6)
    block, seen = large.g_a.at4[0], large.g_a.gate4(large.g_a.patch(x - 0.5))
    even = (seen * block.log_gain.exp()).std((0, 2, 3))
    assert torch.allclose(even[seen.std((0, 2, 3)) > 1e-3], torch.ones(()), atol=1e-3)
    torch.nn.init.constant_(block.scale, 0.1)
    wild = seen * torch.logspace(-3, 6, seen.shape[3])
    assert (block(wild) - wild).abs().max() < 0.1 * block.b.weight.abs().sum((1, 2, 3)).max() * 10 * seen.shape[1]
    large.g_a(x, level).square().sum().backward()
    assert block.a.weight.grad.abs().amax((1, 2, 3)).min() > 0 and large.g_a.at8[0].scale.grad.abs().min() > 0


def test_hard_stages_leave_the_encoder_alone(folder, tmp_path):
    stacks, codec = load_folder(folder), fresh()
    before = {k: v.clone() for k, v in codec.state_dict().items()}
    run = recipe(steps=3, warmup_steps=1, stages=[{"until": 1.0, "crop": 64, "batch": 2, "hard": True}])
    train(codec, stacks, run, tmp_path)
    changed = {k for k, v in codec.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in changed if k.startswith(("g_a.", "latent.h_a.", "latent.z_gain"))]
    assert any(k.startswith("g_s.") for k in changed) and any(k.startswith("latent.models.") for k in changed)


def test_a_resumed_run_goes_on(folder, tmp_path):
    """Steps count on, the optimiser keeps its momentum, and the checkpoint holds the later weights."""
    stacks = load_folder(folder)
    train(fresh(), stacks, recipe(steps=4), tmp_path)
    first = torch.load(tmp_path / "last.pt", weights_only=True)
    train(fresh(), stacks, recipe(steps=7), tmp_path, resume=True)
    second = torch.load(tmp_path / "last.pt", weights_only=True)
    assert (first["step"], second["step"]) == (4, 7) and second["seconds"] > first["seconds"]
    state = second["optimisers"][0]["state"]
    assert {int(s["step"]) for s in state.values()} == {7}
    moved = [k for k, v in second["model"].items() if not torch.equal(v, first["model"][k])]
    assert len(moved) > len(second["model"]) / 2


def test_bad_gradients_change_nothing(folder, tmp_path, capsys):
    """A step whose gradient is not finite is skipped and told."""
    codec = fresh()
    with torch.no_grad():
        codec.g_s.at4[-1][0].bias[0] = float("nan")
    before = codec.g_a.patch[1].weight.clone()
    train(codec, load_folder(folder), recipe(steps=2), tmp_path)
    assert torch.equal(codec.g_a.patch[1].weight, before)
    assert capsys.readouterr().out.count("not finite") == 2


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_train_one_model(folder, tmp_path):
    """What torchrun starts: gradients are shared, the stages change together, one of them writes."""
    (tmp_path / "r.toml").write_text(
        "steps = 6\nwarmup_steps = 1\n"
        "stages = [{until = 0.5, crop = 64, batch = 2}, {until = 1.0, crop = 64, batch = 2, hard = true}]\n"
    )
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from neuralcodec.train import loop\n"
        "made = []\n"
        "build = loop.registry.codec_class('hyperprior').from_preset\n"
        "loop.registry.codec_class('hyperprior').from_preset = lambda p: made.append(build(p)) or made[-1]\n"
        "loop.main(sys.argv[1:])\n"
        "print('SUM', repr(float(sum(p.double().abs().sum() for p in made[0].parameters()))))\n"
    )
    args = ["hyperprior:test", "--data", folder, "--recipe", tmp_path / "r.toml", "--out", tmp_path / "run", "--device", "cpu"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], outputs
    sums = [next(line for line in out.splitlines() if line.startswith("SUM")) for out, _ in outputs]
    assert sums[0] == sums[1]
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 6
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_training_needs_nothing_that_only_coding_needs():
    """On a machine with torch, numpy, pillow and safetensors alone the loop can be imported and a step be made."""
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('constriction', 'google_crc32c', 'rich', 'matplotlib', 'xarray', 'netCDF4',\n"
        "                                  'diffusers', 'compressai', 'imagecodecs', 'bjontegaard'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import torch\n"
        "from neuralcodec.codecs import registry\n"
        "from neuralcodec.train.loop import rd_loss\n"
        "for name in registry.names():\n"
        "    if registry.codec_class(name).kind == 'image':\n"
        "        codec = registry.codec_class(name).from_preset('test')\n"
        "        loss, _ = rd_loss(codec, torch.rand(1, 3, 64, 64), torch.tensor([500.0]), 0.5)\n"
        "        loss.backward()\n"
        "        print(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "hyperprior" in run.stdout.split()


# --- MS-SSIM ----------------------------------------------------------------------------------------------------------


def test_lambdas_for_ms_ssim_follow_the_published_pairs():
    pairs = {0.0018: 2.4, 0.0035: 4.58, 0.0067: 8.73, 0.013: 16.64, 0.025: 31.73, 0.0483: 60.5}
    for mse, ms_ssim in pairs.items():
        assert abs(loop.MS_SSIM_FACTOR * mse**loop.MS_SSIM_POWER / ms_ssim - 1) < 0.01


def test_training_for_ms_ssim():
    """The loss is bpp + lambda_ms * (1 - MS-SSIM) with the weight of the level, and steps on it raise the similarity."""
    codec = fresh()
    x = torch.from_numpy(np.stack([scene(128, 128, i).transpose(2, 0, 1) for i in range(12)]))
    start_at_klt(codec, x)
    x, level = x[:2].float() / 255, torch.tensor([300.0, 700.0])
    torch.manual_seed(1)
    out = codec(x, level)
    torch.manual_seed(1)
    loss, figures = rd_loss(codec, x, level, 0.5, distortion="ms-ssim")
    lam = codec.lambda_of(level)
    similarity = torch.stack([ms_ssim_tensor(a[None], b[None], scales=4)[0] for a, b in zip(out.x_hat, x)])
    expected = figures["bpp"] + loop.MS_SSIM_FACTOR * lam**loop.MS_SSIM_POWER * (1 - similarity)
    assert torch.allclose(loss, (expected * lam**-0.5).mean(), rtol=1e-5)

    optimiser = torch.optim.Adam(codec.parameters(), 1e-4)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss, _ = rd_loss(codec, x, level, 0.5, distortion="ms-ssim")
        loss.backward()
        assert all(p.grad.isfinite().all() for p in codec.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]


def test_recipes_have_no_unknown_stage_keys(tmp_path):
    (tmp_path / "r.toml").write_text("stages = [{until = 1.0, crop = 64, batch = 2, rezise = [0.8, 1.5]}]\n")
    with pytest.raises(ValueError, match="'rezise'"):
        Recipe.read(tmp_path / "r.toml")


def test_recipes_name_a_known_distortion(tmp_path):
    (tmp_path / "r.toml").write_text('distortion = "vmaf"\n')
    with pytest.raises(ValueError, match="vmaf"):
        Recipe.read(tmp_path / "r.toml")


def test_contexts_are_compared_on_one_transform(folder, tmp_path):
    """The transform rests, every latent model learns, rates are bytes; a codec with another y is refused."""
    from neuralcodec.eval.bdrate import load_anchor
    from neuralcodec.train.contexts import compare, graft

    torch.manual_seed(0)
    control = registry.codec_class("hyperprior").from_preset("light")
    stacks = load_folder(folder)
    start_at_klt(control, stacks[-1])
    state = control.state_dict()
    pictures = [p[None].float() / 255 for p in stacks[-1][:1]]
    anchor = load_anchor("kodak", "vtm")
    settings = recipe(steps=3, optimiser="muon")
    rows = compare(["hyperprior", "mlicv2:compare"], state, [stacks[-1]], pictures, settings, anchor, tmp_path)
    assert [row["model"] for row in rows] == ["hyperprior", "mlicv2:compare"]
    assert rows[1]["curve"] != rows[0]["curve"] and np.isfinite(rows[1]["bd_rate_to_first"])
    for name in ("hyperprior", "mlicv2:compare"):
        trained = torch.load(tmp_path / f"{name.replace(':', '-')}.pt", weights_only=True)["ema"]
        assert all(torch.equal(trained[k], v) for k, v in state.items() if k.startswith("g_"))
        fresh_latent = graft(name, state).state_dict()
        assert any(not torch.equal(trained[k], v) for k, v in fresh_latent.items() if k.startswith("latent.models"))
    with pytest.raises(ValueError, match="knots"):
        graft("feds:compare", state)
