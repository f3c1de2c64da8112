"""Every example runs as its reader would run it, stays short, and shows what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHOWS = {
    "quantize_torch.py": ("onnxruntime  accuracy", "QLinearConv"),
    "quantize_onnx.py": ("rule 'head'", "SQNR", "MatMulInteger"),
    "torch_compile.py": ("w8a8-dynamic   relative error", "w8a16          relative error"),
    "write_a_backend.py": ("became='packed', fused=True", "relative error"),
    "write_a_pass.py": ("merge_linears: 1 changes", "@merged", "merge declined at 4: the first layer has a bias"),
}


@pytest.mark.parametrize("name", SHOWS)
def test_an_example_runs_and_shows_its_point(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / name)]
    result = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [shown for shown in SHOWS[name] if shown not in result.stdout] == [], result.stdout


def test_every_example_but_the_demo_is_listed_here():
    assert {p.name for p in EXAMPLES.glob("*.py")} == {*SHOWS, "demo.py"}


@pytest.mark.parametrize("path", EXAMPLES.glob("*.py"), ids=lambda p: p.name)
def test_an_example_has_at_most_80_lines(path):
    assert len(path.read_text().splitlines()) <= 80
