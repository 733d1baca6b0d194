"""Context mixing of latents: round trips of anything, what it saves, damage, and how it is learned."""

from __future__ import annotations

import json

import numpy as np
import pytest
from neuralcodec.codecs import registry
from neuralcodec.container.errors import CodecError, CorruptStream
from neuralcodec.entropy.gaussian import SCALES, student_tables
from neuralcodec.entropy.latent_mixing import (
    SKIPPED,
    TAPS,
    HyperStart,
    MixedDecoder,
    MixedEncoder,
    Start,
    joined,
    learn,
    parted,
    sizes_of,
)

SLICES = (3, 5)
TABLES = student_tables()


def start(seed: int = 0, channels: int = sum(SLICES)) -> Start:
    return Start.plain(np.random.default_rng(seed).integers(-1500, 1500, (channels, 2, TAPS)).astype(np.int16))


def tile(h: int, w: int, seed: int, smooth: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Symbols as wide as their rows promise; with ``smooth``, alike beside each other."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 64, (sum(SLICES), h, w)).astype(np.uint8) // (2 if smooth else 1)
    noise = rng.standard_normal(rows.shape)
    common = np.repeat(np.repeat(rng.standard_normal((sum(SLICES), -(-h // 4), -(-w // 4))), 4, 1), 4, 2)[:, :h, :w]
    q = np.rint((noise * (1 - smooth) + common * smooth) * np.array(SCALES)[rows]).astype(np.int32)
    return q, rows


def passes(h: int, w: int):
    """(channels, positions) in the order of coding."""
    parity = np.add.outer(np.arange(h), np.arange(w)).ravel() % 2
    first = 0
    for n in SLICES:
        for half in (0, 1):
            if len(where := np.flatnonzero(parity == half)):
                yield slice(first, first + n), where
        first += n


def encoded(q: np.ndarray, rows: np.ndarray, begin: Start, coded: np.ndarray | None = None) -> bytes:
    encoder = MixedEncoder(begin, TABLES, *q.shape[1:])
    flat = [a.reshape(len(q), -1) if a is not None else None for a in (q, rows, coded)]
    for mine, where in passes(*q.shape[1:]):
        encoder.put(mine, where, *(None if a is None else a[mine, where] for a in flat))
    return encoder.finish()


def decoded(payload: bytes, rows: np.ndarray, begin: Start, coded: np.ndarray | None = None) -> np.ndarray:
    decoder = MixedDecoder(payload, begin, TABLES, *rows.shape[1:])
    out, flat = np.zeros(rows.reshape(len(rows), -1).shape, np.int32), rows.reshape(len(rows), -1)
    for mine, where in passes(*rows.shape[1:]):
        out[mine, where] = decoder.get(mine, where, flat[mine, where],
                                       None if coded is None else coded.reshape(len(rows), -1)[mine, where])  # fmt: skip
    decoder.finish()
    return out.reshape(rows.shape)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (4, 4), (7, 3), (12, 20)])
def test_round_trip(shape):
    for seed in range(3):
        q, rows = tile(*shape, seed)
        q.flat[seed] = (32767, -32767, 5000)[seed]  # far beyond every row
        payload = encoded(q, rows, start(seed))
        assert np.array_equal(decoded(payload, rows, start(seed)), q)
        assert payload == encoded(q, rows, start(seed))
    extreme = np.random.default_rng(0).choice([-32767, 0, 32767], q.shape).astype(np.int32)
    for row in (0, 63):
        rows[:] = row
        assert np.array_equal(decoded(encoded(extreme, rows, start()), rows, start()), extreme)


def test_symbols_left_out():
    q, rows = tile(8, 12, 5)
    coded = np.random.default_rng(1).random(q.shape) < 0.6
    q[~coded] = 0
    payload = encoded(q, rows, start(), coded)
    assert np.array_equal(decoded(payload, rows, start(), coded), q)
    assert len(payload) < len(encoded(q, rows, start()))


def test_it_learns_what_tables_cannot_know():
    """Symbols alike beside each other cost less than their rows say; independent ones hardly more."""
    for smooth, most in ((0.5, 0.97), (0.0, 1.05)):
        tiles = [tile(16, 24, seed, smooth) for seed in range(30)]
        taps = np.zeros((sum(SLICES), 2, TAPS), np.int16)
        taps[:, 1, :4], taps[:, 0, :2] = 500, 900
        begin, _ = learn(Start.plain(taps), TABLES, tiles, SLICES)
        q, rows = tile(16, 24, 99, smooth)
        taken = len(encoded(q, rows, begin))
        assert taken < most * TABLES.bits(q.ravel(), rows.ravel()).sum() / 8
        assert np.array_equal(decoded(encoded(q, rows, begin), rows, begin), q)
    assert (begin.counts > 0).any() and begin.counts.max() <= 100


def hyper_start(channels: int = 4) -> HyperStart:
    rng = np.random.default_rng(4)
    rows = rng.integers(0, 40 * 256, (5, channels)).astype(np.int16)
    return HyperStart(rows, rng.integers(-3 * 256, 3 * 256, (5, channels)).astype(np.int16), start(7, channels))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 4)])
def test_the_hyper_latent_goes_first_through_the_same_coder(shape):
    q, rows = tile(4 * shape[0], 4 * shape[1], 2)
    for level in (0, 333, 1000):
        z = np.random.default_rng(level).integers(-127, 128, (4, *shape)).astype(np.int32)
        encoder = MixedEncoder(start(), TABLES, *q.shape[1:])
        encoder.put_hyper(hyper_start(), z, level, 1000)
        for mine, where in passes(*q.shape[1:]):
            encoder.put(mine, where, *(a.reshape(len(q), -1)[mine, where] for a in (q, rows)))
        payload = encoder.finish()
        decoder = MixedDecoder(payload, start(), TABLES, *q.shape[1:])
        assert np.array_equal(decoder.get_hyper(hyper_start(), *shape, level, 1000), z)
        for mine, where in passes(*q.shape[1:]):
            symbols, own = (a.reshape(len(q), -1)[mine, where] for a in (q, rows))
            assert np.array_equal(decoder.get(mine, where, own), symbols)
        decoder.finish()
        with pytest.raises(CorruptStream):
            MixedDecoder(b"", start(), TABLES, *q.shape[1:]).get_hyper(hyper_start(), *shape, level, 1000)


def test_rows_and_offsets_of_the_hyper_latent_follow_the_level():
    begin = hyper_start()
    for knot in range(5):
        rows, offsets = begin.at(knot * 250, 1000)
        assert np.array_equal(rows, (begin.rows[knot].astype(int) + 128) // 256)
        assert np.array_equal(offsets, (begin.offsets[knot].astype(int) + 128) // 256)
    between = (begin.rows[0].astype(int) * 150 + begin.rows[1].astype(int) * 100 + 125) // 250
    assert np.array_equal(begin.at(100, 1000)[0], (between + 128) // 256)
    arrays = begin.to_arrays()
    assert all(np.array_equal(v, arrays[k]) for k, v in HyperStart.from_arrays(arrays).to_arrays().items())
    for bad in ({"rows": arrays["rows"][:, :3]}, {"rows": arrays["rows"] - 20000}, {"offsets": arrays["offsets"][:2]}):
        with pytest.raises(ValueError):
            HyperStart.from_arrays(arrays | bad)
    codec = registry.codec_class("hyperprior").from_preset("test")
    mixing = {f"mixing.{k}": v for k, v in start(0, codec.config.latent.channels).to_arrays().items()}
    with pytest.raises(ValueError, match="of z: made"):
        codec.set_arrays(mixing | {f"hyper_mixing.{k}": v for k, v in arrays.items()})
    with pytest.raises(ValueError, match="does not have"):
        codec.set_arrays(mixing | {"other.rows": arrays["rows"]})


def test_damage():
    q, rows = tile(8, 8, 3)
    payload = encoded(q, rows, start())
    wrong = 0
    for at in range(len(payload)):
        for bad in (payload[:at], payload[:at] + bytes([payload[at] ^ 64]) + payload[at + 1 :]):
            try:
                wrong += not np.array_equal(decoded(bad, rows, start()), q)
            except CorruptStream:
                continue
    assert wrong < 0.02 * len(payload)  # checksums of the container are for the rest
    for more in (b"\0", b"\1", b"\1\1\1\1\1"):
        with pytest.raises(CorruptStream):
            decoded(payload + more, rows, start())
    for bad in (b"", b"\5ab", b"\xff\xff\xff\xff\xff\1"):
        with pytest.raises(CodecError):
            parted(bad)
    for n in (0, 1, 127, 128, 20000):
        assert parted(joined(bytes(n), b"y")) == (bytes(n), b"y")


def test_arrays():
    arrays = start().to_arrays()
    again = Start.from_arrays(arrays)
    assert all(np.array_equal(v, arrays[k]) for k, v in again.to_arrays().items())
    assert len(arrays["chances"]) == sizes_of(sum(SLICES)).sum()
    with pytest.raises(ValueError):
        Start.from_arrays(arrays | {"counts": arrays["counts"][1:]})
    with pytest.raises(ValueError):
        Start.from_arrays(arrays | {"weights": arrays["weights"] + (1 << 25)})
    codec = registry.codec_class("hyperprior").from_preset("test")
    with pytest.raises(ValueError, match="channels"):
        codec.set_arrays({f"mixing.{k}": v for k, v in arrays.items()})


def test_from_pictures_to_weights(tmp_path, monkeypatch, capsys):
    """The command gives a weights file its mixing; files get smaller, and decode with what was stored."""
    import shutil

    import torch
    from contract import as_tensor, photo
    from neuralcodec.codecs.weights import load_weights
    from neuralcodec.train import mixing
    from PIL import Image

    for n in range(3):
        Image.fromarray(np.roll(photo(), 40 * n, 0)[:256, :256]).save(tmp_path / f"{n}.png")
    for suffix in (".safetensors", ".json"):
        shutil.copy(registry.weights_path("hyperprior", "test").with_suffix(suffix), tmp_path)
    assert mixing.main(["hyperprior:test", "--data", str(tmp_path), "--weights", str(tmp_path)]) == 0
    said = json.loads(capsys.readouterr().out)
    card = json.loads((tmp_path / "hyperprior-test.json").read_text())
    assert said["model_id"] == card["model_id"] and card["training"]["mixing"]["pictures"] == 3
    plain, mixed = (registry.codec_class("hyperprior").from_preset("test") for _ in range(2))
    load_weights(plain, registry.weights_path("hyperprior", "test"))
    load_weights(mixed, tmp_path / "hyperprior-test.safetensors")
    assert mixed.model_id.hex() == card["model_id"] != plain.model_id.hex()
    y = plain.analyse(as_tensor(photo()), 300)
    (before, y_hat), (after, same) = plain.encode_latent(y, 300), mixed.encode_latent(y, 300)
    assert len(after) < 0.95 * len(before) and torch.equal(y_hat, same)
    assert torch.equal(mixed.decode_latent(after, *y.shape[2:], 300), y_hat)
    q, rows = mixing.observe(plain.latent, y, plain.latent.analyse_hyper(y, 300), 300)
    assert q.shape == y.shape[1:] and rows.max() < 64 and SKIPPED not in rows
