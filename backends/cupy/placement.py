"""What the CUDA kernels take: linears, convolutions of one group, embeddings. Everything else stays in torch's floats.

Products of two activations, grouped and transposed convolutions have no integer kernel: they are refused, so that the ledger says so.
"""

from __future__ import annotations

from typing import Any

from qgraph.backend import ALL, Placement
from qgraph.types import PerGroup, PerToken, QSpec
from qgraph.views import Conv, DataMovement, Embedding, Linear, const_value

GROUP = 32
"""Group sizes are multiples of this one: a group never ends inside of what one thread dequantizes."""

WEIGHT_BITS = (2, 3, 4, 8)


def _accepts(operation: Any, role: str, spec: QSpec) -> str | None:
    if isinstance(operation, Conv) and (obstacle := _conv_obstacle(operation)) is not None:
        return obstacle
    if role == "x":
        return _accepts_x(spec)
    if role == "kv_cache":
        return None if spec.bits in (4, 8) else "a cache has 4 or 8 bits"
    if isinstance(operation, Conv):
        return None if spec.symmetric and spec.signed and spec.bits <= 8 else f"convolutions have signed symmetric weights here, not {spec}"
    return _accepts_embedding(spec) if isinstance(operation, Embedding) else _accepts_weight(operation, role, spec)


def _conv_obstacle(conv: Conv) -> str | None:
    if conv.transposed:
        return "there is no integer kernel for transposed convolution"
    if conv.groups != 1:
        return f"the integer convolution has one group, not {conv.groups}: with few channels in each there is nothing for tensor cores"
    if len(conv.stride) > 2 or conv.padding is None:
        return "the integer convolution has one or two spatial axes and a fixed padding"
    return None


def _accepts_embedding(spec: QSpec) -> str | None:
    if spec.codebook is not None or spec.bits not in (4, 8):
        return f"the kernel for embeddings reads integers of 4 and 8 bits, not {spec}"
    return None


def _accepts_weight(linear: Linear, role: str, spec: QSpec) -> str | None:
    if const_value(linear.weight) is None and role == "weight":
        return "products of two activations have no integer kernel here"
    if linear.x_axis != -1:
        return "the kernels take no transposed x"
    if linear.alpha != 1 or (linear.bias is not None and linear.beta != 1):
        return "the kernels have no factors alpha and beta"
    if spec.codebook is not None:
        return f"no kernel looks weights up in a codebook ({spec}); integers of {_listed(WEIGHT_BITS)} bits have kernels"
    if spec.bits not in WEIGHT_BITS:
        return f"weights of {_listed(WEIGHT_BITS)} bits have kernels, not {spec}"
    if isinstance(spec.granularity, PerGroup) and spec.group % GROUP:
        return f"groups are multiples of {GROUP} here, not {spec.group}"
    return None


def _accepts_x(spec: QSpec) -> str | None:
    if isinstance(spec.granularity, PerGroup):
        return "no kernel quantizes rows of x in groups; per token has one"
    if spec.bits != 8 or spec.codebook is not None:
        return f"tensor cores multiply int8 and uint8 here, not {spec}; prepared for the backend 'reference' it is simulated"
    if spec.axis is None or isinstance(spec.granularity, PerToken):
        return None
    return f"x has one scale, or one per row, not {spec}"


def _listed(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


PLACEMENT = Placement(
    compute=(Linear, Conv),
    dynamic=(Linear, Conv),
    weight_only=(Linear, Embedding),
    share={DataMovement: ALL},
    absorb=frozenset({"relu", "clip"}),
    accepts=_accepts,
)
