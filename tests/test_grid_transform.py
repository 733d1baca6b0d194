"""Fields at a root mean square error by a transform: the promise, exactness, damage, bases and wavelet beside plain ones."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from damage import assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from neuralcodec.codecs.grid_chunk import Coding, decode_chunk, encode_chunk
from neuralcodec.container.errors import CorruptStream, LimitExceeded
from neuralcodec.entropy.grid import Bound, decode_field, describe_field, encode_field, encode_rmse, field
from neuralcodec.entropy.grid import transform as t
from neuralcodec.entropy.grid import transform_kernels as k
from test_grid_coding import HERE, PROPERTIES, SPOILERS, decoded_or_refused, same_bits, spoil, weather


def error_of(x: np.ndarray, y: np.ndarray) -> float:
    there = np.isfinite(x)
    return float(np.sqrt(np.square(y[there].astype(np.float64) - x[there]).mean()))


@given(
    shape=st.lists(st.integers(1, 17), min_size=1, max_size=4), double=st.booleans(), how=st.sampled_from(SPOILERS),
    rmse=st.sampled_from((1e-3, 0.05, 0.5, 30.0)), periodic=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=80, **PROPERTIES)
def test_error_holds(shape, double, how, rmse, periodic, seed):
    """Whatever the shape and whatever is not finite: the error over the finite cells, all else where it was. Or None."""
    two = [*shape[:-2], *(shape[-2:] if len(shape) > 1 else [1, shape[0]])]
    x = weather(*two, seed=seed).reshape(shape).astype(np.float64 if double else np.float32)
    x = spoil(x, how, np.random.default_rng(seed))
    payload = encode_rmse(x, rmse, periodic=periodic)
    if how in ("none", "zeros", "constant") and np.isfinite(x).any():
        assert payload is not None
    if payload is None:
        return
    y = decode_field(payload)
    assert y.dtype == x.dtype and y.shape == x.shape and error_of(x, y) <= rmse
    assert np.array_equal(np.isnan(x), np.isnan(y))
    assert np.array_equal(x[np.isinf(x)], y[np.isinf(x)])
    about = describe_field(payload)
    assert about["shape"] == x.shape and about["mode"] == "transformed" and about["kind"] == "rmse" and about["bound"] == rmse


@pytest.mark.parametrize("shape", [(73, 144), (12, 37, 72), (3, 4, 19, 36), (9, 1, 40, 31)])
@pytest.mark.parametrize("rmse", [0.05, 0.5])
def test_near_the_error_and_smaller_than_the_predictor(shape, rmse):
    """At least 97 % of the error that was allowed, and what it is for: fewer bytes than the predictor at that error."""
    x = weather(*shape, rough=0.0).astype(np.float32)
    payload = encode_rmse(x, rmse, periodic=True)
    assert 0.97 * rmse <= error_of(x, decode_field(payload)) <= rmse
    sizes, errors = [], []
    for bound in (1.0, 2.0, 4.0, 8.0):
        plain = encode_field(x, Bound(bound * rmse), periodic=True, goal="rmse")
        sizes.append(len(plain))
        errors.append(error_of(x, decode_field(plain)))
    assert len(payload) < 0.9 * np.exp(np.interp(np.log(rmse), np.log(errors), np.log(sizes)))


def test_levels_that_are_alike_cost_little():
    """What bases learnt from coarser bands are for."""
    x = weather(24, 40, 72, rough=0.0).astype(np.float32)
    together = len(encode_rmse(x, 0.3, periodic=True))
    apart = sum(len(encode_rmse(plane, 0.3, periodic=True)) for plane in x)
    assert together < 0.75 * apart


def test_nan_payloads_and_whole_numbers():
    x = np.round(weather(3, 30, 40, rough=2.0)).astype(np.float32)
    x[1, 3:5] = np.frombuffer(b"\x01\x00\xc0\x7f" * 80, np.float32).reshape(2, 40)
    kept = decode_field(encode_rmse(x, 0.3, nan_payloads=True))
    assert same_bits(kept[1, 3:5], x[1, 3:5])
    assert decode_field(encode_rmse(x, 0.3))[1, 3:5].tobytes() == np.full((2, 40), np.nan, np.float32).tobytes()
    for rmse in (0.1, 0.6):
        y = np.rint(decode_field(encode_rmse(x, rmse, whole=True)))
        assert error_of(x, y) <= rmse
    assert encode_rmse(np.full((4, 5), np.nan, np.float32), 0.1) is None
    assert encode_rmse(x * np.float32(1e30), 1e-3) is None


def test_parts_threads_and_some_levels(monkeypatch):
    """Parts are apart from each other: any number of threads, the same bytes; some levels, the same values."""
    monkeypatch.setattr(field, "PART_VALUES", 30 * 48 * 3)
    x = weather(4, 5, 30, 48).astype(np.float32)
    x[0, 0, 3:9, 4:20] = np.nan
    one, two = (encode_rmse(x, 0.3, threads=n) for n in (1, 2))
    assert one == two
    y = decode_field(one)
    assert error_of(x, y) <= 0.3 and same_bits(decode_field(one, threads=2), y)
    assert same_bits(decode_field(one, levels=[4, 0]), y[:, [4, 0]])
    times = weather(7, 1, 30, 48).astype(np.float32)
    payload = encode_rmse(times, 0.3)
    assert error_of(times, decode_field(payload)) <= 0.3
    assert same_bits(decode_field(payload, levels=[0]), decode_field(payload))


def test_bad_calls():
    x = weather(4, 5).astype(np.float32)
    for call in (lambda: encode_rmse(x, 0.0), lambda: encode_rmse(x, np.nan), lambda: encode_rmse(x.astype(np.int16), 1.0),
                 lambda: encode_rmse(x[None, None, None], 1.0), lambda: encode_rmse(np.float32(3), 1.0)):  # fmt: skip
        with pytest.raises(ValueError):
            call()


def test_damage():
    x = weather(2, 14, 20).astype(np.float32)
    x[0, :3, :4] = np.nan
    payload = encode_rmse(x, 0.3)
    assert_refused(decode_field, payload, encode_rmse(x + 1, 0.1))
    with pytest.raises(LimitExceeded):
        decode_field(payload, limit=100)


def test_forged_streams_stay_within_bounds():
    """A payload with a good checksum and nonsense inside ends in a typed error or in some field, never worse."""
    x = weather(3, 14, 20).astype(np.float32)
    x[0, :3, :4] = np.nan
    for payload in (encode_rmse(x, 0.3), encode_rmse(x[:, None, :, :] * np.ones((1, 3, 1, 1), np.float32), 0.01)):
        assert decoded_or_refused(payload, 200) == {True, False}


@pytest.mark.parametrize("dtype", ["f4", "f8", "i2"])
def test_chunks(dtype):
    """The chunks of files: fill values, packed integers, and whatever is smaller of transform and predictor."""
    x = weather(2, 40, 72, rough=0.0)
    x[0, 4:9, 7:30] = np.nan
    if dtype == "i2":
        fill, scale = np.int16(-32767), 0.01
        raw = np.where(np.isnan(x), fill, np.rint(np.nan_to_num(x - 250) / scale)).astype(np.int16)
        coding = Coding("i2", "TYX", "rmse", 0.2, scale=scale, offset=250.0, fills=(fill.tobytes(),))
        real = np.where(raw == fill, np.nan, raw * scale)
    else:
        fill, scale = np.dtype(dtype).type(-9999), 1.0
        raw = np.where(np.isnan(x), fill, x).astype(dtype)
        coding = Coding(dtype, "TYX", "rmse", 0.2, fills=(fill.tobytes(),))
        real = np.where(raw == fill, np.nan, raw)
    payload, stats = encode_chunk(raw, coding)
    y = decode_chunk(payload, raw.shape, coding)
    assert y.dtype == raw.dtype and np.array_equal(y == fill, raw == fill)
    off = np.abs((y.astype(np.float64) - raw) * scale)[~np.isnan(real)]
    assert 0.97 * 0.2 <= np.sqrt(np.square(off).mean()) <= 0.2 and off.max() <= stats.worst * (1 + 1e-6)
    low, high = np.nanmin(real), np.nanmax(real)
    there = y[raw != fill] * scale
    assert low - 1e-9 <= there.min() and there.max() <= high + 1e-9
    rough = np.random.default_rng(0).integers(0, 2, (60, 80)) * 100.0  # nothing for a wavelet
    for values in (rough.astype(np.float32), raw):
        coding = Coding(values.dtype.str[1:], "YX" if values is rough else "TYX"[3 - values.ndim :], "rmse", 0.2)
        payload, _ = encode_chunk(values, coding)
        assert error_of(values.astype(float), decode_chunk(payload, values.shape, coding)) <= 0.2


# ---- parts of it, beside plain ones ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 37, 64])
def test_bases_are_orthonormal(n):
    for kind in (t.PLAIN, t.COSINE, t.WAVELET):
        basis = t._fixed(kind, n) / 2.0**k.UNIT
        assert np.abs(basis.T @ basis - np.eye(n)).max() < 1e-3
    i = np.arange(n)
    cosines = np.cos(np.pi * (2 * i[:, None] + 1) * i / (2 * n)) * np.sqrt(np.where(i, 2, 1) / n)
    assert np.abs(t._fixed(t.COSINE, n) / 2.0**k.UNIT - cosines).max() <= 2.0**-17 * 1.01


def test_eigenvectors():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 40):
        a = rng.standard_normal((n, n)) * np.geomspace(1, 1e-3, n)
        matrix = a @ a.T
        vectors = t._eigenvectors(matrix.copy())
        values = np.diag(vectors.T @ matrix @ vectors)
        assert np.abs(vectors.T @ vectors - np.eye(n)).max() < 1e-10
        assert np.allclose(values, np.linalg.eigvalsh(matrix)[::-1], atol=1e-9 * values.max())
    assert np.array_equal(np.abs(t._eigenvectors(np.zeros((3, 3)))), np.eye(3))


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 11), (37, 54), (64, 96), (25, 101)])
@pytest.mark.parametrize("periodic", [False, True])
def test_wavelet_and_its_inverse(shape, periodic):
    """The inverse in integers undoes the transform in floats; energies agree; a plain convolution gives the same means."""
    x = np.random.default_rng(1).standard_normal((2, *shape)) * 100
    y = x.copy()
    t.forward_wavelet(y, periodic)
    back = np.rint(y * 2.0**k.FRACTION).astype(np.int64)
    k.inverse_wavelet(back, t.depth(*shape), periodic)
    assert np.abs(back * 2.0**-k.FRACTION - x).max() < 0.1
    assert 0.8 < np.square(y).sum() / np.square(x).sum() < 1.25


def test_low_pass_of_the_wavelet():
    """Against the taps of the 9/7 filter as published (Antonini et al., 1992), in the middle of a line."""
    taps = np.array([0.037828455506995, -0.023849465019380, -0.110624404418420, 0.377402855612650, 0.852698679009403])
    taps = np.concatenate([taps, taps[-2::-1]])
    x = np.random.default_rng(2).standard_normal((1, 1, 18))
    y = x.copy()
    t.forward_wavelet(y, False)
    assert t.depth(1, 18) == 1
    for i in (2, 3, 4, 5, 6):
        assert y[0, 0, i] == pytest.approx(x[0, 0, 2 * i - 4 : 2 * i + 5] @ taps, abs=2e-3)


def test_smooth_fill():
    x = weather(40, 60, rough=0.0)
    known = np.ones(x.shape, bool)
    known[10:20, 15:40], known[0, 0] = False, False
    filled = t.smooth_fill(np.where(known, x, np.nan), known)
    assert np.array_equal(filled[known], x[known]) and np.isfinite(filled).all()
    assert np.abs(filled - x)[~known].max() < 0.5 * np.ptp(x)
    assert not t.smooth_fill(x, np.zeros(x.shape, bool)).any()


def probe() -> str:
    """Run in processes of their own: a hash of what golden payloads decode to, and of a payload made here."""
    sys.path.insert(0, str(Path(__file__).parent / "golden"))
    from make_grid import transformed

    sha = hashlib.sha256()
    for x, rmse, options in transformed().values():
        payload = encode_rmse(x, rmse, **options)
        sha.update(payload + decode_field(payload, threads=2).tobytes())
    return sha.hexdigest()


def test_same_everywhere(tmp_path):
    """Payloads and fields under the native and a generic instruction set, compiled apart."""
    code = f"import sys; sys.path.insert(0, {HERE!r}); import test_grid_transform as t; print(t.probe())"
    env = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == probe()


def test_chunks_of_another_kind_than_they_say():
    """Payloads that are sound by themselves, but not what the header of their chunk says, are damage."""
    from neuralcodec.container import cbor

    x = weather(1, 1, 20, 30).astype(np.float32)
    head, coding = cbor.encode([3, [], []]), Coding("f4", "YX", "absolute", 0.5)
    assert decode_chunk(head + encode_field(x, 0.5), (20, 30), coding).shape == (20, 30)
    based, empty = encode_field(x, 0.5, base=x.astype(np.float64)), encode_field(np.zeros((1, 1, 20, 0), np.float32), 0.5)
    for payload in (based, encode_field(x.reshape(1, 1, 30, 20), 0.5), encode_field(x.astype(np.float64), 0.5), empty):
        with pytest.raises(CorruptStream):
            decode_chunk(head + payload, (20, 30), coding)
