"""sink_constants: weights of branches that are stored outside of them."""

import onnx
import torch

from qgraph.onnx_io import from_onnx, to_proto
from qgraph.passes import SinkConstants
from qgraph.pipeline import Context
from qgraph.rewrite import graph_modules

X = torch.linspace(-2, 3, 6).view(2, 3)


def model() -> onnx.ModelProto:
    return onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]> g (float[2,3] x, bool c) => (float[2,3] y, float[2,3] z)
        <float[3] own = {1, 2, 3}, float[3] deep = {5, 6, 7}, float[3] both = {-1, 4, 2}, float[3] outer = {8, 0, 1}> {
        y = If (c) <then_branch = t () => (float[2,3] a) { i = Mul (x, own) j = Add (i, both) a = Mul (j, outer) },
                    else_branch = e () => (float[2,3] b) { b = If (c) <then_branch = p () => (float[2,3] d) { d = Neg (x) },
                        else_branch = q () => (float[2,3] f) { k = Mul (x, deep) f = Add (k, both) }> }>
        z = Add (x, outer) }""")  # fmt: skip


def test_constants_of_one_body_move_into_it_and_shared_ones_stay():
    gm = from_onnx(model())
    want = [gm(X, torch.tensor(c)) for c in (True, False)]
    assert SinkConstants().run(gm, Context()) == 3  # own once, deep twice
    for c, expected in zip((True, False), want, strict=True):
        for got, value in zip(gm(X, torch.tensor(c)), expected, strict=True):
            assert torch.equal(got, value)
    stored = [
        sorted(t for n in part.graph.nodes if n.op == "get_attr" and "branch" not in (t := str(n.target))) for part in graph_modules(gm)
    ]
    assert stored == [["both", "outer"], ["own"], [], [], ["deep"]]
    proto = to_proto(gm)
    onnx.checker.check_model(proto, full_check=True)
    assert {i.name for i in proto.graph.initializer} == {"both", "outer"}
    assert SinkConstants().run(gm, Context()) == 0
