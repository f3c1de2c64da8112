"""GraphModule -> onnx_ir.Model -> ModelProto: untouched nodes as they were, new ones under fresh names, in FX order."""

from __future__ import annotations

import operator
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch.fx import GraphModule, Node

from qgraph.errors import ModelError
from qgraph.onnx_header import GraphHeader, ModelHeader
from qgraph.onnx_names import Names, plan
from qgraph.onnx_ops import CAPTURES, FUNCTION_BODY, OnnxOp
from qgraph.onnx_opset import bring_up_to_date, header
from qgraph.onnx_proto import EXTRAS, serialize
from qgraph.onnx_reference import make_attribute
from qgraph.onnx_values import from_ir, ir_shape, onnx_dtype, tensor_type, to_ir
from qgraph.types import TensorType, attribute, type_of


def to_proto(gm: GraphModule) -> onnx.ModelProto:
    """The graph as a ModelProto; external data keeps its location. Raises ModelError as `to_onnx`."""
    return serialize(to_onnx(gm))


def to_onnx(gm: GraphModule) -> ir.Model:
    """The graph as an onnx_ir.Model that shares no mutable object with its source.

    Raises ModelError for a graph not read from ONNX, and for a node that is not an ONNX operator (a `qg` op that no backend lowered)."""
    bring_up_to_date(gm)
    top = header(gm)
    model: ModelHeader = gm.meta["onnx_model"]
    names = Names(gm)
    functions = [_function(getattr(gm, target), names) for target in model.functions.values()]
    imports = dict(top.opsets)
    graph = _Writer(gm, names, imports, captured=()).write()
    graph.opset_imports.update(imports)
    return ir.Model(
        graph,
        ir_version=max(model.ir_version, _least_ir_version(graph, gm)),
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        functions=functions,
        metadata_props=dict(model.metadata),
        device_configurations=model.device_configurations,
    )


def body_proto(body: GraphModule) -> onnx.GraphProto:
    """A nested graph by itself. Raises ModelError as `to_onnx`."""
    found: onnx.GraphProto = ir.to_proto(_Writer(body, Names(body), dict(header(body).opsets), captured=()).write())
    return found


def _least_ir_version(graph: ir.Graph, gm: GraphModule) -> int:
    """4 when a rewrite added a constant: before, every initializer had to be an input of the graph as well."""
    old = {n.meta["onnx_value"].name for n in gm.graph.nodes if n.op == "get_attr" and "onnx_value" in n.meta}
    return 4 if any(name not in old for name in graph.initializers) else 0


def _function(body: GraphModule, names: Names) -> ir.Function:
    own = header(body)
    assert own.identifier is not None
    imports = dict(own.opsets)
    graph = _Writer(body, names, imports, captured=()).write()
    graph.opset_imports.update(imports)
    domain, name, overload = own.identifier
    return ir.Function(domain, name, overload, graph=graph, attributes=own.attributes)


class _Writer:
    """Writes one graph; `captured` are the outer values behind its last placeholders."""

    def __init__(self, gm: GraphModule, names: Names, imports: dict[str, int], captured: tuple[ir.Value, ...]) -> None:
        self.gm, self.names, self.imports, self.captured = gm, names, imports, captured
        self.header: GraphHeader = gm.meta["onnx_graph"]
        self.plan = plan(gm, names, captured=tuple(str(v.name) for v in captured))
        self.env: dict[Node, Any] = {}
        self.constants: dict[str, ir.Value] = {}
        self.nodes: list[ir.Node] = []

    def write(self) -> ir.Graph:
        placeholders = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        formal = len(placeholders) - len(self.captured)
        for node, value in zip(placeholders[formal:], self.captured, strict=True):
            self.env[node] = value
        for node in placeholders[:formal]:
            self.env[node] = self.value(node, self.plan.names[node])
        outputs: list[ir.Value] = []
        for node in self.gm.graph.nodes:
            if node.op == "get_attr":
                self.constant(node)
            elif node.op == "output":
                outputs = [self.output(i, v) for i, v in enumerate(node.args[0])]
            elif node.op != "placeholder":
                self.call(node)
        graph = ir.Graph(
            self.inputs(placeholders[:formal]),
            outputs,
            nodes=self.nodes,
            initializers=[] if self.header.is_function else list(self.constants.values()),
            name=self.header.name,
            doc_string=self.header.doc_string,
            metadata_props=dict(self.header.metadata),
        )
        if self.header.extras is not None:
            graph.meta[EXTRAS] = self.header.extras
        return graph

    def inputs(self, placeholders: list[Node]) -> list[ir.Value]:
        """Formal inputs in their old order, among them the constants that the source lists as inputs; then new ones."""
        by_name = {v.name: v for v in self.constants.values()}
        by_name |= {self.env[n].name: self.env[n] for n in placeholders}
        old = [by_name[v.name] for v in self.header.inputs if v.name in by_name]
        return old + [self.env[n] for n in placeholders if self.env[n] not in old]

    def value(self, node: Node, name: str, source: ir.Value | None = None) -> ir.Value:
        source = node.meta.get("onnx_value") if source is None else source
        found = ir.Value(name=name)
        known = type_of(node)
        if source is not None:
            found.doc_string = source.doc_string
            found.metadata_props.update(source.metadata_props)
            if "quant_parameter_tensor_names" in source.meta:
                found.meta["quant_parameter_tensor_names"] = source.meta["quant_parameter_tensor_names"]
            if known is None or known == tensor_type(source):
                found.type, found.shape = source.type, source.shape
                return found
        if known is not None:
            _set_type(found, known)
        return found

    def constant(self, node: Node) -> None:
        stored = attribute(node)
        if isinstance(stored, torch.nn.Module):
            return
        target = str(node.target)
        if target not in self.constants:
            name = self.plan.names[node]
            self.constants[target] = found = self.initializer(node, name, stored)
            if self.header.is_function:
                self.constants[target] = self.constant_node(found)
        self.env[node] = self.constants[target]

    def constant_node(self, constant: ir.Value) -> ir.Value:
        """A function has no initializers: its constants are nodes."""
        assert constant.const_value is not None
        value = ir.Value(name=constant.name, type=constant.type, shape=constant.shape)
        attrs = [ir.AttrTensor("value", constant.const_value)]
        self.nodes.append(ir.Node("", "Constant", [], attrs, outputs=[value], name=self.names.fresh_node(f"{constant.name}_constant")))
        return value

    def initializer(self, node: Node, name: str, stored: Any) -> ir.Value:
        source: ir.Value | None = node.meta.get("onnx_value")
        tensor = source.const_value if source is not None else None
        if source is not None and tensor is not None and is_same(stored, tensor):
            found = self.value(node, name, source)
        else:
            tensor = stored if isinstance(stored, ir.TensorProtocol) else to_ir(stored, name)
            found = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
        found.const_value = renamed(tensor, name)
        return found

    def call(self, node: Node) -> None:
        if node.target is operator.getitem:
            outputs = self.env[node.args[0]]  # type: ignore[index]
            self.env[node] = outputs[node.args[1]]
            return
        if node.op != "call_function" or not isinstance(node.target, OnnxOp):
            raise ModelError(
                f"node {node.name!r} ({node.target}) is not an ONNX operator: lower the graph first, with qgraph.export or qgraph.lower"
            )
        target = node.target
        source: ir.Node | None = node.meta.get("onnx")
        self.imports.setdefault("ai.onnx" if not target.domain and "ai.onnx" in self.imports else target.domain, target.version)
        outputs = [self.result(node, i) for i in range(target.outputs)]
        written = ir.Node(
            target.domain,
            target.op_type,
            [None if a is None else self.env[a] for a in node.args],  # type: ignore[index]
            self.attributes(node, source),
            overload=target.overload,
            outputs=outputs,
            name=self.plan.node_names[node],
            doc_string=source.doc_string if source is not None else None,
            metadata_props=dict(source.metadata_props) if source is not None else None,
            device_configurations=source.device_configurations if source is not None else (),
        )
        if source is not None and source.op_identifier() == written.op_identifier():
            written.meta.update(source.meta)
        self.nodes.append(written)
        self.env[node] = outputs[0] if target.outputs == 1 else outputs

    def result(self, node: Node, i: int) -> ir.Value:
        assert isinstance(node.target, OnnxOp)
        name = self.plan.results[node, i]
        if node.target.outputs == 1:
            return self.value(node, name)
        getitem = next((u for u in node.users if u.target is operator.getitem and u.args[1] == i), None)
        if getitem is not None:
            return self.value(getitem, name)
        source: ir.Node | None = node.meta.get("onnx")
        unused = source.outputs[i] if source is not None and i < len(source.outputs) else None
        found = ir.Value(name=name)
        if unused is not None:
            found.type, found.shape, found.doc_string = unused.type, unused.shape, unused.doc_string
        return found

    def output(self, i: int, node: Node) -> ir.Value:
        """The value of the i-th graph output: it keeps the output's name and declared type."""
        value: ir.Value = self.env[node]
        wanted = self.header.outputs[i] if i < len(self.header.outputs) else None
        if wanted is None:
            return value
        if i in self.plan.copies:
            source, value = value, ir.Value(name=self.plan.copies[i], type=value.type, shape=value.shape)
            self.nodes.append(ir.Node("", "Identity", [source], outputs=[value], name=self.names.fresh_node("Identity")))
        same = value.type is None or value.type == wanted.type
        if node.meta.get("onnx_value") is not wanted and same and value.producer() is not None:
            value.type, value.shape, value.doc_string = wanted.type, wanted.shape, wanted.doc_string
            value.metadata_props.update(wanted.metadata_props)
        return value

    def attributes(self, node: Node, source: ir.Node | None) -> list[ir.Attr]:
        assert isinstance(node.target, OnnxOp)
        old = dict(source.attributes) if source is not None else {}
        new: dict[str, ir.Attr] = dict(node.target.fixed)
        for name, value in node.kwargs.items():
            if name != FUNCTION_BODY and not name.startswith(CAPTURES):
                new[name] = self.attribute(node, name, value, old.get(name))
        return [new[n] for n in old if n in new] + [a for n, a in new.items() if n not in old]

    def attribute(self, node: Node, name: str, value: Any, old: ir.Attr | None) -> ir.Attr:
        if isinstance(value, Node):
            captured = tuple(self.env[c] for c in node.kwargs.get(CAPTURES + name, ()))  # type: ignore[index,union-attr]
            body = _Writer(attribute(value), self.names, self.imports, captured).write()
            return ir.Attr(name, ir.AttributeType.GRAPH, body, doc_string=old.doc_string if old is not None else None)
        plain = tuple(value) if isinstance(value, (list, tuple)) else value
        if old is not None and old.value == plain and type(old.value) is type(plain):
            return old
        assert isinstance(node.target, OnnxOp)
        found = ir.from_proto(make_attribute(node.target, name, value))
        assert isinstance(found, ir.Attr)
        return found


def is_same(stored: Any, tensor: ir.TensorProtocol) -> bool:
    """True when a constant still holds what was read; mapped data is never compared byte by byte."""
    if not isinstance(stored, torch.Tensor):
        return stored is tensor
    if isinstance(tensor, ir.ExternalTensor):
        return getattr(stored, "onnx_source", None) is tensor
    read = from_ir(tensor)
    same_type = isinstance(read, torch.Tensor) and read.dtype == stored.dtype and read.shape == stored.shape
    return same_type and torch.equal(_bits(read), _bits(stored))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """The tensor under another name, without reading or changing it."""
    if tensor.name == name:
        return tensor
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=name, base_dir=tensor.base_dir
        )
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy(), shape=ir.Shape(tensor.shape.numpy()), name=name)
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)


def _set_type(value: ir.Value, known: TensorType) -> None:
    if known.dtype is not None:
        value.type = ir.TensorType(onnx_dtype(known.dtype))
        value.shape = ir_shape(known)
