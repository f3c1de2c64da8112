"""aten graph -> ONNX dialect: names, symbolic dims, integer weights and qg ops arrive as they left."""

import contextlib
import io
import operator
import warnings
from collections import Counter

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

import qgraph.ops  # noqa: F401
from qgraph.capture import capture
from qgraph.errors import LoweringError
from qgraph.ledger import state
from qgraph.onnx_io import to_proto
from qgraph.onnx_ops import OnnxOp
from qgraph.passes import FoldConstants
from qgraph.text import path_of
from qgraph.torch_export import to_onnx_dialect
from qgraph.views import operands

qg = torch.ops.qgraph
BATCH = Dim("batch", min=1, max=64)


def run(gm: GraphModule, *args: Tensor) -> list[Tensor]:
    """ONNX Runtime without optimizations is the oracle."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(to_proto(gm).SerializeToString(), options)
    feeds = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(o) for o in session.run(None, feeds)]


def kinds(gm: GraphModule) -> Counter[str]:
    return Counter(n.target.op_type for n in gm.graph.nodes if isinstance(n.target, OnnxOp))


def constants(gm: GraphModule) -> dict[str, Tensor]:
    return {path_or_name(n): gm.get_buffer(n.target) if n.target in dict(gm.named_buffers()) else gm.get_parameter(n.target)
            for n in gm.graph.find_nodes(op="get_attr")}  # fmt: skip


def path_or_name(node: torch.fx.Node) -> str:
    return str(node.meta["onnx_value"].name)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor, *, scale: Tensor | None = None, flag: bool = False) -> dict[str, Tensor]:
        y = self.norm(self.fc(x))
        return {"hidden": y, "score": torch.relu(y).sum(-1) if scale is None else y.sum(-1) * scale}


def test_a_float_module_keeps_its_numbers_names_and_dimensions() -> None:
    module, x, scale = Head().eval(), torch.randn(3, 7, 6), torch.randn(3, 7)
    gm = to_onnx_dialect(capture(module, {"x": x, "scale": scale}, {"x": {0: BATCH}, "scale": {0: BATCH}}))
    proto = to_proto(gm)
    assert [i.name for i in proto.graph.input] == ["x", "scale"]
    assert [o.name for o in proto.graph.output] == ["hidden", "score"] == list(state(gm).output_names)
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*proto.graph.input, *proto.graph.output)]
    assert dims == [["batch", 7, 6], ["batch", 7], ["batch", 7, 5], ["batch", 7]]
    for n in (3, 11):
        x, scale = torch.randn(n, 7, 6), torch.randn(n, 7)
        want = module(x, scale=scale)
        torch.testing.assert_close(run(gm, x, scale), [want["hidden"], want["score"]], rtol=1e-5, atol=1e-5)


def test_operators_stay_whole_in_the_smallest_opset() -> None:
    class Gelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.gelu(x, approximate="tanh")

    plain = to_onnx_dialect(capture(Head(), torch.randn(2, 6)))
    gelu = to_onnx_dialect(capture(Gelu(), torch.randn(2, 6)))
    assert kinds(plain)["LayerNormalization"] == 1 and kinds(gelu) == {"Gelu": 1}
    assert [to_proto(g).opset_import[0].version for g in (plain, gelu)] == [18, 20]
    assert to_proto(to_onnx_dialect(capture(Head(), torch.randn(2, 6)), opset=21)).opset_import[0].version == 21


def test_weights_keep_their_names_layout_and_memory() -> None:
    module = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 40)).eval()
    gm = to_onnx_dialect(capture(module, torch.randn(2, 3, 40)))
    found = constants(gm)
    for name, parameter in module.named_parameters():
        assert found[name].data_ptr() == parameter.data_ptr(), name
        assert found[name].shape == parameter.shape


def test_padding_merges_into_the_convolution_and_batch_norm_does_not() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
            nn.init.normal_(self.norm.running_mean)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu6(self.norm(self.conv(nn.functional.pad(x, (0, 1, 0, 1)))))

    module, x = Padded().eval(), torch.randn(2, 3, 8, 8)
    gm = to_onnx_dialect(capture(module, x))
    assert kinds(gm)["Conv"] == kinds(gm)["BatchNormalization"] == 1 and "Pad" not in kinds(gm)
    assert constants(gm)["conv.weight"].data_ptr() == module.conv.weight.data_ptr()
    torch.testing.assert_close(run(gm, x), [module(x)], rtol=1e-4, atol=1e-4)


def test_nodes_are_named_after_their_module_and_carry_no_source() -> None:
    gm = to_onnx_dialect(capture(Head(), torch.randn(2, 3, 6)))
    nodes = [n for n in gm.graph.nodes if isinstance(n.target, OnnxOp)]
    names = {n.target.op_type: path_of(n) for n in nodes}
    assert names["MatMul"] == "fc/MatMul" and names["LayerNormalization"] == "norm/LayerNormalization"
    assert len({path_of(n) for n in nodes}) == len(nodes)
    assert b"forward" not in to_proto(gm).SerializeToString()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(300, 16), nn.Linear(16, 300)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_tied_weights_stay_one_initializer() -> None:
    gm = to_onnx_dialect(capture(Tied(), torch.randint(0, 300, (2, 5))))
    assert [i.name for i in to_proto(gm).graph.initializer if list(i.dims) in ([300, 16], [16, 300])] == ["embed.weight"]
    assert state(gm).tied == (("embed.weight", "head.weight"),)


class Quantized(nn.Module):
    """Every kind of argument: integer weights, absent zero points, axis and group, several results."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.register_buffer("weight", torch.randint(-127, 128, (48, 32), generator=g, dtype=torch.int8))
        self.register_buffer("w_scale", torch.rand(48, generator=g).to(dtype) * 0.02 + 0.01)
        self.register_buffer("group_scale", torch.rand(48, 4, generator=g).to(dtype) * 0.02 + 0.01)
        self.register_buffer("group_zero", torch.randint(-3, 4, (48, 4), generator=g, dtype=torch.int8))
        self.register_buffer("scale", torch.tensor(0.05, dtype=dtype))
        self.register_buffer("zero", torch.tensor(117, dtype=torch.uint8))
        self.bias = nn.Parameter(torch.randn(48, generator=g).to(dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = qg.dequantize(qg.quantize(x, self.scale, self.zero, "uint8"), self.scale, self.zero, "uint8")
        y = nn.functional.linear(x, qg.dequantize(self.weight, self.w_scale, None, "int8", axis=0), self.bias)
        q, s, z = qg.dynamic_quantize(x, "uint8", False)
        w = qg.dequantize(self.weight, self.group_scale, self.group_zero, "int8", 1, group=8)
        return y, qg.dequantize(q, s, z, "uint8") @ w.transpose(0, 1)


def test_qg_ops_come_back_with_equal_arguments() -> None:
    source = capture(Quantized(), torch.randn(3, 4, 32), {"x": {0: BATCH}})
    gm = to_onnx_dialect(source)
    ours = [n for n in source.graph.nodes if str(n.target).startswith("qgraph.")]
    back = [n for n in gm.graph.nodes if str(n.target).startswith("qgraph.")]
    assert [n.target for n in back] == [n.target for n in ours] and len(back) == 6

    def plain(node: torch.fx.Node) -> dict[str, object]:
        return {k: v for k, v in operands(node).items() if not isinstance(v, torch.fx.Node)}

    assert [plain(n) for n in back] == [plain(n) for n in ours]
    assert [len([u for u in n.users if u.target is operator.getitem]) for n in back if "dynamic" in str(n.target)] == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_integer_weights_stay_integers_once_and_in_place(dtype: torch.dtype) -> None:
    module = Quantized(dtype).eval()
    x = torch.randn(3, 4, 32).to(dtype)
    gm = to_onnx_dialect(capture(module, x, {"x": {0: BATCH}}))
    found = constants(gm)
    assert found["weight"].dtype == torch.int8 and found["weight"].data_ptr() == module.weight.data_ptr()
    assert [k for k, v in found.items() if v.shape in ((48, 32), (32, 48))] == ["weight"]
    assert found["group_scale"].dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for n in (3, 5):
        x = torch.randn(n, 4, 32).to(dtype)
        torch.testing.assert_close(gm(x), module(x), rtol=tolerance, atol=tolerance)


def test_fused_qg_ops_pass_through() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("w", torch.randint(-100, 100, (4, 3, 3, 3), dtype=torch.int8))
            self.register_buffer("s", torch.rand(4) * 0.01 + 0.01)
            self.register_buffer("b", torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return qg.dequant_conv(x, self.w, self.s, None, self.b, "int8", [2, 1], [1, 0, 1, 2], [1, 1], 1)

    module, x = Fused(), torch.randn(2, 3, 8, 9)
    gm = to_onnx_dialect(capture(module, x))
    node = next(n for n in gm.graph.nodes if n.target is qg.dequant_conv.default)
    assert operands(node)["padding"] == [1, 0, 1, 2] and operands(node)["stride"] == [2, 1] and operands(node)["zero_point"] is None
    torch.testing.assert_close(gm(x)[0], module(x))


def test_outputs_may_be_inputs_repeated_or_absent() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, relu: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
            y = torch.relu(x) + relu
            return y, x, None, y

    x, r = torch.randn(2, 3), torch.randn(2, 3)
    gm = to_onnx_dialect(capture(Odd(), (x, r)))
    got = run(gm, x, r)
    assert [i.name for i in to_proto(gm).graph.input] == ["x", "relu"]
    assert [o.name for o in to_proto(gm).graph.output] == ["output_0", "output_1", "output_3"]
    torch.testing.assert_close(got, [torch.relu(x) + r, x, torch.relu(x) + r])


def test_a_stored_tensor_named_like_a_computed_value_is_not_taken_for_it() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Buffer(torch.tensor([[1, 2]])), nn.Buffer(torch.tensor([[3, 4]]))

        def forward(self, x: Tensor) -> Tensor:
            stored = torch.cat([self.a, self.b])
            return torch.cat([x, x + 1]) * stored

    x = torch.randn(1, 2)
    gm = capture(Folded(), (x,))
    FoldConstants()(gm)
    assert "cat" in dict(gm.named_buffers())  # and torch.export calls the other node so
    torch.testing.assert_close(run(to_onnx_dialect(gm), x)[0], Folded()(x))


def test_the_exporter_is_quiet() -> None:
    out, err = io.StringIO(), io.StringIO()
    gm = capture(Head(), torch.randn(2, 6))
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.simplefilter("error")
        to_onnx_dialect(gm)
    assert out.getvalue() == "" and err.getvalue() == ""


def test_an_operator_without_translation_is_named() -> None:
    class Rare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x) + 1

    with pytest.raises(LoweringError, match="bessel_j0.*qgraph.from_onnx") as caught:
        to_onnx_dialect(capture(Rare(), torch.randn(3)))
    assert "\n" not in str(caught.value)


def test_a_graph_without_example_inputs_is_refused() -> None:
    gm = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(LoweringError, match="example inputs"):
        to_onnx_dialect(gm)
