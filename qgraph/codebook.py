"""Codebooks: w -> table[code] * scale, the nearest of a few levels that lie where weights are.

    nf      quantiles of the normal distribution, 0 among them (NormalFloat)
    log     0 and powers of two
    kmeans  levels of each output channel, those that its weights lie nearest to; a weight counts as much as it matters

What the operands mean is said in reference.py (`encode`, `lookup`). Tables and scales are numbers that float16 holds, where that is
precise enough, so that they can be stored so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.errors import RecipeError, nearest
from qgraph.hessian import by_column
from qgraph.kmeans import kmeans
from qgraph.parts import pieces
from qgraph.qparams import minmax, reduce_rows
from qgraph.reference import encode, fake_lookup, lookup, midpoints, spread
from qgraph.types import PerGroup, QSpec

KMEANS = "kmeans"
"""The codebook whose levels come from the weights themselves."""

SEARCHES = ("minmax", "search")
"""How scales are chosen: by the largest magnitude, or by the least squared error."""

SHARES = tuple(sign * (1.05 - i / 14) for i in range(7) for sign in (1, -1))
"""Shares of the largest magnitude that "search" tries as scales. Either sign: tables have a level more on one side of 0."""


def normal_levels(bits: int) -> Tensor:
    """2**bits ascending levels from -1 to 1 with 0 among them, float32 [2**bits].

    Quantiles of the normal distribution at 2**(bits-1) + 1 evenly spaced probabilities from 1/2 to 1 - d and, mirrored, at 2**(bits-1),
    divided by the largest; d = (1 / 2**(bits+1) + 1 / (2**(bits+1) - 2)) / 2. Dettmers et al., QLoRA (2023), section 3 and appendix E."""
    half = 2 ** (bits - 1)
    last = round(1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2, 7)  # rounded so, and in float32, 4 bits are the published numbers
    down, up = (torch.special.ndtri(torch.linspace(last, 0.5, n).double()).float()[:-1] for n in (half, half + 1))
    levels: Tensor = torch.cat([-down, torch.zeros(1), up.flip(0)]) / up[0]
    return levels


def log_levels(bits: int) -> Tensor:
    """0, the powers of two from 1 downwards, and the same but one negated: float32 [2**bits], ascending."""
    powers = 2.0 ** -torch.arange(2 ** (bits - 1), dtype=torch.float32)
    return torch.cat([-powers[:-1], torch.zeros(1), powers.flip(0)])


LEVELS: dict[str, Callable[[int], Tensor]] = {"nf": normal_levels, "log": log_levels}
"""Codebook -> function from bits to its ascending levels between -1 and 1; a table of your own is a line here."""


def require_codebook(name: str) -> None:
    """Raises RecipeError for a name that stands for no codebook."""
    if name not in (*LEVELS, KMEANS):
        raise RecipeError(f"unknown codebook {name!r}{nearest(name, (*LEVELS, KMEANS))}")


@dataclass(frozen=True)
class Codebook:
    """The operands of `lookup` besides the codes: table [L] or [n, L], scale or None, and the axes along which they lie."""

    table: Tensor
    scale: Tensor | None = None
    table_axis: int | None = None
    axis: int | None = None
    group: int = 0

    def nearest(self, weight: Tensor) -> Tensor:
        """fake_lookup(weight)."""
        return fake_lookup(weight, self.table, self.scale, self.table_axis, self.axis, self.group)


def fit(weight: Tensor, spec: QSpec, importance: Tensor | None = None, *, search: str = "minmax") -> Codebook:
    """The codebook of a finite weight in the format `spec`; table and scale have the weight's float type.

    `importance`, broadcast against the weight, is what a squared error of each element costs (None: 1), such as E[x^2] of its input
    channel: Kim et al., SqueezeLLM (2023), section 4.1, with the diagonal of the layer's own Hessian. `search`, one of SEARCHES, is for
    levels that do not come from the weights."""
    x, cost = weight.detach().float(), None if importance is None else importance.float()
    if spec.codebook == KMEANS:
        return _by_kmeans(x, spec, cost, weight.dtype)
    assert spec.codebook is not None  # the caller looked
    table = LEVELS[spec.codebook](spec.bits)
    scale = _searched(x, table, spec, cost) if search == "search" else _largest(x, spec)
    return Codebook(table.to(weight.dtype), _short(scale).to(weight.dtype), None, spec.axis, spec.group)


def rounded(weight: Tensor, spec: QSpec) -> Tensor:
    """The weight in this format, its scales as `search` "minmax" has them."""
    return fit(weight, spec).nearest(weight)


def _largest(x: Tensor, spec: QSpec) -> Tensor:
    """Largest magnitudes in the scale's shape; 1 where all is 0."""
    low, high = minmax(x, spec.axis, spec.group)
    found = torch.maximum(-low, high)
    return torch.where(found > 0, found.clamp(min=torch.finfo(torch.float32).smallest_normal), 1.0)


def _searched(x: Tensor, table: Tensor, spec: QSpec, cost: Tensor | None) -> Tensor:
    """The scales of least squared error, a piece of a large weight at a time."""
    parts = pieces(x, spec.axis, spec.group)
    costs = [None] * len(parts) if cost is None else pieces(cost.expand_as(x), spec.axis, spec.group)
    found = [_best(part, table, spec, c) for part, c in zip(parts, costs, strict=True)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _best(x: Tensor, table: Tensor, spec: QSpec, cost: Tensor | None) -> Tensor:
    """Of the levels that each of SHARES of the largest magnitude gives, with the best scale for these,
    s = sum(c x level) / sum(c level**2), which explains sum(c x level)**2 / sum(c level**2) of the power."""
    best = largest = _largest(x, spec)
    most = torch.zeros_like(largest)
    for share in SHARES:
        level = lookup(encode(x, table, largest * share, None, spec.axis, spec.group), table, None)
        counted = level if cost is None else level * cost
        along, power = (reduce_rows(counted * t, spec.axis, spec.group, _sum)[0] for t in (x, level))
        explained = torch.where(power > 0, along.square() / power, 0.0)
        best, most = torch.where(explained > most, along / power, best), torch.maximum(explained, most)
    return best


def _sum(rows: Tensor) -> tuple[Tensor, Tensor]:
    found = rows.sum(1)
    return found, found


def _by_kmeans(x: Tensor, spec: QSpec, cost: Tensor | None, dtype: torch.dtype) -> Codebook:
    """Case 1: per group: one table per row across the groups, of values divided by their group's largest magnitude.
    Case 2: one table per index of the axis, or one in all, and no scales."""
    cost, scale, axis = torch.ones(()) if cost is None else cost, None, spec.axis
    if isinstance(spec.granularity, PerGroup):
        scale, axis = _short(_largest(x, spec)).to(dtype), 1 - spec.granularity.axis % 2
        wide = spread(scale.float(), x, spec.axis, spec.group)
        x, cost = x / wide, cost * wide.square()
    rows, costs = (
        (t if axis is None else t.movedim(axis, 0)).reshape(1 if axis is None else x.shape[axis], -1) for t in (x, cost.expand_as(x))
    )
    table = _short(kmeans(rows, costs, 2**spec.bits)).to(dtype)
    if axis is None:
        return Codebook(table[0])
    return Codebook(table, None, axis) if scale is None else Codebook(table, scale, axis, spec.axis, spec.group)


def _short(values: Tensor) -> Tensor:
    """The nearest numbers of float16, unless that makes 0 of one, or moves one by more than 2**-11 of the largest."""
    short = values.half().float()
    close = (short - values).abs() <= 2.0**-11 * values.abs().amax()
    return short if bool((close & ((short == 0) == (values == 0))).all()) else values


@dataclass(frozen=True)
class TableLevels:
    """The numbers table[code] * scale for rows [groups, rows, columns], as `hessian.Levels`: table [L] or [groups, rows, L]; scale (None:
    1) broadcasts against rows."""

    table: Tensor
    scale: Tensor | None

    def nearest(self, rows: Tensor) -> Tensor:
        return self._snap(rows, self.scale)

    def by_column(self, rows: Tensor, order: Tensor) -> TableLevels:
        return TableLevels(self.table, None if self.scale is None else by_column(self.scale.expand_as(rows), order))

    def column(self, values: Tensor, j: int) -> Tensor:
        return self._snap(values[..., None], None if self.scale is None else self.scale[:, j, :, None])[..., 0]

    def _snap(self, values: Tensor, scale: Tensor | None) -> Tensor:
        """values [groups, rows, m]"""
        q = (values if scale is None else values / scale).contiguous()
        codes = torch.searchsorted(midpoints(self.table), q)
        level = self.table[codes] if self.table.dim() == 1 else self.table.gather(-1, codes)
        return level if scale is None else level * scale
