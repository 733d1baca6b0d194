"""Planes for a small mean squared error: wavelet within planes, a basis across them, contexts for what is left.

    planes (T, L, H, W) - their means --9/7 wavelet in rows and columns--> bands --basis over times, basis over levels-->
    coefficients / step --rounded where that is worth its bits--> integers --context mixing--> bytes

One step serves all bands, for all transforms are orthonormal or nearly so. The basis over levels changes with the spacing: a
cosine transform, an orthogonal wavelet, or the eigenvectors of the covariance of the decoded coefficients of the spacing
before, which cost nothing; where that pays turned by correlations that the payload holds. Bytes: ``SPEC.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ...container.errors import CorruptStream
from .. import binary
from ..binary import SQUASH
from . import transform_kernels as k

PLAIN, COSINE, WAVELET, LEARNT = range(4)  # bases; times 8, plus log2 of 1 / (step of correlations), 0 where there are none
FINEST = 7
WORTH = 0.08  # squared steps that a bit is worth where a coefficient may become smaller,
TRADE = 0.115  # and where bases are compared: distortion falls by 6 dB a bit
TRIES = 3  # bases that are tried at a spacing, and how much more than the best they may cost by a rough count
NEAR = 1.1
FAINT = 0.03  # variance in squared steps up to which a component is not turned
MEANS = 7  # bits below a step of the means of planes
SHALLOW = 10  # planes of fewer rows and columns are not split
_ONE = 1 << k.UNIT
# rows of adaptive chances of few numbers; turns are told apart by how far their components are from each other
_CHOICE, _USED, _MEAN, _TURNED, _SPREAD, _TURN = range(6)
_ROWS = _TURN + 5

# Logits in 1/256 of the first 8 decisions (magnitude above 0, 1, ..), for every third class of the expected magnitude;
# from the training fields
_PRIOR = np.array([
    [-1650, -1357, -563, -307, -154, -77, 0, 0], [-1640, -1357, -563, -307, -154, -77, 0, 0],
    [-1630, -1357, -563, -307, -154, -77, 0, 0], [-1620, -1357, -563, -307, -154, -77, 0, 0],
    [-1600, -1357, -563, -307, -154, -77, 0, 0], [-1570, -1298, -574, -306, -153, -77, 0, 0],
    [-1458, -1226, -567, -311, -155, -77, 0, 0], [-1119, -1059, -614, -315, -154, -77, 0, 0],
    [-791, -923, -602, -303, -148, -75, 1, 2], [-540, -783, -517, -337, -165, -80, 4, 2],
    [-303, -665, -469, -314, -184, -83, -3, 2], [-71, -432, -368, -265, -165, -77, -4, 9],
    [135, -170, -213, -163, -107, -49, -10, 36], [306, 53, 7, -13, 14, 30, 66, 96],
    [446, 232, 204, 181, 177, 176, 183, 192], [531, 391, 380, 362, 354, 346, 342, 342],
    [625, 495, 492, 493, 483, 463, 455, 435], [665, 540, 542, 543, 516, 495, 478, 451],
    [665, 540, 542, 543, 516, 495, 478, 451], [665, 540, 542, 543, 516, 495, 478, 451],
    [665, 540, 542, 543, 516, 495, 478, 451],
], np.int64)  # fmt: skip
_SURE = 6  # samples that the prior counts for


@lru_cache(maxsize=1)
def _first_maps() -> np.ndarray:
    """Chances of all contexts at first: those of the expected magnitude where it is part of them, else even ones."""
    maps = np.full(int(k.STARTS[-1]), 1 << 31, np.uint32)

    def row(fine: int) -> np.ndarray:
        j, part = divmod(fine, 3)
        logits = (_PRIOR[j] * (6 - 2 * part - 1) + _PRIOR[j + 1] * (2 * part + 1)) // 6
        chances = SQUASH[logits.clip(-binary.REACH, binary.REACH) + binary.REACH].astype(np.int64) << 16 | _SURE
        return np.concatenate([chances, np.repeat(chances[-1:], k.UNARY - 8)]).astype(np.uint32)

    fine = maps[k.STARTS[0] : k.STARTS[1]].reshape(k.FINE, k.UNARY)
    fine[:] = [row(i) for i in range(k.FINE)]
    by_row = maps[k.STARTS[5] : k.STARTS[6]].reshape(16, 20, 5, k.UNARY)
    by_row[:] = np.array([row(min(2 * i + 13, k.FINE - 1)) for i in range(20)])[:, None]
    return maps


class _Stream:
    """The arithmetic coder of a part and all that adapts."""

    def __init__(self, buf: np.ndarray, decode: bool):
        self.buf, self.decode = buf, decode
        self.coder = binary.start(buf if decode else None)
        self.maps = _first_maps().copy()
        self.weights = np.full(((k.KINDS + k.LIKELY) * k.UNARY, k.INPUTS + 1), 14000, np.int64)
        self.weights[:, -1] = 0
        line = SQUASH[np.minimum(np.arange(33) * 192, len(SQUASH) - 1)].astype(np.int64)
        self.apm = np.tile(line, (k.LIKELY * k.UNARY, 1))
        self.calm = np.full(k.CALM // 4 * 5, (1 << 14) << 10, np.int64)
        self.chances = np.full((_ROWS, 64), 1 << 15, np.int64)

    def adaptive(self) -> tuple[np.ndarray, ...]:
        return self.maps, self.weights, self.apm, self.calm

    def state(self) -> tuple[np.ndarray, ...]:
        return self.coder, self.chances, *self.adaptive()

    def keep(self, since: int = 0) -> tuple[int, np.ndarray, list[np.ndarray]]:
        """What ``back_to`` comes back to, with the bytes written from position ``since`` on."""
        return since, self.buf[since : self.coder[3]].copy(), [array.copy() for array in self.state()]

    def back_to(self, kept: tuple[int, np.ndarray, list[np.ndarray]]) -> None:
        since, written, state = kept
        self.buf[since : since + len(written)] = written
        for array, old in zip(self.state(), state):
            array[...] = old

    def bits(self) -> float:
        return 8.0 * float(self.coder[3]) - float(np.log2(self.coder[1] - self.coder[0] + 1))

    def numbers(self, values: np.ndarray, rows: np.ndarray | int) -> np.ndarray:
        """Code whole numbers; the decoder's ``values`` are any of as many."""
        values = np.array(values, np.int64)
        rows = np.zeros(len(values), np.int64) + rows
        k.code_numbers(values, rows, self.chances, self.coder, self.buf, self.decode)
        return values

    def number(self, value: int, row: int) -> int:
        return int(self.numbers(np.array([value]), row)[0])

    def finish(self) -> bytes:
        return self.buf[: self.coder[3]].tobytes() + binary.ending(self.coder)


# ---- bases -----------------------------------------------------------------------------------------------------------------


def _cosines(count: int) -> list[int]:
    """cos(i pi / count) for i < 2 count, over 2**96: whole numbers, so that no library matters."""
    one = 1 << 96
    pi = 0x3243F6A8885A308D313198A2E  # pi over 2**96, from the digits of 3.243F6A88..
    angle = pi // count
    c = s = 0
    term, n = one, 0
    while term:
        c, s = (c + (term if n % 4 == 0 else -term), s) if n % 2 == 0 else (c, s + (term if n % 4 == 1 else -term))
        n += 1
        term = term * angle // one // n
    x, y, out = one, 0, []
    for _ in range(2 * count):
        out.append(x)
        x, y = (x * c - y * s) >> 96, (x * s + y * c) >> 96
    return out


@lru_cache(maxsize=8)
def _fixed(kind: int, n: int) -> np.ndarray:
    """A basis (n, n) int64 with ``UNIT`` bits of fraction: its columns are the components."""
    if kind == PLAIN or n == 1:
        return np.eye(n, dtype=np.int64) * _ONE
    if kind == COSINE:  # DCT-II
        table = np.array([c >> 50 for c in _cosines(2 * n)], np.float64) * 2.0**-46
        i = np.arange(n)
        basis = table[(2 * i[:, None] + 1) * i % (4 * n)] * np.sqrt(2.0 / n)
        basis[:, 0] = np.sqrt(1.0 / n)
    else:
        basis, size, sizes = np.eye(n), n, []
        while size > 2:
            sizes.append(size)
            size = (size + 1) // 2
        for size in reversed(sizes):
            basis[:size] = _unlift(basis[:size])
        k.orthonormal(basis)
    return np.rint(basis * _ONE).astype(np.int64)


def _order(vectors: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors[:, np.argsort(-values, kind="stable")])


def _eigenvectors(matrix: np.ndarray) -> np.ndarray:
    """Columns in the order of falling eigenvalues, float64."""
    vectors = np.empty_like(matrix)
    k.eigenvectors(matrix, vectors)
    return _order(vectors, np.diag(matrix).copy())


def _times(basis: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Some columns of a basis, integers (n, m), times vectors (m, m) float64, rounded to integers again."""
    out = np.zeros(basis.shape)
    for j in range(len(vectors)):
        out += basis[:, j, None] * vectors[j]
    return np.rint(out).astype(np.int64)


def _learnt(bands: list[np.ndarray]) -> np.ndarray:
    """The eigenvectors of the covariance of decoded bands, int64 (T, L, h, w)."""
    n = bands[0].shape[1]
    matrix = np.zeros((n, n))
    for band in bands:
        k.covariance(band.reshape(*band.shape[:2], -1), 2.0**-k.FRACTION, matrix)
    return _times(np.eye(n, dtype=np.int64) * _ONE, _eigenvectors(matrix))


@dataclass
class _Turns:
    """Which components of a basis are turned among each other, and the covariance that says how, quantised."""

    turned: np.ndarray  # (n,) bool
    spread: np.ndarray  # of these m: twice the base-2 logarithm of their variance in squared steps
    turns: np.ndarray  # their correlations, lower triangle by rows, in steps of 2**-fine

    @classmethod
    def measured(cls, covariance: np.ndarray, fine: int) -> _Turns:
        variance = np.diag(covariance)
        turned = variance > FAINT
        kept = variance[turned]
        turns = covariance[np.ix_(turned, turned)] / np.sqrt(np.outer(kept, kept))
        return cls(turned, np.rint(2 * np.log2(kept)).astype(np.int64),
                   np.rint(turns[np.tril_indices(len(kept), -1)] * 2.0**fine).astype(np.int64))  # fmt: skip

    @property
    def cost(self) -> float:
        """Bits, about."""
        return float(np.log2(1 + 2.0 * np.abs(self.turns)).sum() * 1.5 + 0.8 * len(self.turns) + 4 * len(self.turned))

    def code(self, stream: _Stream) -> _Turns:
        turned = stream.numbers(self.turned, _TURNED) != 0
        m = int(turned.sum())
        steps = stream.numbers(np.diff(self.spread, prepend=0) if not stream.decode else np.zeros(m), _SPREAD)
        i, j = np.tril_indices(m, -1)
        turns = stream.numbers(self.turns if not stream.decode else np.zeros(len(i)), _TURN + np.minimum((i - j - 1) // 3, 4))
        return _Turns(turned, np.cumsum(steps), turns)

    def turn(self, basis: np.ndarray, fine: int) -> np.ndarray:
        """The basis with its components turned."""
        m = len(self.spread)
        if not m:
            return basis
        whole = np.clip(self.spread, -64, 256)
        root = np.ldexp(np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.6817928305074292])[whole & 3],
                        (whole >> 2).astype(np.int32))  # fmt: skip
        matrix = np.zeros((m, m))
        matrix[np.tril_indices(m, -1)] = np.clip(self.turns, -(1 << fine), 1 << fine) * 2.0**-fine
        matrix += matrix.T
        np.fill_diagonal(matrix, 1.0)
        matrix *= root
        matrix *= root[:, None]
        basis = basis.copy()
        basis[:, self.turned] = _times(basis[:, self.turned], _eigenvectors(matrix))
        return basis


# ---- wavelet ---------------------------------------------------------------------------------------------------------------


def depth(height: int, width: int) -> int:
    """How often planes are split."""
    n = 0
    while max(height, width) >= SHALLOW:
        height, width, n = (height + 1) // 2, (width + 1) // 2, n + 1
    return n


def _bands(height: int, width: int, levels: int) -> Iterator[tuple[int, list[tuple[int, slice, slice]]]]:
    """(spacing, [(orientation, rows, columns)]) from coarse to fine, within planes of coefficients."""
    sizes = [(height, width)]
    for _ in range(levels):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    yield levels, [(0, slice(0, sizes[-1][0]), slice(0, sizes[-1][1]))]
    for level in range(levels - 1, -1, -1):
        (n, m), (half, mid) = sizes[level], sizes[level + 1]
        low, high, left, right = slice(0, half), slice(half, n), slice(0, mid), slice(mid, m)
        yield level, [(1, low, right), (2, high, left), (3, high, right)]


def _unlift(x: np.ndarray) -> np.ndarray:
    """One level of the inverse wavelet along the first axis, not periodic, float64."""
    n = len(x)
    y = np.empty_like(x)
    y[0::2], y[1::2] = x[: (n + 1) // 2] * (k.LOW / 2.0**14), x[(n + 1) // 2 :] * (k.HIGH / 2.0**14)
    for step in range(3, -1, -1):
        _lift_step(y, step, -k.LIFTS[step] / 2.0**14, False)
    return y


def _lift_step(x: np.ndarray, step: int, by: float, around: bool) -> None:
    """Add to every second row of x ``by`` times its neighbours."""
    n = len(x)
    mine = np.arange(1 - step & 1, n, 2)
    left, right = mine - 1, mine + 1
    if around:
        left, right = left % n, right % n
    else:
        left, right = np.abs(left), np.where(right >= n, 2 * (n - 1) - right, right)
    x[mine] += by * (x[left] + x[right])


def _lift(x: np.ndarray, around: bool) -> None:
    """One level of the wavelet along the first axis, in place."""
    n = len(x)
    if n < 2:
        return
    for step in range(4):
        _lift_step(x, step, k.LIFTS[step] / 2.0**14, around and n % 2 == 0)
    low, high = x[0::2] * (2.0**14 / k.LOW), x[1::2] * (2.0**14 / k.HIGH)
    x[: len(low)], x[len(low) :] = low, high


def forward_wavelet(planes: np.ndarray, periodic: bool) -> None:
    """Planes float64 (.., h, w) become their coefficients, in place."""
    height, width = planes.shape[-2:]
    for plane in planes.reshape(-1, height, width):
        n, m = height, width
        for _ in range(depth(height, width)):
            turned = np.ascontiguousarray(plane[:n, :m].T)
            _lift(turned, periodic)
            plane[:n, :m] = turned.T
            _lift(plane[:n, :m], False)
            n, m = (n + 1) // 2, (m + 1) // 2


def smooth_fill(plane: np.ndarray, known: np.ndarray) -> np.ndarray:
    """A plane (h, w) whose unknown cells are smooth between the known ones: means of fours, fours of these, and so on; then
    each spacing is relaxed. Where nothing is known: zeros."""
    if known.all():
        return plane
    if not known.any():
        return np.zeros_like(plane)
    height, width = plane.shape
    even = ((0, height % 2), (0, width % 2))
    blocks = (-(-height // 2), 2, -(-width // 2), 2)
    count = np.pad(known.astype(np.float64), even).reshape(blocks).sum((1, 3))
    total = np.pad(np.where(known, plane, 0.0), even).reshape(blocks).sum((1, 3))
    coarse = smooth_fill(total / np.maximum(count, 1), count > 0)
    filled = np.where(known, plane, coarse.repeat(2, 0).repeat(2, 1)[:height, :width])
    for _ in range(4):
        wide = np.pad(filled, 1, "edge")
        around = (wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:]) / 4
        filled = np.where(known, plane, around)
    return filled


# ---- parts -----------------------------------------------------------------------------------------------------------------


@dataclass
class Choices:
    """What the encoder tries out: the basis over times, and those over levels by spacing, coarsest first; -1 for not yet."""

    times: int = -1
    levels: list[int] = field(default_factory=list)


def _project(basis: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x (T, n, ..) float64 -> its components over the second axis."""
    flat = np.ascontiguousarray(x).reshape(*x.shape[:2], -1)
    out = np.empty_like(flat)
    k.project(basis, flat, out)
    return out.reshape(x.shape)


def _restore(basis: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Components (T, n, ..) int64 -> what they are of."""
    flat = np.ascontiguousarray(x).reshape(*x.shape[:2], -1)
    out = np.empty_like(flat)
    k.apply_basis(basis, flat, out)
    return out.reshape(x.shape)


def _bits_about(x: np.ndarray) -> float:
    return float(np.log2(1 + 2 * np.square(x)).sum()) * 1.3


class _Level:
    """Bands of one spacing while they are coded."""

    def __init__(self, shape: tuple[int, int], bands: list[tuple[int, slice, slice]], level: int, above: _Level | None):
        self.shape, self.bands, self.level, self.above = shape, bands, level, above
        self.heights = [(rows.stop - rows.start, columns.stop - columns.start) for _, rows, columns in bands]
        self.room = tuple(max(size[i] for size in self.heights) + 2 * k.MARGIN + 1 for i in (0, 1))
        self.decoded: list[np.ndarray] = []

    def code(self, stream: _Stream, wanted: list[np.ndarray] | None) -> list[np.ndarray] | None:
        """Coefficients of each band int64 (T, L, h, w), decoded; None when the buffer was too short."""
        planes = self.shape[0] * self.shape[1]
        self.sizes = np.zeros((3, planes, *self.room), np.int32)
        self.totals = np.zeros((3, *self.room), np.int64)
        above = self.above if self.above is not None and self.above.bands[0][0] else None
        parents = above.sizes if above else np.zeros((0, 1, 1, 1), np.int32)
        parent_totals = above.totals if above else np.zeros((0, 1, 1), np.int64)
        out = []
        for i, (orient, _, _) in enumerate(self.bands):
            q = np.zeros((planes, *self.heights[i]), np.int32)
            target = np.zeros((1, 1, 1)) if wanted is None else wanted[i].reshape(q.shape)
            used = np.zeros(planes, np.int64) if wanted is None else (np.abs(target).max((1, 2), initial=0) >= 0.6)
            if q.size:
                used = stream.numbers(used, _USED)
                if not k.code_band(target, q, self.sizes, orient, self.level, self.totals, parents, parent_totals, used, WORTH,
                                   *stream.adaptive(), stream.coder, stream.buf, stream.decode):  # fmt: skip
                    return None
            made = np.empty(q.shape, np.int64)
            k.reconstruct(q, made)
            out.append(made.reshape(*self.shape, *self.heights[i]))
        return out


def _code_levels(stream: _Stream, shape: tuple[int, int, int, int], wanted: np.ndarray | None,
                 choices: Choices) -> np.ndarray | None:  # fmt: skip
    """All bands, coarse to fine: coefficients int64 of planes (T, L, H, W) before their basis over times; None for no room.

    wanted: coefficients in steps, float64 (T, L, H, W), after the basis over times.
    """
    times, levels, height, width = shape
    coded = np.zeros(shape, np.int64)
    above: _Level | None = None
    for number, (level, bands) in enumerate(_bands(height, width, depth(height, width))):
        here = _Level((times, levels), bands, level, above)
        targets = None if wanted is None else [np.ascontiguousarray(wanted[:, :, rows, columns]) for _, rows, columns in bands]
        learnt = None
        if targets is None:
            choice = stream.number(0, _CHOICE) if levels > 1 else PLAIN * 8
            if not 0 <= choice < 8 * (LEARNT + (above is not None)):
                raise CorruptStream("field payload: unknown basis")
            basis = _learnt(above.decoded) if choice >> 3 == LEARNT and above else _fixed(choice >> 3, levels)  # type: ignore[union-attr]
            if choice & 7:
                basis = _Turns(np.zeros(levels), np.zeros(0), np.zeros(0)).code(stream).turn(basis, choice & 7)
            made = here.code(stream, None)
        else:
            learnt = _learnt(above.decoded) if above and levels > 1 else None
            if number == len(choices.levels):
                choice, basis, made = _best_choice(stream, here, targets, learnt)
                choices.levels.append(choice)
            else:
                basis, made = _code_chosen(stream, here, targets, learnt, choices.levels[number])
        if made is None:
            return None
        here.decoded = [_restore(basis, band) for band in made]
        for (_, rows, columns), band in zip(bands, here.decoded):
            coded[:, :, rows, columns] = band
        if above is not None:
            above.above = None
        above = here
    return coded


def _covariance(targets: list[np.ndarray]) -> tuple[np.ndarray, int]:
    """(covariance over levels, vectors that it is of)."""
    n = targets[0].shape[1]
    matrix, count = np.zeros((n, n)), sum(t.size for t in targets) // n
    for target in targets:
        k.covariance(target.reshape(*target.shape[:2], -1), 1.0, matrix)
    return matrix / max(count, 1), count


def _turned(basis: np.ndarray, matrix: np.ndarray, fine: int) -> _Turns:
    real = basis / _ONE
    return _Turns.measured(real.T @ matrix @ real, fine)


def _best_choice(stream: _Stream, here: _Level, targets: list[np.ndarray],
                 learnt: np.ndarray | None) -> tuple[int, np.ndarray, list[np.ndarray] | None]:  # fmt: skip
    """(choice, basis, decoded components) of what costs least: by a rough count of bits, then the best by coding with them."""
    levels = here.shape[1]
    if levels == 1:
        return PLAIN * 8, *_code_chosen(stream, here, targets, learnt, PLAIN * 8)
    matrix, count = _covariance(targets)
    fine = int(np.clip(np.rint(np.log2(np.sqrt(count / 12))), 2, FINEST))
    options = [PLAIN * 8, COSINE * 8, WAVELET * 8, COSINE * 8 + fine - 1]
    if learnt is not None:
        options += [LEARNT * 8, LEARNT * 8 + fine, LEARNT * 8 + fine - 1]
    rough = []
    for option in options:
        basis, extra = learnt if option >> 3 == LEARNT else _fixed(option >> 3, levels), 0.0
        if option & 7:
            turns = _turned(basis, matrix, option & 7)
            basis, extra = turns.turn(basis, option & 7), turns.cost
        rough.append(sum(_bits_about(_project(basis, target)) for target in targets) + extra)
    options = [options[i] for i in np.argsort(rough, kind="stable")[:TRIES] if rough[i] <= NEAR * min(rough)]
    since, start = int(stream.coder[3]), stream.bits()
    at_first, best, kept = stream.keep(since), (np.inf, options[0], learnt, None), None
    for option in options:
        stream.back_to(at_first)
        basis, made = _code_chosen(stream, here, targets, learnt, option)
        if made is None:
            continue
        off = sum(float(np.square(_restore(basis, m) * 2.0**-k.FRACTION - t).sum()) for m, t in zip(made, targets))
        cost = stream.bits() - start + off / TRADE
        if cost < best[0]:
            best, kept = (cost, option, basis, made), (stream.keep(since), here.sizes, here.totals)
    if kept is not None:
        stream.back_to(kept[0])
        here.sizes, here.totals = kept[1:]
    return best[1:]


def _code_chosen(stream: _Stream, here: _Level, targets: list[np.ndarray], learnt: np.ndarray | None,
                 choice: int) -> tuple[np.ndarray, list[np.ndarray] | None]:  # fmt: skip
    """Code the bands of a level with a basis: (the basis, decoded components)."""
    basis = learnt if choice >> 3 == LEARNT and learnt is not None else _fixed(choice >> 3, here.shape[1])
    if here.shape[1] > 1:
        stream.number(choice, _CHOICE)
    if choice & 7:
        basis = _turned(basis, _covariance(targets)[0], choice & 7).code(stream).turn(basis, choice & 7)
    return basis, here.code(stream, [_project(basis, target) for target in targets])


def encode_part(planes: np.ndarray, step: float, periodic: bool, choices: Choices) -> tuple[bytes, np.ndarray] | None:
    """Planes float64 (T, L, H, W) -> (bytes, decoded planes in 2**-FRACTION steps), or None where they are out of reach.

    ``choices`` are made where they have not been yet.
    """
    shape = planes.shape
    wanted = planes * (1 / step)
    means = np.rint(wanted.mean((2, 3)) * 2.0**MEANS)
    if not np.abs(means).max() < 1 << 38:
        return None
    means = means.astype(np.int64)
    wanted -= means[:, :, None, None] * 2.0**-MEANS
    forward_wavelet(wanted, periodic)
    if not np.abs(wanted).max() < k.LARGEST / 16:
        return None
    stream = _Stream(np.zeros(planes.size * 4 + 65536, np.uint8), False)
    stream.numbers(np.diff(means.ravel(), prepend=0), _MEAN)
    if shape[0] > 1:
        by_time = wanted.reshape(1, shape[0], -1)
        if choices.times < 0:
            some = np.ascontiguousarray(by_time[:, :, :: max(by_time.shape[2] >> 17, 1)])
            costs = [_bits_about(_project(_fixed(kind, shape[0]), some)) for kind in (PLAIN, COSINE, WAVELET)]
            choices.times = int(np.argmin(costs))
        stream.number(choices.times, _CHOICE)
        wanted = _project(_fixed(choices.times, shape[0]), by_time).reshape(shape)
    coded = _code_levels(stream, shape, wanted, choices)
    if coded is None:
        return None
    return stream.finish(), _planes(coded, means, choices.times, periodic)


def guess_step(planes: np.ndarray, periodic: bool, mse: float) -> float:
    """About the step that leaves a mean squared error, of planes float64 (T, L, H, W): by a cosine transform across them."""
    coefficients = planes - planes.mean((2, 3), keepdims=True)
    forward_wavelet(coefficients, periodic)
    flat = coefficients.reshape(-1, planes.shape[2] * planes.shape[3])
    flat = flat[:, :: max(flat.size >> 18, 1)].reshape(*planes.shape[:2], -1)
    flat = _project(_fixed(COSINE, flat.shape[1]), flat)
    power = np.sort(np.square(_project(_fixed(COSINE, flat.shape[0]), flat.reshape(1, len(flat), -1))).ravel())
    below = np.concatenate([[0.0], np.cumsum(power)])
    low, high = np.sqrt(mse), 64 * np.sqrt(mse)
    for _ in range(20):
        step = np.sqrt(low * high)
        zeros = np.searchsorted(power, 0.4 * step**2)
        error = (below[zeros] + (len(power) - zeros) * step**2 / 12) / len(power)
        low, high = (step, high) if error < mse else (low, step)
    return float(step)


def decode_part(data: bytes, shape: tuple[int, int, int, int], periodic: bool) -> np.ndarray:
    """Inverse of ``encode_part``: planes int64 (T, L, H, W) in 2**-FRACTION steps. CorruptStream for what makes no sense."""
    stream = _Stream(np.frombuffer(data, np.uint8).copy(), True)
    means = np.cumsum(stream.numbers(np.zeros(shape[0] * shape[1]), _MEAN)).reshape(shape[:2])
    kind = stream.number(0, _CHOICE) if shape[0] > 1 else PLAIN
    if not PLAIN <= kind <= WAVELET:
        raise CorruptStream("field payload: unknown basis")
    coded = _code_levels(stream, shape, None, Choices())
    assert coded is not None
    return _planes(coded, means, kind, periodic)


def _planes(coded: np.ndarray, means: np.ndarray, kind: int, periodic: bool) -> np.ndarray:
    shape = coded.shape
    if shape[0] > 1:
        coded = _restore(_fixed(kind, shape[0]), coded.reshape(1, shape[0], -1)).reshape(shape)
    k.inverse_wavelet(coded.reshape(-1, *shape[2:]), depth(*shape[2:]), periodic)
    coded += (means << (k.FRACTION - MEANS))[:, :, None, None]
    return coded
