"""Lowered programs against the torch reference, and the kernels that ONNX Runtime made of them.

"exact" below: ONNX Runtime computes the integers that the reference computes. Float results of integer kernels may differ in the last
bits (scales are multiplied in another order); requantized ones by one step where the product lies at a tie.
"""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.fx import GraphModule

from qgraph.backend import Kernel
from qgraph.backends.onnxruntime import OnnxRuntime, Program
from qgraph.errors import LoweringError, ModelError
from qgraph.onnx_io import from_onnx
from qgraph.passes.fuse_dequant_matmul import FuseDequantMatmul
from qgraph.rewrite import graph_modules
from qgraph.types import PerGroup, QSpec
from tests.backends.by_hand import load, node_of, quantize_dynamic, quantize_static, quantize_weight, ready

ORT = OnnxRuntime(threads=1)


def placeholder(gm: GraphModule, index: int = 0):
    return [n for n in gm.graph.nodes if n.op == "placeholder"][index]


def both(gm: GraphModule, *inputs: torch.Tensor, tol: float, strict: bool = True) -> Program:
    """Lower with and without ONNX Runtime's optimizations; both must be within `tol` (absolute) of the reference."""
    want = gm(*inputs)
    plain = ORT.lower(copy.deepcopy(gm), optimized=False)
    fused = ORT.lower(copy.deepcopy(gm), strict=strict)
    for program in (plain, fused):
        for got, expected in zip(program(*inputs), want, strict=True):
            assert got.dtype == expected.dtype and got.shape == expected.shape
            torch.testing.assert_close(got, expected, rtol=0, atol=tol)
    return fused


def became(program: Program) -> list[str]:
    return [k.became for k in program.kernels()]


def linear_model(spelling: str, k: int = 24, n: int = 40, *, dims: str = "B,S", bias: bool = True, opset: int = 13) -> GraphModule:
    torch.manual_seed(0)
    steps = {
        "matmul": "y = MatMul(x, w)" if not bias else "m = MatMul(x, w)  y = Add(m, b)",
        "bias first": "m = MatMul(x, w)  y = Add(b, m)",
        "transposed": "t = Transpose<perm=[1,0]>(w)  m = MatMul(x, t)  y = Add(m, b)",
        "gemm": "y = Gemm(x, w, b)",
        "gemm transB": "y = Gemm<transB=1>(x, w, b)",
    }[spelling]
    shape = (n, k) if spelling in ("transposed", "gemm transB") else (k, n)
    text = f"""<ir_version: 8, opset_import: ["": {opset}]> g (float[{dims},{k}] x) => (float[{dims},{n}] y) {{ {steps} }}"""
    return load(text, w=torch.randn(shape), b=torch.randn(n))


def linear_of(gm: GraphModule):
    """The product of linear_model, whose weight may be transposed before it."""
    return next(n for n in gm.graph.nodes if getattr(n.target, "op_type", "") in ("MatMul", "Gemm"))


def quantize_weight_of(gm: GraphModule, **options) -> None:
    """As quantize_weight, also behind a Transpose."""
    node = linear_of(gm)
    turned = next((n for n in gm.graph.nodes if getattr(n.target, "op_type", "") == "Transpose"), None)
    quantize_weight(gm, node, **options) if turned is None else quantize_weight_behind(gm, turned, node, **options)


def quantize_weight_behind(gm: GraphModule, turned, node, **options) -> None:
    """dequantize the stored [N, K] weight, then Transpose."""
    from qgraph.ops import Q
    from qgraph.rewrite import add_constant
    from qgraph.types import TensorType
    from qgraph.views import const_value

    weight = turned.args[0]
    w = const_value(weight)
    scale = w.abs().amax(1) / 127
    with gm.graph.inserting_before(turned):
        stored, s = (
            gm.graph.get_attr(add_constant(gm, h, t)) for h, t in (("wi", Q.quantize(w, scale, None, "int8", 0, 0)), ("ws", scale))
        )
        new = gm.graph.call_function(Q.dequantize.default, (stored, s, None, "int8", 0, 0))
    new.meta["type"] = TensorType("float32", tuple(w.shape))
    turned.replace_input_with(weight, new)


# Dynamic activations.


@pytest.mark.parametrize(
    ("spelling", "dims"), [("matmul", "B,S"), ("bias first", "B,S"), ("transposed", "B,S"), ("gemm", "B"), ("gemm transB", "B")]
)
def test_a_dynamic_linear_with_its_bias_is_one_kernel(spelling, dims):
    gm = linear_model(spelling, dims=dims)
    quantize_weight_of(gm)
    quantize_dynamic(gm, placeholder(gm), [linear_of(gm)])
    x = torch.randn(*([3, 5] if dims == "B,S" else [7]), 24)
    program = both(ready(gm), x, tol=2e-5)
    assert became(program) == ["DynamicQuantizeMatMul"]
    assert [n.op_type for n in onnx.load(program.path).graph.node] == [
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "Mul",
        "Cast",
        "Mul",
        "Add",
    ]


def test_three_consumers_share_one_dynamic_quantization():
    torch.manual_seed(1)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (float[B,24] x) => (float[B,8] q, float[B,16] k, float[B,40] v) {
        a = MatMul(x, wq)  q = Add(a, bq)  k = MatMul(x, wk)  c = MatMul(x, wv)  v = Add(bv, c) }""",
        wq=torch.randn(24, 8), wk=torch.randn(24, 16), wv=torch.randn(24, 40), bq=torch.randn(8), bv=torch.randn(40),
    )  # fmt: skip
    for i in range(3):  # a quantization each, as if the consumers had been annotated one by one
        quantize_weight(gm, node_of(gm, "MatMul", i))
        quantize_dynamic(gm, placeholder(gm), [node_of(gm, "MatMul", i)])
    program = both(ready(gm), torch.randn(6, 24), tol=2e-5)
    assert became(program) == ["MatMulIntegerToFloat"] * 3
    assert [n.op_type for n in onnx.load(program.path).graph.node].count("DynamicQuantizeLinear") == 1


def test_dynamic_linear_with_an_asymmetric_weight_keeps_its_zero_points():
    gm = linear_model("matmul")
    quantize_weight(gm, linear_of(gm), dtype="uint8", symmetric=False)
    quantize_dynamic(gm, placeholder(gm), [linear_of(gm)])
    assert became(both(ready(gm), torch.rand(2, 3, 24) - 0.1, tol=2e-5)) == ["DynamicQuantizeMatMul"]


def test_a_float16_model_computes_dynamic_linears_in_integers():
    torch.manual_seed(0)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (float16[B,S,24] x) => (float16[B,S,40] y) { m = MatMul(x, w)  y = Add(m, b) }""",
        w=torch.randn(24, 40).half(), b=torch.randn(40).half(),
    )  # fmt: skip
    quantize_weight(gm, linear_of(gm))
    quantize_dynamic(gm, placeholder(gm), [linear_of(gm)])
    # the reference rounds the scale of x and the product to float16, the kernel only the result
    assert became(both(ready(gm), torch.randn(2, 5, 24).half(), tol=1e-1)) == ["DynamicQuantizeMatMul"]


# Static activations.


def static_linear(spelling: str, dims: str, *, output: bool, **options) -> GraphModule:
    gm = linear_model(spelling, dims=dims, **options)
    quantize_weight_of(gm)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    if output:
        out = next(n for n in gm.graph.nodes if n.op == "output")
        quantize_static(gm, out.args[0][0], -12.0, 15.0)
    return ready(gm)


@pytest.mark.parametrize("spelling", ["matmul", "transposed", "gemm", "gemm transB"])
@pytest.mark.parametrize("output", [False, True])
def test_a_static_linear_on_two_axes_becomes_qgemm_with_an_int32_bias(spelling, output):
    gm = static_linear(spelling, "B", output=output)
    program = both(gm, torch.randn(7, 24), tol=27 / 255 + 1e-4 if output else 5e-2)
    assert became(program) == ["QGemm"]
    assert np.int32 in {onnx.numpy_helper.to_array(i).dtype.type for i in onnx.load(program.path).graph.initializer}


@pytest.mark.parametrize("dims", ["B,S", "1,S", "3,5"])
@pytest.mark.parametrize("output", [False, True])
def test_a_static_linear_with_bias_on_more_axes_is_one_kernel_for_fixed_and_free_shapes(dims, output):
    gm = static_linear("matmul", dims, output=output)
    x = torch.randn(1 if dims[0] == "1" else 3, 5, 24)
    assert became(both(gm, x, tol=27 / 255 + 1e-4 if output else 2e-5)) == ["MatMulIntegerToFloat"]


def test_a_static_product_without_bias_becomes_qlinear_with_and_float_without_a_quantized_output():
    quantized = static_linear("matmul", "B,S", output=True, bias=False)
    assert became(both(quantized, torch.randn(2, 3, 24), tol=27 / 255 + 1e-4)) == ["QLinearMatMul"]
    floating = static_linear("matmul", "B,S", output=False, bias=False)
    assert became(both(floating, torch.randn(2, 3, 24), tol=2e-5)) == ["MatMulIntegerToFloat"]


@pytest.mark.parametrize("output", [False, True])
def test_a_float16_model_computes_static_linears_in_integers_and_keeps_its_type_outside(output):
    torch.manual_seed(0)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (float16[B,S,24] x) => (float16[B,S,40] y) { m = MatMul(x, w)  y = Add(m, b) }""",
        w=torch.randn(24, 40).half(), b=torch.randn(40).half(),
    )  # fmt: skip
    quantize_weight(gm, linear_of(gm))
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    if output:
        quantize_static(gm, node_of(gm, "Add"), -12.0, 15.0)
    program = both(ready(gm), torch.randn(2, 5, 24).half(), tol=27 / 255 + 1e-2 if output else 5e-2)
    assert became(program) == ["MatMulIntegerToFloat"]


def test_a_float16_residual_network_becomes_qlinear_kernels():
    torch.manual_seed(0)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (float16[B,8,H,W] x) => (float16[B,8,H,W] y) {
        c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Relu(c)  y = Add(r, x) }""",
        w=(torch.randn(8, 8, 3, 3) * 0.2).half(), b=torch.randn(8).half(),
    )  # fmt: skip
    quantize_weight(gm, node_of(gm, "Conv"))
    quantize_static(gm, node_of(gm, "Add"), -8.0, 12.0)
    quantize_static(gm, node_of(gm, "Relu"), 0.0, 7.0)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    assert became(both(ready(gm), torch.randn(2, 8, 9, 11).half(), tol=0.13)) == ["QLinearConv", "QLinearAdd"]


def test_int8_activations_are_emitted_as_uint8():
    gm = linear_model("matmul", dims="B,S")
    quantize_weight_of(gm)
    quantize_static(gm, placeholder(gm), -2.0, 3.0, spec=QSpec("int8", symmetric=False))
    program = both(ready(gm), torch.randn(2, 3, 24), tol=2e-5)
    zero = next(i for i in onnx.load(program.path).graph.initializer if i.data_type == onnx.TensorProto.UINT8)
    assert onnx.numpy_helper.to_array(zero) == 102  # round(2 / (5 / 255))


def conv_model(
    op: str, weight: torch.Tensor, *, attributes: str = "", tail: str = "", out: int | None = None, bias: torch.Tensor | None = None
):
    last = "r" if tail else "y"
    channels = weight.shape[1] if op == "Conv" and "group" not in attributes else weight.shape[0]
    text = f"""<ir_version: 8, opset_import: ["": 13]> g (float[B,{channels},H,W] x) => (float[B,{out or weight.shape[0]},P,Q] y)
        {{ {last} = {op}{f"<{attributes}>" if attributes else ""}(x, w, b)  {tail} }}"""
    return load(text, w=weight, b=torch.randn(out or weight.shape[0]) if bias is None else bias)


@pytest.mark.parametrize("attributes", ["pads=[1,1,1,1]", "strides=[2,2]", "dilations=[2,2], pads=[2,2,2,2]"])
def test_a_conv_with_quantized_output_becomes_qlinearconv(attributes):
    torch.manual_seed(0)
    gm = conv_model("Conv", torch.randn(12, 6, 3, 3) * 0.2, attributes=attributes)
    quantize_weight(gm, node_of(gm, "Conv"))
    quantize_static(gm, node_of(gm, "Conv"), -4.0, 5.0)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    # one output step: the kernel adds an int32 bias, the reference a float one
    assert became(both(ready(gm), torch.randn(2, 6, 9, 11), tol=9 / 255 + 1e-4)) == ["QLinearConv"]


def test_a_depthwise_conv_with_clip_is_one_kernel():
    torch.manual_seed(0)
    gm = conv_model("Conv", torch.randn(8, 1, 3, 3), attributes="group=8, pads=[1,1,1,1]", tail="y = Relu(r)")
    quantize_weight(gm, node_of(gm, "Conv"))
    quantize_static(gm, node_of(gm, "Relu"), 0.0, 6.0)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    assert became(both(ready(gm), torch.randn(1, 8, 9, 11), tol=6 / 255 + 1e-4)) == ["QLinearConv"]


def test_conv_without_quantized_output_is_reported_and_refused_when_strict():
    gm = conv_model("Conv", torch.randn(12, 6, 3, 3) * 0.2)
    quantize_weight(gm, node_of(gm, "Conv"))
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    (kernel,) = both(ready(gm), torch.randn(1, 6, 9, 11), tol=1e-3, strict=False).kernels()
    assert kernel == Kernel(
        "conv", "QLinearConv", "Conv", False, "its output is read in float, and the integer convolution has integer output only"
    )
    with pytest.raises(LoweringError, match=r"1 of 1 promised kernels were not used: conv: QLinearConv became Conv \(its output"):
        ORT.lower(gm, strict=True)


def test_a_conv_followed_by_an_activation_that_no_kernel_absorbs_says_so():
    gm = conv_model("Conv", torch.randn(12, 6, 3, 3) * 0.2, tail="y = Sigmoid(r)")
    quantize_weight(gm, node_of(gm, "Conv"))
    quantize_static(gm, node_of(gm, "Sigmoid"), 0.0, 1.0)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    (kernel,) = ORT.lower(ready(gm)).kernels()
    assert not kernel.fused and "goes to Sigmoid in float" in kernel.reason


def test_a_residual_network_runs_in_integers_from_end_to_end():
    torch.manual_seed(0)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (float[B,8,H,W] x) => (float[B,5] y) {
        c1 = Conv<pads=[1,1,1,1]>(x, w1, b1)  r1 = Relu(c1)  c2 = Conv<pads=[1,1,1,1]>(r1, w2, b2)  s = Add(c2, r1)
        g1 = GlobalAveragePool(s)  f = Flatten(g1)  y = Gemm<transB=1>(f, w3, b3) }""",
        w1=torch.randn(8, 8, 3, 3) * 0.2, b1=torch.randn(8), w2=torch.randn(8, 8, 3, 3) * 0.2, b2=torch.randn(8),
        w3=torch.randn(5, 8), b3=torch.randn(5),
    )  # fmt: skip
    for node in (node_of(gm, "Conv", 0), node_of(gm, "Conv", 1), node_of(gm, "Gemm")):
        quantize_weight(gm, node)
    ranges = {"Flatten": (-2.0, 9.0), "GlobalAveragePool": (-2.0, 9.0), "Add": (-8.0, 12.0), "Relu": (0.0, 7.0)}
    quantize_static(gm, node_of(gm, "Conv", 1), -8.0, 8.0)
    for op_type, (low, high) in ranges.items():
        quantize_static(gm, node_of(gm, op_type), low, high)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    program = both(ready(gm), torch.randn(2, 8, 9, 11), tol=0.2)
    assert became(program) == ["QLinearConv", "QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"]


@pytest.mark.parametrize("keepdims", [0, 1])
def test_a_spatial_mean_between_integers_becomes_an_integer_pool(keepdims):
    torch.manual_seed(0)
    rank = "B,8,1,1" if keepdims else "B,8"
    gm = load(
        f"""<ir_version: 8, opset_import: ["": 18]> g (float[B,8,5,7] x) => (float[{rank}] y)
        <int64[2] axes = {{2, 3}}> {{ y = ReduceMean<keepdims={keepdims}>(x, axes) }}"""
    )
    quantize_static(gm, node_of(gm, "ReduceMean"), -0.9, 1.1)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    assert became(both(ready(gm), torch.randn(2, 8, 5, 7), tol=2 / 255 + 1e-4)) == ["QLinearGlobalAveragePool"]


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
def test_a_bias_too_large_for_int32_is_computed_right(op):
    """ONNX Runtime saturates such a bias silently; one channel is 100 where x_scale * w_scale is 2e-8."""
    torch.manual_seed(0)
    bias = torch.randn(12)
    bias[3] = 100.0
    if op == "Conv":
        gm = conv_model("Conv", torch.randn(12, 6, 3, 3) * 1e-4, bias=bias)
    else:
        gm = load('<ir_version: 8, opset_import: ["": 13]> g (float[B,6] x) => (float[B,12] y) { y = Gemm<transB=1>(x, w, b) }',
                  w=torch.randn(12, 6) * 1e-4, b=bias)  # fmt: skip
    quantize_weight(gm, node_of(gm, op))
    quantize_static(gm, node_of(gm, op), -2.0, 100.0)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    x = torch.randn(2, 6, 5, 5) if op == "Conv" else torch.randn(9, 6)
    program = both(ready(gm), x, tol=102 / 255 + 1e-3)
    assert became(program) == ["QLinearConv" if op == "Conv" else "MatMulIntegerToFloat"]
    biases = [e for e in program.gm.meta["qgraph"].ledger if e.role == "bias"]
    assert [("coarser" in e.reason, e.decision) for e in biases] == ([(True, "int32")] if op == "Conv" else [])


def test_conv_transpose_weights_are_stored_as_integers_and_folded():
    torch.manual_seed(0)
    gm = conv_model("ConvTranspose", torch.randn(6, 10, 3, 2), out=10, attributes="strides=[2,1]")
    quantize_weight(gm, node_of(gm, "ConvTranspose"))
    program = both(ready(gm), torch.randn(1, 6, 5, 7), tol=1e-4)
    stored = {i.data_type: list(i.dims) for i in onnx.load(program.path).graph.initializer}
    assert stored[onnx.TensorProto.INT8] == [6, 10, 3, 2] and became(program) == ["ConvTranspose"]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "Gemm"])
@pytest.mark.parametrize("tail", ["", "y = Relu(r)"])
@pytest.mark.parametrize("weight", ["float", "folded"])
def test_a_product_kept_in_float_between_integers_is_not_quantized_by_the_runtime(op, tail, weight):
    """ONNX Runtime quantizes float weights between DequantizeLinear and QuantizeLinear by itself."""
    torch.manual_seed(0)
    if op == "Gemm":
        last = "r" if tail else "y"
        text = f'<ir_version: 8, opset_import: ["": 13]> g (float[B,6] x) => (float[B,12] y) {{ {last} = Gemm<transB=1>(x, w, b) {tail} }}'
        gm = load(text, w=torch.randn(12, 6), b=torch.randn(12))
    else:
        gm = conv_model(op, torch.randn(6, 6, 3, 3), tail=tail, out=6)
    if weight == "folded":
        quantize_weight(gm, node_of(gm, op), dtype="int4")
    quantize_static(gm, next(n for n in gm.graph.nodes if n.op == "output").args[0][0], 0.0 if tail else -9.0, 9.0)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    gm, x = ready(gm), torch.randn(8, 6) if op == "Gemm" else torch.randn(1, 6, 7, 7)
    (got,), (want,) = ORT.lower(copy.deepcopy(gm))(x), gm(x)
    # sums in another order may cross a tie, nothing else may differ
    assert ((got - want).abs() > 1e-5).float().mean() < 0.01


# Graphs whose products were fused before.


@pytest.mark.parametrize("activations", ["float", "static", "dynamic"])
def test_a_graph_with_fused_qg_ops_lowers_to_the_same_kernels(activations):
    gm = linear_model("matmul")
    quantize_weight_of(gm, **({"dtype": "int4", "group": 16} if activations == "float" else {}))
    if activations == "static":
        quantize_static(gm, placeholder(gm), -2.0, 3.0)
    if activations == "dynamic":
        quantize_dynamic(gm, placeholder(gm), [linear_of(gm)])
    FuseDequantMatmul()(ready(gm))
    assert {"dequant_linear", "quantized_linear"} & {n.target.__name__.split(".")[0] for n in gm.graph.nodes if n.op == "call_function"}
    kernel = {"float": "MatMulNBits", "static": "MatMulIntegerToFloat", "dynamic": "DynamicQuantizeMatMul"}[activations]
    assert became(both(gm, torch.randn(2, 5, 24), tol=2e-5)) == [kernel]


def test_a_fused_conv_lowers_to_qlinearconv():
    torch.manual_seed(0)
    gm = conv_model("Conv", torch.randn(12, 6, 3, 2) * 0.2, attributes="pads=[1,0,2,1], strides=[2,1]")
    quantize_weight(gm, node_of(gm, "Conv"))
    quantize_static(gm, node_of(gm, "Conv"), -4.0, 5.0)
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    FuseDequantMatmul()(ready(gm))
    assert "quantized_conv" in str([n.target for n in gm.graph.nodes])
    assert became(both(gm, torch.randn(2, 6, 9, 11), tol=9 / 255 + 1e-4)) == ["QLinearConv"]


# Weights only.


@pytest.mark.parametrize("spelling", ["matmul", "transposed", "gemm", "gemm transB"])
def test_int8_weights_are_multiplied_out_at_load_and_activations_stay_exact(spelling):
    gm = linear_model(spelling, dims="B" if "gemm" in spelling else "B,S")
    quantize_weight_of(gm)
    x = torch.randn(*([7] if "gemm" in spelling else [2, 5]), 24)
    program = both(ready(gm), x, tol=1e-5)
    assert [k.promised for k in program.kernels()] == [f"{linear_of(gm).target.op_type} with a folded weight"]
    assert "DequantizeLinear" not in {n.op_type for n in onnx.load(program.path).graph.node}


@pytest.mark.parametrize("k", [256, 200, 100])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("spelling", ["matmul", "gemm transB"])
def test_int4_groups_become_matmulnbits_in_float(k, symmetric, spelling):
    gm = linear_model(spelling, k, 40, dims="B" if "gemm" in spelling else "B,S")
    quantize_weight(gm, linear_of(gm), dtype="int4" if symmetric else "uint4", group=128, symmetric=symmetric)
    x = torch.randn(*([7] if "gemm" in spelling else [2, 5]), k)
    program = both(ready(gm), x, tol=1e-4)
    assert became(program) == ["MatMulNBits"]
    (node,) = onnx.load(program.path).graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {"K": k, "N": 40, "bits": 4, "block_size": 128, "accuracy_level": 1}
    assert len(node.input) == 6 and bool(node.input[3]) == (not symmetric)


@pytest.mark.parametrize(("bits", "k"), [(4, 256), (4, 200), (8, 256)])
def test_rows_quantized_in_the_weights_groups_become_accuracy_level_4(bits, k):
    gm = linear_model("matmul", k, 40)
    quantize_weight(gm, linear_of(gm), dtype=f"int{bits}", group=128)
    quantize_dynamic(gm, placeholder(gm), [linear_of(gm)], spec=QSpec("int8", True, PerGroup(-1, 128), dynamic=True))
    gm = ready(gm)
    x = torch.randn(2, 5, k)
    program = ORT.lower(copy.deepcopy(gm), strict=True)
    (node,) = onnx.load(program.path).graph.node
    assert {a.name: a.i for a in node.attribute}["accuracy_level"] == 4 and node.op_type == "MatMulNBits"
    want = gm(x)[0]
    # the same integers on both sides; the float sums run in another order
    torch.testing.assert_close(program(x)[0], want, rtol=0, atol=2e-4 * float(want.abs().max()))


@pytest.mark.parametrize(("dtype", "group"), [("int4", 0), ("int3", 64), ("uint4", 96), ("int4", 512)])
def test_other_group_sizes_are_split_into_blocks_that_exist(dtype, group):
    gm = linear_model("matmul", 600, 40)
    quantize_weight(gm, linear_of(gm), dtype=dtype, group=group, symmetric=not dtype.startswith("u"))
    assert became(both(ready(gm), torch.randn(2, 5, 600), tol=2e-3)) == ["MatMulNBits"]


def test_a_group_that_no_kernel_takes_is_multiplied_out():
    gm = linear_model("matmul", 25, 40)
    quantize_weight(gm, linear_of(gm), dtype="int4", group=10)
    assert became(both(ready(gm), torch.randn(2, 5, 25), tol=1e-4)) == ["MatMul"]


def test_a_float16_model_keeps_its_type_in_matmulnbits():
    torch.manual_seed(0)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (float16[B,256] x) => (float16[B,40] y) { m = MatMul(x, w)  y = Add(m, b) }""",
        w=torch.randn(256, 40).half(), b=torch.randn(40).half(),
    )  # fmt: skip
    quantize_weight(gm, linear_of(gm), dtype="int4", group=128)
    assert became(both(ready(gm), torch.randn(5, 256).half(), tol=0.1)) == ["MatMulNBits"]


# Embeddings.


@pytest.mark.parametrize(("width", "options", "op_type"), [
    (384, {}, "GatherBlockQuantized"), (41, {}, "GatherBlockQuantized"), (384, {"per_tensor": True}, "Gather"),
    (384, {"dtype": "uint8", "symmetric": False}, "GatherBlockQuantized"),
    (384, {"dtype": "uint4", "symmetric": False, "group": 32}, "GatherBlockQuantized"), (41, {"dtype": "int4"}, "Gather"),
])  # fmt: skip
def test_rows_of_an_integer_table_are_gathered_exactly(width, options, op_type):
    torch.manual_seed(0)
    gm = load(
        f'<ir_version: 8, opset_import: ["": 13]> g (int64[B,S] i) => (float[B,S,{width}] y) {{ y = Gather(w, i) }}',
        w=torch.randn(70, width),
    )
    quantize_weight(gm, node_of(gm, "Gather"), **options)
    program = both(ready(gm), torch.tensor([[0, 69, 3], [-1, 7, 7]]), tol=1e-6)
    assert op_type in {n.op_type for n in onnx.load(program.path).graph.node}
    assert "DequantizeLinear" not in {n.op_type for n in onnx.load(program.path).graph.node}


def test_a_table_shared_with_the_output_projection_serves_both():
    torch.manual_seed(0)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (int64[B,S] i) => (float[B,S,70] y) {
        h = Gather(w, i)  t = Transpose<perm=[1,0]>(w)  y = MatMul(h, t) }""",
        w=torch.randn(70, 32),
    )  # fmt: skip
    quantize_weight(gm, node_of(gm, "Gather"))
    turned = node_of(gm, "Transpose")
    turned.replace_input_with(turned.args[0], node_of(gm, "Gather").args[0])
    program = both(ready(gm), torch.tensor([[0, 69, 3]]), tol=1e-4)
    assert became(program) == ["GatherBlockQuantized", "MatMul"]


# Programs and files.


def test_a_program_takes_tensors_or_arrays_by_position_name_or_mapping():
    gm = linear_model("matmul")
    quantize_weight_of(gm)
    program = ORT.lower(ready(gm))
    x = torch.randn(2, 5, 24)
    (by_position,), (by_name,), (by_mapping,), (array,) = program(x), program(x=x), program({"x": x}), program(x.numpy())
    assert isinstance(array, np.ndarray) and isinstance(by_position, torch.Tensor)
    assert torch.equal(by_position, by_name) and torch.equal(by_position, by_mapping) and np.array_equal(by_position.numpy(), array)
    with pytest.raises(ModelError, match="the program takes x; got 2 positional"):
        program(x, x)
    with pytest.raises(ModelError, match="the program takes x; got 0 positional and z"):
        program(z=x)


def test_export_writes_a_checked_file_with_free_dimensions_and_a_readable_version(tmp_path):
    gm = static_linear("matmul", "B,S", output=False, opset=11)
    ORT.export(gm, tmp_path / "model.onnx", strict=True)
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim][:2] == ["B", "S"]
    assert {o.domain: o.version for o in model.opset_import} == {"": 11, "com.microsoft": 1}
    assert model.ir_version <= 13
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_external_data_stays_external_and_kernels_are_still_read_back(tmp_path):
    torch.manual_seed(0)
    text = (
        '<ir_version: 8, opset_import: ["": 13]> g (float[B,64] x) => (float[B,48] y) { h = MatMul(x, u)  m = MatMul(h, w)  y = Add(m, b) }'
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(torch.randn(*s).numpy(), n) for n, s in (("u", (64, 64)), ("w", (64, 48)), ("b", (48,)))
    )
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)
    gm = from_onnx(tmp_path / "in.onnx")
    first, second = (node_of(gm, "MatMul", i) for i in (0, 1))
    quantize_weight(gm, second)
    quantize_dynamic(gm, first, [second])
    x = torch.randn(3, 64)
    want = ready(gm)(x)[0]
    program = ORT.lower(gm, strict=True)
    program.save(tmp_path / "out.onnx")
    again = onnxruntime.InferenceSession(tmp_path / "out.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(again[0], want, atol=2e-1)  # another rounding of h may move its integers by one
    assert became(program) == ["DynamicQuantizeMatMul"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.data", "in.onnx", "out.onnx", "out.onnx.data"]


def test_products_in_the_bodies_of_control_flow_are_lowered_and_reported():
    torch.manual_seed(0)

    def body(name: str) -> str:
        values = ", ".join(f"{v:.3f}" for v in torch.randn(24).tolist())
        return f"{name} () => (float[B,6] {name}_y) <float[4,6] {name}_w = {{{values}}}> {{ {name}_y = MatMul(x, {name}_w) }}"

    text = f"""<ir_version: 8, opset_import: ["": 11]> g (bool c, float[B,4] x) => (float[B,6] y)
        {{ y = If(c) <then_branch = {body("t")}, else_branch = {body("e")}> }}"""
    gm = load(text)
    for part in list(graph_modules(gm))[1:]:
        node = next(n for n in part.graph.nodes if getattr(n.target, "op_type", "") == "MatMul")
        quantize_weight(part, node)
        quantize_dynamic(part, node.args[0], [node])
        ready(part)
    x = torch.randn(3, 4)
    program = ORT.lower(copy.deepcopy(gm), strict=True)
    for flag in (True, False):
        torch.testing.assert_close(program(torch.tensor(flag), x), ready(gm)(torch.tensor(flag), x), rtol=0, atol=2e-5)
    assert became(program) == ["DynamicQuantizeMatMul"] * 2


def test_per_axis_weights_raise_the_opset_to_13_and_16_bit_activations_to_21(tmp_path):
    gm = static_linear("gemm", "B", output=True, opset=11)
    ORT.export(gm, tmp_path / "a.onnx")
    assert onnx.load(tmp_path / "a.onnx").opset_import[0].version == 13
    gm = linear_model("gemm", dims="B", opset=13)
    quantize_weight(gm, linear_of(gm))
    quantize_static(gm, placeholder(gm), -2.0, 3.0, spec=QSpec("uint16", symmetric=False))
    want = ready(gm)(torch.ones(2, 24))
    ORT.export(gm, tmp_path / "b.onnx")
    assert onnx.load(tmp_path / "b.onnx").opset_import[0].version == 21
    (got,) = onnxruntime.InferenceSession(tmp_path / "b.onnx").run(None, {"x": np.ones((2, 24), np.float32)})
    np.testing.assert_allclose(got, want[0], atol=1e-4)


def test_nothing_is_written_when_the_runtime_refuses_the_model(tmp_path):
    gm = linear_model("matmul")
    gm.meta["onnx_graph"].opsets["no.such.domain"] = 1
    node = linear_of(gm)
    from qgraph.onnx_ops import op

    node.target = op("Nothing", domain="no.such.domain", version=1)
    node.meta.pop("onnx", None)
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(LoweringError, match="ONNX Runtime .* refuses the model"):
        ORT.export(ready(gm), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_weights_of_a_float16_model_are_multiplied_out_at_load():
    torch.manual_seed(0)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (float16[B,24] x) => (float16[B,40] y) { y = MatMul(x, w) }""",
        w=torch.randn(24, 40).half(),
    )
    quantize_weight(gm, linear_of(gm))
    both(ready(gm), torch.randn(5, 24).half(), tol=5e-2)


def test_convolutions_in_the_blocked_layout_are_found_where_they_leave_it():
    torch.manual_seed(0)
    gm = load(
        """<ir_version: 8, opset_import: ["": 13]> g (float[1,16,9,9] x) => (float[1,16,9,9] y) { c = Conv(x, w)  y = Softmax <axis = 3> (c) }""",
        w=torch.randn(16, 16, 1, 1),
    )
    quantize_weight(gm, node_of(gm, "Conv"))
    assert became(ORT.lower(ready(gm), strict=True)) == ["Conv"]


def test_weights_folded_in_bodies_of_control_flow_count_as_stored():
    torch.manual_seed(0)

    def body(name: str) -> str:
        values = ", ".join(f"{v:.3f}" for v in torch.randn(24).tolist())
        return f"{name} () => (float[B,6] {name}_y) <float[4,6] {name}_w = {{{values}}}> {{ {name}_y = MatMul(x, {name}_w) }}"

    gm = load(
        f"""<ir_version: 8, opset_import: ["": 13]> g (bool c, float[B,4] x) => (float[B,6] y)
        {{ y = If(c) <then_branch = {body("t")}, else_branch = {body("e")}> }}"""
    )
    for part in list(graph_modules(gm))[1:]:
        quantize_weight(part, node_of(part, "MatMul"))
        ready(part)
    assert [k.fused for k in ORT.lower(gm, strict=True).kernels()] == [True, True]


@pytest.mark.parametrize("dims", ["B,24", "5,24"])
def test_a_static_product_with_a_residual_or_a_row_as_bias_is_computed_in_integers(dims):
    torch.manual_seed(0)
    gm = load(
        f"""<ir_version: 8, opset_import: ["": 13]> g (float[{dims}] x) => (float[{dims}] y)
        {{ m = MatMul(x, w)  r = Add(m, x)  y = Relu(r) }}""",
        w=torch.randn(24, 24),
    )
    quantize_weight(gm, linear_of(gm))
    quantize_static(gm, placeholder(gm), -2.0, 3.0, readers=[linear_of(gm)])
    assert became(both(ready(gm), torch.randn(5, 24), tol=2e-5)) == ["MatMulIntegerToFloat"]
    gm = load(
        f"""<ir_version: 8, opset_import: ["": 13]> g (float[{dims}] x) => (float[{dims[:2]}16] y) {{ m = MatMul(x, w)  y = Add(b, m) }}""",
        w=torch.randn(24, 16), b=torch.randn(1, 16),
    )  # fmt: skip
    quantize_weight(gm, linear_of(gm))
    quantize_static(gm, placeholder(gm), -2.0, 3.0)
    assert became(both(ready(gm), torch.randn(5, 24), tol=5e-4)) == ["QGemm"]
