"""effects(quantized, batches): what the model's outputs lose when one operation is quantized, or all others are.

The rest of the graph runs once more for each operation and batch, from the operation on, so a few samples must do. Errors of operations are nearly
independent of each other: the power of what a quantized model loses is about the sum of what its operations lose alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from qgraph.errors import CalibrationError
from qgraph.isolate import Isolated, evaluate, isolate, power, source
from qgraph.reference import dequantize, dynamic_quantize
from qgraph.schedule import STRIDED
from qgraph.sweep import arranged
from qgraph.types import QSpec

Place = tuple[int, str]
"""(number of the graph, FX name) of an operation."""


class Effects:
    """Shares of the power of the float outputs, summed over the first batches, about `samples` samples; operations of the outermost
    graph only. Raises CalibrationError for a batch on which the model does not run."""

    def __init__(self, quantized: GraphModule, batches: Iterable[Any], *, samples: int = 16) -> None:
        self.sites = {site.place: site for site in isolate(quantized)[1] if not site.nested}
        self.run = _Switched(quantized, list(self.sites.values()))
        self.batches = list(_first(arranged(quantized, batches), samples))
        self.float = [self._outputs(where, args) for where, args in self.batches]
        self.signal = sum(power(y) for ys in self.float for y in ys)

    def alone(self, forms: Mapping[Place, Iterable[QSpec | None]] | None = None) -> dict[Place, dict[QSpec | None, float]]:
        """What the outputs lose with each of these operations alone quantized, for each format of its input; None: that of the graph.
        Without `forms`, all operations as they are."""
        forms = dict.fromkeys(self.sites, (None,)) if forms is None else forms
        wanted = {self.sites[place].node: tuple(specs) for place, specs in forms.items()}
        lost = {place: dict.fromkeys(wanted[self.sites[place].node], 0.0) for place in forms}
        for (where, args), want in zip(self.batches, self.float, strict=True):
            with _running(where):
                for node, spec, found in self.run.forks(args, wanted):
                    lost[self.run.sites[node].place][spec] += _difference(found, want)
        return {place: {spec: self._share(error) for spec, error in errors.items()} for place, errors in lost.items()}

    def others(self, place: Place) -> float:
        """What they lose with all operations quantized but this one."""
        switch = frozenset(s.node for other, s in self.sites.items() if other != place)
        pairs = zip(self.batches, self.float, strict=True)
        return self._share(sum(_difference(self._outputs(where, args, switch), want) for (where, args), want in pairs))

    def _share(self, error: float) -> float:
        return error / self.signal if self.signal > 0 else float("inf")

    def _outputs(self, where: str, args: Sequence[Any], switch: frozenset[Node] = frozenset()) -> list[Tensor]:
        with _running(where):
            return self.run(args, switch)


@contextmanager
def _running(where: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as e:
        raise CalibrationError(f"{where}: the model does not run on this batch: {e}") from e


def _difference(found: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    return sum(power(a - b) for a, b in zip(found, want, strict=True))


def _first(feeds: Iterable[tuple[str, list[Any]]], samples: int) -> Iterator[tuple[str, list[Any]]]:
    seen = 0
    for where, args in feeds:
        yield where, args
        seen += next((len(x) for x in args if isinstance(x, Tensor) and x.dim()), 1)
        if seen >= samples:
            return


class _Switched(Interpreter):
    """Runs a fake-quantized graph as a float one, but for the operations that are switched on."""

    def __init__(self, gm: GraphModule, sites: Sequence[Isolated]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.sites = {site.node: site for site in sites}
        self.switch: frozenset[Node] = frozenset()
        self.nodes = list(gm.graph.nodes)
        self.through = {n: value for operand in self.nodes if source(operand) is not operand for n, value in _chain(operand)}
        self.channels_last = not any(n.target in STRIDED for n in self.nodes)

    @torch.no_grad()
    def __call__(self, args: Sequence[Any], switch: frozenset[Node]) -> list[Tensor]:
        """The float outputs."""
        self.switch = switch
        self._start(args)
        return self._rest(0)

    @torch.no_grad()
    def forks(
        self, args: Sequence[Any], wanted: Mapping[Node, Iterable[QSpec | None]]
    ) -> Iterator[tuple[Node, QSpec | None, list[Tensor]]]:
        """(operation, format, float outputs) with each of these operations alone quantized. What comes before it is run once for all."""
        self.switch = frozenset()
        self._start(args)
        for i, node in enumerate(self.nodes):
            for spec in wanted.get(node, ()):
                env = self.env
                self.env = env | {node: self.quantized(node, spec)}
                yield node, spec, self._rest(i + 1)
                self.env = env
            self._step(node)

    def _start(self, args: Sequence[Any]) -> None:
        """Images channels last, as in lockstep."""
        images = [isinstance(x, Tensor) and x.dim() == 4 and self.channels_last for x in args]
        laid_out = (x.contiguous(memory_format=torch.channels_last) if image else x for x, image in zip(args, images, strict=True))
        self.args_iter, self.env = iter(laid_out), {}

    def _step(self, node: Node) -> Any:
        self.env[node] = found = self.run_node(node)
        for spent in self.user_to_last_uses.get(node, ()):
            self.env.pop(spent, None)
        return found

    def _rest(self, start: int) -> list[Tensor]:
        found: Any = ()
        for node in self.nodes[start:]:
            found = self._step(node)
        return [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]

    def run_node(self, n: Node) -> Any:
        if n in self.through:
            return self.env[self.through[n]]
        return self.quantized(n, None) if n in self.switch else super().run_node(n)

    def quantized(self, n: Node, spec: QSpec | None) -> Any:
        """The operation on its float inputs, quantized as in the graph, but for x, where another format is given."""
        known, x = {source(operand): self.env[operand] for operand in n.all_input_nodes}, self.sites[n].x
        if spec is not None:
            known[x] = at_run_time(known[source(x)], spec)
        return evaluate(n, known)


def at_run_time(x: Tensor, spec: QSpec) -> Tensor:
    """x quantized with ranges found at run time."""
    return dequantize(*dynamic_quantize(x, spec.dtype, spec.symmetric, spec.axis, spec.group), spec.dtype, spec.axis, spec.group)


def _chain(operand: Node) -> Iterator[tuple[Node, Node]]:
    """(node, what it passes on) of the nodes between a quantized operand and the value behind it, the operand among them."""
    value, work = source(operand), [operand]
    while work:
        node = work.pop()
        before = [n for n in node.all_input_nodes if n is not value and n.op == "call_function"]
        yield node, before[0] if before else value
        work += before
