"""What the row kernels have in common on the host (rows.cuh on the device): their sizes, what they read, what they write."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.backends.cupy.launch import TYPES, Kernel, kernel
from qgraph.errors import LoweringError
from qgraph.types import int_range, storage

VECTOR = 16
"""Bytes of an access; arrays begin at multiples of it."""
LARGEST = 2**31 - 2**16
"""Elements of a row, and rows, at most: 32-bit counters, and room for the last tile to pass the end."""


@dataclass(frozen=True)
class RowConfig:
    """`lanes` threads share a row and keep `keep` vectors each in registers."""

    lanes: int
    keep: int

    @property
    def block(self) -> int:
        """Threads of a block, which has four rows where a row is a warp's."""
        return 128 if self.lanes == 32 else self.lanes

    def blocks(self, rows: int) -> int:
        return -(-rows * self.lanes // self.block)

    def kernel(self, file: str, name: str, dtype: torch.dtype) -> Kernel:
        return kernel(file, name, expects=("LDG.128",), REAL=TYPES[dtype], LANES=self.lanes, KEEP=self.keep)


CONFIGS = (RowConfig(32, 4), RowConfig(256, 4), RowConfig(512, 8))
"""By the length of a row: 128, 1024 or 4096 vectors stay in registers. The last takes any length, and reads what is beyond again."""


def choose(k: int, dtype: torch.dtype) -> RowConfig:
    """The smallest team that keeps a row of k elements in its registers."""
    vectors = -(-k * dtype.itemsize // VECTOR) + (k * dtype.itemsize % VECTOR > 0)  # such rows begin inside a vector
    return next((c for c in CONFIGS if vectors <= c.lanes * c.keep), CONFIGS[-1])


def float_type(x: Tensor) -> torch.dtype:
    """x's type. Raises LoweringError for one that the kernels do not read."""
    if x.dtype not in TYPES:
        raise LoweringError(f"the kernels read float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}")
    return x.dtype


def byte_range(dtype: str) -> tuple[int, int]:
    """The smallest and the largest integer. Raises LoweringError for a type of more than 8 bits."""
    low, high = int_range(dtype)
    if high - low > 255:
        raise LoweringError(f"the kernels quantize to at most 8 bits, not to {dtype}")
    return low, high


def whole(x: Tensor) -> Tensor:
    """x, copied where it is not contiguous or does not begin at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % VECTOR == 0 else x.clone()


def row_count(x: Tensor) -> tuple[int, int]:
    """x [..., k] -> rows, k. Raises LoweringError for a scalar, and for what 32-bit counters cannot count."""
    if not x.dim():
        raise LoweringError("a scalar has no rows")
    rows, k = x.shape[:-1].numel(), x.shape[-1]
    if rows > LARGEST or k > LARGEST:
        raise LoweringError(f"the kernels take at most {LARGEST} rows of as many elements, not {rows} rows of {k}")
    return rows, k


def strided(x: Tensor) -> tuple[Tensor, int]:
    """x [..., k], elements from row to row. x is copied unless its rows follow each other, or are whole vectors with whole vectors between
    them: part of a wider matrix."""
    rows, k = row_count(x)
    flat = x.reshape(rows, k)
    vector, stride = VECTOR // x.element_size(), flat.stride(0) if rows > 1 else k
    apart = k % vector == 0 and stride % vector == 0 and stride <= LARGEST
    if (flat.stride(1) == 1 or k < 2) and flat.data_ptr() % VECTOR == 0 and (stride == k or apart):
        return flat, stride
    return whole(flat), k


def beside(x: Tensor, name: str, other: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """`other`, whole. Raises LoweringError where it has not that shape and x's type."""
    if other is None:
        return None
    if tuple(other.shape) != shape or other.dtype != x.dtype:
        raise LoweringError(f"{name} is {other.dtype} {list(other.shape)}; beside {x.dtype} {list(x.shape)} the kernel needs {list(shape)}")
    return whole(other)


@dataclass(frozen=True)
class Given:
    """Static parameters as the kernels read them: float32 and int32 (no conversion where a lowering stored them so). `every` is 1 where
    each row has its own, else 0."""

    scale: Tensor | None
    zero_point: Tensor | None
    every: int

    @classmethod
    def of(cls, scale: Tensor | None, zero_point: Tensor | None, rows: int) -> Given:
        """Raises LoweringError for as many scales as fit neither one tensor nor its rows."""
        if scale is None:
            return cls(None, None, 0)
        if scale.numel() not in (1, rows) or (zero_point is not None and zero_point.numel() != scale.numel()):
            raise LoweringError(f"{scale.numel()} scales fit neither a tensor nor its {rows} rows, each with a zero point or none")
        zero = None if zero_point is None else zero_point.to(torch.int32).contiguous()
        return cls(scale.to(torch.float32).contiguous(), zero, int(scale.numel() > 1))


Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""What a row kernel writes: integers [..., k] in storage(dtype), scale and zero_point [..., 1] (no elements where they were given), the
sum of each row's integers, int32 [..., 1] (no elements where nobody asked)."""


def empty_rows(x: Tensor, dtype: str, *, dynamic: bool, sums: bool) -> Rows:
    """Room for `Rows` of x [..., k]. A tensor without elements is a null pointer to a kernel: it does not write it."""
    shape = (*x.shape[:-1], 1)
    q = x.new_empty(x.shape, dtype=storage(dtype))
    scale = x.new_empty(shape if dynamic else (0,))
    return q, scale, q.new_empty(scale.shape), x.new_empty(shape if sums else (0,), dtype=torch.int32)
