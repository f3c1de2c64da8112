"""Raw CUDA kernels: every fused qg op of a converted graph runs one, compiled by NVRTC through CuPy; torch runs the rest.

Without a GPU, QGRAPH_CUDA=emulate runs the unchanged kernels on the CPU.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from qgraph.backend import Placement
from qgraph.backends.cupy.emulate import emulated
from qgraph.backends.cupy.legalize import lowering_passes
from qgraph.backends.cupy.placement import PLACEMENT
from qgraph.backends.cupy.program import Program
from qgraph.errors import LoweringError
from qgraph.ledger import Entry, state
from qgraph.pipeline import Context, Pipeline

__all__ = ["PLACEMENT", "Cupy", "Program", "lowering_passes"]


@dataclass(frozen=True)
class Cupy:
    """`rows`: how many rows linears will see (batch times new tokens); from 16 on weight-only linears become integer ones, see policy.py, and
    None keeps the formats of the graph. `capacity`: tokens of a quantized key/value cache, which the program keeps on the device for
    generation.CudaGenerator (see keep_cache.py). `device`: where the program runs; by default the current CUDA device, or the CPU while kernels are
    emulated."""

    name: str = "cupy"
    placement: Placement = PLACEMENT
    rows: int | None = None
    capacity: int | None = None
    device: str | None = None

    def lower(self, gm: GraphModule, *, strict: bool = False) -> Program:
        """A converted graph of either dialect as a program. `gm` is consumed: passes change it.

        `strict`: a linear or embedding of quantized weights without a kernel is an error. Raises LoweringError where there is no device."""
        device = self.target_device()
        ctx = Context()
        Pipeline(*lowering_passes(self.rows, self.capacity), name=self.name).run(gm, ctx)
        state(gm).stage = "lowered"
        program = Program.of(gm, device, ctx.declines)
        missed = [k for k in program.kernels() if not k.fused]
        for k in missed:
            state(gm).ledger.record(Entry(k.node, k.promised, "kernel", "torch", self.name, k.reason))
        if strict and missed:
            listed = "; ".join(f"{k.node}: {k.reason}" for k in missed[:10])
            raise LoweringError(f"{len(missed)} of {len(program.kernels())} quantized operations have no CUDA kernel: {listed}")
        return program

    def export(self, gm: GraphModule, path: str | os.PathLike[str]) -> None:
        """Raises LoweringError: what runs here is a torch module with kernels, for which there is no file format."""
        raise LoweringError(
            "the cupy backend writes no files: export with backend='onnxruntime', or keep the converted graph and lower it again"
        )

    def target_device(self) -> torch.device:
        """Where programs run. Raises LoweringError where there is neither a GPU nor the emulator."""
        if self.device is not None:
            return torch.device(self.device)
        if emulated() is not None:
            return torch.device("cpu")
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        raise LoweringError(
            "the cupy backend needs a CUDA device, and torch sees none (torch.cuda.is_available() is False); QGRAPH_CUDA=emulate runs the kernels "
            "on the CPU, slowly, to check numbers"
        )
