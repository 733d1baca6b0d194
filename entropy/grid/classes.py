"""Which cells are missing, infinite, zero, ...: classes 0..6 of cells, coded exactly."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..binary import code_bit, learned, start
from .kernels import RATE

CLASSES = 7
_CONTEXTS = CLASSES**4 * (CLASSES + 1)


@njit(cache=True, nogil=True)
def _code_planes(planes, chances, coder, buf, decode):
    """planes uint8 (P, h, w); contexts are W, N, NW, NE and the same cell of the plane before. False when buf is too short."""
    count, height, width = planes.shape
    for p in range(count):
        for r in range(height):
            if not decode and coder[3] + 2 * width * CLASSES + 16 > len(buf):
                return False
            for q in range(width):
                w = np.int64(planes[p, r, q - 1]) if q else 0
                n = np.int64(planes[p, r - 1, q]) if r else w
                nw = np.int64(planes[p, r - 1, q - 1]) if r and q else n
                ne = np.int64(planes[p, r - 1, q + 1]) if r and q + 1 < width else n
                before = np.int64(planes[p - 1, r, q]) if p else CLASSES
                row = (((w * CLASSES + n) * CLASSES + nw) * CLASSES + ne) * (CLASSES + 1) + before
                value = np.int64(planes[p, r, q])
                k = 0
                while k < CLASSES - 1:
                    m = chances[row, k]
                    bit = code_bit(1 if value > k else 0, min(max(m >> 16, 1), 65535), coder, buf, decode)
                    chances[row, k] = learned(m, bit, RATE)
                    if not bit:
                        break
                    k += 1
                planes[p, r, q] = k
    return True


def _run(planes: np.ndarray, buf: np.ndarray, decode: bool) -> int:
    coder = start(buf if decode else None)
    chances = np.full((_CONTEXTS, CLASSES - 1), 1 << 31, np.int64)
    if not _code_planes(planes, chances, coder, buf, decode):
        return -1
    if not decode:
        at = int(coder[3])
        buf[at : at + 4] = np.frombuffer(int(coder[1]).to_bytes(4, "big"), np.uint8)
        return at + 4
    return int(coder[3])


def encode_classes(classes: np.ndarray) -> bytes:
    """uint8 (T, L, H, W), 0..6 -> bytes."""
    planes = classes.reshape(-1, *classes.shape[-2:])
    room = planes.size // 2 + 16 * CLASSES * planes.shape[-1] + 64
    while True:
        buf = np.zeros(room, np.uint8)
        if (used := _run(planes.copy(), buf, False)) >= 0:
            return buf[:used].tobytes()
        room *= 4


def decode_classes(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of ``encode_classes`` for a field of ``shape``."""
    planes = np.zeros((int(np.prod(shape[:-2])), *shape[-2:]), np.uint8)
    _run(planes, np.frombuffer(data, np.uint8).copy(), True)
    return planes.reshape(shape)
