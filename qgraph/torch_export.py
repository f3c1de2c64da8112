"""aten GraphModule -> ONNX-dialect GraphModule, through torch.onnx.export; every torch.ops.qgraph op passes through 1:1.

On the way such an op is one node of ONNX domain "qgraph": tensors are its inputs, everything else its attributes; both translations are read
off the op's schema. Weights are never copied: the initializers of the result are the parameters of the graph that came in.
"""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as onnx_passes
import torch
from onnx.defs import OpSchema
from onnxscript import optimizer, rewriter
from onnxscript.values import Op, Opset
from torch._ops import OpOverload
from torch.export import Dim
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen

import qgraph.ops  # noqa: F401  (defines torch.ops.qgraph)
from qgraph.errors import LoweringError
from qgraph.ledger import state
from qgraph.onnx_io import from_onnx
from qgraph.onnx_ops import OnnxOp

DOMAIN = "qgraph"
# LayerNormalization is whole from 17, torch's translations start at 18; Gelu is whole from 20.
_OPSET, _GELU_OPSET = 18, 20
_FREE_SIZE = 1024
"""Elements; constants computed from larger parameters are left to the passes, which know what may be copied."""


def to_onnx_dialect(gm: GraphModule, *, opset: int | None = None) -> GraphModule:
    """The graph in ONNX operators, with the inputs, outputs, names and symbolic dimensions of its State.

    `opset` is by default the smallest that keeps the graph's operators whole (18, or 20 with gelu).
    Raises LoweringError for an operator that torch.onnx cannot translate, or an input whose dimension would become fixed."""
    found = state(gm)
    flat, names = _flat(gm)
    if found.example_inputs is None:
        raise LoweringError("the graph has no example inputs to export it with: capture it with qgraph.capture(module, example_inputs)")
    examples = tuple(found.example_inputs[i] for i, _ in names.inputs)
    model = _exported(flat, examples, opset or _opset(flat), found.dim_names)
    _rename(model, [name for _, name in names.inputs], names.outputs)
    _clean(model)
    result = from_onnx(model)
    restore_qg_ops(result)
    new = state(result)
    new.ledger, new.recipe, new.stage, new.tied, new.dim_names = found.ledger, found.recipe, found.stage, found.tied, {}
    return result
