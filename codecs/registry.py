"""Which codecs exist, where their classes live, and which weights are at hand. Importing this module is cheap."""

from __future__ import annotations

import importlib
import json
import os
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..container.errors import ModelMismatch, ModelMissing, UnknownCodec

if TYPE_CHECKING:
    from ..container import Stream
    from .base import Codec

ENTRY_POINTS = "neuralcodec.codecs"
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
_classes: dict[str, str] = {}
# by measurement on Kodak, see README: what codes when nobody asks, and the ends of the choice
_defaults = {
    "image": "mlicv2:light", "image-fast": "hyperprior:light", "image-best": "mlicv2:base",
    "bytes": "nacrith:light",
}  # fmt: skip
_loaded: dict[tuple[str, str], Codec] = {}


def register(name: str, path: str) -> None:
    """Make a codec known by ``module:Class``. ValueError if the name is taken by another class."""
    if _classes.setdefault(name, path) != path:
        raise ValueError(f"codec {name!r} is already registered as {_classes[name]}")


register("hyperprior", f"{__package__}.hyperprior:Hyperprior")
register("mlicv2", f"{__package__}.mlicv2:MLICv2")
register("s2lic", f"{__package__}.s2lic:S2LIC")
register("feds", f"{__package__}.feds:FEDS")
register("hcfssnet", f"{__package__}.hcfssnet:HCFSSNet")
register("vaeformer", f"{__package__}.vaeformer:VAEformer")
register("nacrith", f"{__package__}.nacrith:Nacrith")
register("raw", f"{__package__}.bytefile:Raw")


def _third_party() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        if point.name not in _classes:
            register(point.name, point.value)


def names() -> list[str]:
    """All codecs, ours and those of installed packages."""
    _third_party()
    return sorted(_classes)


def codec_class(name: str) -> type[Codec]:
    """The class of a codec, imported now. UnknownCodec when there is none of that name."""
    if name not in _classes:
        _third_party()
    if name not in _classes:
        raise UnknownCodec(f"codec {name[:40]!r} is unknown here; known are {', '.join(names())}")
    module, _, attribute = _classes[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def weight_folders() -> list[Path]:
    """Where weights are looked for: $NEURALCODEC_WEIGHTS (like PATH) first, then the bundled ones."""
    extra = os.environ.get("NEURALCODEC_WEIGHTS", "")
    return [Path(p) for p in extra.split(os.pathsep) if p] + [WEIGHTS]


def _stem(codec: str, preset: str) -> str:
    return f"{codec}-{preset}"


def weights_path(codec: str, preset: str) -> Path:
    """The weights file of a model. ModelMissing when no folder holds it."""
    for folder in weight_folders():
        if (path := folder / f"{_stem(codec, preset)}.safetensors").is_file():
            return path
    raise ModelMissing(f"no weights of {codec}:{preset} here; `codec models` lists those at hand")


def describe() -> list[dict[str, Any]]:
    """The cards of all weights at hand (see ``train/freeze.py`` for the keys), without importing torch."""
    cards = {}
    for folder in reversed(weight_folders()):
        for path in sorted(folder.glob("*.json")):
            cards[path.stem] = json.loads(path.read_text()) | {"file": str(path.with_suffix(".safetensors"))}
    return [cards[stem] for stem in sorted(cards)]


def default(kind: str) -> str:
    """``codec:preset`` that codes this kind of data when nobody asks for another."""
    return _defaults[kind]


def split(model: str) -> tuple[str, str]:
    """``codec:preset`` -> (codec, preset); the preset is ``light`` where none is named."""
    codec, _, preset = model.partition(":")
    return codec, preset or "light"


def load(codec: str, preset: str = "light", device: str = "cpu", **options: Any) -> Codec:
    """A frozen codec ready to code. UnknownCodec, ModelMissing, ModelMismatch. ``options`` are for codecs that take some."""
    cls = codec_class(codec)
    if preset not in cls.presets:
        raise ModelMissing(f"{codec} has no preset {preset[:40]!r}; it has {', '.join(cls.presets)}")
    if cls.kind == "bytes":  # these find their weights themselves, without torch
        if options:
            return cls.from_preset(preset, **options)
        if (key := (codec, preset)) not in _loaded:
            _loaded[key] = cls.from_preset(preset)
        return _loaded[key]
    if (key := (codec, preset)) not in _loaded:
        from .weights import load_weights  # torch

        model = cls.from_preset(preset)
        load_weights(model, weights_path(codec, preset))
        _loaded[key] = model
    return _loaded[key].to(device)


def load_for(stream: Stream, device: str = "cpu", weights: str | None = None) -> Codec:
    """The codec that made ``stream``. ModelMismatch when the weights here are others.

    ``weights``: file or folder of a language model, for the presets that take one from outside.
    """
    codec = None
    if (for_stream := getattr(codec_class(stream.codec), "for_stream", None)) is not None:
        codec = for_stream(stream, weights, device)
    codec = codec or load(stream.codec, stream.preset, device)
    if codec.model_id != stream.model_id:
        raise ModelMismatch(
            f"the stream needs the weights {stream.model_id.hex()} of {stream.codec}:{stream.preset}, "
            f"here are {codec.model_id.hex()}; put its weights into a folder named by NEURALCODEC_WEIGHTS"
        )
    return codec
