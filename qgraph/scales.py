"""Scale and zero point of each group of a weight, so that sum(importance * (w - dequantize(quantize(w)))**2) is least.

A range (qgraph.ranges) says where a grid ends; with four bits and fewer that leaves much on the table. Here the grid itself is searched:
candidates of the step are shares of the widest one, and for the integers that a candidate gives, the best step of all follows in closed
form, s = sum(i w q) / sum(i q^2), with sum(i w q)^2 / sum(i q^2) the power that it explains. Symmetric steps may be negative: the range of
signed integers has one more number below 0 than above, and it goes to the larger tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from qgraph.errors import RecipeError, nearest
from qgraph.observe import range_of, require_finite
from qgraph.qparams import choose_qparams, scale_shape
from qgraph.types import QSpec, int_range, storage

CANDIDATES = 12
CHUNK = 2**17
"""Elements looked at together: what stays in a core's cache."""


WAYS = ("search", "hqq")
"""How `scales_of` can choose; other names are those of ranges."""


def grid_of(
    weight: Tensor, spec: QSpec, way: str = "minmax", importance: Tensor | None = None, *, name: str = "", **options: Any
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero point or None where it is 0) of a weight, chosen in one of WAYS or by a range with these options.

    Raises CalibrationError for NaN and infinities, RecipeError for an unknown way or option."""
    if way in WAYS:
        require_finite(weight, name)
        return scales_of(weight, spec, way, importance)
    low, high = range_of(weight, spec, way, name=name, **options)
    scale, zero_point = choose_qparams(low, high, spec, dtype=weight.dtype)
    return scale, None if spec.symmetric and spec.signed else zero_point


def scales_of(weight: Tensor, spec: QSpec, way: str, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(scale, zero point or None where it is 0) of a weight, in the shapes that `spec` gives them; `way` is one of WAYS.

    `importance` has the weight's shape. Raises RecipeError for another way."""
    if way not in WAYS:
        raise RecipeError(f"scales of weights are chosen by {' or '.join(WAYS)}, or by a range, not by {way!r}{nearest(way, WAYS)}")
    axis = spec.axis

    def rows(values: Tensor) -> Tensor:
        if axis is None:
            return values.reshape(1, -1)
        return values.movedim(axis, -1).reshape(-1, values.shape[axis]) if spec.group else values.movedim(axis, 0).flatten(1)

    def shaped(values: Tensor) -> Tensor:
        if axis is None or not spec.group:
            return values.reshape(scale_shape(weight.shape, axis, spec.group))
        return values.reshape(*weight.movedim(axis, -1).shape[:-1], -1).movedim(-1, axis)

    given = rows(weight.detach())
    scale, zero = search(given, spec, None if importance is None else rows(importance)) if way == "search" else hqq(given, spec)

    return shaped(scale).to(weight.dtype).contiguous(), None if zero is None else shaped(zero).contiguous()


def search(rows: Tensor, spec: QSpec, importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales [n, ceil(k / group)], float32, and zero points of that shape (None where they are 0) for rows [n, k] of a weight.

    `spec` gives type, symmetry and group (0: one scale per row). `importance`, [k] or [n, k], weights the squared error of each column, such
    as the mean square of the input that it meets; None counts all alike. A group of zeros has scale 1. Exhaustive over the candidates: the error
    is at most that of the grid which ends where the values do."""
    return _by_groups(rows, spec, importance, _best)


def hqq(rows: Tensor, spec: QSpec, *, steps: int = 20) -> tuple[Tensor, Tensor | None]:
    """The same without data, by half-quadratic splitting (HQQ; Badri and Shaji, 2023): the error is measured by sum(|e|^0.7), for which few
    large errors count less than many small ones.

    In turn the outliers e of w - dequantize(q) are taken out by a generalised soft threshold, and zero point and scale become the best ones for
    w - e; with beta 10, growing by 1 % a step. As published the zero point alone moves, in fractions; kernels take whole ones, which seldom
    do, so here the scale moves, too."""
    return _by_groups(rows, spec, None, lambda w, _, spec: _half_quadratic(w, spec, steps))


Fit = Callable[[Tensor, Tensor | None, QSpec], tuple[Tensor, Tensor]]
"""(groups [..., m], importance, spec) -> (scale, zero) [...]."""


def _by_groups(rows: Tensor, spec: QSpec, importance: Tensor | None, fit: Fit) -> tuple[Tensor, Tensor | None]:
    k = rows.shape[1]
    group = min(spec.group, k) if spec.group > 0 else k
    full = k // group * group
    parts = [_groups(rows[:, a:b], size, spec, importance, a, fit) for a, b, size in ((0, full, group), (full, k, k - full)) if b > a]
    scale, zero = (torch.cat(found, 1) for found in zip(*parts, strict=True))
    plain = spec.symmetric and spec.signed
    return scale, None if plain else zero.to(storage(spec.dtype))


def _groups(rows: Tensor, size: int, spec: QSpec, importance: Tensor | None, start: int, fit: Fit) -> tuple[Tensor, Tensor]:
    """(scale, zero), float32 [n, k / size], of rows [n, k]."""
    n, k = rows.shape
    weights = None if importance is None else importance[..., start : start + k].float().expand(n, k)
    scale, zero = torch.empty(n, k // size), torch.empty(n, k // size)
    step = max(1, CHUNK // k)
    for a in range(0, n, step):
        part = rows[a : a + step].float().contiguous().reshape(-1, k // size, size)  # sums depend on the layout
        weight = None if weights is None else weights[a : a + step].reshape(part.shape)
        scale[a : a + step], zero[a : a + step] = fit(part, weight, spec)
    return scale, zero


def _best(w: Tensor, importance: Tensor | None, spec: QSpec) -> tuple[Tensor, Tensor]:
    """(scale, zero) [...] of groups w [..., m]; importance has its shape."""
    low, high = spec.range
    weighted = w if importance is None else w * importance
    scale, zero, best = (torch.full(w.shape[:-1], v) for v in (1.0, 0.0, 0.0))
    q, t = torch.empty_like(w), torch.empty_like(w)
    for step, middle in _candidates(w, spec):
        torch.mul(w, step.reciprocal().unsqueeze(-1), out=q).round_()
        if middle is None:
            q.clamp_(low, high)
        else:
            centre = middle.unsqueeze(-1)
            q.add_(centre).clamp_(low, high).sub_(centre)
        projection = torch.mul(q, weighted, out=t).sum(-1)
        power = (q.square_() if importance is None else q.square_().mul_(importance)).sum(-1)
        explained = projection.square() / power.clamp(min=torch.finfo(torch.float32).tiny)
        better = explained > best
        torch.where(better, explained, best, out=best)
        torch.where(better, projection / power, scale, out=scale)
        if middle is not None:
            torch.where(better, middle, zero, out=zero)
    return scale, zero


def _candidates(w: Tensor, spec: QSpec) -> Iterable[tuple[Tensor, Tensor | None]]:
    """(step, zero point or None for 0) to try for groups w [..., m], the widest step first."""
    levels = 2**spec.bits
    half, narrowest = levels // 2, max(0.4, 1 - 1.6 / spec.bits)
    longest = half / (half - 1) if spec.symmetric else 1.0  # where the plain range of a symmetric type ends
    shares = torch.linspace(longest, narrowest, CANDIDATES).tolist() if spec.bits < 8 else [longest]
    low, high = (edge.to(torch.float32) for edge in torch.aminmax(w, dim=-1))
    if spec.symmetric:
        widest = torch.maximum(-low, high).clamp(min=1e-30) / half
        fixed = None if spec.signed else torch.full_like(widest, float(half))
        for share in shares:
            yield widest * share, fixed
            yield widest * -share, fixed
        return
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    first, last = int_range(spec.dtype)
    for share in shares:
        step = ((high - low) * (share / (levels - 1))).clamp(min=1e-30)
        exact = (first - low * share / step).round()
        for shift in (0, -1, 1):
            yield step, (exact + shift).clamp(first, last)


def _half_quadratic(w: Tensor, spec: QSpec, steps: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) [...] of groups w [..., m]."""
    low, high = spec.range
    scale, zero = next(iter(_candidates(w, spec)))
    scale, zero = scale.unsqueeze(-1), torch.zeros_like(scale).unsqueeze(-1) if zero is None else zero.unsqueeze(-1)
    best, best_scale, best_zero = torch.full_like(scale, torch.inf), scale, zero
    beta, power = 10.0, 0.7
    for _ in range(steps):
        middle = zero.round().clamp(low, high)
        q = (w / scale + middle).round_().clamp_(low, high) - middle
        errors = w - q * scale
        total = errors.abs().pow(power).sum(-1, keepdim=True)
        better = total < best
        best, best_scale, best_zero = (
            torch.where(better, total, best),
            torch.where(better, scale, best_scale),
            torch.where(better, middle, best_zero),
        )
        unit = errors / scale.abs()
        outliers = unit.sign() * (unit.abs() - unit.abs().clamp(min=1e-6).pow(power - 1) / beta).clamp(min=0) * scale.abs()
        if not spec.symmetric:
            zero = (q + middle - (w - outliers) / scale).mean(-1, keepdim=True)
        scale = (q * (w - outliers)).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True).clamp(min=1e-30)
        scale = torch.where(scale == 0, best_scale, scale)
        beta *= 1.01
    return best_scale.squeeze(-1), best_zero.squeeze(-1)
