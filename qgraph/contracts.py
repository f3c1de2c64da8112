"""Translation validation: what a pass promises about numbers, and the first value at which two graphs that should agree do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map

from qgraph.errors import VerificationError
from qgraph.observe import paused
from qgraph.text import describe, where

Samples = Sequence[tuple[Any, ...]]

Outputs = list[list[Any]]
"""Per sample, the leaves of what the graph returns."""

FLOOR = 1e-3
"""Magnitude below which values count as rounding noise around zero."""


@dataclass(frozen=True)
class Contract:
    """What a pass promises about the graph's outputs; `tol` is None for no promise."""

    name: str
    tol: float | None

    def __str__(self) -> str:
        return f"{self.name}({self.tol:g})" if self.tol else self.name


EXACT = Contract("EXACT", 0.0)
"""The same numbers, bit for bit (NaN for NaN; 0 and -0 are one number)."""

LOSSY = Contract("LOSSY", None)
"""Changes the numbers on purpose."""


def EQUIVALENT(tol: float) -> Contract:
    """The same real numbers, rounded differently: no element differs by more than tol times the largest magnitude in its tensor
    (at least FLOOR). Raises ValueError unless 0 < tol < 1."""
    if not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, got {tol}")
    return Contract("EQUIVALENT", tol)


def difference(before: Any, after: Any, tol: float) -> str | None:
    """None when `after` is within `tol` of `before` as EQUIVALENT defines it, else the worst element in words.

    NaN equals NaN and an infinity equals itself; another type or shape is a difference."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None if type(before) is type(after) and before == after else f"before {before!r}, after {after!r}"
    if before.dtype != after.dtype or before.shape != after.shape:
        return f"before {before.dtype}{list(before.shape)}, after {after.dtype}{list(after.shape)}"
    a, b = before.detach().double(), after.detach().double()
    error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
    magnitude = a[a.isfinite()].abs()
    allowed = tol * max(FLOOR, float(magnitude.amax()) if magnitude.numel() else 0.0)
    if error.numel() == 0 or float(error.amax()) <= allowed:
        return None
    at = torch.unravel_index(error.argmax(), error.shape)
    index = [int(i) for i in at]
    return f"worst element {index}: before {before[at].item()!r}, after {after[at].item()!r}, allowed difference {allowed:.3g}"


@contextmanager
def _repeatable() -> Iterator[None]:
    """Random ops draw the same numbers every time, and leave the caller's generator alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        yield


def _kept(value: Any) -> Any:
    """A value that later runs cannot change: it may alias inputs or constants."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def run_samples(gm: GraphModule, samples: Samples) -> Outputs:
    """The graph's outputs on each sample. Observers do not take the samples for calibration data."""
    results: Outputs = []
    for sample in samples:
        with _repeatable(), paused(gm):
            results.append(_kept(tree_leaves(gm(*sample))))
    return results


def compare(name: str, contract: Contract, before: GraphModule, after: GraphModule, samples: Samples, known: Outputs) -> Outputs:
    """Run `after`, hold it against `known`, the outputs of `before`, and return its outputs.

    Raises VerificationError naming the pass, the first value that differs and its worst element, or that the graph no longer runs."""
    try:
        results = run_samples(after, samples)
    except (RuntimeError, TypeError, ValueError, LookupError) as error:
        raise VerificationError(f"{name} broke the graph: it does not run any more: {str(error).splitlines()[0]}") from error
    for sample, was, now in zip(samples, known, results, strict=True):
        if len(was) != len(now):
            raise VerificationError(f"{name} broke {contract}: the graph returned {len(was)} values, now {len(now)}")
        differences = (difference(a, b, contract.tol or 0.0) for a, b in zip(was, now, strict=True))
        found = next(((i, d) for i, d in enumerate(differences) if d), None)
        if found is not None:
            first = _locate(before, after, sample, contract.tol or 0.0) or f"output {found[0]}: {found[1]}"
            raise VerificationError(f"{name} broke {contract}: {first}")
    return results


class _Recorder(Interpreter):
    """Keeps the values of the nodes named `wanted`."""

    def __init__(self, gm: GraphModule, wanted: set[str]) -> None:
        super().__init__(gm)
        self.wanted = wanted
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.values[n.name] = _kept(value)
        return value


def _locate(before: GraphModule, after: GraphModule, sample: tuple[Any, ...], tol: float) -> str | None:
    """The first node that is in both graphs under one name and whose value differs, in words."""
    old = {n.name: n for n in before.graph.nodes}
    pairs = [n for n in after.graph.nodes if n.op.startswith("call_") and n.name in old and n.target == old[n.name].target]
    values: list[dict[str, Any]] = []
    for gm in (before, after):
        recorder = _Recorder(gm, {n.name for n in pairs})
        with _repeatable():
            recorder.run(*sample)
        values.append(recorder.values)
    for node in pairs:
        leaves = zip(*(tree_leaves(v[node.name]) for v in values), strict=False)
        if found := next((d for a, b in leaves if (d := difference(a, b, tol))), None):
            return f"{where(node)} ({describe(node)}): {found}{_blame(node, old)}"
    return None


def _blame(node: Node, old: dict[str, Node]) -> str:
    """The nearest new node upstream, and what made it."""
    new = next((n for n in _upstream(node) if n.name not in old and "from" in n.meta), None)
    return "" if new is None else f"; it reads %{new.name}, made by {new.meta['from']}"


def _upstream(node: Node) -> Iterator[Node]:
    seen, front = {node}, [node]
    while front:
        front = list(dict.fromkeys(i for n in front for i in n.all_input_nodes if i not in seen))
        seen.update(front)
        yield from front
