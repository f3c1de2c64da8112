"""Moments of a graph's values against statistics of values that the graph computes, and reasons where nothing is known."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qgraph.capture import capture
from qgraph.edit import copy_graph
from qgraph.moments import MOMENTS, Moments, normal, uniform
from qgraph.onnx_io import from_onnx
from qgraph.passes import AbsorbFromMoments, Canonicalize, Equalize, FoldBatchNorm, InferTypes, MergeEqual
from qgraph.pipeline import Context, Pipeline
from qgraph.propagate import propagate
from tests.passes.graphs import Fn
from tests.passes.test_fold_batch_norm import trained

MEAN, STD = torch.tensor([0.5, -1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 2.0, 0.3])
IMAGES = (torch.randn(64, 4, 24, 20, generator=torch.Generator().manual_seed(0)) * STD[:, None, None]) + MEAN[:, None, None]
ROWS = torch.randn(30_000, 4, generator=torch.Generator().manual_seed(1)) * STD + MEAN


def result(gm, inputs=None):
    """What is known of the value that the graph returns first."""
    return propagate(gm, inputs)[gm.graph.output_node().args[0][0]]


def expect(gm, x, *, mean_only=False):
    """The graph's result on x has the moments that are propagated from those of x."""
    gm = gm if isinstance(gm, torch.fx.GraphModule) else capture(gm.eval(), (x,))
    Pipeline(InferTypes(), Canonicalize()).run(gm)
    image = x.ndim == 4
    found = result(gm, normal(*((v[:, None, None] if image else v) for v in (MEAN, STD))))
    assert isinstance(found, Moments), found
    with torch.no_grad():
        (y,) = tree_leaves(gm(x))
    axis = 1 if image and y.ndim > 2 else -1
    rows = y.movedim(axis, -1).flatten(0, -2)
    n = rows.shape[1]
    mean, std = (t.expand(y.shape[axis], *t.shape[1:]) if t.ndim == 1 else t for t in (found.mean.flatten(), found.std.flatten()))
    mean, std = mean.expand(n), std.expand(n)
    scale = float(rows.std())
    torch.testing.assert_close(mean.float(), rows.mean(0), rtol=0.02, atol=0.02 * scale)
    if not mean_only:
        torch.testing.assert_close(std.float(), rows.std(0), rtol=0.04, atol=0.02 * scale)
    low, high = (t.flatten().expand(n) for t in (found.low, found.high))
    assert bool((rows.amin(0) >= low - 1e-3).all() and (rows.amax(0) <= high + 1e-3).all()), "6 deviations hold all of the sample"
    return found


def gated(x):
    a, b = x.split(2, 1)
    return torch.sigmoid(a) * b


def layer(made):
    torch.manual_seed(2)
    made.bias.data.normal_()
    return made


IMAGE_NETS = {
    "grouped convolution": layer(nn.Conv2d(4, 6, (3, 2), groups=2)),
    "strided convolution": layer(nn.Conv2d(4, 3, 3, stride=2, bias=True)),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hard swish": nn.Hardswish(),
    "leaky": nn.LeakyReLU(0.2),
    "slope per channel": nn.PReLU(4, 0.3),
    "channels swapped": Fn(lambda x: torch.cat([x[:, 2:], x[:, :2]], 1)),
    "split and gated": Fn(gated),
    "constants": Fn(lambda x: (3 - x) / 2),
    "square": Fn(lambda x: x * x + 1),
    "channels last": Fn(lambda x: x.permute(0, 2, 3, 1) * 2),
}


@pytest.mark.parametrize("name", IMAGE_NETS)
def test_torch_values_have_the_moments_that_are_propagated(name):
    net = IMAGE_NETS[name]
    if name == "channels last":
        found = result(capture(net, (IMAGES[:3],)), normal(MEAN[:, None, None], STD[:, None, None]))
        torch.testing.assert_close(found.mean.flatten().float(), 2 * MEAN)
        return
    expect(net, IMAGES)


def test_averages_keep_the_mean_and_bound_the_deviation():
    found = expect(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), IMAGES, mean_only=True)
    whole = expect(Fn(lambda x: torch.relu(x).mean((2, 3))), IMAGES, mean_only=True)
    torch.testing.assert_close(found.mean.flatten(), whole.mean.flatten())
    assert whole.std.shape == (1, 4)


def test_linear_layers_mix_means_and_variances():
    expect(nn.Sequential(layer(nn.Linear(4, 5)), nn.ReLU()), ROWS)


def test_what_comes_out_of_norms_is_known_without_inputs():
    gm = capture(trained(nn.Sequential(nn.BatchNorm2d(4))), (IMAGES[:3],))
    found = result(gm)
    norm = nn.LayerNorm(5)
    norm.weight.data, norm.bias.data = torch.linspace(-2, 1, 5), torch.linspace(1, 3, 5)
    rows = result(capture(norm.eval(), (torch.randn(2, 7, 5),)))
    assert found.mean.shape == (1, 4, 1, 1) and rows.mean.shape == (1, 1, 5)
    torch.testing.assert_close(rows.mean.flatten().float(), norm.bias.data)
    torch.testing.assert_close(rows.std.flatten().float(), norm.weight.data.abs())


def test_a_batch_norm_tells_of_what_it_reads():
    net = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)))
    gm = capture(net, (IMAGES[:3],))
    relu = next(n for n in gm.graph.nodes if "relu" in str(n.target))
    found = propagate(gm)[relu]
    torch.testing.assert_close(found.std.flatten().float(), net[1].running_var.sqrt())
    assert bool((found.low >= 0).all()), "a relu stays one"


def test_softmax_averages_the_values_it_weighs():
    class Heads(nn.Module):
        def forward(self, x):
            return torch.softmax(x, -1), torch.softmax(x, -1) @ (x.mT @ x + 1).clamp(-1, 1)

    gm = capture(Heads(), (torch.randn(2, 3, 4),))
    weights, mixed = (propagate(gm, normal(MEAN, STD))[n] for n in gm.graph.output_node().args[0])
    assert not weights.known and (float(weights.low), float(weights.high)) == (0.0, 1.0)
    assert float(mixed.low.min()) == -1.0 and float(mixed.high.max()) == 1.0 and mixed.mean.shape[-2] == 1


def test_products_of_independent_activations_sum_up():
    gm = capture(Fn(lambda x: x[:, :3] @ x[:, 3:].mT), (torch.randn(5, 7, 4),))
    x = torch.randn(3000, 7, 4) * STD + MEAN
    y = x[:, :3] @ x[:, 3:].mT
    found = result(gm, normal(MEAN, STD))
    assert float(found.mean.max()) == pytest.approx(float(y.mean()), rel=0.02)
    assert float(found.std.max()) == pytest.approx(float(y.std()), rel=0.05)


def test_onnx_values_have_the_moments_that_are_propagated():
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[N,4] x) => (float[N,3] y) {
        a = MatMul (x, w)  b = Add (a, wb)  c = Clip (b, low, high)  d = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (c, v, vb)
        e = LeakyRelu <alpha = 0.3> (d)  y = Sub (e, one) }""")
    shapes = {"w": (4, 6), "wb": (6,), "v": (3, 6), "vb": (3,)}
    arrays = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    arrays["w"] = np.linalg.qr(rng.normal(size=(6, 6)))[0][:4].astype(np.float32) / STD.numpy()[:, None] * np.eye(4, 6, dtype=np.float32)
    arrays |= {"low": np.float32(-0.5), "high": np.float32(2), "one": np.float32(1)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), k) for k, a in arrays.items())
    expect(from_onnx(proto), ROWS)


def test_unknown_operations_say_so_down_to_the_result():
    gm = capture(Fn(lambda x: torch.relu(torch.sort(x, -1)[0]) + 1), (ROWS[:3],))
    assert "nothing is known of what sort" in result(gm, normal(MEAN, STD)).replace("default", "sort")
    bounded = result(capture(Fn(lambda x: torch.sigmoid(torch.sort(x, -1)[0])), (ROWS[:3],)))
    assert not bounded.known and (float(bounded.low), float(bounded.high)) == (0.0, 1.0)


def net():
    torch.manual_seed(3)
    return trained(
        nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, groups=1), nn.BatchNorm2d(5), nn.ReLU())
    )


def kept(gm):
    return [n.meta[MOMENTS] for n in gm.graph.nodes if MOMENTS in n.meta]


def as_onnx(model):
    path_free = torch.onnx.export(model, (IMAGES[:3],), dynamo=True, optimize=False, verbose=False).model_proto
    return from_onnx(path_free)


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_folded_batch_norms_leave_what_they_know(origin):
    model = net()
    gm = capture(model, (IMAGES[:3],)) if origin == "torch" else as_onnx(model)
    Pipeline(InferTypes(), Canonicalize(), FoldBatchNorm(), MergeEqual()).run(gm)
    assert "atch" not in str([n.target for n in gm.graph.nodes])
    for graph in (gm, copy_graph(gm)):
        found = kept(graph)
        assert len(found) == 2
        for have, norm in zip(found, (model[1], model[4]), strict=True):
            torch.testing.assert_close(have.mean.flatten().float(), norm.bias.detach())
            torch.testing.assert_close(have.std.flatten().float(), norm.weight.detach().abs())


def test_a_batch_norm_folded_forward_tells_of_what_the_layer_reads():
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 2)))
    gm = capture(model, (IMAGES[:3],))
    FoldBatchNorm().run(gm, Context())
    (found,) = kept(gm)
    torch.testing.assert_close(found.mean.flatten().float(), model[1].running_mean)
    torch.testing.assert_close(found.std.flatten().float(), model[1].running_var.sqrt())


def test_equalization_and_absorption_move_moments_with_the_values():
    model = net()
    model[1].bias.data += 3  # above 3 deviations in some channels
    gm = capture(model, (IMAGES[:3],))
    FoldBatchNorm().run(gm, Context())
    conv = next(n for n in gm.graph.nodes if "conv2d" in str(n.target))
    before, was = conv.meta[MOMENTS], values(gm, conv)
    assert Equalize().run(gm, Context())
    factors = (values(gm, conv) / was).mean((0, 2, 3))
    assert float(factors.std()) > 0.05
    torch.testing.assert_close(conv.meta[MOMENTS].mean.flatten().float(), before.mean.flatten().float() * factors, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(conv.meta[MOMENTS].std.flatten().float(), before.std.flatten().float() * factors, rtol=1e-3, atol=1e-3)
    scaled, now = conv.meta[MOMENTS], values(gm, conv)
    assert AbsorbFromMoments().run(gm, Context())
    shift = (values(gm, conv) - now).mean((0, 2, 3))
    assert bool((shift < -0.01).any())
    torch.testing.assert_close(conv.meta[MOMENTS].mean.flatten().float(), scaled.mean.flatten().float() + shift, rtol=1e-3, atol=1e-3)


def values(gm, node):
    class Stop(torch.fx.Interpreter):
        def run_node(self, n):
            found = super().run_node(n)
            return (found, seen.append(found))[0] if n is node else found

    seen = []
    with torch.no_grad():
        Stop(gm).run(IMAGES[:3])
    return seen[0]


def test_inputs_between_two_numbers_keep_them_as_bounds():
    gm = capture(Fn(lambda x: x * 2 - 1), (ROWS[:3],))
    found = result(gm, uniform(0.0, 1.0))
    assert (float(found.low), float(found.high)) == (-1.0, 1.0)
    assert float(found.std) == pytest.approx(2 / 12**0.5)
