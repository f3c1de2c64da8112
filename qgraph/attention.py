"""Attention in either dialect, as one op or as a chain: matmul(softmax(scale * matmul(q, transpose(k)) + mask), v).

Between k, v and attention decoders have grouped queries and a cache:

    Reshape(Expand(Unsqueeze(k)))  -> k, each head of which is read by several heads of q
    Concat(past, k)                -> the present, which is an output of the graph as well"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qgraph.formula import kind_of, number, unscaled
from qgraph.types import Dim, type_of
from qgraph.views import Attention, Concat, DataMovement, Elementwise, Linear, Softmax, key, view

_IS_NAN = ("::IsNaN", torch.ops.aten.isnan.default)


@dataclass(frozen=True)
class Found:
    """softmax(scale * q k^T + mask) v with q [B, H, L, D], k [B, H, S, D], v [B, H, S, E], all of one float type.

    k has these axes in the order `k_perm` of its own (None: as they are), since exporters join the transposition of the product with
    the one that splits the heads. `mask` is added, of q's element type, and broadcasts to [B, H, L, S]. `scale` is the product of all
    constant factors on q, on k and on the product, 1 / sqrt(D) being one of them. `nodes` is the chain in order, from the first node behind
    q or k to the last product; no other node reads a value of it, but for those on the way from k and q to the first product."""

    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float
    nodes: tuple[Node, ...]
    k_perm: tuple[int, ...] | None = None


def find_attention(node: Node) -> Found | None:
    """The attention whose last product is `node`; None where it is not one, or not with four axes each and single use inside.

    A mask in another form than a sum (where, masked_fill) is none of this: rows that it blocks wholly come out otherwise."""
    last = _product(node)
    soft, cleared = (None, ()) if last is None else _uncleared(last.x)
    weights = view(Softmax, soft)
    if last is None or soft is None or weights is None or weights.log or weights.axis not in (-1, 3):
        return None
    scores, mask, inner = _unmask(weights.x)
    scores, scale, outer = unscaled(scores)
    first = _product(scores)
    between = (scores, *outer, *inner)
    if first is None or any(len(n.users) != 1 for n in (*between, last.x)):
        return None
    q, of_q, on_q = unscaled(first.x)
    k, of_k, perm, on_k = _keys(first.weight)
    if _floats(q, k, last.weight) is None or (mask is not None and kind_of(mask)[0] != kind_of(q)[0]):
        return None
    nodes = (*on_q, *on_k, *between, soft, *cleared, node)
    return Found(q, k, last.weight, mask, scale * of_q * of_k, nodes, None if perm == (0, 1, 2, 3) else perm)


def _uncleared(node: Node) -> tuple[Node, tuple[Node, ...]]:
    """(p, nodes) of where(isnan(p), 0, p), which makes zeros of rows that the mask blocks wholly; else (node, ())."""
    op = view(Elementwise, node)
    test, zero, p = op.inputs if op is not None and op.kind == "where" and len(op.inputs) == 3 else (None, None, None)
    if not isinstance(test, Node) or not isinstance(p, Node) or number(zero) != 0 or key(test.target) not in _IS_NAN:
        return node, ()
    return (p, (test, node)) if test.args[0] is p and len(test.users) == 1 and set(p.users) == {test, node} else (node, ())


def _product(node: Any) -> Linear | None:
    """A product of two tensors of four axes, [.., L, D] times [.., D, S]."""
    found = view(Linear, node)
    if found is None or found.bias is not None or (found.x_axis, found.in_axis, found.alpha) != (-1, -2, 1.0):
        return None
    return found if all(kind_of(n)[1] == 4 for n in (found.x, found.weight, node)) else None


def _unmask(node: Node) -> tuple[Node, Node | None, tuple[Node, ...]]:
    """(scores, mask, nodes) of a sum of scores, which end in a product, with something that broadcasts to them."""
    found = view(Elementwise, node)
    if found is None or found.kind != "add" or len(found.inputs) != 2:
        return node, None, ()
    for scores, mask in (found.inputs, found.inputs[::-1]):
        if isinstance(scores, Node) and isinstance(mask, Node) and _product(unscaled(scores)[0]) and kind_of(scores) == kind_of(node):
            return scores, mask, (node,)
    return node, None, ()


def _keys(node: Node) -> tuple[Node, float, tuple[int, ...], tuple[Node, ...]]:
    """What is transposed and scaled into k^T: (source, factor, axes of the source in the order of k, nodes)."""
    perm: tuple[int, ...] = (0, 1, 3, 2)
    factor, nodes = 1.0, tuple[Node, ...]()
    while True:
        node, more, scaling = unscaled(node)
        factor, nodes = factor * more, (*scaling, *nodes)
        moved = view(DataMovement, node)
        if moved is None or moved.kind != "transpose" or moved.perm is None or perm == (0, 1, 2, 3):
            return node, factor, perm, nodes
        perm, nodes = tuple(moved.perm[axis] for axis in perm), (node, *nodes)
        node = moved.x


def _floats(*nodes: Node) -> tuple[str | None, int | None] | None:
    """The type that all of them have, if it is a float's."""
    kinds = {kind_of(n) for n in nodes}
    kind = kinds.pop()
    return kind if not kinds and kind[0] is not None and "float" in kind[0] else None


@dataclass(frozen=True)
class Rows:
    """Keys or values as an attention reads them: `new` [batch, heads, length, size] behind `past`, which `present` joins (None, None: there is
    no cache). `reader` reads `new` on the way, and `times` heads of q read each head."""

    new: Node
    reader: Node
    past: Node | None
    present: Node | None
    times: int


def attentions(graph: Graph) -> Iterator[tuple[Node, Attention, Found | None]]:
    """(its last node, what it computes, the chain, if it is one) of each; see `Found.k_perm` for the axes of k in a chain."""
    for node in graph.nodes:
        whole, chain = view(Attention, node), find_attention(node)
        if whole is not None:
            yield node, whole, None
        elif chain is not None:
            yield node, Attention(chain.q, chain.k, chain.v, chain.mask, chain.scale, False), chain


def rows_of(operand: Node, reader: Node) -> Rows:
    """What stands behind the k or v that `reader` reads."""
    whole, times, chain = ungrouped(operand)
    reader = chain or reader
    joined = view(Concat, whole)
    if joined is None or len(joined.inputs) != 2 or joined.axis not in (-2, 2):
        return Rows(whole, reader, None, None, times)
    return Rows(joined.inputs[1], whole, joined.inputs[0], whole, times)


def ungrouped(node: Node) -> tuple[Node, int, Node | None]:
    """(y, n, its reader) of y [B, H, L, D] -> [B, H, 1, L, D] -> [B, H, n, L, D] -> [B, H * n, L, D]; (node, 1, None) for anything else."""
    chain, value = [], node
    for kinds in (("reshape", "flatten"), ("expand",), ("unsqueeze", "reshape")):
        moved = view(DataMovement, value)
        if moved is None or moved.kind not in kinds or len(value.users) != 1:
            return node, 1, None
        chain.append(value)
        value = moved.x
    merged, expanded, single, start = (known_shape(n) for n in (*chain, value))
    if start is None or len(start) != 4 or single != (*start[:2], 1, *start[2:]) or expanded is None or merged is None:
        return node, 1, None
    heads, times = start[1], expanded[2] if len(expanded) == 5 else None
    if not isinstance(heads, int) or not isinstance(times, int) or expanded != (*start[:2], times, *start[2:]):
        return node, 1, None
    return (value, times, chain[-1]) if merged == (start[0], heads * times, *start[2:]) else (node, 1, None)


def known_shape(node: Node) -> tuple[Dim, ...] | None:
    """The shape of a value where each size, or its name, is known."""
    t = type_of(node)
    return None if t is None or t.shape is None or None in t.shape else t.shape
