"""collect(gm, {node: fn}, data): what stages learn about values of a graph, streamed batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.edit import Prologue
from qgraph.errors import QGraphError
from qgraph.observe import paused
from qgraph.sweep import replayable, sweep
from qgraph.watch import Listener

_TARGET = "qgraph_listener"


def collect(
    gm: GraphModule,
    wanted: Mapping[Node, Callable[[Tensor], object]],
    data: Iterable[Any] | None,
    *,
    label: str = "collecting",
    progress: bool | None = None,
) -> int:
    """Runs every batch of `data` through `gm` and calls `wanted[node]` with each batch's value of that node; returns how many batches.

    Nodes may lie in nested bodies. The graph is as before when this returns or raises. Nothing is kept but what the functions
    keep. Raises CalibrationError when there is no data, when it cannot be gone through again, or when the model does not run."""
    data = replayable(data, label)
    with paused(gm):
        listening = [_listen(node, fn, i) for i, (node, fn) in enumerate(wanted.items())]
        bodies = {part for node in wanted if isinstance(part := node.graph.owning_module, GraphModule) and part is not gm}
        _recompile(bodies)
        try:
            return sweep(gm, data, label=label, progress=progress).batches
        finally:
            for node in listening:
                _silence(node)
            _recompile(bodies)


def _recompile(bodies: Iterable[GraphModule]) -> None:
    """Bodies run as compiled code; the graph itself is interpreted."""
    for body in bodies:
        body.recompile()


def _listen(value: Node, fn: Callable[[Tensor], object], number: int) -> Node:
    part = value.graph.owning_module
    if not isinstance(part, GraphModule):
        raise QGraphError(f"%{value.name} belongs to no graph module")
    target = f"{_TARGET}_{number}"
    part.add_submodule(target, Listener(fn))
    with part.graph.inserting_before(Prologue(part).after(value)):
        node = part.graph.call_module(target, (value,))
    node.meta.update({k: value.meta[k] for k in ("val", "type") if k in value.meta})
    return node


def _silence(node: Node) -> None:
    part, target = node.graph.owning_module, str(node.target)
    node.graph.erase_node(node)
    if part is not None:
        part.delete_submodule(target)
