"""The published token mixture: every component against a slow reference, and what no backend may do: lose a byte."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import fake_llama
import numpy as np
import pytest
import tiny_models
from damage import mutations
from neuralcodec.cli import main
from neuralcodec.codecs import nacrith, registry
from neuralcodec.codecs.bytefile import decode_file, encode_bytes, encode_file
from neuralcodec.container.errors import CodecError, CorruptStream, ModelMismatch, ModelMissing, UsageError
from neuralcodec.container.format import dumps, loads, read_head
from neuralcodec.entropy.bytes import backends, blocks, hybrid, published
from neuralcodec.entropy.bytes.published import BITS, TOTAL, Settings

SMALL = Settings(context=64, keep=32, batch=8, contexts=2000, nodes=20_000)
TEXT = "".join(tiny_models.CORPUS).encode()
LOST = tiny_models.LOST


class Toy(backends.Backend):
    """A backend in a few lines: it knows what follows two tokens in TEXT, else its logits are a hash of them.

    Its tokenizer drops the lost bytes, joins some pairs and knows a special token; a ``lossy`` one changes letters, too.
    """

    kind = "toy"

    def __init__(self, noise: float = 0.0, lossy: bool = False):
        pairs = [b"th", b"he", b"in", b" a", b"an", "é".encode(), b"<|endoftext|>"]
        self.pieces = [*(None if b in LOST else bytes([b]) for b in range(256)), *pairs[:-1], None]
        self.pairs = pairs[:-1]
        self.noise, self.lossy = noise, False
        self.calls = 0
        self.fingerprint = {"backend": self.kind}
        known = self.tokenize(TEXT.decode())
        self.after: defaultdict[tuple, list[int]] = defaultdict(list)
        for a, b, c in zip(known, known[1:], known[2:]):
            self.after[a, b].append(c)
        self.lossy = lossy

    def tokenize(self, text):
        if self.lossy:
            text = text.lower().replace("é", "e")
        data, out, at = text.encode().replace(b"<|endoftext|>", b"\xff\xff"), [], 0
        while at < len(data):
            if data[at : at + 2] == b"\xff\xff":
                out.append(len(self.pieces) - 1)
                at += 2
            elif data[at : at + 2] in self.pairs:
                out.append(256 + self.pairs.index(data[at : at + 2]))
                at += 2
            else:
                if data[at] not in LOST:
                    out.append(data[at])
                at += 1
        return out

    def session(self, settings):
        return ToySession(self, settings)


class ToySession(backends.Session):
    def __init__(self, backend, settings):
        super().__init__(settings, 0, len(backend.pieces))
        self.backend = backend
        self.context: list[int] = []

    def _clear(self):
        self.context = []

    def _evaluate(self, tokens, at):
        assert at == len(self.context) and len(tokens) <= self.settings.batch
        self.context += tokens
        assert len(self.context) <= self.settings.context
        self.backend.calls += 1
        rng = np.random.default_rng([*self.context[-2:], len(self.context) // 5, len(tokens)])
        row = rng.normal(0, 2, len(self._out))
        row[self.backend.after[tuple(self.context[-2:])]] = 12
        row += np.random.default_rng().normal(0, 1, len(self._out)) * self.backend.noise
        return row.astype(np.float32)


def fed(settings: Settings, ids: int, symbols: list[int], seed: int = 0):
    """Yields (mixture, logits, asked, symbol) at each step, the distribution being set, before the symbol is learnt."""
    m = published.mixture(settings, np.arange(ids, dtype=np.int32), len(symbols))
    rng = np.random.default_rng(seed)
    for symbol in symbols:
        asked = not published.look_up(m)
        logits = rng.normal(0, 2 * 65536, ids).astype(np.int32)
        published.set_cdf(m, logits, asked)
        yield m, logits, asked, symbol
        published.learn(m, symbol, asked)


def course(n: int, ids: int, seed: int = 0) -> list[int]:
    """Symbols with a skewed distribution that repeat themselves here and there."""
    rng = random.Random(seed)
    out: list[int] = []
    while len(out) < n:
        if len(out) > 40 and rng.random() < 0.05:
            at = rng.randrange(len(out) - 30)
            out += out[at : at + rng.randrange(5, 30)]
        else:
            out.append(min(int(rng.expovariate(0.2)), ids))
    return out[:n]


# --- tables and coder -------------------------------------------------------------------------------------------------


def test_logarithms_and_powers():
    for v in [1, 2, 3, 255, 4095, 4096, 4097, 10**6, 2**38, 2**52 - 1, 2**62]:
        assert abs(published.log2_of(v) / 65536 - math.log2(v)) < 4e-4
    for x in [0.0, -1e-3, -0.5, -1, -7.25, -30]:
        assert published.exp2_of(int(x * 2**24)) / 2**30 == pytest.approx(2**x, rel=3e-4, abs=2**-30)
    assert published.exp2_of(-40 << 24) == 0
    assert published.exp2_of(0) == 1 << 30


@pytest.mark.parametrize("skew", [0.0, 1.0, 30.0])
def test_coder_is_exact(skew):
    """Random distributions, also ones with all but one symbol at the least width; the size is the ideal one."""
    rng = np.random.default_rng(1)
    n, a = 3000, 50
    cdfs, symbols, ideal = [], [], 0.0
    for _ in range(n):
        p = rng.random(a) ** (1 + skew)
        counts = 1 + np.floor(p / p.sum() * (TOTAL - a)).astype(np.int64)
        counts[counts.argmax()] += TOTAL - counts.sum()
        cdfs.append(np.concatenate([[0], np.cumsum(counts)]))
        symbols.append(int(rng.integers(a) if rng.random() < 0.2 else rng.choice(a, p=counts / TOTAL)))
        ideal -= math.log2(counts[symbols[-1]] / TOTAL)
    state, buffer = np.zeros(4, np.int64), np.zeros(4 * n + 64, np.uint8)
    published.start(state, buffer, False)
    for cdf, symbol in zip(cdfs, symbols):
        published._narrow(state, buffer, cdf[symbol], cdf[symbol + 1], BITS, False)
    code = buffer[: published.finish(state, buffer)].copy()
    assert ideal / 8 - 1 <= len(code) <= ideal / 8 * 1.0005 + 6
    published.start(state, code, True)
    for cdf, symbol in zip(cdfs, symbols):
        found = int(np.searchsorted(cdf, published._target(state, BITS), side="right")) - 1
        assert found == symbol
        published._narrow(state, code, cdf[symbol], cdf[symbol + 1], BITS, True)


# --- n-grams, LZP, mixture, bias against floats -------------------------------------------------------------------------


class SlowNgram:
    """The specification (section 3.1) with dictionaries and floats."""

    def __init__(self, a: int, order: int, contexts: int, entries: int):
        self.a, self.order, self.contexts, self.entries = a, order, contexts, entries
        self.zero: defaultdict[int, int] = defaultdict(int)
        self.tables: list[dict[tuple, dict[int, int]]] = [{} for _ in range(order)]
        self.past: list[int] = []

    def p(self) -> np.ndarray:
        p = np.array([self.zero[i] + 1.0 for i in range(self.a)]) / (len(self.past) + self.a)
        for k in range(1, self.order + 1):
            found = self.tables[k - 1].get(tuple(self.past[-k:])) if len(self.past) >= k else None
            if found:
                total = sum(found.values())
                counts = np.array([found.get(i, 0) for i in range(self.a)], float)
                weight = total / (total + 5)
                p = weight * counts / total + (1 - weight) * p
        return p

    def learn(self, symbol: int) -> None:
        self.zero[symbol] += 1
        for k in range(1, min(self.order, len(self.past)) + 1):
            table, key = self.tables[k - 1], tuple(self.past[-k:])
            if key not in table:
                if len(table) >= self.contexts:
                    del table[next(iter(table))]
                table[key] = {}
            found = table[key]
            if symbol in found:
                found[symbol] += 1
                continue
            if len(found) >= self.entries:
                single = next((s for s, c in found.items() if c == 1), None)
                if single is None:
                    continue
                del found[single]
            found[symbol] = 1
        self.past.append(symbol)


@pytest.mark.parametrize("order, contexts, entries", [(4, 10_000, 64), (4, 40, 64), (3, 500, 3), (1, 7, 2), (0, 5, 1)])
def test_ngram_is_the_published_one(order, contexts, entries):
    """Probabilities and entropy, with contexts that are forgotten and lists that are full."""
    a = 40
    settings = Settings(order=order, contexts=contexts, entries=entries, skip=0)
    slow = SlowNgram(a, order, contexts, entries)
    for step, (m, _, _, symbol) in enumerate(fed(settings, a - 1, course(1500, a - 1))):
        if step % 11 == 0:
            p = slow.p()
            mine = np.array([published._ngram_p(m, i) for i in range(a)]) / 2**38
            assert np.abs(mine - p).max() < 1e-6
            assert mine.sum() <= 1
            assert published.entropy(m) / 2**54 == pytest.approx(-(p * np.log2(p)).sum(), abs=3e-3)
        slow.learn(symbol)


def test_contexts_without_room_are_ignored():
    """With few nodes new symbols are dropped, on both sides alike, and nothing breaks."""
    settings = replace(SMALL, nodes=5, contexts=3)
    for m, *_ in fed(settings, 30, course(600, 30)):
        assert m.books[3].max() <= 5
        assert m.cdf[-1] == TOTAL


def test_lzp():
    """Longest context first; the last successor only."""
    settings = Settings(lzp=1, ngram=0)
    table: dict[tuple, int] = {}
    past: list[int] = []
    hits = 0
    for m, _, _, symbol in fed(settings, 30, course(1500, 30)):
        guess = next((table[tuple(past[-k:])] for k in range(8, 3, -1) if len(past) >= k and tuple(past[-k:]) in table), -1)
        assert m.scalars[published._GUESS] == guess
        hits += guess == symbol
        for k in range(4, 9):
            if len(past) >= k:
                table[tuple(past[-k:])] = symbol
        past.append(symbol)
    assert hits > 200


@pytest.mark.parametrize("switches", [{}, {"lzp": 1}, {"ngram": 0}, {"bias": 0}, {"ngram": 0, "lzp": 1}, {"bias": 0, "lzp": 1}])
def test_mixture_against_floats(switches):
    """Distribution, mixer weights and biases of a course, against the formulas of the specification in float64."""
    a = 25
    settings = Settings(skip=0, warmup=50, rate=200_000, bias_rate=20_000, **switches)
    slow = SlowNgram(a, 4, 10**6, 64)
    on = [True, bool(settings.ngram), bool(settings.lzp)]
    others = sum(on) - 1
    weights = np.array([0.85 if others else 1.0, *[0.15 / max(others, 1) * o for o in on[1:]]])
    bias = np.zeros(a)
    for step, (m, logits, asked, symbol) in enumerate(fed(settings, a - 1, course(700, a - 1), seed=3)):
        assert asked
        warm = step >= settings.warmup
        x = np.append(logits / 65536, logits.max() / 65536 - 30)
        if warm and settings.bias:
            base = np.append(x[:-1] + bias[:-1], 0)
            base[-1] = base[:-1].max() - 30 + bias[-1]
            x = base
        model = 2.0 ** (x - x.max())
        model /= model.sum()
        ngram = slow.p()
        guess = m.scalars[published._GUESS]
        lzp = np.full(a, 1 / a) if guess < 0 else np.full(a, 0.15 / (a - 1))
        if guess >= 0:
            lzp[guess] = 0.85
        p = weights @ np.stack([model, ngram, lzp]) if warm else model
        counts = np.diff(m.cdf)
        assert m.cdf[0] == 0 and m.cdf[-1] == TOTAL and counts.min() >= 1
        assert np.abs(counts / TOTAL - p).max() < 2e-3
        if warm:
            likelihood = np.maximum([model[symbol], ngram[symbol], lzp[symbol]], 1e-8)
            weights = np.where(on, weights * likelihood**0.2, 0)
            weights /= weights.sum()
        if settings.bias:
            bias -= 0.02 * (model - (np.arange(a) == symbol)) * math.log2(math.e)
        slow.learn(symbol)
    if settings.bias:
        assert np.abs(m.bias / 2**24 - bias).max() < 0.1 and np.abs(bias).max() > 0.3


def test_mixer_selects():
    """As published, the mixer does not forget: after many symbols all the weight is with the better model."""
    settings = Settings(skip=0, bias=0, warmup=0)
    m = published.mixture(settings, np.arange(9, dtype=np.int32), 3000)
    assert (m.weights / 65536).tolist() == pytest.approx([0.85, 0.15, 0], abs=1e-3)
    wrong = np.full(9, -40 * 65536, np.int32)
    wrong[0] = 0
    for _ in range(3000):
        published.look_up(m)
        published.set_cdf(m, wrong, True)
        published.learn(m, 1, True)
    assert m.weights.tolist() == [0, 65536, 0]


# --- tokens, segments --------------------------------------------------------------------------------------------------


def spelled(alphabet: hybrid.Alphabet, symbols: list[int]) -> bytes:
    return b"".join(alphabet.pieces[s] if s >= 0 else bytes([-1 - s]) for s in symbols)


NASTY = {
    "empty": b"",
    "one byte": b"x",
    "lost byte": LOST[:1],
    "all bytes": bytes(range(256)),
    "lost bytes": LOST * 5,
    "special": b"a<|endoftext|>b<|im_start|> <|endoftext|><|endoftext|>" * 3,
    "lost in text": TEXT[:200] + LOST + TEXT[200:400] + LOST[:1] + b"x" + LOST[2:3] + TEXT[:90],
    "invalid": TEXT[:150] + b"\xff\xfe\xc3\x28\xed\xa0\x80\xf5" + "naïve — ".encode() * 9 + b"\xe2\x82",
    "line ends": b"a\r\nb\nc\rd\r\r\n\n" * 20,
    "islands": bytes(300) + TEXT[:120] + bytes(range(128, 256)) + TEXT[:70] + LOST * 20 + b"short" + bytes(9) + TEXT[-100:],
    "text": TEXT,
    "utf-16": "Alice was beginning".encode("utf-16-le") * 8,
    "spaces": b" " * 700 + b"\t" * 70 + b"\n" * 70,
}  # fmt: skip


@pytest.mark.parametrize("lossy", [False, True])
def test_tokens_spell_the_bytes(lossy):
    """Whatever the tokenizer does. Where it is right, its tokens are used."""
    toy = Toy(lossy=lossy)
    alphabet = hybrid.Alphabet(toy.pieces)
    assert alphabet.missing.nonzero()[0].tolist() == sorted(LOST)
    for name, data in NASTY.items():
        symbols = alphabet.split(toy, data)
        assert spelled(alphabet, symbols) == data, name
    ids = toy.tokenize("the thin man")
    if not lossy:
        assert [int(alphabet.ids[s]) for s in alphabet.split(toy, b"the thin man")] == ids
    assert sum(s < 0 for s in alphabet.split(toy, NASTY["lost in text"])) == len(LOST) + 2


def test_segments():
    none = np.zeros(256, bool)
    lacking = none.copy()
    lacking[list(LOST)] = True

    def kinds(data: bytes, missing: np.ndarray = none) -> list[int]:
        runs = hybrid.segment(data, missing)
        assert sum(runs) == len(data) and all(n > 0 for n in runs[1:])
        return runs

    text = b"words and words " * 10
    assert kinds(b"") == []
    assert kinds(text) == [160]
    assert kinds("naïve — ".encode() * 30) == [330]
    assert kinds(text + bytes(200) + text) == [160, 200, 160]
    assert kinds(text + bytes(8) + text + bytes(100)) == [328, 100]  # bridged
    assert kinds(text + bytes(40) + text + bytes(100)) == [360, 100]  # absorbed
    assert kinds(text + LOST * 6 + text + bytes(100), lacking) == [160, 36, 160, 100]  # not absorbed
    assert kinds(text + LOST[:1] + text, lacking) == [321]  # bridged all the same: an escape is cheaper than a run
    assert kinds(bytes(100) + text[:63] + bytes(100)) == [0, 263]
    assert kinds(b"\xff\xfe\x80" * 50 + text) == [0, 150, 160]
    assert kinds(bytes(30) + text) == [190]
    assert kinds(random.Random(1).randbytes(5000))[:2] == [0, 5000]


def test_blocks_are_cut_at_lines():
    data = b"line of text\n" * 100
    assert hybrid.cut(data, 500) == 494 and hybrid.cut(data, 10**6) == 1300
    assert hybrid.cut("é".encode() * 100, 99) == 98
    assert hybrid.cut(b"\x80" * 100, 50) == 50


# --- blocks through backends -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return tiny_models.transformers_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    pytest.importorskip("gguf")
    return tiny_models.gguf_file(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", fake_llama.module())
    backends._open.cache_clear()
    yield
    backends._open.cache_clear()


def round_trips(mixture: hybrid.TokenMixture) -> None:
    for name, data in NASTY.items():
        code = mixture.encode(data, 1)
        assert mixture.decode(code, len(data)) == data, name
    assert mixture.failures == 0


@pytest.mark.parametrize("change", [
    {}, {"ngram": 0}, {"lzp": 1}, {"bias": 0}, {"skip": 0}, {"lzp": 1, "ngram": 0}, {"order": 0}, {"order": 2, "warmup": 0},
    {"sink": 0}, {"batch": 1}, {"temperature": 15_000}, {"contexts": 3, "nodes": 4, "entries": 1}, {"skip_entropy": 20_000},
])  # fmt: skip
def test_components_on_and_off(change):
    mixture = hybrid.TokenMixture(Toy(), replace(SMALL, **change), verify=False)
    for data in (TEXT[:700], NASTY["islands"], NASTY["lost in text"]):
        code = mixture.encode(data, 1)
        assert mixture.decode(code, len(data)) == data


def test_toy_round_trips():
    round_trips(hybrid.TokenMixture(Toy(), SMALL))
    round_trips(hybrid.TokenMixture(Toy(lossy=True), SMALL, verify=False))


def probe() -> str:
    """Hash of the code of a text, with all components on and decoded again; runs in a process of its own."""
    settings = replace(SMALL, lzp=1, warmup=20)
    toy = Toy()
    alphabet = hybrid.Alphabet(toy.pieces)
    data = TEXT[:180] + LOST[:2] + TEXT[:180]
    code = hybrid.encode_text(toy, alphabet, settings, data)
    assert hybrid.decode_text(toy, alphabet, settings, code, len(data)) == data
    return hashlib.sha256(code).hexdigest()


def test_interpreted_code_is_the_same():
    """The compiled functions and the same functions run by Python on NumPy arrays: no result hangs on the compiler."""
    here = str(Path(__file__).parent)
    run = f"import sys; sys.path.insert(0, {here!r}); import test_nacrith_published as t; print(t.probe())"
    env = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", run], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == probe()


def test_skip_saves_calls():
    """In a text that repeats itself the language model is hardly asked; in warm-up it always is."""
    data = TEXT[:300] * 12
    calls = {}
    for skip in (0, 1):
        toy = Toy()
        alphabet = hybrid.Alphabet(toy.pieces)
        code = hybrid.encode_text(toy, alphabet, replace(SMALL, skip=skip), data)
        calls[skip] = toy.calls
        assert hybrid.decode_text(toy, alphabet, replace(SMALL, skip=skip), code, len(data)) == data
    assert calls[1] < 0.6 * calls[0]
    toy = Toy()
    hybrid.encode_text(toy, alphabet, replace(SMALL, warmup=10**6), data)
    assert toy.calls >= len(alphabet.split(toy, data))


def test_text_that_the_backend_knows_is_small():
    """A model that predicts the text perfectly costs next to nothing: floors of 1 in 2**24, straddle bits and all."""

    class Oracle(Toy):
        def session(self, settings):
            return OracleSession(self, settings)

    class OracleSession(ToySession):
        def _evaluate(self, tokens, at):
            self.context += tokens
            row = np.full(len(self._out), -20.0, np.float32)
            row[ids[len(self.context) - 1] if len(self.context) <= len(ids) else 0] = 20
            return row

    data = bytes(random.Random(0).randrange(32, 127) for _ in range(1500))
    oracle = Oracle()
    ids = list(oracle.tokenize(data.decode()))
    alphabet = hybrid.Alphabet(oracle.pieces)
    code = hybrid.encode_text(oracle, alphabet, Settings(context=4096, keep=8), data)
    assert len(code) < 12
    assert hybrid.decode_text(oracle, alphabet, Settings(context=4096, keep=8), code, len(data)) == data


def test_window_slides():
    session = Toy().session(SMALL)
    session.logits([])
    for i in range(200):
        session.logits([i % 250, (i + 1) % 250])
        assert session.tokens == session.context and len(session.tokens) <= SMALL.context
        assert session.tokens[0] == 0  # the sink
    assert session.tokens[-2:] == [199, 200]


def test_logits_must_be_numbers():
    session = Toy(noise=float("nan")).session(SMALL)
    with pytest.raises(CodecError, match="not numbers"):
        session.logits([])


def test_verification_catches_a_backend_that_wavers():
    """Its text is coded without the model then, and nothing is lost."""
    mixture = hybrid.TokenMixture(Toy(noise=1.0), SMALL)
    code = mixture.encode(TEXT * 3, 1)
    assert mixture.failures == 1
    assert hybrid.TokenMixture(Toy(), SMALL).decode(code, 3 * len(TEXT)) == TEXT * 3


def test_damaged_blocks():
    """Typed errors, or exactly the original where the damage hit a bit that does not count."""
    mixture = hybrid.TokenMixture(Toy(), SMALL, verify=False)
    data = NASTY["islands"][:700] + TEXT[:500]
    (block,) = blocks.encode(data, 1, mixture)
    assert block[0] == blocks.TOKENS
    assert mixture.encode(data, 1)[0] > 2, "text and binary are what shall be damaged"
    for what, bad in mutations(block, block[::-1], 120, seed=5):
        try:
            assert blocks.decode(bad, mixture) == data, what
        except CodecError as error:
            assert error.exit_code in (3, 4, 5), what


def test_settings_stand_in_the_header():
    changed = Settings(order=3, rate=123, lzp=1)
    assert Settings.from_header(changed.to_header()) == changed
    assert changed.to_header() == {"order": 3, "rate": 123, "lzp": 1} and Settings().to_header() == {}
    for bad in (None, [], {"more": 1}, {"order": 5}, {"order": True}, {"order": "4"}, {"context": 100}):
        with pytest.raises(CorruptStream):
            Settings.from_header(bad)


# --- llama.cpp, transformers -------------------------------------------------------------------------------------------


def test_fake_llama(fake, gguf_path):
    llama = backends.Llama(gguf_path, threads=2)
    assert llama.pieces[0] is None and b" " in llama.pieces
    assert llama.fingerprint["threads"] == 2 and len(llama.fingerprint["weights"]) == 16
    round_trips(hybrid.TokenMixture(llama, SMALL))
    assert backends.Llama(gguf_path, threads=2).fingerprint == llama.fingerprint
    other = backends.Llama(gguf_path, threads=1).fingerprint
    assert backends.model_id(other) != backends.model_id(llama.fingerprint)


def test_llama_says_what_is_wrong(fake, gguf_path, tmp_path, monkeypatch):
    with pytest.raises(ModelMissing, match="no such file"):
        backends.Llama(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelMissing, match="whole GGUF"):
        backends.Llama(tmp_path / "bad.gguf")
    monkeypatch.delattr(sys.modules["llama_cpp"], "llama_get_memory")
    with pytest.raises(UsageError, match="too old"):
        backends.Llama(gguf_path)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UsageError, match="neuralcodec\\[llama\\]"):
        backends.Llama(gguf_path)


def test_cache_that_cannot_drop_is_read_again(fake, gguf_path, monkeypatch):
    """As with recurrent models: the window slides all the same, and both sides see the same."""
    calls = []
    monkeypatch.setattr(sys.modules["llama_cpp"], "llama_memory_seq_rm", lambda *at: calls.append(at))
    mixture = hybrid.TokenMixture(backends.Llama(gguf_path), SMALL)
    assert mixture.decode(mixture.encode(TEXT, 1), len(TEXT)) == TEXT and mixture.failures == 0 and calls


def test_real_llama(gguf_path):
    """The library itself, where it is installed."""
    pytest.importorskip("llama_cpp")
    llama = backends.Llama(gguf_path)
    round_trips(hybrid.TokenMixture(llama, SMALL))
    session, again = llama.session(SMALL), llama.session(SMALL)
    for i in range(100):
        assert np.array_equal(session.logits([i, i + 1] if i else []), again.logits([i, i + 1] if i else []))


def test_transformers(folder):
    model = backends.Transformers(folder)
    assert model.pieces[0] is None and model.pieces[-1] is None
    round_trips(hybrid.TokenMixture(model, SMALL, verify=False))
    assert backends.Transformers(folder).fingerprint == model.fingerprint


def test_transformers_offline(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelMissing) as error:
        backends.Transformers("nobody/no-such-model")
    assert "\n" not in str(error.value)
    with pytest.raises(ModelMissing):
        backends.Transformers(tmp_path)


def test_sentencepiece_pieces():
    assert backends.sentencepiece_piece("\u2581the") == b" the"
    assert backends.sentencepiece_piece("<0x0A>") == b"\n"
    assert backends.byte_level_piece("\u0120the") == b" the"
    assert backends.byte_level_piece("\u2581") is None
    assert sorted(backends.BYTE_LETTERS.values()) == list(range(256))


# --- files: nacrith:llama, nacrith:transformers, nacrith:published -------------------------------------------------------


@pytest.fixture
def opened(fake, gguf_path):
    """``nacrith:llama`` with the stand-in, blocks of 500 bytes."""
    return nacrith.open_published("llama", str(gguf_path), SMALL, threads=1, block=500)


def decoded(data: bytes, weights=None) -> bytes:
    source, out = io.BytesIO(data), io.BytesIO()
    head = read_head(source)
    decode_file(registry.load_for(head, weights=str(weights) if weights else None), head, source, out)
    return out.getvalue()


def test_files(opened, gguf_path, monkeypatch):
    for name, data in NASTY.items():
        file = encode_bytes(opened, data)
        assert decoded(file, gguf_path) == data, name
    file = encode_bytes(opened, TEXT)
    head = read_head(io.BytesIO(file))
    assert head.header["weights"] == gguf_path.name and head.preset == "llama"
    assert Settings.from_header(head.header["settings"]) == SMALL
    with pytest.raises(ModelMissing, match="tiny.gguf"):
        decoded(file)
    monkeypatch.setenv("NEURALCODEC_WEIGHTS", str(gguf_path.parent))
    assert decoded(file) == TEXT


def test_bytes_do_not_depend_on_workers(opened, gguf_path):
    data = TEXT * 3
    assert encode_bytes(opened, data, jobs=1) == encode_bytes(opened, data, jobs=3)
    assert len(read_head(io.BytesIO(encode_bytes(opened, data))).entries) > 5
    source, out = io.BytesIO(encode_bytes(opened, data)), io.BytesIO()
    decode_file(opened, read_head(source), source, out, jobs=3)
    assert out.getvalue() == data


def test_blocks_end_at_lines(opened):
    data = b"".join(b"line %d\n" % i for i in range(300))
    pieces = list(opened.pieces(io.BytesIO(data)))
    assert b"".join(pieces) == data and all(p.endswith(b"\n") and len(p) <= 500 for p in pieces)
    assert list(opened.pieces(io.BytesIO(b""))) == []
    assert list(opened.pieces(io.BytesIO(bytes(1001)))) == [bytes(500), bytes(500), bytes(1)]


@pytest.mark.parametrize("what", ["weights", "library", "build", "device", "threads", "probe"])
def test_another_backend_is_refused(what, opened, gguf_path, tmp_path, monkeypatch):
    """ModelMismatch, and the message says what differs."""
    file = encode_bytes(opened, TEXT)
    weights = gguf_path
    backends._open.cache_clear()  # as if in another process
    if what == "weights":
        weights = tiny_models.gguf_file(tmp_path / gguf_path.name, seed=1)
    elif what == "library":
        sys.modules["llama_cpp"].__version__ = "9.9"
    elif what == "build":
        monkeypatch.setattr(fake_llama, "SYSTEM", b"CPU : FAKE = 2")
    elif what == "device":
        monkeypatch.setattr(backends, "processor", lambda: "another machine")
    elif what == "threads":
        head = read_head(io.BytesIO(file))
        stream = loads(file)
        stream.header["backend"] = head.header["backend"] | {"threads": 3}
        file = dumps(stream)
        what = "probe"  # the decoder uses the threads of the stream, and finds other logits
    else:
        monkeypatch.setattr(fake_llama, "NOISE", 2e-3)
    with pytest.raises(ModelMismatch, match=what):
        decoded(file, weights)


def test_forged_headers(opened, gguf_path):
    stream = loads(encode_bytes(opened, TEXT))
    mine = stream.header
    for change in ({"settings": None}, {"settings": {"order": 9}}, {"backend": 3}, {"backend": {}}, {"weights": 5},
                   {"backend": mine["backend"] | {"threads": 0}}, {"backend": mine["backend"] | {"device": [1]}},
                   {"weights": "../../etc/passwd"}):  # fmt: skip
        stream.header = mine | change
        with pytest.raises((CorruptStream, ModelMissing)):
            decoded(dumps(stream))


def test_published_over_the_bundled_model():
    """Portable: no fingerprint but the weights' id, no verification needed."""
    codec = nacrith.Published(backends.Bundled(tiny_models.language_model()), "published", block=2000)
    assert codec.portable and codec.notes() == [] and not codec.coder.verify
    round_trips(codec.coder)
    file = encode_bytes(codec, TEXT)
    source, out = io.BytesIO(file), io.BytesIO()
    decode_file(codec, read_head(source), source, out)
    assert out.getvalue() == TEXT


def test_notes(opened):
    assert "not portable" in opened.notes()[0]
    with pytest.raises(UsageError, match="--weights"):
        nacrith.open_published("llama")
    with pytest.raises(UsageError, match="brings its own"):
        registry.load("nacrith", "cm", weights="x")


def test_command_line(fake, gguf_path, tmp_path, capsys):
    """Encode says that the file is not portable, info repeats it without any model, decode needs the weights."""
    source, file, back = tmp_path / "a.txt", tmp_path / "a.txt.nlc", tmp_path / "back.txt"
    source.write_bytes(TEXT)
    run = [str(source), "--threads", "1"]
    assert main(["encode", "-m", "nacrith:llama", "--weights", str(gguf_path), "--block", "500", "--json", *run]) == 0
    out, err = capsys.readouterr()
    assert "not portable" in err and json.loads(out)["bytes"] == file.stat().st_size
    assert main(["info", str(file)]) == 0
    out = capsys.readouterr().out
    assert "not portable" in out and "tiny.gguf" in out and "3 blocks" in out
    assert main(["decode", str(file), "-o", str(back)]) == 4 and not back.exists()
    assert "tiny.gguf" in capsys.readouterr().err
    assert main(["decode", str(file), "-o", str(back), "--weights", str(gguf_path)]) == 0
    assert back.read_bytes() == TEXT
    assert main(["test", str(file), "--weights", str(gguf_path)]) == 0
    assert main(["encode", "-f", "-m", "nacrith:llama", *run]) == 2
    assert main(["encode", "-f", "-m", "nacrith:cm", "--weights", "x", *run]) == 2
    assert main(["encode", "-f", "-m", "nacrith:llama", "--weights", str(source), *run]) == 4
    assert "GGUF" in capsys.readouterr().err


def test_progress_within_blocks(opened):
    """The bar moves while a block is being coded, up to the end."""
    seen: list[tuple[int, int]] = []
    out = io.BytesIO()
    encode_file(opened, io.BytesIO(TEXT), out, progress=lambda *at: seen.append(at), total=len(TEXT))
    assert len(seen) > 10 and seen == sorted(seen) and seen[-1] == (len(TEXT), len(TEXT))
    seen.clear()
    source = io.BytesIO(out.getvalue())
    decode_file(opened, read_head(source), source, None, progress=lambda *at: seen.append(at), total=len(TEXT))
    assert seen == sorted(seen) and seen[-1] == (len(TEXT), len(TEXT))
