"""Attention of torch in its parts, and found again in the ONNX graph that is made of it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import qgraph
from qgraph.attention import find_attention
from qgraph.passes.open_attention import OpenAttention
from qgraph.pipeline import Context
from qgraph.testing import check, from_torch
from qgraph.torch_export import to_onnx_dialect
from tests.passes.graphs import from_text

B, L, H, D = 2, 5, 3, 4
torch.manual_seed(0)
X, MASK = torch.randn(B, L, H * D), torch.randn(B, 1, L, L)


class Attend(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options, self.qkv = options, nn.Linear(H * D, 3 * H * D)

    def forward(self, x, mask):
        q, k, v = (t.reshape(B, L, H, D).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        causal = self.options.get("is_causal", False)
        y = scaled_dot_product_attention(q, k, v, None if causal else mask, **self.options)
        return y.transpose(1, 2).reshape(B, L, H * D) + mask.sum() * 0


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
@pytest.mark.parametrize("mask", [MASK, (MASK > 0) | torch.eye(L, dtype=torch.bool)], ids=["float", "bool"])
def test_attention_in_parts_has_the_same_numbers(options, mask):
    gm = check(OpenAttention(), from_torch(Attend(**options), X, mask), (X, mask), None)
    assert "scaled_dot_product_attention" not in gm.code and gm.code.count("aten.matmul.default") == 2


def test_a_translated_module_has_an_attention_that_is_found():
    gm, want = from_torch(Attend(), X, MASK)
    onnx = to_onnx_dialect(gm)
    (found,) = [f for n in onnx.graph.nodes if (f := find_attention(n)) is not None]
    assert found.scale == pytest.approx(0.5) and found.mask.name == "mask" and qgraph.text(onnx).count("Reshape") == 4
    torch.testing.assert_close(onnx(X, MASK)[0], want, rtol=1e-5, atol=1e-5)


def test_a_causal_mask_stays_whole_with_a_reason_and_onnx_graphs_stay():
    gm, _ = from_torch(Attend(is_causal=True), X, MASK)
    ctx = Context()
    assert OpenAttention().run(gm, ctx) == 0
    assert [d.reason for d in ctx.declines] == ["it drops values, shares keys between heads, or makes a causal mask of its own"]
    y = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    check(OpenAttention(), from_text("y = Softmax (x)", y), (y,), "%0: f32[2,3,4] = onnx.Softmax(%x)\nreturn %0")
