"""Chains of small ops that mean one larger op, recognised in either dialect: gelu, SiLU, hard-swish, norms, softmax.

Every function looks at the last node of a chain. It returns None for what is another chain, and a sentence for one that is nearly it.
`nodes` of a result are the chain; nothing else reads a value inside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qgraph.formula import is_close, number, product, scalings, shifted, unscaled
from qgraph.text import path_of
from qgraph.types import type_of
from qgraph.views import Activation, Elementwise, Reduce, const_value, is_const, view

Nodes = tuple[Node, ...]


@dataclass(frozen=True)
class Pointwise:
    """kind "gelu", "gelu_tanh", "silu", "hard_swish" or "hard_sigmoid", as in `views.Activation`, of x."""

    kind: str
    x: Node
    nodes: Nodes


@dataclass(frozen=True)
class Normal:
    """kind "layer" or "rms" over the last axis of x, which has `size` elements; `weight` is a stored tensor of as many, or None."""

    kind: str
    x: Node
    weight: Node | None
    size: int
    eps: float
    nodes: Nodes


@dataclass(frozen=True)
class Exponential:
    """softmax of x over `axis`, counted from the end."""

    x: Node
    axis: int
    nodes: Nodes


def _read_outside(nodes: Nodes) -> str | None:
    """A sentence about a value inside the chain that something else reads too; None for a chain of its own."""
    for node in nodes[:-1]:
        reader = next((u for u in node.users if u not in nodes), None)
        if reader is not None:
            return f"{path_of(node)} inside the chain is also read by {path_of(reader)}"
    return None


# Activations


@dataclass(frozen=True)
class _Gate:
    """What x is multiplied with (the last of `nodes`), and the constant factor that makes the activation of it."""

    kind: str
    x: Node
    factor: float
    nodes: Nodes


_ALONE = {"hard_swish": "hard_sigmoid"}
"""What the gate of an activation is by itself, where that is one op too (and more than the one node that it consists of)."""


def pointwise(root: Node) -> Pointwise | str | None:
    """x times a gate of x, times a constant; or such a gate alone.

    x * (1 + erf(x / sqrt(2))) / 2                        gelu
    x * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2   gelu_tanh: Hendrycks and Gimpel, arXiv 1606.08415, section 2
    x * sigmoid(x)                                        silu
    x * clip(x + 3, 0, 6) / 6                             hard_swish: Howard et al., arXiv 1905.02244, section 5.2
    clip(x + 3, 0, 6) / 6                                 hard_sigmoid
    """
    found, reason = product(root), None
    factors = [] if found is None else [n for n, power in found.powers.items() if power == 1.0 and not is_const(n)]
    for gate in (g for n in factors for g in _gates(n)):
        whole = None if isinstance(gate, str) else product(root, gate.x, gate.nodes[-1])
        if isinstance(gate, str):
            reason = gate
        elif whole is not None and whole.powers in ({gate.x: 1.0, gate.nodes[-1]: 1.0}, {gate.nodes[-1]: 1.0}):
            kind = gate.kind if len(whole.powers) == 2 else _ALONE.get(gate.kind)
            if kind is not None and is_close(whole.factor, gate.factor, root):
                nodes = (*gate.nodes, *reversed(whole.nodes))
                return _read_outside(nodes) or Pointwise(kind, gate.x, nodes)
            if kind == gate.kind and not is_close(whole.factor, 1.0, root):  # or else the constant comes in the next product
                reason = f"the factor of {gate.kind} is {gate.factor:g}, this one is {whole.factor:g}"
    return reason


def _gates(node: Node) -> Iterator[_Gate | str]:
    """The node as a gate of each x that may be meant; a sentence for what is nearly a gate."""
    act, shift = view(Activation, node), shifted(node)
    if shift is not None:
        yield from _erf_or_tanh(node, *shift)
    elif act is None:
        return
    elif act.kind == "sigmoid":
        yield _Gate("silu", act.x, 1.0, (node,))
    elif act.kind == "hard_sigmoid" and _is_hard_sigmoid(node):
        yield _Gate("hard_swish", act.x, 1.0, (node,))
    elif act.kind == "clip":
        yield from _clipped(node, act)


def _is_hard_sigmoid(node: Node) -> bool:
    """clip(x / 6 + 1 / 2, 0, 1), the only one in torch; in ONNX both constants are attributes."""
    attributes: dict[str, Any] = dict(node.kwargs)
    slope = attributes.get("alpha", 0.2) if hasattr(node.target, "op_type") else 1 / 6
    return math.isclose(slope, 1 / 6, rel_tol=1e-4) and attributes.get("beta", 0.5) == 0.5


def _clipped(node: Node, act: Activation) -> Iterator[_Gate]:
    """clip(x * s / 6 + s / 2, 0, s)"""
    shift = shifted(act.x)
    if shift is None or act.low != 0.0 or not act.high or not is_close(shift[1] / act.high, 0.5, node):
        return
    for x, slope, nodes in scalings(shift[0]):
        if is_close(slope / act.high, 1 / 6, node):
            yield _Gate("hard_swish", x, 1 / act.high, (*nodes, act.x, node))


def _erf_or_tanh(node: Node, x: Node, by: float) -> Iterator[_Gate | str]:
    """by + by * erf(..), by + by * tanh(..)"""
    inner, scale, scaling = unscaled(x)
    act = view(Activation, inner)
    if act is None or act.kind not in ("erf", "tanh") or not is_close(scale, by, node):
        return
    seen = False
    for of, nodes in _erf_argument(act.x) if act.kind == "erf" else _tanh_argument(act.x):
        seen = True
        yield _Gate("gelu" if act.kind == "erf" else "gelu_tanh", of, 0.5 / scale, (*nodes, inner, *scaling, node))
    if act.kind == "erf" and not seen:
        yield f"gelu takes erf of x * {math.sqrt(0.5):g}, this one of x * {unscaled(act.x)[1]:g}"


def _erf_argument(u: Node) -> Iterator[tuple[Node, Nodes]]:
    """u = x / sqrt(2)"""
    return ((x, nodes) for x, factor, nodes in scalings(u) if is_close(factor, math.sqrt(0.5), u))


def _tanh_argument(u: Node) -> Iterator[tuple[Node, Nodes]]:
    """u = sqrt(2 / pi) * (x + 0.044715 x^3), or sqrt(2 / pi) * x * (1 + 0.044715 x^2)"""
    found = product(u)
    for total in [] if found is None else found.powers:
        op = view(Elementwise, total)
        if op is None or op.kind != "add" or len(op.inputs) != 2:
            continue
        for one, small in (op.inputs, op.inputs[::-1]):
            power = 2.0 if number(one) == 1.0 else 3.0
            for x in (one,) if power == 3.0 else found.powers if found is not None else ():
                if isinstance(x, Node) and isinstance(small, Node):
                    yield from _cubic(u, total, small, x, power)


def _cubic(u: Node, total: Node, small: Node, x: Node, power: float) -> Iterator[tuple[Node, Nodes]]:
    """u = sqrt(2 / pi) * total * x^(3 - power), and small = 0.044715 * x^power"""
    inner, outer = product(small, x), product(u, x, total)
    if inner is None or outer is None or inner.powers != {x: power} or not is_close(inner.factor, 0.044715, u):
        return
    if outer.powers == ({total: 1.0} if power == 3.0 else {total: 1.0, x: 1.0}) and is_close(outer.factor, math.sqrt(2 / math.pi), u):
        yield x, (*reversed(inner.nodes), total, *reversed(outer.nodes))


# Norms and softmax


def normal(root: Node) -> Normal | str | None:
    """(x - mean(x)) / sqrt(variance(x) + eps), or x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, arXiv 1910.07467, equation 4);
    with a stored weight among the factors, or without."""
    found = product(root)
    spreads = [] if found is None else [n for n, power in found.powers.items() if power == -0.5]
    for spread in spreads:
        shift = shifted(spread)
        measured = None if shift is None else _spread(shift[0])
        if shift is not None and measured is not None:
            return _normal(root, spread, shift[1], *measured)
    return None


def _spread(node: Node) -> tuple[Node, Reduce, Nodes] | None:
    """(v, reduction, nodes) of mean(v^2), where v may be centred, or of the variance of x, for which v is x - mean(x)."""
    reduced = view(Reduce, node)
    if reduced is None:
        return None
    if reduced.kind == "variance":
        v = next((n for n in reduced.x.users if (found := _centred(n)) is not None and found.x is reduced.x), None)
        return None if v is None else (v, reduced, (node,))
    op = view(Elementwise, reduced.x)
    v = op.inputs[0] if op is not None and isinstance(op.inputs[0], Node) else None
    squared = product(reduced.x, v) if v is not None else None
    if v is None or reduced.kind != "mean" or squared is None or squared.powers != {v: 2.0} or squared.factor != 1.0:
        return None
    return v, reduced, (*reversed(squared.nodes), node)


def _normal(root: Node, spread: Node, eps: float, v: Node, reduced: Reduce, nodes: Nodes) -> Normal | str | None:
    """v / sqrt(spread) among the factors of the root."""
    whole, mean = product(root, v, spread), _centred(v)
    if whole is None or any(_is_norm(n, v, spread) for n in root.all_input_nodes if n in whole.nodes):
        return None  # or it ends earlier
    weights = [n for n in whole.powers if is_const(n)]
    if len(weights) > 1 or whole.factor != 1.0 or whole.powers != {v: 1.0, spread: -0.5} | dict.fromkeys(weights, 1.0):
        return None
    kind, axes = type_of(root), {reduced.axes} | ({mean.axes} if mean is not None else set())
    size = kind.shape[-1] if kind is not None and kind.shape else None
    if axes != {(-1,)}:
        return f"the norm is over axes {', '.join(map(str, sorted(axes)))} and not the last one alone"
    if not isinstance(size, int):
        return "the size of the last axis is not known"
    weight = weights[0] if weights else None
    value = const_value(weight)
    if value is not None and tuple(value.shape) != (size,):
        return f"the weight {list(value.shape)} is not one value per element of the last axis, which has {size}"
    centring = (_operand(v, 1), v) if mean is not None else ()
    chain = (*centring, *nodes, spread, *reversed(whole.nodes))
    found = Normal("rms", v, weight, size, eps, chain) if mean is None else Normal("layer", mean.x, weight, size, eps, chain)
    return _read_outside(chain) or found


def _is_norm(node: Node, v: Node, spread: Node) -> bool:
    found = product(node, v, spread)
    return found is not None and {v, spread} <= found.powers.keys()


def _centred(node: Node) -> Reduce | None:
    """The mean, over some axes, that is subtracted from its own operand."""
    op = view(Elementwise, node)
    mean = view(Reduce, op.inputs[1]) if op is not None and op.kind == "sub" and len(op.inputs) == 2 else None
    return mean if op is not None and mean is not None and mean.kind == "mean" and mean.x is op.inputs[0] else None


def _operand(node: Node, i: int) -> Node:
    """Operand i of an arithmetic node, which is a node."""
    op = view(Elementwise, node)
    assert op is not None and isinstance(op.inputs[i], Node)
    return op.inputs[i]  # type: ignore[return-value]


def exponential(root: Node) -> Exponential | str | None:
    """exp(x - max(x)) / sum(exp(x - max(x))). Without the maximum it would not be exact: the chain overflows where softmax does not."""
    op = view(Elementwise, root)
    total = view(Reduce, op.inputs[1]) if op is not None and op.kind == "div" and len(op.inputs) == 2 else None
    if op is None or total is None or total.kind != "sum" or total.x is not op.inputs[0] or len(total.axes) != 1:
        return None
    act = view(Activation, total.x)
    if act is None or act.kind != "exp" or not isinstance(op.inputs[1], Node):
        return None
    centred = view(Elementwise, act.x)
    largest = view(Reduce, centred.inputs[1]) if centred is not None and centred.kind == "sub" and len(centred.inputs) == 2 else None
    if centred is None or largest is None or largest.kind != "max" or largest.x is not centred.inputs[0]:
        return "the chain does not subtract the maximum: it overflows where softmax does not"
    if largest.axes != total.axes or not isinstance(centred.inputs[1], Node):
        return f"the maximum is over axes {largest.axes}, the sum over {total.axes}"
    chain = (centred.inputs[1], act.x, total.x, op.inputs[1], root)
    return _read_outside(chain) or Exponential(largest.x, total.axes[0], chain)
