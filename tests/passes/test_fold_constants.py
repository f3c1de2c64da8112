"""What is computed ahead, and what is not."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qgraph.onnx_io import from_onnx as load
from qgraph.passes import FoldConstants
from qgraph.pipeline import Context
from qgraph.testing import check, from_onnx, from_torch
from qgraph.text import text

X = torch.linspace(-2, 3, 12).reshape(3, 4)


def from_text(body, *args, inputs="float[3,4] x", outputs="float[3,4] y", constants=""):
    return from_onnx(f'<ir_version: 10, opset_import: ["": 21]> g ({inputs}) => ({outputs}) <{constants}> {{ {body} }}', *args)


def declines(gm, fold=None):
    ctx = Context()
    (fold or FoldConstants()).run(gm, ctx)
    return [d.reason for d in ctx.declines]


def test_a_chain_of_onnx_constants_becomes_one_and_leaves_nothing_behind():
    start = from_text("t = Transpose (w) s = Mul (t, t) y = Add (x, s)", X, constants="float[4,1] w = {1, -2, 3, 0.5}")
    gm = check(FoldConstants(), start, (X,), """
        %0: f32[3,4] = onnx.Add(%x, @mul)
        return %0
    """)  # fmt: skip
    assert list(dict(gm.named_buffers())) == ["mul"]
    assert gm.mul.tolist() == [[1, 4, 9, 0.25]]


def test_torch_parameters_fold_without_sharing_memory():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.arange(12.0).reshape(4, 3))

        def forward(self, x):
            return x + self.w.t().exp(), self.w.view(12)

    start = from_torch(Net(), X)
    gm = check(FoldConstants(), start, (X,), None)
    assert text(gm).count("aten.") == 1


def test_outputs_of_a_split_fold_one_by_one():
    start = from_text("a, b = Split <num_outputs = 2> (w) y = Add (x, b)", X, constants="float[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}")
    assert text(check(FoldConstants(), start, (X,), None)).count("onnx.") == 1


def test_dequantized_weights_stay_whole():
    body = "w = DequantizeLinear (q, s, z) t = Transpose (w) y = MatMul (x, t)"
    constants = "int8[5,4] q = {1,2,3,4,5,6,7,8,9,10,-1,-2,-3,-4,-5,-6,-7,-8,-9,0}, float s = {0.5}, int8 z = {3}"
    gm = check(FoldConstants(), from_text(body, X, outputs="float[3,5] y", constants=constants), (X,), None)
    assert [n.target.op_type for n in gm.graph.nodes if n.op == "call_function"] == ["DequantizeLinear", "Transpose", "MatMul"]


def test_random_numbers_are_drawn_at_run_time():
    gm = load(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> g (float[3] x) => (float[3] y) <float[3] c = {0.5, 0.5, 0.5}> {
        r = RandomUniformLike (c) y = Add (x, r) }"""))  # fmt: skip
    assert not FoldConstants()(gm).modified


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("z = Expand (c, n) y = Add (x, z)", "float c = {2}, int64[2] n = {3000, 4000}"),
        ("z = ConstantOfShape (n) y = Add (x, z)", "int64[2] n = {3000, 4000}"),
    ],
)
def test_results_that_would_make_the_model_grow_are_not_made(body, constants):
    gm, _ = from_text(body, torch.ones(1, 4000), inputs="float[1,4000] x", outputs="float[3000,4000] y", constants=constants)
    assert declines(gm) == ["it would add 48000000 bytes"]
    assert declines(gm, FoldConstants(limit=1 << 30)) == []
    assert text(gm).count("onnx.") == 1


def test_a_table_that_is_read_elsewhere_is_not_stored_a_second_time():
    table = np.arange(600_000, dtype=np.float32).reshape(1000, 600)
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> g (int64[2] i) => (float[2,1000] y) {
        e = Gather (w, i) t = Transpose (w) y = MatMul (e, t) }""")  # fmt: skip
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "w"))
    assert declines(load(onnx.shape_inference.infer_shapes(proto))) == ["it would add 2400000 bytes"]


def test_shapes_of_known_dimensions_are_numbers():
    body = "s = Shape (h) a = Slice (s, one, two) k = Squeeze (a) b = Gather (s, last) c = Concat <axis = 0> (a, b, m) z = Reshape (h, c) y = Relu (z)"
    constants = "int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {-1}, int64[1] m = {-1}"
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21]> g (float[N,4,3] x) => (float[4,3,N] y) <{constants}> {{ h = Neg (x) {body} }}'
    )
    x = torch.randn(2, 4, 3)
    gm = check(FoldConstants(), from_onnx(proto, x), (x,), """
        %0: f32[N,4,3] = onnx.Neg(%x)
        %1: f32[unk__0,unk__1,unk__2] = onnx.Reshape(%0, @concat)
        %2: f32[4,3,N] = onnx.Relu(%1)
        return %2
    """)  # fmt: skip
    assert gm.concat.tolist() == [4, 3, -1]


def test_shapes_that_vary_stay():
    gm = load(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        g (float[N,4] x) => (int64[2] y, int64[1] four, int64 n) <int64 zero = {0}> {
            y = Shape (x) four = Shape <start = 1> (x) n = Gather (y, zero) }"""))  # fmt: skip
    FoldConstants()(gm)
    assert [n.target.op_type for n in gm.graph.nodes if n.op == "call_function"] == ["Shape", "Gather"]
    assert [v.tolist() for v in gm(torch.ones(5, 4))] == [[5, 4], [4], 5]


def test_branches_fold_too_but_what_they_capture_does_not():
    source = """<ir_version: 10, opset_import: ["": 21]> g (float[3,4] x, bool c) => (float[3,4] y) {
        y = If (c) <then_branch = t () => (float[3,4] a) <float[4] w = {1, 2, 3, 4}> { k = Neg (w) a = Add (x, k) },
                    else_branch = e () => (float[3,4] b) { b = Neg (x) }> }"""
    gm = load(onnx.parser.parse_model(source))
    assert FoldConstants().run(gm, Context()) == 1
    assert torch.equal(gm(X, torch.tensor(True))[0], X - torch.arange(1.0, 5))


def test_an_op_of_a_foreign_domain_is_not_run():
    gm = load(onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21, "my": 1]> g (float[3] x) => (float[3] y) <float[3] c = {1, 2, 3}> {
        d = my.Thing (c) y = Add (x, d) }"""))  # fmt: skip
    assert not FoldConstants()(gm).modified
