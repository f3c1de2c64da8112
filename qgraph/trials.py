"""Bench: candidates of a search, each built, scored and timed once, against one float program."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.fx import GraphModule

from qgraph.api import convert, prepare
from qgraph.backend import Backend, Program
from qgraph.calibrate import calibrate
from qgraph.edit import copy_graph
from qgraph.errors import LoweringError, QGraphError
from qgraph.feeds import inputs_of
from qgraph.journal import Journal
from qgraph.score import METRICS, Metric, Run, Timer, latency_ratio, runs
from qgraph.tradeoff import Candidate, Trial

log = logging.getLogger(__name__)


@dataclass
class Bench:
    """Where candidates are built and measured. `done` are all trials of this call, by candidate key."""

    base: GraphModule
    target: Backend
    data: Iterable[Any]
    evaluation: Iterable[Any]
    metric: str | Metric
    sample: Sequence[Any]
    journal: Journal
    timer: Timer
    console: Console
    done: dict[str, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inputs = inputs_of(self.base)
        self.program = self.target.lower(copy_graph(self.base))
        self.float_run = runs(self.program, self.inputs)
        self.kept = self.journal.read()
        self.float_metric = self.score(self.float_run)

    def score(self, run: Run) -> float:
        if isinstance(self.metric, str):
            return METRICS[self.metric](self.float_run, run, self.evaluation)
        return float(self.metric(run, self.evaluation))

    def calibrated(self, candidate: Candidate) -> GraphModule:
        prepared = prepare(self.base, recipe=candidate.recipe, backend=self.target)
        calibrate(prepared, self.data, progress=False)
        return prepared

    def trial(self, candidate: Candidate, *, ratio: float | None = None) -> Trial:
        """Measured now, or known from before; `ratio` is the latency where it is known. Failures of the candidate are its result."""
        if candidate.key in self.done:
            return self.done[candidate.key]
        if (found := self.kept.get(candidate.key)) is None:
            with self.console.status(f"trial {len(self.done) + 1}: {candidate}"):
                start = time.perf_counter()
                try:
                    found = self.measured(candidate, ratio)
                except QGraphError as error:
                    found = Trial(candidate, failure=" ".join(str(error).split()))
                found = replace(found, seconds=time.perf_counter() - start)
        self.done[candidate.key] = found
        self.journal.write({**self.kept, **self.done}.values())
        said = found.failure or f"drop {found.drop:.4g}, latency {found.ratio:.2f} of the float model's"
        log.info("%s: %s", candidate, said)
        self.console.print(f"{candidate}: {said}", markup=False, highlight=False, soft_wrap=True)
        return found

    def measured(self, candidate: Candidate, ratio: float | None) -> Trial:
        program = self.target.lower(convert(self.calibrated(candidate)))
        metric = self.score(runs(program, self.inputs))
        if ratio is None:
            ratio = latency_ratio(self.program, program, self.sample, timer=self.timer)
        return Trial(candidate, metric, self.float_metric - metric, ratio, _megabytes(program))


def _megabytes(program: Program) -> float | None:
    """Of the saved program with its external data; None for a backend that saves none."""
    with tempfile.TemporaryDirectory(prefix="qgraph-") as folder:
        try:
            program.save(Path(folder, "model.onnx"))
        except LoweringError:
            return None
        return sum(p.stat().st_size for p in Path(folder).iterdir()) / 1e6
