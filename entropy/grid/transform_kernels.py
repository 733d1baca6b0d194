"""Numba kernels of the transform coder: context-mixing coder of coefficients, inverse wavelet, bases across planes.

All that a decoder does with coefficients is integer arithmetic. Only the covariance of decoded coefficients, its eigenvectors
and the orthogonal wavelet are float64: single IEEE operations in the order written here.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ..binary import REACH, SQUASH, STRETCH, code_bit, code_tail, learned, raw_bits
from .kernels import COUNT_LIMIT, RATE

FRACTION = 8  # bits below a step in decoded coefficients and planes
UNIT = 16  # bits of fraction of a basis
LARGEST = 1 << 28  # |coefficient|, in steps
CLIP = 1 << 20  # of magnitudes in contexts
MARGIN = 2  # of zeros around magnitudes; three to the right and below
INPUTS = 6
UNARY = 14  # mixed decisions on a magnitude; whatever is larger continues with an Exp-Golomb code
LEARN = 14  # the mixer's rate, a shift
LIKELY = 40  # classes of the expected magnitude, four to an octave
FINE = 60
LOG_END = 1 << 14
# four classes to an octave: floor(4 log2 v), by whole numbers (v**4 against powers of two)
LOG = np.array([0] + [(v**4).bit_length() - 1 for v in range(1, LOG_END)], np.int64)
SIZES = (FINE, 12 * 10 * 3, 10 * 12 * 3, 144 * 3, 16 * 12 * 4, 16 * 20 * 5)  # contexts of each input
STARTS = np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int64) * UNARY
CALM = 32  # expected magnitude, in 1/1024, below which one chance says whether there is anything at all
KINDS = 20  # levels, the fifth and all coarser alike, times orientations
TRUST = np.array([int(256 * (n + 0.6) / (n + 2.0)) for n in range(COUNT_LIMIT + 1)], np.int64)  # in a context by its count
# 1/256 bit of a chance in 1/4096, for the encoder's choices
COST = np.array([3072] + [int(-256 * np.log2(i / 4096)) for i in range(1, 4097)], np.int64)

# Expected magnitude in 1/1024: W, N, NW + NE, further ones; parent, its ring; sibling bands, their rings; activity of the
# components before, its ring; activity of the parent's and of the sibling bands; component before; mean of the component.
# Rows: orientation, without and with a component before. Least squares over the training fields.
WEIGHTS = np.array([
    [358, 184, 82, 51, 31, 5, 0, 0, 0, 0, 92, 0, 0, 31],
    [358, 164, 82, 51, 25, 4, 0, 0, 0, 0, 92, 0, 0, 20],
    [389, 113, 51, 46, 15, 3, 82, 36, 0, 0, 92, 15, 0, 20],
    [174, 92, 77, 36, 13, 2, 28, 4, 0, 0, 123, 2, 0, 10],
    [256, 82, 41, 26, 10, 0, 0, 0, 471, 51, 0, 0, 35, 102],
    [203, 68, 44, 26, 11, 2, 0, 0, 492, 102, 45, 0, 47, 0],
    [297, 82, 34, 31, 9, 1, 53, 35, 266, 51, 92, 9, 33, 0],
    [160, 59, 49, 22, 6, 0, 23, 3, 425, 92, 43, 0, 32, 0],
], np.int64)  # fmt: skip
# Mean place of a value within its interval, in 1/256 of a step off its middle, by magnitude (1, 2, more) and by the sum of
# the four neighbours' magnitudes (0, 1, 2-3, 4-7, more); measured over the same training fields.
SHIFT = np.array([[-37, -37, -27, -9, -1], [-36, -33, -31, -19, -2], [-24, -25, -22, -17, 2]], np.int64)


@njit(cache=True, nogil=True, error_model="numpy")
def _predict(slots, n, maps, weights, set0, set1, apm, row, x):
    """Chance in 1/65536 of decision ``n``; two mixers, averaged in the logistic domain, and an adaptive map."""
    t0, t1 = weights[set0, INPUTS] * 256, weights[set1, INPUTS] * 256
    for i in range(INPUTS):
        m = np.int64(maps[slots[i] + n])
        s = np.int64(STRETCH[m >> 18]) * TRUST[m & 1023] >> 8
        x[i] = s
        t0 += weights[set0, i] * s
        t1 += weights[set1, i] * s
    d0, d1 = min(max(t0 >> 16, -REACH), REACH), min(max(t1 >> 16, -REACH), REACH)
    x[INPUTS], x[INPUTS + 1] = d0, d1
    dot = (d0 + d1) >> 1
    place = dot + 3072
    j = place // 192
    part = place - j * 192
    refined = (apm[row, j] * (192 - part) + apm[row, j + 1] * part) // 192
    x[INPUTS + 2] = j + 1 if part >= 96 else j
    return min(max((np.int64(SQUASH[dot + REACH]) + refined) >> 1, 1), 65535)


@njit(cache=True, nogil=True, error_model="numpy")
def _learn(bit, slots, n, maps, weights, set0, set1, apm, row, x):
    near = x[INPUTS + 2]
    apm[row, near] += ((bit << 16) - apm[row, near]) >> 6
    e0 = (bit << 16) - np.int64(SQUASH[x[INPUTS] + REACH])
    e1 = (bit << 16) - np.int64(SQUASH[x[INPUTS + 1] + REACH])
    half = 1 << (LEARN - 1)
    for i in range(INPUTS):
        weights[set0, i] += (x[i] * e0 + half) >> LEARN
        weights[set1, i] += (x[i] * e1 + half) >> LEARN
        maps[slots[i] + n] = np.uint32(learned(np.int64(maps[slots[i] + n]), bit, RATE))
    weights[set0, INPUTS] += (256 * e0 + half) >> LEARN
    weights[set1, INPUTS] += (256 * e1 + half) >> LEARN


@njit(cache=True, nogil=True, error_model="numpy")
def _size_class(v, end):
    """0, 1, 2, 3, then two classes to an octave, ``end`` at most."""
    return v if v < 4 else min(LOG[min(v, LOG_END - 1)] // 2, end)


@njit(cache=True, nogil=True, error_model="numpy")
def _ring(a, r, c):
    return np.int64(a[r - 1, c]) + a[r + 1, c] + a[r, c - 1] + a[r, c + 1]


@njit(cache=True, nogil=True, error_model="numpy")
def code_band(target, q, sizes, orient, level, totals, parents, parent_totals, used, worth, maps, weights, apm, calm, coder,
              buf, decode):  # fmt: skip
    """Code the coefficients q int32 (P, h, w) of a band, components in order; the decoder fills them.

    target (P, h, w) float64: what the encoder wants, in steps; (1, 1, 1) for the decoder. sizes int32 (3, P, ..): magnitudes,
    with a margin, of the bands of this level by orientation - 1 (0 for the coarsest means); filled here. totals int64
    (3, ..): their sums over components. parents, parent_totals: likewise of the level above, (0, ..) where there is none.
    used (P,): components that are not all zero. worth: squared steps that the encoder gives for a bit. What follows adapts.
    Returns False when buf was too short.
    """
    count, height, width = q.shape
    x = np.zeros(INPUTS + 3, np.int64)
    slots = np.zeros(INPUTS, np.int64)
    own = max(orient - 1, 0)
    kind = (min(level, 4) * 4 + orient) * UNARY
    has_parent = len(parents) > 0
    active = np.zeros(totals.shape[1:], np.int64)
    total = totals[own]
    ratios = np.full(4, 410, np.int64)  # of this component's sizes to what predicts them, in 1/4096
    up, down = np.zeros(4, np.int64), np.zeros(4, np.int64)
    for k in range(count):
        if not used[k]:
            for r in range(MARGIN, MARGIN + height):
                for c in range(MARGIN, MARGIN + width):
                    active[r, c] = active[r, c] * 5 >> 3
            continue
        m, before = sizes[own, k], sizes[own, max(k - 1, 0)]
        mp = parents[own, k] if has_parent else m
        tp = parent_totals[own] if has_parent else total
        w = WEIGHTS[(4 if k else 0) + orient]
        for i in range(4):
            down[i] = 8
            up[i] = ratios[i] * 8
        for r in range(height):
            if not decode and coder[3] + width * 12 + 64 > len(buf):
                return False
            for i in range(4):
                ratios[i] = min(up[i] // down[i], 1 << 24)
            rr = r + MARGIN
            pr = (r >> 1) + MARGIN
            lat = (r * 16 // height * 20) * 5 + min(level, 4)
            for c in range(width):
                cc = c + MARGIN
                west, north = np.int64(m[rr, cc - 1]), np.int64(m[rr - 1, cc])
                nw, ne = np.int64(m[rr - 1, cc - 1]), np.int64(m[rr - 1, cc + 1])
                far = np.int64(m[rr, cc - 2]) + m[rr - 2, cc]
                p0 = p1 = s0 = s1 = c0 = pa = sa = np.int64(0)
                if has_parent:
                    pc = (c >> 1) + MARGIN
                    p0, p1 = np.int64(mp[pr, pc]), _ring(mp, pr, pc)
                    pa = 2 * tp[pr, pc] + _ring(tp, pr, pc)
                for j in range(own):
                    s0 += sizes[j, k, rr, cc]
                    s1 += _ring(sizes[j, k], rr, cc)
                    sa += 2 * totals[j, rr, cc] + _ring(totals[j], rr, cc)
                if k:
                    c0 = np.int64(before[rr, cc])
                a0, a1 = active[rr, cc], _ring(active, rr, cc)
                e = (w[0] * west + w[1] * north + w[2] * (nw + ne) + w[3] * (far + m[rr - 1, cc + 2]) + w[4] * p0 + w[5] * p1
                     + w[6] * s0 + w[7] * s1 + (ratios[0] * (w[8] * a0 + w[9] * a1) >> 12) + (ratios[1] * w[10] * pa >> 12)
                     + (ratios[2] * w[11] * sa >> 12) + w[12] * c0 + (w[13] * ratios[3] >> 12))
                e = min(max(e, 20), 1 << 40)
                some = 0  # 1 where the coefficient is known not to be zero
                if e < CALM:
                    place = (e >> 2) * 5 + min(level, 4)
                    chance = calm[place] >> 10
                    if not decode:
                        off = abs(target[k, r, c])
                        gain = off * off - (off - 0.85) * (off - 0.85)
                        some = 1 if off > 0.5 and gain > worth * (COST[chance >> 10] + 350) / 256 else 0
                    some = code_bit(some, max(chance >> 6, 1), coder, buf, decode)
                    calm[place] = learned(calm[place], some, RATE)
                    if not some:
                        active[rr, cc] = a0 * 5 >> 3
                        down[0] += a0 + (a1 >> 2)
                        down[1] += pa
                        down[2] += sa
                        down[3] += 1
                        continue
                h = 0
                while e >> (h + 13):
                    h += 1
                likely = min(LOG[min(e >> (h + 4), LOG_END - 1)], LIKELY - 1)
                near = (2 * (west + north) + nw + ne) >> h
                near_class = _size_class(near, 11)
                act = (a0 + (a1 >> 2)) >> h
                slots[0] = STARTS[0] + min(LOG[min(e >> (h + 1), LOG_END - 1)], FINE - 1) * UNARY
                slots[1] = STARTS[1] + ((near_class * 10 + _size_class((2 * p0 + p1) >> h, 9)) * 3 + min(c0 >> h, 2)) * UNARY
                slots[2] = STARTS[2] + ((_size_class((2 * s0 + s1) >> h, 9) * 12 + near_class) * 3 + min(p0 >> h, 2)) * UNARY
                slots[3] = STARTS[3] + ((((min(west >> h, 3) * 4 + min(north >> h, 3)) * 3 + min(ne >> h, 2)) * 3
                                         + min(nw >> h, 2)) * 3 + min((far + 1 >> h) >> 1, 2)) * UNARY
                slots[4] = STARTS[4] + ((min(LOG[min(act, LOG_END - 1)] // 2, 15) * 12 + near_class) * 4
                                        + min(s0 >> h, 3)) * UNARY
                slots[5] = STARTS[5] + (lat + min(likely // 2, 19) * 5) * UNARY
                set1, row = (KINDS + likely) * UNARY, likely * UNARY
                size, negative = np.int64(0), 0
                if not decode:
                    want = target[k, r, c]
                    negative = 1 if want < 0 else 0
                    want = abs(want)
                    size = max(np.int64(want + 0.42), some)
                    most = np.int64(want + 0.5)
                    if h == 0 and some < most < UNARY:  # nearest, the next smaller one or none: what costs least
                        spent, least = 0, 1e30
                        for j in range(some, most + 1):
                            p = _predict(slots, j, maps, weights, kind + j, set1 + j, apm, row + j, x)
                            if j == some or j >= most - 1:
                                off = want - j
                                if j:
                                    off -= SHIFT[min(j, 3) - 1, 2] / 256
                                cost = off * off + worth * (spent + COST[(65536 - p) >> 4] + (256 if j else 0)) / 256
                                if cost < least:
                                    least, size = cost, np.int64(j)
                            spent += COST[p >> 4]
                u, n = size >> h, some
                while n < UNARY:
                    p = _predict(slots, n, maps, weights, kind + n, set1 + n, apm, row + n, x)
                    bit = code_bit(1 if u > n else 0, p, coder, buf, decode)
                    _learn(bit, slots, n, maps, weights, kind + n, set1 + n, apm, row + n, x)
                    if not bit:
                        break
                    n += 1
                if n == UNARY:
                    n = code_tail(u - UNARY + 1, 30, coder, buf, decode) - 1 + UNARY
                size = n
                if h:
                    size = min(n << h | raw_bits(size if decode else np.int64(want + 0.42), h, coder, buf, decode), LARGEST)
                if size:
                    negative = code_bit(negative, 32768, coder, buf, decode)
                q[k, r, c] = -size if negative else size
                size = min(size, CLIP)
                m[rr, cc] = size
                active[rr, cc] = (a0 * 5 >> 3) + 6 * size
                total[rr, cc] += size
                for i in range(4):
                    up[i] += size << 12
                down[0] += a0 + (a1 >> 2)
                down[1] += pa
                down[2] += sa
                down[3] += 1
        for i in range(4):
            ratios[i] = min(up[i] // down[i], 1 << 24)
    return True


@njit(cache=True, nogil=True, error_model="numpy")
def reconstruct(q, out):
    """q int32 (P, h, w) in steps -> out int64, in steps / 2**FRACTION, at the mean places of their intervals."""
    count, height, width = q.shape
    for k in range(count):
        for r in range(height):
            for c in range(width):
                v = np.int64(q[k, r, c])
                if v == 0:
                    out[k, r, c] = 0
                    continue
                around = np.int64(0)
                if r:
                    around += abs(np.int64(q[k, r - 1, c]))
                if r + 1 < height:
                    around += abs(np.int64(q[k, r + 1, c]))
                if c:
                    around += abs(np.int64(q[k, r, c - 1]))
                if c + 1 < width:
                    around += abs(np.int64(q[k, r, c + 1]))
                j = np.int64(0)
                while j < 4 and around >> j:
                    j += 1
                size = (abs(v) << FRACTION) + SHIFT[min(abs(v), 3) - 1, j]
                out[k, r, c] = size if v > 0 else -size


@njit(cache=True, nogil=True, error_model="numpy")
def code_numbers(values, rows, chances, coder, buf, decode):
    """Few whole numbers, int64 (n,): adaptive Exp-Golomb code. rows (n,): which of ``chances`` (R, 64) each one uses."""
    for i in range(len(values)):
        row = chances[rows[i]]
        size = abs(values[i])
        octave = 0
        while not decode and size >> octave:
            octave += 1
        j = 0
        while j < 40:
            p = row[j]
            bit = code_bit(1 if octave > j else 0, min(max(p, 64), 65472), coder, buf, decode)
            row[j] += ((bit << 16) - p) >> 4
            if not bit:
                break
            j += 1
        if j > 1:
            size = (1 << (j - 1)) | raw_bits(size, j - 1, coder, buf, decode)
        else:
            size = np.int64(j)
        if size:
            p = row[63]
            bit = code_bit(1 if values[i] < 0 else 0, min(max(p, 64), 65472), coder, buf, decode)
            row[63] += ((bit << 16) - p) >> 5
            values[i] = -size if bit else size
        else:
            values[i] = 0


# ---- wavelet: Cohen, Daubechies, Feauveau 9/7 in lifting steps (Daubechies and Sweldens, 1998), both filters of norm one ----

LIFTS = (-25987, -868, 14464, 7266)  # over 2**14
LOW, HIGH = 14252, 18835  # what undoes the scaling of low and high coefficients, over 2**14


@njit(cache=True, nogil=True, error_model="numpy")
def _unlift_rows(x, n, m):
    """Rows of x[:n, :m]: low and high ones by turns -> values."""
    for r in range(n):
        by = HIGH if r & 1 else LOW
        for c in range(m):
            x[r, c] = (x[r, c] * by + 8192) >> 14
    for step in range(3, -1, -1):
        by = LIFTS[step]
        for r in range(1 - step & 1, n, 2):
            above = r - 1 if r else 1
            below = r + 1 if r + 1 < n else n - 2
            for c in range(m):
                x[r, c] -= (by * (x[above, c] + x[below, c]) + 8192) >> 14


@njit(cache=True, nogil=True, error_model="numpy")
def _unlift_columns(x, n, m, periodic):
    around = periodic and m % 2 == 0
    for r in range(n):
        line = x[r]
        for c in range(m):
            line[c] = (line[c] * (HIGH if c & 1 else LOW) + 8192) >> 14
        for step in range(3, -1, -1):
            by = LIFTS[step]
            for c in range(1 - step & 1, m, 2):
                left = c - 1 if c else (m - 1 if around else 1)
                right = c + 1 if c + 1 < m else (0 if around else m - 2)
                line[c] -= (by * (line[left] + line[right]) + 8192) >> 14


@njit(cache=True, nogil=True, error_model="numpy")
def inverse_wavelet(x, levels, periodic):
    """Planes int64 (P, h, w) of coefficients, the low ones of each level first, -> values, in place."""
    count, height, width = x.shape
    work = np.empty((height, width), np.int64)
    for k in range(count):
        plane = x[k]
        for level in range(levels - 1, -1, -1):
            n, m = height, width
            for _ in range(level):
                n, m = (n + 1) // 2, (m + 1) // 2
            half, mid = (n + 1) // 2, (m + 1) // 2
            for r in range(n):
                source = plane[r // 2 if r % 2 == 0 else half + r // 2]
                for c in range(m):
                    work[r, c] = source[c // 2 if c % 2 == 0 else mid + c // 2]
            if n > 1:
                _unlift_rows(work, n, m)
            if m > 1:
                _unlift_columns(work, n, m, periodic)
            plane[:n, :m] = work[:n, :m]


# ---- bases across planes ---------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, error_model="numpy")
def apply_basis(basis, x, out):
    """out (T, n, m) = basis (n, n) applied to x (T, n, m), int64; the basis has UNIT bits of fraction."""
    times, n, m = x.shape
    line = np.empty(m, np.int64)
    for t in range(times):
        for i in range(n):
            line[:] = 1 << (UNIT - 1)
            for j in range(n):
                b = basis[i, j]
                if b != 0:
                    for c in range(m):
                        line[c] += b * x[t, j, c]
            for c in range(m):
                out[t, i, c] = line[c] >> UNIT


@njit(cache=True, nogil=True, error_model="numpy")
def project(basis, x, out):
    """out (T, n, m) float64 = transposed basis applied to x: the encoder's counterpart of ``apply_basis``."""
    times, n, m = x.shape
    for t in range(times):
        out[t] = 0.0
        for j in range(n):
            for i in range(n):
                b = basis[j, i] * (1.0 / (1 << UNIT))
                if b != 0.0:
                    for c in range(m):
                        out[t, i, c] += b * x[t, j, c]


@njit(cache=True, nogil=True, error_model="numpy")
def covariance(x, scale, out):
    """Add to out (n, n) the products of the rows of x (T, n, m), times scale squared."""
    times, n, m = x.shape
    for t in range(times):
        for i in range(n):
            for j in range(i + 1):
                s0 = s1 = s2 = s3 = 0.0
                for c in range(0, m - 3, 4):
                    s0 += (x[t, i, c] * scale) * (x[t, j, c] * scale)
                    s1 += (x[t, i, c + 1] * scale) * (x[t, j, c + 1] * scale)
                    s2 += (x[t, i, c + 2] * scale) * (x[t, j, c + 2] * scale)
                    s3 += (x[t, i, c + 3] * scale) * (x[t, j, c + 3] * scale)
                for c in range(m - m % 4, m):
                    s0 += (x[t, i, c] * scale) * (x[t, j, c] * scale)
                out[i, j] += (s0 + s1) + (s2 + s3)
    for i in range(n):
        for j in range(i):
            out[j, i] = out[i, j]


@njit(cache=True, nogil=True, error_model="numpy")
def eigenvectors(a, v):
    """Jacobi's rotations (Golub and Van Loan, section 8.5): a (n, n), symmetric, becomes diagonal, v gets the columns."""
    n = len(a)
    for i in range(n):
        for j in range(n):
            v[i, j] = 1.0 if i == j else 0.0
    for _ in range(12):
        off = on = 0.0
        for i in range(n):
            on += a[i, i] * a[i, i]
            for j in range(i):
                off += a[i, j] * a[i, j]
        if not off > 1e-18 * on:
            break
        for p in range(n - 1):
            for q in range(p + 1, n):
                apq = a[p, q]
                if not apq * apq > 1e-24 * abs(a[p, p] * a[q, q]):
                    continue
                theta = (a[q, q] - a[p, p]) / (2.0 * apq)
                t = 1.0 / (abs(theta) + np.sqrt(theta * theta + 1.0))
                if theta < 0:
                    t = -t
                c = 1.0 / np.sqrt(t * t + 1.0)
                s = t * c
                for i in range(n):
                    x, y = a[i, p], a[i, q]
                    a[i, p], a[i, q] = c * x - s * y, s * x + c * y
                for i in range(n):
                    x, y = a[p, i], a[q, i]
                    a[p, i], a[q, i] = c * x - s * y, s * x + c * y
                for i in range(n):
                    x, y = v[i, p], v[i, q]
                    v[i, p], v[i, q] = c * x - s * y, s * x + c * y


@njit(cache=True, nogil=True, error_model="numpy")
def orthonormal(a):
    """Columns of a (n, n) made orthonormal in their order, by Gram and Schmidt, twice over."""
    n = len(a)
    for j in range(n):
        for _ in range(2):
            for i in range(j):
                dot = 0.0
                for r in range(n):
                    dot += a[r, i] * a[r, j]
                for r in range(n):
                    a[r, j] -= dot * a[r, i]
        norm = 0.0
        for r in range(n):
            norm += a[r, j] * a[r, j]
        norm = np.sqrt(norm)
        for r in range(n):
            a[r, j] /= norm
