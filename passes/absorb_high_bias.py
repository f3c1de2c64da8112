"""V relu(W x + b) + a -> V relu(W x + (b - c)) + (a + V c): what no input ever falls below goes past the relu into the next bias.

    c = max(0, smallest W x + b on the calibration data), per channel; without data max(0, mean - 3 deviations)

relu(y) = relu(y - c) + c wherever y >= c. Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019),
section 4.1.3, equation 15; the minimum seen is safer than mean - 3 deviations. Equalization makes such biases; without them the range of the relu's
output is smaller by c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.annotate import labels
from qgraph.biases import LAYERS, Bias, bias_of, source_of
from qgraph.channels import Channels
from qgraph.collect import collect
from qgraph.edit import graph_modules, has_writes
from qgraph.ledger import Entry, Ledger, state
from qgraph.moments import MOMENTS, Moments
from qgraph.pipeline import EQUIVALENT, LOSSY, Context, Contract, Pass
from qgraph.propagate import channels, propagate
from qgraph.rewrite import BISECTION
from qgraph.rewriter import Decline
from qgraph.text import path_of, target_name
from qgraph.views import Activation, Conv, Linear, view, view_any
from qgraph.weights import Weight, constant_weight

ROUNDING = 1e-5
"""A minimum below this share of the maximum counts as 0."""


@dataclass(frozen=True)
class AbsorbHighBias(Pass):
    """A relu whose input is made by one layer and whose output only layers without padding read; on inputs beyond the calibration data the
    result may differ where a value falls below its c."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)
    needs_data: ClassVar[bool] = True

    def run(self, gm: GraphModule, ctx: Context) -> int:
        places = [p for part in graph_modules(gm) for p in _places(part, ctx, by=self.name)]
        seen = {p.relu: Channels(p.axis) for p in places}
        if not places:
            return 0
        collect(gm, {p.source: seen[p.relu].update for p in places}, ctx.data, label=self.name, progress=ctx.progress)
        ledger = state(gm).ledger
        return sum(_absorb(p, _never_below(seen[p.relu]), "never fell to 0", ledger, by=self.name) for p in places)


@dataclass(frozen=True)
class AbsorbFromMoments(Pass):
    """The same places without data, where batch norms or norms tell mean and deviation before the relu. Of a normal value one in 700 lies
    further than 3 deviations below the mean."""

    contract: ClassVar[Contract] = LOSSY

    sigmas: float = 3.0

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(self._run(part, state(gm).ledger, ctx) for part in graph_modules(gm))

    def _run(self, part: GraphModule, ledger: Ledger, ctx: Context) -> int:
        known, count = propagate(part), 0
        for p in list(_places(part, ctx, by=self.name)):
            found = known[p.source]
            if not isinstance(found, Moments):
                ctx.declines.append(Decline(self.name, p.relu.name, path_of(p.relu), str(found)))
                continue
            x = channels(found, p.axis)
            c = x.mean - self.sigmas * x.std
            c = c.where(c > ROUNDING * x.mean, 0.0).expand(p.channels)
            count += _absorb(p, c, f"lie {self.sigmas:g} deviations above 0", ledger, by=self.name)
        return count


def _places(part: GraphModule, ctx: Context, *, by: str) -> Iterator[Place]:
    names = labels(part)
    for node in () if has_writes(part) else part.graph.nodes:
        v = view(Activation, node)
        if v is None or v.low != 0 or v.kind not in ("relu", "clip"):
            continue
        found = _place(part, names, node, v)
        if isinstance(found, str):
            ctx.declines.append(Decline(by, node.name, path_of(node), found))
        else:
            yield found


def _absorb(p: Place, c: Tensor, why: str, ledger: Ledger, *, by: str) -> int:
    """c [channels] float64; 0 where values come down to 0."""
    if not bool(c.any()) or not BISECTION.allows(by, p.relu):
        return 0
    p.source_bias.add(p.part, -c, by=by)
    for weight, bias in p.readers:
        bias.add(p.part, weight.response(c) * (weight.v.alpha if isinstance(weight.v, Linear) else 1.0), by=by)
    for node in (p.source, p.relu):
        if (kept := node.meta.get(MOMENTS)) is not None:
            node.meta[MOMENTS] = kept.plus(-c.reshape(-1, *[1] * (-1 - p.axis)))
    p.part.recompile()
    reason = f"{int((c > 0).sum())} of {len(c)} channels {why} before {path_of(p.relu)}"
    for node, decision in [(p.source, "bias lowered"), *((b.node, "bias raised") for _, b in p.readers)]:
        ledger.record(Entry(p.names[node], target_name(node), "shift", decision, by, reason))
    return 1 + len(p.readers)


def _never_below(x: Channels) -> Tensor:
    """c [channels], float64: the smallest value seen, 0 where that is not above 0 by more than rounding."""
    if not len(x.low):  # a branch that never ran
        return torch.zeros(1, dtype=torch.float64)
    return torch.where(x.low > ROUNDING * x.high, x.low, 0.0).double()


@dataclass(frozen=True, eq=False)
class Place:
    """A relu, the bias of what it reads, and the layers that read it with the biases of their results."""

    part: GraphModule
    names: Mapping[Node, str]
    relu: Node
    source: Node
    axis: int
    source_bias: Bias
    readers: tuple[tuple[Weight, Bias], ...]

    @property
    def channels(self) -> int:
        return self.source_bias.channels


def _place(part: GraphModule, names: Mapping[Node, str], relu: Node, v: Activation) -> Place | str:
    """The place, or why nothing can be absorbed here."""
    if v.high is not None:
        return f"it also clips at {v.high:g}"
    if len(v.x.users) > 1:
        return "its input is read by others too"
    behind = source_of(v.x)
    if behind is None:
        return "no layer with constant weight and bias makes its input"
    axis, bias = behind
    readers = []
    for user in relu.users:
        layer: Linear | Conv | None = view_any(LAYERS, user)
        weight = None if layer is None else constant_weight(layer)
        if layer is None or weight is None or layer.x is not relu:
            return f"{path_of(user)} reads it, which is no layer with a constant weight"
        if _axis(layer) != axis:
            return f"{path_of(user)} reads its axis {_axis(layer)} as channels, not {axis}"
        if isinstance(layer, Conv) and (layer.transposed or layer.padding is None or any(any(p) for p in layer.padding)):
            return f"{path_of(user)} pads its input, where a shift is missing"
        after = bias_of(user, weight)
        if after is None:
            return f"{path_of(user)} has no place for a bias"
        readers.append((weight, after))
    return Place(part, names, relu, v.x, axis, bias, tuple(readers)) if readers else "no layer reads it"


def _axis(layer: Conv | Linear) -> int:
    """The channel axis of the layer's input and output, from the end."""
    return layer.x_axis if isinstance(layer, Linear) else -1 - len(layer.stride)
