"""Numbers that prediction of fields starts from (``entropy.grid.prior``): least squares over training fields.

Neighbours get uniform noise of the bound, as a decoder sees them; targets do not. Each field, at two bounds and four
spacings, weighs alike; errors are weighed robustly by 1 / (error + a tenth of the bound).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..entropy.grid.kernels import FEATURES, NEAR, OWN, PATTERN, PER_REF

BOUNDS = {"u10": 1, "v10": 1, "u": 1, "v": 1, "t": 0.5, "z": 100, "gh": 10, "msl": 50, "vo": 1e-5, "t2m": 0.5, "r": 5,
          "q": 2e-4, "w": 0.05, "sp": 50, "d2m": 0.5}  # fmt: skip
PLANES_MAX = 40  # of a variable of a file
ROWS_FULL = 2000  # samples from which on a field has its full weight
SPACINGS, REFERENCES = 4, 3


def cubic(features: int) -> np.ndarray:
    """Weights of the four-point interpolation, relative to the mean of the pair."""
    w = np.zeros(features)
    w[1:3] = -1 / 16
    return w


def samples(x: np.ndarray, refs: list[np.ndarray], down: int, noise: float,
            rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:  # fmt: skip
    """Features (n, F) and targets (n,) of a stage on a lattice x (h, w), relative to the pair; None if too small."""
    rows = np.arange(down, x.shape[0], 2)
    columns = np.arange(0 if down else 1, x.shape[1], 1 if down else 2)
    rows = rows[(rows >= 3) & (rows < x.shape[0] - 3)]
    columns = columns[(columns >= 3) & (columns < x.shape[1] - 3)]
    if not len(rows) or not len(columns):
        return None
    pattern = PATTERN[down]

    def at(a: np.ndarray, place: int) -> np.ndarray:
        return a[np.ix_(rows + pattern[place, 0], columns + pattern[place, 1])]

    seen, *known = (a + rng.uniform(-noise, noise, a.shape) for a in (x, *refs))
    base = (at(seen, 0) + at(seen, 1)) / 2
    features = [at(seen, i + 1) - base for i in range(OWN[down])]
    for ref in known:
        middle = (at(ref, 0) + at(ref, 1)) / 2
        features += [a - middle for a in (ref[np.ix_(rows, columns)], at(ref, 1), *(at(ref, s) for s in NEAR[down][4:]))]
    return np.stack([f.ravel() for f in features], 1), (x[np.ix_(rows, columns)] - base).ravel()


def prior_of(folder: Path, seed: int = 0) -> np.ndarray:
    """The table of ``entropy.grid.prior``, in 1/256: (spacings * 2 * references, FEATURES)."""
    import xarray as xr

    kinds = SPACINGS * 2 * REFERENCES
    cov, rhs = np.zeros((kinds, FEATURES, FEATURES)), np.zeros((kinds, FEATURES))
    rng = np.random.default_rng(seed)
    for path in sorted(folder.glob("*.nc")):
        with xr.open_dataset(path) as data:
            for name in (str(n) for n in data.data_vars if n in BOUNDS):
                values = data[name].values.astype(np.float64)
                levels = values.shape[-3] if values.ndim > 3 else 1
                planes = values.reshape(-1, *values.shape[-2:])
                chosen = np.arange(len(planes))
                if len(planes) > PLANES_MAX:
                    chosen = np.sort(rng.choice(len(planes) - 2, PLANES_MAX, replace=False)) + 2
                for p in chosen:
                    for noise in (BOUNDS[name], BOUNDS[name] / 5):
                        _add(planes, int(p), levels, noise, rng, cov, rhs)
    table = np.zeros((kinds, FEATURES))
    for kind in range(kinds):
        n = OWN[kind // REFERENCES % 2] + kind % REFERENCES * PER_REF
        square = cov[kind, :n, :n]
        ridge = 1e-3 * np.trace(square) / n or 1.0  # nothing was seen of this kind: the cubic stays
        table[kind, :n] = np.linalg.solve(square + ridge * np.eye(n), rhs[kind, :n] + ridge * cubic(n))
    return np.rint(table * 256).astype(int)


def _add(planes: np.ndarray, p: int, levels: int, noise: float, rng: np.random.Generator, cov: np.ndarray,
         rhs: np.ndarray) -> None:  # fmt: skip
    """Collect the moments of plane ``p`` with none, one and two planes before it."""
    for spacing in range(SPACINGS):
        lattice = planes[:, :: 1 << spacing, :: 1 << spacing]
        for count in range(min(REFERENCES - 1, p) + 1):
            refs = [lattice[p - 1 - i] for i in range(count)]
            if not all(np.isfinite(a).all() for a in (lattice[p], *refs)) or (levels > 1 and p % levels < count):
                continue
            for down in (0, 1):
                made = samples(lattice[p], refs, down, noise, rng)
                if made is None:
                    continue
                features, target = made[0] / (2 * noise), made[1] / (2 * noise)
                n = features.shape[1]
                error = np.abs(target - features @ cubic(n))
                weights = 1 / (error + 0.1)
                size = float((weights * error * error).sum())
                if size:
                    weights *= min(len(target) / ROWS_FULL, 1) / size
                    kind = (spacing * 2 + down) * REFERENCES + count
                    cov[kind, :n, :n] += (features * weights[:, None]).T @ features
                    rhs[kind, :n] += (features * weights[:, None]).T @ target
