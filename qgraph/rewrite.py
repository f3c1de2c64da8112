"""Rules and the one driver that applies them: `apply(gm, rules)` until nothing matches, in time proportional to the graph and its changes.

@rule(Op(Elementwise, kind="mul", inputs=Inputs(Var("x"), 1.0)))
def drop_mul_by_one(m: Match, rw: Rewriter) -> Node:
    return m.x
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from qgraph.edit import add_constant, erase, graph_modules, is_pick, is_pure, named_targets, redirect, replace
from qgraph.errors import QGraphError, VerificationError
from qgraph.pattern import Match, depth, match, names, node_key, root_keys
from qgraph.rewriter import Decline, Refusal, Rewriter
from qgraph.text import path_of
from qgraph.types import TensorType, type_of

__all__ = [
    "Applied",
    "Decline",
    "Match",
    "Rewriter",
    "Rule",
    "add_constant",
    "apply",
    "erase",
    "graph_modules",
    "is_pure",
    "replace",
    "rule",
]

log = logging.getLogger("qgraph.rewrite")

Build = Callable[[Match, Rewriter], Node | tuple[Node | None, ...] | None]


@dataclass(frozen=True)
class Rule:
    """`build` makes what replaces the root of each match of `pattern`: a node, a tuple for a root with several outputs, or None for no change.

    Raises TypeError for a pattern whose root is no `Op`, or which captures under a name that `Match` itself has."""

    name: str
    pattern: Any
    build: Build

    def __post_init__(self) -> None:
        root_keys(self.pattern)  # a pattern without a root is an error where it is written
        if taken := {"root", "nodes", *dir(Match)}.intersection(names(self.pattern)):
            raise TypeError(f"rule {self.name} captures {min(taken)!r}, which every match has already; choose another name")


def rule(pattern: Any) -> Callable[[Build], Rule]:
    """Decorator: `build(m, rw)` becomes a rule named after it."""
    return lambda build: Rule(build.__name__, pattern, build)


@dataclass(frozen=True)
class Applied:
    """What `apply` did: rewrites done, refusals, and how many (rule, node) pairs it tried."""

    count: int
    declines: tuple[Decline, ...]
    attempts: int


class Bisection:
    """Counts rewrites of the whole process; with QGRAPH_BISECT_LIMIT=n only the first n happen, each logged with its number."""

    def __init__(self) -> None:
        self.seen = 0

    def allows(self, what: str, node: Node) -> bool:
        """Ask before each change; `what` is the rule's or pass' name. Raises QGraphError for a limit that is no number."""
        self.seen += 1
        limit = os.environ.get("QGRAPH_BISECT_LIMIT")
        if limit is None:
            return True
        if not limit.lstrip("-").isdigit():
            raise QGraphError(f"QGRAPH_BISECT_LIMIT must be a number, got {limit!r}")
        allowed = int(limit) < 0 or self.seen <= int(limit)
        log.info("bisect: %s rewrite %d: %s at %s", "doing" if allowed else "skipping", self.seen, what, node.name)
        return allowed


BISECTION = Bisection()


def apply(gm: GraphModule, rules: Iterable[Rule]) -> Applied:
    """Apply `rules` to `gm` and its nested bodies until none matches; earlier rules win at the same node.

    Code that dies by a rewrite is removed with it, and so are constants that nothing reads any more. Raises VerificationError
    when the rules do not come to an end."""
    rules = tuple(rules)
    runs = [_Driver(body, rules).run() for body in graph_modules(gm)]
    return Applied(sum(r.count for r in runs), tuple(d for r in runs for d in r.declines), sum(r.attempts for r in runs))


class _Driver:
    """One run over one graph: a queue of nodes to look at, fed by what each rewrite changes."""

    def __init__(self, gm: GraphModule, rules: tuple[Rule, ...]) -> None:
        self.gm = gm
        self.index: dict[Any, list[Rule]] = {}
        for r in rules:
            for k in root_keys(r.pattern):
                self.index.setdefault(k, []).append(r)
        self.depth = max((depth(r.pattern) for r in rules), default=1)
        self.queue = deque(n for n in gm.graph.nodes if node_key(n) in self.index)
        self.queued = set(self.queue)
        self.dead: set[Node] = set()
        self.limit = 10 * len(gm.graph.nodes) + 1000
        self.count = self.attempts = 0
        self.declines: dict[tuple[str, Node], Decline] = {}
        self.shared: dict[Any, str] = {}
        self.orphans: set[str] = set()

    def run(self) -> Applied:
        try:
            while self.queue:
                node = self.queue.popleft()
                self.queued.discard(node)
                if node not in self.dead:
                    self._visit(node)
        finally:  # what was done before an error stays done, and callable
            if self.count:
                self._drop_constants()
                self.gm.recompile()
        if self.count:
            self.gm.graph.lint()
        return Applied(self.count, tuple(self.declines.values()), self.attempts)

    def _visit(self, node: Node) -> None:
        for r in self.index.get(node_key(node), ()):
            self.attempts += 1
            m = match(r.pattern, node)
            if m is not None and self._rewrite(r, m):
                return

    def _rewrite(self, r: Rule, m: Match) -> bool:
        rw = Rewriter(self.gm, m.root, by=r.name, shared=self.shared)
        try:
            new = r.build(m, rw)
            if new is not None:
                _require_same_type(rw, m.root, new)
        except Refusal as refusal:
            reason = str(refusal)
            self.declines[r.name, m.root] = Decline(r.name, m.root.name, path_of(m.root), reason)
            log.debug("%s declined at %s: %s", r.name, m.root.name, reason)
            new = None
        if new is None or new is m.root or not BISECTION.allows(r.name, m.root):
            self._discard(rw.created)
            return False
        self._replace(m.root, new, rw.created)
        self._count(r, m.root)
        return True

    def _count(self, r: Rule, root: Node) -> None:
        self.count += 1
        self.declines.pop((r.name, root), None)
        if self.count > self.limit:
            raise VerificationError(
                f"the rules do not come to an end: {self.count} rewrites, the last by {r.name} at {path_of(root)}; a rule must not match what it builds"
            )

    def _replace(self, root: Node, new: Node | tuple[Node | None, ...], created: list[Node]) -> None:
        picks = [] if isinstance(new, Node) else [user for user in root.users if is_pick(user, root)]
        readers = redirect(root, new)
        self.dead.update(picks)
        touched = self._erase(root) + self._discard(created)
        for node in created:
            self._revisit(node, 0)
        for reader in readers:
            self._revisit(reader, self.depth - 1)
        for value in touched:
            if len(value.users) == 1:  # a pattern that asks for a single use may match now
                self._revisit(value, self.depth - 1)

    def _discard(self, created: list[Node]) -> list[Node]:
        """Remove new nodes that nothing reads; returns what they read."""
        return [value for node in reversed(created) if node not in self.dead and not node.users for value in self._erase(node)]

    def _erase(self, node: Node) -> list[Node]:
        """Remove a node and what dies with it; returns the surviving nodes that lost a reader."""
        removed, touched = erase(node)
        self.dead.update(removed)
        self.orphans.update(str(n.target) for n in removed if n.op == "get_attr")
        return touched

    def _revisit(self, node: Node, levels: int) -> None:
        """Look again at `node` and at readers up to `levels` further on: a pattern rooted there may reach down to it."""
        front = [node]
        for level in range(levels + 1):
            for n in front:
                if n not in self.queued and n not in self.dead and node_key(n) in self.index:
                    self.queued.add(n)
                    self.queue.append(n)
            front = [user for n in front for user in n.users] if level < levels else []

    def _drop_constants(self) -> None:
        """Delete what only removed get_attr nodes read."""
        if not self.orphans:
            return
        used = named_targets(self.gm)
        for target in sorted(self.orphans - used):
            if not any(owner in used for owner in _owners(target)):  # a called module needs its parameters
                delattr(self.gm.get_submodule(target.rpartition(".")[0]), target.rpartition(".")[2])


def _owners(target: str) -> list[str]:
    """ "a.b.w" -> ["a", "a.b"]."""
    return [target[:i] for i, c in enumerate(target) if c == "."]


def _require_same_type(rw: Rewriter, root: Node, new: Node | tuple[Node | None, ...]) -> None:
    """A replacement of another type would make an illegal graph: declined, whatever the rule thinks."""
    was, now = type_of(root), type_of(new) if isinstance(new, Node) else None
    if was is not None and isinstance(new, tuple):
        raise TypeError(f"{rw.by} returns {len(new)} values for %{root.name}, which has one")
    if was is not None and now is not None and not _compatible(was, now):
        rw.decline(f"the replacement is {now}, not {was}")


def _compatible(a: TensorType, b: TensorType) -> bool:
    if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
        return False
    if a.shape is None or b.shape is None:
        return True
    pairs = zip(a.shape, b.shape, strict=False)
    return len(a.shape) == len(b.shape) and all(x == y for x, y in pairs if isinstance(x, int) and isinstance(y, int))
