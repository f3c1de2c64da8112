"""Rounding rows of a weight so that their products with given data change least, for many independent groups of rows at once.

Rows are [groups, rows, columns] in float64. `h`, [groups, columns, columns], is the second moment of the data, E[x x^T]: an error d of a
row costs d h d^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The numbers (q - zero) * scale for integers low <= q <= high; scale and zero broadcast against rows."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def nearest(self, rows: Tensor) -> Tensor:
        return self._snap(rows, self.scale, self.zero)

    def rescaled(self, factor: Tensor | float) -> Grid:
        return Grid(self.scale * factor, self.zero, self.low, self.high)

    def columns(self, rows: Tensor, index: Tensor) -> Grid:
        """The grid of these columns [groups, columns] of the rows."""
        scale, zero = (pick(v.expand_as(rows), index) for v in (self.scale, self.zero))
        return Grid(scale, zero, self.low, self.high)

    def column(self, values: Tensor, j: int) -> Tensor:
        """The nearest numbers for the values [groups, rows] of column j."""
        return self._snap(values, self.scale[..., j], self.zero[..., j])

    def _snap(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (((values / scale).round() + zero).clamp(self.low, self.high) - zero) * scale


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Columns of rows, chosen for each group: index [groups, columns]."""
    return rows.gather(2, index[:, None].expand(-1, rows.shape[1], -1))


def cost(error: Tensor, h: Tensor) -> Tensor:
    """d h d^T of each row, [groups, rows]."""
    return ((error @ h) * error).sum(-1)


def damped(h: Tensor, share: float) -> Tensor:
    """h with this share of its mean diagonal added to the diagonal, so that it can be inverted."""
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return h + share * mean[:, None, None] * torch.eye(h.shape[-1], dtype=h.dtype)


def round_rows(rows: Tensor, h: Tensor, grid: Grid, *, damp: float = 0.01, block: int = 64) -> Tensor:
    """Numbers of the grid that keep rows . x; never costlier than the nearest ones.

    Columns are rounded one by one, those that matter most first; the rest of the row makes good for each error (Frantar et al., GPTQ,
    2022, algorithm 1: `upper` is the Cholesky factor of the inverse of h)."""
    order = h.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    ordered = pick(pick(damped(h, damp), order).mT, order)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(ordered)), upper=True)
    rest, found, inside = pick(rows, order), torch.zeros_like(rows), grid.columns(rows, order)
    for start in range(0, rows.shape[-1], block):
        end = min(start + block, rows.shape[-1])
        errors = torch.zeros_like(rows[..., start:end])
        for j in range(start, end):
            found[..., j] = inside.column(rest[..., j], j)
            errors[..., j - start] = (rest[..., j] - found[..., j]) / upper[:, None, j, j]
            rest[..., j:end] -= errors[..., j - start, None] * upper[:, None, j, j:end]
        rest[..., end:] -= errors @ upper[:, start:end, end:]
    result = torch.zeros_like(rows).scatter(2, order[:, None].expand_as(rows), found)
    nearest = grid.nearest(rows)
    worse = cost(result - rows, h) > cost(nearest - rows, h)
    return torch.where(worse[..., None], nearest, result)


def best_factor(rows: Tensor, h: Tensor, grid: Grid, factors: list[float]) -> Tensor:
    """The factor of the grid's scale, for each row, with which the nearest numbers cost least; [groups, rows, 1]."""
    costs = torch.stack([cost(grid.rescaled(f).nearest(rows) - rows, h) for f in factors])
    return torch.tensor(factors, dtype=rows.dtype)[costs.argmin(0)][..., None]
