"""Constants that only one body of control flow reads move into it, so that passes see its weights as constants.

Exporters store the weights of all branches of an If at the top level. A constant with several readers stays where it is: a copy for
each body would make the file grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from qgraph.edit import add_constant, graph_modules
from qgraph.onnx_ops import CAPTURES
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.types import attribute
from qgraph.views import const_value


@dataclass(frozen=True)
class SinkConstants(Pass):
    """ONNX graphs; the count is constants moved by one level."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(_sink(node, part) for part in graph_modules(gm) for node in list(part.graph.nodes) if node.op == "call_function")


def _sink(node: Node, gm: GraphModule) -> int:
    count = 0
    for key in [k for k in node.kwargs if k.startswith(CAPTURES)]:
        source = node.kwargs[key.removeprefix(CAPTURES)]
        assert isinstance(source, Node)
        if len(source.users) == 1:  # else the body belongs to several nodes
            count += _sink_into(attribute(source), node, key)
    if count:
        gm.recompile()
    return count


def _sink_into(body: GraphModule, node: Node, key: str) -> int:
    captured: tuple[Node, ...] = tuple(node.kwargs[key])  # type: ignore[arg-type]
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"][-len(captured) :]
    moved = [(value, inner) for value, inner in zip(captured, inputs, strict=True) if _belongs_to(value, node)]
    end = next(n for n in body.graph.nodes if n.op != "placeholder")
    for value, inner in moved:
        with body.graph.inserting_before(end):
            new = body.graph.get_attr(add_constant(body, str(value.target), const_value(value)))
        new.meta.update(value.meta)
        inner.replace_all_uses_with(new)
        body.graph.erase_node(inner)
    if moved:
        gone = {value for value, _ in moved}
        left = tuple(value for value in captured if value not in gone)
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != key} | ({key: left} if left else {})
        for value in gone:
            value.graph.erase_node(value)
        body.graph.lint()
        body.recompile()
    return len(moved)


def _belongs_to(value: Node, node: Node) -> bool:
    """A constant that nothing but this body reads."""
    others = [v for k, v in node.kwargs.items() if k.startswith(CAPTURES)]
    reads = sum(v is value for group in others for v in group) + sum(v is value for v in node.args)  # type: ignore[union-attr]
    return const_value(value) is not None and len(value.users) == 1 and reads == 1
