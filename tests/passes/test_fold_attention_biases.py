"""Biases of keys and values leave attention: the numbers stay, in torch's op, in chains and in ONNX; what cannot go says why."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import qgraph
from qgraph.passes import FoldAttentionBiases
from qgraph.pipeline import Context
from qgraph.testing import check, from_torch
from tests.passes.graphs import from_text

B, L, H, D = 2, 5, 3, 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(B, L, 8, generator=GENERATOR)
MASK = torch.randn(1, 1, L, L, generator=GENERATOR)


def whole(q, k, v):
    return scaled_dot_product_attention(q, k, v, MASK)


def chain(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(D) + MASK).softmax(-1) @ v


class Attend(nn.Module):
    """Attention on `heads` of H * D channels, with a layer behind it that has 7 outputs."""

    def __init__(self, attention=whole, *, o_bias=True, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.attention = attention
        self.q, self.k, self.v = (nn.Linear(8, H * D, bias=bias) for _ in range(3))
        self.o = nn.Linear(H * D, 7, bias=o_bias)

    def heads(self, x):
        return x.view(B, L, H, D).transpose(1, 2)

    def forward(self, x):
        y = self.attention(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        return self.o(y.transpose(1, 2).reshape(B, L, H * D))


def run(start):
    """(changes, what was declined) of a run on the graph."""
    ctx = Context()
    count = FoldAttentionBiases().run(start[0], ctx)
    return count, [d.reason for d in ctx.declines]


@pytest.mark.parametrize("attention", [whole, chain])
def test_torch_keys_lose_their_bias_and_that_of_values_moves_on(attention):
    gm = check(FoldAttentionBiases(), from_torch(Attend(attention), X), (X,), None)
    printed = qgraph.text(gm)
    assert "@q.bias" in printed and "@k.bias" not in printed and "@v.bias" not in printed
    module = Attend()
    torch.testing.assert_close(gm.get_buffer("o_bias"), module.o.bias + module.o.weight @ module.v.bias, rtol=1e-6, atol=1e-6)
    decisions = {e.node: (e.decision, e.reason) for e in gm.meta["qgraph"].ledger if e.role == "shift"}
    assert decisions["k"][0] == "bias dropped" and decisions["v"][0] == "bias moved to o"


CHAIN = """
    [mq] qm = MatMul (x, wq) [q] q = Add (qm, bq) q4 = Reshape (q, heads) qt = Transpose <perm = [0,2,1,3]> (q4)
    [mk] km = MatMul (x, wk) [k] k = Add (km, bk) k4 = Reshape (k, heads) kt = Transpose <perm = [0,2,3,1]> (k4)
    [v] v = Gemm <transB = 1, beta = 0.5> (flat, wv, bv) v4 = Reshape (v, heads) vt = Transpose <perm = [0,2,1,3]> (v4)
    s = MatMul (qt, kt) m = Add (s, mask) p = Softmax (m) a = MatMul (p, vt) at = Transpose <perm = [0,2,1,3]> (a)
    aj = Reshape (at, joined) [mo] om = MatMul (aj, wo) [o] y = Add (om, bo)"""


def constants(**shapes):
    """Initializers of these shapes, in ONNX's text, the elements all different."""
    found = []
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=torch.Generator().manual_seed(len(name) + ord(name[-1]))).flatten().tolist()
        found.append(f"float[{','.join(map(str, shape))}] {name} = {{{', '.join(f'{v:.6f}' for v in values)}}}")
    return ", ".join(found)


SHAPES = {
    "wq": (8, 12),
    "bq": (12,),
    "wk": (8, 12),
    "bk": (12,),
    "wv": (12, 8),
    "bv": (12,),
    "wo": (12, 7),
    "bo": (7,),
    "mask": (1, 1, 5, 5),
}
LISTS = "int64[4] heads = {2, 5, 3, 4}, int64[3] joined = {2, 5, 12}"


def onnx(body=CHAIN, **changed):
    inputs = "float[2,5,8] x, float[10,8] flat"
    text = f"{constants(**SHAPES | changed)}, {LISTS}"
    return from_text(body, X, X.reshape(10, 8), inputs=inputs, outputs="float[2,5,7] y", constants=text)


def test_onnx_sums_go_and_a_gemm_loses_its_bias():
    check(FoldAttentionBiases(), onnx(), (X, X.reshape(10, 8)), """
        %0: f32[2,5,12] = onnx.MatMul(%x, @wq)
        %1: f32[2,5,12] = onnx.Add(%0, @bq)
        %2: f32[2,5,3,4] = onnx.Reshape(%1, @heads)
        %3: f32[2,3,5,4] = onnx.Transpose(%2, perm=[0, 2, 1, 3])
        %4: f32[2,5,12] = onnx.MatMul(%x, @wk)
        %5: f32[2,5,3,4] = onnx.Reshape(%4, @heads)
        %6: f32[2,3,4,5] = onnx.Transpose(%5, perm=[0, 2, 3, 1])
        %7: f32[10,12] = onnx.Gemm(%flat, @wv, beta=0.5, transB=1)
        %8: f32[2,5,3,4] = onnx.Reshape(%7, @heads)
        %9: f32[2,3,5,4] = onnx.Transpose(%8, perm=[0, 2, 1, 3])
        %10: f32[2,3,5,5] = onnx.MatMul(%3, %6)
        %11: f32[2,3,5,5] = onnx.Add(%10, @mask)
        %12: f32[2,3,5,5] = onnx.Softmax(%11)
        %13: f32[2,3,5,4] = onnx.MatMul(%12, %9)
        %14: f32[2,5,3,4] = onnx.Transpose(%13, perm=[0, 2, 1, 3])
        %15: f32[2,5,12] = onnx.Reshape(%14, @joined)
        %16: f32[2,5,7] = onnx.MatMul(%15, @wo)
        %17: f32[2,5,7] = onnx.Add(%16, @bo_11)
        return %17
    """)  # fmt: skip


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (CHAIN.replace("a = MatMul (p, vt)", "a = MatMul (p, vt) extra = ReduceMax <keepdims = 0> (v)").replace("y = Add (om, bo)", "z = Add (om, bo) y = Add (z, extra)"),
         "what v makes is read by others too"),
        (CHAIN.replace("y = Add (om, bo)", "y = Neg (om)"), "what reads %Reshape_14 is not a layer with a bias, alone"),
        (CHAIN.replace("s = MatMul", "extra = ReduceMax <keepdims = 0> (kt) s = MatMul").replace("y = Add (om, bo)", "z = Add (om, bo) y = Add (z, extra)"),
         "what its keys become on the way to the scores is read by others too"),
    ],
)  # fmt: skip
def test_what_others_read_or_nothing_takes_in_stays(body, reason):
    count, reasons = run(onnx(body))
    assert count == 1, "the other of keys and values still changes"
    assert len(reasons) == 1 and reasons[0].split("%")[0] == reason.split("%")[0]


def test_a_bias_that_differs_from_key_to_key_stays():
    class Mixing(nn.Module):
        """Layers along the axis of positions."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.k, self.v, self.o = nn.Linear(L, L), nn.Linear(L, L), nn.Linear(8, 7)

        def forward(self, x):
            k, v = (f(x.mT).mT.unsqueeze(1) for f in (self.k, self.v))
            return self.o(scaled_dot_product_attention(x.unsqueeze(1), k, v))

    count, reasons = run(from_torch(Mixing(), X))
    assert count == 0
    assert reasons == ["the bias of k is not the same for all keys", "the bias of v is not the same for all values"]


def test_rotated_keys_keep_their_bias():
    class Rotary(Attend):
        def forward(self, x):
            k = self.heads(self.k(x))
            angle = torch.arange(L)[:, None] / torch.arange(1, D + 1)
            k = k * angle.cos() + k.flip(-1) * angle.sin()
            y = self.attention(self.heads(self.q(x)), k, self.heads(self.v(x)))
            return self.o(y.transpose(1, 2).reshape(B, L, H * D))

    gm = check(FoldAttentionBiases(), from_torch(Rotary(), X), (X,), None)
    assert "@k.bias" in qgraph.text(gm) and "@v.bias" not in qgraph.text(gm)


def test_one_layer_for_queries_keys_and_values_keeps_its_bias():
    class Joint(Attend):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 3 * H * D)

        def forward(self, x):
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.o(self.attention(*map(self.heads, (q, k, v))).transpose(1, 2).reshape(B, L, H * D))

    count, reasons = run(from_torch(Joint(), X))
    assert (count, reasons) == (0, ["what qkv makes is read by others too"] * 2)


def test_a_layer_behind_without_a_bias_is_given_none():
    count, reasons = run(from_torch(Attend(o_bias=False), X))
    assert count == 1 and [r.partition("%")[0] for r in reasons] == ["what reads "]


def test_a_constant_mask_that_blocks_a_row_keeps_the_values_bias():
    class Blocked(Attend):
        def __init__(self):
            super().__init__(lambda q, k, v: scaled_dot_product_attention(q, k, v, self.mask))
            self.register_buffer("mask", torch.ones(L, L, dtype=torch.bool).tril(-1))

    gm = check(FoldAttentionBiases(), from_torch(Blocked(), X), (X,), None)
    assert "@v.bias" in qgraph.text(gm) and "@k.bias" not in qgraph.text(gm)
    assert run(from_torch(Blocked(), X))[1] == ["its mask blocks all keys of a row, whose result is then no mean of values"]


def test_scaled_or_clipped_weights_are_not_attention():
    count, reasons = run(from_torch(Attend(lambda q, k, v: ((q @ k.mT).softmax(-1) * 0.5) @ v), X))
    assert (count, reasons) == (0, [])


def test_layers_without_biases_are_passed_over_in_peace():
    count, reasons = run(from_torch(Attend(bias=False), X))
    assert (count, reasons) == (0, [])


def test_every_recipe_starts_from_it():
    prepared = qgraph.prepare(Attend(), (X,), recipe="w8a8-dynamic")
    assert [e.decision for e in prepared.meta["qgraph"].ledger if e.by == "fold_attention_biases"] == ["bias dropped", "bias moved to o"]
