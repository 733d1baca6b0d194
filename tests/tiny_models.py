"""Tiny random language models, made on the spot: a transformers folder and a GGUF of the same shape and vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

LOST = b"\x04\x06\x13\x14\x16\x1d"
"""Bytes that SmolLM2's vocabulary lacks, and these."""
CORPUS = [
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice",
    "she had peeped into the book her sister was reading, but it had no pictures or conversations in it.\r\n\r\n",
    "def main(argv):\n    return 0\n\n# 1234567890\n",
    "naïve café — “quoted” – ünïcödé 日本語 текст\n        \t\t\n\n\n   ",
] * 4
WIDTH, LAYERS, HEADS, HIDDEN = 32, 2, 4, 64


def tokenizer(vocabulary: int = 400):
    """A byte-level BPE with two special tokens, without tokens for the lost bytes."""
    from neuralcodec.entropy.bytes.backends import BYTE_LETTERS
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = [letter for letter, byte in BYTE_LETTERS.items() if byte not in LOST]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>", "<|im_start|>"],
                                  initial_alphabet=letters, show_progress=False)  # fmt: skip
    made.train_from_iterator(CORPUS, trainer)
    return made


def transformers_folder(folder: Path, vocabulary: int = 400, seed: int = 0) -> Path:
    """A LlamaForCausalLM with random weights, saved with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = tokenizer(vocabulary)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                                   additional_special_tokens=["<|im_start|>"])  # fmt: skip
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=made.get_vocab_size() + 8, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, max_position_embeddings=256, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def gguf_file(path: Path, vocabulary: int = 400, seed: int = 0) -> Path:
    """A llama-architecture GGUF with random weights, float32."""
    import gguf

    model = json.loads(tokenizer(vocabulary).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    n = len(tokens)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(n)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if t.startswith("<|") else gguf.TokenType.NORMAL for t in tokens]
    writer.add_token_types([int(k) for k in kinds])
    writer.add_token_merges([" ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    rng = np.random.default_rng(seed)

    def matrix(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.3, shape).astype(np.float32))

    matrix("token_embd.weight", n, WIDTH)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for i in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(WIDTH, np.float32))
        matrix(f"blk.{i}.attn_q.weight", WIDTH, WIDTH)
        matrix(f"blk.{i}.attn_k.weight", WIDTH // 2, WIDTH)
        matrix(f"blk.{i}.attn_v.weight", WIDTH // 2, WIDTH)
        matrix(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        matrix(f"blk.{i}.ffn_gate.weight", HIDDEN, WIDTH)
        matrix(f"blk.{i}.ffn_up.weight", HIDDEN, WIDTH)
        matrix(f"blk.{i}.ffn_down.weight", WIDTH, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def language_model(seed: int = 0):
    """A bundled-type model with random weights."""
    from collections import Counter

    from neuralcodec.entropy.bytes.language import Config, Model
    from neuralcodec.entropy.bytes.tokens import PRE_TOKEN, Tokens, learn_merges

    counts = Counter(PRE_TOKEN.findall("".join(CORPUS).encode()))
    tokens = Tokens(learn_merges(dict(counts), 300))
    config = Config(len(tokens), 16, 1, 24, 9, (9,), (9,), ((20, 20, 20, 20),))
    rng = np.random.default_rng(seed)
    tensors = {}
    for key, (dtype, shape) in config.tensors().items():
        high = {"int8": 100, "int16": 4000}.get(dtype, 3000)
        tensors[key] = rng.integers(0 if "multipliers" in key else -high, high, shape).astype(dtype)
    return Model(config, tokens, tensors)
