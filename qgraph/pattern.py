"""Patterns are data: a tree of `Op`, `Var`, `Const`, `Opt`, `OneOf`, `Inputs`, `item` and plain values; `match(pattern, node)` binds the names.

    Op(Linear, x=Var("x"), weight=Op(Dequantize, "dq", single_use=True), bias=Opt(Const("b")))

A name that occurs twice must bind the same value twice. Choices (`OneOf`, `Inputs`) are searched with backtracking.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch.fx import Node
from torch.nn import Module

from qgraph.arguments import named_arguments
from qgraph.views import const_value, is_const, key, table, view

MODULE_CALL = "call_module"
"""The index key of every call_module node: which class it calls is known only by looking."""


class Op:
    """A node of `kind` whose named operands match.

    `kind` is an interface (operands are its fields), an OpOverload (schema names), an ONNX key such as "::MatMul" (input and
    attribute names of the ONNX schema), a Python function (parameter names) or a Module class (parameters of `forward`).
    `name` captures the node. `single_use` asks that nothing else reads it.
    Raises TypeError for another kind of kind, or for an operand that the interface does not have.
    """

    __slots__ = ("kind", "name", "operands", "single_use")

    def __init__(self, kind: Any, /, name: str | None = None, *, single_use: bool = False, **operands: Any) -> None:
        if not isinstance(kind, str) and not callable(kind):
            raise TypeError(f"a pattern's kind is an interface, an op, a function, a module class or '::OnnxOp', not {kind!r}")
        if _is_interface(kind) and (unknown := operands.keys() - {f.name for f in fields(kind)}):
            raise TypeError(
                f"{kind.__name__} has no operand {', '.join(sorted(unknown))}; it has {', '.join(f.name for f in fields(kind))}"
            )
        self.kind, self.name, self.single_use, self.operands = kind, name, single_use, operands

    def __repr__(self) -> str:
        kind = getattr(self.kind, "__name__", self.kind)
        return f"Op({kind}{''.join(f', {k}={v!r}' for k, v in self.operands.items())})"


@dataclass(frozen=True)
class Var:
    """Any value: a node, a number, an axis, None."""

    name: str


@dataclass(frozen=True)
class Const:
    """A tensor stored in the module (weight, bias, initializer)."""

    name: str


@dataclass(frozen=True)
class Opt:
    """An operand that may be None; the names inside are then bound to None."""

    pattern: Any


class OneOf:
    """The first of several patterns that lets the whole match succeed."""

    __slots__ = ("options",)

    def __init__(self, *options: Any) -> None:
        self.options = options

    def __repr__(self) -> str:
        return f"OneOf{self.options!r}"


class Inputs:
    """A tuple of operands in any order: `Op(Elementwise, kind="add", inputs=Inputs(Var("x"), Const("c")))`."""

    __slots__ = ("patterns",)

    def __init__(self, *patterns: Any) -> None:
        self.patterns = patterns

    def __repr__(self) -> str:
        return f"Inputs{self.patterns!r}"


def item(pattern: Any, index: int) -> Op:
    """Output `index` of a node with several: `item(Op(DynamicQuantize, "dq"), 0)`."""
    return Op(operator.getitem, a=pattern, b=index)


class Match(Mapping[str, Any]):
    """What a pattern bound, by name (`m.x`, `m["x"]`, `m.get("x")`); `root` is the matched node, `nodes` all nodes matched by an `Op`."""

    def __init__(self, root: Node, values: dict[str, Any], nodes: tuple[Node, ...]) -> None:
        self.root, self.nodes, self._values = root, nodes, values

    def __getattr__(self, name: str) -> Any:
        values: dict[str, Any] = self.__dict__.get("_values", {})
        if name not in values:
            raise AttributeError(f"the pattern binds no {name!r}; it binds {', '.join(values) or 'nothing'}")
        return values[name]

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass
class _Found:
    """Bindings of a partial match."""

    values: dict[str, Any] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def bind(self, name: str, value: Any) -> bool:
        if name not in self.values:
            self.values[name] = value
            return True
        return same(self.values[name], value)

    def copy(self) -> _Found:
        return _Found(dict(self.values), list(self.nodes))


Goals = tuple[Any, Any, "Goals"] | None
"""A linked list of (pattern, value) pairs still to match, shared between the branches of a choice."""


def match(pattern: Any, node: Node) -> Match | None:
    """Match `pattern` at `node`; None when it does not."""
    found = _solve((pattern, node, None), _Found())
    return None if found is None else Match(node, found.values, tuple(found.nodes))


def _solve(goals: Goals, found: _Found) -> _Found | None:
    """All goals hold under an extension of `found`; the first such extension. `found` may be changed."""
    while goals is not None:
        pattern, value, rest = goals
        if isinstance(pattern, OneOf | Inputs):
            attempts = (_solve(_push(branch, rest), found.copy()) for branch in _branches(pattern, value))
            return next((a for a in attempts if a is not None), None)
        more = _step(pattern, value, found)
        if more is None:
            return None
        goals = _push(more, rest)
    return found


def _push(pairs: Sequence[tuple[Any, Any]], goals: Goals) -> Goals:
    for pattern, value in reversed(pairs):
        goals = (pattern, value, goals)
    return goals


def _branches(pattern: OneOf | Inputs, value: Any) -> Iterable[list[tuple[Any, Any]]]:
    """The ways in which a choice may hold, each a list of (pattern, value) pairs."""
    if isinstance(pattern, OneOf):
        return ([(option, value)] for option in pattern.options)
    if not isinstance(value, tuple | list) or len(value) != len(pattern.patterns):
        return ()
    return (list(zip(pattern.patterns, order, strict=True)) for order in itertools.permutations(value))


def _step(pattern: Any, value: Any, found: _Found) -> Sequence[tuple[Any, Any]] | None:
    """Match the outermost layer: the pairs that remain inside, or None for no match."""
    if isinstance(pattern, Op):
        return _step_op(pattern, value, found)
    if isinstance(pattern, Opt):
        if value is not None:
            return ((pattern.pattern, value),)
        return () if all(found.bind(name, None) for name in names(pattern.pattern)) else None
    if isinstance(pattern, Var):
        return () if found.bind(pattern.name, value) else None
    if isinstance(pattern, Const):
        return () if is_const(value) and found.bind(pattern.name, value) else None
    return () if _is_literal(pattern, value) else None


def _step_op(pattern: Op, value: Any, found: _Found) -> Sequence[tuple[Any, Any]] | None:
    if not isinstance(value, Node) or (pattern.single_use and len(value.users) != 1):
        return None
    got = _operands(pattern.kind, value)
    if got is None or (pattern.name is not None and not found.bind(pattern.name, value)):
        return None
    found.nodes.append(value)
    if not pattern.operands.keys() <= got.keys():
        return None
    return [(p, got[k]) for k, p in pattern.operands.items()]


def _operands(kind: Any, node: Node) -> Mapping[str, Any] | None:
    """The operands of `node` by name if it is of this kind, else None."""
    if isinstance(kind, type) and issubclass(kind, Module):
        return _module_operands(kind, node)
    if node.op != "call_function":
        return None
    if _is_interface(kind):
        seen = view(kind, node)
        return None if seen is None else vars(seen)
    return named_arguments(node) if key(node.target) == key(kind) else None


def _module_operands(kind: type[Module], node: Node) -> Mapping[str, Any] | None:
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    module = node.graph.owning_module.get_submodule(str(node.target))
    if not isinstance(module, kind):
        return None
    return inspect.signature(type(module).forward).bind(module, *node.args, **node.kwargs).arguments


def _is_interface(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)


def same(a: Any, b: Any) -> bool:
    """One value: the same node, two reads of one stored tensor, or equal plain values."""
    if isinstance(a, Node) or isinstance(b, Node):
        return a is b or (is_const(a) and is_const(b) and a.target == b.target)
    return type(a) is type(b) and bool(a == b)


def _is_literal(expected: Any, value: Any) -> bool:
    """A plain value in a pattern: equal to it, or for a number a stored tensor whose only element is that number."""
    if not isinstance(value, Node):
        return type(expected) is type(value) and expected == value if expected is None or value is None else bool(expected == value)
    if not isinstance(expected, int | float):
        return False
    const = const_value(value)
    return const is not None and const.numel() == 1 and not const.is_complex() and const.item() == expected


def _parts(pattern: Any) -> tuple[Any, ...]:
    """The patterns directly inside a pattern."""
    if isinstance(pattern, Op):
        return tuple(pattern.operands.values())
    if isinstance(pattern, Opt):
        return (pattern.pattern,)
    return pattern.options if isinstance(pattern, OneOf) else pattern.patterns if isinstance(pattern, Inputs) else ()


def names(pattern: Any) -> tuple[str, ...]:
    """Every name that a pattern may bind."""
    own = (pattern.name,) if isinstance(pattern, Op | Var | Const) and pattern.name else ()
    return (*own, *(n for part in _parts(pattern) for n in names(part)))


def depth(pattern: Any) -> int:
    """How many nodes deep a pattern looks: 1 for a single `Op`."""
    return int(isinstance(pattern, Op)) + max((depth(part) for part in _parts(pattern)), default=0)


def root_keys(pattern: Any) -> set[Any]:
    """The table keys (`views.key`) of nodes at which a pattern can match; the driver looks nowhere else.

    Raises TypeError for a pattern whose root is no `Op`."""
    if isinstance(pattern, OneOf):
        return {k for option in pattern.options for k in root_keys(option)}
    if not isinstance(pattern, Op):
        raise TypeError(f"a rule's pattern starts with an Op, or OneOf several, not with {pattern!r}")
    if isinstance(pattern.kind, type) and issubclass(pattern.kind, Module):
        return {MODULE_CALL}
    return set(table(pattern.kind)) if _is_interface(pattern.kind) else {key(pattern.kind)}


def node_key(node: Node) -> Any:
    """The table key under which rules for this node are found; None for nodes at which no rule starts."""
    if node.op == "call_function":
        return key(node.target)
    return MODULE_CALL if node.op == "call_module" else None
