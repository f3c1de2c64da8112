"""Quantized tables: packed rows gathered by ids and dequantized (embedding.cu), integers dequantized, 4-bit codes unpacked (unpack.cu).

    torch.ops.qgraph_cuda.embedding_dequantize   ids, table -> rows in float        = Q.dequantize(table, ...)[ids]
                          dequantize             integers -> float                  = Q.dequantize(q, ...)
                          unpack                 packed rows -> one integer a byte

Bit for bit what qgraph.reference says. A table is packed with `pack_table`: 8 bits a code, or 4 for types of up to 4 bits, two codes a byte,
the first in the low half; rows begin at multiples of 8 bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.backends.cupy.launch import TYPES, Kernel, kernel
from qgraph.backends.cupy.ops import cuda_op
from qgraph.backends.cupy.roofline import Work
from qgraph.backends.cupy.rows import LARGEST, VECTOR, byte_range, float_type, whole
from qgraph.errors import LoweringError
from qgraph.types import storage

ROW = 8
"""Packed rows are a multiple of so many bytes: what a thread reads at most."""
BLOCK = 256
TILES = 65535
"""Blocks along a row at most: the second axis of unpack's grid."""
UNPACKED = 16
"""Integers that a thread of unpack writes."""
VECTORS = 128
"""16-byte pieces of a row that a warp of embedding_dequantize writes."""


def _kernel(bits: int, dtype: torch.dtype) -> Kernel:
    return kernel("embedding.cu", "embedding_dequantize", expects=("STG.128",), REAL=TYPES[dtype], BITS=bits)


UNPACK = kernel("unpack.cu", "unpack", expects=("LDG.64", "STG.128"))
KERNELS = (*(_kernel(b, t) for t in TYPES for b in (8, 4)), UNPACK)


def bits_of(dtype: str) -> int:
    """The bits of a packed code: 4 for types of up to 4 bits, else 8. Raises LoweringError for more."""
    low, high = byte_range(dtype)
    return 4 if high - low < 16 else 8


def pack_table(q: Tensor, dtype: str) -> Tensor:
    """Integers [n, k] in storage(dtype) -> bytes [n, stride]."""
    q = q.view(torch.uint8)
    if bits_of(dtype) == 4:
        q = F.pad(q, (0, q.shape[1] % 2)) & 15
        q = q[:, ::2] | q[:, 1::2] << 4
    return F.pad(q, (0, -q.shape[1] % ROW)).contiguous()


def _dequantize(
    ids: Tensor | None, table: Tensor, bits: int, flip: int, k: int, scale: Tensor, zero_point: Tensor | None, group: int, out: Tensor
) -> None:
    """Rows of `table` [n, bytes] -> out [..., k], with one scale for all, one per row or one per `group` columns of it."""
    real = float_type(scale)
    groups = 0 if scale.numel() == 1 else -(-k // group) if group else 1
    if groups and scale.numel() != table.shape[0] * groups:
        raise LoweringError(f"{scale.numel()} scales do not fit {table.shape[0]} rows of {groups} groups each")
    if zero_point is not None and zero_point.numel() != scale.numel():
        raise LoweringError(f"{zero_point.numel()} zero points do not fit {scale.numel()} scales")
    if k > LARGEST:
        raise LoweringError(f"the kernels of quantized tables take rows of at most {LARGEST} elements, not {k}")
    zero_flip = 128 if zero_point is not None and zero_point.dtype == torch.int8 else 0
    zero = None if zero_point is None else whole(zero_point)
    rows, pieces = out.numel() // k if k else 0, -(-k * real.itemsize // (VECTOR * VECTORS))
    sizes = (rows, pieces, table.shape[0], k, table.shape[1], group or k, groups, flip, zero_flip)
    blocks = -(-rows * pieces // (BLOCK // 32))
    _kernel(bits, real)((blocks,), BLOCK, None if ids is None else ids.contiguous(), whole(table), whole(scale), zero, out, *sizes)


@cuda_op("Tensor ids, Tensor table, Tensor scale, Tensor? zero_point, str dtype, int k, int group")
def embedding_dequantize(ids: Tensor, table: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, k: int, group: int) -> Tensor:
    """ids int64 [...], a packed table of k columns -> [..., k] in scale's float type.

    scale (and zero_point, in storage(dtype)): one element, one per row of the table, or with `group` > 0 one per row and group of columns,
    [n, ceil(k / group)]. An id beyond the table gives NaN."""
    if ids.dtype != torch.int64:
        raise LoweringError(f"ids are {ids.dtype}; the kernel reads int64")
    bits = bits_of(dtype)
    flip = 0 if dtype.startswith("u") else 1 << bits - 1
    out = scale.new_empty((*ids.shape, k))
    _dequantize(ids, table, bits, flip, k, scale, zero_point, group, out)
    return out


@embedding_dequantize.register_fake
def _(ids: Tensor, table: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, k: int, group: int) -> Tensor:
    return scale.new_empty((*ids.shape, k))


@cuda_op("Tensor q, Tensor scale, Tensor? zero_point, int group")
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
    """Integers [..., k], int8 or uint8, one a byte -> (q - zero_point) * scale in scale's float type. scale: one element, one per row, or with
    `group` > 0 one per row and group of columns."""
    out = scale.new_empty(q.shape)
    k = q.shape[-1] if q.dim() else 1
    if scale.numel() == 1 and q.numel() <= 1 << 26:
        k = q.numel()  # one row, so that short ones fill their blocks
    if q.numel():
        table = whole(q).view(torch.uint8).reshape(-1, k)
        _dequantize(None, table, 8, 128 if q.dtype == torch.int8 else 0, k, scale, zero_point, group, out)
    return out


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor | None, group: int) -> Tensor:
    return scale.new_empty(q.shape)


@cuda_op("Tensor packed, str dtype, int k")
def unpack(packed: Tensor, dtype: str, k: int) -> Tensor:
    """Bytes [n, stride] of `pack_table` -> integers [n, k] in storage(dtype)."""
    if bits_of(dtype) == 8:
        return packed[:, :k].view(storage(dtype)).clone(memory_format=torch.contiguous_format)
    packed, out = whole(packed), packed.new_empty((packed.shape[0], k), dtype=storage(dtype))
    threads = -(-k // UNPACKED)
    block = min(BLOCK, -(-threads // 32) * 32)
    tiles = -(-threads // block) if block else 0
    if tiles > TILES:
        raise LoweringError(f"codes are unpacked in rows of at most {UNPACKED * BLOCK * TILES}, not {k}")
    UNPACK((packed.shape[0], tiles), block, packed, out, k, packed.shape[1], int(not dtype.startswith("u")))
    return out


@unpack.register_fake
def _(packed: Tensor, dtype: str, k: int) -> Tensor:
    return packed.new_empty((packed.shape[0], k), dtype=storage(dtype))


def work(rows: int, k: int, dtype: str, real: torch.dtype, *, group: int = 0, zero_points: bool = False) -> Work:
    """The least of embedding_dequantize for `rows` different ids: ids, codes and parameters read, values written."""
    groups = -(-k // group) if group else 1
    per_row = 8 + k * bits_of(dtype) // 8 + groups * (real.itemsize + zero_points) + k * real.itemsize
    return Work(rows * per_row, fp32_ops=4 * rows * k)
