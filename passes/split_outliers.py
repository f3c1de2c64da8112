"""y = W x -> W (x without c) + W[:, c] x[c]: the input channels c with the largest values stay in float, the others get finer ranges.

Dettmers et al., LLM.int8() (2022), section 3.2, with the set c chosen on calibration data, once, instead of in each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.channels import Channels
from qgraph.collect import collect
from qgraph.errors import RecipeError
from qgraph.outliers import Site, outlier_split, recompile, refuse, split_sites, without_columns
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Linears of which weight and x are to be quantized, in both dialects; all that read one x have the same channels in float.

    `share` of the channels are taken out, those with the largest magnitudes on the data; with a `threshold` all that exceed it instead
    (the paper's is 6, for models of 6.7 billion parameters and more). Nothing is taken where the largest value is not at least `worth`
    times the largest that is left. Raises RecipeError for a share outside (0, 1), or a threshold or worth below 0."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)
    at: ClassVar[Literal["float", "observed", "quantized"]] = "observed"
    needs_data: ClassVar[bool] = True

    share: float = 0.01
    threshold: float | None = None
    worth: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise RecipeError(f"share of stage llm-int8 is a part of the channels between 0 and 1, got {self.share!r}")
        if min(self.threshold or 0, self.worth) < 0:
            raise RecipeError(f"threshold and worth of stage llm-int8 are 0 or more, got {self.threshold!r} and {self.worth!r}")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        shared: dict[Node, list[Site]] = {}
        for site in split_sites(gm, ctx, by=self.name):
            if why := _obstacle(site):
                refuse(gm, ctx, site, why, by=self.name)
            else:
                shared.setdefault(site.x, []).append(site)
        seen = {x: Channels(-1) for x in shared}
        if seen:
            collect(gm, {x: found.update for x, found in seen.items()}, ctx.data, label=self.name, progress=ctx.progress)
        return recompile(gm, sum(self._split(gm, ctx, sites, seen[x]) for x, sites in shared.items()))

    def _split(self, gm: GraphModule, ctx: Context, sites: list[Site], seen: Channels) -> int:
        if not len(seen.low):
            chosen: Tensor | str = "the calibration data never reaches it"
        else:
            chosen = _read_elsewhere(sites) or self._columns(seen.largest())
        if isinstance(chosen, str):
            for site in sites:
                refuse(gm, ctx, site, chosen, by=self.name)
            return 0
        reason = (
            f"values up to {float(seen.largest().amax()):.4g} are there, the others have at most {float(_left(seen.largest(), chosen)):.4g}"
        )
        split = []
        for site in sites:
            kept = torch.zeros(site.weight.shape, dtype=torch.bool)
            kept[:, chosen] = True
            if outlier_split(gm, site, kept, reason, by=self.name):
                split.append(site)
        if split:
            without_columns(sites[0].part, split, chosen, by=self.name)
        return len(split)

    def _columns(self, largest: Tensor) -> Tensor | str:
        """The channels that stay in float, or why none does."""
        if self.threshold is not None:
            chosen = (largest > self.threshold).nonzero().flatten()
            if not len(chosen):
                return f"no value of x exceeds {self.threshold:g}, the largest is {float(largest.amax()):.4g}"
            if len(chosen) == len(largest):
                return f"values of all its channels exceed {self.threshold:g}; give a larger threshold, or a share"
        else:
            chosen = largest.topk(max(1, round(len(largest) * self.share))).indices.sort().values
        gain = float(largest.amax() / _left(largest, chosen).clamp(min=1e-30))
        if gain < self.worth:
            return f"without its {len(chosen)} largest channels the range of x would be {gain:.2f} times smaller only"
        return chosen


def _left(largest: Tensor, chosen: Tensor) -> Tensor:
    """The largest value outside these channels."""
    return largest.index_fill(0, chosen, 0).amax()


def _obstacle(site: Site) -> str:
    return "" if site.quantizes_x else "x stays in float, so its outliers widen no range"


def _read_elsewhere(sites: list[Site]) -> str:
    """An observed value would lose its outliers for readers that keep them."""
    own = {site.node for site in sites}
    other = next((user for site in sites if site.watch is not None for user in site.watch.users if user not in own), None)
    return "" if other is None else f"%{other.name} reads the integers of x, too"
