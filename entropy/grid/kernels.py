"""Numba kernels: prediction of integer planes and the context-mixing coder of what it misses. See ``SPEC.md``."""

from __future__ import annotations

import numpy as np
from numba import njit

from ..binary import REACH, SQUASH, STRETCH, code_bit, code_tail, learned, raw_bits

COUNT_LIMIT = 255
RATE = np.array([65536 // (n + 2) if n < 2 else int(65536 / (n + 1.5)) for n in range(COUNT_LIMIT + 1)], np.int32)
LEARN = 16  # the mixer's rate, a shift
INPUTS = 5  # contexts of a decision; the mixer has one more input, a constant


@njit(cache=True, nogil=True, error_model="numpy")
def _mixed(bit, slots, maps, weights, wset, apm, apm_row, x, coder, buf, decode):
    """Code one decision; mixes the predictions of INPUTS contexts in the logistic domain (as in PAQ) and learns.

    slots (INPUTS,): places in ``maps`` (uint32: 22 bits of probability, 10 of count). weights (sets, INPUTS + 1) int64 with
    16 bits of fraction; ``wset`` the row. apm (rows, 33): refines the mixed probability by a small context.
    """
    total = weights[wset, INPUTS] * 256
    for i in range(INPUTS):
        s = np.int64(STRETCH[np.int64(maps[slots[i]]) >> 18])
        x[i] = s
        total += weights[wset, i] * s
    dot = total >> 16
    if dot > REACH:
        dot = REACH
    elif dot < -REACH:
        dot = -REACH
    p = np.int64(SQUASH[dot + REACH])
    place = dot + 3072  # 1..6143, 192 to a node
    j = place // 192
    part = place - j * 192
    refined = (apm[apm_row, j] * (192 - part) + apm[apm_row, j + 1] * part) // 192
    q = (p + refined) >> 1
    if q < 1:
        q = 1
    elif q > 65535:
        q = 65535
    bit = code_bit(bit, q, coder, buf, decode)
    near = j + 1 if part >= 96 else j
    apm[apm_row, near] += ((bit << 16) - apm[apm_row, near]) >> 6
    error = (bit << 16) - p
    for i in range(INPUTS):
        weights[wset, i] += (x[i] * error + (1 << (LEARN - 1))) >> LEARN
        maps[slots[i]] = np.uint32(learned(np.int64(maps[slots[i]]), bit, RATE))
    weights[wset, INPUTS] += (256 * error + (1 << (LEARN - 1))) >> LEARN
    return bit


# ---- prediction ------------------------------------------------------------------------------------------------------

# Neighbours (row, column) in units of the stage's lattice, across (even rows, odd columns) and down (odd rows). The first
# two are the pair that the target lies between; the last two are known in reference planes only.
PATTERN = np.array([
    [[0, -1], [0, 1], [0, -3], [0, 3], [-2, -1], [-2, 1], [2, -1], [2, 1], [-2, 0], [0, -2], [-2, -2], [-2, 2], [-1, 0],
     [1, 0]],
    [[-1, 0], [1, 0], [-3, 0], [3, 0], [-1, -1], [-1, 1], [1, -1], [1, 1], [0, -1], [-2, 0], [-2, -1], [-2, 1], [0, -2],
     [0, 1]],
], np.int64)  # fmt: skip
# places of W, N, NE, NW among those coded in the same stage, and of the two sides of a reference
NEAR = np.array([[9, 8, 11, 10, 12, 13], [8, 9, 11, 10, 8, 13]], np.int64)
OWN = np.array([11, 12], np.int64)  # features of the plane itself
PER_REF = 4
FEATURES = 20
PLACES = PATTERN.shape[1]


@njit(cache=True, nogil=True, error_model="numpy")
def _solve(cov, rhs, n, w, work, column, ridge, prior):
    """w with (cov + ridge) (w - prior) = rhs - cov prior, by LDL^T: additions, products and quotients only."""
    for i in range(n):
        for j in range(i + 1):
            work[i, j] = cov[i, j]
        work[i, i] += ridge
        w[i] = rhs[i] + ridge * prior[i]
    for j in range(n):
        d = work[j, j]
        for i in range(j + 1, n):
            column[i] = work[i, j]
        for i in range(j + 1, n):
            share = column[i] / d
            for k in range(j + 1, i + 1):
                work[i, k] -= share * column[k]
            work[i, j] = share
    for i in range(n):
        for k in range(i):
            w[i] -= work[i, k] * w[k]
    for i in range(n):
        w[i] /= work[i, i]
    for i in range(n - 1, 0, -1):
        for k in range(i):
            w[k] -= work[i, k] * w[i]


@njit(cache=True, nogil=True, error_model="numpy")
def _reflect(i, n):
    if n == 1:
        return 0
    while i < 0 or i >= n:
        if i < 0:
            i = -i
        if i >= n:
            i = 2 * (n - 1) - i
    return i


@njit(cache=True, nogil=True, error_model="numpy")
def _place_map(n, stride, size, periodic):
    """Positions in the full array of lattice indices -4..n+3 of an axis with n lattice points."""
    out = np.empty(n + 8, np.int64)
    for i in range(-4, n + 4):
        if periodic and n % 2 == 0 and n * stride == size and n > 4:
            j = (i + n) % n
        else:
            j = _reflect(i, n)
        out[i + 4] = j * stride
    return out


LOG_END = 4096
# two classes per octave: 0, 1, 2, 3, 4-5, 6-7, 8-11, ..
LOG = np.array([v if v < 4 else 2 * (v.bit_length() - 1) + (v >> (v.bit_length() - 2) & 1) for v in range(LOG_END)], np.int64)


def _magnitudes() -> np.ndarray:
    """Smallest |k| of each of the 256 classes in which magnitudes are kept: exact below 32, then 8 classes per octave."""
    high = [(8 + j) << (o - 3) for o in range(5, 33) for j in range(8)]
    return np.array(list(range(32)) + high, np.int64)


MAGNITUDE = _magnitudes()
UNARY = 14  # mixed decisions on the size of a residual; whatever is larger continues with an Exp-Golomb code
DECISIONS = 16  # ids: 0 .. UNARY - 1 sizes, 14 sign, 15 first low bit
STAGES = 8  # of statistics: three finest spacings and all coarser ones, across and down
CLASSES = 24  # of magnitudes in contexts
SIZES = (4 * 4 * 3 * 4 * 2 * STAGES, 16 * 12 * 4, CLASSES * STAGES, 16 * 16 * 2, 8 * 8 * 4 * 2)  # contexts of each input
STARTS = np.concatenate([[0], np.cumsum(SIZES)]).astype(np.int64) * DECISIONS
BANDS = 12
CARRY = 0.5  # what a band takes over from the statistics of the one before
QUIET = 1 << 13  # of 2**22: below this chance of a residual, no contexts are mixed
QUIET_ROWS = 12 * 12 * 12 * STAGES
APM_ROWS = DECISIONS * CLASSES
APPRENTICE = 8192


@njit(cache=True, nogil=True, error_model="numpy")
def _mag8(k):
    if k < 32:
        return k
    o = 5
    while k >> (o + 1):
        o += 1
    if o > 32:
        return 255
    return 32 + (o - 5) * 8 + ((k >> (o - 3)) & 7)


@njit(cache=True, nogil=True, error_model="numpy")
def _code_residual(k, h, nonzero, slots, wset, arow, maps, weights, apm, x, coder, buf, decode):
    """k, a signed integer; h low bits of its magnitude are nearly uniform. Slots are those of decision 0."""
    size = abs(k)
    u = size >> h
    n = 0
    if nonzero:  # known to be, and h is 0
        n = 1
        for i in range(INPUTS):
            slots[i] += 1
    while n < UNARY:
        bit = _mixed(1 if u > n else 0, slots, maps, weights, wset * DECISIONS + n, apm, arow * DECISIONS + n, x, coder, buf,
                     decode)
        if not bit:
            break
        n += 1
        for i in range(INPUTS):
            slots[i] += 1
    if n == UNARY:  # whatever is beyond
        u = code_tail(u - UNARY + 1, 40, coder, buf, decode) - 1 + UNARY
    else:
        u = n
    low = 0
    if h > 0:
        low = raw_bits(size, h, coder, buf, decode)
    size = u << h | low
    if size:
        for i in range(INPUTS):
            slots[i] += UNARY - n
        sign = _mixed(1 if k < 0 else 0, slots, maps, weights, wset * DECISIONS + UNARY, apm, arow * DECISIONS + UNARY, x,
                      coder, buf, decode)
        return -size if sign else size
    return 0


@njit(cache=True, nogil=True, error_model="numpy")
def code_planes(target, offset, inverse, rounding, mask, planes, start, sizes, refs, steps, limits, periodic, pace, lazy,
                maps, weights, apm, quiet, cov, rhs, wts, prior, coder, buf, decode):
    """Code the planes from ``start`` on of ``planes`` int32 (P, h, w), in order; the decoder fills them.

    target (1 or P - start, h, w): what the encoder wants, (target - offset) * inverse in lattice units, in steps rounded up
    from 1 - ``rounding`` on; not read by the decoder. mask (1 or P - start, h, w) uint8: not zero where nothing is coded. sizes
    (P, h, w) uint8: classes of residuals, zero at first. refs (P, 2): which planes are known already and alike, -1 for none.
    steps: of the stages, finest first. limits: smallest and largest value that a prediction may have. pace: forgetting factor,
    samples between solutions, ridge. lazy: a predictor that has learnt from ``APPRENTICE`` cells learns from those without a
    residual only where their column has no bit in common with it. What follows is the state that adapts. Returns False when buf
    was too short.
    """
    count, height, width = planes.shape
    slots = np.zeros(INPUTS, np.int64)
    x = np.zeros(INPUTS, np.int64)
    f = np.zeros(FEATURES, np.float64)
    at = np.zeros(PLACES, np.int64)
    row_at = np.zeros(PLACES, np.int64)
    base_at = np.zeros(PLACES, np.int64)
    work = np.zeros((FEATURES, FEATURES), np.float64)
    column = np.zeros(FEATURES, np.float64)
    forget, every, ridge = pace[0], int(pace[1]), pace[2]
    taught = np.zeros(len(prior), np.int64)
    top = 0
    while (1 << top) < max(height, width):
        top += 1
    for p in range(start, count):
        own, ks, msk = planes[p].reshape(-1), sizes[p].reshape(-1), mask[min(p - start, len(mask) - 1)].reshape(-1)
        nref = 0
        r1, r2 = refs[p, 0], refs[p, 1]
        if r1 >= 0:
            nref = 1
            if r2 >= 0:
                nref = 2
        one, two = planes[max(r1, 0)].reshape(-1), planes[max(r2, 0)].reshape(-1)
        k1, k2 = sizes[max(r1, 0)].reshape(-1), sizes[max(r2, 0)].reshape(-1)
        want_plane = target[min(p - start, len(target) - 1)].reshape(-1)
        for level in range(top, -1, -1):
            t = 1 << level
            n, m = (height + t - 1) // t, (width + t - 1) // t
            rows = _place_map(n, t, height, False)
            cols = _place_map(m, t, width, periodic)
            for down in range(2):
                first = level == top
                if first and down == 1:
                    continue
                stage = min(level, 3) * 2 + down
                kind = stage * 3 + nref
                slot = kind * BANDS
                step = steps[min(level * 2 + 1 - down, len(steps) - 1)]
                pattern = PATTERN[down]
                iw, inn, ine, inw, side1, side2 = NEAR[down]
                own_features = OWN[down]
                features = own_features + nref * PER_REF
                wide = (features + 3) // 4 * 4
                for i in range(FEATURES):
                    f[i] = 0.0
                c, b, w, w0 = cov[slot], rhs[slot], wts[slot], prior[kind]
                r0, rs = down, 2
                c0, cs = (0, 1) if down else (1, 2)
                scale = 1.0 / step
                unit0 = 8.0 * scale
                if first:
                    c0 = 0
                else:  # what is not coded yet stands at the mean of its pair
                    for r in range(r0, n, rs):
                        i0, i1 = rows[r + pattern[0, 0] + 4] * width, rows[r + pattern[1, 0] + 4] * width
                        for q in range(c0, m, cs):
                            own[r * t * width + q * t] = (own[i0 + cols[q + pattern[0, 1] + 4]]
                                                          + own[i1 + cols[q + pattern[1, 1] + 4]]) >> 1
                since = 0
                for r in range(r0, n, rs):
                    if coder[3] + m * 64 + 64 > len(buf) and not decode:
                        return False
                    band = r * 16 // n
                    if band > 7:
                        band = 15 - band
                    mine = kind * BANDS + r * BANDS // n
                    if mine != slot:
                        if c[0, 0] > 0.0 and cov[mine, 0, 0] == 0.0:
                            for i in range(features):
                                for j in range(features):
                                    cov[mine, i, j] = c[i, j] * CARRY
                                rhs[mine, i] = b[i] * CARRY
                                wts[mine, i] = w[i]
                        slot = mine
                        c, b, w = cov[slot], rhs[slot], wts[slot]
                    for i in range(PLACES):
                        row_at[i] = rows[r + pattern[i, 0] + 4] * width
                        base_at[i] = row_at[i] + pattern[i, 1] * t
                    for q in range(c0, m, cs):
                        here = (r * width + q) * t
                        if q >= 3 and q < m - 3:
                            for i in range(PLACES):
                                at[i] = base_at[i] + q * t
                        else:
                            for i in range(PLACES):
                                at[i] = row_at[i] + cols[q + pattern[i, 1] + 4]
                        # prediction
                        base = acc = slope = curve = 0.0
                        if first:
                            if nref:
                                base = np.float64(one[here])
                        else:
                            base = (np.float64(own[at[0]]) + np.float64(own[at[1]])) * 0.5
                            for i in range(own_features):
                                f[i] = own[at[i + 1]] - base
                            slope = f[0]
                            curve = f[1] + f[2]
                            g = own_features
                            for z in range(nref):
                                ref = one if z == 0 else two
                                middle = (np.float64(ref[at[0]]) + np.float64(ref[at[1]])) * 0.5
                                f[g] = ref[here] - middle
                                f[g + 1] = ref[at[1]] - middle
                                f[g + 2] = ref[at[side1]] - middle
                                f[g + 3] = ref[at[side2]] - middle
                                g += PER_REF
                            s0 = s1 = s2 = s3 = 0.0
                            for i in range(0, wide, 4):
                                s0 += w[i] * f[i]
                                s1 += w[i + 1] * f[i + 1]
                                s2 += w[i + 2] * f[i + 2]
                                s3 += w[i + 3] * f[i + 3]
                            acc = (s0 + s1) + (s2 + s3)
                            if not abs(acc) < 1e12:
                                acc = 0.0
                        guess = np.int64(np.floor(base + acc + 0.5))
                        if guess < limits[0]:
                            guess = limits[0]
                        elif guess > limits[1]:
                            guess = limits[1]
                        if msk[here]:
                            own[here] = guess
                            continue
                        # what the neighbours' residuals were
                        wk, nk, ek, lk, uk, dk = ks[at[iw]], ks[at[inn]], ks[at[ine]], ks[at[inw]], ks[at[0]], ks[at[1]]
                        rk1 = rk2 = 0
                        quiet_here = (wk | nk | ek | lk | uk | dk) == 0
                        if nref > 0:
                            rk1 = k1[here]
                            quiet_here = quiet_here and (rk1 | k1[at[0]] | k1[at[1]] | k1[at[side1]] | k1[at[side2]]) == 0
                            if nref > 1:
                                rk2 = k2[here]
                                quiet_here = quiet_here and rk2 == 0
                        off_class = LOG[min(int(abs(acc) * unit0), LOG_END - 1)]
                        curve_class = LOG[min(int(abs(curve) * unit0), LOG_END - 1)]
                        slope_class = LOG[min(int(abs(slope) * unit0), LOG_END - 1)]
                        k = 0
                        if not decode:
                            off = ((np.float64(want_plane[here]) - offset) * inverse - guess) * scale
                            k = np.int64(np.floor(abs(off) + rounding))
                            if off < 0:
                                k = -k
                        calm = False
                        if quiet_here:
                            row = (min(off_class, 11) * 12 + min(curve_class, 11)) * 12 + min(slope_class, 11)
                            row = row * STAGES + stage
                            pr = quiet[row] >> 10
                            if pr < QUIET:  # of 22 bits
                                calm = True
                            chance = max(pr >> 6, 1)
                        if calm:
                            hit = code_bit(1 if k != 0 else 0, chance, coder, buf, decode)
                            quiet[row] = learned(quiet[row], hit, RATE)
                        else:
                            hit = 1
                        if hit:
                            a, bb, cc, dd = MAGNITUDE[wk], MAGNITUDE[nk], MAGNITUDE[ek], MAGNITUDE[lk]
                            ud = MAGNITUDE[uk] + MAGNITUDE[dk]
                            near = 4 * (a + bb) + 2 * (cc + dd + ud)
                            ref1 = ref2 = around = 0
                            if nref > 0:
                                ref1 = MAGNITUDE[rk1]
                                around = (2 * ref1 + MAGNITUDE[k1[at[0]]] + MAGNITUDE[k1[at[1]]] + MAGNITUDE[k1[at[side1]]]
                                          + MAGNITUDE[k1[at[side2]]])
                                ref2 = MAGNITUDE[rk2]
                            h = 0
                            mean = (near + 2 * around) // (28 if nref else 16)
                            while mean >> (h + 3):
                                h += 1
                            near_class = min(LOG[min(near >> h, LOG_END - 1)], CLASSES - 1)
                            both_class = LOG[min((2 * near + 2 * around + ref2) >> h, LOG_END - 1)]
                            off_class = min(max(off_class - 2 * h, 0), 11)
                            curve_class = min(max(curve_class - 2 * h, 0), 15)
                            slope_class = min(max(slope_class - 2 * h, 0), 15)
                            a, bb, cc, ref1, ref2, ud = a >> h, bb >> h, cc >> h, ref1 >> h, ref2 >> h, ud >> h
                            slots[0] = STARTS[0] + (((((min(a, 3) * 4 + min(bb, 3)) * 3 + min(cc, 2)) * 4 + min(ref1, 3)) * 2
                                                     + min(ud, 1)) * STAGES + stage) * DECISIONS
                            slots[1] = STARTS[1] + ((slope_class * 12 + off_class) * 4 + min(ud, 3)) * DECISIONS
                            slots[2] = STARTS[2] + (both_class * STAGES + stage) * DECISIONS
                            slots[3] = STARTS[3] + ((curve_class * 16 + slope_class) * 2 + down) * DECISIONS
                            slots[4] = STARTS[4] + (((min(ref1, 7) * 8 + min(ref2, 7)) * 4 + min(a, 3)) * 2 + down) * DECISIONS
                            k = _code_residual(k, h, calm, slots, stage, near_class, maps, weights, apm, x, coder, buf, decode)
                            if quiet_here and not calm:
                                quiet[row] = learned(quiet[row], 1 if k else 0, RATE)
                        else:
                            k = 0
                        value = guess + k * step
                        own[here] = value
                        ks[here] = _mag8(abs(k))
                        if first or (k == 0 and (q >> (cs - 1)) & lazy and taught[kind] >= APPRENTICE):
                            continue
                        taught[kind] += 1
                        # learn
                        wanted = (value - base) * scale
                        for i in range(features):
                            f[i] *= scale
                        for i in range(features):
                            fi = f[i]
                            for j in range((i | 3) + 1):
                                c[i, j] += fi * f[j]
                            b[i] += fi * wanted
                        since += 1
                        if since == every:
                            since = 0
                            _solve(c, b, features, w, work, column, ridge, w0)
                            for i in range(features):
                                for j in range((i | 3) + 1):
                                    c[i, j] *= forget
                                b[i] *= forget
    return True
