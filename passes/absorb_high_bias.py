"""V relu(W x + b) + a -> V relu(W x + (b - c)) + (a + V c): what no input ever falls below goes past the relu into the next bias.

    c = max(0, smallest W x + b on the calibration data), per channel; without data max(0, mean - 3 deviations)

relu(y) = relu(y - c) + c wherever y >= c. Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019),
section 4.1.3, equation 15; the minimum seen is safer than mean - 3 deviations. Equalization makes such biases; without them the range of the relu's
output is smaller by c.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.annotate import labels
from qgraph.channels import Channels
from qgraph.collect import collect
from qgraph.edit import graph_modules, has_writes
from qgraph.ledger import Entry, Ledger, state
from qgraph.moments import MOMENTS, Moments
from qgraph.pipeline import EQUIVALENT, LOSSY, Context, Contract, Pass
from qgraph.propagate import channels, propagate
from qgraph.rewrite import BISECTION
from qgraph.rewriter import Decline, Rewriter
from qgraph.slots import with_operands
from qgraph.text import path_of, target_name
from qgraph.views import Activation, Conv, Elementwise, Linear, const_value, is_const, view, view_any
from qgraph.weights import Weight, constant_weight

LAYERS = (Conv, Linear)

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
class Bias:
    """Where a layer's result takes a shift per channel: in `node`, a layer with room for a bias or the sum behind one that has none."""

    node: Node
    channels: int

    def add(self, part: GraphModule, shift: Tensor, *, by: str) -> None:
        """Adds `shift` [channels] to the result."""
        v: Any = view_any((*LAYERS, Elementwise), self.node)
        rw = Rewriter(part, self.node, by=by)
        if isinstance(v, Elementwise):
            old = next(x for x in v.inputs if isinstance(x, Node) and is_const(x))
            new = rw.const(old, lambda value: (value.double() + shift.reshape(value.shape)).to(value.dtype), name=str(old.target))
            self.node.replace_input_with(old, new)
            return
        shift = shift / (v.beta if isinstance(v, Linear) else 1.0)
        weight, value = const_value(v.weight), const_value(v.bias)
        assert weight is not None  # _bias has seen it
        total = (shift if value is None else value.double() + shift).to(weight.dtype)
        placed = with_operands(self.node, bias=rw.const(total, name=f"{self.node.name}_bias" if v.bias is None else str(v.bias.target)))
        assert placed is not None
        self.node.args, self.node.kwargs = placed


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
    behind = _source(v.x)
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
        after = _bias(user, weight)
        if after is None:
            return f"{path_of(user)} has no place for a bias"
        readers.append((weight, after))
    return Place(part, names, relu, v.x, axis, bias, tuple(readers)) if readers else "no layer reads it"


def _axis(layer: Conv | Linear) -> int:
    """The channel axis of the layer's input and output, from the end."""
    return layer.x_axis if isinstance(layer, Linear) else -1 - len(layer.stride)


def _source(x: Node) -> tuple[int, Bias] | None:
    """(channel axis, bias) of a value that a layer makes, with or without a sum behind it."""
    added = view(Elementwise, x)
    nodes = [n for n in x.all_input_nodes if not is_const(n)] if added is not None else [x]
    layer: Linear | Conv | None = view_any(LAYERS, nodes[0]) if len(nodes) == 1 else None
    weight = None if layer is None else constant_weight(layer)
    bias = None if weight is None else _bias(nodes[0], weight)
    if layer is None or bias is None or bias.node is not x:
        return None
    return -1 if isinstance(layer, Linear) else _axis(layer), bias


def _bias(node: Node, weight: Weight) -> Bias | None:
    """Where the result of a layer takes a shift."""
    v, n = weight.v, weight.outputs
    if v.bias is not None:
        return Bias(node, n) if _is_per_channel(const_value(v.bias), n, -1) and not (isinstance(v, Linear) and v.beta == 0) else None
    user = next(iter(node.users)) if len(node.users) == 1 else None
    added = view(Elementwise, user)
    if added is not None and added.kind == "add" and len(added.inputs) == 2:
        value = next((const_value(x) for x in added.inputs if isinstance(x, Node) and is_const(x)), None)
        if user is not None and _is_per_channel(value, n, -1 if isinstance(v, Linear) else _axis(v)):
            return Bias(user, n)
    return Bias(node, n) if with_operands(node, bias=v.weight) is not None else None


def _is_per_channel(value: Tensor | None, channels: int, axis: int) -> bool:
    """One element per channel, along `axis` alone."""
    return value is not None and value.numel() == channels and value.ndim >= -axis and value.shape[axis] == channels
