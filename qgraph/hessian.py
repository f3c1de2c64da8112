"""Rounding rows of a weight so that their products with given data change least, for many independent groups of rows at once.

Rows are [groups, rows, columns]. `h`, [groups, columns, columns], is the second moment of the data, E[x x^T]: an error d of a row costs
d h d^T. Everything is computed in the type of the operands; float32 does where h has been damped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-20
"""A mean square below this is that of a group of columns that are 0."""


@dataclass(frozen=True)
class Grid:
    """The numbers (q - zero) * scale for integers low <= q <= high; scale and zero (None: 0) broadcast against rows."""

    scale: Tensor
    zero: Tensor | None
    low: int
    high: int

    def nearest(self, rows: Tensor) -> Tensor:
        return self._snap(rows, self.scale, self.zero)

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


def round_rows(rows: Tensor, h: Tensor, grid: Grid, *, damp: float = 0.01, block: int = 64) -> Tensor:
    """Numbers of the grid that keep rows . x; never costlier than the nearest ones.

    Columns are rounded one by one, those that matter most first; the rest of the row makes good for their errors. This is GPTQ (Frantar et
    al., 2022, algorithm 1) as rounding to the nearest plane of the lattice with basis h^1/2 (Babai): the numbers are the same, but the
    Cholesky factor is that of h, so that nothing is inverted. `damp` is the share of h's mean diagonal that is added to its diagonal."""
    order = h.diagonal(dim1=-2, dim2=-1).argsort(-1)
    spread = _spread(by_column(by_column(h, order), order), damp)
    errors, inside = by_column(rows, order), grid.by_column(rows, order)
    rest = errors.clone()
    for end in range(rows.shape[-1], 0, -block):
        start = max(end - block, 0)
        for j in range(end - 1, start - 1, -1):
            value = inside.column(rest[:, j], j)
            rest[:, j] = value
            errors[:, j] -= value
            if j > start:
                rest[:, start:j].baddbmm_(spread[:, j, start:j, None], errors[:, j, None])
        if start:
            rest[:, :start].baddbmm_(spread[:, start:end, :start].mT, errors[:, start:end])
    result = torch.zeros_like(rows).scatter_(2, order[:, None].expand_as(rows), rest.mT)
    nearest = grid.nearest(rows)
    worse = cost(result - rows, h) > cost(nearest - rows, h)
    return torch.where(worse[..., None], nearest, result)


def _spread(h: Tensor, damp: float) -> Tensor:
    """Row j: what one unit of error in column j adds to each column before it. Changes h."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    diagonal += damp * diagonal.mean(-1, keepdim=True).clamp(min=FLOOR)
    lower: Tensor = torch.linalg.cholesky(h)
    return lower.div_(lower.diagonal(dim1=-2, dim2=-1)[..., None, :].clone())
