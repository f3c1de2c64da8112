"""What each ONNX node means, form by form and opset by opset."""

from dataclasses import fields, replace

import numpy as np
import onnx
import pytest
from torch.fx import Node

from qgraph import onnx_views  # noqa: F401
from qgraph.onnx_io import from_onnx
from qgraph.views import (
    Activation,
    Attention,
    BatchNorm,
    Cast,
    Concat,
    Conv,
    DataMovement,
    Dequantize,
    DynamicQuantize,
    Elementwise,
    Embedding,
    Linear,
    Norm,
    Pad,
    Pool,
    Quantize,
    Softmax,
    view,
)


def parse(text, opset=21, domain="", **values):
    """The FX node of one ONNX node; `values` are input types ("float[2,3]") or constants."""
    proto = onnx.parser.parse_node(text)
    declared = ", ".join(f"{kind} {name}" for name, kind in values.items() if isinstance(kind, str))
    inputs = onnx.parser.parse_graph(f"g ({declared}) => () {{}}").input
    constants = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in values.items() if not isinstance(v, str)]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output]
    graph = onnx.helper.make_graph([proto], "g", inputs, outputs, constants)
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    gm = from_onnx(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10))
    found = [n for n in gm.graph.nodes if n.op == "call_function" and hasattr(n.target, "key")]
    assert len(found) == 1
    return found[0]


def named(value):
    """Nodes replaced by their names, so that an expected view can be written down."""
    if isinstance(value, Node):
        return value.name
    return tuple(map(named, value)) if isinstance(value, tuple) else value


def seen(interface, text, opset=21, **values):
    v = view(interface, parse(text, opset, **values))
    return v and replace(v, **{f.name: named(getattr(v, f.name)) for f in fields(v)})


def approx(value):
    return pytest.approx(value, rel=1e-6)


X4 = "float[2,6,8,10]"


def ones(*shape):
    return np.ones(shape, np.float32)


def test_matmul_contracts_the_last_axis_of_x_with_the_second_last_of_the_weight():
    assert seen(Linear, "y = MatMul (x, w)", x="float[2,3,4]", w=ones(4, 5)) == Linear("x", "w", None, in_axis=-2, out_axis=-1)
    assert seen(Linear, "y = MatMul (q, k)", q="float[2,8,3,4]", k="float[2,8,4,3]") == Linear("q", "k", None, in_axis=-2, out_axis=-1)


def test_matmul_with_a_vector_or_an_operand_of_unknown_rank_is_not_linear():
    assert seen(Linear, "y = MatMul (x, w)", x="float[3,4]", w=ones(4)) is None
    gm_node = parse("y = MatMul (x, w)", x="float[3,4]", w="float[4,4]")
    gm_node.args[1].meta.clear()
    assert view(Linear, gm_node) is None


@pytest.mark.parametrize(
    ("attributes", "axes"),
    [
        ("", dict(in_axis=-2, out_axis=-1)),
        ("<transB = 1>", dict(in_axis=-1, out_axis=-2)),
        ("<transA = 1, alpha = 0.5, beta = 2.0>", dict(in_axis=-2, out_axis=-1, x_axis=-2, alpha=0.5, beta=2.0)),
    ],
)
def test_gemm_names_its_axes_and_factors(attributes, axes):
    assert seen(Linear, f"y = Gemm {attributes} (x, w, b)", x="float[4,4]", w=ones(4, 4), b=ones(4)) == Linear("x", "w", "b", **axes)


def test_conv_fills_in_what_the_attributes_leave_out():
    got = seen(Conv, "y = Conv (x, w)", x=X4, w=ones(7, 6, 3, 5))
    assert got == Conv("x", "w", None, (1, 1), ((0, 0), (0, 0)), (1, 1), 1, False, (0, 0), out_axis=-4, in_axis=-3)


def test_grouped_conv_keeps_asymmetric_padding_stride_and_dilation():
    text = "y = Conv <group = 3, pads = [1, 2, 3, 4], strides = [2, 1], dilations = [1, 2]> (x, w, b)"
    got = seen(Conv, text, x=X4, w=ones(9, 2, 3, 5), b=ones(9))
    assert got == Conv("x", "w", "b", (2, 1), ((1, 3), (2, 4)), (1, 2), 3, False, (0, 0), out_axis=-4, in_axis=-3)


@pytest.mark.parametrize(
    ("mode", "stride", "size", "padding"),
    [
        ("SAME_UPPER", 1, "N", ((2, 2), (0, 1))),
        ("SAME_LOWER", 1, "N", ((2, 2), (1, 0))),
        ("SAME_UPPER", 2, "8", ((1, 2), (0, 0))),
        ("SAME_LOWER", 2, "8", ((2, 1), (0, 0))),
        ("SAME_UPPER", 2, "N", None),
        ("VALID", 2, "N", ((0, 0), (0, 0))),
    ],
)
def test_automatic_padding_is_computed_where_the_size_allows(mode, stride, size, padding):
    text = f'y = Conv <auto_pad = "{mode}", strides = [{stride}, {stride}], kernel_shape = [5, 2]> (x, w)'
    assert seen(Conv, text, x=f"float[2,6,{size},{size}]", w=ones(7, 6, 5, 2)).padding == padding


def test_transposed_conv_swaps_the_weight_axes():
    text = "y = ConvTranspose <group = 2, strides = [2, 2], output_padding = [1, 0], pads = [1, 0, 1, 0]> (x, w, b)"
    got = seen(Conv, text, x=X4, w=ones(6, 4, 3, 3), b=ones(8))
    assert got == Conv("x", "w", "b", (2, 2), ((1, 1), (0, 0)), (1, 1), 2, True, (1, 0), out_axis=-3, in_axis=-4)


@pytest.mark.parametrize("attributes", ['auto_pad = "SAME_UPPER"', "output_shape = [16, 20]"])
def test_transposed_conv_that_derives_its_padding_has_none(attributes):
    assert seen(Conv, f"y = ConvTranspose <strides = [2, 2], {attributes}> (x, w)", x=X4, w=ones(6, 4, 3, 3)).padding is None


STATS = dict(s=ones(6), b=ones(6), m=ones(6), v=ones(6))


def test_batch_norm_in_inference():
    expect = BatchNorm("x", "s", "b", "m", "v", approx(1e-3))
    assert seen(BatchNorm, "y = BatchNormalization <epsilon = 0.001> (x, s, b, m, v)", x=X4, **STATS) == expect
    assert seen(BatchNorm, "y = BatchNormalization <epsilon = 0.001, is_test = 1> (x, s, b, m, v)", 6, x=X4, **STATS) == expect


def test_batch_norm_in_training_has_no_view():
    assert seen(BatchNorm, "y, a, c = BatchNormalization <training_mode = 1> (x, s, b, m, v)", x=X4, **STATS) is None
    assert seen(BatchNorm, "y = BatchNormalization (x, s, b, m, v)", 6, x=X4, **STATS) is None


@pytest.mark.parametrize(
    ("text", "opset", "expect"),
    [
        ("y = LayerNormalization (x, s, b)", 17, Norm("layer", "x", "s", "b", (-1,), approx(1e-5))),
        ("y = LayerNormalization <axis = 2, epsilon = 0.01> (x, s)", 17, Norm("layer", "x", "s", None, (-2, -1), approx(1e-2))),
        ("y = RMSNormalization <axis = -2> (x, s)", 23, Norm("rms", "x", "s", None, (-2, -1), approx(1e-5))),
        ("y = GroupNormalization <num_groups = 3> (x, s, b)", 21, Norm("group", "x", "s", "b", (), approx(1e-5))),
        ("y = GroupNormalization <num_groups = 3> (x, s, b)", 18, None),
        ("y = InstanceNormalization (x, s, b)", 21, Norm("instance", "x", "s", "b", (-2, -1), approx(1e-5))),
        ("y, m, v = LayerNormalization (x, s, b)", 17, None),
    ],
)
def test_norms_name_their_axes(text, opset, expect):
    assert seen(Norm, text, opset, x=X4, s=ones(6), b=ones(6)) == expect


@pytest.mark.parametrize(
    ("text", "expect"),
    [
        ("y = Add (x, c)", Elementwise("add", ("x", "c"))),
        ("y = Sum (x, c, x)", Elementwise("add", ("x", "c", "x"))),
        ("y = Div (x, c)", Elementwise("div", ("x", "c"))),
        ("y = Where (m, x, c)", Elementwise("where", ("m", "x", "c"))),
    ],
)
def test_arithmetic_keeps_the_order_of_its_operands(text, expect):
    assert seen(Elementwise, text, x="float[2,3]", c=ones(3), m="bool[2,3]") == expect


def test_aligned_broadcast_of_opset_6_has_no_view():
    assert seen(Elementwise, "y = Add <broadcast = 1, axis = 1> (x, c)", 6, x=X4, c=ones(6)) is None
    assert seen(Elementwise, "y = Add <broadcast = 1> (x, c)", 6, x=X4, c=ones(10)) == Elementwise("add", ("x", "c"))


@pytest.mark.parametrize(
    ("text", "opset", "expect"),
    [
        ("y = Relu (x)", 14, Activation("relu", "x", 0.0)),
        ("y = HardSwish (x)", 14, Activation("hard_swish", "x", -0.375)),
        ("y = Tanh (x)", 14, Activation("tanh", "x", -1.0, 1.0)),
        ("y = Elu <alpha = 0.5> (x)", 14, Activation("elu", "x", -0.5)),
        ("y = Gelu (x)", 20, Activation("gelu", "x", -0.17005)),
        ('y = Gelu <approximate = "tanh"> (x)', 20, Activation("gelu_tanh", "x", -0.17005)),
        ("y = Clip (x, low, high)", 13, Activation("clip", "x", -1.0, 6.0)),
        ("y = Clip (x, , high)", 13, Activation("clip", "x", None, 6.0)),
        ("y = Clip (x, x0)", 13, None),
        ("y = Clip <min = -1.0, max = 6.0> (x)", 6, Activation("clip", "x", -1.0, 6.0)),
    ],
)
def test_activations_know_their_bounds(text, opset, expect):
    assert seen(Activation, text, opset, x=X4, x0="float", low=np.float32(-1), high=np.float32(6)) == expect


@pytest.mark.parametrize(
    ("text", "opset", "expect"),
    [
        ("y = Reshape (x, shape)", 21, DataMovement("reshape", "x")),
        ("y = Transpose <perm = [0, 2, 3, 1]> (x)", 21, DataMovement("transpose", "x", (0, 2, 3, 1))),
        ("y = Transpose (x)", 21, DataMovement("transpose", "x", (3, 2, 1, 0))),
        ("y = Slice <starts = [1], ends = [2]> (x)", 9, DataMovement("slice", "x")),
        ("y = Gather <axis = 1> (x, index)", 21, DataMovement("gather", "x")),
        ("a, b = Split <axis = 1, num_outputs = 2> (x)", 21, DataMovement("split", "x")),
        ("y = Identity (x)", 21, DataMovement("copy", "x")),
        ("y = Dropout (x)", 21, DataMovement("copy", "x")),
        ("y = Dropout (x, ratio, train)", 21, None),
        ("y = DepthToSpace <blocksize = 2> (x)", 21, DataMovement("depth_to_space", "x")),
        ('y = Pad <mode = "reflect"> (x, pads)', 21, DataMovement("gather", "x")),
        ('y = Resize <mode = "nearest"> (x, , scales)', 21, DataMovement("gather", "x")),
        ('y = Resize <mode = "linear"> (x, , scales)', 21, None),
    ],
)
def test_data_movement_is_seen_at_its_data_operand(text, opset, expect):
    shape, index, pads = np.array([2, 6, 80]), np.array([0, 3]), np.array([0, 0, 1, 1, 0, 0, 1, 1])
    constants = dict(shape=shape, index=index, pads=pads, ratio=np.float32(0.5), train=np.bool_(True), scales=ones(4))
    assert seen(DataMovement, text, opset, x=X4, **constants) == expect


def test_gather_of_rows_of_a_constant_table_is_an_embedding():
    values = dict(w=ones(10, 4), i="int64[2,3]")
    assert seen(Embedding, "y = Gather (w, i)", **values) == Embedding("w", "i")
    assert seen(DataMovement, "y = Gather (w, i)", **values) is None
    assert seen(Embedding, "y = Gather <axis = 1> (w, i)", **values) is None
    assert seen(Embedding, "y = Gather (t, i)", t="float[10,4]", i="int64[2,3]") is None


def test_a_dequantized_table_is_still_an_embedding():
    gm = from_onnx(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        g (int64[2] i) => (float[2,2] y) <int8[3,2] q = {1, 4, 2, 5, 3, 6}, float s = {0.5}> {
            w = DequantizeLinear (q, s)
            y = Gather (w, i) }""")
    )
    gather = next(n for n in gm.graph.nodes if n.op == "call_function" and n.target.key == "::Gather")
    assert view(Embedding, gather) == Embedding(gather.args[0], gather.args[1])


def test_concat_and_pools():
    assert seen(Concat, "y = Concat <axis = -2> (a, b)", a="float[2,3]", b="float[4,3]") == Concat(("a", "b"), -2)
    assert seen(Pool, "y = MaxPool <kernel_shape = [2, 2]> (x)", x=X4) == Pool("max", "x")
    assert seen(Pool, "y, i = MaxPool <kernel_shape = [2, 2]> (x)", x=X4) is None
    assert seen(Pool, "y = GlobalAveragePool (x)", x=X4) == Pool("global_average", "x")


@pytest.mark.parametrize(
    ("text", "opset", "shape", "expect"),
    [
        ("y = ReduceMean <axes = [2, 3], keepdims = 0> (x)", 13, X4, Pool("global_average", "x")),
        ("y = ReduceMean (x, axes)", 18, X4, Pool("global_average", "x")),
        ("y = ReduceMean <axes = [1, 2]> (x)", 13, X4, None),
        ("y = ReduceMean <axes = [-1]> (x)", 13, "float[2,3,4]", None),
    ],
)
def test_mean_over_all_spatial_axes_is_global_pooling(text, opset, shape, expect):
    assert seen(Pool, text, opset, x=shape, axes=np.array([-1, -2])) == expect


PADS = np.array([0, 0, 1, 2, 0, 0, 3, 4])
PAIRS = ((0, 0), (0, 0), (1, 3), (2, 4))


@pytest.mark.parametrize(
    ("text", "opset", "expect"),
    [
        ("y = Pad <pads = [0, 0, 1, 2, 0, 0, 3, 4], value = 1.5> (x)", 10, Pad("x", PAIRS, 1.5)),
        ("y = Pad (x, pads)", 13, Pad("x", PAIRS, 0.0)),
        ("y = Pad (x, pads, value)", 13, Pad("x", PAIRS, 1.5)),
        ("y = Pad (x, two, , axes)", 18, Pad("x", ((0, 0), (0, 0), (5, 6), (0, 0)), 0.0)),
        ("y = Pad (x, computed)", 18, Pad("x", None, 0.0)),
        ('y = Pad <mode = "edge"> (x, pads)', 18, None),
    ],
)
def test_constant_padding_lists_every_axis(text, opset, expect):
    constants = dict(pads=PADS, value=np.float32(1.5), two=np.array([5, 6]), axes=np.array([-2]))
    assert seen(Pad, text, opset, x=X4, computed="int64[8]", **constants) == expect


@pytest.mark.parametrize(
    ("text", "opset", "expect"),
    [
        ("y = Softmax (x)", 13, Softmax("x", -1)),
        ("y = LogSoftmax <axis = 1> (x)", 13, Softmax("x", 1, log=True)),
        ("y = Softmax <axis = 3> (x)", 11, Softmax("x", 3)),
        ("y = Softmax (x)", 11, None),
    ],
)
def test_softmax_over_flattened_axes_has_no_view(text, opset, expect):
    assert seen(Softmax, text, opset, x=X4) == expect


def test_attention_in_its_plain_form():
    values = dict(q="float[2,4,3,8]", k="float[2,4,5,8]", v="float[2,4,5,8]", m="bool[3,5]", one="float[2,1,5,8]")
    text = "y = Attention <scale = 0.25, is_causal = 1> (q, k, v, m)"
    assert seen(Attention, text, 23, **values) == Attention("q", "k", "v", "m", 0.25, True)
    assert seen(Attention, "y = Attention (q, k, v)", 23, **values) == Attention("q", "k", "v", None, None, False)
    assert seen(Attention, "y = Attention (q, one, one)", 23, **values) is None
    assert seen(Attention, "y = Attention <softcap = 5.0> (q, k, v)", 23, **values) is None


def test_casts_name_the_torch_type():
    assert seen(Cast, "y = Cast <to = 10> (x)", x="float[2]") == Cast("x", "float16")
    assert seen(Cast, "y = Cast <to = 11> (x)", x="float[2]") == Cast("x", "float64")
    assert seen(Cast, "y = CastLike (x, t)", x="float[2]", t="int64[3]") == Cast("x", "int64")


SCALES = dict(scale=np.float32(0.5), per_channel=ones(6), blocks=ones(2, 2), one=ones(1))


@pytest.mark.parametrize(
    ("text", "opset", "expect"),
    [
        ("y = QuantizeLinear (x, scale, z8)", 10, Quantize("x", "scale", "z8", "int8", None, 0)),
        ("y = QuantizeLinear (x, scale)", 10, Quantize("x", "scale", None, "uint8", None, 0)),
        ("y = QuantizeLinear (x, one, z8)", 13, Quantize("x", "one", "z8", "int8", None, 0)),
        ("y = QuantizeLinear (x, per_channel, z6)", 13, Quantize("x", "per_channel", "z6", "uint8", 1, 0)),
        ("y = QuantizeLinear <axis = 0, output_dtype = 5> (x, per_channel)", 21, Quantize("x", "per_channel", None, "int16", 0, 0)),
        ("y = QuantizeLinear <axis = 1, block_size = 3> (m, blocks)", 21, Quantize("m", "blocks", None, "uint8", 1, 3)),
        ("y = QuantizeLinear <output_dtype = 17> (x, scale)", 21, None),
    ],
)
def test_quantize_linear(text, opset, expect):
    zeros = dict(z8=np.int8(3), z6=np.full(6, 128, np.uint8))
    assert seen(Quantize, text, opset, x=X4, m="float[2,6]", **SCALES, **zeros) == expect


@pytest.mark.parametrize(
    ("text", "expect"),
    [
        ("y = DequantizeLinear (q, scale, z)", Dequantize("q", "scale", "z", "uint8", None, 0)),
        ("y = DequantizeLinear <axis = 0> (b, per_channel)", Dequantize("b", "per_channel", None, "int32", 0, 0)),
        ("y = DequantizeLinear <axis = -1, block_size = 3> (q, blocks)", Dequantize("q", "blocks", None, "uint8", -1, 3)),
    ],
)
def test_dequantize_linear(text, expect):
    assert seen(Dequantize, text, q="uint8[2,6]", b="int32[6]", z=np.uint8(3), **SCALES) == expect


def test_microsoft_quantize_linear_and_dynamic_quantization():
    node = parse("y = com.microsoft.QuantizeLinear (x, scale, z)", x=X4, scale=np.float32(0.5), z=np.uint16(3))
    assert view(Quantize, node).dtype == "uint16"
    expect = DynamicQuantize("x", "uint8", False, None, 0)
    assert seen(DynamicQuantize, "y, s, z = DynamicQuantizeLinear (x)", x=X4) == expect


def test_an_unknown_op_has_no_view():
    node = parse("y = com.microsoft.QuickGelu (x)", x=X4)
    assert not any(view(interface, node) for interface in (Activation, Linear, DataMovement, Elementwise))
