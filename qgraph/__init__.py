"""qgraph: quantization as graph rewriting.

    prepared = qgraph.prepare(model, example_inputs, recipe="w8a8")
    qgraph.calibrate(prepared, batches)
    quantized = qgraph.convert(prepared)
    qgraph.export(quantized, "model.int8.onnx")

Names are imported when first used, so that the command line starts without loading torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgraph.api import convert, export, lower, prepare, quantize
    from qgraph.backend import register_backend
    from qgraph.calibrate import calibrate, load_batches
    from qgraph.capture import capture
    from qgraph.checkpoints.insert import from_checkpoint
    from qgraph.checkpoints.load import load_checkpoint
    from qgraph.checkpoints.save import save_checkpoint
    from qgraph.errors import (
        CalibrationError,
        CaptureError,
        LoweringError,
        ModelError,
        QGraphError,
        RecipeError,
        VerificationError,
    )
    from qgraph.observe import register_observer
    from qgraph.onnx_io import from_onnx, save_onnx, to_onnx
    from qgraph.perplexity import perplexity
    from qgraph.pipeline import Pipeline
    from qgraph.plan import plan
    from qgraph.recipe import Int, Recipe, load_recipe
    from qgraph.sensitivity import sensitivity
    from qgraph.stages import register_stage
    from qgraph.text import diff, text
    from qgraph.torch_compile import torch_backend
    from qgraph.types import PerAxis, PerGroup, PerTensor, PerToken, QSpec, TensorType
    from qgraph.views import implements, view

_HOME = {
    "api": ("convert", "export", "lower", "prepare", "quantize"),
    "backend": ("register_backend",),
    "calibrate": ("calibrate", "load_batches"),
    "capture": ("capture",),
    "checkpoints.insert": ("from_checkpoint",),
    "checkpoints.load": ("load_checkpoint",),
    "checkpoints.save": ("save_checkpoint",),
    "errors": ("CalibrationError", "CaptureError", "LoweringError", "ModelError", "QGraphError", "RecipeError", "VerificationError"),
    "observe": ("register_observer",),
    "onnx_io": ("from_onnx", "save_onnx", "to_onnx"),
    "perplexity": ("perplexity",),
    "pipeline": ("Pipeline",),
    "plan": ("plan",),
    "recipe": ("Int", "Recipe", "load_recipe"),
    "sensitivity": ("sensitivity",),
    "stages": ("register_stage",),
    "text": ("diff", "text"),
    "torch_compile": ("torch_backend",),
    "types": ("PerAxis", "PerGroup", "PerTensor", "PerToken", "QSpec", "TensorType"),
    "views": ("implements", "view"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "CalibrationError",
    "CaptureError",
    "Int",
    "LoweringError",
    "ModelError",
    "PerAxis",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Pipeline",
    "QGraphError",
    "QSpec",
    "Recipe",
    "RecipeError",
    "TensorType",
    "VerificationError",
    "calibrate",
    "capture",
    "convert",
    "diff",
    "export",
    "from_checkpoint",
    "from_onnx",
    "implements",
    "load_batches",
    "load_checkpoint",
    "load_recipe",
    "lower",
    "perplexity",
    "plan",
    "prepare",
    "quantize",
    "register_backend",
    "register_observer",
    "register_stage",
    "save_checkpoint",
    "save_onnx",
    "sensitivity",
    "text",
    "to_onnx",
    "torch_backend",
    "view",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'qgraph' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"qgraph.{_MODULE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE})


class _Package(ModuleType):
    """Importing a submodule binds it in its package; `capture`, `perplexity`, `text` and others stay the functions of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _MODULE or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
