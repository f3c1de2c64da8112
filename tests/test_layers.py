"""Layers as rows times columns, and where their biases are."""

import onnx
import pytest
import torch
from torch import nn

from qgraph.layers import layers
from qgraph.lockstep import lockstep
from qgraph.pipeline import Context
from tests.simulated import ConvNet, images, simulated

CONVS = {
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, (3, 5), padding=(1, 2), groups=4),
    "grouped and dilated": nn.Conv2d(4, 6, 3, dilation=2, groups=2),
    "pointwise": nn.Conv2d(4, 6, 1, bias=False),
}


def stops(graph, batches, ctx=None):
    sites = layers(graph, ctx or Context(), by="test")
    return [(at, sites[at.node]) for at in lockstep(graph, sites, batches)]


@pytest.mark.parametrize("name", CONVS)
def test_rows_times_columns_are_the_convolution(name: str) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(2, 4, 9, 8),) for _ in range(2)]
    graph = simulated(nn.Sequential(CONVS[name], nn.ReLU()), batches)
    sites = layers(graph, Context(), by="test")
    for at in lockstep(graph, sites, batches):
        layer = sites[at.node]
        weight = at.constant(layer.view.weight)[0]
        for x, _ in at.values(layer.view.x):
            y = at.call(layer.view.x, x, x)[0]
            found = layer.rows(weight) @ layer.columns(x, 10**9)  # [groups, outputs, positions]
            found = found.flatten(0, 1) + layer.bias()[:, None].float()
            torch.testing.assert_close(found, y.movedim(1, 0).flatten(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.from_rows(layer.rows(weight)), weight)
        some = layer.columns(x, 10)
        assert some.shape[:2] == layer.columns(x, 10**9).shape[:2] and 0 < some.shape[2] < 60


def gemm_model(body, **constants):
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> g (float[N,4] x) => (float[N,3] y) {{ {body} }}')
    for name, value in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.numpy(), name))
    return model


W = torch.tensor([[1.0, -0.5, 0.25], [0.3, 2.0, -1.0], [0.7, 0.1, 0.9], [-0.2, 0.4, 0.6]])
B = torch.tensor([0.5, -1.0, 2.0])
ROWS = [{"x": torch.randn(1, 4, generator=torch.Generator().manual_seed(i)) + 0.5} for i in range(6)]


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)", {"w": W.T.contiguous(), "b": B}),
        ("y = Gemm (x, w)", {"w": W}),
        ("p = MatMul (x, w)  y = Add (b, p)", {"w": W, "b": B[None]}),
    ],
)
def test_a_bias_of_onnx_is_found_and_changed_wherever_it_is(body: str, constants: dict) -> None:
    batches = [{"x": r["x"].numpy()} for r in ROWS]
    graph = simulated(gemm_model(body, **constants), batches, "w8a8-dynamic")
    (layer,) = layers(graph, Context(), by="test").values()
    x = torch.cat([r["x"] for r in ROWS])
    factor = 2.0 if "beta" in body else 1.0
    expected = factor * B if "b" in constants else torch.zeros(3)
    torch.testing.assert_close(layer.bias().float(), expected)
    before = first(graph(x))
    layer.set_bias(graph, layer.bias() + torch.tensor([1.0, 2.0, -3.0]), by="test")
    graph.recompile()
    torch.testing.assert_close(first(graph(x)) - before, torch.tensor([1.0, 2.0, -3.0]).expand(6, 3))
    (layer,) = layers(graph, Context(), by="test").values()
    torch.testing.assert_close(layer.bias().float(), expected + torch.tensor([1.0, 2.0, -3.0]))


def first(value):
    return value[0] if isinstance(value, tuple | list) else value


@pytest.mark.parametrize(
    ("body", "constants", "reason"),
    [
        ("y = MatMul (x, w)", {"w": W}, "MatMul takes no bias, and no constant per output channel is added behind it"),
        ("y = Gemm <beta = 0.0> (x, w, b)", {"w": W, "b": B}, "its bias has factor 0"),
    ],
)
def test_a_layer_without_a_place_for_a_bias_is_declined(body: str, constants: dict, reason: str) -> None:
    graph = simulated(gemm_model(body, **constants), [{"x": ROWS[0]["x"].numpy()}], "w8a8-dynamic")
    ctx = Context()
    assert layers(graph, ctx, by="test") == {}
    assert [d.reason for d in ctx.declines] == [reason]


def test_layers_in_bodies_of_control_flow_are_declined() -> None:
    body = """y = If (c) <then_branch = t () => (float[N,3] t0) { m = MatMul (x, w) t0 = Add (m, b) },
                          else_branch = e () => (float[N,3] e0) { e0 = Gemm (x, v, b) }>"""
    model = gemm_model(f"z = ReduceMax <keepdims = 0> (x) c = Cast <to = 9> (z) {body}", w=W, v=W.flip(0), b=B)
    graph = simulated(model, [{"x": ROWS[0]["x"].numpy()}], "w8a8-dynamic")
    ctx = Context()
    assert layers(graph, ctx, by="test") == {}
    assert len(ctx.declines) == 2 and {d.reason for d in ctx.declines} == {
        "it is in a body of control flow; layers of the graph itself are corrected"
    }


def test_a_bias_that_two_layers_share_is_changed_for_one() -> None:
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.a(x), self.b(x)

    graph = simulated(Shared(), [(torch.randn(2, 4),)])
    a, b = layers(graph, Context(), by="test").values()
    old = b.bias()
    a.set_bias(graph, a.bias() + 1, by="test")
    torch.testing.assert_close(b.bias(), old)


def test_the_ledger_knows_layers_by_the_same_names() -> None:
    graph = simulated(ConvNet(), images(2))
    ledger = graph.meta["qgraph"].ledger
    assert all(ledger.get(layer.label(ledger), "weight") for layer in layers(graph, Context(), by="test").values())
