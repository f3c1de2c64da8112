"""Chains of small ops become the one op that they mean, and near misses stay."""

import math

import pytest
import torch
from torch import nn

from qgraph.passes import Canonicalize, Recompose
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


TANH_CONSTANTS = "float three = {3}, float two = {2}, float one = {1}, float half = {0.5}, float k = {0.044715}, float r = {0.7978846}, float rk = {0.035677407}"
TANH_GELUS = {
    "pow": "p = Pow (x, three) a = Mul (p, k) b = Add (x, a) d = Mul (b, r) t = Tanh (d) e = Add (t, one) f = Mul (x, half) y = Mul (f, e)",
    "products": "p = Mul (x, x) q = Mul (x, p) a = Mul (k, q) b = Add (a, x) d = Mul (r, b) t = Tanh (d) e = Add (one, t) f = Mul (x, e) y = Mul (half, f)",
    "factored": "g = Mul (x, r) p = Mul (x, k) q = Mul (p, x) a = Add (q, one) d = Mul (g, a) t = Tanh (d) e = Add (t, one) f = Mul (e, half) y = Mul (x, f)",
    "halves": "p = Pow (x, three) a = Mul (p, k) b = Add (x, a) d = Mul (b, r) t = Tanh (d) h = Mul (t, half) e = Add (h, half) y = Mul (x, e)",
}  # fmt: skip


@pytest.mark.parametrize("body", TANH_GELUS.values(), ids=TANH_GELUS)
def test_gelu_with_tanh_is_recognised_in_every_spelling(body):
    check(Recompose(), from_text(body, X, constants=TANH_CONSTANTS), (X,), "%0: f32[2,3,4] = onnx.Gelu(%x, approximate='tanh')\nreturn %0")
    gm, _ = from_text(body, X, opset=17, constants=TANH_CONSTANTS)
    assert declines(gm) == ["Gelu exists from opset 20, this graph has 17"]


@pytest.mark.parametrize(
    ("old", "new"),
    [("Mul (p, k)", "Mul (p, r)"), ("Pow (x, three)", "Pow (x, two)"), ("Add (t, one)", "Add (t, two)"), ("Mul (b, r)", "Mul (b, k)")],
)
def test_near_misses_of_gelu_with_tanh_stay(old, new):
    body = TANH_GELUS["pow"].replace(old, new)
    assert "Gelu" not in ops(check(Recompose(), from_text(body, X, constants=TANH_CONSTANTS), (X,), None))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
        lambda x: x * 0.5 * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))),
    ],
)
def test_torch_spellings_of_gelu_with_tanh_are_recognised(fn):
    check(Recompose(), from_torch(Fn(fn), X), (X,), "%0: f32[2,3,4] = aten.gelu(%x, approximate='tanh')\nreturn %0")


def test_silu_is_recognised_in_torch_and_stays_in_onnx_where_runtimes_know_the_chain():
    check(Recompose(), from_torch(Fn(lambda x: torch.sigmoid(x) * x), X), (X,), "%0: f32[2,3,4] = aten.silu(%x)\nreturn %0")
    assert ops(check(Recompose(), from_text("s = Sigmoid (x) y = Mul (x, s)", X, opset=24), (X,), None)) == ["Sigmoid", "Mul"]
    quick = check(Recompose(), from_torch(Fn(lambda x: torch.sigmoid(1.702 * x) * x), X), (X,), None)
    assert "silu" not in quick.code


def test_hard_swish_and_its_gate_are_recognised_in_torch():
    clip, sigmoid = torch.clamp, nn.functional.hardsigmoid
    for fn in (lambda x: x * clip(x / 6 + 0.5, 0, 1), lambda x: x * sigmoid(x), lambda x: clip(x + 3, 0, 6) * (1 / 6) * x):
        check(Recompose(), from_torch(Fn(fn), X), (X,), "%0: f32[2,3,4] = aten.hardswish(%x)\nreturn %0")
    check(Recompose(), from_torch(Fn(lambda x: clip(x + 3, 0, 6) / 6), X), (X,), "%0: f32[2,3,4] = aten.hardsigmoid(%x)\nreturn %0")
    near = check(Recompose(), from_torch(Fn(lambda x: clip(x + 2, 0, 6) / 6), X), (X,), None)
    assert "hardsigmoid" not in near.code


def test_hard_sigmoid_is_recognised_in_any_opset_of_onnx():
    body = "a = Add (x, three) b = Clip (a, zero, six) y = Div (b, six)"
    assert ops(check(Recompose(), from_text(body, X, opset=11, constants=CLIP), (X,), None)) == ["HardSigmoid"]
    assert ops(check(Recompose(), from_text(body + " z = Neg (b)", X, opset=14, constants=CLIP, outputs="float[2,3,4] y, float[2,3,4] z"), (X,), None)) == [
        "Add", "Clip", "Div", "Neg",
    ]  # fmt: skip


def test_near_misses_are_explained():
    constants = "float wrong = {1.5}, float r = {1.4142135}, float one = {1}, float half = {0.5}, float third = {0.3}"
    body = "a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half)"
    gm, _ = from_text(body.replace("(x, r)", "(x, wrong)"), X, constants=constants)
    assert "gelu takes erf of x * 0.707107, this one of x * 0.666667" in declines(gm)
    gm, _ = from_text(body.replace("(d, half)", "(d, third)"), X, constants=constants)
    assert declines(gm) == ["the factor of gelu is 0.5, this one is 0.3"]
    gm, _ = from_text(body.replace("y = Mul (d, half)", "e = Mul (d, half) y = Add (e, b)"), X, constants=constants)
    (reason,) = declines(gm)
    assert reason == "erf inside the chain is also read by add_1"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_constants_rounded_to_half_precision_are_the_constants(dtype):
    gm, _ = from_torch(Fn(lambda x: 0.5 * x * (1 + torch.erf(x * torch.tensor(0.5**0.5, dtype=dtype)))), X.to(dtype))
    assert Recompose().run(gm, Context()) == 1 and "gelu" in gm.code


def test_a_value_that_is_written_between_two_reads_is_not_one_operand():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    gate = graph.call_function(torch.ops.aten.sigmoid.default, (x,))
    graph.call_function(torch.ops.aten.add_.Tensor, (x, 1))
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (x, gate)))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    assert Recompose().run(gm, Context()) == 0 and Canonicalize().run(gm, Context()) == 0
    torch.testing.assert_close(gm(X.clone()), (X + 1) * torch.sigmoid(X))
