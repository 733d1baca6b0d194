"""Pictures in and out through Pillow, with what must not get lost: bit depth, alpha, ICC, EXIF, XMP, orientation."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..container.errors import UnsupportedInput
from ..container.format import Limits

SUFFIXES = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".avif": "AVIF", ".tif": "TIFF", ".tiff": "TIFF",
    ".bmp": "BMP", ".ppm": "PPM", ".pgm": "PPM",
}  # fmt: skip
NO_ALPHA = {"JPEG", "PPM", "BMP"}
SIXTEEN_BIT = {"PNG", "TIFF"}
METADATA = {
    "PNG": ("icc", "exif", "xmp"),
    "JPEG": ("icc", "exif", "xmp"),
    "WEBP": ("icc", "exif", "xmp"),
    "AVIF": ("icc", "exif", "xmp"),
    "TIFF": ("icc", "exif", "xmp"),
}
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """Pixels as stored (EXIF orientation is not applied) and what comes with them.

    pixels: (H, W, C) uint8 or uint16, C 1 (grey) or 3 (RGB); alpha: (H, W) uint8 or None; icc, exif, xmp: raw bytes.
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


@contextmanager
def _our_limits() -> Iterator[None]:
    """Pillow's own bomb check is replaced by ours, which names its flag."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF and the like: Pillow warns, the pixels are fine
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def read_picture(source: str | Path | bytes, limits: Limits = Limits(), *, strip: bool = False,
                 name: str | None = None) -> Picture:  # fmt: skip
    """Read a picture from a file, or from bytes that messages call ``name``.

    ``strip`` drops EXIF, XMP and ICC, after turning the pixels upright.

    UnsupportedInput for what is no picture, is damaged, animated, or has more bits than would be kept; LimitExceeded;
    OSError for files that cannot be read.
    """
    name = name or ("input" if isinstance(source, bytes) else str(source))
    with _our_limits(), io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        try:
            return _read(file, name, limits, strip)
        except UnidentifiedImageError:
            raise UnsupportedInput(f"{name}: not a picture that Pillow reads (PNG, JPEG, WebP, AVIF, TIFF, ...)") from None


def _read(file: BinaryIO, name: str, limits: Limits, strip: bool) -> Picture:
    start = file.read(8192)
    if not start:
        raise UnsupportedInput(f"{name}: the file is empty")
    file.seek(0)
    with Image.open(file) as image:
        limits.check_picture(*image.size, where=name)
        _refuse_more_bits(image, start, name)
        if getattr(image, "n_frames", 1) > 1:
            raise UnsupportedInput(f"{name}: has {image.n_frames} frames; extract one, animations are not coded as pictures")
        try:
            image.load()
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise UnsupportedInput(f"{name}: the picture is damaged or cut short ({error})") from None
        return _convert(image, name, strip)


def _refuse_more_bits(image: Image.Image, start: bytes, name: str) -> None:
    """Pillow cuts some deep pictures to 8 bits without a word; we do not."""
    deep = False
    if image.format == "PNG":
        deep = start[24] == 16 and image.mode not in ("I;16", "I")  # 16-bit colour is cut, 16-bit grey is not
    elif image.format == "TIFF":
        deep = max(image.tag_v2.get(258, (8,))) > 8 and image.mode not in ("I;16", "I;16B", "I", "F")
    elif image.format == "AVIF":
        at = start.find(b"av1C")
        deep = at >= 0 and bool(start[at + 6] & 0x40)
    if deep:
        raise UnsupportedInput(
            f"{name}: more than 8 bits per channel in colour are not coded yet, and would be cut to 8; convert it to 8 bits first"
        )


def _metadata(image: Image.Image) -> dict[str, bytes | None]:
    exif = image.info.get("exif")
    if not exif and (tags := image.getexif()) and image.format != "TIFF":
        exif = tags.tobytes()
    if image.format == "TIFF" and (orientation := image.getexif().get(ORIENTATION, 1)) != 1:
        tags = Image.Exif()
        tags[ORIENTATION] = orientation
        exif = tags.tobytes()
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(xmp, str):
        xmp = xmp.encode()
    if isinstance(xmp, tuple):
        xmp = bytes(xmp)
    return {"icc": image.info.get("icc_profile") or None, "exif": exif or None, "xmp": xmp or None}


def _convert(image: Image.Image, name: str, strip: bool) -> Picture:
    meta, notes = _metadata(image), []
    fmt = image.format or "PNG"
    if strip:
        image = ImageOps.exif_transpose(image)
        meta = dict.fromkeys(meta)
    mode = image.mode
    if mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image, meta["icc"], note = _to_rgb(image, meta["icc"])
        notes.append(note)
    elif mode in ("P", "PA"):
        image = image.convert("RGBA" if mode == "PA" or "transparency" in image.info else "RGB")
    elif mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA") if mode == "RGB" else image.convert("LA")
    elif mode == "1":
        image = image.convert("L")
    elif mode in ("I;16B", "I;16L", "I;16N"):
        image = image.convert("I;16") if mode != "I;16B" else Image.fromarray(np.asarray(image).astype(np.uint16))
    elif mode == "I" and fmt == "PNG":  # older Pillow reads 16-bit grey so
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    elif mode not in ("L", "LA", "RGB", "RGBA", "RGBX", "I;16"):
        raise UnsupportedInput(f"{name}: pixels of mode {mode} are not coded; convert them to 8-bit RGB or 16-bit grey")
    if image.mode == "RGBX":
        image = image.convert("RGB")
    pixels = np.asarray(image)
    alpha = None
    if image.mode in ("LA", "RGBA"):
        pixels, alpha = pixels[..., :-1], np.ascontiguousarray(pixels[..., -1])
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if (pixels.shape[2] == 3) != (image.mode in ("RGB", "RGBA")):
        raise UnsupportedInput(f"{name}: unexpected channels in mode {image.mode}")
    return Picture(np.ascontiguousarray(pixels), alpha, format=fmt, notes=tuple(notes), **meta)


def _to_rgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, None, str]:
    """RGB through the picture's own profile where it has one."""
    mode = image.mode
    if icc and mode in ("CMYK", "LAB"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            rgb = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return rgb, None, f"{mode} was converted to sRGB through its profile"
        except ImageCms.PyCMSError:
            pass
    return image.convert("RGB"), None, f"{mode} was converted to RGB without a profile"


def format_of(path: str | Path) -> str:
    """Pillow's name of the format that a file name asks for. UnsupportedInput for an unknown suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise UnsupportedInput(f"{path}: unknown suffix {suffix!r}; known are {' '.join(SUFFIXES)}")
    return SUFFIXES[suffix]


def check_target(picture_format: str, *, alpha: bool, depth: int) -> None:
    """UnsupportedInput when a format cannot hold such a picture: before decoding, not after."""
    if alpha and picture_format in NO_ALPHA:
        raise UnsupportedInput(f"{picture_format} cannot hold the alpha channel; write PNG, WebP, TIFF or AVIF instead")
    if depth == 16 and picture_format not in SIXTEEN_BIT:
        raise UnsupportedInput(f"{picture_format} cannot hold 16 bits; write PNG or TIFF instead")


def write_picture(target: BinaryIO, picture: Picture, format: str = "PNG", quality: int = 95) -> list[str]:
    """Write ``picture`` to an open binary file; what could not be kept is returned as lines of text.

    PNG, TIFF, WebP are written losslessly, JPEG and AVIF at ``quality`` without chroma subsampling.
    """
    depth = 16 if picture.peak == 65535 else 8
    check_target(format, alpha=picture.alpha is not None, depth=depth)
    pixels = picture.pixels
    if depth == 16 and pixels.shape[2] != 1:
        raise UnsupportedInput("16-bit colour cannot be written")
    if picture.alpha is not None:
        pixels = np.concatenate([pixels, picture.alpha[..., None]], 2)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels, {2: "LA"}.get(pixels.shape[2]))
    options: dict = {}
    lost = []
    for key in ("icc", "exif", "xmp"):
        value = getattr(picture, key)
        if not value:
            continue
        if key not in METADATA.get(format, ()):
            lost.append(f"{format} cannot hold the {key.upper()} data: left out")
        elif key == "xmp" and format == "PNG":
            from PIL.PngImagePlugin import PngInfo

            options["pnginfo"] = PngInfo()
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", value.decode("utf-8", "replace"))
        elif key == "xmp" and format == "TIFF":
            options["tiffinfo"] = {700: value}
        else:
            options["icc_profile" if key == "icc" else key] = value
    options |= {
        "PNG": {"compress_level": 6},
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"lossless": True, "method": 4},
        "AVIF": {"quality": quality, "subsampling": "4:4:4"},
        "TIFF": {"compression": "tiff_lzw" if depth == 8 else "tiff_deflate"},
    }.get(format, {})
    with _our_limits():
        image.save(target, format, **options)
    return lost




