"""Range choices: what a distribution says -> the (low, high) that quantization keeps, for streams (Histogram) and constants (Values).

All return float32 in the shape of the distribution's bounds and never reach beyond them; symmetric specs get (-r, r).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.errors import RecipeError
from qgraph.histogram import Distribution, Histogram
from qgraph.qparams import choose_qparams
from qgraph.ranges import Range
from qgraph.types import QSpec


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread. A choice is thousands of small loops: their barriers cost more than the work, and on a busy machine a hundred
    times more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bounds(found: Distribution) -> Range:
    assert found.low is not None and found.high is not None
    return found.low.float(), found.high.float()


@dataclass(frozen=True)
class Percentile:
    """Keeps `percentile` % of the values.

    Symmetric specs cut the largest magnitudes; asymmetric ones cut half of the rest at each end."""

    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 50 <= self.percentile <= 100:
            raise RecipeError(f"percentile must be from 50 to 100, got {self.percentile}")

    def __call__(self, found: Distribution, spec: QSpec) -> Range:
        low, high = _bounds(found)
        keep = self.percentile / 100
        if spec.symmetric:
            r = found.quantiles(keep, magnitude=True).float().reshape(low.shape).clamp(max=torch.maximum(-low, high))
            return -r, r
        cut = (1 - keep) / 2
        below, above = (found.quantiles(q, magnitude=False).float().reshape(low.shape).clamp(low, high) for q in (cut, 1 - cut))
        return below, above


_COARSE = 0.75 ** torch.arange(24)
"""Down to a thousandth of the bounds: a few bins of a histogram."""
_FINE = 0.75 ** torch.linspace(-1, 1, 17)


@dataclass(frozen=True)
class MSE:
    """Least sum of (x - dequantize(quantize(x)))**2 under the spec, its zero point included.

    The error is what is cut off, convex in each bound, plus (high - low)**2 / (12 steps**2) for each value that is kept: so a bound is
    searched over factors of itself, first coarse, then fine (4 %). Those of an asymmetric range in turn, twice: within 2 % of the
    least error, but up to 8 % at 4 bits and less, where the rounding of the zero point makes the error uneven."""

    def __call__(self, found: Distribution, spec: QSpec) -> Range:
        true_low, true_high = _bounds(found)
        shape = true_low.shape
        true_low, true_high = true_low.reshape(-1).clamp(max=0.0), true_high.reshape(-1).clamp(min=0.0)

        def error(low: Tensor, high: Tensor) -> Tensor:
            low, high = torch.broadcast_tensors(low, high)
            return found.squared_error(*choose_qparams(low, high, spec), spec)

        low, high = true_low, true_high
        if spec.symmetric:
            true_high = torch.maximum(-low, high)
            high = _least(lambda r: error(-r, r), true_high, true_high, _COARSE, _FINE)
            low = -high
        else:
            for scans in ((_COARSE, _FINE), (_FINE,)):
                high = _least(lambda to: error(low, to), high, true_high, *scans)  # noqa: B023 - called at once
                low = _least(lambda to: error(to, high), low, true_low, *scans)  # noqa: B023
        return low.reshape(shape), high.reshape(shape)


def _least(error: Callable[[Tensor], Tensor], start: Tensor, limit: Tensor, *scans: Tensor) -> Tensor:
    """The factors [k] of `start` [n] with the least error, each scan around the last's; the widest of equals, none beyond `limit`."""
    best = start
    for factors in scans if bool(limit.any()) else ():
        wide = best * factors.unsqueeze(1)
        candidates = torch.where(wide.abs() > limit.abs(), limit, wide)
        best = candidates.gather(0, error(candidates).argmin(0, keepdim=True)).squeeze(0)
    return best


@dataclass(frozen=True)
class Entropy:
    """Least Kullback-Leibler divergence between the values and their quantized form: TensorRT's calibrator (S. Migacz, 8-bit inference
    with TensorRT, GTC 2017), for any number of bits.

    1. A candidate is a run of bins. P holds their counts; what lies beyond is added to its outermost non-empty bins.
    2. Q merges the run into `levels` equal parts, floor(j * bins / levels), and spreads each part's sum over its non-empty bins.
    3. The bin around 0 counts as its larger neighbour: 0 is represented exactly, and half of a ReLU's output lies there (NVIDIA's
       pytorch-quantization replaces it as well).
    4. Symmetric: runs of |x| from 0, 2**(bits - 1) levels, as published. Asymmetric: runs around 0, 2**bits levels; the two ends are
       searched in turn (upper, lower, upper), a one-sided distribution keeps its end at 0.
    `candidates` ends are tried, evenly spread over those possible. A histogram with no more bins than levels shows no difference, so
    nothing is cut off then.
    """

    candidates: int = 128

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise RecipeError(f"candidates must be at least 2, got {self.candidates}")

    def __call__(self, found: Distribution, spec: QSpec) -> Range:
        shape = _bounds(found)[0].shape
        low, high = zip(*(self._range(h, spec) for h in found.histograms()), strict=True)
        return torch.tensor(low).reshape(shape), torch.tensor(high).reshape(shape)

    def _range(self, found: Histogram, spec: QSpec) -> tuple[float, float]:
        assert found.counts is not None and found.exponent is not None
        (low, high), (lower, upper) = (float(x) for x in _bounds(found)), found.edges()
        if spec.symmetric:
            _, end = self._run(found.magnitudes(), 0, 2 ** (spec.bits - 1))
            r = min(end * 2.0 ** int(found.exponent), max(-low, high))
            return -r, r
        first, end = self._run(found.counts, found.bins - 1, 2**spec.bits)
        return float(lower[first]), float(upper[end - 1])

    def _run(self, counts: Tensor, zero: int, levels: int) -> tuple[int, int]:
        """The run [first, end) of bins around `zero` with the least divergence."""
        some = counts.nonzero().squeeze(1).tolist()
        lowest, highest = min(some[0], zero), max(some[-1], zero) + 1
        first, end = lowest, highest
        counts = counts.double()
        counts[zero] = counts[[max(zero - 1, 0), zero + 1]].max() if zero else counts[1]
        for at_end in (True, False, True):
            widest, narrowest = (highest, max(zero + 1, first + levels)) if at_end else (lowest, min(zero, end - levels))
            if (widest > narrowest) == at_end and widest != narrowest:
                ends = torch.linspace(widest, narrowest, min(abs(widest - narrowest) + 1, self.candidates)).round().long()
                runs = (torch.full_like(ends, first), ends) if at_end else (ends, torch.full_like(ends, end))
                best = int(ends[_divergence(counts, *runs, levels).argmin()])
                first, end = (first, best) if at_end else (best, end)
        return first, end


def _divergence(counts: Tensor, first: Tensor, end: Tensor, levels: int) -> Tensor:
    """KL(P || Q) of k runs [first, end) [k] of counts [bins], float64 (see Entropy).

    With c the counts, s and m the sum and the number of non-empty bins of a part, T all counts and I those inside:
    sum P log P / Q = (sum p log p - sum s log(s / m) - outside * log(s / m of the part at that end)) / T + log(I / T)."""
    at = torch.arange(len(counts)).where(counts > 0, -1)
    after, before = at.where(at >= 0, len(counts) - 1).flip(0).cummin(0).values.flip(0), at.cummax(0).values.clamp(min=0)
    sums, some, logs = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (counts, (counts > 0).double(), _xlogx(counts)))
    edges = first.unsqueeze(1) + torch.arange(levels + 1) * (end - first).unsqueeze(1) // levels
    part, filled = sums[edges].diff(), some[edges].diff()
    mean = (part / filled.clamp(min=1)).log()  # of empty parts -inf, which nothing reads
    divergence = logs[end] - logs[first] - (part * mean).nan_to_num(nan=0.0).sum(1)
    for outermost, outside in ((after[first], sums[first]), (before[end - 1], sums[-1] - sums[end])):
        inside, its_part = counts[outermost], torch.searchsorted(edges, outermost.unsqueeze(1), right=True) - 1
        log_q = mean.gather(1, its_part.clamp(0, levels - 1)).squeeze(1)
        extra = _xlogx(inside + outside) - _xlogx(inside) - outside * log_q
        divergence += torch.where(outside > 0, extra, 0.0)
    total, kept = sums[-1], sums[end] - sums[first]
    return (divergence / total + (kept / total).log()).nan_to_num(nan=torch.inf, neginf=torch.inf)


def _xlogx(x: Tensor) -> Tensor:
    return torch.xlogy(x, x)
