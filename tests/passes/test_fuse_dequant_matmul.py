"""Linear and conv of dequantized operands become fused ops: every spelling, and every reason not to."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraph.ops import Q
from qgraph.passes import FuseDequantMatmul
from qgraph.pipeline import Context, Pipeline
from qgraph.testing import check, from_onnx, from_torch
from qgraph.text import text

torch.manual_seed(0)
X = torch.tensor([[0.31, -1.7, 2.2, 0.6], [1.4, 0.05, -0.4, -2.3]])


class Buffers(nn.Module):
    """x: uint8 asymmetric; weight [3, 4] int8 per channel; result int8."""

    def __init__(self, forward, **changed) -> None:
        super().__init__()
        values = {
            "w": torch.tensor([[5, -6, 2, 100], [127, -1, -8, 3], [0, 77, -50, 9]], dtype=torch.int8),
            "ws": torch.tensor([0.012, 0.03, 0.007]),
            "wz": torch.tensor([1, -2, 0], dtype=torch.int8),
            "xs": torch.tensor(0.02),
            "xz": torch.tensor(119, dtype=torch.uint8),
            "ys": torch.tensor(0.05),
            "yz": torch.tensor(-7, dtype=torch.int8),
            "b": torch.tensor([0.25, -4.0, 1.5]),
        } | changed
        for name, value in values.items():
            self.register_buffer(name, value)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)

    def weight(self, axis=0, group=0):
        return Q.dequantize(self.w, self.ws, self.wz, "int8", axis, group)

    def activation(self, x):
        return Q.dequantize(Q.quantize(x, self.xs, self.xz, "uint8"), self.xs, self.xz, "uint8")

    def result(self, y):
        return Q.dequantize(Q.quantize(y, self.ys, self.yz, "int8"), self.ys, self.yz, "int8")


def reasons(module, *, x=X, options=None):
    """Runs on a torch module that must not be changed; returns why."""
    gm, _ = from_torch(module, x)
    before, ctx = text(gm), Context()
    FuseDequantMatmul(**options or {"activations": "static"}).run(gm, ctx)
    assert text(gm) == before
    return {d.reason for d in ctx.declines}


# Linear, from torch


def test_a_float_x_keeps_its_form_and_the_weight_stays_integers() -> None:
    net = Buffers(lambda s, x: F.linear(x, s.weight(), s.b))
    check(FuseDequantMatmul(), from_torch(net, X), (X,), """
        %0: f32[2,3] = qg.dequant_linear(%x, @w, @ws, @wz, @b, 'int8', 0)
        return %0
    """)  # fmt: skip


def test_static_activations_are_summed_as_integers() -> None:
    net = Buffers(lambda s, x: F.linear(s.activation(x), s.weight(), s.b))
    check(FuseDequantMatmul(), from_torch(net, X), (X,), """
        %0: u8[2,4] = qg.quantize(%x, @xs, @xz, 'uint8')
        %1: f32[2,3] = qg.quantized_linear(%0, @xs, @xz, 'uint8', @w, @ws, @wz, 'int8', @b)
        return %1
    """)  # fmt: skip


def test_dynamic_activations_bring_their_scales_along() -> None:
    def forward(s, x):
        return F.linear(Q.dequantize(*Q.dynamic_quantize(x, "uint8", False, -1, -1), "uint8", -1, -1), s.weight(), s.b)

    check(FuseDequantMatmul(), from_torch(Buffers(forward), X), (X,), """
        %0: (u8[2,4], f32[2,1], u8[2,1]) = qg.dynamic_quantize(%x, 'uint8', False, -1, -1)
        %1: u8[2,4] = getitem(%0, 0)
        %2: f32[2,1] = getitem(%0, 1)
        %3: u8[2,1] = getitem(%0, 2)
        %4: f32[2,3] = qg.quantized_linear(%1, %2, %3, 'uint8', @w, @ws, @wz, 'int8', @b)
        return %4
    """)  # fmt: skip


def test_a_quantized_result_is_requantized() -> None:
    net = Buffers(lambda s, x: s.result(F.linear(s.activation(x), s.weight(), s.b)))
    check(FuseDequantMatmul(), from_torch(net, X), (X,), """
        %0: u8[2,4] = qg.quantize(%x, @xs, @xz, 'uint8')
        %1: i8[2,3] = qg.quantized_linear(%0, @xs, @xz, 'uint8', @w, @ws, @wz, 'int8', @b, @ys, @yz, 'int8')
        %2: f32[2,3] = qg.dequantize(%1, @ys, @yz, 'int8')
        return %2
    """)  # fmt: skip


def test_a_weight_in_groups_is_transposed_with_its_parameters() -> None:
    scales, zeros = torch.rand(2, 3) * 0.1 + 0.01, torch.tensor([[1, -2, 0], [3, 4, -5]], dtype=torch.int8)
    net = Buffers(lambda s, x: x @ s.weight(0, 2) + s.b, w=torch.randint(-128, 128, (4, 3), dtype=torch.int8), ws=scales, wz=zeros)
    gm = check(FuseDequantMatmul(), from_torch(net, X), (X,), None)
    assert text(gm).startswith("%0: f32[2,3] = qg.dequant_linear(%x, ")
    assert text(gm).endswith(", @b, 'int8', 2)\nreturn %0")
    assert sorted(tuple(b.shape) for n, b in gm.named_buffers() if n[0] == "w") == [(3, 2), (3, 2), (3, 4)]


def test_one_transposed_weight_serves_two_readers() -> None:
    net = Buffers(lambda s, x: (x @ s.weight(1), (2 * x) @ s.weight(1)), w=torch.randint(-128, 128, (4, 3), dtype=torch.int8))
    gm = check(FuseDequantMatmul(), from_torch(net, X), (X,), None)
    assert [tuple(b.shape) for b in gm.buffers() if b.dim() == 2] == [(3, 4)]
    assert text(gm).count("qg.dequant_linear") == 2


def test_activations_selects_the_form() -> None:
    net = Buffers(lambda s, x: F.linear(s.activation(x), s.weight(), s.b))
    gm = check(FuseDequantMatmul(activations="float"), from_torch(net, X), (X,), None)
    assert "qg.dequant_linear(%1, @w" in text(gm)
    assert reasons(net, options={"activations": "dynamic"}) == set()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_short_floats_stay_short(kind: torch.dtype) -> None:
    changed = {k: v.to(kind) for k, v in Buffers(None).named_buffers() if v.is_floating_point()}
    net = Buffers(lambda s, x: F.linear(s.activation(x), s.weight(), s.b), **changed)
    gm = check(FuseDequantMatmul(), from_torch(net, X.to(kind)), (X.to(kind),), None, tol=0.02)
    assert "qg.quantized_linear" in text(gm) and gm(X.to(kind)).dtype == kind


# Convolution, from torch


def test_conv_with_static_activations_and_a_quantized_result() -> None:
    image = torch.randn(1, 4, 5, 6)

    def forward(s, x):
        return s.result(F.conv2d(s.activation(x), s.weight(), s.b, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2))

    wide = {"w": torch.randint(-127, 128, (6, 2, 3, 2), dtype=torch.int8), "ws": torch.rand(6) * 0.02 + 0.01, "b": torch.randn(6)}
    net = Buffers(forward, **wide, wz=torch.arange(6, dtype=torch.int8) - 3)
    check(FuseDequantMatmul(), from_torch(net, image), (image,), """
        %0: u8[1,4,5,6] = qg.quantize(%x, @xs, @xz, 'uint8')
        %1: i8[1,6,3,4] = qg.quantized_conv(%0, @xs, @xz, 'uint8', @w, @ws, @wz, 'int8', @b, [2, 1], [1, 0, 1, 0], [1, 2], 2, @ys, @yz, 'int8')
        %2: f32[1,6,3,4] = qg.dequantize(%1, @ys, @yz, 'int8')
        return %2
    """)  # fmt: skip


def test_conv_of_a_float_image_keeps_integers_in_its_weight() -> None:
    signal = torch.randn(2, 4, 9)
    net = Buffers(lambda s, x: F.conv1d(x, s.weight(), s.b, padding=1), w=torch.randint(-127, 128, (3, 4, 3), dtype=torch.int8))
    check(FuseDequantMatmul(), from_torch(net, signal), (signal,), """
        %0: f32[2,3,9] = qg.dequant_conv(%x, @w, @ws, @wz, @b, 'int8', [1], [1, 1], [1], 1)
        return %0
    """)  # fmt: skip


# From ONNX

ONNX_WEIGHT = "int8[4,3] w = {5, 127, 0, -6, -1, 77, 2, -8, -50, 100, 3, 9}, float[3] ws = {0.012, 0.03, 0.007}, int8[3] wz = {1, -2, 0}"


def test_onnx_matmul_with_dequantized_operands_joins_its_add_and_its_quantize() -> None:
    start = from_onnx(f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[m,4] x) => (int8[m,3] y)
          <{ONNX_WEIGHT}, float xs = {{0.02}}, uint8 xz = {{119}}, float[3] b = {{0.25, -4.0, 1.5}}, float ys = {{0.05}}, int8 yz = {{-7}}> {{
            q = QuantizeLinear (x, xs, xz)
            d = DequantizeLinear (q, xs, xz)
            v = DequantizeLinear <axis = 1> (w, ws, wz)
            h = MatMul (d, v)
            r = Add (b, h)
            y = QuantizeLinear (r, ys, yz)
        }}""", X)  # fmt: skip
    gm = check(FuseDequantMatmul(), start, (X,), None)
    lines = text(gm).splitlines()
    assert len(lines) == 3 and "QuantizeLinear(%x, @xs, @xz" in lines[0]
    assert "qg.quantized_linear(%0, @xs, @xz, 'uint8', @w_" in lines[1] and lines[1].endswith("'int8', @b, @ys, @yz, 'int8')")
    assert next(b for b in gm.buffers() if b.dim() == 2).shape == (3, 4)


def test_onnx_dynamic_gemm_reads_the_three_outputs() -> None:
    start = from_onnx(f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[m,4] x) => (float[m,3] y)
          <{ONNX_WEIGHT}, float[1,3] b = {{0.25, -4.0, 1.5}}> {{
            q, s, z = DynamicQuantizeLinear (x)
            d = DequantizeLinear (q, s, z)
            v = DequantizeLinear <axis = 1> (w, ws, wz)
            y = Gemm (d, v, b)
        }}""", X)  # fmt: skip
    gm = check(FuseDequantMatmul(), start, (X,), None)
    assert "qg.quantized_linear(%1, %2, %3, 'uint8', @w_" in text(gm)
    assert "Gemm" not in text(gm)


def test_onnx_conv_and_blocked_gemm_are_fused() -> None:
    image = torch.randn(1, 2, 4, 4)
    start = from_onnx("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[1,2,4,4] x) => (float[1,2,4,5] y)
          <int8[2,1,2,2] w = {1, -2, 30, 4, 5, 60, -7, 8}, float[2] ws = {0.5, 0.25}, int8[2] wz = {3, -4}, float[2] b = {1.0, -2.0}> {
            v = DequantizeLinear <axis = 0> (w, ws, wz)
            y = Conv <group = 2, pads = [1, 0, 0, 2]> (x, v, b)
        }""", image)  # fmt: skip
    gm = check(FuseDequantMatmul(), start, (image,), None)
    assert "qg.dequant_conv(%x, @w, @ws, @wz, @b, 'int8', [1, 1], [1, 0, 0, 2], [1, 1], 2)" in text(gm)
    start = from_onnx("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,4] x) => (float[2,3] y)
          <int8[3,4] w = {5, -6, 2, 100, 127, -1, -8, 3, 0, 77, -50, 9}, float[3,2] ws = {0.01, 0.02, 0.03, 0.04, 0.05, 0.06}, float b = {1.5}> {
            v = DequantizeLinear <axis = 1, block_size = 2> (w, ws)
            y = Gemm <transB = 1> (x, v, b)
        }""", X)  # fmt: skip
    gm = check(FuseDequantMatmul(), start, (X,), None)
    assert "qg.dequant_linear(%x, @w, @ws, None, @" in text(gm) and text(gm).endswith("'int8', 2)\nreturn %0")


# Refusals


def test_declines_scales_along_the_inputs() -> None:
    net = Buffers(lambda s, x: F.linear(s.activation(x), s.weight(1), s.b), ws=torch.rand(4), wz=torch.zeros(4, dtype=torch.int8))
    assert reasons(net, options={"activations": "any"}) == {"the weight's scales run along its inputs: axis 1, group 0"}


def test_declines_integer_sums_across_groups() -> None:
    groups = {"ws": torch.rand(3, 2), "wz": torch.zeros(3, 2, dtype=torch.int8)}
    net = Buffers(lambda s, x: F.linear(s.activation(x), s.weight(1, 2), s.b), **groups)
    assert reasons(net) == {"the weight has a scale per group of 2 inputs: integers of different scales do not add up"}


def test_declines_x_with_scales_along_its_inputs() -> None:
    many = {"xs": torch.rand(4), "xz": torch.zeros(4, dtype=torch.uint8)}

    def forward(s, x):
        return F.linear(Q.dequantize(Q.quantize(x, s.xs, s.xz, "uint8", 1), s.xs, s.xz, "uint8", 1), s.weight(), s.b)

    assert reasons(Buffers(forward, **many)) == {"x has scales along axis 1; an integer sum needs one for the tensor or one per row"}


def test_declines_a_weight_that_is_computed() -> None:
    net = Buffers(lambda s, x: F.linear(s.activation(x), Q.dequantize(s.w + 1, s.ws, s.wz, "int8", 0), s.b))
    assert reasons(net, options={"activations": "any"}) == {"the weight is not a constant, one integer per element"}


def test_declines_alpha() -> None:
    net = Buffers(lambda s, x: torch.addmm(s.b, s.activation(x), s.weight().T, alpha=0.5))
    assert reasons(net) == set()  # a transposed view of the weight is no dequantize
    net = Buffers(lambda s, x: torch.addmm(s.b, s.activation(x), s.weight(1), alpha=0.5), w=torch.ones(4, 3, dtype=torch.int8))
    assert reasons(net) == {"alpha=0.5, beta=1: fold them into the scales first"}


def test_declines_a_sum_that_may_leave_int32() -> None:
    wide = {"w": torch.full((3, 4), 32767, dtype=torch.int16), "wz": torch.zeros(3, dtype=torch.int16)}

    def forward(s, x):
        q = Q.quantize(x, s.xs, None, "int16")
        return F.linear(Q.dequantize(q, s.xs, None, "int16"), Q.dequantize(s.w, s.ws, s.wz, "int16", 0), s.b)

    assert reasons(Buffers(forward, **wide)) == {"the sum over 4 products of int16 with these weights may reach 4.29e+09, beyond int32"}


def test_declines_to_requantize_a_result_that_is_read_elsewhere_or_per_channel() -> None:
    both = Buffers(lambda s, x: (s.result(y := F.linear(s.activation(x), s.weight(), s.b)), y))
    gm, _ = from_torch(both, X)
    ctx = Context()
    FuseDequantMatmul().run(gm, ctx)
    assert {d.reason for d in ctx.declines if d.rule == "requantize"} == {"%quantized_linear_default is read elsewhere too, as it is"}
    scales = Buffers(lambda s, x: Q.quantize(F.linear(s.activation(x), s.weight(), s.b), s.ws, s.wz, "int8", 1))
    gm, _ = from_torch(scales, X)
    FuseDequantMatmul().run(gm, ctx := Context())
    assert [d.reason for d in ctx.declines] == ["the result is quantized with scales along axis 1, not one for the tensor"]


def test_declines_a_transposed_convolution() -> None:
    image = torch.randn(1, 3, 4, 4)
    changed = {"w": torch.ones(3, 2, 2, 2, dtype=torch.int8), "b": torch.ones(2)}
    net = Buffers(lambda s, x: F.conv_transpose2d(s.activation(x), s.weight(), s.b), **changed)
    assert reasons(net, x=image, options={"activations": "any"}) == {"a transposed convolution has no fused op"}


def test_the_pass_keeps_its_word_under_numeric_verification() -> None:
    net = Buffers(lambda s, x: s.result(F.linear(s.activation(x), s.weight(), s.b)))
    gm, _ = from_torch(net, X)
    (step,) = Pipeline(FuseDequantMatmul(), verify="numerics").run(gm, Context(samples=[(X,)]))
    assert step.count == 2


def test_onnx_scales_stored_as_lists_of_one_are_per_tensor() -> None:
    start = from_onnx("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,4] x) => (float[2,3] y)
          <int8[4,3] w = {5, 127, 0, -6, -1, 77, 2, -8, -50, 100, 3, 9}, float[1] ws = {0.012}, int8[1] wz = {3},
           float[1] xs = {0.02}, uint8[1] xz = {119}> {
            q = QuantizeLinear <axis = 0> (x, xs, xz)
            d = DequantizeLinear <axis = 0> (q, xs, xz)
            v = DequantizeLinear <axis = 0> (w, ws, wz)
            y = MatMul (d, v)
        }""", X)  # fmt: skip
    gm = check(FuseDequantMatmul(), start, (X,), None)
    assert "qg.quantized_linear(%0, @xs, @xz, 'uint8'" in text(gm)
