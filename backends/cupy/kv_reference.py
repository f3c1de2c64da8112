"""What kv_append.cu and kv_attention.cu compute, in torch: quantize each row, and attend to what it dequantizes to.

codes [2, batch, kv_heads, capacity, row_bytes], params [2, batch, kv_heads, capacity, 2], lengths [batch]: a kv_cache.QuantizedCache's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph import reference


def pack(q: Tensor, bits: int) -> Tensor:
    """Unsigned codes [..., head_dim] -> uint8 [..., row_bytes]: two 4-bit codes in a byte, the even one low; zeros up to 16 bytes."""
    wide = torch.nn.functional.pad(q, (0, -q.shape[-1] % (128 // bits)))
    return wide if bits == 8 else wide[..., 0::2] | wide[..., 1::2] << 4


def unpack(rows: Tensor, bits: int, head_dim: int) -> Tensor:
    """The inverse of `pack`."""
    q = rows if bits == 8 else torch.stack([rows & 15, rows >> 4], dim=-1).flatten(-2)
    return q[..., :head_dim]


def append(k: Tensor, v: Tensor, codes: Tensor, params: Tensor, lengths: Tensor, bits: int, symmetric: bool) -> None:
    """k, v [batch, new, kv_heads, head_dim] into places lengths[b] .. of the cache; those beyond the capacity are dropped."""
    for which, x in enumerate((k, v)):
        q, scale, zero_point = reference.dynamic_quantize(x, f"uint{bits}", symmetric, axis=-1, group=-1)
        rows, pairs = pack(q, bits), torch.cat([scale, zero_point.to(scale.dtype)], dim=-1)
        for b, length in enumerate(lengths.tolist()):
            room = max(0, min(x.shape[1], codes.shape[3] - length))
            codes[which, b, :, length : length + room] = rows[b, :room].transpose(0, 1)
            params[which, b, :, length : length + room] = pairs[b, :room].transpose(0, 1)


def dequantized(codes: Tensor, params: Tensor, bits: int, head_dim: int) -> Tensor:
    """Keys and values [2, batch, kv_heads, capacity, head_dim] in float32."""
    wide = params.to(torch.float32)
    return (unpack(codes, bits, head_dim).to(torch.float32) - wide[..., 1:]) * wide[..., :1]


def attention(
    q: Tensor, codes: Tensor, params: Tensor, lengths: Tensor, starts: Tensor | None, scale: float, bits: int, fresh: int
) -> Tensor:
    """softmax(q . K^T * scale) . V [batch, queries, heads, head_dim] in float32; query i of n sees the tokens from starts[b] to
    lengths[b] + fresh - (n - 1 - i). One that sees none gives 0."""
    queries, heads, head_dim = q.shape[1:]
    keys, values = (t.repeat_interleave(heads // codes.shape[2], dim=1) for t in dequantized(codes, params, bits, head_dim))
    ends = (lengths + fresh).clamp(max=codes.shape[3])[:, None] - torch.arange(queries - 1, -1, -1, device=q.device)
    place = torch.arange(codes.shape[3], device=q.device)
    hidden = place >= ends[:, None, :, None]
    if starts is not None:
        hidden = hidden | (place < starts[:, None, None, None])
    scores = (q.to(torch.float32).transpose(1, 2) @ keys.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
    found: Tensor = scores.softmax(-1).nan_to_num(nan=0.0) @ values.masked_fill(hidden[:, :, -1, :, None], 0.0)
    return found.transpose(1, 2)
