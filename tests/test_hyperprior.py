"""The control codec: the contract, and its latent decoded a second time from the written format alone."""

import json

import numpy as np
import pytest
from contract import GOLDEN, ImageCodecContract
from neuralcodec.codecs import registry
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
