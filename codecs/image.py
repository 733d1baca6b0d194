"""Pictures through an ``ImageCodec``: tiles, margins, alpha, metadata, and the way back. Layout: ``SPEC.md`` beside this file.

A large picture is cut into tiles that are coded alone, so memory is bounded and a region can be read by itself. The tiles do
not overlap in the stream: the latent of a tile is computed from its pixels and a margin around them, and its pixels are
synthesised from its latent and a margin of its neighbours' latents. Both margins cover the receptive field, so a tiled picture
has no seams and costs no extra bits.
"""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..container.errors import CorruptStream, LimitExceeded, UsageError
from ..container.format import DEFAULT_LIMITS, Limits, Segment, Stream
from ..media.image import Picture
from .base import LEVELS, ImageCodec

TILE = 1024
METADATA = ("icc", "exif", "xmp")
_LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
Progress = Callable[[int, int], None]
Trace = dict[tuple[int, int], str]
TileEncoder = Callable[[ImageCodec, Tensor, Tensor, tuple[slice, slice], tuple[int, int], int], tuple[bytes, Tensor]]
"""(codec, x, y, part, size, level) -> (payload, y^) of a tile: its cells are ``part`` of y, which was made of x, and of its
pixels those of the first ``size`` rows and columns lie in the picture."""


@dataclass(frozen=True)
class Layout:
    """Cells (``stride`` pixels) of the padded picture and its cut into tiles; all derived from the header."""

    width: int
    height: int
    tile: int
    stride: int
    multiple: int

    @property
    def padded(self) -> tuple[int, int]:
        """Width and height after padding to the tile multiple."""
        m = self.multiple
        return -(-self.width // m) * m, -(-self.height // m) * m

    @property
    def grid(self) -> tuple[int, int]:
        """Columns and rows of tiles."""
        w, h = self.padded
        return -(-w // self.tile), -(-h // self.tile)

    def box(self, column: int, row: int) -> tuple[int, int, int, int]:
        """Pixels x0, y0, x1, y1 of a tile in the padded picture."""
        w, h = self.padded
        x, y = column * self.tile, row * self.tile
        return x, y, min(x + self.tile, w), min(y + self.tile, h)

    def cells(self, column: int, row: int) -> tuple[int, int]:
        """Width and height of a tile's latent."""
        x0, y0, x1, y1 = self.box(column, row)
        return (x1 - x0) // self.stride, (y1 - y0) // self.stride


def _layout(codec: ImageCodec, width: int, height: int, tile: int) -> Layout:
    return Layout(width, height, tile, codec.stride, codec.tile_multiple)


def _take(pixels: np.ndarray, x0: int, y0: int, x1: int, y1: int, peak: int) -> Tensor:
    """Pixels of a box (1, 3, h, w) in [0, 1]; beyond the picture the last row and column go on."""
    h, w = pixels.shape[:2]
    rows = np.minimum(np.arange(y0, y1), h - 1)
    columns = np.minimum(np.arange(x0, x1), w - 1)
    part = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    part = np.pad(part, ((0, len(rows) - part.shape[0]), (0, len(columns) - part.shape[1]), (0, 0)), "edge")
    x = torch.from_numpy(part.astype(np.float32)).permute(2, 0, 1)[None] / peak
    return x.expand(1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def encode_picture(codec: ImageCodec, picture: Picture, level: int, *, tile: int = TILE, progress: Progress | None = None,
                   trace: Trace | None = None, tile_encoder: TileEncoder | None = None) -> Stream:  # fmt: skip
    """A picture as a stream at integer level 0..1000. ``tile`` is the side of a tile, a multiple of 64.

    ``trace`` is filled with the sha256 of every tile's y^: what a decoder must find, exactly. ``tile_encoder`` takes the
    place of ``codec.encode_latent`` where an encoder searches.
    """
    if tile < codec.tile_multiple or tile % codec.tile_multiple:
        raise UsageError(f"--tile must be a multiple of {codec.tile_multiple}, not {tile}")
    header = {"w": picture.width, "h": picture.height, "q": int(level), "f": picture.format}
    layout = _layout(codec, picture.width, picture.height, tile)
    columns, rows = layout.grid
    if columns * rows > 1:
        header["t"] = tile
    if picture.pixels.shape[2] == 1:
        header["c"] = 1
    if picture.peak == 65535:
        header["d"] = 16
    device = next(codec.parameters()).device
    m, (pw, ph) = codec.analysis_margin, layout.padded
    segments = []
    for row in range(rows):
        for column in range(columns):
            x0, y0, x1, y1 = layout.box(column, row)
            ex0, ey0, ex1, ey1 = max(x0 - m, 0), max(y0 - m, 0), min(x1 + m, pw), min(y1 + m, ph)
            x = _take(picture.pixels, ex0, ey0, ex1, ey1, picture.peak).to(device)
            y = codec.analyse(x, level)
            s = layout.stride
            part = slice((y0 - ey0) // s, (y1 - ey0) // s), slice((x0 - ex0) // s, (x1 - ex0) // s)
            if tile_encoder is None:
                payload, y_hat = codec.encode_latent(y[:, :, *part], level)
            else:
                size = min(y1, picture.height) - y0, min(x1, picture.width) - x0
                payload, y_hat = tile_encoder(codec, x, y, part, size, level)
            segments.append(Segment("tile", payload))
            if trace is not None:
                trace[column, row] = _hash(y_hat)
            if progress:
                progress(len(segments), columns * rows)
    if picture.alpha is not None:
        segments.append(Segment("alpha", encode_plane(picture.alpha)))
    for name in METADATA:
        if value := getattr(picture, name):
            segments.append(Segment(name, _pack(value), critical=False))
    return Stream(codec.name, codec.preset, codec.model_id, header, segments)


def _hash(y_hat: Tensor) -> str:
    return hashlib.sha256(y_hat.contiguous().cpu().numpy().astype("<f4").tobytes()).hexdigest()


@dataclass(frozen=True)
class PictureInfo:
    """What a stream's header says of its picture."""

    width: int
    height: int
    level: int
    tile: int
    channels: int
    depth: int
    format: str


def _integer(header: dict, key: str, low: int, high: int, default: int | None = None) -> int:
    value = header.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise CorruptStream(f"header: {key!r} is missing or out of range")
    return value


def picture_info(header: dict, limits: Limits = DEFAULT_LIMITS) -> PictureInfo:
    """Check a header. CorruptStream, LimitExceeded."""
    width, height = _integer(header, "w", 1, 1 << 31), _integer(header, "h", 1, 1 << 31)
    limits.check_picture(width, height, "stream")
    fmt = header.get("f", "PNG")
    if not isinstance(fmt, str):
        raise CorruptStream("header: 'f' is not a text")
    channels, depth = _integer(header, "c", 1, 3, 3), _integer(header, "d", 8, 16, 8)
    if channels == 2 or depth not in (8, 16):
        raise CorruptStream("header: impossible channels or depth")
    if width * height * (channels * depth // 8 + 1) > limits.max_decoded_bytes:
        raise LimitExceeded(f"the decoded picture needs more than {limits.max_decoded_bytes} bytes (--max-bytes)")
    tile = _integer(header, "t", 64, 1 << 20, 1 << 20)
    return PictureInfo(width, height, _integer(header, "q", 0, LEVELS), tile, channels, depth, fmt)


@torch.inference_mode()
def decode_picture(codec: ImageCodec, stream: Stream, *, roi: tuple[int, int, int, int] | None = None,
                   limits: Limits = DEFAULT_LIMITS, progress: Progress | None = None,
                   trace: Trace | None = None) -> Picture:  # fmt: skip
    """The picture of a stream, or its region ``roi`` (x, y, width, height). CorruptStream, LimitExceeded, UsageError.

    ``trace`` is filled with the sha256 of the y^ of every tile that was decoded.
    """
    info = picture_info(stream.header, limits)
    if info.tile % codec.tile_multiple:
        raise CorruptStream("header: impossible tile size")
    x, y, w, h = roi or (0, 0, info.width, info.height)
    if x < 0 or y < 0 or w < 1 or h < 1 or x + w > info.width or y + h > info.height:
        raise UsageError(f"--roi {x},{y},{w},{h} does not lie in the picture of {info.width}x{info.height}")
    layout = _layout(codec, info.width, info.height, info.tile)
    columns, rows = layout.grid
    payloads = [s.data for s in stream.segments if s.name == "tile"]
    if len(payloads) != columns * rows:
        raise CorruptStream(f"{len(payloads)} tiles where the size needs {columns * rows}")
    peak = (1 << info.depth) - 1
    pixels = np.empty((h, w, info.channels), np.uint16 if info.depth == 16 else np.uint8)
    device = next(codec.parameters()).device
    tiles = list(_tiles_of(layout, (x, y, x + w, y + h)))
    latents: dict[tuple[int, int], Tensor] = {}

    def latent(column: int, row: int) -> Tensor:
        if (column, row) not in latents:
            wl, hl = layout.cells(column, row)
            latents[column, row] = codec.decode_latent(payloads[row * columns + column], hl, wl, info.level)
            if trace is not None:
                trace[column, row] = _hash(latents[column, row])
        return latents[column, row]

    for done, (column, row) in enumerate(tiles):
        for key in [k for k in latents if k[1] < row - 1]:
            del latents[key]
        _synthesise(codec, layout, latent, column, row, (x, y, x + w, y + h), pixels, peak, info.level, device)
        if progress:
            progress(done + 1, len(tiles))
    alpha = None
    if (data := stream.get("alpha")) is not None:
        alpha = decode_plane(data, info.height, info.width, info.depth)[y : y + h, x : x + w]
    extra = {name: _unpack(stream.get(name), limits, name, stream.warnings) for name in METADATA}
    return Picture(pixels, alpha, format=info.format, **extra)


def _tiles_of(layout: Layout, box: tuple[int, int, int, int]) -> Iterator[tuple[int, int]]:
    """Tiles that a box of pixels touches, row by row."""
    x0, y0, x1, y1 = box
    for row in range(y0 // layout.tile, (y1 - 1) // layout.tile + 1):
        for column in range(x0 // layout.tile, (x1 - 1) // layout.tile + 1):
            yield column, row


def _synthesise(codec: ImageCodec, layout: Layout, latent: Callable[[int, int], Tensor], column: int, row: int,
                box: tuple[int, int, int, int], out: np.ndarray, peak: int, level: int, device) -> None:  # fmt: skip
    """Write the pixels of ``box`` that lie in a tile into ``out``, which holds the box."""
    s, m, t = layout.stride, codec.synthesis_margin, layout.tile // layout.stride
    pw, ph = (n // s for n in layout.padded)
    tx0, ty0, tx1, ty1 = layout.box(column, row)
    x0, y0, x1, y1 = max(box[0], tx0), max(box[1], ty0), min(box[2], tx1), min(box[3], ty1)
    # cells that these pixels need, with their margin
    nx0, ny0, nx1, ny1 = (tx0, ty0, tx1, ty1) if codec.whole_tiles else (x0, y0, x1, y1)
    cx0, cy0 = max(nx0 // s - m, 0), max(ny0 // s - m, 0)
    cx1, cy1 = min(-(-nx1 // s) + m, pw), min(-(-ny1 // s) + m, ph)
    strips = []
    for r in range(cy0 // t, (cy1 - 1) // t + 1):
        pieces = []
        for c in range(cx0 // t, (cx1 - 1) // t + 1):
            piece = latent(c, r)
            pieces.append(piece[:, :, max(cy0 - r * t, 0) : cy1 - r * t, max(cx0 - c * t, 0) : cx1 - c * t])
        strips.append(torch.cat(pieces, 3))
    y_hat = torch.cat(strips, 2).contiguous(memory_format=torch.channels_last)
    x_hat = codec.synthesise(y_hat.to(device), level)
    x_hat = x_hat[0, :, y0 - cy0 * s : y1 - cy0 * s, x0 - cx0 * s : x1 - cx0 * s]
    if out.shape[2] == 1:
        x_hat = x_hat.mean(0, keepdim=True)
    values = torch.floor(x_hat.clamp(0, 1) * peak + 0.5).permute(1, 2, 0).cpu().numpy()
    out[y0 - box[1] : y1 - box[1], x0 - box[0] : x1 - box[0]] = values


def encode_plane(plane: np.ndarray) -> bytes:
    """Lossless bytes of an alpha plane (h, w) uint8 or uint16: constant, or the best of three row filters under LZMA2."""
    if plane.min() == plane.max():
        return bytes([3]) + int(plane.flat[0]).to_bytes(plane.itemsize, "little")
    left = np.diff(plane, axis=1, prepend=plane.dtype.type(0))
    up = np.diff(plane, axis=0, prepend=plane.dtype.type(0))
    packed = [
        bytes([kind]) + lzma.compress(_planes(p), lzma.FORMAT_RAW, filters=_LZMA)
        for kind, p in enumerate((plane, left, up))
    ]
    return min(packed, key=len)


def _planes(plane: np.ndarray) -> bytes:
    """Samples as bytes: of 16 bits all low bytes, then all high ones, of which neighbours are alike."""
    samples = plane.astype(plane.dtype.newbyteorder("<")).reshape(-1, 1).view(np.uint8)
    return np.ascontiguousarray(samples.T).tobytes()


def decode_plane(data: bytes, h: int, w: int, depth: int = 8) -> np.ndarray:
    """Inverse of ``encode_plane`` (h, w) of 8 or 16 bits. CorruptStream unless the data holds exactly h*w samples."""
    size = depth // 8
    kind = data[0] if data else -1
    if kind == 3 and len(data) == 1 + size:
        return np.full((h, w), int.from_bytes(data[1:], "little"), f"<u{size}").astype(f"=u{size}")
    if kind not in (0, 1, 2):
        raise CorruptStream("alpha: unknown kind")
    try:
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_LZMA)
        raw = decoder.decompress(data[1:], max_length=h * w * size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise CorruptStream("alpha: damaged") from error
    if len(raw) != h * w * size or not decoder.eof or decoder.unused_data:
        raise CorruptStream("alpha: wrong length")
    samples = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(size, -1).T)
    plane = samples.view(f"<u{size}").astype(f"=u{size}").reshape(h, w)
    return plane if kind == 0 else np.cumsum(plane, axis=2 - kind, dtype=plane.dtype)


def _pack(value: bytes) -> bytes:
    """Metadata, deflated where that is shorter; the first byte tells."""
    small = zlib.compress(value, 9)
    return b"\1" + small if len(small) < len(value) else b"\0" + value


def _unpack(data: bytes | None, limits: Limits, name: str, notes: list[str]) -> bytes | None:
    """Inverse of ``_pack``; metadata that cannot be unpacked is left out and noted."""
    if not data:
        return None
    if data[0] == 0:
        return data[1:]
    decoder = zlib.decompressobj()
    try:
        value = decoder.decompress(data[1:], limits.max_metadata_bytes)
    except zlib.error:
        value = b""
    if data[0] != 1 or not decoder.eof:
        notes.append(f"{name} data is damaged or too large and was left out")
        return None
    return value


def psnr_of(a: np.ndarray, b: np.ndarray, peak: int = 255) -> float:
    """PSNR in dB over all channels of two pictures (h, w, c); inf when equal. Row blocks keep the memory small."""
    total = sum(
        float(np.square(a[i : i + 256].astype(np.float64) - b[i : i + 256]).sum()) for i in range(0, len(a), 256)
    )
    return float("inf") if total == 0 else float(10 * np.log10(peak**2 * a.size / total))


def fit_level(measure: Callable[[int], float], target: float, *, at_most: bool, tolerance: float) -> tuple[int, float]:
    """Integer level 0..1000 whose ``measure`` (growing with the level) comes closest to ``target``; (level, measure).

    Regula falsi with bisection, each level measured once. Stops within ``tolerance`` (relative). ``at_most`` never goes above
    the target where any level allows it.
    """
    seen: dict[int, float] = {}

    def value(level: int) -> float:
        if level not in seen:
            seen[level] = measure(level)
        return seen[level]

    low, high = 0, LEVELS
    if value(low) < target < value(high):
        turn = 0
        while high - low > 1:
            share = (target - value(low)) / max(value(high) - value(low), 1e-12)
            middle = round(low + share * (high - low)) if turn % 3 else (low + high) // 2
            turn += 1
            middle = min(max(middle, low + 1), high - 1)
            got = value(middle)
            if abs(got - target) <= tolerance * target and (got <= target or not at_most):
                return middle, got
            if got < target:
                low = middle
            else:
                high = middle
    fitting = {k: v for k, v in seen.items() if v <= target or not at_most} or {0: value(0)}
    best = min(fitting, key=lambda k: abs(fitting[k] - target))
    return best, fitting[best]


def fit_costly(measure: Callable[[int], float], guess: Callable[[int], float], target: float, *, at_most: bool,
               tolerance: float, tries: int = 4) -> tuple[int, float]:  # fmt: skip
    """``fit_level`` for a measure that takes long and nearly is a multiple of a cheap ``guess``: at most ``tries`` of it."""
    seen: dict[int, float] = {}
    factor = 1.0
    while len(seen) < tries:
        level, _ = fit_level(lambda v: guess(v) * factor, target, at_most=at_most, tolerance=tolerance / 2)  # noqa: B023
        if level in seen:
            break
        seen[level] = got = measure(level)
        if abs(got - target) <= tolerance * target and (got <= target or not at_most):
            return level, got
        factor = got / guess(level)
    fitting = {k: v for k, v in seen.items() if v <= target or not at_most} or seen
    best = min(fitting, key=lambda k: abs(fitting[k] - target))
    return best, fitting[best]
