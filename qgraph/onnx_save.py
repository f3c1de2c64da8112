"""GraphModule -> .onnx file and, for large models, one data file beside it; written under temporary names and then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
from torch.fx import GraphModule

from qgraph.errors import ModelError
from qgraph.onnx_external import byte_range, copy_sparse, memory_map
from qgraph.onnx_proto import serialize
from qgraph.onnx_write import to_onnx
from qgraph.spill import release

INLINE_LIMIT = 1_800_000_000
"""Bytes of constants above which they go to an external file by themselves: protobuf ends at 2 GiB."""

_SMALLEST_EXTERNAL = 1024
_PAGE = 4096


def save_onnx(gm: GraphModule, path: str | os.PathLike[str], *, external_data: bool | None = None) -> None:
    """Writes the graph to `path`; with `external_data` its constants of 1 KiB or more to `path` + ".data", at relative location.

    By default constants become external when the source's were or when they take more than 1.8 GB. Constants that were mapped from
    a file are copied from file to file, holes included, and never read into memory. An existing file is replaced only
    by a complete one. Raises ModelError when the place cannot be written or the model is too large for one file, and as `to_onnx`."""
    target = Path(path)
    if target.is_dir():
        raise ModelError(f"{os.fspath(target)!r} is a directory; name the .onnx file to write")
    if not target.parent.is_dir():
        raise ModelError(f"folder {os.fspath(target.parent)!r} does not exist")
    model = to_onnx(gm)
    slots = list(_slots(model))
    size = sum(s.tensor.nbytes for s in slots if s.tensor.dtype != ir.DataType.STRING)
    if external_data is None:
        external_data = size > INLINE_LIMIT or any(isinstance(s.tensor, ir.ExternalTensor) for s in slots)
    if not external_data and size > INLINE_LIMIT:
        raise ModelError(f"the model has {size / 1e9:.1f} GB of constants, too many for one ONNX file; use external_data=True")
    try:
        _write(model, slots, target, external_data=external_data)
    except OSError as error:
        raise ModelError(f"{os.fspath(target)!r} cannot be written: {error.strerror or error}") from error


class _Slot:
    """A place in the model that holds a tensor: an initializer, or an attribute of a node."""

    def __init__(self, owner: ir.Value | ir.Node, tensor: ir.TensorProtocol, attr: ir.Attr | None = None) -> None:
        self.owner, self.tensor, self._attr = owner, tensor, attr

    @property
    def is_external(self) -> bool:
        return isinstance(self.tensor, ir.ExternalTensor)

    def put(self, tensor: ir.TensorProtocol) -> None:
        if isinstance(self.owner, ir.Value):
            self.owner.const_value = tensor
            return
        assert self._attr is not None
        # The attribute may be shared with the graph in memory, so it is replaced and not changed.
        self.owner.attributes[self._attr.name] = ir.AttrTensor(self._attr.name, tensor, doc_string=self._attr.doc_string)


def _slots(model: ir.Model) -> Iterator[_Slot]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (_Slot(v, v.const_value) for v in graph.initializers.values() if v.const_value is not None)
    for owner in (model.graph, *(f.graph for f in model.functions.values())):
        for node in owner.all_nodes():
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    yield _Slot(node, attr.value, attr)


def _write(model: ir.Model, slots: list[_Slot], target: Path, *, external_data: bool) -> None:
    data = target.with_name(target.name + ".data")
    temporary = {p: p.with_name(f".{p.name}.{os.getpid()}.tmp") for p in (data, target)}
    try:
        if external_data:
            external_data = _write_data(slots, temporary[data], location=data.name)
        else:
            for slot in slots:
                if isinstance(slot.tensor, ir.ExternalTensor):
                    slot.put(_inline(slot.tensor))
        temporary[target].write_bytes(serialize(model).SerializeToString())
        if external_data:
            os.replace(temporary[data], data)
        os.replace(temporary[target], target)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _inline(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    return ir.Tensor(
        memory_map(tensor),
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _write_data(slots: list[_Slot], path: Path, *, location: str) -> bool:
    """Writes every large constant at an aligned offset and makes its slot point there; False when there was none."""
    end = 0
    with path.open("wb") as file:
        for slot in slots:
            tensor = slot.tensor
            large = tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _SMALLEST_EXTERNAL
            if not large or (isinstance(slot.owner, ir.Node) and not slot.is_external):
                if isinstance(tensor, ir.ExternalTensor):
                    slot.put(_inline(tensor))
                continue
            offset = -(-end // _PAGE) * _PAGE
            _write_tensor(tensor, file, offset)
            release()  # its pages
            end = offset + tensor.nbytes
            slot.put(
                ir.ExternalTensor(
                    location, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or "",
                    doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props),
                )
            )  # fmt: skip
        file.truncate(end)
    return end > 0


def _write_tensor(tensor: ir.TensorProtocol, file: BinaryIO, offset: int) -> None:
    if isinstance(tensor, ir.ExternalTensor):
        source, start, length = byte_range(tensor)
        with source.open("rb") as origin:
            copy_sparse(origin, file, start=start, offset=offset, length=length)
        return
    file.seek(offset)
    assert isinstance(tensor, (ir.Tensor, ir.TensorProtoTensor, ir.PackedTensor))
    tensor.tofile(file)
    file.flush()
