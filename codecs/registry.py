"""Which codecs exist, where their classes live, and which bundled weights fit a stream."""

from __future__ import annotations

import importlib

_MODULES = {"hyperprior": ("hyperprior", "Hyperprior")}


def codec_class(name: str):
    """The class of a codec, imported now."""
    module, attribute = _MODULES[name]
    return getattr(importlib.import_module(f".{module}", __package__), attribute)
