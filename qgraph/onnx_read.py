"""path | ModelProto | onnx_ir.Model -> GraphModule, with the things that onnx_ir does not carry kept beside it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from torch.fx import GraphModule

from qgraph.errors import ModelError
from qgraph.onnx_external import byte_range
from qgraph.onnx_import import import_model
from qgraph.onnx_inline import is_inside, load_weights, outline
from qgraph.onnx_proto import deserialize


def from_onnx(source: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> GraphModule:
    """An ONNX model as a GraphModule, callable with torch tensors and returning a tuple.

    External data is mapped into memory, not read; of weights inside the file as much stays in memory as of other constants (see spill.py).
    Raises ModelError for a missing, empty, corrupt or truncated file, external data
    outside the model's folder, and an invalid graph."""
    if isinstance(source, ir.Model):
        return import_model(source)
    if isinstance(source, onnx.ModelProto):
        return import_model(_deserialize(source, "the model", path=None))
    if not isinstance(source, (str, os.PathLike)):
        raise ModelError(f"from_onnx takes a path, an onnx.ModelProto or an onnx_ir.Model, got {type(source).__name__}")
    model = read_model(source)
    load_weights(model, Path(source))
    return import_model(model)


def read_model(path: str | os.PathLike[str]) -> ir.Model:
    """An ONNX file as onnx_ir has it, checked as `from_onnx` does and raising the same errors.

    Its larger weights are not read: they are external tensors, also those that lie inside the file."""
    path = Path(path)
    return _deserialize(_read(path), f"{os.fspath(path)!r}", path=path)


def _read(path: Path) -> onnx.ModelProto:
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ModelError(f"ONNX file {os.fspath(path)!r} is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
                data = outline(mapping, path.resolve().name)
    except FileNotFoundError:
        raise ModelError(f"ONNX file {os.fspath(path)!r} does not exist") from None
    except IsADirectoryError:
        raise ModelError(f"{os.fspath(path)!r} is a directory; name the .onnx file in it") from None
    except OSError as error:
        raise ModelError(f"ONNX file {os.fspath(path)!r} cannot be read: {error.strerror}") from error
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ModelError(f"{os.fspath(path)!r} is not an ONNX model, or is truncated") from None
    return proto


def _deserialize(proto: onnx.ModelProto, name: str, *, path: Path | None) -> ir.Model:
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{name} is not an ONNX model: it holds no graph or imports no operator set")
    model = deserialize(proto)
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        ir.external_data.set_base_dir(graph, "" if path is None else path.parent)
    for tensor in _external(model):
        if path is not None and is_inside(tensor, path):
            tensor.base_dir = path.resolve().parent  # where a link points
        byte_range(tensor)
    return model


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Initializers of every graph, and tensors in attributes."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (v.const_value for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor))
    for graph in (model.graph, *(f.graph for f in model.functions.values())):
        for node in graph.all_nodes():
            for attr in node.attributes.values():
                if isinstance(attr.value, ir.ExternalTensor):
                    yield attr.value
