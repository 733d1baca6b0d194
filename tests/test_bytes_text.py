"""Text through the language model: every byte comes back, the same code everywhere, damage never passes for text."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import reference_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from neuralcodec.codecs.registry import weights_path
from neuralcodec.container.errors import CorruptStream, ModelMismatch, ModelMissing
from neuralcodec.entropy.bytes.language import Model, Predictor
from neuralcodec.entropy.bytes.text import COMPONENTS, TextCoder, TextOptions, decode_text, encode_text
from neuralcodec.entropy.bytes.tokens import Tokens, learn_merges
from neuralcodec.entropy.bytes.transform import WIDEST, best_margin, flag_capitals, join_lines, restore_capitals
from neuralcodec.train.overlap import shared_runs

SAMPLE = (
    b'The quick brown fox, said "Bob", jumps over the LAZY dog.\r\nThe quick brown fox <b>jumps</b> over 1234;\r\n\r\n'
    b"I say: the quick brown fox jumps; I DO say so.\r\n"
)
PROSE = """It was a bright cold day in the valley, and the clocks of the village had not yet struck the hour when the old
miller came down the road with his dog behind him. He had been up since before the dawn, as he always was at that time of the
year, and he was not pleased to find the gate of the lower meadow standing open. "Who has been here?" he said to the dog, which
had nothing to say. The water was high under the bridge; it carried leaves, twigs, and once a hat, which turned round and round
in the pool below the wheel as if it was looking for the head that it had lost.
"""


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(weights_path("nacrith", "test"))


def wrapped(text: str, width: int) -> bytes:
    import textwrap

    return "\n".join(textwrap.fill(" ".join(p.split()), width) for p in text.split("\n\n")).encode() + b"\n"


# --- transforms and tokens --------------------------------------------------------------------------------------------

pieces = st.lists(
    st.sampled_from([b" ", b"  ", b"\n", b"\r\n", b"\r", b"\t", b"A", b"I", b"The", b"THE", b"iPhone", b"McX", b"\x01", b"\x02",
                     b"\x03", b"<|endoftext|>", b"\x00", b"\x13", b"\xff\xfe", "é—“".encode(), b"1999", b"don't", b"a", b".",
                     b'"', b"and the "]),
    max_size=40,
).map(b"".join)  # fmt: skip
anything = st.one_of(pieces, st.binary(max_size=200), st.text(max_size=80).map(lambda s: s.encode("utf-8", "surrogatepass")))


@settings(max_examples=400, deadline=None)
@given(anything)
def test_capitals_and_tokens_come_back(model, data):
    assert restore_capitals(flag_capitals(data)) == data
    ids = model.tokens.encode(data)
    assert model.tokens.decode(ids) == data


def test_capital_flags_stand_before_the_space():
    assert flag_capitals(b"so The USA, I and Ada") == b"so\x01 the\x02 usa, I and\x01 ada"


def test_tokens_are_sorted_and_hold_every_byte():
    merges = learn_merges({b" the": 50, b" then": 20, b"the": 10, b"xyz": 1}, 259)
    tokens = Tokens(merges)
    assert len(tokens) == 259 and tokens.strings == sorted(tokens.strings)
    assert {bytes([b]) for b in range(256)} <= set(tokens.strings)
    assert Tokens.from_array(tokens.strings, tokens.to_array()).merges == merges
    assert [tokens.strings[i] for i in tokens.encode(b" then")][0] == b" the"
    with pytest.raises(ValueError, match="do not exist"):
        Tokens([(b"ab", b"c")])


def test_soft_line_ends_are_found():
    text = np.frombuffer(wrapped(PROSE, 60), np.uint8).copy()
    lines = text.tobytes().count(b"\n")
    margin = best_margin(text)
    assert 40 < margin <= 60
    assert join_lines(text, margin) >= lines - 2
    rng = random.Random(1)
    lines = (" ".join("w" * rng.randint(1, 9) for _ in range(rng.randint(2, 12))) for _ in range(99))
    assert best_margin(np.frombuffer("\n".join(lines).encode(), np.uint8).copy()) == WIDEST


# --- round trips ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(anything)
def test_round_trip(model, data):
    code = encode_text(data, model)
    assert decode_text(code, len(data), model) == data


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(anything)
def test_round_trip_many(model, data):
    assert decode_text(encode_text(data, model), len(data), model) == data


@pytest.mark.parametrize("data", [
    b"", b"a", b"\n", bytes(range(256)), bytes(range(255, -1, -1)) * 3, b"\r\n" * 50, b"\n\r" * 9, b"a\r\nb\nc\r", b" " * 3000,
    b"word " * 2000, b"x" * 20_000, SAMPLE, wrapped(PROSE, 72), wrapped(PROSE, 72).replace(b"\n", b"\r\n"),
    wrapped(PROSE, 50).upper(),
    PROSE.encode("utf-16"), np.random.default_rng(0).bytes(5000), b"\x01\x02\x03" * 100, ("<|endoftext|>" * 9).encode(),
], ids=range(19))  # fmt: skip
def test_round_trip_of_the_odd(model, data):
    code = encode_text(data, model)
    assert decode_text(code, len(data), model) == data
    assert len(code) < len(data) * 5 // 4 + 64


def test_every_component_can_be_left_out_and_is_worth_something(model):
    data = wrapped(PROSE * 3, 66)
    sizes = {}
    for name in COMPONENTS:
        options = TextOptions().without(name)
        code = encode_text(data, model, options)
        assert decode_text(code, len(data), model, options) == data
        sizes[name] = len(code)
    whole = len(encode_text(data, model))
    assert sizes["model"] > whole * 1.05 and sizes["match"] > whole and sizes["line ends"] > whole


def test_options_stand_in_the_code(model):
    options = TextOptions(head_rate=100, mixer_rate=300).without("runs")
    assert TextOptions.from_bytes(options.to_bytes() + b"rest") == (options, len(options.to_bytes()))
    assert TextOptions().to_bytes() == b"\0"
    for bad in (b"", b"\x02", b"\x01\x00", TextOptions(slot_limit=64).to_bytes(), TextOptions(table_bits=40).to_bytes()):
        with pytest.raises(CorruptStream):
            TextOptions.from_bytes(bad)


# --- exactness --------------------------------------------------------------------------------------------------------


def test_reference_decoder_agrees(model):
    code = TextCoder(model).encode(SAMPLE, 5)
    assert reference_bytes.decode(code, len(SAMPLE), model.tensors, asdict(model.config), model.tokens.strings) == SAMPLE


def test_reference_network_gives_the_same_counts(model):
    network, predictor = reference_bytes.Network(model.tensors, asdict(model.config)), Predictor(model)
    counts = network.step(model.tokens.ids[b"\n"])
    for token in model.tokens.encode(flag_capitals(SAMPLE * 2)).tolist():
        np.testing.assert_array_equal(counts, predictor.counts())
        network.learn(token, predictor.rate, predictor.bias_rate)
        predictor.update(token)
        counts = network.step(token)
    assert counts.min() >= 16


_ELSEWHERE = """
import hashlib, sys
from concurrent.futures import ThreadPoolExecutor
from neuralcodec.codecs.registry import weights_path
from neuralcodec.entropy.bytes.language import Model
from neuralcodec.entropy.bytes.text import encode_text
model = Model.load(weights_path("nacrith", "test"))
data = sys.stdin.buffer.read()
with ThreadPoolExecutor(2) as pool:
    codes = list(pool.map(lambda d: encode_text(d, model), [data, data]))
assert codes[0] == codes[1]
print(hashlib.sha256(codes[0]).hexdigest())
"""


@pytest.mark.parametrize("setting", [{"NUMBA_NUM_THREADS": "2"}, {"NUMBA_CPU_NAME": "generic"}], ids=["threads", "generic"])
def test_the_same_code_on_other_machines(model, setting):
    """Two threads at once; and a processor without vector instructions."""
    import hashlib

    data = wrapped(PROSE, 72)
    command = [sys.executable, "-c", _ELSEWHERE]
    done = subprocess.run(command, input=data, capture_output=True, env=os.environ | setting, check=True)
    assert done.stdout.decode().strip() == hashlib.sha256(encode_text(data, model)).hexdigest()


# --- damage -----------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_damage_gives_an_error_or_bytes_of_the_right_number(model, place, change, cut):
    code = bytearray(TextCoder(model).encode(SAMPLE, 5))
    place %= len(code)
    if cut:
        del code[place:]
    else:
        code[place] ^= change
    try:
        data = TextCoder(model).decode(bytes(code), len(SAMPLE))
    except CorruptStream:
        return
    assert len(data) == len(SAMPLE)


def test_absurd_counts_are_refused(model):
    with pytest.raises(CorruptStream):
        decode_text(b"\x00\xff\xff\xff\xff\xff\x0f" + bytes(20), 100, model)


def test_weights_that_are_not_there_or_not_right(model, tmp_path):
    with pytest.raises(ModelMissing):
        Model.load(tmp_path / "none.safetensors")
    path = tmp_path / "model.safetensors"
    data = bytearray(Path(weights_path("nacrith", "test")).read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelMismatch, match="damaged"):
        Model.load(path)
    path.write_bytes(data[:5000])
    with pytest.raises(ModelMismatch):
        Model.load(path)


# --- training ---------------------------------------------------------------------------------------------------------


def test_overlap_counts_shared_runs():
    words = " ".join(f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200))
    other = " ".join(f"v{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200))
    result = shared_runs({"a": words.encode(), "b": other.upper().encode()}, {"t": (other[:400] + "\n" + "z " * 50).encode()})
    assert result["a"]["shared"] == {"t": 0} and result["a"]["runs"] == 193
    assert result["b"]["shared"]["t"] > 80 and result["b"]["examples"][0] == " ".join(other.split()[:8])


@pytest.mark.parametrize("preset", ["light", "test"])
def test_bundled_recipes_are_those_of_the_weights(preset):
    from neuralcodec.train import language

    read = language.Recipe.read(Path(language.__file__).parent / "recipes" / f"nacrith-{preset}.toml")
    rates = [read.rate(10_000, done / 100) for done in range(101)]
    assert max(rates) <= 1.01 and rates[-1] < 0.01
    config = Model.load(weights_path("nacrith", preset)).config
    assert (config.vocabulary, config.width, config.blocks, config.hidden) == tuple(vars(read.shape(read.vocabulary)).values())


def test_recipes_refuse_what_they_do_not_know(tmp_path):
    from neuralcodec.train import language

    (tmp_path / "x.toml").write_text("widht = 3")
    with pytest.raises(ValueError, match="widht"):
        language.Recipe.read(tmp_path / "x.toml")


def test_verse_has_lines_and_the_same_words():
    from neuralcodec.train.language import versify

    text = " ".join(PROSE.split()) + "\n" + "A second paragraph of few words."
    verse = versify(text, random.Random(3))
    assert verse.count("\n") > 10
    assert verse.lower().split() == text.lower().split()


def test_a_language_model_trains_and_freezes(tmp_path):
    """Thirty steps learn something, a stopped run goes on, and the integers agree with the floats."""
    torch = pytest.importorskip("torch")
    from neuralcodec.train import language

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "novels_en.txt").write_text(PROSE.replace("\n", " ") * 60)
    recipe = language.Recipe(vocabulary=512, width=32, blocks=1, hidden=64, batch=4, length=32, steps=30, warmup_steps=5,
                             mix={"novels_en": 1.0}, held_out=400)  # fmt: skip
    language.train(folder, recipe, tmp_path / "run", log_every=10)
    language.train(folder, language.Recipe(**(vars(recipe) | {"steps": 60})), tmp_path / "run", resume=True, log_every=10)
    card = language.freeze(tmp_path / "run" / "last.pt", "test", tmp_path / "weights")
    assert card["training"]["steps"] == 60 and card["measured"]["held_out_bits_per_byte"]["novels_en"] < 4
    frozen = Model.load(tmp_path / "weights" / "nacrith-test.safetensors")
    assert frozen.model_id.hex() == card["model_id"]
    kept = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    network = language.LanguageModel(language.Shape(**kept["shape"]))
    network.load_state_dict(kept["model"])
    ids = frozen.tokens.encode(flag_capitals(SAMPLE))
    with torch.no_grad():
        logits, _ = network(torch.from_numpy(np.append(frozen.tokens.ids[b"\n"], ids).astype(np.int64))[None], network.start(1))
    expected = torch.softmax(logits[0], -1).numpy()
    predictor = Predictor(frozen, rate=0)
    for row, token in zip(expected, ids.tolist()):
        counts = predictor.counts()
        assert np.abs(counts / counts.sum() - row).max() < 0.02
        predictor.update(token)
