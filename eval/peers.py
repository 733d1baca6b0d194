"""Peer codecs with one contract: settings from bad to good, RGB pixels to bytes and back. Libraries load when used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from ..container.errors import UsageError


class Peer(ABC):
    """A codec that we measure against. ``settings`` span its quality range."""

    name: ClassVar[str]
    describe: ClassVar[str]
    settings: ClassVar[tuple[float, ...]]

    @abstractmethod
    def encode(self, rgb: np.ndarray, setting: float) -> bytes:
        """(H, W, 3) uint8 -> a file's bytes."""

    @abstractmethod
    def decode(self, data: bytes) -> np.ndarray:
        """A file's bytes -> (H, W, 3) uint8."""


def _imagecodecs():
    try:
        import imagecodecs
    except ImportError as error:
        raise UsageError("this peer needs the package imagecodecs: pip install 'neuralcodec[peers]'") from error
    return imagecodecs


class Jpeg(Peer):
    name, describe = "jpeg", "libjpeg-turbo, 4:2:0, optimised"
    settings = (10, 20, 30, 40, 50, 60, 70, 80, 88, 94)

    def encode(self, rgb, setting):
        return _imagecodecs().jpeg8_encode(rgb, level=int(setting), subsampling="420", optimize=True)

    def decode(self, data):
        return _imagecodecs().jpeg8_decode(data)


class WebP(Peer):
    name, describe = "webp", "libwebp, method 6"
    settings = (1, 10, 25, 40, 55, 70, 80, 88, 94, 98)

    def encode(self, rgb, setting):
        return _imagecodecs().webp_encode(rgb, level=setting, method=6, lossless=False)

    def decode(self, data):
        return _imagecodecs().webp_decode(data)[..., :3]


class Avif(Peer):
    name, describe = "avif", "libavif, speed 4, 4:4:4"
    settings = (10, 20, 30, 40, 50, 60, 70, 80, 88)

    def encode(self, rgb, setting):
        return _imagecodecs().avif_encode(rgb, level=int(setting), speed=4, pixelformat="444", numthreads=1)

    def decode(self, data):
        return _imagecodecs().avif_decode(data)[..., :3]


class Jxl(Peer):
    name, describe = "jxl", "libjxl, VarDCT, effort 7; the setting is the distance, negated"
    settings = (-12.0, -8.0, -5.0, -3.5, -2.5, -1.8, -1.2, -0.8, -0.5)

    def encode(self, rgb, setting):
        return _imagecodecs().jpegxl_encode(rgb, distance=-setting, effort=7, lossless=False)

    def decode(self, data):
        return _imagecodecs().jpegxl_decode(data)[..., :3]


class Jpeg2000(Peer):
    name, describe = "jpeg2000", "OpenJPEG, 9-7 wavelet; the setting is the PSNR asked for"
    settings = (26, 28, 30, 32, 34, 36, 38, 40, 42)

    def encode(self, rgb, setting):
        return _imagecodecs().jpeg2k_encode(rgb, level=setting, codecformat="jp2", reversible=False)

    def decode(self, data):
        return _imagecodecs().jpeg2k_decode(data)


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Jpeg, WebP, Avif, Jxl, Jpeg2000)}
