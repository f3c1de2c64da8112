"""sweep(gm, batches): run every batch through a graph, so that what watches its values sees them; nothing is kept of a batch."""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.fx import GraphModule

from qgraph.errors import CalibrationError, LoweringError
from qgraph.feeds import Input, arrange, inputs_of
from qgraph.ledger import State
from qgraph.runners import OrtRunner, Runner, TorchRunner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """How much was seen: batches, and samples (first axis of the first input that has one)."""

    batches: int = 0
    samples: int = 0


def sweep(
    gm: GraphModule,
    batches: Iterable[Any],
    *,
    runner: Runner | None = None,
    label: str = "calibrating",
    progress: bool | None = None,
) -> Calibration:
    """Runs every batch. Raises CalibrationError: no batches, an input that is missing, unknown, or of the wrong type or shape, or a
    model that does not run on a batch."""
    feeds = arranged(gm, batches)
    done = _run(runner or runner_for(gm), feeds, total=operator.length_hint(batches, 0) or None, label=label, show=progress)
    if not done.batches:
        raise CalibrationError("no calibration data: the batches are empty; give at least one batch")
    return done


def runner_for(gm: GraphModule) -> Runner:
    """OrtRunner for graphs read from ONNX that ONNX Runtime can observe, else TorchRunner."""
    state = gm.meta.get("qgraph")
    if isinstance(state, State) and state.source == "onnx":
        try:
            return OrtRunner(gm)
        except LoweringError as e:
            log.info("calibrating in torch: %s", e)
    return TorchRunner(gm)


def arranged(gm: GraphModule, batches: Iterable[Any]) -> Iterator[tuple[str, list[Any]]]:
    """(name for errors, one value per placeholder) of each batch."""
    if isinstance(batches, Tensor | np.ndarray | Mapping):
        raise CalibrationError(f"batches is one {type(batches).__name__}: give a list of batches, [batch], even for a single one")
    return _arranged(batches, inputs_of(gm))


def _arranged(batches: Iterable[Any], inputs: tuple[Input, ...]) -> Iterator[tuple[str, list[Any]]]:
    for i, feed in enumerate(batches):
        where = f"calibration batch {i}"
        yield where, arrange(feed, inputs, where=where)


def replayable(batches: Iterable[Any] | None, asked_by: str) -> Iterable[Any]:
    """The batches, if they can be gone through several times. Raises CalibrationError for None and for iterators."""
    if batches is None:
        raise CalibrationError(f"{asked_by} needs calibration data: give batches")
    if isinstance(batches, Iterator):
        raise CalibrationError(
            f"{asked_by} goes through the calibration data several times: give a list or another re-iterable, no iterator"
        )
    return batches


def _run(runner: Runner, feeds: Iterator[tuple[str, list[Any]]], *, total: int | None, label: str, show: bool | None) -> Calibration:
    count = samples = 0
    with bar(total, label, show) as advance:
        for where, args in feeds:
            size = next((len(x) for x in args if isinstance(x, Tensor) and x.dim()), 1)
            try:
                runner.run(args)
            except CalibrationError as e:
                raise CalibrationError(f"{where}: {e}") from e
            count, samples = count + 1, samples + size
            advance(samples)
    return Calibration(count, samples)


@contextmanager
def bar(total: int | None, label: str, show: bool | None, *, unit: str = "batches", rate: str = "samples") -> Iterator[Any]:
    """Batches done, samples per second, time left; on stderr, where it does not mix with results. Yields a function that one batch with
    its samples so far is told to."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda samples: None
        return
    done = TextColumn(label), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[rate]}")
    left = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*done, *left, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task("", total=total, rate="")

        def advance(samples: int) -> None:
            seconds = bar.tasks[0].elapsed or 0
            bar.update(task, advance=1, rate=f"{samples / seconds:.1f} {rate}/s" if seconds else "")

        yield advance
