"""Fast paths of reductions and selections along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qgraph.onnx_fast import fast

_REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": lambda x, a, k: x.sum(a, keepdim=k, dtype=x.dtype),
    "ReduceMean": lambda x, a, k: x.mean(a, keepdim=k),
    "ReduceMax": lambda x, a, k: x.amax(a, keepdim=k),
    "ReduceMin": lambda x, a, k: x.amin(a, keepdim=k),
    "ReduceL1": lambda x, a, k: x.abs().sum(a, keepdim=k, dtype=x.dtype),
    "ReduceL2": lambda x, a, k: x.square().sum(a, keepdim=k).sqrt(),
    "ReduceSumSquare": lambda x, a, k: x.square().sum(a, keepdim=k, dtype=x.dtype),
    "ReduceLogSum": lambda x, a, k: x.sum(a, keepdim=k).log(),
    "ReduceLogSumExp": lambda x, a, k: x.logsumexp(a, keepdim=k),
}
_FLOAT_ONLY = {"ReduceMean", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"}


@fast(*_REDUCE)
def reduce(
    op: Any, x: Tensor, axes_input: Tensor | None = None, *, axes: list[int] | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Any:
    """Without axes: over all of them, or the identity. Integer means and empty inputs have rules of their own."""
    if x.numel() == 0 or (op.op_type in _FLOAT_ONLY and not x.is_floating_point()):
        return NotImplemented
    found = axes_input.tolist() if axes_input is not None else list(axes or ())
    if not found and noop_with_empty_axes:
        return NotImplemented
    if x.dim() == 0:
        return _REDUCE[op.op_type](x.reshape(1), [0], False)
    return _REDUCE[op.op_type](x, found or list(range(x.dim())), bool(keepdims))


@fast("ArgMax", "ArgMin")
def arg_extreme(op: Any, x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Any:
    if x.dim() == 0:
        return NotImplemented
    fn = torch.argmax if op.op_type == "ArgMax" else torch.argmin
    if not select_last_index:
        return fn(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - fn(x.flip(axis), axis, keepdim=bool(keepdims))


@fast("TopK")
def top_k(op: Any, x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    # torch.topk promises no order among equal elements; ONNX takes the lower index first.
    values, indices = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    count = int(k)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@fast("NonZero")
def non_zero(op: Any, x: Tensor) -> Any:
    return NotImplemented if x.dim() == 0 else torch.nonzero(x).T.contiguous()
