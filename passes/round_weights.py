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

from qgraph.hessian import lattice, round_rows
from qgraph.layers import QuantizedLayer, layers
from qgraph.lockstep import At, lockstep
from qgraph.passes.bias_correct import correct, mean_shift
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.rewrite import Decline
from qgraph.text import path_of

PER_COLUMN = 16
"""Patches per column that are taken of each batch at most: more say nothing new about the few columns of a depthwise convolution."""

REASON = "rounded to keep the output on calibration data"


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Convolutions and linears whose weight is fake-quantized with an integer grid, in both dialects.

    About `samples` calibration samples are run, fewer where they need more than `budget` bytes; at most `positions` patches are taken of
    each batch. `damp` is the share of the mean diagonal that is added to E[x x^T]. A second run rounds the same float weights again."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"
    needs_data: ClassVar[bool] = True

    samples: int = 32
    budget: int = 2**26
    positions: int = 512
    damp: float = 0.01

    def workspace(self, rows: int, columns: int) -> int:
        return 4 * (5 * columns**2 + 16 * rows * columns)

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
        positions = min(self.positions, PER_COLUMN * rows.shape[-1])
        on = lattice(_second_moment(at, layer, positions), self.damp)
        if on is None or not layer.store(gm, round_rows(rows, on, layer.grid()), by=self.name, reason=REASON):
            return 0
        at.forget()
        return 1


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
