"""losses(quantized, batches): per operation, what quantizing it alone costs; rows for people and for the stage `mixed`.

The float graph runs; at each operation with quantized operands the float and the quantized forms are computed on the float input:

    sqnr = 10 log10( sum |y|**2 / sum |y - y_q|**2 )    y = f(x, w), y_q = f(q(x), q(w)), or one of them quantized

The second statistic is that of hybrid quantization: the interquartile range of an operation's input over all data. It marks an
operation when it is an outlier among those of all operations, above Q3 + 1.5 (Q3 - Q1) (Tukey's fence): where most values lie far
out, 256 steps are coarse.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.backend import Placement
from qgraph.collect import collect
from qgraph.effects import at_run_time
from qgraph.formats import SITES, run_time_format
from qgraph.isolate import Isolated, evaluate, isolate, power, source
from qgraph.statistics import Quantiles
from qgraph.text import target_name
from qgraph.views import Embedding, view, view_any


@dataclass(frozen=True)
class Loss:
    """One operation, quantized alone. SQNRs are in dB, of its output: with both operands quantized, with the weight alone, with x alone
    (None where that operand is float), and with the range of a static x found at run time instead (None where the backend cannot).

    `iqr`: interquartile range of x (None for indices); `outlier`: see the module. `effect`: SQNR of the model's outputs with this
    operation alone quantized, or with all others (None: not asked for, or nested). `place` is (number of the graph, FX name)."""

    node: str
    kind: str
    weight: str
    x: str
    sqnr: float
    weight_sqnr: float | None
    x_sqnr: float | None
    run_time_sqnr: float | None
    iqr: float | None
    outlier: bool
    effect: float | None
    place: tuple[int, str]


@dataclass(frozen=True)
class Sensitivity:
    """Rows in order: the most sensitive operation first (by `effect` where it was asked for, else by `sqnr`)."""

    rows: tuple[Loss, ...]

    def __iter__(self) -> Iterator[Loss]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_json(self) -> list[dict[str, Any]]:
        """Plain values; an infinite SQNR (nothing was lost) is None."""
        return [{k: v for k, v in ((k, _finite(v)) for k, v in asdict(row).items()) if k != "place"} for row in self]

    def table(self) -> Table:
        columns = ("dB", "weight dB", "x dB", "run-time dB", "IQR", "effect dB")
        found = Table("operation", "kind", "weight", "x", box=None, pad_edge=False)
        for name in columns:
            found.add_column(name, justify="right")
        for r in self:
            numbers = (r.sqnr, r.weight_sqnr, r.x_sqnr, r.run_time_sqnr, r.iqr, r.effect)
            cells = ["" if n is None else f"{n:.3g}" if n is r.iqr else f"{n:.1f}" for n in numbers]
            cells[4] += " *" if r.outlier else ""
            found.add_row(r.node, r.kind, r.weight, r.x, *cells)
        return found

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=200).print(self.table())
        return out.getvalue().rstrip()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def decibel(signal: float, error: float) -> float:
    """10 log10(signal / error); inf without error, -inf for an error on nothing."""
    if error <= 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


def losses(
    quantized: GraphModule, batches: Iterable[Any] | None, *, placement: Placement | None = None, progress: bool | None = None
) -> Sensitivity:
    """Measures a graph that insert_fake_quant has made; it is not changed. With `placement`, static ranges are compared with those found
    at run time, where the backend has them (formats.run_time_format).

    Memory: quantized copies of the weights, a histogram for each input, and the inputs of all operations on one batch. Raises CalibrationError when there are no batches."""
    plain, found = isolate(quantized)
    probes = [_Probe(site, placement) for site in found]
    ranges = {p.x: Quantiles(name=p.site.label) for p in probes if p.x is not None}
    if probes:
        collect(plain, _listeners(probes, ranges), batches, label="sensitivity", progress=progress)
    return ordered(with_outliers([p.row(ranges) for p in probes]))


def ordered(rows: Iterable[Loss]) -> Sensitivity:
    return Sensitivity(tuple(sorted(rows, key=lambda r: (r.effect if r.effect is not None else r.sqnr, r.sqnr, r.place))))


def _listeners(probes: Sequence[_Probe], ranges: Mapping[Node, Quantiles]) -> dict[Node, Callable[[Tensor], None]]:
    readers: dict[Node, list[Callable[[Tensor], None]]] = {value: [watch.update] for value, watch in ranges.items()}
    for p in probes:
        for value in p.values:
            readers.setdefault(value, []).append(p.listener(value))

    def told(fns: list[Callable[[Tensor], None]]) -> Callable[[Tensor], None]:
        def tell(x: Tensor) -> None:
            for fn in fns:
                fn(x)

        return tell

    return {value: told(fns) for value, fns in readers.items()}


class _Probe:
    """Sums over the data of one operation: the power of its float output, and of what each quantized form adds to it."""

    def __init__(self, site: Isolated, placement: Placement | None) -> None:
        self.site, v = site, view_any(SITES, site.node)
        found = None if placement is None else run_time_format(v, placement)
        self.run_time = None if found is None else found.activation_spec()
        self.values = dict.fromkeys(site.inputs.values())
        self.x = None if view(Embedding, site.node) is not None else site.inputs.get(site.x)
        self.signal, self.error = 0.0, dict.fromkeys(self.forms(), 0.0)
        self.constants = {o: (evaluate(source(o), {}), evaluate(o, {})) for o in (site.x, site.weight) if o not in site.inputs}
        self.waiting: dict[Node, Tensor] = {}

    def forms(self) -> Iterator[str]:
        weight, x = self.site.formats
        yield "all"
        if weight is not None:
            yield "weight"
        if x is not None:
            yield "x"
            if self.run_time is not None and not x.dynamic:
                yield "run time"

    def listener(self, value: Node) -> Callable[[Tensor], None]:
        def take(x: Tensor) -> None:
            self.waiting[value] = x
            if len(self.waiting) == len(self.values):
                self.measure({n: self.waiting[v] for n, v in self.site.inputs.items()})
                self.waiting.clear()

        return take

    @torch.no_grad()
    def measure(self, inputs: dict[Node, Tensor]) -> None:
        """Adds one batch; `inputs`: what the site reads -> its float value."""
        node, x, weight = self.site.node, self.site.x, self.site.weight
        behind = {source(operand): value for operand, value in inputs.items()}
        plain = inputs | {o: before for o, (before, _) in self.constants.items()}
        coarse = {o: evaluate(o, behind) for o in inputs} | {o: after for o, (_, after) in self.constants.items()}
        y = evaluate(node, plain)
        self.signal += power(y)
        for form in self.error:
            taken = {"all": (x, weight), "weight": (weight,), "x": (x,), "run time": (weight,)}[form]
            known = plain | {o: coarse[o] for o in taken}
            if form == "run time" and self.run_time is not None:
                known[x] = at_run_time(plain[x], self.run_time)
            self.error[form] += power(evaluate(node, known) - y)

    def row(self, ranges: Mapping[Node, Quantiles]) -> Loss:
        weight, x = (str(f) if f is not None else "float" for f in self.site.formats)
        sqnr = {form: decibel(self.signal, error) for form, error in self.error.items()}
        return Loss(
            node=self.site.label,
            kind=target_name(self.site.node),
            weight=weight,
            x=x,
            sqnr=sqnr["all"],
            weight_sqnr=sqnr.get("weight"),
            x_sqnr=sqnr.get("x"),
            run_time_sqnr=sqnr.get("run time"),
            iqr=None if self.x is None else ranges[self.x].interquartile_range,
            outlier=False,
            effect=None,
            place=self.site.place,
        )


def with_outliers(rows: Sequence[Loss]) -> list[Loss]:
    known = torch.tensor([r.iqr for r in rows if r.iqr is not None], dtype=torch.float64)
    if not len(known):
        return list(rows)
    first, third = (float(known.quantile(q)) for q in (0.25, 0.75))
    fence = third + 1.5 * (third - first)
    return [replace(r, outlier=r.iqr is not None and r.iqr > fence) for r in rows]
