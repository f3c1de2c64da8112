"""Ranges: what is collected of a stream of tensors (a statistic), and how (low, high) is read off it (a choice).

A statistic is an immutable, fixed-size summary and a monoid: `of` one tensor, `merge` of two. So calibration streams, shards,
resumes, and an interruption never leaves one half updated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from qgraph.errors import CalibrationError, RecipeError
from qgraph.types import QSpec

Range = tuple[Tensor, Tensor]
"""(low, high) in the shape of the scale: () per tensor, (n,) per axis."""


class Statistic(Protocol):
    """An immutable summary of what was seen; dataclass fields are its state. `low` is None until something was seen.

    `values` is False when `of` needs only the bounds, which a runtime can reduce without handing out the tensor."""

    values: ClassVar[bool]

    @property
    def low(self) -> Tensor | None: ...

    @property
    def high(self) -> Tensor | None: ...

    def of(self, x: Tensor | None, low: Tensor, high: Tensor) -> Self:
        """The summary of one finite, non-empty float tensor with these float32 bounds (() per tensor, (n,) per axis)."""

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

    def of(self, x: Tensor | None, low: Tensor, high: Tensor) -> MinMax:
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

    def of(self, x: Tensor | None, low: Tensor, high: Tensor) -> MovingAverage:
        low, high = low.double(), high.double()
        return MovingAverage(self.momentum, low, high, (low, high), 1)

    def merge(self, later: MovingAverage) -> MovingAverage:
        if self.low is None or self.high is None or later.low is None or later.high is None or later.first is None:
            return later if self.low is None else self
        keep, (first_low, first_high) = (1 - self.momentum) ** later.batches, later.first
        low, high = later.low + keep * (self.low - first_low), later.high + keep * (self.high - first_high)
        return replace(self, low=low, high=high, batches=self.batches + later.batches)


_SMALLEST_EXPONENT = -110
"""Bins are never narrower than 2**-110, so that 2**-exponent is a normal float32."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values in bins of width 2**exponent, and the exact bounds; per tensor only.

    Bin i holds the values with trunc(x / 2**exponent) == i, for |i| < bins: bin 0 is (-w, w), bin i > 0 is [i w, (i + 1) w).
    The exponent is the smallest for which the largest magnitude fits, and doubling the width maps bin i to trunc(i / 2)
    exactly, so the histogram depends on the values alone: any order and any sharding give the same counts.
    """

    values: ClassVar[bool] = True
    bins: int = 2048
    low: Tensor | None = None
    high: Tensor | None = None
    exponent: int = _SMALLEST_EXPONENT
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bins < 16 or self.bins & (self.bins - 1):
            raise RecipeError(f"bins must be a power of two and at least 16, got {self.bins}")

    def of(self, x: Tensor | None, low: Tensor, high: Tensor) -> Histogram:
        assert x is not None, "a histogram needs the values"
        magnitude = max(-low.item(), high.item())
        fits = math.frexp(magnitude)[1] - self.bins.bit_length() + 1 if magnitude else _SMALLEST_EXPONENT
        exponent = max(fits, _SMALLEST_EXPONENT)
        counts = torch.zeros(2 * self.bins - 1, dtype=torch.int64, device=x.device)
        # Pieces that stay in cache and below torch's grain for threads (2**15): on a busy machine the barriers of thousands of
        # small parallel loops cost ten times the counting.
        for piece in x.reshape(-1).split(1 << 15):
            index = (piece.float() * 2.0**-exponent).int().add_(self.bins - 1)  # exact up to underflow, which truncates to 0 as well
            counts += torch.bincount(index, minlength=counts.numel())
        return Histogram(self.bins, low, high, exponent, counts.cpu())

    def merge(self, later: Histogram) -> Histogram:
        if self.low is None or self.high is None or later.low is None or later.high is None:
            return later if self.low is None else self
        if self.bins != later.bins:
            raise CalibrationError(f"histograms of {self.bins} and {later.bins} bins cannot be merged")
        exponent = max(self.exponent, later.exponent)
        counts = self._widened(exponent) + later._widened(exponent)
        return Histogram(self.bins, torch.minimum(self.low, later.low), torch.maximum(self.high, later.high), exponent, counts)

    def _widened(self, exponent: int) -> Tensor:
        assert self.counts is not None
        shift = min(exponent - self.exponent, 31)
        if not shift:
            return self.counts
        index = torch.arange(1 - self.bins, self.bins)
        index = index.sign() * (index.abs() >> shift) + (self.bins - 1)
        return torch.zeros_like(self.counts).index_add_(0, index, self.counts)


def bounds(statistic: Statistic, spec: QSpec) -> Range:
    """Range choice: what the statistic calls its bounds, nothing cut off."""
    assert statistic.low is not None and statistic.high is not None
    return statistic.low.float(), statistic.high.float()


@dataclass(frozen=True)
class Percentile:
    """Range choice on a Histogram: keeps `percentile` % of the values, linear inside a bin, never beyond the true bounds.

    Symmetric specs cut the largest magnitudes; asymmetric ones cut half of the rest at each end."""

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 <= self.percentile <= 100:
            raise RecipeError(f"percentile must be from 50 to 100, got {self.percentile}")

    def __call__(self, statistic: Histogram, spec: QSpec) -> Range:
        low, high = bounds(statistic, spec)
        assert statistic.counts is not None
        keep, width, zero = self.percentile / 100, 2.0**statistic.exponent, statistic.bins - 1
        up, down = statistic.counts[zero:], statistic.counts[: zero + 1].flip(0)
        if spec.symmetric:
            magnitudes = torch.cat([up[:1], up[1:] + down[1:]])
            r = torch.tensor(_quantile(magnitudes, keep) * width).float().clamp(max=torch.maximum(-low, high))
            return -r, r
        cut = (1 - keep) / 2
        edges = [_signed_quantile(down, up, q) * width for q in (cut, 1 - cut)]
        chosen_low, chosen_high = (torch.tensor(e).float().clamp(low, high) for e in edges)
        return chosen_low, chosen_high


def _quantile(counts: Tensor, q: float) -> float:
    """Where the fraction q of the counts is reached, in bins from the first bin's lower edge."""
    cumulated = counts.double().cumsum(0)
    target = q * cumulated[-1]
    i = int(torch.searchsorted(cumulated, target))
    if not counts[i]:  # only for q == 0 (first bins empty): start at the first value
        i = int(counts.nonzero()[0])
    below = cumulated[i] - counts[i]
    return i + float((target - below) / counts[i])


def _signed_quantile(down: Tensor, up: Tensor, q: float) -> float:
    """The same over all bins, in units of the bin width; `up` and `down` count outwards and share bin 0, which is (-1, 1)."""
    at = _quantile(torch.cat([down[1:].flip(0), up]), q) - (len(up) - 1)  # as if bin i were [i, i + 1) for all i
    return at - 1 if at < 0 else 2 * at - 1 if at < 1 else at
