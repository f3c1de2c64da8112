"""Diagonals: which values may be multiplied by positive factors per channel, if the constants around them are divided by them.

    y = W x + b,  z = V relu(y)   ==   y' = D W x + D b,  z = (V D^-1) relu(y')        D diagonal and positive

Every value gets a field of unknown factors (see fields.py). An operation that can take factors into its constants makes fresh ones;
an operation that commutes with them passes them on, tying operands to each other; whatever is not known to do either is a barrier,
whose operands and results have factor 1. `diagonals` solves this and gives groups: factors that can be chosen freely, with everything
that must change with them (migrate.py does).

Operations are known by their interfaces alone, one rule each (commute.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.commute import RULES
from qgraph.edit import has_writes
from qgraph.fields import Field, Solution, Unknowns, components
from qgraph.text import path_of, target_name
from qgraph.types import type_of
from qgraph.views import Conv, Linear, Size, view, view_any

Side = Literal["input", "output", "constant"]


@dataclass(frozen=True, eq=False)
class Member:
    """What changes with a group's factors d: the constants of `node`.

    side "output": output channel i times d[channels[i]]; "input": input channel i over d[channels[i]]; "constant": `operand` times
    d[channels], broadcast to each other. -1 stands for factor 1."""

    node: Node
    side: Side
    channels: Tensor
    operand: Node | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """`size` factors that can be chosen freely. `producers` take them in, `consumers` their inverses; `shifts` are constants that are added
    to scaled values; `values` are all scaled values with the number of the factor of each element (-1: 1)."""

    size: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    shifts: tuple[Member, ...]
    values: dict[Node, Field]


@dataclass(frozen=True, eq=False)
class Diagonals:
    """The groups of one graph, and of each linear and convolution whose input is not free on every channel, the reason."""

    groups: tuple[Group, ...]
    fixed: dict[Node, str]


def diagonals(gm: GraphModule) -> Diagonals:
    """The groups of `gm` alone; its nested bodies are graphs of their own, whose inputs and outputs have factor 1."""
    if has_writes(gm):
        layers = (n for n in gm.graph.nodes if view_any((Linear, Conv), n) is not None)
        return Diagonals((), dict.fromkeys(layers, "the graph writes into tensors in place"))
    flow = Flow()
    for node in gm.graph.nodes:
        flow.visit(node)
    return flow.result()


@dataclass
class Flow:
    """The walk over a graph in order. Rules call `read`, `write`, `shift`, `fix` and return the field of the node's value."""

    unknowns: Unknowns = field(default_factory=Unknowns)
    fields: dict[Node, Field | tuple[Field, ...]] = field(default_factory=dict)
    members: list[Member] = field(default_factory=list)

    def visit(self, node: Node) -> None:
        if node.op == "get_attr":
            return
        if node.op == "output":
            self.fix_inputs(node, "the graph returns it")
            return
        found = self.rule(node) if node.op == "call_function" else None
        self.fields[node] = self.barrier(node, found) if found is None or isinstance(found, str) else found

    def rule(self, node: Node) -> Field | tuple[Field, ...] | str | None:
        if view(Size, node) is not None:
            return self.one(node, "it is a size")
        for interface, rule in RULES:
            if (v := view(interface, node)) is not None:
                kind = type_of(node)
                known = kind is None or (kind.rank is not None and kind.is_float)  # several outputs have no one type
                return rule(self, node, v) if known else None
        return None

    def barrier(self, node: Node, reason: str | None) -> Field:
        """What the node reads and makes has factor 1."""
        self.fix_inputs(node, reason or f"{_kind(node)} {path_of(node)} reads it")
        made = f"it is the input {node.target}" if node.op == "placeholder" else f"{_kind(node)} {path_of(node)} makes it"
        return self.one(node, reason or made)

    def one(self, node: Node, reason: str) -> Field:
        """A field of factors 1 for the node's value."""
        kind = type_of(node)
        return self.unknowns.fix(self.unknowns.fresh((1,) * ((kind.rank if kind else None) or 0)), reason)

    def fix_inputs(self, node: Node, reason: str) -> None:
        for value in node.all_input_nodes:
            self.fix(value, reason)

    def fix(self, value: Any, reason: str) -> None:
        found = self.fields.get(value, ()) if isinstance(value, Node) else ()
        for part in found if isinstance(found, tuple) else (found,):
            self.unknowns.fix(part, reason)

    def of(self, value: Node) -> Field:
        """The field of an operand; of a constant, factors 1."""
        found = self.fields.get(value)
        if isinstance(found, Tensor):
            return found
        return self.one(value, f"@{value.target} is a constant" if value.op == "get_attr" else f"%{value.name} is no tensor")

    def free(self, value: Node) -> bool:
        """The value may turn out to have factors other than 1."""
        return value in self.fields and not self.unknowns.is_fixed(self.of(value))

    def read(self, node: Node, channels: Tensor) -> None:
        """The node can take the inverses of these factors of its input channels."""
        self.members.append(Member(node, "input", channels))

    def write(self, node: Node, count: int) -> Tensor:
        """The node can take in fresh factors of its `count` output channels; returns them."""
        channels = self.unknowns.fresh((count,))
        self.members.append(Member(node, "output", channels))
        return channels

    def shift(self, node: Node, operand: Node, channels: Field) -> None:
        """The node adds a constant to what has these factors."""
        self.members.append(Member(node, "constant", channels, operand))

    def result(self) -> Diagonals:
        solution = self.unknowns.solve()
        fixed: dict[Node, str] = {}
        for m in self.members:
            if m.side == "input" and (why := solution.why(m.channels)):
                fixed.setdefault(m.node, why)
        return Diagonals(tuple(_groups(self, solution)), fixed)


def _groups(flow: Flow, solution: Solution) -> list[Group]:
    """Factors that meet in one member or one value are chosen together."""
    members = [(m, solution.free[m.channels]) for m in flow.members]
    fields = [(n, v) for n, f in flow.fields.items() if isinstance(f, Tensor) and bool(((v := solution.free[f]) >= 0).any())]
    met = [v[v >= 0].unique() for _, v in (*members, *fields)]
    if not any(len(v) for v in met):
        return []
    whole = components(flow.unknowns.count, torch.cat([v[:-1] for v in met]), torch.cat([v[1:] for v in met]))
    numbers, sizes = _numbered(torch.cat(met).unique(), whole)
    owned: dict[int, list[tuple[Member, Tensor]]] = {}
    for m, v in members:
        if bool((v >= 0).any()):
            owned.setdefault(_root(v, whole), []).append((m, v))
    values: dict[int, dict[Node, Field]] = {}
    for node, v in fields:
        values.setdefault(_root(v, whole), {})[node] = numbers[v]
    return [_group(sizes[root], found, numbers, values.get(root, {})) for root, found in owned.items()]


def _root(v: Tensor, whole: Tensor) -> int:
    return int(whole[v[v >= 0][0]])


def _numbered(free: Tensor, whole: Tensor) -> tuple[Tensor, dict[int, int]]:
    """label -> number within its group, from 0 (label -1: -1), and how many each group has."""
    in_order = free[whole[free].argsort(stable=True)]
    roots, counts = whole[in_order].unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    numbers = torch.full((len(whole) + 1,), -1)  # label -1 reads the last one
    numbers[in_order] = torch.arange(len(in_order)) - first.repeat_interleave(counts)
    return numbers, dict(zip(roots.tolist(), counts.tolist(), strict=True))


def _group(size: int, members: list[tuple[Member, Tensor]], numbers: Tensor, values: dict[Node, Field]) -> Group:
    found: dict[Side, list[Member]] = {"output": [], "input": [], "constant": []}
    for m, v in members:
        found[m.side].append(Member(m.node, m.side, numbers[v], m.operand))
    return Group(size, tuple(found["output"]), tuple(found["input"]), tuple(found["constant"]), values)


def _kind(node: Node) -> str:
    return target_name(node).rpartition(".")[2] if node.op == "call_function" else node.op
