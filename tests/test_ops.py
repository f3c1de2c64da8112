"""The qg ops against an independent numpy formulation (one Python loop over elements), bit for bit."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qgraph.ops import Q
from qgraph.types import int_range, storage

DTYPES = [f"{u}int{b}" for u in ("", "u") for b in range(2, 17)]
FLOATS = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float64: np.float64}
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 1e-40, 3e38, -3e38, 0.5, 1.5, 2.5, -0.5, -2.5, 0.1, 127.5, 1e30]
SCALES = [1.0, 0.5, 0.1, 0.007, 3.3, 1e-3, 1e-40, 1.2e-38, 1e30]


def numpy_of(t: Tensor) -> np.ndarray:
    """The same values in numpy, bfloat16 included."""
    if t.dtype == torch.bfloat16:
        return t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return t.numpy()


def scale_index(index: tuple[int, ...], axis: int | None, group: int) -> tuple[int, ...]:
    """Which scale an element has."""
    if axis is None:
        return ()
    axis %= len(index)
    if group == 0:
        return (index[axis],)
    return (*index[:axis], 0 if group == -1 else index[axis] // group, *index[axis + 1 :])


def loop_quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, dtype: str, axis: int | None, group: int) -> np.ndarray:
    low, high = int_range(dtype)
    out = np.zeros(x.shape, np.int64)
    for i in np.ndindex(x.shape):
        s = scale_index(i, axis, group)
        ratio = float(np.float32(x[i]) / np.float32(scale[s]))
        z = 0 if zero is None else int(zero[s])
        if math.isnan(ratio):
            out[i] = low
        elif math.isinf(ratio):
            out[i] = high if ratio > 0 else low
        else:
            out[i] = min(max(round(ratio) + z, low), high)  # Python rounds half to even, exactly
    return out


def loop_dequantize(q: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, axis: int | None, group: int, to: type) -> np.ndarray:
    out = np.zeros(q.shape, to)
    for i in np.ndindex(q.shape):
        s = scale_index(i, axis, group)
        z = 0 if zero is None else int(zero[s])
        out[i] = (np.float32(int(q[i]) - z) * np.float32(scale[s])).astype(to)
    return out


def same_bits(got: Tensor, want: np.ndarray) -> None:
    found = numpy_of(got)
    assert found.shape == want.shape
    assert found.dtype == want.dtype
    np.testing.assert_array_equal(found.astype(np.float64), want.astype(np.float64))
    np.testing.assert_array_equal(np.signbit(found.astype(np.float64)), np.signbit(want.astype(np.float64)))


@st.composite
def encodings(draw: st.DrawFn) -> tuple[tuple[int, ...], int | None, int, tuple[int, ...]]:
    """Shape, axis, group and the scale's shape: scalars, empty tensors, negative axes and short last groups among them."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    kind = draw(st.sampled_from(["tensor", "axis", "group", "token"])) if shape else "tensor"
    if kind == "tensor":
        return shape, None, 0, ()
    if kind == "token":
        return shape, -1, -1, (*shape[:-1], 1)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    if kind == "axis":
        return shape, axis, 0, (shape[axis],)
    group = draw(st.integers(1, 6))
    a = axis % len(shape)
    return shape, axis, group, (*shape[:a], -(-shape[a] // group), *shape[a + 1 :])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, str, int | None, int]:
    shape, axis, group, scale_shape = draw(encodings())
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(list(FLOATS)))
    values = st.sampled_from(SPECIAL) | st.floats(width=32) | st.integers(-300, 300).map(lambda n: n * 0.5)
    n, m = math.prod(shape), math.prod(scale_shape)
    x = torch.tensor(draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64).to(kind).reshape(shape)
    scale = torch.tensor(draw(st.lists(st.sampled_from(SCALES), min_size=m, max_size=m)), dtype=torch.float64).to(kind).reshape(scale_shape)
    low, high = int_range(dtype)
    zeros = draw(st.none() | st.lists(st.integers(low, high), min_size=m, max_size=m))
    zero = None if zeros is None else torch.tensor(zeros, dtype=torch.int64).to(storage(dtype)).reshape(scale_shape)
    return x, scale, zero, dtype, axis, group


def arrays(*tensors: Tensor | None) -> list[np.ndarray | None]:
    return [None if t is None else numpy_of(t) for t in tensors]


@settings(max_examples=400, deadline=None)
@given(problems())
def test_quantize_dequantize_and_fake_quantize_equal_the_loop(problem) -> None:
    x, scale, zero, dtype, axis, group = problem
    nx, ns, nz = arrays(x, scale, zero)
    with np.errstate(all="ignore"):
        want = loop_quantize(nx, ns, nz, dtype, axis, group)
        back = loop_dequantize(want, ns, nz, axis, group, FLOATS[scale.dtype])
    q = Q.quantize(x, scale, zero, dtype, axis, group)
    assert q.dtype == storage(dtype)
    np.testing.assert_array_equal(q.numpy().astype(np.int64), want)
    same_bits(Q.dequantize(q, scale, zero, dtype, axis, group), back)
    same_bits(Q.fake_quantize(x, scale, zero, dtype, axis, group), back)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_saturate(dtype: str) -> None:
    x, scale = torch.tensor([math.nan, -math.nan, math.inf, -math.inf]), torch.tensor(0.3)
    low, high = int_range(dtype)
    zero = torch.tensor((low + high) // 2).to(storage(dtype))
    assert Q.quantize(x, scale, zero, dtype).tolist() == [low, low, high, low]


def test_halves_round_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert Q.quantize(x, torch.tensor(1.0), torch.tensor(1, dtype=torch.int8), "int8").tolist() == [-1, -1, 1, 1, 3, 3, 5]


@pytest.mark.parametrize(
    ("scale_shape", "axis", "group"),
    [((3,), None, 0), ((3,), 1, 0), ((4,), 2, 0), ((2, 3), 1, 2), ((2, 4), -1, -1), ((2, 1), 0, -1), ((2,), None, 2)],
)
def test_a_scale_that_does_not_fit_raises(scale_shape: tuple[int, ...], axis: int | None, group: int) -> None:
    with pytest.raises(ValueError, match="scale|axis|group"):
        Q.quantize(torch.ones(2, 4), torch.ones(scale_shape), None, "int8", axis, group)


def loop_dynamic(
    x: np.ndarray, dtype: str, symmetric: bool, axis: int | None, group: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
    low, high = int_range(dtype)
    bottom, top = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for i in np.ndindex(x.shape):
        s, v = scale_index(i, axis, group), np.float32(x[i])
        if not np.isnan(v):
            bottom[s], top[s] = min(bottom[s], v), max(top[s], v)
    scale, zero = np.zeros(shape, x.dtype), np.zeros(shape, np.int64)
    for s in np.ndindex(shape):
        width = max(-bottom[s], top[s]) / np.float32((high - low) // 2) if symmetric else (top[s] - bottom[s]) / np.float32(high - low)
        scale[s] = np.float32(1) if bottom[s] == top[s] else width
        exact = np.float32(low) - bottom[s] / np.float32(scale[s])
        zero[s] = high if np.isnan(exact) else round(float(min(max(exact, low), high)))
        if symmetric:
            zero[s] = (low + high + 1) // 2
    return loop_quantize(x, scale, zero, dtype, axis, group), scale, zero


@settings(max_examples=300, deadline=None)
@given(problems(), st.booleans())
def test_dynamic_quantize_equals_the_loop(problem, symmetric: bool) -> None:
    x, scale, _, dtype, axis, group = problem
    with np.errstate(all="ignore"):
        want = loop_dynamic(numpy_of(x), dtype, symmetric, axis, group, tuple(scale.shape))
    q, s, z = Q.dynamic_quantize(x, dtype, symmetric, axis, group)
    assert (q.dtype, s.dtype, z.dtype) == (storage(dtype), x.dtype, storage(dtype))
    np.testing.assert_array_equal(q.numpy().astype(np.int64), want[0])
    same_bits(s, want[1])
    np.testing.assert_array_equal(z.numpy().astype(np.int64), want[2])


def test_fake_quantize_passes_gradients_inside_its_range_only() -> None:
    x = torch.tensor([-1.31, -1.3, -1.2, 0.0, 1.25, 1.26, 1.29, math.inf, math.nan], requires_grad=True)
    y = Q.fake_quantize(x, torch.tensor(0.01), torch.tensor(2, dtype=torch.int8), "int8")  # represents -1.30 .. 1.25
    (y[:-2] * torch.arange(1.0, 8.0)).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0, 0.0, 0.0]


def test_fake_quantize_trains_per_channel_in_bfloat16() -> None:
    x = torch.tensor([[3.0, -1.0, 0.4], [3.0, -1.0, 0.4]], dtype=torch.bfloat16, requires_grad=True)
    Q.fake_quantize(x, torch.tensor([0.1, 0.5], dtype=torch.bfloat16), None, "int4", 0).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.tolist() == [[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]


@pytest.mark.parametrize("rows", [(2, 3), (), (0,)])
def test_dequant_linear_has_the_gradients_of_linear(rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    w = torch.randint(-8, 8, (4, 5), dtype=torch.int8)
    scale, zero = torch.rand(4, 3) + 0.5, torch.randint(-3, 3, (4, 3), dtype=torch.int8)
    x, bias = torch.randn(*rows, 5, requires_grad=True), torch.randn(4, requires_grad=True)
    weight = Q.dequantize(w, scale, zero, "int4", 1, 2)
    up = torch.randn(*rows, 4)
    got = torch.autograd.grad((Q.dequant_linear(x, w, scale, zero, bias, "int4", 2) * up).sum(), (x, bias))
    want = torch.autograd.grad((torch.nn.functional.linear(x, weight, bias) * up).sum(), (x, bias))
    torch.testing.assert_close(got, want)


def whole(rng: np.random.Generator, dtype: str, *shape: int) -> Tensor:
    low, high = int_range(dtype)
    return torch.from_numpy(rng.integers(low, high + 1, shape)).to(storage(dtype))


def requantized(acc: np.ndarray, s: np.ndarray, bias: np.ndarray | None, y: float, zero: int, dtype: str) -> np.ndarray:
    low, high = int_range(dtype)
    real = acc.astype(np.float32)
    ratio = real * (s / np.float32(y)) if bias is None else (real * s + bias) / np.float32(y)
    return np.clip(np.rint(ratio).astype(np.float64) + zero, low, high)


X_DTYPES, W_DTYPES, BIASES, RESULTS = (
    ["uint8", "int8", "int4", "uint16"],
    ["int8", "uint4", "int16"],
    ["none", "float", "int32"],
    [None, "uint8", "int8", "int16"],
)


@pytest.mark.parametrize(("x_dtype", "w_dtype", "bias", "y_dtype"), list(itertools.product(X_DTYPES, W_DTYPES, BIASES, RESULTS)))
def test_quantized_linear_equals_int64_arithmetic(x_dtype: str, w_dtype: str, bias: str, y_dtype: str | None) -> None:
    rng = np.random.default_rng(3)
    m, k, n = 3, 37, 5
    x, w = whole(rng, x_dtype, 2, m, k), whole(rng, w_dtype, n, k)
    xz, wz = whole(rng, x_dtype), whole(rng, w_dtype, n)
    xs, ws = torch.tensor(0.02), torch.from_numpy(rng.random(n).astype(np.float32) * 0.01 + 1e-3)
    b = {"none": None, "float": torch.randn(n), "int32": torch.randint(-9000, 9000, (n,), dtype=torch.int32)}[bias]
    ys, yz = torch.tensor(0.37), None if y_dtype is None else whole(rng, y_dtype)
    acc = (x.numpy().astype(np.int64) - int(xz)) @ (w.numpy().astype(np.int64) - wz.numpy().astype(np.int64)[:, None]).T
    acc = (acc + (b.numpy() if bias == "int32" else 0)).astype(np.int32)
    s, fb = xs.numpy() * ws.numpy(), b.numpy() if bias == "float" else None
    got = Q.quantized_linear(x, xs, xz, x_dtype, w, ws, wz, w_dtype, b, None if y_dtype is None else ys, yz, y_dtype)
    if y_dtype is None:
        same_bits(got, acc.astype(np.float32) * s + (0 if fb is None else fb))
    else:
        assert got.dtype == storage(y_dtype)
        np.testing.assert_array_equal(got.numpy().astype(np.float64), requantized(acc, s, fb, 0.37, int(yz), y_dtype))


def test_integer_sums_are_exact_beyond_float32_and_wrap_beyond_int32() -> None:
    one = torch.tensor(1.0)
    x, w = torch.full((1, 1025), 255, dtype=torch.uint8), torch.full((2, 1025), 127, dtype=torch.int8)
    w[1, 0] = 126  # 33194625 and 33194370: neither is a float32, and their rounded values are checked through the bias
    bias = torch.tensor([-33194624, -33194368], dtype=torch.int32)
    assert Q.quantized_linear(x, one, None, "uint8", w, one, None, "int8", bias).tolist() == [[1.0, 2.0]]
    big, small = torch.full((1, 3), 65535, dtype=torch.int32).to(torch.uint16), torch.full((1, 3), -32768, dtype=torch.int16)
    want = np.array([3 * 65535 * -32768], np.int64).astype(np.int32).astype(np.float32)
    assert Q.quantized_linear(big, one, None, "uint16", small, one, None, "int16", None).item() == want.item()


def test_requantization_is_one_multiplication_by_a_rounded_factor() -> None:
    x, w = torch.tensor([[35]], dtype=torch.int8), torch.tensor([[1]], dtype=torch.int8)
    arguments = (x, torch.tensor(0.01), None, "int8", w, torch.tensor(1.0), None, "int8")
    y = (torch.tensor(0.1), None, "int8")
    assert Q.quantized_linear(*arguments, None, *y).item() == 3  # 35 * (0.01 / 0.1) is just below 3.5 in float32
    assert Q.quantized_linear(*arguments, torch.tensor([0.0]), *y).item() == 4  # quantize(35 * 0.01 + 0.0)


def test_quantized_linear_has_one_scale_per_token() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 8) * torch.tensor([[[1.0], [20.0], [0.1]]])
    q, s, z = Q.dynamic_quantize(x, "uint8", False, -1, -1)
    w, ws = torch.randint(-127, 128, (5, 8), dtype=torch.int8), torch.rand(5) * 0.01 + 0.001
    got = Q.quantized_linear(q, s, z, "uint8", w, ws, None, "int8", torch.ones(5))
    want = torch.nn.functional.linear(Q.dequantize(q, s, z, "uint8", -1, -1), Q.dequantize(w, ws, None, "int8", 0), torch.ones(5))
    torch.testing.assert_close(got, want)


def loop_conv(x: np.ndarray, w: np.ndarray, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> np.ndarray:
    """Integer convolution of x [B, C, *spatial] that is centred already (padding is 0)."""
    n = len(stride)
    x = np.pad(x, [(0, 0), (0, 0), *((padding[i], padding[n + i]) for i in range(n))])
    reach = [dilation[i] * (w.shape[2 + i] - 1) for i in range(n)]
    sizes = [(x.shape[2 + i] - reach[i] - 1) // stride[i] + 1 for i in range(n)]
    out = np.zeros((x.shape[0], w.shape[0], *sizes), np.int64)
    per_in, per_out = w.shape[1], w.shape[0] // groups
    for o in range(w.shape[0]):
        part = x[:, o // per_out * per_in :][:, :per_in]
        for at in np.ndindex(*sizes):
            window = tuple(slice(a * s, a * s + r + 1, d) for a, s, r, d in zip(at, stride, reach, dilation, strict=True))
            out[(slice(None), o, *at)] = (part[(slice(None), slice(None), *window)] * w[o]).sum(axis=tuple(range(1, n + 2)))
    return out


CONVS = [
    ((2, 4, 9), (6, 2, 3), [2], [1, 0], [2], 2),
    ((1, 4, 6, 7), (6, 2, 3, 2), [2, 1], [1, 0, 0, 2], [1, 2], 2),
    ((2, 3, 5, 5), (3, 1, 3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 3),
    ((1, 2, 4, 3, 4), (3, 2, 2, 2, 2), [1, 2, 1], [0, 1, 0, 1, 0, 0], [1, 1, 2], 1),
]


@pytest.mark.parametrize(("x_shape", "w_shape", "stride", "padding", "dilation", "groups"), CONVS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("y_dtype", [None, "uint8"])
def test_quantized_conv_equals_int64_arithmetic(
    x_shape, w_shape, stride, padding, dilation, groups, bias: str, y_dtype: str | None
) -> None:
    rng = np.random.default_rng(4)
    x, w = whole(rng, "uint8", *x_shape), whole(rng, "int8", *w_shape)
    xz, wz = torch.tensor(77, dtype=torch.uint8), whole(rng, "int8", w_shape[0])
    xs, ws = torch.tensor(0.02), torch.from_numpy(rng.random(w_shape[0]).astype(np.float32) * 0.01 + 1e-3)
    b = {"none": None, "float": torch.randn(w_shape[0]), "int32": torch.randint(-9000, 9000, (w_shape[0],), dtype=torch.int32)}[bias]
    column = (-1, *[1] * len(stride))
    centred = w.numpy().astype(np.int64) - wz.numpy().astype(np.int64).reshape(*column, 1)
    acc = loop_conv(x.numpy().astype(np.int64) - 77, centred, stride, padding, dilation, groups)
    acc += b.numpy().reshape(column) if bias == "int32" else 0
    s, fb = (xs.numpy() * ws.numpy()).reshape(column), b.numpy().reshape(column) if bias == "float" else None
    y = (None, None, None) if y_dtype is None else (torch.tensor(0.37), torch.tensor(9, dtype=torch.uint8), y_dtype)
    got = Q.quantized_conv(x, xs, xz, "uint8", w, ws, wz, "int8", b, stride, padding, dilation, groups, *y)
    if y_dtype is None:
        same_bits(got, acc.astype(np.float32) * s + (0 if fb is None else fb))
    else:
        np.testing.assert_array_equal(got.numpy().astype(np.float64), requantized(acc, s, fb, 0.37, 9, "uint8"))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [0, 2])
def test_dequant_linear_is_linear_on_the_dequantized_weight(kind: torch.dtype, group: int) -> None:
    torch.manual_seed(2)
    x, w, bias = torch.randn(3, 5).to(kind), torch.randint(-8, 8, (4, 5), dtype=torch.int8), torch.randn(4).to(kind)
    shape = (4, 3) if group else (4,)
    scale, zero = (torch.rand(shape) + 0.1).to(kind), torch.randint(-4, 4, shape, dtype=torch.int8)
    got = Q.dequant_linear(x, w, scale, zero, bias, "int4", group)
    assert got.dtype == kind
    assert torch.equal(got, torch.nn.functional.linear(x, Q.dequantize(w, scale, zero, "int4", 1 if group else 0, group), bias))


def test_dequant_conv_is_conv_on_the_dequantized_weight_with_uneven_padding() -> None:
    torch.manual_seed(2)
    x, w, bias = torch.randn(1, 4, 6, 5), torch.randint(-127, 128, (6, 2, 3, 2), dtype=torch.int8), torch.randn(6)
    scale, zero = torch.rand(6) + 0.1, torch.randint(-4, 4, (6,), dtype=torch.int8)
    got = Q.dequant_conv(x, w, scale, zero, bias, "int8", [2, 1], [1, 0, 0, 2], [1, 2], 2)
    padded = torch.nn.functional.pad(x, (0, 2, 1, 0))
    want = torch.nn.functional.conv2d(padded, Q.dequantize(w, scale, zero, "int8", 0), bias, (2, 1), 0, (1, 2), 2)
    assert torch.equal(got, want)


def test_empty_operands_give_empty_or_bias_only_results() -> None:
    one = torch.tensor(1.0)
    none = Q.quantized_linear(
        torch.zeros(0, 4, dtype=torch.int8), one, None, "int8", torch.ones(3, 4, dtype=torch.int8), one, None, "int8", None
    )
    assert none.shape == (0, 3)
    bias = torch.tensor([1.0, -2.0, 0.5])
    only = Q.quantized_linear(
        torch.zeros(2, 0, dtype=torch.int8), one, None, "int8", torch.ones(3, 0, dtype=torch.int8), one, None, "int8", bias
    )
    assert only.tolist() == [bias.tolist()] * 2
