"""Attention is found in the chains that exporters make of it, with operands from which it can be computed again."""

import math

import pytest
import torch
from torch import nn
from torch.fx import Interpreter
from torch.nn.functional import scaled_dot_product_attention

from qgraph.api import PREPARE
from qgraph.attention import find_attention
from qgraph.pipeline import Pipeline
from qgraph.testing import from_onnx, from_torch

B, H, L, D = 2, 3, 5, 4
torch.manual_seed(0)
Q, K, V, MASK = torch.randn(B, H, L, D), torch.randn(B, H, L, D), torch.randn(B, H, L, D), torch.randn(B, 1, L, L)
HEADS = "float[2,3,5,4] q, float[2,3,5,4] k, float[2,3,5,4] v, float[2,1,5,5] m"
CONSTANTS = "float s = {0.3}, float[1,1,1,1] four = {4}, float[2] two = {2, 3}, float[1] inv = {0.7}"


def find(gm):
    return [f for n in gm.graph.nodes if (f := find_attention(n)) is not None]


def onnx(body, *, constants=CONSTANTS):
    text = f'<ir_version: 9, opset_import: ["": 20]> g ({HEADS}) => (float[2,3,5,4] y) <{constants}> {{ {body} }}'
    return from_onnx(text, Q, K, V, MASK)[0]


class Recorded(Interpreter):
    """Keeps every value."""

    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)

    def run_node(self, n):
        self.values = getattr(self, "values", {}) | {n: super().run_node(n)}
        return self.values[n]


def assert_same_attention(gm, found, *inputs):
    """The operands give the chain's value."""
    recorded = Recorded(gm)
    recorded.run(*inputs)
    q, k, v = (recorded.values[n] for n in (found.q, found.k, found.v))
    k = k if found.k_perm is None else k.permute(found.k_perm)
    mask = None if found.mask is None else recorded.values[found.mask]
    got = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=found.scale)
    torch.testing.assert_close(got, recorded.values[found.nodes[-1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "scale", "masked"),
    [
        ("t = Transpose <perm = [0,1,3,2]> (k) a = MatMul (q, t) p = Softmax (a) y = MatMul (p, v)", 1.0, False),
        ("t = Transpose <perm = [0,1,3,2]> (k) a = MatMul (q, t) b = Mul (s, a) c = Add (b, m) p = Softmax (c) y = MatMul (p, v)", 0.3, True),
        ("t = Transpose <perm = [0,1,3,2]> (k) a = MatMul (q, t) b = Div (a, four) c = Add (m, b) p = Softmax (c) y = MatMul (p, v)", 0.25, True),
        ("u = Mul (q, s) t = Transpose <perm = [0,1,3,2]> (k) w = Mul (t, inv) a = MatMul (u, w) p = Softmax <axis = 3> (a) y = MatMul (p, v)", 0.21, False),
        ("u = Div (k, four) t = Transpose <perm = [0,1,3,2]> (u) a = MatMul (q, t) b = Add (a, m) p = Softmax (b) y = MatMul (p, v)", 0.25, True),
    ],
)  # fmt: skip
def test_onnx_chains_are_found_with_every_factor(body, scale, masked):
    gm = onnx(body)
    (found,) = find(gm)
    assert math.isclose(found.scale, scale, rel_tol=1e-6) and (found.mask is not None) == masked and found.k_perm is None
    assert {n.name for n in (found.q, found.k, found.v)} == {"q", "k", "v"}
    assert_same_attention(gm, found, Q, K, V, MASK)


def test_a_transposition_joined_with_the_split_of_heads_is_told():
    text = """<ir_version: 9, opset_import: ["": 20]> g (float[2,3,5,4] q, float[2,5,3,4] k, float[2,3,5,4] v) => (float[2,3,5,4] y) {
        t = Transpose <perm = [0,2,3,1]> (k) a = MatMul (q, t) p = Softmax (a) y = MatMul (p, v) }"""
    keys = K.transpose(1, 2).contiguous()
    gm = from_onnx(text, Q, keys, V)[0]
    (found,) = find(gm)
    assert found.k.name == "k" and found.k_perm == (0, 2, 1, 3)
    assert_same_attention(gm, found, Q, keys, V)


CLEARED = "p = Softmax (c) n = IsNaN (p) w = Where (n, none, p)"


def test_rows_that_a_mask_blocks_wholly_may_be_cleared():
    """where(isnan(p), 0, p), as exporters write the products of torch, which makes zeros of such rows."""
    body = f"t = Transpose <perm = [0,1,3,2]> (k) a = MatMul (q, t) b = Mul (s, a) c = Add (b, m) {CLEARED} y = MatMul (w, v)"
    gm = onnx(body, constants=f"{CONSTANTS}, float none = {{0}}")
    (found,) = find(gm)
    assert [n.target.op_type for n in found.nodes] == ["Transpose", "MatMul", "Mul", "Add", "Softmax", "IsNaN", "Where", "MatMul"]
    assert_same_attention(gm, found, Q, K, V, MASK)
    assert not find(onnx(body, constants=f"{CONSTANTS}, float none = {{1}}"))


def test_keys_that_come_transposed_are_taken_as_they_are():
    text = """<ir_version: 9, opset_import: ["": 20]> g (float[2,3,5,4] q, float[2,3,4,5] k, float[2,3,5,4] v) => (float[2,3,5,4] y) {
        a = MatMul (q, k) p = Softmax (a) y = MatMul (p, v) }"""
    keys = K.transpose(2, 3).contiguous()
    gm = from_onnx(text, Q, keys, V)[0]
    (found,) = find(gm)
    assert found.k.name == "k" and found.k_perm == (0, 1, 3, 2)
    assert_same_attention(gm, found, Q, keys, V)


START = "t = Transpose <perm = [0,1,3,2]> (k) a = MatMul (q, t)"


@pytest.mark.parametrize(
    "body",
    [
        f"{START} p = Softmax <axis = 2> (a) y = MatMul (p, v)",
        f"{START} p = LogSoftmax (a) y = MatMul (p, v)",
        f"{START} b = Add (a, m) c = Mul (b, s) p = Softmax (c) y = MatMul (p, v)",
        f"{START} b = Sub (m, a) p = Softmax (b) y = MatMul (p, v)",
        f"{START} b = Div (s, a) p = Softmax (b) y = MatMul (p, v)",
        f"{START} p = Softmax (a) w = MatMul (p, v) r = ReduceMax <keepdims = 1> (p) y = Add (w, r)",
        f"{START} p = Softmax (a) w = MatMul (p, v) r = ReduceMax <keepdims = 1> (a) y = Add (w, r)",
        "p = Softmax (m) y = MatMul (p, v)",
        f"{START} p = Relu (a) y = MatMul (p, v)",
    ],
)
def test_near_misses_are_no_attention(body):
    assert not find(onnx(body))


class Attend(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn, self.q, self.k, self.v = fn, nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x, m):
        q, k, v = (f(x).view(B, L, H, D).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.fn(q, k, v, m).transpose(1, 2).reshape(B, L, 12)


CHAINS = {
    "product": lambda q, k, v, m: (q @ k.transpose(-2, -1) / math.sqrt(D) + m).softmax(-1) @ v,
    "query": lambda q, k, v, m: ((q * D**-0.5) @ k.mT + m).softmax(-1) @ v,
    "both": lambda q, k, v, m: torch.matmul(q * D**-0.25, k.transpose(2, 3) * D**-0.25).add(m).softmax(3).matmul(v),
    "dropout": lambda q, k, v, m: nn.functional.dropout((m + D**-0.5 * (q @ k.permute(0, 1, 3, 2))).softmax(-1), 0.1, False) @ v,
}


@pytest.mark.parametrize("fn", CHAINS.values(), ids=CHAINS)
def test_torch_chains_are_found(fn):
    x = torch.randn(B, L, 12)
    gm, _ = from_torch(Attend(fn), x, MASK)
    Pipeline(*PREPARE).run(gm)
    (found,) = find(gm)
    assert math.isclose(found.scale, 0.5, rel_tol=1e-6) and found.mask is not None
    assert_same_attention(gm, found, x, MASK)


def test_masked_fill_is_no_sum():
    fn = lambda q, k, v, m: (q @ k.transpose(-2, -1)).masked_fill(m > 0, -1e9).softmax(-1) @ v
    gm, _ = from_torch(Attend(fn), torch.randn(B, L, 12), MASK)
    assert not find(gm)
