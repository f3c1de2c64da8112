"""GPTQ: w[n, k] = (q[k, n] - zero[g, n]) * scale[g, n] with g = g_idx[k]; codes packed along k, zero points along n.

    qweight int32 [K * bits / 32, N], qzeros int32 [G, N * bits / 32], scales [G, N], g_idx int32 [K] (optional)

All sizes follow from the shapes. Files of version 1 hold zero - 1 (modulo 2**bits), those of version 2 ("checkpoint_format":
"gptq_v2") hold the zero point itself. Source: the formats that GPTQ's and AutoGPTQ's pack() write.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qgraph.checkpoints.bits import unpack
from qgraph.checkpoints.tensor import QuantizedTensor, grouping, order_of_groups, shaped
from qgraph.errors import ModelError
from qgraph.types import QSpec

NAMES = ("qweight", "qzeros", "scales", "g_idx")


def decode(name: str, parts: Mapping[str, Tensor], *, version: int) -> QuantizedTensor:
    """The weight of layer `name` from its stored `parts`. Raises ModelError for shapes that fit no number of bits, uneven groups."""
    qweight, qzeros, scales = (parts[p] for p in NAMES[:3])
    groups, n = scales.shape
    bits = qzeros.shape[1] * 32 // n
    k = qweight.shape[0] * 32 // bits if 2 <= bits <= 8 else 0
    fits = qweight.shape == (k * bits // 32, n) and qzeros.shape == (groups, n * bits // 32) and groups and k >= groups
    if not fits:
        raise ModelError(f"{name}: {_shapes(parts)} fit no number of bits from 2 to 8")
    zero = unpack(qzeros, bits, n)
    if version == 1:
        zero = (zero + 1) & (2**bits - 1)
    q, order = unpack(qweight.T, bits, k), order_of_groups(name, parts.get("g_idx"), k, groups)
    return QuantizedTensor(
        q=q if order is None else q[:, order],
        scale=shaped(scales.T),
        zero_point=shaped(zero.T),
        spec=QSpec(f"uint{bits}", symmetric=False, granularity=grouping(k, groups)),
        order=order,
    )


def _shapes(parts: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{part} {list(t.shape)}" for part, t in parts.items())
