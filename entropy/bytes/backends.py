"""Language models for ``published``: what gives logits for the next token. llama.cpp, transformers, and our own portable one.

A backend knows its tokens' bytes (``pieces``), cuts text into tokens, and opens sessions. A session holds one context and is
fed the same tokens in the same portions by encoder and decoder (``Settings.batch``, and what was skipped in between), because
floating-point logits depend on the portions. So:

* guaranteed: the same library build, weights, device and settings on the same machine give the same logits; the encoder
  decodes every block again before it is kept, and the decoder checks the bytes;
* not guaranteed: anything else. The fingerprint of all of it stands in the stream, together with a hash of the logits of a
  fixed text, and a decoder with another fingerprint refuses. Only backends with ``portable`` decode everywhere.

Libraries are imported when a backend is opened.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import inspect
import json
import os
import platform
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numba import njit

from ...container.errors import CodecError, CorruptStream, ModelMismatch, ModelMissing, UsageError
from .language import Model, Predictor
from .mixing import coder_finish, coder_start
from .published import Settings, log2_of
from .text import _code_breaks as code_breaks
from .transform import WIDEST, best_margin, flag_capitals, join_lines, restore_capitals

_LOG2E = 1.4426950408889634
_CRLF, _CAPITALS = 1, 2
_PROBE = (7, 3, 11, 2, 19, 5, 23, 13, 1, 17, 29, 4, 31, 6, 37, 8)
PROBE_SETTINGS = {"context": 32, "keep": 8, "sink": 1, "batch": 8}


@njit(cache=True, nogil=True)
def _on_grid(logits, scale, out):
    """Logits times ``scale``, rounded, as int32 within +-2**30. False when one is not a number."""
    limit = 1 << 30
    for i in range(len(logits)):
        x = np.float64(logits[i]) * scale
        if x != x:
            return False
        out[i] = np.int32(np.floor(min(max(x, -limit), limit) + 0.5))
    return True


class Session:
    """One context of a model: tokens in, logits of the next token out. Several of a backend may run in threads side by side."""

    def __init__(self, settings: Settings, begin: int, vocabulary: int):
        self.settings = settings
        self.tokens: list[int] = []
        self._out = np.zeros(vocabulary, np.int32)
        self._begin = begin

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Append ``tokens`` (none the first time: a start token is there before them); log2 logits int32 Q16 (vocabulary,)."""
        s = self.settings
        if not self.tokens:
            tokens = [self._begin, *tokens]
        elif not tokens:  # an escape came, of which the model knows nothing
            return self._out
        raw = np.empty(0, np.float32)
        for at in range(0, len(tokens), s.batch):
            portion = list(tokens[at : at + s.batch])
            if len(self.tokens) + len(portion) > s.context:
                self._slide()
            self.tokens += portion
            raw = self._evaluate(portion, len(self.tokens) - len(portion))
        return self._on_grid(raw)

    def _on_grid(self, raw: np.ndarray) -> np.ndarray:
        """Natural logits of floats -> log2 logits on the grid, with the temperature."""
        scale = _LOG2E * 65536 * 10_000 / self.settings.temperature
        if not _on_grid(raw, scale, self._out):
            raise CodecError("the language model gives logits that are not numbers; are its weights whole?")
        return self._out

    def _slide(self) -> None:
        """Keep the first ``sink`` and the last ``keep`` tokens."""
        s = self.settings
        dropped = len(self.tokens) - s.sink - s.keep
        self.tokens = self.tokens[: s.sink] + self.tokens[-s.keep :]
        self._drop(s.sink, dropped)

    def _drop(self, first: int, count: int) -> None:
        """Take ``count`` positions from ``first`` on out of the context: as it is here, the context is read again."""
        self._clear()
        for at in range(0, len(self.tokens), self.settings.batch):
            self._evaluate(self.tokens[at : at + self.settings.batch], at)

    def _clear(self) -> None:
        """Empty the context."""
        raise NotImplementedError

    def _evaluate(self, tokens: list[int], at: int) -> np.ndarray:
        """Append tokens at position ``at``; float32 logits (vocabulary,) behind the last."""
        raise NotImplementedError


class Backend:
    """A language model with its vocabulary."""

    kind: ClassVar[str]
    portable: ClassVar[bool] = False
    pieces: list[bytes | None]
    """The bytes of each token; None for one that stands for no bytes (control tokens, unused ids)."""
    fingerprint: dict[str, str | int]
    """What must be the same at the decoder, short, as it stands in the stream: library and version, hash of its build, of
    the weights, device, kernel settings, and the hash of the probe."""

    def tokenize(self, text: str) -> Sequence[int]:
        """Ids of a text, without special tokens. Need not be exact: ``hybrid`` mends it."""
        raise NotImplementedError

    def session(self, settings: Settings) -> Session:
        """An empty context."""
        raise NotImplementedError

    def prepare(self, data: bytes) -> tuple[bytes, bytes]:
        """A text -> (what ``restore`` must know, the text in the form that the model has learnt)."""
        return b"", data

    def restore(self, known: bytes, plain: bytes) -> bytes:
        """Inverse of ``prepare``. CorruptStream for what it cannot have made."""
        return plain

    def _probe(self) -> str:
        """Hash of the logits on a fixed course of tokens: alone, in a batch, and behind a slide of the window."""
        session = self.session(Settings(**PROBE_SETTINGS))
        sha = hashlib.sha256()
        n = len(self.pieces)
        for tokens in ([], [_PROBE[0] % n], [_PROBE[1] % n], [t % n for t in _PROBE], [_PROBE[2] % n], [t % n for t in _PROBE]):
            sha.update(session.logits(tokens).tobytes())
        return sha.hexdigest()[:16]


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def model_id(fingerprint: dict[str, str | int]) -> bytes:
    """8 bytes that stand for a fingerprint."""
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True, separators=(",", ":")).encode()).digest()[:8]


@lru_cache(maxsize=16)
def _sha256_of(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """sha256 of a file, remembered while the file stays as it is."""
    state = os.stat(path)
    return _sha256_of(os.fspath(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name, by which libraries choose their kernels."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{platform.machine()} {line.partition(':')[2].strip()}"
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}".strip()


def _byte_letters() -> dict[str, int]:
    """The letters by which GPT-2's byte-level BPE writes bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(b): b for b in plain}
    others = [b for b in range(256) if b not in plain]
    return letters | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_LETTERS = _byte_letters()


def byte_level_piece(text: str) -> bytes | None:
    """Bytes of a token of a byte-level BPE; None when it is not written in its letters."""
    try:
        return bytes([BYTE_LETTERS[c] for c in text])
    except KeyError:
        return None


def sentencepiece_piece(text: str) -> bytes:
    """Bytes of a SentencePiece token: U+2581 is a space, <0x0A> a byte."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"{name} is not installed ({error}); try `pip install 'neuralcodec[{extra}]'`") from None


# --- llama.cpp --------------------------------------------------------------------------------------------------------


class _LlamaSession(Session):
    """A llama.cpp context. Its key-value cache can drop positions and move the others up."""

    def __init__(self, backend: Llama, settings: Settings):
        super().__init__(settings, backend.begin, len(backend.pieces))
        self._backend = backend
        api = self._api = backend.api
        params = api.llama_context_default_params()
        params.n_ctx = settings.context
        params.n_batch = params.n_ubatch = settings.batch
        params.n_threads = params.n_threads_batch = backend.threads
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        self._context = api.llama_init_from_model(backend.model, params)
        if not self._context:
            raise CodecError("llama.cpp cannot make a context of this model; is there memory enough?")
        self._memory = api.llama_get_memory(self._context)
        self._shifts = bool(api.llama_memory_can_shift(self._memory))

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._memory, True)

    def _drop(self, first: int, count: int) -> None:
        if not (self._shifts and self._api.llama_memory_seq_rm(self._memory, 0, first, first + count)):
            return super()._drop(first, count)  # recurrent models, among others
        self._api.llama_memory_seq_add(self._memory, 0, first + count, -1, -count)

    def _evaluate(self, tokens: list[int], at: int) -> np.ndarray:
        array = (self._api.llama_token * len(tokens))(*tokens)
        batch = self._api.llama_batch_get_one(array, len(tokens))  # positions follow on those in the cache
        if code := self._api.llama_decode(self._context, batch):
            raise CodecError(f"llama.cpp fails to evaluate tokens (code {code})")
        row = self._api.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, (len(self._out),))

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._api.llama_free(self._context)
            self._context = None


class Llama(Backend):
    """A GGUF file in llama.cpp, by the low-level interface of ``llama-cpp-python``, on the CPU or with ``gpu_layers`` layers on
    a GPU. Flash attention is off; thread number and everything else that decides about the logits is in the fingerprint."""

    kind = "llama"

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1, gpu_layers: int = 0):
        """ModelMissing when the file is not there or is no GGUF; UsageError without the library."""
        path = os.fspath(path)
        if not os.path.isfile(path):
            raise ModelMissing(f"{path}: no such file; --weights takes a GGUF file, such as SmolLM2-135M")
        api = self.api = _library("llama_cpp", "llama")
        if not hasattr(api, "llama_get_memory"):
            raise UsageError(f"llama-cpp-python {api.__version__} is too old: `pip install -U 'neuralcodec[llama]'`")
        self.threads = threads
        if not os.environ.get("NLC_DEBUG"):
            self._silence = api.llama_log_callback(lambda level, text, data: None)
            api.llama_log_set(self._silence, ctypes.c_void_p())
        api.llama_backend_init()
        params = api.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        self.model = api.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise ModelMissing(f"{path}: llama.cpp cannot load this file; it must be a whole GGUF")
        self._vocabulary = api.llama_model_get_vocab(self.model)
        self.pieces = self._read_pieces()
        begin = api.llama_vocab_bos(self._vocabulary)
        self.begin = begin if begin >= 0 else max(api.llama_vocab_eos(self._vocabulary), 0)
        self.fingerprint = {
            "library": f"llama-cpp-python {api.__version__}",
            "build": _short(" ".join(api.llama_print_system_info().decode().split())),
            "weights": file_sha256(path)[:16],
            "device": processor() + (f" + GPU ({gpu_layers})" if gpu_layers else ""),
            "threads": threads,
        }
        self.fingerprint["probe"] = self._probe()

    def _read_pieces(self) -> list[bytes | None]:
        api, vocabulary = self.api, self._vocabulary
        byte_level = api.llama_vocab_type(vocabulary) == api.LLAMA_VOCAB_TYPE_BPE
        special = api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_UNKNOWN | api.LLAMA_TOKEN_ATTR_UNUSED
        pieces: list[bytes | None] = []
        for i in range(api.llama_vocab_n_tokens(vocabulary)):
            text = (api.llama_vocab_get_text(vocabulary, i) or b"").decode("utf-8", "replace")
            attributes = api.llama_vocab_get_attr(vocabulary, i)
            if attributes & special:
                pieces.append(None)
            elif attributes & api.LLAMA_TOKEN_ATTR_USER_DEFINED:
                pieces.append(text.encode())
            else:
                pieces.append(byte_level_piece(text) if byte_level else sentencepiece_piece(text))
        return pieces

    def tokenize(self, text: str) -> Sequence[int]:
        data = text.encode()
        room = len(data) + 16
        tokens = (self.api.llama_token * room)()
        n = self.api.llama_tokenize(self._vocabulary, data, len(data), tokens, room, False, False)
        return tokens[: max(n, 0)]

    def session(self, settings: Settings) -> Session:
        return _LlamaSession(self, settings)

    def __del__(self) -> None:  # sessions hold the backend, so none is left
        if getattr(self, "model", None):
            self.api.llama_model_free(self.model)
            self.model = None


# --- transformers -----------------------------------------------------------------------------------------------------


class _TransformersSession(Session):
    """A key-value cache of a transformers model. Its keys are rotated for their positions, so a slide reads the rest again."""

    def __init__(self, backend: Transformers, settings: Settings):
        super().__init__(settings, backend.begin, backend.vocabulary)
        self._backend = backend
        self._cache: Any = None

    def _clear(self) -> None:
        self._cache = None

    def _evaluate(self, tokens: list[int], at: int) -> np.ndarray:
        import torch

        backend = self._backend
        if torch.get_num_threads() != backend.threads:  # a setting of each thread
            torch.set_num_threads(backend.threads)
        with torch.inference_mode():
            out = backend.model(
                input_ids=torch.tensor([tokens], device=backend.device),
                use_cache=True, logits_to_keep=1, **{backend.cache_name: self._cache},
            )  # fmt: skip
        self._cache = out[backend.cache_name]
        return out.logits[0, -1].float().cpu().numpy()


class Transformers(Backend):
    """A causal language model of the transformers library, float32, from a local folder or from the hub by name."""

    kind = "transformers"

    def __init__(self, name: str | os.PathLike[str], *, threads: int = 1, device: str = "cpu"):
        """ModelMissing when there is no such folder and the hub gives no such model; UsageError without the library."""
        name = os.fspath(name)
        library = _library("transformers", "transformers")
        import torch

        self.threads, self.device = threads, device
        library.logging.set_verbosity_error()
        try:
            tokenizer = library.AutoTokenizer.from_pretrained(name)
            model = library.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="eager")
        except (OSError, ValueError) as error:
            kind = "a folder with a model" if os.path.isdir(name) else "a folder, and the hub gives no model of that name"
            first = " ".join(str(error).split())[:160]
            raise ModelMissing(f"{name}: is not {kind} that transformers can load ({first})") from None
        self.model = model.eval().to(device)
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # a fast tokenizer must not be called twice at a time
        arguments = inspect.signature(type(model).forward).parameters
        self.cache_name = "cache" if "cache" in arguments else "past_key_values"  # its name until transformers 5
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self.pieces = self._read_pieces()
        begin = [i for i in (tokenizer.bos_token_id, model.config.bos_token_id, tokenizer.eos_token_id) if type(i) is int]
        self.begin = begin[0] if begin else 0
        kernels = f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()} {torch.backends.mkldnn.is_available()}"
        self.fingerprint = {
            "library": f"transformers {library.__version__}",
            "build": _short(kernels),
            "weights": self._weights_sha256()[:16],
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
            "threads": threads,
        }
        self.fingerprint["probe"] = self._probe()

    def _weights_sha256(self) -> str:
        """sha256 over tokens and tensors as loaded: the same for a folder and for the hub, for one file and for shards."""
        sha = hashlib.sha256(repr(self.pieces).encode())
        for key, value in sorted(self.model.state_dict().items()):
            sha.update(f"{key} {list(value.shape)}\n".encode())
            sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def _read_pieces(self) -> list[bytes | None]:
        tokenizer = self._tokenizer
        names = tokenizer.convert_ids_to_tokens(list(range(min(self.vocabulary, len(tokenizer)))))
        special = set(tokenizer.all_special_ids)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        byte_level = backend is not None and '"ByteLevel"' in backend.to_str()
        added = {t.content for t in tokenizer.added_tokens_decoder.values()}
        pieces: list[bytes | None] = []
        for i, name in enumerate(names):
            if name is None or i in special:
                pieces.append(None)
            elif name in added:
                pieces.append(name.encode())
            else:
                pieces.append(byte_level_piece(name) if byte_level else sentencepiece_piece(name))
        return pieces + [None] * (self.vocabulary - len(pieces))

    def tokenize(self, text: str) -> Sequence[int]:
        with self._lock:
            return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def session(self, settings: Settings) -> Session:
        return _TransformersSession(self, settings)


# --- the bundled model ------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _log2_of_counts(cumulative, out):
    """Q16 log2 of the steps of a cumulative distribution."""
    for i in range(len(out)):
        out[i] = log2_of(cumulative[i + 1] - cumulative[i])


class _BundledSession(Session):
    """The recurrent model: it needs no window, and its output layer goes on learning."""

    def __init__(self, backend: Bundled, settings: Settings):
        super().__init__(settings, 0, len(backend.pieces))
        self._predictor = Predictor(backend.model, *backend.rates)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self._predictor.counts()  # starts it
        for token in tokens:
            self._predictor.update(token)
        _log2_of_counts(self._predictor.cumulative, self._out)
        return self._out


class Bundled(Backend):
    """The portable integer model (``language``). With it the whole published mixture decodes on every machine."""

    kind = "bundled"
    portable = True

    def __init__(self, model: Model, rates: tuple[int, int] = (66, 1300)):
        """``rates`` of the output layer and its bias, see ``language.Predictor``."""
        self.model, self.rates = model, rates
        self.pieces = list(model.tokens.strings)
        self.fingerprint = {"weights": model.model_id.hex()}

    def tokenize(self, text: str) -> Sequence[int]:
        return self.model.tokens.encode(text.encode()).tolist()

    def session(self, settings: Settings) -> Session:
        return _BundledSession(self, settings)

    def prepare(self, data: bytes) -> tuple[bytes, bytes]:
        """Paragraphs of one line and flags for capitals, as in ``text``: flags, margin, code of the line ends."""
        flags = 0
        if b"\r\n" in data and data.count(b"\r\n") == data.count(b"\n") == data.count(b"\r"):
            flags, data = _CRLF, data.replace(b"\r\n", b"\n")
        flat = np.frombuffer(data, np.uint8).copy()
        margin = best_margin(flat)
        join_lines(flat, margin)
        breaks = (flat != np.frombuffer(data, np.uint8)).astype(np.uint8)
        stream, coder = np.zeros(2 * len(data) + 64, np.uint8), np.zeros(4, np.int64)
        coder_start(coder, stream, False)
        if margin < WIDEST:
            code_breaks(flat, margin, breaks, stream, coder, False)
        plain = flat.tobytes()
        if len(flagged := flag_capitals(plain)) <= len(plain) * 5 // 4:
            flags, plain = flags | _CAPITALS, flagged
        return bytes([flags, margin]) + stream[: coder_finish(coder, stream)].tobytes(), plain

    def restore(self, known: bytes, plain: bytes) -> bytes:
        if len(known) < 2 or known[0] > _CRLF | _CAPITALS:
            raise CorruptStream("line ends and capitals of a text are damaged")
        flags, margin = known[0], known[1]
        if flags & _CAPITALS:
            plain = restore_capitals(plain)
        flat = np.frombuffer(plain, np.uint8).copy()
        if margin < WIDEST:
            stream, coder = np.frombuffer(bytearray(known[2:]), np.uint8), np.zeros(4, np.int64)
            breaks = np.zeros(len(flat), np.uint8)
            coder_start(coder, stream, True)
            code_breaks(flat, margin, breaks, stream, coder, True)
            flat[breaks == 1] = 10
        data = flat.tobytes()
        return data.replace(b"\n", b"\r\n") if flags & _CRLF else data


def open_backend(kind: str, weights: str, *, threads: int, device: str = "cpu") -> Backend:
    """``llama`` or ``transformers`` with these weights; the last one opened is remembered. ModelMissing, UsageError."""
    state = os.stat(weights) if os.path.exists(weights) else None
    changed = (state.st_size, state.st_mtime_ns) if state else None
    return _open(kind, weights, threads, device, changed)


@lru_cache(maxsize=1)
def _open(kind: str, weights: str, threads: int, device: str, changed: tuple[int, int] | None) -> Backend:
    if kind == Llama.kind:
        return Llama(weights, threads=threads, gpu_layers=999 if device.startswith("cuda") else 0)
    return Transformers(weights, threads=threads, device=device)


def check_fingerprint(backend: Backend, wanted: Any) -> None:
    """ModelMismatch, with what differs, unless a stream's fingerprint is that of ``backend``. CorruptStream for nonsense."""
    if not isinstance(wanted, dict) or any(type(v) not in (str, int) for v in wanted.values()):
        raise CorruptStream("header: the fingerprint of the language model is malformed")
    here = backend.fingerprint
    differing = [key for key in sorted({*wanted, *here}) if wanted.get(key) != here.get(key)]
    if differing:
        what = "; ".join(f"{key} {wanted.get(key)!s:.60}, here {here.get(key)!s:.60}" for key in differing)
        raise ModelMismatch(f"the stream is not portable, and it was made with another language model or machine: {what}")
