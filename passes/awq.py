"""y = W x -> (W D^-1) (D x), D = 1 / s per input channel: weights that meet large activations are rounded more finely.

    s_j = mean|X_j|^alpha

Lin et al., AWQ (2023), equations 4 and 5. How groups of layers are found, how alpha is searched and where D goes: balance.py. The
paper's second step, clipping, is a choice of ranges: `weight_range` of the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph.balance import Method, balance
from qgraph.channels import Channels
from qgraph.errors import RecipeError
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass

SMALLEST = 1e-4
"""Means of magnitudes are at least this share of the largest."""


@dataclass(frozen=True)
class AWQ(Pass):
    """Linears with constant weights, in both dialects; other layers that read the same values change with them.

    Per group, the one of `grid` values of alpha in (0, 1] with the least error of what its linears make in the recipe's formats, on a
    sample of rows; none where none is better than none. Raises RecipeError for an empty grid."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)
    needs_data: ClassVar[bool] = True

    grid: int = 20

    def __post_init__(self) -> None:
        if self.grid < 2:
            raise RecipeError(f"stage awq searches among at least 2 values of alpha, got grid={self.grid!r}")

    def run(self, gm: GraphModule, ctx: Context) -> int:
        grid = [(i + 1) / self.grid for i in range(self.grid)]
        return balance(gm, ctx, Method(self.name, grid, Channels.mean, factors))


def factors(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """s of equation 5, from means of magnitudes per channel [n], in a range around 1."""
    found = x.clamp(min=float(x.amax()) * SMALLEST).pow(alpha)
    return torch.ones_like(x) if not bool(x.any()) else found / (found.amin() * found.amax()).sqrt()
