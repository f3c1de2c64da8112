"""Channels: what a stage keeps of a value to choose factors or shifts per channel: bounds, and a random sample of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.errors import CalibrationError


class Channels:
    """`low`, `high`, `total` [n]: bounds and sum of magnitudes at each index of `axis`, over `seen` rows; `rows` [up to `count`, n]: each row
    of the data with the same chance. Empty before data.

    The sample is the rows with the smallest of random numbers drawn for all of them, so its size is fixed and it needs one pass."""

    def __init__(self, axis: int, *, count: int = 0) -> None:
        self.axis, self.count = axis, count
        self.low = self.high = self.total = self.rows = self.keys = torch.zeros(0)
        self.seen = 0
        self.generator = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        """Raises CalibrationError for NaN and infinities."""
        rows = x.detach().float().movedim(self.axis, -1).reshape(-1, x.shape[self.axis])
        if not rows.numel():
            return
        low, high = rows.aminmax(dim=0)
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise CalibrationError("a collected value contains NaN or infinity during calibration; check the calibration data")
        self.low, self.high = (low, high) if not len(self.low) else (torch.minimum(self.low, low), torch.maximum(self.high, high))
        self.total = rows.abs().sum(0, dtype=torch.float64) + (self.total if self.seen else 0)
        self.seen += len(rows)
        if self.count:
            self._draw(rows)

    def _draw(self, rows: Tensor) -> None:
        keys = torch.rand(len(rows), generator=self.generator)
        chosen = keys.topk(min(self.count, len(rows)), largest=False).indices  # few of a long batch: the copy below stays small
        rows, keys = torch.cat([self.rows.reshape(-1, rows.shape[1]), rows[chosen]]), torch.cat([self.keys, keys[chosen]])
        chosen = keys.topk(min(self.count, len(rows)), largest=False).indices
        self.rows, self.keys = rows[chosen], keys[chosen]

    def largest(self) -> Tensor:
        """Largest magnitudes [n]."""
        return torch.maximum(self.high, -self.low)

    def mean(self) -> Tensor:
        """Mean magnitudes [n]."""
        return (self.total / max(self.seen, 1)).float()
