"""Tensors in mapped temporary files, so that what is made of a large model need not fit in memory.

Pages of mapped files count as resident while they are mapped in, so `release` lets them go; they come back when they are read.
Files lie in the folder of temporary files (TMPDIR); they have no name, and vanish with the last of their tensors or with the process.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from qgraph.errors import ModelError
from qgraph.heap import give_back

LARGE = 2**16
"""Bytes below which a constant stays in memory."""

HELD = 2**27
"""Bytes of new constants, of all graphs together, that stay in memory."""

RESIDENT = 2**28
"""Bytes of mapped files beyond which `release` lets them go."""

CHUNK = 2**28
"""Bytes of one file: one per tensor would be more than a process may have open."""

TRIMMED = 2**24
"""Bytes put into a file after which memory that was freed meanwhile goes back to the system."""

_STATM = Path("/proc/self/statm")

_maps: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""Live mappings by address."""

_held = 0


class Store:
    """Where tensors are put that leave memory. Space is given back by files, when all tensors of one are gone."""

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None
        self.bytes = np.empty(0, np.uint8)
        self.end = 0

    def put(self, value: Tensor) -> Tensor:
        """An equal tensor, writable as any, that lies in a file. Raises ModelError when there is no room for it."""
        count = size(value)
        if not count or is_mapped(value) or value.device.type != "cpu" or value.layout != torch.strided:
            return value
        data = value.detach().contiguous().reshape(-1).view(torch.uint8)
        try:
            if self.file is None or self.end + count > len(self.bytes):
                self._open(max(CHUNK, count))
            assert self.file is not None
            # Written, not copied to the mapping: a full disk is then an error and not the end of the process.
            self.file.seek(self.end)
            rest = data.numpy().data
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            raise ModelError(
                f"no room for {count / 1e6:.0f} MB more of temporary files in {tempfile.gettempdir()} ({error.strerror or error}); "
                "name a folder with more in the variable TMPDIR"
            ) from error
        found = torch.from_numpy(self.bytes[self.end : self.end + count]).view(value.dtype).reshape(value.shape)
        end = self.end + -(-count // 64) * 64
        if end // TRIMMED > self.end // TRIMMED:
            give_back()
        self.end = end
        release()
        return found

    def _open(self, count: int) -> None:
        # Nothing is buffered, so no write is left for later.
        self.file = tempfile.TemporaryFile(prefix="qgraph-", buffering=0)  # noqa: SIM115
        self.file.truncate(count)
        mapping = mmap.mmap(self.file.fileno(), count, access=mmap.ACCESS_WRITE)
        self.bytes, self.end = register(mapping), 0


_constants = Store()


def register(mapping: mmap.mmap) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes of a shared mapping of a file; `release` may unmap its pages."""
    found = np.frombuffer(mapping, np.uint8)
    _maps[found.ctypes.data] = mapping
    return found


def is_mapped(value: Tensor) -> bool:
    """The tensor lies in a registered file."""
    if value.device.type != "cpu" or value.layout != torch.strided:
        return False
    at = value.data_ptr()
    return any(start <= at < start + len(mapping) for start, mapping in list(_maps.items()))


def size(value: Tensor) -> int:
    """Bytes of all elements."""
    return value.numel() * value.element_size()


def settled(value: Tensor, owner: Any = None) -> Tensor:
    """A constant that is to stay: in memory while there are less than `HELD` bytes of such, else in a file.

    `owner` is what the memory belongs to, if it is not the tensor itself."""
    global _held
    release()
    count = size(value)
    if count < LARGE or is_mapped(value) or not value.is_contiguous() or value.device.type != "cpu":  # a view of memory that stays as it is
        return value
    if _held + count > HELD:
        return _constants.put(value)
    _held += count
    weakref.finalize(value if owner is None else owner, _dropped, count)
    return value


def _dropped(count: int) -> None:
    global _held
    _held -= count


def release() -> None:
    """Unmaps the pages of all mapped files where they take more than `RESIDENT` bytes."""
    if _maps and _mapped_in() > RESIDENT:
        for mapping in list(_maps.values()):
            mapping.madvise(mmap.MADV_DONTNEED)


def _mapped_in() -> int:
    """Resident bytes of files; 0 where the system does not tell, or has no way to let go."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return 0
    try:
        return int(_STATM.read_bytes().split()[2]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
