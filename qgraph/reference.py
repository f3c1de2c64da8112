"""What the qg ops mean, bit for bit: quantize(x) = saturate(round(x / scale) + zero_point), and the rest follows.

These bodies are the specification that every backend is tested against. Rules that hold for all of them:

1. Integers live one per element in `types.storage(dtype)`: "int4" in an int8 tensor holding -8..7. `zero_point` has that type and
   the scale's shape; None means 0.
2. Arithmetic is IEEE float32 whatever the float type of x and scale (float16, bfloat16, float32, float64), with one rounding to
   the result's type at the end. Rounding to integers is half to even. Integer sums are exact, then taken modulo 2**32 as int32
   hardware does (below K = 65,793 products of eight bits cannot overflow).
3. Saturation: +inf gives the largest, -inf and NaN give the smallest integer of the type, as ONNX Runtime's QuantizeLinear does
   on CPU for float32 per tensor and per axis. (Its kernels for float16, for blocks and for 2 bits convert to int32 before they
   clamp, and give anything for quotients beyond int32; 1.31.1.)
4. Granularity is (axis, group): (None, 0) per tensor, scale of one element; (a, 0) per axis, scale [n]; (a, g) per group of g
   neighbours along a, scale of x's rank with ceil(n / g) entries along a, the last group may be short; (-1, -1) per token,
   scale [..., 1]. Axes may be negative. Empty tensors and scalars are fine.
5. A scale of the wrong shape raises ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qgraph.parts import in_parts
from qgraph.qparams import minmax, scale_shape, zero_point_of
from qgraph.types import int_range, storage


def spread(scale: Tensor, x: Tensor, axis: int | None, group: int) -> Tensor:
    """`scale` (or a zero point) reshaped so that it broadcasts against x. Raises ValueError when its shape does not fit rule 4."""
    expected = scale_shape(x.shape, axis, group)
    if axis is None:
        if scale.numel() != 1:
            raise ValueError(f"a per-tensor scale has one element, got shape {list(scale.shape)}; give axis for more")
        return scale.reshape(())
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"a scale of shape {list(scale.shape)} does not fit {list(x.shape)} at axis={axis}, group={group}: expected {list(expected)}"
        )
    a = axis % x.dim()
    if group > 0:
        blocks = scale.unsqueeze(a + 1).expand(*scale.shape[: a + 1], group, *scale.shape[a + 1 :])
        return blocks.flatten(a, a + 1).narrow(a, 0, x.shape[a])
    return scale if group == -1 else scale.reshape([-1 if d == a else 1 for d in range(x.dim())])


def _spread_pair(scale: Tensor, zero_point: Tensor | None, x: Tensor, axis: int | None, group: int) -> tuple[Tensor, Tensor | None]:
    return spread(scale, x, axis, group), None if zero_point is None else spread(zero_point, x, axis, group)


def _saturate(q: Tensor, dtype: str) -> Tensor:
    """Clamps whole numbers in float32 to the type's range, in place; NaN becomes the smallest integer."""
    low, high = int_range(dtype)
    return q.nan_to_num_(nan=low).clamp_(low, high)


def _grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str) -> Tensor:
    """saturate(round(x / scale) + zero_point) as float32 whole numbers; scale and zero_point broadcast already."""
    q = (x.to(torch.float32) / scale.to(torch.float32)).round_()
    # Integers know no -0.0: adding 0 makes it 0.0, for fake_quantize.
    return _saturate(q.add_(0.0 if zero_point is None else zero_point.to(torch.float32)), dtype)


def _centred(q: Tensor, zero_point: Tensor | None) -> Tensor:
    """q - zero_point in float32: exact, for both have at most 16 bits."""
    wide = q.to(torch.float32)
    return wide if zero_point is None else wide - zero_point.to(torch.float32)


@in_parts
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, axis: int | None = None, group: int = 0) -> Tensor:
    """saturate(round_half_even(x / scale) + zero_point): float x of any shape -> integers of x's shape in storage(dtype)."""
    s, z = _spread_pair(scale, zero_point, x, axis, group)
    return _grid(x, s, z, dtype).to(storage(dtype))


@in_parts
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, axis: int | None = None, group: int = 0) -> Tensor:
    """(q - zero_point) * scale in float32, rounded once to scale's float type. `dtype` says which integers q holds; the
    result does not depend on it."""
    s, z = _spread_pair(scale, zero_point, q, axis, group)
    return (_centred(q, z) * s.to(torch.float32)).to(scale.dtype)


@in_parts
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, axis: int | None = None, group: int = 0) -> Tensor:
    """dequantize(quantize(x)) with the float32 product rounded once to x's float type (so equal to the two ops when x and
    scale have the same type). Its gradient for x is straight through inside the range, 0 where x saturates; scale gets none."""
    s, z = _spread_pair(scale, zero_point, x, axis, group)
    return (_centred(_grid(x, s, z, dtype), z) * s.to(torch.float32)).to(x.dtype)


def midpoints(table: Tensor) -> Tensor:
    """[..., L] ascending levels -> [..., L - 1]: where the next level becomes the nearer one."""
    wide = table.to(torch.float32)
    return ((wide[..., 1:] + wide[..., :-1]) / 2).contiguous()


def _by_table(x: Tensor, table: Tensor, axis: int | None) -> Tensor:
    """x as [n, m], row i looked up in row i of the table. Raises ValueError when the table has other rows."""
    if axis is None or table.shape != (x.shape[axis], table.shape[-1]):
        raise ValueError(f"a table of shape {list(table.shape)} does not fit {list(x.shape)} at table_axis={axis}")
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _from_table(rows: Tensor, x: Tensor, axis: int) -> Tensor:
    return rows.reshape(x.movedim(axis, 0).shape).movedim(0, axis).contiguous()


def encode(
    x: Tensor, table: Tensor, scale: Tensor | None, table_axis: int | None = None, axis: int | None = None, group: int = 0
) -> Tensor:
    """The codes, uint8, of the levels nearest to x / scale in float32; the lower one of two as near.

    `table` [L], L <= 256, ascending, for all of x, or [n, L] with a row per index of `table_axis`; scale None: 1."""
    wide = x.to(torch.float32)
    if scale is not None:
        wide = wide / spread(scale, x, axis, group).to(torch.float32)
    if table.dim() == 1:
        return torch.searchsorted(midpoints(table), wide.contiguous(), out_int32=True).to(torch.uint8)
    found = torch.searchsorted(midpoints(table), _by_table(wide, table, table_axis).contiguous(), out_int32=True)
    return _from_table(found.to(torch.uint8), x, table_axis or 0)


def lookup(
    q: Tensor, table: Tensor, scale: Tensor | None, table_axis: int | None = None, axis: int | None = None, group: int = 0
) -> Tensor:
    """table[q] * scale in float32, rounded once to table's float type; see `encode` for the operands."""
    wide = table.to(torch.float32)
    if table.dim() == 1:
        value = wide[q.to(torch.int32)]
    else:
        value = _from_table(wide.gather(1, _by_table(q, table, table_axis).to(torch.int64)), q, table_axis or 0)
    if scale is not None:
        value = value * spread(scale, q, axis, group).to(torch.float32)
    return value.to(table.dtype)


def fake_lookup(
    x: Tensor, table: Tensor, scale: Tensor | None, table_axis: int | None = None, axis: int | None = None, group: int = 0
) -> Tensor:
    """lookup(encode(x)), the nearest level; its gradient for x is straight through, the others have none."""
    return lookup(encode(x, table, scale, table_axis, axis, group), table, scale, table_axis, axis, group)


def inside(x: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: str, axis: int | None, group: int) -> Tensor:
    """True where quantize(x) does not saturate: low <= round(x / scale) + zero_point <= high. False for NaN."""
    s, z = _spread_pair(scale, zero_point, x, axis, group)
    q = (x.to(torch.float32) / s.to(torch.float32)).round()
    q = q if z is None else q + z.to(torch.float32)
    low, high = int_range(dtype)
    return (q >= low) & (q <= high)


def dynamic_quantize(x: Tensor, dtype: str, symmetric: bool, axis: int | None = None, group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x -> (q, scale, zero_point) with the range taken from x: q = quantize(x, scale, zero_point).

    With low = min(x, 0), high = max(x, 0), both over what shares a scale:
    asymmetric: scale = (high - low) / (qmax - qmin), zero_point = round(clamp(qmin - low / scale));
    symmetric: scale = max(-low, high) / (2**(bits-1) - 1), zero_point = the middle of the type.
    A zero range (or an empty x) has scale 1. scale is rounded to x's float type before anything is divided by it.
    There is no floor: the scale of a range below about 1e-43 underflows to 0 and that of an overflowing range is inf, as in
    ONNX's DynamicQuantizeLinear, to which ("uint8", asymmetric, per tensor, float32) is equal bit for bit.
    NaN elements do not count for the range and become the smallest integer.
    """
    low, high = minmax(x, axis, group)
    if bool(low.isnan().any()):
        low, high = minmax(x.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf), axis, group)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    qmin, qmax = int_range(dtype)
    scale = torch.maximum(-low, high) / ((qmax - qmin) // 2) if symmetric else (high - low) / (qmax - qmin)
    scale = torch.where(low == high, 1.0, scale).to(x.dtype)
    zero_point = zero_point_of(low, scale, dtype, symmetric=symmetric)
    return quantize(x, scale, zero_point, dtype, axis, group), scale, zero_point


def _exact(fn: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """fn (sums of products of whole numbers, weight's rows contracted with x) as int32, exact modulo 2**32.

    No partial sum exceeds max|x| * max over rows of sum|w|. Below 2**24 each is exact in float32, in any order; else float64
    serves (2**53). Operands up to 256 stay whole in any reduced type that a fast float32 matmul may use (bfloat16, TF32). Other
    devices may choose algorithms with transforms (Winograd), whose small errors round() removes in float64.
    """
    if x.numel() == 0 or weight.numel() == 0:
        return fn(x, weight).to(torch.int32)
    top_x, magnitude = float(x.abs().amax()), weight.abs()
    bound = top_x * float(magnitude.flatten(1).double().sum(1).amax())
    if bound < 2**24 and max(top_x, float(magnitude.amax())) <= 256 and x.device.type == "cpu":
        return fn(x, weight).to(torch.int32)
    return fn(x.double(), weight.double()).round_().to(torch.int64).to(torch.int32)


def _finish(
    acc: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y_scale: Tensor | None,
    y_zero_point: Tensor | None,
    y_dtype: str | None,
) -> Tensor:
    """int32 accumulator -> the result of a quantized linear or conv; scales and bias broadcast against it already.

    s = x_scale * w_scale. Case 1, float result: acc * s (+ bias). Case 2, requantized without a float bias: one multiplication by
    s / y_scale, as integer kernels do. Case 3, requantized with a float bias: quantize(acc * s + bias).
    """
    s = x_scale.to(torch.float32) * w_scale.to(torch.float32)
    if bias is not None and not bias.is_floating_point():
        acc, bias = acc + bias.to(torch.int32), None
    if y_dtype is None:
        y = acc.to(torch.float32) * s
        return (y if bias is None else y + bias.to(torch.float32)).to(w_scale.dtype)
    if y_scale is None:
        raise ValueError("y_dtype asks for integers but there is no y_scale")
    y_scale = y_scale.to(torch.float32).reshape(())
    zero = None if y_zero_point is None else y_zero_point.reshape(())
    if bias is not None:
        return _grid(acc.to(torch.float32) * s + bias.to(torch.float32), y_scale, zero, y_dtype).to(storage(y_dtype))
    q = (acc.to(torch.float32) * (s / y_scale)).round_()
    return _saturate(q if zero is None else q.add_(zero.to(torch.float32)), y_dtype).to(storage(y_dtype))


def weight_axis(scale: Tensor, group: int) -> int | None:
    """Axis of a weight [N, K] or [N, C, *kernel] along which its scale runs: groups lie along K; else one element is per
    tensor, and more run along N."""
    return 1 if group else 0 if scale.numel() != 1 else None


def dequant_linear(
    x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, dtype: str, group: int = 0
) -> Tensor:
    """x . dequantize(weight)^T + bias in x's float type: x [..., K], weight integers [N, K], bias [N] -> [..., N].

    scale has one element (per tensor), or is [N] (per output channel), or [N, ceil(K / group)] when group > 0. x and bias have
    gradients."""
    w = dequantize(weight, scale, zero_point, dtype, weight_axis(scale, group), group).to(x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def quantized_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    x_dtype: str,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_dtype: str,
    bias: Tensor | None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    y_dtype: str | None = None,
) -> Tensor:
    """Integers x [..., K] and weight [N, K] -> [..., N], summed in int32 after subtracting the zero points.

    x_scale has one element (per tensor) or is [..., 1] (per token); w_scale has one element or is [N]; bias [N], float (added in
    float32) or int32 (in units of x_scale * w_scale). Without y_dtype the result is acc * (x_scale * w_scale) + bias in w_scale's
    float type; with it, integers saturate(round(acc * (x_scale * w_scale / y_scale)) + y_zero_point), or quantize(float result)
    when the bias is float.
    """
    rows = None if w_zero_point is None else w_zero_point.reshape(-1, 1)
    acc = _exact(F.linear, _centred(x, x_zero_point), _centred(weight, rows))
    return _finish(acc, x_scale, w_scale, bias, y_scale, y_zero_point, y_dtype)


def _convolve(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Callable[..., Tensor]:
    """conv1d/2d/3d by the number of strides, zero padding (begin..., end...) as ONNX orders it."""
    n = len(stride)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}.get(n)
    if conv is None or len(padding) != 2 * n or len(dilation) != n:
        raise ValueError(f"a convolution has 1 to 3 spatial axes and two paddings for each, got {stride=}, {padding=}, {dilation=}")
    pads = [p for i in reversed(range(n)) for p in (padding[i], padding[i + n])]

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv(F.pad(x, pads) if any(pads) else x, weight, bias, list(stride), 0, list(dilation), groups)

    return run


def _channels(value: Tensor, spatial: int) -> Tensor:
    """[N] -> [N, 1, ...]: along the channel axis of [B, N, *spatial]; one element -> ()."""
    return value.reshape(()) if value.numel() == 1 else value.reshape(-1, *[1] * spatial)


def dequant_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """conv(x, dequantize(weight), bias) in x's float type: x [B, C, *spatial], weight integers [N, C / groups, *kernel],
    scale of one element or [N], bias [N], padding (begin..., end...)."""
    w = dequantize(weight, scale, zero_point, dtype, weight_axis(scale, 0)).to(x.dtype)
    return _convolve(stride, padding, dilation, groups)(x, w, None if bias is None else bias.to(x.dtype))


def quantized_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    x_dtype: str,
    weight: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor | None,
    w_dtype: str,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    y_dtype: str | None = None,
) -> Tensor:
    """As quantized_linear, for x [B, C, *spatial] and weight [N, C / groups, *kernel] -> [B, N, *spatial'].

    x_scale has one element; w_scale one or N. padding is (begin..., end...) and pads with x's zero point, that is with real 0."""
    n = len(stride)
    rows = None if w_zero_point is None else _channels(w_zero_point, n + 1)
    centre = None if x_zero_point is None else x_zero_point.reshape(())
    acc = _exact(_convolve(stride, padding, dilation, groups), _centred(x, centre), _centred(weight, rows))
    biases = None if bias is None else _channels(bias, n)
    return _finish(acc, x_scale.reshape(()), _channels(w_scale, n), biases, y_scale, y_zero_point, y_dtype)
