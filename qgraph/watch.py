"""Watch: a node y = x that sees every x. Runners know nothing else of observers and of what stages collect."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Watch(torch.nn.Module):
    """y = x; `update(x)` is called with each tensor unless it is frozen.

    A watch without `wants_values` may be told the bounds of a tensor instead of the tensor (`update_bounds`), which a runtime
    can reduce without handing it out."""

    frozen: bool = False

    def forward(self, x: Tensor) -> Tensor:
        self.update(x)
        return x

    def update(self, x: Tensor) -> None:
        raise NotImplementedError

    def update_bounds(self, low: float, high: float, count: int, *, dtype: torch.dtype = torch.float32) -> None:
        raise NotImplementedError

    @property
    def wants_values(self) -> bool:
        return True

    def freeze(self, frozen: bool = True) -> None:
        """Stops updating (or goes on); the module stays an identity."""
        self.frozen = frozen


class Listener(Watch):
    """Calls `fn` with each tensor."""

    def __init__(self, fn: Callable[[Tensor], object]) -> None:
        super().__init__()
        self._fn = fn

    def update(self, x: Tensor) -> None:
        if not self.frozen:
            self._fn(x.detach())
