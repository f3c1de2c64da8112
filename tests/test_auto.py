"""recipe="auto": the choice, the curve, and a search that goes on where it was interrupted. Latencies are counted, never measured."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

import qgraph
from qgraph import auto as search
from qgraph.cli import main
from qgraph.errors import CalibrationError, ModelError, RecipeError
from qgraph.score import METRICS, latency_ratio
from qgraph.tradeoff import Candidate, Tradeoff, Trial
from tests import outlier, small

BATCHES, HELD_OUT = outlier.batches(), outlier.batches(2, seed=7)
ORIGINS = pytest.mark.parametrize("origin", outlier.MODELS)


def cost(program, args) -> float:
    """10, less 2 for each integer weight, plus 1 for each range at run time."""
    kinds = [getattr(n.target, "op_type", "") for n in program.gm.graph.nodes]
    return 10 - 2 * sum(b.dtype == torch.int8 and b.dim() == 2 for b in program.gm.buffers()) + kinds.count("DynamicQuantizeLinear")


@pytest.fixture(autouse=True)
def two_calibrators(monkeypatch):
    monkeypatch.setattr(search, "CALIBRATORS", (("observer=percentile", "observer_options.percentile=99.9"),))
    monkeypatch.setattr(search, "SMOOTHING", ())
    monkeypatch.setattr(search, "CORRECTIONS", ())


def run(model, example=None, **options):
    options = {"candidates": ("w8a8", "w8a8-dynamic"), "evaluation": HELD_OUT, "timer": cost, **options}
    return search.auto(model, BATCHES, example_inputs=example, **options)


def tradeoff(gm) -> Tradeoff:
    return gm.meta["qgraph"].tradeoff


def names(found: Tradeoff) -> list[str]:
    return [str(t.candidate) for t in found]


@ORIGINS
def test_the_fastest_within_the_budget_is_chosen_and_keeps_it(origin):
    model, example = outlier.MODELS[origin]
    gm = run(model, example, max_drop=0.9)
    found = tradeoff(gm)
    assert found.chosen.candidate.name == "w8a8"
    assert found.chosen.ratio == min(t.ratio for t in found) == pytest.approx(0.4)
    net, program, error, signal = outlier.Net(), qgraph.lower(gm), 0.0, 0.0
    for (x,) in HELD_OUT:
        want = net(x).detach()
        error, signal = error + float((tree_leaves(program(x))[0] - want).square().sum()), signal + float(want.square().sum())
    assert error / signal == pytest.approx(found.chosen.drop, rel=0.02, abs=1e-6)
    assert "0.40 of the float latency" in found.statement


@ORIGINS
def test_only_the_sensitive_operation_goes_back_to_float(origin):
    model, example = outlier.MODELS[origin]
    gm = run(model, example, max_drop=0.005, candidates=("w8a8",))
    found = tradeoff(gm)
    assert found.chosen.ratio == pytest.approx(0.6)
    (rule,) = (o for o in found.chosen.candidate.overrides if o.endswith("=null"))
    assert rule.startswith(f"rules.{outlier.SENSITIVE}")
    floats = {e.node for e in gm.meta["qgraph"].ledger if e.role == "weight" and not e.quantized}
    assert len(floats) == 1 and floats.pop().startswith(outlier.SENSITIVE)


def test_a_correction_is_tried_before_operations_go_back(monkeypatch):
    monkeypatch.setattr(search, "CORRECTIONS", ("no-such-stage", "mixed"))
    found = tradeoff(run(outlier.proto(), max_drop=0.005, candidates=("w8a8",)))
    assert [t.candidate.name for t in found] == ["w8a8", "w8a8", "w8a8+mixed"]
    assert found.chosen is found.trials[-1] and found.chosen.ratio == pytest.approx(0.6)


SMOOTHING = tuple((f"stages=[{{smoothquant: {{alpha: {alpha}, explicit: true}}}}]",) for alpha in (1.0, 0.9, 0.8))


@ORIGINS
def test_static_ranges_behind_smoothing_are_a_family_of_encoders(origin, monkeypatch):
    monkeypatch.setattr(search, "SMOOTHING", SMOOTHING)
    model, example = outlier.MODELS[origin]
    found = tradeoff(run(model, example, max_drop=0.015, candidates=("w8a8",)))
    assert found.chosen.candidate.overrides == SMOOTHING[1] and found.chosen.ratio == pytest.approx(0.4)
    assert [t.candidate.overrides for t in found][-2:] == [*SMOOTHING[:2]], "the third is not needed"


def test_corrections_come_behind_the_smoothing_and_none_of_them_twice(monkeypatch):
    monkeypatch.setattr(search, "SMOOTHING", SMOOTHING[1:2])
    monkeypatch.setattr(search, "CORRECTIONS", ("smoothquant", "round", "bias-correct"))
    found = tradeoff(run(outlier.proto(), max_drop=1e-4, candidates=("w8a8",)))
    tried = [(t.candidate.name, *t.candidate.overrides) for t in found if not t.candidate.back]
    (smoothed,) = SMOOTHING[1]
    assert ("w8a8", smoothed.replace("]", ", round]")) in tried and "w8a8+round" in [name for name, *_ in tried]
    assert not any("smoothquant" in name for name, *_ in tried) and len(tried) == len(set(tried))


def test_convolutional_networks_are_not_smoothed():
    assert not search._mostly_linear(
        qgraph.capture(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(2, 2)), (torch.rand(1, 1, 3, 3),))
    )


def test_the_chosen_candidate_is_a_recipe_that_can_be_used_again():
    gm = run(outlier.proto(), max_drop=0.005, candidates=("w8a8",))
    chosen = tradeoff(gm).chosen.candidate
    again = qgraph.quantize(outlier.proto(), BATCHES, recipe=qgraph.load_recipe(chosen.name, chosen.overrides))
    assert qgraph.text(again) == qgraph.text(gm)


def test_the_float_model_is_the_answer_where_nothing_keeps_the_budget(tmp_path):
    gm = run(outlier.proto(), max_drop=0.0)
    found = tradeoff(gm)
    assert found.chosen is None
    assert found.statement.startswith("the float model: nothing that is faster keeps the budget")
    reasons = {e.reason for e in gm.meta["qgraph"].ledger}
    assert reasons == {found.statement}
    qgraph.export(gm, tmp_path / "float.onnx")
    x = HELD_OUT[0][0]
    torch.testing.assert_close(qgraph.lower(gm)(x)[0], outlier.Net()(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_program_that_is_slower_than_float_is_no_answer():
    found = tradeoff(run(outlier.proto(), max_drop=1.0, candidates=("w8a8",), timer=lambda program, args: 1 / cost(program, args)))
    assert found.chosen is None
    assert names(found) == ["w8a8"]  # its other calibrators would be as slow


def test_a_candidate_that_fails_is_a_row_with_its_reason():
    found = tradeoff(run(outlier.proto(), max_drop=0.9, candidates=("w4a8-g7", "w8a8")))
    failed = found.trials[0]
    assert failed.candidate.name == "w4a8-g7" and "nothing to quantize" in failed.failure
    assert math.isnan(failed.ratio) and found.chosen.candidate.name == "w8a8"
    assert "nothing to quantize" in str(found) and json.dumps(found.as_json(), allow_nan=False)


class Counting:
    """A metric that counts its calls, and interrupts one of them."""

    def __init__(self, stop: int | None = None):
        self.calls, self.stop = 0, stop

    def __call__(self, run, batches) -> float:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        (y,) = run(next(iter(batches)))
        return float(-y.abs().mean().log2())


THREE = ("w8a8", "w8a8-dynamic", "w8a8-token-asym")


def test_a_search_goes_on_where_it_was_interrupted(tmp_path):
    file = tmp_path / "trials.json"
    with pytest.raises(KeyboardInterrupt):
        run(outlier.proto(), metric=Counting(stop=3), max_drop=9.0, resume=file, candidates=THREE)
    again = Counting()
    first = tradeoff(run(outlier.proto(), metric=again, max_drop=9.0, resume=file, candidates=THREE))
    assert again.calls == 1 + 2  # the float model, and the two trials of three that were not done
    third = Counting()
    second = tradeoff(run(outlier.proto(), metric=third, max_drop=9.0, resume=file, candidates=THREE))
    assert third.calls == 1
    assert str(second) == str(first) and len(first.trials) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["trials.json"]


def test_other_data_is_another_search_in_the_same_file(tmp_path):
    file = tmp_path / "trials.json"
    for evaluation in (HELD_OUT, HELD_OUT[:1]):
        metric = Counting()
        run(outlier.proto(), metric=metric, max_drop=9.0, resume=file, evaluation=evaluation, candidates=("w8a8-dynamic",))
        assert metric.calls == 2
    assert len(json.loads(file.read_text())["runs"]) == 2


def test_a_file_that_is_something_else_is_not_overwritten(tmp_path):
    file = tmp_path / "model.json"
    for content in ("{}", "no json"):
        file.write_text(content)
        with pytest.raises(ModelError, match="no file of finished trials"):
            run(outlier.proto(), resume=file)
        assert file.read_text() == content


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "sqnrr"}, RecipeError, "did you mean 'sqnr'"),
        ({"max_drop": -0.1}, RecipeError, "0 or more, not -0.1"),
        ({"max_drop": math.nan}, RecipeError, "0 or more, not nan"),
        ({"recipe": "w8a8", "max_drop": 0.1}, RecipeError, 'for recipe="auto", not for w8a8'),
    ],
)
def test_what_is_asked_wrongly_is_an_error(options, error, message):
    with pytest.raises(error, match=message):
        qgraph.quantize(outlier.proto(), BATCHES, **{"recipe": "auto", **options})


def test_it_needs_data():
    with pytest.raises(CalibrationError, match="recipe auto needs calibration data"):
        qgraph.quantize(outlier.proto(), recipe="auto")


def test_latency_is_the_ratio_of_medians_of_calls_in_turn():
    calls: list[str] = []

    def timer(program, args) -> float:
        calls.append(program.__name__)
        slow = len(calls) in (1, 2)  # an outlier in each: medians do not see it
        return (9.0 if slow else 1.0) * (2.0 if program is reference else 0.5)

    def reference() -> None: ...
    def quantized() -> None: ...

    assert latency_ratio(reference, quantized, (), timer=timer) == 0.25
    assert calls == ["reference", "quantized"] * (len(calls) // 2)


def test_agreement_is_the_share_of_rows_whose_largest_element_stays():
    a, b = torch.tensor([[1.0, 2], [3, 1]]), torch.tensor([[1.0, 2], [0, 1]])
    assert METRICS["agreement"](lambda x: (a,), lambda x: (b,), [None]) == 0.5
    assert METRICS["sqnr"](lambda x: (a,), lambda x: (b,), [None]) == pytest.approx(1 - 9 / 15)


TRIALS = st.builds(
    lambda name, drop, ratio, failed: Trial(Candidate(name), 1 - drop, drop, ratio, failure="x" if failed else ""),
    st.text(max_size=3),
    st.floats(-1, 1),
    st.floats(0.1, 2),
    st.booleans(),
)


@given(st.lists(TRIALS, max_size=6))
def test_no_trial_beats_one_of_the_curve(trials):
    curve = Tradeoff("m", 1.0, 0.1, tuple(trials), None).curve()
    good = [t for t in trials if not t.failure]
    assert all(not (t.ratio <= c.ratio and t.drop <= c.drop and (t.ratio, t.drop) != (c.ratio, c.drop)) for c in curve for t in good)
    assert all(any(c.ratio <= t.ratio and c.drop <= t.drop for c in curve) for t in good)


@given(TRIALS)
def test_a_trial_survives_json(trial):
    assert Trial.from_json(json.loads(json.dumps(trial.as_json(), allow_nan=False))) == trial


def test_the_command_line_searches_and_reports(tmp_path):
    small.save_mlp(tmp_path / "float.onnx")
    np.savez(tmp_path / "data.npz", x=small.samples(8))
    args = ["quantize", "float.onnx", "-o", "out.onnx", "--recipe", "auto", "--calibration", "data.npz", "--batch", "4", "--json"]
    full = [str(tmp_path / a) if a.endswith((".onnx", ".npz")) else a for a in args]
    result = CliRunner().invoke(main, [*full, "--max-drop", "0.05", "--resume", str(tmp_path / "trials.json")])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (tmp_path / "out.onnx").exists() and (tmp_path / "trials.json").exists()
    assert report["tradeoff"]["max_drop"] == 0.05 and len(report["tradeoff"]["trials"]) >= 4
    wrong = CliRunner().invoke(main, [*full[:4], "--recipe", "w8a8", "--max-drop", "0.1"])
    assert wrong.exit_code == 1 and "--max-drop: for --recipe auto, not for w8a8" in wrong.stderr


def test_the_command_line_prints_sensitivities(tmp_path):
    small.save_mlp(tmp_path / "float.onnx")
    np.savez(tmp_path / "data.npz", x=small.samples(8))
    args = ["sensitivity", str(tmp_path / "float.onnx"), "--calibration", str(tmp_path / "data.npz")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0 and "first" in result.stdout and "second" in result.stdout
    assert {row["node"] for row in json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)} == {"first", "second"}


@pytest.mark.slow
def test_a_real_recognizer_gets_an_answer_within_its_budget():
    from tests.models import measure, zoo

    model = zoo.pprec()
    batches = [b for b, _ in zip(model.calibration_batches(4), range(4), strict=False)]
    held_out = [b for b, _ in zip(measure.batches(model.evaluation, 10), range(2), strict=False)]
    gm = search.auto(model.model, batches, evaluation=held_out, max_drop=0.08, candidates=("w8a8",), timer=cost)
    found = tradeoff(gm)
    assert found.chosen is not None and found.chosen.drop <= 0.08 and found.chosen.ratio < 1
