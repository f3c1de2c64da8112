"""Passes inside onnx_ir's own pipelines."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes import PassManager, Sequential
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qgraph.errors import ModelError
from qgraph.passes import Canonicalize, FoldConstants, as_onnx_pass
from qgraph.pipeline import Pass, Pipeline
from qgraph.testing import run_onnxruntime

SOURCE = """<ir_version: 9, opset_import: ["": 20]> g (float[2,3] x) => (float[2,3] y) <float[3,1] w = {1, -2, 3}> {
    i = Identity (x) t = Transpose (w) y = Mul (i, t) }"""


def model():
    return ir.from_proto(onnx.parser.parse_model(SOURCE))


@pytest.mark.parametrize("sequence", [Sequential, PassManager])
def test_passes_run_between_the_passes_of_onnx_ir(sequence):
    steps = [as_onnx_pass(Canonicalize()), RemoveUnusedNodesPass(), as_onnx_pass(Pipeline(FoldConstants()))]
    result = sequence(steps)(model()) if sequence is PassManager else sequence(*steps)(model())
    assert result.modified and [n.op_type for n in result.model.graph] == ["Mul"]
    x = torch.arange(6.0).reshape(2, 3)
    assert np.array_equal(run_onnxruntime(ir.to_proto(result.model), x)[0], x * torch.tensor([1, -2, 3]))


def test_the_source_model_is_left_alone_and_no_change_is_reported_as_none():
    source = model()
    result = as_onnx_pass(FoldConstants())(source)
    assert result.modified and [n.op_type for n in source.graph] == ["Identity", "Transpose", "Mul"]
    again = as_onnx_pass(FoldConstants())(result.model)
    assert not again.modified and ir.to_proto(again.model) == ir.to_proto(result.model)


def test_a_pass_that_leaves_other_dialects_behind_is_an_error():
    class Break(Pass):
        def run(self, gm, ctx):
            node = next(n for n in gm.graph.nodes if n.op == "call_function")
            node.target, node.kwargs = torch.neg, {}
            return 1

    with pytest.raises(ModelError, match="not an ONNX operator"):
        as_onnx_pass(Break())(model())
