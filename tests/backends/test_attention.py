"""Attention written as a chain -> the operator, for heads that a Transpose splits off; every reason to leave the chain alone."""

from __future__ import annotations

import pytest
import torch

from qgraph.backends.onnxruntime import OnnxRuntime
from qgraph.backends.onnxruntime.apart import KeepApart
from qgraph.backends.onnxruntime.attention import FuseAttention
from qgraph.backends.onnxruntime.modernize import Modernize, obstacle
from qgraph.onnx_io import opset
from qgraph.pipeline import Context
from qgraph.testing import check, from_onnx, from_torch

ORT = OnnxRuntime(threads=1)
MASKS = {
    "S,S": (5, 5),
    "B,1,1,S": (2, 1, 1, 5),
    "B,1,S,S": (2, 1, 5, 5),
    "1,3,S,S": (1, 3, 5, 5),
    "B,3,1,S": (2, 3, 1, 5),
    "1,1,S,1": (1, 1, 5, 1),
}


def encoder(mask: str | None, *, version: int = 23, dtype: str = "float", scale: str = "Mul", batch: str = "B", keys: str = "heads") -> str:
    """q, k, v [B,S,24] -> attention with 3 heads of 8 -> [B,S,24]; the scores are scaled before the mask is added."""
    inputs = f", {dtype}[{mask}] mask" if mask else ""
    masked = "masked = Add(mask, scaled)" if mask else ""
    turn = {"heads": "kt = Transpose<perm=[0,2,3,1]>(ks)", "late": "kh = Transpose<perm=[0,2,1,3]>(ks)  kt = Transpose<perm=[0,1,3,2]>(kh)"}
    return f"""<ir_version: 8, opset_import: ["": {version}]>
        g ({dtype}[{batch},S,24] q, {dtype}[{batch},S,24] k, {dtype}[{batch},S,24] v{inputs}) => ({dtype}[{batch},S,24] y)
        <int64[4] split = {{0, 0, 3, 8}}, int64[3] join = {{0, 0, 24}}, {dtype} factor = {{{"0.3" if scale == "Mul" else "3.0"}}}> {{
            qs = Reshape(q, split)  ks = Reshape(k, split)  vs = Reshape(v, split)
            qh = Transpose<perm=[0,2,1,3]>(qs)  vh = Transpose<perm=[0,2,1,3]>(vs)  {turn[keys]}
            scores = MatMul(qh, kt)  scaled = {scale}(scores, factor)  {masked}  p = Softmax<axis=-1>({"masked" if mask else "scaled"})
            o = MatMul(p, vh)  ot = Transpose<perm=[0,2,1,3]>(o)  y = Reshape(ot, join)
        }}"""


def operands(mask: str | None = None, *, rows: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    qkv = tuple(torch.randn(rows, 5, 24) for _ in range(3))
    if mask is None:
        return qkv
    blocked = torch.rand(MASKS[mask]) < 0.4
    blocked[..., 0] = False
    return *qkv, blocked.float() * torch.finfo(torch.float32).min


def op_types(gm) -> list[str]:
    return [n.target.op_type for n in gm.graph.nodes if hasattr(n.target, "op_type")]


def declines(source: str, *args: torch.Tensor) -> list[str]:
    ctx = Context()
    FuseAttention().run(from_onnx(source, *args)[0], ctx)
    return [d.reason for d in ctx.declines]


def test_the_chain_becomes_one_operator_that_reads_the_heads_where_they_are():
    x = operands("B,1,S,S")
    check(
        FuseAttention(),
        from_onnx(encoder("B,1,S,S"), *x),
        x,
        """
        %0: f32[B,S,24] = onnx.Attention(%q, %k, %v, %mask, kv_num_heads=3, q_num_heads=3, scale=0.30000001192092896)
        return %0
        """,
    )


@pytest.mark.parametrize("scale", ["Mul", "Div"])
@pytest.mark.parametrize("keys", ["heads", "late"])
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_numbers_are_those_of_the_chain_for_every_shape_of_a_mask(mask, keys, scale):
    source, x = encoder(mask, scale=scale, keys=keys), operands(mask)
    gm = check(FuseAttention(), from_onnx(source, *x), x, None)
    assert "Attention" in op_types(gm) and "Softmax" not in op_types(gm)


def test_a_mask_of_one_row_is_expanded_once_for_all_layers():
    text = """<ir_version: 8, opset_import: ["": 23]> g (float[B,S,24] x, float[B,1,1,S] mask) => (float[B,S,24] y)
        <int64[4] split = {0, 0, 3, 8}, int64[3] join = {0, 0, 24}> {"""
    for i, (x, y) in enumerate((("x", "h"), ("h", "y"))):
        text += f"""
            s{i} = Reshape({x}, split)  q{i} = Transpose<perm=[0,2,1,3]>(s{i})  k{i} = Transpose<perm=[0,2,3,1]>(s{i})
            a{i} = MatMul(q{i}, k{i})  m{i} = Add(a{i}, mask)  p{i} = Softmax(m{i})  o{i} = MatMul(p{i}, q{i})
            t{i} = Transpose<perm=[0,2,1,3]>(o{i})  {y} = Reshape(t{i}, join)"""
    x = (operands()[0], operands("B,1,1,S")[3])
    gm = check(FuseAttention(), from_onnx(text + "}", *x), x, None)
    assert (op_types(gm).count("Attention"), op_types(gm).count("Expand")) == (2, 1)


def test_declines_a_mask_that_may_have_more_rows_than_q():
    x = operands("B,1,S,S", rows=1)
    reasons = declines(encoder("C,1,S,S"), *x[:3], x[3][:1])
    assert reasons == ["it is not known that the mask has the batch and the heads of q"]


def test_declines_lengths_that_are_not_known():
    source = encoder(None).replace("split = {0, 0, 3, 8}", "split = {0, -1, 3, 8}")
    assert "differ in batch or heads, or it is not known that they do not" in declines(source, *operands())[0]


def test_declines_other_floats():
    x = tuple(t.double() for t in operands())
    assert "Attention takes float32" in declines(encoder(None, dtype="double"), *x)[0]


def test_declines_in_an_old_opset():
    assert "to which this model of opset 18 was not raised" in declines(encoder(None, version=18), *operands())[0]


@pytest.mark.parametrize("version", [13, 18])
def test_the_backend_raises_the_opset_for_it(version):
    x = operands("B,1,1,S")
    gm, want = from_onnx(encoder("B,1,1,S", version=version), *x)
    program = ORT.lower(gm)
    assert "Attention" in op_types(program.gm) and opset(program.gm) == 23
    torch.testing.assert_close(program(*x)[0], want[0], rtol=1e-5, atol=1e-5)


class SelfAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        q, k, v = (layer(x).view(2, 5, 3, 8).transpose(1, 2) for layer in self.qkv)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 24)


def test_attention_of_torch_reaches_the_kernel():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24)
    gm, want = from_torch(SelfAttention(), x)
    program = ORT.lower(gm)
    assert "Attention" in op_types(program.gm)
    torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-5)


# The opset.

GELU = """<ir_version: 8, opset_import: ["": 13]> g (float[M,6] x) => (float[M,6] y)
    <float root = {1.4142135}, float one = {1.0}, float half = {0.5}> {
        d = Div(x, root)  e = Erf(d)  a = Add(e, one)  h = Mul(a, half)  y = Mul(x, h)
    }"""


def test_the_opset_stays_where_there_is_no_attention():
    x = (torch.randn(4, 6),)
    gm = check(Modernize(), from_onnx(GELU, *x), x, None)
    assert opset(gm) == 13 and "Gelu" not in op_types(gm)


def test_what_the_new_opset_has_operators_for_is_recomposed():
    source = encoder(None, version=13).replace("<int64[4]", "<float three = {3.0}, float none = {0.0}, float six = {6.0}, int64[4]")
    source = source.replace(
        "y = Reshape(ot, join)", "a = Reshape(ot, join) b = Add(a, three) c = Clip(b, none, six) d = Mul(a, c) y = Div(d, six)"
    )
    gm = check(Modernize(), from_onnx(source, *operands()), operands(), None)
    assert opset(gm) == 23 and op_types(gm)[-1] == "HardSwish"


def test_the_opset_stays_where_a_node_cannot_be_carried_over():
    """GroupNormalization means something else from opset 21 on."""
    source = encoder(None, version=18).replace("] y)", "] y, float[B,S,24] z)").replace("<int64[4]", "<float[1] one = {1.0}, int64[4]")
    source = source.replace("y = Reshape", "z = GroupNormalization<num_groups=1>(k, one, one)  y = Reshape")
    gm, _ = from_onnx(source, *operands())
    assert "its scale is per channel" in str(obstacle(gm, 23)) and obstacle(gm, 20) is None
    Modernize().run(gm, Context())
    assert opset(gm) == 18


# Additions that ONNX Runtime would fuse into slower kernels.

NORM = """<ir_version: 8, opset_import: ["": 17]> g (float[B,S,6] x, float[B,S,6] r) => (float[B,S,6] y, float[B,S,6] z)
    <float[6] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[6] b = {0.5, 0.0, 1.0, 0.0, 1.0, 2.0}> {
        h = Add(x, r)  y = LayerNormalization<axis=-1>(h, w, b)  z = Add(h, x)
    }"""


def test_an_addition_before_a_layer_norm_is_a_sum_that_is_not_fused():
    x = (torch.randn(2, 3, 6), torch.randn(2, 3, 6))
    gm = check(KeepApart(), from_onnx(NORM, *x), x, None)
    assert op_types(gm) == ["Sum", "LayerNormalization", "Add"]


def test_other_types_stay():
    """Sum has no kernel for 16 bits."""
    half = NORM.replace("float[B", "float16[B").replace("LayerNormalization<axis=-1>(h, w, b)", "LayerNormalization<axis=-1>(h, x)")
    x = (torch.randn(2, 3, 6).half(), torch.randn(2, 3, 6).half())
    gm, _ = from_onnx(half, *x)
    assert KeepApart().run(gm, Context()) == 0 and "Sum" not in op_types(gm)
