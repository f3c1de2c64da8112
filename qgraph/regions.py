"""Integer regions: which values are quantized between sites, and which of them share one scale.

  site      an operation with a quantized weight and a static range for its input (annotate.py finds them)
  tail      the value in which an operation's output is quantized: itself, or the last of the activations it absorbs
  follower  an operation without weights that runs in integers if (1) each operand is available and (2) its tail is wanted
  available a site or an integer follower makes the value, or a site reads it
  wanted    a site or an integer follower reads the value

The followers are the greatest set that satisfies (1) and (2), found by removing what violates them; scales are classes of a
union-find. Neither depends on the order in which nodes are visited.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch.fx import GraphModule, Node

from qgraph.backend import ALL, Placement
from qgraph.errors import RecipeError
from qgraph.text import path_of
from qgraph.types import QSpec, type_of
from qgraph.views import Activation, DataMovement, is_const, view, view_any

Operands = tuple[Node, ...]


@dataclass(frozen=True)
class Group:
    """Values that share one static spec, each with the consumers that read its quantized form.

    `makers` are the operations that compute a member in integers, so that their output is quantized."""

    spec: QSpec
    consumers: Mapping[Node, Operands]
    makers: Mapping[Node, Node]


@dataclass(frozen=True)
class Regions:
    """`inputs[site]` is (x, wanted spec) of each static site; `outputs` are the sites that must have a quantized output."""

    gm: GraphModule
    placement: Placement
    inputs: Mapping[Node, tuple[Node, QSpec]]
    outputs: frozenset[Node]
    default: QSpec
    excluded: Callable[[Node], bool]

    # --- the followers --------------------------------------------------------------

    def operands(self, node: Node) -> Operands | None:
        """Operands of an operation that may follow in integers, else None."""
        tables = (self.placement.follow, self.placement.share)
        if node in self.inputs or not any(kind_in(t, node) for t in tables) or self.excluded(node):
            return None
        v = view_any([i for t in tables for i in t], node)
        found = tuple(v.inputs) if hasattr(v, "inputs") else (v.x,)
        if node.target is operator.getitem:
            found = (_movement(found[0]).x,) if _is_split(found[0]) else ()
        elif _is_split(node):
            return None
        plain = bool(found) and all(isinstance(i, Node) and not is_const(i) and _is_float(i) for i in found)
        return found if plain else None

    def tail(self, node: Node) -> Node:
        if kind_in(self.placement.share, node):
            return node
        while len(node.users) == 1:
            (user,) = node.users
            v = view(Activation, user)
            if v is None or v.kind not in self.placement.absorb or v.x is not node or self.excluded(user):
                break
            node = user
        return node

    @cached_property
    def candidates(self) -> dict[Node, Operands]:
        return {n: found for n in self.gm.graph.nodes if (found := self.operands(n)) is not None}

    @cached_property
    def tails(self) -> dict[Node, Node]:
        return {n: self.tail(n) for n in (*self.candidates, *self.inputs)}

    @cached_property
    def makers(self) -> dict[Node, Node]:
        """tail -> the operation that it belongs to."""
        return {t: n for n, t in self.tails.items()}

    @cached_property
    def followers(self) -> dict[Node, Operands]:
        integer = dict(self.candidates)
        work = list(integer)
        while work:
            node = work.pop()
            if node not in integer or self.holds(node, integer):
                continue
            lost = integer.pop(node)
            work += [m for i in lost if (m := self.makers.get(i)) in integer]
            work += [u for _, u in _readers(self.tails[node]) if u in integer]
        return integer

    def holds(self, node: Node, integer: Mapping[Node, Operands]) -> bool:
        available = all(self.site_reads(i) or (m := self.makers.get(i)) in integer or m in self.inputs for i in integer[node])
        return available and self.wanted(self.tails[node], integer)

    def site_reads(self, value: Node) -> bool:
        return any(u in self.inputs and self.inputs[u][0] is value for u in value.users)

    def wanted(self, value: Node, integer: Mapping[Node, Operands]) -> bool:
        return self.site_reads(value) or any(value in integer.get(u, ()) for _, u in _readers(value))

    # --- quantized values and their scales ------------------------------------------

    def consumers(self, value: Node) -> Operands:
        """Who reads the quantized form: everybody when the value is made in integers, else whoever computes in integers."""
        if self.made(value):
            return tuple(value.users)
        found = (edge for edge, u in _readers(value) if self.inputs.get(u, (None,))[0] is value or value in self.followers.get(u, ()))
        return tuple(dict.fromkeys(found))

    def made(self, value: Node) -> bool:
        maker = self.makers.get(value)
        if maker in self.inputs:
            return maker in self.outputs or self.wanted(value, self.followers)
        return maker in self.followers

    def groups(self) -> list[Group]:
        values = {v: readers for v in self.gm.graph.nodes if (readers := self.consumers(v))}
        classes = self.classes(values)
        return [
            Group(self.spec(members), {v: values[v] for v in members}, {v: self.makers[v] for v in members if self.made(v)})
            for members in classes
        ]

    def classes(self, values: Mapping[Node, Operands]) -> list[list[Node]]:
        parent = {v: v for v in values}

        def find(v: Node) -> Node:
            while parent[v] is not v:
                parent[v] = parent[parent[v]]
                v = parent[v]
            return v

        for node, operands in self.followers.items():
            if kind_in(self.placement.share, node):
                for i in operands:
                    parent[find(i)] = find(self.tails[node])
        found: dict[Node, list[Node]] = {}
        for v in values:
            found.setdefault(find(v), []).append(v)
        return list(found.values())

    def spec(self, members: Iterable[Node]) -> QSpec:
        """What the sites that read these values want; the default when only followers read them."""
        readers = [u for v in members for u in v.users if u in self.inputs and self.inputs[u][0] is v]
        wanted = {self.inputs[u][1]: u for u in readers}
        if len(wanted) > 1:
            a, b = sorted(f"{spec} at {path_of(u)}" for spec, u in wanted.items())[:2]
            raise RecipeError(f"values that must share one scale are wanted as {a} and as {b}; give these operations one format")
        return next(iter(wanted), self.default)


def kind_in(table: Mapping[type, frozenset[str]], node: Node) -> bool:
    """The node has an interface of the table (`Placement.follow`, `share`), and one of its kinds."""
    v = view_any(table, node)
    kinds = table[type(v)] if v is not None else frozenset()
    return kinds == ALL or getattr(v, "kind", "") in kinds


def _movement(node: Node) -> DataMovement:
    found = view(DataMovement, node)
    if found is None:
        raise AssertionError(f"{node.name} was seen to move data")
    return found


def _is_split(node: Node) -> bool:
    """A movement with several outputs. It is no value itself: each output that is picked from it follows its operand."""
    picked = bool(node.users) and all(u.target is operator.getitem for u in node.users)
    return picked and view(DataMovement, node) is not None


def _readers(value: Node) -> Iterator[tuple[Node, Node]]:
    """(node that reads the value, operation that it stands for): for a split, each of the outputs picked from it."""
    for user in value.users:
        if _is_split(user):
            yield from ((user, picked) for picked in user.users)
        else:
            yield user, user


def _is_float(node: Node) -> bool:
    """Integer tensors (shapes, indices, masks) never enter an integer region; values of unknown type may."""
    t = type_of(node)
    return t is None or t.dtype is None or t.is_float
