"""Sensitivity: against numbers computed directly, on torch and ONNX graphs; what is marked, sorted and printed."""

import json
import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import linear

import qgraph
from qgraph.effects import Effects
from qgraph.errors import CalibrationError
from qgraph.losses import Loss, decibel, losses, ordered, with_outliers
from qgraph.observe import Observer
from qgraph.ops import choose_qparams
from qgraph.passes import InsertFakeQuant
from qgraph.pipeline import Context
from qgraph.qparams import minmax
from qgraph.reference import fake_quantize
from qgraph.types import PerAxis, PerToken, QSpec
from tests import outlier

BATCHES = outlier.batches()
ORIGINS = pytest.mark.parametrize("origin", outlier.MODELS)


def table(origin: str, **options: object) -> qgraph.losses.Sensitivity:
    model, example = outlier.MODELS[origin]
    return qgraph.sensitivity(model, BATCHES, example_inputs=example, **options)


def prepared(origin: str, recipe: str = "w8a8"):
    model, example = outlier.MODELS[origin]
    gm = qgraph.prepare(model, example, recipe=recipe)
    qgraph.calibrate(gm, BATCHES)
    return gm


def quantized(origin: str):
    gm = prepared(origin)
    InsertFakeQuant().run(gm, Context())
    return gm


def fake(x: torch.Tensor, spec: QSpec) -> torch.Tensor:
    scale, zero_point = choose_qparams(*minmax(x, spec.axis, spec.group), spec)
    return fake_quantize(x, scale, zero_point, spec.dtype, spec.axis, spec.group)


@ORIGINS
def test_the_layer_with_an_outlying_channel_comes_first_and_its_input_is_to_blame(origin):
    first, *others = table(origin)
    assert first.node == outlier.SENSITIVE
    assert first.sqnr < min(row.sqnr for row in others) - 10
    assert first.x_sqnr < first.weight_sqnr - 10


@ORIGINS
def test_losses_are_those_of_the_operation_computed_directly(origin):
    (w0, b0), (w1, b1), _ = [(torch.from_numpy(w), torch.from_numpy(b)) for w, b in outlier.weights()]
    x = torch.relu(linear(torch.cat([b[0] for b in BATCHES]), w0, b0))
    xq, wq = fake(x, QSpec("uint8", symmetric=False)), fake(w1, QSpec("int8", granularity=PerAxis(0)))
    want = linear(x, w1, b1)
    row = next(r for r in table(origin) if r.node == outlier.SENSITIVE)

    def sqnr(got: torch.Tensor) -> float:
        return float(10 * torch.log10(want.square().sum() / (got - want).square().sum()))

    assert row.sqnr == pytest.approx(sqnr(linear(xq, wq, b1)), abs=1e-2)
    assert row.weight_sqnr == pytest.approx(sqnr(linear(x, wq, b1)), abs=1e-2)
    assert row.x_sqnr == pytest.approx(sqnr(linear(xq, w1, b1)), abs=1e-2)
    each = fake(x, QSpec("uint8", False, PerToken(), dynamic=True))
    assert row.run_time_sqnr == pytest.approx(sqnr(linear(each, wq, b1)), abs=1e-2)
    low, high = np.quantile(x.numpy(), [0.25, 0.75])
    assert row.iqr == pytest.approx(high - low, abs=2 * float(x.max()) / 2048)


@ORIGINS
def test_a_graph_that_is_measured_is_not_changed(origin):
    gm = prepared(origin)
    before, seen = qgraph.text(gm), [m.seen for m in gm.modules() if isinstance(m, Observer)]
    assert qgraph.sensitivity(gm, BATCHES).rows == table(origin).rows
    assert qgraph.text(gm) == before
    assert [m.seen for m in gm.modules() if isinstance(m, Observer)] == seen


@pytest.mark.parametrize("recipe", ["w8a8-dynamic", "w8a16"])
def test_ranges_at_run_time_are_an_alternative_to_static_ones_only(recipe):
    rows = table("onnx", recipe=recipe).rows
    assert len(rows) == 3
    assert all(row.run_time_sqnr is None for row in rows)
    assert all((row.x_sqnr is None) == (recipe == "w8a16") for row in rows)


@ORIGINS
@pytest.mark.parametrize("which", ["alone", "others"])
def test_the_effect_is_that_of_the_model_with_rules(origin, which):
    model, example = outlier.MODELS[origin]
    rows = {row.node: row for row in qgraph.sensitivity(prepared(origin), BATCHES, effect=which)}
    left = [n for n in rows if (n == outlier.SENSITIVE) == (which == "others")]
    gm = qgraph.prepare(model, example, recipe=qgraph.load_recipe("w8a8", [f"rules.{n}=null" for n in left]))
    qgraph.calibrate(gm, BATCHES)
    converted = qgraph.convert(gm)
    with torch.no_grad():
        want = outlier.Net()(torch.cat([b[0] for b in BATCHES]))
        got = torch.cat([converted(*b)[0] if origin == "onnx" else converted(*b) for b in BATCHES])
    direct = float(10 * torch.log10(want.square().sum() / (got - want).square().sum()))
    assert rows[outlier.SENSITIVE].effect == pytest.approx(direct, abs=0.3)


def test_an_effect_sorts_the_rows():
    found = table("onnx", effect="alone")
    assert [r.effect for r in found] == sorted(r.effect for r in found)
    effects = Effects(quantized("onnx"), BATCHES)
    assert {place: decibel(1.0, shares[None]) for place, shares in effects.alone().items()} == {r.place: r.effect for r in found}


def test_batches_may_be_cut_in_any_way():
    gm = quantized("onnx")
    cut = [(part,) for (x,) in BATCHES for part in x.split(2)]
    for a, b in zip(losses(gm, BATCHES), losses(gm, cut), strict=True):
        assert (a.node, a.iqr) == (b.node, b.iqr)
        assert a.sqnr == pytest.approx(b.sqnr, rel=1e-5)


def test_there_must_be_data_that_can_be_read_twice():
    with pytest.raises(CalibrationError, match="sensitivity needs calibration data"):
        table_of(None)
    with pytest.raises(CalibrationError, match="goes through the calibration data several times"):
        table_of(iter(BATCHES))
    with pytest.raises(CalibrationError, match="no calibration data"):
        table_of([])


def table_of(batches: object) -> None:
    qgraph.sensitivity(outlier.proto(), batches)


def test_the_table_names_every_operation_and_json_is_strict():
    found = table("onnx", effect="alone")
    assert all(row.node in str(found) for row in found)
    rows = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert [r["node"] for r in rows] == [r.node for r in found]
    assert rows[0]["sqnr"] == found.rows[0].sqnr


def test_a_decibel_is_ten_times_the_logarithm():
    assert decibel(100.0, 1.0) == 20.0
    assert decibel(0.0, 0.0) == decibel(1.0, 0.0) == math.inf
    assert decibel(0.0, 1.0) == -math.inf


def loss(sqnr: float = 20.0, iqr: float | None = 1.0, effect: float | None = None) -> Loss:
    return Loss("n", "k", "int8", "uint8", sqnr, None, None, None, iqr, False, effect, (0, f"{sqnr}{iqr}"))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_outliers_lie_above_tukeys_fence(values):
    first, third = np.quantile(values, [0.25, 0.75])
    fence = third + 1.5 * (third - first)
    found = with_outliers([loss(iqr=v) for v in values])
    clear = [(row, v) for row, v in zip(found, values, strict=True) if abs(v - fence) > 1e-9 * (1 + fence)]
    assert all(row.outlier == (v > fence) for row, v in clear)


@given(st.lists(st.tuples(st.floats(-50, 100), st.none() | st.floats(-50, 100)), max_size=20))
def test_rows_are_sorted_by_effect_or_else_by_their_own_loss(pairs):
    keys = [r.sqnr if r.effect is None else r.effect for r in ordered(loss(s, effect=e) for s, e in pairs)]
    assert keys == sorted(keys)


def test_rows_without_a_range_are_no_outliers():
    assert with_outliers([loss(iqr=None)]) == [loss(iqr=None)]


IF = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[4, 3] x, bool c) => (float[4, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6.5}, float[3, 2] v = {1, -2, 3, 4, -5, 6}> {
  [if] y = If (c) <
    then_branch = a () => (float[4, 2] p) { [yes] p = MatMul (x, w) },
    else_branch = b () => (float[4, 2] q) { [no] q = MatMul (x, v) }
  >
}
"""


def test_operations_in_bodies_have_rows_and_no_effect():
    x = torch.linspace(-1, 2, 12).view(4, 3)
    data = [(x, torch.tensor(c)) for c in (True, False)]
    found = qgraph.sensitivity(onnx.parser.parse_model(IF), data, recipe="w8a8-dynamic", effect="alone")
    assert {r.node for r in found} == {"yes", "no"}
    assert all(20 < r.sqnr < 80 and r.effect is None for r in found)
