"""y = x . dequantize(W)^T + bias for weights of 2 to 8 bits: weight_gemv.cu for few rows, weight_gemm.cu for more, chosen by `choose`.

torch.ops.qgraph_cuda.weight_only_linear is Q.dequant_linear with its weight packed by weight_packing.py. Sums are float32. The GEMV takes x
as it is; for the tensor cores a float32 x is rounded to half (the result stays float32), so |x| < 65,504.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.backends.cupy.autotune import bucket, preferred
from qgraph.backends.cupy.launch import TYPES, Kernel, kernel
from qgraph.backends.cupy.ops import K, cuda_op
from qgraph.backends.cupy.roofline import Work
from qgraph.backends.cupy.rows import whole
from qgraph.backends.cupy.weight_packing import SQUARE, UNIT, PackedWeight
from qgraph.errors import LoweringError

OUTPUTS = 128
"""Outputs of a block."""
BITS = (2, 3, 4, 8)
TENSOR_CORES = 80
"""The oldest architecture with mma.m16n8k16 and cp.async."""
SMS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of the largest common device of an architecture."""
LARGEST_GRID = 65535
HALVES = 4
"""Squares of a split are a multiple of it: 128 inputs for either half of the warps that share them."""


@dataclass(frozen=True)
class Gemv:
    """`rows` of x at a time; `blocks`, of `outputs` each, on a multiprocessor at least."""

    rows: int
    outputs: int = OUTPUTS
    blocks: int = 2

    @property
    def block(self) -> int:
        return 2 * self.outputs

    def least(self, bits: int) -> int:
        """Squares of 64 inputs that a split has at least: its partial sums are then 1.6 % of its codes at 4 bits, 2.5 % at 2."""
        return max(16, 40 // bits)

    def grid(self, m: int, n: int, splits: int) -> tuple[int, int, int]:
        return -(-n // self.outputs), splits, -(-m // self.rows)

    def reads(self, dtype: torch.dtype) -> torch.dtype:
        """The type of x in the kernel for x of `dtype`."""
        return dtype

    def kernel(self, dtype: torch.dtype, bits: int) -> Kernel:
        """`dtype`: of x and y."""
        return kernel(
            "weight_gemv.cu",
            "weight_gemv",
            expects=("LDG.128", "PRMT"),
            BITS=bits,
            ROWS=self.rows,
            OUTPUTS=self.outputs,
            REAL=TYPES[dtype],
            SCALE=_scale(dtype),
        )


@dataclass(frozen=True)
class Gemm:
    """Tiles of `rows` of x; a ring of `stages`; `blocks` on a multiprocessor at least."""

    rows: int
    stages: int
    blocks: int
    outputs: int = OUTPUTS

    @property
    def block(self) -> int:
        return 128

    def least(self, bits: int) -> int:
        """Squares of 64 inputs that a split has at least."""
        return 8

    def grid(self, m: int, n: int, splits: int) -> tuple[int, int, int]:
        return -(-m // self.rows), -(-n // self.outputs), splits

    def reads(self, dtype: torch.dtype) -> torch.dtype:
        """The type of x in the kernel for x of `dtype`."""
        return torch.float16 if dtype == torch.float32 else dtype

    def kernel(self, dtype: torch.dtype, bits: int) -> Kernel:
        """`dtype`: of y, and of x before `reads`."""
        scale = 4 if dtype == torch.float32 else 2
        stage = self.rows * 2 * SQUARE + OUTPUTS * SQUARE * bits // 8
        return kernel(
            "weight_gemm.cu",
            "weight_gemm",
            shared=self.stages * (stage + 2 * OUTPUTS * (scale + 1)),
            expects=("HMMA", "LDGSTS.128", "LDSM", "LDS.128"),
            BITS=bits,
            TILE_M=self.rows,
            STAGES=self.stages,
            BLOCKS=self.blocks,
            REAL=TYPES[self.reads(dtype)],
            SCALE=_scale(dtype),
            OUT=TYPES[dtype],
        )


Config = Gemv | Gemm

CONFIGS = (Gemv(1), Gemv(1, outputs=256, blocks=1), Gemv(8), Gemm(8, 4, 4), Gemm(32, 4, 3), Gemm(128, 3, 2))
ONE, WIDE, ROWS, SMALL, MEDIUM, LARGE = CONFIGS


def _scale(dtype: torch.dtype) -> str:
    return "float" if dtype == torch.float32 else "__half"


def _reduce(dtype: torch.dtype) -> Kernel:
    return kernel("weight_reduce.cu", "weight_reduce", expects=("LDG.64",), OUT=TYPES[dtype])


def _short(bits: int, dtype: torch.dtype) -> bool:
    """Whether codes are so short beside x that blocks of the GEMV should be wide: x, read for each, is 3 % of 4 bits if it is half."""
    return bits < 2 * dtype.itemsize


def _used(config: Config, dtype: torch.dtype, bits: int) -> bool:
    return _short(bits, dtype) if config == WIDE else config != ROWS or dtype == torch.float32


KERNELS = (*(c.kernel(t, b) for c in CONFIGS for t in TYPES for b in BITS if _used(c, t, b)), *(_reduce(t) for t in TYPES))


@dataclass(frozen=True)
class Plan:
    """A configuration and into how many parts K is split."""

    config: Config
    splits: int


def choose(m: int, n: int, k: int, bits: int, dtype: torch.dtype, arch: int) -> Plan:
    """The kernel for x [m, k] of `dtype` and n outputs on sm_<arch>: what autotuning found, or the first candidate."""
    found = candidates(m, n, k, bits, dtype, arch)
    return preferred("weight_only", (bucket(m), n, k, bits, str(dtype)), found) or found[0]


def candidates(m: int, n: int, k: int, bits: int, dtype: torch.dtype, arch: int) -> tuple[Plan, ...]:
    """What may be fastest, the likeliest first; each with K split and whole.

    One row takes the GEMV, whose work for a weight grows with the rows; from two rows on tensor cores do that for nothing. float32 keeps
    to the GEMV up to eight rows, for it reads x unrounded. K is split while one wave of blocks (two to a multiprocessor, or a wide one)
    has room."""
    one: tuple[Config, ...] = (WIDE, ONE) if n > OUTPUTS and _short(bits, dtype) else (ONE,)
    configs: tuple[Config, ...]
    if arch < TENSOR_CORES or (m == 1 and dtype == torch.float32):
        configs = one
    elif dtype == torch.float32 and m <= ROWS.rows:
        configs = (ROWS,)
    elif m == 1:
        configs = (*one, SMALL)
    else:
        configs = (SMALL, MEDIUM) if m <= SMALL.rows else (MEDIUM, LARGE) if m <= 2 * MEDIUM.rows else (LARGE, MEDIUM)
    return tuple(dict.fromkeys(p for c in configs for p in (Plan(c, _splits(c, m, n, k, bits, arch)), Plan(c, 1))))


def _splits(config: Config, m: int, n: int, k: int, bits: int, arch: int) -> int:
    tiles = -(-m // config.rows) * -(-n // config.outputs)
    return max(min(min(config.blocks, 2) * SMS.get(arch, SMS[90]) // tiles, -(-k // SQUARE) // config.least(bits)), 1)


def work(m: int, n: int, k: int, bits: int, group: int, dtype: torch.dtype, *, zeros: bool = False, bias: bool = False) -> Work:
    """The least that y [m, n] = x [m, k] . W^T needs: x and y once, codes, a scale of x's width (at most 16 bits, float32 for float32)
    and a byte of zero point for each group (0: one for each output)."""
    groups = -(-k // group) if group else 1
    scale = 4 if dtype == torch.float32 else 2
    parameters = n * groups * (scale + zeros) + 4 * n * (1 + bias)
    multiplications = 2 * m * n * k
    vector = m == 1 or (dtype == torch.float32 and m <= ROWS.rows)
    return Work(
        n * k * bits // 8 + parameters + (m * k + m * n) * dtype.itemsize,
        fp16_ops=0 if vector else multiplications,
        fp32_ops=multiplications if vector else 0,
    )


@cuda_op("Tensor x, Tensor codes, Tensor row, Tensor ratio, Tensor? zeros, Tensor? bias, int zero, int n, int group")
def weight_only_linear(
    x: Tensor, codes: Tensor, row: Tensor, ratio: Tensor, zeros: Tensor | None, bias: Tensor | None, zero: int, n: int, group: int
) -> Tensor:
    """x [..., K] -> y [..., n] of x's type; codes ... group: a PackedWeight's; bias by `pack_bias`.

    Raises LoweringError for another float type, another K, or a weight packed for another type of x."""
    _check(x, codes, ratio)
    weight = (codes, ratio, zeros, row, bias)
    if n % 2 == 0:
        return _product(x, weight, zero, n, group)
    return _product(x, weight, zero, n + 1, group)[..., :n].clone(memory_format=torch.contiguous_format)  # outputs are stored in pairs


@weight_only_linear.register_fake
def _(
    x: Tensor, codes: Tensor, row: Tensor, ratio: Tensor, zeros: Tensor | None, bias: Tensor | None, zero: int, n: int, group: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """weight_only_linear with the weight as one value; `bias` by `pack_bias`."""
    w = weight
    y: Tensor = K.weight_only_linear(x, w.codes, w.row, w.ratio, w.zeros, bias, w.zero, w.n, w.group)
    return y


def _product(x: Tensor, weight: tuple[Tensor | None, ...], zero: int, n: int, group: int) -> Tensor:
    """weight: codes, ratio, zeros, row, bias. n is even."""
    (codes, _, _, row, bias), k, m = weight, x.shape[-1], x.shape[:-1].numel()
    assert codes is not None
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    bits = codes.shape[2]
    plan = choose(m, n, k, bits, x.dtype, _arch(x.device))
    x = x.to(plan.config.reads(x.dtype))
    x = whole(F.pad(x, (0, -k % 8)) if k % 8 else x)
    squares = -(-k // SQUARE)
    each = max(-(-squares // plan.splits), 1)
    each += -each % HALVES  # no group of 128 has two readers
    splits = max(-(-squares // each), 1)
    partial = x.new_empty((splits, m, n), dtype=torch.float32) if splits > 1 else None
    grid = plan.config.grid(m, n, splits)
    if max(grid[1:]) > LARGEST_GRID:
        raise LoweringError(
            f"the weight-only kernels take at most {LARGEST_GRID} blocks along an axis, and {m} rows by {n} outputs make {grid}"
        )
    found = plan.config.kernel(y.dtype, bits)
    found(grid, plan.config.block, x, *weight, y, partial, m, n, x.shape[-1], group // UNIT, zero, each)
    if partial is not None:
        _reduce(y.dtype)((-(-m // 8), -(-n // 256)), 128, partial, row, bias, y, m, n, splits)
    return y


def _check(x: Tensor, codes: Tensor, ratio: Tensor) -> None:
    if x.dtype not in TYPES:
        raise LoweringError(f"the weight-only kernels read x in float32, float16 or bfloat16, not {str(x.dtype).removeprefix('torch.')}")
    if -(-x.shape[-1] // SQUARE) != codes.shape[1]:
        raise LoweringError(f"x has {x.shape[-1]} inputs, and the packed weight {SQUARE * codes.shape[1]} with their padding")
    if (x.dtype == torch.float32) != (ratio.dtype == torch.float32):
        raise LoweringError(
            f"the weight's scales are packed in {ratio.dtype} and x is {x.dtype}: pack_weight(real=x.dtype) fits them together"
        )


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
