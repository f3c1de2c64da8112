"""W[n, k] stays in float where it alone makes a huge output n from a huge input k: y = (W without it) x + W[n, k] x[k].

A language model has a handful of such weights, most often in the layers that write the residual stream; without one of them it is useless.
They are found as Yu et al., The Super Weight in Large Language Models (2024), section 3.1, find them: by one forward pass in which a spike of
the input and a spike of the output of a layer coincide. What is left of the layer has ranges that this weight no longer widens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.collect import collect
from qgraph.errors import RecipeError
from qgraph.outliers import Site, outlier_split, recompile, refuse, split_sites
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass


@dataclass(frozen=True)
class SuperWeight(Pass):
    """Linears with a weight to be quantized, found by numbers alone, in both dialects.

    A value is a spike when it is at least `spike` times the median: of the largest values per channel for inputs, of the same row for
    outputs. Kept are the weights that make at least `part` each of the largest output of the row with the largest input. Raises
    RecipeError for a spike of 1 or less, or a part outside (0, 1]."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)
    at: ClassVar[Literal["float", "observed", "quantized"]] = "observed"
    needs_data: ClassVar[bool] = True

    spike: float = 50.0
    part: float = 0.25

    def __post_init__(self) -> None:
        if not (self.spike > 1 and 0 < self.part <= 1):
            raise RecipeError(f"stage super-weight takes a spike above 1 and a part in (0, 1], got {self.spike!r} and {self.part!r}")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        sites = list(split_sites(gm, ctx, by=self.name))
        seen: dict[Node, Peak] = {site.x: Peak() for site in sites}
        if seen:
            collect(gm, seen, ctx.data, label=self.name, progress=ctx.progress)
        return recompile(gm, sum(self._split(gm, ctx, site, seen[site.x]) for site in sites))

    def _split(self, gm: GraphModule, ctx: Context, site: Site, seen: Peak) -> int:
        found = self._found(site, seen) if len(seen.row) else "the calibration data never reaches it"
        if isinstance(found, str):
            refuse(gm, ctx, site, found, by=self.name)
            return 0
        return outlier_split(gm, site, *found, by=self.name)

    def _found(self, site: Site, seen: Peak) -> tuple[Tensor, str] | str:
        """(the weights to keep, how they stand out), or why there are none."""
        weight = site.weight.float()
        y = weight @ seen.row
        n, k = int(y.abs().argmax()), int(seen.row.abs().argmax())
        inputs, outputs = (float(v.amax() / v.median().clamp(min=1e-30)) for v in (seen.largest, y.abs()))
        if min(inputs, outputs) < self.spike:
            return f"no spike: its input reaches {inputs:.3g} times the median, its output {outputs:.3g} times"
        parts = weight[n] * seen.row / y[n]
        if parts[k] < self.part:
            return f"the spike of its output is no single weight's: that of the largest input makes {float(parts[k]):.0%} of it"
        kept = torch.zeros_like(weight, dtype=torch.bool)
        kept[n] = parts >= self.part
        which = ", ".join(f"[{n}, {i}] = {float(weight[n, i]):.4g}" for i in kept[n].nonzero().flatten().tolist())
        return kept, f"super weight {which}: its input is {inputs:.3g} times the median, its output {outputs:.3g} times"


class Peak:
    """Of all rows of x: `largest` magnitudes per channel [n], and the `row` that holds the largest of all; empty before data."""

    def __init__(self) -> None:
        self.largest = self.row = torch.zeros(0)

    def __call__(self, x: Tensor) -> None:
        rows = x.float().reshape(-1, x.shape[-1])
        if not rows.numel():
            return
        magnitudes = rows.abs()
        largest, at = magnitudes.max(0)
        if not len(self.row) or largest.amax() > self.largest.amax():
            self.row = rows[at[largest.argmax()]].clone()
        self.largest = largest if not len(self.largest) else torch.maximum(self.largest, largest)
