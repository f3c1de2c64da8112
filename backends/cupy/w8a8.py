"""Integer linear: x [..., K] int8 or uint8, weight [N, K] int8 -> [..., N], bit for bit qgraph.reference.quantized_linear.

torch.ops.qgraph_cuda.w8a8_linear   runs w8a8_gemm.cu (tensor cores) or w8a8_dp4a.cu (M <= 8, and devices older than sm_80).

`pack` stores the weight for them, once: rows padded with zeros to whole 16 bytes, sums of its centred rows, parameters of the columns
padded to whole vectors. Rows of x that are no whole vectors are copied into padded ones at each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.backends.cupy.autotune import bucket, preferred
from qgraph.backends.cupy.launch import Argument, Kernel, kernel
from qgraph.backends.cupy.ops import cuda_op
from qgraph.backends.cupy.roofline import Work
from qgraph.errors import LoweringError
from qgraph.types import int_range, storage

VECTOR = 16
"""Bytes of an access: rows of x and of the weight are multiples of it."""
COLUMNS = 4
"""Columns that a lane finishes: scales, sums, zero points and biases are padded to a multiple of it."""
LEAST_SPLIT = 1024
"""K of a split at least: below it, writing and reading partial sums costs more than what is split."""

REAL = (torch.float32, torch.float16, torch.bfloat16)
"""In the order of `Type` in w8a8.cuh."""
OUT = {torch.float32: "float", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.int8: "uint8_t", torch.uint8: "uint8_t"}


# Weights


@dataclass(frozen=True)
class Packed:
    """weight int8 [N, K'], K' a multiple of 16; scale float32 [N'], sums int32 [N'] (of the rows less their zero points), zero_point int32
    [N'] or None, N' a multiple of 4."""

    weight: Tensor
    scale: Tensor
    sums: Tensor
    zero_point: Tensor | None


def pack(weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Packed:
    """Integers [N, K] of at most 8 bits, one scale or N, one zero point or N or none.

    Zero points are subtracted now where what remains fits int8; else, values above 127 and their zero points move down by 128."""
    n, k = weight.shape
    centred, zeros = centre(weight, zero_point)
    return Packed(
        F.pad((centred + zeros).to(torch.int8), (0, padded(k) - k)),
        _columns(scale.to(torch.float32).reshape(-1).expand(n)),
        _columns(centred.sum(1).to(torch.int32)),
        _columns(zeros.reshape(-1)) if bool(zeros.any()) else None,
    )


def centre(weight: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """weight - zero_point, int32 [N, ...], and zeros [N, 1...] that bring it into int8 when they are added: 0 where it is there already.

    Raises LoweringError for weights of more than 8 bits."""
    if weight.dtype not in (torch.int8, torch.uint8):
        raise LoweringError(f"the integer kernels take weights of at most 8 bits, not {str(weight.dtype).removeprefix('torch.')}")
    wide = weight.to(torch.int32)
    rows = (weight.shape[0], *[1] * (weight.dim() - 1))
    none = wide.new_zeros(rows)
    zeros = none if zero_point is None else zero_point.to(torch.int32).reshape(-1).expand(rows[0]).reshape(rows)
    centred = wide - zeros
    if centred.numel() == 0 or (int(centred.min()) >= -128 and int(centred.max()) <= 127):
        return centred, none
    return centred, zeros - (128 if int(wide.max()) > 127 else 0)


def unpack(packed: Packed, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight [N, K], scale [N] and zero point [N] or None, of the same weight - zero_point as `pack` was given."""
    n = packed.weight.shape[0]
    return packed.weight[:, :k], packed.scale[:n], None if packed.zero_point is None else packed.zero_point[:n]


def pack_bias(bias: Tensor) -> Tensor:
    """[N] -> [N'] float32 or, in units of x_scale * w_scale, int32."""
    return _columns(bias.to(torch.float32 if bias.is_floating_point() else torch.int32))


def padded(k: int) -> int:
    """Bytes of a row of k integers: whole vectors, one at least."""
    return max(1, -(-k // VECTOR)) * VECTOR


def _columns(values: Tensor) -> Tensor:
    return F.pad(values, (0, -values.shape[0] % COLUMNS)).contiguous()


# Kernels and their configurations


@dataclass(frozen=True)
class Tile:
    """A block of w8a8_gemm: m x n results by warps_m x warps_n warps, k bytes of each row in a stage."""

    m: int
    n: int
    k: int
    warps_m: int
    warps_n: int
    stages: int

    @property
    def block(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared(self) -> int:
        return self.stages * (self.m + self.n) * self.k

    def blocks(self, m: int, n: int) -> int:
        return _ceil(m, self.m) * _ceil(n, self.n)


@dataclass(frozen=True)
class Config:
    """tile: w8a8_gemm, K in `splits`; None: w8a8_dp4a with `rows` rows of x at once, whose blocks have `outputs` columns at a time and keep
    x for `rounds` of them."""

    tile: Tile | None = None
    splits: int = 1
    rows: int = 0
    outputs: int = 32
    rounds: int = 1


LARGE = Tile(128, 128, 64, warps_m=2, warps_n=2, stages=3)
MEDIUM = Tile(64, 128, 64, warps_m=2, warps_n=2, stages=4)
SMALL = Tile(16, 128, 128, warps_m=1, warps_n=4, stages=3)
TILES = (LARGE, MEDIUM, SMALL)
ROWS = (1, 2, 4, 8)
NARROW, WIDE = 32, 64
"""Columns of a block of w8a8_dp4a at a time: 8 threads for each."""
ROUNDS = 3
"""Of a wide block at most, as w8a8_dp4a.cu has room for their sums."""
ROW_SUMS_BLOCK = 256
RESIDENT = 2
"""Blocks of w8a8_gemm on a multiprocessor at least."""


def gemm(tile: Tile, out: str, *, unsigned: bool, conv: bool = False) -> Kernel:
    """`out`: a value of OUT."""
    sizes: dict[str, int] = {
        "TILE_M": tile.m,
        "TILE_N": tile.n,
        "TILE_K": tile.k,
        "WARPS_M": tile.warps_m,
        "WARPS_N": tile.warps_n,
        "STAGES": tile.stages,
    }
    expects = ("IMMA.16832", "LDSM.4", "LDGSTS.128")
    return kernel(
        "w8a8_gemm.cu", "w8a8_gemm", shared=tile.shared, expects=expects, BLOCKS=RESIDENT, OUT=out, UNSIGNED_X=unsigned, CONV=conv, **sizes
    )


def dp4a(rows: int) -> Kernel:
    return kernel("w8a8_dp4a.cu", "w8a8_dp4a", expects=("IDP.4A", "LDG.128", "LDS.128"), ROWS=rows)


ROW_SUMS = kernel("w8a8_dp4a.cu", "w8a8_row_sums", expects=("IDP.4A", "LDG.128"), ROWS=1)
KERNELS = (
    *(gemm(t, out, unsigned=u) for t in TILES for out in dict.fromkeys(OUT.values()) for u in (False, True)),
    *(dp4a(r) for r in ROWS),
    ROW_SUMS,
)


def choose(m: int, n: int, k: int, *, arch: int = 80, sms: int = 108) -> Config:
    """What was tuned for the shape (autotune.py), else: dp4a below 9 rows and before sm_80; the smallest tile that holds all rows; the
    medium one also where large ones would leave multiprocessors idle. K is split until there are blocks for all of them."""
    if m <= ROWS[-1] or arch < 80:
        found = vectors(m, n, sms=sms)
        return preferred("w8a8", (bucket(m), n, k), found) or found[0]
    if (tuned := preferred("w8a8", (bucket(m), n, k), candidates(m, n, k, sms=sms))) is not None:
        return tuned
    small = SMALL if m <= SMALL.m else MEDIUM
    return split(LARGE if m > MEDIUM.m and LARGE.blocks(m, n) >= sms else small, m, n, k, sms)


def vectors(m: int, n: int, *, sms: int = 108) -> tuple[Config, ...]:
    """Configurations of w8a8_dp4a, the likelier first.

    Narrow blocks read x again for each 32 columns: for one row that is 3 % of the weight. Wide ones, for several rows, take the registers
    of a multiprocessor and go on with the same x. They come first where half of the multiprocessors get one, enough to keep memory busy."""
    rows, blocks = next(r for r in ROWS if m <= r or r == ROWS[-1]), _ceil(n, WIDE)
    narrow, wide = Config(rows=rows, outputs=NARROW), Config(rows=rows, outputs=WIDE, rounds=min(_ceil(blocks, sms), ROUNDS))
    if rows == 1:
        return (narrow,)
    return (wide, narrow) if 2 * blocks >= sms else (narrow, wide)


def candidates(m: int, n: int, k: int, *, sms: int = 108) -> tuple[Config, ...]:
    """What may be fastest for a shape on tensor cores: each tile, with K whole and split."""
    return tuple(dict.fromkeys(c for t in TILES for c in (Config(t), split(t, m, n, k, sms))))


def split(tile: Tile, m: int, n: int, k: int, sms: int) -> Config:
    """The tile, and K in as many parts as give each multiprocessor RESIDENT blocks; parts of LEAST_SPLIT at least, none of them empty."""
    most = min(RESIDENT * sms // tile.blocks(m, n), k // LEAST_SPLIT)
    steps = _ceil(padded(k), tile.k)
    return Config(tile, _ceil(steps, _ceil(steps, max(1, most))))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def work(m: int, n: int, k: int, out: torch.dtype = torch.float16) -> Work:
    """The least that [m, k] x [n, k] needs: x, weight, result, scales and sums once."""
    return Work(bytes=m * k + n * k + m * n * out.itemsize + 8 * n, int8_ops=2 * m * n * k)


# The op


@cuda_op(
    "Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor weight, Tensor w_scale, Tensor w_sum, Tensor? w_zero_point, Tensor? bias, "
    "ScalarType dtype, Tensor? y_scale=None, Tensor? y_zero_point=None, str? y_dtype=None, bool relu=False, Tensor? x_sum=None"
)
def w8a8_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    y_dtype: str | None = None,
    relu: bool = False,
    x_sum: Tensor | None = None,
) -> Tensor:
    """quantized_linear(x, ...), then relu if asked, then quantize if there is a y_dtype.

    weight, w_scale, w_sum, w_zero_point: of `pack`; bias: of `pack_bias`; dtype: the float type of the result where y_dtype does not make
    it integers (the scale's, before it was packed). x_scale (float32, float16 or bfloat16) and x_zero_point: one, or one for each row.
    x_sum: the row sums of x, int32, which weights with zero points need; computed here where they are not given.
    Raises LoweringError for what no kernel does."""
    k = x.shape[-1]
    if x.dtype not in (torch.int8, torch.uint8) or weight.shape[1] != padded(k) or dtype not in REAL:
        raise LoweringError(f"no kernel multiplies x {list(x.shape)} {x.dtype} with a packed weight {list(weight.shape)} to {dtype}")
    rows = _rows(x, k)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=result_type(dtype, y_dtype))
    if y.numel() == 0:
        return y
    if w_zero_point is not None and x_sum is None:
        x_sum = _row_sums(rows)
    m, n = rows.shape[0], weight.shape[0]
    arch, sms = device_of(x.device)
    end = finish(m, x, x_scale, x_zero_point, w_scale, w_sum, w_zero_point, bias, dtype, y_scale, y_zero_point, y_dtype, relu, x_sum)
    launch(choose(m, n, k, arch=arch, sms=sms), y, rows, weight, end)
    return y


@w8a8_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    y_dtype: str | None = None,
    relu: bool = False,
    x_sum: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=result_type(dtype, y_dtype))


def launch(config: Config, y: Tensor, x: Tensor, weight: Tensor, finish: tuple[Argument, ...]) -> None:
    """y [..., N] from rows x [M, K'] and weight [N, K'] by one configuration; `finish`: W8A8_FINISH of w8a8.cuh."""
    m, k = x.shape
    if config.tile is not None:
        launch_gemm(config.tile, config.splits, y, x, weight, m, finish)
        return
    n = weight.shape[0]
    grid = (_ceil(n, config.outputs * config.rounds), _ceil(m, config.rows))
    dp4a(config.rows)(grid, 8 * config.outputs, y, x, weight, m, n, k, config.rounds, *finish)


def launch_gemm(
    tile: Tile, splits: int, y: Tensor, x: Tensor, weight: Tensor, m: int, finish: tuple[Argument, ...], window: tuple[int, ...] = ()
) -> None:
    """w8a8_gemm with m rows. `window`: X_WINDOW of w8a8_gemm.cu where x is an image."""
    n, k = weight.shape
    blocks = tile.blocks(m, n)
    partial = arrived = None
    if splits > 1:
        partial = torch.empty(splits * blocks * tile.m * tile.n, dtype=torch.int32, device=x.device)
        arrived = torch.zeros(blocks, dtype=torch.int32, device=x.device)
    run = gemm(tile, OUT[y.dtype], unsigned=x.dtype == torch.uint8, conv=bool(window))
    grid = (_ceil(m, tile.m), _ceil(n, tile.n), splits)
    run(grid, tile.block, y, x, weight, m, n, k, _ceil(_ceil(k, tile.k), splits), partial, arrived, *window, *finish)


def result_type(dtype: torch.dtype, y_dtype: str | None) -> torch.dtype:
    if y_dtype is None:
        return dtype
    if storage(y_dtype) not in OUT:
        raise LoweringError(f"the integer linear requantizes to at most 8 bits, not to {y_dtype}")
    return storage(y_dtype)


def _rows(x: Tensor, k: int) -> Tensor:
    """[M, K'] contiguous from a multiple of 16 bytes on: x itself, or a copy padded with zeros."""
    rows = x.reshape(x.shape[:-1].numel(), k)
    rows = F.pad(rows, (0, padded(k) - k)) if k != padded(k) else rows.contiguous()
    return rows if rows.data_ptr() % VECTOR == 0 else rows.clone()


def _row_sums(rows: Tensor) -> Tensor:
    m, k = rows.shape
    sums = torch.empty(m, dtype=torch.int32, device=rows.device)
    ROW_SUMS((_ceil(m, ROW_SUMS_BLOCK // 32),), ROW_SUMS_BLOCK, sums, rows, m, k, int(rows.dtype == torch.uint8))
    return sums


def finish(
    m: int,
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    w_scale: Tensor,
    w_sum: Tensor,
    w_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    y_scale: Tensor | None,
    y_zero_point: Tensor | None,
    y_dtype: str | None,
    relu: bool,
    x_sum: Tensor | None = None,
) -> tuple[Argument, ...]:
    """W8A8_FINISH of w8a8.cuh, for m rows; the other arguments are the op's. Raises LoweringError for scales that do not fit."""
    scales, zeros = x_scale.numel(), 1 if x_zero_point is None else x_zero_point.numel()
    if not {scales, zeros} <= {1, m}:
        raise LoweringError(f"x has one scale and zero point or one for each of {m} rows, not {scales} scales and {zeros} zero points")
    if x_scale.dtype not in REAL:
        raise LoweringError(f"no kernel reads scales of {x_scale.dtype}")
    low, high = int_range(y_dtype) if y_dtype is not None else (0, 0)
    bits = (
        scales > 1,
        zeros > 1,
        x.dtype == torch.uint8,
        bias is not None and not bias.is_floating_point(),
        relu,
        y_dtype is not None and low == 0,
    )
    how = REAL.index(x_scale.dtype) + sum(1 << 2 + i for i, b in enumerate(bits) if b) + (REAL.index(dtype) << 8)
    x_zero = None if x_zero_point is None else x_zero_point.to(x.dtype).contiguous()
    y_zero = None if y_zero_point is None or y_dtype is None else y_zero_point.to(storage(y_dtype))
    scale = None if y_scale is None or y_dtype is None else y_scale.to(torch.float32)
    sums = None if x_sum is None else x_sum.contiguous()
    return x_scale.contiguous(), x_zero, w_scale, w_sum, w_zero_point, sums, bias, scale, y_zero, how, low, high


def device_of(device: torch.device) -> tuple[int, int]:
    """Architecture and multiprocessors; for the emulator, those of an sm_80."""
    return _properties(device.index or 0) if device.type == "cuda" else (80, 108)


@cache
def _properties(index: int) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(index)
    return 10 * found.major + found.minor, found.multi_processor_count
