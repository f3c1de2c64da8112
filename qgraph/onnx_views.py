"""ONNX nodes seen through the interfaces of qgraph.views: products, norms, pointwise functions, pools, quantization.

What only moves elements is in onnx_data_views. Forms that changed between opsets are told apart by `node.target.version`,
the opset that the graph imports; a form that an interface cannot express has no view. Source: onnx/docs/Operators.md, Changelog.md.
"""

from __future__ import annotations

import re

import onnx_ir as ir
from torch.fx import Node

from qgraph import onnx_data_views  # noqa: F401  registers the other half
from qgraph.onnx_node import arg, attr, const_ints, inputs, op_type, rank, scalar, single, value_type, version
from qgraph.onnx_values import dtype_name
from qgraph.views import (
    Activation,
    Attention,
    BatchNorm,
    Cast,
    Concat,
    Conv,
    Dequantize,
    DynamicQuantize,
    Elementwise,
    Linear,
    Norm,
    Pool,
    Quantize,
    Reduce,
    Softmax,
    const_value,
    implements,
)


@implements(Linear, "::MatMul")
def matmul(node: Node) -> Linear | None:
    if (rank(arg(node, 1)) or 0) < 2:  # a vector has no output axis
        return None
    return Linear(arg(node, 0), arg(node, 1), None, in_axis=-2, out_axis=-1)


@implements(Linear, "::Gemm")
def gemm(node: Node) -> Linear:
    trans_a, trans_b = attr(node, "transA", 0), attr(node, "transB", 0)
    axes = {"in_axis": -1, "out_axis": -2} if trans_b else {"in_axis": -2, "out_axis": -1}
    scale = {"alpha": attr(node, "alpha", 1.0), "beta": attr(node, "beta", 1.0)}
    return Linear(arg(node, 0), arg(node, 1), arg(node, 2), x_axis=-2 if trans_a else -1, **axes, **scale)


def _kernel(node: Node) -> tuple[int, ...] | None:
    """Spatial size of a convolution's weight."""
    if "kernel_shape" in node.kwargs:
        return tuple(attr(node, "kernel_shape"))
    shape = value_type(arg(node, 1)).shape
    return tuple(shape[2:]) if shape and all(isinstance(d, int) for d in shape[2:]) else None  # type: ignore[arg-type]


def _same(node: Node, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...] | None:
    """SAME padding; independent of the input's size where the stride is 1, else None for sizes that are not numbers."""
    sizes = (value_type(arg(node, 0)).shape or ())[2:] or (None,) * len(kernel)
    pads = []
    for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True):
        total = (k - 1) * d
        if s != 1:
            if not isinstance(size, int):
                return None
            total = max((size - 1) // s * s + total + 1 - size, 0)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if attr(node, "auto_pad") == "SAME_UPPER" else (large, small))
    return tuple(pads)


def _conv(node: Node, *, transposed: bool) -> Conv | None:
    kernel = _kernel(node)
    if kernel is None:
        return None
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    stride, dilation = tuple(attr(node, "strides", ones)), tuple(attr(node, "dilations", ones))
    pads = tuple(attr(node, "pads", zeros + zeros))
    mode = attr(node, "auto_pad", "NOTSET")
    padding: tuple[tuple[int, int], ...] | None = tuple(zip(pads[: len(kernel)], pads[len(kernel) :], strict=True))
    if mode == "VALID":
        padding = tuple(zip(zeros, zeros, strict=True))
    elif mode != "NOTSET":
        padding = None if transposed else _same(node, kernel, stride, dilation)
    if "output_shape" in node.kwargs:  # ConvTranspose then derives its padding from the input's size
        padding = None
    extra = tuple(attr(node, "output_padding", zeros))
    n = len(kernel)
    out_axis, in_axis = (-n - 1, -n - 2) if transposed else (-n - 2, -n - 1)
    x, weight, bias = arg(node, 0), arg(node, 1), arg(node, 2)
    return Conv(x, weight, bias, stride, padding, dilation, attr(node, "group", 1), transposed, extra, out_axis, in_axis)


@implements(Conv, "::Conv")
def conv(node: Node) -> Conv | None:
    return _conv(node, transposed=False)


@implements(Conv, "::ConvTranspose")
def conv_transpose(node: Node) -> Conv | None:
    return _conv(node, transposed=True)


@implements(BatchNorm, "::BatchNormalization")
def batch_norm(node: Node) -> BatchNorm | None:
    """Inference form only: one output, `is_test` up to opset 6, not `training_mode` from 14."""
    if not single(node) or attr(node, "training_mode", 0) or not attr(node, "spatial", 1):
        return None
    if version(node) < 7 and not attr(node, "is_test", 0):
        return None
    x, weight, bias, mean, var = inputs(node)[:5]
    return BatchNorm(x, weight, bias, mean, var, attr(node, "epsilon", 1e-5))


def _trailing(node: Node, axis: int) -> tuple[int, ...] | None:
    """Negative axes from `axis` to the last one."""
    dims = rank(arg(node, 0))
    if axis >= 0:
        if dims is None:
            return None
        axis -= dims
    return tuple(range(axis, 0))


@implements(
    Norm, "::LayerNormalization", "::RMSNormalization", "::SimplifiedLayerNormalization", "com.microsoft::SimplifiedLayerNormalization"
)
def last_axes_norm(node: Node) -> Norm | None:
    """SimplifiedLayerNormalization is what ONNX Runtime called RMSNormalization before opset 23."""
    axes = _trailing(node, attr(node, "axis", -1))
    if axes is None or not single(node):
        return None
    kind = "layer" if op_type(node) == "LayerNormalization" else "rms"
    return Norm(kind, arg(node, 0), arg(node, 1), arg(node, 2), axes, attr(node, "epsilon", 1e-5))


@implements(Norm, "::GroupNormalization")
def group_norm(node: Node) -> Norm | None:
    if version(node) < 21:  # scale and bias had one entry per group, not per channel
        return None
    return Norm("group", arg(node, 0), arg(node, 1), arg(node, 2), (), attr(node, "epsilon", 1e-5))


@implements(Norm, "::InstanceNormalization")
def instance_norm(node: Node) -> Norm | None:
    axes = _trailing(node, 2)
    return None if axes is None else Norm("instance", arg(node, 0), arg(node, 1), arg(node, 2), axes, attr(node, "epsilon", 1e-5))


_ARITHMETIC = {
    "Add": "add",
    "Sum": "add",
    "Sub": "sub",
    "Mul": "mul",
    "Div": "div",
    "Pow": "pow",
    "Min": "min",
    "Max": "max",
    "Where": "where",
}


@implements(Elementwise, *("::" + name for name in _ARITHMETIC))
def elementwise(node: Node) -> Elementwise | None:
    if "axis" in node.kwargs:  # before opset 7 the second operand could be aligned at any axis of the first
        return None
    return Elementwise(_ARITHMETIC[op_type(node)], inputs(node))


_POINTWISE: dict[str, tuple[str, float | None, float | None]] = {
    "Relu": ("relu", 0.0, None),
    "Sigmoid": ("sigmoid", 0.0, 1.0),
    "Tanh": ("tanh", -1.0, 1.0),
    "HardSwish": ("hard_swish", -0.375, None),
    "HardSigmoid": ("hard_sigmoid", 0.0, 1.0),
    "LeakyRelu": ("leaky_relu", None, None),
    "PRelu": ("prelu", None, None),
    "Erf": ("erf", -1.0, 1.0),
    "Sqrt": ("sqrt", 0.0, None),
    "Reciprocal": ("reciprocal", None, None),
    "Exp": ("exp", 0.0, None),
    "Neg": ("neg", None, None),
    "Abs": ("abs", 0.0, None),
    "Softplus": ("softplus", 0.0, None),
}


@implements(Activation, *("::" + name for name in _POINTWISE))
def pointwise(node: Node) -> Activation:
    kind, low, high = _POINTWISE[op_type(node)]
    return Activation(kind, arg(node, 0), low, high)


@implements(Activation, "::Elu")
def elu(node: Node) -> Activation:
    return Activation("elu", arg(node, 0), -abs(attr(node, "alpha", 1.0)))


@implements(Activation, "::Gelu")
def gelu(node: Node) -> Activation:
    return Activation("gelu_tanh" if attr(node, "approximate", "none") == "tanh" else "gelu", arg(node, 0), -0.17005)


@implements(Activation, "::Swish")
def swish(node: Node) -> Activation | None:
    return Activation("silu", arg(node, 0), -0.27847) if attr(node, "alpha", 1.0) == 1.0 else None


@implements(Activation, "::Clip")
def clip(node: Node) -> Activation | None:
    """Limits are attributes up to opset 6, optional inputs from 11; a limit that is computed has no view."""
    if version(node) < 11:
        return Activation("clip", arg(node, 0), attr(node, "min"), attr(node, "max"))
    low, high = (scalar(const_value(arg(node, i))) for i in (1, 2))
    if any(arg(node, i) is not None and limit is None for i, limit in ((1, low), (2, high))):
        return None
    return Activation("clip", arg(node, 0), low, high)


@implements(Concat, "::Concat")
def concat(node: Node) -> Concat:
    return Concat(inputs(node), attr(node, "axis", 1))


_POOLS = {"MaxPool": "max", "GlobalMaxPool": "max", "AveragePool": "average", "GlobalAveragePool": "global_average"}


@implements(Pool, *("::" + name for name in _POOLS))
def pool(node: Node) -> Pool | None:
    return Pool(_POOLS[op_type(node)], arg(node, 0)) if single(node) else None


@implements(Pool, "::ReduceMean")
def reduce_mean(node: Node) -> Pool | None:
    """Global average when all axes but batch and channel go; below rank 4 it could as well be a layer norm's mean."""
    dims, axes = rank(arg(node, 0)), const_ints(node, 1, "axes")
    if dims is None or axes is None or dims < 4:
        return None
    return Pool("global_average", arg(node, 0)) if sorted(a % dims for a in axes) == list(range(2, dims)) else None


_REDUCTIONS = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max"}


@implements(Reduce, *("::" + name for name in _REDUCTIONS))
def reduce(node: Node) -> Reduce | None:
    """Axes are an attribute, or an input from opset 13 (sum) and 18 on; without them all axes go."""
    dims, axes = rank(arg(node, 0)), const_ints(node, 1, "axes")
    if not axes or attr(node, "keepdims", 1) != 1 or (dims is None and max(axes) >= 0):
        return None
    return Reduce(_REDUCTIONS[op_type(node)], arg(node, 0), tuple(sorted(a if a < 0 else a - (dims or 0) for a in axes)))


@implements(Softmax, "::Softmax", "::LogSoftmax")
def softmax(node: Node) -> Softmax | None:
    x, dims = arg(node, 0), rank(arg(node, 0))
    axis = attr(node, "axis", -1 if version(node) >= 13 else 1)
    if version(node) < 13 and axis != -1 and axis + 1 != dims:  # flattened from `axis` on: one axis only if it is the last
        return None
    return Softmax(x, axis, op_type(node) == "LogSoftmax")


@implements(Attention, "::Attention")
def attention(node: Node) -> Attention | None:
    """The plain form: four axes, as many key as query heads, no cache, no soft cap, one output."""
    q, k, v = inputs(node)[:3]
    shapes = [value_type(t).shape or () for t in (q, k)]
    plain = all(len(s) == 4 for s in shapes) and shapes[0][1] == shapes[1][1] and single(node)
    if not plain or attr(node, "softcap", 0.0) or any(arg(node, i) is not None for i in (4, 5, 6)):
        return None
    return Attention(q, k, v, arg(node, 3), attr(node, "scale"), bool(attr(node, "is_causal", 0)))


@implements(Cast, "::Cast")
def cast(node: Node) -> Cast:
    to = attr(node, "to")
    return Cast(arg(node, 0), dtype_name(ir.DataType[to] if isinstance(to, str) else ir.DataType(to)))  # opset 1 to 5: its name


@implements(Cast, "::CastLike")
def cast_like(node: Node) -> Cast | None:
    to = value_type(arg(node, 1)).dtype
    return None if to is None else Cast(arg(node, 0), to)


def _integer(dtype: str | None) -> str | None:
    return dtype if re.fullmatch(r"u?int\d+", dtype or "") else None


def _granularity(node: Node) -> tuple[int | None, int] | None:
    """(axis, group) of a (De)QuantizeLinear; None when the scale's rank is not known. One scale in a list is per tensor."""
    shape = value_type(arg(node, 1)).shape
    if shape is None:
        return None
    if attr(node, "block_size", 0):
        return attr(node, "axis", 1), attr(node, "block_size")
    return (None, 0) if shape in ((), (1,)) else (attr(node, "axis", 1), 0)


@implements(Quantize, "::QuantizeLinear", "com.microsoft::QuantizeLinear")
def quantize(node: Node) -> Quantize | None:
    """The integer type is the zero point's, else attribute output_dtype (opset 21), else uint8."""
    zero_point, per = arg(node, 2), _granularity(node)
    given = attr(node, "output_dtype", 0)
    dtype = _integer(value_type(zero_point).dtype if zero_point is not None else dtype_name(ir.DataType(given or ir.DataType.UINT8)))
    return Quantize(arg(node, 0), arg(node, 1), zero_point, dtype, *per) if dtype and per else None


@implements(Dequantize, "::DequantizeLinear", "com.microsoft::DequantizeLinear")
def dequantize(node: Node) -> Dequantize | None:
    """No view when the result is not of the scale's type (output_dtype, opset 23)."""
    dtype, per, to = _integer(value_type(arg(node, 0)).dtype), _granularity(node), attr(node, "output_dtype", 0)
    if dtype is None or per is None or (to and dtype_name(ir.DataType(to)) != value_type(arg(node, 1)).dtype):
        return None
    return Dequantize(arg(node, 0), arg(node, 1), arg(node, 2), dtype, *per)


@implements(DynamicQuantize, "::DynamicQuantizeLinear")
def dynamic_quantize(node: Node) -> DynamicQuantize:
    return DynamicQuantize(arg(node, 0), "uint8", symmetric=False, axis=None, group=0)
