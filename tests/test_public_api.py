"""The names in qgraph/__init__.py are the public API: a change here is a change for every user."""

import importlib
import subprocess
import sys

import pytest

import qgraph

NAMES = """
CalibrationError CaptureError Int LoweringError ModelError PerAxis PerGroup PerTensor PerToken Pipeline QGraphError QSpec Recipe
RecipeError TensorType VerificationError calibrate capture convert diff export from_checkpoint from_onnx implements load_batches
load_checkpoint load_recipe lower perplexity plan prepare quantize register_backend register_observer register_stage save_checkpoint save_onnx
sensitivity text to_onnx torch_backend view
""".split()


def test_the_public_names_are_these():
    assert qgraph.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented_and_listed(name):
    assert getattr(qgraph, name).__doc__
    assert name in dir(qgraph)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qgraph.quantise


@pytest.mark.parametrize("name", ["calibrate", "capture", "perplexity", "sensitivity", "text"])
def test_a_function_is_not_hidden_by_the_module_of_its_name(name):
    module = importlib.import_module(f"qgraph.{name}")
    assert getattr(qgraph, name) is getattr(module, name)


def test_importing_the_package_does_not_load_torch():
    program = "import sys, qgraph, qgraph.cli; sys.exit('torch' in sys.modules or 'onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
