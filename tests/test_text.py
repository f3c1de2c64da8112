"""The printed form, the diff of two graphs, and names for users."""

import onnx
import torch
from torch.fx import Graph, GraphModule

from qgraph.onnx_io import from_onnx
from qgraph.testing import from_torch
from qgraph.text import describe, diff, path_of, text, where

ATEN = torch.ops.aten
X = torch.linspace(-1, 1, 6).view(2, 3)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 4), torch.nn.Linear(4, 5, bias=False)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        low, high = torch.aminmax(x, dim=1)
        return {"low": low, "high": high.to(torch.float16), "x": x[:, :2]}


def parse(source):
    return from_onnx(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(source)))


def test_a_captured_graph_prints_types_constants_and_several_outputs():
    assert text(from_torch(Net(), X)[0]).splitlines()[:4] == [
        "%0: f32[2,4] = aten.linear(%x, @layers.0.weight, @layers.0.bias)",
        "%1: f32[2,5] = aten.linear(%0, @layers.1.weight)",
        "%2: (f32[2], f32[2]) = aten.aminmax(%1, dim=1)",
        "%3: f32[2] = getitem(%2, 0)",
    ]


def test_dtypes_and_slices_and_returned_values_print_shortly():
    lines = text(from_torch(Net(), X)[0]).splitlines()
    assert "float16" in lines[5] and "torch." not in lines[5]
    assert lines[-1].startswith("return %3, %5, %")


def test_symbolic_sizes_print_by_name():
    n = torch.export.Dim("n", min=2, max=9)
    from qgraph.capture import capture

    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0] * 3) + 1.5

    lines = text(capture(Flat(), (X,), {"x": {0: n}})).splitlines()
    assert any(": int = " in line for line in lines)
    assert lines[-2].endswith(", 1.5)") and "f32[3*" in lines[-2]


def test_an_onnx_graph_prints_ops_attributes_and_dimension_names():
    gm = parse("""
        <ir_version: 10, opset_import: ["": 21, "com.acme": 1]>
        g (float[N,3] x) => (float[N,4] y) <float[4,3] w = {1,2,3,4,5,6,7,8,9,10,11,12}> {
            h = Gemm <transB = 1, alpha = 0.5> (x, w)
            y = com.acme.Twist <how = "left"> (h)
        }""")
    assert text(gm).splitlines() == [
        "%0: f32[N,4] = onnx.Gemm(%x, @w, alpha=0.5, transB=1)",
        "%1: f32[N,4] = com.acme.Twist(%0, how='left')",
        "return %1",
    ]


IF = """
    <ir_version: 10, opset_import: ["": 21]>
    g (bool c, float[2,3] x) => (float[2,3] y) {
        h = Neg (x)
        y = If (c) <then_branch = t () => (float[2,3] a) { k = Abs (h) a = Add (k, h) },
                    else_branch = e () => (float[2,3] b) { b = Relu (h) }>
    }"""


def test_bodies_are_printed_indented_after_their_call():
    lines = text(parse(IF)).splitlines()
    start = next(i for i, line in enumerate(lines) if "onnx.If(%c, " in line)
    assert lines[start + 1].startswith("  @then_branch(") and lines[start + 2] == "    %0: f32[2,3] = onnx.Abs(%h)"
    assert lines[start + 3] == "    %1: f32[2,3] = onnx.Add(%0, %h)"
    assert lines[start + 4] == "    return %1"
    assert lines[-1] == "return %1"


def test_two_captures_of_one_module_print_the_same():
    module = Net()
    assert text(from_torch(module, X)[0]) == text(from_torch(module, X)[0])


def chain(*targets):
    graph = Graph()
    x = value = graph.placeholder("x")
    for target in targets:
        value = graph.call_function(target, (value, x) if target in (ATEN.add.Tensor, ATEN.sub.Tensor) else (value,))
    graph.output((value,))
    return GraphModule({}, graph)


def test_the_diff_of_equal_graphs_is_empty():
    assert diff(chain(ATEN.neg.default), chain(ATEN.neg.default)) == ""


def test_the_diff_shows_an_inserted_line_and_no_renumbered_ones():
    rest = [ATEN.neg.default, ATEN.relu.default] * 4
    assert diff(chain(*rest), chain(ATEN.abs.default, *rest)).splitlines() == [
        "- %0: ? = aten.neg(%x)",
        "+ %0: ? = aten.abs(%x)",
        "+ %1: ? = aten.neg(%0)",
        "  %2: ? = aten.relu(%1)",
        "  %3: ? = aten.neg(%2)",
        "  %4: ? = aten.relu(%3)",
    ]


def test_the_diff_shows_a_rewired_operand_although_only_its_number_differs():
    def graph(swap):
        g = Graph()
        x = g.placeholder("x")
        a, b = g.call_function(ATEN.neg.default, (x,)), g.call_function(ATEN.abs.default, (x,))
        g.output((g.call_function(ATEN.sub.Tensor, (b, a) if swap else (a, b)),))
        return GraphModule({}, g)

    assert diff(graph(False), graph(True)).splitlines() == [
        "  %0: ? = aten.neg(%x)",
        "  %1: ? = aten.abs(%x)",
        "- %2: ? = aten.sub.Tensor(%0, %1)",
        "+ %2: ? = aten.sub.Tensor(%1, %0)",
        "  return %2",
    ]


def test_the_diff_leaves_out_what_is_far_from_a_change():
    neg = [ATEN.neg.default] * 10
    shown = diff(chain(ATEN.abs.default, *neg, ATEN.relu.default), chain(ATEN.sin.default, *neg, ATEN.cos.default)).splitlines()
    assert "..." in shown
    assert len(shown) == 2 + 3 + 1 + 3 + 2 + 1


def test_paths_are_module_paths_or_onnx_names():
    gm, _ = from_torch(Net(), X)
    linears = [n for n in gm.graph.nodes if n.target is ATEN.linear.default]
    assert [path_of(n) for n in linears] == ["layers.0", "layers.1"]
    node = next(n for n in parse(IF.replace("h = Neg", "[front_neg] h = Neg")).graph.nodes if n.op == "call_function")
    assert path_of(node) == "front_neg"
    node.meta["name"] = "renamed"
    assert path_of(node) == "renamed"
    assert path_of(chain(ATEN.neg.default).graph.output_node()) == "output"


def test_strict_export_paths_lose_their_prefix():
    node = next(iter(chain(ATEN.neg.default).graph.nodes))
    node.meta["nn_module_stack"] = {"0": ("L['self']", Net), "1": ("L['self'].encoder.layer['3'].query", Net)}
    assert path_of(node) == "encoder.layer.3.query"


def test_where_adds_the_users_source_line():
    gm, _ = from_torch(Net(), X)
    linear = next(n for n in gm.graph.nodes if n.target is ATEN.linear.default)
    assert where(linear).startswith("layers.0 (") and where(linear).rstrip(")").rsplit(":", 1)[1].isdigit()
    assert where(chain(ATEN.neg.default).graph.output_node()) == "output"


def test_describe_names_values_as_fx_does():
    gm = chain(ATEN.neg.default, ATEN.add.Tensor)
    assert [describe(n) for n in gm.graph.nodes] == [
        "%x: ?",
        "%neg_default: ? = aten.neg(%x)",
        "%add_tensor: ? = aten.add.Tensor(%neg_default, %x)",
        "return %add_tensor",
    ]
