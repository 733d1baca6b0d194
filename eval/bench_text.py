"""What each part of the text coder is worth: whole files coded with all of it, then with one part left out after the other.

    python -m neuralcodec.eval.bench_text alice29.txt [--model nacrith:light] [--json]

Bytes are those of the code that ``decode_text`` gets (a file adds about 50). Every code is decoded and compared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..codecs.registry import split, weights_path
from ..entropy.bytes.language import Model
from ..entropy.bytes.text import COMPONENTS, TextOptions, decode_text, encode_text


def ablation(data: bytes, model: Model) -> dict[str, dict[str, float]]:
    """Bytes, bits per byte, and seconds both ways: of everything, without each component, and of some sets of them.

    AssertionError where a code does not decode to ``data``.
    """
    everything = TextOptions()
    contexts = ("tokens", "bytes", "words", "format", "match", "runs", "histories")
    cases = {"everything": everything}
    cases |= {f"without {name}": everything.without(name) for name in COMPONENTS}
    cases["without all contexts"] = everything.without(*contexts)
    cases["without all contexts, adaptation"] = everything.without(*contexts, "adaptation")
    encode_text(b"compiled before the clock starts", model)
    rows = {}
    for name, options in cases.items():
        start = time.perf_counter()
        code = encode_text(data, model, options)
        between = time.perf_counter()
        assert decode_text(code, len(data), model, options) == data, name
        end = time.perf_counter()
        rows[name] = {"bytes": len(code), "bpb": 8 * len(code) / max(len(data), 1),
                      "encode_s": between - start, "decode_s": end - between}  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    """Print a table for each file."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m neuralcodec.eval.bench_text", description=about)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default="nacrith:light", help="codec and preset whose language model is used")
    parser.add_argument("--json", action="store_true", help="one JSON object, by file")
    args = parser.parse_args(argv)
    model = Model.load(weights_path(*split(args.model)))
    result: dict[str, Any] = {}
    for path in args.files:
        data = path.read_bytes()
        rows = result[path.name] = ablation(data, model)
        if not args.json:
            whole = rows["everything"]["bytes"]
            print(f"{path.name}, {len(data):,} bytes, {args.model} {model.model_id.hex()}")
            for name, row in rows.items():
                speeds = (len(data) / 1000 / row[key] for key in ("encode_s", "decode_s"))
                print(f"  {name:<34}{row['bytes']:>9,}{row['bpb']:>8.3f} bpb{row['bytes'] / whole - 1:>+8.2%}"
                      f"{''.join(f'{speed:>8.1f}' for speed in speeds)} kB/s", flush=True)  # fmt: skip
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
