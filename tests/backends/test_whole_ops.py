"""What ONNX Runtime leaves in parts becomes one of its operators, or the spelling that it fuses; read back from its optimized graph."""

import onnx
import onnxruntime as ort
import pytest
import torch

import qgraph
from qgraph.backends.onnxruntime.whole import WholeOps
from qgraph.pipeline import Context
from qgraph.testing import check
from tests.everywhere import EVERYWHERE
from tests.passes.graphs import from_text, ops
from tests.passes.test_recompose import TANH_CONSTANTS, TANH_GELUS
from tests.passes.test_recompose_norm import CONSTANTS, LAYER_NORMS, ROOT

X = torch.linspace(-4, 5, 24).reshape(2, 3, 4)
GELU_CONSTANTS = "float r = {1.4142135}, float one = {1}, float half = {0.5}"
GELUS = {
    "torch": "a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (half, c) y = Mul (x, d)",
    "classic": "a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half)",
}


def optimized(gm, path):
    """Operators of ONNX Runtime's own optimized graph."""
    onnx.save(qgraph.onnx_io.to_proto(gm), path / "model.onnx")
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path / "optimized.onnx")
    ort.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(path / "optimized.onnx").graph.node]


@pytest.mark.parametrize("body", GELUS.values(), ids=GELUS)
def test_gelu_is_one_operator_in_an_opset_without_it(body, tmp_path):
    gm = check(
        WholeOps(), from_text(body, X, opset=17, constants=GELU_CONSTANTS), (X,), "%0: f32[2,3,4] = com.microsoft.Gelu(%x)\nreturn %0"
    )
    assert optimized(gm, tmp_path) == ["Gelu"]


@pytest.mark.parametrize("body", TANH_GELUS.values(), ids=TANH_GELUS)
def test_gelu_with_tanh_is_fast_gelu(body, tmp_path):
    gm = check(
        WholeOps(), from_text(body, X, opset=17, constants=TANH_CONSTANTS), (X,), "%0: f32[2,3,4] = com.microsoft.FastGelu(%x)\nreturn %0"
    )
    assert optimized(gm, tmp_path) == ["FastGelu"]


@pytest.mark.parametrize("name", ["pow", "mul", "reciprocal", "one over", "power", "no weight", "root first"])
@pytest.mark.parametrize("opset", [14, 18])
def test_layer_norms_are_spelled_as_onnx_runtime_knows_them(name, opset, tmp_path):
    body = LAYER_NORMS[name]
    if opset < 18:
        body = body.replace("ReduceMean (x, last)", "ReduceMean <axes = [-1]> (x)").replace(
            "ReduceMean (q, last)", "ReduceMean <axes = [-1]> (q)"
        )
    gm = check(WholeOps(), from_text(body, X, opset=opset, constants=CONSTANTS), (X,), None)
    assert "Reciprocal" not in ops(gm)
    if name not in ("no weight", "root first"):  # fused with weight and bias behind it
        assert optimized(gm, tmp_path) == ["LayerNormalization"]


@pytest.mark.parametrize("tail", ["n = Mul (x, i) y = Mul (w, n)", "y = Mul (i, x)"], ids=["weight", "none"])
def test_rms_norms_become_one_kernel_with_and_without_weight(tail, tmp_path):
    gm = check(WholeOps(), from_text(f"q = Mul (x, x) {ROOT} i = Reciprocal (r) {tail}", X, opset=18, constants=CONSTANTS), (X,), None)
    assert optimized(gm, tmp_path) == ["SimplifiedLayerNormalization"]


def test_silu_is_quick_gelu():
    start = from_text("s = Sigmoid (x) y = Mul (x, s)", X, opset=18)
    check(WholeOps(), start, (X,), "%0: f32[2,3,4] = com.microsoft.QuickGelu(%x, alpha=1.0)\nreturn %0")


def test_silu_between_integers_is_one_kernel(tmp_path):
    """ONNX Runtime, which gives each reader of an integer its own dequantization, does not see that both read one x."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 32, 3), torch.nn.SiLU(), torch.nn.Conv2d(32, 8, 3)).eval()
    x = torch.randn(1, 8, 12, 12)
    quantized = qgraph.quantize(model, [(x,)], example_inputs=(x,), backend=EVERYWHERE)
    qgraph.export(quantized, tmp_path / "int8.onnx", backend=EVERYWHERE)
    found = optimized(qgraph.from_onnx(tmp_path / "int8.onnx"), tmp_path)
    assert found.count("QLinearConv") == 2 and found.count("QuickGelu") == 1 and "Sigmoid" not in found


def test_other_types_than_float32_stay():
    double = GELU_CONSTANTS.replace("float", "double")  # no kernel runs this one
    text = f'<ir_version: 9, opset_import: ["": 17]> g (double[2] x) => (double[2] y) <{double}> {{ {GELUS["torch"]} }}'
    assert WholeOps().run(qgraph.from_onnx(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))), Context()) == 0
