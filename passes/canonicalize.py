"""One spelling for each thing: no-ops go, constants are stored tensors, padding sits in the convolution, chains are one op, heads of keys and
values that several heads of q share are repeated.

Constant() -> stored tensor            copy(x), dropout(x), cast(x) to its type, reshape(x) to its shape -> x
x + 0, x - 0, x * 1, x / 1, x ^ 1 -> x  transpose(transpose(x)) -> transpose(x) or x
view(x) -> reshape(x)                  reshape(reshape(x)) -> reshape(x)
cat(empty, x) -> x                     reshape(transpose(reshape(x))) -> transpose(x), see flat_transpose.py
conv(pad(x, zeros)) -> conv(x) with padding      and the rules of FoldPad and Recompose"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.attention import known_shape
from qgraph.edit import has_writes
from qgraph.onnx_data_views import is_inference_dropout
from qgraph.onnx_ops import OnnxOp
from qgraph.passes.flat_transpose import plain_transpose
from qgraph.passes.fold_pad import RULES as FOLD_PAD
from qgraph.passes.recompose import RULES as RECOMPOSE
from qgraph.pattern import Const, Match, OneOf, Op, Var, item
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, graph_modules, rule
from qgraph.types import type_of
from qgraph.views import Cast, DataMovement, Elementwise, Pad, const_value, operands

aten = torch.ops.aten


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Changes numbers by rounding at most. In a graph with in-place ops copies and chains stay: something may write to a value in between."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-5)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        writes = any(has_writes(body) for body in graph_modules(gm))
        return ctx.apply(gm, RULES if writes else COPIES + RULES + RECOMPOSE)


def _node(value: Any) -> Node | None:
    return value if isinstance(value, Node) else None


@rule(Op("::Constant"))
def store_constant(m: Match, rw: Rewriter) -> Node | None:
    """A constant of a type that torch lacks, and one that a function's caller gives, stays a node."""
    if m.root.target.references:  # type: ignore[union-attr]
        return None
    value = m.root.target(**m.root.kwargs)  # type: ignore[operator]
    if not isinstance(value, torch.Tensor):
        return None
    new = rw.const(value, name=m.root.name)
    if "onnx_value" in m.root.meta:  # keeps its name in the file
        new.meta["onnx_value"] = m.root.meta["onnx_value"]
    return new


@rule(Op(DataMovement, kind="copy", x=Var("x")))
def drop_copy(m: Match, rw: Rewriter) -> Node | None:
    return _node(m.x)


@rule(OneOf(*(Op(view, self=Var("x"), size=Var("size")) for view in (aten.view.default, aten._unsafe_view.default))))
def loosen_view(m: Match, rw: Rewriter) -> Node:
    """reshape: strides are not part of a graph, and without its copies a view may need one"""
    return rw.call(aten.reshape.default, m.x, m.size, like=m.root)


@rule(Op(aten.dropout.default, input=Var("x"), train=False))
def drop_dropout(m: Match, rw: Rewriter) -> Node | None:
    return _node(m.x)


@rule(item(Op("::Dropout", "dropout", data=Var("x")), 0))
def drop_dropout_with_mask(m: Match, rw: Rewriter) -> Node | None:
    """The form with two outputs."""
    return m.x if is_inference_dropout(m.dropout) else None


@rule(Op(Cast, x=Var("x"), to=Var("to")))
def drop_cast(m: Match, rw: Rewriter) -> Node | None:
    kind = type_of(m.x)
    return m.x if kind is not None and kind.dtype == m.to and _device(m.x) == _device(m.root) else None


def _device(node: Node) -> Any:
    return getattr(node.meta.get("val"), "device", None)


_IN_ORDER = ("reshape", "flatten", "squeeze", "unsqueeze", "expand", "tile", "slice")
"""Kinds that keep the order of elements, so that a result of the same shape is the same tensor."""


@rule(Op(DataMovement, kind=Var("kind"), x=Var("x"), perm=Var("perm")))
def drop_movement(m: Match, rw: Rewriter) -> Node | None:
    if m.kind == "transpose":
        return m.x if m.perm is not None and list(m.perm) == list(range(len(m.perm))) else None
    reverses = m.kind == "slice" and isinstance(m.root.target, OnnxOp)  # with a negative step
    return m.x if m.kind in _IN_ORDER and not reverses and _same_shape(m.x, m.root) else None


def _same_shape(a: Node, b: Node) -> bool:
    kinds = type_of(a), type_of(b)
    shapes = [None if k is None else k.shape for k in kinds]
    return shapes[0] is not None and shapes[0] == shapes[1] and None not in shapes[0]


@rule(Op(Pad, x=Var("x"), pads=Var("pads")))
def drop_pad(m: Match, rw: Rewriter) -> Node | None:
    return m.x if m.pads is not None and not any(b or e for b, e in m.pads) else None


_NEUTRAL = {"add": 0.0, "sub": 0.0, "mul": 1.0, "div": 1.0, "pow": 1.0}


@rule(Op(Elementwise, kind=Var("kind"), inputs=Var("inputs")))
def drop_neutral(m: Match, rw: Rewriter) -> Node | None:
    """x + 0, 0 + x, x - 0, x * 1, 1 * x, x / 1, x ^ 1"""
    if m.kind not in _NEUTRAL or len(m.inputs) != 2:
        return None
    a, b = m.inputs
    orders = ((a, b), (b, a)) if m.kind in ("add", "mul") else ((a, b),)
    return next((_node(x) for x, c in orders if isinstance(x, Node) and _is_neutral(c, _NEUTRAL[m.kind], x, m.root)), None)


def _is_neutral(c: Any, number: float, x: Node, result: Node) -> bool:
    """The operand is this number, and neither adds axes to x nor changes its type."""
    was, now = type_of(x), type_of(result)
    if was is not None and now is not None and was.dtype != now.dtype:
        return False
    if isinstance(c, int | float):
        return c == number
    value = const_value(c)
    if value is None or value.numel() != 1 or value.is_complex() or value.item() != number:
        return False
    return value.ndim == 0 or (was is not None and was.rank is not None and was.rank >= value.ndim)


@rule(Op(aten.cat.default, tensors=Var("tensors")))
def drop_empty(m: Match, rw: Rewriter) -> Node | None:
    """cat([empty, x]) -> x: torch lets a tensor of no elements and one axis join any others, as caches that hold nothing yet do"""
    kept = [t for t in m.tensors if (value := const_value(t)) is None or tuple(value.shape) != (0,)]
    if len(kept) != 1 or len(m.tensors) == 1:
        return None
    was, now = type_of(kept[0]), type_of(m.root)
    return kept[0] if was is not None and now is not None and was.dtype == now.dtype else None


@rule(Op(aten.scaled_dot_product_attention.default, key=Var("k"), value=Var("v"), enable_gqa=True))
def spread_heads(m: Match, rw: Rewriter) -> Node:
    """Keys and values that several heads of q share are repeated for each, as most models write it themselves."""
    got = operands(m.root)
    of_q, of_k, of_v = (_heads(got[name]) for name in ("query", "key", "value"))
    if of_q is None or of_k is None or of_v is None:
        rw.decline("its numbers of heads are not known")
    k, v = _repeated(rw, m.k, of_q // of_k), _repeated(rw, m.v, of_q // of_v)
    rest = (got["attn_mask"], got["dropout_p"], got["is_causal"])
    return rw.call(m.root.target, got["query"], k, v, *rest, scale=got["scale"], like=m.root)


def _heads(x: Node) -> int | None:
    shape = known_shape(x)
    return shape[1] if shape is not None and len(shape) == 4 and isinstance(shape[1], int) else None


def _repeated(rw: Rewriter, x: Node, times: int) -> Node:
    """[B, H, L, D] -> [B, H * times, L, D]"""
    if times == 1:
        return x
    wide = rw.call(aten.expand.default, rw.call(aten.unsqueeze.default, x, 2), [-1, -1, times, -1, -1])
    return rw.call(aten.flatten.using_ints, wide, 1, 2)


@rule(Op(DataMovement, kind="transpose", perm=Var("outer"), x=Op(DataMovement, kind="transpose", perm=Var("inner"), x=Var("x"))))
def join_transposes(m: Match, rw: Rewriter) -> Node | None:
    if m.outer is None or m.inner is None:
        return None
    perm = [m.inner[axis] for axis in m.outer]
    if perm == list(range(len(perm))):
        return _node(m.x)
    return rw.call(m.root.target, m.x, perm=perm) if isinstance(m.root.target, OnnxOp) else rw.call(aten.permute.default, m.x, perm)


_RESHAPED = Op(DataMovement, kind=OneOf("reshape", "flatten", "squeeze", "unsqueeze"), x=Var("x"), single_use=True)


@rule(Op("::Reshape", data=_RESHAPED, shape=Const("shape")))
def join_reshapes(m: Match, rw: Rewriter) -> Node | None:
    """A 0 in the shape would copy a dimension of the inner result."""
    shape = const_value(m.shape)
    if shape is None or (not shape.all() and not m.root.kwargs.get("allowzero", 0)):
        return None
    attributes: dict[str, Any] = dict(m.root.kwargs)
    return rw.call(m.root.target, m.x, m.shape, like=m.root, **attributes)


@rule(OneOf(Op(aten.view.default, self=_RESHAPED, size=Var("size")), Op(aten.reshape.default, self=_RESHAPED, shape=Var("size"))))
def join_views(m: Match, rw: Rewriter) -> Node:
    """reshape, because a view of x itself may need a copy"""
    return rw.call(aten.reshape.default, m.x, m.size, like=m.root)


COPIES = (drop_copy, loosen_view, drop_dropout, drop_dropout_with_mask, drop_cast)
RULES = (
    *(
        store_constant,
        drop_movement,
        drop_pad,
        drop_neutral,
        drop_empty,
        plain_transpose,
        spread_heads,
        join_transposes,
        join_reshapes,
        join_views,
    ),
    *FOLD_PAD,
)
