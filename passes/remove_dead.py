"""Removes nodes that nothing reads, and stored tensors and submodules that no node names; in bodies of control flow too.

What has an effect, draws random numbers, or is not understood stays (see `qgraph.edit.is_pure`), and so do inputs of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from torch.fx import GraphModule
from torch.nn import Module

from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.rewrite import erase, graph_modules, is_pure


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Dead code and dead data. The count is nodes plus tensors and submodules removed."""

    contract: ClassVar[Contract] = EXACT

    def run(self, gm: GraphModule, ctx: Context) -> int:
        return sum(_remove(body) for body in list(graph_modules(gm)))


def _remove(gm: GraphModule) -> int:
    nodes = _dead_nodes(gm)
    data = _dead_data(gm)
    if nodes:
        gm.graph.lint()
        gm.recompile()
    return nodes + data


def _dead_nodes(gm: GraphModule) -> int:
    before = len(gm.graph.nodes)
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and not node._erased and node.op not in ("placeholder", "output") and is_pure(node):
            erase(node)
    return before - len(gm.graph.nodes)


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
