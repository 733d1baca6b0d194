"""The kinds of data that can be measured: how a sample is read, what its rate is per, and how two of them compare."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..container.errors import CodecError, UnsupportedInput, UsageError
from ..datasets.registry import PICTURES, Found, pixel_hash


@dataclass(frozen=True)
class Item:
    """Where a sample lies: a file or folder, and the part of it (a variable of a file of fields)."""

    path: Path
    part: str = ""


@dataclass(frozen=True)
class Field:
    """A variable on a grid: ``values`` (N, H, W) float32, all leading dimensions in one; ``latitude`` (H,) degrees.

    ``pressures``: hPa of each of the N, 0 where there is none; empty when not known.
    """

    values: np.ndarray
    latitude: np.ndarray
    name: str
    unit: str
    pressures: tuple[int, ...] = ()


class Kind(ABC):
    """One kind of data. ``rate`` names the rate in results; ``quality``, in dB, is what BD-rates are taken over."""

    name: ClassVar[str]
    noun: ClassVar[str]
    rate: ClassVar[str]
    rate_title: ClassVar[str]
    quality: ClassVar[str | None]
    default_metrics: ClassVar[tuple[str, ...]]
    shown: ClassVar[tuple[str, ...]] = ()  # further metrics with a column of the table

    @property
    @abstractmethod
    def metrics(self) -> dict[str, Callable]:
        """All metrics by name."""

    @abstractmethod
    def read(self, item: Item) -> Any:
        """The sample. CodecError when it cannot be read or measured."""

    def items(self, found: Found) -> dict[str, Item]:
        """Samples of a set by name."""
        return {p.relative_to(found.folder).as_posix(): Item(p) for p in found.paths}

    def data(self, sample: Any) -> Any:
        """What a codec gets of a sample."""
        return sample

    @abstractmethod
    def fingerprint(self, sample: Any) -> str:
        """sha256 of what is in a sample."""

    @abstractmethod
    def count(self, sample: Any) -> int:
        """What the rate is per: pixels, values or bytes."""

    @abstractmethod
    def shape(self, sample: Any) -> tuple[int, ...]:
        """Shape, or length, which a decoded sample must have too."""

    @abstractmethod
    def compare(self, sample: Any, decoded: Any, metrics: Iterable[str]) -> dict[str, float | None]:
        """Values of the metrics and of what belongs to every point; None for infinite or undefined ones."""

    def ratios(self, size: int, sample: Any) -> dict[str, float]:
        """Other measures of a file's size."""
        return {}

    def pool(self, points: list[dict[str, Any]]) -> dict[str, float | None]:
        """Values of a whole set that are no means over its samples."""
        return {}

    def check_metrics(self, names: Iterable[str]) -> tuple[str, ...]:
        """Names in the way that results write them. UsageError for an unknown one."""
        names = tuple(dict.fromkeys(n.replace("-", "_") for n in names))
        for name in names:
            if name not in self.metrics and name not in SET_METRICS.get(self.name, ()):
                known = ", ".join((*self.metrics, *SET_METRICS.get(self.name, ()))) or "none: they come back or they fail"
                raise UsageError(f"there is no metric {name!r} for {self.noun}; known are {known}")
        return names


SET_METRICS = {"image": ("fid", "kid")}
"""Metrics over a whole set of decoded samples at once (see ``run.set_metrics``)."""


def finite(value: float | None) -> float | None:
    """JSON knows no infinity."""
    return value if value is not None and math.isfinite(value) else None


class Pictures(Kind):
    """(H, W, 3) uint8. Grey pictures are repeated, an alpha channel is left out."""

    name, noun, rate, rate_title, quality = "image", "pictures", "bpp", "bits per pixel", "psnr"
    default_metrics = ("psnr", "psnr_y", "ms_ssim")

    @property
    def metrics(self) -> dict[str, Callable]:
        from .metrics import METRICS

        return METRICS

    def read(self, item: Item) -> np.ndarray:
        from ..media.image import read_picture

        pixels = read_picture(item.path).pixels
        if pixels.dtype != np.uint8:
            raise UnsupportedInput(f"{item.path}: has {pixels.dtype.itemsize * 8} bits per channel; only 8 are measured")
        return np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels

    def fingerprint(self, sample: np.ndarray) -> str:
        return pixel_hash(sample)

    def count(self, sample: np.ndarray) -> int:
        return math.prod(sample.shape[:-1])

    def shape(self, sample: np.ndarray) -> tuple[int, ...]:
        return sample.shape

    def compare(self, sample: np.ndarray, decoded: np.ndarray, metrics: Iterable[str]) -> dict[str, float | None]:
        from .metrics import mse_rgb

        values = {name: finite(self.metrics[name](sample, decoded, 255)) for name in metrics}
        return {"mse": mse_rgb(sample, decoded)} | values

    def pool(self, points: list[dict[str, Any]]) -> dict[str, float | None]:
        from .metrics import psnr_pooled

        return {"psnr_pooled": finite(psnr_pooled([p["mse"] for p in points]))}


class Video(Pictures):
    """(T, H, W, 3) uint8: a folder of frames in the order of their names, or a file that PyAV reads.

    Bits per pixel are over all frames; bare ``.yuv`` files need their size in the name (..._1920x1080_...), 8 bit 4:2:0. """

    name, noun = "video", "sequences"

    @property
    def metrics(self) -> dict[str, Callable]:
        from .metrics_video import METRICS

        return METRICS

    def read(self, item: Item) -> np.ndarray:
        if item.path.is_dir():
            frames = sorted(p for p in item.path.iterdir() if p.suffix.lower() in PICTURES)
            read = [Pictures.read(self, Item(p)) for p in frames]
        else:
            read = _video_frames(item.path)
        if not read:
            raise UnsupportedInput(f"{item.path}: no frames")
        if len({f.shape for f in read}) > 1:
            raise UnsupportedInput(f"{item.path}: the frames have different sizes")
        return np.stack(read)


def _video_frames(path: Path) -> list[np.ndarray]:
    try:
        import av
    except ImportError:
        raise UsageError("video files need the package av: pip install av") from None
    options: dict[str, str] = {}
    form = None
    if path.suffix.lower() == ".yuv":
        import re

        size = re.search(r"(\d{2,5})x(\d{2,5})", path.name)
        if not size:
            raise UnsupportedInput(f"{path}: the size of the frames must be in the name, as in a_1920x1080.yuv")
        options, form = {"video_size": size[0], "pixel_format": "yuv420p"}, "rawvideo"
    try:
        with av.open(str(path), format=form, options=options) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise UnsupportedInput(f"{path}: {error}") from None


class Grids(Kind):
    """Variables of netCDF (or other xarray) files, each a sample of its own; the last two dimensions are the grid."""

    name, noun, rate, rate_title, quality = "grid", "fields", "bits_per_value", "bits per value", "snr"
    default_metrics = (
        "snr", "rmse_weighted", "rmse_relative", "max_error", "max_error_relative", "anomaly_correlation",
        "spectrum_ratio", "bias", "extremes_error", "gradient_error", "resolved_wavenumber", "data_ssim",
    )  # fmt: skip
    shown = ("ratio_float32", "ratio_int16", "max_error_relative", "max_error_over_bound")

    @property
    def metrics(self) -> dict[str, Callable]:
        from .metrics_grid import METRICS

        return METRICS

    def items(self, found: Found) -> dict[str, Item]:
        items = {}
        for path in found.paths:
            for name in fields_of(path):
                items[f"{path.relative_to(found.folder).as_posix()}:{name}"] = Item(path, name)
        return items

    def read(self, item: Item) -> Field:
        with _dataset(item.path) as data:
            variable = data[item.part]
            rows = variable.dims[-2]
            latitude = np.asarray(data[rows].values, np.float64) if rows in data.coords else None
            values = np.asarray(variable.values, np.float32)
            unit = str(variable.attrs.get("units", ""))
            pressures = _pressures(data, variable)
        if latitude is None or latitude.ndim != 1 or not (np.abs(latitude) <= 90.001).all():
            raise UnsupportedInput(f"{item.path}: {item.part} has no latitudes on its last dimension but one")
        values = values.reshape(-1, *values.shape[-2:])
        if not np.isfinite(values).all():
            raise UnsupportedInput(f"{item.path}: {item.part} has missing values, which are not measured")
        return Field(values, latitude, item.part, unit, pressures)

    def data(self, sample: Field) -> np.ndarray:
        return sample.values

    def fingerprint(self, sample: Field) -> str:
        return pixel_hash(sample.values)

    def count(self, sample: Field) -> int:
        return sample.values.size

    def shape(self, sample: Field | np.ndarray) -> tuple[int, ...]:
        return (sample.values if isinstance(sample, Field) else sample).shape

    def compare(self, sample: Field, decoded: np.ndarray, metrics: Iterable[str]) -> dict[str, float | None]:
        return {name: finite(self.metrics[name](sample.values, decoded, sample.latitude)) for name in metrics}

    def ratios(self, size: int, sample: Field) -> dict[str, float]:
        """Against float32, and against the int16 packing that archives use: which one is meant must be said."""
        values = sample.values.size
        return {"count": values, "ratio_float32": values * 4 / size, "ratio_int16": values * 2 / size}

    def pool(self, points: list[dict[str, Any]]) -> dict[str, float | None]:
        """Geometric means of the ratios, the worst error over its bound, and the speed over all fields."""
        bytes_ = 4 * sum(p["count"] for p in points)
        over = [p["max_error_over_bound"] for p in points if p.get("max_error_over_bound") is not None]
        return {k: float(np.exp(np.mean([np.log(p[k]) for p in points]))) for k in ("ratio_float32", "ratio_int16")} | {
            "max_error_over_bound": max(over) if len(over) == len(points) else None,
            "encode_mb_s": bytes_ / 1e6 / sum(p["encode_s"] for p in points),
            "decode_mb_s": bytes_ / 1e6 / sum(p["decode_s"] for p in points),
        }


def _pressures(data: Any, variable: Any) -> tuple[int, ...]:
    """Pressure in hPa of every plane of a variable, in the order in which its leading dimensions are made one."""
    from ..media.units import factor

    found = np.zeros(variable.shape[:-2], np.int64)
    for place, dim in enumerate(variable.dims[:-2]):
        to_hpa = factor(str(data[dim].attrs.get("units", "")), "hPa") if dim in data.coords else None
        if to_hpa is not None:
            values = np.rint(np.asarray(data[dim].values, np.float64) * to_hpa).clip(0, 65535).astype(np.int64)
            found += values.reshape([-1 if i == place else 1 for i in range(found.ndim)])
    return tuple(np.ravel(found).tolist())


def fields_of(path: Path) -> list[str]:
    """Variables of a file that are fields of real numbers on a grid."""
    with _dataset(path) as data:
        return [
            str(name) for name, v in data.data_vars.items()
            if v.ndim >= 2 and np.issubdtype(v.dtype, np.floating) and min(v.shape[-2:]) > 1
        ]  # fmt: skip


def _dataset(path: Path) -> Any:
    import xarray

    try:
        return xarray.open_dataset(path)
    except (OSError, ValueError) as error:
        raise UnsupportedInput(f"{path}: cannot be read as a file of fields ({str(error).splitlines()[0]})") from None


class Bytes(Kind):
    """Whole files, which must come back exactly."""

    name, noun, rate, rate_title, quality = "bytes", "files", "bits_per_byte", "bits per byte", None
    default_metrics = ()

    @property
    def metrics(self) -> dict[str, Callable]:
        return {}

    def read(self, item: Item) -> bytes:
        if not (data := item.path.read_bytes()):
            raise UnsupportedInput(f"{item.path}: is empty, so it has no bits per byte")
        return data

    def fingerprint(self, sample: bytes) -> str:
        return hashlib.sha256(sample).hexdigest()

    def count(self, sample: bytes) -> int:
        return len(sample)

    def shape(self, sample: bytes) -> tuple[int, ...]:
        return (len(sample),)

    def compare(self, sample: bytes, decoded: bytes, metrics: Iterable[str]) -> dict[str, float | None]:
        if sample != decoded:
            raise CodecError("other bytes came back")
        return {"count": len(sample)}

    def pool(self, points: list[dict[str, Any]]) -> dict[str, float | None]:
        """Of all files as one: what compression benchmarks quote; and the speed over all of them."""
        total = sum(p["count"] for p in points)
        return {
            "bits_per_byte_total": 8 * sum(p["bytes"] for p in points) / total,
            "encode_mb_s": total / 1e6 / sum(p["encode_s"] for p in points),
            "decode_mb_s": total / 1e6 / sum(p["decode_s"] for p in points),
        }


KINDS: dict[str, Kind] = {kind.name: kind for kind in (Pictures(), Video(), Grids(), Bytes())}
