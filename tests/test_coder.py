
import numpy as np
import pytest
from damage import mutations
from hypothesis import given, settings
from hypothesis import strategies as st
from neuralcodec.container import CorruptStream
from neuralcodec.entropy.coder import Decoder, Encoder
from neuralcodec.entropy.gaussian import SCALES, gaussian_tables
from neuralcodec.entropy.tables import TOTAL, Tables, pmf_to_tables, quantise_pmf
from reference_ans import ReferenceDecoder


def random_tables(rng: np.random.Generator, rows: int) -> Tables:
    """Rows of all characters: flat, peaked, two symbols, with probabilities of zero."""
    pmfs = []
    for _ in range(rows):
        n = int(rng.choice([1, 2, 3, 17, 300]))
        pmf = rng.dirichlet(np.full(n, rng.choice([0.01, 1.0, 50.0])))
        pmfs.append(np.nan_to_num(pmf) * rng.choice([1.0, 0.9, 1e-6]))
    return pmf_to_tables(pmfs, rng.integers(-50, 50, rows))


def payload_of(puts, tables) -> bytes:
    encoder = Encoder()
    for values, indexes in puts:
        encoder.put(values, indexes, tables)
    return encoder.finish()


def random_put(rng, tables, n, spread=400):
    indexes = rng.integers(0, len(tables), n)
    return rng.integers(-spread, spread, n).astype(np.int32), indexes


@given(st.integers(0, 2**32), st.integers(1, 40), st.lists(st.integers(0, 200), max_size=5))
@settings(max_examples=60, deadline=None)
def test_round_trip_and_reference(seed, rows, sizes):
    """What goes in comes out, here and in a second decoder written from the specification."""
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, rows)
    puts = [random_put(rng, tables, n) for n in sizes]
    payload = payload_of(puts, tables)
    decoder, reference = Decoder(payload), ReferenceDecoder(payload)
    lists = [tables.row(r).tolist() for r in range(rows)]
    for values, indexes in puts:
        assert np.array_equal(decoder.get(indexes, tables), values)
        assert reference.values(indexes.tolist(), lists, tables.offsets.tolist()) == values.tolist()
    decoder.finish()
    if payload:
        assert reference.symbol([1 << 12] * 4096) == 0xA5C
    assert reference.empty()


def test_golden_payload():
    """Bytes that must never change, whatever version of constriction is installed."""
    tables = pmf_to_tables([np.array([0.5, 0.25, 0.125]), np.array([0.9])], [-1, 3])
    values = np.array([-1, 0, 1, 3, 3, 40, -77, 0, -1, 3])
    indexes = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 1])
    assert payload_of([(values, indexes)], tables).hex() == "0000004b492175efc56a3802"


def test_extreme_escapes():
    tables = gaussian_tables()
    values = np.array([2**24 - 10, -(2**24) + 10, 0, 2**20])
    indexes = np.array([0, 63, 5, 63])
    decoder = Decoder(payload_of([(values, indexes)], tables))
    assert np.array_equal(decoder.get(indexes, tables), values)
    decoder.finish()
    with pytest.raises(ValueError, match="too far"):
        payload_of([(np.array([2**25]), np.array([0]))], tables)


def test_overhead():
    """Under 0.1 % + 8 bytes over the exact ideal of the integer tables."""
    rng = np.random.default_rng(1)
    tables = gaussian_tables()
    for n in (1, 1000, 200_000):
        indexes = rng.integers(0, 64, n).astype(np.uint8)
        values = np.rint(rng.normal(size=n) * np.array(SCALES)[indexes]).astype(np.int32)
        ideal = tables.bits(values, indexes).sum() / 8
        assert len(payload_of([(values, indexes)], tables)) <= ideal * 1.001 + 8


def test_bits_price_escapes():
    tables = gaussian_tables()
    values, indexes = np.array([5000, 3]), np.array([0, 63])
    bits = tables.bits(values, indexes)
    assert bits[0] == 24 - np.log2(tables.row(0)[-1]) + 25
    assert bits[1] == 24 - np.log2(tables.row(63)[3 - tables.offsets[63]])


def test_gaussian_tables_follow_the_normal():
    from math import erfc, sqrt

    tables = gaussian_tables()
    assert len(tables) == 64 and tables.widths.nbytes < 120_000
    for r, sigma in enumerate(SCALES):
        row, offset = tables.row(r), int(tables.offsets[r])
        assert row.sum() == TOTAL and np.abs(row[:-1] - row[-2::-1]).max() <= 1
        exact = erfc(-0.5 / sigma / sqrt(2)) / 2 - erfc(0.5 / sigma / sqrt(2)) / 2
        assert abs(row[-offset] / TOTAL - exact) < 1e-3 * exact + 4 / TOTAL * len(row)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=400).filter(lambda p: sum(p) > 1e-3))
def test_quantised_pmf(pmf):
    widths = quantise_pmf(np.array(pmf))
    assert widths.sum() == TOTAL and widths.min() >= 1
    share = np.array(pmf) / sum(pmf) * (TOTAL - len(pmf)) + 1
    assert np.abs(widths - share).max() <= 1


@pytest.mark.parametrize(
    "widths, lengths, offsets",
    [([TOTAL], [1], [0]), ([1, 2], [2], [0]), ([0, TOTAL], [2], [0]), ([1, TOTAL - 1], [2], [0, 0]), ([1, TOTAL - 1], [3], [0])],
)
def test_bad_tables_are_refused(widths, lengths, offsets):
    with pytest.raises((ValueError, IndexError)):
        Tables(*(np.array(a, np.int32) for a in (widths, lengths, offsets)))


def test_damaged_payloads():
    """2,000 payloads whose checksum would be right: an error or other symbols, never a crash, a hang, or no notice of length."""
    rng = np.random.default_rng(2)
    tables = gaussian_tables()
    indexes = rng.integers(0, 40, 500)
    values = np.rint(rng.normal(size=500) * np.array(SCALES)[indexes]).astype(np.int32)
    good = payload_of([(values, indexes)], tables)
    other = payload_of([(values[::-1].copy(), indexes)], tables)
    noticed = 0
    for _, bad in mutations(good, other, 2000, seed=3):
        try:
            decoder = Decoder(bad)
            got = decoder.get(indexes, tables)
            assert got.shape == values.shape and np.abs(got).max() < 1 << 25
            decoder.finish()
        except CorruptStream:
            noticed += 1
    assert noticed >= 1980  # the end state alone, without any checksum


def test_empty_and_wrong_indexes():
    tables = gaussian_tables()
    assert Encoder().finish() == b""
    Decoder(b"").finish()
    assert Decoder(payload_of([(np.array([]), np.array([], int))], tables)).get(np.array([], int), tables).size == 0
    with pytest.raises(ValueError, match="index"):
        Encoder().put(np.array([1]), np.array([64]), tables)
    with pytest.raises(CorruptStream):
        Decoder(b"\1\2\3")
    with pytest.raises(CorruptStream):
        Decoder(b"\1\0\0\0\0\0\0\0")
