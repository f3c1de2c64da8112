"""The tensorrt profile: another placement, the same recipe."""

import onnx
import pytest
import torch
from torch import nn

import qgraph
from qgraph.backends.tensorrt import TensorRT
from qgraph.errors import ModelError
from tests.everywhere import EVERYWHERE

X = torch.linspace(-2, 3, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
ONNX = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[2,6] x) => (float[2,4] y)
    <float[6,5] w, float[5] b, float[5,4] v> { h = MatMul(x, w)  s = Add(h, b)  r = Relu(s)  y = MatMul(r, v) }
"""


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return self.c(torch.relu(y + self.b(y)))


def quantized(recipe="w8a8"):
    torch.manual_seed(0)
    return qgraph.quantize(Residual().eval(), [(X,)], example_inputs=(X,), recipe=recipe, backend="tensorrt")


def written(gm, path):
    qgraph.export(gm, path, backend="tensorrt")
    return onnx.load(path)


def test_a_recipe_that_leaves_the_form_open_becomes_int8_symmetric(tmp_path):
    model = written(quantized(), tmp_path / "m.onnx")
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    zeros = [constants[n.input[2]] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear") and len(n.input) > 2]
    assert zeros and all(z.dtype == "int8" and not z.any() for z in zeros)
    assert not [n.domain for n in model.graph.node if n.domain]


def test_both_operands_of_a_residual_sum_are_quantized_and_biases_are_float(tmp_path):
    graph = written(quantized(), tmp_path / "m.onnx").graph
    made = {name: n.op_type for n in graph.node for name in n.output}
    (add,) = (n for n in graph.node if n.op_type == "Add")
    assert [made[i] for i in add.input] == ["DequantizeLinear"] * 2
    convs = [n for n in graph.node if n.op_type == "Conv"]
    types = {i.name: i.data_type for i in graph.initializer}
    assert len(convs) == 3 and all([made[i] for i in c.input[:2]] == ["DequantizeLinear"] * 2 for c in convs)
    assert all(types[c.input[2]] == onnx.TensorProto.FLOAT for c in convs)
    assert made[convs[-1].output[0]] == "Conv" and graph.output[0].name == convs[-1].output[0], "the last output is not quantized"


def test_the_simulation_gives_the_reference_numbers():
    gm = quantized()
    program = qgraph.lower(gm, backend="tensorrt", strict=True)
    torch.testing.assert_close(program(X), gm(X), rtol=1e-4, atol=1e-4)
    assert program.kernels() == []


def test_an_onnx_model_goes_the_same_way(tmp_path):
    torch.manual_seed(0)
    proto = onnx.parser.parse_model(ONNX.replace("<float[6,5] w, float[5] b, float[5,4] v>", ""))
    for name, shape in {"w": (6, 5), "b": (5,), "v": (5, 4)}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(torch.randn(shape).numpy(), name))
    x = torch.randn(2, 6)
    gm = qgraph.quantize(proto, [(x,)], recipe="w8a8", backend="tensorrt")
    (found,) = qgraph.lower(gm, backend="tensorrt")(x)
    want = gm(x)
    torch.testing.assert_close(found, want[0] if isinstance(want, tuple | list) else want, rtol=1e-4, atol=1e-4)
    assert {n.op_type for n in written(gm, tmp_path / "m.onnx").graph.node} >= {"QuantizeLinear", "DequantizeLinear", "MatMul"}


def test_ranges_found_at_run_time_are_refused_with_the_reason():
    with pytest.raises(ModelError, match="no fast integer conv with run-time ranges"):
        quantized("w8a8-dynamic")


def test_the_same_recipe_is_unsigned_on_onnxruntime_and_signed_here():
    for backend, want in ((EVERYWHERE, "uint8 asym per tensor"), (TensorRT(), "int8 sym per tensor")):
        ledger = qgraph.prepare(Residual().eval(), (X,), recipe="w8a8", backend=backend).meta["qgraph"].ledger
        assert {e.decision for e in ledger if e.role == "x"} == {want}


def test_weights_alone_are_int4_in_blocks_along_the_inputs(tmp_path):
    net, x = torch.nn.Sequential(torch.nn.Linear(128, 40), torch.nn.ReLU(), torch.nn.Linear(40, 24)).eval(), torch.randn(3, 128)
    quantized = qgraph.quantize(net, example_inputs=(x,), recipe="w4a16-g64-sym", backend="tensorrt", output=tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    stored = {t.name: t for t in model.graph.initializer}
    blocks = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    layouts = [(list(stored[n.input[0]].dims), stored[n.input[0]].data_type, list(stored[n.input[1]].dims)) for n in blocks]
    assert layouts == [([128, 40], onnx.TensorProto.INT4, [2, 40]), ([40, 24], onnx.TensorProto.INT4, [1, 24])]
    assert all({a.name: a.i for a in n.attribute} == {"axis": 0, "block_size": 64} for n in blocks)
    found = qgraph.lower(quantized, backend="tensorrt")(x)
    torch.testing.assert_close(found, quantized(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-g32-sym", "w4a16-g64"])
def test_other_weights_before_float_are_refused(recipe):
    with pytest.raises(ModelError, match="nothing to quantize"):
        qgraph.quantize(torch.nn.Linear(128, 40).eval(), example_inputs=(torch.randn(3, 128),), recipe=recipe, backend="tensorrt")
