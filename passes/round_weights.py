"""Weights rounded so that the layer's output, not the weight, is kept: GPTQ on the quantized prefix, for convolutions and linears.

With x the columns that a row w of the weight is multiplied with (patches of the input, im2col) in the model quantized up to here, minus
their means, w is rounded to the w* of the grid that keeps E[((w - w*) x)^2] small (hessian.py); what is left of the mean error goes into
the bias. Scales stay: choosing them anew, before rounding or after, was measured and gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph.hessian import Grid, round_rows
from qgraph.layers import QuantizedLayer, layers
from qgraph.ledger import Entry, state
from qgraph.lockstep import At, lockstep
from qgraph.passes.bias_correct import correct, mean_shift
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.reference import fake_quantize, spread
from qgraph.rewrite import Decline
from qgraph.text import path_of
from qgraph.types import int_range


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Convolutions and linears whose weight is fake-quantized with an integer grid, in both dialects.

    About `samples` calibration samples are run, fewer where they need more than `budget` bytes; `positions` patches are taken of each
    batch. `damp` is the share of the mean diagonal that is added to E[x x^T]. A second run rounds the same float weights again."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"
    needs_data: ClassVar[bool] = True

    samples: int = 32
    budget: int = 2**26
    positions: int = 512
    damp: float = 0.01

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
        """Rounds one layer; returns whether that changed its weight."""
        rows = layer.rows(at.constant(layer.view.weight)[0]).float()
        found = round_rows(rows, _second_moment(at, layer, self.positions), _grid(at, layer), damp=self.damp)
        return _store(gm, at, layer, found, by=self.name)


def _obstacle(layer: QuantizedLayer) -> str:
    if not layer.has_rows:
        return "a transposed convolution, or padding that depends on the input's size, has no fixed columns"
    return "its quantized weight is read elsewhere, too" if len(layer.view.weight.users) > 1 else ""


def _second_moment(at: At, layer: QuantizedLayer, positions: int) -> Tensor:
    """E[x x^T], float32 [groups, columns, columns]; x is centred with the means of the first batch, so no rounding makes it indefinite."""
    total, count, mean = torch.zeros(()), 0, None
    for _, x in at.values(layer.view.x):
        columns = layer.columns(x.float(), positions)
        mean = columns.mean(-1, keepdim=True) if mean is None else mean
        columns = columns - mean
        total = total + columns @ columns.mT if count == 0 else total.baddbmm_(columns, columns.mT)
        count += columns.shape[-1]
    return total.div_(count)


def _grid(at: At, layer: QuantizedLayer) -> Grid:
    fake, ones = layer.fake, torch.ones_like(layer.weight, dtype=torch.float32)

    def by_row(value: Tensor) -> Tensor:
        return layer.rows(ones * spread(value.float(), ones, fake.axis, fake.group))

    zero = None if fake.zero_point is None else at.constant(fake.zero_point)[0]
    return Grid(by_row(at.constant(fake.scale)[0]), by_row(zero) if zero is not None and zero.any() else None, *int_range(fake.dtype))


def _store(gm: GraphModule, at: At, layer: QuantizedLayer, rows: Tensor, *, by: str) -> int:
    fake, old = layer.fake, layer.weight
    scale, zero = (None if n is None else at.constant(n)[0] for n in (fake.scale, fake.zero_point))
    assert scale is not None
    weight = fake_quantize(layer.from_rows(rows).to(old.dtype).contiguous(), scale, zero, fake.dtype, fake.axis, fake.group)
    if torch.equal(weight, old):
        return 0
    layer.set_weight(gm, weight, by=by)
    at.forget()
    ledger = state(gm).ledger
    entry = ledger.get(layer.label(ledger), "weight")
    if entry is not None:
        ledger.record(Entry(entry.node, entry.kind, "weight", entry.decision, by, "rounded to keep the output on calibration data"))
    return 1
