"""Nodes run in order, from any place to any other; a value is dropped after its last use, and constants are computed when needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.utils._pytree import tree_leaves

from qgraph.edit import is_pure
from qgraph.errors import CalibrationError, QGraphError
from qgraph.spill import release, size
from qgraph.text import where
from qgraph.types import attribute

STRIDED = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.as_strided.default}
"""What does not run on every memory layout."""

Values = dict[Node, Any]
"""What one model holds of one batch."""


class Schedule:
    """Nodes in order (None: nothing to do), and which values each is the last to read.

    What follows from constants alone, such as a quantized weight, is computed when it is needed and kept until `computed` is cleared."""

    def __init__(self, nodes: Sequence[Node | None]) -> None:
        self.channels_last = not any(n is not None and n.target in STRIDED for n in nodes)
        self.computed: Values = {}
        self.constant: set[Node] = set()
        for n in nodes:
            if n is not None and n.all_input_nodes and is_pure(n) and all(self.is_constant(x) for x in n.all_input_nodes):
                self.constant.add(n)
        self.nodes = [None if n in self.constant else n for n in nodes]
        last = {value: i for i, n in enumerate(self.nodes) if n is not None for value in (n, *n.all_input_nodes)}
        self.spent: list[list[Node]] = [[] for _ in nodes]
        run = set(nodes)
        for value, i in last.items():
            if run.issuperset(value.users):  # a stop may ask for what is read behind the last one, too: the stream that it adds to
                self.spent[i].append(value)

    def is_constant(self, node: Node) -> bool:
        return node.op == "get_attr" or node in self.constant

    def start(self, feed: Sequence[Any]) -> Values:
        placeholders = [n for n in self.nodes if n is not None and n.op == "placeholder"]
        return dict(zip(placeholders, map(self.laid_out, feed), strict=True))

    def laid_out(self, x: Any) -> Any:
        """Images channels last: convolutions on CPUs take a tenth to a half of the time."""
        images = self.channels_last and isinstance(x, Tensor) and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if images else x

    def run(self, values: Values, start: int, end: int) -> None:
        """Runs nodes start .. end - 1; a value is dropped after its last use."""
        for node, spent in zip(self.nodes[start:end], self.spent[start:end], strict=True):
            if node is not None and node.op != "placeholder":
                values[node] = self.call(node, values)
            for value in spent:
                values.pop(value, None)
            release()

    def load(self, node: Node, values: Values) -> Any:
        if node.op == "get_attr":
            value = attribute(node)
            return value.detach() if isinstance(value, Tensor) else value
        if node not in self.constant:
            return values[node]
        if node not in self.computed:
            self.computed[node] = self.call(node, values)
        return self.computed[node]

    def call(self, node: Node, values: Values) -> Any:
        """Raises CalibrationError when the operation does not run."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.load(n, values))
        target: Any = attribute(node) if node.op == "call_module" else node.target
        try:
            with torch.no_grad():
                return target(*args, **kwargs)
        except QGraphError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as e:
            reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise CalibrationError(f"the model does not run on this batch at {where(node)}: {reason}") from e


def bytes_of(values: Values) -> int:
    return sum(size(v) for v in tree_leaves(list(values.values())) if isinstance(v, Tensor))
