"""Chains that exporters make of one op -> that op: hard_swish, gelu, softmax on the last axis, layer norm.

x * clip(x + 3, 0, 6) / 6               -> hard_swish(x)             ONNX from opset 14
x * 0.5 * (1 + erf(x / sqrt(2)))        -> gelu(x)                   ONNX from opset 20
reshape(softmax(flatten(x)), shape(x))  -> softmax(x)                ONNX
(x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias -> layer_norm(x, weight, bias)    ONNX from opset 17

In an older opset a chain stays as it is: raising the opset is a decision of whoever writes the file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.onnx_node import attr, const_ints, rank
from qgraph.onnx_ops import OnnxOp, op
from qgraph.pattern import Const, Inputs, Match, OneOf, Op, Var
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.types import type_of
from qgraph.views import Activation, Elementwise, Softmax, const_value, view

aten = torch.ops.aten


@dataclass(frozen=True)
class Recompose(Pass):
    """Fewer, larger ops with the same meaning; part of Canonicalize."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-5)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, RULES)


def _op(rw: Rewriter, torch_op: Any, onnx_op: str, since: int, *args: Any, **attributes: Any) -> Node:
    """A call in the root's own dialect."""
    target = rw.root.target
    if not isinstance(target, OnnxOp):
        return rw.call(torch_op, *args)
    if target.version < since:
        rw.decline(f"{onnx_op} exists from opset {since}, this graph has {target.version}")
    return rw.call(op(onnx_op, version=target.version), *args, like=rw.root, **attributes)


def _times(*factors: Any, single_use: bool = False) -> Op:
    return Op(Elementwise, kind="mul", inputs=Inputs(*factors), single_use=single_use)


def _over(x: Any, name: str, *, root: str | None = None) -> Op:
    """x divided by a number, or multiplied by its inverse; `_divisor` tells which number."""
    return Op(Elementwise, root, kind=OneOf("mul", "div"), inputs=Inputs(x, Var(name)))


def _divisor(node: Node, x: Node, constant: Any) -> float | None:
    """What the node divides x by; None for a constant over x and for a constant that is no number."""
    found = view(Elementwise, node)
    value = const_value(constant) if isinstance(constant, Node) else constant
    if found is None or value is None or (isinstance(value, torch.Tensor) and value.numel() != 1) or not float(value):
        return None
    if found.kind == "mul":
        return 1 / float(value)
    return float(value) if found.inputs[0] is x else None


def _is(found: float | None, expected: float) -> bool:
    """Equal up to the rounding of a half precision constant."""
    return found is not None and math.isclose(found, expected, rel_tol=1e-3)


X = Var("x")
_CLIPPED = Op(Activation, "gate", kind="clip", low=0.0, high=6.0, single_use=True, x=Op(Elementwise, kind="add", inputs=Inputs(X, 3.0)))


@rule(
    OneOf(
        _over(Op(Elementwise, "inner", kind="mul", inputs=Inputs(X, _CLIPPED), single_use=True), "six"),
        _times(X, Op(Elementwise, "inner", kind=OneOf("mul", "div"), inputs=Inputs(_CLIPPED, Var("six")), single_use=True)),
    )
)
def hard_swish(m: Match, rw: Rewriter) -> Node | None:
    """x * clip(x + 3, 0, 6) / 6, divided at either place"""
    inside = view(Elementwise, m.inner)
    divides_gate = inside is not None and m.six in inside.inputs
    if not _is(_divisor(m.inner, m.gate, m.six) if divides_gate else _divisor(m.root, m.inner, m.six), 6.0):
        return None
    return _op(rw, aten.hardswish.default, "HardSwish", 14, m.x)


@rule(_times(X, OneOf(Op("::HardSigmoid", X=X, alpha=Var("alpha"), beta=0.5), Op(aten.hardsigmoid.default, self=X))))
def gated_hard_swish(m: Match, rw: Rewriter) -> Node | None:
    """x * clip(x / 6 + 0.5, 0, 1)"""
    if not math.isclose(m.get("alpha", 1 / 6), 1 / 6, rel_tol=1e-4):
        return None
    return _op(rw, aten.hardswish.default, "HardSwish", 14, m.x)


_ERF = Op(Activation, kind="erf", single_use=True, x=_over(X, "by", root="scaled"))
_ONE_PLUS = Op(Elementwise, kind="add", inputs=Inputs(_ERF, 1.0), single_use=True)


@rule(
    OneOf(
        _times(_times(X, _ONE_PLUS, single_use=True), 0.5),
        _times(_times(X, 0.5, single_use=True), _ONE_PLUS),
        _times(X, _times(_ONE_PLUS, 0.5, single_use=True)),
    )
)
def gelu(m: Match, rw: Rewriter) -> Node | None:
    """x * 0.5 * (1 + erf(x / sqrt(2))), halved at any place"""
    if not _is(_divisor(m.scaled, m.x, m.by), math.sqrt(2)):
        return None
    return _op(rw, aten.gelu.default, "Gelu", 20, m.x)


@rule(
    Op(
        "::Reshape",
        data=Op(Softmax, "softmax", axis=Var("axis"), single_use=True, x=Op("::Flatten", "flat", input=X, axis=Var("kept"))),
        shape=Op("::Shape", "shape", data=X),
    )
)
def last_axis_softmax(m: Match, rw: Rewriter) -> Node | None:
    """Softmax of a matrix whose rows are the last axis of x"""
    dims = rank(m.x)
    if m.axis not in (-1, 1) or (m.kept != -1 and m.kept + 1 != dims) or {"start", "end"} & m.shape.kwargs.keys():
        return None
    if m.softmax.target.version >= 13:
        return rw.call(m.softmax.target, m.x, like=m.root, axis=-1)
    if dims is None:
        rw.decline("the rank of the input is not known")
    return rw.call(m.softmax.target, m.x, like=m.root, axis=dims - 1)


_MEAN = Op("::ReduceMean", "mean", data=X)
_CENTRED = Op(Elementwise, "centred", kind="sub", inputs=Inputs(X, _MEAN))
_SQUARE = OneOf(
    Op(Elementwise, kind="pow", inputs=Inputs(Var("centred"), 2.0)),
    Op(Elementwise, kind="mul", inputs=Inputs(Var("centred"), Var("centred"))),
)
_VARIANCE = Op("::ReduceMean", "variance", data=_SQUARE, single_use=True)
_ROOT = Op(Activation, "deviation", kind="sqrt", single_use=True, x=Op(Elementwise, kind="add", inputs=Inputs(_VARIANCE, Var("eps"))))
_NORMAL = Op(Elementwise, "normal", kind="div", inputs=Inputs(_CENTRED, _ROOT), single_use=True)


@rule(Op(Elementwise, kind="add", inputs=Inputs(_times(_NORMAL, Const("weight"), single_use=True), Const("bias"))))
def layer_norm(m: Match, rw: Rewriter) -> Node | None:
    """Mean and variance over the last axis, then one weight and bias per element of it"""
    weight, bias, eps = (const_value(v) for v in (m.weight, m.bias, m.eps))
    assert weight is not None and bias is not None
    dims = rank(m.x)
    normal, centred = view(Elementwise, m.normal), view(Elementwise, m.centred)
    ordered = normal is not None and normal.inputs[1] is m.deviation and centred is not None and centred.inputs[0] is m.x
    if not ordered or eps is None or eps.numel() != 1 or not all(_over_last_axis(n, dims) for n in (m.mean, m.variance)):
        return None
    if weight.ndim != 1 or weight.shape != bias.shape or (dims or 0) < 1:
        rw.decline(f"weight {list(weight.shape)} and bias {list(bias.shape)} are not one value per element of the last axis")
    kind = type_of(m.x)
    if kind is None or kind.shape is None or kind.shape[-1] not in (len(weight), None) and isinstance(kind.shape[-1], int):
        rw.decline("the size of the last axis is not that of the weight")
    return _op(rw, None, "LayerNormalization", 17, m.x, m.weight, m.bias, axis=-1, epsilon=float(eps))


def _over_last_axis(mean: Node, dims: int | None) -> bool:
    axes = const_ints(mean, 1, "axes")
    return attr(mean, "keepdims", 1) == 1 and axes is not None and (axes == (-1,) or (dims is not None and axes == (dims - 1,)))


RULES = (hard_swish, gated_hard_swish, gelu, last_axis_softmax, layer_norm)
