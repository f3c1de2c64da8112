"""balance(gm, ctx, method): y = W x -> (W D^-1) (D x), D = 1 / s per input channel, s chosen from data for each group of layers.

A group is what must change together (see diagonal.py): all linears that read scaled values, and what makes these values. A method says
how s follows from what x and W are like and from one number alpha; alpha is the one of its grid with the least error of the linears'
products in the formats that the recipe wants, on a sample of rows. D goes into whatever makes x (migrate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.annotate import labels
from qgraph.channels import Channels
from qgraph.codebook import rounded as nearest_levels
from qgraph.collect import collect
from qgraph.diagonal import Group, Member, diagonals
from qgraph.edit import graph_modules
from qgraph.formats import TIED, wanted
from qgraph.ledger import Entry, Ledger, state
from qgraph.migrate import magnitudes, migrate, misfit, multiply
from qgraph.pipeline import Context
from qgraph.qparams import choose_qparams, minmax
from qgraph.recipe import Int, Recipe
from qgraph.reference import fake_quantize
from qgraph.rewrite import BISECTION
from qgraph.scales import grid_of
from qgraph.text import path_of, target_name
from qgraph.types import PerTensor, QSpec
from qgraph.views import Embedding, Linear, view
from qgraph.weights import constant_weight

UNCHANGED = "unchanged"
"""The ledger's decision about a linear that is not balanced."""

BALANCED = 1e-3
"""Factors as near to 1 as this are not worth a change."""

ROWS = 256
"""Rows of x that a search keeps per value, drawn at random from all batches."""

OUTPUTS = 256
"""Output channels of each linear that a search computes, spread over all of them."""


@dataclass(frozen=True)
class Method:
    """How factors are chosen. `factors(x, w, alpha)` [n] are s, of statistics per channel: `statistic` of the values, and the largest
    magnitudes of weights. One value of alpha is taken as it is; of several, the best, or none where none is better than none.

    `explicit` multiplies in front of linears where nothing can take the factors in, if that lessens the error to `worth` of what it was."""

    name: str
    grid: Sequence[float]
    statistic: Callable[[Channels], Tensor]
    factors: Callable[[Tensor, Tensor, float], Tensor]
    explicit: bool = False
    worth: float = 0.8

    @property
    def searches(self) -> bool:
        return len(self.grid) > 1


def balance(gm: GraphModule, ctx: Context, method: Method) -> int:
    """Runs the context's data once; returns the number of operations that have new constants. Every linear gets a ledger entry."""
    ledger, recipe = state(gm).ledger, state(gm).recipe
    sites = [site for part in graph_modules(gm) for site in _sites(part, method, recipe, ledger)]
    if not sites:
        return 0
    count = ROWS if method.searches or method.explicit else 0
    seen = {r.key: Channels(r.axis, count=count) for site in sites for r in site.readers}
    watched = {x: _all_of([kept for (y, _), kept in seen.items() if y is x]) for x, _ in seen}
    collect(gm, watched, ctx.data, label=method.name, progress=ctx.progress)
    return sum(_Choice(site, method, seen, recipe).apply(ledger) for site in sites)


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear with a constant weight; input channel i of `x`, along `axis`, has the site's factor channels[i]."""

    node: Node
    x: Node
    axis: int
    channels: Tensor

    @property
    def key(self) -> Key:
        return self.x, self.axis

    def weight(self) -> Tensor:
        """The weight that it has now, float32 [out, in]."""
        v = view(Linear, self.node)
        found = None if v is None else constant_weight(v)
        assert v is not None and found is not None  # _reader has seen them, and constants stay constants
        return found.value.float().movedim(v.in_axis, -1)


def _reader(node: Node, channels: Tensor | None = None) -> Reader | None:
    v = view(Linear, node)
    found = None if v is None else constant_weight(v)
    if v is None or found is None:
        return None
    return Reader(node, v.x, v.x_axis, torch.arange(found.inputs) if channels is None else channels)


@dataclass(frozen=True, eq=False)
class Site:
    """Layers whose inputs have `size` common factors; `group` is None where only a product in front of them can apply these."""

    part: GraphModule
    names: Mapping[Node, str]
    size: int
    consumers: tuple[Member, ...]
    group: Group | None

    @cached_property
    def readers(self) -> list[Reader]:
        return [r for m in self.consumers if (r := _reader(m.node, m.channels)) is not None]

    def taken_by(self) -> str:
        if self.group is None:
            return "factors in a product in front"
        makers = list(dict.fromkeys(path_of(m.node) for m in self.group.producers))
        return f"factors taken in by {', '.join(makers[:3])}{', ...' if len(makers) > 3 else ''}"

    def obstacle(self, recipe: Recipe | None) -> str:
        """Why it is to be left alone, whatever the data are, or ""."""
        if all(_formats(r.node, recipe) == Formats(None, None) for r in self.readers):
            return "the recipe leaves what reads its input in float"
        own = {m.node for m in (*self.consumers, *(self.group.producers if self.group is not None else ()))}
        for r in self.readers:
            weight = view(Linear, r.node).weight  # type: ignore[union-attr]  # it is a linear
            others = [user for user in weight.users if user not in own and view(Embedding, user) is None]
            if others:
                return f"its weight is that of {path_of(others[0])}, too, which has other factors"
            table = None if recipe is None else recipe.embeddings
            if TIED in r.node.meta and _formats(r.node, recipe).weight in (None, _spec(table)):
                return f"its weight is the embedding table @{r.node.meta[TIED]}, stored once for both"
        return ""


Key = tuple[Node, int]
"""A value and the axis of its channels."""


def _sites(part: GraphModule, method: Method, recipe: Recipe | None, ledger: Ledger) -> list[Site]:
    found, names = diagonals(part), labels(part)
    sites = [site for g in found.groups if (site := Site(part, names, g.size, g.consumers, g)).readers]
    grouped = {m.node for site in sites for m in site.consumers}
    shared: dict[Key, list[Reader]] = {}
    for node, reason in found.fixed.items():
        reader = _reader(node)
        if reader is None or node in grouped:
            continue
        if method.explicit:
            shared.setdefault(reader.key, []).append(reader)
        else:
            why = f"nothing can take in the factors of its input: {reason}"
            ledger.record(_entry(names[node], node, UNCHANGED, method.name, why))
    for readers in shared.values():
        size = len(readers[0].channels)
        sites.append(Site(part, names, size, tuple(Member(r.node, "input", r.channels) for r in readers), None))
    chosen = []
    for site in sites:
        if why := site.obstacle(recipe):
            for r in site.readers:
                ledger.record(_entry(names[r.node], r.node, UNCHANGED, method.name, why))
        else:
            chosen.append(site)
    return chosen


@dataclass(frozen=True)
class Formats:
    """What the recipe makes of weights [out, in] and of rows; None: float."""

    weight: QSpec | None
    x: QSpec | None


def _formats(node: Node, recipe: Recipe | None) -> Formats:
    """What the recipe, its rules and passes before this one want of a linear; int8 and static uint8 without a recipe."""
    weights, x = wanted(node, recipe)[1:] if recipe is not None else (Int(8), Int(8, symmetric=False, unsigned=True))
    return Formats(_spec(weights), None if x is None else x.activation_spec())


def _spec(weights: Int | None) -> QSpec | None:
    return None if weights is None else weights.weight_spec(in_axis=1, out_axis=0)


@dataclass(frozen=True, eq=False)
class _Choice:
    """The factors of one site."""

    site: Site
    method: Method
    seen: Mapping[Key, Channels]
    recipe: Recipe | None

    def apply(self, ledger: Ledger) -> int:
        site, name = self.site, self.method.name
        unseen = any(not len(self.seen[r.key].low) for r in site.readers)
        alpha, s = (None, torch.ones(site.size)) if unseen else self.best()
        obstacle = "the calibration data never reaches it" if unseen else None if site.group is None else misfit(site.group, 1 / s.double())
        changed = not obstacle and bool(((s - 1).abs() > BALANCED).any()) and BISECTION.allows(name, site.readers[0].node)
        decision = f"{name} alpha {alpha:g}, {len(site.readers)} readers" if changed else UNCHANGED
        reason = obstacle or ("no alpha lessens its error enough" if alpha is None else "its channels are balanced already")
        for r in site.readers:
            ledger.record(_entry(site.names[r.node], r.node, decision, name, site.taken_by() if changed else reason))
        if not changed:
            return 0
        if site.group is not None:
            return migrate(site.part, site.group, 1 / s.double(), by=name)
        multiply(site.part, site.readers[0].x, [m.node for m in site.consumers], 1 / s.double(), by=name)
        return len(site.consumers) + 1

    def best(self) -> tuple[float | None, Tensor]:
        """(alpha, s), where None stands for factors 1."""
        x, w = self._statistic(), magnitudes(self.site.consumers, self.site.size)
        options = [(a, self.method.factors(x, w, a)) for a in self.method.grid]
        if not self.method.searches and self.site.group is not None:
            return options[0]
        none = torch.ones(self.site.size)
        errors = [self.error(s) for _, s in options]
        least, limit = min(errors), self.error(none) * (self.method.worth if self.site.group is None else 1)
        return options[errors.index(least)] if least < limit else (None, none)

    def _statistic(self) -> Tensor:
        """The method's statistic, the largest over all values that the site's linears read [size]."""
        size = self.site.size
        found = torch.zeros(size + 1)
        for r in self.site.readers:
            found.scatter_reduce_(0, r.channels % (size + 1), self.method.statistic(self.seen[r.key]), "amax")  # -1: behind the last
        return found[:size]

    @cached_property
    def targets(self) -> list[tuple[Reader, Formats, Tensor, Tensor]]:
        """Of each linear some rows of its weight, and the products of the sample of x with them."""
        found = []
        for r in self.site.readers:
            formats = _formats(r.node, self.recipe)
            weight = r.weight()
            if formats.weight is None or formats.weight.axis is not None:
                weight = weight[:: max(1, len(weight) // OUTPUTS)]
            found.append((r, formats, weight, self.seen[r.key].rows @ weight.T))
        return found

    def error(self, s: Tensor) -> float:
        """Error of the linears' products in their formats with factors s, over their power, summed over the linears."""
        padded, total = torch.cat([s, torch.ones(1)]), 0.0
        inputs: dict[tuple[Key, QSpec | None], Tensor] = {}
        for r, formats, weight, exact in self.targets:
            own, key = padded[r.channels], (r.key, formats.x)
            if key not in inputs:
                inputs[key] = _x(self.seen[r.key], own, formats.x)
            error = (inputs[key] @ self.rounded(weight * own, formats.weight).T).sub_(exact)
            total += float(error.square_().sum() / exact.square().sum().clamp(min=1e-30))
        return total

    def rounded(self, weight: Tensor, spec: QSpec | None) -> Tensor:
        """The weight as insert_fake_quant makes it."""
        if spec is None or spec.codebook is not None:
            return weight if spec is None else nearest_levels(weight, spec)
        way, options = ("minmax", {}) if self.recipe is None else (self.recipe.weight_range, self.recipe.weight_range_options)
        return fake_quantize(weight, *grid_of(weight, spec, way, **options), spec.dtype, spec.axis, spec.group)


def _x(of: Channels, s: Tensor, spec: QSpec | None) -> Tensor:
    """The sample of x / s as the recipe has it."""
    x = of.rows / s
    if spec is None:
        return x
    low, high = (of.low / s).amin(), (of.high / s).amax()
    if not isinstance(spec.granularity, PerTensor):
        low, high = minmax(x, spec.axis, spec.group)
    return fake_quantize(x, *choose_qparams(low, high, spec), spec.dtype, spec.axis, spec.group)


def _all_of(kept: Sequence[Channels]) -> Callable[[Tensor], None]:
    def update(x: Tensor) -> None:
        for one in kept:
            one.update(x)

    return update


def _entry(label: str, node: Node, decision: str, by: str, reason: str) -> Entry:
    return Entry(label, target_name(node), "scale", decision, by, reason)
