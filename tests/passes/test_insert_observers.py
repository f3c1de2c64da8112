"""insert_observers: where observers go, what they share, and what is left alone."""

import pytest
import torch
from torch import Tensor, nn

from qgraph.backends.onnxruntime.placement import PLACEMENT
from qgraph.errors import ModelError, RecipeError
from qgraph.formats import QUANTIZE
from qgraph.ledger import state
from qgraph.observe import Observer
from qgraph.passes.insert_observers import InsertObservers
from qgraph.recipe import load_recipe
from qgraph.testing import check, from_onnx, from_torch

X = torch.linspace(-2, 1, 6).view(2, 3)
STATIC = InsertObservers(load_recipe("w8a8"), PLACEMENT)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) + x.sum()


def test_torch_inputs_of_linears_are_observed_after_the_activation() -> None:
    check(
        STATIC,
        from_torch(Head(), X),
        (X,),
        """
        %0: f32[2,3] = module:observer_0(%x)
        %1: f32[2,5] = aten.linear(%0, @up.weight, @up.bias)
        %2: f32[2,5] = aten.relu(%1)
        %3: f32[2,5] = module:observer_1(%2)
        %4: f32[2,2] = aten.linear(%3, @down.weight, @down.bias)
        %5: f32[] = aten.sum(%x)
        %6: f32[2,2] = aten.add.Tensor(%4, %5)
        return %6
        """,
    )


ONNX = """
    <ir_version: 10, opset_import: ["": 17]>
    g (float[1,2,4,4] x) => (float[1,3,2,2] y)
      <float[3,2,1,1] w = {1, -2, 3, -4, 5, -6}, float[3] b = {0.5, -1, 2}> {
        c = Conv <kernel_shape = [1, 1]> (x, w, b)
        y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
      }
"""


def test_onnx_convolutions_have_an_observed_output() -> None:
    image = torch.linspace(-1, 1, 32).view(1, 2, 4, 4)
    gm = check(STATIC, from_onnx(ONNX, image), (image,), None)
    assert [n.args[0].name for n in gm.graph.nodes if n.op == "call_module"] == ["x", "conv"]
    (conv,) = [n for n in gm.graph.nodes if n.name == "conv"]
    assert str(conv.meta[QUANTIZE]["weight"]) == "int8 sym per axis 0"


def test_values_of_one_class_share_one_observer() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.max_pool2d(self.a(x), 2))

    gm, _ = from_torch(Pooled(), torch.ones(1, 2, 4, 4))
    STATIC(gm)
    targets = [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]
    assert len(targets) == 4 and len(set(targets)) == 3
    assert len([m for m in gm.modules() if isinstance(m, Observer)]) == 3


def test_the_observer_is_named_after_the_values_it_sees() -> None:
    gm, _ = from_torch(Head(), X)
    STATIC(gm)
    assert gm.get_submodule("observer_1").name == "relu"


def test_recipe_options_reach_the_observer() -> None:
    recipe = load_recipe("w8a8", ["observer=percentile", "observer_options.percentile=99.5"])
    gm, _ = from_torch(Head(), X)
    InsertObservers(recipe, PLACEMENT)(gm)
    assert gm.get_submodule("observer_0").choose.percentile == 99.5
    wrong = load_recipe("w8a8", ["observer_options.percentil=1"])
    with pytest.raises(RecipeError, match="'percentil'"):
        InsertObservers(wrong, PLACEMENT)(from_torch(Head(), X)[0])


def test_declines_a_graph_without_anything_to_quantize() -> None:
    gm, _ = from_torch(nn.ReLU(), X)
    with pytest.raises(ModelError, match="nothing to quantize in this model with recipe w8a8: it has no linear, convolution or embedding"):
        STATIC(gm)


def test_declines_with_the_reasons_of_the_ledger() -> None:
    gm, _ = from_torch(Head(), X)
    with pytest.raises(ModelError, match="rule '\\*' leaves it in float"):
        InsertObservers(load_recipe("w8a8", ["rules.*=null"]), PLACEMENT)(gm)
    assert len(state(gm).ledger) == 4


def test_declines_a_model_whose_work_is_in_functions_and_says_how_to_inline_them() -> None:
    source = """
        <ir_version: 10, opset_import: ["": 17, "own": 1]>
        g (float[2,3] x) => (float[2,2] y) <float[3,2] w = {1, -2, 3, -4, 5, -6}> { y = own.product (x, w) }
        <domain: "own", opset_import: ["": 17]>
        product (a, b) => (c) { c = MatMul (a, b) }
    """
    gm, _ = from_onnx(source, X)
    with pytest.raises(ModelError, match="own functions are not looked into, inline them"):
        STATIC(gm)
