"""Weights inside an ONNX file: they stay there while the model around them is parsed, and are then read one by one.

Protobuf would have all of them in memory, at first twice, and frees nothing before the whole message goes. So larger initializers are made
external data before it sees them: ranges of the file itself.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError

from qgraph.onnx_values import TORCH_DTYPES
from qgraph.spill import settled

_SMALLEST = 1024

_INSIDE: dict[type, dict[int, type]] = {
    onnx.ModelProto: {onnx.ModelProto.GRAPH_FIELD_NUMBER: onnx.GraphProto},
    onnx.GraphProto: {onnx.GraphProto.NODE_FIELD_NUMBER: onnx.NodeProto, onnx.GraphProto.INITIALIZER_FIELD_NUMBER: onnx.TensorProto},
    onnx.NodeProto: {onnx.NodeProto.ATTRIBUTE_FIELD_NUMBER: onnx.AttributeProto},
    onnx.AttributeProto: dict.fromkeys(
        (onnx.AttributeProto.G_FIELD_NUMBER, onnx.AttributeProto.GRAPHS_FIELD_NUMBER), onnx.GraphProto
    ),
}  # fmt: skip
"""The way to initializers: message -> number of a field -> message that it holds."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
"""Wire types of protobuf's encoding (protobuf.dev/programming-guides/encoding)."""


def outline(data: mmap.mmap, location: str) -> bytes:
    """A serialized model, mapped from the file `location`, with its larger raw initializers as external data in that file.

    What is not a model comes back as it is."""
    try:
        return _message(data, 0, len(data), onnx.ModelProto, location) or bytes(data)
    except (IndexError, ValueError, RecursionError, DecodeError):  # cut or no protobuf; parsing it will say so
        return bytes(data)


def _message(data: mmap.mmap, start: int, end: int, kind: type, location: str) -> bytes | None:
    """The message at start .. end - 1 with initializers made external; None when none was."""
    pieces, done = list[bytes](), start
    for number, field, begin, stop in _fields(data, start, end):
        inner = _INSIDE[kind].get(number)
        if inner is None or stop - begin < _SMALLEST:
            continue
        is_tensor = inner is onnx.TensorProto
        new = _tensor(data, begin, stop, location) if is_tensor else _message(data, begin, stop, inner, location)
        if new is not None:
            pieces += [data[done:field], _encoded(number << 3 | _LENGTH), _encoded(len(new)), new]
            done = stop
    return b"".join([*pieces, data[done:end]]) if pieces else None


def _tensor(data: mmap.mmap, start: int, end: int, location: str) -> bytes | None:
    raw = [
        (field, begin, stop) for number, field, begin, stop in _fields(data, start, end) if number == onnx.TensorProto.RAW_DATA_FIELD_NUMBER
    ]
    if len(raw) != 1 or raw[0][2] - raw[0][1] < _SMALLEST:
        return None
    ((field, begin, stop),) = raw
    tensor = onnx.TensorProto.FromString(data[start:field] + data[stop:end])
    dtype = ir.DataType(tensor.data_type)
    # Data of a wrong size stays, for the reader to refuse.
    fits = dtype in TORCH_DTYPES and math.prod(tensor.dims) * dtype.itemsize == stop - begin
    if not fits or not tensor.name or tensor.data_location == onnx.TensorProto.EXTERNAL:
        return None
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(begin), "length": str(stop - begin)}.items():
        tensor.external_data.add(key=key, value=value)
    made: bytes = tensor.SerializeToString()
    return made


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each field with a length: (number, where the field begins, where its value begins and ends)."""
    at = start
    while at < end:
        field = at
        key, at = _decoded(data, at)
        wire = key & 7
        if wire == _VARINT:
            _, at = _decoded(data, at)
        elif wire == _LENGTH:
            length, at = _decoded(data, at)
            if at + length > end:
                raise ValueError("a field ends behind its message")
            yield key >> 3, field, at, at + length
            at += length
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _decoded(data: mmap.mmap, at: int) -> tuple[int, int]:
    """(the number at `at`, where it ends): 7 bits in a byte, the lowest first, in 10 bytes at most."""
    value = 0
    for i in range(10):
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at + i + 1
    raise ValueError("a number of more than 64 bits")


def _encoded(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def load_weights(model: ir.Model, path: Path) -> None:
    """Reads what `outline` left in the file: into memory as far as there is room for constants, else into a temporary file."""
    with path.open("rb") as file:
        for value in [v for graph in model.graphs() for v in graph.initializers.values()]:
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or not is_inside(tensor, path):
                continue
            file.seek(tensor.offset or 0)
            read = np.fromfile(file, np.uint8, tensor.nbytes)
            array = settled(torch.from_numpy(read), owner=read).numpy()
            value.const_value = ir.Tensor(
                array.view(np.dtype(tensor.dtype.numpy()).newbyteorder("<")).reshape(tensor.shape.numpy()),
                dtype=tensor.dtype,
                name=tensor.name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )


def is_inside(tensor: ir.ExternalTensor, path: Path) -> bool:
    """The tensor is a part of the model's file itself."""
    return tensor.location == path.resolve().name
