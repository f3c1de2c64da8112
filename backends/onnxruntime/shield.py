"""quantize(conv(dequantize(x), float weight)) -> quantize(Max(conv(...), -inf)): what is float on purpose stays float.

Between DequantizeLinear and QuantizeLinear, ONNX Runtime (1.22 and later, optimizer WeightBiasQuantization) takes a Conv, ConvTranspose or
Gemm for an unfinished quantization and quantizes its float weight (int8, one scale) and bias (int32, no range check) by itself. Max with
-inf changes no number, is not optimized away, and ends the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.backends.onnxruntime.emit import Emitter, emit
from qgraph.pattern import Match, OneOf, Op
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.views import Activation, Conv, DataMovement, Dequantize, Elementwise, Linear, Pool, Quantize, const_value, view

FOLLOWED = frozenset({"relu", "clip"})
"""Activations that may lie between the product and QuantizeLinear."""


@rule(OneOf(Op(Linear, "op"), Op(Conv, "op")))
def shield(m: Match, rw: Rewriter) -> Node | None:
    v = view(Linear, m.op) or view(Conv, m.op)
    if v is None or view(Dequantize, v.x) is None or not (_float(v.weight) or _float(v.bias)) or not _quantized(m.op):
        return None
    attributes: dict[str, Any] = dict(m.op.kwargs)
    product = rw.call(m.op.target, *m.op.args, like=m.op, **attributes)
    o = Emitter(rw)
    return o("Max", product, o.const(torch.tensor(-torch.inf), "lowest"), like=m.op, since=8)


def _float(value: Node | None) -> bool:
    """A float constant, or one that is multiplied out from integers at load."""
    if value is None or view(Dequantize, value) is not None:
        return False
    const = const_value(value)
    if const is not None:
        return const.is_floating_point()
    return all(const_value(a) is not None or _float(a) for a in value.all_input_nodes) and value.op == "call_function"


def _quantized(node: Node) -> bool:
    """True when the only way from the node leads to a quantization."""
    while len(node.users) == 1:
        (node,) = node.users
        if view(Quantize, node) is not None:
            return True
        if not _followed(node):
            return False
    return False


def _followed(node: Node) -> bool:
    """Also what ONNX Runtime folds into the product, or moves QuantizeLinear across, before it looks."""
    act, pool, arithmetic = view(Activation, node), view(Pool, node), view(Elementwise, node)
    if act is not None:
        return act.kind in FOLLOWED
    if arithmetic is not None:
        return arithmetic.kind in ("add", "sub", "mul", "div") and sum(const_value(x) is None for x in arithmetic.inputs) == 1
    return view(DataMovement, node) is not None or (pool is not None and pool.kind == "max")


@dataclass(frozen=True)
class ShieldFloat(Pass):
    """Products kept in float between integers, out of reach of ONNX Runtime's own quantization."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, shield)
