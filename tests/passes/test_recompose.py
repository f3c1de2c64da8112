"""Chains of small ops become the one op that they mean, and near misses stay."""

import pytest
import torch
from torch import nn

from qgraph.passes import Recompose
from qgraph.pipeline import Context
from qgraph.testing import check, from_torch
from tests.passes.graphs import Fn, from_text, ops

X = torch.linspace(-4, 4, 24).reshape(2, 3, 4)


def declines(gm):
    ctx = Context()
    Recompose().run(gm, ctx)
    return [d.reason for d in ctx.declines]


CLIP = "float three = {3}, float zero = {0}, float six = {6}, float sixth = {0.16666667}, float nine = {9}"


@pytest.mark.parametrize(
    "body",
    [
        "a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (c, six)",
        "a = Add (three, x) b = Clip (a, zero, six) c = Mul (b, x) y = Mul (sixth, c)",
        "a = Add (x, three) b = Clip (a, zero, six) c = Div (b, six) y = Mul (c, x)",
        "b = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) y = Mul (x, b)",
    ],
)
def test_hard_swish_is_recognised_in_every_spelling(body):
    check(Recompose(), from_text(body, X, opset=14, constants=CLIP), (X,), "%0: f32[2,3,4] = onnx.HardSwish(%x)\nreturn %0")


@pytest.mark.parametrize(
    "body",
    [
        "a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (c, nine)",
        "a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (six, c)",
        "a = Add (x, three) b = Clip (a, zero, nine) c = Mul (x, b) y = Div (c, six)",
        "b = HardSigmoid (x) y = Mul (x, b)",
    ],
)
def test_near_misses_of_hard_swish_stay(body):
    positive = X.abs() + 0.5
    assert "HardSwish" not in ops(check(Recompose(), from_text(body, positive, opset=14, constants=CLIP), (positive,), None))


def test_hard_swish_waits_for_its_opset():
    gm, _ = from_text("a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (c, six)", X, opset=13, constants=CLIP)
    assert declines(gm) == ["HardSwish exists from opset 14, this graph has 13"]


def test_torch_chains_become_one_op():
    hard_swish, gelu = lambda x: x * nn.functional.relu6(x + 3) / 6, lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))
    check(Recompose(), from_torch(Fn(hard_swish), X), (X,), "%0: f32[2,3,4] = aten.hardswish(%x)\nreturn %0")
    check(Recompose(), from_torch(Fn(gelu), X), (X,), "%0: f32[2,3,4] = aten.gelu(%x)\nreturn %0")


@pytest.mark.parametrize(
    "body",
    [
        "a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half)",
        "a = Mul (x, ir) b = Erf (a) c = Add (one, b) d = Mul (half, x) y = Mul (d, c)",
        "a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (c, half) y = Mul (x, d)",
    ],
)
def test_gelu_is_recognised_in_every_spelling(body):
    constants = "float r = {1.4142135}, float ir = {0.70710677}, float one = {1}, float half = {0.5}"
    check(Recompose(), from_text(body, X, constants=constants), (X,), "%0: f32[2,3,4] = onnx.Gelu(%x)\nreturn %0")
    gm, _ = from_text(body, X, opset=17, constants=constants)
    assert declines(gm) == ["Gelu exists from opset 20, this graph has 17"]


@pytest.mark.parametrize(("opset", "softmax"), [(11, "Softmax <axis = 1> (f)"), (13, "Softmax <axis = -1> (f)"), (13, "LogSoftmax (f)")])
def test_softmax_of_a_flattened_matrix_is_softmax_of_the_last_axis(opset, softmax):
    body = f"s = Shape (x) f = Flatten <axis = 2> (x) p = {softmax} y = Reshape (p, s)"
    gm = check(Recompose(), from_text(body, X, opset=opset), (X,), None)
    assert ops(gm) == [softmax.split()[0]]
    body = body.replace("<axis = 2> (x)", "<axis = 1> (x)")
    assert len(ops(check(Recompose(), from_text(body, X, opset=opset), (X,), None))) == 4


NORM = """a = ReduceMean <axes = [-1]> (x) b = Sub (x, a) c = Pow (b, two) d = ReduceMean <axes = [-1]> (c) e = Add (d, eps)
          f = Sqrt (e) g = Div (b, f) h = Mul (g, s) y = Add (h, o)"""
NORM_CONSTANTS = "float two = {2}, float eps = {0.001}, float[4] s = {1, -2, 3, 0.5}, float[4] o = {0.1, 0.2, -0.3, 4}"


def test_layer_norm_is_recognised_from_opset_17():
    gm = check(Recompose(), from_text(NORM, X, opset=17, constants=NORM_CONSTANTS), (X,), None)
    assert ops(gm) == ["LayerNormalization"]
    assert ops(
        check(Recompose(), from_text(NORM.replace("Pow (b, two)", "Mul (b, b)"), X, opset=17, constants=NORM_CONSTANTS), (X,), None)
    ) == ["LayerNormalization"]
    gm, _ = from_text(NORM, X, opset=16, constants=NORM_CONSTANTS)
    assert declines(gm) == ["LayerNormalization exists from opset 17, this graph has 16"]


@pytest.mark.parametrize(
    ("old", "new"), [("axes = [-1]> (x)", "axes = [1]> (x)"), ("Sub (x, a)", "Sub (a, x)"), ("Div (b, f)", "Div (f, b)")]
)
def test_near_misses_of_layer_norm_stay(old, new):
    gm = check(Recompose(), from_text(NORM.replace(old, new), X, opset=17, constants=NORM_CONSTANTS), (X,), None)
    assert "LayerNormalization" not in ops(gm)
