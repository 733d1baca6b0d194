"""The arithmetic coder: round trips, a second decoder, fixed bytes, damage."""

import numpy as np
import pytest
from damage import cuts, mutations
from hypothesis import given, settings
from hypothesis import strategies as st
from neuralcodec.container import CorruptStream
from neuralcodec.entropy.coder import VALUE_MAX, Decoder, Encoder, _model
from neuralcodec.entropy.gaussian import SCALES, gaussian_tables, student_tables
from neuralcodec.entropy.tables import TOTAL, Tables, pmf_to_tables
from reference_ans import ReferenceDecoder

constriction = pytest.importorskip("constriction")


def random_tables(rng: np.random.Generator, rows: int) -> Tables:
    """Rows of all characters: flat, peaked, two symbols, with probabilities of zero."""
    pmfs = []
    for _ in range(rows):
        n = int(rng.choice([1, 2, 3, 17, 300]))
        pmf = rng.dirichlet(np.full(n, rng.choice([0.01, 1.0, 50.0])))
        pmfs.append(np.nan_to_num(pmf) * rng.choice([1.0, 0.9, 1e-6]))
    return pmf_to_tables(pmfs, rng.integers(-50, 50, rows))


def random_widths(rng: np.random.Generator, n: int, ones: float) -> np.ndarray:
    """n widths that sum to 2**24, about a share ``ones`` of them 1, without going through floats."""
    cuts_at = np.sort(rng.choice(TOTAL - n, max(1, int(n * (1 - ones))) - 1, replace=False))
    big = np.diff(np.concatenate([[0], cuts_at, [TOTAL - n]]))
    widths = np.ones(n, np.int32)
    widths[rng.permutation(n)[: len(big)]] += big.astype(np.int32)
    assert widths.sum() == TOTAL
    return widths


def tables_of(*rows: list[int], offsets: list[int]) -> Tables:
    return Tables.from_arrays({"widths": np.concatenate(rows), "lengths": [len(r) for r in rows], "offsets": offsets})


def payload_of(puts, tables) -> bytes:
    encoder = Encoder()
    for values, indexes in puts:
        encoder.put(values, indexes, tables)
    return encoder.finish()


def gaussian_put(rng, n: int, classes: int = 64, escapes: float = 0.0):
    indexes = rng.integers(0, classes, n).astype(np.uint8)
    values = np.rint(rng.normal(size=n) * np.array(SCALES)[indexes]).astype(np.int32)
    far = rng.random(n) < escapes
    values[far] = rng.integers(-VALUE_MAX, VALUE_MAX, far.sum())
    return values, indexes


@pytest.mark.parametrize(
    "widths",
    [
        np.array([1, TOTAL - 1], np.int32),
        np.array([TOTAL - 1, 1], np.int32),
        np.array([TOTAL // 2 + 1, 1, TOTAL // 2 - 2], np.int32),
        np.full(4096, 4096, np.int32),
        *(random_widths(np.random.default_rng(n), n, ones) for n in (3, 17, 1000, 4000) for ones in (0.0, 0.5, 0.99)),
        *(gaussian_tables().row(r) for r in (0, 31, 63)),
    ],
    ids=len,
)
def test_the_library_uses_exactly_the_widths_of_a_table(widths):
    """Every symbol's first and last slot, and the state that they leave, as the integer formula of the SPEC says."""
    model = _model(widths)
    left = np.concatenate([[0], np.cumsum(widths[:-1], dtype=np.int64)])
    for symbol, (width, first) in enumerate(zip(widths.tolist(), left.tolist())):
        for slot in {first, first + width - 1}:
            coder = constriction.stream.stack.AnsCoder(np.array([5 << 24 | slot], np.uint32))
            assert coder.decode(model) == symbol
            assert coder.get_compressed().tolist() == [5 * width + slot - first]


@given(st.integers(0, 2**32), st.integers(1, 40), st.lists(st.integers(0, 200), max_size=5))
@settings(max_examples=60, deadline=None)
def test_round_trip_and_reference(seed, rows, sizes):
    """What goes in comes out, here and in a second decoder written from the specification."""
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, rows)
    spread = int(rng.choice([3, 400, VALUE_MAX - 1000]))
    puts = [(rng.integers(-spread, spread, n), rng.integers(0, rows, n)) for n in sizes]
    payload = payload_of(puts, tables)
    decoder, reference = Decoder(payload), ReferenceDecoder(payload)
    lists = [tables.row(r).tolist() for r in range(rows)]
    for values, indexes in puts:
        got = decoder.get(indexes, tables)
        assert got.dtype == np.int32 and np.array_equal(got, values)
        assert reference.values(indexes.tolist(), lists, tables.offsets.tolist()) == values.tolist()
    decoder.finish()
    assert reference.at_end() or not payload


@pytest.mark.parametrize("rows", [1, 2, 256, 257, 70_000])
def test_any_number_of_rows(rows):
    """The sort key changes its type at 256 and 65,536 rows."""
    tables = tables_of(*[[TOTAL - 100, 60, 40]] * rows, offsets=list(range(rows)))
    rng = np.random.default_rng(rows)
    indexes = np.concatenate([rng.integers(0, rows, 300), [0, rows - 1]])
    values = indexes + rng.integers(-1, 3, len(indexes))
    decoder = Decoder(payload_of([(values, indexes)], tables))
    assert np.array_equal(decoder.get(indexes, tables), values)
    decoder.finish()


@pytest.mark.parametrize(
    "sizes, expected",
    [([10], "0000004b32a6103fd16a3802"), ([5, 0, 5], "0000004bd43c0ff7cc6a3802")],
)
def test_golden_payload(sizes, expected):
    """Bytes that must never change, whatever version of constriction is installed."""
    tables = tables_of([8388608, 4194304, 2097152, 2097152], [15099494, 1677722], offsets=[-1, 3])
    values = np.array([-1, 0, 1, 3, 3, 40, -77, 0, -1, 3])
    indexes = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 1])
    ends = np.cumsum(sizes)
    puts = [(values[e - n : e], indexes[e - n : e]) for e, n in zip(ends, sizes)]
    assert payload_of(puts, tables).hex() == expected
    decoder = Decoder(bytes.fromhex(expected))
    assert np.array_equal(np.concatenate([decoder.get(i, tables) for _, i in puts]), values)
    decoder.finish()


def test_extreme_values():
    tables = gaussian_tables()
    values = np.array([VALUE_MAX - 10, 10 - VALUE_MAX, 0, 2**20, -3, 3])
    indexes = np.array([0, 63, 5, 63, 0, 0])
    decoder = Decoder(payload_of([(values, indexes)], tables))
    assert np.array_equal(decoder.get(indexes, tables), values)
    decoder.finish()


@pytest.mark.parametrize("value", [VALUE_MAX + 1, -VALUE_MAX - 1, 2**33 + 1, -(2**63)])
def test_values_out_of_reach_are_refused(value):
    with pytest.raises(ValueError, match="too far"):
        payload_of([(np.array([0, value]), np.array([0, 0]))], gaussian_tables())


def test_a_table_far_from_zero_limits_its_escapes():
    tables = tables_of([TOTAL - 1, 1], offsets=[1000])
    with pytest.raises(ValueError, match="too far"):
        payload_of([(np.array([-VALUE_MAX]), np.array([0]))], tables)


def test_overhead():
    """Under 0.1 % + 8 bytes over the exact ideal of the integer tables."""
    rng = np.random.default_rng(1)
    for tables in (gaussian_tables(), student_tables()):
        for n, escapes in ((1, 0), (1000, 0), (200_000, 0), (5000, 0.1), (100, 1)):
            values, indexes = gaussian_put(rng, n, escapes=escapes)
            ideal = tables.bits(values, indexes).sum() / 8
            assert len(payload_of([(values, indexes)], tables)) <= ideal * 1.001 + 8


def test_every_cut_is_noticed():
    tables = gaussian_tables()
    put = gaussian_put(np.random.default_rng(4), 300, 30, escapes=0.02)
    for what, bad in cuts(payload_of([put], tables)):
        with pytest.raises(CorruptStream):
            decoder = Decoder(bad)
            decoder.get(put[1], tables)
            decoder.finish()
            pytest.fail(what)


@pytest.mark.parametrize("escapes, most", [(0.0, 995), (0.05, 900)])
def test_damaged_payloads(escapes, most):
    """2,000 payloads whose checksum would be right: an error or other symbols within bounds, never a crash or a hang.

    The end check alone notices nearly all. A flipped bit of an escape is another value of the same cost, which only a
    checksum can notice.
    """
    rng = np.random.default_rng(2)
    tables = gaussian_tables()
    first, second = gaussian_put(rng, 400, 40, escapes), gaussian_put(rng, 100, 64, escapes)
    good = payload_of([first, second], tables)
    other = payload_of([(first[0][::-1].copy(), first[1]), second], tables)
    noticed = 0
    for _, bad in mutations(good, other, 1000, seed=3):
        try:
            decoder = Decoder(bad)
            for values, indexes in (first, second):
                got = decoder.get(indexes, tables)
                assert got.shape == values.shape and np.abs(got).max() <= VALUE_MAX
            decoder.finish()
        except CorruptStream:
            noticed += 1
    assert noticed >= most


def test_random_bytes_are_no_payload():
    rng = np.random.default_rng(5)
    tables, indexes = student_tables(), rng.integers(0, 64, 200)
    for n in range(200):
        decoder = None
        with pytest.raises(CorruptStream):
            decoder = Decoder(rng.bytes(n) + b"\1")
            assert np.abs(decoder.get(indexes, tables)).max() <= VALUE_MAX
            decoder.finish()


def test_reading_other_than_what_was_written_is_noticed():
    tables = gaussian_tables()
    values, indexes = gaussian_put(np.random.default_rng(6), 500, 40)
    payload = payload_of([(values, indexes)], tables)
    wrong = indexes.copy()
    wrong[17] ^= 1
    for asked in (indexes[:-1], np.append(indexes, 3), wrong, indexes[:0]):
        decoder = Decoder(payload)
        decoder.get(asked, tables)
        with pytest.raises(CorruptStream):
            decoder.finish()


def test_nothing_and_empty():
    tables, none = gaussian_tables(), np.array([], int)
    assert Encoder().finish() == b"" == payload_of([(np.array([]), none)], tables)
    decoder = Decoder(b"")
    assert decoder.get(none, tables).shape == (0,)
    decoder.finish()
    with pytest.raises(CorruptStream):
        Decoder(b"").get(np.array([0]), tables)
    with pytest.raises(CorruptStream):
        Decoder(b"\1\0\0\0\0\0\0\0")
    payload = payload_of([(np.zeros(9, int), np.zeros(9, int))], tables)
    assert 0 < len(payload) <= 4  # nine sure zeros cost nothing but the end check


@pytest.mark.parametrize(
    "values, indexes",
    [([1], [64]), ([1], [-1]), ([1, 2], [0]), ([1.0], [0]), ([[1]], [[0]])],
    ids=["row too high", "row negative", "sizes differ", "floats", "two dimensions"],
)
def test_misuse_is_refused(values, indexes):
    with pytest.raises(ValueError):
        Encoder().put(np.array(values), np.array(indexes), gaussian_tables())
