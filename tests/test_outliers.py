"""One linear becomes two whose sum it is; only the rest of it is ever quantized."""

import pytest
import torch
from torch import nn

import qgraph
from qgraph.outliers import outlier_split, recompile, split_sites, without_columns
from qgraph.pipeline import Context
from qgraph.text import path_of, text
from qgraph.verify import check_graph
from qgraph.views import Linear, view
from tests.outlying import Net, computed, inputs, observed, outliers

X = inputs(1)[0]
BOTH = pytest.mark.parametrize("origin", ["torch", "onnx"])


def sites_of(gm, ctx=None):
    return {site.name: site for site in split_sites(gm, ctx or Context(), by="test")}


def kept(site, *entries):
    found = torch.zeros(site.weight.shape, dtype=torch.bool)
    for n, k in entries:
        found[n, k] = True
    return found


def split(gm, site, where):
    return recompile(gm, outlier_split(gm, site, where, "because", by="test"))


@BOTH
def test_few_columns_are_gathered_and_the_function_stays(origin):
    gm = observed(origin, "w8a16")
    sites = sites_of(gm)
    assert list(sites) == ["a", "b", "c"]
    weight = sites["a"].weight.clone()
    assert split(gm, sites["a"], kept(sites["a"], (0, 7), (3, 7), (5, 30))) == 1
    check_graph(gm)
    torch.testing.assert_close(computed(gm, X), Net().eval()(X).detach())
    rest = sites_of(gm)["c"].part
    product = next(v for n in rest.graph.nodes if n.meta.get("name") == "a/outliers" and (v := view(Linear, n)))
    assert tuple(product.weight.graph.owning_module.get_buffer(product.weight.target).shape) == (2, 24)
    left = next(v for n in rest.graph.nodes if n.meta.get("split") == ("test",) and (v := view(Linear, n)))
    value = gm.get_buffer(left.weight.target)
    value = value if origin == "torch" else value.T
    assert value[0, 7] == value[3, 7] == value[5, 30] == 0
    assert int((value != weight).sum()) == 3
    assert outliers(gm)["a"] == ("3 weights in float", "because")


def test_the_product_is_added_behind_the_bias():
    gm = observed("onnx", "w8a16")
    site = sites_of(gm)["a"]
    split(gm, site, kept(site, (1, 2)))
    assert text(gm).splitlines()[:5] == [
        f"%0: f32[B,5,24] = onnx.MatMul(%x, @{weight_of(gm, 'a')})",
        "%1: f32[B,5,24] = onnx.Add(%0, @ba)",
        f"%2: f32[B,5,1] = onnx.Gather(%x, @{site.node.name}_columns, axis=-1)",
        "%3: f32[B,5,24] = onnx.MatMul(%2, @wa_outliers)",
        "%4: f32[B,5,24] = onnx.Add(%1, %3)",
    ]


def weight_of(gm, name):
    return next(view(Linear, n).weight.target for n in gm.graph.nodes if path_of(n) == name and view(Linear, n))


@BOTH
def test_weights_in_many_columns_are_a_product_with_all_of_x(origin):
    gm = observed(origin, "w8a16")
    site = sites_of(gm)["a"]
    split(gm, site, kept(site, *((k % 24, k) for k in range(32))))
    assert "columns" not in text(gm)
    torch.testing.assert_close(computed(gm, X), Net().eval()(X).detach())


@BOTH
def test_only_the_rest_is_quantized_even_where_a_rule_names_the_layer(origin):
    recipe = qgraph.load_recipe("w8a16", ['rules={"a*": {weights: {bits: 2}}}'])
    gm = observed(origin, recipe)
    site = sites_of(gm)["a"]
    where = kept(site, *((n, 3) for n in range(24)), *((n, 20) for n in range(24)))
    split(gm, site, where)
    quantized = qgraph.convert(gm)
    printed = text(quantized)
    assert printed.count("qg.dequantize") == 3
    assert "2 of 32 input channels in float" in outliers(quantized)["a"][0]
    exact = computed(observed(origin, "w8a16"), X)
    plain = computed(qgraph.convert(observed(origin, recipe)), X)
    assert (computed(quantized, X) - exact).square().sum() < 0.05 * (plain - exact).square().sum()


@BOTH
def test_columns_taken_out_of_x_are_zero_for_the_linears_that_are_named(origin):
    gm = observed(origin, "w8a8-dynamic")
    sites = sites_of(gm)
    masked = without_columns(gm, [sites["a"]], torch.tensor([3, 20]), by="test")
    recompile(gm, 1)
    assert [user.name for user in masked.users] == [sites["a"].node.name]
    x = X.clone()
    x[..., [3, 20]] = 0
    net = Net().eval()
    torch.testing.assert_close(computed(gm, X), net.c(torch.relu(net.a(x) + net.b(X))).detach())


def test_a_weight_that_others_read_and_a_table_are_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.one, self.head = nn.Embedding(40, 32), nn.Linear(32, 32), nn.Linear(32, 40, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.one(self.one(self.table(ids))))

    gm = qgraph.prepare(Tied().eval(), (torch.tensor([[1, 2]]),), recipe="w4a16-g32-sym")
    ctx = Context()
    assert not sites_of(gm, ctx)
    assert [d.reason for d in ctx.declines] == [
        *["its weight is read elsewhere, too"] * 2,
        "its weight is tied to the table @table.weight, with which it may share its integers",
    ]


def test_a_transposed_x_is_left_alone():
    source = """<ir_version: 8, opset_import: ["": 17]> g (float[4,3] x) => (float[3,5] y)
        <float[4,5] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2}> { y = Gemm <transA = 1> (x, w) }"""
    import onnx

    gm, ctx = qgraph.prepare(onnx.parser.parse_model(source), recipe="w8a16"), Context()
    assert not sites_of(gm, ctx)
    assert [d.reason for d in ctx.declines] == ["rows of x run along its axis -2, not along the last"]
