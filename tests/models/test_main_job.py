"""The main job on real models: floors of accuracy, far above what ONNX Runtime's own quantizer reaches on the same data.

Latency is the demo's business: it depends on what else the machine does."""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest

import qgraph
from tests.models import measure, zoo


@dataclass(frozen=True)
class Bar:
    """Least SQNR in dB, least task metric, largest file in MB."""

    sqnr: float
    metric: float
    megabytes: float


BARS = {
    "minilm": Bar(27.0, 0.999, 25),
    "effnet": Bar(23.5, 0.940, 6),
    "pprec": Bar(18.0, 0.980, 4),
}


@dataclass(frozen=True)
class Job:
    """A real model, quantized."""

    real: zoo.RealModel
    bar: Bar
    path: str
    kernels: list
    ledger: object


@pytest.fixture(scope="module", params=BARS)
def job(request, tmp_path_factory) -> Job:
    real, bar = request.getfixturevalue(request.param), BARS[request.param]
    prepared = qgraph.prepare(real.model, real.example_inputs, recipe=real.recipe, dynamic_shapes=real.dynamic_shapes)
    qgraph.calibrate(prepared, real.calibration_batches())
    program = qgraph.lower(qgraph.convert(prepared), strict=True)
    path = tmp_path_factory.mktemp("main") / f"{real.name}.onnx"
    program.save(path)
    return Job(real, bar, path, program.kernels(), prepared.meta["qgraph"].ledger)


@pytest.mark.slow
def test_scores_reach_the_bar(job):
    sqnr, metric = job.real.score(job.path)
    # Rounded as the bars are.
    assert round(sqnr, 1) >= job.bar.sqnr
    assert round(metric.value, 3) >= job.bar.metric, metric


@pytest.mark.slow
def test_the_file_is_small_and_valid(job):
    onnx.checker.check_model(str(job.path), full_check=True)
    assert measure.file_bytes(job.path) <= job.bar.megabytes * 1e6


@pytest.mark.slow
def test_every_promised_kernel_came_out(job):
    assert len(job.kernels) > 30
    assert [k for k in job.kernels if not k.fused] == []


@pytest.mark.slow
def test_every_weight_is_accounted_for(job):
    weights = [entry for entry in job.ledger if entry.role == "weight"]
    assert sum(entry.quantized for entry in weights) >= len(job.kernels) * 0.6 > 20
    assert all(entry.quantized or entry.reason.startswith("does not pay: float takes about ") for entry in weights)
    assert all(entry.reason for entry in job.ledger)


@pytest.mark.slow
def test_inputs_and_outputs_keep_names_types_and_dynamic_dimensions(job):
    def signature(path):
        session = measure.session(path)
        return [(v.name, v.type, v.shape) for v in session.get_inputs()], [(v.type, v.shape) for v in session.get_outputs()]

    assert signature(job.path) == signature(job.real.float_onnx)


@pytest.mark.slow
def test_other_batch_sizes_than_those_seen_run(job):
    feed = next(measure.batches(job.real.evaluation, 3))
    whole = measure.outputs(measure.session(job.path), feed, batch=3)
    # A static model gives the same rows alone; with run-time ranges a row depends on its neighbours.
    alone = measure.outputs(measure.session(job.path), feed, batch=1)
    tolerance = 0.4 if not job.real.recipe.static else 1e-3
    assert np.abs(whole - alone).max() <= tolerance * np.abs(whole).max()
