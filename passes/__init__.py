"""Passes: one file each; see README.md here for the catalogue and how to write one."""

from qgraph.passes.absorb_activation import AbsorbActivation
from qgraph.passes.absorb_high_bias import AbsorbFromMoments, AbsorbHighBias
from qgraph.passes.as_onnx import as_onnx_pass
from qgraph.passes.bias_correct import BiasCorrect, CorrectFromMoments
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.equalize import Equalize
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_constants import FoldConstants
from qgraph.passes.fold_fake_quant import FoldFakeQuant
from qgraph.passes.fold_pad import FoldPad
from qgraph.passes.fuse_dequant_matmul import FuseDequantMatmul
from qgraph.passes.infer_types import InferTypes
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.merge_equal import MergeEqual
from qgraph.passes.mixed import Mixed
from qgraph.passes.open_attention import OpenAttention
from qgraph.passes.ranges_from_moments import RangesFromMoments
from qgraph.passes.recompose import Recompose
from qgraph.passes.reduce_range import ReduceRange
from qgraph.passes.relax_clip import RelaxClip
from qgraph.passes.remove_dead import RemoveDead
from qgraph.passes.round_weights import RoundWeights
from qgraph.passes.sink_constants import SinkConstants
from qgraph.passes.smooth_quant import SmoothQuant

__all__ = [
    "AbsorbActivation",
    "AbsorbFromMoments",
    "AbsorbHighBias",
    "BiasCorrect",
    "Canonicalize",
    "CorrectFromMoments",
    "Equalize",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldFakeQuant",
    "FoldPad",
    "FuseDequantMatmul",
    "InferTypes",
    "InsertFakeQuant",
    "InsertObservers",
    "MergeEqual",
    "Mixed",
    "OpenAttention",
    "RangesFromMoments",
    "Recompose",
    "ReduceRange",
    "RelaxClip",
    "RemoveDead",
    "RoundWeights",
    "SinkConstants",
    "SmoothQuant",
    "as_onnx_pass",
]
