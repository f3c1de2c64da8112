"""The cost model: sizes read off graphs, and the decisions that follow."""

import pytest
import torch
from torch import nn

import qgraph
from qgraph.annotate import annotate
from qgraph.backends.onnxruntime.placement import MACHINE, PAYING
from qgraph.cost import UNKNOWN, work_of
from qgraph.errors import ModelError
from qgraph.ledger import Ledger
from qgraph.recipe import load_recipe
from qgraph.testing import from_onnx, from_torch
from qgraph.views import Conv, Linear, view_any


def works(gm):
    return [work_of(v) for n in gm.graph.nodes if (v := view_any((Conv, Linear), n)) is not None]


def test_a_strided_convolution_counts_its_products():
    gm, _ = from_torch(nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=1, groups=2), torch.ones(2, 4, 9, 11))
    (work,) = works(gm)
    assert work.outputs == 2 * 6 * 5 * 9 and work.products == work.outputs * 2 * 15 and work.weights == 6 * 2 * 15
    assert work.inputs == 2 * 4 * 9 * 11 and work.thin


def test_a_symbolic_size_of_an_onnx_graph_counts_as_a_number():
    source = '<ir_version: 8, opset_import: ["": 17]> g (float[B,3] x) => (float[B,2] y) <float[3,2] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }'
    gm, _ = from_onnx(source, torch.ones(4, 3))
    (work,) = works(gm)
    assert (work.products, work.inputs, work.outputs) == (UNKNOWN * 6, UNKNOWN * 3, UNKNOWN * 2) and not work.thin


def test_conversions_on_both_sides_can_cost_more_than_integers_save():
    gm, _ = from_torch(nn.Conv2d(32, 64, 1), torch.ones(1, 32, 24, 160))
    (work,) = works(gm)
    assert MACHINE.gain(work, quantize=False, dequantize=False) > 0 > MACHINE.gain(work, quantize=True, dequantize=True)


class Block(nn.Module):
    """Dense convolutions around a depthwise one, with `act` between them."""

    def __init__(self, act):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(240, 240, 1), nn.Conv2d(240, 240, 5, padding=2, groups=240), nn.Conv2d(240, 240, 1)
        self.act = act

    def forward(self, x):
        return self.c(self.act(self.b(self.act(self.a(x)))))


def decided(act, recipe="w8a8", overrides=()):
    gm, _ = from_torch(Block(act), torch.ones(1, 240, 12, 16))
    ledger = Ledger()
    annotate(gm, load_recipe(recipe, overrides), PAYING, ledger)
    return {e.node: e for e in ledger if e.role == "x"}


def test_a_depthwise_convolution_between_float_activations_stays_float_and_says_why():
    found = decided(nn.Hardswish())
    assert found["a"].quantized and found["c"].quantized and not found["b"].quantized
    assert found["b"].reason.startswith("does not pay: float takes about 0.")


def test_the_same_convolution_between_integers_pays():
    assert all(e.quantized for e in decided(nn.ReLU6()).values())


def test_a_rule_that_names_the_convolution_is_obeyed():
    assert decided(nn.Hardswish(), overrides=["rules.b={activations: {bits: 8}}"])["b"].quantized


def test_a_model_in_which_nothing_pays_is_an_error_that_says_how_to_quantize_it_all_the_same():
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(1, 3, 24, 24)
    with pytest.raises(ModelError, match="does not pay: float takes about .*; a rule that names an operation quantizes it all the same"):
        qgraph.prepare(model, (x,), recipe="w8a8")
    recipe = load_recipe("w8a8", ["rules.conv2d={activations: {bits: 8}}"])
    assert qgraph.quantize(model, [(x,)], example_inputs=(x,), recipe=recipe)(x).shape == (1, 4, 22, 22)
