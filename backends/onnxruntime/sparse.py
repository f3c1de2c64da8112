"""A weight that is mostly zeros is stored as its other numbers and their places; ONNX Runtime makes a dense one of them when it loads.

    linear(x, dequantize(w)) (+ b) + linear(x, S)   ->   linear(x, ScatterND(dequantize(w), places, numbers)) (+ b)
    linear(x, S)                                    ->   linear(x, ScatterND(zeros, places, numbers))

The first is one product of floats with an exact weight, in place of two; it needs an x in float. The CPU provider
has no sparse product that a file can use (SparseToDenseMatMul takes no initializer, 1.31.1), and gathering x per number takes 0.7 times the
float product for one row of x and 1 to 14 times for 128 rows, at 1 % of the numbers; a dense one takes 1.0 always. Small on disk, not in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backends.onnxruntime.emit import Emitter, emit
from qgraph.backends.onnxruntime.sites import WEIGHT, linear_site
from qgraph.pattern import Const, Inputs, Match, OneOf, Op, Var
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.slots import with_operands
from qgraph.views import Elementwise, Linear, const_value, view

FEWEST = 8
"""A place and a number take as much as two numbers: weights with more than 1 / FEWEST of them are stored as they are."""

SMALLEST = 2**10
"""Weights with fewer numbers, zeros included, are not worth the operations."""

KEPT = Op(Linear, "product", single_use=True, x=Var("x"), weight=Const("kept"))
QUANTIZED = Op(Linear, "linear", single_use=True, x=Var("x"), weight=WEIGHT)
BIASED = Op(Elementwise, "biased", single_use=True, kind="add", inputs=Inputs(QUANTIZED, Const("bias")))


@dataclass(frozen=True)
class StoreSparse(Pass):
    """Linears with a constant weight of two axes."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, join_products) + emit(gm, ctx, store_places)


@rule(Op(Elementwise, kind="add", inputs=Inputs(OneOf(QUANTIZED, BIASED), KEPT)))
def join_products(m: Match, rw: Rewriter) -> Node | None:
    """One product with a weight of which some numbers are exact."""
    kept, product, site = _sparse(m.kept), view(Linear, m.product), linear_site(m.linear)
    if kept is None or product is None or site is None:
        return None
    if product.bias is not None or (product.x_axis, product.alpha) != (-1, 1.0) or not site.plain:
        rw.decline("one of the products has a bias or factors of its own, or a transposed x")
    o = Emitter(rw, m.linear)
    weight = _scattered(o, site.v.weight, kept if product.out_axis % 2 == site.v.out_axis % 2 else kept.T)
    found = with_operands(m.linear, weight=weight)
    assert found is not None  # products of both dialects have a place for a weight
    args, kwargs = found
    y = rw.call(m.linear.target, *args, like=m.linear, origin=m.linear, **kwargs)
    bias = m.get("bias")
    return y if bias is None else o("Add", y, bias, like=m.root, since=7)


@rule(Op(Linear, "product", weight=Const("kept")))
def store_places(m: Match, rw: Rewriter) -> Node | None:
    """Zeros are written by an Expand, whose result ONNX Runtime keeps."""
    kept = _sparse(m.kept)
    if kept is None:
        return None
    o = Emitter(rw)
    zero, shape = o.const(torch.zeros((), dtype=kept.dtype), "zero"), o.const(torch.tensor(kept.shape), "shape")
    zeros = o("Expand", zero, shape, like=m.kept, since=8)
    found = with_operands(m.root, weight=_scattered(o, zeros, kept))
    if found is None:
        return None
    args, kwargs = found
    return rw.call(m.root.target, *args, like=m.root, **kwargs)


def _sparse(node: Node) -> Tensor | None:
    """The constant, if it is a float matrix with few numbers other than 0."""
    value = const_value(node)
    if value is None or value.dim() != 2 or not value.is_floating_point() or value.numel() < SMALLEST or max(value.shape) > 2**16:
        return None
    return value if 0 < int(value.count_nonzero()) * FEWEST <= value.numel() else None


def _scattered(o: Emitter, base: Node, kept: Tensor) -> Node:
    """`base` + `kept`, whose places are stored in 16 bits for each axis."""
    places = kept.nonzero()
    numbers = kept[places[:, 0], places[:, 1]].float()  # 16-bit floats are not added to
    index = o.cast(o.const(places.to(torch.uint16), "places"), "int64")
    y = o("ScatterND", o.cast(base, "float32"), index, o.const(numbers, "numbers"), dtype="float32", like=base, since=16, reduction="add")
    return o.cast(y, str(kept.dtype).removeprefix("torch."))
