"""Add -> Sum where ONNX Runtime would fuse the addition into a kernel that takes longer than both.

    LayerNormalization(Add(x, y))     SkipLayerNormalization, 4 times the time of Sum and LayerNormalization
    Gelu(Add(x, bias))                BiasGelu, 1.5 times

Measured with 1.31 on AVX512. Sum is the same addition, under a name that these fusions do not look for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from qgraph.backends.onnxruntime.emit import Emitter, emit
from qgraph.pattern import Match, Op, Var
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.types import type_of
from qgraph.views import key

SLOWER_TOGETHER = frozenset({"::LayerNormalization", "::Gelu", "com.microsoft::Gelu"})
"""Operators whose fusion with an addition before them is slower than the parts."""


@rule(Op("::Add", A=Var("a"), B=Var("b")))
def keep_apart(m: Match, rw: Rewriter) -> Node | None:
    """Sum has kernels for float32 and float64 only."""
    t = type_of(m.root)
    if t is None or t.dtype != "float32" or not any(key(u.target) in SLOWER_TOGETHER and u.args[0] is m.root for u in m.root.users):
        return None
    return Emitter(rw)("Sum", m.a, m.b, like=m.root, since=8, main=True)


@dataclass(frozen=True)
class KeepApart(Pass):
    """Additions in front of layer norms and gelus stay operators of their own."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, keep_apart)
