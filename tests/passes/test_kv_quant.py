"""Keys and values become what a quantized cache holds of them, on torch and ONNX graphs, behind a cache and without one."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import qgraph
from qgraph import reference
from qgraph.errors import RecipeError
from qgraph.passes import KvQuant
from qgraph.pipeline import Context
from qgraph.testing import check, from_torch
from tests.passes.graphs import from_text

B, P, L, KV, GROUP, D = 2, 3, 4, 2, 3, 8
torch.manual_seed(0)
Q, (K, V) = torch.randn(B, KV * GROUP, L, D), torch.randn(2, B, KV, L, D) * torch.linspace(0.2, 3, D) + 0.4
PAST_K, PAST_V = torch.randn(2, B, KV, P, D)
MASK = torch.randn(B, 1, L, P + L)


class Cached(nn.Module):
    def forward(self, q, k, v, past_k, past_v, mask):
        keys, values = torch.cat([past_k, k], -2), torch.cat([past_v, v], 2)
        many = [t[:, :, None].expand(B, KV, GROUP, P + L, D).reshape(B, KV * GROUP, P + L, D) for t in (keys, values)]
        return scaled_dot_product_attention(q, *many, mask, scale=0.3), keys, values


ONNX = """ek = Concat <axis = 2> (pk, k) ev = Concat <axis = -2> (pv, v) ukt = Unsqueeze (ek, two) uvt = Unsqueeze (ev, two)
    xk = Expand (ukt, wide) xv = Expand (uvt, wide) rk = Reshape (xk, whole) rv = Reshape (xv, whole)
    kt = Transpose <perm = [0, 1, 3, 2]> (rk) s = MatMul (q, kt) t = Mul (s, factor) u = Add (t, mask) p = Softmax (u) y = MatMul (p, rv)"""


def onnx_graph():
    return from_text(
        ONNX, Q, K, V, PAST_K, PAST_V, MASK, inputs="float[2,6,4,8] q, float[2,2,4,8] k, float[2,2,4,8] v, float[2,2,3,8] pk, float[2,2,3,8] pv, float[2,1,4,7] mask",
        outputs="float[2,6,4,8] y, float[2,2,7,8] ek, float[2,2,7,8] ev",
        constants="int64[1] two = {2}, int64[5] wide = {2, 2, 3, 7, 8}, int64[4] whole = {2, 6, 7, 8}, float factor = {0.3}",
    )  # fmt: skip


def rounded(x, bits, symmetric):
    q, scale, zero = reference.dynamic_quantize(x, f"uint{bits}", symmetric, -1, -1)
    return reference.dequantize(q, scale, zero, f"uint{bits}", -1, -1)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (4, True)])
@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_what_is_new_is_rounded_row_by_row_before_it_joins_the_cache(origin, bits, symmetric):
    inputs = (Q, K, V, PAST_K, PAST_V, MASK)
    start = from_torch(Cached(), *inputs) if origin == "torch" else onnx_graph()
    want = Cached()(Q, rounded(K, bits, symmetric), rounded(V, bits, symmetric), PAST_K, PAST_V, MASK)
    gm = check(KvQuant(bits, symmetric), (start[0], want), inputs, None)
    roles = {e.role: e.reason for e in gm.meta["qgraph"].ledger}
    assert roles == dict.fromkeys(("k", "v"), "each new token and head by itself, before it joins the cache")


def test_the_graph_shows_the_rounding_in_front_of_attention():
    x = torch.randn(1, 2, 3, 4)
    gm, _ = from_torch(Plain(), x, -x)
    want = scaled_dot_product_attention(x, rounded(-x, 8, False), rounded(-x, 8, False))
    check(KvQuant(), (gm, want), (x, -x), """
        %0: f32[1,2,3,4] = aten.neg(%x)
        %1: (u8[1,2,3,4], f32[1,2,3,1], u8[1,2,3,1]) = qg.dynamic_quantize(%0, 'uint8', False, -1, -1)
        %2: u8[1,2,3,4] = getitem(%1, 0)
        %3: f32[1,2,3,1] = getitem(%1, 1)
        %4: u8[1,2,3,1] = getitem(%1, 2)
        %5: f32[1,2,3,4] = qg.dequantize(%2, %3, %4, 'uint8', -1, -1)
        %6: (u8[1,2,3,4], f32[1,2,3,1], u8[1,2,3,1]) = qg.dynamic_quantize(%v, 'uint8', False, -1, -1)
        %7: u8[1,2,3,4] = getitem(%6, 0)
        %8: f32[1,2,3,1] = getitem(%6, 1)
        %9: u8[1,2,3,1] = getitem(%6, 2)
        %10: f32[1,2,3,4] = qg.dequantize(%7, %8, %9, 'uint8', -1, -1)
        %11: f32[1,2,3,4] = aten.scaled_dot_product_attention(%x, %5, %10)
        return %11
    """)  # fmt: skip


class Plain(nn.Module):
    def forward(self, x, v):
        return scaled_dot_product_attention(x, -x, v)


def test_keys_that_are_stored_transposed_stay_with_a_reason():
    gm, _ = from_text(
        "kt = Transpose <perm = [0, 2, 1, 3]> (k) s = MatMul (q, kt) t = Mul (s, factor) p = Softmax (t) y = MatMul (p, v)",
        Q[:1, :2], K[:1].permute(0, 3, 1, 2).contiguous(), V[:1], inputs="float[1,2,4,8] q, float[1,8,2,4] k, float[1,2,4,8] v",
        outputs="float[1,2,4,8] y", constants="float factor = {0.3}",
    )  # fmt: skip
    ctx = Context()
    assert KvQuant().run(gm, ctx) == 0
    assert [d.reason for d in ctx.declines] == ["its keys have the channels of a head on axis 1"]
    assert [(e.role, e.decision, e.reason) for e in gm.meta["qgraph"].ledger] == [(r, "float", ctx.declines[0].reason) for r in ("k", "v")]


def test_a_form_of_attention_that_is_not_understood_stays_with_a_reason():
    class Dropping(nn.Module):
        def forward(self, q, k, v):
            return scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    gm, _ = from_torch(Dropping(), K, K, V)
    ctx = Context()
    assert KvQuant().run(gm, ctx) == 0
    assert [d.reason for d in ctx.declines] == ["this form of attention is not understood"]
    assert {(e.role, e.decision) for e in gm.meta["qgraph"].ledger} == {("k", "float"), ("v", "float")}


def test_a_recipe_names_the_cache_and_backends_that_cannot_store_it_refuse():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x):
            q, k, v = (t.reshape(2, 5, 4, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return scaled_dot_product_attention(q, k, v)

    x = torch.randn(2, 5, 32)
    gm = qgraph.quantize(Net(), example_inputs=(x,), recipe="w8a16kv4", backend="reference")
    assert [(e.role, e.decision) for e in gm.meta["qgraph"].ledger if e.kind == "Attention"] == [
        (role, "uint4 asym per token dynamic") for role in ("k", "v")
    ]
    error = (gm(x) - Net().forward(x)).abs().max()
    assert error > 0
    alone = qgraph.quantize(Net(), example_inputs=(x,), recipe="w16a16kv8", backend="reference")
    assert sum("dynamic_quantize" in str(n.target) for n in alone.graph.nodes) == 2
    with pytest.raises(RecipeError, match="cannot have 8 bits: attention reads floats here; the backend 'cupy' stores 8 bits"):
        qgraph.prepare(Net(), (x,), recipe="w8a16kv8")
    with pytest.raises(RecipeError, match="cannot have 6 bits: a cache has 4 or 8 bits"):
        qgraph.prepare(Net(), (x,), recipe="w8a16kv6", backend="cupy")
    with pytest.raises(RecipeError, match="there is no attention in this model whose keys and values could have 8 bits"):
        qgraph.prepare(nn.Sequential(nn.Linear(32, 8)), (x,), recipe="w8a16kv8", backend="reference")
