"""``codec bench image``: whole pictures in one running process, per stage, beside peers in the same run."""

from __future__ import annotations

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import matplotlib.cbook
import numpy as np
import torch
from PIL import Image

from ..codecs import registry
from ..codecs.base import level_of
from ..codecs.image import decode_picture, encode_picture
from ..container.format import dumps, loads
from ..media.image import Picture, read_picture


def _median(call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def stages(codec, picture: Picture, level: int, repeats: int) -> dict[str, float]:
    """Median seconds of the stages of one tile that holds the whole picture."""
    h, w = (-(-n // codec.tile_multiple) * codec.tile_multiple for n in (picture.height, picture.width))
    pixels = np.pad(picture.pixels, ((0, h - picture.height), (0, w - picture.width), (0, 0)), "edge")
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / picture.peak
    with torch.inference_mode():
        x = x.expand(1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        y = codec.analyse(x, level)
        payload, y_hat = codec.encode_latent(y, level)
        return {
            "analyse": _median(lambda: codec.analyse(x, level), repeats),
            "entropy_encode": _median(lambda: codec.encode_latent(y, level), repeats),
            "entropy_decode": _median(lambda: codec.decode_latent(payload, *y.shape[2:], level), repeats),
            "synthesise": _median(lambda: codec.synthesise(y_hat, level), repeats),
        }


def _pillow(picture: Picture, repeats: int) -> dict[str, dict[str, float]]:
    image = Image.fromarray(picture.pixels.squeeze())
    rows = {}
    formats = {"JPEG": {"quality": 90}, "WEBP": {"quality": 90, "method": 6}, "AVIF": {"quality": 75, "speed": 4}}
    for name, options in formats.items():

        def encode(name=name, options=options) -> bytes:
            buffer = io.BytesIO()
            image.save(buffer, name, **options)
            return buffer.getvalue()

        try:
            data = encode()
        except (KeyError, OSError):  # this Pillow was built without it
            continue
        rows[name.lower()] = {
            "encode": _median(encode, repeats),
            "decode": _median(lambda data=data: Image.open(io.BytesIO(data)).load(), repeats),
            "bytes": len(data),
        }
    return rows


def _compressai(picture: Picture) -> dict[str, dict[str, float]]:
    """CompressAI's mbt2018 (serial context model). Its speed does not depend on the weights, so random ones will do."""
    try:
        from compressai.zoo import mbt2018
    except ImportError:
        return {}
    model = mbt2018(1, pretrained=False).eval()
    model.update(force=True)
    h, w = (n // 64 * 64 for n in (picture.height, picture.width))
    x = torch.from_numpy(picture.pixels[:h, :w].copy()).permute(2, 0, 1)[None].float() / picture.peak
    with torch.inference_mode():
        start = time.perf_counter()
        out = model.compress(x)
        middle = time.perf_counter()
        model.decompress(out["strings"], out["shape"])
        end = time.perf_counter()
    return {"compressai mbt2018": {"encode": middle - start, "decode": end - middle, "bytes": 0}}


def bench_image(picture: Picture, model: str | None = None, level: int = 500, repeats: int = 7) -> dict[str, Any]:
    """Encode and decode seconds of ours and of the peers, and our stages."""
    codec = registry.load(*registry.split(model or registry.default("image")))
    data = dumps(encode_picture(codec, picture, level))
    ours = {
        "encode": _median(lambda: dumps(encode_picture(codec, picture, level)), repeats),
        "decode": _median(lambda: decode_picture(codec, loads(data)), repeats),
        "bytes": len(data),
    }
    name = f"{codec.name}:{codec.preset}"
    rows = {name: ours} | _pillow(picture, repeats) | _compressai(picture)
    return {
        "model": name, "width": picture.width, "height": picture.height, "threads": torch.get_num_threads(),
        "level": level, "seconds": rows, "stages": stages(codec, picture, level, repeats),
    }  # fmt: skip


def main(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.files:
        with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
            pictures = [("grace_hopper.jpg", read_picture(file.read()))]
    else:
        pictures = [(name, read_picture(name)) for name in args.files]
    for name, picture in pictures:
        result = bench_image(picture, args.model, level_of(50), args.repeats)
        if args.json:
            print(json.dumps({"file": name} | result))
            continue
        print(f"{name}, {result['width']}x{result['height']}, {result['threads']} threads, median of {args.repeats}")
        print(f"{'':22}{'encode s':>10}{'decode s':>10}{'bytes':>10}   decode time of ours is")
        ours = result["seconds"][result["model"]]["decode"]
        for peer, row in result["seconds"].items():
            longer = row["decode"] > ours
            ratio = f"1/{row['decode'] / ours:.1f}" if longer else f"{ours / row['decode']:.1f} x"
            ratio = "" if peer == result["model"] else ratio
            print(f"{peer:22}{row['encode']:>10.3f}{row['decode']:>10.3f}{row['bytes']:>10,}   {ratio}")
        print("stages: " + ", ".join(f"{k} {v:.3f}" for k, v in result["stages"].items()))
    return 0
