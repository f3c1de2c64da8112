"""Chains of mean, variance and root become a norm with its weight and bias, whatever they are spelled with; softmax likewise."""

import pytest
import torch
from torch import nn

from qgraph.passes import Canonicalize, MergeEqual, Recompose
from qgraph.pipeline import Context, Pipeline
from qgraph.testing import check, from_torch
from tests.passes.graphs import Fn, from_text, ops

X = torch.linspace(-4, 5, 24).reshape(2, 3, 4).square()
WEIGHT, BIAS = torch.tensor([1.0, -2, 3, 0.5]), torch.tensor([0.1, 0.2, -0.3, 4])
CONSTANTS = (
    "float two = {2}, float one = {1}, float eps = {0.001}, float[4] w = {1, -2, 3, 0.5}, float[4] o = {0.1, 0.2, -0.3, 4}, "
    "int64[1] last = {-1}, int64[1] middle = {1}, float[1] half = {0.5}, float[1] minus = {-0.5}, float[1] short = {3}"
)


def declines(body, opset):
    ctx = Context()
    Recompose().run(from_text(body, X, opset=opset, constants=CONSTANTS)[0], ctx)
    return [d.reason for d in ctx.declines]


def recomposed(body, opset=18):
    return ops(check(Recompose(), from_text(body, X, opset=opset, constants=CONSTANTS), (X,), None))


CENTRED = "m = ReduceMean (x, last) c = Sub (x, m)"
ROOT = "v = ReduceMean (q, last) e = Add (v, eps) r = Sqrt (e)"
LAYER_NORMS = {
    "pow": f"{CENTRED} q = Pow (c, two) {ROOT} n = Div (c, r) s = Mul (n, w) y = Add (s, o)",
    "mul": f"{CENTRED} q = Mul (c, c) {ROOT} n = Div (c, r) s = Mul (w, n) y = Add (o, s)",
    "reciprocal": f"{CENTRED} q = Mul (c, c) {ROOT} i = Reciprocal (r) n = Mul (i, c) s = Mul (n, w) y = Add (s, o)",
    "one over": f"{CENTRED} q = Mul (c, c) {ROOT} i = Div (one, r) n = Mul (c, i) s = Mul (n, w) y = Add (s, o)",
    "power": f"{CENTRED} q = Pow (c, two) v = ReduceMean (q, last) e = Add (eps, v) i = Pow (e, minus) n = Mul (c, i) s = Mul (n, w) y = Add (s, o)",
    "root first": f"{CENTRED} q = Pow (c, two) {ROOT} i = Reciprocal (r) g = Mul (i, w) n = Mul (c, g) y = Add (n, o)",
    "no bias": f"{CENTRED} q = Pow (c, two) {ROOT} n = Div (c, r) y = Mul (n, w)",
    "no weight": f"{CENTRED} q = Pow (c, two) {ROOT} n = Div (c, r) y = Add (n, o)",
    "neither": f"{CENTRED} q = Pow (c, two) {ROOT} y = Div (c, r)",
}  # fmt: skip


@pytest.mark.parametrize("body", LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_onnx_layer_norm_is_recognised_in_every_spelling(body):
    assert recomposed(body) == ["LayerNormalization"]


def test_axes_may_be_an_attribute_and_counted_from_the_front():
    body = LAYER_NORMS["pow"].replace("(x, last)", "<axes = [2]> (x)").replace("(q, last)", "<axes = [-1]> (q)")
    assert recomposed(body, opset=17) == ["LayerNormalization"]
    assert declines(body, 16) == ["LayerNormalization exists from opset 17, this graph has 16"]


def test_rms_norm_waits_for_opset_23_in_onnx():
    body = f"q = Mul (x, x) {ROOT} i = Reciprocal (r) n = Mul (x, i) y = Mul (w, n)"
    assert recomposed(body, opset=23) == ["RMSNormalization"]
    assert declines(body, 18) == ["RMSNormalization exists from opset 23, this graph has 18"]


STRANGERS = [
    ("Div (c, r)", "Div (r, c)"),
    ("Div (c, r)", "Div (c, e)"),
    ("Pow (c, two)", "Abs (c)"),
    ("Pow (c, two)", "Mul (c, x)"),
]


@pytest.mark.parametrize("change", STRANGERS, ids=str)
def test_what_is_no_norm_stays_without_a_word(change):
    body = LAYER_NORMS["pow"].replace(*change)
    assert "LayerNormalization" not in recomposed(body) and declines(body, 18) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("(x, last)", "(x, middle)"), "the norm is over axes (-2,), (-1,) and not the last one alone"),
        (("y = Add (s, o)", "z = Add (s, o) y = Add (z, c)"), "sub inside the chain is also read by"),
        (("y = Add (s, o)", "z = Add (s, o) y = Add (z, e)"), "add inside the chain is also read by"),
    ],
)
def test_near_misses_of_layer_norm_are_explained(change, reason):
    body = LAYER_NORMS["pow"].replace(*change)
    assert "LayerNormalization" not in recomposed(body) and any(reason in d for d in declines(body, 18)), declines(body, 18)


def test_parameters_of_another_shape_stay_outside():
    body = f"{CENTRED} q = Pow (c, two) {ROOT} n = Div (c, r) s = Mul (n, short) y = Add (s, o)"
    assert recomposed(body) == ["LayerNormalization", "Mul", "Add"]
    assert declines(body, 18) == ["the constant [1] is not one value per element of the last axis, which has 4"]


def test_the_last_axis_must_have_a_known_size():
    start = from_text(LAYER_NORMS["neither"], X, opset=18, constants=CONSTANTS, inputs="float[2,3,n] x", outputs="float[2,3,n] y")
    ctx = Context()
    Recompose().run(start[0], ctx)
    assert [d.reason for d in ctx.declines] == ["the size of the last axis is not known"]


class Affine(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn, self.weight, self.bias = fn, nn.Parameter(WEIGHT.clone()), nn.Parameter(BIAS.clone())

    def forward(self, x):
        return self.fn(x, self.weight, self.bias)


def mean(x):
    return x.mean(-1, keepdim=True)


TORCH_LAYER_NORMS = {
    "sqrt": lambda x, w, b: w * ((x - mean(x)) / torch.sqrt(mean((x - mean(x)) ** 2) + 1e-3)) + b,
    "rsqrt": lambda x, w, b: (x - mean(x)) * torch.rsqrt(mean((x - mean(x)).pow(2)) + 1e-3) * w + b,
    "var": lambda x, w, b: b + w * (x - mean(x)) * (x.var(-1, keepdim=True, unbiased=False) + 1e-3).rsqrt(),
    "correction": lambda x, w, b: (x - mean(x)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt() * w + b,
}
CLEAN = Pipeline(MergeEqual(), Canonicalize())


@pytest.mark.parametrize("fn", TORCH_LAYER_NORMS.values(), ids=TORCH_LAYER_NORMS)
def test_torch_layer_norm_is_recognised_in_every_spelling(fn):
    check(CLEAN, from_torch(Affine(fn), X), (X,), "%0: f32[2,3,4] = aten.layer_norm(%x, [4], @weight, @bias, 0.001)\nreturn %0")


def test_torch_rms_norm_is_recognised_and_the_unbiased_variance_is_not():
    rms = lambda x, w, b: w * (x * torch.rsqrt(mean(x**2) + 1e-3))
    check(CLEAN, from_torch(Affine(rms), X), (X,), "%0: f32[2,3,4] = aten.rms_norm(%x, [4], @weight, 0.001)\nreturn %0")
    unbiased = lambda x, w, b: (x - mean(x)) / (x.var(-1, keepdim=True) + 1e-3).sqrt() * w + b
    gm = check(CLEAN, from_torch(Affine(unbiased), X), (X,), None)
    assert "layer_norm" not in gm.code and "rms_norm" not in gm.code


def test_half_precision_inside_casts_becomes_a_norm_between_casts():
    half = X.half()
    gm = check(
        CLEAN, from_torch(Fn(lambda x: (x.float() * torch.rsqrt(mean(x.float() ** 2) + 1e-3)).half()), half), (half,), None, tol=1e-3
    )
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_function"] == ["aten.to.dtype", "aten.rms_norm.default", "aten.to.dtype"]


SOFTMAX = "m = ReduceMax (x, last) c = Sub (x, m) e = Exp (c) s = ReduceSum (e, last) y = Div (e, s)"


def test_softmax_of_exponentials_is_softmax():
    assert recomposed(SOFTMAX) == ["Softmax"]
    assert recomposed(SOFTMAX.replace("last", "middle")) == ["Softmax"]
    old = SOFTMAX.replace("ReduceMax (x, last)", "ReduceMax <axes = [2]> (x)").replace("ReduceSum (e, last)", "ReduceSum <axes = [2]> (e)")
    assert recomposed(old, opset=11) == ["Softmax"]
    assert declines(old.replace("2]", "1]"), 11) == ["Softmax of axis -2 alone exists from opset 13, this graph has 11"]
    for fn in (
        lambda x: (x - x.amax(1, keepdim=True)).exp() / (x - x.amax(1, keepdim=True)).exp().sum(1, keepdim=True),
        lambda x: (e := torch.exp(x - x.max(1, keepdim=True)[0])) / e.sum(dim=1, keepdim=True),
    ):
        check(CLEAN, from_torch(Fn(fn), X), (X,), "%0: f32[2,3,4] = aten.softmax.int(%x, -2)\nreturn %0")


def test_softmax_must_subtract_its_own_maximum():
    bare = "e = Exp (x) s = ReduceSum (e, last) y = Div (e, s)"
    assert declines(bare, 18) == ["the chain does not subtract the maximum: it overflows where softmax does not"]
    other = "m = ReduceMax (x, middle) c = Sub (x, m) e = Exp (c) s = ReduceSum (e, last) y = Div (e, s)"
    assert declines(other, 18) == ["the maximum is over axes (-2,), the sum over (-1,)"]
    assert "Softmax" not in recomposed(SOFTMAX.replace("Div (e, s)", "Div (s, e)"))
