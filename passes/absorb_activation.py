"""quantize(clip(x, low, high)) -> quantize(x): saturation does what the activation did.

Exact when the quantizer sends everything at or below `low` to its smallest integer and everything at or above `high` to its largest:

    round(low / scale) + zero_point <= qmin      and      round(high / scale) + zero_point >= qmax

relu is clip(x, 0, inf). What remains is producer -> quantize, the form that integer kernels are made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.ops import Q
from qgraph.pattern import Const, Op, Opt, Var
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import Match, Rewriter, rule
from qgraph.types import int_range
from qgraph.views import Activation, Quantize, const_value

_CLIP = Op(Activation, kind=Var("kind"), x=Var("x"), low=Var("low"), high=Var("high"), single_use=True)


@rule(Op(Quantize, x=_CLIP, scale=Const("scale"), zero_point=Opt(Const("zero_point")), dtype=Var("dtype"), axis=None, group=0))
def absorb(m: Match, rw: Rewriter) -> Node | None:
    scale = const_value(m.scale)
    if m.kind not in ("relu", "clip") or scale is None:
        return None
    low, high = (-torch.inf if m.low is None else m.low), (torch.inf if m.high is None else m.high)
    limits = torch.tensor([low, high], dtype=torch.float32)
    ends = Q.quantize(limits, scale.float(), const_value(m.zero_point), m.dtype).tolist()
    if ends != list(int_range(m.dtype)):
        rw.decline(f"{m.kind} keeps values in [{low:g}, {high:g}], which is {ends} in {m.dtype}: saturation alone would let more through")
    return rw.call(Q.quantize.default, m.x, m.scale, m.zero_point, m.dtype, like=m.root)


@dataclass(frozen=True)
class AbsorbActivation(Pass):
    name: ClassVar[str] = "absorb_activation"
    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, [absorb])
