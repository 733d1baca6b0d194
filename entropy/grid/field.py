"""Fields within a bound: see the package. Byte-level description: ``SPEC.md`` beside this file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import google_crc32c
import numpy as np

from ...container.errors import CorruptStream, LimitExceeded
from ...container.format import varint
from .. import binary
from . import kernels
from .classes import decode_classes, encode_classes
from .prior import PRIOR
from .scales import LOG_STEEPEST, LogScale, PlainScale, RegionScale, Scale, bits_of, from_ordered, to_ordered
from .transform import Choices, decode_part, encode_part, guess_step, smooth_fill
from .transform_kernels import FRACTION

LIMIT = 1 << 30  # values that one payload may hold unless the caller says otherwise
VERSION = 2
TRANSFORM_VERSION = 3  # of payloads with a transform; all others are of version 2
LAZY = {1: 0, 2: 3, 3: 3}  # by version: see ``code_planes``; since 2 a quarter of the calm cells teaches
DTYPES = tuple(np.dtype(d) for d in ("f4", "f8", "i1", "u1", "i2", "u2", "i4"))
KINDS = ("lossless", "absolute", "relative", "range", "regions", "rmse")
RMSE = 5
STORED, LOSSLESS, BOUNDED, TRANSFORMED = range(4)  # modes
STEP = 256  # of the quantiser in lattice units: predictions have 8 bits below a step
LATTICE_MAX = 1 << 29  # largest |lattice value|; what lies beyond is stored as it is
FINITE, NAN, PLUS_INF, MINUS_INF, WILD, ZERO, NEGATIVE = range(7)  # classes of cells
CODED = (FINITE, NEGATIVE)
BAND_VALUES = 1 << 19  # a part of more values is cut into bands of rows, which threads can share
BAND_ROWS = 256  # and each has at least so many: predictors learn anew in every part
BANDS_MAX = 8
TRIAL_VALUES = 3 << 13
PART_VALUES = 1 << 23  # of a transform
PART_LEVELS = 128
NEAR_ENOUGH = 0.993  # of the root mean square error that was asked for
# forgetting, samples between solutions, ridge; fields of many rows want the first, stacks of small ones the second
PACES = ((0.97, 64, 10.0), (0.95, 32, 10.0))
# how much finer each coarser stage is quantised, and at most; the last two are for small mean squared errors
SLOPES = ((1.0, 1.0), (1.15, 2.0), (1.35, 2.0), (1.22, 8.0), (1.4, 8.0))
GENTLE, STEEP = 3, 4
ROUNDING = {"bound": 0.5, "rmse": 0.38}  # residuals of 1 - ROUNDING steps are coded; others stay with the prediction
_HEAD = struct.Struct("<BBBBBB")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Bound:
    """Largest error that a decoded value may have. ValueError for a negative, infinite or missing one."""

    value: float | np.ndarray
    kind: str = "absolute"

    def __post_init__(self) -> None:
        if self.kind not in ("absolute", "relative", "range"):
            raise ValueError(f"a bound is absolute, relative or a range, not {self.kind!r}")
        values = np.asarray(self.value, np.float64)
        if values.ndim not in (0, 2) or (values.ndim == 2 and self.kind != "absolute"):
            raise ValueError("a bound is a number, or an array (H, W) of absolute bounds")
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(f"a bound must be finite and not negative, not {self.value}")
        if self.kind == "relative" and values.max() >= 1:
            raise ValueError("a relative bound must be below 1")


class _Reader:
    """Takes a payload apart. CorruptStream where it ends early."""

    def __init__(self, data: bytes):
        self.data, self.at = memoryview(data), 0

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise CorruptStream("field payload: it ends early")
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise CorruptStream("field payload: a number is too long")

    def block(self) -> bytes:
        return self.take(self.varint())


def _block(data: bytes) -> bytes:
    return varint(len(data)) + data


def _inflate(data: bytes, size: int) -> bytes:
    """What zlib packed, exactly ``size`` bytes. CorruptStream otherwise."""
    try:
        engine = zlib.decompressobj()
        out = engine.decompress(data, size + 1) if size else engine.decompress(data)
    except zlib.error as error:
        raise CorruptStream(f"field payload: {error}") from error
    if len(out) != size:
        raise CorruptStream("field payload: a part has the wrong size")
    return out


@dataclass
class _Plan:
    """Everything that a decoder must know before the first cell, and how it is written."""

    dtype: np.dtype
    shape: tuple[int, ...]
    mode: int
    kind: int
    bound: float
    periodic: bool = False
    narrow: bool = False  # float64 that float32 holds exactly
    nan_bits: bool = False
    based: bool = False
    pace: int = 0
    slope: int = 0
    group: int = 0
    bands: int = 1
    step: int = STEP
    scale: Scale = field(default_factory=PlainScale)
    limits: tuple[int, int] = (0, 0)
    rounding: float = 0.5  # of the encoder; the decoder need not know
    version: int = VERSION
    times: int = 1  # of a part, if transformed

    def header(self) -> bytes:
        flags = self.periodic | self.narrow << 1 | self.nan_bits << 2 | self.based << 3
        head = _HEAD.pack(self.version, DTYPES.index(self.dtype), self.mode, self.kind, flags, self.pace << 4 | self.slope)
        head += bytes([len(self.shape)]) + b"".join(map(varint, self.shape)) + struct.pack("<d", self.bound)
        if self.mode == STORED:
            return head
        if self.mode == TRANSFORMED:
            return head + varint(self.times) + varint(self.group) + struct.pack("<dd", self.scale.delta, self.scale.offset)
        head += varint(self.group) + bytes([self.bands]) + varint(self.step)
        head += struct.pack("<qq", *self.limits)
        return head + (self.scale.to_bytes() if self.mode == BOUNDED else b"")

    @classmethod
    def read(cls, reader: _Reader) -> _Plan:
        version, dtype, mode, kind, flags, search = _HEAD.unpack(reader.take(_HEAD.size))
        if version not in LAZY:
            raise CorruptStream(f"field payload: version {version} is unknown here")
        modes = TRANSFORMED if version == TRANSFORM_VERSION else BOUNDED
        if dtype >= len(DTYPES) or mode > modes or kind > RMSE or (kind == RMSE) != (mode == TRANSFORMED) or flags > 15:
            raise CorruptStream("field payload: its header makes no sense")
        if search >> 4 >= len(PACES) or search & 15 >= len(SLOPES):
            raise CorruptStream("field payload: its header makes no sense")
        shape = tuple(reader.varint() for _ in range(reader.take(1)[0]))
        if not 1 <= len(shape) <= 4:
            raise CorruptStream("field payload: a field has 1 to 4 axes")
        (bound,) = struct.unpack("<d", reader.take(8))
        plan = cls(DTYPES[dtype], shape, mode, kind, bound, *(bool(flags >> i & 1) for i in range(4)), search >> 4, search & 15,
                   version=version)  # fmt: skip
        if mode == STORED:
            return plan
        if not plan.values:
            raise CorruptStream("field payload: nothing is coded that way")
        if mode == TRANSFORMED:
            plan.times, plan.group = reader.varint(), reader.varint()
            plan.scale = PlainScale(*struct.unpack("<dd", reader.take(16)))
            fits = plan.times >= 1 <= plan.group and plan.dtype.kind == "f" and not plan.based and not plan.narrow
            if not (fits and np.isfinite([plan.scale.delta, plan.scale.offset]).all()):
                raise CorruptStream("field payload: its header makes no sense")
            return plan
        plan.group, plan.bands, plan.step = reader.varint(), reader.take(1)[0], reader.varint()
        plan.limits = struct.unpack("<qq", reader.take(16))
        if not (1 <= plan.group and 1 <= plan.bands <= BANDS_MAX and 1 <= plan.step <= STEP and plan.limits[0] <= plan.limits[1]
                and max(map(abs, plan.limits)) <= 1 << 32):  # fmt: skip
            raise CorruptStream("field payload: its header makes no sense")
        if mode == BOUNDED:
            plan.scale = (RegionScale if kind == 4 else LogScale if kind == 2 else PlainScale).read(reader)
        return plan

    @property
    def values(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def stack(self) -> tuple[int, int, int, int]:
        """(T, L, H, W)."""
        return (1,) * (4 - len(self.shape)) + self.shape  # type: ignore[return-value]

    @property
    def steps(self) -> np.ndarray:
        """Quantiser steps of the stages, finest first; the last holds for all coarser ones."""
        factor, most = SLOPES[self.slope]
        return np.array([max(int(self.step / min(factor**i, most)), 1) for i in range(16)], np.int64)

    def parts(self) -> list[tuple[slice, slice]]:
        """(levels, rows) of what is coded apart."""
        _, levels, height, _ = self.stack
        edges = [height * i // self.bands for i in range(self.bands + 1)]
        groups = [slice(a, min(a + self.group, levels)) for a in range(0, levels, self.group)]
        return [(g, slice(a, b)) for g in groups for a, b in zip(edges, edges[1:]) if a < b]


def _references(times: int, levels: int, based: bool) -> np.ndarray:
    """Of each plane in the order of coding, two that are known: its base, the level before, the same level one time before."""
    count = times * levels
    refs = np.full((count, 2), -1, np.int64)
    for p in range(count):
        t, level = divmod(p, levels)
        near = [p - 1] if level else []
        near += [p - levels] if t else []
        near += [p - 2] if level > 1 and not t else [p - 2 * levels] if t > 1 and not level else []
        near = [n + count for n in near[:2]] if based else near[:2]
        near = [p, *near][:2] if based else near
        refs[p, : len(near)] = near
    return np.concatenate([np.full((count, 2), -1, np.int64), refs]) if based else refs


class _State:
    """What adapts while planes are coded, at its start."""

    def __init__(self) -> None:
        k = kernels
        self.maps = np.full(int(k.STARTS[-1]), 1 << 31, np.uint32)
        self.weights = np.full((k.STAGES * k.DECISIONS, k.INPUTS + 1), 2 * 65536 // (k.INPUTS + 1), np.int64)
        self.weights[:, -1] = 0
        self.apm = np.tile(k.SQUASH[np.minimum(np.arange(33) * 192, len(k.SQUASH) - 1)].astype(np.int64), (k.APM_ROWS, 1))
        self.quiet = np.full(k.QUIET_ROWS, (1 << 16) << 10, np.int64)
        kinds = len(PRIOR)
        self.cov = np.zeros((kinds * k.BANDS, k.FEATURES, k.FEATURES))
        self.rhs = np.zeros((kinds * k.BANDS, k.FEATURES))
        self.prior = PRIOR.copy()
        self.wts = np.repeat(self.prior, k.BANDS, 0)

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.maps, self.weights, self.apm, self.quiet, self.cov, self.rhs, self.wts, self.prior


def _run(plan: _Plan, planes: np.ndarray, based: bool, times: int, mask: np.ndarray, target: np.ndarray, offset: float,
         inverse: float, buf: np.ndarray, decode: bool) -> int:  # fmt: skip
    """Code or decode the planes of one part; bytes used, or -1 when ``buf`` was too short."""
    count = len(planes) // (2 if based else 1)
    coder = binary.start(buf if decode else None)
    refs = _references(times, count // times, based)
    pace = np.array(PACES[plan.pace])
    fine = kernels.code_planes(
        target, offset, inverse, plan.rounding, mask, planes, len(planes) - count, np.zeros(planes.shape, np.uint8), refs,
        plan.steps, np.array(plan.limits, np.int64), plan.periodic, pace, LAZY[plan.version], *_State().arrays(), coder, buf,
        decode,
    )  # fmt: skip
    if not fine:
        return -1
    if decode:
        return int(coder[3])
    at, end = int(coder[3]), binary.ending(coder)
    buf[at : at + len(end)] = np.frombuffer(end, np.uint8)
    return at + len(end)


def _each(work: Callable[[int], Any], count: int, threads: int) -> Iterable[Any]:
    if threads <= 1 or count <= 1:
        return map(work, range(count))
    with ThreadPoolExecutor(min(threads, count)) as pool:
        return list(pool.map(work, range(count)))


def _cut(array: np.ndarray, part: tuple[slice, slice]) -> np.ndarray:
    """A part of (T, L, H, W) as planes (T * l, h, W), contiguous."""
    piece = array[:, part[0], part[1]]
    return np.ascontiguousarray(piece.reshape(-1, *piece.shape[2:]))


def _encode_parts(plan: _Plan, target: np.ndarray, classes: np.ndarray | None, base: np.ndarray | None,
                  threads: int, errors: list[float] | None = None) -> list[bytes]:  # fmt: skip
    """The streams of all parts. target (T, L, H, W), classes likewise or None, base int32 likewise or None. ``errors`` gets the
    mean squared error of each, in lattice units."""
    parts = plan.parts()

    def work(i: int) -> bytes:
        wanted = _cut(target, parts[i])
        planes = np.zeros(wanted.shape, np.int32)
        if base is not None:
            planes = np.concatenate([_cut(base, parts[i]), planes])
        mask = _mask(classes, parts[i], wanted.shape)
        offset, inverse = (plan.scale.offset, plan.scale.inverse) if plan.mode == BOUNDED else (0.0, 1.0)
        room = wanted.size * 2 + wanted.shape[2] * 256 + 4096
        while True:
            buf = np.zeros(room, np.uint8)
            used = _run(plan, planes, base is not None, target.shape[0], mask, wanted, offset, inverse, buf, False)
            if used >= 0:
                if errors is not None:
                    errors.append(float(np.square(planes[-len(wanted) :] - (wanted - offset) * inverse).mean()))
                return buf[:used].tobytes()
            room *= 4
            planes[len(planes) - len(wanted) :] = 0

    return list(_each(work, len(parts), threads))


def _mask(classes: np.ndarray | None, part: tuple[slice, slice], shape: tuple[int, ...]) -> np.ndarray:
    if classes is None:
        return np.zeros((1, *shape[1:]), np.uint8)
    return (~np.isin(_cut(classes, part), CODED)).astype(np.uint8)


def _decode_parts(plan: _Plan, streams: list[bytes | None], classes: np.ndarray | None, base: np.ndarray | None,
                  threads: int) -> np.ndarray:  # fmt: skip
    """Lattice values int32 (T, L, H, W); parts whose stream is None stay zero."""
    parts, out = plan.parts(), np.zeros(plan.stack, np.int32)
    nothing = np.zeros((1, 1, 1), np.float64)

    def work(i: int) -> None:
        if streams[i] is None:
            return
        view = out[:, parts[i][0], parts[i][1]]
        planes = np.zeros((view.shape[0] * view.shape[1], *view.shape[2:]), np.int32)
        mask = _mask(classes, parts[i], planes.shape)
        if base is not None:
            planes = np.concatenate([_cut(base, parts[i]), planes])
        buf = np.frombuffer(streams[i], np.uint8).copy()
        _run(plan, planes, base is not None, view.shape[0], mask, nothing, 0.0, 1.0, buf, True)
        view[...] = planes[-view.shape[0] * view.shape[1] :].reshape(view.shape)

    for _ in _each(work, len(parts), threads):
        pass
    return out


def encode_field(x: np.ndarray, bound: Bound | float | None = None, *, periodic: bool = False, base: np.ndarray | None = None,
                 level_group: int | None = None, nan_payloads: bool = False, threads: int = 1,
                 goal: str = "bound") -> bytes:  # fmt: skip
    """x (H, W), (L, H, W) or (T, L, H, W) -> payload; see the package. Integers of up to 32 bits are coded too, losslessly.

    ``base`` (same shape) must be the same, bit for bit, when the payload is decoded. ``goal`` "rmse" keeps within the bound as
    well, but spends the bits for a small mean squared error. ValueError for what makes no sense.
    """
    x = np.asarray(x)
    if x.dtype.newbyteorder("=") not in DTYPES or not 1 <= x.ndim <= 4:
        raise ValueError(f"a field has 1 to 4 axes of float32, float64 or small integers, not {x.ndim} of {x.dtype}")
    x = np.ascontiguousarray(x, x.dtype.newbyteorder("="))
    bound = bound if isinstance(bound, Bound) else Bound(0.0 if bound is None else bound)
    if base is not None and np.shape(base) != x.shape:
        raise ValueError(f"a base of shape {np.shape(base)} cannot serve a field of shape {x.shape}")
    levels = x.shape[-3] if x.ndim > 2 else 1
    if goal not in ROUNDING:
        raise ValueError(f"a goal is one of {', '.join(ROUNDING)}, not {goal!r}")
    if level_group is not None and level_group < 1:
        raise ValueError("a group holds at least one level")
    plan = _Plan(x.dtype, x.shape, STORED, 0, 0.0, periodic, group=max(min(level_group or levels, levels), 1),
                 rounding=ROUNDING[goal])  # fmt: skip
    lossy = np.max(bound.value, initial=0) > 0
    if lossy and x.dtype.kind != "f":
        raise ValueError(f"{x.dtype} can only be coded without loss")
    if not x.size:
        return _finish(plan, b"")
    area = x.shape[-1] * (x.shape[-2] if x.ndim > 1 else 1)
    per_part = area * plan.group * (x.shape[0] if x.ndim == 4 else 1)
    plan.bands = max(1, min(BANDS_MAX, -(-per_part // BAND_VALUES), x.shape[-2] // BAND_ROWS if x.ndim > 1 else 1))
    made = _bounded(plan, x, bound, base, nan_payloads, threads) if lossy else None
    if made is None or len(made) > x.nbytes // 4 or x.size <= 4096:
        plan.kind, plan.bound, plan.based = 0, 0.0, False
        others = [made, _lossless(plan, x, nan_payloads, threads), _stored(plan, x)]
        made = min((payload for payload in others if payload is not None), key=len)
    return made


def _finish(plan: _Plan, body: bytes) -> bytes:
    payload = plan.header() + body
    return payload + _CRC.pack(google_crc32c.value(payload))


def _stored(plan: _Plan, x: np.ndarray) -> bytes:
    """The bytes of the field, sorted by their place in a value and packed by zlib."""
    return _finish(replace(plan, mode=STORED), zlib.compress(x.view(np.uint8).reshape(-1, x.itemsize).T.tobytes(), 6))


def _classes(x: np.ndarray) -> np.ndarray | None:
    """Of floats: which are not finite; None where all are."""
    if x.dtype.kind != "f" or np.isfinite(x).all():
        return None
    classes = np.zeros(x.shape, np.uint8)
    classes[np.isnan(x)] = NAN
    classes[x == np.inf] = PLUS_INF
    classes[x == -np.inf] = MINUS_INF
    return classes


def _class_blocks(plan: _Plan, x: np.ndarray, classes: np.ndarray | None, nan_payloads: bool) -> bytes:
    """Classes, and the bits of NaN where they are wanted and not all canonical."""
    if classes is None:
        return _block(b"")
    out = _block(encode_classes(classes))
    bits = bits_of(x[classes == NAN])
    plan.nan_bits = bool(nan_payloads and (bits != bits_of(np.array([np.nan], x.dtype))[0]).any())
    return out + (_block(zlib.compress(bits.tobytes(), 9)) if plan.nan_bits else b"")


def _lossless(plan: _Plan, x: np.ndarray, nan_payloads: bool, threads: int) -> bytes:
    """Every bit of every value, by the predictor on integers in the order of the values."""
    plan = replace(plan, mode=LOSSLESS, step=1, rounding=0.5)
    values, low = x.reshape(plan.stack), b""
    classes = _classes(values)
    blocks = _class_blocks(plan, values, classes, nan_payloads)
    if x.dtype.kind == "f":
        values = values if classes is None else np.where(classes == FINITE, values, x.dtype.type(0))
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float32)
        if x.dtype == np.float64 and (bits_of(narrow.astype(np.float64)) == bits_of(values)).all():
            plan.narrow, values = True, narrow
        ordered = to_ordered(values)
        if ordered.dtype == np.int64:
            words = (ordered & 0xFFFFFFFF).astype(np.uint32)
            low = zlib.compress(words.reshape(-1, 1).view(np.uint8).T.tobytes(), 6)
            ordered = ordered >> 32
        values = ordered
    plan.limits = int(values.min()), int(values.max())
    streams = _encode_parts(plan, values.astype(np.float64), classes, None, threads)
    payload = _finish(plan, blocks + b"".join(map(_block, streams)) + _block(low) + _outliers(x, np.zeros(0, np.int64)))
    if not _same(decode_field(payload, threads=threads), x, nan_payloads):
        raise AssertionError("a lossless payload did not decode to its field")
    return payload


def _same(y: np.ndarray, x: np.ndarray, nan_payloads: bool) -> bool:
    if x.dtype.kind != "f":
        return bool((x == y).all())
    equal = bits_of(x) == bits_of(y)
    return bool((equal if nan_payloads else equal | (np.isnan(x) & np.isnan(y))).all())


def _outliers(x: np.ndarray, positions: np.ndarray) -> bytes:
    """Cells (flat positions, ascending) that are stored as they are."""
    if not len(positions):
        return varint(0)
    gaps = b"".join(map(varint, np.diff(positions, prepend=0).tolist()))
    values = x.reshape(-1)[positions]
    raw = values.view(np.uint8).reshape(-1, x.itemsize).T.tobytes()
    return varint(len(positions)) + _block(zlib.compress(gaps, 9)) + _block(zlib.compress(raw, 9))


def _half_ulp(x: np.ndarray) -> np.ndarray:
    """Largest error of rounding to the dtype beside |x|, float64."""
    return np.spacing(np.abs(x)).astype(np.float64) / 2


def _error_ok(x: np.ndarray, y: np.ndarray, limit: Any) -> np.ndarray:
    """Where |x - y| <= limit in float64; True where x is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return (np.abs(x.astype(np.float64) - y.astype(np.float64)) <= limit) | ~np.isfinite(x)


def _mark_coarse(values: np.ndarray, classes: np.ndarray | None, limit: Any) -> np.ndarray | None:
    """Classes with those cells WILD that are so large that rounding to the dtype takes up a bound (fill values, often)."""
    if float(np.max(np.abs(values), initial=0, where=np.isfinite(values))) * np.finfo(values.dtype).eps < np.min(limit) / 4:
        return classes
    with np.errstate(invalid="ignore", over="ignore"):
        coarse = np.isfinite(values) & ~(_half_ulp(values) < np.maximum(limit, np.finfo(values.dtype).tiny) / 4)
    if not coarse.any() or coarse.sum() > values.size / 8:
        return classes
    classes = np.zeros(values.shape, np.uint8) if classes is None else classes
    classes[coarse] = WILD
    return classes


def _bounded(plan: _Plan, x: np.ndarray, bound: Bound, base: np.ndarray | None, nan_payloads: bool,
             threads: int) -> bytes | None:  # fmt: skip
    """Within the bound and checked, or None where a lattice is no use."""
    plan = replace(plan, mode=BOUNDED, based=base is not None)
    values = x.reshape(plan.stack)
    classes = _classes(values)
    limit: Any = bound.value
    if bound.kind == "absolute":
        classes = _mark_coarse(values, classes, limit)
    finite = values if classes is None else values[classes == FINITE]
    if not finite.size:
        return None  # nothing that could be wrong
    largest = x.dtype.type(np.abs(finite).max())
    if np.ndim(bound.value):
        plan.kind, limit = 4, np.asarray(bound.value, np.float64)
        if limit.shape != values.shape[-2:]:
            raise ValueError(f"a map of bounds has the shape of the grid {values.shape[-2:]}, not {limit.shape}")
        bounds, regions = np.unique(limit, return_inverse=True)
        if len(bounds) > 255:
            raise ValueError("a map has at most 255 different bounds")
        scale: Scale = RegionScale(bounds=bounds, regions=regions.reshape(limit.shape).astype(np.uint8))
        if (bounds == 0).any():
            classes = np.zeros(values.shape, np.uint8) if classes is None else classes
            classes[(classes == FINITE) & (limit == 0)] = WILD
        tightest = float(bounds[bounds > 0].min())
        plan.bound, allowed = float(bounds.max()), 1 - 2.0**-20 - float(_half_ulp(largest)) / tightest
    elif bound.kind == "relative":
        plan.kind, plan.bound, scale = 2, float(bound.value), LogScale()
        limit = plan.bound * np.abs(values.astype(np.float64))
        classes = np.zeros(values.shape, np.uint8) if classes is None else classes
        classes[values < 0] = np.where(classes[values < 0] == FINITE, NEGATIVE, classes[values < 0])
        classes[values == 0] = ZERO
        if not np.isin(classes, CODED).any():
            return None
        allowed = float(np.log2(1 + plan.bound * (1 - 2.0**-20) - np.finfo(x.dtype).eps / 2)) * LOG_STEEPEST
    else:
        plan.kind, scale = (3, PlainScale()) if bound.kind == "range" else (1, PlainScale())
        extent = float(finite.max()) - float(finite.min())
        limit = plan.bound = float(bound.value) * (extent if bound.kind == "range" else 1.0)
        allowed = plan.bound * (1 - 2.0**-20) - float(_half_ulp(largest))
    if not (allowed > 0 and np.isfinite(allowed)):
        return None
    target = scale.forward(values)
    coded = None if classes is None else np.isin(classes, CODED)
    seen = target if coded is None else target[coded]
    low, high = float(seen.min()), float(seen.max())
    while plan.step > 2 and (high / 2 - low / 2) / allowed * ((1 - plan.rounding) * plan.step) > LATTICE_MAX:
        plan.step //= 2
    scale.delta = allowed / ((1 - plan.rounding) * plan.step)
    scale.offset = low / 2 + high / 2
    if not (scale.delta > 0 and np.isfinite(1 / scale.delta)):
        return None
    if (high / 2 - low / 2) / scale.delta > LATTICE_MAX:  # a few values far out: they do not fit into any lattice
        scale.offset = float(np.median(seen))
        classes = np.zeros(values.shape, np.uint8) if classes is None else classes
        with np.errstate(over="ignore", invalid="ignore"):
            far = ~(np.abs(target / scale.delta - scale.offset / scale.delta) < LATTICE_MAX) & np.isin(classes, CODED)
        classes[far] = WILD
        seen = target[np.isin(classes, CODED)]
        if seen.size < values.size // 2:
            return None
        low, high = float(seen.min()), float(seen.max())
    scale.low, scale.high = low, high
    plan.limits = int(np.floor((low - scale.offset) / scale.delta)), int(np.ceil((high - scale.offset) / scale.delta))
    plan.scale = scale
    target = target if classes is None else np.where(np.isin(classes, CODED), target, scale.offset)
    target = target.astype(np.float64, copy=False)
    known = None if base is None else _on_lattice(plan, base)
    _search(plan, target, classes, known, threads)
    streams = _encode_parts(plan, target, classes, known, threads)
    blocks = _class_blocks(plan, values, classes, nan_payloads) + b"".join(map(_block, streams)) + _block(b"")
    wild = np.zeros(0, np.int64) if classes is None else np.flatnonzero(classes == WILD)
    payload = _finish(plan, blocks + _outliers(x, wild))
    y = decode_field(payload, base=base, threads=threads).reshape(values.shape)
    fine = _error_ok(values, y, limit)
    if not fine.all():
        bad = np.flatnonzero(~fine)
        payload = _finish(plan, blocks + _outliers(x, np.union1d(wild, bad)))
        y = decode_field(payload, base=base, threads=threads).reshape(values.shape)
        fine = _error_ok(values, y, limit)
    if not fine.all() or classes is not None and not _same(np.where(np.isfinite(x), x, y.reshape(x.shape)), x, nan_payloads):
        raise AssertionError("a payload did not decode within its bound")
    return payload


def _on_lattice(plan: _Plan, base: np.ndarray) -> np.ndarray:
    """A base (the field's shape) in lattice units, int32 (T, L, H, W)."""
    y = plan.scale.forward(np.asarray(base, np.float64).reshape(plan.stack))
    with np.errstate(over="ignore", invalid="ignore"):
        y = np.rint((y - plan.scale.offset) * plan.scale.inverse)
    return np.clip(np.nan_to_num(y), *plan.limits).astype(np.int32)


def _search(plan: _Plan, target: np.ndarray, classes: np.ndarray | None, base: np.ndarray | None, threads: int) -> None:
    """Choose how fast statistics move, and how much finer coarse stages are quantised, on a sample."""
    times, levels, height, width = target.shape
    rows = slice(0, height)
    if height * width > TRIAL_VALUES:
        n = max(TRIAL_VALUES // width, 1)
        rows = slice((height - n) // 2, (height - n) // 2 + n)
    planes = max(TRIAL_VALUES // ((rows.stop - rows.start) * width), 1)
    inner = min(levels, planes)
    outer = min(times, max(planes // inner, 1))
    pick = (slice(0, outer), slice((levels - inner) // 2, (levels - inner) // 2 + inner), rows)
    sample = target[pick]
    trial = replace(plan, shape=sample.shape, bands=1, group=inner)
    others = [None if array is None else array[pick] for array in (classes, base)]

    def size(pace: int, slope: int) -> int:
        return len(_encode_parts(replace(trial, pace=pace, slope=slope), sample, *others, 1)[0])

    sizes = list(_each(lambda pace: size(pace, 0), len(PACES), threads))
    plan.pace = int(np.argmin(sizes))
    if plan.rounding != 0.5:
        trial.pace = plan.pace
        plan.slope = _slope_for_rmse(trial, sample, *others)
    elif plan.step == STEP and min(sizes) * 8 < sample.size:
        sizes = [sizes[plan.pace], *_each(lambda slope: size(plan.pace, slope + 1), GENTLE - 1, threads)]
        plan.slope = int(np.argmin(sizes))


def _slope_for_rmse(trial: _Plan, sample: np.ndarray, classes: np.ndarray | None, base: np.ndarray | None) -> int:
    """Which slope gives the smaller mean squared error for its bytes: at twice the bound, the gentle one says what bytes are
    worth, and both are compared at that exchange rate."""

    def cost(slope: int, coarser: float) -> tuple[float, float]:
        plan, errors = replace(trial, slope=slope), []
        plan.scale = replace(trial.scale, delta=trial.scale.delta * coarser)  # type: ignore[type-var]
        size = len(_encode_parts(plan, sample, classes, base, 1, errors)[0])
        return float(np.log(size)), float(np.log(max(errors[0] * coarser**2, 1e-9)))

    rate, error = cost(GENTLE, 1.0)
    less, more = cost(GENTLE, 2.0)
    steep_rate, steep_error = cost(STEEP, 1.0)
    worth = (rate - less) / (more - error) if more > error and rate > less else 0.0
    return STEEP if steep_rate + worth * steep_error < rate + worth * error else GENTLE


def _checked_plan(payload: bytes, limit: int) -> tuple[_Plan, _Reader]:
    if len(payload) < _HEAD.size + _CRC.size:
        raise CorruptStream("field payload: it ends early")
    body = payload[: -_CRC.size]
    if google_crc32c.value(bytes(body)) != _CRC.unpack(payload[-_CRC.size :])[0]:
        raise CorruptStream("field payload: its checksum is wrong")
    reader = _Reader(bytes(body))
    plan = _Plan.read(reader)
    if plan.values > limit:
        raise LimitExceeded(f"the field has {plan.values} values, more than the limit of {limit}")
    return plan, reader


def decode_field(payload: bytes, *, base: np.ndarray | None = None, levels: Sequence[int] | None = None, threads: int = 1,
                 limit: int = LIMIT) -> np.ndarray:  # fmt: skip
    """The field of a payload; with ``levels`` only these, in this order, along the third axis from the end."""
    plan, reader = _checked_plan(payload, limit)
    if levels is not None and (len(plan.shape) < 3 or any(not 0 <= i < plan.shape[-3] for i in levels)):
        raise ValueError("there are no such levels")
    base = base if plan.based else None
    if plan.based and np.shape(base) != plan.shape:
        raise ValueError("the payload needs the base that it was made with")
    chosen = list(range(plan.stack[1])) if levels is None else list(levels)
    if plan.mode == STORED:
        rest = reader.take(len(reader.data) - reader.at)
        raw = _inflate(rest, plan.values * plan.dtype.itemsize) if plan.values else rest
        y = np.frombuffer(raw, np.uint8).reshape(plan.dtype.itemsize, -1).T.copy().view(plan.dtype).reshape(plan.stack)
    elif plan.mode == TRANSFORMED:
        y = _decode_transformed(plan, reader, set(chosen), threads)
    else:
        y = _decode_coded(plan, reader, base, set(chosen), threads)
    y = y if levels is None else y[:, chosen]
    return y.reshape(plan.shape if levels is None else (*plan.shape[:-3], len(chosen), *plan.shape[-2:]))


def _decode_coded(plan: _Plan, reader: _Reader, base: np.ndarray | None, chosen: set[int], threads: int) -> np.ndarray:
    """(T, L, H, W); levels that are in no group with a chosen one are not decoded."""
    classes, nan_bits = _read_classes(plan, reader)
    streams: list[bytes | None] = []
    for group, _ in plan.parts():
        stream = reader.block()
        streams.append(stream if chosen.intersection(range(group.start, group.stop)) else None)
    if plan.mode == BOUNDED and plan.kind == 4 and plan.scale.regions.shape != plan.stack[-2:]:  # type: ignore[attr-defined]
        raise CorruptStream("field payload: its regions do not fit")
    known = None if base is None else _on_lattice(plan, base)
    n = _decode_parts(plan, streams, classes, known, threads)
    low = reader.block()
    if plan.mode == BOUNDED:
        with np.errstate(over="ignore", invalid="ignore"):
            y = plan.scale.backward(n).astype(plan.dtype)
    elif plan.dtype.kind != "f":
        y = n.astype(plan.dtype)
    elif plan.dtype == np.float32 or plan.narrow:
        y = from_ordered(n).astype(plan.dtype, copy=False)
    else:
        words = np.frombuffer(_inflate(low, 4 * plan.values), np.uint8).reshape(4, -1).T.copy().view(np.uint32)
        y = from_ordered(n.astype(np.int64) << 32 | words.reshape(plan.stack).astype(np.int64))
    y = _with_classes(plan, y, classes, nan_bits)
    _put_outliers(plan, reader, y)
    return y


def _read_classes(plan: _Plan, reader: _Reader) -> tuple[np.ndarray | None, bytes]:
    """(classes of cells, None where all are finite; bits of the NaN, where they are kept)."""
    packed = reader.block()
    classes = decode_classes(packed, plan.stack) if packed else None
    missing = 0 if classes is None else int((classes == NAN).sum())
    return classes, _inflate(reader.block(), missing * plan.dtype.itemsize) if plan.nan_bits else b""


def _with_classes(plan: _Plan, y: np.ndarray, classes: np.ndarray | None, nan_bits: bytes) -> np.ndarray:
    """y with what is not finite, zero or negative by its class put there."""
    if classes is None:
        return y
    y[classes == NAN] = np.nan
    y[classes == PLUS_INF], y[classes == MINUS_INF], y[classes == ZERO] = np.inf, -np.inf, 0
    y[classes == NEGATIVE] = -y[classes == NEGATIVE]
    if not nan_bits:
        return y
    bits = bits_of(y)
    bits[classes == NAN] = np.frombuffer(nan_bits, bits.dtype)
    return bits.view(plan.dtype)


def _put_outliers(plan: _Plan, reader: _Reader, y: np.ndarray) -> None:
    count = reader.varint()
    if count > plan.values:
        raise CorruptStream("field payload: more outliers than cells")
    if count:
        gaps = _Reader(_inflate_some(reader.block(), 10 * count))
        positions = np.cumsum([gaps.varint() for _ in range(count)])
        raw = _inflate(reader.block(), count * plan.dtype.itemsize)
        values = np.frombuffer(raw, np.uint8).reshape(plan.dtype.itemsize, -1).T.copy().view(plan.dtype)
        if positions[-1] >= plan.values:
            raise CorruptStream("field payload: an outlier lies outside of the field")
        y.reshape(-1)[positions] = values[:, 0]
    if reader.at != len(reader.data):
        raise CorruptStream("field payload: something follows its end")


def _inflate_some(data: bytes, limit: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, limit)
    except zlib.error as error:
        raise CorruptStream(f"field payload: {error}") from error


# ---- transformed: a small root mean square error -----------------------------------------------------------------------------


def _transform_parts(plan: _Plan) -> tuple[tuple[int, int, int, int], list[tuple[slice, slice]]]:
    """(the stack as it is transformed: times alone count as levels; (times, levels) of what is coded apart)."""
    times, levels, height, width = plan.stack
    if levels == 1:
        times, levels = 1, times
    parts = [(slice(t, min(t + plan.times, times)), slice(a, min(a + plan.group, levels)))
             for t in range(0, times, plan.times) for a in range(0, levels, plan.group)]  # fmt: skip
    return (times, levels, height, width), parts


def encode_rmse(x: np.ndarray, rmse: float, *, periodic: bool = False, nan_payloads: bool = False, threads: int = 1,
                whole: bool = False) -> bytes | None:  # fmt: skip
    """x float32 or float64 with 1 to 4 axes -> payload for ``decode_field``, by a transform, with a root mean square error of
    ``rmse`` at most over all finite values in their dtype, and hardly less. No value has a bound.

    ``whole``: what is decoded will be rounded to whole numbers; the error is that of these. None where a transform is of no
    use: nothing finite, values further apart than its integers reach, or an error that rounding alone exceeds.
    """
    x = np.asarray(x)
    if x.dtype not in (np.float32, np.float64) or not 1 <= x.ndim <= 4 or not (np.isfinite(rmse) and rmse > 0):
        raise ValueError("a transform takes float32 or float64 with 1 to 4 axes and an error above zero")
    plan = _Plan(x.dtype, x.shape, TRANSFORMED, RMSE, float(rmse), periodic, version=TRANSFORM_VERSION)
    stack, _ = _transform_parts(replace(plan, group=1))
    values = np.ascontiguousarray(x, x.dtype.newbyteorder("=")).reshape(plan.stack)
    classes = _classes(values)
    finite = values if classes is None else values[classes == FINITE]
    if not finite.size:
        return None
    blocks = _class_blocks(plan, values, classes, nan_payloads)
    values, mask = values.reshape(stack), None if classes is None else (classes == FINITE).reshape(stack)
    offset = float(finite.min()) / 2 + float(finite.max()) / 2
    area = max(stack[2] * stack[3], 1)
    most = min(max(PART_VALUES // area, 1), PART_LEVELS)
    plan.group = -(-stack[1] // -(-stack[1] // most))
    plan.times = min(max(PART_VALUES // (area * plan.group), 1), PART_LEVELS, stack[0])
    _, parts = _transform_parts(plan)

    def centred(i: int) -> np.ndarray:
        planes = values[parts[i]].astype(np.float64) - offset
        if mask is not None:
            known = mask[parts[i]].reshape(-1, *stack[2:])
            for plane, there in zip(planes.reshape(known.shape), known):
                plane[...] = smooth_fill(plane, there)
        return planes

    def work(i: int) -> tuple[bytes, float] | None:
        made = encode_part(centred(i), plan.scale.delta * 2.0**FRACTION, periodic, choices[i])
        if made is None:
            return None
        y = _real(plan, made[1])
        off = (np.rint(y) if whole else y) - values[parts[i]]
        return made[0], float(np.square(off if mask is None else off[mask[parts[i]]]).sum())

    best, points, chosen = None, [], 0.0
    middle = len(parts) // 2
    step = guess_step(centred(middle), periodic, float(rmse) ** 2)
    for _ in range(8):
        if not chosen or not 1 / 1.5 < step / chosen < 1.5:
            choices, chosen = [Choices() for _ in parts], step
        plan.scale = PlainScale(step * 2.0**-FRACTION, offset)
        with np.errstate(over="ignore", invalid="ignore"):
            made = list(_each(work, len(parts), threads)) if np.isfinite(1 / step) else [None]
        if any(part is None for part in made):
            break
        error = float(np.sqrt(sum(part[1] for part in made) / finite.size))  # type: ignore[index]
        if error <= rmse and (best is None or error >= best[0]):
            best = error, _finish(plan, blocks + b"".join(_block(part[0]) for part in made))  # type: ignore[index]
        if NEAR_ENOUGH * rmse <= error <= rmse or error == 0 or (points and error <= rmse and error == points[-1][1]):
            break
        power = 1.24
        if points and error != points[-1][1]:
            power = float(np.clip(np.log(step / points[-1][0]) / np.log(error / points[-1][1]), 0.7, 3.0))
        points.append((step, error))
        step *= min(max(((1 + NEAR_ENOUGH) / 2 * rmse / error) ** power, 0.125), 8.0)
    if best is None:
        return None
    y = decode_field(best[1], threads=threads)
    there = np.isfinite(x)
    off = (np.rint(y[there]) if whole else y[there]).astype(np.float64) - x[there]
    if np.sqrt(np.mean(np.square(off))) > rmse or not _same(np.where(there, x, y), x, nan_payloads):
        raise AssertionError("a payload did not decode to what was asked for")
    return best[1]


def _real(plan: _Plan, planes: np.ndarray) -> np.ndarray:
    """Decoded planes as values of the dtype, one multiplication and one addition each; here still float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (planes * plan.scale.delta + plan.scale.offset).astype(plan.dtype).astype(np.float64)


def _decode_transformed(plan: _Plan, reader: _Reader, chosen: set[int], threads: int) -> np.ndarray:
    """(T, L, H, W); parts without a chosen level stay zero."""
    classes, nan_bits = _read_classes(plan, reader)
    stack, parts = _transform_parts(plan)
    y = np.zeros(stack, plan.dtype)
    alone = plan.stack[1] == 1
    streams = [reader.block() for _ in parts]
    if reader.at != len(reader.data):
        raise CorruptStream("field payload: something follows its end")

    def work(i: int) -> None:
        inside = parts[i][1]
        if alone or chosen.intersection(range(inside.start, inside.stop)):
            y[parts[i]] = _real(plan, decode_part(streams[i], y[parts[i]].shape, plan.periodic))

    for _ in _each(work, len(parts), threads):
        pass
    return _with_classes(plan, y.reshape(plan.stack), classes, nan_bits)


def describe_field(payload: bytes) -> dict[str, Any]:
    """What a payload says of itself: shape, dtype, mode, kind and value of its bound, group of levels, need of a base."""
    plan, _ = _checked_plan(payload, 1 << 62)
    return {
        "shape": plan.shape, "dtype": plan.dtype.name, "mode": ("stored", "lossless", "bounded", "transformed")[plan.mode],
        "kind": KINDS[plan.kind], "bound": plan.bound, "periodic": plan.periodic, "level_group": plan.group,
        "needs_base": plan.based,
    }  # fmt: skip
