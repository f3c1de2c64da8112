"""Factors of AWQ go into what makes the values, chosen by what the layers lose in the recipe's formats."""

import pytest
import torch
from torch import nn

import qgraph
from qgraph.channels import Channels
from qgraph.errors import CalibrationError, RecipeError
from qgraph.ledger import state
from qgraph.passes import AWQ
from qgraph.passes.awq import factors
from qgraph.recipe import Int, Recipe
from qgraph.testing import from_onnx, from_torch
from qgraph.text import text
from tests.passes.test_smooth_quant import DATA, GENERATOR, Block, gelu_of, linear_inputs, onnx_block, scales, smoothed

W3 = Recipe(weights=Int(3, group=4, symmetric=True))
STARTS = {"torch": lambda: from_torch(Block(), DATA[0])[0], "onnx": lambda: from_onnx(onnx_block(), DATA[0])[0]}


def graph(origin, recipe=W3):
    gm = STARTS[origin]()
    state(gm).recipe = recipe
    return gm


@pytest.mark.parametrize("origin", STARTS)
def test_factors_are_a_power_of_mean_magnitudes_and_go_into_the_norm(origin):
    gm = graph(origin)
    seen = Channels(-1)
    for x in DATA:
        seen.update(torch.nn.functional.layer_norm(x, (8,), *(p.detach() for p in Block().norm.parameters())))
    before, printed = linear_inputs(gm), text(gm)
    assert smoothed(AWQ(), gm) == 3
    decision = next(d for d, reason in scales(gm).values() if reason.startswith("factors taken in by"))
    s = factors(seen.mean(), torch.ones(8), float(decision.removeprefix("awq alpha ").partition(",")[0]))
    after = linear_inputs(gm)
    for old, new in zip(before[:2], after[:2], strict=True):
        torch.testing.assert_close(new[0], old[0] / s, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(new[1], old[1] * s, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[2], before[2], rtol=1e-4, atol=1e-5)
    assert len(text(gm).splitlines()) == len(printed.splitlines()), "no operation is added"


def test_the_ledger_names_every_linear_with_its_alpha_or_the_reason():
    gm = graph("torch")
    smoothed(AWQ(), gm)
    found = scales(gm)
    assert found["a"] == found["b"]
    assert found["a"][0].endswith("2 readers")
    assert found["c"] == ("unchanged", f"nothing can take in the factors of its input: gelu {gelu_of(gm)} makes it")


class Wide(nn.Module):
    """Two layers behind a norm, a few of whose channels are large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.a, self.b = nn.LayerNorm(64), nn.Linear(64, 24), nn.Linear(64, 40)
        self.norm.weight.data = torch.rand(64) ** 4 * 8 + 0.1

    def forward(self, x):
        n = self.norm(x)
        return torch.cat([self.a(n), self.b(n)], -1)


@torch.no_grad()
def test_layers_lose_less_in_the_formats_of_the_recipe():
    data = [(torch.randn(3, 5, 64, generator=GENERATOR),) for _ in range(3)]
    lost, want = [], Wide()(data[0][0])
    for name in ("w4a16-g16-sym", "w4a16-g16-sym+awq"):
        quantized = qgraph.quantize(Wide(), data, example_inputs=data[0], recipe=name)
        lost.append(float((quantized(data[0][0]) - want).square().sum()))
    assert lost[1] < 0.85 * lost[0]


def test_layers_that_stay_in_float_are_left_alone():
    gm = graph("torch", Recipe(weights=Int(4), rules={"*": None}))
    assert smoothed(AWQ(), gm) == 0
    assert scales(gm)["a"] == ("unchanged", "the recipe leaves what reads its input in float")


def test_channels_without_data_and_dead_ones_have_finite_factors():
    assert factors(torch.zeros(3), torch.ones(3), 0.5).tolist() == [1, 1, 1]
    assert factors(torch.tensor([0.0, 4.0]), torch.ones(2), 0.5).tolist() == pytest.approx([0.1, 10.0])


def test_the_stage_runs_from_the_recipes_name_and_needs_data():
    prepared = qgraph.prepare(Block(), (DATA[0],), recipe="w4a16-g16+awq")
    with pytest.raises(CalibrationError, match="awq needs calibration data"):
        qgraph.calibrate(prepared, None)
    qgraph.calibrate(prepared, [(x,) for x in DATA], verify="numerics")
    assert any(e.by == "awq" for e in qgraph.convert(prepared).meta["qgraph"].ledger)


def test_a_grid_without_a_choice_is_refused():
    with pytest.raises(RecipeError, match="awq searches among at least 2 values of alpha, got grid=1"):
        qgraph.load_recipe("w4a16-g32", ["stages=[{awq: {grid: 1}}]"])


def test_the_means_are_over_all_rows():
    kept = Channels(-1)
    kept.update(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    kept.update(torch.tensor([[-2.0, 4.0]]))
    assert kept.mean().tolist() == [2.0, 2.0]
