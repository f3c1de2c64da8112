"""Fast paths of com.microsoft operators that quantized and optimized models use. Meaning: ONNX Runtime's contrib operators document."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.onnx_fast import fast
from qgraph.onnx_fast_quant import accumulate, align, dynamic_quantize_linear, integers, requantize

MS = "com.microsoft"


def _dequantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int = 0) -> Tensor:
    zero = torch.zeros((), dtype=torch.int32) if zero_point is None else align(zero_point.to(torch.int32), x.shape, axis, 0)
    return (x.to(torch.int32) - zero).float() * align(scale.float(), x.shape, axis, 0)


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, like: torch.dtype) -> Tensor:
    return requantize(x / scale.float(), zero_point, str(like).removeprefix("torch."))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Bytes [..., n] -> values [..., n * 8 / bits], the lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return torch.bitwise_and(packed.unsqueeze(-1) >> shifts, 2**bits - 1).flatten(-2)


@fast("MatMulNBits", domain=MS)
def matmul_nbits(
    op: Any,
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Any:
    """a [..., K] @ weight [N, K].T; packed is [N, blocks, block_size * bits / 8], scales [N, blocks] flat or not.

    Zero points are packed along blocks, each row of whole bytes, or floats; without them they are 2**(bits-1)."""
    if g_idx is not None or weight_prepacked:
        return NotImplemented
    blocks = -(-K // block_size)
    values = unpack(packed.reshape(N, blocks, -1), bits).float()
    if zero_points is None:
        zeros = torch.full((N, blocks), float(2 ** (bits - 1)))
    elif zero_points.dtype == torch.uint8:
        zeros = unpack(zero_points.reshape(N, -1), bits)[:, :blocks].float()
    else:
        zeros = zero_points.reshape(N, blocks).float()
    weight = ((values - zeros.unsqueeze(-1)) * scales.reshape(N, blocks, 1).float()).reshape(N, -1)[:, :K]
    return F.linear(a, weight.to(a.dtype), bias)


def _scaled(total: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    found = total.float() * scale
    return found if bias is None else found + bias


@fast("DynamicQuantizeMatMul", domain=MS)
def dynamic_quantize_matmul(
    op: Any, a: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    q, scale, zero = dynamic_quantize_linear(op, a)
    return _scaled(accumulate(q, b, zero, b_zero), scale * b_scale, bias)


@fast("MatMulIntegerToFloat", domain=MS)
def matmul_integer_to_float(
    op: Any,
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero: Tensor | None = None,
    b_zero: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    return _scaled(accumulate(a, b, a_zero, b_zero), a_scale * b_scale, bias)


@fast("QGemm", domain=MS)
def qgemm(
    op: Any,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor | None,
    c: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero: Tensor | None = None,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """c is int32 at scale alpha * a_scale * b_scale; without y_scale the result is float."""
    total = accumulate(a.T if transA else a, b.T if transB else b, a_zero, b_zero)
    found = (total if c is None else total + c).float() * (alpha * a_scale * b_scale)
    return found if y_scale is None else _quantize(found, y_scale, y_zero, a.dtype if y_zero is None else y_zero.dtype)


def _qlinear_binary(op_type: str, fn: Callable[[Tensor, Tensor], Tensor]) -> None:
    @fast(op_type, domain=MS)
    def run(
        op: Any, a: Tensor, a_scale: Tensor, a_zero: Tensor | None, b: Tensor, b_scale: Tensor, b_zero: Tensor | None,
        y_scale: Tensor, y_zero: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return _quantize(fn(_dequantize(a, a_scale, a_zero), _dequantize(b, b_scale, b_zero)), y_scale, y_zero, a.dtype)


_qlinear_binary("QLinearAdd", torch.add)
_qlinear_binary("QLinearMul", torch.mul)


@fast("QLinearSigmoid", domain=MS)
def qlinear_sigmoid(op: Any, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None) -> Tensor:
    return _quantize(torch.sigmoid(_dequantize(x, x_scale, x_zero)), y_scale, y_zero, x.dtype)


@fast("QLinearLeakyRelu", domain=MS)
def qlinear_leaky_relu(
    op: Any, x: Tensor, x_scale: Tensor, x_zero: Tensor | None, y_scale: Tensor, y_zero: Tensor | None = None, *, alpha: float = 0.01
) -> Tensor:
    return _quantize(F.leaky_relu(_dequantize(x, x_scale, x_zero), alpha), y_scale, y_zero, x.dtype)


@fast("QLinearGlobalAveragePool", domain=MS)
def qlinear_global_average_pool(
    op: Any, x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor, *, channels_last: int = 0
) -> Tensor:
    axes = list(range(1, x.dim() - 1)) if channels_last else list(range(2, x.dim()))
    return _quantize(_dequantize(x, x_scale, x_zero).mean(axes, keepdim=True), y_scale, y_zero, x.dtype)


@fast("QLinearConcat", domain=MS)
def qlinear_concat(op: Any, y_scale: Tensor, y_zero: Tensor, *triples: Tensor, axis: int) -> Tensor:
    parts = [_dequantize(x, scale, zero) for x, scale, zero in zip(triples[0::3], triples[1::3], triples[2::3], strict=True)]
    return _quantize(torch.cat(parts, axis), y_scale, y_zero, y_zero.dtype)


@fast("GatherBlockQuantized", domain=MS, values=True)
def gather_block_quantized(
    op: Any,
    data: Any,
    indices: Tensor,
    scales: Tensor,
    zero_points: Any = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
) -> Any:
    """Rows of a blockwise quantized table. Bytes hold 8 / bits values along the last axis, whose default zero point is the middle."""
    found, zero = integers(data), integers(zero_points)
    if found is None or gather_axis != 0:
        return NotImplemented
    packed = found[1] == "uint8"
    rows = found[0][indices.long()]
    rows = unpack(rows, bits) if packed and bits < 8 else rows
    if zero is not None:
        zeros = (unpack(zero[0], bits)[..., : scales.shape[-1]] if packed and bits < 8 else zero[0])[indices.long()]
    else:
        zeros = torch.full_like(scales[indices.long()], 2 ** (bits - 1) if packed else 0)
    axis = (quantize_axis % data.ndim) + indices.dim() - 1
    shifted = rows.float() - align(zeros.float(), rows.shape, axis, block_size)
    return (shifted * align(scales[indices.long()].float(), rows.shape, axis, block_size)).to(scales.dtype)


@fast("Gelu", domain=MS)
def gelu(op: Any, x: Tensor) -> Tensor:
    return F.gelu(x)


@fast("FastGelu", domain=MS)
def fast_gelu(op: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@fast("BiasGelu", domain=MS)
def bias_gelu(op: Any, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


@fast("FusedMatMul", domain=MS)
def fused_matmul(op: Any, a: Tensor, b: Tensor, *, alpha: float = 1.0, transA: int = 0, transB: int = 0) -> Tensor:
    return alpha * torch.matmul(a.mT if transA else a, b.mT if transB else b)


@fast("SkipLayerNormalization", domain=MS)
def skip_layer_normalization(
    op: Any, x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None, *, epsilon: float = 1e-5
) -> Any:
    total = x + skip if bias is None else x + skip + bias
    found = F.layer_norm(total, gamma.shape, gamma, beta, epsilon)
    return found if op.outputs == 1 else (found, None, None, total)[: op.outputs]


@fast("QuickGelu", domain=MS)
def quick_gelu(op: Any, x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)
