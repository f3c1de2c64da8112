"""Legality: each rule of the structure and of the qg dialect refuses its own wrong graph, and errors show the neighbourhood."""

import onnx
import pytest
import torch
from torch.fx import Graph, GraphModule

from qgraph.errors import VerificationError
from qgraph.ledger import State
from qgraph.legal import RULES
from qgraph.onnx_io import from_onnx
from qgraph.ops import Q
from qgraph.testing import from_torch
from qgraph.verify import check_graph, dialect_of, legal

ATEN = torch.ops.aten
X = torch.linspace(-1, 1, 6).view(2, 3)


def chain(length=30):
    """x -> neg -> neg ... -> output, and a stored tensor."""
    graph = Graph()
    x = graph.placeholder("x")
    for _ in range(length):
        x = graph.create_node("call_function", ATEN.neg.default, (x,), name="neg")
    graph.output((x,))
    gm = GraphModule({}, graph)
    gm.register_buffer("w", torch.ones(3))
    return gm


def calls(gm):
    return [n for n in gm.graph.nodes if n.op == "call_function"]


def problem(gm, **options):
    with pytest.raises(VerificationError) as caught:
        check_graph(gm, **options)
    return str(caught.value)


def test_captured_and_imported_graphs_are_legal():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)

        def forward(self, x, flag):
            a, b = torch.split(self.norm(self.fc(x)), 1)
            return {"sum": a + b, "cond": torch.cond(flag, torch.sin, torch.cos, (a,))}

    check_graph(from_torch(Net(), X, torch.tensor(True))[0], dialects=["aten", "higher_order"])
    text = "<ir_version: 10, opset_import: ['': 21]> g (float[2,3] x) => (float[2,3] y) { y = Relu (x) }".replace("'", '"')
    check_graph(from_onnx(onnx.parser.parse_model(text)), dialects=["onnx"])


def test_the_error_shows_the_node_and_ten_neighbours_on_either_side():
    gm = chain()
    nodes = calls(gm)
    nodes[15].args = (nodes[16],)
    lines = problem(gm, after="bad_pass").splitlines()
    assert lines[0] == "after bad_pass: %neg_15 at neg_15 reads %neg_16 before it is computed"
    assert len(lines) == 22
    assert [line for line in lines if line.startswith(">")] == ["> %neg_15: ? = aten.neg(%neg_16)"]
    assert lines[1] == "  %neg_5: ? = aten.neg(%neg_4)" and lines[-1] == "  %neg_25: ? = aten.neg(%neg_24)"


def test_a_value_of_another_graph_is_illegal():
    gm, other = chain(), chain()
    calls(gm)[3].args = (calls(other)[0],)
    assert "reads %neg, which belongs to another graph" in problem(gm)


def test_missing_stored_values_and_modules_are_illegal():
    gm = chain()
    with gm.graph.inserting_before(calls(gm)[0]), pytest.warns(UserWarning):
        gm.graph.get_attr("missing.weight")
    assert "reads 'missing.weight', which the module does not have" in problem(gm)
    gm = chain()
    with gm.graph.inserting_before(calls(gm)[0]):
        gm.graph.create_node("call_module", "w", (calls(gm)[0].args[0],))
    assert "calls 'w', which is no module" in problem(gm)


def test_inputs_come_first_and_one_output_last():
    gm = chain()
    with gm.graph.inserting_before(calls(gm)[4]):
        gm.graph.placeholder("late")
    assert "%late at late is an input after the first computed value" in problem(gm)
    gm = chain()
    gm.graph.erase_node(gm.graph.output_node())
    assert "the graph must end with its only output node" in problem(gm)


def test_a_nested_graph_that_nothing_reads_is_illegal():
    gm = chain()
    gm.add_module("body", chain(2))
    assert problem(gm) == "nested graph 'body' is read by no node"


def test_bodies_are_checked_too():
    class Net(torch.nn.Module):
        def forward(self, flag, x):
            return torch.cond(flag, lambda x: x + 1, lambda x: torch.relu(x) * 2, (x,))

    gm, _ = from_torch(Net(), torch.tensor(True), X)
    body = next(b for name, b in gm.named_children() if any(n.target is ATEN.relu.default for n in b.graph.nodes))
    relu = next(n for n in body.graph.nodes if n.target is ATEN.relu.default)
    relu.kwargs = {"inplace": True}
    first = problem(gm).splitlines()[0]
    assert first.startswith("%relu at relu (") and first.endswith("has an argument 'inplace' that aten.relu.default does not take there")


def test_inputs_and_outputs_of_the_model_must_survive():
    gm = chain()
    gm.meta["qgraph"] = State(source="torch", input_names=("x", "mask"), output_names=("y",))
    assert problem(gm) == "the graph has 1 inputs; the model has 2: x, mask"
    gm.meta["qgraph"] = State(source="torch", input_names=("x",), output_names=("y",))
    check_graph(gm)
    gm.graph.output_node().args = ((),)
    assert problem(gm) == "the graph has 0 outputs; the model has 1: y"


def test_calls_must_bind_their_schema():
    for args, kwargs, expected in (
        ((1, 2), {}, "has 2 arguments; aten.neg.default takes 1"),
        ((), {}, "lacks argument 'self' of aten.neg.default"),
        ((1,), {"self": 1}, "has an argument 'self' that aten.neg.default does not take there"),
    ):
        gm = chain()
        calls(gm)[5].args, calls(gm)[5].kwargs = args, kwargs
        assert expected in problem(gm)


@pytest.mark.parametrize(
    ("op", "inputs", "attrs", "expected"),
    [
        ("Concat", 2, {}, "lacks attribute 'axis' of Concat-21"),
        ("Concat", 2, {"axis": 0, "keep": 1}, "has an attribute 'keep' that Concat-21 does not know"),
        ("MatMul", 3, {}, "has 3 inputs; MatMul-21 takes 2 to 2"),
    ],
)
def test_onnx_nodes_made_by_rewrites_must_bind_their_schema(op, inputs, attrs, expected):
    from qgraph.onnx_ops import op as onnx_op

    gm = chain(2)
    last = calls(gm)[1]
    last.target, last.args, last.kwargs = onnx_op(op, version=21), (calls(gm)[0],) * inputs, attrs
    assert expected in problem(gm)


def test_a_node_of_another_dialect_is_illegal_unless_it_is_a_declared_barrier():
    gm = chain()
    assert [dialect_of(n) for n in gm.graph.nodes][:2] == ["structure", "aten"]
    assert "belongs to the aten dialect; legal here: onnx, qgraph, or a declared barrier" in problem(gm, dialects=["qgraph", "onnx"])
    for node in calls(gm):
        node.meta["barrier"] = "kept for the test"
    check_graph(gm, dialects=["qgraph", "onnx"])


def test_users_add_rules_for_their_own_targets(monkeypatch):
    monkeypatch.setattr("qgraph.legal.RULES", dict(RULES))

    @legal("aten", ATEN.neg.default)
    def no_double_negation(node):
        return "negates a negation" if node.args[0].target is ATEN.neg.default else None

    assert "%neg_1 at neg_1 negates a negation" in problem(chain())
    check_graph(chain(1))


def qg(target, **operands):
    """A graph of one qg call: x and q are inputs with the types of the given tensors, other tensors are stored."""
    gm, graph = GraphModule({}, Graph()), Graph()
    inputs = {k: graph.placeholder(k) for k in ("x", "q") if k in operands}
    for name, node in inputs.items():
        node.meta["val"] = operands[name]
    stored = {k: v for k, v in operands.items() if isinstance(v, torch.Tensor) and k not in inputs}
    for name, tensor in stored.items():
        gm.register_buffer(name, tensor)
    reads = {k: graph.create_node("get_attr", k) for k in stored}
    graph.output((graph.create_node("call_function", target, (), operands | inputs | reads),))
    gm.graph = graph
    return gm


QUANTIZE = dict(
    x=torch.zeros(2, 6), scale=torch.tensor(0.5), zero_point=torch.tensor(3, dtype=torch.int8), dtype="int8", axis=None, group=0
)
DEQUANTIZE = dict(
    q=torch.zeros(2, 6, dtype=torch.int8),
    scale=torch.full((2, 2), 0.5),
    zero_point=torch.ones(2, 2, dtype=torch.int8),
    dtype="int4",
    axis=1,
    group=3,
)
LINEAR = dict(
    x=torch.zeros(4, 6),
    weight=torch.ones(5, 6, dtype=torch.int8),
    scale=torch.full((5,), 0.5),
    zero_point=None,
    bias=torch.ones(5),
    dtype="int8",
)
INTEGER = dict(
    x=torch.zeros(4, 6, dtype=torch.uint8), x_scale=torch.tensor(0.5), x_zero_point=torch.tensor(7, dtype=torch.uint8), x_dtype="uint8",
    weight=torch.ones(5, 6, dtype=torch.int8), w_scale=torch.full((5,), 0.5), w_zero_point=None, w_dtype="int8", bias=torch.ones(5, dtype=torch.int32),
    y_scale=torch.tensor(0.25), y_zero_point=torch.tensor(9, dtype=torch.uint8), y_dtype="uint8",
)  # fmt: skip
CONV = dict(
    x=torch.zeros(1, 3, 8, 8), weight=torch.ones(5, 3, 2, 2, dtype=torch.int8), scale=torch.full((5,), 0.5), zero_point=None, bias=None, dtype="int8",
    stride=[1, 1], padding=[0, 0, 1, 1], dilation=[1, 1], groups=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "operands"),
    [
        (Q.quantize.default, QUANTIZE),
        (Q.quantize.default, QUANTIZE | dict(scale=torch.full((6,), 0.5), zero_point=None, axis=-1)),
        (Q.quantize.default, QUANTIZE | dict(scale=torch.full((2, 1), 0.5), zero_point=None, axis=-1, group=-1)),
        (Q.fake_quantize.default, QUANTIZE | dict(x=torch.zeros(2, 6).half())),
        (Q.dequantize.default, DEQUANTIZE),
        (Q.dynamic_quantize.default, dict(x=torch.zeros(2, 6), dtype="uint8", symmetric=False)),
        (Q.dequant_linear.default, LINEAR),
        (Q.dequant_linear.default, LINEAR | dict(scale=torch.full((5, 2), 0.5), group=3)),
        (Q.dequant_linear.default, LINEAR | dict(scale=torch.tensor(0.5), bias=None)),
        (Q.quantized_linear.default, INTEGER),
        (Q.dequant_conv.default, CONV),
    ],
)
def test_legal_qg_calls_pass(target, operands):
    check_graph(qg(target, **operands))


@pytest.mark.parametrize(
    ("target", "operands", "expected"),
    [
        (Q.quantize.default, QUANTIZE | dict(x=torch.zeros(2, 6, dtype=torch.int8)), "has x of type i8[2,6], not float"),
        (Q.quantize.default, QUANTIZE | dict(dtype="int17"), "has dtype 'int17'; integer types are int2 to int16 and uint2 to uint16"),
        (Q.quantize.default, QUANTIZE | dict(axis=2), "has an impossible granularity: axis 2 is not an axis of a tensor of rank 2"),
        (Q.quantize.default, QUANTIZE | dict(axis=0), "has scale of shape []; its granularity needs [2]"),
        (Q.quantize.default, QUANTIZE | dict(scale=torch.full((2,), 0.5)), "has scale of shape [2]; its granularity needs []"),
        (Q.quantize.default, QUANTIZE | dict(scale=torch.tensor(-0.5)), "has a scale that is not a positive number everywhere"),
        (Q.quantize.default, QUANTIZE | dict(scale=torch.tensor(torch.inf)), "has a scale that is not a positive number everywhere"),
        (Q.quantize.default, QUANTIZE | dict(scale=torch.tensor(2)), "has scale of type i64[], not float"),
        (Q.quantize.default, QUANTIZE | dict(zero_point=torch.tensor(3)), "has zero_point of type i64[]; int8 is stored as int8"),
        (Q.quantize.default, QUANTIZE | dict(zero_point=torch.ones(2, dtype=torch.int8)), "has zero_point of shape [2]; its granularity needs []"),
        (Q.dequantize.default, DEQUANTIZE | dict(dtype="uint4"), "has q of type i8[2,6]; uint4 is stored as uint8"),
        (Q.dequantize.default, DEQUANTIZE | dict(zero_point=torch.full((2, 2), 8, dtype=torch.int8)), "has zero_point in 8..8; int4 holds -8..7"),
        (Q.dequantize.default, DEQUANTIZE | dict(group=4, scale=torch.full((2, 1), 0.5)), "has scale of shape [2, 1]; its granularity needs [2, 2]"),
        (Q.dynamic_quantize.default, dict(x=torch.zeros(2, 6), dtype="uint8", symmetric=False, axis=0, group=-1), "has an impossible granularity"),
        (Q.dequant_linear.default, LINEAR | dict(bias=torch.ones(6)), "has bias of shape [6]; its granularity needs [5]"),
        (Q.dequant_linear.default, LINEAR | dict(scale=torch.full((6,), 0.5)), "has scale of shape [6]; its granularity needs [5]"),
        (Q.dequant_linear.default, LINEAR | dict(dtype="int4", weight=torch.full((5, 6), 9, dtype=torch.int8)), "has weight in 9..9; int4 holds -8..7"),
        (Q.quantized_linear.default, INTEGER | dict(x_scale=torch.ones(4)), "has x_scale of shape [4]; its granularity needs []"),
        (Q.quantized_linear.default, INTEGER | dict(x_dtype="int8"), "has x of type u8[4,6]; int8 is stored as int8"),
        (Q.quantized_linear.default, INTEGER | dict(w_scale=torch.ones(6)), "has w_scale of shape [6]; its granularity needs [5]"),
        (Q.quantized_linear.default, INTEGER | dict(y_dtype=None), "needs y_scale and y_dtype together, for integer outputs, or neither"),
        (Q.quantized_linear.default, INTEGER | dict(y_scale=torch.ones(5)), "has y_scale of shape [5]; its granularity needs []"),
        (Q.dequant_conv.default, CONV | dict(padding=[0, 0]), "has padding [0, 0]; a kernel of 2 axes needs 4 numbers"),
    ],
)  # fmt: skip
def test_illegal_qg_calls_are_refused_with_the_reason(target, operands, expected):
    assert expected in problem(qg(target, **operands))
