"""Rounding rows of a weight so that their products with given data change least, for many independent groups of rows at once.

Rows are [groups, rows, columns]. `h`, [groups, columns, columns], is the second moment of the data, E[x x^T]: an error d of a row costs
d h d^T. Everything is computed in the type of the operands; float32 does where h has been damped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The numbers (q - zero) * scale for integers low <= q <= high; scale and zero (None: 0) broadcast against rows."""

    scale: Tensor
    zero: Tensor | None
    low: int
    high: int

    def nearest(self, rows: Tensor) -> Tensor:
        return self._snap(rows, self.scale, self.zero)

    def rescaled(self, factor: Tensor | float) -> Grid:
        return Grid(self.scale * factor, self.zero, self.low, self.high)

    def by_column(self, rows: Tensor, order: Tensor) -> Grid:
        """The grid of `by_column(rows, order)`."""
        scale, zero = (None if v is None else by_column(v.expand_as(rows), order) for v in (self.scale, self.zero))
        assert scale is not None
        return Grid(scale, zero, self.low, self.high)

    def column(self, values: Tensor, j: int) -> Tensor:
        """The nearest numbers for the values [groups, rows] of column j, of a grid by column."""
        return self._snap(values, self.scale[:, j], None if self.zero is None else self.zero[:, j])

    def _snap(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        q = (values / scale).round_()
        if zero is None:
            return q.clamp_(self.low, self.high).mul_(scale)
        return q.add_(zero).clamp_(self.low, self.high).sub_(zero).mul_(scale)


def by_column(rows: Tensor, order: Tensor) -> Tensor:
    """The columns of rows in this order [groups, columns], as [groups, columns, rows]."""
    return rows.mT.gather(1, order[..., None].expand(-1, -1, rows.shape[1])).contiguous()


def cost(error: Tensor, h: Tensor) -> Tensor:
    """d h d^T of each row, [groups, rows]."""
    return ((error @ h) * error).sum(-1)


def damped(h: Tensor, share: float) -> Tensor:
    """h with this share of its mean diagonal added to the diagonal, so that it can be inverted."""
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-20)
    return h + share * mean[:, None, None] * torch.eye(h.shape[-1], dtype=h.dtype)


def round_rows(rows: Tensor, h: Tensor, grid: Grid, *, damp: float = 0.01, block: int = 64) -> Tensor:
    """Numbers of the grid that keep rows . x; never costlier than the nearest ones.

    Columns are rounded one by one, those that matter most first; the rest of the row makes good for each error (Frantar et al., GPTQ,
    2022, algorithm 1)."""
    order = h.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    spread = _spread(by_column(by_column(damped(h, damp), order), order))
    errors, inside, size = by_column(rows, order), grid.by_column(rows, order), rows.shape[-1]
    rest = errors.clone()
    for start in range(0, size, block):
        end = min(start + block, size)
        for j in range(start, end):
            value = inside.column(rest[:, j], j)
            rest[:, j] = value
            errors[:, j] -= value
            if j + 1 < end:
                rest[:, j + 1 : end].baddbmm_(spread[:, j, j + 1 : end, None], errors[:, j, None])
        if end < size:
            rest[:, end:].baddbmm_(spread[:, start:end, end:].mT, errors[:, start:end])
    result = torch.zeros_like(rows).scatter_(2, order[:, None].expand_as(rows), rest.mT)
    nearest = grid.nearest(rows)
    worse = cost(result - rows, h) > cost(nearest - rows, h)
    return torch.where(worse[..., None], nearest, result)


def _spread(h: Tensor) -> Tensor:
    """Where the error of a column goes: row j holds what one unit of error in column j adds to each later column.

    The lower Cholesky factor of h read backwards, its columns divided by its diagonal: the rows of the upper factor of h^-1 that GPTQ
    divides by theirs are, up to the sign, the same numbers (rounding to the nearest plane of a lattice), so nothing is inverted."""
    lower = torch.linalg.cholesky(h.flip(-2, -1))
    return (lower / lower.diagonal(dim1=-2, dim2=-1)[..., None, :]).flip(-2, -1)


def best_factor(rows: Tensor, h: Tensor, grid: Grid, factors: list[float]) -> Tensor:
    """The factor of the grid's scale, for each row, with which the nearest numbers cost least; [groups, rows, 1]."""
    costs = torch.stack([cost(grid.rescaled(f).nearest(rows) - rows, h) for f in factors])
    return torch.tensor(factors, dtype=rows.dtype)[costs.argmin(0)][..., None]
