"""The command line: what it writes, what it says, and how it fails. Most runs stay in this process, for speed."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import scene
from neuralcodec import __version__, cli
from neuralcodec.codecs import image as pipeline
from neuralcodec.codecs import registry
from neuralcodec.container import CorruptStream, Segment, dumps, loads
from neuralcodec.media import files
from neuralcodec.media import image as media
from PIL import Image

MODEL = ("-m", "hyperprior:test")
ROOT = Path(cli.__file__).parent


class Result:
    def __init__(self, code: int, out: bytes, err: str):
        self.code, self.out, self.err = code, out, err

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()

    @property
    def rows(self) -> list[dict]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def codec_run(capfdbinary, monkeypatch, tmp_path):
    """Runs ``codec`` in this process and in a fresh folder; ``stdin`` is what a pipe would bring."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NLC_DEBUG", raising=False)

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = cli.main([str(a) for a in args])
        except SystemExit as left:  # argparse
            code = left.code
        out, err = capfdbinary.readouterr()
        return Result(code, out, err.decode())

    return run


@pytest.fixture(scope="session")
def photo_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(scene(100, 150)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photo(tmp_path, photo_bytes) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(photo_bytes)
    return path


@pytest.fixture(scope="session")
def stream_bytes(codec, photo_bytes) -> bytes:
    return dumps(pipeline.encode_picture(codec, media.read_picture(photo_bytes), 500))


@pytest.fixture
def stream(tmp_path, stream_bytes) -> Path:
    path = tmp_path / "photo.nlc"
    path.write_bytes(stream_bytes)
    return path


def pixels_of(source: Path | bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# --- the way there and back -------------------------------------------------------------------------------------------


def test_encode_derives_the_name_and_keeps_the_input(codec_run, photo, stream_bytes, photo_bytes):
    result = codec_run("encode", *MODEL, "photo.png")
    assert (result.code, result.out) == (0, b"")
    assert Path("photo.nlc").read_bytes() == stream_bytes
    assert photo.read_bytes() == photo_bytes
    size, bpp = len(stream_bytes), len(stream_bytes) * 8 / 15000
    line = rf"photo\.png -> photo\.nlc: 150x100, {size:,} bytes, {bpp:.3f} bpp, quality 50, \d+\.\d\d s"
    assert re.fullmatch(line, result.err.rstrip("\n"))
    Path("ordinary").touch()
    assert Path("photo.nlc").stat().st_mode == Path("ordinary").stat().st_mode  # not private like a temporary file


def test_decode_derives_the_name(codec_run, stream, codec, stream_bytes):
    result = codec_run("decode", "photo.nlc")
    assert (result.code, result.out) == (0, b"")
    assert re.fullmatch(r"photo\.nlc -> photo\.png: 150x100, \d+\.\d\d s\n", result.err)
    assert np.array_equal(pixels_of(Path("photo.png")), pipeline.decode_picture(codec, loads(stream_bytes)).pixels)


def test_quiet_says_nothing(codec_run, photo):
    result = codec_run("encode", *MODEL, "--quiet", "photo.png")
    assert (result.code, result.out, result.err) == (0, b"", "")


def test_pipes_carry_the_same_bytes_as_files(codec_run, photo_bytes, stream_bytes):
    encoded = codec_run("encode", *MODEL, "-", "-c", "--quiet", stdin=photo_bytes)
    assert (encoded.code, encoded.out, encoded.err) == (0, stream_bytes, "")
    assert codec_run("encode", *MODEL, "-", "-o", "-", "--quiet", stdin=photo_bytes).out == stream_bytes
    decoded = codec_run("decode", "-", "-c", stdin=stream_bytes)
    assert decoded.code == 0
    assert decoded.out[:8] == b"\x89PNG\r\n\x1a\n"
    tiff = codec_run("decode", "-", "-c", "--format", "tiff", stdin=stream_bytes)  # a format that seeks while writing
    assert tiff.code == 0
    assert np.array_equal(pixels_of(decoded.out), pixels_of(tiff.out))


def test_a_pipe_needs_a_target(codec_run, photo_bytes):
    result = codec_run("encode", *MODEL, "-", stdin=photo_bytes)
    assert result.code == 2
    assert result.err == "codec: stdin: reading from a pipe: say with -o FILE or -c where the result goes\n"


@pytest.mark.parametrize("verb, name", [("encode", "photo.png"), ("decode", "photo.nlc")])
def test_never_binary_to_a_terminal(codec_run, photo, stream, monkeypatch, verb, name):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: self is sys.stdout, raising=False)
    result = codec_run(verb, name, "-c")
    assert (result.code, result.out) == (2, b"")
    text = "binary data is not written to a terminal; redirect it or use -o FILE"
    assert result.err == f"codec: {name}: {text}\n"


@pytest.mark.parametrize("call", [["encode", *MODEL, "photo.png"], ["decode", "photo.nlc"]])
def test_existing_results_need_force(codec_run, photo, stream, call):
    Path("x.png").write_text("precious")
    refused = codec_run(*call, "-o", "x.png")
    assert refused.code == 1
    assert refused.err == f"codec: {call[-1]}: x.png: exists already; use -f to overwrite it\n"
    assert Path("x.png").read_text() == "precious"
    assert codec_run(*call, "-o", "x.png", "-f").code == 0
    assert Path("x.png").read_bytes() != b"precious"


def test_input_is_never_the_output(codec_run, stream, stream_bytes):
    stream.rename("photo.png")
    result = codec_run("decode", "-f", "photo.png")
    assert (result.code, result.err) == (2, "codec: photo.png: input and output are the same file\n")
    assert Path("photo.png").read_bytes() == stream_bytes


def test_trees_keep_their_shape(codec_run, tmp_path, photo_bytes):
    for name in ("tree/a.png", "tree/deep/er/b.PNG", "tree/readme.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(photo_bytes)
    assert codec_run("encode", *MODEL, "-r", "tree", "-O", "small").code == 0
    assert listing(tmp_path / "small") == {"a.nlc", "deep/er/b.nlc"}
    assert codec_run("decode", "-r", "small", "-O", "back", "--format", "webp").code == 0
    assert listing(tmp_path / "back") == {"a.webp", "deep/er/b.webp"}
    assert codec_run("encode", *MODEL, "-r", "tree").code == 0  # beside the inputs
    assert Path("tree/deep/er/b.nlc").exists()


def test_folders(codec_run, photo, tmp_path):
    Path("empty").mkdir()
    result = codec_run("encode", "-r", "empty")
    assert result.code == 2
    assert result.lines == ["codec: empty: no pictures or fields in this folder", "codec: no input files"]
    result = codec_run("encode", "empty")
    assert (result.code, result.err) == (1, "codec: empty: is a directory; use -r to take the files in it\n")
    result = codec_run("encode", "photo.png", "-o", "empty")
    assert (result.code, result.err) == (2, "codec: photo.png: empty: is a directory; use -O for a folder\n")
    result = codec_run("encode", "photo.png", "-o", "nowhere/x.nlc")
    assert (result.code, result.err) == (1, "codec: photo.png: nowhere: no such folder, and only -O makes one\n")
    assert listing(tmp_path) == {"photo.png"}


def test_file_lists(codec_run, photo, photo_bytes):
    Path("b c.png").write_bytes(photo_bytes)
    Path("list").write_text("photo.png\r\n\nb c.png\n")
    assert codec_run("encode", *MODEL, "--filelist", "list", "-O", "out").code == 0
    assert listing(Path("out")) == {"photo.nlc", "b c.nlc"}
    assert codec_run("encode", *MODEL, "--filelist", "-", "-O", "out2", stdin=b"b c.png\n").code == 0
    assert listing(Path("out2")) == {"b c.nlc"}
    missing = codec_run("encode", "--filelist", "nolist")
    assert (missing.code, missing.err) == (1, "codec: nolist: no such file or directory\n")


def test_strange_names(codec_run, photo_bytes, tmp_path):
    names = ["-rf.png", "\u00fc \x1b[31mred.png", "two\nlines.png", ".png", "no-suffix"]
    for name in names:
        Path(name).write_bytes(photo_bytes)
    result = codec_run("encode", *MODEL, "-O", "out", "--", *names)
    assert result.code == 0
    assert len(listing(tmp_path / "out")) == len(result.lines) == len(names)
    assert "\x1b" not in result.err
    assert codec_run("info", *(tmp_path / "out").iterdir()).out.count(b"\x1b") == 0


@pytest.mark.parametrize("pair", [("photo.png", "photo.jpg"), ("photo.png", "photo.png"), ("photo.png", "./photo.png")])
def test_two_inputs_never_share_a_result(codec_run, photo, photo_bytes, tmp_path, pair):
    Path("photo.jpg").write_bytes(photo_bytes)
    result = codec_run("encode", *MODEL, "-f", *pair)
    assert result.code == 2
    assert result.err.startswith(f"codec: {pair[0]} and {pair[1]} would both be written to ")
    assert listing(tmp_path) == {"photo.png", "photo.jpg"}


def test_removal_of_inputs(codec_run, photo, tmp_path):
    assert codec_run("encode", *MODEL, "--rm", "photo.png").code == 0
    assert listing(tmp_path) == {"photo.nlc"}
    assert codec_run("decode", "--rm", "photo.nlc").code == 0
    assert listing(tmp_path) == {"photo.png"}
    Path("photo.nlc").write_text("in the way")
    assert codec_run("encode", *MODEL, "--rm", "photo.png").code == 1
    assert photo.exists()


@pytest.mark.parametrize(
    "args, text",
    [
        (["encode", "photo.png", "-c", "--rm"], "--rm needs a file as result"),
        (["encode", "photo.png", "-c", "--json"], "-c and --json would both write to stdout"),
        (["decode", "photo.nlc", "--rm", "--roi", "0,0,8,8"], "--rm with --roi would lose the rest of the picture"),
        (["encode", "photo.png", "photo.nlc", "-o", "x"], "-o names one result, but there are several inputs"),
        (["encode", "photo.png", "photo.nlc", "-c"], "-c writes one result, but there are several inputs"),
        (["encode"], "no input files"),
        (["encode", *MODEL, "photo.png", "-f", "--tile", "100"], "--tile must be a multiple of 64, not 100"),
        (["decode", "photo.nlc", "-f", "--roi", "140,0,20,20"], "--roi 140,0,20,20 does not lie in the picture of "),
    ],
)
def test_calls_that_make_no_sense(codec_run, photo, stream, args, text, tmp_path):
    result = codec_run(*args)
    assert result.code == 2
    assert text in result.err
    assert len(result.lines) == 1
    assert listing(tmp_path) == {"photo.png", "photo.nlc"}


@pytest.mark.parametrize(
    "args",
    ["-q 101", "-q -1", "-q nan", "-q x", "--bpp 0", "--size 0", "--size 5x", "--size k", "--psnr inf", "-q 5 --bpp 1",
     "-m a --fast", "--fast --best", "-e 0", "-e 10", "--jobs -1", "--threads 0", "--tile 0", "--device tpu", "-o a -c",
     "--rm --keep", "--nonsense", "--max-pixels 0"],
)  # fmt: skip
def test_bad_options(codec_run, args):
    result = codec_run("encode", "photo.png", *args.split())
    assert result.code == 2
    assert re.fullmatch(r"codec: .+; see `codec( encode)? --help`\n", result.err)


@pytest.mark.parametrize("text, size", [("20000", 20000), ("20k", 20000), ("1.5M", 1_500_000), ("2G", 2_000_000_000)])
def test_sizes(text, size):
    assert cli.size_of(text) == size


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4,5", "a,b,c,d", ""])
def test_bad_regions(codec_run, stream, text):
    result = codec_run("decode", "photo.nlc", "--roi", text)
    assert result.code == 2
    text = f"argument --roi: {text!r} is not x,y,width,height in pixels; see `codec decode --help`\n"
    assert result.err == f"codec: {text}"


def test_no_command(codec_run):
    assert codec_run().code == 2
    assert codec_run("nonsense").code == 2


# --- rate and quality -------------------------------------------------------------------------------------------------


def test_quality_orders_the_sizes(codec_run, photo):
    sizes = [codec_run("encode", *MODEL, "-f", "--json", "-q", q, "photo.png").rows[0]["bytes"] for q in (0, 50, 100)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_targets(codec_run, photo, codec):
    picture = media.read_picture(photo)
    ends = [pipeline.encode_picture(codec, picture, level) for level in (0, 1000)]
    middle = sum(len(dumps(s)) for s in ends) // 2
    psnr = np.mean([pipeline.psnr_of(picture.pixels, pipeline.decode_picture(codec, s).pixels) for s in ends])
    row = codec_run("encode", *MODEL, "-f", "--json", "--size", middle, "photo.png").rows[0]
    assert 0.95 * middle < row["bytes"] <= middle
    assert row["bytes"] == Path("photo.nlc").stat().st_size
    row = codec_run("encode", *MODEL, "-f", "--json", "--bpp", middle * 8 / 15000, "photo.png").rows[0]
    assert row["bpp"] == pytest.approx(middle * 8 / 15000, rel=0.03)
    row = codec_run("encode", *MODEL, "-f", "--json", "--verify", "--psnr", psnr, "photo.png").rows[0]
    assert row["psnr"] == pytest.approx(psnr, abs=0.1)
    assert codec_run("info", "--json", "photo.nlc").rows[0]["quality"] == row["quality"]


def test_targets_out_of_reach_are_named(codec_run, photo):
    result = codec_run("encode", *MODEL, "--quiet", "--size", 40, "photo.png")
    assert result.code == 0
    size = Path("photo.nlc").stat().st_size
    assert result.err == f"codec: photo.png: 40 bytes is out of reach; the closest is {size} bytes\n"
    assert codec_run("encode", *MODEL, "-f", "--quiet", "--size", "1G", "photo.png").err == ""  # fits, so all is well


def test_effort_chooses_a_model(monkeypatch):
    monkeypatch.setattr(registry, "_defaults", {"image": "middle", "image-fast": "quick", "image-best": "small"})
    parser = cli.build_parser()
    wanted = {"": "middle", "-m x:y": "x:y", "--fast": "quick", "--best": "small", "-e 1": "quick", "-e 3": "quick",
              "-e 4": "middle", "-e 6": "middle", "-e 7": "small", "-e 9": "small"}  # fmt: skip
    found = {text: cli.chosen_model(parser.parse_args(["encode", "a", *text.split()])) for text in wanted}
    assert found == wanted


def test_verify_reports_quality(codec_run, photo):
    result = codec_run("encode", *MODEL, "--verify", "photo.png")
    assert result.code == 0
    assert re.search(r", quality 50, \d\d\.\d\d dB, verified, ", result.err)


def test_verify_refuses_to_publish_what_decodes_to_something_else(codec_run, photo, monkeypatch, tmp_path):
    honest = pipeline.decode_picture

    def lying(*args, trace=None, **options):
        picture = honest(*args, trace=trace, **options)
        trace[0, 0] = "other symbols"
        return picture

    monkeypatch.setattr(pipeline, "decode_picture", lying)
    result = codec_run("encode", *MODEL, "--verify", "photo.png")
    assert result.code == 3
    text = "verification failed: the decoder finds other symbols than the encoder"
    assert result.err == f"codec: photo.png: {text}\n"
    assert listing(tmp_path) == {"photo.png"}


# --- what a picture has besides pixels --------------------------------------------------------------------------------


def test_region(codec_run, stream):
    assert codec_run("decode", "photo.nlc").code == 0
    assert codec_run("decode", "photo.nlc", "--roi", "30,20,50,40", "-o", "part.png").code == 0
    part, whole = pixels_of(Path("part.png")).astype(int), pixels_of(Path("photo.png"))[20:60, 30:80]
    assert part.shape == whole.shape
    assert np.abs(part - whole).max() <= 1  # float synthesis of another window may round differently


def test_metadata_is_kept_or_stripped(codec_run, photo):
    exif = Image.Exif()
    exif[0x010E] = "a description"
    Image.open(photo).save("tagged.png", exif=exif)
    assert codec_run("encode", *MODEL, "tagged.png").code == 0
    names = [s["name"] for s in codec_run("info", "--json", "tagged.nlc").rows[0]["segments"]]
    assert "exif" in names
    assert codec_run("decode", "tagged.nlc", "-o", "back.png").code == 0
    assert Image.open("back.png").getexif()[0x010E] == "a description"
    assert codec_run("encode", *MODEL, "-f", "--strip", "tagged.png").code == 0
    assert [s["name"] for s in codec_run("info", "--json", "tagged.nlc").rows[0]["segments"]] == ["tile"]


def test_lost_metadata_is_named(codec_run, photo):
    Image.open(photo).save("tagged.webp", lossless=True, xmp=b"<x:xmpmeta/>")
    assert codec_run("encode", *MODEL, "tagged.webp").code == 0
    result = codec_run("decode", "--quiet", "tagged.nlc", "-o", "x.bmp")
    assert (result.code, result.err) == (0, "codec: tagged.nlc: BMP cannot hold the XMP data: left out\n")


def test_alpha(codec_run, photo, tmp_path):
    alpha = (np.indices((100, 150)).sum(0) % 256).astype(np.uint8)
    Image.fromarray(np.dstack([scene(100, 150), alpha])).save("alpha.png")
    assert codec_run("encode", *MODEL, "alpha.png").code == 0
    refused = codec_run("decode", "alpha.nlc", "-o", "alpha.jpg")
    assert refused.code == 1
    text = "JPEG cannot hold the alpha channel; write PNG, WebP, TIFF or AVIF instead"
    assert refused.err == f"codec: alpha.nlc: {text}\n"
    assert not Path("alpha.jpg").exists()
    assert codec_run("decode", "alpha.nlc", "-o", "back.png").code == 0
    assert np.array_equal(pixels_of(Path("back.png"))[..., 3], alpha)
    assert b"RGB with alpha" in codec_run("info", "alpha.nlc").out


def test_formats(codec_run, photo, tmp_path):
    Image.open(photo).save("shot.jpg")
    assert codec_run("encode", *MODEL, "shot.jpg").code == 0
    assert codec_run("decode", "shot.nlc", "-O", "same", "--format", "original").code == 0
    assert Image.open("same/shot.jpg").format == "JPEG"
    for name, form in (("x.webp", "WEBP"), ("x.tif", "TIFF"), ("x.bmp", "BMP"), ("x.ppm", "PPM"), ("x.png", "PNG")):
        assert codec_run("decode", "shot.nlc", "-o", name).code == 0
        assert Image.open(name).format == form
    assert codec_run("decode", "shot.nlc", "-o", "odd.name", "--format", "webp").code == 0
    assert Image.open("odd.name").format == "WEBP"
    refused = codec_run("decode", "shot.nlc", "-o", "x.gif")
    assert refused.code == 1
    assert refused.err.startswith("codec: shot.nlc: x.gif: unknown suffix '.gif'; known are .png ")


def test_formats_on_offer_are_those_that_can_be_written():
    assert cli.PICTURES == set(media.SUFFIXES)


# --- machine output ---------------------------------------------------------------------------------------------------


def test_json(codec_run, photo, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"bad")
    result = codec_run("encode", *MODEL, "--json", "photo.png", "bad.png", "--verify")
    good, bad = result.rows
    assert result.code == 1
    assert (good["input"], good["output"], good["width"], good["height"]) == ("photo.png", "photo.nlc", 150, 100)
    assert good["bytes"] == Path("photo.nlc").stat().st_size
    assert good["bpp"] == pytest.approx(good["bytes"] * 8 / 15000)
    assert (good["model"], good["quality"]) == ("hyperprior:test", 50)
    assert good["psnr"] > 15
    assert bad == {"input": "bad.png", "error": "UnsupportedInput", "exit_code": 1}
    assert len(result.lines) == 1  # the error, nothing else
    row = codec_run("decode", "--json", "photo.nlc", "-o", "back.png").rows[0]
    assert (row["output"], row["width"]) == ("back.png", 150)
    row = codec_run("test", "--json", "photo.nlc").rows[0]
    assert row == {"input": "photo.nlc", "ok": True, "width": 150, "height": 100}


# --- bad input --------------------------------------------------------------------------------------------------------

BAD_PICTURES = {
    "empty.png": (lambda png: b"", 1, "the file is empty"),
    "text.png": (lambda png: b"hello, this is text", 1, "not a picture that "),
    "cut.png": (lambda png: png[: len(png) // 2], 1, "the picture is damaged or cut short"),
    "head.png": (lambda png: png[:20], 1, ""),
    "huge.ppm": (lambda png: b"P6 60000 60000 255 ", 5, "60000x60000 is beyond the limit of 268435456 "),
    "wide.ppm": (lambda png: b"P6 70000 1 255 ", 5, "70000x1 is beyond the limit of 65535 per side"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures(codec_run, photo_bytes, name, tmp_path):
    make, code, text = BAD_PICTURES[name]
    Path(name).write_bytes(make(photo_bytes))
    result = codec_run("encode", *MODEL, name)
    assert result.code == code
    assert result.err.startswith(f"codec: {name}: ")
    assert text in result.err
    assert len(result.lines) == 1
    assert listing(tmp_path) == {name}


def test_already_encoded(codec_run, stream):
    result = codec_run("encode", *MODEL, "photo.nlc", "-o", "again.nlc")
    assert (result.code, result.err) == (1, "codec: photo.nlc: is an .nlc file already\n")


def altered(data: bytes, **changes) -> bytes:
    stream = loads(data)
    header = stream.header | changes.pop("header", {})
    return dumps(replace(stream, header=header, **changes))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]


BAD_STREAMS = {
    "empty": (lambda d: b"", 3, "empty file"),
    "picture": (lambda d: b"\x89PNG\r\n\x1a\n" + d, 3, "not an .nlc file"),
    "text mode": (lambda d: d.replace(b"\r\n", b"\n"), 3, "line ends were changed in transfer: fetch the"),
    "head cut": (lambda d: d[:30], 3, "file ends in its head"),
    "cut": (lambda d: d[:-100], 3, "file is cut short: "),
    "longer": (lambda d: d + b"x", 3, "1 bytes behind the end"),
    "head damaged": (lambda d: flipped(d, 14), 3, "head is damaged (checksum)"),
    "tile damaged": (lambda d: flipped(d, -50), 3, "segment 0 (tile) is damaged (checksum)"),
    "no tile": (lambda d: altered(d, segments=[]), 3, "0 tiles where the size needs 1"),
    "tile of noise": (lambda d: altered(d, segments=[Segment("tile", bytes(range(256)))]), 3, ""),
    "other codec": (lambda d: altered(d, codec="magic"), 4, "codec 'magic' is unknown here; known are "),
    "other preset": (lambda d: altered(d, preset="giant"), 4, "hyperprior has no preset 'giant'; it has "),
    "other weights": (lambda d: altered(d, model_id=b"12345678"), 4, "the stream needs the weights 313233343536"),
    "bomb": (lambda d: altered(d, header={"w": 65535, "h": 65535}), 5, "stream: 65535x65535 is beyond"),
    "no size": (lambda d: altered(d, header={"w": "wide"}), 3, "header: 'w' is missing or out of range"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["decode", "test"])
@pytest.mark.parametrize("what", BAD_STREAMS)
def test_bad_streams(codec_run, stream_bytes, verb, what, tmp_path):
    make, code, text = BAD_STREAMS[what]
    Path("bad.nlc").write_bytes(make(stream_bytes))
    result = codec_run(verb, "bad.nlc")
    assert result.code == code, result.err
    assert result.err.startswith(f"codec: bad.nlc: {text}")
    assert len(result.lines) == 1
    assert listing(tmp_path) == {"bad.nlc"}


@pytest.mark.parametrize("verb", ["encode", "decode", "test", "info"])
@pytest.mark.parametrize("name, text", [("none", "no such file or directory"), ("photo.png/x", "not a directory")])
def test_unreadable(codec_run, photo, verb, name, text):
    result = codec_run(verb, name, *(["-O", "out"] if verb in ("encode", "decode") else []))
    assert (result.code, result.err) == (1, f"codec: {name}: {text}\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_permissions(codec_run, photo, stream):
    photo.chmod(0)
    assert codec_run("encode", "photo.png", "-o", "x.nlc").err == "codec: photo.png: permission denied\n"
    Path("locked").mkdir(0o500)
    result = codec_run("decode", "photo.nlc", "-O", "locked")
    assert (result.code, result.err) == (1, "codec: photo.nlc: locked: no permission to write into this folder\n")


def test_limits_can_be_moved(codec_run, photo, stream):
    result = codec_run("encode", *MODEL, "--max-pixels", "10k", "photo.png", "-o", "x.nlc")
    assert result.code == 5
    assert "150x100 is beyond the limit of 10000 pixels (--max-pixels)" in result.err
    assert codec_run("decode", "--max-side", "149", "photo.nlc", "-o", "x.png").code == 5
    assert codec_run("decode", "--max-bytes", "10k", "photo.nlc", "-o", "x.png").code == 5
    assert codec_run("decode", "--max-bytes", "1M", "--max-side", "150", "photo.nlc", "-o", "x.png").code == 0


def test_a_batch_does_what_it_can_and_returns_the_worst(codec_run, stream_bytes):
    unknown = altered(stream_bytes, codec="magic")
    for name, data in zip("abcd", (stream_bytes, stream_bytes[:-1], unknown, stream_bytes)):
        Path(f"{name}.nlc").write_bytes(data)
    result = codec_run("decode", "a.nlc", "b.nlc", "none.nlc", "c.nlc", "d.nlc")
    assert result.code == 4
    assert [line.split(" ")[0] for line in result.lines] == ["a.nlc", "codec:", "codec:", "codec:", "d.nlc"]
    assert Path("a.png").exists()
    assert Path("d.png").exists()


def test_unknown_models(codec_run, photo):
    result = codec_run("encode", "-m", "magic", "photo.png")
    assert result.code == 4
    assert result.err.startswith("codec: photo.png: codec 'magic' is unknown here; known are ")
    result = codec_run("encode", "-m", "hyperprior:giant", "photo.png")
    assert result.code == 4
    assert result.err.startswith("codec: photo.png: hyperprior has no preset 'giant'; it has ")


def test_missing_weights(codec_run, photo, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path / "nothing")
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.delenv("NEURALCODEC_WEIGHTS", raising=False)
    text = "no weights of hyperprior:test here; `codec models` lists those at hand\n"
    result = codec_run("encode", *MODEL, "photo.png")
    assert (result.code, result.err) == (4, f"codec: photo.png: {text}")
    result = codec_run("demo", *MODEL)
    assert (result.code, result.err) == (4, f"codec: {text}")
    result = codec_run("models")
    assert (result.code, result.out) == (4, b"")
    assert result.err.startswith("codec: no weights here; ")
    assert listing(tmp_path) == {"photo.png"}


def test_surprises_are_one_line_unless_asked_for(codec_run, photo, monkeypatch):
    def boom(*args, **options):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(pipeline, "encode_picture", boom)
    text = "internal error (RuntimeError: first second); --debug shows where, please report it"
    result = codec_run("encode", *MODEL, "photo.png")
    assert (result.code, result.err) == (1, f"codec: photo.png: {text}\n")
    monkeypatch.setenv("NLC_DEBUG", "")  # so that the variable is restored afterwards
    result = codec_run("encode", "--debug", *MODEL, "photo.png")
    assert "Traceback" in result.err
    assert "in boom" in result.err


def test_interruption(codec_run, photo, monkeypatch, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "encode_picture", interrupted)
    result = codec_run("encode", *MODEL, "photo.png")
    assert (result.code, result.out, result.err) == (130, b"", "codec: interrupted\n")
    assert listing(tmp_path) == {"photo.png"}


def test_a_full_disk_leaves_nothing(codec_run, photo, monkeypatch, tmp_path):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    result = codec_run("encode", *MODEL, "photo.png")
    assert (result.code, result.err) == (1, "codec: photo.png: photo.nlc: no space left on device\n")
    assert listing(tmp_path) == {"photo.png"}


# --- info, models, demo -----------------------------------------------------------------------------------------------


def test_info(codec_run, stream, codec, stream_bytes):
    result = codec_run("info", "photo.nlc")
    tile = len(loads(stream_bytes).segments[0].data)
    assert (result.code, result.err) == (0, "")
    assert result.out.decode().splitlines() == [
        f"photo.nlc: {len(stream_bytes):,} bytes, hyperprior:test, model {codec.model_id.hex()}",
        f"  150x100, RGB, 8 bit, {len(stream_bytes) * 8 / 15000:.4f} bpp, quality 50.0, from PNG",
        f"  tile: {tile:,} bytes",
    ]
    assert codec_run("info", "-", stdin=stream_bytes).out == result.out.replace(b"photo.nlc", b"-")
    verified = codec_run("info", "--verify", "photo.nlc")
    assert (verified.code, verified.out) == (0, result.out + b"  all checksums are right\n")


def test_info_json(codec_run, stream, codec, stream_bytes):
    (row,) = codec_run("info", "--json", "photo.nlc").rows
    tile = len(loads(stream_bytes).segments[0].data)
    assert row == {
        "input": "photo.nlc", "bytes": len(stream_bytes), "codec": "hyperprior", "preset": "test",
        "model_id": codec.model_id.hex(), "width": 150, "height": 100, "channels": 3, "depth": 8, "format": "PNG",
        "quality": 50.0, "tiles": 1, "bpp": len(stream_bytes) * 8 / 15000, "warnings": [],
        "segments": [{"name": "tile", "bytes": tile, "critical": True}],
    }  # fmt: skip


def test_info_of_damaged_files(codec_run, stream_bytes, photo_bytes):
    Path("cut.nlc").write_bytes(stream_bytes[:-100])
    result = codec_run("info", "cut.nlc")
    assert result.code == 3
    assert b"150x100" in result.out
    assert result.err.startswith(f"codec: cut.nlc: the file has {len(stream_bytes) - 100:,} bytes where its head says")
    Path("bad.nlc").write_bytes(flipped(stream_bytes, -50))
    assert codec_run("info", "bad.nlc").code == 0  # the head is whole, and only the head was read
    assert codec_run("info", "--verify", "bad.nlc").code == 3
    stream = loads(stream_bytes)
    stream.segments.append(Segment("exif", b"\0" * 200, critical=False))
    Path("exif.nlc").write_bytes(flipped(dumps(stream), -50))
    result = codec_run("info", "--verify", "exif.nlc")
    assert result.code == 0
    assert b"segment 1 (exif) is damaged and was left out" in result.out
    result = codec_run("decode", "exif.nlc")
    assert (result.code, result.lines[0]) == (0, "codec: exif.nlc: segment 1 (exif) is damaged and was left out")
    Path("x.png").write_bytes(photo_bytes)
    result = codec_run("info", "x.png", "cut.nlc")
    assert result.code == 3
    assert result.lines[0] == "codec: x.png: not an .nlc file"


def test_info_does_not_trust_the_head(codec_run, stream_bytes):
    evil = "\x1b[2J\x07evil\n"
    nasty = {"f": evil * 50, "c": [1], "d": {"x": 1}, "q": "high"}
    Path("evil.nlc").write_bytes(altered(stream_bytes, codec=evil, preset=evil, header=nasty))
    result = codec_run("info", "evil.nlc")
    assert result.code == 0
    assert b"\x1b" not in result.out
    assert b"\x07" not in result.out
    assert len(result.out.splitlines()) == 3
    assert len(codec_run("info", "--json", "evil.nlc").rows[0]["format"]) <= 20
    result = codec_run("decode", "evil.nlc")
    assert result.code in (3, 4)
    assert "\x1b" not in result.err


def test_models(codec_run, codec):
    result = codec_run("models")
    assert result.code == 0
    line = next(line for line in result.out.decode().splitlines() if line.startswith("hyperprior:test"))
    assert codec.model_id.hex() in line
    cards = codec_run("models", "--json").rows[0]
    mine = [c["model_id"] for c in cards if (c["codec"], c["preset"]) == ("hyperprior", "test")]
    assert mine == [codec.model_id.hex()]


def test_demo(codec_run, tmp_path):
    result = codec_run("demo", *MODEL, "--out", "look", "-q", "40")
    assert (result.code, result.err) == (0, "")
    names = {"demo.nlc", "demo_original.png", "demo_decoded.png", "demo_jpeg.png", "demo_side_by_side.png"}
    assert listing(tmp_path / "look") == names
    text = result.out.decode()
    assert text.startswith("grace_hopper.jpg, 512x600, hyperprior:test, quality 40\n")
    ours = next(line for line in text.splitlines() if line.startswith("neuralcodec")).split()
    assert int(ours[1].replace(",", "")) == Path("look/demo.nlc").stat().st_size
    original, decoded = pixels_of(Path("look/demo_original.png")), pixels_of(Path("look/demo_decoded.png"))
    psnr = 10 * np.log10(255**2 / np.square(original.astype(float) - decoded).mean())
    assert float(ours[3]) == pytest.approx(psnr, abs=0.01)
    assert codec_run("decode", "look/demo.nlc", "-o", "again.png").code == 0
    assert np.array_equal(pixels_of(Path("again.png")), decoded)


# --- help -------------------------------------------------------------------------------------------------------------

COMMANDS = ["encode", "decode", "test", "info", "models", "demo", "bench", "eval", "plot", "fetch", "train", "freeze"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "train"])
def test_every_option_is_explained(command):
    parser = cli.build_parser(command)
    sub = next(a for a in parser._actions if a.dest == "command")
    assert set(sub.choices) == set(COMMANDS)
    assert sub.choices[command].description
    unexplained = [a.dest for a in sub.choices[command]._actions if not a.help]
    assert not unexplained


@pytest.mark.parametrize("command", [[], ["encode"], ["decode"], ["test"], ["info"], ["models"], ["demo"], ["bench"]])
def test_help(codec_run, command):
    result = codec_run(*command, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.decode().startswith(" ".join(["usage: codec", *command]))


def test_version(codec_run):
    result = codec_run("--version")
    assert (result.code, result.out.decode()) == (0, f"codec {__version__}\n")


# --- whole processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["info", "photo.nlc"], ["models"], ["encode", "--help"]])
def test_light_commands_stay_light(stream, args):
    script = (
        "import sys; from neuralcodec import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join({'torch', 'numpy', 'PIL', 'rich', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    call = [sys.executable, "-c", script, *args]
    run = subprocess.run(call, cwd=stream.parent, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")


def test_workers(command, tmp_path, photo_bytes):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(photo_bytes if name != "b.png" else b"bad")
    names = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    run = command("encode", *MODEL, "-j", 2, "--threads", 1, "--json", "-O", tmp_path / "out", *names, cwd=ROOT)
    assert run.returncode == 1
    assert listing(tmp_path / "out") == {"a.nlc", "c.nlc"}
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert sorted(os.path.basename(row["input"]) for row in rows) == ["a.png", "b.png", "c.png"]
    assert len(run.stderr.splitlines()) == 1


def test_a_line_is_one_write():
    """Under PYTHONUNBUFFERED every write reaches the pipe by itself, and lines of several processes would mix."""
    sent = []

    class Pipe(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            sent.append(bytes(data))
            return len(data)

    cli.write_line('{"input": "a.png"}', io.TextIOWrapper(Pipe(), "utf-8", write_through=True))
    assert sent == [b'{"input": "a.png"}\n']


SLOW_PUBLISH = """
import sys, time
from neuralcodec.media import files
fsync = files.os.fsync
def stop(handle):
    fsync(handle)
    print("now", flush=True)
    time.sleep(60)
files.os.fsync = stop
from neuralcodec.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("sent, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_killed_while_writing(codec_run, photo, tmp_path, stream_bytes, sent, code):
    (tmp_path / "photo.nlc").write_bytes(b"the old one")
    call = [sys.executable, "-c", SLOW_PUBLISH, "encode", *MODEL, "-f", "photo.png"]
    # a shell starts background work with SIGINT ignored, which is inherited: the command is to hear it all the same
    hear = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "cwd": tmp_path, "text": True}
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **hear) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(sent)
        _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert (tmp_path / "photo.nlc").read_bytes() == b"the old one"
    assert err == ("codec: interrupted\n" if sent == signal.SIGINT else "")
    left = listing(tmp_path) - {"photo.png", "photo.nlc"}
    if sent == signal.SIGKILL:  # nobody could tidy up, but the name says what it is
        assert [name.endswith(".partial") for name in left] == [True]
    else:
        assert not left
    assert codec_run("encode", *MODEL, "-f", "photo.png").code == 0
    assert (tmp_path / "photo.nlc").read_bytes() == stream_bytes


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("args", [["encode", *MODEL, "-c", "photo.png"], ["info", "photo.nlc"]])
def test_stdout_that_is_full(photo, stream, tmp_path, args):
    with open("/dev/full", "wb") as full:
        call = [sys.executable, "-m", "neuralcodec", *args]
        run = subprocess.run(call, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (1, f"codec: {args[-1]}: no space left on device\n")


def test_readers_that_leave_early(stream, tmp_path):
    call = [sys.executable, "-m", "neuralcodec", "info", *["photo.nlc"] * 3000]
    with subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 1
    assert err == ""


def test_a_bar_is_drawn_on_a_terminal_only(photo, tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    call = [sys.executable, "-m", "neuralcodec", "encode", *MODEL, "--tile", "64", "photo.png"]
    environment = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(call, cwd=tmp_path, stderr=theirs, stdout=subprocess.PIPE, env=environment, timeout=120)
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert (run.returncode, run.stdout) == (0, b"")
    assert b"\x1b[" in shown
    assert b"photo.png -> photo.nlc: 150x100" in shown


def test_verification_error_has_the_code_of_damage():
    assert cli.complain(CorruptStream("x"), None) == 3
