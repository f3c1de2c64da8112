"""calibrate(prepared, batches): batches -> runner -> observers; nothing is kept of a batch but the statistics."""

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

from qgraph.batches import load_batches
from qgraph.errors import CalibrationError, LoweringError
from qgraph.feeds import Input, arrange, inputs_of
from qgraph.ledger import State
from qgraph.observe import Observer
from qgraph.runners import OrtRunner, Runner, TorchRunner

__all__ = ["Calibration", "calibrate", "load_batches", "runner_for"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """How much was seen: batches, and samples (first axis of the first input that has one)."""

    batches: int = 0
    samples: int = 0


def calibrate(prepared: GraphModule, batches: Iterable[Any], *, runner: Runner | None = None, progress: bool | None = None) -> Calibration:
    """Runs every batch and updates the observers of `prepared`, in place. Calling it again adds to what was seen.

    `batches` yields dicts by input name, tuples or lists in input order, or single values; torch tensors or numpy arrays, of any
    batch size that the model takes (see `feeds.arrange` for what is checked). Graphs read from ONNX run in ONNX Runtime, others in
    torch. Memory does not grow with the number of batches. `progress`: a bar on stderr; None shows it on a terminal only.
    A graph without observers needs no data: `batches` is not touched. After an interruption the observers are usable.

    Raises CalibrationError: no batches, an input that is missing, unknown, or of the wrong type or shape, NaN in an input or in a
    watched value (both named), or a model that does not run on a batch.
    """
    if any(isinstance(m, Observer) and not m.frozen for m in prepared.modules()):
        done = _run(runner or runner_for(prepared), _fed(batches, inputs_of(prepared)), total=_length(batches), show=progress)
        if not done.batches:
            raise CalibrationError("no calibration data: the batches are empty; give at least one batch")
    else:
        done = Calibration()
    if isinstance(state := prepared.meta.get("qgraph"), State):
        state.stage = "calibrated"
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


def _fed(batches: Iterable[Any], inputs: tuple[Input, ...]) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(batches, Tensor | np.ndarray | Mapping):
        raise CalibrationError(f"batches is one {type(batches).__name__}: give a list of batches, [batch], even for a single one")
    for i, feed in enumerate(batches):
        where = f"calibration batch {i}"
        yield where, arrange(feed, inputs, where=where)


def _run(runner: Runner, feeds: Iterator[tuple[str, list[Any]]], *, total: int | None, show: bool | None) -> Calibration:
    count = samples = 0
    with _bar(total, show) as advance:
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
def _bar(total: int | None, show: bool | None) -> Iterator[Any]:
    """Batches done, samples per second, time left; on stderr, where it does not mix with results."""
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda samples: None
        return
    done = TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"), TextColumn("{task.fields[rate]}")
    left = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*done, *left, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task("", total=total, rate="")

        def advance(samples: int) -> None:
            seconds = bar.tasks[0].elapsed or 0
            bar.update(task, advance=1, rate=f"{samples / seconds:.1f} samples/s" if seconds else "")

        yield advance


def _length(batches: Iterable[Any]) -> int | None:
    return operator.length_hint(batches, 0) or None
