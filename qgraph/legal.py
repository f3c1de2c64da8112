"""What is legal, as a table: (dialect, target) -> checks. The file that defines a dialect's rules fills it; `verify` reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import onnx
import torch
from torch.fx import Node

from qgraph.views import key

Check = Callable[[Node], str | None]
"""None, or what is wrong with the node: the rest of a sentence that begins with its name."""

RULES: dict[tuple[str, Any], list[Check]] = {}
"""(dialect, table key of the target, None for every node of the dialect) -> checks."""

OVERLOAD = "overload"
"""The dialect name under which a check sees the calls of every OpOverload, whatever its namespace."""


def legal(dialect: str, target: Any = None) -> Callable[[Check], Check]:
    """Decorator: the function says what is wrong with a node of this dialect and target (None: every target), or returns None.

    A target is an OpOverload, a function, or "domain::OpType"."""

    def register(check: Check) -> Check:
        RULES.setdefault((dialect, key(target)), []).append(check)
        return check

    return register


def dialect_of(node: Node) -> str:
    """ "aten", "qgraph" or another OpOverload namespace, "onnx", "python" for functions, "module", "method", "structure" for the rest."""
    target: Any = node.target
    if node.op != "call_function":
        return {"call_module": "module", "call_method": "method"}.get(node.op, "structure")
    if hasattr(target, "op_type"):
        return "onnx"
    return str(target.namespace) if isinstance(target, torch._ops.OpOverload) else "python"


def checks(node: Node, dialect: str) -> Iterator[Check]:
    """All checks that apply to a node of this dialect."""
    if isinstance(node.target, torch._ops.OpOverload):
        yield from RULES.get((OVERLOAD, None), ())
    yield from RULES.get((dialect, None), ())
    yield from RULES.get((dialect, key(node.target)), ())


@legal(OVERLOAD)
def binds_schema(node: Node) -> str | None:
    """Every required argument is there and every argument is known."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    if len(node.args) > len(arguments):
        return f"has {len(node.args)} arguments; {node.target} takes {len(arguments)}"
    names = [a.name for a in arguments]
    if unknown := node.kwargs.keys() - set(names[len(node.args) :]):
        return f"has an argument {min(unknown)!r} that {node.target} does not take there"
    missing = [a.name for a in arguments[len(node.args) :] if not a.has_default_value() and a.name not in node.kwargs]
    return f"lacks argument {missing[0]!r} of {node.target}" if missing else None


@legal("onnx")
def binds_onnx_schema(node: Node) -> str | None:
    """The same for ONNX ops that rewrites made; what a file brought along is left to its reader."""
    target: Any = node.target
    if "onnx" in node.meta:
        return None
    known = _arity(target.op_type, target.version, target.domain)
    if known is None:
        return None
    low, high, attributes, required = known
    given = {*node.kwargs, *(name for name, _ in target.fixed)}
    if not low <= len(node.args) <= high:
        return f"has {len(node.args)} inputs; {target!r} takes {low} to {high}"
    if unknown := {a for a in given if "__" not in a} - attributes:
        return f"has an attribute {min(unknown)!r} that {target!r} does not know"
    return f"lacks attribute {min(required - given)!r} of {target!r}" if required - given else None


@cache
def _arity(op_type: str, version: int, domain: str) -> tuple[int, int, frozenset[str], frozenset[str]] | None:
    """(fewest inputs, most inputs, attributes, required attributes), or None for an op that the onnx package does not know."""
    try:
        schema = onnx.defs.get_schema(op_type, max_inclusive_version=version, domain=domain)
    except onnx.defs.SchemaError:
        return None
    required = frozenset(name for name, a in schema.attributes.items() if a.required)
    return schema.min_input, schema.max_input, frozenset(schema.attributes), required
