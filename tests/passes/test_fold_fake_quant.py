"""fake_quantize becomes integers: both dialects, same bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qgraph.edit import add_constant
from qgraph.ops import Q
from qgraph.passes import FoldFakeQuant
from qgraph.pipeline import Context, Pipeline
from qgraph.testing import check, from_onnx, from_torch
from qgraph.text import text
from qgraph.views import key

X = torch.tensor([[0.31, -1.7, 2.2], [9.0, 0.05, -0.4]])


class Simulated(nn.Module):
    """Per-channel int4 weight, per-tensor asymmetric uint8 activation."""

    def __init__(self, kind: torch.dtype = torch.float32, scale_kind: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.7, -1.1, 0.2], [3.0, 0.4, -2.6]], dtype=kind))
        self.bias = nn.Parameter(torch.tensor([0.25, -4.0], dtype=kind))
        self.register_buffer("w_scale", torch.tensor([0.157, 0.43], dtype=kind))
        self.register_buffer("w_zero", torch.tensor([1, -2], dtype=torch.int8))
        self.register_buffer("x_scale", torch.tensor(0.02, dtype=scale_kind or kind))
        self.register_buffer("x_zero", torch.tensor(90, dtype=torch.uint8))

    def forward(self, x):
        weight = Q.fake_quantize(self.weight, self.w_scale, self.w_zero, "int4", 0)
        return F.linear(Q.fake_quantize(x, self.x_scale, self.x_zero, "uint8"), weight, self.bias)


def test_torch_weights_become_integers_and_activations_get_a_quantize() -> None:
    gm = check(FoldFakeQuant(), from_torch(Simulated(), X), (X,), """
        %0: f32[2,3] = qg.dequantize(@weight_int4, @w_scale, @w_zero, 'int4', 0, 0)
        %1: u8[2,3] = qg.quantize(%x, @x_scale, @x_zero, 'uint8', None, 0)
        %2: f32[2,3] = qg.dequantize(%1, @x_scale, @x_zero, 'uint8', None, 0)
        %3: f32[2,2] = aten.linear(%2, %0, @bias)
        return %3
    """, tol=0)  # fmt: skip
    assert gm.weight_int4.tolist() == [[5, -6, 2], [5, -1, -8]]
    assert not hasattr(gm, "weight")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_models_in_short_floats_keep_their_type_and_their_bits(kind: torch.dtype) -> None:
    x = X.to(kind)
    check(FoldFakeQuant(), from_torch(Simulated(kind), x), (x,), None, tol=0)


def simulated_onnx():
    """MatMul and Add with a fake_quantize on the weight and on the input, as insert_fake_quant leaves them."""
    gm, _ = from_onnx(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,3] x) => (float[2,2] y)
          <float[3,2] w = {0.7, 3.0, -1.1, 0.4, 0.2, -2.6}, float[2] b = {0.25, -4.0}> {
            h = MatMul (x, w)
            y = Add (h, b)
        }""",
        X,
    )
    matmul = next(n for n in gm.graph.nodes if key(n.target) == "::MatMul")
    scales = {
        "w": (torch.tensor([0.157, 0.43]), torch.tensor([1, -2], dtype=torch.int8)),
        "x": (torch.tensor(0.02), torch.tensor(90, dtype=torch.uint8)),
    }
    for role, node, dtype, axis in (("x", matmul.args[0], "uint8", None), ("w", matmul.args[1], "int4", 1)):
        names = [add_constant(gm, f"{role}_{part}", t) for part, t in zip(("scale", "zero"), scales[role], strict=True)]
        with gm.graph.inserting_before(matmul):
            parameters = [gm.graph.get_attr(n) for n in names]
            fake = gm.graph.call_function(Q.fake_quantize.default, (node, *parameters, dtype, axis, 0))
        fake.meta.update({k: node.meta[k] for k in ("type", "val") if k in node.meta})
        matmul.replace_input_with(node, fake)
    gm.recompile()
    return gm, gm(X)


def test_onnx_weights_become_integers_in_their_own_layout() -> None:
    gm = check(FoldFakeQuant(), simulated_onnx(), (X,), None, tol=0)
    printed = text(gm)
    assert "qg.dequantize(@w_int4, @w_scale, @w_zero, 'int4', 1, 0)" in printed
    assert "qg.quantize(%x, @x_scale, @x_zero, 'uint8', None, 0)" in printed
    assert gm.w_int4.tolist() == [[5, 5], [-6, -1], [2, -8]]


def test_a_weight_that_is_also_read_in_float_stays() -> None:
    class Tied(Simulated):
        def forward(self, x):
            return super().forward(x) + self.weight.sum()

    gm = check(FoldFakeQuant(), from_torch(Tied(), X), (X,), None, tol=0)
    assert hasattr(gm, "weight") and hasattr(gm, "weight_int4")


def test_declines_a_scale_of_another_float_type() -> None:
    x = X.half()
    gm, _ = from_torch(Simulated(torch.float16, scale_kind=torch.float32), x)
    ctx = Context()
    assert FoldFakeQuant().run(gm, ctx) == 1
    assert [d.reason for d in ctx.declines] == ["x is float16 but its scale is float32; store the scale in x's type"]
    assert "qg.fake_quantize(%x" in text(gm)


def test_the_pass_keeps_its_word_under_numeric_verification() -> None:
    gm, _ = from_torch(Simulated(), X)
    (step,) = Pipeline(FoldFakeQuant(), verify="numerics").run(gm, Context(samples=[(X,)]))
    assert step.count == 2
