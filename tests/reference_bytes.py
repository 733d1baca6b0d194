"""A second decoder of blocks of text, in plain Python and NumPy: slow, short, sharing nothing with the first but the weights.

``decode(code, length, tensors, config, strings)`` takes what ``entropy/bytes/text.py`` has written with the default options.
All numbers are Python integers (or int64 arrays): nothing here is compiled, nothing overflows unless it says so.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal, localcontext

import numpy as np

CLAMP = 2815
MASK64, MASK32 = (1 << 64) - 1, (1 << 32) - 1


def _curves():
    with localcontext() as context:
        context.prec = 30
        sigmoid = [int(((1 << 20) / (1 + (16 - Decimal(k) / 64).exp())).to_integral_value()) for k in range(2049)]
        half = [int(((1 << 24) * (-(Decimal(2).ln()) * k / 256).exp()).to_integral_value()) for k in range(257)]
        squash = [int((65536 / (1 + (-Decimal(s) / 256).exp())).to_integral_value()) for s in range(-CLAMP, CLAMP + 1)]
        stretch = [int((256 * (Decimal(2 * i + 1) / (8191 - 2 * i)).ln()).to_integral_value()) for i in range(4096)]
        tail = [int((256 * (Decimal(2 * i + 1) / ((1 << 19) - 2 * i - 1)).ln()).to_integral_value()) for i in range(1024)]
    return np.array(sigmoid), np.array(half), [min(max(p, 1), 65535) for p in squash], stretch, tail


SIGMOID, HALF, SQUASH, STRETCH, TAIL = _curves()


class Network:
    """The language model: ``counts`` for the next token, ``learn`` what came, ``step`` over it."""

    def __init__(self, tensors, config):
        self.t = {k: v.astype(np.int64) for k, v in tensors.items()}
        self.c = config
        self.before = np.zeros((config["blocks"], config["width"]), np.int64)
        self.h = np.zeros_like(self.before)
        self.master = self.t["head"] << 12
        self.head, self.bias = self.t["head"].copy(), self.t["bias"].copy()

    def norm(self, x):
        v = x >> 4
        root = math.isqrt(int((v * v).sum()) + 168 * len(x))
        inverse = math.isqrt(len(x) << 40) * (1 << (self.c["norm_bits"] + 6)) // root
        return ((v * inverse + (1 << 25)) >> 26).clip(-32768, 32767)

    def linear(self, name, b, x):
        shift = self.c["shifts"][b][["gates", "project", "up", "down"].index(name)]
        return ((self.t[name][b] @ x) * self.t[f"{name}.multipliers"][b] + (1 << (shift - 1))) >> shift

    @staticmethod
    def sigmoid(a):
        a = (a + 16384).clip(0, 32767)
        k, rest = a >> 4, a & 15
        return SIGMOID[k] + (((SIGMOID[k + 1] - SIGMOID[k]) * rest + 8) >> 4)

    def step(self, token):
        x = self.t["embedding"][token] << 4
        d = len(x)
        for b in range(self.c["blocks"]):
            n = self.norm(x)
            g = self.linear("gates", b, np.concatenate([n, self.before[b]]))
            self.before[b] = n
            f = self.sigmoid(g[:d] + self.t["forget_bias"][b])
            c = (g[d : 2 * d] << 6).clip(-(1 << 28), 1 << 28)
            o = g[2 * d :].clip(-(1 << 20), 1 << 20)
            self.h[b] = c + (((self.h[b] - c) * f + (1 << 19)) >> 20)
            gate = (o * self.sigmoid(o) + (1 << 19)) >> 20
            shift = 26 - self.c["gated_bits"][b]
            y = ((gate * self.h[b] + (1 << (shift - 1))) >> shift).clip(-32768, 32767)
            x = (x + self.linear("project", b, y)).clip(-(1 << 30), 1 << 30)
            u = self.linear("up", b, self.norm(x)).clip(0, 1 << 20)
            shift = 20 - self.c["squared_bits"][b]
            s = ((u * u + (1 << (shift - 1))) >> shift).clip(0, 16383)
            x = (x + self.linear("down", b, s)).clip(-(1 << 30), 1 << 30)
        self.n = self.norm(x)
        logits = self.head @ self.n
        logits = (((logits << (12 - self.c["norm_bits"])) + self.bias) * 94548 >> 24).clip(-(1 << 30), 1 << 30)
        far = logits.max() - logits
        k, rest = (far >> 8) & 255, far & 255
        value = HALF[k] - ((HALF[k] - HALF[k + 1]) * rest >> 8)
        self.counts = (value >> np.minimum(far >> 16, 30)) + 16
        return self.counts

    def learn(self, token, rate, bias_rate):
        total = int(self.counts.sum())
        hit = self.counts > total // 1000
        hit[token] = True
        g = (self.counts << 16) // total
        g[token] -= 65536
        down = self.c["norm_bits"] - 2
        for i in np.flatnonzero(hit):
            self.bias[i] -= (g[i] * bias_rate) >> 8
            scaled = (g[i] * rate) >> 10
            self.master[i] -= (scaled * self.n + (1 << (down - 1))) >> down
            self.head[i] = ((self.master[i] + 2048) >> 12).clip(-32767, 32767)


class Decoder:
    """Binary arithmetic decoder."""

    def __init__(self, data):
        self.data, self.at, self.low, self.high = data, 4, 0, MASK32
        self.code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def bit(self, p16):
        middle = self.low + ((self.high - self.low) * p16 >> 16)
        bit = int(self.code <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while (self.low ^ self.high) & 0xFF000000 == 0:
            byte = self.data[self.at] if self.at < len(self.data) else 0
            self.at += 1
            self.low, self.high = self.low << 8 & MASK32, self.high << 8 & MASK32 | 255
            self.code = self.code << 8 & MASK32 | byte
        return bit


def squash(s):
    return SQUASH[min(max(s, -CLAMP), CLAMP) + CLAMP]


def mix_hash(a, b):
    h = (a * 0x9E3779B97F4A7C15 + b + 1) * 0xD6E8FEB86659FD93 & MASK64
    return h >> 32


class Map:
    """Adaptive probabilities of 22 bits with a count, by any key."""

    def __init__(self, start=1 << 21):
        self.start, self.cells = start, {}

    def p22(self, key):
        return self.cells.get(key, (self.start, 0))[0]

    def p16(self, key):
        return self.p22(key) >> 6

    def learn(self, key, bit, limit):
        p, n = self.cells.get(key, (self.start, 0))
        p += (((bit << 22) - bit - p) * (655360 // (10 * n + 15))) >> 16
        self.cells[key] = p, min(n + 1, limit)


class Refinement:
    """Maps over the stretch domain in 33 steps."""

    def __init__(self):
        self.cells = {}

    def cell(self, context, step):
        start = SQUASH[min(max((step - 16) * CLAMP // 16, -CLAMP), CLAMP) + CLAMP] << 6
        return self.cells.get((context, step), (start, 0))

    @staticmethod
    def place(s):
        at = (s + CLAMP) * 131072 // (2 * CLAMP)
        return (31, 4095) if at >> 12 > 31 else (at >> 12, at & 4095)

    def p16(self, context, s):
        step, weight = self.place(s)
        p = (self.cell(context, step)[0] * (4096 - weight) + self.cell(context, step + 1)[0] * weight) >> 18
        return min(max(p, 1), 65535)

    def learn(self, context, s, bit, limit):
        step, weight = self.place(s)
        step += weight >> 11
        p, n = self.cell(context, step)
        p += (((bit << 22) - bit - p) * (655360 // (10 * n + 15))) >> 16
        self.cells[context, step] = p, min(n + 1, limit)


class Mixer:
    """Weights by set, inputs in the stretch domain."""

    def __init__(self, start):
        self.start, self.sets = np.array(start, np.int64), {}

    def mix(self, inputs, key):
        w = self.sets.get(key, self.start)
        return min(max(int((inputs * w).sum()) >> 16, -CLAMP), CLAMP)

    def learn(self, inputs, key, bit, p16, rate):
        error = (((bit << 16) - bit - p16) * rate) >> 12
        self.sets[key] = self.sets.get(key, self.start) + ((inputs * error + 2048) >> 12)


class Table:
    """Buckets of nibbles, two places for each hash; a slot is [p18 - 2^17, count, history]."""

    def __init__(self, buckets):
        self.mask, self.cells = buckets - 1, {}

    def bucket(self, h):
        at = (h * 0x2C1B3C6D) >> 12 & self.mask
        two = [self.cells.setdefault(place, {"check": 0, "run": 0}) for place in (at, at ^ 1)]
        for cell in two:
            if cell["check"] == h & 0xFFFF:
                return cell
        used = [cell.get(1, (0, 0, 0))[1] for cell in two]
        cell = two[used[1] < used[0]]
        cell.clear()  # another context that holds it at this moment shares it from now on
        cell.update(check=h & 0xFFFF, run=0)
        return cell


def learn_slot(slot, bit, limit):
    p, n, history = slot
    p += (((bit << 18) - bit - (1 << 17) - p) * (655360 // (10 * n + 16))) >> 16
    history = (history or 1) << 1 | bit
    return p, min(n + 1, limit), history & 127 | 128 if history > 255 else history


def byte_class(c):
    if c >= 128 or c < 32:
        return {10: 5, 13: 5, 0: 11, 255: 12}.get(c, 14 if c >= 128 else 13)
    if chr(c).isalnum():
        return 3 if chr(c).isdigit() else 1 if chr(c).islower() else 2
    for number, members in ((4, " "), (6, ",;:"), (7, ".!?"), (8, "\"'`"), (9, "([{<"), (10, ")]}>")):
        if chr(c) in members:
            return number
    return 15


class Words:
    """Words, lines, fields, brackets of the text so far."""

    def __init__(self):
        self.word = self.word1 = self.word2 = self.line = self.above = self.classes = self.field = self.quote = 0
        self.punct = self.first = self.indent = self.tag = self.depth = 0
        self.stack = [0] * 64

    def learn(self, text):
        c, n = text[-1], len(text)
        kind = byte_class(c)
        if kind in (1, 2) or c >= 128:
            self.word = mix_hash(self.word, c | 32 if c < 128 else c)
        elif self.word:
            self.word, self.word1, self.word2 = 0, self.word, self.word1
        self.classes = (self.classes << 4 | kind) & MASK32
        if c == 10:
            self.above, self.line, self.field, self.quote, self.indent = self.line, n, 0, 0, 0
        elif c in b",\t;|":
            self.field += 1
        if n - 1 == self.line:
            self.first = c
        if c in b" \t" and n - 1 - self.line == self.indent:
            self.indent += 1
        if 6 <= kind <= 10 or kind == 15:
            self.punct = c
        self.quote ^= c == 34
        if kind == 9:
            self.depth = min(self.depth + 1, 63)
            self.stack[self.depth] = mix_hash(self.word1, c)
        elif kind == 10 and self.depth:
            self.depth -= 1
        if c in b"> " and self.tag < 0:
            self.tag = self.word1
        elif c == 60:
            self.tag = -1


def contexts(ids, text, w):
    """The 26 hashed contexts of the next token."""
    t1, t2, t3, t4 = ([0] * 4 + ids)[: -5 : -1]
    c1, c2, c3, c4, c5, c6 = (bytes(6) + bytes(text[-6:]))[: -7 : -1]
    h2 = mix_hash(t1, t2)
    h3 = mix_hash(h2, t3)
    b4 = c4 << 24 | c3 << 16 | c2 << 8 | c1
    w1 = mix_hash(w.word, c1)
    w2 = mix_hash(w1, w.word1)
    column = len(text) - w.line
    above = text[w.above + column] if w.above + column < w.line else 10
    after = text[w.above + column + 1] if w.above + column + 1 < w.line else 10
    top = w.stack[w.depth]
    tag = w.tag & MASK64
    return [
        0, t1, h2, h3, mix_hash(h3, t4), t2, mix_hash(t2, t3), mix_hash(t1, t3),
        c1, b4 & 0xFFFF, b4 & 0xFFFFFF, b4, mix_hash(mix_hash(b4, c5), c6),
        w1, w2, mix_hash(w2, w.word2), mix_hash(w1, w.word2), mix_hash(t1, w.word1), mix_hash(mix_hash(w.word, w.punct), c1),
        mix_hash(w.classes, 0 if w.word else c1), mix_hash(above << 8 | after, t1),
        mix_hash(mix_hash(w.word, w.first), w.indent),
        mix_hash(top, t1 | w.quote << 16), mix_hash(mix_hash(tag, w.word), c1),
        mix_hash(mix_hash(w.word, w.field), min(column, 63) << 8 | above), mix_hash(mix_hash(top, w.word), c2 << 8 | c1),
    ]  # fmt: skip


class Match:
    """Where the last tokens came before, as far as it goes on."""

    def __init__(self, least):
        self.least, self.at, self.length, self.missed, self.places = least, 0, 0, 0, {}

    def learn(self, ids, mask):
        if self.length:
            miss = ids[self.at] != ids[-1]
            self.missed = (self.missed << 1 | miss) & 255
            self.length = 1 if miss else min(self.length + 1, 65535)
            self.at += 1
            if miss and self.missed & 7 == 7:
                self.length = 0
        if len(ids) >= self.least:
            h = 0
            for k in range(1, self.least + 1):
                h = mix_hash(h, ids[-k])
            candidate = self.places.get(h & mask, 0)
            if self.length < self.least and candidate:
                length = 0
                while length < 32 and candidate > length and ids[candidate - 1 - length] == ids[-1 - length]:
                    length += 1
                if length >= self.least:
                    self.at, self.length, self.missed = candidate, length, 0
            self.places[h & mask] = len(ids)

    def place(self, far):
        return self.length if self.length < 16 else min(16 + ((self.length - 16) >> far), 31)


def decode_tokens(coder, count, tensors, config, strings, text):
    """``count`` token ids; ``text`` (bytearray) gets their bytes. All components, rates 66, 1300, 200, slots 30, 2^21."""
    size, plan = len(strings), 26
    depth = size.bit_length() - 1
    net = Network(tensors, config)
    need = max(count, 64) * plan * ((depth + 3) // 4) * 3 // 4
    table = Table(1 << min(need.bit_length(), 21))
    match_mask = (1 << min(max(count, 16).bit_length() + 1, 20)) - 1
    matches = [Match(3), Match(7)]
    width = (plan * 4 + 8 + 15) // 16 * 16
    start = np.zeros(width, np.int64)
    start[: plan * 4] = 65536 * 3 // 10 // plan
    start[plan * 4 : plan * 4 + 8] = 6000
    start[plan * 4 + 4 : plan * 4 + 8] = 0, 65536 * 6 // 10, 0, 65536 * 2 // 10
    mixer, final = Mixer(start), Mixer([65536 // 7] * 7)
    histories, runs, confidence = Map(), Map(3 << 20), Map(3 << 20)
    primed_histories(histories, plan)
    apms = [Refinement() for _ in range(3)]
    words, ids, previous = Words(), [], strings.index(b"\n")
    for n in range(count):
        hashes = [mix_hash(h, i + 1) for i, h in enumerate(contexts(ids, text, words))]
        edges = np.concatenate([[0], np.cumsum(net.step(previous))])
        for match in matches if ids else ():
            match.learn(ids, match_mask)
        longest = max(matches, key=lambda match: match.length)
        t1, t2 = ids[-1] if n else 0, ids[-2] if n > 1 else 0
        c1 = text[-1] if text else 0
        early = (200 << 12) // (1024 + n)
        run_bits = 16 - depth
        first = None
        node, low, span = 1, 0, size
        for level in range(depth):
            span >>= 1
            small = min(level, 7)
            if level & 3 == 0:
                buckets = [table.bucket(mix_hash(h, node) if level else h) for h in hashes]
                first = first or buckets
            local = node & (1 << (level & 3)) - 1 | 1 << (level & 3)
            x, keys, seen = np.zeros(width, np.int64), [], 0
            for i, bucket in enumerate(buckets):
                p, times, history = bucket.get(local, (0, 0, 0))
                key = run_key = None
                if times:
                    key = i, min(times >> 3, 3), history
                    x[4 * i : 4 * i + 3] = STRETCH[(p + (1 << 17)) >> 6], STRETCH[histories.p22(key) >> 10], p >> 9
                    seen += i < 5
                run_token, length = first[i]["run"] >> run_bits, first[i]["run"] & (1 << run_bits) - 1
                if length and (run_token | size) >> (depth - level) == node:
                    run_key = i, min(length, 31), level
                    guess = run_token >> (depth - 1 - level) & 1
                    x[4 * i + 3] = STRETCH[runs.p22(run_key) >> 10] * (1 if guess else -1)
                keys.append((key, run_key, run_token >> (depth - 1 - level) & 1))
            k = 4 * plan
            guesses = []
            for m, match in enumerate(matches):
                if match.length and (ids[match.at] | size) >> (depth - level) == node:
                    guess = ids[match.at] >> (depth - 1 - level) & 1
                    key = m, match.place(2), match.missed & 7, level
                    p = confidence.p16(key)
                    x[k : k + 2] = (STRETCH[p >> 4], (p - 32768) >> 7) if guess else (-STRETCH[p >> 4], (32768 - p) >> 7)
                    guesses.append((key, guess))
                k += 2
            total = int(edges[low + 2 * span] - edges[low])
            part = int(edges[low + 2 * span] - edges[low + span])
            s_model = node_stretch(part, total)
            x[k : k + 4] = 256, s_model, (part << 9) // total - 256, STRETCH[apms[2].p16(node, s_model) >> 4]
            sure = min(abs(s_model) >> 7, 15)
            sets = [
                node, longest.place(3) << 4 | level, seen << 8 | sure << 4 | level, t1 & 2047,
                (words.classes & 255) << 3 | small, c1 << 3 | small, (s_model + CLAMP) >> 5 << 3 | small,
            ]  # fmt: skip
            mixed = [mixer.mix(x, (j, s)) for j, s in enumerate(sets)]
            y = np.array(mixed)
            final_keys = (0, longest.place(3) << 4 | level), (1, sure << 4 | level)
            ends = [final.mix(y, key) for key in final_keys]
            s = sum(ends) >> 1
            a = mix_hash(node << 16 | t1, 0) & 65535, mix_hash(mix_hash(node << 16 | t1, 1), t2) & 65535
            p = (6 * squash(s) + apms[0].p16(a[0], s) + apms[1].p16(a[1], s) + 4) >> 3
            bit = coder.bit(min(max(p, 1), 65535))
            for j, key in enumerate(sets):
                mixer.learn(x, (j, key), bit, squash(mixed[j]), 200 + early)
            for key, end in zip(final_keys, ends):
                final.learn(y, key, bit, squash(end), 120)
            apms[2].learn(node, s_model, bit, 255)
            for j in range(2):
                apms[j].learn(a[j], s, bit, 500)
            for bucket, (key, run_key, guess) in zip(buckets, keys):
                bucket[local] = learn_slot(bucket.get(local, (0, 0, 0)), bit, 30)
                if key is not None:
                    histories.learn(key, bit, 255)
                if run_key is not None:
                    runs.learn(run_key, int(guess == bit), 255)
            for key, guess in guesses:
                confidence.learn(key, int(guess == bit), 1023)
            node, low = node << 1 | bit, low + span * bit
        token = node - size
        for bucket in first:
            length = bucket["run"] & (1 << run_bits) - 1
            again = length and bucket["run"] >> run_bits == token
            bucket["run"] = token << run_bits | (min(length + 1, (1 << run_bits) - 1) if again else 1)
        net.learn(token, 66, 1300)
        ids.append(token)
        previous = token
        for c in strings[token]:
            text.append(c)
            words.learn(text)
    return ids


def primed_histories(maps, rows):
    for history in range(1, 256):
        bits = [history >> k & 1 for k in range(history.bit_length() - 1)]
        ones, total = sum(bits) + sum(bits[:1]), len(bits) + bool(bits)
        for row in range(rows):
            for step in range(4):
                maps.cells[row, step, history] = (10 * ones + 4) * (1 << 22) // (10 * total + 8), 0


def node_stretch(part, total):
    p = (part << 22) // total
    if p < 1 << 14:
        return max(TAIL[p >> 4], -CLAMP)
    if p >= (1 << 22) - (1 << 14):
        return min(-TAIL[((1 << 22) - 1 - p) >> 4], CLAMP)
    return STRETCH[p >> 10]


def decode(code, length, tensors, config, strings):
    """The original of a block's code. Line ends that were made spaces are not undone (short samples have none)."""
    assert code[0] == 0 and code[2] == 255, "default options and no soft line ends"
    flags, at, count, shift = code[1], 3, 0, 0
    while True:
        count |= (code[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if code[at - 1] < 128:
            break
    text = bytearray()
    decode_tokens(Decoder(code[at:]), count, tensors, config, strings, text)
    plain = bytes(text)
    if flags & 2:
        pattern = rb"\x03([\x01-\x03])|\x01( ?[a-z])|\x02( ?[a-z]+)"
        plain = re.sub(pattern, lambda m: m[1] or (m[2] or m[3]).upper(), plain)
    return plain.replace(b"\n", b"\r\n") if flags & 1 else plain
