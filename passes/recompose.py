"""Chains that exporters make of one op -> that op, in the graph's own dialect: activations, norms, softmax (see qgraph.chains).

                                                                torch            ONNX
x * clip(x + 3, 0, 6) / 6                -> hard_swish          hardswish        HardSwish, opset 14
clip(x + 3, 0, 6) / 6                    -> hard_sigmoid        hardsigmoid      HardSigmoid
x * (1 + erf(x / sqrt(2))) / 2           -> gelu                gelu             Gelu, opset 20
the same with tanh                       -> gelu_tanh           gelu             Gelu, opset 20
x * sigmoid(x)                           -> silu                silu             stays: runtimes know the chain better than Swish
(x - mean) / sqrt(variance + eps)        -> layer norm          layer_norm       LayerNormalization, opset 17
x / sqrt(mean(x^2) + eps)                -> rms norm            rms_norm         RMSNormalization, opset 23
norm * weight + bias                     -> norm with both
exp(x - max) / sum(exp(x - max))         -> softmax             softmax          Softmax
reshape(softmax(flatten(x)), shape(x))   -> softmax                              Softmax

In an older opset a chain stays as it is: raising the opset is a decision of whoever writes the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph import chains
from qgraph.edit import graph_modules, has_writes
from qgraph.onnx_node import rank
from qgraph.onnx_ops import OnnxOp, op
from qgraph.pattern import Const, Inputs, Match, OneOf, Op, Var
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.types import type_of
from qgraph.views import Elementwise, Norm, Softmax, const_value, view

aten = torch.ops.aten


@dataclass(frozen=True)
class Recompose(Pass):
    """Fewer, larger ops with the same meaning; part of Canonicalize. Graphs with in-place ops stay: x may differ between two reads of it."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-5)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return 0 if any(has_writes(part) for part in graph_modules(gm)) else ctx.apply(gm, RULES)


def _version(rw: Rewriter, onnx_op: str, since: int) -> int:
    """The opset of an ONNX graph; declines in one that is older than the op."""
    version = rw.root.target.version  # type: ignore[union-attr]
    if version < since:
        rw.decline(f"{onnx_op} exists from opset {since}, this graph has {version}")
    return int(version)


_TORCH: dict[str, tuple[Any, dict[str, Any]]] = {
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "hard_swish": (aten.hardswish.default, {}),
    "hard_sigmoid": (aten.hardsigmoid.default, {}),
    "silu": (aten.silu.default, {}),
}
_ONNX: dict[str, tuple[str, int, dict[str, Any]]] = {
    "gelu": ("Gelu", 20, {}),
    "gelu_tanh": ("Gelu", 20, {"approximate": "tanh"}),
    "hard_swish": ("HardSwish", 14, {}),
    "hard_sigmoid": ("HardSigmoid", 6, {"alpha": 1 / 6, "beta": 0.5}),
}
"""kind -> op, (its first opset,) its attributes."""


@rule(Op(Elementwise, kind=OneOf("mul", "div")))
def activation(m: Match, rw: Rewriter) -> Node | None:
    """x times a gate of x"""
    found = chains.pointwise(m.root)
    if isinstance(found, str):
        rw.decline(found)
    if found is None:
        return None
    if not isinstance(m.root.target, OnnxOp):
        torch_op, attributes = _TORCH[found.kind]
        return rw.call(torch_op, found.x, **attributes)
    if found.kind not in _ONNX:
        return None
    onnx_op, since, attributes = _ONNX[found.kind]
    return rw.call(op(onnx_op, version=_version(rw, onnx_op, since)), found.x, like=m.root, **attributes)


@rule(
    Op(
        "::Reshape",
        data=Op(Softmax, "softmax", axis=Var("axis"), single_use=True, x=Op("::Flatten", "flat", input=Var("x"), axis=Var("kept"))),
        shape=Op("::Shape", "shape", data=Var("x")),
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


@rule(Op(Elementwise, kind="div"))
def softmax(m: Match, rw: Rewriter) -> Node | None:
    """exp(x - max) / sum(exp(x - max))"""
    found = chains.exponential(m.root)
    if isinstance(found, str):
        rw.decline(found)
    if found is None:
        return None
    if not isinstance(m.root.target, OnnxOp):
        return rw.call(aten.softmax.int, found.x, found.axis)
    version, dims = m.root.target.version, rank(found.x)
    if version < 13 and (dims is None or found.axis != -1):
        rw.decline(f"Softmax of axis {found.axis} alone exists from opset 13, this graph has {version}")
    axis = found.axis if version >= 13 or dims is None else dims - 1
    return rw.call(op("Softmax", version=version), found.x, like=m.root, axis=axis)


@rule(Op(Elementwise, kind=OneOf("mul", "div")))
def norm(m: Match, rw: Rewriter) -> Node | None:
    """Mean and variance, or mean square, over the last axis"""
    found = chains.normal(m.root)
    if isinstance(found, str):
        rw.decline(found)
    if found is None:
        return None
    layer = found.kind == "layer"
    if not isinstance(m.root.target, OnnxOp):
        torch_op, parameters = (aten.layer_norm.default, (found.weight, None)) if layer else (aten.rms_norm.default, (found.weight,))
        return rw.call(torch_op, found.x, [found.size], *parameters, found.eps)
    onnx_op, since = ("LayerNormalization", 17) if layer else ("RMSNormalization", 23)
    target = op(onnx_op, version=_version(rw, onnx_op, since))
    weight = found.weight or rw.const(torch.ones(found.size, dtype=_dtype(m.root)), name=f"{m.root.name}_ones")
    return rw.call(target, found.x, weight, like=m.root, axis=-1, epsilon=found.eps)


def _dtype(node: Node) -> torch.dtype:
    kind = type_of(node)
    return getattr(torch, kind.dtype) if kind is not None and kind.dtype is not None else torch.float32


_BARE = Op(Norm, "inner", kind=OneOf("layer", "rms"), axes=(-1,), bias=None, weight=Var("old"), single_use=True)


@rule(Op(Elementwise, kind="mul", inputs=Inputs(_BARE, Const("weight"))))
def norm_weight(m: Match, rw: Rewriter) -> Node | None:
    """norm(x) * weight, where the norm has none, or only ones"""
    ones = const_value(m.old)
    if m.old is not None and (ones is None or not bool((ones == 1).all())):
        return None
    return _with_parameters(m, rw, weight=m.weight)


@rule(
    Op(
        Elementwise,
        kind="add",
        inputs=Inputs(Op(Norm, "inner", kind="layer", axes=(-1,), bias=None, weight=Var("old"), single_use=True), Const("bias")),
    )
)
def norm_bias(m: Match, rw: Rewriter) -> Node | None:
    """layer_norm(x) + bias"""
    return _with_parameters(m, rw, weight=m.old, bias=m.bias)


def _with_parameters(m: Match, rw: Rewriter, *, weight: Node | None, bias: Node | None = None) -> Node:
    """The inner norm again with these parameters."""
    found, kind, value = view(Norm, m.inner), type_of(m.inner), const_value(bias or weight)
    size = kind.shape[-1] if kind is not None and kind.shape else None
    if found is None or value is None or not isinstance(size, int) or tuple(value.shape) != (size,) or value.dtype != _dtype(m.inner):
        shape = None if value is None else list(value.shape)
        rw.decline(f"the constant {shape} is not one value per element of the last axis, which has {size or 'no known size'}")
    if isinstance(m.inner.target, OnnxOp):
        attributes: dict[str, Any] = dict(m.inner.kwargs)
        return rw.call(m.inner.target, found.x, weight, *([] if bias is None else [bias]), like=m.root, **attributes)
    if found.kind == "rms":
        return rw.call(aten.rms_norm.default, found.x, [size], weight, found.eps)
    return rw.call(aten.layer_norm.default, found.x, [size], weight, bias, found.eps)


RULES = (activation, last_axis_softmax, softmax, norm, norm_weight, norm_bias)
