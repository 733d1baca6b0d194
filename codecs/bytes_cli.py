"""The ``codec`` command on files of any bytes: options, and what encode, decode, test and info do. Importing it is cheap."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..container.errors import CodecError, CorruptStream, UnsupportedInput, UsageError
from ..container.format import Head, Limits, read_head, sniff
from ..media.files import looks_like_picture

if TYPE_CHECKING:
    from .bytefile import BytesCodec

CODECS = {"nacrith", "raw"}
WITHOUT_WEIGHTS = "nacrith:cm"
FAST = 3
"""Up to this effort no language model is asked."""
SUFFIX = ".nlc"
EXAMPLES = """any other file, without loss:
  codec encode notes.txt                     notes.txt.nlc
  codec encode -e 1 -j 0 backup.tar          fast, on all cores
  codec encode -m nacrith photo.png          the file itself rather than its picture
  tar c src | codec encode - -c > src.tar.nlc
"""
_LOSSY = {"bpp": "--bpp", "psnr": "--psnr", "size": "--size", "iterations": "--iterations", "max_error": "--max-error"}


def add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec encode`` for bytes."""
    add = parser.add_argument_group("any other file").add_argument
    _add_weights(add)
    text = "bytes that -m nacrith:published, :llama and :transformers code together; -j works on several blocks (default 1M)"
    add("--block", type=_block, metavar="N", help=text)


def _add_weights(add: Callable) -> None:
    text = "language model of nacrith:llama (a GGUF file) or nacrith:transformers (a folder; to encode, also a hub name)"
    add("--weights", metavar="FILE", help=text)


def _block(text: str) -> int:
    factor = {"k": 1000, "m": 1_000_000}.get(text[-1:].lower(), 1)
    number = text[:-1] if factor > 1 else text
    value = int(number) * factor if number.isdecimal() and number.isascii() else 0
    if not 64 <= value <= 1 << 22:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size from 64 to 4M")
    return value


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec test`` for bytes."""
    _add_weights(parser.add_argument_group("any other file").add_argument)


def add_decode_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``codec decode`` for bytes."""
    add = parser.add_argument_group("any other file").add_argument
    _add_weights(add)
    add("--range", type=_range, metavar="START,SIZE", help="only these bytes of the original; only their blocks are decoded")


def _range(text: str) -> tuple[int, int]:
    try:
        start, size = (int(part) for part in text.split(","))
    except ValueError:
        start = size = -1
    if start < 0 or size < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not START,SIZE in bytes")
    return start, size


def is_bytes(head: Head) -> bool:
    """Whether a stream holds bytes rather than a picture or fields."""
    return head.codec in CODECS


def is_model(model: str) -> bool:
    """Whether ``codec:preset`` codes bytes."""
    return model.partition(":")[0] in CODECS


def holds_bytes(name: str) -> bool:
    """Whether an input of decode is a file of bytes; False where that cannot be seen."""
    with contextlib.suppress(CodecError, OSError), open(name, "rb") as file:
        return is_bytes(read_head(file))
    return False


def wants_bytes(model: str | None, name: str, pictures: set[str]) -> bool:
    """Whether an input of encode is coded as bytes: by the model that is asked for, or else because it is no picture."""
    if model:
        return is_model(model)
    if Path(name).suffix.lower() in pictures:
        return False
    if name == "-":
        return sys.stdin is not None and not looks_like_picture(_peek(sys.stdin.buffer))
    try:
        with open(name, "rb") as file:
            return not looks_like_picture(file.read(64))
    except OSError:  # whoever opens it next will say what is wrong
        return bool(Path(name).suffix) and not os.path.isdir(name)


def _peek(file: Any) -> bytes:
    if hasattr(file, "peek"):
        return file.peek(64)[:64]
    at = file.tell()
    start = file.read(64)
    file.seek(at)
    return start


def target_suffix(name: str) -> str:
    """Suffix of what encode makes of an input: that of the input stays, so that nothing need be remembered."""
    return Path(name).suffix + SUFFIX


def original_suffix(name: str) -> str:
    """What decode puts in place of the last suffix of a file: nothing, so that notes.txt.nlc becomes notes.txt."""
    suffix = Path(name).suffix
    return "" if suffix == SUFFIX else suffix + ".out"


def check_options(args: argparse.Namespace) -> None:
    """UsageError for options that mean loss."""
    for key, option in _LOSSY.items():
        if getattr(args, key, None) is not None:
            raise UsageError(f"{option} is for pictures and fields; other files are coded without loss")


def check_decode_options(args: argparse.Namespace) -> None:
    """UsageError for what makes sense for bytes only."""
    if args.range:
        raise UsageError("--range is for files of bytes; --roi cuts a region out of a picture")


class Replay(io.RawIOBase):
    """What was read already, then the rest of a file: a pipe cannot seek back behind the head."""

    def __init__(self, seen: bytes, file: BinaryIO):
        self._seen = io.BytesIO(seen)
        self._file = file

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0:
            return self._seen.read() + self._file.read()
        return self._seen.read(size) or self._file.read(size)


class _Recorder:
    def __init__(self, file: BinaryIO):
        self.file, self.seen = file, bytearray()

    def read(self, size: int) -> bytes:
        part = self.file.read(size)
        self.seen += part
        return part


def peek_head(file: BinaryIO, limits: Limits) -> tuple[Head | None, BinaryIO]:
    """(head, the file from its beginning); no head where it cannot be read, which its reader will then say."""
    recorder = _Recorder(file)
    head = None
    with contextlib.suppress(CodecError):
        head = read_head(recorder, limits)  # type: ignore[arg-type]
    return head, Replay(bytes(recorder.seen), file)  # type: ignore[return-value]


@contextlib.contextmanager
def source_of(name: str) -> Iterator[BinaryIO]:
    """An input, opened for reading: a file or stdin."""
    if name == "-":
        if sys.stdin is None:
            raise UsageError("- reads from a pipe, but stdin is closed")
        yield sys.stdin.buffer
    else:
        with open(name, "rb") as file:
            yield file


def _jobs(args: argparse.Namespace) -> int:
    return args.jobs or os.cpu_count() or 1


def _announce_compilation(say: Callable[[str], None], quiet: bool) -> None:
    """The first run on a machine waits for the compiler: say so, on a terminal."""
    from ..entropy.bytes import binary

    if not quiet and sys.stderr.isatty() and not binary.is_compiled():
        say("codec: compiling the coder for this machine, once; this takes about half a minute")


def _options(args: argparse.Namespace, model: str) -> dict[str, Any]:
    """What the published presets take from the command line. UsageError where the others are given it."""
    from .nacrith import Nacrith

    name, _, preset = model.partition(":")
    if name == Nacrith.name and preset in Nacrith.presets and Nacrith.presets[preset].published:
        threads = args.threads or (max(1, (os.cpu_count() or 1) // _jobs(args)) if _jobs(args) > 1 else None)
        given = {"weights": args.weights, "threads": threads, "block": args.block}
        return {k: v for k, v in given.items() if v is not None} | {"device": "cuda" if args.device == "cuda" else "cpu"}
    if args.weights or args.block:
        option = "--weights" if args.weights else "--block"
        raise UsageError(f"{option} is for -m nacrith:llama, nacrith:transformers and nacrith:published")
    return {}


def _effort(args: argparse.Namespace) -> int:
    return 1 if args.fast else 9 if args.best else args.effort or 5


def chosen_model(args: argparse.Namespace) -> str:
    """What codes a file when nobody asks for a model: the default, but none with weights where they are missing or unused."""
    from . import registry

    if args.model:
        return args.model
    model = registry.default("bytes")
    try:
        registry.weights_path(*registry.split(model))
    except CodecError:
        return WITHOUT_WEIGHTS
    return model if _effort(args) > FAST else WITHOUT_WEIGHTS


def encode_file(
    args: argparse.Namespace, name: str, model: str, target: str, opened: Callable, progress: Callable, say: Callable
) -> tuple[dict[str, Any], str]:
    """Code one file; its report as a row and as a line."""
    check_options(args)
    from . import registry
    from .bytefile import encode_file

    codec: Any = registry.load(*registry.split(model), **_options(args, model))
    effort = _effort(args)
    start = time.perf_counter()
    with source_of(name) as source:
        total = os.fstat(source.fileno()).st_size if name != "-" else 0
        beginning = _peek(source)
        if sniff(beginning[:8]):
            raise UnsupportedInput(f"{name}: is an {SUFFIX} file already")
        _announce_compilation(say, args.quiet)
        with opened(target, args.force) as out, progress(args, os.path.basename(name)) as bar:
            summary = encode_file(codec, source, out, effort, _jobs(args), bar, total, args.verify)
    notes = codec.notes() if hasattr(codec, "notes") else []
    for note in [] if args.quiet else notes:
        say(f"codec: {name}: {note}")
    seconds = time.perf_counter() - start
    bits = 8 * summary.size / summary.length if summary.length else None
    row = {
        "input": name, "output": target, "model": summary.model, "effort": effort, "length": summary.length,
        "bytes": summary.size, "bits_per_byte": bits, "seconds": round(seconds, 3),
    }  # fmt: skip
    if args.verify:
        row["verified"] = True
    if notes:
        row["notes"] = notes
    share = f", {bits:.3f} bits per byte" if bits is not None else ""
    text = f"{summary.length:,} -> {summary.size:,} bytes{share}{', verified' if args.verify else ''}, {seconds:.2f} s"
    return row, f"{name} -> {target}: {text}"


def decode_file(
    args: argparse.Namespace, name: str, head: Head, source: BinaryIO, target: str | None, opened: Callable, progress: Callable
) -> tuple[dict[str, Any], str]:
    """Decode one file whose head has been read but is still to come from ``source``, or only check it (no target)."""
    from . import registry
    from .bytefile import decode_file, read_range

    if getattr(args, "roi", None) or getattr(args, "format", None):
        raise UsageError(f"{'--roi' if args.roi else '--format'} is for pictures; this file holds bytes")
    device = "cuda" if args.device == "cuda" else "cpu"
    codec: BytesCodec = registry.load_for(head, device, getattr(args, "weights", None))  # type: ignore[assignment, arg-type]
    start = time.perf_counter()
    wanted = getattr(args, "range", None)
    if wanted:
        if name == "-":
            raise UsageError("--range needs a file that can seek, not a pipe")
        with open(name, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size != head.file_size:
                raise CorruptStream(f"file has {size} bytes where its head says {head.file_size}")
            data = read_range(codec, head, file, *wanted)
        with opened(target, args.force) as out:
            out.write(data)
        length = len(data)
    else:
        read_head(source)  # the same once more: what follows is the payload
        out_file = opened(target, args.force) if target is not None else contextlib.nullcontext()
        with out_file as out, progress(args, os.path.basename(name)) as bar:
            total = _length(head, name) if bar else 0
            length = decode_file(codec, head, source, out, _jobs(args), args.max_bytes, bar, total)
    seconds = time.perf_counter() - start
    row = {"input": name, "length": length, "seconds": round(seconds, 3)}
    if target is None:
        return {"input": name, "ok": True, "length": length}, f"{name}: ok, {length:,} bytes"
    return row | {"output": target}, f"{name} -> {target}: {length:,} bytes, {seconds:.2f} s"


def _length(head: Head, name: str) -> int:
    """Bytes of original in a file, 0 where a pipe does not tell."""
    from .bytefile import lengths

    if name == "-":
        return 0
    with open(name, "rb") as file, contextlib.suppress(CodecError):
        return sum(lengths(head, file))
    return 0


def describe(head: Head, name: str) -> dict[str, Any]:
    """What ``codec info`` tells of a file beyond its head: the length of the original, and how much was coded how."""
    row: dict[str, Any] = {"kind": "bytes", "blocks": len(head.entries)}
    if isinstance(backend := head.header.get("backend"), dict):
        row |= {"portable": False, "weights": str(head.header.get("weights"))}
        row |= {"backend": {key: str(value) for key, value in backend.items()}}
    if head.codec == "raw":
        return row | {"length": sum(e.length for e in head.entries), "methods": {}}
    if name == "-":
        return row
    from ..entropy.bytes import framing

    methods: dict[str, int] = {}
    with contextlib.suppress(CodecError), open(name, "rb") as file:
        for entry in head.entries:
            file.seek(entry.offset)
            block = framing.describe(file.read(min(entry.length, framing.HEAD)))
            title = framing.METHODS[block.method]
            methods[title] = methods.get(title, 0) + block.length
        row |= {"length": sum(methods.values()), "methods": methods}
    return row


def show(row: dict[str, Any]) -> list[str]:
    """Lines of ``codec info`` for a person."""
    parts = [f"{row['blocks']} blocks" if row["blocks"] != 1 else "1 block"]
    if row.get("length") is not None:
        parts.insert(0, f"{row['length']:,} bytes of original")
        if row["length"]:
            parts.append(f"{8 * row['bytes'] / row['length']:.3f} bits per byte")
    parts += [f"{title}: {length:,}" for title, length in row.get("methods", {}).items()]
    lines = ["  " + ", ".join(parts)]
    if not row.get("portable", True):
        made = ", ".join(f"{key} {value}" for key, value in row["backend"].items())
        lines.append(f"  not portable: decodes only with {row['weights']} and {made}")
    return lines


