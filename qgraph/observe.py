"""Observers: y = x, watching x: its range -> scale and zero point.

An observer joins a statistic with a range choice (see ranges.py). `OBSERVERS` names the usual pairs; `register_observer` adds more.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from qgraph.choices import MSE, Entropy, Percentile, one_thread
from qgraph.errors import CalibrationError, RecipeError, nearest
from qgraph.histogram import Histogram, Values
from qgraph.parts import PART, pieces
from qgraph.qparams import choose_qparams, reduce_rows
from qgraph.ranges import Choice, MinMax, MovingAverage, Range, Statistic, bounds, infinite_from
from qgraph.types import PerAxis, PerTensor, QSpec
from qgraph.watch import Watch


class Observer(Watch):
    """y = x, watching x.

    `spec` says how the value will be represented, `statistic` what is collected, `choose` how a range is read off it,
    `name` which value this is, for errors. `seen` counts finite elements, `infinite` those ignored for being +-inf or
    standing for it (see `ranges.infinite_from`); `dtype` is the float type of the last tensor, which scales get too.
    State lives on the CPU; `state_dict` holds it as extra state.
    """

    def __init__(self, spec: QSpec, statistic: Statistic, choose: Choice = bounds, *, name: str = "") -> None:
        super().__init__()
        if spec.dynamic:
            raise RecipeError(
                f"only static ranges are observed, not {spec}: its scales are computed at run time, from the values themselves"
            )
        if not isinstance(spec.granularity, PerTensor | PerAxis):
            raise RecipeError(f"only per-tensor and per-axis ranges are observed, not {spec}: groups have static ranges in weights only")
        self.spec, self.statistic, self.choose, self.name = spec, statistic, choose, name
        self._empty = statistic
        self.frozen, self.seen, self.infinite, self.dtype = False, 0, 0, torch.float32

    def update(self, x: Tensor) -> None:
        """Adds a tensor. Integers and empty tensors say nothing about ranges; float16, bfloat16, float64 are read as float32.

        Raises CalibrationError for NaN, and for a tensor that does not fit the axis."""
        if self.frozen or not x.is_floating_point() or not x.numel():
            return
        x = x.detach()
        self.dtype = x.dtype
        low, high = self._bounds(x, x)
        limit, finite = infinite_from(x.dtype), None
        if not bool(((low > -limit) & (high < limit)).all()):
            x = self._check_nan(x.float())
            finite = x.abs() < limit
            low, high = self._bounds(x.where(finite, math.inf), x.where(finite, -math.inf))
            low, high = low.where(low <= high, 0), high.where(low <= high, 0)  # a channel without any finite value
        count = x.numel() if finite is None else int(finite.sum())
        self.infinite += x.numel() - count
        if count:
            self._add(self._rows(x, finite) if self.statistic.values else None, low, high, count)

    def update_bounds(self, low: float, high: float, count: int, *, dtype: torch.dtype = torch.float32) -> None:
        """Adds a tensor of `count` finite elements, none of which stands for infinity, by its bounds; for observers without
        `wants_values`."""
        if not self.frozen and count:
            self.dtype = dtype
            self._add(None, torch.tensor(low), torch.tensor(high), count)

    def _add(self, rows: Sequence[Tensor] | None, low: Tensor, high: Tensor, count: int) -> None:
        # One assignment of an immutable value: an interruption leaves the old statistic or the new one.
        self.statistic = self.statistic.merge(self.statistic.of(rows, low.float().cpu(), high.float().cpu()))
        self.seen += count

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Takes this range, in the shape that `range` returns, in place of data; nothing is observed from then on."""
        self.statistic, self.choose, self.seen = MinMax(low.float(), high.float()), bounds, 1
        self.freeze()

    def _bounds(self, x: Tensor, x_high: Tensor) -> Range:
        axis = self.spec.axis
        if axis is None:
            if x is x_high:
                low, high = torch.aminmax(x)
                return low, high
            return x.amin(), x_high.amax()
        if not -x.dim() <= axis < x.dim():
            raise CalibrationError(f"{self._who()} has shape {list(x.shape)}, without axis {axis} of its spec ({self.spec})")
        n, known = x.shape[axis], self.statistic.low
        if known is not None and known.shape != (n,):
            raise CalibrationError(f"{self._who()} has {n} entries along axis {axis}, but {known.numel()} in earlier data")
        rest = [d for d in range(x.dim()) if d != axis % x.dim()]
        return (x.amin(rest), x_high.amax(rest)) if rest else (x.clone(), x_high.clone())

    def _rows(self, x: Tensor, finite: Tensor | None) -> list[Tensor]:
        """The finite values, flat: all of them, or those at each index of the axis."""
        axis = self.spec.axis
        if axis is None:
            return [x.reshape(-1) if finite is None else x[finite]]
        if finite is None:
            return [row.reshape(-1) for row in x.unbind(axis)]
        return [row[some] for row, some in zip(x.unbind(axis), finite.unbind(axis), strict=True)]

    def _check_nan(self, x: Tensor) -> Tensor:
        if nans := int(x.isnan().sum()):
            raise CalibrationError(
                f"{self._who()} contains NaN ({nans} of {x.numel()} elements) during calibration; check the calibration data, or leave this value in float"
            )
        return x

    def _who(self) -> str:
        return f"the value {self.name!r}" if self.name else "an observed value"

    @property
    def wants_values(self) -> bool:
        """Whether tensors themselves are needed, or per-tensor bounds are enough (see `update_bounds`)."""
        return self.statistic.values or self.spec.axis is not None

    def reset(self) -> None:
        """Forgets what was seen."""
        self.statistic, self.seen, self.infinite = self._empty, 0, 0

    def merge(self, later: Observer) -> None:
        """Adds what another observer of the same kind saw after this one. Raises CalibrationError when the kinds differ."""
        if type(self.statistic) is not type(later.statistic) or self.spec != later.spec:
            raise CalibrationError(
                f"{self._who()}: cannot merge {type(later.statistic).__name__} of {later.spec} into {type(self.statistic).__name__} of {self.spec}"
            )
        self.statistic = self.statistic.merge(later.statistic)
        self.seen, self.infinite = self.seen + later.seen, self.infinite + later.infinite

    def range(self) -> Range:
        """(low, high), float32, shape () per tensor or (n,) per axis. Raises CalibrationError when nothing finite was seen."""
        if self.statistic.low is None:
            why = f"only {self.infinite} infinite values were seen" if self.infinite else "it was never observed"
            raise CalibrationError(f"{self._who()} has no range: {why}; calibrate with data that reaches it, or leave it in float")
        with one_thread():
            return self.choose(self.statistic, self.spec)

    def qparams(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(scale in `dtype`, zero_point) of the range under `spec`; see `ops.choose_qparams`."""
        return choose_qparams(*self.range(), self.spec, dtype=dtype)

    def get_extra_state(self) -> dict[str, Any]:
        state = {f.name: getattr(self.statistic, f.name) for f in fields(self.statistic)}  # type: ignore[arg-type]
        return {"statistic": state, "seen": self.seen, "infinite": self.infinite, "frozen": self.frozen, "dtype": self.dtype}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.statistic = replace(self.statistic, **state["statistic"])  # type: ignore[type-var]
        self.seen, self.infinite, self.frozen, self.dtype = (state[k] for k in ("seen", "infinite", "frozen", "dtype"))

    def extra_repr(self) -> str:
        return f"{self.name or '?'}: {self.spec}, {type(self.statistic).__name__}, seen={self.seen}{', frozen' if self.frozen else ''}"


@contextmanager
def paused(gm: torch.nn.Module) -> Iterator[None]:
    """Inside, the observers of `gm` are identities only: for running a prepared graph on anything but calibration data."""
    running = [m for m in gm.modules() if isinstance(m, Watch) and not m.frozen]
    for m in running:
        m.freeze()
    try:
        yield
    finally:
        for m in running:
            m.freeze(False)


Factory = Callable[..., Observer]

OBSERVERS: dict[str, Factory] = {}
"""name -> function(spec, *, name, options...) -> Observer; filled by `register_observer`."""


def register_observer(kind: str) -> Callable[[Factory], Factory]:
    """Decorator: makes this function, called as fn(spec, name=..., **options), known to recipes as `kind`."""

    def register(fn: Factory) -> Factory:
        OBSERVERS[kind] = fn
        return fn

    return register


@register_observer("minmax")
def _minmax(spec: QSpec, *, name: str = "") -> Observer:
    return Observer(spec, MinMax(), name=name)


@register_observer("moving-average")
def _moving_average(spec: QSpec, *, name: str = "", momentum: float = 0.01) -> Observer:
    return Observer(spec, MovingAverage(momentum), name=name)


@register_observer("percentile")
def _percentile(spec: QSpec, *, name: str = "", percentile: float = 99.99, bins: int = 2048) -> Observer:
    return Observer(spec, Histogram(bins), Percentile(percentile), name=name)


@register_observer("entropy")
def _entropy(spec: QSpec, *, name: str = "", candidates: int = 128, bins: int = 2048) -> Observer:
    return Observer(spec, Histogram(bins), Entropy(candidates), name=name)


@register_observer("mse")
def _mse(spec: QSpec, *, name: str = "", bins: int = 2048) -> Observer:
    return Observer(spec, Histogram(bins), MSE(), name=name)


def observer(kind: str, spec: QSpec, *, name: str = "", **options: Any) -> Observer:
    """A new observer by name. Raises RecipeError for an unknown kind or option."""
    if kind not in OBSERVERS:
        raise RecipeError(f"unknown observer {kind!r}{nearest(kind, OBSERVERS)}")
    factory = OBSERVERS[kind]
    known = inspect.signature(factory).parameters.keys() - {"spec", "name"}
    for option in options.keys() - known:
        raise RecipeError(f"observer {kind!r} has no option {option!r}{nearest(option, known)}")
    return factory(spec, name=name, **options)


def require_finite(weight: Tensor, name: str) -> None:
    """Raises CalibrationError for NaN and infinities."""
    if not all(bool(part.isfinite().all()) for part in weight.detach().reshape(-1).split(PART)):
        raise CalibrationError(f"the weight {name!r} contains NaN or infinity; leave it in float with a rule")


def range_of(x: Tensor, spec: QSpec, kind: str = "minmax", *, name: str = "", **options: Any) -> Range:
    """(low, high) of a weight, float32 in the shape that `spec`'s scale has, chosen as the observer of that kind chooses, from the
    values themselves. Raises CalibrationError for NaN and infinities, RecipeError for an unknown kind or option."""
    require_finite(x, name)
    choose = observer(kind, replace(spec, granularity=PerTensor()), name=name, **options).choose
    with one_thread():
        parts = [
            reduce_rows(part.float(), spec.axis, spec.group, lambda rows: choose(Values(rows), spec))
            for part in pieces(x.detach(), spec.axis, spec.group)
        ]
    low, high = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return low, high
