"""linear(x, dequantize(w)) -> dequant_linear(x, w); linear(dequantize(x), dequantize(w)) -> quantized_linear(x, w); conv likewise.

With integers X, W, their scales and zero points, y = sum_k s_x (X - z_x) s_w (W - z_w). Where neither scale depends on k both leave
the sum, and what remains, sum_k (X - z_x)(W - z_w), is a sum of integers. So the scales of W must run along the outputs (or be one),
those of X along its rows (or be one). A bias added later joins, and so does a quantize of the result: then the scales become one
multiplier, s_x s_w / s_y.

A weight stored as [K, N] is transposed once, now: the fused ops know only [N, K].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.ops import Q
from qgraph.pattern import Const, Inputs, Match, OneOf, Op, Var, item
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, Rule, rule
from qgraph.types import int_range, storage, type_of
from qgraph.views import Conv, Dequantize, DynamicQuantize, Elementwise, Linear, Quantize, const_value, operands, view

FLOAT = Var("x")
STATIC = Op(Dequantize, "x", scale=Const("x_scale"))
DYNAMIC = Op(Dequantize, "x", scale=item(Op(DynamicQuantize), 1))
WEIGHT = Op(Dequantize, "weight")
FUSED_LINEAR = Op(Q.quantized_linear.default, "fused", y_dtype=None)
FUSED_CONV = Op(Q.quantized_conv.default, "fused", y_dtype=None)
DEQUANT_LINEAR = Op(Q.dequant_linear.default, "fused")

INT32 = 2**31

Weight = tuple[Node, Node, Node | None]
"""Integers [N, ...], scale, zero point."""


# Linear


@rule(Op(Linear, x=FLOAT, weight=WEIGHT))
def fuse_linear(m: Match, rw: Rewriter) -> Node:
    linear, w = _seen(Linear, m.root), _seen(Dequantize, m.weight)
    q, scale, zero_point = _linear_weight(rw, linear, w)
    bias = _bias(rw, linear.bias, _size(q), rank=1)
    return rw.call(Q.dequant_linear.default, m.x, q, scale, zero_point, bias, w.dtype, w.group, like=m.root)


def _fuse_quantized_linear(m: Match, rw: Rewriter) -> Node:
    linear, x, w = _seen(Linear, m.root), _seen(Dequantize, m.x), _seen(Dequantize, m.weight)
    if w.group:
        rw.decline(f"the weight has a scale per group of {w.group} inputs: integers of different scales do not add up")
    if x.axis is not None and x.group != -1:
        rw.decline(f"x has scales along axis {x.axis}; an integer sum needs one for the tensor or one per row")
    q, scale, zero_point = _linear_weight(rw, linear, w)
    _require_int32(rw, x, w, q, zero_point)
    bias = _bias(rw, linear.bias, _size(q), rank=1)
    weight = (q, scale, zero_point, w.dtype, bias)
    return rw.call(Q.quantized_linear.default, x.q, x.scale, x.zero_point, x.dtype, *weight, like=m.root)


fuse_static_linear = Rule("fuse_static_linear", Op(Linear, x=STATIC, weight=WEIGHT), _fuse_quantized_linear)
fuse_dynamic_linear = Rule("fuse_dynamic_linear", Op(Linear, x=DYNAMIC, weight=WEIGHT), _fuse_quantized_linear)


def _linear_weight(rw: Rewriter, linear: Linear, w: Dequantize) -> Weight:
    """The weight as [N, K] with its parameters, or the reason why not."""
    _require_stored(rw, w, rank=2)
    if linear.x_axis != -1:
        rw.decline("x is transposed")
    if linear.alpha != 1 or (linear.bias is not None and linear.beta != 1):
        rw.decline(f"alpha={linear.alpha:g}, beta={linear.beta:g}: fold them into the scales first")
    axis = None if w.axis is None else w.axis % 2 - 2
    if axis is not None and (w.group == -1 or axis != (linear.in_axis if w.group else linear.out_axis)):
        along = "outputs" if w.group else "inputs"
        rw.decline(f"the weight's scales run along its {along}: axis {w.axis}, group {w.group}")
    if linear.out_axis == -2:
        return w.q, w.scale, w.zero_point
    if not w.group:
        return rw.const(w.q, _transposed), w.scale, w.zero_point
    zero_point = None if w.zero_point is None else rw.const(w.zero_point, _transposed)
    return rw.const(w.q, _transposed), rw.const(w.scale, _transposed), zero_point


def _transposed(value: Tensor) -> Tensor:
    return value.T


# Convolution


@rule(Op(Conv, x=FLOAT, weight=WEIGHT))
def fuse_conv(m: Match, rw: Rewriter) -> Node:
    conv, w = _seen(Conv, m.root), _seen(Dequantize, m.weight)
    q, scale, zero_point = _conv_weight(rw, conv, w)
    bias = _bias(rw, conv.bias, _size(q), rank=1)
    return rw.call(Q.dequant_conv.default, m.x, q, scale, zero_point, bias, w.dtype, *_window(rw, conv), like=m.root)


def _fuse_quantized_conv(m: Match, rw: Rewriter) -> Node:
    conv, x, w = _seen(Conv, m.root), _seen(Dequantize, m.x), _seen(Dequantize, m.weight)
    if x.axis is not None:
        rw.decline(f"x has scales along axis {x.axis}; an integer convolution needs one for the tensor")
    q, scale, zero_point = _conv_weight(rw, conv, w)
    _require_int32(rw, x, w, q, zero_point)
    weight = (q, scale, zero_point, w.dtype, _bias(rw, conv.bias, _size(q), rank=1))
    window = _window(rw, conv)
    return rw.call(Q.quantized_conv.default, x.q, x.scale, x.zero_point, x.dtype, *weight, *window, like=m.root)


fuse_static_conv = Rule("fuse_static_conv", Op(Conv, x=STATIC, weight=WEIGHT), _fuse_quantized_conv)
fuse_dynamic_conv = Rule("fuse_dynamic_conv", Op(Conv, x=DYNAMIC, weight=WEIGHT), _fuse_quantized_conv)


def _conv_weight(rw: Rewriter, conv: Conv, w: Dequantize) -> Weight:
    if conv.transposed:
        rw.decline("a transposed convolution has no fused op")
    rank = len(conv.stride) + 2
    _require_stored(rw, w, rank=rank)
    if w.axis is not None and (w.group or w.axis % rank != conv.out_axis % rank):
        rw.decline(f"the weight's scales do not run along its output channels: axis {w.axis}, group {w.group}")
    return w.q, w.scale, w.zero_point


def _window(rw: Rewriter, conv: Conv) -> tuple[list[int], list[int], list[int], int]:
    """stride, padding (begin..., end...), dilation, groups: the last operands of the fused ops."""
    if conv.padding is None:
        rw.decline("its padding depends on the size of the input")
    begin, end = ([p[i] for p in conv.padding] for i in (0, 1))
    return list(conv.stride), begin + end, list(conv.dilation), conv.groups


# What follows a fused op


@rule(Op(Elementwise, kind="add", inputs=Inputs(OneOf(FUSED_LINEAR, DEQUANT_LINEAR), Var("bias"))))
def join_bias(m: Match, rw: Rewriter) -> Node:
    """MatMul has no bias operand in ONNX: it comes as an Add."""
    got = operands(m.fused)
    if got["bias"] is not None or const_value(m.bias) is None:
        rw.decline("what is added is no constant, or there is a bias already")
    _require_only_reader(rw, m)
    output = type_of(m.fused)
    rank = len(output.shape) if output is not None and output.shape is not None else 1
    return _with(rw, m, bias=_bias(rw, m.bias, _size(got["weight"]), rank=rank))


@rule(OneOf(Op(Quantize, x=FUSED_LINEAR), Op(Quantize, x=FUSED_CONV)))
def requantize(m: Match, rw: Rewriter) -> Node:
    """quantize(quantized_linear(...)) -> quantized_linear(..., y_scale, y_zero_point, y_dtype): integers in, integers out."""
    y = _seen(Quantize, m.root)
    _require_only_reader(rw, m)
    if y.axis is not None:
        rw.decline(f"the result is quantized with scales along axis {y.axis}, not one for the tensor")
    if (kept := type_of(m.root)) is not None and kept.dtype not in (None, str(storage(y.dtype)).removeprefix("torch.")):
        rw.decline(f"the result is stored as {kept.dtype}, more than one to a byte")
    return _with(rw, m, y_scale=y.scale, y_zero_point=y.zero_point, y_dtype=y.dtype)


def _require_only_reader(rw: Rewriter, m: Match) -> None:
    if len(m.fused.users) > 1:
        rw.decline(f"%{m.fused.name} is read elsewhere too, as it is")


def _with(rw: Rewriter, m: Match, **changed: Any) -> Node:
    """The fused node again with some operands changed, typed as the root that it replaces."""
    got = operands(m.fused) | changed
    target: Any = m.fused.target
    return rw.call(target, *(got[a.name] for a in target._schema.arguments), like=m.root, origin=m.fused)


# Legality


def _seen(interface: Any, node: Node) -> Any:
    """The view that the pattern has already found."""
    return view(interface, node)


def _size(q: Node) -> int:
    """N of integers [N, ...] that are constant."""
    value = const_value(q)
    assert value is not None
    return value.shape[0]


def _require_stored(rw: Rewriter, w: Dequantize, *, rank: int) -> None:
    value = const_value(w.q)
    if value is None:
        rw.decline("the weight is not a constant, one integer per element")
    if value.dim() != rank:
        rw.decline(f"the weight has rank {value.dim()}, not {rank}")


def _require_int32(rw: Rewriter, x: Dequantize, w: Dequantize, q: Node, zero_point: Node | None) -> None:
    """No sum of products may leave int32, whatever x is: |sum| <= max|X - z_x| * sum_k |W - z_w|."""
    weight = const_value(q)
    assert weight is not None
    rows = weight.flatten(1)
    reach, span = _reach(x.zero_point, x.dtype), _reach(zero_point, w.dtype)
    worst = float(reach * span * rows.shape[1])
    zero = None if zero_point is None else const_value(zero_point)
    if worst >= INT32 and (zero_point is None or zero is not None):  # only then is it worth the time to look at the weights
        wide = rows.double() - (0 if zero is None else zero.double().reshape(-1, 1))
        worst = reach * float(wide.abs().sum(1).amax())
    if worst >= INT32:
        rw.decline(f"the sum over {rows.shape[1]} products of {x.dtype} with these weights may reach {worst:.3g}, beyond int32")


def _reach(zero_point: Node | None, dtype: str) -> int:
    """The largest |q - zero_point| that the type allows."""
    low, high = int_range(dtype)
    if zero_point is None:
        return max(high, -low)
    value = const_value(zero_point)
    if value is None or value.numel() == 0:
        return high - low
    return max(high - int(value.to(torch.int32).min()), int(value.to(torch.int32).max()) - low)


def _bias(rw: Rewriter, bias: Node | None, n: int, *, rank: int) -> Node | None:
    """The bias as [n]. Leading axes of size 1 go, as far as they do not raise the result's rank; one number is repeated."""
    if bias is None:
        return None
    kind = type_of(bias)
    shape = None if kind is None else kind.shape
    if shape == (n,):
        return bias
    value = const_value(bias)
    if value is None or value.dim() > max(rank, 2) or value.numel() not in (1, n) or (value.dim() and value.shape[-1] != value.numel()):
        rw.decline(f"the bias has shape {list(shape) if shape is not None else '?'}, not [{n}]")
    return rw.const(bias, lambda b: b.reshape(-1).expand(n))


@dataclass(frozen=True)
class FuseDequantMatmul(Pass):
    """Both dialects. `activations` says which form of x is fused: "static" (scales stored), "dynamic" (scales from dynamic_quantize),
    "float" (any x: only the weight is integers), or "any": the first that fits in this order.

    Numbers: the same reals, summed as integers; where a quantize follows, a value halfway between two steps may go to the other."""

    activations: Literal["any", "static", "dynamic", "float"] = "any"

    name: ClassVar[str] = "fuse_dequant_matmul"
    contract: ClassVar[Contract] = EQUIVALENT(0.05)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        forms = {
            "static": (fuse_static_linear, fuse_static_conv),
            "dynamic": (fuse_dynamic_linear, fuse_dynamic_conv),
            "float": (fuse_linear, fuse_conv),
        }
        chosen = forms.values() if self.activations == "any" else [forms[self.activations]]
        return ctx.apply(gm, [*(r for form in chosen for r in form), join_bias, requantize])
