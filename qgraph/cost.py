"""How long a product takes in float and in integers, from its sizes: enough to see where quantizing gains nothing.

    time = max(multiply-adds / rate, bytes of the weight / bandwidth)

A machine is data (`Machine`); a backend has one for where it runs. Times are estimates for two threads and an otherwise idle machine, good
to about a factor of 2. tests/bench/cost.py prints them beside measured ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.fx import Node

from qgraph.types import type_of
from qgraph.views import Conv, Linear

UNKNOWN = 32
"""What a symbolic dimension counts as."""


@dataclass(frozen=True)
class Kernel:
    """`rate`, `thin`: multiply-adds per us, of dense products and of convolutions with at most 3 channels per group; `bandwidth`: bytes
    of weights per us; `width`: bytes of one weight."""

    rate: float
    thin: float
    bandwidth: float
    width: int

    def time(self, work: Work) -> float:
        """us."""
        return max(work.products / (self.thin if work.thin else self.rate), work.weights * self.width / self.bandwidth)


@dataclass(frozen=True)
class Machine:
    """`convert`: elements quantized or dequantized per us."""

    float32: Kernel
    int8: Kernel
    convert: float

    def gain(self, work: Work, *, quantize: bool, dequantize: bool) -> float:
        """us that integers save. `quantize`: x is made in float, so integers have to quantize it; otherwise float has to dequantize it.
        `dequantize`: the same of the result, when it is read in float."""
        edges = (work.inputs if quantize else -work.inputs) + (work.outputs if dequantize else -work.outputs)
        return self.float32.time(work) - self.int8.time(work) - edges / self.convert


@dataclass(frozen=True)
class Work:
    """Sizes of one product: multiply-adds, elements of its weight, of its x and of its result."""

    products: int
    weights: int
    inputs: int
    outputs: int
    thin: bool = False


def work_of(v: Linear | Conv) -> Work | None:
    """None where the rank of x is unknown. An unknown size counts as `UNKNOWN`: all parts of a gain grow with it alike."""
    x, weight = _shape(v.x), _shape(v.weight)
    if x is None or weight is None:
        return None
    if isinstance(v, Linear):
        if v.x_axis != -1 or len(weight) != 2:
            return None
        outputs = math.prod(x[:-1]) * weight[v.out_axis]
        return Work(outputs * weight[v.in_axis], math.prod(weight), math.prod(x), outputs)
    if v.transposed or v.padding is None:
        return None
    spatial = [
        (size + sum(pad) - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(x[2:], v.padding, v.dilation, weight[2:], v.stride, strict=True)
    ]
    outputs = x[0] * weight[0] * math.prod(spatial)
    return Work(outputs * math.prod(weight[1:]), math.prod(weight), math.prod(x), outputs, weight[1] <= 3)


def _shape(node: Node) -> list[int] | None:
    t = type_of(node)
    return None if t is None or t.shape is None else [d if isinstance(d, int) else UNKNOWN for d in t.shape]
