"""Removes nodes that nothing reads, and stored tensors and submodules that no node names; in bodies of control flow too.

What has an effect, draws random numbers, or is not understood stays (see `qgraph.edit.is_pure`), and so do inputs of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from torch.fx import GraphModule, Node
from torch.nn import Module

from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import erase, graph_modules, is_pure


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Dead code and dead data. The count is calls plus stored tensors and submodules removed."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(_remove(body) for body in graph_modules(gm))


def _remove(gm: GraphModule) -> int:
    before = len(gm.graph.nodes)
    count = _dead_nodes(gm) + _dead_data(gm)
    if len(gm.graph.nodes) != before:
        gm.graph.lint()
        gm.recompile()
    return count


def _dead_nodes(gm: GraphModule) -> int:
    """The number of calls removed; reads of stored tensors are counted with the tensors."""
    removed: list[Node] = []
    for node in reversed(list(gm.graph.nodes)):
        if not node._erased and not node.users and node.op not in ("placeholder", "output") and is_pure(node):
            removed += erase(node)[0]
    return sum(n.op != "get_attr" for n in removed)


def _dead_data(gm: GraphModule) -> int:
    """Delete attributes of `gm` whose path no node names; a submodule that a node names stays whole."""
    used = {str(n.target) for n in gm.graph.nodes if n.op in ("get_attr", "call_module")}
    if (model := gm.meta.get("onnx_model")) is not None:
        used |= set(model.functions.values())  # part of the file whether called or not
    owners = {target[:i] for target in used for i, c in enumerate(target) if c == "."}
    return _prune(gm, "", used, owners)


def _prune(module: Module, path: str, used: set[str], owners: set[str]) -> int:
    count = 0
    for name in [*module._parameters, *module._buffers, *_plain(module)]:
        if path + name not in used:
            delattr(module, name)
            count += 1
    for name, child in list(module._modules.items()):
        if path + name in used or child is None:
            continue
        if path + name in owners:
            count += _prune(child, f"{path}{name}.", used, owners)
        else:
            delattr(module, name)
            count += 1
    return count


def _plain(module: Module) -> list[str]:
    """Constants of types that torch lacks."""
    return [name for name, value in vars(module).items() if isinstance(value, ir.TensorProtocol)]
