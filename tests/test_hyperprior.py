"""The control codec: the contract, and its latent decoded a second time from the written format alone."""

import json

import numpy as np
from contract import GOLDEN, ImageCodecContract
from neuralcodec.codecs import registry
from neuralcodec.codecs.image import encode_picture, picture_info
from neuralcodec.container import loads
from neuralcodec.media.image import Picture
from reference_latent import ReferenceLatent, symbols_hash


class TestHyperprior(ImageCodecContract):
    model = "hyperprior:test"


def reference(codec) -> ReferenceLatent:
    return ReferenceLatent(registry.weights_path(codec.name, codec.preset), codec.config.latent.slices)


def test_a_decoder_made_from_the_spec_finds_the_golden_symbols():
    codec = registry.load("hyperprior", "test")
    index = json.loads((GOLDEN / "index.json").read_text())
    for name in ("hyperprior-test-photo.nlc", "hyperprior-test-pixel.nlc", "hyperprior-test-grey-alpha.nlc"):
        stream = loads((GOLDEN / name).read_bytes())
        info = picture_info(stream.header)
        h, w = (-(-side // 64) * 4 for side in (info.height, info.width))
        y_hat = reference(codec).decode(stream.segments[0].data, h, w, info.level)
        assert symbols_hash(y_hat) == index[name]["symbols"]["0,0"]


def test_a_decoder_made_from_the_spec_agrees_on_noise():
    """Large symbols, escapes and clamps at the highest quality."""
    codec = registry.load("hyperprior", "test")
    rng = np.random.default_rng(3)
    trace: dict = {}
    stream = encode_picture(codec, Picture(rng.integers(0, 256, (64, 64, 3), np.uint8)), 1000, trace=trace)
    assert symbols_hash(reference(codec).decode(stream.segments[0].data, 4, 4, 1000)) == trace[0, 0]
