"""Text with the language model: token by token, each token as binary decisions down the tree of sorted ids.

    bytes -> line ends, capitals (transform) -> tokens -> for each token:
        language model -> counts of all tokens -> probability of every node -+
        tokens, bytes, words, lines, brackets -> slots, histories, runs -----+-> mixers -> mixer -> refinement -> coder
        two match models over tokens ----------------------------------------+
    then, all words being known, which spaces were line ends

``_code`` is the coder of tokens, both ways: one function, so that the model of the decoder cannot differ from the encoder's.
Integers only. A payload is: flags (1 byte), margin (1), number of tokens (varint), arithmetic code.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from decimal import Decimal, localcontext

import numpy as np
from numba import njit

from ...container.errors import CorruptStream
from ...container.format import read_varint, varint
from ..binary import code_bit
from .binary import (
    ABOVE,
    CLASSES,
    DEPTH,
    FIELD,
    FIRST,
    INDENT,
    LINE,
    PUNCT,
    QUOTE,
    STACK,
    STATE,
    TAG,
    WORD,
    WORD1,
    WORD2,
    learn_text,
    primed_histories,
)
from .framing import TEXT
from .language import Model, adapt, curves, predict, step
from .mixing import (
    CLAMP,
    MAP_START,
    STRETCH,
    apm_next,
    apm_p16,
    apm_table,
    bucket_table,
    coder_finish,
    coder_start,
    fetch_bucket,
    find_bucket,
    map_next,
    map_p16,
    mix_dot,
    mix_hash,
    mix_train,
    slot_next,
    slot_p18,
    squash,
    stretch,
)
from .transform import WIDEST, best_margin, flag_capitals, join_lines, reach, restore_capitals

CONTEXTS = 26
MATCHES = 2
_INPUTS = 4  # of a context: slot, history, confidence, run
_SETS = 7
_SET_SIZE = 2048

COMPONENTS = {
    "model": 1, "adaptation": 2, "tokens": 4, "bytes": 8, "words": 16, "format": 32, "match": 64, "runs": 128, "histories": 256,
    "mixer sets": 512, "refinement": 1024, "line ends": 2048, "capitals": 4096,
}  # fmt: skip
"""Parts that can be left out, by bit of ``TextOptions.components``."""
EVERYTHING = sum(COMPONENTS.values())
_GROUPS = {"tokens": range(0, 8), "bytes": range(8, 13), "words": range(13, 19), "format": range(19, 26)}


@dataclass(frozen=True)
class TextOptions:
    """Integers that both sides must know. Rates are in 1/65536."""

    components: int = EVERYTHING
    head_rate: int = 66
    bias_rate: int = 1300
    mixer_rate: int = 200
    slot_limit: int = 30
    table_bits: int = 21
    """At most 2^so many buckets of 64 bytes for the contexts."""

    def on(self, component: str) -> bool:
        return bool(self.components & COMPONENTS[component])

    def without(self, *components: str) -> TextOptions:
        """The same with parts left out. KeyError for an unknown one."""
        return replace(self, components=self.components & ~sum(COMPONENTS[c] for c in set(components)))

    def to_bytes(self) -> bytes:
        """One byte for the defaults, otherwise all values."""
        if self == TextOptions():
            return b"\0"
        return b"\1" + b"".join(varint(value) for value in astuple(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple[TextOptions, int]:
        """(options, bytes read). CorruptStream for values that no encoder writes."""
        if data[:1] == b"\0":
            return cls(), 1
        if data[:1] != b"\1":
            raise CorruptStream("options of the text coder: unknown form")
        values, at = [], 1
        for _ in fields(cls):
            value, at = read_varint(data, at, "options of the text coder")
            values.append(value)
        options = cls(*values)
        if any(value > limit for value, limit in zip(values, (EVERYTHING, 2047, 65535, 4095, 63, 22))):
            raise CorruptStream("options of the text coder: out of range")
        return options, at


@njit(cache=True)
def _contexts(out, ids, n, text, size, state, stack):
    """Hashes of all contexts of the token at ``n``, ``size`` being the bytes before it."""
    t1 = np.int64(ids[n - 1]) if n > 0 else 0
    t2 = np.int64(ids[n - 2]) if n > 1 else 0
    t3 = np.int64(ids[n - 3]) if n > 2 else 0
    t4 = np.int64(ids[n - 4]) if n > 3 else 0
    c1 = np.int64(text[size - 1]) if size > 0 else 0
    c2 = np.int64(text[size - 2]) if size > 1 else 0
    c3 = np.int64(text[size - 3]) if size > 2 else 0
    c4 = np.int64(text[size - 4]) if size > 3 else 0
    c5 = np.int64(text[size - 5]) if size > 4 else 0
    c6 = np.int64(text[size - 6]) if size > 5 else 0
    out[0] = 0
    out[1] = t1
    out[2] = mix_hash(t1, t2)
    out[3] = mix_hash(out[2], t3)
    out[4] = mix_hash(out[3], t4)
    out[5] = t2
    out[6] = mix_hash(t2, t3)
    out[7] = mix_hash(t1, t3)
    out[8] = c1
    out[9] = c2 << 8 | c1
    out[10] = c3 << 16 | c2 << 8 | c1
    out[11] = c4 << 24 | out[10]
    out[12] = mix_hash(mix_hash(out[11], c5), c6)
    word = state[WORD]
    out[13] = mix_hash(word, c1)
    out[14] = mix_hash(out[13], state[WORD1])
    out[15] = mix_hash(out[14], state[WORD2])
    out[16] = mix_hash(out[13], state[WORD2])
    out[17] = mix_hash(t1, state[WORD1])
    out[18] = mix_hash(mix_hash(word, state[PUNCT]), c1)
    out[19] = mix_hash(state[CLASSES], c1 if word == 0 else 0)
    column = size - state[LINE]
    at = state[ABOVE] + column
    above = np.int64(text[at]) if at < state[LINE] else 10
    next_above = np.int64(text[at + 1]) if at + 1 < state[LINE] else 10
    out[20] = mix_hash(above << 8 | next_above, t1)
    out[21] = mix_hash(mix_hash(word, state[FIRST]), state[INDENT])
    out[22] = mix_hash(stack[state[DEPTH]], t1 | state[QUOTE] << 16)
    out[23] = mix_hash(mix_hash(state[TAG], word), c1)
    out[24] = mix_hash(mix_hash(word, state[FIELD]), min(column, 63) << 8 | above)
    out[25] = mix_hash(mix_hash(stack[state[DEPTH]], word), c2 << 8 | c1)


def _tail() -> np.ndarray:
    """256 ln(q / (1 - q)) for q = (i + 1/2) / 2^18, i < 1024: where STRETCH is too coarse."""
    with localcontext() as context:
        context.prec = 20
        odds = [Decimal(2 * i + 1) / ((1 << 19) - 2 * i - 1) for i in range(1024)]
        return np.array([int((256 * o.ln()).to_integral_value()) for o in odds], np.int32)


_TAIL = _tail()


@njit(cache=True)
def _node_stretch(part, total):
    """Stretched probability of ``part`` counts out of ``total``, 0 < part < total."""
    p = (part << 22) // total
    if p < 1 << 14:
        return max(_TAIL[p >> 4], -CLAMP)
    if p >= (1 << 22) - (1 << 14):
        return min(-_TAIL[((1 << 22) - 1 - p) >> 4], CLAMP)
    return STRETCH[p >> 10]


@njit(cache=True, nogil=True)
def _code(
    ids, count, text, room, stream, coder, decoding, strings, starts, depth, plan, flags, rates,
    net, state, work, head, bias, master, logits, cumulative, sigmoid_curve, half_curve, norm_bits,
    table, histories, runs, match_maps, match_table, weights, final_weights, lm_apm, apm1, apm2,
):  # fmt: skip
    """Code ``count`` tokens; bytes of text they make, -1 when the stream is full, -2 when the text outgrows ``room``.

    ``flags``: language model, its adaptation, match models, runs, histories, mixer sets, refinement. ``rates``: head, bias,
    mixer, slots. The arrays from ``state`` on are used up.
    """
    use_model, use_adapt, matches, use_runs, use_histories = flags[0], flags[1], flags[2] * MATCHES, flags[3], flags[4]
    sets = _SETS if flags[5] else 1
    refine = flags[6]
    head_rate, bias_rate, mixer_rate, slot_limit = rates[0], rates[1], rates[2], rates[3]
    contexts = len(plan)
    width = len(weights) // (_SETS * _SET_SIZE)
    inputs = np.zeros(width, np.int32)
    final = np.zeros(16, np.int32)
    hashes = np.zeros(CONTEXTS, np.int64)
    nibble = np.zeros(contexts, np.int64)
    base = np.zeros(contexts, np.int64)
    first = np.zeros(contexts, np.int64)
    history_at = np.zeros(contexts, np.int64)
    run_at = np.zeros(contexts, np.int64)
    run_token = np.zeros(contexts, np.int64)
    run_length = np.zeros(contexts, np.int64)
    words = np.zeros(STATE, np.int64)
    stack = np.zeros(STACK, np.int64)
    set_at = np.zeros(_SETS, np.int64)
    set_p = np.zeros(_SETS, np.int64)
    match_pos = np.zeros(MATCHES, np.int64)
    match_len = np.zeros(MATCHES, np.int64)
    match_miss = np.zeros(MATCHES, np.int64)
    match_at = np.zeros(MATCHES, np.int64)
    match_bit = np.zeros(MATCHES, np.int64)
    match_mask = (len(match_table) // MATCHES) - 1
    apm_mask = len(apm1) // 33 - 1
    size = len(head)
    run_bits = 16 - depth
    longest_run = (1 << run_bits) - 1
    n_out = work[0][: head.shape[1]]
    previous = np.int64(10)
    filled = 0
    for i in range(size):  # the id of "\n", with which a text begins
        if starts[i + 1] - starts[i] == 1 and strings[starts[i]] == 10:
            previous = i
    for n in range(count):
        _contexts(hashes, ids, n, text, filled, words, stack)
        for i in range(contexts):
            nibble[i] = mix_hash(hashes[plan[i]], plan[i] + 1)
            fetch_bucket(table, nibble[i])  # comes while the model works
        if use_model:
            step(previous, net, state, work, sigmoid_curve)
            predict(n_out, head, bias, norm_bits, logits, cumulative, half_curve)
        # match models
        for m in range(matches):
            least = 3 if m == 0 else 7
            if match_len[m] > 0 and ids[match_pos[m]] == previous:
                match_len[m] = min(match_len[m] + 1, 65535)
                match_pos[m] += 1
                match_miss[m] = match_miss[m] << 1 & 255
            elif match_len[m] > 0:
                match_miss[m] = (match_miss[m] << 1 | 1) & 255
                match_pos[m] += 1
                match_len[m] = 1
                if match_miss[m] & 7 == 7:
                    match_len[m] = 0
            if n >= least:
                h = np.int64(0)
                for k in range(1, least + 1):
                    h = mix_hash(h, ids[n - k])
                at = m * (match_mask + 1) + (h & match_mask)
                if match_len[m] < least:
                    candidate = np.int64(match_table[at])
                    if candidate > 0:
                        length = 0
                        while length < 32 and candidate > length and ids[candidate - 1 - length] == ids[n - 1 - length]:
                            length += 1
                        if length >= least:
                            match_len[m] = length
                            match_pos[m] = candidate
                            match_miss[m] = 0
                match_table[at] = n
        longest = 0
        for m in range(matches):
            if match_len[m] > match_len[longest]:
                longest = m
        length = match_len[longest] if matches > 0 else 0
        t1 = np.int64(ids[n - 1]) if n > 0 else 0
        t2 = np.int64(ids[n - 2]) if n > 1 else 0
        c1 = np.int64(text[filled - 1]) if filled > 0 else 0
        length_step = min(length, 15) if length < 16 else min(16 + ((length - 16) >> 3), 31)
        text_class = words[CLASSES] & 0xFF
        early = (mixer_rate << 12) // (1024 + n)  # learn faster in the beginning
        token = np.int64(ids[n])
        node, low, span = np.int64(1), np.int64(0), np.int64(size)
        for level in range(depth):
            span >>= 1
            if level & 3 == 0:
                if level > 0:
                    for i in range(contexts):
                        nibble[i] = mix_hash(mix_hash(hashes[plan[i]], plan[i] + 1), node)
                        fetch_bucket(table, nibble[i])
                for i in range(contexts):
                    at = find_bucket(table, nibble[i])
                    base[i] = at
                    if level == 0:
                        first[i] = at
                        run_token[i] = (table[at] & 0xFFFF) >> run_bits
                        run_length[i] = table[at] & longest_run
            local = (node & ((1 << (level & 3)) - 1)) | 1 << (level & 3)
            seen = 0
            k = 0
            for i in range(contexts):
                slot = table[base[i] + local]
                times = (slot >> 8) & 63
                if times == 0:
                    inputs[k] = 0
                    inputs[k + 1] = 0
                    inputs[k + 2] = 0
                    history_at[i] = -1
                else:
                    p = slot_p18(slot)
                    inputs[k] = STRETCH[p >> 6]
                    at = (i << 10) | (min(times >> 3, 3) << 8) | (slot & 255)
                    history_at[i] = at
                    inputs[k + 1] = STRETCH[np.int64(histories[at]) >> 20] if use_histories else 0
                    inputs[k + 2] = (p - 131072) >> 9
                    if i < 5:
                        seen += 1
                run_at[i] = -1
                inputs[k + 3] = 0
                if use_runs and run_length[i] > 0 and (run_token[i] | size) >> (depth - level) == node:
                    at = (i << 9) | (min(run_length[i], 31) << 4) | level
                    run_at[i] = at
                    s = STRETCH[np.int64(runs[at]) >> 20]
                    inputs[k + 3] = s if (run_token[i] >> (depth - 1 - level)) & 1 else -s
                k += _INPUTS
            for m in range(matches):
                match_at[m] = -1
                inputs[k] = 0
                inputs[k + 1] = 0
                if match_len[m] > 0:
                    guess = np.int64(ids[match_pos[m]])
                    if (guess | size) >> (depth - level) == node:
                        match_bit[m] = (guess >> (depth - 1 - level)) & 1
                        place = min(match_len[m], 15) if match_len[m] < 16 else min(16 + ((match_len[m] - 16) >> 2), 31)
                        at = ((m << 5 | place) << 3 | (match_miss[m] & 7)) << 4 | level
                        match_at[m] = at
                        p = map_p16(match_maps[at])
                        s = stretch(p)
                        inputs[k] = s if match_bit[m] else -s
                        inputs[k + 1] = (p - 32768) >> 7 if match_bit[m] else (32768 - p) >> 7
                k += 2
            inputs[k] = 256
            s_model = 0
            if use_model:
                total = cumulative[low + 2 * span] - cumulative[low]
                part = cumulative[low + 2 * span] - cumulative[low + span]
                s_model = _node_stretch(part, total)
                inputs[k + 1] = s_model
                inputs[k + 2] = ((part << 9) // total) - 256
                inputs[k + 3] = stretch(apm_p16(lm_apm, node, s_model))
            sure = min(abs(s_model) >> 7, 15)
            set_at[0] = node
            set_at[1] = length_step << 4 | level
            set_at[2] = seen << 8 | sure << 4 | level
            set_at[3] = t1 & 2047
            set_at[4] = (text_class << 3 | min(level, 7)) & 2047
            set_at[5] = c1 << 3 | min(level, 7)
            set_at[6] = (s_model + CLAMP) >> 5 << 3 | min(level, 7)
            for j in range(sets):
                set_at[j] = (j * _SET_SIZE + set_at[j]) * width
                s = mix_dot(inputs, weights, set_at[j], width)
                final[j] = s
                set_p[j] = squash(s)
            final_at = (length_step << 4 | level) * 16
            other_at = (512 + (sure << 4 | level)) * 16
            if sets > 1:
                s1 = mix_dot(final, final_weights, final_at, 16)
                s2 = mix_dot(final, final_weights, other_at, 16)
                s = (s1 + s2) >> 1
            else:
                s1 = s2 = s = final[0]
            p = squash(s)
            if refine:
                a1 = mix_hash(node << 16 | t1, 0) & apm_mask
                a2 = mix_hash(mix_hash(node << 16 | t1, 1), t2) & apm_mask
                r1 = apm_p16(apm1, a1, s)
                r2 = apm_p16(apm2, a2, s)
                p = (6 * p + r1 + r2 + 4) >> 3
            p = min(max(p, 1), 65535)
            bit = code_bit((token >> (depth - 1 - level)) & 1, p, coder, stream, decoding)
            # learn
            for j in range(sets):
                mix_train(inputs, weights, set_at[j], width, bit, set_p[j], mixer_rate + early)
            if sets > 1:
                mix_train(final, final_weights, final_at, 16, bit, squash(s1), 120)
                mix_train(final, final_weights, other_at, 16, bit, squash(s2), 120)
            if use_model:
                apm_next(lm_apm, node, s_model, bit, 255)
            if refine:
                apm_next(apm1, a1, s, bit, 500)
                apm_next(apm2, a2, s, bit, 500)
            for i in range(contexts):
                at = base[i] + local
                table[at] = slot_next(table[at], bit, slot_limit)
                at = history_at[i]
                if at >= 0:
                    histories[at] = map_next(histories[at], bit, 255)
                at = run_at[i]
                if at >= 0:
                    runs[at] = map_next(runs[at], 1 if (run_token[i] >> (depth - 1 - level)) & 1 == bit else 0, 255)
            for m in range(matches):
                if match_at[m] >= 0:
                    match_maps[match_at[m]] = map_next(match_maps[match_at[m]], 1 if match_bit[m] == bit else 0, 1023)
            node = node << 1 | bit
            if bit:
                low += span
        token = node - size
        ids[n] = token
        for i in range(contexts):
            run = np.int64(table[first[i]])
            times = run & longest_run
            times = min(times + 1, longest_run) if times > 0 and (run & 0xFFFF) >> run_bits == token else 1
            table[first[i]] = np.int32((run & ~0xFFFF) | token << run_bits | times)
        if use_model and use_adapt:
            adapt(token, n_out, cumulative, head, bias, master, head_rate, bias_rate, norm_bits)
        previous = token
        if filled + starts[token + 1] - starts[token] > room:
            return -2
        for k in range(starts[token], starts[token + 1]):
            text[filled] = strings[k]
            filled += 1
            learn_text(words, stack, text, filled)
        if not decoding and coder[3] > len(stream):
            return -1
    return filled


@njit(cache=True, nogil=True)
def _code_breaks(text, margin, breaks, stream, coder, decoding):
    """Code which spaces of ``text`` (uint8) that reach beyond ``margin`` are line ends (``breaks``, uint8, in or out)."""
    maps = np.full(1 << 13, MAP_START, np.uint32)
    fine = np.full(1 << 16, MAP_START, np.uint32)
    weights = np.full(64 * 4, 30000, np.int32)
    inputs = np.zeros(4, np.int32)
    start, before = 0, 0
    for i in range(len(text)):
        if text[i] == 10:
            start, before = i + 1, 0
        if text[i] != 32:
            continue
        r = reach(text, i, start)
        if r <= margin:
            continue
        over = min(r - margin, 63)
        c = np.int64(text[i - 1])
        ended = 0 if 97 <= c <= 122 or 65 <= c <= 90 else 1
        a = over << 1 | ended
        b = 4096 + (over << 6 | min(before, 63))
        d = (r << 8 | min(i - start, 255)) & 0xFFFF
        inputs[0] = stretch(map_p16(maps[a]))
        inputs[1] = stretch(map_p16(maps[b]))
        inputs[2] = stretch(map_p16(fine[d]))
        s = mix_dot(inputs, weights, over * 4, 4)
        p = min(max(squash(s), 1), 65535)
        bit = code_bit(np.int64(breaks[i]), p, coder, stream, decoding)
        mix_train(inputs, weights, over * 4, 4, bit, p, 300)
        maps[a] = map_next(maps[a], bit, 255)
        maps[b] = map_next(maps[b], bit, 60)
        fine[d] = map_next(fine[d], bit, 255)
        breaks[i] = bit
        if bit:
            before = over
            start = i + 1
        if not decoding and coder[3] > len(stream):
            return


def _memory(options: TextOptions, model: Model, plan: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Fresh arrays for ``_code`` over ``count`` tokens."""
    contexts, size = max(len(plan), 1), model.config.vocabulary
    depth = size.bit_length() - 1
    need = max(count, 64) * contexts * ((depth + 3) // 4) * 3 // 4
    buckets = 1 << min(max(need, 2).bit_length(), options.table_bits)
    match_bits = min(max(count, 16).bit_length() + 1, 20)
    inputs = len(plan) * _INPUTS + MATCHES * 2 + 4
    width = (inputs + 15) // 16 * 16
    weights = np.zeros(width, np.int32)
    weights[: len(plan) * _INPUTS] = 65536 * 8 // 10 // contexts if not options.on("model") else 65536 * 3 // 10 // contexts
    weights[len(plan) * _INPUTS : inputs] = 6000
    weights[inputs - 4] = 0
    weights[inputs - 3] = 65536 * 6 // 10
    weights[inputs - 2] = 0
    weights[inputs - 1] = 65536 * 2 // 10
    sets = _SETS if options.on("mixer sets") else 1
    return (
        bucket_table(buckets), primed_histories(contexts),
        np.full(contexts << 9, np.uint32(3 << 30), np.uint32), np.full(MATCHES << 12, np.uint32(3 << 30), np.uint32),
        np.zeros(MATCHES << match_bits, np.int32), np.tile(weights, _SETS * _SET_SIZE),
        np.tile(np.array([65536 // sets] * sets + [0] * (16 - sets), np.int32), 1024),
        apm_table(size), apm_table(1 << 16), apm_table(1 << 16),
    )  # fmt: skip


def _plan(options: TextOptions) -> np.ndarray:
    return np.array([i for name, group in _GROUPS.items() if options.on(name) for i in group], np.int64)


_FLAGS = ("model", "adaptation", "match", "runs", "histories", "mixer sets", "refinement")


def _run(
    ids: np.ndarray, text: np.ndarray, stream: np.ndarray, coder: np.ndarray, decoding: bool, model: Model, options: TextOptions
) -> int:  # fmt: skip
    plan = _plan(options)
    strings = model.tokens.strings
    starts = np.zeros(len(strings) + 1, np.int64)
    np.cumsum([len(s) for s in strings], out=starts[1:])
    flags = np.array([options.on(c) for c in _FLAGS], np.int64)
    rates = np.array([options.head_rate, options.bias_rate, options.mixer_rate, options.slot_limit], np.int64)
    size = model.config.vocabulary
    coder_start(coder, stream, decoding)
    return _code(
        ids, len(ids), text, len(text), stream, coder, decoding,
        np.frombuffer(b"".join(strings), np.uint8), starts, size.bit_length() - 1, plan, flags, rates,
        model.net, model.state(), model.work(), *model.output_layer(), np.zeros(size, np.int32), np.zeros(size + 1, np.int64),
        *curves(), model.config.norm_bits, *_memory(options, model, plan, len(ids)),
    )  # fmt: skip


_CRLF, _CAPITALS = 1, 2


def encode_text(data: bytes, model: Model, options: TextOptions = TextOptions()) -> bytes:  # noqa: B008  (frozen)
    """Payload of any bytes; good for text. ``decode_text`` needs their number, the model and the options."""
    flags, margin = 0, WIDEST
    if b"\r\n" in data and data.count(b"\r\n") == data.count(b"\n") == data.count(b"\r"):
        flags |= _CRLF
        data = data.replace(b"\r\n", b"\n")
    flat = np.frombuffer(data, np.uint8).copy()
    if options.on("line ends"):
        margin = best_margin(flat)
        join_lines(flat, margin)
    breaks = (flat != np.frombuffer(data, np.uint8)).astype(np.uint8)
    plain = flat.tobytes()
    if options.on("capitals") and len(flagged := flag_capitals(plain)) <= len(plain) * 5 // 4:
        flags |= _CAPITALS
        plain = flagged
    ids = model.tokens.encode(plain)
    stream = np.zeros(2 * len(data) + 64, np.uint8)
    coder = np.zeros(4, np.int64)
    _run(ids, np.zeros(len(plain), np.uint8), stream, coder, False, model, options)
    if margin < WIDEST:
        _code_breaks(flat, margin, breaks, stream, coder, False)
    size = coder_finish(coder, stream)
    if size > len(stream):
        raise AssertionError("a token has taken more than 32 bits")
    return bytes([flags, margin]) + varint(len(ids)) + stream[:size].tobytes()


def decode_text(payload: bytes, length: int, model: Model, options: TextOptions = TextOptions()) -> bytes:  # noqa: B008
    """The ``length`` bytes of a payload. CorruptStream where ``encode_text`` cannot have made it; other damage: other bytes."""
    if len(payload) < 3 or payload[0] > 3:
        raise CorruptStream("no payload of text")
    flags, margin = payload[0], payload[1]
    count, at = read_varint(payload, 2, "number of tokens")
    room = length * 5 // 4 + 16
    if count > room:
        raise CorruptStream(f"{count} tokens in {length} bytes")
    stream = np.frombuffer(payload, np.uint8)[at:].copy()
    text, coder = np.zeros(room, np.uint8), np.zeros(4, np.int64)
    filled = _run(np.zeros(count, np.uint16), text, stream, coder, True, model, options)
    if filled < 0:
        raise CorruptStream("the text is longer than it may be")
    plain = text[:filled].tobytes()
    if flags & _CAPITALS:
        plain = restore_capitals(plain)
    flat = np.frombuffer(plain, np.uint8).copy()
    if margin < WIDEST:
        breaks = np.zeros(len(flat), np.uint8)
        _code_breaks(flat, margin, breaks, stream, coder, True)
        flat[breaks == 1] = 10
    data = flat.tobytes()
    if flags & _CRLF:
        data = data.replace(b"\n", b"\r\n")
    if len(data) != length or not coder[3] - 4 <= len(stream) <= coder[3]:
        raise CorruptStream("the text and its code end at different places")
    return data


class TextCoder:
    """The coder of text blocks for ``blocks``: its code begins with the options."""

    method = TEXT

    def __init__(self, model: Model):
        self.model = model

    def encode(self, data: bytes, effort: int) -> bytes:
        """Efforts 1..4 leave the language model out; 8 and 9 try what markup and large files like too, and keep the shorter."""
        tried = [TextOptions()]
        if effort <= 4:
            tried = [TextOptions().without("model")]
        elif effort >= 8:
            tried.append(TextOptions(mixer_rate=320, table_bits=22))
        return min((options.to_bytes() + encode_text(data, self.model, options) for options in tried), key=len)

    def decode(self, code: bytes, length: int) -> bytes:
        """Code -> original. CorruptStream where damage shows; a checksum must find the rest."""
        options, at = TextOptions.from_bytes(code)
        return decode_text(code[at:], length, self.model, options)
