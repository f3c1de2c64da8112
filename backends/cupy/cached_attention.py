"""cached_attention: what is new joins a quantized cache, and attends to all of it. A few queries run kv_attention.cu; a prompt, of which there
are many, reads the cache back as floats for torch's attention, once."""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.backends.cupy import kv_reference
from qgraph.backends.cupy.kv_cache import QUERIES
from qgraph.backends.cupy.ops import K, cuda_op


@cuda_op(
    "Tensor q, Tensor k, Tensor v, Tensor(a!) codes, Tensor(b!) params, Tensor lengths, Tensor? starts, SymInt past, float scale, int bits, "
    "bool symmetric",
    mutates=("codes", "params"),
)
def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, codes: Tensor, params: Tensor, lengths: Tensor, starts: Tensor | None, past: int, scale: float, bits: int,
    symmetric: bool,
) -> Tensor:  # fmt: skip
    """softmax(scale * q K^T) V [batch, heads, new, head_dim] for q of this shape and k, v [batch, kv_heads, new, head_dim], whose rows go into
    `codes` and `params` of a QuantizedCache behind lengths[b] = `past` tokens. Query i sees the tokens from starts[b] (0 without) to past + i."""
    new, head_dim = q.shape[2:]
    K.kv_append(k.transpose(1, 2), v.transpose(1, 2), codes, params, lengths, bits, symmetric)
    if new <= QUERIES:
        few: Tensor = K.kv_attention(q.transpose(1, 2), codes, params, lengths, starts, scale, bits, new)
        return few.transpose(1, 2)
    total = past + new
    keys, values = kv_reference.dequantized(codes[:, :, :, :total], params[:, :, :, :total], bits, head_dim).to(q.dtype)
    place = torch.arange(total, device=q.device)
    at = place[past:, None]
    seen = place <= at
    if starts is not None:  # a row that pads sees itself, which nobody reads, so that nothing becomes NaN
        seen = seen & ((place >= starts[:, None, None, None]) | (place == at))
    y = torch.nn.functional.scaled_dot_product_attention(q, keys, values, seen, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


@cached_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, codes: Tensor, params: Tensor, lengths: Tensor, starts: Tensor | None, past: int, scale: float, bits: int,
    symmetric: bool,
) -> Tensor:  # fmt: skip
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
