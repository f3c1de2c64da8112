"""Statistics beyond ranges: what stages learn about a value. All have a fixed size, stream, and merge in any order.

seen = AbsMax(axis=-1)
collect(gm, {node: seen.update}, ctx.data, label="smooth_quant")
seen.value                                                              # [n], of all batches
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qgraph.errors import CalibrationError
from qgraph.histogram import Histogram
from qgraph.observe import Observer
from qgraph.ranges import infinite_from
from qgraph.types import QSpec


class AbsMax:
    """Largest magnitude at each index of `axis`: `value` [n], float32; None before any data.

    Infinities, and what stands for them, are left out (see `ranges.infinite_from`). Raises CalibrationError for NaN."""

    def __init__(self, axis: int, *, name: str = "") -> None:
        self.axis, self.name = axis, name
        self.value: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if x.numel():
            (x, rest), limit = _other_axes(x, self.axis, self.name), infinite_from(x.dtype)
            magnitudes = x.abs()
            found = magnitudes.amax(rest)
            if not bool((found < limit).all()):
                _refuse_nan(found, self.name)
                found = magnitudes.where(magnitudes < limit, 0).amax(rest)
            self._add(found.float().cpu())

    def merge(self, other: AbsMax) -> None:
        if other.value is not None:
            self._add(other.value)

    def _add(self, found: Tensor) -> None:
        self.value = found if self.value is None else torch.maximum(self.value, found)


class Mean:
    """Mean at each index of `axis`, summed in float64 (so order costs the last bits at most): `value` [n], float32; None before any
    data. Raises CalibrationError for NaN and infinities, which have no mean."""

    def __init__(self, axis: int, *, name: str = "") -> None:
        self.axis, self.name = axis, name
        self.total: Tensor | None = None
        self.count = 0

    @property
    def value(self) -> Tensor | None:
        return None if self.total is None else (self.total / self.count).float()

    def update(self, x: Tensor) -> None:
        if x.numel():
            x, rest = _other_axes(x, self.axis, self.name)
            total = x.sum(rest, dtype=torch.float64).cpu()
            if not bool(total.isfinite().all()):
                raise CalibrationError(f"{_who(self.name)} contains NaN or infinity during calibration; leave this value in float")
            self._add(total, x.numel() // len(total))

    def merge(self, other: Mean) -> None:
        if other.total is not None:
            self._add(other.total, other.count)

    def _add(self, total: Tensor, count: int) -> None:
        self.total, self.count = total if self.total is None else self.total + total, self.count + count


class Tokens:
    """How much data reached a value: `rows` of the last axis, in `calls` tensors. Experts that a router starves have few."""

    def __init__(self) -> None:
        self.rows, self.calls = 0, 0

    def update(self, x: Tensor) -> None:
        self.rows, self.calls = self.rows + math.prod(x.shape[:-1]), self.calls + 1

    def merge(self, other: Tokens) -> None:
        self.rows, self.calls = self.rows + other.rows, self.calls + other.calls


class Quantiles:
    """Quantiles of all elements, from a histogram (see histogram.py): within a bin, 1 / `bins` of the largest magnitude at most.

    Raises CalibrationError for NaN, and when asked before any data."""

    def __init__(self, *, bins: int = 2048, name: str = "") -> None:
        self._seen = Observer(QSpec(), Histogram(bins), name=name)

    def update(self, x: Tensor) -> None:
        self._seen.update(x)

    def merge(self, other: Quantiles) -> None:
        self._seen.merge(other._seen)

    def quantile(self, q: float) -> float:
        """The value below which the fraction q lies, 0 <= q <= 1."""
        self._seen.range()  # raises without data
        return float(self._seen.statistic.quantiles(q, magnitude=False))  # type: ignore[attr-defined]

    @property
    def interquartile_range(self) -> float | None:
        """None before any data."""
        return self.quantile(0.75) - self.quantile(0.25) if self._seen.seen else None


def _other_axes(x: Tensor, axis: int, name: str) -> tuple[Tensor, list[int]]:
    """`x` with one axis more, in front, and all its axes but `axis`: at least one, as torch takes none for all."""
    if not -x.dim() <= axis < x.dim():
        raise CalibrationError(f"{_who(name)} has shape {list(x.shape)}, without axis {axis}")
    return x.detach().unsqueeze(0), [0, *(d + 1 for d in range(x.dim()) if d != axis % x.dim())]


def _refuse_nan(found: Tensor, name: str) -> None:
    if bool(found.isnan().any()):
        raise CalibrationError(f"{_who(name)} contains NaN during calibration; check the calibration data")


def _who(name: str) -> str:
    return f"the value {name!r}" if name else "a collected value"
