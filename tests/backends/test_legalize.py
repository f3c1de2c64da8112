"""The passes of the onnxruntime backend one by one: what they print, what they refuse, and byte layouts against a numpy reading of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qgraph
from qgraph.backends.onnxruntime.half import WidenHalf
from qgraph.backends.onnxruntime.legalize import (
    ClaimKernels,
    LowerQgOps,
    MultiplyOutWeights,
    QuantizeBiases,
    TurnWeights,
    coarser,
)
from qgraph.backends.onnxruntime.packing import block_size, container_bits, gather_blocks, kernel_bits, matmul_blocks
from qgraph.backends.onnxruntime.standard import onnx_integer
from qgraph.errors import LoweringError
from qgraph.onnx_io import opset
from qgraph.ops import Q, quantize_bias
from qgraph.passes import MergeEqual
from qgraph.pipeline import Context
from qgraph.testing import check
from qgraph.text import text
from qgraph.types import PerGroup, PerToken, QSpec, int_range
from tests.backends.by_hand import load, node_of, quantize_dynamic, quantize_static, quantize_weight, ready

HEADER = '<ir_version: 8, opset_import: ["": 13]>'


def matmul(k: int = 4, n: int = 6, *, bias: bool = True):
    torch.manual_seed(0)
    body = "m = MatMul(x, w)  y = Add(m, b)" if bias else "y = MatMul(x, w)"
    return load(f"{HEADER} g (float[B,S,{k}] x) => (float[B,S,{n}] y) {{ {body} }}", w=torch.randn(k, n), b=torch.randn(n))


def x_of(gm):
    return next(n for n in gm.graph.nodes if n.op == "placeholder")


# Packing.


def unpack(data: np.ndarray, bits: int) -> np.ndarray:
    """Bytes as the ONNX Runtime documentation describes them: the first of the codes in the lowest bits."""
    return np.stack([data >> shift & (2**bits - 1) for shift in range(0, 8, bits)], -1).reshape(*data.shape[:-1], -1)


PACKED = [("int4", 4), ("uint4", 4), ("int3", 4), ("uint2", 4), ("uint2", 2), ("int2", 2), ("int8", 8), ("uint8", 8), ("uint6", 8)]


@pytest.mark.parametrize(("dtype", "bits"), PACKED)
@pytest.mark.parametrize(("k", "group", "block"), [(64, 32, 32), (50, 32, 32), (96, 64, 32), (40, 96, 32), (33, 32, 16)])
@pytest.mark.parametrize("zero", [True, False])
def test_packed_blocks_read_back_as_the_dequantized_weight(dtype, k, group, block, zero, bits):
    rng = np.random.default_rng(0)
    low, high = int_range(dtype)
    count = -(-k // group)
    q, z = rng.integers(low, high + 1, (7, k)), rng.integers(low, high + 1, (7, count)) if zero else None
    scale = rng.uniform(0.1, 1.0, (7, count)).astype(np.float32)
    spread = lambda a: np.repeat(a, group, 1)[:, :k]
    want = (q - (spread(z) if zero else 0)) * spread(scale)

    tensors = [torch.from_numpy(np.asarray(a)).to(torch.int16) if a is not None else None for a in (q, z)]
    b = matmul_blocks(tensors[0], torch.from_numpy(scale), tensors[1], dtype, group=group, block=block, bits=bits)
    codes = unpack(b.data.numpy(), b.bits).astype(np.int64)
    blocks = codes.shape[1]
    assert codes.shape == (7, -(-k // block), block) and b.data.dtype == torch.uint8
    zeros = 2 ** (b.bits - 1) if b.zero_point is None else unpack(b.zero_point.numpy(), b.bits)[:, :blocks, None].astype(np.int64)
    got = ((codes - zeros) * b.scale.numpy()[:, :, None]).reshape(7, -1)
    np.testing.assert_allclose(got[:, :k], want, rtol=1e-6)
    assert not got[:, k:].any()  # the padding adds nothing


def test_zero_points_in_the_middle_are_not_stored():
    q, scale = torch.zeros(3, 32, dtype=torch.int8), torch.ones(3, 1)
    assert matmul_blocks(q, scale, None, "int4", group=32, block=32).zero_point is None
    assert matmul_blocks(q.to(torch.uint8), scale, torch.full((3, 1), 8), "uint4", group=32, block=32).zero_point is None
    assert matmul_blocks(q.to(torch.uint8), scale, None, "uint4", group=32, block=32).zero_point is not None  # None means 0
    assert gather_blocks(q, scale, torch.full((3, 1), 1), "int8", block=32).zero_point.tolist() == [[129]] * 3


def test_odd_rows_have_no_4_bit_layout():
    assert gather_blocks(torch.zeros(3, 5, dtype=torch.int8), torch.ones(3, 1), None, "int4", block=16) is None


def test_blocks_are_the_largest_power_of_two_that_divides_the_group():
    assert [block_size(g) for g in (16, 32, 96, 128, 256, 512, 768)] == [16, 32, 32, 128, 256, 256, 256]
    assert block_size(8) is None and block_size(40) is None
    assert [container_bits(d) for d in ("int2", "uint4", "int5", "uint8")] == [4, 4, 8, 8]
    assert [kernel_bits("uint2", level=level, block=block) for level, block in ((4, 64), (4, 128), (4, 32), (1, 64))] == [2, 2, 4, 4]
    assert [onnx_integer(d) for d in ("int2", "int3", "uint4", "int5", "uint6", "int16")] == [
        "int2",
        "int4",
        "uint4",
        "int8",
        "uint8",
        "int16",
    ]


# Passes.


def test_a_transposed_weight_is_turned_with_its_axis():
    torch.manual_seed(0)
    gm = load(f"{HEADER} g (float[B,4] x) => (float[B,6] y) {{ t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t) }}", w=torch.randn(6, 4))
    node = node_of(gm, "Transpose")
    with gm.graph.inserting_before(node):
        q, scale = torch.randint(-127, 128, (6, 4), dtype=torch.int8), torch.rand(6) + 0.1
        gm.register_buffer("q", q)
        gm.register_buffer("s", scale)
        new = gm.graph.call_function(Q.dequantize.default, (gm.graph.get_attr("q"), gm.graph.get_attr("s"), None, "int8", -2, 0))
    node.replace_input_with(node.args[0], new)
    x = torch.randn(3, 4)
    want = x @ (q.float() * scale[:, None]).T
    check(
        TurnWeights(),
        (ready(gm), (want,)),
        (x,),
        """
        %0: f32[4,6] = qg.dequantize(@q_3, @s, None, 'int8', 1, 0)
        %1: f32[B,6] = onnx.MatMul(%x, %0)
        return %1
        """,
    )


def test_a_turned_weight_keeps_its_groups():
    torch.manual_seed(0)
    gm = load(f"{HEADER} g (float[B,5] x) => (float[B,6] y) {{ t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t) }}", w=torch.randn(6, 5))
    node = node_of(gm, "Transpose")
    q, scale, zero = (
        torch.randint(0, 16, (6, 5), dtype=torch.uint8),
        torch.rand(6, 2) + 0.1,
        torch.randint(0, 16, (6, 2), dtype=torch.uint8),
    )
    with gm.graph.inserting_before(node):
        for name, t in (("q", q), ("s", scale), ("z", zero)):
            gm.register_buffer(name, t)
        new = gm.graph.call_function(Q.dequantize.default, (*(gm.graph.get_attr(n) for n in "qsz"), "uint4", 1, 4))
    node.replace_input_with(node.args[0], new)
    x = torch.randn(3, 5)
    check(TurnWeights(), (ready(gm), (x @ Q.dequantize(q, scale, zero, "uint4", 1, 4).T,)), (x,), None)
    assert "onnx.Transpose" not in text(gm) and "'uint4', 0, 4)" in text(gm)


def test_a_dynamic_linear_prints_as_the_spelling_that_is_fused():
    gm = matmul()
    quantize_weight(gm, node_of(gm, "MatMul"))
    quantize_dynamic(gm, x_of(gm), [node_of(gm, "MatMul")])
    x = torch.randn(2, 3, 4)
    check(
        ClaimKernels(),
        (ready(gm), gm(x)),
        (x,),
        """
        %0: ? = qg.dynamic_quantize(%x, 'uint8', False, None, 0)
        %1: ? = getitem(%0, 0)
        %2: ? = getitem(%0, 1)
        %3: ? = getitem(%0, 2)
        %4: i32[B,S,6] = onnx.MatMulInteger(%1, @w_int, %3)
        %5: f32[...] = onnx.Mul(%2, @mat_mul_scale)
        %6: f32[B,S,6] = onnx.Cast(%4, to=1)
        %7: f32[B,S,6] = onnx.Mul(%6, %5)
        %8: f32[B,S,6] = onnx.Add(%7, @mat_mul_bias)
        return %8
        """,
    )


@pytest.mark.parametrize(("attribute", "reason"), [("transA=1", "no transposed x"), ("alpha=0.5", "no alpha")])
def test_a_gemm_that_matmulinteger_cannot_express_is_declined_and_still_right(attribute, reason):
    torch.manual_seed(0)
    rows = "4,B" if "trans" in attribute else "B,4"
    gm = load(f"{HEADER} g (float[{rows}] x) => (float[B,6] y) {{ y = Gemm<{attribute}>(x, w, b) }}", w=torch.randn(4, 6), b=torch.randn(6))
    quantize_weight(gm, node_of(gm, "Gemm"))
    quantize_dynamic(gm, x_of(gm), [node_of(gm, "Gemm")])
    gm, ctx = ready(gm), Context()
    x = torch.randn((4, 3) if "trans" in attribute else (3, 4))
    want = gm(x)
    assert ClaimKernels().run(gm, ctx) == 0 and reason in ctx.declines[0].reason
    MultiplyOutWeights()(gm)
    LowerQgOps()(gm)
    torch.testing.assert_close(gm(x), want)


def test_equal_dynamic_quantizations_are_merged_after_lowering():
    gm = load(f"{HEADER} g (float[B,4] x) => (float[B,6] y, float[B,3] z) {{ y = MatMul(x, w)  z = MatMul(x, v) }}",
              w=torch.randn(4, 6), v=torch.randn(4, 3))  # fmt: skip
    for i in (0, 1):
        quantize_weight(gm, node_of(gm, "MatMul", i))
        quantize_dynamic(gm, x_of(gm), [node_of(gm, "MatMul", i)])
    gm, x = ready(gm), torch.randn(3, 4)
    want = gm(x)
    for step in (ClaimKernels(), LowerQgOps(), MergeEqual()):
        step(gm)
    assert text(gm).count("DynamicQuantizeLinear") == 1
    torch.testing.assert_close(gm(x), want)


@pytest.mark.parametrize(("options", "k"), [({}, 5), ({"per_tensor": True}, 5), ({"dtype": "uint8", "symmetric": False}, 5),
                                            ({"dtype": "int4", "group": 5}, 10), ({"dtype": "uint4", "symmetric": False, "group": 4}, 10)])  # fmt: skip
def test_multiplied_out_weights_are_bit_equal_to_the_dequantized_ones(options, k):
    gm = matmul(k, bias=False)
    quantize_weight(gm, node_of(gm, "MatMul"), **options)
    x = torch.eye(k)[None]  # the product is the weight itself
    check(MultiplyOutWeights(), (ready(gm), gm(x)), (x,), None, tol=0)
    assert "qg." not in text(gm) and "onnx.Cast" in text(gm)


def test_conv_weights_are_multiplied_out_along_the_channel_axis_of_each_layout():
    torch.manual_seed(0)
    for op_type, shape in (("Conv", (6, 4, 3, 2)), ("ConvTranspose", (4, 6, 3, 2))):
        gm = load(f"{HEADER} g (float[B,4,H,W] x) => (float[B,6,P,Q] y) {{ y = {op_type}(x, w) }}", w=torch.randn(shape))
        quantize_weight(gm, node_of(gm, op_type))
        x = torch.randn(1, 4, 5, 6)
        # Not exact: the same weights in another memory layout may take another convolution algorithm.
        check(MultiplyOutWeights(), (ready(gm), gm(x)), (x,), None, tol=1e-5)


def test_weights_of_integer_sites_stay_dequantize_linear_with_zero_points():
    gm = matmul(bias=False)
    quantize_weight(gm, node_of(gm, "MatMul"))
    quantize_static(gm, x_of(gm), -2.0, 3.0)
    x = torch.randn(2, 3, 4)
    check(
        lambda g: (MultiplyOutWeights()(g), LowerQgOps()(g)),
        (ready(gm), gm(x)),
        (x,),
        """
        %0: u8[B,S,4] = onnx.QuantizeLinear(%x, @x_scale, @x_zero_point)
        %1: f32[B,S,4] = onnx.DequantizeLinear(%0, @x_scale, @x_zero_point)
        %2: f32[4,6] = onnx.DequantizeLinear(@w_int, @w_scale, @dequantize_default_zero_point, axis=1)
        %3: f32[B,S,6] = onnx.MatMul(%1, %2)
        return %3
        """,
    )


def test_the_bias_scale_of_a_conv_is_the_product_of_the_others():
    torch.manual_seed(0)
    gm = load(f"{HEADER} g (float[B,4,H,W] x) => (float[B,6,P,Q] y) {{ y = Conv(x, w, b) }}", w=torch.randn(6, 4, 3, 2), b=torch.randn(6))
    quantize_weight(gm, node_of(gm, "Conv"))
    quantize_static(gm, x_of(gm), -2.0, 3.0)
    x = torch.randn(1, 4, 5, 6)
    bias = gm.b
    check(QuantizeBiases(), (ready(gm), gm(x)), (x,), None, tol=1e-3)
    node = node_of(gm, "Conv").args[2]
    q, scale = (getattr(gm, a.target) for a in node.args)
    assert q.dtype == torch.int32 and torch.equal(scale, gm.x_scale * gm.w_scale)
    torch.testing.assert_close(q * scale, bias, rtol=0, atol=float(scale.max()) / 2)


def test_a_coarser_weight_makes_room_for_its_bias_and_leaves_other_channels_alone():
    torch.manual_seed(0)
    q, scale = torch.randint(-127, 128, (6, 4, 3, 2), dtype=torch.int8), torch.full((6,), 1e-8)
    bias = torch.tensor([0.1, -2.0, 300.0, 0.0, -4000.0, 1.0])
    x_scale = torch.tensor(0.02)
    assert isinstance(quantize_bias(bias, x_scale, scale), str)
    q2, scale2 = coarser(q, scale, bias, x_scale, 0)
    found = quantize_bias(bias, x_scale, scale2)
    assert isinstance(found, torch.Tensor)
    kept = [0, 3]
    assert torch.equal(q2[kept], q[kept]) and torch.equal(scale2[kept], scale[kept])
    torch.testing.assert_close(found * (x_scale * scale2), bias, rtol=1e-6, atol=1e-9)
    error = (q2 * scale2[:, None, None, None] - q * scale[:, None, None, None]).abs().amax((1, 2, 3))
    assert (24 * 255 * 0.02 * error <= 1e-5 * bias.abs() + 1e-12).all()


def test_half_graphs_are_widened_around_integer_products_only():
    torch.manual_seed(0)
    gm = load(f"{HEADER} g (float16[B,4] x) => (float16[B,6] y, float16[B,3] z) {{ y = MatMul(x, w)  z = MatMul(x, v) }}",
              w=torch.randn(4, 6).half(), v=torch.randn(4, 3).half())  # fmt: skip
    quantize_weight(gm, node_of(gm, "MatMul"))
    quantize_static(gm, x_of(gm), -2.0, 3.0, readers=[node_of(gm, "MatMul")])
    x = torch.randn(3, 4).half()
    check(WidenHalf(), (ready(gm), gm(x)), (x,), None, tol=5e-3)
    assert [n.meta["type"].dtype for n in gm.graph.nodes if getattr(n.target, "op_type", "") == "MatMul"] == ["float32", "float16"]


@pytest.mark.parametrize(("spec", "version"), [(QSpec("uint8", False), 10), (QSpec("int16"), 21), (QSpec("uint4", False), 21)])
def test_the_opset_is_what_the_integer_type_needs(spec, version):
    gm = load('<ir_version: 8, opset_import: ["": 10]> g (float[B,4] x) => (float[B,4] y) { y = Relu(x) }')
    quantize_static(gm, x_of(gm), -2.0, 3.0, spec=spec)
    x = torch.randn(3, 4)
    check(LowerQgOps(), (ready(gm), gm(x)), (x,), None)
    assert opset(gm) == version


def test_float16_scales_need_opset_19_and_stay_float16():
    gm = load(f"{HEADER} g (float16[B,4] x) => (float16[B,4] y) {{ y = Relu(x) }}")
    quantize_static(gm, x_of(gm), -2.0, 3.0)
    x = torch.randn(3, 4).half()
    check(LowerQgOps(), (ready(gm), gm(x)), (x,), None, tol=1e-3)
    assert opset(gm) == 19 and gm.x_scale.dtype == torch.float16


@pytest.mark.parametrize("spec", [QSpec("int16", True, PerToken(), dynamic=True), QSpec("int8", True, PerGroup(-1, 2), dynamic=True)])
def test_a_dynamic_format_without_a_kernel_is_an_error_that_names_the_node_and_the_way_out(spec):
    gm = load(f"{HEADER} g (float[B,4] x) => (float[B,4] y) {{ y = Relu(x) }}")
    quantize_dynamic(gm, x_of(gm), [node_of(gm, "Relu")], spec=spec)
    with pytest.raises(
        LoweringError, match="dynamic_quantize.*int(8|16) symmetric per (token|group of 2).*use uint8 asymmetric per tensor"
    ):
        LowerQgOps()(ready(gm))


def test_an_integer_type_that_onnx_lacks_is_an_error():
    gm = load(f"{HEADER} g (float[B,4] x) => (float[B,4] y) {{ y = Relu(x) }}")
    quantize_static(gm, x_of(gm), -2.0, 3.0, spec=QSpec("uint6", False))
    with pytest.raises(LoweringError, match="no QuantizeLinear to uint6; use int8 or uint8"):
        LowerQgOps()(ready(gm))


@pytest.mark.parametrize(("recipe", "bits"), [("w3a16-g32-sym", 4), ("w2a8-g64-sym", 2), ("w2a16-g32", 4), ("w6a8-g32-sym", 8)])
def test_codes_of_other_widths_run_and_the_ledger_says_what_holds_them(recipe, bits):
    torch.manual_seed(0)
    net, x = torch.nn.Sequential(torch.nn.Linear(128, 96), torch.nn.ReLU(), torch.nn.Linear(96, 40)).eval(), torch.randn(5, 128)
    quantized = qgraph.quantize(net, example_inputs=(x,), recipe=recipe)
    program = qgraph.lower(quantized, strict=True)
    want = quantized(x)
    np.testing.assert_allclose(np.asarray(program(x)), want.detach(), atol=0.01 * float(want.abs().max()))
    noted = [e.decision for e in program.gm.meta["qgraph"].ledger if e.role == "container"]
    assert noted == ([] if recipe.startswith("w2a8") else [f"{bits} bits"] * 2)
