"""The search for a better latent, with the codecs whose test weights are at hand."""

import math

import numpy as np
import pytest
import torch
from contract import as_tensor, photo
from neuralcodec import cli
from neuralcodec.codecs import registry
from neuralcodec.codecs.anneal import CHANCE, COOLING, HOT, REFRESH, RELAXED_MAX, Annealer, gumbel_round, temperatures, thawed
from neuralcodec.codecs.base import Codec
from neuralcodec.codecs.image import decode_picture, encode_picture
from neuralcodec.container import UsageError, dumps, loads
from neuralcodec.media.image import Picture, write_picture

LEVEL = 450


def cost_of(codec, picture, stream, level):
    """Bits + lambda * squared error, what the search minimises."""
    decoded = decode_picture(codec, stream).pixels
    error = np.square(picture.pixels.astype(float) - decoded).sum() / picture.pixels.shape[2]
    return 8 * len(dumps(stream)) + codec.lambda_of(level) * error


@pytest.fixture(scope="module", params=["hyperprior:test", "mlicv2:test"])
def codec(request):
    return registry.load(*registry.split(request.param))


def test_lower_cost_and_same_decoder(codec):
    level = 700  # at which all test weights code enough for a search to find something
    picture = Picture(photo()[:96, :128])
    plain = encode_picture(codec, picture, level)
    seen: list[tuple[int, int]] = []
    made: dict = {}
    search = Annealer(40, progress=lambda done, total: seen.append((done, total)))
    annealed = encode_picture(codec, picture, level, tile_encoder=search, trace=made)
    found: dict = {}
    decode_picture(codec, loads(dumps(annealed)), trace=found)
    assert made == found
    assert seen == [(k, 40) for k in range(1, 41)]
    assert cost_of(codec, picture, annealed, level) < 0.998 * cost_of(codec, picture, plain, level)


def test_synthesis_is_run_in_one_of_some_iterations(codec):
    """Beside those: two runs to probe the curvature, and one per judgement."""
    runs = []
    hook = codec.g_s.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    try:
        encode_picture(codec, Picture(photo()[:64, :64]), LEVEL, tile_encoder=Annealer(5 * REFRESH))
    finally:
        hook.remove()
    assert runs.count(True) == 2 + 5


def test_never_worse_than_the_start(codec):
    """A search that goes astray gives what the plain encoder gives."""
    picture = Picture(photo()[:64, :64])
    plain = encode_picture(codec, picture, LEVEL)
    wild = encode_picture(codec, picture, LEVEL, tile_encoder=Annealer(3, rate=1e4))
    assert dumps(wild) == dumps(plain)
    assert dumps(encode_picture(codec, picture, LEVEL, tile_encoder=Annealer(0))) == dumps(plain)


@pytest.mark.parametrize("h, w, channels", [(1, 1, 3), (70, 131, 1), (130, 65, 3)])
def test_any_size_and_tiles(codec, h, w, channels):
    picture = Picture(np.ascontiguousarray(photo()[:h, :w, :channels]))
    stream = encode_picture(codec, picture, LEVEL, tile=64, tile_encoder=Annealer(4))
    assert len(stream.segments) == -(-h // 64) * -(-w // 64)
    assert decode_picture(codec, loads(dumps(stream))).pixels.shape == picture.pixels.shape


def test_same_seed_same_file(codec):
    picture = Picture(photo()[:64, :64])
    a, b = (dumps(encode_picture(codec, picture, LEVEL, tile_encoder=Annealer(6))) for _ in range(2))
    assert a == b


def test_thawed_model_means_what_the_integers_do(codec):
    """Float values of the thawed model beside those of the exact coder, and gradients through it."""
    y = codec.analyse(as_tensor(photo()[:128, :128]), LEVEL).clone()
    z = codec.latent.analyse_hyper(y, LEVEL)
    exact = codec.latent.compress(y, z, LEVEL)[1]
    soft = thawed(codec.latent)
    y.requires_grad_()
    y_hat, bits, _ = soft(y, torch.tensor([float(LEVEL)]), z)
    scale = float(exact.abs().mean())
    assert float((y_hat.detach() - exact).abs().mean()) < 5e-3 * scale
    assert bits.item() == pytest.approx(codec.latent.ideal_bits(y.detach(), z, LEVEL), rel=0.08)  # the latter with those of z
    (bits.sum() + y_hat.square().sum()).backward()
    assert torch.isfinite(y.grad).all() and (y.grad != 0).float().mean() > 0.9
    assert not any("weight" in k for k in codec.latent.state_dict() if ".models." in k)  # the codec itself stays frozen


def test_draws_and_temperature():
    """Near an integer the draw is certain, in the middle it is even; cold draws are integers."""
    generator = torch.Generator().manual_seed(0)
    v = torch.tensor([0.01, 0.5, 0.99, -1.3]).repeat(4000, 1)
    q = gumbel_round(v, 0.1, 0.1, generator)
    assert torch.allclose(q[:, 0], torch.zeros(4000), atol=1e-3) and torch.allclose(q[:, 2], torch.ones(4000), atol=1e-3)
    assert abs(float(q[:, 1].mean()) - 0.5) < 0.03
    assert float((q[:, 1] - torch.round(q[:, 1])).abs().mean()) < 0.05
    assert float(q[:, 3].min()) >= -2 and float(q[:, 3].max()) <= -1
    soft = gumbel_round(v, 0.1, 0.7, generator)  # as likely to lean to either side, but not decided
    assert abs(float((soft[:, 1] > 0.5).float().mean()) - 0.5) < 0.03
    assert float((soft[:, 1] - torch.round(soft[:, 1])).abs().mean()) > 0.1
    chances, relaxed = zip(*(temperatures(k, 80) for k in (0, 28, 56, 80)))
    assert chances[0] == chances[1] == CHANCE > chances[2] > chances[3] == pytest.approx(CHANCE * math.exp(-COOLING))
    assert relaxed[0] == relaxed[1] > relaxed[2] > relaxed[3] and 80 * HOT == 28
    assert temperatures(0, 320)[1] == pytest.approx(relaxed[0] / 2) and temperatures(1, 4)[1] == RELAXED_MAX
    w = torch.tensor([0.4], requires_grad=True)
    gumbel_round(w, 0.5, 0.5, generator).sum().backward()
    assert float(w.grad) > 0


def test_other_codecs_are_refused():
    with pytest.raises(UsageError, match="cannot be annealed"):
        Annealer(1)(Other(None), torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 1, 1), (slice(0, 1),) * 2, (16, 16), 0)


class Other(Codec):
    name = "other"


def test_command_line(tmp_path, capsys):
    parser = cli.build_parser()

    def iterations(text):
        return cli.annealing_of(parser.parse_args(["encode", "a", *text.split()]))

    assert [iterations(t) for t in ("", "-e 6", "-e 7", "-e 9")] == [0, 0, cli.ANNEALING[7], cli.ANNEALING[9]]
    assert iterations("-e 9 --iterations 5 -m hyperprior:test") == 5
    source, files = tmp_path / "a.png", [tmp_path / "plain.nlc", tmp_path / "annealed.nlc"]
    write = tmp_path / "a.png"
    with write.open("wb") as file:
        write_picture(file, Picture(photo()[:64, :96]), "PNG")
    for options, target in zip(([], ["-e", "9", "--iterations", "20", "--verify"]), files):
        assert cli.main(["encode", "-m", "hyperprior:test", *options, str(source), "-o", str(target)]) == 0
    assert "verified" in capsys.readouterr().err
    assert files[0].read_bytes() != files[1].read_bytes()


def test_a_costly_measure_is_asked_seldom():
    """The target is met with few measurements where the guess is off by a factor, and never exceeded if it must not be."""
    from neuralcodec.codecs.image import fit_costly

    asked = []

    def measure(level: int) -> float:
        asked.append(level)
        return 0.9 * (1000 + level**1.5) + 3 * (level % 2)

    for at_most in (False, True):
        asked.clear()
        level, got = fit_costly(measure, lambda v: 1000 + v**1.5, 9000, at_most=at_most, tolerance=0.005)
        assert got == measure(level) and abs(got - 9000) <= 45 and len(asked) <= 4
        assert got <= 9000 or not at_most
    assert fit_costly(measure, lambda v: 1000 + v**1.5, 10, at_most=True, tolerance=0.005)[0] == 0
