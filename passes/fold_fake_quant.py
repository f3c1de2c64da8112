"""fake_quantize(weight) -> dequantize(integers), fake_lookup(weight) -> lookup(codes), fake_quantize(x) -> dequantize(quantize(x)).

What was simulated in float becomes integers, with the same numbers bit for bit: constants are rounded once, now, and activations get
the quantize that a backend fuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import GraphModule, Node

from qgraph.ops import Q
from qgraph.pattern import Const, Match, Op, Opt, Var
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.reference import encode, quantize
from qgraph.rewrite import Rewriter, rule
from qgraph.types import type_of
from qgraph.views import FakeLookup, FakeQuantize, const_value, view

_ENCODING: dict[str, Any] = {k: Var(k) for k in ("dtype", "axis", "group")}


@rule(Op(FakeQuantize, x=Const("x"), scale=Const("scale"), zero_point=Opt(Const("zero_point")), **_ENCODING))
def fold_constant(m: Match, rw: Rewriter) -> Node:
    """The integers are stored under the constant's name and take its place; scale and zero point stay where they are."""
    _require_float_type_of_scale(m, rw)
    value, scale, zero_point = const_value(m.x), const_value(m.scale), const_value(m.zero_point)
    if value is None or scale is None:
        rw.decline(f"@{m.x.target} or its scale is of a type that torch lacks")
    q = rw.const(quantize(value, scale, zero_point, m.dtype, m.axis, m.group), name=f"{m.x.target}_{m.dtype}")
    return rw.call(Q.dequantize.default, q, m.scale, m.zero_point, m.dtype, m.axis, m.group, like=m.root)


@rule(Op(FakeQuantize, x=Var("x"), scale=Var("scale"), zero_point=Var("zero_point"), **_ENCODING))
def split(m: Match, rw: Rewriter) -> Node:
    """The two halves of what fake_quantize computes."""
    _require_float_type_of_scale(m, rw)
    parameters = (m.scale, m.zero_point, m.dtype, m.axis, m.group)
    q = rw.call(Q.quantize.default, m.x, *parameters)
    return rw.call(Q.dequantize.default, q, *parameters, like=m.root)


@rule(Op(FakeLookup, "fake", x=Const("x"), table=Const("table")))
def fold_levels(m: Match, rw: Rewriter) -> Node:
    """The codes take the constant's place; table and scale stay where they are."""
    fake, value, table = view(FakeLookup, m.fake), const_value(m.x), const_value(m.table)
    assert fake is not None  # the pattern has matched
    scale = None if fake.scale is None else const_value(fake.scale)
    if value is None or table is None or (scale is None) != (fake.scale is None):
        rw.decline(f"@{m.x.target}, its table or its scale is no constant of a type that torch knows")
    where = (fake.table_axis, fake.axis, fake.group)
    codes = rw.const(encode(value, table, scale, *where), name=f"{m.x.target}_codes")
    return rw.call(Q.lookup.default, codes, m.table, fake.scale, *where, like=m.root)


def _require_float_type_of_scale(m: Match, rw: Rewriter) -> None:
    """fake_quantize rounds to x's float type, dequantize to scale's: the same only where the types are."""
    x, scale = type_of(m.x), type_of(m.scale)
    if x is not None and scale is not None and None not in (x.dtype, scale.dtype) and x.dtype != scale.dtype:
        rw.decline(f"x is {x.dtype} but its scale is {scale.dtype}; store the scale in x's type")


@dataclass(frozen=True)
class FoldFakeQuant(Pass):
    """Both dialects. A constant that several nodes read keeps its float form only for those that read it unquantized."""

    name: ClassVar[str] = "fold_fake_quant"
    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, (fold_constant, fold_levels, split))
