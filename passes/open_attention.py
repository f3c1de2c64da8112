"""scaled_dot_product_attention(q, k, v, mask) -> matmul(softmax(scale * matmul(q, transpose(k)) + mask), v), on torch graphs.

For translations into a dialect without the whole op: torch.onnx would flatten batch and heads around the transposition, through shapes
computed at run time, and scale q and k one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.formula import kind_of
from qgraph.pattern import Match, Op
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.types import type_of
from qgraph.views import Attention, view

aten = torch.ops.aten


@dataclass(frozen=True)
class OpenAttention(Pass):
    """Attention without dropout and causal mask in its parts. A row whose mask blocks every key is NaN then, and zero in the whole op."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-5)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, [open_attention])


@rule(Op(aten.scaled_dot_product_attention.default))
def open_attention(m: Match, rw: Rewriter) -> Node:
    found, q = view(Attention, m.root), type_of(m.root.all_input_nodes[0])
    if found is None or found.causal or kind_of(found.q) != kind_of(found.k):
        rw.decline("it drops values, shares keys between heads, or makes a causal mask of its own")
    size = q.shape[-1] if q is not None and q.shape else None
    if found.scale is None and not isinstance(size, int):
        rw.decline("the size of a head, which gives the scale, is not known")
    scale = found.scale if found.scale is not None else 1 / math.sqrt(size)  # type: ignore[arg-type]
    scores = rw.call(aten.matmul.default, found.q, rw.call(aten.transpose.int, found.k, -2, -1))
    scores = rw.call(aten.mul.Tensor, scores, scale)
    if found.mask is not None:
        scores = rw.call(aten.add.Tensor, scores, _summand(found.mask, found.q, rw))
    return rw.call(aten.matmul.default, rw.call(aten.softmax.int, scores, -1), found.v)


def _summand(mask: Node, q: Node, rw: Rewriter) -> Node:
    """A mask of booleans as numbers: 0 where it is true, -inf elsewhere."""
    if kind_of(mask)[0] != "bool":
        return mask
    numbers = rw.call(aten.where.Scalar, mask, 0.0, -math.inf)
    dtype = getattr(torch, kind_of(q)[0] or "float32")
    return numbers if dtype == torch.get_default_dtype() else rw.call(aten.to.dtype, numbers, dtype)
