"""y = W x -> (W D^-1) (D x), D = 1 / s per input channel: outliers of activations go into weights, which take them better.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

Xiao et al., SmoothQuant (2022), equation 4. How groups of layers are found, how alpha is searched and where D goes: balance.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule

from qgraph.balance import Method, balance
from qgraph.channels import Channels
from qgraph.errors import RecipeError
from qgraph.pipeline import EQUIVALENT, Context, Contract, Pass

SMALLEST = 1e-5
"""Factors are at least this."""

GRID = tuple(i / 10 for i in range(1, 11))
"""The values of alpha that a search tries."""


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Linears with constant weights, in both dialects; other layers that read the same values change with them.

    `alpha` between 0 (all into activations) and 1 (all into weights), or "search": per group the one of GRID with the least error of
    each linear's own formats on a sample of rows, or none where none is better than none. `explicit` multiplies in front of linears where
    nothing can take the factors in: one pass over x, which all of them share, and only where it lessens that error to `worth` of what it
    was. Raises RecipeError for another alpha."""

    contract: ClassVar[Contract] = EQUIVALENT(1e-4)
    needs_data: ClassVar[bool] = True

    alpha: float | Literal["search"] = "search"
    explicit: bool = False
    worth: float = 0.8

    def __post_init__(self) -> None:
        if self.alpha != "search" and not (isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1):
            raise RecipeError(f'alpha of smoothquant is a number from 0 to 1 or "search", got {self.alpha!r}')

    def run(self, gm: GraphModule, ctx: Context) -> int:
        grid = GRID if isinstance(self.alpha, str) else (self.alpha,)
        return balance(gm, ctx, Method(self.name, grid, Channels.largest, factors, self.explicit, self.worth))


def factors(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """s of equation 4, from largest magnitudes per channel [n]; 1 for channels that are always 0 on one side."""
    found = x.pow(alpha) / w.pow(1 - alpha)
    return torch.where((x > 0) & (w > 0), found.clamp(min=SMALLEST), 1.0)
