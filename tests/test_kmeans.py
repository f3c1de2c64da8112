"""k-means on a line against dynamic programming over every interval."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.kmeans import kmeans


def cost(rows, weight, levels):
    return (weight * (rows[:, :, None] - levels[:, None]).square().amin(-1)).sum(-1)


def least_cost(x, w, count):
    """The cost of the best `count` intervals, by dynamic programming over all of them."""
    order = np.argsort(x)
    x, w = x[order].astype(np.float64), w[order].astype(np.float64)
    total, moment, square = (np.concatenate([[0], np.cumsum(v)]) for v in (w, w * x, w * x * x))
    best = np.full((count + 1, len(x) + 1), np.inf)
    best[0, 0] = 0
    for c in range(1, count + 1):
        for j in range(1, len(x) + 1):
            i = np.arange(j)
            inside = square[j] - square[i] - (moment[j] - moment[i]) ** 2 / (total[j] - total[i])
            best[c, j] = min((best[c - 1, :j] + inside).min(), best[c - 1, j])
    return best[count, len(x)]


def test_the_oracle_is_exhaustive_search() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=7), rng.uniform(0.1, 3, 7)
    x.sort()
    costs = []
    for cuts in itertools.combinations(range(1, 7), 2):
        parts = np.split(np.arange(7), cuts)
        costs.append(sum(float((w[p] * (x[p] - np.average(x[p], weights=w[p])) ** 2).sum()) for p in parts))
    assert least_cost(x, w, 3) == pytest.approx(min(costs))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 32), st.sampled_from([2, 4, 8]))
def test_short_rows_are_solved_exactly(seed: int, length: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = rng.standard_t(3, (3, length)), rng.exponential(size=(3, length)) + 1e-3
    levels = kmeans(torch.from_numpy(x), torch.from_numpy(w), count).double()
    found = cost(torch.from_numpy(x), torch.from_numpy(w), levels)
    scale = (w * x**2).sum(1)
    for row in range(3):
        assert found[row] <= least_cost(x[row], w[row], count) * (1 + 1e-3) + 1e-6 * scale[row]


@pytest.mark.parametrize("count", [4, 8, 16])
def test_long_rows_come_within_one_percent_of_the_least_cost(count: int) -> None:
    rng = np.random.default_rng(count)
    x, w = rng.standard_t(4, (6, 200)), np.exp(rng.normal(size=(6, 200)))
    levels = kmeans(torch.from_numpy(x), torch.from_numpy(w), count).double()
    found = cost(torch.from_numpy(x), torch.from_numpy(w), levels).numpy()
    best = np.array([least_cost(a, b, count) for a, b in zip(x, w, strict=True)])
    assert (found / best).mean() < 1.01 and (found / best).max() < 1.03


def test_weights_move_the_levels() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 10.0]]).repeat(2, 1)
    w = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 30.0, 1e-4]])
    plain, weighted = kmeans(x, w, 2)
    assert plain.tolist() == pytest.approx([1.0, 10.0])
    assert weighted.tolist() == pytest.approx([0.5, 2.0], abs=1e-3)


def test_levels_ascend_whatever_the_row_holds() -> None:
    rows = torch.stack([torch.zeros(5), torch.ones(5), torch.tensor([3.0, 3.0, -1.0, 3.0, -1.0])])
    levels = kmeans(rows, torch.zeros(3, 5), 8)  # no weight at all counts as equal weights
    assert levels.shape == (3, 8) and bool((levels.diff(dim=1) >= 0).all()) and bool(levels.isfinite().all())
    assert cost(rows, torch.ones(3, 5), levels).tolist() == [0, 0, 0]


def test_rows_are_solved_alike_in_any_company() -> None:
    rows = torch.randn(40, 300, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([kmeans(r[None], torch.ones(1, 300), 8) for r in rows])
    assert torch.equal(kmeans(rows.T.contiguous().T, torch.ones(40, 300), 8), alone)
