"""x -> observer(x) on every edge that the recipe and the placement quantize statically; other formats are noted on their node.

The module stays float: an observer is the identity. Formats of weights and of dynamic activations wait in `node.meta["quantize"]`
(role -> QSpec) until insert_fake_quant. A graph that holds observers is left as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule, Node

from qgraph.annotate import annotate, check_rules
from qgraph.backend import Placement
from qgraph.edit import Prologue, graph_modules
from qgraph.errors import ModelError, RecipeError
from qgraph.formats import QUANTIZE
from qgraph.ledger import Ledger, state
from qgraph.observe import Observer, observer
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.recipe import Recipe
from qgraph.regions import Group
from qgraph.scales import WAYS
from qgraph.text import path_of
from qgraph.types import QSpec


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Annotates with `recipe` for a backend with `placement`, and inserts one observer per group of values that share a scale.

    Raises RecipeError for a rule that matches nothing, ModelError for a graph in which nothing can be quantized."""

    name: ClassVar[str] = "insert_observers"
    contract: ClassVar[Contract] = EXACT

    recipe: Recipe
    placement: Placement

    def __post_init__(self) -> None:
        if self.recipe.weight_range not in WAYS:  # an unknown one fails before any data is run
            observer(self.recipe.weight_range, QSpec(), **self.recipe.weight_range_options)
        elif self.recipe.weight_range_options:
            raise RecipeError(
                f"weight_range={self.recipe.weight_range!r} has no options, got {', '.join(self.recipe.weight_range_options)}"
            )

    def run(self, gm: GraphModule, ctx: Context) -> int:
        modules = list(graph_modules(gm))
        if any(isinstance(m, Observer) for m in gm.modules()) or any(QUANTIZE in n.meta for g in modules for n in g.graph.nodes):
            return 0
        check_rules(modules, self.recipe)
        ledger, count = state(gm).ledger, 0
        for part in modules:
            found = annotate(part, self.recipe, self.placement, ledger)
            for node, specs in found.operands.items():
                node.meta[QUANTIZE] = specs
            prologue = Prologue(part)
            for i, group in enumerate(found.groups):
                self.observe(part, prologue, f"observer_{i}", group)
            part.graph.lint()
            part.recompile()
            count += len(found)
        if not count and self.recipe.kv_cache is None:
            raise _nothing(gm, self.recipe, ledger)
        return count

    def check(self, gm: GraphModule) -> None:
        """Raises what `run` would raise, without changing the graph: for recipes whose stages need data first."""
        modules, scratch = list(graph_modules(gm)), Ledger()
        check_rules(modules, self.recipe)
        count = sum(len(annotate(part, self.recipe, self.placement, scratch)) for part in modules)
        if not count and self.recipe.kv_cache is None:
            raise _nothing(gm, self.recipe, scratch)

    def observe(self, gm: GraphModule, prologue: Prologue, target: str, group: Group) -> None:
        """One observer, called once for each value of the group, between the value and those that read it quantized."""
        label = " = ".join(path_of(v) for v in group.consumers)
        options: Mapping[str, object] = self.recipe.observer_options
        gm.add_submodule(target, observer(self.recipe.observer, group.spec, name=label, **options))
        for value, consumers in group.consumers.items():
            with gm.graph.inserting_before(prologue.after(value)):
                watched: Node = gm.graph.call_module(target, (value,))
            watched.meta.update({k: value.meta[k] for k in ("val", "type") if k in value.meta})
            for consumer in consumers:
                consumer.replace_input_with(value, watched)


def _nothing(gm: GraphModule, recipe: Recipe, ledger: Ledger) -> ModelError:
    return ModelError(f"nothing to quantize in this model with recipe {recipe.name}: {'; '.join(_obstacles(gm, ledger))}")


def _obstacles(gm: GraphModule, ledger: Ledger) -> list[str]:
    """Why nothing was quantized, the most frequent reasons first."""
    found = [reason for reason, _ in Counter(e.reason for e in ledger).most_common(3)]
    if getattr(gm.meta.get("onnx_model"), "functions", None):
        found.append("the model's own functions are not looked into, inline them with onnx.inliner.inline_local_functions")
    if any(reason.startswith("does not pay") for reason in found):
        found.append("a rule that names an operation quantizes it all the same")
    return found or ["it has no linear, convolution or embedding"]
