"""The driver: replacement, dead code, constants, declines, nested bodies, termination, bisection, and how much it works."""

import logging
import operator

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from qgraph import rewrite
from qgraph.edit import copy_graph
from qgraph.errors import QGraphError, VerificationError
from qgraph.onnx_ops import op
from qgraph.pattern import Const, Inputs, Op, Var
from qgraph.rewrite import Decline, Rule, apply, erase, graph_modules, is_pure, replace, rule
from qgraph.testing import check, from_onnx, from_torch
from qgraph.text import path_of, text
from qgraph.types import type_of
from qgraph.verify import check_graph
from qgraph.views import Elementwise, Linear, const_value
from tests.bench.driver import RULES, synthetic

ATEN = torch.ops.aten
X, Y = torch.linspace(-1, 1, 6).view(2, 3), torch.linspace(2, 5, 6).view(2, 3)


class Function(torch.nn.Module):
    """A module around a function, with a few stored tensors."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn
        self.register_buffer("w", torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]]))
        self.register_buffer("b", torch.tensor([0.25, -4.0]))

    def forward(self, *args):
        return self.fn(self, *args)


def start(fn, *args):
    return from_torch(Function(fn), *args)


@rule(Op(Elementwise, kind="mul", inputs=Inputs(Var("x"), 1.0)))
def drop_mul_by_one(m, rw):
    return m.x


@rule(Op(ATEN.add.Tensor, self=Op(ATEN.mul.Tensor, self=Var("x"), other=Var("y"), single_use=True), other=Var("z")))
def fuse(m, rw):
    return rw.call(ATEN.addcmul.default, m.z, m.x, m.y)


@rule(Op(Linear, "linear", x=Var("x"), weight=Const("w"), bias=Const("b"), out_axis=-2))
def split_linear(m, rw):
    """x w^T + b with the weight stored transposed."""
    product = rw.call(ATEN.matmul.default, m.x, rw.const(m.w, lambda w: w.T, name="w_t"))
    return rw.call(ATEN.add.Tensor, product, m.b)


def run(*rules):
    return lambda gm: apply(gm, rules)


def test_a_rewrite_replaces_the_root_and_removes_what_dies_with_it():
    check(run(fuse), start(lambda m, x, y: (x * y + (x - y), y * 2.0), X, Y), (X, Y), """
        %0: f32[2,3] = aten.sub.Tensor(%args_0, %args_1)
        %1: f32[2,3] = aten.addcmul(%0, %args_0, %args_1)
        %2: f32[2,3] = aten.mul.Tensor(%args_1, 2.0)
        return %1, %2
    """)  # fmt: skip


def test_an_existing_node_may_be_the_replacement():
    check(run(drop_mul_by_one), start(lambda m, x: (x * 1.0 * 1.0 + 1.0, 1.0 * x), X), (X,), """
        %0: f32[2,3] = aten.add.Tensor(%args_0, 1.0)
        return %0, %args_0
    """)  # fmt: skip


def test_a_new_constant_is_stored_under_its_hint_and_the_old_one_goes():
    gm = check(run(split_linear), start(lambda m, x: torch.nn.functional.linear(x, m.w, m.b), X), (X,), """
        %0: f32[2,2] = aten.matmul(%args_0, @w_t)
        %1: f32[2,2] = aten.add.Tensor(%0, @b)
        return %1
    """)  # fmt: skip
    assert sorted(gm.state_dict()) == ["b", "w_t"]


def test_the_same_function_of_a_shared_constant_is_stored_once():
    linear = torch.nn.functional.linear
    gm = check(run(split_linear), start(lambda m, x: linear(linear(x, m.w, m.b)[:, :1] + x, m.w, m.b), X), (X,), None)
    assert sorted(gm.state_dict()) == ["b", "w_t"]


def test_a_constant_that_something_else_reads_stays():
    gm = check(run(split_linear), start(lambda m, x: torch.nn.functional.linear(x, m.w, m.b) + m.w.sum(), X), (X,), None)
    assert sorted(gm.state_dict()) == ["b", "w", "w_t"]


def test_constants_of_one_hint_get_names_of_their_own():
    @rule(Op(ATEN.add.Tensor, self=Var("x"), other=Var("y")))
    def sub(m, rw):
        return rw.call(ATEN.sub.Tensor, m.x, rw.const(-m_value(m), name="0.negated"))

    def m_value(m):
        return torch.tensor(float(m.y))

    check(run(sub), start(lambda m, x: x + 1.0 + 2.0, X), (X,), """
        %0: f32[2,3] = aten.sub.Tensor(%args_0, @c0_negated)
        %1: f32[2,3] = aten.sub.Tensor(%0, @c0_negated_1)
        return %1
    """)  # fmt: skip


def test_new_nodes_carry_type_origin_and_the_rule_that_made_them():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 4)

        def forward(self, x):
            return self.head(x)

    gm, _ = from_torch(Net(), X)
    apply(gm, [split_linear])
    new = [n for n in gm.graph.nodes if n.target in (ATEN.matmul.default, ATEN.add.Tensor)]
    assert [path_of(n) for n in new] == ["head", "head"]
    assert [n.meta["from"] for n in new] == ["split_linear"] * 2
    assert [str(type_of(n)) for n in new] == ["f32[2,4]"] * 2


def test_origin_chooses_whose_path_a_new_node_carries():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.tail = torch.nn.Linear(3, 4), torch.nn.ReLU()

        def forward(self, x):
            return self.tail(self.head(x))

    @rule(Op(ATEN.relu.default, self=Op(ATEN.linear.default, "linear", input=Var("x"), weight=Var("w"), bias=Var("b"))))
    def clamp(m, rw):
        product = rw.call(ATEN.linear.default, m.x, m.w, m.b, origin=m.linear)
        return rw.call(ATEN.clamp_min.default, product, 0)

    gm, _ = from_torch(Net(), X)
    apply(gm, [clamp])
    assert [path_of(n) for n in gm.graph.nodes if n.op == "call_function"] == ["head", "tail"]


def test_onnx_nodes_keep_their_name_and_infer_types_from_declared_shapes():
    gm, _ = from_onnx("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,3] x) => (float[2,2] y) <float[2,3] w = {1,2,3,4,5,6}, float[2] b = {7,8}> { [head] y = Gemm <transB = 1> (x, w, b) }
    """, X)  # fmt: skip
    assert apply(gm, [split_linear]).count == 1
    product = next(n for n in gm.graph.nodes if n.target is ATEN.matmul.default)
    assert (path_of(product), str(type_of(product)), "val" in product.meta) == ("head", "f32[2,2]", False)
    check_graph(gm)


def test_a_new_onnx_op_takes_the_type_of_what_it_replaces():
    @rule(Op("::Neg", X=Var("x")))
    def to_abs(m, rw):
        return rw.call(op("Abs", version=21), m.x)

    gm, _ = from_onnx("""
        <ir_version: 10, opset_import: ["": 21]> g (float[N,3] x) => (float[N,3] y) { y = Neg (x) }
    """, X)  # fmt: skip
    apply(gm, [to_abs])
    assert text(gm) == "%0: f32[N,3] = onnx.Abs(%x)\nreturn %0"


def test_declines_are_kept_with_rule_node_and_reason():
    @rule(Op(Linear, x=Var("x"), bias=Var("bias")))
    def refuse(m, rw):
        rw.call(ATEN.relu.default, m.x)  # made and then not wanted
        rw.decline("the bias is in the way") if m.bias is not None else rw.const(m.x)

    gm, _ = start(lambda m, x: torch.nn.functional.linear(x, m.w, m.b) + torch.nn.functional.linear(x * 2, m.w), X)
    before = text(gm)
    applied = apply(gm, [refuse])
    assert applied.count == 0 and text(gm) == before
    assert applied.declines == (
        Decline("refuse", "linear", "linear", "the bias is in the way"),
        Decline("refuse", "linear_1", "linear_1", "%mul is not a constant"),
    )
    assert str(applied.declines[0]) == "refuse declined at linear: the bias is in the way"


def test_a_rule_that_builds_what_does_not_fit_declines():
    @rule(Op(ATEN.relu.default, self=Var("x")))
    def transpose(m, rw):
        return rw.call(ATEN.t.default, m.x)

    @rule(Op(ATEN.relu.default, self=Var("x")))
    def mismatch(m, rw):
        return rw.call(ATEN.mm.default, m.x, m.x)

    gm, _ = start(lambda m, x: torch.relu(x), X)
    applied = apply(gm, [transpose, mismatch])
    assert applied.count == 0
    assert applied.declines[0].reason == "the replacement is f32[3,2], not f32[2,3]"
    assert applied.declines[1].reason.startswith("aten.mm.default does not take these operands: ")


def test_returning_none_changes_nothing_and_leaves_no_nodes_behind():
    @rule(Op(ATEN.relu.default, self=Var("x")))
    def undecided(m, rw):
        rw.call(ATEN.neg.default, rw.const(torch.ones(3)))

    gm, _ = start(lambda m, x: torch.relu(x), X)
    before = text(gm)
    assert apply(gm, [undecided]).count == 0
    assert text(gm) == before


def test_a_refusal_after_building_does_not_start_the_search_again():
    calls = []

    @rule(Op(ATEN.relu.default, self=Op(ATEN.neg.default, "neg")))
    def undecided(m, rw):
        calls.append(rw.call(ATEN.abs.default, m.neg))
        rw.decline("not after all")

    gm, _ = start(lambda m, x: torch.relu(-x), X)  # the neg has two readers while the rule builds, then one again
    assert apply(gm, [undecided]).attempts == len(calls) == 1


def test_a_tuple_for_a_node_with_one_output_is_an_error_that_names_the_rule():
    @rule(Op(ATEN.relu.default, self=Var("x")))
    def pair(m, rw):
        return (m.x, m.x)

    with pytest.raises(TypeError, match="pair returns 2 values for %relu, which has one"):
        apply(start(lambda m, x: torch.relu(x), X)[0], [pair])


def test_a_reader_is_looked_at_again_when_its_operand_becomes_a_constant():
    @rule(Op(ATEN.mul.Tensor, self=Var("x"), other=Const("c")))
    def scale(m, rw):
        return rw.call(ATEN.mul.Scalar, m.x, const_value(m.c).item())

    @rule(Op(ATEN.neg.default, self=Const("c"), single_use=True))
    def fold(m, rw):
        return rw.const(m.c, torch.neg, name="folded")

    @rule(Op(ATEN.sub.Tensor, self=Var("x")))
    def drop_sub(m, rw):
        return m.x

    def fn(m, x):
        negated = -m.b[0]  # read twice until drop_sub has run, after the mul was looked at
        return x * negated, x - negated

    gm, _ = start(fn, X)
    fold_select = Rule("fold_select", Op(ATEN.select.int, self=Const("c")), lambda m, rw: rw.const(m.c, lambda c: c[0], name="first"))
    assert apply(gm, [fold_select, scale, fold, drop_sub]).count == 4
    assert text(gm) == "%0: f32[2,3] = aten.mul.Scalar(%args_0, -0.25)\nreturn %0, %args_0"


def test_several_outputs_are_replaced_one_by_one():
    @rule(Op(ATEN.split.Tensor, self=Var("x"), split_size=1))
    def slices(m, rw):
        return tuple(rw.call(ATEN.slice.Tensor, m.x, 0, i, i + 1) for i in range(2))

    def fn(m, x):
        first, second = torch.split(x, 1)
        return second - first * 2.0

    check(run(slices), start(fn, X), (X,), """
        %0: f32[1,3] = aten.slice.Tensor(%args_0, 0, 0, 1)
        %1: f32[1,3] = aten.slice.Tensor(%args_0, 0, 1, 2)
        %2: f32[1,3] = aten.mul.Tensor(%0, 2.0)
        %3: f32[1,3] = aten.sub.Tensor(%1, %2)
        return %3
    """)  # fmt: skip


def test_an_output_that_is_read_needs_a_replacement():
    @rule(Op(ATEN.split.Tensor, self=Var("x")))
    def half(m, rw):
        return (rw.call(ATEN.slice.Tensor, m.x, 0, 0, 1), None)

    gm, _ = start(lambda m, x: torch.split(x, 1)[1], X)
    with pytest.raises(VerificationError, match=r"output 1 of %split.* is still read"):
        apply(gm, [half])


def test_a_tuple_read_as_a_whole_becomes_a_tuple_of_the_new_nodes():
    graph = Graph()
    x = graph.placeholder("x")
    pair = graph.call_function(ATEN.aminmax.default, (x,))
    graph.output(pair)
    gm = GraphModule({}, graph)

    @rule(Op(ATEN.aminmax.default, self=Var("x")))
    def apart(m, rw):
        return rw.call(ATEN.amin.default, m.x), rw.call(ATEN.amax.default, m.x)

    assert apply(gm, [apart]).count == 1
    assert text(gm).splitlines()[-1] == "return %0, %1"
    torch.testing.assert_close(gm(X), (torch.tensor(-1.0), torch.tensor(1.0)))


class Branches(torch.nn.Module):
    def forward(self, flag, x):
        return torch.cond(flag, lambda x: x * 1.0 + 2.0, lambda x: x * 1.0 * 3.0, (x,))


def test_bodies_of_control_flow_are_rewritten_too():
    flag = torch.tensor(False)
    gm = check(run(drop_mul_by_one), from_torch(Branches(), flag, X), (flag, X), None)
    bodies = list(graph_modules(gm))[1:]
    assert len(bodies) == 2
    assert [sum(n.target is ATEN.mul.Tensor for n in b.graph.nodes) for b in bodies] == [0, 1]


def test_bodies_of_onnx_control_flow_are_rewritten_too():
    flag = torch.tensor(True)
    gm = check(run(drop_mul_by_one), from_onnx("""
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,3] x, bool c) => (float[2,3] y) <float[3] w = {1, 2, 3}> {
            h = Add(x, w)
            y = If (c) <
                then_branch = t () => (float[2,3] a) <float one = {1.0}> { k = Mul(h, one) a = Add(k, w) },
                else_branch = e () => (float[2,3] b) { b = Relu(h) }>
        }
    """, X, flag), (X, flag), None)  # fmt: skip
    assert "onnx.Mul" not in text(gm) and "onnx.Add" in text(gm)


def test_functions_of_an_onnx_file_survive_a_rewrite_of_their_calls_and_a_copy():
    gm, want = from_onnx("""
        <ir_version: 10, opset_import: ["": 21, "my": 1]>
        g (float[2,3] x) => (float[2,3] y) { h = my.twice (x)  y = Neg (h) }
        <domain: "my", opset_import: ["": 21]> twice (a) => (b) { b = Add (a, a) }
    """, X)  # fmt: skip

    @rule(Op("my::twice", "call"))
    def double(m, rw):
        return rw.call(ATEN.mul.Scalar, m.call.args[0], 2.0, like=m.call)

    for graph in (copy_graph(gm), gm):
        assert apply(graph, [double]).count == 1
        check_graph(graph)
        again = copy_graph(graph)
        check_graph(again)
        torch.testing.assert_close(again(X)[0], want[0])
        assert "function_twice" in dict(again.named_children())


def test_a_copy_shares_tensors_but_no_nodes_and_keeps_shared_bodies_shared():
    flag = torch.tensor(True)
    gm, _ = from_torch(Branches(), flag, X)
    new = copy_graph(gm)
    assert text(new) == text(gm)
    assert apply(new, [drop_mul_by_one]).count == 2
    assert text(new) != text(gm)
    assert len(list(graph_modules(new))) == len(list(graph_modules(gm))) == 3


def test_impure_random_and_unknown_nodes_survive_when_nothing_reads_them():
    def noisy(a):
        return a

    graph = Graph()
    x = graph.placeholder("x")
    calls = {
        "pure": graph.call_function(ATEN.neg.default, (x,)),
        "random": graph.call_function(ATEN.rand_like.default, (x,)),
        "writes": graph.call_function(ATEN.add_.Tensor, (x, 1.0)),
        "asserts": graph.call_function(ATEN._assert_async.default, (x,)),
        "unknown": graph.call_function(noisy, (x,)),
        "operator": graph.call_function(operator.add, (1, 2)),
        "in_place_operator": graph.call_function(operator.iadd, (x, 2)),
        "method": graph.call_method("add_", (x, 1)),
    }
    assert {k for k, n in calls.items() if is_pure(n)} == {"pure", "operator"}
    assert not is_pure(x)


def test_erase_stops_at_nodes_that_have_other_users_or_effects():
    graph = Graph()
    x = graph.placeholder("x")
    shared = graph.call_function(ATEN.neg.default, (x,))
    noise = graph.call_function(ATEN.rand_like.default, (x,))
    dying = graph.call_function(ATEN.add.Tensor, (shared, noise))
    last = graph.call_function(ATEN.relu.default, (dying,))
    graph.output(shared)
    removed, touched = erase(last)
    assert removed == [last, dying]
    assert set(touched) == {shared, noise}
    assert [n.op for n in graph.nodes] == ["placeholder", "call_function", "call_function", "output"]


def test_erase_reports_only_survivors_as_touched():
    graph = Graph()
    x = graph.placeholder("x")
    value = graph.call_function(ATEN.neg.default, (x,))
    left, right = (graph.call_function(t, (value,)) for t in (ATEN.abs.default, ATEN.relu.default))
    both = graph.call_function(ATEN.sub.Tensor, (left, right))
    removed, touched = erase(both)
    assert set(removed) == {value, left, right, both} and touched == [x]


def test_parameters_of_a_module_that_is_still_called_stay():
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.create_node("call_module", "fc", (x,))
    row = graph.call_function(ATEN.select.int, (graph.create_node("get_attr", "fc.weight"), 0, 1))
    graph.output((y, graph.call_function(ATEN.mul.Tensor, (x, row))))
    root = torch.nn.Module()
    root.fc = torch.nn.Linear(3, 2)
    gm = GraphModule(root, graph)
    keep_x = Rule("keep_x", Op(ATEN.mul.Tensor, self=Var("x"), other=Op(ATEN.select.int)), lambda m, rw: m.x)
    assert apply(gm, [keep_x]).count == 1
    assert gm(X)[0].shape == (2, 2)


def test_replace_works_alone():
    gm, _ = start(lambda m, x: torch.relu(-x), X)
    relu = next(n for n in gm.graph.nodes if n.target is ATEN.relu.default)
    replace(relu, next(n for n in gm.graph.nodes if n.op == "placeholder"))
    assert text(gm) == "return %args_0"


def test_what_a_rewrite_uncovers_is_rewritten_in_the_same_run():
    # drop_mul_by_one sits between the mul and the add that fuse needs, and the second reader of the product dies first.
    @rule(Op(ATEN.sub.Tensor, self=Var("x"), other=Op(ATEN.mul.Tensor)))
    def drop_sub(m, rw):
        return m.x

    def fn(m, x, y):
        product = x * y
        return product * 1.0 + y, y - product

    gm, _ = start(fn, X, Y)
    assert apply(gm, [fuse, drop_sub, drop_mul_by_one]).count == 3
    assert text(gm) == "%0: f32[2,3] = aten.addcmul(%args_1, %args_0, %args_1)\nreturn %0, %args_1"


def test_a_deep_pattern_is_looked_at_again_when_a_late_rewrite_completes_it():
    @rule(Op(ATEN.neg.default, self=Op(ATEN.neg.default, self=Op(ATEN.sigmoid.default, self=Var("x")))))
    def cancel(m, rw):
        return rw.call(ATEN.sigmoid.default, m.x)

    @rule(Op(ATEN.relu.default, self=Var("x")))
    def to_tanh(m, rw):
        return rw.call(ATEN.tanh.default, m.x)

    @rule(Op(ATEN.tanh.default, self=Var("x")))
    def to_sigmoid(m, rw):  # its turn comes after both negs were looked at
        return rw.call(ATEN.sigmoid.default, m.x)

    gm, _ = start(lambda m, x: torch.neg(torch.neg(torch.relu(x))), X)
    assert apply(gm, [cancel, to_tanh, to_sigmoid]).count == 3
    assert text(gm) == "%0: f32[2,3] = aten.sigmoid(%args_0)\nreturn %0"


def test_a_node_that_died_while_it_waited_is_not_visited():
    visited = []

    @rule(Op(ATEN.relu.default, self=Var("x")))
    def to_tanh(m, rw):
        return rw.call(ATEN.tanh.default, m.x)

    @rule(Op(ATEN.neg.default, self=Op(ATEN.tanh.default, self=Var("x"))))
    def absorb(m, rw):
        return rw.call(ATEN.sigmoid.default, m.x)

    def watch(target):
        return Rule("watch", Op(target, "node"), lambda m, rw: visited.append(m.node))

    gm, _ = start(lambda m, x: torch.neg(torch.relu(x)), X)
    assert apply(gm, [to_tanh, absorb, watch(ATEN.tanh.default)]).count == 2
    split = Rule("whole", Op(ATEN.split.Tensor, self=Var("x")), lambda m, rw: (m.x, m.x))
    gm, _ = start(lambda m, x: torch.split(x, 2)[0], X)
    assert apply(gm, [split, watch(operator.getitem)]).count == 1
    assert visited == []


def test_a_decline_is_forgotten_when_the_rule_applies_after_all():
    @rule(Op(ATEN.relu.default, "act", self=Var("x")))
    def shy(m, rw):
        if len(m.act.users) > 1:
            rw.decline("too many readers")
        return rw.call(ATEN.sigmoid.default, m.x)

    @rule(Op(ATEN.sub.Tensor, self=Var("x")))
    def drop_sub(m, rw):
        return m.x

    def fn(m, x):
        act = torch.relu(x)
        return -act, x - act

    assert [d.reason for d in apply(start(fn, X)[0], [shy]).declines] == ["too many readers"]
    applied = apply(start(fn, X)[0], [shy, drop_sub])
    assert (applied.count, applied.declines) == (2, ())


def test_rules_that_undo_each_other_end_with_an_error_that_names_one():
    @rule(Op(ATEN.relu.default, self=Var("x")))
    def there(m, rw):
        return rw.call(ATEN.neg.default, m.x, like=m.root)

    @rule(Op(ATEN.neg.default, self=Var("x")))
    def back(m, rw):
        return rw.call(ATEN.relu.default, m.x, like=m.root)

    gm, _ = start(lambda m, x: torch.relu(x), X)
    with pytest.raises(VerificationError, match=r"rules do not come to an end: \d+ rewrites, the last by (there|back) at "):
        apply(gm, [there, back])
    check_graph(gm)


def test_the_bisect_limit_stops_after_n_rewrites_of_the_process(monkeypatch, caplog):
    monkeypatch.setattr(rewrite, "BISECTION", rewrite.Bisection())
    monkeypatch.setenv("QGRAPH_BISECT_LIMIT", "3")
    caplog.set_level(logging.INFO, "qgraph.rewrite")
    fn = lambda m, x: torch.relu(x * 1.0) * 1.0
    counts = [apply(start(fn, X)[0], [drop_mul_by_one]).count for _ in range(3)]
    assert counts == [2, 1, 0]
    assert rewrite.BISECTION.seen == 6
    lines = [r.getMessage() for r in caplog.records]
    assert lines[2] == "bisect: doing rewrite 3: drop_mul_by_one at mul"
    assert lines[3] == "bisect: skipping rewrite 4: drop_mul_by_one at mul_1"


def test_a_bisect_limit_that_is_no_number_is_an_error(monkeypatch):
    monkeypatch.setenv("QGRAPH_BISECT_LIMIT", "many")
    with pytest.raises(QGraphError, match="QGRAPH_BISECT_LIMIT must be a number, got 'many'"):
        apply(start(lambda m, x: x * 1.0, X)[0], [drop_mul_by_one])


def test_a_rule_without_a_root_is_an_error_where_it_is_written():
    with pytest.raises(TypeError, match="a rule's pattern starts with an Op"):
        Rule("nowhere", Var("x"), lambda m, rw: None)


@pytest.mark.parametrize("name", ["root", "nodes", "values", "get"])
def test_a_rule_cannot_capture_under_a_name_that_every_match_has(name):
    with pytest.raises(TypeError, match=f"rule taken captures '{name}', which every match has already"):
        Rule("taken", Op(ATEN.relu.default, self=Var(name)), lambda m, rw: None)


def test_driver_work_grows_with_the_graph_and_not_faster():
    attempts = {}
    for nodes in (200, 2000):
        gm = synthetic(nodes)
        applied = apply(gm, RULES[:1])
        assert applied.count == nodes // 5
        attempts[nodes] = applied.attempts
    assert attempts[2000] <= 10 * attempts[200] + 10
    assert attempts[200] <= 2 * 200


def test_a_constant_with_very_many_users_does_not_multiply_the_work():
    graph, root = Graph(), torch.nn.Module()
    root.register_buffer("w", torch.tensor([2.0, 3.0, 4.0]))
    x, w = graph.placeholder("x"), graph.create_node("get_attr", "w")
    for _ in range(500):
        product = graph.call_function(ATEN.mul.Tensor, (x, w))
        x = graph.call_function(ATEN.add.Tensor, (product, x))
    graph.output(x)
    gm = GraphModule(root, graph)
    applied = apply(gm, [fuse])
    assert applied.count == 500
    assert applied.attempts < 1500
    assert const_value(next(n for n in gm.graph.nodes if n.op == "get_attr")) is not None


def test_insertion_keeps_the_graph_in_order():
    gm, _ = start(lambda m, x, y: torch.relu(x * y + (x - y)) * (x * y + y), X, Y)
    apply(gm, [fuse])
    seen: set[Node] = set()
    for node in gm.graph.nodes:
        assert seen.issuperset(node.all_input_nodes)
        seen.add(node)
