"""isolate(fake-quantized graph): its float graph, and each operation with quantized operands in both forms, so that they can be compared.

The two graphs have the same operations under the same names; a form is evaluated from the values that the operation reads.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from qgraph.annotate import labels
from qgraph.edit import copy_graph, erase, graph_modules
from qgraph.formats import SITES, SiteView
from qgraph.types import QSpec, attribute
from qgraph.views import Dequantize, DynamicQuantize, Embedding, FakeLookup, FakeQuantize, const_value, granularity, view, view_any


@dataclass(frozen=True, eq=False)
class Isolated:
    """One operation of the quantized graph, and the float values that feed it: `inputs` maps what it reads, quantized or not, to the
    value of the float graph that stands behind it; constants are not among them."""

    place: tuple[int, str]
    label: str
    node: Node
    x: Node
    weight: Node
    inputs: Mapping[Node, Node]

    @property
    def nested(self) -> bool:
        """In a body of control flow or of a function."""
        return self.place[0] > 0

    @property
    def formats(self) -> tuple[QSpec | None, QSpec | None]:
        """Of the weight and of x; None: float."""
        return format_of(self.weight), format_of(self.x)


def isolate(quantized: GraphModule) -> tuple[GraphModule, list[Isolated]]:
    """(float graph, operations in graph order) of a graph that insert_fake_quant has made; it is not changed."""
    plain = copy_graph(quantized)
    found: list[Isolated] = []
    for number, (q, p) in enumerate(zip(graph_modules(quantized), graph_modules(plain), strict=True)):
        twins = {n.name: n for n in p.graph.nodes}
        named = labels(q)
        for node, v in _quantized_sites(q):
            behind = {operand: source(operand) for operand in node.all_input_nodes}
            inputs = {operand: twins[s.name] for operand, s in behind.items() if s.op != "get_attr"}
            x = v.indices if isinstance(v, Embedding) else v.x
            found.append(Isolated((number, node.name), named[node], node, x, v.weight, inputs))
        _bypass(p)
    return plain, found


def _quantized_sites(gm: GraphModule) -> Iterator[tuple[Node, SiteView]]:
    for node in gm.graph.nodes:
        v = view_any(SITES, node)
        if v is not None and any(source(operand) is not operand for operand in node.all_input_nodes):
            yield node, v


def _bypass(gm: GraphModule) -> None:
    """fake_quantize(x) -> x, dequantize(dynamic_quantize(x)) -> x"""
    for node in list(gm.graph.nodes):
        if (value := source(node)) is not node:
            node.replace_all_uses_with(value)
            erase(node)
    gm.graph.lint()
    gm.recompile()


def source(node: Node) -> Node:
    """The float value that a quantized operand stands for; the node itself where it is not quantized."""
    fake: FakeQuantize | FakeLookup | None = view_any((FakeQuantize, FakeLookup), node)
    if fake is not None:
        return fake.x
    found = _run_time(node)
    return node if found is None else found.x


def format_of(node: Node) -> QSpec | None:
    """How a quantized operand is represented; None where it is float."""
    if (fake := view(FakeQuantize, node)) is not None:
        return QSpec(fake.dtype, fake.zero_point is None, granularity(fake.axis, fake.group))
    if (levels := view(FakeLookup, node)) is not None and (table := const_value(levels.table)) is not None:
        per = granularity(levels.axis if levels.scale is not None else levels.table_axis, levels.group)
        return QSpec(f"uint{max(2, (table.shape[-1] - 1).bit_length())}", granularity=per, codebook="levels")
    found = _run_time(node)
    return None if found is None else QSpec(found.dtype, found.symmetric, granularity(found.axis, found.group), dynamic=True)


def _run_time(node: Node) -> DynamicQuantize | None:
    """What dequantize(dynamic_quantize(x)) quantized."""
    back = view(Dequantize, node)
    if back is None or back.q.target is not operator.getitem:
        return None
    return view(DynamicQuantize, back.q.args[0])


def evaluate(node: Node, known: Mapping[Node, Any]) -> Any:
    """The node's value from known ones and from constants."""
    return _value(node, dict(known))


def _value(node: Node, known: dict[Node, Any]) -> Any:
    if node not in known:
        known[node] = attribute(node) if node.op == "get_attr" else _called(node, known)
    return known[node]


def _called(node: Node, known: dict[Node, Any]) -> Any:
    fn: Any = node.target
    args: Any = map_arg(node.args, lambda n: _value(n, known))
    kwargs: Any = map_arg(node.kwargs, lambda n: _value(n, known))
    return fn(*args, **kwargs)


def power(x: Tensor) -> float:
    """Sum of squares; what is not finite (masks) counts nothing."""
    return float(x.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().sum(dtype=torch.float64))
