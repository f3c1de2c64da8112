"""quantize(act(gate) * up) in one kernel: act_quantize.cu and torch.ops.qgraph_cuda.act_quantize.

exp and erf are not torch's to the last bit, so y may differ by a rounding, and an integer by one step where y lies on the border of two.
"""

from __future__ import annotations

from math import pi, sqrt

import torch
from torch import Tensor

from qgraph.backends.cupy.launch import TYPES, Kernel, kernel
from qgraph.backends.cupy.ops import cuda_op
from qgraph.backends.cupy.roofline import Work
from qgraph.backends.cupy.rows import CONFIGS, Given, RowConfig, Rows, byte_range, choose, empty_rows, float_type, row_count, strided
from qgraph.errors import LoweringError, nearest

_TANH = 2 * sqrt(2 / pi)
ACTS: dict[str, tuple[float, float] | None] = {"silu": (1.0, 0.0), "gelu_tanh": (_TANH, 0.044715 * _TANH), "gelu": None}
"""g -> g / (1 + exp(-g (a + b g^2))) by (a, b); None: by erf."""


def _kernel(config: RowConfig, dtype: torch.dtype, act: str) -> Kernel:
    real, gelu = TYPES[dtype], ACTS[act] is None
    return kernel("act_quantize.cu", "act_quantize", expects=("LDG.128",), REAL=real, LANES=config.lanes, KEEP=config.keep, GELU=gelu)


KERNELS = tuple(_kernel(c, t, act) for t in TYPES for c in CONFIGS for act in ("silu", "gelu"))


@cuda_op(
    "Tensor gate, Tensor? up, str act, Tensor? scale, Tensor? zero_point, str dtype, bool symmetric, bool sums",
    "(Tensor, Tensor, Tensor, Tensor)",
)
def act_quantize(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    scale: Tensor | None,
    zero_point: Tensor | None,
    dtype: str,
    symmetric: bool,
    sums: bool,
) -> Rows:
    """act(gate) * up, all [..., k], quantized as by quantize_rows -> `Rows`. act: "silu", "gelu" or "gelu_tanh"; up None: 1."""
    if act not in ACTS:
        raise LoweringError(f"there is no kernel for the activation {act}{nearest(act, ACTS)}")
    if up is not None and (up.shape != gate.shape or up.dtype != gate.dtype):
        raise LoweringError(f"up is {up.dtype} {list(up.shape)}, gate {gate.dtype} {list(gate.shape)}; the kernel needs the same")
    (rows, k), real, (low, high) = row_count(gate), float_type(gate), byte_range(dtype)
    static, config = Given.of(scale, zero_point, rows), choose(k, real)
    found = empty_rows(gate, dtype, dynamic=scale is None, sums=sums)
    (g, g_stride), (u, u_stride) = strided(gate), (None, 0) if up is None else strided(up)
    parameters = (static.scale, static.zero_point, static.every, rows, k, g_stride, u_stride, low, high, int(symmetric))
    _kernel(config, real, act)((config.blocks(rows),), config.block, g, u, *found, *parameters, *(ACTS[act] or (0.0, 0.0)))
    return found


@act_quantize.register_fake
def _(
    gate: Tensor,
    up: Tensor | None,
    act: str,
    scale: Tensor | None,
    zero_point: Tensor | None,
    dtype: str,
    symmetric: bool,
    sums: bool,
) -> Rows:
    return empty_rows(gate, dtype, dynamic=scale is None, sums=sums)


def work(rows: int, k: int, dtype: torch.dtype, *, dynamic: bool = True, up: bool = True) -> Work:
    """The least: gate and up read, an integer written for each element."""
    per_row = dtype.itemsize + 1 if dynamic else 0
    return Work(rows * k * ((1 + up) * dtype.itemsize + 1) + rows * per_row, fp32_ops=28 * rows * k)
