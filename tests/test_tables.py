"""Integer tables: made from probabilities, checked when loaded, priced."""

from math import erfc, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from neuralcodec.entropy.gaussian import (
    LIKELIHOOD_MIN,
    SCALE_STEP,
    SCALES,
    LowerBound,
    gaussian_likelihood,
    gaussian_tables,
    student_tables,
    student_upper_tail,
)
from neuralcodec.entropy.tables import OFFSET_MAX, TOTAL, Tables, pmf_to_tables, quantise_pmf


def normal_pmf(sigma: float, half: int) -> np.ndarray:
    """Mass of the unit bins -half..half."""
    edges = [erfc((k - 0.5) / sigma / sqrt(2)) / 2 for k in range(half + 2)]
    upper = [a - b for a, b in zip(edges, edges[1:])]
    return np.array(upper[:0:-1] + upper)


def excess_bits(pmf: np.ndarray, widths: np.ndarray) -> float:
    """Kullback-Leibler divergence in bits of coding ``pmf`` with ``widths`` (without the escape)."""
    p, q = pmf[pmf > 0], widths[: len(pmf)][pmf > 0] / TOTAL
    return float((p * np.log2(p / q)).sum())


@given(st.lists(st.floats(0, 1), min_size=2, max_size=400).filter(lambda p: sum(p) > 1e-3))
def test_quantised_pmf(pmf):
    widths = quantise_pmf(np.array(pmf))
    assert widths.sum() == TOTAL and widths.min() >= 1
    share = np.array(pmf) / sum(pmf) * (TOTAL - len(pmf)) + 1
    assert np.abs(widths - share).max() <= 1
    assert np.array_equal(widths, quantise_pmf(np.array(pmf)))


def test_gaussian_tables_follow_the_normal():
    tables = gaussian_tables()
    assert len(tables) == 64
    for r, sigma in enumerate(SCALES):
        row, offset = tables.row(r), int(tables.offsets[r])
        assert row.sum() == TOTAL and np.abs(row[:-1] - row[-2::-1]).max() <= 1
        assert excess_bits(normal_pmf(sigma, -offset), row) < 5e-5


def test_neighbouring_scale_classes_are_close_enough():
    """A scale half a class off costs under 0.25 % where a symbol costs two bits, and nothing to speak of anywhere."""
    tables = gaussian_tables()
    for r, sigma in enumerate(SCALES):
        for off in (-0.5, 0.5):
            pmf = normal_pmf(sigma * np.exp(off * SCALE_STEP), -int(tables.offsets[r]))
            entropy = -(pmf[pmf > 0] * np.log2(pmf[pmf > 0])).sum()
            assert excess_bits(pmf, tables.row(r)) < max(0.0025 * entropy, 0.006 if sigma < 1 else 0)


def test_student_tail():
    """Quantiles of Student's t from printed tables, symmetry, and the Cauchy-like lightest case by integration."""
    assert student_upper_tail(2.179, 12) == pytest.approx(0.025, abs=1e-5)
    assert student_upper_tail(3.055, 12) == pytest.approx(0.005, abs=1e-5)
    assert student_upper_tail(4.318, 12) == pytest.approx(0.0005, abs=1e-6)
    assert student_upper_tail(2.920, 2) == pytest.approx(0.05, abs=1e-5)
    assert student_upper_tail(0.0, 12) == 0.5
    assert student_upper_tail(-1.3, 12) + student_upper_tail(1.3, 12) == pytest.approx(1, abs=1e-15)


def test_student_tables():
    tables = student_tables()
    assert len(tables) == 64 and tables.widths.nbytes < 120_000
    heavy = tables.bits(np.array([9]), np.array([20]))  # 7 standard deviations out
    assert heavy < gaussian_tables().bits(np.array([9]), np.array([20])) - 5
    for r in range(64):
        row = tables.row(r)
        assert np.abs(row[:-1] - row[-2::-1]).max() <= 1 and -tables.offsets[r] >= 24
        assert (np.diff(row[-tables.offsets[r] : -1]) <= 1).all()  # falls from the middle


@pytest.mark.parametrize(
    "widths, lengths, offsets",
    [
        ([TOTAL], [1], [0]),
        ([1, 2], [2], [0]),
        ([0, TOTAL], [2], [0]),
        ([1, TOTAL - 1], [2], [0, 0]),
        ([1, TOTAL - 1], [3], [0]),
        ([-1, TOTAL + 1], [2], [0]),
        ([1, TOTAL - 1], [2], [OFFSET_MAX + 1]),
        ([1, TOTAL - 1, 1, TOTAL - 1], [5, -1], [0, 0]),
        ([], [], []),
    ],
)
def test_bad_tables_are_refused(widths, lengths, offsets):
    arrays = {"widths": np.array(widths), "lengths": np.array(lengths), "offsets": np.array(offsets)}
    with pytest.raises(ValueError, match="tables:"):
        Tables.from_arrays(arrays)


def test_arrays_round_trip():
    tables = student_tables()
    again = Tables.from_arrays({k: v.astype(np.int64) for k, v in tables.to_arrays().items()})
    assert all(np.array_equal(again.to_arrays()[k], v) for k, v in tables.to_arrays().items())
    with pytest.raises(KeyError):
        Tables.from_arrays({"widths": tables.widths, "lengths": tables.lengths})


def test_bits_price_escapes():
    tables = pmf_to_tables([np.array([0.5, 0.25]), np.array([0.999])], [-1, 7])
    values, indexes = np.array([-1, 0, 1, -2, 7, 10**6]), np.array([0, 0, 0, 0, 1, 1])
    assert np.allclose(tables.bits(values, indexes), [1, 2, 27, 27, -np.log2(0.999), -np.log2(0.001) + 25], atol=1e-3)


def test_likelihood_matches_the_tables_and_keeps_gradients():
    import torch

    tables = gaussian_tables()
    rows = np.array([20, 30, 40, 50])
    values = np.array([1, -3, 8, 0])
    likelihood = gaussian_likelihood(torch.from_numpy(values), torch.log(torch.tensor(SCALES))[rows])
    assert np.allclose(-np.log2(likelihood.numpy()), tables.bits(values, rows), atol=2e-3)

    v = torch.tensor([50.0, -50.0], requires_grad=True)
    far = gaussian_likelihood(v, torch.zeros(2))
    assert (far == LIKELIHOOD_MIN).all()
    x = torch.tensor([0.5, 0.5, 2.0], requires_grad=True)
    (LowerBound.apply(x, 1.0) * torch.tensor([1.0, -1.0, 1.0])).sum().backward()
    assert x.grad.tolist() == [0.0, -1.0, 1.0]  # below the bound only what pushes up passes
