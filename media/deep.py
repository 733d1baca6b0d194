"""Pictures of 16 bits per channel: PNG, TIFF and PPM files that Pillow would cut to 8 bits without a word.

Pixels are (H, W, C) uint16 in the machine's byte order, C 1 or 3; alpha is (H, W) uint16 or None.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import as_strided
from PIL import Image

from ..container.errors import UnsupportedInput

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
BAND = 256  # rows that are filtered together
# first column, first row, steps of each pass of an interlaced file
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_SAMPLES = {0: 1, 2: 3, 4: 2, 6: 4}  # of the PNG colour types


# --- PNG ------------------------------------------------------------------------------------------------------------


def png_chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Name and content of the chunks of a PNG file. ValueError, struct.error for damage of critical chunks."""
    view, at, name = memoryview(data), len(PNG_MAGIC), b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, at)
        body = view[at + 8 : at + 8 + length]
        check = struct.unpack_from(">I", data, at + 8 + length)[0]
        if check != zlib.crc32(body, zlib.crc32(name)) and name[:1].isupper():
            raise ValueError(f"chunk {name.decode('ascii', 'replace')} has a wrong checksum")
        yield name, body
        at += 12 + length


class _Inflater:
    """Fixed-size reads from the joined IDAT chunks."""

    def __init__(self, parts: list[memoryview]):
        self.parts, self.inflate = iter(parts), zlib.decompressobj()

    def read(self, size: int) -> bytes:
        out = []
        while size:
            source = self.inflate.unconsumed_tail or next(self.parts, None)
            if source is None:
                raise ValueError("the pixels end too early")
            out.append(self.inflate.decompress(source, size))
            size -= len(out[-1])
        return b"".join(out)


def read_png(data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """(pixels, alpha) of a PNG file of bit depth 16; a transparent colour (tRNS) becomes alpha. ValueError."""
    parts, key = [], None
    for name, body in png_chunks(data):
        if name == b"IHDR":
            w, h, _, colour, _, _, interlace = struct.unpack(">IIBBBBB", body)
        elif name == b"IDAT":
            parts.append(body)
        elif name == b"tRNS":
            key = np.frombuffer(body, ">u2")
    samples = _SAMPLES[colour]
    source, out = _Inflater(parts), np.empty((h, w, samples), np.uint16)
    for x0, y0, dx, dy in ADAM7 if interlace else ((0, 0, 1, 1),):
        part = out[y0::dy, x0::dx]
        above = np.zeros((part.shape[1], 2 * samples), np.int16)
        for y in range(0, len(part) if part.size else 0, BAND):
            rows = min(BAND, len(part) - y)
            raw = np.frombuffer(source.read(rows * (1 + above.size)), np.uint8).reshape(rows, -1)
            band = _unfilter(raw[:, 0], raw[:, 1:].reshape(rows, *above.shape), above)
            above = band[-1]
            pairs = band.reshape(rows, -1, samples, 2)
            part[y : y + rows] = pairs[..., 0] * 256 + pairs[..., 1].astype(np.uint16)
    if samples in (2, 4):
        return out[..., :-1], out[..., -1]
    return out, None if key is None else np.where((out == key).all(2), 0, 65535).astype(np.uint16)


def _unfilter(kinds: np.ndarray, rows: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Undo PNG row filters: kinds (n,), rows (n, w, bytes) uint8, the row above (w, bytes) -> int16 (n, w, bytes).

    A pixel needs those to its left, above, and above left, so a whole antidiagonal is done at once. ``diagonals`` holds
    pixel (row, column) at [row + column, row], with a row above and a column of zeros to the left.
    """
    n, w, size = rows.shape
    if kinds.max() > 4:
        raise ValueError("an unknown row filter")
    diagonals = np.zeros((n + 1 + w, n + 1, size), np.int16)
    down, right, byte = diagonals.strides[0] + diagonals.strides[1], *diagonals.strides[::2]
    grid = as_strided(diagonals, (n + 1, w + 1, size), (down, right, byte))
    grid[0, 1:], grid[1:, 1:] = above, rows
    is_left, is_up, is_mean, is_paeth = ((kinds == k).astype(np.int16)[:, None] for k in (1, 2, 3, 4))
    for k in range(2, n + 1 + w):
        low, high = max(1, k - w), min(n, k - 1) + 1
        a, b, c = diagonals[k - 1, low:high], diagonals[k - 1, low - 1 : high - 1], diagonals[k - 2, low - 1 : high - 1]
        s = slice(low - 1, high - 1)
        guess = is_left[s] * a + is_up[s] * b + is_mean[s] * ((a + b) >> 1) + is_paeth[s] * _paeth(a, b, c)
        here = diagonals[k, low:high]
        here += guess
        here &= 255
    return grid[1:, 1:]


def _paeth(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """That of left, up, and up left which comes closest to a + b - c (PNG specification, 9.4)."""
    far_a, far_b = b - c, a - c
    far_c = np.abs(far_a + far_b)
    np.abs(far_a, out=far_a)
    np.abs(far_b, out=far_b)
    return np.where(far_a <= np.minimum(far_b, far_c), a, np.where(far_b <= far_c, b, c))


def write_png(target: BinaryIO, pixels: np.ndarray, alpha: np.ndarray | None, chunks: dict[bytes, bytes]) -> None:
    """Write a PNG file of bit depth 16. ``chunks`` go between IHDR and the pixels."""
    h, w = pixels.shape[:2]
    colour = (2 if pixels.shape[2] == 3 else 0) + (0 if alpha is None else 4)

    def put(name: bytes, body: bytes) -> None:
        target.write(struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name))))

    target.write(PNG_MAGIC)
    put(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0))
    for name, body in chunks.items():
        put(name, body)
    deflate = zlib.compressobj(3)  # higher levels gain 2 % on filtered 16-bit rows and can take ten times as long
    above = np.zeros((w, 2 * _SAMPLES[colour]), np.int16)
    for y in range(0, h, BAND):
        part = pixels[y : y + BAND]
        if alpha is not None:
            part = np.concatenate([part, alpha[y : y + BAND, :, None]], 2)
        band = part.astype(">u2").view(np.uint8).reshape(len(part), *above.shape).astype(np.int16)
        if body := deflate.compress(_filter(band, above).tobytes()):
            put(b"IDAT", body)
        above = band[-1]
    put(b"IDAT", deflate.flush())
    put(b"IEND", b"")


def _filter(band: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Rows (n, w, bytes) with the PNG filter of the smallest sum of magnitudes each -> uint8 (n, 1 + w * bytes)."""
    b = np.concatenate([above[None], band[:-1]])
    a, c = np.zeros_like(band), np.zeros_like(band)
    a[:, 1:], c[:, 1:] = band[:, :-1], b[:, :-1]
    best = np.empty((len(band), 1 + band[0].size), np.uint8)
    least = np.full(len(band), np.inf)
    for kind, guess in enumerate((np.int16(0), a, b, (a + b) >> 1, _paeth(a, b, c))):
        rest = (band - guess).astype(np.uint8).reshape(len(band), -1)
        cost = abs(rest.view(np.int8).astype(np.int16)).sum(1, dtype=np.int64)
        better = cost < least
        best[better, 0], best[better, 1:], least[better] = kind, rest[better], cost[better]
    return best


# --- TIFF -----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, ORIENTATION = 256, 257, 258, 259, 262, 273, 274
SAMPLES, STRIP_ROWS, COUNTS, PLANAR, PREDICTOR, TILE_WIDTH, EXTRA, FORMAT = 277, 278, 279, 284, 317, 322, 338, 339
DEFLATE = 8
_SHORT, _LONG = 3, 4


def _redescribe(data: bytes, tags: dict[int, tuple[int, ...] | None]) -> bytes:
    """A TIFF file whose first directory has other tags (None: none); it is appended, nothing else moves.

    A picture of n samples per pixel has the same bytes as a grey one n times as wide, and Pillow reads that one in 16
    bits, whatever its compression.
    """
    order = "<" if data[:2] == b"II" else ">"
    magic, at = struct.unpack_from(order + "HI", data, 2)
    if magic != 42:
        raise UnsupportedInput("16-bit colour is not read from BigTIFF; convert it to PNG")
    count = struct.unpack_from(order + "H", data, at)[0]
    fields = [struct.unpack_from(order + "HHI4s", data, at + 2 + 12 * i) for i in range(count)]
    entries = {tag: (kind, number, value) for tag, kind, number, value in fields}
    extra, start = b"", len(data) + len(data) % 2
    for tag, values in tags.items():
        entries.pop(tag, None)
        if values is None:
            continue
        kind = _SHORT if max(values) < 65536 else _LONG
        raw = struct.pack(f"{order}{len(values)}{'H' if kind == _SHORT else 'I'}", *values)
        if len(raw) > 4:
            raw, extra = struct.pack(order + "I", start + len(extra)), extra + raw + bytes(len(raw) % 2)
        entries[tag] = (kind, len(values), raw.ljust(4, b"\0"))
    directory = struct.pack(order + "H", len(entries))
    for tag, (kind, number, value) in sorted(entries.items()):
        directory += struct.pack(order + "HHI4s", tag, kind, number, value)
    head = data[:4] + struct.pack(order + "I", start + len(extra))
    return b"".join([head, data[8:], bytes(len(data) % 2), extra, directory, bytes(4)])


def read_tiff(data: bytes, tags: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """(pixels, alpha) of an RGB TIFF file of 16 bits; ``tags`` are Pillow's of it. UnsupportedInput for rare kinds."""
    n, extra = tags.get(SAMPLES, 1), tags.get(EXTRA, ())
    if (
        tags.get(PHOTOMETRIC) != 2 or tags.get(PLANAR, 1) != 1 or set(tags[BITS]) != {16}
        or set(tags.get(FORMAT, (1,))) != {1} or n not in (3, 4) or (n == 4 and extra not in ((), (2,)))
    ):  # fmt: skip
        raise UnsupportedInput("a deep TIFF of this kind (planes, CMYK, premultiplied alpha) is not read; convert it")
    width = tags[WIDTH]
    step = tags.get(TILE_WIDTH, width)
    grey = {WIDTH: (width * n,), BITS: (16,), PHOTOMETRIC: (1,), SAMPLES: (1,)}
    grey |= dict.fromkeys((PREDICTOR, EXTRA, FORMAT, ORIENTATION))  # Pillow would turn it
    if TILE_WIDTH in tags:
        grey[TILE_WIDTH] = (step * n,)
    with Image.open(io.BytesIO(_redescribe(data, grey)), formats=["TIFF"]) as image:
        pixels = np.asarray(image).astype(np.uint16, copy=False).reshape(image.height, width, n)
    if tags.get(PREDICTOR, 1) == 2 and tags.get(COMPRESSION, 1) != 1:
        pixels = np.concatenate([np.cumsum(pixels[:, x : x + step], 1, np.uint16) for x in range(0, width, step)], 1)
    elif tags.get(PREDICTOR, 1) > 2:
        raise UnsupportedInput("a floating point TIFF is not read; convert it to PNG")
    return pixels[..., :3], pixels[..., 3] if n == 4 else None


# --- PPM ------------------------------------------------------------------------------------------------------------

_PPM = re.compile(rb"P6" + rb"(?:(?:\s|#[^\n]*\n)+(\d+))" * 3 + rb"\s")


def ppm_peak(data: bytes) -> int:
    """The value of white in a binary PPM file (P6), 255 in any other."""
    match = _PPM.match(data)
    return int(match[3]) if match else 255


def read_ppm(data: bytes) -> np.ndarray:
    """Pixels of a binary PPM file whose white is 65535. ValueError if it is cut short."""
    match = _PPM.match(data)
    if int(match[3]) != 65535:
        raise UnsupportedInput(f"a PPM file whose white is {match[3].decode()} is not read, only 255 and 65535")
    w, h = int(match[1]), int(match[2])
    return np.frombuffer(data, ">u2", w * h * 3, match.end()).reshape(h, w, 3).astype(np.uint16)


def write_ppm(target: BinaryIO, pixels: np.ndarray) -> None:
    """Write a binary PGM or PPM file of 16 bits."""
    h, w, n = pixels.shape
    target.write(f"P{5 if n == 1 else 6}\n{w} {h}\n65535\n".encode() + pixels.astype(">u2").tobytes())
