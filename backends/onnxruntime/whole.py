"""Chains that ONNX Runtime 1.31 would leave in pieces -> its own operator for them, or the spelling that it fuses.

ONNX Runtime looks for one spelling of each chain. x * (0.5 * (1 + erf(x / sqrt(2)))), which torch writes, is not the one: five passes over the
values instead of one. Neither are gelu with tanh, and norms that multiply by a reciprocal root or square by a product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph import chains
from qgraph.backends.onnxruntime.emit import MICROSOFT, Emitter, emit
from qgraph.onnx_io import opset
from qgraph.onnx_node import op_type
from qgraph.passes.flat_transpose import plain_transpose
from qgraph.pattern import Match, OneOf, Op
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.types import type_of
from qgraph.views import Elementwise, is_const, view


@dataclass(frozen=True)
class WholeOps(Pass):
    """Gelu and SiLU as one operator, norms in the words that become one. In float32: the operators have no other kernels."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-5)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, whole_curve, known_norm, plain_transpose)


_CURVES: dict[str, tuple[str, dict[str, Any]]] = {
    "gelu": ("Gelu", {}),
    "gelu_tanh": ("FastGelu", {}),
    "silu": ("QuickGelu", {"alpha": 1.0}),
}


@rule(Op(Elementwise, kind=OneOf("mul", "div")))
def whole_curve(m: Match, rw: Rewriter) -> Node | None:
    """Gelu, FastGelu, which is the form with tanh, and QuickGelu, which with alpha 1 is SiLU. ONNX Runtime makes QuickGelu of x * sigmoid(x)
    itself, but not of a dequantized x, of which it gives each reader one of its own: two passes more."""
    found = chains.pointwise(m.root)
    if not isinstance(found, chains.Pointwise) or found.kind not in _CURVES or not _is_float32(m.root):
        return None
    onnx_op, attributes = _CURVES[found.kind]
    return Emitter(rw)(onnx_op, found.x, like=m.root, domain=MICROSOFT, main=True, **attributes)


_KNOWN = ({"ReduceMean", "Sub", "Pow", "Add", "Sqrt", "Div"}, {"ReduceMean", "Pow", "Add", "Sqrt", "Div"})
"""Operators of the spellings that become LayerNormalization and SimplifiedLayerNormalization, before weight and bias."""


@rule(Op(Elementwise, kind=OneOf("mul", "div")))
def known_norm(m: Match, rw: Rewriter) -> Node | None:
    """v / Sqrt(ReduceMean(Pow(v, 2)) + eps), with v = x or v = x - ReduceMean(x); times ones where an rms norm has no weight behind it."""
    found = chains.normal(m.root)
    if not isinstance(found, chains.Normal) or not _is_float32(m.root):
        return None
    ones = found.kind == "rms" and found.weight is None and not _is_weighted(m.root)
    if {op_type(n) for n in found.nodes} in _KNOWN and not ones:
        return None
    o, v = Emitter(rw), found.x
    if found.kind == "layer":
        v = o("Sub", v, _mean(o, v), like=m.root)
    square = o("Pow", v, o.const(torch.tensor(2.0), "two"), like=m.root)
    eps = o.const(torch.tensor(found.eps), "eps")
    normal = o("Div", v, o("Sqrt", o("Add", _mean(o, square), eps, dtype="float32"), dtype="float32"), like=m.root)
    weight = found.weight or (o.const(torch.ones(found.size), "ones") if ones else None)
    return normal if weight is None else o("Mul", normal, weight, like=m.root)


def _mean(o: Emitter, x: Node) -> Node:
    """Over the last axis, which stays; the axes are an input from opset 18 on."""
    if opset(o.rw.gm) < 18:
        return o("ReduceMean", x, dtype="float32", axes=[-1], keepdims=1)
    return o("ReduceMean", x, o.const(torch.tensor([-1]), "axes"), dtype="float32", keepdims=1)


def _is_weighted(node: Node) -> bool:
    """Its one reader multiplies it with a constant."""
    op = view(Elementwise, next(iter(node.users))) if len(node.users) == 1 else None
    return op is not None and op.kind == "mul" and any(is_const(n) for n in op.inputs)


def _is_float32(node: Node) -> bool:
    kind = type_of(node)
    return kind is not None and kind.dtype == "float32"
