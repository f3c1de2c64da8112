"""Fields: which elements of a value are scaled alike. A field holds, for each element, the number of an unknown positive factor.

A field has the rank of its value; an axis of size 1 stands for an axis along which all elements are scaled alike, so that a value with
2 * C * H * W elements and one factor per channel has a field [1, C, 1, 1]. Unknowns are tied by equations between fields and fixed to 1 by
barriers, each with its reason. `solve` finds the classes of unknowns that are equal, and which of them are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.types import Dim

Field = Tensor
"""int64; see the module."""


@dataclass(frozen=True, eq=False)
class Solution:
    """`label[i]` is the smallest unknown that unknown i is equal to, `free[i]` the same or -1 for a fixed one; `reason[label]` says why a class
    is fixed (the first reason given)."""

    label: Tensor
    free: Tensor
    reason: dict[int, str]

    def why(self, field: Field) -> str:
        """Why elements of this field are fixed; "" where all are free."""
        return next((self.reason[i] for i in self.label[field].flatten().tolist() if i in self.reason), "")


class Unknowns:
    """All unknowns of a graph, and what is known of them."""

    def __init__(self) -> None:
        self.count = 0
        self.equations: list[tuple[Tensor, Tensor]] = []
        self.fixed: dict[int, str] = {}

    def fresh(self, shape: Sequence[int]) -> Field:
        first, self.count = self.count, self.count + torch.Size(shape).numel()
        return torch.arange(first, self.count).reshape(tuple(shape))

    def fix(self, field: Field, reason: str) -> Field:
        """These factors are 1, for this reason."""
        for i in field.unique().tolist():
            self.fixed.setdefault(i, reason)
        return field

    def is_fixed(self, field: Field) -> bool:
        """As far as is known before solving."""
        return all(i in self.fixed for i in field.unique().tolist())

    def equal(self, a: Field, b: Field) -> Field:
        """Ties two fields, broadcast to each other; returns the tied field."""
        a, b = torch.broadcast_tensors(a, b)
        if a is not b:
            self.equations.append((a.flatten(), b.flatten()))
        return a

    def along(self, field: Field, axis: int, size: int) -> Tensor:
        """One factor per index of `axis` [size]; what lies on the other axes at one index becomes equal."""
        rows = field.movedim(axis, 0).reshape(field.shape[axis], -1)
        first = rows[:, 0]
        if rows.shape[1] > 1:
            self.equal(first[:, None], rows)
        return first.expand(size)

    def solve(self) -> Solution:
        pairs = (
            [torch.cat(side) for side in zip(*self.equations, strict=True)] if self.equations else [torch.zeros(0, dtype=torch.int64)] * 2
        )
        label = components(self.count, pairs[0], pairs[1])
        fixed = torch.zeros(self.count, dtype=torch.bool)
        fixed[label[list(self.fixed)]] = True
        reason: dict[int, str] = {}
        for i, why in zip(label[list(self.fixed)].tolist(), self.fixed.values(), strict=True):
            reason.setdefault(i, why)
        return Solution(label, label.masked_fill(fixed[label], -1), reason)


def compressed(field: Field) -> Field:
    """The field with axes of size 1 where all elements are scaled alike."""
    for axis in range(field.ndim):
        first = field.narrow(axis, 0, 1)
        if field.shape[axis] > 1 and bool((field == first).all()):
            field = first
    return field


def with_rank(field: Field, rank: int) -> Field:
    """The field of a value seen with more, leading axes."""
    return field.reshape((1,) * (rank - field.ndim) + tuple(field.shape))


def components(count: int, a: Tensor, b: Tensor) -> Tensor:
    """The smallest member of each vertex' component [count], of a graph with edges a[i] - b[i]."""
    label = torch.arange(count)
    while True:
        low = torch.minimum(label[a], label[b])
        new = label.scatter_reduce(0, label[a], low, "amin").scatter_reduce(0, label[b], low, "amin")
        new = new[new]
        if torch.equal(new, label):
            return label
        label = new


def reshaped(field: Field, old: Sequence[Dim], new: Sequence[Dim]) -> Field | None:
    """The field of a value whose shape `old` becomes `new`, elements in order; None where the sizes do not tell where elements go.

    Axes are paired from both ends into runs of equal product; what is left between them must be scaled alike."""
    left, i, j = _runs(old, new)
    right, k, _ = _runs(old[i:][::-1], new[j:][::-1])
    if any(n > 1 for n in field.shape[i : len(old) - k]):
        return None
    expand, shape = list(field.shape), [1] * len(new)
    flipped = [([len(old) - 1 - a for a in reversed(x)], [len(new) - 1 - a for a in reversed(y)]) for x, y in right]
    for axes, places in left + flipped:
        if any(field.shape[a] > 1 for a in axes):
            for a in axes:
                expand[a] = _size(old[a])
            for p in places:
                shape[p] = _size(new[p])
    return field.expand(expand).reshape(shape)


Runs = list[tuple[list[int], list[int]]]


def _runs(old: Sequence[Dim], new: Sequence[Dim]) -> tuple[Runs, int, int]:
    """Runs of axes of equal product from the start, as long as sizes are known, and where they end in each shape."""
    runs: Runs = []
    i = j = 0
    while True:
        while i < len(old) and old[i] == 1:
            runs.append(([i], []))
            i += 1
        while j < len(new) and new[j] == 1:
            runs.append(([], [j]))
            j += 1
        if i == len(old) or j == len(new):
            return runs, i, j
        if isinstance(old[i], str) and old[i] == new[j]:
            runs.append(([i], [j]))
            i, j = i + 1, j + 1
            continue
        ends = _equal_product(old, new, i, j)
        if ends is None:
            return runs, i, j
        runs.append((list(range(i, ends[0])), list(range(j, ends[1]))))
        i, j = ends


def _equal_product(old: Sequence[Dim], new: Sequence[Dim], i: int, j: int) -> tuple[int, int] | None:
    """Ends of the shortest runs from i and j whose sizes are known and have one product."""
    a = b = 1
    while True:
        if a == b and a > 1:
            return i, j
        if a <= b and i < len(old) and isinstance(n := old[i], int):
            a, i = a * n, i + 1
        elif a > b and j < len(new) and isinstance(n := new[j], int):
            b, j = b * n, j + 1
        else:
            return None


def _size(dim: Dim) -> int:
    return dim if isinstance(dim, int) else 1
