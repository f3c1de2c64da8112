"""Fast paths of quantized operators: integers in, exact integer accumulation, float32 scales, round half to even, saturate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qgraph.onnx_fast import fast
from qgraph.onnx_fast_nn import conv
from qgraph.onnx_values import TORCH_DTYPES, from_numpy, onnx_dtype
from qgraph.types import int_range, storage

_SMALL = {np.dtype(getattr(ml_dtypes, n)): n for n in ("int4", "uint4", "int2", "uint2")}
_INTEGERS = {"int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"}


def integers(value: Any) -> tuple[Tensor, str] | None:
    """(values in a torch integer type, ONNX's name of their type); None when they are not integers."""
    if isinstance(value, np.ndarray) and value.dtype in _SMALL:
        name = _SMALL[value.dtype]
        return from_numpy(value.astype(np.uint8 if name.startswith("u") else np.int8)), name
    if isinstance(value, Tensor) and (name := str(value.dtype).removeprefix("torch.")) in _INTEGERS:
        return value, name
    return None


def stored(value: Tensor, dtype: str) -> Any:
    """Integers of a torch type as a value of the ONNX type."""
    if dtype in _SMALL.values():
        return value.cpu().numpy().astype(getattr(ml_dtypes, dtype))
    return value


def align(parameter: Tensor, shape: Sequence[int], axis: int, block: int) -> Tensor:
    """A scale or zero point so that it broadcasts against a tensor of this shape."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return parameter.reshape(())
    if not block:
        return parameter.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return parameter.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])


def requantize(x: Tensor, zero_point: Tensor | None, dtype: str) -> Tensor:
    """saturate(round half to even(x) + zero point)."""
    low, high = int_range(dtype)
    rounded = torch.round(x)
    return (rounded if zero_point is None else rounded + zero_point.float()).clamp(low, high).to(storage(dtype))


@fast("QuantizeLinear", values=True)
@fast("QuantizeLinear", domain="com.microsoft", values=True)
def quantize_linear(
    op: Any,
    x: Any,
    scale: Any,
    zero_point: Any = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
    precision: int = 0,
) -> Any:
    zero = integers(zero_point)
    dtype = zero[1] if zero is not None else ir.DataType(output_dtype or ir.DataType.UINT8).name.lower()
    if (
        dtype not in _INTEGERS
        or dtype == "int32"
        or precision
        or (zero is None and zero_point is not None)
        or not isinstance(scale, Tensor)
    ):
        return NotImplemented
    aligned = None if zero is None else align(zero[0].float(), x.shape, axis, block_size)
    quotient = x.float() / align(scale.float(), x.shape, axis, block_size)
    return stored(requantize(quotient, aligned, dtype), dtype)


@fast("DequantizeLinear", values=True)
@fast("DequantizeLinear", domain="com.microsoft", values=True)
def dequantize_linear(
    op: Any, x: Any, scale: Any, zero_point: Any = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Any:
    data, zero = integers(x), integers(zero_point)
    if data is None or (zero is None and zero_point is not None) or not isinstance(scale, Tensor):
        return NotImplemented
    dtype = TORCH_DTYPES[ir.DataType(output_dtype)] if output_dtype else scale.dtype
    return _dequantize(data[0], scale, None if zero is None else zero[0], axis, block_size).to(dtype)


def _dequantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int = 1, block: int = 0) -> Tensor:
    """Float32, whatever the scale's type: a product of 16 bit floats is rounded once, at the end."""
    shape = x.shape
    if zero_point is not None:
        x = x.to(torch.int32) - align(zero_point.to(torch.int32), shape, axis, block)
    return x.to(torch.float32) * align(scale.float(), shape, axis, block)


@fast("DynamicQuantizeLinear")
def dynamic_quantize_linear(op: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(-low / scale).clamp(0, 255)
    return requantize(x / scale, zero_point, "uint8"), scale, zero_point.to(torch.uint8)


def accumulate(a: Tensor, b: Tensor, a_zero: Tensor | None, b_zero: Tensor | None) -> Tensor:
    """(a - a_zero) @ (b - b_zero) in int32. A zero point of a is per row, one of b per column.

    float64 carries the sums exactly (53 bits), and BLAS has it."""
    left, right = a.to(torch.float64), b.to(torch.float64)
    if a_zero is not None:
        left = left - (a_zero.to(torch.float64).unsqueeze(-1) if a_zero.dim() and a_zero.numel() > 1 else a_zero.to(torch.float64))
    if b_zero is not None:
        columns = b_zero.to(torch.float64)
        right = right - (columns.unsqueeze(-2) if columns.dim() > 1 else columns)
    return torch.matmul(left, right).to(torch.int64).to(torch.int32)


@fast("MatMulInteger")
def matmul_integer(op: Any, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    return accumulate(a, b, a_zero, b_zero)


def _conv_accumulate(op: Any, x: Tensor, w: Tensor, x_zero: Tensor | None, w_zero: Tensor | None, **attrs: Any) -> Tensor:
    wide = x.to(torch.float64) - (0 if x_zero is None else x_zero.to(torch.float64))
    zero = torch.zeros((), dtype=torch.float64) if w_zero is None else align(w_zero.to(torch.float64), w.shape, 0, 0)
    found: Tensor = conv(op, wide, w.to(torch.float64) - zero, **attrs)
    return found.to(torch.int64).to(torch.int32)


@fast("ConvInteger")
def conv_integer(
    op: Any,
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Any:
    if x.dim() - 2 not in (1, 2, 3):
        return NotImplemented
    return _conv_accumulate(
        op, x, w, x_zero, w_zero, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides
    )  # fmt: skip


@fast("QLinearMatMul")
def qlinear_matmul(
    op: Any, a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor, y_zero: Tensor
) -> Tensor:
    rows = a_scale.float().unsqueeze(-1) if a_scale.dim() and a_scale.numel() > 1 else a_scale.float()
    total = accumulate(a, b, a_zero, b_zero).float() * (rows * b_scale.float() / y_scale.float())
    return requantize(total, y_zero, str(onnx_dtype(y_zero.dtype).name).lower())


@fast("QLinearConv")
def qlinear_conv(
    op: Any,
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Any:
    """The int32 bias has scale x_scale * w_scale."""
    if x.dim() - 2 not in (1, 2, 3):
        return NotImplemented
    total = _conv_accumulate(op, x, w, x_zero, w_zero, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    if bias is not None:
        total = total + align(bias, total.shape, 1, 0)
    factor = align(x_scale.float() * w_scale.float() / y_scale.float(), total.shape, 1, 0)
    return requantize(total.float() * factor, y_zero, str(onnx_dtype(y_zero.dtype).name).lower())
