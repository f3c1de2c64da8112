"""qg op -> standard ONNX operators: the table LOWER, for whatever no integer kernel has claimed.

    LOWER[torch.ops.qgraph.quantize.default] = function(node, rw) -> what replaces the node

An op of your own gets a line in the table: `LOWER[torch.ops.mine.op.default] = ...` before `lower` is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qgraph.backends.onnxruntime.emit import Emitter
from qgraph.errors import LoweringError
from qgraph.onnx_values import onnx_dtype
from qgraph.ops import Q
from qgraph.pattern import Match, Op
from qgraph.rewrite import Rewriter, Rule
from qgraph.text import where
from qgraph.types import int_range, storage, type_of
from qgraph.views import const_value, is_const, operands

Lowered = Node | tuple[Node | None, ...]

LOWER: dict[Any, Callable[[Node, Rewriter], Lowered]] = {}
"""Target of a qg op -> function that emits ONNX for one node of it."""


def lowers(target: Any) -> Callable[[Callable[[Node, Rewriter], Lowered]], Callable[[Node, Rewriter], Lowered]]:
    """Decorator: this function lowers nodes of `target`."""

    def register(fn: Callable[[Node, Rewriter], Lowered]) -> Callable[[Node, Rewriter], Lowered]:
        LOWER[target] = fn
        return fn

    return register


def lower_rules() -> tuple[Rule, ...]:
    """The table as rules."""
    return tuple(_rule(target, fn) for target, fn in LOWER.items())


def _rule(target: Any, fn: Callable[[Node, Rewriter], Lowered]) -> Rule:
    def build(m: Match, rw: Rewriter) -> Lowered:
        return fn(m.root, rw)

    return Rule(f"lower {target}", Op(target), build)


ONNX_INTEGERS = {"int8": 13, "uint8": 13, "int16": 21, "uint16": 21, "int4": 21, "uint4": 21, "int2": 25, "uint2": 25}
"""Integer type of QuantizeLinear -> the opset that first takes it."""


def onnx_integer(dtype: str) -> str | None:
    """The smallest ONNX integer type that holds the values of `dtype`: "int3" -> "int4"."""
    low, high = int_range(dtype)
    names = sorted((n for n in ONNX_INTEGERS if n.startswith("u") == dtype.startswith("u")), key=int_range)
    fits = [n for n in names if int_range(n)[0] <= low and high <= int_range(n)[1]]
    return min(fits, key=lambda n: int_range(n)[1]) if fits else None


def _opset(dtype: str, axis: int | None, group: int, scale: Tensor | None) -> int:
    """The first opset in which Quantize/DequantizeLinear has this form: 10 per tensor, 13 per axis, 19 with 16-bit scales, 21 blocked."""
    if group:
        return max(21, ONNX_INTEGERS[dtype])
    half = scale is not None and scale.dtype != torch.float32
    first = 10 if dtype in ("int8", "uint8") and axis is None else ONNX_INTEGERS[dtype]
    return max(first, 19) if half else first


def _attributes(axis: int | None, group: int) -> dict[str, Any]:
    return {} if axis is None else {"axis": axis} | ({"block_size": group} if group else {})


def _integers(o: Emitter, node: Node | None, dtype: str, hint: str, shape: Tensor | None) -> Node | None:
    """A constant of integers in the ONNX type `dtype`; zeros in the shape of the scale when there is none."""
    value = None if node is None else const_value(node)
    if node is not None and (value is None or dtype in ("int8", "uint8", "int16", "uint16")):
        return node
    if value is None and shape is None:
        return None
    data = value if value is not None else torch.zeros(shape.shape, dtype=torch.int16)  # type: ignore[union-attr]
    torch_type = getattr(torch, dtype, None) if dtype in ("int8", "uint8", "int16", "uint16") else None
    return o.const(data.to(torch_type), hint) if torch_type is not None else o.integers(data, dtype, hint)


@lowers(Q.quantize.default)
def quantize(node: Node, rw: Rewriter) -> Node:
    """QuantizeLinear. The integer type is that of the zero point, so there always is one."""
    p, o = operands(node), Emitter(rw)
    if p["dtype"] not in ONNX_INTEGERS or p["group"] == -1:
        raise LoweringError(
            f"{where(node)}: ONNX has no QuantizeLinear to {p['dtype']}{' per token' if p['group'] == -1 else ''}; use int8 or uint8"
        )
    scale = const_value(p["scale"])
    zero = _integers(o, p["zero_point"], p["dtype"], "zero_point", scale)
    operands_ = (p["x"], p["scale"]) if zero is None else (p["x"], p["scale"], zero)
    since = _opset(p["dtype"], p["axis"], p["group"], scale)
    extra = _attributes(p["axis"], p["group"])
    return o("QuantizeLinear", *operands_, dtype=p["dtype"], like=p["x"], since=since, main=True, **extra)


@lowers(Q.dequantize.default)
def dequantize(node: Node, rw: Rewriter) -> Node:
    """DequantizeLinear. A constant moves into the narrowest ONNX type that holds it, unless an integer kernel reads it (int8)."""
    p, o = operands(node), Emitter(rw)
    if p["group"] == -1:
        return _float_rows(o, node, p)
    dtype = onnx_integer(p["dtype"]) if is_const(p["q"]) else p["dtype"]
    if dtype not in ONNX_INTEGERS:
        raise LoweringError(f"{where(node)}: ONNX has no DequantizeLinear of {p['dtype']}")
    scale = const_value(p["scale"])
    q = _integers(o, p["q"], dtype, "integers", None)
    stored = is_const(p["q"])  # QGemm is made only where the weight has a zero point, be it all zeros
    zero = _integers(o, p["zero_point"], dtype, "zero_point", scale) if stored or p["zero_point"] is not None else None
    operands_ = (q, p["scale"]) if zero is None else (q, p["scale"], zero)
    since = _opset(dtype, p["axis"], p["group"], scale)
    extra = _attributes(p["axis"], p["group"])
    return o("DequantizeLinear", *operands_, like=node, dtype=_scale_type(p["scale"]), since=since, main=True, **extra)


def _float_rows(o: Emitter, node: Node, p: dict[str, Any]) -> Node:
    """(q - zero_point) * scale with a scale per row, which broadcasts; in float32, as the reference."""
    kind = _scale_type(p["scale"]) or "float32"
    y = o("Cast", p["q"], dtype="float32", like=node, to=int(onnx_dtype("float32")))
    for op_type, by in (("Sub", p["zero_point"]), ("Mul", p["scale"])):
        if by is not None:
            y = o(op_type, y, o.cast(by, "float32"), dtype="float32", like=node, since=7, main=op_type == "Mul")
    return o.cast(y, kind)


def _scale_type(scale: Node) -> str | None:
    value, t = const_value(scale), type_of(scale)
    return str(value.dtype).removeprefix("torch.") if value is not None else t.dtype if t is not None else None


@lowers(Q.fake_quantize.default)
def fake_quantize(node: Node, rw: Rewriter) -> Node:
    """dequantize(quantize(x)), each of which is lowered in turn."""
    p = operands(node)
    rest = (p["scale"], p["zero_point"], p["dtype"], p["axis"], p["group"])
    q = rw.call(Q.quantize.default, p["x"], *rest)
    return rw.call(Q.dequantize.default, q, *rest, like=node)


@lowers(Q.dynamic_quantize.default)
def dynamic_quantize(node: Node, rw: Rewriter) -> Lowered:
    """Case 1: per token; uint8 for integer kernels, other types of at most 8 bits as a simulation. Case 2: asymmetric uint8 per tensor,
    which is DynamicQuantizeLinear."""
    p, o = operands(node), Emitter(rw)
    per_tensor = p["axis"] is None and not p["symmetric"] and p["dtype"] == "uint8"
    per_token = p["group"] == -1 and storage(p["dtype"]).itemsize == 1
    if not (per_tensor or per_token):
        per = "per token" if p["group"] == -1 else f"per group of {p['group']}" if p["group"] else "per tensor"
        kind = f"{p['dtype']} {'symmetric' if p['symmetric'] else 'asymmetric'} {per}"
        raise LoweringError(
            f"{where(node)}: ONNX Runtime has no kernel for x quantized at run time as {kind} here; use uint8 asymmetric per tensor"
        )
    t = type_of(p["x"])
    half = t.dtype if t is not None and t.dtype in ("float16", "bfloat16") else None
    x = o.cast(p["x"], "float32") if half else p["x"]
    if p["group"] == -1:
        return _rows(o, x, p["dtype"], symmetric=p["symmetric"], kind=half or "float32")
    found = o("DynamicQuantizeLinear", x, outputs=3, since=11, main=True)
    q, scale, zero = o.outputs(found, "uint8", "float32", "uint8")
    return q, o.cast(scale, half) if half else scale, zero


SMALLEST_RANGE = {"float32": 1e-30, "bfloat16": 1e-30, "float16": 255 * 2.0**-24}
"""Instead of the range of a row of zeros, whose integers are then its zero point, as they should be; its scale is no 0 in that type."""


def _rows(o: Emitter, x: Node, dtype: str, *, symmetric: bool, kind: str) -> tuple[Node, Node, Node]:
    """(rows of a float32 x in integers, scale [..., 1] in the float type `kind`, zero point [..., 1]) as the reference has them.

    One range per row is a blocked QuantizeLinear, which takes no longer than one per tensor."""
    first, last = int_range(dtype)
    axes, least = o.const(torch.tensor([-1]), "axes"), o.const(torch.tensor(SMALLEST_RANGE[kind]), "least")

    def rounded(scale: Node) -> Node:
        return o.cast(o.cast(scale, kind), "float32")

    high = o("ReduceMax", x, axes, dtype="float32", since=18, keepdims=1)
    below = o("Neg", o("ReduceMin", x, axes, dtype="float32", since=18, keepdims=1), dtype="float32", since=6)
    if symmetric:
        reach = o("Max", high, below, least, dtype="float32", since=8)
        scale = rounded(o("Div", reach, o.const(torch.tensor(float((last - first) // 2)), "steps"), dtype="float32", since=7))
        middle = o.const(torch.tensor([(first + last + 1) // 2], dtype=storage(dtype)), "middle")
        zero = o("Expand", middle, o("Shape", scale, dtype="int64"), dtype=_stored(dtype), since=8)
    else:  # Clip and Relu are twice as fast as Max on so few numbers
        below = o("Relu", below, dtype="float32", since=6)
        extent = o("Add", o("Clip", high, least, dtype="float32", since=11), below, dtype="float32", since=7)
        scale = rounded(o("Div", extent, o.const(torch.tensor(float(last - first)), "steps"), dtype="float32", since=7))
        if dtype == "uint8":
            zero = o("QuantizeLinear", below, scale, dtype="uint8", since=21, axis=-1, block_size=1)
        else:
            zero = _codes(o, below, scale, o.const(torch.tensor(float(first)), "first"), dtype)
    return _row_integers(o, x, scale, zero, dtype), o.cast(scale, kind), zero


def _row_integers(o: Emitter, x: Node, scale: Node, zero: Node, dtype: str) -> Node:
    """saturate(round(x / scale) + zero): one QuantizeLinear, whose block is a row, where the length of rows is known."""
    t = type_of(x)
    length = t.shape[-1] if t is not None and t.shape else None
    if isinstance(length, int) and length > 0 and dtype == "uint8":
        return o("QuantizeLinear", x, scale, zero, dtype="uint8", like=x, since=21, main=True, axis=-1, block_size=length)
    return _codes(o, x, scale, o.cast(zero, "float32"), dtype)


def _codes(o: Emitter, x: Node, scale: Node, zero: Node, dtype: str) -> Node:
    """saturate(round(x / scale) + zero) in float32, then stored as integers."""
    steps = o("Round", o("Div", x, scale, dtype="float32", since=7), dtype="float32", since=11)
    codes = o("Add", steps, zero, dtype="float32", since=7)
    bounds = (o.const(torch.tensor(float(v)), "bound") for v in int_range(dtype))
    stored = _stored(dtype)
    return o("Cast", o("Clip", codes, *bounds, dtype="float32", since=11), dtype=stored, like=x, main=True, to=int(onnx_dtype(stored)))


def _stored(dtype: str) -> str:
    """The ONNX type that holds integers of `dtype` while the model runs."""
    return str(storage(dtype)).removeprefix("torch.")


def leftovers(nodes: list[Node]) -> list[Node]:
    """qg nodes that are still in a graph."""
    return [n for n in nodes if re.match(r"qgraph[.:]", str(n.target)) and n.op == "call_function"]
