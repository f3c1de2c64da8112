"""Bias: what a layer adds to its result per channel, wherever the graph keeps it, in the layer or in the sum behind one that has none."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.edit import replace
from qgraph.moments import MOMENTS
from qgraph.rewriter import Rewriter
from qgraph.slots import Arguments, with_operands
from qgraph.views import Conv, Elementwise, Linear, const_value, is_const, view, view_any
from qgraph.weights import Weight, constant_weight

LAYERS = (Conv, Linear)


@dataclass(frozen=True, eq=False)
class Bias:
    """That of `layer`, which `node` adds: the layer, which has room for one, or the sum behind it."""

    node: Node
    layer: Node
    channels: int

    @property
    def constant(self) -> Node | None:
        """Where it is stored; None where there is none yet."""
        v: Conv | Linear | Elementwise = view_any((*LAYERS, Elementwise), self.node)
        return next((x for x in v.inputs if isinstance(x, Node) and is_const(x)), None) if isinstance(v, Elementwise) else v.bias

    @property
    def beta(self) -> float:
        """The factor of the stored constant."""
        v = view(Linear, self.node)
        return 1.0 if v is None else v.beta

    @property
    def value(self) -> Tensor | None:
        """What is added, float64 [channels]; None where there is no bias."""
        stored = const_value(self.constant)
        return None if stored is None else stored.double().flatten() * self.beta

    def add(self, part: GraphModule, shift: Tensor, *, by: str) -> None:
        """Adds `shift` [channels] to the result."""
        rw, old, shift = Rewriter(part, self.node, by=by), self.constant, shift / self.beta
        if old is not None and self.node is not self.layer:
            new = rw.const(old, lambda value: (value.double() + shift.reshape(value.shape)).to(value.dtype), name=str(old.target))
            self.node.replace_input_with(old, new)
            return
        weight, value = const_value(view_any(LAYERS, self.node).weight), const_value(old)
        assert weight is not None  # bias_of has seen it
        total = (shift if value is None else value.double() + shift).to(weight.dtype)
        placed = with_operands(self.node, bias=rw.const(total, name=f"{self.node.name}_bias" if old is None else str(old.target)))
        assert placed is not None
        self.node.args, self.node.kwargs = placed

    @property
    def without(self) -> Arguments | None:
        """The layer's arguments without a bias; None where it cannot be called so."""
        found = with_operands(self.layer, bias=None) if self.node is self.layer else (self.layer.args, self.layer.kwargs)
        args = [] if found is None else list(found[0])
        while args and args[-1] is None:
            args.pop()
        return None if found is None or None in args else (tuple(args), found[1])

    def remove(self) -> None:
        """Leaves the layer without a bias."""
        placed = self.without
        assert placed is not None  # the caller has looked
        self.layer.meta.pop(MOMENTS, None)
        self.node.meta.pop(MOMENTS, None)
        if self.node is self.layer:
            self.node.args, self.node.kwargs = placed
        else:
            replace(self.node, self.layer)


def channel_axis(layer: Conv | Linear) -> int:
    """The channel axis of the layer's result, from the end."""
    return -1 if isinstance(layer, Linear) else -1 - len(layer.stride)


def source_of(x: Node) -> tuple[int, Bias] | None:
    """(channel axis, bias) of a value that a layer with constant weight makes, with or without a sum behind it."""
    added = view(Elementwise, x)
    nodes = [n for n in x.all_input_nodes if not is_const(n)] if added is not None else [x]
    layer: Linear | Conv | None = view_any(LAYERS, nodes[0]) if len(nodes) == 1 else None
    weight = None if layer is None else constant_weight(layer)
    bias = None if weight is None else bias_of(nodes[0], weight)
    return None if layer is None or bias is None or bias.node is not x else (channel_axis(layer), bias)


def bias_of(node: Node, weight: Weight) -> Bias | None:
    """Where the result of a layer takes a shift; None where it has no place for one, or has one that is not per channel."""
    v, n = weight.v, weight.outputs
    if v.bias is not None:
        return Bias(node, node, n) if _is_per_channel(const_value(v.bias), n, -1) and not (isinstance(v, Linear) and v.beta == 0) else None
    user = next(iter(node.users)) if len(node.users) == 1 else None
    added = view(Elementwise, user)
    if added is not None and added.kind == "add" and len(added.inputs) == 2:
        value = next((const_value(x) for x in added.inputs if isinstance(x, Node) and is_const(x)), None)
        if user is not None and _is_per_channel(value, n, channel_axis(v)):
            return Bias(user, node, n)
    return Bias(node, node, n) if with_operands(node, bias=v.weight) is not None else None


def _is_per_channel(value: Tensor | None, channels: int, axis: int) -> bool:
    """One element per channel, along `axis` alone."""
    return value is not None and value.numel() == channels and value.ndim >= -axis and value.shape[axis] == channels
