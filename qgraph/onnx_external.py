"""External data of ONNX files: byte ranges of files beside the model, mapped into memory and never read until used."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.spill import register

_mappings: weakref.WeakValueDictionary[tuple[int, ...], mmap.mmap] = weakref.WeakValueDictionary()


def data_path(tensor: ir.ExternalTensor) -> Path:
    """The data file of an external tensor.

    Raises ModelError when it is missing or lies outside the model's folder (absolute, "..", or through a symbolic link)."""
    location, base = os.fspath(tensor.location), Path(tensor.base_dir or ".")
    path = (base / location).resolve()
    if os.path.isabs(location) or not path.is_relative_to(base.resolve()):
        raise ModelError(
            f"initializer {tensor.name!r}: external data {location!r} lies outside the model's folder {os.fspath(base)!r}; "
            "move the file beside the model and store a relative path"
        )
    if not path.is_file():
        raise ModelError(f"initializer {tensor.name!r}: external data file {os.fspath(base / location)!r} is missing")
    return path


def byte_range(tensor: ir.ExternalTensor) -> tuple[Path, int, int]:
    """(file, offset, length) of an external tensor, checked against the file's size. Raises ModelError."""
    path, offset = data_path(tensor), tensor.offset or 0
    length, size = tensor.nbytes, path.stat().st_size
    if tensor.length is not None and tensor.length != length:
        raise ModelError(
            f"initializer {tensor.name!r}: external data has length {tensor.length}, but its type and shape need {length} bytes"
        )
    if offset + length > size:
        raise ModelError(
            f"initializer {tensor.name!r}: external data file {os.fspath(path)!r} is truncated: needs {offset + length} bytes, has {size}"
        )
    return path, offset, length


def memory_map(tensor: ir.ExternalTensor) -> np.ndarray[Any, Any]:
    """The elements of an external tensor, read-only and mapped; types under 8 bits are unpacked into memory. Raises ModelError."""
    path, offset, length = byte_range(tensor)
    shape = tensor.shape.numpy()
    if length == 0:
        return np.empty(shape, tensor.dtype.numpy())
    data = _mapped(path)[offset : offset + length]
    if tensor.dtype.bitwidth < 8:
        return ir.PackedTensor(np.array(data), tensor.dtype, shape=tensor.shape).numpy()
    found = data.view(np.dtype(tensor.dtype.numpy()).newbyteorder("<")).reshape(shape)
    return found if found.flags.aligned else found.copy()


def _mapped(path: Path) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """All bytes of a file. It is mapped once, as long as its tensors live: each mapping keeps a file open, and there may be thousands."""
    found = path.stat()
    key = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
    mapping = _mappings.get(key)
    if mapping is None:
        with path.open("rb") as file:
            mapping = _mappings[key] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return register(mapping)


def copy_sparse(source: BinaryIO, target: BinaryIO, *, start: int, offset: int, length: int) -> None:
    """Copies bytes [start, start + length) of one file to `offset` of another, which reads as zeros there, without passing holes."""
    position, end = start, start + length
    while position < end:
        begin, stop = _next_data(source.fileno(), position, end)
        _copy_range(source.fileno(), target.fileno(), start=begin, offset=offset + begin - start, length=stop - begin)
        position = stop


def _next_data(descriptor: int, position: int, end: int) -> tuple[int, int]:
    """The next range that holds data, empty at the end; everything is data where the system cannot tell."""
    if not hasattr(os, "SEEK_DATA"):
        return position, end
    try:
        begin = min(os.lseek(descriptor, position, os.SEEK_DATA), end)
        return begin, min(os.lseek(descriptor, begin, os.SEEK_HOLE), end) if begin < end else end
    except OSError as error:
        # ENXIO: nothing but a hole up to the end of the file.
        return (end, end) if error.errno == errno.ENXIO else (position, end)


def _copy_range(source: int, target: int, *, start: int, offset: int, length: int) -> None:
    done = 0
    while done < length and hasattr(os, "copy_file_range"):
        try:
            moved = os.copy_file_range(source, target, min(length - done, 1 << 30), start + done, offset + done)
        except OSError:
            # Across file systems, or not supported by this one: the loop below does it, and reports real failures.
            break
        if not moved:
            break
        done += moved
    while done < length:
        chunk = os.pread(source, min(length - done, 1 << 24), start + done)
        if not chunk:
            raise ModelError("an external data file became shorter while it was copied")
        done += os.pwrite(target, chunk, offset + done)
