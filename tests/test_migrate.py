"""Groups of channels that can be scaled freely, found in graphs of both dialects, and what stays equal when they are."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qgraph.diagonal import diagonals
from qgraph.edit import graph_modules
from qgraph.errors import QGraphError
from qgraph.fields import components, reshaped
from qgraph.migrate import migrate, misfit, multiply
from qgraph.passes import SinkConstants
from qgraph.testing import from_onnx, from_torch
from qgraph.text import text
from qgraph.verify import check_graph
from qgraph.views import Linear, view

torch.manual_seed(0)
IMAGE = torch.randn(2, 4, 9, 8)
ROWS = torch.randn(2, 5, 8)


def scaled(start, *args, tol=1e-4):
    """Scales every group of the graph by random factors and checks that it returns what it did; the group sizes."""
    gm, want = start
    sizes = []
    for part in graph_modules(gm):
        for group in diagonals(part).groups:
            sizes.append(group.size)
            migrate(part, group, torch.rand(group.size) * 3 + 0.2)
    check_graph(gm)
    with torch.no_grad():
        got = gm(*args)
    got, want = (v[0] if isinstance(v, tuple | list) else v for v in (got, want))
    assert (got - want).abs().max() <= tol * want.abs().max()
    return sizes


class Fn(nn.Module):
    """Layers by name, and a function of them and the input."""

    def __init__(self, fn, **layers):
        super().__init__()
        self.fn = fn
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.fn(self, x)


@pytest.mark.parametrize(
    "layers, sizes",
    [
        ([nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1)], [6]),
        ([nn.Conv2d(4, 6, 3, groups=2), nn.LeakyReLU(), nn.Conv2d(6, 9, 3, groups=3, bias=False)], [6]),
        ([nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1)], [6, 6]),
        ([nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, stride=2)], [6]),
        ([nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.ZeroPad2d((1, 0, 2, 1)), nn.AvgPool2d(2), nn.Conv2d(6, 3, 1)], [6]),
        ([nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)], [6]),
        ([nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 7 * 6, 3)], [6]),
        ([nn.Conv2d(4, 6, 3), nn.PReLU(6), nn.Conv2d(6, 3, 1)], [6]),
        ([nn.Conv2d(4, 6, 3), nn.ReLU6(), nn.Conv2d(6, 3, 1)], []),
        ([nn.Conv2d(4, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 3, 1)], []),
        ([nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8, affine=False), nn.ReLU(), nn.Conv2d(8, 3, 1)], [8]),
        ([nn.Conv2d(4, 8, 3), nn.PixelShuffle(2), nn.Conv2d(2, 3, 1)], [2]),
    ],
    ids=lambda v: None if isinstance(v[0] if v else 0, int) else "-".join(type(m).__name__ for m in v),
)
def test_torch_chains_keep_their_numbers(layers, sizes):
    assert scaled(from_torch(nn.Sequential(*layers), IMAGE), IMAGE) == sizes


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8, bias=False), nn.RMSNorm(8)], ids=str
)
def test_a_norm_takes_factors_into_its_weight_and_bias(norm):
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.rand(8) + 0.5)
    assert scaled(from_torch(nn.Sequential(norm, nn.Linear(8, 3)), ROWS), ROWS) == [8]


def test_a_residual_sum_is_one_group():
    def residual(m, x):
        y = m.a(x)
        return m.c(y + m.b(torch.relu(y)))

    net = Fn(residual, a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(6, 6, 3, padding=1), c=nn.Conv2d(6, 3, 1))
    start = from_torch(net, IMAGE)
    (group,) = diagonals(start[0]).groups
    assert (len(group.producers), len(group.consumers)) == (2, 2)
    assert scaled(start, IMAGE) == [6]


def test_concatenated_channels_keep_their_places():
    net = Fn(lambda m, x: m.c(torch.cat([torch.relu(m.a(x)), m.b(x)], 1)), a=nn.Conv2d(4, 2, 1), b=nn.Conv2d(4, 3, 1), c=nn.Conv2d(5, 3, 1))
    assert scaled(from_torch(net, IMAGE), IMAGE) == [5]


def test_channels_that_are_split_and_swapped_keep_their_places():
    def swap(m, x):
        a, b = m.a(x).split([2, 4], 1)
        return m.b(torch.cat([b, torch.relu(a)], 1))

    assert scaled(from_torch(Fn(swap, a=nn.Conv2d(4, 6, 1), b=nn.Conv2d(6, 3, 1)), IMAGE), IMAGE) == [6]


def test_a_gate_lets_the_factors_of_the_gated_value_pass():
    net = Fn(lambda m, x: m.c(m.a(x) * torch.sigmoid(m.b(x))), a=nn.Linear(8, 6), b=nn.Linear(8, 6), c=nn.Linear(6, 3))
    start = from_torch(net, ROWS)
    (group,) = diagonals(start[0]).groups
    assert [view(Linear, m.node).weight.target for m in group.producers] == ["a.weight"]
    assert scaled(start, ROWS) == [6]


def test_the_values_of_attention_carry_factors_per_head_channel():
    def attention(m, x):
        q, k, v = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.o((torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).reshape(2, 5, 8))

    net = Fn(attention, **{name: nn.Linear(8, 8) for name in "qkvo"})
    start = from_torch(net, ROWS)
    (group,) = diagonals(start[0]).groups
    assert [view(Linear, m.node).weight.target for m in (*group.producers, *group.consumers)] == ["v.weight", "o.weight"]
    assert scaled(start, ROWS) == [8]


def test_scaled_dot_product_attention_carries_the_factors_of_its_values():
    def attention(m, x):
        q, k, v = (layer(x).view(2, 5, 2, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        return m.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    assert scaled(from_torch(Fn(attention, **{name: nn.Linear(8, 8) for name in "qkvo"}), ROWS), ROWS) == [8]


def test_a_value_that_a_norm_and_a_linear_read_is_fixed_and_says_why():
    def both(m, x):
        y = m.a(x)
        return m.n(y) + m.b(y)

    net = Fn(both, a=nn.Linear(8, 6), b=nn.Linear(6, 6), n=nn.LayerNorm(6))
    found = diagonals(from_torch(net, ROWS)[0])
    assert not found.groups
    assert list(found.fixed.values()) == ["it is the input x", "layer norm n reads it"]


def test_a_tied_weight_is_copied_for_the_reader_that_changes():
    shared = nn.Linear(8, 8)
    net = Fn(lambda m, x: m.c(torch.relu(m.w(x))) + m.w(torch.sigmoid(x)), w=shared, c=nn.Linear(8, 8))
    start = from_torch(net, ROWS)
    before = shared.weight.detach().clone()
    assert scaled(start, ROWS) == [8]
    assert torch.equal(shared.weight, before)
    readers = [view(Linear, n).weight.target for n in start[0].graph.nodes if view(Linear, n)]
    assert len(set(readers)) == 3
    assert "w.weight" in readers


def test_a_product_in_front_stands_in_for_a_producer():
    def both(m, x):
        y = torch.sigmoid(x)
        return m.a(y) + m.b(y)

    gm, want = from_torch(Fn(both, a=nn.Linear(8, 6), b=nn.Linear(8, 6)), ROWS)
    linears = [n for n in gm.graph.nodes if view(Linear, n)]
    multiply(gm, view(Linear, linears[0]).x, linears, torch.rand(8) + 0.5)
    check_graph(gm)
    torch.testing.assert_close(gm(ROWS), want)
    assert text(gm).count("aten.mul") == 1
    assert diagonals(gm).groups[0].size == 8, "the product takes in what comes later"


def model(source, opset=17, **constants):
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{source}')
    rng = np.random.default_rng(0)
    arrays = {k: v if isinstance(v, np.ndarray) else rng.uniform(-1, 1, v).astype(np.float32) for k, v in constants.items()}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in arrays.items())
    return proto


def test_onnx_products_with_biases_apart_and_transposed_weights():
    source = """g (float[2,5,8] x) => (float[10,3] y) {
        n = LayerNormalization <axis = -1> (x, g, s)  a = MatMul (n, w)  b = Add (c, a)  r = Relu (b)
        f = Reshape (r, shape)  y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, v, d) }"""
    proto = model(source, g=(8,), s=(8,), w=(8, 6), c=(6,), v=(3, 6), d=(3,), shape=np.array([10, 6]))
    assert scaled(from_onnx(proto, ROWS), ROWS) == [8, 6]


def test_onnx_channels_are_followed_through_slices_of_a_joint_projection():
    source = """g (float[2,5,8] x) => (float[2,5,3] y) {
        a = MatMul (x, w)  b = Add (a, c)  h = Reshape (b, shape)  t = Transpose <perm = [2, 0, 3, 1, 4]> (h)
        q = Gather <axis = 0> (t, zero)  k = Gather <axis = 0> (t, one)  v = Gather <axis = 0> (t, two)
        kt = Transpose <perm = [0, 1, 3, 2]> (k)  s = MatMul (q, kt)  p = Softmax <axis = -1> (s)
        z = MatMul (p, v)  zt = Transpose <perm = [0, 2, 1, 3]> (z)  f = Reshape (zt, flat)  y = MatMul (f, o) }"""
    ints = {"shape": np.array([2, 5, 3, 2, 4]), "flat": np.array([2, 5, 8])}
    scalars = {name: np.array(i) for i, name in enumerate(("zero", "one", "two"))}
    start = from_onnx(model(source, w=(8, 24), c=(24,), o=(8, 3), **ints, **scalars), ROWS)
    (group,) = diagonals(start[0]).groups
    assert group.producers[0].channels.tolist() == [-1] * 16 + list(range(8)), "only the third part is free"
    assert scaled(start, ROWS) == [8]


def test_onnx_bodies_of_control_flow_are_graphs_of_their_own():
    source = """g (float[2,5,8] x) => (float[2,5,3] y) {
        m = ReduceMax <keepdims = 0> (x)  cond = Greater (m, zero)
        y = If (cond) <then_branch = t () => (float[2,5,3] a) { h = MatMul (x, w)  r = Relu (h)  a = MatMul (r, v) },
                       else_branch = e () => (float[2,5,3] b) { b = MatMul (x, u) }> }"""
    start = from_onnx(model(source, w=(8, 6), v=(6, 3), u=(8, 3), zero=np.array(0, np.float32)), ROWS)
    SinkConstants()(start[0])
    assert scaled(start, ROWS) == [6]


def test_onnx_slopes_and_reductions_let_factors_pass():
    source = """g (float[2,5,8] x) => (float[2,1,3] y) {
        a = MatMul (x, w)  p = PRelu (a, s)  m = ReduceMean <axes = [1]> (p)  y = MatMul (m, v) }"""
    assert scaled(from_onnx(model(source, w=(8, 6), s=(6,), v=(6, 3)), ROWS), ROWS) == [6]


def test_onnx_a_product_with_a_constant_per_channel_separates_two_groups():
    source = "g (float[2,5,8] x) => (float[2,5,3] y) { a = MatMul (x, w)  m = Div (a, c)  r = Relu (m)  y = MatMul (r, v) }"
    assert scaled(from_onnx(model(source, w=(8, 6), c=np.arange(1, 7, dtype=np.float32), v=(6, 3)), ROWS), ROWS) == [6, 6]


def test_factors_that_do_not_fit_are_refused():
    gm, _ = from_torch(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)), ROWS)
    (group,) = diagonals(gm).groups
    with pytest.raises(QGraphError, match=r"a group of 6 channels takes as many positive, finite factors, got \[5\]"):
        migrate(gm, group, torch.ones(5))
    with pytest.raises(QGraphError, match="positive"):
        migrate(gm, group, torch.tensor([1.0, 1, 1, 0, 1, 1]))


def test_factors_that_leave_float16_are_found_before_anything_changes():
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).half()
    gm, _ = from_torch(net, ROWS.half())
    (group,) = diagonals(gm).groups
    d = torch.ones(6)
    assert misfit(group, d) is None
    d[2] = 1e6
    assert misfit(group, d) == "@0.weight would not fit float16 with its factors"
    assert misfit(group, 1 / d) == "@2.weight would not fit float16 with its factors"
    wide, _ = from_torch(net.float(), ROWS)
    assert misfit(diagonals(wide).groups[0], d) is None


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_components_are_those_of_merging_one_edge_after_the_other(edges):
    label = list(range(20))
    for a, b in edges:
        low, high = sorted((label[a], label[b]))
        label = [low if x == high else x for x in label]
    a, b = (torch.tensor(side, dtype=torch.int64) for side in (zip(*edges, strict=True) if edges else ([], [])))
    assert components(20, a, b).tolist() == label


@given(st.permutations([2, 3, 4, 1]), st.integers(0, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_reshaped_field_is_the_field_of_the_reshaped_value(shape, axis, data):
    sizes = [1] * 4
    sizes[axis] = shape[axis]
    field = torch.arange(shape[axis]).reshape(sizes)
    new = data.draw(st.sampled_from([[24], [6, 4], [4, 6], [2, 12], [1, 24, 1], [3, 8], list(shape[::-1]), list(shape)]))
    found = reshaped(field, shape, new)
    assert found is not None
    assert torch.equal(found.expand(new), field.expand(list(shape)).reshape(new))


def test_unknown_sizes_are_matched_by_name_and_what_is_left_must_be_alike():
    field = torch.arange(6).reshape(1, 1, 6)
    assert reshaped(field, ("batch", "seq", 6), ("batch", "seq", 2, 3)).shape == (1, 1, 2, 3)
    assert reshaped(field, ("batch", "seq", 6), (None, 6)).tolist() == [list(range(6))]
    assert reshaped(torch.arange(6).reshape(1, 6, 1), ("batch", 6, "w"), (None, "wide")) is None
