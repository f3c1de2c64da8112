"""Where engines of TensorRT's kind compute in integers, and the formats that they take (developer guide, "Working with Quantized Types").

  activations  int8, symmetric, one scale per tensor, known before the engine is built
  weights      int8, symmetric, one scale per output channel or per tensor
  biases       float; the builder quantizes them itself
  outputs      quantized only where a reader is: every fused kernel also exists with a float output
  sums         Q/DQ on both operands of a residual add whose result is read in integers, so that it is fused with one of its producers
  weight-only  int4, symmetric, in blocks of 64 or 128 along the inputs of a linear: DequantizeLinear of [K, N], opset 21

Left out: uint8, zero points other than 0, ranges found at run time, groups beside integer x, int8 weights before float x. Operands and
result of a concatenation share one scale.
"""

from __future__ import annotations

from typing import Any

from qgraph.backend import ALL, Placement
from qgraph.types import PerAxis, PerGroup, QSpec
from qgraph.views import Concat, Conv, DataMovement, Elementwise, Linear, Pool

BLOCKS = (64, 128)


def _accepts(operation: Any, role: str, spec: QSpec) -> str | None:
    if role == "weight alone":
        return None if spec.group else "there is no kernel for an int8 weight with float x"
    if role == "kv_cache":
        return "attention reads floats here"
    if isinstance(spec.granularity, PerGroup):
        if role == "weight" and isinstance(operation, Linear) and (spec.dtype, spec.symmetric) == ("int4", True) and spec.group in BLOCKS:
            return None
        return f"{role} has one scale per tensor or channel here, or int4 sym per group of 64 or 128 in a linear's weight, not {spec}"
    if spec.bits != 8 or not spec.signed or not spec.symmetric:
        return f"{role} is int8 and symmetric here, not {spec}"
    if role == "x" and isinstance(spec.granularity, PerAxis):
        return f"activations have one scale per tensor here, not {spec}"
    return None


PLACEMENT = Placement(
    compute=(Linear, Conv),
    weight_only=(Linear,),
    follow={Elementwise: frozenset({"add"}), Pool: frozenset({"average", "global_average"})},
    share={Pool: frozenset({"max"}), DataMovement: ALL, Concat: ALL},
    absorb=frozenset({"relu"}),
    accepts=_accepts,
    x_format=QSpec("int8", symmetric=True),
)
