"""f(x, c) and f(x, c) -> one f(x, c) that both read: runtimes merge them anyway, and what was promised for the second is then missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.edit import has_writes
from qgraph.onnx_data_views import is_inference_dropout
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import BISECTION, graph_modules, is_pure, replace
from qgraph.text import ALSO, path_of
from qgraph.types import attribute
from qgraph.views import key

SMALL = 64
"""Elements up to which stored tensors are compared by value, as exporters store a number once for every use."""


@dataclass(frozen=True)
class MergeEqual(Pass):
    """Common subexpressions, each body of control flow for itself. What draws numbers stays, and so does a graph with in-place ops.

    Two calls are equal when target, operands and attributes are: the same values, the same stored tensor, or small constants
    of one type with the same bits (not parameters that train: they may grow apart). Rules still find it by either name."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(self._merge(part) for part in graph_modules(gm) if not has_writes(part))

    def _merge(self, gm: GraphModule) -> int:
        known: dict[Any, Node] = {}
        constants: dict[str, Any] = {}
        count = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or not _is_function(node):
                continue
            first = known.setdefault((node.target, _frozen(node.args, constants), _frozen(node.kwargs, constants)), node)
            if first is not node and BISECTION.allows(self.name, node):
                first.meta[ALSO] = (*first.meta.get(ALSO, ()), path_of(node), node.name, *node.meta.get(ALSO, ()))
                replace(node, first)
                count += 1
        if count:
            gm.graph.lint()
            gm.recompile()
        return count


def _is_function(node: Node) -> bool:
    """The same operands always give the same value."""
    return is_pure(node) and (key(node.target) != "::Dropout" or is_inference_dropout(node))


def _frozen(value: Any, constants: dict[str, Any]) -> Any:
    """A key that equal operands share. Numbers of different types and signs of zero are different."""
    if isinstance(value, Node):
        return _constant(value, constants) if value.op == "get_attr" else value
    if isinstance(value, dict):
        return tuple((k, _frozen(v, constants)) for k, v in sorted(value.items()))
    if isinstance(value, tuple | list):
        return tuple(_frozen(v, constants) for v in value)
    if isinstance(value, slice):
        return "slice", *(_frozen(v, constants) for v in (value.start, value.stop, value.step))
    return type(value), repr(value) if isinstance(value, float) else value


def _constant(node: Node, constants: dict[str, Any]) -> Any:
    """What tells a stored value from others: its type and bits where it is small, else its name."""
    target = str(node.target)
    if target not in constants:
        value = attribute(node)
        plain = isinstance(value, torch.Tensor) and not value.requires_grad and value.layout == torch.strided and value.device.type == "cpu"
        small = plain and value.numel() <= SMALL
        bits = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if small else None
        constants[target] = ("get_attr", target) if bits is None else (value.dtype, tuple(value.shape), bits)
    return constants[target]
