"""Fields within a bound: see the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LIMIT = 1 << 32  # values that one payload may hold unless the caller says otherwise


@dataclass(frozen=True)
class Bound:
    """Largest error that a decoded value may have. ValueError for a negative, infinite or missing one."""

    value: float | np.ndarray
    kind: str = "absolute"


def encode_field(x: np.ndarray, bound: Bound | float | None = None, *, periodic: bool = False, base: np.ndarray | None = None,
                 level_group: int | None = None, nan_payloads: bool = False, threads: int = 1) -> bytes:  # fmt: skip
    """x (H, W), (L, H, W) or (T, L, H, W), float32 or float64 -> payload."""
    raise NotImplementedError


def decode_field(payload: bytes, *, base: np.ndarray | None = None, levels: Sequence[int] | None = None, threads: int = 1,
                 limit: int = LIMIT) -> np.ndarray:  # fmt: skip
    """The field of a payload; with ``levels`` only these, in this order, along the third axis from the end."""
    raise NotImplementedError


def describe_field(payload: bytes) -> dict[str, Any]:
    """What a payload says of itself."""
    raise NotImplementedError
