"""propagate(gm) -> Moments of every value: from what batch norms and norms are known to make, on through the graph; no data is run.

    norms, folded or not     mean = bias, deviation = |weight|            W x + b     W E[x] + b, W^2 Var[x]
    sums, products           of independent operands                     pools       the mean; the variance as an upper bound
    functions                of a normal value (moments.py)              movements   the channels where they go

Inputs of a layer are taken as independent and padding is ignored, as in Nagel et al., Data-Free Quantization (2019), section 4.2 and
appendix C. What has no rule is unknown, with the reason; one rule per interface.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from qgraph.commute import moved
from qgraph.errors import QGraphError
from qgraph.lockstep import original, simulated
from qgraph.moments import MOMENTS, Moments, constant, joined, normal, only_bounds, product_of, sum_of
from qgraph.text import path_of, target_name
from qgraph.types import attribute, type_of
from qgraph.views import (
    Activation,
    Attention,
    BatchNorm,
    Cast,
    Concat,
    Conv,
    DataMovement,
    Elementwise,
    Embedding,
    Linear,
    Norm,
    Pad,
    Pool,
    Reduce,
    Softmax,
    const_value,
    view,
)
from qgraph.watch import Watch
from qgraph.weights import Weight

LAYERS = 3
"""How many layers in a row statistics are carried through: each takes its inputs as independent, and the error multiplies."""

Found = Moments | tuple[Moments, ...] | str
"""What is known of a value, with several parts where a node has several outputs, or why nothing is."""


class Unknown(Exception):
    """Carries the reason out of a rule."""


def propagate(gm: GraphModule, inputs: Moments | None = None, *, sigmas: float = 6.0) -> dict[Node, Found]:
    """Of every value of this graph (bodies are graphs of their own); `inputs` are those of its float inputs.

    Where a value is made, its range is taken to reach `sigmas` deviations from the mean; functions move the range along."""
    walk = Walk(inputs, sigmas)
    for node in gm.graph.nodes:
        if node.op not in ("output", "get_attr"):
            walk.found[node] = walk.visit(node)
    return walk.found


def is_source(node: Node) -> bool:
    """Something is known of the node's value without looking at its inputs."""
    return MOMENTS in node.meta or any(view(interface, node) is not None for interface in (BatchNorm, Norm, Embedding))


class Walk:
    """The walk over a graph in order. Rules read operands by `known` and `any`, which raise Unknown."""

    def __init__(self, inputs: Moments | None, sigmas: float) -> None:
        self.inputs, self.sigmas = inputs, sigmas
        self.found: dict[Node, Found] = {}
        self.depth: dict[Node, int] = {}

    def visit(self, node: Node) -> Found:
        try:
            found = self.rule(node)
        except Unknown as unknown:
            return self.bounds(node) or str(unknown)
        if isinstance(found, tuple):
            return found
        if (v := view(Activation, node)) is not None:
            found = found.bounded(v.low, v.high)
        rank = _rank(node)
        if rank is None or found.mean.ndim > rank:
            return f"the shape of {path_of(node)} is not known"
        return found.each(lambda t: t.reshape((1,) * (rank - t.ndim) + tuple(t.shape)))

    def rule(self, node: Node) -> Moments | tuple[Moments, ...]:
        if (kept := node.meta.get(MOMENTS) or _seen_by_norm(node)) is not None:
            return self.made(kept)
        self.depth[node] = depth = self.layers_behind(node)
        if depth > LAYERS:
            raise Unknown(f"{depth} layers lie between {path_of(node)} and the last batch norm or norm that tells something")
        if node.op == "placeholder":
            return self.input(node)
        if (x := _unchanged(node)) is not None:
            return self.any(x)
        for interface, fn in RULES:
            if (v := view(interface, node)) is not None:
                return fn(self, node, v)
        raise Unknown(f"nothing is known of what {target_name(node).rpartition('.')[2]} {path_of(node)} makes")

    def input(self, node: Node) -> Moments:
        kind = type_of(node)
        if self.inputs is None or kind is None or not kind.is_float:
            raise Unknown(f"nothing is known of the input {node.target}")
        return self.made(self.inputs)

    def layers_behind(self, node: Node) -> int:
        """Layers since something was known for sure."""
        if is_source(node):
            return 0
        is_layer = view(Linear, node) is not None or view(Conv, node) is not None
        return is_layer + max((self.depth.get(x, 0) for x in node.all_input_nodes), default=0)

    def made(self, found: Moments) -> Moments:
        return found.within(self.sigmas)

    def any(self, x: Any) -> Moments:
        """Of an operand, also where nothing but its bounds is known."""
        if isinstance(x, int | float):
            return constant(torch.tensor(float(x)))
        if (value := _stored(x)) is not None:
            return constant(value)
        found = self.found.get(x, f"%{x} is no value")
        if isinstance(found, Moments):
            return found
        raise Unknown(found if isinstance(found, str) else f"{path_of(x)} has several outputs")

    def known(self, x: Any) -> Moments:
        found = self.any(x)
        if not found.known:
            raise Unknown(f"nothing but bounds is known of {path_of(x)}")
        return found

    def bounds(self, node: Node) -> Moments | None:
        """Where nothing else is known: functions that keep their results between two numbers."""
        v, rank = view(Activation, node), _rank(node)
        softmax = view(Softmax, node)
        low, high = (0.0, 1.0) if softmax is not None and not softmax.log else (None, None) if v is None else (v.low, v.high)
        if low is None or high is None or rank is None:
            return None
        return only_bounds(low, high).each(lambda t: t.reshape((1,) * rank))


def linear(walk: Walk, node: Node, v: Linear) -> Moments:
    weight = _stored(v.weight)
    if weight is None:
        return _product(walk, node, v)
    w = weight.double().movedim((v.in_axis, v.out_axis), (-2, -1)) if weight.ndim > 1 else weight.double()
    x = _along(walk.known(v.x), v.x_axis, int(weight.shape[v.in_axis]))
    shift = 0.0 if v.bias is None else v.beta * walk.known(v.bias).mean
    return walk.made(normal(v.alpha * (x.mean @ w) + shift, abs(v.alpha) * (x.std.square() @ w.square()).sqrt()))


def _along(x: Moments, axis: int, size: int) -> Moments:
    """With this axis as the last one, in full size."""
    return x.each(lambda t: t.movedim(axis, -1).expand(*(t.movedim(axis, -1).shape[:-1]), size))


def _product(walk: Walk, node: Node, v: Linear) -> Moments:
    """Of two activations; behind a softmax an average over rows of the other one."""
    if v.bias is not None:
        raise Unknown(f"product {path_of(node)} adds another activation")
    if view(Softmax, _origin(v.x)) is not None:
        return walk.any(v.weight).each(lambda t: t.movedim((v.in_axis, v.out_axis), (-2, -1))).pooled([-2])
    kinds = [(type_of(v.x), v.x_axis), (type_of(v.weight), v.in_axis)]
    size = next((n for k, axis in kinds if k is not None and k.shape is not None and isinstance(n := k.shape[axis], int)), None)
    if size is None:
        raise Unknown(f"how many products {path_of(node)} sums is not known")
    x = _along(walk.known(v.x), v.x_axis, size)
    w = _along(walk.known(v.weight).each(lambda t: t.movedim((v.in_axis, v.out_axis), (-1, -2))), -1, size).each(lambda t: t.mT)
    variance = x.std.square() @ w.std.square() + x.std.square() @ w.mean.square() + x.mean.square() @ w.std.square()
    return walk.made(normal(v.alpha * (x.mean @ w.mean), abs(v.alpha) * variance.sqrt()))


def conv(walk: Walk, node: Node, v: Conv) -> Moments:
    weight = _stored(v.weight)
    if weight is None or v.transposed:
        raise Unknown(f"{path_of(node)} has {'outputs that read different numbers of inputs' if v.transposed else 'no constant weight'}")
    x = channels(walk.known(v.x), 1 - weight.ndim)
    mean, variance = Weight(v, weight).response(x.mean), Weight(v, weight.double().square()).response(x.std.square())
    shift = 0.0 if v.bias is None else walk.known(v.bias).mean.flatten()
    return walk.made(normal(*((t.reshape(-1, *[1] * (weight.ndim - 2))) for t in (mean + shift, variance.sqrt()))))


def channels(x: Moments, axis: int) -> Moments:
    """One element per index of the axis, or one for all: [n]."""
    return x.pooled([a for a in range(-x.mean.ndim, 0) if a != axis]).each(torch.flatten)


def norm(walk: Walk, node: Node, v: Norm | BatchNorm) -> Moments:
    rank = _rank(node) or 2
    bias, weight = (default if c is None else walk.known(c).mean for c, default in ((v.bias, torch.zeros(1)), (v.weight, torch.ones(1))))
    if isinstance(v, BatchNorm) or v.kind not in ("layer", "rms"):
        bias, weight = (c.reshape(-1, *[1] * (rank - 2)) for c in (bias, weight))
    return walk.made(normal(bias, weight.abs()))


def _seen_by_norm(node: Node) -> Moments | None:
    """What a batch norm that reads the value has seen of it."""
    norm = next((v for user in node.users if (v := view(BatchNorm, user)) is not None and v.x is node), None)
    mean, variance = (None, None) if norm is None else (const_value(norm.mean), const_value(norm.var))
    rank = _rank(node)
    if mean is None or variance is None or rank is None:
        return None
    return normal(*(t.double().reshape(-1, *[1] * (rank - 2)) for t in (mean, variance.sqrt())))


def elementwise(walk: Walk, node: Node, v: Elementwise) -> Moments:
    if v.kind not in ("add", "sub", "mul", "div") or (v.kind in ("sub", "div") and len(v.inputs) != 2):
        raise Unknown(f"{v.kind} {path_of(node)} has no rule")
    if v.kind == "div":
        if (divisor := walk.known(v.inputs[1])).std.any():
            raise Unknown(f"{path_of(node)} divides by what varies")
        return walk.known(v.inputs[0]).times(1 / divisor.mean)
    if len({x for x in v.inputs if isinstance(x, Node)}) < sum(isinstance(x, Node) for x in v.inputs):
        return _with_itself(walk, node, v)
    parts = [walk.known(x) for x in v.inputs]
    if v.kind == "sub":
        parts[1] = parts[1].times(torch.tensor(-1.0))
    found = reduce(product_of if v.kind == "mul" else sum_of, parts)
    return walk.made(found) if sum(bool(p.std.any()) for p in parts) > 1 else found  # one that varies keeps its reach


def _with_itself(walk: Walk, node: Node, v: Elementwise) -> Moments:
    """x + x and x * x: nothing is independent of itself."""
    x = walk.known(v.inputs[0])
    found = x.times(torch.tensor(2.0)) if v.kind == "add" else x.through(torch.square) if v.kind == "mul" else None
    if found is None or len(v.inputs) != 2:
        raise Unknown(f"{v.kind} {path_of(node)} reads one value several times")
    return found


def activation(walk: Walk, node: Node, v: Activation) -> Moments:
    x = walk.known(v.x)
    if v.kind in ("relu", "clip"):
        return x.clipped(-math.inf if v.low is None else v.low, math.inf if v.high is None else v.high)

    def call(points: Tensor) -> Tensor:
        values = {n: const_value(n) for n in node.all_input_nodes} | {v.x: points.flatten(0, 1) if points.ndim > 1 else points}
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        found: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return found.reshape(points.shape)

    try:
        found = x.through(call)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, QGraphError) as error:
        raise Unknown(f"{v.kind} {path_of(node)} does not run on numbers: {next(iter(str(error).splitlines()), '')}") from error
    if found is None:
        raise Unknown(f"{v.kind} {path_of(node)} is not finite over the range of what it reads")
    return found


def pool(walk: Walk, node: Node, v: Pool) -> Moments:
    x = walk.any(v.x)
    found = x.pooled(range(2 - x.mean.ndim, 0))
    return found.each(lambda t: t.flatten(1)) if _rank(node) == 2 else found


def reduction(walk: Walk, node: Node, v: Reduce) -> Moments:
    if v.kind not in ("mean", "max"):
        raise Unknown(f"{v.kind} {path_of(node)} has no rule")
    return walk.any(v.x).pooled(v.axes)


def pad(walk: Walk, node: Node, v: Pad) -> Moments:
    x = walk.any(v.x)
    return Moments(x.mean, x.std, x.low.clamp(max=v.value), x.high.clamp(min=v.value))


def cast(walk: Walk, node: Node, v: Cast) -> Moments:
    return walk.any(v.x)


def concat(walk: Walk, node: Node, v: Concat) -> Moments:
    parts, kinds = [walk.any(x) for x in v.inputs], [type_of(x) for x in v.inputs]
    sizes = [k.shape[v.axis] if k is not None and k.shape is not None else None for k in kinds]
    if not all(isinstance(n, int) for n in sizes):
        raise Unknown(f"the sizes of what {path_of(node)} joins are not known")
    whole = list(torch.broadcast_shapes(*(p.mean.select(v.axis, 0).shape for p in parts)))
    at = v.axis % parts[0].mean.ndim
    shapes = [[*whole[:at], int(n), *whole[at:]] for n in sizes if isinstance(n, int)]
    expanded = [p.each(lambda t, s=s: t.expand(s)) for p, s in zip(parts, shapes, strict=True)]  # type: ignore[misc]
    return Moments(*(torch.cat([getattr(p, name) for p in expanded], at) for name in ("mean", "std", "low", "high")))


def attention(walk: Walk, node: Node, v: Attention) -> Moments:
    """Averages over rows of the values."""
    return walk.any(v.v).pooled([-2])


def embedding(walk: Walk, node: Node, v: Embedding) -> Moments:
    """Rows are taken as equally frequent."""
    table = _stored(v.weight)
    if table is None or not table.is_floating_point():
        raise Unknown(f"{path_of(node)} reads no stored table")
    variance, mean = torch.var_mean(table.float(), 0, correction=0)
    return joined(mean, variance.sqrt(), table.amin(0), table.amax(0))


def softmax(walk: Walk, node: Node, v: Softmax) -> Moments:
    raise Unknown(f"the mean of softmax {path_of(node)} is not known")


def movement(walk: Walk, node: Node, v: DataMovement) -> Moments | tuple[Moments, ...]:
    source = walk.found.get(v.x)
    if v.kind == "getitem" and isinstance(source, tuple):
        return source[int(node.args[1])]  # type: ignore[arg-type]
    x = walk.any(v.x)
    places = moved(node, v, torch.arange(x.mean.numel()).reshape(x.mean.shape))
    if places is None:
        raise Unknown(f"where {v.kind} {path_of(node)} moves channels is not known")
    if isinstance(places, tuple):
        return tuple(x.each(lambda t, p=p: t.flatten()[p]) for p in places)  # type: ignore[misc]
    return x.each(lambda t: t.flatten()[places])


def _unchanged(node: Node) -> Node | None:
    """x of what only looks at x, or rounds it."""
    if node.op == "call_module":
        return node.all_input_nodes[0] if isinstance(attribute(node), Watch) else None
    return simulated(node)


def _origin(node: Node) -> Node:
    while (x := _unchanged(node)) is not None or (x := getattr(view(Cast, node), "x", None)) is not None:
        node = x
    return node


def _stored(node: Node) -> Tensor | None:
    """A constant, also behind its fake quantization, as it was before any stage: moments are those of the float model."""
    source = _origin(node)
    return None if const_value(source) is None else original(source)


def _rank(node: Node) -> int | None:
    kind = type_of(node)
    return None if kind is None else kind.rank


Rule = Callable[..., Moments | tuple[Moments, ...]]
RULES: tuple[tuple[type, Rule], ...] = (
    (Linear, linear),
    (Conv, conv),
    (Norm, norm),
    (BatchNorm, norm),
    (Elementwise, elementwise),
    (Activation, activation),
    (Pool, pool),
    (Reduce, reduction),
    (Pad, pad),
    (Cast, cast),
    (Concat, concat),
    (Attention, attention),
    (Embedding, embedding),
    (Softmax, softmax),
    (DataMovement, movement),
)
"""(interface, rule(walk, node, view)); the first interface that a node has counts."""
