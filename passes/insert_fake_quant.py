"""observer(x) -> fake_quantize(x, scale, zero_point): what was observed becomes numbers, still computed in float.

Weights that insert_observers has noted are wrapped as well, with scales from their own values, in fake_lookup where their format is a
codebook, and dynamic activations become dequantize(dynamic_quantize(x)). From here a model can be trained (QAT) or folded to integers
(fold_fake_quant).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from qgraph.codebook import fit
from qgraph.edit import Prologue, add_constant, graph_modules
from qgraph.errors import CalibrationError
from qgraph.formats import QUANTIZE
from qgraph.ledger import state
from qgraph.observe import Observer, require_finite
from qgraph.passes.weigh_channels import importance
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.scales import grid_of
from qgraph.text import path_of
from qgraph.types import QSpec, type_of
from qgraph.views import Conv, Embedding, Linear, const_value, view_any

qg = torch.ops.qgraph
Names = tuple[str, str | None]
"""Targets of a scale and of a zero point (None: 0)."""


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Ranges of weights are chosen from their values as the observer of the kind `weight_range`, with `options`, chooses.

    Raises CalibrationError for an observer that has seen no data, and for a weight that is not finite."""

    name: ClassVar[str] = "insert_fake_quant"
    contract: ClassVar[Contract] = LOSSY

    weight_range: str = "minmax"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, gm: GraphModule) -> InsertFakeQuant:
        """The pass that the recipe of a prepared graph asks for."""
        recipe = state(gm).recipe
        return cls() if recipe is None else cls(recipe.weight_range, recipe.weight_range_options)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        _require_data(gm)
        return sum(_Insert(part, self).run() for part in graph_modules(gm))


def _require_data(gm: GraphModule) -> None:
    """All that lacks data at once: a branch that never ran has many such values."""
    found = [
        (node, user)
        for part in graph_modules(gm)
        for node in part.graph.nodes
        if node.op == "call_module" and isinstance(seen := part.get_submodule(str(node.target)), Observer) and not seen.seen
        for user in node.users
        if not seen.infinite
    ]
    if len(found) > 1:
        value, reader = path_of(found[0][0].all_input_nodes[0]), path_of(found[0][1])
        raise CalibrationError(
            f"{len(found)} operands were never observed, the first is {value!r} of {reader!r}; calibrate with data that reaches them, "
            f"or leave these operations in float by rules, such as rules.{reader}=null"
        )


class _Insert:
    """One graph. A constant, or a value, that several consumers read in the same format is quantized once."""

    def __init__(self, gm: GraphModule, wanted: InsertFakeQuant) -> None:
        self.gm, self.prologue, self.wanted = gm, Prologue(gm), wanted
        self.weights: dict[tuple[str, QSpec], Node] = {}
        self.dynamic: dict[tuple[Node, QSpec], Node] = {}
        self.scales: dict[str, Names] = {}
        self.spent: list[Node] = []

    def run(self) -> int:
        count = 0
        for node in list(self.gm.graph.nodes):
            if node.op == "call_module" and isinstance(found := self.gm.get_submodule(str(node.target)), Observer):
                self.observed(node, found)
                count += 1
            for role, spec in node.meta.pop(QUANTIZE, {}).items():
                v: Any = view_any((Linear, Conv, Embedding), node)
                value = v.weight if role == "weight" else v.x
                node.replace_input_with(value, self.weight(value, spec) if role == "weight" else self.at_run_time(value, spec))
                count += 1
        if count:
            for node in self.spent:
                self.gm.graph.erase_node(node)
            for target in self.scales:  # torch's delete_all_unused_submodules would take bodies of control flow, too
                self.gm.delete_submodule(target)
            self.gm.graph.lint()
            self.gm.recompile()
        return count

    def observed(self, node: Node, found: Observer) -> None:
        (value,) = node.all_input_nodes
        target = str(node.target)
        if target not in self.scales:
            self.scales[target] = self.constants(path_of(value), *found.qparams(_float_dtype(value, found)))
        node.replace_all_uses_with(self.fake_quantize(value, self.scales[target], found.spec))
        self.spent.append(node)  # not erased yet: the first of them marks the place after the inputs

    def weight(self, value: Node, spec: QSpec) -> Node:
        key = (str(value.target), spec)
        if key not in self.weights:
            tensor = const_value(value)
            if tensor is None:
                raise AssertionError(f"annotate gave a weight format to {path_of(value)}, which is no constant")
            if spec.codebook is not None:
                self.weights[key] = self.fake_lookup(value, tensor, spec)
                return self.weights[key]
            way, options = self.wanted.weight_range, self.wanted.options
            names = self.constants(str(value.target), *grid_of(tensor, spec, way, importance(value), name=path_of(value), **options))
            self.weights[key] = self.fake_quantize(value, names, spec)
        return self.weights[key]

    def constants(self, hint: str, scale: torch.Tensor, zero_point: torch.Tensor | None) -> Names:
        return (
            add_constant(self.gm, f"{hint}_scale", scale),
            None if zero_point is None else add_constant(self.gm, f"{hint}_zero_point", zero_point),
        )

    def fake_quantize(self, value: Node, names: Names, spec: QSpec) -> Node:
        graph = self.gm.graph
        with graph.inserting_before(self.prologue.after(value)):
            scale, zero_point = (None if n is None else graph.get_attr(n) for n in names)
            new = graph.call_function(qg.fake_quantize.default, (value, scale, zero_point, spec.dtype, spec.axis, spec.group))
        return self.described(new, value)

    def fake_lookup(self, value: Node, weight: torch.Tensor, spec: QSpec) -> Node:
        require_finite(weight, path_of(value))
        found = fit(weight, spec, importance(value), search=self.wanted.weight_range)
        graph, hint, where = self.gm.graph, str(value.target), (found.table_axis, found.axis, found.group)
        table = add_constant(self.gm, f"{hint}_table", found.table)
        scale = None if found.scale is None else add_constant(self.gm, f"{hint}_scale", found.scale)
        with graph.inserting_before(self.prologue.after(value)):
            levels = (graph.get_attr(table), None if scale is None else graph.get_attr(scale))
            new = graph.call_function(qg.fake_lookup.default, (value, *levels, *where))
        return self.described(new, value)

    def at_run_time(self, value: Node, spec: QSpec) -> Node:
        if (value, spec) not in self.dynamic:
            graph = self.gm.graph
            with graph.inserting_before(self.prologue.after(value)):
                found = graph.call_function(qg.dynamic_quantize.default, (value, spec.dtype, spec.symmetric, spec.axis, spec.group))
                q, scale, zero_point = (graph.call_function(operator.getitem, (found, i)) for i in range(3))
                new = graph.call_function(qg.dequantize.default, (q, scale, zero_point, spec.dtype, spec.axis, spec.group))
            self.dynamic[value, spec] = self.described(new, value)
        return self.dynamic[value, spec]

    def described(self, new: Node, value: Node) -> Node:
        """The new node has the type and the origin of the value that it represents."""
        new.meta.update({k: value.meta[k] for k in ("val", "type", "nn_module_stack", "stack_trace") if k in value.meta})
        new.meta["from"] = InsertFakeQuant.name
        return new


def _float_dtype(value: Node, found: Observer) -> torch.dtype:
    """Scales have the float type of the value; what the observer saw tells it where the graph does not."""
    t = type_of(value)
    return getattr(torch, t.dtype) if t is not None and t.dtype is not None else found.dtype
