"""Rounding rows of a weight so that their products with given data change least, for many independent groups of rows at once.

Rows are [groups, rows, columns]. `h`, [groups, columns, columns], is the second moment of the data, E[x x^T]: an error d of a row costs
d h d^T. Everything is computed in the type of the operands; float32 does where h has been damped, and float64 takes over where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FLOOR = 1e-20
"""A mean square below this is that of a group of columns that are 0."""

MOST_DAMPING = 1.0
"""Beyond this share of the diagonal, h no longer says anything about the data."""


class Levels(Protocol):
    """The numbers that each element of the rows may become."""

    def nearest(self, rows: Tensor) -> Tensor:
        """The nearest of them, [groups, rows, columns]."""

    def by_column(self, rows: Tensor, order: Tensor) -> Levels:
        """Those of `by_column(rows, order)`."""

    def column(self, values: Tensor, j: int) -> Tensor:
        """The nearest to the values [groups, rows] of column j, by column."""


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
        scale, zero = (None if v is None else by_column(v.expand_as(rows), order) for v in (self.scale, self.zero))
        assert scale is not None
        return Grid(scale, zero, self.low, self.high)

    def column(self, values: Tensor, j: int) -> Tensor:
        return self._snap(values, self.scale[:, j], None if self.zero is None else self.zero[:, j])

    def _snap(self, values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        q = (values / scale).round_()
        if zero is None:
            return q.clamp_(self.low, self.high).mul_(scale)
        return q.add_(zero).clamp_(self.low, self.high).sub_(zero).mul_(scale)


@dataclass(frozen=True)
class Lattice:
    """What h says about the order in which columns are rounded and who makes good for whose error.

    order [groups, columns]: columns that matter least first. lower [groups, columns, columns], columns in that order: the Cholesky factor
    of damped h. damp: the share of h's mean diagonal that was added to its diagonal."""

    h: Tensor
    order: Tensor
    lower: Tensor
    damp: float

    def cost(self, errors: Tensor) -> Tensor:
        """d h d^T of each row, [groups, rows], h damped, of errors by column."""
        return (self.lower.mT @ errors).square_().sum(-2)


def by_column(rows: Tensor, order: Tensor) -> Tensor:
    """The columns of rows in this order [groups, columns], as [groups, columns, rows]."""
    return rows.mT.gather(1, order[..., None].expand(-1, -1, rows.shape[1])).contiguous()


def lattice(h: Tensor, damp: float = 0.01) -> Lattice | None:
    """Case 1: damped h is positive definite in its own type. Case 2: it is in float64. Case 3: ten times more damping, until it is.
    None: h is not finite, or it is no second moment of anything."""
    if not bool(h.isfinite().all()):
        return None
    order = h.diagonal(dim1=-2, dim2=-1).argsort(-1)
    ordered = by_column(by_column(h, order), order)
    diagonal = ordered.diagonal(dim1=-2, dim2=-1)
    plain = diagonal.clone()
    mean = plain.mean(-1, keepdim=True).clamp(min=FLOOR)
    while damp <= MOST_DAMPING:
        diagonal.copy_(plain + damp * mean)
        for dtype in (h.dtype, torch.float64):  # matrices of the largest layers take tens of MB: no copy that is not needed
            lower, info = torch.linalg.cholesky_ex(ordered.to(dtype))
            if not info.any():
                return Lattice(h, order, lower.to(h.dtype), damp)
        damp *= 10
    return None


def round_rows(rows: Tensor, on: Lattice, levels: Levels, *, block: int = 64) -> Tensor:
    """Levels that keep rows . x; never costlier than the nearest ones.

    Columns are rounded one by one, those that matter most first; the rest of the row makes good for their errors. This is GPTQ (Frantar et
    al., 2022, algorithm 1) with activation order, as rounding to the nearest plane of the lattice with basis h^1/2 (Babai): the numbers are
    the same, but the Cholesky factor is that of h, so that nothing is inverted. Scales are those of the columns, wherever they come in the
    order, so the order leaves no trace in the format."""
    wanted, inside = by_column(rows, on.order), levels.by_column(rows, on.order)
    # Row j: what one unit of error in column j adds to each column before it.
    spread = on.lower / on.lower.diagonal(dim1=-2, dim2=-1)[..., None, :]
    rest, errors = wanted.clone(), torch.empty_like(wanted)
    for end in range(rows.shape[-1], 0, -block):
        start = max(end - block, 0)
        for j in range(end - 1, start - 1, -1):
            value = inside.column(rest[:, j], j)
            torch.sub(wanted[:, j], value, out=errors[:, j])
            rest[:, j] = value
            if j > start:
                rest[:, start:j].baddbmm_(spread[:, j, start:j, None], errors[:, j, None])
        if start:
            rest[:, :start].baddbmm_(spread[:, start:end, :start].mT, errors[:, start:end])
    result = torch.zeros_like(rows).scatter_(2, on.order[:, None].expand_as(rows), rest.mT)
    nearest = levels.nearest(rows)
    worse = on.cost(errors) > on.cost(by_column(nearest - rows, on.order))
    return torch.where(worse[..., None], nearest, result)


def best_rows(rows: Tensor, drift: Tensor, on: Lattice) -> Tensor:
    """The float rows whose products with the data are nearest to (rows . x + r): rows + E[r x^T] (h + damping)^-1.

    drift [groups, rows, columns] is E[r x^T], what the products should gain."""
    found = torch.cholesky_solve(by_column(drift, on.order), on.lower)
    return rows.scatter_add(2, on.order[:, None].expand_as(rows), found.mT)
