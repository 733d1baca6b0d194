"""Parts of context-mixing coders, in integers only: binary arithmetic coder, adaptive counters, hashed contexts, mixers.

A coder is one compiled function that runs over a whole block: it holds these arrays and calls these functions for every bit.
Nothing here is a float, so the same bytes come out on every machine. Units:

* probability: that the next bit is 1. ``p16`` has 16 bits (1..65535), ``p22`` 22 bits;
* stretch domain: ln(p / (1 - p)) in 1/256, -CLAMP..CLAMP;
* weights: 1.0 is 65536.

The scheme is that of the PAQ family (Mahoney, "Adaptive weighing of context models for lossless data compression", 2005).
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

CLAMP = 2815
"""Largest |stretch| that is mixed: p = 1 - 1/59874."""
BUCKET = 16
"""Words of a hash bucket (64 bytes, a cache line): a head and the 15 nodes of a nibble."""
SLOT_LIMIT = 63
MAP_LIMIT = 1023
COUNTER_HALF = 1 << 17
MAP_START = np.uint32(1 << 31)
"""An adaptive map entry that has seen nothing: p = 1/2, count 0."""
APM_STEPS = 33


def _tables() -> tuple[np.ndarray, ...]:
    """Exact roundings of the formulas; ``decimal`` computes them alike everywhere, which a C library's exp does not."""
    with localcontext() as context:
        context.prec = 30
        squash = [int((65536 / (1 + (-Decimal(s) / 256).exp())).to_integral_value()) for s in range(-CLAMP, CLAMP + 1)]
        odds = [Decimal(2 * i + 1) / (8191 - 2 * i) for i in range(4096)]
        stretch = [int((256 * o.ln()).to_integral_value()) for o in odds]
    slot = [(65536 * 10) // (10 * n + 16) for n in range(SLOT_LIMIT + 1)]
    counted = [(65536 * 10) // (10 * n + 15) for n in range(MAP_LIMIT + 1)]
    return (
        np.array(squash, np.int32).clip(1, 65535), np.array(stretch, np.int32),
        np.array(slot, np.int32), np.array(counted, np.int32),
    )  # fmt: skip


SQUASH, STRETCH, SLOT_RATE, MAP_RATE = _tables()
"""SQUASH[s + CLAMP] = p16; STRETCH[p >> 4] of a p16; rates 65536 / (n + 1.6) and 65536 / (n + 1.5)."""


# --- ends of the binary arithmetic coder, see entropy/binary.py -------------------------------------------------------
# state int64[4]: low, high, code (decoder), position in the buffer


@njit(cache=True)
def coder_start(state, buffer, decoding):
    """Set up ``state`` int64[4] for a fresh ``buffer`` (uint8: to be filled, or to be read)."""
    state[0] = 0
    state[1] = 0xFFFFFFFF
    state[2] = 0
    state[3] = 0
    if decoding:
        for _ in range(4):
            state[2] = (state[2] << 8) | (buffer[state[3]] if state[3] < len(buffer) else 0)
            state[3] += 1


@njit(cache=True)
def coder_finish(state, buffer):
    """Write the shortest tail that decodes whatever follows as zeros; the length of the stream."""
    low, high, at = state[0], state[1], state[3]
    for size in range(5):
        shift = 32 - 8 * size
        value = ((low + (1 << shift) - 1) >> shift) << shift
        if value <= high:
            for k in range(size):
                if at < len(buffer):
                    buffer[at] = (value >> (24 - 8 * k)) & 255
                at += 1
            break
    state[3] = at
    return at


# --- stretch and squash -----------------------------------------------------------------------------------------------


@njit(cache=True)
def squash(s):
    """Stretch domain -> p16."""
    if s > CLAMP:
        s = CLAMP
    elif s < -CLAMP:
        s = -CLAMP
    return SQUASH[s + CLAMP]


@njit(cache=True)
def stretch(p16):
    """p16 -> stretch domain, in steps of 1/4096 of probability (-2306..2306)."""
    return STRETCH[p16 >> 4]


# --- hashed contexts --------------------------------------------------------------------------------------------------
# A table is int32[buckets * 16], buckets a power of two. Word 0 of a bucket: check (16 bits), then two bytes for the user;
# words 1..15: slots of the nodes of a nibble (1; 2-3; 4-7; 8-15 as its bits come). A slot: probability - 1/2 (18 bits,
# signed), count (6), the last up to seven bits behind a leading 1 (8). Zero is a slot that has seen nothing.


@njit(cache=True)
def mix_hash(a, b):
    """A new 32-bit hash of a hash and a value."""
    h = (np.uint64(a) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(b) + np.uint64(1)) * np.uint64(0xD6E8FEB86659FD93)
    return np.int64((h >> np.uint64(32)) & np.uint64(0xFFFFFFFF))


def bucket_table(buckets: int) -> np.ndarray:
    """An empty table. Written to at once: fresh memory comes in huge pages then, which saves a tenth of the time."""
    table = np.empty(buckets * BUCKET, np.int32)
    table[:] = 0
    return table


@intrinsic
def _prefetch(typing, array, index):
    def generate(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [place, number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@njit(cache=True)
def bucket_place(table, h):
    """Where the bucket of hash ``h`` (32 bits) is looked for first."""
    return ((h * 0x2C1B3C6D) >> 12 & ((len(table) >> 4) - 1)) << 4


@njit(cache=True)
def fetch_bucket(table, h):
    """Let the memory bring the bucket of a hash while other work is done: do this for all contexts, then ``find_bucket``.

    Changes nothing but the time, which is half of the whole otherwise.
    """
    at = np.int64(bucket_place(table, h))
    _prefetch(table, at)
    _prefetch(table, at ^ BUCKET)


@njit(cache=True)
def find_bucket(table, h):
    """Index of the bucket of hash ``h`` (32 bits). Where it is not there, the less used of two candidates is cleared."""
    check = h & 0xFFFF
    at = bucket_place(table, h)
    if (table[at] >> 16) & 0xFFFF == check:
        return at
    other = at ^ BUCKET
    if (table[other] >> 16) & 0xFFFF == check:
        return other
    if (table[other + 1] >> 8) & SLOT_LIMIT < (table[at + 1] >> 8) & SLOT_LIMIT:
        at = other
    for k in range(1, BUCKET):
        table[at + k] = 0
    table[at] = np.int32(np.uint32(check << 16))
    return at


@njit(cache=True)
def slot_p18(slot):
    """Probability of a slot, 18 bits."""
    return (slot >> 14) + COUNTER_HALF


@njit(cache=True)
def slot_next(slot, bit, limit):
    """A slot after ``bit``. The rate is 1/(n + 1.6) up to a count of ``limit`` (<= 63)."""
    n = (slot >> 8) & SLOT_LIMIT
    centred = slot >> 14
    centred += (((bit << 18) - bit - COUNTER_HALF - centred) * np.int64(SLOT_RATE[n])) >> 16
    if n < limit:
        n += 1
    history = slot & 255
    history = ((history if history else 1) << 1) | bit
    if history > 255:
        history = (history & 127) | 128
    return np.int32((centred << 14) | (n << 8) | history)


# --- adaptive maps: uint32 entries of 22 bits probability and 10 bits count -------------------------------------------


@njit(cache=True)
def map_next(entry, bit, limit):
    """A map's entry after ``bit``. The rate is 1/(n + 1.5) up to a count of ``limit`` (<= 1023)."""
    value = np.int64(entry)
    n = value & MAP_LIMIT
    p = value >> 10
    p += (((bit << 22) - bit - p) * np.int64(MAP_RATE[n])) >> 16
    if n < limit:
        n += 1
    return np.uint32((p << 10) | n)


@njit(cache=True)
def map_p16(entry):
    """Probability of a map's entry."""
    return np.int64(entry) >> 16


# --- mixers -----------------------------------------------------------------------------------------------------------
# weights int32[sets * width]; inputs int32[width] in the stretch domain; unused inputs are 0


@njit(cache=True)
def mix_dot(inputs, weights, at, width):
    """Mix in the stretch domain with the weight set that begins at ``at``: clamped to +-CLAMP."""
    total = np.int64(0)
    chosen = weights[at : at + width]  # a slice: an index with an offset would not be vectorised
    for i in range(width):
        total += np.int64(inputs[i]) * np.int64(chosen[i])
    total >>= 16
    return min(max(total, -CLAMP), CLAMP)


@njit(cache=True)
def mix_train(inputs, weights, at, width, bit, p16, rate):
    """Move a weight set towards ``bit`` where it predicted ``p16``; ``rate`` in 1/65536 (about 100 to 1500)."""
    error = np.int32((((bit << 16) - bit - p16) * rate) >> 12)
    chosen = weights[at : at + width]
    for i in range(width):
        chosen[i] = np.int32(chosen[i] + (np.int32(np.int32(inputs[i] * error) + np.int32(2048)) >> np.int32(12)))


# --- secondary estimation: uint32[contexts * 33] entries of adaptive maps over the stretch domain ---------------------


def apm_table(contexts: int) -> np.ndarray:
    """A table that changes nothing yet, (contexts * 33,) uint32."""
    steps = [min(max((k - 16) * CLAMP // 16, -CLAMP), CLAMP) for k in range(APM_STEPS)]
    row = [int(SQUASH[s + CLAMP]) << 16 for s in steps]
    return np.tile(np.array(row, np.uint32), contexts)


@njit(cache=True)
def apm_place(s):
    """(step, weight of the next step in 1/4096) of a stretched probability."""
    at = (s + CLAMP) * 32 * 4096 // (2 * CLAMP)
    step = at >> 12
    if step > 31:
        return 31, 4095
    return step, at & 4095


@njit(cache=True)
def apm_p16(table, context, s):
    """Refined probability of a stretched one in a context."""
    step, weight = apm_place(s)
    at = context * APM_STEPS + step
    p = ((np.int64(table[at]) >> 10) * (4096 - weight) + (np.int64(table[at + 1]) >> 10) * weight) >> 18
    return min(max(p, 1), 65535)


@njit(cache=True)
def apm_next(table, context, s, bit, limit):
    """Teach the nearer of the two entries that ``apm_p16`` used."""
    step, weight = apm_place(s)
    at = context * APM_STEPS + step + (weight >> 11)
    table[at] = map_next(table[at], bit, limit)
