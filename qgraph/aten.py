"""Views of aten targets that compute: products, convolutions, norms, arithmetic, activations.

The targets are what `torch.export` gives before decomposition. Views of targets that move data are in `qgraph.aten_data`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

import qgraph.aten_data  # noqa: F401  (the other half of the dialect's tables)
from qgraph.types import type_of
from qgraph.views import (
    Activation,
    BatchNorm,
    Conv,
    Elementwise,
    Linear,
    Norm,
    implements,
    operands,
)

aten = torch.ops.aten


def _overloads(*names: str) -> list[Any]:
    """All overloads on tensors of the aten ops that exist in this torch, without the `out=` ones."""
    packets = [getattr(aten, name) for name in names if hasattr(aten, name)]
    found = [getattr(p, o) for p in packets for o in p.overloads() if not o.endswith("out")]
    return [t for t in found if any(isinstance(a.type, torch.TensorType) for a in t._schema.arguments)]


def _rank(node: Any) -> int | None:
    t = type_of(node) if isinstance(node, Node) else None
    return None if t is None else t.rank


def _numbers(value: Any, n: int) -> tuple[int, ...] | None:
    """torch's int[n] argument, where one number stands for all; None when a number is symbolic."""
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(v, int) for v in values):
        return None
    return tuple(values * n if len(values) == 1 else values)


# Products


@implements(Linear, aten.linear.default)
def _linear(node: Node) -> Linear:
    o = operands(node)
    return Linear(o["input"], o["weight"], o["bias"], in_axis=-1, out_axis=-2)


@implements(Linear, aten.addmm.default)
def _addmm(node: Node) -> Linear | None:
    o = operands(node)
    if not all(isinstance(o[k], int | float) for k in ("alpha", "beta")):
        return None
    return Linear(o["mat1"], o["mat2"], o["self"], in_axis=-2, out_axis=-1, alpha=float(o["alpha"]), beta=float(o["beta"]))


@implements(Linear, aten.mm.default, aten.bmm.default)
def _mm(node: Node) -> Linear:
    o = operands(node)
    return Linear(o["self"], o["mat2"], None, in_axis=-2, out_axis=-1)


@implements(Linear, aten.matmul.default)
def _matmul(node: Node) -> Linear | None:
    o = operands(node)
    # A vector on the right has no output axis; a vector on the left keeps the meaning (x[k] . w[k, n]).
    return Linear(o["self"], o["other"], None, in_axis=-2, out_axis=-1) if (_rank(o["other"]) or 0) >= 2 else None


# Convolutions


def _padding(value: Any, n: int, kernel: Sequence[Any], dilation: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
    """((begin, end), ...) from ints or from "valid" and "same", which in torch only depends on the kernel (stride is 1)."""
    if value == "valid":
        return ((0, 0),) * n
    if value == "same":
        if not all(isinstance(k, int) for k in kernel):
            return None
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    ints = _numbers(value, n)
    return None if ints is None else tuple((p, p) for p in ints)


def _conv(node: Node, *, n: int, transposed: bool) -> Conv | None:
    o = operands(node)
    weight = type_of(o["weight"])
    stride, dilation = _numbers(o["stride"], n), _numbers(o["dilation"], n)
    extra = _numbers(o.get("output_padding", 0), n)
    if weight is None or weight.shape is None or stride is None or dilation is None or extra is None:
        return None
    # [out, in / groups, *kernel], and [in, out / groups, *kernel] when transposed; axes count from the end.
    out_axis, in_axis = (-n - 1, -n - 2) if transposed else (-n - 2, -n - 1)
    return Conv(
        x=o["input"],
        weight=o["weight"],
        bias=o["bias"],
        stride=stride,
        padding=_padding(o["padding"], n, weight.shape[2:], dilation),
        dilation=dilation,
        groups=o["groups"],
        transposed=transposed,
        output_padding=extra,
        out_axis=out_axis,
        in_axis=in_axis,
    )


def _batched(node: Node, n: int) -> bool:
    """torch also takes an image without a batch axis, which no other dialect has."""
    return _rank(operands(node)["input"]) in (n + 2, None)


def _conv_of(n: int, *, transposed: bool) -> Callable[[Node], Conv | None]:
    return lambda node: _conv(node, n=n, transposed=transposed) if _batched(node, n) else None


for _n, _plain, _back in (
    (1, aten.conv1d, aten.conv_transpose1d.default),
    (2, aten.conv2d, aten.conv_transpose2d.input),
    (3, aten.conv3d, aten.conv_transpose3d.input),
):
    implements(Conv, _plain.default, _plain.padding)(_conv_of(_n, transposed=False))
    implements(Conv, _back)(_conv_of(_n, transposed=True))


@implements(Conv, aten.convolution.default, aten._convolution.default)
def _convolution(node: Node) -> Conv | None:
    o = operands(node)
    rank = _rank(o["weight"])
    if rank is None or not _batched(node, rank - 2):
        return None
    return _conv(node, n=rank - 2, transposed=bool(o["transposed"]))


# Norms


@implements(Norm, aten.layer_norm.default)
def _layer_norm(node: Node) -> Norm:
    o = operands(node)
    return Norm("layer", o["input"], o["weight"], o["bias"], _last(len(o["normalized_shape"])), o["eps"])


def _last(n: int) -> tuple[int, ...]:
    return tuple(range(-n, 0))


@implements(Norm, aten.rms_norm.default)
def _rms_norm(node: Node) -> Norm | None:
    o = operands(node)
    x = type_of(o["input"])
    # Without eps torch takes the machine epsilon of x's type.
    eps = o["eps"] if o["eps"] is not None else torch.finfo(getattr(torch, x.dtype)).eps if x and x.dtype and x.is_float else None
    return None if eps is None else Norm("rms", o["input"], o["weight"], None, _last(len(o["normalized_shape"])), eps)


@implements(Norm, aten.group_norm.default)
def _group_norm(node: Node) -> Norm:
    o = operands(node)
    return Norm("group", o["input"], o["weight"], o["bias"], (), o["eps"])


@implements(Norm, aten.instance_norm.default)
def _instance_norm(node: Node) -> Norm | None:
    o = operands(node)
    rank = _rank(o["input"])
    if rank is None or rank < 3 or not o["use_input_stats"]:
        return None
    return Norm("instance", o["input"], o["weight"], o["bias"], _last(rank - 2), o["eps"])


# Spellings with several results (native_batch_norm and its kin) become batch_norm at capture: a rewrite replaces one value by one.
@implements(BatchNorm, aten.batch_norm.default)
def _batch_norm(node: Node) -> BatchNorm | None:
    o = operands(node)
    mean, var = o["running_mean"], o["running_var"]
    if o["training"] or not isinstance(mean, Node) or not isinstance(var, Node):
        return None
    return BatchNorm(o["input"], o["weight"], o["bias"], mean, var, o["eps"])


# Elementwise


def _elementwise(kind: str) -> Callable[[Node], Elementwise | None]:
    def read(node: Node) -> Elementwise | None:
        o = operands(node)
        values = [o[a.name] for a in node.target._schema.arguments if a.name not in ("alpha", "rounding_mode")]  # type: ignore[union-attr]
        if o.get("alpha", 1) != 1 or o.get("rounding_mode") is not None or len(values) != 2:
            return None
        return Elementwise(kind, (values[0], values[1]))

    return read


_BINARY = {
    "add": ("add", "add_"),
    "sub": ("sub", "sub_"),
    "mul": ("mul", "mul_"),
    "div": ("div", "div_", "true_divide"),
    "pow": ("pow", "pow_"),
    "min": ("minimum",),
    "max": ("maximum",),
}

for _kind, _names in _BINARY.items():
    implements(Elementwise, *_overloads(*_names))(_elementwise(_kind))
implements(Elementwise, aten.min.other)(_elementwise("min"))
implements(Elementwise, aten.max.other)(_elementwise("max"))


@implements(Elementwise, aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(node: Node) -> Elementwise | None:
    o = operands(node)
    return Elementwise("sub", (o["other"], o["self"])) if o["alpha"] == 1 else None


@implements(Elementwise, aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(node: Node) -> Elementwise:
    o = operands(node)
    return Elementwise("where", (o["condition"], o["self"], o["other"]))


@implements(Elementwise, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
def _masked_fill(node: Node) -> Elementwise:
    o = operands(node)
    return Elementwise("where", (o["mask"], o["value"], o["self"]))


# Activations


def _bounded(kind: str, low: float | None, high: float | None) -> Callable[[Node], Activation]:
    return lambda node: Activation(kind, operands(node)["self"], low, high)


# The smallest value of x * sigmoid(x) is -0.27846, of hard_swish -0.375.
_POINTWISE: dict[str, tuple[str, float | None, float | None]] = {
    "relu": ("relu", 0.0, None),
    "sigmoid": ("sigmoid", 0.0, 1.0),
    "tanh": ("tanh", -1.0, 1.0),
    "silu": ("silu", -0.27847, None),
    "hardswish": ("hard_swish", -0.375, None),
    "hardsigmoid": ("hard_sigmoid", 0.0, 1.0),
    "leaky_relu": ("leaky_relu", None, None),
    "prelu": ("prelu", None, None),
    "erf": ("erf", -1.0, 1.0),
    "sqrt": ("sqrt", 0.0, None),
    "rsqrt": ("rsqrt", 0.0, None),
    "reciprocal": ("reciprocal", None, None),
    "exp": ("exp", 0.0, None),
    "neg": ("neg", None, None),
    "abs": ("abs", 0.0, None),
    "relu6": ("clip", 0.0, 6.0),
}

for _name, (_kind, _low, _high) in _POINTWISE.items():
    implements(Activation, *_overloads(_name, f"{_name}_"))(_bounded(_kind, _low, _high))


@implements(Activation, aten.gelu.default, aten.gelu_.default)
def _gelu(node: Node) -> Activation:
    o = operands(node)
    # The smallest value is -0.16997, and -0.17004 for the tanh form.
    return Activation("gelu" if o["approximate"] == "none" else "gelu_tanh", o["self"], -0.17005, None)


@implements(Activation, aten.softplus.default)
def _softplus(node: Node) -> Activation | None:
    o = operands(node)
    return Activation("softplus", o["self"], 0.0, None) if (o["beta"], o["threshold"]) == (1, 20) else None


@implements(Activation, aten.elu.default, aten.elu_.default)
def _elu(node: Node) -> Activation | None:
    o = operands(node)
    # torch's elu has three constants; the kind "elu" means alpha * (exp(x) - 1) below zero and x above.
    if o["scale"] != 1 or o["input_scale"] != 1 or not isinstance(o["alpha"], int | float):
        return None
    return Activation("elu", o["self"], -abs(float(o["alpha"])), None)


def _clip(x: Node, low: Any, high: Any) -> Activation | None:
    if not all(v is None or isinstance(v, int | float) for v in (low, high)):
        return None
    bounds = [None if v is None or math.isinf(v) else float(v) for v in (low, high)]
    return Activation("clip", x, bounds[0], bounds[1])


@implements(Activation, aten.hardtanh.default, aten.hardtanh_.default)
def _hardtanh(node: Node) -> Activation | None:
    o = operands(node)
    return _clip(o["self"], o["min_val"], o["max_val"])


@implements(Activation, aten.clamp.default, aten.clamp_.default, aten.clip.default, aten.clip_.default)
def _clamp(node: Node) -> Activation | None:
    o = operands(node)
    return _clip(o["self"], o["min"], o["max"])


@implements(Activation, aten.clamp_min.default, aten.clamp_min_.default)
def _clamp_min(node: Node) -> Activation | None:
    o = operands(node)
    return _clip(o["self"], o["min"], None)


@implements(Activation, aten.clamp_max.default, aten.clamp_max_.default)
def _clamp_max(node: Node) -> Activation | None:
    o = operands(node)
    return _clip(o["self"], None, o["max"])
