"""What is measured: our codecs and peers behind one contract, so that every table can hold both."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..container.errors import UsageError

DEVICE = "NEURALCODEC_EVAL_DEVICE"
"""Environment variable: where our models of pictures run, cpu by default. Processes that measure get it with the rest."""


class Subject(ABC):
    """A codec with a list of quality settings, from bad to good.

    ``kind`` says what a sample is: image: (H, W, 3) uint8; video: (T, H, W, 3) uint8; grid: (N, H, W) float32; bytes.
    ``identity`` changes whenever the bytes may change: finished points of another identity are not used again.
    ``stages`` holds the seconds of the parts of the last call, where the subject can tell them. """

    name: str
    describe: str
    identity: str
    settings: tuple[float, ...]
    kind = "image"
    ours = False
    estimates = False  # whether ``ideal_bits`` knows
    whole = False  # whether ``encode`` takes the sample itself (a Field), not only its values

    @abstractmethod
    def encode(self, sample: Any, setting: float) -> bytes:
        """A sample -> a file's bytes."""

    @abstractmethod
    def decode(self, data: bytes) -> Any:
        """A file's bytes -> a sample of the same shape and type."""

    def warm_up(self, sample: Any, setting: float) -> None:
        """Code a sample once, so that what is timed later finds everything loaded."""
        self.decode(self.encode(sample, setting))

    def complexity(self) -> dict[str, Any]:
        """``parameters`` and ``kmac_per_pixel`` (a value for each part), where they are known."""
        return {}

    def ideal_bits(self, sample: Any, setting: float) -> float | None:
        """Bits that the entropy model charges for a sample: the estimate beside the bytes of the file."""
        return None

    def bound(self, sample: Any, setting: float) -> float | None:
        """Largest error that the subject promises at a setting, where it promises one."""
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


class _Estimated:
    """A codec that adds up what its tables charge, in ``bits``, in place of coding."""

    def __init__(self, codec: Any):
        self.codec = codec
        self.bits = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.codec, name)

    def encode_latent(self, y: Any, level: int) -> tuple[bytes, Any]:
        self.bits += self.codec.estimate_bits(y, level)
        return b"", y


def parted(model: str) -> tuple[str, str]:
    """``codec:preset+N`` -> (``codec:preset``, ``+N``); the second is empty for a model without a search."""
    plain, plus, iterations = model.partition("+")
    return plain, plus + iterations


class Ours(Subject):
    """One of our models, ``codec:preset``; settings are qualities 0..100.

    ``codec:preset+N`` encodes with a search of N iterations (``codecs.anneal``). """

    ours = True

    def __init__(self, model: str, qualities: Sequence[float]):
        from ..codecs import registry

        bad = [q for q in qualities if not 0 <= q <= 100]
        if bad or not qualities:
            raise UsageError(f"quality {bad[0]:g} is outside of 0..100" if bad else "no qualities to measure at")
        plain, search = parted(model)
        iterations = search.removeprefix("+")
        if search and not (iterations.isdecimal() and int(iterations)):
            raise UsageError(f"{model}: what follows the + is a number of iterations, {plain}+80")
        self.codec = registry.load(*registry.split(plain), device=os.environ.get(DEVICE, "cpu"))
        if self.codec.kind != "image":
            raise UsageError(f"{model} codes {self.codec.kind}; only models of pictures are measured here")
        self.model, self.settings = f"{self.codec.name}:{self.codec.preset}", tuple(sorted(set(qualities)))
        self.name = self.model + search
        self.describe, self.identity = f"model {self.codec.model_id.hex()}", self.codec.model_id.hex()
        self._clock, self._search = _Timed(self.codec), None
        self.estimates = not search
        if search:
            from ..codecs.anneal import REVISION, Annealer

            self._search = Annealer(int(iterations))
            self.describe += f", a search of {iterations} iterations"
            self.identity += f"{search}.{REVISION}"

    def encode(self, sample: np.ndarray, setting: float) -> bytes:
        from ..codecs.base import level_of
        from ..codecs.image import encode_picture
        from ..container.format import dumps
        from ..media.image import Picture

        self._clock.seconds.clear()
        if self._search:  # it uses the codec's parts, which the clock does not see
            search = self._clock.timed(encode_picture, "search")
            stream = search(self.codec, Picture(sample), level_of(setting), tile_encoder=self._search)
        else:
            stream = encode_picture(self._clock, Picture(sample), level_of(setting))
        return self._clock.timed(dumps, "container")(stream)

    def warm_up(self, sample: np.ndarray, setting: float) -> None:
        search, self._search = self._search, None  # minutes of search would warm nothing else
        try:
            super().warm_up(sample, setting)
        finally:
            self._search = search

    def decode(self, data: bytes) -> np.ndarray:
        from ..codecs.image import decode_picture
        from ..container.format import loads

        self._clock.seconds.clear()
        return decode_picture(self._clock, self._clock.timed(loads, "container")(data)).pixels

    @property
    def stages(self) -> dict[str, float]:
        return dict(self._clock.seconds)

    def complexity(self) -> dict[str, Any]:
        from ..codecs import registry
        from ..codecs.base import count_parameters

        found = {"parameters": count_parameters(self.codec)}
        # counted when the model was frozen, which takes away the float layers that a count runs through
        card = next((c for c in registry.describe() if self.model == f"{c['codec']}:{c['preset']}"), {})
        return found | {k: card[k] for k in ("parameters", "kmac_per_pixel") if k in card}

    def ideal_bits(self, sample: np.ndarray, setting: float) -> float | None:
        if not self.estimates:
            return None
        from ..codecs.base import level_of
        from ..codecs.image import encode_picture
        from ..media.image import Picture

        estimated = _Estimated(self.codec)
        encode_picture(estimated, Picture(sample), level_of(setting))  # the tiles of ``encode``
        return estimated.bits


class OursBytes(Subject):
    """Our lossless codec, ``nacrith:preset``; settings are efforts 1..9."""

    ours, kind, settings = True, "bytes", (1, 5, 9)

    def __init__(self, model: str):
        from .. import __version__
        from ..codecs import registry

        self.codec: Any = registry.load(*registry.split(model))
        if self.codec.kind != self.kind:
            raise UsageError(f"{model} codes {self.codec.kind}, not bytes")
        self.name = f"{self.codec.name}:{self.codec.preset}"
        self.describe = f"model {self.codec.model_id.hex() or 'none'}; the setting is the effort"
        self.identity = f"{self.codec.model_id.hex()} {__version__}"

    def encode(self, sample: bytes, setting: float) -> bytes:
        from ..codecs.bytefile import encode_bytes

        return encode_bytes(self.codec, sample, int(setting))

    def decode(self, data: bytes) -> bytes:
        from ..codecs.bytefile import decode_bytes

        return decode_bytes(data)
