"""Weights inside an ONNX file: taken out of the parsed proto, so that they lie in memory once and not twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qgraph.onnx_proto import all_graphs, pairs
from qgraph.onnx_values import TORCH_DTYPES

Weights = list[dict[str, np.ndarray[Any, Any]]]
"""Per graph, in the order of `all_graphs`: the arrays by name."""

_SMALLEST = 1024


def take_weights(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Weights]:
    """(the model without its larger raw initializers, these initializers). The given proto is emptied of them.

    Protobuf frees nothing before the whole message goes, so what is left moves to a new one."""
    taken: Weights = [_take(graph) for graph in all_graphs(proto)]
    rest = onnx.ModelProto()
    rest.CopyFrom(proto)
    return rest, taken


def _take(graph: onnx.GraphProto | onnx.FunctionProto) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in graph.initializer if isinstance(graph, onnx.GraphProto) else ():
        dtype = ir.DataType(tensor.data_type)
        # Data of a wrong size stays, for the reader to refuse.
        size = int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize if dtype in TORCH_DTYPES else 0
        if size >= _SMALLEST and tensor.name and len(raw := tensor.raw_data) == size and tensor.name not in found:
            found[tensor.name] = np.frombuffer(raw, np.dtype(dtype.numpy()).newbyteorder("<")).reshape(tuple(tensor.dims))
            tensor.ClearField("raw_data")
    return found


def put_weights(model: ir.Model, proto: onnx.ModelProto, taken: Weights) -> None:
    """Gives the model read from the rest its weights back."""
    for (graph, _), arrays in zip(pairs(model, proto), taken, strict=True):
        for name, array in arrays.items():
            value = graph.initializers[name]
            old = value.const_value
            assert old is not None
            value.const_value = ir.Tensor(
                array, dtype=old.dtype, name=name, doc_string=old.doc_string, metadata_props=dict(old.metadata_props)
            )
