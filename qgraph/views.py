"""Interfaces: what a pass may ask of a node, whatever dialect it came from.

`view(Linear, node)` returns a small frozen dataclass with named roles, or None when the node has no such meaning.
The tables `implements(interface, target)` are filled by the file that defines the dialect: aten.py, onnx_views.py, ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch.fx import Node

from qgraph.spill import release
from qgraph.types import Granularity, PerAxis, PerGroup, PerTensor, PerToken, attribute

I = TypeVar("I")


@dataclass(frozen=True)
class Linear:
    """y = alpha * x . weight + beta * bias, contracting axis `x_axis` of x with axis `in_axis` of weight.

    Both operands may be activations (attention products). All axes count from the end (negative);
    weight may have leading batch axes that broadcast with those of x (matmul, bmm)."""

    x: Node
    weight: Node
    bias: Node | None
    in_axis: int
    out_axis: int
    x_axis: int = -1
    alpha: float = 1.0
    beta: float = 1.0


@dataclass(frozen=True)
class Conv:
    """Convolution; weight is [out, in / groups, *kernel], or [in, out / groups, *kernel] when `transposed`.

    `padding` is ((begin, end), ...) per spatial axis, or None when it depends on the input's size (SAME)."""

    x: Node
    weight: Node
    bias: Node | None
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...] | None
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    out_axis: int
    in_axis: int


@dataclass(frozen=True)
class Norm:
    """kind: "layer", "rms", "group" or "instance". `axes` are the normalised axes of x (negative), () when they are per group."""

    kind: str
    x: Node
    weight: Node | None
    bias: Node | None
    axes: tuple[int, ...]
    eps: float


@dataclass(frozen=True)
class BatchNorm:
    """Inference batch norm over channel axis 1: (x - mean) / sqrt(var + eps) * weight + bias."""

    x: Node
    weight: Node | None
    bias: Node | None
    mean: Node
    var: Node
    eps: float


@dataclass(frozen=True)
class Elementwise:
    """Broadcasting arithmetic on two or more operands. kind: "add", "sub", "mul", "div", "pow", "min", "max", "where".

    An operand may be a Python number."""

    kind: str
    inputs: tuple[Node | float, ...]


@dataclass(frozen=True)
class Activation:
    """Pointwise function of one tensor. kind: "relu", "clip", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "hard_swish",
    "hard_sigmoid", "leaky_relu", "prelu" (a slope per channel), "elu", "erf", "sqrt", "rsqrt", "reciprocal", "exp", "neg", "abs", "softplus".

    `low` and `high` are the bounds that the output is known to keep (None: unbounded); for "clip" they are its limits."""

    kind: str
    x: Node
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class DataMovement:
    """Moves or selects elements without changing them: "reshape", "transpose", "slice", "gather", "squeeze", "unsqueeze",
    "expand", "split", "getitem", "flatten", "copy", "tile", "space_to_depth", "depth_to_space".

    `perm` is given for "transpose" when known. x is the data operand."""

    kind: str
    x: Node
    perm: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Concat:
    inputs: tuple[Node, ...]
    axis: int


@dataclass(frozen=True)
class Pool:
    """kind: "max", "average" or "global_average" (also aten adaptive_avg_pool to size 1, and mean over all spatial axes)."""

    kind: str
    x: Node


@dataclass(frozen=True)
class Reduce:
    """kind: "mean", "sum", "max" or "variance" (divided by the count) over `axes` of x, counted from the end; the axes stay, with size 1."""

    kind: str
    x: Node
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Pad:
    """Constant padding by `value`; `pads` is ((begin, end), ...) for every axis of x, or None when not constant.

    Other modes (reflect, edge) are DataMovement."""

    x: Node
    pads: tuple[tuple[int, int], ...] | None
    value: float


@dataclass(frozen=True)
class Embedding:
    """Rows of weight [vocabulary, width] selected by integer indices."""

    weight: Node
    indices: Node


@dataclass(frozen=True)
class Softmax:
    x: Node
    axis: int
    log: bool = False


@dataclass(frozen=True)
class Attention:
    """softmax(scale * q k^T + mask) v; q, k, v are [..., heads, length, head_dim]. scale None: 1 / sqrt(head_dim)."""

    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float | None
    causal: bool


@dataclass(frozen=True)
class Cast:
    """Changes the element type to torch's dtype name `to`."""

    x: Node
    to: str


@dataclass(frozen=True)
class Size:
    """The shape of x, one of its sizes or their product: integers that do not depend on the elements of x."""

    x: Node


@dataclass(frozen=True)
class Quantize:
    """x -> integers of type `dtype` ("int8"): saturate(round(x / scale) + zero_point)."""

    x: Node
    scale: Node
    zero_point: Node | None
    dtype: str
    axis: int | None
    group: int


@dataclass(frozen=True)
class Dequantize:
    """(q - zero_point) * scale. `dtype` is the integer type that q holds ("int4" in an int8 tensor)."""

    q: Node
    scale: Node
    zero_point: Node | None
    dtype: str
    axis: int | None
    group: int


@dataclass(frozen=True)
class FakeQuantize:
    """dequantize(quantize(x))."""

    x: Node
    scale: Node
    zero_point: Node | None
    dtype: str
    axis: int | None
    group: int


@dataclass(frozen=True)
class DynamicQuantize:
    """x -> (integers, scale, zero point), the range taken from x itself; a node with three outputs."""

    x: Node
    dtype: str
    symmetric: bool
    axis: int | None
    group: int


@dataclass(frozen=True)
class Lookup:
    """table[q] * scale: codes q stand for the levels of a table [L], or [n, L] with one row per index of `table_axis` of q."""

    q: Node
    table: Node
    scale: Node | None
    table_axis: int | None
    axis: int | None
    group: int


@dataclass(frozen=True)
class FakeLookup:
    """The level times scale that is nearest to x."""

    x: Node
    table: Node
    scale: Node | None
    table_axis: int | None
    axis: int | None
    group: int


def granularity(axis: int | None, group: int) -> Granularity:
    """The inverse of QSpec.axis, QSpec.group."""
    if axis is None:
        return PerTensor()
    if group == -1:
        return PerToken()
    return PerGroup(axis, group) if group else PerAxis(axis)


VIEWS: dict[type, dict[Any, Callable[[Node], Any]]] = {}
"""interface -> target (see `key`) -> function from the node to the interface, or None; read it through `table`."""

DIALECTS = ("qgraph.aten", "qgraph.onnx_views", "qgraph.ops")
"""The files that fill VIEWS for the dialects that qgraph knows, imported when a view is first asked for."""


@cache
def _load_dialects() -> None:
    for module in DIALECTS:
        import_module(module)


def table(interface: type[I]) -> dict[Any, Callable[[Node], I | None]]:
    """The targets that implement `interface`."""
    _load_dialects()
    return VIEWS.get(interface, {})


def key(target: Any) -> Any:
    """What a target is known by in tables: `OnnxOp` gives "domain::OpType", everything else is itself."""
    return getattr(target, "key", target)


def implements(interface: type[I], *targets: Any) -> Callable[[Callable[[Node], I | None]], Callable[[Node], I | None]]:
    """Decorator: this function reads nodes of these targets as `interface`.

    A target is an OpOverload, a Python function, or "domain::OpType" for ONNX ("::MatMul" for the default domain)."""

    def register(fn: Callable[[Node], I | None]) -> Callable[[Node], I | None]:
        for target in targets:
            VIEWS.setdefault(interface, {})[key(target)] = fn
        return fn

    return register


def view(interface: type[I], node: Any) -> I | None:
    """The node seen through the interface, or None when it has no such meaning."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    fn = table(interface).get(key(node.target))
    return fn(node) if fn else None


def view_any(interfaces: Iterable[type[Any]], node: Any) -> Any:
    """The first of `interfaces` that the node has, or None."""
    return next((v for i in interfaces if (v := view(i, node)) is not None), None)


def operands(node: Node) -> dict[str, Any]:
    """Arguments of an OpOverload call by schema name, defaults filled in: nobody counts positions."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    return named | {a.name: v for a, v in zip(schema, node.args, strict=False)} | dict(node.kwargs)


def is_const(node: Any) -> bool:
    """True for a node that reads a tensor stored in the module (weight, bias, initializer)."""
    return isinstance(node, Node) and node.op == "get_attr" and not isinstance(attribute(node), torch.nn.Module)


def const_value(node: Any) -> torch.Tensor | None:
    """The tensor behind a constant node (not copied, possibly memory-mapped: never write to it), else None."""
    if not is_const(node):
        return None
    release()  # of mapped ones, that before has been read
    value = attribute(node)
    return value.detach() if isinstance(value, torch.Tensor) else None
