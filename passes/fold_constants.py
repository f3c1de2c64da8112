"""op(constants) -> constant: nodes whose inputs are all stored tensors run now; Shape of known dimensions becomes a constant.

Kept as they are: quantize and dequantize (integer weights stay integers), random and impure nodes, ops of foreign domains, and results
that would make the model grow (Expand, ConstantOfShape)."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import onnx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from qgraph.errors import ModelError
from qgraph.onnx_node import attr
from qgraph.onnx_ops import OnnxOp
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import BISECTION, Decline, Rewriter, graph_modules, is_pure, replace
from qgraph.text import path_of
from qgraph.types import TensorType, attribute, type_of
from qgraph.views import (
    DataMovement,
    Dequantize,
    DynamicQuantize,
    FakeLookup,
    FakeQuantize,
    Lookup,
    Quantize,
    const_value,
    is_const,
    view,
    view_any,
)

_GROWING = {"::ConstantOfShape", "::Expand", "::Tile", "::Range", "::EyeLike", "::OneHot", "::Resize", "::Pad", "::Upsample"}
"""ONNX ops whose result may be far larger than their inputs: not run before their type is known to be small."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """`limit`: a result may be this many bytes larger than twice the constants that die with the node."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-6)

    limit: int = 1 << 20

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(self.fold(body, ctx) for body in graph_modules(gm))

    def fold(self, gm: GraphModule, ctx: Context) -> int:
        """One graph, in order, so that a constant just made is folded into its readers."""
        count = 0
        for node in list(gm.graph.nodes):
            if node._erased or node.op != "call_function":
                continue
            found: Tensor | Sequence[Any] | None = shape_constant(node)
            if found is None and foldable(node):
                found = self.evaluate(node, ctx)
            if found is None or not BISECTION.allows(self.name, node):
                continue
            rw = Rewriter(gm, node, by=self.name)
            replace(node, rw.const(found, name=node.name) if isinstance(found, Tensor) else tuple(_store(rw, v) for v in found))
            count += 1
        if count:
            _drop_unread(gm)
            gm.graph.lint()
            gm.recompile()
        return count

    def evaluate(self, node: Node, ctx: Context) -> Tensor | Sequence[Any] | None:
        """The node's value, or None with a reason in the context's declines."""
        # Constants that die with the node make room; a change of type may double them.
        allowed = self.limit + 2 * sum(_bytes(n) for n in node.all_input_nodes if len(n.users) == 1)
        try:
            return _value(node, allowed)
        except _Refused as refused:
            ctx.declines.append(Decline(self.name, node.name, path_of(node), str(refused)))
            return None


class _Refused(Exception):
    """Why a node of constants is not folded."""


def _value(node: Node, allowed: int) -> Tensor | Sequence[Any]:
    """The node's value. Raises _Refused when it is larger than `allowed` bytes or cannot be had."""
    _require_small(_expected_bytes(node), allowed)
    args, kwargs = map_arg((node.args, node.kwargs), attribute)
    try:
        with torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    except (ModelError, RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise _Refused(f"it cannot be run here: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    values = value if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(v, Tensor) for v in values):
        raise _Refused("its value is not a tensor")
    _require_small(sum(v.numel() * v.element_size() for v in values), allowed)
    # A value that aliases a stored tensor must not share its memory: buffers are changed in place by training.
    return value.clone() if isinstance(value, Tensor) else [v.clone() for v in values]


def _require_small(size: int | None, allowed: int) -> None:
    if size is None:
        raise _Refused("its size is not known before it runs")
    if size > allowed:
        raise _Refused(f"it would add {size} bytes")


def foldable(node: Node) -> bool:
    """All operands are stored tensors (at least one), and running the node once is as good as running it every time."""
    inputs = node.all_input_nodes
    if not inputs or not all(is_const(n) and const_value(n) is not None for n in inputs) or not is_pure(node):
        return False
    if view_any((Quantize, Dequantize, FakeQuantize, DynamicQuantize, Lookup, FakeLookup), node) is not None:
        return False
    target: Any = node.target
    if isinstance(target, OnnxOp):
        return target.domain == "" and onnx.defs.has(target.op_type) and "body__function" not in node.kwargs and not target.references
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten" and torch.Tag.nondeterministic_seeded not in target.tags
    return target is operator.getitem


def _bytes(node: Node) -> int:
    value = const_value(node)
    return 0 if value is None else value.numel() * value.element_size()


def _expected_bytes(node: Node) -> int | None:
    """Size of the result from its type; 0 for an op that does not grow, None when an op may grow without bounds."""
    kind = type_of(node)
    size = _size(kind) if kind is not None else None
    if size is not None:
        return size
    return None if getattr(node.target, "key", None) in _GROWING else 0


def _size(kind: TensorType) -> int | None:
    dtype = getattr(torch, kind.dtype or "", None)
    if kind.shape is None or not isinstance(dtype, torch.dtype) or not all(isinstance(d, int) for d in kind.shape):
        return None
    return prod(d for d in kind.shape if isinstance(d, int)) * dtype.itemsize


def shape_constant(node: Node) -> Tensor | None:
    """ONNX Shape, or a selection of its result (Slice, Gather, Squeeze), when all dimensions that it gives are numbers."""
    if (dims := _shape_of(node)) is not None:
        return _numbers(dims)
    moved = view(DataMovement, node)
    dims = _shape_of(moved.x) if moved is not None and isinstance(node.target, OnnxOp) else None
    others = [n for n in node.all_input_nodes if moved is not None and n is not moved.x]
    if moved is None or dims is None or node.target.outputs != 1 or not all(is_const(n) for n in others):  # type: ignore[union-attr]
        return None
    # Moving positions instead of dimensions tells which dimensions are picked, whatever the op is.
    args = map_arg(node.args, lambda n: torch.arange(len(dims)) if n is moved.x else attribute(n))
    picked = node.target(*args, **node.kwargs)  # type: ignore[operator]
    found = _numbers([dims[i] for i in picked.flatten().tolist()])
    return None if found is None else found.reshape(picked.shape)


def _shape_of(node: Any) -> Sequence[Any] | None:
    if not isinstance(node, Node) or getattr(node.target, "key", None) != "::Shape":
        return None
    source = node.args[0]
    kind = type_of(source) if isinstance(source, Node) else None
    if kind is None or kind.shape is None:
        return None
    start, end = attr(node, "start", 0), attr(node, "end")
    return kind.shape[start:end]


def _numbers(dims: Sequence[Any]) -> Tensor | None:
    return torch.tensor(dims, dtype=torch.int64) if all(isinstance(d, int) for d in dims) else None


def _store(rw: Rewriter, value: Tensor) -> Node:
    return rw.const(value, name=rw.root.name)


def _drop_unread(gm: GraphModule) -> None:
    """Delete the constants of removed nodes."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    for name in [*gm._buffers, *gm._parameters]:
        if name not in used:
            delattr(gm, name)
