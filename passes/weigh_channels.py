"""E[x^2] of each input channel, for what chooses the numbers of weights: the error d of a weight w costs d^2 E[x^2] in its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.annotate import labels
from qgraph.collect import collect
from qgraph.edit import graph_modules
from qgraph.formats import QUANTIZE, TIED
from qgraph.ledger import Entry, state
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import Decline
from qgraph.text import path_of
from qgraph.views import Conv, Linear, view_any
from qgraph.weights import constant_weight

SQUARES = "squares"
"""The key of a layer's meta that holds E[x^2] of its input channels, float32 [inputs]."""


@dataclass(frozen=True)
class WeighChannels(Pass):
    """Linears and convolutions whose weight is wanted in a codebook, or in integers whose scales are searched for, on the float model;
    `InsertFakeQuant` reads what they have noted.

    This is the diagonal of the Hessian of each layer's own error; Kim et al., SqueezeLLM (2023), section 4.1, take that of the loss."""

    contract: ClassVar[Contract] = EXACT
    at: ClassVar[Literal["float", "observed", "quantized"]] = "observed"
    needs_data: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: Context) -> int:
        recipe = state(gm).recipe
        searched = recipe is not None and recipe.weight_range == "search"
        sites = {node: name for part in graph_modules(gm) for node, name in self._sites(part, ctx, searched).items()}
        seen = {_channels(node): MeanSquare(_channels(node)[1]) for node in sites}
        if seen:
            values = {x: [s for (y, _), s in seen.items() if y is x] for x, _ in seen}
            collect(gm, {x: _all_of(found) for x, found in values.items()}, ctx.data, label=self.name, progress=ctx.progress)
        return sum(self._note(gm, ctx, node, name, seen[_channels(node)]) for node, name in sites.items())

    def _sites(self, part: GraphModule, ctx: Context, searched: bool) -> dict[Node, str]:
        found, named = {}, labels(part)
        for node in part.graph.nodes:
            spec = node.meta.get(QUANTIZE, {}).get("weight")
            if spec is None:
                continue
            if TIED in node.meta and spec.codebook is None:
                reason = "its weight is an embedding table, too: both have the table's numbers, stored once"
                ctx.declines.append(Decline(self.name, node.name, path_of(node), reason))
            elif spec.codebook is None and not searched:
                reason = f"its weight is {spec}, with scales from its range; weight_range=search takes the data in"
                ctx.declines.append(Decline(self.name, node.name, path_of(node), reason))
            elif view_any((Linear, Conv), node) is not None:
                found[node] = named[node]
        return found

    def _note(self, gm: GraphModule, ctx: Context, node: Node, name: str, seen: MeanSquare) -> int:
        if not seen.count:
            ctx.declines.append(Decline(self.name, node.name, path_of(node), "the calibration data never reaches it"))
            return 0
        old, new = node.meta.get(SQUARES), seen.mean
        if old is not None and torch.equal(old, new):
            return 0
        node.meta[SQUARES] = new
        ledger = state(gm).ledger
        if (entry := ledger.get(name, "weight")) is not None:
            reason = "numbers chosen with E[x^2] of its input channels"
            ledger.record(Entry(entry.node, entry.kind, "weight", entry.decision, self.name, reason))
        return 1


class MeanSquare:
    """E[x^2] along an axis of what it was called with."""

    def __init__(self, axis: int) -> None:
        self.axis, self.total, self.count = axis, torch.zeros((), dtype=torch.float64), 0

    def __call__(self, x: Tensor) -> None:
        rows = x.movedim(self.axis, 0).flatten(1) if x.dim() > 1 else x[:, None]
        self.total = self.total + rows.float().square().sum(1, dtype=torch.float64)
        self.count += rows.shape[1]

    @property
    def mean(self) -> Tensor:
        return (self.total / self.count).float()


def _all_of(found: list[MeanSquare]) -> Callable[[Tensor], None]:
    def update(x: Tensor) -> None:
        for one in found:
            one(x)

    return update


def _channels(node: Node) -> tuple[Node, int]:
    """What the layer reads, and the axis of its channels."""
    v: Linear | Conv = view_any((Linear, Conv), node)
    return v.x, v.x_axis if isinstance(v, Linear) else 1


def importance(weight: Node) -> Tensor | None:
    """What a squared error of each element of this constant costs all layers that read it, in its shape; None where nothing is known."""
    total: Tensor | None = None
    for node in weight.users:
        v: Linear | Conv | None = view_any((Linear, Conv), node)
        found = constant_weight(v) if v is not None and SQUARES in node.meta else None
        if v is not None and found is not None:
            cost = replace(found, value=torch.ones_like(found.value)).scaled(node.meta[SQUARES], v.in_axis).float()
            total = cost if total is None else total + cost
    return total
