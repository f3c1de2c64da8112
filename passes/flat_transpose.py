"""Reshape(Transpose(Reshape(x, [-1, a, b])), [.., b, a]) -> Transpose(x): how torch.onnx writes the transposed keys of an attention.

The sizes are computed from Shape(x) by Slice and Concat, so that no type says what the three of them do."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from qgraph.onnx_node import arg, attr, const_ints
from qgraph.pattern import Match, Op, Var
from qgraph.rewrite import Rewriter, rule
from qgraph.types import TensorType, type_of
from qgraph.views import const_value, key

Size = int | tuple[Node, int]
"""A number, or what an axis of a value measures."""


@rule(Op("::Reshape", data=Op("::Transpose", "turn", data=Op("::Reshape", data=Var("x"), shape=Var("flat"))), shape=Var("full")))
def plain_transpose(m: Match, rw: Rewriter) -> Node | None:
    own, flat, full = _shape_of(m.x), _sizes(m.flat), _sizes(m.full)
    if own is None or len(own) < 3 or tuple(attr(m.turn, "perm", ())) != (0, 2, 1):
        return None
    *lead, a, b = own
    if flat != (-1, a, b) or full != (*lead, b, a):
        return None
    perm = [*range(len(lead)), len(own) - 1, len(own) - 2]
    y, t = rw.call(m.turn.target, m.x, perm=perm), type_of(m.x)
    if t is not None and t.shape is not None:
        y.meta["type"] = TensorType(t.dtype, tuple(t.shape[axis] for axis in perm))
    return y


def _shape_of(x: Any) -> tuple[Size, ...] | None:
    t = type_of(x) if isinstance(x, Node) else None
    return None if t is None or t.shape is None else tuple(d if isinstance(d, int) else (x, i) for i, d in enumerate(t.shape))


def _sizes(node: Any) -> tuple[Size, ...] | None:
    """The elements of an integer vector that is computed from shapes; None for another one."""
    value = const_value(node)
    if value is not None:
        return tuple(int(v) for v in value.tolist()) if value.dim() == 1 else None
    match key(node.target) if isinstance(node, Node) else None:
        case "::Shape":
            found = _shape_of(arg(node, 0))
            return None if found is None else found[attr(node, "start", 0) : attr(node, "end", None)]
        case "::Slice":
            whole, starts, ends = _sizes(arg(node, 0)), const_ints(node, 1, "starts"), const_ints(node, 2, "ends")
            plain = const_ints(node, 3, "axes") in (None, (0,)) and const_ints(node, 4, "steps") in (None, (1,))
            return whole[starts[0] : ends[0]] if whole is not None and starts is not None and ends is not None and plain else None
        case "::Concat":
            parts = [_sizes(part) for part in node.args]
            return tuple(size for part in parts for size in part or ()) if None not in parts else None
    return None
