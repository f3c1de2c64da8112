"""reduce_range: scales grow where 16-bit sums would saturate, and nowhere else, on both dialects."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

import qgraph
from qgraph.backend import get_backend
from qgraph.backends.onnxruntime import OnnxRuntime
from qgraph.backends.onnxruntime.placement import PLACEMENT
from qgraph.errors import RecipeError
from qgraph.passes import InsertFakeQuant, InsertObservers, ReduceRange
from qgraph.passes.reduce_range import exact_on
from qgraph.pipeline import Context
from qgraph.recipe import load_recipe
from qgraph.saturation import TARGETS, coverage, find_products
from qgraph.testing import check, from_onnx, from_torch

AVX2 = TARGETS["x86-avx2"]
X = torch.linspace(0, 1, 8).view(2, 4)


def linear(weight: list[list[float]]) -> nn.Linear:
    net = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        net.weight.copy_(torch.tensor(weight))
        net.bias.copy_(torch.linspace(-4, 0.25, len(weight)))
    return net


def faked(gm: GraphModule, x: torch.Tensor = X, recipe: str = "w8a8-dynamic") -> GraphModule:
    InsertObservers(load_recipe(recipe), PLACEMENT)(gm)
    gm(x)
    InsertFakeQuant()(gm)
    return gm


WEIGHT = [[1.0, 1.0, 0.25, 0.5], [1.0, 0.5, -1.0, 0.0], [-1.0, 0.0, 1.0, 0.0]]


def test_torch_scales_grow_in_the_channels_that_can_saturate() -> None:
    gm, want = from_torch(linear(WEIGHT), X)
    faked(gm, recipe="w8a8")
    before = gm.weight_scale.clone()
    expect = """
        %0: f32[2,4] = qg.fake_quantize(%input, @input_1_scale, @input_1_zero_point, 'uint8', None, 0)
        %1: f32[3,4] = qg.fake_quantize(@weight, @weight_scale_3, None, 'int8', 0, 0)
        %2: f32[2,3] = aten.linear(%0, %1, @bias)
        return %2
    """
    gm = check(ReduceRange(), (gm, want), (X,), expect, tol=0.05)
    grown = gm.weight_scale_3 / before
    assert grown[0] == pytest.approx(127 / 64, rel=0.01) and 1.49 < grown[1] < 1.52 and grown[2] == 1
    assert [p.exact(AVX2) for p in find_products(gm)] == [True]


def test_onnx_convolutions_too() -> None:
    x = torch.linspace(-1, 1, 32).view(1, 2, 4, 4)
    gm, want = from_onnx(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (float[1,2,4,4] x) => (float[1,2,3,3] y)
          <float[2,2,2,2] w = {1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, -1, -1, 0.5, 0}, float[2] b = {1, -2}> {
            y = Conv (x, w, b)
        }""",
        x,
    )
    before = faked(gm, x, "w8a8").w_scale.clone()
    gm = check(ReduceRange(), (gm, want), (x,), None, tol=0.1)
    (node,) = (n for n in gm.graph.nodes if "fake_quantize" in str(n.target) and n.args[0].target == "w")
    grown = getattr(gm, node.args[1].target) / before
    assert grown[0] == pytest.approx(127 / 64, rel=0.01) and grown[1] == 1


def test_one_scale_for_the_whole_weight_follows_the_worst_channel() -> None:
    gm, want = from_torch(linear(WEIGHT), X)
    check(ReduceRange(), (faked(gm, recipe="w8a8-dynamic-tensor"), want), (X,), None, tol=0.05)
    assert [p.exact(AVX2) for p in find_products(gm)] == [True]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float16]))
def test_whatever_the_weights_sums_become_exact_with_less_than_half_the_range_lost(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 9, generator=generator) * (0.05 + torch.rand(5, 1, generator=generator))
    net, x = linear(weight.tolist()).to(dtype), torch.rand(3, 9).to(dtype)
    gm, _ = from_torch(net, x)
    before = faked(gm, x).weight_scale.float()
    ReduceRange()(gm)
    (product,) = find_products(gm)
    after = gm.get_parameter(name) if (name := product.v.weight.args[1].target) in dict(gm.named_parameters()) else getattr(gm, name)
    assert product.exact(AVX2)
    assert ((after.float() >= before) & (after.float() <= before * 2.02)).all()


def test_it_leaves_machines_alone_that_add_in_int32() -> None:
    gm, _ = from_torch(linear(WEIGHT), X)
    assert ReduceRange("x86-vnni").run(faked(gm), Context()) == 0


def test_a_recipe_asks_for_it_and_the_ledger_says_where_it_was_needed() -> None:
    recipe = load_recipe("w8a8", ["stages=[{reduce-range: {target: x86-avx2}}]"])
    ledger = qgraph.quantize(linear(WEIGHT).eval(), [(X,)], example_inputs=(X,), recipe=recipe).meta["qgraph"].ledger
    (entry,) = (e for e in ledger if e.role == "weight")
    assert (entry.decision, entry.by) == ("int8 sym per axis 0", "reduce_range")
    assert entry.reason == "scales up to 1.98 times larger in 2 of 3 channels, exact on x86-avx2"
    assert coverage(ledger) == dict.fromkeys(TARGETS, 0)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(RecipeError, match="unknown target 'avx2'"):
        load_recipe("w8a8", ["stages=[{reduce-range: {target: avx2}}]"])


def test_declines_a_weight_with_a_zero_point() -> None:
    gm, _ = from_torch(linear(WEIGHT), X)
    faked(gm)
    (node,) = (n for n in gm.graph.nodes if "fake_quantize" in str(n.target))
    gm.register_buffer("zero", torch.tensor([0, 3, 0], dtype=torch.int8))
    with gm.graph.inserting_before(node):
        node.update_arg(2, gm.graph.get_attr("zero"))
    ctx = Context()
    assert ReduceRange().run(gm, ctx) == 0
    assert [d.reason for d in ctx.declines] == [
        "the weight has a zero point, towards which a coarser scale moves its integers, not towards 0"
    ]


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("w8a8", ["reduce_range"]),
        ("w8a8+smoothquant", ["smooth_quant", "reduce_range"]),
        ("w8a8+smoothquant+round", ["smooth_quant", "reduce_range", "round_weights", "reduce_range"]),
        ("w8a8+reduce-range+round", ["reduce_range", "round_weights"]),
    ],
)
def test_a_saturating_target_adds_the_stage_where_rounding_finds_the_scales_that_stay(recipe, stages) -> None:
    assert [p.name for p in exact_on("x86-avx2", load_recipe(recipe).stages)] == stages
    assert exact_on("x86-vnni", load_recipe(recipe).stages) == load_recipe(recipe).stages


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a8+round"])
def test_a_backend_for_such_machines_makes_every_recipe_exact_there(recipe) -> None:
    found = {}
    for target in ("x86-vnni", "x86-avx2"):
        gm = qgraph.quantize(linear(WEIGHT), [(X,)], example_inputs=(X,), recipe=recipe, backend=OnnxRuntime(target=target))
        found[target] = coverage(gm.meta["qgraph"].ledger)["x86-avx2"]
    assert found == {"x86-vnni": 1, "x86-avx2": 0}


def test_targets_that_nobody_knows_and_backends_without_any_are_refused() -> None:
    with pytest.raises(RecipeError, match="unknown target 'avx2'; did you mean 'x86-avx2'"):
        OnnxRuntime(target="avx2")
    with pytest.raises(RecipeError, match="target 'x86-avx2': backend reference is not made for machines of a kind; onnxruntime is"):
        get_backend("reference", target="x86-avx2")
