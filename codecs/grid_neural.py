"""Fields through a network: what the best-effort tier is, and a prediction that the guaranteed one may stand on.

The network's decoder is exact (``codecs/vaeformer.py``), so its field is the same bits everywhere. The residual coder
(``entropy.grid``) always comes after it: it carries masks and infinities, and whatever bound there is.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..container.errors import CorruptStream, ModelMismatch
from ..media.grid import Layout
from ..media.units import factor

if TYPE_CHECKING:
    from .vaeformer import VAEformer

# names of the same things in other archives, by variable name and by CF standard name
ALIASES = {
    "2t": "t2m", "tas": "t2m", "2d": "d2m", "10u": "u10", "uas": "u10", "10v": "v10", "vas": "v10", "100u": "u100",
    "100v": "v100", "ta": "t", "ua": "u", "va": "v", "hus": "q", "hur": "r", "wap": "w", "psl": "msl", "ps": "sp",
    "air_temperature": "t", "eastward_wind": "u", "northward_wind": "v", "specific_humidity": "q", "relative_humidity": "r",
    "geopotential": "z", "lagrangian_tendency_of_air_pressure": "w", "air_pressure_at_mean_sea_level": "msl",
    "air_pressure_at_sea_level": "msl", "surface_air_pressure": "sp",
}  # fmt: skip
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class About:
    """What a chunk is, for a network: the variable's ECMWF short name, the pressure of each level in hPa (0 at the surface),
    and the latitudes of its rows, None where they are not known."""

    name: str
    pressures: tuple[int, ...]
    latitude: np.ndarray | None


def short_name(layout: Layout, name: str) -> str:
    """ECMWF short name of a variable, 'other' where it is not one that networks know."""
    from .vaeformer import VARIABLES

    attrs = layout.variables[name].attrs
    for word in (name, attrs.get("GRIB_shortName"), attrs.get("short_name"), attrs.get("standard_name")):
        if word in VARIABLES and word != "other":
            return str(word)
        if word in ALIASES:
            return ALIASES[word]
    return "other"


def about(source: Any, name: str, axes: str, box: tuple[slice, ...]) -> About:
    """What a part of a variable of an open file (or of anything with ``layout`` and ``read``) is."""
    layout: Layout = source.layout
    variable = layout.variables[name]
    lengths = [s.stop - s.start for s, a in zip(box, axes) if a == "L"]
    pressures = np.zeros(lengths or [1], np.int64)
    latitude, place = None, 0
    for dim, part, axis in zip(variable.dims, box, axes):
        known = layout.variables.get(dim)
        one = known is not None and known.dims == (dim,) and known.dtype[0] in "iuf"
        if axis == "L":
            to_hpa = factor(str(known.attrs.get("units", "")), "hPa") if one and known is not None else None
            if to_hpa is not None:
                values = np.rint(source.read(dim)[part].astype(np.float64) * to_hpa).clip(0, 65535).astype(np.int64)
                pressures += values.reshape([-1 if i == place else 1 for i in range(len(lengths))])
            place += 1
        elif axis == "Y" and one and factor(str(known.attrs.get("units", "")), "degrees_north") is not None:
            latitude = source.read(dim)[part].astype(np.float64)
    return About(short_name(layout, name), tuple(pressures.ravel().tolist()), latitude)


def load(model: str, model_id: bytes = b"") -> VAEformer:
    """The network ``vaeformer:PRESET``. ModelMissing, UnknownCodec; ModelMismatch where another id is wanted."""
    from . import registry

    codec = registry.load(*registry.split(model))
    if model_id and codec.model_id != model_id:
        text = f"the file needs the weights {model_id.hex()} of {model}, here are {codec.model_id.hex()}"
        raise ModelMismatch(f"{text}; put its weights into a folder named by NEURALCODEC_WEIGHTS")
    return codec  # type: ignore[return-value]


def encode_base(field: np.ndarray, what: About, model: str, level: int) -> tuple[bytes, np.ndarray]:
    """(T, L, H, W) in the variable's unit -> (payload, what a decoder makes of it, float64 of the same shape)."""
    from .vaeformer import Plane

    times, levels, rows, columns = field.shape
    planes = [Plane(what.name, p) for p in what.pressures] * times
    payload, base = load(model).encode_fields(field.reshape(-1, rows, columns), planes, what.latitude, level)
    return payload, base.reshape(field.shape)


def decode_base(payload: bytes, shape: tuple[int, int, int, int], model: str) -> np.ndarray:
    """Inverse of ``encode_base``. CorruptStream."""
    base = load(model).decode_fields(payload)
    if base.shape != (math.prod(shape[:2]), *shape[2:]):
        raise CorruptStream("chunk: the network's field has another shape than the header says")
    return base.reshape(shape)


def joined(neural: bytes, rest: bytes) -> bytes:
    """Both payloads as one."""
    return _LENGTH.pack(len(neural)) + neural + rest


def parted(body: bytes) -> tuple[bytes, bytes]:
    """Inverse of ``joined``. CorruptStream."""
    if len(body) < _LENGTH.size or (size := _LENGTH.unpack_from(body)[0]) > len(body) - _LENGTH.size:
        raise CorruptStream("chunk: it ends early")
    return body[_LENGTH.size : _LENGTH.size + size], body[_LENGTH.size + size :]
