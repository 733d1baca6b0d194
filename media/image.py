"""Pictures in and out through Pillow, with what must not get lost: bit depth, alpha, ICC, EXIF, XMP, orientation."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, TiffTags, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ..container.errors import CodecError, LimitExceeded, UnsupportedInput
from ..container.format import DEFAULT_LIMITS, Limits
from . import deep

SUFFIXES = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF", ".tif": "TIFF", ".tiff": "TIFF",
    ".bmp": "BMP", ".ppm": "PPM", ".pgm": "PPM",
}  # fmt: skip
# What is read. Not all that Pillow can: some of its readers start other programs (EPS), some cut deep pixels unseen.
READABLE = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "PPM", "GIF", "TGA", "QOI")
NO_ALPHA = {"JPEG", "PPM", "BMP"}
SIXTEEN_BIT = {"PNG", "TIFF", "PPM"}
METADATA = ("icc", "exif", "xmp")
KEEPS_METADATA = {"PNG", "JPEG", "WEBP", "AVIF", "TIFF"}
MAX_SIDE = {"JPEG": 65500, "WEBP": 16383}
JPEG_SEGMENT = 65533  # bytes in a marker segment of a JPEG file
SUB_DIRECTORIES = (34665, 34853)  # EXIF, GPS
# TIFF tags that describe the picture, not its layout in the file: text, orientation, resolution, dates
_DESCRIPTIVE = (270, 271, 272, deep.ORIENTATION, 282, 283, 296, 305, 306, 315, 33432, *SUB_DIRECTORIES)
_EXIF_PREFIX = b"Exif\0\0"
_XMP_KEY = b"XML:com.adobe.xmp"
_XMP_TAG, _ICC_TAG = 700, 34675
_ROWS = 256


@dataclass(frozen=True)
class Picture:
    """Pixels as stored (EXIF orientation is not applied) and what comes with them.

    pixels: (H, W, C) uint8 or uint16, C 1 (grey) or 3 (RGB); alpha: (H, W) of the same type or None; icc, xmp: raw
    bytes; exif: a TIFF structure that starts with its byte order. ``format`` is Pillow's name of where it came from.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    format: str = "PNG"
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def peak(self) -> int:
        """The value of white: 255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)


# --- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def _our_limits() -> Iterator[None]:
    """Pillow's own limits are replaced by ours, which name their flags."""
    before = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, Limits.max_metadata_bytes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and the like: Pillow warns, the pixels are fine
            yield
    finally:
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = before


def read_picture(
    source: str | Path | bytes,
    limits: Limits = DEFAULT_LIMITS,
    *,
    strip: bool = False,
    name: str | None = None,
) -> Picture:
    """Read a picture from a file, or from bytes that messages call ``name``.

    ``strip`` drops EXIF, XMP and ICC, after turning the pixels upright.

    UnsupportedInput for what is no picture, is damaged, animated, or has more bits than would be kept; LimitExceeded;
    OSError for files that cannot be read.
    """
    name = name or ("input" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    if not data:
        raise UnsupportedInput(f"{name}: the file is empty")
    with _our_limits():
        try:
            picture = _read(data, limits)
        except UnidentifiedImageError:
            raise UnsupportedInput(f"{name}: not a picture that is read here ({', '.join(READABLE)})") from None
        except CodecError as error:
            raise type(error)(f"{name}: {error}") from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise what they like about damaged files
            raise UnsupportedInput(f"{name}: the picture is damaged or cut short ({error})") from None
        return _stripped(picture) if strip else picture


def _read(data: bytes, limits: Limits) -> Picture:
    with Image.open(io.BytesIO(data), formats=READABLE) as image:
        limits.check_picture(*image.size)
        notes = [*_check_frames(image), *_lost_colour(image, data)]
        wide = _is_deep(image, data)
        if image.width * image.height * 4 * (2 if wide else 1) > limits.max_decoded_bytes:
            raise LimitExceeded(f"the picture needs more than {limits.max_decoded_bytes} bytes (--max-bytes)")
        if wide and image.format == "PNG":
            pixels, alpha = deep.read_png(data)
        elif wide and image.format == "TIFF":
            pixels, alpha = deep.read_tiff(data, image.tag_v2)
        elif wide:
            pixels, alpha = deep.read_ppm(data), None
        if not wide or image.format == "PNG":  # whose metadata may follow the pixels; Pillow turns a TIFF upright
            image.load()
        meta = _metadata(image)
        if not wide:
            picture, note = _convert(image, meta["icc"], data)
            notes += note
            pixels, alpha = _arrays(picture)
            if picture.mode == "RGB" and image.mode not in ("RGB", "RGBX", "P"):
                meta["icc"] = None  # it was of the other colour space
            if picture.mode == "I;16" and image.format == "TIFF" and image.tag_v2.get(deep.PHOTOMETRIC) == 0:
                pixels = 65535 - pixels  # Pillow inverts white-is-zero in 8 bits only
        fmt = "JPEG" if image.format == "MPO" else image.format or ""
    pixels, alpha = np.ascontiguousarray(pixels), None if alpha is None else np.ascontiguousarray(alpha)
    return Picture(pixels, alpha, format=fmt, notes=tuple(notes), **meta)


def _check_frames(image: Image.Image) -> list[str]:
    frames = getattr(image, "n_frames", 1)
    if frames == 1:
        return []
    if image.format == "MPO":  # what cameras write: the photograph, then previews, depth or gain maps
        return [f"{frames - 1} further pictures in the file (previews, depth, gain maps) were left out"]
    what = "pages" if image.format == "TIFF" else "frames"
    raise UnsupportedInput(
        f"has {frames} {what}, and is not coded as one picture; take one out first, such as with `magick IN[0] OUT.png`"
    )


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether the pixels are for our own readers: Pillow would cut them. UnsupportedInput if nobody reads them."""
    if image.format == "PNG":
        return data[24] == 16
    if image.format == "TIFF":
        bits = set(image.tag_v2.get(deep.BITS, (1,)))
        if max(bits) > 8 and bits != {16}:
            raise UnsupportedInput(f"{max(bits)} bits per channel are not coded, only 8 and 16; convert it first")
        return bits == {16} and not image.mode.startswith("I")
    if image.format == "PPM":
        return deep.ppm_peak(data) > 255
    if image.format == "AVIF":
        at = data.find(b"av1C")
        if at >= 0 and data[at + 6] & 0x40:
            raise UnsupportedInput("an AVIF of 10 or 12 bits would be cut to 8; convert it to a PNG of 16 bits first")
    return False


def _lost_colour(image: Image.Image, data: bytes) -> list[str]:
    """A note if a PNG file says in its own chunks that its colours are not sRGB: those chunks are not kept."""
    if image.format != "PNG":
        return []
    chunks = dict(deep.png_chunks(data))
    if b"cICP" in chunks:
        return ["the cICP description of its colours is not kept"]
    gamma = int.from_bytes(chunks.get(b"gAMA", b""), "big")
    if gamma and abs(gamma - 45455) > 500 and not chunks.keys() & {b"iCCP", b"sRGB"}:
        return [f"its gamma of 1/{100000 / gamma:.3g} is not kept"]
    return []


def _convert(image: Image.Image, icc: bytes | None, data: bytes) -> tuple[Image.Image, list[str]]:
    """The same picture in one of the modes L, LA, RGB, RGBA, I;16, and notes."""
    mode, key = image.mode, image.info.get("transparency")
    if mode in ("L", "LA", "RGB", "RGBA", "I;16") and key is None:
        return image, []
    if mode == "RGBX":
        return image.convert("RGB"), ["a fourth channel of unknown meaning was left out"]
    if mode in ("P", "PA"):
        return image.convert("RGB" if mode == "P" and key is None else "RGBA"), []
    if mode in ("1", "L"):
        if image.format == "PNG" and mode == "L" and isinstance(key, int):  # Pillow scales the pixels, but not the key
            image.info["transparency"] = key * 255 // ((1 << data[24]) - 1)
        return image.convert("L" if key is None else "LA"), []
    if mode == "RGB":
        return image.convert("RGBA"), []
    if mode == "I;16B":
        return Image.fromarray(np.asarray(image).astype(np.uint16)), []
    if mode == "I" and image.format == "PPM":  # grey of up to 16 bits
        return Image.fromarray(np.asarray(image).astype(np.uint16)), []
    if mode == "YCbCr":
        return image.convert("RGB"), []
    if mode in ("CMYK", "LAB"):
        return _through_profile(image, icc), [f"{mode} was converted to sRGB"]
    raise UnsupportedInput(f"pixels of mode {mode} are not coded; convert it to RGB of 8 or 16 bits")


def _through_profile(image: Image.Image, icc: bytes | None) -> Image.Image:
    try:
        if icc:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        elif image.mode == "LAB":
            profile = ImageCms.createProfile("LAB")
        else:
            raise UnsupportedInput("CMYK without a colour profile: its colours are unknown; convert it to RGB first")
        rgb = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        raise UnsupportedInput(f"the colour profile does not fit {image.mode}; convert it to RGB first") from None
    assert rgb is not None  # it is None only when done in place
    return rgb


def _arrays(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """(pixels, alpha) of L, LA, RGB, RGBA, I;16. In bands: Pillow makes two copies of what it hands out."""
    colours = 3 if image.mode.startswith("RGB") else 1
    pixels = np.empty((image.height, image.width, colours), np.uint16 if image.mode == "I;16" else np.uint8)
    alpha = np.empty(pixels.shape[:2], np.uint8) if image.mode.endswith("A") else None
    for y in range(0, image.height, _ROWS):
        band = np.asarray(image.crop((0, y, image.width, min(y + _ROWS, image.height))))
        band = band.reshape(*band.shape[:2], -1)
        pixels[y : y + _ROWS] = band[..., :colours]
        if alpha is not None:
            alpha[y : y + _ROWS] = band[..., -1]
    return pixels, alpha


# --- what comes with the pixels -------------------------------------------------------------------------------------


def _metadata(image: Image.Image) -> dict[str, bytes | None]:
    exif = image.info.get("exif")
    if image.format == "TIFF" or not exif:  # of a TIFF what describes the picture; of a PNG what hides in text
        exif = _descriptive(image.getexif())
    xmp = image.info.get("xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    icc = image.info.get("icc_profile")
    return {"icc": icc or None, "exif": (exif or b"").removeprefix(_EXIF_PREFIX) or None, "xmp": xmp or None}


def _descriptive(tags: Image.Exif) -> bytes:
    """EXIF with those tags of a TIFF directory that describe the picture; empty if there are none."""
    kept = Image.Exif()
    for tag in _DESCRIPTIVE:
        if tag in SUB_DIRECTORIES:
            if directory := tags.get_ifd(tag):
                kept.get_ifd(tag).update(directory)
                kept[tag] = directory
        elif tag in tags:
            kept[tag] = tags[tag]
    return kept.tobytes() if kept else b""


def _stripped(picture: Picture) -> Picture:
    """Without metadata, and upright: nothing tells a viewer any more to turn it."""
    turn = orientation(picture.exif)
    notes = picture.notes
    if picture.icc and (profile := _profile_name(picture.icc)) and "srgb" not in profile.lower():
        notes += (f"the colour profile {profile!r} was left out: colours may look different",)
    alpha = None if picture.alpha is None else _upright(picture.alpha, turn)
    pixels = _upright(picture.pixels, turn)
    return replace(picture, pixels=pixels, alpha=alpha, icc=None, exif=None, xmp=None, notes=notes)


def orientation(exif: bytes | None) -> int:
    """EXIF orientation 1..8; 1 where there is none or it makes no sense."""
    tags = Image.Exif()
    try:
        tags.load(_EXIF_PREFIX + (exif or b""))
        value = tags.get(deep.ORIENTATION, 1)
    except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(plane: np.ndarray, turn: int) -> np.ndarray:
    if turn >= 5:
        plane = plane.swapaxes(0, 1)
    if turn in (3, 4, 7, 8):
        plane = plane[::-1]
    if turn in (2, 3, 6, 7):
        plane = plane[:, ::-1]
    return np.ascontiguousarray(plane)


def _profile_name(icc: bytes) -> str:
    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(icc))).strip()
    except (ImageCms.PyCMSError, OSError):
        return "unknown"


# --- writing --------------------------------------------------------------------------------------------------------


def format_of(path: str | Path) -> str:
    """Pillow's name of the format that a file name asks for. UnsupportedInput for an unknown suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UnsupportedInput(f"{path}: unknown suffix {suffix!r}; known are {' '.join(SUFFIXES)}")
    return SUFFIXES[suffix]


def check_target(picture_format: str, *, alpha: bool, depth: int, side: int = 1) -> None:
    """UnsupportedInput when a format cannot hold such a picture: before decoding, not after."""
    if alpha and picture_format in NO_ALPHA:
        raise UnsupportedInput(f"{picture_format} cannot hold the alpha channel; write PNG, WebP, TIFF or AVIF instead")
    if depth == 16 and picture_format not in SIXTEEN_BIT:
        raise UnsupportedInput(f"{picture_format} cannot hold 16 bits; write PNG or TIFF instead")
    if side > (most := MAX_SIDE.get(picture_format, side)):
        raise UnsupportedInput(f"{picture_format} cannot hold sides beyond {most} pixels; write PNG or TIFF instead")


def write_picture(target: BinaryIO, picture: Picture, format: str = "PNG", quality: int = 95) -> list[str]:
    """Write ``picture`` to an open binary file; what could not be kept is returned as lines of text.

    PNG, TIFF, WebP are written losslessly, JPEG and AVIF at ``quality`` without chroma subsampling.
    """
    depth = 16 if picture.peak == 65535 else 8
    check_target(format, alpha=picture.alpha is not None, depth=depth, side=max(picture.width, picture.height))
    options, lost = _metadata_options(picture, format)
    with _our_limits():
        if depth == 16 and format == "PNG":
            deep.write_png(target, picture.pixels, picture.alpha, _png_chunks(picture, options))
        elif format == "TIFF":
            _save_tiff(target, picture, options)
        elif depth == 16:
            deep.write_ppm(target, picture.pixels)
        else:
            _save(target, picture, format, quality, options)
    return lost


def _save(target: BinaryIO, picture: Picture, format: str, quality: int, options: dict[str, Any]) -> None:
    pixels = picture.pixels
    if picture.alpha is not None:
        pixels = np.concatenate([pixels, picture.alpha[..., None]], 2)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    options |= {
        "PNG": {"compress_level": 6},
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True, "method": 4},  # exact: colours under alpha 0 stay
        "AVIF": {"quality": quality, "subsampling": "4:4:4"},
    }.get(format, {})
    image.save(target, format, **options)


def _save_tiff(target: BinaryIO, picture: Picture, options: dict[str, Any]) -> None:
    """A deflated TIFF of 8 or 16 bits. Pillow writes no 16-bit colour and, through libtiff, no EXIF directories."""
    pixels, alpha = picture.pixels, picture.alpha
    if alpha is not None and alpha.itemsize == 2 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, 2)  # grey with alpha of 16 bits is read by few, not even by Pillow
    h, w, n = *pixels.shape[:2], pixels.shape[2] + (alpha is not None)
    strips = []
    for y in range(0, h, _ROWS):
        part = pixels[y : y + _ROWS]
        if alpha is not None:
            part = np.concatenate([part, alpha[y : y + _ROWS, :, None]], 2)
        rest = np.diff(part, axis=1, prepend=np.zeros((len(part), 1, n), part.dtype))
        strips.append(zlib.compress(rest.astype(rest.dtype.newbyteorder("<")).tobytes()))
    sizes = [len(s) for s in strips]
    tags = {
        deep.WIDTH: w, deep.HEIGHT: h, deep.BITS: (8 * pixels.itemsize,) * n, deep.COMPRESSION: deep.DEFLATE,
        deep.PHOTOMETRIC: 2 if n > 2 else 1, deep.OFFSETS: tuple(np.cumsum([0, *sizes[:-1]]).tolist()),
        deep.SAMPLES: n, deep.STRIP_ROWS: _ROWS, deep.COUNTS: tuple(sizes), deep.PLANAR: 1, deep.PREDICTOR: 2,
    }  # fmt: skip
    if alpha is not None:
        tags[deep.EXTRA] = 2
    if "exif" in options:
        described = Image.Exif()
        described.load(options["exif"])
        tags |= {tag: described.get_ifd(tag) if tag in SUB_DIRECTORIES else described[tag] for tag in described}
    directory = ImageFileDirectory_v2(prefix=b"II")
    for tag, value in tags.items():
        directory[tag] = value
    for tag, value in ((_XMP_TAG, options.get("xmp")), (_ICC_TAG, options.get("icc_profile"))):
        if value:
            directory.tagtype[tag], directory[tag] = TiffTags.BYTE if tag == _XMP_TAG else TiffTags.UNDEFINED, value
    directory.tagtype[deep.OFFSETS] = TiffTags.LONG
    head = io.BytesIO()
    directory.save(head)
    for part in (head.getvalue(), *strips):
        target.write(part)


def _metadata_options(picture: Picture, format: str) -> tuple[dict[str, Any], list[str]]:
    """Pillow's options that write the metadata, and what this format cannot hold."""
    options: dict[str, Any] = {}
    lost = []
    for key in METADATA:
        value = getattr(picture, key)
        if not value:
            continue
        if format not in KEEPS_METADATA:
            lost.append(f"{format} cannot hold the {key.upper()} data: left out")
        elif format == "JPEG" and key != "icc" and len(value) > JPEG_SEGMENT - 32:
            lost.append(f"JPEG cannot hold {key.upper()} data of {len(value)} bytes: left out")
        elif key == "exif":
            options[key] = _EXIF_PREFIX + value
        elif key == "icc":
            options["icc_profile"] = value
        elif format != "PNG":
            options[key] = value
        elif _is_utf8(value):
            options["pnginfo"] = PngImagePlugin.PngInfo()
            options["pnginfo"].add_itxt(_XMP_KEY.decode(), value.decode())
        else:
            lost.append("PNG cannot hold XMP data that is not UTF-8: left out")
    if format in ("TIFF", "AVIF") and "exif" in options:  # here it is taken to pieces
        try:
            tags = Image.Exif()
            tags.load(options["exif"])
            options["exif"] = _descriptive(tags) if format == "TIFF" else tags.tobytes()
        except (SyntaxError, ValueError, KeyError, TypeError, struct.error):
            del options["exif"]
            lost.append("the EXIF data is damaged: left out")
    return options, lost


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _png_chunks(picture: Picture, options: dict[str, Any]) -> dict[bytes, bytes]:
    """The metadata chunks that Pillow would write."""
    chunks = {}
    if "icc_profile" in options:
        chunks[b"iCCP"] = b"ICC profile\0\0" + zlib.compress(options["icc_profile"])
    if "exif" in options:
        chunks[b"eXIf"] = options["exif"].removeprefix(_EXIF_PREFIX)
    if "pnginfo" in options:
        chunks[b"iTXt"] = _XMP_KEY + bytes(5) + (picture.xmp or b"")
    return chunks
