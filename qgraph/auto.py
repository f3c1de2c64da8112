"""auto(model, batches): the fastest program whose metric stays within a budget.

The workflow of Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation" (2020,
arXiv 2004.09602, section 6), with measured latency: weights per channel, the best of the calibrators, then partial quantization in the
order of sensitivity.

1. Families: static ranges with each calibrator, ranges at run time, per token. Each recipe is tried once; calibrators share a latency.
2. For each family that is clearly faster than the best answer and not within the budget, the fastest first:
   a. corrections, one after the other, each kept where it helps;
   b. the fewest operations, most sensitive first, that must go back to run-time ranges or to float, by bisection.
3. The answer is the fastest trial within the budget, the float model where none is faster than it.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch.fx import GraphModule

from qgraph.annotate import labels
from qgraph.api import PREPARE, Model, as_graph, check_float, convert
from qgraph.backend import Backend, Placement, Translator, get_backend
from qgraph.edit import copy_graph, graph_modules
from qgraph.errors import RecipeError, nearest
from qgraph.formats import SITES, run_time_format, sites
from qgraph.journal import Journal, fingerprint
from qgraph.ledger import FLOAT, Entry, state
from qgraph.losses import Loss, losses
from qgraph.observe import OBSERVERS
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.pipeline import Context, Pipeline
from qgraph.recipe import STAGES, Int
from qgraph.score import METRICS, Metric, Timer, seconds_of
from qgraph.sweep import arranged, replayable
from qgraph.text import target_name
from qgraph.tradeoff import Candidate, Tradeoff, Trial
from qgraph.trials import Bench
from qgraph.views import view_any

log = logging.getLogger(__name__)

CALIBRATORS: tuple[tuple[str, ...], ...] = (
    ("observer=percentile", "observer_options.percentile=99.99"),
    ("observer=percentile", "observer_options.percentile=99.999"),
    ("observer=entropy",),
    ("observer=mse",),
)
FAMILIES = ("w8a8", "w8a8-dynamic", "w8a8-token-asym", "w8a8-encoder")
CORRECTIONS = ("bias-correct", "round", "smoothquant")
"""Stages that may raise the metric at the same latency; those that exist are tried, in the order in which a recipe runs them."""
MAX_DROP = 0.01
GAIN = 0.95
"""What is worth more trials must be this much faster than the answer so far: less is within the noise of latencies."""


def auto(
    model: Model,
    batches: Iterable[Any] | None,
    *,
    example_inputs: Any = None,
    backend: str | Backend = "onnxruntime",
    dynamic_shapes: Any = None,
    metric: str | Metric = "sqnr",
    max_drop: float | None = None,
    evaluation: Iterable[Any] | None = None,
    latency_inputs: Any = None,
    candidates: Sequence[str] = FAMILIES,
    resume: str | PathLike[str] | None = None,
    progress: bool | None = None,
    timer: Timer = seconds_of,
) -> GraphModule:
    """The quantized graph, or the float one where nothing faster keeps the budget; `meta["qgraph"].tradeoff` is a Tradeoff with all trials.

    `metric` is a function (run, evaluation batches) -> float, higher is better, where run(batch) gives the outputs as tensors in the order
    of the graph; or "sqnr": 1 - error power / signal power against the float outputs, so that a drop of 0.01 is an SQNR of 20 dB; or
    "agreement": the share of rows whose largest element stays the largest. `max_drop` (0.01) is how much lower than the float model's
    it may be. `evaluation` should be data that `batches` has not; without it the metric is taken on `batches`, and flatters.
    Latency is measured on `latency_inputs`, one batch, by default the first of `batches`.
    A torch module is translated for the backend once, so the result returns its outputs as a flat list.

    `resume` is a file: finished trials are kept there, and a call with the same model, data, metric and versions does not repeat them.
    Raises CalibrationError, RecipeError, ModelError as prepare and calibrate do; a candidate that fails is a trial with a failure."""
    if max_drop is not None and not max_drop >= 0:
        raise RecipeError(f"max_drop is how much the metric may fall, 0 or more, not {max_drop!r}")
    if isinstance(metric, str) and metric not in METRICS:
        raise RecipeError(f"unknown metric {metric!r}{nearest(metric, METRICS)}; or give a function of (run, batches)")
    data = replayable(batches, "recipe auto")
    held_out = data if evaluation is None else replayable(evaluation, "recipe auto")
    target = get_backend(backend)
    base = _base(as_graph(model, example_inputs, dynamic_shapes=dynamic_shapes), target)
    sample = next(islice(arranged(base, data if latency_inputs is None else [latency_inputs]), 1), None)
    if sample is None:
        raise RecipeError("recipe auto has no data: the batches are empty")
    name = metric if isinstance(metric, str) else f"{metric.__module__}.{getattr(metric, '__qualname__', type(metric).__name__)}"
    path = None if resume is None else Path(resume)
    key = "" if path is None else fingerprint(base, (data, held_out, [sample[1]]), (name, target.name))
    bench = Bench(base, target, data, held_out, metric, sample[1], Journal(path, key), timer, _console(progress))
    search = Search(bench, MAX_DROP if max_drop is None else max_drop, tuple(candidates))
    return search.result(name)


def _base(gm: GraphModule, target: Backend) -> GraphModule:
    """The float graph that all trials start from: canonical, and in the operators of the backend, so that it is translated only once."""
    check_float(gm)
    Pipeline(*PREPARE).run(gm)
    if isinstance(target, Translator):
        gm = target.translate(gm)
        Pipeline(*PREPARE).run(gm)
    return gm


def _console(progress: bool | None) -> Console:
    shown = sys.stderr.isatty() if progress is None else progress
    return Console(stderr=True, quiet=not shown)


@dataclass
class Search:
    bench: Bench
    max_drop: float
    families: tuple[str, ...]

    def result(self, metric: str) -> GraphModule:
        best = self.run()
        tradeoff = Tradeoff(metric, self.bench.float_metric, self.max_drop, tuple(self.bench.done.values()), best)
        gm = _unquantized(self.bench.base, tradeoff) if best is None else convert(self.bench.calibrated(best.candidate))
        found = state(gm)
        found.tradeoff = tradeoff
        if found.recipe is not None and best is not None:
            found.recipe = replace(found.recipe, name=str(best.candidate))
        log.info("%s", tradeoff.statement)
        self.bench.console.print(tradeoff.table(), tradeoff.statement, sep="\n")
        return gm

    def run(self) -> Trial | None:
        found = [t for name in self.families if (t := self.family(name)) is not None]
        for t in sorted(found, key=lambda t: t.ratio):
            if self.within(t) or t.ratio >= self.worth():
                continue
            t = self.corrected(t)
            if not self.within(t):
                self.partial(t)
        return self.best()

    def within(self, t: Trial) -> bool:
        return not t.failure and t.within(self.max_drop)

    def best(self) -> Trial | None:
        """The fastest trial within the budget; None where that is the float model."""
        good = [t for t in self.bench.done.values() if self.within(t) and t.ratio < 1]
        return min(good, key=lambda t: (t.ratio, t.drop), default=None)

    def worth(self) -> float:
        """The latency that a program must have to be worth more trials: that of the best answer so far, less a gain that is no noise."""
        best = self.best()
        return GAIN * (1 if best is None else best.ratio)

    def family(self, name: str) -> Trial | None:
        """The trial with the best of the calibrators. They do not change the latency: where the first is not faster than float, it remains."""
        first = Candidate(name)
        tried = [self.bench.trial(first)]
        if first.recipe.static and not tried[0].ratio >= 1:  # NaN after a failure
            return self.least(tried, (Candidate(name, c) for c in CALIBRATORS if c[0].removeprefix("observer=") in OBSERVERS))
        return self.least(tried, ())

    def least(self, tried: list[Trial], others: Iterable[Candidate]) -> Trial | None:
        """The trial with the least drop; others are as fast as the first."""
        for candidate in others:
            known = next((t.ratio for t in tried if not t.failure), None)
            tried.append(self.bench.trial(candidate, ratio=known))
        return min((t for t in tried if not t.failure and not math.isnan(t.drop)), key=lambda t: t.drop, default=None)

    def corrected(self, t: Trial) -> Trial:
        """With each correction that lowers the drop. Their latency is measured: a correction may leave operations behind."""
        worth = self.worth()
        for stage in CORRECTIONS:
            if stage in STAGES and not self.within(t):
                with_it = self.bench.trial(replace(t.candidate, name=f"{t.candidate.name}+{stage}"))
                if with_it.drop < t.drop and with_it.ratio < worth:  # False after a failure
                    t = with_it
        return t

    def partial(self, t: Trial) -> None:
        """Bisection for the fewest operations that must go back; it ends early where more of them would be no faster than the answer."""
        quantized = self.bench.calibrated(t.candidate)
        InsertFakeQuant.of(quantized).run(quantized, Context())
        rows = losses(quantized, self.bench.data, placement=self.bench.target.placement, progress=False).rows
        names, formats = _patterns(quantized), _run_time(quantized, self.bench.target.placement)
        few, many, worth = 0, len(rows), self.worth()
        while many - few > 1:
            count = (few + many) // 2
            limit = rows[count].sqnr
            back = tuple(f"rules.{names[row.place]}={_higher(row, limit, formats.get(row.place))}" for row in rows[:count])
            found = self.bench.trial(replace(t.candidate, overrides=t.candidate.overrides + back))
            if self.within(found):
                many = count
            elif found.failure or found.ratio >= worth:
                return
            else:
                few = count


def _higher(row: Loss, limit: float, run_time: Int | None) -> str:
    """The rule for an operation that goes back: ranges found at run time if it then loses no more than what stays."""
    if run_time is None or row.run_time_sqnr is None or row.run_time_sqnr < limit:
        return "null"
    given = {name: value for name, value in asdict(run_time).items() if value is not None}
    return yaml.safe_dump({"activations": given}, default_flow_style=True, width=10**6).strip()


def _run_time(gm: GraphModule, placement: Placement) -> dict[tuple[int, str], Int]:
    """place -> the format with ranges found at run time, where the backend has one."""
    found = (((i, node.name), run_time_format(v, placement)) for i, part in enumerate(graph_modules(gm)) for node, v in sites(part))
    return {place: f for place, f in found if f is not None}


def _patterns(gm: GraphModule) -> dict[tuple[int, str], str]:
    """place -> a rule's pattern for that operation alone: its label, or the FX name where that is no unique or no plain name."""
    found = {}
    for number, part in enumerate(graph_modules(gm)):
        for node, label in labels(part).items():
            plain = not set(label) & set("=*?[:")
            found[number, node.name] = label if plain else node.name
    return found


def _unquantized(base: GraphModule, tradeoff: Tradeoff) -> GraphModule:
    """The float model as an answer; the ledger says why."""
    gm = copy_graph(base)
    found = state(gm)
    found.stage = "converted"
    for part in graph_modules(gm):
        for node, label in labels(part).items():
            if view_any(SITES, node) is not None:
                found.ledger.record(Entry(label, target_name(node), "weight", FLOAT, "auto", tradeoff.statement))
    return gm
