"""lockstep(gm, sites, data): the quantized model, beside it the float one, stopped before each site, so that it can be changed there.

    for at in lockstep(gm, sites, ctx.data):                  # both models, about 64 samples
        for x_float, x_quantized in at.values(x): ...
        change constants of at.node

    groups = together(sites, lambda node: sites[node].view.x)  # q, k and v are one stop
    for at in lockstep(gm, groups, ctx.data, samples=None, reference=False, label=self.name):
        for x in at.inputs(x): ...                             # each batch once, for all of at.nodes
        change constants of every node in at.nodes

What comes after sees the change: methods that correct layer by layer on the quantized prefix (bias correction, GPTQ and its kin) are
loops over this. Both models are one graph: in the float one fake quantization is the identity, and constants that a stage has replaced
(see `ORIGINAL`) are what they were. Without `reference` there is no float model, which halves time and memory.

Only the values that are read later are kept of each batch; between two stops weights are float for one segment alone. Inside `calibrate`
a caller that is interrupted goes on where it was (see resume.py), so it must start from `original` constants.
"""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qgraph.edit import add_constant, nested
from qgraph.errors import CalibrationError
from qgraph.heap import give_back
from qgraph.ledger import state
from qgraph.schedule import Schedule, Values, bytes_of
from qgraph.spill import Store, is_mapped, release, size
from qgraph.sweep import arranged, bar, replayable
from qgraph.types import type_of
from qgraph.views import Dequantize, DynamicQuantize, FakeLookup, FakeQuantize, view, view_any

ORIGINAL = "original"
"""The key of a get_attr node's meta that names the tensor it read before a stage replaced it; "" for one that was not there."""


def original(node: Node) -> Tensor:
    """The tensor that a constant node read before any stage."""
    value: Any = node.graph.owning_module
    for part in str(node.meta.get(ORIGINAL) or node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)  # what a stage replaces is a tensor
    return value.detach()


MERGED = 4
"""Batches that are run as one where that means the same: more take no less time for each."""

TOKENS = 4096
"""Token ids, or elements of other inputs with two axes, that batches which run as one have at most: attention takes their square."""

BUDGET = 2**28
"""Bytes of live values that stay in memory."""


def replace_constant(gm: GraphModule, node: Node, value: Tensor) -> None:
    """Lets the constant `node` read `value` from now on; the tensor that it read at first stays in the module for the float model."""
    node.meta.setdefault(ORIGINAL, str(node.target))
    node.target = add_constant(gm, str(node.meta[ORIGINAL]) or str(node.target), value)


@dataclass(frozen=True)
class At:
    """The models before `nodes`, which they have not run yet: one site, or those of a group."""

    nodes: tuple[Node, ...]
    models: _Models
    envs: Sequence[tuple[Values, ...]]

    @property
    def node(self) -> Node:
        return self.nodes[0]

    def inputs(self, operand: Node) -> Iterator[Tensor]:
        """The value in the quantized model of an operand of the nodes, for each batch."""
        for env in self.envs:
            yield self.models.quantized.load(operand, env[-1])
            release()

    def values(self, operand: Node) -> Iterator[tuple[Tensor, Tensor]]:
        """(value in the float model, value in the quantized one) of an operand of the nodes, for each batch; needs `reference`."""
        floats, quantized = self.models.schedules
        for x, y in self.envs:
            yield floats.load(self.models.twins[operand], x), quantized.load(operand, y)
            release()

    def constant(self, operand: Node) -> tuple[Tensor, Tensor]:
        """The same for an operand that no input reaches."""
        floats, quantized = self.models.schedules
        return floats.load(self.models.twins[operand], {}), quantized.load(operand, {})

    def forget(self) -> None:
        """Constants of a site have changed: what was computed from them is computed anew."""
        self.models.quantized.computed.clear()

    def call(self, operand: Node, x_float: Tensor, x_quantized: Tensor, node: Node | None = None) -> tuple[Tensor, Tensor]:
        """What both models compute at `node` (default: the first) for these values of one operand; the others are constants."""
        floats, quantized = self.models.schedules
        twins, node = self.models.twins, node or self.node
        return floats.call(twins[node], {twins[operand]: x_float}), quantized.call(node, {operand: x_quantized})


def together(sites: Iterable[Node], operand: Callable[[Node], Node]) -> list[tuple[Node, ...]]:
    """The sites in groups that have the same operand(site)."""
    groups: dict[Node, list[Node]] = {}
    for site in sites:
        groups.setdefault(operand(site), []).append(site)
    return [tuple(group) for group in groups.values()]


def lockstep(
    gm: GraphModule,
    sites: Iterable[Node | tuple[Node, ...]],
    data: Iterable[Any] | None,
    *,
    samples: int | None = 64,
    budget: int = BUDGET,
    reference: bool = True,
    label: str = "lockstep",
    progress: bool | None = None,
) -> Iterator[At]:
    """Stops before each of `sites` in graph order; between two stops the caller may change the constant operands of the site. A group
    of sites (see `together`) is one stop, before the first of them.

    About `samples` samples are used, in batches spread over `data`. What the models hold at a stop stays below `budget` bytes: where
    that does not do for all batches, early layers see fewer, and the others join as soon as all later stops have room for them.
    `samples` None: every stop sees all batches, and values beyond the budget go to temporary files (see spill.py).

    `reference` False: there is no float model, and `inputs` is what tells values. `progress` is that of `calibrate`.
    Raises CalibrationError when there is no data or a model does not run on it."""
    groups = [site if isinstance(site, tuple) else (site,) for site in sites]
    feeds = _spread(gm, replayable(data, label), samples)
    models, merged = _Models(gm, groups, reference=reference), _merged(gm, feeds)
    counts = [len(merged)] * len(groups) if samples is None else _counts(models, merged, budget)
    progressing = state(gm).progress
    stage = None if progressing is None else progressing.stage(gm, label, feeds)
    with bar(len(groups), label, progress, unit="layers", rate="layers") as advance:
        for done, at in enumerate(models.walk([_concatenated(group) for group in merged], counts, budget), 1):
            if stage is None or not stage.restore(at.nodes):
                yield at
                if stage is not None:
                    stage.finish(at.nodes)
            advance(done)


def _counts(models: _Models, merged: list[list[list[Any]]], budget: int) -> list[int]:
    """How many feeds each stop has room for; never fewer than the one before."""
    cases = max(len(group) for group in merged)
    room = [max(1, budget // max(cases * size, 1)) for size in models.sizes(merged[0][0])]
    return [min(len(merged), *room[i:]) for i in range(len(room))]


def _spread(gm: GraphModule, data: Iterable[Any], samples: int | None) -> list[list[Any]]:
    """Evenly spaced batches that hold about `samples` samples together, shuffled; None: all. Raises CalibrationError when there are none."""
    kept: list[list[Any]] = []
    step = wanted = 1
    for i, (_, feed) in enumerate(arranged(gm, data)):
        if not kept and samples is not None:
            cases = next((len(x) for x in feed if isinstance(x, Tensor) and x.dim()), 1)
            wanted = max(1, samples // max(cases, 1))
        if i % step == 0:
            kept.append(feed)
        if samples is not None and len(kept) > 2 * wanted:
            kept, step = kept[::2], 2 * step
    if not kept:
        raise CalibrationError("no calibration data: the batches are empty; give at least one batch")
    if samples is None:
        return kept
    count = min(wanted, len(kept))
    return random.Random(0).sample([kept[i * len(kept) // count] for i in range(count)], count)


def _merged(gm: GraphModule, feeds: list[list[Any]]) -> list[list[list[Any]]]:
    """Groups of feeds that are run as one: of equal shapes, in a model that takes any number of cases."""
    alike: dict[tuple[torch.Size, ...], list[list[Any]]] = {}
    for feed in feeds:
        alike.setdefault(tuple(x.shape for x in feed), []).append(feed)
    steps = {shapes: as_one(gm, shapes) for shapes in alike}
    return [group[i : i + steps[shapes]] for shapes, group in alike.items() for i in range(0, len(group), steps[shapes])]


def as_one(gm: GraphModule, shapes: Iterable[Sequence[int]]) -> int:
    """How many batches of these input shapes are run as one."""
    types = [type_of(n) for n in gm.graph.nodes if n.op == "placeholder"]
    axes = {t.shape[0] if t is not None and t.shape else 0 for t in types}
    dynamic = any(view(DynamicQuantize, n) is not None for n in gm.graph.nodes)  # a merged batch would share a range
    if len(axes) != 1 or not all(isinstance(n, str) for n in axes) or dynamic:
        return 1
    tokens = max((math.prod(shape) for shape in shapes if len(shape) == 2), default=1)
    return max(1, min(MERGED, TOKENS // max(tokens, 1)))


def _concatenated(feeds: list[list[Any]]) -> list[Any]:
    return feeds[0] if len(feeds) == 1 else [torch.cat(parts) for parts in zip(*feeds, strict=True)]


class _Models:
    """The models (float, quantized), or the quantized one alone, as schedules of the same length, cut before the sites."""

    def __init__(self, gm: GraphModule, groups: Iterable[tuple[Node, ...]], *, reference: bool = True) -> None:
        group_of = {n: group for group in groups for n in group}
        ordered = [n for n in gm.graph.nodes if n.op not in ("get_attr", "output")]
        last = max((i for i, n in enumerate(ordered) if n in group_of), default=-1)
        nodes = [n for i, n in enumerate(ordered) if i <= last or n.op == "placeholder"]  # what the last site reads is needed, no more
        self.quantized = Schedule(nodes)
        self.schedules: tuple[Schedule, ...] = (self.quantized,)
        if reference:
            # The module of the twin must outlive its nodes, which read constants from it.
            self.module, self.twins, copies = _float_twin(gm)
            self.schedules = Schedule([copies.get(n) for n in nodes]), self.quantized
        first = {group_of[n]: i for i, n in reversed(list(enumerate(nodes))) if n in group_of}
        self.cuts = sorted((i, group) for group, i in first.items())

    def sizes(self, feed: Sequence[Any]) -> list[int]:
        """Bytes that the models hold at each stop; the float one is run to see, where there is one."""
        schedule, done, sizes = self.schedules[0], 0, list[int]()
        values = schedule.start(feed)
        for cut, _ in self.cuts:
            schedule.run(values, done, cut)
            sizes.append(len(self.schedules) * bytes_of(values))
            done = cut
            schedule.computed.clear()
        return sizes

    def walk(self, feeds: Sequence[Sequence[Any]], counts: Sequence[int], budget: int) -> Iterator[At]:
        """Runs the models from stop to stop, on the first counts[i] feeds at stop i; counts do not fall."""
        envs: list[tuple[Values, ...]] = []
        done = 0
        for (cut, group), count in zip(self.cuts, counts, strict=True):
            known, held, store = len(envs), 0, Store()
            envs += [tuple(s.start(feed) for s in self.schedules) for feed in feeds[known:count]]
            for i, env in enumerate(envs):
                for schedule, values in zip(self.schedules, env, strict=True):
                    schedule.run(values, done if i < known else 0, cut)
                    held = _bounded(values, held, budget, store)
            give_back()
            yield At(group, self, envs)
            done = cut
            for schedule in self.schedules:
                schedule.computed.clear()


def _bounded(values: Values, held: int, budget: int, store: Store) -> int:
    """Puts values into `store` as soon as more than `budget` bytes are held; returns the bytes held from now on."""
    for node, value in values.items():
        if isinstance(value, Tensor) and not is_mapped(value):
            if held + size(value) > budget:
                values[node] = store.put(value)
            else:
                held += size(value)
    return held


def _float_twin(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node], dict[Node, Node]]:
    """The graph as it would be without fake quantization and without replaced constants, sharing all tensors.

    Returns it, the node that holds each value there, and of those the nodes that are copies: fake quantization has none."""
    graph, twins, copies = Graph(), dict[Node, Node](), dict[Node, Node]()
    for node in gm.graph.nodes:
        if (x := simulated(node)) is not None:
            twins[node] = twins[x]
        elif not _serves_simulation(node):
            twins[node] = copies[node] = graph.node_copy(node, twins.__getitem__)
            if ORIGINAL in node.meta:
                copies[node].target = node.meta[ORIGINAL]
    module = GraphModule(gm, graph)
    for node in graph.nodes:
        if (body := nested(node)) is not None:
            setattr(module, str(node.target), _float_twin(body)[0])
    return module, twins, copies


def simulated(node: Node) -> Node | None:
    """x of fake_quantize(x), of fake_lookup(x) and of dequantize(dynamic_quantize(x))."""
    fake: FakeQuantize | FakeLookup | None = view_any((FakeQuantize, FakeLookup), node)
    if fake is not None:
        return fake.x
    found = view(Dequantize, node)
    dynamic = view(DynamicQuantize, found.q.args[0]) if found is not None and found.q.target is operator.getitem else None
    return None if dynamic is None else dynamic.x


def _serves_simulation(node: Node) -> bool:
    """A dynamic_quantize, or one of its outputs, that only dequantize reads."""
    picks = list(node.users) if view(DynamicQuantize, node) is not None else [node]
    made = all(p.target is operator.getitem and view(DynamicQuantize, p.args[0]) is not None for p in picks)
    return made and all(simulated(user) is not None for p in picks for user in p.users)
