"""The most sensitive operations go back to higher precision: static -> run-time range -> float, decided on data.

The graph is quantized on a copy, and what each operation loses alone is measured there (see qgraph/losses.py). Those chosen get an
Override, which annotate honours where no rule names the operation, so that integer regions are solved around them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from typing import ClassVar, Literal

from torch.fx import GraphModule, Node

from qgraph.backend import Placement
from qgraph.edit import copy_graph, graph_modules
from qgraph.effects import Effects, Place
from qgraph.errors import RecipeError
from qgraph.formats import OVERRIDE, SITES, Override, run_time_format
from qgraph.isolate import Isolated, source
from qgraph.ledger import state
from qgraph.losses import Loss, Sensitivity, decibel, losses
from qgraph.observe import Observer
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.passes.insert_observers import InsertObservers
from qgraph.pipeline import EXACT, Context, Contract, Pass, Pipeline
from qgraph.sweep import sweep
from qgraph.types import QSpec
from qgraph.views import view_any

LESS = 1.0
"""dB that ranges found at run time must gain to be worth their time."""


@dataclass(frozen=True)
class Mixed(Pass):
    """The stage `+mixed`. Which operations go back:

    1. `target`, dB of the model's outputs: those that gain most for what they cost, until the sum of what all operations lose alone
       is that small. Operations that read the same value go together. The rest of the model runs twice on `samples` samples for each of them.
    2. `threshold`, dB: those whose own output loses more, when they alone are quantized.
    3. neither, metric "sqnr": the worst `fraction` of all, rounded up, by the same measure.
    4. metric "iqr": those whose input has an outlying interquartile range (hybrid quantization).
    At most `keep` of them, the worst first. A static range gives way to ranges found at run time (per row where the backend can) if these
    lose less; else the operation goes to float, in case 2 only if it is more than `slack` dB below the threshold.

    Raises RecipeError outside a recipe, whose formats it needs, and for options without meaning; CalibrationError without data."""

    name: ClassVar[str] = "mixed"
    contract: ClassVar[Contract] = EXACT
    needs_data: ClassVar[bool] = True

    metric: Literal["sqnr", "iqr"] = "sqnr"
    target: float | None = None
    threshold: float | None = None
    fraction: float = 0.1
    keep: int | None = None
    slack: float = 6.0
    samples: int = 16

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
        trial = trial_of(gm, observe, ctx, self)
        if self.target is not None:
            found = effective(Effects(trial, ctx.data or (), samples=self.samples), observe.placement, self.target)
        else:
            found = self.chosen(losses(trial, ctx.data, placement=observe.placement, progress=ctx.progress))
        nodes = {(i, n.name): n for i, part in enumerate(parts) for n in part.graph.nodes}
        return sum(_override(nodes[change.place], observe, change) for change in islice(found, self.keep))

    def chosen(self, found: Sensitivity) -> Iterator[Change]:
        """By what operations lose themselves."""
        worst = [row for row in found if row.sqnr < math.inf]
        if self.metric == "iqr":
            yield from (_change(row, row.sqnr + LESS) for row in worst if row.outlier)
        elif self.threshold is not None:
            low = self.threshold - self.slack
            for row in worst:
                change = _change(row, max(low, row.sqnr + LESS))
                if row.sqnr < self.threshold and (change.run_time or row.sqnr < low):
                    yield change
        else:
            count = math.ceil(self.fraction * len(found))
            limit = worst[count].sqnr if count < len(worst) else math.inf
            yield from (_change(row, limit - self.slack) for row in worst[:count])


@dataclass(frozen=True)
class Change:
    """An operation that goes back, to ranges found at run time or to float, and why."""

    place: Place
    run_time: bool
    reason: str


def _change(row: Loss, least: float) -> Change:
    """Ranges found at run time must reach `least` dB."""
    lost = f"{row.sqnr:.1f} dB when quantized alone" + (f", interquartile range {row.iqr:.3g}" if row.outlier else "")
    if row.run_time_sqnr is None or row.run_time_sqnr < max(least, row.sqnr):
        return Change(row.place, False, lost)
    return Change(row.place, True, f"{lost}, {row.run_time_sqnr:.1f} dB with ranges found at run time")


def effective(effects: Effects, placement: Placement, target: float) -> Iterator[Change]:
    """By what the model's outputs lose: steps of what gains most for its cost, until the sum is within `target` dB."""
    readers: dict[Node, list[Place]] = {}
    for place, site in effects.sites.items():
        readers.setdefault(source(site.x), []).append(place)
    specs = {place: _run_time_spec(site, placement) for place, site in effects.sites.items()}
    lost = effects.alone({place: dict.fromkeys((None, spec)) for place, spec in specs.items()})
    at_run_time = {place: math.inf if spec is None else lost[place][spec] for place, spec in specs.items()}
    steps = {value: _Steps.of([(p, lost[p][None], at_run_time[p]) for p in places]) for value, places in readers.items()}
    total, allowed = sum(s.losses[0] for s in steps.values()), 10 ** (-target / 10)
    while total > allowed and steps:
        value = max(steps, key=lambda v: steps[v].worth)
        now = steps.pop(value)
        total -= now.gain
        if len(now.losses) > 2:
            steps[value] = replace(now, losses=now.losses[1:])
        for place in now.places:
            yield Change(place, len(now.losses) > 2, f"costs the output {_db(now.losses[0])}, {_db(now.losses[1])} afterwards")


FLOAT_COSTS = 4.0
"""What it costs to compute an operation in float, where ranges found at run time cost 1."""


@dataclass(frozen=True)
class _Steps:
    """Operations that read one value, and what they lose together: now, [with ranges found at run time,] in float."""

    places: tuple[Place, ...]
    losses: tuple[float, ...]

    @property
    def gain(self) -> float:
        return self.losses[0] - self.losses[1]

    @property
    def worth(self) -> float:
        return self.gain if len(self.losses) > 2 else self.gain / FLOAT_COSTS

    @staticmethod
    def of(lost: list[tuple[Place, float, float]]) -> _Steps:
        """(operation, what it loses now, with ranges found at run time, inf where there is no such format)."""
        places, now, at_run_time = zip(*lost, strict=True)
        gains = sum(at_run_time) < sum(now) * 10 ** (-LESS / 10)
        return _Steps(places, (sum(now), sum(at_run_time), 0.0) if gains else (sum(now), 0.0))


def _run_time_spec(site: Isolated, placement: Placement) -> QSpec | None:
    """The most accurate format with a range found at run time; None where x has it already, or where the backend has nothing of the kind."""
    x = site.formats[1]
    found = None if x is None else run_time_format(view_any(SITES, site.node), placement)
    spec = None if found is None else found.activation_spec()
    return None if spec == x else spec


def _db(share: float) -> str:
    return f"{decibel(1.0, share):.1f} dB"


def _override(node: Node, observe: InsertObservers, change: Change) -> int:
    format = run_time_format(view_any(SITES, node), observe.placement) if change.run_time else None
    weights = observe.recipe.weights if change.run_time else None
    node.meta[OVERRIDE] = Override(weights, format, f"stage {Mixed.name} ({change.reason})")
    return 1


def trial_of(
    gm: GraphModule, observe: InsertObservers, ctx: Context, asking: Pass, *, instead: InsertObservers | None = None
) -> GraphModule:
    """The graph as it would be quantized by `observe`, which is pending, or by another `instead`, behind the stages that are still to change
    the float graph, but those of the kind that asks."""
    trial, used = copy_graph(gm), instead or observe
    waiting = [p for p in takewhile(lambda p: p is not observe, state(gm).pending) if type(p) is not type(asking)]
    Pipeline(*waiting).run(trial, Context(data=ctx.data, progress=ctx.progress))
    state(trial).pending, state(trial).recipe = (), used.recipe
    used.run(trial, Context())
    if any(isinstance(m, Observer) for m in trial.modules()):
        sweep(trial, ctx.data if ctx.data is not None else (), label="ranges", progress=ctx.progress)
    InsertFakeQuant.of(trial).run(trial, Context())
    return trial
