"""Opset versions of an imported graph, and raising them with every node that they change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from onnx import helper
from torch.fx import GraphModule

from qgraph.errors import ModelError
from qgraph.onnx_header import GraphHeader, ModelHeader
from qgraph.onnx_ops import OnnxOp
from qgraph.onnx_upgrade import upgrade_node


def opset(gm: GraphModule, domain: str = "") -> int:
    """The version of `domain` that the graph imports; 0 when it does not. Raises ModelError for a graph not read from ONNX."""
    imports = header(gm).opsets
    return imports.get("ai.onnx", imports.get("", 0)) if domain == "" else imports.get(domain, 0)


def header(gm: GraphModule) -> GraphHeader:
    found = gm.meta.get("onnx_graph")
    if not isinstance(found, GraphHeader):
        raise ModelError("this graph was not read from ONNX; use qgraph.from_onnx, or torch_export.to_onnx_dialect for a captured module")
    return found


def require_opset(gm: GraphModule, version: int, reason: str, *, domain: str = "") -> None:
    """Raises the graph, its nested graphs and functions to at least this version of `domain`, rewriting nodes that the versions
    between changed.

    Raises ModelError, with `reason`, when a node cannot be carried over; nothing is changed then but the nodes before it."""
    for part in _parts(gm, set()):
        if opset(part, domain) < version and (part is gm or not header(part).is_function or domain in header(part).opsets):
            _raise_to(part, version, reason, domain)
    model = gm.meta.get("onnx_model")
    if isinstance(model, ModelHeader) and domain == "" and model.ir_version < (needed := _ir_version(version)):
        gm.meta["onnx_model"] = replace(model, ir_version=needed)


def bring_up_to_date(gm: GraphModule) -> None:
    """Raises nodes that a rewrite made for an older version than the graph imports. Raises ModelError for newer ones."""
    for part in _parts(gm, set()):
        old = False
        for node in list(part.graph.nodes):
            if isinstance(node.target, OnnxOp) and (imported := opset(part, node.target.domain)):
                if node.target.version > imported:
                    raise ModelError(
                        f"node {node.name!r} ({node.target!r}) needs opset {node.target.version} of {node.target.domain or 'ai.onnx'!r}, "
                        f"the graph imports {imported}; call require_opset first"
                    )
                if node.target.version < imported:
                    upgrade_node(part, node, imported, reason="the graph's opset")
                    old = True
        if old:
            part.recompile()


def _raise_to(part: GraphModule, version: int, reason: str, domain: str) -> None:
    for node in list(part.graph.nodes):
        if isinstance(node.target, OnnxOp) and node.target.domain == domain:
            upgrade_node(part, node, version, reason=reason)
    own = header(part)
    spelled = "ai.onnx" if domain == "" and "ai.onnx" in own.opsets else domain
    part.meta["onnx_graph"] = replace(own, opsets={**own.opsets, spelled: version})
    part.recompile()


def _parts(gm: GraphModule, seen: set[int]) -> Iterator[GraphModule]:
    """The graph, its bodies and its functions, each once."""
    if id(gm) in seen or "onnx_graph" not in gm.meta:
        return
    seen.add(id(gm))
    yield gm
    for child in gm.children():
        if isinstance(child, GraphModule):
            yield from _parts(child, seen)


def _ir_version(opset_version: int) -> int:
    """The first IR version that may import this opset of the default domain."""
    found = helper.OP_SET_ID_VERSION_MAP.get(("ai.onnx", opset_version))
    return int(found) if found is not None else 0
