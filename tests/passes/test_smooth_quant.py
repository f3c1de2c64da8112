"""Factors of equation 4 go into what makes the values, or into one product where asked; every linear is accounted for."""

import math

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import qgraph
from qgraph.channels import Channels
from qgraph.collect import collect
from qgraph.errors import CalibrationError, RecipeError
from qgraph.passes import SinkConstants
from qgraph.passes.smooth_quant import SmoothQuant, factors
from qgraph.pipeline import Context, Pipeline
from qgraph.testing import from_onnx, from_torch
from qgraph.text import text
from qgraph.views import Linear, view
from qgraph.weights import constant_weight

GENERATOR = torch.Generator().manual_seed(0)
DATA = [torch.randn(3, 5, 8, generator=GENERATOR) for _ in range(3)]


class Block(nn.Module):
    """A norm with outlier channels, two linears that read it, and one behind a gelu."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b, self.c = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1, 1, 1, 30, 1, 1, 0.1, 2]))
            self.norm.bias.copy_(torch.linspace(-1, 1, 8))

    def forward(self, x):
        n = self.norm(x)
        return self.c(nn.functional.gelu(self.a(n) + self.b(n)))


def onnx_block():
    """MatMul with biases apart, the norm's result read twice."""
    block = Block()
    source = """<ir_version: 8, opset_import: ["": 17]> g (float[B,5,8] x) => (float[B,5,4] y) {
        n = LayerNormalization <axis = -1> (x, g, s)  a = MatMul (n, w)  ab = Add (a, wb)  b = MatMul (n, v)  s2 = Add (ab, b)
        t = Tanh (s2)  y = MatMul (t, u) }"""
    proto = onnx.parser.parse_model(source)
    tensors = {
        "g": block.norm.weight,
        "s": block.norm.bias,
        "w": block.a.weight.T,
        "wb": block.a.bias,
        "v": block.b.weight.T,
        "u": block.c.weight.T,
    }
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.ascontiguousarray(t.detach()), k) for k, t in tensors.items())
    return proto


def smoothed(p, gm):
    ctx = Context(data=[(x,) for x in DATA], samples=[(DATA[0],)])
    (step,) = Pipeline(p, verify="numerics").run(gm, ctx)
    return step.count


def scales(gm):
    return {e.node: (e.decision, e.reason) for e in gm.meta["qgraph"].ledger if e.role == "scale"}


def linear_inputs(gm):
    """Largest magnitude per channel of what each linear reads, and of its columns."""
    views = [v for n in gm.graph.nodes if (v := view(Linear, n))]
    seen = {v.x: Channels(-1) for v in views}
    collect(gm, {x: c.update for x, c in seen.items()}, [(x,) for x in DATA])
    return [(seen[v.x].largest(), constant_weight(v).absmax(v.in_axis)) for v in views]


@pytest.mark.parametrize("start", [lambda: from_torch(Block(), DATA[0]), lambda: from_onnx(onnx_block(), DATA[0])], ids=["torch", "onnx"])
def test_factors_of_equation_4_go_into_the_norm(start):
    gm, _ = start()
    before, printed = linear_inputs(gm), text(gm)
    s = factors(before[0][0], torch.maximum(before[0][1], before[1][1]), 0.4)
    assert smoothed(SmoothQuant(0.4), gm) == 3
    after = linear_inputs(gm)
    for old, new in zip(before[:2], after[:2], strict=True):
        torch.testing.assert_close(new[0], old[0] / s)
        torch.testing.assert_close(new[1], old[1] * s)
    torch.testing.assert_close(after[2], before[2])
    assert len(text(gm).splitlines()) == len(printed.splitlines()), "no operation is added"
    assert smoothed(SmoothQuant(0.4), gm) == 0, "a second run finds balanced channels"


def test_the_ledger_names_every_linear_with_its_alpha_or_the_reason():
    gm, _ = from_torch(Block(), DATA[0])
    smoothed(SmoothQuant(0.5), gm)
    assert scales(gm) == {
        "a": ("smooth_quant alpha 0.5, 2 readers", "factors taken in by norm"),
        "b": ("smooth_quant alpha 0.5, 2 readers", "factors taken in by norm"),
        "c": ("unchanged", f"nothing can take in the factors of its input: gelu {gelu_of(gm)} makes it"),
    }


def gelu_of(gm):
    return next(n.name for n in gm.graph.nodes if "gelu" in n.name)


@pytest.mark.parametrize("start", [lambda: from_torch(Block(), DATA[0]), lambda: from_onnx(onnx_block(), DATA[0])], ids=["torch", "onnx"])
def test_an_explicit_product_serves_linears_that_nothing_else_can(start):
    gm, _ = start()
    operations = len(text(gm).splitlines())
    always = SmoothQuant(0.5, explicit=True, worth=math.inf)
    assert smoothed(always, gm) == 5
    assert len(text(gm).splitlines()) == operations + 1
    assert [d for d, _ in scales(gm).values()].count("smooth_quant alpha 0.5, 1 readers") == 1
    assert smoothed(always, gm) == 0, "the product is now what takes factors in"


def test_a_product_that_does_not_lessen_the_error_enough_is_not_made():
    gm, _ = from_torch(Block(), DATA[0])
    operations = len(text(gm).splitlines())
    assert smoothed(SmoothQuant(0.5, explicit=True, worth=0.0), gm) == 3
    assert len(text(gm).splitlines()) == operations
    assert scales(gm)["c"] == ("unchanged", "no alpha lessens its error enough")


@torch.no_grad()
def test_a_search_takes_the_alpha_with_the_least_error():
    errors = {}
    want = Block().eval()(DATA[0])
    for alpha in ("search", 0.1, 0.9):
        recipe = qgraph.load_recipe("w8a8", [f"stages=[{{smoothquant: {{alpha: {alpha}}}}}]"])
        quantized = qgraph.quantize(Block(), [(x,) for x in DATA], example_inputs=(DATA[0],), recipe=recipe)
        errors[alpha] = float((quantized(DATA[0]) - want).square().sum())
    plain = qgraph.quantize(Block(), [(x,) for x in DATA], example_inputs=(DATA[0],), recipe="w8a8")
    assert errors["search"] < float((plain(DATA[0]) - want).square().sum())
    assert errors["search"] <= min(errors.values()) * 1.2


def test_the_stage_runs_from_the_recipes_name_and_needs_data():
    prepared = qgraph.prepare(Block(), (DATA[0],), recipe="w8a8-dynamic+smoothquant")
    with pytest.raises(CalibrationError, match="smooth_quant needs calibration data"):
        qgraph.calibrate(prepared, None)
    qgraph.calibrate(prepared, [(x,) for x in DATA], verify="numerics")
    quantized = qgraph.convert(prepared)
    assert any(e.by == "smooth_quant" for e in quantized.meta["qgraph"].ledger)


def test_a_branch_that_the_data_never_reaches_is_left_alone():
    source = """<ir_version: 8, opset_import: ["": 17]> g (float[2,8] x) => (float[2,3] y) {
        m = ReduceMax <keepdims = 0> (x)  cond = Greater (m, zero)
        y = If (cond) <then_branch = t () => (float[2,3] a) { h = MatMul (x, w)  r = Relu (h)  a = MatMul (r, v) },
                       else_branch = e () => (float[2,3] b) { i = MatMul (x, p)  s = Relu (i)  b = MatMul (s, q) }> }"""
    proto = onnx.parser.parse_model(source)
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(8, 6)), "v": rng.normal(size=(6, 3)), "zero": np.zeros(()), "p": np.ones((8, 6)), "q": np.ones((6, 3))}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), k) for k, a in arrays.items())
    x = torch.rand(2, 8)
    gm, want = from_onnx(proto, x)
    SinkConstants()(gm)
    ctx = Context(data=[(x,)])
    assert SmoothQuant(0.5).run(gm, ctx) == 2
    torch.testing.assert_close(tree_leaves(gm(x)), want)
    reasons = [r for d, r in scales(gm).values() if d == "unchanged"]
    assert "the calibration data never reaches it" in reasons


def test_channels_that_are_always_zero_keep_factor_1():
    assert factors(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5).tolist() == [1, 1, 2]


def test_an_alpha_without_meaning_is_refused():
    with pytest.raises(RecipeError, match=r'alpha of smoothquant is a number from 0 to 1 or "search", got 1\.5'):
        SmoothQuant(1.5)


def test_nan_in_a_value_is_an_error():
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        Channels(-1).update(DATA[0] * torch.nan)


def test_a_sample_of_rows_is_bounded_and_drawn_from_all_batches():
    kept = Channels(-1, count=16)
    for i in range(20):
        kept.update(torch.full((7, 2), float(i)))
    assert kept.rows.shape == (16, 2)
    assert len(kept.rows.unique()) > 5
    assert (kept.low.tolist(), kept.high.tolist()) == ([0, 0], [19, 19])
