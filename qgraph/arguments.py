"""named_arguments(call) -> {name: value}: what a pattern's operands are called when its kind is a target and not an interface."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from functools import cache
from typing import Any

import onnx
import torch
from torch.fx import Node

from qgraph.views import operands


def named_arguments(node: Node) -> Mapping[str, Any]:
    """Arguments of a call by name: the op's schema, the ONNX schema, or the Python function's parameters.

    ONNX attributes have their schema's default when absent; absent optional inputs are None. Ops without a known schema have
    only their keyword arguments."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return operands(node)
    if hasattr(target, "op_type"):
        inputs, defaults = _onnx_signature(target.op_type, target.version, target.domain)
        return defaults | dict(itertools.zip_longest(inputs, node.args[: len(inputs)])) | dict(node.kwargs)
    return dict(zip(_parameters(target), node.args, strict=False)) | dict(node.kwargs)


@cache
def _onnx_signature(op_type: str, version: int, domain: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Input names and attribute defaults of an ONNX op; empty for an op that the onnx package does not know."""
    if not onnx.defs.has(op_type, domain):
        return (), {}
    schema = onnx.defs.get_schema(op_type, max_inclusive_version=version, domain=domain)
    defaults = {k: onnx.helper.get_attribute_value(a.default_value) for k, a in schema.attributes.items() if a.default_value.name}
    return tuple(i.name for i in schema.inputs), {k: v.decode() if isinstance(v, bytes) else v for k, v in defaults.items()}


@cache
def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except ValueError:  # builtins of C extensions have no signature
        return ()
