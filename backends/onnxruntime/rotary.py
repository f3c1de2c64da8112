"""x * cos + Concat(-x2, x1) * sin -> RotaryEmbedding(x, cos1, sin1), with x = [x1, x2] and cos = [cos1, cos1] along the last axis.

Su et al., arXiv 2104.09864, equation 34, in the order of halves. ONNX Runtime runs the chain as seven operators on transposed heads, and
RotaryEmbedding of opset 23 as one on the heads where the product has them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from qgraph.attention import known_shape
from qgraph.backends.onnxruntime.emit import Emitter
from qgraph.backends.onnxruntime.gqa import SPLIT, before_split
from qgraph.formula import number
from qgraph.onnx_io import opset
from qgraph.onnx_node import arg, attr, const_ints
from qgraph.pattern import Match, Op
from qgraph.rewrite import Rewriter, rule
from qgraph.types import Dim, TensorType, type_of
from qgraph.views import Activation, Cast, Concat, DataMovement, Elementwise, Embedding, const_value, key, view

ROTARY = 23
"""The opset that first has the operator."""


@rule(Op(Elementwise, kind="add"))
def fuse_rotary(m: Match, rw: Rewriter) -> Node | None:
    found = _rotated(m.root) if opset(rw.gm) >= ROTARY else None
    if found is None:
        return None
    x, cos, sin = found
    shape, split = known_shape(x), before_split(x)
    moved = None if split is None else view(DataMovement, split)
    if split is None or moved is None or shape is None or known_shape(moved.x) != (shape[0], shape[2], shape[1] * shape[3]):  # type: ignore[operator]
        rw.decline("RotaryEmbedding is for heads that a Reshape of [batch, length, heads * size] and a Transpose have split")
    o = Emitter(rw)
    angles = [_first_half(o, n, shape) for n in (cos, sin)]
    if angles[0] is None or angles[1] is None:
        rw.decline("it is not known that cos and sin are [batch or 1, 1, length, size] with two equal halves along the last axis")
    y = o("RotaryEmbedding", moved.x, *angles, like=moved.x, since=ROTARY, main=True, num_heads=shape[1])
    attributes: dict[str, Any] = dict(split.kwargs)
    again = rw.call(split.target, y, *split.args[1:], like=split, **attributes)
    return rw.call(x.target, again, like=m.root, perm=list(SPLIT))


def _rotated(node: Node) -> tuple[Node, Node, Node] | None:
    """(x, cos, sin) of a sum of two products, with x float32 [batch, heads, length, size]."""
    op = view(Elementwise, node)
    found = [view(Elementwise, n) for n in op.inputs] if op is not None else []
    products = [p.inputs for p in found if p is not None and p.kind == "mul" and len(p.inputs) == 2]
    if len(found) != 2 or len(products) != 2:
        return None
    for straight, turned in (products, products[::-1]):
        for half, sin in (turned, turned[::-1]):
            x = _turned(half)
            cos = straight[1 - straight.index(x)] if x is not None and x in straight else None
            if x is not None and isinstance(cos, Node) and isinstance(sin, Node):
                return x, cos, sin
    return None


def _turned(node: Any) -> Node | None:
    """x of Concat(-x2, x1)."""
    joined = view(Concat, node)
    if joined is None or len(joined.inputs) != 2 or joined.axis not in (-1, 3):
        return None
    negative = view(Activation, joined.inputs[0])
    second = _half(negative.x) if negative is not None and negative.kind == "neg" else None
    first = _half(joined.inputs[1])
    if first is None or second is None or first[0] is not second[0] or (first[1], second[1]) != (0, 1):
        return None
    t = type_of(first[0])
    sizes = t.shape[1::2] if t is not None and t.dtype == "float32" and t.shape is not None and t.rank == 4 else (None,)
    return first[0] if all(isinstance(n, int) for n in sizes) else None


def _half(node: Node) -> tuple[Node, int] | None:
    """(x, which) of the first (0) or second (1) half of the last axis of x, of four; by Slice or Split."""
    if node.target is operator.getitem:
        source, which = node.args
        return _half_by_split(source, which) if key(getattr(source, "target", None)) == "::Split" else None  # type: ignore[arg-type]
    if key(node.target) != "::Slice":
        return None
    size, starts, ends, axes = _last(arg(node, 0)), *(const_ints(node, i, n) for i, n in enumerate(("starts", "ends", "axes"), 1))
    if size is None or axes not in ((-1,), (3,)) or const_ints(node, 4, "steps") not in (None, (1,)) or starts is None or ends is None:
        return None
    bounds = (starts[0], min(ends[0], size))
    return (arg(node, 0), int(starts[0] > 0)) if bounds in ((0, size // 2), (size // 2, size)) else None


def _half_by_split(node: Node, which: int) -> tuple[Node, int] | None:
    size = _last(arg(node, 0))
    sizes = const_ints(node, 1, "split") or (size and size // 2,) * attr(node, "num_outputs", 2)
    return (arg(node, 0), which) if size and attr(node, "axis", 0) in (-1, 3) and sizes == (size // 2,) * 2 else None


def _last(x: Any) -> int | None:
    """The size of the last axis of four, where it is an even number."""
    t = type_of(x) if isinstance(x, Node) else None
    size = t.shape[-1] if t is not None and t.shape is not None and t.rank == 4 else None
    return size if isinstance(size, int) and size % 2 == 0 else None


def _first_half(o: Emitter, node: Node, shape: tuple[Dim, ...]) -> Node | None:
    """cos or sin [batch or 1, 1, length, size], for x of this shape, as [batch, length, size / 2]. Made for each layer, and merged later."""
    t, single = known_shape(node), view(DataMovement, node)
    if t is None or len(t) != 4 or t[0] not in (1, shape[0]) or t[1:] != (1, *shape[2:]) or not isinstance(t[3], int):
        return None
    if single is None or single.kind not in ("unsqueeze", "reshape") or known_shape(single.x) != (t[0], *t[2:]) or not _is_twice(single.x):
        return None
    bounds = (o.const(torch.tensor([n]), name) for n, name in ((0, "start"), (t[3] // 2, "half"), (2, "axis")))
    y = o("Slice", single.x, *bounds, since=10)
    y.meta["type"] = TensorType("float32", (t[0], t[2], t[3] // 2))
    if t[0] != shape[0]:
        ones = o.const(torch.tensor([1, 1]), "ones")
        y = o("Expand", y, o("Concat", _batch(o, shape[0]), ones, dtype="int64", since=4, axis=0), dtype="float32", since=8)
    return y


def _batch(o: Emitter, size: Dim) -> Node:
    """The number of rows as [1]: of the first input with this size in front, so that all layers ask the same one."""
    if isinstance(size, int):
        return o.const(torch.tensor([size]), "batch")
    inputs = o.rw.gm.graph.find_nodes(op="placeholder")
    same = [n for n in inputs if (s := known_shape(n)) is not None and s[:1] == (size,)]
    return o("Shape", *(same[:1] or o.rw.root.all_input_nodes[:1]), dtype="int64", since=15, start=0, end=1)


_POINTWISE = ("::Cos", "::Sin", "::Identity")


def _is_twice(node: Node) -> bool:
    """Both halves of the last axis are equal: Concat(a, a), rows of such a table, and functions of single elements of these."""
    value, joined, rows, t = const_value(node), view(Concat, node), view(Embedding, node), type_of(node)
    if value is not None:
        return value.dim() > 0 and value.shape[-1] % 2 == 0 and torch.equal(*value.chunk(2, -1))
    if joined is not None:
        return (
            len(joined.inputs) == 2
            and joined.inputs[0] is joined.inputs[1]
            and joined.axis in (-1, (t.rank or 0) - 1 if t is not None else -1)
        )
    if rows is not None:
        return _is_twice(rows.weight)
    op, cast = view(Elementwise, node), view(Cast, node)
    if op is not None and op.kind == "mul" and len(op.inputs) == 2:
        return any(isinstance(x, Node) and number(by) is not None and _is_twice(x) for x, by in (op.inputs, op.inputs[::-1]))
    if cast is not None:
        return _is_twice(cast.x)
    return key(node.target) in _POINTWISE and _is_twice(arg(node, 0))
