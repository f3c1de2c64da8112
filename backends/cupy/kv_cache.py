"""A quantized key/value cache: appending quantizes, attention reads the codes (kv_append.cu, kv_attention.cu; in torch: kv_reference.py).

    cache = QuantizedCache.allocate(batch, kv_heads, head_dim, capacity=4096, bits=8, dtype=torch.float16, device="cuda")
    cache.append(k, v)                  [batch, new, kv_heads, head_dim] go behind the lengths[b] tokens that are there
    out = cache.attend(q, scale=...)    q [batch, new, heads, head_dim] of these tokens, 1 to 8 of them
    advance([cache], new)               they count from now on: once a step, for all layers

Every token and head has one scale and zero point, for keys and for values: reference.dynamic_quantize(row, "uint8" or "uint4"). A prompt is
appended in the same way, and attends with torch to its own float k and v; of rows padded on the right, `lengths` become their own lengths.
Nothing waits for the device, so a step can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from typing import Literal, cast

import torch
from torch import Tensor

from qgraph.backends.cupy.launch import TYPES, Kernel, kernel
from qgraph.backends.cupy.ops import K, cuda_op
from qgraph.backends.cupy.roofline import Work
from qgraph.errors import LoweringError

WARPS, STEP, LEAST_SHARE = 4, 16, 128
"""Warps of a block, tokens that a warp takes at once, and the fewest tokens for which a sequence is split (kv_attention.cu)."""

QUERIES, HEAD_DIMS = 8, range(32, 257, 16)
RING = 48 << 10
"""Bytes of shared memory below which a warp's ring has four stages instead of two."""

PROMPT = 4096
"""Rows from which on the warps of kv_append.cu do several: there are enough of them."""

Bits = Literal[4, 8]


def row_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one token of one head: its codes, up to a multiple of 16 bytes."""
    return ceil(head_dim * bits / 128) * 16


@dataclass(frozen=True)
class Config:
    """What the kernels are compiled for. `tiles`: eights of rows (query heads of a kv head, times queries) with which a block attends."""

    dtype: torch.dtype
    bits: int
    head_dim: int
    tiles: int

    @property
    def stages(self) -> int:
        """Steps of a warp's ring: as many as keep two blocks or more on an SM."""
        return 4 if 4 * self._stage <= RING else 2

    @property
    def _stage(self) -> int:
        """Bytes of shared memory of a step of all warps."""
        row = row_bytes(self.head_dim, self.bits)
        stride = row + (16 if row // 16 % 2 == 0 else 0)
        return WARPS * 2 * STEP * (stride + 2 * self.dtype.itemsize)

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the rings, in whose place the warps' sums come at the end."""
        pitch = ceil(row_bytes(self.head_dim, self.bits) / 32) * 32 * 8 // self.bits + 4
        return max(self.stages * self._stage, WARPS * 8 * self.tiles * (pitch + 2) * 4)

    @property
    def groups(self) -> int:
        """Rows that a warp of kv_append.cu does at once."""
        return 32 // min(32, max(4, 1 << (self.head_dim * self.dtype.itemsize // 16 - 1).bit_length()))

    def attention(self) -> Kernel:
        return self._kernel("kv_attention", self.shared, ("HMMA.16816", "LDGSTS.128", "MOVM"))

    def merge(self) -> Kernel:
        return self._kernel("kv_merge", 0, ("LDG.128",))

    def append(self) -> Kernel:
        return kernel("kv_append.cu", "kv_append", expects=("LDG.128",), REAL=TYPES[self.dtype], BITS=self.bits, HEAD_DIM=self.head_dim)

    def _kernel(self, name: str, shared: int, expects: tuple[str, ...]) -> Kernel:
        return kernel(
            "kv_attention.cu", name, shared=shared, expects=expects,
            REAL=TYPES[self.dtype], BITS=self.bits, HEAD_DIM=self.head_dim, TILES=self.tiles, STAGES=self.stages,
        )  # fmt: skip


def choose(dtype: torch.dtype, bits: int, head_dim: int, rows: int) -> Config:
    """`rows` = query heads of a kv head x queries. Two tiles only where their sums leave registers free.

    Raises LoweringError for what no kernel does."""
    if dtype not in TYPES:
        raise LoweringError(f"a quantized cache has keys of float32, float16 or bfloat16, not {dtype}")
    if bits not in (4, 8) or head_dim not in HEAD_DIMS:
        raise LoweringError(f"a quantized cache has 4 or 8 bits and heads of 32 to 256, in steps of 16, not {bits} bits and {head_dim}")
    return Config(dtype, bits, head_dim, 2 if rows > 8 and head_dim <= (64 if dtype == torch.float32 else 128) else 1)


def splits(batch: int, heads: int, capacity: int, multiprocessors: int) -> int:
    """Into how many parts each sequence is split, so that every multiprocessor gets two blocks. The kernel gives each part 128 tokens or
    more; parts for which none are left do nothing."""
    return max(1, min(ceil(2 * multiprocessors / max(1, batch * heads)), ceil(capacity / LEAST_SHARE)))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _kernels() -> tuple[Kernel, ...]:
    """These head sizes stand for all: the code differs only in the length of its loops. kv_merge does not depend on bits and tiles."""
    sizes = {torch.float16: (64, 80, 128, 256), torch.bfloat16: (128,), torch.float32: (64, 128)}
    configs = [choose(d, bits, h, rows) for d, heads in sizes.items() for h, bits, rows in product(heads, (4, 8), (8, 16))]
    merges = [c.merge() for c in configs if (c.bits, c.tiles) == (8, 1)]
    return tuple(dict.fromkeys([*(c.attention() for c in configs), *merges, *(c.append() for c in configs)]))


KERNELS = _kernels()


@cuda_op(
    "Tensor k, Tensor v, Tensor(a!) codes, Tensor(b!) params, Tensor lengths, int bits, bool symmetric", "()", mutates=("codes", "params")
)
def kv_append(k: Tensor, v: Tensor, codes: Tensor, params: Tensor, lengths: Tensor, bits: int, symmetric: bool) -> None:
    """k, v [batch, new, kv_heads, head_dim] float; `codes`, `params`, `lengths` of a QuantizedCache. Token i of sequence b goes to place
    lengths[b] + i; one beyond the capacity is dropped."""
    batch, new, heads, head_dim = k.shape
    k, v, rows = k.contiguous(), v.contiguous(), batch * new * heads
    config = choose(k.dtype, bits, head_dim, 1)
    repeat = max(4, 8 // config.groups) if rows >= PROMPT else 1
    grid = (ceil(rows / (WARPS * config.groups * repeat)), 2)
    config.append()(grid, 32 * WARPS, k, v, codes, params, lengths, int(symmetric), rows, new, heads, codes.shape[3], repeat)


@cuda_op("Tensor q, Tensor codes, Tensor params, Tensor lengths, Tensor? starts, float scale, int bits, int fresh")
def kv_attention(
    q: Tensor, codes: Tensor, params: Tensor, lengths: Tensor, starts: Tensor | None, scale: float, bits: int, fresh: int
) -> Tensor:
    """softmax(q . K^T * scale) . V [batch, queries, heads, head_dim] in q's type, over the tokens from starts[b] (int32 [batch]; 0 without)
    to lengths[b] + fresh. The last query sees all of them, the one before it all but one, and so on."""
    batch, queries, heads, head_dim = q.shape
    kv_heads, capacity = codes.shape[2], codes.shape[3]
    group, q = heads // kv_heads, q.contiguous()
    config = choose(q.dtype, bits, head_dim, group * queries)
    slices = ceil(group * queries / (8 * config.tiles))
    parts = splits(batch, kv_heads * slices, capacity, _multiprocessors(q.device))
    out = torch.empty_like(q)
    rows = batch * heads * queries
    partial = q.new_empty((rows, parts, head_dim) if parts > 1 else 0, dtype=torch.float32)
    tops = q.new_empty((rows, parts, 2) if parts > 1 else 0, dtype=torch.float32)
    shape = (kv_heads, group, queries, capacity)
    grid = (parts, kv_heads * slices, batch)
    config.attention()(grid, 32 * WARPS, q, codes, params, lengths, starts, out, partial, tops, float(scale), fresh, *shape)
    if parts > 1:
        config.merge()((ceil(rows / WARPS),), 32 * WARPS, partial, tops, lengths, starts, out, fresh, rows, *shape, parts)
    return out


@kv_attention.register_fake
def _(
    q: Tensor, codes: Tensor, params: Tensor, lengths: Tensor, starts: Tensor | None, scale: float, bits: int, fresh: int
) -> Tensor:  # fmt: skip
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@dataclass
class QuantizedCache:
    """The cache of one layer; see the module. `appended`: tokens of the longest sequence at most, known without asking the device."""

    codes: Tensor
    """uint8 [2, batch, kv_heads, capacity, row_bytes]: keys, then values, unsigned; two 4-bit codes in a byte, the even one low."""
    params: Tensor
    """[2, batch, kv_heads, capacity, 2] in the float type: scale and zero point of each row."""
    lengths: Tensor
    """int32 [batch]."""
    head_dim: int
    bits: Bits
    symmetric: bool
    appended: int = 0

    @classmethod
    def allocate(
        cls, batch: int, kv_heads: int, head_dim: int, *, capacity: int, bits: Bits = 8, symmetric: bool = False,
        dtype: torch.dtype = torch.float16, device: torch.device | str = "cuda", lengths: Tensor | None = None,
    ) -> QuantizedCache:  # fmt: skip
        """An empty cache for `capacity` tokens of each sequence (up to a multiple of 16). `lengths`: those of another layer, to share them.

        Raises LoweringError for a type, bits or head_dim that the kernels have not, and for a device older than sm_80."""
        choose(dtype, bits, head_dim, 1)
        if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise LoweringError("attention over a quantized cache needs a device of sm_80 or newer")
        shape = (2, batch, kv_heads, ceil(capacity / STEP) * STEP)
        codes = torch.zeros(*shape, row_bytes(head_dim, bits), dtype=torch.uint8, device=device)
        params = torch.zeros(*shape, 2, dtype=dtype, device=device)
        shared = torch.zeros(batch, dtype=torch.int32, device=device) if lengths is None else lengths
        return cls(codes, params, shared, head_dim, bits, symmetric)

    @property
    def capacity(self) -> int:
        return self.codes.shape[3]

    def append(self, k: Tensor, v: Tensor) -> None:
        """k, v [batch, new, kv_heads, head_dim] in the cache's type. Raises LoweringError where they do not fit it, or it is full."""
        batch, heads = self.codes.shape[1:3]
        expected = (batch, k.shape[1], heads, self.head_dim)
        if k.shape != expected or v.shape != expected or k.dtype != self.params.dtype or v.dtype != k.dtype:
            raise LoweringError(
                f"the cache takes keys and values [{batch}, new, {heads}, {self.head_dim}] of {self.params.dtype}, not {list(k.shape)} of "
                f"{k.dtype} and {list(v.shape)} of {v.dtype}"
            )
        self.fits(k.shape[1])
        K.kv_append(k, v, self.codes, self.params, self.lengths, self.bits, self.symmetric)

    def attend(self, q: Tensor, *, scale: float | None = None, starts: Tensor | None = None) -> Tensor:
        """The attention of q [batch, queries, heads, head_dim], of q's shape and type; `scale` is 1 / sqrt(head_dim) by default.

        The queries are those of all tokens appended since the last `advance`: query i sees these up to its own, and what was there before.
        `starts` int32 [batch]: tokens before it are not seen, as those that pad a row on the left, or have left a sliding window.
        Raises LoweringError where q does not fit."""
        batch, heads = self.codes.shape[1:3]
        fits = (
            q.dim() == 4 and q.shape[0] == batch and 1 <= q.shape[1] <= QUERIES and q.shape[2] % heads == 0 and q.shape[3] == self.head_dim
        )
        if not fits or q.dtype != self.params.dtype:
            raise LoweringError(
                f"the cache answers queries [{batch}, 1 to {QUERIES}, a multiple of {heads}, {self.head_dim}] of {self.params.dtype}, not "
                f"{list(q.shape)} of {q.dtype}"
            )
        self.fits(q.shape[1])
        factor = self.head_dim**-0.5 if scale is None else scale
        return cast(Tensor, K.kv_attention(q, self.codes, self.params, self.lengths, starts, factor, self.bits, q.shape[1]))

    def fits(self, new: int) -> None:
        """Raises LoweringError where the longest sequence has no place for `new` more tokens."""
        if self.appended + new > self.capacity:
            raise LoweringError(f"the cache is full: it has {self.appended} tokens, and {new} more exceed its capacity of {self.capacity}")


def advance(caches: Sequence[QuantizedCache], new: int) -> None:
    """The `new` tokens that were appended to each cache are part of it from now on; layers may share their `lengths`. Raises LoweringError
    where one is full."""
    for cache in caches:
        cache.fits(new)
        cache.appended += new
    for lengths in {id(cache.lengths): cache.lengths for cache in caches}.values():
        lengths.add_(new)


def work(q: tuple[int, ...], kv_heads: int, tokens: int, bits: int, dtype: torch.dtype) -> Work:
    """Of kv_attention for q [batch, queries, heads, head_dim] over `tokens` of each sequence: the cache once, q and the result."""
    batch, _, _, head_dim = q
    cache = 2 * batch * kv_heads * tokens * (row_bytes(head_dim, bits) + 2 * dtype.itemsize)
    return Work(cache + 2 * prod(q) * dtype.itemsize, fp16_ops=4 * prod(q) * tokens)


def append_work(k: tuple[int, ...], bits: int, dtype: torch.dtype) -> Work:
    """Of kv_append for k and v [batch, new, kv_heads, head_dim]: both read once, their codes and params written once."""
    rows, head_dim = prod(k[:3]), k[3]
    return Work(2 * rows * (head_dim * dtype.itemsize + head_dim * bits // 8 + 2 * dtype.itemsize), fp32_ops=2 * rows * head_dim * 6)
