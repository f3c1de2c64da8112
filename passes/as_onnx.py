"""as_onnx_pass(p): a pass of qgraph as a pass of onnx_ir, for its Sequential and PassManager."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import FunctionalPass, PassResult
from torch.fx import GraphModule

from qgraph.onnx_io import from_onnx, to_onnx
from qgraph.pipeline import Context, Pass, Pipeline


class OnnxPass(FunctionalPass):
    """onnx_ir.Model -> GraphModule -> `inner` -> onnx_ir.Model. The input model is not changed.

    onnx_ir wants a new model from such a pass even when nothing changed: it then is an equal one, reported as not modified."""

    def __init__(self, inner: Pass | Pipeline) -> None:
        super().__init__()
        self.inner = inner

    def call(self, model: ir.Model) -> PassResult:
        gm = from_onnx(model)
        changed = _run(self.inner, gm)
        return PassResult(to_onnx(gm), changed)

    def __repr__(self) -> str:
        return f"OnnxPass({self.inner})"


def _run(inner: Pass | Pipeline, gm: GraphModule) -> bool:
    if isinstance(inner, Pipeline):
        return any(step.count for step in inner.run(gm))
    return inner.run(gm, Context()) > 0


def as_onnx_pass(inner: Pass | Pipeline) -> OnnxPass:
    """`inner` as an `onnx_ir` pass: `onnx_ir.passes.Sequential(as_onnx_pass(FoldConstants()), ...)(model)`.

    Raises what `to_onnx` raises when `inner` leaves nodes that are not ONNX operators."""
    return OnnxPass(inner)
