"""Cross-layer equalization: equal ranges on both sides of a value, the same numbers, reasons where it stops."""

import numpy as np
import onnx
import torch
from torch import nn

import qgraph
from qgraph.ledger import state
from qgraph.passes.equalize import Equalize
from qgraph.pipeline import Context, Pipeline
from qgraph.testing import check, from_onnx, from_torch
from qgraph.views import Conv, Linear, view_any
from qgraph.weights import constant_weight

IMAGE = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Pointwise, depthwise, pointwise with a residual sum; channels of very different ranges."""

    def __init__(self, clip=nn.ReLU):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.d, self.b, self.c = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 5, 1), nn.Conv2d(5, 5, 1)
        self.head, self.clip = nn.Linear(5, 3), clip()
        with torch.no_grad():
            for layer in (self.a, self.d, self.b, self.c):
                layer.weight *= torch.logspace(-2, 1, len(layer.weight))[torch.randperm(len(layer.weight)), None, None, None]

    def forward(self, x):
        y = self.b(self.clip(self.d(self.clip(self.a(x)))))
        return self.head((y + self.c(y)).mean((2, 3)))


def ranges(gm):
    layers = {
        str(v.weight.target).split("_")[0].split(".")[0]: constant_weight(v) for n in gm.graph.nodes if (v := view_any((Conv, Linear), n))
    }
    return {name: (w.absmax(w.v.in_axis), w.absmax(w.v.out_axis)) for name, w in layers.items()}


def scales(gm):
    return {e.node: (e.decision, e.reason) for e in gm.meta["qgraph"].ledger if e.role == "scale"}


def test_torch_ranges_on_both_sides_are_equal():
    gm = check(Equalize(), from_torch(Net(), IMAGE), (IMAGE,), None, tol=1e-4)
    found = ranges(gm)
    torch.testing.assert_close(found["a"][1], found["d"][0], rtol=1e-2, atol=0)
    torch.testing.assert_close(found["d"][1], found["b"][0], rtol=1e-2, atol=0)
    writers, readers = torch.maximum(found["b"][1], found["c"][1]), torch.maximum(found["c"][0], found["head"][0])
    torch.testing.assert_close(writers, readers, rtol=1e-2, atol=0)


def test_onnx_linears_around_a_relu_are_equalized():
    rng = np.random.default_rng(0)
    source = """<ir_version: 8, opset_import: ["": 17]> g (float[B,8] x) => (float[B,3] y) {
        a = MatMul (x, w)  b = Add (a, wb)  r = Relu (b)  y = Gemm <transB = 1> (r, v, vb) }"""
    proto = onnx.parser.parse_model(source)
    arrays = {
        "w": rng.normal(size=(8, 6)) * np.logspace(-1, 1, 6),
        "wb": rng.normal(size=6),
        "v": rng.normal(size=(3, 6)),
        "vb": rng.normal(size=3),
    }
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), k) for k, a in arrays.items())
    x = torch.randn(4, 8)
    gm = check(Equalize(), from_onnx(proto, x), (x,), None, tol=1e-4)
    (_, first), (second, _) = ranges(gm).values()
    torch.testing.assert_close(first, second, rtol=1e-2, atol=0)


def test_a_clip_above_0_stands_in_the_way_and_is_named():
    gm, _ = from_torch(Net(nn.ReLU6), IMAGE)
    Equalize().run(gm, Context())
    found = scales(gm)
    assert found["d"][0] == "unchanged"
    assert found["d"][1].endswith("clips to [0, 6], which would cut scaled channels elsewhere")
    assert found["c"] == ("equalized over 2 writers, 2 readers", "ranges balanced with b, c")
    assert found["a"] == ("unchanged", "it is the input x")


def test_the_numbers_hold_under_verification():
    gm, _ = from_torch(Net(), IMAGE)
    (step,) = Pipeline(Equalize(), verify="numerics").run(gm, Context(samples=[(IMAGE,)]))
    assert step.count == 2 + 2 + 3, "layers of three groups"


@torch.no_grad()
def test_equalization_makes_weights_with_one_scale_per_tensor_useful():
    net = Net().eval()
    want = net(IMAGE)
    errors = {}
    for recipe in ("w8a8-tensor", "w8a8-tensor+cle"):
        quantized = qgraph.quantize(net, [(IMAGE,)], example_inputs=(IMAGE,), recipe=recipe)
        errors[recipe] = float((quantized(IMAGE) - want).square().sum())
    assert errors["w8a8-tensor+cle"] < 0.2 * errors["w8a8-tensor"]


def test_factors_that_would_leave_float16_are_declined():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).half()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(4) * 60000)
        net[0].bias.fill_(0.5)
        net[2].weight.fill_(2.0**-20)
        net[2].weight[:, 0] = 60000.0
        net[0].weight[0, 0] = 2.0**-20
        net[0].bias[0] = 60000.0
    gm, _ = from_torch(net, torch.randn(2, 4).half())
    before = gm(torch.ones(2, 4).half())
    assert Equalize().run(gm, Context()) == 0
    assert torch.equal(gm(torch.ones(2, 4).half()), before)
    entry = state(gm).ledger.get("2", "scale")
    assert entry is not None and (entry.decision, entry.reason) == ("unchanged", "@0.bias would not fit float16 with its factors")
