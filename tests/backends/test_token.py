"""Rows of activations with a scale each: integers and numbers of the reference, kernels, and what is left to float products."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph
from qgraph.backends.onnxruntime import OnnxRuntime
from qgraph.backends.onnxruntime.legalize import ClaimKernels
from qgraph.backends.onnxruntime.token import corrected, correction_rows
from qgraph.errors import RecipeError
from qgraph.onnx_io import opset
from qgraph.pipeline import Context
from qgraph.reference import dynamic_quantize
from qgraph.types import PerToken, QSpec, type_of
from tests.backends.by_hand import load, node_of, quantize_dynamic, quantize_weight, ready
from tests.backends.test_onnxruntime import became, both, linear_model, linear_of, placeholder, quantize_weight_of

ORT = OnnxRuntime(threads=1)
FORMATS = [("uint8", False), ("int8", True), ("int8", False), ("uint8", True)]


def rows(dtype: str = "uint8", *, symmetric: bool = False) -> QSpec:
    return QSpec(dtype, symmetric, PerToken(), dynamic=True)


def tokens(*shape: int) -> torch.Tensor:
    """Rows far apart in size and offset, one of zeros, one of positive numbers only."""
    torch.manual_seed(3)
    x = torch.randn(*shape) * torch.logspace(-2, 1, shape[-2])[:, None]
    flat = x.view(-1, shape[-1])
    flat[0] = 0.0
    flat[1] = flat[1].abs() + 5.0
    return x


def quantized(spelling: str = "matmul", spec: QSpec | None = None, **options):
    gm = linear_model(spelling, **options)
    quantize_weight_of(gm)
    quantize_dynamic(gm, placeholder(gm), [linear_of(gm)], spec=spec or rows())
    return ready(gm)


def op_types(program) -> list[str]:
    return [n.op_type for n in onnx.load(program.path).graph.node]


@pytest.mark.parametrize(("dtype", "symmetric"), FORMATS)
@pytest.mark.parametrize(
    ("spelling", "dims"), [("matmul", "B,S"), ("transposed", "B,S"), ("matmul", "2,3"), ("gemm", "B"), ("gemm transB", "B")]
)
def test_a_linear_with_a_scale_per_row_is_one_integer_kernel(spelling, dims, dtype, symmetric):
    gm = quantized(spelling, rows(dtype, symmetric=symmetric), dims=dims)
    x = tokens(*([2, 3] if dims != "B" else [7]), 24)
    program = both(gm, x, tol=1e-4)
    assert became(program) == ["MatMulIntegerToFloat"]


@pytest.mark.parametrize("version", [9, 13, 18, 21, 23])
def test_blocks_as_long_as_a_row_need_opset_21(version):
    gm = quantized(opset=version, bias=False)
    lowered = ORT.legalize(copy.deepcopy(gm))
    assert opset(lowered) == max(version, 21)
    both(gm, tokens(2, 5, 24), tol=1e-4)


def test_the_spelling_of_asymmetric_rows():
    assert op_types(both(quantized(), tokens(2, 5, 24), tol=1e-4)) == [
        *("ReduceMax", "ReduceMin", "Neg", "Relu", "Clip", "Add", "Div", "QuantizeLinear", "QuantizeLinear", "Concat"),
        *("MatMulIntegerToFloat", "Mul", "Sum"),
    ]


def test_symmetric_rows_need_no_correction():
    program = both(quantized(spec=rows("int8", symmetric=True)), tokens(2, 5, 24), tol=1e-4)
    assert op_types(program)[-3:] == ["MatMulIntegerToFloat", "Mul", "Sum"]
    assert "Concat" not in op_types(program)


@given(st.integers(0, 2**31), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=25)
def test_scales_and_zero_points_are_those_of_the_reference(seed, k, symmetric):
    """The three results of dynamic_quantize, out of ONNX Runtime."""
    gm = load(f'<ir_version: 8, opset_import: ["": 13]> g (float[M,{k}] x) => (float[M,{k}] y) {{ y = Relu(x) }}')
    quantize_dynamic(gm, placeholder(gm), [node_of(gm, "Relu")], spec=rows(symmetric=symmetric))
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(rng.normal(0, 2), 1.0, (5, k)) * 10.0 ** rng.integers(-6, 6, (5, 1)), dtype=torch.float32)
    q, scale, zero = dynamic_quantize(x, "uint8", symmetric, -1, -1)
    got = ORT.lower(ready(gm))(x)[0]
    torch.testing.assert_close(got, torch.relu((q.float() - zero.float()) * scale), rtol=1e-6, atol=0)


def test_rows_of_unknown_length_are_quantized_in_steps():
    gm = load('<ir_version: 8, opset_import: ["": 13]> g (float[M,K] x) => (float[M,K] y) { y = Relu(x) }')
    quantize_dynamic(gm, placeholder(gm), [node_of(gm, "Relu")], spec=rows())
    program = both(ready(gm), tokens(6, 11), tol=1e-5)
    assert "Round" in op_types(program)


def test_the_weight_tells_how_long_rows_are():
    gm = load('<ir_version: 8, opset_import: ["": 13]> g (float[M,K] x) => (float[M,5] y) { y = MatMul(x, w) }', w=torch.randn(16, 5))
    quantize_weight(gm, node_of(gm, "MatMul"))
    quantize_dynamic(gm, placeholder(gm), [node_of(gm, "MatMul")], spec=rows())
    program = both(ready(gm), tokens(6, 16), tol=1e-4)
    assert "Round" not in op_types(program)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_16_bit_floats_have_scales_of_16_bits_as_in_the_reference(symmetric):
    text = """<ir_version: 8, opset_import: ["": 13]> g (float16[B,S,24] x) => (float16[B,S,8] y, float16[B,S,8] z)
        { y = MatMul(x, w)  z = MatMul(x, v) }"""
    gm = load(text, w=torch.randn(24, 8).half(), v=torch.randn(24, 8).half())
    for i in range(2):
        quantize_weight(gm, node_of(gm, "MatMul", i))
    quantize_dynamic(gm, placeholder(gm), [node_of(gm, "MatMul", i) for i in range(2)], spec=rows(symmetric=symmetric))
    gm, x = ready(gm), tokens(2, 4, 24).half()
    want = gm(x)
    program = ORT.lower(copy.deepcopy(gm), strict=True)
    assert op_types(program).count("ReduceMax") == 1
    for got, expected in zip(program(x), want, strict=True):
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.float(), expected.float(), rtol=2e-3, atol=4e-2)


def three_readers():
    torch.manual_seed(1)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (float[B,S,64] x) => (float[B,S,9] y, float[B,S,7] z, float[B,S,64] f)
            { y = MatMul(x, w)  z = MatMul(x, v)  f = Relu(x) }""",
        w=torch.randn(64, 9) + 0.2,
        v=torch.randn(64, 7),
    )
    for i in range(2):
        quantize_weight(gm, node_of(gm, "MatMul", i))
    quantize_dynamic(gm, placeholder(gm), [node_of(gm, "MatMul", i) for i in range(2)], spec=rows())
    return ready(gm)


def test_readers_of_one_value_share_its_statistics_integers_and_correction():
    program = both(three_readers(), tokens(2, 5, 64), tol=1e-4)
    found = op_types(program)
    assert became(program) == ["MatMulIntegerToFloat"] * 2
    assert {t: found.count(t) for t in ("ReduceMax", "QuantizeLinear", "Concat")} == {"ReduceMax": 1, "QuantizeLinear": 2, "Concat": 1}


def test_many_correction_rows_are_subtracted_in_float_instead():
    """Weights of one sign: their column sums are as large as they can be."""
    gm = load('<ir_version: 8, opset_import: ["": 13]> g (float[M,32] x) => (float[M,6] y) { y = MatMul(x, w) }', w=torch.rand(32, 6) + 0.5)
    quantize_weight(gm, node_of(gm, "MatMul"))
    quantize_dynamic(gm, placeholder(gm), [node_of(gm, "MatMul")], spec=rows())
    program = both(ready(gm), tokens(7, 32), tol=2e-4)
    assert "Sub" in op_types(program) and "Concat" not in op_types(program)


@given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 5), st.integers(0, 3))
@settings(deadline=None)
def test_corrected_columns_add_up_to_zero(seed, k, n, extra):
    q = torch.from_numpy(np.random.default_rng(seed).integers(-127, 128, (k, n)).astype(np.int8))
    count = correction_rows(q.sum(0, dtype=torch.int32)) + extra
    out = corrected(q, count)
    assert out.dtype == torch.int8 and out.shape == (k + count, n)
    assert torch.equal(out[:k], q) and not out.sum(0, dtype=torch.int32).any()


def test_a_bias_is_not_drawn_into_a_gelu():
    gm = load(
        """<ir_version: 10, opset_import: ["": 20]> g (float[B,S,32] x) => (float[B,S,16] y)
            { m = MatMul(x, w)  h = Add(m, b)  y = Gelu(h) }""",
        w=torch.randn(32, 16),
        b=torch.randn(16),
    )
    quantize_weight(gm, node_of(gm, "MatMul"))
    quantize_dynamic(gm, placeholder(gm), [node_of(gm, "MatMul")], spec=rows())
    program = both(ready(gm), tokens(2, 5, 32), tol=1e-4)
    assert op_types(program)[-2:] == ["Sum", "Gelu"]


def declines(gm) -> list[str]:
    ctx = Context()
    ClaimKernels().run(gm, ctx)
    return [d.reason for d in ctx.declines]


def test_rows_beside_weight_groups_are_a_float_product_with_a_reason():
    gm = linear_model("matmul", k=64)
    quantize_weight(gm, linear_of(gm), group=32)
    quantize_dynamic(gm, placeholder(gm), [linear_of(gm)], spec=rows("int8", symmetric=True))
    both(ready(copy.deepcopy(gm)), tokens(2, 5, 64), tol=1e-4)
    (reason,) = declines(ready(gm))
    assert reason == (
        "no integer kernel has one scale per row of x beside groups of 32 in the weight: MatMulNBits level 4 quantizes rows in the weight's "
        "groups (activations.group=32), and stage two-level gives weights of 4 bits scales that are one per channel in int8; the product is a "
        "float one"
    )


@pytest.mark.parametrize(("dtype", "symmetric"), [("int6", True), ("uint6", False), ("int6", False), ("int4", True)])
def test_rows_of_fewer_bits_are_simulated_in_standard_operations(dtype, symmetric):
    gm = quantized("matmul", rows(dtype, symmetric=symmetric))
    program = both(copy.deepcopy(gm), tokens(2, 5, 24), tol=1e-4)
    assert {"Round", "Clip"} <= set(op_types(program))
    assert declines(gm) == [f"integer kernels read rows of 8 bits, not of {dtype}; the product is a float one"]


def test_6_bits_run_in_the_reference_and_are_refused_by_name_elsewhere():
    """W6A6: simulated where the graph was prepared for the reference, then in ONNX too."""
    x = tokens(2, 5, 24)
    gm = qgraph.quantize(linear_model("matmul"), recipe="w6a6-token", backend="reference")
    (want,), (got,) = qgraph.lower(gm, backend="reference")(x), qgraph.lower(gm, backend="onnxruntime")(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    kept = qgraph.quantize(linear_model("matmul"), recipe="w6a6-token").meta["qgraph"].ledger
    sentence = "rows with a scale each have 8 bits in integer kernels, not 6; prepared for the backend 'reference' they are simulated"
    assert [e.reason for e in kept if e.role == "x"] == [sentence]
    with pytest.raises(RecipeError, match=sentence):
        qgraph.prepare(linear_model("matmul"), recipe=qgraph.load_recipe("w8a8-token", ["rules.*={activations: {bits: 6}}"]))


def test_asymmetric_weights_are_left_to_a_float_product():
    gm = linear_model("matmul")
    quantize_weight(gm, linear_of(gm), dtype="uint8", symmetric=False)
    quantize_dynamic(gm, placeholder(gm), [linear_of(gm)], spec=rows())
    both(ready(copy.deepcopy(gm)), tokens(2, 5, 24), tol=1e-4)
    assert declines(ready(gm)) == ["integer products of rows with a scale each take signed symmetric weights; the product is a float one"]


def test_a_gemm_with_a_factor_is_left_to_a_float_product():
    gm = load(
        '<ir_version: 8, opset_import: ["": 13]> g (float[M,8] x) => (float[M,6] y) { y = Gemm<alpha=0.5>(x, w, b) }',
        w=torch.randn(8, 6),
        b=torch.randn(6),
    )
    quantize_weight(gm, node_of(gm, "Gemm"))
    quantize_dynamic(gm, placeholder(gm), [node_of(gm, "Gemm")], spec=rows())
    both(ready(copy.deepcopy(gm)), tokens(5, 8), tol=1e-4)
    assert "no alpha and beta" in declines(ready(gm))[0]


def test_values_keep_their_types():
    gm = ORT.legalize(quantized())
    assert all(type_of(n) is not None for n in gm.graph.nodes if getattr(n.target, "op_type", "") in ("MatMulIntegerToFloat", "Mul", "Sum"))
