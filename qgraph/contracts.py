"""Translation validation: contracts, and the first value at which two graphs that should agree do not."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from qgraph.edit import nested
from qgraph.errors import VerificationError
from qgraph.text import describe, where
from qgraph.types import attribute

Samples = Sequence[tuple[Any, ...]]
Outputs = list[list[Any]]
"""Per sample, the leaves of what the graph returns."""


@dataclass(frozen=True)
class Contract:
    """What a pass promises about the graph's values. `tol` is None for no promise."""

    name: str
    tol: float | None

    def __str__(self) -> str:
        return self.name if not self.tol else f"{self.name}({self.tol:g})"


EXACT = Contract("EXACT", 0.0)
"""The same bits."""

LOSSY = Contract("LOSSY", None)
"""Changes the numbers on purpose."""


def EQUIVALENT(tol: float) -> Contract:
    """The same real numbers, rounded differently: no element differs by more than tol times the largest magnitude in its tensor
    (at least 1e-3, so that rounding noise around zero is no difference). Raises ValueError unless 0 < tol < 1."""
    if not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, got {tol}")
    return Contract("EQUIVALENT", tol)


@dataclass(frozen=True)
class Difference:
    """The element that differs most beyond what is allowed; `what` says instead that dtype or shape differ."""

    what: str

    def __str__(self) -> str:
        return self.what


def difference(before: Any, after: Any, tol: float) -> Difference | None:
    """None when `after` is within `tol` of `before`, as EQUIVALENT defines it; NaN equals NaN, infinities equal themselves."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None if type(before) is type(after) and before == after else Difference(f"before {before!r}, after {after!r}")
    if before.dtype != after.dtype or before.shape != after.shape:
        return Difference(f"before {before.dtype}{list(before.shape)}, after {after.dtype}{list(after.shape)}")
    a, b = before.detach().double(), after.detach().double()
    alike = (a == b) | (a.isnan() & b.isnan())
    if bool(alike.all()):
        return None
    error = torch.where(alike, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
    allowed = tol * max(float(a[a.isfinite()].abs().amax()) if bool(a.isfinite().any()) else 0.0, 1e-3)
    at = int(error.argmax())
    if float(error.flatten()[at]) <= allowed:
        return None
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), error.shape)]
    was, now = before.flatten()[at].item(), after.flatten()[at].item()
    return Difference(f"worst element {index}: before {was!r}, after {now!r}, allowed {allowed:.3g}")


def snapshot(gm: GraphModule) -> GraphModule:
    """A copy of the graph and its bodies that shares all tensors."""
    root: dict[str, Any] = {}
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            body = nested(node)
            root[str(node.target)] = attribute(node) if body is None else root.get(str(node.target)) or snapshot(body)
    graph: Graph = copy.deepcopy(gm.graph)
    copied = GraphModule(root, graph)
    copied.meta = dict(gm.meta)
    return copied


def run_samples(gm: GraphModule, samples: Samples) -> Outputs:
    """The graph's outputs; random ops draw the same numbers every time."""
    results: Outputs = []
    for sample in samples:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            results.append([_kept(v) for v in tree_leaves(gm(*sample))])
    return results


def _kept(value: Any) -> Any:
    """A result that later runs cannot change: outputs may alias inputs or constants."""
    return value.clone() if isinstance(value, Tensor) else value


def compare(name: str, contract: Contract, before: GraphModule, after: GraphModule, samples: Samples, known: Outputs) -> Outputs:
    """Run `after` and hold it against `known`, the outputs of `before`; returns its outputs.

    Raises VerificationError naming the pass, the first value that differs and its worst element."""
    tol = contract.tol or 0.0
    results = run_samples(after, samples)
    for sample, was, now in zip(samples, known, results, strict=True):
        if len(was) != len(now):
            raise VerificationError(f"{name} broke {contract}: the graph returned {len(was)} values, now {len(now)}")
        for i, (a, b) in enumerate(zip(was, now, strict=True)):
            if found := difference(a, b, tol):
                raise VerificationError(f"{name} broke {contract}: {_locate(before, after, sample, tol) or f'output {i}: {found}'}")
    return results


class _Recorder(Interpreter):
    """Yields values as they are computed: for each node of `wanted`, in order."""

    def __init__(self, gm: GraphModule, wanted: dict[str, Any]) -> None:
        super().__init__(gm)
        self.wanted = wanted

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.wanted[n.name] = _kept(value)
        return value


def _locate(before: GraphModule, after: GraphModule, sample: tuple[Any, ...], tol: float) -> str | None:
    """The first node present in both graphs whose value differs, in words."""
    old = {n.name: n for n in before.graph.nodes if n.op == "call_function"}
    pairs = [n for n in after.graph.nodes if n.name in old and n.target == old[n.name].target]
    was, now = ({n.name: None for n in pairs} for _ in range(2))
    for gm, values in ((before, was), (after, now)):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            _Recorder(gm, values).run(*sample)
    for node in pairs:
        leaves = zip(tree_leaves(was[node.name]), tree_leaves(now[node.name]), strict=False)
        if found := next((d for a, b in leaves if (d := difference(a, b, tol))), None):
            return f"{where(node)} ({describe(node)}): {found}{_blame(node, old)}"
    return None


def _blame(node: Node, old: dict[str, Node]) -> str:
    """The nearest new nodes upstream, with the rules that made them."""
    new = next((n for n in _upstream(node) if n.name not in old and "from" in n.meta), None)
    return "" if new is None else f"; computed from %{new.name}, made by {new.meta['from']}"


def _upstream(node: Node) -> Iterator[Node]:
    seen, front = {node}, [node]
    while front:
        front = [i for n in front for i in n.all_input_nodes if i not in seen]
        seen.update(front)
        yield from front
