"""Opset -> 23, the first one that has Attention, where a chain in the model computes it.

ONNX Runtime has a kernel for it, and runs what exporters write for older opsets in parts. The opset stays where some node of the
model cannot be carried over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, GraphModule, Node

from qgraph.attention import find_attention
from qgraph.backends.onnxruntime.attention import ATTENTION
from qgraph.errors import ModelError
from qgraph.onnx_io import opset, require_opset
from qgraph.onnx_ops import OnnxOp
from qgraph.onnx_upgrade import upgrade_node
from qgraph.passes.recompose import Recompose
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import graph_modules

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Modernize(Pass):
    """Raises the opset for Attention, and recomposes what the new one has operators for."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-5)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        nodes = (n for part in graph_modules(gm) for n in part.graph.nodes)
        if opset(gm) >= ATTENTION or not any(find_attention(n) is not None for n in nodes):
            return 0
        if (reason := obstacle(gm, ATTENTION)) is not None:
            log.info("the model stays below opset %d: %s", ATTENTION, reason)
            return 0
        require_opset(gm, ATTENTION, "Attention")
        return 1 + Recompose().run(gm, ctx)


def obstacle(gm: GraphModule, version: int) -> str | None:
    """Why some node cannot be carried to this opset, or None. Tried on copies of the graphs, which share their constants."""
    try:
        for part, node in _copies(gm):
            upgrade_node(part, node, version, reason="a newer operator")
    except ModelError as error:
        return str(error)
    return None


def _copies(gm: GraphModule) -> Iterator[tuple[GraphModule, Node]]:
    for part in gm.modules():
        if not isinstance(part, GraphModule) or "onnx_graph" not in part.meta:
            continue
        graph = Graph()
        graph.output(graph.graph_copy(part.graph, {}))
        copy = GraphModule(part, graph)
        copy.meta.update(part.meta)
        yield from ((copy, n) for n in list(graph.nodes) if isinstance(n.target, OnnxOp) and n.target.domain == "")
