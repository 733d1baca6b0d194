"""Peer codecs: settings from bad to good, RGB pixels to bytes and back. Libraries load when a peer is made.

The settings span the qualities that people use; BD-rates of codecs as far apart as JPEG and VTM depend on that span,
so it is part of a peer. ``codec eval --peers module:Class`` takes a peer of one's own. """

from __future__ import annotations

import importlib
import io
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from ..container.errors import UsageError
from .subject import Subject


class Peer(Subject):
    """A codec that we measure against. A missing library is a UsageError when the peer is made."""

    name: ClassVar[str]
    about: ClassVar[str]  # library and options
    settings: ClassVar[tuple[float, ...]]

    def __init__(self) -> None:
        self.describe = self.identity = f"{self.about} ({self.library()})"

    @abstractmethod
    def library(self) -> str:
        """Name and version of the library: part of the identity. UsageError where it is missing."""


class _Pillow(Peer):
    """A format that Pillow writes. ``feature`` is Pillow's name of the library behind it."""

    format: ClassVar[str]
    feature: ClassVar[str]
    options: ClassVar[dict[str, Any]]

    def library(self) -> str:
        from PIL import features

        if not features.check(self.feature):
            raise UsageError(f"peer {self.name}: this Pillow was built without {self.feature}")
        return f"{self.feature} {features.version(self.feature)}"

    def encode(self, rgb: np.ndarray, setting: float) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(rgb).save(buffer, self.format, quality=int(setting), **self.options)
        return buffer.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))


class Jpeg(_Pillow):
    name, about = "jpeg", "libjpeg-turbo, 4:2:0, optimised Huffman tables"
    format, feature = "JPEG", "libjpeg_turbo"
    settings = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98)
    options = {"subsampling": "4:2:0", "optimize": True}


class Jpeg444(Jpeg):
    name, about = "jpeg-444", "libjpeg-turbo, 4:4:4, optimised Huffman tables"
    options = {"subsampling": "4:4:4", "optimize": True}


class WebP(_Pillow):
    name, about = "webp", "libwebp, method 6"
    format, feature = "WEBP", "webp"
    settings = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)
    options = {"method": 6}


class Avif(_Pillow):
    name, about = "avif", "libavif, speed 4, 4:4:4"
    format, feature = "AVIF", "avif"
    settings = (10, 20, 30, 40, 50, 60, 70, 80, 90)
    options = {"speed": 4, "subsampling": "4:4:4", "max_threads": 1}


class _Imagecodecs(Peer):
    """A codec of the package imagecodecs. ``key`` starts its entry in the list of library versions."""

    key: ClassVar[str]

    def library(self) -> str:
        try:
            import imagecodecs
        except ImportError:
            raise UsageError(f"peer {self.name}: needs the package imagecodecs: pip install imagecodecs") from None
        found = next((v for v in imagecodecs.version().split(", ") if v.startswith(self.key + "-")), f"{self.key}-n/a")
        if found.endswith("n/a"):
            raise UsageError(f"peer {self.name}: this imagecodecs was built without {self.key}")
        self.package = imagecodecs
        return found.replace("-", " ", 1)


class Jxl(_Imagecodecs):
    name, about, key = "jxl", "libjxl, VarDCT, effort 7; the setting is the distance, negated", "libjxl"
    settings = (-15, -12, -10, -8, -6, -5, -4, -3, -2, -1.5, -1, -0.8, -0.5, -0.3)

    def encode(self, rgb: np.ndarray, setting: float) -> bytes:
        return self.package.jpegxl_encode(rgb, distance=-setting, effort=7, lossless=False, numthreads=1)

    def decode(self, data: bytes) -> np.ndarray:
        return self.package.jpegxl_decode(data)[..., :3]


class Jpeg2000(_Imagecodecs):
    name, about, key = "jpeg2000", "OpenJPEG, 9-7 wavelet; the setting is the PSNR asked for", "openjpeg"
    settings = (26, 28, 30, 32, 34, 36, 38, 40, 42)

    def encode(self, rgb: np.ndarray, setting: float) -> bytes:
        return self.package.jpeg2k_encode(rgb, level=setting, codecformat="jp2", reversible=False, numthreads=1)

    def decode(self, data: bytes) -> np.ndarray:
        return self.package.jpeg2k_decode(data)


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Jpeg, Jpeg444, WebP, Avif, Jxl, Jpeg2000)}


def peer(name: str) -> Peer:
    """A peer by name, or ``module:Class`` of somebody else's. UsageError for an unknown or unavailable one."""
    if name in PEERS:
        return PEERS[name]()
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"peer {name}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Peer)):
        raise UsageError(f"there is no peer {name!r}; known are {', '.join(PEERS)}, and module:Class of a Peer")
    return found()
