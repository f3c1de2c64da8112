"""Every example runs as its reader would run it, stays short, and shows what it says."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHOWS = {
    "bert_ablation.py": ("MiniLM", "W8A32", "ZeroQuant"),
    "cuda_kernels.py": (
        "w8a8-token: quantize_rows, w8a8_linear, norm_quantize",
        "w4a16-g32: weight_only_linear",
        "for large batches: quantize_rows",
    ),
    "generate.py": ("--- float", "--- w4a16-g32, 0.1 MB", "for a prompt of 30 tokens, then"),
    "generate_cuda.py": ("--- w4a16kv8-g128 on cpu, kernels emulated", "for a prompt of 30 tokens, then"),
    "quantize_torch.py": ("onnxruntime  accuracy", "QLinearConv"),
    "quantize_onnx.py": ("rule 'head'", "SQNR", "MatMulInteger"),
    "torch_compile.py": ("w8a8-dynamic   relative error", "w8a16          relative error"),
    "write_a_backend.py": ("became='packed', fused=True", "relative error"),
    "write_a_pass.py": ("merge_linears: 1 changes", "@merged", "merge declined at 4: the first layer has a bias"),
}
ARGUMENTS = dict.fromkeys(("generate.py", "generate_cuda.py"), ("--tiny", "--tokens", "8"))
ENVIRONMENTS = {"generate_cuda.py": {"QGRAPH_CUDA": "emulate"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What an example prints, run once."""

    @cache
    def printed(name: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)} | ENVIRONMENTS.get(name, {})
        command, folder = [sys.executable, str(EXAMPLES / name), *ARGUMENTS.get(name, ())], tmp_path_factory.mktemp("example")
        result = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return printed


@pytest.mark.parametrize("name", SHOWS)
def test_an_example_runs_and_shows_its_point(name, run):
    assert [shown for shown in SHOWS[name] if shown not in run(name)] == [], run(name)


def test_the_ablation_shows_that_activations_are_what_hurts(run):
    lines = run("bert_ablation.py").splitlines()[1:]
    sqnr = {title.strip(): float(db) for title, db, _ in (line.rsplit(maxsplit=2) for line in lines)}
    weights, activations, both = sqnr["W8A32"], sqnr["W32A8, static per tensor"], sqnr["W8A8, static per tensor"]
    assert weights > 28 and weights > activations + 10
    assert activations - 1 < both <= activations + 0.2  # integer weights add next to nothing to what integer activations cost
    token, asymmetric = sqnr["W8A8, per token"], sqnr["W8A8, per token, asymmetric"]
    assert both + 4 < token < asymmetric < weights and token - 1 < sqnr["ZeroQuant"] < asymmetric


def test_every_example_but_the_demo_is_listed_here():
    assert {p.name for p in EXAMPLES.glob("[!_]*.py")} == {*SHOWS, "demo.py"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_an_example_has_at_most_80_lines(path):
    assert len(path.read_text().splitlines()) <= 80
