"""lockstep(gm, sites, data): the float and the quantized model side by side, stopped before each site, so that it can be changed there.

    for at in lockstep(gm, sites, ctx.data):
        for x_float, x_quantized in at.values(x): ...
        change constants of at.node

What comes after sees the change: methods that correct layer by layer on the quantized prefix (bias correction, GPTQ and its kin) are
loops over this. Both models are one graph: in the float one fake quantization is the identity, and constants that a stage has replaced
(see `keep_original`) are what they were.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.utils._pytree import tree_leaves

from qgraph.edit import add_constant, is_pure, nested
from qgraph.errors import CalibrationError, QGraphError
from qgraph.sweep import arranged, replayable
from qgraph.text import where
from qgraph.types import attribute, type_of
from qgraph.views import Dequantize, DynamicQuantize, FakeQuantize, view

ORIGINAL = "original"
"""The key of a get_attr node's meta that names the tensor it read before a stage replaced it; "" for one that was not there."""


def original(node: Node) -> Tensor:
    """The tensor that a constant node read before any stage."""
    value: Any = node.graph.owning_module
    for part in str(node.meta.get(ORIGINAL) or node.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)  # what a stage replaces is a tensor
    return value.detach()


STRIDED = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.as_strided.default}
"""What does not run on every memory layout."""

MERGED = 4
"""Batches that are run as one where that means the same: more take no less time for each."""

Values = dict[Node, Any]
"""What one model holds of one batch."""


def replace_constant(gm: GraphModule, node: Node, value: Tensor) -> None:
    """Lets the constant `node` read `value` from now on; the tensor that it read at first stays in the module for the float model."""
    node.meta.setdefault(ORIGINAL, str(node.target))
    node.target = add_constant(gm, str(node.meta[ORIGINAL]) or str(node.target), value)


@dataclass(frozen=True)
class At:
    """Both models before `node`, which they have not run yet."""

    node: Node
    models: _Models
    envs: Sequence[tuple[Values, Values]]

    def values(self, operand: Node) -> Iterator[tuple[Tensor, Tensor]]:
        """(value in the float model, value in the quantized one) of an operand of `node`, for each batch."""
        floats, quantized = self.models.schedules
        for x, y in self.envs:
            yield floats.load(self.models.twins[operand], x), quantized.load(operand, y)

    def constant(self, operand: Node) -> tuple[Tensor, Tensor]:
        """The same for an operand that no input reaches."""
        floats, quantized = self.models.schedules
        return floats.load(self.models.twins[operand], {}), quantized.load(operand, {})

    def forget(self) -> None:
        """Constants of the site have changed: what was computed from them is computed anew."""
        self.models.schedules[1].computed.clear()

    def call(self, operand: Node, x_float: Tensor, x_quantized: Tensor) -> tuple[Tensor, Tensor]:
        """What both models compute at `node` for these values of one operand; the others are constants."""
        floats, quantized = self.models.schedules
        twins = self.models.twins
        return floats.call(twins[self.node], {twins[operand]: x_float}), quantized.call(self.node, {operand: x_quantized})


def lockstep(
    gm: GraphModule,
    sites: Iterable[Node],
    data: Iterable[Any] | None,
    *,
    samples: int = 64,
    budget: int = 2**28,
    label: str = "lockstep",
) -> Iterator[At]:
    """Stops before each of `sites` in graph order; between two stops the caller may change the constant operands of the site.

    About `samples` samples are used, in batches spread over `data`. What both models hold at a stop stays below `budget` bytes: where
    that does not do for all batches, early layers see fewer, and the others join as soon as all later stops have room for them.
    Raises CalibrationError when there is no data or a model does not run on it."""
    feeds = _spread(gm, replayable(data, label), samples)
    models, merged = _Models(gm, set(sites)), _merged(gm, feeds)
    cases = max(len(group) for group in merged)
    room = [max(1, budget // max(cases * size, 1)) for size in models.sizes(feeds[0])]
    counts = [min(room[i:]) for i in range(len(room))]
    yield from models.walk([_concatenated(group) for group in merged], [min(n, len(merged)) for n in counts])


def _spread(gm: GraphModule, data: Iterable[Any], samples: int) -> list[list[Any]]:
    """Evenly spaced batches that hold about `samples` samples together, shuffled. Raises CalibrationError when there are none."""
    kept: list[list[Any]] = []
    step = wanted = 1
    for i, (_, feed) in enumerate(arranged(gm, data)):
        if not kept:
            size = next((len(x) for x in feed if isinstance(x, Tensor) and x.dim()), 1)
            wanted = max(1, samples // max(size, 1))
        if i % step == 0:
            kept.append(feed)
        if len(kept) > 2 * wanted:
            kept, step = kept[::2], 2 * step
    if not kept:
        raise CalibrationError("no calibration data: the batches are empty; give at least one batch")
    count = min(wanted, len(kept))
    return random.Random(0).sample([kept[i * len(kept) // count] for i in range(count)], count)


def _merged(gm: GraphModule, feeds: list[list[Any]]) -> list[list[list[Any]]]:
    """Groups of feeds that are run as one: of equal shapes, in a model that takes any number of cases."""
    types = [type_of(n) for n in gm.graph.nodes if n.op == "placeholder"]
    axes = {t.shape[0] if t is not None and t.shape else 0 for t in types}
    dynamic = any(view(DynamicQuantize, n) is not None for n in gm.graph.nodes)  # a merged batch would share a range
    if len(axes) != 1 or not all(isinstance(n, str) for n in axes) or dynamic:
        return [[feed] for feed in feeds]
    alike: dict[Any, list[list[Any]]] = {}
    for feed in feeds:
        alike.setdefault(tuple(x.shape for x in feed), []).append(feed)
    return [group[i : i + MERGED] for group in alike.values() for i in range(0, len(group), MERGED)]


def _concatenated(feeds: list[list[Any]]) -> list[Any]:
    return feeds[0] if len(feeds) == 1 else [torch.cat(parts) for parts in zip(*feeds, strict=True)]


class _Models:
    """Both models as two schedules of the same length, cut before the sites."""

    def __init__(self, gm: GraphModule, sites: set[Node]) -> None:
        nodes = [n for n in gm.graph.nodes if n.op not in ("get_attr", "output")]
        # The module of the twin must outlive its nodes, which read constants from it.
        self.module, self.twins, copies = _float_twin(gm)
        self.schedules = _Schedule([copies.get(n) for n in nodes]), _Schedule(nodes)
        self.cuts = [(i, n) for i, n in enumerate(nodes) if n in sites]

    def sizes(self, feed: Sequence[Any]) -> list[int]:
        """Bytes that both models hold at each stop; the float one is run to see."""
        schedule, done, sizes = self.schedules[0], 0, list[int]()
        values = schedule.start(feed)
        for cut, _ in self.cuts:
            schedule.run(values, done, cut)
            sizes.append(2 * _bytes(values))
            done = cut
            schedule.computed.clear()
        return sizes

    def walk(self, feeds: Sequence[Sequence[Any]], counts: Sequence[int]) -> Iterator[At]:
        """Runs both models from stop to stop, on the first counts[i] feeds at stop i; counts do not fall."""
        envs: list[tuple[Values, Values]] = []
        done = 0
        for (cut, node), count in zip(self.cuts, counts, strict=True):
            known = len(envs)
            envs += [(self.schedules[0].start(feed), self.schedules[1].start(feed)) for feed in feeds[known:count]]
            for i, pair in enumerate(envs):
                for schedule, values in zip(self.schedules, pair, strict=True):
                    schedule.run(values, done if i < known else 0, cut)
            yield At(node, self, envs)
            done = cut
            for schedule in self.schedules:
                schedule.computed.clear()


class _Schedule:
    """Nodes in order (None: nothing to do), and which values each is the last to read.

    What follows from constants alone, such as a quantized weight, is computed when it is needed and kept until `computed` is cleared."""

    def __init__(self, nodes: Sequence[Node | None]) -> None:
        self.channels_last = not any(n is not None and n.target in STRIDED for n in nodes)
        self.computed: Values = {}
        self.constant: set[Node] = set()
        for n in nodes:
            if n is not None and n.all_input_nodes and is_pure(n) and all(self.is_constant(x) for x in n.all_input_nodes):
                self.constant.add(n)
        self.nodes = [None if n in self.constant else n for n in nodes]
        last = {value: i for i, n in enumerate(self.nodes) if n is not None for value in (n, *n.all_input_nodes)}
        self.spent: list[list[Node]] = [[] for _ in nodes]
        for value, i in last.items():
            self.spent[i].append(value)

    def is_constant(self, node: Node) -> bool:
        return node.op == "get_attr" or node in self.constant

    def start(self, feed: Sequence[Any]) -> Values:
        placeholders = [n for n in self.nodes if n is not None and n.op == "placeholder"]
        return dict(zip(placeholders, map(self.laid_out, feed), strict=True))

    def laid_out(self, x: Any) -> Any:
        """Images channels last: convolutions on CPUs take a tenth to a half of the time."""
        images = self.channels_last and isinstance(x, Tensor) and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if images else x

    def run(self, values: Values, start: int, end: int) -> None:
        """Runs nodes start .. end - 1; a value is dropped after its last use."""
        for node, spent in zip(self.nodes[start:end], self.spent[start:end], strict=True):
            if node is not None and node.op != "placeholder":
                values[node] = self.call(node, values)
            for value in spent:
                values.pop(value, None)

    def load(self, node: Node, values: Values) -> Any:
        if node.op == "get_attr":
            value = attribute(node)
            return value.detach() if isinstance(value, Tensor) else value
        if node not in self.constant:
            return values[node]
        if node not in self.computed:
            self.computed[node] = self.call(node, values)
        return self.computed[node]

    def call(self, node: Node, values: Values) -> Any:
        """Raises CalibrationError when the operation does not run."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.load(n, values))
        target: Any = attribute(node) if node.op == "call_module" else node.target
        try:
            with torch.no_grad():
                return target(*args, **kwargs)
        except QGraphError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as e:
            reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
            raise CalibrationError(f"the model does not run on this batch at {where(node)}: {reason}") from e


def _bytes(values: Values) -> int:
    return sum(v.numel() * v.element_size() for v in tree_leaves(list(values.values())) if isinstance(v, Tensor))


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
    """x of fake_quantize(x) and of dequantize(dynamic_quantize(x))."""
    if (fake := view(FakeQuantize, node)) is not None:
        return fake.x
    found = view(Dequantize, node)
    dynamic = view(DynamicQuantize, found.q.args[0]) if found is not None and found.q.target is operator.getitem else None
    return None if dynamic is None else dynamic.x


def _serves_simulation(node: Node) -> bool:
    """A dynamic_quantize, or one of its outputs, that only dequantize reads."""
    picks = list(node.users) if view(DynamicQuantize, node) is not None else [node]
    made = all(p.target is operator.getitem and view(DynamicQuantize, p.args[0]) is not None for p in picks)
    return made and all(simulated(user) is not None for p in picks for user in p.users)
