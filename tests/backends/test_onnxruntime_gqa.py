"""Grouped queries, rotated heads and a cache around attention -> RotaryEmbedding and one Attention; every reason to leave them alone."""

from __future__ import annotations

import pytest
import torch

from qgraph.backends.onnxruntime import OnnxRuntime
from qgraph.backends.onnxruntime.attention import FuseAttention
from qgraph.pipeline import Context
from qgraph.testing import check, from_onnx

HALVES = {
    "slices": "{0}1 = Slice({0}h, zero, four, three, one)  {0}2 = Slice({0}h, four, end, three, one)",
    "split": "{0}1, {0}2 = Split<axis=3, num_outputs=2>({0}h)",
}


def rotate(name: str, halves: str) -> str:
    """x * cos + Concat(-x2, x1) * sin"""
    return f"""{HALVES[halves].format(name)}  {name}n = Neg({name}2)  {name}c = Concat<axis=-1>({name}n, {name}1)
        {name}s = Mul({name}c, sin)  {name}m = Mul({name}h, cos)  {name}r = Add({name}m, {name}s)"""


def layer(
    *,
    version: int = 23,
    halves: str = "slices",
    mask: str | None = "B,1,S,T",
    past: bool = True,
    angle: str = "B",
    twice: str = "a",
    tail: str = "",
) -> str:
    """q [B,S,32] in 4 heads of 8, k and v [B,S,16] in 2 heads of 8 behind a cache of length P: attention [B,S,32] and the joined cache."""
    cache = "float[B,2,P,8] pk, float[B,2,P,8] pv, " if past else ""
    keys, values = ("nk", "nv") if past else ("kr", "vh")
    joined = "nk = Concat<axis=-2>(pk, kr)  nv = Concat<axis=-2>(pv, vh)" if past else "nk = Identity(kr)  nv = Identity(vh)"
    blocked = f"float[{mask}] mask, " if mask else ""
    return f"""<ir_version: 8, opset_import: ["": {version}]>
        g (float[B,S,32] q, float[B,S,16] k, float[B,S,16] v, {cache}{blocked}float[{angle},S,4] a, float[{angle},S,4] b)
            => (float[B,S,32] y, float[B,2,T,8] nk, float[B,2,T,8] nv)
        <int64[4] four_heads = {{0, 0, 4, 8}}, int64[4] two_heads = {{0, 0, 2, 8}}, int64[3] join = {{0, 0, 32}}, float factor = {{0.3}},
         int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}}, int64[1] four = {{4}}, int64[1] end = {{999}},
         int64[5] times = {{1, 1, 2, 1, 1}}, int64[4] merged = {{0, 4, -1, 8}},
         float[B,2,1,T,8] k5, float[B,2,1,T,8] v5, float[B,2,2,T,8] kx, float[B,2,2,T,8] vx,
         float[B,4,T,8] kk, float[B,4,T,8] vv> {{
            e = Concat<axis=-1>(a, {twice})  f = Cos(e)  cos = Unsqueeze(f, one)  g = Sin(e)  sin = Unsqueeze(g, one)
            q4 = Reshape(q, four_heads)  qh = Transpose<perm=[0,2,1,3]>(q4)  k4 = Reshape(k, two_heads)  kh = Transpose<perm=[0,2,1,3]>(k4)
            v4 = Reshape(v, two_heads)  vh = Transpose<perm=[0,2,1,3]>(v4)
            {rotate("q", halves)}  {rotate("k", halves)}  {joined}
            k5 = Unsqueeze({keys}, two)  kx = Expand(k5, times)  kk = Reshape(kx, merged)
            v5 = Unsqueeze({values}, two)  vx = Expand(v5, times)  vv = Reshape(vx, merged)
            kt = Transpose<perm=[0,1,3,2]>(kk)  s0 = MatMul(qr, kt)  s1 = Mul(s0, factor)  {"s2 = Add(s1, mask)" if mask else ""}  p = Softmax<axis=-1>({"s2" if mask else "s1"})
            o = MatMul(p, vv)  ot = Transpose<perm=[0,2,1,3]>(o)  y = Reshape(ot, join) {tail}
        }}"""


def operands(*, rows: int = 2, new: int = 3, before: int = 4, past: bool = True, angle: int | None = None) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, new, n) for n in (32, 16, 16))
    cache = tuple(torch.randn(rows, 2, before, 8) for _ in range(2 * past))
    blocked = torch.ones(new, new + before * past).tril(before * past) == 0
    mask = blocked.float().expand(rows, 1, *blocked.shape) * torch.finfo(torch.float32).min
    return q, k, v, *cache, mask, *(torch.randn(angle or rows, new, 4) for _ in range(2))


def op_types(gm) -> list[str]:
    return [n.target.op_type for n in gm.graph.nodes if hasattr(n.target, "op_type")]


def declines(source: str, *args: torch.Tensor) -> dict[str, str]:
    ctx = Context()
    FuseAttention().run(from_onnx(source, *args)[0], ctx)
    return {d.rule: d.reason for d in ctx.declines}


def test_a_decoder_layer_becomes_two_rotations_and_one_attention_that_returns_the_cache():
    x = operands()
    check(
        FuseAttention(),
        from_onnx(layer(), *x),
        x,
        """
        %0: f32[B,S,8] = onnx.Concat(%a, %a, axis=-1)
        %1: f32[B,S,8] = onnx.Cos(%0)
        %2: f32[B,S,8] = onnx.Sin(%0)
        %3: f32[B,S,4] = onnx.Slice(%1, @add_start, @add_half, @add_axis)
        %4: f32[B,S,4] = onnx.Slice(%2, @add_start_15, @add_half_16, @add_axis_17)
        %5: f32[B,S,32] = onnx.RotaryEmbedding(%q, %3, %4, num_heads=4)
        %6: f32[B,S,4] = onnx.Slice(%1, @add_1_start, @add_1_half, @add_1_axis)
        %7: f32[B,S,4] = onnx.Slice(%2, @add_1_start_21, @add_1_half_22, @add_1_axis_23)
        %8: f32[B,S,16] = onnx.RotaryEmbedding(%k, %6, %7, num_heads=2)
        %9: ? = onnx.Attention(%5, %8, %v, %mask, %pk, %pv, kv_num_heads=2, q_num_heads=4, scale=0.30000001192092896)
        %10: f32[B,2,T,8] = getitem(%9, 2)
        %11: f32[B,2,T,8] = getitem(%9, 1)
        %12: f32[B,S,32] = getitem(%9, 0)
        return %12, %11, %10
        """,
    )


@pytest.mark.parametrize("halves", HALVES)
@pytest.mark.parametrize("sizes", [(2, 3, 4), (1, 1, 5), (3, 4, 0), (2, 1, 9)])
def test_numbers_are_those_of_the_chain(halves, sizes):
    rows, new, before = sizes
    x = operands(rows=rows, new=new, before=before)
    gm = check(FuseAttention(), from_onnx(layer(halves=halves), *x), x, None)
    assert op_types(gm).count("RotaryEmbedding") == 2 and "Softmax" not in op_types(gm)


def test_one_row_of_angles_serves_the_whole_batch():
    x = operands(angle=1)
    gm = check(FuseAttention(), from_onnx(layer(angle="1"), *x), x, None)
    assert op_types(gm).count("RotaryEmbedding") == 2


def test_heads_without_a_cache_are_grouped_as_well():
    x = operands(past=False)
    gm = check(FuseAttention(), from_onnx(layer(past=False, mask="B,1,S,S").replace("T,8]", "S,8]"), *x), x, None)
    assert "Attention" in op_types(gm) and "Expand" not in op_types(gm)


def test_a_mask_of_one_row_is_expanded_to_past_and_new_columns():
    x = operands(new=1)
    gm = check(FuseAttention(), from_onnx(layer(mask="B,1,1,T"), *x), x, None)
    assert "Attention" in op_types(gm) and op_types(gm).count("Expand") == 1


def test_one_token_needs_no_mask():
    q, k, v, pk, pv, _, a, b = operands(new=1)
    x = (q, k, v, pk, pv, a, b)
    gm = check(FuseAttention(), from_onnx(layer(mask=None), *x), x, None)
    assert "Attention" in op_types(gm) and "Softmax" not in op_types(gm)


@pytest.mark.parametrize("version", [18, 23])
def test_the_backend_runs_it_in_the_kernel(version):
    x = operands()
    gm, want = from_onnx(layer(version=version), *x)
    program = OnnxRuntime(threads=1).lower(gm)
    assert {"Attention", "RotaryEmbedding"} <= set(op_types(program.gm))
    for got, expected in zip(program(*x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_declines_halves_of_angles_that_are_not_known_to_be_equal():
    reason = declines(layer(twice="b"), *operands())["fuse_rotary"]
    assert reason == "it is not known that cos and sin are [batch or 1, 1, length, size] with two equal halves along the last axis"


def test_declines_a_cache_that_something_else_reads():
    source = layer(tail="z = Relu(nk)").replace("float[B,2,T,8] nv)", "float[B,2,T,8] nv, float[B,2,T,8] z)", 1)
    assert "k and v behind a cache that only an output reads" in declines(source, *operands())["fuse_attention"]


def test_declines_a_cache_of_another_length():
    source = layer().replace("float[B,2,P,8] pv", "float[B,2,Q,8] pv")
    assert "before these are of the same batch, heads and length" in declines(source, *operands())["fuse_attention"]


def test_a_rotation_by_other_halves_is_none():
    """Concat(x1, -x2) swaps nothing: what is not the chain stays as it is, without a reason."""
    source = layer().replace("Concat<axis=-1>(qn, q1)", "Concat<axis=-1>(q1, qn)")
    gm, _ = from_onnx(source, *operands())
    FuseAttention().run(gm, Context())
    assert op_types(gm).count("RotaryEmbedding") == 1
