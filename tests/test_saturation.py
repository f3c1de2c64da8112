"""The proof that sums stay exact: against brute force, in the order of the kernels, and on both dialects."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qgraph
from qgraph.errors import RecipeError
from qgraph.ledger import Entry, Ledger
from qgraph.saturation import ROLE, TARGETS, accumulator, coverage, covered, find_products, run_sums
from qgraph.testing import from_onnx
from tests.everywhere import EVERYWHERE

AVX2 = TARGETS["x86-avx2"]


def fill(net: nn.Module, weight: torch.Tensor) -> nn.Module:
    with torch.no_grad():
        net.weight.copy_(weight)
        net.bias.copy_(torch.linspace(-1, 2, len(net.bias)))
    return net


def pair(shape: tuple[int, ...], *where: tuple[int, ...]) -> torch.Tensor:
    """Ones at these places of a weight of zeros, but a channel of its own that is harmless."""
    weight = torch.zeros(shape)
    for place in where:
        weight[(slice(1, None), *place)] = 1.0
    weight.flatten(1)[0, 0] = 1.0
    return weight


def quantized(net: nn.Module, x: torch.Tensor, recipe: str = "w8a8") -> torch.fx.GraphModule:
    return qgraph.quantize(net.eval(), [(x,)], example_inputs=(x,), recipe=recipe, backend=EVERYWHERE)


def only_product(gm: torch.fx.GraphModule):
    (found,) = find_products(gm)
    return found


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=4), st.sampled_from([127, 255]))
def test_the_bound_is_what_brute_force_finds(weights: list[int], x_max: int) -> None:
    padded = [*weights, 0] if len(weights) % 2 else weights
    runs = [padded[i : i + 2] for i in range(0, len(padded), 2)]
    sums = [a * p + b * q for p, q in runs for a, b in itertools.product((0, x_max), repeat=2)]
    (low,), (high,) = run_sums(torch.tensor([weights], dtype=torch.int8), 2)
    limits = AVX2.limits(x_max)
    assert (low >= limits[0] and high <= limits[1]) == all(-(2**15) <= s < 2**15 for s in sums)


@pytest.mark.parametrize(
    ("places", "channels"),
    [([(0,), (1,)], 3), ([(1,), (2,)], 0), ([(2,), (3,)], 3), ([(0,), (2,)], 0)],
)
def test_a_linear_adds_elements_2i_and_2i_plus_1(places, channels) -> None:
    product = only_product(quantized(fill(nn.Linear(7, 4), pair((4, 7), *places)), torch.rand(2, 7)))
    assert int((product.excess(AVX2) > 1).sum()) == channels


@pytest.mark.parametrize(
    ("width", "places", "channels"),
    [
        (4, [(0, 0, 0), (1, 0, 0)], 5),  # neighbouring channels of one position
        (4, [(0, 0, 0), (0, 0, 1)], 0),  # neighbouring positions of one channel
        (4, [(1, 0, 0), (2, 0, 0)], 0),
        (3, [(2, 0, 0), (0, 0, 1)], 5),  # an odd number of channels: the last of a position and the first of the next
    ],
)
def test_a_convolution_adds_along_channels_of_a_position(width, places, channels) -> None:
    net = fill(nn.Conv2d(width, 6, 3), pair((6, width, 3, 3), *places))
    product = only_product(quantized(net, torch.rand(1, width, 5, 5)))
    assert int((product.excess(AVX2) > 1).sum()) == channels


def test_depthwise_convolutions_widen_first() -> None:
    net = fill(nn.Conv2d(4, 4, 3, groups=4), torch.ones(4, 1, 3, 3))
    assert list(find_products(quantized(net, torch.rand(1, 4, 5, 5)))) == []
    twice = fill(nn.Conv2d(4, 8, 3, groups=4), torch.ones(8, 1, 3, 3))
    assert not only_product(quantized(twice, torch.rand(1, 4, 5, 5))).exact(AVX2)


def test_neighbours_of_opposite_signs_cannot_saturate() -> None:
    net = fill(nn.Linear(6, 3), torch.tensor([1.0, -1.0]).repeat(3, 3))
    assert only_product(quantized(net, torch.rand(2, 6))).exact(AVX2)


def test_weights_in_groups_are_added_in_int32() -> None:
    net = fill(nn.Linear(32, 3), torch.ones(3, 32))
    assert list(find_products(quantized(net, torch.rand(2, 32), "w8a8-g16"))) == []


def test_the_ledger_says_on_which_machines_sums_are_exact() -> None:
    net = nn.Sequential(fill(nn.Linear(6, 4), pair((4, 6), (0,), (1,))), fill(nn.Linear(4, 3), pair((3, 4), (0,), (2,))))
    ledger = quantized(net, torch.rand(2, 6)).meta["qgraph"].ledger
    first, second = (ledger.get(name, ROLE) for name in "01")
    assert first.decision == "exact on x86-vnni, arm64-dot"
    assert first.reason == "on x86-avx2 2 products reach 1.98 times what int16 holds, in 3 of 4 channels"
    assert second.decision == "exact" and second.reason == ""
    assert coverage(ledger) == {"x86-vnni": 0, "x86-avx2": 1, "arm64-dot": 0}
    assert covered(ledger) == "exact on x86-vnni, arm64-dot; x86-avx2: 1 products may saturate"
    assert ledger.summary()["activations"] == 3  # x, x and an output: a statement about sums is no activation


def test_onnx_graphs_are_read_alike() -> None:
    gm = from_onnx(
        """
        <ir_version: 10, opset_import: ["": 21]>
        g (float[2,4] x) => (float[2,2] y) <float[4,2] w = {1, 1, 1, 0, 0, 1, 0, -1}, float[2] b = {1, -2}> {
            p = MatMul (x, w)
            y = Add (p, b)
        }""",
        x := torch.tensor([[0.0, 1, 2, 3], [1, 0, 4, 2]]),
    )[0]
    product = only_product(qgraph.quantize(gm, [(x,)], recipe="w8a8-dynamic"))
    assert (product.excess(AVX2) > 1).tolist() == [True, False]


def test_nothing_recorded_covers_nothing() -> None:
    ledger = Ledger()
    ledger.record(Entry("a", "linear", "weight", "int8", "annotate"))
    assert coverage(ledger) == {} and covered(ledger) == ""


def test_an_unknown_machine_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="unknown target 'x86-avx'; did you mean 'x86-avx2'"):
        accumulator("x86-avx")
