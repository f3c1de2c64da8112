"""fake_quantize(weight, scale) -> fake_quantize(weight, q * d): scales of groups as 8-bit integers times one float per run of them.

The backend stores such scales in 8 bits (double_scales.factored finds them again): with groups of 32, 4.27 bits per weight instead of 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch.fx import GraphModule, Node

from qgraph.double_scales import LONGEST, SHORTEST, nearest, run_length
from qgraph.errors import RecipeError
from qgraph.ledger import state
from qgraph.ops import Q
from qgraph.pattern import Const, Match, Op, Opt, Var
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.rewrite import Rewriter, Rule
from qgraph.saturation import label_of
from qgraph.views import FakeQuantize, const_value

_ENCODING: dict[str, Any] = {k: Var(k) for k in ("dtype", "axis", "group")}
_WEIGHT = Op(FakeQuantize, x=Const("x"), scale=Const("scale"), zero_point=Opt(Const("zero_point")), **_ENCODING)


@dataclass(frozen=True)
class DoubleScales(Pass):
    """Scales of weights in groups. `size`: how many of them share a float at most; the largest divisor of their number is taken.

    Before stages that round weights, those make up for the change; a stage that chooses scales itself undoes it, so it comes behind one.
    Raises RecipeError for a size that is not from 16 to 256."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"

    size: int = 64

    def __post_init__(self) -> None:
        if not SHORTEST <= self.size <= LONGEST:
            raise RecipeError(f"stage double-scales: size is from {SHORTEST} to {LONGEST} scales, not {self.size}")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        def build(m: Match, rw: Rewriter) -> Node | None:
            scale = const_value(m.scale)
            if m.group <= 0 or scale is None:
                return None
            if scale.dtype != torch.float32:
                rw.decline(f"scales of {m.x.target} are {str(scale.dtype).removeprefix('torch.')}, of which 8 bits are no small part")
            length = run_length(scale.numel(), self.size)
            if length is None:
                rw.decline(f"{scale.numel()} scales of {m.x.target} cannot be cut into equal runs of {SHORTEST} to {self.size}")
            new = nearest(scale, length).value.reshape(scale.shape)
            if torch.equal(new, scale):
                return None
            for user in m.root.users:
                self.record(user, gm, length)
            return rw.call(
                Q.fake_quantize.default, m.x, rw.const(new, name=str(m.scale.target)), m.zero_point, m.dtype, m.axis, m.group, like=m.root
            )

        return ctx.apply(gm, [Rule(self.name, _WEIGHT, build)])

    def record(self, user: Node, gm: GraphModule, length: int) -> None:
        ledger = state(gm).ledger
        old = ledger.get(label_of(user, ledger), "weight")
        if old is not None:
            ledger.record(replace(old, by=self.name, reason=f"scales in 8 bits, with a float for {length} of them"))
