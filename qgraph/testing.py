"""check(): text, numbers, idempotence and legality in one call - what every test of a rewrite asserts.

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
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from qgraph.text import text
from qgraph.verify import check_graph

Start = tuple[GraphModule, Any]
"""A graph, and what it must return."""


def from_torch(module: torch.nn.Module, *args: Any) -> Start:
    """The captured module; the oracle is the module itself, in eval mode."""
    module = module.eval()
    return torch.export.export(module, args).module(check_guards=False), module(*args)


def from_onnx(source: str | onnx.ModelProto, *args: Tensor) -> Start:
    """A model in ONNX's text syntax; the oracle is ONNX Runtime with all optimizations off."""
    from qgraph.onnx_io import from_onnx as load

    proto = onnx.parser.parse_model(textwrap.dedent(source)) if isinstance(source, str) else source
    proto = onnx.shape_inference.infer_shapes(proto)
    return load(proto), run_onnxruntime(proto, args)


def run_onnxruntime(proto: onnx.ModelProto, args: tuple[Tensor, ...]) -> list[Tensor]:
    """The model's outputs from ONNX Runtime on the CPU, unoptimized: at higher levels it changes numbers."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
    return [torch.from_numpy(np.asarray(v)) for v in session.run(None, feeds)]


def check(rewrite: Callable[[GraphModule], Any], start: Start, args: tuple[Any, ...], expect: str | None, *, tol: float = 1e-5) -> GraphModule:
    """Run a pass (or any function of a GraphModule) and assert: the graph is legal, prints as `expect` (None: whatever), returns the oracle's
    numbers within `tol` (absolute and relative), and a second run changes nothing. Returns the rewritten graph."""
    gm, want = start
    rewrite(gm)
    check_graph(gm)
    printed = text(gm)
    if expect is not None:
        assert printed == textwrap.dedent(expect).strip(), f"the graph is\n{printed}"
    _assert_close(gm(*args), want, tol)
    rewrite(gm)
    assert text(gm) == printed, f"a second run changed the graph from\n{printed}\nto\n{text(gm)}"
    return gm


def _assert_close(got: Any, want: Any, tol: float) -> None:
    torch.testing.assert_close(tree_leaves(got), tree_leaves(want), rtol=tol, atol=tol, equal_nan=True)
