"""Arithmetic on constants and products read as formulas, in either dialect: factor * a^p * b^q, x + c.

So it does not matter to a reader where a chain is divided, in which order it multiplies, and whether x^3 is a power or two products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from qgraph.types import type_of
from qgraph.views import Activation, Elementwise, const_value, is_const, view

LIMIT = 16
"""Calls that are multiplied out at most: a longer product is no part of a known chain."""

_POWER = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}


@dataclass
class Product:
    """factor * node ** power * ...; `nodes` are the calls that were multiplied out, the last one first."""

    factor: float = 1.0
    powers: dict[Node, float] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)


def product(node: Node, *stop: Node) -> Product | None:
    """`node` multiplied out, down to the nodes in `stop`; None where something cancels (x / x is not 1 everywhere) or divides by 0."""
    found = Product()
    return found if _multiply(found, node, 1.0, stop) else None


def _multiply(found: Product, value: Node | float, power: float, stop: tuple[Node, ...]) -> bool:
    constant = number(value)
    if constant is not None:
        if constant <= 0 and (constant == 0 or power != int(power)):
            return False
        found.factor *= constant**power
        return True
    assert isinstance(value, Node)
    # (a b)^p is a^p b^p for whole p only, so that what is under a root is not looked into
    parts = None if value in stop or len(found.nodes) == LIMIT or power != int(power) else _parts(value)
    if parts is None:
        before = found.powers.get(value, 0.0)
        found.powers[value] = before + power
        return before * power >= 0
    found.nodes.append(value)
    return all(_multiply(found, part, power * p, stop) for part, p in parts)


def _parts(node: Node) -> list[tuple[Node | float, float]] | None:
    """The operands of a product with the powers that they have in it; None for another call."""
    act, op = view(Activation, node), view(Elementwise, node)
    if act is not None and act.kind in _POWER:
        return [(act.x, _POWER[act.kind])]
    if op is None or len(op.inputs) != 2:
        return None
    a, b = op.inputs
    if op.kind in ("mul", "div"):
        return [(a, 1.0), (b, 1.0 if op.kind == "mul" else -1.0)]
    exponent = number(b) if op.kind == "pow" else None
    return [(a, exponent)] if exponent in (-1.0, -0.5, 0.5, 2.0, 3.0) else None


def number(value: Any) -> float | None:
    """A Python number, or the one element of a real constant."""
    if isinstance(value, int | float):
        return float(value)
    const = const_value(value)
    return None if const is None or const.numel() != 1 or const.is_complex() else float(const)


def shifted(node: Node) -> tuple[Node, float] | None:
    """(x, c) of x + c, c + x and x - c with a constant number c; None for other nodes."""
    op = view(Elementwise, node)
    if op is None or op.kind not in ("add", "sub") or len(op.inputs) != 2:
        return None
    for x, by in (op.inputs, op.inputs[::-1]) if op.kind == "add" else (op.inputs,):
        value = number(by)
        if isinstance(x, Node) and value is not None and not is_const(x):
            return x, value if op.kind == "add" else -value
    return None


def scalings(node: Node) -> Iterator[tuple[Node, float, tuple[Node, ...]]]:
    """Every (x, f, nodes) such that the node is f * x with a constant number f; the node itself first. `nodes` in order."""
    factor, nodes = 1.0, tuple[Node, ...]()
    yield node, factor, nodes
    while (found := _scaling(node)) is not None:
        nodes, factor, node = (node, *nodes), factor * found[1], found[0]
        yield node, factor, nodes


def unscaled(node: Node) -> tuple[Node, float, tuple[Node, ...]]:
    """The last of `scalings`: x without any constant factor."""
    return list(scalings(node))[-1]


def _scaling(node: Node) -> tuple[Node, float] | None:
    """(x, f) of x * f, f * x and x / (1 / f), where the constant changes neither type nor number of axes of x."""
    op = view(Elementwise, node)
    if op is None or op.kind not in ("mul", "div") or len(op.inputs) != 2:
        return None
    for x, by in (op.inputs, op.inputs[::-1]) if op.kind == "mul" else (op.inputs,):
        value = number(by)
        if isinstance(x, Node) and not is_const(x) and value and kind_of(x) == kind_of(node):
            return x, value if op.kind == "mul" else 1 / value
    return None


def kind_of(node: Node) -> tuple[str | None, int | None]:
    """(element type, number of axes), as far as they are known."""
    found = type_of(node)
    return (None, None) if found is None else (found.dtype, found.rank)


def is_close(found: float, expected: float, node: Node) -> bool:
    """Equal in five digits, or up to the rounding of a constant in the node's type."""
    dtype = getattr(torch, kind_of(node)[0] or "", None)
    eps = torch.finfo(dtype).eps if isinstance(dtype, torch.dtype) and dtype.is_floating_point else 0.0
    return math.isclose(found, expected, rel_tol=max(1e-5, 2 * eps))
