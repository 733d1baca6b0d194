"""A second decoder of context-mixed bytes, in plain Python: slow, short, sharing nothing with ``entropy/bytes/binary.py``.

``decode(code, length, contexts, ...)`` reads what ``binary.encode`` has written. All numbers are Python integers.
"""

from __future__ import annotations

import numpy as np
from reference_bytes import (
    MASK64,
    STRETCH,
    Decoder,
    Map,
    Mixer,
    Refinement,
    Table,
    Words,
    learn_slot,
    mix_hash,
    primed_histories,
    squash,
)

PIXELS = 12


def contexts(d: bytearray, w: Words, stride: int, row: int, expected: int, length: int) -> list[int]:
    """The 52 contexts of the byte behind ``d``, before their numbers are mixed in."""
    n = len(d)

    def back(k: int) -> int:
        return d[n - k] if 1 <= k <= n else 0

    c1, c2, c3, c4, c5, c6, c7, c8 = (back(k) for k in range(1, 9))
    low4 = c4 << 24 | c3 << 16 | c2 << 8 | c1
    h5 = mix_hash(low4, c5)
    h6 = mix_hash(h5, c6)
    w1 = mix_hash(w.word, c1)
    w2 = mix_hash(w1, w.word1)
    column = n - w.line
    above = d[w.above + column] if w.above + column < w.line else 10
    top, tag = w.stack[w.depth], w.tag & MASK64
    s, r = stride, row
    a, aa, aaa, al, ar, aal = back(s), back(2 * s), back(3 * s), back(s + 1), back(s - 1) if s > 1 else 0, back(2 * s + 1)
    if n < s:
        ar = 0
    phase, line = n % s, (2 * a - aa) & 255
    small = min(phase, 255)
    b, bl, bb, br = back(r), back(r + s), back(2 * r), back(r - s) if n >= r > s else 0
    edge = (b + a - bl) & 255

    def m(x: int, y: int) -> int:
        return mix_hash(x & MASK64, y & MASK64)

    return [
        0, c1, c2 << 8 | c1, c3 << 16 | c2 << 8 | c1, low4, h5, h6, m(m(h6, c7), c8),
        w1, w2, m(w2, w.word2), m(w1, w.word2), m(w.classes, 0 if w.word else c1),
        m(above, min(column, 255)), m(above << 8 | c1, 1), m(m(w.word, w.first), w.indent), m(m(w.word, w.field), w.field),
        m(top, c1 | w.quote << 8), m(m(top, w.word), c2 << 8 | c1), m(m(tag, w.word), c1), m(c1 | w.punct << 8, w.word1),
        c2, c3 << 8 | c2, c3, c4, c3 << 8 | c1, c4 << 8 | c1, c4 << 16 | c3 << 8 | c2,
        (c1 & 240) | (c2 & 240) << 8 | (c3 & 240) << 16 | (c4 & 240) << 24, (n & 3) << 16 | c4 << 8 | c1,
        (n & 3) << 8 | c1 >> 3 | (c2 & 0xF8) << 16,
        a << 8 | small, a << 16 | c1 << 8 | al, a << 16 | aa << 8 | c1, m(a << 24 | aa << 16 | aaa << 8, 1),
        line << 8 | (c1 - al) & 255, m(line << 16 | small << 8 | (c1 - al) & 255, 2), a << 16 | ar << 8 | c1,
        phase << 8 | c1, m(phase << 16 | c2 << 8 | c1, 3), (a + c1 - al) & 255, m(a << 24 | al << 16 | c1 << 8 | c2, 4),
        m((a - aa) << 16 | (c1 - al) << 8 | (al - aal), a),
        b << 8 | a, m(b << 16 | a << 8 | bl, 5), m(edge, 6), m(b << 8 | bb, 7), m(b << 16 | br << 8 | c1, 8),
        m(edge << 8 | (a + br - b) & 255, 9), m(b << 24 | a << 16 | c1 << 8 | c2, 10),
        m(expected << 8 | min(length, 32), 11) if length else 0, m(expected << 8 | c1, 12) if length else c2 << 16 | c1,
    ]  # fmt: skip


def pixel_contexts(d: bytearray, row: int, node: int, position: int) -> list[int]:
    """Neighbourhoods of the next pixel of a bitmap: left, and up to seven pixels to each side in the three rows above."""
    n = len(d)

    def pixel(dx: int, dy: int) -> int:
        """The pixel ``dx`` to the right of the next one (-7..8 there) in the row ``dy`` above; 0 beyond three bytes."""
        bit = position + dx
        at = n - dy * row + (bit >> 3)
        return d[at] >> (7 - (bit & 7)) & 1 if -8 <= bit < 16 and 0 <= at < n else 0

    def span(dy: int, low: int, size: int) -> int:
        """``size`` pixels of a row, the rightmost of them (``7 - low`` to the right) lowest."""
        return sum(pixel(7 - low - k, dy) << k for k in range(size))

    before = (d[n - 1] if n else 0) | (d[n - 2] << 8 if n > 1 else 0)
    left = (before << position | node & (1 << position) - 1) & 0xFFFFFF

    def r(dy: int, low: int, mask: int) -> int:
        return span(dy, low, mask.bit_length())

    return [
        (left & 15) << 8 | r(1, 5, 31) << 3 | r(2, 6, 7),
        (left & 3) << 16 | r(1, 6, 7),
        (left & 63) << 20 | r(1, 4, 127) << 8 | r(2, 5, 31),
        (left & 255) << 20 | r(1, 3, 511) << 8 | r(2, 4, 127),
        (left & 31) << 20 | r(1, 5, 31) << 12 | r(2, 5, 31) << 6 | r(3, 6, 7),
        (left & 0xFFF) << 12 | r(1, 5, 31),
        (left & 7) << 20 | r(1, 1, 0x1FFF),
        r(1, 5, 31) << 20 | r(2, 5, 31) << 10 | r(3, 5, 31),
        (left & 0x3FF) << 22 | r(1, 2, 0x7FF) << 11 | r(2, 3, 511),
        (left & 0x3F) << 24 | r(1, 3, 0x1FF) << 14 | r(2, 4, 127) << 7 | r(3, 4, 127),
        left & 0xFFFF,
        (left & 1) << 20 | r(1, 0, 0x7FFF),
    ]  # fmt: skip


class Match:
    """Where the last bytes came before, as far as it goes on."""

    def __init__(self, least: int):
        self.least, self.at, self.length, self.missed, self.places = least, 0, 0, 0, {}

    def learn(self, d: bytearray, mask: int) -> None:
        n = len(d)
        if self.length:
            miss = d[self.at] != d[-1]
            self.missed = (self.missed << 1 | miss) & 255
            self.length = 1 if miss else min(self.length + 1, 65535)
            self.at += 1
            if miss and self.missed & 15 == 15:
                self.length = 0
        if n >= self.least:
            h = 0
            for k in range(1, self.least + 1):
                h = (h + d[-k] + 1) * 0x2F0B4C47 & 0xFFFFFFFF
            place = h >> 5 & mask
            candidate = self.places.get(place, 0)
            if self.length < self.least and candidate:
                length = 0
                while length < 40 and candidate > length and d[candidate - 1 - length] == d[-1 - length]:
                    length += 1
                if length >= self.least:
                    self.at, self.length, self.missed = candidate, length, 0
            self.places[place] = n


def decode(
    code: bytes, count: int, plan: tuple[int, ...], pixels: bool, matching: int, refine: bool, stride: int, row: int
) -> bytes:
    """``count`` bytes. ``plan``: numbers of the contexts; ``matching``: match models (0..2)."""
    coder, d, words = Decoder(code), bytearray(), Words()
    table = Table(1 << min((max(count, 64) * len(plan) * 2 - 1).bit_length(), 21))
    match_mask = (1 << min(max(count - 1, 1).bit_length() + 1, 20)) - 1
    apm_mask = (1 << min(max(count, 1).bit_length(), 16)) - 1
    matches = [Match(6), Match(16)][:matching]
    used = len(plan) * 4 + 5 + (PIXELS * 3 if pixels else 0)
    start = np.zeros(used, np.int64)
    start[:] = 40000 // len(plan)
    mixer, final = Mixer(start), Mixer([65536 // 7] * 7)
    histories, runs, confidence, shapes = Map(), Map(3 << 20), Map(3 << 20), Map()
    primed_histories(histories, len(plan))
    primed_histories(shapes, PIXELS)
    apms = [Refinement() for _ in range(3)]
    dots: dict = {}
    for n in range(count):
        if n:
            words.learn(d)
        for match in matches:
            match.learn(d, match_mask)
        length = max((match.length for match in matches), default=0)
        longest = next((match for match in matches if match.length == length), None)
        expected = d[longest.at] if length else 0
        every = contexts(d, words, stride, row, expected, length)
        hashes = [mix_hash(every[c], c + 1) for c in plan]
        c1, c2 = d[-1] if n else 0, d[-2] if n > 1 else 0
        above, phase = d[n - stride] if n >= stride else 0, min(n % stride, 255)
        step = min(length, 15) if length < 16 else min(16 + ((length - 16) >> 3), 31)
        rate = 150 + 600 * 1024 // (1024 + n)
        node, first = 1, None
        for position in range(8):
            if position in (0, 4):
                buckets, heads = [], []
                for h in hashes:
                    buckets.append(table.bucket(mix_hash(h, node) if position else h))
                    heads.append(buckets[-1]["run"])  # now: the next context may take this bucket over
                if first is None:
                    first, known = buckets, [(head & 255, head >> 8) for head in heads]
            local = node if position < 4 else node & (1 << (position - 4)) - 1 | 1 << (position - 4)
            x, keys, seen = np.zeros(used, np.int64), [], 0
            for i, bucket in enumerate(buckets):
                p, times, history = bucket.get(local, (0, 0, 0))
                key = run_key = None
                if times:
                    key = i, min(times >> 3, 3), history
                    x[4 * i : 4 * i + 3] = STRETCH[(p + (1 << 17)) >> 6], STRETCH[histories.p22(key) >> 10], p >> 9
                    seen += i < 8
                last, times = known[i]
                guess = last >> (7 - position) & 1
                if times and (last | 256) >> (8 - position) == node:
                    run_key = i, min(times, 31), position
                    x[4 * i + 3] = STRETCH[runs.p22(run_key) >> 10] * (1 if guess else -1)
                keys.append((key, run_key, guess))
            k, guesses = 4 * len(plan), []
            for m, match in enumerate(matches):
                if match.length and (d[match.at] | 256) >> (8 - position) == node:
                    guess = d[match.at] >> (7 - position) & 1
                    far = min(match.length, 15) if match.length < 16 else min(16 + ((match.length - 16) >> 2), 31)
                    key = m, far, match.missed & 7, position
                    p = confidence.p16(key)
                    x[k + 2 * m : k + 2 * m + 2] = (STRETCH[p >> 4], (p - 32768) >> 7) if guess else (
                        -STRETCH[p >> 4], (32768 - p) >> 7)  # fmt: skip
                    guesses.append((key, guess))
            k += 2 * matching
            x[k] = 256
            drawn = []
            if pixels:
                for i, context in enumerate(pixel_contexts(d, row, node, position)):
                    at = i, mix_hash(context, i) & (1 << 20) - 1
                    p, times, history = dots.get(at, (0, 0, 0))
                    key = None
                    if times:
                        key = i, min(times >> 3, 3), history
                        x[k + 1 + 3 * i : k + 4 + 3 * i] = STRETCH[(p + (1 << 17)) >> 6], STRETCH[shapes.p22(key) >> 10], p >> 9
                    drawn.append((at, key))
            sets = [
                step << 3 | position, node, c1, seen << 3 | position, phase << 3 | position,
                (words.classes & 255) << 3 | position, above,
            ]  # fmt: skip
            mixed = [mixer.mix(x, (j, s)) for j, s in enumerate(sets)]
            y = np.array(mixed)
            ends = [(key, final.mix(y, key)) for key in ((0, step << 3 | position), (1, node))]
            s = (ends[0][1] + ends[1][1]) >> 1
            p = squash(s)
            a = node, mix_hash(node << 8 | c1, 0) & apm_mask, mix_hash(node << 16 | c2 << 8 | c1, 1) & apm_mask
            if refine:
                r = [apms[j].p16(a[j], s) for j in range(3)]
                p = (4 * p + r[0] + r[1] + 2 * r[2] + 4) >> 3
            bit = coder.bit(min(max(p, 1), 65535))
            for j, key in enumerate(sets):
                mixer.learn(x, (j, key), bit, squash(mixed[j]), rate)
            for key, end in ends:
                final.learn(y, key, bit, squash(end), 120)
            if refine:
                for j in range(3):
                    apms[j].learn(a[j], s, bit, 500)
            for bucket, (key, run_key, guess) in zip(buckets, keys):
                bucket[local] = learn_slot(bucket.get(local, (0, 0, 0)), bit, 30)
                if key is not None:
                    histories.learn(key, bit, 255)
                if run_key is not None:
                    runs.learn(run_key, int(guess == bit), 255)
            for key, guess in guesses:
                confidence.learn(key, int(guess == bit), 1023)
            for at, key in drawn:
                dots[at] = learn_slot(dots.get(at, (0, 0, 0)), bit, 62)
                if key is not None:
                    shapes.learn(key, bit, 1023)
            node = node << 1 | bit
        byte = node & 255
        d.append(byte)
        for bucket in first:
            last, times = bucket["run"] & 255, bucket["run"] >> 8
            bucket["run"] = (min(times + 1, 255) if times and last == byte else 1) << 8 | byte
    return bytes(d)
