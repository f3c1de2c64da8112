"""Q/DQ files for engines of TensorRT's kind: standard operators, int8 symmetric activations, float biases.

The profile is a placement and a writer: there is no engine here to run the file. `lower` gives a program that simulates it, ONNX Runtime
computing every node as it is written.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch.fx import GraphModule

from qgraph.backend import Kernel, Placement
from qgraph.backends.onnxruntime import OnnxRuntime
from qgraph.backends.onnxruntime.legalize import LowerQgOps, TurnWeights
from qgraph.backends.onnxruntime.session import Program
from qgraph.backends.tensorrt.placement import PLACEMENT
from qgraph.backends.tensorrt.turn import TurnBlocks
from qgraph.passes.fold_pad import FoldPad
from qgraph.pipeline import Pass

__all__ = ["PASSES", "PLACEMENT", "Simulation", "TensorRT"]

PASSES: tuple[Pass, ...] = (FoldPad(), TurnWeights(), TurnBlocks(), LowerQgOps())
"""No kernel is claimed and no bias is quantized: the engine's builder reads Q/DQ and fuses by itself."""


@dataclass
class Simulation(Program):
    """The file, run by ONNX Runtime without optimizations: its numbers, not its speed."""

    def kernels(self) -> list[Kernel]:
        """Nothing: which kernels an engine takes is known when it is built."""
        return []


@dataclass(frozen=True)
class TensorRT:
    """`passes` run in order and leave QuantizeLinear, DequantizeLinear and the model's own operators."""

    name: str = "tensorrt"
    placement: Placement = PLACEMENT
    passes: tuple[Pass, ...] = PASSES

    def lower(self, gm: GraphModule, *, strict: bool = False) -> Simulation:
        """A converted graph as a simulation. `gm` is consumed. `strict` changes nothing: no kernel is promised. Raises LoweringError."""
        found = OnnxRuntime(name=self.name, passes=self.passes).lower(gm, optimized=False)
        return Simulation(found.gm, found.folder, found.options, found.structure)

    def export(self, gm: GraphModule, path: str | os.PathLike[str]) -> None:
        """Write the file, checked by the ONNX checker and loaded by ONNX Runtime. `gm` is consumed. Raises LoweringError."""
        self.lower(gm).save(path)
