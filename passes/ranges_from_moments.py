"""observer(x) -> observer with the range [mean - s deviation, mean + s deviation] over the channels of x: static ranges without data.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 5: s = 6. Means and deviations come from
batch norms and norms (propagate.py), so they must be in the model, folded by qgraph or not yet folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.edit import graph_modules
from qgraph.errors import CalibrationError, RecipeError
from qgraph.ledger import FLOAT, Entry, Ledger, state
from qgraph.moments import MOMENTS, Moments, constant, normal, uniform
from qgraph.observe import Observer
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.propagate import Found, is_source, propagate
from qgraph.text import path_of, target_name
from qgraph.types import type_of
from qgraph.views import const_value


@dataclass(frozen=True)
class RangesFromMoments(Pass):
    """`inputs` says what the model's float inputs are: "normal" (mean 0 and deviation 1 per channel, as images are after normalisation), or
    [low, high] (anywhere between). Observers of values without statistics are left to data, with the reason in the ledger.

    Raises RecipeError for other inputs or sigmas, CalibrationError for a model in which no norm says anything."""

    contract: ClassVar[Contract] = EXACT
    at: ClassVar[Literal["float", "observed", "quantized"]] = "observed"
    fills_ranges: ClassVar[bool] = True

    inputs: Literal["normal"] | Sequence[float] = "normal"
    sigmas: float = 6.0

    def __post_init__(self) -> None:
        if self.inputs != "normal" and not _is_range(self.inputs):
            raise RecipeError(f'inputs is "normal" or a range such as [0, 1], got {self.inputs!r}')
        if not self.sigmas > 0:
            raise RecipeError(f"sigmas must be above 0, got {self.sigmas!r}")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        parts = list(graph_modules(gm))
        if not any(True for part in parts for _ in _observed(part)):
            return 0
        if not any(is_source(node) for part in parts for node in part.graph.nodes):
            raise CalibrationError(
                "no batch norm or norm in the model says how its values are distributed: export folds batch norms away, so take the model "
                "from before that, or a recipe whose ranges come from data, such as w8a8"
            )
        ledger = state(gm).ledger
        self._assume(gm, ledger)
        return sum(self._fill(part, ledger) for part in parts)

    def _assume(self, gm: GraphModule, ledger: Ledger) -> None:
        """Notes what the inputs are taken for, where nothing better is known, for this and later stages."""
        if isinstance(self.inputs, str):
            found, what = normal(torch.zeros(()), torch.ones(())), "normal, mean 0 and deviation 1"
        else:
            found, what = uniform(*self.inputs), f"between {self.inputs[0]:g} and {self.inputs[1]:g}"
        for node in gm.graph.nodes:
            kind = type_of(node)
            if node.op == "placeholder" and kind is not None and kind.is_float and MOMENTS not in node.meta:
                node.meta[MOMENTS] = found
                ledger.record(Entry(path_of(node), "input", "distribution", "assumed", self.name, f"taken as {what}; see option inputs"))

    def _fill(self, part: GraphModule, ledger: Ledger) -> int:
        known = propagate(part, sigmas=self.sigmas)
        sites: dict[Observer, list[Node]] = {}
        for found, value in _observed(part):
            sites.setdefault(found, []).append(value)
        return sum(self._set(found, values, known, ledger) for found, values in sites.items())

    def _set(self, observer: Observer, values: list[Node], known: dict[Node, Found], ledger: Ledger) -> int:
        """One range for all values that share the observer."""
        ranges = [_range(value, known) for value in values]
        missing = next((r for r in ranges if isinstance(r, str)), None)
        if observer.spec.axis is not None:
            missing = f"moments give one range per value, not {observer.spec}"
        bounds = [r for r in ranges if not isinstance(r, str)]
        for value in values:
            if missing is not None:
                decision, reason = FLOAT, missing
            else:
                decision = f"[{float(min(low for low, _ in bounds)):.4g}, {float(max(high for _, high in bounds)):.4g}]"
                reason = f"{self.sigmas:g} deviations around the means that norms give"
            ledger.record(Entry(path_of(value), target_name(value), "range", decision, self.name, reason))
        if missing is None:
            observer.set_range(torch.stack([low for low, _ in bounds]).amin(), torch.stack([high for _, high in bounds]).amax())
        return missing is None


def _is_range(value: object) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(n, int | float) for n in value)
    return numbers and value[0] < value[1]  # type: ignore[index]


def _observed(part: GraphModule) -> list[tuple[Observer, Node]]:
    """Observers that wait for a range, with the values that they watch."""
    called = [(part.get_submodule(str(n.target)), n) for n in part.graph.nodes if n.op == "call_module"]
    return [(m, n.all_input_nodes[0]) for m, n in called if isinstance(m, Observer) and not m.frozen]


def _range(value: Node, known: dict[Node, Found]) -> tuple[Tensor, Tensor] | str:
    """(low, high), or why it is not known."""
    stored = const_value(value)
    found = known.get(value, "nothing is known of it") if stored is None else constant(stored)
    if not isinstance(found, Moments):
        return found if isinstance(found, str) else "it has several outputs"
    low, high = found.low.amin(), found.high.amax()
    return (low, high) if bool(low.isfinite() & high.isfinite()) else "its range is not finite"
