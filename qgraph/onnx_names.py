"""Names of values and nodes in the file: old ones stay, graph outputs keep theirs, new ones are unique."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qgraph.onnx_header import GraphHeader
from qgraph.onnx_ops import OnnxOp
from qgraph.types import attribute


class Names:
    """Names taken anywhere in the model: a fresh one is new in every graph, so it can never shadow another."""

    def __init__(self, gm: GraphModule) -> None:
        self._values: set[str] = set()
        self._nodes: set[str] = set()
        for body in _bodies(gm, set()):
            header: GraphHeader = body.meta["onnx_graph"]
            self._values |= {str(v.name) for v in (*header.inputs, *header.outputs)}
            for node in body.graph.nodes:
                self._reserve(node)

    def _reserve(self, node: Node) -> None:
        if (value := node.meta.get("onnx_value")) is not None:
            self._values.add(str(value.name))
        if (source := node.meta.get("onnx")) is not None:
            self._nodes.add(str(source.name))
            self._values |= {str(v.name) for v in source.outputs}

    def fresh(self, hint: str) -> str:
        return _fresh(hint, self._values)

    def fresh_node(self, hint: str) -> str:
        return _fresh(hint, self._nodes)

    def take_node(self, name: str) -> None:
        """No later node gets `name` as a fresh one."""
        self._nodes.add(name)


def _fresh(hint: str, taken: set[str]) -> str:
    found, n = hint, 0
    while found in taken:
        n += 1
        found = f"{hint}_{n}"
    taken.add(found)
    return found


def _bodies(gm: GraphModule, seen: set[int]) -> Iterator[GraphModule]:
    if id(gm) in seen:
        return
    seen.add(id(gm))
    yield gm
    for child in gm.children():
        if isinstance(child, GraphModule) and "onnx_graph" in child.meta:
            yield from _bodies(child, seen)


@dataclass
class Plan:
    """Names of one graph: of placeholders and constants, of the i-th result of a node, of nodes; `copies` are the outputs that
    need an Identity under the given name."""

    names: dict[Node, str] = field(default_factory=dict)
    results: dict[tuple[Node, int], str] = field(default_factory=dict)
    node_names: dict[Node, str] = field(default_factory=dict)
    copies: dict[int, str] = field(default_factory=dict)


def plan(gm: GraphModule, names: Names, *, captured: tuple[str, ...]) -> Plan:
    """Names every value of the graph. A name is given once per graph and never hides a captured value."""
    found, taken = Plan(), set(captured)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node in placeholders[: len(placeholders) - len(captured)]:
        found.names[node] = _take(_source_name(node), node.name, taken, names)
    _name_constants(gm, found, taken, names)
    _name_outputs(gm, found, taken, names)
    node_names: set[str] = set()
    for node in gm.graph.nodes:
        if isinstance(node.target, OnnxOp):
            for i in range(node.target.outputs):
                if (node, i) not in found.results:
                    found.results[node, i] = _result_name(node, i, taken, names)
            found.node_names[node] = _node_name(node, node_names, names)
    return found


def _name_constants(gm: GraphModule, found: Plan, taken: set[str], names: Names) -> None:
    by_target: dict[str, str] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and not isinstance(attribute(node), torch.nn.Module):
            target = str(node.target)
            if target not in by_target:
                by_target[target] = _take(_source_name(node), target, taken, names)
            found.names[node] = by_target[target]


def _name_outputs(gm: GraphModule, found: Plan, taken: set[str], names: Names) -> None:
    header: GraphHeader = gm.meta["onnx_graph"]
    outputs: Any = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    for i, (node, wanted) in enumerate(zip(outputs, header.outputs, strict=False)):
        name = str(wanted.name)
        producer = _producer(node)
        if producer is None:
            same = found.names.get(node, _source_name(node)) == name
        elif producer in found.results or name in taken:
            same = found.results.get(producer) == name
        else:
            found.results[producer] = name
            taken.add(name)
            continue
        if not same:
            found.copies[i] = name if name not in taken else names.fresh(name)
            taken.add(found.copies[i])


def _producer(node: Node) -> tuple[Node, int] | None:
    """(operator node, output index) behind a value; None for placeholders and constants."""
    if isinstance(node.target, OnnxOp):
        return node, 0
    if node.target is operator.getitem:
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return None


def _source_name(node: Node) -> str | None:
    value = node.meta.get("onnx_value")
    return None if value is None else str(value.name)


def _take(preferred: str | None, hint: str, taken: set[str], names: Names) -> str:
    found = preferred if preferred is not None and preferred not in taken else names.fresh(hint)
    taken.add(found)
    return found


def _result_name(node: Node, i: int, taken: set[str], names: Names) -> str:
    source, target = node.meta.get("onnx"), node.target
    assert isinstance(target, OnnxOp)
    preferred = str(source.outputs[i].name or "") if source is not None and i < len(source.outputs) else None
    if target.outputs == 1 and (own := _source_name(node)) is not None:
        preferred = own
    if preferred == "":
        return ""
    return _take(preferred, node.name if target.outputs == 1 else f"{node.name}_{i}", taken, names)


def _node_name(node: Node, used: set[str], names: Names) -> str:
    source = node.meta.get("onnx")
    preferred = node.meta.get("name", str(source.name or "") if source is not None else None)
    if preferred == "":
        return ""
    if preferred is None or preferred in used:
        preferred = names.fresh_node(preferred or node.name)
    names.take_node(preferred)
    used.add(preferred)
    return preferred
