"""Moments: mean and standard deviation of a value per channel, known without data; what scaling, clips and other functions make of them.

    x ~ N(m, s^2), a = (low - m) / s, b = (high - m) / s, P and p the normal distribution and its density:
    E[clip(x)]   = low P(a) + high (1 - P(b)) + m (P(b) - P(a)) + s (p(a) - p(b))
    E[clip(x)^2] = low^2 P(a) + high^2 (1 - P(b)) + (m^2 + s^2) (P(b) - P(a)) + s ((m + low) p(a) - (m + high) p(b))

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS = "moments"
"""The key of `node.meta` under which what is known of a node's value waits: Moments that came with the model, kept when it is rewritten."""

FAR = 40.0
"""Standard deviations beyond which a normal distribution has nothing left in float64."""

REACH, POINTS = 8.0, 257
"""The grid on which functions without a closed form are averaged: this many points over +-REACH standard deviations."""


@dataclass(frozen=True, eq=False)
class Moments:
    """float64 tensors of one shape that broadcasts to the value: [C, 1, 1] for an image.

    `low`, `high`: between them lies what counts for a range: bounds that hold, or reaches of a distribution (`within`).
    `std` is inf where nothing but these bounds is known."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @property
    def known(self) -> bool:
        """Mean and deviation are."""
        return bool((self.mean.isfinite() & self.std.isfinite()).all())

    def within(self, sigmas: float) -> Moments:
        """`low` and `high` no further from the mean than this many standard deviations."""
        reach = sigmas * self.std
        return Moments(self.mean, self.std, self.low.maximum(self.mean - reach), self.high.minimum(self.mean + reach))

    def bounded(self, low: float | None, high: float | None) -> Moments:
        """With bounds that the value is known to keep."""
        limits = -math.inf if low is None else low, math.inf if high is None else high
        return Moments(self.mean, self.std, self.low.clamp(*limits), self.high.clamp(*limits))

    def times(self, factor: Tensor) -> Moments:
        """Of x * factor."""
        ends = _product(self.low, factor), _product(self.high, factor)
        return joined(self.mean * factor, self.std * factor.abs(), torch.minimum(*ends), torch.maximum(*ends))

    def plus(self, shift: Tensor) -> Moments:
        """Of x + shift."""
        return joined(self.mean + shift, self.std, self.low + shift, self.high + shift)

    def each(self, move: Callable[[Tensor], Tensor]) -> Moments:
        """Of a value whose elements are moved or copied."""
        return Moments(move(self.mean), move(self.std), move(self.low), move(self.high))

    def pooled(self, axes: Sequence[int]) -> Moments:
        """Of one element drawn at random along `axes` (they stay, with size 1): what averages keep, with the variance as an upper bound."""
        axes = [a for a in axes if -self.mean.ndim <= a < self.mean.ndim and self.mean.shape[a] > 1]
        if not axes:
            return self
        mean = self.mean.mean(axes, keepdim=True)
        variance = (self.std.square() + (self.mean - mean).square()).mean(axes, keepdim=True)
        return Moments(mean, variance.sqrt(), self.low.amin(axes, keepdim=True), self.high.amax(axes, keepdim=True))

    def clipped(self, low: float, high: float) -> Moments:
        """Of clip(x, low, high) for normal x; either limit may be infinite."""
        m, s = self.mean, self.std
        # An infinite limit is as good as one far away, and keeps infinity times 0 out of the sums.
        a_limit, b_limit = (m - FAR * s).clamp(low, high) - m, (m + FAR * s).clamp(low, high) - m
        scale = s.clamp(min=torch.finfo(s.dtype).tiny)
        a, b = a_limit / scale, b_limit / scale
        below, above, inside = torch.special.ndtr(a), torch.special.ndtr(-b), torch.special.ndtr(b) - torch.special.ndtr(a)
        at_a, at_b = _density(a), _density(b)
        # Around m, so that variances are no differences of large numbers.
        mean = a_limit * below + b_limit * above + s * (at_a - at_b)
        square = a_limit.square() * below + b_limit.square() * above + s.square() * inside + s * (a_limit * at_a - b_limit * at_b)
        std = (square - mean.square()).clamp(min=0).sqrt()
        return Moments(m + mean, std, self.low.clamp(low, high), self.high.clamp(low, high))

    def through(self, fn: Callable[[Tensor], Tensor]) -> Moments | None:
        """Of fn(x) for a pointwise fn and normal x cut off at `low` and `high`; None where fn gives no finite numbers or does not keep shapes.

        fn is called with float32 tensors that have an axis of points in front of those of x."""
        t = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64).reshape(-1, *[1] * self.mean.ndim)
        weights = torch.exp(-t.square() / 2) / torch.exp(-t.square() / 2).sum()
        cut = self.within(REACH)
        x = (cut.mean + t * cut.std).clamp(cut.low, cut.high)
        ends = cut.low + (t + REACH) / (2 * REACH) * (cut.high - cut.low)
        y, extremes = (fn(v.float()).double() for v in (x, ends))
        if y.shape != x.shape or not bool((y.isfinite() & extremes.isfinite()).all()):
            return None
        mean = (weights * y).sum(0)
        std = (weights * (y - mean).square()).sum(0).sqrt()
        return Moments(mean, std, extremes.amin(0), extremes.amax(0))


def joined(mean: Tensor, std: Tensor, low: Tensor, high: Tensor) -> Moments:
    """Moments of parts that broadcast to each other."""
    return Moments(*torch.broadcast_tensors(*(v.detach().double() for v in (mean, std, low, high))))


def normal(mean: Tensor, std: Tensor) -> Moments:
    """Of a value that is normally distributed, as far as is known."""
    infinite = torch.tensor(math.inf)
    return joined(mean, std, -infinite, infinite)


def constant(value: Tensor) -> Moments:
    """Of a stored tensor or a number."""
    return joined(value, torch.zeros(()), value, value)


def uniform(low: float, high: float) -> Moments:
    """Of a value that is anywhere between two numbers."""
    a, b = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return joined((a + b) / 2, (b - a) / math.sqrt(12), a, b)


def only_bounds(low: float, high: float) -> Moments:
    """Of a value of which nothing else is known."""
    return joined(torch.tensor((low + high) / 2), torch.tensor(math.inf), torch.tensor(low), torch.tensor(high))


def sum_of(a: Moments, b: Moments) -> Moments:
    """Of a + b, taken as independent."""
    return joined(a.mean + b.mean, (a.std.square() + b.std.square()).sqrt(), a.low + b.low, a.high + b.high)


def product_of(a: Moments, b: Moments) -> Moments:
    """Of a * b, taken as independent."""
    variance = (a.std * b.std).square() + (a.std * b.mean).square() + (b.std * a.mean).square()
    ends = torch.stack(torch.broadcast_tensors(*(_product(x, y) for x in (a.low, a.high) for y in (b.low, b.high))))
    return joined(a.mean * b.mean, variance.sqrt(), ends.amin(0), ends.amax(0))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a * b where infinity times 0 is 0."""
    return (a * b).nan_to_num(0.0, math.inf, -math.inf)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
