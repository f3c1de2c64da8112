"""Weights of language models rounded to few bits so that each layer's output is kept: GPTQ on the quantized prefix, with feedback.

With x the input of a layer y = W x in the model that is quantized up to here, and x', r' what the float model has in the same places,

1. W becomes W + f E[(W (x' - x) + (r' - r)) x^T] E[x x^T]^-1, the best float weight for an output that makes good for the share f of what
   has gone wrong before: in x, and, where y is added to a value r (a residual stream), in r too;
2. each group of columns gets the scale, of either sign, and the zero point that lose least, columns weighted by E[x^2] (scales.py);
3. W is rounded on these scales, the columns that matter most first (hessian.py).

Steps 2 and 3: Frantar et al., 2022, with scales fixed before rounding starts ("static groups"), so that the order of rounding needs no
permutation in the format. Step 1 generalises the asymmetric calibration of GPTAQ (Li et al., 2025) to the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qgraph.errors import RecipeError
from qgraph.formats import TIED
from qgraph.hessian import Lattice, best_rows, lattice, round_rows
from qgraph.layers import QuantizedLayer, layers
from qgraph.lockstep import At, lockstep, original, together
from qgraph.pipeline import LOSSY, Context, Contract, Pass
from qgraph.rewrite import Decline
from qgraph.scales import search
from qgraph.text import path_of
from qgraph.views import Elementwise, Linear, is_const, view

STARVED = 8
"""A layer that saw fewer rows than a share of 1 / STARVED of its inputs keeps the nearest numbers: experts that nothing was routed to."""


@dataclass(frozen=True)
class GPTQ(Pass):
    """Linears with an integer weight in groups, per channel or per tensor, in both dialects; several that read one value share its moments.

    All calibration samples are used unless `samples` says how many. `feedback` is the share f of step 1; 0 needs no float model beside the
    quantized one, which halves the time. `scales` "keep" leaves those that the recipe's weight_range has chosen. `damp` is the share of the
    mean diagonal that is added to that of E[x x^T]; None: 0.05 for 2 bits, 0.03 for more; with less, few data are fitted too well. More is
    taken by itself where E[x x^T] is not positive definite, and the ledger says how much. A second run rounds the same float weights
    again."""

    contract: ClassVar[Contract] = LOSSY
    at: ClassVar[Literal["float", "observed", "quantized"]] = "quantized"
    needs_data: ClassVar[bool] = True

    samples: int | None = None
    feedback: float = 0.5
    scales: Literal["search", "keep"] = "search"
    damp: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.feedback <= 1:
            raise RecipeError(f"feedback is a share from 0 to 1, got {self.feedback}")
        if self.scales not in ("search", "keep"):
            raise RecipeError(f"scales is search or keep, got {self.scales!r}")
        if self.damp is not None and not 0 < self.damp < 1:
            raise RecipeError(f"damp is a share between 0 and 1, got {self.damp}")

    @property
    def models(self) -> int:
        return 2 if self.feedback else 1

    def workspace(self, rows: int, columns: int) -> int:
        """Moments and what is made of them; the weight, its grid and its errors by row and by column (measured)."""
        return 4 * (5 * columns**2 + 16 * rows * columns)

    def run(self, gm: GraphModule, ctx: Context) -> int:
        sites = self.sites(gm, ctx)
        stops = together(sites, lambda node: sites[node].view.x)
        count = 0
        for at in lockstep(gm, stops, ctx.data, samples=self.samples, reference=self.feedback > 0, label=self.name, progress=ctx.progress):
            seen = self.look(at, {n: sites[n] for n in at.nodes})
            for node in at.nodes:
                found = self.round(gm, at, sites[node], seen)
                if isinstance(found, str):
                    ctx.declines.append(Decline(self.name, node.name, path_of(node), found))
                else:
                    count += found
            at.forget()
        gm.graph.lint()
        gm.recompile()
        return count

    def sites(self, gm: GraphModule, ctx: Context) -> dict[Node, QuantizedLayer]:
        found = {}
        for node, layer in layers(gm, ctx, by=self.name, biases=False).items():
            if reason := _obstacle(layer):
                ctx.declines.append(Decline(self.name, node.name, path_of(node), reason))
            else:
                found[node] = layer
        return found

    def look(self, at: At, sites: Mapping[Node, QuantizedLayer]) -> Moments:
        """What the calibration data say about the input of these layers."""
        x = sites[at.node].view.x
        k = sites[at.node].rows(sites[at.node].weight).shape[-1]
        if not self.feedback:
            return _moments(((v, None, ()) for v in at.inputs(x)), k, ())
        nodes = [(n, r) for n, layer in sites.items() if (r := _residual(layer, at.node)) is not None]
        batches = zip(at.values(x), *(at.values(r) for _, r in nodes), strict=True)
        return _moments(((xq, xf, rest) for (xf, xq), *rest in batches), k, [n for n, _ in nodes])

    def round(self, gm: GraphModule, at: At, layer: QuantizedLayer, seen: Moments) -> bool | str:
        """Rounds one layer; returns whether that changed it, or why it could not."""
        if seen.count * STARVED < seen.h.shape[-1]:
            return f"only {seen.count} rows of calibration data reached its {seen.h.shape[-1]} inputs: its weights are the nearest numbers"
        spec = layer.row_spec
        on = seen.lattice(max(0.03, 0.2 / 2**layer.bits) if self.damp is None else self.damp)
        if on is None:
            return "the second moments of its input are not finite, or of no positive definite matrix: its weights are the nearest numbers"
        rows = layer.rows(original(layer.fake.x)).float()
        if self.feedback:
            rows = best_rows(rows, self.feedback * seen.drift(layer.node, rows), on)
        if self.scales == "search" and spec is not None:
            layer = layer.set_grid(gm, *search(rows[0], spec, on.h[0].diagonal()), by=self.name)
        reason = f"rounded to keep the output on {seen.count} rows of calibration data, damping {on.damp:g}"
        return layer.store(gm, round_rows(rows, on, layer.grid()), by=self.name, reason=reason)


@dataclass
class Moments:
    """Of the input x of layers, in float32: h = E[x x^T] [1, K, K]; drifted = E[(x' - x) x^T] [1, K, K], None without a float model;
    residual: E[(r' - r) x^T] [1, N, K] of layers whose output is added to r; over `count` rows."""

    h: Tensor
    drifted: Tensor | None
    residual: Mapping[Node, Tensor]
    count: int
    lattices: dict[float, Lattice | None] = field(default_factory=dict)

    def lattice(self, damp: float) -> Lattice | None:
        """That of h, made once for all layers that read x."""
        if damp not in self.lattices:
            self.lattices[damp] = lattice(self.h, damp)
        return self.lattices[damp]

    def drift(self, node: Node, rows: Tensor) -> Tensor:
        """E[(W (x' - x) + r' - r) x^T], what the output of a layer with weight rows W has lost so far."""
        assert self.drifted is not None  # asked for with a float model
        found = rows @ self.drifted
        return found + self.residual[node] if node in self.residual else found


Batch = tuple[Tensor, Tensor | None, Sequence[tuple[Tensor, Tensor]]]
"""x, x' if there is a float model, and (r', r) for each layer that adds to a residual stream."""


def _moments(batches: Iterable[Batch], k: int, nodes: Sequence[Node]) -> Moments:
    h, drifted = torch.zeros(1, k, k), None
    residual: dict[Node, Tensor] = {}
    count = 0
    for x, wanted, sums in batches:
        x = x.reshape(-1, k).float()
        h[0].addmm_(x.T, x)
        count += len(x)
        if wanted is not None:
            drifted = torch.zeros(1, k, k) if drifted is None else drifted
            drifted[0].addmm_((wanted.reshape(-1, k).float() - x).T, x)
        for node, (floats, quantized) in zip(nodes, sums, strict=True):
            lost = (floats.float() - quantized.float()).reshape(len(x), -1)
            total = residual.setdefault(node, torch.zeros(1, lost.shape[1], k))
            total[0].addmm_(lost.T, x)
    for total in (h, *residual.values(), *([] if drifted is None else [drifted])):
        total.div_(max(count, 1))
    return Moments(h, drifted, residual, count)


def _obstacle(layer: QuantizedLayer) -> str:
    v = layer.view
    if not isinstance(v, Linear):
        return "a convolution: stage round rounds these"
    if layer.weight.dim() != 2 or v.x_axis != -1 or v.alpha != 1:
        return "its weight has other than two axes, its x is transposed, or it has a factor alpha"
    if TIED in layer.node.meta and layer.bits >= 8:
        return "its weight is an embedding table, too: its numbers are the table's"
    return "its quantized weight is read elsewhere, too" if len(v.weight.users) > 1 else ""


def _residual(layer: QuantizedLayer, stop: Node) -> Node | None:
    """r where the layer's output is added to a value r that is known before the stop, whatever bias comes between."""
    node = layer.bias_reader
    if len(node.users) != 1:
        return None
    added = view(Elementwise, next(iter(node.users)))
    others = [i for i in added.inputs if i is not node] if added is not None and added.kind == "add" else []
    r = others[0] if len(others) == 1 else None
    return r if isinstance(r, Node) and not is_const(r) and r < stop else None
