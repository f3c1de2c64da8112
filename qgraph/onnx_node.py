"""Reading an ONNX node: inputs by position, attributes by name, types and constants. For views; passes ask views."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from qgraph.types import TensorType, type_of
from qgraph.views import const_value


def inputs(node: Node) -> tuple[Any, ...]:
    return tuple(node.args)


def arg(node: Node, i: int) -> Any:
    """Input i, or None when it is absent."""
    return node.args[i] if i < len(node.args) else None


def attr(node: Node, name: str, default: Any = None) -> Any:
    return node.kwargs.get(name, default)


def op_type(node: Node) -> str:
    """ "MatMul" """
    return str(node.target.op_type)  # type: ignore[union-attr]


def version(node: Node) -> int:
    """The opset version under which the node was written."""
    return int(node.target.version)  # type: ignore[union-attr]


def single(node: Node) -> bool:
    """True when the node has one output, so that its value is a tensor and not a tuple."""
    return int(getattr(node.target, "outputs", 1)) == 1


def value_type(value: Any) -> TensorType:
    """Type of an input; both fields None when nothing is known."""
    if isinstance(value, Node):
        if found := type_of(value):
            return found
        if (const := const_value(value)) is not None:
            return TensorType(str(const.dtype).removeprefix("torch."), tuple(const.shape))
    return TensorType(None, None)


def rank(value: Any) -> int | None:
    return value_type(value).rank


def scalar(value: torch.Tensor | None) -> float | None:
    """The only element of a constant, else None."""
    return None if value is None or value.numel() != 1 else float(value)


def const_ints(node: Node, i: int, name: str) -> tuple[int, ...] | None:
    """Integers given by attribute `name` (older opsets) or by constant input i; None when absent or computed."""
    if name in node.kwargs:
        return tuple(attr(node, name))
    const = const_value(arg(node, i))
    return None if const is None else tuple(int(v) for v in const.flatten().tolist())
