"""k, v -> dequantize(dynamic_quantize(k)), dequantize(dynamic_quantize(v)) in front of attention, as a quantized key/value cache holds them.

Each token and head has its own scale and zero point, found at run time. In a decoder with a cache what is new is quantized, before it joins
what is there, so that every key is rounded once (KV8 and KV4 of LMDeploy and OpenPPL-LLM; arXiv 2402.02750 compares granularities).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch.fx import GraphModule, Node

from qgraph.attention import Found, Rows, attentions, rows_of
from qgraph.edit import graph_modules
from qgraph.errors import RecipeError
from qgraph.ledger import FLOAT, Entry, Ledger, state
from qgraph.ops import Q
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.rewriter import Decline, Rewriter
from qgraph.text import path_of
from qgraph.types import PerToken, QSpec
from qgraph.views import Attention, Dequantize, DynamicQuantize, key, table, view


@dataclass(frozen=True)
class KvQuant(Pass):
    """`bits` of an unsigned integer for each element of a row of keys or values; `symmetric` rows have the middle of it as zero point.
    `accepts`: a placement's word on (the attention, "kv_cache", spec).

    Raises RecipeError where the backend refuses, and for a model without attention."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "observed"

    bits: int = 8
    symmetric: bool = False
    accepts: Callable[[Any, str, QSpec], str | None] = lambda operation, role, spec: None

    @property
    def spec(self) -> QSpec:
        return QSpec(f"uint{self.bits}", self.symmetric, PerToken(), dynamic=True)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        count = seen = 0
        for part in graph_modules(gm):
            for node, found, chain in list(attentions(part.graph)):
                seen += 1
                if refusal := self.accepts(found, "kv_cache", self.spec):
                    raise RecipeError(f"the key/value cache of {path_of(node)} cannot have {self.bits} bits: {refusal}")
                count += self._quantize(part, state(gm).ledger, ctx, node, found, chain)
            for node in [n for n in part.graph.nodes if key(n.target) in table(Attention) and view(Attention, n) is None]:
                seen += 1
                self._refuse(state(gm).ledger, ctx, node, "this form of attention is not understood")
            part.graph.lint()
            part.recompile()
        if not seen:
            raise RecipeError(f"there is no attention in this model whose keys and values could have {self.bits} bits")
        return count

    def _quantize(self, part: GraphModule, ledger: Ledger, ctx: Context, node: Node, found: Attention, chain: Found | None) -> int:
        perm = None if chain is None else chain.k_perm
        if perm is not None and perm[-1] != len(perm) - 1:
            self._refuse(ledger, ctx, node, f"its keys have the channels of a head on axis {perm[-1]}")
            return 0
        readers = (node,) if chain is None else chain.nodes
        rows = {role: rows_of(kv, next(u for u in kv.users if u in readers)) for role, kv in (("k", found.k), ("v", found.v))}
        todo = {role: r for role, r in rows.items() if not _is_quantized(r.new)}
        for role, r in todo.items():
            self._insert(part, r)
            reason = "each token and head by itself" if r.past is None else "each new token and head by itself, before it joins the cache"
            ledger.record(Entry(path_of(node), "Attention", role, str(self.spec), self.name, reason))
        return len(todo)

    def _refuse(self, ledger: Ledger, ctx: Context, node: Node, reason: str) -> None:
        ctx.declines.append(Decline(self.name, node.name, path_of(node), reason))
        for role in ("k", "v"):
            ledger.record(Entry(path_of(node), "Attention", role, FLOAT, self.name, reason))

    def _insert(self, gm: GraphModule, rows: Rows) -> None:
        spec, rw = self.spec, Rewriter(gm, rows.reader, by=self.name)
        made = rw.call(Q.dynamic_quantize.default, rows.new, spec.dtype, spec.symmetric, spec.axis, spec.group, origin=rows.new)
        parts = [rw.call(operator.getitem, made, i, origin=rows.new) for i in range(3)]
        back = rw.call(Q.dequantize.default, *parts, spec.dtype, spec.axis, spec.group, like=rows.new, origin=rows.new)
        rows.reader.replace_input_with(rows.new, back)


def _is_quantized(node: Node) -> bool:
    stored = view(Dequantize, node)
    return stored is not None and any(view(DynamicQuantize, made) is not None for made in stored.q.all_input_nodes)
