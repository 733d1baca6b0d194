"""What every image codec of the suite must keep. A codec inherits ``ImageCodecContract`` and says which weights it uses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import torch
from conftest import scene
from damage import cuts, mutations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neuralcodec.codecs import registry
from neuralcodec.codecs.base import LEVELS, count_parameters
from neuralcodec.codecs.image import decode_picture, encode_picture, psnr_of
from neuralcodec.container import (
    CodecError,
    CorruptStream,
    ModelMismatch,
    Segment,
    Stream,
    UnknownCodec,
    dumps,
    loads,
)
from neuralcodec.media.image import Picture, read_picture

GOLDEN = Path(__file__).parent / "golden"
HERE = str(Path(__file__).parent)


def photo() -> np.ndarray:
    """A part of a real photograph, (256, 320, 3) uint8."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return read_picture(file.read()).pixels[40:296, 100:420]


def contents(h: int, w: int) -> dict[str, np.ndarray]:
    """Pictures that a codec must code exactly, whatever it makes of them."""
    rng = np.random.default_rng(5)
    board = ((np.indices((h, w)).sum(0) % 2) * 255).astype(np.uint8)
    return {
        "photo": photo()[:h, :w],
        "noise": rng.integers(0, 256, (h, w, 3), np.uint8),
        "black": np.zeros((h, w, 3), np.uint8),
        "white": np.full((h, w, 3), 255, np.uint8),
        "board": board[..., None].repeat(3, 2),
        "saturated": rng.choice(np.array([0, 255], np.uint8), (h, w, 3)),
    }


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    return x.contiguous(memory_format=torch.channels_last)


def probe(folder: str, model: str) -> None:
    """Run by the exactness test in processes of their own: hashes of payloads and symbols under this process' settings."""
    stored = np.load(Path(folder) / "latents.npz")
    codec = registry.load(*registry.split(model))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for flag in (True, False):
            with torch.backends.mkldnn.flags(enabled=flag):
                sha = hashlib.sha256()
                for key in sorted(k[2:] for k in stored.files if k.startswith("y.")):
                    level = int(key.rsplit(".", 1)[1])
                    y, z = (torch.from_numpy(stored[f"{part}.{key}"]) for part in "yz")
                    payload, y_hat = codec.latent.compress(y, z, level)
                    known = stored[f"p.{key}"].tobytes()
                    decoded = codec.decode_latent(known, *y.shape[2:], level)
                    sha.update(payload + y_hat.numpy().tobytes() + decoded.numpy().tobytes())
                results.append(sha.hexdigest())
    print(json.dumps([torch.backends.cpu.get_cpu_capability(), results]))


class ImageCodecContract:
    """Inherit, set ``model`` to ``codec:preset`` with weights at hand."""

    model: str

    @pytest.fixture(scope="class")
    def codec(self):
        return registry.load(*registry.split(self.model))

    def test_latent_round_trip(self, codec):
        """The decoder finds the encoder's y^, bit for bit, for every content and level."""
        for name, pixels in contents(64, 128).items():
            for level in (0, 333, LEVELS):
                y = codec.analyse(as_tensor(pixels), level)
                payload, y_hat = codec.encode_latent(y, level)
                assert y_hat.shape == y.shape
                assert torch.equal(codec.decode_latent(payload, *y.shape[2:], level), y_hat), (name, level)

    def test_unusual_latents(self, codec):
        """Latents that no picture gives: huge, NaN, infinite. Coded or clamped, always the same on both sides."""
        m = codec.config.latent.channels
        for fill in (1e6, -1e30, float("nan"), float("inf")):
            y = torch.randn(1, m, 4, 8, generator=torch.Generator().manual_seed(1))
            y[:, ::3] = fill
            payload, y_hat = codec.encode_latent(y, 700)
            assert torch.isfinite(y_hat).all()
            assert torch.equal(codec.decode_latent(payload, 4, 8, 700), y_hat)

    @given(
        h=st.integers(1, 300), w=st.integers(1, 200), grey=st.booleans(), alpha=st.booleans(),
        quality=st.integers(0, LEVELS), seed=st.integers(0, 99),
    )  # fmt: skip
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def test_any_size_and_mode(self, codec, h, w, grey, alpha, quality, seed):
        pixels = scene(max(h, 3), w, seed)[:h]
        plane = np.random.default_rng(seed).integers(0, 256, (h, w), np.uint8) if alpha else None
        picture = Picture(pixels[..., :1] if grey else pixels, plane)
        made: dict = {}
        data = dumps(encode_picture(codec, picture, quality, trace=made))
        found: dict = {}
        back = decode_picture(codec, loads(data), trace=found)
        assert back.pixels.shape == picture.pixels.shape and back.pixels.dtype == np.uint8
        assert made == found
        if alpha:
            assert np.array_equal(back.alpha, plane)

    def test_quality_buys_quality(self, codec):
        """Rate and PSNR of a photograph grow with the level."""
        picture = Picture(photo())
        sizes, psnrs = [], []
        for level in (0, 300, 600, LEVELS):
            stream = encode_picture(codec, picture, level)
            sizes.append(len(dumps(stream)))
            psnrs.append(psnr_of(picture.pixels, decode_picture(codec, stream).pixels))
        assert sizes == sorted(sizes) and psnrs == sorted(psnrs)
        assert sizes[-1] > 1.5 * sizes[0] and psnrs[0] > 18

    def test_tiles_and_regions(self, codec):
        """A tiled picture has no seams worth a tenth of a dB, and a region is a cut of the whole, exactly."""
        picture = Picture(photo())
        whole = encode_picture(codec, picture, 500)
        tiled = encode_picture(codec, picture, 500, tile=128)
        assert len(tiled.segments) == 6
        a, b = (decode_picture(codec, s).pixels for s in (whole, tiled))
        assert abs(psnr_of(picture.pixels, a) - psnr_of(picture.pixels, b)) < 0.1
        part = decode_picture(codec, tiled, roi=(100, 77, 55, 130))
        assert np.abs(part.pixels.astype(int) - b[77:207, 100:155]).max() <= 1  # float synthesis of another window

    def test_same_everywhere(self, codec, tmp_path):
        """Payloads of fixed latents, and symbols of fixed payloads, under instruction sets x threads x oneDNN."""
        stored = {}
        for name, pixels in contents(128, 192).items():
            for level in (100, 900):
                y = codec.analyse(as_tensor(pixels), level)
                z = codec.latent.analyse_hyper(y, level)
                payload, _ = codec.latent.compress(y, z, level)
                key = f"{name}.{level}"
                stored |= {f"y.{key}": y.numpy(), f"z.{key}": z.numpy(), f"p.{key}": np.frombuffer(payload, np.uint8)}
        np.savez(tmp_path / "latents.npz", **stored)
        code = f"import sys; sys.path.insert(0, {HERE!r}); import contract; contract.probe({str(tmp_path)!r}, {self.model!r})"
        hashes, capabilities = set(), set()
        for capability in ("default", "avx2", "avx512"):
            env = os.environ | {"ATEN_CPU_CAPABILITY": capability}
            run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr
            used, found = json.loads(run.stdout.splitlines()[-1])
            capabilities.add(used)
            hashes |= set(found)
        assert len(hashes) == 1
        assert len(capabilities) > 1, "this machine knows one instruction set only: nothing was compared"

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_cuda_and_cpu_agree(self, codec):
        cuda = registry.codec_class(codec.name).from_preset(codec.preset)
        from neuralcodec.codecs.weights import load_weights

        load_weights(cuda, registry.weights_path(codec.name, codec.preset))
        cuda = cuda.cuda()
        for level in (100, 900):
            y = codec.analyse(as_tensor(photo()), level)
            z = codec.latent.analyse_hyper(y, level)
            here, there = codec.latent.compress(y, z, level), cuda.latent.compress(y.cuda(), z.cuda(), level)
            assert here[0] == there[0] and torch.equal(here[1], there[1].cpu())
            assert torch.equal(cuda.decode_latent(here[0], *y.shape[2:], level).cpu(), here[1])

    def test_damaged_files(self, codec):
        """2,000 damaged files and every cut: a typed error, or an exact decode where only metadata was hit."""
        picture = Picture(photo()[:48, :64], exif=b"Exif\0\0" + bytes(range(60)))
        stream = encode_picture(codec, picture, 400)
        data = dumps(stream)
        other = dumps(encode_picture(codec, Picture(photo()[50:98, 60:124]), 400))
        right = decode_picture(codec, loads(data)).pixels
        worst, survived = 0.0, 0
        for what, bad in [*cuts(data), *mutations(data, other, 2000, seed=11)]:
            if bad == other:
                continue
            start = time.monotonic()
            try:
                got = loads(bad)
                pixels = decode_picture(registry.load_for(got), got).pixels
            except CodecError as error:
                assert error.exit_code in (3, 4, 5), what
                assert "\n" not in str(error)
            else:
                assert got.warnings and np.array_equal(pixels, right), what
                survived += 1
            worst = max(worst, time.monotonic() - start)
        assert survived > 0 and worst < 5

    def test_damage_behind_a_right_checksum(self, codec):
        """A forged payload gives CorruptStream or some picture, never a crash or a hang."""
        picture = Picture(photo()[:64, :96])
        stream = encode_picture(codec, picture, 600)
        other = encode_picture(codec, Picture(photo()[64:128, :96]), 600).segments[0].data
        noticed = 0
        forged = list(mutations(stream.segments[0].data, other, 300, seed=4))
        for _, payload in forged:
            copy = Stream(stream.codec, stream.preset, stream.model_id, stream.header, [Segment("tile", payload)])
            try:
                decode_picture(codec, loads(dumps(copy)))
            except CorruptStream:
                noticed += 1
        assert noticed >= 0.95 * len(forged)

    def test_forged_headers(self, codec):
        stream = encode_picture(codec, Picture(photo()[:64, :96]), 600)
        for change in (
            {"w": 0}, {"w": -5}, {"w": "96"}, {"w": True}, {"w": 97 * 64}, {"w": 1 << 40}, {"h": 65_536},
            {"h": 65_535, "w": 65_535},
            {"q": 1001}, {"q": -1}, {"q": 1.5}, {"t": 100}, {"t": 64}, {"c": 2}, {"d": 9}, {"f": 3},
        ):  # fmt: skip
            forged = Stream(stream.codec, stream.preset, stream.model_id, stream.header | change, stream.segments)
            with pytest.raises(CodecError):
                decode_picture(codec, loads(dumps(forged)))
                pytest.fail(str(change))

    def test_other_weights_are_refused(self, codec):
        stream = encode_picture(codec, Picture(photo()[:64, :64]), 500)
        with pytest.raises(ModelMismatch, match="weights"):
            registry.load_for(Stream(stream.codec, stream.preset, bytes(8), stream.header))
        with pytest.raises(UnknownCodec):
            registry.load_for(Stream("no-such-codec", "light", bytes(8), {}))

    def test_golden_streams(self, codec):
        """Files made by earlier versions decode to the same symbols for ever. They are made by ``golden/make.py``, once."""
        index = json.loads((GOLDEN / "index.json").read_text())
        mine = {k: v for k, v in index.items() if v["model"] == self.model}
        assert len(mine) >= 3
        for name, entry in mine.items():
            trace: dict = {}
            stream = loads((GOLDEN / name).read_bytes())
            picture = decode_picture(registry.load_for(stream), stream, trace=trace)
            assert {f"{c},{r}": v for (c, r), v in trace.items()} == entry["symbols"], name
            assert list(picture.pixels.shape) == entry["shape"]
            mean = picture.pixels.reshape(-1, picture.pixels.shape[2]).mean(0)
            assert np.abs(mean - entry["mean"]).max() < 0.1, name

    def test_freezing_costs_nothing(self, codec):
        """Bits of the exact model against the same model's float estimate are checked on Kodak by hand (see the card); here
        the file must not be larger than the ideal cost of its symbols by more than the framing."""
        y = codec.analyse(as_tensor(photo()), 500)
        payload, _ = codec.encode_latent(y, 500)
        ideal = codec.latent.ideal_bits(y, codec.latent.analyse_hyper(y, 500), 500)
        if codec.latent.mixing is None:
            assert ideal / 8 <= len(payload) <= ideal / 8 * 1.001 + 8
        else:  # context mixing knows more than the tables
            assert ideal / 16 < len(payload) < ideal / 8

    def test_card_tells_the_truth(self, codec):
        card = next(c for c in registry.describe() if f"{c['codec']}:{c['preset']}" == self.model)
        assert card["model_id"] == codec.model_id.hex()
        fresh = registry.codec_class(codec.name).from_preset(codec.preset)
        assert card["parameters"] == count_parameters(fresh)
        assert card["kmac_per_pixel"] == fresh.kmac_per_pixel()
        assert Path(card["file"]).stat().st_size == card["bytes"] <= 16 << 20

    def test_training_step(self, codec):
        """The float side trains: gradients reach every parameter, and the loss falls on one picture."""
        torch.manual_seed(0)
        from neuralcodec.train.loop import rd_loss

        fresh = registry.codec_class(codec.name).from_preset("test")
        optimiser = torch.optim.Adam(fresh.parameters(), 2e-3)
        x = as_tensor(photo()[:64, :64]).repeat(2, 1, 1, 1)
        losses = []
        for _ in range(30):
            loss, _ = rd_loss(fresh, x, torch.tensor([300.0, 700.0]), 0.5)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        missing = [n for n, p in fresh.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert not missing
        assert losses[-1] < 0.7 * losses[0]

