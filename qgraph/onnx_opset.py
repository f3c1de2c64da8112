"""Opset versions of an imported graph, and raising them."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule

from qgraph.errors import ModelError
from qgraph.onnx_header import GraphHeader


def opset(gm: GraphModule, domain: str = "") -> int:
    """The version of `domain` that the graph imports; 0 when it does not. Raises ModelError for a graph not read from ONNX."""
    return header(gm).opsets.get(domain, 0)


def header(gm: GraphModule) -> GraphHeader:
    found = gm.meta.get("onnx_graph")
    if not isinstance(found, GraphHeader):
        raise ModelError("this graph was not read from ONNX; use qgraph.from_onnx, or torch_export.to_onnx_dialect for a captured module")
    return found


def require_opset(gm: GraphModule, version: int, reason: str, *, domain: str = "") -> None:
    """Asks for at least this version of `domain` when the graph is written; `reason` goes into the error if that cannot be."""
    if opset(gm, domain) < version:
        gm.meta["onnx_graph"] = replace(header(gm), opsets=dict(header(gm).opsets) | {domain: version})
