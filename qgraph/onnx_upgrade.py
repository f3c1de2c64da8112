"""node of opset a -> the same meaning in opset b: most versions only widen types; `ADAPTERS` rewrites nodes that a version changed.

Between two versions of an operator a node stays as it is when the newer schema has all its attributes, defaults are equal (else
they are written out), and its inputs fit. Everything else needs an adapter.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import onnx
from onnx import defs
from torch.fx import GraphModule, Node

from qgraph.errors import ModelError
from qgraph.onnx_adapters import ADAPTERS, Edit, Refusal, at_version
from qgraph.onnx_ops import OnnxOp

_IGNORED = {"consumed_inputs"}


def upgrade_node(gm: GraphModule, node: Node, version: int, *, reason: str) -> None:
    """Gives the node the meaning it has, in the words of `version`. Raises ModelError when that cannot be done here."""
    target = node.target
    assert isinstance(target, OnnxOp)
    if target.version >= version:
        return
    edit = Edit(gm, node)
    try:
        for old, new in _steps(target, version):
            adapter = ADAPTERS.get((edit.target.op_type, new.since_version))
            if adapter is not None:
                adapter(edit)
            else:
                _check_neutral(edit, old, new)
    except Refusal as refusal:
        path = node.meta.get("name") or (node.meta["onnx"].name if "onnx" in node.meta else "") or node.name
        raise ModelError(
            f"node {path!r} ({target!r}) cannot be raised to opset {version} (needed for {reason}): {refusal}; "
            "convert the model with onnx.version_converter first, or keep this node's neighbours in float"
        ) from None
    node.target = at_version(edit.target, version)


def _steps(target: OnnxOp, version: int) -> list[tuple[defs.OpSchema, defs.OpSchema]]:
    """Pairs of successive schemas between the node's version and the wanted one. An operator renamed on the way keeps its own."""
    history = _history().get((target.domain, target.op_type), [])
    first = max((s.since_version for s in history if s.since_version <= target.version), default=0)
    found = [s for s in history if first <= s.since_version <= version]
    return list(itertools.pairwise(found))


@functools.cache
def _history() -> dict[tuple[str, str], list[defs.OpSchema]]:
    found: dict[tuple[str, str], list[defs.OpSchema]] = {}
    for schema in sorted(defs.get_all_schemas_with_history(), key=lambda s: int(s.since_version)):
        found.setdefault((schema.domain, schema.name), []).append(schema)
    return found


def _check_neutral(edit: Edit, old: defs.OpSchema, new: defs.OpSchema) -> None:
    """Cases: 1. an attribute that is gone; 2. a required one that is new; 3. a default that changed; 4. inputs that do not fit."""
    if new.deprecated:
        raise Refusal(f"opset {new.since_version} has no {new.name}")
    present = edit.names()
    for name in sorted((present & set(old.attributes)) - set(new.attributes)):  # Case 1
        if name not in _IGNORED:
            raise Refusal(f"opset {new.since_version} has no attribute {name!r}")
        edit.take(name)
    for name in sorted(set(new.attributes) - present):
        default = new.attributes[name].default_value
        if new.attributes[name].required:  # Case 2
            raise Refusal(f"opset {new.since_version} requires attribute {name!r}")
        if name in old.attributes and old.attributes[name].default_value != default:  # Case 3
            edit.set(**{name: _plain(old.attributes[name].default_value)})
    if not new.min_input <= len(edit.node.args) <= new.max_input:  # Case 4
        raise Refusal(f"opset {new.since_version} takes {new.min_input} to {new.max_input} inputs")


def _plain(default: onnx.AttributeProto) -> Any:
    if default.type == onnx.AttributeProto.UNDEFINED:
        raise Refusal("an older version left a default open")
    value = onnx.helper.get_attribute_value(default)
    return value.decode() if isinstance(value, bytes) else value
