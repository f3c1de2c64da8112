"""The ledger: per weight and activation edge what was decided, by which pass, and why. Nothing is skipped in silence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch.fx import GraphModule

if TYPE_CHECKING:
    from qgraph.pipeline import Pass
    from qgraph.recipe import Recipe
    from qgraph.resume import Progress
    from qgraph.rewriter import Decline
    from qgraph.tradeoff import Tradeoff

FLOAT = "float"
"""The decision of an edge that keeps its float type."""


ASIDES = frozenset(("accumulator", "scale", "shift", "range", "distribution", "outliers", "container", "kernel"))
"""Roles that are no edges: what sums need (saturation.py), factors and shifts of input channels, the range of a value that data do not give,
what an input is taken for, what of a weight stays in float, codes wider than the format, an operation that no kernel of the backend runs."""


@dataclass(frozen=True)
class Entry:
    """One decision. `role` says what about `node`: an operand ("weight", "x", "operand" for a second activation), "bias", "output"; or one of
    ASIDES. `decision` is a QSpec's text ("int8 sym per axis 0"), "int32" for a derived bias, or "float"; `by` the pass; `reason` a sentence."""

    node: str
    kind: str
    role: str
    decision: str
    by: str
    reason: str = ""

    @property
    def quantized(self) -> bool:
        return self.decision != FLOAT


class Ledger:
    """Decisions keyed by (node, role); a later pass replaces an earlier decision about the same edge and keeps it in `history`."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self.history: list[Entry] = []

    def record(self, entry: Entry) -> None:
        old = self._entries.get((entry.node, entry.role))
        if old is not None and old != entry:
            self.history.append(old)
        self._entries[entry.node, entry.role] = entry

    def copy(self) -> Ledger:
        new = Ledger()
        new._entries, new.history = dict(self._entries), list(self.history)
        return new

    def get(self, node: str, role: str) -> Entry | None:
        return self._entries.get((node, role))

    def of(self, node: str) -> list[Entry]:
        """All decisions about one node, by its path."""
        return [e for (n, _), e in self._entries.items() if n == node]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def summary(self) -> dict[str, int]:
        """Counts for a one-line report: weights and activation edges, quantized and float."""
        count = {"weights": 0, "weights_quantized": 0, "activations": 0, "activations_quantized": 0}
        for e in self:
            group = "weights" if e.role == "weight" else "activations"
            if e.role == "bias" or e.role in ASIDES:
                continue
            count[group] += 1
            count[f"{group}_quantized"] += e.quantized
        return count

    def table(self) -> str:
        """One aligned line per decision."""
        rows = [(e.node, e.kind, e.role, e.decision, e.by, e.reason) for e in self]
        widths = [max((len(r[i]) for r in rows), default=0) for i in range(5)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(r[:5], widths, strict=True)), r[5]]).rstrip() for r in rows)


Stage = Literal["captured", "prepared", "calibrated", "converted", "lowered"]


@dataclass
class State:
    """What travels with a graph in `gm.meta["qgraph"]`, from capture to export.

    `example_inputs` are positional example tensors in placeholder order (None for graphs read from ONNX); `dynamic_shapes`
    is torch.export's form; names are in the order of the flat inputs and outputs; `dim_names` gives the name of a symbol in the types
    ("s77" -> "batch"); `tied` lists the module paths of every tensor that has several; `pending` are the passes of the recipe that
    wait for `calibrate`, in order; `declines` is what stages of the recipe refused to do, and why; `tradeoff` is what the search of
    recipe "auto" has found; `progress` is what an interrupted `calibrate` has done."""

    source: Literal["torch", "onnx"]
    example_inputs: tuple[Any, ...] | None = None
    dynamic_shapes: Any = None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    recipe: Recipe | None = None
    stage: Stage = "captured"
    dim_names: dict[str, str] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    pending: tuple[Pass, ...] = ()
    declines: tuple[Decline, ...] = ()
    tradeoff: Tradeoff | None = None
    progress: Progress | None = None

    def copy(self) -> State:
        """A State with a ledger of its own."""
        return replace(self, ledger=self.ledger.copy())


def state(gm: GraphModule) -> State:
    """The graph's State; a bare GraphModule of unknown origin gets a fresh one."""
    found = gm.meta.get("qgraph")
    if not isinstance(found, State):
        found = gm.meta["qgraph"] = State(source="torch")
    return found
