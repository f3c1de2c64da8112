"""Tensors in .safetensors files: the header is read, elements stay mapped until asked for; and a writer that holds one tensor at a time.

The format: 8 bytes, the length of the header (little-endian); the header, JSON {name: {dtype, shape, data_offsets}} with "__metadata__"
for strings; then the bytes of the tensors without gaps, to which the offsets are relative.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qgraph.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `start` is its first byte there. `dtype` is the file's name of it, which torch may lack."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self) -> Tensor:
        """The tensor, mapped: writing to it does not change the file. Raises ModelError for an element type that is not known."""
        dtype = DTYPES.get(self.dtype)
        if dtype is None:
            raise ModelError(f"{self.path}: tensor {self.name!r} is of type {self.dtype}, known are {', '.join(DTYPES)}")
        length = prod(self.shape) * dtype.itemsize
        if not length:
            return torch.empty(self.shape, dtype=dtype)
        data: npt.NDArray[np.uint8] = np.memmap(self.path, np.uint8, mode="c", offset=self.start, shape=(length,))
        if self.start % dtype.itemsize:  # older writers do not pad the header
            data = np.array(data)
        return torch.from_numpy(data).view(dtype).view(self.shape)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name. Raises ModelError for a file that is truncated or is not of this format."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LARGEST_HEADER or 8 + length > size:
            raise ModelError(f"{path} is truncated or no safetensors file: a header of {length} bytes does not fit its {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
        found = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is no safetensors file: its header cannot be read ({type(error).__name__}: {error})") from error
    end = max((stop for _, stop in found.values()), default=0)
    if end > size:
        raise ModelError(f"{path} is truncated: its tensors end at byte {end}, the file has {size}")
    return {name: stored for name, (stored, _) in found.items()}


def _entry(path: Path, name: str, entry: Mapping[str, Any], base: int) -> tuple[Stored, int]:
    start, stop = (base + int(offset) for offset in entry["data_offsets"])
    found = Stored(path, name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), start)
    itemsize = DTYPES[found.dtype].itemsize if found.dtype in DTYPES else None
    if start < base or (itemsize is not None and stop - start != prod(found.shape) * itemsize):
        raise ValueError(f"tensor {name!r} has {stop - start} bytes, which do not fit {found.dtype} {list(found.shape)}")
    return found, stop


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: `make` is called when its turn comes and must give this type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write(path: Path, entries: Iterable[Entry]) -> None:
    """Write the tensors, one in memory at a time. An existing file is replaced only by a complete one; raises OSError."""
    entries, end = sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name)), 0  # aligned without gaps
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for e in entries:
        start, end = end, end + prod(e.shape) * e.dtype.itemsize
        header[e.name] = {"dtype": _NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for e in entries:
                value = e.make().contiguous()
                if (value.dtype, tuple(value.shape)) != (e.dtype, e.shape):
                    raise AssertionError(f"{e.name} was announced as {e.dtype} {e.shape}, not {value.dtype} {tuple(value.shape)}")
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
