"""insert_fake_quant: observers and noted formats become fake_quantize, on both dialects."""

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qgraph.backends.onnxruntime.placement import PLACEMENT
from qgraph.errors import CalibrationError, RecipeError
from qgraph.ledger import state
from qgraph.observe import Observer
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.sink_constants import SinkConstants
from qgraph.recipe import load_recipe
from qgraph.testing import check, from_onnx, from_torch

X = torch.linspace(-2, 1, 6).view(2, 3)


def prepared(gm: GraphModule, recipe: str, *batches: Tensor) -> GraphModule:
    InsertObservers(load_recipe(recipe), PLACEMENT)(gm)
    for batch in batches:
        gm(batch)
    return gm


def linear() -> nn.Linear:
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, -2.0, 0.5], [4.0, 3.0, -1.0]]))
        net.bias.copy_(torch.tensor([0.25, -4.0]))
    return net


def test_torch_observers_become_fake_quantize_with_what_they_saw() -> None:
    gm, want = from_torch(linear(), X)
    check(
        InsertFakeQuant(),
        (prepared(gm, "w8a8", X), want),
        (X,),
        """
        %0: f32[2,3] = qg.fake_quantize(%input, @input_1_scale, @input_1_zero_point, 'uint8', None, 0)
        %1: f32[2,3] = qg.fake_quantize(@weight, @weight_scale, None, 'int8', 0, 0)
        %2: f32[2,2] = aten.linear(%0, %1, @bias)
        return %2
        """,
        tol=0.05,
    )
    assert gm.input_1_scale.item() == pytest.approx(3 / 255) and gm.input_1_zero_point.item() == 170
    assert torch.allclose(gm.weight_scale, torch.tensor([2 / 127, 4 / 127]))


def test_a_module_that_reads_its_input_several_times_keeps_its_nodes_in_order() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x) + self.b(y), x

    inputs = (X, X + 1)
    gm, want = from_torch(Twice(), *inputs)
    InsertObservers(load_recipe("w8a8"), PLACEMENT)(gm)
    gm(*inputs)
    InsertFakeQuant()(gm)
    gm.graph.lint()
    assert torch.allclose(gm(*inputs)[0], want[0], atol=0.1)


def test_onnx_dynamic_activations_are_quantized_at_run_time_once_for_all_readers() -> None:
    source = """
        <ir_version: 10, opset_import: ["": 17]>
        g (float[2,3] x) => (float[2,2] y, float[2,2] z)
          <float[3,2] v = {1, -2, 3, -4, 5, -6}, float[3,2] w = {0.5, 1, 2, 3, -1, 4}> {
            y = MatMul (x, v)
            z = MatMul (x, w)
          }
    """
    gm, want = from_onnx(source, X)
    gm = check(InsertFakeQuant(), (prepared(gm, "w8a8-dynamic"), want), (X,), None, tol=0.15)
    assert sum("dynamic_quantize" in str(n.target) for n in gm.graph.nodes) == 1
    assert gm.v_scale.tolist() == pytest.approx([5 / 127, 6 / 127])


def test_group_wise_weights_have_zero_points() -> None:
    gm, _ = from_torch(nn.Linear(32, 2), torch.ones(1, 32))
    InsertFakeQuant()(prepared(gm, "w4a16-g16"))
    assert gm.weight_scale.shape == gm.weight_zero_point.shape == (2, 2)


def test_a_weight_that_two_operations_read_is_quantized_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.relu(self.inner(x)))

    gm, _ = from_torch(Tied(), X)
    InsertFakeQuant()(prepared(gm, "w8a16"))
    assert sum("fake_quantize" in str(n.target) for n in gm.graph.nodes) == 1


def test_half_precision_models_get_half_precision_scales() -> None:
    net, x = linear().half(), X.half()
    gm, _ = from_torch(net, x)
    InsertFakeQuant()(prepared(gm, "w8a8", x))
    assert gm.weight_scale.dtype == gm.input_1_scale.dtype == torch.float16
    assert gm(x).dtype == torch.float16


def test_declines_an_observer_without_data() -> None:
    gm, _ = from_torch(linear(), X)
    with pytest.raises(CalibrationError, match="'input_1' has no range: it was never observed"):
        InsertFakeQuant()(prepared(gm, "w8a8"))


@pytest.mark.parametrize("recipe", ["w4a16-g32", "w4a8", "w4a8-dynamic-tensor"])
@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_weight_ranges_are_chosen_as_the_recipe_says(recipe: str, origin: str) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    x = torch.ones(2, 128)
    error = {}
    for kind in ("minmax", "mse"):
        gm = _one_linear(origin, weight)
        InsertObservers(load_recipe(recipe, [f"weight_range={kind}"]), PLACEMENT)(gm)
        gm(x)
        InsertFakeQuant(weight_range=kind)(gm)
        (node,) = [n for n in gm.graph.nodes if "fake_quantize" in str(n.target) and n.args[0].op == "get_attr"]
        value, scale, zero_point, *rest = [getattr(gm, a.target).detach() if isinstance(a, Node) else a for a in node.args]
        error[kind] = float((node.target(value, scale, zero_point, *rest) - value).square().sum())
    assert error["mse"] < 0.95 * error["minmax"]


def _one_linear(origin: str, weight: Tensor) -> GraphModule:
    if origin == "onnx":
        model = onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["": 21]> g (float[2,128] x) => (float[2,8] y) { y = Gemm <transB = 1> (x, w) }'
        )
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight.numpy(), "w"))
        return from_onnx(model, torch.ones(2, 128))[0]
    net = nn.Linear(128, 8)
    with torch.no_grad():
        net.weight.copy_(weight)
    return from_torch(net, torch.ones(2, 128))[0]


def test_an_unknown_weight_range_fails_before_data() -> None:
    with pytest.raises(RecipeError, match="unknown observer 'mes'; did you mean 'mse'"):
        InsertObservers(load_recipe("w8a8", ["weight_range=mes"]), PLACEMENT)
    with pytest.raises(RecipeError, match="observer 'mse' has no option 'bits'"):
        InsertObservers(load_recipe("w8a8", ["weight_range=mse", "weight_range_options.bits=3"]), PLACEMENT)


def test_the_recipe_of_a_prepared_graph_says_which_pass_it_takes() -> None:
    gm, _ = from_torch(linear(), X)
    assert InsertFakeQuant.of(gm) == InsertFakeQuant()
    state(gm).recipe = load_recipe("w8a8", ["weight_range=mse", "weight_range_options.bins=64"])
    assert InsertFakeQuant.of(gm) == InsertFakeQuant("mse", {"bins": 64})


def test_no_observer_is_left() -> None:
    gm, _ = from_torch(linear(), X)
    InsertFakeQuant()(prepared(gm, "w8a8", X))
    assert not any(isinstance(m, Observer) for m in gm.modules())


BRANCHES = """<ir_version: 9, opset_import: ["": 20]> g (float[2,3] x, bool c) => (float[2,2] y)
    <float[3,2] t = {1, 2, 3, 4, 5, 6}, float[3,2] e = {6, 5, 4, 3, 2, 1}> {
    [outer] h = MatMul (x, t)
    y = If (c) <then_branch = then () => (float[2,2] a) { r = Relu (x) [inner] m = MatMul (r, e) a = Add (m, h) },
                else_branch = other () => (float[2,2] b) { b = Neg (h) }> }"""


def test_bodies_of_control_flow_outlive_their_observers() -> None:
    gm, _ = from_onnx(BRANCHES, X, torch.tensor(True))
    SinkConstants()(gm)
    InsertObservers(load_recipe("w8a8"), PLACEMENT)(gm)
    want = gm(X, torch.tensor(True))[0]
    InsertFakeQuant()(gm)
    torch.testing.assert_close(gm(X, torch.tensor(True))[0], want, rtol=0, atol=0.2)


def test_values_of_a_branch_that_never_ran_are_named_with_a_rule_that_helps() -> None:
    gm, _ = from_onnx(BRANCHES, X, torch.tensor(True))
    SinkConstants()(gm)
    InsertObservers(load_recipe("w8a8"), PLACEMENT)(gm)
    with pytest.raises(CalibrationError, match=r"2 operands were never observed, the first is 'x' of 'outer'.* rules\.outer=null"):
        InsertFakeQuant()(gm)
