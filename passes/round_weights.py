"""Weights rounded so that the layer's output, not the weight, is kept: GPTQ on the quantized prefix, for convolutions and linears.

With x the columns that a row w of the weight is multiplied with (patches of the input, im2col) in the float model, and x' the same in the
model quantized up to here, minus their means (the bias takes those), rounding is to keep w* x' where

    w* = w + follow (w C H^-1 - w)        C = E[x x'^T], H = E[x' x'^T]

With follow = 1 this is the row that comes closest to the float output w x (Li et al., GPTAQ, 2025), with 0 it is w. Each output's scale is
refined twice: before rounding on a grid, and after it by the factor that fits the float output best, which costs nothing at run time.
What is left of the mean goes into the bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import os
import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph.hessian import Grid, best_factor, damped, round_rows
from qgraph.layers import QuantizedLayer, layers
from qgraph.ledger import Entry, state
from qgraph.lockstep import At, lockstep
from qgraph.passes.bias_correct import correct, mean_shift
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.reference import fake_quantize, spread
from qgraph.rewrite import Decline
from qgraph.text import path_of
from qgraph.types import int_range

SHRINK = [1 - i / 50 for i in range(11)]
"""Factors of the scale that are tried: a clipped tail may cost less than coarser steps."""

GRID=int(os.environ.get("GRID","1"));GAINS=int(os.environ.get("GAINS","1"))
GAIN = (0.8, 1.25)
"""Limits of the factor after rounding: more is no rounding error."""


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Convolutions and linears whose weight is fake-quantized with an integer grid, in both dialects.

    About `samples` calibration samples are run, fewer where they need more than `budget` bytes; `positions` patches are taken of each
    batch. `damp` is the share of the mean diagonal that is added to H. A second run rounds the same float weights again."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"
    needs_data: ClassVar[bool] = True

    samples: int = 64
    budget: int = 2**28
    positions: int = 512
    damp: float = 0.01
    follow: float = 0.0

    def run(self, gm: GraphModule, ctx: Context) -> int:
        sites, count = layers(gm, ctx, by=self.name), 0
        for at in lockstep(gm, sites, ctx.data, samples=self.samples, budget=self.budget, label=self.name):
            layer = sites[at.node]
            if reason := _obstacle(layer):
                ctx.declines.append(Decline(self.name, at.node.name, path_of(at.node), reason))
                continue
            count += self.round(gm, at, layer)
            correct(gm, layer, mean_shift(at, layer), by=self.name)
        gm.graph.lint()
        gm.recompile()
        return count

    def round(self, gm: GraphModule, at: At, layer: QuantizedLayer) -> int:
        """Rounds one layer; returns whether its constants changed."""
        h, c = _moments(at, layer, self.positions)
        rows = layer.rows(at.constant(layer.view.weight)[0]).float()
        scale, grid, own = at.constant(layer.fake.scale)[0], _grid(at, layer), _has_own_scales(layer)
        factor = torch.ones_like(rows[..., :1])
        if own and GRID:
            factor = best_factor(rows, h, grid, SHRINK)
        found = round_rows(rows, h, grid.rescaled(factor), damp=self.damp)
        if own and GAINS:
            gain = ((rows @ c) * found).sum(-1, keepdim=True) / ((found @ h) * found).sum(-1, keepdim=True)
            gain = gain.nan_to_num(1.0).clamp(*GAIN)
            found, factor = found * gain, factor * gain
        scale = (scale.float() * factor.reshape(scale.shape)).to(scale.dtype) if own else scale
        return _store(gm, at, layer, found, scale, by=self.name)


def _obstacle(layer: QuantizedLayer) -> str:
    if not layer.has_rows:
        return "a transposed convolution, or padding that depends on the input's size, has no fixed columns"
    return "its quantized weight is read elsewhere, too" if len(layer.view.weight.users) > 1 else ""


def _has_own_scales(layer: QuantizedLayer) -> bool:
    """Every output has a scale of its own, which may change."""
    return (
        layer.fake.axis is not None
        and not layer.fake.group
        and layer.fake.axis % layer.weight.dim() == layer.view.out_axis % layer.weight.dim()
    )


def _moments(at: At, layer: QuantizedLayer, positions: int) -> tuple[Tensor, Tensor]:
    h = c = torch.zeros(())
    count, means = 0, None
    for values in at.values(layer.view.x):
        x, y = (layer.columns(v.float(), positions) for v in values) if GAINS else [layer.columns(values[1].float(), positions)]*2
        if means is None:
            means = x.mean(-1, keepdim=True), y.mean(-1, keepdim=True)
        y=y-means[1]; x = x - means[0] if GAINS else y
        h = h + y @ y.mT
        if GAINS: c = c + x @ y.mT
        count += x.shape[-1]
    return h / count, c / count


def _grid(at: At, layer: QuantizedLayer) -> Grid:
    fake, ones = layer.fake, torch.ones_like(layer.weight, dtype=torch.float32)
    zero = None if fake.zero_point is None else at.constant(fake.zero_point)[0]
    if zero is not None and not zero.any():
        zero = None
    spreads = (None if v is None else layer.rows(ones * spread(v.float(), ones, fake.axis, fake.group)) for v in (at.constant(fake.scale)[0], zero))
    return Grid(*spreads, *int_range(fake.dtype))


def _store(gm: GraphModule, at: At, layer: QuantizedLayer, rows: Tensor, scale: Tensor, *, by: str) -> int:
    fake, old = layer.fake, layer.weight
    zero = None if fake.zero_point is None else at.constant(fake.zero_point)[0]
    weight = fake_quantize(layer.from_rows(rows).to(old.dtype).contiguous(), scale, zero, fake.dtype, fake.axis, fake.group)
    if torch.equal(weight, old):
        return 0
    layer.set_weight(gm, weight, scale, by=by)
    at.forget()
    ledger = state(gm).ledger
    entry = ledger.get(layer.label(ledger), "weight")
    if entry is not None:
        ledger.record(Entry(entry.node, entry.kind, "weight", entry.decision, by, "rounded to keep the output on calibration data"))
    return 1
