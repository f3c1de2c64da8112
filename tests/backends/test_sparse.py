"""Weights that are mostly zeros: small in the file, one product in the session."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.numpy_helper import from_array
from torch import nn

import qgraph
from qgraph.backends.onnxruntime.sparse import StoreSparse
from qgraph.pipeline import Context
from qgraph.testing import check, from_onnx
from tests.outlying import computed

K, N = 256, 320
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 5, K, generator=GENERATOR)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(K, N), nn.Linear(N, 64, bias=False)

    def forward(self, x):
        return self.c(torch.relu(self.a(x)))


def onnx_net():
    net = Net()
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> g (float[B,5,256] x) => (float[B,5,64] y) {
        p = MatMul (x, wa)  s = Add (p, ba)  r = Relu (s)  y = MatMul (r, wc) }""")
    tensors = {"wa": net.a.weight.T, "ba": net.a.bias, "wc": net.c.weight.T}
    model.graph.initializer.extend(from_array(np.ascontiguousarray(t.detach()), k) for k, t in tensors.items())
    return model


def exported(model, recipe, path):
    """(the quantized graph, its file's size, operators that ONNX Runtime runs, its output)"""
    example = (X,) if isinstance(model, nn.Module) else None
    quantized = qgraph.quantize(model, example_inputs=example, recipe=recipe)
    qgraph.export(quantized, path)
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".optimized")), 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    (y,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    return quantized, path.stat().st_size, Counter(n.op_type for n in optimized.graph.node), torch.from_numpy(y)


@pytest.mark.parametrize("origin, recipe", [("torch", "w4a16-g32"), ("onnx", "w4a16-g32-sym"), ("onnx", "w4a16-g32"), ("onnx", "w8a16")])
def test_single_weights_take_eight_bytes_and_no_product_of_their_own(origin, recipe, tmp_path):
    model = Net().eval() if origin == "torch" else onnx_net()
    _, plain, _, _ = exported(model, recipe, tmp_path / "plain.onnx")
    quantized, size, ops, y = exported(model, f"{recipe}+dense-sparse", tmp_path / "split.onnx")
    count = sum(round(w.numel() * 0.01) for w in (Net().a.weight, Net().c.weight))
    assert 8 * count <= size - plain < 8 * count + 6000
    assert (ops["MatMul"] + ops["Gemm"], ops["ScatterND"], ops["Cast"], ops["MatMulNBits"]) == (2, 0, 0, 0)
    torch.testing.assert_close(y, computed(quantized, X), rtol=1e-4, atol=1e-5)


def test_beside_integer_products_they_are_a_product_in_float(tmp_path):
    quantized, size, ops, y = exported(onnx_net(), "w8a8-token+dense-sparse", tmp_path / "m.onnx")
    assert (ops["MatMul"], ops["MatMulIntegerToFloat"], ops["ScatterND"]) == (2, 2, 0)
    assert size < 1.2 * (K * N + N * 64)
    torch.testing.assert_close(y, computed(quantized, X), rtol=1e-3, atol=1e-3)


def test_16_bit_floats_are_added_in_32_bits():
    quantized = qgraph.quantize(Net().half().eval(), example_inputs=(X.half(),), recipe="w4a16-g32+dense-sparse")
    y = computed(qgraph.lower(quantized), X.half())
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, computed(quantized, X.half()), rtol=1e-2, atol=2e-3)


def test_a_sparse_weight_of_the_model_is_stored_by_places_too():
    weight = torch.zeros(64, 48)
    weight[3, 7], weight[60, 0] = 1.5, -2.0
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]> g (float[M,64] x) => (float[M,48] y) { y = Gemm (x, w, b) }"""
    )
    model.graph.initializer.extend([from_array(weight.numpy(), "w"), from_array(np.linspace(-1, 1, 48, dtype=np.float32), "b")])
    x = torch.randn(4, 64)
    expect = """
        %0: f32[64,48] = onnx.Expand(@gemm_zero, @gemm_shape)
        %1: i64[2,2] = onnx.Cast(@gemm_places, to=7)
        %2: f32[64,48] = onnx.ScatterND(%0, %1, @gemm_numbers, reduction='add')
        %3: f32[M,48] = onnx.Gemm(%x, %2, @b)
        return %3
    """
    check(StoreSparse(), from_onnx(model, x), (x,), expect)


def test_a_dense_or_small_weight_stays():
    for shape, zeros in (((64, 48), 0.5), ((8, 4), 0.99)):
        weight = np.where(np.random.default_rng(0).random(shape) < zeros, 0, 1).astype(np.float32)
        model = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 21]> g (float[M,{shape[0]}] x) => (float[M,{shape[1]}] y) {{ y = MatMul (x, w) }}'
        )
        model.graph.initializer.append(from_array(weight, "w"))
        gm, _ = from_onnx(model, torch.randn(2, shape[0]))
        assert StoreSparse().run(gm, Context()) == 0
