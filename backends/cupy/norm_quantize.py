"""quantize(norm(x + residual)) in one kernel: norm_quantize.cu and torch.ops.qgraph_cuda.norm_quantize.

The norm is summed in float32 in another order than torch does it, so y may differ by a rounding, and an integer by one step where y lies on
the border of two; scales agree to a few units in the last place of float32, or one of x's type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.backends.cupy.launch import TYPES, Kernel
from qgraph.backends.cupy.ops import cuda_op
from qgraph.backends.cupy.roofline import Work
from qgraph.backends.cupy.rows import CONFIGS, Given, RowConfig, Rows, beside, byte_range, choose, empty_rows, float_type, row_count, whole
from qgraph.backends.cupy.w8a8 import device_of

THREADS = 768
"""Of the blocks that a multiprocessor gets at most, where they keep the weight for several rows: as many as it holds at once."""
STAGED = 256
"""The largest team with room for the weight in shared memory."""


def _kernel(config: RowConfig, dtype: torch.dtype) -> Kernel:
    return config.kernel("norm_quantize.cu", "norm_quantize", dtype)


KERNELS = tuple(_kernel(c, t) for t in TYPES for c in CONFIGS)

_ARGUMENTS = (
    "Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool layer, Tensor? scale, Tensor? zero_point, str dtype, "
    "bool symmetric, bool sums, bool keep_y"
)


@cuda_op(_ARGUMENTS, "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
def norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    scale: Tensor | None,
    zero_point: Tensor | None,
    dtype: str,
    symmetric: bool,
    sums: bool,
    keep_y: bool,
) -> tuple[Tensor, ...]:
    """LayerNorm (`layer`) or RMSNorm over the last axis of x [..., k] (+ residual), then quantized as by quantize_rows.

    weight, bias: [k] in x's type. Returns `Rows`, then h = x + residual (no elements without residual), then the normalised y (no elements
    unless keep_y)."""
    (rows, k), real, (low, high) = row_count(x), float_type(x), byte_range(dtype)
    static, config = Given.of(scale, zero_point, rows), choose(k, real)
    found, h, y = _empty(x, residual, dtype, dynamic=scale is None, sums=sums, keep_y=keep_y)
    read = (whole(x), beside(x, "residual", residual, tuple(x.shape)), beside(x, "weight", weight, (k,)), beside(x, "bias", bias, (k,)))
    parameters = (static.scale, static.zero_point, static.every, rows, k, low, high, int(symmetric), int(layer), float(eps))
    _kernel(config, real)((_blocks(config, rows, x.device),), config.block, *read, h, y, *found, *parameters)
    return *found, h, y


@norm_quantize.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    layer: bool,
    scale: Tensor | None,
    zero_point: Tensor | None,
    dtype: str,
    symmetric: bool,
    sums: bool,
    keep_y: bool,
) -> tuple[Tensor, ...]:
    found, h, y = _empty(x, residual, dtype, dynamic=scale is None, sums=sums, keep_y=keep_y)
    return *found, h, y


def _blocks(config: RowConfig, rows: int, device: torch.device) -> int:
    """A team for each row; or as many as the device holds, which do several rows each."""
    _, sms = device_of(device)
    return min(config.blocks(rows), sms * THREADS // config.block) if config.lanes <= STAGED else config.blocks(rows)


def _empty(x: Tensor, residual: Tensor | None, dtype: str, *, dynamic: bool, sums: bool, keep_y: bool) -> tuple[Rows, Tensor, Tensor]:
    h, y = (x.new_empty(x.shape if there else (0,)) for there in (residual is not None, keep_y))
    return empty_rows(x, dtype, dynamic=dynamic, sums=sums), h, y


def work(
    rows: int, k: int, dtype: torch.dtype, *, dynamic: bool = True, residual: bool = False, keep_y: bool = False, bias: bool = False
) -> Work:
    """The least: x read and an integer written for each element (the residual read and h written, y written), weight and bias once."""
    each = dtype.itemsize * (1 + 2 * residual + keep_y) + 1
    per_row = dtype.itemsize + 1 if dynamic else 0
    return Work(rows * k * each + rows * per_row + k * dtype.itemsize * (1 + bias), fp32_ops=24 * rows * k)
