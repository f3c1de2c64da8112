"""x -> integers of at most 8 bits, on the device: quantize.cu and its torch ops.

    torch.ops.qgraph_cuda.quantize_static   one scale, given             = Q.quantize(x, scale, zero_point, dtype)
                          quantize_rows     a scale per row, given or    = Q.quantize, Q.dynamic_quantize(x, ..., axis=-1, group=-1)
                                            (dynamic) from the row
                          quantize_tensor   one scale, from the range    = Q.dynamic_quantize(x, ...)

Bit for bit what qgraph.reference says, its rules for NaN, infinities and rows of zeros included. Types of more than 8 bits, float64 and
2**31 elements under one scale raise LoweringError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.backends.cupy.launch import TYPES, Kernel
from qgraph.backends.cupy.ops import cuda_op
from qgraph.backends.cupy.roofline import Work
from qgraph.backends.cupy.rows import (
    CONFIGS,
    LARGEST,
    VECTOR,
    Given,
    RowConfig,
    Rows,
    byte_range,
    choose,
    empty_rows,
    float_type,
    row_count,
    strided,
    whole,
)
from qgraph.errors import LoweringError
from qgraph.types import storage

FLAT = CONFIGS[1]
"""For the kernels of a whole tensor."""
TILE = 4
"""Vectors of a thread of them, as in quantize.cu."""
PARTS = 128
"""Blocks of tensor_range at most: what each block of quantize_tensor reads again."""


def _kernel(name: str, config: RowConfig, dtype: torch.dtype) -> Kernel:
    return config.kernel("quantize.cu", name, dtype)


KERNELS = tuple(_kernel("quantize_rows", c, t) for t in TYPES for c in CONFIGS) + tuple(
    _kernel(name, FLAT, t) for t in TYPES for name in ("tensor_range", "quantize_tensor")
)


@cuda_op("Tensor x, Tensor? scale, Tensor? zero_point, str dtype, bool symmetric, bool sums", "(Tensor, Tensor, Tensor, Tensor)")
def quantize_rows(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: str, symmetric: bool, sums: bool) -> Rows:
    """x [..., k] -> `Rows`: with scale and zero_point of one element or [..., 1], else from each row's range."""
    (rows, k), real, (low, high) = row_count(x), float_type(x), byte_range(dtype)
    static, config = Given.of(scale, zero_point, rows), choose(k, real)
    found = empty_rows(x, dtype, dynamic=scale is None, sums=sums)
    flat, stride = strided(x)
    parameters = (static.scale, static.zero_point, static.every, rows, k, stride, low, high, int(symmetric))
    _kernel("quantize_rows", config, real)((config.blocks(rows),), config.block, flat, *found, *parameters)
    return found


@quantize_rows.register_fake
def _(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: str, symmetric: bool, sums: bool) -> Rows:
    return empty_rows(x, dtype, dynamic=scale is None, sums=sums)


@cuda_op("Tensor x, Tensor scale, Tensor? zero_point, str dtype")
def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str) -> Tensor:
    """x of any shape -> integers in storage(dtype); scale and zero_point of one element."""
    static = Given.of(scale, zero_point, 1)
    q = x.new_empty(x.shape, dtype=storage(dtype))
    _quantize_tensor(whole(x), q, None, None, None, 0, static, dtype, symmetric=False)
    return q


@quantize_static.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str) -> Tensor:
    return x.new_empty(x.shape, dtype=storage(dtype))


@cuda_op("Tensor x, str dtype, bool symmetric", "(Tensor, Tensor, Tensor)")
def quantize_tensor(x: Tensor, dtype: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x of any shape -> integers, scale [], zero_point []. What a row's team keeps in registers is one launch; else two."""
    if x.numel() <= FLAT.lanes * FLAT.keep * VECTOR // x.element_size():
        q, scale, zero_point, _ = quantize_rows(x.reshape(1, -1), None, None, dtype, symmetric, False)
        return q.reshape(x.shape), scale.reshape(()), zero_point.reshape(())
    x, q = whole(x), x.new_empty(x.shape, dtype=storage(dtype))
    scale, zero_point = x.new_empty(()), q.new_empty(())
    parts = min(PARTS, _tiles(x))
    part = x.new_empty((parts, 2), dtype=torch.float32)
    _kernel("tensor_range", FLAT, float_type(x))((parts,), FLAT.block, x, part, _count(x))
    _quantize_tensor(x, q, scale, zero_point, part, parts, Given(None, None, 0), dtype, symmetric=symmetric)
    return q, scale, zero_point


@quantize_tensor.register_fake
def _(x: Tensor, dtype: str, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=storage(dtype)), x.new_empty(()), x.new_empty((), dtype=storage(dtype))


def _quantize_tensor(
    x: Tensor,
    q: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    part: Tensor | None,
    parts: int,
    static: Given,
    dtype: str,
    *,
    symmetric: bool,
) -> None:
    launch = _kernel("quantize_tensor", FLAT, float_type(x))
    parameters = (part, parts, static.scale, static.zero_point, _count(x), *byte_range(dtype), int(symmetric))
    launch((_tiles(x),), FLAT.block, x, q, scale, zero_point, *parameters)


def _count(x: Tensor) -> int:
    if x.numel() > LARGEST:
        raise LoweringError(f"the kernels quantize at most {LARGEST} elements with one scale, not {x.numel()}")
    return x.numel()


def _tiles(x: Tensor) -> int:
    return -(-x.numel() * x.element_size() // (VECTOR * FLAT.block * TILE))


def rows_work(rows: int, k: int, dtype: torch.dtype, *, dynamic: bool = True, sums: bool = False) -> Work:
    """The least of quantize_rows: x read once, a byte written for each element, and the parameters; about 12 operations an element."""
    per_row = (dtype.itemsize + 1 if dynamic else 0) + (4 if sums else 0)
    return Work(rows * k * (dtype.itemsize + 1) + rows * per_row, fp32_ops=(16 if dynamic else 12) * rows * k)


def tensor_work(count: int, dtype: torch.dtype, *, dynamic: bool) -> Work:
    """The least of quantize_static and quantize_tensor, where the range of a tensor that no block holds needs a second reading."""
    held = count * dtype.itemsize <= FLAT.lanes * FLAT.keep * VECTOR
    readings = 2 if dynamic and not held else 1
    return Work(count * (readings * dtype.itemsize + 1), fp32_ops=(16 if dynamic else 12) * count)
