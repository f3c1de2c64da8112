"""check(): text, numbers, legality and idempotence in one call - what every test of a rewrite asserts.

check(FuseRelu(), from_torch(Net(), x), (x,), '''
    %0: f32[2,2] = qg.dequant_linear(%x, @q, @s, @z, @b)
    return %0
''')
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from qgraph import onnx_io
from qgraph.capture import capture
from qgraph.edit import graph_modules
from qgraph.ledger import State
from qgraph.legal import dialect_of
from qgraph.pipeline import Context, Pass, Pipeline
from qgraph.text import diff, text
from qgraph.verify import check_graph

Start = tuple[GraphModule, Any]
"""A graph, and what it must return."""

Rewrite = Pass | Pipeline | Callable[[GraphModule], Any]


def from_torch(module: torch.nn.Module, *args: Any) -> Start:
    """The captured module; the oracle is the module itself, in eval mode. Raises CaptureError."""
    module = module.eval()
    with torch.no_grad():
        return capture(module, args), module(*args)


def from_onnx(source: str | onnx.ModelProto, *args: Tensor) -> Start:
    """A model, or its text in ONNX's own syntax; the oracle is ONNX Runtime with all optimizations off.

    Types are inferred first, as exporters do. Raises onnx.parser.ParseError, or ModelError for a model that cannot be read."""
    proto = onnx.parser.parse_model(textwrap.dedent(source)) if isinstance(source, str) else source
    proto = onnx.shape_inference.infer_shapes(proto)
    return onnx_io.from_onnx(proto), run_onnxruntime(proto, *args)


def run_onnxruntime(proto: onnx.ModelProto, *args: Tensor) -> list[Tensor]:
    """The model's outputs from ONNX Runtime on the CPU without its optimizations, some of which change numbers."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(np.asarray(v)) for v in session.run(None, feeds)]


def check(rewrite: Rewrite, start: Start, args: tuple[Any, ...], expect: str | None, *, tol: float = 1e-5) -> GraphModule:
    """Run a pass (or any function of a GraphModule) once and again; returns the rewritten graph.

    Asserts that the graph is legal, prints as `expect` (None: whatever), returns the oracle's numbers within `tol` (absolute and relative),
    that the second run changes nothing, and that an ONNX graph still runs in ONNX Runtime with those numbers while it has no qg op."""
    gm, want = start
    ctx = Context()
    _run(rewrite, gm, ctx)
    check_graph(gm)
    printed = text(gm)
    if expect is not None:
        expected, declined = textwrap.dedent(expect).strip(), "\n".join(map(str, ctx.declines))
        assert printed == expected, f"the graph is\n{printed}\nand not what was expected:\n{diff(expected, printed)}\n{declined}"
    with torch.no_grad():
        _assert_close(gm(*args), want, tol)
    if _is_pure_onnx(gm):
        _assert_close(run_onnxruntime(onnx_io.to_proto(gm), *args), want, tol)
    again = _run(rewrite, gm, Context())
    assert text(gm) == printed, f"a second run changed the graph:\n{diff(printed, text(gm))}"
    assert not again, f"a second run reports {again} changes of a graph that prints as before"
    return gm


def _run(rewrite: Rewrite, gm: GraphModule, ctx: Context) -> int:
    """The number of changes that the pass reports; 0 for a plain function."""
    if isinstance(rewrite, Pass):
        return rewrite.run(gm, ctx)
    if isinstance(rewrite, Pipeline):
        return sum(step.count for step in rewrite.run(gm, ctx))
    rewrite(gm)
    return 0


def _is_pure_onnx(gm: GraphModule) -> bool:
    state = gm.meta.get("qgraph")
    if not isinstance(state, State) or state.source != "onnx":
        return False
    return all(dialect_of(n) in ("onnx", "structure", "python") for body in graph_modules(gm) for n in body.graph.nodes)


def _assert_close(got: Any, want: Any, tol: float) -> None:
    torch.testing.assert_close(tree_leaves(got), tree_leaves(want), rtol=tol, atol=tol, equal_nan=True)
