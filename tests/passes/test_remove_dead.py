"""Dead code and dead data go; what may have an effect stays."""

import onnx
import torch
from torch import nn

from qgraph.observe import observer
from qgraph.onnx_io import from_onnx as load
from qgraph.onnx_io import to_proto
from qgraph.passes import RemoveDead
from qgraph.pipeline import Context
from qgraph.testing import check, from_onnx, from_torch
from qgraph.types import QSpec

X = torch.linspace(-2, 3, 6)


def ops(gm):
    return [n.target.op_type for n in gm.graph.nodes if n.op == "call_function"]


def test_dead_onnx_nodes_and_their_constants_go():
    source = """<ir_version: 9, opset_import: ["": 20]> g (float[6] x) => (float[6] y) <float c = {2}, float d = {3}, float unused = {4}> {
        a = Mul (x, c) b = Exp (a) p, q = Split <num_outputs = 2> (b) y = Add (x, d) }"""
    gm = check(RemoveDead(), from_onnx(source, X), (X,), "%0: f32[6] = onnx.Add(%x, @d)\nreturn %0")
    assert [name for name, _ in gm.named_buffers()] == ["d"]
    assert [i.name for i in to_proto(gm).graph.initializer] == ["d"]


def test_one_dead_output_of_two_keeps_its_node():
    source = """<ir_version: 9, opset_import: ["": 20]> g (float[6] x) => (float[3] p) { p, q = Split <num_outputs = 2> (x) }"""
    gm = check(RemoveDead(), from_onnx(source, X), (X,), None)
    assert [getattr(n.target, "op_type", "getitem") for n in gm.graph.nodes if n.op == "call_function"] == ["Split", "getitem"]


def test_dead_torch_nodes_parameters_and_submodules_go():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.dead = nn.Linear(6, 2), nn.Sequential(nn.Linear(6, 3), nn.ReLU())
            self.register_buffer("spare", torch.ones(2))

        def forward(self, x):
            self.dead(x)
            return self.used(x)

    gm = check(RemoveDead(), from_torch(Net(), X), (X,), "%0: f32[2] = aten.linear(%x, @used.weight, @used.bias)\nreturn %0")
    assert {name for name, _ in gm.named_parameters()} == {"used.weight", "used.bias"} and not list(gm.named_buffers())


def test_observers_random_numbers_and_unknown_ops_stay():
    gm = load(onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20, "my": 1]> g (float[6] x) => (float[6] y) {
        r = RandomUniformLike (x) u = my.Log (x) y = Neg (x) }"""))  # fmt: skip
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.add_submodule("watch", observer("minmax", QSpec()))
        gm.graph.call_module("watch", (next(iter(gm.graph.nodes)),))
    assert RemoveDead().run(gm, Context()) == 0
    assert ops(gm) == ["RandomUniformLike", "Log", "Neg"] and hasattr(gm, "watch")


def test_branches_are_cleaned_too():
    gm = load(onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]> g (float[6] x, bool c) => (float[6] y) {
        y = If (c) <then_branch = t () => (float[6] a) <float u = {1}, float v = {2}> { k = Mul (x, u) a = Add (x, v) },
                    else_branch = e () => (float[6] b) { b = Neg (x) }> }"""))  # fmt: skip
    assert RemoveDead().run(gm, Context()) == 2
    assert torch.equal(gm(X, torch.tensor(True))[0], X + 2)


def test_functions_and_strings_of_a_file_survive():
    gm = load(onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20, "my": 1]> g (float[6] x) => (float[6] y, string[1] s) <string[1] w = {"a"}, string[1] v = {"b"}> {
        y = my.Twice (x) s = Identity (w) }
        <domain: "my", opset_import: ["": 20]> Twice (a) => (b) { b = Add (a, a) }
        <domain: "my", opset_import: ["": 20]> Never (a) => (b) { b = Add (a, a) }"""))  # fmt: skip
    assert RemoveDead().run(gm, Context()) == 1
    proto = to_proto(gm)
    onnx.checker.check_model(proto)
    assert [f.name for f in proto.functions] == ["Twice", "Never"] and [i.name for i in proto.graph.initializer] == ["w"]
