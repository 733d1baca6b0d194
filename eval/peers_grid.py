"""Peers for fields on a grid, (N, H, W) float32: the compressors of the scientific community.

A setting of the error-bounded ones is the bound as a fraction of the field's range (largest minus smallest value). Every
file begins with the shape, which some of the libraries do not keep. """

from __future__ import annotations

import struct
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..container.errors import UnsupportedInput
from .peers import Imagecodecs
from .subject import Subject

if TYPE_CHECKING:
    from .kinds import Field

BOUNDS = (3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5)
_SHAPE = struct.Struct("<III")


class GridPeer(Imagecodecs):
    """float32 (N, H, W) -> a file's bytes; fields with missing or infinite values are refused (UnsupportedInput)."""

    kind = "grid"

    def encode(self, sample: np.ndarray, setting: float) -> bytes:
        if not np.isfinite(sample).all():
            raise UnsupportedInput(f"{self.name} cannot code missing or infinite values")
        return _SHAPE.pack(*sample.shape) + self._encode(np.ascontiguousarray(sample, np.float32), setting)

    def decode(self, data: bytes) -> np.ndarray:
        shape = _SHAPE.unpack_from(data)
        return np.asarray(self._decode(data[_SHAPE.size :], shape)).reshape(shape)

    def bound(self, sample: np.ndarray, setting: float) -> float | None:
        return bound_of(sample, setting) if self.settings is BOUNDS else None

    @abstractmethod
    def _encode(self, values: np.ndarray, setting: float) -> bytes: ...

    @abstractmethod
    def _decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray: ...


def bound_of(values: np.ndarray, fraction: float) -> float:
    """The absolute bound of a relative one. A constant field gets a bound that changes nothing of it."""
    return float(np.ptp(values.astype(np.float64)) * fraction) or float(np.finfo(np.float32).tiny)


def _squeezed(values: np.ndarray) -> np.ndarray:
    """Without axes of length 1: the libraries predict along every axis that they are told of."""
    return values.reshape([n for n in values.shape if n > 1] or [1])


class Sz3(GridPeer):
    name, about, key = "sz3", "SZ3, absolute bound; the setting is the bound over the range", "sz3"
    settings = BOUNDS

    def _encode(self, values: np.ndarray, setting: float) -> bytes:
        return self.package.sz3_encode(_squeezed(values), mode="abs", abs=bound_of(values, setting))

    def _decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        return self.package.sz3_decode(data, [n for n in shape if n > 1] or [1], np.dtype(np.float32))


class Sz3Planes(Sz3):
    """Without what neighbouring levels or times tell."""

    name, about = "sz3-2d", "SZ3, absolute bound, each level alone; the setting is the bound over the range"

    def _encode(self, values: np.ndarray, setting: float) -> bytes:
        bound = bound_of(values, setting)
        return _join([self.package.sz3_encode(_squeezed(v), mode="abs", abs=bound) for v in values])

    def _decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        return np.stack([Sz3._decode(self, part, (1, *shape[1:])).reshape(shape[1:]) for part in _split(data)])


class Zfp(GridPeer):
    name, about, key = "zfp", "ZFP, fixed accuracy; the setting is the bound over the range", "zfp"
    settings = BOUNDS

    def _encode(self, values: np.ndarray, setting: float) -> bytes:
        return self.package.zfp_encode(_squeezed(values), level=bound_of(values, setting), mode="a", numthreads=1)

    def _decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        return self.package.zfp_decode(data, numthreads=1)


class Sperr(GridPeer):
    name, about, key = "sperr", "SPERR, point-wise error; the setting is the bound over the range", "sperr"
    settings = BOUNDS

    # short axes make its wavelets fail, so a stack of few levels is coded level by level
    def _encode(self, values: np.ndarray, setting: float) -> bytes:
        bound = bound_of(values, setting)
        return _join([self.package.sperr_encode(part, bound, "pwe", numthreads=1) for part in self._parts(values)])

    def _decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        return np.stack([self.package.sperr_decode(part, numthreads=1) for part in _split(data)])

    @staticmethod
    def _parts(values: np.ndarray) -> list[np.ndarray]:
        return [values] if values.shape[0] >= 8 else list(values)


class BitRound(GridPeer):
    """What many archives do: as few mantissa bits as the bound allows, so that a general compressor finds zeros."""

    name, about, key = "bitround-zstd", "bits of the mantissa rounded off, shuffle, zstd 19; the setting is as for sz3", "zstd"
    settings = BOUNDS

    def _encode(self, values: np.ndarray, setting: float) -> bytes:
        from ..codecs.bitinformation import rounded

        bound, largest = bound_of(values, setting), np.abs(values).max((1, 2)).astype(np.float64)
        # an error of 2^-(kept + 1) of the power of two below a value
        exponents = np.floor(np.log2(np.maximum(largest, np.finfo(np.float32).tiny)))
        keeps = np.clip(np.ceil(exponents - np.log2(bound) - 1), 0, 23).astype(int)
        planes = rounded(values[None], keeps.tolist())[0]
        return self.package.zstd_encode(self.package.byteshuffle_encode(planes), level=19)

    def _decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        raw = np.frombuffer(self.package.zstd_decode(data), np.float32).reshape(shape)
        return self.package.byteshuffle_decode(raw)


class Jpeg2000Grid(GridPeer):
    name, about, key = "jpeg2000", "OpenJPEG, 9-7 wavelet on 16-bit steps; the setting is the PSNR asked for", "openjpeg"
    settings = (40, 50, 60, 70, 80, 90)

    def _encode(self, values: np.ndarray, setting: float) -> bytes:
        low = float(values.min())
        step = float(np.ptp(values.astype(np.float64))) / 65535 or 1.0
        steps = np.rint((values.astype(np.float64) - low) / step).astype(np.uint16)
        parts = [self.package.jpeg2k_encode(p, level=setting, codecformat="j2k", reversible=False, numthreads=1) for p in steps]
        return struct.pack("<dd", low, step) + _join(parts)

    def _decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        low, step = struct.unpack_from("<dd", data)
        planes = np.stack([self.package.jpeg2k_decode(part) for part in _split(data[16:])])
        return (planes * step + low).astype(np.float32)


class ShuffleDeflate(GridPeer):
    name, about, key = "netcdf-deflate", "byte shuffle and DEFLATE, as in netCDF-4 files; lossless", "zlib"
    settings = (4, 9)

    def _encode(self, values: np.ndarray, setting: float) -> bytes:
        return self.package.zlib_encode(self.package.byteshuffle_encode(values), level=int(setting))

    def _decode(self, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        raw = np.frombuffer(self.package.zlib_decode(data), np.float32).reshape(shape)
        return self.package.byteshuffle_decode(raw)


def _join(parts: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(p)) + bytes(p) for p in parts)


def _split(data: bytes) -> list[bytes]:
    parts = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        parts.append(data[4 : 4 + length])
        data = data[4 + length :]
    return parts


class OursGrid(Subject):
    """Our coder of fields without a network, ``grid:exact``, through a file of one variable."""

    ours, kind, name, settings = True, "grid", "grid:exact", BOUNDS
    goal, about = "absolute", "coder of fields within a bound; the setting is the bound over the range"

    def __init__(self) -> None:
        from .. import __version__

        self.describe, self.identity = self.about, f"neuralcodec {__version__}"

    def bound(self, sample: np.ndarray, setting: float) -> float | None:
        return bound_of(sample, setting)

    def encode(self, sample: np.ndarray, setting: float) -> bytes:
        from ..codecs.grid_chunk import Coding, encode_chunk
        from ..codecs.grid_file import CODEC, NO_MODEL, PRESET
        from ..container.format import Segment, Stream, dumps

        coding = Coding("f4", "LYX", self.goal, bound_of(sample, setting))
        payload, _ = encode_chunk(np.ascontiguousarray(sample, np.float32), coding)
        header = {"s": list(sample.shape), "k": coding.plain()}
        return dumps(Stream(CODEC, PRESET, NO_MODEL, header, [Segment("data", payload)]))

    def decode(self, data: bytes) -> np.ndarray:
        from ..codecs.grid_chunk import Coding, decode_chunk
        from ..container.format import loads

        stream = loads(data)
        return decode_chunk(stream.segments[0].data, tuple(stream.header["s"]), Coding.of(stream.header["k"]))


class OursRmse(OursGrid):
    """The same at a root mean square error: the best-effort tier without a network."""

    name, settings = "grid:rmse", tuple(b / 2 for b in BOUNDS)
    goal, about = "rmse", "coder of fields at a root mean square error; the setting is that over the range"

    def bound(self, sample: np.ndarray, setting: float) -> float | None:
        return None


class NeuralGrid(Subject):
    """A network for fields alone, the best-effort tier; settings are qualities 0..100."""

    ours, kind, whole = True, "grid", True

    def __init__(self, model: str, qualities: Sequence[float]):
        from ..codecs.grid_neural import load

        self.codec = load(model)
        self.name, self.settings = f"{self.codec.name}:{self.codec.preset}", tuple(sorted(set(qualities)))
        self.describe, self.identity = f"model {self.codec.model_id.hex()}", self.codec.model_id.hex()

    def encode(self, sample: Field, setting: float) -> bytes:
        from ..codecs.grid_chunk import Coding, encode_chunk
        from ..codecs.grid_neural import About
        from ..container.format import Segment, Stream, dumps

        coding = Coding("f4", "LYX", "quality", float(setting), model=self.name)
        what = About(sample.name, sample.pressures or (0,) * len(sample.values), sample.latitude)
        payload, _ = encode_chunk(np.ascontiguousarray(sample.values, np.float32), coding, what=what)
        header = {"s": list(sample.values.shape), "k": coding.plain()}
        return dumps(Stream(self.codec.name, self.codec.preset, self.codec.model_id, header, [Segment("data", payload)]))

    decode = OursGrid.decode

    def complexity(self) -> dict[str, Any]:
        from ..codecs.base import count_parameters

        return {"parameters": count_parameters(self.codec)}


PEERS = (Sz3, Sz3Planes, Zfp, Sperr, BitRound, Jpeg2000Grid, ShuffleDeflate)
