"""The Zarr v3 codec ``neuralcodec``: array -> bytes, chunk by chunk, within a bound on the error (entry point ``zarr.codecs``).

Its place in a Zarr array is that of the serializer; no other compressor goes behind it:

    zarr.create_array(store, shape=..., chunks=(4, 37, 721, 1440), dtype="f4", compressors=None,
                      serializer=NeuralcodecCodec(axes="TLYX", kind="absolute", value=0.05))

A chunk on the disk is a payload of ``codecs/grid_chunk.py`` and the CRC-32C of it, four bytes, little-endian.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.common import parse_named_configuration

from ..codecs.grid_chunk import KINDS, Coding, Stats, decode_chunk, encode_chunk
from ..container.errors import CorruptStream
from ..container.format import crc32c

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

    from ..codecs.grid_neural import About

NAME = "neuralcodec"


def frame(values: np.ndarray, coding: Coding, what: About | None = None) -> tuple[bytes, Stats]:
    """Bytes of a chunk, with their checksum, and what they cost. ``what``: see ``encode_chunk``."""
    payload, stats = encode_chunk(values, coding, what=what)
    stats.coded += 4
    return payload + crc32c(payload).to_bytes(4, "little"), stats


def unframe(data: bytes, shape: tuple[int, ...], coding: Coding, threads: int = 1) -> np.ndarray:
    """Inverse of ``frame``. CorruptStream."""
    check(data)
    return decode_chunk(data[:-4], shape, coding, threads)


def check(data: bytes) -> None:
    """CorruptStream unless the bytes of a chunk are those that were written."""
    if len(data) < 5 or crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise CorruptStream("chunk is cut short or damaged (checksum)")


def _native(dtype: Any) -> np.dtype:
    """NumPy's type of a chunk: zarr has had types of its own since 3.1."""
    return dtype.to_native_dtype() if hasattr(dtype, "to_native_dtype") else np.dtype(dtype)


@dataclass(frozen=True)
class NeuralcodecCodec(ArrayBytesCodec):
    """See the module. ``axes``: one of T, L, Y, X for each dimension; by default the last two are Y and X, others L.

    ``kind`` lossless, absolute, relative, range or bits, and its ``value``, in the unit of the stored values, or with
    ``scale`` and ``offset`` (the CF attributes) in that of the unpacked ones. ``fills``: hexadecimal bytes of values that
    mean 'missing'. ``periodic``: the columns close a circle. ``variable`` stands in messages only.
    """

    is_fixed_size = False

    axes: str = ""
    kind: str = "lossless"
    value: float = 0.0
    periodic: bool = False
    scale: float = 1.0
    offset: float = 0.0
    fills: tuple[str, ...] = ()
    variable: str = ""
    model: str = ""
    model_id: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS or not 0 <= self.value < float("inf"):
            raise ValueError(f"neuralcodec: no bound is {self.kind} {self.value}")
        object.__setattr__(self, "fills", tuple(self.fills))

    @classmethod
    def of(cls, coding: Coding, variable: str = "") -> NeuralcodecCodec:
        """The codec of a coding."""
        identity = ""
        if coding.model:
            from ..codecs.grid_neural import load

            identity = load(coding.model).model_id.hex()
        return cls(coding.axes, coding.kind, coding.value, coding.periodic, coding.scale, coding.offset,
                   tuple(f.hex() for f in coding.fills), variable, coding.model, identity)  # fmt: skip

    def coding(self, dtype: np.dtype, ndim: int) -> Coding:
        """What the chunks of an array are coded with."""
        axes = self.axes or ("L" * ndim + "YX")[-ndim:] if ndim else ""
        if len(axes) != ndim:
            raise ValueError(f"neuralcodec: axes {axes!r} for an array of {ndim} dimensions")
        fills = tuple(bytes.fromhex(f) for f in self.fills)
        code = np.dtype(dtype).newbyteorder("=").str.lstrip("=<>|")
        kind = self.kind if self.value or self.kind == "quality" else "lossless"
        return Coding(code, axes, kind, float(self.value), self.periodic, float(self.scale), float(self.offset), fills,
                      self.model)  # fmt: skip

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NeuralcodecCodec:
        _, configuration = parse_named_configuration(data, NAME, require_configuration=False)
        return cls(**(configuration or {}))

    def to_dict(self) -> dict[str, Any]:
        defaults = NeuralcodecCodec()
        names = ("axes", "kind", "value", "periodic", "scale", "offset", "fills", "variable", "model", "model_id")
        plain = {k: getattr(self, k) for k in names if getattr(self, k) != getattr(defaults, k)}
        if "fills" in plain:
            plain["fills"] = list(self.fills)
        return {"name": NAME, "configuration": plain}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> NeuralcodecCodec:
        dtype = _native(array_spec.dtype)
        if dtype.kind not in "iuf" or dtype.itemsize not in (1, 2, 4, 8):
            raise ValueError(f"neuralcodec codes integers and floats, not {dtype}")
        made = self.coding(dtype, len(array_spec.shape))
        if made.dtype == "f2":
            raise ValueError("neuralcodec codes floats of 32 and 64 bits")
        return self if self.axes else replace(self, axes=made.axes)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        coding = self.coding(_native(chunk_spec.dtype), len(chunk_spec.shape))
        if self.model:
            from ..codecs.grid_neural import load

            load(self.model, bytes.fromhex(self.model_id))
        try:
            values = await asyncio.to_thread(unframe, chunk_bytes.to_bytes(), chunk_spec.shape, coding)
        except CorruptStream as error:
            raise CorruptStream(f"{self.variable}: {error}" if self.variable else str(error)) from None
        return chunk_spec.prototype.nd_buffer.from_ndarray_like(values)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        values = np.ascontiguousarray(chunk_array.as_numpy_array())
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        coding = self.coding(values.dtype, values.ndim)
        data, _ = await asyncio.to_thread(frame, values, coding)
        return chunk_spec.prototype.buffer.from_bytes(data)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError
