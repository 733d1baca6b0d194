"""Made the golden payloads of fields, once. Never run by a test; a new format version adds payloads, it replaces none.

    python tests/golden/make_grid.py [LABEL...]
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def field(seed: int, shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
    """A smooth field with steps in it, from integers alone: the same on every machine."""
    at = np.indices(shape, dtype=np.int64)
    total = np.zeros(shape, np.int64)
    for k in range(1, 6):
        phase = sum((i + 2) * k * axis * (seed % 7 + 3) for i, axis in enumerate(at)) % 512
        total += (np.minimum(phase, 512 - phase) - 128) * (64 // k)
    noise = (at[-1] * 7919 + at[-2] * 104729 + seed * 1299709) % 1009 % 17
    return ((total + noise * 8) / 256 + (at[-1] > shape[-1] // 2) * 3).astype(dtype)


def base_of(label: str) -> np.ndarray | None:
    """The base that a payload needs."""
    return np.round(field(6, (2, 24, 36))) if label.startswith("base") else None


def cases() -> dict:
    """label -> (field, bound, options)."""
    from neuralcodec.entropy.grid import Bound

    holes = field(2, (2, 3, 24, 36))
    holes[:, 1, 5:9, 3:30] = np.nan
    holes[0, 0, 0, 0], holes[1, 2, 3, 4] = np.inf, -np.inf
    regions = np.where(np.arange(48)[:, None] % 48 < 20, 0.5, 0.0625) * np.ones((1, 60))
    return {
        "loose": (field(1, (90, 120)), Bound(2.0), {"periodic": True}),
        "tight": (field(1, (90, 120)), Bound(0.01), {"periodic": True}),
        "holes": (holes, Bound(0.05), {"level_group": 2}),
        "relative": (field(3, (3, 20, 30), "f8") - 3, Bound(0.01, "relative"), {}),
        "range": (field(4, (50, 70)), Bound(0.001, "range"), {}),
        "regions": (field(5, (48, 60)), Bound(regions), {}),
        "rmse": (field(7, (60, 80)), Bound(0.3), {"goal": "rmse"}),
        "base": (field(6, (2, 24, 36)), Bound(0.02), {"base": base_of("base")}),
        "large": (field(10, (256, 320)), Bound(0.5), {"periodic": True}),
        "lossless": (field(8, (30, 40)), None, {}),
        "integers": ((field(9, (2, 30, 40)) * 100).astype("i2"), None, {}),
    }


def transformed() -> dict:
    """label -> (field, root mean square error, options)."""
    holes = field(12, (3, 4, 24, 36))
    holes[:, 1, 5:9, 3:30] = np.nan
    holes[0, 0, 0, 0], holes[1, 2, 3, 4] = np.inf, -np.inf
    return {
        "transform-levels": (field(11, (7, 40, 60)), 0.2, {"periodic": True}),
        "transform-holes": (holes, 0.1, {}),
        "transform-plane": (field(13, (91, 121), "f8"), 0.5, {}),
        "transform-times": (field(14, (5, 1, 30, 44)), 0.05, {"periodic": True}),
    }


def main(labels: list[str]) -> None:
    from neuralcodec.entropy.grid import decode_field, encode_field, encode_rmse
    from neuralcodec.entropy.grid.field import TRANSFORM_VERSION, VERSION

    path = HERE / "grid.json"
    index = json.loads(path.read_text()) if path.exists() else {}
    for label, (x, bound, options) in cases().items():
        name = f"{label}-{VERSION}"
        if name in index or labels and label not in labels:
            continue  # golden payloads are never replaced
        payload = encode_field(x, bound, **options)
        y = decode_field(payload, base=base_of(label))
        index[name] = {"payload": payload.hex(), "decoded": hashlib.sha256(y.tobytes()).hexdigest()}
    for label, (x, rmse, options) in transformed().items():
        name = f"{label}-{TRANSFORM_VERSION}"
        if name not in index and (not labels or label in labels):
            payload = encode_rmse(x, rmse, **options)
            index[name] = {"payload": payload.hex(), "decoded": hashlib.sha256(decode_field(payload).tobytes()).hexdigest()}
    path.write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
