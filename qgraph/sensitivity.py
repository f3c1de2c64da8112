"""sensitivity(model, batches): how much each operation loses when it alone is quantized; see losses.py for what is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

from torch.fx import GraphModule

from qgraph.api import Model, Source, prepare
from qgraph.backend import Backend, get_backend
from qgraph.calibrate import calibrate
from qgraph.edit import copy_graph
from qgraph.effects import Effects
from qgraph.ledger import state
from qgraph.losses import Loss, Sensitivity, decibel, losses, ordered
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.pipeline import Context
from qgraph.sweep import replayable

__all__ = ["Loss", "Sensitivity", "sensitivity"]

Effect = Literal["alone", "others"]


def sensitivity(
    model: Model,
    batches: Iterable[Any] | None,
    *,
    example_inputs: Any = None,
    recipe: Source = "w8a8",
    backend: str | Backend = "onnxruntime",
    dynamic_shapes: Any = None,
    effect: Effect | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Rows of every operation that `recipe` quantizes for `backend`, the most sensitive first.

    `model` is a model, or a graph that `prepare` made (its recipe counts then; `calibrate` has not run, or is not run again). The data is gone
    through once for ranges and once for the losses, so `batches` is no iterator. `effect` adds the SQNR of the model's outputs with one
    operation quantized "alone", or all "others" and not it: one more run of the model in torch, on a few samples, for each operation.
    Raises what prepare and calibrate raise."""
    data = replayable(batches, "sensitivity")
    target = get_backend(backend)
    if isinstance(model, GraphModule) and state(model).stage in ("prepared", "calibrated"):
        prepared = model
    else:
        prepared = prepare(model, example_inputs, recipe=recipe, backend=target, dynamic_shapes=dynamic_shapes)
    if state(prepared).stage == "prepared":
        calibrate(prepared, data, progress=progress)
    quantized = copy_graph(prepared)
    InsertFakeQuant.of(quantized).run(quantized, Context())
    found = losses(quantized, data, placement=target.placement, progress=progress)
    if effect is None:
        return found
    effects = Effects(quantized, data)
    if effect == "alone":
        lost = {place: shares[None] for place, shares in effects.alone().items()}
    else:
        lost = {place: effects.others(place) for place in effects.sites}
    measured = {place: decibel(1.0, share) for place, share in lost.items()}
    return ordered(replace(row, effect=measured.get(row.place)) for row in found)
