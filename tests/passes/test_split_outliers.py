"""Channels of x with outliers stay in float, and the others get the finer ranges that this leaves."""

import pytest
import torch

import qgraph
from qgraph.errors import CalibrationError, RecipeError
from qgraph.passes.split_outliers import SplitOutliers
from qgraph.pipeline import Context, Pipeline
from qgraph.text import text
from tests.outlying import LARGE, Net, computed, inputs, observed, outliers

DATA = inputs()
X = inputs(1, seed=9)[0]
BOTH = pytest.mark.parametrize("origin", ["torch", "onnx"])


def run(p, gm):
    ctx = Context(data=[(x,) for x in DATA], samples=[(DATA[0],)])
    (step,) = Pipeline(p, verify="numerics").run(gm, ctx)
    return step.count, [d.reason for d in ctx.declines]


@BOTH
def test_readers_of_one_value_share_the_channels_and_the_value_without_them(origin):
    gm = observed(origin, "w8a8-token")
    before = computed(gm, X)
    assert run(SplitOutliers(share=0.06), gm)[0] == 2
    torch.testing.assert_close(computed(gm, X), before)
    reason = next(iter(outliers(gm).values()))[1]
    assert {d for d, _ in outliers(gm).values()} == {"2 of 32 input channels in float", "none"}
    assert reason.startswith("values up to ") and "the others have at most" in reason
    muls = [n for n in gm.graph.nodes if n.op == "call_function" and "mul" in str(n.target).lower() and "mat" not in str(n.target).lower()]
    assert [len(n.users) for n in muls] == [2]
    mask = muls[0].all_input_nodes[1]
    assert (gm.get_buffer(mask.target) == 0).nonzero().flatten().tolist() == LARGE
    printed = text(gm)
    count, reasons = run(SplitOutliers(share=0.06), gm)
    assert count == 0 and text(gm) == printed
    assert reasons.count("it is split already") == 2


@pytest.mark.parametrize(
    "origin, recipe", [("torch", "w8a8-token"), *(("onnx", r) for r in ("w8a8-token", "w8a8-token-asym", "w8a8-dynamic", "w8a8"))]
)
def test_the_quantized_model_is_better_in_integers_and_runs_so(origin, recipe):
    errors, exact = {}, Net().eval()(X).detach()
    for stages in ("", "{llm-int8: {share: 0.06}}"):
        gm = observed(origin, qgraph.load_recipe(recipe, [f"stages=[{stages}]"]))
        qgraph.calibrate(gm, [(x,) for x in DATA], progress=False)
        quantized = qgraph.convert(gm)
        errors[stages] = float((computed(quantized, X) - exact).square().sum())
        program = qgraph.lower(quantized)
        torch.testing.assert_close(computed(program, X), computed(quantized, X), rtol=1e-3, atol=2e-3)
        assert len([k for k in program.kernels() if k.fused]) >= 3, program.kernels()
    assert errors[stages] < 0.35 * errors[""]


def test_a_threshold_takes_every_channel_above_it():
    gm = observed("torch", "llm-int8")
    assert run(SplitOutliers(threshold=30.0), gm)[0] == 2
    assert outliers(gm)["a"][0] == "2 of 32 input channels in float"


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"share": 0.03}, "without its 1 largest channels the range of x would be "),
        ({"threshold": 1e4}, "no value of x exceeds 10000, the largest is "),
        ({"threshold": 0.0}, "values of all its channels exceed 0; give a larger threshold, or a share"),
    ],
)
def test_what_gains_nothing_is_declined_with_a_sentence(options, reason):
    gm = observed("torch", "w8a8-token")
    printed = text(gm)
    count, reasons = run(SplitOutliers(**options), gm)
    assert count == 0 and text(gm) == printed
    assert reasons[0].startswith(reason)
    assert outliers(gm)["a"] == ("none", reasons[0])


def test_an_x_in_float_is_declined():
    gm = observed("onnx", "w8a16")
    assert run(SplitOutliers(), gm) == (0, ["x stays in float, so its outliers widen no range"] * 3)


def test_the_recipe_llm_int8_needs_data_and_does_it_all():
    gm = observed("torch", "llm-int8")
    with pytest.raises(CalibrationError, match="split_outliers needs calibration data"):
        qgraph.calibrate(gm, None)
    qgraph.calibrate(gm, [(x,) for x in DATA], verify="numerics", progress=False)
    assert any(e.by == "split_outliers" for e in qgraph.convert(gm).meta["qgraph"].ledger)


def test_options_without_meaning_are_refused():
    with pytest.raises(RecipeError, match=r"share of stage llm-int8 is a part of the channels between 0 and 1, got 2"):
        SplitOutliers(share=2)
    with pytest.raises(RecipeError, match="threshold and worth of stage llm-int8 are 0 or more"):
        SplitOutliers(worth=-1)
