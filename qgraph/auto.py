"""auto(model, batches): the fastest program whose metric stays within a budget.

The workflow of Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation" (2020,
arXiv 2004.09602, section 6), with measured latency: weights per channel, the best of the calibrators, then partial quantization in the
order of sensitivity.

1. Families: static ranges with each calibrator; static ranges behind SmoothQuant with each of some alphas, where most layers are linear;
   ranges at run time; per token. Members of a family share a latency, and are tried until one keeps the budget.
2. For each family that is clearly faster than the best answer and not within the budget, the most accurate first, since an answer
   ends the search in those that would be no faster:
   a. corrections, one after the other, each kept where it helps;
   b. the fewest operations that must go back to ranges found at run time (per token where the backend has that) or to float, by
      bisection, in the order of what they cost the outputs.
3. The answer is the fastest trial within the budget, the float model where none is faster than it.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
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
from qgraph.effects import Effects
from qgraph.errors import RecipeError, nearest
from qgraph.formats import SITES, run_time_format, sites
from qgraph.journal import Journal, fingerprint
from qgraph.ledger import FLOAT, Entry, state
from qgraph.observe import OBSERVERS
from qgraph.passes import RoundWeights, SmoothQuant
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.passes.mixed import effective
from qgraph.pipeline import Context, Pipeline
from qgraph.recipe import Int
from qgraph.score import METRICS, Metric, Timer, seconds_of
from qgraph.stages import STAGES
from qgraph.sweep import arranged, replayable
from qgraph.text import target_name
from qgraph.tradeoff import Candidate, Tradeoff, Trial
from qgraph.trials import Bench
from qgraph.views import Conv, Embedding, Linear, is_const, view, view_any

log = logging.getLogger(__name__)

CALIBRATORS: tuple[tuple[str, ...], ...] = (
    ("observer=percentile", "observer_options.percentile=99.99"),
    ("observer=percentile", "observer_options.percentile=99.999"),
    ("observer=entropy",),
    ("observer=mse",),
)
FAMILIES = ("w8a8", "w8a8-dynamic", "w8a8-token-asym", "w8a8-encoder")
SMOOTHING = tuple((f"stages=[{{smoothquant: {{alpha: {alpha}, explicit: true}}}}]",) for alpha in (0.5, 0.6, 0.7))
"""Factors that go into products of their own where nothing else takes them in, which is worth it in front of static ranges."""

CORRECTIONS = ("smoothquant", "round", "bias-correct")
"""Stages that may raise the metric at the same latency; those that exist are tried, in this order, in which a recipe can run them."""
MAX_DROP = 0.01
SAMPLES = 8
"""Samples on which the order of operations is found."""

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
        found = [t for candidates in self.members() if (t := self.family(candidates)) is not None]
        for t in sorted(found, key=lambda t: t.drop):
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

    def members(self) -> Iterator[list[Candidate]]:
        """Families: candidates that are about as fast."""
        for name in self.families:
            calibrators = CALIBRATORS if (static := Candidate(name).recipe.static) else ()
            known = [c for c in calibrators if c[0].removeprefix("observer=") in OBSERVERS]
            yield [Candidate(name), *(Candidate(name, c) for c in known)]
            if static and _mostly_linear(self.bench.base):
                yield [Candidate(name, s) for s in SMOOTHING]

    def family(self, candidates: Iterable[Candidate]) -> Trial | None:
        """The trial with the least drop. None is tried after one within the budget, nor where the first is no faster than float."""
        tried: list[Trial] = []
        for candidate in candidates:
            if tried and (self.within(tried[-1]) or tried[0].ratio >= 1):  # NaN after a failure
                break
            known = next((t.ratio for t in tried if not t.failure), None)
            tried.append(self.bench.trial(candidate, ratio=known))
        return min((t for t in tried if not t.failure and not math.isnan(t.drop)), key=lambda t: t.drop, default=None)

    def corrected(self, t: Trial) -> Trial:
        """With each correction that lowers the drop. Their latency is measured: a correction may leave operations behind."""
        worth, smooths = self.worth(), _mostly_linear(self.bench.base) and not t.candidate.recipe.static  # static: a family of its own
        for stage in CORRECTIONS:
            if stage == "smoothquant" and not smooths:
                continue
            if stage in STAGES and not self.within(t) and (candidate := _with_stage(t.candidate, stage)) is not None:
                with_it = self.bench.trial(candidate)
                if with_it.drop < t.drop and with_it.ratio < worth:  # False after a failure
                    t = with_it
        return t

    def partial(self, t: Trial) -> None:
        """Bisection for the fewest steps back that keep the budget, in the order in which `mixed` takes them: what gains the outputs most for
        its time. It ends early where more of them would be no faster than the answer."""
        quantized = self.bench.calibrated(t.candidate)
        InsertFakeQuant.of(quantized).run(quantized, Context())
        placement = self.bench.target.placement
        effects = Effects(quantized, self.bench.data, samples=SAMPLES)
        steps = [c for c in effective(effects, placement, math.inf) if view(Embedding, effects.sites[c.place].node) is None]
        names, formats = _patterns(quantized), _run_time(quantized, placement)
        few, many, worth = 0, len(steps) + 1, self.worth()
        while many - few > 1:
            count = (few + many) // 2
            back = {names[c.place]: _rule(formats[c.place] if c.run_time else None) for c in steps[:count]}
            rules = tuple(f"rules.{name}={rule}" for name, rule in back.items())
            found = self.bench.trial(replace(t.candidate, overrides=t.candidate.overrides + rules))
            if self.within(found):
                many = count
            elif found.failure or found.ratio >= worth:
                return
            else:
                few = count


def _with_stage(candidate: Candidate, stage: str) -> Candidate | None:
    """The candidate with one stage more, the last; None where it has that stage, or one that does the same and more (round corrects biases)."""
    includes = {"smoothquant": SmoothQuant, "bias-correct": RoundWeights, "round": RoundWeights}
    if stage in includes and any(isinstance(p, includes[stage]) for p in candidate.recipe.stages):
        return None
    given = next((o for o in candidate.overrides if o.startswith("stages=")), None)
    if given is None:
        return replace(candidate, name=f"{candidate.name}+{stage}")
    stages = yaml.safe_dump([*yaml.safe_load(given.removeprefix("stages=")), stage], default_flow_style=True, width=10**6).strip()
    return replace(candidate, overrides=tuple(f"stages={stages}" if o is given else o for o in candidate.overrides))


def _mostly_linear(gm: GraphModule) -> bool:
    """More linears with a constant weight than convolutions: an encoder, not an image classifier."""
    found = [v for part in graph_modules(gm) for _, v in sites(part)]
    return sum(isinstance(v, Linear) and is_const(v.weight) for v in found) > sum(isinstance(v, Conv) for v in found)


def _rule(activations: Int | None) -> str:
    """The rule for an operation that goes back to this format of its input, or to float."""
    if activations is None:
        return "null"
    given = {name: value for name, value in asdict(activations).items() if value is not None}
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
