"""linear(x, transpose(table)) -> linear(x, turned): a layer that shares an embedding's table gets a weight of its own, on the same memory.

Language models often multiply by their embedding table at the end. Stored once, read as a table here and turned there, such a weight could
not be quantized. `TieWeights` undoes it for layers that stayed in float, so that no table is written twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from qgraph.edit import add_constant, graph_modules
from qgraph.formats import TIED
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import Rewriter, replace
from qgraph.views import DataMovement, Embedding, Linear, const_value, view

UNTIED = "untied"
"""The key of a get_attr node's meta that holds the transposition, (target, args after the first, kwargs), which it replaced."""


@dataclass(frozen=True)
class UntieWeights(Pass):
    """Also marks every linear whose weight is an embedding table, turned or not: recipes have a format for those (`Recipe.embeddings`)."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(self.untie(part) for part in graph_modules(gm))

    def untie(self, gm: GraphModule) -> int:
        tables = {
            str(v.weight.target) for n in gm.graph.nodes if (v := view(Embedding, n)) is not None and const_value(v.weight) is not None
        }
        count = 0
        for table, turned, linears in _sharing(gm, tables):
            for linear in linears:
                linear.meta[TIED] = table
            if turned is None:
                continue
            moved, value = view(DataMovement, turned), const_value(turned.all_input_nodes[0])
            assert moved is not None and moved.perm is not None and value is not None  # _sharing looked
            target = add_constant(gm, f"{table}_turned", value.permute(moved.perm))  # a view: rw.const would copy it
            with gm.graph.inserting_before(turned):
                new = gm.graph.get_attr(target)
            new.meta[UNTIED] = (table, turned.target, turned.args[1:], dict(turned.kwargs))
            replace(turned, new)
            count += 1
        if count:
            gm.graph.lint()
            gm.recompile()
        return count


def _sharing(gm: GraphModule, tables: set[str]) -> Iterator[tuple[str, Node | None, list[Node]]]:
    """(table, the node that turns it or None, linears that read it) wherever a linear's weight is a table."""
    for node in list(gm.graph.nodes) if tables else []:
        if node.op == "get_attr" and node.target in tables:
            for reader in [node, *node.users]:
                moved = view(DataMovement, reader) if reader is not node else None
                turned = reader if moved is not None and moved.kind == "transpose" and moved.perm is not None else None
                value = turned or node
                linears = [u for u in value.users if (v := view(Linear, u)) is not None and v.weight is value]
                if linears and (turned is not None or reader is node):
                    yield str(node.target), turned, linears


@dataclass(frozen=True)
class TieWeights(Pass):
    """turned -> transpose(table), where both are still stored in float."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(self.tie(part) for part in graph_modules(gm))

    def tie(self, gm: GraphModule) -> int:
        stored = {str(n.target): n for n in gm.graph.nodes if n.op == "get_attr" and UNTIED not in n.meta}
        count = 0
        for node in [n for n in gm.graph.nodes if UNTIED in n.meta and n.users]:
            table, target, args, kwargs = node.meta[UNTIED]
            if table in stored:
                rw = Rewriter(gm, next(iter(node.users)), by=self.name)
                replace(node, rw.call(target, stored[table], *args, like=node, **kwargs))
                count += 1
        if count:
            gm.graph.lint()
            gm.recompile()
        return count
