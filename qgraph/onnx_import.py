"""onnx_ir.Model -> GraphModule: one FX node per ONNX node, constants as buffers, nested graphs as submodules."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Graph, GraphModule, Node

from qgraph.errors import ModelError
from qgraph.ledger import State
from qgraph.onnx_header import GraphHeader, ModelHeader, fields_of
from qgraph.onnx_ops import CAPTURES, FUNCTION_BODY, Fixed, op
from qgraph.onnx_proto import EXTRAS
from qgraph.onnx_values import from_ir, tensor_type

_PRINTABLE = {
    ir.AttributeType.INT,
    ir.AttributeType.FLOAT,
    ir.AttributeType.STRING,
    ir.AttributeType.INTS,
    ir.AttributeType.FLOATS,
    ir.AttributeType.STRINGS,
}


def import_model(model: ir.Model) -> GraphModule:
    """The model as a GraphModule with State, header and source values in meta. Raises ModelError for an invalid graph."""
    names = {identifier: f"function_{identifier[1]}" for identifier in model.functions}
    functions = Functions(model, {i: f"{_identifier(n)}_{k}" if k else _identifier(n) for k, (i, n) in enumerate(names.items())})
    gm = import_graph(model.graph, functions, opsets=model.graph.opset_imports)
    for identifier in model.functions:
        functions.attach(gm, identifier)
    gm.meta["onnx_model"] = ModelHeader(functions=functions.names, **fields_of(model))
    header = gm.meta["onnx_graph"]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    gm.meta["qgraph"] = State(
        source="onnx",
        input_names=tuple(str(n.meta["onnx_value"].name) for n in placeholders),
        output_names=tuple(str(v.name) for v in header.outputs),
    )
    return gm


class Functions:
    """The model's local functions, imported at their first call and shared by all callers."""

    def __init__(self, model: ir.Model, names: Mapping[tuple[str, str, str], str]) -> None:
        self._model = model
        self.names = dict(names)
        self._bodies: dict[tuple[str, str, str], GraphModule] = {}

    def attach(self, gm: GraphModule, identifier: tuple[str, str, str]) -> str | None:
        """Makes the function a submodule of `gm` and returns its name; None when the model has no such function."""
        if identifier not in self.names:
            return None
        name = self.names[identifier]
        if name not in gm._modules:
            gm.add_submodule(name, self._body(identifier))
        return name

    def _body(self, identifier: tuple[str, str, str]) -> GraphModule:
        if identifier not in self._bodies:
            source = self._model.functions[identifier]
            body = import_graph(source.graph, self, opsets=source.opset_imports, function=source)
            self._bodies[identifier] = body
        return self._bodies[identifier]


def import_graph(
    graph: ir.Graph,
    functions: Functions,
    *,
    opsets: Mapping[str, int],
    parent: _Importer | None = None,
    function: ir.Function | None = None,
) -> GraphModule:
    """One graph, nested body (`parent` given: outer values become extra placeholders) or function."""
    importer = _Importer(functions, opsets, parent)
    importer.run(graph)
    gm = importer.gm
    gm.meta["onnx_graph"] = _header(graph, opsets, function)
    gm.recompile()
    return gm


def _header(graph: ir.Graph, opsets: Mapping[str, int], function: ir.Function | None) -> GraphHeader:
    return GraphHeader(
        name=graph.name,
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
        opsets=dict(opsets),
        doc_string=graph.doc_string,
        metadata=dict(graph.metadata_props),
        extras=graph.meta.get(EXTRAS),
        identifier=function.identifier() if function is not None else None,
        attributes=tuple(function.attributes.values()) if function is not None else (),
    )


class _Importer:
    def __init__(self, functions: Functions, opsets: Mapping[str, int], parent: _Importer | None) -> None:
        self.gm = GraphModule(torch.nn.Module(), Graph())
        self.graph = self.gm.graph
        self.functions, self.opsets, self.parent = functions, opsets, parent
        self.env: dict[ir.Value, Node] = {}
        self.names: dict[str, ir.Value] = {}
        self.captured: list[ir.Value] = []
        self.last_placeholder: Node | None = None

    def run(self, graph: ir.Graph) -> None:
        for value in graph.inputs:
            if value.name not in graph.initializers:
                self.placeholder(value)
        for value in graph.initializers.values():
            if value.const_value is not None:
                self.constant(value)
        for node in _sorted(graph):
            self.node(node)
        self.graph.output(tuple(self.resolve(v) for v in graph.outputs))

    def placeholder(self, value: ir.Value) -> Node:
        """A formal input or, later, a captured value: always after the last placeholder."""
        after = self.last_placeholder
        point = self.graph.inserting_after(after) if after is not None else self.graph.inserting_before(_first(self.graph))
        with point:
            node = self.graph.placeholder(_identifier(value.name or "input"))
        self.last_placeholder = node
        self.define(value, node)
        return node

    def constant(self, value: ir.Value) -> None:
        target = _free_name(self.gm, _identifier(value.name or "constant"))
        assert value.const_value is not None
        store(self.gm, target, value.const_value)
        self.define(value, self.graph.create_node("get_attr", target, name=target))

    def define(self, value: ir.Value, node: Node) -> None:
        self.env[value] = node
        self.names[value.name or ""] = value
        node.meta["onnx_value"] = value
        if (type_ := tensor_type(value)) is not None:
            node.meta["type"] = type_

    def resolve(self, value: ir.Value) -> Node:
        """The FX node of a value; a value of an outer graph becomes a captured placeholder."""
        found = self.env.get(value)
        if found is None and value.producer() is None and value.name in self.names:
            found = self.env[self.names[value.name]]
        if found is not None:
            return found
        outer = self.parent.find(value) if self.parent is not None else None
        if outer is None:
            raise ModelError(f"value {value.name!r} is read but nothing in the graph produces it; the model is not valid ONNX")
        if outer in self.env:
            return self.env[outer]
        self.captured.append(outer)
        return self.placeholder(outer)

    def find(self, value: ir.Value) -> ir.Value | None:
        """The value as some enclosing graph knows it: itself, or one of the same name for an undeclared one."""
        if value in self.env:
            return value
        if value.producer() is None and value.name in self.names:
            return self.names[value.name]
        return self.parent.find(value) if self.parent is not None else None

    def node(self, source: ir.Node) -> None:
        kwargs, fixed = self.attributes(source)
        inputs = tuple(None if v is None else self.resolve(v) for v in source.inputs)
        body = self.functions.attach(self.gm, source.op_identifier())
        if body is not None:
            kwargs[FUNCTION_BODY] = self.graph.get_attr(body)
        version = self.opsets.get(source.domain, self.opsets.get("ai.onnx", 1) if source.domain == "" else 1)
        target = op(
            source.op_type, domain=source.domain, version=version, fixed=fixed, outputs=len(source.outputs), overload=source.overload
        )
        node = self.graph.call_function(target, inputs, kwargs)
        node.meta["onnx"] = source
        if len(source.outputs) == 1:
            self.define(source.outputs[0], node)
            return
        for i, value in enumerate(source.outputs):
            if value.name:
                self.define(value, self.graph.call_function(operator.getitem, (node, i)))

    def attributes(self, source: ir.Node) -> tuple[dict[str, Any], Fixed]:
        kwargs: dict[str, Any] = {}
        fixed: list[tuple[str, ir.Attr]] = []
        for name, attr in source.attributes.items():
            if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
                kwargs |= self.body(name, attr.value)
            elif is_printable(attr):
                kwargs[name] = list(attr.value) if isinstance(attr.value, (tuple, list)) else attr.value
            else:
                fixed.append((name, attr))
        return kwargs, tuple(fixed)

    def body(self, name: str, graph: ir.Graph) -> dict[str, Any]:
        inner = _Importer(self.functions, self.opsets, self)
        inner.run(graph)
        inner.gm.meta["onnx_graph"] = _header(graph, self.opsets, None)
        inner.gm.recompile()
        target = _free_name(self.gm, _identifier(name))
        self.gm.add_submodule(target, inner.gm)
        captures = tuple(self.resolve(v) for v in inner.captured)
        found = {name: self.graph.get_attr(target)}
        return found | ({CAPTURES + name: captures} if captures else {})


def is_printable(attr: ir.Attr) -> bool:
    """True when FX can print the attribute as a keyword argument."""
    usable_name = attr.name.isidentifier() and not keyword.iskeyword(attr.name)
    value = attr.value if isinstance(attr.value, (tuple, list)) else (attr.value,)
    return usable_name and not attr.is_ref() and attr.type in _PRINTABLE and not any(isinstance(v, bytes) for v in value)


def store(gm: GraphModule, target: str, tensor: ir.TensorProtocol) -> None:
    """Stores a constant: a buffer where torch has the type, else the onnx_ir tensor itself.

    External data is mapped; copies of the graph share the mapping."""
    value = from_ir(tensor)
    if not isinstance(value, torch.Tensor):
        setattr(gm, target, tensor)
        return
    if isinstance(tensor, ir.ExternalTensor):
        # Attributes of this one tensor object: a copy made by `.to()` or arithmetic is an ordinary tensor again.
        setattr(value, "onnx_source", tensor)  # noqa: B010
        setattr(value, "__deepcopy__", lambda memo: value)  # noqa: B010
    gm.register_buffer(target, value)


def _sorted(graph: Iterable[ir.Node]) -> Iterable[ir.Node]:
    """Nodes in the order of the file, which valid ONNX has sorted; a file that is not sorted gets a stable order."""
    nodes = list(graph)
    place = {n: i for i, n in enumerate(nodes)}
    needs = [{p for v in _reads(n) if (p := place.get(v.producer())) is not None} for n in nodes]  # type: ignore[arg-type]
    if all(max(needed, default=-1) < i for i, needed in enumerate(needs)):
        return nodes
    done: list[int] = []
    state: dict[int, bool] = {}
    stack = list(reversed(range(len(nodes))))
    while stack:
        i = stack.pop()
        if state.get(i):
            continue
        missing = [j for j in sorted(needs[i], reverse=True) if not state.get(j)]
        if not missing:
            state[i] = True
            done.append(i)
        elif i in state:
            raise ModelError(f"node {nodes[i].name or nodes[i].op_type!r} depends on itself; the model is not valid ONNX")
        else:
            state[i] = False
            stack += [i, *missing]
    return [nodes[i] for i in done]


def _reads(node: ir.Node) -> Iterable[ir.Value]:
    """Inputs of a node and everything that its nested graphs read."""
    yield from (v for v in node.inputs if v is not None)
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
            for inner in attr.value:
                yield from _reads(inner)


def _first(graph: Graph) -> Node:
    return next(iter(graph.nodes), graph._root)


def _identifier(name: str) -> str:
    """A Python identifier that resembles the ONNX name."""
    found = re.sub(r"\W", "_", name, flags=re.ASCII)
    return f"_{found}" if not found or found[0].isdigit() or keyword.iskeyword(found) else found


def _free_name(gm: GraphModule, name: str) -> str:
    found, n = name, 0
    while hasattr(gm, found):
        n += 1
        found = f"{name}_{n}"
    return found
