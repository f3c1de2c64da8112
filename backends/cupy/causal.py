"""That a mask is causal, behind what pads a row on the left, is not read off its formula: it is computed for a few lengths and compared."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qgraph.errors import LoweringError
from qgraph.feeds import Input
from qgraph.generation import named_feeds
from qgraph.text import where
from qgraph.tokens import Roles

PADDED = 2
"""Tokens that pad the second row, where the mask is tried."""

HIDDEN = -1e4
"""What a mask of numbers adds at most where nothing is to be seen."""


def check_causal(gm: GraphModule, mask: Node | None, attention: Node, known: Roles, capacity: int) -> None:
    """Raises LoweringError where the mask does not show each token those up to its own, those that pad a row left out. It is tried with
    the first tokens and with the last ones that a cache of `capacity` can hold, so that a window that slides is found."""
    if mask is None:
        raise LoweringError(f"{where(attention)} has no mask, so that with a cache each token would see those behind it")
    for new, past in ((1, capacity - 1), (2, capacity - 2), (3, min(5, capacity - 3)), (4, 0)):
        starts = torch.tensor([0, PADDED if known.masks else 0])
        place = torch.arange(past + new)
        at = place[past:, None]
        wanted = (place <= at) & (place >= starts[:, None, None])
        found = _value(gm, mask, _feeds(known, new, past, place >= starts[:, None]))
        seen, hidden = (found, ~found) if found.dtype == torch.bool else (found == 0, found <= HIDDEN)
        real = (at >= starts[:, None, None])[:, None]
        wrong = ((seen != wanted[:, None]) | (seen == hidden)) & real
        if bool(wrong.any()):
            b, _, i, j = (int(n) for n in wrong.nonzero()[0])
            raise LoweringError(
                f"the mask of {where(attention)} is not causal, and the kernels know no other: of {new} tokens behind {past}, token {i} should "
                f"{'see' if wanted[b, i, j] else 'not see'} place {j}"
            )


def _feeds(known: Roles, new: int, past: int, admitted: Tensor) -> dict[str, Tensor]:
    """Two rows of `new` tokens behind `past`, of which the mask admits some."""
    named = named_feeds(known, np.zeros((2, new), np.int64), admitted.long().numpy())
    inputs = (known.ids, *known.masks, *known.positions)
    return {i.placeholder: torch.from_numpy(named[i.name]) for i in inputs} | {i.placeholder: stand_in(i, 2, past) for i in known.cache}


def stand_in(past: Input, batch: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """For an input [batch, heads, past, head_dim] of which only the sizes are read: a tensor with the memory of one element."""
    if past.type is None or past.type.shape is None or len(past.type.shape) != 4:
        raise LoweringError(f"input {past.name!r} is {past.type or 'of unknown type'}, not a cache [batch, heads, past, head_dim]")
    _, heads, _, head_dim = past.type.shape
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        raise LoweringError(f"input {past.name!r} is {past.type}: its heads and their size must be known")
    real = getattr(torch, past.type.dtype or "float32")
    return torch.zeros(1, dtype=real, device=device).expand(batch, heads, length, head_dim)


def _value(gm: GraphModule, node: Node, feeds: Mapping[str, Tensor]) -> Tensor:
    """What `node` is for these inputs, from what it depends on alone."""
    needed, work = {node}, [node]
    while work:
        more = [n for n in work.pop().all_input_nodes if n not in needed]
        needed.update(more)
        work += more
    graph, copies = Graph(), dict[Node, Node]()
    for n in gm.graph.nodes:
        if n in needed:
            copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output(copies[node])
    inputs = [feeds[str(n.target)] for n in graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        found: Tensor = GraphModule(gm, graph)(*inputs)
    return found
