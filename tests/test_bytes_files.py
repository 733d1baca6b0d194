"""Files of any bytes: they come back, or an error of ours says why not; the command line, pipes, blocks, ranges."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from damage import cuts, mutations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from neuralcodec.codecs import bytefile, registry
from neuralcodec.codecs.bytefile import decode_bytes, encode_bytes
from neuralcodec.container import CodecError, CorruptStream, ModelMismatch, Segment, Stream, dumps, loads, read_head
from neuralcodec.container.errors import LimitExceeded, ModelMissing
from neuralcodec.entropy.bytes import blocks, framing
from test_bytes_binary import TEXT, bitmap, records
from test_cli import codec_run, photo, photo_bytes  # noqa: F401  (fixtures)

GOLDEN = Path(__file__).parent / "golden"
PROSE = (
    b"It was a bright cold day in the valley, and the clocks of the village had not yet struck the hour when the old\n"
    b"miller came down the road with his dog behind him. \"Who has been here?\" he said to the dog, which had nothing\n"
    b"to say to that.\n"
)


@pytest.fixture(scope="module")
def cm():
    return registry.load("nacrith", "cm")


@pytest.fixture(scope="module")
def small():
    return registry.load("nacrith", "test")


def tar_of(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


# --- every byte comes back --------------------------------------------------------------------------------------------

CASES = {
    "empty": b"", "one byte": b"\0", "all values": bytes(range(256)), "zeros": bytes(100_000),
    "invalid UTF-8": b"caf\xc3 \xff\xfe\xed\xa0\x80 text " * 9, "UTF-16": PROSE.decode().encode("utf-16"),
    "special tokens": b"<|endoftext|><s></s>[INST] <|im_start|>user\n" * 5,
    "lost by tokenizers": bytes((4, 6, 19, 20, 22, 29)) * 40,
    "mixed line ends": b"a\r\nb\nc\rd\n\r\n\r" * 30, "long line": b"abc, " * 40_000,
    "tar": tar_of(a=TEXT, b=records(60), c=bitmap()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("effort", [1, 6])
def test_awkward_files(small, name, effort):
    data = CASES[name] if effort == 1 else CASES[name][:20_000]  # the rest is more of the same
    file = encode_bytes(small, data, effort)
    assert decode_bytes(file) == data
    assert len(file) <= len(data) + 32


def test_nothing_grows_by_more_than_32_bytes(cm):
    for size in (0, 1, 2, 3, 50, 1000, 1_000_000):
        noise = random.Random(size).randbytes(size)
        file = encode_bytes(cm, noise, 1)
        assert len(file) <= size + 32 and decode_bytes(file) == noise
        assert not size or loads(file).codec == "raw"


pieces = st.one_of(
    st.binary(max_size=60), st.text(max_size=40).map(lambda s: s.encode("utf-8", "surrogatepass")),
    st.sampled_from([TEXT, PROSE, records(5), bitmap(32, 9), b"<|endoftext|>", b"\r\n", b"\n", b"\r", bytes(256),
                     bytes(range(256)),
                     b"\x04\x06\x13\x14\x16\x1d", b"\xff\xfe\0", b"MZ\x90\0\xe8\1\0\0\0", b"    ", b"\t{\"a\": [1, 2]}"]),
)  # fmt: skip
contents = st.lists(st.tuples(pieces, st.integers(1, 5)).map(lambda p: p[0] * p[1]), max_size=7).map(b"".join)


def check(codec, data: bytes, effort: int) -> None:
    file = encode_bytes(codec, data, effort)
    assert decode_bytes(file) == data
    assert len(file) <= len(data) + 32


@given(contents, st.integers(1, 9))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_bytes(small, data, effort):
    check(small, data, effort)


@pytest.mark.slow
@pytest.mark.timeout(0)
@given(contents, st.integers(1, 9))
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_any_bytes_at_length(small, data, effort):
    check(small, data, effort)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_blocks(monkeypatch):
    monkeypatch.setattr(framing, "BLOCK", 3000)


def test_blocks_in_parallel_and_in_ranges(cm, short_blocks, tmp_path):
    """Several blocks: any number of threads gives the same file, and a range decodes only what it needs."""
    data = TEXT * 30 + random.Random(1).randbytes(4000) + records(400)
    files = {jobs: encode_bytes(cm, data, 2, jobs) for jobs in (1, 3)}
    assert files[1] == files[3]
    assert decode_bytes(files[1], jobs=3) == data
    path = tmp_path / "x.nlc"
    path.write_bytes(files[1])
    with path.open("rb") as file:
        head = read_head(file)
        assert len(head.entries) == -(-len(data) // 3000)
        assert bytefile.lengths(head, file) == [3000] * (len(data) // 3000) + [len(data) % 3000]
        decoded = []
        codec = registry.load("nacrith", "cm")

        class Spy(type(codec)):
            def decode_block(self, block: bytes) -> bytes:
                decoded.append(block)
                return super().decode_block(block)

        spy = Spy(codec.config, "cm")
        for start, size in ((0, 10), (2990, 20), (len(data) - 5, 100), (len(data), 3), (5000, 0)):
            assert bytefile.read_range(spy, head, file, start, size) == data[start : start + size]
    assert len(decoded) == 1 + 2 + 1


def test_what_is_recorded_is_checked(cm, small):
    """The checksum of the original holds also where all outer checksums are right."""
    block = cm.encode_block(TEXT * 3, 3)[0]
    what = framing.describe(block)
    assert (what.method, what.length) == (framing.MIXED, 3 * len(TEXT))
    noticed = 0
    for what_happened, bad in mutations(block, block[::-1], 60, seed=5):
        try:
            assert blocks.decode(bad) == TEXT * 3, what_happened
        except CodecError:
            noticed += 1
    assert noticed >= 59
    with pytest.raises(ModelMissing):
        blocks.decode(framing.frame(framing.TEXT, b"abc", b"xyz"))
    with pytest.raises(LimitExceeded):
        blocks.decode(bytes([framing.MIXED]) + b"\xff\xff\xff\x7f" + bytes(40))


def test_damaged_files(cm, small):
    """Every cut and many mutations of small files, with and without the language model: a typed error, never other bytes."""
    for codec, data in ((small, PROSE), (cm, TEXT), (cm, random.Random(7).randbytes(300))):
        file, other = encode_bytes(codec, data, 6), encode_bytes(cm, records(20), 1)
        for what, bad in [*cuts(file), *mutations(file, other, 150, seed=3)]:
            if bad == other:
                continue
            with pytest.raises(CodecError) as caught:
                decode_bytes(bad)
                pytest.fail(what)
            assert caught.value.exit_code in (3, 4, 5) and "\n" not in str(caught.value), what


def test_forged_files(cm):
    """Right checksums around wrong content."""
    block = cm.encode_block(TEXT, 3)[0]

    def forged(*segments: Segment, codec: str = "nacrith", preset: str = "cm", model_id: bytes = b"") -> bytes:
        return dumps(Stream(codec, preset, model_id, {}, list(segments)))

    assert decode_bytes(forged(Segment("data", block), Segment("data", block))) == TEXT * 2
    for bad in (
        forged(Segment("tile", block)), forged(Segment("data", b"")), forged(Segment("data", b"\x09" + block[1:])),
        forged(Segment("data", block[:7])), forged(Segment("data", block[:5] + b"\0\0\0\0" + block[9:])),
        forged(Segment("data", block[:1] + b"\xff\xff\xff\xff\x7f" + block[3:])),
    ):  # fmt: skip
        with pytest.raises(CodecError):
            decode_bytes(bad)
    with pytest.raises(ModelMismatch):
        decode_bytes(forged(Segment("data", block), preset="light", model_id=bytes(8)))
    with pytest.raises(ModelMissing):
        decode_bytes(forged(Segment("data", block), preset="no-such"))
    where = framing.describe(block).start
    for value in range(256):  # every effort and kind
        if value != block[where]:
            with pytest.raises(CorruptStream):
                blocks.decode(block[:where] + bytes([value]) + block[where + 1 :])


# --- the command line -------------------------------------------------------------------------------------------------


def test_files_there_and_back(codec_run, tmp_path):  # noqa: F811
    Path("notes.txt").write_bytes(PROSE)
    Path("no suffix").write_bytes(TEXT)
    result = codec_run("encode", "-m", "nacrith:test", "notes.txt", "no suffix", "-e", "6", "--verify", "--json")
    assert result.code == 0, result.err
    assert [row["output"] for row in result.rows] == ["notes.txt.nlc", "no suffix.nlc"]
    for row in result.rows:
        assert row["bytes"] == Path(row["output"]).stat().st_size and row["verified"]
        assert row["bits_per_byte"] == pytest.approx(8 * row["bytes"] / row["length"])
    Path("notes.txt").unlink()
    result = codec_run("decode", "notes.txt.nlc")
    assert result.code == 0 and Path("notes.txt").read_bytes() == PROSE
    assert codec_run("decode", "no suffix.nlc", "-c").out == TEXT
    assert codec_run("decode", "no suffix.nlc", "-c", "--range", "20,30").out == TEXT[20:50]
    result = codec_run("test", "notes.txt.nlc", "--json")
    assert result.rows == [{"input": "notes.txt.nlc", "ok": True, "length": len(PROSE)}]
    row = codec_run("info", "notes.txt.nlc", "--json").rows[0]
    assert (row["length"], row["blocks"], sum(row["methods"].values())) == (len(PROSE), 1, len(PROSE))
    assert f"{len(PROSE):,} bytes of original, 1 block" in codec_run("info", "notes.txt.nlc").out.decode()
    result = codec_run("encode", "notes.txt.nlc", "-o", "twice")
    assert (result.code, result.err) == (1, "codec: notes.txt.nlc: is an .nlc file already\n")


def test_pipes_and_levels(codec_run):  # noqa: F811
    sizes = []
    for effort in ("-e1", "-e5"):
        made = codec_run("encode", "-m", "nacrith:cm", "-", "-c", effort, stdin=TEXT * 9)
        assert made.code == 0
        sizes.append(len(made.out))
        assert codec_run("decode", "-", "-c", stdin=made.out).out == TEXT * 9
    assert sizes[1] < sizes[0] < 2 * len(TEXT)
    assert codec_run("info", "-", stdin=made.out).code == 0
    cut = codec_run("decode", "-", "-o", "x", stdin=made.out[:-3])
    assert cut.code == 3 and not Path("x").exists()


def test_without_weights(codec_run, monkeypatch, tmp_path):  # noqa: F811
    """Nothing is missing: context mixing needs no weights, and the fast efforts do not load any."""
    Path("a.txt").write_bytes(PROSE)
    assert codec_run("encode", "a.txt", "-e", "1", "--json").rows[0]["model"] in ("nacrith:cm", "raw")
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path / "nothing")
    monkeypatch.setattr(registry, "_loaded", {})
    result = codec_run("encode", "a.txt", "-f", "--json")
    assert (result.code, result.rows[0]["model"]) == (0, "nacrith:cm")
    assert codec_run("decode", "a.txt.nlc", "-c").out == PROSE
    Path("b.nlc").write_bytes(dumps(Stream("nacrith", "light", bytes(8), {}, [Segment("data", b"\2\3abcdx")])))
    assert codec_run("decode", "b.nlc", "-c").code == 4
    assert codec_run("encode", "-f", "a.txt", "-m", "nacrith:light").code == 4


def test_pictures_stay_pictures(codec_run, photo, photo_bytes):  # noqa: F811
    """By name, by content, and only by request as bytes."""
    Path("really").write_bytes(photo_bytes)
    for name in ("photo.png", "really"):
        assert codec_run("encode", "-m", "hyperprior:test", name, "-o", "p.nlc", "-f").code == 0
        assert loads(Path("p.nlc").read_bytes()).codec == "hyperprior"
    assert codec_run("encode", "-m", "nacrith:cm", "photo.png").code == 0
    photo.unlink()
    assert codec_run("decode", "photo.png.nlc").code == 0
    assert photo.read_bytes() == photo_bytes
    Path("broken.png").write_bytes(b"no picture")
    assert codec_run("encode", "broken.png").code == 1


def test_calls_that_make_no_sense(codec_run):  # noqa: F811
    Path("a.txt").write_bytes(TEXT)
    assert codec_run("encode", "-m", "nacrith:cm", "a.txt").code == 0
    for args, text in (
        (("encode", "-m", "nacrith:cm", "a.txt", "--bpp", "1", "-f"), "--bpp is for pictures and fields; other files are"),
        (("decode", "a.txt.nlc", "--roi", "0,0,1,1", "-f"), "--roi is for pictures; this file holds bytes"),
        (("decode", "a.txt.nlc", "--range", "5"), "'5' is not START,SIZE in bytes"),
        (("decode", "-", "--range", "1,2", "-c"), "--range needs a file that can seek, not a pipe"),
    ):  # fmt: skip
        result = codec_run(*args, stdin=Path("a.txt.nlc").read_bytes())
        assert result.code == 2 and text in result.err, args
    assert codec_run("decode", "a.txt.nlc", "-f", "--max-bytes", "100").code == 5
    assert codec_run("decode", "missing.txt.nlc").code == 1


def test_folders(codec_run, tmp_path):  # noqa: F811
    Path("in/sub").mkdir(parents=True)
    Path("in/a.txt").write_bytes(TEXT)
    Path("in/sub/b").write_bytes(PROSE)
    assert codec_run("encode", "-r", "in", "-O", "out", "-m", "nacrith:cm", "-e1").code == 0
    assert codec_run("decode", "-r", "out", "-O", "back").code == 0
    assert (Path("back/a.txt").read_bytes(), Path("back/sub/b").read_bytes()) == (TEXT, PROSE)


def test_no_heavy_imports():
    """Looking at a file of bytes needs neither torch nor numba; coding one needs no torch."""
    script = """
import os, subprocess, sys, tempfile
from pathlib import Path
from neuralcodec import cli
os.chdir(tempfile.mkdtemp())
Path("a").write_bytes(b"some text, some text. " * 30)
assert cli.main(["encode", "-m", "nacrith:cm", "a", "--quiet"]) == 0
assert "torch" not in sys.modules
look = "import sys; from neuralcodec import cli; cli.main(['info', 'a.nlc']); print({'torch', 'numba'} & set(sys.modules))"
print(subprocess.run([sys.executable, "-c", look], capture_output=True, text=True).stdout)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "set()" in run.stdout and "660 bytes of original" in run.stdout


def test_golden_files():
    """Files of earlier versions decode for ever. ``golden/make_bytes.py`` made them, once."""
    index = json.loads((GOLDEN / "bytes.json").read_text())
    assert len(index) >= 5
    for name, sha in index.items():
        assert hashlib.sha256(decode_bytes((GOLDEN / name).read_bytes())).hexdigest() == sha, name


# --- bench and eval ---------------------------------------------------------------------------------------------------


def test_bench(codec_run):  # noqa: F811
    Path("a.txt").write_bytes(TEXT * 4)
    result = codec_run("bench", "bytes", "a.txt", "-m", "nacrith:cm", "-e", "2", "--ablate", "--json")
    assert result.code == 0, result.err
    row = json.loads(result.out)["files"]["a.txt"]
    assert row["length"] == 4 * len(TEXT) and row["coders"]["ours"]["bytes"] < row["coders"]["xz 9e"]["bytes"]
    assert row["parts"]["everything"] < row["parts"]["without orders 4 and up"]
    text = codec_run("bench", "bytes", "a.txt", "-m", "nacrith:cm", "-e", "2").out.decode()
    assert f"{row['coders']['ours']['bytes']:,}" in text and "xz / ours" in text
    assert codec_run("bench", "bytes").code == 2


def test_eval(tmp_path, codec_run):  # noqa: F811
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.bin").write_bytes(records(100))
    args = ("eval", "set", "--kind", "bytes", "--codec", "nacrith:cm", "--peers", "zlib", "--out", "o", "--quiet")
    result = codec_run(*args)
    assert result.code == 0, result.err
    points = json.loads(Path("o/nacrith-cm.json").read_text())["points"]
    assert [p["setting"] for p in points] == [1, 5, 9]
    assert points[0]["bits_per_byte"] == points[0]["bytes"] * 8 / len(records(100))
    assert os.path.exists("o/zlib.json") and np.argmin([p["bytes"] for p in points]) > 0
