"""Histogram: a stream of tensors -> counts, whatever the order and the sharding; and the values of a constant, read in the same way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from qgraph.errors import CalibrationError, RecipeError
from qgraph.types import QSpec


class Distribution(Protocol):
    """What range choices read; n is the number of ranges: 1 per tensor, else that of the channels or groups."""

    @property
    def low(self) -> Tensor | None: ...

    @property
    def high(self) -> Tensor | None: ...

    def quantiles(self, q: float, *, magnitude: bool) -> Tensor:
        """Where the fraction q of the values (or of their magnitudes) is reached, float64 [n]."""

    def squared_error(self, scale: Tensor, zero_point: Tensor, spec: QSpec) -> Tensor:
        """Sum of (x - dequantize(quantize(x)))**2 for k candidates: scale, zero_point [k, n] -> [k, n], float64."""

    def histograms(self) -> Iterator[Histogram]:
        """n histograms, each per tensor."""


_SMALLEST_EXPONENT = -110
"""Bins are never narrower than 2**-110, so that 2**-exponent is a normal float32."""
_PIECE = 1 << 15
"""Elements worked on at once: they stay in cache and below torch's grain for threads. On a busy machine the barriers of thousands of
small parallel loops cost ten times the counting."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values in bins of width 2**exponent, and the exact bounds: counts [2 * bins - 1] per tensor, [n, 2 * bins - 1] with
    bounds and exponent of shape (n,) per axis.

    Bin i holds the values with trunc(x / 2**exponent) == i, for |i| < bins: bin 0 is (-w, w), bin i > 0 is [i w, (i + 1) w).
    The exponent is the smallest for which the largest magnitude fits, and doubling the width maps bin i to trunc(i / 2)
    exactly, so the histogram depends on the values alone: any order and any sharding give the same counts.
    """

    values: ClassVar[bool] = True
    bins: int = 2048
    low: Tensor | None = None
    high: Tensor | None = None
    exponent: Tensor | None = None
    counts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bins < 16 or self.bins & (self.bins - 1):
            raise RecipeError(f"bins must be a power of two and at least 16, got {self.bins}")

    def of(self, rows: Sequence[Tensor] | None, low: Tensor, high: Tensor) -> Histogram:
        assert rows is not None, "a histogram needs the values"
        magnitude = torch.maximum(-low, high).double()
        fits = torch.frexp(magnitude).exponent - self.bins.bit_length() + 1
        exponent = fits.where(magnitude > 0, _SMALLEST_EXPONENT).clamp(min=_SMALLEST_EXPONENT)
        counts = [_count(row, e, self.bins) for row, e in zip(rows, exponent.reshape(-1).tolist(), strict=True)]
        return Histogram(self.bins, low, high, exponent, torch.stack(counts).reshape(*low.shape, -1))

    def merge(self, later: Histogram) -> Histogram:
        if self.low is None or self.high is None or later.low is None or later.high is None:
            return later if self.low is None else self
        if self.bins != later.bins:
            raise CalibrationError(f"histograms of {self.bins} and {later.bins} bins cannot be merged")
        assert self.exponent is not None and later.exponent is not None
        exponent = torch.maximum(self.exponent, later.exponent)
        counts = self._widened(exponent) + later._widened(exponent)
        return Histogram(self.bins, torch.minimum(self.low, later.low), torch.maximum(self.high, later.high), exponent, counts)

    def _widened(self, exponent: Tensor) -> Tensor:
        assert self.counts is not None and self.exponent is not None
        shift = (exponent - self.exponent).clamp(max=31)
        if not shift.any():
            return self.counts
        index = torch.arange(1 - self.bins, self.bins)
        index = index.sign() * (index.abs() >> shift.unsqueeze(-1)) + (self.bins - 1)
        return torch.zeros_like(self.counts).scatter_add_(-1, index, self.counts)

    def histograms(self) -> Iterator[Histogram]:
        assert self.low is not None and self.high is not None and self.exponent is not None and self.counts is not None
        if not self.low.dim():
            yield self
            return
        for low, high, exponent, counts in zip(self.low, self.high, self.exponent, self.counts, strict=True):
            yield replace(self, low=low, high=high, exponent=exponent, counts=counts)

    def edges(self) -> tuple[Tensor, Tensor]:
        """Lower and upper edges of all bins of one histogram, float64; the first and the last with values end at the true bounds."""
        assert self.low is not None and self.high is not None and self.exponent is not None
        width = 2.0 ** int(self.exponent)
        index = torch.arange(1 - self.bins, self.bins, dtype=torch.float64)
        low, high = self.low.double(), self.high.double()
        return ((index - (index <= 0).double()) * width).clamp(low, high), ((index + (index >= 0).double()) * width).clamp(low, high)

    def quantiles(self, q: float, *, magnitude: bool) -> Tensor:
        """Linear inside a bin, never beyond the true bounds."""
        return torch.tensor([h._quantile(q, magnitude=magnitude) for h in self.histograms()], dtype=torch.float64)

    def _quantile(self, q: float, *, magnitude: bool) -> float:
        assert self.low is not None and self.high is not None and self.exponent is not None and self.counts is not None
        width, zero = 2.0 ** int(self.exponent), self.bins - 1
        low, high = self.low.item(), self.high.item()
        if magnitude:
            return min(_reached(self.magnitudes(), q) * width, max(-low, high))
        at = _reached(self.counts, q) - zero  # as if bin i were [i, i + 1) for all i
        at = at - 1 if at < 0 else 2 * at - 1 if at < 1 else at
        return min(max(at * width, low), high)

    def magnitudes(self) -> Tensor:
        """Counts [bins] of |x| of one histogram."""
        assert self.counts is not None
        up, down = self.counts[self.bins - 1 :], self.counts[: self.bins].flip(0)
        return torch.cat([up[:1], up[1:] + down[1:]])

    def squared_error(self, scale: Tensor, zero_point: Tensor, spec: QSpec) -> Tensor:
        """Exact for values spread evenly inside each bin."""
        found = [h._squared_error(s, z, spec) for h, s, z in zip(self.histograms(), scale.T, zero_point.T, strict=True)]
        return torch.stack(found, 1)

    def _squared_error(self, scale: Tensor, zero_point: Tensor, spec: QSpec) -> Tensor:
        """For one x, e(x) = x - s k with k = clamp(round(x / s)); the integral of e**2 is s**3 k / 12 + e**3 / 3, continuous where k steps."""
        assert self.counts is not None and self.exponent is not None
        some = self.counts.nonzero().squeeze(1)
        lower, upper = (edge[some] for edge in self.edges())
        point = 2.0 ** (int(self.exponent) - 16)  # the width of a bin that the bounds leave none: its integral must stay above rounding
        upper = torch.maximum(upper, lower + point)
        s, z = scale.double().unsqueeze(1), zero_point.double().unsqueeze(1)
        smallest, largest = (q - z for q in spec.range)

        def integral(x: Tensor) -> Tensor:
            k = (x / s).round_().clamp_(smallest, largest)
            e = x - s * k
            return k.mul_(s**3 / 12).addcmul_(e * e, e, value=1 / 3)

        return ((integral(upper) - integral(lower)) / (upper - lower)) @ self.counts[some].double()


def _count(values: Tensor, exponent: int, bins: int) -> Tensor:
    counts = torch.zeros(2 * bins - 1, dtype=torch.int64, device=values.device)
    for piece in values.reshape(-1).split(_PIECE):
        index = (piece.float() * 2.0**-exponent).int().add_(bins - 1)  # exact up to underflow, which truncates to 0 as well
        counts += torch.bincount(index, minlength=counts.numel())
    return counts.cpu()


def _reached(counts: Tensor, q: float) -> float:
    """Where the fraction q of the counts is reached, in bins from the first bin's lower edge."""
    cumulated = counts.double().cumsum(0)
    target = q * cumulated[-1]
    i = int(torch.searchsorted(cumulated, target))
    if not counts[i]:  # only for q == 0 (first bins empty): start at the first value
        i = int(counts.nonzero()[0])
    below = cumulated[i] - counts[i]
    return i + float((target - below) / counts[i])


@dataclass(frozen=True, eq=False)
class Values:
    """All values of a constant, [n, m]: the rows that share a scale. The distribution itself, where a stream has a histogram of it."""

    rows: Tensor

    @property
    def low(self) -> Tensor:
        return self.rows.amin(1)

    @property
    def high(self) -> Tensor:
        return self.rows.amax(1)

    def quantiles(self, q: float, *, magnitude: bool) -> Tensor:
        """Linear between neighbours, as numpy's."""
        ordered = (self.rows.abs() if magnitude else self.rows).sort(1).values
        at = q * (ordered.shape[1] - 1)
        below, above = ordered[:, math.floor(at)].double(), ordered[:, math.ceil(at)].double()
        return below + (at - math.floor(at)) * (above - below)

    def squared_error(self, scale: Tensor, zero_point: Tensor, spec: QSpec) -> Tensor:
        total = torch.zeros(scale.shape, dtype=torch.float64)
        smallest, largest = (q - zero_point.float() for q in spec.range)
        step = max(1, _PIECE // self.rows.shape[1])
        for first in range(0, len(self.rows), step):
            rows = slice(first, first + step)
            for x in self.rows[rows].split(_PIECE, 1):
                for k in range(len(scale)):
                    s = scale[k, rows, None].float()
                    e = (x / s).round_().clamp_(smallest[k, rows, None], largest[k, rows, None]).mul_(s).sub_(x)
                    total[k, rows] += e.square_().sum(1)
        return total

    def histograms(self) -> Iterator[Histogram]:
        for row, low, high in zip(self.rows, self.low, self.high, strict=True):
            yield Histogram().of([row], low, high)
