"""``codec bench bytes``: sizes and speeds on whole files beside the compressors that people have; what each part is worth."""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..codecs import bytefile, registry
from ..container.errors import CodecError, UsageError
from ..container.format import read_head
from ..entropy.bytes import binary, blocks, framing
from .peers_bytes import Brotli, BytesPeer, Lzma, Ppmd, Zlib, Zstd

PEERS: tuple[tuple[str, type[BytesPeer], int], ...] = (
    ("zlib 9", Zlib, 9), ("xz 9e", Lzma, 9), ("ppmd 6", Ppmd, 6), ("brotli 11", Brotli, 11), ("zstd 22", Zstd, 22),
)  # fmt: skip
REFERENCE = "xz 9e"
# what the contexts of ``binary`` look at
PARTS: dict[str, tuple[int, ...]] = {
    "orders 4 and up": (4, 5, 6, 7),
    "words": (8, 9, 10, 11),
    "lines, fields, brackets": (12, 13, 14, 15, 16, 17, 18, 19, 20),
    "sparse": tuple(range(21, 31)),
    "records": tuple(range(31, 43)),
    "rows": tuple(range(43, 50)),
    "expected by match": (50, 51),
}


def _timed(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """(result, least seconds)."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return result, best


def measure(codec: bytefile.BytesCodec, data: bytes, effort: int, jobs: int, repeats: int) -> dict[str, dict[str, float]]:
    """bytes, encode_s, decode_s of ours and of the peers; ours in bytes of a file on the disk. CodecError on a difference."""
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.nlc")

        def encode() -> None:
            with open(path, "wb") as out:
                bytefile.encode_file(codec, io.BytesIO(data), out, effort, jobs)

        def decode() -> bytes:
            out = io.BytesIO()
            with open(path, "rb") as file:
                head = read_head(file)
                bytefile.decode_file(registry.load_for(head), head, file, out, jobs)  # type: ignore[arg-type]
            return out.getvalue()

        _, encode_s = _timed(encode, repeats)
        back, decode_s = _timed(decode, repeats)
        if back != data:
            raise CodecError("other bytes came back")
        rows["ours"] = {"bytes": path.stat().st_size, "encode_s": encode_s, "decode_s": decode_s}
    for name, cls, setting in PEERS:
        try:
            peer = cls()
            peer.library()
        except UsageError:  # not installed
            continue
        coded, encode_s = _timed(lambda peer=peer, setting=setting: peer.encode(data, setting), repeats)
        _, decode_s = _timed(lambda peer=peer, coded=coded: peer.decode(coded), repeats)
        rows[name] = {"bytes": len(coded), "encode_s": encode_s, "decode_s": decode_s}
    return rows


def ablate(codec: bytefile.BytesCodec, data: bytes, effort: int) -> dict[str, int]:
    """Bytes of code with everything, and without each part, of what codes the first block of a file."""
    data = data[: framing.BLOCK]
    block = codec.encode_block(data, effort)[0]
    what = framing.describe(block)
    data = data[: what.length]
    if what.method == framing.MIXED:
        array, _, kind, stride, row = blocks.prepare(np.frombuffer(data, np.uint8), effort)
        plan = binary.plan_of(effort, kind)

        def size(changed: binary.Plan) -> int:
            return len(binary.encode(array, changed, stride, row, room=2 * len(data) + 64) or b"")

        sizes = {"everything": size(plan)}
        for title, numbers in PARTS.items():
            left = tuple(c for c in plan.contexts if c not in numbers)
            if left != plan.contexts:
                sizes[f"without {title}"] = size(replace(plan, contexts=left))
        if plan.pixels:
            sizes["without pixels"] = size(replace(plan, pixels=False))
        sizes["without match models"] = size(replace(plan, matches=0))
        if plan.refine:
            sizes["without refinement"] = size(replace(plan, refine=False))
        return sizes
    if what.method == framing.TEXT:
        from ..entropy.bytes import text

        model = codec.coder.model  # type: ignore[union-attr]
        sizes = {"everything": len(text.encode_text(data, model, text.TextOptions()))}
        for title in text.COMPONENTS:
            sizes[f"without {title}"] = len(text.encode_text(data, model, text.TextOptions().without(title)))
        return sizes
    return {framing.METHODS[what.method]: len(block)}


def _weights_bytes(name: str, preset: str) -> int:
    try:
        return registry.weights_path(name, preset).stat().st_size
    except CodecError:
        return 0


def bench_bytes(
    files: Iterable[str], model: str | None = None, effort: int = 5, jobs: int = 1, repeats: int = 1, with_parts: bool = False
) -> dict[str, Any]:
    """Rows by file: sizes, seconds, and with ``with_parts`` sizes without each part; the bytes of the weights beside them."""
    name, preset = registry.split(model or registry.default("bytes"))
    codec: Any = registry.load(name, preset)
    if codec.kind != "bytes":
        raise UsageError(f"{name} does not code bytes")
    codec.encode_block(b"compile and load before the clock runs " * 40, effort)
    rows = {}
    for file in files:
        data = Path(file).read_bytes()
        rows[os.path.basename(file)] = row = {"length": len(data), "coders": measure(codec, data, effort, jobs, repeats)}
        if with_parts:
            row["parts"] = ablate(codec, data, effort)
    weights = _weights_bytes(name, preset)
    return {"model": f"{name}:{preset}", "effort": effort, "jobs": jobs, "weights_bytes": weights, "files": rows}


def show(result: dict[str, Any]) -> None:
    """The tables for a person."""
    print(f"{result['model']}, effort {result['effort']}, {result['jobs']} jobs; weights: {result['weights_bytes']:,} bytes")
    coders = list(next(iter(result["files"].values()))["coders"])
    print(f"\n{'bytes':18}{'original':>11}" + "".join(f"{c:>11}" for c in coders) + f"{'bpb':>8}{'to xz':>8}")
    totals = dict.fromkeys(["length", *coders], 0)
    for file, row in result["files"].items():
        sizes = {c: int(row["coders"][c]["bytes"]) for c in coders}
        for key, value in (sizes | {"length": row["length"]}).items():
            totals[key] += value
        print(_line(file, row["length"], sizes))
    if len(result["files"]) > 1:
        print(_line("all", totals["length"], {c: totals[c] for c in coders}))
        with_weights = totals["ours"] + result["weights_bytes"]
        print(f"{'ours with weights':18}{'':11}{with_weights:>11,}")
    for way in ("encode", "decode"):
        print(f"\n{f'{way}, kB/s':18}{'':11}" + "".join(f"{c:>11}" for c in coders) + f"{'xz / ours':>11}")
        for file, row in result["files"].items():
            speeds = {c: row["length"] / 1e3 / max(row["coders"][c][f"{way}_s"], 1e-9) for c in coders}
            ratio = speeds[REFERENCE] / speeds["ours"]
            print(f"{file[:18]:18}{'':11}" + "".join(f"{speeds[c]:>11,.1f}" for c in coders) + f"{ratio:>11.1f}")
    for file, row in result["files"].items():
        if "parts" in row:
            print(f"\n{file}: bytes of code")
            whole = next(iter(row["parts"].values()))
            for title, size in row["parts"].items():
                print(f"  {title:34}{size:>10,}{100 * (size / whole - 1):>+9.2f} %")


def _line(file: str, length: int, sizes: dict[str, int]) -> str:
    bits = f"{8 * sizes['ours'] / length:>8.3f}" if length else f"{'-':>8}"
    share = f"{100 * (sizes['ours'] / sizes[REFERENCE] - 1):>+7.1f}%"
    return f"{file[:18]:18}{length:>11,}" + "".join(f"{size:>11,}" for size in sizes.values()) + bits + share


def main(args: argparse.Namespace) -> int:
    if not args.files:
        raise UsageError("bench bytes: which files?")
    result = bench_bytes(args.files, args.model, args.effort, args.threads or 1, args.repeats, args.ablate)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0
