"""Fast paths of data movement: shapes, slices, gathers, constants. Elements of every torch type are moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.onnx_fast import fast
from qgraph.onnx_proto import densify
from qgraph.onnx_values import from_ir, on_default_device


def _ints(given: Tensor | None, attribute: Sequence[int] | None) -> list[int] | None:
    """A list that newer opsets take as an input and older ones as an attribute."""
    if given is not None:
        return [int(i) for i in given.reshape(-1).tolist()]
    return None if attribute is None else list(attribute)


@fast("Identity", values=True)
def identity(op: Any, x: Any) -> Any:
    return x


@fast("Constant", values=True)
def constant(
    op: Any,
    *,
    value: Any = None,
    sparse_value: onnx.AttributeProto | None = None,
    value_float: float | None = None,
    value_int: int | None = None,
    value_floats: Sequence[float] | None = None,
    value_ints: Sequence[int] | None = None,
) -> Any:
    """A tensor is converted once and kept on the operator, which exists for this constant alone."""
    value = densify(sparse_value.sparse_tensor) if sparse_value is not None else value
    if value is not None:
        found = op.__dict__["_constant"] if "_constant" in op.__dict__ else op.__dict__.setdefault("_constant", from_ir(value))
        return on_default_device(found)
    if value_float is not None or value_floats is not None:
        return torch.tensor(value_float if value_floats is None else value_floats, dtype=torch.float32)
    if value_int is not None or value_ints is not None:
        return torch.tensor(value_int if value_ints is None else value_ints, dtype=torch.int64)
    return NotImplemented


@fast("ConstantOfShape")
def constant_of_shape(op: Any, shape: Tensor, *, value: ir.TensorProtocol | None = None) -> Any:
    fill = torch.zeros(1) if value is None else on_default_device(from_ir(value))
    return fill.reshape(()).repeat(shape.tolist()) if isinstance(fill, Tensor) else NotImplemented


@fast("Shape", stored=True)
def shape_of(op: Any, x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


@fast("Size", stored=True)
def size_of(op: Any, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@fast("Reshape", stored=True)
def reshape(op: Any, x: Tensor, target: Tensor | None = None, *, shape: Sequence[int] | None = None, allowzero: int = 0) -> Tensor:
    dims = _ints(target, shape) or []
    if not allowzero:
        dims = [x.shape[i] if d == 0 else d for i, d in enumerate(dims)]
    return x.reshape(dims)


@fast("Flatten", stored=True)
def flatten(op: Any, x: Tensor, *, axis: int = 1) -> Tensor:
    rows = 1
    for d in x.shape[: axis if axis >= 0 else axis + x.dim()]:
        rows *= d
    return x.reshape(rows, x.numel() // rows if rows else -1) if x.numel() else x.reshape(rows, 0)


@fast("Transpose", stored=True)
def transpose(op: Any, x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    return x.permute(list(perm) if perm is not None else list(reversed(range(x.dim()))))


@fast("Concat", stored=True)
def concat(op: Any, *xs: Tensor, axis: int = 1) -> Tensor:
    return torch.cat(xs, axis)


@fast("Unsqueeze", stored=True)
def unsqueeze(op: Any, x: Tensor, given: Tensor | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    found = _ints(given, axes) or []
    rank = x.dim() + len(found)
    for axis in sorted(a % rank for a in found):
        x = x.unsqueeze(axis)
    return x


@fast("Squeeze", stored=True)
def squeeze(op: Any, x: Tensor, given: Tensor | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    found = _ints(given, axes)
    return x.squeeze() if found is None else x.squeeze(found)


@fast("Expand", stored=True)
def expand(op: Any, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


@fast("Tile")
def tile(op: Any, x: Tensor, repeats: Tensor) -> Any:
    return x.repeat(repeats.tolist()) if op.version >= 6 else NotImplemented


@fast("Slice", stored=True)
def slice_(
    op: Any,
    x: Tensor,
    start_input: Tensor | None = None,
    end_input: Tensor | None = None,
    axes_input: Tensor | None = None,
    step_input: Tensor | None = None,
    *,
    starts: Sequence[int] | None = None,
    ends: Sequence[int] | None = None,
    axes: Sequence[int] | None = None,
) -> Tensor:
    begin, end = _ints(start_input, starts) or [], _ints(end_input, ends) or []
    along, steps = _ints(axes_input, axes) or list(range(len(begin))), _ints(step_input, None) or [1] * len(begin)
    for b, e, axis, step in zip(begin, end, along, steps, strict=True):
        # Python's own rules for clamping are ONNX's; a negative step is a reversed range of indices.
        places = range(*slice(b, e if e >= -x.shape[axis] or step > 0 else None, step).indices(x.shape[axis]))
        if step < 0:
            x = x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))
        else:
            x = x.narrow(axis, min(places.start, x.shape[axis]), max(0, places.stop - places.start))
            x = x if step == 1 else x[(slice(None),) * (axis % x.dim()) + (slice(None, None, step),)]
    return x


@fast("Gather")
def gather(op: Any, x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis %= x.dim()
    flat = indices.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    found = x.index_select(axis, flat)
    return found.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


@fast("GatherElements")
def gather_elements(op: Any, x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


@fast("GatherND")
def gather_nd(op: Any, x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Any:
    if batch_dims:
        return NotImplemented
    return x[tuple(indices.to(torch.int64).unbind(-1))]


@fast("ScatterND")
def scatter_nd(op: Any, x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Any:
    if reduction != "none":
        return NotImplemented
    found = x.clone()
    found[tuple(indices.to(torch.int64).unbind(-1))] = updates
    return found


@fast("ScatterElements", "Scatter")
def scatter_elements(op: Any, x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Any:
    if reduction != "none":
        return NotImplemented
    indices = indices.to(torch.int64)
    return x.scatter(axis, torch.where(indices < 0, indices + x.shape[axis], indices), updates)


@fast("Split", stored=True)
def split(
    op: Any, x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, split: Sequence[int] | None = None, num_outputs: int | None = None
) -> Any:
    parts = _ints(sizes, split)
    if parts is None:
        # Equal parts; the last one is smaller when the axis does not divide.
        each = -(-x.shape[axis] // op.outputs)
        parts = [max(0, min(each, x.shape[axis] - i * each)) for i in range(op.outputs)]
    found = torch.split(x, parts, axis)
    return found if op.outputs > 1 else found[0]


@fast("Pad")
def pad(
    op: Any,
    x: Tensor,
    given: Tensor | None = None,
    fill: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    pads: Sequence[int] | None = None,
    mode: str = "constant",
    value: float = 0.0,
) -> Any:
    amounts = _ints(given, pads)
    if mode != "constant" or amounts is None:
        return NotImplemented
    places = [a % x.dim() for a in _ints(axes, None) or range(x.dim())]
    flat = [0] * (2 * x.dim())
    for n, axis in enumerate(places):
        # F.pad counts axes from the last one.
        flat[2 * (x.dim() - 1 - axis)] = amounts[n]
        flat[2 * (x.dim() - 1 - axis) + 1] = amounts[n + len(places)]
    return F.pad(x, flat, value=value if fill is None else fill.item())


@fast("Range")
def range_(op: Any, start: Tensor, limit: Tensor, delta: Tensor) -> Any:
    if start.is_floating_point():
        return NotImplemented
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@fast("Trilu")
def trilu(op: Any, x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Any:
    offset = 0 if k is None else int(k)
    return torch.triu(x, offset) if upper else torch.tril(x, offset)


@fast("DepthToSpace")
def depth_to_space(op: Any, x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


@fast("SpaceToDepth")
def space_to_depth(op: Any, x: Tensor, *, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)
