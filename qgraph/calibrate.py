"""calibrate(prepared, batches): what a recipe learns from data. Stages first, then the observers, then what corrects a quantized graph."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch.fx import GraphModule

from qgraph.batches import load_batches
from qgraph.errors import CalibrationError
from qgraph.heap import give_back
from qgraph.ledger import state
from qgraph.observe import Observer
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.pipeline import Context, Pass, Pipeline, Verify
from qgraph.resume import Progress
from qgraph.runners import Runner
from qgraph.sweep import Calibration, arranged, replayable, runner_for, sweep

__all__ = ["Calibration", "calibrate", "load_batches", "runner_for"]


def calibrate(
    prepared: GraphModule,
    batches: Iterable[Any] | None,
    *,
    runner: Runner | None = None,
    progress: bool | None = None,
    verify: Verify | None = None,
) -> Calibration:
    """Runs every batch and updates the observers of `prepared`, in place. Calling it again adds to what was seen.

    `batches` yields dicts by input name, tuples or lists in input order, or single values; torch tensors or numpy arrays, of any
    batch size that the model takes (see `feeds.arrange` for what is checked). Graphs read from ONNX run in ONNX Runtime, others in
    torch. Memory does not grow with the number of batches. `progress`: a bar on stderr; None shows it on a terminal only.
    A graph without observers needs no data: `batches` is not touched. After an interruption the observers are usable.

    A recipe with stages that need data goes through it several times, so `batches` must be no iterator; stages, and layers of a stage
    that goes layer by layer, that are done when this is interrupted are not repeated by the next call with the same data. `verify` is that of `prepare`, for these stages; the first batch is the
    sample.

    Raises CalibrationError: no batches, an input that is missing, unknown, or of the wrong type or shape, NaN in an input or in a
    watched value (both named), or a model that does not run on a batch; RecipeError when the recipe does not fit the graph.
    """
    found = state(prepared)
    found.progress = found.progress or Progress()
    early, late = _split(found.pending)
    for p in early:
        _stage(prepared, p, batches, progress, verify)
    done = Calibration()
    if any(isinstance(m, Observer) and not m.frozen for m in prepared.modules()):
        asks = next((p for p in late if p.needs_data), None)
        data = _given(prepared, batches) if asks is None else replayable(batches, f"stage {asks.name}")
        done = sweep(prepared, data, runner=runner, progress=progress)
    for p in late:
        InsertFakeQuant.of(prepared).run(prepared, Context())
        _stage(prepared, p, batches, progress, verify)
    found.stage, found.progress = "calibrated", None
    return done


def _split(pending: tuple[Pass, ...]) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """What runs before the observers see the data, and what after."""
    first = next((i for i, p in enumerate(pending) if p.at == "quantized"), len(pending))
    return pending[:first], pending[first:]


def _given(prepared: GraphModule, batches: Iterable[Any] | None) -> Iterable[Any]:
    if batches is None:
        if missing := [f"{e.node} ({e.reason})" for e in state(prepared).ledger if e.role == "range" and not e.quantized]:
            raise CalibrationError(
                f"{len(missing)} operands have no statistics, the first: {'; '.join(missing[:3])}; give batches, which then decide these "
                "ranges alone, or leave the operations that read them in float by rules"
            )
        raise CalibrationError("the recipe's static ranges need calibration data: give batches")
    return batches


def _stage(prepared: GraphModule, p: Pass, batches: Iterable[Any] | None, progress: bool | None, verify: Verify | None) -> None:
    """Runs a pass of the recipe; from then on it is no longer pending."""
    data = replayable(batches, f"stage {p.name}") if p.needs_data else batches
    first = list(islice(arranged(prepared, data), 1)) if verify == "numerics" and data is not None else []
    ctx, found = Context(samples=[tuple(args) for _, args in first], data=data, progress=progress), state(prepared)
    if found.progress is not None:
        ctx.declines = found.progress.declines
    Pipeline(p, verify=verify if ctx.samples or verify != "numerics" else "structure").run(prepared, ctx)
    found.pending = found.pending[1:]
    found.declines += tuple(dict.fromkeys(ctx.declines))
    ctx.declines.clear()
    give_back()
