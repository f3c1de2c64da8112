"""V relu(W x + b) -> (V S) relu(S^-1 W x + S^-1 b): the weights on both sides of a value get equal ranges, channel by channel.

    s_i = sqrt(r1_i r2_i) / r2_i        r1, r2: largest magnitudes of the weights that write and that read channel i

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), equation 11, repeated over chains until
nothing moves. Several layers that write one value (the sum at the end of residual blocks) and several that read it count as one each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.annotate import labels
from qgraph.diagonal import Group, Member, diagonals
from qgraph.edit import graph_modules
from qgraph.ledger import Entry, Ledger, state
from qgraph.migrate import migrate, misfit
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.rewrite import BISECTION
from qgraph.text import path_of, target_name
from qgraph.views import Conv, Linear, view_any
from qgraph.weights import Weight, constant_weight

LAYERS = (Conv, Linear)

SETTLED = 1e-3
"""A round in which no factor moves further than this from 1 is the last."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Cross-layer equalization of convolutions and linears, without data. What is between them must commute with factors (diagonal.py).

    A clip above 0 does not: `RelaxClip` makes a relu of it, which changes the model. Values that a norm or a product with a constant takes
    factors into are left to SmoothQuant: nothing there is quantized on the side that writes."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)

    rounds: int = 50

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(self._equalize(part, state(gm).ledger) for part in graph_modules(gm))

    def _equalize(self, part: GraphModule, ledger: Ledger) -> int:
        found, names = diagonals(part), labels(part)
        chosen = [g for g in found.groups if _is_between_layers(g)]
        equalized = {m.node for g in chosen for m in g.consumers}
        for node in (n for n in part.graph.nodes if n not in equalized and view_any(LAYERS, n) is not None):
            reason = found.fixed.get(node) or "no other layer's weight writes what it reads"
            ledger.record(Entry(names[node], target_name(node), "scale", "unchanged", self.name, reason))
        count = 0
        for g, s in zip(chosen, self._factors(chosen), strict=True):
            obstacle = "its ranges are balanced already" if bool(((s - 1).abs() <= SETTLED).all()) else misfit(g, 1 / s)
            changed = obstacle is None and BISECTION.allows(self.name, g.consumers[0].node)
            decision = f"equalized over {len(g.producers)} writers, {len(g.consumers)} readers" if changed else "unchanged"
            writers = ", ".join(path_of(m.node) for m in g.producers)
            for m in g.consumers:
                reason = f"ranges balanced with {writers}" if changed else obstacle or "held back by bisection"
                ledger.record(Entry(names[m.node], target_name(m.node), "scale", decision, self.name, reason))
            count += migrate(part, g, 1 / s, by=self.name) if changed else 0
        return count

    def _factors(self, groups: list[Group]) -> list[Tensor]:
        """s of every group, float64 [size]: the product over all rounds."""
        weights = _magnitudes(groups)
        total = [torch.ones(g.size, dtype=torch.float64) for g in groups]
        for _ in range(self.rounds):
            moved = 0.0
            for i, g in enumerate(groups):
                s = _step(_ranges(g.producers, g.size, weights), _ranges(g.consumers, g.size, weights))
                for m in (*g.producers, *g.consumers):
                    _scale(weights, m, s)
                total[i] *= s
                moved = max(moved, float((s - 1).abs().max()))
            if moved <= SETTLED:
                break
        return total


def _is_between_layers(g: Group) -> bool:
    sides = (g.producers, g.consumers)
    return all(side and all(view_any(LAYERS, m.node) is not None for m in side) for side in sides)


def _magnitudes(groups: list[Group]) -> dict[Node, Weight]:
    """|W| of every layer in a group."""
    nodes = {m.node for g in groups for m in (*g.producers, *g.consumers)}
    found = {n: constant_weight(view_any(LAYERS, n)) for n in nodes}
    return {n: Weight(w.v, w.value.float().abs()) for n, w in found.items() if w is not None}


def _ranges(members: tuple[Member, ...], size: int, weights: dict[Node, Weight]) -> Tensor:
    found = torch.zeros(size + 1)
    for m in members:
        w = weights[m.node]
        found.scatter_reduce_(0, m.channels % (size + 1), w.absmax(_axis(m, w)), "amax")
    return found[:size].double()


def _axis(m: Member, w: Weight) -> int:
    return w.v.in_axis if m.side == "input" else w.v.out_axis


def _step(first: Tensor, second: Tensor) -> Tensor:
    """s of equation 11; 1 for channels whose weights are 0 on one side."""
    return torch.where((first > 0) & (second > 0), (first / second).sqrt(), 1.0)


def _scale(weights: dict[Node, Weight], m: Member, s: Tensor) -> None:
    w, own = weights[m.node], torch.cat([s, torch.ones(1, dtype=s.dtype)])[m.channels]
    weights[m.node] = Weight(w.v, w.scaled(own if m.side == "input" else 1 / own, _axis(m, w)).float())
