"""plan(model, recipe): what quantizing will take, before any weight is read: the peak of memory and its parts, segments, file sizes.

Sizes follow from types alone. Batches, or numbers for the model's symbolic dimensions, say how large its values are; a value whose type
stays unknown is taken to be as large as the largest that it is computed from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph import spill
from qgraph.api import PREPARE, Model, Source, as_graph, check_float
from qgraph.backend import Backend, get_backend
from qgraph.edit import copy_graph, graph_modules
from qgraph.errors import CalibrationError
from qgraph.formats import QUANTIZE
from qgraph.lockstep import BUDGET, as_one, together
from qgraph.onnx_save import INLINE_LIMIT
from qgraph.parts import PART
from qgraph.passes import InferTypes, InsertObservers
from qgraph.pipeline import Context, Pass, Pipeline
from qgraph.qparams import scale_shape
from qgraph.recipe import load_recipe
from qgraph.schedule import Schedule
from qgraph.sweep import arranged
from qgraph.text import path_of
from qgraph.types import QSpec, TensorType, type_of
from qgraph.views import Conv, Embedding, Linear, const_value, view_any

RUNTIME = 500 * 10**6
"""Bytes of a process that has imported torch and ONNX Runtime and has done some work."""

PACKING = 5
"""Bytes per element of the largest weight, at most, while its integers are packed."""


@dataclass(frozen=True)
class Plan:
    """Bytes. `peak` is the sum of `runtime` (the process with what it has loaded), `constants` (new ones that stay in memory), `mapped`
    (pages of files), and the larger of two: what a stage holds while it runs (`live` values in memory, the values of the batch that runs,
    `segment` weights in float, `statistics` of a layer), or `packing` of weights. `widest` is the stop where all batches together have the
    most live values, `live_total` how many bytes these are; those beyond `live` go to temporary files, as constants do (`disk`). `file` is
    the size of the output."""

    segments: int
    widest: str
    live_total: int
    runtime: int
    constants: int
    mapped: int
    live: int
    running: int
    segment: int
    statistics: int
    packing: int
    disk: int
    file: int

    @property
    def peak(self) -> int:
        stage = self.live + self.running + self.segment + self.statistics
        return self.runtime + self.constants + self.mapped + max(stage, self.packing)

    def as_json(self) -> dict[str, Any]:
        return {"peak": self.peak, **{name: getattr(self, name) for name in self.__dataclass_fields__}}

    def __str__(self) -> str:
        rows = [
            ("peak memory", self.peak, ""),
            ("  process", self.runtime, "libraries and what is loaded"),
            ("  constants", self.constants, "new ones; more than that go to temporary files"),
            ("  mapped files", self.mapped, "pages that are mapped in"),
            ("  live values", self.live, f"of {self.live_total / 1e6:.0f} MB at the widest of {self.segments} stops, {self.widest}"),
            ("  running", self.running, "values of one batch inside a segment"),
            ("  segment", self.segment, "its weights in float"),
            ("  statistics", self.statistics, "of the largest layer"),
            ("  packing", self.packing, "of the largest weight; not at the same time as the four above"),
            ("temporary files", self.disk, ""),
            ("output file", self.file, ""),
        ]
        return "\n".join(f"{name:16}{size / 1e6:10.0f} MB  {about}".rstrip() for name, size, about in rows)


def plan(
    model: Model,
    recipe: Source = "w8a8",
    batches: Iterable[Any] | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    count: int = 1,
    example_inputs: Any = None,
    backend: str | Backend = "onnxruntime",
    dynamic_shapes: Any = None,
) -> Plan:
    """What `quantize` with these arguments will take. Without `batches`, `dims` gives the model's symbolic dimensions numbers, and there
    are `count` batches of this size.

    Raises what `prepare` raises, and CalibrationError for a dimension that has no number where the recipe runs data."""
    recipe, target = load_recipe(recipe), get_backend(backend)
    gm = as_graph(model, example_inputs, dynamic_shapes=dynamic_shapes)
    check_float(gm)
    Pipeline(*PREPARE).run(gm, Context())
    shapes = _Shapes.of(gm, batches, dims or {}, count)
    if any(p.needs_data for p in recipe.stages) and shapes.missing:
        raise CalibrationError(f"a plan needs sizes of the inputs: give batches, or dims with numbers for {', '.join(shapes.missing)}")
    weights = {n: n.meta[QUANTIZE]["weight"] for part in _annotated(gm, InsertObservers(recipe, target.placement)) for n in part}
    return _Planner(gm, weights, recipe.stages, shapes).plan()


def _annotated(gm: GraphModule, observe: InsertObservers) -> Iterator[list[Node]]:
    """Per graph the operations whose weight becomes integers."""
    if not observe.run(gm, Context()):
        return
    for part in graph_modules(gm):
        yield [n for n in part.graph.nodes if "weight" in n.meta.get(QUANTIZE, {})]


@dataclass(frozen=True)
class _Shapes:
    """Bytes of every value in one run (of all batches that run as one), the number of runs, and dimensions of inputs without a number."""

    sizes: Mapping[Node, int]
    runs: int
    missing: tuple[str, ...]

    @classmethod
    def of(cls, gm: GraphModule, batches: Iterable[Any] | None, dims: Mapping[str, int], count: int) -> _Shapes:
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        known = dict(dims)
        if batches is not None:
            feeds = [[tuple(x.shape) if isinstance(x, Tensor) else () for x in feed] for _, feed in arranged(gm, batches)]
            if not feeds:
                raise CalibrationError("no calibration data: the batches are empty; give at least one batch")
            largest, count = max(feeds, key=lambda shapes: sum(map(math.prod, shapes))), len(feeds)
            cases = min(as_one(gm, largest), count)
            runs = -(-count // cases)
            for node, shape in zip(inputs, largest, strict=True):
                kind = type_of(node)
                for axis, (dim, size) in enumerate(zip(kind.shape if kind and kind.shape else (), shape, strict=False)):
                    if isinstance(dim, str):
                        known[dim] = size * (cases if axis == 0 else 1)
        else:
            runs = count
            names = getattr(gm.meta.get("qgraph"), "dim_names", {})
            known |= {symbol: dims[name] for symbol, name in names.items() if name in dims}
        wanted = {d: None for n in inputs if (kind := type_of(n)) is not None for d in kind.shape or () if isinstance(d, str)}
        return cls(_sizes(gm, known), runs, tuple(d for d in wanted if d not in known))


def _sizes(gm: GraphModule, known: Mapping[str, int]) -> dict[Node, int]:
    """Bytes of every value when the symbolic dimensions are `known`."""
    bound = _bound(gm, known)
    found: dict[Node, int] = {}
    for node in gm.graph.nodes:
        kind = bound.get(node.name) or type_of(node)
        operands = [found[n] for n in node.all_input_nodes if n.op != "get_attr"]
        found[node] = _bytes(kind, known) if _bytes(kind, known) is not None else max(operands, default=0)  # type: ignore[assignment]
    return found


def _bound(gm: GraphModule, known: Mapping[str, int]) -> dict[str, TensorType]:
    """Types by node name where shape inference finds more with numbers than it did with names."""
    if "onnx_graph" not in gm.meta:
        return {}
    copy = copy_graph(gm)
    for node in copy.graph.nodes:
        kind = type_of(node)
        if kind is None or node.op == "get_attr":
            continue
        dims = (
            None
            if kind.shape is None or node.op != "placeholder"
            else tuple(known.get(d, d) if isinstance(d, str) else d for d in kind.shape)
        )
        node.meta["type"] = TensorType(kind.dtype, dims)
    InferTypes().run(copy, Context())
    return {n.name: kind for n in copy.graph.nodes if n.op != "get_attr" and (kind := type_of(n)) is not None and kind.shape is not None}


def _bytes(kind: TensorType | None, known: Mapping[str, int]) -> int | None:
    dtype = getattr(torch, kind.dtype or "", None) if kind is not None else None
    if kind is None or kind.shape is None or not isinstance(dtype, torch.dtype):
        return None
    numbers = [_number(d, known) for d in kind.shape]
    return None if None in numbers else math.prod(n for n in numbers if n is not None) * dtype.itemsize


def _number(dim: int | str | None, known: Mapping[str, int]) -> int | None:
    """A dimension; torch writes those that follow from others as formulas of their symbols."""
    if not isinstance(dim, str) or dim in known:
        return known[dim] if isinstance(dim, str) else dim
    try:
        return int(sympy.sympify(dim, locals={s: sympy.Integer(n) for s, n in known.items()}))
    except (TypeError, ValueError, sympy.SympifyError):
        return None


@dataclass(frozen=True)
class _Planner:
    gm: GraphModule
    weights: Mapping[Node, QSpec]
    stages: Sequence[Pass]
    shapes: _Shapes

    def plan(self) -> Plan:
        layers = [n for n in self.weights if view_any((Linear, Conv), n) is not None and n.graph is self.gm.graph]
        loops = [p for p in self.stages if p.at == "quantized" and p.needs_data]
        models = max((p.models for p in loops), default=1)
        groups = together(layers, lambda n: view_any((Linear, Conv), n).x) if loops else []
        cuts = self.cuts(groups)
        live_total, widest = max(((live * self.shapes.runs * models, label) for live, _, _, label in cuts), default=(0, "none"))
        rows = [self.rows(n) for n in layers]
        numels = {n: self.value(n).numel() for n in self.weights}
        new, kept = sum(numels.values()), sum(spill.size(self.value(n)) for n in self.weights)
        scales = sum(
            math.prod(scale_shape(self.value(n).shape, s.axis, s.group)) * self.value(n).element_size() for n, s in self.weights.items()
        )
        constants = 2 * new + 2 * scales + (kept if loops else 0)  # integers, packed ones, and the rounded floats
        stored = [t for part in graph_modules(self.gm) for t in (*part.parameters(), *part.buffers())]
        total, is_mapped = sum(map(spill.size, stored)), any(map(spill.is_mapped, stored))
        file = total - kept + scales + sum(numels[n] * s.bits // 8 for n, s in self.weights.items())
        segment = max((weights for _, _, weights, _ in cuts), default=0)
        external = any(hasattr(t, "onnx_source") for t in stored)
        moved = sum(spill.size(t) for t in stored if spill.is_mapped(t) and not hasattr(t, "onnx_source"))  # out of the model's own file
        inline = 0 if file > INLINE_LIMIT or external else 4 * file
        return Plan(
            segments=len(groups),
            widest=widest,
            live_total=live_total,
            runtime=max(RUNTIME, _resident()),
            constants=min(constants, spill.HELD),
            mapped=min(total, spill.RESIDENT + max(segment, max(numels.values(), default=0))) if is_mapped else 0,
            live=min(live_total, 2 * BUDGET) if loops else 0,
            running=models * max((running for _, running, _, _ in cuts), default=0),
            segment=segment,
            statistics=max((p.workspace(*shape) for p in loops for shape in rows), default=0),
            packing=PACKING * max(numels.values(), default=0) + 24 * PART + inline,
            disk=moved + max(0, constants - spill.HELD) + max(0, live_total - 2 * BUDGET),
            file=file,
        )

    def value(self, node: Node) -> Tensor:
        v = view_any((Linear, Conv, Embedding), node)
        found = const_value(v.weight)
        assert found is not None  # annotate looked
        return found

    def rows(self, node: Node) -> tuple[int, int]:
        """The weight as a matrix: outputs, and inputs times positions of a kernel."""
        value, v = self.value(node), view_any((Linear, Conv), node)
        n = int(value.shape[v.out_axis])
        return n, value.numel() // max(n, 1)

    def cuts(self, groups: Sequence[tuple[Node, ...]]) -> list[tuple[int, int, int, str]]:
        """Per stop: bytes of live values of one run, the most that the segment before it holds, bytes of its weights, and where it is."""
        if not groups:
            return []
        nodes = [n for n in self.gm.graph.nodes if n.op not in ("get_attr", "output")]
        schedule, sizes = Schedule(nodes), dict(self.shapes.sizes)
        for node in nodes:
            sizes.setdefault(node, max((sizes[n] for n in node.all_input_nodes), default=0))  # an observer, which came later
        place = {n: i for i, n in enumerate(nodes)}
        stops = sorted((min(place[n] for n in group), group[0]) for group in groups)
        held, most, after = 0, list[int](), list[int]()
        for node, spent in zip(schedule.nodes, schedule.spent, strict=True):
            held += 0 if node is None else sizes[node]
            most.append(held)
            held -= sum(sizes[n] for n in spent if n in place and n not in schedule.constant)
            after.append(held)
        found = []
        for (start, _), (end, node) in pairwise([(0, nodes[0]), *stops]):
            inside = [n for n in nodes[start:end] if n in self.weights]
            weights = sum(spill.size(self.value(n)) for n in inside)
            found.append((after[end - 1] if end else 0, max(most[start:end], default=0), weights, path_of(node)))
        return found


def _resident() -> int:
    """Bytes of this process that are resident now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
