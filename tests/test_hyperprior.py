"""The control codec: the contract, and its latent decoded a second time from the written format alone."""

import json

import numpy as np
import pytest
import torch
from contract import GOLDEN, ImageCodecContract
from neuralcodec.codecs import registry
from neuralcodec.codecs.base import count_parameters, macs
from neuralcodec.codecs.image import encode_picture, picture_info
from neuralcodec.container import loads
from neuralcodec.media.image import Picture
from reference_latent import ReferenceLatent, symbols_hash


class TestHyperprior(ImageCodecContract):
    model = "hyperprior:test"


class TestMixed(ImageCodecContract):
    """The same network; its latent is coded by context mixing."""

    model = "hyperprior:test-mixed"


class TestMixedBoth(ImageCodecContract):
    """The hyper-latent too."""

    model = "hyperprior:test-mixed-both"


PRESETS = ("test", "test-mixed", "test-mixed-both")


@pytest.mark.parametrize("preset, parameters, kmacs", [("light", 1.5e6, 25), ("light-ms-ssim", 1.5e6, 25), ("base", 8e6, 120)])
def test_presets_keep_their_limits(preset, parameters, kmacs):
    """Of parameters, and of multiply-adds per pixel in either transform."""
    codec = registry.codec_class("hyperprior").from_preset(preset)
    level = torch.tensor([500.0])
    assert count_parameters(codec) <= parameters
    assert macs(codec.g_a, torch.zeros(1, 3, 256, 256), level) / 256**2 <= 1000 * kmacs
    assert macs(codec.g_s, torch.zeros(1, codec.config.latent.channels, 16, 16), level) / 256**2 <= 1000 * kmacs


def reference(codec) -> ReferenceLatent:
    return ReferenceLatent(registry.weights_path(codec.name, codec.preset), codec.config.latent.slices)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_decoder_made_from_the_spec_finds_the_golden_symbols(preset):
    codec = registry.load("hyperprior", preset)
    index = json.loads((GOLDEN / "index.json").read_text())
    for picture in ("photo", "pixel", "grey-alpha"):
        name = f"hyperprior-{preset}-{picture}.nlc"
        stream = loads((GOLDEN / name).read_bytes())
        info = picture_info(stream.header)
        h, w = (-(-side // 64) * 4 for side in (info.height, info.width))
        y_hat = reference(codec).decode(stream.segments[0].data, h, w, info.level)
        assert symbols_hash(y_hat) == index[name]["symbols"]["0,0"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_decoder_made_from_the_spec_agrees_on_noise(preset):
    """Large symbols, escapes and clamps at the highest quality."""
    codec = registry.load("hyperprior", preset)
    rng = np.random.default_rng(3)
    trace: dict = {}
    stream = encode_picture(codec, Picture(rng.integers(0, 256, (64, 64, 3), np.uint8)), 1000, trace=trace)
    assert symbols_hash(reference(codec).decode(stream.segments[0].data, 4, 4, 1000)) == trace[0, 0]
