"""Legality of the qg dialect: types, shapes of scales, and stored integers inside their declared range."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qgraph.legal import legal
from qgraph.ops import Q, scale_shape
from qgraph.types import Dim, QSpec, TensorType, int_range, storage, type_of
from qgraph.views import const_value, operands


@legal("qgraph", Q.quantize.default)
@legal("qgraph", Q.fake_quantize.default)
def float_to_grid(node: Node) -> str | None:
    args = operands(node)
    return _float("x", args["x"]) or _encoding(args["x"], args, args["axis"], args["group"])


@legal("qgraph", Q.dequantize.default)
def grid_to_float(node: Node) -> str | None:
    args = operands(node)
    return _dtype(args["dtype"]) or _integers("q", args["q"], args["dtype"]) or _encoding(args["q"], args, args["axis"], args["group"])


@legal("qgraph", Q.lookup.default)
@legal("qgraph", Q.fake_lookup.default)
def levels(node: Node) -> str | None:
    args = operands(node)
    codes = args.get("q")
    x = args["x"] if codes is None else codes
    problem = _float("x", x) if codes is None else _codes(codes, args["table"])
    problem = problem or _float("table", args["table"]) or _table(_type(x), args["table"], args["table_axis"])
    if problem or args["scale"] is None:
        return problem
    problem = _axis(_type(x), args["axis"], args["group"]) or _float("scale", args["scale"])
    dims = None if problem else _scale_dims(_type(x).shape, args["axis"], args["group"])
    problem = problem or _shape("scale", args["scale"], dims)
    const = const_value(args["scale"])
    if problem or const is None or bool(((const != 0) & const.isfinite()).all()):
        return problem
    return "has a scale that is 0 or no number somewhere"


def _codes(q: Any, table: Any) -> str | None:
    found, count, const = _type(q), _type(table).shape, const_value(q)
    if found.dtype not in (None, "uint8"):
        return f"has codes of type {found}, not uint8"
    largest = -1 if const is None or const.numel() == 0 else int(const.max())
    if count and isinstance(count[-1], int) and largest >= count[-1]:
        return f"has code {largest}; its table has {count[-1]} levels"
    return None


def _table(x: TensorType, table: Any, axis: int | None) -> str | None:
    """[L] ascending levels, at most 256, or [n, L] for the n indices of an axis of x."""
    shape, const = _type(table).shape, const_value(table)
    if shape is None:
        return None
    if len(shape) not in (1, 2) or (len(shape) == 2) != (axis is not None):
        return f"has a table of shape {list(shape)} and table_axis={axis}; a table is [L], or [n, L] along an axis"
    if axis is not None and x.shape is not None:
        if not -len(x.shape) <= axis < len(x.shape):
            return f"has table_axis={axis}, which is not an axis of {x}"
        if isinstance(n := x.shape[axis], int) and isinstance(shape[0], int) and n != shape[0]:
            return f"has a table of {shape[0]} rows for {n} along axis {axis}"
    if isinstance(shape[-1], int) and shape[-1] > 256:
        return f"has a table of {shape[-1]} levels; codes are uint8"
    if const is not None and not bool(const.isfinite().all() & (const[..., 1:] >= const[..., :-1]).all()):
        return "has a table whose levels are not ascending numbers"
    return None


@legal("qgraph", Q.dynamic_quantize.default)
def dynamic(node: Node) -> str | None:
    args = operands(node)
    return _dtype(args["dtype"]) or _float("x", args["x"]) or _axis(_type(args["x"]), args["axis"], args["group"])


@legal("qgraph", Q.dequant_linear.default)
@legal("qgraph", Q.dequant_conv.default)
def float_times_grid(node: Node) -> str | None:
    args = operands(node)
    return _float("x", args["x"]) or _weight(args, "", args.get("group", 0)) or _window(args)


@legal("qgraph", Q.quantized_linear.default)
@legal("qgraph", Q.quantized_conv.default)
def grid_times_grid(node: Node) -> str | None:
    args = operands(node)
    per = (-1, -1) if "stride" not in args and len(_type(args["x_scale"]).shape or ()) > 1 else (None, 0)  # per token, or per tensor
    problem = _dtype(args["x_dtype"]) or _integers("x", args["x"], args["x_dtype"]) or _encoding(args["x"], args, per[0], per[1], "x_")
    if problem or (problem := _weight(args, "w_", 0) or _window(args)):
        return problem
    if (args["y_scale"] is None) != (args["y_dtype"] is None):
        return "needs y_scale and y_dtype together, for integer outputs, or neither"
    return None if args["y_dtype"] is None else _encoding(node, args, None, 0, "y_")


def _type(value: Any) -> TensorType:
    return (type_of(value) if isinstance(value, Node) else None) or TensorType(None, None)


def _float(role: str, value: Any) -> str | None:
    found = _type(value)
    return f"has {role} of type {found}, not float" if found.dtype is not None and not found.is_float else None


def _dtype(dtype: str) -> str | None:
    try:
        QSpec(dtype)
    except ValueError:
        return f"has dtype {dtype!r}; integer types are int2 to int16 and uint2 to uint16"
    return None


def _integers(role: str, value: Any, dtype: str) -> str | None:
    """`value` has the storage type of `dtype` and, when it is stored in the module, keeps the range of a narrower type."""
    found, stored = _type(value), str(storage(dtype)).removeprefix("torch.")
    if found.dtype is not None and found.dtype != stored:
        return f"has {role} of type {found}; {dtype} is stored as {stored}"
    const = const_value(value)
    low, high = int_range(dtype)
    if const is None or const.numel() == 0 or (low, high) == (torch.iinfo(const.dtype).min, torch.iinfo(const.dtype).max):
        return None
    smallest, largest = (int(v) for v in torch.aminmax(const.to(torch.int32) if const.dtype == torch.uint16 else const))
    return None if low <= smallest and largest <= high else f"has {role} in {smallest}..{largest}; {dtype} holds {low}..{high}"


def _axis(found: TensorType, axis: int | None, group: int) -> str | None:
    if found.shape is None:
        return None
    try:
        scale_shape([1] * len(found.shape), axis, group)
    except ValueError as problem:
        return f"has an impossible granularity: {problem}"
    return None


def _encoding(x: Any, args: dict[str, Any], axis: int | None, group: int, prefix: str = "") -> str | None:
    """scale and zero point fit x, the granularity and the type."""
    dtype, scale, zero_point = args[f"{prefix}dtype"], args[f"{prefix}scale"], args[f"{prefix}zero_point"]
    problem = _dtype(dtype) or _axis(_type(x), axis, group) or _float(f"{prefix}scale", scale)
    if problem or (
        problem := _shape(f"{prefix}scale", scale, _scale_dims(_type(x).shape, axis, group)) or _positive(f"{prefix}scale", scale)
    ):
        return problem
    if zero_point is None:
        return None
    return _integers(f"{prefix}zero_point", zero_point, dtype) or _shape(f"{prefix}zero_point", zero_point, _type(scale).shape)


def _scale_dims(shape: tuple[Dim, ...] | None, axis: int | None, group: int) -> tuple[Dim, ...] | None:
    """`scale_shape` where some sizes are unknown."""
    if shape is None:
        return () if axis is None else None
    known = scale_shape([d if isinstance(d, int) else 1 for d in shape], axis, group)
    if axis is None or group == 0:
        return known if axis is None or isinstance(shape[axis], int) else (None,)
    kept = axis % len(shape) if group == -1 else None  # one scale per token, however long the token
    return tuple(k if isinstance(d, int) or i == kept else None for i, (k, d) in enumerate(zip(known, shape, strict=True)))


def _shape(role: str, value: Any, expected: tuple[Dim, ...] | None) -> str | None:
    found = _type(value)
    if expected is None or found.shape is None or (expected == () and found.shape == (1,)):
        return None
    pairs = zip(found.shape, expected, strict=False)
    if len(found.shape) == len(expected) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int)):
        return None
    return f"has {role} of shape {list(found.shape)}; its granularity needs {['?' if d is None else d for d in expected]}"


def _positive(role: str, value: Any) -> str | None:
    const = const_value(value)
    if const is None or bool(((const > 0) & const.isfinite()).all()):
        return None
    return f"has a {role} that is not a positive number everywhere"


def _weight(args: dict[str, Any], prefix: str, group: int) -> str | None:
    """weight [N, K] or [N, C, *kernel] with scales per tensor, per row or per group of a row; bias [N]."""
    weight, scale, bias = _type(args["weight"]), _type(args[f"{prefix}scale"]), args["bias"]
    dtype = args[f"{prefix}dtype"]
    axis = 1 if group else None if scale.shape in ((), (1,)) else 0
    problem = _dtype(dtype) or _integers("weight", args["weight"], dtype) or _encoding(args["weight"], args, axis, group, prefix)
    if problem or bias is None:
        return problem
    return _shape("bias", bias, None if weight.shape is None else weight.shape[:1])


def _window(args: dict[str, Any]) -> str | None:
    """Convolutions: sizes per spatial axis, padding as begins then ends."""
    shape = _type(args["weight"]).shape
    if "stride" not in args or shape is None:
        return None
    n = len(shape) - 2
    lengths = {"stride": n, "padding": 2 * n, "dilation": n}
    wrong = next((k for k, size in lengths.items() if len(args[k]) != size), None)
    return None if wrong is None else f"has {wrong} {list(args[wrong])}; a kernel of {n} axes needs {lengths[wrong]} numbers"
