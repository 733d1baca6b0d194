"""Nacrith (arXiv 2602.19626) and its heirs: lossless coding of any bytes by mixing predictions.

    preset          predicts by                                              decodes
    light, test     bundled language model + context mixing, integers only   everywhere
    cm              context mixing alone                                     everywhere, without weights
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .bytefile import BytesCodec


@dataclass(frozen=True)
class Config:
    """``backend``: where the language model comes from: "" (none), bundled."""

    backend: str = ""


class Nacrith(BytesCodec):
    """The lossless codec. Text goes to the language model where there is one, everything else to context mixing."""

    name = "nacrith"
    presets: ClassVar[dict[str, Any]] = {"cm": Config(), "light": Config("bundled"), "test": Config("bundled")}
