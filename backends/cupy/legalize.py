"""Passes that turn a converted graph, of either dialect, into one whose quantized operations are torch.ops.qgraph_cuda.* (see ops.py).

keep_cache -> turn_weights -> fold_pad -> absorb_activation -> fuse_dequant_matmul -> rows_in_integers -> merge_equal
-> fuse_norm_quantize -> fuse_act_quantize -> claim_kernels
"""

from __future__ import annotations

from qgraph.backends.cupy.claim import ClaimKernels
from qgraph.backends.cupy.fuse import FuseActQuantize, FuseNormQuantize
from qgraph.backends.cupy.keep_cache import KeepCache
from qgraph.backends.cupy.policy import RowsInIntegers
from qgraph.backends.onnxruntime.legalize import TurnWeights
from qgraph.passes.absorb_activation import AbsorbActivation
from qgraph.passes.fold_pad import FoldPad
from qgraph.passes.fuse_dequant_matmul import FuseDequantMatmul
from qgraph.passes.merge_equal import MergeEqual
from qgraph.pipeline import Pass


def lowering_passes(rows: int | None = None, capacity: int | None = None) -> tuple[Pass, ...]:
    """`rows`: how many rows the linears will see, see `policy`; None keeps the formats of the graph. `capacity`: see `keep_cache`."""
    return (
        KeepCache(capacity),
        TurnWeights(),
        FoldPad(),
        AbsorbActivation(),
        FuseDequantMatmul(),
        RowsInIntegers(rows),
        MergeEqual(),
        FuseNormQuantize(),
        FuseActQuantize(),
        ClaimKernels(),
    )
