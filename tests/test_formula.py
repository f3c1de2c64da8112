"""Products are read as formulas that have the product's value."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule

from qgraph.formula import LIMIT, product, scalings, shifted, unscaled
from qgraph.testing import from_torch
from tests.passes.graphs import Fn

aten = torch.ops.aten
A, B = torch.tensor([0.5, 2.0, 3.0]), torch.tensor([1.5, 0.25, 4.0])

STEPS = st.lists(
    st.sampled_from(["mul_a", "mul_b", "div_b", "times_3", "over_4", "square", "cube", "root", "rsqrt", "reciprocal"]),
    min_size=1,
    max_size=6,
)


def build(steps):
    """A chain that starts from a: (graph, last node, a, b)."""
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    call, x = graph.call_function, a
    for step in steps:
        x = {
            "mul_a": lambda x: call(aten.mul.Tensor, (x, a)),
            "mul_b": lambda x: call(aten.mul.Tensor, (b, x)),
            "div_b": lambda x: call(aten.div.Tensor, (x, b)),
            "times_3": lambda x: call(aten.mul.Tensor, (x, 3)),
            "over_4": lambda x: call(aten.div.Tensor, (x, 4.0)),
            "square": lambda x: call(aten.pow.Tensor_Scalar, (x, 2)),
            "cube": lambda x: call(aten.pow.Tensor_Scalar, (x, 3)),
            "root": lambda x: call(aten.sqrt.default, (x,)),
            "rsqrt": lambda x: call(aten.rsqrt.default, (x,)),
            "reciprocal": lambda x: call(aten.reciprocal.default, (x,)),
        }[step](x)
    graph.output(x)
    return GraphModule({}, graph), x


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_the_formula_has_the_value_of_the_product(steps):
    gm, last = build(steps)
    found = product(last)
    if found is None:  # something cancels
        return
    values = {}
    for node in gm.graph.nodes:
        args = [values.get(v, v) for v in node.args]
        values[node] = (
            {"a": A.double(), "b": B.double()}[node.name]
            if node.op == "placeholder"
            else None
            if node.op == "output"
            else node.target(*args)
        )
    want = values[last]
    got = torch.full_like(want, found.factor)
    for node, power in found.powers.items():
        got = got * values[node] ** power
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0, equal_nan=True)


def last_of(fn):
    gm, _ = from_torch(Fn(fn), A)
    return gm.graph.output_node().all_input_nodes[0]


def test_what_cancels_is_no_product():
    assert product(last_of(lambda x: x * x / x)) is None
    assert product(last_of(lambda x: x * 2 / (3 * x))) is None


def test_a_root_is_not_multiplied_out():
    """sqrt(x * x) is |x|."""
    found = product(last_of(lambda x: torch.sqrt(x * x)))
    assert [(n.op, p) for n, p in found.powers.items()] == [("call_function", 0.5)]


def test_constant_factors_and_summands_are_peeled():
    node = last_of(lambda x: 2 * (x / 8.0) * 3)
    x, factor, nodes = unscaled(node)
    assert (x.name, factor, len(nodes)) == ("x", 0.75, 3) and len(list(scalings(node))) == 4
    assert unscaled(last_of(lambda x: 2 / x))[0].target is aten.reciprocal.default
    assert shifted(last_of(lambda x: x - 3))[1] == -3.0 and shifted(last_of(lambda x: 3 + x))[1] == 3.0
    assert shifted(last_of(lambda x: 3 - x)) is None


def test_a_long_product_is_read_in_part():
    def doubling(x):
        for _ in range(200):
            x = x * x
        return x

    assert len(product(last_of(doubling)).nodes) <= LIMIT
