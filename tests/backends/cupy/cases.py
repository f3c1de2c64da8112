"""One call of every kernel family, of any size and on any device, beside what it should give: for the tests on a GPU and for the timings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from qgraph import reference
from qgraph.backends.cupy import act_quantize, embedding, kv_cache, kv_reference, norm_quantize, quantizing, w8a8, w8a8_conv, weight_only
from qgraph.backends.cupy.ops import K
from qgraph.backends.cupy.roofline import Work
from qgraph.backends.cupy.weight_packing import pack_bias, pack_weight
from qgraph.types import int_range

HALF = torch.float16


@dataclass(frozen=True)
class Case:
    """`op(x)` starts the kernels; `expected(x)`, with x and all results on the CPU, is the reference's answer. Integers may be `steps` apart,
    floats `tolerance` times the norm."""

    op: Callable[[Tensor], Any]
    x: Tensor
    expected: Callable[[Tensor], Any]
    work: Work
    steps: int = 0
    tolerance: float = 0.0

    def another(self) -> Tensor:
        """Other values for x."""
        return self.x.roll(1, -1)

    def check(self, found: Any, x: Tensor | None = None) -> None:
        """`found` is what the reference gives for x (by default the case's own)."""
        expected = pytree.tree_leaves(self.expected((self.x if x is None else x).cpu()))
        for f, e in zip((t.cpu() for t in pytree.tree_leaves(found)), expected, strict=True):
            assert (f.dtype, f.shape) == (e.dtype, e.shape)
            apart = f.to(torch.float64) - e.to(torch.float64)
            if f.is_floating_point():
                assert apart.norm() <= self.tolerance * e.to(torch.float64).norm()
            else:
                assert apart.abs().max() <= self.steps


@dataclass(frozen=True)
class Random:
    """Operands on a device, the same in every run."""

    device: torch.device
    seed: int = 0

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator(), device=self.device).to(HALF)

    def scales(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator(), device=self.device) * 0.01 + 0.001

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self._generator(), device=self.device, dtype=dtype)


def integer_linear(device: torch.device, m: int, n: int, k: int) -> Case:
    """Rows of uint8 with a scale and a zero point each, a weight with zero points, a float bias."""
    random = Random(device)
    x, weight = random.integers(0, 255, m, k, dtype=torch.uint8), random.integers(-128, 127, n, k)
    x_scale, x_zero, w_scale, bias = (
        random.scales(m, 1),
        random.integers(100, 150, m, 1, dtype=torch.uint8),
        random.scales(n),
        random.normal(n),
    )
    w_zero = random.integers(-3, 3, n)
    p, packed_bias = w8a8.pack(weight, w_scale, w_zero), w8a8.pack_bias(bias)

    def op(x: Tensor) -> Any:
        return K.w8a8_linear(x, x_scale, x_zero, p.weight, p.scale, p.sums, p.zero_point, packed_bias, HALF)

    def expected(x: Tensor) -> Any:
        parts = (x_scale, x_zero, weight, w_scale, w_zero, bias)
        s, z, w, ws, wz, b = (t.cpu() for t in parts)
        return reference.quantized_linear(x, s, z, "uint8", w, ws.to(torch.float32), wz, "int8", b).to(HALF)

    return Case(op, x, expected, w8a8.work(m, n, k, HALF))


def integer_convolution(device: torch.device, batch: int, n: int, c: int, size: int) -> Case:
    """3 x 3 windows of uint8 images with a zero point, two steps apart, a float bias, to int8."""
    random, window = Random(device), ((2, 2), (1, 1, 1, 1), (1, 1))
    x, weight, bias = (
        random.integers(0, 255, batch, c, size, size, dtype=torch.uint8),
        random.integers(-127, 127, n, c, 3, 3),
        random.normal(n),
    )
    x_scale, w_scale, x_zero, y_scale = (
        random.scales(1),
        random.scales(n),
        random.integers(100, 150, 1, dtype=torch.uint8),
        random.scales(1) * 100,
    )
    p, packed_bias = w8a8_conv.pack_conv(weight, w_scale), w8a8.pack_bias(bias)

    def op(x: Tensor) -> Any:
        stored = (p.weight, p.scale, p.sums, packed_bias)
        return K.w8a8_conv(x, x_scale, x_zero, *stored, torch.float32, (3, 3), *window, y_scale, None, "int8")

    def expected(x: Tensor) -> Any:
        s, z, w, ws, b, ys = (t.cpu() for t in (x_scale, x_zero, weight, w_scale, bias, y_scale))
        return reference.quantized_conv(x, s, z, "uint8", w, ws, None, "int8", b, *window, 1, ys, None, "int8")

    work = w8a8_conv.work(x.shape, weight.shape, (batch, n, -(-size // 2), -(-size // 2)), torch.int8)
    return Case(op, x, expected, work)


def weight_only_linear(device: torch.device, m: int, n: int, k: int, *, bits: int = 4, group: int = 128) -> Case:
    """Half x; unsigned codes in groups with a scale and a zero point each; a bias."""
    random, groups = Random(device), -(-k // group)
    top = 2**bits - 1
    weight, scale = random.integers(0, top, n, k, dtype=torch.uint8), random.scales(n, groups).to(HALF)
    zero, bias = random.integers(top // 4, top // 2, n, groups, dtype=torch.uint8), random.normal(n)
    packed, packed_bias = pack_weight(weight, scale, zero, f"uint{bits}", group), pack_bias(bias)

    def op(x: Tensor) -> Any:
        return weight_only.linear(x, packed, packed_bias)

    def expected(x: Tensor) -> Any:
        w, s, z, b = (t.cpu() for t in (weight, scale.to(torch.float32), zero, bias.to(torch.float32)))
        return reference.dequant_linear(x.to(torch.float32), w, s, z, b, f"uint{bits}", group).to(HALF)

    work = weight_only.work(m, n, k, bits, group, HALF, zeros=True, bias=True)
    return Case(op, random.normal(m, k), expected, work, tolerance=1e-3)


def rows_to_integers(device: torch.device, m: int, k: int) -> Case:
    """Each row by its own range, to uint8."""

    def op(x: Tensor) -> Any:
        return K.quantize_rows(x, None, None, "uint8", False, True)

    def expected(x: Tensor) -> Any:
        q, scale, zero = reference.dynamic_quantize(x, "uint8", False, -1, -1)
        return q, scale, zero, q.sum(-1, keepdim=True, dtype=torch.int32)

    return Case(op, Random(device).normal(m, k), expected, quantizing.rows_work(m, k, HALF, sums=True))


def tensor_to_integers(device: torch.device, m: int, k: int) -> Case:
    """All of x by one range, to int8."""

    def op(x: Tensor) -> Any:
        return K.quantize_tensor(x, "int8", True)

    def expected(x: Tensor) -> Any:
        return reference.dynamic_quantize(x, "int8", True)

    return Case(op, Random(device).normal(m, k), expected, quantizing.tensor_work(m * k, HALF, dynamic=True))


def norm_to_integers(device: torch.device, m: int, k: int) -> Case:
    """RMSNorm of x + residual, each row by its own range; the sum is kept."""
    random = Random(device)
    residual, weight = Random(device, 1).normal(m, k), random.normal(k)

    def op(x: Tensor) -> Any:
        q, scale, zero, _, h, _ = K.norm_quantize(x, residual, weight, None, 1e-6, False, None, None, "int8", True, False, False)
        return q, scale, zero, h

    def expected(x: Tensor) -> Any:
        h = x + residual.cpu()
        y = F.rms_norm(h.to(torch.float32), (k,), weight.cpu().to(torch.float32), 1e-6).to(HALF)
        return *reference.dynamic_quantize(y, "int8", True, -1, -1), h

    work = norm_quantize.work(m, k, HALF, residual=True)
    return Case(op, random.normal(m, k), expected, work, steps=1, tolerance=1e-3)


def act_to_integers(device: torch.device, m: int, k: int) -> Case:
    """silu(x) * up, each row by its own range."""
    up = Random(device, 1).normal(m, k)

    def op(x: Tensor) -> Any:
        return K.act_quantize(x, up, "silu", None, None, "int8", True, False)[:3]

    def expected(x: Tensor) -> Any:
        y = F.silu(x.to(torch.float32)).to(HALF) * up.cpu()
        return reference.dynamic_quantize(y, "int8", True, -1, -1)

    return Case(op, Random(device).normal(m, k), expected, act_quantize.work(m, k, HALF), steps=1, tolerance=1e-3)


def cached_attention(device: torch.device, batch: int, heads: int, kv_heads: int, head_dim: int, tokens: int, *, bits: int = 8) -> Case:
    """One token for each sequence: appended to a cache of `tokens` - 1 others, then attended from. x: its keys."""
    random = Random(device)
    cache = kv_cache.QuantizedCache.allocate(batch, kv_heads, head_dim, capacity=tokens, bits=bits, device=device)  # type: ignore[arg-type]
    before, v = Random(device, 1).normal(batch, tokens - 1, kv_heads, head_dim), random.normal(batch, 1, kv_heads, head_dim)
    q = Random(device, 2).normal(batch, 1, heads, head_dim)
    cache.append(before, before)
    kv_cache.advance([cache], tokens - 1)

    def op(k: Tensor) -> Any:
        cache.append(k, v)
        return cache.attend(q)

    def expected(k: Tensor) -> Any:
        codes, params, lengths = (t.cpu().clone() for t in (cache.codes, cache.params, cache.lengths))
        kv_reference.append(before.cpu(), before.cpu(), codes, params, torch.zeros_like(lengths), bits, False)
        kv_reference.append(k, v.cpu(), codes, params, lengths, bits, False)
        return kv_reference.attention(q.cpu(), codes, params, lengths, None, head_dim**-0.5, bits, 1).to(HALF)

    work = kv_cache.work(tuple(q.shape), kv_heads, tokens, bits, HALF) + kv_cache.append_work(tuple(v.shape), bits, HALF)
    return Case(op, random.normal(batch, 1, kv_heads, head_dim), expected, work, tolerance=2e-3)


def gathered_rows(device: torch.device, m: int, n: int, k: int, *, dtype: str = "int4", group: int = 64) -> Case:
    """m rows of a table of n, in groups with a scale each. x: the ids."""
    low, high = int_range(dtype)
    random, groups = Random(device), -(-k // group)
    table, scale = random.integers(low, high, n, k), random.scales(n, groups).to(HALF)
    codes = embedding.pack_table(table, dtype)

    def op(ids: Tensor) -> Any:
        return K.embedding_dequantize(ids, codes, scale, None, dtype, k, group)

    def expected(ids: Tensor) -> Any:
        return reference.dequantize(table.cpu()[ids], scale.cpu()[ids], None, dtype, 1, group)

    ids = random.integers(0, n - 1, m, dtype=torch.int64)
    return Case(op, ids, expected, embedding.work(m, k, dtype, HALF, group=group))


SMALL: dict[str, Callable[[torch.device], Case]] = {
    "w8a8, dp4a": lambda d: integer_linear(d, 3, 70, 200),
    "w8a8, tensor cores": lambda d: integer_linear(d, 40, 70, 200),
    "w8a8, K split": lambda d: integer_linear(d, 17, 64, 4096),
    "w8a8, convolution": lambda d: integer_convolution(d, 2, 40, 20, 9),
    "w4, vector": lambda d: weight_only_linear(d, 1, 136, 320),
    "w4, tensor cores": lambda d: weight_only_linear(d, 20, 136, 320),
    "w8 per channel": lambda d: weight_only_linear(d, 20, 136, 320, bits=8, group=320),
    "rows": lambda d: rows_to_integers(d, 5, 333),
    "tensor": lambda d: tensor_to_integers(d, 33, 1000),
    "norm": lambda d: norm_to_integers(d, 5, 320),
    "act": lambda d: act_to_integers(d, 5, 320),
    "embedding": lambda d: gathered_rows(d, 7, 50, 200),
    "cache of 8 bits": lambda d: cached_attention(d, 2, 4, 2, 64, 150),
    "cache of 4 bits": lambda d: cached_attention(d, 2, 4, 2, 64, 150, bits=4),
}
"""By name, ragged sizes that cover every kernel."""
