"""y = W x -> (W D^-1) (D x), D = 1 / s per input channel: outliers of activations go into weights, which take them better.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

Xiao et al., SmoothQuant (2022), equation 4. D goes into whatever makes x, if that and everything between commutes with it (diagonal.py);
an explicit product in front of the layers is made only if asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.annotate import labels
from qgraph.channels import Channels
from qgraph.collect import collect
from qgraph.diagonal import Group, Member, diagonals
from qgraph.edit import graph_modules
from qgraph.errors import RecipeError
from qgraph.formats import wanted
from qgraph.ledger import Entry, Ledger, state
from qgraph.migrate import magnitudes, migrate, misfit, multiply
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.qparams import choose_qparams, minmax
from qgraph.recipe import Int, Recipe
from qgraph.reference import fake_quantize
from qgraph.rewrite import BISECTION
from qgraph.text import path_of, target_name
from qgraph.types import PerTensor, QSpec
from qgraph.views import Linear, view
from qgraph.weights import constant_weight

UNCHANGED = "unchanged"
"""The ledger's decision about a linear that is not smoothed."""

BALANCED = 1e-3
"""Factors as near to 1 as this are not worth a change."""

SMALLEST = 1e-5
"""Factors are at least this."""

GRID = tuple(i / 10 for i in range(1, 11))
"""The values of alpha that a search tries."""

ROWS = 256
"""Rows of x that a search keeps per value, drawn at random from all batches."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Linears with constant weights, in both dialects; other layers that read the same values change with them.

    `alpha` between 0 (all into activations) and 1 (all into weights), or "search": per group the one of GRID with the least error of
    each linear's own formats on a sample of rows, or none where none is better than none. `explicit` multiplies in front of linears where
    nothing can take the factors in: one pass over x, which all of them share, and only where it lessens that error to `worth` of what it
    was. Raises RecipeError for another alpha."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)
    needs_data: ClassVar[bool] = True

    alpha: float | Literal["search"] = 0.5
    explicit: bool = False
    worth: float = 0.8

    def __post_init__(self) -> None:
        if self.alpha != "search" and not (isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1):
            raise RecipeError(f'alpha of smoothquant is a number from 0 to 1 or "search", got {self.alpha!r}')

    def run(self, gm: GraphModule, ctx: Context) -> int:
        found = [site for part in graph_modules(gm) for site in self._sites(part, state(gm).ledger)]
        if not found:
            return 0
        count = ROWS if self.alpha == "search" or self.explicit else 0
        seen = {r.key: Channels(r.axis, count=count) for site in found for r in site.readers}
        wanted = {x: _all_of([kept for (y, _), kept in seen.items() if y is x]) for x, _ in seen}
        collect(gm, wanted, ctx.data, label=self.name, progress=ctx.progress)
        formats = {r.node: _formats(r.node, state(gm).recipe) for site in found for r in site.readers}
        return sum(self._smooth(site, seen, formats, state(gm).ledger) for site in found)

    def _sites(self, part: GraphModule, ledger: Ledger) -> list[Site]:
        found, names = diagonals(part), labels(part)
        sites = [site for g in found.groups if (site := Site(part, names, g.size, g.consumers, g)).readers]
        smoothed = {m.node for site in sites for m in site.consumers}
        shared: dict[Key, list[Reader]] = {}
        for node, reason in found.fixed.items():
            reader = _reader(node)
            if reader is None or node in smoothed:
                continue
            if self.explicit:
                shared.setdefault(reader.key, []).append(reader)
            else:
                ledger.record(_entry(names[node], node, UNCHANGED, self.name, f"nothing can take in the factors of its input: {reason}"))
        for readers in shared.values():
            size = len(readers[0].channels)
            sites.append(Site(part, names, size, tuple(Member(r.node, "input", r.channels) for r in readers), None))
        return sites

    def _smooth(self, site: Site, seen: Mapping[Key, Channels], formats: Mapping[Node, Formats], ledger: Ledger) -> int:
        unseen = any(not len(seen[r.key].low) for r in site.readers)
        alpha, s = (None, torch.ones(site.size)) if unseen else self._chosen(site, seen, formats)
        obstacle = "the calibration data never reaches it" if unseen else None if site.group is None else misfit(site.group, 1 / s.double())
        changed = not obstacle and bool(((s - 1).abs() > BALANCED).any()) and BISECTION.allows(self.name, site.readers[0].node)
        decision = f"smoothquant alpha {alpha:g}, {len(site.readers)} readers" if changed else UNCHANGED
        reason = obstacle or ("no alpha lessens its error enough" if alpha is None else "its channels are balanced already")
        for r in site.readers:
            ledger.record(_entry(site.names[r.node], r.node, decision, self.name, site.taken_by() if changed else reason))
        if not changed:
            return 0
        if site.group is not None:
            return migrate(site.part, site.group, 1 / s.double(), by=self.name)
        multiply(site.part, site.readers[0].x, [m.node for m in site.consumers], 1 / s.double(), by=self.name)
        return len(site.consumers) + 1

    def _chosen(self, site: Site, seen: Mapping[Key, Channels], formats: Mapping[Node, Formats]) -> tuple[float | None, Tensor]:
        """(alpha, s), where None stands for factors 1."""
        x, w = _largest(site, seen), magnitudes(site.consumers, site.size)
        options = [(a, factors(x, w, a)) for a in (GRID if self.alpha == "search" else (self.alpha,))]
        if self.alpha != "search" and site.group is not None:
            return options[0]
        none = torch.ones(site.size)
        errors = [_error(site, seen, s, formats) for _, s in options]
        least, limit = min(errors), _error(site, seen, none, formats) * (self.worth if site.group is None else 1)
        return options[errors.index(least)] if least < limit else (None, none)


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


Key = tuple[Node, int]
"""A value and the axis of its channels."""


@dataclass(frozen=True)
class Formats:
    """What the recipe makes of weights [out, in] and of rows; None: float."""

    weight: QSpec | None
    x: QSpec | None


def _formats(node: Node, recipe: Recipe | None) -> Formats:
    """What the recipe, its rules and passes before this one want of a linear; int8 and static uint8 without a recipe."""
    weights, x = wanted(node, recipe)[1:] if recipe is not None else (Int(8), Int(8, symmetric=False, unsigned=True))
    weight = None if weights is None else weights.weight_spec(in_axis=1, out_axis=0)
    return Formats(weight, None if x is None else x.activation_spec())


def factors(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """s of equation 4, from largest magnitudes per channel [n]; 1 for channels that are always 0 on one side."""
    found = x.pow(alpha) / w.pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), found.clamp(min=SMALLEST), 1.0)


def _largest(site: Site, seen: Mapping[Key, Channels]) -> Tensor:
    """max|X_j| over all values that the site's linears read [size]."""
    found = torch.zeros(site.size + 1)
    for r in site.readers:
        found.scatter_reduce_(0, r.channels % (site.size + 1), seen[r.key].largest(), "amax")  # -1 goes behind the last
    return found[: site.size]


def _error(site: Site, seen: Mapping[Key, Channels], s: Tensor, formats: Mapping[Node, Formats]) -> float:
    """Error of the linears' products in their formats with factors s, over their power, summed over the linears."""
    padded, total = torch.cat([s, torch.ones(1)]), 0.0
    for r in site.readers:
        own, of, weight = padded[r.channels], seen[r.key], r.weight()
        exact = of.rows @ weight.T
        x = _rounded(of.rows / own, formats[r.node].x, (of.low / own).amin(), (of.high / own).amax())
        total += float(
            (x @ _rounded(weight * own, formats[r.node].weight).T - exact).square().sum() / exact.square().sum().clamp(min=1e-30)
        )
    return total


def _rounded(x: Tensor, spec: QSpec | None, *per_tensor: Tensor) -> Tensor:
    if spec is None:
        return x
    low, high = per_tensor if per_tensor and isinstance(spec.granularity, PerTensor) else minmax(x, spec.axis, spec.group)
    return fake_quantize(x, *choose_qparams(low, high, spec), spec.dtype, spec.axis, spec.group)


def _all_of(kept: Sequence[Channels]) -> Callable[[Tensor], None]:
    def update(x: Tensor) -> None:
        for one in kept:
            one.update(x)

    return update


def _entry(label: str, node: Node, decision: str, by: str, reason: str) -> Entry:
    return Entry(label, target_name(node), "scale", decision, by, reason)
