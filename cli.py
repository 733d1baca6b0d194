"""The ``codec`` command. Heavy modules are imported inside the sub-commands: --help, info, models never load torch."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from . import __version__
from .codecs import bytes_cli, grid_cli
from .container.errors import CodecError, CorruptStream, ModelMissing, UnsupportedInput, UsageError
from .container.format import Head, Limits, dumps, loads, read_head, sniff

SUFFIX = ".nlc"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".ppm", ".pgm"}
DEFAULT_QUALITY = 50.0
ANNEALING = {7: 60, 8: 120, 9: 240}
"""Iterations by effort, see ``codecs.anneal``."""
DEVICES = ("auto", "cpu", "cuda")
EXIT_CODES = """exit codes: 0 done, 1 error, 2 wrong call, 3 damaged file, 4 model missing or mismatched,
5 limit exceeded, 130 interrupted. With several files all are tried; the worst code is returned."""
ENCODE_EXAMPLES = f"""examples:
  codec encode photo.png                     photo{SUFFIX}, quality {DEFAULT_QUALITY:g}
  codec encode -q 30 *.jpg -O small          many pictures into a folder
  codec encode --size 100k --verify scan.tif -o scan{SUFFIX}
  cat photo.png | codec encode - -c > photo{SUFFIX}

{grid_cli.EXAMPLES}
{bytes_cli.EXAMPLES}
{EXIT_CODES}"""
DECODE_EXAMPLES = f"""examples:
  codec decode photo{SUFFIX}                    photo.png
  codec decode photo{SUFFIX} -o photo.webp      the format follows the name
  codec decode -r archive -O pictures        a tree of files into the same tree
  codec decode --roi 0,0,512,512 huge{SUFFIX} -o corner.png

Every format but JPEG and AVIF is written without further loss.

{EXIT_CODES}"""


# --- small helpers ----------------------------------------------------------------------------------------------------


def clean(text: str, longest: int = 1000) -> str:
    """Text of a file or a file name, safe for a terminal: one line, nothing that a terminal would obey."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= longest else text[: longest - 3] + "..."


_turn: contextlib.AbstractContextManager = contextlib.nullcontext()  # in a worker: a lock that all workers of a batch share


def write_line(text: str, file: TextIO | None) -> None:
    """One line, whole even where several processes write to the same pipe: ``print`` sends text and line end apart."""
    if file is not None:  # closed by the caller
        with _turn:
            file.write(text + "\n")
            file.flush()


def say(text: str) -> None:
    """A line for a person, on stderr."""
    with contextlib.suppress(BrokenPipeError):
        write_line(clean(text), sys.stderr)


def complain(error: BaseException, path: str | None = None) -> int:
    """One line about an error; its exit code."""
    if isinstance(error, IsADirectoryError):
        text = f"{error.filename or path}: is a directory; use -r to take the files in it"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or path}: {error.strerror[0].lower()}{error.strerror[1:]}"
    elif isinstance(error, MemoryError):
        text = "out of memory; smaller tiles (encode --tile 512) and fewer jobs (-j) need less"
    elif isinstance(error, (CodecError, OSError)):
        text = str(error)
    else:
        text = f"internal error ({type(error).__name__}: {error}); --debug shows where, please report it"
    if path and not text.startswith(f"{path}: "):
        text = f"{'stdin' if path == '-' else path}: {text}"
    say(f"codec: {text}")
    if os.environ.get("NLC_DEBUG"):
        import traceback

        traceback.print_exception(error)
    return getattr(error, "exit_code", 1)


def size_of(text: str) -> int:
    """'20000', '20k', '1.5M' -> bytes."""
    factors = {"k": 1000, "m": 1_000_000, "g": 1_000_000_000}
    number, factor = (text[:-1], factors[text[-1].lower()]) if text[-1:].lower() in factors else (text, 1)
    try:
        value = float(number) * factor
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 20000, 20k or 1.5M") from None
    if not 1 <= value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive size")
    return int(value)


def between(low: float, high: float) -> Callable[[str], float]:
    """Argument type: a number in low..high."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is outside of {low:g}..{high:g}")
        return value

    return parse


def count_of(low: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least ``low``."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} up")
        return int(text)

    return parse


def region(text: str) -> tuple[int, int, int, int]:
    """'x,y,width,height' -> four integers."""
    try:
        x, y, w, h = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y,width,height in pixels") from None
    return x, y, w, h


def limits_of(args: argparse.Namespace) -> Limits:
    chosen = {
        "max_pixels": args.max_pixels,
        "max_side": args.max_side,
        "max_decoded_bytes": args.max_bytes,
    }
    return Limits(**{k: v for k, v in chosen.items() if v is not None})


def device_of(args: argparse.Namespace) -> str:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return args.device


@contextlib.contextmanager
def progress_bar(args: argparse.Namespace, title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A callback (done, total) that draws a bar on a terminal, or None in a pipe."""
    if args.quiet or not args.bars or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def collect(args: argparse.Namespace, suffixes: set[str] | None) -> list[str]:
    """Input names: files, '-', the content of folders with -r (all of it without ``suffixes``), and lines of --filelist."""
    names = list(args.files)
    if args.filelist:
        with contextlib.ExitStack() as stack:
            file = sys.stdin if args.filelist == "-" else stack.enter_context(open(args.filelist, encoding="utf-8"))
            names += [line.rstrip("\r\n") for line in file if line.strip()]
    found = []
    for name in names:
        if name != "-" and os.path.isdir(name) and args.recursive and not grid_cli.is_grid_name(name):
            files = sorted(p for p in Path(name).rglob("*") if p.is_file())
            walk = [p for p in files if suffixes is None or p.suffix.lower() in suffixes]
            if not walk:
                what = "files" if suffixes is None else f"{SUFFIX} files" if suffixes == {SUFFIX} else "pictures or fields"
                say(f"codec: {name}: no {what} in this folder")
            found += map(str, walk)
        else:
            found.append(name)
    if not found:
        raise UsageError("no input files")
    return found


def target_of(args: argparse.Namespace, name: str, suffix: str) -> str:
    """Where the result of ``name`` goes: '-' for stdout. Folders given as input keep their shape below -O."""
    if args.stdout:
        return "-"
    if args.output:
        return args.output
    if name == "-":
        raise UsageError("reading from a pipe: say with -o FILE or -c where the result goes")
    result = Path(name).with_suffix(suffix)
    if args.output_dir:
        base = next((f for f in map(Path, args.files) if f in result.parents and f.is_dir()), result.parent)
        result = Path(args.output_dir, result.relative_to(base))
    return str(result)


@contextlib.contextmanager
def opened(target: str, force: bool) -> Iterator[Any]:
    """Binary file for the result: stdout, or a file that appears whole or not at all."""
    if target == "-":
        if sys.stdout.isatty():
            raise UsageError("binary data is not written to a terminal; redirect it or use -o FILE")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    from .media.files import atomic_write

    try:
        with atomic_write(target, force) as file:
            yield file
    except OSError as error:
        if error.errno and not error.filename:  # a full disk, of which Python does not say where
            error.filename = target
        raise


def check_free(args: argparse.Namespace, target: str, source: str) -> None:
    """Refuse before the work what would be refused after it."""
    if target == "-":
        if sys.stdout.isatty():
            raise UsageError("binary data is not written to a terminal; redirect it or use -o FILE")
        return
    if source != "-" and os.path.exists(target) and os.path.exists(source) and os.path.samefile(target, source):
        raise UsageError(f"{target}: input and output are the same file")
    if os.path.isdir(target):
        raise UsageError(f"{target}: is a directory; use -O for a folder")
    if not args.force and os.path.lexists(target):
        raise FileExistsError(f"{target}: exists already; use -f to overwrite it")
    folder = os.path.dirname(target) or "."
    if args.output_dir:
        os.makedirs(folder, exist_ok=True)
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "no such folder, and only -O makes one", folder)
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "no permission to write into this folder", folder)


def read_bytes(name: str) -> bytes:
    if name == "-":
        if sys.stdin is None:
            raise UsageError("- reads from a pipe, but stdin is closed")
        return sys.stdin.buffer.read()
    with open(name, "rb") as file:
        return file.read()


def report(args: argparse.Namespace, row: dict[str, Any], text: str) -> None:
    """One JSON object on stdout, or one line for a person."""
    if args.json:
        write_line(json.dumps(row), sys.stdout)
    elif not args.quiet:
        say(text)


Work = Callable[[argparse.Namespace, str], None]


def run_batch(args: argparse.Namespace, suffixes: set[str] | None, work: Work, target: Callable | None = None) -> int:
    """Do ``work`` for every input; the worst exit code. ``target`` gives the name of an input's result."""
    names = collect(args, suffixes)
    if target:
        check_outputs(args, names, target)
    jobs = min(args.jobs or os.cpu_count() or 1, len(names))
    if jobs < 2:
        return max(_guarded(work, args, name) for name in names)
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    args.threads = args.threads or max(1, (os.cpu_count() or 1) // jobs)
    args.bars = False  # several bars would overwrite each other
    plain = argparse.Namespace(**({k: v for k, v in vars(args).items() if k != "func"} | {"jobs": 1}))
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(jobs, context, _start_worker, (context.Lock(),)) as pool:
            return max(pool.map(_in_worker, [work] * len(names), [plain] * len(names), names))
    except BrokenProcessPool:
        raise CodecError("a process was killed, probably because memory ran out; use fewer jobs (-j)") from None


def _start_worker(turn: contextlib.AbstractContextManager) -> None:
    """Ctrl-C goes to all processes: those that wait for work shall stay silent."""
    global _turn
    _turn = turn
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _leave_on_sigterm()
    _hush()


def check_outputs(args: argparse.Namespace, names: list[str], target: Callable) -> None:
    """UsageError for outputs that make no sense together, before any work."""
    several = len(names) > 1
    if several and args.output:
        raise UsageError("-o names one result, but there are several inputs; use -O DIR")
    if several and args.stdout:
        raise UsageError("-c writes one result, but there are several inputs; use -O DIR")
    to_stdout = args.stdout or args.output == "-"
    if to_stdout and args.json:
        raise UsageError("-c and --json would both write to stdout; use -o FILE")
    if to_stdout and args.rm:
        raise UsageError("--rm needs a file as result: nobody knows whether what goes to a pipe arrives")
    if several:
        made: dict[str, str] = {}
        for name in names:
            result = os.path.normpath(target(args, name))
            if result in made:
                raise UsageError(f"{made[result]} and {name} would both be written to {result}; code them apart")
            made[result] = name


def _in_worker(work: Work, args: argparse.Namespace, name: str) -> int:
    """One input in a process of its own, which Ctrl-C stops."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _guarded(work, args, name)
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _guarded(work: Work, args: argparse.Namespace, name: str) -> int:
    """Exit code of one input; its error becomes a line, so that a batch goes on."""
    try:
        work(args, name)
    except BrokenPipeError:
        raise
    except Exception as error:
        code = complain(error, name)
        if args.json:
            write_line(json.dumps({"input": name, "error": type(error).__name__, "exit_code": code}), sys.stdout)
        return code
    return 0


# --- encode, decode ---------------------------------------------------------------------------------------------------


def encode(args: argparse.Namespace) -> int:
    if grid_cli.wants_archive(args):
        return grid_cli.encode_archive(args, collect(args, grid_cli.SUFFIXES))
    everything = bool(args.model) and bytes_cli.is_model(args.model)
    return run_batch(args, None if everything else PICTURES | grid_cli.SUFFIXES, encode_file, encode_target)


def codes_bytes(args: argparse.Namespace, name: str) -> bool:
    """Whether an input of encode is neither a picture nor fields, or shall not be taken as such."""
    if grid_cli.is_grid_name(name) and not args.model:
        return False
    return bytes_cli.wants_bytes(args.model, name, PICTURES)


def encode_target(args: argparse.Namespace, name: str) -> str:
    return target_of(args, name, bytes_cli.target_suffix(name) if codes_bytes(args, name) else SUFFIX)


def chosen_model(args: argparse.Namespace) -> str:
    from .codecs import registry

    if args.model:
        return args.model
    effort = 1 if args.fast else 9 if args.best else args.effort or 5
    fast, best = effort < 4, effort > 6
    return registry.default("image-fast" if fast else "image-best" if best else "image")


def annealing_of(args: argparse.Namespace) -> int:
    """Iterations of the search for a better latent, 0 for none."""
    if args.iterations is not None:
        return args.iterations
    return ANNEALING.get(args.effort, 0)


def encode_file(args: argparse.Namespace, name: str) -> None:
    """Code one picture as the options say, and write it."""
    target = encode_target(args, name)
    check_free(args, target, name)
    if codes_bytes(args, name):
        model = bytes_cli.chosen_model(args)
        report(args, *bytes_cli.encode_file(args, name, model, target, opened, progress_bar, say))
        if args.rm and name != "-":
            os.unlink(name)
        return
    if grid_cli.is_grid_name(name):
        return grid_cli.encode_file(args, name, target)
    from .media.image import read_picture

    data = read_bytes(name)
    if sniff(data[:8]):
        raise UnsupportedInput(f"{name}: is an {SUFFIX} file already")
    limits = limits_of(args)
    picture = read_picture(data, limits, strip=args.strip, name=name)
    from .codecs import registry
    from .codecs.base import LEVELS, level_of
    from .codecs.image import decode_picture, encode_picture, fit_costly, fit_level, psnr_of

    codec = registry.load(*registry.split(chosen_model(args)), device=device_of(args))
    pixels = picture.width * picture.height
    iterations = annealing_of(args)
    start = time.perf_counter()
    made: dict[tuple[int, int], tuple[bytes, Any, dict]] = {}

    def make(level: int, search: int = iterations) -> bytes:
        if (level, search) not in made:
            trace: dict = {}
            options: dict[str, Any] = {"tile": args.tile, "trace": trace}
            with progress_bar(args, os.path.basename(name)) as bar:
                if search:
                    from .codecs.anneal import Annealer

                    stream = encode_picture(codec, picture, level, tile_encoder=Annealer(search, progress=bar), **options)
                else:
                    stream = encode_picture(codec, picture, level, progress=bar, **options)
            made[level, search] = dumps(stream), stream, trace
        return made[level, search][0]

    def size(level: int, search: int = iterations) -> float:
        return len(make(level, search))

    def psnr(level: int, search: int = iterations) -> float:
        make(level, search)
        decoded = decode_picture(codec, made[level, search][1], limits=limits)
        return psnr_of(picture.pixels, decoded.pixels, picture.peak)

    def fit(measure: Callable, target: float, tolerance: float, at_most: bool = False) -> tuple[int, float]:
        if iterations:  # what a search makes of a picture is much like what comes without one
            return fit_costly(measure, lambda v: measure(v, 0), target, at_most=at_most, tolerance=tolerance)
        return fit_level(measure, target, at_most=at_most, tolerance=tolerance)

    wanted = None
    if args.bpp is not None:
        wanted = (args.bpp, "bpp")
        level, got = fit(lambda *at: size(*at) * 8 / pixels, args.bpp, 0.005)
    elif args.size is not None:
        wanted = (args.size, "bytes")
        level, got = fit(size, args.size, 0.005, at_most=True)
    elif args.psnr is not None:
        wanted = (args.psnr, "dB")
        level, got = fit(psnr, args.psnr, 0.0003)
    else:
        level = level_of(args.quality)
    below = args.size is not None and got <= args.size  # a smaller file than allowed is no failure
    if wanted and not below and abs(got - wanted[0]) > 0.02 * wanted[0]:
        say(f"codec: {name}: {wanted[0]:g} {wanted[1]} is out of reach; the closest is {got:.5g} {wanted[1]}")
    data = make(level)
    row = {
        "input": name, "output": target, "width": picture.width, "height": picture.height,
        "model": f"{codec.name}:{codec.preset}", "quality": level * 100 / LEVELS,
        "bytes": len(data), "bpp": len(data) * 8 / pixels,
    }  # fmt: skip
    checked = ""
    if args.verify:
        trace: dict = {}
        decoded = decode_picture(codec, loads(data, limits), limits=limits, trace=trace)
        if trace != made[level, iterations][2]:
            raise CorruptStream(f"{name}: verification failed: the decoder finds other symbols than the encoder")
        quality = psnr_of(picture.pixels, decoded.pixels, picture.peak)
        checked = f", {quality:.2f} dB, verified"
        row["psnr"] = quality if math.isfinite(quality) else None  # JSON knows no infinity
    row["seconds"] = round(time.perf_counter() - start, 3)
    with opened(target, args.force) as file:
        file.write(data)
    for note in picture.notes:
        say(f"codec: {name}: {note}")
    text = f"{picture.width}x{picture.height}, {len(data):,} bytes, {row['bpp']:.3f} bpp, quality {row['quality']:g}"
    report(args, row, f"{name} -> {target}: {text}{checked}, {row['seconds']:.2f} s")
    if args.rm and name != "-":
        os.unlink(name)


def decode(args: argparse.Namespace) -> int:
    if args.rm and args.roi:
        raise UsageError("--rm with --roi would lose the rest of the picture; leave one of them out")
    return run_batch(args, {SUFFIX}, decode_file, decode_target)


def holds_grid(name: str) -> bool:
    """Whether an input of decode is a file of fields or an archive of them."""
    if os.path.isdir(name):
        return grid_cli.is_grid_name(name)
    with contextlib.suppress(CodecError, OSError), open(name, "rb") as file:  # the decoder will say what is wrong
        return grid_cli.is_grid(read_head(file))
    return False


def decode_target(args: argparse.Namespace, name: str) -> str:
    if bytes_cli.holds_bytes(name):
        return target_of(args, name, bytes_cli.original_suffix(name))
    if holds_grid(name):
        return target_of(args, name, ".nc")
    suffix = f".{args.format or 'png'}"
    if args.format == "original":
        from .media.image import SUFFIXES

        with contextlib.suppress(CodecError, OSError), open(name, "rb") as file:  # the decoder will say what is wrong
            recorded = read_head(file).header.get("f")
            suffix = next((s for s, form in SUFFIXES.items() if form == recorded), ".png")
    return target_of(args, name, ".png" if suffix == ".original" else suffix)


def decode_file(args: argparse.Namespace, name: str) -> None:
    """Decode one file and write the picture."""
    target = decode_target(args, name)
    check_free(args, target, name)
    if holds_grid(name):
        return grid_cli.decode_file(args, name, target, limits_of(args))
    with bytes_cli.source_of(name) as file:
        head, source = bytes_cli.peek_head(file, limits_of(args))
        if head is not None and bytes_cli.is_bytes(head):
            report(args, *bytes_cli.decode_file(args, name, head, source, target, opened, progress_bar))
            if args.rm and name != "-":
                os.unlink(name)
            return
        bytes_cli.check_decode_options(args)
        data = source.read()
    from .codecs.image import decode_picture, picture_info
    from .media.image import SUFFIXES, check_target, format_of, write_picture

    limits = limits_of(args)
    form = format_of(target) if args.output and target != "-" and not args.format else "PNG"
    stream = loads(data, limits)
    if args.format == "original":
        form = recorded if (recorded := stream.header.get("f")) in SUFFIXES.values() else "PNG"
    elif args.format:
        form = SUFFIXES[f".{args.format}"]
    check_target(form, alpha=stream.get("alpha") is not None, depth=picture_info(stream.header, limits).depth)
    from .codecs import registry

    codec = registry.load_for(stream, device=device_of(args))
    start = time.perf_counter()
    with progress_bar(args, os.path.basename(name)) as bar:
        picture = decode_picture(codec, stream, roi=args.roi, limits=limits, progress=bar)
    seconds = time.perf_counter() - start
    buffer = io.BytesIO()  # some formats go back in the file while they write, which a pipe cannot
    lost = write_picture(buffer, picture, form)
    with opened(target, args.force) as file:
        file.write(buffer.getbuffer())
    for note in [*stream.warnings, *lost]:
        say(f"codec: {name}: {note}")
    row = {"input": name, "output": target, "width": picture.width, "height": picture.height}
    row["seconds"] = round(seconds, 3)
    report(args, row, f"{name} -> {target}: {picture.width}x{picture.height}, {seconds:.2f} s")
    if args.rm and name != "-":
        os.unlink(name)


def test(args: argparse.Namespace) -> int:
    """Decode without writing."""
    return run_batch(args, {SUFFIX}, test_file)


def test_file(args: argparse.Namespace, name: str) -> None:
    limits = limits_of(args)
    if holds_grid(name):
        return grid_cli.test_file(args, name, limits)
    with bytes_cli.source_of(name) as file:
        head, source = bytes_cli.peek_head(file, limits)
        if head is not None and bytes_cli.is_bytes(head):
            return report(args, *bytes_cli.decode_file(args, name, head, source, None, opened, progress_bar))
        data = source.read()
    stream = loads(data, limits)
    from .codecs import registry
    from .codecs.image import decode_picture

    picture = decode_picture(registry.load_for(stream, device=device_of(args)), stream, limits=limits)
    for note in stream.warnings:
        say(f"codec: {name}: {note}")
    row = {"input": name, "ok": True, "width": picture.width, "height": picture.height}
    report(args, row, f"{name}: ok, {picture.width}x{picture.height}")


# --- info, models -----------------------------------------------------------------------------------------------------


def info(args: argparse.Namespace) -> int:
    return max(_guarded(info_file, args, name) for name in args.files)


def info_file(args: argparse.Namespace, name: str) -> None:
    """What a file says of itself. Reads the head only, unless --verify. CorruptStream, once shown, for a cut file."""
    notes: list[str] = []
    if os.path.isdir(name) and grid_cli.is_grid_name(name):
        return grid_cli.info_archive(args, name)
    if args.verify or name == "-":
        data = read_bytes(name)
        if args.verify:
            notes = loads(data).warnings
        head, size = read_head(io.BytesIO(data)), len(data)
    else:
        with open(name, "rb") as file:
            head, size = read_head(file), file.seek(0, os.SEEK_END)
    if size != head.file_size:
        notes = [f"the file has {size:,} bytes where its head says {head.file_size:,}: cut short or not whole"]
    row = {"input": name} | describe_head(head) | {"bytes": size, "warnings": notes}
    if bytes_cli.is_bytes(head):
        row |= bytes_cli.describe(head, name)
    if "width" in row:
        row["bpp"] = size * 8 / (row["width"] * row["height"])
    if args.json:
        write_line(json.dumps(row), sys.stdout)
    else:
        show_info(row, args.verify)
    if size != head.file_size:
        raise CorruptStream(notes[0])


def describe_head(head: Head) -> dict[str, Any]:
    """Plain values of a head. The header is not trusted: a stranger may have written it."""
    header = head.header
    row: dict[str, Any] = {"codec": head.codec, "preset": head.preset, "model_id": head.model_id.hex()}
    if grid_cli.is_grid(head):
        return row | grid_cli.describe(head) | {"segments": len(head.entries)}
    w, h, q = (header.get(k) for k in ("w", "h", "q"))
    if type(w) is int and type(h) is int and w > 0 and h > 0:
        row |= {"width": w, "height": h, "channels": header.get("c", 3), "depth": header.get("d", 8)}
        row |= {"format": clean(str(header.get("f", "PNG")), 20), "tiles": sum(e.name == "tile" for e in head.entries)}
        row["quality"] = q / 10 if type(q) is int else None
    row["segments"] = [{"name": e.name, "bytes": e.length, "critical": e.critical} for e in head.entries]
    return row


def show_info(row: dict[str, Any], verified: bool) -> None:
    """The lines of ``codec info`` for a person."""
    name = ":".join(filter(None, (row["codec"], row["preset"])))
    model = f", model {row['model_id']}" if row["model_id"] else ""
    lines = [f"{row['input']}: {row['bytes']:,} bytes, {name}{model}"]
    counts: dict[str, list[int]] = {}
    if "variables" in row:
        lines += grid_cli.show(row)
    if row.get("kind") == "bytes":
        lines += bytes_cli.show(row)
    for segment in [] if "variables" in row else row["segments"]:
        counts.setdefault(segment["name"], []).append(segment["bytes"])
    if "width" in row:
        colour = ("grey" if row["channels"] == 1 else "RGB") + (" with alpha" if "alpha" in counts else "")
        size = f"{row['width']}x{row['height']}, {colour}, {row['depth']} bit"
        lines.append(f"  {size}, {row['bpp']:.4f} bpp, quality {row['quality']}, from {row['format']}")
    if counts:
        lines.append("  " + ", ".join(f"{len(v)} x {k}: {sum(v):,} bytes" if len(v) > 1 else f"{k}: {v[0]:,} bytes"
                                      for k, v in counts.items()))  # fmt: skip
    lines += [f"  {warning}" for warning in row["warnings"]]
    if verified and not row["warnings"]:
        lines.append("  all checksums are right")
    for line in lines:
        write_line(line[: len(line) - len(line.lstrip())] + clean(line), sys.stdout)


def models(args: argparse.Namespace) -> int:
    from .codecs import registry

    cards = registry.describe()
    if args.json:
        print(json.dumps(cards))
        return 0
    if not cards:
        raise ModelMissing("no weights here; install the package again, or name their folder in NEURALCODEC_WEIGHTS")
    wide = max(len(f"{card['codec']}:{card['preset']} *") for card in cards) + 1
    print(f"{'model':<{wide}}{'id':<18}{'parameters':>12}{'kMAC/px enc/dec':>18}{'Kodak BD-rate vs VTM':>22}  file")
    for card in cards:
        macs = card.get("kmac_per_pixel")
        work = f"{macs['g_a'] + macs['entropy']:.1f} / {macs['g_s'] + macs['entropy']:.1f}" if macs else "-"
        similar = card.get("training", {}).get("recipe", {}).get("distortion") == "ms-ssim"
        bd = card.get("measured", {}).get("kodak", {}).get("bd_rate_vtm" + "_ms_ssim" * similar)
        name = f"{card['codec']}:{card['preset']}"
        mark = " *" if name in map(registry.default, ("image", "bytes")) else ""
        rate = ("not measured" if macs else "-") if bd is None else "MS-SSIM " * similar + f"{bd:+.1f} %"
        print(f"{name + mark:<{wide}}{card['model_id']:<18}{card['parameters']:>12,}{work:>18}"
              f"{rate:>22}  {os.path.basename(card['file'])}")  # fmt: skip
    print("\nBD-rate of PSNR, or of MS-SSIM for models that were trained for it; each card has the command.")
    print("* used when no model is asked for. More weights: folders in NEURALCODEC_WEIGHTS.")
    print("Without weights: nacrith:cm codes any file by context mixing alone.")
    return 0


# --- demo, bench, train, freeze ---------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> int:
    """Encode and decode a real photograph, say what it cost, and leave the pictures to look at."""
    import matplotlib.cbook
    import numpy as np
    from PIL import Image

    from .codecs import registry
    from .codecs.base import level_of
    from .codecs.image import decode_picture, encode_picture
    from .eval.metrics import ms_ssim, psnr_rgb
    from .media.image import Picture, read_picture

    codec = registry.load(*registry.split(args.model or registry.default("image")), device=device_of(args))
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        picture = Picture(read_picture(file.read()).pixels)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    encode_picture(codec, picture, level_of(args.quality))  # the first call builds tables: not what the clock is for
    start = time.perf_counter()
    data = dumps(encode_picture(codec, picture, level_of(args.quality)))
    middle = time.perf_counter()
    decoded = decode_picture(codec, loads(data)).pixels
    end = time.perf_counter()

    jpeg = b""
    for quality in range(1, 96):  # the best JPEG that is no larger
        buffer = io.BytesIO()
        Image.fromarray(picture.pixels).save(buffer, "JPEG", quality=quality, optimize=True)
        if len(buffer.getvalue()) > len(data) and jpeg:
            break
        jpeg = buffer.getvalue()
    other = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))

    (folder / f"demo{SUFFIX}").write_bytes(data)
    for label, pixels in (("original", picture.pixels), ("decoded", decoded), ("jpeg", other)):
        Image.fromarray(pixels).save(folder / f"demo_{label}.png")
    Image.fromarray(np.concatenate([picture.pixels, decoded, other], 1)).save(folder / "demo_side_by_side.png")
    pixels = picture.width * picture.height
    print(f"grace_hopper.jpg, {picture.width}x{picture.height}, {codec.name}:{codec.preset}, quality {args.quality:g}")
    print(f"{'':12}{'bytes':>9}{'bpp':>9}{'PSNR':>9}{'MS-SSIM':>9}")
    for label, size, result in (("neuralcodec", len(data), decoded), ("JPEG", len(jpeg), other)):
        quality = f"{psnr_rgb(picture.pixels, result):>9.2f}{ms_ssim(picture.pixels, result):>9.4f}"
        print(f"{label:12}{size:>9,}{size * 8 / pixels:>9.4f}{quality}")
    print(f"encoded in {middle - start:.2f} s, decoded in {end - middle:.2f} s")
    print(f"look at {folder / 'demo_side_by_side.png'}: original, neuralcodec, JPEG of at most the same size")
    return 0


def bench(args: argparse.Namespace) -> int:
    args.repeats = args.repeats or (1 if args.what == "bytes" else 7)
    if args.what == "coder":
        from .eval.bench_coder import main as run
    elif args.what == "curves":
        from .eval.bench_curves import main as run
    elif args.what == "grid":
        from .eval.bench_grid import main as run
    elif args.what == "bytes":
        from .eval.bench_bytes import main as run
    else:
        from .eval.bench_image import main as run
    return run(args)


# commands whose options live beside their work, so that torch is loaded only for them
LATE = {
    "train": (".train.loop", "train a codec"),
    "freeze": (".train.freeze", "turn a checkpoint into a weights file"),
}


def late(args: argparse.Namespace) -> int:
    return importlib.import_module(LATE[args.command][0], __package__).main(args)


# --- the parser -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Errors are one line here as everywhere, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"codec: {clean(message)}; see `{self.prog} --help`\n")


def _inputs(parser: argparse.ArgumentParser, verb: str) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"what to {verb}; - reads from a pipe")
    group = parser.add_argument_group("input and work")
    add = group.add_argument
    add("-r", "--recursive", action="store_true", help="take the files in folders, and in those below")
    add("--filelist", metavar="FILE", help="read more input names from FILE, one per line")
    add("-j", "--jobs", type=count_of(0), default=1, metavar="N", help="processes; 0: one per core (default 1)")
    add("--threads", type=count_of(1), metavar="N", help="threads of each process (default: all cores)")
    add("--device", choices=DEVICES, default="auto", help="default auto: cuda where there is one")
    add("--json", action="store_true", help="one JSON object per file on stdout")
    add("--quiet", action="store_true", help="say nothing but errors")
    parser.set_defaults(bars=True)


def _limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("limits, against files that ask for too much").add_argument
    add("--max-pixels", type=size_of, metavar="N", help=f"width times height (default {Limits.max_pixels})")
    add("--max-side", type=size_of, metavar="N", help=f"width and height (default {Limits.max_side})")
    add("--max-bytes", type=size_of, metavar="N", help=f"decoded size in memory (default {Limits.max_decoded_bytes})")


def _outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    where = group.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", metavar="FILE", help="name of the result (default: beside the input)")
    where.add_argument("-O", "--output-dir", metavar="DIR", help="folder for the results; made if it is not there")
    where.add_argument("-c", "--stdout", action="store_true", help="write to stdout")
    group.add_argument("-f", "--force", action="store_true", help="overwrite existing results")
    keep = group.add_mutually_exclusive_group()
    keep.add_argument("--keep", action="store_true", help="keep the input (default)")
    keep.add_argument("--rm", action="store_true", help="remove the input once its result is written")


def _model(parser: Any) -> None:
    parser.add_argument("-m", "--model", metavar="MODEL", help="codec:preset, see `codec models`")


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=count_of(1), metavar="N", help="threads (default: all cores)")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default auto: cuda where there is one")


def _quality(parser: Any) -> None:
    text = f"0 (smallest file) to 100 (best picture); default {DEFAULT_QUALITY:g}"
    parser.add_argument("-q", "--quality", type=between(0, 100), default=DEFAULT_QUALITY, metavar="Q", help=text)


def _encode_options(p: argparse.ArgumentParser) -> None:
    rate = p.add_argument_group("how good").add_mutually_exclusive_group()
    _quality(rate)
    rate.add_argument("--bpp", type=between(1e-4, 100), metavar="BITS", help="aim at this many bits per pixel")
    rate.add_argument("--psnr", type=between(1, 100), metavar="DB", help="aim at this PSNR in decibels")
    rate.add_argument("--size", type=size_of, metavar="BYTES", help="as good as fits into this many bytes (20k, 1.5M)")
    how = p.add_argument_group("how")
    which = how.add_mutually_exclusive_group()
    _model(which)
    which.add_argument("--fast", action="store_true", help="the fastest bundled model")
    which.add_argument("--best", action="store_true", help="the bundled model with the smallest files")
    how.add_argument(
        "-e", "--effort", type=int, choices=range(1, 10), metavar="1..9",
        help="1-3 is --fast, 4-6 the default model, 7-9 is --best, unless a model is named; "
             "7, 8 and 9 also search for a better latent, half a minute to two minutes for 768x512 pixels; "
             "other files: 1 is fastest, from 5 on text meets the language model, 9 is smallest (default 5)",
    )  # fmt: skip
    lengths = ", ".join(f"{n} for -e {effort}" for effort, n in ANNEALING.items())
    text = f"length of that search, with any effort and model (default {lengths})"
    how.add_argument("--iterations", type=count_of(0), metavar="N", help=text)
    how.add_argument("--verify", action="store_true", help="decode and compare before the result is written")
    how.add_argument("--strip", action="store_true", help="leave out EXIF, XMP and ICC data; turn the picture upright")
    text = "side of a tile in pixels, a multiple of 64; small ones need less memory (default 1024)"
    how.add_argument("--tile", type=count_of(64), default=1024, metavar="N", help=text)
    grid_cli.add_encode_arguments(p)
    bytes_cli.add_encode_arguments(p)
    _outputs(p)
    _inputs(p, "encode")
    _limits(p)


def _decode_options(p: argparse.ArgumentParser) -> None:
    how = p.add_argument_group("how")
    formats = sorted(s[1:] for s in PICTURES)
    how.add_argument(
        "--format", metavar="FORMAT", choices=[*formats, "original"],
        help=f"{', '.join(formats)}, or original: that of the encoded picture (default: by the name at -o, or png)",
    )  # fmt: skip
    how.add_argument("--roi", type=region, metavar="X,Y,W,H", help="only this region: left, top, width, height")
    grid_cli.add_decode_arguments(p)
    bytes_cli.add_decode_arguments(p)
    _outputs(p)
    _inputs(p, "decode")
    _limits(p)


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser. ``command`` tells which sub-command will run: only its options may need heavy modules."""
    parser = _Parser(
        prog="codec",
        description="Learned compression of pictures, fields and any files: encode, decode, measure, train.",
        epilog="`codec COMMAND --help` tells more.\n\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"codec {__version__}", help="show the version and exit")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from (or set NLC_DEBUG=1)")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    def verb(name: str, text: str, description: str, func: Callable, epilog: str = "") -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        p = sub.add_parser(name, help=text, description=description, epilog=epilog, formatter_class=raw)
        p.set_defaults(func=func)
        return p

    text = f"Compress pictures, fields, any files: photo.png -> photo{SUFFIX}, x.nc -> x{SUFFIX}, a.txt -> a.txt{SUFFIX}."
    p = verb("encode", "compress pictures, fields, any files", text, encode, ENCODE_EXAMPLES)
    _encode_options(p)

    p = verb("decode", "decompress", f"Decompress: photo{SUFFIX} -> photo.png.", decode, DECODE_EXAMPLES)
    _decode_options(p)

    text = "Check files: every checksum, and that the picture decodes. Writes nothing."
    p = verb("test", "check files by decoding them", text, test, EXIT_CODES)
    _inputs(p, "check")
    _limits(p)
    bytes_cli.add_test_arguments(p)

    text = f"Show what {SUFFIX} files say of themselves, without decoding them. Needs no weights."
    p = verb("info", "show what a file holds", text, info, EXIT_CODES)
    p.add_argument("files", nargs="+", metavar="FILE", help="what to look into; - reads from a pipe")
    p.add_argument("--json", action="store_true", help="one JSON object per file")
    p.add_argument("--verify", action="store_true", help="read everything and check all checksums")

    p = verb("models", "list the weights at hand", "List the models that can be used here.", models)
    p.add_argument("--json", action="store_true", help="the model cards as JSON")

    text = "Encode and decode a photograph that comes with matplotlib, beside a JPEG of the same size."
    p = verb("demo", "try it on a bundled photograph", text, demo)
    text = "folder for the pictures (default codec-demo)"
    p.add_argument("-O", "--out", default="codec-demo", metavar="DIR", help=text)
    _quality(p)
    _model(p)
    _machine(p)

    from .eval.cli import add_parsers, curves_arguments

    text = "Measure speed, beside peers in the same process."
    p = verb("bench", "measure speed", text, bench)
    text = "coder: the entropy coder; image: whole pictures; curves: time and memory against size and threads; grid: fields; "\
           "bytes: any files"
    p.add_argument("what", choices=("coder", "image", "curves", "grid", "bytes"), help=text)
    p.add_argument("files", nargs="*", metavar="FILE", help="pictures (default: a bundled photograph), fields, any files")
    p.add_argument("--max-error", metavar="VAR=TOL,...", help="bounds for grid, as those of codec encode")
    p.add_argument("--cra5", action="store_true", help="for grid: bits at mean squared errors, beside what CRA5 publishes; "
                   "-m vaeformer:PRESET: also at those of a network")  # fmt: skip
    _model(p)
    p.add_argument("--repeats", type=count_of(1), metavar="N", help="the median of so many runs (default 7; bytes 1)")
    p.add_argument("-e", "--effort", type=int, choices=range(1, 10), default=5, metavar="1..9", help="for bytes (default 5)")
    p.add_argument("--ablate", action="store_true", help="for bytes: also the sizes without each part of the coder")
    p.add_argument("--threads", type=count_of(1), metavar="N", help="threads (default: all cores)")
    p.add_argument("--json", action="store_true", help="the figures as JSON on stdout")
    curves_arguments(p.add_argument_group("curves"))

    add_parsers(sub)
    for name, (module, text) in LATE.items():
        p = verb(name, text, text[0].upper() + text[1:] + ".", late)
        if command == name:
            importlib.import_module(module, __package__).add_arguments(p)
    return parser


def _leave_on_sigterm() -> None:
    """Let SIGTERM end the process through its ``finally`` blocks, so that no partial file stays."""
    with contextlib.suppress(ValueError):  # not in the main thread: the caller's affair
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _hush() -> None:
    """What libraries warn of is for their programmers, not for the user of this command."""
    if not os.environ.get("NLC_DEBUG"):
        warnings.simplefilter("ignore")


def _quiet_stdout() -> None:
    """Flush stdout now, and where that fails send the rest to nowhere: Python would complain at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``codec`` command; the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--debug" in argv[: argv.index("--") if "--" in argv else None]:
        argv.remove("--debug")
        os.environ["NLC_DEBUG"] = "1"  # the environment also reaches the processes of -j
    _leave_on_sigterm()
    _hush()
    try:
        args = build_parser(argv[0] if argv else None).parse_args(argv)
        return args.func(args)
    except BrokenPipeError:  # the reader has seen enough
        return 1
    except KeyboardInterrupt:
        say("codec: interrupted")
        return 130
    except Exception as error:
        return complain(error)
    finally:
        _quiet_stdout()


if __name__ == "__main__":
    raise SystemExit(main())
