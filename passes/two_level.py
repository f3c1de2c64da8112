"""fake_quantize(weight, scale) -> fake_quantize(weight, s * k): scales of groups become integer multiples k of one scale s per channel.

Codes times k are then int8 with one scale per channel (see qgraph/two_level.py), which integer products take beside rows of activations
with a scale each: W4A8 as in QServe (Lin et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.fx import GraphModule, Node

from qgraph.ops import Q
from qgraph.pattern import Const, Match, Op, Opt, Var
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.two_level import LARGEST_BITS, Grid, snap, split
from qgraph.types import int_range
from qgraph.views import FakeQuantize, Linear, const_value, view

_ENCODING: dict[str, Any] = {k: Var(k) for k in ("dtype", "axis", "group")}


@rule(Op(FakeQuantize, x=Const("x"), scale=Const("scale"), zero_point=Opt(Const("zero_point")), **_ENCODING))
def to_two_levels(m: Match, rw: Rewriter) -> Node | None:
    if m.group <= 0 or not any(view(Linear, user) is not None for user in m.root.users):
        return None
    value, scale, zero = const_value(m.x), const_value(m.scale), const_value(m.zero_point)
    if value is None or scale is None or value.dim() != 2 or scale.dtype != torch.float32:
        rw.decline(f"@{m.x.target} is no float32 matrix: products of two scales are exact in float32 only")
    low, high = int_range(m.dtype)
    if high - low >= 2**LARGEST_BITS:
        rw.decline(f"codes of {m.dtype} times whole numbers do not fit int8; two levels take at most {LARGEST_BITS} bits")
    grid: Grid = scale.movedim(m.axis, 1), None if zero is None else zero.movedim(m.axis, 1)
    if split(grid, m.dtype) is not None:
        return None
    found = snap(value.movedim(m.axis, 1), grid, m.dtype, m.group)
    named = zip(found, (m.scale, m.zero_point), strict=True)
    new = [None if t is None else rw.const(t.movedim(1, m.axis).contiguous(), name=str(old.target)) for t, old in named]
    return rw.call(Q.fake_quantize.default, m.x, *new, m.dtype, m.axis, m.group, like=m.root)


@dataclass(frozen=True)
class TwoLevel(Pass):
    """Weights of linears in groups, in both dialects; those whose scales have two levels already stay."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, [to_two_levels])
