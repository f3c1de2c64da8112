"""16-bit float graphs: op(dequantize(...)) -> Cast(op in float32), for ONNX Runtime's integer kernels read float32 scales only.

Inputs, outputs and everything that is not computed in integers keep their type. The value of a product is then rounded once to 16 bits,
and not at all where it is quantized next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node, map_arg

from qgraph.backends.onnxruntime.emit import Emitter, emit
from qgraph.backends.onnxruntime.sites import HALF
from qgraph.ops import Q
from qgraph.pattern import Const, Match, OneOf, Op, Opt, Var
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.types import TensorType, type_of
from qgraph.views import Cast, Concat, Conv, Dequantize, Elementwise, Linear, Pool, const_value, view


def half_name(scale: Node) -> str | None:
    """The 16-bit float type of a constant, None for other types and values."""
    value = const_value(scale)
    name = "" if value is None else str(value.dtype).removeprefix("torch.")
    return name if name in HALF else None


@rule(OneOf(*(Op(interface, "op") for interface in (Linear, Conv, Elementwise, Pool, Concat))))
def widen(m: Match, rw: Rewriter) -> Node | None:
    """Every float operand is dequantized with static scales, a constant, or already computed in float32 by this rule."""
    inputs = m.op.all_input_nodes
    kinds = {half for a in inputs if (half := _computed(a)) is not None}
    site = view(Linear, m.op) or view(Conv, m.op)
    if len(kinds) != 1 or (site is not None and not (_is_static(site.x) and _is_static(site.weight))):
        return None
    if not all(_computed(a) or half_name(a) for a in inputs):
        return None
    wide = {a: _wide(a, rw) for a in inputs}
    args, kwargs = map_arg((m.op.args, m.op.kwargs), wide.__getitem__)
    attributes: dict[str, Any] = dict(kwargs)
    y = rw.call(m.op.target, *args, **attributes)
    shape = type_of(m.op)
    y.meta["type"] = TensorType("float32", shape.shape if shape is not None else None)
    return Emitter(rw).cast(y, kinds.pop())


def _computed(node: Node) -> str | None:
    """The 16-bit type of a dequantized value or of a Cast that this rule has made."""
    v, cast = view(Dequantize, node), view(Cast, node)
    if v is not None and not v.group:
        return half_name(v.scale)
    return cast.to if cast is not None and node.meta.get("from") == "widen" else None


def _is_static(node: Node) -> bool:
    v = view(Dequantize, node)
    return v is not None and not v.group and half_name(v.scale) is not None and v.dtype in ("int8", "uint8")


def _wide(node: Node, rw: Rewriter) -> Node:
    v, cast = view(Dequantize, node), view(Cast, node)
    if v is not None:
        new = rw.call(Q.dequantize.default, v.q, rw.const(v.scale, torch.Tensor.float), v.zero_point, v.dtype, v.axis, v.group)
        shape = type_of(node)
        new.meta["type"] = TensorType("float32", shape.shape if shape is not None else None)
        return new
    return cast.x if cast is not None else rw.const(node, torch.Tensor.float)


@rule(Op(Q.quantize.default, x=Op(Cast, "cast", x=Var("x")), scale=Const("s"), zero_point=Opt(Var("z")), dtype=Var("dtype"), axis=None))
def quantize_wide(m: Match, rw: Rewriter) -> Node | None:
    """quantize(Cast(y)) -> quantize(y) where the Cast is one of `widen`."""
    if m.cast.meta.get("from") != "widen" or half_name(m.s) is None:
        return None
    return rw.call(Q.quantize.default, m.x, rw.const(m.s, torch.Tensor.float), m.z, m.dtype, like=m.root)


@dataclass(frozen=True)
class WidenHalf(Pass):
    """Float32 around the integer kernels of a 16-bit float graph."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-2)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, widen, quantize_wide)
