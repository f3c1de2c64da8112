"""The qg dialect: torch.ops.qgraph.*, each op = schema + reference body (qgraph.reference) + shape function + gradient where it trains.

The bodies are opaque to torch.export, torch.compile and torch.onnx.export: they stay one node, and its numbers are those of
`qgraph.reference` whatever compiles the rest. What the arguments mean is written there; `qgraph.qparams` makes scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.fx import Node

from qgraph import reference
from qgraph.qparams import choose_qparams, minmax, quantize_bias, scale_shape, zero_point_of
from qgraph.types import storage
from qgraph.views import Dequantize, DynamicQuantize, FakeLookup, FakeQuantize, Lookup, Quantize, implements, operands

__all__ = ["Q", "choose_qparams", "minmax", "quantize_bias", "scale_shape", "zero_point_of"]

Q = torch.ops.qgraph
"""`Q.quantize.default` is the target of a quantize node; `Q.quantize(x, scale, None, "int8")` calls it."""


_PARAMETERS = "Tensor scale, Tensor? zero_point, str dtype, int? axis=None, int group=0"
_WEIGHT = "Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, str dtype"
_INTEGERS = (
    "Tensor x, Tensor x_scale, Tensor? x_zero_point, str x_dtype, "
    "Tensor weight, Tensor w_scale, Tensor? w_zero_point, str w_dtype, Tensor? bias"
)
_REQUANTIZE = "Tensor? y_scale=None, Tensor? y_zero_point=None, str? y_dtype=None"
_LEVELS = "Tensor table, Tensor? scale, int? table_axis=None, int? axis=None, int group=0"
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups"


def _op(fn: Callable[..., Any], arguments: str, result: str = "Tensor") -> CustomOpDef:
    """Registers a reference body as torch.ops.qgraph.<its name>, callable with plain tensors too."""
    return torch.library.custom_op(f"qgraph::{fn.__name__}", fn, mutates_args=(), schema=f"({arguments}) -> {result}")


quantize = _op(reference.quantize, f"Tensor x, {_PARAMETERS}")
dequantize = _op(reference.dequantize, f"Tensor q, {_PARAMETERS}")
fake_quantize = _op(reference.fake_quantize, f"Tensor x, {_PARAMETERS}")
dynamic_quantize = _op(
    reference.dynamic_quantize, "Tensor x, str dtype, bool symmetric, int? axis=None, int group=0", "(Tensor, Tensor, Tensor)"
)
lookup = _op(reference.lookup, f"Tensor q, {_LEVELS}")
fake_lookup = _op(reference.fake_lookup, f"Tensor x, {_LEVELS}")
dequant_linear = _op(reference.dequant_linear, f"Tensor x, {_WEIGHT}, int group=0")
dequant_conv = _op(reference.dequant_conv, f"Tensor x, {_WEIGHT}, {_WINDOW}")
quantized_linear = _op(reference.quantized_linear, f"{_INTEGERS}, {_REQUANTIZE}")
quantized_conv = _op(reference.quantized_conv, f"{_INTEGERS}, {_WINDOW}, {_REQUANTIZE}")


# Shape functions: they see fake tensors with symbolic sizes, so they compare nothing but ranks.


def _fits(scale: Tensor, x: Tensor, axis: int | None, group: int) -> None:
    """The part of the shape rules that needs no sizes; the body checks the rest."""
    if axis is not None and scale.dim() != len(scale_shape(x.shape, axis, group)):
        raise ValueError(f"scale of rank {scale.dim()} does not fit x of rank {x.dim()} at axis={axis}, group={group}")


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, axis: int | None = None, group: int = 0) -> Tensor:
    _fits(scale, x, axis, group)
    return torch.empty_like(x, dtype=storage(dtype))


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, axis: int | None = None, group: int = 0) -> Tensor:
    _fits(scale, q, axis, group)
    return torch.empty_like(q, dtype=scale.dtype)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, axis: int | None = None, group: int = 0) -> Tensor:
    _fits(scale, x, axis, group)
    return torch.empty_like(x)


@lookup.register_fake
@fake_lookup.register_fake
def _(q: Tensor, table: Tensor, scale: Tensor | None, table_axis: int | None = None, axis: int | None = None, group: int = 0) -> Tensor:
    if scale is not None:
        _fits(scale, q, axis, group)
    return torch.empty_like(q, dtype=table.dtype)


@dynamic_quantize.register_fake
def _(x: Tensor, dtype: str, symmetric: bool, axis: int | None = None, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    shape = scale_shape(x.shape, axis, group)
    return torch.empty_like(x, dtype=storage(dtype)), x.new_empty(shape), x.new_empty(shape, dtype=storage(dtype))


@dequant_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, dtype: str, group: int = 0) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _result_type(w_scale: Tensor, y_dtype: str | None) -> torch.dtype:
    return w_scale.dtype if y_dtype is None else storage(y_dtype)


@quantized_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    x_dtype: str,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_dtype: str,
    bias: Tensor | None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    y_dtype: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=_result_type(w_scale, y_dtype))


def _conv_shape(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    n = len(stride)
    sizes = [
        (x.shape[2 + i] + padding[i] + padding[n + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(n)
    ]
    return [x.shape[0], weight.shape[0], *sizes]


@dequant_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return x.new_empty(_conv_shape(x, weight, stride, padding, dilation))


@quantized_conv.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    x_dtype: str,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_dtype: str,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    y_dtype: str | None = None,
) -> Tensor:
    return x.new_empty(_conv_shape(x, weight, stride, padding, dilation), dtype=_result_type(w_scale, y_dtype))


# Gradients.


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.encoding = inputs
    ctx.save_for_backward(x, scale, zero_point)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d fake_quantize / dx = 1 inside the range, 0 where it saturates."""
    inside = reference.inside(*ctx.saved_tensors, *ctx.encoding)
    return grad * inside.to(grad.dtype), None, None, None, None, None


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """The gradient needs no values."""


def _to_the_weight(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """d fake_lookup / dx = 1."""
    return grad, None, None, None, None, None


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scale, zero_point, bias, dtype, group = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.dtype, ctx.group, ctx.bias_type = dtype, group, None if bias is None else bias.dtype


def _through_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients for x and bias; the integer weight and its scale have none."""
    weight, scale, zero_point = ctx.saved_tensors
    axis = reference.weight_axis(scale, ctx.group)
    w = dequantize(weight, scale, zero_point, ctx.dtype, axis, ctx.group)
    d_bias = None if ctx.bias_type is None else grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_type)
    return grad.matmul(w.to(grad.dtype)), None, None, None, d_bias, None, None


fake_quantize.register_autograd(_straight_through, setup_context=_keep_inputs)
fake_lookup.register_autograd(_to_the_weight, setup_context=_keep_nothing)
dequant_linear.register_autograd(_through_linear, setup_context=_keep_weight)


# Views. The fused ops have no Linear or Conv view: their weight is a tensor of integers that no pass may scale, round or fold into.
# A backend reads them with `views.operands(node)`.


@implements(Quantize, Q.quantize.default)
def _(node: Node) -> Quantize:
    return Quantize(**operands(node))


@implements(Dequantize, Q.dequantize.default)
def _(node: Node) -> Dequantize:
    return Dequantize(**operands(node))


@implements(FakeQuantize, Q.fake_quantize.default)
def _(node: Node) -> FakeQuantize:
    return FakeQuantize(**operands(node))


@implements(DynamicQuantize, Q.dynamic_quantize.default)
def _(node: Node) -> DynamicQuantize:
    return DynamicQuantize(**operands(node))


@implements(Lookup, Q.lookup.default)
def _(node: Node) -> Lookup:
    return Lookup(**operands(node))


@implements(FakeLookup, Q.fake_lookup.default)
def _(node: Node) -> FakeLookup:
    return FakeLookup(**operands(node))
