"""Peers for any bytes: the general compressors that people have. A setting is the level (ppmd: the order)."""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import ClassVar

from .peers import Imagecodecs, Peer, missing


class BytesPeer(Peer):
    """bytes -> bytes, without loss."""

    kind = "bytes"


class Zlib(BytesPeer):
    name, about = "zlib", "DEFLATE"
    settings = (1, 6, 9)

    def library(self) -> str:
        return f"zlib {zlib.ZLIB_RUNTIME_VERSION}"

    def encode(self, sample: bytes, setting: float) -> bytes:
        return zlib.compress(sample, int(setting))

    def decode(self, data: bytes) -> bytes:
        return zlib.decompress(data)


class Bz2(BytesPeer):
    name, about = "bz2", "Burrows-Wheeler; the level is the block in 100 kB"
    settings = (1, 9)

    def library(self) -> str:
        return "libbzip2"  # Python does not tell its version

    def encode(self, sample: bytes, setting: float) -> bytes:
        return bz2.compress(sample, int(setting))

    def decode(self, data: bytes) -> bytes:
        return bz2.decompress(data)


class Lzma(BytesPeer):
    name, about = "lzma", ".xz, extreme presets, CRC32"
    settings = (3, 6, 9)

    def library(self) -> str:
        return "liblzma"  # Python does not tell its version

    def encode(self, sample: bytes, setting: float) -> bytes:
        return lzma.compress(sample, check=lzma.CHECK_CRC32, preset=int(setting) | lzma.PRESET_EXTREME)

    def decode(self, data: bytes) -> bytes:
        return lzma.decompress(data)


class Zstd(Imagecodecs, BytesPeer):
    name, about, key = "zstd", "Zstandard", "zstd"
    settings = (1, 3, 12, 19, 22)

    def encode(self, sample: bytes, setting: float) -> bytes:
        return self.package.zstd_encode(sample, level=int(setting))

    def decode(self, data: bytes) -> bytes:
        return bytes(self.package.zstd_decode(data))


class Brotli(Imagecodecs, BytesPeer):
    name, about, key = "brotli", "Brotli, window of 16 MiB", "brotli"
    settings = (1, 6, 9, 11)

    def encode(self, sample: bytes, setting: float) -> bytes:
        return self.package.brotli_encode(sample, level=int(setting), lgwin=24)

    def decode(self, data: bytes) -> bytes:
        return bytes(self.package.brotli_decode(data))


class Ppmd(BytesPeer):
    name, about = "ppmd", "PPMd variant H (7-Zip), 256 MiB; the setting is the order"
    settings = (4, 6, 8)  # pyppmd 1.3 writes beyond its memory at order 16
    memory: ClassVar[int] = 256 << 20

    def library(self) -> str:
        try:
            import pyppmd
        except ImportError:
            raise missing(self.name, "pyppmd") from None
        self.package = pyppmd
        return f"pyppmd {pyppmd.__version__}"

    # PPMd has no end mark: the length and the order go in front, as in every archive that holds it
    def encode(self, sample: bytes, setting: float) -> bytes:
        head = bytes([int(setting)]) + len(sample).to_bytes(8, "little")
        encoder = self.package.Ppmd7Encoder(int(setting), self.memory)
        return head + encoder.encode(sample) + encoder.flush()

    def decode(self, data: bytes) -> bytes:
        length, left = int.from_bytes(data[1:9], "little"), data[9:]
        decoder, parts = self.package.Ppmd7Decoder(data[0], self.memory), []
        while length:
            part = decoder.decode(left, length)
            if not part and not left:
                raise ValueError("the stream ends early")
            parts.append(part)
            length, left = length - len(part), b""
        return b"".join(parts)


PEERS = (Zlib, Bz2, Lzma, Zstd, Brotli, Ppmd)
