"""Ranges: what is collected of a stream of tensors (a statistic), and how (low, high) is read off it (a choice).

A statistic is an immutable, fixed-size summary and a monoid: `of` one tensor, `merge` of two. So calibration streams, shards,
resumes, and an interruption never leaves one half updated. See histogram.py for distributions, choices.py for what reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from qgraph.errors import RecipeError
from qgraph.types import QSpec

Range = tuple[Tensor, Tensor]
"""(low, high) in the shape of the scale: () per tensor, (n,) per axis."""


def infinite_from(dtype: torch.dtype) -> float:
    """Magnitudes from here on stand for infinity in a value of this float type: models mask with finfo.min, or half of it, which no
    range should hold. In float16 that is its largest number alone (65504), in wider types everything from 1e30."""
    return 65504.0 if dtype == torch.float16 else 1e30


class Statistic(Protocol):
    """An immutable summary of what was seen; dataclass fields are its state. `low` is None until something was seen.

    `values` is False when `of` needs only the bounds, which a runtime can reduce without handing out the tensor."""

    values: ClassVar[bool]

    @property
    def low(self) -> Tensor | None: ...

    @property
    def high(self) -> Tensor | None: ...

    def of(self, rows: Sequence[Tensor] | None, low: Tensor, high: Tensor) -> Self:
        """The summary of one tensor with these float32 bounds, () per tensor or (n,) per axis; rows: the finite values behind each
        entry of the bounds, flat (None where only the bounds are known)."""

    def merge(self, later: Self) -> Self:
        """The summary of this data followed by `later`'s."""


Choice = Callable[[Any, QSpec], Range]
"""Reads a range off a statistic for a spec, as float32."""


@dataclass(frozen=True, eq=False)
class MinMax:
    """Smallest and largest value; merging in any order gives the same."""

    values: ClassVar[bool] = False
    low: Tensor | None = None
    high: Tensor | None = None

    def of(self, rows: Sequence[Tensor] | None, low: Tensor, high: Tensor) -> MinMax:
        return MinMax(low, high)

    def merge(self, later: MinMax) -> MinMax:
        if self.low is None or self.high is None or later.low is None or later.high is None:
            return later if self.low is None else self
        return MinMax(torch.minimum(self.low, later.low), torch.maximum(self.high, later.high))


@dataclass(frozen=True, eq=False)
class MovingAverage:
    """Exponential average of each batch's bounds: the first batch as it is, then a += momentum * (batch - a), as in torch's
    MovingAverageMinMaxObserver (averaging_constant 0.01). ONNX Runtime's calibrator of this name takes the plain mean instead.

    `merge` appends: A then B equals one stream (float64 rounding apart), which is all an order-dependent average can promise.
    Behind A, the first batch b of B loses the privilege of a first batch: avg(AB) = avg(B) + (1 - momentum) ** n_B * (avg(A) - b).
    A single batch is the case n_B = 1.
    """

    values: ClassVar[bool] = False
    momentum: float = 0.01
    low: Tensor | None = None
    high: Tensor | None = None
    first: Range | None = None
    batches: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.momentum <= 1:
            raise RecipeError(f"momentum must be above 0 and at most 1, got {self.momentum}")

    def of(self, rows: Sequence[Tensor] | None, low: Tensor, high: Tensor) -> MovingAverage:
        low, high = low.double(), high.double()
        return MovingAverage(self.momentum, low, high, (low, high), 1)

    def merge(self, later: MovingAverage) -> MovingAverage:
        if self.low is None or self.high is None or later.low is None or later.high is None or later.first is None:
            return later if self.low is None else self
        keep, (first_low, first_high) = (1 - self.momentum) ** later.batches, later.first
        low, high = later.low + keep * (self.low - first_low), later.high + keep * (self.high - first_high)
        return replace(self, low=low, high=high, batches=self.batches + later.batches)


def bounds(statistic: Statistic, spec: QSpec) -> Range:
    """Range choice: what the statistic calls its bounds, nothing cut off."""
    assert statistic.low is not None and statistic.high is not None
    return statistic.low.float(), statistic.high.float()
