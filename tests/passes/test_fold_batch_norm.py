"""Algebra of folding scales and shifts into layers; every fold is compared with torch or ONNX Runtime."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qgraph.passes import FoldBatchNorm
from qgraph.pipeline import Context
from qgraph.testing import check, from_onnx, from_torch
from qgraph.text import text

torch.manual_seed(0)


def trained(module):
    """Batch norms with statistics, weights and biases that are not the initial ones."""
    for norm in (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 3)
    return module.eval()


def declines(gm):
    ctx = Context()
    FoldBatchNorm().run(gm, ctx)
    return [d.reason for d in ctx.declines]


def numpy(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def model(source, opset=17, **constants):
    """ONNX text plus initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{source}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return proto


IMAGE = torch.randn(2, 4, 9, 7)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "conv",
    [
        lambda bias: nn.Conv2d(4, 6, (3, 2), padding=(1, 0), bias=bias),
        lambda bias: nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2, bias=bias),
        lambda bias: nn.Conv2d(4, 8, 3, groups=4, padding="same", bias=bias),
        lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, padding=1, bias=bias),
        lambda bias: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, bias=bias),
    ],
    ids=["plain", "grouped", "depthwise", "transposed", "grouped transposed"],
)
def test_torch_convolution_takes_in_the_batch_norm_behind_it(conv, bias):
    layer = conv(bias)
    channels = layer.out_channels
    gm = check(FoldBatchNorm(), from_torch(trained(nn.Sequential(layer, nn.BatchNorm2d(channels))), IMAGE), (IMAGE,), None)
    assert "batch_norm" not in text(gm)


@pytest.mark.parametrize("bias", [True, False])
def test_torch_linear_takes_in_the_batch_norm_behind_it(bias):
    x = torch.randn(5, 4)
    gm = check(FoldBatchNorm(), from_torch(trained(nn.Sequential(nn.Linear(4, 3, bias=bias), nn.BatchNorm1d(3))), x), (x,), None)
    assert text(gm).count("aten.") == 1


def test_torch_batch_norm_before_an_unpadded_convolution_moves_into_it():
    net = trained(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)))
    gm = check(FoldBatchNorm(), from_torch(net, IMAGE), (IMAGE,), None)
    assert "batch_norm" not in text(gm)


def test_torch_batch_norm_before_a_linear_moves_into_it():
    x = torch.randn(5, 4)
    net = trained(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)))
    assert "batch_norm" not in text(check(FoldBatchNorm(), from_torch(net, x), (x,), None))


def test_batch_norm_before_padding_stays_and_says_why():
    net = trained(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)))
    start = from_torch(net, IMAGE)
    assert declines(start[0]) == ["a shift before padding is not constant at the border"]
    assert "batch_norm" in text(check(FoldBatchNorm(), start, (IMAGE,), None))


def test_a_convolution_that_is_read_twice_stays():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    assert "batch_norm" in text(check(FoldBatchNorm(), from_torch(trained(Twice()), IMAGE), (IMAGE,), None))


def test_a_weight_that_two_convolutions_share_is_not_stored_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

        def forward(self, x):
            return self.a(self.conv(x)), self.b(self.conv(x + 1))

    start = from_torch(trained(Shared()), IMAGE)
    assert declines(start[0]) == ["weight @conv.weight is read 2 times; folding would store it twice"] * 2


def test_torch_scales_and_shifts_by_constants_fold_like_a_batch_norm():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1)
            self.register_buffer("scale", torch.rand(6, 1, 1) + 0.5)
            self.register_buffer("shift", torch.randn(1, 6, 1, 1))

        def forward(self, x):
            return 2.0 - (self.conv(x) * self.scale + self.shift) / 3

    gm = check(FoldBatchNorm(), from_torch(Scaled(), IMAGE), (IMAGE,), None)
    assert text(gm).count("aten.") == 1


def test_a_constant_that_varies_in_space_stays():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1)
            self.register_buffer("map", torch.randn(6, 9, 7))

        def forward(self, x):
            return self.conv(x) + self.map

    assert text(check(FoldBatchNorm(), from_torch(Position(), IMAGE), (IMAGE,), None)).count("aten.") == 2


NORM = {"s": numpy(6, seed=1) + 2, "o": numpy(6, seed=2), "m": numpy(6, seed=3), "v": numpy(6, seed=4) + 2}


@pytest.mark.parametrize(
    ("call", "constants"),
    [
        ("Conv <pads = [1, 0, 2, 1]> (x, w, b)", dict(w=numpy(6, 4, 3, 2), b=numpy(6, seed=5))),
        ("Conv <group = 2> (x, w)", dict(w=numpy(6, 2, 3, 3))),
        ("ConvTranspose <strides = [2, 2]> (x, w, b)", dict(w=numpy(4, 6, 3, 3), b=numpy(6, seed=5))),
    ],
)
def test_onnx_convolution_takes_in_the_batch_norm_behind_it(call, constants):
    source = f"g (float[2,4,9,7] x) => (float[2,6,H,W] y) {{ c = {call} y = BatchNormalization <epsilon = 0.01> (c, s, o, m, v) }}"
    gm = check(FoldBatchNorm(), from_onnx(model(source, **constants, **NORM), IMAGE), (IMAGE,), None)
    assert [n.target.op_type for n in gm.graph.nodes if n.op == "call_function"] == [call.split()[0]]


def test_onnx_convolution_keeps_its_name_and_prints_with_a_new_bias():
    source = """g (float[1,1,2,2] x) => (float[1,2,2,2] y) <float[2,1,1,1] w = {1, 2}, float[2,1,1] s = {3, -4}, float[1] t = {0.5}> {
        [first] c = Conv (x, w)
        d = Mul (s, c)
        y = Add (d, t) }"""
    x = torch.randn(1, 1, 2, 2)
    gm = check(FoldBatchNorm(), from_onnx(model(source), x), (x,), """
        %0: f32[1,2,2,2] = onnx.Conv(%x, @w_3, @w_3_bias)
        return %0
    """)  # fmt: skip
    assert gm.w_3.flatten().tolist() == [3, -8] and gm.w_3_bias.tolist() == [0.5, 0.5]
    assert next(n for n in gm.graph.nodes if n.op == "call_function").meta["name"] == "first"


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_folds_on_the_axis_of_its_outputs_and_respects_alpha_and_beta(transposed):
    source = f"""g (float[5,4] x) => (float[5,6] y) {{
        c = Gemm <transB = {transposed}, alpha = 0.5, beta = 2.0> (x, w, b)
        y = BatchNormalization (c, s, o, m, v) }}"""
    x = torch.randn(5, 4)
    weight = numpy(6, 4) if transposed else numpy(4, 6)
    gm = check(FoldBatchNorm(), from_onnx(model(source, w=weight, b=numpy(1, 6, seed=5), **NORM), x), (x,), None)
    assert text(gm).count("onnx.") == 1


@pytest.mark.parametrize("transposed", [0, 1])
def test_batch_norm_before_gemm_folds_on_the_axis_of_its_inputs(transposed):
    source = f"""g (float[5,6] x) => (float[5,4] y) {{
        n = BatchNormalization (x, s, o, m, v)
        y = Gemm <transB = {transposed}, alpha = 0.5, beta = 2.0> (n, w, b) }}"""
    x = torch.randn(5, 6)
    weight = numpy(4, 6) if transposed else numpy(6, 4)
    gm = check(FoldBatchNorm(), from_onnx(model(source, w=weight, b=numpy(4, seed=5), **NORM), x), (x,), None)
    assert text(gm).count("onnx.") == 1


def test_matmul_takes_a_scale_but_has_no_place_for_a_shift():
    source = """g (float[5,4] x) => (float[5,6] y) { c = MatMul (x, w) d = Div (c, s) y = Add (d, o) }"""
    x = torch.randn(5, 4)
    gm = check(FoldBatchNorm(), from_onnx(model(source, w=numpy(4, 6), **NORM), x), (x,), None)
    assert [n.target.op_type for n in gm.graph.nodes if n.op == "call_function"] == ["MatMul", "Add"]
    source = "g (float[5,4] x) => (float[5,6] y) { c = MatMul (x, w) y = BatchNormalization (c, s, o, m, v) }"
    gm, _ = from_onnx(model(source, w=numpy(4, 6), **NORM), x)
    assert declines(gm) == ["MatMul-17 takes no bias for the shift"]


def test_the_scale_before_a_padded_convolution_moves_below_the_shift():
    source = """g (float[2,4,9,7] x) => (float[2,6,9,7] y) <float[1] s = {0.25}, float[1] t = {-0.5}> {
        a = Relu (x)
        d = Mul (s, a)
        e = Add (d, t)
        y = Conv <pads = [1, 1, 1, 1]> (e, w) }"""
    gm = check(FoldBatchNorm(), from_onnx(model(source, w=numpy(6, 4, 3, 3)), IMAGE), (IMAGE,), """
        %0: f32[2,4,9,7] = onnx.Relu(%x)
        %1: f32[2,4,9,7] = onnx.Add(%0, @t_3)
        %2: f32[2,6,9,7] = onnx.Conv(%1, @w_4, pads=[1, 1, 1, 1])
        return %2
    """)  # fmt: skip
    assert gm.t_3.tolist() == [-2.0]


def test_the_last_factor_of_a_gelu_stays_where_runtimes_look_for_it():
    source = """g (float[5,4] x) => (float[5,3] y) <float r = {1.4142135}, float one = {1}, float half = {0.5}> {
        a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (x, c) e = Mul (d, half)
        y = MatMul (e, w) }"""
    x = torch.randn(5, 4)
    start = from_onnx(model(source, w=numpy(4, 3)), x)
    assert declines(start[0]) == ["the factor ends a gelu, which runtimes fuse as a whole"]


def test_constants_that_overflow_half_precision_decline():
    source = "g (float16[1,1,2,2] x) => (float16[1,1,2,2] y) { c = Conv (x, w) y = Mul (c, s) }"
    proto = model(source, w=np.full((1, 1, 1, 1), 300, np.float16), s=np.full((1,), 300, np.float16))
    gm, _ = from_onnx(proto, torch.ones(1, 1, 2, 2, dtype=torch.float16))
    assert declines(gm) == ["a folded constant does not fit torch.float16"]
