"""What a lowering asks about a product with a quantized weight: canonical weight, how x is quantized, the bias that belongs to it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.onnxruntime import two_level
from qgraph.backends.onnxruntime.emit import Emitter
from qgraph.ops import Q
from qgraph.pattern import Const, Inputs, Match, Op
from qgraph.rewrite import Rewriter, Rule
from qgraph.types import type_of
from qgraph.views import Conv, Dequantize, DynamicQuantize, Elementwise, Linear, const_value, is_const, view

HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Weight:
    """A linear's weight as the qg ops have it: q [N, K]; scale () per tensor, [N] or [N, ceil(K / group)]."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None
    dtype: str
    group: int

    @property
    def symmetric(self) -> bool:
        return self.zero_point is None or not bool(self.zero_point.any())

    @property
    def per_channel(self) -> Tensor:
        """The scale as [N]."""
        return self.scale.reshape(-1).expand(self.q.shape[0])


@dataclass(frozen=True)
class LinearSite:
    """`root` is the linear, or the addition of a constant bias [N] behind it."""

    root: Node
    node: Node
    v: Linear
    w: Dequantize
    bias: Node | None

    @property
    def plain(self) -> bool:
        """y = x . W + b with the rows of x along its last axis."""
        return self.v.x_axis == -1 and self.v.alpha == 1.0 and self.v.beta == 1.0

    @property
    def half(self) -> str | None:
        """The 16-bit float type of the model here, None for float32."""
        scale = const_value(self.w.scale)
        name = "" if scale is None else str(scale.dtype).removeprefix("torch.")
        return name if name in HALF else None

    def weight(self) -> Weight | None:
        """None when the weight is no constant matrix, or its scales lie across the wrong axis."""
        q, scale = const_value(self.w.q), const_value(self.w.scale)
        zero = None if self.w.zero_point is None else const_value(self.w.zero_point)
        if q is None or scale is None or q.dim() != 2:
            return None
        turned = self.v.out_axis % 2 == 1
        axis = None if self.w.axis is None else (self.w.axis % 2) ^ turned  # 0: along N, 1: along K
        if axis is not None and axis != (1 if self.w.group else 0):
            return None
        if turned:
            q = q.T
            if self.w.group:
                scale, zero = scale.T, None if zero is None else zero.T
        return Weight(q, scale, zero, self.w.dtype, self.w.group)

    def int8(self) -> Weight | None:
        """The weight as integer products take it: groups whose scales have two levels are one row of int8 with one scale."""
        w = self.weight()
        return w if w is None or not w.group else two_level.expanded(w) or w

    def kn(self, rw: Rewriter) -> Node:
        """The integers of `int8` as [K, N]: the stored constant itself where it lies so."""
        w = self.weight()
        if w is not None and w.group:
            return two_level.expression(w, Emitter(rw, self.node))
        return self.w.q if self.v.out_axis % 2 == 1 else rw.const(self.w.q, _turn)

    def bias_value(self) -> Tensor | None:
        """The constant bias as [N], or None when there is none of that kind."""
        value, q = None if self.bias is None else const_value(self.bias), const_value(self.w.q)
        if value is None or q is None:
            return None
        n = q.shape[self.v.out_axis]
        return value.reshape(-1).expand(n) if value.numel() in (1, n) and value.shape[-1:] in ((), (1,), (n,)) else None


def _turn(t: Tensor) -> Tensor:
    return t.T


WEIGHT = Op(Q.dequantize.default, "weight", q=Const("q"))
LINEAR = Op(Linear, "linear", weight=WEIGHT)
BIASED = Op(Elementwise, kind="add", inputs=Inputs(Op(Linear, "linear", single_use=True, weight=WEIGHT), Const("bias")))


def linear_rules(name: str, build: Callable[[LinearSite, Rewriter], Node | None]) -> tuple[Rule, Rule]:
    """`build` for a linear with a constant integer weight, alone or with the constant bias that is added to it."""

    def alone(m: Match, rw: Rewriter) -> Node | None:
        return build(_site(m.linear, None, m.linear), rw) if added_bias(m.linear) is None else None

    def biased(m: Match, rw: Rewriter) -> Node | None:
        return build(_site(m.linear, m.bias, m.root), rw) if added_bias(m.linear) is m.root else None

    return Rule(name, BIASED, biased), Rule(name, LINEAR, alone)


def _site(node: Node, bias: Node | None, root: Node) -> LinearSite:
    found = linear_site(node)
    assert found is not None  # the pattern has matched
    return LinearSite(root, node, found.v, found.w, found.v.bias if bias is None else bias)


def linear_site(node: Node) -> LinearSite | None:
    """A linear with a quantized weight, without an addition behind it."""
    v = view(Linear, node)
    w = None if v is None else view(Dequantize, v.weight)
    return None if v is None or w is None else LinearSite(node, node, v, w, v.bias)


def added_bias(node: Node) -> Node | None:
    """The addition of a constant [N] (or [1, ..., N]) that is the only reader of a linear without a bias of its own."""
    v = view(Linear, node)
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    add = None if reader is None else view(Elementwise, reader)
    if v is None or v.bias is not None or add is None or add.kind != "add" or len(add.inputs) != 2:
        return None
    other = add.inputs[1] if add.inputs[0] is node else add.inputs[0]
    value, weight = const_value(other), view(Dequantize, v.weight)
    q = None if weight is None else const_value(weight.q)
    if value is None or q is None or q.dim() != 2:
        return None
    n = q.shape[v.out_axis]
    adds_axes = value.dim() > max(rank(v.x) or 1, 1)
    return reader if value.numel() == n and value.shape[-1:] == (n,) and not adds_axes else None


def dynamic_source(x: Node) -> tuple[Node, DynamicQuantize, Dequantize] | None:
    """x = dequantize(dynamic_quantize(source)) -> (source, the quantization, the dequantization)."""
    outer = view(Dequantize, x)
    q = None if outer is None else outer.q
    if outer is None or q is None or q.target is not operator.getitem:
        return None
    inner = view(DynamicQuantize, q.args[0])
    return None if inner is None else (inner.x, inner, outer)


def static_source(x: Node) -> Dequantize | None:
    """x = dequantize(integers) with one constant scale for the whole tensor, in 8 bits, float32."""
    v = view(Dequantize, x)
    if v is None or v.axis is not None or v.dtype not in ("uint8", "int8") or is_const(v.q) or not is_const(v.scale):
        return None
    scale = const_value(v.scale)
    return v if scale is not None and scale.dtype == torch.float32 else None


def is_integer_site(node: Node, weight: Node) -> bool:
    """True when ONNX Runtime computes `node` in integers if `weight` is handed to it through DequantizeLinear."""
    v = view(Linear, node) or view(Conv, node)
    if v is None or v.weight is not weight or static_source(v.x) is None or (isinstance(v, Conv) and v.transposed):
        return False
    w = view(Dequantize, weight)
    return w is not None and not w.group and w.dtype in ("int8", "uint8")


def constant(node: Node | None, rw: Rewriter) -> Tensor:
    """The tensor behind a node; declines when it is not a constant."""
    value = None if node is None else const_value(node)
    if value is None:
        rw.decline("a scale or weight is not a constant")
    return value


def rank(node: Node) -> int | None:
    t = type_of(node)
    return None if t is None else t.rank
