"""Fields on a grid within a bound: the promise, exactness, damage, and what it costs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from damage import assert_refused, forged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neuralcodec.container.errors import CorruptStream, LimitExceeded
from neuralcodec.entropy.grid import Bound, decode_field, describe_field, encode_field
from neuralcodec.entropy.grid import kernels as k
from neuralcodec.entropy.grid.scales import LogScale, piecewise_log2

HERE = str(Path(__file__).parent)
GOLDEN = Path(__file__).parent / "golden"
PROPERTIES = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


def weather(*shape: int, seed: int = 0, rough: float = 0.02) -> np.ndarray:
    """Smooth fields (.., h, w), periodic in the last axis, similar from level to level, mean 250 and deviation 20."""
    rng = np.random.default_rng(seed)
    h, w = shape[-2:]
    count = int(np.prod(shape[:-2]))
    kr, kc = np.fft.fftfreq(2 * h)[:, None] * 2 * h, np.fft.fftfreq(w)[None] * w
    decay = (1 + kr**2 / 4 + kc**2) ** -1.5
    x, field = np.empty((count, h, w)), 0.0
    for i in range(count):
        fresh = np.fft.ifft2(np.fft.fft2(rng.standard_normal((2 * h, w))) * decay).real[:h]
        fresh /= fresh.std() or 1.0
        field = 0.9 * field + 0.44 * fresh if i else fresh
        x[i] = field
    return (250 + 20 * x + rough * rng.standard_normal(x.shape)).reshape(shape)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_kept(x: np.ndarray, y: np.ndarray, limit) -> None:
    """|x - y| <= limit at every finite cell, everything else where and what it was."""
    assert y.dtype == x.dtype and y.shape == x.shape
    finite = np.isfinite(x)
    error = np.abs(x[finite].astype(np.float64) - y[finite].astype(np.float64))
    assert (error <= np.broadcast_to(limit, x.shape)[finite]).all()
    assert np.array_equal(np.isnan(x), np.isnan(y))
    infinite = np.isinf(x)
    assert np.array_equal(x[infinite], y[infinite])


SPOILERS = ("none", "nan", "mask", "inf", "zeros", "huge", "fill", "subnormal", "constant", "offset")


def spoil(x: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    """What real files do to a field."""
    x = x.copy()
    some = rng.random(x.shape) < 0.1
    info = np.finfo(x.dtype)
    if how == "nan":
        x[some] = np.nan
    elif how == "mask":
        x[..., : x.shape[-1] // 2] = np.nan
    elif how == "inf":
        x[some] = rng.choice(np.array([np.inf, -np.inf, np.nan], x.dtype), int(some.sum()))
    elif how == "zeros":
        x[some] = 0
        x[rng.random(x.shape) < 0.1] *= -1
    elif how == "huge":
        x[some] *= x.dtype.type(info.max / 1e4)
    elif how == "fill":
        x[some] = 9.96921e36
    elif how == "subnormal":
        x = (x * info.smallest_subnormal * 7).astype(x.dtype)
    elif how == "constant":
        x[...] = x.flat[0]
    elif how == "offset":
        x += x.dtype.type(1e7)
    return x


@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=4), double=st.booleans(), how=st.sampled_from(SPOILERS),
    bound=st.sampled_from((1e-6, 1e-3, 0.05, 0.5, 30.0)), kind=st.sampled_from(("absolute", "relative", "range")),
    periodic=st.booleans(), goal=st.sampled_from(("bound", "rmse")), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=100, **PROPERTIES)
def test_bound_holds(shape, double, how, bound, kind, periodic, goal, seed):
    rng = np.random.default_rng(seed)
    two = [*shape[:-2], *(shape[-2:] if len(shape) > 1 else [1, shape[0]])]
    x = weather(*two, seed=seed).reshape(shape).astype(np.float64 if double else np.float32)
    x = spoil(x, how, rng)
    bound = min(bound, 0.5) if kind != "absolute" else bound
    payload = encode_field(x, Bound(bound, kind), periodic=periodic, goal=goal)
    finite = x[np.isfinite(x)].astype(np.float64)
    limit = {
        "absolute": bound,
        "relative": bound * np.abs(np.where(np.isfinite(x), x, 0).astype(np.float64)),
        "range": bound * (float(finite.max()) - float(finite.min())) if finite.size else 0.0,
    }[kind]
    y = decode_field(payload)
    assert_kept(x, y, limit)
    if kind == "relative":
        signs = np.isfinite(x)
        assert np.array_equal(np.sign(x[signs]), np.sign(y[signs]))
    assert len(payload) <= x.nbytes * 1.01 + 64


@given(
    shape=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    dtype=st.sampled_from(("f4", "f8", "i1", "u1", "i2", "u2", "i4")),
    how=st.sampled_from(SPOILERS), noise=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=80, **PROPERTIES)
def test_lossless(shape, dtype, how, noise, seed):
    """Every bit, those of NaN on request; never larger than the bytes themselves and a header."""
    rng = np.random.default_rng(seed)
    if dtype[0] == "f":
        x = spoil(rng.standard_normal(shape).astype(dtype), how, rng)
        if noise:  # every pattern of bits
            x = np.frombuffer(rng.bytes(x.nbytes), dtype).reshape(shape)
    else:
        info = np.iinfo(dtype)
        x = rng.integers(info.min, info.max, shape, endpoint=True, dtype=dtype) if noise else np.full(shape, 7, dtype)
    payload = encode_field(x, nan_payloads=True)
    assert same_bits(decode_field(payload), x)
    assert len(payload) <= x.nbytes * 1.01 + 64


def test_canonical_nan_without_payloads():
    x = weather(20, 30).astype(np.float32)
    x[3:5] = np.frombuffer(b"\x01\x00\xc0\x7f" * 60, np.float32).reshape(2, 30)
    for bound in (None, 0.1):
        y = decode_field(encode_field(x, bound))
        assert y[3:5].tobytes() == np.full((2, 30), np.nan, np.float32).tobytes()
        assert same_bits(decode_field(encode_field(x, bound, nan_payloads=True))[3:5], x[3:5])


@pytest.mark.parametrize("shape", [(73, 144), (6, 37, 72), (3, 4, 19, 36)])
@pytest.mark.parametrize("bound", [0.05, 0.5, 5.0])
def test_smaller_than_general_compressors(shape, bound):
    """What a context model and a predictor are for: against quantised residuals of the best plain predictor and zlib."""
    x = weather(*shape, rough=0.1).astype(np.float32)
    n = np.rint(x / (2 * bound)).astype(np.int64)
    lorenzo = n.copy()
    lorenzo[..., 1:] -= n[..., :-1]
    rows = lorenzo.copy()
    rows[..., 1:, :] -= lorenzo[..., :-1, :]
    plain = len(zlib.compress(rows.astype(np.int16).tobytes(), 9))
    assert len(encode_field(x, bound, periodic=True)) < 0.8 * plain


def test_levels_help_and_can_be_decoded_alone():
    x = weather(2, 6, 40, 72).astype(np.float32)
    together = encode_field(x, 0.5, periodic=True)
    apart = encode_field(x, 0.5, periodic=True, level_group=1)
    assert len(together) < 0.95 * len(apart)
    groups = encode_field(x, 0.5, periodic=True, level_group=2)
    whole = decode_field(groups)
    assert_kept(x, whole, 0.5)
    part = decode_field(groups, levels=[5, 0, 1])
    assert same_bits(part, whole[:, [5, 0, 1]])
    with pytest.raises(ValueError):
        decode_field(groups, levels=[6])


def test_periodic_longitude_helps():
    x = weather(40, 32, rough=0.0).astype(np.float32)
    sizes = [len(encode_field(np.roll(x, 5, 1), 0.5, periodic=p)) for p in (True, False)]
    assert sizes[0] < sizes[1]


def test_map_of_regions():
    x = weather(3, 24, 40).astype(np.float32)
    limit = np.full((24, 40), 2.0)
    limit[5:9, 10:30], limit[15, 15] = 0.05, 0.0
    y = decode_field(encode_field(x, Bound(limit)))
    assert_kept(x, y, limit)
    assert np.abs(x - y).max() > 0.5
    assert np.array_equal(y[:, 15, 15], x[:, 15, 15])


def test_base_and_residual():
    """A good base makes the payload smaller, a useless one does not harm much, and it must be there to decode."""
    x = weather(2, 30, 60, rough=0.3).astype(np.float32)
    rng = np.random.default_rng(1)
    alone = encode_field(x, 0.2)
    near = x + 0.2 * rng.standard_normal(x.shape)
    good = encode_field(x, 0.2, base=near)
    assert describe_field(good)["needs_base"] and len(good) < 0.9 * len(alone)
    assert_kept(x, decode_field(good, base=near), 0.2)
    with pytest.raises(ValueError):
        decode_field(good)
    for useless in (np.zeros(x.shape), np.full(x.shape, np.nan), 1e30 * near):
        payload = encode_field(x, 0.2, base=useless)
        assert_kept(x, decode_field(payload, base=useless), 0.2)
        assert len(payload) < 1.1 * len(alone)


def test_rmse_goal_buys_rmse():
    """At about equal size, the error is smaller on average when that is what is asked for."""
    x = weather(120, 160, rough=0.01).astype(np.float32)
    plain = encode_field(x, 0.5, periodic=True)
    sizes, errors = [], []
    for bound in (0.5, 0.7, 1.0, 1.4, 2.0, 2.8):
        payload = encode_field(x, bound, periodic=True, goal="rmse")
        sizes.append(len(payload))
        errors.append(float(np.sqrt(np.square(decode_field(payload) - x).mean())))
    own = float(np.sqrt(np.square(decode_field(plain) - x).mean()))
    there = np.exp(np.interp(np.log(own), np.log(errors), np.log(sizes)))
    assert there < 0.9 * len(plain)


def test_threads_do_not_matter(monkeypatch):
    from neuralcodec.entropy.grid import field

    monkeypatch.setattr(field, "BAND_VALUES", 1 << 10)
    monkeypatch.setattr(field, "BAND_ROWS", 16)
    x = weather(3, 70, 48).astype(np.float32)
    one, two = (encode_field(x, 0.3, threads=n) for n in (1, 2))
    assert one == two
    assert same_bits(decode_field(one, threads=2), decode_field(one))


def test_bad_calls():
    x = weather(4, 5).astype(np.float32)
    for bad in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError):
            encode_field(x, bad)
    for call in (
        lambda: encode_field(x, Bound(0.1, "about")), lambda: encode_field(x, Bound(1.0, "relative")),
        lambda: encode_field(x.astype(complex), 0.1), lambda: encode_field(x.astype(np.int16), 0.1),
        lambda: encode_field(x[None, None, None], 0.1), lambda: encode_field(np.float32(3), 0.1),
        lambda: encode_field(x, Bound(np.ones((5, 4)))), lambda: encode_field(x, Bound(-np.ones((4, 5)))),
        lambda: encode_field(x, 0.1, base=x[:2]), lambda: encode_field(x, 0.1, level_group=0),
        lambda: encode_field(x, 0.1, goal="psnr"),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call()
    assert decode_field(encode_field(np.zeros((0, 5), np.float32), 0.1)).shape == (0, 5)


def test_golden_payloads():
    """Payloads of earlier versions decode for ever. ``golden/make_grid.py`` made them, once."""
    sys.path.insert(0, str(GOLDEN))
    from make_grid import base_of

    index = json.loads((GOLDEN / "grid.json").read_text())
    assert {name[-1] for name in index} == {"1", "2", "3"} and len(index) == 26
    for name, kept in index.items():
        y = decode_field(bytes.fromhex(kept["payload"]), base=base_of(name))
        assert hashlib.sha256(y.tobytes()).hexdigest() == kept["decoded"], name



def test_damage():
    x = weather(2, 14, 20).astype(np.float32)
    x[0, :3, :4] = np.nan
    x[1, 5, 5] = 1e30
    for payload in (encode_field(x, 0.3), encode_field(x)):
        assert_refused(decode_field, payload, encode_field(x + 1, 0.1))
    with pytest.raises(LimitExceeded):
        decode_field(payload, limit=100)


def decoded_or_refused(payload: bytes, n: int) -> set[bool]:
    """What becomes of forged copies: True, a field as their header describes it; False, a typed error."""
    from neuralcodec.entropy.grid.field import _CRC, google_crc32c

    found = set()
    for bad in forged(payload[: -_CRC.size], lambda body: _CRC.pack(google_crc32c.value(body)), n):
        try:
            y = decode_field(bad, limit=10_000)
        except (CorruptStream, LimitExceeded):
            found.add(False)
        else:
            assert y.shape == describe_field(bad)["shape"] and y.size <= 10_000
            found.add(True)
    return found


def test_forged_streams_stay_within_bounds():
    """A payload with a good checksum and nonsense inside ends in a typed error or in some field, never worse."""
    x = weather(2, 14, 20).astype(np.float32)
    x[0, :3, :4] = np.nan
    for payload in (encode_field(x, 0.3), encode_field(x), encode_field(np.abs(x), Bound(0.01, "relative"))):
        assert decoded_or_refused(payload, 300) == {True, False}


def test_tables_of_the_logistic_domain():
    x = np.arange(-k.REACH, k.REACH + 1) / 256
    assert np.abs(k.SQUASH - 65536 / (1 + np.exp(-x))).max() <= 1 and (np.diff(k.SQUASH) >= 0).all()
    assert k.SQUASH.min() >= 1 and k.SQUASH.max() <= 65535
    p = (np.arange(16384) + 0.5) / 16384
    inner = slice(8, -8)
    assert np.abs(k.STRETCH - np.log(p / (1 - p)) * 256)[inner].max() < 4
    sizes = [int(k._mag8(int(m))) for m in k.MAGNITUDE]
    assert sizes == list(range(256))


def test_piecewise_logarithm():
    x = np.concatenate([np.geomspace(1e-300, 1e300, 999), 2.0 ** np.arange(-20, 20), [5e-324]])
    y = piecewise_log2(x)
    assert np.abs(y - np.log2(x)).max() < 1e-4 and (np.diff(y[:999]) > 0).all()
    scale = LogScale(2.0**-20, 0.0, -2000.0, 2000.0)
    n = np.rint(y * 2**20).astype(np.int64)
    assert (np.abs(scale.backward(n)[:-1] / x[:-1] - 1) < 1e-6).all()


def probe() -> str:
    """Run in processes of their own: hashes of payloads and of what fixed payloads decode to."""
    sha = hashlib.sha256()
    for seed, (shape, bound) in enumerate((((30, 50), 0.5), ((4, 20, 36), 0.02), ((2, 3, 16, 24), 3.0))):
        x = weather(*shape, seed=seed).astype(np.float32)
        x = np.round(x * 64) / 64  # the same whatever the FFT
        for kind in (Bound(bound), Bound(bound / 100, "relative"), None):
            payload = encode_field(x, kind, periodic=True)
            sha.update(payload + decode_field(payload, threads=2).tobytes())
    return sha.hexdigest()


def test_same_everywhere(tmp_path):
    """Payloads and fields under the native and a generic instruction set, compiled apart."""
    code = f"import sys; sys.path.insert(0, {HERE!r}); import test_grid_coding as t; print(t.probe())"
    found = {probe()}
    env = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found.add(run.stdout.split()[-1])
    assert len(found) == 1
