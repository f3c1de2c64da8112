"""y = W x + b -> W x + (b + E[y_float] - E[y]): what quantization shifts on average, per output channel, goes into the bias.

Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 4.2, and its empirical form
(appendix D). Layers are corrected in order, each on inputs from layers corrected before it. Without data the shift of the mean is that of the
weights, (W_q - W) E[x], with E[x] from moments.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, map_arg

from qgraph.layers import QuantizedLayer, layers
from qgraph.ledger import Entry, state
from qgraph.lockstep import At, lockstep, original
from qgraph.moments import Moments
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.propagate import channels, propagate
from qgraph.rewrite import Decline
from qgraph.text import path_of
from qgraph.views import Linear, const_value
from qgraph.weights import Weight

NOISE = 1e-5
"""Shifts below this share of the largest output are what summing in float32 leaves."""


@dataclass(frozen=True)
class BiasCorrect(Pass):
    """Convolutions and linears whose weight is fake-quantized, in both dialects.

    About `samples` calibration samples are run, fewer where they need more than `budget` bytes. A second run finds nothing left to correct."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"
    needs_data: ClassVar[bool] = True

    samples: int = 64
    budget: int = 2**28

    def run(self, gm: GraphModule, ctx: Context) -> int:
        sites, count = layers(gm, ctx, by=self.name), 0
        for at in lockstep(gm, sites, ctx.data, samples=self.samples, budget=self.budget, label=self.name):
            layer = sites[at.node]
            count += correct(gm, layer, mean_shift(at, layer), by=self.name)
        gm.graph.lint()
        gm.recompile()
        return count


@dataclass(frozen=True)
class CorrectFromMoments(Pass):
    """The same layers without data, where the mean of their input is known; padding is ignored. A second run finds nothing to correct."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"

    def run(self, gm: GraphModule, ctx: Context) -> int:
        sites, known, count = layers(gm, ctx, by=self.name), propagate(gm), 0
        for node, layer in sites.items():
            found = known.get(layer.view.x, "it has no value")
            if not isinstance(found, Moments) or not found.known:
                reason = found if isinstance(found, str) else "nothing but bounds is known of what it reads"
                ctx.declines.append(Decline(self.name, node.name, path_of(node), reason))
            elif not layer.has_rows:
                ctx.declines.append(Decline(self.name, node.name, path_of(node), "its outputs do not all read the same number of inputs"))
            else:
                count += correct(gm, layer, expected_shift(layer, found), by=self.name)
        gm.graph.lint()
        gm.recompile()
        return count


def expected_shift(layer: QuantizedLayer, x: Moments) -> Tensor:
    """What the bias lacks, float64 [N]: b - (W_q - W) E[x] with the first b and W, minus the bias of now; 0 where it is no more than rounding."""
    v, fake = layer.view, layer.view.weight
    quantized = fake.target(*map_arg(fake.args, const_value), **map_arg(fake.kwargs, const_value))  # type: ignore[operator]
    axis, alpha = (v.x_axis, v.alpha) if isinstance(v, Linear) else (layer.output_axis, 1.0)
    error = Weight(v, quantized.double() - original(layer.fake.x).double()).response(channels(x, axis).mean) * alpha
    first = torch.zeros(1) if layer.bias_node is None else original(layer.bias_node).double().flatten() * layer.beta
    target = first - error
    shift = target - layer.bias()
    return shift.where(shift.abs() > NOISE * float(target.abs().max()), 0.0)


def mean_shift(at: At, layer: QuantizedLayer) -> Tensor:
    """E[y_float] - E[y_quantized] per output channel, float64 [N]; 0 where it is no more than rounding noise.

    The layer is affine, so it is called on the mean over the first axis of x instead of on all of x."""
    sums: dict[tuple[int, ...], Any] = {}
    for pair in at.values(layer.view.x):
        cases = len(pair[0]) if layer.has_cases(pair[0]) else 1
        added = [x.sum(0, keepdim=True) if layer.has_cases(x) else x for x in pair]
        old = sums.get(tuple(added[0].shape))
        sums[tuple(added[0].shape)] = (*added, cases) if old is None else (old[0] + added[0], old[1] + added[1], old[2] + cases)
    total, size, largest = torch.zeros(layer.outputs, dtype=torch.float64), 0, 0.0
    for x, y, cases in sums.values():
        floats, quantized = at.call(layer.view.x, x / cases, y / cases)
        shift = (floats.double() - quantized.double()).movedim(layer.output_axis, -1).reshape(-1, layer.outputs)
        total, size, largest = total + cases * shift.sum(0), size + cases * len(shift), max(largest, float(floats.abs().max()))
    mean = total / max(size, 1)
    if layer.bias_reader is not layer.node and layer.bias_node is not None:
        was, now = (b.double().flatten() for b in at.constant(layer.bias_node))
        mean = mean + (was - now)
    return mean.where(mean.abs() > NOISE * largest, 0.0)


def correct(gm: GraphModule, layer: QuantizedLayer, shift: Tensor, *, by: str) -> int:
    """Adds `shift` [N] to the bias, with an entry in the ledger; returns whether that changed it."""
    old = layer.bias()
    new = old + shift
    if not bool(shift.any()) or not bool(new.isfinite().all()):
        return 0
    layer.set_bias(gm, new, by=by)
    reason = f"moved by up to {float(shift.abs().max()):.2g} against the mean error of quantization"
    ledger = state(gm).ledger
    ledger.record(Entry(layer.label(ledger), layer.kind, "bias", "float", by, reason))
    return 1
