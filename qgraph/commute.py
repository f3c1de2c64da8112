"""How each kind of operation commutes with positive factors per channel: one rule per interface, for `diagonal.diagonals`.

A rule returns the field of the node's value (see fields.py). Before it has told the flow anything it may return a reason, or None where
there is nothing to explain: then the node is a barrier.

    takes factors in     linear, convolution, batch norm, norms (output side), products with a constant per channel
    takes them out       linear, convolution, products with a constant per channel (input side)
    passes them on       relu and other functions with f(d x) = d f(x), sums, minima, means, pools, zero padding, casts, concatenation, whatever
                         moves elements, the values of an attention, one operand of a product of activations
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from qgraph.errors import QGraphError
from qgraph.fields import Field, compressed, reshaped, with_rank
from qgraph.slots import with_operands
from qgraph.text import path_of
from qgraph.types import Dim, type_of
from qgraph.views import (
    Activation,
    Attention,
    BatchNorm,
    Cast,
    Concat,
    Conv,
    DataMovement,
    Elementwise,
    Linear,
    Norm,
    Pad,
    Pool,
    Reduce,
    const_value,
    is_const,
)

if TYPE_CHECKING:
    from qgraph.diagonal import Flow

HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu", "abs", "neg"})
"""Activations with f(d x) = d f(x) for d > 0."""

UNKNOWN_SIZE = 8
"""Stands for a size that is not known while a movement of elements is tried out on a field."""


def linear(flow: Flow, node: Node, v: Linear) -> Field | None:
    rank, weight = _rank(node), const_value(v.weight)
    if rank is None or _rank(v.x) is None:
        return None
    if weight is None:
        return _product(flow, node, v, rank)
    outputs = int(weight.shape[v.out_axis])
    if weight.ndim != 2 or not weight.is_floating_point() or not _per_channel(v.bias, outputs):
        return None
    flow.read(node, flow.unknowns.along(flow.of(v.x), v.x_axis, int(weight.shape[v.in_axis])))
    return with_rank(flow.write(node, outputs), rank)


def _product(flow: Flow, node: Node, v: Linear, rank: int) -> Field | None:
    """x . w of two activations: the axis that is summed over has factor 1, and so has one of the operands."""
    if v.bias is not None or _rank(v.weight) is None:
        return None
    x, w = flow.of(v.x), flow.of(v.weight)
    if x.shape[v.x_axis] > 1 or w.shape[v.in_axis] > 1:
        return None
    if flow.unknowns.is_fixed(w):
        return with_rank(x.movedim(v.x_axis, -1), rank)
    flow.unknowns.fix(x, f"product {path_of(node)} takes factors from its other operand")
    return with_rank(w.movedim((v.in_axis, v.out_axis), (-2, -1)), rank)


def conv(flow: Flow, node: Node, v: Conv) -> Field | None:
    weight = const_value(v.weight)
    if weight is None or not weight.is_floating_point() or _rank(v.x) != weight.ndim:
        return None
    inputs, outputs = (int(weight.shape[axis]) for axis in (v.in_axis, v.out_axis))
    inputs, outputs = (inputs, outputs * v.groups) if v.transposed else (inputs * v.groups, outputs)
    if not _per_channel(v.bias, outputs):
        return None
    flow.read(node, flow.unknowns.along(flow.of(v.x), 1, inputs))
    return _channels(flow.write(node, outputs), weight.ndim)


def norm(flow: Flow, node: Node, v: Norm) -> Field | None:
    kind = type_of(v.x)
    if kind is None or kind.shape is None or with_operands(node, weight=v.weight) is None:
        return None
    axes = v.axes if v.kind in ("layer", "rms") else (1,)
    sizes = [n for a in axes if isinstance(n := kind.shape[a], int)]
    if len(sizes) != len(axes) or not all(c is None or _is_shaped(c, sizes) for c in (v.weight, v.bias)):
        return None
    flow.fix(v.x, f"{v.kind} norm {path_of(node)} reads it")
    found = flow.write(node, math.prod(sizes))
    return _channels(found, len(kind.shape)) if axes == (1,) else with_rank(found.reshape(sizes), len(kind.shape))


def batch_norm(flow: Flow, node: Node, v: BatchNorm) -> Field | None:
    weight, rank = const_value(v.weight), _rank(v.x)
    if weight is None or rank is None or const_value(v.bias) is None:
        return None
    flow.fix(v.x, f"batch norm {path_of(node)} reads it")
    return _channels(flow.write(node, len(weight)), rank)


def elementwise(flow: Flow, node: Node, v: Elementwise) -> Field | None:
    values = v.inputs[1:] if v.kind == "where" else v.inputs
    active = [x for x in values if isinstance(x, Node) and not is_const(x)]
    rank = _rank(node)
    if rank is None or not active or any(_rank(x) is None for x in active):
        return None
    if v.kind in ("mul", "div"):
        return _scaled(flow, node, v, active, rank)
    constants = [x for x in values if isinstance(x, Node) and is_const(x)]
    plain = all(isinstance(x, Node) or x == 0 or math.isinf(x) for x in values)
    if v.kind not in ("add", "sub", "min", "max", "where") or not plain or not all(map(_is_float, constants)):
        return None
    field = reduce(flow.unknowns.equal, [with_rank(flow.of(x), rank) for x in active])
    for constant in constants:
        if bool((value := const_value(constant)) is not None and value.any()):
            flow.shift(node, constant, field)
    return field


def _scaled(flow: Flow, node: Node, v: Elementwise, active: Sequence[Node], rank: int) -> Field | None:
    """One operand carries the factors, a constant per channel takes them in and out."""
    if len(set(active)) < len(active) or (v.kind == "div" and v.inputs[0] is not active[0]):
        return None
    free = [x for x in active if flow.free(x)]
    carrier = active[0] if v.kind == "div" or not free else max(free, key=lambda x: flow.of(x).numel())
    for other in active:
        if other is not carrier:
            flow.fix(other, f"product {path_of(node)} takes factors from its other operand")
    field = with_rank(flow.of(carrier), rank)
    constant = next((x for x in v.inputs if isinstance(x, Node) and is_const(x)), None)
    axis = _only_axis(constant)
    if len(active) > 1 or constant is None or axis is None or any(n > 1 for a, n in enumerate(field.shape, -rank) if a != axis):
        return field
    size = const_value(constant).shape[axis]  # type: ignore[union-attr]  # it has an axis
    flow.read(node, flow.unknowns.along(field, axis, size))
    return with_rank(flow.write(node, size).reshape((-1,) + (1,) * (-1 - axis)), rank)


def _only_axis(constant: Node | None) -> int | None:
    """The axis (negative) along which a float constant has its elements; None where there are several or none."""
    value = const_value(constant)
    if value is None or not value.is_floating_point():
        return None
    axes = [a - value.ndim for a, n in enumerate(value.shape) if n > 1]
    return axes[0] if len(axes) == 1 else None


def activation(flow: Flow, node: Node, v: Activation) -> Field | str | None:
    for slope in node.all_input_nodes:
        if slope is not v.x and v.kind in HOMOGENEOUS:
            flow.fix(slope, f"{path_of(node)} takes it as a slope")
    if v.kind in HOMOGENEOUS or (v.kind == "clip" and v.low in (None, 0) and v.high in (None, 0)):
        return flow.of(v.x)
    limits = ", ".join("no limit" if limit is None else f"{limit:g}" for limit in (v.low, v.high))
    return f"{path_of(node)} clips to [{limits}], which would cut scaled channels elsewhere" if v.kind == "clip" else None


def pool(flow: Flow, node: Node, v: Pool) -> Field | None:
    rank, field = _rank(node), flow.of(v.x)
    if rank is None or _rank(v.x) is None or any(n > 1 for n in field.shape[2:]):
        return None
    return field if rank == field.ndim else field.reshape(field.shape[:2]) if rank == 2 else None


def reduction(flow: Flow, node: Node, v: Reduce) -> Field | None:
    field = flow.of(v.x)
    linear_in_x = v.kind in ("mean", "sum", "max") and _rank(v.x) is not None
    return field if linear_in_x and all(field.shape[a] == 1 for a in v.axes) else None


def pad(flow: Flow, node: Node, v: Pad) -> Field | None:
    field = flow.of(v.x)
    if v.value != 0 or v.pads is None or any(n > 1 and any(p) for n, p in zip(field.shape, v.pads, strict=True)):
        return None
    return field


def cast(flow: Flow, node: Node, v: Cast) -> Field | None:
    return flow.of(v.x) if _is_float(v.x) else None


def concat(flow: Flow, node: Node, v: Concat) -> Field | None:
    kinds = [type_of(x) for x in v.inputs]
    rank = _rank(node)
    if rank is None or any(k is None or k.shape is None or k.rank != rank for k in kinds):
        return None
    fields = [flow.of(x) for x in v.inputs]
    sizes = [k.shape[v.axis] for k in kinds]  # type: ignore[union-attr, index]  # known shapes
    if not all(isinstance(n, int) for n in sizes):
        tied = reduce(flow.unknowns.equal, fields)
        return tied if tied.shape[v.axis] == 1 else None
    whole = list(torch.broadcast_shapes(*(f.select(v.axis, 0).shape for f in fields)))
    at = v.axis % rank
    shapes = [whole[:at] + [int(n)] + whole[at:] for n in sizes]  # type: ignore[arg-type]
    return compressed(torch.cat([f.expand(s) for f, s in zip(fields, shapes, strict=True)], at))


def attention(flow: Flow, node: Node, v: Attention) -> Field | None:
    field = flow.of(v.v)
    if _rank(node) != field.ndim or field.shape[-2] > 1:
        return None
    for other in (v.q, v.k, v.mask):
        flow.fix(other, f"the scores of attention {path_of(node)} depend on it")
    return field


def movement(flow: Flow, node: Node, v: DataMovement) -> Field | tuple[Field, ...] | None:
    return moved(node, v, flow.fields.get(v.x))


def moved(node: Node, v: DataMovement, source: Field | tuple[Field, ...] | None) -> Field | tuple[Field, ...] | None:
    """The field of the node's value, given that of what it moves; None where it is not known where elements go."""
    if v.kind == "getitem" and isinstance(source, tuple):
        index = node.args[1]
        return source[index] if isinstance(index, int) and -len(source) <= index < len(source) else None
    old, new = type_of(v.x), type_of(node)
    if not isinstance(source, Tensor) or old is None:
        return None
    if source.numel() == 1:
        return source.reshape((1,) * ((new.rank if new else None) or source.ndim))
    if v.kind == "transpose":
        return None if v.perm is None else source.permute(v.perm)
    if old.shape is None or (v.kind != "split" and (new is None or new.shape is None)):
        return None
    if v.kind in ("copy", "expand") and new is not None:
        return with_rank(source, new.rank or 0)
    if v.kind in ("reshape", "flatten", "squeeze", "unsqueeze") and new is not None and new.shape is not None:
        return reshaped(source, old.shape, new.shape)
    return _tried(node, v, source, old.shape)


def _tried(node: Node, v: DataMovement, source: Field, shape: Sequence[Dim]) -> Field | tuple[Field, ...] | None:
    """The field moved by the operation itself, where nothing but the field and constants goes into it."""
    whole = source.expand([n if isinstance(n, int) else UNKNOWN_SIZE for n in shape])
    values = {n: whole if n is v.x else const_value(n) for n in node.all_input_nodes}
    if any(value is None for value in values.values()):
        return None
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    try:
        found = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError, QGraphError):  # what operations raise on a type or size that does not fit
        return None
    parts = found if isinstance(found, tuple | list) else (found,)
    if any(not isinstance(p, Tensor) or p.dtype != torch.int64 or p.numel() == 0 for p in parts):
        return None
    fields = tuple(compressed(p) for p in parts)
    return fields if isinstance(found, tuple | list) else fields[0]


def _rank(value: Any) -> int | None:
    kind = type_of(value) if isinstance(value, Node) else None
    return None if kind is None else kind.rank


def _is_float(value: Node) -> bool:
    kind = type_of(value)
    return kind is not None and kind.is_float


def _channels(found: Tensor, rank: int) -> Field:
    """Factors along axis 1 of a value of this rank."""
    return found.reshape((1, -1) + (1,) * (rank - 2))


def _per_channel(bias: Node | None, channels: int) -> bool:
    """No bias, or a constant with one element or one per channel."""
    value = const_value(bias)
    if bias is None or value is None:
        return bias is None
    return value.numel() == 1 or tuple(value.shape[-1:]) == (channels,) == (value.numel(),)


def _is_shaped(constant: Node, sizes: Sequence[int]) -> bool:
    value = const_value(constant)
    return value is not None and tuple(value.shape) == tuple(sizes)


Rule = Callable[..., "Field | tuple[Field, ...] | str | None"]
RULES: tuple[tuple[type, Rule], ...] = (
    (Linear, linear),
    (Conv, conv),
    (Norm, norm),
    (BatchNorm, batch_norm),
    (Elementwise, elementwise),
    (Activation, activation),
    (Pool, pool),
    (Reduce, reduction),
    (Pad, pad),
    (Cast, cast),
    (Concat, concat),
    (Attention, attention),
    (DataMovement, movement),
)
"""(interface, rule(flow, node, view)); the first interface that a node has counts."""
