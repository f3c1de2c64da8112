"""W x -> Q(W - S) x + S x: the weights S that quantization would hurt most stay in float, and the rest gets ranges without them.

    KeepLargest      the largest weights, wherever they are                         (Kim et al., SqueezeLLM, 2023, section 4.2)
    KeepSensitive    those with the largest (W - Q(W))^2 E[x^2], one by one         (Dettmers et al., SpQR, 2023, section 3)
                     or by whole input channels                                     (Lee et al., OWQ, 2023)

SpQR divides by the diagonal of the inverse Hessian where this multiplies with that of the Hessian: measured, perplexities are within 1.2 % of
each other either way, and the inverse would take a matrix per layer. Channels are a small product behind a Gather, single weights a whole one.
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
from qgraph.passes.weigh_channels import MeanSquare
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass
from qgraph.qparams import choose_qparams, minmax
from qgraph.reference import fake_quantize

FORMS = ("columns", "entries")


@dataclass(frozen=True)
class KeepLargest(Pass):
    """`share` of each linear's weights stay in float: the largest magnitudes. Needs no data, and takes any format of the rest.

    Raises RecipeError for a share outside (0, 1)."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)
    at: ClassVar[Literal["float", "observed", "quantized"]] = "observed"

    share: float = 0.01

    def __post_init__(self) -> None:
        _require_share(self.share, "dense-sparse")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        count = 0
        for site in split_sites(gm, ctx, by=self.name):
            kept = _largest(site.weight.abs(), self.share)
            if not bool(site.weight[kept].any()):
                refuse(gm, ctx, site, "its weight is 0", by=self.name)
            else:
                count += outlier_split(gm, site, kept, f"the largest {self.share:.2%} of its weights", by=self.name)
        return recompile(gm, count)


@dataclass(frozen=True)
class KeepSensitive(Pass):
    """`share` of each linear's input channels, or single weights (`form` "entries"), stay in float: those whose error would cost most.

    Formats of the rest are integers. Raises RecipeError for a share outside (0, 1), or another form."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)
    at: ClassVar[Literal["float", "observed", "quantized"]] = "observed"
    needs_data: ClassVar[bool] = True

    share: float = 0.01
    form: Literal["columns", "entries"] = "columns"

    def __post_init__(self) -> None:
        _require_share(self.share, "keep-sensitive")
        if self.form not in FORMS:
            raise RecipeError(f"form of stage keep-sensitive is {' or '.join(FORMS)}, got {self.form!r}")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        sites = []
        for site in split_sites(gm, ctx, by=self.name):
            if site.spec.codebook is None:
                sites.append(site)
            else:
                refuse(gm, ctx, site, "the levels of its codebook are not known yet; dense-sparse keeps the largest weights", by=self.name)
        seen: dict[Node, MeanSquare] = {site.x: MeanSquare(-1) for site in sites}
        if seen:
            collect(gm, seen, ctx.data, label=self.name, progress=ctx.progress)
        return recompile(gm, sum(self._split(gm, ctx, site, seen[site.x]) for site in sites))

    def _split(self, gm: GraphModule, ctx: Context, site: Site, seen: MeanSquare) -> int:
        if not seen.count:
            return _nothing(gm, ctx, site, "the calibration data never reaches it", by=self.name)
        cost = _error(site).square() * seen.mean
        if not bool(cost.any()):
            return _nothing(gm, ctx, site, f"{site.spec} holds its weight as it is", by=self.name)
        kept = _largest(cost, self.share) if self.form == "entries" else _largest(cost.sum(0), self.share).expand_as(cost)
        part = float(cost[kept].sum() / cost.sum())
        return outlier_split(gm, site, kept, f"{part:.0%} of the error of its output is from them", by=self.name)


def _require_share(share: float, stage: str) -> None:
    if not 0 < share < 1:
        raise RecipeError(f"share of stage {stage} is a part of the weights between 0 and 1, got {share!r}")


def _nothing(gm: GraphModule, ctx: Context, site: Site, reason: str, *, by: str) -> int:
    refuse(gm, ctx, site, reason, by=by)
    return 0


def _largest(values: Tensor, share: float) -> Tensor:
    """Where the largest `share` of the values lie, at least one: bool."""
    chosen = values.flatten().topk(max(1, round(values.numel() * share))).indices
    return torch.zeros(values.numel(), dtype=torch.bool).index_fill_(0, chosen, True).reshape(values.shape)


def _error(site: Site) -> Tensor:
    """What its format changes in the weight, float32 [out, in]: rounded to nearest, ranges from smallest to largest value."""
    spec, weight = site.spec, site.stored.float()
    scale, zero_point = choose_qparams(*minmax(weight, spec.axis, spec.group), spec)
    return site.turned(fake_quantize(weight, scale, zero_point, spec.dtype, spec.axis, spec.group) - weight)
