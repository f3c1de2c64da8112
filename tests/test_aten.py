"""Views of aten targets: every one is read off a module captured by torch, and checked against what it computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import qgraph.aten  # noqa: F401
from qgraph.capture import capture
from qgraph.views import (
    Activation,
    Attention,
    BatchNorm,
    Cast,
    Concat,
    Conv,
    DataMovement,
    Elementwise,
    Embedding,
    Linear,
    Norm,
    Pad,
    Pool,
    Softmax,
    const_value,
    view,
)

aten = torch.ops.aten


class Call(nn.Module):
    """A function of tensors as a module; its constants are buffers c0, c1, ..."""

    def __init__(self, fn: Any, *constants: Tensor | None) -> None:
        super().__init__()
        self.fn, self.n = fn, len(constants)
        for i, c in enumerate(constants):
            self.register_buffer(f"c{i}", c)

    def forward(self, *inputs: Tensor) -> Any:
        return self.fn(*inputs, *(getattr(self, f"c{i}") for i in range(self.n)))


def graph(fn: Any, *inputs: Tensor, constants: tuple[Tensor | None, ...] = ()) -> GraphModule:
    return capture(Call(fn, *constants), inputs)


def one(gm: GraphModule, interface: type[Any]) -> Any:
    found = [v for n in gm.graph.nodes if (v := view(interface, n)) is not None]
    assert len(found) == 1, found
    return found[0]


def none(gm: GraphModule, interface: type[Any]) -> None:
    assert not [n for n in gm.graph.nodes if view(interface, n) is not None]


def tensor(node: Any, inputs: dict[str, Tensor]) -> Any:
    """The value of a view's operand: an input, a constant, or a number."""
    if not isinstance(node, Node):
        return node
    value = const_value(node)
    return inputs[node.name] if value is None else value


X, Y = torch.randn(3, 4), torch.randn(4, 5)


def decomposed(module: nn.Module, *inputs: Tensor) -> GraphModule:
    return capture(torch.export.export(module, inputs, strict=False).run_decompositions().module(check_guards=False), inputs)


@pytest.mark.parametrize(
    ("make", "x", "alpha", "beta"),
    [
        (lambda: graph(F.linear, torch.randn(2, 3, 4), constants=(Y.T.contiguous(), torch.randn(5))), torch.randn(2, 3, 4), 1, 1),
        (lambda: graph(F.linear, X, constants=(Y.T.contiguous(),)), X, 1, 1),
        (lambda: graph(lambda x, w, b: torch.addmm(b, x, w, alpha=2, beta=0.5), X, constants=(Y, torch.randn(5))), X, 2, 0.5),
        (lambda: graph(torch.mm, X, constants=(Y,)), X, 1, 1),
        (lambda: graph(torch.bmm, torch.randn(2, 3, 4), constants=(torch.randn(2, 4, 5),)), torch.randn(2, 3, 4), 1, 1),
        (lambda: graph(torch.matmul, torch.randn(2, 3, 4), constants=(Y,)), torch.randn(2, 3, 4), 1, 1),
        (lambda: graph(torch.matmul, torch.randn(4), constants=(Y,)), torch.randn(4), 1, 1),
        (lambda: decomposed(nn.Linear(4, 5), X), X, 1, 1),
    ],
)
def test_linear_in_every_spelling_contracts_the_axes_it_names(
    make: Callable[[], GraphModule], x: Tensor, alpha: float, beta: float
) -> None:
    gm = make()
    v = one(gm, Linear)
    weight = const_value(v.weight)
    if weight is None:  # decomposed: the weight is transposed by a node of its own
        weight = const_value(v.weight.args[0]).T
    assert (v.alpha, v.beta, v.x_axis) == (alpha, beta, -1)
    assert {v.in_axis, v.out_axis} == {-1, -2}
    aligned = weight.movedim((v.in_axis, v.out_axis), (-2, -1))
    want = v.alpha * (x @ aligned)
    if v.bias is not None:
        want = want + v.beta * const_value(v.bias)
    torch.testing.assert_close(gm(x), want, rtol=1e-4, atol=1e-4)


def test_a_product_with_a_vector_on_the_right_is_no_linear() -> None:
    none(graph(torch.matmul, X, constants=(torch.randn(4),)), Linear)


CONV = torch.randn(6, 2, 3, 2)


@pytest.mark.parametrize(
    ("fn", "x", "weight", "expect"),
    [
        (lambda x, w: F.conv2d(x, w, None, (2, 1), (1, 0), (1, 2), 2), torch.randn(2, 4, 9, 9), CONV,
         {"stride": (2, 1), "padding": ((1, 1), (0, 0)), "dilation": (1, 2), "groups": 2}),
        (lambda x, w: F.conv2d(x, w, None, 1, "same", (1, 3)), torch.randn(2, 2, 9, 9), CONV, {"padding": ((1, 1), (1, 2)), "dilation": (1, 3)}),
        (lambda x, w: F.conv2d(x, w, None, 2, "valid"), torch.randn(2, 2, 9, 9), CONV, {"padding": ((0, 0), (0, 0)), "stride": (2, 2)}),
        (lambda x, w: F.conv1d(x, w, None, 2, 3), torch.randn(2, 4, 9), torch.randn(6, 4, 3), {"padding": ((3, 3),), "stride": (2,)}),
        (lambda x, w: F.conv3d(x, w, None, 1, 1), torch.randn(2, 4, 5, 6, 7), torch.randn(3, 4, 2, 2, 2), {"padding": ((1, 1),) * 3}),
        (lambda x, w: torch.convolution(x, w, None, [2, 1], [1, 0], [1, 1], False, [0, 0], 2), torch.randn(2, 4, 9, 9), CONV,
         {"stride": (2, 1), "padding": ((1, 1), (0, 0)), "groups": 2, "transposed": False}),
    ],
)  # fmt: skip
def test_convolutions_by_what_they_compute(fn: Any, x: Tensor, weight: Tensor, expect: dict[str, Any]) -> None:
    gm = graph(fn, x, constants=(weight,))
    v = one(gm, Conv)
    assert {k: getattr(v, k) for k in expect} == expect
    n = x.dim() - 2
    assert weight.shape[v.out_axis] == weight.shape[0] and v.in_axis == -n - 1
    padded = F.pad(x, [p for pair in reversed(v.padding) for p in pair])
    conv = [F.conv1d, F.conv2d, F.conv3d][n - 1]
    torch.testing.assert_close(gm(x), conv(padded, weight, None, v.stride, 0, v.dilation, v.groups), rtol=1e-4, atol=1e-4)


def test_transposed_convolution_has_its_outputs_on_the_second_axis() -> None:
    x, w, b = torch.randn(2, 6, 5, 5), torch.randn(6, 4, 3, 2), torch.randn(8)
    gm = graph(lambda x, w, b: F.conv_transpose2d(x, w, b, (2, 1), (1, 0), (1, 0), 2, (1, 2)), x, constants=(w, b))
    v = one(gm, Conv)
    assert (v.transposed, v.groups, v.stride, v.dilation, v.output_padding) == (True, 2, (2, 1), (1, 2), (1, 0))
    assert w.shape[v.out_axis] == 4 and w.shape[v.in_axis] == 6 and v.padding == ((1, 1), (0, 0))
    assert torch.equal(const_value(v.bias), b)


def test_an_image_without_batch_axis_is_no_conv() -> None:
    none(graph(F.conv2d, torch.randn(2, 9, 9), constants=(CONV,)), Conv)


def test_norms() -> None:
    x, w, b = torch.randn(2, 4, 6), torch.randn(6), torch.randn(6)
    v = one(graph(lambda x, w, b: F.layer_norm(x, [6], w, b, 1e-3), x, constants=(w, b)), Norm)
    assert (v.kind, v.axes, v.eps) == ("layer", (-1,), 1e-3)
    assert torch.equal(const_value(v.weight), w) and torch.equal(const_value(v.bias), b)
    assert one(graph(lambda x: F.layer_norm(x, [4, 6]), x), Norm).axes == (-2, -1)
    v = one(graph(lambda x, w: F.rms_norm(x, [6], w), x, constants=(w,)), Norm)
    assert (v.kind, v.axes, v.eps, v.bias) == ("rms", (-1,), torch.finfo(torch.float32).eps, None)
    v = one(graph(lambda x, w: F.group_norm(x, 2, w, None, 1e-4), x, constants=(torch.randn(4),)), Norm)
    assert (v.kind, v.axes, v.eps) == ("group", (), 1e-4)
    assert one(graph(lambda x: F.instance_norm(x), torch.randn(2, 3, 4, 5)), Norm).axes == (-2, -1)


def test_batch_norm_only_with_stored_statistics() -> None:
    bn = nn.BatchNorm1d(4, eps=1e-3)
    nn.init.normal_(bn.running_mean)
    gm = capture(bn, torch.randn(2, 4, 3))
    v = one(gm, BatchNorm)
    assert v.eps == 1e-3 and torch.equal(const_value(v.mean), bn.running_mean) and torch.equal(const_value(v.bias), bn.bias)
    none(capture(nn.BatchNorm1d(4, track_running_stats=False), torch.randn(2, 4, 3)), BatchNorm)


P, Q = torch.rand(3, 4) + 0.5, torch.rand(4) + 0.5
FUNCTIONS = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow, "min": torch.minimum, "max": torch.maximum,
    "where": lambda c, a, b: torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fn"),
    [
        ("add", lambda p, q: p + q),
        ("add", lambda p, q: p + 2),
        ("sub", lambda p, q: p - q),
        ("sub", lambda p, q: 3.5 - p),
        ("sub", lambda p, q: torch.rsub(p, q)),
        ("mul", lambda p, q: q * p),
        ("mul", lambda p, q: p * 0.5),
        ("div", lambda p, q: p / q),
        ("div", lambda p, q: p / 4),
        ("pow", lambda p, q: p**2),
        ("pow", lambda p, q: p**q),
        ("pow", lambda p, q: 2**p),
        ("min", torch.minimum),
        ("max", torch.maximum),
        ("max", lambda p, q: torch.max(p, q)),
    ],
)
def test_elementwise_operands_are_in_order(kind: str, fn: Any) -> None:
    gm = graph(fn, P, Q)
    v = one(gm, Elementwise)
    names = dict(zip([n.name for n in gm.graph.find_nodes(op="placeholder")], (P, Q), strict=True))
    assert v.kind == kind
    a, b = (torch.as_tensor(tensor(i, names)) for i in v.inputs)
    torch.testing.assert_close(gm(P, Q), FUNCTIONS[kind](a, b))


def test_where_and_masked_fill_read_the_same() -> None:
    mask = P > 1
    for fn, first in ((lambda m, p: torch.where(m, p, -1.0), True), (lambda m, p: p.masked_fill(m, -1.0), False)):
        v = one(graph(fn, mask, P), Elementwise)
        condition, a, b = v.inputs
        assert v.kind == "where" and isinstance(condition, Node)
        assert (isinstance(a, Node), isinstance(b, Node)) == (first, not first) and -1.0 in (a, b)


@pytest.mark.parametrize("fn", [
    lambda p, q: torch.add(p, q, alpha=2), lambda p, q: torch.sub(p, q, alpha=3), lambda p, q: torch.div(p, q, rounding_mode="floor"),
    lambda p, q: torch.rsub(p, q, alpha=2),
])  # fmt: skip
def test_arithmetic_with_a_twist_is_no_elementwise(fn: Any) -> None:
    none(graph(fn, P, Q), Elementwise)


@pytest.mark.parametrize(
    ("fn", "kind", "low", "high"),
    [
        (F.relu, "relu", 0, None),
        (lambda x: F.relu(x * 1, inplace=True), "relu", 0, None),
        (F.relu6, "clip", 0, 6),
        (lambda x: F.hardtanh(x, -0.5, 2), "clip", -0.5, 2),
        (lambda x: x.clamp(-1, 0.25), "clip", -1, 0.25),
        (lambda x: x.clamp(min=0.1), "clip", 0.1, None),
        (lambda x: torch.clamp_max(x, 0.3), "clip", None, 0.3),
        (F.silu, "silu", -0.27847, None),
        (F.gelu, "gelu", -0.17005, None),
        (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh", -0.17005, None),
        (F.hardswish, "hard_swish", -0.375, None),
        (F.hardsigmoid, "hard_sigmoid", 0, 1),
        (lambda x: F.leaky_relu(x, 0.2), "leaky_relu", None, None),
        (lambda x: F.elu(x, 0.7), "elu", -0.7, None),
        (torch.sigmoid, "sigmoid", 0, 1),
        (torch.tanh, "tanh", -1, 1),
        (torch.erf, "erf", -1, 1),
        (F.softplus, "softplus", 0, None),
        (torch.abs, "abs", 0, None),
        (torch.neg, "neg", None, None),
        (torch.exp, "exp", 0, None),
    ],
)
def test_activations_keep_the_bounds_they_claim(fn: Any, kind: str, low: float | None, high: float | None) -> None:
    x = torch.linspace(-9, 9, 20001)
    gm = graph(fn, x)
    v = one(gm, Activation)
    assert (v.kind, v.low, v.high) == (kind, low, high)
    y = gm(x)
    assert low is None or y.min() >= low
    assert high is None or y.max() <= high


def test_activations_with_other_constants_have_another_meaning() -> None:
    x = torch.randn(5)
    for fn in (lambda x: F.softplus(x, beta=2), F.selu, lambda x: torch.clamp(x, min=torch.zeros(5))):
        gm = graph(fn, x)
        assert not [v for n in gm.graph.nodes if (v := view(Activation, n)) and v.kind in ("softplus", "clip", "elu")]


IMAGE = torch.randn(2, 4, 6, 8)


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (lambda x: x.view(2, -1), "reshape"),
        (lambda x: x.reshape(8, -1), "reshape"),
        (lambda x: x.flatten(1), "flatten"),
        (lambda x: x[:, 1:3], "slice"),
        (lambda x: x.select(1, 2), "slice"),
        (lambda x: x.narrow(1, 1, 2), "slice"),
        (lambda x: x.unsqueeze(0), "unsqueeze"),
        (lambda x: x.index_select(1, torch.tensor([2, 0])), "gather"),
        (lambda x: x.transpose(1, 2).contiguous(), "copy"),
        (lambda x: x.clone(), "copy"),
        (lambda x: x.repeat(1, 2, 1, 1), "tile"),
        (lambda x: F.pixel_shuffle(x, 2), "depth_to_space"),
        (lambda x: F.pixel_unshuffle(x, 2), "space_to_depth"),
        (lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), "gather"),
        (lambda x: x[:1].expand(3, 4, 6, 8), "expand"),
        (lambda x: x[:, :1].squeeze(1), "squeeze"),
    ],
)
def test_data_movement(fn: Any, kind: str) -> None:
    gm = graph(fn, IMAGE)
    assert kind in [v.kind for n in gm.graph.nodes if (v := view(DataMovement, n)) is not None]
    assert all(view(i, n) is None for n in gm.graph.nodes for i in (Elementwise, Activation, Linear))


@pytest.mark.parametrize("fn", [
    lambda x: x.permute(0, -1, 1, 2), lambda x: x.transpose(-1, 1), lambda x: x.mT, lambda x: x.movedim(1, 3), lambda x: x.swapaxes(0, 2),
])  # fmt: skip
def test_permutations_are_what_torch_does(fn: Any) -> None:
    v = one(graph(fn, IMAGE), DataMovement)
    assert v.kind == "transpose"
    assert torch.equal(fn(IMAGE), IMAGE.permute(v.perm))


def test_split_and_its_parts() -> None:
    for fn in (lambda x: x.split(2, 1), lambda x: x.split([1, 3], 1), lambda x: x.chunk(2, 1), lambda x: x.unbind(1)):
        gm = graph(fn, IMAGE)
        assert {v.kind for n in gm.graph.nodes if (v := view(DataMovement, n)) is not None} == {"split", "getitem"}


def test_concat() -> None:
    for fn, axis in ((lambda a, b: torch.cat([a, b], -1), -1), (lambda a, b: torch.stack((a, b), 1), 1)):
        v = one(graph(fn, X, X), Concat)
        assert v.axis == axis and [n.op for n in v.inputs] == ["placeholder"] * 2


def test_pools() -> None:
    for fn, kind in (
        (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True), "max"),
        (lambda x: F.avg_pool2d(x, 2), "average"),
        (lambda x: F.adaptive_avg_pool2d(x, 1), "global_average"),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 1)), "average"),
        (lambda x: x.mean((-1, 2), keepdim=True), "global_average"),
    ):
        assert one(graph(fn, IMAGE), Pool).kind == kind
    none(graph(lambda x: x.mean(-1), IMAGE), Pool)
    none(graph(lambda x: x.mean(1), torch.randn(3, 4)), Pool)


def test_pads_run_from_the_first_axis() -> None:
    v = one(graph(lambda x: F.pad(x, (1, 2, 0, 3), value=-1.5), IMAGE), Pad)
    assert (v.pads, v.value) == (((0, 0), (0, 0), (0, 3), (1, 2)), -1.5)
    none(graph(lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), IMAGE), Pad)


def test_embedding_softmax_and_casts() -> None:
    table = torch.randn(7, 3)
    v = one(graph(F.embedding, torch.tensor([[1, 5]]), constants=(table,)), Embedding)
    assert torch.equal(const_value(v.weight), table) and v.indices.op == "placeholder"
    v = one(graph(lambda x: x.softmax(-2), X), Softmax)
    assert (v.axis, v.log, v.x.op) == (-2, False, "placeholder")
    assert one(graph(lambda x: x.log_softmax(1), X), Softmax).log
    for fn, to in ((lambda x, y: x.to(torch.float16), "float16"), (lambda x, y: x.long(), "int64"), (lambda x, y: x.type_as(y), "float64")):
        assert one(graph(fn, X, X.double()), Cast).to == to


def test_attention() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.randn(5, 5)
    a = one(graph(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3), q, k, v, mask), Attention)
    assert [n.op for n in (a.q, a.k, a.v, a.mask)] == ["placeholder"] * 4 and (a.scale, a.causal) == (0.3, False)
    assert len({a.q, a.k, a.v, a.mask}) == 4
    assert one(graph(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v), Attention).causal
    none(graph(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), q, k[:, :1]), Attention)
