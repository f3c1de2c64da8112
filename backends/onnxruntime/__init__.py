"""ONNX Runtime's CPU provider: quantized graphs as ONNX files that it fuses into integer kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch.fx import GraphModule

from qgraph.backend import Kernel, Placement
from qgraph.backends.onnxruntime.legalize import LEGALIZE
from qgraph.backends.onnxruntime.placement import PAYING
from qgraph.backends.onnxruntime.runtime import Options
from qgraph.backends.onnxruntime.session import Program, Structure, build
from qgraph.backends.onnxruntime.standard import LOWER, lowers
from qgraph.errors import LoweringError
from qgraph.ledger import state
from qgraph.pipeline import Context, Pass, Pipeline
from qgraph.saturation import accumulator
from qgraph.text import where
from qgraph.types import type_of

__all__ = ["LEGALIZE", "LOWER", "OnnxRuntime", "Program", "lowers"]


@dataclass(frozen=True)
class OnnxRuntime:
    """`passes` run in order and leave pure ONNX; `entries` are session configuration entries, `threads` those of one operator.

    `target` is the machine on which sums have to be exact (saturation.TARGETS): on x86-avx2 `prepare` adds the stage reduce-range. The
    costs behind `placement` are those of a machine with VNNI. Raises RecipeError for an unknown target."""

    name: str = "onnxruntime"
    placement: Placement = PAYING
    passes: tuple[Pass, ...] = LEGALIZE
    threads: int | None = None
    entries: Mapping[str, str] = field(default_factory=dict)
    target: str = "x86-vnni"

    def __post_init__(self) -> None:
        accumulator(self.target)

    def lower(self, gm: GraphModule, *, strict: bool = False, optimized: bool = True) -> Program:
        """A converted graph as a program. `gm` is consumed: passes change it.

        `strict`: a promised kernel that ONNX Runtime did not use is an error. `optimized` False: ONNX Runtime computes every node as
        written, for comparing numbers. Raises LoweringError."""
        _refuse_bfloat16(gm)
        structure = Structure.of(gm) if _is_aten(gm) else None
        lowered = self.legalize(gm)
        program = build(lowered, options=Options(self.threads, self.entries, optimized), structure=structure)
        if strict:
            check_kernels(program.kernels())
        return program

    def legalize(self, gm: GraphModule, ctx: Context | None = None) -> GraphModule:
        """The graph in pure ONNX operators. An aten graph is translated first."""
        gm = self.translate(gm)
        Pipeline(*self.passes, name=self.name).run(gm, ctx)
        state(gm).stage = "lowered"
        return gm

    def translate(self, gm: GraphModule) -> GraphModule:
        """An aten graph in ONNX operators, calls of qg operations left as they are; an ONNX graph as it is."""
        if not _is_aten(gm):
            return gm
        from qgraph.torch_export import to_onnx_dialect

        return to_onnx_dialect(gm)

    def export(self, gm: GraphModule, path: str | os.PathLike[str], *, strict: bool = False) -> None:
        """Write the lowered graph as an ONNX file that the ONNX checker accepts and ONNX Runtime has loaded. `gm` is consumed.

        Raises LoweringError; nothing is written then."""
        # It is loaded to see that it can be: weights that are packed for running would be in memory once more.
        checked = replace(self, entries={**self.entries, "session.disable_prepacking": "1"})
        checked.lower(gm, strict=strict).save(path)


def check_kernels(found: list[Kernel]) -> None:
    """Raises LoweringError that lists the kernels that were promised and not used."""
    broken = [k for k in found if not k.fused]
    if broken:
        listed = "; ".join(f"{k.node}: {k.promised} became {k.became or 'nothing'} ({k.reason})" for k in broken[:10])
        more = f"; and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise LoweringError(f"{len(broken)} of {len(found)} promised kernels were not used: {listed}{more}")


def _refuse_bfloat16(gm: GraphModule) -> None:
    """Before anything is rewritten: ONNX Runtime would name some inner node that it has no kernel for."""
    for node in gm.graph.nodes:
        t = type_of(node)
        if t is not None and t.dtype == "bfloat16":
            raise LoweringError(
                f"{where(node)} is bfloat16, for which ONNX Runtime's CPU provider has no kernels: quantize module.float() or "
                'module.half(), or lower with backend="reference"'
            )


def _is_aten(gm: GraphModule) -> bool:
    return "onnx_graph" not in gm.meta
