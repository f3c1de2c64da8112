"""Which formats an operation with a weight is wanted in: by the recipe, its rules, and passes that have looked at data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.fx import GraphModule, Node

from qgraph.backend import Placement
from qgraph.recipe import Int, Recipe
from qgraph.text import ALSO, path_of
from qgraph.views import Conv, Embedding, Linear, is_const, view_any

SITES = (Linear, Conv, Embedding)
SiteView = Linear | Conv | Embedding

OVERRIDE = "override"
"""The key of `node.meta` that holds an Override."""

QUANTIZE = "quantize"
"""The key of `node.meta` that holds role -> QSpec for operands quantized without an observer."""

TIED = "tied"
"""The key of a linear's `node.meta` that names the embedding table which is its weight, too (see passes/untie_weights.py)."""

RUN_TIME = (
    Int(8, per="token", symmetric=False, unsigned=True, dynamic=True),
    Int(8, per="tensor", symmetric=False, unsigned=True, dynamic=True),
)
"""Formats with ranges found at run time, the more accurate one first."""


@dataclass(frozen=True)
class Override:
    """What a pass that has looked at data wants of one site, where no rule names it; `by` says who wants it and why, for the ledger."""

    weights: Int | None
    activations: Int | None
    by: str


def sites(gm: GraphModule) -> Iterator[tuple[Node, SiteView]]:
    """Operations that have a weight, in graph order."""
    for node in gm.graph.nodes:
        v = view_any(SITES, node)
        if v is not None:
            yield node, v


def names_of(node: Node) -> tuple[str, ...]:
    """What a rule may call an operation: module path or ONNX node name, FX name, name of its weight; those of equal ones merged into it."""
    v = view_any(SITES, node)
    own = (path_of(node), node.name, *node.meta.get(ALSO, ()))
    return (*own, str(v.weight.target), path_of(v.weight)) if v is not None and is_const(v.weight) else own


def wanted(node: Node, recipe: Recipe) -> tuple[str | None, Int | None, Int | None]:
    """(the rule that decided, weights, activations) of a site; the last rule that matches wins, and any rule over an Override.

    A linear whose weight is an embedding table has the table's format where that is the finer one, or float."""
    embedding = view_any((Embedding,), node) is not None
    weights = recipe.embeddings if embedding else recipe.weights
    activations = None if embedding else recipe.activations
    if TIED in node.meta and weights is not None and (recipe.embeddings is None or weights.bits < recipe.embeddings.bits):
        weights = recipe.embeddings  # it is the same table
    chosen = None
    for pattern, rule in recipe.rules.items():
        if any(fnmatchcase(name, pattern) for name in names_of(node)):
            chosen = pattern
            weights = rule.get("weights", weights) if rule is not None else None
            activations = rule.get("activations", activations) if rule is not None else None
    override: Override | None = node.meta.get(OVERRIDE)
    if chosen is None and override is not None:
        return None, override.weights, override.activations
    return chosen, weights, activations


def excluded(node: Node, recipe: Recipe) -> bool:
    """Whether the last rule that matches leaves the operation in float."""
    hits = [rule for pattern, rule in recipe.rules.items() if any(fnmatchcase(n, pattern) for n in names_of(node))]
    return bool(hits) and hits[-1] is None


def run_time_format(v: SiteView, placement: Placement) -> Int | None:
    """The most accurate format of x with a range found at run time that the backend has a kernel for; None when it has none."""
    if not isinstance(v, placement.dynamic) or (isinstance(v, Linear) and v.x_axis != -1):
        return None
    return next((f for f in RUN_TIME if placement.accepts(v, "x", f.activation_spec()) is None), None)
