"""dequant_linear(x, W) -> MatMul(x, dequantize(W^T)) + b, and the other fused qg ops likewise: back to the form that kernels are matched in.

A graph that fuse_dequant_matmul has been over lowers to the same kernels as one that it has not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backends.onnxruntime.emit import Emitter, emit
from qgraph.backends.onnxruntime.sites import constant
from qgraph.ops import Q
from qgraph.pattern import Match, Op
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.types import type_of
from qgraph.views import operands


@rule(Op(Q.dequant_linear.default))
def open_dequant_linear(m: Match, rw: Rewriter) -> Node:
    p = operands(m.root)
    return _linear(rw, p["x"], _turned(rw, p["weight"], p["scale"], p["zero_point"], p["dtype"], p["group"]), p["bias"])


@rule(Op(Q.quantized_linear.default))
def open_quantized_linear(m: Match, rw: Rewriter) -> Node:
    p = operands(m.root)
    weight = _turned(rw, p["weight"], p["w_scale"], p["w_zero_point"], p["w_dtype"], 0)
    return _requantized(rw, p, _linear(rw, _x(rw, p), weight, _float_bias(rw, p)))


@rule(Op(Q.dequant_conv.default))
def open_dequant_conv(m: Match, rw: Rewriter) -> Node:
    p = operands(m.root)
    axis = 0 if constant(p["scale"], rw).dim() else None
    weight = rw.call(Q.dequantize.default, p["weight"], p["scale"], p["zero_point"], p["dtype"], axis, 0)
    return _conv(rw, p, p["x"], weight, p["bias"])


@rule(Op(Q.quantized_conv.default))
def open_quantized_conv(m: Match, rw: Rewriter) -> Node:
    p = operands(m.root)
    axis = 0 if constant(p["w_scale"], rw).dim() else None
    weight = rw.call(Q.dequantize.default, p["weight"], p["w_scale"], p["w_zero_point"], p["w_dtype"], axis, 0)
    return _requantized(rw, p, _conv(rw, p, _x(rw, p), weight, _float_bias(rw, p)))


def _turned(rw: Rewriter, weight: Node, scale: Node, zero: Node | None, dtype: str, group: int) -> Node:
    """dequantize([N, K]) as [K, N], the form that MatMul reads."""
    if group:
        scale, zero = rw.const(scale, _turn), None if zero is None else rw.const(zero, _turn)
    axis = 0 if group else 1 if constant(scale, rw).dim() else None
    return rw.call(Q.dequantize.default, rw.const(weight, _turn), scale, zero, dtype, axis, group)


def _turn(t: Tensor) -> Tensor:
    return t.T


def _x(rw: Rewriter, p: dict[str, Any]) -> Node:
    """The activations as dequantize(integers): one scale for all of them."""
    return rw.call(Q.dequantize.default, p["x"], p["x_scale"], p["x_zero_point"], p["x_dtype"])


def _float_bias(rw: Rewriter, p: dict[str, Any]) -> Node | None:
    """An int32 bias in steps of x_scale * w_scale as float; biases are quantized once more, to the same integers, where a kernel asks."""
    if p["bias"] is None:
        return None
    bias = constant(p["bias"], rw)
    if bias.is_floating_point():
        return p["bias"]  # type: ignore[no-any-return]
    scale = constant(p["x_scale"], rw).reshape(()).float() * constant(p["w_scale"], rw).reshape(-1).float()
    return rw.const(bias.float() * scale, name=f"{rw.root.name}_bias")


def _linear(rw: Rewriter, x: Node, weight: Node, bias: Node | None) -> Node:
    o = Emitter(rw)
    y = o("MatMul", x, weight, main=True)
    return y if bias is None else o("Add", y, bias, since=7)


def _conv(rw: Rewriter, p: dict[str, Any], x: Node, weight: Node, bias: Node | None) -> Node:
    o, names = Emitter(rw), {"stride": "strides", "padding": "pads", "dilation": "dilations", "groups": "group"}
    attributes: dict[str, Any] = {new: p[old] for old, new in names.items()}
    return o("Conv", x, weight, *(() if bias is None else (bias,)), main=True, **attributes)


def _requantized(rw: Rewriter, p: dict[str, Any], y: Node) -> Node:
    if p["y_dtype"] is None:
        return y
    return rw.call(Q.quantize.default, y, p["y_scale"], p["y_zero_point"], p["y_dtype"], like=rw.root if type_of(rw.root) else None)


@dataclass(frozen=True)
class OpenFused(Pass):
    """The fused qg ops in parts."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, open_dequant_linear, open_quantized_linear, open_dequant_conv, open_quantized_conv)
