"""Unknown types of an ONNX graph -> what ONNX's shape inference knows; known types stay, and nothing is required to be known.

Weights take no part (they become inputs of the same type), so that models of any size can be inferred."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import onnx
import onnx_ir as ir
from torch.fx import GraphModule, Node

from qgraph.onnx_header import GraphHeader
from qgraph.onnx_io import to_onnx
from qgraph.onnx_names import Names, plan
from qgraph.onnx_ops import OnnxOp
from qgraph.onnx_values import tensor_type
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.types import TensorType, type_of

_SMALL = 256
"""Constants of up to this many elements stay constants: shapes and axes, which inference computes with."""


@dataclass(frozen=True)
class InferTypes(Pass):
    """Fills `meta["type"]` of values without type, rank or dimensions. Graphs that are not all ONNX are left alone; bodies too."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        if not isinstance(gm.meta.get("onnx_graph"), GraphHeader) or not all(_is_onnx(n) for n in gm.graph.nodes):
            return 0
        names = plan(gm, Names(gm), captured=())
        symbols = _symbols(gm)
        known = {name: _without_invented(kind, symbols) for name, kind in _inferred(gm).items()}
        return sum(_learn(value, known.get(name)) for (node, i), name in names.results.items() if (value := _value(node, i)) is not None)


def _is_onnx(node: Node) -> bool:
    return node.op in ("placeholder", "get_attr", "output") or isinstance(node.target, OnnxOp) or node.target is operator.getitem


def _value(node: Node, output: int) -> Node | None:
    """The node whose value is this output."""
    assert isinstance(node.target, OnnxOp)
    if node.target.outputs == 1:
        return node
    return next((u for u in node.users if u.target is operator.getitem and u.args[1] == output), None)


def _inferred(gm: GraphModule) -> dict[str, TensorType]:
    """Types by value name."""
    model = to_onnx(gm)
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and prod(tensor.shape.numpy()) > _SMALL:
            del model.graph.initializers[name]
            value.const_value = None
            if value not in model.graph.inputs:
                model.graph.inputs.append(value)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)
    found: ir.Model = ir.from_proto(proto)
    values = [v for node in found.graph for v in node.outputs if v.name]
    return {str(v.name): kind for v in values if (kind := tensor_type(v)) is not None}


def _symbols(gm: GraphModule) -> set[str]:
    """The model's own names of dimensions."""
    shapes = [kind.shape for node in gm.graph.nodes if (kind := type_of(node)) is not None and kind.shape is not None]
    return {d for shape in shapes for d in shape if isinstance(d, str)}


def _without_invented(kind: TensorType, symbols: set[str]) -> TensorType:
    """Inference numbers the dimensions that it does not know; nobody wants to read these names in a file."""
    shape = kind.shape
    return kind if shape is None else TensorType(kind.dtype, tuple(None if isinstance(d, str) and d not in symbols else d for d in shape))


def _learn(node: Node, found: TensorType | None) -> bool:
    """Complete the node's type by `found`; True when there was something to learn."""
    old = type_of(node) or TensorType(None, None)
    if found is None or (old.shape is not None and found.shape is not None and len(old.shape) != len(found.shape)):
        return False
    shape = found.shape if old.shape is None else old.shape
    if old.shape is not None and found.shape is not None:
        shape = tuple(b if a is None else a for a, b in zip(old.shape, found.shape, strict=True))
    new = TensorType(old.dtype or found.dtype, shape)
    if new == old:
        return False
    node.meta["type"] = new
    return True
