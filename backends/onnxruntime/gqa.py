"""Grouped queries and a cache (see qgraph.attention), of which Attention reads the heads of k and v once and returns the present.

Of ONNX Runtime's two operators for this, Attention of opset 23 takes any mask, so that nothing has to be proven about it, and is the faster
one unless past and present share their memory (microseconds per layer, 9 heads of 64 for 3 of k and v, 2 threads; chain, Attention,
GroupQueryAttention; one token behind 64: 39, 23, 26; behind 512: 129, 82, 98; prefill of 128: 547, 329, 437; with shared memory 15 and 68).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from qgraph.attention import ungrouped
from qgraph.edit import graph_modules, replace
from qgraph.onnx_node import arg
from qgraph.views import Concat, DataMovement, key, view

SPLIT = (0, 2, 1, 3)
"""[batch, length, heads, size] <-> [batch, heads, length, size]"""

PRESENT = {1: 4, 2: 5}
"""Attention reads q, k, v, mask, past k, past v, and returns y, k, v: an output joins the input of its own number to this one."""


@dataclass(frozen=True)
class Heads:
    """k or v: `new` [batch, length, heads, size], behind `past` [batch, heads, past length, size] in `present`, which joins them
    (None, None: there is no cache). `times` heads of q read each of them."""

    new: Node
    past: Node | None
    present: Node | None
    times: int


def heads_of(node: Node, perm: tuple[int, ...] | None = None) -> Heads | None:
    """k or v as an attention reads it; `perm`: the order in which the chain reads the axes of `node`, as in `attention.Found`."""
    if perm is not None:
        return Heads(node, None, None, 1) if perm == SPLIT else None
    whole, times, reader = ungrouped(node)
    joined = view(Concat, whole)
    if joined is None or len(joined.inputs) != 2 or joined.axis not in (-2, 2):
        new = before_split(whole)
        return None if new is None else Heads(new, None, None, times)
    new = before_split(joined.inputs[1])
    others = [user for user in whole.users if user.op != "output"]
    if new is None or len(others) != 1 or (reader is not None and others != [reader]):
        return None
    return Heads(new, joined.inputs[0], whole, times)


def before_split(node: Node) -> Node | None:
    """The value [batch, length, heads, size] that `node` transposes."""
    moved = view(DataMovement, node)
    return moved.x if moved is not None and moved.kind == "transpose" and moved.perm == SPLIT else None


def return_presents(gm: GraphModule) -> int:
    """Concat(past, new) -> the present of the Attention that reads both; how many there were."""
    count = 0
    for part in graph_modules(gm):
        for node in [n for n in part.graph.nodes if key(n.target) == "::Attention"]:
            for i, past in PRESENT.items():
                joined = _join(arg(node, i), arg(node, past))
                if joined is not None:
                    with part.graph.inserting_after(node):
                        replace(joined, part.graph.call_function(operator.getitem, (node, i)))
                    count += 1
        part.recompile()
    return count


def _join(new: Node, past: Any) -> Node | None:
    """The Concat that `new` [batch, length, heads * size] and `past` go into, for the outputs of the graph alone."""
    for user in past.users if isinstance(past, Node) else ():
        found = view(Concat, user)
        if found is None or found.inputs[0] is not past or len(found.inputs) != 2 or found.axis not in (-2, 2):
            continue
        split = before_split(found.inputs[1])
        moved = None if split is None else view(DataMovement, split)
        if moved is not None and moved.x is new and all(reader.op == "output" for reader in user.users):
            return user
    return None
