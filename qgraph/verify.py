"""check_graph(gm): is this graph legal, and if not, which node, why, and what is around it. The rules per dialect are in `qgraph.legal`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from qgraph import ops_legal  # noqa: F401  the rules of the qg dialect
from qgraph.edit import graph_modules, named_targets
from qgraph.errors import VerificationError
from qgraph.ledger import State
from qgraph.legal import checks, dialect_of, legal
from qgraph.text import describe, where

__all__ = ["check_graph", "dialect_of", "legal"]

Problem = tuple[Node | None, str]

NEIGHBOURS = 10
"""Nodes shown on either side of an illegal one."""


def check_graph(gm: GraphModule, *, dialects: Iterable[str] | None = None, after: str | None = None) -> None:
    """Check `gm` and its bodies: order, ownership, names, stored targets, inputs and outputs, and the rules of each node's dialect.

    With `dialects` ("aten", "onnx", "qgraph", another op namespace, "module", "method"), nodes of any other dialect are illegal unless they
    carry `meta["barrier"]`, the reason why they stay as they are. `after` names the pass that has just run. Raises VerificationError: the
    sentence, and the ten nodes on either side."""
    allowed = None if dialects is None else {*dialects, "structure", "python"}
    for body in graph_modules(gm):
        for node, problem in (*_order(body), *_nodes(body, allowed), *_frame(body)):
            raise VerificationError(_message(body, node, problem, after))
    for node, problem in _interface(gm):
        raise VerificationError(_message(gm, node, problem, after))


def _order(gm: GraphModule) -> Iterator[Problem]:
    seen: set[Node] = set()
    names: set[str] = set()
    for node in gm.graph.nodes:
        for value in node.all_input_nodes:
            if value.graph is not gm.graph:
                yield node, f"reads %{value.name}, which belongs to another graph"
            elif value not in seen:
                yield node, f"reads %{value.name} before it is computed"
        if node.name in names:
            yield node, "has a name that is already taken"
        seen.add(node)
        names.add(node.name)


def _nodes(gm: GraphModule, allowed: set[str] | None) -> Iterator[Problem]:
    for node in gm.graph.nodes:
        if problem := _target(gm, node) or _dialect(node, allowed):
            yield node, problem


def _target(gm: GraphModule, node: Node) -> str | None:
    """What the node names exists."""
    if node.op == "call_function":
        return None if callable(node.target) else f"calls {node.target!r}, which is not callable"
    if node.op not in ("get_attr", "call_module"):
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        if not hasattr(value, part):
            return f"reads {node.target!r}, which the module does not have"
        value = getattr(value, part)
    wrong = node.op == "call_module" and not isinstance(value, torch.nn.Module)
    return f"calls {node.target!r}, which is no module" if wrong else None


def _dialect(node: Node, allowed: set[str] | None) -> str | None:
    dialect = dialect_of(node)
    if allowed is not None and dialect not in allowed and "barrier" not in node.meta:
        legal_here = ", ".join(sorted(allowed - {"structure", "python"}))
        return f"belongs to the {dialect} dialect; legal here: {legal_here}, or a declared barrier"
    return next((problem for check in checks(node, dialect) if (problem := check(node))), None)


def _frame(gm: GraphModule) -> Iterator[Problem]:
    """Inputs first, one output last, and no nested graph that nothing reads."""
    nodes = list(gm.graph.nodes)
    first = next((i for i, n in enumerate(nodes) if n.op not in ("placeholder", "get_attr")), len(nodes))
    yield from ((node, "is an input after the first computed value") for node in nodes[first:] if node.op == "placeholder")
    if [n.op for n in nodes].count("output") != 1 or nodes[-1].op != "output":
        yield nodes[-1] if nodes else None, "the graph must end with its only output node"
    used = {target.split(".")[0] for target in named_targets(gm)}
    dangling = (name for name, child in gm.named_children() if isinstance(child, GraphModule) and name not in used)
    yield from ((None, f"nested graph {name!r} is read by no node") for name in dangling)


def _interface(gm: GraphModule) -> Iterator[Problem]:
    """As many inputs and outputs as the model had."""
    state = gm.meta.get("qgraph")
    if not isinstance(state, State):
        return
    nodes = list(gm.graph.nodes)
    counts = {"inputs": sum(n.op == "placeholder" for n in nodes), "outputs": len(tree_leaves(nodes[-1].args))}
    for what, names in (("inputs", state.input_names), ("outputs", state.output_names)):
        if names and len(names) != counts[what]:
            yield None, f"the graph has {counts[what]} {what}; the model has {len(names)}: {', '.join(names)}"


def _message(gm: GraphModule, node: Node | None, problem: str, after: str | None) -> str:
    prefix = f"after {after}: " if after else ""
    if node is None:
        return f"{prefix}{problem}"
    nodes = list(gm.graph.nodes)
    at = nodes.index(node)
    shown = range(max(0, at - NEIGHBOURS), min(len(nodes), at + NEIGHBOURS + 1))
    return "\n".join(
        [f"{prefix}%{node.name} at {where(node)} {problem}", *(f"{'>' if i == at else ' '} {describe(nodes[i])}" for i in shown)]
    )
