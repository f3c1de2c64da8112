"""Gemm(x, dequantize(blocks of [N, K]), transB=1) -> Gemm(x, dequantize(blocks of [K, N])), the layout that builders know for blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.ops import Q
from qgraph.pattern import Const, Match, Op, Opt, Var
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.views import Dequantize, view

STORED = Op(Q.dequantize.default, "w", q=Const("q"), scale=Const("scale"))


def _turned(t: Tensor) -> Tensor:
    return t.T


@rule(Op("::Gemm", A=Var("x"), B=STORED, C=Opt(Var("bias")), transB=1))
def turn_blocks(m: Match, rw: Rewriter) -> Node | None:
    w = view(Dequantize, m.w)
    if w is None or not w.group:
        return None
    scale, zero = rw.const(w.scale, _turned), None if w.zero_point is None else rw.const(w.zero_point, _turned)
    turned = rw.call(Q.dequantize.default, rw.const(w.q, _turned), scale, zero, w.dtype, 0, w.group)
    operands = (m.x, turned) if m.bias is None else (m.x, turned, m.bias)
    attributes: dict[str, Any] = {**m.root.kwargs, "transB": 0}
    return rw.call(m.root.target, *operands, like=m.root, **attributes)


@dataclass(frozen=True)
class TurnBlocks(Pass):
    """Weights in groups alone."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, [turn_blocks])
