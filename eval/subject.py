"""What is measured: our codecs and peers behind one contract, so that every table can hold both."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


class Subject(ABC):
    """A codec of pictures with a list of quality settings.

    ``identity`` changes whenever the bytes may change: finished points of another identity are not used again.
    ``stages`` holds the seconds of the parts of the last call, where the subject can tell them. """

    name: str
    describe: str
    identity: str
    settings: tuple[float, ...]
    ours = False

    @abstractmethod
    def encode(self, rgb: np.ndarray, setting: float) -> bytes:
        """(H, W, 3) uint8 -> a file's bytes."""

    @abstractmethod
    def decode(self, data: bytes) -> np.ndarray:
        """A file's bytes -> (H, W, 3) uint8."""

    def complexity(self) -> dict[str, Any]:
        """``parameters`` and ``kmac_per_pixel`` (a value for each part), where they are known."""
        return {}

    def ideal_bits(self, rgb: np.ndarray, setting: float) -> float | None:
        """Bits that the entropy model charges for a picture: the estimate beside the bytes of the file."""
        return None

    @property
    def stages(self) -> dict[str, float]:
        return {}


class _Timed:
    """A codec whose coding methods add their seconds to ``seconds`` by stage; everything else is the codec's own."""

    STAGES = {
        "analyse": "transform", "synthesise": "transform", "encode_latent": "entropy", "decode_latent": "entropy",
    }  # fmt: skip

    def __init__(self, codec: Any):
        self.codec = codec
        self.seconds: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.codec, name)
        return self.timed(value, self.STAGES[name]) if name in self.STAGES else value

    def timed(self, call: Callable, stage: str) -> Callable:
        def run(*args: Any, **kw: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kw)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

        return run


class Ours(Subject):
    """One of our models, ``codec:preset``; settings are qualities 0..100."""

    ours = True

    def __init__(self, model: str, qualities: Iterable[float]):
        from ..codecs import registry

        self.codec = registry.load(*registry.split(model))
        self.name, self.settings = f"{self.codec.name}:{self.codec.preset}", tuple(qualities)
        self.describe, self.identity = f"model {self.codec.model_id.hex()}", self.codec.model_id.hex()
        self._clock = _Timed(self.codec)

    def encode(self, rgb: np.ndarray, setting: float) -> bytes:
        from ..codecs.base import level_of
        from ..codecs.image import encode_picture
        from ..container.format import dumps
        from ..media.image import Picture

        self._clock.seconds.clear()
        stream = encode_picture(self._clock, Picture(rgb), level_of(setting))
        return self._clock.timed(dumps, "container")(stream)

    def decode(self, data: bytes) -> np.ndarray:
        from ..codecs.image import decode_picture
        from ..container.format import loads

        self._clock.seconds.clear()
        return decode_picture(self._clock, self._clock.timed(loads, "container")(data)).pixels

    @property
    def stages(self) -> dict[str, float]:
        return dict(self._clock.seconds)

    def complexity(self) -> dict[str, Any]:
        from ..codecs.base import count_parameters

        found = {"parameters": count_parameters(self.codec)}
        try:
            found["kmac_per_pixel"] = self.codec.kmac_per_pixel()
        except (NotImplementedError, RuntimeError, TypeError):  # a frozen model may have lost what training needs
            pass
        return found

    def ideal_bits(self, rgb: np.ndarray, setting: float) -> float | None:
        import torch

        from ..codecs.base import level_of

        estimate = getattr(self.codec, "estimate_bits", None)
        if estimate is None:
            return None
        m, level = self.codec.tile_multiple, level_of(setting)
        pixels = np.pad(rgb, ((0, -rgb.shape[0] % m), (0, -rgb.shape[1] % m), (0, 0)), "edge")
        with torch.inference_mode():
            x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
            return float(estimate(self.codec.analyse(x.contiguous(memory_format=torch.channels_last), level), level))
