"""Editing a graph in place: constants, replacement, and removal of what dies with a node. Every function costs as much as it changes."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from qgraph.errors import VerificationError
from qgraph.moments import MOMENTS
from qgraph.spill import settled
from qgraph.types import attribute

PURE_DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "com.microsoft"}
"""ONNX domains whose ops are known to have no effect but their outputs."""

RANDOM_OPS = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
"""ONNX ops that draw numbers: removing one would change what the others draw."""

FUNCTION_BODY = "body__function"
"""The keyword that carries the body of a call of a model-local ONNX function."""

_PURE_HIGHER_ORDER = {"cond", "while_loop", "scan", "map", "map_impl", "associative_scan", "wrap_with_set_grad_enabled"}


def graph_modules(gm: GraphModule) -> Iterator[GraphModule]:
    """`gm` and every GraphModule nested in it (bodies of If, Loop, Scan, torch.cond), each once, outer ones first."""
    seen: set[int] = set()
    work = [gm]
    while work:
        current = work.pop(0)
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            work += [body for node in current.graph.nodes if (body := nested(node)) is not None]


def has_writes(gm: GraphModule) -> bool:
    """A call in this graph (bodies not looked at) may change a tensor in place, so that two equal calls need not give equal values."""
    return any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in gm.graph.nodes)


def nested(node: Node) -> GraphModule | None:
    """The GraphModule that a get_attr or call_module node names, else None."""
    if node.op not in ("get_attr", "call_module"):
        return None
    value = attribute(node)
    return value if isinstance(value, GraphModule) else None


def add_constant(gm: GraphModule, name_hint: str, value: Any) -> str:
    """Store `value` in the module under a new name made from `name_hint`; returns the get_attr target.

    A tensor becomes a buffer (a mapped one where there is much already, see spill.py), anything else (an onnx_ir tensor, a nested
    GraphModule) a plain attribute or submodule."""
    hint = "".join(c if c.isalnum() else "_" for c in name_hint) or "constant"
    hint = f"c{hint}" if hint[0].isdigit() else hint
    name, suffix = hint, len(gm._buffers)  # not 1: with many constants of one name the next free number must not be searched for
    while hasattr(gm, name):
        name, suffix = f"{hint}_{suffix}", suffix + 1
    if isinstance(value, torch.Tensor):
        gm.register_buffer(name, settled(value.detach()))
    else:
        setattr(gm, name, value)
    return name


class Prologue:
    """Where to insert what reads a value: never between the inputs and stored tensors with which a graph begins."""

    def __init__(self, gm: GraphModule) -> None:
        self.header: set[Node] = set()
        for node in gm.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                self.end = node
                break
            self.header.add(node)

    def after(self, value: Node) -> Node:
        """The node to insert before, to come after `value`."""
        return self.end if value in self.header else value.next


def replace(node: Node, new: Node | tuple[Node | None, ...]) -> None:
    """Let every user of `node` read `new`, then remove `node` with the inputs that die with it.

    A tuple stands for the outputs of a node with several: users that pick output i read new[i].
    A new node of unknown type gets the type of what it replaces. Raises VerificationError when an output that is still read has no replacement."""
    redirect(node, new)
    erase(node)


def redirect(node: Node, new: Node | tuple[Node | None, ...]) -> list[Node]:
    """The first half of `replace`; returns the nodes that now read something else."""
    if isinstance(new, Node):
        _inherit(new, node)
        return node.replace_all_uses_with(new)
    changed: list[Node] = []
    for user in list(node.users):
        if is_pick(user, node):
            changed += redirect(user, _output(node, new, user.args[1]))
            user.graph.erase_node(user)
        else:
            whole = tuple(_output(node, new, i) for i in range(len(new)))
            user.args = map_arg(user.args, lambda a: whole if a is node else a)  # noqa: B023  called before the loop goes on
            user.kwargs = map_arg(user.kwargs, lambda a: whole if a is node else a)  # noqa: B023
            changed.append(user)
    return changed


def is_pick(user: Node, node: Node) -> bool:
    """`user` takes one output of `node`."""
    return user.target is operator.getitem and user.args[0] is node


def _output(node: Node, new: tuple[Node | None, ...], index: Any) -> Node:
    found: Node | None = new[index] if -len(new) <= index < len(new) else None
    if found is None:
        raise VerificationError(f"output {index} of %{node.name} is still read, but its replacement has no such output")
    return found


def _inherit(new: Node, old: Node) -> None:
    if MOMENTS in old.meta:
        new.meta.setdefault(MOMENTS, old.meta[MOMENTS])
    if "val" not in new.meta and "type" not in new.meta:
        new.meta.update({k: old.meta[k] for k in ("val", "type") if k in old.meta})


def erase(node: Node) -> tuple[list[Node], list[Node]]:
    """Remove `node`, which nothing reads, and all pure inputs that die with it.

    Returns (removed nodes, surviving nodes that lost a user). Placeholders, impure and random nodes and nodes of unknown
    effect stay. Raises RuntimeError (torch.fx) when `node` still has users."""
    removed: list[Node] = []
    touched: dict[Node, None] = {}
    work = [node]
    while work:
        current = work.pop()
        inputs = list(current.all_input_nodes)
        current.graph.erase_node(current)
        removed.append(current)
        for value in inputs:
            if value.users or not is_pure(value):
                touched[value] = None
            else:
                touched.pop(value, None)
                work.append(value)
    return removed, list(touched)


def is_pure(node: Node) -> bool:
    """Nothing is lost when the node is removed and nobody reads it. What is not understood counts as impure."""
    if node.op == "get_attr":
        return True
    if node.op == "call_module":
        return _is_pure_module(node)
    if node.op != "call_function":
        return False
    target: Any = node.target
    if hasattr(target, "op_type"):
        known = target.domain in PURE_DOMAINS or FUNCTION_BODY in node.kwargs
        return known and target.op_type not in RANDOM_OPS and _has_pure_bodies(node)
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.returns) and not node.is_impure()
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name() in _PURE_HIGHER_ORDER and not node.is_impure() and _has_pure_bodies(node)
    return _is_pure_function(target) and not node.is_impure()


def _has_pure_bodies(node: Node) -> bool:
    bodies = (body for value in node.all_input_nodes if (body := nested(value)) is not None)
    return all(is_pure(n) for body in bodies for n in body.graph.nodes if n.op not in ("placeholder", "output"))


def _is_pure_module(node: Node) -> bool:
    """torch's own modules in eval mode, and modules that say so by `_is_impure = False`."""
    module = attribute(node)
    if isinstance(module, GraphModule):
        return all(is_pure(n) for n in module.graph.nodes if n.op not in ("placeholder", "output"))
    declared = getattr(module, "_is_impure", None)
    return declared is False or (declared is None and not module.training and type(module).__module__.startswith("torch.nn.modules."))


def _is_pure_function(target: Any) -> bool:
    """Python's operators that return a new value, and torch functions that neither write nor draw."""
    module, name = str(getattr(target, "__module__", "")), str(getattr(target, "__name__", ""))
    if module == "_operator":
        return name not in {"setitem", "delitem", "imatmul"} and not (name.startswith("i") and hasattr(operator, name[1:]))
    return module.split(".")[0] in {"torch", "math", "_VariableFunctions"} and not name.endswith("_") and "dropout" not in name


def named_targets(gm: GraphModule) -> set[str]:
    """Paths of what something names: nodes, and the list of functions of an ONNX file, which stay whether called or not."""
    functions = getattr(gm.meta.get("onnx_model"), "functions", {})
    return {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")} | set(functions.values())


def copy_graph(gm: GraphModule) -> GraphModule:
    """A copy with nodes and nested graphs of its own that shares all tensors and other modules with `gm`.

    `gm.meta` is copied one level deep; a State in it is copied with its ledger. A body that several nodes share stays shared."""
    return _copy(gm, {})


def _copy(gm: GraphModule, copies: dict[GraphModule, GraphModule]) -> GraphModule:
    new = GraphModule(gm, copy.deepcopy(gm.graph), gm._get_name())
    copies[gm] = new
    new.meta = {k: v.copy() if hasattr(v, "copy") else v for k, v in gm.meta.items()}
    for target in named_targets(gm):
        owner, _, name = target.rpartition(".")
        body = getattr(gm.get_submodule(owner), name)
        if isinstance(body, GraphModule):
            setattr(new.get_submodule(owner), name, copies.get(body) or _copy(body, copies))
    return new
