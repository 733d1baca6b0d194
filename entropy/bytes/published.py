"""The token-level mixture of Nacrith (arXiv 2602.19626): language model, n-grams, LZP, mixer, bias head, skip, CDF, coder.

    n-gram orders 0-4 --+--> sure of itself? then it codes alone and the language model is not asked ("skip")
    LZP orders 8-4 -----+
    language model --> + bias head --> softmax --+--> linear mixture --> counts of sum 2**24 --> 32-bit arithmetic coder

Everything from the language model's logits on is integers (log2 units on a grid, table exp2 and log2, exact sums), so the file
is as portable as the logits are. The counts of the n-grams are sparse: only what was seen is added to two dense passes over the
alphabet, where the published program makes more than twenty over float64 arrays.

Numbers: ``Q24`` means units of 2**-24. Logits and biases are log2 probabilities up to a constant. A symbol is a place in the
alphabet; the last place is the escape, which announces a byte that no token has.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from ...container.errors import CorruptStream

BITS = 24
TOTAL = 1 << BITS
ORDERS = 4
LZP_LOW, LZP_HIGH = 4, 8
LZP_SLOTS = 1 << 20
LARGEST_ALPHABET = 1 << 20
_KEY = np.uint64(49157)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_ESCAPE_COST = 30 << 24  # Q24: how far below the likeliest token the escape starts
_LEAST = 2749  # 1e-8 in Q38: what a model is charged for at most

# places in Mixture.scalars
_SEEN, _TOTAL0, _SUM_LOG, _LISTED, _G0, _GUESS, _Z, _STAMP = range(8)
# places in Mixture.options
_ORDER, _LZP, _BIAS, _ETA, _RATE, _SKIP, _WARMUP, _SYMBOLS, _ENTRIES = range(9)
# rows of Mixture.books
_USED, _OLDEST, _FREE, _NODES = range(4)


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """2**(k/4096) in Q30 and log2(1 + k/4096) in Q16; ``decimal`` rounds them alike everywhere."""
    with localcontext() as context:
        context.prec = 40
        two = Decimal(2).ln()
        exp2 = [int(((two * k / 4096).exp() * (1 << 30)).to_integral_value()) for k in range(4096)]
        log2 = [int(((1 + Decimal(k) / 4096).ln() / two * (1 << 16)).to_integral_value()) for k in range(4096)]
    return np.array(exp2, np.int64), np.array(log2, np.int64)


EXP2, LOG2 = _tables()


@dataclass(frozen=True)
class Settings:
    """Every number that the decoder must know; the header fixes all of them. Defaults: the published ones.

    Rates, weights and LZP's confidence are millionths, the temperature 1/10000, the entropy below which the language model is
    skipped 1/1000 bit. ``context``, ``keep``, ``sink`` and ``batch`` say how the language model is fed: when its context of
    so many tokens is full, the first ``sink`` and the last ``keep`` of them stay; it is given at most ``batch`` at once.
    """

    ngram: int = 1
    order: int = ORDERS
    contexts: int = 500_000
    entries: int = 64
    nodes: int = 2_000_000
    lzp: int = 0
    lzp_confidence: int = 850_000
    lzp_share: int = 300_000
    weight: int = 850_000
    rate: int = 500_000
    bias: int = 1
    bias_rate: int = 1000
    skip: int = 1
    skip_entropy: int = 1500
    warmup: int = 100
    temperature: int = 10_000
    context: int = 2048
    keep: int = 1536
    sink: int = 1
    batch: int = 32

    def __post_init__(self) -> None:
        for field in fields(self):
            low, high = _RANGES[field.name]
            value = getattr(self, field.name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{field.name} {value!r} is outside of {low}..{high}")
        if self.sink + self.keep + self.batch > self.context:
            raise ValueError("sink, keep and batch together are longer than the context")

    def to_header(self) -> dict[str, int]:
        """For a stream's header: what differs from ``DEFAULTS``, which belong to the format and never change."""
        return {k: v for k, v in asdict(self).items() if v != DEFAULTS[k]}

    @classmethod
    def from_header(cls, header: Any) -> Settings:
        """Back from ``to_header``. CorruptStream when something is unknown or out of range."""
        if not isinstance(header, dict) or not set(header) <= set(DEFAULTS):
            raise CorruptStream("header: unknown settings of the token mixture; a newer version may read this file")
        try:
            return cls(**(DEFAULTS | header))
        except ValueError as error:
            raise CorruptStream(f"header: {error}") from None


_MILLION = (0, 1_000_000)
# a stranger's header may ask for so much memory and no more
_RANGES = {
    "ngram": (0, 1), "order": (0, ORDERS), "contexts": (1, 1_000_000), "entries": (1, 1024), "nodes": (1, 4_000_000),
    "lzp": (0, 1), "lzp_confidence": _MILLION, "lzp_share": _MILLION, "weight": (1, 999_999), "rate": _MILLION,
    "bias": (0, 1), "bias_rate": _MILLION, "skip": (0, 1), "skip_entropy": (0, 20_000), "warmup": (0, 1 << 40),
    "temperature": (100, 1_000_000), "context": (4, 32_768), "keep": (1, 32_768), "sink": (0, 64), "batch": (1, 1024),
}  # fmt: skip


DEFAULTS = asdict(Settings())


class Mixture(NamedTuple):
    """State of the mixture, all in arrays so that compiled code can work on it. A symbols, K orders, C contexts, P nodes."""

    options: np.ndarray
    scalars: np.ndarray
    ids: np.ndarray  # (A - 1,) the token id of each symbol
    bias: np.ndarray  # (A,) Q24
    counts: np.ndarray  # (A,) order 0
    e: np.ndarray  # (A,) 2**x of the language model, Q30 of the largest
    sparse: np.ndarray  # (A,) Q38: what orders 1..K add to a symbol's probability
    mark: np.ndarray  # (A,) step at which a symbol was last listed
    listed: np.ndarray  # symbols that some context has seen
    cdf: np.ndarray  # (A + 1,)
    history: np.ndarray  # (8,) the last symbols, newest first
    logs: np.ndarray  # (3,) Q16 log2 weights of language model, n-gram, LZP
    weights: np.ndarray  # (3,) Q16, sum 1
    constants: np.ndarray  # LZP's confidence and share, Q16; skip threshold, Q54
    found: np.ndarray  # (K,) context of each order now, or -1
    keys: np.ndarray  # (K, C) contexts in the order of their first use, a ring
    slots: np.ndarray  # (K, 2**n) hash table: place in ``keys`` + 1
    head: np.ndarray  # (K, C) first node
    tail: np.ndarray
    sizes: np.ndarray
    totals: np.ndarray
    symbols: np.ndarray  # (K, P) nodes: symbol, its count, the next node
    tally: np.ndarray
    follow: np.ndarray
    books: np.ndarray  # (4, K) contexts used, the oldest, first free node, nodes ever used
    lzp_keys: np.ndarray
    lzp_next: np.ndarray


def mixture(settings: Settings, ids: np.ndarray, longest: int) -> Mixture:
    """A fresh mixture over tokens ``ids`` (n,) and the escape, for at most ``longest`` symbols. ValueError for too many ids."""
    a = len(ids) + 1
    if not 2 <= a <= LARGEST_ALPHABET:
        raise ValueError(f"a vocabulary of {a - 1} tokens cannot be coded")
    order = settings.order if settings.ngram else 0
    k, c = max(order, 1), min(settings.contexts, longest + 1)
    p = min(settings.nodes, longest + 1)
    slots = 1 << (2 * c - 1).bit_length()
    eta = settings.bias_rate * 24_204_406 // 1_000_000  # Q24, times log2(e)
    options = [order if settings.ngram else -1, settings.lzp, settings.bias, eta, settings.rate,
               settings.skip, settings.warmup, a, settings.entries]  # fmt: skip
    constants = [settings.lzp_confidence * 65536 // 1_000_000, settings.lzp_share * 65536 // 1_000_000,
                 settings.skip_entropy * (1 << 54) // 1000]  # fmt: skip
    made = Mixture(
        np.array(options, np.int64), np.zeros(8, np.int64), np.asarray(ids, np.int32), np.zeros(a, np.int64),
        np.zeros(a, np.int64), np.zeros(a, np.int64), np.zeros(a, np.int64), np.zeros(a, np.int64),
        np.zeros(k * settings.entries, np.int64), np.zeros(a + 1, np.int64), np.zeros(LZP_HIGH, np.int64),
        np.zeros(3, np.int64), np.zeros(3, np.int64), np.array(constants, np.int64), np.full(k, -1, np.int64),
        np.zeros((k, c), np.uint64), np.zeros((k, slots), np.int32), np.zeros((k, c), np.int32), np.zeros((k, c), np.int32),
        np.zeros((k, c), np.int32), np.zeros((k, c), np.int32), np.zeros((k, p), np.int32), np.zeros((k, p), np.int32),
        np.zeros((k, p), np.int32), np.zeros((4, k), np.int64),
        np.zeros(LZP_SLOTS if settings.lzp else 1, np.uint64), np.full(LZP_SLOTS if settings.lzp else 1, -1, np.int32),
    )  # fmt: skip
    made.books[_FREE] = -1
    made.scalars[_TOTAL0] = a  # every symbol counts 1 from the start
    made.scalars[_GUESS] = -1
    others = settings.ngram + settings.lzp
    share = (65536 - settings.weight * 65536 // 1_000_000) // max(others, 1)
    for j, on in enumerate((1, settings.ngram, settings.lzp)):
        w = (65536 - share * others) if j == 0 else share * on
        made.logs[j] = log2_of(max(w, 1)) - (16 << 16) if on else _OFF
    _set_weights(made)
    return made


_OFF, _LOWEST = -(1 << 40), -(1 << 39)


# --- exact functions --------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def log2_of(v):
    """log2 of an integer v >= 1 in Q16, to 2**-11."""
    n = 0
    t = v
    for shift in (32, 16, 8, 4, 2, 1):
        if t >> shift:
            t >>= shift
            n += shift
    fraction = (v >> (n - 12)) & 4095 if n >= 12 else (v << (12 - n)) & 4095
    return (n << 16) + LOG2[fraction]


@njit(cache=True, nogil=True)
def exp2_of(x):
    """2**x in Q30 of x <= 0 in Q24."""
    down = -(x >> 24)
    if down > 31:
        return 0
    return EXP2[(x >> 12) & 4095] >> down


@njit(cache=True, nogil=True)
def _set_weights(m):
    """Weights from their logarithms; the largest gets what rounding leaves."""
    top = m.logs.max()
    e = np.zeros(3, np.int64)
    for j in range(3):
        if m.logs[j] > _OFF:
            m.logs[j] = max(m.logs[j] - top, _LOWEST)
        e[j] = exp2_of(max(m.logs[j], -(64 << 16)) << 8)
    best = int(e.argmax())
    left = 65536
    for j in range(3):
        m.weights[j] = 0 if j == best else (e[j] << 16) // e.sum()
        left -= m.weights[j]
    m.weights[best] += left


# --- n-grams ----------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _home(key, n):
    """Where the search for a key begins in a hash table of ``n`` (a power of two) places."""
    return np.int64(((key * _SPREAD) >> np.uint64(32)) & np.uint64(n - 1))


@njit(cache=True, nogil=True)
def _key_of(m, k):
    """Key of the last ``k`` symbols."""
    h = np.uint64(0)
    for i in range(k - 1, -1, -1):
        h = h * _KEY + np.uint64(m.history[i])
    return h


@njit(cache=True, nogil=True)
def _find(m, row, key):
    slots = m.slots[row]
    at = _home(key, len(slots))
    while slots[at]:
        if m.keys[row, slots[at] - 1] == key:
            return np.int64(slots[at] - 1)
        at = (at + 1) & (len(slots) - 1)
    return np.int64(-1)


@njit(cache=True, nogil=True)
def _forget(m, row, key):
    """Take a key out of the hash table; later ones of its cluster move up."""
    slots = m.slots[row]
    mask = len(slots) - 1
    at = _home(key, len(slots))
    while m.keys[row, slots[at] - 1] != key:
        at = (at + 1) & mask
    hole = at
    while True:
        at = (at + 1) & mask
        if not slots[at]:
            break
        home = _home(m.keys[row, slots[at] - 1], len(slots))
        if (at - home) & mask >= (at - hole) & mask:
            slots[hole] = slots[at]
            hole = at
    slots[hole] = 0


@njit(cache=True, nogil=True)
def _context(m, row, key):
    """A new context; the oldest one goes when all are used."""
    if m.books[_USED, row] < m.keys.shape[1]:
        c = m.books[_USED, row]
        m.books[_USED, row] += 1
    else:
        c = m.books[_OLDEST, row]
        m.books[_OLDEST, row] = (c + 1) % m.keys.shape[1]
        _forget(m, row, m.keys[row, c])
        if m.sizes[row, c]:
            m.follow[row, m.tail[row, c]] = m.books[_FREE, row]
            m.books[_FREE, row] = m.head[row, c]
    m.keys[row, c] = key
    m.sizes[row, c] = 0
    m.totals[row, c] = 0
    slots = m.slots[row]
    at = _home(key, len(slots))
    while slots[at]:
        at = (at + 1) & (len(slots) - 1)
    slots[at] = c + 1
    return c


@njit(cache=True, nogil=True)
def _append(m, row, c, node):
    m.follow[row, node] = -1
    if m.sizes[row, c]:
        m.follow[row, m.tail[row, c]] = node
    else:
        m.head[row, c] = node
    m.tail[row, c] = node
    m.sizes[row, c] += 1


@njit(cache=True, nogil=True)
def _count(m, row, c, symbol):
    """Count a symbol in a context. A full one gives up its oldest symbol of count 1, or else takes no new one."""
    before, single, before_single = -1, -1, -1
    node = m.head[row, c] if m.sizes[row, c] else -1
    while node >= 0:
        if m.symbols[row, node] == symbol:
            m.tally[row, node] += 1
            m.totals[row, c] += 1
            return
        if single < 0 and m.tally[row, node] == 1:
            single, before_single = node, before
        before = node
        node = m.follow[row, node]
    if m.sizes[row, c] >= m.options[_ENTRIES]:
        if single < 0:
            return
        if before_single < 0:
            m.head[row, c] = m.follow[row, single]
        else:
            m.follow[row, before_single] = m.follow[row, single]
        if m.tail[row, c] == single:
            m.tail[row, c] = before_single
        m.sizes[row, c] -= 1
        m.totals[row, c] -= 1
        node = single
    elif m.books[_FREE, row] >= 0:
        node = m.books[_FREE, row]
        m.books[_FREE, row] = m.follow[row, node]
    elif m.books[_NODES, row] < m.symbols.shape[1]:
        node = m.books[_NODES, row]
        m.books[_NODES, row] += 1
    else:
        return
    m.symbols[row, node] = symbol
    m.tally[row, node] = 1
    _append(m, row, c, node)
    m.totals[row, c] += 1


@njit(cache=True, nogil=True)
def look_up(m):
    """What n-grams and LZP expect next. True when the n-grams are so sure that the language model is not asked.

    With the T_k counts of an order's context: p_k = c_k / (T_k + 5) + 5 / (T_k + 5) * p_(k-1), and p_0 = (c_0 + 1) / (N + A).
    The sum is written out: a factor for the counts of each order, ``_G0`` (Q48) for those of order 0.
    """
    s = m.scalars
    for i in range(s[_LISTED]):
        m.sparse[m.listed[i]] = 0
    s[_LISTED] = 0
    s[_STAMP] += 1
    scale = np.int64(1) << 48
    for k in range(min(m.options[_ORDER], s[_SEEN]), 0, -1):
        c = _find(m, k - 1, _key_of(m, k))
        m.found[k - 1] = c
        if c < 0 or not m.totals[k - 1, c]:
            continue
        total = np.int64(m.totals[k - 1, c])
        factor = scale // (total + 5)
        scale = factor * 5
        node = m.head[k - 1, c]
        while node >= 0:
            symbol = m.symbols[k - 1, node]
            m.sparse[symbol] += (factor * m.tally[k - 1, node]) >> 10
            if m.mark[symbol] != s[_STAMP]:
                m.mark[symbol] = s[_STAMP]
                m.listed[s[_LISTED]] = symbol
                s[_LISTED] += 1
            node = m.follow[k - 1, node]
    s[_G0] = scale // s[_TOTAL0]
    s[_GUESS] = -1
    if m.options[_LZP]:
        for k in range(min(LZP_HIGH, s[_SEEN]), LZP_LOW - 1, -1):
            key, at = _lzp_place(m, k)
            if m.lzp_next[at] >= 0 and m.lzp_keys[at] == key:
                s[_GUESS] = m.lzp_next[at]
                break
    if m.options[_SKIP] == 0 or m.options[_ORDER] < 0 or s[_SEEN] < m.options[_WARMUP]:
        return False
    return entropy(m) < m.constants[2]


@njit(cache=True, nogil=True)
def entropy(m):
    """Entropy of the n-gram distribution in bits, Q54. Symbols that no context has seen are summed in one go."""
    s = m.scalars
    bits, seen, seen_logs = np.int64(0), np.int64(0), np.int64(0)
    for i in range(s[_LISTED]):
        symbol = m.listed[i]
        c = m.counts[symbol] + 1
        p = m.sparse[symbol] + ((c * s[_G0]) >> 10)
        if p:
            bits += p * ((38 << 16) - log2_of(p))
        seen += c
        seen_logs += c * log2_of(c)
    if s[_G0]:
        rest = (s[_TOTAL0] - seen) * ((48 << 16) - log2_of(s[_G0])) - (s[_SUM_LOG] - seen_logs)
        bits += s[_G0] * (max(rest, 0) >> 10)
    return bits


@njit(cache=True, nogil=True)
def _lzp_place(m, k):
    key = (_key_of(m, k) * np.uint64(31) + np.uint64(k)) * _SPREAD
    return key, np.int64(key >> np.uint64(40)) & (len(m.lzp_keys) - 1)


# --- distribution -----------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def _ngram_p(m, symbol):
    """Probability of a symbol for the n-grams, Q38."""
    return (((m.counts[symbol] + 1) * m.scalars[_G0]) >> 10) + m.sparse[symbol]


@njit(cache=True, nogil=True)
def _lzp_p(m, symbol):
    """Probability of a symbol for LZP, Q38: uniform without a guess."""
    a = m.options[_SYMBOLS]
    if m.scalars[_GUESS] < 0:
        return (np.int64(1) << 38) // a
    if symbol == m.scalars[_GUESS]:
        return m.constants[0] << 22
    return ((65536 - m.constants[0]) << 22) // (a - 1)


@njit(cache=True, nogil=True)
def set_cdf(m, logits, asked):
    """Fill ``m.cdf``: A + 1 integers from 0 to 2**24, each step at least 1. ``logits`` (vocabulary,) int32 Q16 if ``asked``."""
    s, a = m.scalars, m.options[_SYMBOLS]
    w_ngram, w_lzp, factor = np.int64(0), np.int64(0), np.int64(0)
    if asked:
        warm = s[_SEEN] >= m.options[_WARMUP]
        biased = warm and m.options[_BIAS]
        top = np.int64(-(1 << 62))
        for i in range(a - 1):
            x = np.int64(logits[m.ids[i]]) << 8
            if biased:
                x += m.bias[i]
            m.e[i] = x
            top = max(top, x)
        m.e[a - 1] = top - _ESCAPE_COST + (m.bias[a - 1] if biased else 0)
        top = max(top, m.e[a - 1])
        z = np.int64(0)
        for i in range(a):
            m.e[i] = exp2_of(m.e[i] - top)
            z += m.e[i]
        s[_Z] = z
        w_model = np.int64(65536)
        if warm:
            w_model, w_ngram, w_lzp = m.weights[0], m.weights[1], m.weights[2]
        factor = (w_model << 46) // z
    elif m.options[_LZP]:
        w_lzp = m.constants[1]
        w_ngram = 65536 - w_lzp
    else:
        w_ngram = np.int64(65536)
    miss = (np.int64(1) << 38) // a if s[_GUESS] < 0 else ((65536 - m.constants[0]) << 22) // (a - 1)
    miss = (miss * w_lzp) >> 16
    share = TOTAL - a
    g0 = s[_G0]
    total, largest, best = np.int64(0), np.int64(-1), 0
    for i in range(a):
        p = miss
        if asked:
            p += (m.e[i] * factor) >> 24
        if w_ngram:
            p += (((((m.counts[i] + 1) * g0) >> 10) + m.sparse[i]) * w_ngram) >> 16
        if i == s[_GUESS]:
            p += ((m.constants[0] << 22) * w_lzp >> 16) - miss
        n = ((p * share) >> 38) + 1
        m.cdf[i + 1] = n
        total += n
        if n > largest:
            largest, best = n, i
    m.cdf[best + 1] += TOTAL - total
    for i in range(a):
        m.cdf[i + 1] += m.cdf[i]


@njit(cache=True, nogil=True)
def learn(m, symbol, asked):
    """Take in the symbol that came: biases and mixer if the language model was asked, then the counts."""
    s, a = m.scalars, m.options[_SYMBOLS]
    if asked:
        unit = (np.int64(1) << 62) // s[_Z]
        if s[_SEEN] >= m.options[_WARMUP]:
            for j in range(3):
                if m.logs[j] > _OFF:
                    if j == 0:
                        p = (m.e[symbol] * unit) >> 24
                    elif j == 1:
                        p = _ngram_p(m, symbol)
                    else:
                        p = _lzp_p(m, symbol)
                    m.logs[j] += m.options[_RATE] * (log2_of(max(p, _LEAST)) - (38 << 16)) // 1_000_000
            _set_weights(m)
        if m.options[_BIAS]:
            eta = m.options[_ETA]
            for i in range(a):
                m.bias[i] -= (((m.e[i] * unit) >> 30) * eta) >> 32
            m.bias[symbol] += eta
    if m.options[_ORDER] >= 0:
        c = m.counts[symbol] + 1
        s[_SUM_LOG] += (c + 1) * log2_of(c + 1) - c * log2_of(c)
        m.counts[symbol] = c
        s[_TOTAL0] += 1
        for k in range(1, min(m.options[_ORDER], s[_SEEN]) + 1):
            at = m.found[k - 1]
            if at < 0:
                at = _context(m, k - 1, _key_of(m, k))
            _count(m, k - 1, at, symbol)
    if m.options[_LZP]:
        for k in range(LZP_LOW, min(LZP_HIGH, s[_SEEN]) + 1):
            key, at = _lzp_place(m, k)
            m.lzp_keys[at] = key
            m.lzp_next[at] = symbol
    for i in range(LZP_HIGH - 1, 0, -1):
        m.history[i] = m.history[i - 1]
    m.history[0] = symbol
    s[_SEEN] += 1


# --- arithmetic coder: 32 bits, low and high with straddle bits (Witten, Neal, Cleary 1987) -----------------------------
# state int64[5]: low, high, straddle bits (encoder) or code (decoder), position in bits

_HALF, _QUARTER = 1 << 31, 1 << 30


@njit(cache=True, nogil=True)
def _bit_out(buffer, state, bit):
    at = state[3]
    if bit:
        buffer[at >> 3] |= 128 >> (at & 7)
    state[3] = at + 1


@njit(cache=True, nogil=True)
def _bits_out(buffer, state, bit):
    _bit_out(buffer, state, bit)
    for _ in range(state[2]):
        _bit_out(buffer, state, 1 - bit)
    state[2] = 0


@njit(cache=True, nogil=True)
def _bit_in(buffer, state):
    at = state[3]
    state[3] = at + 1
    if at >> 3 >= len(buffer):
        return 0
    return (buffer[at >> 3] >> (7 - (at & 7))) & 1


@njit(cache=True, nogil=True)
def start(state, buffer, decoding):
    """Set up ``state`` int64[4] to fill a ``buffer`` of zeros, or to read one."""
    state[0], state[1], state[2], state[3] = 0, (np.int64(1) << 32) - 1, 0, 0
    if decoding:
        for _ in range(32):
            state[2] = (state[2] << 1) | _bit_in(buffer, state)


@njit(cache=True, nogil=True)
def _narrow(state, buffer, low, high, bits, decoding):
    width = state[1] - state[0] + 1
    state[1] = state[0] + (width * high >> bits) - 1
    state[0] += width * low >> bits
    while True:
        if state[1] < _HALF:
            off = 0
            if not decoding:
                _bits_out(buffer, state, 0)
        elif state[0] >= _HALF:
            off = _HALF
            if not decoding:
                _bits_out(buffer, state, 1)
        elif state[0] >= _QUARTER and state[1] < _HALF + _QUARTER:
            off = _QUARTER
            if not decoding:
                state[2] += 1
        else:
            break
        state[0] = (state[0] - off) << 1
        state[1] = ((state[1] - off) << 1) | 1
        if decoding:
            state[2] = ((state[2] - off) << 1) | _bit_in(buffer, state)


@njit(cache=True, nogil=True)
def _target(state, bits):
    """Place of the code in 0..2**bits - 1."""
    return (((state[2] - state[0] + 1) << bits) - 1) // (state[1] - state[0] + 1)


@njit(cache=True, nogil=True)
def finish(state, buffer):
    """Write the bits that end the code, the decoder reading zeros behind; the number of bytes, without zeros at the end."""
    state[2] += 1
    _bits_out(buffer, state, 0 if state[0] < _QUARTER else 1)
    size = (state[3] + 7) >> 3
    while size and not buffer[size - 1]:
        size -= 1
    return size


# --- one symbol -------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True)
def code_symbol(m, state, buffer, logits, asked, symbol, byte, decoding):
    """Code a symbol, with the byte behind an escape, or find them when ``decoding``; (symbol, byte)."""
    set_cdf(m, logits, asked)
    if decoding:
        symbol = np.int64(np.searchsorted(m.cdf, _target(state, BITS), side="right")) - 1
    _narrow(state, buffer, m.cdf[symbol], m.cdf[symbol + 1], BITS, decoding)
    if symbol == m.options[_SYMBOLS] - 1:
        if decoding:
            byte = _target(state, 8)
        _narrow(state, buffer, byte, byte + 1, 8, decoding)
    learn(m, symbol, asked)
    return symbol, byte
