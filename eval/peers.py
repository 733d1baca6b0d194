"""Peer codecs of pictures, and the way to all peers. Settings go from bad to good; libraries load when a peer is made.

Those of other kinds of data are in ``peers_bytes``, ``peers_grid`` and ``peers_video``. The settings span the qualities
that people use; BD-rates of codecs as far apart as JPEG and VTM depend on that span, so it is part of a peer.
``codec eval --peers module:Class`` takes a peer of one's own. """

from __future__ import annotations

import importlib
import io
import struct
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..container.errors import UsageError
from .subject import Subject


class Peer(Subject):
    """A codec that we measure against. A missing library is a UsageError when the peer is made."""

    name: str
    about: str  # library and options

    def __init__(self) -> None:
        self.describe = self.identity = f"{self.about} ({self.library()})"

    @abstractmethod
    def library(self) -> str:
        """Name and version of the library: part of the identity. UsageError where it is missing."""


def missing(peer: str, package: str) -> UsageError:
    """The line about a package that is not installed."""
    return UsageError(f"peer {peer}: needs the package {package}: pip install {package}")


class _Pillow(Peer):
    """A format that Pillow writes. ``feature`` is Pillow's name of the library behind it."""

    format: ClassVar[str]
    feature: ClassVar[str]
    options: ClassVar[dict[str, Any]]

    def library(self) -> str:
        from PIL import features

        if not features.check(self.feature):
            raise UsageError(f"peer {self.name}: this Pillow was built without {self.feature}")
        return f"{self.feature} {features.version(self.feature)}"

    def encode(self, sample: np.ndarray, setting: float) -> bytes:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(sample).save(buffer, self.format, quality=int(setting), **self.options)
        return buffer.getvalue()

    def decode(self, data: bytes) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))


class Jpeg(_Pillow):
    name, about = "jpeg", "libjpeg-turbo, 4:2:0, optimised Huffman tables"
    format, feature = "JPEG", "libjpeg_turbo"
    settings = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98)
    options = {"subsampling": "4:2:0", "optimize": True}


class Jpeg444(Jpeg):
    name, about = "jpeg-444", "libjpeg-turbo, 4:4:4, optimised Huffman tables"
    options = {"subsampling": "4:4:4", "optimize": True}


class WebP(_Pillow):
    name, about = "webp", "libwebp, method 6"
    format, feature = "WEBP", "webp"
    settings = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)
    options = {"method": 6}


class Avif(_Pillow):
    name, about = "avif", "libavif, speed 4, 4:4:4"
    format, feature = "AVIF", "avif"
    settings = (10, 20, 30, 40, 50, 60, 70, 80, 90)
    options = {"speed": 4, "subsampling": "4:4:4", "max_threads": 1}


class Imagecodecs(Peer):
    """A codec of the package imagecodecs. ``key`` starts its entry in the list of library versions."""

    key: ClassVar[str]

    def library(self) -> str:
        try:
            import imagecodecs
        except ImportError:
            raise missing(self.name, "imagecodecs") from None
        found = next((v for v in imagecodecs.version().split(", ") if v.startswith(self.key + "-")), f"{self.key}-n/a")
        if found.endswith("n/a"):
            raise UsageError(f"peer {self.name}: this imagecodecs was built without {self.key}")
        self.package = imagecodecs
        return found.replace("-", " ", 1)


class Jxl(Imagecodecs):
    name, about, key = "jxl", "libjxl, VarDCT, effort 7; the setting is the distance, negated", "libjxl"
    settings = (-15, -12, -10, -8, -6, -5, -4, -3, -2, -1.5, -1, -0.8, -0.5, -0.3)

    def encode(self, sample: np.ndarray, setting: float) -> bytes:
        return self.package.jpegxl_encode(sample, distance=-setting, effort=7, lossless=False, numthreads=1)

    def decode(self, data: bytes) -> np.ndarray:
        return self.package.jpegxl_decode(data)[..., :3]


class Jpeg2000(Imagecodecs):
    name, about, key = "jpeg2000", "OpenJPEG, 9-7 wavelet; the setting is the PSNR asked for", "openjpeg"
    settings = (26, 28, 30, 32, 34, 36, 38, 40, 42)

    def encode(self, sample: np.ndarray, setting: float) -> bytes:
        return self.package.jpeg2k_encode(sample, level=setting, codecformat="jp2", reversible=False, numthreads=1)

    def decode(self, data: bytes) -> np.ndarray:
        return self.package.jpeg2k_decode(data)


class _CompressAI(Peer):
    """A model of CompressAI's zoo trained for MSE; the settings are those qualities whose checkpoints are here.

    They are looked for where CompressAI would put them: ``hub/checkpoints`` below ``$TORCH_HOME`` (~/.cache/torch).
    Nothing is downloaded. """

    architecture: ClassVar[str]

    def __init__(self) -> None:
        self.models: dict[int, Any] = {}
        super().__init__()

    def library(self) -> str:
        try:
            import compressai
            import torch
            from compressai.zoo import image
        except ImportError:
            raise missing(self.name, "compressai") from None
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        names = {q: url.rpartition("/")[2] for q, url in image.model_urls[self.architecture]["mse"].items()}
        self.settings = tuple(sorted(q for q, name in names.items() if (folder / name).is_file()))
        if not self.settings:
            raise UsageError(
                f"peer {self.name}: no checkpoints here; put {names[1]} and those of the other qualities into {folder}"
            )
        self.make = image.__dict__[self.architecture.replace("-", "_")]
        return f"compressai {compressai.__version__}"

    def _model(self, quality: int) -> Any:
        if quality not in self.models:
            self.models[quality] = self.make(quality, "mse", pretrained=True, progress=False).eval()
        return self.models[quality]

    def encode(self, sample: np.ndarray, setting: float) -> bytes:
        import torch

        h, w, _ = sample.shape
        x = np.pad(sample, ((0, -h % 64), (0, -w % 64), (0, 0)), "edge").transpose(2, 0, 1)[None]
        with torch.inference_mode():
            out = self._model(int(setting)).compress(torch.from_numpy(x.astype(np.float32) / 255))
        parts = b"".join(len(s[0]).to_bytes(4, "little") + s[0] for s in out["strings"])
        return struct.pack("<BHHHH", int(setting), h, w, *out["shape"]) + parts

    def decode(self, data: bytes) -> np.ndarray:
        import torch

        quality, h, w, *shape = struct.unpack_from("<BHHHH", data)
        strings, at = [], 9
        while at < len(data):
            end = at + 4 + int.from_bytes(data[at : at + 4], "little")
            strings.append([data[at + 4 : end]])
            at = end
        with torch.inference_mode():
            x = self._model(quality).decompress(strings, shape)["x_hat"][0, :, :h, :w]
        return np.rint(x.clamp(0, 1).permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def _zoo(architecture: str) -> type[_CompressAI]:
    fields = {"name": f"compressai-{architecture}", "about": f"{architecture} of CompressAI's zoo, MSE",
              "architecture": architecture}  # fmt: skip
    return type(architecture, (_CompressAI,), fields)


ZOO = tuple(map(_zoo, ("bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean", "mbt2018", "cheng2020-anchor",
                       "cheng2020-attn")))  # fmt: skip
PEERS = (Jpeg, Jpeg444, WebP, Avif, Jxl, Jpeg2000, *ZOO)
MODULES = {"image": ".peers", "video": ".peers_video", "grid": ".peers_grid", "bytes": ".peers_bytes"}


def known(kind: str) -> dict[str, type[Peer]]:
    """The peers for a kind of data: image, video, grid, bytes."""
    return {p.name: p for p in importlib.import_module(MODULES[kind], __package__).PEERS}


def is_peer(name: str) -> bool:
    """Whether a name is a peer's (of any kind, or ``module:Class``) and not a model's."""
    return "." in name.partition(":")[0] or any(name in known(kind) for kind in MODULES)


def peer(name: str, kind: str = "image") -> Peer:
    """A peer by name, or ``module:Class`` of somebody else's. UsageError for an unknown or unavailable one."""
    here = known(kind)
    if name in here:
        return here[name]()
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"peer {name}: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Peer)):
        raise UsageError(f"there is no peer {name!r} for {kind}; known are {', '.join(here)}, and module:Class of a Peer")
    if found.kind != kind:
        raise UsageError(f"peer {name} is for {found.kind}, but this is {kind}")
    return found()
