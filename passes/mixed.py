"""The most sensitive operations go back to higher precision: static -> run-time range -> float, decided on data.

The graph is quantized on a copy, and what each operation loses alone is measured there (see qgraph/losses.py). Those chosen get an
Override, which annotate honours where no rule names the operation, so that integer regions are solved around them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch.fx import GraphModule, Node

from qgraph.annotate import OVERRIDE, Override
from qgraph.edit import copy_graph, graph_modules
from qgraph.errors import RecipeError
from qgraph.ledger import state
from qgraph.losses import Loss, Sensitivity, losses
from qgraph.observe import Observer
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.passes.insert_observers import InsertObservers
from qgraph.pipeline import EXACT, Context, Contract, Pass
from qgraph.recipe import Recipe
from qgraph.sweep import sweep


@dataclass(frozen=True)
class Mixed(Pass):
    """The stage `+mixed`. Which operations go back:

    1. metric "sqnr" with `threshold`: those that lose more, alone, than `threshold` dB allow.
    2. metric "sqnr" without: the worst `fraction` of all, rounded up.
    3. metric "iqr": those whose input has an outlying interquartile range (hybrid quantization).
    At most `keep` of them, the worst first. One with a static range gets its range at run time instead if the backend has a kernel for
    that and it then loses no more than what is allowed (case 1), than the first that stays (2), or 6 dB (a bit) less than before (3).

    Raises RecipeError outside a recipe, whose formats it needs, and for options without meaning; CalibrationError without data."""

    name: ClassVar[str] = "mixed"
    contract: ClassVar[Contract] = EXACT
    needs_data: ClassVar[bool] = True

    metric: Literal["sqnr", "iqr"] = "sqnr"
    threshold: float | None = None
    fraction: float = 0.1
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in ("sqnr", "iqr"):
            raise RecipeError(f"stage mixed: metric is 'sqnr' or 'iqr', not {self.metric!r}")
        if not 0 <= self.fraction <= 1:
            raise RecipeError(f"stage mixed: fraction is from 0 to 1, not {self.fraction!r}")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of operations that go back. A graph that has overrides is left as it is."""
        parts = list(graph_modules(gm))
        if any(OVERRIDE in n.meta for part in parts for n in part.graph.nodes):
            return 0
        observe = next((p for p in state(gm).pending if isinstance(p, InsertObservers)), None)
        if observe is None:
            raise RecipeError("stage mixed looks at the formats of a recipe: name it in one, such as w8a8+mixed, and call qgraph.calibrate")
        nodes = {(i, n.name): n for i, part in enumerate(parts) for n in part.graph.nodes}
        count = 0
        for row, limit in self.chosen(_measured(gm, observe, ctx)):
            override(nodes[row.place], observe.recipe, row, limit, by=f"stage {self.name}")
            count += 1
        return count

    def chosen(self, found: Sensitivity) -> Iterator[tuple[Loss, float]]:
        """(operation, the SQNR in dB from which it may stay quantized)"""
        worst = [row for row in found if row.sqnr < math.inf]
        if self.metric == "iqr":
            some = [(row, row.sqnr + 6.02) for row in worst if row.outlier]
        elif self.threshold is not None:
            some = [(row, self.threshold) for row in worst if row.sqnr < self.threshold]
        else:
            count = math.ceil(self.fraction * len(found))
            limit = worst[count].sqnr if count < len(worst) else math.inf
            some = [(row, limit) for row in worst[:count]]
        yield from some[: self.keep]


def override(node: Node, recipe: Recipe, row: Loss, limit: float, *, by: str) -> None:
    """Notes that `node` is to be computed at higher precision, and why."""
    lost = f"{row.sqnr:.1f} dB when quantized alone" + (f", interquartile range {row.iqr:.3g}" if row.outlier else "")
    dynamic = recipe.activations if row.run_time_sqnr is not None and row.run_time_sqnr >= limit else None
    if dynamic is not None:
        at_run_time = replace(dynamic, dynamic=True)
        node.meta[OVERRIDE] = Override(
            recipe.weights, at_run_time, f"{by} ({lost}, {row.run_time_sqnr:.1f} dB with a range found at run time)"
        )
    else:
        node.meta[OVERRIDE] = Override(None, None, f"{by} ({lost})")


def _measured(gm: GraphModule, observe: InsertObservers, ctx: Context) -> Sensitivity:
    trial = copy_graph(gm)
    state(trial).pending, state(trial).recipe = (), observe.recipe
    observe.run(trial, Context())
    if any(isinstance(m, Observer) for m in trial.modules()):
        sweep(trial, ctx.data if ctx.data is not None else (), label="ranges", progress=ctx.progress)
    InsertFakeQuant.of(trial).run(trial, Context())
    return losses(trial, ctx.data, run_time=observe.placement.dynamic, progress=ctx.progress)
