"""``codec bench coder``: the entropy coder alone, beside CompressAI's rANS in the same run."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..entropy.coder import Decoder, Encoder
from ..entropy.gaussian import SCALES, gaussian_tables

SYMBOLS = 400_000


def _median_seconds(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bench_coder(repeats: int = 7, symbols: int = SYMBOLS, seed: int = 0) -> dict[str, Any]:
    """Gaussian symbols over 64 scale classes: million symbols per second each way, and bytes beside the ideal.

    CompressAI codes the same symbols with its own tables of the same scales (16 bits), where it is installed.
    """
    rng = np.random.default_rng(seed)
    indexes = rng.integers(0, len(SCALES), symbols).astype(np.uint8)
    values = np.rint(rng.normal(size=symbols) * np.array(SCALES)[indexes]).astype(np.int32)
    tables = gaussian_tables()

    def encode() -> bytes:
        encoder = Encoder()
        encoder.put(values, indexes, tables)
        return encoder.finish()

    payload = encode()

    def decode() -> np.ndarray:
        decoder = Decoder(payload)
        got = decoder.get(indexes, tables)
        decoder.finish()
        return got

    if not np.array_equal(decode(), values):
        raise AssertionError("the coder does not give back what it took")
    ideal = float(tables.bits(values, indexes).sum()) / 8
    rows = {
        "neuralcodec": {
            "encode": symbols / _median_seconds(encode, repeats) / 1e6,
            "decode": symbols / _median_seconds(decode, repeats) / 1e6,
            "bytes": len(payload),
            "ideal_bytes": ideal,
        }
    }
    if peer := _compressai(values, indexes, repeats):
        rows["compressai"] = peer
    return {"symbols": symbols, "classes": len(SCALES), "repeats": repeats, "coders": rows}


def _compressai(values: np.ndarray, indexes: np.ndarray, repeats: int) -> dict[str, float] | None:
    try:
        import torch
        from compressai.ans import RansDecoder, RansEncoder
        from compressai.entropy_models import GaussianConditional
    except ImportError:
        return None
    model = GaussianConditional(None)
    model.update_scale_table(list(SCALES))
    cdf, lengths, offsets = (t.tolist() for t in (model.quantized_cdf, model.cdf_length, model.offset))
    as_list, symbols = indexes.astype(np.int32), torch.from_numpy(values)

    # lists are part of its interface, so making them belongs to the time
    def encode() -> bytes:
        return RansEncoder().encode_with_indexes(symbols.tolist(), as_list.tolist(), cdf, lengths, offsets)

    payload = encode()

    def decode() -> list[int]:
        return RansDecoder().decode_with_indexes(payload, as_list.tolist(), cdf, lengths, offsets)

    if decode() != values.tolist():
        raise AssertionError("CompressAI does not give back what it took")
    return {
        "encode": len(values) / _median_seconds(encode, repeats) / 1e6,
        "decode": len(values) / _median_seconds(decode, repeats) / 1e6,
        "bytes": len(payload),
    }


def main(args: argparse.Namespace) -> int:
    result = bench_coder(args.repeats)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"{result['symbols']:,} Gaussian symbols, {result['classes']} scale classes, median of {result['repeats']}")
    print(f"{'':14}{'encode':>12}{'decode':>12}{'bytes':>10}  million symbols per second")
    for name, row in result["coders"].items():
        print(f"{name:14}{row['encode']:>12.1f}{row['decode']:>12.1f}{row['bytes']:>10,}")
    ours = result["coders"]["neuralcodec"]
    print(f"ideal {ours['ideal_bytes']:,.1f} bytes: overhead {100 * (ours['bytes'] / ours['ideal_bytes'] - 1):.4f} %")
    return 0
