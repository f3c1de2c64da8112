"""One spelling for each thing, on both dialects."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qgraph
from qgraph.onnx_io import from_onnx as load
from qgraph.onnx_io import to_proto
from qgraph.passes import Canonicalize, RemoveDead
from qgraph.pipeline import Context, Pipeline
from qgraph.testing import check, from_torch
from qgraph.text import text
from qgraph.views import Attention, view
from tests.passes.graphs import Fn, from_text, ops

X = torch.linspace(-4, 4, 24).reshape(2, 3, 4)


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
        lambda x: torch.cat([torch.tensor([]), x], -2),
    ],
)
def test_what_does_nothing_goes_from_a_torch_graph(fn):
    check(Canonicalize(), from_torch(Fn(lambda x: fn(-x)), X), (X,), "%0: f32[2,3,4] = aten.neg(%x)\nreturn %0")


def test_an_empty_tensor_that_changes_the_type_of_what_it_joins_stays():
    ints = torch.arange(6).reshape(2, 3)
    assert "cat" in text(check(Canonicalize(), from_torch(Fn(lambda x: torch.cat([torch.tensor([]), x])), ints), (ints,), None))


def test_integer_division_by_one_changes_the_type_and_stays():
    ints = torch.arange(6).reshape(2, 3)
    assert "div" in text(check(Canonicalize(), from_torch(Fn(lambda x: x / 1), ints), (ints,), None))


def test_dropout_with_a_mask_that_nothing_reads_goes():
    start = from_text("n = Neg (x) y, mask = Dropout (n, r)", X, constants="float r = {0.5}")
    check(Pipeline(Canonicalize(), RemoveDead()), start, (X,), "%0: f32[2,3,4] = onnx.Neg(%x)\nreturn %0")


class Grouped(nn.Module):
    def forward(self, q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)


def test_keys_and_values_that_heads_share_are_repeated_for_each():
    q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 3, 7, 4)
    gm = check(Canonicalize(), from_torch(Grouped(), q, k, v), (q, k, v), """
        %0: f32[2,2,1,7,4] = aten.unsqueeze(%k, 2)
        %1: f32[2,2,3,7,4] = aten.expand(%0, [-1, -1, 3, -1, -1])
        %2: f32[2,6,7,4] = aten.flatten.using_ints(%1, 1, 2)
        %3: f32[2,3,1,7,4] = aten.unsqueeze(%v, 2)
        %4: f32[2,3,2,7,4] = aten.expand(%3, [-1, -1, 2, -1, -1])
        %5: f32[2,6,7,4] = aten.flatten.using_ints(%4, 1, 2)
        %6: f32[2,6,5,4] = aten.scaled_dot_product_attention(%q, %2, %5, None, 0.0, False, scale=0.3)
        return %6
    """)  # fmt: skip
    assert [view(Attention, n) is not None for n in gm.graph.nodes if "attention" in n.name] == [True]


def test_heads_whose_number_is_not_known_stay_shared_with_a_reason():
    q, k, v = torch.randn(2, 6, 5, 4), torch.randn(2, 1, 7, 4), torch.randn(2, 1, 7, 4)
    heads = torch.export.Dim("heads", min=2, max=64)
    gm = qgraph.capture(Grouped(), (q, k, v), dynamic_shapes=({1: heads}, None, None))
    ctx = Context()
    Canonicalize().run(gm, ctx)
    assert [d.reason for d in ctx.declines] == ["its numbers of heads are not known"] and "enable_gqa" in gm.code


@pytest.mark.parametrize("spelling", [torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default])
def test_a_view_of_a_dropped_copy_becomes_a_reshape(spelling):
    start = from_torch(Fn(lambda x: spelling(x.permute(0, 2, 1).contiguous(), [2, 12])), X)
    check(Canonicalize(), start, (X,), """
        %0: f32[2,4,3] = aten.permute(%x, [0, 2, 1])
        %1: f32[2,12] = aten.reshape(%0, [2, 12])
        return %1
    """)  # fmt: skip


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
