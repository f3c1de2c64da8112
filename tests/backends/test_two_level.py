"""4-bit codes in two levels of scales: one integer kernel, the codes in the file, the int8 weight exact."""

import numpy as np
import onnx
import pytest
import torch

import qgraph
from qgraph.backends.onnxruntime import OnnxRuntime
from qgraph.onnx_ops import OnnxOp
from qgraph.passes import TwoLevel
from qgraph.recipe import Int, Recipe
from qgraph.views import Dequantize, Linear, const_value, view
from tests.backends.test_onnxruntime import became, both, linear_model

ORT = OnnxRuntime(threads=1)
ROWS = {
    "token": Int(8, per="token", symmetric=True, dynamic=True),
    "token-asym": Int(8, per="token", symmetric=False, unsigned=True, dynamic=True),
    "dynamic": Int(8, per="tensor", unsigned=True, dynamic=True),
    "static": Int(8, per="tensor", unsigned=True),
}


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def quantized(spelling: str, rows: Int, weights: Int, *, k: int = 200, bias: bool = True):
    dims = "B,S" if "gemm" not in spelling else "B"
    x = batch(*((2, 5) if "gemm" not in spelling else (7,)), k)
    recipe = Recipe(weights=weights, activations=rows, stages=(TwoLevel(),))
    return qgraph.quantize(linear_model(spelling, k, 40, dims=dims, bias=bias), [x], recipe=recipe), x


@pytest.mark.parametrize("spelling", ["matmul", "gemm transB"])
@pytest.mark.parametrize("rows", ROWS)
def test_a_linear_is_one_integer_kernel_with_the_references_numbers(rows, spelling):
    gm, x = quantized(spelling, ROWS[rows], Int(4, group=64, symmetric=spelling == "matmul"))
    program = both(gm, x, tol=2e-3)
    assert set(became(program)) <= {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    assert len(became(program)) == 1


def test_a_static_product_without_a_bias_is_an_integer_kernel_too():
    gm, x = quantized("matmul", ROWS["static"], Int(4, group=32), bias=False)
    assert became(both(gm, x, tol=2e-3)) == ["MatMulIntegerToFloat"]


@pytest.mark.parametrize("weights", [Int(4, group=64), Int(4, group=64, symmetric=True)], ids=["asym", "sym"])
def test_the_int8_weight_times_its_scales_is_the_dequantized_one_bit_for_bit(weights):
    gm, x = quantized("matmul", ROWS["token"], weights)
    site = next(v for n in gm.graph.nodes if (v := view(Linear, n)) is not None)
    w = view(Dequantize, site.weight)
    want = qgraph.ops.dequantize(*(None if n is None else const_value(n) for n in (w.q, w.scale, w.zero_point)), w.dtype, w.axis, w.group)
    lowered = ORT.legalize(gm)
    kernel = next(n for n in lowered.graph.nodes if isinstance(n.target, OnnxOp) and n.target.op_type == "MatMulIntegerToFloat")
    scale = const_value(kernel.args[3])
    next(n for n in lowered.graph.nodes if n.op == "output").args = ((kernel.args[1],),)
    lowered.recompile()
    (integers,) = lowered(x)
    assert integers.dtype == torch.int8
    assert torch.equal(integers.float() * scale, want)


def test_the_file_holds_codes_of_4_bits(tmp_path):
    gm, _ = quantized("matmul", ROWS["token"], Int(4, group=64), k=640)
    path = qgraph.export(gm, tmp_path / "codes.onnx")
    large = {t.name: t.data_type for t in onnx.load(path).graph.initializer if np.prod(t.dims) >= 640 * 40}
    assert list(large.values()) == [onnx.TensorProto.INT4]
    assert path.stat().st_size < 640 * 40


def test_the_recipe_of_the_paper_runs_by_name():
    x = batch(2, 5, 128)
    gm = qgraph.quantize(linear_model("matmul", 128, 40), [x], recipe="qoq")
    assert became(both(gm, x, tol=2e-3)) == ["MatMulIntegerToFloat"]


def test_rounding_by_data_on_these_scales_keeps_the_integer_kernel():
    x = batch(40, 5, 128)
    recipe = qgraph.load_recipe("qoq", ["stages=[two-level, {gptq: {scales: keep}}]"])
    gm = qgraph.quantize(linear_model("matmul", 128, 40), [x], recipe=recipe)
    assert any(e.by == "gptq" for e in gm.meta["qgraph"].ledger)
    assert became(both(gm, x, tol=2e-3)) == ["MatMulIntegerToFloat"]
