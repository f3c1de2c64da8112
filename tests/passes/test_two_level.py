"""Group scales become whole multiples of one scale per channel, on torch and ONNX graphs."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import RecipeError
from qgraph.passes import TwoLevel
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.pipeline import Context
from qgraph.text import text
from qgraph.two_level import split
from qgraph.views import FakeQuantize, Linear, const_value, view

X = torch.linspace(-1, 2, 5 * 48).reshape(5, 48)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(48, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def proto() -> onnx.ModelProto:
    """The same layers as MatMul, weights [K, N]."""
    net = Net()
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> g (float[M,48] x) => (float[M,3] y) {
        p = MatMul (x, w)  h = Add (p, b)  r = Relu (h)  q = MatMul (r, v)  y = Add (q, c) }""")
    tensors = {"w": net.a.weight.T, "b": net.a.bias, "v": net.b.weight.T, "c": net.b.bias}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.ascontiguousarray(t.detach()), k) for k, t in tensors.items())
    return model


def quantized(origin, recipe="w4a16-g16"):
    model, example = (Net().eval(), (X,)) if origin == "torch" else (proto(), None)
    gm = qgraph.prepare(model, example, recipe=recipe)
    InsertFakeQuant.of(gm).run(gm, Context())
    return gm


def grids(gm):
    for node in gm.graph.nodes:
        v = view(Linear, node)
        w = view(FakeQuantize, v.weight) if v is not None else None
        if w is not None:
            yield w, tuple(None if n is None else const_value(n).movedim(w.axis, 1) for n in (w.scale, w.zero_point))


@pytest.mark.parametrize("recipe", ["w4a16-g16", "w4a16-g16-sym"])
@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_scales_get_two_levels_and_a_second_run_finds_nothing_to_do(origin, recipe):
    gm = quantized(origin, recipe)
    assert all(split(grid, w.dtype) is None for w, grid in grids(gm))
    before, shape = gm(X), text(gm)
    assert TwoLevel().run(gm, Context()) == 2
    assert all(split(grid, w.dtype) is not None for w, grid in grids(gm))
    after = gm(X)
    first = before[0] if isinstance(before, tuple) else before
    torch.testing.assert_close(after[0] if isinstance(after, tuple) else after, first, rtol=0, atol=0.15 * float(first.abs().max()))
    assert len(text(gm).splitlines()) == len(shape.splitlines())
    assert TwoLevel().run(gm, Context()) == 0


def test_both_origins_get_the_same_scales():
    found = []
    for origin in ("torch", "onnx"):
        gm = quantized(origin)
        TwoLevel().run(gm, Context())
        found.append([grid for _, grid in grids(gm)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_what_has_too_many_bits_or_is_no_float32_declines():
    gm = quantized("torch", qgraph.Recipe(weights=qgraph.recipe.Int(8, group=16)))
    ctx = Context()
    assert TwoLevel().run(gm, ctx) == 0
    assert ctx.declines[0].reason == "codes of int8 times whole numbers do not fit int8; two levels take at most 4 bits"
    half = qgraph.prepare(Net().half().eval(), (X.half(),), recipe="w4a16-g16")
    InsertFakeQuant.of(half).run(half, Context())
    assert TwoLevel().run(half, ctx) == 0
    assert "is no float32 matrix" in ctx.declines[-1].reason


def test_one_scale_per_channel_is_no_case_for_it():
    ctx = Context()
    assert TwoLevel().run(quantized("torch", "w4a16"), ctx) == 0
    assert ctx.declines == []


def test_it_runs_behind_stages_of_the_float_graph_only():
    with pytest.raises(RecipeError, match="awq runs on the float graph, so it cannot come after two_level"):
        qgraph.prepare(Net().eval(), (X,), recipe="w4a16-g16+two-level+awq")
