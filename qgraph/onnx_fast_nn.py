"""Fast paths of convolutions, pooling and normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.onnx_fast import fast

Pairs = list[tuple[int, int]]


def paddings(
    auto_pad: str, pads: Sequence[int] | None, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pairs:
    """((begin, end), ...) per spatial axis of a convolution or pooling; SAME depends on the input's size."""
    rank = len(kernel)
    if auto_pad in ("NOTSET", ""):
        given = list(pads) if pads else [0] * (2 * rank)
        return [(given[i], given[i + rank]) for i in range(rank)]
    if auto_pad == "VALID":
        return [(0, 0)] * rank
    found = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max(0, (math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
        small, large = total // 2, total - total // 2
        found.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return found


def pad_spatial(x: Tensor, pairs: Pairs, value: float = 0.0) -> Tensor:
    flat = [n for pair in reversed(pairs) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


@fast("Conv")
def conv(
    op: Any,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Any:
    rank = x.dim() - 2
    if rank not in (1, 2, 3):
        return NotImplemented
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    pairs = paddings(auto_pad, pads, x.shape[2:], w.shape[2:], stride, dilation)
    symmetric = all(b == e >= 0 for b, e in pairs)
    fn = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    x = x if symmetric else pad_spatial(x, pairs)
    return fn(x, w, bias, stride, [b for b, _ in pairs] if symmetric else 0, dilation, group)


@fast("ConvTranspose")
def conv_transpose(
    op: Any,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Any:
    """The full result is computed, then cropped (or padded) by the pads, which may be asymmetric."""
    rank = x.dim() - 2
    if rank not in (1, 2, 3):
        return NotImplemented
    stride, dilation, extra = list(strides or [1] * rank), list(dilations or [1] * rank), list(output_padding or [0] * rank)
    full = [(n - 1) * s + (k - 1) * d + 1 + e for n, k, s, d, e in zip(x.shape[2:], w.shape[2:], stride, dilation, extra, strict=True)]
    if output_shape:
        pairs = _split_total([f - o for f, o in zip(full, list(output_shape)[-rank:], strict=True)], auto_pad)
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        pairs = _split_total([f - n * s for f, n, s in zip(full, x.shape[2:], stride, strict=True)], auto_pad)
    else:
        pairs = paddings(auto_pad, pads, x.shape[2:], w.shape[2:], stride, dilation)
    fn = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    # torch wants output_padding below stride or dilation; padding the result with zeros plus bias says the same.
    found = fn(x, w, None, stride, 0, 0, group, dilation)
    found = pad_spatial(found, [(-b, -e + n) for (b, e), n in zip(pairs, extra, strict=True)])
    return found if bias is None else found + bias.reshape(-1, *[1] * rank)


def _split_total(totals: list[int], auto_pad: str) -> Pairs:
    # The odd element goes to the end only for SAME_UPPER (ConvTranspose, opset 1 to 22).
    return [(t // 2, t - t // 2) if auto_pad == "SAME_UPPER" else (t - t // 2, t // 2) for t in totals]


@fast("MaxPool")
def max_pool(
    op: Any,
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
) -> Any:
    rank = x.dim() - 2
    if op.outputs > 1 or ceil_mode or rank not in (1, 2, 3) or not x.is_floating_point():
        return NotImplemented
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    pairs = paddings(auto_pad, pads, x.shape[2:], kernel_shape, stride, dilation)
    fn = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    return fn(pad_spatial(x, pairs, float("-inf")), list(kernel_shape), stride, 0, dilation)


@fast("AveragePool")
def average_pool(
    op: Any,
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Any:
    rank = x.dim() - 2
    if ceil_mode or rank not in (1, 2, 3) or any(d != 1 for d in dilations or ()):
        return NotImplemented
    stride = list(strides or [1] * rank)
    pairs = paddings(auto_pad, pads, x.shape[2:], kernel_shape, stride, [1] * rank)
    fn = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    found = fn(pad_spatial(x, pairs), list(kernel_shape), stride)
    if count_include_pad or not any(n for pair in pairs for n in pair):
        return found
    return found / fn(pad_spatial(torch.ones_like(x[:1, :1]), pairs), list(kernel_shape), stride)


@fast("GlobalAveragePool", "GlobalMaxPool")
def global_pool(op: Any, x: Tensor) -> Tensor:
    axes = list(range(2, x.dim()))
    return x.mean(axes, keepdim=True) if op.op_type == "GlobalAveragePool" else x.amax(axes, keepdim=True)


@fast("BatchNormalization")
def batch_normalization(
    op: Any,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
) -> Any:
    if training_mode or op.outputs > 1 or op.version < 7 or not spatial:
        return NotImplemented
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean, var, scale, bias = (t.reshape(shape) for t in (mean, var, scale, bias))
    return ((x - mean) / torch.sqrt(var + epsilon) * scale + bias).to(x.dtype)


@fast("LayerNormalization")
def layer_normalization(
    op: Any, x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    axes = list(range(axis % x.dim(), x.dim()))
    wide = x.float() if stash_type == 1 else x
    mean = wide.mean(axes, keepdim=True)
    centered = wide - mean
    inverse = torch.rsqrt(centered.square().mean(axes, keepdim=True) + epsilon)
    found = (centered * inverse).to(x.dtype) * scale
    found = found if bias is None else found + bias
    return found if op.outputs == 1 else (found, mean, inverse)[: op.outputs]


@fast("RMSNormalization")
def rms_normalization(op: Any, x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    wide = x.float() if stash_type == 1 else x
    axes = list(range(axis % x.dim(), x.dim()))
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


@fast("InstanceNormalization")
def instance_normalization(op: Any, x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    axes, shape = list(range(2, x.dim())), [1, -1] + [1] * (x.dim() - 2)
    mean = x.mean(axes, keepdim=True)
    var = (x - mean).square().mean(axes, keepdim=True)
    return (x - mean) / torch.sqrt(var + epsilon) * scale.reshape(shape) + bias.reshape(shape)


@fast("Dropout", stored=True)
def dropout(op: Any, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None, *, ratio_: float = 0.5, seed: int = 0) -> Any:
    if op.version < 7 or (training is not None and bool(training)):
        return NotImplemented
    return x if op.outputs == 1 else (x, torch.ones(x.shape, dtype=torch.bool))
