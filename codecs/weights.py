"""Weights files: what a decoder needs of a trained codec, with the digest that streams carry.

A file is safetensors: float16 for the transforms, integers for everything exact, integer tables. Its model id is the first
8 bytes of the sha256 over the codec's name and config (canonical JSON) and over every tensor (name, type, shape, bytes,
in the order of names). Beside it lies a card, JSON, that can be read without torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..container.errors import ModelMismatch, ModelMissing
from ..entropy.exact import freeze, frozen, frozen_tensors, load_frozen
from ..entropy.tables import Tables
from .base import ADDED, Codec

ID_BYTES = 8


def tensors_of(codec: Codec) -> dict[str, Tensor]:
    """All tensors of a frozen codec as they are stored, on the CPU."""
    floats = {f"float.{k}": v.detach().cpu().half().contiguous() for k, v in codec.state_dict().items()}
    exact = {f"exact.{k}": v.contiguous() for k, v in frozen_tensors(codec).items()}
    tables = {
        f"tables.{which}.{k}": torch.from_numpy(np.ascontiguousarray(v))
        for which, table in codec.tables().items()
        for k, v in table.to_arrays().items()
    }
    arrays = {f"arrays.{name}": torch.from_numpy(np.ascontiguousarray(v)) for name, v in codec.arrays().items()}
    return floats | exact | tables | arrays


def digest(codec: Codec, tensors: dict[str, Tensor]) -> bytes:
    """sha256 of the codec's identity and its stored tensors."""
    sha = hashlib.sha256()
    config = asdict(codec.config)
    for part in fields(codec.config):
        if part.metadata == ADDED and config[part.name] == part.default:
            del config[part.name]
    sha.update(json.dumps([codec.name, config], sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        array = tensors[name].numpy()
        sha.update(f"\n{name} {array.dtype.str.lstrip('<>|=')} {list(array.shape)}\n".encode())
        sha.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha.digest()


def save_weights(codec: Codec, path: Path) -> bytes:
    """Freeze ``codec``, unless it is, and write it to ``path``; the model id. ValueError where a layer cannot be exact."""
    if not frozen(codec):
        freeze(codec)
    tensors = tensors_of(codec)
    codec.model_id = digest(codec, tensors)[:ID_BYTES]
    metadata = {"codec": codec.name, "preset": codec.preset, "model_id": codec.model_id.hex()}
    save_file(tensors, path, metadata=metadata)
    return codec.model_id


def load_weights(codec: Codec, path: Path) -> None:
    """Turn a fresh codec into the frozen one of ``path``, and set its model id.

    ModelMissing when the file is not there, ModelMismatch when it does not fit the config or is damaged.
    """
    if not path.is_file():
        raise ModelMissing(f"{path}: the weights of {codec.name}:{codec.preset} are not here; install the package again")
    try:
        tensors = load_file(path)
        exact = {k.removeprefix("exact."): v for k, v in tensors.items() if k.startswith("exact.")}
        load_frozen(codec, exact)
        arrays: dict[str, dict[str, np.ndarray]] = {}
        for key, value in tensors.items():
            if key.startswith("tables."):
                _, which, part = key.split(".")
                arrays.setdefault(which, {})[part] = value.numpy()
        codec.set_tables({which: Tables.from_arrays(parts) for which, parts in arrays.items()})
        codec.set_arrays({k.removeprefix("arrays."): v.numpy() for k, v in tensors.items() if k.startswith("arrays.")})
        floats = {k.removeprefix("float."): v.float() for k, v in tensors.items() if k.startswith("float.")}
        codec.load_state_dict(floats)
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelMismatch(f"{path}: not the weights of {codec.name}:{codec.preset} ({reason})") from error
    codec.model_id = digest(codec, tensors)[:ID_BYTES]
    codec.eval().requires_grad_(False)
