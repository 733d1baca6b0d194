"""What all trainings read and write: recipes and checkpoints."""

from __future__ import annotations

import os
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch


def read_recipe(kind: type, path: Path | None, overrides: dict[str, Any]) -> Any:
    """A dataclass ``kind`` from a TOML file and what overrides it (None does not); ValueError for an unknown key."""
    values = tomllib.loads(Path(path).read_text()) if path else {}
    values.update({k: v for k, v in overrides.items() if v is not None})
    unknown = set(values) - {f.name for f in fields(kind)}
    if unknown:
        raise ValueError(f"{path}: unknown recipe key {sorted(unknown)[0]!r}")
    return kind(**values)


def save(path: Path, state: dict[str, Any]) -> None:
    """Checkpoint, replaced atomically."""
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)
