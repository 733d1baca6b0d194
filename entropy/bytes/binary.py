"""A context-mixing coder of bytes: everything that is not prose, and prose at the fast levels. Format: SPEC.md.

    bytes so far -> contexts (hashes) -> slots, histories, runs -> inputs -> mixers -> mixer -> refinement -> coder
                 -> match models ---------------------------------^
                 -> pixels above and to the left (bitmaps) -------^

``code`` is the whole coder, both ways: one function, so that the model of the decoder cannot differ from the encoder's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numba import njit

from ...container.errors import CorruptStream
from ..binary import code_bit
from .mixing import (
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

CONTEXTS = 64
PIXELS = 12
_PIXEL_BITS = 20
_INPUTS = 4  # of a context: slot, history, confidence, run
_MATCHES = 2
_SETS = 7
_SET_SIZE = 2048


@njit(cache=True)
def _is_letter(c):
    return 65 <= c <= 90 or 97 <= c <= 122 or c >= 128


@njit(cache=True)
def _class_of(c):
    """Sixteen classes of bytes."""
    if 97 <= c <= 122:
        return 1
    if 65 <= c <= 90:
        return 2
    if 48 <= c <= 57:
        return 3
    if c == 32:
        return 4
    if c == 10 or c == 13:
        return 5
    if c == 44 or c == 59 or c == 58:
        return 6
    if c == 46 or c == 33 or c == 63:
        return 7
    if c == 34 or c == 39 or c == 96:
        return 8
    if c == 40 or c == 91 or c == 123 or c == 60:
        return 9
    if c == 41 or c == 93 or c == 125 or c == 62:
        return 10
    if c == 0:
        return 11
    if c == 255:
        return 12
    if c < 32:
        return 13
    if c >= 128:
        return 14
    return 15


# text state int64: word, the two words before, starts of this line and the one before, classes, field, its start,
# stack depth, quote, last punctuation, first byte of the line, indentation, distance to the last zero
WORD, WORD1, WORD2, LINE, ABOVE, CLASSES, FIELD, FIELD_AT, DEPTH, QUOTE, PUNCT, FIRST, INDENT, TAG = range(14)
STATE = 14
STACK = 64


@njit(cache=True)
def learn_text(state, stack, data, n):
    """Follow words, lines, fields, brackets and quotes over the byte before position ``n``."""
    c = np.int64(data[n - 1])
    if _is_letter(c):
        state[WORD] = mix_hash(state[WORD], c | 32 if c < 128 else c)
    elif state[WORD] != 0:
        state[WORD2] = state[WORD1]
        state[WORD1] = state[WORD]
        state[WORD] = 0
    kind = _class_of(c)
    state[CLASSES] = (state[CLASSES] << 4 | kind) & 0xFFFFFFFF
    if c == 10:
        state[ABOVE] = state[LINE]
        state[LINE] = n
        state[FIELD] = 0
        state[FIELD_AT] = n
        state[QUOTE] = 0
        state[INDENT] = 0
    elif c == 44 or c == 9 or c == 59 or c == 124:
        state[FIELD] += 1
        state[FIELD_AT] = n
    if n - 1 == state[LINE]:
        state[FIRST] = c
    if (c == 32 or c == 9) and n - 1 - state[LINE] == state[INDENT]:
        state[INDENT] += 1
    if kind >= 6 and kind <= 10 or kind == 15:
        state[PUNCT] = c
    if c == 34:
        state[QUOTE] ^= 1
    depth = state[DEPTH]
    if kind == 9:
        depth = min(depth + 1, STACK - 1)
        stack[depth] = mix_hash(state[WORD1], c)
    elif kind == 10 and depth > 0:
        depth -= 1
    state[DEPTH] = depth
    # the name of the innermost element of XML: pushed as "<name" ends, popped by "</"
    if c == 62 or c == 32:
        if state[TAG] < 0:
            state[TAG] = state[WORD1]
    elif c == 60:
        state[TAG] = -1


@njit(cache=True)
def _contexts(out, data, n, state, stack, stride, row, expected, length):
    """Hashes of all contexts of the byte at ``n``. ``stride``: of records or pixels; ``row``: of lines of them."""
    c1 = np.int64(data[n - 1]) if n > 0 else 0
    c2 = np.int64(data[n - 2]) if n > 1 else 0
    c3 = np.int64(data[n - 3]) if n > 2 else 0
    c4 = np.int64(data[n - 4]) if n > 3 else 0
    c5 = np.int64(data[n - 5]) if n > 4 else 0
    c6 = np.int64(data[n - 6]) if n > 5 else 0
    c7 = np.int64(data[n - 7]) if n > 6 else 0
    c8 = np.int64(data[n - 8]) if n > 7 else 0
    out[0] = 0
    out[1] = c1
    out[2] = c2 << 8 | c1
    out[3] = c3 << 16 | c2 << 8 | c1
    out[4] = c4 << 24 | out[3]
    h = mix_hash(out[4], c5)
    out[5] = h
    h = mix_hash(h, c6)
    out[6] = h
    out[7] = mix_hash(mix_hash(h, c7), c8)
    word = state[WORD]
    out[8] = mix_hash(word, c1)
    out[9] = mix_hash(out[8], state[WORD1])
    out[10] = mix_hash(out[9], state[WORD2])
    out[11] = mix_hash(out[8], state[WORD2])
    out[12] = mix_hash(state[CLASSES], c1 if word == 0 else 0)
    column = n - state[LINE]
    at = state[ABOVE] + column
    above = np.int64(data[at]) if at < state[LINE] else 10
    out[13] = mix_hash(above, min(column, 255))
    out[14] = mix_hash(above << 8 | c1, 1)
    out[15] = mix_hash(mix_hash(word, state[FIRST]), state[INDENT])
    out[16] = mix_hash(mix_hash(word, state[FIELD]), state[FIELD])
    out[17] = mix_hash(stack[state[DEPTH]], c1 | state[QUOTE] << 8)
    out[18] = mix_hash(mix_hash(stack[state[DEPTH]], word), c2 << 8 | c1)
    out[19] = mix_hash(mix_hash(state[TAG], word), c1)
    out[20] = mix_hash(c1 | state[PUNCT] << 8, state[WORD1])
    # sparse
    out[21] = c2
    out[22] = c3 << 8 | c2
    out[23] = c3
    out[24] = c4
    out[25] = c3 << 8 | c1
    out[26] = c4 << 8 | c1
    out[27] = c4 << 16 | c3 << 8 | c2
    out[28] = (c1 & 0xF0) | (c2 & 0xF0) << 8 | (c3 & 0xF0) << 16 | (c4 & 0xF0) << 24
    out[29] = (n & 3) << 16 | c4 << 8 | c1
    out[30] = (n & 3) << 8 | c1 >> 3 | (c2 & 0xF8) << 16
    # records: what stands one, two, three strides above, and beside it
    s = stride
    a = np.int64(data[n - s]) if n >= s else 0
    aa = np.int64(data[n - 2 * s]) if n >= 2 * s else 0
    aaa = np.int64(data[n - 3 * s]) if n >= 3 * s else 0
    al = np.int64(data[n - s - 1]) if n > s else 0
    ar = np.int64(data[n - s + 1]) if n >= s > 1 else 0
    aal = np.int64(data[n - 2 * s - 1]) if n > 2 * s else 0
    phase = n % s
    line = (2 * a - aa) & 255
    out[31] = a << 8 | min(phase, 255)
    out[32] = a << 16 | c1 << 8 | al
    out[33] = a << 16 | aa << 8 | c1
    out[34] = mix_hash(a << 24 | aa << 16 | aaa << 8, 1)
    out[35] = line << 8 | ((c1 - al) & 255)
    out[36] = mix_hash(line << 16 | min(phase, 255) << 8 | ((c1 - al) & 255), 2)
    out[37] = a << 16 | ar << 8 | c1
    out[38] = phase << 8 | c1
    out[39] = mix_hash(phase << 16 | c2 << 8 | c1, 3)
    out[40] = (a + c1 - al) & 255
    out[41] = mix_hash(a << 24 | al << 16 | c1 << 8 | c2, 4)
    out[42] = mix_hash((a - aa) << 16 | (c1 - al) << 8 | (al - aal), a)
    r = row
    b = np.int64(data[n - r]) if n >= r else 0
    bl = np.int64(data[n - r - s]) if n >= r + s else 0
    bb = np.int64(data[n - 2 * r]) if n >= 2 * r else 0
    br = np.int64(data[n - r + s]) if n >= r > s else 0
    left = a
    out[43] = b << 8 | left
    out[44] = mix_hash(b << 16 | left << 8 | bl, 5)
    out[45] = mix_hash((b + left - bl) & 255, 6)
    out[46] = mix_hash(b << 8 | bb, 7)
    out[47] = mix_hash(b << 16 | br << 8 | c1, 8)
    out[48] = mix_hash(((b + left - bl) & 255) << 8 | ((left + br - b) & 255), 9)
    out[49] = mix_hash(b << 24 | left << 16 | c1 << 8 | c2, 10)
    # what the match model expects
    out[50] = mix_hash(expected << 8 | min(length, 32), 11) if length else 0
    out[51] = mix_hash(expected << 8 | c1, 12) if length else c2 << 16 | c1


@dataclass(frozen=True)
class Plan:
    """Which parts of the coder run: ``contexts`` by number, match models, bitmap contexts, refinement; sizes of tables."""

    contexts: tuple[int, ...]
    pixels: bool = False
    matches: int = _MATCHES
    refine: bool = True
    rate: int = 150
    """Of the mixers in the end, in 1/65536."""
    boost: int = 600
    """So much faster are they at the beginning; it falls like 1024 / (1024 + n)."""
    final_rate: int = 120
    slot_limit: int = 30
    history_limit: int = 255
    apm_limit: int = 500
    start: int = 40000
    """Sum of the first weights of one kind of input."""

    def numbers(self) -> tuple[int, ...]:
        """What ``code`` wants to know beside the contexts."""
        return (
            int(self.pixels), self.matches, int(self.refine), self.rate, self.boost, self.final_rate, self.slot_limit,
            self.history_limit, self.apm_limit,
        )  # fmt: skip


@njit(cache=True, nogil=True)
def code(
    data, count, stream, decoding, plan, numbers, stride, row,
    table, histories, runs, match_maps, match_table, weights, final_weights, apm0, apm1, apm2, pixel_slots, pixel_maps,
):  # fmt: skip
    """Code ``count`` bytes of ``data`` into ``stream``, or the other way; length of the stream, -1 when it is full.

    The arrays from ``table`` on are made by ``_memory`` and are used up.
    """
    pixels, matches, refine, rate, boost, final_rate, slot_limit, history_limit, apm_limit = numbers
    contexts = len(plan)
    inputs_used = contexts * _INPUTS + _MATCHES * 2 + 1 + (PIXELS * 3 if pixels else 0)
    width = (inputs_used + 15) // 16 * 16
    inputs = np.zeros(width, np.int32)
    final = np.zeros(16, np.int32)
    hashes = np.zeros(CONTEXTS, np.int64)
    base = np.zeros(contexts, np.int64)
    first = np.zeros(contexts, np.int64)
    nibble = np.zeros(contexts, np.int64)
    history_at = np.zeros(contexts, np.int64)
    run_at = np.zeros(contexts, np.int64)
    run_byte = np.zeros(contexts, np.int64)
    run_length = np.zeros(contexts, np.int64)
    state = np.zeros(STATE, np.int64)
    stack = np.zeros(STACK, np.int64)
    set_at = np.zeros(_SETS, np.int64)
    set_p = np.zeros(_SETS, np.int64)
    match_pos = np.zeros(_MATCHES, np.int64)
    match_len = np.zeros(_MATCHES, np.int64)
    match_miss = np.zeros(_MATCHES, np.int64)
    match_at = np.zeros(_MATCHES, np.int64)
    match_bit = np.zeros(_MATCHES, np.int64)
    pixel_at = np.zeros(PIXELS, np.int64)
    pixel_map_at = np.zeros(PIXELS, np.int64)
    coder = np.zeros(4, np.int64)
    coder_start(coder, stream, decoding)
    match_mask = (len(match_table) >> 1) - 1
    apm_mask = len(apm1) // 33 - 1
    pixel_mask = (1 << _PIXEL_BITS) - 1
    for n in range(count):
        if n > 0:
            learn_text(state, stack, data, n)
        # match models
        for m in range(matches):
            least = 6 if m == 0 else 16
            if match_len[m] > 0 and data[match_pos[m]] == data[n - 1]:
                match_len[m] = min(match_len[m] + 1, 65535)
                match_pos[m] += 1
                match_miss[m] = match_miss[m] << 1 & 255
            elif match_len[m] > 0:
                match_miss[m] = (match_miss[m] << 1 | 1) & 255
                match_pos[m] += 1
                match_len[m] = 1
                if match_miss[m] & 15 == 15:
                    match_len[m] = 0
            if n >= least:
                h = np.int64(0)
                for k in range(1, least + 1):
                    h = ((h + data[n - k] + 1) * 0x2F0B4C47) & 0xFFFFFFFF
                at = m * (match_mask + 1) + ((h >> 5) & match_mask)
                if match_len[m] < least:
                    candidate = np.int64(match_table[at])
                    if candidate > 0:
                        length = 0
                        while length < 40 and candidate > length and data[candidate - 1 - length] == data[n - 1 - length]:
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
        expected = np.int64(data[match_pos[longest]]) if length > 0 else 0
        _contexts(hashes, data, n, state, stack, stride, row, expected, length)
        for i in range(contexts):
            hashes[plan[i]] = mix_hash(hashes[plan[i]], plan[i] + 1)
        c1 = np.int64(data[n - 1]) if n > 0 else 0
        c2 = np.int64(data[n - 2]) if n > 1 else 0
        above = np.int64(data[n - stride]) if n >= stride else 0
        phase = min(n % stride, 255)
        length_step = min(length, 15) if length < 16 else min(16 + ((length - 16) >> 3), 31)
        text_class = state[CLASSES] & 0xFF
        now = rate + boost * 1024 // (1024 + n)
        byte = np.int64(data[n])
        node = 1
        for position in range(8):
            if position == 0 or position == 4:
                for i in range(contexts):
                    h = hashes[plan[i]]
                    if position == 4:
                        h = mix_hash(h, node)
                    nibble[i] = h
                    fetch_bucket(table, h)
                for i in range(contexts):
                    at = find_bucket(table, nibble[i])
                    base[i] = at
                    if position == 0:
                        first[i] = at
                        run_byte[i] = table[at] & 255
                        run_length[i] = (table[at] >> 8) & 255
            local = node if position < 4 else (node & ((1 << (position - 4)) - 1)) | 1 << (position - 4)
            seen = 0
            k = 0
            for i in range(contexts):
                slot = table[base[i] + local]
                count_seen = (slot >> 8) & 63
                if count_seen == 0:
                    inputs[k] = 0
                    inputs[k + 1] = 0
                    inputs[k + 2] = 0
                    history_at[i] = -1
                else:
                    p = slot_p18(slot)
                    inputs[k] = STRETCH[p >> 6]
                    at = (i << 10) | (min(count_seen >> 3, 3) << 8) | (slot & 255)
                    history_at[i] = at
                    inputs[k + 1] = STRETCH[np.int64(histories[at]) >> 20]
                    inputs[k + 2] = (p - 131072) >> 9
                    if i < 8:
                        seen += 1
                run_at[i] = -1
                inputs[k + 3] = 0
                if run_length[i] > 0 and (run_byte[i] | 256) >> (8 - position) == node:
                    at = (i << 8) | (min(run_length[i], 31) << 3) | position
                    run_at[i] = at
                    s = STRETCH[np.int64(runs[at]) >> 20]
                    inputs[k + 3] = s if (run_byte[i] >> (7 - position)) & 1 else -s
                k += 4
            for m in range(matches):
                match_at[m] = -1
                inputs[k] = 0
                inputs[k + 1] = 0
                if match_len[m] > 0:
                    guess = np.int64(data[match_pos[m]])
                    if (guess | 256) >> (8 - position) == node:
                        match_bit[m] = (guess >> (7 - position)) & 1
                        step = min(match_len[m], 15) if match_len[m] < 16 else min(16 + ((match_len[m] - 16) >> 2), 31)
                        at = ((m << 5 | step) << 3 | (match_miss[m] & 7)) << 3 | position
                        match_at[m] = at
                        p = map_p16(match_maps[at])
                        s = stretch(p)
                        inputs[k] = s if match_bit[m] else -s
                        inputs[k + 1] = (p - 32768) >> 7 if match_bit[m] else (32768 - p) >> 7
                k += 2
            inputs[k] = 256
            k += 1
            if pixels:
                _pixel_contexts(pixel_at, data, n, row, node, position)
                for i in range(PIXELS):
                    at = (i << _PIXEL_BITS) | (mix_hash(pixel_at[i], i) & pixel_mask)
                    pixel_at[i] = at
                    slot = pixel_slots[at]
                    count_seen = (slot >> 8) & 63
                    if count_seen == 0:
                        inputs[k] = 0
                        inputs[k + 1] = 0
                        inputs[k + 2] = 0
                        pixel_map_at[i] = -1
                    else:
                        p = slot_p18(slot)
                        inputs[k] = STRETCH[p >> 6]
                        at = (i << 10) | (min(count_seen >> 3, 3) << 8) | (slot & 255)
                        pixel_map_at[i] = at
                        inputs[k + 1] = STRETCH[np.int64(pixel_maps[at]) >> 20]
                        inputs[k + 2] = (p - 131072) >> 9
                    k += 3
            set_at[0] = length_step << 3 | position
            set_at[1] = node
            set_at[2] = c1
            set_at[3] = seen << 3 | position
            set_at[4] = phase << 3 | position
            set_at[5] = text_class << 3 | position
            set_at[6] = above
            for k in range(_SETS):
                set_at[k] = (k * _SET_SIZE + set_at[k]) * width
                s = mix_dot(inputs, weights, set_at[k], width)
                final[k] = s
                set_p[k] = squash(s)
            final_at = (length_step << 3 | position) * 16
            other_at = (256 + node) * 16
            s1 = mix_dot(final, final_weights, final_at, 16)
            s2 = mix_dot(final, final_weights, other_at, 16)
            p1 = squash(s1)
            p2 = squash(s2)
            s = (s1 + s2) >> 1
            p = squash(s)
            if refine:
                a1 = mix_hash(node << 8 | c1, 0) & apm_mask
                a2 = mix_hash(node << 16 | c2 << 8 | c1, 1) & apm_mask
                r0 = apm_p16(apm0, node, s)
                r1 = apm_p16(apm1, a1, s)
                r2 = apm_p16(apm2, a2, s)
                p = (4 * p + r0 + r1 + 2 * r2 + 4) >> 3
            p = min(max(p, 1), 65535)
            bit = code_bit((byte >> (7 - position)) & 1, p, coder, stream, decoding)
            # learn
            for k in range(_SETS):
                mix_train(inputs, weights, set_at[k], width, bit, set_p[k], now)
            mix_train(final, final_weights, final_at, 16, bit, p1, final_rate)
            mix_train(final, final_weights, other_at, 16, bit, p2, final_rate)
            if refine:
                apm_next(apm0, node, s, bit, apm_limit)
                apm_next(apm1, a1, s, bit, apm_limit)
                apm_next(apm2, a2, s, bit, apm_limit)
            for i in range(contexts):
                at = base[i] + local
                table[at] = slot_next(table[at], bit, slot_limit)
                at = history_at[i]
                if at >= 0:
                    histories[at] = map_next(histories[at], bit, history_limit)
                at = run_at[i]
                if at >= 0:
                    runs[at] = map_next(runs[at], 1 if (run_byte[i] >> (7 - position)) & 1 == bit else 0, history_limit)
            for m in range(matches):
                if match_at[m] >= 0:
                    match_maps[match_at[m]] = map_next(match_maps[match_at[m]], 1 if match_bit[m] == bit else 0, 1023)
            if pixels:
                for i in range(PIXELS):
                    pixel_slots[pixel_at[i]] = slot_next(pixel_slots[pixel_at[i]], bit, 62)
                    if pixel_map_at[i] >= 0:
                        pixel_maps[pixel_map_at[i]] = map_next(pixel_maps[pixel_map_at[i]], bit, 1023)
            node = node << 1 | bit
        byte = node & 255
        data[n] = byte
        for i in range(contexts):
            head = np.int64(table[first[i]])
            length = (head >> 8) & 255
            length = min(length + 1, 255) if length > 0 and head & 255 == byte else 1
            table[first[i]] = np.int32((head & ~0xFFFF) | length << 8 | byte)
        if not decoding and coder[3] > len(stream):
            return -1
    return coder[3] if decoding else coder_finish(coder, stream)


@njit(cache=True)
def _window(data, at, size):
    """Bytes at-1, at, at+1 as 24 bits; 0 outside."""
    w = np.int64(0)
    for k in range(-1, 2):
        w = w << 8 | (np.int64(data[at + k]) if 0 <= at + k < size else 0)
    return w


@njit(cache=True)
def _pixel_contexts(out, data, n, row, node, position):
    """Neighbourhoods of the pixel ``position`` of byte ``n``, the most significant bit being the left one."""
    before = (np.int64(data[n - 1]) if n > 0 else 0) | (np.int64(data[n - 2]) << 8 if n > 1 else 0)
    left = ((before << 8 | (node << (8 - position) & 255)) >> (8 - position)) & 0xFFFFFF  # pixels x-1, x-2, ... from bit 0 up
    one = _window(data, n - row, n)
    two = _window(data, n - 2 * row, n)
    three = _window(data, n - 3 * row, n)
    shift = 15 - position  # bit of the pixel straight above in a window
    # a window cut: pixels x-a .. x+b
    r1 = one >> (shift - 7)  # x+7 at bit 0; x at bit 7
    r2 = two >> (shift - 7)
    r3 = three >> (shift - 7)
    out[0] = (left & 15) << 8 | (r1 >> 5 & 31) << 3 | (r2 >> 6 & 7)
    out[1] = (left & 3) << 16 | (r1 >> 6 & 7)
    out[2] = (left & 63) << 20 | (r1 >> 4 & 127) << 8 | (r2 >> 5 & 31)
    out[3] = (left & 255) << 20 | (r1 >> 3 & 511) << 8 | (r2 >> 4 & 127)
    out[4] = (left & 31) << 20 | (r1 >> 5 & 31) << 12 | (r2 >> 5 & 31) << 6 | (r3 >> 6 & 7)
    out[5] = (left & 0xFFF) << 12 | (r1 >> 5 & 31)
    out[6] = (left & 7) << 20 | (r1 >> 1 & 0x1FFF)
    out[7] = (r1 >> 5 & 31) << 20 | (r2 >> 5 & 31) << 10 | (r3 >> 5 & 31)
    out[8] = (left & 0x3FF) << 22 | (r1 >> 2 & 0x7FF) << 11 | (r2 >> 3 & 511)
    out[9] = (left & 0x3F) << 24 | (r1 >> 3 & 0x1FF) << 14 | (r2 >> 4 & 127) << 7 | (r3 >> 4 & 127)
    out[10] = left & 0xFFFF
    out[11] = (left & 1) << 20 | (r1 & 0x7FFF)


def _memory(plan: Plan, count: int) -> tuple[np.ndarray, ...]:
    """Fresh arrays for ``code`` over ``count`` bytes."""
    contexts = len(plan.contexts)
    need = max(count, 64) * contexts * 2
    buckets = 1 << min(max(need - 1, 1).bit_length(), 21)
    match_bits = min(max(count - 1, 1).bit_length() + 1, 20)
    inputs = contexts * _INPUTS + _MATCHES * 2 + 1 + (PIXELS * 3 if plan.pixels else 0)
    width = (inputs + 15) // 16 * 16
    apm_bits = min(max(count, 1).bit_length(), 16)
    pixels = PIXELS if plan.pixels else 0
    weights = np.zeros(width, np.int32)
    weights[:inputs] = plan.start // max(contexts, 1)
    return (
        bucket_table(buckets), primed_histories(contexts),
        np.full(max(contexts, 1) << 8, np.uint32(3 << 30), np.uint32), np.full(_MATCHES << 11, np.uint32(3 << 30), np.uint32),
        np.zeros(_MATCHES << match_bits, np.int32), np.tile(weights, _SETS * _SET_SIZE),
        np.tile(np.array([65536 // _SETS] * _SETS + [0] * (16 - _SETS), np.int32), 512),
        apm_table(256), apm_table(1 << apm_bits), apm_table(1 << apm_bits),
        np.zeros(pixels << _PIXEL_BITS, np.int32), primed_histories(pixels),
    )  # fmt: skip


def primed_histories(rows: int) -> np.ndarray:
    """Start of the history maps: (ones + 0.4) / (bits + 0.8) with the last bit counted twice."""
    out = np.full(rows << 10, MAP_START, np.uint32)
    for history in range(1, 256):
        size = history.bit_length() - 1
        bits = [history >> k & 1 for k in range(size)]
        ones, total = sum(bits) + (bits[0] if bits else 0), size + (1 if bits else 0)
        p = (10 * ones + 4) * (1 << 22) // (10 * total + 8)
        for step in range(4):
            out[(step << 8) + history :: 1 << 10] = p << 10
    return out


GENERAL, RECORDS, BITMAP, PICTURE, AUDIO, MACHINE = range(6)
"""Kinds of data. ``stride`` and ``row``: bytes of a record and of a line of records; row of a bitmap; bytes of a pixel and of a
row of a picture; bytes of a sample of all channels, and of one channel's; 4 and anything for machine code."""

# contexts by kind, the most useful first; an effort takes as many as _COUNTS says
_ORDER = {
    GENERAL: (
        1, 2, 3, 4, 6, 8, 9, 5, 18, 12, 11, 22, 14, 7, 25, 17, 50, 10, 51, 0, 13, 15, 16, 19, 20, 27, 21, 28, 23, 24, 26, 29,
        30,
    ),
    RECORDS: (
        1, 2, 3, 4, 32, 35, 31, 6, 38, 22, 33, 50, 36, 41, 25, 37, 0, 34, 39, 42, 5, 51, 40, 27, 21, 28, 7, 23, 24, 26, 29, 30,
    ),
    BITMAP: (1, 2, 43, 44, 3, 32, 50, 4, 31, 6, 0, 33, 51, 46),
    PICTURE: (43, 44, 45, 1, 2, 48, 47, 31, 32, 50, 46, 35, 3, 49, 40, 4, 33, 38, 51, 42, 41, 36),
    AUDIO: (1, 2, 31, 32, 35, 33, 40, 43, 36, 3, 41, 42, 50, 34, 38, 4, 51, 44, 45),
    MACHINE: (
        1, 2, 3, 4, 6, 22, 25, 31, 32, 8, 5, 38, 50, 27, 35, 28, 0, 12, 26, 29, 30, 33, 21, 51, 41, 7, 36, 23, 24, 40, 39, 37,
        34,
    ),
}  # fmt: skip
_COUNTS = {1: 5, 2: 6, 3: 8, 4: 14, 5: 22, 6: 26, 7: 29, 8: 31, 9: 33}


def plan_of(effort: int, kind: int) -> Plan:
    """The parts that an effort 1..9 runs on a kind of data."""
    contexts = _ORDER[kind][: _COUNTS[effort]]
    return Plan(contexts, pixels=kind == BITMAP, matches=1 if effort < 4 else 2, refine=effort > 1)


def _run(data: np.ndarray, stream: np.ndarray, decoding: bool, plan: Plan, stride: int, row: int) -> int:
    memory = _memory(plan, len(data))
    return code(
        data, len(data), stream, decoding, np.array(plan.contexts, np.int64), plan.numbers(), stride, row, *memory,
    )  # fmt: skip


def encode(data: np.ndarray, plan: Plan, stride: int = 4, row: int = 16, room: int | None = None) -> bytes | None:
    """Bytes (uint8) -> stream; None when it would be longer than ``room`` (default: the length of the data)."""
    stream = np.zeros((len(data) if room is None else room) + 8, np.uint8)
    size = _run(data.copy(), stream, False, plan, stride, row)
    return stream[:size].tobytes() if 0 <= size <= len(stream) - 8 else None


def decode(stream: bytes, count: int, plan: Plan, stride: int = 4, row: int = 16) -> np.ndarray:
    """Stream -> ``count`` bytes (uint8). Damage gives other bytes, which a checksum must find; CorruptStream if it is seen."""
    data = np.zeros(count, np.uint8)
    used = _run(data, np.frombuffer(stream, np.uint8).copy(), True, plan, stride, row)
    if not used - 4 <= len(stream) <= used:
        raise CorruptStream(f"{len(stream)} bytes of code where the data end after {used}")
    return data


def is_compiled() -> bool:
    """Whether the coder has been compiled on this machine before, so that it starts at once."""
    cache = getattr(code, "_cache", None)
    return bool(code.signatures) or os.path.exists(getattr(getattr(cache, "_cache_file", None), "_index_path", ""))
