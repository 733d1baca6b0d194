"""One chunk of one variable: raw values of any type <-> bytes that can be decoded alone.

    raw chunk --(fill values, packing)--> float field (T, L, H, W) --entropy.grid--> payload

A payload is a canonical CBOR array that says what it is, then data: ``[CONSTANT, raw]``; ``[LINEAR, first, step]`` of even
steps, as coordinates have them (in float64, then rounded to the type); ``[BYTES]`` + LZMA2 of the raw values, all first bytes,
then all second ones; ``[TEXTS]`` + LZMA2 of a CBOR list; ``[FIELD, NaN patterns, limits]`` + a payload of ``entropy.grid``;
``[NEURAL, NaN patterns, limits]`` + one of a network and, on it, one of ``entropy.grid`` (``codecs/grid_neural.py``).
Packed integers are coded as integers: a bound in the variable's unit becomes a whole number of packing steps, so what was
decoded is packed with the same scale and offset as before, and no rounding is added to the error. What is decoded within a
bound is clipped to the limits, the smallest and largest value of the chunk: that never adds to an error, and keeps fractions
within 0..1, rain from being negative, and integers in their type.
"""

from __future__ import annotations

import lzma
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..container import cbor
from ..container.errors import CorruptStream
from ..media.grid import STRING, Layout

if TYPE_CHECKING:
    from ..entropy.grid import Bound
    from .grid_neural import About

CONSTANT, BYTES, TEXTS, FIELD, LINEAR, NEURAL = range(6)
KINDS = ("lossless", "absolute", "relative", "range", "bits", "quality", "rmse")
BEST_EFFORT = ("quality", "rmse")
BASE_LEVEL = 500
"""Level 0..1000 of a network that a residual within a bound stands on."""
GROUP_VALUES = 1 << 23
SMALL = 512  # values below which a general compressor is as good as a model of fields, and without a bound:
SMALL_LOSSLESS = 4096
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
_MARKED = 0x5A5A  # low bits of the NaN that stands for a fill value where there are true NaNs too


@dataclass(frozen=True)
class Coding:
    """How the chunks of a variable are coded. Plain values, so that it can stand in a header.

    ``kind`` and ``value`` are the bound, in the variable's unit; ``bits`` (kept by their real information): the share of the
    information that is kept; best effort are ``quality`` (0..100, of the network alone) and ``rmse`` (root mean square error
    of a chunk). ``model``: a network, ``codec:preset``; within a bound it is used where that is smaller. ``axes``: see
    ``Layout.axes``. ``fills``: raw bytes of the values that mean 'missing'.
    """

    dtype: str
    axes: str
    kind: str = "lossless"
    value: float = 0.0
    periodic: bool = False
    scale: float = 1.0
    offset: float = 0.0
    fills: tuple[bytes, ...] = ()
    model: str = ""

    def plain(self) -> dict[str, Any]:
        """Without what is at its default."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v != getattr(Coding, k, None)}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Coding:
        """Inverse of ``plain``. CorruptStream for anything else."""
        types = {"dtype": str, "axes": str, "kind": str, "value": float, "periodic": bool, "scale": float, "offset": float,
                 "fills": list, "model": str}  # fmt: skip
        if not isinstance(plain, dict) or any(type(v) is not types.get(k) for k, v in plain.items()):
            raise CorruptStream("header: bad description of a variable")
        try:
            made = cls(**plain | {"fills": tuple(plain.get("fills", ()))})
            sound = made.dtype == STRING or np.dtype(made.dtype).kind in "iufS"
        except TypeError:
            sound = False
        if not sound or made.kind not in KINDS or set(made.axes) - set("TLYX") or not all(
            type(f) is bytes and len(f) == np.dtype(made.dtype).itemsize for f in made.fills):  # fmt: skip
            raise CorruptStream("header: bad description of a variable")
        return made

    @property
    def lossy(self) -> bool:
        return self.kind != "lossless"

    @property
    def level(self) -> int:
        """Level of the network."""
        return round(self.value * 10) if self.kind == "quality" else BASE_LEVEL


def coding_of(layout: Layout, name: str, kind: str = "lossless", value: float = 0.0, model: str = "") -> Coding:
    """The coding of a variable of a file within a bound. ``model``: a network for what is lossy."""
    variable = layout.variables[name]
    fills = tuple(np.asarray(f).tobytes() for f in variable.fills) if variable.dtype not in (STRING, "S1") else ()
    scale, offset = variable.scale if variable.packed else (1.0, 0.0)
    return Coding(variable.dtype, layout.axes(name), kind, float(value), scale=scale, offset=offset, fills=fills,
                  model="" if kind == "lossless" else model)  # fmt: skip


@dataclass
class Stats:
    """What is known of a chunk once it is coded: ``values``, ``raw`` and ``coded`` bytes, for ``bits`` the mantissa bits kept,
    for best effort the bound that the error happens to have, and whether a network was used."""

    values: int
    raw: int
    coded: int
    keep: int | None = None
    worst: float | None = None
    neural: bool = False


def encode_chunk(values: np.ndarray, coding: Coding, threads: int = 1, what: About | None = None) -> tuple[bytes, Stats]:
    """Raw values, axes as ``coding.axes`` -> (payload, what it cost). The bound holds when this returns.

    ``what`` the chunk is, for ``coding.model``; without it no network is used.
    """
    stats = Stats(values.size, values.nbytes, 0)
    if coding.dtype == STRING:
        payload = cbor.encode([TEXTS]) + _packed(cbor.encode([str(v) for v in values.ravel()]))
    elif values.size and len(np.unique(_bits(values.ravel()[:: max(values.size // 64, 1)]))) == 1 and _constant(values):
        payload = cbor.encode([CONSTANT, values.ravel()[:1].tobytes()])
    elif values.ndim == 1 and coding.dtype != "S1" and (steps := _even_steps(values)):
        payload = cbor.encode([LINEAR, *steps])
    elif values.size < (SMALL if coding.lossy else SMALL_LOSSLESS) or coding.dtype == "S1":
        payload = _bytes(values)
    elif coding.dtype[0] == "f":
        payload = _encode_floats(values, coding, threads, stats, what)
    else:
        payload = _encode_integers(values, coding, threads, stats, what)
    stats.coded = len(payload)
    return payload, stats


def decode_chunk(payload: bytes, shape: tuple[int, ...], coding: Coding, threads: int = 1) -> np.ndarray:
    """Inverse of ``encode_chunk``: raw values of ``shape``. CorruptStream for anything damaged."""
    fields, used = cbor.decode_prefix(payload)
    body, count = payload[used:], math.prod(shape)
    kind = fields[0] if isinstance(fields, list) and fields and type(fields[0]) is int else -1
    if kind == TEXTS and len(fields) == 1 and coding.dtype == STRING:
        texts = cbor.decode(_unpacked(body, None))
        if not isinstance(texts, list) or len(texts) != count or not all(isinstance(t, str) for t in texts):
            raise CorruptStream("chunk: wrong number of texts")
        return np.array(texts, object).reshape(shape)
    if coding.dtype == STRING:
        raise CorruptStream("chunk: no texts")
    dtype = np.dtype(coding.dtype).newbyteorder("<")
    if kind == CONSTANT and len(fields) == 2 and type(fields[1]) is bytes and len(fields[1]) == dtype.itemsize and not body:
        return np.full(shape, np.frombuffer(fields[1], dtype)[0], dtype.newbyteorder("="))
    if kind == LINEAR and [type(f) for f in fields[1:]] == [float, float] and len(shape) == 1 and not body:
        return _line(fields[1], fields[2], count, dtype.newbyteorder("="))
    if kind == BYTES and len(fields) == 1:
        raw = np.frombuffer(_unpacked(body, count * dtype.itemsize), np.uint8).reshape(dtype.itemsize, count)
        return np.ascontiguousarray(raw.T).view(dtype).reshape(shape).astype(dtype.newbyteorder("="))
    if kind in (FIELD, NEURAL) and len(fields) == 3 and isinstance(fields[1], list) and isinstance(fields[2], list):
        return _decode_field(body, kind == NEURAL, fields[1], fields[2], shape, coding, threads)
    raise CorruptStream("chunk: unknown kind")


# --- real numbers -----------------------------------------------------------------------------------------------------


def _encode_floats(values: np.ndarray, coding: Coding, threads: int, stats: Stats, what: About | None) -> bytes:
    """Floats within their bound; fill values become NaN, of a pattern of their own where there are true ones as well."""
    from ..entropy.grid import Bound, encode_field

    patterns: list[list[Any]] = []
    field, missing = values, None
    for number, raw in enumerate(coding.fills):
        fill = np.frombuffer(raw, values.dtype)[0]
        here = values == fill
        if not here.any():
            continue
        if missing is None:
            field, missing = values.copy(), np.isnan(values).any()
        field[here] = _nan(values.dtype, number + 1)
        patterns.append([number + 1, raw])
    if len(patterns) == 1 and not missing:  # the usual case: NaN without a pattern is what the coder likes best
        field[np.isnan(field)] = np.nan
        patterns[0][0] = 0
    payloads = (missing is None or bool(missing) or len(patterns) > 1) and not _canonical(field)
    bound = None
    if coding.kind == "bits":
        from .bitinformation import keep_bits, rounded

        ordered = _ordered(field, coding.axes)
        keeps = keep_bits(ordered, coding.value)
        field = _restored(rounded(ordered, keeps), field.shape, coding.axes)
        stats.keep = min(keeps)
    elif coding.lossy and coding.kind not in BEST_EFFORT:
        bound = Bound(coding.value, coding.kind)
    ordered = _ordered(field, coding.axes)
    options = {"periodic": coding.periodic, "threads": threads, "level_group": _level_group(ordered.shape)}
    kind, payload = _coded(ordered, bound, coding, stats, what, options | {"nan_payloads": payloads})
    made = cbor.encode([kind, patterns, _limits(ordered) if coding.lossy and coding.kind != "bits" else []]) + payload
    if coding.lossy and _fill_within(ordered, coding) and _new_fills(made, values, coding, threads):
        ordered = _ordered(values, coding.axes)
        payload = encode_field(ordered, None, nan_payloads=True, **options)
        made, stats.neural, stats.worst = cbor.encode([FIELD, [], []]) + payload, False, None
    return made


def _coded(ordered: np.ndarray, bound: Bound | None, coding: Coding, stats: Stats, what: About | None,
           options: dict[str, Any]) -> tuple[int, bytes]:  # fmt: skip
    """(FIELD or NEURAL, payload) of a field within a bound, or of a quality or error: what is smaller."""
    from ..entropy.grid import encode_field

    if coding.kind == "rmse":
        payload, reached = _for_rmse(ordered, coding.value / abs(coding.scale), coding, options)
        stats.worst = reached * abs(coding.scale)
        return FIELD, payload
    plain = None if coding.kind == "quality" and what else encode_field(ordered, bound, **options)
    if not coding.model or what is None or (plain is not None and bound is None):
        return FIELD, plain or b""
    from .grid_neural import encode_base, joined

    real = ordered.astype(np.float64) * coding.scale + coding.offset if coding.dtype[0] in "iu" else ordered
    neural, base = encode_base(real, what, coding.model, coding.level)
    base = _in_steps(base, coding)
    if coding.kind == "quality":
        finite, stats.neural = np.isfinite(ordered), True
        decoded = np.rint(base) if coding.dtype[0] in "iu" else base.astype(ordered.dtype).astype(np.float64)
        stats.worst = float(np.abs(ordered - decoded, where=finite, out=np.zeros(base.shape)).max()) * abs(coding.scale)
        # zeros, and whatever is not finite: only that is taken from here
        return NEURAL, joined(neural, encode_field(np.where(finite, 0, ordered), None, **options))
    both = joined(neural, encode_field(ordered, bound, base=base, **options))
    if plain is not None and len(plain) <= len(both):
        return FIELD, plain
    stats.neural = True
    return NEURAL, both


def _for_rmse(ordered: np.ndarray, target: float, coding: Coding, options: dict[str, Any]) -> tuple[bytes, float]:
    """(payload, largest error) with a root mean square error of ``target`` at most, and not much less: by a transform or by
    the predictor, whatever is smaller."""
    from ..entropy.grid import Bound, decode_field, encode_field, encode_rmse

    whole, threads = coding.dtype[0] in "iu", options["threads"]
    finite = np.isfinite(ordered)
    x = ordered[finite].astype(np.float64)

    def off(payload: bytes) -> np.ndarray:
        y = decode_field(payload, threads=threads)[finite].astype(np.float64)
        return (np.rint(y) if whole else y) - x

    few = {name: options[name] for name in ("periodic", "threads", "nan_payloads") if name in options}
    best = encode_rmse(ordered, target, whole=whole, **few) if x.size and target > 0 else None
    bound, widest = 2.5 * target, 0.0
    for _ in range(6 if x.size and target > 0 else 0):
        payload = encode_field(ordered, Bound(bound), goal="rmse", **options)
        error = float(np.sqrt(np.mean(np.square(off(payload)))))
        if best is not None and len(payload) * min(max(error / target, 0.25), 4.0) > 1.25 * len(best):
            break  # it will not be as small at the error wanted, whose slope is less steep than that
        if error <= target and (best is None or len(payload) < len(best) or widest and bound > widest):
            best, widest = payload, bound
        if 0.97 * target <= error <= target or error == 0:
            break
        bound *= min(max(0.99 * target / error, 0.25), 4.0)
    if best is None:  # nothing there, or the steps of the packing are coarser than what was asked for
        return encode_field(ordered, Bound(0.5) if whole else None, **options), 0.0
    return best, float(np.abs(off(best)).max())


def _in_steps(base: np.ndarray, coding: Coding) -> np.ndarray:
    """The network's field on the packing's steps, by one subtraction and one division: the same bits everywhere."""
    return (base - coding.offset) / coding.scale if coding.dtype[0] in "iu" else base


def _limits(values: np.ndarray) -> list[float]:
    finite = values[np.isfinite(values)]
    return [float(finite.min()), float(finite.max())] if finite.size else []


def _fill_within(field: np.ndarray, coding: Coding) -> bool:
    """Whether a fill value lies among the values, so that one of these may become it."""
    limits = _limits(field)
    return bool(limits) and any(limits[0] <= float(np.frombuffer(f, coding.dtype)[0]) <= limits[1] for f in coding.fills)


def _new_fills(payload: bytes, values: np.ndarray, coding: Coding, threads: int) -> bool:
    """Whether a value that was there would come back as one that means 'missing'."""
    decoded = decode_chunk(payload, values.shape, coding, threads)
    fills = [np.frombuffer(f, values.dtype)[0] for f in coding.fills]
    return any(((decoded == f) != (values == f)).any() for f in fills)


def _decode_field(body: bytes, neural: bool, patterns: list, limits: list, shape: tuple[int, ...], coding: Coding,
                  threads: int) -> np.ndarray:  # fmt: skip
    from ..entropy.grid import decode_field, describe_field

    dtype = np.dtype(coding.dtype)
    try:
        known = {int(n): np.frombuffer(raw, dtype)[0] for n, raw in patterns if len(raw) == dtype.itemsize}
    except (TypeError, ValueError):
        known = {}
    if len(known) != len(patterns) or [type(v) for v in limits] not in ([], [float, float]):
        raise CorruptStream("chunk: bad fill values or limits")
    base = None
    if neural:
        from .grid_neural import decode_base, parted

        if not coding.model:
            raise CorruptStream("chunk: needs a network, which the header does not name")
        first, body = parted(body)
        base = _in_steps(decode_base(first, _four(shape, coding.axes), coding.model), coding)
    about = describe_field(body)
    carrier = dtype if dtype.kind == "f" else np.dtype("f8")
    known_types = (carrier,) if base is not None else (carrier, dtype)
    if about["shape"] != _four(shape, coding.axes) or np.dtype(about["dtype"]) not in known_types:
        raise CorruptStream("chunk: another shape or type than the header says")
    if about["needs_base"] and base is None:
        raise CorruptStream("chunk: stands on a network's field, which is not there")
    field = decode_field(body, base=base, threads=threads, limit=math.prod(shape))
    if base is not None and not about["needs_base"]:
        np.copyto(field, base, casting="same_kind", where=np.isfinite(field))
    field = _restored(field, shape, coding.axes)
    if field.dtype.kind in "iu":
        return field
    if limits:
        inside = np.isfinite(field)
        np.clip(field, *np.array(limits, carrier), out=field, where=inside)
    if dtype.kind == "f":
        for number, fill in known.items():
            here = np.isnan(field) if number == 0 else _bits(field) == _bits(_nan(dtype, number))
            field[here] = fill
        return field
    missing = np.isnan(field)
    if missing.any() and 0 not in known:
        raise CorruptStream("chunk: NaN among integers")
    whole = np.rint(np.where(missing, 0, field))
    if whole.size and not (np.iinfo(dtype).min <= whole.min() and whole.max() <= np.iinfo(dtype).max):
        raise CorruptStream("chunk: integers beyond their type")
    result = whole.astype(dtype)
    if missing.any():
        result[missing] = known[0]
    return result


# --- integers ---------------------------------------------------------------------------------------------------------


def _encode_integers(values: np.ndarray, coding: Coding, threads: int, stats: Stats, what: About | None) -> bytes:
    """Integers, packed reals or not: as a field of whole numbers where these are exact, or as bytes, whatever is smaller."""
    from ..entropy.grid import Bound, encode_field

    (steps, stats.keep), reach = _steps(values, coding), max(abs(int(values.min())), abs(int(values.max())))
    lossy = steps > 0 or coding.kind in BEST_EFFORT
    best = None if lossy or values.size > 1 << 20 else _bytes(values)
    fills = [np.frombuffer(raw, values.dtype)[0] for raw in coding.fills]
    present = [f for f in fills if (values == f).any()]
    options: dict[str, Any] = {"periodic": coding.periodic, "threads": threads}
    if not lossy and not present and values.dtype.itemsize <= 4 and values.dtype != np.uint32:
        ordered = _ordered(values, coding.axes)
        made = cbor.encode([FIELD, [], []]) + encode_field(ordered, level_group=_level_group(ordered.shape), **options)
        return made if best is None or len(made) < len(best) else best
    if reach >= 1 << 50:  # beyond what float64 holds with room for a half
        return best or _bytes(values)
    field, patterns = values.astype(np.float64), []
    if len(present) == 1:
        field[values == present[0]] = np.nan
        patterns = [[0, present[0].tobytes()]]
    elif len(present) > 1:
        steps, lossy = 0, False
    # a lattice of step 2k + 1: every cell of it holds as many integers on both sides of its middle
    ordered = _ordered(field, coding.axes)
    options["level_group"] = _level_group(ordered.shape)
    kind, payload = _coded(ordered, Bound(steps + 0.5), coding, stats, what if lossy else None, options)
    made = cbor.encode([kind, patterns, _limits(field) if lossy else []]) + payload
    if lossy and _fill_within(field, coding) and _new_fills(made, values, coding, threads):
        stats.neural, stats.worst = False, None
        return _encode_integers(values, replace(coding, kind="lossless", value=0.0), threads, stats, None)
    return made if best is None or len(made) < len(best) else best


def _steps(values: np.ndarray, coding: Coding) -> tuple[int, int | None]:
    """Whole packing steps that a value may be off, 0 for lossless, and the mantissa bits kept where those decide.

    Relative bounds are those of the smallest magnitude.
    """
    if not coding.lossy or coding.kind in BEST_EFFORT or coding.scale == 0 or not math.isfinite(coding.scale):
        return 0, None
    valid = np.ones(values.shape, bool)
    for raw in coding.fills:
        valid &= values != np.frombuffer(raw, values.dtype)[0]
    if not valid.any():
        return 0, None
    keep, real = None, values[valid] * coding.scale + coding.offset
    size = np.abs(real)
    if coding.kind == "absolute":
        bound = coding.value
    elif coding.kind == "range":
        bound = coding.value * float(np.ptp(real))
    elif coding.kind == "relative":
        bound = coding.value * float(size.min())
    else:
        from .bitinformation import keep_bits

        unpacked = np.where(valid, values * coding.scale + coding.offset, np.nan).astype(np.float32)
        keep = min(keep_bits(_ordered(unpacked, coding.axes), coding.value))
        bound = float(size.min()) * 2.0 ** -(keep + 1)
    # whoever unpacks to float32 rounds both the original and the decoded value
    bound -= float(size.max()) * 2.0**-23
    return (max(0, min(math.floor(bound / abs(coding.scale)), 1 << 31)) if bound > 0 else 0), keep


# --- shapes and bits --------------------------------------------------------------------------------------------------


def _order(axes: str) -> list[int]:
    return [i for letter in "TLYX" for i, a in enumerate(axes) if a == letter]


def _four(shape: tuple[int, ...], axes: str) -> tuple[int, int, int, int]:
    """Shape of a chunk as times, levels (and all else), rows, columns."""
    return tuple(math.prod(n for n, a in zip(shape, axes) if a == letter) for letter in "TLYX")  # type: ignore[return-value]


def _ordered(values: np.ndarray, axes: str) -> np.ndarray:
    return np.ascontiguousarray(values.transpose(_order(axes))).reshape(_four(values.shape, axes))


def _level_group(shape: tuple[int, ...]) -> int | None:
    """Levels that are coded together: all, or as many as bound the memory of the coder."""
    times, levels, rows, columns = shape
    group = max(GROUP_VALUES // max(times * rows * columns, 1), 1)
    return None if group >= levels else group


def _restored(field: np.ndarray, shape: tuple[int, ...], axes: str) -> np.ndarray:
    order = _order(axes)
    return np.ascontiguousarray(field.reshape([shape[i] for i in order]).transpose(np.argsort(order)))


def _bits(values: np.ndarray | np.generic) -> np.ndarray:
    values = np.asarray(values)
    return values.view(f"u{values.dtype.itemsize}")


def _constant(values: np.ndarray) -> bool:
    bits = _bits(values).ravel()
    return bool((bits == bits[0]).all())


def _nan(dtype: np.dtype, number: int) -> np.generic:
    """The quiet NaN that stands for fill value ``number``, 1 up."""
    size = np.dtype(dtype).itemsize
    quiet = 0x7FC00000 if size == 4 else 0x7FF8000000000000
    return np.array(quiet | _MARKED << 4 | number, f"u{size}").view(dtype)[()]


def _canonical(field: np.ndarray) -> bool:
    """Whether every NaN has the bits that numpy gives it."""
    bits = _bits(field)[np.isnan(field)]
    return bool((bits == _bits(np.array(np.nan, field.dtype))).all())


def _line(first: float, step: float, count: int, dtype: np.dtype) -> np.ndarray:
    """``count`` values at even steps. CorruptStream where they do not fit their type."""
    values = first + step * np.arange(count, dtype=np.float64)
    if dtype.kind != "f":
        limits, values = np.iinfo(dtype), np.rint(values)
        if values.size and not (limits.min <= values.min() and values.max() < limits.max + 1):
            raise CorruptStream("chunk: integers beyond their type")
    return values.astype(dtype)


def _even_steps(values: np.ndarray) -> tuple[float, float] | None:
    """(first, step) when these give every bit of the values; None otherwise."""
    if values.size < 4 or not np.isfinite(values).all():
        return None
    first = float(values[0])
    step = (float(values[-1]) - first) / (len(values) - 1)
    for guess in (step, float(np.float32(step)), round(step, 9)):
        try:
            if _line(first, guess, len(values), values.dtype).tobytes() == values.tobytes():
                return first, guess
        except CorruptStream:
            continue
    return None


def _bytes(values: np.ndarray) -> bytes:
    """Any fixed-size values, losslessly, byte planes apart."""
    raw = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(-1, 1).view(np.uint8)
    return cbor.encode([BYTES]) + _packed(np.ascontiguousarray(raw.T).tobytes())


def _packed(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=_LZMA)


def _unpacked(data: bytes, size: int | None, most: int = 1 << 28) -> bytes:
    """``size`` bytes exactly, or at most ``most``. CorruptStream."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
    try:
        raw = decoder.decompress(data, max_length=(most if size is None else size) + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise CorruptStream("chunk: damaged") from error
    if not decoder.eof or decoder.unused_data or (size is not None and len(raw) != size):
        raise CorruptStream("chunk: wrong length")
    return raw
