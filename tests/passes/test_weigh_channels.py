"""E[x^2] of input channels, and the levels that are fitted with it."""

import pytest
import torch

import qgraph
from qgraph.codebook import fit
from qgraph.passes.weigh_channels import SQUARES, WeighChannels, importance
from qgraph.pipeline import Context
from qgraph.types import PerAxis, QSpec
from tests.small import mlp_proto, mlp_torch, samples


def prepared(origin, recipe="w2a16-kmeans"):
    x = samples(12) * [[4.0] * 3 + [1.0] * 13]
    x = torch.from_numpy(x.astype("float32"))
    if origin == "onnx":
        return qgraph.prepare(mlp_proto(), recipe=recipe), [{"x": b.numpy()} for b in x.split(4)], x
    model, _ = mlp_torch()
    return qgraph.prepare(model, (x[:4],), recipe=recipe), [(b,) for b in x.split(4)], x


def layers(graph):
    return [n for n in graph.graph.nodes if SQUARES in n.meta]


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_each_layer_gets_the_mean_square_of_what_it_reads(origin: str) -> None:
    graph, batches, x = prepared(origin)
    before = qgraph.text(graph)
    assert WeighChannels().run(graph, Context(data=batches)) == 2
    assert qgraph.text(graph) == before
    model, _ = mlp_torch()
    with torch.no_grad():
        hidden = model.first(x).relu()
    for node, inputs in zip(layers(graph), (x, hidden), strict=True):
        assert torch.allclose(node.meta[SQUARES], inputs.square().mean(0), rtol=1e-5)
    assert WeighChannels().run(graph, Context(data=batches)) == 0


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_levels_are_fitted_with_it(origin: str) -> None:
    graph, batches, x = prepared(origin, "w2a16-kmeans+weigh-channels")
    qgraph.calibrate(graph, batches)
    weight = mlp_torch()[0].first.weight.detach()
    spec = QSpec("uint2", granularity=PerAxis(0), codebook="kmeans")
    wanted = fit(weight, spec, x.square().mean(0)[None]).table
    found = next(t for name, t in qgraph.convert(graph).named_buffers() if name.endswith("_table") and t.shape == wanted.shape)
    assert torch.allclose(found, wanted) and not torch.allclose(found, fit(weight, spec).table)


def test_a_convolution_has_one_number_per_input_channel_of_each_group() -> None:
    conv = torch.nn.Conv2d(4, 6, 3, groups=2, bias=False)
    x = torch.randn(2, 4, 5, 5) * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1)
    graph = qgraph.prepare(conv, (x,), recipe="w3a16-kmeans")
    assert WeighChannels().run(graph, Context(data=[(x,)])) == 1
    (node,) = layers(graph)
    squares = x.square().mean((0, 2, 3))
    found = importance(node.args[1])
    assert found.shape == (6, 2, 3, 3)
    assert torch.allclose(found[1, :, 0, 2], squares[:2]) and torch.allclose(found[5, :, 1, 1], squares[2:])


def test_readers_of_one_weight_add_up() -> None:
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 5)

        def forward(self, x, y):
            return self.layer(x) + self.layer(y * 2)

    x, y = torch.randn(7, 3), torch.randn(7, 3)
    graph = qgraph.prepare(Twice(), (x, y), recipe="w3a16-kmeans")
    WeighChannels().run(graph, Context(data=[(x, y)]))
    weight = layers(graph)[0].args[1]
    assert torch.allclose(importance(weight)[4], (x.square() + 4 * y.square()).mean(0), rtol=1e-5)


def test_integers_are_declined() -> None:
    graph, batches, _ = prepared("onnx", "w8a16")
    ctx = Context(data=batches)
    assert WeighChannels().run(graph, ctx) == 0
    assert [d.reason for d in ctx.declines] == [
        f"its weight is int8 sym per axis {a}, with scales from its range; weight_range=search takes the data in" for a in (1, 0)
    ]


def test_scales_of_integers_are_searched_with_it() -> None:
    tables = []
    for name in ("w4a16-g16-sym", "w4a16-g16-sym+weigh-channels"):
        graph, batches, x = prepared("onnx", name)
        qgraph.calibrate(graph, batches)
        weight = next(t for n, t in qgraph.convert(graph).named_buffers() if n.startswith("w1_int4"))
        scale = next(t for n, t in qgraph.convert(graph).named_buffers() if n == "w1_scale")
        error = weight * scale - mlp_torch()[0].first.weight.detach().T
        tables.append(float((x.square().mean(0)[:, None] * error.square()).sum()))
    assert tables[1] < 0.97 * tables[0]


def test_data_are_needed_and_the_ledger_says_what_they_did() -> None:
    graph, batches, _ = prepared("onnx", "w2a16-kmeans+weigh-channels")
    with pytest.raises(qgraph.CalibrationError, match="weigh_channels"):
        qgraph.convert(graph)
    qgraph.calibrate(graph, batches)
    entries = [e for e in graph.meta["qgraph"].ledger if e.role == "weight"]
    assert {(e.by, e.reason) for e in entries} == {("weigh_channels", "numbers chosen with E[x^2] of its input channels")}
