"""effects(quantized, batches): what the model's outputs lose when one operation is quantized, or all others are.

The graph runs once for each operation and batch, so a few samples must do. Errors of operations are nearly independent of each other:
the power of what a quantized model loses is about the sum of what its operations lose alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from qgraph.errors import CalibrationError
from qgraph.isolate import Isolated, evaluate, isolate, power, source
from qgraph.reference import dequantize, dynamic_quantize
from qgraph.sweep import arranged
from qgraph.types import QSpec

Place = tuple[int, str]
"""(number of the graph, FX name) of an operation."""

Switch = Mapping[Node, QSpec | None]
"""Operations that are quantized, with the format of x where it is another than the graph's."""


class Effects:
    """Shares of the power of the float outputs, summed over the first batches, about `samples` samples; operations of the outermost
    graph only. Raises CalibrationError for a batch on which the model does not run."""

    def __init__(self, quantized: GraphModule, batches: Iterable[Any], *, samples: int = 16) -> None:
        self.sites = {site.place: site for site in isolate(quantized)[1] if not site.nested}
        self.run = _Switched(quantized, list(self.sites.values()))
        self.batches = list(_first(arranged(quantized, batches), samples))
        self.float = [self._outputs(where, args, {}) for where, args in self.batches]
        self.signal = sum(power(y) for ys in self.float for y in ys)

    def alone(self, place: Place, x: QSpec | None = None) -> float:
        """What the outputs lose with this operation alone quantized; with `x` as the format of its input."""
        return self._lost({self.sites[place].node: x})

    def others(self, place: Place) -> float:
        """What they lose with all operations quantized but this one."""
        return self._lost({s.node: None for other, s in self.sites.items() if other != place})

    def _lost(self, switch: Switch) -> float:
        pairs = zip(self.batches, self.float, strict=True)
        lost = sum(power(a - b) for (where, args), want in pairs for a, b in zip(self._outputs(where, args, switch), want, strict=True))
        return lost / self.signal if self.signal > 0 else float("inf")

    def _outputs(self, where: str, args: Sequence[Any], switch: Switch) -> list[Tensor]:
        try:
            return self.run(args, switch)
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as e:
            raise CalibrationError(f"{where}: the model does not run on this batch: {e}") from e


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
        self.switch: Switch = {}
        self.through = {n: value for operand in gm.graph.nodes if source(operand) is not operand for n, value in _chain(operand)}

    @torch.no_grad()
    def __call__(self, args: Sequence[Any], switch: Switch) -> list[Tensor]:
        """The float outputs."""
        self.switch = switch
        found = tree_leaves(self.run(*args, enable_io_processing=False))
        return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]

    def run_node(self, n: Node) -> Any:
        if n in self.through:
            return self.env[self.through[n]]
        if n not in self.switch:
            return super().run_node(n)
        known = {source(operand): self.env[operand] for operand in n.all_input_nodes}
        spec, x = self.switch[n], self.sites[n].x
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
