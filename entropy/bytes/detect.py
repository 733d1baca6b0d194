"""What a block of bytes is: noise, text, records, a bitmap, a picture, sound, machine code. Only the encoder asks."""

from __future__ import annotations

import numpy as np
from numba import njit

from . import binary

_LAGS = 4096
_SAMPLE = 1 << 15
PAGE = 1 << 14
TEXT, OTHER, NOISE = range(3)


def is_noise(data: np.ndarray) -> bool:
    """Whether bytes (uint8) look compressed or encrypted already, by a fast test on a few samples."""
    if len(data) < 64:
        return False
    size = min(len(data), 1 << 14)
    for start in {0, (len(data) - size) // 2, len(data) - size}:
        sample = data[start : start + size]
        counts = np.bincount(sample, minlength=256)
        seen = counts[counts > 0]
        bits = np.log2(size) - (seen * np.log2(seen)).sum() / size
        if bits < 7.2 + 0.7 * min(size / (1 << 14), 1) - (0 if size > 4096 else 1.5):
            return False
        if binary.encode(sample, binary.plan_of(1, binary.GENERAL), room=int(size * 0.99)) is not None:
            return False
    return True


def is_text(data: np.ndarray) -> bool:
    """Whether bytes (uint8) are mostly readable: ASCII with its line ends, or UTF-8 without control bytes."""
    if not len(data):
        return False
    counts = np.bincount(data, minlength=256)
    controls = counts[:9].sum() + counts[11:13].sum() + counts[14:32].sum() + counts[127]
    letters = counts[65:91].sum() + counts[97:123].sum() + counts[128:].sum()
    if controls * 200 > len(data) or letters * 3 < len(data):
        return False
    high = counts[128:].sum()
    if high * 50 < len(data):
        return True
    text = data[: 1 << 16].tobytes()
    return len(text.decode("utf-8", "ignore").encode()) > 0.98 * len(text)


@njit(cache=True, nogil=True)
def _equal_at(data, places, lags):
    """How many of the sampled bytes equal the one that stands 1, 2, ... lags before: int64[lags + 1]."""
    counts = np.zeros(lags + 1, np.int64)
    for i in range(len(places)):
        at = places[i]
        value = data[at]
        window = data[at - lags : at]
        for k in range(lags):
            counts[lags - k] += window[k] == value
    return counts


def periods(data: np.ndarray) -> tuple[int, int, float]:
    """(record, line, excess): the best distances of equal bytes, and by how much the first beats the usual distance."""
    lags = min(_LAGS, len(data) // 4)
    if lags < 4:
        return 4, 16, 0.0
    step = max(1, (len(data) - lags) // _SAMPLE)
    places = np.arange(lags, len(data), step)
    informative = places[data[places] != data[places - 1]]  # runs say nothing about distances
    if len(informative) >= 256:
        places = informative
    share = _equal_at(data, places, lags) / len(places)
    share[:2] = 0
    usual = float(np.median(share[2:]))
    best = int(share.argmax())
    if not share[best]:  # nothing comes again at any distance
        return 4, 16, 0.0
    for k in range(best // 2, 1, -1):  # the base of a row of multiples that are as good
        if best % k == 0 and share[k] > 0.96 * share[best]:
            best = k
    far = share.copy()
    for m in range(best, lags + 1, best):
        if share[m] <= share[best]:
            far[m] = 0
    far[: 2 * best] = 0
    line = int(far.argmax()) if far.max() > usual + 0.5 * (share[best] - usual) else 4 * best
    return best, line, float(share[best] - usual)


def kind_of(data: np.ndarray, effort: int = 5) -> tuple[int, int, int]:
    """(kind, stride, row) of a block that is not noise, as ``binary`` wants them; low efforts look at less of it."""
    head = data[:4096].tobytes()
    found = _by_header(head)
    if found:
        return found
    stride, row, excess = periods(data)
    if excess < 0.06:
        return binary.GENERAL, 4, 16
    candidates = [(binary.RECORDS, stride, row), (binary.GENERAL, 4, 16)]
    if stride >= 8 and _is_bitmap(data, stride):
        candidates.append((binary.BITMAP, stride, stride))
    sizes = [_cost(data, effort, *candidate) for candidate in candidates]
    return candidates[int(np.argmin(sizes))]


def _cost(data: np.ndarray, effort: int, kind: int, stride: int, row: int) -> int:
    """Bytes of a sample from the middle, coded as a kind."""
    size = min(len(data), 1 << 13 if effort < 4 else 1 << 15)
    start = (len(data) - size) // 2
    coded = binary.encode(data[start : start + size], binary.plan_of(min(effort, 4), kind), stride, row)
    return size if coded is None else len(coded)


def _is_bitmap(data: np.ndarray, row: int) -> bool:
    """Whether bytes a row apart differ in single bits rather than in value, and those beside them are much alike too."""
    a, b = data[row:], data[:-row]
    differ = a != b
    beside = (np.mean(data[row + 1 :] == data[: -row - 1]) + np.mean(data[row - 1 :] == data[: 1 - row])) / 2
    if not differ.any() or beside < 0.6 * (1 - differ.mean()):
        return False
    changed = np.bitwise_xor(a[differ], b[differ])
    return np.unpackbits(changed).mean() < 0.36 and np.isin(data, (0, 255)).mean() > 0.3


def _by_header(head: bytes) -> tuple[int, int, int] | None:
    """From the first bytes of well-known formats."""
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE" and (at := head.find(b"fmt ")) > 0:
        channels, bits = int.from_bytes(head[at + 10 : at + 12], "little"), int.from_bytes(head[at + 22 : at + 24], "little")
        if head[at + 8 : at + 10] in (b"\1\0", b"\xfe\xff") and 0 < channels <= 8 and bits in (8, 16, 24, 32):
            size = bits // 8
            return (binary.AUDIO if bits == 16 else binary.PICTURE), size * channels, size
    if head[:2] == b"BM" and len(head) > 54:
        width, depth = int.from_bytes(head[18:22], "little"), int.from_bytes(head[28:30], "little")
        return _picture(width, depth, 4)
    if head[:2] in (b"P4", b"P5", b"P6"):
        words = [w for line in head.split(b"\n")[:8] if not line.startswith(b"#") for w in line.split()][:4]
        if len(words) > 2 and words[1].isdigit():
            width = int(words[1])
            return _picture(width, {b"P4": 1, b"P5": 8, b"P6": 24}[words[0][:2]], 1)
    if machine_of(head) is not None:
        return binary.MACHINE, 4, 16
    return None


def _picture(width: int, depth: int, multiple: int) -> tuple[int, int, int] | None:
    row = ((width * depth + 7) // 8 + multiple - 1) // multiple * multiple
    if not 0 < row <= 1 << 20:
        return None
    if depth == 1:
        return binary.BITMAP, row, row
    return (binary.PICTURE, depth // 8, row) if depth in (8, 16, 24, 32) else None


def machine_of(head: bytes) -> str | None:
    """``x86``, ``sparc`` or ``arm64`` for a program of one of these, by its header (ELF, PE, a.out)."""
    if head[:4] == b"\x7fELF" and len(head) > 20:
        order = "little" if head[5] == 1 else "big"
        names = {3: "x86", 62: "x86", 2: "sparc", 18: "sparc", 43: "sparc", 183: "arm64"}
        return names.get(int.from_bytes(head[18:20], order))
    if head[:2] == b"MZ" and len(head) > 64:
        at = int.from_bytes(head[60:64], "little")
        if head[at : at + 4] == b"PE\0\0":
            names = {0x14C: "x86", 0x8664: "x86", 0xAA64: "arm64"}
            return names.get(int.from_bytes(head[at + 4 : at + 6], "little"))
    return None


def segments(data: np.ndarray, least: int = 1 << 17) -> list[tuple[int, int, int]]:
    """Cut a block into (start, end, TEXT | OTHER | NOISE) runs of at least ``least`` bytes, at pages."""
    pages = []
    for start in range(0, len(data), PAGE):
        page = data[start : start + PAGE]
        counts = np.bincount(page, minlength=256)
        seen = counts[counts > 0]
        bits = np.log2(len(page)) - (seen * np.log2(seen)).sum() / len(page)
        pages.append(TEXT if is_text(page) else NOISE if bits > 7.9 else OTHER)
    runs: list[list[int]] = []
    for number, page in enumerate(pages):
        if runs and runs[-1][2] == page:
            runs[-1][1] = number + 1
        else:
            runs.append([number, number + 1, page])
    while len(runs) > 1:  # the shortest run goes to its longer neighbour
        k = min(range(len(runs)), key=lambda i: runs[i][1] - runs[i][0])
        if (runs[k][1] - runs[k][0]) * PAGE >= least:
            break
        beside = [i for i in (k - 1, k + 1) if 0 <= i < len(runs)]
        into = max(beside, key=lambda i: runs[i][1] - runs[i][0])
        runs[into][:2] = min(runs[k][0], runs[into][0]), max(runs[k][1], runs[into][1])
        del runs[k]
        merged: list[list[int]] = []
        for run in runs:
            if merged and merged[-1][2] == run[2]:
                merged[-1][1] = run[1]
            else:
                merged.append(run)
        runs = merged
    return [(a * PAGE, min(b * PAGE, len(data)), kind) for a, b, kind in runs]
