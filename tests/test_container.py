import io
import tracemalloc

import pytest
from damage import cuts, mutations
from google_crc32c import value as crc32c
from hypothesis import given, settings
from hypothesis import strategies as st
from neuralcodec.container import (
    CodecError,
    CorruptStream,
    LimitExceeded,
    Limits,
    Segment,
    Stream,
    cbor,
    dumps,
    loads,
    read_head,
    sniff,
)

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["tile", "alpha", "icc", "x", "other-name"])
streams = st.builds(
    Stream,
    st.text(max_size=12),
    st.text(max_size=12),
    st.binary(min_size=8, max_size=8),
    st.dictionaries(st.text(max_size=3), plain, max_size=4),
    st.lists(st.builds(Segment, names, st.binary(max_size=300), st.booleans()), max_size=6),
)


def example(extra: bytes = b"") -> Stream:
    segments = [Segment("tile", bytes(range(200))), Segment("exif", b"metadata" * 5 + extra, critical=False)]
    return Stream("hyperprior", "test", b"\x01\x80modelx", {"w": 768, "h": 512, "q": 500}, segments)


@given(plain)
def test_cbor_round_trip(value):
    assert cbor.decode(cbor.encode(value)) == value


@given(st.binary(max_size=40))
def test_cbor_is_canonical(data):
    """Whatever the reader accepts, the writer writes in just these bytes."""
    try:
        value = cbor.decode(data)
    except CorruptStream:
        return
    if value == value:  # NaN has many encodings and compares with nothing
        assert cbor.encode(value) == data


@pytest.mark.parametrize(
    "text",
    ["1800", "190001", "a2616201616101", "a2616101616102", "9f00ff", "c000", "f7", "62ff00", "8" + "1" * 21],
)
def test_cbor_refuses(text):
    data = bytes.fromhex(text + "0" * (len(text) % 2))
    with pytest.raises(CorruptStream):
        cbor.decode(data)


@given(streams)
@settings(max_examples=200)
def test_round_trip(stream):
    data = dumps(stream)
    assert sniff(data)
    back = loads(data)
    assert back == stream
    assert dumps(back) == data
    head = read_head(io.BytesIO(data))
    assert head.file_size == len(data)
    for entry, segment in zip(head.entries, stream.segments):
        assert data[entry.offset : entry.offset + entry.length] == segment.data


def test_golden_bytes():
    """The format, pinned: a change of these bytes is a new format version."""
    stream = Stream("c", "p", bytes(range(8)), {"q": 5, "w": 300}, [Segment("tile", b"ab"), Segment("exif", b"c", False)])
    assert dumps(stream).hex() == (
        "894e4c430d0a1a0a01"  # magic, version
        "1b" "8461636170480001020304050607" "a2617105617719012c"  # head length, identity, header
        "0102" "8401"  # one tile of 2 bytes, one ancillary exif of 1
        "2e4f39a9" "6162" "3629a2e2" "63" "c733eb20" "ed"
    )
    assert crc32c(b"123456789") == 0xE3069283


def test_overhead():
    stream = example()
    payload = sum(len(s.data) for s in stream.segments)
    named = len(stream.codec) + len(stream.preset) + len(cbor.encode(stream.header))
    assert len(dumps(stream)) - payload - named <= 32 + 6 * len(stream.segments) + 2


def test_every_cut():
    for what, data in cuts(dumps(example())):
        with pytest.raises(CorruptStream):
            loads(data)
            pytest.fail(what)


def test_every_flip():
    """Each single flipped bit gives a typed error, or drops the ancillary segment that it hit, and nothing else."""
    stream = example()
    data = dumps(stream)
    dropped = 0
    for bit in range(8 * len(data)):
        copy = bytearray(data)
        copy[bit // 8] ^= 1 << bit % 8
        try:
            got = loads(bytes(copy))
        except CodecError:
            continue
        assert got.warnings and got.segments == stream.segments[:1] and got.header == stream.header
        dropped += 1
    assert dropped == 8 * (len(stream.segments[1].data) + 4)


def test_mutations():
    stream = example()
    data, other = dumps(stream), dumps(example(b"other"))
    for what, bad in mutations(data, other, 20_000):
        if bad == other:
            continue
        try:
            got = loads(bad)
        except CodecError:
            continue
        assert got.warnings and got.segments == stream.segments[:1], what


def test_lengths_allocate_nothing():
    """A head that promises gigabytes costs no memory."""
    data = bytearray(dumps(example()))
    tracemalloc.start()
    for at in range(9, 40):
        copy = bytearray(data)
        copy[at : at + 9] = b"\xff" * 8 + b"\x7f"
        with pytest.raises(CodecError):
            loads(bytes(copy))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_text_mode_damage_is_named():
    data = dumps(example()).replace(b"\r\n", b"\n")
    with pytest.raises(CorruptStream, match="binary mode"):
        loads(data)


def test_limits():
    limits = Limits(max_side=100, max_pixels=5000)
    limits.check_picture(100, 50)
    for size in ((101, 1), (100, 51)):
        with pytest.raises(LimitExceeded):
            limits.check_picture(*size)
    with pytest.raises(LimitExceeded):
        loads(dumps(example()), Limits(max_header_bytes=10))
    many = Stream("c", "p", bytes(8), {}, [Segment("tile", b"")] * 9)
    with pytest.raises(LimitExceeded):
        loads(dumps(many), Limits(max_segments=8))
