"""rows_in_integers alone: what it makes of fused weight-only linears, and when it does nothing."""

import torch

import qgraph
from qgraph.backends.cupy.policy import RowsInIntegers
from qgraph.ops import Q
from qgraph.passes import FuseDequantMatmul
from qgraph.pipeline import Context
from qgraph.views import operands
from tests.small import mlp_proto


def fused(recipe: str, source: str = "torch") -> tuple[torch.fx.GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(5, 16)
    net = torch.nn.Sequential(torch.nn.Linear(16, 48), torch.nn.GELU(), torch.nn.Linear(48, 20, bias=False)).eval()
    gm = qgraph.quantize(
        net if source == "torch" else mlp_proto(), example_inputs=(x,) if source == "torch" else None, recipe=recipe, backend="cupy"
    )
    FuseDequantMatmul().run(gm, Context())
    return gm, x


def linears(gm: torch.fx.GraphModule, target: object) -> list[torch.fx.Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def test_from_sixteen_rows_on_linears_multiply_integers():
    for recipe, source in (("w4a16-g32", "torch"), ("w8a16", "torch"), ("w4a16-g32", "onnx")):
        gm, x = fused(recipe, source)
        before = gm(x) if source == "torch" else gm(x)[0]
        count = len(linears(gm, Q.dequant_linear.default))
        assert count >= 2 and RowsInIntegers(16).run(gm, Context()) == count
        after = gm(x) if source == "torch" else gm(x)[0]
        assert len(linears(gm, Q.quantized_linear.default)) == count and not linears(gm, Q.dequant_linear.default)
        assert 0 < (after - before).norm() < 0.03 * before.norm()
        assert RowsInIntegers(16).run(gm, Context()) == 0


def test_int8_per_channel_stays_the_weight_it_is():
    gm, _ = fused("w8a16")
    (first, *_) = linears(gm, Q.dequant_linear.default)
    weight = operands(first)["weight"].target
    RowsInIntegers(64).run(gm, Context())
    assert weight in {operands(n)["weight"].target for n in linears(gm, Q.quantized_linear.default)}


def test_small_batches_and_unknown_ones_change_nothing():
    for rows in (None, 1, 15):
        gm, _ = fused("w4a16-g32")
        assert RowsInIntegers(rows).run(gm, Context()) == 0 and linears(gm, Q.dequant_linear.default)


def test_a_sum_beyond_int32_is_declined_with_the_reason():
    net, x = torch.nn.Linear(133120, 2).eval(), torch.randn(1, 133120)
    gm = qgraph.quantize(net, example_inputs=(x,), recipe="w8a16", backend="cupy")
    FuseDequantMatmul().run(gm, Context())
    context = Context()
    assert RowsInIntegers(16).run(gm, context) == 0
    assert [d.reason for d in context.declines] == ["the sum over 133120 products of int8 may reach 2.16e+09, beyond int32"]


def test_a_weight_that_is_not_stored_is_declined_with_the_reason():
    gm, _ = fused("w8a16")
    (first, *_) = linears(gm, Q.dequant_linear.default)
    with gm.graph.inserting_before(first):
        first.update_arg(1, gm.graph.call_function(torch.ops.aten.clone.default, (operands(first)["weight"],)))
    context = Context()
    assert RowsInIntegers(16).run(gm, context) == 1  # the other one
    assert [d.reason for d in context.declines] == ["the weight is not constant"]
