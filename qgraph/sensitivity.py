"""sensitivity(model, batches): how much each operation loses when it alone is quantized; see losses.py for what is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from qgraph.api import Model, Source, prepare
from qgraph.backend import Backend, get_backend
from qgraph.calibrate import calibrate
from qgraph.edit import copy_graph
from qgraph.errors import CalibrationError
from qgraph.isolate import Isolated, evaluate, isolate, power, source
from qgraph.ledger import state
from qgraph.losses import Loss, Sensitivity, decibel, losses, ordered
from qgraph.passes.insert_fake_quant import InsertFakeQuant
from qgraph.pipeline import Context
from qgraph.sweep import arranged, replayable

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
    operation quantized "alone", or all "others" and not it: one more run of the model in torch for each operation and batch.
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
    found = losses(quantized, data, run_time=target.placement.dynamic, progress=progress)
    if effect is None:
        return found
    measured = effects(quantized, data, effect)
    return ordered(replace(row, effect=measured.get(row.place)) for row in found)


def effects(quantized: GraphModule, batches: Iterable[Any], which: Effect) -> dict[tuple[int, str], float]:
    """place -> SQNR in dB of a fake-quantized graph's float outputs, for operations of the outermost graph."""
    sites = [site for site in isolate(quantized)[1] if not site.nested]
    run, signal, error = _Switched(quantized, sites), 0.0, dict.fromkeys((s.place for s in sites), 0.0)
    for where, args in arranged(quantized, batches):
        try:
            want = run(args, ())
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as e:
            raise CalibrationError(f"{where}: the model does not run on this batch: {e}") from e
        signal += sum(map(power, want))
        for site in sites:
            active = [site] if which == "alone" else [s for s in sites if s is not site]
            error[site.place] += sum(power(a - b) for a, b in zip(run(args, active), want, strict=True))
    return {place: decibel(signal, e) for place, e in error.items()}


class _Switched(Interpreter):
    """Runs a fake-quantized graph as a float one, but for the operations that are switched on."""

    def __init__(self, gm: GraphModule, sites: Sequence[Isolated]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.sites = {site.node for site in sites}
        self.active: set[Node] = set()
        self.through = {n: value for operand in gm.graph.nodes if source(operand) is not operand for n, value in _chain(operand)}

    @torch.no_grad()
    def __call__(self, args: Sequence[Any], active: Iterable[Isolated]) -> list[Tensor]:
        """The float outputs."""
        self.active = {site.node for site in active}
        found = tree_leaves(self.run(*args, enable_io_processing=False))
        return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]

    def run_node(self, n: Node) -> Any:
        if n in self.through:
            return self.env[self.through[n]]
        if n in self.active:
            return evaluate(n, {source(operand): self.env[operand] for operand in n.all_input_nodes})
        return super().run_node(n)


def _chain(operand: Node) -> Iterator[tuple[Node, Node]]:
    """(node, what it passes on) of the nodes between a quantized operand and the value behind it, the operand among them."""
    value, work = source(operand), [operand]
    while work:
        node = work.pop()
        before = [n for n in node.all_input_nodes if n is not value and n.op == "call_function"]
        yield node, before[0] if before else value
        work += before
