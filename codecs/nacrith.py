"""Nacrith (arXiv 2602.19626) and its heirs: lossless coding of any bytes by mixing predictions.

    preset          predicts by                                              decodes
    light, test     bundled language model + context mixing, integers only   everywhere
    cm              context mixing alone                                     everywhere, without weights
    published       the mixture of the paper over the bundled model          everywhere
    llama           the same over a GGUF file in llama.cpp                   on the same machine and software only
    transformers    the same over a model of the transformers library        on the same machine and software only

The paper, from the file to its bits:

    file -> blocks, cut at line ends, coded in parallel (Published.pieces) -> text and binary runs (entropy/bytes/hybrid.py)
    binary -> context mixing (entropy/bytes/blocks.py)
    text -> tokens, held against the bytes -> n-gram sure? else language model (entropy/bytes/backends.py), bias head
         -> linear mixture -> counts of sum 2**24 -> 32-bit arithmetic coder (all in entropy/bytes/published.py)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

from ..container.errors import CorruptStream, ModelMissing, UsageError
from .bytefile import BytesCodec

if TYPE_CHECKING:
    from ..container.format import Head, Stream
    from ..entropy.bytes.backends import Backend
    from ..entropy.bytes.published import Settings


@dataclass(frozen=True)
class Config:
    """``backend``: where the language model comes from: "" (none), bundled, llama, transformers. ``published``: whether the
    mixture is that of the paper rather than ours."""

    backend: str = ""
    published: bool = False


class Nacrith(BytesCodec):
    """The lossless codec. Text goes to the language model where there is one, everything else to context mixing."""

    name = "nacrith"
    presets: ClassVar[dict[str, Any]] = {
        "cm": Config(), "light": Config("bundled"), "test": Config("bundled"), "published": Config("bundled", True),
        "llama": Config("llama", True), "transformers": Config("transformers", True),
    }  # fmt: skip

    @classmethod
    def from_preset(cls, preset: str, **options: Any) -> BytesCodec:
        """A codec ready to code; ``options`` of a published preset are those of ``open_published``."""
        if cls.presets[preset].published:
            return open_published(preset, **options)
        if options.get("weights"):
            raise UsageError(f"nacrith:{preset} brings its own weights; --weights is for nacrith:llama and :transformers")
        codec = super().from_preset(preset)
        if cls.presets[preset].backend:
            from ..entropy.bytes.language import Model
            from ..entropy.bytes.text import TextCoder
            from .registry import weights_path

            model = Model.load(weights_path(cls.name, preset))
            codec.coder, codec.model_id = TextCoder(model), model.model_id
        return codec

    @classmethod
    def for_stream(cls, stream: Stream | Head, weights: str | None = None, device: str = "cpu") -> BytesCodec | None:
        """The codec of a stream whose header it must know; None where the preset says it all."""
        if stream.preset in cls.presets and cls.presets[stream.preset].published:
            return published_for(stream, weights, device)
        return None


BLOCK = 1 << 20
"""Bytes in a block of the published mixture. Every block begins with nothing learnt; several are coded in parallel."""


class Published(Nacrith):
    """Nacrith as published (see ``entropy/bytes/published.py``), over any backend.

    What the original leaves open is mended: all settings stand in the header, no byte is lost to a tokenizer, blocks have
    checksums, and files of a backend that is not portable carry its fingerprint, are verified as they are made, and are
    refused elsewhere.
    """

    def __init__(self, backend: Backend, preset: str, settings: Settings | None = None, *, weights: str = "",
                 block: int = BLOCK, verify: bool | None = None):  # fmt: skip
        """``weights``: name to remember. ``block``: bytes that are coded together. ``verify``: see TokenMixture."""
        from ..entropy.bytes import backends, published
        from ..entropy.bytes.hybrid import TokenMixture

        super().__init__(self.presets[preset], preset)
        self.backend, self.weights, self.block = backend, weights, block
        self.settings = settings or published.Settings()
        self.coder = TokenMixture(backend, self.settings, verify)
        self.model_id = backends.model_id(backend.fingerprint)

    @property
    def portable(self) -> bool:
        return self.backend.portable

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {"settings": self.settings.to_header()}
        if not self.portable:
            header |= {"backend": self.backend.fingerprint, "weights": self.weights}
        return header

    def pieces(self, source: BinaryIO) -> Iterator[bytes]:
        """Blocks of at most ``block`` bytes that end at a line end where there is one."""
        from ..entropy.bytes.hybrid import cut

        waiting = bytearray()
        while True:
            while len(waiting) <= self.block and (part := source.read(self.block + 1 - len(waiting))):
                waiting += part
            if not waiting:
                return
            at = cut(bytes(waiting), self.block)
            yield bytes(waiting[:at])
            del waiting[:at]

    def watch(self, progress: Callable[[int, int], None], total: int, decoding: bool = False) -> bool:
        """Tell ``progress`` within blocks, which may take hours. Verification is the second half of encoding."""
        passes = 2 if self.coder.verify and not decoding else 1
        done = 0
        lock = threading.Lock()

        def report(more: int) -> None:
            nonlocal done
            with lock:
                done += more
                progress(min(done // passes, total), total)

        self.coder.report = report
        return True

    def notes(self) -> list[str]:
        """What a user should hear of a file just made."""
        notes = []
        if not self.portable:
            notes.append(f"not portable: only the same model, library and machine decode it ({NOT_PORTABLE})")
        if self.coder.failures:
            notes.append(f"{self.coder.failures} blocks did not come back the same and were coded without the language model")
        return notes


NOT_PORTABLE = "floating-point predictions; nacrith:light is portable"


def open_published(
    preset: str, weights: str | None = None, settings: Settings | None = None, *, threads: int | None = None,
    device: str = "cpu", block: int = BLOCK, verify: bool | None = None,
) -> Published:  # fmt: skip
    """The codec ``nacrith:published``, ``nacrith:llama`` or ``nacrith:transformers``, ready to code.

    ``weights``: a GGUF file, or a folder or hub name of a transformers model. ModelMissing, UsageError.
    """
    from ..entropy.bytes import backends

    kind = Nacrith.presets[preset].backend
    backend: Backend
    if kind == "bundled":
        backend = bundled_backend()
    elif not weights:
        what = "a GGUF file" if kind == "llama" else "a folder or a hub name of a causal language model"
        raise UsageError(f"nacrith:{preset} needs --weights: {what}")
    else:
        backend = backends.open_backend(kind, weights, threads=threads or min(os.cpu_count() or 1, 8), device=device)
    name = Path(weights).name if weights and os.path.exists(weights) else weights or ""
    return Published(backend, preset, settings, weights=name, block=block, verify=verify)


def bundled_backend() -> Backend:
    """The portable language model that comes with the package. ModelMissing when it does not."""
    from ..entropy.bytes.backends import Bundled
    from ..entropy.bytes.language import Model
    from .registry import weights_path

    return Bundled(Model.load(weights_path("nacrith", "light")))


def published_for(stream: Stream | Head, weights: str | None = None, device: str = "cpu") -> Published:
    """The codec that made a stream of a ``published`` preset.

    Without ``weights`` those of the stream's name are looked for in the folders of weights; nothing is fetched from a network
    because a file says so. ModelMissing, ModelMismatch, CorruptStream.
    """
    from ..entropy.bytes import backends
    from ..entropy.bytes.published import Settings
    from .registry import weight_folders

    header = stream.header
    settings = Settings.from_header(header.get("settings"))
    wanted, name = header.get("backend"), header.get("weights")
    if Nacrith.presets[stream.preset].backend == "bundled":
        return open_published(stream.preset, settings=settings)
    if not isinstance(wanted, dict) or not isinstance(name, str) or type(wanted.get("threads")) is not int:
        raise CorruptStream("header: the language model of the stream is not named")
    if weights is None:
        own = Path(name).name
        found = [folder / own for folder in weight_folders() if own and (folder / own).exists()]
        if not found:
            raise ModelMissing(
                f"the stream needs the language model {name[:80]!r} ({str(wanted.get('weights'))[:16]}); "
                "name it with --weights, or put it into a folder named by NEURALCODEC_WEIGHTS"
            )
        weights = str(found[0])
    threads = wanted["threads"]
    if not 1 <= threads <= 1024:
        raise CorruptStream("header: a number of threads that makes no sense")
    codec = open_published(stream.preset, weights, settings, threads=threads, device=device)
    backends.check_fingerprint(codec.backend, wanted)
    return codec
