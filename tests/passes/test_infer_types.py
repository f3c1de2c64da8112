"""Types are completed, never changed, and nothing needs them to be complete."""

import numpy as np
import onnx
import torch

from qgraph.onnx_io import from_onnx as load
from qgraph.onnx_io import to_proto
from qgraph.passes import InferTypes
from qgraph.pipeline import Context
from qgraph.text import text
from qgraph.types import TensorType, type_of
from qgraph.views import Linear, view


def parse(body, inputs="float[N,4] x", outputs="float[M,3] y", **constants):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21, "my": 1]> g ({inputs}) => ({outputs}) {{ {body} }}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())
    return load(proto)


def test_ranks_of_products_become_known():
    gm = parse("t = Transpose (x) p = MatMul (x, t) y = Relu (p)", outputs="float[N,N] y")
    product = next(n for n in gm.graph.nodes if n.op == "call_function" and n.target.op_type == "MatMul")
    assert view(Linear, product) is None  # rank 1 has no output axis, and nothing says that it is not
    assert InferTypes().run(gm, Context()) == 2
    assert type_of(product) == TensorType("float32", ("N", "N")) and view(Linear, product) is not None
    assert InferTypes().run(gm, Context()) == 0


def test_shapes_are_followed_through_small_constants_and_weights_of_any_size():
    gm = parse(
        "r = Reshape (x, s) h = MatMul (r, w) y = Relu (h)",
        outputs="float[A,B,300] y",
        s=np.array([-1, 2, 2]),
        w=np.ones((2, 300), np.float32),
    )
    InferTypes()(gm)
    assert [type_of(n).shape[1:] for n in gm.graph.nodes if n.op == "call_function"] == [(2, 2), (2, 300), ("B", 300)]
    torch.testing.assert_close(gm(torch.ones(3, 4))[0], torch.full((3, 2, 300), 2.0))


def test_what_is_declared_stays_and_the_file_stays_valid():
    gm = parse("a, b = Split <num_outputs = 2, axis = 1> (x) y = Concat <axis = 0> (a, b)", outputs="float[rows,2] y")
    InferTypes()(gm)
    assert "f32[N,2] = getitem" in text(gm) and "f32[rows,2] = onnx.Concat" in text(gm)
    onnx.checker.check_model(to_proto(gm), full_check=True)


def test_unknown_ops_and_other_dialects_are_no_obstacle():
    gm = parse("u = my.Thing (x) v = Relu (x) y = Add (u, v)", outputs="float[N,4] y")
    InferTypes()(gm)
    assert "? = my.Thing(%x)" in text(gm) and "f32[N,4] = onnx.Relu(%x)" in text(gm)
    graph = torch.fx.Graph()
    graph.output(torch.ops.aten.relu.default)
    assert InferTypes().run(torch.fx.GraphModule(torch.nn.Module(), graph), Context()) == 0


def test_dimensions_that_inference_only_numbers_stay_unknown():
    gm = load(onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]> g (float[N,3] x) => (float y) {
        z = NonZero (x) f = Cast <to = 1> (z) y = Transpose (f) }"""))  # fmt: skip
    InferTypes().run(gm, Context())
    (cast,) = [n for n in gm.graph.nodes if getattr(n.target, "op_type", "") == "Cast"]
    assert type_of(cast).shape == (2, None)
