"""Weights that quantization would hurt most stay in float: the largest, or those whose error costs most on the data."""

import pytest
import torch

import qgraph
from qgraph.errors import CalibrationError, RecipeError
from qgraph.passes.keep_weights import KeepLargest, KeepSensitive
from qgraph.pipeline import Context, Pipeline
from qgraph.text import text
from tests.outlying import LARGE, Net, computed, inputs, observed, outliers

DATA = inputs()
X = inputs(1, seed=9)[0]
BOTH = pytest.mark.parametrize("origin", ["torch", "onnx"])
WHOLE = Net().eval()(X).detach()


def run(p, gm):
    ctx = Context(data=[(x,) for x in DATA], samples=[(DATA[0],)])
    (step,) = Pipeline(p, verify="numerics").run(gm, ctx)
    return step.count, [d.reason for d in ctx.declines]


def kept_of(gm, name):
    """(columns of x or None, the weight [columns, out]) of the product beside a linear."""
    product = next(n for n in gm.graph.nodes if n.meta.get("name") == f"{name}/outliers")
    x, weight = product.all_input_nodes
    columns = gm.get_buffer(x.all_input_nodes[-1].target) if x.meta.get("name") == f"{name}/columns" else None
    return columns, gm.get_buffer(weight.target)


@BOTH
@pytest.mark.parametrize("p", [KeepLargest(0.05), KeepSensitive(0.05), KeepSensitive(0.05, "entries")], ids=str)
def test_the_function_stays_and_a_second_run_changes_nothing(origin, p):
    gm = observed(origin, "w4a16-g32-sym")
    assert run(p, gm)[0] == 3
    torch.testing.assert_close(computed(gm, X), WHOLE)
    printed = text(gm)
    assert run(p, gm) == (0, ["it is split already"] * 3)
    assert text(gm) == printed


@BOTH
def test_the_largest_weights_are_kept_wherever_they_are(origin):
    gm = observed(origin, "w4a16-g32-sym")
    assert KeepLargest(0.02).run(gm, Context()) == 3, "without data"
    weight = Net().a.weight.detach()
    _, kept = kept_of(gm, "a")
    assert sorted(kept[kept != 0].abs().tolist()) == sorted(weight.abs().flatten().topk(15).values.tolist())
    assert outliers(gm)["a"] == ("15 weights in float", "the largest 2.00% of its weights")


@BOTH
def test_channels_are_chosen_by_what_their_error_costs(origin):
    gm = observed(origin, "w4a16-g32-sym")
    run(KeepSensitive(0.06), gm)
    columns, kept = kept_of(gm, "a")
    assert columns.tolist() == LARGE, "where x is large, errors are"
    torch.testing.assert_close(kept, Net().a.weight.detach()[:, LARGE].T)
    decision, reason = outliers(gm)["a"]
    assert decision == "2 of 32 input channels in float"
    assert int(reason.split("%")[0]) > 90 and reason.endswith("% of the error of its output is from them")


@BOTH
@pytest.mark.parametrize("recipe", ["w4a16-g32-sym", "w4a16-g32", "w3a16", "w4a8-g32", "w8a8"])
def test_less_is_lost(origin, recipe):
    lost = {}
    for stages in ("", "{keep-sensitive: {share: 0.06}}", "{keep-sensitive: {share: 0.06, form: entries}}"):
        gm = observed(origin, qgraph.load_recipe(recipe, [f"stages=[{stages}]"]))
        qgraph.calibrate(gm, [(x,) for x in DATA], progress=False)
        lost[stages] = float((computed(qgraph.convert(gm), X) - WHOLE).square().sum())
    plain, *others = lost.values()
    assert max(others) < (1.0 if recipe == "w8a8" else 0.7) * plain, lost


def test_later_stages_know_the_rest_as_an_ordinary_linear():
    lost = {}
    for stages in ("round", "{keep-sensitive: {share: 0.06}}, round", "keep-sensitive, {dense-sparse: {share: 0.05}}, round"):
        gm = observed("torch", qgraph.load_recipe("w4a16-g32-sym", [f"stages=[{stages}]"]))
        qgraph.calibrate(gm, [(x,) for x in DATA], progress=False)
        rounded = [e for e in gm.meta["qgraph"].ledger if e.role == "weight" and e.by == "round_weights"]
        assert len(rounded) == 3, gm.meta["qgraph"].declines
        lost[stages] = float((computed(qgraph.convert(gm), X) - WHOLE).square().sum())
    first, second, _ = lost.values()
    assert second < first


def test_a_weight_that_its_format_holds_is_declined():
    net = Net()
    for layer in (net.a, net.b, net.c):
        torch.nn.init.constant_(layer.weight, 7 / 128)
    gm = observed("torch", "w8a16", net=net)
    assert run(KeepSensitive(), gm) == (0, ["int8 sym per axis 0 holds its weight as it is"] * 3)
    assert outliers(gm)["a"] == ("none", "int8 sym per axis 0 holds its weight as it is")
    for layer in (net.a, net.b, net.c):
        torch.nn.init.zeros_(layer.weight)
    assert run(KeepLargest(), observed("torch", "w8a16", net=net)) == (0, ["its weight is 0"] * 3)


def test_levels_of_a_codebook_are_left_to_the_largest_weights():
    gm = observed("torch", "w4a16-nf-g32")
    count, reasons = run(KeepSensitive(), gm)
    assert (count, reasons) == (0, ["the levels of its codebook are not known yet; dense-sparse keeps the largest weights"] * 3)
    assert run(KeepLargest(), gm)[0] == 3


def test_stages_say_whether_they_need_data():
    assert not qgraph.load_recipe("w4a16-g32+dense-sparse").needs_data
    gm = observed("torch", "w4a16-g32-sym+keep-sensitive")
    with pytest.raises(CalibrationError, match="keep_sensitive needs calibration data"):
        qgraph.calibrate(gm, None)


def test_options_without_meaning_are_refused():
    with pytest.raises(RecipeError, match=r"share of stage dense-sparse is a part of the weights between 0 and 1, got 1\.5"):
        KeepLargest(1.5)
    with pytest.raises(RecipeError, match="form of stage keep-sensitive is columns or entries, got 'rows'"):
        KeepSensitive(form="rows")


def test_gptq_rounds_the_rest():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.ReLU(), torch.nn.Linear(24, 9, bias=False)).eval()
    want, lost = net(X).detach(), {}
    for stages in ("", "+gptq", "+keep-sensitive+gptq"):
        gm = observed("torch", f"w4a16-g32-sym{stages}", net=net)
        qgraph.calibrate(gm, [(x,) for x in inputs(16)], progress=False)
        lost[stages] = float((computed(qgraph.convert(gm), X) - want).square().sum())
    assert lost["+keep-sensitive+gptq"] < 0.8 * lost["+gptq"] < 0.8 * lost[""], lost
