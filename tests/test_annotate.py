"""Annotation: which edges get which format, shared scales, rules, and the ledger."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qgraph
from qgraph.annotate import Annotations, annotate, check_rules
from qgraph.backend import ALL, Placement
from qgraph.backends.onnxruntime.placement import PLACEMENT
from qgraph.errors import ModelError, RecipeError
from qgraph.ledger import Ledger
from qgraph.recipe import Int, Recipe, load_recipe
from qgraph.regions import Regions
from qgraph.testing import from_onnx, from_torch
from qgraph.types import QSpec
from qgraph.views import Concat

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


class Net(nn.Module):
    """Three convolutions over one image, combined by a function."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self, x)


def solve(fn: Callable[..., Tensor], recipe: str | Recipe = "w8a8", placement: Placement = PLACEMENT) -> tuple[Annotations, Ledger]:
    gm, _ = from_torch(Net(fn), IMAGE)
    ledger = Ledger()
    return annotate(gm, load_recipe(recipe), placement, ledger), ledger


def values(found: Annotations) -> list[set[str]]:
    """The quantized values by class, each as the names of its nodes."""
    return [{v.name for v in g.consumers} for g in found.groups]


def test_an_activation_is_absorbed_into_the_output_of_its_producer() -> None:
    found, ledger = solve(lambda m, x: m.c(torch.relu(m.a(x))))
    assert values(found) == [{"x"}, {"relu"}, {"conv2d_1"}]
    entry = ledger.get("a", "output")
    assert entry is not None and entry.quantized and "relu" in entry.reason


def test_a_residual_add_follows_in_integers_when_its_reader_computes_in_integers() -> None:
    found, _ = solve(lambda m, x: m.c(m.a(x) + m.b(x)))
    assert {"add"} in values(found) and {"conv2d"} in values(found) and {"conv2d_1"} in values(found)


def test_an_add_that_only_float_reads_stays_float() -> None:
    found, _ = solve(lambda m, x: torch.sigmoid(m.a(x) + m.b(x)))
    assert values(found) == [{"x"}, {"conv2d"}, {"conv2d_1"}]


def test_an_add_with_a_float_operand_stays_float() -> None:
    found, _ = solve(lambda m, x: m.c(m.a(x) + torch.sigmoid(x[:, :1])))
    (group,) = [g for g in found.groups if any(v.name == "add" for v in g.consumers)]
    assert not group.makers, "the add computes in float; its value is quantized for the convolution alone"


def test_max_pooling_keeps_the_scale_of_its_input() -> None:
    found, _ = solve(lambda m, x: m.c(torch.max_pool2d(torch.relu(m.a(x)), 2)))
    assert {"relu", "max_pool2d"} in values(found)


def test_the_outputs_of_a_split_keep_the_scale_of_its_input() -> None:
    whole, _ = solve(lambda m, x: m.c(torch.cat(m.a(x).chunk(2, 1), 1)))
    assert {"conv2d", "getitem", "getitem_1"} in values(whole)
    assert not any("chunk" in group for group in values(whole)), "the split itself is no tensor"


@pytest.mark.parametrize("order", [lambda a, b: [a, b], lambda a, b: [b, a]])
def test_concat_shares_one_scale_where_the_placement_says_so(order: Callable[[Any, Any], list[Any]]) -> None:
    shared = replace(PLACEMENT, follow={}, share={Concat: ALL})

    def joined(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.cat(order(m.a(x)[:, :2], m.b(x)[:, 2:]), 1))

    assert {"slice_1", "slice_2", "cat"} not in values(solve(joined, placement=shared)[0]), "slices are float here"

    def convs(m: Any, x: Tensor) -> Tensor:
        first, second = order(m.a(x), m.b(x))
        return torch.cat([first, second], 1) if m.c is None else m.c(torch.cat([first, second], 0))

    found, _ = solve(convs, placement=shared)
    assert {"conv2d", "conv2d_1", "cat"} in values(found)


def test_the_result_does_not_depend_on_the_order_of_independent_nodes() -> None:
    forward, _ = solve(lambda m, x: m.c(m.a(x) + m.b(x)))

    def other_order(m: Any, x: Tensor) -> Tensor:
        b = m.b(x)
        return m.c(m.a(x) + b)

    backward, _ = solve(other_order)

    def weights(found: Annotations) -> set[tuple[str, str]]:
        return {(str(n.args[1]), str(s)) for n, roles in found.operands.items() for s in roles.values()}

    assert weights(forward) == weights(backward)
    assert sorted(map(len, values(forward))) == sorted(map(len, values(backward)))


def test_integer_values_are_no_candidates_for_an_integer_region() -> None:
    gm, _ = from_torch(Net(lambda m, x: m.a(x) + m.b(x) * (torch.arange(8) + torch.arange(8))), IMAGE)
    spec = QSpec("uint8", False)
    regions = Regions(gm, PLACEMENT, {}, frozenset(), spec, lambda node: False)
    sums = {n.name: n.meta["val"].dtype for n in gm.graph.nodes if n.target is torch.ops.aten.add.Tensor}
    assert sorted(map(str, sums.values())) == ["torch.float32", "torch.int64"]
    assert [sums[n.name] for n in regions.candidates if n.name in sums] == [torch.float32]


def test_a_linear_has_a_quantized_output_only_for_integer_readers() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    gm, _ = from_torch(net, torch.ones(2, 3))
    found = annotate(gm, load_recipe("w8a8"), PLACEMENT, Ledger())
    assert values(found) == [{"input"}, {"relu"}] or values(found) == [{"input_1"}, {"relu"}]


def test_products_of_activations_stay_float_with_a_reason() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) @ x.transpose(-1, -2)

    gm, _ = from_torch(Product(), torch.ones(2, 3, 4))
    ledger = Ledger()
    annotate(gm, load_recipe("w8a8"), PLACEMENT, ledger)
    (entry,) = [e for e in ledger if e.kind == "aten.matmul" and e.role == "x"]
    assert not entry.quantized and entry.reason == "both operands are activations"


def test_dynamic_recipes_note_operands_and_have_no_groups() -> None:
    gm, _ = from_torch(nn.Linear(3, 5), torch.ones(2, 3))
    found = annotate(gm, load_recipe("w8a8-dynamic"), PLACEMENT, Ledger())
    (roles,) = found.operands.values()
    assert str(roles["weight"]) == "int8 sym per axis 0" and str(roles["x"]) == "uint8 asym per tensor dynamic" and not found.groups


def test_a_convolution_with_run_time_ranges_keeps_float_activations_and_says_why() -> None:
    found, ledger = solve(lambda m, x: m.a(x), "w8a8-dynamic")
    entry = ledger.get("a", "x")
    assert entry is not None and not entry.quantized and "no fast integer conv" in entry.reason
    assert [set(roles) for roles in found.operands.values()] == [{"weight"}]


def test_the_last_rule_that_matches_wins() -> None:
    recipe = Recipe(weights=Int(8), rules={"*": None, "b": {"weights": Int(8)}})
    found, ledger = solve(lambda m, x: m.c(m.a(x) + m.b(x)), recipe)
    assert [n.name for n in found.operands] == ["conv2d_1"]
    entry = ledger.get("a", "weight")
    assert entry is not None and entry.reason == "rule '*' leaves it in float"


def test_a_rule_that_matches_nothing_names_the_nearest_operation() -> None:
    gm, _ = from_torch(nn.Sequential(nn.Linear(3, 4)), torch.ones(2, 3))
    with pytest.raises(RecipeError, match="'linaer' matches no operation; did you mean 'linear'"):
        check_rules([gm], Recipe(weights=Int(8), rules={"linaer": None}))


def test_a_rule_that_the_backend_cannot_honour_is_an_error() -> None:
    recipe = Recipe(weights=Int(8), rules={"a": {"weights": Int(4, group=32)}})
    with pytest.raises(RecipeError, match="rule 'a' cannot be honoured at a: there is no kernel for group-wise convolution"):
        solve(lambda m, x: m.a(x), recipe)


def test_two_formats_for_one_shared_value_are_an_error() -> None:
    wide = {"activations": Int(8, per="tensor", symmetric=True, unsigned=True)}
    recipe = replace(load_recipe("w8a8"), rules={"b": wide})
    with pytest.raises(RecipeError, match="wanted as uint8 asym .* and as uint8 sym"):
        solve(lambda m, x: m.a(x) + m.b(x), recipe)


def test_every_site_is_in_the_ledger_with_a_reason() -> None:
    _, ledger = solve(lambda m, x: m.c(m.a(x) + m.b(x)), Recipe(weights=Int(8), rules={"c": None}))
    for site in ("a", "b", "c"):
        for role in ("weight", "x"):
            entry = ledger.get(site, role)
            assert entry is not None and entry.reason, (site, role)


def test_ledger_prints_one_line_per_decision() -> None:
    _, ledger = solve(lambda m, x: m.a(x))
    lines = ledger.table().splitlines()
    assert len(lines) == len(ledger) == 3 and any("int8 sym per axis 0" in line for line in lines)


def test_a_gemm_that_integer_kernels_do_not_take_keeps_its_activations_in_float() -> None:
    start = '<ir_version: 8, opset_import: ["": 13]> g (float[4,4] x) => (float[4,4] y) <float[4,4] w = {%s}, float[4,4] c = {%s}>'
    numbers = ", ".join(str(i / 7) for i in range(16))
    for attributes, operands, reason in (
        ("<alpha = 0.5>", "x, w", "no factors alpha and beta"),
        ("<beta = 2.0>", "x, w, c", "no factors alpha and beta"),
        ("<transA = 1>", "x, w", "no transposed x"),
        ("", "x, w, c", "one bias per output channel"),
    ):
        gm, _ = from_onnx(f"{start % (numbers, numbers)} {{ [site] y = Gemm {attributes} ({operands}) }}", torch.eye(4))
        ledger = Ledger()
        annotate(gm, load_recipe("w8a8"), PLACEMENT, ledger)
        entry = ledger.get("site", "x")
        assert entry is not None and not entry.quantized and reason in entry.reason
        weight = ledger.get("site", "weight")
        assert weight is not None and weight.quantized


def test_a_convolution_without_a_batch_axis_is_left_in_float_and_the_error_says_why() -> None:
    with pytest.raises(ModelError, match=r"its x has no batch axis; add one, with x.unsqueeze\(0\)"):
        qgraph.prepare(nn.Conv2d(3, 4, 3), (IMAGE[0],))


@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize("dialect", ["aten", "onnx"])
def test_an_added_mask_is_never_quantized(lowest: float, dialect: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 6, 8), torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2])
    net = Masked(lowest).eval()
    if dialect == "onnx":
        torch.onnx.export(net, (x, mask), tmp_path / "m.onnx", dynamo=True, verbose=False)
    gm = qgraph.quantize(
        str(tmp_path / "m.onnx") if dialect == "onnx" else net, [(x, mask)], example_inputs=None if dialect == "onnx" else (x, mask)
    )
    found, want = qgraph.lower(gm)(x, mask), net(x, mask)
    error = (found[0] if isinstance(found, tuple) else found) - want
    assert 10 * torch.log10(want.square().sum() / error.square().sum()) > 25


class Masked(nn.Module):
    """One attention head; keys whose mask is 0 get `lowest` added to their scores."""

    def __init__(self, lowest: float) -> None:
        super().__init__()
        self.lowest = lowest
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        added = torch.zeros_like(mask).masked_fill(mask == 0, self.lowest)[:, None, :]
        scores = self.q(x) @ self.k(x).transpose(1, 2) + added
        return self.o(torch.softmax(scores, -1) @ self.v(x))
