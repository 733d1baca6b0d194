"""A stand-in for ``llama_cpp`` where it is not installed: the calls that we make, over a toy model, strict about their order.

The model reads a GGUF of ``tiny_models``. Its logits hash the positions and tokens in the cache and, as real kernels do, differ
a little with the number of tokens in the call, with the thread number and with a shift of the cache.
"""

from __future__ import annotations

import ctypes
import types

import numpy as np

SYSTEM = b"CPU : FAKE = 1"
NOISE = 1e-3


def module() -> types.ModuleType:
    """The module, to be put into ``sys.modules``."""
    made = types.ModuleType("llama_cpp")
    made.__version__ = "0.0.fake"
    made.llama_token = ctypes.c_int32
    made.LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
    made.LLAMA_VOCAB_TYPE_BPE = 2
    made.LLAMA_TOKEN_ATTR_UNKNOWN, made.LLAMA_TOKEN_ATTR_UNUSED = 1, 2
    made.LLAMA_TOKEN_ATTR_CONTROL, made.LLAMA_TOKEN_ATTR_USER_DEFINED = 8, 16
    made.llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    for function in (
        llama_log_set, llama_backend_init, llama_model_default_params, llama_model_load_from_file, llama_model_get_vocab,
        llama_vocab_bos, llama_vocab_eos, llama_vocab_type, llama_vocab_n_tokens, llama_vocab_get_text, llama_vocab_get_attr,
        llama_print_system_info, llama_tokenize, llama_model_free, llama_context_default_params, llama_init_from_model,
        llama_get_memory, llama_memory_can_shift, llama_memory_clear, llama_memory_seq_rm, llama_memory_seq_add,
        llama_batch_get_one, llama_decode, llama_get_logits_ith, llama_free,
    ):  # fmt: skip
        setattr(made, function.__name__, function)
    return made


class _Model:
    def __init__(self, path: str):
        import gguf

        fields = gguf.GGUFReader(path).fields
        self.tokens = fields["tokenizer.ggml.tokens"].contents()
        self.kinds = fields["tokenizer.ggml.token_type"].contents()
        self.ids = {t: i for i, t in enumerate(self.tokens)}
        merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
        self.ranks = {m: i for i, m in enumerate(merges)}
        self.freed = False


class _Context:
    def __init__(self, model: _Model, params):
        self.model, self.params = model, params
        self.cells: list[tuple[int, int]] = []  # position, token
        self.shifted = 0
        self.freed = False
        self.row = (ctypes.c_float * len(model.tokens))()


def llama_log_set(callback, data): ...


def llama_backend_init(): ...


def llama_model_default_params():
    return types.SimpleNamespace(n_gpu_layers=-1)


def llama_model_load_from_file(path: bytes, params):
    try:
        return _Model(path.decode())
    except ValueError:
        return None


def llama_model_get_vocab(model):
    return model


def llama_vocab_bos(vocab):
    return 0


def llama_vocab_eos(vocab):
    return 0


def llama_vocab_type(vocab):
    return 2


def llama_vocab_n_tokens(vocab):
    return len(vocab.tokens)


def llama_vocab_get_text(vocab, i):
    return vocab.tokens[i].encode()


def llama_vocab_get_attr(vocab, i):
    return 8 if vocab.kinds[i] == 3 else 4


def llama_print_system_info():
    return SYSTEM


def llama_tokenize(vocab, data, size, out, room, add_special, parse_special):
    """BPE by words; bytes without a token vanish, as they do with SmolLM2."""
    import re

    from neuralcodec.entropy.bytes.backends import BYTE_LETTERS

    assert not add_special and not parse_special and len(data) == size
    letters = {b: c for c, b in BYTE_LETTERS.items()}
    n = 0
    for word in re.findall(rb" ?[A-Za-z]+| ?[0-9]+|\s+|[^\sA-Za-z0-9]+", data):
        parts = [letters[b] for b in word]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: vocab.ranks.get(pair, 1 << 30))
            if best not in vocab.ranks:
                break
            at = list(zip(parts, parts[1:])).index(best)
            parts[at : at + 2] = ["".join(best)]
        for part in parts:
            if part in vocab.ids:
                out[n] = vocab.ids[part]
                n += 1
    assert n <= room
    return n


def llama_model_free(model):
    assert not model.freed
    model.freed = True


def llama_context_default_params():
    return types.SimpleNamespace(n_ctx=512, n_batch=2048, n_ubatch=512, n_threads=4, n_threads_batch=4, flash_attn_type=-1)


def llama_init_from_model(model, params):
    assert not model.freed
    return _Context(model, params)


def llama_get_memory(context):
    return context


def llama_memory_can_shift(memory):
    return True


def llama_memory_clear(memory, data):
    memory.cells = []


def llama_memory_seq_rm(memory, sequence, low, high):
    memory.cells = [c for c in memory.cells if not low <= c[0] < high]
    return True


def llama_memory_seq_add(memory, sequence, low, high, delta):
    memory.cells = [(p + delta if p >= low and (high < 0 or p < high) else p, t) for p, t in memory.cells]
    memory.shifted += 1


def llama_batch_get_one(array, n):
    assert len(array) == n
    return list(array)


def llama_decode(context, batch):
    p = context.params
    assert not context.freed and 0 < len(batch) <= p.n_batch
    if len(context.cells) + len(batch) > p.n_ctx:
        return 1
    positions = [c[0] for c in context.cells]
    assert positions == list(range(len(positions))), "holes in the cache"
    for token in batch:
        assert 0 <= token < len(context.model.tokens)
        context.cells.append((len(context.cells), token))
    last = [t for _, t in context.cells[-3:]]
    seed = hash((tuple(last), len(context.cells) // 7))
    row = np.random.default_rng(seed & 0xFFFFFFFF).normal(0, 2, len(context.row)).astype(np.float32)
    noise = np.random.default_rng([len(batch), p.n_threads, context.shifted]).normal(0, NOISE, len(row))
    context.row[:] = (row + noise.astype(np.float32)).tolist()
    return 0


def llama_get_logits_ith(context, i):
    assert i == -1
    return ctypes.cast(context.row, ctypes.POINTER(ctypes.c_float))


def llama_free(context):
    assert not context.freed
    context.freed = True
