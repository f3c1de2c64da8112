"""Codes of at most 4 bits whose scales have two levels -> int8 [K, N] with one scale per output channel (qgraph/two_level.py).

    Cast(Reshape((Cast(codes, float) - z) * k), int8)

The file has the codes; ONNX Runtime computes the int8 weight when it loads the model, and integer products read it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from qgraph.backends.onnxruntime.emit import FLOAT, INT8, Emitter
from qgraph.reference import spread
from qgraph.two_level import LARGEST_BITS, split
from qgraph.types import int_range

if TYPE_CHECKING:
    from torch.fx import Node

    from qgraph.backends.onnxruntime.sites import Weight


def expanded(w: Weight) -> Weight | None:
    """The weight in int8; None where its scales have one level, or its codes more than 4 bits."""
    k = _multiples(w)
    if k is None:
        return None
    zero = torch.zeros_like(k[1]) if w.zero_point is None else w.zero_point.float()
    q = (w.q.float() - spread(zero, w.q, 1, w.group)) * spread(k[1], w.q, 1, w.group)
    return replace(w, q=q.to(torch.int8), scale=k[0], zero_point=None, dtype="int8", group=0)


def _multiples(w: Weight) -> tuple[Tensor, Tensor] | None:
    low, high = int_range(w.dtype)
    return split((w.scale, w.zero_point), w.dtype) if high - low < 2**LARGEST_BITS and w.scale.dtype == torch.float32 else None


def expression(w: Weight, o: Emitter) -> Node:
    """The integers of `expanded` [K, N], computed from the codes."""
    found = _multiples(w)
    assert found is not None  # `expanded` looked
    (n, k), groups = w.q.shape, w.scale.shape[1]
    codes = pad(w.q, (0, groups * w.group - k)).T.contiguous()
    y = o("Cast", o.integers(codes, "uint4" if w.dtype.startswith("u") else "int4", "codes"), dtype="float32", since=21, to=FLOAT)
    y = o("Reshape", y, o.const(torch.tensor([groups, w.group, n]), "groups"), dtype="float32", since=5)
    for op_type, by in (("Sub", w.zero_point), ("Mul", found[1])):
        if by is not None:
            y = o(op_type, y, o.const(by.float().T[:, None].contiguous(), op_type), dtype="float32", since=7)
    y = o("Reshape", y, o.const(torch.tensor([groups * w.group, n]), "matrix"), dtype="float32", since=5)
    if codes.shape[0] > k:
        y = o("Slice", y, *(o.const(torch.tensor([i]), "bound") for i in (0, k, 0)), dtype="float32", since=10)
    return o("Cast", y, dtype="int8", since=9, to=INT8)
