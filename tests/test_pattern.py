"""Patterns: what matches, what is bound, and how choices are searched."""

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from qgraph.onnx_io import from_onnx
from qgraph.pattern import Const, Inputs, Match, OneOf, Op, Opt, Var, depth, item, match, names, root_keys
from qgraph.testing import from_torch
from qgraph.views import Dequantize, Elementwise, Linear

ATEN = torch.ops.aten
X = torch.linspace(-1, 1, 6).view(2, 3)


class Block(torch.nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(3, 5, bias=bias)
        self.register_buffer("c", torch.tensor([0.5]))

    def forward(self, x):
        return torch.relu(self.fc(x) + self.c) * 2.0


def nodes(gm: GraphModule, target: object) -> list[Node]:
    return [n for n in gm.graph.nodes if n.target is target]


def block(**options) -> dict[str, Node]:
    gm, _ = from_torch(Block(**options), X)
    return {n.name: n for n in gm.graph.nodes} | {"gm": gm}


def test_an_interface_pattern_binds_the_roles_of_the_view():
    found = block()
    m = match(Op(Linear, "fc", x=Var("x"), weight=Const("w"), bias=Opt(Const("b")), out_axis=-2), found["linear"])
    assert m is not None
    assert m.root is m.fc is found["linear"]
    assert (m.x, m.w.target, m["b"].target) == (found["x"], "fc.weight", "fc.bias")
    assert m.nodes == (found["linear"],)


def test_the_same_pattern_matches_the_onnx_dialect():
    gm = from_onnx_text("y = Gemm <transB = 1> (x, w, b)")
    m = match(Op(Linear, x=Var("x"), weight=Const("w"), bias=Const("b"), out_axis=Var("axis")), list(gm.graph.nodes)[-2])
    assert m is not None
    assert (m.x.name, m.axis) == ("x", -2)


def from_onnx_text(body: str) -> GraphModule:
    import onnx

    return from_onnx(
        onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,3] x) => (float[2,5] y) <float[5,3] w = {{{", ".join("12345" * 3)}}}, float[5] b = {{1, 2, 3, 4, 5}}> {{ {body} }}""")
    )


def test_an_onnx_key_matches_by_schema_names_with_attribute_defaults():
    node = list(from_onnx_text("y = Gemm <transB = 1> (x, w, b)").graph.nodes)[-2]
    m = match(Op("::Gemm", A=Var("x"), B=Const("w"), C=Const("b"), transB=1, transA=0, alpha=Var("alpha")), node)
    assert m is not None and m.alpha == 1.0
    assert match(Op("::Gemm", transB=0), node) is None
    assert match(Op("::MatMul", A=Var("x")), node) is None


def test_an_absent_optional_input_of_an_onnx_op_is_none():
    node = list(from_onnx_text("y = Gemm <transB = 1> (x, w)").graph.nodes)[-2]
    m = match(Op("::Gemm", A=Var("x"), C=Opt(Const("b"))), node)
    assert m is not None and m.b is None
    assert match(Op("::Gemm", C=Const("b")), node) is None


def test_an_overload_matches_by_schema_names():
    found = block()
    m = match(Op(ATEN.add.Tensor, self=Op(ATEN.linear.default, "fc"), other=Const("c"), alpha=1), found["add"])
    assert m is not None and m.fc is found["linear"] and m.c.target == "c"


def test_opt_binds_the_names_inside_to_none_when_the_operand_is_absent():
    with_bias, without = (block(bias=b)["linear"] for b in (True, False))
    pattern = Op(Linear, bias=Opt(OneOf(Const("b"), Op(Dequantize, "dq", q=Const("q")))))
    assert match(pattern, with_bias).b.target == "fc.bias"
    assert match(pattern, without).get("b", 1) is None
    assert match(Op(Linear, bias=Const("b")), without) is None


def test_inputs_match_in_any_order_with_backtracking():
    found = block()
    for first, second in ((Const("c"), Op(Linear, x=Var("x"))), (Op(Linear, x=Var("x")), Const("c"))):
        m = match(Op(Elementwise, kind="add", inputs=Inputs(first, second)), found["add"])
        assert m is not None and m.c.target == "c" and m.x is found["x"]
    both_const = Op(Elementwise, kind="add", inputs=Inputs(Const("c"), Const("d")))
    assert match(both_const, found["add"]) is None
    assert match(Op(Elementwise, kind="add", inputs=Inputs(Var("only"))), found["add"]) is None


def test_a_failed_choice_leaves_no_binding_behind():
    found = block()
    # The first option binds c to the linear's output, then fails; the second must start from scratch.
    one_of = OneOf((Var("c"), Op(ATEN.relu.default)), (Var("x"), Const("c")))
    assert match(Op(Elementwise, inputs=one_of), found["add"]) is None  # a tuple is a literal, not a pattern
    ordered = OneOf(Inputs(Var("c"), Op(ATEN.relu.default)), Inputs(Op(Linear, "fc"), Const("c")))
    m = match(Op(Elementwise, kind="add", inputs=ordered), found["add"])
    assert m is not None and m.c.target == "c" and "fc" in m


def test_a_choice_is_revised_when_a_later_operand_fails():
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    total = graph.call_function(ATEN.add.Tensor, (a, b))
    product = graph.call_function(ATEN.mul.Tensor, (total, b))
    # inputs=(a, b) fits (p, q) first; only (q, p) agrees with `other`.
    pattern = Op(ATEN.mul.Tensor, self=Op(Elementwise, inputs=Inputs(Var("p"), Var("q"))), other=Var("p"))
    m = match(pattern, product)
    assert m is not None and (m.p, m.q) == (b, a)


def test_a_repeated_name_must_bind_the_same_value():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    square, product = (graph.call_function(ATEN.mul.Tensor, (x, other)) for other in (x, y))
    pattern = Op(ATEN.mul.Tensor, self=Var("x"), other=Var("x"))
    assert match(pattern, square) is not None
    assert match(pattern, product) is None


def test_two_reads_of_one_stored_tensor_are_the_same_value():
    root = torch.nn.Module()
    root.register_buffer("w", torch.ones(3))
    root.register_buffer("v", torch.ones(3))
    graph = Graph()
    tied, other = ([graph.get_attr(t, None) for t in targets] for targets in (("w", "w"), ("w", "v")))
    results = [graph.call_function(ATEN.mul.Tensor, tuple(pair)) for pair in (tied, other)]
    graph.output(tuple(results))
    assert GraphModule(root, graph) is not None
    pattern = Op(ATEN.mul.Tensor, self=Const("w"), other=Const("w"))
    assert [match(pattern, r) is not None for r in results] == [True, False]


def test_single_use_asks_that_nothing_else_reads_the_node():
    found = block()
    pattern = Op(ATEN.add.Tensor, self=Op(Linear, single_use=True))
    assert match(pattern, found["add"]) is not None
    found["gm"].graph.output_node().args = ((found["linear"],),)
    assert match(pattern, found["add"]) is None


def test_a_number_matches_itself_and_a_stored_tensor_of_that_one_element():
    found = block()
    assert match(Op(Elementwise, kind="mul", inputs=Inputs(Var("x"), 2.0)), found["mul"]) is not None
    assert match(Op(Elementwise, kind="mul", inputs=Inputs(Var("x"), 3.0)), found["mul"]) is None
    assert match(Op(Elementwise, kind="add", inputs=Inputs(Var("x"), 0.5)), found["add"]) is not None
    assert match(Op(Elementwise, kind="add", inputs=Inputs(Var("x"), 0.25)), found["add"]) is None


def test_alternatives_may_be_the_root():
    found = block()
    pattern = OneOf(Op(ATEN.relu.default, "act"), Op(Elementwise, "act", kind="mul"))
    assert match(pattern, found["relu"]).act is found["relu"]
    assert match(pattern, found["mul"]).act is found["mul"]
    assert match(pattern, found["add"]) is None
    assert {ATEN.relu.default, ATEN.mul.Tensor, "::Mul"} <= root_keys(pattern)


def test_item_takes_one_output_of_a_node_with_several():
    graph = Graph()
    x = graph.placeholder("x")
    split = graph.call_function(ATEN.split.Tensor, (x, 2))
    first, second = (graph.call_function(operator.getitem, (split, i)) for i in (0, 1))
    both = graph.call_function(ATEN.sub.Tensor, (first, second))
    part = Op(ATEN.split.Tensor, "split", self=Var("x"))
    m = match(Op(ATEN.sub.Tensor, self=item(part, 0), other=item(part, 1)), both)
    assert m is not None and m.split is split and m.x is x
    assert match(Op(ATEN.sub.Tensor, self=item(part, 1), other=item(part, 0)), both) is None


def test_a_module_class_matches_calls_of_its_instances():
    gm = torch.fx.symbolic_trace(Block())
    call = next(n for n in gm.graph.nodes if n.op == "call_module")
    m = match(Op(torch.nn.Linear, "fc", input=Var("x")), call)
    assert m is not None and m.x.name == "x"
    assert match(Op(torch.nn.Conv2d, "fc"), call) is None


def test_an_unknown_name_says_what_the_pattern_binds():
    m = match(Op(Linear, "fc", x=Var("x")), block()["linear"])
    assert isinstance(m, Match) and len(m) == 2 and set(m) == {"fc", "x"}
    with pytest.raises(AttributeError, match="binds no 'weight'; it binds fc, x"):
        _ = m.weight


@pytest.mark.parametrize("make", [lambda: Op(3), lambda: root_keys(Var("x")), lambda: Op(Linear, wieght=Var("w"))])
def test_a_pattern_that_can_never_match_is_an_error_where_it_is_written(make):
    with pytest.raises(TypeError):
        make()


def test_names_and_depth_are_read_off_the_pattern():
    pattern = Op(Linear, "l", x=Var("x"), weight=Opt(Op(Dequantize, q=OneOf(Const("q"), Op(Dequantize, "again")))))
    assert sorted(names(pattern)) == ["again", "l", "q", "x"]
    assert depth(pattern) == 3
