"""Passes with contracts, and pipelines that time them, check them and name the first one that breaks its word.

Pipeline(FoldBatchNorm(), FoldConstants(limit=1024), verify="numerics").run(gm, Context(samples=[(x,)]))
"""

from __future__ import annotations

import logging
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from qgraph.contracts import EQUIVALENT, EXACT, LOSSY, Contract, Outputs, compare, run_samples
from qgraph.edit import copy_graph
from qgraph.errors import QGraphError
from qgraph.rewrite import Decline, Rule, apply
from qgraph.text import diff, text
from qgraph.verify import check_graph

__all__ = ["EQUIVALENT", "EXACT", "LOSSY", "Context", "Contract", "Hook", "Pass", "Pipeline", "Step"]

log = logging.getLogger("qgraph.pipeline")

Verify = Literal["structure", "numerics"]


@dataclass
class Context:
    """What a run of a pipeline carries along.

    `samples` are input tuples on which verify="numerics" runs the graph; `data` are calibration batches, which can be gone through
    several times (None: there are none; see `collect.collect`); with `record` each step keeps its graphs, to print them later;
    `progress` is that of `calibrate`; `declines` and `steps` grow as the run goes on."""

    samples: Sequence[tuple[Any, ...]] = ()
    data: Iterable[Any] | None = None
    record: bool = False
    progress: bool | None = None
    declines: list[Decline] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def apply(self, gm: GraphModule, rules: Iterable[Rule]) -> int:
        """Apply rules (see `rewrite.apply`), keep their refusals, return the number of rewrites."""
        applied = apply(gm, rules)
        self.declines += applied.declines
        return applied.count


@dataclass(frozen=True)
class Step:
    """One pass that has run: how many changes, how long, and what its rules refused. `before` and `after` are printed forms,
    None unless the context records."""

    name: str
    count: int
    seconds: float
    declines: tuple[Decline, ...] = ()
    graphs: tuple[GraphModule, GraphModule] | None = field(default=None, repr=False)

    @property
    def before(self) -> str | None:
        return text(self.graphs[0]) if self.graphs else None

    @property
    def after(self) -> str | None:
        return text(self.graphs[1]) if self.graphs else None

    def diff(self) -> str:
        """What the pass changed, as text. Raises QGraphError when the run did not record."""
        if self.graphs is None:
            raise QGraphError(f"step {self.name} kept no graphs: run with Context(record=True)")
        return diff(*self.graphs)

    def __str__(self) -> str:
        return f"{self.name}: {self.count} changes in {self.seconds:.3f} s, {len(self.declines)} declined"


@dataclass(frozen=True)
class Pass(PassBase):
    """A frozen dataclass whose fields are its options; `run` changes the graph in place and returns the number of changes.

    `name` defaults to the class name in snake case. Called with a GraphModule it works alone and in torch's PassManager.

    As a stage of a recipe a pass runs `at` the float graph, before it is annotated; at the observed one, before data reaches the observers;
    or at the quantized one, when observers have become fake_quantize. `needs_data`: it reads the context's data, so it waits for `calibrate`.
    `fills_ranges`: it gives ranges to observers, which then need no data."""

    name: ClassVar[str]
    contract: ClassVar[Contract] = EXACT
    at: ClassVar[Literal["float", "observed", "quantized"]] = "float"
    needs_data: ClassVar[bool] = False
    fills_ranges: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @abstractmethod
    def run(self, gm: GraphModule, ctx: Context) -> int: ...

    @property
    def models(self) -> int:
        """How many models a loop over lockstep runs side by side, for `plan`."""
        return 2

    def workspace(self, rows: int, columns: int) -> int:
        """Bytes that a loop over lockstep needs at a layer whose weight is [rows, columns], for `plan`."""
        return 0

    def call(self, graph_module: GraphModule) -> PassResult:
        return PassResult(graph_module, self.run(graph_module, Context()) > 0)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in fields(self))})"


@dataclass(frozen=True)
class Hook:
    """Called around each pass: `before(pass, gm)`, `after(pass, gm, step)`."""

    before: Callable[[Pass, GraphModule], None] | None = None
    after: Callable[[Pass, GraphModule, Step], None] | None = None


class Pipeline(PassBase):
    """Passes and pipelines in order. It is used like a pass: called alone, nested, or handed to torch's PassManager.

    `verify="structure"` checks legality after each pass; "numerics" also runs the graph on the context's samples before and after, and
    compares as the pass' contract says (LOSSY passes are not compared). That keeps a copy of the graph, not of its tensors, during each pass."""

    def __init__(self, *passes: Pass | Pipeline, name: str = "pipeline", verify: Verify | None = None, hooks: Sequence[Hook] = ()) -> None:
        if verify not in (None, "structure", "numerics"):
            raise QGraphError(f"verify is None, 'structure' or 'numerics', not {verify!r}")
        self.passes, self.name, self.verify, self.hooks = passes, name, verify, tuple(hooks)

    def run(self, gm: GraphModule, ctx: Context | None = None) -> list[Step]:
        """Run all passes on `gm` in place; returns this run's steps, those of nested pipelines in their place.

        Raises VerificationError naming the pass, the node and the worst element when a pass breaks its contract; QGraphError when
        numbers are to be verified without samples."""
        ctx = Context() if ctx is None else ctx
        return self._run(gm, ctx, self.verify, self.hooks)

    def call(self, graph_module: GraphModule) -> PassResult:
        return PassResult(graph_module, any(step.count for step in self.run(graph_module)))

    def _run(self, gm: GraphModule, ctx: Context, verify: Verify | None, hooks: tuple[Hook, ...]) -> list[Step]:
        if verify == "numerics" and not ctx.samples:
            raise QGraphError("verify='numerics' needs sample inputs: run(gm, Context(samples=[(x, ...), ...]))")
        steps: list[Step] = []
        known: Outputs | None = None
        for p in self.passes:
            if isinstance(p, Pipeline):
                steps += p._run(gm, ctx, _stricter(verify, p.verify), hooks + p.hooks)
                known = None
            else:
                step, known = _run_pass(p, gm, ctx, verify, hooks, known)
                steps.append(step)
        return steps

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.passes))})"

    __repr__ = __str__


def _stricter(a: Verify | None, b: Verify | None) -> Verify | None:
    order: tuple[Verify | None, ...] = (None, "structure", "numerics")
    return max(a, b, key=order.index)


def _run_pass(
    p: Pass, gm: GraphModule, ctx: Context, verify: Verify | None, hooks: tuple[Hook, ...], known: Outputs | None
) -> tuple[Step, Outputs | None]:
    """Run one pass; `known` are the graph's outputs on the samples if an earlier step has computed them, and so is the second result."""
    compared = verify == "numerics" and p.contract != LOSSY
    before = copy_graph(gm) if ctx.record or compared else None
    if compared and known is None:
        known = run_samples(gm, ctx.samples)
    for hook in hooks:
        if hook.before is not None:
            hook.before(p, gm)
    declined, start = len(ctx.declines), time.perf_counter()
    count = p.run(gm, ctx)
    seconds = time.perf_counter() - start
    graphs = (before, copy_graph(gm)) if ctx.record and before is not None else None
    step = Step(p.name, count, seconds, tuple(ctx.declines[declined:]), graphs)
    ctx.steps.append(step)
    log.info("%s", step)
    if verify is not None:
        check_graph(gm, after=p.name)
    known = compare(p.name, p.contract, before, gm, ctx.samples, known) if compared and before and known else None
    for hook in hooks:
        if hook.after is not None:
            hook.after(p, gm, step)
    return step, known
