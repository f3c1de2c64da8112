"""AWQ, layout "gemm": w[n, k] = (q[k, n] - zero[g, n]) * scale[g, n], 4 bits, eight columns in a word in the order 0, 2, 4, 6, 1, 3, 5, 7.

    qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]

Source: the format that AutoAWQ's WQLinear_GEMM writes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qgraph.checkpoints.bits import unpack
from qgraph.checkpoints.tensor import QuantizedTensor, grouping, shaped
from qgraph.errors import ModelError
from qgraph.types import QSpec

BITS = 4
_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word column i lies: the inverse of the order above."""


def is_awq(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """GPTQ has the same names; AWQ packs along the outputs."""
    return shapes["qweight"][-1] * (32 // BITS) == shapes["scales"][-1]


def decode(name: str, parts: Mapping[str, Tensor]) -> QuantizedTensor:
    """The weight of layer `name` from its stored `parts`. Raises ModelError for shapes that do not fit each other."""
    qweight, qzeros, scales = (parts[p] for p in ("qweight", "qzeros", "scales"))
    (groups, n), k = scales.shape, qweight.shape[0]
    if qzeros.shape != (groups, n // 8) or not groups or k % groups:
        raise ModelError(
            f"{name}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and scales {[groups, n]} do not fit each other"
        )
    return QuantizedTensor(
        q=_columns(qweight, n).T.contiguous(),
        scale=shaped(scales.T),
        zero_point=shaped(_columns(qzeros, n).T),
        spec=QSpec(f"uint{BITS}", symmetric=False, granularity=grouping(k, groups)),
    )


def _columns(words: Tensor, n: int) -> Tensor:
    return unpack(words, BITS, n).reshape(len(words), -1, 8)[:, :, _PLACES].reshape(len(words), n)
