"""Rounding rows against second moments."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.hessian import Grid, best_rows, lattice
from qgraph.hessian import round_rows as rounded


def cost(error, h):
    return ((error @ h) * error).sum(-1)


def damped(h, damp):
    return h + damp * torch.diag_embed(h.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(h.shape[:-1]))


def round_rows(w, h, grid, *, damp=0.01, block=64):
    on = lattice(h, damp)
    assert on is not None
    return rounded(w, on, grid, block=block)


def problem(seed, groups=3, rows=4, columns=6, points=40):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, columns, columns, generator=g, dtype=torch.float64)
    x = mix @ torch.randn(groups, columns, points, generator=g, dtype=torch.float64)
    w = torch.randn(groups, rows, columns, generator=g, dtype=torch.float64)
    scale = 0.2 + torch.rand(groups, rows, 1, generator=g, dtype=torch.float64)
    zero = torch.randint(-2, 3, (groups, rows, 1), generator=g).double()
    return w, x @ x.mT / points, Grid(scale, zero, -8, 7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), columns=st.integers(1, 9), points=st.integers(1, 40))
def test_rounded_rows_lie_on_the_grid_and_are_never_worse_than_the_nearest(seed: int, columns: int, points: int) -> None:
    w, h, grid = problem(seed, columns=columns, points=points)
    found = round_rows(w, h, grid, block=4)
    torch.testing.assert_close(found, grid.nearest(found))
    assert bool((cost(found - w, damped(h, 0.01)) <= cost(grid.nearest(w) - w, damped(h, 0.01)) + 1e-12).all())


def test_correlated_columns_gain_much() -> None:
    better = []
    for seed in range(10):
        w, h, grid = problem(seed, columns=24, points=400)
        better.append(cost(round_rows(w, h, grid) - w, h).sum() / cost(grid.nearest(w) - w, h).sum())
    assert float(torch.stack(better).median()) < 0.6


def test_groups_and_blocks_do_not_mix() -> None:
    w, h, grid = problem(1, columns=9)
    whole = round_rows(w, h, grid, block=64)
    torch.testing.assert_close(whole, round_rows(w, h, grid, block=2))
    apart = [round_rows(w[i : i + 1], h[i : i + 1], Grid(grid.scale[i : i + 1], grid.zero[i : i + 1], -8, 7)) for i in range(len(w))]
    torch.testing.assert_close(whole, torch.cat(apart))


def test_two_columns_come_close_to_the_best_of_all_roundings() -> None:
    w, h, grid = problem(3, groups=1, rows=1, columns=2)
    numbers = (torch.arange(-8, 8).double() - grid.zero[0, 0, 0]) * grid.scale[0, 0, 0]
    best = min(float(cost(torch.tensor([[list(q)]], dtype=torch.float64) - w, h)) for q in itertools.product(numbers.tolist(), repeat=2))
    assert float(cost(round_rows(w, h, grid, damp=1e-6) - w, h)) <= 1.5 * best


def test_dead_columns_do_no_harm() -> None:
    w, h, grid = problem(5)
    h[:, 2], h[:, :, 2] = 0, 0
    assert bool(round_rows(w, h, grid).isfinite().all())
    assert bool(round_rows(w, torch.zeros_like(h), grid).isfinite().all())


def test_the_numbers_are_those_of_gptq_on_the_inverse() -> None:
    w, h, grid = problem(7, groups=1, columns=7)
    order = h[0].diagonal().argsort(descending=True)
    moment = (h[0] + 0.01 * h[0].diagonal().mean() * torch.eye(7))[order][:, order]
    rest, want = w[0][:, order], torch.zeros_like(w[0])
    for j in range(7):
        want[:, order[j]] = grid.nearest(rest[None, :, j, None])[0, :, 0]
        left = moment[j:, j:].inverse()
        rest[:, j:] -= torch.outer(rest[:, j] - want[:, order[j]], left[0] / left[0, 0])
    better = cost(want - w, h) <= cost(grid.nearest(w) - w, h)
    torch.testing.assert_close(round_rows(w, h, grid, block=3)[better], want[None][better])
    assert bool(better.any())


def test_best_rows_solve_the_normal_equations_of_output_and_drift() -> None:
    w, h, _ = problem(2, columns=5)
    drift = torch.randn(3, 4, 5, dtype=torch.float64)
    on = lattice(h, 1e-9)
    assert on is not None
    torch.testing.assert_close((best_rows(w, drift, on) - w) @ h, drift, rtol=1e-5, atol=1e-5)


def test_more_damping_is_taken_where_the_moments_are_not_positive_definite_and_none_where_they_are_not_finite() -> None:
    h = torch.diag_embed(torch.tensor([[1.0, 1.0, -0.05]]))
    on = lattice(h, 0.01)
    assert on is not None and abs(on.damp - 0.1) < 1e-9
    assert lattice(h * torch.nan) is None
    assert lattice(-torch.eye(3)[None]) is None


def test_float64_serves_where_float32_is_not_enough() -> None:
    x = torch.tensor([[1.0, 1.0 + 1e-7, 1.0 - 1e-7]])
    on = lattice((x.mT @ x)[None], 1e-9)
    assert on is not None and on.damp < 1
