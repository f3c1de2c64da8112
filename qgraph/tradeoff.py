"""What a search for the fastest recipe within a budget has tried: Trial, one row; Tradeoff, all of them and the choice."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from qgraph.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Candidate:
    """A recipe in the words of the command line: a name, and `overrides` as --set takes them."""

    name: str
    overrides: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        """Raises RecipeError."""
        return load_recipe(self.name, self.overrides)

    @property
    def key(self) -> str:
        return json.dumps([self.name, *self.overrides])

    @property
    def back(self) -> int:
        """How many rules put an operation back to higher precision."""
        return sum(o.startswith("rules.") for o in self.overrides)

    def __str__(self) -> str:
        shown = [o.removeprefix("observer_options.") for o in self.overrides if not o.startswith("rules.")]
        return " ".join([self.name, *shown]) + (f", {self.back} operations back" if self.back else "")


@dataclass(frozen=True)
class Trial:
    """One candidate as measured. `drop` is float metric - metric; `ratio` the median latency over the float model's, the two run in turn;
    `mb` the size of the saved model (10**6 bytes, None where the backend saves none); `seconds` what the trial took.
    A candidate that failed has a `failure`, and NaN for what was not measured."""

    candidate: Candidate
    metric: float = math.nan
    drop: float = math.nan
    ratio: float = math.nan
    mb: float | None = None
    seconds: float = 0.0
    failure: str = ""

    def within(self, max_drop: float) -> bool:
        return self.drop <= max_drop  # False for NaN

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN and infinities are None."""
        row = asdict(self) | {"candidate": [self.candidate.name, *self.candidate.overrides]}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Trial:
        name, *overrides = row["candidate"]
        numbers = {k: math.nan if row[k] is None else float(row[k]) for k in ("metric", "drop", "ratio")}
        return cls(Candidate(name, tuple(overrides)), mb=row["mb"], seconds=row["seconds"], failure=row["failure"], **numbers)


@dataclass(frozen=True)
class Tradeoff:
    """The trials in the order in which they were made, and the chosen one: the fastest of those whose drop is at most `max_drop`.
    `chosen` is None where the float model is the answer; `statement` says so, and why."""

    metric: str
    float_metric: float
    max_drop: float
    trials: tuple[Trial, ...]
    chosen: Trial | None

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def curve(self) -> tuple[Trial, ...]:
        """The trials that no other beats in both latency and drop, the fastest first."""
        found: list[Trial] = []
        for t in sorted((t for t in self.trials if not t.failure and not math.isnan(t.drop)), key=lambda t: (t.ratio, t.drop)):
            if not found or t.drop < found[-1].drop:
                found.append(t)
        return tuple(found)

    @property
    def statement(self) -> str:
        budget = f"{self.metric} may drop by {self.max_drop:g} from {self.float_metric:g}"
        if self.chosen is not None:
            t = self.chosen
            return f"{t.candidate}: {t.ratio:.2f} of the float latency, {self.metric} drops by {t.drop:.4g} ({budget})"
        return f"the float model: nothing that is faster keeps the budget ({budget}; {self._nearest()})"

    def _nearest(self) -> str:
        good = [t for t in self.curve() if t.within(self.max_drop)]
        near = good[0] if good else min(self.curve(), key=lambda t: t.drop, default=None)
        return (
            "no candidate could be measured"
            if near is None
            else f"{near.candidate}: drop {near.drop:.4g} at {near.ratio:.2f} of its latency"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "float_metric": self.float_metric,
            "max_drop": self.max_drop,
            "chosen": None if self.chosen is None else self.chosen.as_json(),
            "statement": self.statement,
            "trials": [t.as_json() for t in self.trials],
        }

    def table(self) -> Table:
        curve = set(map(id, self.curve()))
        found = Table("", "recipe", box=None, pad_edge=False)
        for name in (self.metric, "drop", "latency / float", "MB", "s"):
            found.add_column(name, justify="right")
        for t in self.trials:
            mark = ">" if t is self.chosen else "*" if id(t) in curve else ""
            numbers = (
                ("", "", "", "") if t.failure else (f"{t.metric:.6g}", f"{t.drop:.3g}", f"{t.ratio:.2f}", f"{t.mb:.2f}" if t.mb else "")
            )
            found.add_row(mark, f"{t.candidate}: {t.failure}" if t.failure else str(t.candidate), *numbers, f"{t.seconds:.1f}")
        return found

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=160).print(self.table(), f"\n{self.statement}", sep="", markup=False, highlight=False)
        return out.getvalue().rstrip()
