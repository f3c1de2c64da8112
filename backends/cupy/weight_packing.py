"""Integers [N, K] of 2 to 8 bits with their scales -> the layout that weight_gemv.cu and weight_gemm.cu read, and back.

codes are in the order of tensor-core fragments (weight_codes.cuh draws it), padded to multiples of 64 both ways, in 2, 3, 4 or 8 bits each:
5 to 7 bits take 8. A scale is row[n] * ratio[k // group, n]: row is float32, and ratio, at most 16, keeps half's precision for any scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.errors import LoweringError
from qgraph.types import int_range, storage

SQUARE = 64
"""N and K are packed in squares of 64 x 64."""
UNIT = 32
"""Inputs that share a scale in the kernels: the size of a group is a multiple."""
LARGEST_RATIO = 16.0

_SPREAD = (4, 8, 2, 4, 2, 4, 2)
"""A square as [tile j, pair g, output of the pair, step s, half, t, input of the pair]: n = 16j + 2g + o, k = 16s + 8h + 2t + e."""


@dataclass(frozen=True)
class PackedWeight:
    """codes int32 [N/64, K/64, bits, 32 lanes, 4 words]; row float32 [N]; ratio [groups, N]; zeros uint8 [groups, N], or None where
    `zero` is the code of 0 everywhere. N and K are padded here to multiples of 64; `n` and `k` are the weight's own. `group`: inputs of a
    scale."""

    codes: Tensor
    row: Tensor
    ratio: Tensor
    zeros: Tensor | None
    zero: int
    n: int
    k: int
    group: int

    @property
    def bits(self) -> int:
        """Bits of a code: 2, 3, 4 or 8."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in (self.codes, self.row, self.ratio, self.zeros) if t is not None)


def pack_weight(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, group: int = 0, *, real: torch.dtype = torch.float16
) -> PackedWeight:
    """The weight of Q.dequant_linear (the same operands) for inputs of type `real`: ratio is float32 where that is, else half.

    Raises LoweringError for more than 8 bits, fewer than 2, and groups that are no multiple of 32."""
    low, high = int_range(dtype)
    bits = (high - low).bit_length()
    if not 2 <= bits <= 8:
        raise LoweringError(f"the weight-only kernels have codes of 2 to 8 bits, not {dtype}")
    n, k = weight.shape
    if group % UNIT and group < k:
        raise LoweringError(f"the weight-only kernels have groups of multiples of {UNIT} inputs, not {group}")
    size = group if 0 < group < k else max(_padded(k), SQUARE)
    row, ratio = _scales(_grid(scale, n, size, k, 1.0), real)
    zeros = None if zero_point is None else (_grid(zero_point.to(torch.int32), n, size, k, 0) - low).to(torch.uint8)
    codes = _pack((weight.to(torch.int32) - low), 8 if bits > 4 else bits)
    return PackedWeight(codes, row, ratio, zeros, -low, n, k, size)


def pack_bias(bias: Tensor) -> Tensor:
    """[N] of any float type -> float32, padded like the weight."""
    return F.pad(bias.to(torch.float32), (0, _padded(bias.shape[0]) - bias.shape[0]))


def unpack_weight(packed: PackedWeight, dtype: str) -> Tensor:
    """The integers [N, K] that `pack_weight` was given."""
    codes = _unpack(packed.codes)[: packed.n, : packed.k]
    return (codes + int_range(dtype)[0]).to(storage(dtype))


def dequantize_packed(packed: PackedWeight) -> Tensor:
    """The weight [N, K] in float32, as the kernels mean it: (code - zero) * ratio * row."""
    group = torch.arange(packed.k, device=packed.codes.device) // packed.group
    zero = packed.zero if packed.zeros is None else packed.zeros.T[: packed.n, group].to(torch.float32)
    ratio = packed.ratio.to(torch.float32).T[: packed.n, group]
    return (_unpack(packed.codes)[: packed.n, : packed.k] - zero) * ratio * packed.row[: packed.n, None]


def _padded(size: int) -> int:
    return -(-size // SQUARE) * SQUARE


def _grid(values: Tensor, n: int, group: int, k: int, fill: float) -> Tensor:
    """A scale or zero point of one element, [N] or [N, groups] -> [groups of padded K, padded N]."""
    wide = values.reshape(n, -1) if values.numel() != 1 else values.reshape(1, 1).expand(n, 1)
    groups = -(-_padded(k) // group)
    return F.pad(wide, (0, groups - wide.shape[1], 0, _padded(n) - n), value=fill).T.contiguous()


def _scales(scale: Tensor, real: torch.dtype) -> tuple[Tensor, Tensor]:
    """[groups, N] -> row [N], ratio [groups, N]. A row whose scales are all 0 has ratios 0."""
    wide = scale.to(torch.float32)
    row = wide.abs().amax(0) / LARGEST_RATIO
    ratio = torch.where(row > 0, wide / row, 0.0)
    return row, ratio.to(torch.float32 if real == torch.float32 else torch.float16)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """int32 codes [N, K] -> int32 [N/64, K/64, bits, 32, 4]."""
    n, k = codes.shape
    padded = F.pad(codes, (0, _padded(k) - k, 0, _padded(n) - n))
    square = padded.reshape(-1, *_SPREAD[:3], padded.shape[1] // SQUARE, *_SPREAD[3:])  # N/64, j, g, o, K/64, s, h, t, e
    lanes = square.permute(0, 4, 2, 7, 1, 5, 8, 6, 3)  # N/64, K/64, g, t | j, s, e, h, o
    lanes = lanes.reshape(*lanes.shape[:2], 32, 4, 4, 8)
    vectors = _bytes(lanes) if bits == 8 else _planes(lanes, bits)
    return vectors.transpose(2, 3).contiguous()


def _unpack(vectors: Tensor) -> Tensor:
    """The inverse of `_pack`: int32 [padded N, padded K]."""
    words = vectors.transpose(2, 3)
    lanes = _from_bytes(words) if vectors.shape[2] == 8 else _from_planes(words)
    square = lanes.reshape(*lanes.shape[:2], 8, 4, 4, 4, 2, 2, 2).permute(0, 4, 2, 8, 1, 5, 7, 3, 6)
    return square.reshape(SQUARE * lanes.shape[0], SQUARE * lanes.shape[1])


def _shifts(like: Tensor, *amounts: int) -> Tensor:
    return torch.tensor(amounts, dtype=torch.int32, device=like.device)


def _nibbles(lanes: Tensor) -> Tensor:
    """[..., 8] codes of at most four bits -> words, code i from bit 4i."""
    words: Tensor = lanes << _shifts(lanes, *range(0, 32, 4))
    return words.sum(-1, dtype=torch.int32)


def _planes(lanes: Tensor, bits: int) -> Tensor:
    """[..., 4 tiles, 4 steps, 8] -> [..., vectors, 4 words]."""
    if bits == 4:
        return _nibbles(lanes)
    low = _nibbles(lanes & 3)
    low = (low[..., 0::2] | (low[..., 1::2] << 2)).reshape(*lanes.shape[:-3], 2, 4)  # tile pairs; words (tile, pair of steps)
    if bits == 2:
        return low
    high = (_nibbles(lanes >> 2) << _shifts(lanes, 0, 1, 2, 3)).sum(-1, dtype=torch.int32)
    return torch.cat([low, high.unsqueeze(-2)], dim=-2)


def _from_planes(words: Tensor) -> Tensor:
    bits = words.shape[-2]
    if bits == 4:
        return _fields(words, 15)
    low = words[..., :2, :].reshape(*words.shape[:-2], 4, 2).unsqueeze(-1)  # tile, pair of steps
    codes = _fields((low >> _shifts(words, 0, 2)).flatten(-2), 3)
    if bits == 2:
        return codes
    high = words[..., 2, :].unsqueeze(-1) >> _shifts(words, 0, 1, 2, 3)
    return torch.add(codes, _fields(high, 1), alpha=4)


def _fields(words: Tensor, mask: int) -> Tensor:
    """Words -> [..., 8] what `mask` shows of each four bits."""
    fields: Tensor = (words.unsqueeze(-1) >> _shifts(words, *range(0, 32, 4))) & mask
    return fields


def _bytes(lanes: Tensor) -> Tensor:
    """[..., 4, 4, 8 = (e, h, o)] -> [..., 8 vectors, 4 words]: a word for each (tile, step, h), its bytes (o, e)."""
    parts = lanes.reshape(*lanes.shape[:-1], 2, 2, 2).movedim(-3, -1)  # h, o, e
    words: Tensor = (parts.flatten(-2) << _shifts(lanes, 0, 8, 16, 24)).sum(-1, dtype=torch.int32)
    return words.reshape(*lanes.shape[:-3], 8, 4)


def _from_bytes(words: Tensor) -> Tensor:
    parts: Tensor = (words.reshape(*words.shape[:-2], 4, 4, 2, 1) >> _shifts(words, 0, 8, 16, 24)) & 255  # h, (o, e)
    return parts.reshape(*parts.shape[:-1], 2, 2).movedim(-1, -3).flatten(-3)
