"""``xarray.open_dataset("x.nlc", engine="neuralcodec")``: lazy, only the chunks that are looked at are read (entry point
``xarray.backends``)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xarray
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from ..codecs.grid_file import GridFile, is_grid_header
from ..container.errors import CodecError
from ..container.format import read_head, sniff
from ..media.grid import STRING


class _Values(BackendArray):
    """A variable of a file, raw."""

    def __init__(self, opened: _Opened, name: str):
        self.opened, self.name = opened, name
        variable = opened.grid.plans[name].variable
        self.shape = variable.shape
        self.dtype = np.dtype(object if variable.dtype == STRING else variable.dtype)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read)

    def _read(self, key: tuple[int | slice, ...]) -> np.ndarray:
        # negative steps are read forwards and turned round; an integer takes a box of one and loses the axis
        box, after = [], []
        for part, n in zip(key, self.shape):
            if isinstance(part, slice):
                start, stop, step = part.indices(n)
                count = len(range(start, stop, step))
                if step < 0 and count:
                    box.append(slice(start + (count - 1) * step, start + 1, -step))
                    after.append(slice(None, None, -1))
                else:
                    box.append(slice(start, stop, step) if count else slice(0, 0, 1))
                    after.append(slice(None))
            else:
                i = int(part) % n
                box.append(slice(i, i + 1, 1))
                after.append(0)
        return self.opened.grid.read(self.name, tuple(box))[tuple(after) or ...]


class _Opened:
    """An open file that survives pickling, for Dask's other processes: they open it again."""

    def __init__(self, path: str):
        self.path = path
        self.grid = GridFile(path)

    def __reduce__(self) -> tuple:
        return _Opened, (self.path,)


class NeuralcodecBackend(BackendEntrypoint):
    """Reads ``.nlc`` files of fields."""

    description = "Open .nlc files of fields, made by `codec encode`"
    url = ""
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "mask_and_scale", "decode_times", "concat_characters",
                               "decode_coords", "use_cftime", "decode_timedelta")  # fmt: skip

    def open_dataset(self, filename_or_obj: str | os.PathLike[Any], *, drop_variables: str | Iterable[str] | None = None,
                     mask_and_scale: bool = True, decode_times: Any = True, concat_characters: bool = True,
                     decode_coords: Any = True, use_cftime: bool | None = None,
                     decode_timedelta: Any = None) -> xarray.Dataset:  # fmt: skip
        opened = _Opened(os.fspath(filename_or_obj))
        layout = opened.grid.layout
        variables = {}
        for name, variable in layout.variables.items():
            plan = opened.grid.plans[name]
            encoding = dict(variable.encoding) | {"source": opened.path}
            if plan.chunks is not None:
                encoding["preferred_chunks"] = dict(zip(variable.dims, plan.chunks))
            encoding["dtype"] = str if variable.dtype == STRING else np.dtype(variable.dtype)
            lazy = indexing.LazilyIndexedArray(_Values(opened, name))
            variables[name] = xarray.Variable(variable.dims, lazy, dict(variable.attrs), encoding)
        dataset = xarray.Dataset(variables, attrs=dict(layout.attrs))
        dataset.encoding["unlimited_dims"] = set(layout.unlimited)
        dataset.encoding["source"] = opened.path
        dataset.set_close(opened.grid.close)
        found = xarray.decode_cf(dataset, concat_characters=concat_characters, mask_and_scale=mask_and_scale,
                                 decode_times=decode_times, decode_coords=decode_coords, drop_variables=drop_variables,
                                 use_cftime=use_cftime, decode_timedelta=decode_timedelta)  # fmt: skip
        found.set_close(opened.grid.close)
        return found

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        if not isinstance(filename_or_obj, (str, os.PathLike)) or not Path(filename_or_obj).is_file():
            return False
        try:
            with open(filename_or_obj, "rb") as file:
                if not sniff(file.read(8)):
                    return False
                file.seek(0)
                return is_grid_header(read_head(file).header)
        except (OSError, CodecError):
            return False
