"""Weights rounded for the layer's output."""

import pytest
import torch

import qgraph
from qgraph.layers import layers
from qgraph.lockstep import lockstep
from qgraph.passes.bias_correct import BiasCorrect
from qgraph.passes.round_weights import RoundWeights
from qgraph.pipeline import Context
from qgraph.reference import fake_quantize
from tests.simulated import ConvNet, images, simulated
from tests.small import mlp_proto, samples


def case(origin):
    batches = images(16) if origin == "torch" else [{"x": x[None]} for x in samples(32)]
    return (ConvNet() if origin == "torch" else mlp_proto()), batches


def layer_errors(graph, batches):
    """Mean squared error of each layer on the same, float input, without the mean."""
    sites = layers(graph, Context(), by="test")
    found = []
    for at in lockstep(graph, sites, batches):
        x = torch.cat([x for x, _ in at.values(sites[at.node].view.x)])
        floats, quantized = at.call(sites[at.node].view.x, x, x)
        error = (floats - quantized).movedim(sites[at.node].output_axis, -1).flatten(0, -2)
        found.append(float(error.var(0, correction=0).mean()))
    return found


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_layers_keep_their_outputs_better_than_with_nearest_rounding(origin: str) -> None:
    model, batches = case(origin)
    graph = simulated(model, batches)
    before = layer_errors(graph, batches)
    assert RoundWeights().run(graph, Context(data=batches)) == len(before)
    after = layer_errors(graph, batches)
    assert after[0] < 0.9 * before[0] and sum(after) < 0.6 * sum(before), (before, after)


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_weights_lie_on_the_grid_of_their_scale_and_fold_to_the_same_numbers(origin: str) -> None:
    model, batches = case(origin)
    graph = simulated(model, batches)
    RoundWeights().run(graph, Context(data=batches))
    for layer in layers(graph, Context(), by="test").values():
        fake = layer.fake
        scale = graph.get_buffer(str(fake.scale.target))
        assert torch.equal(fake_quantize(layer.weight, scale, None, fake.dtype, fake.axis, fake.group), layer.weight)
    x = torch.cat([b[0] if origin == "torch" else torch.from_numpy(b["x"]) for b in batches])
    a, b = ((y[0] if isinstance(y, tuple | list) else y) for y in (graph(x), qgraph.convert(graph)(x)))
    assert torch.equal(a, b)


def test_a_second_run_rounds_the_same_and_leaves_nothing_to_correct() -> None:
    model, batches = case("torch")
    graph = simulated(model, batches)
    RoundWeights().run(graph, Context(data=batches))
    assert RoundWeights().run(graph, Context(data=batches)) == 0
    assert BiasCorrect().run(graph, Context(data=batches)) == 0


def test_the_model_comes_closer_to_the_float_one_than_with_corrected_biases_alone() -> None:
    model, batches = case("torch")
    x = torch.cat([b[0] for b in batches])
    with torch.no_grad():
        want = model.eval()(x)
    errors = []
    for stage in (RoundWeights(), BiasCorrect()):
        graph = simulated(model, batches)
        stage.run(graph, Context(data=batches))
        errors.append(float((qgraph.convert(graph)(x) - want).square().mean()))
    assert errors[0] < errors[1]


def test_what_has_no_columns_is_declined() -> None:
    net = torch.nn.Sequential(torch.nn.ConvTranspose2d(3, 4, 2, stride=2), torch.nn.ReLU())
    batches = images(2)
    graph = simulated(net, batches)
    ctx = Context(data=batches)
    assert RoundWeights().run(graph, ctx) == 0
    assert "has no fixed columns" in ctx.declines[0].reason


def test_the_ledger_says_so() -> None:
    model, batches = case("torch")
    graph = simulated(model, batches)
    RoundWeights().run(graph, Context(data=batches))
    entries = [e for e in graph.meta["qgraph"].ledger if e.by == "round_weights"]
    assert {e.role for e in entries} == {"weight", "bias"}
    assert all(e.decision.startswith("int8") for e in entries if e.role == "weight")
