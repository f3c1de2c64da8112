"""MatMulNBits(x, q, scale) -> MatMulNBits(x, q, Cast(int8) * d), where scales are such products bit for bit.

ONNX Runtime computes the product when it loads the model, before the kernel packs its weights: the file is smaller, the program is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.backends.onnxruntime.emit import Emitter, emit
from qgraph.double_scales import factored
from qgraph.pattern import Match, Op
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, rule
from qgraph.views import const_value

SCALE = 2
"""The place of the scales among the inputs of MatMulNBits and GatherBlockQuantized."""

SMALLEST = 2**10
"""Scales that are worth three operations more."""


def _factor(m: Match, rw: Rewriter) -> Node | None:
    scale = const_value(m.root.args[SCALE])
    found = None if scale is None or scale.dtype != torch.float32 or scale.numel() < SMALLEST else factored(scale)
    if scale is None or found is None:
        return None
    o = Emitter(rw)
    wide = o.cast(o.const(found.q, "scale_int8"), "float32")
    product = o("Mul", wide, o.const(found.d, "scale_factor"), dtype="float32", since=7)
    shaped = o("Reshape", product, o.const(torch.tensor(scale.shape), "shape"), dtype="float32", since=5)
    args = (*m.root.args[:SCALE], shaped, *m.root.args[SCALE + 1 :])
    attributes: dict[str, Any] = dict(m.root.kwargs)
    return rw.call(m.root.target, *args, like=m.root, **attributes)


@rule(Op("com.microsoft::MatMulNBits"))
def factor_scales(m: Match, rw: Rewriter) -> Node | None:
    return _factor(m, rw)


@rule(Op("com.microsoft::GatherBlockQuantized"))
def factor_scales_of_rows(m: Match, rw: Rewriter) -> Node | None:
    return _factor(m, rw)


@dataclass(frozen=True)
class FactorScales(Pass):
    """Scales that `DoubleScales` has made, or that are equal in long runs, take 8 bits in the file."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return emit(gm, ctx, factor_scales, factor_scales_of_rows)
