"""Bias correction: channel means of the quantized model are those of the float one."""

import pytest
import torch
from torch import nn

import qgraph
from qgraph.edit import copy_graph
from qgraph.layers import layers
from qgraph.lockstep import lockstep
from qgraph.moments import MOMENTS, normal
from qgraph.passes.bias_correct import BiasCorrect, CorrectFromMoments, correct, mean_shift
from qgraph.pipeline import Context
from tests.simulated import ConvNet, images, simulated
from tests.small import mlp_proto, samples


def channel_errors(graph, batches):
    """Largest |mean error| over the output channels of each layer, computed from all outputs."""
    sites = layers(graph, Context(), by="test")
    found = []
    for at in lockstep(graph, sites, batches):
        layer = sites[at.node]
        x = [torch.cat(side) for side in zip(*at.values(layer.view.x), strict=True)]
        floats, quantized = at.call(layer.view.x, *x)
        error = (floats - quantized).movedim(layer.output_axis, -1).flatten(0, -2).mean(0)
        if layer.bias_reader is not at.node:  # an addition behind the product
            was, now = at.constant(layer.bias_node)
            error = error + was - now
        found.append(float(error.abs().max()))
    return found


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_means_of_all_layers_become_those_of_the_float_model(origin: str) -> None:
    batches = images(12) if origin == "torch" else [{"x": x[None]} for x in samples(12)]
    graph = simulated(ConvNet() if origin == "torch" else mlp_proto(), batches)
    before = channel_errors(graph, batches)
    assert BiasCorrect().run(graph, Context(data=batches)) == len(before)
    after = channel_errors(graph, batches)
    assert max(before) > 1e-3 and max(after) < 1e-5, (before, after)
    assert BiasCorrect().run(graph, Context(data=batches)) == 0


def test_the_float_weights_and_the_scales_stay() -> None:
    batches = images(4)
    graph = simulated(ConvNet(), batches)
    before = {n.name: n.target for n in graph.graph.nodes if n.op == "get_attr" and "bias" not in str(n.target)}
    BiasCorrect().run(graph, Context(data=batches))
    after = {n.name: n.target for n in graph.graph.nodes if n.op == "get_attr" and "bias" not in str(n.target)}
    assert after == before


def test_correcting_in_order_is_better_than_all_at_once() -> None:
    torch.manual_seed(3)
    deep = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(16, 16), nn.ReLU())]).eval()
    for layer in deep[::2]:
        layer.weight.data *= 2 * torch.exp(torch.randn(16, 16))
        layer.weight.data /= layer.weight.data.norm() / 4
        layer.bias.data.normal_(0.3, 0.2)
    batches = [(x[None],) for x in torch.randn(64, 16, generator=torch.Generator().manual_seed(5)) + 0.5]
    graph = simulated(deep, batches)
    at_once = copy_graph(graph)
    sites = layers(at_once, Context(), by="test")
    shifts = [(sites[at.node], mean_shift(at, sites[at.node])) for at in lockstep(at_once, sites, batches)]
    for layer, shift in shifts:
        correct(at_once, layer, shift, by="test")
    BiasCorrect().run(graph, Context(data=batches))
    assert channel_errors(graph, batches)[-1] < 0.2 * channel_errors(at_once, batches)[-1]


def test_an_added_bias_and_a_moved_one_are_in_the_ledger() -> None:
    batches = images(4)
    graph = simulated(ConvNet(), batches)
    BiasCorrect().run(graph, Context(data=batches))
    found = [e for e in graph.meta["qgraph"].ledger if e.by == "bias_correct"]
    assert len(found) == 5 and {e.role for e in found} == {"bias"}
    assert all(e.reason.startswith("moved by up to ") for e in found)


def test_a_corrected_model_lowers_as_before() -> None:
    batches = images(6)
    graph = simulated(ConvNet(), batches)
    plain = qgraph.lower(qgraph.convert(graph), strict=True).kernels()
    BiasCorrect().run(graph, Context(data=batches))
    corrected = qgraph.lower(qgraph.convert(graph), strict=True).kernels()
    assert len(corrected) == len(plain)


def test_a_product_without_a_bias_is_declined() -> None:
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return torch.relu(x @ self.w)

    batches = [(torch.randn(2, 4),)]
    ctx = Context(data=batches)
    assert BiasCorrect().run(simulated(Product(), batches), ctx) == 0
    assert [d.reason.split(",")[0] for d in ctx.declines] == ["aten.matmul takes no bias"]


class Normed(nn.Module):
    """Layers behind batch norms with means far from 0: grouped, depthwise, a linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.d, self.g = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, (2, 3), groups=2)
        self.norm, self.head = nn.BatchNorm2d(8, momentum=None), nn.Linear(6, 5)
        nn.init.uniform_(self.norm.weight, 0.3, 0.6)
        nn.init.uniform_(self.norm.bias, 1, 3)
        for layer in (self.d, self.g, self.head):
            layer.weight.data *= torch.exp(torch.randn(layer.weight.shape))
        self.train()(torch.cat([x for (x,) in images(12)]))

    def forward(self, x):
        return self.head(self.g(self.d(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


def normed(recipe="w8a8-tensor"):
    batches = images(12)
    return simulated(Normed(), batches, recipe), batches


def as_onnx():
    model = Normed().eval()
    return torch.onnx.export(model, (images(2)[0][0],), dynamo=True, optimize=False, verbose=False).model_proto


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_without_data_the_mean_error_of_the_weights_is_taken_back(origin: str) -> None:
    batches = images(12)
    graph = simulated(Normed() if origin == "torch" else as_onnx(), batches, "w8a16")
    before = channel_errors(graph, batches)
    ctx = Context()
    assert CorrectFromMoments().run(graph, ctx) == 3
    assert [d.reason.split("input")[0] for d in ctx.declines] == ["nothing is known of the "]
    after = channel_errors(graph, batches)
    assert all(b < 0.4 * a for a, b in zip(before[1:], after[1:], strict=True)), (before, after)
    assert CorrectFromMoments().run(graph, Context()) == 0


def test_with_statistics_of_the_input_the_first_layer_is_corrected_too() -> None:
    graph, _ = normed()
    next(n for n in graph.graph.nodes if n.op == "placeholder").meta[MOMENTS] = normal(torch.full((3, 1, 1), 0.3), torch.ones(()))
    assert CorrectFromMoments().run(graph, Context()) == 4


def test_it_starts_from_the_biases_of_before_any_correction() -> None:
    graph, batches = normed()
    twice = copy_graph(graph)
    CorrectFromMoments().run(graph, Context())
    BiasCorrect().run(twice, Context(data=batches))
    CorrectFromMoments().run(twice, Context())
    once, again = (list(layers(g, Context(), by="test").values())[1:] for g in (graph, twice))  # of the first one's input nothing is known
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a.bias(), b.bias(), rtol=1e-4, atol=1e-5)
