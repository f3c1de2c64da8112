"""The qg ops against ONNX Runtime's own kernels on the CPU, optimizations off."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from qgraph.ops import Q
from qgraph.types import storage


def run(body: str, opset: int = 21, **feeds: Tensor) -> list[np.ndarray]:
    """`(inputs) => (outputs) { nodes }` in ONNX's text syntax, run unoptimized."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {body}')
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {k: v.numpy() for k, v in feeds.items()})


def samples(*shape: int, beyond_int32: bool = True) -> Tensor:
    """Ordinary values, exact halves of the scale 0.25, denormals; and NaN, infinities and huge values unless told.

    The kernels for blocks, for 2 bits and for float16 convert to int32 before they clamp, which C++ does not define for these."""
    torch.manual_seed(0)
    x = torch.randn(shape) * 40
    special = [0.125, 0.375, -0.125, -0.375, 1e-42, -0.0, 5e4, -5e4] + [torch.nan, torch.inf, -torch.inf, 3e38, -3e38] * beyond_int32
    x.view(-1)[: len(special)] = torch.tensor(special)
    return x


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("scale", [0.25, 0.0071, 1e-40])
def test_quantize_equals_quantize_linear(dtype: str, scale: float) -> None:
    x, s, z = samples(5, 7), torch.tensor(scale), torch.tensor(37).to(storage(dtype))
    (want,) = run(f"(float[5,7] x, float s, {dtype} z) => ({dtype}[5,7] y) {{ y = QuantizeLinear(x, s, z) }}", x=x, s=s, z=z)
    np.testing.assert_array_equal(Q.quantize(x, s, z, dtype).numpy(), want)


@pytest.mark.parametrize(("axis", "group", "shape"), [(1, 0, (3,)), (-1, 0, (4,)), (2, 2, (5, 3, 2)), (1, 2, (5, 2, 4))])
def test_granularities_equal_axis_and_block_size(axis: int, group: int, shape: tuple[int, ...]) -> None:
    x, s = samples(5, 3, 4, beyond_int32=not group), torch.rand(shape) + 0.01
    z = torch.randint(-9, 9, shape, dtype=torch.int8)
    dims = ",".join(map(str, shape))
    how = f"<axis: int = {axis}, block_size: int = {group}>" if group else f"<axis: int = {axis}>"
    body = f"""(float[5,3,4] x, float[{dims}] s, int8[{dims}] z) => (int8[5,3,4] q, float[5,3,4] y) {{
        q = QuantizeLinear{how}(x, s, z)
        y = DequantizeLinear{how}(q, s, z) }}"""
    q, y = run(body, x=x, s=s, z=z)
    np.testing.assert_array_equal(Q.quantize(x, s, z, "int8", axis, group).numpy(), q)
    np.testing.assert_array_equal(Q.fake_quantize(x, s, z, "int8", axis, group).numpy(), y)
    np.testing.assert_array_equal(Q.dequantize(torch.from_numpy(q), s, z, "int8", axis, group).numpy(), y)


@pytest.mark.parametrize(("dtype", "zero", "opset"), [("int4", -3, 21), ("uint4", 6, 21), ("int2", 1, 25), ("uint2", 2, 25)])
def test_fake_quantize_equals_packed_types(dtype: str, zero: int, opset: int) -> None:
    x, s = samples(5, 7, beyond_int32=opset < 25), torch.tensor(7.3)
    body = f"""(float[5,7] x, float s) => (float[5,7] y) <{dtype} z = {{{zero}}}> {{
        q = QuantizeLinear(x, s, z)
        y = DequantizeLinear(q, s, z) }}"""
    (want,) = run(body, opset, x=x, s=s)
    np.testing.assert_array_equal(Q.fake_quantize(x, s, torch.tensor(zero).to(storage(dtype)), dtype).numpy(), want)


def test_float16_results_are_rounded_once() -> None:
    q, s = torch.randint(-128, 128, (40, 7), dtype=torch.int8), (torch.rand(7) + 0.01).half()
    z = torch.randint(-128, 128, (7,), dtype=torch.int8)
    body = "(int8[40,7] q, float16[7] s, int8[7] z) => (float16[40,7] y) { y = DequantizeLinear<axis: int = 1>(q, s, z) }"
    np.testing.assert_array_equal(Q.dequantize(q, s, z, "int8", 1).numpy(), run(body, q=q, s=s, z=z)[0])


@pytest.mark.parametrize("seed", range(20))
def test_dynamic_quantize_equals_dynamic_quantize_linear(seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(3, 1 + seed * 5) * 10.0 ** (seed - 10) + (seed % 3 - 1) * 2
    _equals_dynamic_quantize_linear(x)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0, -0.0],
        [1.0, 2.0, 3.0],
        [-3.0, -1.0],
        [1e-45, 0.0],
        [1e-38, 0.0],
        [-3e-44, 1e-44],
        [torch.inf, 1.0],
        [3e38, -3e38],
        [-1.0, 1.0],
    ],
)
def test_dynamic_quantize_equals_it_on_extreme_ranges(values: list[float]) -> None:
    _equals_dynamic_quantize_linear(torch.tensor([values]))


def _equals_dynamic_quantize_linear(x: Tensor) -> None:
    body = "(float[m,n] x) => (uint8[m,n] q, float s, uint8 z) { q, s, z = DynamicQuantizeLinear(x) }"
    for got, want in zip(Q.dynamic_quantize(x, "uint8", False), run(body, x=x), strict=True):
        np.testing.assert_array_equal(got.numpy(), want)


@pytest.mark.parametrize("w_dtype", ["int8", "uint8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_requantized_linear_equals_qlinear_matmul(w_dtype: str, per_channel: bool) -> None:
    torch.manual_seed(5)
    m, k, n = 64, 48, 40
    x, w = torch.randint(0, 256, (m, k), dtype=torch.uint8), torch.randint(-127, 128, (n, k)).to(storage(w_dtype))
    shape = (n,) if per_channel else ()
    ws, wz = torch.rand(shape) * 0.01 + 0.002, torch.full(shape, 0 if w_dtype == "int8" else 117, dtype=storage(w_dtype))
    xs, xz, ys, yz = torch.tensor(0.031), torch.tensor(113, dtype=torch.uint8), torch.tensor(0.47), torch.tensor(121, dtype=torch.uint8)
    c = str(n) if per_channel else ""
    body = f"""(uint8[{m},{k}] x, float xs, uint8 xz, {w_dtype}[{k},{n}] w, float[{c}] ws, {w_dtype}[{c}] wz, float ys, uint8 yz)
        => (uint8[{m},{n}] y) {{ y = QLinearMatMul(x, xs, xz, w, ws, wz, ys, yz) }}""".replace("[]", "")
    (want,) = run(body, x=x, xs=xs, xz=xz, w=w.T.contiguous(), ws=ws, wz=wz, ys=ys, yz=yz)
    got = Q.quantized_linear(x, xs, xz, "uint8", w, ws, wz, w_dtype, None, ys, yz, "uint8")
    np.testing.assert_array_equal(got.numpy(), want)
    assert len(np.unique(want)) > 100


def test_requantized_conv_equals_qlinear_conv() -> None:
    torch.manual_seed(6)
    x, w = torch.randint(0, 256, (2, 4, 9, 8), dtype=torch.uint8), torch.randint(-127, 128, (6, 2, 3, 3), dtype=torch.int8)
    ws, bias = torch.rand(6) * 0.01 + 0.002, torch.randint(-20000, 20000, (6,), dtype=torch.int32)
    xs, xz, ys, yz = torch.tensor(0.031), torch.tensor(113, dtype=torch.uint8), torch.tensor(0.2), torch.tensor(121, dtype=torch.uint8)
    body = """(uint8[2,4,9,8] x, float xs, uint8 xz, int8[6,2,3,3] w, float[6] ws, int8[6] wz, float ys, uint8 yz, int32[6] b) => (uint8[a,b0,c,d] y) {
        y = QLinearConv<group: int = 2, pads: ints = [1, 0, 2, 1], strides: ints = [2, 1], dilations: ints = [1, 2]>(x, xs, xz, w, ws, wz, ys, yz, b) }"""
    wz = torch.zeros(6, dtype=torch.int8)
    (want,) = run(body, x=x, xs=xs, xz=xz, w=w, ws=ws, wz=wz, ys=ys, yz=yz, b=bias)
    window = ([2, 1], [1, 0, 2, 1], [1, 2], 2)
    got = Q.quantized_conv(x, xs, xz, "uint8", w, ws, None, "int8", bias, *window, ys, yz, "uint8")
    np.testing.assert_array_equal(got.numpy(), want)
    assert len(np.unique(want)) > 100
