"""One spelling for each thing, on both dialects."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qgraph.onnx_io import from_onnx as load
from qgraph.onnx_io import to_proto
from qgraph.passes import Canonicalize, RemoveDead
from qgraph.pipeline import Context, Pipeline
from qgraph.testing import check, from_onnx, from_torch
from qgraph.text import text

X = torch.linspace(-4, 4, 24).reshape(2, 3, 4)


def from_text(body, *args, opset=20, inputs="float[2,3,4] x", outputs="float[2,3,4] y", constants=""):
    return from_onnx(f'<ir_version: 9, opset_import: ["": {opset}]> g ({inputs}) => ({outputs}) <{constants}> {{ {body} }}', *args)


def ops(gm):
    return [n.target.op_type for n in gm.graph.nodes if n.op == "call_function"]


def declines(gm):
    ctx = Context()
    Canonicalize().run(gm, ctx)
    return [d.reason for d in ctx.declines]


class Fn(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


def test_onnx_constants_become_stored_tensors_under_their_own_name():
    start = from_text(
        "c = Constant <value = float {2.5}> () d = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> () e = Mul (x, c) y = Add (e, d)", X
    )
    gm = check(Canonicalize(), start, (X,), """
        %0: f32[2,3,4] = onnx.Mul(%x, @constant)
        %1: f32[2,3,4] = onnx.Add(%0, @constant_1)
        return %1
    """)  # fmt: skip
    assert [i.name for i in to_proto(gm).graph.initializer] == ["c", "d"]


def test_a_constant_of_strings_stays_a_node():
    source = """<ir_version: 9, opset_import: ["": 20]> g (float[2] x) => (string[2] y, float[2] z) {
        c = Constant <value = string[2] {"a", "b"}> () y = Identity (c) z = Relu (x) }"""
    gm = load(onnx.parser.parse_model(source))
    Canonicalize()(gm)
    assert ops(gm) == ["Constant", "Relu"]
    assert gm(torch.ones(2))[0].tolist() == ["a", "b"]


def test_constants_in_the_branches_of_an_if_are_stored_there():
    body = """y = If (c) <then_branch = t () => (float[2,3,4] a) { k = Constant <value = float {2.0}> () i = Identity (x) a = Mul (i, k) },
                        else_branch = e () => (float[2,3,4] b) { b = Neg (x) }>"""
    flag = torch.tensor(True)
    gm = check(Canonicalize(), from_text(body, X, flag, inputs="float[2,3,4] x, bool c"), (X, flag), None)
    assert "Constant" not in text(gm) and "Identity" not in text(gm) and "Mul" in text(gm)


@pytest.mark.parametrize(
    "body",
    [
        "y = Identity (x)",
        "y = Dropout (x)",
        "y = Cast <to = 1> (x)",
        "y = Reshape (x, same)",
        "y = Transpose <perm = [0, 1, 2]> (x)",
        "y = Expand (x, same)",
        "y = Tile (x, ones)",
        "y = Pad (x, zeros)",
        "y = Add (x, zero)",
        "y = Add (zero, x)",
        "y = Sub (x, zero)",
        "y = Mul (x, one)",
        "y = Mul (one, x)",
        "y = Div (x, one)",
        "y = Pow (x, one)",
    ],
)
def test_what_does_nothing_goes_from_an_onnx_graph(body):
    constants = """float zero = {0}, float[1] one = {1}, float r = {0.5}, int64[3] same = {2, 3, 4}, int64[3] ones = {1, 1, 1},
                   int64[6] zeros = {0, 0, 0, 0, 0, 0}"""
    reading_n = body.replace("(x", "(n").replace(", x", ", n")
    start = from_text(f"n = Neg (x) {reading_n}", X, constants=constants)
    assert "onnx.Neg(%x)" in text(start[0]) and text(start[0]).count("(%0") + text(start[0]).count(", %0") == 1
    check(Canonicalize(), start, (X,), "%0: f32[2,3,4] = onnx.Neg(%x)\nreturn %0")


@pytest.mark.parametrize(
    "body",
    ["y = Sub (zero, x)", "y = Div (one, x)", "y = Mul (x, ones3)", "y = Transpose <perm = [0, 2, 1]> (x)", "y = Slice (x, s, e, a, s)"],
)
def test_what_only_looks_like_nothing_stays(body):
    constants = "float zero = {0}, float one = {1}, float[1,1,1,1] ones3 = {1}, int64[1] s = {-1}, int64[1] e = {-100}, int64[1] a = {2}"
    shape = {"ones3": "float[1,2,3,4] y", "perm": "float[2,4,3] y"}
    outputs = next((v for k, v in shape.items() if k in body), "float[2,3,4] y")
    gm = check(Canonicalize(), from_text(body, X + 0.1, outputs=outputs, constants=constants), (X + 0.1,), None)
    assert text(gm).count("onnx.") == 1


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.clone(),
        lambda x: x.contiguous(),
        lambda x: x.to(torch.float32),
        lambda x: x.reshape(2, 3, 4),
        lambda x: x.permute(0, 1, 2),
        lambda x: x.expand(2, 3, 4),
        lambda x: x[:, 0:3],
        lambda x: nn.functional.pad(x, (0, 0)),
        lambda x: nn.functional.dropout(x, 0.5, training=False),
        lambda x: x + 0,
        lambda x: x * 1.0,
        lambda x: x / 1,
    ],
)
def test_what_does_nothing_goes_from_a_torch_graph(fn):
    check(Canonicalize(), from_torch(Fn(lambda x: fn(-x)), X), (X,), "%0: f32[2,3,4] = aten.neg(%x)\nreturn %0")


def test_integer_division_by_one_changes_the_type_and_stays():
    ints = torch.arange(6).reshape(2, 3)
    assert "div" in text(check(Canonicalize(), from_torch(Fn(lambda x: x / 1), ints), (ints,), None))


def test_dropout_with_a_mask_that_nothing_reads_goes():
    start = from_text("n = Neg (x) y, mask = Dropout (n, r)", X, constants="float r = {0.5}")
    check(Pipeline(Canonicalize(), RemoveDead()), start, (X,), "%0: f32[2,3,4] = onnx.Neg(%x)\nreturn %0")


def test_copies_stay_where_something_is_written_in_place():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    copied = graph.call_function(torch.ops.aten.clone.default, (x,))
    written = graph.call_function(torch.ops.aten.mul_.Tensor, (copied, 3.0))
    graph.output((x, written))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert not Canonicalize()(gm).modified
    assert [v.tolist() for v in gm(torch.ones(1))] == [[1.0], [3.0]]


def test_transposes_join():
    body = "a = Transpose <perm = [1, 2, 0]> (x) y = Transpose <perm = [0, 2, 1]> (a)"
    check(Canonicalize(), from_text(body, X, outputs="float[3,2,4] y"), (X,), """
        %0: f32[3,2,4] = onnx.Transpose(%x, perm=[1, 0, 2])
        return %0
    """)  # fmt: skip
    check(Canonicalize(), from_torch(Fn(lambda x: x.permute(1, 2, 0).transpose(1, 2)), X), (X,), """
        %0: f32[3,2,4] = aten.permute(%x, [1, 0, 2])
        return %0
    """)  # fmt: skip
    check(
        Canonicalize(), from_torch(Fn(lambda x: -x.permute(1, 2, 0).permute(2, 0, 1)), X), (X,), "%0: f32[2,3,4] = aten.neg(%x)\nreturn %0"
    )


def test_reshapes_join():
    constants = "int64[2] a = {6, 4}, int64[2] b = {-1, 8}, int64[2] copying = {0, -1}"
    gm = check(
        Canonicalize(), from_text("c = Reshape (x, a) y = Reshape (c, b)", X, outputs="float[3,8] y", constants=constants), (X,), None
    )
    assert ops(gm) == ["Reshape"]
    check(Canonicalize(), from_torch(Fn(lambda x: x.transpose(0, 1).reshape(6, 4).view(3, 8)), X), (X,), """
        %0: f32[3,2,4] = aten.transpose.int(%x, 0, 1)
        %1: f32[3,8] = aten.reshape(%0, [3, 8])
        return %1
    """)  # fmt: skip
    gm = check(
        Canonicalize(), from_text("c = Reshape (x, a) y = Reshape (c, copying)", X, outputs="float[6,4] y", constants=constants), (X,), None
    )
    assert ops(gm) == ["Reshape"]  # the second does nothing; joined as it stands it would have copied a 2


CLIP = "float three = {3}, float zero = {0}, float six = {6}, float sixth = {0.16666667}, float nine = {9}"


@pytest.mark.parametrize(
    "body",
    [
        "a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (c, six)",
        "a = Add (three, x) b = Clip (a, zero, six) c = Mul (b, x) y = Mul (sixth, c)",
        "a = Add (x, three) b = Clip (a, zero, six) c = Div (b, six) y = Mul (c, x)",
        "b = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) y = Mul (x, b)",
    ],
)
def test_hard_swish_is_recognised_in_every_spelling(body):
    check(Canonicalize(), from_text(body, X, opset=14, constants=CLIP), (X,), "%0: f32[2,3,4] = onnx.HardSwish(%x)\nreturn %0")


@pytest.mark.parametrize(
    "body",
    [
        "a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (c, nine)",
        "a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (six, c)",
        "a = Add (x, three) b = Clip (a, zero, nine) c = Mul (x, b) y = Div (c, six)",
        "b = HardSigmoid (x) y = Mul (x, b)",
    ],
)
def test_near_misses_of_hard_swish_stay(body):
    positive = X.abs() + 0.5
    assert "HardSwish" not in ops(check(Canonicalize(), from_text(body, positive, opset=14, constants=CLIP), (positive,), None))


def test_hard_swish_waits_for_its_opset():
    gm, _ = from_text("a = Add (x, three) b = Clip (a, zero, six) c = Mul (x, b) y = Div (c, six)", X, opset=13, constants=CLIP)
    assert declines(gm) == ["HardSwish exists from opset 14, this graph has 13"]


def test_torch_chains_become_one_op():
    hard_swish, gelu = lambda x: x * nn.functional.relu6(x + 3) / 6, lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))
    check(Canonicalize(), from_torch(Fn(hard_swish), X), (X,), "%0: f32[2,3,4] = aten.hardswish(%x)\nreturn %0")
    check(Canonicalize(), from_torch(Fn(gelu), X), (X,), "%0: f32[2,3,4] = aten.gelu(%x)\nreturn %0")


@pytest.mark.parametrize(
    "body",
    [
        "a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (x, c) y = Mul (d, half)",
        "a = Mul (x, ir) b = Erf (a) c = Add (one, b) d = Mul (half, x) y = Mul (d, c)",
        "a = Div (x, r) b = Erf (a) c = Add (b, one) d = Mul (c, half) y = Mul (x, d)",
    ],
)
def test_gelu_is_recognised_in_every_spelling(body):
    constants = "float r = {1.4142135}, float ir = {0.70710677}, float one = {1}, float half = {0.5}"
    check(Canonicalize(), from_text(body, X, constants=constants), (X,), "%0: f32[2,3,4] = onnx.Gelu(%x)\nreturn %0")
    gm, _ = from_text(body, X, opset=17, constants=constants)
    assert declines(gm) == ["Gelu exists from opset 20, this graph has 17"]


@pytest.mark.parametrize(("opset", "softmax"), [(11, "Softmax <axis = 1> (f)"), (13, "Softmax <axis = -1> (f)"), (13, "LogSoftmax (f)")])
def test_softmax_of_a_flattened_matrix_is_softmax_of_the_last_axis(opset, softmax):
    body = f"s = Shape (x) f = Flatten <axis = 2> (x) p = {softmax} y = Reshape (p, s)"
    gm = check(Canonicalize(), from_text(body, X, opset=opset), (X,), None)
    assert ops(gm) == [softmax.split()[0]]
    body = body.replace("<axis = 2> (x)", "<axis = 1> (x)")
    assert len(ops(check(Canonicalize(), from_text(body, X, opset=opset), (X,), None))) == 4


NORM = """a = ReduceMean <axes = [-1]> (x) b = Sub (x, a) c = Pow (b, two) d = ReduceMean <axes = [-1]> (c) e = Add (d, eps)
          f = Sqrt (e) g = Div (b, f) h = Mul (g, s) y = Add (h, o)"""
NORM_CONSTANTS = "float two = {2}, float eps = {0.001}, float[4] s = {1, -2, 3, 0.5}, float[4] o = {0.1, 0.2, -0.3, 4}"


def test_layer_norm_is_recognised_from_opset_17():
    gm = check(Canonicalize(), from_text(NORM, X, opset=17, constants=NORM_CONSTANTS), (X,), None)
    assert ops(gm) == ["LayerNormalization"]
    assert ops(
        check(Canonicalize(), from_text(NORM.replace("Pow (b, two)", "Mul (b, b)"), X, opset=17, constants=NORM_CONSTANTS), (X,), None)
    ) == ["LayerNormalization"]
    gm, _ = from_text(NORM, X, opset=16, constants=NORM_CONSTANTS)
    assert declines(gm) == ["LayerNormalization exists from opset 17, this graph has 16"]


@pytest.mark.parametrize(
    ("old", "new"), [("axes = [-1]> (x)", "axes = [1]> (x)"), ("Sub (x, a)", "Sub (a, x)"), ("Div (b, f)", "Div (f, b)")]
)
def test_near_misses_of_layer_norm_stay(old, new):
    gm = check(Canonicalize(), from_text(NORM.replace(old, new), X, opset=17, constants=NORM_CONSTANTS), (X,), None)
    assert "LayerNormalization" not in ops(gm)


def test_a_model_with_outputs_that_are_inputs_and_copies_keeps_its_interface():
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20]> g (float[2] x) => (float[2] y, float[2] z) { y = Identity (x) z = Identity (y) }'
    )
    gm = load(proto)
    Canonicalize()(gm)
    written = to_proto(gm)
    onnx.checker.check_model(written)
    assert [o.name for o in written.graph.output] == ["y", "z"]
    assert all(np.array_equal(v, [1, 2]) for v in gm(torch.tensor([1.0, 2.0])))
