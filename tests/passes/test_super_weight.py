"""One weight that makes a spike of the output from a spike of the input is found by numbers, kept in float, and named in the ledger."""

import pytest
import torch
from torch import nn

import qgraph
from qgraph.errors import RecipeError
from qgraph.passes.super_weight import Peak, SuperWeight
from qgraph.pipeline import Context, Pipeline
from qgraph.text import text
from qgraph.torch_export import to_onnx_dialect
from tests.outlying import computed, outliers

K, N = 64, 48


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x)): channel 11 of what `down` reads is a thousand times the others, and weight [5, 11] is large."""

    def __init__(self, large=6.0):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(32, K), nn.Linear(32, K), nn.Linear(K, N)
        with torch.no_grad():
            self.gate.bias[11] = self.up.bias[11] = 30.0
            self.down.weight[5, 11] = large

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def inputs(seed):
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


DATA = [inputs(i) for i in range(3)]
X = inputs(9)


def observed(origin, recipe="w4a16-g32-sym", large=6.0):
    net = Gated(large).eval()
    if origin == "torch":
        return qgraph.prepare(net, (DATA[0],), recipe=recipe)
    return qgraph.prepare(to_onnx_dialect(qgraph.capture(net, (DATA[0],))), recipe=recipe)


def run(p, gm):
    ctx = Context(data=[(x,) for x in DATA], samples=[(DATA[0],)])
    (step,) = Pipeline(p, verify="numerics").run(gm, ctx)
    return step.count, [d.reason for d in ctx.declines]


@pytest.mark.parametrize("origin", ["torch", "onnx"])
def test_it_is_found_and_kept(origin):
    gm = observed(origin)
    before = computed(gm, X)
    assert run(SuperWeight(), gm)[0] == 1
    torch.testing.assert_close(computed(gm, X), before)
    (found,) = [(decision, reason) for decision, reason in outliers(gm).values() if decision != "none"]
    assert found[0] == "1 weights in float"
    assert found[1].startswith("super weight [5, 11] = 6: its input is ")
    assert sorted(decision for decision, _ in outliers(gm).values()) == ["1 weights in float", "none", "none"]
    printed = text(gm)
    assert run(SuperWeight(), gm)[0] == 0
    assert text(gm) == printed


def test_its_group_gets_finer_steps_and_its_output_is_better():
    exact = Gated().eval()(X).detach()
    lost = {}
    for recipe in ("w4a16-g32-sym", "w4a16-g32-sym+super-weight"):
        gm = observed("torch", qgraph.load_recipe(recipe, ["rules={gate: null, up: null}"]))
        qgraph.calibrate(gm, [(x,) for x in DATA], progress=False)
        lost[recipe] = float((computed(qgraph.convert(gm), X) - exact)[..., 5].square().sum())
    assert lost["w4a16-g32-sym+super-weight"] < 0.5 * lost["w4a16-g32-sym"], lost


def test_no_layer_without_a_spike_is_split_and_the_reasons_are_kept():
    gm = observed("torch", large=0.0)
    count, reasons = run(SuperWeight(), gm)
    assert count == 0
    assert sum(r.startswith("no spike: its input reaches ") for r in reasons) == 3
    count, reasons = run(SuperWeight(spike=4.0, part=1.0), observed("torch", large=0.3))
    assert count == 0
    assert any(r.startswith("the spike of its output is no single weight's: that of the largest input makes ") for r in reasons), reasons


def test_the_row_with_the_largest_value_is_kept_of_all_batches():
    seen, rows = Peak(), torch.randn(6, 7)
    rows[4, 2] = -50
    for part in (rows[:3], rows[:0], rows[3:]):
        seen(part)
    assert torch.equal(seen.row, rows[4])
    assert torch.equal(seen.largest, rows.abs().amax(0))


def test_options_without_meaning_are_refused():
    with pytest.raises(RecipeError, match=r"stage super-weight takes a spike above 1 and a part in \(0, 1\], got 0\.5 and 0\.25"):
        SuperWeight(spike=0.5)
