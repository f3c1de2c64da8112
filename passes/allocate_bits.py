"""Bits where they matter: each weight gets the number of bits that lowers the error of the outputs most for its bytes, within a size.

With l the error that an operation causes alone at the fewest bits b (effects.py), its error at c bits is about l / 4^(c - b): every bit halves
the steps. Bits are then spent where the next step of an operation gains most per byte, while it fits: for steps whose worth only falls, as
here, that is the best that can be done but for the last step.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import ClassVar

from torch.fx import GraphModule, Node

from qgraph.edit import graph_modules
from qgraph.effects import Effects
from qgraph.errors import RecipeError
from qgraph.formats import OVERRIDE, Override, sites, wanted
from qgraph.ledger import state
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.mixed import trial_of
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.qparams import scale_shape
from qgraph.recipe import Int
from qgraph.text import path_of
from qgraph.types import QSpec
from qgraph.views import const_value


@dataclass(frozen=True)
class AllocateBits(Pass):
    """The stage `+bits`: weights of all operations that the recipe quantizes take at most `size` MB (10**6 bytes), scales, zero points and
    the tables of embeddings included; each has one of `choices` bits, in the recipe's groups. `samples` samples are run for each operation.

    Operations that a rule names keep its format. Raises RecipeError outside a recipe, for choices that the backend has no kernel for, and
    for a size that the fewest bits do not fit."""

    name: ClassVar[str] = "allocate_bits"
    contract: ClassVar[Contract] = EXACT
    needs_data: ClassVar[bool] = True

    size: float
    choices: tuple[int, ...] = (4, 8)
    samples: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(sorted(self.choices)))
        if self.size <= 0 or len(set(self.choices)) < 2:
            raise RecipeError(f"stage bits takes a size in MB and two or more choices of bits, got {self.size:g} and {list(self.choices)}")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of operations that get more than the fewest bits. A graph that has overrides is left as it is."""
        if any(OVERRIDE in n.meta for part in graph_modules(gm) for n in part.graph.nodes):
            return 0
        observe = next((p for p in state(gm).pending if isinstance(p, InsertObservers)), None)
        if observe is None or observe.recipe.weights is None:
            raise RecipeError("stage bits looks at the formats of a recipe: name it in one with integer weights, and call qgraph.calibrate")
        formats = {bits: replace(observe.recipe.weights, bits=bits) for bits in self.choices}
        fewest = replace(observe, recipe=replace(observe.recipe, weights=formats[self.choices[0]]))
        effects = Effects(trial_of(gm, observe, ctx, self, instead=fewest), ctx.data or (), samples=self.samples)
        lost = effects.alone()
        spent, steps = 0.0, list[_Steps]()
        for node, v in sites(gm):
            place, value = (0, node.name), const_value(v.weight)
            spec = effects.sites[place].formats[0] if place in effects.sites else None
            if value is None or spec is None:
                continue
            rule, asked, _ = wanted(node, fewest.recipe)
            if rule is not None or asked != formats[self.choices[0]]:  # by a rule, or as an embedding table
                spent += _bytes(value.shape, spec)
                continue
            specs = [replace(spec, dtype=_typed(spec, bits)) for bits in self.choices]
            if reason := next((no for s in specs if (no := observe.placement.accepts(v, "weight", s))), None):
                raise RecipeError(f"stage bits cannot choose among {list(self.choices)} bits at {path_of(node)}: {reason}")
            steps.append(_Steps(node, sum(lost[place].values()), [_bytes(value.shape, s) for s in specs]))
            spent += steps[-1].sizes[0]
        if spent > self.size * 1e6:
            raise RecipeError(f"the weights take {spent / 1e6:.3g} MB at {self.choices[0]} bits: more than size={self.size:g}")
        found = _spend(steps, self.choices, self.size * 1e6 - spent)
        for step in steps:
            bits = found.get(step.node, self.choices[0])
            _override(step.node, formats[bits], observe, f"costs the output {step.lost:.2g} of its power at {self.choices[0]} bits")
        return len(found)


@dataclass(frozen=True)
class _Steps:
    """An operation, what it loses at the fewest bits, and its bytes for each choice."""

    node: Node
    lost: float
    sizes: list[float]


def _spend(steps: list[_Steps], choices: tuple[int, ...], room: float) -> dict[Node, int]:
    """Bits of the operations that get more than the fewest, for `room` bytes."""
    bits: dict[Node, int] = {}
    gains = [[s.lost * (4.0 ** (choices[0] - a) - 4.0 ** (choices[0] - b)) for a, b in pairwise(choices)] for s in steps]
    more = [[b - a for a, b in pairwise(s.sizes)] for s in steps]
    heap = [(-gains[i][0] / more[i][0], i, 0) for i in range(len(steps))]
    heapq.heapify(heap)
    while heap:
        _, i, k = heapq.heappop(heap)
        if more[i][k] > room:
            continue
        room -= more[i][k]
        bits[steps[i].node] = choices[k + 1]
        if k + 1 < len(more[i]):
            heapq.heappush(heap, (-gains[i][k + 1] / more[i][k + 1], i, k + 1))
    return bits


def _typed(spec: QSpec, bits: int) -> str:
    return f"{'' if spec.signed else 'u'}int{bits}"


def _bytes(shape: tuple[int, ...], spec: QSpec) -> float:
    """Of the integers, packed, with scales in float32 and zero points of the integers' size."""
    scales = prod(scale_shape(shape, spec.axis, spec.group))
    return prod(shape) * spec.bits / 8 + scales * (4 + (0 if spec.symmetric else spec.bits / 8))


def _override(node: Node, weights: Int, observe: InsertObservers, reason: str) -> None:
    node.meta[OVERRIDE] = Override(weights, observe.recipe.activations, f"stage {AllocateBits.name} ({reason})")
