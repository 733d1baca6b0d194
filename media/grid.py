"""Files of fields: netCDF, GRIB and Zarr in, plain netCDF-4 out.

Everything is read *raw*: packed integers stay integers, fill values stay numbers, times stay numbers with their units and
calendar. So what is not meant to be lossy comes back bit for bit, and no decoding convention can change a value on the way.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..container.errors import UnsupportedInput, UsageError

NETCDF = {".nc", ".nc4", ".cdf", ".netcdf"}
GRIB = {".grib", ".grib2", ".grb", ".grb2", ".grib1", ".grb1"}
ZARR = {".zarr"}
SUFFIXES = NETCDF | GRIB | ZARR
RECORD = "neuralcodec"
"""Attribute of our archives with what Zarr cannot hold."""
STRING = "str"
"""``Variable.dtype`` of texts of any length (NC_STRING)."""
# what netCDF-4 stores and this format therefore keeps
KINDS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", "S1")
_REFERENCES = ("coordinates", "bounds", "grid_mapping", "cell_measures", "ancillary_variables", "climatology", "formula_terms",
               "quantization")  # fmt: skip
# storage settings of netCDF-4 that are kept; other filters (they need plug-ins) become deflate
_STORAGE = ("zlib", "complevel", "shuffle", "fletcher32", "contiguous", "chunksizes")


# The netCDF library is not thread-safe, and xarray holds its own lock only while it reads values, not while it opens a file. So
# one of ours is held around every use; around direct uses also xarray's, for what other code does through xarray meanwhile.
_lock = threading.RLock()


@contextmanager
def netcdf_locks() -> Iterator[None]:
    """Both locks, for direct uses of netCDF4."""
    from xarray.backends.netCDF4_ import NETCDF4_PYTHON_LOCK

    with _lock, NETCDF4_PYTHON_LOCK:
        yield


@dataclass(frozen=True)
class Variable:
    """A variable as stored: ``dtype`` is a numpy type code without byte order ('f4', 'i2', 'S1') or ``STRING``."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    attrs: dict[str, Any] = field(default_factory=dict)
    encoding: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the raw values; texts count 8 each, as pointers do."""
        return self.size * (8 if self.dtype == STRING else np.dtype(self.dtype).itemsize)

    @property
    def packed(self) -> bool:
        """Whether these are integers that stand for real numbers."""
        return self.dtype[0] in "iu" and ("scale_factor" in self.attrs or "add_offset" in self.attrs)

    @property
    def scale(self) -> tuple[float, float]:
        """(scale_factor, add_offset); 1 and 0 where there are none."""
        return tuple(
            float(np.asarray(self.attrs.get(k, d)).ravel()[0]) for k, d in (("scale_factor", 1.0), ("add_offset", 0.0))
        )

    @property
    def fills(self) -> list[Any]:
        """Values that mean 'missing', as numpy scalars of the variable's type; NaN is not listed."""
        found = []
        for key in ("_FillValue", "missing_value"):
            for value in np.atleast_1d(self.attrs.get(key, [])):
                with suppress(TypeError, ValueError, OverflowError):
                    typed = np.dtype(self.dtype).type(value)
                    if typed == typed and float(typed) == float(value) and typed not in found:
                        found.append(typed)
        return found


@dataclass(frozen=True)
class Layout:
    """What a file holds, without the values."""

    dims: dict[str, int]
    unlimited: tuple[str, ...]
    attrs: dict[str, Any]
    variables: dict[str, Variable]

    def axes(self, name: str) -> str:
        """One letter for each dimension of a variable: T time, Y rows, X columns, L anything else (levels, members).

        CF attributes of the coordinate variables decide, then names, then the order (the last two are the grid).
        """
        dims = self.variables[name].dims
        letters = [_axis(d, self.variables.get(d)) for d in dims]
        letters = [a if letters.index(a) == i or a == "L" else "L" for i, a in enumerate(letters)]
        for wanted in "XY":
            if wanted not in letters:
                free = [i for i, a in enumerate(letters) if a == "L"]
                if free and not (wanted == "Y" and len(free) == 1 and letters.index("X") < free[0]):
                    letters[free[-1]] = wanted
        return "".join(letters)

    def is_data(self, name: str) -> bool:
        """Whether a variable is a field, not a coordinate or something that another variable refers to."""
        variable = self.variables[name]
        if name in self.dims or not (variable.dtype[0] == "f" or variable.packed) or not variable.dims:
            return False
        if variable.attrs.get("axis") or variable.attrs.get("standard_name") in ("latitude", "longitude", "time"):
            return False
        return name not in self.referenced()

    def referenced(self) -> set[str]:
        """Names in the CF attributes by which variables point at others."""
        texts = [v.attrs.get(k) for v in self.variables.values() for k in _REFERENCES]
        texts.append(self.attrs.get("coordinates"))
        return {word.rstrip(":") for text in texts if isinstance(text, str) for word in text.split()}


_NAMES = {
    "T": {"time", "valid_time", "step", "t"},
    "Y": {"lat", "latitude", "y", "rlat", "nlat", "j", "south_north", "nav_lat"},
    "X": {"lon", "longitude", "x", "rlon", "nlon", "i", "west_east", "nav_lon", "values", "cell", "ncells", "ncol"},
}


def _axis(dim: str, variable: Variable | None) -> str:
    if variable is not None and variable.dims == (dim,):
        attrs = variable.attrs
        units, standard = str(attrs.get("units", "")), str(attrs.get("standard_name", ""))
        if attrs.get("axis") in ("T", "Y", "X"):
            return str(attrs["axis"])
        if attrs.get("axis") == "Z":
            return "L"
        if " since " in units or standard == "time":
            return "T"
        if units.lower() in ("degrees_north", "degree_north", "degrees_n", "degree_n") or standard in (
            "latitude", "grid_latitude", "projection_y_coordinate"):  # fmt: skip
            return "Y"
        if units.lower() in ("degrees_east", "degree_east", "degrees_e", "degree_e") or standard in (
            "longitude", "grid_longitude", "projection_x_coordinate"):  # fmt: skip
            return "X"
    return next((a for a, names in _NAMES.items() if dim.lower() in names), "L")


# --- reading ----------------------------------------------------------------------------------------------------------


class Source:
    """An open file of fields. ``read`` gives raw values of a box; only that box is read from the disk."""

    def __init__(self, path: str, data: Any, names: list[str] | None = None, dims: dict[str, int] | None = None):
        self.path, self._data = path, data
        self.layout = _layout(path, data, names or list(data.variables), dims or {str(k): n for k, n in data.sizes.items()})

    def read(self, name: str, box: tuple[slice, ...] | None = None) -> np.ndarray:
        """Values of ``name``, in native byte order; texts as an object array of str. UnsupportedInput when unreadable."""
        variable = self._data.variables[name]
        try:
            with _lock:
                values = np.asarray((variable[box] if box else variable).values)
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise UnsupportedInput(f"{self.path}: {name} cannot be read ({str(error).splitlines()[0]})") from None
        if self.layout.variables[name].dtype == STRING:
            return values.astype(object)
        return np.ascontiguousarray(values, np.dtype(self.layout.variables[name].dtype)).reshape(values.shape)

    def close(self) -> None:
        with _lock:
            self._data.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def is_grid(path: str) -> bool:
    """Whether a name is that of a file of fields (by its suffix, ``.zarr`` folders included)."""
    return Path(path.rstrip("/")).suffix.lower() in SUFFIXES


def open_grid(path: str | os.PathLike[str], grib_filter: dict[str, Any] | None = None) -> Source:
    """Open netCDF, GRIB or Zarr by its suffix. ``grib_filter`` chooses among the messages of a GRIB file, by their keys.

    UnsupportedInput names what cannot be kept: groups, compound, enum and other user-defined types, half precision, complex
    numbers, dates stored as such.
    """
    import xarray

    path = str(path)
    suffix = Path(path.rstrip("/")).suffix.lower()
    if not os.path.exists(path):
        raise FileNotFoundError(2, "no such file or directory", path)
    options: dict[str, Any] = {"decode_cf": False, "cache": False}
    names, dims = None, None
    if suffix in GRIB:
        options |= {"engine": "cfgrib", "backend_kwargs": {"indexpath": "", "filter_by_keys": grib_filter or {}}}
    elif suffix in ZARR:
        options |= {"engine": "zarr", "consolidated": None}
    else:
        names, dims = _check_netcdf(path)
        options |= {"engine": "netcdf4"}
    try:
        with _lock:
            data = xarray.open_dataset(path, **options)
    except ValueError as error:
        if suffix in GRIB and "unrecognized engine" in str(error):
            raise UsageError("GRIB files need the extra packages cfgrib and eccodes: pip install 'neuralcodec[grib]'") from None
        raise _unreadable(path, error) from None
    except Exception as error:  # every library behind xarray has its own
        if type(error).__name__ == "DatasetBuildError":
            text = "its messages do not form one set of fields; choose with --grib-filter, as in typeOfLevel=surface"
            raise UnsupportedInput(f"{path}: {text}") from None
        raise _unreadable(path, error) from None
    try:
        with _lock:
            return Source(path, data, names, dims)
    except BaseException:
        with _lock:
            data.close()
        raise


def _unreadable(path: str, error: Exception) -> UnsupportedInput:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return UnsupportedInput(f"{path}: cannot be read as a file of fields ({first})")


def _check_netcdf(path: str) -> tuple[list[str], dict[str, int]]:
    """Names of variables, and dimensions, in the order of the file, which xarray does not keep. UnsupportedInput for what it
    would leave out silently, or change."""
    import netCDF4

    try:
        with netcdf_locks(), netCDF4.Dataset(path) as file:
            if file.groups:
                names = ", ".join(sorted(file.groups)[:5])
                raise UnsupportedInput(f"{path}: has groups ({names}), which are not coded; write each to its own file")
            for name, variable in file.variables.items():
                if variable.dtype is not str and not isinstance(variable.datatype, np.dtype):
                    kind = type(variable.datatype).__name__
                    raise UnsupportedInput(f"{path}: variable {name} has a user-defined type ({kind}), which is not coded")
            return list(file.variables), {name: len(dim) for name, dim in file.dimensions.items()}
    except OSError as error:
        raise _unreadable(path, error) from None


def _layout(path: str, data: Any, names: list[str], dims: dict[str, int]) -> Layout:
    variables = {}
    for name in names:
        variable = data.variables[name]
        dtype = np.dtype(variable.dtype)
        code = dtype.newbyteorder("=").str.lstrip("=<>|")
        if dtype.kind in "OTU" or variable.encoding.get("dtype") is str:
            code = STRING
        elif code == "b1":  # xarray's own convention for truth values in netCDF
            code = "i1"
        if code != STRING and code not in KINDS:
            raise UnsupportedInput(f"{path}: variable {name} has type {dtype}, which netCDF cannot hold")
        if not isinstance(name, str):
            raise UnsupportedInput(f"{path}: a variable is named by a {type(name).__name__}, not by a text")
        attrs = {str(k): _attribute(path, f"{name}:{k}", v) for k, v in variable.attrs.items()}
        if dtype.kind == "b":
            attrs["dtype"] = "bool"
        variables[name] = Variable(name, tuple(map(str, variable.dims)), tuple(variable.shape), code, attrs,
                                   _storage(variable.encoding, len(variable.dims)))  # fmt: skip
    # an archive of ours keeps its own record there
    attrs = {str(k): _attribute(path, str(k), v) for k, v in data.attrs.items() if not (k == RECORD and isinstance(v, dict))}
    unlimited = tuple(d for d in dims if d in data.encoding.get("unlimited_dims", ()))
    return Layout(dims, unlimited, attrs, variables)


def _storage(encoding: dict[str, Any], ndim: int) -> dict[str, Any]:
    kept = {k: encoding[k] for k in _STORAGE if encoding.get(k) not in (None, False)}
    if "chunksizes" in kept:
        kept["chunksizes"] = [int(n) for n in kept["chunksizes"]]
    if any(encoding.get(k) for k in ("szip", "zstd", "bzip2", "blosc")) or "compressors" in encoding:
        kept |= {"zlib": True, "complevel": 4, "shuffle": True}
    return kept if ndim else {}


def _attribute(path: str, name: str, value: Any) -> Any:
    """An attribute as str, list of str, or numpy scalar or vector of a type that netCDF has. UnsupportedInput otherwise."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        return list(value)
    if isinstance(value, dict):
        raise UnsupportedInput(f"{path}: attribute {name} is a map, which netCDF cannot hold")
    if isinstance(value, bool):
        value = np.int8(value)
    elif isinstance(value, int):
        value = np.int64(value) if value < 1 << 63 else np.uint64(value)
    typed = np.asarray(value)
    if typed.dtype.kind == "b":
        typed = typed.astype("i1")
    if typed.dtype.kind in "US":
        return [str(v) for v in typed.ravel()] if typed.ndim else str(typed)
    if typed.dtype.newbyteorder("=").str.lstrip("=<>|") not in KINDS or typed.ndim > 1:
        raise UnsupportedInput(f"{path}: attribute {name} is of type {typed.dtype}, which netCDF cannot hold")
    return typed if typed.ndim else typed[()]


# --- writing ----------------------------------------------------------------------------------------------------------


class Target:
    """A netCDF-4 file that is being written. Variables are defined first, then boxes of them are filled."""

    def __init__(self, path: str, layout: Layout):
        import netCDF4

        with netcdf_locks():
            self._file = netCDF4.Dataset(path, "w", format="NETCDF4")
            self._start(layout)

    def _start(self, layout: Layout) -> None:
        self._file.set_auto_mask(False)
        self._file.set_auto_scale(False)
        for name, size in layout.dims.items():
            self._file.createDimension(name, None if name in layout.unlimited else size)
        set_attributes(self._file, layout.attrs)
        for variable in layout.variables.values():
            self._define(variable, layout)

    def _define(self, variable: Variable, layout: Layout) -> None:
        options = dict(variable.encoding)
        if variable.dtype == STRING or not variable.dims:
            options = {}
        if "chunksizes" in options:
            unlimited = [d in layout.unlimited for d in variable.dims]
            sizes = zip(options["chunksizes"], variable.shape, unlimited)
            options["chunksizes"] = [min(c, max(n, 1)) if not free else c for c, n, free in sizes]
        if options.get("contiguous") and any(d in layout.unlimited for d in variable.dims):
            options.pop("contiguous")
        fill = variable.attrs.get("_FillValue")
        kind: Any = str if variable.dtype == STRING else np.dtype(variable.dtype)
        made = self._file.createVariable(variable.name, kind, variable.dims, fill_value=fill, **options)
        made.set_auto_chartostring(False)
        made.set_auto_maskandscale(False)
        set_attributes(made, {k: v for k, v in variable.attrs.items() if k != "_FillValue"})

    def write(self, name: str, box: tuple[slice, ...], values: np.ndarray) -> None:
        """Fill a box of a variable with raw values."""
        with netcdf_locks():
            if box:
                self._file.variables[name][box] = values
            elif values.dtype == object:
                self._file.variables[name][...] = values.item()
            else:
                self._file.variables[name].assignValue(values[()])

    def close(self) -> None:
        with netcdf_locks():
            self._file.close()


def set_attributes(target: Any, attrs: dict[str, Any]) -> None:
    """Attributes of a netCDF4 file or variable, each with its own type."""
    for name, value in attrs.items():
        if isinstance(value, str):
            with suppress(UnicodeEncodeError):
                value.encode("ascii")
                target.setncattr(name, value)
                continue
            target.setncattr_string(name, value)
        elif isinstance(value, list):
            target.setncattr_string(name, value)
        else:
            target.setncattr(name, value)


@contextmanager
def atomic_netcdf(path: str | os.PathLike[str], layout: Layout, overwrite: bool = False) -> Iterator[Target]:
    """A netCDF file that appears under ``path`` only when the block ends well. FileExistsError as ``files.atomic_write``."""
    from .files import publish

    path = Path(path)
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path}: exists already; use -f to overwrite it")
    handle, partial = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    target = None
    try:
        target = Target(partial, layout)
        yield target
        target.close()
        target = None
        publish(partial, path, overwrite)
    except BaseException:
        if target is not None:
            with suppress(RuntimeError):
                target.close()
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
