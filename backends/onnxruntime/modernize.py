"""Opset -> the first one that has the operator which a chain in the model computes: Attention (23), Gelu (20).

ONNX Runtime has a kernel for each of them, and runs what exporters write for older opsets in parts. The opset stays where some node of the
model cannot be carried over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, GraphModule, Node

from qgraph import chains
from qgraph.attention import find_attention
from qgraph.backends.onnxruntime.attention import ATTENTION
from qgraph.errors import ModelError
from qgraph.onnx_io import opset, require_opset
from qgraph.onnx_ops import OnnxOp
from qgraph.onnx_upgrade import upgrade_node
from qgraph.passes.recompose import Recompose
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import graph_modules
from qgraph.views import Elementwise, view

log = logging.getLogger(__name__)

GELU = 20
"""The opset that first has the operator."""


@dataclass(frozen=True)
class Modernize(Pass):
    """Raises the opset where that makes operators of chains, and recomposes those that it may."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-5)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        wanted = {version for part in graph_modules(gm) for n in part.graph.nodes if (version := _wants(n))}
        count = 0
        for version in sorted((v for v in wanted if v > opset(gm)), reverse=True):
            reason = obstacle(gm, version)
            if reason is None:
                require_opset(gm, version, "Attention" if version == ATTENTION else "Gelu")
                count = 1
                break
            log.info("the model stays below opset %d: %s", version, reason)
        return count + Recompose().run(gm, ctx) if wanted else 0


def _wants(node: Node) -> int:
    if find_attention(node) is not None:
        return ATTENTION
    found = chains.pointwise(node) if view(Elementwise, node) is not None else None
    return GELU if isinstance(found, chains.Pointwise) and found.kind in ("gelu", "gelu_tanh") else 0


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
