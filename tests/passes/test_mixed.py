"""mixed: what goes back to higher precision, on torch and ONNX graphs, and what the ledger says of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qgraph
from qgraph.errors import CalibrationError, RecipeError
from qgraph.formats import OVERRIDE
from qgraph.losses import Loss, Sensitivity
from qgraph.passes import Mixed
from qgraph.pipeline import Context
from qgraph.recipe import from_dict
from qgraph.testing import from_onnx
from tests import outlier

BATCHES = outlier.batches()
ORIGINS = pytest.mark.parametrize("origin", outlier.MODELS)


def quantized(origin: str, stage: Mixed, **fields: object):
    model, example = outlier.MODELS[origin]
    recipe = from_dict({"stages": [stage], **fields}, base=qgraph.load_recipe("w8a8"))
    return qgraph.quantize(model, BATCHES, example_inputs=example, recipe=recipe, verify="structure")


def decisions(gm) -> dict[str, str]:
    return {e.node: e.decision for e in gm.meta["qgraph"].ledger if e.role == "x"}


@ORIGINS
def test_the_most_sensitive_operation_gets_a_range_at_run_time_or_stays_float(origin):
    gm = quantized(origin, Mixed(threshold=30))
    found = decisions(gm)
    assert found[outlier.SENSITIVE] == "float"  # one channel spoils any range of the whole tensor
    assert found["first"] == found["third"] == "uint8 asym per tensor"
    entry = gm.meta["qgraph"].ledger.get(outlier.SENSITIVE, "weight")
    assert "stage mixed" in entry.reason and "dB when quantized alone" in entry.reason


@ORIGINS
def test_the_result_is_more_accurate_and_still_runs_on_the_backend(origin):
    x = outlier.batches(1, seed=9)[0][0]
    want = outlier.Net()(x).detach()
    errors = []
    for stage in (Mixed(keep=0), Mixed(threshold=30)):
        program = qgraph.lower(quantized(origin, stage), strict=True)
        got = program(x)
        errors.append(float((torch.as_tensor(got[0] if origin == "onnx" else got) - want).norm()))
    assert errors[1] < errors[0] / 2


def test_a_second_run_changes_nothing_and_the_float_graph_stays_as_it_is():
    recipe = from_dict({"stages": [Mixed()]}, base=qgraph.load_recipe("w8a8"))
    gm = qgraph.prepare(outlier.proto(), recipe=recipe)
    before, ctx = qgraph.text(gm), Context(data=BATCHES)
    assert Mixed().run(gm, ctx) == 1
    assert qgraph.text(gm) == before
    assert [n.name for n in gm.graph.nodes if OVERRIDE in n.meta] == ["gemm_1"]
    assert Mixed(fraction=1.0).run(gm, ctx) == 0


def test_a_rule_of_the_user_wins():
    gm = quantized("onnx", Mixed(threshold=30), rules={outlier.SENSITIVE: {"activations": {"bits": 8}}})
    assert decisions(gm)[outlier.SENSITIVE] != "float"


def test_it_needs_a_recipe_and_data():
    graph, _ = from_onnx(outlier.proto(), BATCHES[0][0])
    with pytest.raises(RecipeError, match="name it in one, such as w8a8\\+mixed"):
        Mixed().run(graph, Context(data=BATCHES))
    with pytest.raises(CalibrationError, match="stage mixed of recipe w8a8\\+mixed needs calibration data"):
        qgraph.quantize(outlier.proto(), recipe="w8a8+mixed")


@pytest.mark.parametrize(("options", "message"), [({"metric": "variance"}, "'sqnr' or 'iqr'"), ({"fraction": 2}, "from 0 to 1")])
def test_options_without_meaning_are_errors(options, message):
    with pytest.raises(RecipeError, match=message):
        Mixed(**options)


def rows(*values: tuple[float, bool]) -> Sensitivity:
    made = (Loss(f"n{i}", "k", "w", "x", s, None, None, None, 1.0, o, None, (0, f"n{i}")) for i, (s, o) in enumerate(values))
    return Sensitivity(tuple(sorted(made, key=lambda r: r.sqnr)))


@given(st.lists(st.tuples(st.floats(0, 60), st.booleans()), max_size=12), st.floats(0, 1))
def test_those_chosen_are_the_worst(values, fraction):
    found = rows(*values)
    by_fraction = [c.place for c in Mixed(fraction=fraction).chosen(found)]
    assert by_fraction == [r.place for r in found][: len(by_fraction)]
    assert len(by_fraction) - 1 < fraction * len(found) <= len(by_fraction)
    assert [c.place for c in Mixed(threshold=20.0, slack=0.0).chosen(found)] == [r.place for r in found if r.sqnr < 20]
    assert [c.place for c in Mixed(metric="iqr").chosen(found)] == [r.place for r in found if r.outlier]


@ORIGINS
@pytest.mark.parametrize("target", [25.0, 35.0])
def test_a_target_for_the_outputs_is_met_by_as_few_operations_as_will_do(origin, target):
    gm = quantized(origin, Mixed(target=target, samples=24))
    x = torch.cat([b[0] for b in BATCHES])
    want, got = outlier.Net()(x).detach(), gm(x)
    got = got[0] if isinstance(got, tuple | list) else got
    assert 10 * torch.log10(want.square().sum() / (want - got).square().sum()) > target - 1
    entry = gm.meta["qgraph"].ledger.get(outlier.SENSITIVE, "x")
    assert "stage mixed (costs the output" in entry.reason
    others = [e for e in gm.meta["qgraph"].ledger if e.role == "x" and e.node != outlier.SENSITIVE]
    assert len(others) == 2 and all("recipe" in e.reason for e in others)


def test_a_target_that_is_met_already_changes_nothing():
    gm = quantized("onnx", Mixed(target=0.0))
    assert set(decisions(gm).values()) == {"uint8 asym per tensor"}
