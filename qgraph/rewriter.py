"""Rewriter: the only way in which a rule makes nodes; types, provenance and names are filled in here."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node, map_arg

from qgraph.edit import add_constant
from qgraph.text import ALSO, path_of
from qgraph.types import TensorType, type_of
from qgraph.views import const_value


@dataclass(frozen=True)
class Decline:
    """A rule matched at `node` (FX name; `path` is what users call it) and refused, with the reason."""

    rule: str
    node: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.rule} declined at {self.path}: {self.reason}"


class Refusal(Exception):
    """Carries the sentence of `Rewriter.decline` to the driver."""


class _Untyped(Exception):
    """A value of which no fake tensor can be made."""


_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "name", ALSO)


class Rewriter:
    """Makes nodes before `root` on behalf of the rule or pass `by`. `created` lists them in order."""

    def __init__(self, gm: GraphModule, root: Node, *, by: str, shared: dict[Any, str] | None = None) -> None:
        self.gm, self.root, self.by = gm, root, by
        self.created: list[Node] = []
        self._shared = {} if shared is None else shared

    def call(self, target: Any, *args: Any, like: Node | None = None, origin: Node | None = None, **attrs: Any) -> Node:
        """A new call of `target` (an OpOverload, a function, an OnnxOp).

        Its type is that of `like`, else found by running the op on fake tensors; a node that replaces the root and has no type gets the root's.
        `origin` is the node whose module path and source line it carries on (default: the root)."""
        node = self._insert("call_function", target, args, attrs, origin or self.root)
        if like is not None:
            node.meta.update({k: like.meta[k] for k in ("val", "type") if k in like.meta})
        elif not hasattr(target, "op_type"):  # an ONNX op runs on real tensors only
            self._infer(node)
        return node

    def const(self, source: Tensor | Node, fn: Callable[[Tensor], Tensor] | None = None, *, name: str | None = None) -> Node:
        """A node reading a new constant: `source`, or fn(source), computed now.

        `source` is a tensor or a constant node (anything else declines). The same function of the same stored tensor is stored once, however
        many rules ask for it. `name` is a hint."""
        if isinstance(source, Node):
            value = const_value(source)
            if value is None:
                self.decline(f"%{source.name} is not a constant")
            hint, identity = name or str(source.target), _identity(str(source.target), fn)
            if fn is None:
                self._shared[identity] = str(source.target)
        else:
            value, hint, identity = source, name or f"{self.root.name}_const", None
        target = self._shared.get(identity)
        if target is None:
            target = add_constant(self.gm, hint, (fn(value) if fn else value).contiguous())
            if identity is not None:
                self._shared[identity] = target
        node = self._insert("get_attr", target, (), {}, source if isinstance(source, Node) else self.root)
        self._type(node, getattr(self.gm, target))
        return node

    def decline(self, reason: str) -> NoReturn:
        """Refuse, with a sentence that says what about this graph is in the way."""
        raise Refusal(reason)

    def _insert(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], origin: Node) -> Node:
        with self.gm.graph.inserting_before(self.root):
            node = self.gm.graph.create_node(op, target, args, kwargs)
        node.meta.update({k: origin.meta[k] for k in _ORIGIN if k in origin.meta})
        if "onnx" in origin.meta and op == "call_function":
            node.meta["name"] = path_of(origin)
        node.meta["from"] = self.by
        self.created.append(node)
        return node

    def _type(self, node: Node, value: Any) -> None:
        """Record the type as this graph's dialect does: a fake tensor next to fake tensors, else a TensorType."""
        mode = self._mode()
        if mode is not None and isinstance(value, Tensor):
            node.meta["val"] = value if isinstance(value, FakeTensor) else _empty(mode, value)
        else:
            node.meta["val"] = value
            found = type_of(node)
            if found is not None:
                node.meta["type"] = found
                del node.meta["val"]

    def _infer(self, node: Node) -> None:
        mode = self._mode()
        run_mode = mode or FakeTensorMode()
        target: Any = node.target
        try:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: _fake(n, run_mode))
        except _Untyped:
            return
        try:
            with run_mode:
                self._type(node, target(*args, **kwargs))
        except (RuntimeError, TypeError, ValueError) as error:  # what ops raise on operands that do not fit
            self.decline(f"{target} does not take these operands: {str(error).splitlines()[0]}")

    def _mode(self) -> FakeTensorMode | None:
        """The fake mode of the values around the root, or None in a graph that has none."""
        for node in (self.root, *self.root.all_input_nodes):
            values = node.meta.get("val")
            first = values[0] if isinstance(values, tuple | list) and values else values
            if isinstance(first, FakeTensor):
                return first.fake_mode
        return None


def _fake(node: Node, mode: FakeTensorMode) -> Any:
    """A value of the node's type without data."""
    value = node.meta.get("val")
    if value is not None and (not isinstance(value, FakeTensor) or value.fake_mode is mode):
        return value
    kind = type_of(node)
    if kind is None and (const := const_value(node)) is not None:
        kind = TensorType(str(const.dtype).removeprefix("torch."), tuple(const.shape))
    dtype = None if kind is None or kind.dtype is None else getattr(torch, kind.dtype, None)
    if kind is None or dtype is None or kind.shape is None or not all(isinstance(d, int) and d >= 0 for d in kind.shape):
        raise _Untyped
    with mode:
        return torch.empty(kind.shape, dtype=dtype)  # type: ignore[arg-type]


def _empty(mode: FakeTensorMode, value: Tensor) -> Tensor:
    """Cheaper than mode.from_tensor, which also remembers views and strides."""
    with mode:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)


def _identity(target: str, fn: Callable[[Tensor], Tensor] | None) -> Hashable | None:
    """Equal for two calls that compute the same constant: same stored tensor, same code, same captured values."""
    if fn is None:
        return (target,)
    code = getattr(fn, "__code__", None)
    cells = tuple(c.cell_contents for c in getattr(fn, "__closure__", None) or ())
    defaults = (getattr(fn, "__defaults__", None) or (), *(getattr(fn, "__kwdefaults__", None) or {}).items())
    try:
        hash((cells, defaults))
    except TypeError:  # captures something that cannot be compared
        return None
    return None if code is None else (target, code, cells, defaults)
