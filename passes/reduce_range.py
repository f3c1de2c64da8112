"""fake_quantize(weight, scale) -> fake_quantize(weight, f * scale), f >= 1 as small as can be so that every sum is exact on a machine.

Machines that add two neighbouring products in 16 bits need |q1| + |q2| <= 128 wherever both weights have one sign (saturation.py). Tools
halve the range of all weights for that, which costs 6 dB. Large weights are rarely neighbours: f per channel is about 1.25 and costs 2 dB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.ledger import Ledger, state
from qgraph.ops import Q
from qgraph.pattern import Const, Match, Op, Opt, Var
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.reference import quantize
from qgraph.rewrite import Rewriter, Rule
from qgraph.saturation import Product, accumulator, in_kernel_order, label_of, product_of
from qgraph.views import FakeQuantize, const_value

_ENCODING: dict[str, Any] = {k: Var(k) for k in ("dtype", "axis", "group")}
_WEIGHT = Op(FakeQuantize, x=Const("x"), scale=Const("scale"), zero_point=Opt(Const("zero_point")), **_ENCODING)


@dataclass(frozen=True)
class ReduceRange(Pass):
    """Changes the scales of channels whose sums can saturate on `target` (a name of saturation.TARGETS), and no others; the type of the
    integers stays. Raises RecipeError for an unknown target."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"

    target: str = "x86-avx2"

    def __post_init__(self) -> None:
        accumulator(self.target)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return ctx.apply(gm, [Rule(self.name, _WEIGHT, _reduce(self.target, state(gm).ledger))])


def exact_on(target: str, stages: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """The stages of a recipe with those that make sums exact on a machine (a name of saturation.TARGETS), unless they are there already.

    Once before the first stage that looks at the quantized graph, which then works with the scales that stay; and once behind them, for
    integers that they have moved beyond the limit."""
    if accumulator(target).products == 1 or any(isinstance(p, ReduceRange) for p in stages):
        return stages
    first = next((i for i, p in enumerate(stages) if p.at == "quantized"), len(stages))
    behind = stages[first:]
    return (*stages[:first], ReduceRange(target), *behind, *([ReduceRange(target)] if behind else []))


def _reduce(target: str, ledger: Ledger) -> Callable[[Match, Rewriter], Node | None]:
    on = accumulator(target)

    def build(m: Match, rw: Rewriter) -> Node | None:
        readers = [p for user in m.root.users if (p := product_of(user)) is not None and p.v.weight is m.root]
        if all(p.exact(on) for p in readers):
            return None
        value, scale, zero_point = const_value(m.x), const_value(m.scale), const_value(m.zero_point)
        if value is None or scale is None:
            rw.decline(f"@{m.x.target} or its scale is of a type that torch lacks")
        if zero_point is not None and bool(zero_point.any()):
            rw.decline("the weight has a zero point, towards which a coarser scale moves its integers, not towards 0")

        def excess(factor: Tensor) -> Tensor:
            """In the shape of the scale: how far the sums are above what the accumulator holds."""
            q = quantize(value, (scale * factor).to(scale.dtype), None, m.dtype, m.axis, m.group)
            found = [_per_scale(replace(p, q=in_kernel_order(p.v, q)).excess(on), p, m.axis, q.dim()) for p in readers]
            return torch.stack([f.expand(factor.shape) for f in found]).amax(0)

        factor = torch.ones_like(scale, dtype=torch.float32)
        while bool(((missing := excess(factor)) > 1).any()):
            factor = factor * missing.clamp(min=1)  # sums are integers: at least 129 / 128 each time
        new = rw.const((scale * factor).to(scale.dtype), name=str(m.scale.target))
        for p in readers:
            _record(p, target, factor, ledger)
        return rw.call(Q.fake_quantize.default, m.x, new, m.zero_point, m.dtype, m.axis, m.group, like=m.root)

    return build


def _per_scale(excess: Tensor, p: Product, axis: int | None, rank: int) -> Tensor:
    """[N] where the scale runs along the output channels, else the largest of all."""
    return excess if axis is not None and axis % rank == p.v.out_axis % rank else excess.amax()


def _record(p: Product, target: str, factor: Tensor, ledger: Ledger) -> None:
    old = ledger.get(label_of(p.node, ledger), "weight")
    if old is not None:
        changed = int((factor > 1).sum())
        what = f"scales up to {float(factor.max()):.2f} times larger in {changed} of {factor.numel()} channels, exact on {target}"
        ledger.record(replace(old, by=ReduceRange.name, reason=what))
