"""qg ops put into imported ONNX graphs by hand: what convert would leave, one value at a time."""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Sequence

import onnx
import torch
from torch.fx import GraphModule, Node

from qgraph.onnx_io import from_onnx
from qgraph.ops import Q, choose_qparams, minmax
from qgraph.rewrite import add_constant
from qgraph.types import PerAxis, PerGroup, PerTensor, QSpec, TensorType
from qgraph.views import Conv, Embedding, Linear, const_value, view_any

INT8 = QSpec("int8")
UINT8 = QSpec("uint8", symmetric=False)


def load(source: str | onnx.ModelProto, **constants: torch.Tensor) -> GraphModule:
    """An imported model; `constants` replace initializers of the text, which may declare them with any value."""
    proto = onnx.parser.parse_model(textwrap.dedent(source)) if isinstance(source, str) else source
    for name, value in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    return from_onnx(onnx.shape_inference.infer_shapes(proto))


def node_of(gm: GraphModule, op_type: str, index: int = 0) -> Node:
    return [n for n in gm.graph.nodes if getattr(n.target, "op_type", None) == op_type][index]


def _constants(gm: GraphModule, name: str, scale: torch.Tensor, zero_point: torch.Tensor | None) -> tuple[Node, Node | None]:
    made = gm.graph.get_attr(add_constant(gm, f"{name}_scale", scale))
    return made, None if zero_point is None else gm.graph.get_attr(add_constant(gm, f"{name}_zero_point", zero_point))


def quantize_weight(
    gm: GraphModule, node: Node, *, dtype: str = "int8", group: int = 0, symmetric: bool = True, per_tensor: bool = False
) -> None:
    """Replace the node's constant weight by dequantize(integers), per output channel or per group of the input axis."""
    v = view_any((Linear, Conv, Embedding), node)
    w = const_value(v.weight)
    out_axis, in_axis = (0, 1) if isinstance(v, Embedding) else (v.out_axis % w.dim(), v.in_axis % w.dim())
    spec = QSpec(dtype, symmetric, PerTensor() if per_tensor else PerGroup(in_axis, group) if group else PerAxis(out_axis))
    scale, zero = choose_qparams(*minmax(w, spec.axis, spec.group), spec, dtype=w.dtype)
    with gm.graph.inserting_before(node):
        q = Q.quantize(w, scale, zero, dtype, spec.axis, spec.group)
        stored = gm.graph.get_attr(add_constant(gm, f"{v.weight.target}_int", q))
        parameters = _constants(gm, str(v.weight.target), scale, None if symmetric and not dtype.startswith("u") else zero)
        new = gm.graph.call_function(Q.dequantize.default, (stored, *parameters, dtype, spec.axis, spec.group))
    new.meta["type"] = TensorType(str(w.dtype).removeprefix("torch."), tuple(w.shape))
    node.replace_input_with(v.weight, new)


def quantize_static(
    gm: GraphModule, value: Node, low: float, high: float, *, readers: Sequence[Node] | None = None, spec: QSpec = UINT8
) -> None:
    """Let the readers of `value` (default: all) read dequantize(quantize(value)) in the range low..high."""
    readers = list(value.users) if readers is None else readers
    dtype = torch.float32 if value.meta.get("type") is None else getattr(torch, value.meta["type"].dtype)
    scale, zero = choose_qparams(torch.tensor(low), torch.tensor(high), spec, dtype=dtype)
    with gm.graph.inserting_after(value):
        anchor = gm.graph.call_function(operator.pos, (value,))  # keeps the order of what is inserted before it
    with gm.graph.inserting_before(anchor):
        parameters = _constants(gm, value.name, scale, zero)
        q = gm.graph.call_function(Q.quantize.default, (value, *parameters, spec.dtype))
        new = gm.graph.call_function(Q.dequantize.default, (q, *parameters, spec.dtype))
    new.meta["type"] = value.meta.get("type")
    gm.graph.erase_node(anchor)
    for reader in readers:
        reader.replace_input_with(value, new)


def quantize_dynamic(gm: GraphModule, value: Node, readers: Sequence[Node], *, spec: QSpec = UINT8) -> None:
    """Let `readers` read dequantize(dynamic_quantize(value))."""
    first = next(n for n in gm.graph.nodes if n in readers)
    with gm.graph.inserting_before(first):
        found = gm.graph.call_function(Q.dynamic_quantize.default, (value, spec.dtype, spec.symmetric, spec.axis, spec.group))
        parts = [gm.graph.call_function(operator.getitem, (found, i)) for i in range(3)]
        new = gm.graph.call_function(Q.dequantize.default, (*parts, spec.dtype, spec.axis, spec.group))
    new.meta["type"] = value.meta.get("type")
    for reader in readers:
        reader.replace_input_with(value, new)


def ready(gm: GraphModule) -> GraphModule:
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm
