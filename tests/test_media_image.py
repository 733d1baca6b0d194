"""Pictures in and out: modes, depths, metadata, refusals."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from neuralcodec.container import LimitExceeded, UnsupportedInput
from neuralcodec.container.format import Limits
from neuralcodec.media.files import atomic_write
from neuralcodec.media.image import Picture, check_target, orientation, read_picture, write_picture
from PIL import Image, ImageCms, PngImagePlugin, features

LOSSLESS = ("PNG", "TIFF", "WEBP")
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>\xc3\xa9</x:xmpmeta>"


def noise(shape: tuple[int, ...], dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def smooth(h: int, w: int) -> np.ndarray:
    """Colours that a lossy format keeps to a few units."""
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 255 // w, y * 255 // h, (x + y) * 255 // (h + w)], 2).astype(np.uint8)


def exif_of(turn: int, text: str = "left: a chair") -> bytes:
    tags = Image.Exif()
    tags[274], tags[270] = turn, text
    return tags.tobytes().removeprefix(b"Exif\0\0")


def icc_of(kind: str = "sRGB") -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()


def through(picture: Picture, format: str, **options) -> Picture:
    buffer = io.BytesIO()
    write_picture(buffer, picture, format, **options)
    return read_picture(buffer.getvalue())


def saved(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@given(h=st.integers(1, 40), w=st.integers(1, 40), grey=st.booleans(), alpha=st.booleans(), deep=st.booleans(),
       format=st.sampled_from(LOSSLESS), seed=st.integers(0, 9))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_lossless_formats_keep_every_sample(h, w, grey, alpha, deep, format, seed):
    kind = np.uint16 if deep else np.uint8
    picture = Picture(noise((h, w, 1 if grey else 3), kind, seed), noise((h, w), kind, seed + 1) if alpha else None)
    if format == "WEBP" and deep:
        with pytest.raises(UnsupportedInput, match="16 bits"):
            through(picture, format)
        return
    back = through(picture, format)
    # WebP knows no grey, and few readers of TIFF know grey with alpha of 16 bits
    coloured = grey and (format == "WEBP" or (format == "TIFF" and alpha and deep))
    expected = picture.pixels.repeat(3, 2) if coloured else picture.pixels
    assert back.pixels.dtype == kind and np.array_equal(back.pixels, expected)
    if alpha and (format != "WEBP" or picture.alpha.min() < 255):  # WebP drops an alpha that is all opaque
        assert np.array_equal(back.alpha, picture.alpha)


@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_lossy_formats_come_close(format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    picture = Picture(smooth(40, 56))
    assert np.abs(through(picture, format).pixels.astype(int) - picture.pixels).max() <= 12


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), mode=st.sampled_from(["I;16", "RGB", "RGBA", "LA"]))
@settings(max_examples=20, deadline=None)
def test_png_of_16_bits_from_another_writer(rows, columns, mode):
    """imagecodecs writes with libpng: other filters than ours."""
    imagecodecs = pytest.importorskip("imagecodecs")
    samples = {"I;16": 1, "RGB": 3, "RGBA": 4, "LA": 2}[mode]
    pixels = noise((rows, columns, samples), np.uint16)
    pixels[rows // 2 :] //= 256  # smooth parts choose other filters
    data = bytes(imagecodecs.png_encode(pixels if samples > 1 else pixels[..., 0]))
    back = read_picture(data)
    colours = samples - (samples in (2, 4))
    assert np.array_equal(back.pixels, pixels[..., :colours])
    assert samples == colours or np.array_equal(back.alpha, pixels[..., -1])
    assert np.array_equal(imagecodecs.png_decode(_png(back)).reshape(pixels.shape), pixels)


def _png(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    write_picture(buffer, picture, "PNG")
    return buffer.getvalue()


def test_palette_and_transparent_colours():
    rgb = smooth(20, 30)
    palette = Image.fromarray(rgb).quantize(16)
    exact = np.asarray(palette.convert("RGB"))
    plain = read_picture(saved(palette, "PNG"))
    assert np.array_equal(plain.pixels, exact) and plain.alpha is None
    index = np.asarray(palette)
    keyed = read_picture(saved(palette, "PNG", transparency=int(index[0, 0])))
    assert np.array_equal(keyed.alpha == 0, index == index[0, 0])
    for mode, key in (("RGB", tuple(int(v) for v in rgb[3, 4])), ("L", int(rgb[3, 4, 0]))):
        image = Image.fromarray(rgb).convert(mode) if mode == "RGB" else Image.fromarray(rgb[..., 0])
        back = read_picture(saved(image, "PNG", transparency=key))
        samples = np.asarray(image).reshape(20, 30, -1)
        assert np.array_equal(back.alpha == 0, (samples == np.array(key)).all(2))
        assert np.array_equal(back.pixels, samples)


def test_one_bit_and_grey_with_alpha():
    bits = noise((9, 13)) > 127
    assert np.array_equal(read_picture(saved(Image.fromarray(bits), "PNG")).pixels[..., 0] > 0, bits)
    la = noise((9, 13, 2))
    back = read_picture(saved(Image.fromarray(la, "LA"), "PNG"))
    assert np.array_equal(back.pixels[..., 0], la[..., 0]) and np.array_equal(back.alpha, la[..., 1])


def test_cmyk_needs_a_profile_and_is_converted_through_it():
    cmyk = Image.fromarray(smooth(16, 16)).convert("CMYK")
    with pytest.raises(UnsupportedInput, match="CMYK without a colour profile"):
        read_picture(saved(cmyk, "JPEG"))
    with pytest.raises(UnsupportedInput, match="does not fit CMYK"):
        read_picture(saved(cmyk, "JPEG", icc_profile=icc_of()))  # a profile of RGB on four channels


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_metadata_survives(format):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    picture = Picture(smooth(24, 32), icc=icc_of(), exif=exif_of(6), xmp=XMP)
    back = through(picture, format)
    assert back.icc == picture.icc and back.xmp == XMP
    tags = Image.Exif()
    tags.load(b"Exif\0\0" + back.exif)
    assert tags[270] == "left: a chair"
    if format == "TIFF":  # Pillow turns these while it reads them
        assert orientation(back.exif) == 1 and back.pixels.shape == (32, 24, 3)
    else:  # orientation is told, not applied
        assert orientation(back.exif) == 6 and back.pixels.shape == (24, 32, 3)


def test_metadata_that_a_format_cannot_hold_is_named():
    picture = Picture(smooth(8, 8), icc=icc_of(), exif=exif_of(1), xmp=XMP)
    assert len(write_picture(io.BytesIO(), picture, "BMP")) == 3
    large = Picture(smooth(8, 8), xmp=b"<x/>" + b" " * 70_000)
    assert write_picture(io.BytesIO(), large, "JPEG") == ["JPEG cannot hold XMP data of 70004 bytes: left out"]
    assert write_picture(io.BytesIO(), Picture(smooth(8, 8), xmp=b"\xff\xfe"), "PNG") == [
        "PNG cannot hold XMP data that is not UTF-8: left out"
    ]


@pytest.mark.parametrize("turn", range(1, 9))
def test_strip_turns_upright(turn):
    """All eight orientations, against Pillow's own transposition."""
    from PIL import ImageOps

    picture = Picture(smooth(20, 31), noise((20, 31)), exif=exif_of(turn), xmp=XMP)
    data = _png(picture)
    stripped = read_picture(data, strip=True)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(stripped.pixels, expected[..., :3]) and np.array_equal(stripped.alpha, expected[..., 3])
    assert stripped.exif is None and stripped.xmp is None


@pytest.mark.parametrize("exif", [None, b"", b"II", b"MM\0*\0\0\0\x08\xff\xff", bytes(64), exif_of(9)])
def test_nonsense_orientation_is_none(exif):
    assert orientation(exif) == 1


def test_what_is_no_single_picture_is_refused():
    frames = [Image.fromarray(noise((8, 8, 3), seed=i)) for i in range(3)]
    for format, text in (("GIF", "3 frames"), ("TIFF", "3 pages"), ("WEBP", "3 frames")):
        data = saved(frames[0], format, save_all=True, append_images=frames[1:])
        with pytest.raises(UnsupportedInput, match=text):
            read_picture(data)


def test_damage_is_named_and_never_another_error():
    data = _png(Picture(noise((30, 30, 3), np.uint16)))
    jpeg = saved(Image.fromarray(smooth(64, 64)), "JPEG")
    for original in (data, jpeg, saved(Image.fromarray(smooth(64, 64)), "TIFF", compression="tiff_lzw")):
        for cut in range(0, len(original), max(1, len(original) // 40)):
            try:
                read_picture(original[:cut], name="photo")
            except UnsupportedInput as error:
                assert str(error).startswith("photo: ")
            else:  # a format may end in bytes that nobody needs
                assert cut > len(original) - 16
    with pytest.raises(UnsupportedInput, match="empty"):
        read_picture(b"")
    with pytest.raises(UnsupportedInput, match="not a picture"):
        read_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n" * 5)


def test_limits_come_before_the_pixels():
    data = saved(Image.new("1", (3000, 2000)), "PNG")
    with pytest.raises(LimitExceeded, match="--max-pixels"):
        read_picture(data, Limits(max_pixels=5_000_000))
    with pytest.raises(LimitExceeded, match="--max-side"):
        read_picture(data, Limits(max_side=2500))
    with pytest.raises(LimitExceeded, match="--max-bytes"):
        read_picture(data, Limits(max_decoded_bytes=1_000_000))


def test_deep_pictures_are_never_cut_in_silence():
    imagecodecs = pytest.importorskip("imagecodecs")
    ten = bytes(imagecodecs.avif_encode(noise((16, 16, 3), np.uint16) >> 6, bitspersample=10, level=90))
    with pytest.raises(UnsupportedInput, match="10 or 12 bits"):
        read_picture(ten)
    tiff = saved(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF")
    with pytest.raises(UnsupportedInput, match="32 bits"):
        read_picture(tiff)


def test_targets_that_cannot_hold_it_are_refused_before_the_work():
    with pytest.raises(UnsupportedInput, match="alpha"):
        check_target("JPEG", alpha=True, depth=8)
    with pytest.raises(UnsupportedInput, match="16 bits"):
        check_target("WEBP", alpha=False, depth=16)
    with pytest.raises(UnsupportedInput, match="16383"):
        check_target("WEBP", alpha=False, depth=8, side=20_000)


def test_text_bombs_in_png_are_refused():
    """A compressed text chunk that unpacks to far more than metadata may take."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", " " * (Limits.max_metadata_bytes + 10), zip=True)
    with pytest.raises(UnsupportedInput):
        read_picture(saved(Image.fromarray(smooth(8, 8)), "PNG", pnginfo=info))


def test_atomic_write_leaves_nothing_behind(tmp_path):
    target = tmp_path / "a"
    with pytest.raises(RuntimeError), atomic_write(target) as file:
        file.write(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_write(target) as file:
        file.write(b"whole")
    with pytest.raises(FileExistsError), atomic_write(target):
        pass
    with atomic_write(target, overwrite=True) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
