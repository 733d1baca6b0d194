"""neuralcodec: learned codecs for pictures, with trained weights, exact entropy coding and a file format that lasts.

    from neuralcodec import decode_picture, dumps, encode_picture, load, load_for, loads, read_picture

    codec = load("hyperprior", "light")
    data = dumps(encode_picture(codec, read_picture("photo.png"), level=500))  # level 0..1000 is quality 0..100
    stream = loads(data)
    pixels = decode_picture(load_for(stream), stream).pixels                   # (H, W, 3) uint8

Importing the package is cheap; these names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Picture": ".media.image",
    "read_picture": ".media.image",
    "write_picture": ".media.image",
    "encode_picture": ".codecs.image",
    "decode_picture": ".codecs.image",
    "load": ".codecs.registry",
    "load_for": ".codecs.registry",
    "Limits": ".container.format",
    "Stream": ".container.format",
    "dumps": ".container.format",
    "loads": ".container.format",
    "CodecError": ".container.errors",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
