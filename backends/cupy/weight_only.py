"""y = x . dequantize(W)^T + bias for weights of 2 to 8 bits: weight_gemv.cu for few rows, weight_gemm.cu for more, chosen by `choose`.

torch.ops.qgraph_cuda.weight_only_linear is Q.dequant_linear with its weight packed by weight_packing.py. Sums are float32. The GEMV takes x as
it is; for the tensor cores a float32 x is rounded to half (the result stays float32), so |x| < 65,504.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.backends.cupy.launch import TYPES, Kernel, kernel
from qgraph.backends.cupy.ops import K, cuda_op
from qgraph.backends.cupy.quantizing import whole
from qgraph.backends.cupy.roofline import Work
from qgraph.backends.cupy.weight_packing import SQUARE, PackedWeight
from qgraph.errors import LoweringError

OUTPUTS = 128
"""Outputs of a block, in both kernels."""
BITS = (2, 3, 4, 8)
TENSOR_CORES = 80
"""The oldest architecture with mma.m16n8k16 and cp.async."""
SMS = {75: 40, 80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of the largest common device of an architecture."""
LARGEST_GRID = 65535


@dataclass(frozen=True)
class Gemv:
    """`rows` of x at a time."""

    rows: int
    least: int = 16
    """Squares of 64 inputs that a split has at least: its partial sums are then 2 % of its weights at 4 bits."""

    def kernel(self, dtype: torch.dtype, bits: int) -> Kernel:
        return kernel(
            "weight_gemv.cu", "weight_gemv", expects=("LDG.128", "PRMT"), BITS=bits, ROWS=self.rows, REAL=TYPES[dtype], SCALE=_scale(dtype)
        )


@dataclass(frozen=True)
class Gemm:
    """Tiles of `rows` of x; a ring of `stages`; `blocks` on a multiprocessor at least."""

    rows: int
    stages: int
    blocks: int
    least: int = 8

    def kernel(self, dtype: torch.dtype, bits: int) -> Kernel:
        """`dtype`: of y. A float32 model has x in half."""
        real = torch.float16 if dtype == torch.float32 else dtype
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
            REAL=TYPES[real],
            SCALE=_scale(dtype),
            OUT=TYPES[dtype],
        )


Config = Gemv | Gemm

CONFIGS: tuple[Config, ...] = (Gemv(1), Gemv(8), Gemm(8, 4, 4), Gemm(32, 4, 3), Gemm(128, 3, 2))


def _scale(dtype: torch.dtype) -> str:
    return "float" if dtype == torch.float32 else "__half"


def _reduce(dtype: torch.dtype) -> Kernel:
    return kernel("weight_reduce.cu", "weight_reduce", OUT=TYPES[dtype])


KERNELS = (*(c.kernel(t, b) for c in CONFIGS for t in TYPES for b in BITS), *(_reduce(t) for t in TYPES))


@dataclass(frozen=True)
class Plan:
    """A configuration and into how many parts K is split."""

    config: Config
    splits: int


def choose(m: int, n: int, k: int, dtype: torch.dtype, arch: int) -> Plan:
    """The kernel for x [m, k] of `dtype` and n outputs on sm_<arch>.

    One row takes the GEMV, whose work per weight grows with the rows; from two rows on the tensor cores do it for nothing. float32 keeps the
    GEMV to eight rows: it reads x unrounded. K is split while one wave of blocks (two to a multiprocessor) has room."""
    gemv, rows, small, medium, large = CONFIGS
    if m == 1:
        config = gemv
    elif arch < TENSOR_CORES or (dtype == torch.float32 and m <= rows.rows):
        config = rows
    else:
        config = small if m <= small.rows else medium if m <= 2 * medium.rows else large
    tiles = -(-m // config.rows) * -(-n // OUTPUTS)
    splits = min(2 * SMS.get(arch, SMS[90]) // tiles, -(-k // SQUARE) // config.least)
    return Plan(config, max(splits, 1))


def work(m: int, n: int, k: int, bits: int, group: int, dtype: torch.dtype, *, zeros: bool = False, bias: bool = False) -> Work:
    """The least that y [m, n] = x [m, k] . W^T needs: x and y once, codes, a scale of x's width (at most 16 bits, float32 for float32)
    and a byte of zero point for each group (0: one for each output)."""
    groups = -(-k // group) if group else 1
    scale = 4 if dtype == torch.float32 else 2
    parameters = n * groups * (scale + zeros) + 4 * n * (1 + bias)
    multiplications = 2 * m * n * k
    vector = dtype == torch.float32 or m == 1
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
    k, m = x.shape[-1], x.shape[:-1].numel()
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    plan = choose(m, n, k, x.dtype, _arch(x.device))
    config, squares = plan.config, -(-k // SQUARE)
    if isinstance(config, Gemm) and x.dtype == torch.float32:
        x = x.to(torch.float16)
    x = whole(x if k % 8 == 0 else F.pad(x, (0, -k % 8)))
    each = -(-squares // plan.splits)
    splits = -(-squares // each)
    partial = x.new_empty((splits, m, n), dtype=torch.float32) if splits > 1 else None
    tiles_m, tiles_n = -(-m // config.rows), -(-n // OUTPUTS)
    grid, block = ((tiles_n, splits, tiles_m), 256) if isinstance(config, Gemv) else ((tiles_m, tiles_n, splits), 128)
    if max(grid[1:]) > LARGEST_GRID:
        raise LoweringError(f"the weight-only kernels take at most {LARGEST_GRID} blocks along an axis, and {m} rows by {n} outputs make {grid}")
    found = config.kernel(y.dtype, codes.shape[2])
    found(grid, block, x, codes, ratio, zeros, row, bias, y, partial, m, n, x.shape[-1], group // 32, zero, each)
    if partial is not None:
        _reduce(y.dtype)((-(-m * n // 256),), 256, partial, row, bias, y, m, n, splits)
    return y


@weight_only_linear.register_fake
def _(
    x: Tensor, codes: Tensor, row: Tensor, ratio: Tensor, zeros: Tensor | None, bias: Tensor | None, zero: int, n: int, group: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """weight_only_linear with the weight as one value; `bias` by `pack_bias`."""
    w = weight
    return K.weight_only_linear(x, w.codes, w.row, w.ratio, w.zeros, bias, w.zero, w.n, w.group)


def _check(x: Tensor, codes: Tensor, ratio: Tensor) -> None:
    if x.dtype not in TYPES:
        raise LoweringError(f"the weight-only kernels read x in float32, float16 or bfloat16, not {str(x.dtype).removeprefix('torch.')}")
    if -(-x.shape[-1] // SQUARE) != codes.shape[1]:
        raise LoweringError(f"x has {x.shape[-1]} inputs, and the packed weight {SQUARE * codes.shape[1]} with their padding")
    if (x.dtype == torch.float32) != (ratio.dtype == torch.float32):
        raise LoweringError(f"the weight's scales are packed in {ratio.dtype} and x is {x.dtype}: pack_weight(real=x.dtype) fits them together")


def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
