"""Integer convolution: x [B, C, *spatial] int8 or uint8, weight [N, C, *kernel] int8 -> [B, N, *spatial'], one or two spatial axes, one
group, bit for bit qgraph.reference.quantized_conv.

torch.ops.qgraph_cuda.w8a8_conv   runs w8a8_gemm.cu (CONV) on the image with channels last: no matrix of windows is made.

The image is copied where it is padded (with x's zero point), where its channels are not a multiple of 16, or do not come last in memory.
The result has its channels last, so that convolutions that follow each other are not turned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.backends.cupy.launch import Kernel
from qgraph.backends.cupy.ops import cuda_op
from qgraph.backends.cupy.roofline import Work
from qgraph.backends.cupy.w8a8 import (
    MEDIUM,
    OUT,
    REAL,
    VECTOR,
    Packed,
    centre,
    device_of,
    finish,
    gemm,
    launch_gemm,
    pack,
    padded,
    result_type,
    split,
)
from qgraph.errors import LoweringError

TILE = MEDIUM
KERNELS: tuple[Kernel, ...] = tuple(gemm(TILE, out, unsigned=u, conv=True) for out in dict.fromkeys(OUT.values()) for u in (False, True))


def pack_conv(weight: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Packed:
    """Integers [N, C, *kernel] as rows [N, taps * C']: the channels of a tap side by side, padded to a multiple of 16.

    Raises LoweringError where weight - zero_point does not fit int8: the sums of the windows that it would need are not computed."""
    n, c = weight.shape[:2]
    centred, zeros = centre(weight, zero_point)
    if bool(zeros.any()):
        raise LoweringError("the integer convolution takes no weights that leave int8 when their zero points are subtracted")
    taps = centred.to(torch.int8).reshape(n, c, -1).transpose(1, 2)
    return pack(F.pad(taps, (0, padded(c) - c)).reshape(n, -1), scale)


def unpack_conv(packed: Packed, shape: Sequence[int]) -> Tensor:
    """weight - zero_point as `pack_conv` was given them, of that shape."""
    n, c = shape[:2]
    return packed.weight.reshape(n, -1, padded(c))[..., :c].transpose(1, 2).reshape(list(shape))


def work(x: Sequence[int], weight: Sequence[int], y: Sequence[int], out: torch.dtype = torch.int8) -> Work:
    """The least that a convolution of these shapes needs: x, weight, result, scales and sums once."""
    size = {name: torch.Size(shape).numel() for name, shape in (("x", x), ("weight", weight), ("y", y))}
    macs = size["y"] * size["weight"] // weight[0]
    return Work(bytes=size["x"] + size["weight"] + size["y"] * out.itemsize + 8 * weight[0], int8_ops=2 * macs)


@cuda_op(
    "Tensor x, Tensor x_scale, Tensor? x_zero_point, Tensor weight, Tensor w_scale, Tensor w_sum, Tensor? bias, ScalarType dtype, "
    "int[] kernel, int[] stride, int[] padding, int[] dilation, "
    "Tensor? y_scale=None, Tensor? y_zero_point=None, str? y_dtype=None, bool relu=False"
)
def w8a8_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    y_dtype: str | None = None,
    relu: bool = False,
) -> Tensor:
    """quantized_conv(x, ...), then relu if asked, then quantize if there is a y_dtype. `kernel`: the spatial sizes of the weight; padding
    (begin..., end...). weight, w_scale, w_sum: of `pack_conv`; the rest as in w8a8_linear, with one scale for x.
    Raises LoweringError for what no kernel does, and on devices before sm_80."""
    arch, sms = device_of(x.device)
    if arch < 80:
        raise LoweringError(f"the integer convolution needs tensor cores of sm_80 or newer, not sm_{arch}")
    c, taps = padded(x.shape[1]), torch.Size(kernel).numel()
    if x.dtype not in (torch.int8, torch.uint8) or weight.shape[1] != taps * c or dtype not in REAL or not 1 <= len(kernel) <= 2:
        raise LoweringError(
            f"no kernel convolves x {list(x.shape)} {x.dtype} with a packed weight {list(weight.shape)} of {list(kernel)} taps to {dtype}"
        )
    results = _sizes(x.shape[2:], kernel, stride, padding, dilation)
    y = x.new_empty((x.shape[0], *results, weight.shape[0]), dtype=result_type(dtype, y_dtype))
    if y.numel():
        image = _image(x, x_zero_point, padding)
        if image.numel() // VECTOR >= 2**31:
            raise LoweringError(f"the integer convolution takes images of at most 32 GiB, not {list(image.shape)}")
        m = y.numel() // weight.shape[0]
        end = finish(1, x, x_scale, x_zero_point, w_scale, w_sum, None, bias, dtype, y_scale, y_zero_point, y_dtype, relu)
        splits = split(TILE, m, weight.shape[0], taps * c, sms).splits
        launch_gemm(TILE, splits, y, image, weight, m, end, _window(image, results, kernel, stride, dilation))
    return y.movedim(-1, 1)


@w8a8_conv.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    y_dtype: str | None = None,
    relu: bool = False,
) -> Tensor:
    results = _sizes(x.shape[2:], kernel, stride, padding, dilation)
    return x.new_empty((x.shape[0], *results, weight.shape[0]), dtype=result_type(dtype, y_dtype)).movedim(-1, 1)


def _sizes(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    n = len(kernel)
    return [(sizes[i] + padding[i] + padding[n + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(n)]


def _image(x: Tensor, zero_point: Tensor | None, padding: Sequence[int]) -> Tensor:
    """[B, *spatial, C'], padded with real 0; x itself where it lies in memory so."""
    n, c = x.dim() - 2, x.shape[1]
    rows = x.movedim(1, -1)
    if not any(padding) and c == padded(c):
        rows = rows.contiguous()
        return rows if rows.data_ptr() % VECTOR == 0 else rows.clone()
    spatial = [s + padding[i] + padding[n + i] for i, s in enumerate(x.shape[2:])]
    image = x.new_empty((x.shape[0], *spatial, padded(c)))
    image.copy_(x.new_zeros(()) if zero_point is None else zero_point.reshape(()))
    inner = image[..., :c]
    for i, s in enumerate(x.shape[2:]):
        inner = inner.narrow(1 + i, padding[i], s)
    inner.copy_(rows)
    return image


def _window(
    image: Tensor, results: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """X_WINDOW of w8a8_gemm.cu. One spatial axis is a row of an image."""
    *_, width, channels = image.shape
    pixels = image.shape[1:-1].numel()
    down, tap_down = (stride[0] * width, dilation[0] * width) if len(kernel) == 2 else (0, 0)
    return (channels, torch.Size(results).numel(), pixels, results[-1], down, stride[-1], kernel[-1], tap_down, dilation[-1])
