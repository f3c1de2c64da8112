"""Integers one per element -> the byte layouts of ONNX Runtime's block-quantized kernels.

MatMulNBits and GatherBlockQuantized hold unsigned codes whose zero point is 2**(bits-1) unless one is given; 4-bit codes lie two in
a byte, the first in the low half, 2-bit codes four. Source: ONNX Runtime's ContribOperators.md (MatMulNBits, GatherBlockQuantized).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qgraph.types import int_range

SMALLEST_BLOCK = 16
LARGEST_BLOCK = 256
"""Blocks that MatMulNBits accepts are powers of two in this range; GatherBlockQuantized has no upper limit."""


@dataclass(frozen=True)
class Blocks:
    """What a block-quantized kernel reads. data, zero_point: uint8; zero_point None: the middle of the codes."""

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    block: int


def container_bits(dtype: str) -> int:
    """Bits of the codes that hold `dtype` in the fast kernels: 4 up to four bits, else 8 ("int3" -> 4, "uint6" -> 8)."""
    low, high = int_range(dtype)
    return 4 if high - low < 16 else 8


def block_size(group: int) -> int | None:
    """The largest block of MatMulNBits that divides a group of the weight; None when there is none (group % 16 != 0)."""
    size = group & -group
    return None if size < SMALLEST_BLOCK else min(size, LARGEST_BLOCK)


def kernel_bits(dtype: str, *, level: int, block: int) -> int:
    """Bits of the codes that MatMulNBits reads fast: 2 where rows of x are quantized (level 4) in blocks of 64 or 128, else `container_bits`."""
    low, high = int_range(dtype)
    return 2 if high - low < 4 and level == 4 and block in (64, 128) else container_bits(dtype)


def codes(values: Tensor, dtype: str, bits: int) -> Tensor:
    """Integers of `dtype` as unsigned codes of `bits` bits (uint8): signed ones move up by 2**(bits-1)."""
    shift = 0 if dtype.startswith("u") else 2 ** (bits - 1)
    return values.to(torch.uint8) + shift  # modulo 256


def nibbles(values: Tensor) -> Tensor:
    """[..., n] codes of 4 bits -> [..., ceil(n / 2)] bytes, the first code in the low half."""
    if values.shape[-1] % 2:
        values = torch.cat([values, torch.zeros_like(values[..., :1])], -1)
    return values[..., 0::2] | (values[..., 1::2] << 4)


def quarters(values: Tensor) -> Tensor:
    """[..., n] codes of 2 bits -> [..., ceil(n / 4)] bytes, the first code in the lowest bits."""
    values = torch.nn.functional.pad(values, (0, -values.shape[-1] % 4))
    return values[..., 0::4] | (values[..., 1::4] << 2) | (values[..., 2::4] << 4) | (values[..., 3::4] << 6)


def matmul_blocks(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, *, group: int, block: int, bits: int | None = None
) -> Blocks:
    """Weight integers [N, K] with scale [N, ceil(K / group)] -> data [N, ceil(K / block), block * bits / 8], scale [N, ceil(K / block)].

    `block` divides `group`; `bits` are those of the codes (default: `container_bits`). A last block that K does not fill is padded with the
    code of its zero point, so that it adds nothing."""
    n, k = q.shape
    bits, count = bits or container_bits(dtype), -(-k // block)
    zero = _zero_codes(zero_point, scale, dtype, bits)
    scale, zero = (t.repeat_interleave(group // block, 1)[:, :count] for t in (scale, zero))
    data = torch.cat([codes(q, dtype, bits), zero[:, -1:].expand(n, count * block - k)], 1).reshape(n, count, block)
    return _packed(data, scale, zero, bits, block)


def gather_blocks(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, *, block: int) -> Blocks | None:
    """Table integers [V, D] with scale [V, ceil(D / block)] -> rows of bytes; None for an odd D in 4 bits, which has no layout."""
    bits = container_bits(dtype)
    if bits == 4 and q.shape[1] % 2:
        return None
    return _packed(codes(q, dtype, bits), scale, _zero_codes(zero_point, scale, dtype, bits), bits, block)


def _zero_codes(zero_point: Tensor | None, scale: Tensor, dtype: str, bits: int) -> Tensor:
    return codes(torch.zeros(scale.shape, dtype=torch.int16) if zero_point is None else zero_point, dtype, bits)


def _packed(data: Tensor, scale: Tensor, zero: Tensor, bits: int, block: int) -> Blocks:
    """A zero point that is always in the middle is the kernels' default and not stored."""
    plain = bool((zero == 2 ** (bits - 1)).all())
    pack = {2: quarters, 4: nibbles}.get(bits, torch.Tensor.contiguous)
    return Blocks(pack(data), scale.contiguous(), None if plain else pack(zero), bits, block)
