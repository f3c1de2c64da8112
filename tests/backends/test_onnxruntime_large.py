"""Large models are not loaded in full before they run, for ONNX Runtime takes several times their size for it."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.fx import GraphModule

import qgraph
from qgraph.backends.onnxruntime import OnnxRuntime, kernels, runtime, session
from qgraph.cli import main
from qgraph.edit import copy_graph
from qgraph.errors import LoweringError
from tests.backends.by_hand import load
from tests.small import mlp_proto, samples, save_mlp


@pytest.fixture
def loaded(monkeypatch) -> list[bool]:
    """Whether each session was optimized; every model is a large one."""
    found: list[bool] = []

    def counted(model, options, **kwargs):
        found.append(options.optimized)
        return runtime.session(model, options, **kwargs)

    monkeypatch.setattr(session, "LARGE", 1)
    monkeypatch.setattr(session, "session", counted)
    monkeypatch.setattr(kernels, "session", counted)
    return found


def quantized() -> GraphModule:
    return qgraph.quantize(mlp_proto(), recipe="w4a16-nf")


def test_it_is_optimized_when_it_first_runs(loaded) -> None:
    graph, x = quantized(), samples(3)
    program = qgraph.lower(graph)
    assert loaded == [False]
    for _ in range(2):
        assert np.abs(program(x) - graph(torch.from_numpy(x))[0].numpy()).max() < 1e-5
    assert loaded == [False, True]


def test_to_write_it_and_to_name_its_kernels_takes_one_optimization(loaded, tmp_path) -> None:
    save_mlp(tmp_path / "float.onnx")
    arguments = ["quantize", str(tmp_path / "float.onnx"), "-o", str(tmp_path / "out.onnx"), "--recipe", "w4a16-nf"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "2 of 2 fused" in done.stdout
    assert loaded == [False, True]
    qgraph.export(quantized(), tmp_path / "again.onnx")
    assert loaded == [False, True, False]


def test_a_promise_is_checked_on_the_optimized_graph(loaded, tmp_path) -> None:
    OnnxRuntime().export(copy_graph(quantized()), tmp_path / "out.onnx", strict=True)
    assert loaded == [False, True]


def test_what_onnxruntime_refuses_is_refused_at_once(loaded) -> None:
    gm = load('<ir_version: 8, opset_import: ["": 13, "nobody": 1]> g (float[N] x) => (float[N] y) { y = nobody.Knows (x) }')
    with pytest.raises(LoweringError, match=r"ONNX Runtime .* refuses the model"):
        OnnxRuntime().lower(gm)
