"""ModelProto <-> onnx_ir.Model, with what onnx_ir leaves out kept beside each graph and put back.

That is: sparse initializers and attributes, map types, the set and order of value_info and quantization annotations, entries that
belong to no value, trailing empty outputs, the spelling "ai.onnx" of the default domain, and training information.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from qgraph.errors import ModelError

EXTRAS = "qgraph.extras"
_SPARSE = {onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS}
GraphLike = onnx.GraphProto | onnx.FunctionProto


@dataclass(frozen=True)
class Extras:
    """What one graph had beyond onnx_ir. `unbound` names value_info and annotations of values that the graph does not have;
    `types` are the types that onnx_ir cannot express, by value name."""

    value_info: tuple[onnx.ValueInfoProto, ...] = ()
    annotations: tuple[onnx.TensorAnnotation, ...] = ()
    unbound: frozenset[str] = frozenset()
    sparse: tuple[onnx.SparseTensorProto, ...] = ()
    types: tuple[tuple[str, onnx.TypeProto], ...] = ()
    training: tuple[onnx.TrainingInfoProto, ...] = ()


def deserialize(proto: onnx.ModelProto) -> ir.Model:
    """The model with an `Extras` in every graph's meta. The proto is copied only when it holds what onnx_ir refuses.

    Raises ModelError when the proto is not a valid model."""
    if any(_needs_care(g) for g in all_graphs(proto)):
        proto = _copy(proto)
    stripped = [_strip(g) for g in all_graphs(proto)]
    try:
        model: ir.Model = ir.from_proto(proto)
    except (ir.serde.SerdeError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise ModelError(f"the model is not valid ONNX: {_innermost(error)}") from error
    for (graph, source), taken in zip(pairs(model, proto), stripped, strict=True):
        graph.meta[EXTRAS] = _extras(source, taken, graph)
    _keep_training(model, proto)
    return model


def serialize(model: ir.Model) -> onnx.ModelProto:
    """The inverse, for a model that the caller gives away: its sparse attributes are moved into the result."""
    sparse = {id(n): attrs for n in _all_nodes(model) if (attrs := _pop_sparse(n))}
    proto: onnx.ModelProto = ir.to_proto(model)
    for graph, written in list(pairs(model, proto)):
        for node, node_proto in zip(graph, written.node, strict=True):
            _restore_node(node, node_proto, sparse.get(id(node), []))
        if (extras := graph.meta.get(EXTRAS)) is not None:
            _restore_graph(extras, graph, written)
    proto.training_info.extend(getattr(model.graph.meta.get(EXTRAS), "training", ()))
    return proto


def densify(sparse: onnx.SparseTensorProto) -> ir.TensorProtocol:
    """The dense tensor that a sparse one stands for; it carries the name of its values."""
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 2:
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return ir.Tensor(dense, name=sparse.values.name)


def attribute_proto(attr: ir.Attr) -> onnx.AttributeProto:
    """The attribute as a proto; onnx_ir does not serialize sparse ones."""
    if isinstance(attr.value, onnx.AttributeProto):
        return attr.value
    found: onnx.AttributeProto = ir.to_proto(attr)
    return found


# Walking both forms side by side


def all_graphs(proto: onnx.ModelProto) -> Iterator[GraphLike]:
    for graph in (proto.graph, *proto.functions):
        yield from _nested(graph)


def _nested(graph: GraphLike) -> Iterator[GraphLike]:
    yield graph
    for node in graph.node:
        for attr in node.attribute:
            for body in (attr.g,) if attr.HasField("g") else attr.graphs:
                yield from _nested(body)


def pairs(model: ir.Model, proto: onnx.ModelProto) -> Iterator[tuple[ir.Graph, GraphLike]]:
    yield from _nested_pairs(model.graph, proto.graph)
    for function, source in zip(model.functions.values(), proto.functions, strict=True):
        yield from _nested_pairs(function.graph, source)


def _nested_pairs(graph: ir.Graph, proto: GraphLike) -> Iterator[tuple[ir.Graph, GraphLike]]:
    yield graph, proto
    for node, source in zip(graph, proto.node, strict=True):
        for attr in source.attribute:
            if attr.ref_attr_name or attr.name not in node.attributes:
                continue
            value = node.attributes[attr.name].value
            bodies = [value] if attr.type == onnx.AttributeProto.GRAPH else value if attr.type == onnx.AttributeProto.GRAPHS else []
            for body, body_proto in zip(bodies, [attr.g] if attr.HasField("g") else attr.graphs, strict=False):
                yield from _nested_pairs(body, body_proto)


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        yield from graph.all_nodes()


# Reading


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    return found


def _needs_care(graph: GraphLike) -> bool:
    sparse = isinstance(graph, onnx.GraphProto) and bool(graph.sparse_initializer)
    return sparse or any(a.type in _SPARSE for n in graph.node for a in n.attribute) or any(_has_map(v.type) for v in _typed(graph))


def _typed(graph: GraphLike) -> list[onnx.ValueInfoProto]:
    return [*graph.value_info, *graph.input, *graph.output] if isinstance(graph, onnx.GraphProto) else list(graph.value_info)


def _has_map(type_: onnx.TypeProto) -> bool:
    if type_.HasField("sequence_type"):
        return _has_map(type_.sequence_type.elem_type)
    if type_.HasField("optional_type"):
        return _has_map(type_.optional_type.elem_type)
    return bool(type_.HasField("map_type") or type_.HasField("opaque_type"))


@dataclass
class _Stripped:
    types: list[tuple[str, onnx.TypeProto]]
    sparse: list[onnx.SparseTensorProto]
    attributes: dict[int, list[tuple[int, onnx.AttributeProto]]]


def _strip(graph: GraphLike) -> _Stripped:
    """Takes out of the proto what onnx_ir refuses; sparse initializers become dense ones."""
    found = _Stripped([], [], {})
    if not _needs_care(graph):
        return found
    for value in _typed(graph):
        if _has_map(value.type):
            found.types.append((value.name, _clone(value.type)))
            value.ClearField("type")
    for i, node in enumerate(graph.node):
        places = [k for k, a in enumerate(node.attribute) if a.type in _SPARSE and not a.ref_attr_name]
        if places:
            found.attributes[i] = [(k, _clone(node.attribute[k])) for k in places]
            for k in reversed(places):
                del node.attribute[k]
    if isinstance(graph, onnx.GraphProto):
        found.sparse = [_clone(s) for s in graph.sparse_initializer]
        graph.initializer.extend(ir.to_proto(densify(s)) for s in found.sparse)
        del graph.sparse_initializer[:]
    return found


def _clone(message: Any) -> Any:
    found = type(message)()
    found.CopyFrom(message)
    return found


def _extras(proto: GraphLike, stripped: _Stripped, graph: ir.Graph) -> Extras:
    for i, (node, source) in enumerate(zip(graph, proto.node, strict=True)):
        if source.domain == "ai.onnx":
            node.meta["qgraph.domain"] = source.domain
        _insert_sparse(node, stripped.attributes.get(i, []))
    annotations = tuple(map(_clone, proto.quantization_annotation)) if isinstance(proto, onnx.GraphProto) else ()
    value_info = tuple(map(_clone, proto.value_info))
    bound = {str(v.name) for v in _values(graph)}
    listed = {v.name for v in value_info} | {a.tensor_name for a in annotations}
    return Extras(value_info, annotations, frozenset(listed - bound), tuple(stripped.sparse), tuple(stripped.types))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _insert_sparse(node: ir.Node, taken: list[tuple[int, onnx.AttributeProto]]) -> None:
    if not taken:
        return
    attrs = list(node.attributes.values())
    for place, proto in taken:
        attrs.insert(place, ir.Attr(proto.name, ir.AttributeType(proto.type), proto, doc_string=proto.doc_string or None))
    node.attributes.clear()
    for attr in attrs:
        node.attributes.add(attr)


def _keep_training(model: ir.Model, proto: onnx.ModelProto) -> None:
    if proto.training_info:
        own: Extras = model.graph.meta[EXTRAS]
        model.graph.meta[EXTRAS] = Extras(**{**vars(own), "training": tuple(map(_clone, proto.training_info))})


def _innermost(error: BaseException) -> str:
    """The last cause's first line: onnx_ir wraps an error once per level of the model."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# Writing


def _pop_sparse(node: ir.Node) -> list[tuple[int, onnx.AttributeProto]]:
    found = [(i, a.value) for i, a in enumerate(node.attributes.values()) if isinstance(a.value, onnx.AttributeProto)]
    for _, proto in found:
        node.attributes.pop(proto.name)
    return found


def _restore_node(node: ir.Node, proto: onnx.NodeProto, sparse: list[tuple[int, onnx.AttributeProto]]) -> None:
    if "qgraph.domain" in node.meta:
        proto.domain = node.meta["qgraph.domain"]
    proto.output.extend("" for _ in range(len(node.outputs) - len(proto.output)))
    if sparse:
        attrs = list(proto.attribute)
        for place, attr in sparse:
            attrs.insert(place, attr)
        attrs = [_clone(a) for a in attrs]
        del proto.attribute[:]
        proto.attribute.extend(attrs)


def _restore_graph(extras: Extras, graph: ir.Graph, proto: GraphLike) -> None:
    types = dict(extras.types)
    for value in _typed(proto):
        if value.name in types and not value.HasField("type"):
            value.type.CopyFrom(types[value.name])
    alive = {str(v.name) for v in _values(graph)}
    value_info = _value_info(extras, graph, proto, alive)
    del proto.value_info[:]
    proto.value_info.extend(value_info)
    if isinstance(proto, onnx.GraphProto):
        _restore_annotations(extras, proto, alive)
        _restore_sparse(extras, graph, proto)


def _value_info(extras: Extras, graph: ir.Graph, proto: GraphLike, alive: set[str]) -> list[onnx.ValueInfoProto]:
    """The old entries in their order as far as their values live, then those of new values; onnx_ir adds every initializer."""
    written = {v.name: v for v in proto.value_info}
    ends = {v.name: v for v in (*proto.input, *proto.output)} if isinstance(proto, onnx.GraphProto) else {}
    found = []
    for old in extras.value_info:
        if old.name in written:
            found.append(_clone(written.pop(old.name)))
        elif old.name in extras.unbound or (old.name in alive and _agrees(old, ends.get(old.name))):
            found.append(old)
    return found + [_clone(v) for n, v in written.items() if n not in graph.initializers]


def _agrees(old: onnx.ValueInfoProto, now: onnx.ValueInfoProto | None) -> bool:
    """False when a rewrite gave a graph output another element type than its old value_info says."""
    return now is None or old.type.tensor_type.elem_type == now.type.tensor_type.elem_type


def _restore_annotations(extras: Extras, proto: onnx.GraphProto, alive: set[str]) -> None:
    written = {a.tensor_name: a for a in proto.quantization_annotation}
    found = [_clone(written.pop(a.tensor_name, a)) for a in extras.annotations if a.tensor_name in alive | extras.unbound]
    found += [_clone(a) for a in written.values()]
    del proto.quantization_annotation[:]
    proto.quantization_annotation.extend(found)


def _restore_sparse(extras: Extras, graph: ir.Graph, proto: onnx.GraphProto) -> None:
    """Dense initializers that still hold what a sparse one held become sparse again."""
    for sparse in extras.sparse:
        value = graph.initializers.get(sparse.values.name)
        if value is None or value.const_value is None:
            continue
        if np.array_equal(value.const_value.numpy(), densify(sparse).numpy()):
            place = next(i for i, t in enumerate(proto.initializer) if t.name == sparse.values.name)
            del proto.initializer[place]
            proto.sparse_initializer.append(sparse)
