"""ONNX in and out: rewriting, names, nested graphs, functions, external data, and what onnx_ir alone does not carry."""

import copy
import gc
import os
import pickle
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import convert_model_to_external_data

from qgraph.edit import add_constant
from qgraph.errors import ModelError
from qgraph.onnx_io import from_onnx, opset, require_opset, save_onnx, to_onnx, to_proto
from qgraph.onnx_ops import OnnxOp, op
from qgraph.types import TensorType, type_of
from tests.protos import equal

X = torch.linspace(-2, 3, 12).view(4, 3)
WEIGHT = np.linspace(-1, 1, 15, dtype=np.float32).reshape(3, 5)
BIAS = np.array([0.5, -1, 2, 0.25, -3], np.float32)


def parse(text: str, **constants) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    return model


def linear() -> onnx.ModelProto:
    return parse(
        """<ir_version: 10, opset_import: ["": 18]> g (float[N, 3] x) => (float[N, 5] y)
           { [product] p = MatMul (x, w) [sum] s = Add (p, b) [act] y = Relu (s) }""",
        w=WEIGHT, b=BIAS,
    )  # fmt: skip


def node_of(gm, op_type):
    return next(n for n in gm.graph.nodes if isinstance(n.target, OnnxOp) and n.target.op_type == op_type)


def by_ort(proto, *inputs):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})


def same_in_ort(gm, *inputs) -> onnx.ModelProto:
    """The graph's results are those of ONNX Runtime on the written file, which passes the checker."""
    proto = to_proto(gm)
    onnx.checker.check_model(proto, full_check=True)
    gm.recompile()
    for found, expected in zip(gm(*inputs), by_ort(proto, *inputs), strict=True):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    return proto


# Reading


def test_a_graph_runs_and_knows_names_and_types():
    gm = from_onnx(linear())
    (y,) = gm(X)
    torch.testing.assert_close(y, torch.relu(X @ torch.tensor(WEIGHT) + torch.tensor(BIAS)))
    state = gm.meta["qgraph"]
    assert (state.source, state.input_names, state.output_names) == ("onnx", ("x",), ("y",))
    assert [type_of(n) for n in gm.graph.nodes if n.op == "placeholder"] == [TensorType("float32", ("N", 3))]
    assert opset(gm) == 18 and opset(gm, "com.microsoft") == 0


def test_a_negative_dimension_is_unknown_and_written_back():
    proto = linear()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    gm = from_onnx(proto)
    assert type_of(next(iter(gm.graph.nodes))).shape == (None, 3)
    assert to_proto(gm).graph.input[0].type.tensor_type.shape.dim[0].dim_value == -1


def test_a_model_and_an_ir_model_give_the_same_graph():
    proto = linear()
    assert to_proto(from_onnx(ir.from_proto(proto))).graph.node == to_proto(from_onnx(proto)).graph.node


def test_old_models_list_initializers_as_inputs_and_still_have_constants():
    proto = linear()
    proto.ir_version = 3
    proto.graph.input.extend(helper.make_tensor_value_info(n, 1, a.shape) for n, a in {"w": WEIGHT, "b": BIAS}.items())
    gm = from_onnx(proto)
    assert sum(n.op == "placeholder" for n in gm.graph.nodes) == 1
    assert [i.name for i in to_proto(gm).graph.input] == ["x", "w", "b"]


def test_a_new_constant_in_an_old_model_raises_its_ir_version():
    proto = linear()
    proto.ir_version = 3
    proto.graph.input.extend(helper.make_tensor_value_info(n, 1, a.shape) for n, a in {"w": WEIGHT, "b": BIAS}.items())
    gm = from_onnx(proto)
    add = node_of(gm, "Add")
    with gm.graph.inserting_before(add):
        add.args = (add.args[0], gm.graph.get_attr(add_constant(gm, "shift", torch.ones(5))))
    written = to_proto(gm)
    assert written.ir_version == 4 and {i.name for i in written.graph.initializer} == {"w", "b", "shift"}


def test_a_file_out_of_order_is_read_in_a_valid_order():
    proto = linear()
    shuffled = [proto.graph.node[i] for i in (2, 0, 1)]
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in shuffled]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert [n.name for n in same_in_ort(from_onnx(proto), X).graph.node] == ["product", "sum", "act"]


def test_weights_of_a_file_lie_in_memory_once(tmp_path):
    proto = parse('<ir_version: 10, opset_import: ["": 18]> g (float[4,512] x) => (float[4,9] y) { y = MatMul (x, w) }')
    proto.graph.initializer.append(numpy_helper.from_array(np.linspace(-1, 1, 512 * 9, dtype=np.float32).reshape(512, 9), "w"))
    proto.graph.initializer[0].doc_string = "weights"
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    gm = from_onnx(path)
    (constant,) = (n for n in gm.graph.nodes if n.op == "get_attr")
    assert constant.meta["onnx_value"].const_value.numpy().ctypes.data == gm.w.data_ptr()
    assert equal(to_proto(gm), proto)


# Writing after a rewrite


def test_a_replaced_output_producer_keeps_the_outputs_name_and_symbolic_type():
    gm = from_onnx(linear())
    relu = node_of(gm, "Relu")
    with gm.graph.inserting_before(relu):
        new = gm.graph.call_function(op("Sigmoid", version=18), (relu.args[0],))
    relu.replace_all_uses_with(new)
    gm.graph.erase_node(relu)
    proto = same_in_ort(gm, X)
    assert proto.graph.node[-1].op_type == "Sigmoid" and list(proto.graph.node[-1].output) == ["y"]
    assert proto.graph.output[0] == linear().graph.output[0]
    assert [n.name for n in proto.graph.node] == ["product", "sum", "sigmoid"]


def test_an_output_that_becomes_an_input_goes_through_one_identity():
    gm = from_onnx(
        parse(
            "<ir_version: 10, opset_import: ['': 18]> g (float[4,3] x) => (float[4,3] y, float[4,3] z) {y = Neg(x) z = Abs(x)}".replace(
                "'", '"'
            )
        )
    )
    neg = node_of(gm, "Neg")
    neg.replace_all_uses_with(neg.args[0])
    gm.graph.erase_node(neg)
    proto = same_in_ort(gm, X)
    assert [(n.op_type, list(n.output)) for n in proto.graph.node] == [("Abs", ["z"]), ("Identity", ["y"])]


def test_one_value_behind_two_outputs_keeps_both_names():
    gm = from_onnx(
        parse('<ir_version: 10, opset_import: ["": 18]> g (float[4,3] x) => (float[4,3] y, float[4,3] z) {y = Neg(x) z = Neg(x)}')
    )
    first, second = [n for n in gm.graph.nodes if isinstance(n.target, OnnxOp)]
    second.replace_all_uses_with(first)
    gm.graph.erase_node(second)
    proto = same_in_ort(gm, X)
    assert [o.name for o in proto.graph.output] == ["y", "z"] and [n.op_type for n in proto.graph.node] == ["Neg", "Identity"]


def test_the_old_producer_of_an_output_may_live_on_under_another_name():
    gm = from_onnx(linear())
    relu = node_of(gm, "Relu")
    with gm.graph.inserting_after(relu):
        new = gm.graph.call_function(op("Neg", version=18), (relu,))
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    proto = same_in_ort(gm, X)
    assert proto.graph.node[-1].output[0] == "y" and proto.graph.node[-2].output[0] == proto.graph.node[-1].input[0] != "y"


def test_new_names_avoid_names_of_every_nested_graph():
    text = """<ir_version: 10, opset_import: ["": 18]> g (float[4,3] x, bool c) => (float[4,3] y) {
        h = Exp (x)
        y = If (c) <then_branch = t () => (float[4,3] neg) { neg = Neg (h) }, else_branch = e () => (float[4,3] q) { q = Abs (h) }> }"""
    gm = from_onnx(parse(text))
    exp = node_of(gm, "Exp")
    with gm.graph.inserting_after(exp):
        new = gm.graph.call_function(op("Neg", version=18), (exp,), name="neg")
    exp.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    proto = same_in_ort(gm, X, torch.tensor(True))
    assert proto.graph.node[1].output[0] == "neg_1"
    same_in_ort(gm, X, torch.tensor(False))


def test_a_changed_constant_is_written_and_an_unchanged_one_keeps_its_form():
    proto = linear()
    proto.graph.initializer[1].CopyFrom(TensorProto(name="b", data_type=1, dims=[5], float_data=BIAS.tolist()))
    gm = from_onnx(proto)
    gm.w.data = gm.w * 2
    written = {t.name: t for t in same_in_ort(gm, X).graph.initializer}
    np.testing.assert_array_equal(numpy_helper.to_array(written["w"]), WEIGHT * 2)
    assert written["b"] == proto.graph.initializer[1]


def test_an_attribute_changes_alone():
    gm = from_onnx(parse('<ir_version: 10, opset_import: ["": 18]> g (float[4,3] x) => (float[4,3] y) { [e] y = Elu <alpha = 0.3> (x) }'))
    node_of(gm, "Elu").kwargs = {"alpha": 2}
    (written,) = same_in_ort(gm, X).graph.node
    assert (written.name, written.attribute[0].f, written.attribute[0].type) == ("e", 2.0, onnx.AttributeProto.FLOAT)


def test_value_info_of_dead_values_goes_and_of_retyped_ones_follows():
    proto = linear()
    proto.graph.value_info.extend(helper.make_tensor_value_info(n, 1, ["N", 5]) for n in ("p", "s", "stray"))
    gm = from_onnx(proto)
    assert to_proto(gm).graph.value_info == proto.graph.value_info
    add = node_of(gm, "Add")
    node_of(gm, "MatMul").meta["type"] = TensorType("float16", ("N", 5))
    add.replace_all_uses_with(add.args[0])
    gm.graph.erase_node(add)
    found = {v.name: v.type.tensor_type.elem_type for v in to_proto(gm).graph.value_info}
    assert found == {"p": TensorProto.FLOAT16, "stray": TensorProto.FLOAT}


def test_a_node_that_is_not_onnx_is_refused_by_name():
    gm = from_onnx(linear())
    relu = node_of(gm, "Relu")
    relu.target, relu.kwargs = torch.ops.aten.relu.default, {}
    with pytest.raises(ModelError, match=r"'relu' \(aten.relu.default\) is not an ONNX operator: lower the graph first"):
        to_onnx(gm)


def test_an_operator_of_a_newer_opset_is_refused_until_it_is_required():
    gm = from_onnx(linear())
    node_of(gm, "Relu").target = op("Gelu", version=20)
    with pytest.raises(ModelError, match="needs opset 20 of 'ai.onnx', the graph imports 18"):
        to_proto(gm)
    require_opset(gm, 20, "Gelu")
    assert same_in_ort(gm, X).opset_import[0].version == 20


# Raising the opset


@pytest.mark.parametrize(
    ("version", "body", "kinds"),
    [
        (9, "y = Clip <min = -0.5, max = 0.75> (x)", ["Clip"]),
        (11, "t = Softmax <axis = 0> (x) y = Neg (t)", ["Shape", "Flatten", "Softmax", "Reshape", "Neg"]),
        (11, "y = Softmax <axis = 1> (x)", ["Softmax"]),
        (11, "u = Unsqueeze <axes = [0]> (x) y = Squeeze <axes = [0]> (u)", ["Unsqueeze", "Squeeze"]),
        (11, "y = ReduceMean <axes = [1], keepdims = 1> (x)", ["ReduceMean"]),
        (9, "y = Slice <starts = [1], ends = [3], axes = [0]> (x)", ["Slice"]),
        (9, "y = Pad <pads = [1, 0, 0, 2], value = 1.5> (x)", ["Pad"]),
        (9, "a, b = Split <axis = 1, split = [1, 2]> (x) y = Mul (a, b)", ["Split", "Mul"]),
        (11, "a, b = Split <axis = 0> (x) y = Sub (a, b)", ["Split", "Sub"]),
        (9, "y, i = TopK <k = 2> (x)", ["TopK"]),
        (9, "y = Dropout <ratio = 0.1> (x)", ["Dropout"]),
    ],
)
def test_raising_the_opset_changes_spelling_and_not_results(version, body, kinds):
    gm = from_onnx(parse(f'<ir_version: 7, opset_import: ["": {version}]> g (float[4,3] x) => (float[A,B] y) {{ {body} }}'))
    before = gm(X)
    require_opset(gm, 21, "int4 weights")
    proto = same_in_ort(gm, X)
    torch.testing.assert_close(gm(X), before, rtol=0, atol=0)
    assert [n.op_type for n in proto.graph.node] == kinds
    assert (proto.opset_import[0].version, proto.ir_version) == (21, 10)


def test_an_opset_that_a_node_cannot_reach_is_refused_with_the_reason():
    gm = from_onnx(
        parse(
            '<ir_version: 9, opset_import: ["": 18]> g (float[2,4,3] x) => (float[2,4,3] y) {[n] y = GroupNormalization <num_groups = 2> (x, w, b)}',
            w=np.ones(2, np.float32), b=np.zeros(2, np.float32),
        )
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"'n' .* cannot be raised to opset 21 \(needed for int4 weights\): its scale is per channel"):
        require_opset(gm, 21, "int4 weights")


def test_nested_graphs_are_raised_with_their_parent():
    text = """<ir_version: 7, opset_import: ["": 11]> g (float[4,3] x, bool c) => (float[4,1] y) {
        y = If (c) <then_branch = t () => (float[4,1] m) { m = ReduceMean <axes = [1]> (x) },
                    else_branch = e () => (float[4,1] n) { n = ReduceMax <axes = [1]> (x) }> }"""
    gm = from_onnx(parse(text))
    require_opset(gm, 18, "a test")
    for c in (True, False):
        same_in_ort(gm, X, torch.tensor(c))


# Nested graphs and functions

LOOP = """<ir_version: 10, opset_import: ["": 18]> g (float[4,3] x, int64 n) => (float[4,3] total, float[K,4,3] steps) {
    scale = Sigmoid (x)
    zero = Sub (x, x)
    t = Constant <value = bool {1}> ()
    total, steps = Loop (n, t, zero) <body = b (int64 i, bool go, float[4,3] sum) => (bool on, float[4,3] next, float[4,3] out) {
        on = Identity (go)
        big = ReduceMax <keepdims = 0> (sum)
        few = Less (big, half)
        next = If (few) <then_branch = a () => (float[4,3] a1) { a1 = Add (sum, scale) }, else_branch = o () => (float[4,3] o1) { o1 = Add (sum, w) }>
        out = Mul (next, scale)
    }>
}"""


def loop():
    return parse(LOOP, w=np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3), half=np.array(1.4, np.float32))


def test_nested_graphs_see_outer_values_as_operands():
    gm = from_onnx(loop())
    same_in_ort(gm, X, torch.tensor(5))
    captured = node_of(gm, "Loop").kwargs["captures__body"]
    assert {n.meta["onnx_value"].name for n in captured} == {"scale", "w", "half"}


def test_dead_code_elimination_keeps_what_only_a_nested_graph_reads():
    gm = from_onnx(loop())
    gm.graph.eliminate_dead_code()
    gm.recompile()
    proto = same_in_ort(gm, X, torch.tensor(4))
    assert [n.op_type for n in proto.graph.node] == ["Sigmoid", "Sub", "Constant", "Loop"]


def test_a_rewrite_in_a_nested_graph_and_of_a_captured_value_is_written():
    gm = from_onnx(loop())
    sigmoid, body = node_of(gm, "Sigmoid"), gm.get_submodule(node_of(gm, "Loop").kwargs["body"].target)
    with gm.graph.inserting_after(sigmoid):
        new = gm.graph.call_function(op("Neg", version=18), (sigmoid,))
    sigmoid.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    mul = node_of(body, "Mul")
    mul.target = op("Sub", version=18)
    body.recompile()
    proto = same_in_ort(gm, X, torch.tensor(5))
    assert proto.graph.node[1].op_type == "Neg" and proto.graph.node[-1].attribute[0].g.node[-1].op_type == "Sub"


FUNCTIONS = """<ir_version: 10, opset_import: ["": 18, "local": 1]> g (float[4,3] x) => (float[4,3] y, float[4,3] z)
    { y = local.scaled <factor = 2.5> (x) z = local.scaled (x) }
    <domain: "local", opset_import: ["": 18, "local": 1]> twice (a) => (b) { b = Add (a, a) }
    <domain: "local", opset_import: ["": 18, "local": 1]> scaled <factor: float = 0.5> (a) => (b)
    { f = Constant <value_float: float = @factor> () c = Mul (a, f) b = local.twice (c) }"""


def test_a_function_runs_with_its_attributes_and_their_defaults():
    gm = from_onnx(parse(FUNCTIONS))
    y, z = gm(X)
    torch.testing.assert_close(y, X * 5)
    torch.testing.assert_close(z, X)
    proto = same_in_ort(gm, X)
    assert equal(proto, parse(FUNCTIONS))


def test_a_rewrite_in_a_function_body_changes_all_calls():
    gm = copy.deepcopy(from_onnx(parse(FUNCTIONS)))
    body = gm.get_submodule(gm.meta["onnx_model"].functions["local", "twice", ""])
    add = node_of(body, "Add")
    add.target = op("Mul", version=18)
    body.recompile()
    same_in_ort(gm, X)
    torch.testing.assert_close(gm(X)[0], (X * 2.5) ** 2)


def test_a_constant_added_to_a_function_becomes_a_node():
    text = """<ir_version: 8, opset_import: ["": 12, "local": 1]> g (float[4,3] x) => (float[4,1] y) { y = local.rows (x) }
        <domain: "local", opset_import: ["": 12]> rows (a) => (b) { u = Unsqueeze <axes = [0]> (a) c = ReduceSum <axes = [2]> (u) b = Squeeze <axes = [0]> (c) }"""
    gm = from_onnx(parse(text))
    require_opset(gm, 18, "a test")
    proto = same_in_ort(gm, X)
    assert [n.op_type for n in proto.functions[0].node].count("Constant") == 3
    torch.testing.assert_close(gm(X)[0], X.sum(1, keepdim=True))


def test_an_operator_nobody_knows_is_carried_and_refused_only_when_run():
    proto = parse('<ir_version: 10, opset_import: ["": 18, "acme": 3]> g (float[4,3] x) => (float[4,3] y) { y = acme.Frob <a = 3> (x) }')
    gm = from_onnx(proto)
    assert to_proto(gm).graph.node == proto.graph.node
    with pytest.raises(ModelError, match=r"operator acme.Frob-3 cannot be run here"):
        gm(X)


# What onnx_ir leaves out


def sparse_model() -> onnx.ModelProto:
    proto = parse(
        '<ir_version: 10, opset_import: ["": 18]> g (float[4,3] x) => (float[4,3] y) { k = Constant () s = Add (x, k) y = Mul (s, w) }'
    )
    constant = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([7.0, -2], np.float32), ""), numpy_helper.from_array(np.array([1, 5]), ""), [4, 3]
    )
    weight = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([3.0, 4, 5], np.float32), "w"),
        numpy_helper.from_array(np.array([[0, 0], [1, 2], [3, 1]]), ""),
        [4, 3],
    )
    proto.graph.node[0].attribute.append(helper.make_attribute("sparse_value", constant))
    proto.graph.sparse_initializer.append(weight)
    return proto


def test_sparse_tensors_run_as_dense_ones_and_stay_sparse_in_the_file():
    proto = sparse_model()
    kept = proto.SerializeToString()
    gm = from_onnx(proto)
    dense, weight = torch.zeros(4, 3), torch.zeros(4, 3)
    dense.view(-1)[[1, 5]] = torch.tensor([7.0, -2])
    weight[[0, 1, 3], [0, 2, 1]] = torch.tensor([3.0, 4, 5])
    torch.testing.assert_close(gm(X)[0], (X + dense) * weight)
    assert equal(to_proto(gm), proto) and proto.SerializeToString() == kept
    gm.w.data = gm.w + 1
    assert not to_proto(gm).graph.sparse_initializer


def test_map_types_annotations_training_info_and_stray_names_survive():
    proto = linear()
    proto.graph.output.append(
        onnx.ValueInfoProto(
            name="m",
            type=helper.make_sequence_type_proto(
                onnx.TypeProto(map_type=onnx.TypeProto.Map(key_type=7, value_type=helper.make_tensor_type_proto(1, [])))
            ),
        )
    )
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    proto.graph.node.append(helper.make_node("ZipMap", ["y"], ["m"], domain="ai.onnx.ml", classlabels_int64s=[1, 2, 3, 4, 5]))
    for name in ("p", "nobody"):
        proto.graph.quantization_annotation.append(
            onnx.TensorAnnotation(
                tensor_name=name, quant_parameter_tensor_names=[onnx.StringStringEntryProto(key="SCALE_TENSOR", value="s1")]
            )
        )
    proto.training_info.append(onnx.TrainingInfoProto(initialization=helper.make_graph([], "start", [], [])))
    proto.graph.node[0].domain = "ai.onnx"
    proto.metadata_props.add(key="author", value="nobody")
    proto.graph.node[0].doc_string = "a product"
    assert equal(to_proto(from_onnx(proto)), proto)


def test_strings_and_four_bit_integers_are_constants_and_run():
    proto = parse('<ir_version: 10, opset_import: ["": 21]> g (float[4,3] x) => (float[4,3] y, string[2] t) { d = DequantizeLinear <axis = 1> (q, s, z) y = Mul (x, d) t = Identity (words) }')  # fmt: skip
    four = helper.make_tensor("q", TensorProto.INT4, [4, 3], [-8, 7, 0, 1, 2, 3, -4, -5, 6, 5, -1, -2])
    zero = helper.make_tensor("z", TensorProto.INT4, [3], [1, -2, 3])
    proto.graph.initializer.extend([four, zero, numpy_helper.from_array(np.array([0.5, 0.25, 2], np.float32), "s")])
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [2], ["grün", "red"]))
    gm = from_onnx(proto)
    y, words = gm(X)
    q = torch.tensor([-8, 7, 0, 1, 2, 3, -4, -5, 6, 5, -1, -2]).view(4, 3)
    torch.testing.assert_close(y, X * (q - torch.tensor([1, -2, 3])) * torch.tensor([0.5, 0.25, 2]))
    assert list(words) == ["grün", "red"]
    assert equal(to_proto(copy.deepcopy(gm)), proto)


# Files


def external_file(folder, **changes) -> str:
    model = linear()
    convert_model_to_external_data(model, location="data.bin", size_threshold=0)
    path = folder / "m.onnx"
    onnx.save(model, path)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = str(changes.get(entry.key, entry.value))
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_mapped_and_shared_by_copies(tmp_path):
    gm = from_onnx(external_file(tmp_path))
    if (maps := Path("/proc/self/maps")).exists():
        assert "data.bin" in maps.read_text()
    other = copy.deepcopy(gm)
    assert other.w.data_ptr() == gm.w.data_ptr()
    torch.testing.assert_close(other(X), from_onnx(linear())(X))
    assert equal(to_proto(other), onnx.load(tmp_path / "m.onnx", load_external_data=False))


@pytest.mark.parametrize("external", [None, True, False])
def test_a_model_with_external_data_moves_to_another_folder(tmp_path, external):
    source = external_file(tmp_path)
    (tmp_path / "out").mkdir()
    save_onnx(from_onnx(source), tmp_path / "out" / "n.onnx", external_data=external)
    source.unlink(), (tmp_path / "data.bin").unlink()
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["n.onnx"]  # all constants are below 1 KiB, so they go into the file
    torch.testing.assert_close(from_onnx(tmp_path / "out" / "n.onnx")(X), from_onnx(linear())(X))


def test_large_constants_of_every_kind_go_to_the_data_file(tmp_path):
    proto = parse(
        """<ir_version: 10, opset_import: ["": 21]> g (float[8,64] x) => (float[8,64] y)
           { d = DequantizeLinear <axis = 0> (q, s) p = MatMul (x, d) h = MatMul (p, w) y = Add (h, c) }""",
        w=np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), s=np.linspace(0.1, 1, 64, dtype=np.float32),
    )  # fmt: skip
    values = np.random.default_rng(1).integers(-8, 8, 64 * 64)
    proto.graph.initializer.append(helper.make_tensor("q", TensorProto.INT4, [64, 64], values))
    proto.graph.initializer.append(TensorProto(name="c", data_type=1, dims=[8, 64], float_data=np.linspace(-1, 1, 512).tolist()))
    path, x = tmp_path / "m.onnx", torch.randn(8, 64)
    save_onnx(from_onnx(proto), path, external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    onnx.checker.check_model(str(path))
    expected = by_ort(proto, x)
    (y,) = from_onnx(path)(x)
    np.testing.assert_allclose(y.numpy(), expected[0], rtol=1e-4, atol=1e-4)
    found = onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})
    np.testing.assert_array_equal(found[0], expected[0])


def test_a_file_can_be_written_over_the_one_it_was_read_from(tmp_path):
    proto = parse('<ir_version: 10, opset_import: ["": 18]> g (float[4,512] x) => (float[4,2] y) { p = MatMul (x, w) y = Relu (p) }', w=np.linspace(-1, 1, 1024, dtype=np.float32).reshape(512, 2))  # fmt: skip
    path, x = tmp_path / "m.onnx", torch.randn(4, 512)
    save_onnx(from_onnx(proto), path, external_data=True)
    gm = from_onnx(path)
    node_of(gm, "Relu").target = op("Neg", version=18)
    save_onnx(gm, path)
    np.testing.assert_allclose(from_onnx(path)(x)[0], -(x @ torch.linspace(-1, 1, 1024).view(512, 2)), rtol=1e-5, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def absolute(folder):
    return external_file(folder, location=os.fspath(folder / "data.bin")), "lies outside the model's folder"


def parent(folder):
    return external_file(folder, location="../data.bin"), "lies outside the model's folder"


def through_a_link(folder):
    path = external_file(folder)
    (folder / "inner").mkdir()
    (folder / "inner" / "m.onnx").write_bytes(path.read_bytes())
    (folder / "inner" / "data.bin").symlink_to(folder / "data.bin")
    return folder / "inner" / "m.onnx", "lies outside the model's folder"


def truncated(folder):
    path = external_file(folder)
    os.truncate(folder / "data.bin", 20)
    return path, "is truncated: needs"


def absent(folder):
    path = external_file(folder)
    (folder / "data.bin").unlink()
    return path, "is missing"


def wrong_length(folder):
    return external_file(folder, length=12), "has length 12, but its type and shape need 60 bytes"


def not_a_file(folder):
    return folder / "nothing.onnx", "does not exist"


def a_folder(folder):
    return folder, "is a directory"


def empty(folder):
    (folder / "e.onnx").write_bytes(b"")
    return folder / "e.onnx", "is empty"


def text(folder):
    (folder / "t.onnx").write_text("not a model\n" * 9)
    return folder / "t.onnx", "is not an ONNX model"


def cut(folder):
    (folder / "c.onnx").write_bytes(linear().SerializeToString()[:-40])
    return folder / "c.onnx", "is not an ONNX model, or is truncated"


def dangling(folder):
    proto = linear()
    proto.graph.node[1].input[0] = "q"
    (folder / "d.onnx").write_bytes(proto.SerializeToString())
    return folder / "d.onnx", "value 'q' is read but nothing in the graph produces it"


def twice(folder):
    proto = linear()
    proto.graph.node[1].output[0] = "p"
    (folder / "d.onnx").write_bytes(proto.SerializeToString())
    return folder / "d.onnx", "not valid ONNX: Output 'p' is redeclared"


def no_graph(folder):
    (folder / "n.onnx").write_bytes(onnx.ModelProto(ir_version=8).SerializeToString())
    return folder / "n.onnx", "holds no graph or imports no operator set"


BAD = [absolute, parent, through_a_link, truncated, absent, wrong_length, not_a_file, a_folder, empty, text, cut, dangling, twice, no_graph]


@pytest.mark.parametrize("make", BAD, ids=lambda f: f.__name__)
def test_a_bad_file_is_refused_in_one_line(tmp_path, make):
    path, reason = make(tmp_path)
    with pytest.raises(ModelError) as error:
        from_onnx(path)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_from_onnx_names_what_it_takes():
    with pytest.raises(ModelError, match="takes a path, an onnx.ModelProto or an onnx_ir.Model, got bytes"):
        from_onnx(b"")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    gm = from_onnx(linear())
    node_of(gm, "Relu").target = torch.ops.aten.relu.default
    with pytest.raises(ModelError):
        save_onnx(gm, path)
    with pytest.raises(ModelError, match="is a directory"):
        save_onnx(from_onnx(linear()), tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        save_onnx(from_onnx(linear()), tmp_path / "no" / "m.onnx")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


# Targets


def test_an_operator_is_one_object_through_copies_and_pickles():
    assert op("Relu", version=18) is op("Relu", version=18) is not op("Relu", version=14)
    fixed = from_onnx(parse('<ir_version: 10, opset_import: ["": 18]> g () => (int64[2] y) { y = Constant <value = int64[2] {3, 4}> () }'))
    target = node_of(fixed, "Constant").target
    for one in (op("Gemm", version=13, outputs=1), target):
        assert copy.deepcopy(one) is one and copy.copy(one) is one and pickle.loads(pickle.dumps(one)) is one
    assert fixed()[0].tolist() == [3, 4]


def test_an_operator_with_a_tensor_goes_with_its_graph():
    def constant():
        return from_onnx(
            parse('<ir_version: 10, opset_import: ["": 18]> g () => (int64[2] y) { y = Constant <value = int64[2] {5, 6}> () }')
        )

    first, second = constant(), constant()
    assert node_of(first, "Constant").target is node_of(second, "Constant").target
    gone = weakref.ref(node_of(first, "Constant").target)
    del first, second
    gc.collect()
    assert gone() is None


def test_generated_code_names_operators_and_keeps_odd_attributes_out():
    proto = linear()
    proto.graph.node[2].attribute.extend(
        [helper.make_attribute("lambda", 1), helper.make_attribute("a b", "c"), helper.make_attribute("f", float("inf"))]
    )
    gm = from_onnx(proto)
    assert "MatMul(x" in gm.code and "f = inf" in gm.code
    assert {name for name, _ in node_of(gm, "Relu").target.fixed} == {"lambda", "a b"}
    assert equal(to_proto(gm), proto)
