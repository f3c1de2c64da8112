"""ONNX graph with observers -> ONNX Runtime session with the watched values, or their bounds, as outputs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from torch.fx import Graph, GraphModule, Node

from qgraph.errors import LoweringError, ModelError
from qgraph.onnx_io import to_onnx
from qgraph.onnx_ops import op
from qgraph.watch import Watch

ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    getattr(ort_errors, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented", "RuntimeException")
)
"""ONNX Runtime's exceptions have no base class of their own."""

_DOMAIN = "qgraph.tap"
_IN_MEMORY = 2**30
"""Bytes of weights above which the model goes through a file: a protobuf holds 2 GiB at most."""


@dataclass(frozen=True)
class Tap:
    """A watched value. `reduced`: only its bounds leave the runtime, else the whole tensor."""

    value: Node
    name: str
    observers: tuple[Watch, ...]
    dtype: str | None
    reduced: bool

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(f"{self.name}.{what}" for what in ("min", "max", "sum", "size")) if self.reduced else (self.name,)


def open_session(gm: GraphModule, taps: Sequence[Tap]) -> ort.InferenceSession:
    """A session of `gm`, without its observers, that computes what `taps` name and nothing else.

    Raises LoweringError when ONNX Runtime does not take the graph."""
    try:
        model = to_onnx(_marked(gm, taps))
    except ModelError as e:
        raise LoweringError(f"the graph cannot be written for ONNX Runtime: {e}") from e
    _tap(model, taps)
    RemoveUnusedNodesPass()(model)
    try:
        return _load(model)
    except ORT_ERRORS as e:
        raise LoweringError(f"ONNX Runtime does not run this graph: {str(e).strip().splitlines()[0]}") from e


def _marked(gm: GraphModule, taps: Sequence[Tap]) -> GraphModule:
    """A copy that shares all tensors: observers are bypassed, and a marker node behind each watched value keeps its number."""
    numbers = {tap.value: i for i, tap in enumerate(taps)}
    graph, new = Graph(), dict[Node, Any]()
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), Watch):
            new[node] = new[node.args[0]]
            continue
        new[node] = graph.node_copy(node, new.__getitem__)
        if node in numbers:
            marker = graph.call_function(op("Tap", domain=_DOMAIN), (new[node],), {"number": numbers[node]})
            marker.meta["type"] = node.meta.get("type")
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if name not in copy._modules and not isinstance(child, Watch):
            copy.add_module(name, child)  # functions that nothing calls are written all the same
    return copy


def _tap(model: ir.Model, taps: Sequence[Tap]) -> None:
    """Replaces markers by reductions, right behind the value: a value does not outlive its last use for being watched."""
    graph = model.graph
    graph.outputs.clear()
    for marker in [n for n in graph if n.domain == _DOMAIN]:
        tap = taps[marker.attributes["number"].as_int()]
        value = marker.inputs[0]
        assert value is not None
        nodes = _reductions(tap, value) if tap.reduced else _whole(tap, value)
        graph.insert_after(marker, nodes)
        graph.remove(marker, safe=True)
        graph.outputs.extend(n.outputs[0] for n in nodes if n.outputs[0].name in tap.outputs)
    graph.opset_imports.pop(_DOMAIN, None)


def _reductions(tap: Tap, value: ir.Value) -> list[ir.Node]:
    cast = [] if tap.dtype == "float32" else [_float32(value, f"{tap.name}.float32")]
    source = cast[0].outputs[0] if cast else value
    scalars = [
        _node(kind, source, output, ir.DataType.FLOAT, {"keepdims": 0})
        for kind, output in zip(("ReduceMin", "ReduceMax", "ReduceSum"), tap.outputs[:3], strict=True)
    ]
    return [*cast, *scalars, _node("Size", value, tap.outputs[3], ir.DataType.INT64, {})]


def _whole(tap: Tap, value: ir.Value) -> list[ir.Node]:
    # An own node, as a graph output cannot be a graph input. numpy has no bfloat16.
    if tap.dtype == "bfloat16":
        return [_float32(value, tap.name)]
    return [ir.node("Identity", [value], outputs=[ir.Value(name=tap.name, type=value.type)], name=tap.name)]


def _float32(value: ir.Value, name: str) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
    return ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, outputs=[output], name=name)


def _node(kind: str, value: ir.Value, name: str, dtype: ir.DataType, attributes: dict[str, int]) -> ir.Node:
    output = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(()))
    return ir.node(kind, [value], attributes, outputs=[output], name=name)


def _load(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # Fusions beyond BASIC would compute watched values differently, or not at all.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # In graph order a reduction runs right behind its value; by default ONNX Runtime runs these leaves last and keeps everything
    # until then (a text recognizer, 358 taps, batches of 8: peak 2.9 GB against 0.5). Arena and memory pattern keep blocks for every
    # shape that was ever fed.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    folders = {str(t.base_dir) for t in tensors if isinstance(t, ir.ExternalTensor)}
    if sum(t.nbytes for t in tensors if not isinstance(t, ir.ExternalTensor)) <= _IN_MEMORY and len(folders) <= 1:
        for folder in folders:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return _session(ir.to_proto(model).SerializeToString(), options)
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        path = Path(folder, "model.onnx")
        ir.save(model, path, external_data="model.data")
        return _session(str(path), options)


def _session(model: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
