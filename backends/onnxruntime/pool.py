"""quantize(ReduceMean(dequantize(x))) over all spatial axes -> quantize(GlobalAveragePool(...)), which has an integer kernel."""

from __future__ import annotations

from torch.fx import Node

from qgraph.backends.onnxruntime.emit import Emitter
from qgraph.ops import Q
from qgraph.pattern import Match, Op, Var
from qgraph.rewrite import Rewriter, rule
from qgraph.types import type_of
from qgraph.views import Dequantize, Pool, key

MEAN = Op(Pool, "pool", kind="global_average", x=Op(Dequantize, "x"), single_use=True)


@rule(Op(Q.quantize.default, x=MEAN, scale=Var("scale"), zero_point=Var("zero"), dtype=Var("dtype"), axis=None))
def pool_in_integers(m: Match, rw: Rewriter) -> Node | None:
    """Case 1: the axes are kept. Case 2: they are dropped, by a Flatten of the integers."""
    t, rank = type_of(m.pool), _rank(m.x)
    if key(m.pool.target) != "::ReduceMean" or t is None or t.rank is None or rank is None:
        return None
    o = Emitter(rw, m.pool)
    pooled = o("GlobalAveragePool", m.x, main=True)
    q = rw.call(Q.quantize.default, pooled, m.scale, m.zero, m.dtype)
    return q if t.rank == rank else o("Flatten", q, like=m.root, since=9, axis=1)


def _rank(x: Node) -> int | None:
    t = type_of(x)
    return None if t is None else t.rank
