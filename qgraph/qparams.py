"""From a range to quantization parameters: minmax(x) -> (low, high) -> choose_qparams -> (scale, zero_point); and the derived bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qgraph.errors import CalibrationError
from qgraph.types import QSpec, int_range, storage

BIAS_LIMIT = 2**30
"""Largest |bias / scale| of an int32 bias: the other half of int32 stays free for the accumulated products."""


def scale_shape(shape: Sequence[int], axis: int | None, group: int) -> tuple[int, ...]:
    """Shape of the scale for a tensor of `shape`: () per tensor, (n,) per axis, (..., 1) per token, ceil(n / group) along `axis`
    per group. Sizes may be symbolic. Raises ValueError for an axis that the tensor does not have, or a meaningless group."""
    if axis is None:
        if group:
            raise ValueError(f"group={group} needs an axis")
        return ()
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} is not an axis of a tensor of rank {len(shape)}")
    n, axis = shape[axis], axis % len(shape)
    if group == 0:
        return (n,)
    if group < -1 or (group == -1 and axis != len(shape) - 1):
        raise ValueError(f"group={group} at axis {axis}: group is a positive size, 0 (per axis), or -1 (per token, last axis only)")
    return (*shape[:axis], 1 if group == -1 else (n + group - 1) // group, *shape[axis + 1 :])


def reduce_rows(x: Tensor, axis: int | None, group: int, reduce: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What `reduce` makes, (low, high) [n] each, of the rows [n, m] of `x` that share a scale: in the scale's shape (see `scale_shape`).

    It is called twice when the last group is short. A range without elements is (0, 0)."""
    shape = scale_shape(x.shape, axis, group)
    if x.numel() == 0:
        return torch.zeros(shape, device=x.device), torch.zeros(shape, device=x.device)
    if axis is None:
        rows = x.reshape(1, -1)
    elif group == 0:
        rows = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    elif group == -1:
        rows = x.reshape(-1, x.shape[-1])
    else:
        return _reduce_groups(x, axis, group, reduce)
    low, high = reduce(rows)
    return low.reshape(shape), high.reshape(shape)


def _reduce_groups(x: Tensor, axis: int, group: int, reduce: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    x = x.movedim(axis, -1)
    full = x.shape[-1] // group * group
    parts = [p for p in (x[..., :full], x[..., full:]) if p.shape[-1]]
    found = [[side.reshape(*x.shape[:-1], -1) for side in reduce(p.reshape(-1, min(group, p.shape[-1])))] for p in parts]
    low, high = (torch.cat(side, -1).movedim(-1, axis) for side in zip(*found, strict=True))
    return low, high


def minmax(x: Tensor, axis: int | None = None, group: int = 0) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of what shares a scale, as float32 tensors of the scale's shape (see `scale_shape`).

    NaN propagates, so that the caller sees it. A range without elements is (0, 0)."""
    return reduce_rows(x.detach().to(torch.float32), axis, group, _smallest_and_largest)


def _smallest_and_largest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest of each row."""
    low, high = torch.aminmax(rows) if len(rows) == 1 else torch.aminmax(rows, dim=1)  # the former uses all threads
    return low, high


def zero_point_of(low: Tensor, scale: Tensor, dtype: str, *, symmetric: bool) -> Tensor:
    """The integer that stands for 0: the middle of the type when symmetric, else round(clamp(qmin - low / scale)).

    0 / 0 gives the largest integer, as ONNX Runtime's DynamicQuantizeLinear does. Type storage(dtype), shape of scale."""
    qmin, qmax = int_range(dtype)
    if symmetric:
        return torch.full_like(scale, (qmin + qmax + 1) // 2, dtype=torch.float32).to(storage(dtype))
    exact = qmin - low.to(torch.float32) / scale.to(torch.float32)
    return exact.nan_to_num(nan=qmax).clamp(qmin, qmax).round().to(storage(dtype))


def choose_qparams(low: Tensor, high: Tensor, spec: QSpec, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Range -> (scale, zero_point), computed once and stored. low, high: finite float tensors of the scale's shape.

    1. The range is widened to contain 0, which is always represented exactly.
    2. symmetric: scale = max(|low|, |high|) / (2**(bits-1) - 1); zero_point = 0, or 2**(bits-1) when unsigned.
       asymmetric: scale = (high - low) / (qmax - qmin); zero_point = clamp(round(qmin - low / scale)).
    3. A zero range has scale 1. Otherwise scale is at least the smallest normal number of float32, and never inf, even where
       high - low overflows.
    4. scale is rounded to `dtype`, the model's float type, before the zero point is computed from it; in float16 its floor is the
       smallest subnormal (normal ones begin at 6e-5, which ordinary weights reach).

    Returns scale in `dtype`, zero_point in storage(spec.dtype). Raises CalibrationError when the range is not finite or empty
    (low > high).
    """
    low, high = low.to(torch.float32), high.to(torch.float32)
    bad = ~(low.isfinite() & high.isfinite() & (low <= high))
    if bool(bad.any()):
        a, b = (t[bad].flatten()[0].item() for t in (low, high))
        raise CalibrationError(f"no scale fits the range [{a:g}, {b:g}] ({int(bad.sum())} of {bad.numel()} such); it must be finite")
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    qmin, qmax = spec.range
    if spec.symmetric:
        scale = torch.maximum(-low, high) / ((qmax - qmin) // 2)
    else:
        scale = (high - low) / (qmax - qmin)
        scale = torch.where(scale.isinf(), high / (qmax - qmin) - low / (qmax - qmin), scale)
    info = torch.finfo(dtype)
    floor = info.smallest_normal * info.eps if dtype == torch.float16 else torch.finfo(torch.float32).smallest_normal
    scale = torch.where(low == high, 1.0, scale.clamp(floor, min(info.max, torch.finfo(torch.float32).max))).to(dtype)
    return scale, zero_point_of(low, scale, spec.dtype, symmetric=spec.symmetric)


def quantize_bias(bias: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor | str:
    """bias -> round_half_even(bias / (x_scale * w_scale)) as int32, or the reason (a sentence) to keep the bias in float.

    bias [N]; x_scale of one element; w_scale of one element or [N]. The scale is the product in float32. It declines when
    |bias / scale| exceeds 2**30 (half of int32 is left to the products), when the product underflows, or when something is not finite.
    """
    scale = x_scale.to(torch.float32).reshape(()) * w_scale.to(torch.float32).reshape(() if w_scale.numel() == 1 else (-1,))
    if not bool((scale >= torch.finfo(torch.float32).smallest_normal).all()) or not bool(scale.isfinite().all()):
        return "the bias' scale x_scale * w_scale underflows or is not finite"
    exact = (bias.detach().to(torch.float32) / scale).round()
    if not bool((exact.abs() <= BIAS_LIMIT).all()):
        worst = int(exact.abs().nan_to_num(nan=torch.inf).argmax()) if exact.dim() else 0
        return f"bias[{worst}] is {exact.flatten()[worst].item():.3g} steps of x_scale * w_scale, too many for int32 with head-room (2**30)"
    return exact.to(torch.int32)
