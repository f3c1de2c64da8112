"""Passes: one file each; see README.md here for the catalogue and how to write one."""

from qgraph.passes.absorb_activation import AbsorbActivation
from qgraph.passes.absorb_high_bias import AbsorbFromMoments, AbsorbHighBias
from qgraph.passes.allocate_bits import AllocateBits
from qgraph.passes.as_onnx import as_onnx_pass
from qgraph.passes.awq import AWQ
from qgraph.passes.bias_correct import BiasCorrect, CorrectFromMoments
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.double_scales import DoubleScales
from qgraph.passes.equalize import Equalize
from qgraph.passes.fold_attention_biases import FoldAttentionBiases
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_constants import FoldConstants
from qgraph.passes.fold_fake_quant import FoldFakeQuant
from qgraph.passes.fold_pad import FoldPad
from qgraph.passes.fuse_dequant_matmul import FuseDequantMatmul
from qgraph.passes.gptq import GPTQ
from qgraph.passes.infer_types import InferTypes
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.keep_weights import KeepLargest, KeepSensitive
from qgraph.passes.kv_quant import KvQuant
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
from qgraph.passes.split_outliers import SplitOutliers
from qgraph.passes.super_weight import SuperWeight
from qgraph.passes.two_level import TwoLevel
from qgraph.passes.untie_weights import TieWeights, UntieWeights
from qgraph.passes.weigh_channels import WeighChannels

__all__ = [
    "AWQ",
    "GPTQ",
    "AbsorbActivation",
    "AbsorbFromMoments",
    "AbsorbHighBias",
    "AllocateBits",
    "BiasCorrect",
    "Canonicalize",
    "CorrectFromMoments",
    "DoubleScales",
    "Equalize",
    "FoldAttentionBiases",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldFakeQuant",
    "FoldPad",
    "FuseDequantMatmul",
    "InferTypes",
    "InsertFakeQuant",
    "InsertObservers",
    "KeepLargest",
    "KeepSensitive",
    "KvQuant",
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
    "SplitOutliers",
    "SuperWeight",
    "TieWeights",
    "TwoLevel",
    "UntieWeights",
    "WeighChannels",
    "as_onnx_pass",
]
