"""Promise -> Kernel: ONNX Runtime's own optimized graph, written by itself, compared with what was promised.

How a node is found again: its name is replaced by a unique one, which fused nodes keep as a prefix ("NAME_token_1" after the change
to channels-last, "NAME/MatMulAddFusion"). Layers in the blocked NCHWc layout are named after their output. Failing that, by the values
it may produce.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from qgraph.backend import Kernel
from qgraph.backends.onnxruntime.promises import Promise, promised
from qgraph.backends.onnxruntime.runtime import Options, session

INLINE_BYTES = 1024
"""Initializers above this size are kept out of the optimized graph's protobuf, which may not exceed 2 GB."""


def kernels(path: str, options: Options) -> list[Kernel]:
    """What each promise of the model file became. Raises LoweringError when ONNX Runtime refuses the model."""
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        model = ir.load(path)
        found = list(promised(model))
        if not found:
            return []
        tokens = _mark(found)
        marked = _save_beside(model, path)
        try:
            graph = optimized_graph(marked, folder, options)
        finally:
            os.unlink(marked)
        index = _Index(graph)
        return [_kernel(p, label, index.find(token, p.values)) for p, (token, label) in zip(found, tokens, strict=True)]


def _mark(found: Iterable[Promise]) -> list[tuple[str, str]]:
    """Gives the promised nodes unique names: (name, what the user calls the node)."""
    tokens = []
    for i, p in enumerate(found):
        tokens.append((f"qgraph.{i}.", p.label))
        p.node.name = f"qgraph.{i}."
    return tokens


def _save_beside(model: ir.Model, path: str) -> str:
    """Writes the model next to its external data, which stays where it is."""
    descriptor, name = tempfile.mkstemp(prefix=".qgraph-", suffix=".onnx", dir=os.path.dirname(os.path.abspath(path)))
    with os.fdopen(descriptor, "wb") as f:
        f.write(ir.to_proto(model).SerializeToString())
    return name


def optimized_graph(path: str, folder: str, options: Options) -> onnx.GraphProto:
    """The graph that ONNX Runtime runs for a model file, without the values of large weights; `folder` is where it may write.

    Raises LoweringError when ONNX Runtime refuses the model."""
    target = os.path.join(folder, "optimized.onnx")
    entries = {
        "session.optimized_model_external_initializers_file_name": "optimized.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": str(INLINE_BYTES),
    }
    session(path, options, optimized=target, entries=entries)
    return onnx.load(target, load_external_data=False).graph


@dataclass
class _Index:
    """The nodes of an optimized graph by name and by the values that they produce."""

    graph: onnx.GraphProto

    def __post_init__(self) -> None:
        self.nodes = [n for graph in _graphs(self.graph) for n in graph.node]
        self.by_token = {f"qgraph.{n.name.split('.')[1]}.": n for n in self.nodes if n.name.startswith("qgraph.")}
        self.by_value = {name: n for n in self.nodes for name in (*n.output, n.name) if name}
        # The value itself is then the output of the node that leaves the blocked layout.
        self.by_value |= {n.name.removesuffix("_nchwc"): n for n in self.nodes if n.name.endswith("_nchwc")}
        self.stored = {i.name for graph in _graphs(self.graph) for i in graph.initializer}

    def find(self, token: str, values: tuple[str, ...]) -> tuple[onnx.NodeProto | None, bool]:
        """(the node that took the place of the promised one, whether its weight is stored)."""
        node = self.by_token.get(token)
        if node is None:
            node = next((self.by_value[v] for v in values if v in self.by_value), None)
        return node, node is None or len(node.input) < 2 or node.input[1] in self.stored


def _graphs(graph: onnx.GraphProto) -> Iterable[onnx.GraphProto]:
    """The graph and the bodies of its control flow."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _kernel(p: Promise, label: str, found: tuple[onnx.NodeProto | None, bool]) -> Kernel:
    node, stored = found
    wanted = f"{p.node.op_type} with a folded weight" if p.folded else p.kernels[0]
    if node is None:  # nothing is computed any more: merged with an equal node, or constant
        return Kernel(label, wanted, "", True)
    if node.op_type not in p.kernels:
        return Kernel(label, wanted, node.op_type, False, p.obstacle or f"ONNX Runtime made {node.op_type} of it")
    if p.folded and not stored:
        return Kernel(label, wanted, node.op_type, False, "its weight is computed at every run")
    return Kernel(label, wanted, node.op_type, True)
