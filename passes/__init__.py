"""Passes: one file each; see README.md here for the catalogue and how to write one."""

from qgraph.passes.absorb_activation import AbsorbActivation
from qgraph.passes.as_onnx import as_onnx_pass
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_constants import FoldConstants
from qgraph.passes.fold_fake_quant import FoldFakeQuant
from qgraph.passes.fold_pad import FoldPad
from qgraph.passes.fuse_dequant_matmul import FuseDequantMatmul
from qgraph.passes.infer_types import InferTypes
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.recompose import Recompose
from qgraph.passes.remove_dead import RemoveDead
from qgraph.passes.sink_constants import SinkConstants

__all__ = [
    "AbsorbActivation",
    "Canonicalize",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldFakeQuant",
    "FoldPad",
    "FuseDequantMatmul",
    "InferTypes",
    "InsertFakeQuant",
    "InsertObservers",
    "Recompose",
    "RemoveDead",
    "SinkConstants",
    "as_onnx_pass",
]
