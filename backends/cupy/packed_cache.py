"""Packed weights on disk, by the content of what they are made of: lowering a model a second time reads them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from qgraph.backends.cupy.toolchain import HERE, keep, kept

WORTH_KEEPING = 1 << 20
"""Bytes of integers from which finding a file is faster than packing again."""


def packed(make: Callable[..., Mapping[str, Tensor]], *operands: Tensor | str | int | torch.dtype | None) -> Mapping[str, Tensor]:
    """make(*operands), from the cache folder where it was made before. The file's name is the hash of the operands and of the sources of
    this backend, in which the layouts are."""
    if sum(o.nbytes for o in operands if isinstance(o, Tensor)) < WORTH_KEEPING:
        return make(*operands)
    path = kept("packed", ".npz", make.__qualname__, _sources(), *map(_identity, operands))
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: torch.from_numpy(stored[name]) for name in stored.files}
        except (BadZipFile, ValueError, OSError, EOFError):
            path.unlink(missing_ok=True)  # cut short by a full disk; it is made again
    found = make(*operands)
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in found.items()}
    np.savez(buffer, **arrays)
    keep(path, buffer.getvalue())
    return found


@cache
def _sources() -> str:
    return "".join(path.read_text() for path in sorted(HERE.glob("*.py")))


def _identity(operand: Tensor | str | int | torch.dtype | None) -> bytes:
    if not isinstance(operand, Tensor):
        return repr(operand).encode()
    stored = operand.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
    return repr((operand.dtype, tuple(operand.shape))).encode() + hashlib.blake2b(stored.data, digest_size=32).digest()
