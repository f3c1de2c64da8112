"""Equal calls become one; calls that differ in type, sign, attribute, randomness or time stay apart."""

import pytest
import torch
from torch import nn

import qgraph
from qgraph.edit import graph_modules
from qgraph.passes import MergeEqual
from qgraph.testing import check, from_onnx, from_torch
from tests.passes.graphs import Fn, from_text, ops

X = torch.linspace(-4, 4, 24).reshape(2, 3, 4)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 5, 2)

    def forward(self, x):
        return torch.relu(self.conv(x)) + torch.relu(self.conv(x)).neg()


def test_a_layer_called_twice_on_one_value_is_called_once():
    check(MergeEqual(), from_torch(Twice(), X), (X,), """
        %0: f32[2,5,3] = aten.conv1d(%x, @conv.weight, @conv.bias)
        %1: f32[2,5,3] = aten.relu(%0)
        %2: f32[2,5,3] = aten.neg(%1)
        %3: f32[2,5,3] = aten.add.Tensor(%1, %2)
        return %3
    """)  # fmt: skip


def test_onnx_calls_with_equal_small_constants_are_one():
    constants = "float one = {1}, float uno = {1}, float[1] list = {1}"
    body = "a = Add (x, one) b = Add (x, uno) c = Add (x, list) d = Mul (a, b) y = Mul (d, c)"
    check(MergeEqual(), from_text(body, X, constants=constants), (X,), """
        %0: f32[2,3,4] = onnx.Add(%x, @one)
        %1: f32[2,3,4] = onnx.Add(%x, @list)
        %2: f32[2,3,4] = onnx.Mul(%0, %0)
        %3: f32[2,3,4] = onnx.Mul(%2, %1)
        return %3
    """)  # fmt: skip


def test_outputs_of_one_node_are_merged_with_those_of_its_equal():
    body = "a, b = Split <axis = 2, num_outputs = 2> (x) c, d = Split <axis = 2, num_outputs = 2> (x) e = Sub (a, d) y = Concat <axis = 2> (e, c)"
    gm = check(MergeEqual(), from_text(body, X), (X,), None)
    assert [n for n in ops_or_picks(gm) if n == "Split"] == ["Split"]


def ops_or_picks(gm):
    return [getattr(n.target, "op_type", "getitem") for n in gm.graph.nodes if n.op == "call_function"]


def test_two_outputs_of_the_model_may_be_one_value():
    gm = check(
        MergeEqual(),
        from_text("y = Neg (x) z = Neg (x)", X, outputs="float[2,3,4] y, float[2,3,4] z"),
        (X,),
        "%0: f32[2,3,4] = onnx.Neg(%x)\nreturn %0, %0",
    )
    assert [o.name for o in qgraph.to_onnx(gm).graph.outputs] == ["y", "z"]


@pytest.mark.parametrize(
    "body",
    [
        "a = RandomUniformLike (x) b = RandomUniformLike (x) c = Sub (a, b) y = Mul (c, zero)",
        "a = Div (x, zero) b = Div (x, minus) c = Equal (a, b) y = Cast <to = 1> (c)",
        "a = Softmax <axis = 1> (x) b = Softmax <axis = 2> (x) y = Sub (a, b)",
        "a, m = Dropout (x, half, yes) b, n = Dropout (x, half, yes) c = Sub (a, b) y = Mul (c, zero)",
    ],
)
def test_onnx_calls_that_differ_stay(body):
    gm, _ = from_text(body, X, constants="float zero = {0}, float minus = {-0.0}, float half = {0.5}, bool yes = {1}")
    before = qgraph.text(gm)
    assert MergeEqual().run(gm, qgraph.pipeline.Context()) == 0 and qgraph.text(gm) == before


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.rand_like(x) - torch.rand_like(x),
        lambda x: nn.functional.dropout(x, 0.5, True) - nn.functional.dropout(x, 0.5, True),
        lambda x: (x.int() + 1) * (x.int() + 1.0),
        lambda x: x.sum(1) * x.sum(1, keepdim=True).transpose(0, 1).sum(),
    ],
)
def test_torch_calls_that_differ_stay(fn):
    gm, _ = from_torch(Fn(fn), X)
    kept = [n.target for n in gm.graph.nodes if "to" not in str(n.target)]  # equal casts may go
    MergeEqual().run(gm, qgraph.pipeline.Context())
    assert [n.target for n in gm.graph.nodes if "to" not in str(n.target)] == kept


def test_parameters_that_train_are_not_equal_by_value():
    class Slopes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.PReLU(), nn.PReLU()

        def forward(self, x):
            return self.a(x) + 2 * self.b(x)

    gm = check(MergeEqual(), from_torch(Slopes(), X), (X,), None)
    assert sum("prelu" in str(n.target) for n in gm.graph.nodes) == 2


def test_a_graph_with_in_place_ops_stays():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    a, b = (graph.call_function(torch.ops.aten.clone.default, (x,)) for _ in range(2))
    graph.output(graph.call_function(torch.ops.aten.mul.Tensor, (graph.call_function(torch.ops.aten.add_.Tensor, (a, 1)), b)))
    gm = torch.fx.GraphModule(nn.Module(), graph)
    assert MergeEqual().run(gm, qgraph.pipeline.Context()) == 0
    torch.testing.assert_close(gm(X), (X + 1) * X)


def test_each_body_of_control_flow_is_merged_for_itself():
    gm, want = from_onnx(
        """<ir_version: 9, opset_import: ["": 20]> g (float[2,3,4] x, bool c) => (float[2,3,4] y) {
            n = Neg (x)
            y = If (c) <then_branch = t () => (float[2,3,4] t2) { t0 = Neg (x) t1 = Neg (x) t2 = Add (t0, t1) },
                        else_branch = e () => (float[2,3,4] e0) { e0 = Abs (x) }>
        }""",
        X, torch.tensor(True),
    )  # fmt: skip
    assert MergeEqual().run(gm, qgraph.pipeline.Context()) == 1
    assert sorted(name for body in graph_modules(gm) for name in ops(body)) == ["Abs", "Add", "If", "Neg", "Neg"]
    torch.testing.assert_close(list(gm(X, torch.tensor(True))), want)


def test_a_rule_may_name_either_of_two_merged_operations():
    model = from_text(
        "[first] a = MatMul (x, w) [second] b = MatMul (x, w) [sum] c = Add (a, b) [third] y = MatMul (c, w)",
        X, constants="float[4,4] w = {1,0,0,2,0,3,1,0,0,1,1,0,2,0,0,1}",
    )[0]  # fmt: skip
    for rule in ("first", "second"):
        recipe = qgraph.load_recipe("w8a8-dynamic", [f"rules.{rule}=null"])
        ledger = qgraph.prepare(qgraph.to_onnx(model), recipe=recipe).meta["qgraph"].ledger
        weights = {e.node: e.reason for e in ledger if e.role == "weight"}
        assert weights == {"first": f"rule '{rule}' leaves it in float", "third": "recipe w8a8-dynamic"}
