"""What never falls to 0 before a relu goes past it into the next bias; exact on the data it was measured on."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qgraph.channels import Channels
from qgraph.collect import collect
from qgraph.passes import FoldBatchNorm, InferTypes
from qgraph.passes.absorb_high_bias import AbsorbFromMoments, AbsorbHighBias
from qgraph.pipeline import Context, Pipeline
from qgraph.testing import from_onnx, from_torch
from qgraph.views import Activation, view

IMAGE = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
ROWS = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))


def net(*layers, biases):
    torch.manual_seed(0)
    for layer in layers:
        if getattr(layer, "bias", None) is not None:
            nn.init.uniform_(layer.bias, *biases)
    return nn.Sequential(*layers).eval()


def absorbed(start, x):
    """Runs the pass under its contract on the data; (count, smallest value behind each relu per channel before, and after)."""
    gm, _ = start
    before = relu_minima(gm, x)
    (step,) = Pipeline(AbsorbHighBias(), verify="numerics").run(gm, Context(samples=[(x,)], data=[(x,)]))
    assert not Pipeline(AbsorbHighBias()).run(gm, Context(data=[(x,)]))[0].count, "a second run finds nothing"
    return step.count, before, relu_minima(gm, x)


def relu_minima(gm, x):
    relus = [n for n in gm.graph.nodes if view(Activation, n)]
    axis = 1 if x.ndim == 4 else -1
    found = [Channels(axis) for _ in relus]
    collect(gm, {n: c.update for n, c in zip(relus, found, strict=True)}, [(x,)])
    return [c.low for c in found]


def declines(gm, x):
    ctx = Context(data=[(x,)])
    assert not AbsorbHighBias().run(gm, ctx)
    return [d.reason for d in ctx.declines]


def test_torch_convolutions_pass_the_smallest_value_on():
    start = from_torch(net(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 2, groups=3), biases=(0, 3)), IMAGE)
    count, before, after = absorbed(start, IMAGE)
    assert count == 2
    assert bool((before[0] > 0.1).any())
    assert bool((after[0] < 1e-5).all())
    shifts = [(e.node, e.decision) for e in start[0].meta["qgraph"].ledger if e.role == "shift"]
    assert shifts == [("0", "bias lowered"), ("2", "bias raised")]


def test_a_reader_without_bias_gets_one():
    count, _, after = absorbed(from_torch(net(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3, bias=False), biases=(1, 3)), ROWS), ROWS)
    assert count == 2
    assert bool((after[0] < 1e-5).all())


def test_onnx_sums_behind_products_are_biases():
    rng = np.random.default_rng(0)
    source = """<ir_version: 8, opset_import: ["": 17]> g (float[4,8] x) => (float[4,3] y) {
        a = MatMul (x, w)  b = Add (wb, a)  r = Relu (b)  c = MatMul (r, v)  d = Add (c, vb)
        e = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (r, u, ub)  y = Add (d, e) }"""
    proto = onnx.parser.parse_model(source)
    shapes = {"w": (8, 6), "wb": (6,), "v": (6, 3), "vb": (3,), "u": (3, 6), "ub": (3,)}
    arrays = {k: rng.uniform(-0.3, 0.3, s).astype(np.float32) + (2 if k == "wb" else 0) for k, s in shapes.items()}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), k) for k, a in arrays.items())
    count, before, after = absorbed(from_onnx(proto, ROWS), ROWS)
    assert count == 3
    assert bool((before[0] > 0.1).any())
    assert bool((after[0] < 1e-5).all())


def test_padding_clips_and_other_readers_stand_in_the_way():
    padded = from_torch(net(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1), biases=(1, 3)), IMAGE)
    assert declines(padded[0], IMAGE) == ["2 pads its input, where a shift is missing"]
    clipped = from_torch(net(nn.Conv2d(4, 6, 1), nn.ReLU6(), nn.Conv2d(6, 3, 1), biases=(1, 3)), IMAGE)
    assert declines(clipped[0], IMAGE) == ["it also clips at 6"]
    last = from_torch(net(nn.Conv2d(4, 6, 1), nn.ReLU(), biases=(1, 3)), IMAGE)
    assert declines(last[0], IMAGE) == ["output reads it, which is no layer with a constant weight"]


def test_channels_that_come_down_to_0_are_left_alone():
    gm, _ = from_torch(net(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), biases=(-3, -2)), ROWS)
    assert not AbsorbHighBias().run(gm, Context(data=[(ROWS,)]))


def normed(bias):
    """A convolution whose batch norm knows its outputs, a relu, and a reader."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.Conv2d(6, 3, (2, 1)))
    nn.init.uniform_(model[1].weight, 0.2, 0.4)
    model[1].bias.data = bias
    model.train()(IMAGE)
    return model.eval()


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_batch_norms_tell_what_is_above_0_without_data(origin):
    bias = torch.tensor([2.0, -1.0, 0.5, 1.5, 3.0, 0.0])
    model = normed(bias)
    with torch.no_grad():
        want = model(IMAGE)
    start = from_torch(model, IMAGE)
    if origin == "onnx":
        start = from_onnx(torch.onnx.export(model, (IMAGE,), dynamo=True, optimize=False, verbose=False).model_proto, IMAGE)
    gm, _ = start
    Pipeline(InferTypes(), FoldBatchNorm()).run(gm)
    before = relu_minima(gm, IMAGE)[0]
    assert AbsorbFromMoments().run(gm, Context()) == 2
    lowered = before - relu_minima(gm, IMAGE)[0]
    c = (bias - 3 * model[1].weight.abs()).clamp(min=0).detach()
    torch.testing.assert_close(lowered, c.where(before > c, before), rtol=1e-3, atol=1e-4)
    (got,) = tree_leaves(gm(IMAGE))
    assert float((got - want).detach().square().mean().sqrt()) < 0.01 * float(want.std()), "what lies below c is rare"
    assert AbsorbFromMoments().run(gm, Context()) == 0


def test_values_of_which_no_norm_tells_anything_are_declined():
    gm, _ = from_torch(net(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1), biases=(1, 3)), IMAGE)
    ctx = Context()
    assert not AbsorbFromMoments().run(gm, ctx)
    assert [d.reason for d in ctx.declines] == ["nothing is known of the input input"]
