"""Which kernels a batch wants, decided once, when the model is loaded (the rule of OpenPPL's LLM engine).

With up to 15 rows a linear waits for its weight: 4-bit weights in groups beside float activations move the fewest bytes. From 16 rows on
the tensor cores are the limit, and int8 activations with a weight of int8 per channel run at twice the rate of half.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph import reference
from qgraph.ledger import Entry, state
from qgraph.ops import Q
from qgraph.pattern import Match, Op
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.qparams import choose_qparams, minmax
from qgraph.rewrite import Rewriter, Rule
from qgraph.text import path_of
from qgraph.types import PerAxis, PerToken, QSpec
from qgraph.views import const_value, operands

COMPUTE_BOUND = 16
"""Rows from which tensor cores, not memory, are the limit."""

WEIGHT = QSpec("int8", granularity=PerAxis(0))
ROWS = QSpec("int8", granularity=PerToken(), dynamic=True)


@dataclass(frozen=True)
class RowsInIntegers(Pass):
    """For `rows` of 16 or more, linears that only store their weight in integers compute in integers, too: x is quantized per token to int8,
    and a weight in groups or of fewer bits becomes int8 with one scale per output channel. Below 16, or with rows None, nothing changes.

    It changes numbers, each change is in the ledger, and it wants `fuse_dequant_matmul` before it."""

    rows: int | None = None

    contract: ClassVar[Contract] = LOSSY

    def run(self, gm: GraphModule, ctx: Context) -> int:
        if self.rows is None or self.rows < COMPUTE_BOUND:
            return 0
        return ctx.apply(gm, [Rule(self.name, Op(Q.dequant_linear.default), self._build)])

    def _build(self, m: Match, rw: Rewriter) -> Node:
        """dequant_linear(x, w) -> quantized_linear(dynamic_quantize(x), w as int8 per channel)"""
        got = operands(m.root)
        w, scale = _as_int8(rw, got)
        rows = rw.call(Q.dynamic_quantize.default, got["x"], ROWS.dtype, True, ROWS.axis, ROWS.group)
        q, x_scale = (rw.call(operator.getitem, rows, i) for i in (0, 1))
        path, reason = path_of(m.root), f"batches of {self.rows} rows are limited by tensor cores"
        state(rw.gm).ledger.record(Entry(path, "Linear", "x", str(ROWS), self.name, reason))
        state(rw.gm).ledger.record(Entry(path, "Linear", "weight", str(WEIGHT), self.name, reason))
        return rw.call(Q.quantized_linear.default, q, x_scale, None, ROWS.dtype, w, scale, None, WEIGHT.dtype, got["bias"], like=m.root)


def _as_int8(rw: Rewriter, got: dict[str, Any]) -> tuple[Node, Node]:
    """The weight as int8 [N, K] and its scale [N]; as it is, where it has that form already."""
    q, scale, zero = (None if got[k] is None else const_value(got[k]) for k in ("weight", "scale", "zero_point"))
    if q is None or scale is None or (got["zero_point"] is not None and zero is None):
        rw.decline("the weight is not constant")
    if (worst := 128 * 127 * q.shape[1]) >= 2**31:
        rw.decline(f"the sum over {q.shape[1]} products of int8 may reach {worst:.3g}, beyond int32")
    if got["dtype"] == "int8" and zero is None and scale.dim() <= 1:
        return got["weight"], got["scale"]
    new_scale, codes = _requantized(
        reference.dequantize(q, scale, zero, got["dtype"], reference.weight_axis(scale, got["group"]), got["group"])
    )
    return rw.const(codes, name=str(got["weight"].target)), rw.const(new_scale.to(scale.dtype), name=str(got["scale"].target))


def _requantized(w: Tensor) -> tuple[Tensor, Tensor]:
    """(scale [N], int8 codes [N, K]) of a float weight, with the range of each row."""
    scale, _ = choose_qparams(*minmax(w, 0, 0), WEIGHT)
    return scale, reference.quantize(w.to(torch.float32), scale, None, WEIGHT.dtype, 0)
